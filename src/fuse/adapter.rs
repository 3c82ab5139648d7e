//! The adapter: decodes a kernel request, asks the filesystem, answers.
//!
//! Owns what only the kernel's protocol needs: how long the kernel may believe an answer, and which requests go to a
//! thread that may wait. Knows no rule of POSIX.
//!
//! Nothing else changes the volume while it is mounted, so the kernel may believe answers for long ([`TTL`]). It
//! refreshes by itself what its own operations touch; where it does not, this module tells it ([`Shared::forget_attr`]).

use std::ffi::OsStr;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};

use fuser::{
    AccessFlags, BsdFileFlags, CopyFileRangeFlags, Errno, FileHandle, Filesystem, FopenFlags, Generation,
    INodeNo, InitFlags, IoctlFlags, KernelConfig, LockOwner, OpenFlags, PollEvents, PollFlags, PollNotifier,
    RenameFlags, ReplyAttr, ReplyBmap, ReplyCreate, ReplyData, ReplyDirectory, ReplyDirectoryPlus,
    ReplyEmpty, ReplyEntry, ReplyIoctl, ReplyLseek, ReplyOpen, ReplyPoll, ReplyStatfs, ReplyWrite,
    ReplyXattr, Request, TimeOrNow, WriteFlags,
};

use super::convert::{
    bare_attr, check_xattr_name, fallocate_mode, file_attr, file_type, kind_of_mode, perm_of_mode,
    rename_mode, set_time, time, xattr_mode,
};
use super::errno::errno;
use super::offer;
use super::privileges::Change;
use super::reply;
use super::shared::{Shared, may_write};
use crate::ids::Ino;
use crate::vfs::acl::{ACCESS, is_acl};
use crate::vfs::api::FileSystem;
use crate::vfs::types::{Caller, Fallocate, FileKind, Seek, SetAttr, VfsError, Wait};

/// How long the kernel may believe an entry (also that there is none) or attributes.
pub(super) const TTL: Duration = Duration::from_secs(24 * 3600);

/// Largest write in one request.
const MAX_WRITE: u32 = 1 << 20;

/// Requests that the kernel may have in flight in the background (read-ahead, writeback, direct I/O).
const MAX_BACKGROUND: u16 = 128;

/// We keep no state per handle, so all handles are alike.
const HANDLE: FileHandle = FileHandle(0);

/// Answers the kernel's requests out of a [`FileSystem`].
pub(super) struct Adapter {
    shared: Arc<Shared>,
    /// The kernel does without OPENDIR when told that there is none.
    skip_opendir: bool,
    /// Whether lists are wanted; from INIT on, whether there are any: then the kernel leaves the umask to us.
    acl: bool,
    /// It was said that lists are off.
    said: AtomicBool,
}

impl Adapter {
    /// An adapter in front of what `shared` holds.
    /// `acl`: access control lists are kept and, by the kernel, enforced.
    pub(super) fn new(shared: Arc<Shared>, acl: bool) -> Self {
        Self { shared, skip_opendir: false, acl, said: AtomicBool::new(false) }
    }

    /// Who makes something with this mask.
    fn maker(&self, req: &Request, umask: u32) -> Caller {
        let umask = if self.acl { perm_of_mode(umask) & 0o777 } else { 0 };
        Caller { umask, ..caller(req) }
    }

    /// A directory is listed, from its start.
    fn listed(&self, n: INodeNo, offset: u64) {
        if offset == 0 {
            self.fs().accessed(ino(n));
        }
    }

    /// Refuses attributes that there are not.
    fn check_xattr(&self, name: &OsStr, set: bool) -> Result<(), Errno> {
        if !self.acl && is_acl(name.as_bytes()) {
            // Said once: `ls -l` asks for each file.
            if set && !self.said.swap(true, Ordering::Relaxed) {
                log::info!("access control lists are off in this mount; mounted without noacl they are on");
            }
            return Err(Errno::EOPNOTSUPP);
        }
        check_xattr_name(name.as_bytes())
    }

