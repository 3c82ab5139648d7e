//! The FUSE adapter through real mounts, with a filesystem in memory behind it.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Read, Seek, Write};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt, symlink};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use mirrorfs::fuse::{MountError, MountOptions, Session, mount};
use mirrorfs::vfs::api::FileSystem;
use support::memfs::MemFs;

struct Live {
    dir: tempfile::TempDir,
    fs: Arc<MemFs>,
    session: Session,
}

impl Live {
    fn new() -> Option<Self> {
        Self::with(&MountOptions { allow_other: is_root(), ..MountOptions::default() })
    }

    fn with(options: &MountOptions) -> Option<Self> {
        let _ = env_logger::builder().is_test(true).try_init();
        if std::env::var_os("MIRRORFS_SKIP_FUSE").is_some_and(|v| v == "1") {
            println!("SKIP: MIRRORFS_SKIP_FUSE=1");
            return None;
        }
        let dir = tempfile::Builder::new().prefix("mf").tempdir().unwrap();
        let at = dir.path().join("m");
        fs::create_dir(&at).unwrap();
        fs::set_permissions(dir.path(), PermissionsExt::from_mode(0o755)).unwrap();
        let fs = Arc::new(MemFs::new());
        let session = mount(fs.clone(), &at, options).unwrap();
        Some(Self { dir, fs, session })
    }

    fn path(&self, name: impl AsRef<Path>) -> PathBuf {
        self.session.mountpoint().join(name)
    }
}

fn is_root() -> bool {
    unsafe { libc::geteuid() == 0 }
}

fn check(n: i32) -> io::Result<i32> {
    if n < 0 { Err(io::Error::last_os_error()) } else { Ok(n) }
}

fn code<T: std::fmt::Debug>(r: io::Result<T>) -> i32 {
    r.unwrap_err().raw_os_error().unwrap()
}

fn cstring(p: &Path) -> std::ffi::CString {
    std::ffi::CString::new(p.as_os_str().as_bytes()).unwrap()
}

fn rename2(a: &Path, b: &Path, flags: u32) -> io::Result<i32> {
    let (a, b) = (cstring(a), cstring(b));
    check(unsafe { libc::renameat2(libc::AT_FDCWD, a.as_ptr(), libc::AT_FDCWD, b.as_ptr(), flags) })
}

fn set_times(p: &Path, secs: i64, nanos: i64) {
    let t = libc::timespec { tv_sec: secs, tv_nsec: nanos };
    check(unsafe { libc::utimensat(libc::AT_FDCWD, cstring(p).as_ptr(), [t, t].as_ptr(), 0) }).unwrap();
}

fn as_nobody(script: &str) -> std::process::ExitStatus {
    Command::new("sh").arg("-c").arg(script).uid(65534).gid(65534).status().unwrap()
}

#[test]
fn names_and_attributes() {
    let Some(m) = Live::new() else { return };
    let (a, b, d) = (m.path("a"), m.path("b"), m.path("d"));
    fs::write(&a, b"hello").unwrap();
    fs::create_dir(&d).unwrap();
    assert_eq!(fs::read(&a).unwrap(), b"hello");
    assert_eq!(fs::metadata(m.path("")).unwrap().nlink(), 3);
    fs::hard_link(&a, &b).unwrap();
    assert_eq!((fs::metadata(&a).unwrap().nlink(), fs::metadata(&b).unwrap().nlink()), (2, 2));
    fs::remove_file(&a).unwrap();
    assert_eq!(fs::metadata(&b).unwrap().nlink(), 1);
    assert_eq!(code(fs::metadata(&a)), libc::ENOENT);
    fs::rename(&b, d.join("c")).unwrap();
    assert_eq!(fs::read(d.join("c")).unwrap(), b"hello");
    assert_eq!(code(fs::remove_dir(&d)), libc::ENOTEMPTY);
    symlink("d/c", m.path("s")).unwrap();
    assert_eq!(fs::read_link(m.path("s")).unwrap(), Path::new("d/c"));
    assert_eq!(fs::read(m.path("s")).unwrap(), b"hello");
    fs::set_permissions(d.join("c"), PermissionsExt::from_mode(0o4710)).unwrap();
    assert_eq!(fs::metadata(d.join("c")).unwrap().mode(), 0o104710);
    fs::remove_file(d.join("c")).unwrap();
    fs::remove_dir(&d).unwrap();
    assert_eq!(fs::metadata(m.path("")).unwrap().nlink(), 2);
    let odd = OsStr::from_bytes(b"\xff\xfe \n\\");
    fs::write(m.path(odd), b"x").unwrap();
    let listed: BTreeSet<_> = fs::read_dir(m.path("")).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(listed, BTreeSet::from([odd.to_owned(), "s".into()]));
    assert_eq!(code(fs::write(m.path("n".repeat(256)), b"")), libc::ENAMETOOLONG);
    fs::write(m.path("n".repeat(255)), b"").unwrap();
}

