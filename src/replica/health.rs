//! How well one replica does, and who is asked first.
//!
//! Owns a state machine fed with what happened; pure: time and randomness come in as arguments, nothing is asked or sent here.
//!
//! ```text
//!            failure            several, or one that waiting does not mend
//!  healthy ──────────▶ degraded ─────────────────────────────▶ offline ◀──┐
//!     ▲                   │                                       │       │ failure: wait twice as long
//!     │      success      │                          wait is over │       │
//!     └───────────────────┘◀──────────── success ───────────── probing ───┘
//! ```

use std::time::{Duration, Instant};

use serde::Serialize;

use super::error::{ErrorKind, StoreError};

/// Failures in a row after which a replica counts as offline.
const OFFLINE_AFTER: u32 = 3;
/// First wait after a failure.
const FIRST_WAIT: Duration = Duration::from_millis(200);
/// Longest wait between two tries.
const LONGEST_WAIT: Duration = Duration::from_secs(15);
/// Reads up to this length tell latency, longer ones tell throughput.
const SMALL: u64 = 64 * 1024;
/// Weight of a new observation.
const ALPHA: f64 = 0.2;
/// Guesses before anything was seen: seconds, bytes per second.
const GUESS: (f64, f64) = (0.030, 20e6);

/// How a replica does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum HealthState {
    /// The last call succeeded.
    Healthy,
    /// The last calls failed, but too few to give it up.
    Degraded,
    /// Nothing is asked of it until a wait is over.
    Offline,
    /// The wait is over and one call finds out.
    Probing,
}

/// What happened on a replica.
#[derive(Clone, Debug)]
pub enum Event {
    /// A read of `len` bytes took `took`.
    Read {
        /// Bytes.
        len: u64,
        /// From asking to the last byte.
        took: Duration,
    },
    /// A read of `len` bytes was outpaced by another replica after `took` and given up: it is at least that slow.
    Late {
        /// Bytes.
        len: u64,
        /// From asking to giving up.
        took: Duration,
    },
    /// Any other call succeeded. (That an object is absent is an answer, so a success.)
    Success,
    /// A call failed. `random`, from 0 to 1, spreads the waits of many clients.
    Failure {
        /// Why.
        kind: ErrorKind,
        /// Spreads the wait.
        random: f64,
    },
}

impl Event {
    /// What an error says about the replica as a whole. One absent or damaged object says that it answers.
    #[must_use]
    pub fn of_error(error: &StoreError, random: f64) -> Self {
        match error.kind {
            ErrorKind::Absent | ErrorKind::Exists | ErrorKind::Corrupt => Event::Success,
            kind => Event::Failure { kind, random },
        }
    }
}

/// What is known of one replica's health.
#[derive(Clone, Debug)]
pub struct Health {
    state: HealthState,
    failures: u32,
    /// Class of the last failure while there was no success since.
    failing: Option<ErrorKind>,
    /// Since when it has been offline or probing.
    down_since: Option<Instant>,
    retry_at: Option<Instant>,
    latency: Option<f64>,
    rate: Option<f64>,
    deviation: f64,
}

impl Default for Health {
    fn default() -> Self {
        Self {
            state: HealthState::Healthy,
            failures: 0,
            failing: None,
            down_since: None,
            retry_at: None,
            latency: None,
            rate: None,
            deviation: 0.0,
        }
    }
}

impl Health {
    /// Takes note of what happened.
    pub fn apply(&mut self, event: &Event, now: Instant) {
        match *event {
            Event::Read { len, took } => {
                self.observe(len, took.as_secs_f64());
                self.recover();
            }
            Event::Late { len, took } => {
                if took.as_secs_f64() > self.estimate(len) {
                    self.observe(len, took.as_secs_f64());
                }
            }
            Event::Success => self.recover(),
            Event::Failure { kind, random } => {
                self.failures = self.failures.saturating_add(1);
                self.failing = Some(kind);
                let lasting = !kind.is_passing();
                let was_down = matches!(self.state, HealthState::Offline | HealthState::Probing);
                self.state = if lasting || was_down || self.failures >= OFFLINE_AFTER {
                    HealthState::Offline
                } else {
                    HealthState::Degraded
                };
                if self.state == HealthState::Offline {
                    self.down_since.get_or_insert(now);
                }
                self.retry_at = Some(now + backoff(self.failures, random));
            }
        }
    }

