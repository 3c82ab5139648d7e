//! The mount: adapter to fuser, the errno table, attaching and detaching.
//!
//! The only place that names `fuser`. Owns the kernel's connection and the threads that serve it; knows nothing of what
//! is behind [`FileSystem`].

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::thread::{self, JoinHandle};

use parking_lot::Mutex;

use crate::vfs::api::FileSystem;

mod adapter;
mod apart;
mod attach;
mod convert;
mod errno;
mod guard;
pub mod mountinfo;
mod offer;
mod pool;
mod reply;
mod shared;

pub use attach::is_gone;

/// How the directory is mounted. Permission checks are always the kernel's (`default_permissions`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MountOptions {
    /// What `mount` and `df` show as the source.
    pub fsname: String,
    /// Other users may enter. Without root this needs `user_allow_other` in `/etc/fuse.conf`.
    pub allow_other: bool,
    /// Nothing can be changed through the mount.
    pub read_only: bool,
    /// Set-user-id bits work.
    pub suid: bool,
    /// Device nodes work.
    pub dev: bool,
    /// Programs cannot be run from it.
    pub noexec: bool,
    /// Access times are not kept.
    pub noatime: bool,
    /// The kernel shows that each read changes the access time.
    pub strictatime: bool,
    /// Access times of directories are not kept.
    pub nodiratime: bool,
    /// Access control lists are kept, and enforced by the kernel.
    pub acl: bool,
    /// Threads that serve requests; at least 2.
    pub threads: usize,
}

impl Default for MountOptions {
    fn default() -> Self {
        let threads = thread::available_parallelism().map_or(4, |n| n.get().clamp(4, 16));
        Self {
            fsname: "mirrorfs".to_owned(),
            allow_other: false,
            read_only: false,
            suid: false,
            dev: false,
            noexec: false,
            noatime: false,
            strictatime: false,
            nodiratime: false,
            acl: true,
            threads,
        }
    }
}

/// Why it could not be mounted. Nothing is mounted then.
#[derive(Debug, thiserror::Error)]
pub enum MountError {
    /// The mountpoint is none.
    #[error("mountpoint {} {why}", path.display())]
    Mountpoint {
        /// As it was given.
        path: PathBuf,
        /// What is wrong with it, and the remedy.
        why: String,
    },
    /// This machine has no FUSE.
    #[error("FUSE is not available: {0}")]
    NoFuse(String),
    /// We are not root, and the helper is missing.
    #[error("mounting without root needs fusermount3; install the package fuse3")]
    NoHelper,
    /// The kernel or the helper refused.
    #[error("cannot mount at {}: {why}", path.display())]
    Refused {
        /// As it was given.
        path: PathBuf,
        /// What they said.
        why: String,
    },
}

/// A live mount. Dropping it detaches.
pub struct Session {
    mountpoint: PathBuf,
    /// Tells whether the mount is still there; serves nothing.
    connection: OwnedFd,
    serving: Mutex<Option<JoinHandle<io::Result<()>>>>,
}

/// Mounts `fs` at `mountpoint` and serves it on threads of its own. When this returns the mount is live.
///
/// # Errors
/// See [`MountError`].
pub fn mount(
    fs: Arc<dyn FileSystem>,
    mountpoint: &Path,
    options: &MountOptions,
) -> Result<Session, MountError> {
    let path = attach::check(mountpoint)?;
    let device = attach::attach(&path, options)?;
    serve(fs, &path, device, options).map_err(|e| {
        if let Err(e) = attach::detach(&path, true) {
            log::warn!("{} stays mounted: {e}", path.display());
        }
        MountError::Refused { path: mountpoint.to_owned(), why: e.to_string() }
    })
}

fn serve(
    fs: Arc<dyn FileSystem>,
    path: &Path,
    device: OwnedFd,
    options: &MountOptions,
) -> io::Result<Session> {
    let connection = device.try_clone()?;
    let notifier = Arc::new(OnceLock::new());
    let adapter = adapter::Adapter::new(fs, Arc::clone(&notifier), options.acl);
    let mut config = fuser::Config::default();
    config.n_threads = Some(options.threads.max(2));
    config.clone_fd = attach::can_open_device();
    // "All" because the kernel decides who may ask; see `attach`.
    let session = fuser::Session::from_fd(adapter, device, fuser::SessionACL::All, config)?;
    // The cell is new, so this cannot fail.
    let _ = notifier.set(session.notifier());
    let serving = thread::Builder::new().name("mirrorfs-fuse".into()).spawn(move || session.run())?;
    let session = Session { mountpoint: path.to_owned(), connection, serving: Mutex::new(Some(serving)) };
    raise_read_ahead(path);
    Ok(session)
}

/// Lets the kernel read 1 MiB ahead instead of 128 KiB: fewer requests. Needs root; without, all works the same.
fn raise_read_ahead(path: &Path) {
    if let Ok(Some(entry)) = mountinfo::mount_at(path) {
        let knob = format!("/sys/class/bdi/{}/read_ahead_kb", entry.device);
        if let Err(e) = fs::write(&knob, "1024") {
            log::debug!("{knob} stays as it is: {e}");
        }
    }
}

impl Session {
    /// Where it is mounted (canonical).
    #[must_use]
    pub fn mountpoint(&self) -> &Path {
        &self.mountpoint
    }

    /// Whether the kernel still has it; false after an unmount from outside too.
    #[must_use]
    pub fn is_live(&self) -> bool {
        attach::is_attached(&self.connection)
    }

    /// Unmounts, unless that has been done already. The kernel hands over its unwritten pages first. `lazy` takes
    /// the mount out of the tree even when files are open in it; it then ends when the last of them is closed.
    ///
    /// # Errors
    /// `ResourceBusy` when it is in use and not `lazy`.
    pub fn unmount(&self, lazy: bool) -> io::Result<()> {
        if !self.is_live() {
            return Ok(());
        }
        match attach::detach(&self.mountpoint, lazy) {
            // Somebody was faster.
            Err(_) if !self.is_live() => Ok(()),
            done => done,
        }
    }

    /// Has the kernel hand over all pages that it has not written yet. Nothing to do when the mount is gone.
    ///
    /// # Errors
    /// What `syncfs` answers.
    pub fn flush(&self) -> io::Result<()> {
        if !self.is_live() {
            // Unmounting has handed them over.
            return Ok(());
        }
        use std::os::unix::ffi::OsStrExt;
        apart::syncfs(&std::ffi::CString::new(self.mountpoint.as_os_str().as_bytes())?)
    }

    /// Returns when the mount has ended, by [`Session::unmount`] or from outside, and no request is being served any
    /// more. Returns at once when another call has waited already.
    ///
    /// # Errors
    /// When serving ended for another reason than an unmount.
    pub fn wait(&self) -> io::Result<()> {
        let Some(serving) = self.serving.lock().take() else { return Ok(()) };
        serving.join().unwrap_or_else(|_| Err(io::Error::other("a serving thread panicked")))
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        if let Err(e) = self.unmount(true) {
            log::warn!("{} stays mounted: {e}", self.mountpoint.display());
        }
    }
}
