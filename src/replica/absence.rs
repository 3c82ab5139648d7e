//! How long a replica has been away, and how long its absence is waited for.
//!
//! Owns the state that all readers of one replica share, so that an outage is waited for once and
//! not once per object. Pure: times are arguments. Who waits, and for which failures, is the
//! reader's business.

use std::time::{Duration, Instant};

use parking_lot::Mutex;

/// Shared by the clones of a store.
#[derive(Debug, Default)]
pub struct Absence(Mutex<State>);

#[derive(Clone, Copy, Debug, Default)]
struct State {
    /// Whether it ever gave an answer.
    answered: bool,
    /// The first failure since the last answer.
    since: Option<Instant>,
}

impl Absence {
    /// Notes an answer.
    pub fn answered(&self) {
        *self.0.lock() = State { answered: true, since: None };
    }

    /// Notes that it did not answer; gives for how long that has been so.
    pub fn failed(&self, now: Instant) -> Duration {
        now.saturating_duration_since(*self.0.lock().since.get_or_insert(now))
    }

    /// For how long it has given no answer; `None` when it gave the last one.
    pub fn away_for(&self, now: Instant) -> Option<Duration> {
        self.0.lock().since.map(|since| now.saturating_duration_since(since))
    }

    /// Whether it ever answered. What never did is more likely a wrong place than an outage.
    pub fn has_answered(&self) -> bool {
        self.0.lock().answered
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_outage_lasts_until_the_next_answer() {
        let (absence, now) = (Absence::default(), Instant::now());
        let after = |secs| now + Duration::from_secs(secs);
        assert!(!absence.has_answered());
        assert_eq!(absence.failed(after(1)), Duration::ZERO);
        assert_eq!(absence.failed(after(5)), Duration::from_secs(4));
        absence.answered();
        assert!(absence.has_answered());
        assert_eq!(absence.failed(after(9)), Duration::ZERO);
        assert_eq!(absence.failed(after(9)), Duration::ZERO);
    }
}
