//! A dirty block: content that no segment holds yet.
//!
//! Owns one slot, which bytes of it are valid, and the sealed block below that shows through where they are not. Knows
//! neither files nor the tables.
//!
//! The block below is always a sealed one: when a frozen block is written again, its valid bytes are copied into the new
//! slot and its own base is taken over, so chains never form.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;
use parking_lot::RwLock;

use super::patches::{Patch, Patches};
use super::ranges::Ranges;
use super::slots::{LEFT, Slot};
use crate::format::codec::{Decoder, FormatError, put_varint};
use crate::format::tables::BlockEntry;
use crate::ids::BlockId;

/// A dirty block with as many valid ranges as this has them joined before it is written again: its value in the local
/// table must stay far below the journal's longest, however small the writes are.
pub const MAX_RANGES: usize = 512;

/// The sealed block below a dirty one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Base {
    /// The block.
    pub entry: BlockEntry,
    /// Its bytes show through only below this offset (a truncated file keeps no more of it).
    pub limit: u32,
}

/// A block that waits for its txg to be sealed.
pub struct DirtyBlock {
    /// Its number.
    pub id: BlockId,
    /// The transaction group whose cut will freeze it.
    pub txg: u64,
    /// Shared by copy_file_range: no longer written in place.
    shared: AtomicBool,
    /// Lost its last reference after its cut: sealed all the same, but not entered into the block table.
    dead: AtomicBool,
    /// A registered segment holds it.
    sealed: AtomicBool,
    /// Its bytes are part of the store's sum. Changes only while the content is locked for writing.
    counted: AtomicBool,
    content: RwLock<Content>,
}

/// What a dirty block holds.
pub struct Content {
    /// Its slot.
    pub slot: Arc<Slot>,
    /// Logical length; bytes from here to the block size are zeros.
    pub len: u32,
    /// Which bytes of the slot are valid.
    pub valid: Ranges,
    /// What shows through elsewhere.
    pub base: Option<Base>,
    /// What of it the journal holds besides.
    patches: Patches,
    /// The slot's mark behind the last change.
    mark: u64,
}

/// What a record says of a dirty block.
pub struct Saved {
    /// Its value for the local table.
    pub value: Bytes,
    /// Patches to be put, with their bytes.
    pub patches: Vec<(Patch, Bytes)>,
    /// Numbers of patches to be deleted.
    pub obsolete: Vec<u32>,
    /// The mark of the slot file up to which it must be durable before the record is; 0 for none.
    pub mark: u64,
}

/// A stretch of a dirty block's content, as [`DirtyBlock::plan_read`] finds it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Piece {
    /// In the slot.
    Slot {
        /// First byte.
        start: u32,
        /// Behind the last byte.
        end: u32,
    },
    /// In the block below.
    Base {
        /// First byte.
        start: u32,
        /// Behind the last byte.
        end: u32,
        /// That block.
        entry: BlockEntry,
    },
    /// Zeros.
    Zero {
        /// First byte.
        start: u32,
        /// Behind the last byte.
        end: u32,
    },
}

impl Content {
    /// An empty slot, over `base`.
    pub fn new(slot: Arc<Slot>, len: u32, base: Option<Base>) -> Self {
        Self { slot, len, valid: Ranges::default(), base, patches: Patches::default(), mark: 0 }
    }

    /// As an open finds it in the tables.
    pub fn found(slot: Arc<Slot>, value: DirtyValue, patches: Vec<Patch>) -> Self {
        let DirtyValue { len, base, valid, .. } = value;
        Self { slot, len, valid, base, patches: Patches::found(patches), mark: LEFT }
    }

    /// Notes that the slot has, or may have, other bytes in `[start, end)` now.
    fn changed(&mut self, start: u32, end: u32) {
        self.patches.changed(start, end);
        self.mark = self.slot.mark();
    }

