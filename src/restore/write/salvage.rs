//! Saving what changed: the files that a run of records touched, out of tables and content that are still at hand.
//!
//! Owns what counts as changed, and the report. Knows not where a block's content comes from: it asks a [`BlockContent`].
//! A file that cannot be had whole is kept under its name with `.incomplete` added, with holes where content is missing.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io;
use std::path::Path;

use bytes::Bytes;

use super::target::Target;
use super::{Problem, ProblemKind, RestoreError, xattrs};
use crate::format::record::{Op, Record};
use crate::format::tables::{Body, FileKind, Inode, number_of_key, split_dirent_key, table};
use crate::ids::{BlockId, Ino};
use crate::restore::tree::text;
use crate::restore::{Entry, Filter, Tables, walk};

/// Lists of names are kept up to so many lines.
const MOST_NAMES: usize = 100_000;

/// A stretch of a block that is not to be had.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MissingPiece {
    /// First byte, from the block's beginning.
    pub start: u32,
    /// Behind the last byte.
    pub end: u32,
    /// Why.
    pub why: String,
}

/// Gives the content of blocks. Blocking.
pub trait BlockContent {
    /// Fills `out` with the block's first bytes, zeros behind its end; answers what of it is missing (and left as it was).
    fn read(&self, block: BlockId, out: &mut [u8]) -> Vec<MissingPiece>;
}

/// A name in a directory.
type Place = (Ino, Bytes);

/// What a run of records changed.
#[derive(Clone, Debug, Default)]
pub struct Changes {
    /// Files whose content changed, or which are so small that it stands in the inode.
    content: BTreeSet<Ino>,
    /// Whatever else changed about an inode.
    other: BTreeSet<Ino>,
    /// Names that were made: nobody else knows them.
    made: BTreeSet<Place>,
    /// New names of what had another one before.
    renamed: BTreeMap<Place, Place>,
    removed: BTreeSet<Place>,
}

fn place_of(key: &[u8]) -> Option<Place> {
    let (_, name) = split_dirent_key(key)?;
    Some((Ino(number_of_key(key)?), Bytes::copy_from_slice(name)))
}

impl Changes {
    /// Takes the next record, in order.
    pub fn note(&mut self, record: &Record) {
        let (mut gone, mut new) = (Vec::new(), Vec::new());
        for op in &record.ops {
            let key = op.key();
            let ino = number_of_key(key).map(Ino);
            match (key.first().copied(), ino, op) {
                (Some(table::EXTENT), Some(ino), _) => _ = self.content.insert(ino),
                (Some(table::XATTR), Some(ino), _) => _ = self.other.insert(ino),
                (Some(table::INODE), Some(ino), Op::Put { value, .. }) => {
                    let inline = matches!(Inode::decode(value), Ok(i) if matches!(i.body, Body::Inline(_)));
                    if inline { &mut self.content } else { &mut self.other }.insert(ino);
                }
                (Some(table::DIRENT), _, Op::Put { .. }) => new.extend(place_of(key)),
                (Some(table::DIRENT), _, Op::Delete { .. }) => gone.extend(place_of(key)),
                _ => {}
            }
        }
        if let ([from], [to]) = (&gone[..], &new[..]) {
            self.rename(from.clone(), to.clone());
            return;
        }
        for place in gone {
            match self.renamed.remove(&place) {
                Some(origin) => _ = self.removed.insert(origin),
                None if self.made.remove(&place) => {}
                None => _ = self.removed.insert(place),
            }
        }
        self.made.extend(new);
    }

    fn rename(&mut self, from: Place, to: Place) {
        let origin = match self.renamed.remove(&from) {
            Some(origin) => Some(origin),
            None if self.made.remove(&from) => None,
            None => Some(from),
        };
        // What had the name is replaced.
        self.renamed.remove(&to);
        self.made.remove(&to);
        match origin {
            Some(origin) if origin == to => {}
            Some(origin) => _ = self.renamed.insert(to, origin),
            None => _ = self.made.insert(to),
        }
    }
}

/// What is to be saved.
pub enum Wanted<'a> {
    /// Everything.
    All,
    /// What changed.
    Changed(&'a Changes),
}

/// A file of which something is missing.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Incomplete {
    /// Its path in the volume; it was saved with `.incomplete` added.
    pub path: String,
    /// The missing ranges: first byte, and the one behind the last.
    pub missing: Vec<(u64, u64)>,
    /// Why the first of them is missing.
    pub why: String,
}

