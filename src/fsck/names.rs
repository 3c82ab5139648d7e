//! Names: whether they lead to inodes, inodes to names, and all of them to the root.
//!
//! Owns the rules of the directory entries, of link counts and of the list of what is being deleted.

use std::collections::{BTreeMap, HashSet};

use bytes::Bytes;

use super::types::{Findings, Fix, Kind, Place, Totals};
use super::{Input, Stop, number_of};
use crate::format::tables::{Dirent, FileKind, Inode, dirent_key, name_cookie, split_dirent_key, table};
use crate::ids::Ino;
use crate::vfs::NAME_MAX;

/// On the list of what is being deleted.
pub(super) const ORPHAN: u8 = 1;
/// Its row cannot be read.
pub(super) const UNREADABLE: u8 = 2;
/// Something is named in it.
const HAS_NAMES: u8 = 4;
/// A directory with a second name.
const TWICE: u8 = 8;
/// It was asked where it hangs: on the way, or done.
const ON_THE_WAY: u8 = 32;
const DONE: u8 = 64;

/// One inode.
pub(super) struct Node {
    pub ino: u64,
    /// The directory of its first (of a directory: its kept) name.
    pub parent: u64,
    /// A directory's parent, as its inode says.
    says: u64,
    names: u32,
    subdirs: u32,
    nlink: u32,
    kind: Option<FileKind>,
    pub flags: u8,
}

impl Node {
    pub fn new(ino: Ino, orphan: bool) -> Self {
        let flags = if orphan { ORPHAN } else { 0 };
        Self { ino: ino.0, parent: 0, says: 0, names: 0, subdirs: 0, nlink: 0, kind: None, flags }
    }

    pub fn take(&mut self, inode: &Inode) {
        self.kind = Some(inode.kind);
        self.nlink = inode.nlink;
        self.says = inode.parent.0;
    }

    fn is_dir(&self) -> bool {
        self.kind == Some(FileKind::Directory)
    }

    fn has(&self, flag: u8) -> bool {
        self.flags & flag != 0
    }

    fn is_root(&self) -> bool {
        self.ino == Ino::ROOT.0
    }
}

/// What is left of an inode that is not there: content, attributes or names in it.
#[derive(Default)]
pub(super) struct Missing {
    /// Something is named in it.
    pub directory: bool,
    /// Where its content ends.
    pub size: u64,
}

/// All inodes in the order of their numbers.
#[derive(Default)]
pub(super) struct Nodes {
    pub list: Vec<Node>,
    pub missing: BTreeMap<Ino, Missing>,
}

impl Nodes {
    fn index(&self, ino: u64) -> Option<usize> {
        self.list.binary_search_by_key(&ino, |n| n.ino).ok()
    }

    /// The directory in which an inode is named; `None` for one without a name.
    pub fn parent(&self, ino: Ino) -> Option<Ino> {
        let node = &self.list[self.index(ino.0)?];
        (node.names > 0).then_some(Ino(node.parent))
    }
}

fn text(name: &[u8]) -> String {
    name.escape_ascii().to_string()
}

fn is_legal(name: &[u8]) -> bool {
    let dots = name == b"." || name == b"..";
    !name.is_empty() && name.len() <= NAME_MAX && !dots && !name.contains(&b'/') && !name.contains(&0)
}

/// Checks all names against `nodes`.
pub(super) fn check(
    input: &Input<'_>,
    nodes: &mut Nodes,
    findings: &mut Findings,
    totals: &mut Totals,
) -> Result<(), Stop> {
    // A volume to which nothing was ever written has no root yet.
    let empty = nodes.list.is_empty() && nodes.missing.is_empty();
    let mut rows = input.rows(table::DIRENT);
    if empty && rows.peek()?.is_none() {
        return Ok(());
    }
    let mut dangling: Vec<(Ino, Bytes, Bytes)> = Vec::new();
    let mut moved: HashSet<Bytes> = HashSet::new();
    while let Some((key, value)) = rows.next()? {
        totals.names += 1;
        entry(input, nodes, &key, &value, &mut dangling, &mut moved, findings)?;
    }
    resolve_dangling(nodes, &dangling, findings);
    keep_one_name(input, nodes, findings)?;
    if nodes.index(Ino::ROOT.0).is_none() {
        let fix = Fix::MakeInode { ino: Ino::ROOT, directory: true, size: 0 };
        findings.about(Kind::RootMissing, Some(fix), || "the root directory has no inode".to_owned());
        nodes.missing.remove(&Ino::ROOT);
    } else if nodes.index(Ino::ROOT.0).is_some_and(|i| !nodes.list[i].is_dir()) {
        findings.about(Kind::RootMissing, None, || {
            "the root is no directory: bring the volume back from a replica, with an empty state folder"
                .to_owned()
        });
    }
    for (ino, Missing { directory, size }) in std::mem::take(&mut nodes.missing) {
        let fix = Fix::MakeInode { ino, directory, size };
        findings.push(Kind::InodeMissing, Place::Volume, Some(fix), || {
            let what = if directory { "names lie in it" } else { "there is content or attributes of it" };
            format!("inode {ino} is not there, but {what}")
        });
    }
    check_ways(nodes, findings);
    check_links(nodes, findings);
    Ok(())
}

