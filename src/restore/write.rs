//! Writing the tree into a folder.
//!
//! Owns the order of steps and what is reported; `target` owns the system calls. Three passes: names and empty files;
//! content, in the order in which it lies in segments, each file finished with its last block; then directories, deepest
//! first, so that their times stay.
//!
//! A file of which a block is lost on all replicas is kept under its name with `.damaged` added, with holes where
//! content is missing, so that nobody takes it for the whole.

use std::collections::HashMap;
use std::io;
use std::path::PathBuf;

use bytes::Bytes;
use futures::stream::{self, StreamExt};

use super::content::{Request, Source, Want, requests};
use super::tree::text;
use super::{Damage, Entry, Filter, Tables, TreeError, walk};
use crate::format::tables::{Body, FileKind, Inode};
use crate::ids::Ino;

pub(super) mod salvage;
mod target;
#[cfg(test)]
mod tests;

use target::Target;

/// Requests for content under way at a time.
const IN_FLIGHT: usize = 8;

/// What to restore, and where to.
#[derive(Clone, Debug)]
pub struct Options {
    /// The folder; it is made when it is missing.
    pub to: PathBuf,
    /// Replace files that exist. Otherwise they are left alone and reported.
    pub overwrite: bool,
    /// The wanted part of the tree.
    pub filter: Filter,
    /// Bytes of a full block of the volume.
    pub block_size: u32,
}

/// How far a restore is. Totals grow while names are made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Progress {
    /// Entries that are complete: files with content and attributes, links, special files, directories.
    pub entries_done: u64,
    /// Entries in all.
    pub entries: u64,
    /// Bytes of content written.
    pub bytes_done: u64,
    /// Bytes of content in all (holes not counted).
    pub bytes: u64,
}

/// What kind of trouble an entry met.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum ProblemKind {
    /// An attribute was not restored; the content is whole.
    Attribute,
    /// It was left out: it exists already, or needs root.
    Skipped,
    /// The local system refused.
    Failed,
    /// Content or metadata is lost on every replica that was asked.
    Damaged,
}

/// Trouble with one entry.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Problem {
    /// The entry's path in the volume.
    pub path: String,
    /// What kind of trouble.
    pub kind: ProblemKind,
    /// In words.
    pub text: String,
}

/// What became of a restore.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Report {
    /// What was done.
    pub done: Progress,
    /// What was not, or not wholly.
    pub problems: Vec<Problem>,
    /// Copies found damaged on replicas, whether or not another copy helped.
    pub damaged: Vec<Damage>,
}

impl Report {
    /// The worst that happened; `None` when all is well.
    #[must_use]
    pub fn worst(&self) -> Option<ProblemKind> {
        self.problems.iter().map(|p| p.kind).max()
    }
}

/// Why a restore did not begin.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// The filter names what is not there.
    #[error(transparent)]
    Tree(#[from] TreeError),
    /// The target folder.
    #[error("{path}: {source}")]
    Target {
        /// The folder.
        path: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
}

/// Restores the wanted part of the tree. Writes files from the calling task, which therefore blocks: run it on a thread of
/// its own or as the only task of a command.
pub async fn restore(
    tables: &Tables,
    source: &Source,
    options: &Options,
    progress: &mut dyn FnMut(&Progress),
) -> Result<Report, RestoreError> {
    let target = Target::open(&options.to)
        .map_err(|source| RestoreError::Target { path: options.to.clone(), source })?;
    let mut work = Work {
        tables,
        options,
        target,
        files: Vec::new(),
        links: HashMap::new(),
        way: Vec::new(),
        wants: Vec::new(),
        report: Report::default(),
        progress,
    };
    work.names()?;
    work.content(source).await;
    work.finish();
    (work.progress)(&work.report.done);
    Ok(work.report)
}

/// A name below a directory of the target.
#[derive(Clone, Debug)]
struct Name {
    dir: usize,
    name: Bytes,
}

/// A regular file under way.
struct FileWork {
    ino: Ino,
    names: Vec<Name>,
    blocks_left: u32,
    damaged: bool,
}

/// Where a block's content goes.
#[derive(Clone, Copy)]
struct Piece {
    file: u32,
    offset: u64,
    len: u32,
}

struct Work<'a> {
    tables: &'a Tables,
    options: &'a Options,
    target: Target,
    files: Vec<FileWork>,
    /// The first name of each inode that has several, and its place in `files` when it is a regular file.
    links: HashMap<Ino, (Name, Option<usize>)>,
    /// The numbers in the target of the directories on the way to where the walk is; none where one could not be made.
    way: Vec<Option<usize>>,
    wants: Vec<Want<Piece>>,
    report: Report,
    progress: &'a mut dyn FnMut(&Progress),
}

