//! Inodes, directories, files: the POSIX rules.
//!
//! Owns the meaning of every filesystem operation and the order in which changes reach the journal. Knows no sled, no
//! network and no FUSE.
//!
//! Locks, always taken in this order: the *gate* (shared by whoever changes something, exclusive for a cut), the state of
//! one or two *cells* (by inode number), the journal's transaction. Nothing waits for network or space while holding any.

mod accessed;
pub mod acl;
mod ancestry;
pub mod api;
mod attrs;
pub mod buffers;
mod cell;
mod content;
mod copy;
mod fs;
mod names;
mod pathfinder;
mod prefetch;
mod readahead;
mod reap;
mod refused;
mod rename;
mod sync;
#[cfg(test)]
mod tests;
pub mod types;
mod unwritten;
mod usage;
mod xattrs;

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use parking_lot::{Mutex, RwLock, RwLockReadGuard};

use self::cell::{Cell, CellState, Files};
use self::types::{Attr, Time, VfsError};
use crate::cache::{BlockStore, StoreError};
use crate::format::brief;
use crate::format::codec::FormatError;
use crate::format::tables::{
    Body, Dirent, FileKind, Inode, dirent_key, inode_key, number_of_key, prefix_range, table, volume_key,
};
use crate::ids::{BlockId, Ino, Lsn};
use crate::journal::{Brief, Form, Journal, JournalError, Numbers, Tx};

pub use self::accessed::Atime;
pub(crate) use self::content::units;
pub use self::sync::Durability;
pub use self::unwritten::RefusedFiles;
pub(crate) use self::usage::USAGE;
pub use self::usage::Usage;
pub(crate) use self::xattrs::{XATTR_NAME_MAX, XATTR_VALUE_MAX};

/// Longest file name in bytes.
pub const NAME_MAX: usize = 255;
/// Longest symbolic link target in bytes.
pub const TARGET_MAX: usize = 4095;
/// Largest file size in bytes.
pub const SIZE_MAX: u64 = i64::MAX as u64;
/// Most names one inode may have.
pub const LINK_MAX: u32 = 1 << 30;

/// What the journal keeps in memory for looking up: to be among its options. Without it all is the same, and slower.
pub const FORM: Form = Form { key: brief::key, value: brief::value };

type Result<T, E = VfsError> = std::result::Result<T, E>;

const SHARDS: usize = 32;
pub(crate) const NEXT_INO: &str = "next_ino";
/// How often an operation looks again when what it found by name has changed before it was locked.
const LOOKS: u32 = 1000;

/// How the filesystem is run.
pub struct Options {
    /// The clock.
    pub clock: Arc<dyn Fn() -> Time + Send + Sync>,
    /// Whether fsync waits for replicas (through the [`Durability`] given later).
    pub remote_fsync: bool,
    /// How long a writer waits for space before ENOSPC.
    pub space_wait: Duration,
}

/// The filesystem.
pub struct Vfs {
    journal: Arc<Journal>,
    blocks: Arc<BlockStore>,
    options: Options,
    gate: RwLock<()>,
    files: Vec<Mutex<Files>>,
    /// References the kernel holds, by inode.
    references: Vec<Mutex<HashMap<Ino, u64>>>,
    /// Cells with pending changes.
    pending: Mutex<HashMap<Ino, Arc<Cell>>>,
    /// Inodes without names that are still referenced or open.
    orphans: Mutex<HashSet<Ino>>,
    numbers: Numbers,
    read_only: RwLock<Option<String>>,
    /// `read_only` says something.
    refusing: AtomicBool,
    /// The caller keeps the times of regular files.
    times_are_kept: AtomicBool,
    /// There are, or have been, access control lists.
    acls: AtomicBool,
    /// There are, or may be, extended attributes.
    xattrs: AtomicBool,
    accessed: accessed::Accessed,
    durability: OnceLock<Arc<dyn Durability>>,
    reaper: reap::Queue,
    pathfinder: pathfinder::Pathfinder,
    prefetch: prefetch::Prefetch,
    unwritten: unwritten::Unwritten,
}

/// An answer inside a transaction: a refusal, or "look again", because what was looked up outside has changed.
enum TxError {
    Refuse(VfsError),
    Again,
}

impl From<JournalError> for TxError {
    fn from(e: JournalError) -> Self {
        TxError::Refuse(e.into())
    }
}

