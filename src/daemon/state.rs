//! The local state folder: its lock, and the file that says whose state it is.
//!
//! Owns `LOCK`, `state.json` and `claiming.json`, and the names of everything else in the folder. Knows no content of it.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::Error;
use crate::exit::Exit;
use crate::format::MAX_JSON;
use crate::format::volume::{Claim, Volume, check_block_size};
use crate::fuse::{MountIdentity, mountinfo};
use crate::ids::Epoch;
use crate::replica::FenceNote;

/// Version of the state folder's layout: 2 since the tables may hold patches, which whoever does not know them would not apply.
const VERSION: u32 = 2;
/// The oldest layout that is carried over: it differs only by what version 2 adds.
const OLDEST: u32 = 1;

/// How long a daemon whose mount is gone may take: it seals, and sends for some seconds or, on demand, minutes.
const ENDING: Duration = Duration::from_secs(180);
/// How long it may take to notice that its mount is gone. Longer, and somebody still uses what was detached.
const UNNOTICED: Duration = Duration::from_secs(10);
/// How often to look.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// Name of the file with claims that are being made while there is no `state.json` yet.
const CLAIMING: &str = "claiming.json";

/// What `state.json` says. It is written last when a state is built, so a folder without it holds nothing of value.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub(super) struct Local {
    version: u32,
    /// The volume.
    pub volume: Volume,
    /// All known claims by ascending epoch; the last one is ours.
    pub claims: Vec<Claim>,
    /// The first epoch that this folder claimed: what others claimed before is in `claims` as far as it was seen, what
    /// others claim after it takes the volume from us.
    #[serde(default)]
    pub own_since: Epoch,
    /// Built by a read-only mount, which claims nothing: thrown away by the next mount.
    pub borrowed: bool,
    /// A rebuild of the tables is under way; its name is that of the folder with the damaged ones.
    #[serde(default)]
    pub rebuild: Option<String>,
    /// Another writer ended our tenure: nothing may be written with this state any more.
    #[serde(default)]
    pub fenced: Option<FenceNote>,
}

impl Local {
    pub fn new(volume: Volume, claims: Vec<Claim>, borrowed: bool) -> Self {
        Self { version: VERSION, volume, claims, own_since: Epoch(0), borrowed, rebuild: None, fenced: None }
    }

    /// Our claim.
    pub fn claim(&self) -> Option<&Claim> {
        self.claims.last().filter(|_| !self.borrowed)
    }

    /// Our epoch; 0 for none.
    pub fn epoch(&self) -> Epoch {
        self.claim().map_or(Epoch(0), |c| c.epoch)
    }
}

/// The locked state folder.
pub(super) struct StateDir {
    dir: PathBuf,
    lock: File,
}

/// What the holder of a lock has noted in it.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Holder {
    /// Its process.
    pub pid: Option<u32>,
    /// Its mount.
    pub mounted: Option<MountIdentity>,
    /// Its mount is gone, and it is about to end.
    pub ending: bool,
}

impl Holder {
    pub fn parse(text: &str) -> Self {
        let mut lines = text.lines();
        let pid = lines.next().and_then(|line| line.trim().parse().ok());
        let (mut mounted, mut ending) = (None, false);
        for line in lines {
            match line.split_once(' ') {
                Some(("mounted", mount)) => {
                    let (device, unique) = mount.split_once(' ').unwrap_or((mount, "0"));
                    let unique = unique.trim().parse().unwrap_or(0);
                    mounted = Some(MountIdentity { device: device.to_owned(), unique });
                }
                _ => ending |= line == "ending",
            }
        }
        Self { pid, mounted, ending }
    }

    /// How long it is worth waiting for it to let go. `device_is_mounted` tells whether its mount is still there.
    fn patience(&self, device_is_mounted: impl FnOnce(&str) -> bool) -> Duration {
        match &self.mounted {
            _ if self.ending => ENDING,
            Some(mount) if !device_is_mounted(&mount.device) => UNNOTICED,
            _ => Duration::ZERO,
        }
    }

    fn device_is_mounted(&self, device: &str) -> bool {
        let all =
            self.pid.map_or_else(mountinfo::mounts, mountinfo::mounts_of).or_else(|_| mountinfo::mounts());
        all.unwrap_or_default().iter().any(|m| m.device == device && mountinfo::is_mirrorfs(m))
    }
}

