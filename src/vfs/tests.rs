//! Tests of what only a look inside shows: cells that must go, orphans against users, errors in the middle of an operation.
//!
//! The operations as such are tested against a reference in `tests/model`.

mod limits;
mod refused;
mod tables;
mod times;

use super::api::FileSystem;
use super::types::{Caller, Fallocate, FileKind, RenameMode, Seek, SetAttr, SetTime, Wait, XattrMode};
use super::*;
use crate::journal::Options as JournalOptions;

const BS: u32 = 65536;
const ME: Caller = Caller { uid: 1, gid: 1, pid: 1, umask: 0 };

struct Fixture {
    _dir: tempfile::TempDir,
    vfs: Arc<Vfs>,
}

impl Fixture {
    fn new(limit: u64) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let options =
            JournalOptions { form: super::FORM, ..JournalOptions::new(dir.path(), Arc::new(|_| Ok(()))) };
        let (journal, _) = Journal::open(options).unwrap();
        let blocks = BlockStore::open(&dir.path().join("slots"), BS, limit, Arc::clone(&journal)).unwrap();
        let options = Options {
            clock: Arc::new(|| Time { secs: 1, nanos: 0 }),
            remote_fsync: false,
            space_wait: Duration::from_millis(30),
        };
        Self { _dir: dir, vfs: Vfs::open(journal, blocks, options).unwrap() }
    }

    fn file(&self, name: &[u8], content: &[u8]) -> Ino {
        let ino = self.vfs.create(Ino::ROOT, name, 0o644, &ME).unwrap().ino;
        self.vfs.write(ino, 0, content, Wait::Yes).unwrap();
        self.vfs.flush(ino).unwrap();
        ino
    }

    fn read(&self, ino: Ino) -> Vec<u8> {
        self.vfs.read(ino, 0, 1 << 20, Wait::Yes).unwrap().to_vec()
    }

    fn cells(&self) -> usize {
        self.vfs.files.iter().map(|f| f.lock().cells.len()).sum()
    }
}

#[test]
fn cells_go_when_nobody_needs_them() {
    let f = Fixture::new(1 << 30);
    for i in 0..20u8 {
        let ino = f.file(&[b'a' + i], &[i; 70_000]);
        f.vfs.release(ino);
        // What fails leaves no cell behind, either.
        let vfs = &f.vfs;
        assert_eq!(vfs.link(ino, Ino::ROOT, &[b'a' + i]).unwrap_err(), VfsError::Exists);
        assert_eq!(vfs.setxattr(ino, b"user.x", b"", XattrMode::Replace), Err(VfsError::NoAttribute));
        assert_eq!(vfs.lseek(ino, 1 << 40, Seek::Data), Err(VfsError::NoSuchOffset));
        assert_eq!(vfs.write(ino, 0, b"", Wait::Yes), Ok(0));
        let set = SetAttr { size: Some(u64::MAX), ..SetAttr::default() };
        assert_eq!(vfs.setattr(ino, &set, &ME), Err(VfsError::FileTooLarge));
        let fifo = vfs.mknod(Ino::ROOT, &[b'A' + i], FileKind::Fifo, 0o600, 0, &ME).unwrap().ino;
        assert_eq!(vfs.write(fifo, 0, b"x", Wait::Yes), Err(VfsError::Invalid));
        assert_eq!(vfs.fallocate(fifo, Fallocate::Allocate, 0, 9, Wait::Yes), Err(VfsError::NoSuchOffset));
        assert_eq!(
            vfs.rename(Ino::ROOT, &[b'a' + i], Ino::ROOT, &[b'A' + i], RenameMode::NoReplace),
            Err(VfsError::Exists)
        );
    }
    assert_eq!(f.cells(), 0);
    assert_eq!(f.vfs.pending_files(), 0);
}

