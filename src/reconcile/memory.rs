//! When which pass is due, and what survives a restart.
//!
//! Pure. Owns the state machine of one replica's passes; time comes in as an argument, in seconds since 1970.
//!
//! ```text
//!            due, asked, attention
//!  idle ───────────────────────────▶ running ──finished──▶ idle
//!   ▲  pause ▼ ▲ resume               │  ▲
//!   └──────  paused ◀──── pause ──────┘  └── restart: goes on at the saved position
//! ```

use serde::{Deserialize, Serialize};

use super::types::{Counters, Summary};

/// How often passes are due, in seconds; `None` for never.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Intervals {
    /// Between two deep passes.
    pub deep: Option<f64>,
    /// Between two passes of any kind.
    pub shallow: Option<f64>,
    /// Least time between two passes that were caused by something met elsewhere.
    pub attention: f64,
}

/// A pass that is not over.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Current {
    /// Whether it reads every byte.
    pub deep: bool,
    /// Whether it changes nothing.
    pub dry_run: bool,
    /// When it began.
    pub started_at: f64,
    /// Everything up to this object, in the order of paths, is behind it; empty at the beginning.
    pub position: String,
    /// What it has met.
    pub counters: Counters,
}

/// What is remembered of one replica.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Memory {
    /// By command.
    pub paused: bool,
    /// The pass under way.
    pub current: Option<Current>,
    /// When the first look was taken: the first deep pass is due an interval later.
    pub known_since: Option<f64>,
    /// When the last deep pass ended.
    pub deep_at: Option<f64>,
    /// When the last pass of any kind ended.
    pub any_at: Option<f64>,
    /// How the last pass ended.
    pub last: Option<Summary>,
}

/// What to do now.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Next {
    /// Nothing before a command comes.
    Paused,
    /// Go on with the current pass.
    Run,
    /// Look again at this time; `None` when nothing is ever due.
    Wait(Option<f64>),
}

impl Memory {
    /// Decides what to do; enters a pass that is due as the current one. `attention` says that something was met that calls for a look.
    pub fn next(&mut self, now: f64, intervals: &Intervals, attention: bool) -> Next {
        // A clock that went back must not put everything off for years.
        for at in [&mut self.known_since, &mut self.deep_at, &mut self.any_at] {
            *at = at.map(|t| t.min(now));
        }
        let since = *self.known_since.get_or_insert(now);
        if self.paused {
            return Next::Paused;
        }
        if self.current.is_some() {
            return Next::Run;
        }
        let deep_due = self.next_deep(intervals);
        let any_due = intervals.shallow.map(|i| self.any_at.unwrap_or(since) + i);
        let called_due = attention.then(|| self.any_at.map_or(now, |at| at + intervals.attention));
        let is_due = |due: Option<f64>| due.is_some_and(|at| at <= now);
        if is_due(deep_due) || is_due(any_due) || is_due(called_due) {
            self.begin(is_due(deep_due), false, now);
            return Next::Run;
        }
        Next::Wait([deep_due, any_due, called_due].into_iter().flatten().reduce(f64::min))
    }

    /// When the next deep pass is due.
    #[must_use]
    pub fn next_deep(&self, intervals: &Intervals) -> Option<f64> {
        let since = self.known_since?;
        intervals.deep.map(|i| self.deep_at.unwrap_or(since) + i)
    }

    /// Begins a pass, in place of a current one of another kind; a current one of the same kind goes on.
    pub fn begin(&mut self, deep: bool, dry_run: bool, now: f64) {
        if self.current.as_ref().is_some_and(|c| (c.deep, c.dry_run) == (deep, dry_run)) {
            return;
        }
        self.current = Some(Current { deep, dry_run, started_at: now, ..Current::default() });
    }

    /// The current pass is over, for good or with an error.
    pub fn finish(&mut self, now: f64, error: Option<String>) {
        let Some(current) = self.current.take() else { return };
        let whole = error.is_none() && !current.dry_run;
        // One that failed also counts as a look, or it would begin again at once and for ever.
        self.any_at = Some(now);
        if current.deep && whole {
            self.deep_at = Some(now);
        }
        self.last = Some(Summary {
            deep: current.deep,
            dry_run: current.dry_run,
            started_at: current.started_at,
            finished_at: now,
            counters: current.counters,
            error,
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const INTERVALS: Intervals = Intervals { deep: Some(1000.0), shallow: Some(100.0), attention: 10.0 };

    #[test]
    fn passes_come_when_they_are_due() {
        let mut m = Memory::default();
        assert_eq!(m.next(50.0, &INTERVALS, false), Next::Wait(Some(150.0)));
        assert_eq!(m.next(150.0, &INTERVALS, false), Next::Run);
        assert!(!m.current.as_ref().unwrap().deep);
        m.finish(160.0, None);
        assert_eq!(m.next(160.0, &INTERVALS, false), Next::Wait(Some(260.0)));
        assert_eq!(m.next(161.0, &INTERVALS, true), Next::Wait(Some(170.0)), "attention waits a little");
        assert_eq!(m.next(170.0, &INTERVALS, true), Next::Run);
        m.finish(171.0, None);
        assert_eq!(m.next(1050.0, &INTERVALS, false), Next::Run);
        assert!(m.current.as_ref().unwrap().deep, "the deep one takes the place of a shallow one");
        m.finish(1060.0, Some("broke off".into()));
        assert_eq!(m.next(1061.0, &INTERVALS, false), Next::Run, "it is still due");
        m.finish(1070.0, None);
        assert_eq!(m.next_deep(&INTERVALS), Some(2070.0));
        let never = Intervals { deep: None, shallow: None, attention: 10.0 };
        assert_eq!(m.next(5000.0, &never, false), Next::Wait(None));
        // The clock went back by far.
        assert_eq!(m.next(10.0, &INTERVALS, false), Next::Wait(Some(110.0)));
    }

    #[test]
    fn pause_stop_and_restart() {
        let mut m = Memory::default();
        m.begin(true, false, 1.0);
        m.current.as_mut().unwrap().position = "segments/x".into();
        m.paused = true;
        assert_eq!(m.next(2.0, &INTERVALS, true), Next::Paused);
        let bytes = serde_json::to_vec(&m).unwrap();
        let mut m: Memory = serde_json::from_slice(&bytes).unwrap();
        m.paused = false;
        assert_eq!(m.next(3.0, &INTERVALS, false), Next::Run);
        m.begin(true, false, 4.0);
        assert_eq!(m.current.as_ref().unwrap().position, "segments/x", "asked again, it goes on");
        m.begin(true, true, 5.0);
        assert_eq!(m.current.as_ref().unwrap().position, "");
        m.finish(6.0, None);
        assert_eq!(m.deep_at, None, "a dry run mends nothing, so it does not count");
    }
}
