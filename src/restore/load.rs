//! Following a plan: load a checkpoint, replay complete transaction groups, end at the last commit.
//!
//! Owns the checks that make the result one true past of the volume: hashes, the chain of segments, group boundaries.
//! Knows no files; what it loads goes to a [`Sink`].

use std::collections::{BTreeMap, HashSet, VecDeque};
use std::sync::Arc;

use bytes::Bytes;
use futures::stream::{self, StreamExt};

use super::sound::Flaw;
use super::{Damage, Place, Plan, Start};
use crate::format::checkpoint::{Manifest, Part};
use crate::format::codec::FormatError;
use crate::format::names::ObjectName;
use crate::format::record::Op;
use crate::format::segment::{SegmentHash, SegmentMeta};
use crate::format::tables::Time;
use crate::format::volume::Volume;
use crate::ids::{BlockId, Epoch, Lsn, SegmentNo};
use crate::replica::Store;

mod group;
mod reader;
#[cfg(test)]
mod tests;

use group::State;
use reader::{Fetched, Reader, Task, When, settle};

/// Segments fetched at a time.
const SEGMENTS_IN_FLIGHT: usize = 8;
/// Checkpoint parts fetched at a time.
const PARTS_IN_FLIGHT: usize = 4;

/// Takes the tables as they are loaded. Nothing that it was given counts before [`load`] has returned.
pub trait Sink {
    /// Forgets everything: the load begins anew.
    fn reset(&mut self) -> Result<(), String>;
    /// Applies changes, in order, to the replicated tables.
    fn apply(&mut self, ops: Vec<Op>) -> Result<(), String>;
    /// What of it contradicts itself, in a volume of this block size. Another start is tried when
    /// there is any.
    fn flaws(&self, block_size: u32) -> Vec<Flaw>;
}

/// What is known of a segment after loading.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SegmentSeen {
    /// Its number.
    pub number: SegmentNo,
    /// Its epoch.
    pub epoch: Epoch,
    /// Its length: verified when `hash` is known or its holders differ about it, else as they list it.
    pub len: u64,
    /// Its hash; `None` when it lies before the checkpoint's replay and was not read.
    pub hash: Option<SegmentHash>,
    /// Its commit, when that is known and it has one.
    pub commit: Option<Lsn>,
    /// When its group was cut, when it was read.
    pub cut_at: Option<Time>,
}

/// Segments that exist but could not be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lost {
    /// The first one.
    pub from: SegmentNo,
    /// The highest number that any replica lists.
    pub upto: SegmentNo,
    /// Why: missing everywhere, damaged everywhere, or not the continuation of the one before.
    pub why: String,
}

/// The volume as it was brought back.
#[derive(Clone, Debug)]
pub struct Loaded {
    /// The volume.
    pub volume: Volume,
    /// The checkpoint that was loaded.
    pub checkpoint: Option<(SegmentNo, Epoch)>,
    /// The state is that of this LSN.
    pub commit_lsn: Lsn,
    /// The last segment of the last complete group; the next writer goes on with the number after it.
    pub last_segment: SegmentNo,
    /// Its epoch; 0 when there is no segment.
    pub last_epoch: Epoch,
    /// Its hash: the next segment carries it.
    pub last_hash: SegmentHash,
    /// The epoch that the next writer claims.
    pub next_epoch: Epoch,
    /// All segments up to `last_segment` that some replica holds, ascending.
    pub segments: Vec<SegmentSeen>,
    /// Segments of a group that was never completed: they are no part of the volume.
    pub uncommitted: Vec<SegmentNo>,
    /// Blocks in the last groups that nobody names, because the group that was to name them never came. They are not in the tables;
    /// who goes on from here takes them out of the log as well, and gives their numbers to no others.
    pub unnamed: Vec<BlockId>,
    /// Segments that should be part of the volume and are not.
    pub lost: Option<Lost>,
    /// Bytes fetched.
    pub bytes: u64,
    /// What a person should know.
    pub warnings: Vec<String>,
    /// Damaged objects that were met, for repair.
    pub damaged: Vec<Damage>,
    /// What the tables have of contradictions, whatever start is taken.
    pub flaws: Vec<Flaw>,
}

