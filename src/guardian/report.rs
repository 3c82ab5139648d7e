//! How a started process says that the mount is live or cannot be: one line of JSON on its standard output.
//!
//! The same line goes from the daemon to the guardian, and from the guardian to the command that runs in the foreground.

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use crate::daemon::ReadyInfo;
use crate::exit::Exit;

/// What is reported.
#[derive(Debug, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Line {
    /// The mount is live.
    Ready(ReadyInfo),
    /// It cannot be.
    Failed {
        /// The code to end with.
        exit: Exit,
        /// Why.
        message: String,
    },
}

/// The sender's side. Nothing else can write to it, and no further child inherits it.
#[derive(Debug)]
pub struct Report {
    pipe: File,
    follows: bool,
}

impl Report {
    /// Takes standard output for itself, sends everyone else's output to standard error, and leaves the terminal's session.
    /// With `follow`, this process is asked to end when its parent does, until the mount is live: one that appears after the
    /// command was killed would surprise.
    ///
    /// # Errors
    /// When the descriptors cannot be had.
    pub fn take(follow: bool) -> std::io::Result<Report> {
        let pipe: OwnedFd = std::io::stdout().as_fd().try_clone_to_owned()?;
        // SAFETY: both descriptors are open for the whole of the process; dup2 replaces the first atomically.
        if unsafe { libc::dup2(std::io::stderr().as_raw_fd(), libc::STDOUT_FILENO) } < 0 {
            return Err(std::io::Error::last_os_error());
        }
        // SAFETY: setsid has no preconditions. It fails for the leader of a group, which a started child is not; then
        // there is nothing lost but the separation from the terminal.
        if unsafe { libc::setsid() } < 0 {
            log::debug!("cannot leave the session: {}", std::io::Error::last_os_error());
        }
        if follow {
            end_with_parent(libc::SIGTERM);
        }
        Ok(Report { pipe: pipe.into(), follows: follow })
    }

    /// The mount is live.
    pub fn ready(self, info: &ReadyInfo) {
        if self.follows {
            end_with_parent(0);
        }
        self.send(&Line::Ready(info.clone()));
    }

    /// It cannot be.
    pub fn failed(self, exit: Exit, message: &str) {
        self.send(&Line::Failed { exit, message: message.to_owned() });
    }

    fn send(mut self, line: &Line) {
        let text = serde_json::to_string(line).unwrap_or_default() + "\n";
        // The reader may have been interrupted; the mount stays.
        if let Err(error) = self.pipe.write_all(text.as_bytes()) {
            log::debug!("nobody waits for the report: {error}");
        }
    }
}

/// Has the kernel send `signal` to this process when its parent ends; 0 for none.
pub(super) fn end_with_parent(signal: libc::c_int) {
    // SAFETY: this option takes a number and touches no memory.
    if unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, signal) } != 0 {
        log::debug!("cannot follow the parent's end: {}", std::io::Error::last_os_error());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_line_comes_back() {
        let line = Line::Failed { exit: Exit::InUse, message: "a\nb".into() };
        let text = serde_json::to_string(&line).unwrap();
        assert!(!text.contains('\n'));
        match serde_json::from_str(&text).unwrap() {
            Line::Failed { exit, message } => assert_eq!((exit, message.as_str()), (Exit::InUse, "a\nb")),
            Line::Ready(info) => panic!("{info:?}"),
        }
    }
}
