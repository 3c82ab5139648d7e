//! What a power loss leaves: the platter under a recorded disk.
//!
//! Owns the rules of what is certain to be there, what may be there, and the dice in between. Knows nothing of who wrote.
//!
//! Content: what was written to a file is certain after an fsync or fdatasync of that file. Everything later may be there or not,
//! page by page, in any order, in any version that the page ever had, or torn between two at a sector's edge.
//!
//! Names, lengths that were cut, holes that were punched (metadata), by [`Rules`]:
//!
//! * `Journal`, as ext4 has it: metadata is written in the order in which it was changed, all of it up to some moment. An fsync
//!   makes that moment at least the last change of the metadata *of what was synced*; an fdatasync only of what is needed to read
//!   the data (a new file, a new length, a hole filled): overwriting in place brings nothing else along.
//! * `Folders`, what POSIX promises and no more: each directory has an order of its own, and only an fsync of a directory makes
//!   its names certain. A file that was synced in a directory that was not may be gone.

use std::collections::{BTreeMap, HashMap, HashSet};

use rand::Rng;
use rand::seq::IndexedRandom;
use rand_chacha::ChaCha8Rng;

use crate::disk::{
    Content, Id, Kind, Node, Op, PAGE, Page, Place, ROOT, SECTOR, Tree, patched, pieces, zero_page,
};

/// How the filesystem below keeps its metadata.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rules {
    Journal,
    Folders,
}

/// Everything that is certain, and everything that is not.
pub struct Platter {
    rules: Rules,
    /// Names as they are for certain; every file and directory that ever was, with its certain content.
    certain: Tree,
    /// Changes of names and modes that are not certain, in order.
    names: Vec<(usize, Op)>,
    /// Changes of content that are not certain, in order.
    content: HashMap<Id, Vec<(usize, Op)>>,
    /// Last change of the metadata of each: of any, and of what is needed to read its data.
    changed: HashMap<Id, (usize, usize)>,
    /// Content as it would be without a power loss: which pages are holes, how long it is.
    shape: HashMap<Id, (u64, HashSet<u64>)>,
    /// Under `Journal`: metadata before this moment is certain.
    upto: usize,
    now: usize,
}

fn places(op: &Op) -> Vec<&Place> {
    match op {
        Op::Create { place, .. } | Op::Link { place, .. } | Op::Unlink { place, .. } => vec![place],
        Op::Rename { from, to, .. } => vec![from, to],
        _ => Vec::new(),
    }
}

fn subject(op: &Op) -> Id {
    match op {
        Op::Create { id, .. }
        | Op::Link { id, .. }
        | Op::Unlink { id, .. }
        | Op::Rename { id, .. }
        | Op::Mode { id, .. }
        | Op::Write { id, .. }
        | Op::Truncate { id, .. }
        | Op::Clear { id, .. }
        | Op::Sync { id, .. } => *id,
        Op::Tick => 0,
    }
}

impl Platter {
    pub fn new(start: &Tree, rules: Rules) -> Self {
        let shape = start
            .nodes
            .iter()
            .map(|(id, n)| (*id, (n.content.len, n.content.pages.keys().copied().collect())))
            .collect();
        Self {
            rules,
            certain: start.clone(),
            names: Vec::new(),
            content: HashMap::new(),
            changed: HashMap::new(),
            shape,
            upto: 0,
            now: 0,
        }
    }

    /// Operations so far.
    pub fn now(&self) -> usize {
        self.now
    }

