//! System calls that wait for our own mount, made by a child process that does not hold it.
//!
//! A thread that waits in the kernel for pages which this very process must take cannot be killed; killed along with the
//! process it would keep the connection to the kernel open for ever, and everybody who uses the mount would hang. A child
//! that has closed all descriptors holds nothing: when the process dies the connection ends, and the child with it.

use std::ffi::CStr;
use std::io;
use std::time::{Duration, Instant};

/// How often to look whether a child with a limit has ended.
const LOOK_EVERY: Duration = Duration::from_millis(5);

/// Runs `call` in a child and answers its error number as an error; 0 is success.
///
/// `call` runs between fork and exit in a process with many threads: it may only make system calls.
fn apart(call: impl Fn() -> i32) -> io::Result<()> {
    apart_within(call, None)
}

/// The same; with a limit, a child that is not done by then is killed, and that is an error.
fn apart_within(call: impl Fn() -> i32, limit: Option<Duration>) -> io::Result<()> {
    // SAFETY: the child makes system calls only (see above) and leaves by _exit.
    let child = unsafe { libc::fork() };
    match child {
        -1 => Err(io::Error::last_os_error()),
        0 => {
            // SAFETY: a system call on numbers.
            unsafe { libc::syscall(libc::SYS_close_range, 0u32, u32::MAX, 0u32) };
            let code = call();
            // SAFETY: ends the child without running anything of the parent's.
            unsafe { libc::_exit(code & 0xff) }
        }
        child => match limit {
            None => wait(child),
            Some(limit) => wait_within(child, limit),
        },
    }
}

fn wait(child: libc::pid_t) -> io::Result<()> {
    loop {
        if let Some(ended) = reap(child, 0) {
            return ended;
        }
    }
}

fn wait_within(child: libc::pid_t, limit: Duration) -> io::Result<()> {
    let until = Instant::now() + limit;
    loop {
        if let Some(ended) = reap(child, libc::WNOHANG) {
            return ended;
        }
        if Instant::now() >= until {
            // SAFETY: our own child, which is not reaped yet. It may hang in the kernel until its question is answered: whoever
            // reaps it then must not be this thread.
            unsafe { libc::kill(child, libc::SIGKILL) };
            std::thread::spawn(move || wait(child));
            return Err(io::ErrorKind::TimedOut.into());
        }
        std::thread::sleep(LOOK_EVERY);
    }
}

/// How the child ended; `None` when it has not yet.
fn reap(child: libc::pid_t, flags: i32) -> Option<io::Result<()>> {
    let mut status = 0;
    // SAFETY: `status` outlives the call; the child is ours.
    match unsafe { libc::waitpid(child, &mut status, flags) } {
        0 => return None,
        pid if pid == child => {}
        _ => {
            let error = io::Error::last_os_error();
            return (error.kind() != io::ErrorKind::Interrupted).then_some(Err(error));
        }
    }
    Some(match (libc::WIFEXITED(status), libc::WEXITSTATUS(status)) {
        (true, 0) => Ok(()),
        (true, code) => Err(io::Error::from_raw_os_error(code)),
        _ => Err(io::Error::other("the helper process was killed")),
    })
}

fn errno() -> i32 {
    // SAFETY: the pointer is to this thread's errno.
    unsafe { *libc::__errno_location() }
}

/// `umount2`, made apart.
pub(super) fn umount(path: &CStr, flags: i32) -> io::Result<()> {
    // SAFETY: the string outlives the call.
    apart(|| if unsafe { libc::umount2(path.as_ptr(), flags) } == 0 { 0 } else { errno() })
}

/// How often a `syncfs` that was "interrupted" is made again.
const SYNCFS_AGAIN: usize = 20;

/// `syncfs` of the filesystem mounted at `path`, made apart.
///
/// Nobody interrupts the child. `EINTR` is what a program left behind that was killed within `fallocate`, while the kernel sent us the
/// file's times (seen in 6.18): the kernel keeps that as an error of writing and tells it to whoever asks first. No content is concerned,
/// and the times are sent again; so the question is asked again.
pub(super) fn syncfs(path: &CStr) -> io::Result<()> {
    let once = || {
        apart(|| {
            // SAFETY: the string outlives the calls; the descriptor is the child's own.
            unsafe {
                let fd = libc::open(path.as_ptr(), libc::O_RDONLY | libc::O_DIRECTORY | libc::O_CLOEXEC);
                if fd < 0 || libc::syncfs(fd) != 0 { errno() } else { 0 }
            }
        })
    };
    let mut answer = once();
    for _ in 0..SYNCFS_AGAIN {
        match &answer {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => answer = once(),
            _ => break,
        }
    }
    answer
}

/// Has the filesystem mounted at `path` write out everything, and detaches it although it is in use; made apart.
pub(super) fn evict(path: &CStr) -> io::Result<()> {
    apart(|| {
        // SAFETY: the string outlives the calls; the descriptor is the child's own.
        unsafe {
            let fd = libc::open(path.as_ptr(), libc::O_RDONLY | libc::O_DIRECTORY | libc::O_CLOEXEC);
            if fd < 0 {
                return errno();
            }
            if libc::umount2(path.as_ptr(), libc::MNT_DETACH | libc::UMOUNT_NOFOLLOW) != 0 {
                return errno();
            }
            // Behind the detachment: nobody new can come and write.
            if libc::syncfs(fd) != 0 { errno() } else { 0 }
        }
    })
}

/// Has every filesystem of this machine write out what it holds; made apart, and for some seconds at most.
pub(super) fn sync_all(limit: Duration) -> io::Result<()> {
    let sync = || {
        // SAFETY: no preconditions, and no outcome.
        unsafe { libc::sync() };
        0
    };
    apart_within(sync, Some(limit))
}

/// `statfs` at `path`, made apart: asks the server. An error when there is no answer within `limit`.
pub(super) fn answers(path: &CStr, limit: Duration) -> io::Result<()> {
    // SAFETY: all zeros is a valid statfs; the string outlives the call.
    let ask = || unsafe {
        let mut found: libc::statfs = std::mem::zeroed();
        if libc::statfs(path.as_ptr(), &raw mut found) == 0 { 0 } else { errno() }
    };
    apart_within(ask, Some(limit))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_child_tells_its_error() {
        let dir = tempfile::tempdir().unwrap();
        let path = std::ffi::CString::new(dir.path().to_str().unwrap()).unwrap();
        syncfs(&path).unwrap();
        assert_eq!(syncfs(c"/nowhere/at/all").unwrap_err().raw_os_error(), Some(libc::ENOENT));
        assert!(umount(&path, 0).is_err());
        answers(&path, Duration::from_secs(60)).unwrap();
        let endless = || {
            // SAFETY: a system call on a number.
            unsafe { libc::sleep(600) };
            0
        };
        let late = apart_within(endless, Some(Duration::from_millis(50))).unwrap_err();
        assert_eq!(late.kind(), io::ErrorKind::TimedOut);
    }
}
