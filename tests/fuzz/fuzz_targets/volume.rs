//! Fuzzes `mirrorfs::fuzz::volume`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| mirrorfs::fuzz::volume(data));
