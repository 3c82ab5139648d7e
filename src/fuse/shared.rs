//! What the adapter's threads share: the filesystem, the threads that may wait, who may write, the way to the kernel.
//!
//! Owns the knowledge of which inodes the kernel may hold unwritten pages of.

use std::collections::{HashMap, HashSet};
use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};

use fuser::{INodeNo, Notifier, OpenAccMode, OpenFlags, ReplyEmpty, ReplyWrite};
use parking_lot::Mutex;

use super::awake::Awake;
use super::guard::guarded;
use super::handed::Handed;
use super::invalidator::{Invalidator, Pages};
use super::pool::Pool;
use super::reply;
use crate::ids::Ino;
use crate::vfs::api::{FileSystem, VfsResult};
use crate::vfs::types::{VfsError, Wait};

/// Those who may write to an inode.
#[derive(Default)]
struct Writers {
    /// Their descriptors.
    count: u32,
    /// The allocated space that the kernel was told of, in units of 512 bytes.
    told_blocks: u64,
}

/// What the adapter's threads share.
pub(super) struct Shared {
    pub(super) fs: Arc<dyn FileSystem>,
    /// Reads that wait for a replica.
    pub(super) reads: Pool,
    /// Writes that wait for space, or for a block that they change in part.
    pub(super) writes: Pool,
    /// Requests that wait until the kernel has written back pages. No other pool: those writes may need one of its threads.
    pub(super) pulls: Pool,
    /// Inodes whose pages are to be dropped, see [`Shared::drop_pages`].
    drops: Pool,
    dropping: Mutex<HashSet<Ino>>,
    /// Syncs that wait for replicas, or for which no serving thread is to spare.
    pub(super) syncs: Pool,
    /// Serving threads that are busy with a sync, and how many may be.
    syncing: AtomicUsize,
    may_sync: usize,
    /// What may be written to: only of that the kernel may hold pages that we have not seen.
    writers: Mutex<HashMap<Ino, Writers>>,
    notifier: OnceLock<Notifier>,
    invalidator: OnceLock<Invalidator>,
    pub(super) awake: Arc<Awake>,
    /// Writes that are being answered.
    pub(super) handed: Arc<Handed>,
}

impl Shared {
    /// Around `fs`; `threads` serve.
    pub(super) fn new(fs: Arc<dyn FileSystem>, threads: usize) -> Self {
        Self {
            fs,
            reads: Pool::new("mirrorfs-read", 48),
            writes: Pool::new("mirrorfs-write", 32),
            pulls: Pool::new("mirrorfs-pull", 48),
            drops: Pool::new("mirrorfs-drop", 4),
            dropping: Mutex::default(),
            syncs: Pool::new("mirrorfs-sync", 48),
            syncing: AtomicUsize::new(0),
            may_sync: threads / 2,
            writers: Mutex::default(),
            notifier: OnceLock::new(),
            invalidator: OnceLock::new(),
            awake: Arc::default(),
            handed: Arc::default(),
        }
    }

    /// Gives it the way to the kernel, when the session is there.
    pub(super) fn connect(&self, notifier: Notifier) {
        let _ = self.notifier.set(notifier);
    }

    /// Has calls that wait for our own answers made by another process.
    pub(super) fn call_through(&self, invalidator: Invalidator) {
        let _ = self.invalidator.set(invalidator);
    }

    /// Lets all work that waits end, and its threads.
    pub(super) fn close(&self) {
        for pool in [&self.reads, &self.writes, &self.pulls, &self.drops, &self.syncs] {
            pool.close();
        }
        self.awake.stop();
    }

    /// Serves a request; see [`guarded`].
    pub(super) fn serve(&self, what: &'static str, work: impl FnOnce()) {
        self.awake.note();
        guarded(what, work);
    }

    /// Syncs on this thread, since handing over to another costs more than a fast disk takes; on one of the pool's when it is
    /// to wait for replicas, or so many serving threads sync already that the others' requests would suffer.
    pub(super) fn sync(
        self: &Arc<Self>,
        what: &'static str,
        reply: ReplyEmpty,
        work: impl Fn(&Self, Wait) -> VfsResult<()> + Send + 'static,
    ) {
        let spare = self.syncing.fetch_add(1, Ordering::AcqRel) < self.may_sync;
        let mut left = Some((reply, work));
        if spare {
            self.serve(what, || {
                let Some((reply, work)) = left.take() else { return };
                match work(self, Wait::No) {
                    Err(VfsError::WouldBlock) => left = Some((reply, work)),
                    answer => reply::empty(reply, answer),
                }
            });
        }
        self.syncing.fetch_sub(1, Ordering::AcqRel);
        if let Some((reply, work)) = left {
            let shared = Arc::clone(self);
            self.syncs.run(move || reply::empty(reply, work(&shared, Wait::Yes)));
        }
    }

    /// Answers a write; `delayed`: the kernel handed it over from its page cache. A page that was refused is clean for the
    /// kernel, although what it shows is stored nowhere: so it is dropped.
    pub(super) fn written(
        self: &Arc<Self>,
        ino: Ino,
        delayed: bool,
        reply: ReplyWrite,
        answer: VfsResult<u32>,
    ) {
        let refused = delayed && answer.is_err();
        reply::written(reply, answer);
        if refused {
            self.drop_pages(ino);
        }
    }

