//! The tasks that look after one replica.
//!
//! Owns running passes when `memory` says so, mending at once what reads have met, and what `status` shows. Writes nothing itself.

use std::collections::{HashMap, VecDeque};
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use futures::FutureExt;
use parking_lot::{Mutex, MutexGuard};
use tokio::sync::{Notify, watch};
use tokio::task::JoinHandle;

use super::super::memory::{Memory, Next};
use super::super::pass::{Broken, Pass};
use super::super::repair::{Mender, Outcome};
use super::super::types::{Counters, FindingText, ScrubRequest, ScrubState, ScrubStatus};
use super::Shared;
use super::listen::Watch;
use crate::format::names::ObjectName;
use crate::replica::health::HealthState;
use crate::replica::{DamageKind, Replica, ReplicaState, unix_now};

/// Findings shown.
const MOST_FINDINGS: usize = 100;
/// How often a task that waits looks around.
const TICK: Duration = Duration::from_millis(500);
/// Longest wait before a repair that failed is tried again.
const LONGEST_PAUSE: Duration = Duration::from_secs(600);
/// A replica that is somebody else's at the end of so many passes in a row is not waited for.
const FOREIGN_PASSES: u32 = 4;
/// How often the position of a pass is saved.
pub(super) const SAVE_EVERY: Duration = Duration::from_secs(5);

/// The tasks of one replica.
pub(super) type Tasks = [JoinHandle<()>; 2];

/// One replica's work.
pub(super) struct Worker {
    pub(super) shared: Arc<Shared>,
    pass: Pass,
    pub(super) memory: Mutex<Memory>,
    pub(super) live: Mutex<Live>,
    /// Something was met that calls for a look.
    attention: AtomicBool,
    /// Wakes the task that waits.
    wake: Notify,
    /// Ends the pass under way.
    cancel: watch::Sender<u64>,
    /// Passes in a row that met a replica of somebody else, although it could be attached before.
    foreign: AtomicU32,
}

#[derive(Default)]
pub(super) struct Live {
    pub(super) state: ScrubState,
    pub(super) detail: Option<String>,
    pub(super) asked: u64,
    done: u64,
    findings: VecDeque<FindingText>,
    /// When the pass under way was taken up, and the bytes that were behind it then.
    since: Option<(Instant, u64)>,
    pub(super) saved: Option<Instant>,
}

impl Worker {
    pub(super) fn new(shared: &Arc<Shared>, replica: &Arc<Replica>) -> Arc<Self> {
        // From the beginning: others read from it, too, to mend themselves.
        replica.store().set_background_rate(shared.settings.rate);
        let pass = Pass {
            mender: Mender {
                replica: Arc::clone(replica),
                store: replica.store().background(),
                roster: Arc::clone(&shared.roster),
                identity: Arc::clone(&shared.identity),
                catalog: Arc::clone(&shared.catalog),
            },
            outbox: Arc::clone(&shared.outbox),
            fence: Arc::clone(&shared.fence),
            failures: Mutex::new(HashMap::new()),
            told: Mutex::default(),
            looked: Mutex::new(None),
        };
        Arc::new(Self {
            shared: Arc::clone(shared),
            pass,
            memory: Mutex::default(),
            live: Mutex::default(),
            attention: AtomicBool::new(false),
            wake: Notify::new(),
            cancel: watch::channel(0).0,
            foreign: AtomicU32::new(0),
        })
    }

    /// Begins its tasks.
    pub(super) fn start(self: &Arc<Self>) -> Tasks {
        [self.keep("passes", |w| w.passes()), self.keep("repairs", |w| w.damages())]
    }

    /// See [`Reconciler::begin`](super::Reconciler::begin).
    pub(super) fn begin(&self, request: &ScrubRequest) {
        {
            let mut memory = self.memory.lock();
            let mut live = self.live.lock();
            memory.paused = false;
            // One that came by itself may have passed what this one is to find.
            if live.asked == live.done {
                memory.current = None;
            }
            memory.begin(request.deep, request.dry_run, unix_now());
            live.asked += 1;
            live.findings.clear();
        }
        if !self.replica().is_attached() {
            // It may be in order by now.
            self.replica().recheck();
        }
        self.interrupt();
    }

