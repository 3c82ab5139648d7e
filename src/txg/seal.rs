//! Sealing: frozen blocks and records become segments.
//!
//! Owns the content of segments and their registration in the tables. Runs on one thread; a failed seal leaves nothing
//! behind and is tried again with the same cut.
//!
//! **Large groups go in pieces.** While a large cut is sealed, the replicas would wait. So as soon as some segments of its content
//! are full, they become a group of their own: one that commits *the LSN of the group before*, exactly (else readers would take its
//! blocks for named ones), and has no records. Its state is that of
//! the group before, and blocks that nobody names yet; the cut's last group brings the records that name them. Each such group is
//! staged, registered and published as any other, so nothing that was said of groups bends.
//!
//! **Lost content.** A block that was overwritten in part needs the rest from the sealed block below. When every replica
//! answers and none has that intact, waiting would keep all later changes from the replicas for ever. So the txg goes on
//! with an entry *without content* in its place: a replica restores everything else of that commit exactly, and reading
//! that one block fails with EIO there, never with zeros or older bytes. Here invariant 2 ("exactly the state of the last
//! commit") is weaker, by content that no replica had any more. On this machine the block stays dirty, pinned and as readable
//! as before, and later txgs try it again. A replica that does not answer at all is waited for, as ever.

#[cfg(test)]
mod tests;

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use super::Cut;
use super::prepare::{Prepared, Preparer, batches};
use super::staging::{Staging, StagingError};
use super::writers::Writers;
use crate::cache::dirty::DirtyBlock;
use crate::cache::{BlockStore, StoreError, is_full};
use crate::format::codec::FormatError;
use crate::format::local::{SEALED_MARK, SealedMark, SegmentValue};
use crate::format::record::{Op, Record};
use crate::format::segment::{SegmentBuilder, SegmentHash, SegmentHeader, SegmentSummary};
use crate::format::tables::{BlockEntry, Time, is_replicated, local_key, segment_key, table};
use crate::ids::{BlockHash, BlockId, Epoch, Lsn, SegmentNo, VolumeId};
use crate::journal::{Journal, JournalError};
use crate::replica::FetchError;

/// A segment is closed when it reaches this many bytes, ...
pub const SEGMENT_TARGET: u64 = 16 << 20;
/// ... unless no more than this share of that is left of the group: then it goes into it, too, instead of costing a request of its own.
const REST: u64 = 4;
/// Full segments of content that become a group of their own when more is to come.
const EARLY: usize = 2;
/// Blocks entered into the tables by one record.
const REGISTER_STEP: usize = 1024;
/// Records that are local only, after which the mark is written anew.
const REMEMBER_STEP: u64 = 4096;

/// A block whose rest was lost is tried again after this long.
const LOST_AGAIN: Duration = Duration::from_secs(60);

/// Why a transaction group could not be sealed. Nothing is lost: it is tried again.
#[derive(Debug, thiserror::Error)]
pub enum SealError {
    /// Block content is out of reach.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The staging area failed.
    #[error(transparent)]
    Staging(#[from] StagingError),
    /// The journal refuses.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// Something does not fit the format.
    #[error("sealing: {0}")]
    Format(#[from] FormatError),
}

/// Turns cuts into segments.
pub struct Sealer {
    journal: Arc<Journal>,
    blocks: Arc<BlockStore>,
    staging: Arc<Staging>,
    volume: VolumeId,
    epoch: Epoch,
    preparer: Arc<Preparer>,
    mark: SealedMark,
    /// [`SEGMENT_TARGET`]; tests have less.
    target: u64,
    /// As far as the mark in the tables goes: the tail is kept from there on.
    remembered: Lsn,
    /// What the last segment commits. The mark may be further: there was nothing to ship.
    committed: Lsn,
    /// Registered segments that are not published yet, because something failed in between.
    unpublished: Vec<(SegmentNo, SegmentValue)>,
    /// Blocks that replicas have without content, and when that was tried last.
    lost: HashMap<BlockId, Option<Instant>>,
    /// Content whose loss was logged.
    said: HashSet<BlockHash>,
    /// Where the process is to die.
    #[cfg(test)]
    dies: Option<Step>,
}

/// What has just been done of a group of content only.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    /// Its files are durable.
    Staged,
    /// Its segments are in the tables.
    Registered,
    /// Its blocks, too.
    Entered,
    /// The shippers have it.
    Published,
}

/// What became of the blocks of a txg.
#[derive(Default)]
struct Sealed {
    whole: Vec<(Arc<DirtyBlock>, BlockEntry)>,
    /// Without content: see the module's head.
    lost: Vec<(BlockId, BlockEntry)>,
}

/// The segments of one txg that were put together.
type Drafted = Vec<(SegmentNo, SegmentSummary)>;

/// The segments of one txg while they are written.
struct Draft<'scope, 'env> {
    writers: Writers<'scope, 'env>,
    volume: VolumeId,
    epoch: Epoch,
    cut_at: Time,
    target: u64,
    first: SegmentNo,
    current: SegmentBuilder,
    done: Drafted,
    /// Bytes of content that are still to come at most.
    rest: u64,
}

impl Draft<'_, '_> {
    fn header(&self, number: SegmentNo, previous: SegmentHash) -> SegmentHeader {
        SegmentHeader {
            volume: self.volume,
            number,
            epoch: self.epoch,
            cut_at: self.cut_at,
            txg_first: self.first,
            previous,
        }
    }

