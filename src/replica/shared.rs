//! One replica as the daemon's parts share it: its store, health, cursor, and what is known of damage there.
//!
//! Owns the counters and texts that `status` shows. Decides nothing: the shipper writes the cursor, shipper and reader report what
//! happened, everybody reads.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use tokio::sync::{Notify, watch};

use super::contract::Backlog;
use super::error::{ErrorKind, StoreError};
use super::health::{Event, Health, HealthState};
use super::store::{Requests, Store};
use crate::format::volume::Claim;
use crate::ids::{BlockHash, ReplicaName, SegmentNo};

/// Damaged places remembered per replica until somebody repairs them; more are counted only.
const MOST_DAMAGES: usize = 10_000;
/// The time over which the upload speed is averaged.
const METER: Duration = Duration::from_secs(10);

/// What a replica does, as `status` tells it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ReplicaState {
    /// It answers.
    Healthy,
    /// The last calls failed.
    Degraded,
    /// It does not answer; it is tried again now and then.
    Offline,
    /// It is being tried again.
    Probing,
    /// It refuses our credentials.
    Denied,
    /// It has no space left.
    Full,
    /// It holds another volume, or something else; nothing is written there.
    Foreign,
    /// A writer with a higher epoch took over; nothing is written any more.
    Fenced,
    /// Shipping is paused by command.
    Paused,
}

/// The last thing that went wrong.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LastError {
    /// What, with replica, object and remedy.
    pub text: String,
    /// Its class, when it came from the store.
    pub kind: Option<ErrorKind>,
    /// Seconds since 1970.
    pub at: f64,
}

/// One replica in `status`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ReplicaStatus {
    /// Its name.
    pub name: ReplicaName,
    /// Its URL, without secrets.
    pub url: String,
    /// What it does.
    pub state: ReplicaState,
    /// The segment up to which everything is known to be there.
    pub cursor: SegmentNo,
    /// Segments that it lacks.
    pub lag_segments: u64,
    /// Their bytes.
    pub lag_bytes: u64,
    /// Age of the oldest of them in seconds; 0 when there is none.
    pub lag_seconds: f64,
    /// The last error, also when it is over.
    pub last_error: Option<LastError>,
    /// Bytes sent per second, averaged over the last seconds.
    pub upload_rate: f64,
    /// Bytes per second that may be sent now; none is no limit.
    #[serde(default)]
    pub upload_limit: Option<u64>,
    /// Bytes per second that may be received now; none is no limit.
    #[serde(default)]
    pub download_limit: Option<u64>,
    /// Objects shipped since the start.
    pub uploaded_objects: u64,
    /// Their bytes.
    pub uploaded_bytes: u64,
    /// Typical time of a small read, in seconds.
    pub read_latency: Option<f64>,
    /// Throughput of large reads in bytes per second.
    pub read_rate: Option<f64>,
    /// Damaged or missing places met while reading.
    pub damages: u64,
    /// Whether it is being filled for the first time.
    #[serde(default)]
    pub joining: bool,
    /// What was asked of it.
    pub requests: Requests,
}

/// In what way a place on a replica is damaged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum DamageKind {
    /// The object is not there though it should be.
    Missing,
    /// The object is shorter than it should be.
    Short,
    /// The bytes are not those that were stored.
    Wrong,
}

/// A damaged place on a replica, to be repaired.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Damage {
    /// The object, relative to the replica's root.
    pub object: String,
    /// The segment it is.
    pub segment: SegmentNo,
    /// First byte asked for.
    pub offset: u64,
    /// Bytes asked for.
    pub len: u64,
    /// The content that should be there, when one block was asked for.
    pub block: Option<BlockHash>,
    /// In what way.
    pub kind: DamageKind,
}

/// Why nothing is written to a replica at all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stopped {
    Foreign,
    Fenced,
}

#[derive(Default)]
struct Told {
    last_error: Option<LastError>,
    uploads: VecDeque<(Instant, u64)>,
    uploaded_objects: u64,
    uploaded_bytes: u64,
    damages: VecDeque<Damage>,
    stopped: Option<Stopped>,
    /// Class and number of failed writes since the last that succeeded.
    writes_failing: Option<(ErrorKind, u32)>,
}

