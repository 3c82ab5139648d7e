//! Tables that damage or an attacker made: every operation ends, and nothing that has a name is
//! deleted.

use bytes::Bytes;

use super::*;
use crate::cache::store::NEXT_BLOCK;
use crate::format::tables::{orphan_key, volume_key};
use crate::ids::NUMBERS_END;

impl Fixture {
    /// Changes keys without the filesystem.
    fn put(&self, changes: &[(Bytes, Vec<u8>)]) {
        let put = |tx: &mut Tx<'_>| -> Result<(), JournalError> {
            changes.iter().for_each(|(key, value)| tx.put(key.clone(), value.clone()));
            Ok(())
        };
        self.vfs.journal.transact(put).unwrap();
    }

    fn set_inode(&self, ino: Ino, change: impl FnOnce(&mut Inode)) {
        let mut inode = self.vfs.load(ino).unwrap();
        change(&mut inode);
        self.put(&[(inode_key(ino), inode.encode().to_vec())]);
    }

    fn dir(&self, parent: Ino, name: &[u8]) -> Ino {
        self.vfs.mkdir(parent, name, 0o755, &ME).unwrap().ino
    }

    /// Stops it, and opens what it left with these changes.
    fn opened_with(self, changes: &[(Bytes, Vec<u8>)]) -> Self {
        self.try_opened_with(changes).unwrap()
    }

    fn try_opened_with(self, changes: &[(Bytes, Vec<u8>)]) -> Result<Self> {
        self.vfs.commit().unwrap();
        self.put(changes);
        self.vfs.stop_reaper();
        let Self { _dir: dir, vfs } = self;
        let (journal, blocks) = (Arc::clone(&vfs.journal), Arc::clone(&vfs.blocks));
        let options = Options {
            clock: Arc::clone(&vfs.options.clock),
            remote_fsync: false,
            space_wait: vfs.options.space_wait,
        };
        drop((vfs, blocks));
        let blocks = BlockStore::open(&dir.path().join("slots"), BS, 1 << 30, Arc::clone(&journal)).unwrap();
        Ok(Self { _dir: dir, vfs: Vfs::open(journal, blocks, options)? })
    }
}

fn is_io<T: std::fmt::Debug>(answer: Result<T>) -> bool {
    matches!(answer, Err(VfsError::Io(_)))
}

#[test]
fn directories_that_lie_in_each_other_end_a_rename_with_an_error() {
    let f = Fixture::new(1 << 30);
    let dirs: Vec<Ino> = (0..5).map(|i| f.dir(Ino::ROOT, &[b'a' + i])).collect();
    let moved = f.dir(Ino::ROOT, b"moved");
    // Of one, of two, and one that is led into from outside.
    f.set_inode(dirs[0], |i| i.parent = dirs[0]);
    f.set_inode(dirs[1], |i| i.parent = dirs[2]);
    f.set_inode(dirs[2], |i| i.parent = dirs[1]);
    f.set_inode(dirs[3], |i| i.parent = dirs[1]);
    f.set_inode(dirs[4], |i| i.parent = Ino(999_999));
    for dir in &dirs {
        let to = |mode| f.vfs.rename(Ino::ROOT, b"moved", *dir, b"x", mode);
        assert!(is_io(to(RenameMode::Replace)), "{dir}");
        assert!(is_io(to(RenameMode::NoReplace)), "{dir}");
        f.file(b"file", b"");
        f.vfs.rename(Ino::ROOT, b"file", *dir, b"other", RenameMode::Replace).unwrap();
        assert!(is_io(f.vfs.rename(Ino::ROOT, b"moved", *dir, b"other", RenameMode::Exchange)), "{dir}");
    }
    // Nothing waits for it, and what is healthy goes on.
    assert_eq!(f.vfs.lookup(Ino::ROOT, b"moved").unwrap().ino, moved);
    let healthy = f.dir(Ino::ROOT, b"healthy");
    f.vfs.rename(Ino::ROOT, b"moved", healthy, b"moved", RenameMode::Replace).unwrap();
    assert_eq!(f.vfs.rename(Ino::ROOT, b"healthy", moved, b"x", RenameMode::Replace), Err(VfsError::Invalid));
}

