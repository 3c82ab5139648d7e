//! Attributes: times, modes, owners, what a change of one does to the others.

use std::fs;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;

use crate::Run;
use crate::sys::*;

pub const CASES: &[(&str, Run)] = &[
    ("which_times_move", which_times_move),
    ("times_at_the_edges", times_at_the_edges),
    ("utimens_rules", utimens_rules),
    ("chmod_rules", chmod_rules),
    ("chown_rules", chown_rules),
    ("statx", statx),
    ("statfs_numbers", statfs_numbers),
    ("atime", atime),
    ("sizes", sizes),
    ("file_flags", file_flags),
    ("umask", umask),
];

type Times = [(i64, i64); 3];

fn times(p: impl AsRef<Path>) -> Times {
    let s = stat(p).unwrap();
    [(s.st_atime, s.st_atime_nsec), (s.st_mtime, s.st_mtime_nsec), (s.st_ctime, s.st_ctime_nsec)]
}

/// Which of access, modification and change time moved forward (`+`), back (`-`) or not at all.
fn moved(a: Times, b: Times) -> String {
    let mut out = String::new();
    for (i, n) in ["a", "m", "c"].iter().enumerate() {
        if a[i] != b[i] {
            out += n;
            out += if b[i] > a[i] { "+" } else { "-" };
        }
    }
    out
}

