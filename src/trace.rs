//! Where the time of requests goes: counters per kind of request and stage, for `mirrorfs status --ops` and metrics.
//!
//! Owns the counters of this process and a stopwatch per thread. Knows nothing of what the stages do. A request costs two
//! looks at the clock and each stage within it two more, about 0.1 µs together; outside a request a stage costs nothing.

use std::cell::RefCell;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

/// What a request may be busy with. What is none of these is the filesystem's own work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(usize)]
pub enum Stage {
    /// Rules, memory, coding and decoding, the answer's way to the kernel.
    Own,
    /// Waiting for a thread that may block.
    Queue,
    /// Waiting for the turn to commit, or for memory and disk to catch up.
    Turn,
    /// Reading tables from disk (sled).
    Tables,
    /// Reading or writing local blocks (the slot file).
    Blocks,
    /// Waiting for the local disk to have everything.
    Sync,
    /// Waiting for replicas.
    Replicas,
}

/// Number of stages.
const STAGES: usize = 7;
/// Their names, in order.
const STAGE_NAMES: [&str; STAGES] = ["own", "queue", "turn", "tables", "blocks", "sync", "replicas"];
/// Kinds of requests at most.
const KINDS: usize = 48;
/// Buckets of the histogram: up to 2^n µs.
const BUCKETS: usize = 24;

/// Counters of one kind of request.
#[derive(Debug)]
struct Counters {
    count: AtomicU64,
    longest: AtomicU64,
    stages: [AtomicU64; STAGES],
    buckets: [AtomicU64; BUCKETS],
}

impl Counters {
    const fn new() -> Self {
        Self {
            count: AtomicU64::new(0),
            longest: AtomicU64::new(0),
            stages: [const { AtomicU64::new(0) }; STAGES],
            buckets: [const { AtomicU64::new(0) }; BUCKETS],
        }
    }
}

static COUNTERS: [Counters; KINDS] = [const { Counters::new() }; KINDS];
static NAMES: parking_lot::RwLock<Vec<&'static str>> = parking_lot::RwLock::new(Vec::new());

/// The stopwatch of a thread while it serves a request.
struct Watch {
    stage: Stage,
    since: Instant,
    spent: [u64; STAGES],
}

impl Watch {
    fn turn_to(&mut self, stage: Stage) -> Stage {
        let now = Instant::now();
        self.spent[self.stage as usize] += nanoseconds(now - self.since);
        self.since = now;
        std::mem::replace(&mut self.stage, stage)
    }
}

thread_local! {
    static WATCH: RefCell<Option<Watch>> = const { RefCell::new(None) };
}