#[test]
fn cells_with_changes_or_handles_stay() {
    let f = Fixture::new(1 << 30);
    let ino = f.file(b"a", b"x");
    assert_eq!(f.cells(), 1, "open");
    f.vfs.write(ino, 1, b"y", Wait::Yes).unwrap();
    f.vfs.release(ino);
    assert_eq!((f.cells(), f.vfs.pending_files()), (1, 1), "pending");
    f.vfs.commit().unwrap();
    let at = |secs| Time { secs, nanos: 0 };
    let set = |mtime, ctime| SetAttr {
        mtime: Some(SetTime::At(at(mtime))),
        ctime: Some(at(ctime)),
        ..SetAttr::default()
    };
    f.vfs.setattr(ino, &set(7, 7), &Caller::default()).unwrap();
    assert_eq!((f.cells(), f.vfs.pending_files()), (1, 1), "the times of a write wait for its content");
    f.vfs.setattr(ino, &set(6, 8), &Caller::default()).unwrap();
    assert_eq!(
        (f.cells(), f.vfs.pending_files()),
        (0, 0),
        "times that somebody set are committed, and the rest with them"
    );
    assert_eq!(f.vfs.getattr(ino).map(|a| (a.mtime, a.ctime)), Ok((at(6), at(8))));
    assert_eq!((f.cells(), f.vfs.pending_files()), (0, 0));
    assert_eq!(f.read(ino), b"xy");
}

#[test]
fn an_open_file_is_loaded_by_who_reads_it() {
    let f = Fixture::new(1 << 30);
    let ino = f.file(b"a", b"content");
    f.vfs.release(ino);
    assert_eq!(f.cells(), 0);
    f.vfs.open(ino, false, false).unwrap();
    f.vfs.open(ino, false, false).unwrap();
    f.vfs.flush(ino).unwrap();
    assert_eq!((f.cells(), f.vfs.is_open(ino)), (0, true));
    f.vfs.unlink(Ino::ROOT, b"a").unwrap();
    f.vfs.forget(ino, 1);
    f.vfs.release(ino);
    f.vfs.wait_reaped();
    assert_eq!(f.read(ino), b"content", "open once more");
    assert_eq!(f.cells(), 1);
    f.vfs.release(ino);
    f.vfs.wait_reaped();
    assert_eq!((f.cells(), f.vfs.is_open(ino)), (0, false));
    assert_eq!(f.vfs.open(ino, false, false), Err(VfsError::Stale));
    assert_eq!(f.vfs.open(Ino::ROOT, false, false), Err(VfsError::IsDirectory));
    f.vfs.release(ino);
    assert!(!f.vfs.is_open(ino) && !f.vfs.is_open(Ino::ROOT), "what failed is not counted");
}

#[test]
fn what_is_known_in_brief_is_all_that_stat_shows() {
    let f = Fixture::new(1 << 30);
    let file = f.file(b"file", b"content");
    let link = f.vfs.symlink(Ino::ROOT, b"link", b"to/file", &ME).unwrap();
    let dir = f.vfs.mkdir(Ino::ROOT, b"dir", 0o750, &ME).unwrap();
    let device = f.vfs.mknod(Ino::ROOT, b"device", FileKind::CharDevice, 0o600, 0x103, &ME).unwrap();
    f.vfs.release(file);
    let expected = [f.vfs.getattr(file).unwrap(), link, dir, device];
    // In sled by now, and in none of the layers above.
    let journal = f.vfs.journal();
    journal.barrier(journal.last_lsn()).unwrap();
    let until = std::time::Instant::now() + Duration::from_secs(60);
    while journal.stats().applied_lsn < journal.last_lsn() && std::time::Instant::now() < until {
        std::thread::sleep(Duration::from_millis(20));
    }
    assert!(journal.stats().brief_bytes > 0);
    let found = [&b"file"[..], b"link", b"dir", b"device"].map(|name| f.vfs.lookup(Ino::ROOT, name).unwrap());
    assert_eq!(found[1..], expected[1..]);
    assert_eq!((found[0].size, found[0].ino), (7, file));
    assert_eq!(f.vfs.readlink(link.ino).unwrap(), &b"to/file"[..]);
    assert_eq!(f.vfs.lookup(dir.ino, b"..").unwrap().ino, Ino::ROOT);
    f.vfs.rename(Ino::ROOT, b"file", dir.ino, b"moved", RenameMode::Replace).unwrap();
    assert_eq!(f.vfs.lookup(Ino::ROOT, b"file"), Err(VfsError::NotFound));
    assert_eq!(f.vfs.lookup(dir.ino, b"moved").unwrap().ino, file);
}

