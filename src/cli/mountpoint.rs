//! Whether a directory can be mounted on.

use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use super::{CommandError, locate, output};
use crate::config::{Config, real_path};
use crate::control::mounts::{self, Mount};
use crate::exit::Exit;
use crate::fuse::{self, is_gone, mountinfo};
use crate::replica::Place;

/// A mount that is dead says so at once.
const ANSWER: Duration = Duration::from_secs(5);
/// A guardian whose mount is gone lets go of the mountpoint within this time.
const GUARDIAN_ENDS: Duration = Duration::from_secs(10);
/// How often to look.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// A mountpoint that passed all checks.
#[derive(Debug, PartialEq)]
pub(super) struct Checked {
    /// Absolute, without symbolic links.
    pub path: PathBuf,
    /// Something to say that does not hinder mounting.
    pub warning: Option<String>,
}

/// Checks `given`, relative to `cwd`, against the system and the volume's own folders.
pub(super) fn check(given: &Path, cwd: &Path, config: &Config) -> Result<Checked, CommandError> {
    let given = cwd.join(given);
    wait_for_guardian(&given)?;
    if locate::find(&given, false).is_ok_and(|there| there.daemon_lives() == Some(false)) {
        end_unserved(&given);
    }
    check_for_daemon(&given, cwd, config)
}

/// The same for a daemon, whose own guardian may hold the place.
pub(super) fn check_for_daemon(given: &Path, cwd: &Path, config: &Config) -> Result<Checked, CommandError> {
    check_against(&cwd.join(given), config, &locate::read_mounts()?)
}

/// Waits for the guardian of an earlier mount at `path` to let go of it, if one holds the place.
fn wait_for_guardian(path: &Path) -> Result<(), CommandError> {
    let begin = Instant::now();
    while mounts::at(&locate::read_mounts()?, path).is_some_and(Mount::is_placeholder) && !is_dead(path) {
        if begin.elapsed() > GUARDIAN_ENDS {
            let shown = path.display();
            let message = format!(
                "the mountpoint {shown} is busy: its daemon is being started again; wait for it (see: mirrorfs status \
                 {shown}), or end that with: mirrorfs umount {shown}"
            );
            return Err(CommandError::new(Exit::InUse, message));
        }
        std::thread::sleep(LOOK_EVERY);
    }
    Ok(())
}

fn check_against(given: &Path, config: &Config, mounts: &[Mount]) -> Result<Checked, CommandError> {
    let shown = given.display();
    let usage = |message: String| CommandError::new(Exit::Usage, message);
    let path = match given.canonicalize() {
        Ok(path) => path,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            return Err(usage(format!(
                "the mountpoint {shown} does not exist; create it with: mkdir -p {shown}"
            )));
        }
        // A dead mount, of which the kernel remembers nothing.
        Err(error) if error.raw_os_error() == Some(libc::ENOTCONN) => std::path::absolute(given)
            .map_err(|error| usage(format!("cannot use the mountpoint {shown}: {error}")))?,
        Err(error) => return Err(usage(format!("cannot use the mountpoint {shown}: {error}"))),
    };
    if let Some(mount) = mounts::at(mounts, &path).filter(|m| !m.is_placeholder() || is_dead(&path)) {
        return if mount.is_mirrorfs() || mount.is_placeholder() {
            if is_dead(&path) {
                let warning = format!("replaces the dead mount that a daemon that has died left on {shown}");
                return Ok(Checked { path, warning: Some(warning) });
            }
            let message = format!(
                "the mountpoint {shown} is busy: a mirrorfs volume is already mounted there (see: mirrorfs \
                 status {shown}); unmount it with: mirrorfs umount {shown}, or choose another directory"
            );
            Err(CommandError::new(Exit::InUse, message))
        } else {
            Err(usage(format!(
                "the mountpoint {shown} is busy: {} is already mounted there; unmount it or choose another directory",
                mount.fstype
            )))
        };
    }
    if mounts::at(mounts, &path).is_some_and(Mount::is_placeholder) {
        return Ok(Checked { path, warning: None });
    }
    if !path.is_dir() {
        return Err(usage(format!("the mountpoint {shown} is not a directory")));
    }
    for (what, folder) in own_folders(config) {
        // Within the mount the daemon would wait for itself; around it the mount would become part of a replica.
        if path.starts_with(&folder) || folder.starts_with(&path) {
            return Err(usage(format!(
                "the mountpoint {shown} and {what} ({}) lie one within the other; choose another directory",
                folder.display()
            )));
        }
    }
    let mut entries = path
        .read_dir()
        .map_err(|error| usage(format!("cannot look into the mountpoint {shown}: {error}")))?;
    let warning = entries
        .next()
        .map(|_| format!("{shown} is not empty; what is in it is hidden while the volume is mounted"));
    Ok(Checked { path, warning })
}

/// What a mount says when it is asked.
#[derive(Clone, Copy, PartialEq)]
enum Answer {
    Serves,
    Dead,
    /// Nothing, for [`ANSWER`].
    None,
}

fn ask(mountpoint: &Path) -> Answer {
    let path = mountpoint.to_owned();
    let (sender, answer) = mpsc::channel();
    std::thread::spawn(move || {
        let _ = sender.send(is_gone(&path));
    });
    match answer.recv_timeout(ANSWER) {
        Ok(true) => Answer::Dead,
        Ok(false) => Answer::Serves,
        Err(_) => Answer::None,
    }
}

