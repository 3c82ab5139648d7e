//! Waiting for bytes per second and for places among the reads of one replica.
//!
//! Owns the queues; how much may pass is decided in `limit`. Whoever stops waiting (a future that is dropped) leaves no trace.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tokio::sync::{Semaphore, SemaphorePermit};

use super::limit::{Bucket, Timetable, WeekMinute};

/// The rate is looked at again after this, however long there is to wait.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// How long background work lets others pass; then it queues like everybody, so that it comes to an end, too.
const PATIENCE: Duration = Duration::from_secs(10);

/// The limit of one direction.
pub(super) struct Throttle {
    table: Mutex<Timetable>,
    bucket: Mutex<Bucket>,
    /// Held by whoever is first in the queue. It is fair.
    turn: tokio::sync::Mutex<()>,
    queued: AtomicUsize,
    clock: fn() -> WeekMinute,
}

impl Throttle {
    pub fn new(table: Timetable) -> Self {
        Self {
            table: Mutex::new(table),
            bucket: Mutex::default(),
            turn: tokio::sync::Mutex::default(),
            queued: AtomicUsize::new(0),
            clock: local_minute,
        }
    }

    /// Sets other limits, also for those who wait already.
    pub fn set(&self, table: Timetable) {
        *self.table.lock() = table;
    }

    pub fn table(&self) -> Timetable {
        self.table.lock().clone()
    }

    /// The limit of the moment in bytes per second.
    pub fn rate(&self) -> Option<u64> {
        let table = self.table.lock();
        if table.is_off() { None } else { table.at((self.clock)()) }
    }

    /// How long nothing may pass yet, those in the queue not counted.
    pub fn wait(&self) -> Duration {
        let rate = self.rate();
        self.bucket.lock().wait(rate, Instant::now())
    }

    /// Waits until `len` bytes may pass, in the order of asking. In the `background` it lets others pass first.
    pub async fn pass(&self, len: u64, background: bool) {
        if background {
            let until = Instant::now() + PATIENCE;
            while Instant::now() < until {
                let wait = match self.queued.load(Ordering::Relaxed) {
                    0 => self.wait(),
                    _ => self.wait().max(Duration::from_millis(20)),
                };
                if wait.is_zero() {
                    break;
                }
                tokio::time::sleep(wait.min(LOOK_EVERY)).await;
            }
        }
        let _queued = Queued::new(&self.queued);
        let _turn = self.turn.lock().await;
        loop {
            let rate = self.rate();
            let taken = self.bucket.lock().take(len, rate, Instant::now());
            match taken {
                Ok(()) => return,
                Err(wait) => tokio::time::sleep(wait.min(LOOK_EVERY)).await,
            }
        }
    }

    /// Counts bytes that pass without waiting; others wait for them.
    pub fn charge(&self, len: u64) {
        let rate = self.rate();
        self.bucket.lock().charge(len, rate, Instant::now());
    }

    /// Takes back that `len` bytes passed.
    pub fn give_back(&self, len: u64) {
        self.bucket.lock().give_back(len);
    }
}

struct Queued<'a>(&'a AtomicUsize);

impl<'a> Queued<'a> {
    fn new(count: &'a AtomicUsize) -> Self {
        count.fetch_add(1, Ordering::Relaxed);
        Self(count)
    }
}

impl Drop for Queued<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Everything that bounds the traffic of one replica.
pub(super) struct Throttles {
    pub up: Throttle,
    pub down: Throttle,
    /// What background work obeys besides, in both directions together.
    pub background: Throttle,
    reads: Semaphore,
    background_reads: Semaphore,
}

impl Throttles {
    /// Limits of both directions and `reads` at a time, at least one.
    pub fn new(up: Timetable, down: Timetable, background: Timetable, reads: usize) -> Self {
        Self {
            up: Throttle::new(up),
            down: Throttle::new(down),
            background: Throttle::new(background),
            reads: Semaphore::new(reads.max(1)),
            // Reads of applications always find places that background work does not hold.
            background_reads: Semaphore::new((reads / 2).max(1)),
        }
    }

    /// The same with another number of reads at a time.
    pub fn with_reads(&self, reads: usize) -> Self {
        Self::new(self.up.table(), self.down.table(), self.background.table(), reads)
    }

    /// Waits for a place among the reads; it is kept as long as what this gives.
    pub async fn place(&self, background: bool) -> Place<'_> {
        // They are never closed, so that this cannot fail.
        let behind = if background { self.background_reads.acquire().await.ok() } else { None };
        Place { _behind: behind, _place: self.reads.acquire().await.ok() }
    }
}

