//! Names: directories, renames, links, listings, special files.

use std::collections::BTreeSet;
use std::ffi::CStr;
use std::fs;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::Run;
use crate::sys::*;

pub const CASES: &[(&str, Run)] = &[
    ("rename_directories", rename_directories),
    ("rename_flags", rename_flags),
    ("rename_whiteout", rename_whiteout),
    ("rename_same_inode", rename_same_inode),
    ("dotdot_follows", dotdot_follows),
    ("sticky", sticky),
    ("long_paths", long_paths),
    ("name_lengths", name_lengths),
    ("symlinks", symlinks),
    ("special_files", special_files),
    ("listing_kinds", listing_kinds),
    ("listing_positions", listing_positions),
    ("listing_big", listing_big),
    ("links", links),
    ("removed_directory", removed_directory),
    ("tmpfile", tmpfile),
    ("at_empty_path", at_empty_path),
    ("setgid_directories", setgid_directories),
    ("open_flags", open_flags),
    ("trailing_slashes", trailing_slashes),
];

fn touch(p: impl AsRef<Path>) {
    drop(new_file(p));
}

fn names(dir: &Path) -> BTreeSet<String> {
    fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().to_string_lossy().into_owned()).collect()
}

fn rename_directories(t: &mut Case) {
    for d in ["a", "empty", "full", "full/x", "b"] {
        mkdir(t.p(d), 0o755).unwrap();
    }
    touch(t.p("f"));
    let before = stat(t.p("a")).unwrap().st_ino;
    t.note("over empty", rename(t.p("a"), t.p("empty"), 0));
    t.note("same inode", stat(t.p("empty")).unwrap().st_ino == before);
    t.note("over full", rename(t.p("empty"), t.p("full"), 0));
    t.note("over file", rename(t.p("b"), t.p("f"), 0));
    t.note("file over directory", rename(t.p("f"), t.p("b"), 0));
    t.note("below itself", rename(t.p("full"), t.p("full/x/y"), 0));
    t.note("itself below itself", rename(t.p("full"), t.p("full/y"), 0));
    t.note("over its parent", rename(t.p("full/x"), t.p("full"), 0));
    t.note("dot", rename(t.p("full/."), t.p("z"), 0));
    t.note("to dot", rename(t.p("b"), t.p("full/."), 0));
    t.note("onto itself", rename(t.p("full"), t.p("full"), 0));
    t.note("nlink of parent", stat(&t.dir).unwrap().st_nlink);
    t.note("move up", rename(t.p("full/x"), t.p("x"), 0));
    t.note("nlinks", (stat(&t.dir).unwrap().st_nlink, stat(t.p("full")).unwrap().st_nlink));
    t.note("mount point", rename(&t.root, t.p("z"), 0));
    t.note("rmdir root", rmdir(&t.root));
    t.note("other filesystem", rename(t.p("f"), "/dev/shm/mirrorfs-never", 0));
}

fn rename_flags(t: &mut Case) {
    touch(t.p("f"));
    touch(t.p("g"));
    mkdir(t.p("d"), 0o755).unwrap();
    mkdir(t.p("d/s"), 0o755).unwrap();
    touch(t.p("d/s/deep"));
    let (none, swap) = (libc::RENAME_NOREPLACE, libc::RENAME_EXCHANGE);
    t.note("noreplace taken", rename(t.p("f"), t.p("g"), none));
    t.note("noreplace self", rename(t.p("f"), t.p("f"), none));
    t.note("noreplace dir", rename(t.p("f"), t.p("d"), none));
    t.note("noreplace free", rename(t.p("f"), t.p("h"), none));
    t.note("noreplace missing", rename(t.p("f"), t.p("i"), none));
    t.note("swap missing", rename(t.p("h"), t.p("i"), swap));
    t.note("swap file and dir", rename(t.p("h"), t.p("d"), swap));
    t.note("kinds", (mode(t.p("h")), mode(t.p("d"))));
    t.note("nlink", stat(&t.dir).unwrap().st_nlink);
    t.note("swap with own parent", rename(t.p("h"), t.p("h/s"), swap));
    t.note("swap with parent", rename(t.p("h/s"), t.p("h"), swap));
    mkdir(t.p("other"), 0o755).unwrap();
    t.note("swap across", rename(t.p("d"), t.p("h/s"), swap));
    t.note("nlinks", (stat(&t.dir).unwrap().st_nlink, stat(t.p("h")).unwrap().st_nlink));
    t.note("both", rename(t.p("g"), t.p("d"), none | swap));
    t.note("unknown", rename(t.p("g"), t.p("d"), 1 << 7));
    t.note("whiteout and swap", rename(t.p("g"), t.p("d"), libc::RENAME_WHITEOUT | swap));
    t.note("names", names(&t.dir));
}