#[test]
fn special_files() {
    let Some(m) = Live::new() else { return };
    let mknod = |name: &str, mode, dev| {
        let p = cstring(&m.path(name));
        check(unsafe { libc::mknod(p.as_ptr(), mode, dev) })
    };
    mknod("fifo", libc::S_IFIFO | 0o600, 0).unwrap();
    let meta = fs::metadata(m.path("fifo")).unwrap();
    assert_eq!(meta.mode(), libc::S_IFIFO | 0o600);
    std::os::unix::net::UnixListener::bind(m.path("socket")).unwrap();
    assert_eq!(fs::metadata(m.path("socket")).unwrap().mode() & libc::S_IFMT, libc::S_IFSOCK);
    if is_root() {
        mknod("char", libc::S_IFCHR | 0o640, libc::makedev(5, 300)).unwrap();
        assert_eq!(fs::metadata(m.path("char")).unwrap().rdev(), libc::makedev(5, 300));
    } else {
        println!("SKIP: device nodes need root");
    }
}

#[test]
fn renames_with_flags() {
    let Some(m) = Live::new() else { return };
    let (a, b, gone) = (m.path("a"), m.path("b"), m.path("gone"));
    fs::write(&a, b"a").unwrap();
    fs::write(&b, b"b").unwrap();
    assert_eq!(code(rename2(&a, &b, libc::RENAME_NOREPLACE)), libc::EEXIST);
    rename2(&a, &b, libc::RENAME_EXCHANGE).unwrap();
    assert_eq!((fs::read(&a).unwrap(), fs::read(&b).unwrap()), (b"b".to_vec(), b"a".to_vec()));
    assert_eq!(code(rename2(&a, &gone, libc::RENAME_EXCHANGE)), libc::ENOENT);
    rename2(&a, &gone, libc::RENAME_NOREPLACE).unwrap();
    assert_eq!(code(rename2(&b, &gone, libc::RENAME_WHITEOUT)), libc::EINVAL);
    assert_eq!(fs::read(&gone).unwrap(), b"b");
}

