//! What a waiting person sees: a bar on a terminal, a line now and then elsewhere.
//!
//! The estimate is a pure function of what was seen when; the clock is handed in.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::{human, output};
use crate::escape;

/// Time between two plain lines.
const LINE_PACE: Duration = Duration::from_secs(5);

/// Estimates how long the rest takes, from a smoothed rate.
#[derive(Debug, Default)]
pub(super) struct Estimate {
    last: Option<(Instant, u64)>,
    rate: Option<f64>,
    most: u64,
    gone: u64,
}

impl Estimate {
    /// Takes note that `left` bytes are left at `now`. What is left may also grow, when more turns out to be needed.
    pub fn observe(&mut self, now: Instant, left: u64) {
        if let Some((before, was)) = self.last {
            let seconds = now.saturating_duration_since(before).as_secs_f64();
            self.gone += was.saturating_sub(left);
            if seconds < 0.5 && was == left {
                return;
            }
            if seconds > 0.0 {
                let current = was.saturating_sub(left) as f64 / seconds;
                // Half of the weight lies on the last five seconds.
                let weight = 1.0 - 0.5_f64.powf(seconds / 5.0);
                self.rate = Some(self.rate.map_or(current, |rate| rate + (current - rate) * weight));
            }
        }
        self.last = Some((now, left));
        self.most = self.most.max(self.gone + left);
    }

    /// Time for the rest; `None` while nothing moves.
    pub fn rest(&self) -> Option<Duration> {
        let (_, left) = self.last?;
        let rate = self.rate.filter(|rate| *rate >= 1.0)?;
        Duration::try_from_secs_f64(left as f64 / rate).ok()
    }

    /// Bytes done and bytes in all.
    pub fn position(&self) -> (u64, u64) {
        let left = self.last.map_or(0, |(_, left)| left);
        (self.most.saturating_sub(left), self.most)
    }
}

/// A bar, or lines.
pub(super) struct Progress {
    what: String,
    estimate: Estimate,
    bar: Option<ProgressBar>,
    last_line: Instant,
}

impl Progress {
    /// Begins; nothing is shown on standard error before the first update.
    pub fn new(what: &str) -> Progress {
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::with_draw_target(Some(1), ProgressDrawTarget::stderr());
            if let Ok(style) = ProgressStyle::with_template("{prefix} [{bar:30}] {wide_msg}") {
                bar.set_style(style.progress_chars("=> "));
            }
            bar.set_prefix(what.to_owned());
            bar
        });
        Progress { what: what.to_owned(), estimate: Estimate::default(), bar, last_line: Instant::now() }
    }

    /// Shows that `left` bytes are left, and `detail`.
    pub fn update(&mut self, left: u64, detail: &str) {
        let now = Instant::now();
        self.estimate.observe(now, left);
        let rest =
            self.estimate.rest().map(|rest| format!(", about {}", human::duration(rest))).unwrap_or_default();
        let message = format!("{} left{rest}{detail}", human::size(left));
        if let Some(bar) = &self.bar {
            let (done, all) = self.estimate.position();
            bar.set_length(all.max(1));
            bar.set_position(done);
            // The bar writes to the terminal by itself.
            bar.set_message(escape::line(&message).into_owned());
        } else if now.saturating_duration_since(self.last_line) >= LINE_PACE {
            self.last_line = now;
            output::note(&format!("{}: {message}", self.what));
        }
    }

    /// Takes the bar away.
    pub fn finish(self) {
        if let Some(bar) = self.bar {
            bar.finish_and_clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_steady_rate_gives_a_steady_estimate() {
        let start = Instant::now();
        let mut estimate = Estimate::default();
        assert_eq!(estimate.rest(), None);
        for second in 0..10_u64 {
            estimate.observe(start + Duration::from_secs(second), 10_000 - second * 100);
        }
        assert_eq!(estimate.rest(), Some(Duration::from_secs(91)));
        assert_eq!(estimate.position(), (900, 10_000));
    }

    #[test]
    fn nothing_moves_and_the_estimate_fades() {
        let start = Instant::now();
        let mut estimate = Estimate::default();
        estimate.observe(start, 1000);
        estimate.observe(start + Duration::from_secs(1), 900);
        let moving = estimate.rest().unwrap();
        estimate.observe(start + Duration::from_secs(6), 900);
        assert!(estimate.rest().unwrap() > moving);
        estimate.observe(start + Duration::from_secs(600), 900);
        assert_eq!(estimate.rest(), None);
    }

    #[test]
    fn what_is_left_may_grow() {
        let start = Instant::now();
        let mut estimate = Estimate::default();
        for (second, left) in [(0, 100), (1, 50), (2, 200), (3, 0)] {
            estimate.observe(start + Duration::from_secs(second), left);
        }
        assert_eq!(estimate.position(), (250, 250));
    }
}
