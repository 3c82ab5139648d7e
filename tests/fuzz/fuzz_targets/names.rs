//! Fuzzes `mirrorfs::fuzz::names`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| mirrorfs::fuzz::names(data));