    /// See [`Reconciler::pause`](super::Reconciler::pause).
    pub(super) fn pause(&self, paused: bool) {
        self.memory.lock().paused = paused;
        self.interrupt();
    }

    /// See [`Reconciler::stop`](super::Reconciler::stop).
    pub(super) fn stop(&self) {
        self.finish(Some("stopped by command".into()));
        self.interrupt();
    }

    /// Runs a task; begins it anew if it panics, so that a replica is never left alone in silence.
    fn keep<F>(self: &Arc<Self>, what: &'static str, work: fn(Arc<Self>) -> F) -> JoinHandle<()>
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let me = Arc::clone(self);
        self.shared.handle.spawn(async move {
            while AssertUnwindSafe(work(Arc::clone(&me))).catch_unwind().await.is_err() {
                log::error!(
                    "replica {}: its {what} broke off by a fault of mirrorfs; they begin again",
                    me.replica().name()
                );
                me.set(ScrubState::Waiting, Some(format!("its {what} broke off; see the log")));
                tokio::time::sleep(me.shared.settings.retry).await;
            }
        })
    }

    pub(super) fn replica(&self) -> &Arc<Replica> {
        &self.pass.mender.replica
    }

    fn key(&self) -> String {
        format!("{} {}", self.replica().name(), self.replica().store().url())
    }

    /// Ends the pass under way, which may go on, and wakes who waits.
    fn interrupt(&self) {
        self.cancel.send_modify(|n| *n += 1);
        self.wake.notify_one();
    }

    async fn load(&self) {
        let (catalog, key) = (Arc::clone(&self.shared.catalog), self.key());
        let loaded = tokio::task::spawn_blocking(move || catalog.load(&key)).await;
        let Ok(Ok(Some(bytes))) = loaded else { return };
        match serde_json::from_slice::<Memory>(&bytes) {
            Ok(loaded) => {
                let mut memory = self.memory.lock();
                // Not what a command has set meanwhile.
                if *memory == Memory::default() {
                    *memory = loaded;
                }
            }
            Err(e) => log::warn!(
                "replica {}: what is remembered of scrubs is forgotten: {e}",
                self.replica().name()
            ),
        }
    }

    /// Saves what is remembered.
    pub(super) async fn save(&self) {
        let bytes = serde_json::to_vec(&*self.memory.lock());
        let (catalog, key) = (Arc::clone(&self.shared.catalog), self.key());
        let saved = tokio::task::spawn_blocking(move || match bytes {
            Ok(bytes) => catalog.save(&key, &bytes),
            Err(e) => Err(e.to_string()),
        });
        if let Ok(Err(e)) = saved.await {
            log::debug!("replica {}: the state of its scrub is not saved: {e}", self.replica().name());
        }
        self.live.lock().saved = Some(Instant::now());
    }

    fn set(&self, state: ScrubState, detail: Option<String>) {
        let mut live = self.live.lock();
        live.state = state;
        if detail.is_some() || state == ScrubState::Running {
            live.detail = detail;
        }
    }

    /// Why no pass can run now.
    fn obstacle(&self) -> Option<String> {
        let replica = self.replica();
        if replica.is_paused() {
            return Some("the replica is paused".into());
        }
        if !replica.is_attached() {
            return Some("the replica is not reachable, or not checked yet".into());
        }
        (replica.health().state() == HealthState::Offline).then(|| "the replica is offline".into())
    }

