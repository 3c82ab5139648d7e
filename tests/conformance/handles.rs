//! Handles that outlive names and caches, remounting, read-only mounts.

use std::ffi::CString;
use std::fs;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::Path;

use crate::Run;
use crate::sys::*;

pub const CASES: &[(&str, Run)] = &[
    ("open_by_handle", open_by_handle),
    ("handles_are_not_reused", handles_are_not_reused),
    ("remount_read_only", remount_read_only),
    ("remount_options", remount_options),
    ("notifications", notifications),
];

#[repr(C, align(8))]
#[derive(Clone, PartialEq, Debug)]
struct Handle {
    bytes: u32,
    kind: i32,
    data: [u8; 128],
}

fn handle_of(p: &Path) -> R<Handle> {
    let mut h = Handle { bytes: 128, kind: 0, data: [0; 128] };
    let mut mount = 0;
    let p = c(p);
    unit(unsafe {
        libc::syscall(libc::SYS_name_to_handle_at, libc::AT_FDCWD, p.as_ptr(), &raw mut h, &raw mut mount, 0)
    })?;
    Ok(h)
}

fn open_handle(root: &Path, h: &Handle, flags: i32) -> R<OwnedFd> {
    let dir = open(root, libc::O_RDONLY | libc::O_DIRECTORY).unwrap();
    let n = ok(unsafe {
        libc::syscall(libc::SYS_open_by_handle_at, dir.as_raw_fd(), h, flags | libc::O_CLOEXEC)
    })?;
    Ok(unsafe { OwnedFd::from_raw_fd(n as i32) })
}

fn open_by_handle(t: &mut Case) {
    fs::write(t.p("f"), b"content").unwrap();
    mkdir(t.p("d"), 0o755).unwrap();
    fs::write(t.p("d/deep"), b"deep").unwrap();
    symlink("f", t.p("l")).unwrap();
    let (f, d, deep) =
        (handle_of(&t.p("f")).unwrap(), handle_of(&t.p("d")).unwrap(), handle_of(&t.p("d/deep")).unwrap());
    let read = |h: &Handle| open_handle(&t.root, h, libc::O_RDONLY).and_then(|f| pread(&f, 99, 0));
    let mut notes = vec![("cached", read(&f)), ("deep", read(&deep))];
    drop_caches(&t.root);
    notes.push(("dropped", read(&f)));
    notes.push(("deep dropped", read(&deep)));
    rename(t.p("f"), t.p("d/g"), 0).unwrap();
    drop_caches(&t.root);
    notes.push(("renamed", read(&f)));
    let same = handle_of(&t.p("d/g")).unwrap() == f;
    // Written through the handle.
    let w = open_handle(&t.root, &f, libc::O_RDWR).and_then(|f| pwrite(&f, b"C", 0));
    let dir = open_handle(&t.root, &d, libc::O_RDONLY | libc::O_DIRECTORY);
    let up = dir.as_ref().ok().map(|d| {
        let names = fs::read_dir(format!("/proc/self/fd/{}", d.as_raw_fd())).unwrap().count();
        let up = fs::metadata(format!("/proc/self/fd/{}/..", d.as_raw_fd())).unwrap();
        (names, std::os::unix::fs::MetadataExt::ino(&up) == stat(&t.dir).unwrap().st_ino)
    });
    drop_caches(&t.root);
    let link = handle_of(&t.p("l")).and_then(|h| open_handle(&t.root, &h, libc::O_RDONLY)).map(drop);
    let path = handle_of(&t.p("l")).and_then(|h| open_handle(&t.root, &h, libc::O_PATH)).map(drop);
    // Open while the name goes: the handle works until the last close.
    let open_one = open(t.p("d/g"), libc::O_RDONLY).unwrap();
    unlink(t.p("d/g")).unwrap();
    notes.push(("unlinked but open", read(&f)));
    drop(open_one);
    std::thread::sleep(std::time::Duration::from_millis(50));
    drop_caches(&t.root);
    std::thread::sleep(std::time::Duration::from_millis(50));
    notes.push(("unlinked", read(&f)));
    unlink(t.p("d/deep")).unwrap();
    rmdir(t.p("d")).unwrap();
    drop(dir);
    drop_caches(&t.root);
    std::thread::sleep(std::time::Duration::from_millis(50));
    let gone_dir = open_handle(&t.root, &d, libc::O_RDONLY).map(drop);
    let mut bad = f.clone();
    bad.data[..f.bytes as usize].fill(0xff);
    let bad = open_handle(&t.root, &bad, libc::O_RDONLY).map(drop);
    let root = handle_of(&t.root).and_then(|h| open_handle(&t.root, &h, libc::O_RDONLY)).map(drop);
    let dir = t.root.clone();
    let user = as_nobody(|| open_handle(&dir, &f, libc::O_RDONLY).map(drop));
    for (key, what) in notes {
        t.note(key, what);
    }
    t.note("same after rename", same);
    t.note("written", w);
    t.note("directory", up);
    t.note("symlink", link);
    t.note("symlink as path", path);
    t.note("removed directory", gone_dir);
    t.note("nonsense", bad);
    t.note("root", root);
    t.note("by a user", user);
    let mut small = Handle { bytes: 0, kind: 0, data: [0; 128] };
    let (p, mut mount) = (c(&t.dir), 0);
    let done = unit(unsafe {
        libc::syscall(
            libc::SYS_name_to_handle_at,
            libc::AT_FDCWD,
            p.as_ptr(),
            &raw mut small,
            &raw mut mount,
            0,
        )
    });
    t.note("size is told", (done, small.bytes > 0));
}