/// One replica.
pub struct Replica {
    store: Store,
    health: Mutex<Health>,
    cursor: watch::Sender<SegmentNo>,
    paused: watch::Sender<bool>,
    told: Mutex<Told>,
    damage_count: AtomicU64,
    attached: AtomicBool,
    /// How often it was found to be what it should be.
    attachments: AtomicU64,
    /// Something failed since the last time that was asked.
    outage: AtomicBool,
    attention: AtomicBool,
    /// It is being filled for the first time.
    joining: AtomicBool,
    /// Its shipper waits because no intact copy of a segment is to be had.
    waits_for_source: AtomicBool,
    /// A claim there that the other replicas contradicted when the volume was mounted.
    contest: Mutex<Option<Claim>>,
    recheck: Notify,
    damaged: Notify,
    /// The newest checkpoint that it has, or will not be sent.
    checkpoint: AtomicU64,
    /// Everything up to here was there when, later, no other writer was to be seen.
    confirmed: tokio::sync::Mutex<SegmentNo>,
}

impl Replica {
    /// A replica of which nothing is known yet.
    #[must_use]
    pub fn new(store: Store) -> Self {
        Self {
            store,
            health: Mutex::default(),
            cursor: watch::channel(SegmentNo(0)).0,
            paused: watch::channel(false).0,
            told: Mutex::default(),
            damage_count: AtomicU64::new(0),
            attached: AtomicBool::new(false),
            attachments: AtomicU64::new(0),
            outage: AtomicBool::new(false),
            attention: AtomicBool::new(false),
            joining: AtomicBool::new(false),
            waits_for_source: AtomicBool::new(false),
            contest: Mutex::default(),
            recheck: Notify::new(),
            damaged: Notify::new(),
            checkpoint: AtomicU64::new(0),
            confirmed: tokio::sync::Mutex::default(),
        }
    }

    /// Its objects.
    #[must_use]
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &ReplicaName {
        self.store.name()
    }

    /// The segment up to which everything is known to be there.
    #[must_use]
    pub fn cursor(&self) -> SegmentNo {
        *self.cursor.borrow()
    }

    /// Changes of the cursor.
    #[must_use]
    pub fn watch_cursor(&self) -> watch::Receiver<SegmentNo> {
        self.cursor.subscribe()
    }

    /// Returns when the replica holds everything up to `segment`. Waits as long as it takes: bound it from outside.
    pub async fn wait_for(&self, segment: SegmentNo) {
        let mut cursor = self.cursor.subscribe();
        // The sender lives as long as self, so this cannot fail.
        let _ = cursor.wait_for(|c| *c >= segment).await;
    }

    /// Sets the cursor; the shipper does, or a mount that has read the replica.
    pub fn set_cursor(&self, cursor: SegmentNo) {
        self.cursor.send_if_modified(|c| std::mem::replace(c, cursor) != cursor);
    }

    /// Stops or resumes shipping to it. What is in flight is finished.
    pub fn pause(&self, paused: bool) {
        self.paused.send_if_modified(|p| std::mem::replace(p, paused) != paused);
    }

    /// Whether shipping is paused.
    #[must_use]
    pub fn is_paused(&self) -> bool {
        *self.paused.borrow()
    }

    pub(super) fn watch_paused(&self) -> watch::Receiver<bool> {
        self.paused.subscribe()
    }

    /// Whether the shipper has found the replica to be what it should be since the start.
    #[must_use]
    pub fn is_attached(&self) -> bool {
        self.attached.load(Ordering::Relaxed)
    }

    pub(super) fn set_attached(&self, attached: bool) {
        if attached {
            self.attachments.fetch_add(1, Ordering::Relaxed);
        }
        self.attached.store(attached, Ordering::Relaxed);
    }

    /// How often the shipper has looked at it from the beginning and found it in order.
    #[must_use]
    pub fn attachments(&self) -> u64 {
        self.attachments.load(Ordering::Relaxed)
    }

    pub(super) fn set_outage(&self) {
        self.outage.store(true, Ordering::Relaxed);
    }

    /// Asks for a look at what it holds.
    pub fn call_attention(&self) {
        self.attention.store(true, Ordering::Relaxed);
    }

    /// Whether a look was asked for since the last call.
    pub fn attention_called(&self) -> bool {
        self.attention.swap(false, Ordering::Relaxed)
    }

    /// Whether it failed since the last call.
    pub fn came_back(&self) -> bool {
        self.outage.swap(false, Ordering::Relaxed)
    }