    /// Runs passes when they are due.
    async fn passes(self: Arc<Self>) {
        self.load().await;
        let mut was_attached = false;
        let mut attachments = 0;
        loop {
            // What comes back after an outage may not be what went away.
            let seen = self.replica().attachments();
            if seen != attachments {
                if was_attached && self.replica().came_back() {
                    self.attention.store(true, Ordering::Relaxed);
                }
                (was_attached, attachments) = (true, seen);
            }
            if self.replica().attention_called() {
                self.attention.store(true, Ordering::Relaxed);
            }
            let intervals = self.shared.settings.intervals();
            let attention = self.attention.load(Ordering::Relaxed);
            let next = self.memory.lock().next(unix_now(), &intervals, attention);
            match next {
                Next::Paused => {
                    self.set(ScrubState::Paused, None);
                    self.nap(TICK).await;
                }
                Next::Wait(_) => {
                    self.set(ScrubState::Idle, None);
                    self.nap(TICK).await;
                }
                Next::Run => self.run().await,
            }
        }
    }

    async fn nap(&self, time: Duration) {
        let _ = tokio::time::timeout(time, self.wake.notified()).await;
    }

    async fn run(self: &Arc<Self>) {
        if let Some(why) = self.obstacle() {
            return self.wait_or_give_up(why).await;
        }
        // Before the pass is looked up: a command that puts another one in its place must end this one.
        let mut cancel = self.cancel.subscribe();
        let (current, asked, whole) = {
            let (memory, live) = (self.memory.lock(), self.live.lock());
            (memory.current.clone(), live.asked, live.asked != live.done)
        };
        let Some(mut current) = current else { return };
        // Sizes and positions count from here: what is behind the position stays counted.
        if current.position.is_empty() {
            current.counters = Counters::default();
            if let Some(c) = &mut self.memory.lock().current {
                c.counters = Counters::default();
            }
            self.live.lock().findings.clear();
        }
        self.attention.store(false, Ordering::Relaxed);
        self.set(ScrubState::Running, None);
        self.live.lock().since = Some((Instant::now(), current.counters.examined_bytes));
        self.save().await;
        let watch = Watch { worker: Arc::clone(self), asked };
        let ended = tokio::select! {
            ended = self.pass.run(&current, whole, &watch) => ended,
            _ = cancel.changed() => {
                self.save().await;
                return;
            }
        };
        match ended {
            Ok(()) => {
                self.pass.failures.lock().clear();
                self.foreign.store(0, Ordering::Relaxed);
                self.finish_asked(asked, None);
            }
            Err(Broken::Never(why)) => {
                log::error!("replica {}: its scrub is given up: {why}", self.replica().name());
                self.finish_asked(asked, Some(why));
                // It may be due again at once.
                self.nap(self.shared.settings.attention).await;
            }
            // It attaches, and is found to be another writer's, again and again.
            Err(Broken::Later(why)) if self.stays_foreign() => {
                log::warn!("replica {}: its scrub is given up: {why}", self.replica().name());
                self.finish_asked(asked, Some(why));
                self.nap(self.shared.settings.attention).await;
            }
            Err(Broken::Later(why)) => {
                log::debug!("replica {}: its scrub waits: {why}", self.replica().name());
                self.set(ScrubState::Waiting, Some(why));
                // Its shipper finds out what is the matter, and makes again what was deleted as a whole.
                self.have_rechecked().await;
            }
        }
        self.save().await;
    }

    /// Returns true if the replica was somebody else's at the end of several passes in a row.
    fn stays_foreign(&self) -> bool {
        let status = self.replica().status(crate::replica::Backlog::default(), 0.0);
        let is_foreign = status.state == ReplicaState::Foreign;
        let before = if is_foreign { self.foreign.load(Ordering::Relaxed) } else { 0 };
        let gives_up = before + 1 >= FOREIGN_PASSES;
        self.foreign.store(if is_foreign && !gives_up { before + 1 } else { 0 }, Ordering::Relaxed);
        is_foreign && gives_up
    }