fn which_times_move(t: &mut Case) {
    let f = new_file(t.p("f"));
    mkdir(t.p("d"), 0o755).unwrap();
    symlink("f", t.p("l")).unwrap();
    write(&f, &[1; 10_000]).unwrap();
    fsync(&f).unwrap();
    let (pf, pd) = (t.p("f"), t.p("d"));
    type Step<'a> = (&'a str, Box<dyn FnMut() -> R<()> + 'a>);
    let steps: Vec<Step<'_>> = vec![
        ("write", Box::new(|| pwrite(&f, b"x", 5).map(drop))),
        ("write of nothing", Box::new(|| pwrite(&f, b"", 5).map(drop))),
        ("append", Box::new(|| pwrite(&f, b"x", 10_000).map(drop))),
        ("fsync", Box::new(|| fsync(&f))),
        ("chmod", Box::new(|| chmod(&pf, 0o600))),
        ("chmod same", Box::new(|| chmod(&pf, 0o600))),
        ("chown same", Box::new(|| lchown(&pf, 0, 0))),
        ("chown nothing", Box::new(|| lchown(&pf, u32::MAX, u32::MAX))),
        ("truncate down", Box::new(|| ftruncate(&f, 5000))),
        ("truncate up", Box::new(|| ftruncate(&f, 6000))),
        ("ftruncate same", Box::new(|| ftruncate(&f, 6000))),
        ("truncate same", Box::new(|| truncate(&pf, 6000))),
        ("open trunc", Box::new(|| open(&pf, libc::O_WRONLY | libc::O_TRUNC).map(drop))),
        ("open trunc of empty", Box::new(|| open(&pf, libc::O_WRONLY | libc::O_TRUNC).map(drop))),
        ("fallocate", Box::new(|| fallocate(&f, 0, 0, 20_000))),
        ("fallocate inside", Box::new(|| fallocate(&f, 0, 0, 10_000))),
        ("fallocate keep", Box::new(|| fallocate(&f, libc::FALLOC_FL_KEEP_SIZE, 0, 90_000))),
        (
            "punch",
            Box::new(|| fallocate(&f, libc::FALLOC_FL_KEEP_SIZE | libc::FALLOC_FL_PUNCH_HOLE, 0, 4096)),
        ),
        ("zero", Box::new(|| fallocate(&f, libc::FALLOC_FL_ZERO_RANGE, 0, 4096))),
        ("link", Box::new(|| link(&pf, pf.with_file_name("f2")))),
        ("unlink", Box::new(|| unlink(pf.with_file_name("f2")))),
        (
            "rename",
            Box::new(|| {
                rename(&pf, pf.with_file_name("f3"), 0).and_then(|()| rename(pf.with_file_name("f3"), &pf, 0))
            }),
        ),
        ("setxattr", Box::new(|| setxattr(&pf, "user.a", b"1", 0))),
        ("setxattr same", Box::new(|| setxattr(&pf, "user.a", b"1", 0))),
        ("getxattr", Box::new(|| getxattr(&pf, "user.a").map(drop))),
        ("removexattr", Box::new(|| removexattr(&pf, "user.a"))),
        ("utimens", Box::new(|| utimens(&pf, (1, 1), (2, 2)))),
        ("utimens now", Box::new(|| utimens(&pf, (0, libc::UTIME_NOW), (0, libc::UTIME_NOW)))),
        ("utimens omit", Box::new(|| utimens(&pf, (0, libc::UTIME_OMIT), (0, libc::UTIME_OMIT)))),
        ("utimens only atime", Box::new(|| utimens(&pf, (9, 0), (0, libc::UTIME_OMIT)))),
    ];
    for (key, mut step) in steps {
        let before = times(t.p("f"));
        nap();
        let done = step();
        t.lines.push(format!("{key} = {:?} {}", done, moved(before, times(t.p("f")))));
    }
    type DirStep<'a> = (&'a str, Box<dyn Fn() -> R<()> + 'a>);
    let steps: Vec<DirStep<'_>> = vec![
        ("d: create", Box::new(|| open(pd.join("x"), libc::O_CREAT | libc::O_WRONLY).map(drop))),
        ("d: open there", Box::new(|| open(pd.join("x"), libc::O_CREAT | libc::O_WRONLY).map(drop))),
        ("d: chmod in it", Box::new(|| chmod(pd.join("x"), 0o600))),
        ("d: link", Box::new(|| link(pd.join("x"), pd.join("y")))),
        ("d: rename in it", Box::new(|| rename(pd.join("x"), pd.join("z"), 0))),
        ("d: rename over", Box::new(|| rename(pd.join("z"), pd.join("y"), 0))),
        ("d: unlink", Box::new(|| unlink(pd.join("y")))),
        ("d: mkdir", Box::new(|| mkdir(pd.join("s"), 0o755))),
        ("d: create below", Box::new(|| open(pd.join("s/x"), libc::O_CREAT | libc::O_WRONLY).map(drop))),
        ("d: failed mkdir", Box::new(|| mkdir(pd.join("s"), 0o755))),
        ("d: symlink", Box::new(|| symlink("x", pd.join("l")))),
        (
            "d: own rename",
            Box::new(|| {
                rename(&pd, pd.with_file_name("e"), 0).and_then(|()| rename(pd.with_file_name("e"), &pd, 0))
            }),
        ),
    ];
    for (key, step) in steps {
        let before = times(t.p("d"));
        nap();
        let done = step();
        t.lines.push(format!("{key} = {:?} {}", done, moved(before, times(t.p("d")))));
    }
    // What a rename does to a directory that moves to another parent, and to what is replaced.
    mkdir(t.p("d/sub"), 0o755).unwrap();
    let before = times(t.p("d/sub"));
    nap();
    rename(t.p("d/sub"), t.p("sub"), 0).unwrap();
    t.note("moved directory", moved(before, times(t.p("sub"))));
    let victim = new_file(t.p("v"));
    link(t.p("v"), t.p("v2")).unwrap();
    drop(new_file(t.p("w")));
    let before = times(t.p("v2"));
    nap();
    rename(t.p("w"), t.p("v"), 0).unwrap();
    t.note("replaced", moved(before, times(t.p("v2"))));
    drop(victim);
    let (a, b) = (times(t.p("v")), times(t.p("v2")));
    nap();
    rename(t.p("v"), t.p("v2"), libc::RENAME_EXCHANGE).unwrap();
    t.note("swapped", (moved(a, times(t.p("v2"))), moved(b, times(t.p("v")))));
}