fn handles_are_not_reused(t: &mut Case) {
    let mut all = Vec::new();
    for _ in 0..50 {
        drop(new_file(t.p("f")));
        all.push(handle_of(&t.p("f")).unwrap());
        unlink(t.p("f")).unwrap();
    }
    drop_caches(&t.root);
    std::thread::sleep(std::time::Duration::from_millis(50));
    drop(new_file(t.p("g")));
    let now = handle_of(&t.p("g")).unwrap();
    let differ = all.iter().enumerate().all(|(i, a)| *a != now && all[..i].iter().all(|b| a != b));
    t.note("all differ", differ);
    let stale: std::collections::BTreeSet<_> =
        all.iter().map(|h| open_handle(&t.root, h, libc::O_RDONLY).map(drop)).collect();
    t.note("none opens", stale);
}

fn remount(t: &Case, flags: libc::c_ulong, data: &str) -> R<()> {
    let (at, data) = (c(&t.root), CString::new(data).unwrap());
    unit(unsafe {
        libc::mount(
            std::ptr::null(),
            at.as_ptr(),
            std::ptr::null(),
            libc::MS_REMOUNT | flags,
            data.as_ptr().cast(),
        )
    })
}

fn remount_read_only(t: &mut Case) {
    if !t.may_remount {
        return;
    }
    fs::write(t.p("f"), b"before").unwrap();
    mkdir(t.p("d"), 0o755).unwrap();
    {
        let _open = open(t.p("f"), libc::O_RDWR).unwrap();
        t.note("open for writing", remount(t, libc::MS_RDONLY, ""));
    }
    let reading = open(t.p("f"), libc::O_RDONLY).unwrap();
    t.note("read only", remount(t, libc::MS_RDONLY, ""));
    t.note("create", open(t.p("x"), libc::O_CREAT | libc::O_WRONLY).map(drop));
    t.note("create what is there", open(t.p("f"), libc::O_CREAT | libc::O_RDONLY).map(drop));
    t.note(
        "exclusive what is there",
        open(t.p("f"), libc::O_CREAT | libc::O_EXCL | libc::O_WRONLY).map(drop),
    );
    t.note("open for writing then", open(t.p("f"), libc::O_WRONLY).map(drop));
    t.note("open trunc", open(t.p("f"), libc::O_RDONLY | libc::O_TRUNC).map(drop));
    t.note("mkdir", mkdir(t.p("y"), 0o755));
    t.note("mkdir what is there", mkdir(t.p("d"), 0o755));
    t.note("unlink", unlink(t.p("f")));
    t.note("unlink missing", unlink(t.p("none")));
    t.note("rmdir", rmdir(t.p("d")));
    t.note("rename", rename(t.p("f"), t.p("z"), 0));
    t.note("link", link(t.p("f"), t.p("z")));
    t.note("symlink", symlink("x", t.p("z")));
    t.note("mknod", mknod(t.p("z"), libc::S_IFIFO | 0o600, 0));
    t.note("chmod", chmod(t.p("f"), 0o600));
    t.note("chown", lchown(t.p("f"), 1, 1));
    t.note("utimens", utimens(t.p("f"), (1, 0), (1, 0)));
    t.note("truncate", truncate(t.p("f"), 0));
    t.note("setxattr", setxattr(t.p("f"), "user.a", b"1", 0));
    t.note("removexattr", removexattr(t.p("f"), "user.a"));
    t.note("fsync", fsync(&reading));
    t.note("read", pread(&reading, 99, 0));
    t.note("access", unsafe { unit(libc::access(c(t.p("f")).as_ptr(), libc::W_OK)) });
    t.note("flag in statvfs", read_only_flag(&t.dir));
    t.note("back", remount(t, 0, ""));
    t.note("write again", io(fs::write(t.p("f"), b"after")));
    t.note("content", io(fs::read(t.p("f"))));
}

