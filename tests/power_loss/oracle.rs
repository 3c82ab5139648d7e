//! What must be there: a diary of what programs did and when each call returned, and the comparison with what is found.
//!
//! A moment is a number of operations of the recorded disk (to look at the clock is one, so that no two are the same). A call that began at `start` and returned at `end` may show at a cut
//! after `start`; if it was a sync, what was done before its `start` must show at every cut from `end` on.
//!
//! * Changes of names and attributes (of one writer, in one folder) are found as a prefix, at least as long as any sync of
//!   anybody demands, and what one writer did after another's change does not show without that.
//! * Content is what the last sync of the file covered; later writes may show byte by byte, and nothing else may. What was closed
//!   before a change of names that shows counts as synced.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

/// Not returned yet.
pub const NEVER: usize = usize::MAX;

/// A file of a writer, whatever it is called.
pub type FileNo = u32;

/// What a program did.
#[derive(Clone, Debug)]
pub enum What {
    Create(String, FileNo),
    Mkdir(String),
    Symlink(String, String),
    Link(String, String),
    Remove(String),
    Rename(String, String),
    Mode(String, u32),
    Xattr(String, Vec<u8>),
    /// The time of modification, in nanoseconds since 1970.
    Time(String, i128),
    Write(FileNo, u64, Arc<[u8]>),
    Truncate(FileNo, u64),
    Clear(FileNo, u64, u64),
    Close(FileNo),
    /// Of a file, or of a directory.
    Sync(Option<FileNo>),
    /// Content that was written before is certain.
    Durable(FileNo),
}

impl What {
    fn is_name(&self) -> bool {
        use What::{Clear, Close, Durable, Sync, Truncate, Write};
        !matches!(self, Write(..) | Truncate(..) | Clear(..) | Close(_) | Sync(_) | Durable(_))
    }

    fn content_of(&self) -> Option<FileNo> {
        match self {
            Self::Write(f, ..) | Self::Truncate(f, _) | Self::Clear(f, ..) => Some(*f),
            _ => None,
        }
    }
}

#[derive(Clone, Debug)]
pub struct Event {
    pub start: usize,
    pub end: usize,
    pub what: What,
}

/// What one name leads to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Thing {
    File(FileNo),
    Dir,
    Link(String),
}

/// Attributes that were set.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Marks {
    pub mode: Option<u32>,
    pub xattr: Option<Vec<u8>>,
    pub time: Option<i128>,
}

/// The names of one folder at one moment.
#[derive(Clone, Debug, Default)]
pub struct Names {
    pub things: BTreeMap<String, Thing>,
    pub files: HashMap<FileNo, Marks>,
    pub dirs: HashMap<String, Marks>,
}

impl Names {
    fn marks(&mut self, path: &str) -> &mut Marks {
        match self.things.get(path) {
            Some(Thing::File(f)) => self.files.entry(*f).or_default(),
            _ => self.dirs.entry(path.to_owned()).or_default(),
        }
    }

    pub fn apply(&mut self, what: &What) {
        match what {
            What::Create(path, file) => {
                self.things.insert(path.clone(), Thing::File(*file));
            }
            What::Mkdir(path) => {
                self.dirs.remove(path);
                self.things.insert(path.clone(), Thing::Dir);
            }
            What::Symlink(path, target) => {
                self.things.insert(path.clone(), Thing::Link(target.clone()));
            }
            What::Link(from, to) => {
                let thing = self.things[from].clone();
                self.things.insert(to.clone(), thing);
            }
            What::Remove(path) => {
                self.things.remove(path);
            }
            What::Rename(from, to) => {
                // Renaming one name of a file over another one of it changes nothing.
                if self.things.get(to).is_some_and(|t| matches!(t, Thing::File(_)) && self.things[from] == *t)
                {
                    return;
                }
                self.move_tree(from, to);
            }
            What::Mode(path, mode) => self.marks(path).mode = Some(*mode),
            What::Xattr(path, value) => self.marks(path).xattr = Some(value.clone()),
            What::Time(path, time) => self.marks(path).time = Some(*time),
            _ => {}
        }
    }

