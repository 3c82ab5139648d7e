//! Volumes and mounts that clean up after themselves.
//!
//! A [`Volume`] is a temporary folder with replicas, state and mountpoints in it, and the configuration that names them. A
//! [`Mount`] is a daemon in the foreground, our child. Whatever happens to a test, its daemons are killed and its mounts
//! detached; when it fails, the daemon's log is printed.

use std::fs::{self, File, OpenOptions};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use mirrorfs::fuse::mountinfo;
use mirrorfs::replica::ReplicaSpec;

use super::run::{Ran, mirrorfs, run, wait_until};

/// Longest time that any one command may take.
pub const LIMIT: Duration = Duration::from_secs(180);
/// Longest time that one mount may live: then its daemon is killed, so that whoever waits for it gets an error.
const WATCHDOG: Duration = Duration::from_secs(600);

/// A volume to be mounted.
pub struct Volume {
    dir: tempfile::TempDir,
    replicas: Vec<(String, String)>,
    settings: Vec<String>,
    test: String,
}

/// How to mount it.
#[derive(Clone, Default)]
pub struct How {
    /// Only these replicas; all when empty.
    pub only: Vec<String>,
    /// Name of the state folder, below the volume's.
    pub state: String,
    /// More arguments.
    pub args: Vec<String>,
    /// More variables.
    pub vars: Vec<(String, String)>,
}

impl How {
    /// As usual: all replicas, the state of always.
    pub fn usual() -> Self {
        Self { state: "state".into(), ..Self::default() }
    }

    /// With this state folder.
    pub fn state(mut self, name: &str) -> Self {
        name.clone_into(&mut self.state);
        self
    }

    /// With only these replicas.
    pub fn only(mut self, names: &[&str]) -> Self {
        self.only = names.iter().map(|n| (*n).to_owned()).collect();
        self
    }

    /// With this argument too.
    pub fn arg(mut self, arg: &str) -> Self {
        self.args.push(arg.to_owned());
        self
    }

    /// With this variable too.
    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.vars.push((name.to_owned(), value.to_owned()));
        self
    }
}

impl Volume {
    /// An empty one without replicas; `None`, visibly, when `MIRRORFS_SKIP_FUSE=1`.
    ///
    /// Panics when this machine cannot mount at all: silence would look like success.
    pub fn new(test: &str) -> Option<Self> {
        if std::env::var_os("MIRRORFS_SKIP_FUSE").is_some_and(|v| v == "1") {
            println!("SKIP: {test}: MIRRORFS_SKIP_FUSE=1");
            return None;
        }
        let device = OpenOptions::new().read(true).write(true).open("/dev/fuse");
        assert!(
            device.is_ok(),
            "{test}: /dev/fuse cannot be used ({device:?}); set MIRRORFS_SKIP_FUSE=1 to do without these tests"
        );
        let dir = tempfile::Builder::new().prefix("mf").tempdir().unwrap();
        Some(Self { dir, replicas: Vec::new(), settings: Vec::new(), test: test.to_owned() })
    }

    /// A path in the volume's folder.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Adds a local folder as a replica, and answers where it is.
    pub fn folder(&mut self, name: &str) -> PathBuf {
        let path = self.path(&format!("replica-{name}"));
        fs::create_dir(&path).unwrap();
        self.replica(name, path.to_str().unwrap(), &[]);
        path
    }

    /// Adds a replica.
    pub fn replica(&mut self, name: &str, url: &str, options: &[(&str, &str)]) {
        let mut table = format!("[replica.{name}]\nurl = {url:?}\n");
        for (key, value) in options {
            table.push_str(&format!("{key} = {value:?}\n"));
        }
        self.replicas.push((name.to_owned(), table));
    }

    /// Adds a replica as it was specified.
    pub fn spec(&mut self, spec: &ReplicaSpec) {
        let options: Vec<_> = spec.options.iter().map(|(k, v)| (k.as_str(), v.as_str())).collect();
        self.replica(spec.name.as_str(), &spec.url, &options);
    }

