//! Saving what changed: the files that a run of records touched, out of tables and content that are
//! still at hand.
//!
//! Owns what counts as changed, and the report. Knows not where a block's content comes from: it
//! asks a [`BlockContent`]. A file that cannot be had whole is kept under its name with
//! `.incomplete` added, with holes where content is missing.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io;
use std::path::Path;

use bytes::Bytes;

use super::drafts::Draft;
use super::target::{First, Linked, Name, Target, Wished, marked};
use super::{Problem, ProblemKind, RestoreError, drafts_name, xattrs};
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
    /// A replica that may have it did not answer.
    pub unreachable: bool,
}

/// Gives the content of blocks. Blocking.
pub trait BlockContent {
    /// Fills `out` with the block's first bytes, zeros behind its end; answers what of it is
    /// missing (and left as it was).
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
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Incomplete {
    /// Its path in the volume; it was saved with `.incomplete` added.
    pub path: String,
    /// The missing ranges: first byte, and the one behind the last.
    pub missing: Vec<(u64, u64)>,
    /// Why the first of them is missing.
    pub why: String,
    /// Some of it a replica may have that did not answer: salvaging again may give it.
    pub unreachable: bool,
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

/// Saves what is `wanted` of the volume in `tables` below the folder `to`. `block_size` is that of
/// the volume in bytes. `progress` is called with the files and bytes saved so far.
pub fn save(
    tables: &Tables,
    wanted: &Wanted<'_>,
    content: &dyn BlockContent,
    to: &Path,
    block_size: u32,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Saved, RestoreError> {
    let target = Target::open(to, drafts_name(tables))
        .map_err(|source| RestoreError::Target { path: to.to_owned(), source })?;
    let mut work = Work {
        tables,
        content,
        block: vec![0; block_size as usize],
        target,
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
    /// The directories on the way to what is visited now, with their numbers in the target where
    /// they were made.
    above: Vec<(Bytes, Ino, Option<usize>)>,
    /// First name of each saved inode that has several.
    links: HashMap<Ino, First>,
    /// All directories with their parents and names.
    paths: HashMap<Ino, (Ino, Bytes)>,
    saved: Saved,
    progress: &'a mut dyn FnMut(u64, u64),
}

impl Work<'_> {
    fn problem(&mut self, path: String, kind: ProblemKind, text: impl Into<String>) {
        self.saved.problems.push(Problem { path, kind, text: text.into() });
    }

    fn visit(&mut self, entry: &Entry, wanted: &Wanted<'_>) {
        let Some((name, parent)) = entry.path.split_last() else {
            if self.target.created_root() {
                self.target.keep_attributes(0);
            }
            return;
        };
        self.above.truncate(parent.len());
        let is_dir = entry.inode.kind == FileKind::Directory;
        if is_dir {
            let above = self.above.last().map_or(Ino::ROOT, |(_, ino, _)| *ino);
            self.paths.insert(entry.ino, (above, name.clone()));
            self.above.push((name.clone(), entry.ino, None));
        }
        match wanted {
            Wanted::All => {}
            Wanted::Changed(c) if c.content.contains(&entry.ino) => {}
            Wanted::Changed(c) if !c.other.contains(&entry.ino) => return,
            // Content in blocks that did not change.
            Wanted::Changed(_) if self.has_blocks(entry) => {
                return self.saved.attributes.push(entry.shown());
            }
            Wanted::Changed(_) => {}
        }
        if let Err(e) = self.make(entry, name, parent.len()) {
            self.problem(entry.shown(), ProblemKind::Failed, e.to_string());
        }
        (self.progress)(self.saved.files, self.saved.bytes);
    }

    fn has_blocks(&self, entry: &Entry) -> bool {
        let in_blocks = entry.inode.kind == FileKind::Regular && entry.inode.body == Body::Blocks;
        in_blocks && self.tables.blocks(entry.ino).map_or(true, |blocks| !blocks.is_empty())
    }

    /// The number of the directory `depth` levels down the way to what is visited now; made when it
    /// is not there yet.
    fn dir(&mut self, depth: usize) -> io::Result<usize> {
        let made = self.above[..depth].iter().rposition(|(_, _, number)| number.is_some());
        let mut at = made.and_then(|level| self.above[level].2).unwrap_or(0);
        for level in made.map_or(0, |level| level + 1)..depth {
            let (name, ino, _) = self.above[level].clone();
            let inode = self.tables.inode(ino).ok().flatten();
            let inode = inode.ok_or_else(|| io::Error::other("the inode of its directory is gone"))?;
            (at, _) = self.target.make_dir(&Name { dir: at, name }, ino, &inode)?;
            self.target.keep_attributes(at);
            self.above[level].2 = Some(at);
        }
        Ok(at)
    }

    fn make(&mut self, entry: &Entry, name: &Bytes, depth: usize) -> io::Result<()> {
        if entry.inode.kind == FileKind::Directory {
            return self.dir(depth + 1).map(|_| ());
        }
        let at = Name { dir: self.dir(depth)?, name: name.clone() };
        let xattrs = xattrs(self.tables, entry.ino);
        let wished = Wished { inode: &entry.inode, xattrs: &xattrs };
        if entry.inode.kind != FileKind::Regular {
            return self.make_special(entry, &at, &wished);
        }
        let first = match self.links.remove(&entry.ino) {
            Some(mut first) => {
                if self.target.link_file(&mut first, &at, false, &wished)? == Linked::Copy {
                    let text = "a copy and no second name: the folder's filesystem has no hard links";
                    self.problem(entry.shown(), ProblemKind::Attribute, text);
                }
                first
            }
            None => match self.file(entry, &at, &wished)? {
                Some(first) => first,
                None => return Ok(()),
            },
        };
        if entry.inode.nlink > 1 {
            self.links.insert(entry.ino, first);
        }
        self.saved.files += 1;
        Ok(())
    }

    fn make_special(&mut self, entry: &Entry, at: &Name, wished: &Wished<'_>) -> io::Result<()> {
        match entry.inode.kind {
            FileKind::CharDevice | FileKind::BlockDevice if !self.target.owner.is_root() => {
                let text = "device nodes can be saved by root only";
                self.problem(entry.shown(), ProblemKind::Skipped, text);
                return Ok(());
            }
            FileKind::Symlink if !matches!(entry.inode.body, Body::Target(_)) => {
                return Err(io::Error::other("a symbolic link without target"));
            }
            _ => {}
        }
        let (id, trouble) = self.target.special(at, self.links.get_mut(&entry.ino), false, wished)?;
        for text in trouble {
            self.problem(entry.shown(), ProblemKind::Attribute, text);
        }
        if entry.inode.nlink > 1 {
            self.links.entry(entry.ino).or_insert(First { at: at.clone(), id, names: 1 });
        }
        self.saved.files += 1;
        Ok(())
    }

    /// Saves a file with its content; `None` when something of it is missing. Such a file gets
    /// another name.
    fn file(&mut self, entry: &Entry, at: &Name, wished: &Wished<'_>) -> io::Result<Option<First>> {
        let draft = self.target.begin(at.dir, entry.inode.size)?;
        let done = self.fill(draft, entry).and_then(|incomplete| match &incomplete {
            None => Ok((self.target.place(draft, at, false, wished)?, incomplete)),
            Some(_) => Ok((self.place_incomplete(draft, at, wished)?, incomplete)),
        });
        if done.is_err() {
            self.target.discard(draft);
        }
        let ((first, trouble), incomplete) = done?;
        for text in trouble {
            self.problem(entry.shown(), ProblemKind::Attribute, text);
        }
        let is_whole = incomplete.is_none();
        self.saved.incomplete.extend(incomplete);
        Ok(is_whole.then_some(first))
    }

    fn place_incomplete(
        &mut self,
        draft: Draft,
        at: &Name,
        wished: &Wished<'_>,
    ) -> io::Result<(First, Vec<String>)> {
        let mut n = 0;
        loop {
            match self.target.place(draft, &marked(at, "incomplete", n), false, wished) {
                Err(e) if e.kind() == io::ErrorKind::AlreadyExists && n < 100 => n += 1,
                other => return other,
            }
        }
    }

    /// Writes the content of a file; tells what of it is missing.
    fn fill(&mut self, draft: Draft, entry: &Entry) -> io::Result<Option<Incomplete>> {
        let size = entry.inode.size;
        let mut missing = Incomplete::default();
        match &entry.inode.body {
            Body::Inline(content) => {
                let content = &content[..content.len().min(usize::try_from(size).unwrap_or(usize::MAX))];
                self.target.write(draft, 0, content)?;
                self.saved.bytes += content.len() as u64;
            }
            Body::Target(_) => return Err(io::Error::other("a file with a link's target")),
            Body::Blocks => {
                let block_size = self.block.len() as u64;
                for (index, id) in self.tables.blocks(entry.ino).map_err(io::Error::other)? {
                    let offset = index.saturating_mul(block_size);
                    if offset < size {
                        let len = block_size.min(size - offset) as usize;
                        let mut block = std::mem::take(&mut self.block);
                        let written = self.fill_block(draft, id, offset, &mut block[..len], &mut missing);
                        self.block = block;
                        written?;
                    }
                }
            }
        }
        if missing.missing.is_empty() {
            return Ok(None);
        }
        let lost = missing.missing.iter().map(|(from, to)| to - from).sum::<u64>();
        self.saved.bytes -= lost.min(self.saved.bytes);
        missing.path = entry.shown();
        Ok(Some(missing))
    }

    fn fill_block(
        &mut self,
        draft: Draft,
        id: BlockId,
        offset: u64,
        part: &mut [u8],
        missing: &mut Incomplete,
    ) -> io::Result<()> {
        part.fill(0);
        // What is missing stays a hole.
        let mut start = 0;
        for piece in self.content.read(id, part) {
            let (from, to) = (piece.start as usize, (piece.end as usize).min(part.len()));
            if from.max(start) >= to {
                continue;
            }
            self.target.write(draft, offset + start as u64, &part[start..from.max(start)])?;
            let (lost_from, lost_to) = (offset + from as u64, offset + to as u64);
            match missing.missing.last_mut() {
                Some(last) if last.1 == lost_from => last.1 = lost_to,
                _ => missing.missing.push((lost_from, lost_to)),
            }
            if missing.why.is_empty() {
                missing.why.clone_from(&piece.why);
            }
            missing.unreachable |= piece.unreachable;
            start = to;
        }
        self.target.write(draft, offset + start as u64, &part[start..])?;
        self.saved.bytes += part.len() as u64;
        Ok(())
    }

    /// The path of a directory with a slash after every name; empty for the root.
    fn path_of(&self, dir: Ino) -> Option<String> {
        let (mut names, mut at) = (Vec::new(), dir);
        while at != Ino::ROOT {
            let (above, name) = self.paths.get(&at)?;
            names.push(name);
            at = *above;
        }
        Some(names.into_iter().rev().map(|name| text(name) + "/").collect())
    }

    /// Lists what happened to names.
    fn names(&mut self, changes: &Changes) {
        let shown = |(dir, name): &Place| match self.path_of(*dir) {
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
        for dir in self.target.kept_attributes() {
            let ino = self.target.ino_of(dir);
            if let Ok(Some(inode)) = self.tables.inode(ino) {
                let xattrs = xattrs(self.tables, ino);
                let wished = Wished { inode: &inode, xattrs: &xattrs };
                for trouble in self.target.finish_dir(dir, &wished) {
                    let path = text(self.target.path_of(dir).strip_suffix(b"/").unwrap_or_default());
                    self.problem(path, ProblemKind::Attribute, trouble);
                }
            }
        }
        self.target.remove_drafts();
        if let Some(text) = self.target.owner.note() {
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
mod tests;