/// Why a volume could not be brought back.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LoadError {
    /// Replicas that may hold what is needed did not answer. Going on without would silently give an older state.
    #[error("{object} could not be fetched, and a replica that may hold it does not answer: {detail}")]
    Unavailable {
        /// The object.
        object: String,
        /// What the replicas said.
        detail: String,
    },
    /// An object was written by a newer mirrorfs.
    #[error("{object}: {why}")]
    Newer {
        /// The object.
        object: String,
        /// What is newer about it.
        why: String,
    },
    /// No start of the plan leads to a commit.
    #[error("no checkpoint and no run of segments is intact: {}", .0.join("; "))]
    Nothing(Vec<String>),
    /// The sink refused.
    #[error("the tables could not be written: {0}")]
    Sink(String),
}

/// For what was checked already when it is unpacked again: it cannot fail any more.
impl From<FormatError> for LoadError {
    fn from(e: FormatError) -> Self {
        Self::Nothing(vec![e.to_string()])
    }
}

/// Brings the volume's tables back into `sink`. `stores` are those that were surveyed, in the same order.
///
/// An attacker who can write to a replica may store a checkpoint that is whole but nonsense. So a
/// start whose tables contradict themselves is used only when no other one that reaches as far
/// gives tables with fewer contradictions.
pub async fn load(plan: &Plan, stores: &[Store], sink: &mut dyn Sink) -> Result<Loaded, LoadError> {
    let mut load = Load {
        plan,
        reader: Reader::new(stores, plan.volume.volume, plan.answering.len()),
        damaged: plan.damaged.clone(),
        reasons: Vec::new(),
    };
    // What most replicas hold, as far as any start leads.
    let goal = plan.starts.iter().map(|s| s.last).max().unwrap_or_default().min(plan.agreed);
    let mut best: Option<Best<'_>> = None;
    let mut states = 0;
    for start in &plan.starts {
        if best.as_ref().is_some_and(|best| !best.may_be_outdone_by(start)) {
            continue;
        }
        if states == MOST_STATES {
            break;
        }
        // The tables are taken from the best one by now.
        best.iter_mut().for_each(|best| best.held = None);
        let state = match load.attempt(start, sink).await {
            Ok(state) => state,
            // There is one that can be used, so this one need not be reached.
            Err(e @ (LoadError::Unavailable { .. } | LoadError::Newer { .. })) if best.is_some() => {
                load.reasons.push(format!("{} was not tried: {e}", describe(start)));
                continue;
            }
            Err(e) => return Err(e),
        };
        let Some(state) = state else { continue };
        states += 1;
        let flaws = sink.flaws(plan.volume.block_size);
        let found = Best { start, reached: state.last, flaws, held: Some(state) };
        if let Some(flaw) = found.flaws.first() {
            load.reasons.push(format!("{} gives tables that contradict themselves: {flaw}", describe(start)));
        }
        if best.as_ref().is_none_or(|best| found.outdoes(best)) {
            let enough = found.is_enough(goal);
            best = Some(found);
            if enough {
                break;
            }
        }
    }
    let Some(best) = best else { return Err(LoadError::Nothing(load.reasons)) };
    let state = match best.held {
        Some(state) => Some(state),
        None => load.attempt(best.start, sink).await?,
    };
    match state {
        Some(state) => load.finish(best.start, state, best.flaws).await,
        None => Err(LoadError::Nothing(load.reasons)),
    }
}

/// Starts from which a state is loaded at most: each costs a replay.
const MOST_STATES: usize = 4;

/// The best state so far.
struct Best<'a> {
    start: &'a Start,
    reached: SegmentNo,
    flaws: Vec<Flaw>,
    /// Set while its tables are in the sink.
    held: Option<State>,
}

impl Best<'_> {
    /// Nothing better is to be looked for. What most replicas begin with may have flaws that are harmless: every start
    /// would show them.
    fn is_enough(&self, goal: SegmentNo) -> bool {
        self.reached >= goal && badness(&self.flaws).0 == 0 && (self.flaws.is_empty() || self.start.agreed)
    }

    /// A start that ends earlier gives an older state: worse than one with flaws.
    fn may_be_outdone_by(&self, start: &Start) -> bool {
        start.last > self.reached || start.last == self.reached && !self.flaws.is_empty()
    }

    fn outdoes(&self, other: &Best<'_>) -> bool {
        let (mine, theirs) = (badness(&self.flaws), badness(&other.flaws));
        self.reached > other.reached && mine.0 <= theirs.0 || self.reached >= other.reached && mine < theirs
    }
}

