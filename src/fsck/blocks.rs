//! Blocks: where each lies, who uses it, and what is counted of that.
//!
//! Owns the rules of the tables block, block references, dirty, frame, segment, cached, and of the sealed mark.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use super::types::{Findings, Fix, Kind};
use super::{Input, Stop, number_of};
use crate::cache::dirty::DirtyValue;
use crate::cache::store::NEXT_BLOCK;
use crate::format::local::{CachedValue, FrameValue, SEALED_MARK, SealedMark, SegmentValue};
use crate::format::tables::{BlockEntry, local_key, table, volume_key};
use crate::ids::{BlockHash, BlockId, SegmentNo};

/// The place of its frame cannot be.
const MISPLACED: u8 = 1;
/// Its row cannot be read.
const UNREADABLE: u8 = 2;

/// One block.
struct Node {
    id: u64,
    len: u32,
    uses: u32,
    flags: u8,
}

/// All blocks, in the order of their numbers.
pub(super) struct Blocks {
    nodes: Vec<Node>,
    pub segments: BTreeMap<SegmentNo, SegmentValue>,
    /// Beginnings of the hashes of sealed blocks, one for each block.
    hashes: Vec<u128>,
}

/// What is known of a block that a file names.
pub(super) enum Look {
    /// Its length.
    Known(u32),
    /// It is in no table.
    Nowhere,
    /// Its row cannot be read, which was said.
    Unreadable,
    /// Its frame lies at a place that cannot be; with its length.
    Misplaced(u32),
}

fn prefix(hash: &[u8]) -> u128 {
    let mut first = [0; 16];
    let n = hash.len().min(16);
    first[..n].copy_from_slice(&hash[..n]);
    u128::from_be_bytes(first)
}

impl Blocks {
    /// Reads the tables of blocks, and checks what can be without files.
    pub fn read(input: &Input<'_>, findings: &mut Findings) -> Result<Self, Stop> {
        let mut blocks = Self { nodes: Vec::new(), segments: BTreeMap::new(), hashes: Vec::new() };
        match input.segments {
            Some(segments) => blocks.segments = segments.clone(),
            None => blocks.read_segments(input, findings)?,
        }
        blocks.read_nodes(input, findings)?;
        if input.is_local() {
            let live = blocks.check_frames(input, findings)?;
            blocks.check_live(&live, findings);
        }
        Ok(blocks)
    }

    fn read_segments(&mut self, input: &Input<'_>, findings: &mut Findings) -> Result<(), Stop> {
        let mut rows = input.rows(table::SEGMENT);
        let mut before: Option<SegmentValue> = None;
        while let Some((key, value)) = rows.next()? {
            let number = SegmentNo(number_of(&key));
            let value = match SegmentValue::decode(&value) {
                Ok(value) => value,
                Err(e) => {
                    findings.about(Kind::Unreadable, None, || format!("segment {number}: {e}"));
                    continue;
                }
            };
            let newest = self.segments.values().map(|v| v.commit).max().unwrap_or_default();
            if before.is_some_and(|b| b.epoch > value.epoch) {
                findings.about(Kind::SegmentOrder, None, || {
                    format!("segment {number} is of epoch {}, older than the one before it", value.epoch)
                });
            }
            if value.commit.0 != 0 && value.commit < newest {
                findings.about(Kind::SegmentOrder, None, || {
                    format!("segment {number} commits change {}, but an earlier one {newest}", value.commit)
                });
            }
            before = Some(value);
            self.segments.insert(number, value);
        }
        self.check_mark(input, findings)
    }

    fn check_mark(&self, input: &Input<'_>, findings: &mut Findings) -> Result<(), Stop> {
        let mark = match input.source.get(&local_key(SEALED_MARK))?.map(|v| SealedMark::decode(&v)) {
            None => SealedMark::default(),
            Some(Ok(mark)) => mark,
            Some(Err(e)) => {
                findings.about(Kind::SealedMark, None, || format!("the sealed mark cannot be read: {e}"));
                return Ok(());
            }
        };
        let newest = self.segments.last_key_value();
        if newest.map_or(SegmentNo(0), |(n, _)| *n) != mark.segment {
            findings.about(Kind::SealedMark, None, || {
                let newest = newest.map_or(0, |(n, _)| n.0);
                format!(
                    "the log is sealed up to segment {}, but the newest segment is {newest}",
                    mark.segment
                )
            });
        } else if let Some((number, value)) = newest {
            if value.blake3 != mark.blake3 {
                findings.about(Kind::SealedMark, None, || {
                    format!("the sealed mark has another hash of segment {number} than the segment table")
                });
            }
            if value.commit > mark.lsn {
                findings.about(Kind::SealedMark, None, || {
                    format!(
                        "segment {number} ends with change {}, the sealed mark is at {}",
                        value.commit, mark.lsn
                    )
                });
            }
        }
        if input.last_lsn.is_some_and(|last| mark.lsn > last) {
            findings.about(Kind::SealedMark, None, || {
                format!("the log is sealed up to change {}, which is yet to come", mark.lsn)
            });
        }
        Ok(())
    }

