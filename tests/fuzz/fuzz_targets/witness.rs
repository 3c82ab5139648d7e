//! Fuzzes `mirrorfs::fuzz::witness`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| mirrorfs::fuzz::witness(data));
