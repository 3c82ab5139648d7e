//! Bringing the volume's tables back into a local journal, from replicas (and from what a damaged state still has).
//!
//! Owns the local tables that go with a restored state: segments, frames, the sealed mark. The restore proper is
//! `crate::restore`.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Instant;

use super::Error;
use crate::cache::store::NEXT_BLOCK;
use crate::exit::Exit;
use crate::format::local::{FrameValue, SEALED_MARK, SealedMark, SegmentValue};
use crate::format::record::{Op, Record};
use crate::format::tables::{
    BlockEntry, FileKind, Inode, block_key, dirty_key, frame_key, inode_key, local_key, number_of_key,
    orphan_key, prefix_range, segment_key, table, volume_key,
};
use crate::format::volume::Claim;
use crate::ids::{BlockHash, BlockId, Epoch, Ino, Lsn, ReplicaName, SegmentNo};
use crate::journal::{Journal, JournalError};
use crate::replica::Store;
use crate::restore::{self, Inventory, LoadError, Loaded, Plan, PlanError, SurveyError, Tables, Trust};
use crate::vfs::NEXT_INO;

/// A volume's tables as replicas hold them.
pub(super) struct Restored {
    pub loaded: Loaded,
    pub tables: Tables,
    /// Per replica the segment up to which it holds everything, by its listing.
    pub cursors: BTreeMap<ReplicaName, SegmentNo>,
    /// The claims that count, by ascending epoch.
    pub claims: Vec<Claim>,
    /// Claims that do not count, and the replicas that hold them.
    pub contests: Vec<(ReplicaName, Claim)>,
    /// All segments that the replicas listed.
    pub listed: BTreeSet<(SegmentNo, Epoch)>,
}

impl From<LoadError> for Error {
    fn from(e: LoadError) -> Self {
        let exit = match &e {
            LoadError::Unavailable { .. } => Exit::Unreachable,
            LoadError::Newer { .. } => Exit::TooNew,
            LoadError::Nothing(_) => Exit::Damaged,
            LoadError::Sink(_) => Exit::Failure,
        };
        Error::new(exit, e.to_string())
    }
}

impl From<PlanError> for Error {
    fn from(e: PlanError) -> Self {
        let exit = match &e {
            PlanError::NoReplica(_) => Exit::Unreachable,
            PlanError::Mixed(_) => Exit::WrongVolume,
            PlanError::NoVolume(_) | PlanError::Broken(_) => Exit::Damaged,
        };
        Error::new(exit, e.to_string())
    }
}

/// Reads the volume's tables from `stores`, unless `permit` refuses by what they list. `own` are claims that this state folder made.
pub(super) async fn fetch(
    stores: &[Store],
    own: &[Claim],
    trust: &Trust,
    permit: impl FnOnce(&[Inventory], &Plan) -> Result<(), Error>,
) -> Result<Restored, Error> {
    let inventories = restore::survey(stores).await;
    let mut plan = restore::plan_by(&inventories, None, own, trust)?;
    let anchor = restore::anchor(&mut plan, stores, trust).await;
    permit(&inventories, &plan)?;
    let mut tables = Tables::default();
    let began = Instant::now();
    let mut loaded = restore::load_through(&plan, anchor, stores, &mut tables).await?;
    refuse_flaws(&mut loaded)?;
    log::debug!("{} entries read from the replicas in {:.3?}", tables.len(), began.elapsed());
    let cursors = stores
        .iter()
        .enumerate()
        .map(|(i, store)| (store.name().clone(), contiguous(&plan, &loaded, i)))
        .collect();
    let listed = listed_in(&inventories);
    let claims = plan.claims.values().cloned().collect();
    let contests = plan.disbelieved.iter().map(|(i, claim)| (plan.replicas[*i].clone(), claim.clone()));
    let contests = contests.collect();
    Ok(Restored { loaded, tables, cursors, claims, contests, listed })
}

/// Refuses tables with which a mount could destroy something or never end; warns of other
/// contradictions.
fn refuse_flaws(loaded: &mut Loaded) -> Result<(), Error> {
    let Some(flaw) = loaded.flaws.first() else { return Ok(()) };
    let (flaw, more) = (flaw.clone(), loaded.flaws.len() - 1);
    let more = if more > 0 { format!(" (and {more} more)") } else { String::new() };
    if flaw.fatal {
        return Err(Error::new(
            Exit::Damaged,
            format!(
                "the tables that the replicas hold as of segment {} contradict themselves: {flaw}{more}. They are not mounted. \
                 Look at each replica with mirrorfs fsck --replica NAME, leave out one that holds other tables than the rest, \
                 or copy the files out with mirrorfs restore",
                loaded.last_segment
            ),
        ));
    }
    loaded.warnings.push(format!("the tables contradict themselves: {flaw}{more}: run mirrorfs fsck"));
    Ok(())
}

