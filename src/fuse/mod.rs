//! The mount: adapter to fuser, the errno table, attaching and detaching.
//!
//! The only place that names `fuser`. Owns the kernel's connection and the threads that serve it; knows nothing of what
//! is behind [`FileSystem`].

use std::ffi::CString;
use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::vfs::api::FileSystem;

mod abort;
mod adapter;
mod apart;
mod attach;
mod awake;
mod convert;
mod errno;
mod guard;
mod handed;
mod holders;
mod identity;
pub mod invalidator;
pub mod mountinfo;
mod offer;
pub mod placeholder;
mod pool;
mod privileges;
mod replace;
mod reply;
mod shared;

pub use abort::abort_connection;
pub use attach::{helper, is_gone, remount, remove_dead};
pub use holders::{Holder, Holders};
pub use identity::{MountIdentity, Presence};
use mountinfo::MountEntry;

/// How long everything on this machine may take to be written out.
const SYNC_ALL: Duration = Duration::from_secs(20);
/// How long the kernel's last requests are waited for when the mount is taken away.
const DRAIN: Duration = Duration::from_secs(10);
/// More places than anybody binds one mount to.
const MOST_PLACES: usize = 1000;

/// How far the kernel reads ahead, in KiB.
const READ_AHEAD_KIB: u32 = 4096;

/// A part of the log to be left out unless it is asked for: it calls it an error that the kernel takes no answer to "was interrupted",
/// which is so whenever a signal meets a request.
pub const NOISE: &str = "fuser::reply";

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
    /// Symbolic links are not followed.
    pub nosymfollow: bool,
    /// What is written to a file is synced before the call returns.
    pub sync: bool,
    /// Changes of names are synced before the call returns.
    pub dirsync: bool,
    /// Options for SELinux, such as `context=…`; passed over where the kernel has none.
    pub labels: Vec<String>,
    /// The kernel shows that each read changes the access time.
    pub strictatime: bool,
    /// Access times of directories are not kept.
    pub nodiratime: bool,
    /// Access control lists are kept, and enforced by the kernel.
    pub acl: bool,
    /// Processors are kept from sleeping deeply while requests come in bursts, where this process may ask for that (as root).
    pub low_latency: bool,
    /// Threads that serve requests; at least 2.
    pub threads: usize,
    /// Only take the place of a dead mount, or of a guardian's placeholder.
    pub replaces: bool,
    /// A process of its own makes the calls that wait for our own answers ([`invalidator`]). This program must then
    /// understand the call of that process.
    pub invalidator: bool,
}

impl MountOptions {
    /// The labels that this kernel takes.
    fn kernel_labels(&self) -> &[String] {
        if Path::new("/sys/fs/selinux").exists() { &self.labels } else { &[] }
    }
}