    /// Adds a line to the head of the configuration, such as `cache_size = "64MiB"`.
    pub fn setting(&mut self, line: &str) {
        self.settings.push(line.to_owned());
    }

    /// Writes the configuration with these replicas (all when empty).
    pub fn config(&self, only: &[String]) -> PathBuf {
        let mut text = self.settings.join("\n") + "\n";
        for (name, table) in &self.replicas {
            if only.is_empty() || only.contains(name) {
                text.push_str(table);
            }
        }
        let path =
            self.path(&format!("{}.toml", if only.is_empty() { "all".into() } else { only.join("-") }));
        fs::write(&path, text).unwrap();
        path
    }

    /// The command that would mount it in the foreground at `mountpoint`.
    pub fn command(&self, how: &How, mountpoint: &Path) -> Command {
        let mut command = mirrorfs();
        command.env("XDG_STATE_HOME", self.path("xdg")).env("MIRRORFS_LOG", log_filter());
        // The daemon itself is our child, so that a test can kill exactly it. Guardians have tests of their own.
        command.arg("mount").arg(mountpoint).arg("--foreground").arg("--unguarded");
        command.arg("--config").arg(self.config(&how.only));
        command.arg("--state").arg(self.path(&how.state)).args(&how.args);
        command.envs(how.vars.iter().map(|(name, value)| (name, value)));
        command
    }

    /// Mounts as usual.
    #[track_caller]
    pub fn mount(&self) -> Mount {
        self.mount_as(&How::usual())
    }

    /// Mounts; panics with the daemon's words when it does not work.
    #[track_caller]
    pub fn mount_as(&self, how: &How) -> Mount {
        self.try_mount(how)
            .unwrap_or_else(|e| panic!("{}: cannot mount: {} ({:?})", self.test, e.told, e.code))
    }

    /// Mounts, or answers what the daemon said.
    pub fn try_mount(&self, how: &How) -> Result<Mount, Failed> {
        self.start(how).live()
    }

    /// Starts the daemon and does not wait until it is live.
    pub fn start(&self, how: &How) -> Mount {
        // The state may lie elsewhere.
        let name = how.state.trim_start_matches('/').replace('/', "-");
        let mountpoint = self.path(&format!("mnt-{name}"));
        if !is_mounted(&mountpoint) {
            fs::create_dir_all(&mountpoint).unwrap();
        }
        let log = self.path(&format!("{name}.log"));
        let out = OpenOptions::new().create(true).append(true).open(&log).unwrap();
        let at = out.metadata().unwrap().len();
        let mut command = self.command(how, &mountpoint);
        command.stdin(Stdio::null()).stdout(out.try_clone().unwrap()).stderr(out);
        // SAFETY: prctl may be called between fork and exec. The daemon dies with the thread that runs the test.
        unsafe {
            command.pre_exec(|| {
                libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                Ok(())
            });
        }
        let child = command.spawn().unwrap();
        let watchdog = Watchdog::start(child.id(), self.test.clone());
        Mount { child: Some(child), mountpoint, log, log_start: at, _watchdog: watchdog }
    }

    /// Runs `mirrorfs` with these arguments and this volume's configuration.
    pub fn run(&self, only: &[&str], args: &[&str]) -> Ran {
        let only: Vec<String> = only.iter().map(|n| (*n).to_owned()).collect();
        let mut command = mirrorfs();
        command.env("XDG_STATE_HOME", self.path("xdg"));
        run(command.args(args).arg("--config").arg(self.config(&only)), LIMIT)
    }

    /// Checks the state folder of that name; with `--replica all` also what the replicas hold.
    pub fn fsck(&self, state: &str, args: &[&str]) -> Ran {
        let state = self.path(state);
        self.run(&[], &[&["fsck", "--state", state.to_str().unwrap()], args].concat())
    }

    /// Restores everything out of one replica into a new folder.
    #[track_caller]
    pub fn restore(&self, replica: &str, to: &str) -> PathBuf {
        let to = self.path(to);
        self.restore_to(replica, &to);
        to
    }

