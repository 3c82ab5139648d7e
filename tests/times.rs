//! What `stat` has shown of a file stays: when the kernel forgets the file, after a remount, and in
//! a restored copy.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::Path;
use std::process::Command;

use support::mount::{Mount, Volume};

/// Files for each kind of change: a time that is set by the wrong one differs only when the clock
/// of the kernel, which moves every few milliseconds, has not moved since the file was written.
const FILES: usize = 12;

type Change = fn(&Path, &File);

fn ok(result: i32) {
    assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
}

fn fallocate(file: &File, mode: i32, at: i64, len: i64) {
    // SAFETY: a valid descriptor.
    ok(unsafe { libc::fallocate(file.as_raw_fd(), mode, at, len) });
}

fn copy(path: &Path, file: &File, source: &str, from: i64, len: usize) {
    let source = File::open(path.with_file_name(source)).unwrap();
    let (mut from, mut to) = (from, 0);
    // SAFETY: valid descriptors and offsets.
    let n = unsafe {
        libc::copy_file_range(source.as_raw_fd(), &raw mut from, file.as_raw_fd(), &raw mut to, len, 0)
    };
    assert_eq!(n.cast_unsigned(), len, "{}", std::io::Error::last_os_error());
}

/// 4096 bytes where direct I/O takes them.
#[repr(align(4096))]
struct Page([u8; 4096]);

fn direct(path: &Path, at: u64) {
    let file = OpenOptions::new().write(true).custom_flags(libc::O_DIRECT).open(path).unwrap();
    file.write_all_at(&Page([7; 4096]).0, at).unwrap();
}

fn as_user(work: impl FnOnce() + Send) {
    std::thread::scope(|s| {
        s.spawn(|| {
            // SAFETY: bare calls, which change this thread only.
            unsafe {
                assert_eq!(libc::syscall(libc::SYS_setgroups, 0, std::ptr::null::<u32>()), 0);
                assert_eq!(libc::syscall(libc::SYS_setresgid, 12_345, 12_345, 12_345), 0);
                assert_eq!(libc::syscall(libc::SYS_setresuid, 12_345, 12_345, 12_345), 0);
            }
            work();
        })
        .join()
        .unwrap();
    });
}

/// A change of a file with set-user-id by somebody else: the bit falls with it.
fn bits(path: &Path, change: impl Fn(&File) + Sync) {
    fs::set_permissions(path, PermissionsExt::from_mode(0o6666)).unwrap();
    as_user(|| change(&OpenOptions::new().read(true).write(true).open(path).unwrap()));
}

const KEEP: i32 = libc::FALLOC_FL_KEEP_SIZE;

const CHANGES: &[(&str, Change)] = &[
    ("write", |_, f| f.write_all_at(b"abc", 3).unwrap()),
    ("append", |p, _| OpenOptions::new().append(true).open(p).unwrap().write_all(b"more").unwrap()),
    ("direct write", |p, _| direct(p, 0)),
    ("direct append", |p, _| direct(p, 16384)),
    ("mapping", |_, f| {
        // SAFETY: a new mapping of a file that is long enough.
        unsafe {
            let prot = libc::PROT_READ | libc::PROT_WRITE;
            let at = libc::mmap(std::ptr::null_mut(), 4096, prot, libc::MAP_SHARED, f.as_raw_fd(), 0);
            assert_ne!(at, libc::MAP_FAILED);
            at.cast::<u8>().write_volatile(9);
            libc::munmap(at, 4096);
        }
    }),
    ("allocate", |_, f| fallocate(f, 0, 0, 20_000)),
    ("allocate, keep", |_, f| fallocate(f, KEEP, 0, 20_000)),
    ("punch", |_, f| fallocate(f, KEEP | libc::FALLOC_FL_PUNCH_HOLE, 0, 4096)),
    ("zero", |_, f| fallocate(f, libc::FALLOC_FL_ZERO_RANGE, 0, 20_000)),
    ("zero, keep", |_, f| fallocate(f, KEEP | libc::FALLOC_FL_ZERO_RANGE, 0, 20_000)),
    ("copy bytes", |p, f| copy(p, f, "source", 1, 5000)),
    ("copy blocks", |p, f| copy(p, f, "source", 0, 1 << 20)),
    ("ftruncate", |_, f| f.set_len(100).unwrap()),
    ("ftruncate up", |_, f| f.set_len(100_000).unwrap()),
    ("ftruncate same", |_, f| f.set_len(8192).unwrap()),
    ("truncate", |p, _| {
        let c = std::ffi::CString::new(p.to_str().unwrap()).unwrap();
        // SAFETY: a NUL-terminated string.
        ok(unsafe { libc::truncate(c.as_ptr(), 5) });
    }),
    ("open, truncate", |p, _| drop(File::create(p).unwrap())),
    ("open, truncate, write", |p, _| fs::write(p, b"new").unwrap()),
    ("chmod", |p, _| fs::set_permissions(p, PermissionsExt::from_mode(0o600)).unwrap()),
    ("chown", |p, _| std::os::unix::fs::chown(p, Some(7), Some(8)).unwrap()),
    ("utimens", |_, f| {
        let past = std::time::UNIX_EPOCH + std::time::Duration::new(1_000_000, 123_456_789);
        f.set_times(fs::FileTimes::new().set_modified(past)).unwrap();
    }),
    ("utimens, write", |_, f| {
        f.set_times(fs::FileTimes::new().set_modified(std::time::UNIX_EPOCH)).unwrap();
        f.write_all_at(b"x", 0).unwrap();
    }),
    ("setxattr", |p, _| xattr::set(p, "user.a", b"1").unwrap()),
    ("removexattr", |p, _| {
        xattr::set(p, "user.a", b"1").unwrap();
        xattr::remove(p, "user.a").unwrap();
    }),
    ("setfacl", |p, _| {
        assert!(Command::new("setfacl").args(["-m", "u:77:r"]).arg(p).status().unwrap().success());
    }),
    ("link", |p, _| fs::hard_link(p, p.with_extension("other")).unwrap()),
    ("unlink", |p, _| {
        fs::hard_link(p, p.with_extension("other")).unwrap();
        fs::remove_file(p.with_extension("other")).unwrap();
    }),
    ("rename", |p, _| {
        fs::rename(p, p.with_extension("other")).unwrap();
        fs::rename(p.with_extension("other"), p).unwrap();
    }),
    ("bits fall, write", |p, _| bits(p, |f| f.write_all_at(b"x", 1).unwrap())),
    ("bits fall, direct write", |p, _| bits(p, |_| direct(p, 4096))),
    ("bits fall, punch", |p, _| bits(p, |f| fallocate(f, KEEP | libc::FALLOC_FL_PUNCH_HOLE, 0, 4096))),
    ("bits fall, copy", |p, _| bits(p, |f| copy(p, f, "source", 1, 5000))),
    ("bits fall, ftruncate", |p, _| bits(p, |f| f.set_len(1).unwrap())),
    ("bits fall, open and truncate", |p, _| bits(p, |_| drop(File::create(p).unwrap()))),
    ("nothing", |_, _| {}),
];