    /// Serves a request; see [`guarded`](super::guard::guarded).
    fn serve(&self, what: &'static str, work: impl FnOnce()) {
        self.shared.serve(what, work);
    }

    fn fs(&self) -> &dyn FileSystem {
        &*self.shared.fs
    }
}

fn caller(req: &Request) -> Caller {
    Caller { uid: req.uid(), gid: req.gid(), pid: req.pid(), umask: 0 }
}

fn ino(n: INodeNo) -> Ino {
    Ino(n.0)
}

impl Filesystem for Adapter {
    fn init(&mut self, _req: &Request, config: &mut KernelConfig) -> io::Result<()> {
        let there = config.capabilities();
        self.acl &= there.contains(offer::LISTS);
        let wanted = if self.acl { offer::WANTED | offer::LISTS } else { offer::WANTED };
        match config.add_capabilities(wanted & there) {
            Ok(()) if there.contains(InitFlags::FUSE_WRITEBACK_CACHE) => self.fs().caller_keeps_times(),
            Ok(()) => {}
            Err(_) => log::debug!("the kernel offers {there:?} and takes less"),
        }
        self.skip_opendir = there.contains(InitFlags::FUSE_NO_OPENDIR_SUPPORT);
        // Each answers the nearest possible value when it cannot be; that is set then.
        if let Err(nearest) = config.set_max_write(MAX_WRITE) {
            let _ = config.set_max_write(nearest);
        }
        if let Err(nearest) = config.set_max_readahead(MAX_WRITE) {
            let _ = config.set_max_readahead(nearest);
        }
        let _ = config.set_max_background(MAX_BACKGROUND);
        let _ = config.set_congestion_threshold(MAX_BACKGROUND / 4 * 3);
        Ok(())
    }

    fn destroy(&mut self) {
        self.shared.close();
    }

    fn lookup(&self, _req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        self.serve("lookup", || match self.fs().lookup(ino(parent), name.as_bytes()) {
            // Inode 0 tells the kernel that there is no such name, and that it may believe so.
            Err(VfsError::NotFound) => {
                reply.entry(&TTL, &bare_attr(0, FileKind::Regular), Generation(0));
            }
            answer => reply::entry(reply, answer),
        });
    }

    fn forget(&self, _req: &Request, n: INodeNo, nlookup: u64) {
        self.serve("forget", || self.fs().forget(ino(n), nlookup));
    }

    fn getattr(&self, _req: &Request, n: INodeNo, _fh: Option<FileHandle>, reply: ReplyAttr) {
        self.serve("getattr", || reply::attr(reply, self.fs().getattr(ino(n))));
    }

    fn setattr(
        &self,
        req: &Request,
        n: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        atime: Option<TimeOrNow>,
        mtime: Option<TimeOrNow>,
        ctime: Option<SystemTime>,
        _fh: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        self.serve("setattr", || {
            let mut set = SetAttr {
                perm: mode.map(perm_of_mode),
                uid,
                gid,
                size,
                atime: atime.map(set_time),
                mtime: mtime.map(set_time),
                ctime: ctime.map(time),
            };
            if let Some(change) = Change::of_setattr(&set) {
                set.perm = self.shared.fallen_privileges(ino(n), &caller(req), change);
            }
            reply::attr(reply, self.fs().setattr(ino(n), &set, &caller(req)));
        });
    }

    fn readlink(&self, _req: &Request, n: INodeNo, reply: ReplyData) {
        self.serve("readlink", || {
            self.fs().accessed(ino(n));
            reply::data(reply, self.fs().readlink(ino(n)));
        });
    }

