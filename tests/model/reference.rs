//! The filesystem as it should be: a tree in memory, written to be obviously right, not fast.
//!
//! Knows POSIX rules and the kernel's protocol (references, opens). Knows nothing of the code under test but its words
//! (`vfs::types`).

use std::collections::BTreeMap;
use std::sync::Arc;

use mirrorfs::ids::Ino;
use mirrorfs::vfs::types::{
    Caller, Fallocate, FileKind, RenameMode, SetAttr, SetTime, Time, VfsError, XattrMode,
};

const PAGE: u64 = 4096;
const ZEROS: [u8; PAGE as usize] = [0; PAGE as usize];
const SIZE_MAX: u64 = i64::MAX as u64;

type Result<T> = std::result::Result<T, VfsError>;

/// A file's bytes: pages that were written; all else is zeros.
#[derive(Clone, Default)]
pub struct Content {
    pub size: u64,
    pages: BTreeMap<u64, Arc<[u8; PAGE as usize]>>,
}

impl Content {
    pub fn read(&self, offset: u64, len: u64) -> Vec<u8> {
        let end = offset.saturating_add(len).min(self.size);
        if end <= offset {
            return Vec::new();
        }
        let mut out = vec![0; (end - offset) as usize];
        for (n, page) in self.pages.range(offset / PAGE..end.div_ceil(PAGE)) {
            let (from, to) = ((n * PAGE).max(offset), ((n + 1) * PAGE).min(end));
            if from < to {
                out[(from - offset) as usize..(to - offset) as usize]
                    .copy_from_slice(&page[(from - n * PAGE) as usize..(to - n * PAGE) as usize]);
            }
        }
        out
    }

    pub fn write(&mut self, offset: u64, data: &[u8]) {
        let mut done = 0;
        while done < data.len() {
            let at = offset + done as u64;
            let within = (at % PAGE) as usize;
            let n = (PAGE as usize - within).min(data.len() - done);
            let page = self.pages.entry(at / PAGE).or_insert_with(|| Arc::new([0; PAGE as usize]));
            Arc::make_mut(page)[within..within + n].copy_from_slice(&data[done..done + n]);
            done += n;
        }
        self.size = self.size.max(offset + data.len() as u64);
    }

    /// Zeros `[from, to)`, as far as it lies within the file.
    pub fn zero(&mut self, from: u64, to: u64) {
        let to = to.min(self.size);
        if from >= to {
            return;
        }
        let touched: Vec<u64> = self.pages.range(from / PAGE..to.div_ceil(PAGE)).map(|(n, _)| *n).collect();
        for n in touched {
            let (start, end) = ((n * PAGE).max(from) - n * PAGE, ((n + 1) * PAGE).min(to) - n * PAGE);
            if end - start == PAGE {
                self.pages.remove(&n);
            } else if let Some(page) = self.pages.get_mut(&n) {
                Arc::make_mut(page)[start as usize..end as usize].fill(0);
            }
        }
    }

    pub fn truncate(&mut self, size: u64) {
        self.zero(size, self.size);
        self.size = size;
    }

    /// Offsets of pages that may differ from zeros.
    pub fn pages(&self) -> impl Iterator<Item = u64> + '_ {
        self.pages.keys().map(|n| n * PAGE)
    }

    /// Whether all of `[from, to)` within the file is zeros.
    pub fn is_zero(&self, from: u64, to: u64) -> bool {
        let to = to.min(self.size);
        self.pages.range(from / PAGE..to.div_ceil(PAGE).max(from / PAGE)).all(|(n, page)| {
            let (start, end) = ((n * PAGE).max(from), ((n + 1) * PAGE).min(to));
            start >= end || {
                let part = &page[(start - n * PAGE) as usize..(end - n * PAGE) as usize];
                part == &ZEROS[..part.len()]
            }
        })
    }

    pub fn same(&self, other: &Content) -> bool {
        self.size == other.size
            && self.pages.keys().chain(other.pages.keys()).all(|n| {
                let zeros = Arc::new([0; PAGE as usize]);
                let a = self.pages.get(n).unwrap_or(&zeros);
                let b = other.pages.get(n).unwrap_or(&zeros);
                Arc::ptr_eq(a, b) || a == b
            })
    }
}

#[derive(Clone)]
pub enum Body {
    File(Content),
    Dir(BTreeMap<Vec<u8>, Ino>),
    Link(Vec<u8>),
    Other,
}