#[test]
fn content() {
    let Some(m) = Live::new() else { return };
    let p = m.path("f");
    let big: Vec<u8> = (0..5_000_003_u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    fs::write(&p, &big).unwrap();
    assert_eq!(fs::read(&p).unwrap(), big);
    let f = OpenOptions::new().read(true).write(true).open(&p).unwrap();
    f.write_all_at(b"xyz", 1_000_000).unwrap();
    f.set_len(1_000_002).unwrap();
    f.sync_all().unwrap();
    let mut end = [0; 3];
    f.read_exact_at(&mut end[..2], 1_000_000).unwrap();
    assert_eq!(&end, b"xy\0");
    let mut append = OpenOptions::new().append(true).open(&p).unwrap();
    append.write_all(b"end").unwrap();
    assert_eq!(fs::metadata(&p).unwrap().len(), 1_000_005);
    drop(OpenOptions::new().write(true).truncate(true).open(&p).unwrap());
    assert_eq!(fs::metadata(&p).unwrap().len(), 0);
    f.set_len(i64::MAX as u64).unwrap();
    assert_eq!(fs::metadata(&p).unwrap().len(), i64::MAX as u64);
    f.write_all_at(b"far", (1 << 62) + 1).unwrap();
    f.read_exact_at(&mut end, (1 << 62) + 1).unwrap();
    assert_eq!(&end, b"far");
    File::open(m.path("")).unwrap().sync_all().unwrap();
}

#[test]
fn unlinked_files_live_while_open() {
    let Some(m) = Live::new() else { return };
    let p = m.path("f");
    let mut f = OpenOptions::new().read(true).write(true).create_new(true).open(&p).unwrap();
    fs::remove_file(&p).unwrap();
    f.write_all(b"still here").unwrap();
    f.sync_all().unwrap();
    f.rewind().unwrap();
    let mut s = String::new();
    f.read_to_string(&mut s).unwrap();
    assert_eq!((s.as_str(), f.metadata().unwrap().nlink()), ("still here", 0));
}

#[test]
fn mmap_and_direct_io() {
    let Some(m) = Live::new() else { return };
    let p = m.path("f");
    fs::write(&p, vec![7; 16384]).unwrap();
    let f = OpenOptions::new().read(true).write(true).open(&p).unwrap();
    unsafe {
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        let at = libc::mmap(std::ptr::null_mut(), 16384, prot, libc::MAP_SHARED, f.as_raw_fd(), 0);
        assert_ne!(at, libc::MAP_FAILED);
        at.cast::<u8>().add(5000).write(9);
        check(libc::msync(at, 16384, libc::MS_SYNC)).unwrap();
        check(libc::munmap(at, 16384)).unwrap();
    }
    let direct = OpenOptions::new().read(true).write(true).custom_flags(libc::O_DIRECT).open(&p).unwrap();
    let mut room = vec![0_u8; 12288];
    let skip = room.as_ptr().align_offset(4096);
    let page = &mut room[skip..skip + 4096];
    direct.read_exact_at(page, 4096).unwrap();
    assert_eq!((page[903], page[904], page[905]), (7, 9, 7));
    page.fill(3);
    direct.write_all_at(page, 8192).unwrap();
    assert_eq!(fs::read(&p).unwrap()[8191..8194], [7, 3, 3]);
}

#[test]
fn holes() {
    let Some(m) = Live::new() else { return };
    let f = OpenOptions::new().read(true).write(true).create_new(true).open(m.path("f")).unwrap();
    let seek = |at: i64, whence| unsafe { libc::lseek(f.as_raw_fd(), at, whence) };
    let falloc = |mode, at, len| check(unsafe { libc::fallocate(f.as_raw_fd(), mode, at, len) });
    // The kernel has not written this yet when it is asked for data: see the adapter.
    f.write_all_at(&[1; 8192], 1 << 20).unwrap();
    assert_eq!(seek(0, libc::SEEK_DATA), 1 << 20);
    assert_eq!(seek(1 << 20, libc::SEEK_HOLE), (1 << 20) + 8192);
    assert_eq!(seek(0, libc::SEEK_HOLE), 0);
    f.write_all_at(&[2; 4096], 0).unwrap();
    falloc(libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE, 1 << 20, 4096).unwrap();
    assert_eq!(seek(4096, libc::SEEK_DATA), (1 << 20) + 4096);
    let mut two = [9; 4097];
    f.read_exact_at(&mut two, 1 << 20).unwrap();
    assert_eq!((two[0], two[4095], two[4096]), (0, 0, 1));
    falloc(0, 0, 2 << 20).unwrap();
    assert_eq!(f.metadata().unwrap().len(), 2 << 20);
    falloc(libc::FALLOC_FL_KEEP_SIZE, 0, 4 << 20).unwrap();
    assert_eq!(f.metadata().unwrap().len(), 2 << 20);
    falloc(libc::FALLOC_FL_ZERO_RANGE, 0, 3 << 20).unwrap();
    assert_eq!(f.metadata().unwrap().len(), 3 << 20);
    assert_eq!(seek(0, libc::SEEK_DATA), -1);
    assert_eq!(io::Error::last_os_error().raw_os_error(), Some(libc::ENXIO));
    assert_eq!(code(falloc(libc::FALLOC_FL_COLLAPSE_RANGE, 0, 4096)), libc::EOPNOTSUPP);
}

#[test]
fn copies_between_files() {
    let Some(m) = Live::new() else { return };
    let (a, b) = (m.path("a"), m.path("b"));
    let data: Vec<u8> = (0..300_000_u32).map(|i| (i % 251) as u8).collect();
    fs::write(&a, &data).unwrap();
    let from = File::open(&a).unwrap();
    let to = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&b).unwrap();
    to.write_all_at(&[255; 1000], 0).unwrap();
    let (mut i, mut o) = (100_i64, 500_i64);
    let (from, to) = (from.as_raw_fd(), to.as_raw_fd());
    let n = unsafe { libc::copy_file_range(from, &raw mut i, to, &raw mut o, 250_000, 0) };
    assert_eq!(n, 250_000);
    let got = fs::read(&b).unwrap();
    assert_eq!(got[..500], [255; 500]);
    assert_eq!(got[500..], data[100..250_100]);
}