    fn mknod(
        &self,
        req: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        rdev: u32,
        reply: ReplyEntry,
    ) {
        self.serve("mknod", || {
            let Some(kind) = kind_of_mode(mode) else { return reply.error(Errno::EINVAL) };
            let (name, perm) = (name.as_bytes(), perm_of_mode(mode));
            reply::entry(
                reply,
                self.fs().mknod(ino(parent), name, kind, perm, rdev, &self.maker(req, umask)),
            );
        });
    }

    fn mkdir(&self, req: &Request, parent: INodeNo, name: &OsStr, mode: u32, umask: u32, reply: ReplyEntry) {
        self.serve("mkdir", || {
            let perm = perm_of_mode(mode);
            let maker = self.maker(req, umask);
            reply::entry(reply, self.fs().mkdir(ino(parent), name.as_bytes(), perm, &maker));
        });
    }

    fn unlink(&self, _req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        self.serve("unlink", || reply::empty(reply, self.fs().unlink(ino(parent), name.as_bytes())));
    }

    fn rmdir(&self, _req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        self.serve("rmdir", || reply::empty(reply, self.fs().rmdir(ino(parent), name.as_bytes())));
    }

    fn symlink(&self, req: &Request, parent: INodeNo, name: &OsStr, target: &Path, reply: ReplyEntry) {
        self.serve("symlink", || {
            let target = target.as_os_str().as_bytes();
            reply::entry(reply, self.fs().symlink(ino(parent), name.as_bytes(), target, &caller(req)));
        });
    }

    fn rename(
        &self,
        req: &Request,
        parent: INodeNo,
        name: &OsStr,
        newparent: INodeNo,
        newname: &OsStr,
        flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        self.serve("rename", || {
            let Some(mode) = rename_mode(flags, caller(req)) else { return reply.error(Errno::EINVAL) };
            let (from, to) = (name.as_bytes(), newname.as_bytes());
            reply::empty(reply, self.fs().rename(ino(parent), from, ino(newparent), to, mode));
        });
    }

    fn link(&self, _req: &Request, n: INodeNo, newparent: INodeNo, newname: &OsStr, reply: ReplyEntry) {
        self.serve("link", || {
            reply::entry(reply, self.fs().link(ino(n), ino(newparent), newname.as_bytes()));
        });
    }

    fn open(&self, req: &Request, n: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        self.serve("open", || {
            let truncate = flags.0 & libc::O_TRUNC != 0;
            let opened = self.fs().open(ino(n), may_write(flags), truncate).and_then(|()| {
                if !truncate {
                    return Ok(());
                }
                let dropped = self.shared.drop_privileges(ino(n), &caller(req), Change::Content);
                dropped.inspect_err(|_| self.fs().release(ino(n)))
            });
            match opened {
                Ok(()) => {
                    self.shared.opened(ino(n), flags);
                    // Without it the kernel drops its pages first. They may show what was refused.
                    let keep = !self.fs().has_refused(ino(n));
                    let flags = if keep { FopenFlags::FOPEN_KEEP_CACHE } else { FopenFlags::empty() };
                    reply.opened(HANDLE, flags);
                }
                Err(e) => reply.error(errno(&e)),
            }
        });
    }

    fn create(
        &self,
        req: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        flags: i32,
        reply: ReplyCreate,
    ) {
        self.serve("create", || {
            let maker = self.maker(req, umask);
            match self.fs().create(ino(parent), name.as_bytes(), perm_of_mode(mode), &maker) {
                Ok(attr) => {
                    self.shared.opened(attr.ino, OpenFlags(flags));
                    let generation = Generation(attr.generation.into());
                    let keep = FopenFlags::FOPEN_KEEP_CACHE;
                    reply.created(&TTL, &file_attr(&attr), generation, HANDLE, keep);
                }
                Err(e) => reply.error(errno(&e)),
            }
        });
    }

