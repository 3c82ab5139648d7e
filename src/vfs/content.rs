//! File content: read, write, truncate, holes.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};

use super::cell::{Cell, CellState};
use super::types::{Fallocate, FileKind, Seek, SetAttr, SetTime, Time, VfsError, Wait};
use super::{Result, SIZE_MAX, Vfs, buffers, shard};
use crate::cache::space::Admission;
use crate::cache::{Missing, StoreError, Supply};
use crate::format::tables::INLINE_MAX;
use crate::ids::{BlockId, Ino};

/// Blocks given up by one transaction.
const BLOCKS_PER_STEP: usize = 4096;

/// Bytes of the cache given up at once when the disk is full.
const GIVE_UP: u64 = 64 << 20;

/// Length of a block in the units that `stat` counts (512 bytes), rounded up to pages.
pub(crate) fn units(len: u32) -> u64 {
    u64::from(len).div_ceil(4096) * 8
}

/// Why a change of content did not come about.
enum Needs {
    /// This block is not local.
    Block(Box<Missing>),
    /// Nothing would help.
    Nothing(VfsError),
}

impl From<VfsError> for Needs {
    fn from(e: VfsError) -> Self {
        Needs::Nothing(e)
    }
}

impl From<StoreError> for Needs {
    fn from(e: StoreError) -> Self {
        match e {
            StoreError::Miss(missing) => Needs::Block(missing),
            other => Needs::Nothing(other.into()),
        }
    }
}

impl Vfs {
    // ---- opening -------------------------------------------------------------------------------------------------

    pub(super) fn do_open(&self, ino: Ino, write: bool, truncate: bool) -> Result<()> {
        if write || truncate {
            self.check_writable()?;
        }
        // Counted first: see `reap`.
        let there = match self.count_open(ino) {
            Some(cell) => {
                let gone = cell.state.read().gone;
                self.let_go(cell);
                if gone { Err(VfsError::Stale) } else { Ok(()) }
            }
            // More of it is loaded when somebody reads or writes: what the kernel has in memory it does not ask for.
            None => self.load_brief(ino).and_then(|inode| match inode.kind {
                FileKind::Directory => Err(VfsError::IsDirectory),
                _ => Ok(()),
            }),
        };
        // Also an empty file is changed by being emptied; where the caller keeps the times, it
        // sends that one, too.
        let mtime = (!self.times_are_kept.load(Ordering::Acquire)).then_some(SetTime::Now);
        let set = SetAttr { size: Some(0), mtime, ..SetAttr::default() };
        let opened = there.and_then(|()| match truncate {
            true => self.do_setattr(ino, &set, &super::types::Caller::default()).map(drop),
            false => Ok(()),
        });
        if opened.is_err() {
            self.do_release(ino);
        }
        opened
    }

    pub(super) fn do_release(&self, ino: Ino) {
        let cell = {
            let files = &mut *self.files[shard(ino)].lock();
            let Some(count) = files.opens.get_mut(&ino) else { return };
            *count -= 1;
            if *count > 0 {
                return;
            }
            files.opens.remove(&ino);
            files.cells.get(&ino).cloned()
        };
        if let Some(cell) = cell {
            self.let_go(cell);
        }
        self.reap_if_unused(ino);
    }

    // ---- reading -------------------------------------------------------------------------------------------------

    pub(super) fn do_read(&self, ino: Ino, offset: u64, len: u32, wait: Wait) -> Result<Bytes> {
        self.with_cell(ino, |cell| {
            let mut supply = Supply::new();
            let mut spare = None;
            let read = loop {
                match self.read_once(cell, offset, len, &supply, &mut spare) {
                    Ok(bytes) => break Ok(bytes),
                    Err(StoreError::Miss(_)) if wait == Wait::No => break Err(VfsError::WouldBlock),
                    Err(StoreError::Miss(missing)) => {
                        let raw = self.fetch(ino, &missing)?;
                        supply.insert(missing.entry.hash, raw);
                    }
                    Err(e) => break Err(e.into()),
                }
            };
            if let Some(out) = spare {
                buffers::give_back(out.freeze());
            }
            match &read {
                Ok(bytes) => self.read_ahead(cell, offset, bytes.len() as u64),
                // What comes next is on its way while this one is waited for.
                Err(VfsError::WouldBlock) => self.read_ahead(cell, offset, u64::from(len)),
                Err(_) => {}
            }
            read
        })
    }

