//! Fuzzes `mirrorfs::fuzz::claim`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| mirrorfs::fuzz::claim(data));
