//! Short runs of what takes long in `scripts/fsx` and `scripts/limits`: fsx, which others wrote, and the limits of names, depth,
//! sizes and numbers. Each then survives a crash, a remount, and a restore.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt, symlink};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use rustix::fs::{AtFlags, CWD, Mode, OFlags, RenameFlags, SeekFrom};
use support::mount::{Mount, Volume, drop_page_cache};
use support::run::{run, seed, wait_until};
use support::tree::Content;

const LONG: Duration = Duration::from_secs(300);
const FSX_WEIGHTS: &str = "[weights]\nclose_open = 1.0\nread = 10.0\nwrite = 10.0\nmapread = 10.0\nmapwrite = 10.0\n\
    invalidate = 1.0\ntruncate = 5.0\nfsync = 0.3\nfdatasync = 0.3\nposix_fallocate = 2.0\npunch_hole = 5.0\nsendfile = 5.0\n\
    posix_fadvise = 3.0\ncopy_file_range = 5.0\n";

#[test]
fn fsx() {
    let Some(mut v) = Volume::new("suites: fsx") else { return };
    let tool = std::env::var("FSX").unwrap_or_else(|_| "fsx".into());
    if Command::new(&tool).arg("--help").output().is_err() {
        return println!("SKIPPED: fsx is not installed (cargo install fsx)");
    }
    let seed = seed("suites: fsx");
    // So small that blocks are evicted and come back from the replica.
    v.setting("cache_size = \"16MiB\"");
    v.setting("block_size = \"64KiB\"");
    v.setting("commit_interval = \"200ms\"");
    v.folder("a");
    let mut m = v.mount();
    let exercise = |file: &Path, conf: &str, seed: u64, ops: u32| {
        let conf_file = v.path("fsx.toml");
        fs::write(&conf_file, format!("{conf}{FSX_WEIGHTS}")).unwrap();
        let mut fsx = Command::new(&tool);
        fsx.arg("-q").arg("-f").arg(&conf_file).args(["-N", &ops.to_string(), "-S", &seed.to_string()]);
        fsx.arg("-P").arg(v.path("")).arg(file);
        run(&mut fsx, LONG).ok();
    };
    let cases = [
        // The border between content in the inode and in blocks.
        ("tiny", "flen = 20480\nopsize = { min = 1, max = 6000 }\n", 2000),
        ("blocks", "flen = 1500000\nopsize = { min = 1, max = 200000 }\n", 1000),
        ("evicted", "flen = 40000000\nopsize = { min = 1, max = 2000000 }\n", 150),
    ];
    for (i, (name, conf, ops)) in cases.into_iter().enumerate() {
        let plain = v.path(name);
        for crash in [true, false] {
            let seed = seed.wrapping_add(2 * i as u64 + u64::from(crash));
            // On the local disk the configuration is one that passes, and the file shows what ours must hold.
            exercise(&plain, conf, seed, ops);
            exercise(&m.path(name), conf, seed, ops);
            let same = |m: &Mount, when: &str| {
                drop_page_cache(&m.path(name));
                assert!(fs::read(&plain).unwrap() == fs::read(m.path(name)).unwrap(), "{name} {when}");
            };
            same(&m, "at the end");
            if crash {
                File::open(m.path(name)).unwrap().sync_all().unwrap();
                m.kill9();
            } else {
                m.unmount();
            }
            m = v.mount();
            same(&m, "after a remount");
        }
    }
    m.sync();
    m.unmount();
    let restored = v.restore("a", "restored");
    for (name, _, _) in cases {
        assert!(fs::read(v.path(name)).unwrap() == fs::read(restored.join(name)).unwrap(), "{name} restored");
    }
}

const MIB: u64 = 1 << 20;
const TIB: u64 = 1 << 40;
/// Directories in one another, each with a name of 255 bytes: a path of 128,000 bytes.
const DEEP: usize = 500;
const MANY: usize = 3000;