fn in_use(dir: &Path, holder: &Holder) -> Error {
    let by = holder.pid.map_or_else(String::new, |pid| format!(" (process {pid})"));
    let advice = match (&holder.mounted, holder.ending) {
        (_, true) => "it is still ending; try again later",
        (Some(mount), _) if !holder.device_is_mounted(&mount.device) => {
            "its mount was detached while programs use it; end them (see: fuser -v), or ask it to end with SIGTERM"
        }
        _ => "unmount that one first (see: mirrorfs status)",
    };
    let message = format!("the state folder {} is in use by another daemon{by}: {advice}", dir.display());
    Error::new(Exit::InUse, message)
}

fn failed(what: &str, path: &Path, e: &io::Error) -> Error {
    Error::new(Exit::Failure, format!("cannot {what} {}: {e}", path.display()))
}

/// Replaces a small file of a state folder, for its owner only, so that a crash leaves the old one or the new one.
pub(super) fn write_durably(dir: &Path, name: &str, bytes: &[u8]) -> io::Result<()> {
    let temporary = dir.join(format!("{name}.new"));
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&temporary)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(&temporary, dir.join(name))?;
    File::open(dir)?.sync_all()
}

impl StateDir {
    /// Makes the folder if need be and locks it.
    pub fn lock(dir: &Path) -> Result<Self, Error> {
        Self::try_lock(dir)?.map_err(|holder| in_use(dir, &holder))
    }

    /// The same; waits for a daemon that is just ending, because its mount is gone.
    pub async fn lock_when_free(dir: &Path) -> Result<Self, Error> {
        let begin = Instant::now();
        let mut told = false;
        loop {
            let holder = match Self::try_lock(dir)? {
                Ok(state) => return Ok(state),
                Err(holder) => holder,
            };
            if begin.elapsed() >= holder.patience(|device| holder.device_is_mounted(device)) {
                return Err(in_use(dir, &holder));
            }
            if !std::mem::replace(&mut told, true) {
                let pid = holder.pid.map_or_else(String::new, |pid| format!(" (process {pid})"));
                log::info!("waiting for the daemon of the last mount{pid}, which is ending");
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    fn try_lock(dir: &Path) -> Result<Result<Self, Holder>, Error> {
        crate::config::state::create(dir).map_err(|e| failed("use the state folder", dir, &e))?;
        let path = dir.join("LOCK");
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .map_err(|e| failed("open", &path, &e))?;
        // SAFETY: the descriptor is open; flock touches no memory.
        if unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) } != 0 {
            let mut holder = String::new();
            let _ = file.read_to_string(&mut holder);
            return Ok(Err(Holder::parse(&holder)));
        }
        let state = Self { dir: dir.to_owned(), lock: file };
        state.note("").map_err(|e| failed("write", &path, &e))?;
        Ok(Ok(state))
    }

    /// Notes the mount, so that others can tell whether it is still there.
    pub fn note_mounted(&self, mount: &MountIdentity) {
        self.note_or_warn(&format!("mounted {} {}\n", mount.device, mount.unique));
    }

    /// Notes that the mount is gone and the lock will be free soon.
    pub fn note_ending(&self) {
        self.note_or_warn("ending\n");
    }

    fn note_or_warn(&self, more: &str) {
        if let Err(e) = self.note(more) {
            log::debug!("LOCK in {} is not up to date: {e}", self.dir.display());
        }
    }

    /// Written at once and over what was there: whoever reads sees one or the other.
    fn note(&self, more: &str) -> io::Result<()> {
        let text = format!("{}\n{more}", std::process::id());
        self.lock.write_all_at(text.as_bytes(), 0)?;
        self.lock.set_len(text.len() as u64)
    }

    pub fn path(&self) -> &Path {
        &self.dir
    }

    pub fn slots(&self) -> PathBuf {
        self.dir.join("slots")
    }

    pub fn staging(&self) -> PathBuf {
        self.dir.join("staging")
    }

    /// What the folder is the state of; `None` when nothing was completed here.
    pub fn read(&self) -> Result<Option<Local>, Error> {
        Self::read_in(&self.dir)
    }

    fn read_in(dir: &Path) -> Result<Option<Local>, Error> {
        let path = dir.join("state.json");
        let bytes = match read_at_most(&path, MAX_JSON as u64) {
            Ok(bytes) => bytes,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(failed("read", &path, &e)),
        };
        let decoded = serde_json::from_slice(&bytes).map_err(|e| e.to_string()).and_then(|local: Local| {
            check_block_size(local.volume.block_size).map_err(|e| e.to_string())?;
            Ok(local)
        });
        let mut local = decoded.map_err(|e| {
            Error::new(
                Exit::Damaged,
                format!(
                    "{} is damaged ({e}): move the state folder {} away and mount again to rebuild it from the \
                     replicas; what they lack is then missing",
                    path.display(),
                    dir.display()
                ),
            )
        })?;
        if !(OLDEST..=VERSION).contains(&local.version) {
            return Err(Error::new(
                Exit::TooNew,
                format!(
                    "the state folder {} has layout version {}, this mirrorfs knows {VERSION}: use the version that \
                     made it, or unmount there and rebuild with an empty folder",
                    dir.display(),
                    local.version
                ),
            ));
        }
        local.version = VERSION;
        Ok(Some(local))
    }

    /// Completes or changes the state: from now on the folder counts, and claims noted before it are in it.
    pub fn write(&self, local: &Local) -> Result<(), Error> {
        write_json(&self.dir, "state.json", local)?;
        match fs::remove_file(self.dir.join(CLAIMING)) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => {
                Err(failed("remove", &self.dir.join(CLAIMING), &e))
            }
            _ => Ok(()),
        }
    }