    /// Makes the kernel ask again for an inode's attributes. Call this only before the answer to a request that names
    /// the inode by an open file or a path: then the kernel holds the inode. This call looks the inode up and touches no
    /// page, so that it waits for nothing but an inode that is being freed, and a held one is not. It needs no other
    /// process.
    pub(super) fn forget_attr(&self, ino: Ino) {
        if let Some(notifier) = self.notifier.get()
            && let Err(e) = notifier.inval_inode(INodeNo(ino.0), -1, 0)
        {
            log::debug!("the kernel kept its attributes of inode {ino}: {e}");
        }
    }

    /// Makes the kernel hand over the pages of `ino` that it has not written yet. Waits for our own answers to its
    /// writes: never call this on a thread that serves requests.
    pub(super) fn pull_pages(&self, ino: Ino) {
        self.invalidate(Pages { ino: ino.0, offset: 0, len: 0 });
    }

    /// Has the kernel drop its pages of `ino`, after writing back those that it has not written yet. Returns at once,
    /// also on threads that serve requests. Several calls for one inode may become one.
    pub(super) fn drop_pages(self: &Arc<Self>, ino: Ino) {
        if !self.dropping.lock().insert(ino) {
            return;
        }
        let shared = Arc::clone(self);
        let taken = self.drops.try_run(move || {
            // Before the call, so that a page which is refused from now on is dropped by another one.
            shared.dropping.lock().remove(&ino);
            shared.pull_pages(ino);
        });
        if !taken {
            self.dropping.lock().remove(&ino);
            log::warn!("the kernel keeps its pages of inode {ino}: no thread can be started");
        }
    }

    /// Has the kernel write back and drop pages, by the invalidator if this mount has one.
    fn invalidate(&self, pages: Pages) {
        let done =
            self.invalidator.get().and_then(|process| process.invalidate(pages)).unwrap_or_else(|| {
                let notifier = self.notifier.get().ok_or(io::ErrorKind::NotConnected)?;
                notifier.inval_inode(INodeNo(pages.ino), pages.offset, pages.len)
            });
        if let Err(e) = done {
            log::debug!("the kernel kept its pages of inode {}: {e}", pages.ino);
        }
    }

    pub(super) fn opened(&self, ino: Ino, flags: OpenFlags) {
        if may_write(flags) {
            self.writers.lock().entry(ino).or_default().count += 1;
        }
    }

    pub(super) fn closed(&self, ino: Ino, flags: OpenFlags) {
        if may_write(flags) {
            let mut writers = self.writers.lock();
            if let Some(w) = writers.get_mut(&ino) {
                w.count -= 1;
                if w.count == 0 {
                    writers.remove(&ino);
                }
            }
        }
    }

    pub(super) fn has_writers(&self, ino: Ino) -> bool {
        self.writers.lock().contains_key(&ino)
    }

    /// After a sync: has the kernel ask for the allocated space again when that has changed, which it learns by itself
    /// only when the file is closed.
    pub(super) fn tell_blocks(&self, ino: Ino) {
        let Ok(attr) = self.fs.getattr(ino) else { return };
        let changed = match self.writers.lock().get_mut(&ino) {
            Some(w) => std::mem::replace(&mut w.told_blocks, attr.blocks) != attr.blocks,
            None => false,
        };
        if changed {
            self.forget_attr(ino);
        }
    }

    /// Does what may let `ino` grow beyond `end` (0: it does not grow), on another thread where it has to wait, and answers.
    pub(super) fn enlarge<T>(
        self: &Arc<Self>,
        ino: Ino,
        end: u64,
        work: impl Fn(&dyn FileSystem, Wait) -> VfsResult<T> + Send + 'static,
        answer: impl FnOnce(VfsResult<T>) + Send + 'static,
    ) {
        let tail = self.tail_before(ino, end);
        let done = match tail {
            None => work(&*self.fs, Wait::No),
            Some(_) => Err(VfsError::WouldBlock),
        };
        match done {
            Err(VfsError::WouldBlock) => {
                let shared = Arc::clone(self);
                let pool = if tail.is_some() { &self.pulls } else { &self.writes };
                pool.run(move || {
                    let done = work(&*shared.fs, Wait::Yes);
                    shared.forget_tail(ino, tail);
                    answer(done);
                });
            }
            done => answer(done),
        }
    }

    /// Where the page with the end of `ino` begins, and `end`, when a file that is to grow beyond `end` has one that the
    /// kernel may hold: what a mapping has written behind the end of the file must not show then.
    fn tail_before(&self, ino: Ino, end: u64) -> Option<(u64, u64)> {
        if end == 0 || !self.has_writers(ino) {
            return None;
        }
        let size = self.fs.getattr(ino).ok()?.size;
        // The kernel may know a later end.
        (size < end).then_some((size & !0xfff, end))
    }

    /// Makes the kernel hand over and forget its pages in what [`Shared::tail_before`] answered, before it learns of the
    /// new end. As [`Shared::pull_pages`], not for threads that serve requests.
    fn forget_tail(&self, ino: Ino, tail: Option<(u64, u64)>) {
        let Some((from, to)) = tail else { return };
        let (Ok(start), Ok(len)) = (i64::try_from(from), i64::try_from(to - from)) else { return };
        self.invalidate(Pages { ino: ino.0, offset: start, len });
    }
}

/// Whether a descriptor opened with these flags may write.
pub(super) fn may_write(flags: OpenFlags) -> bool {
    flags.acc_mode() != OpenAccMode::O_RDONLY
}