/// A limit: how to go there, and how to see that all is as it was.
type Limit = (&'static str, fn(&Path), fn(&Path));

const LIMITS: [Limit; 5] = [
    ("names", make_names, check_names),
    ("deep", make_deep, check_deep),
    ("sparse", make_sparse, check_sparse),
    ("attributes", make_attributes, check_attributes),
    ("links", make_links, check_links),
];

#[test]
fn limits() {
    let Some(mut v) = Volume::new("suites: limits") else { return };
    v.folder("a");
    let m = v.mount();
    for (name, make, check) in LIMITS {
        let at = m.path(name);
        fs::create_dir(&at).unwrap();
        make(&at);
        check(&at);
    }
    let held = open_and_deleted(&m, MANY);
    File::open(m.root()).unwrap().sync_all().unwrap();
    m.kill9();
    drop(held);
    let m = v.mount();
    for (name, _, check) in LIMITS {
        check(&m.path(name));
    }
    assert_eq!(fs::read_dir(m.path("open")).unwrap().count(), 0);
    m.sync();
    m.unmount();
    // Into another mount, because it takes all of it; a local filesystem may have narrower limits.
    let Some(mut other) = Volume::new("suites: limits, restored") else { return };
    other.folder("b");
    let n = other.mount();
    v.restore_to("a", n.root());
    for (name, _, check) in LIMITS {
        check(&n.path(name));
    }
    n.unmount();
    // A state folder made from the replica alone, and then all goes.
    fs::remove_dir_all(v.path("state")).unwrap();
    let m = v.mount();
    for (name, _, check) in LIMITS {
        check(&m.path(name));
        run(Command::new("rm").arg("-rf").arg(m.path(name)), LONG).ok();
        assert!(!m.path(name).exists(), "{name}");
    }
    m.unmount();
}

/// Every byte that a name may hold, alone and 255 times, and a long name of noise.
fn all_names() -> BTreeSet<Vec<u8>> {
    let mut names = BTreeSet::new();
    for b in (1..=255u8).filter(|b| *b != b'/') {
        names.extend([vec![b], vec![b; 255], vec![b'n', b, b'\n', b]]);
    }
    let every: Vec<u8> = (1..=255u8).filter(|b| *b != b'/').collect();
    names.insert(every);
    names.remove(b".".as_slice());
    names
}

fn make_names(dir: &Path) {
    for name in all_names() {
        let path = dir.join(OsStr::from_bytes(&name));
        match name.len() {
            1 => fs::write(path, &name).unwrap(),
            255 => fs::create_dir(path).unwrap(),
            _ => symlink(OsStr::from_bytes(&name), path).unwrap(),
        }
    }
    let too_long = fs::write(dir.join(OsStr::from_bytes(&[0xff; 256])), b"");
    assert_eq!(too_long.unwrap_err().raw_os_error(), Some(libc::ENAMETOOLONG));
}

fn check_names(dir: &Path) {
    let listed: BTreeSet<Vec<u8>> =
        fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().as_bytes().to_vec()).collect();
    assert_eq!(listed, all_names());
    for name in listed {
        let path = dir.join(OsStr::from_bytes(&name));
        match name.len() {
            1 => assert_eq!(fs::read(path).unwrap(), name),
            255 | 254 if path.is_dir() => {}
            _ => assert_eq!(fs::read_link(path).unwrap().as_os_str().as_bytes(), name),
        }
    }
}

/// The directory that many levels below `dir`.
fn descend(dir: &Path, levels: usize) -> OwnedFd {
    let flags = OFlags::DIRECTORY | OFlags::RDONLY | OFlags::CLOEXEC;
    let mut fd = rustix::fs::openat(CWD, dir, flags, Mode::empty()).unwrap();
    for level in 0..levels {
        fd = rustix::fs::openat(&fd, level_name(level), flags, Mode::empty()).unwrap();
    }
    fd
}

fn level_name(level: usize) -> String {
    format!("{level:0>255}")
}