#[test]
fn xattrs() {
    let Some(m) = Live::new() else { return };
    let p = m.path("f");
    fs::write(&p, b"").unwrap();
    assert_eq!(xattr::get(&p, "user.a").unwrap(), None);
    xattr::set(&p, "user.a", b"1").unwrap();
    xattr::set(&p, "user.b", &[0; 5000]).unwrap();
    assert_eq!(xattr::get(&p, "user.b").unwrap().unwrap(), [0; 5000]);
    let names: BTreeSet<_> = xattr::list(&p).unwrap().collect();
    assert_eq!(names, BTreeSet::from(["user.a".into(), "user.b".into()]));
    let (c, name) = (cstring(&p), c"user.b");
    let mut small = [0_u8; 10];
    let get = |buf: &mut [u8]| {
        let n = unsafe { libc::getxattr(c.as_ptr(), name.as_ptr(), buf.as_mut_ptr().cast(), buf.len()) };
        check(n as i32)
    };
    assert_eq!(get(&mut []).unwrap(), 5000);
    assert_eq!(code(get(&mut small)), libc::ERANGE);
    let set =
        |flags| check(unsafe { libc::setxattr(c.as_ptr(), name.as_ptr(), small.as_ptr().cast(), 3, flags) });
    assert_eq!(code(set(libc::XATTR_CREATE)), libc::EEXIST);
    set(libc::XATTR_REPLACE).unwrap();
    xattr::remove(&p, "user.a").unwrap();
    assert_eq!(code(xattr::remove(&p, "user.a")), libc::ENODATA);
    // Version 2; owner rw, group r, others r.
    let acl = [
        2, 0, 0, 0, 1, 0, 6, 0, 255, 255, 255, 255, 4, 0, 4, 0, 255, 255, 255, 255, 32, 0, 4, 0, 255, 255,
        255, 255,
    ];
    assert_eq!(code(xattr::set(&p, "system.posix_acl_access", &acl)), libc::EOPNOTSUPP);
    if is_root() {
        xattr::set(&p, "trusted.t", b"1").unwrap();
        assert!(xattr::list(&p).unwrap().any(|n| n == "trusted.t"));
    }
}