/// What was saved.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Saved {
    /// Files, links and special files that were saved whole.
    pub files: u64,
    /// Bytes of content.
    pub bytes: u64,
    /// Files that were not.
    pub incomplete: Vec<Incomplete>,
    /// Files whose content did not change, but something else about them; they were not saved.
    pub attributes: Vec<String>,
    /// New and old path of what was renamed.
    pub renamed: Vec<(String, String)>,
    /// Paths that were removed.
    pub removed: Vec<String>,
    /// What else went wrong.
    pub problems: Vec<Problem>,
}

/// Saves what is `wanted` of the volume in `tables` below the folder `to`. `block_size` is that of the volume in bytes.
/// `progress` is called with the files and bytes saved so far.
pub fn save(
    tables: &Tables,
    wanted: &Wanted<'_>,
    content: &dyn BlockContent,
    to: &Path,
    block_size: u32,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Saved, RestoreError> {
    let target = Target::open(to).map_err(|source| RestoreError::Target { path: to.to_owned(), source })?;
    let mut work = Work {
        tables,
        content,
        block: vec![0; block_size as usize],
        target,
        made: HashMap::from([(Vec::new(), 0)]),
        above: Vec::new(),
        links: HashMap::new(),
        paths: HashMap::new(),
        saved: Saved::default(),
        progress,
    };
    let mut wrong = Vec::new();
    walk(tables, &Filter::default(), &mut |entry| work.visit(entry, wanted), &mut |e| wrong.push(e))?;
    for e in wrong {
        work.problem(String::new(), ProblemKind::Damaged, e.to_string());
    }
    if let Wanted::Changed(changes) = wanted {
        work.names(changes);
    }
    work.finish();
    Ok(work.saved)
}

struct Work<'a> {
    tables: &'a Tables,
    content: &'a dyn BlockContent,
    block: Vec<u8>,
    target: Target,
    /// Directories that were made, with their numbers in the target.
    made: HashMap<Vec<Bytes>, usize>,
    /// The directories on the way to what is visited now.
    above: Vec<(Bytes, Ino)>,
    /// First name of each saved inode that has several.
    links: HashMap<Ino, (usize, Bytes)>,
    /// Paths of all directories.
    paths: HashMap<Ino, String>,
    saved: Saved,
    progress: &'a mut dyn FnMut(u64, u64),
}