    fn read(
        &self,
        _req: &Request,
        n: INodeNo,
        _fh: FileHandle,
        offset: u64,
        size: u32,
        flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        self.serve("read", || {
            if flags.0 & libc::O_NOATIME == 0 {
                self.fs().accessed(ino(n));
            }
            let may_write = may_write(flags);
            let read = move |fs: &dyn FileSystem, wait: Wait| match may_write {
                true => fs.read_to_change(ino(n), offset, size, wait),
                false => fs.read(ino(n), offset, size, wait),
            };
            match read(self.fs(), Wait::No) {
                Err(VfsError::WouldBlock) => {
                    let fs = Arc::clone(&self.shared.fs);
                    let again = move || reply::data(reply, read(&*fs, Wait::Yes));
                    self.shared.reads.run(again);
                }
                answer => reply::data(reply, answer),
            }
        });
    }

    fn write(
        &self,
        req: &Request,
        n: INodeNo,
        _fh: FileHandle,
        offset: u64,
        data: &[u8],
        write_flags: WriteFlags,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        self.serve("write", || {
            if write_flags.contains(WriteFlags::FUSE_WRITE_KILL_SUIDGID)
                && let Err(e) = self.shared.drop_privileges(ino(n), &caller(req), Change::ContentUnprivileged)
            {
                return reply.error(errno(&e));
            }
            // What comes out of the page cache may come long after it was written, and after the times that the kernel sends with it.
            let delayed = write_flags.contains(WriteFlags::FUSE_WRITE_CACHE);
            let ticket = delayed.then(|| self.shared.handed.begin());
            let write = move |fs: &dyn FileSystem, data: &[u8], wait: Wait| match delayed {
                true => fs.write_back(ino(n), offset, data, wait),
                false => fs.write(ino(n), offset, data, wait),
            };
            match write(self.fs(), data, Wait::No) {
                Err(VfsError::WouldBlock) => {
                    // The buffer belongs to the serving thread, which goes on with the next request.
                    let (shared, data) = (Arc::clone(&self.shared), data.to_vec());
                    self.shared.writes.run(move || {
                        let answer = write(&*shared.fs, &data, Wait::Yes);
                        shared.written(ino(n), delayed, reply, answer);
                        drop(ticket);
                    });
                }
                answer => self.shared.written(ino(n), delayed, reply, answer),
            }
        });
    }

    // Without it (the kernel would do without) what is closed would not be in order with the names that change afterwards.
    fn flush(&self, _req: &Request, n: INodeNo, _fh: FileHandle, _owner: LockOwner, reply: ReplyEmpty) {
        self.serve("flush", || reply::empty(reply, self.fs().flush(ino(n))));
    }

    fn release(
        &self,
        _req: &Request,
        n: INodeNo,
        _fh: FileHandle,
        flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        _flush: bool,
        reply: ReplyEmpty,
    ) {
        self.serve("release", || {
            self.shared.closed(ino(n), flags);
            self.fs().release(ino(n));
            reply.ok();
        });
    }

    fn fsync(&self, _req: &Request, n: INodeNo, _fh: FileHandle, datasync: bool, reply: ReplyEmpty) {
        self.shared.sync("fsync", reply, move |shared, wait| {
            let answer = shared.fs.fsync(ino(n), datasync, wait);
            shared.tell_blocks(ino(n));
            answer
        });
    }

    fn opendir(&self, _req: &Request, _ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        if self.skip_opendir {
            // The kernel does not ask again, and caches directories as if told to.
            return reply.error(Errno::ENOSYS);
        }
        reply.opened(HANDLE, FopenFlags::FOPEN_KEEP_CACHE | FopenFlags::FOPEN_CACHE_DIR);
    }

    fn readdir(&self, _req: &Request, n: INodeNo, _fh: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        self.serve("readdir", || {
            self.listed(n, offset);
            let mut taken = 0_u32;
            let listed = self.fs().readdir(ino(n), offset, false, &mut |item| {
                let name = OsStr::from_bytes(item.name);
                let full = reply.add(INodeNo(item.ino.0), item.cookie, file_type(item.kind), name);
                taken += u32::from(!full);
                !full
            });
            match listed {
                // What was taken is handed over; the error comes again with the next call.
                Err(e) if taken == 0 => reply.error(errno(&e)),
                _ => reply.ok(),
            }
        });
    }

