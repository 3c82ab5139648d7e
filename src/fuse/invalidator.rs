//! The invalidator: a small process beside the daemon that has the kernel write back and drop pages.
//!
//! The kernel makes such a call wait, uninterruptibly, for our own answers to its writes. A thread of the daemon that
//! waited there could not be killed: the daemon's descriptors and its lock would stay for ever, and every user of the
//! mount would hang. The invalidator holds the connection to the kernel and a socket, nothing else. The daemon's thread
//! waits on the socket, which ends with the daemon. When the daemon dies during a call, the invalidator ends the
//! connection: the mount returns `ENOTCONN`, and the call returns.
//!
//! It is the same program started anew, since a fork would pin the memory of a large process. It is started when it is
//! needed first and started again should it have been killed.

use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::thread;

use parking_lot::Mutex;

use line::Line;
pub(super) use line::Pages;

mod line;
mod process;

pub use process::run;

/// The word by which the program knows that it is to be an invalidator; device number and mountpoint follow.
pub const COMMAND: &str = "invalidate";

/// The daemon's side. Dropping it lets the process end.
pub(super) struct Invalidator {
    device: String,
    mountpoint: PathBuf,
    /// The connection to the kernel, if possible as a device of its own.
    kernel: OwnedFd,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// The line to the process, if it runs.
    line: Option<Arc<Line>>,
    /// A warning was logged that it cannot be started.
    warned: bool,
}

impl Invalidator {
    /// For the mount of this device number, served through `connection`. Starts nothing yet.
    pub fn new(device: &str, mountpoint: &Path, connection: &OwnedFd) -> io::Result<Self> {
        let kernel = clone_device(connection).or_else(|_| connection.try_clone())?;
        let (device, mountpoint) = (device.to_owned(), mountpoint.to_owned());
        Ok(Self { device, mountpoint, kernel, state: Mutex::default() })
    }

    /// Has the kernel write back and drop pages, and waits for that; `None` when there is no process to do it.
    pub fn invalidate(&self, pages: Pages) -> Option<io::Result<()>> {
        for _ in 0..2 {
            let line = self.line()?;
            match line.ask(pages) {
                Some(0) => return Some(Ok(())),
                Some(errno) => return Some(Err(io::Error::from_raw_os_error(errno))),
                None => self.lost(&line),
            }
        }
        None
    }

    /// The line to the process, which is started if there is none.
    fn line(&self) -> Option<Arc<Line>> {
        let mut state = self.state.lock();
        if state.line.is_none() {
            match self.start() {
                Ok(line) => state.line = Some(line),
                Err(e) if !state.warned => {
                    let path = self.mountpoint.display();
                    log::warn!("{path}: no invalidator; if this process is killed it may hang: {e}");
                    state.warned = true;
                }
                Err(_) => {}
            }
        }
        state.line.clone()
    }

    fn lost(&self, line: &Arc<Line>) {
        let mut state = self.state.lock();
        if state.line.take_if(|there| Arc::ptr_eq(there, line)).is_some() {
            log::warn!("{}: the invalidator was killed; starting it again", self.mountpoint.display());
        }
    }

    fn start(&self) -> io::Result<Arc<Line>> {
        let (ours, theirs) = UnixStream::pair()?;
        let mut child = self.spawn(theirs.into())?;
        let line = Line::new(ours);
        let delivers = Arc::clone(&line);
        thread::Builder::new().name("mirrorfs-inval".into()).spawn(move || {
            delivers.deliver();
            if let Err(e) = child.wait() {
                log::debug!("the invalidator's end is not known: {e}");
            }
        })?;
        Ok(line)
    }

    fn spawn(&self, socket: OwnedFd) -> io::Result<Child> {
        // Not by its name: the file may have been replaced since this process began.
        Command::new("/proc/self/exe")
            .arg0("mirrorfs")
            .arg(COMMAND)
            .arg(&self.device)
            .arg(&self.mountpoint)
            .stdin(Stdio::from(socket))
            .stdout(Stdio::from(self.kernel.try_clone()?))
            .spawn()
    }
}

impl Drop for Invalidator {
    fn drop(&mut self) {
        self.state.lock().line.iter().for_each(|line| line.close());
    }
}

/// Opens another device of the same connection. Requests that the daemon has read belong to the daemon's devices, and
/// the kernel fails them when those close.
fn clone_device(connection: &OwnedFd) -> io::Result<OwnedFd> {
    const FUSE_DEV_IOC_CLONE: libc::c_ulong = 0x8004_e500;
    let device = OpenOptions::new().read(true).write(true).open(super::attach::DEVICE)?;
    let source = connection.as_raw_fd().cast_unsigned();
    // SAFETY: the call reads one number through the pointer, which outlives the call.
    let done = unsafe { libc::ioctl(device.as_raw_fd(), FUSE_DEV_IOC_CLONE as _, &raw const source) };
    if done == 0 { Ok(device.into()) } else { Err(io::Error::last_os_error()) }
}
