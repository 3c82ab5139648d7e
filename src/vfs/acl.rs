//! POSIX access control lists: their binary form, and what they and the mode do to each other.
//!
//! Owns the rules as pure functions, and where the lists are kept: as the extended attributes of the same names. The kernel
//! enforces them; an access list that says no more than the mode is not kept at all.

use std::sync::atomic::Ordering;

use bytes::Bytes;

use super::names::NewInode;
use super::types::{FileKind, Time, VfsError, XattrMode};
use super::{Result, Vfs};
use crate::format::tables::{Inode, volume_key, xattr_key};
use crate::ids::Ino;
use crate::journal::Tx;

/// Name of the list that counts when a file is used.
pub const ACCESS: &[u8] = b"system.posix_acl_access";
/// Name of the list of a directory that what is made in it begins with.
pub const DEFAULT: &[u8] = b"system.posix_acl_default";

/// Key in the volume table: there is, or has been, a list in this volume.
const USED: &str = "acls";

/// Version that each list begins with.
const VERSION: u32 = 2;
/// The id of entries that name nobody.
const NOBODY: u32 = u32::MAX;

const USER_OBJ: u16 = 0x01;
const USER: u16 = 0x02;
const GROUP_OBJ: u16 = 0x04;
const GROUP: u16 = 0x08;
const MASK: u16 = 0x10;
const OTHER: u16 = 0x20;

/// One entry: whom it is for, and what they may.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Entry {
    tag: u16,
    perm: u16,
    id: u32,
}

/// A list whose entries are in order and complete.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Acl(Vec<Entry>);

/// Whether an attribute of this name is a list.
#[must_use]
pub fn is_acl(name: &[u8]) -> bool {
    name == ACCESS || name == DEFAULT
}

impl Acl {
    /// Reads a list's binary form; `None` for an empty list.
    ///
    /// # Errors
    /// [`VfsError::NotSupported`] for another version, [`VfsError::Invalid`] for anything else that is wrong.
    pub fn decode(bytes: &[u8]) -> Result<Option<Self>> {
        let (version, rest) = bytes.split_first_chunk().ok_or(VfsError::Invalid)?;
        if u32::from_le_bytes(*version) != VERSION {
            return Err(VfsError::NotSupported);
        }
        let (chunks, []) = rest.as_chunks::<8>() else { return Err(VfsError::Invalid) };
        if chunks.is_empty() {
            return Ok(None);
        }
        let entries: Vec<Entry> = chunks
            .iter()
            .map(|&[t0, t1, p0, p1, i0, i1, i2, i3]| Entry {
                tag: u16::from_le_bytes([t0, t1]),
                perm: u16::from_le_bytes([p0, p1]),
                id: u32::from_le_bytes([i0, i1, i2, i3]),
            })
            .collect();
        let acl = Self(entries);
        if acl.is_valid() { Ok(Some(acl)) } else { Err(VfsError::Invalid) }
    }

    /// Owner, named users, group, named groups, mask (needed with anybody named), others: each once but the named.
    fn is_valid(&self) -> bool {
        let rank =
            |e: &Entry| [USER_OBJ, USER, GROUP_OBJ, GROUP, MASK, OTHER].iter().position(|t| *t == e.tag);
        let count = |tag| self.0.iter().filter(|e| e.tag == tag).count();
        let named = count(USER) + count(GROUP) > 0;
        self.0.iter().all(|e| e.perm & !0o7 == 0 && rank(e).is_some())
            && self.0.iter().all(|e| !matches!(e.tag, USER | GROUP) || e.id != NOBODY)
            && self.0.is_sorted_by_key(rank)
            && [USER_OBJ, GROUP_OBJ, OTHER].iter().all(|t| count(*t) == 1)
            && count(MASK) <= 1
            && (!named || count(MASK) == 1)
    }

    /// The binary form.
    #[must_use]
    pub fn encode(&self) -> Bytes {
        let mut out = VERSION.to_le_bytes().to_vec();
        for e in &self.0 {
            out.extend_from_slice(&e.tag.to_le_bytes());
            out.extend_from_slice(&e.perm.to_le_bytes());
            let id = if matches!(e.tag, USER | GROUP) { e.id } else { NOBODY };
            out.extend_from_slice(&id.to_le_bytes());
        }
        out.into()
    }

    fn of(&mut self, tag: u16) -> Option<&mut Entry> {
        self.0.iter_mut().find(|e| e.tag == tag)
    }