/// Fatal contradictions, and all of them.
fn badness(flaws: &[Flaw]) -> (usize, usize) {
    (flaws.iter().filter(|f| f.fatal).count(), flaws.len())
}

fn describe(start: &Start) -> String {
    match &start.checkpoint {
        Some((manifest, _)) => format!("checkpoint {} of epoch {}", manifest.number, manifest.epoch),
        None => format!("the log from segment {} on", start.first),
    }
}

/// What attempts to load have in common.
struct Load<'a> {
    plan: &'a Plan,
    reader: Reader,
    damaged: Vec<Damage>,
    /// Why starts led to nothing.
    reasons: Vec<String>,
}

impl<'a> Load<'a> {
    /// Loads from one start; `None` when it leads to nothing.
    async fn attempt(&mut self, start: &'a Start, sink: &mut dyn Sink) -> Result<Option<State>, LoadError> {
        sink.reset().map_err(LoadError::Sink)?;
        let (plan, reader, damaged) = (self.plan, self.reader.clone(), &mut self.damaged);
        let state = State::new(start, plan.volume.block_size);
        let mut loader = Loader { plan, start, reader, damaged, state };
        let run = loader.run(sink).await?;
        match run.and_then(|()| vouched(plan, start, &loader.state)) {
            Ok(()) => Ok(Some(loader.state)),
            Err(why) => {
                self.reasons.push(why);
                Ok(None)
            }
        }
    }

    async fn finish(mut self, start: &Start, state: State, flaws: Vec<Flaw>) -> Result<Loaded, LoadError> {
        let lengths = lengths(&self.reader, self.plan, &state, &mut self.damaged).await?;
        let mut met = HashSet::new();
        self.damaged.retain(|d| met.insert((d.replica.clone(), d.object.clone())));
        let bytes = self.reader.bytes();
        let loaded = finish(self.plan, start, state, &lengths, self.damaged, self.reasons, bytes);
        Ok(Loaded { flaws, ..loaded })
    }
}

/// Whether the log vouches for the checkpoint with which a load began. A true checkpoint is named, with the hash of its
/// manifest, by a segment after it. Where the log says otherwise, the checkpoint is forged. Where the log says nothing,
/// it counts only if most replicas hold it.
fn vouched(plan: &Plan, start: &Start, state: &State) -> Result<(), String> {
    let Some((manifest, holders)) = &start.checkpoint else { return Ok(()) };
    let id = (manifest.number, manifest.epoch);
    let named = state.named.get(&id);
    let why = match named {
        Some(named) if start.hash == Some(*named) => return Ok(()),
        None if start.agreed => return Ok(()),
        Some(named) => format!("the log names another one (hash {named})"),
        None => "the log does not name it, and only a minority of the replicas holds it".to_owned(),
    };
    let names: Vec<_> =
        holders.iter().filter_map(|i| plan.replicas.get(*i)).map(ToString::to_string).collect();
    Err(format!(
        "checkpoint {} of epoch {} on replica {} was not used: {why}. It was forged, or its record is lost; to use it \
         all the same, name only that replica",
        id.0,
        id.1,
        names.join(", ")
    ))
}

/// The lengths of segments that the load had no need to read and whose holders differ about it: one of them is cut off, and nothing
/// may rely on its length. Segments of which no holder has an intact end are left out.
async fn lengths(
    reader: &Reader,
    plan: &Plan,
    state: &State,
    damaged: &mut Vec<Damage>,
) -> Result<BTreeMap<SegmentNo, u64>, LoadError> {
    let differ = |place: &Place| {
        place.holders.iter().any(|(_, size)| Some(size) != place.holders.first().map(|h| &h.1))
    };
    let unclear = plan.segments.range(..=state.last).map(|(_, place)| place);
    let unclear: Vec<_> = unclear.filter(|p| !state.seen.contains_key(&p.number) && differ(p)).collect();
    let mut asked = stream::iter(unclear)
        .map(|place| (place, reader.begin_end(place)))
        .map(|(place, task)| async move { (place, task.join().await) })
        .buffered(SEGMENTS_IN_FLIGHT);
    let mut lengths = BTreeMap::new();
    while let Some((place, fetched)) = asked.next().await {
        let fetched = fetched?;
        let Some(len) = fetched.value else { continue };
        lengths.insert(place.number, len);
        let object = ObjectName::Segment(place.number, place.epoch).path();
        damaged.extend(place.holders.iter().filter(|(_, size)| *size != len).map(|(holder, size)| Damage {
            replica: plan.replicas[*holder].clone(),
            object: object.clone(),
            why: format!("{size} bytes instead of {len}"),
        }));
    }
    Ok(lengths)
}