/// Everything of an inode that `stat` shows, but its size and its number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Meta {
    pub kind: FileKind,
    pub perm: u16,
    pub nlink: u32,
    pub uid: u32,
    pub gid: u32,
    pub rdev: u32,
    pub atime: Time,
    pub mtime: Time,
    pub ctime: Time,
    pub btime: Time,
}

#[derive(Clone)]
pub struct Node {
    pub meta: Meta,
    pub xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    pub body: Body,
    pub parent: Ino,
    pub refs: u64,
    pub opens: u64,
}

impl Node {
    pub fn size(&self) -> u64 {
        match &self.body {
            Body::File(c) => c.size,
            Body::Dir(_) => 4096,
            Body::Link(t) => t.len() as u64,
            Body::Other => 0,
        }
    }

    pub fn content(&self) -> Option<&Content> {
        match &self.body {
            Body::File(c) => Some(c),
            _ => None,
        }
    }

    pub fn entries(&self) -> Option<&BTreeMap<Vec<u8>, Ino>> {
        match &self.body {
            Body::Dir(e) => Some(e),
            _ => None,
        }
    }

    fn is_used(&self) -> bool {
        self.refs > 0 || self.opens > 0
    }
}

/// What a new inode begins with.
pub struct New<'a> {
    pub kind: FileKind,
    pub perm: u16,
    pub rdev: u32,
    pub target: &'a [u8],
}

/// The whole filesystem.
#[derive(Clone)]
pub struct Model {
    pub nodes: BTreeMap<Ino, Node>,
    /// The clock.
    pub now: Time,
}

impl Model {
    pub fn new(root: Meta) -> Self {
        let root = Node {
            meta: root,
            xattrs: BTreeMap::new(),
            body: Body::Dir(BTreeMap::new()),
            parent: Ino::ROOT,
            refs: 1,
            opens: 0,
        };
        Self { nodes: BTreeMap::from([(Ino::ROOT, root)]), now: Time::default() }
    }

    pub fn node(&self, ino: Ino) -> Result<&Node> {
        self.nodes.get(&ino).ok_or(VfsError::Stale)
    }

    fn node_mut(&mut self, ino: Ino) -> Result<&mut Node> {
        self.nodes.get_mut(&ino).ok_or(VfsError::Stale)
    }

    /// The entries of a directory that may get or lose names.
    fn dir(&self, ino: Ino) -> Result<&BTreeMap<Vec<u8>, Ino>> {
        let node = self.nodes.get(&ino).ok_or(VfsError::NotFound)?;
        let entries = node.entries().ok_or(VfsError::NotDirectory)?;
        if node.meta.nlink == 0 { Err(VfsError::NotFound) } else { Ok(entries) }
    }

    pub fn find(&self, parent: Ino, name: &[u8]) -> Option<Ino> {
        self.nodes.get(&parent)?.entries()?.get(name).copied()
    }

    fn set_entry(&mut self, parent: Ino, name: &[u8], ino: Option<Ino>) {
        let now = self.now;
        let Some(dir) = self.nodes.get_mut(&parent) else { return };
        if let Body::Dir(entries) = &mut dir.body {
            match ino {
                Some(ino) => entries.insert(name.to_vec(), ino),
                None => entries.remove(name),
            };
        }
        dir.meta.mtime = now;
        dir.meta.ctime = now;
    }

    /// Counts all links anew: a link count is what the tree says it is.
    fn recount(&mut self) {
        let mut links: BTreeMap<Ino, u32> = BTreeMap::new();
        let mut subdirs: BTreeMap<Ino, u32> = BTreeMap::new();
        for (ino, node) in &self.nodes {
            for child in node.entries().into_iter().flat_map(|e| e.values()) {
                *links.entry(*child).or_default() += 1;
                if self.nodes[child].entries().is_some() {
                    *subdirs.entry(*ino).or_default() += 1;
                }
            }
        }
        for (ino, node) in &mut self.nodes {
            let names = links.get(ino).copied().unwrap_or(0);
            node.meta.nlink = match node.body {
                Body::Dir(_) if names == 0 && *ino != Ino::ROOT => 0,
                Body::Dir(_) => 2 + subdirs.get(ino).copied().unwrap_or(0),
                _ => names,
            };
        }
    }

    /// Forgets inodes that nothing leads to.
    pub fn sweep(&mut self) {
        self.nodes.retain(|_, n| n.meta.nlink > 0 || n.is_used());
    }

