//! The shipper: one task per replica that sends what the replica lacks.
//!
//! Owns one replica's order of work: attach, send in order with several in flight, move the cursor, ship checkpoints, and begin again after
//! a failure. Never gives up, never waits for another replica. What to send is decided in `ship_plan`, whether the replica is ours in
//! `attach`, where bytes come from in `transfer`; this file only connects them.
//!
//! ```text
//!        ┌──────── failure: wait (health) ───────┐
//!        ▼                                       │
//!  ── attach ──▶ ship: outbox ─▶ window ─▶ send ─┴─▶ verified ─▶ cursor saved ─▶ …
//!        │                └─ every 5 s: fence ──▶ fenced: all shippers stop for good
//!        └─ not our volume: nothing is written; looked at again every minute
//! ```

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::watch;
use tokio::task::JoinSet;

use super::attach::{self, AttachError, Attached, Identity};
use super::chain;
use super::contract::{CursorStore, Outbox, Staged, StagedKind};
use super::fence::{self, Fence, FenceReason, Fenced};
use super::health::{Event, backoff};
use super::roster::Roster;
use super::shared::{Replica, ReplicaStatus, Stopped, jitter, unix_now};
use super::ship_plan::ShipPlan;
use super::transfer::{self, SendError, Source};
use super::volume::valid_epoch;
use crate::ids::SegmentNo;

/// By how much longer a replica is left alone with which there was no contact.
const IDLE: u32 = 6;

/// Times and sizes that tests shorten.
#[derive(Clone, Copy, Debug)]
pub struct Tuning {
    /// A send is preceded by a look for a higher epoch when the last look is older than this; and whatever was sent or read is
    /// followed by one after this.
    pub fence_every: Duration,
    /// A replica that is not ours is looked at again after this.
    pub foreign_every: Duration,
    /// When nobody has the bytes of a segment, they are looked for again after this.
    pub source_every: Duration,
    /// The replica's identity and cursor are looked at again after this (six times this, and only whether the newest segment is there,
    /// while nothing is sent or read), and outbox and checkpoints without being woken after a
    /// tenth of it.
    pub recheck_every: Duration,
    /// Bytes in flight to one replica.
    pub in_flight_bytes: u64,
}

impl Default for Tuning {
    fn default() -> Self {
        Self {
            fence_every: Duration::from_secs(5),
            foreign_every: Duration::from_secs(60),
            source_every: Duration::from_secs(30),
            recheck_every: Duration::from_secs(6 * 3600),
            in_flight_bytes: 64 << 20,
        }
    }
}

/// Everything that one replica's shipper needs.
#[derive(Clone)]
pub struct Shipper {
    /// The replica.
    pub replica: Arc<Replica>,
    /// All replicas of the volume, from which missing bytes are taken; this one among them does no harm.
    pub peers: Arc<Roster>,
    /// What there is to send.
    pub outbox: Arc<dyn Outbox>,
    /// Where the cursor is kept.
    pub cursors: Arc<dyn CursorStore>,
    /// What must stand on the replica.
    pub identity: Arc<Identity>,
    /// Shared by all shippers of the volume: once one sees another writer, none writes anything more.
    pub fence: Arc<Fence>,
    /// True ends the task; what is in flight is dropped and will be sent again.
    pub closing: watch::Receiver<bool>,
    /// Times and sizes.
    pub tuning: Tuning,
}

/// Why a phase ended.
enum End {
    Closing,
    Fenced(Box<Fenced>),
    /// Something failed: begin again after this time at least.
    Again(Duration),
    /// Nothing failed, but it is time for a new look at the replica.
    Recheck,
}

/// What is known of the replica's checkpoints.
#[derive(Clone, Copy)]
struct Checkpoints {
    /// The newest one there, or not to be sent.
    there: SegmentNo,
    in_flight: bool,
}

/// When another writer was last looked for, and how much had been read and written by then.
#[derive(Clone, Copy)]
struct LastLook {
    at: Instant,
    contacts: (u64, u64),
}

impl LastLook {
    fn new(at: Instant, replica: &Replica) -> Self {
        let requests = replica.store().requests();
        Self { at, contacts: (requests.get, requests.put) }
    }

    /// Whether there was contact with the replica since. Who has no contact can do no harm, and waits.
    fn is_stale(&self, replica: &Replica) -> bool {
        Self::new(self.at, replica).contacts != self.contacts
    }
}

/// A job in flight that came to its end.
enum Done {
    Segment(Staged, Result<u64, SendError>),
    Checkpoint(Staged, Result<(u64, u64), SendError>),
}

/// What `status` shows of a replica.
#[must_use]
pub fn status(replica: &Replica, outbox: &dyn Outbox) -> ReplicaStatus {
    replica.status(outbox.backlog(replica.cursor()), unix_now())
}

