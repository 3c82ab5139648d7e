//! Writing the tree into a folder.
//!
//! Owns the order of steps and what is reported; `target` owns the system calls. Three passes:
//! directories, special files and what is there already; content, in the order in which it lies in
//! segments, each file given its attributes and its name with its last block; then directories,
//! deepest first, so that their times stay.
//!
//! A file of which a block is lost on all replicas gets its name with `.damaged` added, with holes
//! where content is missing, so that nobody takes it for the whole. A file of which a block cannot
//! be fetched gets no name: the restore is to be run again.

use std::collections::HashMap;
use std::io;
use std::path::PathBuf;

use bytes::Bytes;

use super::content::{Source, Want};
use super::tree::text;
use super::{Damage, Entry, Filter, Tables, TreeError, walk};
use crate::format::tables::{FileKind, Inode, dirent_key};
use crate::ids::Ino;

mod attributes;
mod dirs;
mod drafts;
mod existing;
mod files;
pub(super) mod salvage;
mod target;
#[cfg(test)]
mod tests;

use files::FileWork;
use target::{First, Name, Target, Wished};

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
    /// Entries that are complete: files with content and attributes, links, special files,
    /// directories.
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
    /// Content could not be fetched, as a replica that may hold it did not answer. The same
    /// restore, run again, goes on.
    Unreachable,
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

/// Restores the wanted part of the tree. Writes files from the calling task, which therefore
/// blocks: run it on a thread of its own or as the only task of a command.
pub async fn restore(
    tables: &Tables,
    source: &Source,
    options: &Options,
    progress: &mut dyn FnMut(&Progress),
) -> Result<Report, RestoreError> {
    let target = Target::open(&options.to, drafts_name(tables))
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
    let walked = work.names();
    if walked.is_ok() {
        work.content(source).await;
    }
    work.finish();
    walked?;
    Ok(work.report)
}

/// A name for the folder of unfinished files that the volume's root does not hold.
fn drafts_name(tables: &Tables) -> String {
    let names = (0_u64..).map(|n| match n {
        0 => ".mirrorfs-restore".to_owned(),
        n => format!(".mirrorfs-restore-{n}"),
    });
    let mut free = names.filter(|name| tables.get(&dirent_key(Ino::ROOT, name.as_bytes())).is_none());
    free.next().unwrap_or_default()
}

/// A block's place in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Piece {
    file: u32,
    offset: u64,
    len: u32,
}

/// Where an inode that has several names has its first one.
enum Link {
    /// A file's number in [`Work::files`].
    File(usize),
    Special(First),
}

struct Work<'a> {
    tables: &'a Tables,
    options: &'a Options,
    target: Target,
    files: Vec<FileWork>,
    /// Each inode that has several names and got one.
    links: HashMap<Ino, Link>,
    /// The numbers in the target of the directories on the way to where the walk is; none where one
    /// could not be made.
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

    /// Reports that an entry could not be made.
    fn refused(&mut self, path: String, error: &io::Error) {
        match error.kind() {
            io::ErrorKind::AlreadyExists => {
                self.problem(path, ProblemKind::Skipped, "it exists already and was left alone");
            }
            _ => self.problem(path, ProblemKind::Failed, error.to_string()),
        }
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
            let ours = self.target.root_is_ours(&entry.inode);
            self.directory(0, entry, ours);
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
            self.refused(entry.shown(), &e);
            self.way.push(None);
        }
    }

    /// A directory that was made or met gets its attributes at the end, unless it is the user's
    /// own.
    fn directory(&mut self, number: usize, entry: &Entry, ours: bool) {
        if ours || (self.options.overwrite && entry.selected) {
            self.target.keep_attributes(number);
        } else {
            self.done();
        }
    }

    fn make(&mut self, entry: &Entry, at: &Name) -> io::Result<()> {
        match entry.inode.kind {
            FileKind::Directory => {
                let (number, ours) = self.target.make_dir(at, entry.ino, &entry.inode)?;
                self.way.push(Some(number));
                self.directory(number, entry, ours);
                Ok(())
            }
            FileKind::Regular => self.make_file(entry, at),
            FileKind::Symlink if !matches!(entry.inode.body, crate::format::tables::Body::Target(_)) => {
                self.problem(entry.shown(), ProblemKind::Damaged, "a symbolic link without target");
                Ok(())
            }
            FileKind::CharDevice | FileKind::BlockDevice if !self.target.owner.is_root() => {
                let text = "device nodes can be restored by root only";
                self.problem(entry.shown(), ProblemKind::Skipped, text);
                Ok(())
            }
            _ => self.make_special(entry, at),
        }
    }

    fn make_special(&mut self, entry: &Entry, at: &Name) -> io::Result<()> {
        let xattrs = xattrs(self.tables, entry.ino);
        let wished = Wished { inode: &entry.inode, xattrs: &xattrs };
        let first = match self.links.get_mut(&entry.ino) {
            Some(Link::Special(first)) => Some(first),
            _ => None,
        };
        let is_first = first.is_none();
        let (id, trouble) = self.target.special(at, first, self.options.overwrite, &wished)?;
        if entry.inode.nlink > 1 && is_first {
            self.links.insert(entry.ino, Link::Special(First { at: at.clone(), id, names: 1 }));
        }
        self.attributes(trouble, |_| entry.shown());
        self.done();
        Ok(())
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

    /// Gives directories their attributes, deepest first.
    fn finish(&mut self) {
        self.discard_unfinished();
        for dir in self.target.kept_attributes() {
            let ino = self.target.ino_of(dir);
            if let Some(inode) = self.inode(ino) {
                let xattrs = xattrs(self.tables, ino);
                let trouble = self.target.finish_dir(dir, &Wished { inode: &inode, xattrs: &xattrs });
                self.attributes(trouble, |work| {
                    text(work.target.path_of(dir).strip_suffix(b"/").unwrap_or_default())
                });
            }
            self.done();
        }
        self.target.remove_drafts();
        if let Some(text) = self.target.owner.note() {
            self.problem(String::new(), ProblemKind::Attribute, text);
        }
        if let Err(e) = self.target.sync() {
            self.problem(String::new(), ProblemKind::Failed, format!("the files may not be on disk: {e}"));
        }
        (self.progress)(&self.report.done);
    }
}

fn xattrs(tables: &Tables, ino: Ino) -> Vec<(Bytes, Bytes)> {
    tables.xattrs(ino).map(|(name, value)| (Bytes::copy_from_slice(name), value.clone())).collect()
}
