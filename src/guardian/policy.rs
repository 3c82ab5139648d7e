//! What follows when a daemon has ended. Pure.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use crate::fuse::Presence;

/// So many deaths within [`WINDOW`] are a crash loop.
pub(super) const MOST_DEATHS: usize = 5;
/// See [`MOST_DEATHS`].
const WINDOW: Duration = Duration::from_secs(60);
/// The pause before the second restart of a series; it doubles with each further one. The first one has none.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const MOST_DOUBLINGS: u32 = 2;

/// What is known when a daemon has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Ended {
    /// A mount of this guardian was live once.
    pub was_live: bool,
    /// Somebody has asked for the end, by a signal.
    pub asked: bool,
    /// What became of the mount.
    pub mount: Presence,
}

/// What the guardian does next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// Ends as the daemon did: that was in good order, or there is nothing to keep.
    End,
    /// Takes the dead mount away, and ends: somebody wanted that.
    Remove,
    /// Starts a daemon again after this pause.
    Restart(Duration),
    /// Ends and leaves the dead mount, as it was told not to restart.
    Stay,
    /// Ends and leaves the dead mount: the daemon dies again and again.
    GiveUp,
}

/// The rule, and the deaths it remembers.
#[derive(Debug)]
pub(super) struct Policy {
    restart: bool,
    most_deaths: usize,
    deaths: VecDeque<Instant>,
}

impl Policy {
    /// `most_deaths` within a minute end it.
    pub fn new(restart: bool, most_deaths: usize) -> Self {
        Self { restart, most_deaths, deaths: VecDeque::new() }
    }

    /// What follows a daemon's end at `now`.
    pub fn next(&mut self, ended: Ended, now: Instant) -> Next {
        match ended {
            Ended { was_live: false, .. } | Ended { mount: Presence::Gone | Presence::Live, .. } => Next::End,
            Ended { asked: true, .. } => Next::Remove,
            _ if !self.restart => Next::Stay,
            _ => self.after_death(now),
        }
    }

    fn after_death(&mut self, now: Instant) -> Next {
        self.deaths.push_back(now);
        self.deaths.retain(|death| now.saturating_duration_since(*death) < WINDOW);
        match self.deaths.len() {
            n if n >= self.most_deaths => Next::GiveUp,
            0 | 1 => Next::Restart(Duration::ZERO),
            n => {
                Next::Restart(FIRST_PAUSE * 2_u32.pow(u32::try_from(n - 2).unwrap_or(0).min(MOST_DOUBLINGS)))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEAD: Ended = Ended { was_live: true, asked: false, mount: Presence::Dead };

    #[test]
    fn what_ended_in_good_order_or_never_began_is_not_started_again() {
        let now = Instant::now();
        let mut policy = Policy::new(true, MOST_DEATHS);
        for ended in [
            Ended { was_live: false, ..DEAD },
            Ended { mount: Presence::Gone, ..DEAD },
            Ended { mount: Presence::Live, ..DEAD },
            Ended { mount: Presence::Gone, asked: true, ..DEAD },
        ] {
            assert_eq!(policy.next(ended, now), Next::End, "{ended:?}");
        }
        assert_eq!(policy.next(Ended { asked: true, ..DEAD }, now), Next::Remove);
        assert_eq!(Policy::new(false, MOST_DEATHS).next(DEAD, now), Next::Stay);
    }

    #[test]
    fn five_deaths_in_a_minute_are_enough() {
        let begin = Instant::now();
        let mut policy = Policy::new(true, MOST_DEATHS);
        let pauses = [0, 100, 200, 400].map(|ms| Next::Restart(Duration::from_millis(ms)));
        for (n, pause) in pauses.into_iter().enumerate() {
            assert_eq!(policy.next(DEAD, begin + Duration::from_secs(n as u64)), pause);
        }
        assert_eq!(policy.next(DEAD, begin + Duration::from_secs(59)), Next::GiveUp);
    }

    #[test]
    fn deaths_that_are_far_apart_are_each_the_first() {
        let begin = Instant::now();
        let mut policy = Policy::new(true, MOST_DEATHS);
        for n in 0..50 {
            let next = policy.next(DEAD, begin + WINDOW * n);
            assert_eq!(next, Next::Restart(Duration::ZERO));
        }
    }
}