impl Shipper {
    /// Runs until `closing` is true or another writer is seen. Spawn it.
    pub async fn run(mut self) {
        // Counted here and not in the replica's health: reads that succeed say nothing about writes.
        let mut failures = 0;
        let mut told_lost = false;
        loop {
            let fence = Arc::clone(&self.fence);
            let end = tokio::select! {
                biased;
                // What is in flight is dropped.
                fenced = fence.raised() => End::Fenced(Box::new(fenced)),
                end = self.attach_and_ship(&mut failures, &mut told_lost) => end,
            };
            self.replica.set_attached(false);
            match end {
                End::Closing => return,
                End::Fenced(fenced) => {
                    self.replica.tell(fenced.to_string(), None);
                    self.replica.set_stopped(Some(Stopped::Fenced));
                    self.fence.raise(*fenced);
                    return;
                }
                End::Again(wait) => {
                    self.replica.set_outage();
                    failures = failures.saturating_add(1);
                    let wait = wait.max(backoff(failures, jitter()));
                    let woken = async {
                        tokio::select! {
                            () = closed(&mut self.closing) => {}
                            _ = fence.raised() => {}
                            () = self.replica.recheck_asked() => {}
                        }
                    };
                    let _ = tokio::time::timeout(wait, woken).await;
                }
                End::Recheck => {}
            }
        }
    }

    async fn attach_and_ship(&mut self, failures: &mut u32, told_lost: &mut bool) -> End {
        let (mut paused, mut closing) = (self.replica.watch_paused(), self.closing.clone());
        tokio::select! {
            () = closed(&mut closing) => return End::Closing,
            _ = paused.wait_for(|p| !p) => {}
        }
        let attached = tokio::select! {
            () = closed(&mut closing) => return End::Closing,
            attached = attach::attach(&self.replica, &self.identity, &self.outbox, &self.cursors, &self.fence) => attached,
        };
        match attached {
            Ok(attached) => {
                self.replica.set_stopped(None);
                // It answered. Whether it takes writes is counted apart, and there may be nothing left to write.
                self.replica.note(&Event::Success);
                if let Some(text) = attached.lost.as_ref().filter(|_| !std::mem::replace(told_lost, true)) {
                    log::warn!("{text}");
                    self.replica.tell(text.clone(), None);
                }
                self.move_cursor(attached.cursor).await;
                self.replica.set_attached(true);
                self.replica.set_waits_for_source(false);
                let (from, volume) = (attached.cursor.next(), self.identity.volume.volume);
                let (mut closing, peers) = (self.closing.clone(), self.peers.all());
                tokio::select! {
                    () = closed(&mut closing) => return End::Closing,
                    () = chain::learn(&self.outbox, &peers, volume, from) => {}
                }
                self.ship(attached, failures).await
            }
            Err(e) => self.failed(e),
        }
    }

    /// Takes note of a failure and says how to go on.
    fn failed(&self, error: AttachError) -> End {
        match error {
            AttachError::Store(e) => {
                log::debug!("{e}");
                self.replica.note_write_error(&e);
                End::Again(Duration::ZERO)
            }
            AttachError::Foreign(e) => {
                log::error!("{e}; nothing is written there");
                self.replica.tell(e.to_string(), None);
                self.replica.set_stopped(Some(Stopped::Foreign));
                End::Again(self.tuning.foreign_every)
            }
            AttachError::Fenced(by) => End::Fenced(by),
            AttachError::Local(text) => {
                let text = format!("replica {}: local bookkeeping: {text}", self.replica.name());
                log::error!("{text}");
                self.replica.tell(text, None);
                End::Again(self.tuning.source_every)
            }
        }
    }