#[test]
fn times_to_the_nanosecond_and_before_1970() {
    let Some(m) = Live::new() else { return };
    let (f, d) = (m.path("f"), m.path("d"));
    fs::write(&f, b"x").unwrap();
    fs::create_dir(&d).unwrap();
    for p in [&f, &d] {
        for (secs, nanos) in [(1_234_567_890, 987_654_321), (-2, 800_000_000), (-2, 0), (0, 1)] {
            set_times(p, secs, nanos);
            let meta = fs::metadata(p).unwrap();
            assert_eq!((meta.mtime(), meta.mtime_nsec()), (secs, nanos));
            assert_eq!((meta.atime(), meta.atime_nsec()), (secs, nanos));
        }
    }
    let before = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs() as i64 - 2;
    OpenOptions::new().append(true).open(&f).unwrap().write_all(b"y").unwrap();
    assert!(fs::metadata(&f).unwrap().mtime() >= before);
}

#[test]
fn the_kernel_is_told_what_is_not_there() {
    let Some(m) = Live::new() else { return };
    assert!(!m.path("none").exists());
    let asked = m.fs.lookups.load(Ordering::SeqCst);
    for _ in 0..10 {
        assert!(!m.path("none").exists());
    }
    assert_eq!(m.fs.lookups.load(Ordering::SeqCst), asked);
    fs::write(m.path("none"), b"now").unwrap();
    assert_eq!(fs::read(m.path("none")).unwrap(), b"now");
}

#[test]
fn a_panic_is_an_error_for_one_request_only() {
    let Some(m) = Live::new() else { return };
    for i in 0..40 {
        assert_eq!(code(fs::metadata(m.path(format!("boom{i}")))), libc::EIO);
    }
    fs::write(m.path("f"), b"alive").unwrap();
    assert_eq!(fs::read(m.path("f")).unwrap(), b"alive");
}

#[test]
fn waiting_requests_hold_up_nobody() {
    let Some(m) = Live::new() else { return };
    let p = m.path("slow");
    let mut f = File::create(&p).unwrap();
    f.write_all(&vec![5; 40 * 4096]).unwrap();
    f.sync_all().unwrap();
    assert!(m.fs.blocked.load(Ordering::SeqCst) > 0);
    let direct = OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(&p).unwrap();
    let started = Instant::now();
    std::thread::scope(|s| {
        for i in 0..40 {
            let direct = &direct;
            s.spawn(move || {
                let mut room = vec![0_u8; 8192];
                let skip = room.as_ptr().align_offset(4096);
                direct.read_exact_at(&mut room[skip..skip + 4096], i * 4096).unwrap();
                assert_eq!(room[skip], 5);
            });
        }
        std::thread::sleep(Duration::from_millis(10));
        let ask = Instant::now();
        fs::write(m.path("quick"), b"x").unwrap();
        assert!(ask.elapsed() < Duration::from_secs(1));
    });
    // 40 waits of 50 ms each, side by side.
    assert!(started.elapsed() < Duration::from_secs(1), "took {:?}", started.elapsed());
}

#[test]
fn a_sync_of_all_waits_for_what_the_kernel_handed_over() {
    let Some(m) = Live::new() else { return };
    let mut f = File::create(m.path("slow")).unwrap();
    m.fs.pause.store(1000, Ordering::SeqCst);
    f.write_all(&[5; 4096]).unwrap();
    assert_eq!(m.fs.getattr(ino_of(&f)).unwrap().size, 0, "only the kernel has it");
    m.session.flush().unwrap();
    assert_eq!(m.fs.getattr(ino_of(&f)).unwrap().size, 4096);
}

fn ino_of(f: &File) -> mirrorfs::ids::Ino {
    mirrorfs::ids::Ino(f.metadata().unwrap().ino())
}

