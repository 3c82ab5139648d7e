//! Regular files of a restore: from the first look at the name to the last block.
//!
//! Owns what is known of each file on the way, and what becomes of one whose content is lost or
//! cannot be fetched.

use std::io;

use bytes::Bytes;
use futures::stream::{self, StreamExt};

use super::drafts::Draft;
use super::existing::{Compared, compare, compare_inline, holds};
use super::target::{First, Linked, Name, Stamp, Wished, marked};
use super::{Link, Piece, ProblemKind, Work, xattrs};
use crate::format::codec::FormatError;
use crate::format::tables::{Body, dirent_key};
use crate::ids::Ino;
use crate::restore::Entry;
use crate::restore::content::{Missing, Request, Source, Want, requests};

/// Requests for content under way at a time.
const IN_FLIGHT: usize = 8;
/// The ending of a file of which content is lost.
const DAMAGED: &str = "damaged";
/// So many names with that ending are looked at.
const MARKS: u32 = 100;

/// What is there of a file.
#[derive(Clone, Debug)]
enum State {
    /// Nothing.
    Waiting,
    /// Some of its content, without a name.
    Draft(Draft),
    /// A file that was there before: what it holds is being compared.
    Existing(super::dirs::FileId),
    /// It has its name.
    Placed(First),
    /// It is left out, which has been reported.
    Dropped,
}

/// A regular file of the volume.
pub(super) struct FileWork {
    ino: Ino,
    /// Its names so far; none after it was placed.
    names: Vec<Name>,
    blocks_left: u32,
    damaged: bool,
    state: State,
}

