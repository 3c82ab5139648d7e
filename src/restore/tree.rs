//! The tree of names inside the tables: filtering, walking, listing.
//!
//! Owns paths. Knows no network and writes no files.

use std::collections::HashSet;
use std::fmt;

use bytes::Bytes;

use super::Tables;
use crate::format::codec::FormatError;
use crate::format::tables::{Body, FileKind, Inode};
use crate::ids::Ino;

#[cfg(test)]
mod tests;

/// Why a tree cannot be walked, or what is wrong in it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TreeError {
    /// A path of the filter is not there.
    #[error("{0}: no such file or directory in the volume")]
    NotFound(String),
    /// A path of the filter cannot be one.
    #[error("{0:?} is no path inside a volume (\"..\" is not allowed)")]
    BadPath(String),
    /// An entry of the tables cannot be read.
    #[error("{path}: {source}")]
    Format {
        /// Where it is.
        path: String,
        /// What is wrong.
        source: FormatError,
    },
    /// An entry contradicts another.
    #[error("{path}: {why}")]
    Inconsistent {
        /// Where it is.
        path: String,
        /// What is wrong.
        why: String,
    },
}

/// Which part of the tree is wanted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Filter {
    /// Paths as lists of names; no path means everything.
    paths: Vec<Vec<Vec<u8>>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wanted {
    /// It, and all below.
    All,
    /// Only as the way to something below.
    Way,
    Not,
}

impl Filter {
    /// Keeps the given paths (relative to the volume's root; a leading `/` is allowed) and all below them.
    pub fn new<P: AsRef<[u8]>>(paths: impl IntoIterator<Item = P>) -> Result<Self, TreeError> {
        let mut filter = Self::default();
        for path in paths {
            let path = path.as_ref();
            let names: Vec<Vec<u8>> = path
                .split(|b| *b == b'/')
                .filter(|name| !name.is_empty() && *name != b".")
                .map(<[u8]>::to_vec)
                .collect();
            if names.iter().any(|name| name == b".." || name.contains(&0)) {
                return Err(TreeError::BadPath(text(path)));
            }
            filter.paths.push(names);
        }
        if filter.paths.iter().any(Vec::is_empty) {
            filter.paths.clear();
        }
        Ok(filter)
    }

    fn wanted(&self, path: &[Bytes]) -> Wanted {
        let agrees = |wanted: &&Vec<Vec<u8>>| wanted.iter().zip(path).all(|(a, b)| a == b);
        if self.paths.is_empty() || self.paths.iter().filter(agrees).any(|p| p.len() <= path.len()) {
            Wanted::All
        } else if self.paths.iter().any(|p| agrees(&p)) {
            Wanted::Way
        } else {
            Wanted::Not
        }
    }
}

/// Bytes of a path or name as text for people; what is not UTF-8 is shown as such.
pub(crate) fn text(bytes: &[u8]) -> String {
    match std::str::from_utf8(bytes) {
        Ok(s) if !s.chars().any(char::is_control) => s.to_owned(),
        _ => bytes.escape_ascii().to_string(),
    }
}

/// One name in the tree.
#[derive(Clone, Debug)]
pub struct Entry {
    /// The names from the root down to it; empty for the root.
    pub path: Vec<Bytes>,
    /// Its inode number.
    pub ino: Ino,
    /// Its inode.
    pub inode: Inode,
    /// False when it is only on the way to something that the filter names.
    pub selected: bool,
}

impl Entry {
    /// The path with slashes between, without one in front.
    #[must_use]
    pub fn joined(&self) -> Vec<u8> {
        self.path.join(&b'/')
    }

    /// The path as text for people. Not cheap where the tree is deep.
    pub(super) fn shown(&self) -> String {
        text(&self.joined())
    }
}

/// Bytes of the longest name.
const LONGEST: usize = 255;

/// A name that a directory may hold; what else stands there could lead out of a target folder.
fn is_plain(name: &[u8]) -> bool {
    let is_length = (1..=LONGEST).contains(&name.len());
    is_length && name != b"." && name != b".." && !name.contains(&b'/') && !name.contains(&0)
}

