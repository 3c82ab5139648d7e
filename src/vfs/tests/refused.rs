//! Tests of content that the kernel handed over and that was refused.

use super::*;

/// Content of a file that fills the allowance, and a file that the kernel then hands over in vain.
fn refused_file(len: usize) -> (Fixture, Ino, Ino) {
    let f = Fixture::new(200_000);
    let full = f.file(b"full", &[1; 210_000]);
    let ino = f.vfs.create(Ino::ROOT, b"lost", 0o644, &ME).unwrap().ino;
    assert_eq!(hand_over(&f, ino, 0, &vec![b'x'; len]), Err(VfsError::NoSpace));
    (f, full, ino)
}

fn hand_over(f: &Fixture, ino: Ino, offset: u64, data: &[u8]) -> Result<u32> {
    f.vfs.write_back(ino, offset, data, Wait::Yes)
}

fn cut(f: &Fixture, ino: Ino, size: u64) {
    f.vfs.setattr(ino, &SetAttr { size: Some(size), ..SetAttr::default() }, &ME).unwrap();
}

fn fsync(f: &Fixture, ino: Ino) -> Result<()> {
    f.vfs.fsync(ino, false, Wait::Yes)
}

fn names(f: &Fixture) -> Vec<String> {
    let found = f.vfs.refused_files(Duration::from_secs(60));
    assert_eq!((found.count, found.more), (found.names.len(), false));
    found.names
}

fn is_lost<T>(answer: Result<T>) -> bool {
    matches!(answer, Err(VfsError::Io(_)))
}

#[test]
fn a_refusal_is_told_until_the_content_is_written_again() {
    let (f, full, ino) = refused_file(10_000);
    cut(&f, full, 0);
    // There is space again, and the kernel has forgotten: it asks as if all were well.
    for _ in 0..3 {
        assert_eq!(fsync(&f, ino), Err(VfsError::NoSpace));
        assert_eq!(f.vfs.flush(ino), Err(VfsError::NoSpace));
    }
    assert_eq!((fsync(&f, full), f.vfs.flush(full)), (Ok(()), Ok(())), "another file");
    assert_eq!(names(&f), ["/lost (no space left)"]);
    f.vfs.commit().unwrap();
    f.vfs.cut().unwrap();
    assert_eq!(hand_over(&f, ino, 0, &[b'y'; 8192]), Ok(8192));
    assert_eq!(fsync(&f, ino), Err(VfsError::NoSpace), "all but the last page");
    assert_eq!(hand_over(&f, ino, 8192, &[b'y'; 1808]), Ok(1808));
    assert_eq!((fsync(&f, ino), f.vfs.flush(ino)), (Ok(()), Ok(())));
    assert_eq!((names(&f), f.read(ino)), (vec![], vec![b'y'; 10_000]));
}

#[test]
fn what_is_stored_nowhere_is_not_read() {
    let (f, full, ino) = refused_file(10_000);
    let read = |at, len| f.vfs.read(ino, at, len, Wait::Yes);
    assert_eq!(f.vfs.getattr(ino).unwrap().size, 10_000, "the kernel knows of it");
    assert!(is_lost(read(0, 1 << 20)) && is_lost(read(4096, 4096)) && is_lost(read(9999, 1)));
    // Who is about to write gets pages that are still held, one by one.
    let change = |at, len| f.vfs.read_to_change(ino, at, len, Wait::Yes);
    assert_eq!(change(4096, 4096).unwrap(), vec![b'x'; 4096]);
    assert_eq!(change(8192, 4096).unwrap(), vec![b'x'; 1808]);
    assert!(is_lost(change(0, 8192)) && is_lost(change(1, 10)));
    // Behind it there is nothing, before it what is stored.
    assert_eq!(read(10_000, 10).unwrap(), b""[..]);
    cut(&f, full, 0);
    f.vfs.write(ino, 0, &[b'n'; 5000], Wait::Yes).unwrap();
    assert_eq!(read(0, 5000).unwrap(), vec![b'n'; 5000]);
    assert!(is_lost(read(0, 5001)));
    assert_eq!(change(4096, 4096).unwrap(), [vec![b'n'; 904], vec![b'x'; 3192]].concat());
}

#[test]
fn what_was_refused_is_no_hole() {
    let (f, full, ino) = refused_file(10_000);
    let seek = |at, seek| f.vfs.lseek(ino, at, seek);
    assert_eq!((seek(0, Seek::Data), seek(5000, Seek::Data)), (Ok(0), Ok(5000)));
    assert_eq!((seek(0, Seek::Hole), seek(9999, Seek::Hole)), (Ok(10_000), Ok(10_000)));
    assert_eq!(seek(10_000, Seek::Data), Err(VfsError::NoSuchOffset));
    assert_eq!(seek(10_000, Seek::Hole), Err(VfsError::NoSuchOffset));
    // A hole before it, then data behind it.
    cut(&f, full, 0);
    let bs = u64::from(BS);
    cut(&f, ino, 0);
    cut(&f, full, 0);
    f.vfs.write(full, 0, &[1; 210_000], Wait::Yes).unwrap();
    assert_eq!(hand_over(&f, ino, bs, &[b'x'; 4096]), Err(VfsError::NoSpace));
    cut(&f, full, 0);
    f.vfs.write(ino, 2 * bs, &[b'y'; 10], Wait::Yes).unwrap();
    assert_eq!((seek(0, Seek::Hole), seek(0, Seek::Data)), (Ok(0), Ok(bs)));
    assert_eq!(seek(bs, Seek::Hole), Ok(bs + 4096));
    assert_eq!(seek(bs + 4096, Seek::Data), Ok(2 * bs));
    assert_eq!(seek(2 * bs, Seek::Hole), Ok(2 * bs + 10));
}