fn times_at_the_edges(t: &mut Case) {
    drop(new_file(t.p("f")));
    mkdir(t.p("d"), 0o755).unwrap();
    symlink("x", t.p("l")).unwrap();
    let all: [(&str, i64, i64); 14] = [
        ("zero", 0, 0),
        ("one ns", 0, 1),
        ("before 1970", -1, 0),
        ("before with ns", -2, 800_000_000),
        ("1901", -0x8000_0000, 5),
        ("before 1901", -0x8000_0001, 0),
        ("2038", 0x7fff_ffff, 999_999_999),
        ("after 2038", 0x8000_0000, 1),
        ("after 2106", 0x1_0000_0000, 7),
        ("2446", 0x3_7fff_ffff, 0),
        ("after 2446", 0x3_8000_0000, 3),
        ("year 10000", 253_402_300_800, 0),
        ("the last", i64::MAX, 0),
        ("the first", i64::MIN, 1),
    ];
    for name in ["f", "d", "l"] {
        for (key, secs, nanos) in all {
            let done = utimens(t.p(name), (secs, nanos), (secs, nanos));
            let [a, m, _] = times(t.p(name));
            // ext4 takes what it cannot keep for the nearest that it can: 1901 to 2446. More is kept here.
            let kept = if (-0x8000_0000..=0x3_7fff_ffff).contains(&secs) && secs != -0x8000_0000 {
                format!("{m:?}")
            } else {
                let nearest = (secs.clamp(-0x8000_0000, 0x3_7fff_ffff), 0);
                // The kernel takes the nanoseconds off the first and the last moment of all.
                (m == (secs, nanos) || m == (secs, 0) || m == nearest).to_string()
            };
            t.note(&format!("{name} {key}"), (done, a == m, kept));
        }
    }
    utimens(t.p("f"), (-5, 123), (0x2_0000_0000, 456)).unwrap();
    drop_caches(&t.root);
    t.note("after drop", times(t.p("f"))[..2].to_vec());
    t.note("bad ns", utimens(t.p("f"), (1, 1_000_000_000), (1, 0)));
}

fn utimens_rules(t: &mut Case) {
    drop(new_file(t.p("f")));
    chmod(t.p("f"), 0o666).unwrap();
    let f = t.p("f");
    let told = as_nobody(|| {
        (
            utimens(&f, (1, 0), (1, 0)),
            utimens(&f, (0, libc::UTIME_NOW), (0, libc::UTIME_NOW)),
            utimens(&f, (0, libc::UTIME_OMIT), (0, libc::UTIME_OMIT)),
            utimens(&f, (0, libc::UTIME_NOW), (0, libc::UTIME_OMIT)),
        )
    });
    t.note("may write", told);
    chmod(&f, 0o644).unwrap();
    t.note("may read", as_nobody(|| utimens(&f, (0, libc::UTIME_NOW), (0, libc::UTIME_NOW))));
    utimens(&f, (100, 5), (200, 6)).unwrap();
    nap();
    t.note("futimens", {
        let fd = open(&f, libc::O_RDONLY).unwrap();
        unit(unsafe {
            libc::futimens(
                fd.as_raw_fd(),
                [
                    libc::timespec { tv_sec: 3, tv_nsec: 4 },
                    libc::timespec { tv_sec: 0, tv_nsec: libc::UTIME_OMIT },
                ]
                .as_ptr(),
            )
        })
    });
    t.note("result", times(&f)[..2].to_vec());
    // A time that was set stays although the file is written and closed later.
    let w = open(&f, libc::O_WRONLY).unwrap();
    write(&w, b"data").unwrap();
    utimens(&f, (10, 11), (12, 13)).unwrap();
    drop(w);
    t.note("after close", times(&f)[..2].to_vec());
    fsync(&open(&f, libc::O_RDONLY).unwrap()).unwrap();
    drop_caches(&t.root);
    t.note("after drop", times(&f)[..2].to_vec());
    // And cp -p's order: write, close, set.
    fs::write(&f, b"more").unwrap();
    utimens(&f, (20, 21), (22, 23)).unwrap();
    drop_caches(&t.root);
    t.note("set after close", times(&f)[..2].to_vec());
}