    fn recover(&mut self) {
        self.state = HealthState::Healthy;
        self.failures = 0;
        self.failing = None;
        self.down_since = None;
        self.retry_at = None;
    }

    fn observe(&mut self, len: u64, took: f64) {
        let error = (took - self.estimate(len)).abs();
        self.deviation += ALPHA * (error - self.deviation);
        let mix = |old: Option<f64>, new: f64| Some(old.map_or(new, |o| o + ALPHA * (new - o)));
        if len <= SMALL {
            self.latency = mix(self.latency, took);
        } else {
            let moving = (took - self.latency.unwrap_or(0.0)).max(took * 0.1).max(1e-6);
            self.rate = mix(self.rate, len as f64 / moving);
        }
    }

    fn estimate(&self, len: u64) -> f64 {
        let latency = self.latency.unwrap_or(if self.rate.is_some() { 0.0 } else { GUESS.0 });
        latency + len as f64 / self.rate.unwrap_or(GUESS.1)
    }

    /// Moves from offline to probing when the wait is over, and says how long to wait before the next try; zero is now.
    pub fn wait(&mut self, now: Instant) -> Duration {
        let left = self.retry_at.map_or(Duration::ZERO, |at| at.saturating_duration_since(now));
        if left.is_zero() && self.state == HealthState::Offline {
            self.state = HealthState::Probing;
        }
        left
    }

    /// The state.
    #[must_use]
    pub fn state(&self) -> HealthState {
        self.state
    }

    /// How long it has been offline, probing included; `None` when it is not.
    #[must_use]
    pub fn down_for(&self, now: Instant) -> Option<Duration> {
        self.down_since.map(|since| now.saturating_duration_since(since))
    }

    /// Why calls fail at present, when they do.
    #[must_use]
    pub fn failing(&self) -> Option<ErrorKind> {
        self.failing
    }

    /// Failures in a row.
    #[must_use]
    pub fn failures(&self) -> u32 {
        self.failures
    }

    /// How long a read of `len` bytes will probably take.
    #[must_use]
    pub fn expected(&self, len: u64) -> Duration {
        Duration::from_secs_f64(self.estimate(len))
    }

    /// When a read of `len` bytes is so late that a second replica should be asked too.
    #[must_use]
    pub fn late(&self, len: u64) -> Duration {
        let late = 2.0 * self.estimate(len) + 3.0 * self.deviation;
        Duration::from_secs_f64(late).max(Duration::from_millis(50))
    }

    /// Latency of small reads and throughput of large ones (seconds, bytes per second), as far as seen.
    #[must_use]
    pub fn speed(&self) -> (Option<f64>, Option<f64>) {
        (self.latency, self.rate)
    }

    /// Its place in the order of asking: the lower the earlier. Offline ones come last, by when they may be tried again.
    fn rank(&self, len: u64, now: Instant) -> (u8, f64) {
        let left = self.retry_at.map_or(0.0, |at| at.saturating_duration_since(now).as_secs_f64());
        match self.state {
            HealthState::Healthy => (0, self.estimate(len)),
            HealthState::Degraded => (1, self.estimate(len)),
            HealthState::Probing => (2, self.estimate(len)),
            HealthState::Offline => (3, left),
        }
    }
}

/// The order in which replicas are asked for `len` bytes: indices into `all`, best first. Equals keep their order.
#[must_use]
pub fn order(all: &[Health], len: u64, now: Instant) -> Vec<usize> {
    let mut ranked: Vec<_> = all.iter().enumerate().map(|(i, h)| (h.rank(len, now), i)).collect();
    ranked.sort_by(|((a, x), i), ((b, y), j)| a.cmp(b).then(x.total_cmp(y)).then(i.cmp(j)));
    ranked.into_iter().map(|(_, i)| i).collect()
}