    /// Takes the next operation.
    pub fn push(&mut self, op: &Op) {
        let at = self.now;
        self.now += 1;
        let id = subject(op);
        match op {
            Op::Create { kind, mode, .. } => {
                self.certain.nodes.insert(id, Node::new(kind.clone(), *mode));
                self.shape.insert(id, (0, HashSet::new()));
                self.touch(id, at, true);
                self.name(at, op);
            }
            Op::Link { .. } | Op::Unlink { .. } | Op::Rename { .. } => {
                self.touch(id, at, false);
                self.name(at, op);
            }
            Op::Mode { .. } => {
                self.touch(id, at, false);
                self.names.push((at, op.clone()));
            }
            Op::Write { at: from, bytes, .. } => {
                let shape = self.shape.get_mut(&id).unwrap();
                let end = from + bytes.len() as u64;
                let mut grows = end > shape.0;
                shape.0 = shape.0.max(end);
                for (page, ..) in pieces(*from, bytes.len()) {
                    grows |= shape.1.insert(page);
                }
                self.touch(id, at, grows);
                self.content.entry(id).or_default().push((at, op.clone()));
            }
            Op::Truncate { len, .. } => {
                let shape = self.shape.get_mut(&id).unwrap();
                shape.0 = *len;
                shape.1.retain(|p| p * (PAGE as u64) < *len);
                self.touch(id, at, true);
                self.content.entry(id).or_default().push((at, op.clone()));
            }
            Op::Clear { at: from, len, .. } => {
                let shape = self.shape.get_mut(&id).unwrap();
                let (first, end) = (from.div_ceil(PAGE as u64), (from + len) / PAGE as u64);
                shape.1.retain(|p| !(first..end).contains(p));
                self.touch(id, at, true);
                self.content.entry(id).or_default().push((at, op.clone()));
            }
            Op::Sync { data_only, .. } => self.sync(id, *data_only),
            Op::Tick => {}
        }
        if self.now.is_multiple_of(4096) {
            self.sweep();
        }
    }

    fn touch(&mut self, id: Id, at: usize, needed: bool) {
        let changed = self.changed.entry(id).or_default();
        changed.0 = at + 1;
        if needed {
            changed.1 = at + 1;
        }
    }

    fn name(&mut self, at: usize, op: &Op) {
        for place in places(op) {
            self.touch(place.0, at, true);
        }
        self.names.push((at, op.clone()));
    }

    fn sync(&mut self, id: Id, data_only: bool) {
        for (_, op) in self.content.remove(&id).unwrap_or_default() {
            self.certain.apply(&op);
        }
        match self.rules {
            Rules::Journal => {
                let changed = self.changed.get(&id).copied().unwrap_or_default();
                self.upto = self.upto.max(if data_only { changed.1 } else { changed.0 });
                let upto = self.upto;
                self.settle(|at, _| at < upto);
            }
            Rules::Folders => {
                // All changes of this directory, and those of others that came before one that concerns both.
                let mut chosen: HashSet<usize> = HashSet::new();
                let mut until: HashMap<Id, usize> = HashMap::from([(id, usize::MAX)]);
                for (at, op) in self.names.iter().rev() {
                    let mode = matches!(op, Op::Mode { .. }) && subject(op) == id;
                    if mode || places(op).iter().any(|p| until.get(&p.0).is_some_and(|u| at <= u)) {
                        chosen.insert(*at);
                        for place in places(op) {
                            let u = until.entry(place.0).or_insert(*at);
                            *u = (*u).max(*at);
                        }
                    }
                }
                self.settle(|at, _| chosen.contains(&at));
            }
        }
    }

    fn settle(&mut self, is_certain: impl Fn(usize, &Op) -> bool) {
        let (certain, names): (Vec<_>, Vec<_>) =
            std::mem::take(&mut self.names).into_iter().partition(|(at, op)| is_certain(*at, op));
        self.names = names;
        for (_, op) in certain {
            apply_name(&mut self.certain, &op);
        }
    }

    /// Forgets files that no name, certain or not, leads to.
    fn sweep(&mut self) {
        let mut kept: HashSet<Id> = [ROOT].into();
        kept.extend(self.certain.nodes.values().flat_map(|n| n.names.values()));
        for (_, op) in &self.names {
            kept.insert(subject(op));
            kept.extend(places(op).iter().map(|p| p.0));
            if let Op::Rename { exchanged: Some(other), .. } = op {
                kept.insert(*other);
            }
        }
        for (id, node) in &mut self.certain.nodes {
            if !kept.contains(id) && node.kind == Kind::File {
                // The descriptor may be open still: only the bytes go.
                node.content = Content::default();
                self.content.remove(id);
            }
        }
    }