fn chmod_rules(t: &mut Case) {
    drop(new_file(t.p("f")));
    mkdir(t.p("d"), 0o755).unwrap();
    for n in ["f", "d"] {
        lchown(t.p(n), 12_345, 777).unwrap();
        for m in [0o7777, 0o0, 0o1000, 0o6644] {
            t.note(&format!("{n} {m:o}"), (chmod(t.p(n), m), mode(t.p(n))));
        }
        let p = t.p(n);
        t.note(
            &format!("{n} by owner, no member"),
            as_user(12_345, 12_345, &[], || (chmod(&p, 0o7755), mode(&p))),
        );
        t.note(
            &format!("{n} by owner, member"),
            as_user(12_345, 12_345, &[777], || (chmod(&p, 0o7755), mode(&p))),
        );
        t.note(&format!("{n} by another"), as_user(54_321, 777, &[], || chmod(&p, 0o777)));
    }
    t.note("by descriptor of read", {
        let f = open(t.p("f"), libc::O_RDONLY).unwrap();
        (unit(unsafe { libc::fchmod(f.as_raw_fd(), 0o640) }), mode(t.p("f")))
    });
}

fn chown_rules(t: &mut Case) {
    drop(new_file(t.p("f")));
    symlink("f", t.p("l")).unwrap();
    lchown(t.p("f"), 12_345, 12_345).unwrap();
    let f = t.p("f");
    let told = as_user(12_345, 12_345, &[777], || {
        (
            lchown(&f, 54_321, u32::MAX),
            lchown(&f, 12_345, u32::MAX),
            lchown(&f, u32::MAX, 777),
            lchown(&f, u32::MAX, 888),
            lchown(&f, u32::MAX, 12_345),
        )
    });
    t.note("owner", told);
    t.note("another", as_user(54_321, 12_345, &[], || lchown(&f, u32::MAX, 12_345)));
    t.note(
        "symlink",
        (
            lchown(t.p("l"), 1, 2),
            stat(t.p("l")).map(|s| (s.st_uid, s.st_gid)),
            stat(t.p("f")).map(|s| s.st_uid),
        ),
    );
    t.note("big", (lchown(&f, u32::MAX - 1, u32::MAX - 1), stat(&f).map(|s| (s.st_uid, s.st_gid))));
}

fn statx(t: &mut Case) {
    let f = new_file(t.p("f"));
    let get = |p: &Path, mask: u32, flags: i32| {
        let mut st = std::mem::MaybeUninit::<libc::statx>::zeroed();
        let done = unsafe { libc::statx(libc::AT_FDCWD, c(p).as_ptr(), flags, mask, st.as_mut_ptr()) };
        ok(done).map(|_| unsafe { st.assume_init() })
    };
    let all = libc::STATX_BASIC_STATS | libc::STATX_BTIME;
    let st = get(&t.p("f"), all, 0).unwrap();
    t.note("birth time is there", st.stx_mask & libc::STATX_BTIME != 0);
    let first = (st.stx_btime.tv_sec, st.stx_btime.tv_nsec);
    nap();
    write(&f, b"x").unwrap();
    chmod(t.p("f"), 0o600).unwrap();
    let st = get(&t.p("f"), all, 0).unwrap();
    t.note("it stays", (st.stx_btime.tv_sec, st.stx_btime.tv_nsec) == first);
    t.note(
        "it is below ctime",
        (st.stx_btime.tv_sec, st.stx_btime.tv_nsec) < (st.stx_ctime.tv_sec, st.stx_ctime.tv_nsec),
    );
    t.note(
        "size only",
        get(&t.p("f"), libc::STATX_SIZE, 0).map(|s| (s.stx_size, s.stx_mask & libc::STATX_SIZE != 0)),
    );
    t.note("dont sync", get(&t.p("f"), all, libc::AT_STATX_DONT_SYNC).map(|s| s.stx_size));
    t.note("force sync", get(&t.p("f"), all, libc::AT_STATX_FORCE_SYNC).map(|s| s.stx_size));
    t.note(
        "root is a mount root",
        get(&t.root, all, 0).map(|s| s.stx_attributes & libc::STATX_ATTR_MOUNT_ROOT as u64 != 0),
    );
    t.note("device as in stat", {
        let s = stat(t.p("f")).unwrap();
        libc::makedev(st.stx_dev_major, st.stx_dev_minor) == s.st_dev
    });
}

