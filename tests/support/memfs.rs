//! A small filesystem in memory, to try the adapter without anything behind it.
//!
//! Content is kept in 4 KiB pages, so that holes are holes. Names beginning with `boom` make `lookup` panic; files with
//! a name beginning with `slow` answer `WouldBlock` to everything that may.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use mirrorfs::format::tables::name_cookie;
use mirrorfs::ids::Ino;
use mirrorfs::vfs::api::{FileSystem, VfsResult};
use mirrorfs::vfs::types::*;

const PAGE: u64 = 4096;

struct Node {
    attr: Attr,
    pages: BTreeMap<u64, Vec<u8>>,
    entries: BTreeMap<(u64, Vec<u8>), Ino>,
    parent: Ino,
    target: Bytes,
    xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    refs: u64,
    opens: u64,
    slow: bool,
}

#[derive(Default)]
struct State {
    nodes: HashMap<Ino, Node>,
    next: u64,
}

/// The filesystem.
pub struct MemFs {
    state: Mutex<State>,
    /// Calls that said `WouldBlock`.
    pub blocked: AtomicU64,
    /// Calls that came with `Wait::Yes`.
    pub waited: AtomicU64,
    /// How long something slow takes, in ms.
    pub pause: AtomicU64,
    /// Calls of `flush`, `getattr`, `lookup`, `getxattr`.
    pub lookups: AtomicU64,
}

fn now() -> Time {
    let d = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    Time { secs: d.as_secs() as i64, nanos: d.subsec_nanos() }
}

fn key(name: &[u8]) -> (u64, Vec<u8>) {
    (name_cookie(name), name.to_vec())
}

impl State {
    fn node(&mut self, ino: Ino) -> VfsResult<&mut Node> {
        self.nodes.get_mut(&ino).ok_or(VfsError::Stale)
    }

    fn child(&mut self, parent: Ino, name: &[u8]) -> VfsResult<Ino> {
        self.node(parent)?.entries.get(&key(name)).copied().ok_or(VfsError::NotFound)
    }

    fn touch_dir(&mut self, dir: Ino, links: i32) -> VfsResult<()> {
        let node = self.node(dir)?;
        (node.attr.mtime, node.attr.ctime) = (now(), now());
        node.attr.nlink = node.attr.nlink.checked_add_signed(links).unwrap();
        Ok(())
    }

    fn add(
        &mut self,
        parent: Ino,
        name: &[u8],
        kind: FileKind,
        mut perm: u16,
        rdev: u32,
        c: &Caller,
    ) -> VfsResult<&mut Node> {
        if name.len() > 255 {
            return Err(VfsError::NameTooLong);
        }
        if self.child(parent, name).is_ok() {
            return Err(VfsError::Exists);
        }
        let up = self.node(parent)?.attr;
        if up.nlink == 0 {
            return Err(VfsError::NotFound);
        }
        let inherit = up.perm & 0o2000 != 0;
        perm &= !c.umask;
        if inherit && kind == FileKind::Directory {
            perm |= 0o2000;
        }
        self.next += 1;
        let (ino, t) = (Ino(self.next), now());
        let attr = Attr {
            ino,
            kind,
            perm,
            nlink: if kind == FileKind::Directory { 2 } else { 1 },
            uid: c.uid,
            gid: if inherit { up.gid } else { c.gid },
            rdev,
            size: 0,
            blocks: 0,
            atime: t,
            mtime: t,
            ctime: t,
            btime: t,
            blksize: 4096,
            generation: 0,
        };
        let node = Node {
            attr,
            pages: BTreeMap::new(),
            entries: BTreeMap::new(),
            parent,
            target: Bytes::new(),
            xattrs: BTreeMap::new(),
            refs: 1,
            opens: 0,
            slow: name.starts_with(b"slow"),
        };
        self.nodes.insert(ino, node);
        self.node(parent)?.entries.insert(key(name), ino);
        self.touch_dir(parent, i32::from(kind == FileKind::Directory))?;
        self.node(ino)
    }

    fn unlink_ino(&mut self, ino: Ino, links: u32) -> VfsResult<()> {
        let node = self.node(ino)?;
        node.attr.nlink -= links;
        node.attr.ctime = now();
        self.reap(ino);
        Ok(())
    }