    /// Why a frame cannot lie there.
    fn misplaced(&self, entry: &BlockEntry) -> Option<String> {
        let loc = &entry.loc;
        let Some(segment) = self.segments.get(&loc.segment) else {
            return Some(format!("it should lie in segment {}, which is not known", loc.segment));
        };
        if segment.epoch != loc.epoch {
            let (is, says) = (segment.epoch, loc.epoch);
            return Some(format!(
                "it should lie in segment {} of epoch {says}, but that is of epoch {is}",
                loc.segment
            ));
        }
        let end = loc.offset.saturating_add(u64::from(loc.stored_len));
        // A length of 0 was never told.
        (end > segment.len && segment.len != 0).then(|| {
            format!("it should end at byte {end} of segment {}, which has {}", loc.segment, segment.len)
        })
    }

    fn read_nodes(&mut self, input: &Input<'_>, findings: &mut Findings) -> Result<(), Stop> {
        let mut sealed = input.rows(table::BLOCK);
        let mut dirty = input.rows(table::DIRTY);
        let mut slots: HashMap<u32, u64> = HashMap::new();
        loop {
            let id = match (sealed.peek_number()?, if input.is_local() { dirty.peek_number()? } else { None })
            {
                (None, None) => break,
                (Some(a), Some(b)) => a.min(b),
                (Some(n), None) | (None, Some(n)) => n,
            };
            let mut node = Node { id, len: 0, uses: 0, flags: 0 };
            let mut whole = false;
            if let Some((_, value)) = sealed.next_of(id)? {
                self.sealed(&value, &mut node, &mut whole, input.block_size, findings);
            }
            if input.is_local()
                && let Some((_, value)) = dirty.next_of(id)?
            {
                if whole {
                    findings.about(Kind::BlockTwice, None, || {
                        format!(
                            "block {id} waits to be sealed, and is sealed already; what waits is what is read"
                        )
                    });
                }
                node.flags &= !MISPLACED;
                self.dirty(&value, &mut node, &mut slots, input, findings);
            }
            self.nodes.push(node);
        }
        self.hashes.sort_unstable();
        let least = self.nodes.last().map_or(0, |n| n.id.saturating_add(1));
        super::inodes::check_next(input, NEXT_BLOCK, "block", least, 1, findings)
    }

    fn sealed(
        &mut self,
        value: &[u8],
        node: &mut Node,
        whole: &mut bool,
        most: u32,
        findings: &mut Findings,
    ) {
        match BlockEntry::decode(value) {
            Ok(entry) => {
                node.len = entry.loc.raw_len;
                *whole = !entry.is_without_content();
                if *whole {
                    self.hashes.push(prefix(&entry.hash.0));
                    if self.misplaced(&entry).is_some() {
                        node.flags |= MISPLACED;
                    }
                }
                if node.len == 0 || node.len > most {
                    findings.about(Kind::BlockLength, None, || {
                        format!("block {} has {} bytes; a block has 1 to {most}", node.id, node.len)
                    });
                }
            }
            Err(e) => {
                node.flags |= UNREADABLE;
                findings.about(Kind::Unreadable, None, || format!("block {}: {e}", node.id));
            }
        }
    }

    fn dirty(
        &self,
        value: &[u8],
        node: &mut Node,
        slots: &mut HashMap<u32, u64>,
        input: &Input<'_>,
        findings: &mut Findings,
    ) {
        let id = node.id;
        let value = match DirtyValue::decode(value, input.block_size) {
            Ok(value) => value,
            Err(e) => {
                node.flags |= UNREADABLE;
                findings
                    .about(Kind::DirtyBlock, None, || format!("block {id}, which waits to be sealed: {e}"));
                return;
            }
        };
        node.len = value.len;
        let end = value.valid.iter().map(|r| r.1).max().unwrap_or(0);
        if end > value.len {
            findings.about(Kind::DirtyBlock, None, || {
                format!("block {id} has {} bytes, but {end} of its slot are said to be valid", value.len)
            });
        }
        if let Some(why) = value.base.and_then(|base| self.misplaced(&base.entry)) {
            findings.about(Kind::BlockPlace, None, || {
                format!("the block below block {id} is not to be had: {why}")
            });
        }
        if let Some(other) = slots.insert(value.slot, id) {
            findings.about(Kind::SlotTwice, None, || {
                format!(
                    "blocks {other} and {id} lie in the same slot {}: one has the other's content",
                    value.slot
                )
            });
        }
        let at = u64::from(value.slot) * u64::from(input.block_size) + u64::from(end);
        if end > 0 && input.slots_len.is_some_and(|len| len < at) {
            findings.about(Kind::SlotBeyondEnd, None, || {
                format!(
                    "block {id} lies in slot {}, beyond the end of the slot file: its content is gone",
                    value.slot
                )
            });
        }
    }