/// Refuses local tables that would let new files overwrite others, or whose root cannot be one.
/// Costs a few lookups.
pub(super) fn check_local(journal: &Journal) -> Result<(), Error> {
    let last = |table: u8| -> Result<u64, JournalError> {
        let (start, end) = prefix_range(&[table]);
        let last = journal.last_in(&start, &end)?;
        Ok(last.and_then(|(key, _)| number_of_key(&key)).unwrap_or(0))
    };
    let inodes = last(table::INODE)?;
    if inodes == 0 {
        return Ok(());
    }
    let root = journal.get(&inode_key(Ino::ROOT))?.map(|v| Inode::decode(&v));
    let mut why = match root {
        Some(Ok(root)) if root.kind == FileKind::Directory => None,
        _ => Some("the root directory (inode 1) is missing, or is no directory".to_owned()),
    };
    if journal.get(&orphan_key(Ino::ROOT))?.is_some() {
        why = Some("the root directory is marked as deleted".to_owned());
    }
    let blocks = last(table::BLOCK)?.max(last(table::DIRTY)?);
    let inodes = inodes.max(last(table::ORPHAN)?);
    // Without a counter none but the root was made yet.
    for (name, what, used, first) in [(NEXT_INO, "inode", inodes, 2), (NEXT_BLOCK, "block", blocks, 1)] {
        let next = journal.get(&volume_key(name))?;
        let next = next.map_or(Some(first), |v| v[..].try_into().ok().map(u64::from_le_bytes));
        why = why.or_else(|| restore::wrong_counter(next, used, what));
    }
    match why {
        None => Ok(()),
        Some(why) => Err(Error::new(
            Exit::Damaged,
            format!(
                "the local tables cannot be used: {why}. mirrorfs fsck says what else is wrong, and mirrorfs fsck --repair corrects it"
            ),
        )),
    }
}

fn listed_in(inventories: &[Inventory]) -> BTreeSet<(SegmentNo, Epoch)> {
    inventories
        .iter()
        .filter_map(|i| i.found.as_ref().ok())
        .flat_map(|f| f.segments.keys().copied())
        .collect()
}

/// All segments that `stores` list now, and those that do not answer.
pub(super) async fn listed(stores: &[Store]) -> (BTreeSet<(SegmentNo, Epoch)>, Vec<ReplicaName>) {
    let inventories = restore::survey(stores).await;
    let silent = inventories.iter().filter(|i| matches!(i.found, Err(SurveyError::Unreachable(_))));
    (listed_in(&inventories), silent.map(|i| i.replica.clone()).collect())
}

/// The segment up to which replica `index` holds everything in its right size.
fn contiguous(plan: &Plan, loaded: &Loaded, index: usize) -> SegmentNo {
    let mut upto = SegmentNo(0);
    for seen in &loaded.segments {
        let holds = plan.segments.get(&seen.number).is_some_and(|place| {
            place.epoch == seen.epoch && place.holders.iter().any(|(i, len)| *i == index && *len == seen.len)
        });
        if seen.number != upto.next() || !holds {
            break;
        }
        upto = seen.number;
    }
    upto
}

/// The mark with which sealing goes on.
pub(super) fn mark_of(loaded: &Loaded) -> SealedMark {
    SealedMark {
        lsn: loaded.commit_lsn,
        segment: loaded.last_segment,
        blake3: loaded.last_hash.0,
        checkpoint: loaded.checkpoint.map_or(SegmentNo(0), |(n, _)| n),
        log_bytes: 0,
    }
}