    fn reap(&mut self, ino: Ino) {
        if self.nodes.get(&ino).is_some_and(|n| n.attr.nlink == 0 && n.refs == 0 && n.opens == 0) {
            self.nodes.remove(&ino);
        }
    }

    fn is_below(&self, mut dir: Ino, ancestor: Ino) -> bool {
        while dir != ancestor {
            if dir == Ino::ROOT {
                return false;
            }
            dir = self.nodes[&dir].parent;
        }
        true
    }
}

impl Node {
    fn zero(&mut self, from: u64, to: u64) {
        let mut at = from;
        while at < to {
            let (page, start) = (at / PAGE, at % PAGE);
            let end = PAGE.min(start + to - at);
            if start == 0 && end == PAGE {
                self.pages.remove(&page);
            } else if let Some(p) = self.pages.get_mut(&page) {
                p[start as usize..end as usize].fill(0);
            }
            at += end - start;
        }
    }

    fn put(&mut self, offset: u64, data: &[u8]) {
        let mut done = 0;
        while done < data.len() {
            let at = offset + done as u64;
            let (page, start) = (at / PAGE, (at % PAGE) as usize);
            let n = (data.len() - done).min(PAGE as usize - start);
            let p = self.pages.entry(page).or_insert_with(|| vec![0; PAGE as usize]);
            p[start..start + n].copy_from_slice(&data[done..done + n]);
            done += n;
        }
        self.attr.size = self.attr.size.max(offset + data.len() as u64);
        self.changed();
    }

    fn get(&self, offset: u64, len: u64) -> Vec<u8> {
        let end = self.attr.size.min(offset.saturating_add(len));
        let mut out = vec![0; end.saturating_sub(offset) as usize];
        for (page, p) in self.pages.range(offset / PAGE..end.div_ceil(PAGE)) {
            let from = offset.max(page * PAGE);
            let to = end.min((page + 1) * PAGE);
            if from < to {
                out[(from - offset) as usize..(to - offset) as usize]
                    .copy_from_slice(&p[(from - page * PAGE) as usize..(to - page * PAGE) as usize]);
            }
        }
        out
    }

    fn resize(&mut self, size: u64) {
        if size < self.attr.size {
            self.zero(size, self.attr.size.next_multiple_of(PAGE));
        }
        self.attr.size = size;
        self.changed();
    }

    fn changed(&mut self) {
        (self.attr.mtime, self.attr.ctime) = (now(), now());
        self.attr.blocks = self.pages.len() as u64 * 8;
    }
}

impl MemFs {
    /// An empty one; the root belongs to whoever calls.
    pub fn new() -> Self {
        let mut state = State { next: 1, ..State::default() };
        let t = now();
        let meta = std::fs::metadata("/proc/self").unwrap();
        let (uid, gid) =
            (std::os::unix::fs::MetadataExt::uid(&meta), std::os::unix::fs::MetadataExt::gid(&meta));
        let attr = Attr {
            ino: Ino::ROOT,
            kind: FileKind::Directory,
            perm: 0o755,
            nlink: 2,
            uid,
            gid,
            rdev: 0,
            size: 0,
            blocks: 0,
            atime: t,
            mtime: t,
            ctime: t,
            btime: t,
            blksize: 4096,
            generation: 0,
        };
        let root = Node {
            attr,
            pages: BTreeMap::new(),
            entries: BTreeMap::new(),
            parent: Ino::ROOT,
            target: Bytes::new(),
            xattrs: BTreeMap::new(),
            refs: 1,
            opens: 0,
            slow: false,
        };
        state.nodes.insert(Ino::ROOT, root);
        Self {
            state: Mutex::new(state),
            blocked: AtomicU64::new(0),
            waited: AtomicU64::new(0),
            pause: AtomicU64::new(50),
            lookups: AtomicU64::new(0),
        }
    }