/// Whether the mount there says that nobody serves it any more. One that does not answer at all is not dead.
pub(super) fn is_dead(mountpoint: &Path) -> bool {
    ask(mountpoint) == Answer::Dead
}

/// Ends the connection of a mount whose daemon is gone, if something keeps that open without serving it: the users of the
/// mount would wait for ever. The mount then is dead. One that answers is served, whoever its daemon is.
pub(super) fn end_unserved(mountpoint: &Path) {
    if ask(mountpoint) != Answer::None {
        return;
    }
    let mount = mountinfo::mount_at(mountpoint).ok().flatten().filter(mountinfo::is_mirrorfs);
    let ended = mount.map_or(Ok(()), |mount| fuse::abort_connection(&mount.device, mountpoint));
    if let Err(error) = ended {
        let shown = mountpoint.display();
        output::note(&format!("mirrorfs: programs that use {shown} may wait for ever: {error}"));
    }
}

fn own_folders(config: &Config) -> Vec<(String, PathBuf)> {
    let replicas = config.replicas.iter().filter_map(|replica| match replica.place() {
        Place::Folder(folder) => Some((format!("the replica {}", replica.name), real_path(folder))),
        Place::Bucket { .. } => None,
    });
    replicas.chain([("the state folder".to_owned(), real_path(&config.state))]).collect()
}

/// Checks that this system can mount at all; says what to install.
pub(super) fn check_fuse() -> Result<(), CommandError> {
    let failed = |message: &str| Err(CommandError::new(Exit::Failure, message));
    if !Path::new("/dev/fuse").exists() {
        return failed("/dev/fuse is missing; load the kernel's module with: modprobe fuse");
    }
    // SAFETY: geteuid has no preconditions and cannot fail.
    let root = unsafe { libc::geteuid() } == 0;
    if !root && fuse::helper().is_none() {
        return failed(
            "fusermount3 is missing, without which only root can mount; install the package fuse3",
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Env, Layer, Raw};

    struct World {
        dir: tempfile::TempDir,
        config: Config,
    }

    fn world() -> World {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().canonicalize().unwrap();
        for folder in ["m", "replica", "state/in"] {
            std::fs::create_dir_all(root.join(folder)).unwrap();
        }
        let mut flags = Layer::default();
        flags.add_replica("a=replica", "--replica", &root);
        flags.set("state", "state", "--state");
        let env = Env { cwd: root, ..Env::default() };
        let config = Config::load(&Raw { flags, ..Raw::default() }, &env).unwrap();
        World { dir, config }
    }

    fn refuse(world: &World, path: &str, mounts: &[Mount]) -> (Exit, String) {
        let root = world.dir.path().canonicalize().unwrap();
        let error = check_against(&root.join(path), &world.config, mounts).unwrap_err();
        (error.exit, error.message.replace(&root.display().to_string(), "ROOT"))
    }

    #[test]
    fn an_empty_directory_is_fine_and_a_full_one_is_worth_a_word() {
        let world = world();
        let root = world.dir.path().canonicalize().unwrap();
        std::os::unix::fs::symlink("m", root.join("link")).unwrap();
        let checked = check_against(&root.join("link"), &world.config, &[]).unwrap();
        assert_eq!(checked, Checked { path: root.join("m"), warning: None });
        std::fs::write(root.join("m/x"), "").unwrap();
        let checked = check_against(&root.join("m"), &world.config, &[]).unwrap();
        assert!(checked.warning.unwrap().contains("is not empty"));
    }

    #[test]
    fn what_cannot_be_mounted_on_is_refused_with_a_remedy() {
        let world = world();
        std::fs::write(world.dir.path().join("file"), "").unwrap();
        for (path, message) in [
            ("none", "the mountpoint ROOT/none does not exist; create it with: mkdir -p ROOT/none"),
            ("file", "the mountpoint ROOT/file is not a directory"),
            (
                "replica",
                "the mountpoint ROOT/replica and the replica a (ROOT/replica) lie one within the other; choose another directory",
            ),
            (
                "state/in",
                "the mountpoint ROOT/state/in and the state folder (ROOT/state) lie one within the other; choose another directory",
            ),
            (
                "",
                "the mountpoint ROOT/ and the replica a (ROOT/replica) lie one within the other; choose another directory",
            ),
        ] {
            assert_eq!(refuse(&world, path, &[]), (Exit::Usage, message.to_owned()));
        }
    }

    #[test]
    fn a_mountpoint_in_use_is_refused() {
        let world = world();
        let mountpoint = world.dir.path().canonicalize().unwrap().join("m");
        let mount = |fstype: &str| Mount {
            mountpoint: mountpoint.clone(),
            fstype: fstype.into(),
            source: "x".into(),
            user: None,
        };
        assert_eq!(
            refuse(&world, "m", &[mount("ext4")]),
            (Exit::Usage, "the mountpoint ROOT/m is busy: ext4 is already mounted there; unmount it or choose another directory".into())
        );
        assert_eq!(
            refuse(&world, "m", &[mount("fuse.mirrorfs")]),
            (
                Exit::InUse,
                "the mountpoint ROOT/m is busy: a mirrorfs volume is already mounted there (see: mirrorfs status ROOT/m); unmount it with: mirrorfs umount ROOT/m, or choose another directory".into()
            )
        );
    }
}