fn finish(
    plan: &Plan,
    start: &Start,
    state: State,
    lengths: &BTreeMap<SegmentNo, u64>,
    damaged: Vec<Damage>,
    reasons: Vec<String>,
    bytes: u64,
) -> Loaded {
    let last = state.last;
    let mut warnings = plan.warnings.clone();
    warnings.extend(reasons);
    let highest = plan.segments.keys().next_back().copied().unwrap_or_default();
    let uncommitted: Vec<_> = state.pending().map(|s| s.number).collect();
    let unnamed = state.unnamed().collect();
    let mut lost = state.lost;
    if lost.is_none() && highest > start.last {
        let from = start.last.next();
        lost = Some((from, format!("segment {from} is missing on every replica that could be read")));
    }
    let lost = lost.map(|(from, why)| Lost { from, upto: highest.max(from), why });
    if let Some(lost) = &lost {
        warnings.push(format!(
            "the state is that of segment {last}; segments {} to {} could not be used: {}",
            lost.from, lost.upto, lost.why
        ));
    }
    if !uncommitted.is_empty() && lost.is_none() {
        warnings.push(format!(
            "the last {} segment(s) belong to a group that was never completed and were left out",
            uncommitted.len()
        ));
    }
    let mut segments = Vec::new();
    for place in plan.segments.range(..=last).map(|(_, place)| place) {
        // A checkpoint that needs no replay vouches for the segment that it belongs to.
        let vouched = place.number == last;
        segments.push(
            state.seen.get(&place.number).copied().unwrap_or(SegmentSeen {
                number: place.number,
                epoch: place.epoch,
                len: lengths
                    .get(&place.number)
                    .or(place.holders.first().map(|(_, size)| size))
                    .copied()
                    .unwrap_or_default(),
                hash: vouched.then_some(state.hash),
                commit: vouched.then_some(state.commit),
                cut_at: None,
            }),
        );
    }
    Loaded {
        volume: plan.volume.clone(),
        checkpoint: start.checkpoint.as_ref().map(|(m, _)| (m.number, m.epoch)),
        commit_lsn: state.commit,
        last_segment: last,
        last_epoch: state.last_epoch,
        last_hash: state.hash,
        next_epoch: plan.next_epoch(),
        segments,
        uncommitted,
        unnamed,
        lost,
        bytes,
        warnings,
        damaged,
        flaws: Vec::new(),
    }
}

struct Loader<'a> {
    plan: &'a Plan,
    start: &'a Start,
    reader: Reader,
    damaged: &'a mut Vec<Damage>,
    state: State,
}

/// `Ok(Err(why))`: this start leads to nothing, another may.
type Outcome = Result<Result<(), String>, LoadError>;

