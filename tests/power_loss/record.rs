//! The recording filesystem: a FUSE server over a [`Tree`] that notes everything that changes it.
//!
//! Below the kernel, so that nothing escapes it: not raw system calls, not writes through shared mappings, not what a dependency
//! does. Without the kernel's writeback cache every write arrives when it is made. Nothing here ever calls the filesystem under
//! test, so that one below the other cannot wait for itself. (Nor may anybody in this process map a file of the filesystem under test:
//! a page that is brought in holds the process's memory map, on which a server thread may wait.)

use std::ffi::OsStr;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime};

use fuser::{
    BackgroundSession, Config, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation,
    INodeNo, KernelConfig, LockOwner, OpenFlags, RenameFlags, ReplyAttr, ReplyCreate, ReplyData,
    ReplyDirectory, ReplyEmpty, ReplyEntry, ReplyOpen, ReplyStatfs, ReplyWrite, Request, TimeOrNow,
    WriteFlags,
};
use parking_lot::Mutex;

use crate::disk::{Bytes, Id, Kind, Op, Tree};

/// Everything that happened since the beginning; a moment is the number of operations done before it.
pub struct Recording {
    pub start: Tree,
    pub ops: Vec<Op>,
    pub times: Vec<Instant>,
}

struct State {
    tree: Tree,
    recording: Recording,
    next: Id,
    ended: bool,
}

/// A disk that is being recorded, mounted somewhere.
pub struct Recorder {
    state: Arc<Mutex<State>>,
    mapped: Arc<AtomicU64>,
    session: Option<BackgroundSession>,
    at: PathBuf,
}

impl Recorder {
    /// Mounts a disk that holds `start`.
    pub fn mount(start: Tree, at: &Path) -> Self {
        let next = start.nodes.keys().max().unwrap() + 1;
        let recording = Recording { start: start.clone(), ops: Vec::new(), times: Vec::new() };
        let state = Arc::new(Mutex::new(State { tree: start, recording, next, ended: false }));
        let mapped = Arc::new(AtomicU64::new(0));
        let server = Server { state: Arc::clone(&state), mapped: Arc::clone(&mapped) };
        let mut config = Config::default();
        config.n_threads = Some(2);
        let session = fuser::spawn_mount(server, at, &config).unwrap();
        Self { state, mapped, session: Some(session), at: at.to_owned() }
    }

    /// The moment: no two calls get the same one.
    pub fn now(&self) -> usize {
        let mut state = self.state.lock();
        state.note(Op::Tick);
        state.recording.ops.len() - 1
    }

    /// Writes that came out of shared mappings.
    pub fn mapped(&self) -> u64 {
        self.mapped.load(Ordering::SeqCst)
    }

    /// Unmounts, and gives what was recorded.
    pub fn end(mut self) -> Recording {
        self.unmount();
        let state = Arc::clone(&self.state);
        drop(self);
        let mut state = state.lock();
        (state.tree, state.ended) = (Tree::new(), true);
        std::mem::replace(
            &mut state.recording,
            Recording { start: Tree::new(), ops: Vec::new(), times: Vec::new() },
        )
    }
}