#[test]
fn a_mark_of_deletion_deletes_nothing_that_has_names() {
    let f = Fixture::new(1 << 30);
    let file = f.file(b"file", b"content");
    let dir = f.dir(Ino::ROOT, b"dir");
    let inner = f.vfs.create(dir, b"inner", 0o644, &ME).unwrap().ino;
    let (deleted, emptied) = (f.file(b"deleted", &[7; 100_000]), f.dir(Ino::ROOT, b"emptied"));
    f.vfs.unlink(Ino::ROOT, b"deleted").unwrap();
    f.vfs.rmdir(Ino::ROOT, b"emptied").unwrap();
    f.set_inode(dir, |i| i.nlink = 0);
    let marks = [Ino::ROOT, file, dir, Ino(888_888)].map(|ino| (orphan_key(ino), Vec::new()));
    let f = f.opened_with(&marks);
    f.vfs.wait_reaped();
    for ino in [Ino::ROOT, file, dir, inner] {
        assert!(f.vfs.getattr(ino).is_ok(), "{ino}");
    }
    assert_eq!(f.read(file), b"content");
    for ino in [deleted, emptied] {
        assert_eq!(f.vfs.getattr(ino), Err(VfsError::Stale), "{ino}");
        assert_eq!(f.vfs.journal.get(&orphan_key(ino)).unwrap(), None, "{ino}");
    }
    assert_eq!(f.vfs.journal.get(&orphan_key(Ino(888_888))).unwrap(), None, "of nothing");
    // The last reference deletes the root as little, and the file goes once its name does.
    f.vfs.lookup(Ino::ROOT, b".").unwrap();
    f.vfs.forget(Ino::ROOT, 1);
    f.vfs.unlink(Ino::ROOT, b"file").unwrap();
    f.vfs.wait_reaped();
    assert!(f.vfs.getattr(Ino::ROOT).is_ok());
    assert_eq!(f.vfs.getattr(file), Err(VfsError::Stale));
}

#[test]
fn a_root_that_is_no_directory_is_refused() {
    let f = Fixture::new(1 << 30);
    let mut root = f.vfs.load(Ino::ROOT).unwrap();
    root.kind = FileKind::Fifo;
    let opened = f.try_opened_with(&[(inode_key(Ino::ROOT), root.encode().to_vec())]);
    assert!(is_io(opened.map(|_| ())));
}

#[test]
fn a_directory_with_all_the_links_there_are_takes_no_more() {
    let f = Fixture::new(1 << 30);
    f.set_inode(Ino::ROOT, |i| i.nlink = u32::MAX);
    assert_eq!(f.vfs.mkdir(Ino::ROOT, b"d", 0o755, &ME).map(|_| ()), Err(VfsError::TooManyLinks));
    f.file(b"f", b"");
}

#[test]
fn a_counter_that_would_give_a_number_twice_gives_none() {
    let next = |name: &str, n: u64| (volume_key(name), n.to_le_bytes().to_vec());
    for n in [u64::MAX, u64::MAX - 1, u64::MAX - 4096, NUMBERS_END + 5000, 0, 1, 2] {
        let f = Fixture::new(1 << 30);
        let file = f.file(b"first", &[1; 100_000]);
        let f = f.opened_with(&[next(NEXT_INO, n)]);
        for name in [b"a", b"b"] {
            assert!(is_io(f.vfs.create(Ino::ROOT, name, 0o644, &ME)), "{n}");
            assert!(is_io(f.vfs.mkdir(Ino::ROOT, name, 0o755, &ME)), "{n}");
        }
        // What is there is as it was, and can be written.
        assert_eq!(f.read(file), [1; 100_000], "{n}");
        f.vfs.write(file, 0, &[2; 100_000], Wait::Yes).unwrap();
        f.vfs.fsync(file, false, Wait::Yes).unwrap();
        assert_eq!(f.read(file), [2; 100_000], "{n}");
    }
    for n in [u64::MAX, u64::MAX - 4096, 0, 1] {
        let f = Fixture::new(1 << 30);
        let file = f.file(b"first", &[1; 100_000]);
        let small = f.file(b"small", b"");
        let f = f.opened_with(&[next(NEXT_BLOCK, n)]);
        for _ in 0..3 {
            assert!(is_io(f.vfs.write(small, 0, &[2; 100_000], Wait::Yes)), "{n}");
        }
        f.vfs.write(small, 0, b"needs no block", Wait::Yes).unwrap();
        assert_eq!(f.vfs.getattr(file).unwrap().size, 100_000, "{n}");
        f.file(b"third", b"");
    }
    // At its end the counter ends.
    let f = Fixture::new(1 << 30).opened_with(&[next(NEXT_INO, NUMBERS_END - 2)]);
    assert_eq!(f.file(b"a", b"").0, NUMBERS_END - 2);
    assert_eq!(f.file(b"b", b"").0, NUMBERS_END - 1);
    for _ in 0..3 {
        assert!(is_io(f.vfs.create(Ino::ROOT, b"c", 0o644, &ME)));
    }
}