    /// What a restart leaves: no references, no opens, no inodes without names.
    pub fn restart(&mut self) {
        for node in self.nodes.values_mut() {
            node.refs = 0;
            node.opens = 0;
        }
        self.sweep();
    }

    fn check_name(name: &[u8]) -> Result<()> {
        match name {
            n if n.len() > 255 => Err(VfsError::NameTooLong),
            b"" | b"." | b".." => Err(VfsError::Invalid),
            n if n.contains(&b'/') || n.contains(&0) => Err(VfsError::Invalid),
            _ => Ok(()),
        }
    }

    /// Makes an inode; `ino` is the number that the code under test gave. Called with `None` when that failed.
    pub fn make(
        &mut self,
        parent: Ino,
        name: &[u8],
        new: &New<'_>,
        caller: &Caller,
        ino: Option<Ino>,
    ) -> Result<()> {
        if new.kind == FileKind::Symlink {
            match new.target.len() {
                0 => return Err(VfsError::NotFound),
                4096.. => return Err(VfsError::NameTooLong),
                _ => {}
            }
        }
        Self::check_name(name)?;
        if self.dir(parent)?.contains_key(name) {
            return Err(VfsError::Exists);
        }
        let Some(ino) = ino else { return Ok(()) };
        let dir = self.nodes[&parent].meta;
        let inherits = dir.perm & 0o2000 != 0;
        let is_dir = new.kind == FileKind::Directory;
        let now = self.now;
        let meta = Meta {
            kind: new.kind,
            perm: new.perm | if inherits && is_dir { 0o2000 } else { 0 },
            nlink: 0,
            uid: caller.uid,
            gid: if inherits { dir.gid } else { caller.gid },
            rdev: new.rdev,
            atime: now,
            mtime: now,
            ctime: now,
            btime: now,
        };
        let body = match new.kind {
            FileKind::Regular => Body::File(Content::default()),
            FileKind::Directory => Body::Dir(BTreeMap::new()),
            FileKind::Symlink => Body::Link(new.target.to_vec()),
            _ => Body::Other,
        };
        let parent_of = if is_dir { parent } else { Ino(0) };
        self.nodes
            .insert(ino, Node { meta, xattrs: BTreeMap::new(), body, parent: parent_of, refs: 1, opens: 0 });
        self.set_entry(parent, name, Some(ino));
        self.recount();
        Ok(())
    }

    pub fn lookup(&mut self, parent: Ino, name: &[u8]) -> Result<Ino> {
        if name.len() > 255 {
            return Err(VfsError::NameTooLong);
        }
        let ino = match name {
            b"." => parent,
            b".." => self.node(parent)?.parent,
            _ => self.find(parent, name).ok_or(VfsError::NotFound)?,
        };
        self.nodes.get_mut(&ino).ok_or(VfsError::NotFound)?.refs += 1;
        Ok(ino)
    }

    pub fn forget(&mut self, ino: Ino, n: u64) {
        if let Some(node) = self.nodes.get_mut(&ino) {
            node.refs = node.refs.saturating_sub(n);
        }
        self.sweep();
    }

    pub fn release(&mut self, ino: Ino) {
        if let Some(node) = self.nodes.get_mut(&ino) {
            node.opens -= 1;
        }
        self.sweep();
    }

    pub fn open(&mut self, ino: Ino, truncate: bool) -> Result<()> {
        if self.node(ino)?.entries().is_some() {
            return Err(VfsError::IsDirectory);
        }
        if truncate {
            self.setattr(ino, &SetAttr { size: Some(0), mtime: Some(SetTime::Now), ..SetAttr::default() })?;
        }
        self.node_mut(ino)?.opens += 1;
        Ok(())
    }

    pub fn link(&mut self, ino: Ino, parent: Ino, name: &[u8]) -> Result<()> {
        Self::check_name(name)?;
        let node = self.node(ino)?;
        if node.entries().is_some() {
            return Err(VfsError::NotPermitted);
        }
        let nlink = node.meta.nlink;
        if self.dir(parent)?.contains_key(name) {
            return Err(VfsError::Exists);
        }
        if nlink == 0 {
            return Err(VfsError::NotFound);
        }
        self.set_entry(parent, name, Some(ino));
        let now = self.now;
        let node = self.node_mut(ino)?;
        node.meta.ctime = now;
        node.refs += 1;
        self.recount();
        Ok(())
    }

