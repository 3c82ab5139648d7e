//! `mirrorfs umount`: has the daemon flush, seal and unmount; takes away a mount whose daemon is dead.

use std::ffi::CString;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use rustix::fs::{CWD, Mode, OFlags, ResolveFlags};

use super::locate::{self, Located, alive};
use super::mountpoint::{end_unserved, is_dead};
use super::progress::Progress;
use super::{CommandError, Outcome, human, output, runtime, sync};
use crate::control::mounts::{self, Mount};
use crate::control::{Replicas, ShutdownRequest, Status, SyncRequest};
use crate::exit::Exit;
use crate::fuse::Holders;
use crate::ids::Epoch;

/// A daemon that has unmounted ends within this time.
const ENDING: Duration = Duration::from_secs(60);
/// How often to look how far an unmount is.
const LOOK_EVERY: Duration = Duration::from_millis(500);

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
    let error = match runtime()?.block_on(ask(&located, args.wait)) {
        Ok(status) => {
            wait_for_end(status.pid);
            wait_for_guardian(&located.mountpoint);
            remove_layers(&located.mountpoint);
            output::print(&report(&status))?;
            status.held_by.iter().for_each(|holders| output::note(&warning(holders)));
            sync::require_whole(&status.refused)?;
            return if args.wait { require_all(&status) } else { Ok(()) };
        }
        Err(error) => error,
    };
    let mounted = locate::find(&located.mountpoint, false).is_ok();
    match located.daemon_lives() {
        // Unmounted, but not all went well.
        Some(true) if !mounted => {
            located.entry.iter().for_each(|entry| wait_for_end(entry.pid));
            Err(error)
        }
        // It refuses or does not answer: taking its mount away could lose what it has in memory.
        Some(true) => Err(error),
        _ if error.exit != Exit::NotMounted || !mounted => Err(error),
        Some(false) => remove_dead(&located.mountpoint),
        // Without an entry the mount itself must tell.
        None if is_dead(&located.mountpoint) => remove_dead(&located.mountpoint),
        None if args.wait => Err(error),
        None => remove_of_others(&located.mountpoint),
    }
}

async fn ask(located: &Located, wait: bool) -> Result<Status, CommandError> {
    let client = located.client()?;
    if wait {
        let request = SyncRequest { replicas: Replicas::All, timeout_seconds: None };
        sync::require_whole(&sync::wait(&client, request).await?.refused)?;
    }
    let mut progress = Progress::new("unmounting");
    let ended = client.shutdown(ShutdownRequest { wait });
    let mut ended = std::pin::pin!(ended);
    let outcome = loop {
        tokio::select! {
            outcome = &mut ended => break outcome,
            () = tokio::time::sleep(LOOK_EVERY) => {}
        }
        if let Ok(status) = client.status().await {
            let left = status.dirty_bytes + status.replicas.iter().map(|r| r.lag_bytes).sum::<u64>();
            let error =
                status.sealing_error.map_or_else(String::new, |e| format!(", cannot be sealed yet: {e}"));
            progress.update(left, &error);
        }
    };
    progress.finish();
    Ok(outcome?)
}

/// The mount was ended for those that still used it. All that they had written is kept.
fn warning(holders: &Holders) -> String {
    format!(
        "mirrorfs: it was still mounted elsewhere and has ended there, too: {holders}; what was written there is kept"
    )
}

/// With `--wait` it is no success when a replica has given up meanwhile.
fn require_all(status: &Status) -> Outcome {
    if status.fenced.is_some() {
        return Err(CommandError::new(
            Exit::InUse,
            "unmounted, but another machine had taken the volume over",
        ));
    }
    if status.replicas.iter().all(|r| r.lag_segments == 0) {
        return Ok(());
    }
    let message = "unmounted, but not every replica holds everything; mount again to go on";
    Err(CommandError::new(Exit::TimedOut, message))
}

