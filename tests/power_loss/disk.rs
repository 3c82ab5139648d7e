//! A disk in memory: a tree of files and directories, and the list of everything that was ever done to it.
//!
//! Owns what an operation does and how it is noted. Knows nothing of what survives a power loss (`platter`), nor who asks
//! (`record`).

use std::collections::{BTreeMap, HashMap};
use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::{Arc, LazyLock};

/// A file or directory, never used for another one.
pub type Id = u64;
/// The top directory.
pub const ROOT: Id = 1;
/// What the kernel writes back as a whole.
pub const PAGE: usize = 4096;
/// What a disk writes as a whole.
pub const SECTOR: usize = 512;

pub type Page = Arc<[u8; PAGE]>;

static ZEROS: LazyLock<Page> = LazyLock::new(|| Arc::new([0; PAGE]));

/// A page of zeros, shared by all.
pub fn zero_page() -> Page {
    Arc::clone(&ZEROS)
}

fn page_of(bytes: [u8; PAGE]) -> Page {
    if bytes == [0; PAGE] { zero_page() } else { Arc::new(bytes) }
}

/// A file's bytes. A page that is missing is a hole.
#[derive(Clone, Default)]
pub struct Content {
    pub len: u64,
    pub pages: BTreeMap<u64, Page>,
}

/// The pieces of a range in pages: page, first byte in it, first byte of the range, length.
pub fn pieces(at: u64, len: usize) -> impl Iterator<Item = (u64, usize, usize, usize)> {
    let mut done = 0;
    std::iter::from_fn(move || {
        let from = at + done as u64;
        let (page, within) = (from / PAGE as u64, (from % PAGE as u64) as usize);
        let n = (PAGE - within).min(len - done);
        let piece = (n > 0).then_some((page, within, done, n));
        done += n;
        piece
    })
}

/// A page with some of its bytes replaced.
pub fn patched(old: Option<&Page>, within: usize, bytes: &[u8]) -> Page {
    let mut page = old.map_or([0; PAGE], |p| **p);
    page[within..within + bytes.len()].copy_from_slice(bytes);
    page_of(page)
}

impl Content {
    pub fn write(&mut self, at: u64, bytes: &[u8]) {
        for (page, within, from, n) in pieces(at, bytes.len()) {
            let new = patched(self.pages.get(&page), within, &bytes[from..from + n]);
            self.pages.insert(page, new);
        }
        self.len = self.len.max(at + bytes.len() as u64);
    }

    pub fn truncate(&mut self, len: u64) {
        if len < self.len {
            self.clear(len, self.len - len);
        }
        self.len = len;
    }

    /// Zeros; pages that lie within as a whole become holes. The length stays.
    pub fn clear(&mut self, at: u64, len: u64) {
        let end = at.saturating_add(len);
        let touched: Vec<u64> = self.pages.range(at / PAGE as u64..).map(|(n, _)| *n).collect();
        for n in touched {
            let first = n * PAGE as u64;
            if first >= end {
                break;
            }
            let (from, to) = (at.max(first) - first, end.min(first + PAGE as u64) - first);
            if to - from == PAGE as u64 {
                self.pages.remove(&n);
            } else {
                let zeros = vec![0; (to - from) as usize];
                let new = patched(self.pages.get(&n), from as usize, &zeros);
                self.pages.insert(n, new);
            }
        }
    }

    pub fn read(&self, at: u64, len: usize) -> Vec<u8> {
        let len = (self.len.saturating_sub(at)).min(len as u64) as usize;
        let mut out = vec![0; len];
        for (page, within, from, n) in pieces(at, len) {
            if let Some(p) = self.pages.get(&page) {
                out[from..from + n].copy_from_slice(&p[within..within + n]);
            }
        }
        out
    }

    /// Writes it to a real file, holes as holes.
    fn store(&self, path: &Path, mode: u32) {
        let file =
            fs::OpenOptions::new().write(true).create_new(true).mode(mode & 0o7777).open(path).unwrap();
        file.set_len(self.len).unwrap();
        let mut run: Vec<u8> = Vec::new();
        let mut start = 0;
        let flush = |run: &mut Vec<u8>, start: u64| {
            let n = run.len().min(self.len.saturating_sub(start) as usize);
            file.write_all_at(&run[..n], start).unwrap();
            run.clear();
        };
        for (n, page) in &self.pages {
            if Arc::ptr_eq(page, &ZEROS) {
                continue;
            }
            let at = n * PAGE as u64;
            if start + run.len() as u64 != at {
                flush(&mut run, start);
                start = at;
            }
            run.extend_from_slice(&page[..]);
        }
        flush(&mut run, start);
    }
}

/// What a thing is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kind {
    File,
    Dir,
    Link(OsString),
    /// Left out of disks that are made up.
    Socket,
}

/// A name in a directory.
pub type Place = (Id, OsString);

/// Something that was done.
#[derive(Clone, Debug)]
pub enum Op {
    /// A new file, directory or symbolic link.
    Create {
        place: Place,
        id: Id,
        kind: Kind,
        mode: u32,
    },
    Link {
        id: Id,
        place: Place,
    },
    /// Also of a directory.
    Unlink {
        id: Id,
        place: Place,
    },
    /// What was at `to` is replaced, or exchanged.
    Rename {
        id: Id,
        from: Place,
        to: Place,
        exchanged: Option<Id>,
    },
    Mode {
        id: Id,
        mode: u32,
    },
    Write {
        id: Id,
        at: u64,
        bytes: Bytes,
    },
    /// Cut or made longer.
    Truncate {
        id: Id,
        len: u64,
    },
    /// Zeros from `at` on, within the length.
    Clear {
        id: Id,
        at: u64,
        len: u64,
    },
    /// fsync or fdatasync, of a file or a directory. Noted when it is done.
    Sync {
        id: Id,
        data_only: bool,
    },
    /// Somebody looked at the clock.
    Tick,
}