#[test]
fn set_user_id_falls_when_others_write() {
    let Some(m) = Live::new() else { return };
    if !is_root() {
        return println!("SKIP: needs root");
    }
    let mode = |p: &Path| fs::metadata(p).unwrap().mode() & 0o7777;
    fs::set_permissions(m.path(""), PermissionsExt::from_mode(0o777)).unwrap();
    for (name, script) in [
        ("append", "echo x >> append"),
        ("truncate", ": > truncate"),
        ("shorten", "truncate -s 1 shorten"),
        ("overwrite", "printf y | dd of=overwrite conv=notrunc status=none"),
    ] {
        let p = m.path(name);
        fs::write(&p, b"some content").unwrap();
        fs::set_permissions(&p, PermissionsExt::from_mode(0o6777)).unwrap();
        assert_eq!(mode(&p), 0o6777);
        assert!(as_nobody(&format!("cd {} && {script}", m.path("").display())).success());
        assert_eq!(mode(&p), 0o777, "{name}");
    }
    let p = m.path("chown");
    fs::write(&p, b"x").unwrap();
    fs::set_permissions(&p, PermissionsExt::from_mode(0o6755)).unwrap();
    std::os::unix::fs::chown(&p, Some(65534), None).unwrap();
    assert_eq!(mode(&p), 0o755);
    // Root keeps them when writing.
    fs::set_permissions(&p, PermissionsExt::from_mode(0o6755)).unwrap();
    OpenOptions::new().append(true).open(&p).unwrap().write_all(b"y").unwrap();
    assert_eq!(mode(&p), 0o6755);
}

#[test]
fn locks_are_kept_by_the_kernel() {
    let Some(m) = Live::new() else { return };
    let p = m.path("f");
    let (a, b) = (File::create(&p).unwrap(), File::open(&p).unwrap());
    a.lock().unwrap();
    assert!(b.try_lock().is_err());
    a.unlock().unwrap();
    b.try_lock().unwrap();
    // POSIX locks conflict between processes: of two python-less shells, flock(1) uses flock; so use OFD locks.
    let ofd = |f: &File, kind: i32, start: i64, len: i64| {
        let mut l: libc::flock = unsafe { std::mem::zeroed() };
        (l.l_type, l.l_whence, l.l_start, l.l_len) = (kind as i16, libc::SEEK_SET as i16, start, len);
        check(unsafe { libc::fcntl(f.as_raw_fd(), libc::F_OFD_SETLK, &raw const l) })
    };
    ofd(&a, libc::F_WRLCK, 0, 10).unwrap();
    assert_eq!(code(ofd(&b, libc::F_RDLCK, 5, 10)), libc::EAGAIN);
    ofd(&b, libc::F_RDLCK, 10, 10).unwrap();
}

#[test]
fn big_directories_list_completely_while_changing() {
    let Some(m) = Live::new() else { return };
    let d = m.path("d");
    fs::create_dir(&d).unwrap();
    for i in 0..3000 {
        File::create(d.join(format!("{i:04}{}", "x".repeat(i % 200)))).unwrap();
    }
    let mut seen = BTreeSet::new();
    for entry in fs::read_dir(&d).unwrap() {
        let entry = entry.unwrap();
        assert!(seen.insert(entry.file_name()), "twice: {:?}", entry.file_name());
        // Those already seen go; that may not disturb the rest.
        fs::remove_file(entry.path()).unwrap();
    }
    assert_eq!(seen.len(), 3000);
    assert_eq!(fs::read_dir(&d).unwrap().count(), 0);
    let again: Vec<_> = (0..500).map(|i| File::create(d.join(format!("n{i}"))).unwrap()).collect();
    assert_eq!(fs::read_dir(&d).unwrap().count(), again.len());
}

#[test]
fn references_are_given_back() {
    let Some(m) = Live::new() else { return };
    for i in 0..300 {
        fs::create_dir(m.path(format!("d{i}"))).unwrap();
        fs::write(m.path(format!("d{i}/f")), b"x").unwrap();
        fs::hard_link(m.path(format!("d{i}/f")), m.path(format!("l{i}"))).unwrap();
    }
    let out = Command::new("ls").arg("-lR").arg(m.path("")).output().unwrap();
    assert!(out.status.success());
    assert_eq!(m.fs.inodes(), 601);
    assert!(
        Command::new("sh")
            .arg("-c")
            .arg(format!("rm -rf {}/*", m.path("").display()))
            .status()
            .unwrap()
            .success()
    );
    let until = Instant::now() + Duration::from_secs(20);
    while m.fs.inodes() > 1 && Instant::now() < until {
        std::thread::sleep(Duration::from_millis(20));
    }
    assert_eq!(m.fs.inodes(), 1, "inodes without names are still referenced");
}

