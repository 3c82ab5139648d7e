//! System calls as short functions, and the notebook of a case.

use std::ffi::CString;
use std::fmt::Debug;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// What a call answers: a value or the errno's name.
pub type R<T> = Result<T, String>;

/// Where a case works, and what it found.
pub struct Case {
    pub dir: PathBuf,
    /// Root of the filesystem.
    pub root: PathBuf,
    /// The filesystem is ours alone.
    pub may_remount: bool,
    pub lines: Vec<String>,
}

impl Case {
    pub fn new(dir: PathBuf, root: PathBuf, may_remount: bool) -> Self {
        Self { dir, root, may_remount, lines: Vec::new() }
    }

    /// A path in the case's directory.
    pub fn p(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// Notes what came of something. Keys are unique within a case.
    pub fn note(&mut self, key: &str, what: impl Debug) {
        let taken = self.lines.iter().any(|l| l.starts_with(&format!("{key} = ")));
        assert!(!taken, "noted twice: {key}");
        self.lines.push(format!("{key} = {what:?}"));
    }
}

pub fn errno_name(n: i32) -> String {
    macro_rules! names {
        ($($name:ident)*) => { match n { $(libc::$name => stringify!($name).to_owned(),)* other => format!("errno {other}") } };
    }
    names!(EPERM ENOENT EIO ENXIO E2BIG EBADF EAGAIN ENOMEM EACCES EFAULT EBUSY EEXIST EXDEV ENODEV ENOTDIR EISDIR EINVAL
        ENFILE EMFILE ENOTTY ETXTBSY EFBIG ENOSPC ESPIPE EROFS EMLINK EPIPE ERANGE ENAMETOOLONG ENOSYS ENOTEMPTY ELOOP
        ENODATA EOVERFLOW EOPNOTSUPP ESTALE EDQUOT ENOTCONN ECONNABORTED ETIMEDOUT)
}

pub fn last() -> String {
    errno_name(io::Error::last_os_error().raw_os_error().unwrap())
}

pub fn ok(n: impl Into<i64>) -> R<i64> {
    let n = n.into();
    if n < 0 { Err(last()) } else { Ok(n) }
}

pub fn unit(n: impl Into<i64>) -> R<()> {
    ok(n).map(drop)
}

/// The errno's name of an error of the standard library.
pub fn io<T>(r: io::Result<T>) -> R<T> {
    r.map_err(|e| e.raw_os_error().map_or_else(|| e.to_string(), errno_name))
}

pub fn c(p: impl AsRef<Path>) -> CString {
    CString::new(p.as_ref().as_os_str().as_bytes()).unwrap()
}

pub fn open(p: impl AsRef<Path>, flags: i32) -> R<OwnedFd> {
    open_mode(p, flags, 0o644)
}

pub fn open_mode(p: impl AsRef<Path>, flags: i32, mode: u32) -> R<OwnedFd> {
    let fd = unsafe { libc::open(c(p).as_ptr(), flags | libc::O_CLOEXEC, mode) };
    if fd < 0 { Err(last()) } else { Ok(unsafe { OwnedFd::from_raw_fd(fd) }) }
}

/// A new file, open for reading and writing.
pub fn new_file(p: impl AsRef<Path>) -> OwnedFd {
    open(p, libc::O_RDWR | libc::O_CREAT | libc::O_TRUNC).unwrap()
}

pub fn pwrite(fd: &OwnedFd, data: &[u8], at: i64) -> R<i64> {
    ok(unsafe { libc::pwrite(fd.as_raw_fd(), data.as_ptr().cast(), data.len(), at) } as i64)
}

pub fn write(fd: &OwnedFd, data: &[u8]) -> R<i64> {
    ok(unsafe { libc::write(fd.as_raw_fd(), data.as_ptr().cast(), data.len()) } as i64)
}

pub fn pread(fd: &OwnedFd, len: usize, at: i64) -> R<Vec<u8>> {
    let mut room = vec![0; len];
    let n = ok(unsafe { libc::pread(fd.as_raw_fd(), room.as_mut_ptr().cast(), len, at) } as i64)?;
    room.truncate(n as usize);
    Ok(room)
}

pub fn seek(fd: &OwnedFd, at: i64, whence: i32) -> R<i64> {
    ok(unsafe { libc::lseek(fd.as_raw_fd(), at, whence) })
}

pub fn ftruncate(fd: &OwnedFd, len: i64) -> R<()> {
    unit(unsafe { libc::ftruncate(fd.as_raw_fd(), len) })
}

pub fn fallocate(fd: &OwnedFd, mode: i32, at: i64, len: i64) -> R<()> {
    unit(unsafe { libc::fallocate(fd.as_raw_fd(), mode, at, len) })
}

pub fn fsync(fd: &OwnedFd) -> R<()> {
    unit(unsafe { libc::fsync(fd.as_raw_fd()) })
}

pub fn stat(p: impl AsRef<Path>) -> R<libc::stat> {
    let mut st = MaybeUninit::uninit();
    unit(unsafe { libc::lstat(c(p).as_ptr(), st.as_mut_ptr()) })?;
    Ok(unsafe { st.assume_init() })
}

pub fn fstat(fd: &OwnedFd) -> libc::stat {
    let mut st = MaybeUninit::uninit();
    assert_eq!(unsafe { libc::fstat(fd.as_raw_fd(), st.as_mut_ptr()) }, 0);
    unsafe { st.assume_init() }
}

pub fn statfs_type(p: impl AsRef<Path>) -> i64 {
    statfs(p).f_type
}

pub fn statfs(p: impl AsRef<Path>) -> libc::statfs {
    let mut st = MaybeUninit::uninit();
    assert_eq!(unsafe { libc::statfs(c(p).as_ptr(), st.as_mut_ptr()) }, 0);
    unsafe { st.assume_init() }
}

pub fn mode(p: impl AsRef<Path>) -> R<String> {
    stat(p).map(|s| format!("{:o}", s.st_mode))
}

pub fn chmod(p: impl AsRef<Path>, mode: u32) -> R<()> {
    unit(unsafe { libc::chmod(c(p).as_ptr(), mode) })
}

pub fn lchown(p: impl AsRef<Path>, uid: u32, gid: u32) -> R<()> {
    unit(unsafe { libc::lchown(c(p).as_ptr(), uid, gid) })
}

pub fn mkdir(p: impl AsRef<Path>, mode: u32) -> R<()> {
    unit(unsafe { libc::mkdir(c(p).as_ptr(), mode) })
}

pub fn rmdir(p: impl AsRef<Path>) -> R<()> {
    unit(unsafe { libc::rmdir(c(p).as_ptr()) })
}

pub fn unlink(p: impl AsRef<Path>) -> R<()> {
    unit(unsafe { libc::unlink(c(p).as_ptr()) })
}

pub fn mknod(p: impl AsRef<Path>, mode: u32, dev: u64) -> R<()> {
    unit(unsafe { libc::mknod(c(p).as_ptr(), mode, dev) })
}

pub fn link(a: impl AsRef<Path>, b: impl AsRef<Path>) -> R<()> {
    unit(unsafe { libc::link(c(a).as_ptr(), c(b).as_ptr()) })
}

pub fn symlink(to: impl AsRef<Path>, at: impl AsRef<Path>) -> R<()> {
    unit(unsafe { libc::symlink(c(to).as_ptr(), c(at).as_ptr()) })
}

pub fn rename(a: impl AsRef<Path>, b: impl AsRef<Path>, flags: u32) -> R<()> {
    let (a, b) = (c(a), c(b));
    unit(unsafe { libc::renameat2(libc::AT_FDCWD, a.as_ptr(), libc::AT_FDCWD, b.as_ptr(), flags) })
}

pub fn truncate(p: impl AsRef<Path>, len: i64) -> R<()> {
    unit(unsafe { libc::truncate(c(p).as_ptr(), len) })
}

pub fn utimens(p: impl AsRef<Path>, a: (i64, i64), m: (i64, i64)) -> R<()> {
    let t = |(tv_sec, tv_nsec)| libc::timespec { tv_sec, tv_nsec };
    let times = [t(a), t(m)];
    unit(unsafe { libc::utimensat(libc::AT_FDCWD, c(p).as_ptr(), times.as_ptr(), libc::AT_SYMLINK_NOFOLLOW) })
}

pub fn setxattr(p: impl AsRef<Path>, name: &str, value: &[u8], flags: i32) -> R<()> {
    let name = CString::new(name).unwrap();
    unit(unsafe { libc::lsetxattr(c(p).as_ptr(), name.as_ptr(), value.as_ptr().cast(), value.len(), flags) })
}

pub fn getxattr(p: impl AsRef<Path>, name: &str) -> R<Vec<u8>> {
    let name = CString::new(name).unwrap();
    let mut room = vec![0; 70_000];
    let n = unsafe { libc::lgetxattr(c(p).as_ptr(), name.as_ptr(), room.as_mut_ptr().cast(), room.len()) };
    room.truncate(ok(n as i64)? as usize);
    Ok(room)
}

pub fn removexattr(p: impl AsRef<Path>, name: &str) -> R<()> {
    let name = CString::new(name).unwrap();
    unit(unsafe { libc::lremovexattr(c(p).as_ptr(), name.as_ptr()) })
}

pub fn listxattr(p: impl AsRef<Path>) -> R<Vec<String>> {
    let mut room = vec![0; 70_000];
    let n = unsafe { libc::llistxattr(c(p).as_ptr(), room.as_mut_ptr().cast(), room.len()) };
    room.truncate(ok(n as i64)? as usize);
    let mut names: Vec<_> = room
        .split(|b| *b == 0)
        .filter(|n| !n.is_empty())
        .map(|n| String::from_utf8_lossy(n).into_owned())
        .collect();
    names.sort();
    Ok(names)
}

/// A file's bytes in words: runs of equal bytes.
pub fn runs(data: &[u8]) -> String {
    let mut out = String::new();
    let mut i = 0;
    while i < data.len() {
        let n = data[i..].iter().take_while(|b| **b == data[i]).count();
        out += &format!("{}x{} ", n, data[i]);
        i += n;
    }
    out
}

/// Long enough that times of before and after differ on any filesystem.
pub fn nap() {
    std::thread::sleep(Duration::from_millis(11));
}

/// Runs `work` on a thread that is this user.
pub fn as_user<T: Send>(uid: u32, gid: u32, groups: &[u32], work: impl FnOnce() -> T + Send) -> T {
    as_user_with(uid, gid, groups, None, work)
}

/// Leaves in force only those capabilities of this thread that are in `mask`.
fn keep_capabilities(mask: u64) {
    const VERSION_3: u32 = 0x2008_0522;
    // Version and process; then effective, permitted and inheritable, of the low and of the high
    // numbers.
    let header = [VERSION_3, 0];
    let mut sets = [0_u32; 6];
    unsafe {
        assert_eq!(libc::syscall(libc::SYS_capget, header.as_ptr(), sets.as_mut_ptr()), 0);
        sets[0] = sets[1] & mask as u32;
        sets[3] = sets[4] & (mask >> 32) as u32;
        assert_eq!(libc::syscall(libc::SYS_capset, header.as_ptr(), sets.as_ptr()), 0);
    }
}

/// As [`as_user`], with these capabilities in force (`None`: those that the user has anyway).
pub fn as_user_with<T: Send>(
    uid: u32,
    gid: u32,
    groups: &[u32],
    capabilities: Option<u64>,
    work: impl FnOnce() -> T + Send,
) -> T {
    std::thread::scope(|s| {
        s.spawn(|| {
            // The bare calls: those of the C library would change all threads.
            unsafe {
                if capabilities.is_some() {
                    assert_eq!(libc::prctl(libc::PR_SET_KEEPCAPS, 1, 0, 0, 0), 0);
                }
                let groups_len = groups.len();
                assert_eq!(libc::syscall(libc::SYS_setgroups, groups_len, groups.as_ptr()), 0);
                assert_eq!(libc::syscall(libc::SYS_setresgid, gid, gid, gid), 0);
                assert_eq!(libc::syscall(libc::SYS_setresuid, uid, uid, uid), 0);
            }
            if let Some(mask) = capabilities {
                keep_capabilities(mask);
            }
            work()
        })
        .join()
        .unwrap()
    })
}

/// As the user that most cases become.
pub fn as_nobody<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    as_user(12_345, 12_345, &[], work)
}