    /// Inodes that exist, the root among them.
    pub fn inodes(&self) -> usize {
        self.lock().nodes.len()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn wait(&self, ino: Ino, wait: Wait) -> VfsResult<()> {
        let slow = self.lock().node(ino)?.slow;
        match wait {
            Wait::No if slow => {
                self.blocked.fetch_add(1, Ordering::SeqCst);
                Err(VfsError::WouldBlock)
            }
            Wait::Yes => {
                self.waited.fetch_add(1, Ordering::SeqCst);
                if slow {
                    std::thread::sleep(Duration::from_millis(self.pause.load(Ordering::SeqCst)));
                }
                Ok(())
            }
            Wait::No => Ok(()),
        }
    }
}

impl FileSystem for MemFs {
    fn lookup(&self, parent: Ino, name: &[u8]) -> VfsResult<Attr> {
        self.lookups.fetch_add(1, Ordering::SeqCst);
        assert!(!name.starts_with(b"boom"), "boom");
        if name.len() > 255 {
            return Err(VfsError::NameTooLong);
        }
        let mut s = self.lock();
        let ino = match name {
            b"." => parent,
            b".." => s.node(parent)?.parent,
            _ => s.child(parent, name)?,
        };
        let node = s.node(ino)?;
        node.refs += 1;
        Ok(node.attr)
    }

    fn forget(&self, ino: Ino, n: u64) {
        let mut s = self.lock();
        if let Ok(node) = s.node(ino) {
            node.refs = node.refs.checked_sub(n).expect("more forgotten than referenced");
        }
        s.reap(ino);
    }

    fn getattr(&self, ino: Ino) -> VfsResult<Attr> {
        Ok(self.lock().node(ino)?.attr)
    }

    fn setattr(&self, ino: Ino, set: &SetAttr, _c: &Caller) -> VfsResult<Attr> {
        let mut s = self.lock();
        let node = s.node(ino)?;
        let at = |t: SetTime| match t {
            SetTime::Now => now(),
            SetTime::At(t) => t,
        };
        if let Some(size) = set.size {
            node.resize(size);
        }
        let a = &mut node.attr;
        a.perm = set.perm.unwrap_or(a.perm);
        a.uid = set.uid.unwrap_or(a.uid);
        a.gid = set.gid.unwrap_or(a.gid);
        a.atime = set.atime.map_or(a.atime, at);
        a.mtime = set.mtime.map_or(a.mtime, at);
        a.ctime = set.ctime.unwrap_or_else(now);
        Ok(*a)
    }

    fn readlink(&self, ino: Ino) -> VfsResult<Bytes> {
        Ok(self.lock().node(ino)?.target.clone())
    }

    fn create(&self, parent: Ino, name: &[u8], perm: u16, c: &Caller) -> VfsResult<Attr> {
        let mut s = self.lock();
        let node = s.add(parent, name, FileKind::Regular, perm, 0, c)?;
        node.opens += 1;
        Ok(node.attr)
    }

    fn mknod(
        &self,
        parent: Ino,
        name: &[u8],
        kind: FileKind,
        perm: u16,
        rdev: u32,
        c: &Caller,
    ) -> VfsResult<Attr> {
        Ok(self.lock().add(parent, name, kind, perm, rdev, c)?.attr)
    }

    fn mkdir(&self, parent: Ino, name: &[u8], perm: u16, c: &Caller) -> VfsResult<Attr> {
        Ok(self.lock().add(parent, name, FileKind::Directory, perm, 0, c)?.attr)
    }

    fn symlink(&self, parent: Ino, name: &[u8], target: &[u8], c: &Caller) -> VfsResult<Attr> {
        let mut s = self.lock();
        let node = s.add(parent, name, FileKind::Symlink, 0o777, 0, c)?;
        node.target = Bytes::copy_from_slice(target);
        node.attr.size = target.len() as u64;
        Ok(node.attr)
    }

    fn link(&self, ino: Ino, new_parent: Ino, new_name: &[u8]) -> VfsResult<Attr> {
        let mut s = self.lock();
        if s.child(new_parent, new_name).is_ok() {
            return Err(VfsError::Exists);
        }
        s.node(new_parent)?.entries.insert(key(new_name), ino);
        s.touch_dir(new_parent, 0)?;
        let node = s.node(ino)?;
        node.refs += 1;
        node.attr.nlink += 1;
        node.attr.ctime = now();
        Ok(node.attr)
    }

    fn unlink(&self, parent: Ino, name: &[u8]) -> VfsResult<()> {
        let mut s = self.lock();
        let ino = s.child(parent, name)?;
        if s.node(ino)?.attr.kind == FileKind::Directory {
            return Err(VfsError::IsDirectory);
        }
        s.node(parent)?.entries.remove(&key(name));
        s.touch_dir(parent, 0)?;
        s.unlink_ino(ino, 1)
    }