impl Work<'_> {
    fn problem(&mut self, path: String, kind: ProblemKind, text: impl Into<String>) {
        self.saved.problems.push(Problem { path, kind, text: text.into() });
    }

    fn visit(&mut self, entry: &Entry, wanted: &Wanted<'_>) {
        let shown = text(&entry.joined());
        let Some((name, parent)) = entry.path.split_last() else {
            self.paths.insert(entry.ino, String::new());
            if self.target.created_root() {
                self.target.keep_attributes(0, entry.ino);
            }
            return;
        };
        self.above.truncate(parent.len());
        let is_dir = entry.inode.kind == FileKind::Directory;
        if is_dir {
            self.paths.insert(entry.ino, format!("{shown}/"));
            self.above.push((name.clone(), entry.ino));
        }
        match wanted {
            Wanted::All => {}
            Wanted::Changed(c) if c.content.contains(&entry.ino) => {}
            Wanted::Changed(c) if !c.other.contains(&entry.ino) => return,
            // Content in blocks that did not change.
            Wanted::Changed(_) if self.has_blocks(entry) => return self.saved.attributes.push(shown),
            Wanted::Changed(_) => {}
        }
        if let Err(e) = self.make(entry, name, parent.len(), &shown) {
            self.problem(shown, ProblemKind::Failed, e.to_string());
        }
        (self.progress)(self.saved.files, self.saved.bytes);
    }

    fn has_blocks(&self, entry: &Entry) -> bool {
        let in_blocks = entry.inode.kind == FileKind::Regular && entry.inode.body == Body::Blocks;
        in_blocks && self.tables.blocks(entry.ino).map_or(true, |blocks| !blocks.is_empty())
    }

    /// The number of the directory `depth` levels down the way to what is visited now; made when it is not there yet.
    fn dir(&mut self, depth: usize) -> io::Result<usize> {
        let mut at = 0;
        for level in 1..=depth {
            let path: Vec<Bytes> = self.above[..level].iter().map(|(name, _)| name.clone()).collect();
            at = match self.made.get(&path) {
                Some(number) => *number,
                None => {
                    let (name, ino) = self.above[level - 1].clone();
                    let (number, _) = self.target.make_dir(at, &name)?;
                    self.target.keep_attributes(number, ino);
                    self.made.insert(path, number);
                    number
                }
            };
        }
        Ok(at)
    }

    fn make(&mut self, entry: &Entry, name: &Bytes, depth: usize, shown: &str) -> io::Result<()> {
        if entry.inode.kind == FileKind::Directory {
            return self.dir(depth + 1).map(|_| ());
        }
        let dir = self.dir(depth)?;
        if let Some((first_dir, first)) = self.links.get(&entry.ino).cloned() {
            self.target.link((first_dir, &first), (dir, name), false)?;
            self.saved.files += 1;
            return Ok(());
        }
        let device = matches!(entry.inode.kind, FileKind::CharDevice | FileKind::BlockDevice);
        if device && !self.target.is_root() {
            self.problem(shown.to_owned(), ProblemKind::Skipped, "device nodes can be saved by root only");
            return Ok(());
        }
        let xattrs = xattrs(self.tables, entry.ino);
        let trouble = match (entry.inode.kind, &entry.inode.body) {
            (FileKind::Regular, _) => {
                if !self.file(entry, dir, name, shown)? {
                    return Ok(());
                }
                self.target.finish_file(dir, name, &entry.inode, &xattrs)
            }
            (FileKind::Symlink, Body::Target(to)) => {
                self.target.symlink(dir, name, to, false)?;
                self.target.finish_special(dir, name, &entry.inode, &xattrs)
            }
            (FileKind::Symlink, _) => return Err(io::Error::other("a symbolic link without target")),
            _ => {
                self.target.special(dir, name, &entry.inode, false)?;
                self.target.finish_special(dir, name, &entry.inode, &xattrs)
            }
        };
        for text in trouble {
            self.problem(shown.to_owned(), ProblemKind::Attribute, text);
        }
        if entry.inode.nlink > 1 {
            self.links.insert(entry.ino, (dir, name.clone()));
        }
        self.saved.files += 1;
        Ok(())
    }

    /// Writes a file's content; answers whether it is whole. One that is not gets another name.
    fn file(&mut self, entry: &Entry, dir: usize, name: &Bytes, shown: &str) -> io::Result<bool> {
        let size = entry.inode.size;
        self.target.create_file(dir, name, size, false)?;
        let mut missing: Vec<(u64, u64)> = Vec::new();
        let mut why = String::new();
        match &entry.inode.body {
            Body::Inline(content) => {
                let content = &content[..content.len().min(usize::try_from(size).unwrap_or(usize::MAX))];
                self.target.write(dir, name, 0, content)?;
                self.saved.bytes += content.len() as u64;
            }
            Body::Target(_) => return Err(io::Error::other("a file with a link's target")),
            Body::Blocks => {
                let blocks = self.tables.blocks(entry.ino).map_err(io::Error::other)?;
                let block_size = self.block.len() as u64;
                for (index, id) in blocks {
                    let offset = index.saturating_mul(block_size);
                    if offset >= size {
                        continue;
                    }
                    let mut block = std::mem::take(&mut self.block);
                    let part = &mut block[..block_size.min(size - offset) as usize];
                    part.fill(0);
                    let lacks = self.content.read(id, part);
                    // What is missing stays a hole.
                    let (mut start, mut written) = (0, Ok(()));
                    for piece in &lacks {
                        let (from, to) = (piece.start as usize, (piece.end as usize).min(part.len()));
                        if from.max(start) >= to {
                            continue;
                        }
                        let before = &part[start..from.max(start)];
                        written = written.and(self.target.write(dir, name, offset + start as u64, before));
                        let (lost_from, lost_to) = (offset + from as u64, offset + to as u64);
                        match missing.last_mut() {
                            Some(last) if last.1 == lost_from => last.1 = lost_to,
                            _ => missing.push((lost_from, lost_to)),
                        }
                        if why.is_empty() {
                            why.clone_from(&piece.why);
                        }
                        start = to;
                    }
                    written =
                        written.and(self.target.write(dir, name, offset + start as u64, &part[start..]));
                    self.saved.bytes += part.len() as u64;
                    self.block = block;
                    written?;
                }
            }
        }
        if missing.is_empty() {
            return Ok(true);
        }
        self.saved.bytes -= missing.iter().map(|(from, to)| to - from).sum::<u64>().min(self.saved.bytes);
        let xattrs = xattrs(self.tables, entry.ino);
        for text in self.target.finish_file(dir, name, &entry.inode, &xattrs) {
            self.problem(shown.to_owned(), ProblemKind::Attribute, text);
        }
        self.target.mark(dir, name, "incomplete")?;
        self.saved.incomplete.push(Incomplete { path: shown.to_owned(), missing, why });
        Ok(false)
    }

    /// Lists what happened to names.
    fn names(&mut self, changes: &Changes) {
        let shown = |(dir, name): &Place| match self.paths.get(dir) {
            Some(dir) => format!("{dir}{}", text(name)),
            None => format!("(a directory that is gone)/{}", text(name)),
        };
        let renamed = changes.renamed.iter().take(MOST_NAMES).map(|(to, from)| (shown(to), shown(from)));
        let removed = changes.removed.iter().take(MOST_NAMES).map(shown);
        let (renamed, removed) = (renamed.collect(), removed.collect());
        self.saved.renamed = renamed;
        self.saved.removed = removed;
    }

    fn finish(&mut self) {
        for (dir, ino) in self.target.kept_attributes() {
            let path = text(self.target.path_of(dir).strip_suffix(b"/").unwrap_or_default());
            if let Ok(Some(inode)) = self.tables.inode(ino) {
                for text in self.target.finish_dir(dir, &inode, &xattrs(self.tables, ino)) {
                    self.problem(path.clone(), ProblemKind::Attribute, text);
                }
            }
        }
        if let Some(text) = self.target.owner_note() {
            self.problem(String::new(), ProblemKind::Attribute, text);
        }
        if let Err(e) = self.target.sync() {
            self.problem(String::new(), ProblemKind::Failed, format!("the files may not be on disk: {e}"));
        }
    }
}