impl From<StoreError> for TxError {
    fn from(e: StoreError) -> Self {
        TxError::Refuse(e.into())
    }
}

impl From<FormatError> for TxError {
    fn from(e: FormatError) -> Self {
        TxError::Refuse(e.into())
    }
}

impl From<VfsError> for TxError {
    fn from(e: VfsError) -> Self {
        TxError::Refuse(e)
    }
}

impl From<JournalError> for VfsError {
    fn from(e: JournalError) -> Self {
        let text = e.to_string();
        match e {
            JournalError::Poisoned(why) => VfsError::ReadOnly(why),
            JournalError::Full { .. } => VfsError::NoSpace,
            _ => {
                log::error!("journal: {text}");
                VfsError::Io(text)
            }
        }
    }
}

impl From<FormatError> for VfsError {
    fn from(e: FormatError) -> Self {
        log::error!("local tables: {e}");
        VfsError::Io(e.to_string())
    }
}

impl From<StoreError> for VfsError {
    fn from(e: StoreError) -> Self {
        match e {
            StoreError::Miss(_) => VfsError::WouldBlock,
            StoreError::Journal(e) => e.into(),
            StoreError::Io(e) if crate::cache::is_full(&e) => VfsError::NoSpace,
            other => {
                log::error!("{other}");
                VfsError::Io(other.to_string())
            }
        }
    }
}

fn shard(ino: Ino) -> usize {
    (ino.0.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 59) as usize % SHARDS
}

impl Vfs {
    /// Opens the filesystem in `journal`; makes the root directory when there is none. Resumes deletions.
    pub fn open(journal: Arc<Journal>, blocks: Arc<BlockStore>, options: Options) -> Result<Arc<Self>> {
        let (start, end) = prefix_range(&[table::INODE]);
        let highest = journal.last_in(&start, &end)?.and_then(|(key, _)| number_of_key(&key));
        let numbers = Numbers::open(&journal, volume_key(NEXT_INO), "file or directory", 2, highest)?;
        let vfs = Arc::new(Self {
            journal,
            blocks,
            options,
            gate: RwLock::new(()),
            files: (0..SHARDS).map(|_| Mutex::default()).collect(),
            references: (0..SHARDS).map(|_| Mutex::default()).collect(),
            pending: Mutex::default(),
            orphans: Mutex::default(),
            numbers,
            read_only: RwLock::new(None),
            refusing: AtomicBool::new(false),
            times_are_kept: AtomicBool::new(false),
            acls: AtomicBool::new(false),
            xattrs: AtomicBool::new(true),
            accessed: accessed::Accessed::default(),
            durability: OnceLock::new(),
            reaper: reap::Queue::default(),
            pathfinder: pathfinder::Pathfinder::default(),
            prefetch: prefetch::Prefetch::default(),
            unwritten: unwritten::Unwritten::default(),
        });
        vfs.make_root()?;
        vfs.load_acl_use()?;
        vfs.load_xattr_use()?;
        vfs.start_reaper()?;
        Ok(vfs)
    }

    fn make_root(&self) -> Result<()> {
        if let Some(value) = self.journal.get(&inode_key(Ino::ROOT))? {
            return match Inode::decode(&value)?.kind {
                FileKind::Directory => Ok(()),
                _ => Err(damaged("inode 1, the root, is no directory")),
            };
        }
        // SAFETY: these two calls only read the process's credentials.
        let owner = unsafe { (libc::getuid(), libc::getgid()) };
        let root = Inode { parent: Ino::ROOT, ..Inode::new(FileKind::Directory, 0o755, owner, self.now()) };
        self.journal.transact::<_, VfsError>(|tx| {
            tx.put(inode_key(Ino::ROOT), root.encode());
            usage::change(tx, 0, 1)?;
            Ok(())
        })?;
        Ok(())
    }

    /// The journal below.
    pub fn journal(&self) -> &Arc<Journal> {
        &self.journal
    }

    /// The block store below.
    pub fn blocks(&self) -> &Arc<BlockStore> {
        &self.blocks
    }

    /// From now on every change is refused with this reason.
    pub fn set_read_only(&self, why: &str) {
        let mut read_only = self.read_only.write();
        if read_only.is_none() {
            log::warn!("the mount is read-only from now on: {why}");
            *read_only = Some(why.to_owned());
            self.refusing.store(true, Ordering::Release);
        }
    }

