//! From a mountpoint to the daemon that serves it.

use std::path::{Path, PathBuf};

use super::{CommandError, human};
use crate::config::Env;
use crate::control::mounts::{self, Mount};
use crate::control::{Client, Entry, Registry};
use crate::daemon::last_crash;
use crate::exit::Exit;
use crate::replica::unix_now;

/// A live mount of mirrorfs.
#[derive(Clone, Debug)]
pub(super) struct Located {
    /// Where it is mounted.
    pub mountpoint: PathBuf,
    /// Who mounted it, as the kernel noted; whose daemon may be asked.
    pub user: Option<u32>,
    /// What the registry says of its daemon; missing when the daemon was started by another user, or its entry is lost.
    pub entry: Option<Entry>,
}

impl Located {
    /// The daemon to ask.
    pub fn client(&self) -> Result<Client, CommandError> {
        let unknown = || {
            let mountpoint = self.mountpoint.display();
            let message = format!(
                "cannot tell which daemon serves {mountpoint}; ask as the user who mounted it, or as root"
            );
            CommandError::new(Exit::NotMounted, message)
        };
        let entry = self.entry.as_ref().ok_or_else(unknown)?;
        self.user.map(|user| Client::new(&entry.state, user)).ok_or_else(unknown)
    }

    /// Whether its daemon's process runs; `None` when it is not known which one that is.
    pub fn daemon_lives(&self) -> Option<bool> {
        self.entry.as_ref().map(|entry| alive(entry.pid))
    }

    /// The same error, told better when the reason is that the daemon has died.
    pub fn explain(&self, error: CommandError) -> CommandError {
        let Some(entry) = self.entry.as_ref().filter(|e| error.exit == Exit::NotMounted && !alive(e.pid))
        else {
            return error;
        };
        CommandError::new(Exit::NotMounted, death(&self.mountpoint, entry, unix_now()))
    }
}

/// What is known of a daemon's death, that nothing synced is lost, and what to do.
fn death(mountpoint: &Path, entry: &Entry, now: f64) -> String {
    let shown = mountpoint.display();
    let log = entry.state.join(super::background::LOG);
    let note = last_crash(&entry.state).filter(|note| note.pid == entry.pid);
    let (how, then) = match &note {
        Some(note) => (format!(" {} ago: {}", human::seconds(now - note.at), note.how), note.then.meaning()),
        None => (String::new(), "Its guardian has died, too"),
    };
    format!(
        "the daemon of {shown} (process {}) has died{how}. Everything that was fsynced is safe in {}. {then}. To \
         go on, mount again; to remove the dead mount: mirrorfs umount {shown}. See {}",
        entry.pid,
        entry.state.display(),
        log.display()
    )
}

/// Whether a process runs. One that has ended but whose parent has not noticed has let go of everything.
pub(super) fn alive(pid: u32) -> bool {
    let Ok(stat) = std::fs::read(format!("/proc/{pid}/stat")) else { return false };
    // "77 (name) S …"; the name may hold anything, also parentheses.
    let state = stat.iter().rposition(|b| *b == b')').and_then(|end| stat.get(end + 2));
    !matches!(state, Some(b'Z' | b'X'))
}

/// Every mount of mirrorfs that the kernel has, in the order they were made.
pub(super) fn all() -> Result<Vec<Located>, CommandError> {
    let registry = Registry::of_user();
    let mounts = read_mounts()?;
    // A guardian's placeholder counts when no volume lies on it.
    let shown =
        |m: &&Mount| m.is_mirrorfs() || m.is_placeholder() && mounts::at(&mounts, &m.mountpoint) == Some(*m);
    Ok(mounts.iter().filter(shown).map(|m| located(m, &mounts, &registry)).collect())
}