#[test]
fn ends_when_unmounted_from_outside() {
    let Some(m) = Live::new() else { return };
    fs::write(m.path("f"), b"x").unwrap();
    let tool = if is_root() { ("umount", None) } else { ("fusermount3", Some("-u")) };
    let done = Command::new(tool.0).args(tool.1).arg(m.session.mountpoint()).status().unwrap();
    assert!(done.success());
    m.session.wait().unwrap();
    assert!(!m.session.is_live());
    m.session.unmount(false).unwrap();
    assert_eq!(fs::read_dir(m.dir.path().join("m")).unwrap().count(), 0);
}

#[test]
fn a_busy_mount_says_so_and_goes_lazily() {
    let Some(m) = Live::new() else { return };
    let mut f = File::create(m.path("f")).unwrap();
    assert_eq!(m.session.unmount(false).unwrap_err().kind(), ErrorKind::ResourceBusy);
    m.session.unmount(true).unwrap();
    f.write_all(b"still works").unwrap();
    f.sync_all().unwrap();
    drop(f);
    m.session.wait().unwrap();
}

#[test]
fn impossible_mountpoints_are_explained() {
    let Some(m) = Live::new() else { return };
    let attempt = |p: &Path| mount(Arc::new(MemFs::new()), p, &MountOptions::default()).err().unwrap();
    let file = m.dir.path().join("file");
    fs::write(&file, b"").unwrap();
    let told = attempt(&file).to_string();
    assert!(told.contains("is not a directory"), "{told}");
    let told = attempt(&m.dir.path().join("none")).to_string();
    assert!(told.contains("does not exist"), "{told}");
    let busy = attempt(m.session.mountpoint());
    assert!(matches!(busy, MountError::Mountpoint { .. }));
    assert!(busy.to_string().contains("is busy"), "{busy}");
    fs::write(m.path("f"), b"unharmed").unwrap();
}

#[test]
fn read_only_mounts_refuse_changes() {
    let Some(m) = Live::with(&MountOptions { read_only: true, ..MountOptions::default() }) else { return };
    assert_eq!(code(fs::write(m.path("f"), b"x")), libc::EROFS);
    assert_eq!(code(fs::create_dir(m.path("d"))), libc::EROFS);
}

#[test]
fn believable_numbers() {
    let Some(m) = Live::with(&MountOptions { fsname: "a,b c\\d".into(), ..MountOptions::default() }) else {
        return;
    };
    let out = Command::new("stat").args(["-f", "-c", "%S %b %a %c %d"]).arg(m.path("")).output().unwrap();
    assert_eq!(String::from_utf8_lossy(&out.stdout).trim(), "4096 1048576 524288 1000 900");
    let entry = mirrorfs::fuse::mountinfo::mount_at(m.session.mountpoint()).unwrap().unwrap();
    assert_eq!((entry.fstype.as_str(), entry.source.as_str()), ("fuse.mirrorfs", "a,b c\\d"));
}

/// Run by `a_user_mounts_through_the_helper` in a process of its own, as another user.
#[test]
fn child_of_user_mount() {
    let Some(at) = std::env::var_os("MIRRORFS_TEST_USER_MOUNT") else { return };
    let at = PathBuf::from(at);
    let fs = Arc::new(MemFs::new());
    let session =
        mount(fs, &at, &MountOptions { fsname: "us,er".into(), ..MountOptions::default() }).unwrap();
    let entry = mirrorfs::fuse::mountinfo::mount_at(&at).unwrap().unwrap();
    assert_eq!((entry.fstype.as_str(), entry.source.as_str()), ("fuse.mirrorfs", "us,er"));
    let mut f = File::create(at.join("f")).unwrap();
    f.write_all(b"by a user").unwrap();
    set_times(&at.join("f"), 1000, 5);
    drop(f);
    assert_eq!(fs::metadata(at.join("f")).unwrap().mtime(), 1000);
    assert_eq!(fs::read(at.join("f")).unwrap(), b"by a user");
    session.unmount(false).unwrap();
    session.wait().unwrap();
    println!("mounted as user");
}