    /// Whether it is being filled for the first time. Until that is over, `fsync` does not count it, and nothing is kept on the local
    /// disk for its sake.
    #[must_use]
    pub fn is_joining(&self) -> bool {
        self.joining.load(Ordering::Relaxed)
    }

    /// Says whether it is being filled for the first time.
    pub fn set_joining(&self, joining: bool) {
        self.joining.store(joining, Ordering::Relaxed);
    }

    /// Has the shipper look at the replica anew, as after a failure: something there is not as it was.
    pub fn recheck(&self) {
        self.recheck.notify_one();
    }

    /// Notes whether its shipper waits for an intact copy of a segment.
    pub(super) fn set_waits_for_source(&self, waits: bool) {
        self.waits_for_source.store(waits, Ordering::SeqCst);
    }

    /// A copy was repaired somewhere: has the shipper go on if it waits for one.
    pub fn source_repaired(&self) {
        if self.waits_for_source.swap(false, Ordering::SeqCst) {
            self.recheck();
        }
    }

    pub(super) async fn recheck_asked(&self) {
        self.recheck.notified().await;
    }

    /// Returns when a damaged place is noted; at once when that happened since the last call.
    pub async fn damage_noted(&self) {
        self.damaged.notified().await;
    }

    /// The newest checkpoint that it has or does not wait for; 0 when none is known of.
    #[must_use]
    pub fn checkpoint(&self) -> SegmentNo {
        SegmentNo(self.checkpoint.load(Ordering::Relaxed))
    }

    pub(super) fn set_checkpoint(&self, number: SegmentNo) {
        self.checkpoint.store(number.0, Ordering::Relaxed);
    }