/// What `stat` shows of all files, access times left out: reading is no change.
fn shown(root: &Path, with_ctime: bool) -> BTreeMap<String, String> {
    let mut all = BTreeMap::new();
    for entry in walkdir::WalkDir::new(root) {
        let entry = entry.unwrap();
        let m = entry.path().symlink_metadata().unwrap();
        let name = entry.path().strip_prefix(root).unwrap().to_str().unwrap().to_owned();
        let mut line = format!(
            "mtime {}.{:09} size {} mode {:o} owner {}:{}",
            m.mtime(),
            m.mtime_nsec(),
            m.len(),
            m.mode(),
            m.uid(),
            m.gid()
        );
        if m.is_dir() {
            line = format!("mtime {}.{:09}", m.mtime(), m.mtime_nsec());
        }
        if with_ctime {
            line += &format!(" ctime {}.{:09} links {}", m.ctime(), m.ctime_nsec(), m.nlink());
        }
        all.insert(name, line);
    }
    all
}

#[track_caller]
fn assert_same(before: &BTreeMap<String, String>, now: &BTreeMap<String, String>, when: &str) {
    let differs: Vec<String> = before
        .iter()
        .filter(|(name, line)| now.get(*name) != Some(line))
        .map(|(name, line)| format!("{name}: was {line}, is {:?}", now.get(name)))
        .collect();
    assert!(
        differs.is_empty(),
        "{}: {} of {} moved:\n{}",
        when,
        differs.len(),
        before.len(),
        differs.join("\n")
    );
}

fn forget(m: &Mount) {
    let dir = File::open(m.root()).unwrap();
    // SAFETY: a valid descriptor.
    ok(unsafe { libc::syncfs(dir.as_raw_fd()) });
    drop(dir);
    // Names first, then the inodes that they held.
    for _ in 0..2 {
        fs::write("/proc/sys/vm/drop_caches", "3").unwrap();
    }
}

fn change_all(root: &Path) {
    fs::write(root.join("source"), vec![5; 2 << 20]).unwrap();
    File::open(root.join("source")).unwrap().sync_all().unwrap();
    for (kind, change) in CHANGES {
        for i in 0..FILES {
            let path = root.join(format!("{kind} {i}"));
            let file = File::options().read(true).write(true).create_new(true).open(&path).unwrap();
            file.write_all_at(&[b'x'; 8192], 0).unwrap();
            // The kernel hands over the time of the write.
            file.sync_all().unwrap();
            change(&path, &file);
        }
    }
}

#[test]
fn what_stat_has_shown_stays() {
    let Some(mut v) = Volume::new("times") else { return };
    // SAFETY: no preconditions.
    if unsafe { libc::geteuid() } != 0 {
        return println!("SKIP: dropping caches and becoming other users needs root");
    }
    v.folder("a");
    fs::set_permissions(v.path(""), PermissionsExt::from_mode(0o755)).unwrap();
    let m = v.mount_as(&support::mount::How::usual().arg("-o").arg("allow_other,suid,acl"));
    let dir = m.path("dir");
    fs::create_dir(&dir).unwrap();
    fs::set_permissions(&dir, PermissionsExt::from_mode(0o777)).unwrap();
    change_all(&dir);

    let before = shown(&dir, true);
    forget(&m);
    assert_same(&before, &shown(&dir, true), "after the kernel forgot the files");
    m.unmount();
    let m = v.mount();
    assert_same(&before, &shown(&m.path("dir"), true), "after a remount");
    m.unmount();

    let restored = v.restore("a", "restored").join("dir");
    let without = |all: &BTreeMap<String, String>| -> BTreeMap<String, String> {
        // A restore cannot set change times, and gives a list's mode by the list.
        all.iter().map(|(k, v)| (k.clone(), v.split(" ctime").next().unwrap().to_owned())).collect()
    };
    assert_same(&without(&before), &shown(&restored, false), "in a restored copy");
}