    pub fn unlink(&mut self, parent: Ino, name: &[u8]) -> Result<()> {
        let ino = self.find(parent, name).ok_or(VfsError::NotFound)?;
        if self.node(ino)?.entries().is_some() {
            return Err(VfsError::IsDirectory);
        }
        self.set_entry(parent, name, None);
        self.node_mut(ino)?.meta.ctime = self.now;
        self.recount();
        self.sweep();
        Ok(())
    }

    pub fn rmdir(&mut self, parent: Ino, name: &[u8]) -> Result<()> {
        match name {
            b"." => return Err(VfsError::Invalid),
            b".." => return Err(VfsError::NotEmpty),
            _ => {}
        }
        let ino = *self.dir(parent)?.get(name).ok_or(VfsError::NotFound)?;
        match self.node(ino)?.entries() {
            None => return Err(VfsError::NotDirectory),
            Some(e) if !e.is_empty() => return Err(VfsError::NotEmpty),
            Some(_) => {}
        }
        self.set_entry(parent, name, None);
        self.node_mut(ino)?.meta.ctime = self.now;
        self.recount();
        self.sweep();
        Ok(())
    }

    fn is_below(&self, dir: Ino, mut at: Ino) -> bool {
        loop {
            if at == dir {
                return true;
            }
            match self.nodes.get(&at) {
                Some(node) if at != Ino::ROOT => at = node.parent,
                _ => return false,
            }
        }
    }

    pub fn rename(&mut self, from: (Ino, &[u8]), to: (Ino, &[u8]), mode: RenameMode) -> Result<()> {
        Self::check_name(from.1)?;
        Self::check_name(to.1)?;
        let source = self.find(from.0, from.1).ok_or(VfsError::NotFound)?;
        let target = self.find(to.0, to.1);
        match (mode, target) {
            (RenameMode::NoReplace, Some(_)) => return Err(VfsError::Exists),
            (_, Some(t)) if t == source => return Ok(()),
            (RenameMode::Exchange, None) => return Err(VfsError::NotFound),
            _ => {}
        }
        self.dir(to.0)?;
        let is_dir = |ino: Ino| self.nodes[&ino].entries().is_some();
        if is_dir(source) && self.is_below(source, to.0) {
            return Err(VfsError::Invalid);
        }
        if let Some(target) = target {
            match mode {
                RenameMode::Exchange => {
                    if is_dir(target) && self.is_below(target, from.0) {
                        return Err(VfsError::Invalid);
                    }
                }
                _ => match (is_dir(source), is_dir(target)) {
                    (true, false) => return Err(VfsError::NotDirectory),
                    (false, true) => return Err(VfsError::IsDirectory),
                    (true, true) if !self.nodes[&target].entries().is_none_or(|e| e.is_empty()) => {
                        return Err(VfsError::NotEmpty);
                    }
                    _ => {}
                },
            }
        }
        let back = target.filter(|_| mode == RenameMode::Exchange);
        self.set_entry(from.0, from.1, back);
        self.set_entry(to.0, to.1, Some(source));
        for (ino, parent) in [(Some(source), Some(to.0)), (target, back.map(|_| from.0))] {
            if let Some(node) = ino.and_then(|i| self.nodes.get_mut(&i)) {
                node.meta.ctime = self.now;
                if let (Body::Dir(_), Some(parent)) = (&node.body, parent) {
                    node.parent = parent;
                }
            }
        }
        self.recount();
        self.sweep();
        Ok(())
    }

    pub fn setattr(&mut self, ino: Ino, set: &SetAttr) -> Result<()> {
        let now = self.now;
        if set.size.is_some_and(|s| s > SIZE_MAX) {
            return Err(VfsError::FileTooLarge);
        }
        let node = self.node_mut(ino)?;
        if let Some(size) = set.size {
            match &mut node.body {
                // Nothing changes, so no time does: the kernel would not show it either.
                Body::File(c)
                    if c.size == size && *set == SetAttr { size: set.size, ..SetAttr::default() } =>
                {
                    return Ok(());
                }
                Body::File(c) => c.truncate(size),
                Body::Dir(_) => return Err(VfsError::IsDirectory),
                _ => return Err(VfsError::Invalid),
            }
            node.meta.mtime = now;
        }
        let time = |t: SetTime| match t {
            SetTime::Now => now,
            SetTime::At(t) => t,
        };
        let m = &mut node.meta;
        m.perm = set.perm.unwrap_or(m.perm);
        m.uid = set.uid.unwrap_or(m.uid);
        m.gid = set.gid.unwrap_or(m.gid);
        m.atime = set.atime.map_or(m.atime, time);
        m.mtime = set.mtime.map_or(m.mtime, time);
        m.ctime = set.ctime.unwrap_or(now);
        Ok(())
    }