    fn readdirplus(
        &self,
        _req: &Request,
        n: INodeNo,
        _fh: FileHandle,
        offset: u64,
        mut reply: ReplyDirectoryPlus,
    ) {
        self.serve("readdirplus", || {
            self.listed(n, offset);
            let mut taken = 0_u32;
            let listed = self.fs().readdir(ino(n), offset, true, &mut |item| {
                let (number, cookie, name) = (INodeNo(item.ino.0), item.cookie, OsStr::from_bytes(item.name));
                let full = match item.attr {
                    Some(a) => {
                        let generation = Generation(a.generation.into());
                        reply.add(number, cookie, name, &TTL, &file_attr(&a), generation)
                    }
                    // `.` and `..`: the kernel takes number and kind, and counts no reference.
                    None if matches!(item.name, b"." | b"..") => {
                        let bare = bare_attr(item.ino.0, item.kind);
                        reply.add(number, cookie, name, &Duration::ZERO, &bare, Generation(0))
                    }
                    None => {
                        log::error!("inode {} was listed without attributes and is left out", item.ino);
                        false
                    }
                };
                taken += u32::from(!full);
                !full
            });
            match listed {
                Err(e) if taken == 0 => reply.error(errno(&e)),
                _ => reply.ok(),
            }
        });
    }

    fn fsyncdir(&self, _req: &Request, n: INodeNo, _fh: FileHandle, _datasync: bool, reply: ReplyEmpty) {
        self.shared.sync("fsyncdir", reply, move |shared, wait| shared.fs.fsyncdir(ino(n), wait));
    }

    fn statfs(&self, _req: &Request, _ino: INodeNo, reply: ReplyStatfs) {
        self.serve("statfs", || reply::statfs(reply, self.fs().statfs()));
    }

    fn setxattr(
        &self,
        req: &Request,
        n: INodeNo,
        name: &OsStr,
        value: &[u8],
        flags: i32,
        _position: u32,
        reply: ReplyEmpty,
    ) {
        self.serve("setxattr", || {
            if let Err(e) = self.check_xattr(name, true) {
                return reply.error(e);
            }
            let Some(mode) = xattr_mode(flags) else { return reply.error(Errno::EINVAL) };
            if name.as_bytes() == ACCESS
                && let Err(e) = self.shared.drop_foreign_setgid(ino(n), &caller(req))
            {
                return reply.error(errno(&e));
            }
            reply::empty(reply, self.fs().setxattr(ino(n), name.as_bytes(), value, mode));
        });
    }

    fn getxattr(&self, _req: &Request, n: INodeNo, name: &OsStr, size: u32, reply: ReplyXattr) {
        self.serve("getxattr", || {
            if let Err(e) = self.check_xattr(name, false) {
                return reply.error(e);
            }
            match self.fs().getxattr(ino(n), name.as_bytes()) {
                Ok(value) => reply::xattr(reply, &value, size),
                Err(e) => reply.error(errno(&e)),
            }
        });
    }

    fn listxattr(&self, req: &Request, n: INodeNo, size: u32, reply: ReplyXattr) {
        self.serve("listxattr", || match self.fs().listxattr(ino(n)) {
            Ok(names) => {
                let mut list = Vec::new();
                for name in names {
                    // As the kernel's own filesystems: `trusted` is not shown to those who may not read it.
                    if req.uid() == 0 || !name.starts_with(b"trusted.") {
                        list.extend_from_slice(&name);
                        list.push(0);
                    }
                }
                reply::xattr(reply, &list, size);
            }
            Err(e) => reply.error(errno(&e)),
        });
    }