    /// Reads once, without asking a replica. The buffer of an attempt that failed is left in `spare`, for the next one.
    fn read_once(
        &self,
        cell: &Cell,
        offset: u64,
        len: u32,
        supply: &Supply,
        spare: &mut Option<BytesMut>,
    ) -> Result<Bytes, StoreError> {
        let state = cell.state.read();
        if let Some(bytes) = self.read_shared(cell.ino, &state, offset, len, supply) {
            return Ok(bytes);
        }
        let mut out = spare.take().unwrap_or_else(|| buffers::take(len as usize));
        match self.read_state(cell.ino, &state, offset, &mut out, supply) {
            Ok(n) => {
                out.truncate(n);
                Ok(out.freeze())
            }
            Err(e) => {
                *spare = Some(out);
                Err(e)
            }
        }
    }

    /// What `len` bytes from `offset` are, when they lie in one block whose content is in memory anyway.
    fn read_shared(
        &self,
        ino: Ino,
        state: &CellState,
        offset: u64,
        len: u32,
        supply: &Supply,
    ) -> Option<Bytes> {
        // Before the block is looked up, which mostly is a read of the tables.
        if !self.blocks.has_shared(supply) || state.gone || state.inline.is_some() {
            return None;
        }
        if offset.checked_add(len.into())? > state.inode.size {
            return None;
        }
        let bs = u64::from(self.blocks.block_size());
        let within = offset % bs;
        if len == 0 || within + u64::from(len) > bs {
            return None;
        }
        let id = state.block_at(&self.journal, ino, offset / bs).ok().filter(|id| id.0 != 0)?;
        self.blocks.shared(id, within as u32, len as usize, supply)
    }

    fn fetch(&self, ino: Ino, missing: &Missing) -> Result<Bytes> {
        self.blocks.fetch_missing(missing).map_err(|e| {
            self.pathfinder.report(&self.journal, ino, "cannot be read", e.to_string());
            VfsError::Io(e.to_string())
        })
    }

    /// Fills `out` from `offset`; answers how many bytes are there before the end of the file.
    fn read_state(
        &self,
        ino: Ino,
        state: &CellState,
        offset: u64,
        out: &mut [u8],
        supply: &Supply,
    ) -> Result<usize, StoreError> {
        if state.gone || offset >= state.inode.size {
            return Ok(0);
        }
        let len = (state.inode.size - offset).min(out.len() as u64) as usize;
        let out = &mut out[..len];
        if let Some(inline) = &state.inline {
            let start = usize::try_from(offset).map_or(inline.len(), |o| o.min(inline.len()));
            let part = &inline[start..inline.len().min(start + len)];
            out[..part.len()].copy_from_slice(part);
            out[part.len()..].fill(0);
            return Ok(len);
        }
        let bs = u64::from(self.blocks.block_size());
        let mut done = 0;
        while done < len {
            let at = offset + done as u64;
            let within = (at % bs) as u32;
            let n = ((bs - u64::from(within)) as usize).min(len - done);
            let part = &mut out[done..done + n];
            let id = state.block_at(&self.journal, ino, at / bs)?;
            if id.0 == 0 {
                part.fill(0);
            } else {
                self.blocks.read(id, within, part, supply)?;
            }
            done += n;
        }
        Ok(len)
    }

    // ---- writing -------------------------------------------------------------------------------------------------