/// The wait after the n-th failure in a row: doubling, bounded, shortened at random by up to half.
#[must_use]
pub fn backoff(failures: u32, random: f64) -> Duration {
    let doubled = FIRST_WAIT.saturating_mul(1 << failures.saturating_sub(1).min(16));
    doubled.min(LONGEST_WAIT).mul_f64(1.0 - 0.5 * random.clamp(0.0, 1.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn failure(kind: ErrorKind) -> Event {
        Event::Failure { kind, random: 0.0 }
    }

    #[test]
    fn goes_down_by_steps_and_comes_back_by_a_probe() {
        let now = Instant::now();
        let mut h = Health::default();
        let transient = failure(ErrorKind::Transient);
        h.apply(&transient, now);
        h.apply(&transient, now);
        assert_eq!(h.state(), HealthState::Degraded);
        assert_eq!(h.down_for(now), None);
        h.apply(&transient, now);
        assert_eq!(h.state(), HealthState::Offline);
        let wait = h.wait(now);
        assert_eq!(wait, FIRST_WAIT * 4);
        let later = now + wait;
        assert_eq!((h.wait(later), h.state()), (Duration::ZERO, HealthState::Probing));
        h.apply(&transient, later);
        assert_eq!((h.wait(later), h.state()), (FIRST_WAIT * 8, HealthState::Offline));
        for _ in 0..100 {
            h.apply(&transient, later);
        }
        assert_eq!(h.wait(later), LONGEST_WAIT);
        assert_eq!(h.down_for(later), Some(later - now), "since the first time");
        h.apply(&Event::Success, later);
        assert_eq!(h.down_for(later), None);
        assert_eq!((h.wait(later), h.state(), h.failures()), (Duration::ZERO, HealthState::Healthy, 0));
    }

    #[test]
    fn what_waiting_does_not_mend_is_offline_at_once_and_named() {
        let now = Instant::now();
        for kind in [ErrorKind::Denied, ErrorKind::Config, ErrorKind::Full, ErrorKind::Unsupported] {
            let mut h = Health::default();
            h.apply(&failure(kind), now);
            assert_eq!((h.state(), h.failing()), (HealthState::Offline, Some(kind)));
        }
    }

    #[test]
    fn waits_are_spread() {
        assert_eq!(backoff(1, 0.0), FIRST_WAIT);
        assert_eq!(backoff(1, 1.0), FIRST_WAIT / 2);
        assert_eq!(backoff(u32::MAX, 1.0), LONGEST_WAIT / 2);
    }

    #[test]
    fn the_near_and_healthy_are_asked_first() {
        let now = Instant::now();
        let took = |ms: u64| Event::Read { len: 4096, took: Duration::from_millis(ms) };
        let mut all = vec![Health::default(); 4];
        for _ in 0..10 {
            all[0].apply(&took(100), now);
            all[1].apply(&took(5), now);
            all[2].apply(&took(1), now);
        }
        assert_eq!(order(&all, 4096, now), [2, 1, 3, 0], "an unknown one counts as middling");
        all[2].apply(&failure(ErrorKind::Transient), now);
        assert_eq!(order(&all, 4096, now), [1, 3, 0, 2]);
        all[1].apply(&failure(ErrorKind::Denied), now);
        assert_eq!(order(&all, 4096, now), [3, 0, 2, 1]);
        assert!(all[0].late(4096) > Duration::from_millis(150));
        assert_eq!(all[1].late(4096), Duration::from_millis(50), "never nervous");
    }

    #[test]
    fn estimates_follow_latency_and_throughput() {
        let now = Instant::now();
        let mut h = Health::default();
        for _ in 0..40 {
            h.apply(&Event::Read { len: 1000, took: Duration::from_millis(20) }, now);
            h.apply(&Event::Read { len: 10_000_000, took: Duration::from_millis(1020) }, now);
        }
        let (latency, rate) = h.speed();
        assert!((latency.unwrap() - 0.020).abs() < 0.002 && (rate.unwrap() - 1e7).abs() < 1e6, "{h:?}");
        let expected = h.expected(5_000_000);
        assert!((expected.as_secs_f64() - 0.52).abs() < 0.05, "{expected:?}");
    }
}