fn rename_whiteout(t: &mut Case) {
    touch(t.p("f"));
    touch(t.p("old"));
    t.note("onto free", rename(t.p("f"), t.p("g"), libc::RENAME_WHITEOUT));
    t.note("left", stat(t.p("f")).map(|s| (format!("{:o}", s.st_mode), s.st_rdev, s.st_nlink)));
    t.note("onto taken", rename(t.p("g"), t.p("old"), libc::RENAME_WHITEOUT));
    t.note("left there", stat(t.p("g")).map(|s| (format!("{:o}", s.st_mode), s.st_rdev, s.st_nlink)));
    mkdir(t.p("d"), 0o755).unwrap();
    t.note("directory", rename(t.p("d"), t.p("e"), libc::RENAME_WHITEOUT));
    t.note("left of it", mode(t.p("d")));
    t.note("nlink", stat(&t.dir).unwrap().st_nlink);
    t.note("noreplace", rename(t.p("e"), t.p("h"), libc::RENAME_WHITEOUT | libc::RENAME_NOREPLACE));
    t.note("names", names(&t.dir));
    chmod(&t.dir, 0o777).unwrap();
    touch(t.p("mine"));
    let (a, b) = (t.p("mine"), t.p("mine2"));
    t.note("by anybody", as_nobody(|| rename(&a, &b, libc::RENAME_WHITEOUT)));
}

fn rename_same_inode(t: &mut Case) {
    touch(t.p("a"));
    link(t.p("a"), t.p("b")).unwrap();
    let before = stat(t.p("a")).unwrap();
    nap();
    t.note("rename", rename(t.p("a"), t.p("b"), 0));
    t.note("both stay", names(&t.dir));
    let after = stat(t.p("a")).unwrap();
    t.note("ctime stays", (before.st_ctime, before.st_ctime_nsec) == (after.st_ctime, after.st_ctime_nsec));
    t.note("swap", rename(t.p("a"), t.p("b"), libc::RENAME_EXCHANGE));
}

fn dotdot_follows(t: &mut Case) {
    for d in ["a", "b", "a/x", "a/x/y"] {
        mkdir(t.p(d), 0o755).unwrap();
    }
    let inside = open(t.p("a/x/y"), libc::O_RDONLY | libc::O_DIRECTORY).unwrap();
    rename(t.p("a/x"), t.p("b/z"), 0).unwrap();
    let up = |n: &str| {
        let mut st = std::mem::MaybeUninit::<libc::stat>::uninit();
        let done = unsafe { libc::fstatat(inside.as_raw_fd(), c(n).as_ptr(), st.as_mut_ptr(), 0) };
        ok(done).map(|_| unsafe { st.assume_init() }.st_ino)
    };
    t.note("..", up("..") == Ok(stat(t.p("b/z")).unwrap().st_ino));
    t.note("../..", up("../..") == Ok(stat(t.p("b")).unwrap().st_ino));
    t.note("by path", stat(t.p("b/z/..")).unwrap().st_ino == stat(t.p("b")).unwrap().st_ino);
    drop_caches(&t.root);
    t.note("after drop", up("../..") == Ok(stat(t.p("b")).unwrap().st_ino));
    let listed = fs::read_dir(t.p("b/z")).unwrap().count();
    t.note("listed", listed);
    t.note("swap", rename(t.p("a"), t.p("b/z/y"), libc::RENAME_EXCHANGE));
    t.note(".. after swap", up("..") == Ok(stat(&t.dir).unwrap().st_ino));
}

