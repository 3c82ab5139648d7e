//! Fuzzes `mirrorfs::fuzz::release`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| mirrorfs::fuzz::release(data));