    /// One of the states that a power loss at this moment may leave.
    pub fn image(&self, rng: &mut ChaCha8Rng) -> Tree {
        let mut tree = Tree { nodes: HashMap::new() };
        for (id, node) in &self.certain.nodes {
            let without = Node { content: Content::default(), ..node.clone() };
            tree.nodes.insert(*id, without);
        }
        // How much of what is not certain got there: often all or nothing.
        let mood = *[0.0, 0.0, 0.1, 0.5, 0.9, 1.0, 1.0].choose(rng).unwrap();
        let written = match rng.random_range(0..4) {
            0 => self.upto,
            1 => self.now,
            _ => rng.random_range(self.upto..=self.now),
        };
        match self.rules {
            Rules::Journal => {
                for (at, op) in &self.names {
                    if *at < written {
                        apply_name(&mut tree, op);
                    }
                }
            }
            Rules::Folders => self.some_names(&mut tree, mood, rng),
        }
        tree.sweep();
        let mut files: Vec<Id> =
            tree.nodes.iter().filter(|(_, n)| n.kind == Kind::File).map(|(id, _)| *id).collect();
        files.sort_unstable();
        for id in files {
            let upto = match self.rules {
                Rules::Journal => written,
                Rules::Folders if rng.random_bool(0.3) => 0,
                Rules::Folders if rng.random_bool(0.5) => self.now,
                Rules::Folders => rng.random_range(0..=self.now),
            };
            let mood = if rng.random_bool(0.7) { mood } else { rng.random() };
            let content = self.certain.nodes[&id].content.clone();
            let changes = self.content.get(&id).map_or(&[][..], Vec::as_slice);
            tree.node(id).content = some_content(content, changes, upto, mood, rng);
        }
        tree
    }

    /// Each directory up to a moment of its own.
    fn some_names(&self, tree: &mut Tree, mood: f64, rng: &mut ChaCha8Rng) {
        let mut end: BTreeMap<Id, usize> = BTreeMap::new();
        for (_, op) in &self.names {
            for place in places(op) {
                end.entry(place.0).or_default();
            }
        }
        for until in end.values_mut() {
            *until = if rng.random_bool(mood) { self.now } else { rng.random_range(0..=self.now) };
            if rng.random_bool((1.0 - mood) / 2.0) {
                *until = 0;
            }
        }
        for (at, op) in &self.names {
            let dirs: Vec<Id> = places(op).iter().map(|p| p.0).collect();
            if dirs.iter().all(|d| *at < end[d]) {
                apply_name(tree, op);
            } else {
                // What comes later in these directories does not overtake it.
                for d in dirs {
                    let until = end.get_mut(&d).unwrap();
                    *until = (*until).min(*at);
                }
            }
        }
    }
}

/// Changes names alone; what they lead to exists already.
fn apply_name(tree: &mut Tree, op: &Op) {
    match op {
        Op::Create { place, id, .. } | Op::Link { id, place } => {
            tree.node(place.0).names.insert(place.1.clone(), *id);
        }
        Op::Unlink { place, .. } => {
            tree.node(place.0).names.remove(&place.1);
        }
        Op::Rename { id, from, to, exchanged } => {
            tree.node(from.0).names.remove(&from.1);
            if let Some(other) = exchanged {
                tree.node(from.0).names.insert(from.1.clone(), *other);
            }
            tree.node(to.0).names.insert(to.1.clone(), *id);
        }
        Op::Mode { id, mode } => tree.node(*id).mode = *mode,
        _ => {}
    }
}

