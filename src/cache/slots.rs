//! The slot file: one sparse file of block-sized slots, local storage of all block content.
//!
//! Owns which slots are free. Knows neither blocks nor hashes: whoever holds a [`Slot`] owns its bytes.
//!
//! A freed slot is not reused at once. The journal on disk may still name it until the record that freed it is durable;
//! reusing it earlier would let a crash show one file's bytes in another. So freed slots wait in limbo until
//! [`SlotFile::reclaim`] is told that everything up to their LSN is durable.

use std::cell::RefCell;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use parking_lot::Mutex;

use super::space::Disk;
use crate::direct::{self, ALIGN, Aligned, passing};
use crate::ids::Lsn;
use crate::trace::{self, Stage};

/// The mark of what an earlier process left.
pub const LEFT: u64 = 1;

/// The slot file. Shared by every slot handed out.
pub struct SlotFile {
    file: File,
    /// The same file past the kernel's cache; none where the filesystem cannot.
    direct: OnceLock<Option<File>>,
    path: PathBuf,
    block_size: u32,
    state: Mutex<State>,
    /// Counts changes; see [`Slot::mark`]. The first one stands for what an earlier process left.
    changed: AtomicU64,
    /// Changes up to here are durable.
    synced: AtomicU64,
    /// Held while syncing: who finds nothing to sync must know that it *is* synced, not that somebody is at it.
    syncing: Mutex<()>,
    /// LSN of the newest record, told by the owner; freed slots are tagged with it.
    lsn: AtomicU64,
    /// In tests: with more slots than this in use the disk is full.
    #[cfg(test)]
    pub(crate) most: std::sync::atomic::AtomicUsize,
}

#[derive(Default)]
struct State {
    free: Vec<u32>,
    /// All slots from here on were never used.
    high: u32,
    limbo: Vec<(u32, Lsn)>,
}

impl SlotFile {
    /// Opens or creates the slot file at `path`. `used` are the slots that the tables name; all others are free.
    pub fn open(path: &Path, block_size: u32, used: &[u32]) -> io::Result<Arc<Self>> {
        let file =
            OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(path)?;
        let high = used.iter().max().map_or(0, |m| m + 1);
        let mut taken = vec![false; high as usize];
        for s in used {
            taken[*s as usize] = true;
        }
        let free: Vec<u32> = (0..high).rev().filter(|s| !taken[*s as usize]).collect();
        let slots = Arc::new(Self {
            file,
            direct: OnceLock::new(),
            path: path.to_owned(),
            block_size,
            state: Mutex::new(State { free: free.clone(), high, limbo: Vec::new() }),
            // A process that was killed may have left bytes with the kernel that are read now, and synced by somebody who sees them.
            changed: AtomicU64::new(LEFT),
            synced: AtomicU64::new(0),
            syncing: Mutex::new(()),
            lsn: AtomicU64::new(0),
            #[cfg(test)]
            most: std::sync::atomic::AtomicUsize::new(usize::MAX),
        });
        // What a crash left in free slots must not be read as zeros-to-be.
        let size = u64::from(block_size);
        for (first, n) in runs(&free) {
            slots.punch_range(u64::from(first) * size, u64::from(n) * size)?;
        }
        slots.file.set_len(u64::from(high) * u64::from(block_size))?;
        Ok(slots)
    }

    /// Where the file lies.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Size of a slot in bytes.
    pub fn block_size(&self) -> u32 {
        self.block_size
    }

    /// Takes an empty slot; all of it reads as zeros.
    pub fn allocate(self: &Arc<Self>) -> Slot {
        let mut state = self.state.lock();
        let index = state.free.pop().unwrap_or_else(|| {
            let next = state.high;
            state.high += 1;
            next
        });
        self.claim(index)
    }

    /// A slot that the tables name. Each may be claimed once.
    pub fn claim(self: &Arc<Self>, index: u32) -> Slot {
        Slot { file: Arc::clone(self), index, named: AtomicU64::new(u64::MAX) }
    }