impl Work<'_> {
    /// Takes a name of a regular file. What is there already is compared first.
    pub(super) fn make_file(&mut self, entry: &Entry, at: &Name) -> io::Result<()> {
        if let Some(Link::File(file)) = self.links.get(&entry.ino) {
            let file = *file;
            match &self.files[file].state {
                State::Placed(_) | State::Dropped => self.further_name(file, at),
                _ => self.files[file].names.push(at.clone()),
            }
            return Ok(());
        }
        let number = self.files.len();
        let mut work = FileWork {
            ino: entry.ino,
            names: vec![at.clone()],
            blocks_left: 0,
            damaged: false,
            state: State::Waiting,
        };
        let mut wrong = Vec::new();
        let pieces = match &entry.inode.body {
            Body::Inline(_) => Vec::new(),
            Body::Target(_) => {
                wrong.push("a file with a link's target".to_owned());
                Vec::new()
            }
            Body::Blocks => match self.pieces(entry.ino, entry.inode.size, number as u32) {
                Ok((pieces, missing)) => {
                    wrong.extend(missing);
                    pieces
                }
                Err(e) => {
                    wrong.push(e.to_string());
                    Vec::new()
                }
            },
        };
        let mut wants = pieces;
        if !self.options.overwrite
            && let Some(stat) = self.target.existing(at)?
        {
            (work.state, wants) = self.compare(entry, at, &stat, wants, wrong.is_empty())?;
        }
        work.damaged = !wrong.is_empty();
        work.blocks_left = wants.len() as u32;
        self.report.done.bytes += wants.iter().map(|w| u64::from(w.what.len)).sum::<u64>();
        self.wants.extend(wants);
        for why in wrong {
            self.problem(entry.shown(), ProblemKind::Damaged, why);
        }
        if entry.inode.nlink > 1 {
            self.links.insert(entry.ino, Link::File(number));
        }
        self.files.push(work);
        if self.files[number].blocks_left == 0 {
            self.finish_file(number);
        }
        Ok(())
    }

    /// Compares a file that is there with what is wanted: an error when it is another one. Gives
    /// what is left to be compared.
    fn compare(
        &mut self,
        entry: &Entry,
        at: &Name,
        stat: &rustix::fs::Stat,
        pieces: Vec<Want<Piece>>,
        is_whole: bool,
    ) -> io::Result<(State, Vec<Want<Piece>>)> {
        let differs = || io::Error::from(io::ErrorKind::AlreadyExists);
        let size = entry.inode.size;
        let is_file = rustix::fs::FileType::from_raw_mode(stat.st_mode) == rustix::fs::FileType::RegularFile;
        if !is_file || stat.st_size as u64 != size || !is_whole {
            return Err(differs());
        }
        let id = super::dirs::FileId::of(stat);
        // One that cannot be read cannot be the same.
        let fd = self.target.reopen(at, id).map_err(|_| differs())?;
        let compared = match &entry.inode.body {
            Body::Inline(content) if compare_inline(&fd, size, &inline(content, size))? => Compared::Same,
            Body::Inline(_) | Body::Target(_) => Compared::Differs,
            Body::Blocks => compare(&fd, size, &pieces)?,
        };
        match compared {
            Compared::Same => Ok((State::Existing(id), Vec::new())),
            Compared::Unsure(left) => Ok((State::Existing(id), left)),
            Compared::Differs => Err(differs()),
        }
    }

    #[allow(clippy::type_complexity)] // a pair of lists
    fn pieces(&self, ino: Ino, size: u64, file: u32) -> Result<(Vec<Want<Piece>>, Vec<String>), FormatError> {
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

    pub(super) async fn content(&mut self, source: &Source) {
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
                        self.drop_file(piece, ProblemKind::Failed, format!("fetching broke off: {e}"));
                    }
                }
            }
            (self.progress)(&self.report.done);
            if source.is_away() {
                // Nothing more is to be had.
                break;
            }
        }
        let mut met = std::collections::HashSet::new();
        self.report.damaged.retain(|d| met.insert((d.replica.clone(), d.object.clone())));
    }

    fn piece(&mut self, request: &Request, frame: usize, piece: Piece, block: &Result<Bytes, Missing>) {
        let raw = match block {
            Ok(raw) => raw,
            Err(Missing::Unreachable(why)) => {
                let why = format!("its content at offset {} could not be fetched: {why}", piece.offset);
                return self.drop_file(piece, ProblemKind::Unreachable, why);
            }
            Err(Missing::Lost(why)) => {
                let entry = &request.frames[frame].1;
                let (segment, epoch) = request.segment;
                return self.lose(
                    piece,
                    format!(
                        "block {} at offset {} (segment {segment} of epoch {epoch}) is intact nowhere: {why}",
                        entry.hash, piece.offset
                    ),
                );
            }
        };
        let raw = &raw[..raw.len().min(piece.len as usize)];
        match self.take(piece, raw) {
            Ok(()) => {
                self.report.done.bytes_done += raw.len() as u64;
                self.settle(piece.file as usize);
            }
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
                self.drop_file(piece, ProblemKind::Skipped, "it exists already and was left alone");
            }
            Err(e) => {
                let why = format!("at offset {}: {e}", piece.offset);
                self.drop_file(piece, ProblemKind::Failed, why);
            }
        }
    }

    /// Writes content of a file or, where the file was there before, compares it.
    fn take(&mut self, piece: Piece, raw: &[u8]) -> io::Result<()> {
        let file = &self.files[piece.file as usize];
        match (&file.state, file.names.first()) {
            (State::Waiting | State::Draft(_), Some(_)) => {
                let draft = self.draft(piece.file as usize)?;
                self.target.write(draft, piece.offset, raw)
            }
            (State::Existing(id), Some(name)) => {
                let (id, name) = (*id, name.clone());
                let fd = self.target.reopen(&name, id)?;
                match holds(&fd, piece.offset, raw)? {
                    true => Ok(()),
                    false => Err(io::ErrorKind::AlreadyExists.into()),
                }
            }
            _ => Ok(()),
        }
    }

    /// The draft of a file, begun when there is none.
    fn draft(&mut self, file: usize) -> io::Result<Draft> {
        let work = &self.files[file];
        if let State::Draft(draft) = work.state {
            return Ok(draft);
        }
        let dir = work.names.first().map_or(0, |name| name.dir);
        let size = self.inode(work.ino).map_or(0, |inode| inode.size);
        let draft = self.target.begin(dir, size)?;
        self.files[file].state = State::Draft(draft);
        Ok(draft)
    }

    /// Leaves a file out; says why, once.
    fn drop_file(&mut self, piece: Piece, kind: ProblemKind, why: impl Into<String>) {
        let file = &mut self.files[piece.file as usize];
        let state = std::mem::replace(&mut file.state, State::Dropped);
        if matches!(state, State::Dropped) {
            return;
        }
        let (names, why) = (std::mem::take(&mut file.names), why.into());
        if let State::Draft(draft) = state {
            self.target.discard(draft);
        }
        for name in names {
            let path = self.path_of(&name);
            self.problem(path, kind, why.clone());
        }
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

    /// Gives a file all its names.
    fn finish_file(&mut self, file: usize) {
        let names = std::mem::take(&mut self.files[file].names);
        let Some(name) = names.first().cloned() else { return };
        match std::mem::replace(&mut self.files[file].state, State::Dropped) {
            State::Existing(id) => {
                self.target.recognise(id);
                let stamp = self.target.stamp(&name);
                self.files[file].state = State::Placed(First { at: name.clone(), id, names: 1 });
                if let Ok(Some(stamp)) = stamp {
                    self.remove_damaged(&name, stamp);
                }
                self.done();
            }
            state @ (State::Waiting | State::Draft(_)) => {
                self.files[file].state = state;
                self.files[file].names.push(name.clone());
                let placed = self.place(file, &name);
                self.files[file].names.clear();
                match placed {
                    Ok(first) => {
                        self.files[file].state = State::Placed(first);
                        self.done();
                    }
                    Err(e) => {
                        if let State::Draft(draft) = self.files[file].state {
                            self.target.discard(draft);
                        }
                        self.files[file].state = State::Dropped;
                        let path = self.path_of(&name);
                        self.refused(path, &e);
                    }
                }
            }
            state => self.files[file].state = state,
        }
        for name in &names[1..] {
            self.further_name(file, name);
        }
    }

    /// Gives a draft its name, or one that says that it is damaged.
    fn place(&mut self, file: usize, name: &Name) -> io::Result<First> {
        let ino = self.files[file].ino;
        let inode = self.inode(ino).ok_or_else(|| io::Error::other("its inode is gone"))?;
        let draft = self.draft(file)?;
        if let Body::Inline(content) = &inode.body {
            let content = inline(content, inode.size);
            self.report.done.bytes += content.len() as u64;
            self.target.write(draft, 0, &content)?;
            self.report.done.bytes_done += content.len() as u64;
        }
        let xattrs = xattrs(self.tables, ino);
        let wished = Wished { inode: &inode, xattrs: &xattrs };
        let replace = self.options.overwrite;
        let (first, trouble) = match self.files[file].damaged {
            false => {
                let placed = self.target.place(draft, name, replace, &wished)?;
                if let Ok(Some(stamp)) = self.target.stamp(&placed.0.at) {
                    self.remove_damaged(name, stamp);
                }
                placed
            }
            true => self.place_damaged(draft, name, &wished)?,
        };
        self.attributes(trouble, |work| work.path_of(name));
        Ok(first)
    }

    /// Gives a damaged file a name that says so. One that an earlier restore left under that name
    /// is replaced.
    fn place_damaged(
        &mut self,
        draft: Draft,
        name: &Name,
        wished: &Wished<'_>,
    ) -> io::Result<(First, Vec<String>)> {
        let mut last = io::Error::from(io::ErrorKind::AlreadyExists);
        for n in 0..MARKS {
            let at = marked(name, DAMAGED, n);
            if self.is_of_volume(&at) {
                continue;
            }
            match self.target.place(draft, &at, false, wished) {
                Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
                    let stamp = self.target.stamp_of_draft(draft)?;
                    if self.target.remove_left_over(&at, stamp)? {
                        return self.target.place(draft, &at, false, wished);
                    }
                    last = e;
                }
                other => return other,
            }
        }
        Err(last)
    }

    /// Removes what an earlier restore left of a file that is whole now.
    fn remove_damaged(&mut self, name: &Name, stamp: Stamp) {
        for n in 0..MARKS {
            let at = marked(name, DAMAGED, n);
            let exists = self.target.stamp(&at).is_ok_and(|stamp| stamp.is_some());
            if !exists {
                return;
            }
            if !self.is_of_volume(&at)
                && let Err(e) = self.target.remove_left_over(&at, stamp)
            {
                let path = self.path_of(&at);
                self.problem(path, ProblemKind::Attribute, format!("it is out of date: {e}"));
            }
        }
    }

    /// Whether the volume has an entry of that name.
    fn is_of_volume(&self, at: &Name) -> bool {
        self.tables.get(&dirent_key(self.target.ino_of(at.dir), &at.name)).is_some()
    }

    /// Gives a file that has a name another one.
    fn further_name(&mut self, file: usize, name: &Name) {
        let FileWork { ino, damaged, state: State::Placed(first), .. } = &self.files[file] else {
            // Why was reported with its first name.
            let path = self.path_of(name);
            self.problem(path, ProblemKind::Skipped, "another name of a file that was not restored");
            return;
        };
        let (mut first, ino, damaged) = (first.clone(), *ino, *damaged);
        let Some(inode) = self.inode(ino) else { return };
        let xattrs = xattrs(self.tables, ino);
        let wished = Wished { inode: &inode, xattrs: &xattrs };
        let new = if damaged { marked(name, DAMAGED, 0) } else { name.clone() };
        match self.target.link_file(&mut first, &new, self.options.overwrite && !damaged, &wished) {
            Ok(Linked::Link) => self.done(),
            Ok(Linked::Copy) => {
                let text = format!(
                    "a copy of {} and no second name of it: the folder's filesystem has no hard links",
                    self.path_of(&first.at)
                );
                let path = self.path_of(name);
                self.problem(path, ProblemKind::Attribute, text);
                self.done();
            }
            Err(e) => {
                let path = self.path_of(name);
                self.refused(path, &e);
            }
        }
        self.files[file].state = State::Placed(first);
    }

    /// Removes the drafts of files whose content did not come, and reports that.
    pub(super) fn discard_unfinished(&mut self) {
        let mut unfinished = 0_u64;
        for file in 0..self.files.len() {
            let names = std::mem::take(&mut self.files[file].names);
            let state = std::mem::replace(&mut self.files[file].state, State::Dropped);
            if names.is_empty() || matches!(state, State::Dropped | State::Placed(_)) {
                self.files[file].state = state;
                continue;
            }
            unfinished += names.len() as u64;
            if let State::Draft(draft) = state {
                self.target.discard(draft);
            }
        }
        if unfinished > 0 && self.report.worst() == Some(ProblemKind::Unreachable) {
            let text = format!("{unfinished} more files were not fetched, as no replica answers any more");
            self.problem(String::new(), ProblemKind::Unreachable, text);
        }
    }
}

/// The content that stands in an inode, no longer than the file.
fn inline(content: &Bytes, size: u64) -> Bytes {
    content.slice(..content.len().min(usize::try_from(size).unwrap_or(usize::MAX)))
}