impl Default for MountOptions {
    fn default() -> Self {
        let threads = thread::available_parallelism().map_or(8, |n| n.get().clamp(8, 16));
        Self {
            fsname: "mirrorfs".to_owned(),
            allow_other: false,
            read_only: false,
            suid: false,
            dev: false,
            noexec: false,
            noatime: false,
            nosymfollow: false,
            sync: false,
            dirsync: false,
            labels: Vec::new(),
            strictatime: false,
            nodiratime: false,
            acl: true,
            low_latency: false,
            threads,
            replaces: false,
            invalidator: false,
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
    /// The dead mount whose place was to be taken is gone: somebody has unmounted it meanwhile.
    #[error("{} was unmounted while the volume was being opened", .0.display())]
    Unmounted(PathBuf),
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
    /// Its device is empty when the kernel's list did not show it.
    identity: MountIdentity,
    shared: Arc<shared::Shared>,
    /// Says once how serving ended.
    ended: Mutex<Option<mpsc::Receiver<io::Result<()>>>>,
    say: mpsc::Sender<io::Result<()>>,
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
    let target = attach::check(mountpoint)?;
    if options.replaces && !target.is_held {
        return Err(MountError::Unmounted(target.path));
    }
    let path = target.path.clone();
    let (device, pending) = attach::attach(target, options)?;
    let in_tree = pending.is_none();
    let failed = |e: io::Error| MountError::Refused { path: mountpoint.to_owned(), why: e.to_string() };
    let begin = || {
        let serving = serve(fs, device, options).map_err(failed)?;
        pending.map_or(Ok(()), attach::Pending::settle)?;
        Ok(serving.into_session(&path, options))
    };
    begin().inspect_err(|_| {
        // What is not in the tree ends with its descriptor.
        if in_tree && let Err(e) = attach::detach(&path, true) {
            log::warn!("{} stays mounted: {e}", path.display());
        }
    })
}

/// A connection to the kernel that is being served.
struct Serving {
    shared: Arc<shared::Shared>,
    connection: OwnedFd,
    ended: mpsc::Receiver<io::Result<()>>,
    say: mpsc::Sender<io::Result<()>>,
}

fn serve(fs: Arc<dyn FileSystem>, device: OwnedFd, options: &MountOptions) -> io::Result<Serving> {
    let connection = device.try_clone()?;
    let threads = options.threads.max(2);
    let shared = Arc::new(shared::Shared::new(fs, threads));
    let adapter = adapter::Adapter::new(Arc::clone(&shared), options.acl);
    let mut config = fuser::Config::default();
    config.n_threads = Some(threads);
    config.clone_fd = attach::can_open_device();
    // "All" because the kernel decides who may ask; see `attach`.
    let session = fuser::Session::from_fd(adapter, device, fuser::SessionACL::All, config)?;
    shared.connect(session.notifier());
    if options.low_latency
        && let Err(e) = shared.awake.start()
    {
        log::debug!("requests are served as fast as processors wake by themselves: {e}");
    }
    let (say, ended) = mpsc::channel();
    let tell = say.clone();
    thread::Builder::new().name("mirrorfs-fuse".into()).spawn(move || {
        let outcome = catch_unwind(AssertUnwindSafe(|| session.run()));
        let outcome = outcome.unwrap_or_else(|_| Err(io::Error::other("a serving thread panicked")));
        let _ = tell.send(as_unmounted(outcome));
    })?;
    Ok(Serving { shared, connection, ended, say })
}

impl Serving {
    /// When the mount is in the tree, at `path`.
    fn into_session(self, path: &Path, options: &MountOptions) -> Session {
        let entry = mountinfo::mount_at(path).ok().flatten();
        let device = entry.filter(mountinfo::is_mirrorfs).map(|entry| entry.device).unwrap_or_default();
        raise_read_ahead(&device);
        if options.invalidator && !device.is_empty() {
            match invalidator::Invalidator::new(&device, path, &self.connection) {
                Ok(invalidator) => self.shared.call_through(invalidator),
                Err(e) => log::warn!("no invalidator; if this process is killed it may hang: {e}"),
            }
        }
        Session {
            mountpoint: path.to_owned(),
            identity: MountIdentity::of(&device, path),
            connection: self.connection,
            shared: self.shared,
            ended: Mutex::new(Some(self.ended)),
            say: self.say,
        }
    }
}

/// Takes `ECONNABORTED` for the end that it is: the kernel answers that instead of `ENODEV` to a thread that was just taking over a request
/// (mostly the last file's release) when the connection ended.
fn as_unmounted(outcome: io::Result<()>) -> io::Result<()> {
    outcome.or_else(|e| if e.raw_os_error() == Some(libc::ECONNABORTED) { Ok(()) } else { Err(e) })
}

/// Lets the kernel read 4 MiB ahead instead of 128 KiB: fewer requests, and several under way. Needs root; without, all works the
/// same.
fn raise_read_ahead(device: &str) {
    let knob = format!("/sys/class/bdi/{device}/read_ahead_kb");
    if !device.is_empty()
        && let Err(e) = fs::write(&knob, READ_AHEAD_KIB.to_string())
    {
        log::debug!("{knob} stays as it is: {e}");
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

    /// Where it can be reached now: it may have been moved, or detached while in use and something else be mounted there by now.
    fn place(&self) -> Option<PathBuf> {
        let all = mountinfo::mounts().unwrap_or_default();
        let ours = |entry: &&MountEntry| match self.identity.device.as_str() {
            "" => entry.mountpoint == self.mountpoint,
            device => entry.device == device,
        };
        // What lies over it hides it.
        let seen = |entry: &&MountEntry| {
            all.iter().rev().find(|e| e.mountpoint == entry.mountpoint).is_some_and(|top| top.id == entry.id)
        };
        let mut found: Vec<_> = all.iter().filter(ours).filter(seen).map(|entry| &entry.mountpoint).collect();
        found.sort_by_key(|place| **place != self.mountpoint);
        found.first().map(|place| (*place).clone())
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
        let Some(place) = self.place() else {
            // Detached, and still in use.
            return if lazy { Ok(()) } else { Err(io::ErrorKind::ResourceBusy.into()) };
        };
        match attach::detach(&place, lazy) {
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
        let synced = match self.place() {
            Some(place) => apart::syncfs(&c_path(&place)?),
            // Detached, and still in use.
            None => apart::sync_all(SYNC_ALL),
        };
        // Also after an error: all else is to be in hand.
        self.drain();
        synced
    }

    /// Takes the mount out of the tree although it is in use, wherever it is, and has the kernel hand over its pages. Whoever
    /// has files open keeps them as long as somebody serves.
    ///
    /// # Errors
    /// What the calls answer.
    pub fn evict(&self) -> io::Result<()> {
        let mut flushed = false;
        // One for each place where it is bound, and an end.
        for _ in 0..MOST_PLACES {
            let Some(place) = self.place().filter(|_| self.is_live()) else { break };
            match apart::evict(&c_path(&place)?) {
                Err(e) if e.raw_os_error() == Some(libc::EPERM) => {
                    apart::syncfs(&c_path(&place)?)?;
                    attach::detach_by_helper(&place, true)?;
                }
                done => done?,
            }
            flushed = true;
        }
        if !flushed && self.is_live() {
            apart::sync_all(SYNC_ALL)?;
        }
        self.drain();
        Ok(())
    }

    /// Waits until the requests that the kernel has made are read, and its writes answered. Kernels differ in whether a sync waits for
    /// that.
    fn drain(&self) {
        let until = Instant::now() + DRAIN;
        let mut quiet = 0;
        while quiet < 10 && Instant::now() < until {
            quiet = if attach::has_requests(&self.connection) { 0 } else { quiet + 1 };
            thread::sleep(Duration::from_millis(5));
        }
        self.shared.handed.settle();
    }

    /// Ends the connection although somebody still uses the mount. What the kernel has not handed over yet is lost.
    ///
    /// # Errors
    /// When neither root nor a control file of the connection is there.
    pub fn cut(&self) -> io::Result<()> {
        if self.is_live() { abort::abort_by_number(&self.identity.device) } else { Ok(()) }
    }

    /// Whether the mount answers a question through the kernel; also when nothing is mounted any more.
    ///
    /// # Errors
    /// `TimedOut` when it does not within `limit`; or what it answers.
    pub fn answers(&self, limit: Duration) -> io::Result<()> {
        match self.place() {
            Some(place) => apart::answers(&c_path(&place)?, limit),
            None => Ok(()),
        }
    }

    /// What tells it from all other mounts; the device is empty when not known.
    #[must_use]
    pub fn identity(&self) -> &MountIdentity {
        &self.identity
    }

    /// Returns when the mount has ended, by [`Session::unmount`] or from outside, and no request is being served any
    /// more, or after [`Session::abandon`]. Returns at once when another call has waited already.
    ///
    /// # Errors
    /// When serving ended for another reason than an unmount.
    pub fn wait(&self) -> io::Result<()> {
        let Some(ended) = self.ended.lock().take() else { return Ok(()) };
        ended.recv().unwrap_or_else(|_| Err(io::Error::other("a serving thread panicked")))
    }

    /// Has [`Session::wait`] return although somebody still uses the mount. It is served until the process ends.
    pub fn abandon(&self) {
        // Nobody waits any more: it has ended by itself.
        let _ = self.say.send(Ok(()));
    }
}

fn c_path(path: &Path) -> io::Result<CString> {
    Ok(CString::new(path.as_os_str().as_bytes())?)
}

impl Drop for Session {
    fn drop(&mut self) {
        if let Err(e) = self.unmount(true) {
            log::warn!("{} stays mounted: {e}", self.mountpoint.display());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_that_was_taking_a_request_when_the_mount_ended_is_no_failure() {
        let answered = |code| as_unmounted(Err(io::Error::from_raw_os_error(code)));
        assert!(as_unmounted(Ok(())).is_ok());
        assert!(answered(libc::ECONNABORTED).is_ok());
        assert_eq!(answered(libc::EIO).unwrap_err().raw_os_error(), Some(libc::EIO));
        assert!(as_unmounted(Err(io::Error::other("a serving thread panicked"))).is_err());
    }
}