    fn move_tree(&mut self, from: &str, to: &str) {
        let below = format!("{from}/");
        let moved: Vec<String> =
            self.things.keys().filter(|p| *p == from || p.starts_with(&below)).cloned().collect();
        self.things.remove(to);
        self.dirs.remove(to);
        for path in moved {
            let new = format!("{to}{}", &path[from.len()..]);
            let thing = self.things.remove(&path).unwrap();
            if let Some(marks) = self.dirs.remove(&path) {
                self.dirs.insert(new.clone(), marks);
            }
            self.things.insert(new, thing);
        }
    }
}

/// What was found under one name.
#[derive(Clone, Debug)]
pub struct Found {
    pub ino: u64,
    pub mode: u32,
    pub time: i128,
    pub xattr: Option<Vec<u8>>,
    pub body: Body,
}

#[derive(Clone, Debug)]
pub enum Body {
    Dir,
    Link(String),
    File(Vec<u8>),
    /// A file that could not be read, and why.
    Unread(String),
}

/// A folder as it was found, by path.
pub type Tree = BTreeMap<String, Found>;

/// What one writer did in its folder.
#[derive(Clone, Debug, Default)]
pub struct Diary {
    pub folder: String,
    pub events: Vec<Event>,
    /// When the daemon was killed under it.
    pub died: Option<usize>,
    /// What was found after that: when, and between which lengths of the prefix it lies.
    pub recovered: Option<(usize, usize, usize)>,
    /// When its removal began.
    pub removed: Option<usize>,
}

/// Everything that was promised.
#[derive(Clone, Debug, Default)]
pub struct Book {
    pub diaries: Vec<Diary>,
    /// Syncs of everything (an orderly unmount, `mirrorfs sync`): when they began and returned.
    pub everything: Vec<(usize, usize)>,
    /// Those that also mean every replica.
    pub replicated: Vec<(usize, usize)>,
}

/// Which promises are looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Promise {
    /// What is on the machine that lost power.
    Local,
    /// What every replica has.
    Replicated,
}

/// The lengths of the prefix that fit, and until when they show what was done.
#[derive(Debug)]
struct Fit {
    least: usize,
    most: usize,
}

impl Book {
    /// All syncs of anybody: when they began and returned.
    fn syncs(&self, promise: Promise) -> Vec<(usize, usize)> {
        if promise == Promise::Replicated {
            return self.replicated.clone();
        }
        let single = self.diaries.iter().flat_map(|d| &d.events).filter(|e| matches!(e.what, What::Sync(_)));
        self.everything.iter().copied().chain(single.map(|e| (e.start, e.end))).collect()
    }

    /// Compares what was found (by folder) with what must be there at `cut`. `gaps`: files may be unreadable.
    pub fn check(
        &self,
        cut: usize,
        promise: Promise,
        found: &BTreeMap<String, Tree>,
        gaps: bool,
    ) -> Result<Checked, String> {
        let mut checked = Checked::default();
        let mut fits = Vec::new();
        let syncs = self.syncs(promise);
        let nothing = Tree::new();
        for diary in &self.diaries {
            if diary.removed.is_some_and(|at| at < cut) {
                continue;
            }
            let tree = found.get(&diary.folder).unwrap_or(&nothing);
            let fit = self
                .fit(diary, &syncs, cut, promise, tree, gaps, &mut checked)
                .map_err(|why| format!("folder {}: {why}", diary.folder))?;
            fits.push((diary, fit));
        }
        // Nothing shows without what had been done before it, by whomever.
        let starts = fits.iter().map(|(d, fit)| {
            let last = d.names().take(fit.least).last();
            (last.map_or(0, |e| e.start), d)
        });
        let Some((shown, by)) = starts.max_by_key(|(at, _)| *at) else { return Ok(checked) };
        for (diary, fit) in &fits {
            if diary.died.is_some_and(|died| died <= shown) {
                continue;
            }
            if let Some(first) = diary.names().nth(fit.most)
                && first.end <= shown
            {
                return Err(format!(
                    "folder {}: {:?}, done at {}, does not show, but in {} something does that began at {shown}",
                    diary.folder, first.what, first.end, by.folder
                ));
            }
        }
        Ok(checked)
    }