#[test]
fn a_copy_stops_before_what_was_refused() {
    let (f, full, ino) = refused_file(10_000);
    let target = f.vfs.create(Ino::ROOT, b"copy", 0o644, &ME).unwrap().ino;
    cut(&f, full, 0);
    let copy = |from, len| f.vfs.copy_file_range(ino, from, target, from, len, Wait::Yes);
    assert!(is_lost(copy(0, 10_000)) && is_lost(copy(9000, 100)));
    assert_eq!(copy(10_000, 5), Ok(0), "the end of the file");
    f.vfs.write(ino, 0, &[b'y'; 4096], Wait::Yes).unwrap();
    assert_eq!(copy(0, 10_000), Ok(4096));
    assert!(is_lost(copy(4096, 5904)));
    assert_eq!(f.read(target), vec![b'y'; 4096]);
    // A copy onto it stores it.
    let source = f.file(b"source", &[b'z'; 200_000]);
    assert_eq!(f.vfs.copy_file_range(source, 0, ino, 0, 200_000, Wait::Yes), Ok(200_000));
    assert_eq!((fsync(&f, ino), f.read(ino)), (Ok(()), vec![b'z'; 200_000]));
}

#[test]
fn cutting_off_punching_and_deleting_end_it() {
    let (f, full, ino) = refused_file(10_000);
    cut(&f, full, 0);
    cut(&f, ino, 10_000);
    assert!(fsync(&f, ino).is_err(), "enlarging stores nothing");
    cut(&f, ino, 4096);
    assert!(fsync(&f, ino).is_err(), "cut in the middle");
    f.vfs.fallocate(ino, Fallocate::Allocate, 0, 9000, Wait::Yes).unwrap();
    assert!(fsync(&f, ino).is_err(), "a promise stores nothing");
    f.vfs.fallocate(ino, Fallocate::PunchHole, 0, 4096, Wait::Yes).unwrap();
    assert_eq!((fsync(&f, ino), f.read(ino)), (Ok(()), vec![0; 9000]));
    for truncates in [true, false] {
        f.vfs.write(full, 0, &[1; 210_000], Wait::Yes).unwrap();
        assert!(hand_over(&f, ino, 100, b"x").is_err() && fsync(&f, ino).is_err());
        if truncates {
            f.vfs.open(ino, true, true).unwrap();
            f.vfs.release(ino);
            assert_eq!((fsync(&f, ino), names(&f)), (Ok(()), vec![]));
        }
        cut(&f, full, 0);
    }
    // Without a name it is nobody's loss, but who has it open must not read something else.
    f.vfs.unlink(Ino::ROOT, b"lost").unwrap();
    assert_eq!(names(&f), Vec::<String>::new());
    assert!(fsync(&f, ino).is_err() && is_lost(f.vfs.read(ino, 0, 200, Wait::Yes)));
    f.vfs.release(ino);
    f.vfs.forget(ino, 1);
    f.vfs.wait_reaped();
    assert!(f.vfs.unwritten.book.is_empty());
}

#[test]
fn whatever_refuses_it_is_remembered() {
    let f = Fixture::new(1 << 30);
    let (a, b, c) = (f.file(b"a", b"1"), f.file(b"b", b"2"), f.file(b"c", b"3"));
    f.vfs.blocks.slots().most.store(0, Ordering::SeqCst);
    assert_eq!(hand_over(&f, a, 0, &[7; 10_000]), Err(VfsError::NoSpace), "the disk");
    f.vfs.blocks.slots().most.store(usize::MAX, Ordering::SeqCst);
    assert_eq!((fsync(&f, a), fsync(&f, b)), (Err(VfsError::NoSpace), Ok(())));
    // A mount that became read-only: another machine took over.
    let why = VfsError::ReadOnly("taken over".into());
    f.vfs.set_read_only("taken over");
    assert_eq!(hand_over(&f, b, 0, b"x"), Err(why.clone()));
    for _ in 0..2 {
        assert_eq!((fsync(&f, b), f.vfs.flush(b)), (Err(why.clone()), Err(why.clone())));
    }
    assert!(is_lost(f.vfs.read(b, 0, 1, Wait::Yes)));
    f.vfs.journal.poison("the disk failed");
    assert!(hand_over(&f, c, 0, b"x").is_err());
    assert!(matches!(fsync(&f, c), Err(VfsError::ReadOnly(_))));
    assert_eq!(names(&f).len(), 3);
}

#[test]
fn an_error_that_the_caller_got_is_not_told_again() {
    let f = Fixture::new(200_000);
    let full = f.file(b"full", &[1; 210_000]);
    let ino = f.vfs.create(Ino::ROOT, b"direct", 0o644, &ME).unwrap().ino;
    assert_eq!(f.vfs.write(ino, 0, b"x", Wait::Yes), Err(VfsError::NoSpace));
    assert_eq!(f.vfs.write_back(ino, 0, b"x", Wait::No), Err(VfsError::WouldBlock), "it comes again");
    assert_eq!((fsync(&f, ino), f.vfs.getattr(ino).unwrap().size), (Ok(()), 0));
    assert_eq!(f.vfs.write_back(Ino(4_000_000), 0, b"x", Wait::Yes), Err(VfsError::NoSpace));
    cut(&f, full, 0);
    assert_eq!(f.vfs.write_back(Ino(4_000_001), 0, b"x", Wait::Yes), Err(VfsError::Stale));
    assert_eq!(f.vfs.refused_files(Duration::ZERO).count, 0, "of a deleted file nothing is missed");
}