/// One directory entry.
fn entry(
    input: &Input<'_>,
    nodes: &mut Nodes,
    key: &Bytes,
    value: &[u8],
    dangling: &mut Vec<(Ino, Bytes, Bytes)>,
    moved: &mut HashSet<Bytes>,
    findings: &mut Findings,
) -> Result<(), Stop> {
    let parent = Ino(number_of(key));
    let (Some((cookie, name)), Ok(dirent)) = (split_dirent_key(key), Dirent::decode(value)) else {
        findings.at(Kind::Unreadable, parent, None, || {
            "it holds a name that cannot be read: remove it, or bring it back with mirrorfs restore"
                .to_owned()
        });
        return Ok(());
    };
    let name = key.slice_ref(name);
    let place = || Place::Name(parent, name.clone());
    let remove = || Some(Fix::RemoveName { key: key.clone() });
    let ino = dirent.ino;
    match nodes.index(parent.0) {
        None => {
            nodes.missing.entry(parent).or_default().directory = true;
        }
        Some(i) if !nodes.list[i].is_dir() && !nodes.list[i].has(UNREADABLE) => {
            findings.push(Kind::NameInFile, place(), remove(), || {
                format!("a name for inode {ino} lies in inode {parent}, which is no directory")
            });
            return Ok(());
        }
        Some(i) => nodes.list[i].flags |= HAS_NAMES,
    }
    if !is_legal(&name) {
        findings.push(Kind::NameIllegal, place(), remove(), || {
            format!("inode {ino} has the impossible name \"{}\"", text(&name))
        });
        return Ok(());
    }
    if cookie != name_cookie(&name) {
        let right = dirent_key(parent, &name);
        let duplicate = input.source.get(&right)?.is_some() || !moved.insert(right);
        let fix = if duplicate { remove() } else { Some(Fix::MoveName { key: key.clone() }) };
        findings.push(Kind::NameMisplaced, place(), fix, || {
            let more = if duplicate { ", and it is there a second time" } else { "" };
            format!("it is not in its place in the directory, so it is listed but not found{more}")
        });
        if duplicate {
            return Ok(());
        }
    }
    let Some(i) = nodes.index(ino.0) else {
        dangling.push((ino, key.clone(), name.clone()));
        return Ok(());
    };
    let node = &mut nodes.list[i];
    if let Some(kind) = node.kind.filter(|k| *k != dirent.kind) {
        let fix = Fix::SetNameKind { key: key.clone(), kind };
        findings.push(Kind::NameKind, place(), Some(fix), || {
            format!("the directory says {:?}, the inode {ino} says {kind:?}", dirent.kind)
        });
    }
    if node.is_dir() && (node.names > 0 || node.is_root()) {
        // Which of them stays is decided when all are known.
        node.flags |= TWICE;
        node.names = node.names.saturating_add(1);
        return Ok(());
    }
    node.names = node.names.saturating_add(1);
    if node.parent == 0 {
        node.parent = parent.0;
    }
    if node.is_dir()
        && let Some(above) = nodes.index(parent.0)
    {
        nodes.list[above].subdirs += 1;
    }
    Ok(())
}

/// Names of inodes that are not there: taken away when nothing at all is left of the inode.
fn resolve_dangling(nodes: &Nodes, dangling: &[(Ino, Bytes, Bytes)], findings: &mut Findings) {
    for (ino, key, name) in dangling {
        if nodes.missing.contains_key(ino) {
            continue;
        }
        let place = Place::Name(Ino(number_of(key)), name.clone());
        findings.push(Kind::NameLeadsNowhere, place, Some(Fix::RemoveName { key: key.clone() }), || {
            format!("it leads to inode {ino}, of which nothing is there")
        });
    }
}

/// Of several names of one directory the one stays that its inode knows, or the first.
fn keep_one_name(input: &Input<'_>, nodes: &mut Nodes, findings: &mut Findings) -> Result<(), Stop> {
    let several: HashSet<u64> = nodes.list.iter().filter(|n| n.has(TWICE)).map(|n| n.ino).collect();
    if several.is_empty() {
        return Ok(());
    }
    let mut all: BTreeMap<u64, Vec<(Bytes, u64)>> = BTreeMap::new();
    let mut rows = input.rows(table::DIRENT);
    while let Some((key, value)) = rows.next()? {
        if let Ok(dirent) = Dirent::decode(&value)
            && several.contains(&dirent.ino.0)
            && split_dirent_key(&key).is_some_and(|(_, name)| is_legal(name))
        {
            let parent = number_of(&key);
            all.entry(dirent.ino.0).or_default().push((key, parent));
        }
    }
    for (ino, names) in all {
        let Some(i) = nodes.index(ino) else { continue };
        let (says, first) = (nodes.list[i].says, nodes.list[i].parent);
        let root = nodes.list[i].is_root();
        let kept = if root { None } else { names.iter().position(|(_, p)| *p == says).or(Some(0)) };
        for (_, (key, parent)) in names.iter().enumerate().filter(|(n, _)| Some(*n) != kept) {
            let Some((_, name)) = split_dirent_key(key) else { continue };
            let place = Place::Name(Ino(*parent), key.slice_ref(name));
            findings.push(Kind::NameTwice, place, Some(Fix::RemoveName { key: key.clone() }), || {
                let other = if root { "it is the root" } else { "it has another name" };
                format!("a name too many for directory {ino}: {other}")
            });
        }
        let parent = kept.and_then(|k| names.get(k)).map_or(0, |(_, p)| *p);
        // It was counted where it was met first.
        for (at, step) in [(first, -1), (parent, 1)] {
            if at != 0
                && let Some(above) = nodes.index(at)
            {
                nodes.list[above].subdirs = nodes.list[above].subdirs.saturating_add_signed(step);
            }
        }
        let node = &mut nodes.list[i];
        node.parent = parent;
        node.names = u32::from(kept.is_some());
    }
    Ok(())
}

