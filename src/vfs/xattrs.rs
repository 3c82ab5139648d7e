//! Extended attributes.

use std::sync::atomic::Ordering;

use bytes::Bytes;

use super::acl::is_acl;
use super::types::{VfsError, XattrMode};
use super::{Result, Vfs};
use crate::format::tables::{prefix_range, table, xattr_key};
use crate::ids::Ino;

/// Longest attribute name in bytes.
pub(crate) const XATTR_NAME_MAX: usize = 255;
/// Longest attribute value in bytes.
pub(crate) const XATTR_VALUE_MAX: usize = 64 * 1024;

impl Vfs {
    pub(super) fn do_getxattr(&self, ino: Ino, name: &[u8]) -> Result<Bytes> {
        // The kernel asks for these when it checks permissions: in a volume without any, nothing is looked up.
        if is_acl(name) && !self.has_acls() {
            return Err(VfsError::NoAttribute);
        }
        // As it asks for one at the first write to each file.
        if !self.xattrs.load(Ordering::Acquire) {
            return Err(VfsError::NoAttribute);
        }
        self.journal.get(&xattr_key(ino, name))?.ok_or(VfsError::NoAttribute)
    }

    /// Looks whether the volume has any attribute at all.
    pub(super) fn load_xattr_use(&self) -> Result<()> {
        let (start, end) = prefix_range(&[table::XATTR]);
        self.xattrs.store(!self.journal.scan(&start, &end, 1)?.is_empty(), Ordering::Release);
        Ok(())
    }

    /// From now on attributes are looked for; before the first one is set.
    pub(super) fn expect_xattrs(&self) {
        self.xattrs.store(true, Ordering::Release);
    }

    pub(super) fn do_setxattr(&self, ino: Ino, name: &[u8], value: &[u8], mode: XattrMode) -> Result<()> {
        if name.is_empty() || name.len() > XATTR_NAME_MAX {
            return Err(VfsError::Range);
        }
        if value.len() > XATTR_VALUE_MAX {
            return Err(VfsError::TooBig);
        }
        self.admit_name()?;
        if is_acl(name) {
            return self.set_acl(ino, name, value, mode);
        }
        let now = self.now();
        let key = xattr_key(ino, name);
        self.expect_xattrs();
        self.modify(ino, |tx, inode| {
            mode.check(tx.get(&key)?.is_some())?;
            inode.ctime = now;
            tx.put(key.clone(), Bytes::copy_from_slice(value));
            Ok(())
        })?;
        Ok(())
    }

    pub(super) fn do_listxattr(&self, ino: Ino) -> Result<Vec<Vec<u8>>> {
        let (mut start, end) = prefix_range(&xattr_key(ino, b""));
        let mut names = Vec::new();
        loop {
            let page = self.journal.scan(&start, &end, 256)?;
            let Some((last, _)) = page.last() else { return Ok(names) };
            let mut next = last.to_vec();
            next.push(0);
            names.extend(page.iter().map(|(key, _)| key[9..].to_vec()));
            start = next.into();
        }
    }

    pub(super) fn do_removexattr(&self, ino: Ino, name: &[u8]) -> Result<()> {
        if is_acl(name) {
            return self.remove_acl(ino, name);
        }
        let now = self.now();
        let key = xattr_key(ino, name);
        self.modify(ino, |tx, inode| {
            if tx.get(&key)?.is_none() {
                return Err(VfsError::NoAttribute);
            }
            inode.ctime = now;
            tx.delete(key.clone());
            Ok(())
        })?;
        Ok(())
    }
}