    /// Closes the current segment; `commit` ends the txg, and nothing follows when it is the `last` one of the cut.
    fn close(&mut self, commit: Option<Lsn>, last: bool) -> Result<(), SealError> {
        let number = self.current.header().number;
        // The builder is replaced first; when finishing fails the whole draft is thrown away.
        let next = SegmentBuilder::new(self.header(number.next(), SegmentHash::default()));
        let (bytes, summary) = std::mem::replace(&mut self.current, next).finish(commit)?;
        self.done.push((number, summary));
        self.writers.write(number, bytes, last)?;
        if commit.is_some() {
            self.first = number.next();
        }
        self.begin(self.header(number.next(), summary.hash));
        Ok(())
    }

    fn begin(&mut self, header: SegmentHeader) {
        let content = match self.rest {
            rest if rest <= self.target + self.target / REST => rest,
            _ => self.target,
        };
        // An eighth for the index, and for the block that goes beyond the target.
        let expected = usize::try_from(content + content / 8).unwrap_or(0);
        self.current = SegmentBuilder::expecting(header, expected);
    }

    /// Whether the current segment is large enough.
    fn is_full(&self) -> bool {
        let size = self.current.size();
        size >= self.target && self.rest > self.target / REST || size >= self.target + self.target / REST
    }

    /// Whether the current segment, when it is closed, ends a group of content only.
    fn is_early(&self) -> bool {
        self.rest > self.target / REST && self.done.len() + 1 >= EARLY
    }

    /// The group that was closed with a commit: its segments, whose files are durable.
    fn split(&mut self) -> Result<Drafted, SealError> {
        self.writers.finish()?;
        Ok(std::mem::take(&mut self.done))
    }
}

impl Sealer {
    /// A sealer that goes on after `mark`, writing as `epoch`. `level` is zstd's (0: store raw).
    pub fn new(
        journal: Arc<Journal>,
        blocks: Arc<BlockStore>,
        staging: Arc<Staging>,
        volume: VolumeId,
        epoch: Epoch,
        level: i32,
        mark: SealedMark,
    ) -> Result<Self, SealError> {
        journal.release(mark.lsn);
        let preparer = Arc::new(Preparer::new(Arc::clone(&blocks), level)?);
        let last = journal.get(&segment_key(mark.segment))?.map(|v| SegmentValue::decode(&v)).transpose()?;
        Ok(Self {
            journal,
            blocks,
            staging,
            volume,
            epoch,
            preparer,
            target: SEGMENT_TARGET,
            remembered: mark.lsn,
            committed: last.map_or(Lsn(0), |v| v.commit),
            mark,
            unpublished: Vec::new(),
            lost: HashMap::new(),
            said: HashSet::new(),
            #[cfg(test)]
            dies: None,
        })
    }

    /// Closes segments at `target` bytes instead of [`SEGMENT_TARGET`]: for tests, which would have to write much otherwise.
    #[must_use]
    pub fn with_segments_of(self, target: u64) -> Self {
        Self { target, ..self }
    }

    /// How far the log is sealed.
    pub fn mark(&self) -> &SealedMark {
        &self.mark
    }

    /// Notes that a checkpoint as of segment `number` was staged.
    pub fn checkpointed(&mut self, number: SegmentNo) -> Result<(), SealError> {
        self.remember(SealedMark { checkpoint: number, log_bytes: 0, ..self.mark })?;
        Ok(())
    }

