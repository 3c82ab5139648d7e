//! Fuzzes `mirrorfs::fuzz::tail`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| mirrorfs::fuzz::tail(data));