    /// What to do while the replica cannot be looked at, for the reason `why`. Nobody waits for a replica of somebody else; but one whose
    /// `volume.json` or claim is damaged passes for such a one, until it is mended.
    async fn wait_or_give_up(self: &Arc<Self>, why: String) {
        let status = self.replica().status(crate::replica::Backlog::default(), 0.0);
        let dry_run = self.memory.lock().current.as_ref().is_some_and(|c| c.dry_run);
        let said = || status.last_error.clone().map_or(why.clone(), |e| e.text);
        let given_up = match status.state {
            ReplicaState::Fenced => Some(said()),
            ReplicaState::Foreign => match self.mend_head(dry_run).await {
                Ok(()) if dry_run => Some(said()),
                // Its shipper may find it in order now. If not, it is foreign for another reason, and stays so.
                Ok(()) if self.have_rechecked().await => None,
                Ok(()) => {
                    let status = self.replica().status(crate::replica::Backlog::default(), 0.0);
                    (status.state == ReplicaState::Foreign).then(said)
                }
                Err(Broken::Never(why)) => Some(why),
                Err(Broken::Later(why)) => {
                    self.set(ScrubState::Waiting, Some(why));
                    self.nap(self.shared.settings.retry).await;
                    None
                }
            },
            _ => None,
        };
        match given_up {
            Some(why) => {
                self.finish(Some(why));
                // It may be due again at once.
                self.nap(self.shared.settings.attention).await;
            }
            None => {
                self.set(ScrubState::Waiting, Some(why));
                self.nap(TICK / 5).await;
            }
        }
    }

    /// Has the shipper look at the replica anew, and waits a while for it to find it in order; whether it did.
    async fn have_rechecked(&self) -> bool {
        let (replica, before) = (self.replica(), self.replica().attachments());
        replica.recheck();
        let until = Instant::now() + self.shared.settings.retry;
        while Instant::now() < until && replica.attachments() == before {
            self.nap(TICK / 5).await;
        }
        replica.attachments() != before
    }

    /// Mends what says whose the replica is.
    async fn mend_head(&self, dry_run: bool) -> Result<(), Broken> {
        self.pass.check_volume(dry_run).await?;
        self.pass.check_claims(dry_run).await
    }

    /// Ends the current pass, unless another one was asked for since this one, numbered `asked`, was taken up.
    fn finish_asked(&self, asked: u64, error: Option<String>) {
        let (memory, live) = (self.memory.lock(), self.live.lock());
        if live.asked == asked {
            self.finish_locked(memory, live, error);
        }
    }

    /// Ends the current pass.
    fn finish(&self, error: Option<String>) {
        self.finish_locked(self.memory.lock(), self.live.lock(), error);
    }

    fn finish_locked(
        &self,
        mut memory: MutexGuard<'_, Memory>,
        mut live: MutexGuard<'_, Live>,
        error: Option<String>,
    ) {
        if let Some(current) = &memory.current {
            let c = current.counters;
            let kind = if current.deep { "deep scrub" } else { "check" };
            let name = self.replica().name();
            if c.bad > 0 {
                log::warn!(
                    "replica {name}: {kind} over: {} bad, {} repaired, {} left",
                    c.bad,
                    c.repaired,
                    c.left
                );
            } else if error.is_some() {
                log::info!("replica {name}: {kind} ended early: {} objects, nothing bad so far", c.examined);
            } else {
                log::info!("replica {name}: {kind} over: {} objects, nothing bad", c.examined);
            }
        }
        live.detail.clone_from(&error);
        memory.finish(unix_now(), error);
        live.done = live.asked;
        live.state = ScrubState::Idle;
        live.since = None;
    }

