//! Paths of Unix sockets that are longer than a socket's address can hold (107 bytes).
//!
//! The folder is opened and the socket addressed through `/proc/self/fd/N/`, which the kernel resolves to the same file.

use std::fs::{File, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

const LONGEST: usize = 100;

/// A path to `socket` short enough for an address. It stays valid while the second value lives.
pub(super) fn short(socket: &Path) -> std::io::Result<(PathBuf, Option<File>)> {
    if socket.as_os_str().as_bytes().len() <= LONGEST {
        return Ok((socket.to_owned(), None));
    }
    let (Some(folder), Some(name)) = (socket.parent(), socket.file_name()) else {
        return Err(std::io::ErrorKind::InvalidInput.into());
    };
    // A place only: another user may have put something there that waits to be opened.
    let flags = libc::O_PATH | libc::O_DIRECTORY | libc::O_CLOEXEC;
    let folder = OpenOptions::new().read(true).custom_flags(flags).open(folder)?;
    let path = PathBuf::from(format!("/proc/self/fd/{}", folder.as_raw_fd())).join(name);
    Ok((path, Some(folder)))
}