/// A place among the reads of a replica.
pub(super) struct Place<'a> {
    _behind: Option<SemaphorePermit<'a>>,
    _place: Option<SemaphorePermit<'a>>,
}

/// The minute of the week where this machine is.
fn local_minute() -> WeekMinute {
    // SAFETY: time takes a null pointer; localtime_r fills in a structure of ours, for which zeros are a valid value; tzset
    // reads the environment, which this program never changes, and the zone's file.
    let local = unsafe {
        let now = libc::time(std::ptr::null_mut());
        let mut local: libc::tm = std::mem::zeroed();
        // The zone may have changed since the start.
        tzset();
        libc::localtime_r(&now, &mut local);
        local
    };
    let number = |n: libc::c_int| u32::try_from(n).unwrap_or(0);
    // There the week begins with Sunday.
    WeekMinute::new((number(local.tm_wday) + 6) % 7, number(local.tm_hour), number(local.tm_min))
}

unsafe extern "C" {
    fn tzset();
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    #[tokio::test]
    async fn the_average_holds_among_many_and_the_rate_may_change() {
        let throttle = Arc::new(Throttle::new(Timetable::always(Some(1 << 20))));
        let started = Instant::now();
        let mut all = tokio::task::JoinSet::new();
        for _ in 0..6 {
            let throttle = Arc::clone(&throttle);
            all.spawn(async move { throttle.pass(512 << 10, false).await });
        }
        while all.join_next().await.is_some() {}
        let took = started.elapsed();
        // Three MiB at one per second; the first is free, and the last may run into debt.
        assert!(took > Duration::from_millis(1200), "{took:?}");

        throttle.charge(1 << 40);
        let waiting = Arc::clone(&throttle);
        let waiting = tokio::spawn(async move { waiting.pass(1, false).await });
        tokio::time::sleep(Duration::from_millis(50)).await;
        assert!(!waiting.is_finished());
        throttle.set(Timetable::default());
        tokio::time::timeout(Duration::from_secs(20), waiting).await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn who_stops_waiting_stands_in_nobodys_way() {
        let throttle = Throttle::new(Timetable::always(Some(1 << 20)));
        throttle.charge(3 << 20);
        for _ in 0..3 {
            let given_up = tokio::time::timeout(Duration::from_millis(10), throttle.pass(1 << 40, false));
            given_up.await.unwrap_err();
        }
        assert_eq!(throttle.queued.load(Ordering::Relaxed), 0);
        tokio::time::timeout(Duration::from_secs(20), throttle.pass(1, false)).await.unwrap();
    }

    #[tokio::test]
    async fn background_work_lets_others_pass() {
        let throttle = Arc::new(Throttle::new(Timetable::always(Some(1 << 20))));
        throttle.charge((1 << 20) + (300 << 10));
        let order = Arc::new(Mutex::new(Vec::new()));
        let mut all = tokio::task::JoinSet::new();
        for background in [true, false, false] {
            let (throttle, order) = (Arc::clone(&throttle), Arc::clone(&order));
            all.spawn(async move {
                throttle.pass(300 << 10, background).await;
                order.lock().push(background);
            });
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        while all.join_next().await.is_some() {}
        assert_eq!(*order.lock(), [false, false, true]);
    }

    #[tokio::test]
    async fn reads_of_applications_find_a_place_beside_background_work() {
        let throttles = Throttles::new(Timetable::default(), Timetable::default(), Timetable::default(), 2);
        let _one = throttles.place(true).await;
        let wait = Duration::from_millis(20);
        assert!(tokio::time::timeout(wait, throttles.place(true)).await.is_err());
        let two = throttles.place(false).await;
        assert!(tokio::time::timeout(wait, throttles.place(false)).await.is_err());
        drop(two);
        throttles.place(false).await;
    }

    #[test]
    fn the_local_time_is_that_of_the_system() {
        let told = || {
            let ran = std::process::Command::new("date").arg("+%u %H %M").output().unwrap();
            let text = String::from_utf8(ran.stdout).unwrap();
            let n: Vec<u32> = text.split_whitespace().map(|w| w.parse().unwrap()).collect();
            WeekMinute::new(n[0] - 1, n[1], n[2])
        };
        // A minute may end in between.
        let (before, here, after) = (told(), local_minute(), told());
        assert!(here == before || here == after, "{before:?} {here:?} {after:?}");
    }
}