/// Writes a file's pages and lets the kernel forget them: the next read asks the filesystem.
pub fn forget_pages(fd: &OwnedFd) {
    fsync(fd).unwrap();
    assert_eq!(unsafe { libc::posix_fadvise(fd.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED) }, 0);
}

/// Lets the kernel forget what it may of this filesystem (and, alas, of all): pages, names, inodes.
pub fn drop_caches(at: impl AsRef<Path>) {
    let dir = open(at, libc::O_RDONLY | libc::O_DIRECTORY).unwrap();
    assert_eq!(unsafe { libc::syncfs(dir.as_raw_fd()) }, 0);
    drop(dir);
    std::fs::write("/proc/sys/vm/drop_caches", "3").unwrap();
}

/// A mapping of a file, shared and writable; gone when dropped.
pub struct Map {
    pub at: *mut u8,
    pub len: usize,
}

impl Map {
    pub fn new(fd: &OwnedFd, len: usize) -> R<Self> {
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        let at = unsafe { libc::mmap(std::ptr::null_mut(), len, prot, libc::MAP_SHARED, fd.as_raw_fd(), 0) };
        if at == libc::MAP_FAILED { Err(last()) } else { Ok(Self { at: at.cast(), len }) }
    }

    pub fn get(&self, i: usize) -> u8 {
        assert!(i < self.len);
        unsafe { self.at.add(i).read_volatile() }
    }