    /// Mends what reads have met.
    async fn damages(self: Arc<Self>) {
        let mut pause = self.shared.settings.retry;
        loop {
            if self.replica().damages().is_empty() {
                self.replica().damage_noted().await;
            }
            let ready = self.obstacle().is_none() && !self.memory.lock().paused;
            if !ready {
                tokio::time::sleep(TICK).await;
                continue;
            }
            let mut left = false;
            let mut seen = Vec::new();
            for damage in self.replica().damages() {
                if seen.contains(&damage.object) {
                    continue;
                }
                seen.push(damage.object.clone());
                if damage.kind == DamageKind::Missing {
                    self.attention.store(true, Ordering::Relaxed);
                    self.wake.notify_one();
                }
                match self.mend(&damage.object).await {
                    Ok(true) => self.replica().forget_damage(&damage.object),
                    Ok(false) => left = true,
                    Err(e) => {
                        log::debug!(
                            "replica {}: {} waits for repair: {e:?}",
                            self.replica().name(),
                            damage.object
                        );
                        left = true;
                    }
                }
            }
            if left {
                // Until then something may have come back; what is met meanwhile is not made to wait for that.
                let _ = tokio::time::timeout(pause, self.replica().damage_noted()).await;
                pause = (pause * 2).min(LONGEST_PAUSE);
            } else {
                pause = self.shared.settings.retry;
            }
        }
    }

    /// Looks at an object that a read complained of; whether it is in order, or nothing can be done about it.
    async fn mend(&self, object: &str) -> Result<bool, Broken> {
        let Some(name) = ObjectName::parse(object) else { return Ok(true) };
        let target = self.pass.target_of(name).await?;
        if let ObjectName::Segment(number, _) = name
            && self.replica().cursor() < number
        {
            // It is to be filled up to there.
            return Ok(true);
        }
        // What lacks an object may lie in another volume's place by now.
        self.pass.check_volume(false).await?;
        let outcome = self.pass.examine(&target, true).await?;
        self.note(&name, &outcome);
        Ok(!matches!(outcome, Outcome::Left(..)))
    }

    /// Takes a finding down.
    pub(super) fn note(&self, name: &ObjectName, outcome: &Outcome) {
        let (problem, outcome) = match outcome {
            Outcome::Intact => return,
            Outcome::Repaired(what, _) => (what.clone(), "repaired".to_owned()),
            Outcome::Left(what, None) => (what.clone(), "found".to_owned()),
            Outcome::Left(what, Some(why)) => (what.clone(), format!("left: {why}")),
            Outcome::Useless(what) => {
                (what.clone(), "left alone: no replica has it any more, and nothing needs it".to_owned())
            }
            Outcome::Other(what) => (what.clone(), "left alone".to_owned()),
            Outcome::Forged(what) => (
                what.clone(),
                format!(
                    "not copied to other replicas, left alone; find out who wrote it to {}, then remove it",
                    self.replica().store().url()
                ),
            ),
        };
        let mut live = self.live.lock();
        let finding = FindingText { object: name.path(), problem, outcome };
        live.findings.retain(|f| f.object != finding.object);
        if live.findings.len() >= MOST_FINDINGS {
            live.findings.pop_front();
        }
        live.findings.push_back(finding);
    }

    /// What is done about the replica.
    pub(super) fn status(&self) -> ScrubStatus {
        let memory = self.memory.lock();
        let live = self.live.lock();
        let current = memory.current.as_ref();
        let last = memory.last.as_ref().map(|l| l.counters).unwrap_or_default();
        let counters = current.map_or(last, |c| c.counters);
        let (rate, eta_seconds) = match (live.since, current) {
            (Some((since, before)), Some(_)) => {
                let rate = counters.examined_bytes.saturating_sub(before) as f64
                    / since.elapsed().as_secs_f64().max(0.001);
                let left = counters.total_bytes.saturating_sub(counters.examined_bytes);
                (rate, (rate > 0.0).then(|| left as f64 / rate))
            }
            _ => (0.0, None),
        };
        ScrubStatus {
            replica: self.replica().name().clone(),
            state: live.state,
            detail: live.detail.clone(),
            deep: current.is_some_and(|c| c.deep),
            dry_run: current.is_some_and(|c| c.dry_run),
            asked: live.asked,
            done: live.done,
            started_at: current.map(|c| c.started_at),
            counters,
            rate,
            eta_seconds,
            findings: live.findings.iter().cloned().collect(),
            last: memory.last.clone(),
            next_deep_at: memory.next_deep(&self.shared.settings.intervals()),
        }
    }
}