impl Work<'_> {
    fn problem(&mut self, path: String, kind: ProblemKind, text: impl Into<String>) {
        self.report.problems.push(Problem { path, kind, text: text.into() });
    }

    fn done(&mut self) {
        self.report.done.entries_done += 1;
        (self.progress)(&self.report.done);
    }

    fn names(&mut self) -> Result<(), TreeError> {
        let mut wrong = Vec::new();
        walk(self.tables, &self.options.filter, &mut |entry| self.name(entry), &mut |e| wrong.push(e))?;
        for e in wrong {
            let path = match &e {
                TreeError::Format { path, .. } | TreeError::Inconsistent { path, .. } => path.clone(),
                TreeError::NotFound(path) | TreeError::BadPath(path) => path.clone(),
            };
            self.problem(path, ProblemKind::Damaged, e.to_string());
        }
        Ok(())
    }

    fn name(&mut self, entry: &Entry) {
        self.report.done.entries += 1;
        let depth = entry.path.len();
        self.way.truncate(depth);
        let Some(name) = entry.path.last() else {
            self.way.push(Some(0));
            if self.target.created_root() || (self.options.overwrite && entry.selected) {
                self.target.keep_attributes(0, entry.ino);
            } else {
                self.done();
            }
            return;
        };
        let Some(dir) = self.way.get(depth - 1).copied().flatten() else {
            // Its directory could not be made, which has been reported.
            self.way.push(None);
            self.problem(entry.shown(), ProblemKind::Failed, "its directory was not restored");
            return;
        };
        let at = Name { dir, name: name.clone() };
        if let Err(e) = self.make(entry, &at) {
            let kind = match e.kind() {
                io::ErrorKind::AlreadyExists => ProblemKind::Skipped,
                _ => ProblemKind::Failed,
            };
            let hint = match e.kind() {
                io::ErrorKind::AlreadyExists => "it exists already and was left alone".to_owned(),
                _ => e.to_string(),
            };
            self.problem(entry.shown(), kind, hint);
            self.way.push(None);
        }
    }

    fn make(&mut self, entry: &Entry, at: &Name) -> io::Result<()> {
        let replace = self.options.overwrite;
        if entry.inode.kind == FileKind::Directory {
            let (number, created) = self.target.make_dir(at.dir, &at.name)?;
            self.way.push(Some(number));
            if created || (replace && entry.selected) {
                self.target.keep_attributes(number, entry.ino);
            } else {
                self.done();
            }
            return Ok(());
        }
        if let Some((first, file)) = self.links.get(&entry.ino) {
            let (first, file) = (first.clone(), *file);
            self.target.link((first.dir, &first.name), (at.dir, &at.name), replace)?;
            if let Some(work) = file.and_then(|f| self.files.get_mut(f)) {
                work.names.push(at.clone());
            }
            self.done();
            return Ok(());
        }
        let mut file = None;
        match entry.inode.kind {
            FileKind::Regular => {
                self.target.create_file(at.dir, &at.name, entry.inode.size, replace)?;
                file = Some(self.begin_file(entry, at));
            }
            FileKind::Symlink => {
                let Body::Target(to) = &entry.inode.body else {
                    self.problem(entry.shown(), ProblemKind::Damaged, "a symbolic link without target");
                    return Ok(());
                };
                self.target.symlink(at.dir, &at.name, to, replace)?;
            }
            FileKind::Fifo | FileKind::Socket => {
                self.target.special(at.dir, &at.name, &entry.inode, replace)?
            }
            FileKind::CharDevice | FileKind::BlockDevice if !self.target.is_root() => {
                self.problem(
                    entry.shown(),
                    ProblemKind::Skipped,
                    "device nodes can be restored by root only",
                );
                return Ok(());
            }
            FileKind::CharDevice | FileKind::BlockDevice => {
                self.target.special(at.dir, &at.name, &entry.inode, replace)?;
            }
            FileKind::Directory => {}
        }
        if entry.inode.nlink > 1 {
            self.links.insert(entry.ino, (at.clone(), file));
        }
        match file {
            Some(file) if self.files[file].blocks_left == 0 => self.finish_file(file),
            Some(_) => {}
            None => {
                let xattrs = xattrs(self.tables, entry.ino);
                let trouble = self.target.finish_special(at.dir, &at.name, &entry.inode, &xattrs);
                self.attributes(trouble, |_| entry.shown());
                self.done();
            }
        }
        Ok(())
    }

    /// Registers a new file and what content it wants; inline content is written at once.
    fn begin_file(&mut self, entry: &Entry, at: &Name) -> usize {
        let number = self.files.len();
        let mut work = FileWork { ino: entry.ino, names: vec![at.clone()], blocks_left: 0, damaged: false };
        let size = entry.inode.size;
        match &entry.inode.body {
            Body::Inline(content) => {
                let content = &content[..content.len().min(usize::try_from(size).unwrap_or(usize::MAX))];
                self.report.done.bytes += content.len() as u64;
                match self.target.write(at.dir, &at.name, 0, content) {
                    Ok(()) => self.report.done.bytes_done += content.len() as u64,
                    Err(e) => self.problem(entry.shown(), ProblemKind::Failed, e.to_string()),
                }
            }
            Body::Target(_) => {
                work.damaged = true;
                self.problem(entry.shown(), ProblemKind::Damaged, "a file with a link's target");
            }
            Body::Blocks => match self.pieces(entry.ino, size, number as u32) {
                Ok((pieces, missing)) => {
                    work.blocks_left = pieces.len() as u32;
                    self.report.done.bytes += pieces.iter().map(|w| u64::from(w.what.len)).sum::<u64>();
                    self.wants.extend(pieces);
                    for why in missing {
                        work.damaged = true;
                        self.problem(entry.shown(), ProblemKind::Damaged, why);
                    }
                }
                Err(e) => {
                    work.damaged = true;
                    self.problem(entry.shown(), ProblemKind::Damaged, e.to_string());
                }
            },
        }
        self.files.push(work);
        number
    }

    #[allow(clippy::type_complexity)] // a pair of lists
    fn pieces(
        &self,
        ino: Ino,
        size: u64,
        file: u32,
    ) -> Result<(Vec<Want<Piece>>, Vec<String>), crate::format::codec::FormatError> {
        let mut pieces = Vec::new();
        let mut missing = Vec::new();
        for (index, id) in self.tables.blocks(ino)? {
            let offset = index.saturating_mul(u64::from(self.options.block_size));
            if offset >= size {
                continue;
            }
            match self.tables.block(id)? {
                Some(entry) => {
                    let len = u64::from(entry.loc.raw_len).min(size - offset) as u32;
                    pieces.push(Want { entry, what: Piece { file, offset, len } });
                }
                None => missing.push(format!("block {id} at offset {offset} is in no segment")),
            }
        }
        Ok((pieces, missing))
    }

    async fn content(&mut self, source: &Source) {
        let wants = std::mem::take(&mut self.wants);
        let mut answers = stream::iter(requests(wants))
            .map(|(request, users)| {
                let source = source.clone();
                async move {
                    let task = tokio::spawn(async move {
                        let answer = source.fetch(&request).await;
                        (request, answer)
                    });
                    (task.await, users)
                }
            })
            .buffer_unordered(IN_FLIGHT);
        while let Some((fetched, users)) = answers.next().await {
            match fetched {
                Ok((request, answer)) => {
                    self.report.damaged.extend(answer.damaged);
                    for (frame, piece) in users {
                        self.piece(&request, frame, piece, &answer.blocks[frame]);
                    }
                }
                Err(e) => {
                    for (_, piece) in users {
                        self.lose(piece, format!("fetching broke off: {e}"));
                    }
                }
            }
            (self.progress)(&self.report.done);
        }
        let mut met = std::collections::HashSet::new();
        self.report.damaged.retain(|d| met.insert((d.replica.clone(), d.object.clone())));
    }

    fn piece(&mut self, request: &Request, frame: usize, piece: Piece, block: &Result<Bytes, String>) {
        let raw = match block {
            Ok(raw) => raw,
            Err(why) => {
                let entry = &request.frames[frame].1;
                let (segment, epoch) = request.segment;
                self.lose(
                    piece,
                    format!(
                        "block {} at offset {} (segment {segment} of epoch {epoch}) is intact nowhere: {why}",
                        entry.hash, piece.offset
                    ),
                );
                return;
            }
        };
        let file = &self.files[piece.file as usize];
        let Some(name) = file.names.first().cloned() else { return };
        let raw = &raw[..raw.len().min(piece.len as usize)];
        match self.target.write(name.dir, &name.name, piece.offset, raw) {
            Ok(()) => self.report.done.bytes_done += raw.len() as u64,
            Err(e) => {
                let path = self.path_of(&name);
                self.problem(path, ProblemKind::Failed, format!("at offset {}: {e}", piece.offset));
            }
        }
        self.settle(piece.file as usize);
    }

    fn lose(&mut self, piece: Piece, why: String) {
        let file = &mut self.files[piece.file as usize];
        file.damaged = true;
        if let Some(name) = file.names.first().cloned() {
            let path = self.path_of(&name);
            self.problem(path, ProblemKind::Damaged, why);
        }
        self.settle(piece.file as usize);
    }

    /// One block fewer to wait for; the last one finishes the file.
    fn settle(&mut self, file: usize) {
        self.files[file].blocks_left = self.files[file].blocks_left.saturating_sub(1);
        if self.files[file].blocks_left == 0 {
            self.finish_file(file);
        }
    }

    fn finish_file(&mut self, file: usize) {
        let Some(name) = self.files[file].names.first().cloned() else { return };
        let ino = self.files[file].ino;
        match self.inode(ino) {
            Some(inode) => {
                let xattrs = xattrs(self.tables, ino);
                let trouble = self.target.finish_file(name.dir, &name.name, &inode, &xattrs);
                self.attributes(trouble, |work| work.path_of(&name));
            }
            None => {
                let path = self.path_of(&name);
                self.problem(path, ProblemKind::Damaged, "its inode is gone");
            }
        }
        self.done();
    }

    fn inode(&self, ino: Ino) -> Option<Inode> {
        self.tables.inode(ino).ok().flatten()
    }

    /// Reports what was not restored of an entry; its path is asked for only then.
    fn attributes(&mut self, trouble: Vec<String>, path: impl Fn(&Self) -> String) {
        for text in trouble {
            self.problem(path(self), ProblemKind::Attribute, text);
        }
    }

    fn path_of(&self, name: &Name) -> String {
        let mut path = self.target.path_of(name.dir);
        path.extend_from_slice(&name.name);
        text(&path)
    }

    /// Marks damaged files by name, then gives directories their attributes, deepest first.
    fn finish(&mut self) {
        for i in 0..self.files.len() {
            if !self.files[i].damaged {
                continue;
            }
            for name in std::mem::take(&mut self.files[i].names) {
                if let Err(e) = self.target.mark(name.dir, &name.name, "damaged") {
                    let path = self.path_of(&name);
                    let text = format!("it keeps its name although it is damaged: {e}");
                    self.problem(path, ProblemKind::Failed, text);
                }
            }
        }
        for (dir, ino) in self.target.kept_attributes() {
            if let Some(inode) = self.inode(ino) {
                let trouble = self.target.finish_dir(dir, &inode, &xattrs(self.tables, ino));
                self.attributes(trouble, |work| {
                    text(work.target.path_of(dir).strip_suffix(b"/").unwrap_or_default())
                });
            }
            self.done();
        }
        if let Some(text) = self.target.owner_note() {
            self.problem(String::new(), ProblemKind::Attribute, text);
        }
        if let Err(e) = self.target.sync() {
            self.problem(String::new(), ProblemKind::Failed, format!("the files may not be on disk: {e}"));
        }
    }
}

fn xattrs(tables: &Tables, ino: Ino) -> Vec<(Bytes, Bytes)> {
    tables.xattrs(ino).map(|(name, value)| (Bytes::copy_from_slice(name), value.clone())).collect()
}