fn make_deep(dir: &Path) {
    let mut fd = descend(dir, 0);
    for level in 0..DEEP {
        // Beyond PATH_MAX after the first sixteen: only relative names go there.
        rustix::fs::mkdirat(&fd, level_name(level), Mode::RWXU).unwrap();
        let flags = OFlags::DIRECTORY | OFlags::RDONLY | OFlags::CLOEXEC;
        fd = rustix::fs::openat(&fd, level_name(level), flags, Mode::empty()).unwrap();
    }
    let flags = OFlags::CREATE | OFlags::WRONLY | OFlags::CLOEXEC;
    let bottom = File::from(rustix::fs::openat(&fd, "bottom", flags, Mode::RUSR).unwrap());
    bottom.write_all_at(&Content::new(7).take(100_000), 0).unwrap();
    drop(bottom);
    // The top goes elsewhere and back, and cannot go below itself.
    let renamed = dir.with_file_name("elsewhere");
    fs::rename(dir, &renamed).unwrap();
    let top = descend(&renamed, 0);
    let below = rustix::fs::renameat_with(&top, level_name(0), &fd, "x", RenameFlags::empty());
    assert_eq!(below, Err(rustix::io::Errno::INVAL));
    fs::rename(&renamed, dir).unwrap();
    // Out of the depth and back into it.
    rustix::fs::renameat(&fd, "bottom", &top, "bottom").unwrap();
    rustix::fs::renameat(&top, "bottom", &fd, "bottom").unwrap();
}

fn check_deep(dir: &Path) {
    let fd = descend(dir, DEEP);
    let bottom = rustix::fs::openat(&fd, "bottom", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).unwrap();
    let mut bytes = vec![0; 100_000];
    File::from(bottom).read_exact_at(&mut bytes, 0).unwrap();
    assert!(bytes == Content::new(7).take(100_000));
    let up = rustix::fs::statat(&fd, "..", AtFlags::empty()).unwrap();
    assert_eq!(up.st_ino, rustix::fs::fstat(descend(dir, DEEP - 1)).unwrap().st_ino);
}

/// Where the sparse file has data.
const ISLANDS: [u64; 4] = [0, 3 * MIB + 17, TIB / 2 - 5, TIB - 10];

fn make_sparse(dir: &Path) {
    let file = File::create(dir.join("file")).unwrap();
    file.set_len(TIB).unwrap();
    for at in ISLANDS {
        file.write_all_at(b"an island.", at).unwrap();
    }
    // Up to the last byte that a file may have, and no further.
    let edge = File::create(dir.join("edge")).unwrap();
    let last = i64::MAX as u64 - 4096;
    edge.write_all_at(b"x", last).unwrap();
    assert_eq!(edge.metadata().unwrap().len(), last + 1);
    edge.set_len(1).unwrap();
}

fn check_sparse(dir: &Path) {
    let file = File::open(dir.join("file")).unwrap();
    let meta = file.metadata().unwrap();
    assert_eq!(meta.len(), TIB);
    assert!(meta.blocks() * 512 < 16 * MIB, "{} blocks are not sparse", meta.blocks());
    for at in ISLANDS {
        let mut bytes = [1; 30];
        let from = at.saturating_sub(10);
        let n = file.read_at(&mut bytes, from).unwrap();
        let mut expected = vec![0; n];
        expected[(at - from) as usize..][..10].copy_from_slice(b"an island.");
        assert_eq!(bytes[..n], expected, "at {at}");
    }
    let mut zeros = vec![1; 1 << 20];
    file.read_exact_at(&mut zeros, TIB / 4).unwrap();
    assert!(zeros.iter().all(|b| *b == 0));
    let (mut at, mut islands) = (0, 0);
    while let Ok(data) = rustix::fs::seek(&file, SeekFrom::Data(at)) {
        let hole = rustix::fs::seek(&file, SeekFrom::Hole(data)).unwrap();
        assert!(hole - data <= 4 * MIB && hole > data, "data from {data} to {hole}");
        (at, islands) = (hole, islands + 1);
    }
    assert!((3..=4).contains(&islands), "{islands} islands");
    assert_eq!(fs::metadata(dir.join("edge")).unwrap().len(), 1);
    // What asks for holes is done soon.
    let copy = dir.join("copy");
    run(Command::new("cp").arg("--sparse=always").arg(dir.join("file")).arg(&copy), LONG).ok();
    assert!(fs::metadata(&copy).unwrap().blocks() * 512 < 16 * MIB);
    let mut end = [0; 10];
    File::open(&copy).unwrap().read_exact_at(&mut end, TIB - 10).unwrap();
    assert_eq!(&end, b"an island.");
    fs::remove_file(&copy).unwrap();
}