    /// Restores everything out of one replica into the folder `to`.
    #[track_caller]
    pub fn restore_to(&self, replica: &str, to: &Path) {
        self.run(&[], &["restore", "--from", replica, "--to", to.to_str().unwrap()]).ok();
    }
}

fn log_filter() -> String {
    std::env::var("MIRRORFS_TEST_LOG").unwrap_or_else(|_| "info".into())
}

/// Why a mount did not become live.
#[derive(Debug)]
pub struct Failed {
    /// The daemon's exit code.
    pub code: Option<i32>,
    /// What it said.
    pub told: String,
}

/// A daemon and its mount.
pub struct Mount {
    child: Option<Child>,
    mountpoint: PathBuf,
    log: PathBuf,
    log_start: u64,
    _watchdog: Watchdog,
}

impl Mount {
    /// A path in it.
    pub fn path(&self, name: impl AsRef<Path>) -> PathBuf {
        self.mountpoint.join(name)
    }

    /// Its root.
    pub fn root(&self) -> &Path {
        &self.mountpoint
    }

    /// The daemon's process.
    pub fn pid(&self) -> u32 {
        self.child.as_ref().unwrap().id()
    }

    /// What the daemon said since it started.
    pub fn told(&self) -> String {
        let all = fs::read(&self.log).unwrap_or_default();
        String::from_utf8_lossy(all.get(self.log_start as usize..).unwrap_or_default()).into_owned()
    }

    /// Waits until it is live, or answers what the daemon said.
    pub fn live(mut self) -> Result<Self, Failed> {
        self.wait_live()?;
        Ok(self)
    }

    fn wait_live(&mut self) -> Result<(), Failed> {
        let until = Instant::now() + LIMIT;
        loop {
            if let Some(status) = self.child.as_mut().unwrap().try_wait().unwrap() {
                self.child = None;
                detach(&self.mountpoint);
                return Err(Failed { code: status.code(), told: self.told() });
            }
            if is_mounted(&self.mountpoint) && self.ask(&["status"], &["--json"]).code == Some(0) {
                return Ok(());
            }
            assert!(Instant::now() < until, "not live after {LIMIT:?}: {}", self.told());
            thread::sleep(Duration::from_millis(10));
        }
    }

    /// Runs `mirrorfs ARGS MOUNTPOINT MORE`.
    pub fn ask(&self, args: &[&str], more: &[&str]) -> Ran {
        run(mirrorfs().args(args).arg(&self.mountpoint).args(more), LIMIT)
    }

    /// Waits until everything written so far is on all replicas.
    #[track_caller]
    pub fn sync(&self) {
        self.ask(&["sync"], &["--timeout", "170"]).ok();
    }

    /// What `mirrorfs status --json` says.
    #[track_caller]
    pub fn status(&self) -> serde_json::Value {
        serde_json::from_slice(&self.ask(&["status"], &["--json"]).ok().stdout).unwrap()
    }

    /// What it says of one replica.
    #[track_caller]
    pub fn replica_status(&self, name: &str) -> serde_json::Value {
        let status = self.status();
        let replicas = status["replicas"].as_array().unwrap();
        replicas.iter().find(|r| r["name"] == name).unwrap_or_else(|| panic!("no {name} in {status}")).clone()
    }

    /// Unmounts with `mirrorfs umount` and waits for the daemon to end well.
    #[track_caller]
    pub fn unmount(mut self) {
        let ran = self.ask(&["umount"], &[]);
        assert!(ran.code == Some(0), "{}: {}\n{}", ran.call, ran.stderr, self.told());
        let status = self.wait_end();
        assert!(status.success(), "the daemon ended with {status}: {}", self.told());
        assert!(!is_mounted(&self.mountpoint));
    }