    /// The mark of `fence::confirm`; held while looking, so that who waits shares the look.
    pub(super) async fn confirmed(&self) -> tokio::sync::MutexGuard<'_, SegmentNo> {
        self.confirmed.lock().await
    }

    /// A copy of its health.
    #[must_use]
    pub fn health(&self) -> Health {
        self.health.lock().clone()
    }

    /// Takes note of what happened.
    pub fn note(&self, event: &Event) {
        let (before, after, failing) = {
            let mut health = self.health.lock();
            let before = health.state();
            health.apply(event, Instant::now());
            (before, health.state(), health.failing())
        };
        if before == after {
            return;
        }
        match after {
            HealthState::Healthy => log::info!("replica {} answers again", self.name()),
            HealthState::Offline if before != HealthState::Probing => {
                let why = failing.map(|k| k.to_string()).unwrap_or_default();
                log::warn!("replica {} is offline: {why}", self.name());
            }
            _ => {}
        }
    }

    /// Takes note of a failed call.
    pub fn note_error(&self, error: &StoreError) {
        self.tell(error.to_string(), Some(error.kind));
        self.note(&Event::of_error(error, jitter()));
    }

    /// Takes note of a failed write. Only what may pass says something about reads, too.
    pub(super) fn note_write_error(&self, error: &StoreError) {
        self.tell(error.to_string(), Some(error.kind));
        let first = {
            let mut told = self.told.lock();
            let before = told.writes_failing.map_or(0, |(_, n)| n);
            told.writes_failing = Some((error.kind, before.saturating_add(1)));
            before == 0
        };
        if error.kind.is_passing() {
            self.note(&Event::of_error(error, jitter()));
        } else if first {
            log::error!("{error}");
        }
    }

    /// Takes note that writing works, or that there is nothing to write and the replica is ours.
    pub(super) fn writes_work(&self) {
        if let Some((kind, _)) = self.told.lock().writes_failing.take() {
            log::info!("replica {} takes writes again (was: {kind})", self.name());
        }
    }

    /// The claim for which nothing is written there.
    pub(super) fn contest(&self) -> Option<Claim> {
        self.contest.lock().clone()
    }

    /// Has nothing written there as long as it holds `claim`, which the other replicas contradict.
    pub fn set_contest(&self, claim: Option<Claim>) {
        *self.contest.lock() = claim;
    }

    /// Sets the last error's text.
    pub(super) fn tell(&self, text: String, kind: Option<ErrorKind>) {
        self.told.lock().last_error = Some(LastError { text, kind, at: unix_now() });
    }

    pub(super) fn set_stopped(&self, stopped: Option<Stopped>) {
        self.told.lock().stopped = stopped;
    }

    pub(super) fn uploaded(&self, objects: u64, bytes: u64) {
        let mut told = self.told.lock();
        told.uploaded_objects += objects;
        told.uploaded_bytes += bytes;
        told.uploads.push_back((Instant::now(), bytes));
        prune(&mut told.uploads);
    }

    /// Takes note of a damaged place: counts it, logs it once, and remembers it for repair.
    pub fn note_damage(&self, damage: Damage) {
        self.damage_count.fetch_add(1, Ordering::Relaxed);
        let mut told = self.told.lock();
        if told.damages.contains(&damage) {
            return;
        }
        let block = damage.block.map(|h| format!(" (block {h})")).unwrap_or_default();
        log::error!(
            "replica {}: {} bytes at {} of {}{block} are {}; another copy will be used and this one should be repaired",
            self.name(),
            damage.len,
            damage.offset,
            damage.object,
            match damage.kind {
                DamageKind::Missing => "missing",
                DamageKind::Short => "cut off",
                DamageKind::Wrong => "corrupt",
            },
        );
        if told.damages.len() < MOST_DAMAGES {
            told.damages.push_back(damage);
        }
        drop(told);
        self.damaged.notify_one();
    }

    /// The damaged places met so far, for repair to begin with.
    #[must_use]
    pub fn damages(&self) -> Vec<Damage> {
        self.told.lock().damages.iter().cloned().collect()
    }

    /// Forgets damaged places of an object, after its repair.
    pub fn forget_damage(&self, object: &str) {
        self.told.lock().damages.retain(|d| d.object != object);
    }

    /// What `status` shows. `backlog` is what the replica lacks; `now` is in seconds since 1970.
    #[must_use]
    pub fn status(&self, backlog: Backlog, now: f64) -> ReplicaStatus {
        let health = self.health.lock().clone();
        let mut told = self.told.lock();
        let state = match (told.stopped, told.writes_failing, health.failing()) {
            (Some(Stopped::Foreign), ..) => ReplicaState::Foreign,
            (Some(Stopped::Fenced), ..) => ReplicaState::Fenced,
            _ if self.is_paused() => ReplicaState::Paused,
            (_, Some((ErrorKind::Denied, _)), _) | (_, _, Some(ErrorKind::Denied)) => ReplicaState::Denied,
            (_, Some((ErrorKind::Full, _)), _) => ReplicaState::Full,
            (_, Some((kind, n)), _) if n >= 3 || !kind.is_passing() => ReplicaState::Offline,
            _ => match health.state() {
                HealthState::Healthy if told.writes_failing.is_some() => ReplicaState::Degraded,
                HealthState::Healthy => ReplicaState::Healthy,
                HealthState::Degraded => ReplicaState::Degraded,
                HealthState::Offline => ReplicaState::Offline,
                HealthState::Probing => ReplicaState::Probing,
            },
        };
        prune(&mut told.uploads);
        let sent: u64 = told.uploads.iter().map(|(_, b)| b).sum();
        let (read_latency, read_rate) = health.speed();
        let (upload_limit, download_limit) = self.store.rates();
        ReplicaStatus {
            name: self.name().clone(),
            url: self.store.url().to_owned(),
            state,
            cursor: self.cursor(),
            lag_segments: backlog.segments,
            lag_bytes: backlog.bytes,
            lag_seconds: if backlog.segments == 0 { 0.0 } else { (now - backlog.oldest_cut_at).max(0.0) },
            last_error: told.last_error.clone(),
            upload_rate: sent as f64 / METER.as_secs_f64(),
            upload_limit,
            download_limit,
            uploaded_objects: told.uploaded_objects,
            uploaded_bytes: told.uploaded_bytes,
            read_latency,
            read_rate,
            damages: self.damage_count.load(Ordering::Relaxed),
            joining: self.is_joining(),
            requests: self.store.requests(),
        }
    }
}

fn prune(uploads: &mut VecDeque<(Instant, u64)>) {
    while uploads.front().is_some_and(|(at, _)| at.elapsed() > METER) {
        uploads.pop_front();
    }
}

/// Seconds since 1970.
#[must_use]
pub fn unix_now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |d| d.as_secs_f64())
}

/// A random number from 0 to 1; 0.5 when there is no randomness to be had.
#[must_use]
pub fn jitter() -> f64 {
    getrandom::u32().map_or(0.5, |n| f64::from(n) / f64::from(u32::MAX))
}