fn sticky(t: &mut Case) {
    mkdir(t.p("d"), 0o1777).unwrap();
    chmod(t.p("d"), 0o1777).unwrap();
    for (name, uid) in [("root", 0), ("mine", 12_345), ("other", 54_321)] {
        touch(t.p("d").join(name));
        lchown(t.p("d").join(name), uid, uid).unwrap();
    }
    mkdir(t.p("d/theirs"), 0o777).unwrap();
    lchown(t.p("d/theirs"), 54_321, 54_321).unwrap();
    let d = t.p("d");
    let told = as_nobody(|| {
        vec![
            ("unlink of root's", unlink(d.join("root"))),
            ("unlink of another's", unlink(d.join("other"))),
            ("rename of another's", rename(d.join("other"), d.join("x"), 0)),
            ("rename over another's", rename(d.join("mine"), d.join("other"), 0)),
            ("swap with another's", rename(d.join("mine"), d.join("other"), libc::RENAME_EXCHANGE)),
            ("rmdir of another's", rmdir(d.join("theirs"))),
            ("rename of mine", rename(d.join("mine"), d.join("mine2"), 0)),
            ("link to root's", link(d.join("root"), d.join("l"))),
            ("open another's O_CREAT", open(d.join("other"), libc::O_CREAT | libc::O_WRONLY).map(drop)),
            ("unlink of mine", unlink(d.join("mine2"))),
        ]
    });
    for (key, what) in told {
        t.note(key, what);
    }
    lchown(t.p("d"), 12_345, 12_345).unwrap();
    t.note("as owner of the directory", as_nobody(|| unlink(d.join("other"))));
}

fn long_paths(t: &mut Case) {
    let part = "p".repeat(200);
    let mut dir = open(&t.dir, libc::O_RDONLY | libc::O_DIRECTORY).unwrap();
    let mut made = 0;
    for _ in 0..30 {
        unit(unsafe { libc::mkdirat(dir.as_raw_fd(), c(&part).as_ptr(), 0o755) }).unwrap();
        let next =
            unsafe { libc::openat(dir.as_raw_fd(), c(&part).as_ptr(), libc::O_RDONLY | libc::O_CLOEXEC) };
        dir = unsafe { std::os::fd::FromRawFd::from_raw_fd(next) };
        made += 1;
    }
    t.note("depth", made);
    let f = unsafe { libc::openat(dir.as_raw_fd(), c"deep".as_ptr(), libc::O_CREAT | libc::O_WRONLY, 0o644) };
    t.note("file deep down", f >= 0);
    unsafe { libc::close(f) };
    let path: PathBuf = std::iter::repeat_n(part.as_str(), 18).collect();
    t.note("3600 bytes", stat(t.dir.join(&path)).is_ok());
    let path: PathBuf = std::iter::repeat_n(part.as_str(), 22).collect();
    t.note("above PATH_MAX", stat(t.dir.join(&path)).map(|_| ()));
    let walked = walkdir::WalkDir::new(&t.dir).max_depth(10).into_iter().filter(Result::is_ok).count();
    t.note("walked", walked);
    let removed = std::process::Command::new("rm").arg("-rf").arg(t.dir.join(&part)).status().unwrap();
    t.note("rm -rf", (removed.success(), names(&t.dir)));
}

fn name_lengths(t: &mut Case) {
    for n in [1, 254, 255, 256] {
        t.note(&format!("mkdir {n}"), mkdir(t.p(&"n".repeat(n)), 0o755));
    }
    t.note("lookup 256", stat(t.p(&"m".repeat(256))).map(|_| ()));
    t.note("create 256", open(t.p(&"m".repeat(256)), libc::O_CREAT | libc::O_WRONLY).map(drop));
    t.note("rename 256", rename(t.p("n"), t.p(&"m".repeat(256)), 0));
    t.note("symlink 256", symlink("x", t.p(&"m".repeat(256))));
    t.note("unlink 256", unlink(t.p(&"m".repeat(256))));
    let odd = std::ffi::OsStr::from_bytes(b"\xff\xfe\x01\n");
    t.note("odd bytes", open(t.dir.join(odd), libc::O_CREAT | libc::O_WRONLY).map(drop));
    t.note("listed", fs::read_dir(&t.dir).unwrap().any(|e| e.unwrap().file_name() == odd));
    t.note("empty", mkdir("", 0o755));
}

