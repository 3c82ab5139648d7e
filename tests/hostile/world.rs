//! One prepared volume with three replicas, copies of it, and the commands that run on a copy.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use mirrorfs::format::names::ObjectName;
use mirrorfs::format::segment::verify_whole;
use mirrorfs::format::volume::{Claim, Release};

use super::forge::{self, Changes, Known, Put};
use crate::support::mount::{Failed, How, Mount, Volume, bytes_of};
use crate::support::run::{mirrorfs, wait_until};
use crate::support::tree::{Content, Snapshot};

/// The replica that the attacker writes to, and those that he does not.
pub const HOSTILE: &str = "c";
pub const GOOD: [&str; 2] = ["a", "b"];
/// Longest time of any command.
pub const BOUND: Duration = Duration::from_secs(60);
/// Most memory of any process.
const MOST_KIB: u64 = 256 << 10;
/// The most memory that was seen.
pub static PEAK_KIB: AtomicU64 = AtomicU64::new(0);

fn new_volume(name: &str) -> Option<Volume> {
    let mut volume = Volume::new(name)?;
    for replica in GOOD.iter().chain([&HOSTILE]) {
        volume.folder(replica);
    }
    volume.setting("commit_interval = \"300ms\"");
    // A pass runs when it is asked for.
    volume.setting("scrub_interval = \"off\"\ncheck_interval = \"off\"");
    Some(volume)
}

/// The volume before all attacks.
pub struct Prepared {
    volume: Volume,
    /// What it shows.
    pub tree: Snapshot,
    /// What the attacker knows.
    pub known: Known,
}

impl Prepared {
    /// A volume with a checkpoint, several segments and two tenures that have ended.
    pub fn new() -> Option<Self> {
        let volume = new_volume("hostile: the volume before")?;
        let mut content = Content::new(4);
        let mount = volume.mount();
        for dir in ["one", "one/two", "one/two/three", "many"] {
            fs::create_dir(mount.path(dir)).unwrap();
        }
        for i in 0..30 {
            fs::write(mount.path(format!("many/file{i}")), content.take(100 + 700 * i)).unwrap();
        }
        mount.sync();
        fs::write(mount.path("one/large"), content.take(300_000)).unwrap();
        // So much metadata, most of it removed again, that a small checkpoint is due.
        for count in [60, 15] {
            let attributes = |i: usize| (mount.path(format!("many/file{}", i % 30)), format!("user.a{i}"));
            for (file, name) in (0..count).map(attributes) {
                xattr::set(file, name, &content.take(60_000)).unwrap();
            }
            mount.sync();
            for (file, name) in (0..count).map(attributes) {
                xattr::remove(file, name).unwrap();
            }
            mount.sync();
        }
        fs::write(mount.path("one/two/small"), content.take(9000)).unwrap();
        fs::hard_link(mount.path("one/two/small"), mount.path("one/two/three/same")).unwrap();
        symlink("two/small", mount.path("one/link")).unwrap();
        mount.sync();
        let folders = GOOD.iter().chain([&HOSTILE]).map(|r| volume.path(&format!("replica-{r}")));
        let has_checkpoint =
            |folder: PathBuf| fs::read_dir(folder.join("checkpoints")).is_ok_and(|f| f.count() == 1);
        wait_until(BOUND, "a checkpoint on all replicas", || folders.clone().all(has_checkpoint));
        mount.unmount();
        let mount = volume.mount();
        for i in 0..3 {
            fs::write(mount.path(format!("one/after{i}")), content.take(20_000)).unwrap();
            fs::remove_file(mount.path(format!("many/file{i}"))).unwrap();
            mount.sync();
        }
        let tree = Snapshot::take(mount.root());
        mount.unmount();
        let objects = bytes_of(&volume.path("replica-a"));
        for other in ["b", HOSTILE] {
            assert!(objects == bytes_of(&volume.path(&format!("replica-{other}"))), "{other}");
        }
        Some(Self { known: Known::new(&objects), tree, volume })
    }

    /// A copy of it.
    pub fn copy(&self, name: &str) -> World {
        let volume = new_volume(name).unwrap();
        for folder in ["replica-a", "replica-b", "replica-c", "state"] {
            let from = self.volume.path(folder).join(".");
            let to = volume.path(folder);
            fs::create_dir_all(&to).unwrap();
            let done =
                Command::new("cp").args(["-a", "--reflink=auto", "--"]).arg(from).arg(to).status().unwrap();
            assert!(done.success());
        }
        let honest = bytes_of(&volume.path("replica-a"));
        World { volume, honest, forged: Vec::new() }
    }
}

