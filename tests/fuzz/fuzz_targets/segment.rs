//! Fuzzes `mirrorfs::fuzz::segment`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| mirrorfs::fuzz::segment(data));