fn read_only_flag(p: &Path) -> bool {
    let mut st = std::mem::MaybeUninit::<libc::statvfs>::zeroed();
    assert_eq!(unsafe { libc::statvfs(c(p).as_ptr(), st.as_mut_ptr()) }, 0);
    unsafe { st.assume_init() }.f_flag & libc::ST_RDONLY != 0
}

fn remount_options(t: &mut Case) {
    if !t.may_remount {
        return;
    }
    fs::copy("/bin/true", t.p("true")).unwrap();
    mknod(t.p("null"), libc::S_IFCHR | 0o666, libc::makedev(1, 3)).unwrap();
    let run = || io(std::process::Command::new(t.p("true")).status()).map(|s| s.success());
    let mut notes = vec![("run", format!("{:?}", run()))];
    notes.push(("noexec", format!("{:?}", (remount(t, libc::MS_NOEXEC, ""), run()))));
    notes.push(("exec", format!("{:?}", (remount(t, 0, ""), run()))));
    notes.push((
        "nodev",
        format!("{:?}", (remount(t, libc::MS_NODEV, ""), open(t.p("null"), libc::O_WRONLY).map(drop))),
    ));
    notes.push(("dev", format!("{:?}", (remount(t, 0, ""), open(t.p("null"), libc::O_WRONLY).map(drop)))));
    notes.push((
        "sync",
        format!("{:?}", (remount(t, libc::MS_SYNCHRONOUS, ""), io(fs::write(t.p("f"), b"x")))),
    ));
    notes.push(("async", format!("{:?}", remount(t, 0, ""))));
    notes.push((
        "dirsync",
        format!("{:?}", (remount(t, libc::MS_DIRSYNC, ""), mkdir(t.p("d"), 0o755), remount(t, 0, ""))),
    ));
    notes.push(("unknown option", format!("{:?}", remount(t, 0, "nonsense_option=1").is_err())));
    for (k, v) in notes {
        t.note(k, v);
    }
}

fn notifications(t: &mut Case) {
    let n = unsafe { OwnedFd::from_raw_fd(libc::inotify_init1(libc::IN_NONBLOCK | libc::IN_CLOEXEC)) };
    let w = unsafe { libc::inotify_add_watch(n.as_raw_fd(), c(&t.dir).as_ptr(), libc::IN_ALL_EVENTS) };
    assert!(w >= 0);
    fs::write(t.p("f"), b"x").unwrap();
    rename(t.p("f"), t.p("g"), 0).unwrap();
    chmod(t.p("g"), 0o600).unwrap();
    fs::read(t.p("g")).unwrap();
    unlink(t.p("g")).unwrap();
    mkdir(t.p("d"), 0o755).unwrap();
    let mut room = vec![0_u8; 65536];
    let len = unsafe { libc::read(n.as_raw_fd(), room.as_mut_ptr().cast(), room.len()) };
    let mut events = Vec::new();
    let mut at = 0;
    while at < len.max(0) as usize {
        let word = |i: usize| u32::from_ne_bytes(room[at + i..at + i + 4].try_into().unwrap());
        events.push(format!("{:x}", word(4)));
        at += 16 + word(12) as usize;
    }
    t.note("events", events);
}
