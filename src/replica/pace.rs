//! How long a transfer may take: a deadline that follows the speed seen so far.
//!
//! Pure. Owns the estimate of one replica's speed in one direction; knows no clock and no network.

use std::time::Duration;

/// Smallest transfer that says anything about speed; below it latency rules.
const TELLING: u64 = 256 * 1024;
/// Speed assumed before anything was measured, in bytes per second.
const FIRST_GUESS: f64 = 256.0 * 1024.0;
/// A link slower than this is as good as down, in bytes per second.
const SLOWEST: f64 = 16.0 * 1024.0;
/// How many times slower than usual a transfer may be before it is given up.
const PATIENCE: f64 = 4.0;

/// Speed of one direction, as an exponentially weighted mean.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pace {
    rate: f64,
}

impl Default for Pace {
    fn default() -> Self {
        Self { rate: FIRST_GUESS }
    }
}

impl Pace {
    /// The time that `len` bytes may take, on top of `base`.
    pub fn budget(&self, base: Duration, len: u64) -> Duration {
        base + Duration::from_secs_f64(PATIENCE * len as f64 / self.rate)
    }

    /// Takes note of a transfer that was completed.
    pub fn done(&mut self, len: u64, took: Duration) {
        if len >= TELLING {
            let rate = len as f64 / took.as_secs_f64().max(1e-4);
            self.rate = (0.7 * self.rate + 0.3 * rate).max(SLOWEST);
        }
    }

    /// Takes note of a transfer that was given up: the next one gets twice the time.
    pub fn gave_up(&mut self) {
        self.rate = (self.rate / 2.0).max(SLOWEST);
    }

    /// Bytes per second.
    pub fn rate(&self) -> f64 {
        self.rate
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn budget_follows_what_was_seen_and_stays_bounded() {
        let base = Duration::from_secs(10);
        let mut pace = Pace::default();
        let first = pace.budget(base, 16 << 20);
        for _ in 0..20 {
            pace.done(16 << 20, Duration::from_millis(160));
        }
        let fast = pace.budget(base, 16 << 20);
        assert!(fast < base + Duration::from_secs(1) && fast < first, "{fast:?}");
        for _ in 0..50 {
            pace.gave_up();
        }
        let slow = pace.budget(base, 16 << 20);
        assert_eq!(slow, base + Duration::from_secs(4 * 1024));
        pace.done(1, Duration::from_secs(100));
        assert_eq!(slow, pace.budget(base, 16 << 20), "small transfers say nothing");
    }
}