    /// Compares the frame table with the blocks; gives the live bytes of each segment.
    fn check_frames(
        &mut self,
        input: &Input<'_>,
        findings: &mut Findings,
    ) -> Result<BTreeMap<SegmentNo, u64>, Stop> {
        let mut live: BTreeMap<SegmentNo, u64> = BTreeMap::new();
        let hashes = std::mem::take(&mut self.hashes);
        let mut users = hashes.chunk_by(|a, b| a == b).peekable();
        let mut missing: BTreeMap<u128, u64> = BTreeMap::new();
        let mut rows = input.rows(table::FRAME);
        while let Some((key, value)) = rows.next()? {
            let at = prefix(&key[1..]);
            while let Some(group) = users.next_if(|g| g.first().is_some_and(|h| *h < at)) {
                missing.insert(group[0], group.len() as u64);
            }
            let counted = users.next_if(|g| g.first() == Some(&at)).map_or(0, |g| g.len() as u64);
            let frame = match FrameValue::decode(&value) {
                Ok(frame) if frame.entry.hash.0[..] == key[1..] => frame,
                other => {
                    let why = other.map_or_else(|e| e.to_string(), |_| "it names another hash".to_owned());
                    findings.about(Kind::Unreadable, Some(Fix::DeleteRow { key: key.clone() }), || {
                        format!("a frame's row: {why}")
                    });
                    continue;
                }
            };
            let loc = &frame.entry.loc;
            if counted > 0 {
                *live.entry(loc.segment).or_default() += u64::from(loc.stored_len);
            }
            if counted != frame.uses {
                let fix = Fix::SetFrame { hash: frame.entry.hash, entry: None, uses: counted };
                findings.about(Kind::FrameUses, Some(fix), || {
                    let place = format!("frame at byte {} of segment {}", loc.offset, loc.segment);
                    format!("{place}: {} uses are counted, but {counted} blocks use it", frame.uses)
                });
            }
        }
        missing.extend(users.map(|g| (g[0], g.len() as u64)));
        if !missing.is_empty() {
            self.missing_frames(input, &missing, &mut live, findings)?;
        }
        Ok(live)
    }

    fn missing_frames(
        &self,
        input: &Input<'_>,
        missing: &BTreeMap<u128, u64>,
        live: &mut BTreeMap<SegmentNo, u64>,
        findings: &mut Findings,
    ) -> Result<(), Stop> {
        let mut met = BTreeSet::new();
        let mut rows = input.rows(table::BLOCK);
        while let Some((key, value)) = rows.next()? {
            let Ok(entry) = BlockEntry::decode(&value) else { continue };
            let at = prefix(&entry.hash.0);
            let Some(uses) = missing.get(&at).filter(|_| !entry.is_without_content() && met.insert(at))
            else {
                continue;
            };
            *live.entry(entry.loc.segment).or_default() += u64::from(entry.loc.stored_len);
            let fix = Fix::SetFrame { hash: entry.hash, entry: Some(Box::new(entry)), uses: *uses };
            findings.about(Kind::FrameUses, Some(fix), || {
                format!(
                    "the frame of block {} is not in the table of frames; {uses} blocks use it",
                    number_of(&key)
                )
            });
        }
        Ok(())
    }

    fn check_live(&self, live: &BTreeMap<SegmentNo, u64>, findings: &mut Findings) {
        for (number, value) in &self.segments {
            let counted = live.get(number).copied().unwrap_or(0);
            if counted != value.live {
                let fix = Fix::SetLive { segment: *number, live: counted };
                findings.about(Kind::SegmentLive, Some(fix), || {
                    format!("segment {number}: {} bytes in use are counted, but it is {counted}", value.live)
                });
            }
        }
    }

    pub fn len(&self) -> u64 {
        self.nodes.len() as u64
    }

    /// One more reference to a block; what is known of it.
    pub fn used(&mut self, id: BlockId) -> Look {
        match self.nodes.binary_search_by_key(&id.0, |n| n.id) {
            Ok(i) => {
                let node = &mut self.nodes[i];
                node.uses = node.uses.saturating_add(1);
                match node.flags {
                    0 => Look::Known(node.len),
                    f if f & UNREADABLE != 0 => Look::Unreadable,
                    _ => Look::Misplaced(node.len),
                }
            }
            Err(_) => Look::Nowhere,
        }
    }