/// How a command ended.
pub struct Ended {
    /// Its code; `None` when a signal ended it.
    pub code: Option<i32>,
    /// All that it printed.
    pub told: String,
}

/// A copy of the prepared volume, with an attacker.
pub struct World {
    volume: Volume,
    honest: BTreeMap<PathBuf, Vec<u8>>,
    forged: Vec<(String, Vec<u8>)>,
}

impl World {
    fn replica(&self, name: &str) -> PathBuf {
        self.volume.path(&format!("replica-{name}"))
    }

    /// Puts the attacker's objects onto his replica.
    pub fn attack(&mut self, changes: Changes) {
        let root = self.replica(HOSTILE);
        for (name, what) in changes {
            let path = root.join(&name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            if let Put::Outside = what {
                let outside = self.volume.path("outside");
                fs::rename(&path, &outside).unwrap();
                symlink(&outside, &path).unwrap();
                continue;
            }
            if path.is_file() {
                fs::remove_file(&path).unwrap();
            }
            match what {
                Put::Bytes(bytes) => {
                    fs::write(&path, &bytes).unwrap();
                    self.forged.push((name, bytes));
                }
                Put::Length(length) => File::create(&path).unwrap().set_len(length).unwrap(),
                Put::Fifo => {
                    let c = std::ffi::CString::new(path.as_os_str().as_bytes()).unwrap();
                    // SAFETY: a NUL-terminated string.
                    assert_eq!(unsafe { libc::mkfifo(c.as_ptr(), 0o600) }, 0);
                }
                Put::Folder => fs::create_dir(&path).unwrap(),
                Put::Nothing | Put::Outside => {}
            }
        }
    }

    /// What lies outside of the hostile replica and can be reached by a link in it.
    pub fn outside(&self) -> BTreeMap<PathBuf, Vec<u8>> {
        let outside = self.volume.path("outside");
        if outside.exists() { bytes_of(&outside) } else { BTreeMap::new() }
    }

    /// Mounts with this state folder; the daemon's words and its code when it is refused.
    pub fn mount(&self, state: &str, more: &[&str]) -> Result<Mount, Failed> {
        let how = more.iter().fold(How::usual().state(state), |how, arg| how.arg(arg));
        let began = Instant::now();
        let mounted = self.volume.try_mount(&how);
        assert!(began.elapsed() < BOUND, "the mount took {:?}", began.elapsed());
        match &mounted {
            Ok(mount) => check_words(&mount.told()),
            Err(failed) => {
                check_words(&failed.told);
                assert!(failed.code.is_some_and(|code| code != 101), "a crash: {}", failed.told);
                self.measure_refused(&how, failed);
            }
        }
        mounted
    }

    /// Mounts once more as before, to see how much memory a refusal takes.
    fn measure_refused(&self, how: &How, failed: &Failed) {
        let mut command = self.volume.command(how, &self.volume.path(&format!("mnt-{}", how.state)));
        let again = self.run(&mut command);
        assert_eq!(again.code, failed.code, "{}", again.told);
    }

    /// Runs a command within the bounds of time and memory.
    fn run(&self, command: &mut Command) -> Ended {
        let call = format!("{command:?}");
        let out = self.volume.path("out");
        let file = File::create(&out).unwrap();
        command.stdin(Stdio::null()).stdout(file.try_clone().unwrap()).stderr(file);
        let mut child = command.spawn().unwrap();
        let (until, mut peak) = (Instant::now() + BOUND, 0);
        let status = loop {
            // (What wait4 tells of memory counts ours, too: that of the process before its exec.)
            peak = peak.max(peak_kib(child.id()).unwrap_or(0));
            if let Some(status) = child.try_wait().unwrap() {
                break status;
            }
            if Instant::now() > until {
                child.kill().unwrap();
                child.wait().unwrap();
                panic!("{call}: still running after {BOUND:?}: {}", fs::read_to_string(&out).unwrap());
            }
            thread::sleep(Duration::from_millis(5));
        };
        let told = String::from_utf8_lossy(&fs::read(&out).unwrap()).into_owned();
        assert!(status.code().is_some_and(|code| code != 101), "{call}: ended with {status}: {told}");
        check_words(&told);
        check_peak(&call, peak);
        let code = status.code();
        Ended { code, told }
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = mirrorfs();
        command.env("XDG_STATE_HOME", self.volume.path("xdg")).args(args);
        command
    }

    /// Restores from one replica.
    pub fn restore(&self, replica: &str) -> (Ended, PathBuf) {
        let to = self.volume.path(&format!("from-{replica}"));
        let config = self.volume.config(&[]);
        let mut command = self.command(&["restore", "--from", replica, "--to"]);
        let ended = self.run(command.arg(&to).arg("--config").arg(config));
        (ended, to)
    }

    /// Waits until what was written is on the good replicas.
    pub fn sync(&self, mount: &Mount) {
        let mut command = self.command(&["sync", "--replicas", "2", "--timeout", "50"]);
        let ended = self.run(command.arg(mount.root()));
        assert_eq!(ended.code, Some(0), "sync: {}\n{}", ended.told, mount.told());
    }

    /// Looks at every byte of all replicas, and repairs.
    pub fn scrub(&self, mount: &Mount) -> Ended {
        let mut command = self.command(&["scrub", "start"]);
        self.run(command.arg(mount.root()).args(["--deep", "--wait"]))
    }

    /// Ends a mount within the bound; what it took of memory was within its bound, too.
    pub fn unmount(&self, mount: Mount) {
        check_peak("the daemon", peak_kib(mount.pid()).unwrap());
        check_words(&mount.told());
        let began = Instant::now();
        mount.unmount();
        assert!(began.elapsed() < BOUND, "the unmount took {:?}", began.elapsed());
    }

    /// The hostile replica holds every object of a good one, byte for byte.
    pub fn check_repaired(&self) {
        let root = self.replica(HOSTILE);
        for (path, bytes) in bytes_of(&self.replica("a")) {
            let found = fs::read(root.join(&path));
            assert!(found.is_ok_and(|found| found == bytes), "{} is not repaired", path.display());
        }
    }

    /// The good replicas are equal, hold what they held before, and beside it only what an honest
    /// writer has made.
    pub fn check_good(&self) {
        let [a, b] = GOOD.map(|name| bytes_of(&self.replica(name)));
        assert!(a.keys().eq(b.keys()), "{:?} and {:?}", a.keys(), b.keys());
        for (path, bytes) in &a {
            assert!(*bytes == b[path], "{} differs between the good replicas", path.display());
        }
        for (path, bytes) in &self.honest {
            assert!(a.get(path) == Some(bytes), "{} was changed or removed", path.display());
        }
        for (path, bytes) in a.iter().filter(|(path, _)| !self.honest.contains_key(*path)) {
            let name = path.to_str().unwrap();
            let forged = self.forged.iter().any(|(n, made)| n == name && made == bytes);
            assert!(!forged && self.is_honest(name, bytes, &a), "{name} came to the good replicas");
        }
    }

    /// Whether an object after the attack is one that our own program may have made.
    fn is_honest(&self, name: &str, bytes: &[u8], all: &BTreeMap<PathBuf, Vec<u8>>) -> bool {
        let is_new = |name: ObjectName| !self.honest.contains_key(Path::new(&name.path()));
        let honest_claim = |epoch| {
            let name = ObjectName::Claim(epoch);
            let claim = all.get(Path::new(&name.path())).map(|bytes| Claim::decode(bytes, epoch).unwrap());
            claim.filter(|claim| is_new(name) && claim.claim_id != forge::ID && claim.host != forge::HOST)
        };
        match ObjectName::parse(name) {
            Some(ObjectName::Claim(epoch)) => honest_claim(epoch).is_some(),
            Some(ObjectName::Release(epoch)) => {
                let release = Release::decode(bytes, epoch).unwrap();
                honest_claim(epoch).is_some_and(|claim| claim.claim_id == release.claim_id)
            }
            Some(ObjectName::Segment(number, epoch)) => {
                let meta = verify_whole(bytes).unwrap();
                let mine = meta.footer.expect(meta.footer.header.volume, number, epoch).is_ok();
                mine && honest_claim(epoch).is_some()
            }
            Some(ObjectName::CheckpointManifest(_, epoch) | ObjectName::CheckpointPart(_, epoch, _)) => {
                honest_claim(epoch).is_some()
            }
            Some(ObjectName::Volume) | None => false,
        }
    }
}

/// The most memory that a process has had; `None` when it has ended.
fn peak_kib(pid: u32) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    line.split_whitespace().next()?.parse().ok()
}

fn check_peak(what: &str, kib: u64) {
    PEAK_KIB.fetch_max(kib, Ordering::Relaxed);
    if kib > MOST_KIB / 2 {
        println!("{kib} KiB: {what}");
    }
    assert!(kib < MOST_KIB, "{what} took {kib} KiB");
}

/// Nothing that was made by somebody else reaches the terminal as a control character.
fn check_words(told: &str) {
    let raw = told.chars().find(|c| c.is_control() && !matches!(c, '\n' | '\t' | '\r'));
    assert!(raw.is_none(), "{raw:?} in {told:?}");
}
