//! How much memory that is free the process keeps from the system.
//!
//! Owns the settings of the C library's allocator. Without them it raises the size from which a piece is mapped and given back by
//! itself to 32 MiB, as soon as one of a segment's size was freed; then segments come out of up to eight heaps for each processor, and
//! holes stay in all of them: after minutes with three replicas, of which some lag, 730 MiB were resident, with these settings below 200.

/// Heaps among which threads share. More keep more holes; fewer make threads wait for one another.
#[cfg(target_env = "gnu")]
const HEAPS: i32 = 4;
/// Larger pieces are given back at once: segments and what is read of them, but no single block.
#[cfg(target_env = "gnu")]
const MAPPED: i32 = 4 << 20;
/// Free bytes at the end of a heap that are kept: requests of 1 MiB come and go all the time.
#[cfg(target_env = "gnu")]
const KEPT: i32 = 16 << 20;

/// Sets it, for the whole process. To be called before there are threads.
pub(super) fn give_back() {
    #[cfg(target_env = "gnu")]
    for (what, value) in
        [(libc::M_ARENA_MAX, HEAPS), (libc::M_MMAP_THRESHOLD, MAPPED), (libc::M_TRIM_THRESHOLD, KEPT)]
    {
        // SAFETY: plain values; where one is refused it stays as it was.
        unsafe { libc::mallopt(what, value) };
    }
}