/// Follows every directory to the root.
fn check_ways(nodes: &mut Nodes, findings: &mut Findings) {
    for start in 0..nodes.list.len() {
        if !nodes.list[start].is_dir() || nodes.list[start].has(DONE) {
            continue;
        }
        let mut way = Vec::new();
        let mut at = start;
        loop {
            let node = &mut nodes.list[at];
            if node.has(ON_THE_WAY) {
                circle(nodes, &way, at, findings);
                break;
            }
            if node.has(DONE) {
                break;
            }
            node.flags |= ON_THE_WAY;
            way.push(at);
            if node.is_root() || node.names == 0 {
                break;
            }
            match nodes.index(nodes.list[at].parent) {
                Some(above) => at = above,
                // Its directory is missing, and is made again.
                None => break,
            }
        }
        for i in way {
            nodes.list[i].flags = nodes.list[i].flags & !ON_THE_WAY | DONE;
        }
    }
}

fn circle(nodes: &Nodes, way: &[usize], at: usize, findings: &mut Findings) {
    let begin = way.iter().position(|i| *i == at).unwrap_or(0);
    let members: Vec<u64> = way[begin..].iter().map(|i| nodes.list[*i].ino).collect();
    let least = members.iter().min().copied().unwrap_or(0);
    let parent = nodes.index(least).map_or(0, |i| nodes.list[i].parent);
    let fix = Fix::BreakCycle { ino: Ino(least), parent: Ino(parent) };
    findings.at(Kind::Cycle, Ino(least), Some(fix), || {
        let list: Vec<String> = members.iter().take(8).map(u64::to_string).collect();
        format!("directories {} lie in each other, and not below the root", list.join(", "))
    });
}

/// Compares every inode's link count and marks with its names.
fn check_links(nodes: &Nodes, findings: &mut Findings) {
    for node in nodes.list.iter().filter(|n| !n.has(UNREADABLE)) {
        let ino = Ino(node.ino);
        let orphan = node.has(ORPHAN);
        if node.is_dir() {
            check_parent(node, findings);
        }
        if node.names == 0 && !node.is_root() {
            unnamed(node, orphan, findings);
            continue;
        }
        if orphan {
            findings.at(Kind::OrphanHasName, ino, Some(Fix::Unlist { ino }), || {
                "it is on the list of what is deleted, but has a name".to_owned()
            });
        }
        let counted = if node.is_dir() { node.subdirs.saturating_add(2) } else { node.names };
        if counted != node.nlink {
            findings.at(Kind::LinkCount, ino, Some(Fix::SetLinks { ino, links: counted }), || {
                let (names, subdirs) = (node.names, node.subdirs);
                match node.is_dir() {
                    true => format!("link count {}, but {subdirs} subdirectories make {counted}", node.nlink),
                    false => format!("link count {}, but {names} names", node.nlink),
                }
            });
        }
    }
}

fn check_parent(node: &Node, findings: &mut Findings) {
    let ino = Ino(node.ino);
    let is = if node.is_root() { Ino::ROOT.0 } else { node.parent };
    if (node.is_root() || node.names > 0) && node.says != is {
        findings.at(Kind::WrongParent, ino, Some(Fix::SetParent { ino, parent: Ino(is) }), || {
            format!("its inode says that it lies in directory {}, but it lies in {is}", node.says)
        });
    }
}

fn unnamed(node: &Node, orphan: bool, findings: &mut Findings) {
    let ino = Ino(node.ino);
    let unlist = || Some(Fix::Unlist { ino });
    if !orphan {
        findings.at(Kind::NoName, ino, Some(Fix::Adopt { ino }), || {
            "no name leads to it, and it is not being deleted".to_owned()
        });
    } else if node.has(HAS_NAMES) {
        findings.at(Kind::OrphanHasNames, ino, unlist(), || {
            "a removed directory in which there are names".to_owned()
        });
    } else if node.nlink > 0 {
        findings.at(Kind::OrphanKept, ino, unlist(), || {
            let links = node.nlink;
            format!("it is on the list of what is deleted, but its link count is {links}")
        });
    }
}
