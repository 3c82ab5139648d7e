//! A replica's tables against the local ones at the same cut.
//!
//! Owns what may differ: what was changed since the cut, and blocks that are registered here a moment later.

use std::collections::HashSet;

use bytes::Bytes;

use super::types::Place;
use super::{Rows, Source, Stop, number_of};
use crate::format::tables::{dirty_key, split_dirent_key, table};
use crate::ids::{BlockId, Ino};

/// A row that is not the same in both.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Difference {
    /// Its key.
    pub key: Bytes,
    /// It is in the local tables.
    pub here: bool,
    /// It is in the replica's.
    pub there: bool,
}

impl Difference {
    /// Where it is to be looked for.
    #[must_use]
    pub fn place(&self) -> Place {
        let ino = Ino(number_of(&self.key));
        match self.key.first() {
            Some(&table::DIRENT) => match split_dirent_key(&self.key) {
                Some((_, name)) => Place::Name(ino, self.key.slice_ref(name)),
                None => Place::Inode(ino),
            },
            Some(&table::INODE | &table::XATTR | &table::EXTENT | &table::ORPHAN) => Place::Inode(ino),
            _ => Place::Volume,
        }
    }

    /// What it is that differs.
    #[must_use]
    pub fn text(&self) -> String {
        let what = match self.key.first() {
            Some(&table::VOLUME) => format!("the setting \"{}\"", self.key[1..].escape_ascii()),
            Some(&table::INODE) => "its inode".to_owned(),
            Some(&table::DIRENT) => "the name".to_owned(),
            Some(&table::XATTR) => "an attribute".to_owned(),
            Some(&table::EXTENT) => "a part of its content".to_owned(),
            Some(&table::BLOCK) => format!("block {}", number_of(&self.key)),
            Some(&table::BLOCK_REFS) => format!("the references of block {}", number_of(&self.key)),
            Some(&table::ORPHAN) => "its mark of deletion".to_owned(),
            _ => "a row".to_owned(),
        };
        match (self.here, self.there) {
            (true, false) => format!("{what} is here, but not there"),
            (false, true) => format!("{what} is there, but not here"),
            _ => format!("{what} is another one there than here"),
        }
    }
}

/// The next row, if it has this key.
fn value_of(rows: &mut Rows<'_>, key: &Bytes) -> Result<Option<Bytes>, Stop> {
    match rows.peek()? {
        Some((next, _)) if next == key => Ok(rows.next()?.map(|(_, value)| value)),
        _ => Ok(None),
    }
}

/// Calls `differs` for each replicated row that is not the same in both, but for the keys `touched` since.
pub fn compare(
    local: &dyn Source,
    replica: &dyn Source,
    touched: &HashSet<Bytes>,
    cancelled: &dyn Fn() -> bool,
    differs: &mut dyn FnMut(Difference),
) -> Result<(), Stop> {
    let replicated =
        |source| Rows::new(source, cancelled, Bytes::new(), Bytes::from_static(&[table::FIRST_LOCAL]));
    let (mut here, mut there) = (replicated(local), replicated(replica));
    loop {
        let key = match (here.peek()?, there.peek()?) {
            (None, None) => return Ok(()),
            (Some((a, _)), Some((b, _))) => a.min(b).clone(),
            (Some((k, _)), None) | (None, Some((k, _))) => k.clone(),
        };
        let ours = value_of(&mut here, &key)?;
        let theirs = value_of(&mut there, &key)?;
        if ours == theirs || touched.contains(&key) {
            continue;
        }
        let is_block = key.first() == Some(&table::BLOCK);
        if is_block && ours.is_none() && local.get(&dirty_key(BlockId(number_of(&key))))?.is_some() {
            continue;
        }
        differs(Difference { here: ours.is_some(), there: theirs.is_some(), key });
    }
}