    /// Sends until something fails.
    async fn ship(&mut self, attached: Attached, failures: &mut u32) -> End {
        let most = self.replica.store().limits().in_flight;
        let mut plan = ShipPlan::new(attached.cursor, most, self.tuning.in_flight_bytes);
        let mut checkpoint = Checkpoints { there: attached.checkpoint, in_flight: false };
        self.replica.set_checkpoint(checkpoint.there);
        let mut began = LastLook::new(Instant::now(), &self.replica);
        let mut looked = LastLook::new(attached.looked, &self.replica);
        // Tasks of their own: they go on while this one looks into the outbox or at the fence.
        let mut jobs: JoinSet<Done> = JoinSet::new();
        let mut ending: Option<End> = None;
        let mut sealed = self.outbox.watch();
        let (mut paused, mut closing) = (self.replica.watch_paused(), self.closing.clone());
        loop {
            if ending.is_none() && !*paused.borrow_and_update() {
                sealed.mark_unchanged();
                let work = tokio::select! {
                    () = closed(&mut closing) => return End::Closing,
                    work = self.work(&mut plan, checkpoint, &mut looked) => work,
                };
                match work {
                    Ok(work) if work.is_empty() && jobs.is_empty() => {
                        *failures = 0;
                        self.replica.writes_work();
                        let idle = !began.is_stale(&self.replica);
                        let every = self.tuning.recheck_every * if idle { IDLE } else { 1 };
                        if began.at.elapsed() >= every {
                            let end = tokio::select! {
                                () = closed(&mut closing) => Some(End::Closing),
                                end = self.look_again(plan.cursor(), idle) => end,
                            };
                            match end {
                                Some(end) => return end,
                                None => began = LastLook::new(Instant::now(), &self.replica),
                            }
                        }
                    }
                    Ok(work) => {
                        for staged in work {
                            checkpoint.in_flight |= staged.kind == StagedKind::Checkpoint;
                            let listed = attached.beyond.contains(&(staged.number, staged.epoch));
                            jobs.spawn(self.job(staged, listed));
                        }
                    }
                    Err(end) => ending = Some(end),
                }
            }
            if jobs.is_empty()
                && let Some(end) = ending
            {
                return end;
            }
            let failed = tokio::select! {
                () = closed(&mut closing) => return End::Closing,
                Some(done) = jobs.join_next(), if !jobs.is_empty() => {
                    self.done(done, &mut plan, &mut checkpoint, failures).await
                }
                changed = sealed.changed(), if ending.is_none() => {
                    if changed.is_err() {
                        return End::Closing;
                    }
                    None
                }
                _ = paused.changed(), if ending.is_none() => None,
                () = self.replica.recheck_asked(), if ending.is_none() => {
                    ending = Some(End::Recheck);
                    None
                }
                () = tokio::time::sleep(self.tuning.fence_every.min(self.tuning.recheck_every / 10)) => None,
            };
            // What else is in flight is seen through; then everything begins with a new look at the replica. One outage counts
            // once, however many were in flight.
            if let Some(e) = failed
                && ending.is_none()
            {
                ending = Some(self.send_failed(e).await);
            }
        }
    }

    /// Time for a new look at the replica: a whole one; or, when there was no contact since the last, one small request that shows
    /// whether the newest segment is still there.
    async fn look_again(&self, cursor: SegmentNo, idle: bool) -> Option<End> {
        if !idle || cursor.0 == 0 {
            return Some(End::Recheck);
        }
        match attach::holds(self.replica.store(), &self.identity, &self.outbox, cursor).await {
            Ok(true) => {
                self.replica.note(&Event::Success);
                None
            }
            Ok(false) => Some(End::Recheck),
            Err(e) => Some(self.failed(e)),
        }
    }

    /// Takes note of a job that came to its end; gives its failure.
    async fn done(
        &self,
        done: Result<Done, tokio::task::JoinError>,
        plan: &mut ShipPlan,
        checkpoint: &mut Checkpoints,
        failures: &mut u32,
    ) -> Option<SendError> {
        let arrived = match done {
            Ok(Done::Segment(staged, Ok(bytes))) => {
                if let Some(cursor) = plan.verified(staged.number) {
                    self.move_cursor(cursor).await;
                }
                (u64::from(bytes > 0), bytes)
            }
            Ok(Done::Segment(staged, Err(e))) => {
                plan.failed(staged.number);
                return Some(e);
            }
            Ok(Done::Checkpoint(staged, result)) => {
                checkpoint.in_flight = false;
                match result {
                    Ok(arrived) => {
                        checkpoint.there = staged.number;
                        self.replica.set_checkpoint(staged.number);
                        arrived
                    }
                    // It is only a shortcut for restores: segments go on, the next checkpoint will be sent.
                    Err(SendError::Source(text)) => {
                        log::warn!("replica {}: {text}", self.replica.name());
                        checkpoint.there = staged.number;
                        self.replica.set_checkpoint(staged.number);
                        return None;
                    }
                    Err(e) => return Some(e),
                }
            }
            Err(e) => return Some(SendError::Source(e.to_string())),
        };
        *failures = 0;
        self.replica.uploaded(arrived.0, arrived.1);
        self.replica.writes_work();
        self.replica.note(&Event::Success);
        None
    }