    /// Writes what an application gave into the slot; what a failure leaves of it counts as changed, but not as valid.
    pub(super) fn put(&mut self, start: u32, data: &[u8]) -> io::Result<()> {
        let written = self.slot.write_passing(start, data);
        self.changed(start, start + data.len() as u32);
        written
    }

    /// As [`Content::put`], for what did not come from an application just now.
    pub(super) fn copy(&mut self, start: u32, data: &[u8]) -> io::Result<()> {
        let written = self.slot.write(start, data);
        self.changed(start, start + data.len() as u32);
        written
    }

    /// Whether the block below is needed at all.
    pub fn needs_base(&self) -> Option<Base> {
        self.base.filter(|b| !self.valid.covers(0, b.limit.min(self.len)))
    }

    /// Where each part of `[start, end)` comes from.
    pub fn pieces(&self, start: u32, end: u32) -> Vec<Piece> {
        let mut out = Vec::with_capacity(2);
        let live = end.min(self.len);
        for (s, e, inside) in self.valid.pieces(start.min(live), live) {
            if inside {
                out.push(Piece::Slot { start: s, end: e });
                continue;
            }
            let limit = self.base.map_or(0, |b| b.limit).clamp(s, e);
            if let Some(base) = self.base.filter(|_| limit > s) {
                out.push(Piece::Base { start: s, end: limit, entry: base.entry });
            }
            if e > limit {
                out.push(Piece::Zero { start: limit, end: e });
            }
        }
        if end > live.max(start) {
            out.push(Piece::Zero { start: live.max(start), end });
        }
        out
    }

    /// The block's content, when all of it lies in the slot.
    pub fn read_whole(&self) -> Option<io::Result<Vec<u8>>> {
        self.valid.covers(0, self.len).then(|| self.slot.read_new(self.len))
    }

    /// Appends the block's persistent form.
    fn encode(&self) -> Bytes {
        let mut out = Vec::with_capacity(32);
        put_varint(&mut out, u64::from(self.slot.index()));
        put_varint(&mut out, u64::from(self.len));
        match self.base {
            None => out.push(0),
            Some(base) => {
                out.push(1);
                base.entry.encode_into(&mut out);
                put_varint(&mut out, u64::from(base.limit));
            }
        }
        self.valid.encode_into(&mut out);
        out.into()
    }
}

/// A dirty block's value in the local table, decoded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DirtyValue {
    /// Slot number.
    pub slot: u32,
    /// Logical length.
    pub len: u32,
    /// The sealed block below.
    pub base: Option<Base>,
    /// Valid bytes of the slot.
    pub valid: Ranges,
}

impl DirtyValue {
    /// Reads a value of the dirty table; `block_size` bounds it.
    pub fn decode(bytes: &[u8], block_size: u32) -> Result<Self, FormatError> {
        let mut d = Decoder::new("dirty block", bytes);
        let small = |n: u64, d: &Decoder<'_>| u32::try_from(n).map_err(|_| d.error("a number is too large"));
        let n = d.varint()?;
        let slot = small(n, &d)?;
        let n = d.varint()?;
        let len = small(n, &d)?;
        let base = match d.u8()? {
            0 => None,
            1 => {
                let entry = BlockEntry::decode_from(&mut d)?;
                let n = d.varint()?;
                Some(Base { entry, limit: small(n, &d)? })
            }
            other => return Err(d.error(format!("unknown base {other}"))),
        };
        if len > block_size {
            return Err(d.error(format!("length {len} exceeds the block size")));
        }
        let valid = Ranges::decode_from(&mut d, block_size)?;
        d.finish()?;
        Ok(Self { slot, len, base, valid })
    }
}

impl DirtyBlock {
    /// A block in a slot.
    pub fn new(id: BlockId, txg: u64, content: Content, shared: bool) -> Self {
        Self {
            id,
            txg,
            shared: AtomicBool::new(shared),
            dead: AtomicBool::new(false),
            sealed: AtomicBool::new(false),
            counted: AtomicBool::new(true),
            content: RwLock::new(content),
        }
    }

