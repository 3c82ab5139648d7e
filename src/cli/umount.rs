//! `mirrorfs umount`: has the daemon flush, seal and unmount; takes away a mount whose daemon is dead.

use std::ffi::CString;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use super::locate::{self, Located};
use super::{CommandError, Outcome, human, output, runtime, sync};
use crate::control::{Replicas, Status, SyncRequest};
use crate::exit::Exit;

/// A daemon that has unmounted ends within this time.
const ENDING: Duration = Duration::from_secs(60);

/// Unmount a volume; what is not yet on all replicas is kept locally and sent after the next mount
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  mirrorfs umount ~/files
  mirrorfs umount ~/files --wait")]
pub(super) struct Args {
    /// The mountpoint
    mountpoint: PathBuf,

    /// First wait until all replicas hold everything
    #[arg(long, short, env = "MIRRORFS_WAIT", value_parser = clap::builder::FalseyValueParser::new())]
    wait: bool,
}

pub(super) fn run(args: &Args) -> Outcome {
    let located = locate::find(&args.mountpoint, false)?;
    match runtime()?.block_on(ask(&located, args.wait)) {
        Ok(status) => {
            wait_for_end(status.pid);
            output::print(&report(&status))
        }
        // The daemon lives but does not answer, or refuses: taking its mount away could lose what it has in memory.
        Err(error) if error.exit != Exit::NotMounted || lives(&located) => Err(error),
        Err(error) if locate::find(&located.mountpoint, false).is_err() => Err(error),
        Err(_) => remove_dead(&located.mountpoint),
    }
}

async fn ask(located: &Located, wait: bool) -> Result<Status, CommandError> {
    let client = located.client()?;
    if wait {
        let request = SyncRequest { replicas: Replicas::All, timeout_seconds: None };
        sync::wait(&client, request).await?;
    }
    Ok(client.shutdown().await?)
}

fn lives(located: &Located) -> bool {
    located.entry.as_ref().is_some_and(|entry| alive(entry.pid))
}

fn report(status: &Status) -> String {
    let behind: Vec<String> = status
        .replicas
        .iter()
        .filter(|r| r.lag_segments > 0)
        .map(|r| format!("{} to {}", human::size(r.lag_bytes), r.name))
        .collect();
    if behind.is_empty() {
        return format!("unmounted {}; all replicas hold everything", status.mountpoint);
    }
    format!(
        "unmounted {}; still to be sent after the next mount: {} (kept in {})",
        status.mountpoint,
        behind.join(", "),
        status.state
    )
}

/// Waits until the daemon has let go of its state folder, so that the volume can be mounted again at once.
fn wait_for_end(pid: u32) {
    let begin = Instant::now();
    while alive(pid) && begin.elapsed() < ENDING {
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Whether a process runs. One that has ended but whose parent has not noticed has let go of everything.
fn alive(pid: u32) -> bool {
    let Ok(stat) = std::fs::read(format!("/proc/{pid}/stat")) else { return false };
    // "77 (name) S …"; the name may hold anything, also parentheses.
    let state = stat.iter().rposition(|b| *b == b')').and_then(|end| stat.get(end + 2));
    !matches!(state, Some(b'Z' | b'X'))
}

/// Unmounts without a daemon.
fn remove_dead(mountpoint: &Path) -> Outcome {
    // SAFETY: geteuid has no preconditions and cannot fail.
    let root = unsafe { libc::geteuid() } == 0;
    let outcome = if root { unmount_as_root(mountpoint) } else { unmount_as_user(mountpoint) };
    outcome.map_err(|detail| {
        let message =
            format!("no daemon answers, and {} cannot be unmounted: {detail}", mountpoint.display());
        CommandError::new(Exit::Failure, message)
    })?;
    output::print(&format!(
        "unmounted {}, whose daemon was gone; what it had not sent is kept in its state folder for the next mount",
        mountpoint.display()
    ))
}

fn unmount_as_root(mountpoint: &Path) -> Result<(), String> {
    let path = CString::new(mountpoint.as_os_str().as_bytes()).map_err(|error| error.to_string())?;
    // SAFETY: the path is a valid string that ends with a zero byte.
    if unsafe { libc::umount2(path.as_ptr(), libc::UMOUNT_NOFOLLOW) } == 0 {
        return Ok(());
    }
    let error = std::io::Error::last_os_error();
    Err(if error.raw_os_error() == Some(libc::EBUSY) {
        "a program still uses it; find it with: fuser -vm MOUNTPOINT".to_owned()
    } else {
        error.to_string()
    })
}

fn unmount_as_user(mountpoint: &Path) -> Result<(), String> {
    let output = Command::new("fusermount3")
        .arg("-u")
        .arg("--")
        .arg(mountpoint)
        .output()
        .map_err(|error| format!("fusermount3 cannot be run ({error}); install the package fuse3"))?;
    if output.status.success() {
        return Ok(());
    }
    Err(String::from_utf8_lossy(&output.stderr).trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::tests::sample_status;

    #[test]
    fn the_report_says_what_is_still_to_be_sent() {
        let mut status = sample_status();
        assert_eq!(report(&status), "unmounted /mnt/x; all replicas hold everything");
        status.replicas[0].lag_segments = 2;
        status.replicas[0].lag_bytes = 3 << 20;
        assert_eq!(
            report(&status),
            "unmounted /mnt/x; still to be sent after the next mount: 3.0 MiB to a (kept in /state)"
        );
    }

    #[test]
    fn a_process_is_seen_to_live_and_to_end() {
        assert!(alive(std::process::id()));
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        let pid = child.id();
        assert!(alive(pid));
        child.kill().unwrap();
        // Not yet waited for: a zombie, which counts as ended.
        wait_for_end(pid);
        assert!(!alive(pid));
        child.wait().unwrap();
        assert!(!alive(pid));
    }
}
