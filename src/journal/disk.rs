//! The few file operations that the journal's own files (tail and witness) are made of.
//!
//! Owns nothing but the calls: every change of a file passes through here, so that tests can record it or make it
//! fail. Knows no format. (sled does its own I/O.)

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;

use crate::direct;

/// A change about to be made to a file.
#[derive(Debug)]
#[allow(dead_code, reason = "only probes of tests look inside, and none at everything")]
pub(super) enum Act<'a> {
    /// A new file of that many zeros.
    Create(&'a Path, u64),
    /// Bytes at an offset.
    Write(&'a Path, u64, &'a [u8]),
    /// fdatasync.
    Sync(&'a Path),
    /// fsync of a directory.
    SyncDir(&'a Path),
    /// A rename.
    Rename(&'a Path, &'a Path),
    /// A removal.
    Remove(&'a Path),
}

/// Sees every change before it is made, and can refuse it.
pub(super) trait Probe: Send + Sync {
    /// An error is returned to the journal instead of making the change.
    fn before(&self, act: &Act<'_>) -> io::Result<()>;
}

/// The door to the disk.
#[derive(Clone, Default)]
pub(super) struct Disk {
    probe: Option<Arc<dyn Probe>>,
}

impl Disk {
    /// A disk whose changes a probe sees first.
    #[cfg(test)]
    pub(super) fn probed(probe: Arc<dyn Probe>) -> Self {
        Self { probe: Some(probe) }
    }

    fn ask(&self, act: &Act<'_>) -> io::Result<()> {
        self.probe.as_ref().map_or(Ok(()), |p| p.before(act))
    }

    /// Creates (or empties) a file and fills it with `size` written zeros, synced: later writes inside need no metadata.
    pub(super) fn create_zeroed(&self, path: &Path, size: u64) -> io::Result<File> {
        self.ask(&Act::Create(path, size))?;
        let file =
            OpenOptions::new().read(true).write(true).create(true).truncate(true).mode(0o600).open(path)?;
        direct::write(path, &vec![0; size as usize])?;
        Ok(file)
    }

    /// Writes all of `data` at `offset`.
    pub(super) fn write(&self, file: &File, path: &Path, offset: u64, data: &[u8]) -> io::Result<()> {
        self.ask(&Act::Write(path, offset, data))?;
        file.write_all_at(data, offset)
    }

    /// fdatasync.
    pub(super) fn sync(&self, file: &File, path: &Path) -> io::Result<()> {
        self.ask(&Act::Sync(path))?;
        file.sync_data()
    }

    /// Makes renames, creations and removals in a directory durable.
    pub(super) fn sync_dir(&self, path: &Path) -> io::Result<()> {
        self.ask(&Act::SyncDir(path))?;
        File::open(path)?.sync_all()
    }

    /// Renames within one filesystem.
    pub(super) fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.ask(&Act::Rename(from, to))?;
        fs::rename(from, to)
    }

    /// Removes a file.
    pub(super) fn remove(&self, path: &Path) -> io::Result<()> {
        self.ask(&Act::Remove(path))?;
        fs::remove_file(path)
    }
}

/// Bytes that an unprivileged process may still write on the filesystem of `path`.
pub(super) fn free_space(path: &Path) -> io::Result<u64> {
    use std::os::unix::ffi::OsStrExt;
    let c = std::ffi::CString::new(path.as_os_str().as_bytes())?;
    let mut st = std::mem::MaybeUninit::<libc::statvfs>::zeroed();
    // SAFETY: `c` is NUL-terminated and `st` is a buffer of the right type that statvfs fills.
    let st = unsafe {
        if libc::statvfs(c.as_ptr(), st.as_mut_ptr()) != 0 {
            return Err(io::Error::last_os_error());
        }
        st.assume_init()
    };
    #[allow(clippy::unnecessary_cast)]
    Ok((st.f_bavail as u64).saturating_mul(st.f_frsize as u64))
}

/// Bytes that the files of a directory occupy, not counting subdirectories' own blocks.
pub(super) fn occupied(dir: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    let Ok(entries) = fs::read_dir(dir) else { return 0 };
    entries
        .filter_map(Result::ok)
        .map(|e| match e.metadata() {
            Ok(m) if m.is_dir() => occupied(&e.path()),
            Ok(m) => m.blocks() * 512,
            Err(_) => 0,
        })
        .sum()
}
