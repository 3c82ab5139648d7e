//! Fuzzes `mirrorfs::fuzz::part`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| mirrorfs::fuzz::part(data));