impl Recorder {
    fn unmount(&mut self) {
        use std::os::unix::ffi::OsStrExt;
        let Some(session) = self.session.take() else { return };
        let at = std::ffi::CString::new(self.at.as_os_str().as_bytes()).unwrap();
        // What a killed process had open is let go of a little later. What a `Core` that was abandoned has open is not: then the
        // connection is broken off. Otherwise this process could never end: closing those files would ask a server that is gone.
        let until = Instant::now() + Duration::from_millis(500);
        loop {
            // SAFETY: a NUL-terminated string.
            if unsafe { libc::umount2(at.as_ptr(), 0) } == 0 {
                break;
            }
            if Instant::now() > until {
                // SAFETY: as above. The first breaks off and fails, being busy; the second takes the place away.
                unsafe {
                    libc::umount2(at.as_ptr(), libc::MNT_FORCE);
                    libc::umount2(at.as_ptr(), libc::MNT_DETACH);
                }
                break;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        let _ = session.join();
    }
}

impl Drop for Recorder {
    fn drop(&mut self) {
        self.unmount();
    }
}

struct Server {
    state: Arc<Mutex<State>>,
    mapped: Arc<AtomicU64>,
}

/// Nobody else changes the disk: what the kernel knows stays true.
const TTL: Duration = Duration::from_secs(3600);

fn attr(id: Id, state: &State) -> Option<FileAttr> {
    let node = state.tree.nodes.get(&id)?;
    let now = SystemTime::now();
    // SAFETY: no preconditions.
    let (uid, gid) = unsafe { (libc::geteuid(), libc::getegid()) };
    let size = match &node.kind {
        Kind::File => node.content.len,
        Kind::Dir => 4096,
        Kind::Link(target) => target.len() as u64,
        Kind::Socket => 0,
    };
    Some(FileAttr {
        ino: INodeNo(id),
        size,
        blocks: node.content.pages.len() as u64 * 8,
        atime: now,
        mtime: now,
        ctime: now,
        crtime: now,
        kind: kind(&node.kind),
        perm: (node.mode & 0o7777) as u16,
        nlink: if node.kind == Kind::Dir { 2 } else { node.nlink },
        uid,
        gid,
        rdev: 0,
        blksize: 4096,
        flags: 0,
    })
}

fn kind(kind: &Kind) -> FileType {
    match kind {
        Kind::File => FileType::RegularFile,
        Kind::Dir => FileType::Directory,
        Kind::Link(_) => FileType::Symlink,
        Kind::Socket => FileType::Socket,
    }
}

impl State {
    fn find(&self, parent: INodeNo, name: &OsStr) -> Result<Id, Errno> {
        let dir = self.tree.nodes.get(&parent.0).ok_or(Errno::ENOENT)?;
        dir.names.get(name).copied().ok_or(Errno::ENOENT)
    }

    fn note(&mut self, op: Op) {
        if self.ended {
            return;
        }
        self.tree.apply(&op);
        self.recording.ops.push(op);
        self.recording.times.push(Instant::now());
    }

    fn create(&mut self, parent: INodeNo, name: &OsStr, kind: Kind, mode: u32) -> Result<FileAttr, Errno> {
        if self.find(parent, name).is_ok() {
            return Err(Errno::EEXIST);
        }
        let id = self.next;
        self.next += 1;
        self.note(Op::Create { place: (parent.0, name.to_owned()), id, kind, mode });
        attr(id, self).ok_or(Errno::EIO)
    }

    fn remove(&mut self, parent: INodeNo, name: &OsStr) -> Result<(), Errno> {
        let id = self.find(parent, name)?;
        if !self.tree.nodes[&id].names.is_empty() {
            return Err(Errno::ENOTEMPTY);
        }
        self.note(Op::Unlink { id, place: (parent.0, name.to_owned()) });
        Ok(())
    }

    fn rename(
        &mut self,
        from: (INodeNo, &OsStr),
        to: (INodeNo, &OsStr),
        flags: RenameFlags,
    ) -> Result<(), Errno> {
        let id = self.find(from.0, from.1)?;
        let there = self.find(to.0, to.1).ok();
        if there.is_some() && flags.contains(RenameFlags::RENAME_NOREPLACE) {
            return Err(Errno::EEXIST);
        }
        let exchange = flags.contains(RenameFlags::RENAME_EXCHANGE);
        if exchange && there.is_none() {
            return Err(Errno::ENOENT);
        }
        if there.is_some_and(|t| !exchange && !self.tree.nodes[&t].names.is_empty()) {
            return Err(Errno::ENOTEMPTY);
        }
        self.note(Op::Rename {
            id,
            from: (from.0.0, from.1.to_owned()),
            to: (to.0.0, to.1.to_owned()),
            exchanged: there.filter(|_| exchange),
        });
        Ok(())
    }
}

fn entry(result: Result<FileAttr, Errno>, reply: ReplyEntry) {
    match result {
        Ok(attr) => reply.entry(&TTL, &attr, Generation(0)),
        Err(e) => reply.error(e),
    }
}

fn empty(result: Result<(), Errno>, reply: ReplyEmpty) {
    match result {
        Ok(()) => reply.ok(),
        Err(e) => reply.error(e),
    }
}

impl Filesystem for Server {
    fn init(&mut self, _: &Request, config: &mut KernelConfig) -> io::Result<()> {
        let _ = config.set_max_write(1 << 20);
        Ok(())
    }

    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let state = self.state.lock();
        entry(state.find(parent, name).and_then(|id| attr(id, &state).ok_or(Errno::ENOENT)), reply);
    }

    fn getattr(&self, _: &Request, ino: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        match attr(ino.0, &self.state.lock()) {
            Some(attr) => reply.attr(&TTL, &attr),
            None => reply.error(Errno::ENOENT),
        }
    }

    fn setattr(
        &self,
        _: &Request,
        ino: INodeNo,
        mode: Option<u32>,
        _: Option<u32>,
        _: Option<u32>,
        size: Option<u64>,
        _: Option<TimeOrNow>,
        _: Option<TimeOrNow>,
        _: Option<SystemTime>,
        _: Option<FileHandle>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<fuser::BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let mut state = self.state.lock();
        if let Some(mode) = mode {
            state.note(Op::Mode { id: ino.0, mode });
        }
        if let Some(len) = size {
            state.note(Op::Truncate { id: ino.0, len });
        }
        match attr(ino.0, &state) {
            Some(attr) => reply.attr(&TTL, &attr),
            None => reply.error(Errno::ENOENT),
        }
    }

    fn readlink(&self, _: &Request, ino: INodeNo, reply: ReplyData) {
        use std::os::unix::ffi::OsStrExt;
        match self.state.lock().tree.nodes.get(&ino.0).map(|n| &n.kind) {
            Some(Kind::Link(target)) => reply.data(target.as_bytes()),
            _ => reply.error(Errno::EINVAL),
        }
    }

    fn mknod(
        &self,
        _: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        _: u32,
        reply: ReplyEntry,
    ) {
        let kind = match mode & libc::S_IFMT {
            libc::S_IFSOCK => Kind::Socket,
            libc::S_IFREG => Kind::File,
            _ => return reply.error(Errno::EPERM),
        };
        entry(self.state.lock().create(parent, name, kind, mode & !umask), reply);
    }

    fn mkdir(&self, _: &Request, parent: INodeNo, name: &OsStr, mode: u32, umask: u32, reply: ReplyEntry) {
        entry(self.state.lock().create(parent, name, Kind::Dir, mode & !umask), reply);
    }

    fn unlink(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        empty(self.state.lock().remove(parent, name), reply);
    }

    fn rmdir(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        empty(self.state.lock().remove(parent, name), reply);
    }

    fn symlink(&self, _: &Request, parent: INodeNo, name: &OsStr, target: &Path, reply: ReplyEntry) {
        entry(self.state.lock().create(parent, name, Kind::Link(target.into()), 0o777), reply);
    }

    fn rename(
        &self,
        _: &Request,
        parent: INodeNo,
        name: &OsStr,
        new_parent: INodeNo,
        new_name: &OsStr,
        flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        empty(self.state.lock().rename((parent, name), (new_parent, new_name), flags), reply);
    }

    fn link(&self, _: &Request, ino: INodeNo, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let mut state = self.state.lock();
        let linked = match state.find(parent, name) {
            Ok(_) => Err(Errno::EEXIST),
            Err(_) => {
                state.note(Op::Link { id: ino.0, place: (parent.0, name.to_owned()) });
                attr(ino.0, &state).ok_or(Errno::ENOENT)
            }
        };
        entry(linked, reply);
    }

    fn open(&self, _: &Request, _: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        reply.opened(FileHandle(0), FopenFlags::FOPEN_KEEP_CACHE);
    }

    fn create(
        &self,
        _: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        _: i32,
        reply: ReplyCreate,
    ) {
        match self.state.lock().create(parent, name, Kind::File, mode & !umask) {
            Ok(attr) => {
                reply.created(&TTL, &attr, Generation(0), FileHandle(0), FopenFlags::FOPEN_KEEP_CACHE);
            }
            Err(e) => reply.error(e),
        }
    }

    fn read(
        &self,
        _: &Request,
        ino: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        match self.state.lock().tree.nodes.get(&ino.0) {
            Some(node) => reply.data(&node.content.read(offset, size as usize)),
            None => reply.error(Errno::ENOENT),
        }
    }

    fn write(
        &self,
        _: &Request,
        ino: INodeNo,
        _: FileHandle,
        offset: u64,
        data: &[u8],
        write_flags: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        if write_flags.contains(WriteFlags::FUSE_WRITE_CACHE) {
            self.mapped.fetch_add(1, Ordering::SeqCst);
        }
        let bytes = Bytes::new(data);
        self.state.lock().note(Op::Write { id: ino.0, at: offset, bytes });
        reply.written(data.len() as u32);
    }

    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        reply.ok();
    }

