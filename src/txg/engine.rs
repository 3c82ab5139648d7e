//! The thread that cuts and seals.
//!
//! Owns when a transaction group ends. What waits for a commit on replicas asks [`Engine::sync`].

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use super::seal::Sealer;
use super::{Cut, CutSource};
use crate::cache::BlockStore;
use crate::format::tables::Time;
use crate::ids::{Lsn, SegmentNo};
use crate::journal::Journal;

/// How often to look whether something is due.
const TICK: Duration = Duration::from_millis(100);
/// First and longest pause after a failed seal.
const RETRY: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(10));

/// Called behind each sealed group.
pub type AfterSeal = Box<dyn FnMut(&mut Sealer) -> Result<(), String> + Send>;

/// When a group ends, and the clock.
#[derive(Clone)]
pub struct EngineOptions {
    /// Longest time from a change to its cut.
    pub interval: Duration,
    /// Dirty bytes that end a group sooner, when they are most of what there is to seal.
    pub bytes: u64,
    /// Dirty bytes that end a group sooner in any case.
    pub most: u64,
    /// Wall clock, for the cut time in segment headers.
    pub clock: Arc<dyn Fn() -> Time + Send + Sync>,
}

/// How far sealing is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Every record up to here is in a segment (or is local only).
    pub sealed: Lsn,
    /// The newest segment.
    pub segment: SegmentNo,
    /// Why the last attempt failed, when it did.
    pub error: Option<String>,
}

#[derive(Default)]
struct State {
    /// Counts requests to cut now.
    wanted: u64,
    /// The newest request that has been served.
    served: u64,
    /// Whether one of the others wants blocks taken up again whose rest was lost a moment ago.
    insist: bool,
    progress: Progress,
    stop: bool,
    stopped: bool,
}

/// Handle of the cutting and sealing thread.
pub struct Engine {
    state: Mutex<State>,
    wake: Condvar,
    done: Condvar,
}

impl Engine {
    /// Starts the thread. `after_seal` is called behind each sealed group (checkpoints live there); an error of it is
    /// logged.
    pub fn start(
        source: Arc<dyn CutSource>,
        journal: Arc<Journal>,
        blocks: Arc<BlockStore>,
        sealer: Sealer,
        options: EngineOptions,
        after_seal: AfterSeal,
    ) -> std::io::Result<Arc<Self>> {
        let mark = *sealer.mark();
        let progress = Progress { sealed: mark.lsn, segment: mark.segment, error: None };
        let engine = Arc::new(Self {
            state: Mutex::new(State { progress, ..State::default() }),
            wake: Condvar::new(),
            done: Condvar::new(),
        });
        let shared = Arc::clone(&engine);
        let mut run = Run { engine: shared, source, journal, blocks, sealer, options, after_seal, cut: None };
        thread::Builder::new().name("mirrorfs-txg".into()).spawn(move || {
            // Whatever ends the thread, nobody may wait for it for ever.
            let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| run.run()));
            let mut state = run.engine.state.lock();
            if outcome.is_err() {
                state.progress.error = Some("the sealing thread has panicked; see the log".into());
                log::error!(
                    "the sealing thread has panicked: nothing more reaches the replicas until a remount"
                );
            }
            state.stopped = true;
            run.engine.done.notify_all();
        })?;
        Ok(engine)
    }

    /// Ends the current group now and waits until it is sealed. Answers the segment that covers everything changed
    /// before the call, or why there is none by the deadline.
    pub fn sync(&self, deadline: Instant) -> Result<SegmentNo, String> {
        self.ask(false, deadline)
    }

    /// As [`Engine::sync`], for a person or an end: what no replica could give a moment ago, and is sealed without content therefore, is
    /// asked for once more. (An `fsync` would take too long with that.)
    pub fn settle(&self, deadline: Instant) -> Result<SegmentNo, String> {
        self.ask(true, deadline)
    }

    fn ask(&self, insist: bool, deadline: Instant) -> Result<SegmentNo, String> {
        let mut state = self.state.lock();
        state.wanted += 1;
        state.insist |= insist;
        let ticket = state.wanted;
        self.wake.notify_all();
        while state.served < ticket {
            if state.stopped {
                return Err(state.progress.error.clone().unwrap_or_else(|| "sealing has stopped".into()));
            }
            if self.done.wait_until(&mut state, deadline).timed_out() && state.served < ticket {
                let why = state.progress.error.clone().unwrap_or_else(|| "sealing is still under way".into());
                return Err(format!("not sealed in time: {why}"));
            }
        }
        Ok(state.progress.segment)
    }

    /// How far sealing is.
    pub fn progress(&self) -> Progress {
        self.state.lock().progress.clone()
    }

    /// Stops the thread after the group in progress. Does not cut: call [`Engine::sync`] first.
    pub fn stop(&self) {
        let mut state = self.state.lock();
        state.stop = true;
        self.wake.notify_all();
        while !state.stopped {
            self.done.wait(&mut state);
        }
    }
}