    fn removexattr(&self, _req: &Request, n: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        self.serve("removexattr", || {
            if let Err(e) = self.check_xattr(name, false) {
                return reply.error(e);
            }
            reply::empty(reply, self.fs().removexattr(ino(n), name.as_bytes()));
        });
    }

    fn access(&self, _req: &Request, _ino: INodeNo, _mask: AccessFlags, reply: ReplyEmpty) {
        // With default_permissions the kernel decides; should it ask, it has decided.
        reply.ok();
    }

    fn fallocate(
        &self,
        req: &Request,
        n: INodeNo,
        _fh: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        self.serve("fallocate", || {
            let Some(how) = fallocate_mode(mode) else { return reply.error(Errno::EOPNOTSUPP) };
            let n = ino(n);
            if let Err(e) = self.shared.drop_privileges(n, &caller(req), Change::Content) {
                return reply.error(errno(&e));
            }
            let enlarges = matches!(how, Fallocate::Allocate | Fallocate::ZeroRange);
            let end = if enlarges { offset.saturating_add(length) } else { 0 };
            self.shared.enlarge(
                n,
                end,
                move |fs, wait| fs.fallocate(n, how, offset, length, wait),
                |answer| reply::empty(reply, answer),
            );
        });
    }

    fn lseek(
        &self,
        _req: &Request,
        n: INodeNo,
        _fh: FileHandle,
        offset: i64,
        whence: i32,
        reply: ReplyLseek,
    ) {
        self.serve("lseek", || {
            let seek = match whence {
                libc::SEEK_DATA => Seek::Data,
                libc::SEEK_HOLE => Seek::Hole,
                _ => return reply.error(Errno::EINVAL),
            };
            let Ok(offset) = u64::try_from(offset) else { return reply.error(Errno::ENXIO) };
            if !self.shared.has_writers(ino(n)) {
                return reply::offset(reply, self.fs().lseek(ino(n), offset, seek));
            }
            // The kernel does not write its pages before it asks, so data that only it has would be taken for a hole.
            let shared = Arc::clone(&self.shared);
            self.shared.pulls.run(move || {
                shared.pull_pages(ino(n));
                reply::offset(reply, shared.fs.lseek(ino(n), offset, seek));
            });
        });
    }

    fn copy_file_range(
        &self,
        req: &Request,
        source: INodeNo,
        _fh_in: FileHandle,
        source_offset: u64,
        target: INodeNo,
        _fh_out: FileHandle,
        target_offset: u64,
        len: u64,
        _flags: CopyFileRangeFlags,
        reply: ReplyWrite,
    ) {
        self.serve("copy_file_range", || {
            // The answer has 32 bits; the kernel comes back for the rest.
            let len = len.min(u64::from(u32::MAX) & !0xfff);
            let (from, to) = (ino(source), ino(target));
            if let Err(e) = self.shared.drop_privileges(to, &caller(req), Change::Content) {
                return reply.error(errno(&e));
            }
            self.shared.enlarge(
                to,
                target_offset,
                move |fs, wait| fs.copy_file_range(from, source_offset, to, target_offset, len, wait),
                |answer| reply::copied(reply, answer),
            );
        });
    }

    // Asked once each: after ENOSYS the kernel answers by itself.

    fn bmap(&self, _req: &Request, _ino: INodeNo, _blocksize: u32, _idx: u64, reply: ReplyBmap) {
        reply.error(Errno::ENOSYS);
    }

    fn ioctl(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        _flags: IoctlFlags,
        _cmd: u32,
        _in_data: &[u8],
        _out_size: u32,
        reply: ReplyIoctl,
    ) {
        reply.error(Errno::ENOSYS);
    }

    fn poll(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        _ph: PollNotifier,
        _events: PollEvents,
        _flags: PollFlags,
        reply: ReplyPoll,
    ) {
        reply.error(Errno::ENOSYS);
    }
}