    fn remember(&mut self, mark: SealedMark) -> Result<Lsn, JournalError> {
        let (_, lsn) = self.journal.transact::<_, JournalError>(|tx| {
            tx.put(local_key(SEALED_MARK), mark.encode());
            Ok(())
        })?;
        self.mark = mark;
        self.remembered = mark.lsn;
        Ok(lsn)
    }

    /// Notes that there was nothing to ship up to `lsn`. The tail may only be cut behind a mark that the next start will
    /// find; writing one each time would never come to rest, so it is written once in many records.
    fn pass(&mut self, lsn: Lsn) -> Result<(), SealError> {
        self.mark.lsn = lsn;
        if lsn.0.saturating_sub(self.remembered.0) >= REMEMBER_STEP {
            let written = self.remember(self.mark)?;
            self.journal.barrier(written)?;
            self.journal.release(lsn);
        }
        Ok(())
    }

    /// The next group takes up lost blocks again, however short ago they were tried.
    pub fn try_lost_again(&mut self) {
        self.lost.values_mut().for_each(|tried| *tried = None);
    }

    /// Seals one cut, stages it, enters it into the tables and hands it to the shippers. Answers the txg's last segment,
    /// or `None` when nothing of it belongs on a replica.
    pub fn seal(&mut self, cut: &Cut, cut_at: Time) -> Result<Option<SegmentNo>, SealError> {
        self.publish()?;
        let staging = Arc::clone(&self.staging);
        let (result, done) = self.stage(cut, cut_at);
        let numbers: Vec<_> = done.iter().map(|(n, _)| (*n, self.epoch)).collect();
        let sealed = match result {
            Ok(Some(sealed)) => sealed,
            Ok(None) => {
                self.pass(cut.lsn)?;
                return Ok(None);
            }
            Err(e) => {
                staging.discard(&numbers);
                return Err(e);
            }
        };
        if let Err(e) = self.register_segments(&done, cut.lsn, cut_at) {
            staging.discard(&numbers);
            return Err(e);
        }
        // From here on these segments exist, whatever fails.
        self.lost.retain(|id, _| cut.frozen.iter().any(|b| b.id == *id && !b.is_dead()));
        self.register_blocks(&sealed)?;
        self.publish()?;
        Ok(Some(self.mark.segment))
    }

    /// Enters the blocks of registered segments into the tables.
    fn register_blocks(&mut self, sealed: &Sealed) -> Result<(), SealError> {
        if !sealed.lost.is_empty() {
            self.journal.transact::<_, StoreError>(|tx| self.blocks.register_lost(tx, &sealed.lost))?;
        }
        for (block, _) in &sealed.whole {
            self.lost.remove(&block.id);
        }
        self.lost.extend(sealed.lost.iter().map(|(id, _)| (*id, Some(Instant::now()))));
        self.blocks.counters.lost.store(self.lost.len() as u64, Ordering::Relaxed);
        for part in sealed.whole.chunks(REGISTER_STEP) {
            let (_, lsn) = self.journal.transact::<_, StoreError>(|tx| self.blocks.register(tx, part))?;
            self.blocks.after_register(lsn, part);
        }
        Ok(())
    }

    /// Makes the content that was put together so far a group of its own, which the replicas get while the rest is sealed.
    fn early(
        &mut self,
        draft: &mut Draft<'_, '_>,
        sealed: &mut Sealed,
        cut_at: Time,
    ) -> Result<(), SealError> {
        draft.close(Some(self.committed), false)?;
        let done = draft.split()?;
        self.passed(Step::Staged);
        let numbers: Vec<_> = done.iter().map(|(n, _)| (*n, self.epoch)).collect();
        // What came since that commit is in the tail still, and nobody needs more of it than a start would find.
        if let Err(e) = self.register_segments(&done, self.remembered, cut_at) {
            self.staging.discard(&numbers);
            return Err(e);
        }
        self.passed(Step::Registered);
        self.register_blocks(&std::mem::take(sealed))?;
        self.passed(Step::Entered);
        self.publish()?;
        self.passed(Step::Published);
        self.staging.pace();
        Ok(())
    }

    /// Tests end here what a crash would end.
    fn passed(&self, _step: Step) {
        #[cfg(test)]
        assert!(self.dies != Some(_step), "dies when {_step:?}");
    }