fn report(status: &Status) -> String {
    let behind: Vec<String> = status
        .replicas
        .iter()
        .filter(|r| r.lag_segments > 0)
        .map(|r| format!("{} to {}", human::size(r.lag_bytes), r.name))
        .collect();
    if let Some(fenced) = &status.fenced {
        return format!(
            "unmounted {}; another machine took the volume over ({}). What it lacks: mirrorfs salvage --state {} --to DIR",
            status.mountpoint, fenced.text, status.state
        );
    }
    if behind.is_empty() {
        let says_nothing = status.epoch == Epoch(0) || status.refused.count > 0;
        let replicas = if says_nothing { "" } else { "; all replicas hold everything" };
        return format!("unmounted {}{replicas}", status.mountpoint);
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

/// Waits until a user's guardian has let go of the mountpoint, too.
fn wait_for_guardian(mountpoint: &Path) {
    let begin = Instant::now();
    let held =
        || mounts::all().is_ok_and(|all| mounts::at(&all, mountpoint).is_some_and(Mount::is_placeholder));
    while held() && !is_dead(mountpoint) && begin.elapsed() < ENDING {
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Takes away what lay below: dead mounts that an older kernel has stacked, a dead guardian's placeholder.
fn remove_layers(mountpoint: &Path) {
    if let Err(error) = crate::fuse::remove_dead(mountpoint) {
        log::debug!("a dead mount below {} stays: {error}", mountpoint.display());
    }
}

/// Takes away the mount of a daemon that has died. Lazily: what programs have open in it is lost anyway.
fn remove_dead(mountpoint: &Path) -> Outcome {
    end_unserved(mountpoint);
    unmount(mountpoint, true)?;
    remove_layers(mountpoint);
    output::print(&format!(
        "unmounted {}, whose daemon was gone; what it had not sent is kept in its state folder for the next mount",
        mountpoint.display()
    ))
}

/// Unmounts as umount(8) does, when it is not known whom to ask; the daemon notices.
fn remove_of_others(mountpoint: &Path) -> Outcome {
    unmount(mountpoint, false)?;
    output::print(&format!(
        "unmounted {}; its daemon, which is not known here, ends when it has written out what is left",
        mountpoint.display()
    ))
}

fn unmount(mountpoint: &Path, lazy: bool) -> Outcome {
    // SAFETY: geteuid has no preconditions and cannot fail.
    let root = unsafe { libc::geteuid() } == 0;
    let outcome = if root { unmount_as_root(mountpoint, lazy) } else { unmount_as_user(mountpoint, lazy) };
    outcome.map_err(|detail| {
        let message =
            format!("no daemon answers, and {} cannot be unmounted: {detail}", mountpoint.display());
        CommandError::new(Exit::Failure, message)
    })
}

fn unmount_as_root(mountpoint: &Path, lazy: bool) -> Result<(), String> {
    let (path, _parent) = pinned(mountpoint).map_err(|error| error.to_string())?;
    let path = CString::new(path.as_os_str().as_bytes()).map_err(|error| error.to_string())?;
    let flags = libc::UMOUNT_NOFOLLOW | if lazy { libc::MNT_DETACH } else { 0 };
    // SAFETY: the path is a valid string that ends with a zero byte.
    if unsafe { libc::umount2(path.as_ptr(), flags) } == 0 {
        return Ok(());
    }
    let error = std::io::Error::last_os_error();
    Err(if error.raw_os_error() == Some(libc::EBUSY) {
        format!("a program still uses it; find it with: fuser -vm {}", mountpoint.display())
    } else {
        error.to_string()
    })
}

/// A path that leads to the mountpoint through its parent, which stays open. The kernel's name of a
/// mount has no symbolic links; one that is there now was put in the way by the owner of a folder
/// above, to have root unmount something else.
fn pinned(mountpoint: &Path) -> std::io::Result<(PathBuf, Option<OwnedFd>)> {
    let (Some(parent), Some(name)) = (mountpoint.parent(), mountpoint.file_name()) else {
        return Ok((mountpoint.to_owned(), None));
    };
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    match rustix::fs::openat2(CWD, parent, flags, Mode::empty(), ResolveFlags::NO_SYMLINKS) {
        Ok(fd) => Ok((PathBuf::from(format!("/proc/self/fd/{}", fd.as_raw_fd())).join(name), Some(fd))),
        // Before Linux 5.6.
        Err(rustix::io::Errno::NOSYS) => Ok((mountpoint.to_owned(), None)),
        Err(error) => Err(error.into()),
    }
}

fn unmount_as_user(mountpoint: &Path, lazy: bool) -> Result<(), String> {
    let program = crate::fuse::helper().unwrap_or_else(|| "fusermount3".into());
    let output = Command::new(program)
        .arg(if lazy { "-uz" } else { "-u" })
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
    fn a_link_that_was_put_in_the_way_is_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().canonicalize().unwrap();
        std::fs::create_dir_all(root.join("real/m")).unwrap();
        std::os::unix::fs::symlink("real", root.join("link")).unwrap();
        let (path, parent) = pinned(&root.join("real/m")).unwrap();
        if parent.is_none() {
            println!("SKIP: this kernel has no openat2");
            return;
        }
        assert_eq!(path.canonicalize().unwrap(), root.join("real/m"));
        let error = unmount_as_root(&root.join("link/m"), true).unwrap_err();
        assert!(error.contains("symbolic link"), "{error}");
    }

    #[test]
    fn the_report_says_what_is_still_to_be_sent() {
        let mut status = sample_status();
        assert_eq!(report(&status), "unmounted /mnt/x; all replicas hold everything");
        status.refused.count = 1;
        assert_eq!(report(&status), "unmounted /mnt/x", "not everything");
        status.refused.count = 0;
        status.replicas[0].lag_segments = 2;
        status.replicas[0].lag_bytes = 3 << 20;
        assert_eq!(
            report(&status),
            "unmounted /mnt/x; still to be sent after the next mount: 3.0 MiB to a (kept in /state)"
        );
        assert_eq!(require_all(&status).unwrap_err().exit, Exit::TimedOut);
        status.replicas[0].lag_segments = 0;
        require_all(&status).unwrap();
        status.epoch = Epoch(0);
        assert_eq!(report(&status), "unmounted /mnt/x");
    }
}
