//! Fuzzes `mirrorfs::fuzz::frame`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| mirrorfs::fuzz::frame(data));