/// Visits the wanted part of the tree, every directory before what is in it, all that is in it at once, and its names in byte order. What is wrong in
/// one place goes to `wrong` and the walk goes on. Fails when a path of the filter is not found.
pub fn walk(
    tables: &Tables,
    filter: &Filter,
    visit: &mut dyn FnMut(&Entry),
    wrong: &mut dyn FnMut(TreeError),
) -> Result<(), TreeError> {
    let mut walker = Walker { tables, filter, visit, wrong, found: HashSet::new(), visited: HashSet::new() };
    walker.run();
    for path in &filter.paths {
        if !walker.found.contains(path) {
            return Err(TreeError::NotFound(text(&path.join(&b'/'))));
        }
    }
    Ok(())
}

struct Walker<'a> {
    tables: &'a Tables,
    filter: &'a Filter,
    visit: &'a mut dyn FnMut(&Entry),
    wrong: &'a mut dyn FnMut(TreeError),
    found: HashSet<Vec<Vec<u8>>>,
    visited: HashSet<Ino>,
}

/// A name that is still to be visited.
struct Waiting {
    /// Names above it, the root's not counted.
    depth: usize,
    /// Empty for the root.
    name: Bytes,
    ino: Ino,
    kind: FileKind,
}

impl Walker<'_> {
    fn run(&mut self) {
        // An explicit stack: the depth of a tree is bounded by nothing but its author.
        let root = Waiting { depth: 0, name: Bytes::new(), ino: Ino::ROOT, kind: FileKind::Directory };
        let mut stack = vec![root];
        // The one path is changed in place: a copy for each entry would take the square of the depth.
        let mut path: Vec<Bytes> = Vec::new();
        if self.tables.is_empty() {
            return;
        }
        while let Some(next) = stack.pop() {
            path.truncate(next.depth.saturating_sub(1));
            if next.depth > 0 {
                path.push(next.name.clone());
            }
            let wanted = self.filter.wanted(&path);
            if wanted == Wanted::Not {
                continue;
            }
            match self.entry(&mut path, &next, wanted) {
                Ok(children) => stack.extend(children.into_iter().rev()),
                Err(e) => (self.wrong)(e),
            }
        }
    }

    fn entry(
        &mut self,
        path: &mut Vec<Bytes>,
        at: &Waiting,
        wanted: Wanted,
    ) -> Result<Vec<Waiting>, TreeError> {
        let ino = at.ino;
        let shown = || text(&path.join(&b'/'));
        let format = |source| TreeError::Format { path: shown(), source };
        let inconsistent = |why: String| TreeError::Inconsistent { path: shown(), why };
        let inode = self
            .tables
            .inode(ino)
            .map_err(format)?
            .ok_or_else(|| inconsistent(format!("inode {ino} is missing")))?;
        if inode.kind != at.kind {
            return Err(inconsistent(format!(
                "the name says {:?}, inode {ino} says {:?}",
                at.kind, inode.kind
            )));
        }
        let mut children = Vec::new();
        let is_directory = inode.kind == FileKind::Directory;
        if is_directory {
            // A directory has one name, so that no cycle is walked twice.
            if !self.visited.insert(ino) {
                return Err(inconsistent(format!("directory {ino} has two names")));
            }
            let (names, wrong) = self.tables.children(ino);
            wrong.into_iter().for_each(|why| (self.wrong)(inconsistent(why)));
            for (name, dirent) in names {
                if !is_plain(&name) {
                    (self.wrong)(inconsistent(format!("it holds the impossible name {:?}", text(&name))));
                    continue;
                }
                let depth = at.depth + 1;
                children.push(Waiting { depth, name, ino: dirent.ino, kind: dirent.kind });
            }
        }
        if wanted == Wanted::Way && !is_directory {
            return Ok(children);
        }
        let named = self
            .filter
            .paths
            .iter()
            .find(|p| p.len() == path.len() && p.iter().zip(&*path).all(|(a, b)| a == b));
        if let Some(named) = named {
            self.found.insert(named.clone());
        }
        let entry = Entry { path: std::mem::take(path), ino, inode, selected: wanted == Wanted::All };
        (self.visit)(&entry);
        *path = entry.path;
        Ok(children)
    }
}