    /// Whether it may be written in place while transaction group `current` collects.
    pub fn is_writable(&self, current: u64) -> bool {
        self.txg == current && !self.shared.load(Ordering::Acquire)
    }

    /// Marks it shared by several files.
    pub fn set_shared(&self) {
        self.shared.store(true, Ordering::Release);
    }

    /// Marks it as having lost its last reference.
    pub fn set_dead(&self) {
        self.dead.store(true, Ordering::Release);
    }

    /// Whether it lost its last reference.
    pub fn is_dead(&self) -> bool {
        self.dead.load(Ordering::Acquire)
    }

    /// Marks it as held by a registered segment.
    pub fn set_sealed(&self) {
        self.sealed.store(true, Ordering::Release);
    }

    /// Whether a registered segment holds it.
    pub fn is_sealed(&self) -> bool {
        self.sealed.load(Ordering::Acquire)
    }

    /// Logical length in bytes; never 0 once something was written.
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> u32 {
        self.content.read().len
    }

    /// Whether it has no bytes at all.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Looks at the content.
    pub fn with<R>(&self, f: impl FnOnce(&Content) -> R) -> R {
        f(&self.content.read())
    }

    /// Whether its valid ranges are to be joined before the next write: see [`MAX_RANGES`].
    pub fn is_crowded(&self) -> bool {
        self.content.read().valid.count() >= MAX_RANGES
    }

    /// Bytes of the slot in use.
    pub fn bytes(&self) -> u64 {
        self.content.read().valid.bytes()
    }

    /// Bytes of the slot that changed since the journal last heard of the block.
    pub fn fresh_bytes(&self) -> u64 {
        self.content.read().patches.fresh_bytes()
    }

    /// Numbers of its patches in the local table.
    pub fn patches(&self) -> Vec<u32> {
        self.content.read().patches.numbers().collect()
    }

    /// What the next record is to say of it. `small`: somebody waits for the record, and it should hold what changed if that is little.
    /// [`DirtyBlock::saved`] when it was committed; nobody changes the block in between.
    pub fn save(&self, small: bool) -> io::Result<Saved> {
        let mut c = self.content.write();
        let plan = c.patches.plan(small);
        let mut patches = Vec::with_capacity(plan.put.len());
        for patch in plan.put {
            let mut bytes = vec![0; (patch.end - patch.start) as usize];
            c.slot.read(patch.start, &mut bytes)?;
            patches.push((patch, bytes.into()));
        }
        let mark = if plan.sync { c.mark } else { 0 };
        Ok(Saved { value: c.encode(), patches, obsolete: plan.delete, mark })
    }

    /// The journal has what the last [`DirtyBlock::save`] gave.
    pub fn saved(&self) {
        self.content.write().patches.done();
    }

    /// Writes `data` at `at`. Returns how many more bytes of the slot are in use now.
    pub fn write(&self, at: u32, data: &[u8]) -> io::Result<u64> {
        let mut c = self.content.write();
        c.put(at, data)?;
        let before = c.valid.bytes();
        let end = at + data.len() as u32;
        Self::note_valid(&mut c, at, end);
        Ok(c.valid.bytes() - before)
    }

    /// Makes `[at, end)` zeros, enlarging the block up to `end` when it is shorter. Returns how many more bytes of the
    /// slot are in use now.
    pub fn zero(&self, at: u32, end: u32) -> io::Result<u64> {
        let mut c = self.content.write();
        let zeroed = c.slot.zero(at, end - at);
        c.changed(at, end);
        zeroed?;
        let before = c.valid.bytes();
        Self::note_valid(&mut c, at, end);
        Ok(c.valid.bytes() - before)
    }

    fn note_valid(c: &mut Content, at: u32, end: u32) {
        c.valid.insert(at, end);
        c.len = c.len.max(end);
        if c.base.is_some() && c.needs_base().is_none() {
            c.base = None;
        }
    }