/// Loads the restored tables, and the local ones that go with them, into a fresh journal; they are taken out of `restored`, so that they
/// do not lie in memory twice.
pub(super) fn import(journal: &Journal, restored: &mut Restored) -> Result<(), Error> {
    let mut local = local_tables(restored)?;
    local.push(Op::put(local_key(SEALED_MARK), mark_of(&restored.loaded).encode()));
    // An import is fast where keys ascend.
    local.sort_unstable_by(|a, b| a.key().cmp(b.key()));
    let tables = std::mem::take(&mut restored.tables);
    let (began, count) = (Instant::now(), tables.len());
    let replicated = tables.into_entries().map(|(key, value)| Ok(Op::Put { key, value }));
    journal.import(restored.loaded.commit_lsn, &mut replicated.chain(local.into_iter().map(Ok)))?;
    log::debug!("{count} entries put into the local tables in {:.3?}", began.elapsed());
    Ok(())
}

/// Takes those blocks out of the log that a last group brought and nobody came to name (`Loaded::unnamed`), unless they are known here:
/// else whoever reads the log later would find them. Their numbers are not given again.
pub(super) fn forget_unnamed(journal: &Journal, unnamed: &[BlockId]) -> Result<(), Error> {
    let Some(highest) = unnamed.iter().max() else { return Ok(()) };
    let (_, lsn) = journal.transact::<_, JournalError>(|tx| {
        for id in unnamed {
            if tx.get(&block_key(*id))?.is_none() && tx.get(&dirty_key(*id))?.is_none() {
                tx.delete(block_key(*id));
            }
        }
        let key = volume_key(NEXT_BLOCK);
        let next = tx.get(&key)?.and_then(|v| v[..].try_into().ok()).map_or(1, u64::from_le_bytes);
        if next <= highest.0 {
            tx.put(key, highest.next().0.to_le_bytes().to_vec());
        }
        Ok(())
    })?;
    Ok(journal.barrier(lsn)?)
}

/// Segment and frame tables, derived: what the restore saw of each segment, and how many blocks use each frame.
fn local_tables(restored: &Restored) -> Result<Vec<Op>, Error> {
    let (start, end) = prefix_range(&[table::BLOCK]);
    let blocks = restored.tables.range(start, end).map(|(_, value)| {
        BlockEntry::decode(value).map_err(|e| Error::new(Exit::Damaged, format!("restored tables: {e}")))
    });
    let frames = frames(blocks)?;
    let mut live: HashMap<SegmentNo, u64> = HashMap::new();
    for frame in frames.values() {
        *live.entry(frame.entry.loc.segment).or_default() += u64::from(frame.entry.loc.stored_len);
    }
    let segments = restored.loaded.segments.iter().map(|s| {
        let value = SegmentValue {
            epoch: s.epoch,
            len: s.len,
            blake3: s.hash.unwrap_or_default().0,
            commit: s.commit.unwrap_or_default(),
            cut_at: s.cut_at.map_or(0.0, |t| t.secs as f64 + f64::from(t.nanos) / 1e9),
            live: live.get(&s.number).copied().unwrap_or(0),
        };
        Op::put(segment_key(s.number), value.encode())
    });
    let frames = frames.iter().map(|(hash, value)| Op::put(frame_key(hash), value.encode()));
    Ok(segments.chain(frames).collect())
}

/// The frames that blocks use. One without content uses none: what lies at its place is another block's, and damaged.
fn frames(
    blocks: impl Iterator<Item = Result<BlockEntry, Error>>,
) -> Result<HashMap<BlockHash, FrameValue>, Error> {
    let mut frames: HashMap<BlockHash, FrameValue> = HashMap::new();
    for entry in blocks {
        let entry = entry?;
        if !entry.is_without_content() {
            frames.entry(entry.hash).or_insert(FrameValue { entry, uses: 0 }).uses += 1;
        }
    }
    Ok(frames)
}

