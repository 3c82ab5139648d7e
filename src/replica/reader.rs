//! The reader: gives sealed blocks out of whichever replica is healthy and near, verified.
//!
//! Owns the choice and the hedging between replicas, the sharing of concurrent misses, and the one bridge from blocking callers to
//! the async side. What one request fetches and what failures mean is decided in `read_plan`; who is asked first, in `health`.
//!
//! A block's bytes leave this file only after their hash was found right. A replica whose bytes are wrong is reported with the place.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::StreamExt;
use futures::stream::FuturesUnordered;
use parking_lot::{Condvar, Mutex};
use tokio::runtime::Handle;
use tokio::sync::watch;

use super::contract::{FetchError, FrameSource};
use super::error::{ErrorKind, StoreError};
use super::health::{self, Event, Health, HealthState};
use super::read_plan::{Answer, Span, Verdict, verdict};
use super::roster::Roster;
use super::shared::{Damage, DamageKind, Replica, jitter};
use crate::format::frame;
use crate::format::names::ObjectName;
use crate::format::tables::{BlockEntry, FrameLoc};
use crate::ids::BlockHash;

/// How long a fetch may take by default, all replicas and repetitions together.
pub const DEADLINE: Duration = Duration::from_secs(30);
/// First and longest wait before all replicas are asked again.
const WAITS: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(1));
/// A replica whose limits let nothing begin for longer than this is asked after the others.
const NOTICEABLE: Duration = Duration::from_millis(50);

/// Finds the local file of a segment that is still staged.
pub type Local = Arc<dyn Fn(&FrameLoc) -> Option<PathBuf> + Send + Sync>;

/// Reads sealed blocks from all replicas of a volume. Use it through [`FrameSource`].
pub struct Reader {
    shared: Arc<Shared>,
    runtime: Handle,
    deadline: Duration,
    flights: Mutex<HashMap<BlockHash, Arc<Flight>>>,
}

struct Shared {
    replicas: Arc<Roster>,
    local: Option<Local>,
    closing: watch::Receiver<bool>,
    /// What has been offline for longer is not waited for any more.
    patience: Duration,
}

/// A fetch that others wait for.
#[derive(Default)]
struct Flight {
    landed: Mutex<Option<Landing>>,
    changed: Condvar,
}

/// How a shared fetch ended for one block.
#[derive(Clone)]
enum Landing {
    Got(Bytes),
    Failed(FetchError),
    /// The block was only fetched along, and is not to be had that way: whoever needs it asks by itself.
    NotAlong,
}

/// The blocks of a span that were found intact; the wanted one is among them.
type Intact = Vec<(BlockEntry, Bytes)>;

impl Reader {
    /// A reader over `replicas`; `local` finds segments that are still on local disk.
    #[must_use]
    pub fn new(
        replicas: Arc<Roster>,
        local: Option<Local>,
        runtime: Handle,
        closing: watch::Receiver<bool>,
    ) -> Self {
        let shared = Arc::new(Shared { replicas, local, closing, patience: DEADLINE });
        Self { shared, runtime, deadline: DEADLINE, flights: Mutex::default() }
    }

    /// The same with another deadline for each fetch. Replicas that have been offline for longer than that are tried once by each
    /// fetch and not waited for. To be called before the reader is used.
    #[must_use]
    pub fn with_deadline(mut self, deadline: Duration) -> Self {
        self.deadline = deadline;
        if let Some(shared) = Arc::get_mut(&mut self.shared) {
            shared.patience = deadline;
        }
        self
    }

    /// Joins the flight that fetches `hash`, or begins one (then `true`).
    fn board(&self, hash: BlockHash) -> (Arc<Flight>, bool) {
        let mut flights = self.flights.lock();
        if let Some(flight) = flights.get(&hash) {
            return (Arc::clone(flight), false);
        }
        let flight = Arc::new(Flight::default());
        flights.insert(hash, Arc::clone(&flight));
        (flight, true)
    }

    /// Ends a flight, once; those who wait go on.
    fn land(&self, hash: BlockHash, flight: &Arc<Flight>, landing: Landing) {
        {
            // First of all nobody new may board it.
            let mut flights = self.flights.lock();
            if flights.get(&hash).is_some_and(|f| Arc::ptr_eq(f, flight)) {
                flights.remove(&hash);
            }
        }
        let mut landed = flight.landed.lock();
        if landed.is_none() {
            *landed = Some(landing);
            flight.changed.notify_all();
        }
    }