    /// Cuts the block at `at`: everything behind reads as zeros.
    pub fn truncate(&self, at: u32) {
        let mut c = self.content.write();
        if at >= c.len {
            return;
        }
        // The slot's bytes stay: until this is durable the table still calls them valid.
        c.valid.truncate(at);
        c.patches.truncate(at);
        c.len = at;
        if let Some(base) = &mut c.base {
            base.limit = base.limit.min(at);
        }
        if c.needs_base().is_none() {
            c.base = None;
        }
    }

    /// Takes the block out of the store's sum: answers the bytes to subtract (none the second time).
    pub fn uncount(&self) -> u64 {
        let c = self.content.write();
        if self.counted.swap(false, Ordering::AcqRel) { c.valid.bytes() } else { 0 }
    }

    /// Fills the gaps of the slot from the whole raw content `full` (exactly `len` bytes): afterwards the slot alone has it.
    /// Returns how many more bytes of the slot are to be counted now.
    pub fn fill(&self, full: &[u8]) -> io::Result<u64> {
        let mut c = self.content.write();
        let len = c.len;
        let gaps: Vec<(u32, u32)> = c.valid.pieces(0, len).filter(|p| !p.2).map(|p| (p.0, p.1)).collect();
        for (s, e) in gaps {
            c.copy(s, &full[s as usize..e as usize])?;
        }
        let before = c.valid.bytes();
        c.valid.insert(0, len);
        c.base = None;
        Ok(if self.counted.load(Ordering::Acquire) { c.valid.bytes() - before } else { 0 })
    }

    /// Takes the slot out, when nobody else holds the block.
    pub fn into_content(self) -> Content {
        self.content.into_inner()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cache::slots::SlotFile;
    use crate::format::tables::FrameLoc;
    use crate::ids::{BlockHash, Epoch, SegmentNo};

    fn entry() -> BlockEntry {
        BlockEntry {
            hash: BlockHash([7; 32]),
            loc: FrameLoc {
                segment: SegmentNo(3),
                epoch: Epoch(1),
                offset: 9,
                stored_len: 10,
                raw_len: 1000,
                codec: 1,
            },
        }
    }

    #[test]
    fn pieces_show_slot_base_and_zeros() {
        let dir = tempfile::tempdir().unwrap();
        let slots = SlotFile::open(&dir.path().join("s"), 65536, &[]).unwrap();
        let content =
            Content::new(Arc::new(slots.allocate()), 1000, Some(Base { entry: entry(), limit: 1000 }));
        let block = DirtyBlock::new(BlockId(1), 1, content, false);
        block.write(100, &[1; 50]).unwrap();
        assert_eq!(
            block.with(|c| c.pieces(90, 200)),
            vec![
                Piece::Base { start: 90, end: 100, entry: entry() },
                Piece::Slot { start: 100, end: 150 },
                Piece::Base { start: 150, end: 200, entry: entry() },
            ]
        );
        block.truncate(120);
        block.write(300, &[2; 10]).unwrap();
        assert_eq!(
            block.with(|c| c.pieces(0, 400)),
            vec![
                Piece::Base { start: 0, end: 100, entry: entry() },
                Piece::Slot { start: 100, end: 120 },
                Piece::Zero { start: 120, end: 300 },
                Piece::Slot { start: 300, end: 310 },
                Piece::Zero { start: 310, end: 400 },
            ]
        );
        let bytes = block.save(false).unwrap().value;
        let value = DirtyValue::decode(&bytes, 65536).unwrap();
        assert_eq!((value.len, value.base.map(|b| b.limit)), (310, Some(120)));
        block.write(0, &[3; 100]).unwrap();
        assert!(block.with(|c| c.base.is_none()), "a covered base is let go");
        for cut in 0..bytes.len() {
            assert!(DirtyValue::decode(&bytes[..cut], 65536).is_err());
        }
    }
}