    /// Waits for the daemon to end.
    #[track_caller]
    pub fn wait_end(&mut self) -> ExitStatus {
        let mut child = self.child.take().unwrap();
        let mut ended = None;
        wait_until(LIMIT, "the daemon ends", || {
            ended = child.try_wait().unwrap();
            ended.is_some()
        });
        ended.unwrap()
    }

    /// Kills the daemon as a crash would.
    pub fn kill9(mut self) {
        self.stop();
    }

    fn stop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
        detach(&self.mountpoint);
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        self.stop();
        if thread::panicking() {
            let told = self.told();
            let lines: Vec<_> = told.lines().collect();
            println!("--- the end of the log of {} ---", self.mountpoint.display());
            for line in &lines[lines.len().saturating_sub(200)..] {
                println!("{line}");
            }
            println!("---");
        }
    }
}

/// Whether mirrorfs is mounted there. Asks the kernel's list, not the mount, which may hang.
pub fn is_mounted(path: &Path) -> bool {
    let path = path.parent().and_then(|p| p.canonicalize().ok()).map(|p| p.join(path.file_name().unwrap()));
    matches!(mountinfo::mount_at(&path.unwrap()), Ok(Some(m)) if mountinfo::is_mirrorfs(&m))
}

/// Takes a mount out of the tree whatever its state.
pub fn detach(path: &Path) {
    for _ in 0..10 {
        if !is_mounted(path) {
            return;
        }
        let c = std::ffi::CString::new(path.as_os_str().as_bytes()).unwrap();
        // SAFETY: a NUL-terminated string.
        if unsafe { libc::umount2(c.as_ptr(), libc::MNT_DETACH) } != 0 {
            let _ = Command::new("fusermount3").args(["-uz", "--"]).arg(path).output();
        }
    }
}

/// Kills a daemon that lives too long.
struct Watchdog {
    _cancel: mpsc::Sender<()>,
}

impl Watchdog {
    fn start(pid: u32, test: String) -> Self {
        let (cancel, cancelled) = mpsc::channel::<()>();
        thread::spawn(move || {
            if cancelled.recv_timeout(WATCHDOG) == Err(mpsc::RecvTimeoutError::Timeout) {
                eprintln!("{test}: killing the daemon {pid} after {WATCHDOG:?}");
                // SAFETY: our own child; the Mount that would reap it is still there, or we would be cancelled.
                unsafe { libc::kill(i32::try_from(pid).unwrap(), libc::SIGKILL) };
            }
        });
        Self { _cancel: cancel }
    }
}

/// All files below `dir` with their bytes, to show that something changed nothing.
pub fn bytes_of(dir: &Path) -> std::collections::BTreeMap<PathBuf, Vec<u8>> {
    walkdir::WalkDir::new(dir)
        .into_iter()
        .map(Result::unwrap)
        .filter(|e| e.file_type().is_file())
        .map(|e| (e.path().strip_prefix(dir).unwrap().to_owned(), fs::read(e.path()).unwrap()))
        .collect()
}

/// All segments in a folder replica, in order.
pub fn segments(replica: &Path) -> Vec<PathBuf> {
    let mut all: Vec<_> = walkdir::WalkDir::new(replica.join("segments"))
        .into_iter()
        .map(Result::unwrap)
        .filter(|e| e.file_type().is_file() && e.path().extension().is_some_and(|x| x == "seg"))
        .map(|e| e.path().to_owned())
        .collect();
    all.sort();
    all
}

/// Flips one bit of a file, at this share of its length.
pub fn flip_bit(file: &Path, at: f64) {
    let mut bytes = fs::read(file).unwrap();
    let i = (bytes.len() as f64 * at) as usize;
    bytes[i] ^= 0x10;
    fs::write(file, bytes).unwrap();
}

/// Makes sure that nothing of a file stays in the kernel's cache (as far as we may).
pub fn drop_page_cache(file: &Path) {
    use std::os::fd::AsRawFd;
    let f = File::open(file).unwrap();
    // SAFETY: a valid descriptor.
    unsafe { libc::posix_fadvise(f.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED) };
}
