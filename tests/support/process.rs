//! A server that is a process of its own: killed, hung, started again.
//!
//! Owns the process group, which ends with the test whatever happens; knows nothing of what the server serves.

use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// A running server, or one that was killed.
pub struct Process {
    child: Option<Child>,
}

impl Process {
    /// Starts `command` silently, in a process group of its own.
    pub fn start(command: &mut Command) -> Self {
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).process_group(0);
        // SAFETY: prctl may be called between fork and exec. The server dies with the thread that runs the test.
        unsafe {
            command.pre_exec(|| {
                libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                Ok(())
            });
        }
        Self { child: Some(command.spawn().unwrap()) }
    }

    /// Kills it at once, with what it has in memory.
    pub fn kill9(&mut self) {
        if let Some(mut child) = self.child.take() {
            signal(&child, libc::SIGKILL);
            let _ = child.wait();
        }
    }

    /// Stops it where it stands, connections open, or lets it go on.
    pub fn hang(&self, hang: bool) {
        if let Some(child) = &self.child {
            signal(child, if hang { libc::SIGSTOP } else { libc::SIGCONT });
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill9();
    }
}

fn signal(child: &Child, signal: libc::c_int) {
    // SAFETY: our own child's process group, which is not reaped yet.
    unsafe { libc::kill(-i32::try_from(child.id()).unwrap(), signal) };
}

/// An address on which nobody listens.
pub fn free_addr() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
}

/// Waits until somebody listens there.
pub fn wait_listening(addr: SocketAddr, what: &str) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while TcpStream::connect(addr).is_err() {
        assert!(Instant::now() < deadline, "{what} does not start");
        std::thread::sleep(Duration::from_millis(50));
    }
}
