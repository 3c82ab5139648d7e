//! Fuzzes `mirrorfs::fuzz::record`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| mirrorfs::fuzz::record(data));