/// Bytes of a write; zeros take no memory.
#[derive(Clone)]
pub enum Bytes {
    Zeros(usize),
    Some(Arc<[u8]>),
}

impl std::fmt::Debug for Bytes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Zeros(n) => write!(f, "{n} zeros"),
            Self::Some(b) => write!(f, "{} bytes", b.len()),
        }
    }
}

impl Bytes {
    pub fn new(bytes: &[u8]) -> Self {
        match bytes.iter().all(|b| *b == 0) {
            true => Self::Zeros(bytes.len()),
            false => Self::Some(bytes.into()),
        }
    }

    pub fn len(&self) -> usize {
        match self {
            Self::Zeros(n) => *n,
            Self::Some(b) => b.len(),
        }
    }

    pub fn with<T>(&self, f: impl FnOnce(&[u8]) -> T) -> T {
        match self {
            Self::Zeros(n) => f(&vec![0; *n]),
            Self::Some(b) => f(b),
        }
    }
}

/// A file or directory.
#[derive(Clone)]
pub struct Node {
    pub kind: Kind,
    pub mode: u32,
    pub names: BTreeMap<OsString, Id>,
    pub content: Content,
    pub nlink: u32,
}

impl Node {
    pub fn new(kind: Kind, mode: u32) -> Self {
        Self { kind, mode, names: BTreeMap::new(), content: Content::default(), nlink: 0 }
    }
}

/// A whole tree.
#[derive(Clone)]
pub struct Tree {
    pub nodes: HashMap<Id, Node>,
}

impl Tree {
    pub fn new() -> Self {
        Self { nodes: HashMap::from([(ROOT, Node::new(Kind::Dir, 0o755))]) }
    }

    pub fn node(&mut self, id: Id) -> &mut Node {
        self.nodes.get_mut(&id).unwrap()
    }

    fn name(&mut self, place: &Place, id: Id) {
        if let Some(old) = self.node(place.0).names.insert(place.1.clone(), id)
            && old != id
        {
            self.unname(old);
        }
    }

    /// Something lost a name; it stays, since it may be open.
    fn unname(&mut self, id: Id) {
        let node = self.node(id);
        node.nlink = node.nlink.saturating_sub(1);
    }

    pub fn apply(&mut self, op: &Op) {
        match op {
            Op::Create { place, id, kind, mode } => {
                let mut node = Node::new(kind.clone(), *mode);
                node.nlink = 1;
                self.nodes.insert(*id, node);
                self.name(place, *id);
            }
            Op::Link { id, place } => {
                self.node(*id).nlink += 1;
                self.name(place, *id);
            }
            Op::Unlink { id, place } => {
                self.node(place.0).names.remove(&place.1);
                self.unname(*id);
            }
            Op::Rename { id, from, to, exchanged } => {
                self.node(from.0).names.remove(&from.1);
                match exchanged {
                    Some(other) => {
                        self.node(from.0).names.insert(from.1.clone(), *other);
                        self.node(to.0).names.insert(to.1.clone(), *id);
                    }
                    None => self.name(to, *id),
                }
            }
            Op::Mode { id, mode } => self.node(*id).mode = *mode,
            Op::Write { id, at, bytes } => bytes.with(|b| self.node(*id).content.write(*at, b)),
            Op::Truncate { id, len } => self.node(*id).content.truncate(*len),
            Op::Clear { id, at, len } => self.node(*id).content.clear(*at, *len),
            Op::Sync { .. } | Op::Tick => {}
        }
    }

    /// Forgets what has no name any more. Only when nothing is open.
    pub fn sweep(&mut self) {
        let mut kept: std::collections::HashSet<Id> = [ROOT].into();
        let mut left = vec![ROOT];
        while let Some(id) = left.pop() {
            for child in self.nodes[&id].names.values() {
                if kept.insert(*child) {
                    left.push(*child);
                }
            }
        }
        self.nodes.retain(|id, _| kept.contains(id));
    }

    /// Writes everything into a real folder.
    pub fn store(&self, folder: &Path) {
        self.store_dir(ROOT, folder, &mut HashMap::new());
    }

    fn store_dir(&self, dir: Id, folder: &Path, written: &mut HashMap<Id, std::path::PathBuf>) {
        if !folder.is_dir() {
            fs::DirBuilder::new().mode(self.nodes[&dir].mode & 0o7777 | 0o700).create(folder).unwrap();
        }
        for (name, id) in &self.nodes[&dir].names {
            let (path, node) = (folder.join(name), &self.nodes[id]);
            if let Some(first) = written.get(id) {
                fs::hard_link(first, &path).unwrap();
                continue;
            }
            match &node.kind {
                Kind::Dir => self.store_dir(*id, &path, written),
                Kind::File => node.content.store(&path, node.mode),
                Kind::Link(target) => std::os::unix::fs::symlink(target, &path).unwrap(),
                Kind::Socket => continue,
            }
            if node.kind != Kind::Dir {
                written.insert(*id, path);
            }
        }
    }
}