#[test]
fn an_orphan_that_somebody_uses_again_is_not_deleted() {
    let f = Fixture::new(1 << 30);
    f.vfs.stop_reaper();
    let ino = f.file(b"a", &[1; 100_000]);
    f.vfs.release(ino);
    f.vfs.unlink(Ino::ROOT, b"a").unwrap();
    // Still referenced: the reaper finds it in use.
    f.vfs.reap(ino).unwrap();
    assert_eq!(f.vfs.getattr(ino).unwrap().nlink, 0);
    assert_eq!(f.read(ino), vec![1; 100_000]);
    // Referenced no more, but open.
    f.vfs.open(ino, false, false).unwrap();
    f.vfs.forget(ino, 1);
    f.vfs.reap(ino).unwrap();
    assert_eq!(f.read(ino), vec![1; 100_000]);
    f.vfs.release(ino);
    f.vfs.reap(ino).unwrap();
    assert_eq!(f.vfs.getattr(ino), Err(VfsError::Stale));
    assert_eq!(f.vfs.open(ino, true, false), Err(VfsError::Stale));
    assert_eq!(f.cells(), 0);
    let usage = f.vfs.usage().unwrap();
    assert_eq!((usage.inodes, usage.blocks), (1, 0));
}

#[test]
fn what_is_being_deleted_is_there_for_nobody() {
    let f = Fixture::new(1 << 30);
    f.vfs.stop_reaper();
    let ino = f.file(b"a", &[1; 100_000]);
    f.vfs.release(ino);
    f.vfs.unlink(Ino::ROOT, b"a").unwrap();
    f.vfs.forget(ino, 1);
    // As between the first and the last step of its deletion.
    let cell = f.vfs.cell(ino).unwrap();
    f.vfs.flush_cell(&cell, &mut cell.state.write()).unwrap();
    cell.state.write().gone = true;
    assert_eq!(f.vfs.getattr(ino), Err(VfsError::Stale));
    assert_eq!(f.vfs.open(ino, false, false), Err(VfsError::Stale));
    assert!(!f.vfs.is_open(ino));
    assert_eq!(f.vfs.write(ino, 0, b"x", Wait::Yes), Err(VfsError::Stale));
    assert_eq!(f.vfs.setattr(ino, &SetAttr::default(), &ME), Err(VfsError::Stale));
}

#[test]
fn a_removed_directory_takes_no_names_even_when_its_parent_is_gone() {
    let f = Fixture::new(1 << 30);
    f.file(b"file", b"x");
    let outer = f.vfs.mkdir(Ino::ROOT, b"outer", 0o755, &ME).unwrap().ino;
    let inner = f.vfs.mkdir(outer, b"inner", 0o755, &ME).unwrap().ino;
    let moved = f.vfs.mkdir(Ino::ROOT, b"moved", 0o755, &ME).unwrap().ino;
    f.vfs.rmdir(outer, b"inner").unwrap();
    f.vfs.rmdir(Ino::ROOT, b"outer").unwrap();
    f.vfs.forget(outer, 1);
    f.vfs.wait_reaped();
    assert_eq!(f.vfs.getattr(outer), Err(VfsError::Stale));
    for name in [&b"file"[..], b"moved"] {
        let answer = f.vfs.rename(Ino::ROOT, name, inner, b"x", RenameMode::Replace);
        assert_eq!(answer, Err(VfsError::NotFound));
    }
    assert_eq!(f.vfs.create(inner, b"x", 0o644, &ME), Err(VfsError::NotFound));
    assert_eq!(f.vfs.getattr(moved).unwrap().nlink, 2);
}