    fn fsync(&self, _: &Request, ino: INodeNo, _: FileHandle, datasync: bool, reply: ReplyEmpty) {
        self.state.lock().note(Op::Sync { id: ino.0, data_only: datasync });
        reply.ok();
    }

    fn fsyncdir(&self, _: &Request, ino: INodeNo, _: FileHandle, datasync: bool, reply: ReplyEmpty) {
        self.state.lock().note(Op::Sync { id: ino.0, data_only: datasync });
        reply.ok();
    }

    fn readdir(&self, _: &Request, ino: INodeNo, _: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        let state = self.state.lock();
        let Some(dir) = state.tree.nodes.get(&ino.0) else { return reply.error(Errno::ENOENT) };
        let dots = [(".".into(), ino.0), ("..".into(), ino.0)];
        // Positions are the ids, so that removing what was listed does not shift the rest.
        let mut all: Vec<_> = dir.names.iter().map(|(n, id)| (n.clone(), *id)).collect();
        all.sort_by_key(|(_, id)| *id);
        let first = dots.into_iter().enumerate().map(|(i, (n, id))| (i as u64 + 1, n, id));
        let rest = all.into_iter().map(|(n, id)| (id + 2, n, id));
        for (position, name, id) in first.chain(rest).filter(|(p, ..)| *p > offset) {
            if reply.add(INodeNo(id), position, kind(&state.tree.nodes[&id].kind), name) {
                break;
            }
        }
        reply.ok();
    }

    fn statfs(&self, _: &Request, _: INodeNo, reply: ReplyStatfs) {
        let blocks = 1 << 28;
        reply.statfs(blocks, blocks, blocks, 1 << 30, 1 << 30, 4096, 255, 4096);
    }

    fn fallocate(
        &self,
        _: &Request,
        ino: INodeNo,
        _: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        let mut state = self.state.lock();
        let Some(len) = state.tree.nodes.get(&ino.0).map(|n| n.content.len) else {
            return reply.error(Errno::ENOENT);
        };
        let clears = mode & (libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_ZERO_RANGE) != 0;
        if clears {
            state.note(Op::Clear { id: ino.0, at: offset, len: length });
        }
        if mode & libc::FALLOC_FL_KEEP_SIZE == 0 && offset + length > len {
            state.note(Op::Truncate { id: ino.0, len: offset + length });
        }
        reply.ok();
    }
}