    /// Notes a claim that is about to be made while there is no `state.json` yet: after a crash in between, the next
    /// mount knows it as its own.
    pub fn intend(&self, claim: &Claim) -> Result<(), Error> {
        let mut claims = self.intended();
        claims.push(claim.clone());
        write_json(&self.dir, CLAIMING, &claims)
    }

    /// The claims of earlier mounts with this folder that did not complete it.
    pub fn intended(&self) -> Vec<Claim> {
        let bytes = read_at_most(&self.dir.join(CLAIMING), MAX_JSON as u64).unwrap_or_default();
        // Damaged, it is only missing: then the person who mounts is asked.
        serde_json::from_slice(&bytes).unwrap_or_default()
    }

    /// Notes that another writer ended this state's tenure, unless that was noted before. `dir` is locked by this
    /// process.
    pub fn note_fence(dir: &Path, note: &FenceNote) -> Result<(), Error> {
        match Self::read_in(dir)? {
            Some(mut local) if local.fenced.is_none() => {
                local.fenced = Some(note.clone());
                write_json(dir, "state.json", &local)
            }
            _ => Ok(()),
        }
    }

    /// Moves everything but the lock aside into `quarantine-LABEL`; answers that folder, or `None` when there was nothing.
    pub fn set_aside(&self, label: &str) -> Result<Option<PathBuf>, Error> {
        const KEEP: [&str; 8] = [
            "LOCK",
            CLAIMING,
            "replicas",
            super::members::FILE,
            "daemon.log",
            "daemon.log.old",
            "ballast",
            crate::control::SOCKET,
        ];
        let free = |n: u32| {
            let suffix = if n == 0 { String::new() } else { format!("-{n}") };
            self.dir.join(format!("quarantine-{label}{suffix}"))
        };
        let target = (0..).map(free).find(|path| !path.exists()).unwrap_or_else(|| free(0));
        let mut moved = false;
        let entries = fs::read_dir(&self.dir).map_err(|e| failed("read", &self.dir, &e))?;
        for entry in entries {
            let entry = entry.map_err(|e| failed("read", &self.dir, &e))?;
            let name = entry.file_name();
            let text = name.to_string_lossy();
            if KEEP.contains(&&*text) || text.starts_with("quarantine-") {
                continue;
            }
            if !moved {
                fs::create_dir_all(&target).map_err(|e| failed("make", &target, &e))?;
                moved = true;
            }
            fs::rename(entry.path(), target.join(&name)).map_err(|e| failed("move", &entry.path(), &e))?;
        }
        Ok(moved.then_some(target))
    }

    /// Removes what a read-only mount built: it holds nothing that the replicas lack.
    pub fn clear(&self) -> Result<(), Error> {
        for name in ["state.json", "slots", "witness", "kept"] {
            let path = self.dir.join(name);
            match fs::remove_file(&path) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(failed("remove", &path, &e)),
                _ => {}
            }
        }
        for name in ["db", "tail", "staging"] {
            let path = self.dir.join(name);
            match fs::remove_dir_all(&path) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(failed("remove", &path, &e)),
                _ => {}
            }
        }
        Ok(())
    }
}

/// Replaces a file by a value, durably and all at once.
fn write_json<T: serde::Serialize>(dir: &Path, name: &str, value: &T) -> Result<(), Error> {
    let written = serde_json::to_vec_pretty(value)
        .map_err(io::Error::from)
        .and_then(|bytes| write_durably(dir, name, &bytes));
    written.map_err(|e| failed("write", &dir.join(name), &e))
}

