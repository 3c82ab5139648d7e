//! System calls that wait for our own mount, made by a child process that does not hold it.
//!
//! A thread that waits in the kernel for pages which this very process must take cannot be killed; killed along with the
//! process it would keep the connection to the kernel open for ever, and everybody who uses the mount would hang. A child
//! that has closed all descriptors holds nothing: when the process dies the connection ends, and the child with it.

use std::ffi::CStr;
use std::io;

/// Runs `call` in a child and answers its error number as an error; 0 is success.
///
/// `call` runs between fork and exit in a process with many threads: it may only make system calls.
fn apart(call: impl Fn() -> i32) -> io::Result<()> {
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
        child => {
            let mut status = 0;
            loop {
                // SAFETY: `status` outlives the call; the child is ours.
                if unsafe { libc::waitpid(child, &mut status, 0) } == child {
                    break;
                }
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
            match (libc::WIFEXITED(status), libc::WEXITSTATUS(status)) {
                (true, 0) => Ok(()),
                (true, code) => Err(io::Error::from_raw_os_error(code)),
                _ => Err(io::Error::other("the helper process was killed")),
            }
        }
    }
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
    }
}
