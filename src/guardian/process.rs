//! The daemon as a child process: how it is started, and how its end reads.

use std::ffi::OsString;
use std::io;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{ExitStatus, Stdio};

use tokio::process::{Child, Command};

use super::report::end_with_parent;

/// How much less likely than other processes the kernel is to kill the guardian for lack of memory (-1000 to 1000; proc(5)).
const OOM_SCORE: i32 = -900;
const OOM_FILE: &str = "/proc/self/oom_score_adj";
/// A supervisor's watchdog names the process that must report. The daemon reports, not its parent.
const WATCHDOG_PID: &str = "WATCHDOG_PID";

/// How daemons are started.
#[derive(Clone, Debug)]
pub(super) struct Launch {
    /// `mount` and its arguments, without the program.
    pub arguments: Vec<OsString>,
    /// What relative paths in the arguments are relative to.
    pub cwd: OsString,
    /// The daemon is killed when this process dies.
    pub tied: bool,
    /// The likelihood that this process had of being killed for lack of memory, for the daemon to have, too.
    pub oom_score: Option<i32>,
}

impl Launch {
    /// Starts one. Its standard output is the pipe of the report.
    pub fn start(&self, again: bool) -> io::Result<Child> {
        // Not by its name: the file may have been replaced since this process began.
        let mut command = Command::new("/proc/self/exe");
        command.arg0("mirrorfs").args(&self.arguments).arg("--guarded").arg("--cwd").arg(&self.cwd);
        if again {
            command.arg("--restarted");
        }
        command.current_dir("/").env_remove(WATCHDOG_PID);
        command.stdin(Stdio::null()).stdout(Stdio::piped());
        let (tied, score) = (self.tied, self.oom_score.map(|score| score.to_string().into_bytes()));
        // SAFETY: only system calls on what was prepared before.
        unsafe {
            command.pre_exec(move || {
                if tied {
                    end_with_parent(libc::SIGKILL);
                }
                if let Some(score) = &score {
                    write_oom_score(score);
                }
                Ok(())
            });
        }
        command.spawn()
    }
}

/// Makes this process one of the last that the kernel kills for lack of memory, where it may; returns what it had before.
pub(super) fn guard_memory() -> Option<i32> {
    let before = std::fs::read_to_string(OOM_FILE).ok()?.trim().parse().ok()?;
    if before <= OOM_SCORE {
        return None;
    }
    match std::fs::write(OOM_FILE, OOM_SCORE.to_string()) {
        Ok(()) => Some(before),
        Err(error) => {
            // Only root may. The process is small, which the kernel considers as well.
            log::debug!("{OOM_FILE} stays at {before}: {error}");
            None
        }
    }
}

/// Between fork and exec: system calls only, and nothing can be done about a failure.
fn write_oom_score(score: &[u8]) {
    // SAFETY: the path is a NUL-terminated constant, the buffer outlives the call, the descriptor is ours.
    unsafe {
        let fd = libc::open(c"/proc/self/oom_score_adj".as_ptr(), libc::O_WRONLY | libc::O_CLOEXEC);
        if fd >= 0 {
            libc::write(fd, score.as_ptr().cast(), score.len());
            libc::close(fd);
        }
    }
}

/// How a daemon ended, in words for people.
pub(super) fn describe(status: ExitStatus, log: Option<&Path>) -> String {
    let see = log.map_or_else(String::new, |log| format!("; see {}", log.display()));
    match (status.signal(), status.code()) {
        (Some(signal), _) => {
            let (name, reason) = match signal {
                libc::SIGKILL => ("SIGKILL", ", by a person or by the kernel for lack of memory"),
                libc::SIGABRT => ("SIGABRT", ", a fault of the program"),
                libc::SIGSEGV => ("SIGSEGV", ", a fault of the program"),
                libc::SIGBUS => ("SIGBUS", ", a disk error or a full disk"),
                libc::SIGTERM => ("SIGTERM", ""),
                _ => ("", ""),
            };
            let name = if name.is_empty() { String::new() } else { format!(" ({name})") };
            format!("killed by signal {signal}{name}{reason}")
        }
        (None, Some(code)) => format!("ended with code {code}{see}"),
        (None, None) => format!("{status}{see}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_end_is_described() {
        let log = Path::new("/s/daemon.log");
        let killed = describe(ExitStatus::from_raw(libc::SIGKILL), Some(log));
        assert_eq!(killed, "killed by signal 9 (SIGKILL), by a person or by the kernel for lack of memory");
        assert_eq!(describe(ExitStatus::from_raw(libc::SIGUSR1), None), "killed by signal 10");
        let failed = describe(ExitStatus::from_raw(101 << 8), Some(log));
        assert_eq!(failed, "ended with code 101; see /s/daemon.log");
    }
}