    pub fn set(&self, i: usize, value: u8) {
        assert!(i < self.len);
        unsafe { self.at.add(i).write_volatile(value) }
    }

    pub fn sync(&self) -> R<()> {
        unit(unsafe { libc::msync(self.at.cast(), self.len, libc::MS_SYNC) })
    }

    pub fn bytes(&self, from: usize, to: usize) -> Vec<u8> {
        (from..to).map(|i| self.get(i)).collect()
    }
}

impl Drop for Map {
    fn drop(&mut self) {
        unsafe { libc::munmap(self.at.cast(), self.len) };
    }
}

/// What becomes of a child process that runs `work`: its exit code, or its signal. `work` must not allocate.
pub fn in_child(work: impl FnOnce() -> i32) -> String {
    unsafe {
        let pid = libc::fork();
        assert!(pid >= 0);
        if pid == 0 {
            libc::_exit(work());
        }
        let mut status = 0;
        assert_eq!(libc::waitpid(pid, &raw mut status, 0), pid);
        if libc::WIFSIGNALED(status) {
            return format!("signal {}", libc::WTERMSIG(status));
        }
        let code = libc::WEXITSTATUS(status);
        if code == 0 { "fine".into() } else { errno_name(code) }
    }
}

/// A buffer that O_DIRECT takes.
pub struct Aligned(Vec<u8>, usize, usize);

impl Aligned {
    pub fn new(len: usize, fill: u8) -> Self {
        let room = vec![fill; len + 4096];
        let skip = room.as_ptr().align_offset(4096);
        Self(room, skip, len)
    }

    pub fn bytes(&mut self) -> &mut [u8] {
        &mut self.0[self.1..self.1 + self.2]
    }
}