fn symlinks(t: &mut Case) {
    for n in [0, 1, 59, 60, 255, 1024, 4094, 4095, 4096] {
        let target = "t".repeat(n);
        let at = t.p(&format!("l{n}"));
        t.note(&format!("length {n}"), symlink(&target, &at));
        if let Ok(st) = stat(&at) {
            t.note(&format!("size {n}"), (st.st_size, format!("{:o}", st.st_mode)));
            t.note(&format!("read {n}"), io(fs::read_link(&at)).map(|p| p.as_os_str().len()));
        }
    }
    symlink("loop", t.p("loop")).unwrap();
    t.note("loop", open(t.p("loop"), libc::O_RDONLY).map(drop));
    t.note("nofollow", open(t.p("l1"), libc::O_RDONLY | libc::O_NOFOLLOW).map(drop));
    let path = open(t.p("l1"), libc::O_PATH | libc::O_NOFOLLOW);
    t.note("path and nofollow", path.map(drop));
    let mut small = [0_u8; 10];
    let n = unsafe { libc::readlink(c(t.p("l255")).as_ptr(), small.as_mut_ptr().cast(), small.len()) };
    t.note("short buffer", n);
    t.note("hard link", link(t.p("l59"), t.p("hard")));
    t.note("its nlink", stat(t.p("hard")).map(|s| s.st_nlink));
    t.note("chmod", unsafe {
        unit(libc::fchmodat(libc::AT_FDCWD, c(t.p("l59")).as_ptr(), 0o600, libc::AT_SYMLINK_NOFOLLOW))
    });
    t.note("readlink of a file", {
        touch(t.p("f"));
        io(fs::read_link(t.p("f")))
    });
    t.note("utimens", utimens(t.p("l59"), (5, 6), (7, 8)));
    t.note("its times", stat(t.p("l59")).map(|s| (s.st_mtime, s.st_mtime_nsec)));
    t.note("chain", {
        symlink("chain0", t.p("chain1")).unwrap();
        (1..45).for_each(|i| symlink(format!("chain{i}"), t.p(&format!("chain{}", i + 1))).unwrap());
        touch(t.p("chain0"));
        [39, 40, 41].map(|i| open(t.p(&format!("chain{i}")), libc::O_RDONLY).map(drop))
    });
}

fn special_files(t: &mut Case) {
    let dev = |a, b| libc::makedev(a, b);
    for (name, mode, dev) in [
        ("fifo", libc::S_IFIFO, 0),
        ("socket", libc::S_IFSOCK, 0),
        ("char", libc::S_IFCHR, dev(1, 3)),
        ("block", libc::S_IFBLK, dev(7, 200)),
        ("big minor", libc::S_IFCHR, dev(10, 1_000_000)),
        ("big major", libc::S_IFCHR, dev(4095, 1)),
        ("regular", libc::S_IFREG, 0),
        ("untyped", 0, 0),
        ("directory", libc::S_IFDIR, 0),
        ("link", libc::S_IFLNK, 0),
    ] {
        t.note(name, mknod(t.p(name), mode | 0o640, dev));
        t.note(
            &format!("stat {name}"),
            stat(t.p(name)).map(|s| (format!("{:o}", s.st_mode), s.st_rdev, s.st_nlink, s.st_size)),
        );
    }
    t.note("null works", open(t.p("char"), libc::O_WRONLY).and_then(|f| write(&f, b"gone")));
    t.note("socket open", open(t.p("socket"), libc::O_RDONLY).map(drop));
    t.note("fifo nonblocking", open(t.p("fifo"), libc::O_WRONLY | libc::O_NONBLOCK).map(drop));
    t.note("truncate fifo", truncate(t.p("fifo"), 0));
    let (dir, user) = (t.p("open"), t.p("open/c"));
    mkdir(&dir, 0o777).unwrap();
    chmod(&dir, 0o777).unwrap();
    t.note("device by a user", as_nobody(|| mknod(&user, libc::S_IFCHR | 0o600, dev(1, 3))));
    t.note("whiteout by a user", as_nobody(|| mknod(&user, libc::S_IFCHR | 0o600, 0)));
    t.note("fifo by a user", as_nobody(|| mknod(dir.join("f"), libc::S_IFIFO | 0o600, 0)));
}

