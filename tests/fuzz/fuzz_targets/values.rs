//! Fuzzes `mirrorfs::fuzz::values`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| mirrorfs::fuzz::values(data));