#[test]
fn a_user_mounts_through_the_helper() {
    if std::env::var_os("MIRRORFS_SKIP_FUSE").is_some_and(|v| v == "1") {
        return println!("SKIP: MIRRORFS_SKIP_FUSE=1");
    }
    if !is_root() || Command::new("fusermount3").arg("-V").output().is_err() {
        return println!("SKIP: needs root (to become another user) and fusermount3");
    }
    if fs::metadata("/dev/fuse").unwrap().mode() & 0o6 != 0o6 {
        return println!("SKIP: /dev/fuse is not open to users on this machine");
    }
    let dir = tempfile::Builder::new().prefix("mf").tempdir().unwrap();
    let at = dir.path().join("m");
    fs::create_dir(&at).unwrap();
    let exe = dir.path().join("test");
    fs::copy(std::env::current_exe().unwrap(), &exe).unwrap();
    for p in [dir.path(), &at] {
        std::os::unix::fs::chown(p, Some(65534), Some(65534)).unwrap();
    }
    let out = Command::new(&exe)
        .args(["--exact", "child_of_user_mount", "--nocapture"])
        .env("MIRRORFS_TEST_USER_MOUNT", &at)
        .uid(65534)
        .gid(65534)
        .output()
        .unwrap();
    let told = String::from_utf8_lossy(&out.stdout).into_owned() + &String::from_utf8_lossy(&out.stderr);
    let _ = Command::new("umount").arg("-l").arg(&at).output();
    assert!(out.status.success() && told.contains("mounted as user"), "{told}");
}

#[test]
fn pjdfstest() {
    let Some(m) =
        Live::with(&MountOptions { allow_other: true, suid: true, dev: true, ..MountOptions::default() })
    else {
        return;
    };
    let tool = std::env::var("PJDFSTEST").unwrap_or_else(|_| "pjdfstest".into());
    if !is_root() || Command::new(&tool).arg("--help").output().is_err() {
        return println!("SKIP: needs root and pjdfstest (cargo install pjdfstest)");
    }
    fs::set_permissions(m.path(""), PermissionsExt::from_mode(0o755)).unwrap();
    let conf = m.dir.path().join("pjdfstest.toml");
    fs::write(&conf, support::PJDFSTEST_TOML).unwrap();
    let out = Command::new(&tool).arg("-c").arg(&conf).arg("-p").arg(m.path("")).output().unwrap();
    let told = String::from_utf8_lossy(&out.stdout);
    println!("{told}");
    assert!(out.status.success(), "{told}");
}

#[test]
fn a_mixed_tree_is_as_on_the_local_disk() {
    let Some(m) = Live::new() else { return };
    let seed = support::run::seed("a_mixed_tree_is_as_on_the_local_disk");
    let shape = support::tree::Shape::SMALL;
    let plain = m.dir.path().join("plain");
    fs::create_dir(&plain).unwrap();
    support::tree::build(&plain, seed, shape);
    support::tree::build(m.session.mountpoint(), seed, shape);
    let expected = support::tree::Snapshot::take(&plain);
    assert!(expected.entries.len() > 200);
    expected.assert_same(&support::tree::Snapshot::take(m.session.mountpoint()), "mount against local disk");
    // A comparison that cannot fail shows nothing.
    fs::write(m.path("extra"), b"x").unwrap();
    assert!(expected.diff(&support::tree::Snapshot::take(m.session.mountpoint())).contains("+ extra"));
}