    fn rmdir(&self, parent: Ino, name: &[u8]) -> VfsResult<()> {
        let mut s = self.lock();
        let ino = s.child(parent, name)?;
        let node = s.node(ino)?;
        if node.attr.kind != FileKind::Directory {
            return Err(VfsError::NotDirectory);
        }
        if !node.entries.is_empty() {
            return Err(VfsError::NotEmpty);
        }
        s.node(parent)?.entries.remove(&key(name));
        s.touch_dir(parent, -1)?;
        s.unlink_ino(ino, 2)
    }

    fn rename(&self, parent: Ino, name: &[u8], to: Ino, to_name: &[u8], mode: RenameMode) -> VfsResult<()> {
        let mut s = self.lock();
        let ino = s.child(parent, name)?;
        let old = s.child(to, to_name).ok();
        let dir = |s: &mut State, i: Ino| s.node(i).map(|n| n.attr.kind == FileKind::Directory);
        let is_dir = dir(&mut s, ino)?;
        if is_dir && s.is_below(to, ino) {
            return Err(VfsError::Invalid);
        }
        match (mode, old) {
            (RenameMode::Whiteout(_) | RenameMode::WhiteoutNoReplace(_), _) => return Err(VfsError::Invalid),
            (RenameMode::NoReplace, Some(_)) => return Err(VfsError::Exists),
            (RenameMode::Exchange, None) => return Err(VfsError::NotFound),
            (RenameMode::Exchange, Some(other)) => {
                let other_dir = dir(&mut s, other)?;
                if other_dir && s.is_below(parent, other) {
                    return Err(VfsError::Invalid);
                }
                s.node(parent)?.entries.insert(key(name), other);
                s.node(to)?.entries.insert(key(to_name), ino);
                (s.node(ino)?.parent, s.node(other)?.parent) = (to, parent);
                (s.node(ino)?.attr.ctime, s.node(other)?.attr.ctime) = (now(), now());
                let moved = i32::from(is_dir) - i32::from(other_dir);
                s.touch_dir(parent, -moved)?;
                return s.touch_dir(to, moved);
            }
            (_, Some(other)) if other == ino => return Ok(()),
            (_, Some(other)) => {
                let other_dir = dir(&mut s, other)?;
                match (is_dir, other_dir) {
                    (true, false) => return Err(VfsError::NotDirectory),
                    (false, true) => return Err(VfsError::IsDirectory),
                    (true, true) if !s.node(other)?.entries.is_empty() => return Err(VfsError::NotEmpty),
                    _ => {}
                }
                s.node(to)?.entries.remove(&key(to_name));
                s.touch_dir(to, -i32::from(other_dir))?;
                s.unlink_ino(other, if other_dir { 2 } else { 1 })?;
            }
            (_, None) => {}
        }
        s.node(parent)?.entries.remove(&key(name));
        s.node(to)?.entries.insert(key(to_name), ino);
        s.node(ino)?.parent = to;
        s.node(ino)?.attr.ctime = now();
        s.touch_dir(parent, -i32::from(is_dir))?;
        s.touch_dir(to, i32::from(is_dir))
    }

    fn open(&self, ino: Ino, _write: bool, truncate: bool) -> VfsResult<()> {
        let mut s = self.lock();
        let node = s.node(ino)?;
        node.opens += 1;
        if truncate {
            node.resize(0);
        }
        Ok(())
    }

    fn release(&self, ino: Ino) {
        let mut s = self.lock();
        if let Ok(node) = s.node(ino) {
            node.opens = node.opens.checked_sub(1).expect("more released than opened");
        }
        s.reap(ino);
    }

    fn flush(&self, _ino: Ino) -> VfsResult<()> {
        Ok(())
    }

