//! Times that the caller keeps: nothing here sets another one.

use super::*;

/// Everything that changes a file's content or size, or lets bits fall.
fn change_all(f: &Fixture, ino: Ino, source: Ino) {
    let vfs = &f.vfs;
    vfs.write(ino, 3, b"abc", Wait::Yes).unwrap();
    vfs.write(ino, 0, &[5; 300_000], Wait::Yes).unwrap();
    for how in [
        Fallocate::Allocate,
        Fallocate::KeepSize,
        Fallocate::PunchHole,
        Fallocate::ZeroRange,
        Fallocate::ZeroRangeKeepSize,
    ] {
        vfs.fallocate(ino, how, 100, 400_000, Wait::Yes).unwrap();
    }
    // Shared blocks, and copied bytes.
    assert_eq!(vfs.copy_file_range(source, 0, ino, 0, 131_072, Wait::Yes), Ok(131_072));
    assert_eq!(vfs.copy_file_range(source, 1, ino, 0, 1000, Wait::Yes), Ok(1000));
    let size = |size| SetAttr { size: Some(size), ..SetAttr::default() };
    for n in [1000, 500_000, 500_000] {
        vfs.setattr(ino, &size(n), &ME).unwrap();
    }
    vfs.setattr(ino, &SetAttr { perm: Some(0o755), ..SetAttr::default() }, &ME).unwrap();
    vfs.open(ino, true, true).unwrap();
    vfs.release(ino);
}

#[test]
fn times_that_the_caller_keeps_are_set_by_the_caller_alone() {
    for kept in [false, true] {
        let f = Fixture::new(1 << 30);
        let (ino, source) = (f.file(b"a", b"x"), f.file(b"source", &[9; 200_000]));
        let dir = f.vfs.mkdir(Ino::ROOT, b"dir", 0o755, &ME).unwrap();
        let at = |secs| Time { secs, nanos: 5 };
        let times = SetAttr { mtime: Some(SetTime::At(at(7))), ctime: Some(at(8)), ..SetAttr::default() };
        f.vfs.setattr(ino, &times, &ME).unwrap();
        if kept {
            f.vfs.caller_keeps_times();
        }
        change_all(&f, ino, source);
        let ours = f.vfs.options.clock.as_ref()();
        let expected = if kept { (at(7), at(8)) } else { (ours, ours) };
        let attr = f.vfs.getattr(ino).unwrap();
        assert_eq!((attr.mtime, attr.ctime), expected, "kept: {kept}");
        f.vfs.commit().unwrap();
        let stored = f.vfs.load(ino).unwrap();
        assert_eq!((stored.mtime, stored.ctime), expected, "kept: {kept}");
        // What the caller sends counts, also together with a size; directories keep their own
        // times.
        let sent = SetAttr { size: Some(9), ..times };
        let attr = f.vfs.setattr(ino, &sent, &ME).unwrap();
        assert_eq!((attr.mtime, attr.ctime, attr.size), (at(7), at(8), 9));
        f.set_dir_times(dir.ino, at(3));
        f.vfs.create(dir.ino, b"new", 0o644, &ME).unwrap();
        assert_eq!(f.vfs.getattr(dir.ino).unwrap().mtime, ours);
        let perm = SetAttr { perm: Some(0o700), ..SetAttr::default() };
        assert_eq!(f.vfs.setattr(dir.ino, &perm, &ME).unwrap().ctime, ours);
    }
}

impl Fixture {
    fn set_dir_times(&self, ino: Ino, time: Time) {
        let set = SetAttr { mtime: Some(SetTime::At(time)), ctime: Some(time), ..SetAttr::default() };
        self.vfs.setattr(ino, &set, &ME).unwrap();
    }
}
