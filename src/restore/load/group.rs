//! How far a replay is: the segments of the transaction group that is being read, and what a whole
//! one changes.
//!
//! Owns the rules by which a segment continues the run. Records stay as they are stored; of a large
//! group not even so: they are fetched again when the group is whole.

use std::collections::BTreeMap;

use super::reader::{Reader, When, settle};
use super::{LoadError, Place, SegmentSeen, Sink, Start};
use crate::format::checkpoint::ManifestHash;
use crate::format::names::ObjectName;
use crate::format::record::Op;
use crate::format::segment::{RecordLog, SegmentHash, SegmentMeta};
use crate::format::tables::{BlockEntry, block_key, split_checkpoint_key};
use crate::ids::{BlockId, Epoch, Lsn, SegmentNo};

/// Stored records of one group that are kept in memory, in bytes.
const KEPT: usize = if cfg!(test) { 1 << 10 } else { 32 << 20 };
/// Changes given to the sink at a time, and their bytes.
const BATCH: (usize, usize) = (8192, 1 << 20);

/// The records of a segment.
enum Records {
    Here(RecordLog),
    /// To be fetched once more, from the holder that had them.
    At(Place, usize),
}

/// A segment of a group that is not complete yet.
struct Pending {
    seen: SegmentSeen,
    records: Option<Records>,
}

/// How far the replay is.
pub(super) struct State {
    block_size: u32,
    pub commit: Lsn,
    pub last: SegmentNo,
    pub last_epoch: Epoch,
    /// Hash of `last`.
    pub hash: SegmentHash,
    pub seen: BTreeMap<SegmentNo, SegmentSeen>,
    pending: Vec<Pending>,
    pending_index: Vec<(BlockId, BlockEntry)>,
    /// The newest record of the pending segments.
    newest: Option<Lsn>,
    /// Bytes of their records in memory.
    kept: usize,
    /// Of complete groups that changed nothing but brought content: they count when a later group
    /// comes, which names them.
    early: Vec<(BlockId, BlockEntry)>,
    pub lost: Option<(SegmentNo, String)>,
    /// Checkpoints that complete groups of the log have named.
    pub named: BTreeMap<(SegmentNo, Epoch), ManifestHash>,
}

