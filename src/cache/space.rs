//! The allowance of local disk: who may still write.
//!
//! Owns the counters and the pure decision. Clean blocks never count against a writer: they are evicted for it.

use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::time::Duration;

/// Bytes in use, by kind, and how many there may be.
#[derive(Debug, Default)]
pub struct Space {
    limit: AtomicU64,
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

impl Space {
    /// An allowance of `limit` bytes.
    pub fn new(limit: u64) -> Self {
        Self { limit: AtomicU64::new(limit), ..Self::default() }
    }

    /// The allowance in bytes.
    pub fn limit(&self) -> u64 {
        self.limit.load(Ordering::Relaxed)
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
