//! The allowance of local disk: who may still write.
//!
//! Owns the counters and the pure decision. Clean blocks never count against a writer: they are evicted for it.

use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::time::Duration;

/// Bytes in use, by kind, and how many there may be.
#[derive(Debug, Default)]
pub struct Space {
    limit: AtomicU64,
    /// What the disk itself has room for.
    disk: AtomicU64,
    /// Signed, like `clean`: a subtraction may overtake the addition it belongs to.
    dirty: AtomicI64,
    staged: AtomicU64,
    clean: AtomicI64,
}

/// May a writer go on?
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Admission {
    /// At once.
    Now,
    /// After this pause, so that shipping keeps up.
    After(Duration),
    /// Not before something was shipped.
    Full,
}

/// Share of the allowance from which on writers are slowed.
const SLOW_FROM: f64 = 0.75;
/// Longest pause of one write, reached when the allowance is full.
const SLOWEST: Duration = Duration::from_millis(200);

/// Whether a writer may add bytes when `used` of `limit` bytes hold what not every replica has.
#[must_use]
pub fn admit(limit: u64, used: u64) -> Admission {
    if used >= limit {
        return Admission::Full;
    }
    let share = used as f64 / limit as f64;
    if share < SLOW_FROM {
        return Admission::Now;
    }
    Admission::After(SLOWEST.mul_f64((share - SLOW_FROM) / (1.0 - SLOW_FROM)))
}

/// Kept free on the disk, as a share of its size and within bounds: the journal needs some space to get anything done, and
/// a segment must be staged before what it holds becomes clean.
const RESERVE: (u64, u64, u64) = (100, 64 << 20, 256 << 20);

/// How many bytes we may use on a disk of `size` bytes, when we use `used` of them and `free` are free.
fn room(used: u64, free: u64, size: u64) -> u64 {
    let (share, least, most) = RESERVE;
    (used + free).saturating_sub((size / share).clamp(least, most))
}

impl Space {
    /// An allowance of `limit` bytes.
    pub fn new(limit: u64) -> Self {
        Self { limit: AtomicU64::new(limit), disk: AtomicU64::new(u64::MAX), ..Self::default() }
    }

    /// The allowance in bytes: what was configured, or less when the disk has no room for it.
    pub fn limit(&self) -> u64 {
        self.limit.load(Ordering::Relaxed).min(self.disk.load(Ordering::Relaxed))
    }

    /// Tells the disk's free bytes and its size.
    pub fn set_disk(&self, free: u64, size: u64) {
        let used = self.dirty() + self.staged() + self.clean();
        self.disk.store(room(used, free, size), Ordering::Relaxed);
    }

    /// Bytes of dirty blocks.
    pub fn dirty(&self) -> u64 {
        self.dirty.load(Ordering::Relaxed).max(0) as u64
    }

    /// Bytes of staged objects.
    pub fn staged(&self) -> u64 {
        self.staged.load(Ordering::Relaxed)
    }

    /// Bytes of clean cached blocks.
    pub fn clean(&self) -> u64 {
        self.clean.load(Ordering::Relaxed).max(0) as u64
    }

    /// May a writer go on?
    pub fn admit(&self) -> Admission {
        admit(self.limit(), self.dirty() + self.staged())
    }

    /// Bytes by which clean blocks exceed what is left for them.
    pub fn excess(&self) -> u64 {
        (self.dirty() + self.staged() + self.clean()).saturating_sub(self.limit()).min(self.clean())
    }

    pub(super) fn add_dirty(&self, n: u64) {
        self.dirty.fetch_add(n as i64, Ordering::Relaxed);
    }

    pub(super) fn sub_dirty(&self, n: u64) {
        self.dirty.fetch_sub(n as i64, Ordering::Relaxed);
    }

    pub(super) fn add_clean(&self, n: u64) {
        self.clean.fetch_add(n as i64, Ordering::Relaxed);
    }

    pub(super) fn sub_clean(&self, n: u64) {
        self.clean.fetch_sub(n as i64, Ordering::Relaxed);
    }

    /// Tells how many bytes are staged now.
    pub fn set_staged(&self, n: u64) {
        self.staged.store(n, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn writers_are_slowed_then_stopped() {
        assert_eq!(admit(100, 0), Admission::Now);
        assert_eq!(admit(100, 74), Admission::Now);
        let (Admission::After(a), Admission::After(b)) = (admit(100, 80), admit(100, 99)) else {
            panic!("no pause near the end")
        };
        assert!(a < b && b <= SLOWEST);
        assert_eq!(admit(100, 100), Admission::Full);
        assert_eq!(admit(0, 0), Admission::Full);
    }

    #[test]
    fn the_disk_bounds_the_allowance() {
        const MIB: u64 = 1 << 20;
        assert_eq!(room(100 * MIB, 1000 * MIB, 2000 * MIB), 1036 * MIB);
        assert_eq!(room(100 * MIB, 1000 * MIB, 1 << 50), 844 * MIB);
        assert_eq!(room(0, 10, 20), 0);
        let s = Space::new(1000 * MIB);
        s.add_clean(500 * MIB as i64 as u64);
        s.add_dirty(100 * MIB);
        assert_eq!((s.limit(), s.excess()), (1000 * MIB, 0));
        s.set_disk(14 * MIB, 1000 * MIB);
        assert_eq!((s.limit(), s.excess(), s.admit()), (550 * MIB, 50 * MIB, Admission::Now));
        s.set_disk(0, 1000 * MIB);
        s.add_dirty(500 * MIB);
        assert_eq!(s.admit(), Admission::Full);
    }

    #[test]
    fn clean_blocks_give_way() {
        let s = Space::new(100);
        s.add_clean(90);
        s.add_dirty(30);
        assert_eq!(s.excess(), 20);
        assert_eq!(s.admit(), Admission::Now);
        s.sub_clean(200);
        assert_eq!(s.clean(), 0);
        s.add_clean(200);
        assert_eq!(s.clean(), 90, "nothing is lost when the order is turned round");
    }
}