impl State {
    pub fn new(start: &Start, block_size: u32) -> Self {
        let mut state = Self {
            block_size,
            commit: Lsn(0),
            last: SegmentNo(start.first.0.saturating_sub(1)),
            last_epoch: Epoch(0),
            hash: SegmentHash::default(),
            seen: BTreeMap::new(),
            pending: Vec::new(),
            pending_index: Vec::new(),
            newest: None,
            kept: 0,
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

    /// The segments of a group that is not complete.
    pub fn pending(&self) -> impl Iterator<Item = &SegmentSeen> {
        self.pending.iter().map(|p| &p.seen)
    }

    /// Blocks that no group came to name.
    pub fn unnamed(&self) -> impl Iterator<Item = BlockId> {
        self.early.iter().map(|(id, _)| *id)
    }

    /// What the next segment's header says of its predecessor when it continues the run.
    fn previous(&self) -> SegmentHash {
        self.pending.last().and_then(|p| p.seen.hash).unwrap_or(self.hash)
    }

    /// Why `meta` does not go on where this state ends.
    pub fn refuse(&self, meta: &SegmentMeta) -> Result<(), String> {
        let header = &meta.footer.header;
        if header.previous != self.previous() {
            return Err("it does not continue the segment before it".into());
        }
        let first = self.last.next();
        if header.txg_first != first {
            return Err(format!("its group begins at {}, not at {first}", header.txg_first));
        }
        let known = self.newest.unwrap_or(self.commit);
        if meta.footer.lsns.is_some_and(|(first, _)| first <= known)
            || meta.footer.commit.is_some_and(|commit| commit < known)
        {
            return Err(format!("its records do not follow record {known}"));
        }
        let size = self.block_size;
        match meta.index.iter().find(|(_, entry)| entry.loc.raw_len > size) {
            Some((id, entry)) => {
                Err(format!("block {id} of {} bytes in a volume of blocks of {size}", entry.loc.raw_len))
            }
            None => Ok(()),
        }
    }

    /// Takes a segment that `holder` had; gives the group's changes when it completes one that
    /// changes something.
    pub fn push(&mut self, meta: SegmentMeta, place: &Place, holder: usize) -> Option<Group> {
        let footer = meta.footer;
        self.pending_index.extend(meta.index);
        let records = (!meta.records.is_empty()).then(|| {
            self.kept += meta.records.stored_len();
            match self.kept > KEPT {
                true => Records::At(place.clone(), holder),
                false => Records::Here(meta.records),
            }
        });
        self.newest = footer.lsns.map(|(_, last)| last).or(self.newest);
        let seen = SegmentSeen {
            number: footer.header.number,
            epoch: footer.header.epoch,
            len: footer.object_len,
            hash: Some(footer.hash),
            commit: footer.commit,
            cut_at: Some(footer.header.cut_at),
        };
        self.pending.push(Pending { seen, records });
        let commit = footer.commit?;
        let is_early = commit == self.commit && self.newest.is_none();
        self.commit = commit;
        self.last = seen.number;
        self.last_epoch = seen.epoch;
        self.hash = footer.hash;
        (self.newest, self.kept) = (None, 0);
        self.seen.extend(self.pending.iter().map(|p| (p.seen.number, p.seen)));
        let segments = std::mem::take(&mut self.pending);
        self.early.append(&mut self.pending_index);
        (!is_early).then(|| Group { index: std::mem::take(&mut self.early), segments })
    }
}

/// What a complete transaction group changes.
pub(super) struct Group {
    index: Vec<(BlockId, BlockEntry)>,
    segments: Vec<Pending>,
}

impl Group {
    /// Applies it: block entries first, then the records in order. Notes in `named` the checkpoints that
    /// the records name. The inner error: a segment's records are not to be had any more.
    pub async fn apply(
        self,
        sink: &mut dyn Sink,
        reader: &Reader,
        named: &mut BTreeMap<(SegmentNo, Epoch), ManifestHash>,
    ) -> Result<Result<(), (SegmentNo, String)>, LoadError> {
        let mut batch = Batch { sink, ops: Vec::new(), bytes: 0 };
        for (id, entry) in self.index {
            batch.push(Op::put(block_key(id), entry.encode()))?;
        }
        for Pending { seen, records } in self.segments {
            let log = match records {
                None => continue,
                Some(Records::Here(log)) => log,
                Some(Records::At(place, holder)) => match again(reader, &place, holder, &seen).await? {
                    Ok(log) => log,
                    Err(why) => return Ok(Err((seen.number, why))),
                },
            };
            log.visit(|_, op| {
                let op = op.to_op();
                named.extend(named_checkpoint(&op));
                batch.push(op)
            })?;
        }
        batch.finish()?;
        Ok(Ok(()))
    }
}

/// The checkpoint that an operation of the log names.
fn named_checkpoint(op: &Op) -> Option<((SegmentNo, Epoch), ManifestHash)> {
    match op {
        Op::Put { key, value } => Some((split_checkpoint_key(key)?, ManifestHash::from_value(value).ok()?)),
        Op::Delete { .. } => None,
    }
}

/// Fetches the records of a segment once more: from the holder that had them, or from another one that has the same.
async fn again(
    reader: &Reader,
    place: &Place,
    holder: usize,
    seen: &SegmentSeen,
) -> Result<Result<RecordLog, String>, LoadError> {
    let object = ObjectName::Segment(place.number, place.epoch);
    let all: Vec<usize> = place.holders.iter().map(|(h, _)| *h).collect();
    let (mut away, mut whys) = (None, Vec::new());
    let others = all.iter().copied().filter(|h| *h != holder);
    for asked in std::iter::once(holder).chain(others) {
        let without = all.iter().copied().filter(|h| *h != asked).collect();
        let fetched = reader.begin(place, without, When::Needed).join().await?;
        // What is damaged now was reported, or was whole, when it was read first.
        match settle(&object, fetched, &mut Vec::new()) {
            Ok(Ok(meta)) if Some(meta.footer.hash) == seen.hash => return Ok(Ok(meta.records)),
            Ok(Ok(_)) => whys.push("it is another one than a moment ago".to_owned()),
            Ok(Err(why)) => whys.push(why),
            Err(e) => away = Some(e),
        }
    }
    match away {
        // It may be whole there.
        Some(e) => Err(e),
        None => Ok(Err(format!("{object}: {}", whys.join("; ")))),
    }
}

/// Gathers changes for the sink.
struct Batch<'a> {
    sink: &'a mut dyn Sink,
    ops: Vec<Op>,
    bytes: usize,
}

impl Batch<'_> {
    fn push(&mut self, op: Op) -> Result<(), LoadError> {
        self.bytes += op.payload();
        self.ops.push(op);
        if self.ops.len() < BATCH.0 && self.bytes < BATCH.1 {
            return Ok(());
        }
        self.bytes = 0;
        self.sink.apply(std::mem::take(&mut self.ops)).map_err(LoadError::Sink)
    }

    fn finish(mut self) -> Result<(), LoadError> {
        match self.ops.is_empty() {
            true => Ok(()),
            false => self.sink.apply(std::mem::take(&mut self.ops)).map_err(LoadError::Sink),
        }
    }
}
