//! From findings to changes of the tables that mend them.
//!
//! Owns what each [`Fix`] comes to. Pure: reads tables, answers operations; whoever asks puts them through ordinary transactions. Nothing
//! is taken away that could be content: what nothing leads to gets a name in `/lost+found`.

use std::collections::BTreeMap;

use bytes::Bytes;

use super::types::{Finding, Fix};
use super::{Source, Stop};
use crate::format::local::{FrameValue, SegmentValue};
use crate::format::record::Op;
use crate::format::tables::{
    Dirent, Extents, FileKind, Inode, Time, block_refs_key, chunk_of_extent_key, dirent_key, dirent_range,
    extent_key, frame_key, inode_key, orphan_key, segment_key, split_dirent_key, volume_key,
};
use crate::ids::{BlockHash, BlockId, Ino};
use crate::vfs::{NEXT_INO, USAGE, Usage, units};

/// Name of the directory in the root for what has lost its name.
const LOST_FOUND: &[u8] = b"lost+found";
/// Rows read at a time.
const PAGE: usize = 1024;

/// What mends one finding: to be put into one transaction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mend {
    /// Which finding of the list.
    pub finding: usize,
    /// The changes.
    pub ops: Vec<Op>,
}

/// Plans what mends `findings`, one after the other. Where structure is to be mended only that is planned: what is counted is to be
/// checked anew behind it. A finding for which nothing can be done is left out.
pub fn plan(
    source: &dyn Source,
    findings: &[Finding],
    now: Time,
    owner: (u32, u32),
) -> Result<Vec<Mend>, Stop> {
    let structure = findings.iter().any(|f| f.fix.as_ref().is_some_and(Fix::is_structure));
    let mut work = Work { source, now, owner, changes: BTreeMap::new(), ops: Vec::new() };
    let wanted = |fix: &Fix| fix.is_structure() == structure;
    let mut fixes: Vec<(usize, &Fix)> = findings
        .iter()
        .enumerate()
        .filter_map(|(n, f)| Some((n, f.fix.as_ref().filter(|x| wanted(x))?)))
        .collect();
    // New numbers are given by others: first of all they must be right. Then there must be a root to put things into.
    fixes.sort_by_key(|(_, fix)| match fix {
        Fix::SetNext { .. } => 0,
        Fix::MakeInode { .. } => 1,
        _ => 2,
    });
    let mut mends = Vec::new();
    for (finding, fix) in fixes {
        work.ops.clear();
        if work.fix(fix)? && !work.ops.is_empty() {
            for op in &work.ops {
                let (key, value) = match op {
                    Op::Put { key, value } => (key, Some(value.clone())),
                    Op::Delete { key } => (key, None),
                };
                work.changes.insert(key.clone(), value);
            }
            mends.push(Mend { finding, ops: std::mem::take(&mut work.ops) });
        }
    }
    Ok(mends)
}

/// The tables with what is planned already.
struct Work<'a> {
    source: &'a dyn Source,
    now: Time,
    owner: (u32, u32),
    changes: BTreeMap<Bytes, Option<Bytes>>,
    /// What the finding at hand takes.
    ops: Vec<Op>,
}