/// Names, kinds and positions as getdents64 has them.
fn getdents(fd: i32) -> Vec<(String, u8, i64)> {
    let mut room = vec![0_u64; 4096];
    let mut all = Vec::new();
    loop {
        let n = unsafe { libc::syscall(libc::SYS_getdents64, fd, room.as_mut_ptr(), room.len() * 8) };
        assert!(n >= 0, "{}", last());
        if n == 0 {
            return all;
        }
        let base = room.as_ptr().cast::<u8>();
        let mut at = 0;
        while at < n as usize {
            unsafe {
                let e = base.add(at);
                let off = e.add(8).cast::<i64>().read_unaligned();
                let len = e.add(16).cast::<u16>().read_unaligned();
                let name = CStr::from_ptr(e.add(19).cast()).to_string_lossy().into_owned();
                all.push((name, *e.add(18), off));
                at += len as usize;
            }
        }
    }
}

fn listing_kinds(t: &mut Case) {
    touch(t.p("f"));
    mkdir(t.p("d"), 0o755).unwrap();
    symlink("x", t.p("l")).unwrap();
    mknod(t.p("p"), libc::S_IFIFO | 0o600, 0).unwrap();
    mknod(t.p("s"), libc::S_IFSOCK | 0o600, 0).unwrap();
    mknod(t.p("c"), libc::S_IFCHR | 0o600, libc::makedev(1, 3)).unwrap();
    mknod(t.p("b"), libc::S_IFBLK | 0o600, libc::makedev(1, 3)).unwrap();
    let dir = open(&t.dir, libc::O_RDONLY | libc::O_DIRECTORY).unwrap();
    let mut all: Vec<_> = getdents(dir.as_raw_fd()).into_iter().map(|(n, k, _)| (n, k)).collect();
    all.sort();
    t.note("kinds", all);
    let inos = fs::read_dir(&t.dir).unwrap().all(|e| {
        let e = e.unwrap();
        std::os::unix::fs::DirEntryExt::ino(&e) == e.path().symlink_metadata().unwrap().ino()
    });
    t.note("numbers are those of stat", inos);
    t.note("directory read", pread(&dir, 10, 0));
    t.note(
        "seek to an odd place",
        seek(&dir, 12_345, libc::SEEK_SET).map(|_| getdents(dir.as_raw_fd()).len() <= 9),
    );
    t.note("seek back", seek(&dir, 0, libc::SEEK_SET));
    t.note("all again", getdents(dir.as_raw_fd()).len());
    t.note("end stays the end", getdents(dir.as_raw_fd()).len());
    t.note("small buffer", {
        seek(&dir, 0, libc::SEEK_SET).unwrap();
        let mut room = [0_u8; 8];
        ok(unsafe { libc::syscall(libc::SYS_getdents64, dir.as_raw_fd(), room.as_mut_ptr(), 8) })
    });
    t.note("of a file", {
        let f = open(t.p("f"), libc::O_RDONLY).unwrap();
        let mut room = [0_u8; 512];
        ok(unsafe { libc::syscall(libc::SYS_getdents64, f.as_raw_fd(), room.as_mut_ptr(), 512) })
    });
}

fn listing_positions(t: &mut Case) {
    let names: Vec<String> = (0..400).map(|i| format!("name-{i:03}")).collect();
    names.iter().for_each(|n| touch(t.p(n)));
    let dir = open(&t.dir, libc::O_RDONLY | libc::O_DIRECTORY).unwrap();
    let first = getdents(dir.as_raw_fd());
    t.note("all", first.len());
    let mut positions: Vec<i64> = first.iter().map(|e| e.2).collect();
    positions.dedup();
    t.note("positions differ", positions.len());
    // From each position comes what followed it, also after others have gone.
    let mut right = true;
    for i in (0..first.len()).step_by(37) {
        seek(&dir, first[i].2, libc::SEEK_SET).unwrap();
        let rest: Vec<_> = getdents(dir.as_raw_fd()).into_iter().map(|e| e.0).collect();
        right &= rest.iter().eq(first[i + 1..].iter().map(|e| &e.0));
    }
    t.note("from any position", right);
    let middle = first.len() / 2;
    for e in first[..middle].iter().filter(|e| !e.0.starts_with('.')) {
        unlink(t.p(&e.0)).unwrap();
    }
    seek(&dir, first[middle].2, libc::SEEK_SET).unwrap();
    let rest: Vec<_> = getdents(dir.as_raw_fd()).into_iter().map(|e| e.0).collect();
    t.note("after removals", rest.iter().eq(first[middle + 1..].iter().map(|e| &e.0)));
    touch(t.p("new"));
    seek(&dir, 0, libc::SEEK_SET).unwrap();
    t.note("new one is seen", getdents(dir.as_raw_fd()).iter().any(|e| e.0 == "new"));
    // Those there all the time are seen once while others come and go.
    seek(&dir, 0, libc::SEEK_SET).unwrap();
    let mut seen = Vec::new();
    let mut room = vec![0_u64; 64];
    for i in 0.. {
        let n = unsafe { libc::syscall(libc::SYS_getdents64, dir.as_raw_fd(), room.as_mut_ptr(), 512) };
        if n <= 0 {
            break;
        }
        let base = room.as_ptr().cast::<u8>();
        let mut at = 0;
        while at < n as usize {
            unsafe {
                seen.push(CStr::from_ptr(base.add(at + 19).cast()).to_string_lossy().into_owned());
                at += base.add(at + 16).cast::<u16>().read_unaligned() as usize;
            }
        }
        touch(t.p(&format!("coming-{i}")));
        if i > 0 {
            unlink(t.p(&format!("coming-{}", i - 1))).unwrap();
        }
    }
    let old: Vec<_> = seen.iter().filter(|n| n.starts_with("name-")).collect();
    t.note("each once", (old.len(), old.iter().collect::<BTreeSet<_>>().len()));
}