    #[allow(clippy::too_many_arguments)]
    fn fit(
        &self,
        diary: &Diary,
        syncs: &[(usize, usize)],
        cut: usize,
        promise: Promise,
        found: &Tree,
        gaps: bool,
        checked: &mut Checked,
    ) -> Result<Fit, String> {
        // The last sync that had returned, of anybody: when it began.
        let last = |until: usize| {
            syncs.iter().filter(|(_, end)| *end <= until).map(|(start, _)| *start).max().unwrap_or(0)
        };
        let synced = last(cut.min(diary.died.unwrap_or(NEVER)));
        let index = Index::new(diary);
        let mut least = index.names.iter().filter(|e| e.end <= synced).count();
        let mut most = index.names.iter().filter(|e| e.start < cut).count();
        checked.required += least;
        if let Some((at, from, to)) = diary.recovered
            && last(cut) > at
        {
            // What was found after the crash, and had time to become durable again.
            (least, most) = (from, to);
        }
        let mut names = Names::default();
        index.names.iter().take(least).for_each(|e| names.apply(&e.what));
        let (mut fit, mut first_trouble): (Option<Fit>, Option<String>) = (None, None);
        for length in least..=most {
            if length > least
                && let Some(e) = index.names.get(length - 1)
            {
                names.apply(&e.what);
            }
            let compared = same_names(&names, diary, cut, found).and_then(|()| {
                self.same_content(&names, diary, &index, length, cut, promise, found, gaps, checked)
            });
            match compared {
                Ok(()) => {
                    let fit = fit.get_or_insert(Fit { least: length, most: length });
                    fit.most = length;
                }
                Err(why) => {
                    let why = format!("after {length} changes: {why}");
                    // Wrong content says more than names that are of another moment.
                    if first_trouble.as_ref().is_none_or(|t| why.contains("byte") && !t.contains("byte")) {
                        first_trouble = Some(why);
                    }
                }
            }
        }
        fit.ok_or_else(|| {
            let mut names = Names::default();
            let mut fitting = Vec::new();
            for (n, e) in diary.names().enumerate() {
                names.apply(&e.what);
                if same_names(&names, diary, cut, found).is_ok() {
                    fitting.push(n + 1);
                }
            }
            format!(
                "(names fit {fitting:?}) none of its states fits, from {least} changes (demanded by the sync at {synced}) to {most}: {}",
                first_trouble.unwrap_or_default()
            )
        })
    }

    /// The lengths of the prefix that fit what was found on a mount that lives.
    pub fn lengths(&self, n: usize, cut: usize, found: &Tree) -> Result<(usize, usize), String> {
        let fit = self.fit(
            &self.diaries[n],
            &self.syncs(Promise::Local),
            cut,
            Promise::Local,
            found,
            false,
            &mut Checked::default(),
        )?;
        Ok((fit.least, fit.most))
    }

