//! The allowance of local disk: who may still write.
//!
//! Owns the counters and the pure decision. Clean blocks never count against a writer: they are evicted for it. The
//! allowance is a promise of the configuration; what the disk itself has left bounds it too, because others use it.

use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

/// Bytes in use, by kind, and how many there may be.
#[derive(Debug)]
pub struct Space {
    limit: AtomicU64,
    /// Signed, like `clean`: a subtraction may overtake the addition it belongs to.
    dirty: AtomicI64,
    staged: AtomicU64,
    clean: AtomicI64,
    /// Bytes free on the disk when it was measured last.
    free: AtomicU64,
    /// Bytes added since then.
    unmeasured: AtomicU64,
    /// Share of the disk that stays free, as the bits of an `f64`.
    free_ratio: AtomicU64,
    /// What that was in bytes when the disk was measured last, at least [`RESERVE`].
    keep_free: AtomicU64,
    /// Since when writers have been refused.
    full_since: Mutex<Option<Instant>>,
    /// Whether somebody was told of it.
    complained: AtomicBool,
}

/// A disk, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Disk {
    /// What we may still take.
    pub free: u64,
    /// Its size.
    pub size: u64,
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
/// Bytes of the disk that content never takes: the journal must be able to go on, or what fills the disk could not be
/// sealed, sent and removed.
const RESERVE: u64 = 32 << 20;
/// After so many bytes the disk is measured again.
const MEASURE_EVERY: u64 = 1 << 20;

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

/// Whether a writer may add bytes to a disk with `free` bytes, of which `keep` are to stay free, when `dirty` bytes have yet to be
/// sealed (which takes as many again).
#[must_use]
pub fn admit_on_disk(free: u64, dirty: u64, keep: u64) -> Admission {
    let left = free.saturating_sub(dirty);
    let Some(above) = left.checked_sub(keep).filter(|a| *a > 0) else { return Admission::Full };
    if above >= RESERVE {
        return Admission::Now;
    }
    Admission::After(SLOWEST.mul_f64((RESERVE - above) as f64 / RESERVE as f64))
}

impl Space {
    /// An allowance of `limit` bytes.
    pub fn new(limit: u64) -> Self {
        Self {
            limit: AtomicU64::new(limit),
            dirty: AtomicI64::new(0),
            staged: AtomicU64::new(0),
            clean: AtomicI64::new(0),
            free: AtomicU64::new(u64::MAX),
            unmeasured: AtomicU64::new(0),
            free_ratio: AtomicU64::new(0),
            keep_free: AtomicU64::new(RESERVE),
            full_since: Mutex::new(None),
            complained: AtomicBool::new(false),
        }
    }

    /// Sets the share of the disk, from 0 to 1, that is to stay free. It counts from the next measurement on.
    pub fn set_free_ratio(&self, ratio: f64) {
        self.free_ratio.store(ratio.to_bits(), Ordering::Relaxed);
        self.note_written(MEASURE_EVERY);
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
        let dirty = self.dirty();
        let answer = match (admit(self.limit(), dirty + self.staged()), self.on_disk()) {
            (Admission::Full, _) | (_, Admission::Full) => Admission::Full,
            (Admission::After(a), Admission::After(b)) => Admission::After(a.max(b)),
            (Admission::Now, other) | (other, Admission::Now) => other,
        };
        if answer != Admission::Full {
            *self.full_since.lock() = None;
            self.complained.store(false, Ordering::Relaxed);
        }
        answer
    }

    /// Why there is no room, for the log; once for each time that it runs out.
    pub fn complaint(&self) -> Option<String> {
        if self.complained.swap(true, Ordering::Relaxed) {
            return None;
        }
        let mib = |bytes: u64| bytes >> 20;
        let waiting = self.dirty() + self.staged();
        Some(if self.on_disk() == Admission::Full {
            format!(
                "writers get ENOSPC: the disk of the state folder has {} MiB left, of which {} MiB stay free (free_space_ratio) and {} \
                 MiB are needed to seal what was written",
                mib(self.free.load(Ordering::Relaxed)),
                mib(self.keep_free.load(Ordering::Relaxed)),
                mib(self.dirty())
            )
        } else {
            format!(
                "writers get ENOSPC: {} MiB that not every replica holds fill the allowance of {} MiB (cache_size)",
                mib(waiting),
                mib(self.limit())
            )
        })
    }

    /// May content be added, as far as the disk goes?
    pub(super) fn on_disk(&self) -> Admission {
        let load = |n: &AtomicU64| n.load(Ordering::Relaxed);
        admit_on_disk(load(&self.free), self.dirty(), load(&self.keep_free))
    }