    fn readdir(
        &self,
        ino: Ino,
        after: u64,
        plus: bool,
        emit: &mut dyn FnMut(&DirItem<'_>) -> bool,
    ) -> VfsResult<()> {
        let mut s = self.lock();
        let dots = [(1, b".".as_slice(), ino), (2, b"..".as_slice(), s.node(ino)?.parent)];
        for (cookie, name, ino) in dots {
            let item = DirItem { ino, kind: FileKind::Directory, cookie, name, attr: None };
            if after < cookie && !emit(&item) {
                return Ok(());
            }
        }
        let entries: Vec<_> =
            s.node(ino)?.entries.range((after + 1, vec![])..).map(|(k, v)| (k.clone(), *v)).collect();
        for ((cookie, name), ino) in entries {
            let node = s.node(ino)?;
            let attr = plus.then_some(node.attr);
            if !emit(&DirItem { ino, kind: node.attr.kind, cookie, name: &name, attr }) {
                break;
            }
            node.refs += u64::from(plus);
        }
        Ok(())
    }

    fn read(&self, ino: Ino, offset: u64, len: u32, wait: Wait) -> VfsResult<Bytes> {
        self.wait(ino, wait)?;
        Ok(self.lock().node(ino)?.get(offset, len.into()).into())
    }

    fn write(&self, ino: Ino, offset: u64, data: &[u8], wait: Wait) -> VfsResult<u32> {
        self.wait(ino, wait)?;
        self.lock().node(ino)?.put(offset, data);
        Ok(data.len() as u32)
    }

    fn fsync(&self, ino: Ino, _datasync: bool, wait: Wait) -> VfsResult<()> {
        self.wait(ino, wait)
    }

    fn fsyncdir(&self, ino: Ino, wait: Wait) -> VfsResult<()> {
        self.wait(ino, wait)
    }

    fn fallocate(&self, ino: Ino, how: Fallocate, offset: u64, len: u64, wait: Wait) -> VfsResult<()> {
        self.wait(ino, wait)?;
        let mut s = self.lock();
        let node = s.node(ino)?;
        let size = node.attr.size;
        if matches!(how, Fallocate::PunchHole | Fallocate::ZeroRange | Fallocate::ZeroRangeKeepSize) {
            node.zero(offset, offset + len);
        }
        if matches!(how, Fallocate::Allocate | Fallocate::ZeroRange) {
            node.attr.size = size.max(offset + len);
        }
        node.changed();
        Ok(())
    }

    fn lseek(&self, ino: Ino, offset: u64, seek: Seek) -> VfsResult<u64> {
        let mut s = self.lock();
        let node = s.node(ino)?;
        let size = node.attr.size;
        if offset >= size {
            return Err(VfsError::NoSuchOffset);
        }
        let mut at = offset;
        while at < size && node.pages.contains_key(&(at / PAGE)) != (seek == Seek::Data) {
            at = (at / PAGE + 1) * PAGE;
        }
        match seek {
            Seek::Data if at >= size => Err(VfsError::NoSuchOffset),
            _ => Ok(at.min(size)),
        }
    }

    fn copy_file_range(&self, src: Ino, soff: u64, dst: Ino, doff: u64, len: u64, w: Wait) -> VfsResult<u64> {
        self.wait(src, w)?;
        let mut s = self.lock();
        let data = s.node(src)?.get(soff, len);
        s.node(dst)?.put(doff, &data);
        Ok(data.len() as u64)
    }

    fn statfs(&self) -> VfsResult<StatFs> {
        Ok(StatFs {
            block_size: 4096,
            blocks: 1 << 20,
            free: 1 << 19,
            inodes: 1000,
            inodes_free: 900,
            name_max: 255,
        })
    }

    fn accessed(&self, _ino: Ino) {}

    fn getxattr(&self, ino: Ino, name: &[u8]) -> VfsResult<Bytes> {
        let mut s = self.lock();
        s.node(ino)?.xattrs.get(name).map(|v| Bytes::copy_from_slice(v)).ok_or(VfsError::NoAttribute)
    }

    fn setxattr(&self, ino: Ino, name: &[u8], value: &[u8], mode: XattrMode) -> VfsResult<()> {
        if name.starts_with(b"system.") {
            return Err(VfsError::NotSupported);
        }
        let mut s = self.lock();
        let node = s.node(ino)?;
        match (mode, node.xattrs.contains_key(name)) {
            (XattrMode::Create, true) => return Err(VfsError::Exists),
            (XattrMode::Replace, false) => return Err(VfsError::NoAttribute),
            _ => {}
        }
        node.xattrs.insert(name.to_vec(), value.to_vec());
        node.attr.ctime = now();
        Ok(())
    }

    fn listxattr(&self, ino: Ino) -> VfsResult<Vec<Vec<u8>>> {
        Ok(self.lock().node(ino)?.xattrs.keys().cloned().collect())
    }

    fn removexattr(&self, ino: Ino, name: &[u8]) -> VfsResult<()> {
        let mut s = self.lock();
        let node = s.node(ino)?;
        node.xattrs.remove(name).ok_or(VfsError::NoAttribute)?;
        node.attr.ctime = now();
        Ok(())
    }
}