    #[allow(clippy::too_many_arguments)]
    fn same_content(
        &self,
        names: &Names,
        diary: &Diary,
        index: &Index<'_>,
        length: usize,
        cut: usize,
        promise: Promise,
        found: &Tree,
        gaps: bool,
        checked: &mut Checked,
    ) -> Result<(), String> {
        let shown = length.checked_sub(1).and_then(|n| index.names.get(n)).map_or(0, |e| e.start);
        let until = cut.min(diary.died.unwrap_or(NEVER));
        let all = if promise == Promise::Local { &self.everything } else { &self.replicated };
        let everything =
            all.iter().filter(|(_, end)| *end <= until).map(|(start, _)| *start).max().unwrap_or(0);
        for (path, thing) in &names.things {
            let Thing::File(file) = thing else { continue };
            let bytes = match &found[path].body {
                Body::File(bytes) => bytes,
                Body::Unread(_) if gaps => {
                    checked.unread += 1;
                    continue;
                }
                Body::Unread(why) => return Err(format!("no byte of {path} can be read: {why}")),
                Body::Dir | Body::Link(_) => unreachable!("its kind was compared"),
            };
            let story = index.files.get(file).map_or(&[][..], Vec::as_slice);
            let own = story.iter().filter_map(|e| match e.what {
                What::Sync(_) | What::Durable(_) if e.end <= until && promise == Promise::Local => {
                    Some(e.start)
                }
                What::Close(_) if e.end <= shown => Some(e.end),
                _ => None,
            });
            let synced = own.max().unwrap_or(0).max(everything);
            let events = story.iter().copied().filter(|e| e.what.content_of().is_some() && e.start < cut);
            same_bytes(bytes, events, synced, checked).map_err(|why| {
                let story: Vec<String> =
                    story.iter().filter(|e| e.start < cut).rev().take(12).map(|e| told(e)).collect();
                format!(
                    "{path} (file {file}, synced at {synced}, cut at {cut}): {why}; newest first: {}",
                    story.join(", ")
                )
            })?;
        }
        Ok(())
    }
}

fn told(e: &Event) -> String {
    let what = match &e.what {
        What::Write(_, at, bytes) => format!("write {at}+{}", bytes.len()),
        What::Truncate(_, len) => format!("truncate {len}"),
        What::Clear(_, at, len) => format!("punch {at}+{len}"),
        What::Close(_) => "close".into(),
        _ => "sync".into(),
    };
    let end = if e.end == NEVER { "never".into() } else { e.end.to_string() };
    format!("{what} at {}..{end}", e.start)
}

/// A diary by what is asked of it.
struct Index<'a> {
    names: Vec<&'a Event>,
    files: HashMap<FileNo, Vec<&'a Event>>,
}

impl<'a> Index<'a> {
    fn new(diary: &'a Diary) -> Self {
        let mut index = Self { names: Vec::new(), files: HashMap::new() };
        for e in &diary.events {
            match &e.what {
                What::Write(f, ..)
                | What::Truncate(f, _)
                | What::Clear(f, ..)
                | What::Close(f)
                | What::Durable(f)
                | What::Sync(Some(f)) => index.files.entry(*f).or_default().push(e),
                What::Sync(None) => {}
                _ => index.names.push(e),
            }
        }
        index
    }
}

impl Diary {
    fn names(&self) -> impl Iterator<Item = &Event> {
        self.events.iter().filter(|e| e.what.is_name())
    }
}

/// How much was compared, to see that it was not nothing.
#[derive(Clone, Copy, Debug, Default)]
pub struct Checked {
    /// Changes of names that had to be there.
    pub required: usize,
    /// Bytes that had to be exactly what they were.
    pub exact: u64,
    /// Bytes that could be old or new.
    pub loose: u64,
    /// Files that could not be read, which was no fault.
    pub unread: u64,
}

impl std::ops::AddAssign for Checked {
    fn add_assign(&mut self, other: Self) {
        self.required += other.required;
        self.exact += other.exact;
        self.loose += other.loose;
        self.unread += other.unread;
    }
}