/// Reads a file that has at most `most` bytes.
pub(super) fn read_at_most(path: &Path, most: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    fs::File::open(path)?.take(most + 1).read_to_end(&mut bytes)?;
    match bytes.len() as u64 > most {
        true => Err(io::Error::new(io::ErrorKind::FileTooLarge, format!("it has more than {most} bytes"))),
        false => Ok(bytes),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::volume::testing::{self, volume};

    fn mount(device: &str, unique: u64) -> MountIdentity {
        MountIdentity { device: device.into(), unique }
    }

    #[test]
    fn one_daemon_per_state() {
        let dir = tempfile::tempdir().unwrap();
        let first = StateDir::lock(dir.path()).unwrap();
        let error = StateDir::lock(dir.path()).err().unwrap();
        assert_eq!(error.exit_code(), Exit::InUse);
        assert!(error.to_string().contains(&std::process::id().to_string()), "{error}");
        drop(first);
        StateDir::lock(dir.path()).unwrap();
    }

    #[test]
    fn only_a_holder_without_its_mount_is_waited_for() {
        let holder = Holder::parse("77\nmounted 0:45\n");
        assert_eq!(holder, Holder { pid: Some(77), mounted: Some(mount("0:45", 0)), ending: false });
        assert_eq!(holder.patience(|device| device == "0:45"), Duration::ZERO);
        assert_eq!(holder.patience(|_| false), UNNOTICED);
        assert_eq!(Holder::parse("77\nending\n").patience(|_| true), ENDING);
        // Another command, an older daemon, or one that is just opening.
        for text in ["77\n", "", "x"] {
            assert_eq!(Holder::parse(text).patience(|_| false), Duration::ZERO, "{text:?}");
        }
    }

    #[tokio::test]
    async fn a_lock_about_to_be_freed_is_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let first = StateDir::lock(dir.path()).unwrap();
        first.note_mounted(&mount("0:999999", 7));
        first.note_ending();
        let begin = Instant::now();
        let waiting = tokio::spawn({
            let dir = dir.path().to_owned();
            async move { StateDir::lock_when_free(&dir).await.map(drop) }
        });
        tokio::time::sleep(Duration::from_millis(100)).await;
        assert!(!waiting.is_finished());
        drop(first);
        waiting.await.unwrap().unwrap();
        assert!(begin.elapsed() < ENDING);
    }

    #[test]
    fn claims_are_known_again_until_the_state_is_complete() {
        let dir = tempfile::tempdir().unwrap();
        let state = StateDir::lock(dir.path()).unwrap();
        let claim = |epoch: u32| testing::claim(epoch, epoch as u8, 1);
        assert!(state.intended().is_empty());
        state.intend(&claim(3)).unwrap();
        fs::write(dir.path().join("witness"), "x").unwrap();
        state.set_aside("x").unwrap().unwrap();
        state.intend(&claim(4)).unwrap();
        assert_eq!(state.intended(), [claim(3), claim(4)]);
        state.write(&Local::new(volume(1), vec![claim(4)], false)).unwrap();
        assert!(state.intended().is_empty());
    }

    #[test]
    fn state_round_trips_and_damage_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let state = StateDir::lock(dir.path()).unwrap();
        assert_eq!(state.read().unwrap(), None);
        let local = Local::new(volume(1), Vec::new(), true);
        state.write(&local).unwrap();
        assert_eq!(state.read().unwrap(), Some(local.clone()));
        let note = FenceNote {
            at: 7,
            replica: "a".parse().unwrap(),
            epoch: Epoch(2),
            claim: None,
            first_segment: None,
            text: "taken over".into(),
        };
        StateDir::note_fence(dir.path(), &note).unwrap();
        StateDir::note_fence(dir.path(), &FenceNote { at: 8, ..note.clone() }).unwrap();
        assert_eq!(
            state.read().unwrap(),
            Some(Local { fenced: Some(note), ..local }),
            "the first one is kept"
        );
        let path = dir.path().join("state.json");
        let text = fs::read_to_string(&path).unwrap();
        let with = |n: u32| text.replace("\"version\": 2", &format!("\"version\": {n}")).into_bytes();
        let of = |n: u32| {
            fs::write(&path, with(n)).unwrap();
            state.read()
        };
        assert_eq!(of(1).unwrap(), of(2).unwrap(), "an older layout is carried over");
        assert_ne!(with(1), with(2));
        for other in [0, 3] {
            assert_eq!(of(other).unwrap_err().exit_code(), Exit::TooNew);
        }
        fs::write(&path, b"{").unwrap();
        assert_eq!(state.read().unwrap_err().exit_code(), Exit::Damaged);
        let aside = state.set_aside("x").unwrap().unwrap();
        assert!(aside.join("state.json").exists());
        assert_eq!(state.read().unwrap(), None);
        assert_eq!(state.set_aside("y").unwrap(), None);
    }
}