fn listing_big(t: &mut Case) {
    for i in 0..3000 {
        touch(t.p(&format!("{i}-{}", "x".repeat(i % 120))));
    }
    t.note("count", fs::read_dir(&t.dir).unwrap().count());
    for (i, e) in fs::read_dir(&t.dir).unwrap().enumerate() {
        if i % 2 == 0 {
            fs::remove_file(e.unwrap().path()).unwrap();
        }
    }
    t.note("half", fs::read_dir(&t.dir).unwrap().count());
    let removed = std::process::Command::new("rm").arg("-rf").arg(&t.dir).status().unwrap();
    t.note("rm -rf", (removed.success(), t.dir.exists()));
}

fn links(t: &mut Case) {
    touch(t.p("f"));
    mkdir(t.p("d"), 0o755).unwrap();
    t.note("to a directory", link(t.p("d"), t.p("e")));
    t.note("taken", link(t.p("f"), t.p("d")));
    t.note("missing", link(t.p("none"), t.p("e")));
    for i in 0..200 {
        link(t.p("f"), t.p(&format!("l{i}"))).unwrap();
    }
    t.note("nlink", stat(t.p("f")).unwrap().st_nlink);
    let f = open(t.p("f"), libc::O_RDONLY).unwrap();
    unlink(t.p("f")).unwrap();
    t.note("nlink of the open one", fstat(&f).st_nlink);
    t.note("nlink by another name", stat(t.p("l7")).unwrap().st_nlink);
    rename(t.p("l1"), t.p("l2"), 0).unwrap();
    t.note("after a rename onto itself", fstat(&f).st_nlink);
    touch(t.p("g"));
    rename(t.p("g"), t.p("l2"), 0).unwrap();
    t.note("after being replaced", fstat(&f).st_nlink);
    mknod(t.p("fifo"), libc::S_IFIFO | 0o600, 0).unwrap();
    t.note("to a fifo", link(t.p("fifo"), t.p("fifo2")));
    symlink("l3", t.p("sym")).unwrap();
    t.note("through a symlink", unsafe {
        let (a, b) = (c(t.p("sym")), c(t.p("followed")));
        unit(libc::linkat(libc::AT_FDCWD, a.as_ptr(), libc::AT_FDCWD, b.as_ptr(), libc::AT_SYMLINK_FOLLOW))
    });
    t.note("leads to", stat(t.p("followed")).unwrap().st_ino == stat(t.p("l3")).unwrap().st_ino);
}