impl Loader<'_> {
    async fn run(&mut self, sink: &mut dyn Sink) -> Outcome {
        if let Some((manifest, holders)) = &self.start.checkpoint
            && let Err(why) = self.checkpoint(manifest, holders, sink).await?
        {
            return Ok(Err(why));
        }
        if let Err(why) = self.replay(sink).await? {
            return Ok(Err(why));
        }
        match &self.start.checkpoint {
            Some((manifest, _)) if self.state.last < manifest.number => Ok(Err(format!(
                "checkpoint {} cannot be used: {}",
                manifest.number,
                self.state.lost.as_ref().map_or("its segments commit nothing", |(_, why)| why),
            ))),
            // An empty volume is a result only where there never was anything else.
            None if self.state.last.0 == 0 && self.state.lost.is_some() => {
                Ok(Err(self.state.lost.take().map_or_else(String::new, |(_, why)| why)))
            }
            _ => Ok(Ok(())),
        }
    }

    async fn checkpoint(&mut self, manifest: &Manifest, holders: &[usize], sink: &mut dyn Sink) -> Outcome {
        let manifest = Arc::new(manifest.clone());
        let count = manifest.parts.len() as u32;
        let mut parts = stream::iter(0..count)
            .map(|index| {
                let (reader, manifest, holders) = (self.reader.clone(), manifest.clone(), holders.to_vec());
                Task::spawn(async move { reader.part(&manifest, index, &holders).await })
            })
            .map(Task::join)
            .buffered(PARTS_IN_FLIGHT);
        let (mut index, mut raw_bytes, mut last) = (0, 0, Bytes::new());
        while let Some(fetched) = parts.next().await {
            let fetched = fetched?;
            let object = ObjectName::CheckpointPart(manifest.number, manifest.epoch, index);
            index += 1;
            let part = match settle(&object, fetched, self.damaged)? {
                Ok(part) => part,
                Err(why) => return Ok(Err(why)),
            };
            raw_bytes += part.raw_bytes;
            if let Some((first, end)) = part.ends.clone() {
                if first <= last {
                    return Ok(Err(format!("{object}: its keys do not follow those of the part before")));
                }
                last = end;
            }
            put(&part, sink)?;
        }
        if raw_bytes != manifest.raw_bytes {
            return Ok(Err(format!(
                "checkpoint {}: its parts have {raw_bytes} bytes, its manifest says {}",
                manifest.number, manifest.raw_bytes
            )));
        }
        Ok(Ok(()))
    }

    /// Replays as far as it goes. An error of the inner kind: what is in the sink is no state.
    async fn replay(&mut self, sink: &mut dyn Sink) -> Outcome {
        let reader = self.reader.clone();
        let range = self.plan.segments.range(self.start.first..self.start.last.next().max(self.start.first));
        let mut queue: VecDeque<&Place> = range.map(|(_, place)| place).collect();
        let mut flying: VecDeque<(&Place, Task<Fetched<SegmentMeta>>)> = VecDeque::new();
        loop {
            while flying.len() < SEGMENTS_IN_FLIGHT
                && let Some(place) = queue.pop_front()
            {
                flying.push_back((place, reader.begin(place, Vec::new(), When::Ahead)));
            }
            let Some((place, task)) = flying.pop_front() else { return Ok(Ok(())) };
            let object = ObjectName::Segment(place.number, place.epoch);
            let mut fetched = task.join().await?;
            if fetched.postponed {
                fetched = reader.begin(place, Vec::new(), When::Needed).join().await?;
            }
            let (meta, holder) = match self.continuing(place, fetched).await? {
                Ok(found) => found,
                Err(why) => {
                    self.state.lost = Some((place.number, format!("{object}: {why}")));
                    return Ok(Ok(()));
                }
            };
            if let Some(group) = self.state.push(meta, place, holder)
                && let Err((number, why)) = group.apply(sink, &reader, &mut self.state.named).await?
            {
                self.state.lost = Some((number, why.clone()));
                return Ok(Err(why));
            }
        }
    }

    /// The first copy of a segment that is intact and continues the run, and its holder.
    async fn continuing(
        &mut self,
        place: &Place,
        mut fetched: Fetched<SegmentMeta>,
    ) -> Result<Result<(SegmentMeta, usize), String>, LoadError> {
        let object = ObjectName::Segment(place.number, place.epoch);
        let mut refused = Vec::new();
        let mut contradicting = Vec::new();
        let mut reasons = Vec::new();
        loop {
            let from = fetched.from;
            let meta = match settle(&object, fetched, self.damaged)? {
                Ok(meta) => meta,
                Err(why) => {
                    reasons.push(why);
                    return Ok(Err(reasons.join("; ")));
                }
            };
            let Err(why) = self.state.refuse(&meta) else {
                // The copies that were refused contradict one that fits: a segment never changes, so they are wrong.
                self.damaged.append(&mut contradicting);
                return Ok(Ok((meta, from.unwrap_or_default())));
            };
            let Some(holder) = from else { return Ok(Err(why)) };
            let replica = self.plan.replicas[holder].clone();
            reasons.push(format!("replica {replica}: {why}"));
            contradicting.push(Damage { replica, object: object.path(), why });
            refused.push(holder);
            fetched = self.reader.begin(place, refused.clone(), When::Needed).join().await?;
        }
    }
}

/// Gives the entries of a part to the sink.
fn put(part: &Part, sink: &mut dyn Sink) -> Result<(), LoadError> {
    part.batches(|batch| {
        let ops = batch.into_iter().map(|(key, value)| Op::Put { key, value }).collect();
        sink.apply(ops).map_err(LoadError::Sink)
    })
}