#[test]
fn a_write_that_fails_halfway_leaves_zeros_behind_the_end() {
    let f = Fixture::new(1 << 30);
    let ino = f.vfs.create(Ino::ROOT, b"a", 0o644, &ME).unwrap().ino;
    // The disk has room for one block only.
    f.vfs.blocks.slots().most.store(1, Ordering::SeqCst);
    let failed = f.vfs.write(ino, 0, &[7; 3 * BS as usize], Wait::Yes);
    assert_eq!(failed, Err(VfsError::NoSpace));
    f.vfs.blocks.slots().most.store(usize::MAX, Ordering::SeqCst);
    assert_eq!(f.vfs.getattr(ino).unwrap().size, 0);
    f.vfs.fallocate(ino, Fallocate::Allocate, 0, 3 * u64::from(BS), Wait::Yes).unwrap();
    assert_eq!(f.read(ino), vec![0; 3 * BS as usize], "bytes of the failed write show");
}

#[test]
fn a_full_disk_refuses_and_changes_nothing() {
    let f = Fixture::new(200_000);
    let ino = f.file(b"a", &[1; 210_000]);
    let before = f.vfs.getattr(ino).unwrap();
    assert_eq!(f.vfs.write(ino, 5, b"x", Wait::No), Err(VfsError::WouldBlock));
    assert_eq!(f.vfs.write(ino, 5, b"x", Wait::Yes), Err(VfsError::NoSpace));
    assert_eq!(f.vfs.fallocate(ino, Fallocate::PunchHole, 0, 9, Wait::Yes), Err(VfsError::NoSpace));
    assert_eq!((f.vfs.getattr(ino).unwrap(), f.read(ino)), (before, vec![1; 210_000]));
    // Giving space back is always possible, and ends it.
    let set = SetAttr { size: Some(10), ..SetAttr::default() };
    f.vfs.setattr(ino, &set, &ME).unwrap();
    assert_eq!(f.vfs.write(ino, 5, b"x", Wait::No), Ok(1));
}

#[test]
fn a_short_last_block_is_shared_only_while_it_ends_both_files() {
    let f = Fixture::new(1 << 30);
    let (a, b) = (f.file(b"a", &[1; 70_000]), f.file(b"b", &[2; 100_000]));
    let bs = u64::from(BS);
    // The target has more behind it.
    assert_eq!(f.vfs.share_blocks(a, 1, b, 1, 70_000 - bs), Ok(None));
    // The source has grown since it was planned.
    assert_eq!(f.vfs.share_blocks(b, 1, a, 1, 10_000), Ok(None));
    // It has shrunk: what is there is shared.
    assert_eq!(f.vfs.share_blocks(a, 0, b, 2, 4 * bs), Ok(Some(70_000)));
    let mut expected = [vec![2; 100_000], vec![0; 2 * BS as usize - 100_000], vec![1; 70_000]].concat();
    assert_eq!(f.read(b), expected);
    // And stays as it is when the source changes.
    f.vfs.write(a, 0, &[9; 10], Wait::Yes).unwrap();
    assert_eq!(f.read(b), expected);
    f.vfs.write(b, 2 * bs + 1, &[8; 2], Wait::Yes).unwrap();
    expected[2 * BS as usize + 1..][..2].fill(8);
    assert_eq!(f.read(b), expected);
    assert_eq!(f.read(a), [vec![9; 10], vec![1; 69_990]].concat());
    assert_eq!(f.vfs.share_blocks(a, 9, b, 0, bs), Ok(Some(0)), "behind the end of the source");
}

#[test]
fn a_name_that_leads_nowhere_is_an_error_not_a_loop() {
    let f = Fixture::new(1 << 30);
    let bad = Dirent { ino: Ino(4_000_000), kind: FileKind::Regular };
    let put = |tx: &mut Tx<'_>| {
        tx.put(dirent_key(Ino::ROOT, b"bad"), bad.encode());
        Ok(())
    };
    f.vfs.journal.transact::<_, VfsError>(put).unwrap();
    assert!(matches!(f.vfs.unlink(Ino::ROOT, b"bad"), Err(VfsError::Io(_))));
    let moved = f.vfs.rename(Ino::ROOT, b"bad", Ino::ROOT, b"x", RenameMode::Replace);
    assert!(matches!(moved, Err(VfsError::Io(_))));
    assert_eq!(f.vfs.lookup(Ino::ROOT, b"bad"), Err(VfsError::NotFound));
}
