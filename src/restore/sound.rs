//! Whether restored tables can be used: what must hold before anything goes on with them.
//!
//! The hashes of a replica's objects only say that nothing was damaged. Whoever can write there, or
//! a fault of a writer, can store tables that contradict themselves. This is one pass over the
//! tables in the order of their keys. It keeps 24 bytes for each directory, and leaves what does no
//! harm (counts, sizes, uses of blocks) to `mirrorfs fsck`.

use std::fmt;

use super::Tables;
use crate::format::tables::{
    BlockEntry, Dirent, Extents, FileKind, Inode, inode_key, is_well_formed, name_cookie, number_of_key,
    orphan_key, prefix_range, split_dirent_key, table, volume_key,
};
use crate::ids::{Ino, NUMBERS_END};

/// Names of the counters that give new numbers.
const NEXT_INO: &str = "next_ino";
const NEXT_BLOCK: &str = "next_block";
/// Flaws that are kept; all are noticed.
const MOST: usize = 20;
/// Longest name.
const NAME_MAX: usize = 255;

/// A contradiction in the tables.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Flaw {
    /// Nothing may go on with such tables: what is in them could be overwritten, or a request would
    /// never end.
    pub fatal: bool,
    /// What is wrong.
    pub text: String,
}

impl fmt::Display for Flaw {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// Looks at all tables of a volume with blocks of `block_size` bytes. The fatal flaws stand first.
pub(super) fn flaws(tables: &Tables, block_size: u32) -> Vec<Flaw> {
    if tables.is_empty() {
        return Vec::new();
    }
    let mut look = Look { tables, flaws: Vec::new(), used_ino: 1, used_block: 0, directories: Vec::new() };
    look.keys();
    look.inodes();
    look.names();
    look.ways();
    look.blocks(block_size);
    look.root();
    look.counters();
    look.flaws.sort_by_key(|f| !f.fatal);
    look.flaws
}

/// A directory, as its inode says.
struct Directory {
    ino: u64,
    parent: u64,
    /// It was reached on the way from a directory: in which turn.
    turn: u64,
    named: bool,
}

struct Look<'a> {
    tables: &'a Tables,
    flaws: Vec<Flaw>,
    /// The highest numbers in use.
    used_ino: u64,
    used_block: u64,
    directories: Vec<Directory>,
}