    /// Tells the newest LSN; slots freed from now on wait for it.
    pub fn advance(&self, lsn: Lsn) {
        self.lsn.fetch_max(lsn.0, Ordering::AcqRel);
    }

    /// Empties and frees the slots whose freeing is durable.
    /// Answers how many.
    pub fn reclaim(&self, durable: Lsn) -> io::Result<usize> {
        let mut ready = Vec::new();
        self.state.lock().limbo.retain(|slot| {
            let waits = slot.1 > durable;
            if !waits {
                ready.push(*slot);
            }
            waits
        });
        for (n, (index, _)) in ready.iter().enumerate() {
            if let Err(e) = self.punch(*index) {
                self.state.lock().limbo.extend(&ready[n..]);
                return Err(e);
            }
            self.state.lock().free.push(*index);
        }
        Ok(ready.len())
    }

    /// The disk that the file lies on.
    pub fn disk(&self) -> io::Result<Disk> {
        let fs = rustix::fs::fstatvfs(&self.file)?;
        let bytes = |blocks: u64| blocks.saturating_mul(fs.f_frsize);
        Ok(Disk { free: bytes(fs.f_bavail), size: bytes(fs.f_blocks) })
    }

    /// Slots that wait in limbo.
    pub fn in_limbo(&self) -> usize {
        self.state.lock().limbo.len()
    }

    /// Makes all changes up to the one that [`Slot::mark`] gave this number durable, and the first time what an earlier process
    /// left. Does nothing when they are.
    pub fn sync(&self, mark: u64) -> io::Result<()> {
        let _turn = self.syncing.lock();
        if self.synced.load(Ordering::Acquire) < mark.max(LEFT) {
            let upto = self.changed.load(Ordering::Acquire);
            self.file.sync_data()?;
            self.synced.store(upto, Ordering::Release);
        }
        Ok(())
    }

    /// Makes everything durable that was changed so far.
    pub fn sync_all(&self) -> io::Result<()> {
        self.sync(self.changed.load(Ordering::Acquire))
    }

    #[cfg(test)]
    fn pretend(&self) -> io::Result<()> {
        let state = self.state.lock();
        match state.high as usize - state.free.len() > self.most.load(Ordering::SeqCst) {
            true => Err(io::ErrorKind::StorageFull.into()),
            false => Ok(()),
        }
    }

    fn offset(&self, index: u32) -> u64 {
        u64::from(index) * u64::from(self.block_size)
    }

    fn punch(&self, index: u32) -> io::Result<()> {
        self.punch_range(self.offset(index), u64::from(self.block_size))
    }

    fn punch_range(&self, offset: u64, len: u64) -> io::Result<()> {
        let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        // SAFETY: the descriptor is open for the life of `self`; fallocate reads no memory of ours.
        let rc = unsafe { libc::fallocate(self.file.as_raw_fd(), mode, offset as i64, len as i64) };
        if rc == 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        if error.raw_os_error() != Some(libc::EOPNOTSUPP) {
            return Err(error);
        }
        // A filesystem without holes: write the zeros.
        let end = (offset + len).min(self.file.metadata()?.len());
        let zeros = vec![0; 64 * 1024];
        let mut at = offset;
        while at < end {
            let n = zeros.len().min((end - at) as usize);
            self.file.write_all_at(&zeros[..n], at)?;
            at += n as u64;
        }
        Ok(())
    }
}

/// Adjacent slots out of a descending list: the first of each run and how many there are.
fn runs(descending: &[u32]) -> Vec<(u32, u32)> {
    let mut runs: Vec<(u32, u32)> = Vec::new();
    for s in descending {
        match runs.last_mut() {
            Some((first, n)) if *first == s + 1 => (*first, *n) = (*s, *n + 1),
            _ => runs.push((*s, 1)),
        }
    }
    runs
}

