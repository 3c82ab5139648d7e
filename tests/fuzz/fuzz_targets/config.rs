//! Fuzzes `mirrorfs::fuzz::config`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| mirrorfs::fuzz::config(data));