/// One line of a listing; prints like `ls -l` and serializes for JSON.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Listed {
    /// The path, without a slash in front; what is not printable UTF-8 is escaped.
    pub path: String,
    /// The path's bytes in hexadecimal, only when `path` does not say them exactly.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path_hex: Option<String>,
    /// `file`, `directory`, `symlink`, `fifo`, `socket`, `char_device` or `block_device`.
    pub kind: &'static str,
    /// Bytes.
    pub size: u64,
    /// Permission bits.
    pub mode: u16,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Names that lead to the inode.
    pub nlink: u32,
    /// Last change of content, seconds since 1970.
    pub mtime: i64,
    /// Nanoseconds on top.
    pub mtime_nanos: u32,
    /// A symbolic link's target.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub target: Option<String>,
}

fn kind_name(kind: FileKind) -> &'static str {
    match kind {
        FileKind::Regular => "file",
        FileKind::Directory => "directory",
        FileKind::Symlink => "symlink",
        FileKind::Fifo => "fifo",
        FileKind::Socket => "socket",
        FileKind::CharDevice => "char_device",
        FileKind::BlockDevice => "block_device",
    }
}

impl Listed {
    fn new(entry: &Entry) -> Self {
        let joined = entry.joined();
        let path = text(&joined);
        let exact = path.as_bytes() == joined;
        Self {
            path_hex: (!exact).then(|| joined.iter().map(|b| format!("{b:02x}")).collect()),
            path,
            kind: kind_name(entry.inode.kind),
            size: entry.inode.size,
            mode: entry.inode.perm,
            uid: entry.inode.uid,
            gid: entry.inode.gid,
            nlink: entry.inode.nlink,
            mtime: entry.inode.mtime.secs,
            mtime_nanos: entry.inode.mtime.nanos,
            target: match &entry.inode.body {
                Body::Target(target) => Some(text(target)),
                Body::Blocks | Body::Inline(_) => None,
            },
        }
    }

    fn letters(&self) -> String {
        let first = match self.kind {
            "directory" => 'd',
            "symlink" => 'l',
            "fifo" => 'p',
            "socket" => 's',
            "char_device" => 'c',
            "block_device" => 'b',
            _ => '-',
        };
        let mut out = String::from(first);
        for (shift, special, letter) in [(6, 0o4000, 's'), (3, 0o2000, 's'), (0, 0o1000, 't')] {
            let bits = self.mode >> shift;
            out.push(if bits & 4 != 0 { 'r' } else { '-' });
            out.push(if bits & 2 != 0 { 'w' } else { '-' });
            out.push(match (self.mode & special != 0, bits & 1 != 0) {
                (false, false) => '-',
                (false, true) => 'x',
                (true, true) => letter,
                (true, false) => letter.to_ascii_uppercase(),
            });
        }
        out
    }

    fn time(&self) -> String {
        // `SystemTime` and the formatter know years 1970 to 9999 only; others are shown as seconds.
        let in_range = u64::try_from(self.mtime).ok().filter(|secs| *secs < 253_402_300_800);
        match in_range.and_then(|s| std::time::UNIX_EPOCH.checked_add(std::time::Duration::from_secs(s))) {
            Some(time) => humantime::format_rfc3339_seconds(time).to_string(),
            None => format!("@{}", self.mtime),
        }
    }
}

impl fmt::Display for Listed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let path = if self.path.is_empty() { "." } else { &self.path };
        let (letters, time) = (self.letters(), self.time());
        write!(f, "{letters} {:>5} {:>5} {:>12} {time:>20} {path}", self.uid, self.gid, self.size)?;
        match &self.target {
            Some(target) => write!(f, " -> {target}"),
            None => Ok(()),
        }
    }
}

/// Lists the wanted part of the tree, without the directories that only lead there.
pub fn list(
    tables: &Tables,
    filter: &Filter,
    emit: &mut dyn FnMut(Listed),
    wrong: &mut dyn FnMut(TreeError),
) -> Result<(), TreeError> {
    walk(
        tables,
        filter,
        &mut |entry| {
            if entry.selected {
                emit(Listed::new(entry))
            }
        },
        wrong,
    )
}