impl Work<'_> {
    fn get(&self, key: &[u8]) -> Result<Option<Bytes>, Stop> {
        let own = self.ops.iter().rev().find(|op| op.key() == key);
        match (own, self.changes.get(key)) {
            (Some(Op::Put { value, .. }), _) => Ok(Some(value.clone())),
            (Some(Op::Delete { .. }), _) => Ok(None),
            (None, Some(value)) => Ok(value.clone()),
            (None, None) => self.source.get(key),
        }
    }

    fn put(&mut self, key: Bytes, value: impl Into<Bytes>) {
        self.ops.push(Op::Put { key, value: value.into() });
    }

    fn delete(&mut self, key: Bytes) {
        self.ops.push(Op::Delete { key });
    }

    fn inode(&self, ino: Ino) -> Result<Option<Inode>, Stop> {
        Ok(self.get(&inode_key(ino))?.and_then(|v| Inode::decode(&v).ok()))
    }

    /// Changes an inode; false when it cannot be read.
    fn change(&mut self, ino: Ino, change: impl FnOnce(&mut Inode)) -> Result<bool, Stop> {
        let Some(mut inode) = self.inode(ino)? else { return Ok(false) };
        change(&mut inode);
        self.put(inode_key(ino), inode.encode());
        Ok(true)
    }

    /// Plans one fix; false when it cannot be done.
    fn fix(&mut self, fix: &Fix) -> Result<bool, Stop> {
        match fix {
            Fix::RemoveName { key } | Fix::DeleteRow { key } => self.delete(key.clone()),
            Fix::MoveName { key } => {
                let (Some(value), Some((_, name))) = (self.get(key)?, split_dirent_key(key)) else {
                    return Ok(false);
                };
                self.delete(key.clone());
                self.put(dirent_key(Ino(super::number_of(key)), name), value);
            }
            Fix::SetNameKind { key, kind } => {
                let dirent = self.get(key)?.and_then(|v| Dirent::decode(&v).ok());
                let Some(dirent) = dirent else { return Ok(false) };
                self.put(key.clone(), Dirent { kind: *kind, ..dirent }.encode());
            }
            Fix::MakeInode { ino, directory, size } => {
                let parent = if *ino == Ino::ROOT { Ino::ROOT } else { Ino(0) };
                let inode =
                    Inode { size: if *directory { 0 } else { *size }, parent, ..self.new_inode(*directory) };
                self.put(inode_key(*ino), inode.encode());
            }
            Fix::SetParent { ino, parent } => return self.change(*ino, |i| i.parent = *parent),
            Fix::Adopt { ino } => return self.adopt(*ino),
            Fix::BreakCycle { ino, parent } => {
                let Some(key) = self.name_of(*ino, *parent)? else { return Ok(false) };
                self.delete(key);
                return self.adopt(*ino);
            }
            Fix::Unlist { ino } => self.delete(orphan_key(*ino)),
            Fix::MoveBlocks { ino, size } => return self.move_blocks(*ino, *size),
            Fix::AdoptBlock { block, len } => return self.adopt_block(*block, *len),
            Fix::SetSize { ino, size } => return self.change(*ino, |i| i.size = *size),
            Fix::SetLinks { ino, links } => return self.change(*ino, |i| i.nlink = *links),
            Fix::ClearDirectory { ino } => return self.change(*ino, |i| (i.size, i.blocks) = (0, 0)),
            Fix::SetUnits { ino, units } => return self.change(*ino, |i| i.blocks = *units),
            Fix::SetReferences { block, references } => match references.saturating_sub(1) {
                0 => self.delete(block_refs_key(*block)),
                more => self.put(block_refs_key(*block), more.to_le_bytes().to_vec()),
            },
            Fix::SetFrame { hash, entry, uses } => return self.set_frame(hash, entry.as_deref(), *uses),
            Fix::SetLive { segment, live } => {
                let key = segment_key(*segment);
                let value = self.get(&key)?.and_then(|v| SegmentValue::decode(&v).ok());
                let Some(value) = value else { return Ok(false) };
                self.put(key, SegmentValue { live: *live, ..value }.encode());
            }
            Fix::SetNext { name, next } => self.put(volume_key(name), next.to_le_bytes().to_vec()),
            Fix::SetUsage { blocks, inodes } => {
                self.put(volume_key(USAGE), Usage { blocks: *blocks, inodes: *inodes }.encode());
            }
        }
        Ok(true)
    }

    fn set_frame(
        &mut self,
        hash: &BlockHash,
        entry: Option<&crate::format::tables::BlockEntry>,
        uses: u64,
    ) -> Result<bool, Stop> {
        let key = frame_key(hash);
        let known = self.get(&key)?.and_then(|v| FrameValue::decode(&v).ok()).map(|f| f.entry);
        match entry.copied().or(known) {
            _ if uses == 0 => self.delete(key),
            Some(entry) => self.put(key, FrameValue { entry, uses }.encode()),
            None => return Ok(false),
        }
        Ok(true)
    }

    fn new_inode(&self, directory: bool) -> Inode {
        let (kind, perm) = if directory { (FileKind::Directory, 0o700) } else { (FileKind::Regular, 0o600) };
        Inode::new(kind, perm, self.owner, self.now)
    }

    /// A number that no inode ever had.
    fn new_ino(&mut self) -> Result<Ino, Stop> {
        let next = self.get(&volume_key(NEXT_INO))?;
        let next = next.and_then(|v| v[..].try_into().ok()).map_or(2, u64::from_le_bytes);
        self.put(volume_key(NEXT_INO), next.saturating_add(1).to_le_bytes().to_vec());
        Ok(Ino(next))
    }

    /// `/lost+found`, made when there is none; `None` without a root directory.
    fn lost_found(&mut self) -> Result<Option<Ino>, Stop> {
        if self.inode(Ino::ROOT)?.is_none_or(|root| root.kind != FileKind::Directory) {
            return Ok(None);
        }
        for n in 1..100 {
            let name = match n {
                1 => LOST_FOUND.to_vec(),
                n => [LOST_FOUND, format!("-{n}").as_bytes()].concat(),
            };
            let key = dirent_key(Ino::ROOT, &name);
            match self.get(&key)? {
                None => {
                    let ino = self.new_ino()?;
                    let inode = Inode { parent: Ino::ROOT, ..self.new_inode(true) };
                    self.put(inode_key(ino), inode.encode());
                    self.put(key, Dirent { ino, kind: FileKind::Directory }.encode());
                    return Ok(Some(ino));
                }
                Some(value) => {
                    let ino = Dirent::decode(&value).map(|d| d.ino).unwrap_or_default();
                    if self.inode(ino)?.is_some_and(|i| i.kind == FileKind::Directory) {
                        return Ok(Some(ino));
                    }
                }
            }
        }
        Ok(None)
    }

    /// Enters a name in `/lost+found`; gives that directory.
    fn name_there(&mut self, ino: Ino, kind: FileKind, name: &str) -> Result<Option<Ino>, Stop> {
        let Some(dir) = self.lost_found()? else { return Ok(None) };
        for n in 1..1000 {
            let name = if n == 1 { name.to_owned() } else { format!("{name}-{n}") };
            let key = dirent_key(dir, name.as_bytes());
            if self.get(&key)?.is_none() {
                self.put(key, Dirent { ino, kind }.encode());
                return Ok(Some(dir));
            }
        }
        Ok(None)
    }

    fn adopt(&mut self, ino: Ino) -> Result<bool, Stop> {
        let Some(inode) = self.inode(ino)? else { return Ok(false) };
        let Some(dir) = self.name_there(ino, inode.kind, &format!("#{ino}"))? else { return Ok(false) };
        let now = self.now;
        let is_dir = inode.kind == FileKind::Directory;
        self.change(ino, |i| {
            i.ctime = now;
            if is_dir {
                i.parent = dir;
            } else {
                i.nlink = i.nlink.max(1);
            }
        })
    }

    /// The key of the name that `ino` has in `parent`.
    fn name_of(&self, ino: Ino, parent: Ino) -> Result<Option<Bytes>, Stop> {
        let (mut start, end) = dirent_range(parent, 0);
        loop {
            let page = self.source.scan(&start, &end, PAGE)?;
            let Some((last, _)) = page.last() else { return Ok(None) };
            start = [&last[..], &[0]].concat().into();
            let found = page.iter().find(|(_, v)| Dirent::decode(v).is_ok_and(|d| d.ino == ino));
            if let Some((key, _)) = found {
                return Ok(Some(key.clone()));
            }
        }
    }

    fn move_blocks(&mut self, ino: Ino, size: u64) -> Result<bool, Stop> {
        let new = self.new_ino()?;
        let Some(_) = self.name_there(new, FileKind::Regular, &format!("#{ino}.blocks"))? else {
            return Ok(false);
        };
        let inode = Inode { size, ..self.new_inode(false) };
        self.put(inode_key(new), inode.encode());
        let (mut start, end) = (extent_key(ino, 0), extent_key(Ino(ino.0.saturating_add(1)), 0));
        loop {
            let page = self.source.scan(&start, &end, PAGE)?;
            let Some((last, _)) = page.last() else { return Ok(true) };
            start = [&last[..], &[0]].concat().into();
            for (key, value) in page {
                let Some(chunk) = chunk_of_extent_key(&key) else { continue };
                self.put(extent_key(new, chunk), value);
                self.delete(key);
            }
        }
    }

    fn adopt_block(&mut self, block: BlockId, len: u32) -> Result<bool, Stop> {
        let new = self.new_ino()?;
        let Some(_) = self.name_there(new, FileKind::Regular, &format!("#block-{block}"))? else {
            return Ok(false);
        };
        let inode = Inode { size: u64::from(len), blocks: units(len), ..self.new_inode(false) };
        self.put(inode_key(new), inode.encode());
        let mut extents = Extents::default();
        extents.0[0] = block;
        self.put(extent_key(new, 0), extents.encode());
        Ok(true)
    }
}