struct Run {
    engine: Arc<Engine>,
    source: Arc<dyn CutSource>,
    journal: Arc<Journal>,
    blocks: Arc<BlockStore>,
    sealer: Sealer,
    options: EngineOptions,
    after_seal: AfterSeal,
    /// A cut whose sealing failed: it is tried again before the next one.
    cut: Option<(Cut, Time)>,
}

/// Whether a group is due. `sparse` tells whether little of each dirty block was changed: such a group takes its time, because whole blocks
/// are sealed and sent, and what is written at random comes back to the same ones.
fn is_due(
    asked: bool,
    changed_for: Option<Duration>,
    dirty: u64,
    sparse: impl FnOnce() -> bool,
    options: &EngineOptions,
) -> bool {
    let large = || dirty >= options.most || (dirty >= options.bytes && !sparse());
    asked || changed_for.is_some_and(|age| age >= options.interval || large())
}

impl Run {
    fn run(&mut self) {
        let mut changed_since: Option<Instant> = None;
        let mut pause = RETRY.0;
        loop {
            let (wanted, served, insist) = {
                let state = self.engine.state.lock();
                if state.stop {
                    return;
                }
                (state.wanted, state.served, state.insist)
            };
            let changed = self.journal.last_lsn() > self.sealer.mark().lsn || self.source.has_pending();
            if changed {
                changed_since.get_or_insert_with(Instant::now);
            } else {
                changed_since = None;
            }
            let age = changed_since.map(|t| t.elapsed());
            let (dirty, sparse) = (self.blocks.space.dirty(), || self.blocks.is_sparse());
            if self.cut.is_none() && !is_due(wanted > served, age, dirty, sparse, &self.options) {
                let mut state = self.engine.state.lock();
                if !state.stop && state.served >= state.wanted {
                    self.engine.wake.wait_for(&mut state, TICK);
                }
                continue;
            }
            if insist {
                self.sealer.try_lost_again();
            }
            match self.step() {
                Ok(()) => {
                    pause = RETRY.0;
                    changed_since = None;
                    let mut state = self.engine.state.lock();
                    state.insist &= state.wanted > wanted;
                    let mark = self.sealer.mark();
                    state.progress = Progress { sealed: mark.lsn, segment: mark.segment, error: None };
                    state.served = state.served.max(wanted);
                    self.engine.done.notify_all();
                    // What stays dirty because its rest is lost calls for no group at once.
                    if self.blocks.counters.lost.load(Ordering::Relaxed) > 0 && !state.stop {
                        self.engine.wake.wait_for(&mut state, TICK);
                    }
                }
                Err(e) => {
                    log::warn!("sealing failed, it is tried again in {pause:?}: {e}");
                    let mut state = self.engine.state.lock();
                    state.progress.error = Some(e);
                    self.engine.done.notify_all();
                    let until = Instant::now() + pause;
                    while !state.stop && Instant::now() < until {
                        self.engine.wake.wait_until(&mut state, until);
                    }
                    pause = (pause * 2).min(RETRY.1);
                }
            }
        }
    }

    /// Seals the cut that failed before, if there is one, then a new one.
    fn step(&mut self) -> Result<(), String> {
        for again in [true, false] {
            if !again {
                let cut = self.source.cut()?;
                self.cut = Some((cut, (self.options.clock)()));
            }
            if let Some((cut, cut_at)) = &self.cut {
                self.sealer.seal(cut, *cut_at).map_err(|e| e.to_string())?;
                self.cut = None;
                if let Err(e) = (self.after_seal)(&mut self.sealer) {
                    log::warn!("after sealing: {e}");
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_group_ends_by_age_size_or_request() {
        let clock = Arc::new(Time::default);
        let options = EngineOptions { interval: Duration::from_secs(5), bytes: 100, most: 400, clock };
        let due = |asked, age, dirty, sparse| {
            is_due(asked, Option::map(age, Duration::from_secs), dirty, || sparse, &options)
        };
        assert!(!due(false, None, 1000, false));
        assert!(due(true, None, 0, true));
        assert!(!due(false, Some(1), 99, false));
        assert!(due(false, Some(1), 100, false));
        assert!(due(false, Some(5), 0, true));
        assert!(!due(false, Some(4), 399, true), "it waits for more of the same blocks");
        assert!(due(false, Some(1), 400, true));
    }
}