fn statfs_numbers(t: &mut Case) {
    let s = statfs(&t.dir);
    t.note("name length", s.f_namelen);
    t.note("block size", (s.f_bsize, s.f_frsize));
    t.note("sums", (s.f_bavail <= s.f_bfree, s.f_bfree <= s.f_blocks, s.f_ffree <= s.f_files));
    let id: [i32; 2] = unsafe { std::mem::transmute(s.f_fsid) };
    t.note("id is not zero", id != [0, 0]);
    t.note("id is the same for all", {
        let o: [i32; 2] = unsafe { std::mem::transmute(statfs(&t.root).f_fsid) };
        o == id
    });
}

fn atime(t: &mut Case) {
    let old = |p: &Path| utimens(p, (1_000_000, 0), (2_000_000, 0)).unwrap();
    let newer = |p: &Path| utimens(p, (0, libc::UTIME_NOW), (2_000_000, 0)).unwrap();
    let state = |p: &Path| {
        let a = times(p)[0];
        if a.0 > 1_700_000_000 { "now" } else { "old" }
    };
    fs::write(t.p("f"), b"content").unwrap();
    fs::write(t.p("g"), vec![7; 100_000]).unwrap();
    mkdir(t.p("d"), 0o755).unwrap();
    drop(new_file(t.p("d/x")));
    symlink("f", t.p("l")).unwrap();
    old(&t.p("f"));
    t.note("stat", {
        stat(t.p("f")).unwrap();
        state(&t.p("f"))
    });
    t.note("open", {
        drop(open(t.p("f"), libc::O_RDONLY));
        state(&t.p("f"))
    });
    t.note("read of nothing", {
        let f = open(t.p("f"), libc::O_RDONLY).unwrap();
        pread(&f, 0, 0).unwrap();
        state(&t.p("f"))
    });
    t.note("read with noatime", {
        let f = open(t.p("f"), libc::O_RDONLY | libc::O_NOATIME).unwrap();
        pread(&f, 4, 0).unwrap();
        state(&t.p("f"))
    });
    t.note("read", {
        fs::read(t.p("f")).unwrap();
        state(&t.p("f"))
    });
    // Relative: a day old, or not newer than the last change.
    newer(&t.p("g"));
    nap();
    let before = times(t.p("g"))[0];
    fs::read(t.p("g")).unwrap();
    t.note("read again is not noted", {
        nap();
        fs::read(t.p("g")).unwrap();
        times(t.p("g"))[0] == before || state(&t.p("g")) == "now"
    });
    old(&t.p("g"));
    drop_caches(&t.root);
    t.note("read from the disk", {
        fs::read(t.p("g")).unwrap();
        state(&t.p("g"))
    });
    old(&t.p("g"));
    t.note("direct read", {
        let f = open(t.p("g"), libc::O_RDONLY | libc::O_DIRECT).unwrap();
        pread_direct(&f);
        state(&t.p("g"))
    });
    old(&t.p("g"));
    t.note("mmap", {
        let f = open(t.p("g"), libc::O_RDWR).unwrap();
        let m = Map::new(&f, 4096).unwrap();
        m.get(9);
        drop(m);
        state(&t.p("g"))
    });
    old(&t.p("d"));
    t.note("listing", {
        fs::read_dir(t.p("d")).unwrap().count();
        state(&t.p("d"))
    });
    old(&t.p("l"));
    t.note("readlink", {
        fs::read_link(t.p("l")).unwrap();
        state(&t.p("l"))
    });
    old(&t.p("l"));
    t.note("following", {
        stat(t.p("l")).unwrap();
        open(t.p("l"), libc::O_RDONLY).unwrap();
        state(&t.p("l"))
    });
    old(&t.p("f"));
    fs::read(t.p("f")).unwrap();
    drop_caches(&t.root);
    t.note("kept after drop", state(&t.p("f")));
    let before = times(t.p("f"));
    nap();
    chmod(t.p("f"), 0o600).unwrap();
    t.note("chmod leaves it", times(t.p("f"))[0] == before[0]);
    // After a change the next read is noted.
    nap();
    fs::write(t.p("f"), b"changed").unwrap();
    let before = times(t.p("f"))[0];
    nap();
    fs::read(t.p("f")).unwrap();
    t.note("first read after a change", times(t.p("f"))[0] > before);
    let before = times(t.p("f"));
    nap();
    fs::read(t.p("f")).unwrap();
    t.note("second read after a change", moved(before, times(t.p("f"))));
    old(&t.p("f"));
    let before = times(t.p("f"));
    nap();
    fs::read(t.p("f")).unwrap();
    t.note("what a read moves", moved(before, times(t.p("f"))));
}