    /// Why the frame of a block cannot be where its row says.
    pub fn why_misplaced(&self, input: &Input<'_>, id: BlockId) -> Result<String, Stop> {
        let value = input.source.get(&crate::format::tables::block_key(id))?;
        let entry = value.and_then(|v| BlockEntry::decode(&v).ok());
        Ok(entry.and_then(|e| self.misplaced(&e)).unwrap_or_else(|| "its place is not known".to_owned()))
    }

    /// Compares the counted references with the table, behind all files.
    pub fn check_uses(&self, input: &Input<'_>, findings: &mut Findings) -> Result<(), Stop> {
        let mut rows = input.rows(table::BLOCK_REFS);
        for node in &self.nodes {
            while let Some(other) = rows.peek_number()?.filter(|n| *n < node.id) {
                let row = rows.next_of(other)?;
                if let Some((key, _)) = row {
                    findings.about(Kind::BlockReferences, Some(Fix::DeleteRow { key }), || {
                        format!("references of block {other} are counted, which is not there")
                    });
                }
            }
            let stored = rows.next_of(node.id)?.map(|(_, v)| v[..].try_into().map_or(0, u64::from_le_bytes));
            self.check_node(node, stored, findings);
        }
        while let Some((key, _)) = rows.next()? {
            let id = number_of(&key);
            findings.about(Kind::BlockReferences, Some(Fix::DeleteRow { key }), || {
                format!("references of block {id} are counted, which is not there")
            });
        }
        if input.is_local() { check_cached(input, findings) } else { Ok(()) }
    }

    fn check_node(&self, node: &Node, stored: Option<u64>, findings: &mut Findings) {
        let id = node.id;
        if node.uses == 0 {
            let fix = (node.flags & UNREADABLE == 0)
                .then_some(Fix::AdoptBlock { block: BlockId(id), len: node.len });
            findings.about(Kind::BlockUnused, fix, || {
                format!("block {id} ({} bytes of some file's content) belongs to no file", node.len)
            });
            return;
        }
        let (counted, more) = (u64::from(node.uses), stored.unwrap_or(0));
        // Without a row there is one; a row says how many more.
        if counted != more.saturating_add(1) || stored == Some(0) {
            let fix = Fix::SetReferences { block: BlockId(id), references: counted };
            findings.about(Kind::BlockReferences, Some(fix), || {
                format!(
                    "block {id}: {} references are counted, but {counted} places name it",
                    more.saturating_add(1)
                )
            });
        }
    }
}

/// Slots that the cache's table gives twice, or that hold what waits to be sealed: it was behind when a daemon was killed.
fn check_cached(input: &Input<'_>, findings: &mut Findings) -> Result<(), Stop> {
    let mut taken: HashMap<u32, bool> = HashMap::new();
    let mut rows = input.rows(table::DIRTY);
    while let Some((_, value)) = rows.next()? {
        if let Ok(value) = DirtyValue::decode(&value, input.block_size) {
            taken.insert(value.slot, true);
        }
    }
    let mut rows = input.rows(table::CACHED);
    while let Some((key, value)) = rows.next()? {
        let fix = Some(Fix::DeleteRow { key: key.clone() });
        let hash = <[u8; 32]>::try_from(&key[1..]).map(BlockHash);
        match (CachedValue::decode(&value), hash) {
            (Ok(value), Ok(hash)) => {
                if let Some(dirty) = taken.insert(value.slot, false) {
                    findings.about(Kind::CachedSlot, fix, || {
                        let whose =
                            if dirty { "a block that waits to be sealed" } else { "another cached block" };
                        format!("cached block {hash} is said to lie in slot {}, as {whose} does", value.slot)
                    });
                } else if value.len > input.block_size {
                    findings.about(Kind::CachedSlot, fix, || {
                        format!("cached block {hash} has {} bytes", value.len)
                    });
                }
            }
            (Err(e), _) => findings.about(Kind::Unreadable, fix, || format!("a row of the cache: {e}")),
            (_, Err(_)) => {
                findings.about(Kind::Unreadable, fix, || "a row of the cache names no hash".to_owned())
            }
        }
    }
    Ok(())
}

/// The stored next number, or what it is without one.
pub(super) fn next_of(input: &Input<'_>, name: &str, without: u64) -> Result<u64, Stop> {
    let value = input.source.get(&volume_key(name))?;
    Ok(value.and_then(|v| v[..].try_into().ok()).map_or(without, u64::from_le_bytes))
}