/// The mount at `given`, or around it when `within` is set.
pub(super) fn find(given: &Path, within: bool) -> Result<Located, CommandError> {
    let env = Env::current()?;
    let mounts = read_mounts()?;
    let mount = candidates(&env.cwd.join(given))
        .filter_map(|path| if within { mounts::around(&mounts, &path) } else { mounts::at(&mounts, &path) })
        .find(|mount| mount.is_mirrorfs() || mount.is_placeholder());
    match mount {
        Some(mount) => Ok(located(mount, &mounts, &Registry::of_user())),
        None => Err(CommandError::new(
            Exit::NotMounted,
            format!("no mirrorfs volume is mounted on {}; see all with: mirrorfs status", given.display()),
        )),
    }
}

/// The mount at or around `given`; without it the one around the working directory, else the only one there is.
pub(super) fn one(given: Option<&Path>) -> Result<Located, CommandError> {
    if let Some(given) = given {
        return find(given, true);
    }
    if let Ok(here) = find(Path::new("."), true) {
        return Ok(here);
    }
    let mut all = all()?;
    match all.len() {
        1 => Ok(all.remove(0)),
        0 => Err(CommandError::new(Exit::NotMounted, "no mirrorfs volume is mounted")),
        _ => {
            let names: Vec<_> = all.iter().map(|l| l.mountpoint.display().to_string()).collect();
            Err(CommandError::new(
                Exit::Usage,
                format!("several volumes are mounted, name one: {}", names.join(", ")),
            ))
        }
    }
}

fn located(mount: &Mount, all: &[Mount], registry: &Registry) -> Located {
    Located { mountpoint: mount.mountpoint.clone(), user: mount.user, entry: registry.find(mount, all) }
}

pub(super) fn read_mounts() -> Result<Vec<Mount>, CommandError> {
    mounts::all()
        .map_err(|error| CommandError::new(Exit::Failure, format!("cannot read the list of mounts: {error}")))
}

/// Absolute forms of a path. First without asking the last component, because a mountpoint whose daemon is dead
/// answers nothing; then with all symbolic links resolved.
fn candidates(path: &Path) -> impl Iterator<Item = PathBuf> + '_ {
    let without_last = || {
        let last = path.file_name()?;
        Some(path.parent()?.canonicalize().ok()?.join(last))
    };
    without_last().into_iter().chain(std::iter::once_with(|| path.canonicalize().ok()).flatten())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_is_tried_before_its_links_are_resolved() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().canonicalize().unwrap();
        std::fs::create_dir(root.join("m")).unwrap();
        std::os::unix::fs::symlink("m", root.join("link")).unwrap();
        let found: Vec<PathBuf> = candidates(&root.join("link")).collect();
        assert_eq!(found, [root.join("link"), root.join("m")]);
        let trailing = PathBuf::from(format!("{}/m/", root.display()));
        assert_eq!(candidates(&trailing).next(), Some(root.join("m")));
    }

    #[test]
    fn a_process_is_seen_to_live_and_to_end() {
        assert!(alive(std::process::id()));
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let pid = child.id();
        let located = |pid| Located {
            mountpoint: "/m".into(),
            user: Some(0),
            entry: Some(Entry { mountpoint: "/m".into(), state: "/s".into(), pid }),
        };
        assert_eq!(located(pid).daemon_lives(), Some(true));
        child.kill().unwrap();
        // Not yet waited for, it is a zombie, which counts as ended.
        let begin = std::time::Instant::now();
        while alive(pid) && begin.elapsed() < std::time::Duration::from_secs(10) {
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        assert!(!alive(pid));
        let error = located(pid).explain(CommandError::new(Exit::NotMounted, "refused"));
        assert!(error.message.contains("has died. Everything that was fsynced is safe in /s. Its guardian has died, too. To go on, mount again"), "{error}");
        let error = located(pid).explain(CommandError::new(Exit::TimedOut, "late"));
        assert_eq!(error.message, "late");
        child.wait().unwrap();
        assert!(!alive(pid));
    }

    #[test]
    fn what_is_not_mounted_is_said_so() {
        let dir = tempfile::tempdir().unwrap();
        let error = find(dir.path(), false).unwrap_err();
        assert_eq!(error.exit, Exit::NotMounted);
        assert!(error.message.contains("no mirrorfs volume is mounted on"), "{}", error.message);
    }
}