fn pread_direct(f: &OwnedFd) {
    let mut room = Aligned::new(4096, 0);
    let b = room.bytes();
    assert!(unsafe { libc::pread(f.as_raw_fd(), b.as_mut_ptr().cast(), b.len(), 0) } > 0);
}

fn sizes(t: &mut Case) {
    let f = new_file(t.p("f"));
    t.note("empty", {
        let s = fstat(&f);
        (s.st_size, s.st_blocks)
    });
    write(&f, b"x").unwrap();
    fsync(&f).unwrap();
    t.note("one byte", {
        let s = fstat(&f);
        (s.st_size, s.st_blocks)
    });
    pwrite(&f, &[1; 8192], 0).unwrap();
    fsync(&f).unwrap();
    t.note("two pages", {
        let s = fstat(&f);
        (s.st_size, s.st_blocks, s.st_blksize)
    });
    ftruncate(&f, 0).unwrap();
    t.note("cut", {
        let s = fstat(&f);
        (s.st_size, s.st_blocks)
    });
    ftruncate(&f, 1 << 30).unwrap();
    t.note("hole", {
        let s = fstat(&f);
        (s.st_size, s.st_blocks)
    });
    pwrite(&f, &[1; 1 << 20], 1 << 20).unwrap();
    fsync(&f).unwrap();
    t.note("a MiB in it", fstat(&f).st_blocks);
    mkdir(t.p("d"), 0o755).unwrap();
    t.note("directory", {
        let s = stat(t.p("d")).unwrap();
        (s.st_size, s.st_blksize, s.st_nlink)
    });
}