    /// Since when it has been full; from now on when it was not before.
    pub fn full_since(&self) -> Instant {
        *self.full_since.lock().get_or_insert_with(Instant::now)
    }

    /// Whether the disk has so little left that not even names can be added.
    pub fn is_disk_full(&self) -> bool {
        self.free.load(Ordering::Relaxed) < RESERVE / 2
    }

    /// Whether the disk is to be measured again before the next answer.
    pub fn is_measure_due(&self) -> bool {
        self.unmeasured.load(Ordering::Relaxed) >= MEASURE_EVERY || self.on_disk() != Admission::Now
    }

    /// Tells what the disk is like.
    pub fn measured(&self, disk: Disk) {
        let ratio = f64::from_bits(self.free_ratio.load(Ordering::Relaxed));
        let keep = (disk.size as f64 * ratio) as u64;
        self.unmeasured.store(0, Ordering::Relaxed);
        self.keep_free.store(keep.max(RESERVE), Ordering::Relaxed);
        self.free.store(disk.free, Ordering::Relaxed);
    }

    /// Tells that about `n` bytes were written that no counter here sees.
    pub fn note_written(&self, n: u64) {
        self.unmeasured.fetch_add(n, Ordering::Relaxed);
    }

    /// Bytes by which clean blocks exceed what is left for them in the allowance.
    pub fn excess(&self) -> u64 {
        (self.dirty() + self.staged() + self.clean()).saturating_sub(self.limit()).min(self.clean())
    }

    /// Bytes of clean blocks to be given up so that the disk has room, `freeing` of them being on their way out already.
    pub fn shortage(&self, freeing: u64) -> u64 {
        let keep = self.keep_free.load(Ordering::Relaxed);
        let wanted = self.dirty().saturating_add(keep).saturating_add(RESERVE);
        let coming = self.free.load(Ordering::Relaxed).saturating_add(freeing);
        wanted.saturating_sub(coming).min(self.clean())
    }

    pub(super) fn add_dirty(&self, n: u64) {
        self.note_written(n);
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
    fn the_disk_itself_bounds_writers() {
        assert_eq!(admit_on_disk(u64::MAX, 1 << 40, RESERVE), Admission::Now);
        assert_eq!(admit_on_disk(2 * RESERVE + 10, 10, RESERVE), Admission::Now);
        assert!(matches!(admit_on_disk(2 * RESERVE, 10, RESERVE), Admission::After(_)));
        assert_eq!(admit_on_disk(RESERVE + 10, 10, RESERVE), Admission::Full);
        assert_eq!(admit_on_disk(5, 10, RESERVE), Admission::Full);
        let s = Space::new(u64::MAX);
        assert_eq!((s.admit(), s.shortage(0)), (Admission::Now, 0));
        s.add_clean(10 * RESERVE);
        s.measured(Disk { free: RESERVE, size: 100 * RESERVE });
        assert_eq!(
            (s.admit(), s.shortage(0), s.shortage(RESERVE / 2)),
            (Admission::Full, RESERVE, RESERVE / 2)
        );
        assert!(s.is_measure_due() && !s.is_disk_full());
        assert!(s.complaint().is_some_and(|c| c.contains("free_space_ratio")) && s.complaint().is_none());
        let since = s.full_since();
        assert_eq!(s.full_since(), since);
        s.measured(Disk { free: 4 * RESERVE, size: 100 * RESERVE });
        assert_eq!((s.admit(), s.shortage(0)), (Admission::Now, 0));
        assert!(s.full_since() > since, "a new shortage begins anew");
    }

    #[test]
    fn a_share_of_the_disk_stays_free() {
        let s = Space::new(u64::MAX);
        s.set_free_ratio(0.1);
        assert!(s.is_measure_due());
        let size = 1000 * RESERVE;
        s.add_clean(500 * RESERVE);
        let mut last = Duration::ZERO;
        // Clean blocks go as soon as writers are slowed, before they are refused.
        for (free, full, short) in
            [(102, false, 0), (101, false, 0), (100, true, RESERVE), (60, true, 41 * RESERVE)]
        {
            s.measured(Disk { free: free * RESERVE, size });
            assert_eq!((s.admit() == Admission::Full, s.shortage(0)), (full, short), "{free}");
        }
        for part in [9, 5, 1] {
            s.measured(Disk { free: 100 * RESERVE + part * RESERVE / 10, size });
            let Admission::After(pause) = s.admit() else { panic!("not slowed") };
            assert!(pause > last && pause <= SLOWEST);
            last = pause;
        }
        assert!(!s.is_disk_full(), "names go on");
        s.add_dirty(RESERVE);
        assert_eq!(s.admit(), Admission::Full, "sealing takes as much again");
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