/// Applies records that a damaged state's tail still had, behind what the replicas gave. They must follow without a gap.
pub(super) fn reapply(journal: &Arc<Journal>, records: Vec<Record>, after: Lsn) -> Result<u64, Error> {
    let mut applied = 0;
    let mut expected = after.next();
    for record in records.into_iter().filter(|r| r.lsn > after) {
        if record.lsn != expected {
            return Err(Error::new(
                Exit::Damaged,
                format!(
                    "the local tail goes on with record {} but the replicas end before record {expected}: attach the \
                     replica that has what lies between",
                    record.lsn
                ),
            ));
        }
        let (_, lsn) = journal.transact::<_, JournalError>(|tx| {
            for op in record.ops {
                match op {
                    Op::Put { key, value } => tx.put(key, value),
                    Op::Delete { key } => tx.delete(key),
                }
            }
            Ok(())
        })?;
        if lsn != expected {
            return Err(Error::new(Exit::Failure, format!("record {expected} was given number {lsn}")));
        }
        expected = expected.next();
        applied += 1;
    }
    journal.barrier(journal.last_lsn())?;
    Ok(applied)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::tables::FrameLoc;

    #[test]
    fn blocks_that_nobody_came_to_name_are_taken_out_of_the_log() {
        let dir = tempfile::tempdir().unwrap();
        let (journal, _) =
            Journal::open(crate::journal::Options::new(dir.path(), Arc::new(|_| Ok(())))).unwrap();
        let next = || journal.get(&volume_key(NEXT_BLOCK)).unwrap().map(|v| v.to_vec());
        forget_unnamed(&journal, &[]).unwrap();
        assert_eq!((journal.last_lsn(), next()), (Lsn(0), None));
        // Of a rebuild: the tail knew the first as sealed and the second as waiting.
        let (_, before) = journal
            .transact::<_, JournalError>(|tx| {
                tx.put(block_key(BlockId(7)), b"sealed".to_vec());
                tx.put(dirty_key(BlockId(8)), b"waits".to_vec());
                Ok(())
            })
            .unwrap();
        forget_unnamed(&journal, &[7, 8, 20, 9].map(BlockId)).unwrap();
        let record = journal.records(before, journal.last_lsn()).unwrap().next().unwrap().unwrap();
        for id in [9, 20] {
            assert!(record.ops.contains(&Op::Delete { key: block_key(BlockId(id)) }), "{:?}", record.ops);
        }
        assert_eq!(record.ops.len(), 3);
        assert_eq!(next(), Some(21u64.to_le_bytes().to_vec()));
        forget_unnamed(&journal, &[BlockId(3)]).unwrap();
        assert_eq!(next(), Some(21u64.to_le_bytes().to_vec()), "never lower");
    }

    #[test]
    fn local_tables_that_would_overwrite_something_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let (journal, _) =
            Journal::open(crate::journal::Options::new(dir.path(), Arc::new(|_| Ok(())))).unwrap();
        let put = |key: bytes::Bytes, value: Vec<u8>| {
            journal
                .transact::<_, JournalError>(|tx| {
                    tx.put(key.clone(), value.clone());
                    Ok(())
                })
                .unwrap();
        };
        let next = |name, next: u64| put(volume_key(name), next.to_le_bytes().to_vec());
        let says = |text: &str| {
            let e = check_local(&journal).unwrap_err();
            assert_eq!(e.exit_code(), Exit::Damaged);
            assert!(e.to_string().contains(text) && e.to_string().contains("mirrorfs fsck"), "{e}");
        };
        check_local(&journal).unwrap();
        let file = Inode::new(FileKind::Regular, 0o644, (0, 0), Default::default());
        // A new volume, whose machine dies before anything is made in it.
        let root = Inode { parent: Ino::ROOT, kind: FileKind::Directory, ..file.clone() };
        put(inode_key(Ino(1)), root.encode().to_vec());
        check_local(&journal).unwrap();
        put(inode_key(Ino(1)), file.encode().to_vec());
        put(inode_key(Ino(7)), file.encode().to_vec());
        next(NEXT_INO, 8);
        next(NEXT_BLOCK, 1);
        says("the root directory");
        put(inode_key(Ino(1)), root.encode().to_vec());
        check_local(&journal).unwrap();
        next(NEXT_INO, 7);
        says("the next inode would get number 7");
        next(NEXT_INO, u64::MAX - 3);
        says("there are none from");
        next(NEXT_INO, 8);
        put(dirty_key(BlockId(1)), vec![]);
        says("the next block would get number 1");
        next(NEXT_BLOCK, 2);
        check_local(&journal).unwrap();
        put(orphan_key(Ino(1)), vec![]);
        says("marked as deleted");
    }

    #[test]
    fn a_block_without_content_uses_no_frame() {
        let loc = FrameLoc {
            segment: SegmentNo(1),
            epoch: Epoch(1),
            offset: 9,
            stored_len: 10,
            raw_len: 100,
            codec: 1,
        };
        let whole = BlockEntry { hash: BlockHash([7; 32]), loc };
        let without = BlockEntry::without_content(BlockId(5), 100, &whole);
        let frames = frames([whole, without, whole].into_iter().map(Ok)).unwrap();
        assert_eq!(
            frames.into_iter().collect::<Vec<_>>(),
            [(whole.hash, FrameValue { entry: whole, uses: 2 })]
        );
    }
}