/// A file with some of the changes that were not synced. `upto`: metadata before this moment is there.
fn some_content(
    mut content: Content,
    changes: &[(usize, Op)],
    upto: usize,
    mood: f64,
    rng: &mut ChaCha8Rng,
) -> Content {
    // Versions of each page that was written since; the certain one is not among them.
    let mut versions: BTreeMap<u64, Vec<Page>> = BTreeMap::new();
    // Pages that would lie in space that was given back and taken anew by changes that are not there.
    let mut lost: Vec<(u64, u64)> = Vec::new();
    let mut longest = content.len;
    let growths = changes.iter().filter(|(_, op)| matches!(op, Op::Write { .. })).count();
    let mut grown = if rng.random_bool(mood) { growths } else { rng.random_range(0..=growths) };
    for (at, op) in changes {
        let there = *at < upto;
        match op {
            Op::Write { at: from, bytes, .. } => {
                bytes.with(|b| {
                    for (page, within, start, n) in pieces(*from, b.len()) {
                        if lost.iter().any(|(first, end)| (*first..*end).contains(&page)) {
                            continue;
                        }
                        let all = versions.entry(page).or_default();
                        let newest = all.last().or(content.pages.get(&page));
                        let new = patched(newest, within, &b[start..start + n]);
                        all.push(new);
                    }
                });
                if there || grown > 0 {
                    longest = longest.max(from + bytes.len() as u64);
                }
                grown = grown.saturating_sub(1);
            }
            Op::Truncate { len, .. } if there => {
                clear_all(&mut content, &mut versions, *len, u64::MAX - len);
                longest = *len;
            }
            Op::Clear { at: from, len, .. } if there => clear_all(&mut content, &mut versions, *from, *len),
            Op::Truncate { len, .. } => lost.push((len.div_ceil(PAGE as u64), u64::MAX)),
            Op::Clear { at: from, len, .. } => {
                lost.push((from.div_ceil(PAGE as u64), (from + len) / PAGE as u64));
            }
            _ => {}
        }
    }
    for (page, all) in versions {
        let old = content.pages.get(&page).cloned().unwrap_or_else(zero_page);
        let pick = |rng: &mut ChaCha8Rng| -> Page {
            if rng.random_bool(mood) {
                return all.last().cloned().unwrap_or_else(|| old.clone());
            }
            let n = rng.random_range(0..=all.len());
            if n == 0 { old.clone() } else { all[n - 1].clone() }
        };
        let mut new = pick(rng);
        if rng.random_bool(0.15) {
            let other = pick(rng);
            let mut torn = *new;
            let edge = rng.random_range(0..=PAGE / SECTOR) * SECTOR;
            match rng.random_range(0..3) {
                0 => torn[edge..].copy_from_slice(&other[edge..]),
                1 => torn[..edge].copy_from_slice(&other[..edge]),
                _ => {
                    for s in (0..PAGE).step_by(SECTOR).filter(|_| rng.random()) {
                        torn[s..s + SECTOR].copy_from_slice(&other[s..s + SECTOR]);
                    }
                }
            }
            new = patched(None, 0, &torn);
        }
        if page * (PAGE as u64) < longest {
            content.pages.insert(page, new);
        }
    }
    // What lies behind the end reads as zeros if the file ever grows again.
    content.len = content.len.max(longest);
    content.truncate(longest);
    content.clear(longest, PAGE as u64);
    content
}

fn clear_all(content: &mut Content, versions: &mut BTreeMap<u64, Vec<Page>>, at: u64, len: u64) {
    content.clear(at, len);
    let end = at.saturating_add(len);
    let (first, last) = (at.div_ceil(PAGE as u64), end / PAGE as u64);
    versions.retain(|page, _| !(first..last).contains(page));
    for (page, all) in versions.range_mut(at / PAGE as u64..) {
        let start = page * PAGE as u64;
        if start >= end {
            break;
        }
        let (from, to) = (at.max(start) - start, end.min(start + PAGE as u64) - start);
        for version in all {
            *version = patched(Some(version), from as usize, &vec![0; (to - from) as usize]);
        }
    }
}