    /// Waits until the allowance of disk lets a writer go on. Never while holding a lock.
    fn admit(&self, wait: Wait) -> Result<()> {
        let mut pause = match self.blocks.admit() {
            Admission::Now => return Ok(()),
            _ if wait == Wait::No => return Err(VfsError::WouldBlock),
            Admission::After(pause) => {
                std::thread::sleep(pause);
                return Ok(());
            }
            Admission::Full if self.blocks.give_way() => return Ok(()),
            Admission::Full => Duration::from_millis(5),
        };
        // From when it became full, not from this write: else a hundred writers, one behind the other, would wait a
        // hundred times as long.
        let deadline = self.blocks.space.full_since() + self.options.space_wait;
        while Instant::now() < deadline {
            std::thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(200));
            if self.blocks.admit() != Admission::Full || self.blocks.give_way() {
                return Ok(());
            }
        }
        if let Some(why) = self.blocks.space.complaint() {
            log::warn!("{why}");
        }
        Err(VfsError::NoSpace)
    }

    /// Whether names and attributes may be added.
    pub(super) fn admit_name(&self) -> Result<()> {
        if self.blocks.has_room_for_names() { Ok(()) } else { Err(VfsError::NoSpace) }
    }

    /// Writes; `now` are the file's new times, none when whoever writes brings them apart.
    pub(super) fn do_write(
        &self,
        ino: Ino,
        offset: u64,
        data: &[u8],
        now: Option<Time>,
        wait: Wait,
    ) -> Result<u32> {
        let end = offset.checked_add(data.len() as u64).filter(|e| *e <= SIZE_MAX);
        let Some(end) = end else { return Err(VfsError::FileTooLarge) };
        self.admit(wait)?;
        self.changing(ino, wait, |supply| {
            self.with_state(ino, |cell, state| {
                if state.inode.kind != FileKind::Regular {
                    return Err(VfsError::Invalid.into());
                }
                if data.is_empty() {
                    return Ok(0);
                }
                self.join_ranges(ino, state, offset, end, supply)?;
                self.mark_pending(cell, state);
                if let Err(e) = self.write_state(ino, state, offset, data) {
                    self.cut_back(ino, state, end);
                    return Err(e.into());
                }
                state.inode.size = state.inode.size.max(end);
                if let Some(now) = now {
                    self.stamp(&mut state.inode, now);
                }
                self.no_longer_refused(ino, offset, end);
                Ok(data.len() as u32)
            })
        })
    }

    /// Runs a change of content, and once more with what it turns out to need: content of blocks that are not local, or
    /// space on a full disk. That is come by here, where no lock is held.
    fn changing<R>(
        &self,
        ino: Ino,
        wait: Wait,
        mut change: impl FnMut(&Supply) -> Result<R, Needs>,
    ) -> Result<R> {
        let mut supply = Supply::new();
        loop {
            match change(&supply) {
                Ok(done) => return Ok(done),
                Err(Needs::Block(_)) if wait == Wait::No => return Err(VfsError::WouldBlock),
                Err(Needs::Block(missing)) => {
                    let raw = self.fetch(ino, &missing)?;
                    supply.insert(missing.entry.hash, raw);
                }
                Err(Needs::Nothing(VfsError::NoSpace)) if self.blocks.space.clean() > 0 => {
                    if wait == Wait::No {
                        return Err(VfsError::WouldBlock);
                    }
                    if !self.blocks.make_space(GIVE_UP) {
                        return Err(VfsError::NoSpace);
                    }
                }
                Err(Needs::Nothing(e)) => return Err(e),
            }
        }
    }

    /// Joins the valid ranges of those blocks in `[from, to)` that have too many, before anything is changed.
    fn join_ranges(
        &self,
        ino: Ino,
        state: &mut CellState,
        from: u64,
        to: u64,
        supply: &Supply,
    ) -> Result<(), Needs> {
        if state.inline.is_some() {
            return Ok(());
        }
        let bs = u64::from(self.blocks.block_size());
        for index in from / bs..to.div_ceil(bs) {
            let id = state.block_at_cached(&self.journal, ino, index)?;
            self.blocks.join_ranges(id, supply)?;
        }
        Ok(())
    }

    /// Takes away what a failed write up to `end` left behind the end of the file: it must not show when the file grows.
    fn cut_back(&self, ino: Ino, state: &mut CellState, end: u64) {
        let size = state.inode.size;
        if end > size {
            state.inode.size = end;
            if let Err(e) = self.truncate_state(ino, state, size) {
                log::error!("inode {ino}: bytes of a failed write may be left behind its end: {e}");
                state.inode.size = size;
            }
        }
    }

    fn write_state(&self, ino: Ino, state: &mut CellState, offset: u64, data: &[u8]) -> Result<()> {
        let end = offset + data.len() as u64;
        if let Some(inline) = &mut state.inline {
            if end <= INLINE_MAX as u64 {
                let (start, end) = (offset as usize, end as usize);
                if inline.len() < end {
                    inline.resize(end, 0);
                }
                inline[start..end].copy_from_slice(data);
                state.inode.blocks = units(inline.len() as u32);
                return Ok(());
            }
            self.spill_now(ino, state)?;
        }
        let bs = u64::from(self.blocks.block_size());
        let mut done = 0;
        while done < data.len() {
            let at = offset + done as u64;
            let within = (at % bs) as u32;
            let n = ((bs - u64::from(within)) as usize).min(data.len() - done);
            self.write_block(ino, state, at / bs, within, &data[done..done + n])?;
            done += n;
        }
        Ok(())
    }

    /// Moves inline content into a block.
    pub(super) fn spill_now(&self, ino: Ino, state: &mut CellState) -> Result<()> {
        let Some(inline) = state.inline.take() else { return Ok(()) };
        state.inode.blocks = 0;
        if !inline.is_empty()
            && let Err(e) = self.write_block(ino, state, 0, 0, &inline)
        {
            state.inode.blocks = units(inline.len() as u32);
            state.inline = Some(inline);
            return Err(e);
        }
        Ok(())
    }

    fn write_block(&self, ino: Ino, state: &mut CellState, index: u64, at: u32, data: &[u8]) -> Result<()> {
        let id = state.block_at_cached(&self.journal, ino, index)?;
        if let Some(block) = (id.0 != 0).then(|| self.blocks.writable(id)).flatten() {
            let before = units(block.len());
            self.blocks.write(&block, at, data)?;
            state.inode.blocks = (state.inode.blocks + units(block.len())).saturating_sub(before);
            state.touched.insert(id);
            return Ok(());
        }
        let covers = at == 0 && data.len() == self.blocks.block_size() as usize;
        let below = (id.0 != 0).then_some(id);
        let before = if let Some(id) = below { units(self.blocks.block_len(id)?) } else { 0 };
        let block = self.blocks.create(below, if covers { 0 } else { u32::MAX })?;
        if let Err(e) = self.blocks.write(&block, at, data) {
            self.blocks.discard(block.id);
            return Err(e.into());
        }
        state.inode.blocks = (state.inode.blocks + units(block.len())).saturating_sub(before);
        state.replace_block(index, id, block.id);
        Ok(())
    }

    /// Makes the block at `index` a hole.
    pub(super) fn drop_block_now(&self, state: &mut CellState, index: u64, id: BlockId) -> Result<()> {
        let before = units(self.blocks.block_len(id)?);
        state.inode.blocks = state.inode.blocks.saturating_sub(before);
        state.replace_block(index, id, BlockId(0));
        Ok(())
    }

    /// Sets the size; what is cut off is given up, what is added is zeros.
    pub(super) fn truncate_state(&self, ino: Ino, state: &mut CellState, size: u64) -> Result<()> {
        let bs = u64::from(self.blocks.block_size());
        if let Some(inline) = &mut state.inline {
            inline.truncate(usize::try_from(size).unwrap_or(usize::MAX));
            state.inode.blocks = units(inline.len() as u32);
        } else if size < state.inode.size {
            let (keep, within) = (size / bs, (size % bs) as u32);
            for (index, id) in state.blocks_in(&self.journal, ino, keep, state.inode.size.div_ceil(bs))? {
                if index > keep || within == 0 {
                    self.drop_block_now(state, index, id)?;
                    continue;
                }
                let len = self.blocks.block_len(id)?;
                if len <= within {
                    continue;
                }
                // In place only what the journal does not name yet. Otherwise bytes written here later would lie in the
                // slot before the journal is told of the cut, and a crash would show them inside the old length.
                let unnamed = state.extents.get(&index) == Some(&id);
                if let Some(block) = self.blocks.writable(id).filter(|_| unnamed) {
                    self.blocks.truncate(&block, within);
                    state.touched.insert(id);
                } else {
                    let block = self.blocks.create(Some(id), within)?;
                    state.replace_block(index, id, block.id);
                }
                state.inode.blocks = (state.inode.blocks + units(within)).saturating_sub(units(len));
            }
            if size == 0 {
                state.inline = Some(Vec::new());
            }
        }
        state.inode.size = size;
        Ok(())
    }

    pub(super) fn do_fallocate(
        &self,
        ino: Ino,
        how: Fallocate,
        offset: u64,
        len: u64,
        wait: Wait,
    ) -> Result<()> {
        let end = offset.checked_add(len).filter(|e| *e <= SIZE_MAX).ok_or(VfsError::FileTooLarge)?;
        if len == 0 {
            return Err(VfsError::Invalid);
        }
        self.admit(wait)?;
        self.changing(ino, wait, |supply| {
            self.with_state(ino, |cell, state| {
                if state.inode.kind != FileKind::Regular {
                    return Err(VfsError::NoSuchOffset.into());
                }
                if matches!(how, Fallocate::PunchHole | Fallocate::ZeroRange | Fallocate::ZeroRangeKeepSize) {
                    self.zero_in_steps(cell, state, offset, end, supply)?;
                    self.no_longer_refused(ino, offset, end);
                }
                self.mark_pending(cell, state);
                if matches!(how, Fallocate::Allocate | Fallocate::ZeroRange) && end > state.inode.size {
                    state.inode.size = end;
                }
                self.stamp(&mut state.inode, self.now());
                Ok(())
            })
        })
    }

    /// Makes `[from, to)` zeros. A long range goes into the journal piece by piece, so that no transaction grows with it.
    fn zero_in_steps(
        &self,
        cell: &Arc<Cell>,
        state: &mut CellState,
        from: u64,
        to: u64,
        supply: &Supply,
    ) -> Result<(), Needs> {
        let to = to.min(state.inode.size);
        if from >= to {
            return Ok(());
        }
        let bs = u64::from(self.blocks.block_size());
        let mut ends = Vec::new();
        if state.inline.is_none() {
            // Only the blocks at the ends are zeroed in place.
            self.join_ranges(cell.ino, state, from, from + 1, supply)?;
            self.join_ranges(cell.ino, state, to - 1, to, supply)?;
            let found = state.blocks_in(&self.journal, cell.ino, from / bs, to.div_ceil(bs))?;
            ends.extend(found.keys().step_by(BLOCKS_PER_STEP).skip(1).map(|index| index * bs));
        }
        let mut at = from;
        for end in ends {
            self.mark_pending(cell, state);
            self.zero_state(cell.ino, state, at, end)?;
            self.flush_cell(cell, state)?;
            at = end;
        }
        self.mark_pending(cell, state);
        self.zero_state(cell.ino, state, at, to)?;
        Ok(())
    }

    /// Makes `[from, to)` zeros: whole blocks become holes, parts are zeroed.
    fn zero_state(&self, ino: Ino, state: &mut CellState, from: u64, to: u64) -> Result<()> {
        let to = to.min(state.inode.size);
        if from >= to {
            return Ok(());
        }
        if let Some(inline) = &mut state.inline {
            let clamp = |n: u64| usize::try_from(n).unwrap_or(usize::MAX).min(inline.len());
            let (from, to) = (clamp(from), clamp(to));
            inline[from..to].fill(0);
            return Ok(());
        }
        let bs = u64::from(self.blocks.block_size());
        for (index, id) in state.blocks_in(&self.journal, ino, from / bs, to.div_ceil(bs))? {
            let start = from.saturating_sub(index * bs) as u32;
            let end = (to - index * bs).min(bs) as u32;
            let len = self.blocks.block_len(id)?;
            if start == 0 && end >= len {
                self.drop_block_now(state, index, id)?;
                continue;
            }
            let end = end.min(len);
            if start >= end {
                continue;
            }
            let block = match self.blocks.writable(id) {
                Some(block) => {
                    state.touched.insert(id);
                    block
                }
                None => {
                    let block = self.blocks.create(Some(id), u32::MAX)?;
                    state.replace_block(index, id, block.id);
                    block
                }
            };
            self.blocks.zero(&block, start, end)?;
        }
        Ok(())
    }

    pub(super) fn do_lseek(&self, ino: Ino, offset: u64, seek: Seek) -> Result<u64> {
        self.with_cell(ino, |cell| self.seek_state(ino, &cell.state.read(), offset, seek))
    }

    fn seek_state(&self, ino: Ino, state: &CellState, offset: u64, seek: Seek) -> Result<u64> {
        let size = state.inode.size;
        if offset >= size {
            return Err(VfsError::NoSuchOffset);
        }
        let bs = u64::from(self.blocks.block_size());
        // Data as ranges [start, end), in order, from the block that holds `offset` on.
        let data: Vec<(u64, u64)> = match &state.inline {
            Some(inline) => vec![(0, inline.len() as u64)],
            None => {
                let mut data: Vec<(u64, u64)> = Vec::new();
                for (index, id) in state.blocks_in(&self.journal, ino, offset / bs, size.div_ceil(bs))? {
                    let start = index * bs;
                    let end = (start + u64::from(self.blocks.block_len(id)?)).min(size);
                    match data.last_mut() {
                        Some(last) if last.1 == start => last.1 = end,
                        _ => data.push((start, end)),
                    }
                }
                data
            }
        };
        match seek {
            Seek::Data => data
                .iter()
                .find(|(s, e)| *e > offset && s < e)
                .map(|(s, _)| offset.max(*s))
                .ok_or(VfsError::NoSuchOffset),
            Seek::Hole => Ok(data
                .iter()
                .find(|(s, e)| *s <= offset && offset < *e)
                .map_or(offset, |(_, e)| *e)
                .min(size)),
        }
    }
}