fn removed_directory(t: &mut Case) {
    mkdir(t.p("d"), 0o755).unwrap();
    let d = open(t.p("d"), libc::O_RDONLY | libc::O_DIRECTORY).unwrap();
    rmdir(t.p("d")).unwrap();
    t.note("nlink", fstat(&d).st_nlink);
    let at = |n: &str| c(n);
    t.note(
        "create in it",
        ok(unsafe { libc::openat(d.as_raw_fd(), at("x").as_ptr(), libc::O_CREAT | libc::O_WRONLY, 0o644) }),
    );
    t.note("mkdir in it", ok(unsafe { libc::mkdirat(d.as_raw_fd(), at("x").as_ptr(), 0o755) }));
    t.note("lookup in it", ok(unsafe { libc::faccessat(d.as_raw_fd(), at("x").as_ptr(), 0, 0) }));
    t.note("listing", {
        let mut room = [0_u8; 512];
        ok(unsafe { libc::syscall(libc::SYS_getdents64, d.as_raw_fd(), room.as_mut_ptr(), 512) })
    });
    t.note("fsync", fsync(&d));
    t.note("rmdir of dot", rmdir(t.p(".")));
    mkdir(t.p("e"), 0o755).unwrap();
    touch(t.p("e/f"));
    t.note("rmdir of full", rmdir(t.p("e")));
    t.note("rmdir of dotdot", rmdir(t.p("e/..")));
    t.note("rmdir of file", rmdir(t.p("e/f")));
    t.note("unlink of directory", unlink(t.p("e")));
}

fn tmpfile(t: &mut Case) {
    let f = open(&t.dir, libc::O_TMPFILE | libc::O_RDWR);
    t.note("open", f.as_ref().map(drop));
    if let Ok(f) = f {
        let from = format!("/proc/self/fd/{}", f.as_raw_fd());
        t.note("write", write(&f, b"abc"));
        t.note("nlink", fstat(&f).st_nlink);
        t.note("link", unsafe {
            let (a, b) = (c(&from), c(t.p("named")));
            unit(libc::linkat(
                libc::AT_FDCWD,
                a.as_ptr(),
                libc::AT_FDCWD,
                b.as_ptr(),
                libc::AT_SYMLINK_FOLLOW,
            ))
        });
        t.note("content", io(fs::read(t.p("named"))));
    }
}

fn at_empty_path(t: &mut Case) {
    let f = new_file(t.p("f"));
    write(&f, b"abc").unwrap();
    let linkat = |to: &str| unsafe {
        let b = c(t.p(to));
        unit(libc::linkat(f.as_raw_fd(), c"".as_ptr(), libc::AT_FDCWD, b.as_ptr(), libc::AT_EMPTY_PATH))
    };
    let first = linkat("g");
    let nlink = fstat(&f).st_nlink;
    unlink(t.p("f")).unwrap();
    unlink(t.p("g")).unwrap();
    let gone = linkat("h");
    let by_proc = unsafe {
        let (a, b) = (c(format!("/proc/self/fd/{}", f.as_raw_fd())), c(t.p("i")));
        unit(libc::linkat(libc::AT_FDCWD, a.as_ptr(), libc::AT_FDCWD, b.as_ptr(), libc::AT_SYMLINK_FOLLOW))
    };
    t.note("link", first);
    t.note("nlink", nlink);
    t.note("link without names", gone);
    t.note("link by /proc", by_proc);
    t.note(
        "reopen by /proc",
        open(format!("/proc/self/fd/{}", f.as_raw_fd()), libc::O_RDWR).and_then(|f| pread(&f, 9, 0)),
    );
    t.note("truncate", ftruncate(&f, 1));
    t.note("append", pwrite(&f, b"xyz", 1));
    t.note("read", pread(&f, 9, 0));
    t.note("stat", {
        let s = fstat(&f);
        (s.st_nlink, s.st_size)
    });
    t.note("chmod", unsafe { unit(libc::fchmod(f.as_raw_fd(), 0o600)) });
    t.note("mode", format!("{:o}", fstat(&f).st_mode));
    t.note("fsync", fsync(&f));
    t.note("fallocate", fallocate(&f, 0, 0, 10_000));
    t.note("size", fstat(&f).st_size);
}

