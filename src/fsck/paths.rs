//! From inodes to paths, for all findings in one pass over the names.
//!
//! Owns how a place is shown.

use std::collections::{HashMap, HashSet};

use bytes::Bytes;

use super::types::Place;
use super::{Checked, Input, Stop, number_of};
use crate::format::tables::{Dirent, split_dirent_key, table};
use crate::ids::Ino;
use crate::restore::text;

/// Names of inodes and of the directories above them.
#[derive(Default)]
pub struct Names(HashMap<Ino, (Ino, Bytes)>);

/// Looks for the paths of `places`.
pub fn name_all<'a>(
    input: &Input<'_>,
    checked: &Checked,
    places: impl Iterator<Item = &'a Place>,
) -> Result<Names, Stop> {
    // Each with the directory in which its name is looked for.
    let mut wanted: HashMap<Ino, Ino> = HashMap::new();
    for place in places {
        let mut at = match place {
            Place::Volume => continue,
            Place::Inode(ino) | Place::Name(ino, _) => *ino,
        };
        while at != Ino::ROOT && !wanted.contains_key(&at) {
            let Some(parent) = checked.nodes.parent(at) else { break };
            wanted.insert(at, parent);
            at = parent;
        }
    }
    let mut names = HashMap::with_capacity(wanted.len());
    if !wanted.is_empty() {
        let mut rows = input.rows(table::DIRENT);
        while let Some((key, value)) = rows.next()? {
            let (Ok(dirent), Some((_, name))) = (Dirent::decode(&value), split_dirent_key(&key)) else {
                continue;
            };
            let parent = Ino(number_of(&key));
            if wanted.get(&dirent.ino) == Some(&parent) {
                names.entry(dirent.ino).or_insert_with(|| (parent, key.slice_ref(name)));
            }
        }
    }
    Ok(Names(names))
}

impl Names {
    /// A place as it is shown: a path, `inode N` where there is none, nothing for the volume as a whole.
    #[must_use]
    pub fn show(&self, place: &Place) -> Option<String> {
        match place {
            Place::Volume => None,
            Place::Inode(ino) => Some(self.path(*ino)),
            Place::Name(parent, name) => {
                let above = if *parent == Ino::ROOT { String::new() } else { self.path(*parent) };
                Some(format!("{above}/{}", text(name)))
            }
        }
    }

    fn path(&self, ino: Ino) -> String {
        if ino == Ino::ROOT {
            return "/".to_owned();
        }
        let (mut parts, mut at, mut met) = (Vec::new(), ino, HashSet::new());
        while at != Ino::ROOT {
            match self.0.get(&at).filter(|_| met.insert(at)) {
                Some((parent, name)) => {
                    parts.push(format!("/{}", text(name)));
                    at = *parent;
                }
                None if parts.is_empty() => return format!("inode {ino}"),
                // Below something that has no way to the root.
                None => {
                    parts.push(format!("(inode {at})"));
                    break;
                }
            }
        }
        parts.reverse();
        parts.concat()
    }
}