    /// Fetches a span on the runtime and waits for it: the one bridge between threads and async. A runtime that is shut down drops the
    /// task, which shows as a closed channel.
    fn bridge(&self, span: Span, until: Instant) -> Result<Intact, FetchError> {
        let (sender, receiver) = mpsc::sync_channel(1);
        let (shared, what) = (Arc::clone(&self.shared), span.wanted);
        self.runtime.spawn(async move {
            let _ = sender.send(shared.fetch(span, until).await);
        });
        // Twice the slack of the async side's own deadline, against a runtime that is stuck.
        let patience = until.saturating_duration_since(Instant::now()) + Duration::from_secs(5);
        match receiver.recv_timeout(patience) {
            Ok(result) => result,
            Err(mpsc::RecvTimeoutError::Disconnected) => Err(FetchError::Closed),
            Err(mpsc::RecvTimeoutError::Timeout) => Err(FetchError::Unavailable {
                what: name_of(&what),
                detail: "the runtime does not answer".into(),
            }),
        }
    }
}

/// The flights that one fetch owns. Those still in the air when it ends are landed, so that nobody waits for a fetch that died.
struct Owned<'a> {
    reader: &'a Reader,
    flights: HashMap<BlockHash, Arc<Flight>>,
}

impl Owned<'_> {
    fn land(&self, hash: BlockHash, landing: Landing) {
        if let Some(flight) = self.flights.get(&hash) {
            self.reader.land(hash, flight, landing);
        }
    }
}

impl Drop for Owned<'_> {
    fn drop(&mut self) {
        for hash in self.flights.keys() {
            self.land(*hash, Landing::NotAlong);
        }
    }
}

impl FrameSource for Reader {
    fn fetch(
        &self,
        wanted: &BlockEntry,
        ahead: &[BlockEntry],
        deliver: &dyn Fn(&BlockEntry, Bytes),
    ) -> Result<Bytes, FetchError> {
        let until = Instant::now() + self.deadline;
        let mut owned = Owned { reader: self, flights: HashMap::new() };
        loop {
            let (flight, is_ours) = self.board(wanted.hash);
            if is_ours {
                owned.flights.insert(wanted.hash, flight);
                break;
            }
            let mut landed = flight.landed.lock();
            while landed.is_none() {
                if flight.changed.wait_until(&mut landed, until).timed_out() {
                    let detail = "another fetch of the same block takes too long".into();
                    return Err(FetchError::Unavailable { what: name_of(wanted), detail });
                }
            }
            match landed.clone() {
                Some(Landing::Got(bytes)) => return Ok(bytes),
                Some(Landing::Failed(e)) => return Err(e),
                Some(Landing::NotAlong) | None => {}
            }
        }
        // Blocks that somebody fetches already are not fetched again.
        let mut free = Vec::new();
        for block in Span::around(wanted, ahead).others {
            let (flight, is_ours) = self.board(block.hash);
            if is_ours {
                owned.flights.insert(block.hash, flight);
                free.push(block);
            }
        }
        let span = Span::around(wanted, &free);
        let intact = match self.shared.read_local(&span) {
            Some(intact) => Ok(intact),
            None => self.bridge(span, until),
        };
        let intact = match intact {
            Ok(intact) => intact,
            Err(e) => {
                owned.land(wanted.hash, Landing::Failed(e.clone()));
                return Err(e);
            }
        };
        let mut found = Err(FetchError::Closed);
        for (block, bytes) in intact {
            // In this order: who comes in between finds either the flight or what was delivered.
            deliver(&block, bytes.clone());
            owned.land(block.hash, Landing::Got(bytes.clone()));
            if block.hash == wanted.hash {
                found = Ok(bytes);
            }
        }
        found
    }
}

/// Why one replica did not give a span.
struct Miss {
    answer: Answer,
    text: String,
    /// Nothing more is to be expected of it soon: it has been offline for long.
    given_up: bool,
}

impl Shared {
    async fn fetch(&self, span: Span, until: Instant) -> Result<Intact, FetchError> {
        let what = name_of(&span.wanted);
        let mut closing = self.closing.clone();
        let deadline = tokio::time::Instant::from_std(until);
        let mut misses = Vec::new();
        tokio::select! {
            result = self.insist(span, &mut misses) => result,
            () = tokio::time::sleep_until(deadline) => {
                let detail = match misses.is_empty() {
                    true => "no answer in time".to_owned(),
                    false => said(&misses),
                };
                log::warn!("{what}: no replica gave it in time: {detail}");
                Err(FetchError::Unavailable { what, detail })
            }
            _ = closing.wait_for(|c| *c) => Err(FetchError::Closed),
        }
    }