/// Bytes of one write past the kernel's cache.
const PIECE: usize = 1 << 20;

thread_local! {
    static BUFFER: RefCell<Aligned> = RefCell::new(Aligned::new(PIECE));
}

/// One slot, owned. Dropping it frees the slot, once what freed it is durable.
pub struct Slot {
    file: Arc<SlotFile>,
    index: u32,
    /// The last LSN whose record may name its content as that of a dirty block.
    named: AtomicU64,
}

impl Slot {
    /// The slot's number in the file.
    pub fn index(&self) -> u32 {
        self.index
    }

    /// Tells that no dirty block is in it from the newest LSN on: it may be freed as soon as that is durable, however
    /// long it is kept. (A record that names it as cached does no harm: such content is checked against its hash.)
    pub fn only_cached(&self) {
        self.named.store(self.file.lsn.load(Ordering::Acquire), Ordering::Release);
    }

    /// Fills `buf` from byte `at` of the slot; what was never written is zeros.
    pub fn read(&self, at: u32, buf: &mut [u8]) -> io::Result<()> {
        let mut done = 0;
        let offset = self.file.offset(self.index) + u64::from(at);
        while done < buf.len() {
            let read = || self.file.file.read_at(&mut buf[done..], offset + done as u64);
            match trace::stage(Stage::Blocks, read) {
                Ok(0) => {
                    buf[done..].fill(0);
                    return Ok(());
                }
                Ok(n) => done += n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    /// The first `len` bytes of the slot, as [`Slot::read`] gives them; they do not stay in the kernel's cache for that.
    pub fn read_new(&self, len: u32) -> io::Result<Vec<u8>> {
        trace::stage(Stage::Blocks, || {
            passing::read(&self.file.file, len as usize, self.file.offset(self.index))
        })
    }

    /// Writes `data` at byte `at` of the slot.
    pub fn write(&self, at: u32, data: &[u8]) -> io::Result<()> {
        self.write_by(at, data, |file, offset| file.write_all_at(data, offset))
    }

    /// As [`Slot::write`], for what the mount's own cache has, too: much at a time does not stay in that of the slots.
    pub fn write_passing(&self, at: u32, data: &[u8]) -> io::Result<()> {
        self.write_by(at, data, |file, offset| passing::write(file, data, offset))
    }

    fn write_by(
        &self,
        at: u32,
        data: &[u8],
        write: impl FnOnce(&File, u64) -> io::Result<()>,
    ) -> io::Result<()> {
        debug_assert!(at as usize + data.len() <= self.file.block_size as usize);
        #[cfg(test)]
        self.file.pretend()?;
        let offset = self.file.offset(self.index) + u64::from(at);
        trace::stage(Stage::Blocks, || write(&self.file.file, offset))
    }

    /// Writes all of a clean block, which need not outlast a crash, past the kernel's cache: who reads it has it in memory besides.
    pub fn fill_clean(&self, data: &[u8]) -> io::Result<()> {
        #[cfg(test)]
        self.file.pretend()?;
        let direct = self
            .file
            .direct
            .get_or_init(|| direct::open(&self.file.path, OpenOptions::new().write(true)).ok());
        let size = self.file.block_size as usize;
        if let Some(direct) = direct.as_ref().filter(|_| size.is_multiple_of(ALIGN) && data.len() <= size) {
            let offset = self.file.offset(self.index);
            let write = || BUFFER.with_borrow_mut(|buffer| buffer.write(direct, data, offset));
            match trace::stage(Stage::Blocks, write) {
                Err(e) if direct::is_refused(&e) => {}
                written => return written,
            }
        }
        self.write(0, data)
    }

    /// Makes `[at, at + len)` read as zeros.
    pub fn zero(&self, at: u32, len: u32) -> io::Result<()> {
        self.file.punch_range(self.file.offset(self.index) + u64::from(at), u64::from(len))
    }

    /// A number for the changes made so far, also those that failed half way, for [`SlotFile::sync`]. To be asked for behind them: a sync
    /// that runs meanwhile must not be taken for theirs.
    #[must_use]
    pub fn mark(&self) -> u64 {
        self.file.changed.fetch_add(1, Ordering::AcqRel) + 1
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let lsn = self.file.lsn.load(Ordering::Acquire).min(self.named.load(Ordering::Acquire));
        self.file.state.lock().limbo.push((self.index, Lsn(lsn)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_freed_slot_waits_for_durability_and_comes_back_empty() {
        let dir = tempfile::tempdir().unwrap();
        let slots = SlotFile::open(&dir.path().join("slots"), 65536, &[]).unwrap();
        let a = slots.allocate();
        a.write(10, b"hello").unwrap();
        let index = a.index();
        slots.advance(Lsn(5));
        drop(a);
        slots.reclaim(Lsn(4)).unwrap();
        assert_eq!(slots.in_limbo(), 1);
        assert_ne!(slots.allocate().index(), index);
        slots.reclaim(Lsn(5)).unwrap();
        let again = [slots.allocate(), slots.allocate()].into_iter().find(|s| s.index() == index).unwrap();
        let mut buf = [1; 32];
        again.read(0, &mut buf).unwrap();
        assert_eq!(buf, [0; 32]);
    }

    #[test]
    fn a_clean_block_of_any_length_is_read_back_and_ends_with_zeros() {
        let dir = tempfile::tempdir().unwrap();
        let size = 2 * PIECE as u32;
        let slots = SlotFile::open(&dir.path().join("slots"), size, &[]).unwrap();
        let all: Vec<Slot> = (0..6).map(|_| slots.allocate()).collect();
        let lens = [1, ALIGN, ALIGN + 1, PIECE, PIECE + 5, 2 * PIECE];
        for (slot, len) in all.iter().zip(lens) {
            slot.fill_clean(&vec![slot.index() as u8 + 1; len]).unwrap();
        }
        for (slot, len) in all.iter().zip(lens) {
            let mut found = vec![9; size as usize];
            slot.read(0, &mut found).unwrap();
            let mut expected = vec![slot.index() as u8 + 1; len];
            expected.resize(size as usize, 0);
            assert!(found == expected, "{len}");
            for part in [0, 1, len, size as usize - 1, size as usize] {
                assert!(slot.read_new(part as u32).unwrap() == found[..part], "{len}, {part}");
            }
        }
        // Beyond the end of the file.
        assert_eq!(slots.allocate().read_new(7).unwrap(), [0; 7]);
    }

    #[test]
    fn adjacent_free_slots_are_punched_together() {
        assert_eq!(runs(&[9, 8, 7, 4, 2, 1]), [(7, 3), (4, 1), (1, 2)]);
        assert_eq!(runs(&[]), []);
    }

    #[test]
    fn reopening_keeps_claimed_slots_and_empties_the_rest() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("slots");
        {
            let slots = SlotFile::open(&path, 65536, &[]).unwrap();
            let all: Vec<Slot> = (0..3).map(|_| slots.allocate()).collect();
            for s in &all {
                s.write(0, &[s.index() as u8 + 1]).unwrap();
            }
            slots.sync(all[2].mark()).unwrap();
        }
        let slots = SlotFile::open(&path, 65536, &[2]).unwrap();
        assert_eq!(slots.synced.load(Ordering::SeqCst), 0, "what a killed process wrote was never synced");
        slots.sync(0).unwrap();
        assert_eq!(slots.synced.load(Ordering::SeqCst), LEFT);
        let mut buf = [9];
        slots.claim(2).read(0, &mut buf).unwrap();
        assert_eq!(buf, [3]);
        slots.allocate().read(0, &mut buf).unwrap();
        assert_eq!(buf, [0]);
    }
}
