//! Following a plan: load a checkpoint, replay complete transaction groups, end at the last commit.
//!
//! Owns the checks that make the result one true past of the volume: hashes, the chain of segments, group boundaries.
//! Knows no files; what it loads goes to a [`Sink`].

use std::collections::{BTreeMap, HashSet, VecDeque};
use std::sync::Arc;

use futures::stream::{self, StreamExt};

use super::{Damage, Place, Plan, Start};
use crate::format::checkpoint::{Manifest, ManifestHash};
use crate::format::names::ObjectName;
use crate::format::record::{Op, Record};
use crate::format::segment::{SegmentHash, SegmentMeta};
use crate::format::tables::{BlockEntry, Time, block_key, is_replicated, split_checkpoint_key};
use crate::format::volume::Volume;
use crate::ids::{BlockId, Epoch, Lsn, SegmentNo};
use crate::replica::Store;

mod reader;
#[cfg(test)]
mod tests;

use reader::{Fetched, Reader, Task, settle};

/// Segments fetched at a time.
const SEGMENTS_IN_FLIGHT: usize = 8;
/// Checkpoint parts fetched at a time.
const PARTS_IN_FLIGHT: usize = 4;
/// Changes given to the sink at a time, about.
const BATCH: usize = 8192;

/// Takes the tables as they are loaded. Nothing that it was given counts before [`load`] has returned.
pub trait Sink {
    /// Forgets everything: the load begins anew.
    fn reset(&mut self) -> Result<(), String>;
    /// Applies changes, in order, to the replicated tables.
    fn apply(&mut self, ops: Vec<Op>) -> Result<(), String>;
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

/// Brings the volume's tables back into `sink`. `stores` are those that were surveyed, in the same order.
pub async fn load(plan: &Plan, stores: &[Store], sink: &mut dyn Sink) -> Result<Loaded, LoadError> {
    let mut reasons = Vec::new();
    let mut damaged: Vec<Damage> = plan.damaged.clone();
    let reader = Reader::new(stores, plan.volume.volume);
    for start in &plan.starts {
        sink.reset().map_err(LoadError::Sink)?;
        let mut loader =
            Loader { plan, start, reader: reader.clone(), damaged: &mut damaged, state: State::new(start) };
        let run = loader.run(sink).await?;
        match run.and_then(|()| vouched(plan, start, &loader.state)) {
            Ok(()) => {
                let state = loader.state;
                let lengths = lengths(&reader, plan, &state, &mut damaged).await?;
                let mut met = HashSet::new();
                damaged.retain(|d| met.insert((d.replica.clone(), d.object.clone())));
                return Ok(finish(plan, start, state, &lengths, damaged, reasons, reader.bytes()));
            }
            Err(why) => reasons.push(why),
        }
    }
    Err(LoadError::Nothing(reasons))
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
    let uncommitted: Vec<_> = state.pending_segments.iter().map(|s| s.number).collect();
    let unnamed = state.early.iter().map(|(id, _)| *id).collect();
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
    }
}

/// How far the replay is.
struct State {
    commit: Lsn,
    last: SegmentNo,
    last_epoch: Epoch,
    /// Hash of `last`.
    hash: SegmentHash,
    seen: BTreeMap<SegmentNo, SegmentSeen>,
    pending_segments: Vec<SegmentSeen>,
    pending_index: Vec<(BlockId, BlockEntry)>,
    pending_records: Vec<Record>,
    /// Of complete groups that changed nothing but brought content: they count when a later group comes, which names them.
    early: Vec<(BlockId, BlockEntry)>,
    lost: Option<(SegmentNo, String)>,
    /// Checkpoints that complete groups of the log have named.
    named: BTreeMap<(SegmentNo, Epoch), ManifestHash>,
}

impl State {
    fn new(start: &Start) -> Self {
        let mut state = Self {
            commit: Lsn(0),
            last: SegmentNo(start.first.0.saturating_sub(1)),
            last_epoch: Epoch(0),
            hash: SegmentHash::default(),
            seen: BTreeMap::new(),
            pending_segments: Vec::new(),
            pending_index: Vec::new(),
            pending_records: Vec::new(),
            early: Vec::new(),
            lost: None,
            named: BTreeMap::new(),
        };
        if let Some((manifest, _)) = &start.checkpoint {
            state.hash = manifest.previous;
            if manifest.replay_from > manifest.number {
                state.commit = manifest.commit_lsn;
                state.last_epoch = manifest.epoch;
            }
        }
        state
    }

    /// What the next segment's header says of its predecessor when it continues the run.
    fn previous(&self) -> SegmentHash {
        self.pending_segments.last().and_then(|s| s.hash).unwrap_or(self.hash)
    }

    fn txg_first(&self) -> SegmentNo {
        self.last.next()
    }