impl Saved {
    /// The report as text for people, to lie beside the files.
    #[must_use]
    pub fn list(&self) -> String {
        use std::fmt::Write;
        let mut out = String::new();
        let _ = writeln!(out, "Saved: {} files, {} bytes of content.", self.files, self.bytes);
        let mut part = |title: &str, lines: Vec<String>| {
            if !lines.is_empty() {
                let _ = writeln!(out, "\n{title}:");
                lines.iter().for_each(|line| _ = writeln!(out, "  {}", crate::escape::line(line)));
            }
        };
        let ranges = |i: &Incomplete| {
            let ranges: Vec<_> = i.missing.iter().map(|(from, to)| format!("{from}..{to}")).collect();
            format!("{} lacks bytes {}: {}", i.path, ranges.join(", "), i.why)
        };
        part("Incomplete, saved with .incomplete added", self.incomplete.iter().map(ranges).collect());
        part("Renamed", self.renamed.iter().map(|(to, from)| format!("{from} -> {to}")).collect());
        part("Removed", self.removed.clone());
        part("Changed in something but content, and not saved", self.attributes.clone());
        let trouble = |p: &Problem| format!("{}: {}", p.path, p.text);
        part("Trouble", self.problems.iter().map(trouble).collect());
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::tables::{Dirent, Extents, Time, block_key, dirent_key, extent_key, inode_key};
    use crate::ids::Lsn;
    use crate::restore::Sink;

    fn inode(kind: FileKind, size: u64, body: Body) -> Bytes {
        Inode {
            nlink: 1,
            size,
            mtime: Time { secs: 1_700_000_000, nanos: 5 },
            parent: Ino::ROOT,
            body,
            ..Inode::new(kind, 0o700, (0, 0), Time::default())
        }
        .encode()
    }

    fn named(dir: u64, name: &str, ino: u64, kind: FileKind) -> Op {
        Op::put(dirent_key(Ino(dir), name.as_bytes()), Dirent { ino: Ino(ino), kind }.encode())
    }

    fn blocks(ids: &[u64]) -> Bytes {
        let mut all = [BlockId(0); 64];
        all.iter_mut().zip(ids).for_each(|(block, id)| *block = BlockId(*id));
        Extents(all).encode()
    }

    fn record(lsn: u64, ops: Vec<Op>) -> Record {
        Record { lsn: Lsn(lsn), ops }
    }

    /// Block 7 is whole, of block 8 a piece is missing.
    struct Blocks;

    impl BlockContent for Blocks {
        fn read(&self, block: BlockId, out: &mut [u8]) -> Vec<MissingPiece> {
            out.fill(block.0 as u8);
            match block {
                BlockId(7) => Vec::new(),
                _ => vec![MissingPiece { start: 10, end: 20, why: "nobody has it".into() }],
            }
        }
    }

    #[test]
    fn what_changed_is_saved_and_what_is_missing_is_named() {
        let root = Ino::ROOT.0;
        let dir = FileKind::Directory;
        let file = FileKind::Regular;
        let old = vec![
            Op::put(inode_key(Ino::ROOT), inode(dir, 0, Body::Blocks)),
            named(root, "d", 10, dir),
            Op::put(inode_key(Ino(10)), inode(dir, 0, Body::Blocks)),
            named(root, "untouched", 11, file),
            Op::put(inode_key(Ino(11)), inode(file, 3, Body::Inline("old".into()))),
            named(10, "whole", 12, file),
            Op::put(inode_key(Ino(12)), inode(file, 100, Body::Blocks)),
            named(10, "half", 13, file),
            named(root, "chmodded", 14, file),
            Op::put(extent_key(Ino(14), 0), blocks(&[7])),
            named(root, "gone", 15, file),
            named(root, "b", 16, file),
            Op::put(inode_key(Ino(16)), inode(file, 3, Body::Inline("abc".into()))),
        ];
        let new = [
            vec![Op::put(extent_key(Ino(12), 0), blocks(&[7]))],
            vec![
                Op::put(extent_key(Ino(13), 0), blocks(&[7, 8])),
                Op::put(inode_key(Ino(13)), inode(file, 65536 + 40, Body::Blocks)),
            ],
            vec![Op::put(inode_key(Ino(14)), inode(file, 100, Body::Blocks))],
            vec![Op::delete(dirent_key(Ino::ROOT, b"gone")), Op::delete(block_key(BlockId(3)))],
            // An editor: a temporary file that takes a name.
            vec![named(root, "tmp", 17, file)],
            vec![Op::put(inode_key(Ino(17)), inode(file, 3, Body::Inline("new".into())))],
            vec![Op::delete(dirent_key(Ino::ROOT, b"tmp")), named(root, "edited", 17, file)],
            vec![Op::delete(dirent_key(Ino::ROOT, b"b")), named(10, "c", 16, file)],
            vec![Op::delete(dirent_key(Ino(10), b"c")), named(root, "d2", 16, file)],
            vec![named(root, "brief", 18, file)],
            vec![Op::delete(dirent_key(Ino::ROOT, b"brief"))],
        ];
        let (mut tables, mut changes) = (Tables::default(), Changes::default());
        tables.apply(old).unwrap();
        for (i, ops) in new.into_iter().enumerate() {
            changes.note(&record(i as u64 + 1, ops.clone()));
            tables.apply(ops).unwrap();
        }
        let tmp = tempfile::tempdir().unwrap();
        let to = tmp.path().join("to");
        let saved = save(&tables, &Wanted::Changed(&changes), &Blocks, &to, 65536, &mut |_, _| {}).unwrap();
        let read = |name: &str| std::fs::read(to.join(name)).unwrap();
        assert_eq!(read("d/whole"), [7; 100]);
        assert_eq!(read("edited"), b"new");
        assert!(
            !to.join("untouched").exists() && !to.join("chmodded").exists() && !to.join("d/half").exists()
        );
        let half = read("d/half.incomplete");
        assert_eq!(half.len(), 65536 + 40);
        assert!(half[65536..65546].iter().chain(&half[65556..]).all(|b| *b == 8));
        assert!(half[65546..65556].iter().all(|b| *b == 0));
        let lacks =
            Incomplete { path: "d/half".into(), missing: vec![(65546, 65556)], why: "nobody has it".into() };
        assert_eq!(saved.incomplete, [lacks]);
        assert_eq!(saved.renamed, [("d2".to_owned(), "b".to_owned())]);
        assert_eq!(saved.removed, ["gone"]);
        assert_eq!(saved.attributes, ["chmodded"]);
        assert_eq!((saved.files, saved.bytes), (2, 100 + 3 + 65536 + 30));
        let list = saved.list();
        for line in ["d/half lacks bytes 65546..65556: nobody has it", "b -> d2", "  gone", "  chmodded"] {
            assert!(list.contains(line), "{line}: {list}");
        }
        let all = tmp.path().join("all");
        let saved = save(&tables, &Wanted::All, &Blocks, &all, 65536, &mut |_, _| {}).unwrap();
        assert_eq!(saved.files, 5);
        assert_eq!(std::fs::read(all.join("untouched")).unwrap(), b"old");
        assert_eq!(saved.problems.iter().filter(|p| p.kind > ProblemKind::Attribute).count(), 0, "{saved:?}");
    }
}