fn make_attributes(dir: &Path) {
    let big = dir.join("big");
    fs::write(&big, b"").unwrap();
    xattr::set(&big, "user.big", &vec![7; 64 << 10]).unwrap();
    let more = xattr::set(&big, "user.more", &vec![7; (64 << 10) + 1]);
    assert_eq!(more.unwrap_err().raw_os_error(), Some(libc::E2BIG));
    let long = format!("user.{}", "n".repeat(250));
    xattr::set(&big, &long, b"").unwrap();
    let longer = xattr::set(&big, format!("{long}n"), b"");
    assert_eq!(longer.unwrap_err().raw_os_error(), Some(libc::ERANGE));
    let many = dir.join("many");
    fs::write(&many, b"").unwrap();
    for i in 0..1000 {
        xattr::set(&many, format!("user.{i:04}"), format!("value {i}").as_bytes()).unwrap();
    }
    let mut name = b"user.".to_vec();
    name.extend((1..=250u8).rev());
    xattr::set(&many, OsStr::from_bytes(&name), &name).unwrap();
}

fn check_attributes(dir: &Path) {
    let big = dir.join("big");
    assert_eq!(xattr::get(&big, "user.big").unwrap().unwrap(), vec![7; 64 << 10]);
    assert_eq!(xattr::list(&big).unwrap().count(), 2);
    let many = dir.join("many");
    assert_eq!(xattr::list(&many).unwrap().count(), 1001);
    for i in 0..1000 {
        let value = xattr::get(&many, format!("user.{i:04}")).unwrap().unwrap();
        assert_eq!(value, format!("value {i}").as_bytes());
    }
    // A list above 64 KiB cannot be told by Linux: E2BIG, as elsewhere; each is there all the same.
    for i in 0..300 {
        xattr::set(&big, format!("user.{i:0>250}"), b"v").unwrap();
    }
    let listed = xattr::list(&big).map(Iterator::count);
    assert_eq!(listed.unwrap_err().raw_os_error(), Some(libc::E2BIG));
    for i in 0..300 {
        xattr::remove(&big, format!("user.{i:0>250}")).unwrap();
    }
    assert_eq!(xattr::list(&big).unwrap().count(), 2);
}

fn make_links(dir: &Path) {
    fs::write(dir.join("first"), b"one of many").unwrap();
    for i in 0..MANY {
        fs::hard_link(dir.join("first"), dir.join(format!("link {i}"))).unwrap();
    }
}

fn check_links(dir: &Path) {
    let first = fs::metadata(dir.join("first")).unwrap();
    assert_eq!(first.nlink(), MANY as u64 + 1);
    for i in (0..MANY).step_by(97) {
        let path = dir.join(format!("link {i}"));
        assert_eq!(fs::metadata(&path).unwrap().ino(), first.ino());
        assert_eq!(fs::read(&path).unwrap(), b"one of many");
    }
}