impl Look<'_> {
    fn flaw(&mut self, fatal: bool, text: impl FnOnce() -> String) {
        // Of the harmless ones some are enough; a fatal one must not be missed for them.
        if self.flaws.iter().filter(|f| f.fatal == fatal).count() < MOST {
            self.flaws.push(Flaw { fatal, text: text() });
        }
    }

    fn rows(&self, table: u8) -> impl Iterator<Item = (&bytes::Bytes, &bytes::Bytes)> {
        let (start, end) = prefix_range(&[table]);
        self.tables.range(start, end)
    }

    /// Their forms, and the highest inode that they speak of.
    fn keys(&mut self) {
        let mut used = self.used_ino;
        let mut bad = Vec::new();
        let (start, end) = prefix_range(&[]);
        debug_assert!(end.is_empty());
        for (key, _) in self.tables.range(start, bytes::Bytes::from_static(&[table::FIRST_LOCAL])) {
            if !is_well_formed(key) {
                bad.push(key.clone());
                if bad.len() > MOST {
                    break;
                }
            }
            let of_inode = matches!(
                key.first(),
                Some(&(table::INODE | table::DIRENT | table::XATTR | table::EXTENT | table::ORPHAN))
            );
            if let Some(ino) = number_of_key(key).filter(|_| of_inode) {
                used = used.max(ino);
            }
        }
        self.used_ino = used;
        for key in bad {
            self.flaw(false, || format!("the impossible key {:02x?}", &key[..key.len().min(20)]));
        }
    }

    fn inodes(&mut self) {
        let mut directories = Vec::new();
        let mut unreadable = Vec::new();
        for (key, value) in self.rows(table::INODE) {
            let ino = number_of_key(key).unwrap_or_default();
            match Inode::decode(value) {
                Ok(inode) if inode.kind == FileKind::Directory => {
                    directories.push(Directory { ino, parent: inode.parent.0, turn: 0, named: false });
                }
                Ok(_) => {}
                Err(e) if unreadable.len() < MOST => unreadable.push((ino, e)),
                Err(_) => {}
            }
        }
        self.directories = directories;
        for (ino, e) in unreadable {
            self.flaw(false, || format!("inode {ino} cannot be read ({e})"));
        }
    }

    fn directory(&self, ino: u64) -> Option<usize> {
        self.directories.binary_search_by_key(&ino, |d| d.ino).ok()
    }

    fn names(&mut self) {
        let tables = self.tables;
        let (start, end) = prefix_range(&[table::DIRENT]);
        for (key, value) in tables.range(start, end) {
            let parent = number_of_key(key).unwrap_or_default();
            let Some((cookie, name)) = split_dirent_key(key) else { continue };
            let shown = || super::text(name);
            let Ok(dirent) = Dirent::decode(value) else {
                self.flaw(false, || format!("the entry {} of directory {parent} cannot be read", shown()));
                continue;
            };
            let ino = dirent.ino.0;
            self.used_ino = self.used_ino.max(ino);
            let dots = name == b"." || name == b"..";
            if name.len() > NAME_MAX || dots || name.contains(&b'/') || name.contains(&0) {
                self.flaw(false, || format!("directory {parent} holds the impossible name {}", shown()));
            }
            // A second entry of one name can only be in a wrong place.
            if cookie != name_cookie(name) {
                self.flaw(false, || {
                    format!("in directory {parent} the name {} is in a wrong place", shown())
                });
            }
            if self.directory(parent).is_none() {
                self.flaw(false, || {
                    format!("the name {} lies in inode {parent}, which is no directory", shown())
                });
            }
            // The kind is the second byte of an inode.
            let kind = tables.get(&inode_key(dirent.ino)).and_then(|inode| inode.get(1).copied());
            if kind != Some(dirent.kind as u8) {
                self.flaw(false, || {
                    format!(
                        "the name {} in directory {parent} leads to inode {ino}, which is missing or of another kind",
                        shown()
                    )
                });
            } else if dirent.kind == FileKind::Directory
                && let Some(at) = self.directory(ino)
            {
                let twice = std::mem::replace(&mut self.directories[at].named, true);
                let says = self.directories[at].parent;
                if twice || says != parent || ino == Ino::ROOT.0 {
                    self.flaw(false, || {
                        format!(
                            "the name {} in directory {parent} leads to directory {ino}, which lies in {says}",
                            shown()
                        )
                    });
                }
            }
        }
    }

    /// Follows every directory upwards: a circle would be walked for ever.
    fn ways(&mut self) {
        for start in 0..self.directories.len() {
            let turn = start as u64 + 1;
            let mut at = start;
            loop {
                let directory = &mut self.directories[at];
                let (ino, parent) = (directory.ino, directory.parent);
                match directory.turn {
                    0 => directory.turn = turn,
                    same if same == turn => {
                        self.flaw(true, || format!("directory {ino} lies in itself"));
                        break;
                    }
                    _ => break,
                }
                if ino == Ino::ROOT.0 {
                    break;
                }
                // What lies in a directory that is gone is being deleted.
                let Some(above) = self.directory(parent) else { break };
                at = above;
            }
        }
    }

    fn blocks(&mut self, block_size: u32) {
        let mut used = 0;
        for table in [table::BLOCK, table::BLOCK_REFS] {
            used = self.rows(table).filter_map(|(key, _)| number_of_key(key)).fold(used, u64::max);
        }
        let mut bad = Vec::new();
        for (key, value) in self.rows(table::EXTENT) {
            match Extents::decode(value) {
                Ok(extents) => used = extents.0.iter().map(|id| id.0).fold(used, u64::max),
                Err(e) if bad.len() < MOST => {
                    bad.push(format!("content of inode {}: {e}", number_of_key(key).unwrap_or_default()));
                }
                Err(_) => {}
            }
        }
        for (key, value) in self.rows(table::BLOCK) {
            let why = match BlockEntry::decode(value) {
                Ok(entry) if entry.loc.raw_len > block_size => format!("{} bytes", entry.loc.raw_len),
                Ok(_) => continue,
                Err(e) => e.to_string(),
            };
            if bad.len() < 2 * MOST {
                bad.push(format!("block {}: {why}", number_of_key(key).unwrap_or_default()));
            }
        }
        self.used_block = used;
        for text in bad {
            self.flaw(false, || text);
        }
    }

    fn root(&mut self) {
        let root = self.directory(Ino::ROOT.0).map(|at| self.directories[at].parent);
        if root != Some(Ino::ROOT.0) {
            self.flaw(true, || "the root directory (inode 1) is missing, or is no directory".into());
        }
        if self.tables.get(&orphan_key(Ino::ROOT)).is_some() {
            self.flaw(true, || "the root directory is marked as deleted".into());
        }
    }

    fn counters(&mut self) {
        for (name, what, used) in [(NEXT_INO, "inode", self.used_ino), (NEXT_BLOCK, "block", self.used_block)]
        {
            let stored = self.tables.get(&volume_key(name));
            let least = if name == NEXT_INO { 2 } else { 1 };
            let next = stored.map_or(Some(least), |v| v[..].try_into().ok().map(u64::from_le_bytes));
            let why = wrong_counter(next, used, what);
            if let Some(why) = why {
                self.flaw(true, || why);
            }
        }
    }
}