    /// Asks all replicas again and again until one gives the block or there is no hope. `misses` holds what they said last.
    async fn insist(&self, span: Span, misses: &mut Vec<Miss>) -> Result<Intact, FetchError> {
        let what = name_of(&span.wanted);
        let mut span = span;
        let mut wait = WAITS.0;
        loop {
            match self.ask_all(&span).await {
                Ok(intact) => return Ok(intact),
                Err(said) => *misses = said,
            }
            if !span.others.is_empty() {
                // The neighbours may be what is damaged: now the block alone, at once.
                span = Span::of(&span.wanted);
                continue;
            }
            let answers: Vec<_> = misses.iter().map(|m| m.answer).collect();
            let detail = said(misses);
            let given_up = misses.iter().all(|m| m.given_up || m.answer != Answer::Passing);
            match verdict(&answers) {
                Verdict::Retry if given_up => {
                    let detail = format!("{detail}; what cannot be reached has been offline for long");
                    log::warn!("{what} cannot be had: {detail}");
                    return Err(FetchError::Unavailable { what, detail });
                }
                Verdict::Retry => {
                    tokio::time::sleep(wait.mul_f64(1.0 - 0.5 * jitter())).await;
                    wait = (wait * 2).min(WAITS.1);
                }
                Verdict::Lost => {
                    log::error!("{what} is lost: no replica holds an intact copy: {detail}");
                    return Err(FetchError::Lost { what, detail });
                }
                Verdict::Unavailable => {
                    log::warn!("{what} cannot be had: {detail}");
                    return Err(FetchError::Unavailable { what, detail });
                }
            }
        }
    }

    /// Asks the replicas for a span, best first: the next one when one fails, and one more when the last is late.
    async fn ask_all(&self, span: &Span) -> Result<Intact, Vec<Miss>> {
        let replicas = self.replicas.all();
        let healths: Vec<_> = replicas.iter().map(|r| r.health()).collect();
        let mut order = health::order(&healths, span.len, Instant::now());
        // Those that are known to be behind the segment come last, but they are asked: a cursor may lag the truth.
        let is_down = |h: &Health| matches!(h.state(), HealthState::Offline | HealthState::Probing);
        order.sort_by_key(|i| match (replicas.get(*i), healths.get(*i)) {
            (Some(r), Some(h)) => {
                (r.cursor() < span.segment, is_down(h), r.store().download_wait() > NOTICEABLE)
            }
            _ => (true, true, true),
        });
        // A hedge must not wake those that are known to be down; they are asked when all others have failed.
        let all_down = healths.iter().all(is_down);
        let mut order =
            order.into_iter().filter_map(|i| Some((replicas.get(i)?, healths.get(i)?))).peekable();
        let mut asked = FuturesUnordered::new();
        let mut pending: Vec<(&Arc<Replica>, Arc<OnceLock<Instant>>)> = Vec::new();
        let mut misses = Vec::new();
        let mut late = Duration::ZERO;
        loop {
            if asked.is_empty() || late.is_zero() {
                let Some((replica, health)) = order.next() else { return Err(misses) };
                late = health.late(span.len);
                let begun = Arc::new(OnceLock::new());
                pending.push((replica, Arc::clone(&begun)));
                asked.push(ask(replica, span, begun, self.patience));
            }
            let hedge = order.peek().is_some_and(|(_, h)| all_down || h.state() != HealthState::Offline);
            tokio::select! {
                Some((replica, result)) = asked.next() => {
                    pending.retain(|(r, _)| r.name() != replica.name());
                    match result {
                        Ok(intact) => {
                            for (slower, begun) in pending {
                                // Waiting for our own limits is not its fault.
                                if let Some(begun) = begun.get() {
                                    slower.note(&Event::Late { len: span.len, took: begun.elapsed() });
                                }
                            }
                            return Ok(intact);
                        }
                        Err(miss) => {
                            misses.push(miss);
                            // Another one may be on its way; the next is asked at once all the same.
                            if order.peek().is_some() {
                                late = Duration::ZERO;
                            }
                        }
                    }
                }
                () = tokio::time::sleep(late), if hedge => late = Duration::ZERO,
            }
        }
    }

    /// Reads a span out of a segment that is still on local disk. Blocking.
    fn read_local(&self, span: &Span) -> Option<Intact> {
        let path = self.local.as_ref()?(&span.wanted.loc)?;
        let complain = |why: &str| {
            log::error!("staged {}: {}: {why}; asking the replicas", path.display(), name_of(&span.wanted));
        };
        let bytes = match read_range(&path, span.offset, span.len) {
            Ok(bytes) => Bytes::from(bytes),
            // It was just removed because replicas hold it.
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return None,
            Err(e) => {
                complain(&e.to_string());
                return None;
            }
        };
        let (intact, broken) = decode(span, &bytes);
        match broken.iter().find(|(b, _)| b.hash == span.wanted.hash) {
            Some((_, why)) => {
                complain(why);
                None
            }
            None => Some(intact),
        }
    }
}