fn file_flags(t: &mut Case) {
    drop(new_file(t.p("f")));
    let f = open(t.p("f"), libc::O_RDWR).unwrap();
    let d = open(&t.dir, libc::O_RDONLY).unwrap();
    let mut flags: libc::c_int = 0;
    t.note("get flags", unit(unsafe { libc::ioctl(f.as_raw_fd(), 0x8008_6601, &raw mut flags) }));
    let immutable: libc::c_int = 0x10;
    let done = unit(unsafe { libc::ioctl(f.as_raw_fd(), 0x4008_6602, &raw const immutable) });
    t.note("set immutable", done.is_ok());
    if done.is_ok() {
        t.note("write to immutable", open(t.p("f"), libc::O_WRONLY).map(drop));
        let none: libc::c_int = 0;
        unit(unsafe { libc::ioctl(f.as_raw_fd(), 0x4008_6602, &raw const none) }).unwrap();
    }
    let mut version: libc::c_int = 0;
    t.note("get version", unit(unsafe { libc::ioctl(f.as_raw_fd(), 0x8008_7601, &raw mut version) }));
    let mut xattr = [0_u8; 28];
    t.note("fsgetxattr", unit(unsafe { libc::ioctl(f.as_raw_fd(), 0x801c_581f, xattr.as_mut_ptr()) }));
    t.note(
        "fsgetxattr of a directory",
        unit(unsafe { libc::ioctl(d.as_raw_fd(), 0x801c_581f, xattr.as_mut_ptr()) }),
    );
    t.note("unknown", unit(unsafe { libc::ioctl(f.as_raw_fd(), 0x1234_5678, 0) }));
    t.note("unknown of a directory", unit(unsafe { libc::ioctl(d.as_raw_fd(), 0x1234_5678, 0) }));
    let mut n: libc::c_int = 0;
    t.note("FIONREAD", (unit(unsafe { libc::ioctl(f.as_raw_fd(), libc::FIONREAD, &raw mut n) }), n));
    t.note("TCGETS", unit(unsafe { libc::ioctl(f.as_raw_fd(), libc::TCGETS, xattr.as_mut_ptr()) }));
    let mut block: libc::c_int = 0;
    t.note("FIBMAP", unit(unsafe { libc::ioctl(f.as_raw_fd(), 1, &raw mut block) }));
    let user = t.p("f");
    t.note(
        "FIBMAP by a user",
        as_nobody(|| {
            let f = open(&user, libc::O_RDONLY).unwrap();
            let mut block: libc::c_int = 0;
            unit(unsafe { libc::ioctl(f.as_raw_fd(), 1, &raw mut block) })
        }),
    );
    let mut size: libc::c_int = 0;
    t.note("FIGETBSZ", (unit(unsafe { libc::ioctl(f.as_raw_fd(), 2, &raw mut size) }), size));
    let mut map = [0_u8; 32 + 56 * 4];
    map[8..16].copy_from_slice(&u64::MAX.to_ne_bytes());
    t.note("FIEMAP", unit(unsafe { libc::ioctl(f.as_raw_fd(), 0xc020_660b, map.as_mut_ptr()) }));
    let range = [0_u64, u64::MAX, 0];
    t.note(
        "FITRIM by a user",
        as_nobody(|| {
            let d = open(user.parent().unwrap(), libc::O_RDONLY).unwrap();
            unit(unsafe { libc::ioctl(d.as_raw_fd(), 0xc018_5879, range.as_ptr()) })
        }),
    );
    t.note("FICLONE", unit(unsafe { libc::ioctl(f.as_raw_fd(), 0x4004_9409, f.as_raw_fd()) }));
}

fn umask(t: &mut Case) {
    let dir = t.dir.clone();
    let told = std::thread::spawn(move || {
        // The mask is the process's, unless a thread leaves.
        unit(unsafe { libc::unshare(libc::CLONE_FS) }).unwrap();
        [0o022, 0o077, 0o027, 0].map(|mask| {
            unsafe { libc::umask(mask) };
            let n = |k: &str| dir.join(format!("{k}-{mask:o}"));
            open_mode(n("f"), libc::O_CREAT | libc::O_WRONLY, 0o666).unwrap();
            mkdir(n("d"), 0o777).unwrap();
            mknod(n("p"), libc::S_IFIFO | 0o666, 0).unwrap();
            symlink("x", n("l")).unwrap();
            ["f", "d", "p", "l"].map(|k| mode(n(k)))
        })
    });
    t.note("modes", told.join().unwrap());
}
