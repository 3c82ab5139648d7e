//! Keeps processors awake while requests come thick and fast.
//!
//! A request costs two wake-ups: of the thread that serves it, and of the one that asked. Where an idle processor halts deeply (a
//! virtual machine, above all), each of them takes longer than everything else about the request. Linux lets a process ask for
//! fast wake-ups: `/dev/cpu_dma_latency`, for as long as it is held open (`Documentation/power/pm_qos_interface.rst`).
//!
//! Owns that file and the rule by which it is used: only in bursts, so that an idle mount costs nothing. Knows nothing of what the
//! requests are.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::thread::{self, Thread};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

/// Where the wish for fast wake-ups is told.
const DEVICE: &str = "/dev/cpu_dma_latency";
/// Requests are counted in windows of this length.
const WINDOW: Duration = Duration::from_millis(4);
/// So many requests in a window are a burst: 3,000 a second.
const BURST: u32 = 12;
/// Windows without a burst after which processors may sleep again.
const CALM: u32 = 2;
/// Bytes written: microseconds that a wake-up may take. The largest is the kernel's own default (`PM_QOS_CPU_LATENCY_DEFAULT_VALUE`).
const AT_ONCE: i32 = 0;
const WHENEVER: i32 = 2_000_000_000;

/// Counts requests, and notices when they begin to come in bursts. Times are microseconds since some moment.
#[derive(Debug, Default)]
struct Counter {
    /// When the window began.
    since: AtomicU64,
    /// Requests in it.
    count: AtomicU32,
}

impl Counter {
    /// Counts one; answers whether it makes the window a burst. Several threads may call it; a request that falls between two
    /// windows may be lost, which does no harm.
    fn note(&self, now: u64) -> bool {
        let since = self.since.load(Ordering::Relaxed);
        if now.saturating_sub(since) > WINDOW.as_micros() as u64 {
            self.since.store(now, Ordering::Relaxed);
            self.count.store(1, Ordering::Relaxed);
            return false;
        }
        self.count.fetch_add(1, Ordering::Relaxed) + 1 == BURST
    }
}

/// When processors may sleep again: after some windows without a burst.
#[derive(Debug, Default)]
struct Calm {
    seen: u64,
    windows: u32,
}

impl Calm {
    /// A window has passed, with so many requests in all up to its end; answers whether the burst is over.
    fn window(&mut self, requests: u64) -> bool {
        let busy = requests.wrapping_sub(self.seen) >= u64::from(BURST);
        self.seen = requests;
        self.windows = if busy { 0 } else { self.windows + 1 };
        self.windows >= CALM
    }
}

/// Keeps processors awake in bursts of requests, once [`Awake::start`]ed.
#[derive(Debug)]
pub(super) struct Awake {
    base: Instant,
    counter: Counter,
    /// All requests.
    total: AtomicU64,
    running: AtomicBool,
    /// Processors are kept awake now.
    active: AtomicBool,
    ended: AtomicBool,
    thread: Mutex<Option<Thread>>,
}

impl Default for Awake {
    fn default() -> Self {
        Self {
            base: Instant::now(),
            counter: Counter::default(),
            total: AtomicU64::new(0),
            running: AtomicBool::new(false),
            active: AtomicBool::new(false),
            ended: AtomicBool::new(false),
            thread: Mutex::new(None),
        }
    }
}

impl Awake {
    /// A request is being served.
    pub(super) fn note(&self) {
        if !self.running.load(Ordering::Relaxed) {
            return;
        }
        self.total.fetch_add(1, Ordering::Relaxed);
        let now = u64::try_from(self.base.elapsed().as_micros()).unwrap_or(u64::MAX);
        if self.counter.note(now)
            && !self.active.load(Ordering::Acquire)
            && let Some(thread) = &*self.thread.lock()
        {
            thread.unpark();
        }
    }

    /// From now on bursts keep processors awake.
    ///
    /// # Errors
    /// When this process may not ask for it (it takes root), or no thread can be started.
    pub(super) fn start(self: &Arc<Self>) -> io::Result<()> {
        let device = OpenOptions::new().write(true).open(DEVICE)?;
        // Opening it asks for nothing yet, but for the kernel's default.
        let awake = Arc::clone(self);
        let handle =
            thread::Builder::new().name("mirrorfs-awake".into()).spawn(move || awake.serve(device))?;
        *self.thread.lock() = Some(handle.thread().clone());
        self.running.store(true, Ordering::Release);
        Ok(())
    }

    /// Ends it, for good.
    pub(super) fn stop(&self) {
        self.running.store(false, Ordering::Release);
        self.ended.store(true, Ordering::Release);
        if let Some(thread) = self.thread.lock().take() {
            thread.unpark();
        }
    }

    fn serve(&self, mut device: File) {
        while !self.ended.load(Ordering::Acquire) {
            thread::park();
            self.active.store(true, Ordering::Release);
            let asked = device.write_all(&AT_ONCE.to_ne_bytes());
            let mut calm = Calm::default();
            while asked.is_ok() && !self.ended.load(Ordering::Acquire) {
                thread::sleep(WINDOW);
                if calm.window(self.total.load(Ordering::Relaxed)) {
                    break;
                }
            }
            self.active.store(false, Ordering::Release);
            if let Err(e) = asked.and_then(|()| device.write_all(&WHENEVER.to_ne_bytes())) {
                log::warn!("{DEVICE}: {e}; requests are served as fast as processors wake by themselves");
                self.running.store(false, Ordering::Release);
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_is_noticed_once_and_a_trickle_never() {
        let window = WINDOW.as_micros() as u64;
        let counter = Counter::default();
        let noticed = (0..100).filter(|n| counter.note(10 * window + n * 10)).count();
        assert_eq!(noticed, 1, "in one window");
        let counter = Counter::default();
        let trickle = (1..1000).filter(|n| counter.note(n * window / u64::from(BURST - 2))).count();
        assert_eq!(trickle, 0);
    }

    #[test]
    fn a_burst_ends_after_some_calm_windows() {
        let mut calm = Calm::default();
        assert!(!calm.window(1000));
        assert!(!calm.window(1000 + u64::from(BURST)));
        assert!(!calm.window(1002 + u64::from(BURST)));
        assert!(!calm.window(2000), "busy again");
        assert!(!calm.window(2001));
        assert!(calm.window(2002));
    }

    #[test]
    fn without_the_device_nothing_is_counted() {
        let awake = Awake::default();
        for _ in 0..100 {
            awake.note();
        }
        assert_eq!(awake.total.load(Ordering::Relaxed), 0);
    }
}