/// Asks one replica for a span and verifies what it gives. `begun` is set when the request is on its way.
async fn ask<'a>(
    replica: &'a Arc<Replica>,
    span: &Span,
    begun: Arc<OnceLock<Instant>>,
    patience: Duration,
) -> (&'a Arc<Replica>, Result<Intact, Miss>) {
    let object = ObjectName::Segment(span.segment, span.epoch).path();
    let long_down = || replica.health().down_for(Instant::now()).is_some_and(|d| d >= patience);
    let miss = |answer, text| Miss { answer, text, given_up: long_down() };
    let damage = |kind, block: Option<&BlockEntry>| Damage {
        object: object.clone(),
        segment: span.segment,
        offset: block.map_or(span.offset, |b| b.loc.offset),
        len: block.map_or(span.len, |b| u64::from(b.loc.stored_len)),
        block: block.map(|b| b.hash),
        kind,
    };
    let given = match if long_down() { probe(replica, &object).await } else { Ok(()) } {
        Ok(()) => replica.store().get_range_begun(&object, span.offset, span.len, &begun).await,
        Err(e) => Err(e),
    };
    let bytes = match given {
        Ok(bytes) => bytes,
        Err(e) => {
            let answer = answer_of(&e);
            match e.kind {
                // An object that the cursor has not reached is not missing.
                ErrorKind::Absent if replica.cursor() >= span.segment => {
                    replica.note_damage(damage(DamageKind::Missing, None));
                }
                // That a span is short says which block is damaged only when it is one block.
                ErrorKind::Corrupt if span.others.is_empty() => {
                    replica.note_damage(damage(DamageKind::Short, Some(&span.wanted)));
                }
                ErrorKind::Absent | ErrorKind::Corrupt => replica.note(&Event::Success),
                _ => replica.note_error(&e),
            }
            return (replica, Err(miss(answer, e.to_string())));
        }
    };
    let took = begun.get().map_or(Duration::ZERO, Instant::elapsed);
    replica.note(&Event::Read { len: span.len, took });
    let owned = span.clone();
    let Ok((intact, broken)) = tokio::task::spawn_blocking(move || decode(&owned, &bytes)).await else {
        return (replica, Err(miss(Answer::Passing, "decoding was interrupted".into())));
    };
    for (block, _) in &broken {
        replica.note_damage(damage(DamageKind::Wrong, Some(block)));
    }
    match broken.into_iter().find(|(b, _)| b.hash == span.wanted.hash) {
        Some((_, why)) => {
            (replica, Err(miss(Answer::Unusable, format!("replica {}: {why}", replica.name()))))
        }
        None => (replica, Ok(intact)),
    }
}

/// Finds out by a small request, which need not take long, whether a replica that was offline for long answers again.
async fn probe(replica: &Replica, object: &str) -> Result<(), StoreError> {
    let (store, time) = (replica.store(), replica.store().limits().connect);
    match tokio::time::timeout(time, store.head(object)).await {
        Ok(Ok(_)) => {
            replica.note(&Event::Success);
            Ok(())
        }
        Ok(Err(e)) => Err(e),
        Err(_) => {
            let text = format!("offline, and gave no sign of life within {:.1} s", time.as_secs_f64());
            Err(store.error("head", object, ErrorKind::Timeout, text))
        }
    }
}

fn answer_of(e: &StoreError) -> Answer {
    match e.kind {
        ErrorKind::Absent | ErrorKind::Corrupt => Answer::Unusable,
        kind if kind.is_passing() => Answer::Passing,
        _ => Answer::Lasting,
    }
}

/// Decodes the blocks of a span: those that are intact, and those that are not with the reason.
fn decode(span: &Span, bytes: &Bytes) -> (Intact, Vec<(BlockEntry, String)>) {
    let (mut intact, mut broken) = (Vec::new(), Vec::new());
    for block in std::iter::once(&span.wanted).chain(&span.others) {
        let part = span.part(block).filter(|part| part.end <= bytes.len());
        let stored = part.map_or_else(Bytes::new, |part| bytes.slice(part));
        match frame::decode_entry_shared(&stored, block) {
            Ok(raw) => intact.push((*block, raw)),
            Err(e) => broken.push((*block, e.to_string())),
        }
    }
    (intact, broken)
}

fn read_range(path: &Path, offset: u64, len: u64) -> std::io::Result<Vec<u8>> {
    use std::os::unix::fs::FileExt;
    let file = std::fs::File::open(path)?;
    let mut bytes = vec![0; usize::try_from(len).unwrap_or(usize::MAX)];
    file.read_exact_at(&mut bytes, offset)?;
    Ok(bytes)
}

fn name_of(block: &BlockEntry) -> String {
    let FrameLoc { segment, epoch, offset, .. } = block.loc;
    format!("block {} (segment {segment} of epoch {epoch} at {offset})", block.hash)
}

fn said(misses: &[Miss]) -> String {
    match misses {
        [] => "there are no replicas".to_owned(),
        misses => misses.iter().map(|m| m.text.as_str()).collect::<Vec<_>>().join("; "),
    }
}

#[cfg(test)]
mod tests;