    /// What the mode's group bits stand for: the mask, or the group when there is none.
    fn group_class(&mut self) -> Option<&mut Entry> {
        let tag = if self.0.iter().any(|e| e.tag == MASK) { MASK } else { GROUP_OBJ };
        self.of(tag)
    }

    /// Whether it says no more than nine bits can.
    #[must_use]
    pub fn is_minimal(&self) -> bool {
        self.0.iter().all(|e| matches!(e.tag, USER_OBJ | GROUP_OBJ | OTHER))
    }

    /// The nine permission bits that show it.
    #[must_use]
    pub fn mode(&self) -> u16 {
        let mut acl = self.clone();
        let bits = |e: Option<&mut Entry>, shift: u16| e.map_or(0, |e| e.perm << shift);
        let group = bits(acl.group_class(), 3);
        bits(acl.of(USER_OBJ), 6) | group | bits(acl.of(OTHER), 0)
    }

    /// As after a chmod to `perm`.
    #[must_use]
    pub fn with_mode(&self, perm: u16) -> Self {
        let mut acl = self.clone();
        let set = |e: Option<&mut Entry>, bits: u16| {
            if let Some(e) = e {
                e.perm = bits & 0o7;
            }
        };
        set(acl.of(USER_OBJ), perm >> 6);
        set(acl.group_class(), perm >> 3);
        set(acl.of(OTHER), perm);
        acl
    }

    /// As the access list of what is made with `perm` where this is the default list.
    #[must_use]
    pub fn inherited(&self, perm: u16) -> Self {
        self.with_mode(perm & self.mode())
    }
}

impl Vfs {
    /// Reads from the journal whether there are lists.
    pub(super) fn load_acl_use(&self) -> Result<()> {
        let used = self.journal.get(&volume_key(USED))?.is_some();
        self.acls.store(used, Ordering::Release);
        Ok(())
    }

    /// Whether the volume has, or has had, a list. While it has none, nothing is looked up for their sake.
    pub fn has_acls(&self) -> bool {
        self.acls.load(Ordering::Acquire)
    }

    /// Sets a list, and the mode with it.
    pub(super) fn set_acl(&self, ino: Ino, name: &[u8], value: &[u8], mode: XattrMode) -> Result<()> {
        let Some(acl) = Acl::decode(value)? else { return self.remove_acl(ino, name) };
        let (now, key) = (self.now(), xattr_key(ino, name));
        let access = name == ACCESS;
        // From now on they are looked for; before anybody can depend on it.
        self.acls.store(true, Ordering::Release);
        self.expect_xattrs();
        self.modify(ino, |tx, inode| {
            match (inode.kind, access) {
                (FileKind::Symlink, _) => return Err(VfsError::NotSupported),
                (FileKind::Directory, _) | (_, true) => {}
                _ => return Err(VfsError::AccessDenied),
            }
            mode.check(tx.get(&key)?.is_some())?;
            inode.ctime = now;
            if access {
                inode.perm = (inode.perm & !0o777) | acl.mode();
            }
            if access && acl.is_minimal() {
                tx.delete(key.clone());
            } else {
                tx.put(key.clone(), acl.encode());
                tx.put(volume_key(USED), Bytes::from_static(b"1"));
            }
            Ok(())
        })?;
        Ok(())
    }

    /// Takes a list away; the mode stays.
    pub(super) fn remove_acl(&self, ino: Ino, name: &[u8]) -> Result<()> {
        let (now, key) = (self.now(), xattr_key(ino, name));
        self.modify(ino, |tx, inode| {
            // One that is not there is as good as removed.
            if tx.get(&key)?.is_some() {
                inode.ctime = now;
                tx.delete(key.clone());
            }
            Ok(())
        })?;
        Ok(())
    }

    /// Within a change of `ino`'s mode: makes its access list say the same.
    pub(super) fn acl_follows_mode(&self, tx: &mut Tx<'_>, ino: Ino, perm: u16) -> Result<()> {
        if !self.has_acls() {
            return Ok(());
        }
        let key = xattr_key(ino, ACCESS);
        if let Some(value) = tx.get(&key)?
            && let Some(acl) = Acl::decode(&value)?
        {
            let changed = acl.with_mode(perm);
            if changed != acl {
                tx.put(key, changed.encode());
            }
        }
        Ok(())
    }