fn nanoseconds(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

/// Serves a request of this kind that has waited for a thread since `queued`, if it had to. A request within a request
/// belongs to the outer one.
pub fn request<R>(kind: &'static str, queued: Option<Instant>, serve: impl FnOnce() -> R) -> R {
    /// Counts, also when the request panics.
    struct Counting(&'static str);
    impl Drop for Counting {
        fn drop(&mut self) {
            if let Some(mut watch) = WATCH.take() {
                watch.turn_to(Stage::Own);
                count(self.0, &watch.spent);
            }
        }
    }
    let now = Instant::now();
    let begun = WATCH.with_borrow_mut(|watch| {
        let begin = watch.is_none();
        if begin {
            let mut spent = [0; STAGES];
            spent[Stage::Queue as usize] =
                queued.map_or(0, |q| nanoseconds(now.saturating_duration_since(q)));
            *watch = Some(Watch { stage: Stage::Own, since: now, spent });
        }
        begin
    });
    let _counting = begun.then(|| Counting(kind));
    serve()
}

/// Does something that belongs to a stage. The time of a stage within a stage counts for the inner one alone.
pub fn stage<R>(stage: Stage, work: impl FnOnce() -> R) -> R {
    /// Turns back, also when the work panics.
    struct Back(Stage);
    impl Drop for Back {
        fn drop(&mut self) {
            WATCH.with_borrow_mut(|watch| {
                if let Some(watch) = watch {
                    watch.turn_to(self.0);
                }
            });
        }
    }
    let _back = WATCH.with_borrow_mut(|watch| watch.as_mut().map(|w| Back(w.turn_to(stage))));
    work()
}

fn number(kind: &'static str) -> usize {
    let find = |names: &[&'static str]| names.iter().position(|n| std::ptr::eq(*n, kind) || *n == kind);
    if let Some(found) = find(&NAMES.read()) {
        return found;
    }
    let mut names = NAMES.write();
    find(&names).unwrap_or_else(|| {
        if names.len() < KINDS {
            names.push(kind);
        }
        // More kinds than places share the last one: there are none in practice.
        names.len() - 1
    })
}

fn count(kind: &'static str, spent: &[u64; STAGES]) {
    let c = &COUNTERS[number(kind)];
    let total: u64 = spent.iter().sum();
    c.count.fetch_add(1, Relaxed);
    c.longest.fetch_max(total, Relaxed);
    for (sum, spent) in c.stages.iter().zip(spent) {
        if *spent > 0 {
            sum.fetch_add(*spent, Relaxed);
        }
    }
    c.buckets[bucket(total)].fetch_add(1, Relaxed);
}

/// The first bucket whose bound, 2^n µs, is not below the time; the last one takes the rest.
fn bucket(nanoseconds: u64) -> usize {
    let micros = nanoseconds.div_ceil(1000).max(1);
    (micros.next_power_of_two().trailing_zeros() as usize).min(BUCKETS - 1)
}

/// Figures of one kind of request, since the start of the process.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct OpFigures {
    /// Its name; those that had to wait for a thread are counted apart.
    pub name: String,
    /// How many were answered.
    pub count: u64,
    /// Seconds they took together.
    pub seconds: f64,
    /// The longest, in seconds.
    pub longest: f64,
    /// Upper bound of the time that half of them, and 99 of 100, stayed below, in seconds: exact to a factor of 2.
    pub median: f64,
    /// See `median`.
    pub p99: f64,
    /// Seconds by stage, those without any left out.
    pub stages: Vec<(String, f64)>,
}

/// All kinds that occurred, dearest first.
#[must_use]
pub fn figures() -> Vec<OpFigures> {
    let seconds = |ns: u64| ns as f64 / 1e9;
    let names = NAMES.read().clone();
    let mut all: Vec<OpFigures> = names
        .iter()
        .zip(&COUNTERS)
        .map(|(name, c)| {
            let stages: Vec<u64> = c.stages.iter().map(|s| s.load(Relaxed)).collect();
            let buckets: Vec<u64> = c.buckets.iter().map(|b| b.load(Relaxed)).collect();
            OpFigures {
                name: (*name).to_owned(),
                count: c.count.load(Relaxed),
                seconds: seconds(stages.iter().sum()),
                longest: seconds(c.longest.load(Relaxed)),
                median: quantile(&buckets, 0.5),
                p99: quantile(&buckets, 0.99),
                stages: STAGE_NAMES
                    .iter()
                    .zip(&stages)
                    .filter(|(_, ns)| **ns > 0)
                    .map(|(name, ns)| ((*name).to_owned(), seconds(*ns)))
                    .collect(),
            }
        })
        .collect();
    all.sort_by(|a, b| b.seconds.total_cmp(&a.seconds));
    all
}

fn quantile(buckets: &[u64], share: f64) -> f64 {
    let all: u64 = buckets.iter().sum();
    let wanted = (all as f64 * share).ceil() as u64;
    let mut seen = 0;
    for (n, count) in buckets.iter().enumerate() {
        seen += count;
        if seen >= wanted && seen > 0 {
            return (1_u64 << n) as f64 / 1e6;
        }
    }
    0.0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(name: &str) -> OpFigures {
        figures().into_iter().find(|f| f.name == name).unwrap()
    }

    #[test]
    fn time_goes_to_the_innermost_stage() {
        let nap = || std::thread::sleep(Duration::from_millis(5));
        let queued = Instant::now();
        nap();
        request("test-stages", Some(queued), || {
            nap();
            stage(Stage::Turn, || {
                nap();
                stage(Stage::Tables, nap);
                nap();
            });
            request("test-inner", None, nap);
        });
        let figures = of("test-stages");
        assert_eq!(figures.count, 1);
        let stage = |name: &str| figures.stages.iter().find(|(n, _)| n == name).map_or(0.0, |(_, s)| *s);
        assert!(stage("queue") >= 0.005 && stage("tables") >= 0.005, "{figures:?}");
        assert!(stage("own") >= 0.010 && stage("turn") >= 0.010, "{figures:?}");
        assert!(figures.p99 >= figures.median && figures.longest >= 0.030, "{figures:?}");
        assert!(super::figures().iter().all(|f| f.name != "test-inner"), "it belongs to the outer one");
    }

    #[test]
    fn a_panic_is_counted_and_ends_the_request() {
        let died = std::panic::catch_unwind(|| {
            request("test-panic", None, || stage(Stage::Blocks, || panic!("on purpose")));
        });
        assert!(died.is_err());
        assert_eq!(of("test-panic").count, 1);
        stage(Stage::Blocks, || ());
        WATCH.with_borrow(|watch| assert!(watch.is_none()));
    }

    #[test]
    fn buckets_double() {
        assert_eq!([0, 1, 1000, 1001, 2000, 2001, u64::MAX / 4].map(bucket), [0, 0, 0, 1, 1, 2, 23]);
        assert_eq!(quantile(&[0, 0], 0.5), 0.0);
        assert_eq!(quantile(&[98, 0, 1, 1], 0.5), 1e-6);
        assert_eq!(quantile(&[98, 0, 1, 1], 0.99), 4e-6);
    }
}