    /// Why `meta` does not go on where this state ends.
    fn refuse(&self, meta: &SegmentMeta) -> Result<(), String> {
        let header = &meta.footer.header;
        if header.previous != self.previous() {
            return Err("it does not continue the segment before it".into());
        }
        if header.txg_first != self.txg_first() {
            return Err(format!("its group begins at {}, not at {}", header.txg_first, self.txg_first()));
        }
        let known = self.pending_records.last().map_or(self.commit, |r| r.lsn);
        if meta.footer.lsns.is_some_and(|(first, _)| first <= known)
            || meta.footer.commit.is_some_and(|commit| commit < known)
        {
            return Err(format!("its records do not follow record {known}"));
        }
        Ok(())
    }

    /// Takes a segment; gives the group's changes when it completes one that changes something.
    fn push(&mut self, meta: SegmentMeta) -> Option<Group> {
        let footer = meta.footer;
        self.pending_index.extend(meta.index);
        self.pending_records.extend(meta.records);
        let seen = SegmentSeen {
            number: footer.header.number,
            epoch: footer.header.epoch,
            len: footer.object_len,
            hash: Some(footer.hash),
            commit: footer.commit,
            cut_at: Some(footer.header.cut_at),
        };
        self.pending_segments.push(seen);
        let commit = footer.commit?;
        let is_early = commit == self.commit && self.pending_records.is_empty();
        self.commit = commit;
        self.last = seen.number;
        self.last_epoch = seen.epoch;
        self.hash = footer.hash;
        self.seen.extend(self.pending_segments.drain(..).map(|s| (s.number, s)));
        self.early.append(&mut self.pending_index);
        if is_early {
            return None;
        }
        self.named.extend(self.pending_records.iter().flat_map(|r| &r.ops).filter_map(named_checkpoint));
        Some(Group {
            index: std::mem::take(&mut self.early),
            records: std::mem::take(&mut self.pending_records),
        })
    }
}

/// The checkpoint that an operation of the log names.
fn named_checkpoint(op: &Op) -> Option<((SegmentNo, Epoch), ManifestHash)> {
    match op {
        Op::Put { key, value } => Some((split_checkpoint_key(key)?, ManifestHash::from_value(value).ok()?)),
        Op::Delete { .. } => None,
    }
}

struct Group {
    index: Vec<(BlockId, BlockEntry)>,
    records: Vec<Record>,
}

impl Group {
    fn apply(self, sink: &mut dyn Sink) -> Result<(), LoadError> {
        let mut ops = Vec::new();
        let entries = self.index.into_iter().map(|(id, entry)| Op::put(block_key(id), entry.encode()));
        let changes = self.records.into_iter().flat_map(|r| r.ops).filter(|op| is_replicated(op.key()));
        for op in entries.chain(changes) {
            ops.push(op);
            if ops.len() >= BATCH {
                sink.apply(std::mem::take(&mut ops)).map_err(LoadError::Sink)?;
            }
        }
        if ops.is_empty() { Ok(()) } else { sink.apply(ops).map_err(LoadError::Sink) }
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
        self.replay(sink).await?;
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
        let mut entries = 0;
        while let Some(fetched) = parts.next().await {
            let fetched = fetched?;
            let object = ObjectName::CheckpointPart(manifest.number, manifest.epoch, entries);
            entries += 1;
            match settle(&object, fetched, self.damaged)? {
                Ok(part) => sink
                    .apply(part.entries.into_iter().map(|(key, value)| Op::Put { key, value }).collect())
                    .map_err(LoadError::Sink)?,
                Err(why) => return Ok(Err(why)),
            }
        }
        Ok(Ok(()))
    }

    async fn replay(&mut self, sink: &mut dyn Sink) -> Result<(), LoadError> {
        let reader = self.reader.clone();
        let range = self.plan.segments.range(self.start.first..self.start.last.next().max(self.start.first));
        let mut queue: VecDeque<&Place> = range.map(|(_, place)| place).collect();
        let mut flying: VecDeque<(&Place, Task<Fetched<SegmentMeta>>)> = VecDeque::new();
        loop {
            while flying.len() < SEGMENTS_IN_FLIGHT
                && let Some(place) = queue.pop_front()
            {
                flying.push_back((place, reader.begin(place, Vec::new())));
            }
            let Some((place, task)) = flying.pop_front() else { return Ok(()) };
            let object = ObjectName::Segment(place.number, place.epoch);
            let meta = match self.continuing(place, task.join().await?).await? {
                Ok(meta) => meta,
                Err(why) => {
                    self.state.lost = Some((place.number, format!("{object}: {why}")));
                    return Ok(());
                }
            };
            if let Some(group) = self.state.push(meta) {
                group.apply(sink)?;
            }
        }
    }

    /// The first copy of a segment that is intact and continues the run.
    async fn continuing(
        &mut self,
        place: &Place,
        mut fetched: Fetched<SegmentMeta>,
    ) -> Result<Result<SegmentMeta, String>, LoadError> {
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
                return Ok(Ok(meta));
            };
            let Some(holder) = from else { return Ok(Err(why)) };
            let replica = self.plan.replicas[holder].clone();
            reasons.push(format!("replica {replica}: {why}"));
            contradicting.push(Damage { replica, object: object.path(), why });
            refused.push(holder);
            fetched = self.reader.begin(place, refused.clone()).join().await?;
        }
    }
}