/// Many open files, half of them deleted, all usable.
fn open_and_deleted(m: &Mount, n: usize) -> Vec<File> {
    // SAFETY: plain values in and out.
    let may = unsafe {
        let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
        libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit);
        limit.rlim_cur = limit.rlim_max;
        libc::setrlimit(libc::RLIMIT_NOFILE, &limit);
        limit.rlim_cur as usize
    };
    let n = n.min(may.saturating_sub(500));
    let dir = m.path("open");
    fs::create_dir(&dir).unwrap();
    let mut held = Vec::new();
    for i in 0..n {
        let path = dir.join(i.to_string());
        let file = OpenOptions::new().read(true).write(true).create_new(true).open(&path).unwrap();
        file.write_all_at(format!("content {i}").as_bytes(), 0).unwrap();
        fs::remove_file(&path).unwrap();
        held.push(file);
    }
    for (i, file) in held.iter().enumerate() {
        let mut bytes = [0; 32];
        let n = file.read_at(&mut bytes, 0).unwrap();
        assert_eq!(bytes[..n], *format!("content {i}").as_bytes());
        assert_eq!(file.metadata().unwrap().nlink(), 0);
    }
    held
}

#[test]
fn memory_is_given_back() {
    let Some(mut v) = Volume::new("suites: memory") else { return };
    v.folder("a");
    v.folder("b");
    let m = v.mount();
    let resident = |what: &str| -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", m.pid())).unwrap();
        let line = status.lines().find_map(|l| l.strip_prefix(what)).unwrap();
        line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() >> 10
    };
    // Segments of the full size to two replicas at once, while writers bring more.
    std::thread::scope(|s| {
        for t in 0..4u64 {
            let m = &m;
            s.spawn(move || {
                for i in 0..5 {
                    let bytes = Content::new(4 * (t * 10 + i)).take(20 << 20);
                    fs::write(m.path(format!("{t} {i}")), bytes).unwrap();
                }
            });
        }
    });
    m.sync();
    println!("at most {} MiB", resident("VmHWM:"));
    wait_until(LONG, "memory is given back", || resident("VmRSS:") < 100);
    m.unmount();
}

#[test]
fn times_stay_as_the_kernel_showed_them() {
    let Some(mut v) = Volume::new("suites: times") else { return };
    v.folder("a");
    let m = v.mount();
    // Written and kept open, so that content and times are handed over apart, in whatever order, by whoever syncs.
    let files: Vec<File> = (0..12)
        .map(|i| {
            let file = OpenOptions::new()
                .read(true)
                .write(true)
                .create_new(true)
                .open(m.path(format!("{i}")))
                .unwrap();
            file.write_all_at(&vec![7; 4 << 20], 0).unwrap();
            file
        })
        .collect();
    std::thread::sleep(Duration::from_millis(20));
    let times = |m: &Mount| -> Vec<(i64, i64)> {
        let of = |i: usize| fs::metadata(m.path(format!("{i}"))).unwrap();
        (0..files.len()).map(|i| (of(i).mtime(), of(i).mtime_nsec())).collect()
    };
    let before = times(&m);
    m.sync();
    assert_eq!(times(&m), before);
    m.kill9();
    let m = v.mount();
    assert_eq!(times(&m), before, "after a sync and a crash");
    m.unmount();
}

#[test]
fn programs_killed_within_fallocate_fail_no_sync() {
    let Some(mut v) = Volume::new("suites: killed") else { return };
    v.folder("a");
    let m = v.mount();
    for round in 0..4 {
        let mut children = Vec::new();
        for i in 0..6 {
            let path = m.path(format!("{round} {i}"));
            let file = OpenOptions::new().read(true).write(true).create_new(true).open(path).unwrap();
            // SAFETY: the child makes system calls only, until it is killed.
            match unsafe { libc::fork() } {
                0 => loop {
                    // SAFETY: a descriptor of our own, and bytes of this program.
                    unsafe {
                        let fd = std::os::fd::AsRawFd::as_raw_fd(&file);
                        let flags = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
                        libc::pwrite(fd, [1u8; 4096].as_ptr().cast(), 4096, 4096);
                        libc::fallocate(fd, flags, 0, 8192);
                    }
                },
                child => children.push(child),
            }
        }
        std::thread::sleep(Duration::from_millis(100));
        for child in children {
            // SAFETY: children of ours that nobody else waits for.
            unsafe {
                assert!(child > 0);
                libc::kill(child, libc::SIGKILL);
                libc::waitpid(child, std::ptr::null_mut(), 0);
            }
        }
        m.sync();
    }
    m.unmount();
}