    /// Makes registered segments durable and hands them to the shippers.
    fn publish(&mut self) -> Result<(), SealError> {
        if !self.unpublished.is_empty() {
            self.journal.barrier(self.journal.last_lsn())?;
            self.journal.release(self.mark.lsn);
            self.staging.publish(&std::mem::take(&mut self.unpublished));
        }
        Ok(())
    }

    /// Writes the segments of a cut to the local disk, durably. They count for nothing before they are registered.
    fn stage(&mut self, cut: &Cut, cut_at: Time) -> (Result<Option<Sealed>, SealError>, Drafted) {
        let first = self.mark.segment.next();
        let staging = Arc::clone(&self.staging);
        let header = SegmentHeader {
            volume: self.volume,
            number: first,
            epoch: self.epoch,
            cut_at,
            txg_first: first,
            previous: SegmentHash(self.mark.blake3),
        };
        let preparer = Arc::clone(&self.preparer);
        thread::scope(|scope| {
            let mut draft = Draft {
                writers: Writers::new(scope, &staging, self.epoch),
                volume: self.volume,
                epoch: self.epoch,
                cut_at,
                target: self.target,
                first,
                current: SegmentBuilder::new(header),
                done: Vec::new(),
                rest: 0,
            };
            let filled = self.fill(&mut draft, cut, cut_at, &preparer);
            // Also after a failure: nobody writes any more when the files are removed.
            let written = draft.writers.finish().map_err(SealError::from);
            (filled.and_then(|sealed| written.map(|()| sealed)), draft.done)
        })
    }

    /// Writes frames, index and records. `None`: there was nothing.
    fn fill(
        &mut self,
        draft: &mut Draft<'_, '_>,
        cut: &Cut,
        cut_at: Time,
        preparer: &Preparer,
    ) -> Result<Option<Sealed>, SealError> {
        let mut sealed = Sealed::default();
        let mut fresh: HashMap<BlockHash, BlockEntry> = HashMap::new();
        let packed = Arc::default();
        // The replicas have the entries of lost ones without content already.
        let just_tried = |id| {
            let tried = self.lost.get(&id).copied().flatten();
            tried.is_some_and(|at| at.elapsed() < LOST_AGAIN)
        };
        // A group of content only, made when this cut was tried before, holds them.
        let wanted = cut.frozen.iter().filter(|b| !just_tried(b.id) && !b.is_sealed());
        let wanted: Vec<_> = wanted.cloned().collect();
        draft.rest = wanted.iter().map(|b| u64::from(b.len())).sum();
        draft.begin(*draft.current.header());
        thread::scope(|scope| {
            let mut batches = batches(wanted).into_iter();
            let mut start = || batches.next().map(|batch| preparer.start(scope, batch, &packed));
            let mut ready = start();
            while let Some(batch) = ready {
                let batch = batch.finish();
                // Prepared while these are written.
                ready = start();
                for (block, prepared) in batch {
                    draft.rest = draft.rest.saturating_sub(u64::from(block.len()));
                    self.append(draft, &block, prepared, preparer, &mut fresh, &mut sealed)?;
                    if !draft.is_full() {
                        continue;
                    }
                    // Without an earlier commit there is no state that could stay as it is.
                    match draft.is_early() && self.committed.0 > 0 {
                        true => self.early(draft, &mut sealed, cut_at)?,
                        false => draft.close(None, false)?,
                    }
                }
            }
            Ok::<_, SealError>(())
        })?;
        for record in self.journal.records(self.mark.lsn, cut.lsn)? {
            let record = record?;
            let ops: Vec<Op> = record.ops.into_iter().filter(is_shipped).collect();
            if !ops.is_empty() {
                draft.current.push(&Record { lsn: record.lsn, ops })?;
                if draft.is_full() {
                    draft.close(None, false)?;
                }
            }
        }
        if draft.done.is_empty() && draft.current.is_empty() {
            return Ok(None);
        }
        draft.close(Some(cut.lsn), true)?;
        Ok(Some(sealed))
    }