/// Why new numbers cannot be given from `next` on when numbers up to `used` are in use.
#[must_use]
pub fn wrong_counter(next: Option<u64>, used: u64, what: &str) -> Option<String> {
    match next {
        None => Some(format!("the next number of a new {what} cannot be read")),
        Some(next) if next >= NUMBERS_END || used >= NUMBERS_END => Some(format!(
            "the next {what} would get number {next}, and numbers up to {used} are in use: there are none from {NUMBERS_END} on"
        )),
        Some(next) if next <= used => Some(format!(
            "the next {what} would get number {next}, but numbers up to {used} are in use: one would be overwritten"
        )),
        Some(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::super::Sink;
    use super::*;
    use crate::format::record::Op;
    use crate::format::tables::{Body, Time, dirent_key, extent_key, xattr_key};
    use crate::ids::BlockId;

    fn directory(parent: u64) -> Inode {
        Inode { parent: Ino(parent), ..Inode::new(FileKind::Directory, 0o755, (0, 0), Time::default()) }
    }

    fn name(parent: u64, name: &[u8], ino: u64, kind: FileKind) -> Op {
        Op::put(dirent_key(Ino(parent), name), Dirent { ino: Ino(ino), kind }.encode())
    }

    fn counter(name: &str, next: u64) -> Op {
        Op::put(volume_key(name), next.to_le_bytes().to_vec())
    }

    /// Directories 2 in the root and 3 in 2, a file 4 in 3 with block 9.
    fn tables(more: Vec<Op>) -> Tables {
        let file = Inode::new(FileKind::Regular, 0o644, (0, 0), Time::default());
        let mut extents = Extents::default();
        extents.0[0] = BlockId(9);
        let mut tables = Tables::default();
        let ops = vec![
            Op::put(inode_key(Ino(1)), directory(1).encode()),
            Op::put(inode_key(Ino(2)), directory(1).encode()),
            Op::put(inode_key(Ino(3)), directory(2).encode()),
            Op::put(inode_key(Ino(4)), file.encode()),
            name(1, b"a", 2, FileKind::Directory),
            name(2, b"b", 3, FileKind::Directory),
            name(3, b"c", 4, FileKind::Regular),
            Op::put(extent_key(Ino(4), 0), extents.encode()),
            counter(NEXT_INO, 5),
            counter(NEXT_BLOCK, 10),
        ];
        tables.apply(ops).unwrap();
        tables.apply(more).unwrap();
        tables
    }

    fn found(more: Vec<Op>) -> Vec<Flaw> {
        flaws(&tables(more), 1 << 20)
    }

    #[test]
    fn whole_tables_have_no_flaws() {
        assert_eq!(found(vec![]), []);
        assert_eq!(flaws(&Tables::default(), 1 << 20), []);
    }

    #[test]
    fn what_could_overwrite_or_never_end_is_fatal() {
        let link = Inode {
            body: Body::Target("x".into()),
            ..Inode::new(FileKind::Symlink, 0o777, (0, 0), Time::default())
        };
        for (ops, text) in [
            (vec![Op::delete(inode_key(Ino(1)))], "the root directory"),
            (vec![Op::put(inode_key(Ino(1)), link.encode())], "the root directory"),
            (vec![Op::put(orphan_key(Ino(1)), vec![])], "marked as deleted"),
            (vec![counter(NEXT_INO, 4)], "number 4, but numbers up to 4 are in use"),
            (vec![counter(NEXT_INO, u64::MAX)], "there are none from"),
            (vec![Op::delete(volume_key(NEXT_INO))], "number 2, but"),
            (vec![Op::put(volume_key(NEXT_INO), vec![1, 2])], "cannot be read"),
            (vec![counter(NEXT_BLOCK, 9)], "the next block would get number 9"),
            (vec![counter(NEXT_BLOCK, u64::MAX - 1)], "there are none from"),
            // Whatever speaks of a number: attributes, names, marks of deletion.
            (vec![Op::put(xattr_key(Ino(70), b"user.x"), vec![])], "numbers up to 70"),
            (vec![Op::put(orphan_key(Ino(u64::MAX)), vec![])], "there are none from"),
            (vec![name(1, b"z", 8, FileKind::Regular)], "numbers up to 8"),
            // 2 in 3 and 3 in 2.
            (vec![Op::put(inode_key(Ino(2)), directory(3).encode())], "lies in itself"),
            (vec![Op::put(inode_key(Ino(3)), directory(3).encode())], "lies in itself"),
        ] {
            let found = found(ops);
            assert!(found[0].fatal && found[0].text.contains(text), "{text}: {found:?}");
        }
    }

    #[test]
    fn other_contradictions_are_noticed() {
        let mut misplaced = dirent_key(Ino(3), b"c").to_vec();
        misplaced[12] ^= 1;
        let long = BlockEntry::decode(&[&[7; 32][..], &[0; 24], &[0xff; 4], &[0]].concat()).unwrap();
        let dir = FileKind::Directory;
        for (ops, text) in [
            (vec![name(3, b"..", 4, FileKind::Regular)], "impossible name .."),
            (vec![name(3, b"a/b", 4, FileKind::Regular)], "impossible name a/b"),
            (vec![Op::put(misplaced, Dirent { ino: Ino(4), kind: FileKind::Fifo }.encode())], "wrong place"),
            (vec![Op::delete(inode_key(Ino(4)))], "leads to inode 4, which is missing"),
            (vec![name(3, b"d", 4, FileKind::Fifo)], "of another kind"),
            (vec![name(1, b"again", 3, dir)], "leads to directory 3, which lies in 2"),
            (vec![name(2, b"again", 3, dir)], "leads to directory 3, which lies in 2"),
            (vec![name(3, b"up", 1, dir)], "leads to directory 1"),
            (vec![name(4, b"in a file", 4, FileKind::Regular)], "which is no directory"),
            (vec![Op::put(inode_key(Ino(4)), vec![9; 130])], "inode 4 cannot be read"),
            (vec![Op::put(extent_key(Ino(4), 1), vec![1])], "content of inode 4"),
            (vec![Op::put(crate::format::tables::block_key(BlockId(3)), long.encode())], "block 3: "),
            (vec![Op::put(&b"\x02short"[..], vec![])], "impossible key"),
        ] {
            let found = found(ops);
            assert!(found.iter().any(|f| f.text.contains(text)), "{text}: {found:?}");
            assert!(found.iter().all(|f| !f.fatal), "{text}: {found:?}");
        }
    }

    #[test]
    fn many_harmless_flaws_hide_no_fatal_one() {
        let mut more: Vec<Op> =
            (0..100).map(|n| name(3, format!("f{n}").as_bytes(), 4, FileKind::Fifo)).collect();
        more.push(Op::put(orphan_key(Ino(1)), vec![]));
        let found = found(more);
        assert!(found[0].fatal && found.len() == 1 + MOST, "{found:?}");
    }
}