fn setgid_directories(t: &mut Case) {
    mkdir(t.p("d"), 0o777).unwrap();
    lchown(t.p("d"), 0, 777).unwrap();
    chmod(t.p("d"), 0o2777).unwrap();
    let d = t.p("d");
    let told = as_user(12_345, 12_345, &[], || {
        mkdir(d.join("sub"), 0o755).unwrap();
        touch(d.join("f"));
        let g = open_mode(d.join("g"), libc::O_CREAT | libc::O_WRONLY, 0o2775).map(drop);
        let h = open_mode(d.join("h"), libc::O_CREAT | libc::O_WRONLY, 0o2665).map(drop);
        mknod(d.join("p"), libc::S_IFIFO | 0o2775, 0).unwrap();
        symlink("x", d.join("l")).unwrap();
        let member = chmod(d.join("f"), 0o2755);
        (g, h, member)
    });
    t.note("told", told);
    for n in ["sub", "f", "g", "h", "p", "l"] {
        t.note(n, stat(d.join(n)).map(|s| (format!("{:o}", s.st_mode), s.st_gid)));
    }
    let told = as_user(12_345, 12_345, &[777], || {
        open_mode(d.join("i"), libc::O_CREAT | libc::O_WRONLY, 0o2775).map(drop).unwrap();
        chmod(d.join("f"), 0o2755)
    });
    t.note("as member", told);
    for n in ["i", "f"] {
        t.note(&format!("{n} as member"), mode(d.join(n)));
    }
}

fn open_flags(t: &mut Case) {
    touch(t.p("f"));
    mkdir(t.p("d"), 0o755).unwrap();
    symlink("f", t.p("l")).unwrap();
    symlink("none", t.p("dangling")).unwrap();
    let all = [
        ("excl on taken", "f", libc::O_CREAT | libc::O_EXCL | libc::O_WRONLY),
        ("excl on symlink", "dangling", libc::O_CREAT | libc::O_EXCL | libc::O_WRONLY),
        ("directory on file", "f", libc::O_RDONLY | libc::O_DIRECTORY),
        ("write on directory", "d", libc::O_WRONLY),
        ("creat on directory", "d", libc::O_RDONLY | libc::O_CREAT),
        ("creat and directory", "new", libc::O_RDONLY | libc::O_CREAT | libc::O_DIRECTORY),
        ("trunc on directory", "d", libc::O_RDONLY | libc::O_TRUNC),
        ("read and trunc", "f", libc::O_RDONLY | libc::O_TRUNC),
        ("direct on directory", "d", libc::O_RDONLY | libc::O_DIRECT),
        ("noatime", "f", libc::O_RDONLY | libc::O_NOATIME),
        ("access 3", "f", 3),
        ("direct", "f", libc::O_RDWR | libc::O_DIRECT),
        ("sync", "f", libc::O_RDWR | libc::O_SYNC),
        ("path", "f", libc::O_PATH),
        ("through dangling", "dangling", libc::O_CREAT | libc::O_WRONLY),
    ];
    for (key, name, flags) in all {
        t.note(key, open(t.p(name), flags).map(drop));
    }
    t.note("dangling made", stat(t.p("none")).is_ok());
    let f = open_mode(t.p("readonly"), libc::O_CREAT | libc::O_RDWR, 0o000).unwrap();
    t.note("write to mode 0", write(&f, b"x"));
    t.note("noatime by a user", {
        let p = t.p("f");
        as_nobody(|| open(p, libc::O_RDONLY | libc::O_NOATIME).map(drop))
    });
    t.note("read of write only", open(t.p("f"), libc::O_WRONLY).and_then(|f| pread(&f, 1, 0)));
    t.note("write of read only", open(t.p("f"), libc::O_RDONLY).and_then(|f| write(&f, b"x")));
    t.note("run it", {
        fs::copy("/bin/true", t.p("true")).unwrap();
        let status = std::process::Command::new(t.p("true")).status();
        io(status).map(|s| s.success())
    });
}

fn trailing_slashes(t: &mut Case) {
    touch(t.p("f"));
    t.note("stat of file/", stat(t.p("f/")).map(|_| ()));
    t.note("mkdir d/", mkdir(t.p("d/"), 0o755));
    t.note("create x/", open(t.p("x/"), libc::O_CREAT | libc::O_WRONLY).map(drop));
    t.note("rename d/ e/", rename(t.p("d/"), t.p("e/"), 0));
    t.note("rename f g/", rename(t.p("f"), t.p("g/"), 0));
    t.note("unlink f/", unlink(t.p("f/")));
    t.note("symlink y/", symlink("x", t.p("y/")));
    symlink("e", t.p("l")).unwrap();
    t.note("lstat of symlink/", mode(t.p("l/")));
    t.note("rmdir of symlink/", rmdir(t.p("l/")));
    t.note("mknod z/", mknod(t.p("z/"), libc::S_IFIFO | 0o600, 0));
}