    fn content_mut(&mut self, ino: Ino, other: VfsError) -> Result<&mut Content> {
        match &mut self.node_mut(ino)?.body {
            Body::File(c) => Ok(c),
            Body::Dir(_) => Err(VfsError::IsDirectory),
            _ => Err(other),
        }
    }

    fn changed(&mut self, ino: Ino) {
        let now = self.now;
        if let Some(node) = self.nodes.get_mut(&ino) {
            node.meta.mtime = now;
            node.meta.ctime = now;
        }
    }

    pub fn write(&mut self, ino: Ino, offset: u64, data: &[u8]) -> Result<u32> {
        if offset.checked_add(data.len() as u64).is_none_or(|e| e > SIZE_MAX) {
            return Err(VfsError::FileTooLarge);
        }
        let content = self.content_mut(ino, VfsError::Invalid)?;
        if !data.is_empty() {
            content.write(offset, data);
            self.changed(ino);
        }
        Ok(data.len() as u32)
    }

    pub fn fallocate(&mut self, ino: Ino, how: Fallocate, offset: u64, len: u64) -> Result<()> {
        let end = offset.checked_add(len).filter(|e| *e <= SIZE_MAX).ok_or(VfsError::FileTooLarge)?;
        if len == 0 {
            return Err(VfsError::Invalid);
        }
        let content = self.content_mut(ino, VfsError::NoSuchOffset)?;
        match how {
            Fallocate::PunchHole | Fallocate::ZeroRangeKeepSize => content.zero(offset, end),
            Fallocate::ZeroRange => {
                content.zero(offset, end);
                content.size = content.size.max(end);
            }
            Fallocate::Allocate => content.size = content.size.max(end),
            Fallocate::KeepSize => {}
        }
        self.changed(ino);
        Ok(())
    }

    /// How many bytes a copy may give.
    pub fn can_copy(&self, from: (Ino, u64), to: (Ino, u64), len: u64) -> Result<u64> {
        let (source, target) = (self.node(from.0)?, self.node(to.0)?);
        if source.entries().is_some() || target.entries().is_some() {
            return Err(VfsError::IsDirectory);
        }
        let (Some(source), Some(_)) = (source.content(), target.content()) else {
            return Err(VfsError::Invalid);
        };
        let len = len.min(source.size.saturating_sub(from.1));
        if to.1.checked_add(len).is_none_or(|e| e > SIZE_MAX) {
            return Err(VfsError::FileTooLarge);
        }
        if from.0 == to.0 && from.1 < to.1 + len && to.1 < from.1 + len {
            return Err(VfsError::Invalid);
        }
        Ok(len)
    }

    /// Copies exactly `len` bytes.
    pub fn copy(&mut self, from: (Ino, u64), to: (Ino, u64), len: u64) {
        let data = self.nodes[&from.0].content().map(|c| c.read(from.1, len)).unwrap_or_default();
        if let (false, Ok(target)) = (data.is_empty(), self.content_mut(to.0, VfsError::Invalid)) {
            target.write(to.1, &data);
            self.changed(to.0);
        }
    }

    pub fn setxattr(&mut self, ino: Ino, name: &[u8], value: &[u8], mode: XattrMode) -> Result<()> {
        if name.is_empty() || name.len() > 255 {
            return Err(VfsError::Range);
        }
        if value.len() > 64 << 10 {
            return Err(VfsError::TooBig);
        }
        let now = self.now;
        let node = self.node_mut(ino)?;
        match (mode, node.xattrs.contains_key(name)) {
            (XattrMode::Create, true) => return Err(VfsError::Exists),
            (XattrMode::Replace, false) => return Err(VfsError::NoAttribute),
            _ => {}
        }
        node.xattrs.insert(name.to_vec(), value.to_vec());
        node.meta.ctime = now;
        Ok(())
    }

    pub fn removexattr(&mut self, ino: Ino, name: &[u8]) -> Result<()> {
        let now = self.now;
        let node = self.node_mut(ino)?;
        node.xattrs.remove(name).ok_or(VfsError::NoAttribute)?;
        node.meta.ctime = now;
        Ok(())
    }
}