    /// What to send now, after a look at the fence when it is due.
    async fn work(
        &self,
        plan: &mut ShipPlan,
        checkpoint: Checkpoints,
        looked: &mut LastLook,
    ) -> Result<Vec<Staged>, End> {
        let cursor = plan.cursor();
        // Asked for first: what is sealed between the two questions must not look as if it had gone.
        let newest = *self.outbox.watch().borrow();
        let mut staged = match attach::segments_after(&self.outbox, cursor, plan.span()).await {
            Ok(staged) => staged,
            Err(e) => return Err(self.failed(e)),
        };
        if cursor < newest && staged.first().is_none_or(|s| s.number != cursor.next()) {
            staged = self.unstaged(cursor, newest.min(SegmentNo(cursor.0 + plan.span() as u64))).await?;
        }
        let outbox = Arc::clone(&self.outbox);
        let there = checkpoint.there;
        let dump = match checkpoint.in_flight {
            true => None,
            false => {
                let find = tokio::task::spawn_blocking(move || outbox.checkpoint(there, cursor));
                find.await.ok().flatten().filter(|c| c.number > there && c.number <= cursor)
            }
        };
        let contact = !staged.is_empty() || dump.is_some() || looked.is_stale(&self.replica);
        if contact && looked.at.elapsed() >= self.tuning.fence_every {
            let before = LastLook::new(Instant::now(), &self.replica);
            fence::look(&self.replica, &self.identity, &self.fence).await.map_err(|e| self.failed(e))?;
            *looked = before;
        }
        let mut work = plan.next(&staged);
        work.extend(dump);
        Ok(work)
    }

    /// Segments that the outbox knows nothing of any more, as the peers list them.
    async fn unstaged(&self, after: SegmentNo, last: SegmentNo) -> Result<Vec<Staged>, End> {
        let mut listed = BTreeMap::new();
        for peer in self.peers.others(self.replica.name()) {
            match attach::list_segments(peer.store()).await {
                Ok(segments) => listed.extend(segments),
                Err(e) => peer.note_error(&e),
            }
        }
        let mut found = Vec::new();
        let mut number = after.next();
        while number <= last {
            let epoch = valid_epoch(&self.identity.claims, number);
            let Some((epoch, len)) = epoch.and_then(|e| Some((e, *listed.get(&(number, e))?))) else { break };
            let path = std::path::PathBuf::from("(not staged any more)");
            found.push(Staged { kind: StagedKind::Segment, number, epoch, path, len, cut_at: 0.0 });
            number = number.next();
        }
        if found.is_empty() {
            let text = format!(
                "replica {}: segment {} is neither staged nor on any reachable replica",
                self.replica.name(),
                after.next()
            );
            log::error!("{text}");
            self.replica.tell(text, None);
            return Err(End::Again(self.tuning.source_every));
        }
        Ok(found)
    }

    fn job(&self, staged: Staged, listed: bool) -> impl Future<Output = Done> + Send + use<> {
        let (replica, peers) = (Arc::clone(&self.replica), self.peers.all());
        let shelf = self.outbox.shelf();
        let volume = self.identity.volume.volume;
        let hash = self.outbox.hash(staged.number);
        async move {
            match staged.kind {
                StagedKind::Segment => {
                    let source = Source { volume, peers: &peers, shelf: shelf.as_deref(), hash };
                    let result = transfer::send_segment(&replica, &source, &staged, listed).await;
                    Done::Segment(staged, result)
                }
                StagedKind::Checkpoint => {
                    let result = transfer::send_checkpoint(&replica, &staged).await;
                    Done::Checkpoint(staged, result)
                }
            }
        }
    }

    async fn send_failed(&self, error: SendError) -> End {
        match error {
            SendError::Replica(e) => self.failed(e.into()),
            SendError::Source(text) => {
                let text = format!("replica {}: {text}", self.replica.name());
                log::error!("{text}");
                self.replica.tell(text, None);
                End::Again(self.tuning.source_every)
            }
            SendError::Contradicts(segment, epoch) => {
                let reason = FenceReason::Contradicts { segment, epoch };
                let by = Box::new(Fenced { replica: self.replica.name().clone(), reason });
                self.failed(self.fence.weigh(&self.replica, &self.identity, by).await)
            }
        }
    }

    /// Saves the cursor, then shows it. A cursor that could not be saved is only found again later.
    async fn move_cursor(&self, cursor: SegmentNo) {
        let (cursors, name) = (Arc::clone(&self.cursors), self.replica.name().clone());
        let saved = tokio::task::spawn_blocking(move || cursors.save(&name, cursor)).await;
        if let Ok(Err(e)) = saved {
            log::warn!("replica {}: its cursor {cursor} could not be saved: {e}", self.replica.name());
        }
        self.replica.set_cursor(cursor);
    }
}

/// Returns when the daemon closes, also when it is gone.
async fn closed(closing: &mut watch::Receiver<bool>) {
    let _ = closing.wait_for(|c| *c).await;
}

#[cfg(test)]
mod tests;