    /// A new inode in the directory `dir`, with what it inherits from that: its default list, or else the mask of the one
    /// who makes it. Puts inherited lists, and answers the inode to put.
    pub(super) fn new_inode(
        &self,
        tx: &mut Tx<'_>,
        ino: Ino,
        new: &NewInode<'_>,
        parent: (Ino, &Inode),
        caller: &super::types::Caller,
        now: Time,
    ) -> Result<Inode> {
        let (parent_ino, dir) = parent;
        let mut inode = new.inode(dir, parent_ino, *caller, now);
        if new.kind == FileKind::Symlink {
            return Ok(inode);
        }
        let default = match self.has_acls() {
            true => tx.get(&xattr_key(parent_ino, DEFAULT))?,
            false => None,
        };
        let Some(value) = default else {
            inode.perm &= !(caller.umask & 0o777);
            return Ok(inode);
        };
        if let Some(default) = Acl::decode(&value)? {
            let access = default.inherited(inode.perm);
            inode.perm = (inode.perm & !0o777) | access.mode();
            if !access.is_minimal() {
                tx.put(xattr_key(ino, ACCESS), access.encode());
            }
            if new.kind == FileKind::Directory {
                tx.put(xattr_key(ino, DEFAULT), value);
            }
        }
        Ok(inode)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn acl(entries: &[(u16, u16, u32)]) -> Acl {
        Acl(entries.iter().map(|&(tag, perm, id)| Entry { tag, perm, id }).collect())
    }

    fn usual() -> Acl {
        acl(&[
            (USER_OBJ, 7, NOBODY),
            (USER, 6, 5),
            (GROUP_OBJ, 5, NOBODY),
            (MASK, 6, NOBODY),
            (OTHER, 4, NOBODY),
        ])
    }

    #[test]
    fn lists_round_trip_and_nonsense_is_refused() {
        assert_eq!(Acl::decode(&usual().encode()), Ok(Some(usual())));
        assert_eq!(Acl::decode(&2_u32.to_le_bytes()), Ok(None));
        assert_eq!(Acl::decode(&1_u32.to_le_bytes()), Err(VfsError::NotSupported));
        let bytes = usual().encode();
        for cut in 0..bytes.len() {
            let whole = cut == 4;
            assert_eq!(Acl::decode(&bytes[..cut]).is_ok(), whole, "{cut} bytes");
        }
        for bad in [
            acl(&[(USER_OBJ, 7, NOBODY), (GROUP_OBJ, 7, NOBODY)]),
            acl(&[(USER_OBJ, 7, NOBODY), (OTHER, 7, NOBODY), (GROUP_OBJ, 7, NOBODY)]),
            acl(&[(USER_OBJ, 7, NOBODY), (USER, 7, 1), (GROUP_OBJ, 7, NOBODY), (OTHER, 7, NOBODY)]),
            acl(&[(USER_OBJ, 8, NOBODY), (GROUP_OBJ, 7, NOBODY), (OTHER, 7, NOBODY)]),
            acl(&[(USER_OBJ, 7, NOBODY), (GROUP_OBJ, 7, NOBODY), (OTHER, 7, NOBODY), (OTHER, 7, NOBODY)]),
            acl(&[(USER_OBJ, 7, 0), (USER, 7, NOBODY), (GROUP_OBJ, 7, 0), (MASK, 7, 0), (OTHER, 7, 0)]),
            acl(&[(3, 7, NOBODY)]),
        ] {
            assert_eq!(Acl::decode(&bad.encode()), Err(VfsError::Invalid), "{bad:?}");
        }
    }

    #[test]
    fn the_mask_is_the_group_class() {
        assert_eq!(usual().mode(), 0o764);
        assert!(!usual().is_minimal());
        let changed = usual().with_mode(0o4510);
        assert_eq!(changed.mode(), 0o510);
        assert_eq!(changed.0[2].perm, 5, "the group's own entry stays");
        let minimal = acl(&[(USER_OBJ, 6, NOBODY), (GROUP_OBJ, 4, NOBODY), (OTHER, 0, NOBODY)]);
        assert!(minimal.is_minimal());
        assert_eq!((minimal.mode(), minimal.with_mode(0o751).mode()), (0o640, 0o751));
    }

    #[test]
    fn what_is_inherited_is_cut_by_the_mode() {
        let inherited = usual().inherited(0o640);
        assert_eq!(inherited.mode(), 0o640);
        assert_eq!(inherited.0[1].perm, 6, "named users are cut by the mask only");
        assert_eq!(usual().inherited(0o777), usual());
    }
}