    /// Why changes are refused, if they are.
    pub fn read_only(&self) -> Option<String> {
        let ordered = match self.refusing.load(Ordering::Acquire) {
            true => self.read_only.read().clone(),
            false => None,
        };
        // One look at a flag, while all is well.
        ordered.or_else(|| self.journal.poisoned())
    }

    fn now(&self) -> Time {
        (self.options.clock)()
    }

    /// Whether the caller sends the times of this inode, so that none are to be set here.
    fn keeps_times_of(&self, inode: &Inode) -> bool {
        inode.kind == FileKind::Regular && self.times_are_kept.load(Ordering::Acquire)
    }

    /// Notes that content was changed at `now`, unless the caller sends the time.
    fn stamp(&self, inode: &mut Inode, now: Time) {
        if !self.keeps_times_of(inode) {
            inode.mtime = now;
            inode.ctime = now;
        }
    }

    /// Fails when changes are refused: by order, or because the journal takes none.
    fn check_writable(&self) -> Result<()> {
        match self.read_only() {
            Some(why) => Err(VfsError::ReadOnly(why)),
            None => Ok(()),
        }
    }

    /// Enters the gate, unless the filesystem is read-only.
    fn enter(&self) -> Result<RwLockReadGuard<'_, ()>> {
        self.check_writable()?;
        Ok(self.gate.read())
    }

    /// A number for a new inode; never inside a transaction.
    fn new_ino(&self) -> Result<Ino> {
        Ok(Ino(self.numbers.take(&self.journal)?))
    }

    // ---- cells ---------------------------------------------------------------------------------------------------

    /// The cell of a file; made when there is none. Not for directories.
    fn cell(&self, ino: Ino) -> Result<Arc<Cell>> {
        let cells = &mut self.files[shard(ino)].lock().cells;
        if let Some(cell) = cells.get(&ino) {
            return Ok(Arc::clone(cell));
        }
        let inode = self.load(ino)?;
        if inode.kind == FileKind::Directory {
            return Err(VfsError::IsDirectory);
        }
        let cell = Arc::new(Cell::new(ino, inode));
        cells.insert(ino, Arc::clone(&cell));
        Ok(cell)
    }

    /// The cell of a file, when there is one.
    fn existing_cell(&self, ino: Ino) -> Option<Arc<Cell>> {
        self.files[shard(ino)].lock().cells.get(&ino).cloned()
    }

    /// Lets the cell go when nobody needs it.
    fn let_go(&self, cell: Arc<Cell>) {
        let ino = cell.ino;
        let files = &mut *self.files[shard(ino)].lock();
        // Given up inside the lock, so that of several who let go the last one sees that it is.
        drop(cell);
        let unused = !files.opens.contains_key(&ino)
            && files
                .cells
                .get(&ino)
                .is_some_and(|c| Arc::strong_count(c) == 1 && c.state.try_read().is_some_and(|s| !s.dirty));
        if unused {
            files.cells.remove(&ino);
        }
    }

    /// Counts an open handle; answers the file's cell, when there is one.
    fn count_open(&self, ino: Ino) -> Option<Arc<Cell>> {
        let files = &mut *self.files[shard(ino)].lock();
        *files.opens.entry(ino).or_insert(0) += 1;
        files.cells.get(&ino).cloned()
    }

    fn is_open(&self, ino: Ino) -> bool {
        self.files[shard(ino)].lock().opens.contains_key(&ino)
    }

    /// Runs `f` with the cell of a file and lets it go afterwards, whatever came of it.
    fn with_cell<R, E: From<VfsError>>(
        &self,
        ino: Ino,
        f: impl FnOnce(&Arc<Cell>) -> Result<R, E>,
    ) -> Result<R, E> {
        let cell = self.cell(ino)?;
        let answer = f(&cell);
        self.let_go(cell);
        answer
    }

    /// Changes a file: runs `f` inside the gate, with the file's state locked. Fails for one that was deleted.
    fn with_state<R, E: From<VfsError>>(
        &self,
        ino: Ino,
        f: impl FnOnce(&Arc<Cell>, &mut CellState) -> Result<R, E>,
    ) -> Result<R, E> {
        let _gate = self.enter()?;
        self.with_cell(ino, |cell| {
            let mut state = cell.state.write();
            if state.gone {
                return Err(VfsError::Stale.into());
            }
            f(cell, &mut state)
        })
    }

    fn mark_pending(&self, cell: &Arc<Cell>, state: &mut CellState) {
        if !state.dirty {
            state.dirty = true;
            self.pending.lock().insert(cell.ino, Arc::clone(cell));
        }
    }

    /// Puts what is pending of a file into the journal. The caller is inside the gate and holds the cell's state.
    fn flush_cell(&self, cell: &Cell, state: &mut CellState) -> Result<Option<Lsn>> {
        self.flush_cell_with(cell, state, false)
    }

    /// [`Vfs::flush_cell`]; `at_once`: the journal has been asked for room before.
    fn flush_cell_with(&self, cell: &Cell, state: &mut CellState, at_once: bool) -> Result<Option<Lsn>> {
        if !state.dirty || state.gone {
            return Ok(None);
        }
        let inode = state.inode.clone();
        let mut gone = Vec::new();
        let put =
            |tx: &mut Tx<'_>| -> Result<()> { Ok(state.put(tx, cell.ino, &inode, &self.blocks, &mut gone)?) };
        let (_, lsn) = match at_once {
            true => self.journal.transact_at_once(put)?,
            false => self.journal.transact(put)?,
        };
        self.committed(cell, state, inode, lsn, &gone);
        Ok(Some(lsn))
    }

    /// Notes that the journal has all of a file now.
    fn committed(&self, cell: &Cell, state: &mut CellState, inode: Inode, lsn: Lsn, gone: &[BlockId]) {
        self.blocks.after_commit(lsn, gone);
        if state.dirty {
            self.pending.lock().remove(&cell.ino);
        }
        state.flushed(inode, &self.blocks);
    }

    // ---- inodes --------------------------------------------------------------------------------------------------

    /// The inode as the journal has it.
    fn load(&self, ino: Ino) -> Result<Inode> {
        match self.journal.get(&inode_key(ino))? {
            Some(value) => Ok(Inode::decode(&value)?),
            None => Err(VfsError::Stale),
        }
    }

    /// The inode with pending changes, without its content: `inode.body` says nothing.
    fn inode(&self, ino: Ino) -> Result<Inode> {
        if let Some(cell) = self.existing_cell(ino) {
            let inode = {
                let state = cell.state.read();
                if state.gone { Err(VfsError::Stale) } else { Ok(state.inode.clone()) }
            };
            self.let_go(cell);
            return inode;
        }
        self.load_brief(ino)
    }

    /// The inode as the journal has it, without its content.
    fn load_brief(&self, ino: Ino) -> Result<Inode> {
        self.brief(&inode_key(ino), brief::inode, Inode::decode)?.ok_or(VfsError::Stale)
    }

    /// What the journal has at `key`, out of its brief form or the whole value.
    fn brief<T>(
        &self,
        key: &[u8],
        short: fn(&[u8]) -> Result<T, FormatError>,
        whole: fn(&[u8]) -> Result<T, FormatError>,
    ) -> Result<Option<T>> {
        let mut found = Vec::with_capacity(64);
        Ok(match self.journal.brief(key, &mut found)? {
            Brief::Short => Some(short(&found)?),
            Brief::Whole(value) => Some(whole(&value)?),
            Brief::Absent => None,
        })
    }

    fn attr(&self, ino: Ino, inode: &Inode) -> Attr {
        let (size, blocks) = match (inode.kind, &inode.body) {
            (FileKind::Directory, _) => (4096, 8),
            (FileKind::Symlink, Body::Target(t)) => (t.len() as u64, 0),
            // The kernel knows of what was refused, and reading it must fail rather than find an end.
            _ => (inode.size.max(self.unwritten.book.end(ino).unwrap_or(0)), inode.blocks),
        };
        Attr {
            ino,
            kind: inode.kind,
            perm: inode.perm,
            nlink: inode.nlink,
            uid: inode.uid,
            gid: inode.gid,
            rdev: inode.rdev,
            size,
            blocks,
            atime: self.accessed.get(ino).unwrap_or(inode.atime),
            mtime: inode.mtime,
            ctime: inode.ctime,
            btime: inode.btime,
            blksize: 4096,
            generation: inode.generation,
        }
    }

    /// Changes an inode's attributes in one transaction, with whatever of it is pending. `change` may run more than once.
    fn modify<R>(
        &self,
        ino: Ino,
        change: impl Fn(&mut Tx<'_>, &mut Inode) -> Result<R>,
    ) -> Result<(R, Inode)> {
        match self.with_state(ino, |cell, state| self.modify_cell(cell, state, &change)) {
            Err(VfsError::IsDirectory) => {
                let _gate = self.enter()?;
                let (answer, _) = self.journal.transact::<_, VfsError>(|tx| {
                    let mut inode = tx_inode(tx, ino)?;
                    let answer = change(tx, &mut inode)?;
                    tx.put(inode_key(ino), inode.encode());
                    Ok((answer, inode))
                })?;
                Ok(answer)
            }
            other => other,
        }
    }

    /// [`Vfs::modify`] for a file that is locked already.
    fn modify_cell<R>(
        &self,
        cell: &Cell,
        state: &mut CellState,
        change: impl FnOnce(&mut Tx<'_>, &mut Inode) -> Result<R>,
    ) -> Result<(R, Inode)> {
        let mut gone = Vec::new();
        let ((answer, inode), lsn) = self.journal.transact::<_, VfsError>(|tx| {
            let mut inode = state.inode.clone();
            let answer = change(tx, &mut inode)?;
            state.put(tx, cell.ino, &inode, &self.blocks, &mut gone)?;
            Ok((answer, inode))
        })?;
        self.committed(cell, state, inode.clone(), lsn, &gone);
        Ok((answer, inode))
    }

    // ---- references ----------------------------------------------------------------------------------------------

    fn reference(&self, ino: Ino) {
        *self.references[shard(ino)].lock().entry(ino).or_insert(0) += 1;
    }

    fn is_referenced(&self, ino: Ino) -> bool {
        self.references[shard(ino)].lock().contains_key(&ino)
    }
}

impl TxError {
    /// The refusal; "look again" is the caller's business.
    fn into_refusal(self) -> Option<VfsError> {
        match self {
            TxError::Refuse(e) => Some(e),
            TxError::Again => None,
        }
    }
}

/// An inode inside a transaction.
fn tx_inode(tx: &Tx<'_>, ino: Ino) -> Result<Inode> {
    match tx.get(&inode_key(ino))? {
        Some(value) => Ok(Inode::decode(&value)?),
        None => Err(VfsError::Stale),
    }
}

/// A directory inside a transaction that may get or lose names.
fn tx_dir(tx: &Tx<'_>, ino: Ino) -> Result<Inode> {
    let inode = match tx_inode(tx, ino) {
        Err(VfsError::Stale) => return Err(VfsError::NotFound),
        other => other?,
    };
    if inode.kind != FileKind::Directory {
        return Err(VfsError::NotDirectory);
    }
    if inode.nlink == 0 {
        return Err(VfsError::NotFound);
    }
    Ok(inode)
}

/// A directory entry inside a transaction.
fn tx_entry(tx: &Tx<'_>, parent: Ino, name: &[u8]) -> Result<Option<Dirent>> {
    Ok(match tx.get(&dirent_key(parent, name))? {
        Some(value) => Some(Dirent::decode(&value)?),
        None => None,
    })
}

/// Whether a directory has no names, inside a transaction.
fn tx_is_empty(tx: &Tx<'_>, dir: Ino) -> Result<bool> {
    let (start, end) = crate::format::tables::dirent_range(dir, 0);
    Ok(tx.scan(&start, &end, 1)?.is_empty())
}

/// The answer when looking again has no end: a name leads to an inode that is not there.
fn leads_nowhere(parent: Ino, name: &[u8]) -> VfsError {
    damaged(&format!("{:?} in directory {parent} leads to no inode", name.escape_ascii().to_string()))
}

/// The answer where the tables contradict themselves, which is logged.
fn damaged(text: &str) -> VfsError {
    log::error!("local tables: {text}; check them with mirrorfs fsck");
    VfsError::Io(text.to_owned())
}

fn check_name(name: &[u8]) -> Result<()> {
    if name.len() > NAME_MAX {
        return Err(VfsError::NameTooLong);
    }
    if name.is_empty() || name == b"." || name == b".." || name.contains(&b'/') || name.contains(&0) {
        return Err(VfsError::Invalid);
    }
    Ok(())
}