fn same_names(names: &Names, diary: &Diary, cut: usize, found: &Tree) -> Result<(), String> {
    if let Some(path) = names.things.keys().find(|p| !found.contains_key(*p)) {
        return Err(format!("{path} is not there"));
    }
    if let Some(path) = found.keys().find(|p| !names.things.contains_key(*p)) {
        return Err(format!("{path} is there"));
    }
    let mut inos: HashMap<FileNo, u64> = HashMap::new();
    let mut files: HashMap<u64, FileNo> = HashMap::new();
    for (path, thing) in &names.things {
        let there = &found[path];
        let marks = match (thing, &there.body) {
            (Thing::Dir, Body::Dir) => names.dirs.get(path),
            (Thing::Link(target), Body::Link(t)) if t == target => None,
            (Thing::File(file), Body::File(_) | Body::Unread(_)) => {
                let ino = *inos.entry(*file).or_insert(there.ino);
                if ino != there.ino || *files.entry(there.ino).or_insert(*file) != *file {
                    return Err(format!("{path} leads to another file"));
                }
                names.files.get(file)
            }
            _ => return Err(format!("{path} is not {thing:?}")),
        };
        let Some(marks) = marks else { continue };
        if marks.mode.is_some_and(|m| m != there.mode) {
            return Err(format!("{path} has mode {:o}, not {:o}", there.mode, marks.mode.unwrap()));
        }
        if marks.xattr.is_some() && marks.xattr != there.xattr {
            return Err(format!("{path} has another extended attribute"));
        }
        if let (Some(time), Thing::File(file)) = (marks.time, thing) {
            let set =
                diary.events.iter().rposition(|e| matches!(e.what, What::Time(_, t) if t == time)).unwrap();
            let later = diary.events[set..].iter();
            let written = later.filter(|e| e.start < cut).any(|e| e.what.content_of() == Some(*file));
            if !written && there.time != time {
                return Err(format!("{path} has time {}, not {time}", there.time));
            }
        }
    }
    Ok(())
}

/// Compares a file's bytes: what was done before `synced` is there, the rest may be.
fn same_bytes<'a>(
    found: &[u8],
    events: impl Iterator<Item = &'a Event>,
    synced: usize,
    checked: &mut Checked,
) -> Result<(), String> {
    let mut base: Vec<u8> = Vec::new();
    let mut later: Vec<&Event> = Vec::new();
    for e in events {
        if e.end > synced {
            later.push(e);
            continue;
        }
        match &e.what {
            What::Write(_, at, bytes) => {
                let (at, end) = (*at as usize, *at as usize + bytes.len());
                if base.len() < end {
                    base.resize(end, 0);
                }
                base[at..end].copy_from_slice(bytes);
            }
            What::Truncate(_, len) => base.resize(*len as usize, 0),
            What::Clear(_, at, len) => {
                let end = ((at + len) as usize).min(base.len());
                if let Some(range) = base.get_mut(*at as usize..end) {
                    range.fill(0);
                }
            }
            _ => {}
        }
    }
    let (mut len, mut least, mut most) = (base.len() as u64, base.len() as u64, base.len() as u64);
    for e in &later {
        match &e.what {
            What::Write(_, at, bytes) => len = len.max(at + bytes.len() as u64),
            What::Truncate(_, l) => len = *l,
            _ => {}
        }
        (least, most) = (least.min(len), most.max(len));
    }
    let n = found.len() as u64;
    if n < least || n > most {
        return Err(format!("it has {n} bytes, not {least} to {most}"));
    }
    if later.is_empty() {
        checked.exact += n;
        return match found.iter().zip(&base).position(|(a, b)| a != b) {
            None => Ok(()),
            Some(at) => Err(format!("byte {at} of {n} is wrong, and nothing was written since")),
        };
    }
    let was = base.len();
    base.resize(base.len().max(found.len()), 0);
    for (start, chunk) in found.chunks(512).enumerate().map(|(i, c)| (i * 512, c)) {
        if *chunk == base[start..start + chunk.len()] {
            checked.exact += chunk.len() as u64;
            continue;
        }
        checked.loose += chunk.len() as u64;
        'bytes: for (at, byte) in chunk.iter().enumerate().map(|(i, b)| (start + i, *b)) {
            if byte == base[at] || byte == 0 && at >= was {
                continue;
            }
            for e in &later {
                let may = match &e.what {
                    What::Write(_, from, bytes) => {
                        at.checked_sub(*from as usize).and_then(|i| bytes.get(i)) == Some(&byte)
                    }
                    What::Truncate(_, len) => byte == 0 && at as u64 >= *len,
                    What::Clear(_, from, len) => byte == 0 && (*from..from + len).contains(&(at as u64)),
                    _ => false,
                };
                if may {
                    continue 'bytes;
                }
            }
            return Err(format!("byte {at} of {n} is {byte}: neither old ({}) nor new", base[at]));
        }
    }
    Ok(())
}