    /// Appends one block: its frame, when there is none of its content yet, and its entry.
    fn append(
        &mut self,
        draft: &mut Draft<'_, '_>,
        block: &Arc<DirtyBlock>,
        prepared: Result<Prepared, SealError>,
        preparer: &Preparer,
        fresh: &mut HashMap<BlockHash, BlockEntry>,
        sealed: &mut Sealed,
    ) -> Result<(), SealError> {
        let Prepared { raw, hash, known, packed } = match prepared {
            Ok(prepared) => prepared,
            Err(SealError::Store(StoreError::Fetch(e @ FetchError::Lost { .. }))) => {
                let Some(entry) = self.without_content(block, &e)? else {
                    return Err(StoreError::Fetch(e).into());
                };
                draft.current.push_index(block.id, entry)?;
                sealed.lost.push((block.id, entry));
                return Ok(());
            }
            Err(e) => return Err(e),
        };
        let entry = match fresh.get(&hash).copied().or(known) {
            Some(entry) => entry,
            None => {
                // Unpacked when another block of equal content, which stands behind this one, was packed.
                let packed = packed.map_or_else(|| preparer.pack(&raw), Ok)?;
                let entry = BlockEntry { hash, loc: draft.current.push_packed(&raw, &packed)? };
                fresh.insert(hash, entry);
                entry
            }
        };
        draft.current.push_index(block.id, entry)?;
        if !block.is_dead() {
            match self.blocks.fill(block, &raw) {
                // Then it is just not cached.
                Err(StoreError::Io(e)) if is_full(&e) => log::debug!("block {}: {e}", block.id),
                other => other?,
            }
        }
        sealed.whole.push((Arc::clone(block), entry));
        Ok(())
    }

    /// The entry of a block whose rest is lost; says so the first time.
    fn without_content(
        &mut self,
        block: &DirtyBlock,
        why: &FetchError,
    ) -> Result<Option<BlockEntry>, SealError> {
        let (base, len, known) = block.with(|c| (c.base, c.len, c.valid.bytes()));
        let Some(base) = base else { return Ok(None) };
        if self.said.insert(base.entry.hash) {
            let owner =
                self.blocks.owner(block.id)?.map_or("of no file now".into(), |i| format!("of inode {i}"));
            log::error!(
                "block {} {owner}: it was overwritten in part and the rest of it is lost: {why}. This machine keeps the {known} \
                 of {len} bytes that were written; the replicas get the block without content, and reading it there fails",
                block.id
            );
        }
        Ok(Some(BlockEntry::without_content(block.id, len, &base.entry)))
    }

    /// Makes the staged segments the volume's own, in one record. The blocks in them follow in later records; a crash in
    /// between leaves blocks dirty that are sealed already, and they are sealed once more.
    fn register_segments(
        &mut self,
        segments: &[(SegmentNo, SegmentSummary)],
        upto: Lsn,
        cut_at: Time,
    ) -> Result<(), SealError> {
        let cut_at = cut_at.secs as f64 + f64::from(cut_at.nanos) / 1e9;
        let values: Vec<(SegmentNo, SegmentValue)> = segments
            .iter()
            .map(|(number, s)| {
                let commit = s.footer.commit.unwrap_or_default();
                let v =
                    SegmentValue { epoch: self.epoch, len: s.len, blake3: s.hash.0, commit, cut_at, live: 0 };
                (*number, v)
            })
            .collect();
        let log_bytes: u64 = segments.iter().map(|(_, s)| s.footer.records_len + s.footer.index_len).sum();
        let (number, hash) =
            values.last().map_or((self.mark.segment, self.mark.blake3), |(n, v)| (*n, v.blake3));
        let mark = SealedMark {
            lsn: upto,
            segment: number,
            blake3: hash,
            checkpoint: self.mark.checkpoint,
            log_bytes: self.mark.log_bytes + log_bytes,
        };
        self.journal.transact::<_, JournalError>(|tx| {
            for (number, value) in &values {
                tx.put(segment_key(*number), value.encode());
            }
            tx.put(local_key(SEALED_MARK), mark.encode());
            Ok(())
        })?;
        self.mark = mark;
        self.remembered = mark.lsn;
        self.committed = values.last().map_or(self.committed, |(_, v)| v.commit);
        self.unpublished.extend(values);
        Ok(())
    }
}

/// Whether an operation of a record is part of the log that replicas get. Block entries are put by the index.
fn is_shipped(op: &Op) -> bool {
    match op {
        Op::Put { key, .. } => is_replicated(key) && key.first() != Some(&table::BLOCK),
        Op::Delete { key } => is_replicated(key),
    }
}
