//! Every command as a person uses it, with real mounts in the background: what is printed, how it ends, what is left.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::fs::{self, File};
use std::io::Write;
use std::net::TcpListener;
use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;
use support::mount::{LIMIT, Volume, bytes_of, detach, flip_bit, is_mounted, segments};
use support::run::{Ran, is_root, mirrorfs, run, wait_until};
use support::s3::S3Server;
use support::tree::Content;

// The exit codes of the documentation.
const FAILURE: i32 = 1;
const IN_USE: i32 = 5;
const UNREACHABLE: i32 = 6;
const DAMAGED: i32 = 7;
const TIMED_OUT: i32 = 8;
const NOT_MOUNTED: i32 = 9;

/// A folder in which a person works, with a home and a mountpoint. Whatever was mounted here is gone at the end.
struct Place {
    volume: Volume,
    config: PathBuf,
}

impl Place {
    /// With these folders as replicas; `None`, visibly, without FUSE.
    fn new(test: &str, folders: &[&str]) -> Option<Self> {
        let mut volume = Volume::new(test)?;
        for name in folders {
            volume.folder(name);
        }
        Some(Self::of(volume))
    }

    fn of(volume: Volume) -> Self {
        for folder in ["home", "m", "other"] {
            fs::create_dir(volume.path(folder)).unwrap();
        }
        let config = volume.config(&[]);
        Self { volume, config }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.volume.path(name)
    }

    /// `mirrorfs`, in the volume's folder, with its home.
    fn command(&self, args: &[&str]) -> Command {
        let mut command = mirrorfs();
        command
            .args(args)
            .current_dir(self.path(""))
            .env("HOME", self.path("home"))
            .env_remove("XDG_STATE_HOME");
        command
    }

    fn run(&self, args: &[&str]) -> Ran {
        run(&mut self.command(args), LIMIT)
    }

    /// The words of a mount at `m`.
    fn mounting<'a>(&'a self, more: &[&'a str]) -> Vec<&'a str> {
        [&["mount", "m", "--config", self.config.to_str().unwrap()], more].concat()
    }

    /// Mounts at `m` in the background.
    fn mount(&self, more: &[&str]) -> Ran {
        self.run(&self.mounting(more))
    }

    fn status(&self, at: &str) -> Value {
        serde_json::from_slice(&self.run(&["status", at, "--json"]).ok().stdout).unwrap()
    }

    fn pid(&self, at: &str) -> i32 {
        self.status(at)["pid"].as_i64().unwrap().try_into().unwrap()
    }

    /// The state folders that there are below the home.
    fn states(&self) -> Vec<PathBuf> {
        let base = self.path("home/.local/state/mirrorfs");
        let mut all: Vec<PathBuf> =
            fs::read_dir(base).map_or_else(|_| Vec::new(), |all| all.map(|e| e.unwrap().path()).collect());
        all.extend(Some(self.path("reader")).filter(|reader| reader.exists()));
        all
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        for state in self.states() {
            let pid = fs::read_to_string(state.join("LOCK")).unwrap_or_default();
            // Only while it holds the lock is that process our daemon.
            let pid = pid.lines().next().and_then(|pid| pid.trim().parse().ok());
            if let (Some(pid), true) = (pid, state.join("control.sock").exists()) {
                kill_with_guardian(pid);
            }
            if std::thread::panicking() {
                println!("--- {} ---", state.join("daemon.log").display());
                println!("{}", fs::read_to_string(state.join("daemon.log")).unwrap_or_default());
            }
        }
        for at in ["m", "other"] {
            detach(&self.path(at));
        }
    }
}

fn kill(pid: i32, signal: i32) {
    // SAFETY: touches no memory.
    unsafe { libc::kill(pid, signal) };
}

/// Whether a process runs; one that nobody has waited for yet does not.
fn runs(pid: i32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit(") ").next().is_some_and(|rest| !rest.is_empty() && !rest.starts_with(['Z', 'X']))
}

fn wait_gone(pid: i32) {
    wait_until(LIMIT, "the daemon ends", || !runs(pid));
}

/// The parent of a process; 0 for none.
fn parent(pid: i32) -> i32 {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let after = stat.rsplit(") ").next().unwrap_or_default();
    after.split(' ').nth(1).and_then(|pid| pid.parse().ok()).unwrap_or(0)
}

/// Kills a daemon and, before it, the guardian that would start it again.
fn kill_with_guardian(pid: i32) {
    let guardian = parent(pid);
    let line = fs::read(format!("/proc/{guardian}/cmdline")).unwrap_or_default();
    if String::from_utf8_lossy(&line).contains("--ready-on-stdout") {
        kill(guardian, libc::SIGKILL);
    }
    kill(pid, libc::SIGKILL);
    wait_gone(pid);
}

/// The processes whose command line has `word` in it.
fn processes_with(word: &str) -> Vec<i32> {
    let all = fs::read_dir("/proc").unwrap().filter_map(|e| e.ok()?.file_name().to_str()?.parse().ok());
    all.filter(|pid: &i32| {
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        String::from_utf8_lossy(&line).contains(word) && runs(*pid)
    })
    .collect()
}

#[test]
fn a_day_in_the_life() {
    let Some(p) = Place::new("commands: a day", &["a", "b"]) else { return };
    let told = p.mount(&[]).ok().text();
    assert!(told.contains("created a new volume") && told.contains("mounted volume"), "{told}");
    assert!(p.states()[0].join("daemon.log").exists());
    fs::write(p.path("m/f"), b"one").unwrap();
    fs::create_dir(p.path("m/d")).unwrap();

    // Again, in both ways.
    p.mount(&[]).with_code(IN_USE).says(&["is busy", "already mounted"]);
    let pid = p.pid("m");
    let config = p.config.to_str().unwrap();
    p.run(&["mount", "other", "--config", config]).with_code(IN_USE).says(&[&format!("process {pid}")]);

    let synced = p.run(&["sync", "m/d"]).ok().text();
    assert!(
        synced.starts_with("synced up to change ") && synced.ends_with(" on 2 of 2 replicas"),
        "{synced}"
    );
    let synced: Value = serde_json::from_slice(&p.run(&["sync", "m", "--json"]).ok().stdout).unwrap();
    assert_eq!((&synced["done"], &synced["bytes_left"]), (&2.into(), &0.into()), "{synced}");

    let status = p.run(&["status", "m/d"]).ok().text();
    for word in ["mountpoint ", "epoch 1", "yes, fsync waits for local", "healthy", "replica-b"] {
        assert!(status.contains(word), "{word}: {status}");
    }
    // Every mount is shown when none is named; there may be others of other tests.
    let all: Vec<Value> = serde_json::from_slice(&p.run(&["status", "--json"]).ok().stdout).unwrap();
    assert!(all.iter().any(|s| s["pid"] == pid), "{all:?}");

    let told = p.run(&["umount", "m"]).ok().text();
    assert!(told.starts_with("unmounted ") && told.ends_with("; all replicas hold everything"), "{told}");
    assert!(!runs(pid));
    for command in ["umount", "status", "sync"] {
        p.run(&[command, "m"]).with_code(NOT_MOUNTED).says(&["no mirrorfs volume is mounted on m"]);
    }
    let told = p.mount(&[]).ok().text();
    assert!(!told.contains("created"), "{told}");
    assert_eq!(fs::read(p.path("m/f")).unwrap(), b"one");
    p.run(&["umount", "m", "--wait"]).ok();
}

#[test]
fn init_makes_the_volume_that_mount_then_uses() {
    let Some(p) = Place::new("commands: init", &["a", "b"]) else { return };
    let config = p.config.to_str().unwrap();
    let init = ["init", "--config", config, "--block-size", "64KiB", "--compression", "none", "--json"];
    let made: Value = serde_json::from_slice(&p.run(&init).ok().stdout).unwrap();
    assert_eq!(made["block_size"], 65536);
    assert!(p.states().is_empty(), "init needs no state");
    p.run(&init).with_code(4).says(&["holds a volume already"]);
    // The block size on the command line is for new volumes only.
    let told = p.mount(&["--block-size", "1MiB"]).ok().text();
    assert!(told.contains(made["volume"].as_str().unwrap()) && !told.contains("created"), "{told}");
    p.run(&["umount", "m"]).ok();
    let volume = fs::read_to_string(p.path("replica-b/volume.json")).unwrap();
    assert!(volume.contains("65536"), "{volume}");
    p.run(&["init", "--replica", "x", "--block-size", "4KiB"])
        .with_code(2)
        .says(&["between 64KiB and 16MiB"]);
}

#[test]
fn what_a_program_still_has_open_is_synced_too_and_keeps_the_mount() {
    let Some(p) = Place::new("commands: open", &["a"]) else { return };
    p.mount(&[]).ok();
    let data = Content::new(7).take(600_000);
    let mut file = File::create(p.path("m/open")).unwrap();
    file.write_all(&data).unwrap();
    // Neither closed nor fsynced: the kernel may still hold all of it.
    p.run(&["sync", "m", "--timeout", "60"]).ok();
    let to = p.volume.restore("a", "to");
    assert!(fs::read(to.join("open")).unwrap() == data, "synced without what the kernel held");
    p.run(&["umount", "m"]).with_code(IN_USE).says(&["is in use", "fuser -vm"]);
    p.run(&["umount", "m", "--wait"]).with_code(IN_USE);
    file.write_all(b"more").unwrap();
    drop(file);
    p.run(&["umount", "m", "--wait"]).ok();
    let to = p.volume.restore("a", "to2");
    assert_eq!(fs::read(to.join("open")).unwrap().len(), 600_004);
}

#[test]
fn a_daemon_that_died() {
    let Some(p) = Place::new("commands: dead", &["a"]) else { return };
    p.mount(&[]).ok();
    let mut file = File::create(p.path("m/f")).unwrap();
    file.write_all(b"safe").unwrap();
    file.sync_all().unwrap();
    let pid = p.pid("m");
    kill_with_guardian(pid);
    for command in ["status", "sync"] {
        p.run(&[command, "m"]).with_code(NOT_MOUNTED).says(&["has died", "mirrorfs umount"]);
    }
    p.run(&["status"]).ok().says(&["has died"]);
    // A file is still open in the dead mount: it goes all the same.
    let told = p.run(&["umount", "m"]).ok().text();
    assert!(told.contains("whose daemon was gone"), "{told}");
    drop(file);
    assert!(!is_mounted(&p.path("m")));
    p.mount(&[]).ok();
    assert_eq!(fs::read(p.path("m/f")).unwrap(), b"safe");
    let pid = p.pid("m");
    kill_with_guardian(pid);
    // Mounting right over it is what a supervisor does.
    p.mount(&[]).ok().says(&["a daemon that has died"]);
    assert_eq!(fs::read(p.path("m/f")).unwrap(), b"safe");
    p.run(&["umount", "m"]).ok();
    assert!(!is_mounted(&p.path("m")), "a mount is left below");
}

#[test]
fn ended_from_outside() {
    let Some(p) = Place::new("commands: outside", &["a"]) else { return };
    let check = |name: &str, end: &dyn Fn(i32)| {
        p.mount(&[]).ok();
        fs::write(p.path("m").join(name), name).unwrap();
        let pid = p.pid("m");
        end(pid);
        wait_gone(pid);
        assert!(!is_mounted(&p.path("m")));
        let to = p.volume.restore("a", name);
        assert_eq!(fs::read_to_string(to.join(name)).unwrap(), name);
    };
    check("by a signal", &|pid| kill(pid, libc::SIGTERM));
    check("by fusermount3", &|_| {
        run(Command::new("fusermount3").arg("-u").arg(p.path("m")), LIMIT).ok();
    });
    // Busy: the first signal says so, the second detaches.
    p.mount(&[]).ok();
    let pid = p.pid("m");
    let file = File::create(p.path("m/busy")).unwrap();
    kill(pid, libc::SIGTERM);
    let log = p.states()[0].join("daemon.log");
    wait_until(LIMIT, "the log says that it is in use", || {
        fs::read_to_string(&log).unwrap().contains("is in use")
    });
    assert!(is_mounted(&p.path("m")) && runs(pid));
    kill(pid, libc::SIGTERM);
    wait_until(LIMIT, "it is detached", || !is_mounted(&p.path("m")));
    drop(file);
    wait_gone(pid);
}

#[test]
fn a_replica_that_is_down() {
    let Some(mut volume) = Volume::new("commands: down") else { return };
    let mut server = S3Server::start();
    volume.folder("a");
    volume.folder("b");
    volume.spec(&server.spec("off", "x", &[]));
    let p = Place::of(volume);
    p.mount(&[]).ok();
    p.run(&["sync", "m", "--timeout", "60"]).ok();
    server.http.stop();
    fs::write(p.path("m/f"), Content::new(1).take(300_000)).unwrap();
    for enough in ["quorum", "2", "1"] {
        p.run(&["sync", "m", "--replicas", enough, "--timeout", "60"]).ok();
    }
    p.run(&["sync", "m", "--replicas", "4"]).with_code(2).says(&["the volume has 3"]);
    let begin = Instant::now();
    let late = p.run(&["sync", "m", "--timeout", "6"]).with_code(TIMED_OUT).says(&["2 of 3", "off"]);
    assert!(begin.elapsed() < Duration::from_secs(30), "{:?}", begin.elapsed());
    // Not a terminal: a plain line now and then.
    assert!(late.stderr.contains("syncing: ") && !late.stderr.contains('\u{1b}'), "{}", late.stderr);
    let status = p.status("m");
    assert!(status["replicas"][2]["lag_segments"].as_u64() > Some(0), "{status}");
    assert!(status["replicas"][2]["last_error"]["text"].is_string(), "{status}");
    assert!(p.run(&["status", "m"]).ok().text().contains("last error of off, "));

    // Ctrl-C while it waits ends the waiting and nothing else.
    let mut waiting = start(&mut p.command(&["umount", "m", "--wait"]));
    std::thread::sleep(Duration::from_secs(2));
    kill(waiting.id().try_into().unwrap(), libc::SIGINT);
    assert!(!waiting.wait().unwrap().success());
    assert_eq!(fs::read(p.path("m/f")).unwrap().len(), 300_000);

    let told = p.run(&["umount", "m"]).ok().text();
    assert!(told.contains("still to be sent after the next mount") && told.contains(" to off "), "{told}");
    // It is mounted all the same, and says so.
    let told = p.mount(&[]).ok().text();
    assert!(told.contains("without it for now: replica off"), "{told}");
    server.http.restart();
    p.run(&["umount", "m", "--wait"]).ok();
    let to = p.volume.restore("off", "to");
    assert_eq!(fs::read(to.join("f")).unwrap(), Content::new(1).take(300_000));
}

/// Starts a command that minds Ctrl-C, also where this test itself runs in the background of a shell, which has it ignored.
fn start(command: &mut Command) -> Child {
    let mind = || {
        // SAFETY: async-signal-safe, as what runs between fork and exec has to be.
        unsafe { libc::signal(libc::SIGINT, libc::SIG_DFL) };
        Ok(())
    };
    // SAFETY: as above; it allocates nothing and takes no lock.
    unsafe { command.pre_exec(mind) };
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

/// Takes connections and never answers.
struct Hole(TcpListener);

impl Hole {
    fn new() -> Self {
        Self(TcpListener::bind("127.0.0.1:0").unwrap())
    }

    fn options(&self) -> Vec<(String, String)> {
        S3Server::options(&format!("http://{}", self.0.local_addr().unwrap()))
    }
}

#[test]
fn a_mount_that_cannot_be_says_why_and_leaves_nothing() {
    let Some(mut volume) = Volume::new("commands: failing") else { return };
    volume.folder("a");
    let hole = Hole::new();
    let options = hole.options();
    let options: Vec<_> = options.iter().map(|(k, v)| (k.as_str(), v.as_str())).collect();
    volume.replica("off", "s3://bucket/x", &options);
    let p = Place::of(volume);
    let word = p.config.to_str().unwrap();

    // Interrupted while it waits for the replica, in three ways.
    for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGKILL] {
        let mut waiting = start(&mut p.command(&p.mounting(&[])));
        wait_until(LIMIT, "the daemon has been started", || processes_with(word).len() == 3);
        std::thread::sleep(Duration::from_millis(300));
        kill(waiting.id().try_into().unwrap(), signal);
        let code = waiting.wait().unwrap().code();
        assert_eq!(code, (signal != libc::SIGKILL).then_some(FAILURE), "signal {signal}");
        if signal == libc::SIGKILL {
            wait_until(LIMIT, "the daemon ends", || processes_with(word).is_empty());
            fs::remove_dir_all(p.path("home/.local")).unwrap();
        }
        assert!(processes_with(word).is_empty(), "signal {signal}");
        assert!(!is_mounted(&p.path("m")) && !p.path("home/.local").exists(), "signal {signal}");
    }

    drop(hole);
    let config = p.config.to_str().unwrap();
    for more in [&[][..], &["--foreground"]] {
        let ran = p.mount(more).with_code(UNREACHABLE).says(&["replica off"]);
        assert_eq!(ran.text(), "");
        assert!(!p.path("home/.local").exists(), "{more:?}");
    }
    p.run(&["init", "--config", config]).with_code(UNREACHABLE);
    // A folder that was there stays, with the log.
    fs::create_dir(p.path("state")).unwrap();
    p.mount(&["--state", "state"]).with_code(UNREACHABLE);
    assert!(fs::read_to_string(p.path("state/daemon.log")).unwrap().contains("replica off"));
    assert!(bytes_of(&p.path("replica-a")).is_empty());
}

#[test]
fn reading_along_with_another_writer() {
    let Some(p) = Place::new("commands: read-only", &["a", "b"]) else { return };
    p.mount(&[]).ok();
    fs::write(p.path("m/f"), b"one").unwrap();
    p.run(&["sync", "m"]).ok();
    let config = p.config.to_str().unwrap();
    let before = bytes_of(&p.path("replica-a"));
    let reader = ["mount", "other", "--config", config, "--state", "reader", "--read-only"];
    p.run(&reader).ok();
    assert_eq!(fs::read(p.path("other/f")).unwrap(), b"one");
    assert_eq!(fs::write(p.path("other/g"), b"").unwrap_err().raw_os_error(), Some(libc::EROFS));
    let status = p.run(&["status", "other"]).ok().text();
    assert!(status.contains("no: mounted read-only") && !status.contains("epoch"), "{status}");
    p.run(&["sync", "other"]).ok();
    assert!(bytes_of(&p.path("replica-a")) == before, "reading changed a replica");
    // The writer is not disturbed, and the reader sees more at the next mount.
    fs::write(p.path("m/g"), b"two").unwrap();
    p.run(&["sync", "m"]).ok();
    let told = p.run(&["umount", "other"]).ok().text();
    assert!(told.starts_with("unmounted ") && !told.contains("replicas"), "{told}");
    let told = p.run(&reader).ok().text();
    assert!(!told.contains("moved"), "{told}");
    assert_eq!(fs::read(p.path("other/g")).unwrap(), b"two");
    p.run(&["umount", "other"]).ok();
    p.run(&["umount", "m"]).ok();
    // Nothing can be sent from a state that is mounted read-only.
    p.mount(&["--read-only"]).ok();
    p.run(&["sync", "m"]).with_code(FAILURE).says(&["mounted read-only"]);
    p.run(&["umount", "m"]).ok();
}

#[test]
fn as_fstab_mounts_and_as_variables_say() {
    let Some(p) = Place::new("commands: fstab", &["a"]) else { return };
    let helper = p.path("mount.mirrorfs");
    symlink(env!("CARGO_BIN_EXE_mirrorfs"), &helper).unwrap();
    let config = p.path("files.toml");
    let text =
        "commit_interval = \"1s\"\n[replica.one]\nurl = \"${BASE}/replica-a\"\n[mount]\nnoexec = true\n";
    fs::write(&config, text).unwrap();
    let mount = |options: &str| {
        let mut command = Command::new(&helper);
        command.arg(&config).arg(p.path("m")).args(["-n", "-o", options]).env("HOME", p.path("home"));
        command.env_remove("XDG_STATE_HOME").env("BASE", p.path(""));
        run(&mut command, LIMIT)
    };
    mount("rw,_netdev,nofail,noauto,x-systemd.automount,noatime,nosuid,cache_size=64MiB,fsync=one").ok();
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    let at = p.path("m").canonicalize().unwrap();
    let line = mounts.lines().find(|l| l.contains(at.to_str().unwrap())).unwrap();
    for option in ["rw", "noatime", "nosuid", "noexec"] {
        assert!(line.contains(option), "{option}: {line}");
    }
    let status = p.status("m");
    assert_eq!((&status["fsync"], &status["cache"]["limit_bytes"]), (&"one".into(), &(64 << 20).into()));
    assert_eq!(status["replicas"][0]["name"], "one");
    let mut file = File::create(p.path("m/f")).unwrap();
    file.write_all(b"on one").unwrap();
    file.sync_all().unwrap();
    // Fsync has waited for the replica.
    assert!(!segments(&p.path("replica-a")).is_empty());
    drop(file);
    p.run(&["umount", "m"]).ok();
    // The same from variables alone.
    let mut command = p.command(&["mount", "m"]);
    command.env("MIRRORFS_REPLICA", format!("one={}", p.path("replica-a").display()));
    command
        .env("MIRRORFS_READ_ONLY", "1")
        .env("MIRRORFS_CACHE_SIZE", "32MiB")
        .env("MIRRORFS_OPTIONS", "noatime");
    run(&mut command, LIMIT).ok();
    assert_eq!(p.status("m")["cache"]["limit_bytes"], 32 << 20);
    assert_eq!(fs::read(p.path("m/f")).unwrap(), b"on one");
    p.run(&["umount", "m"]).ok();
}

#[test]
fn restoring() {
    let Some(p) = Place::new("commands: restore", &["a"]) else { return };
    p.mount(&[]).ok();
    fs::create_dir_all(p.path("m/d/e")).unwrap();
    let big = Content::new(3).take(3 << 20);
    fs::write(p.path("m/d/big"), &big).unwrap();
    fs::write(p.path("m/d/e/small"), b"small").unwrap();
    symlink("big", p.path("m/d/link")).unwrap();
    p.run(&["umount", "m", "--wait"]).ok();
    let from = p.path("replica-a");
    let from = from.to_str().unwrap();
    let before = bytes_of(Path::new(from));

    let list = p.run(&["restore", "--from", from, "--list", "d"]).ok().text();
    assert!(["d/big", "d/e/small", "d/link"].iter().all(|name| list.contains(name)), "{list}");
    let list = p.run(&["restore", "--from", from, "--list", "--json"]).ok().text();
    let entries: Vec<Value> = list.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    assert!(entries.iter().any(|e| e["path"] == "d/big" && e["size"] == big.len()), "{list}");

    let report: Value =
        serde_json::from_slice(&p.run(&["restore", "--from", from, "--to", "to", "--json"]).ok().stdout)
            .unwrap();
    assert_eq!(report["problems"], Value::Array(Vec::new()));
    assert!(fs::read(p.path("to/d/big")).unwrap() == big);
    assert_eq!(fs::read_link(p.path("to/d/link")).unwrap(), Path::new("big"));
    p.run(&["restore", "--from", from, "--to", "part", "d/e"]).ok();
    assert_eq!(bytes_of(&p.path("part")).len(), 1);
    p.run(&["restore", "--from", from, "--to", "part", "none"]).with_code(FAILURE).says(&["none"]);

    fs::write(p.path("to/d/e/small"), b"mine").unwrap();
    p.run(&["restore", "--from", from, "--to", "to"]).with_code(FAILURE).says(&["--overwrite"]);
    assert_eq!(fs::read(p.path("to/d/e/small")).unwrap(), b"mine");
    p.run(&["restore", "--from", from, "--to", "to", "--overwrite"]).ok();
    assert_eq!(fs::read(p.path("to/d/e/small")).unwrap(), b"small");
    assert!(bytes_of(Path::new(from)) == before, "restoring changed the replica");

    // A block is lost: the rest comes back, and what is not whole says so by its name.
    flip_bit(&segments(Path::new(from))[0], 0.4);
    p.run(&["restore", "--from", from, "--to", "damaged"]).with_code(DAMAGED).says(&["d/big", "damaged"]);
    assert_eq!(fs::read(p.path("damaged/d/e/small")).unwrap(), b"small");
    assert!(p.path("damaged/d/big.damaged").exists() && !p.path("damaged/d/big").exists());
}

#[test]
fn restoring_through_an_outage() {
    let Some(p) = Place::new("commands: restore through an outage", &["a"]) else { return };
    p.mount(&[]).ok();
    let contents: Vec<_> = (0..4).map(|n| Content::new(40 + n).take(3 << 20)).collect();
    for (n, content) in contents.iter().enumerate() {
        fs::write(p.path(&format!("m/{n}")), content).unwrap();
        p.run(&["sync", "m"]).ok();
    }
    p.run(&["umount", "m", "--wait"]).ok();
    let (from, away) = (p.path("replica-a"), p.path("away"));
    let slowly = |timeout: &str| {
        let from = from.to_str().unwrap();
        let more = ["--to", "to", "--replica-option", "download_limit=2MiB", "--read-timeout", timeout];
        let mut command = p.command(&[&["restore", "--from", from][..], &more].concat());
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    };
    let goes = |child: &mut std::process::Child| {
        wait_until(LIMIT, "content comes", || p.path("to/0").exists() || child.try_wait().unwrap().is_some());
        fs::rename(&from, &away).unwrap();
    };

    // Away for longer than it is waited for: the command says that, leaves nothing that is not whole, and goes on when it is run again.
    let mut child = slowly("1s");
    goes(&mut child);
    let out = child.wait_with_output().unwrap();
    let told = String::from_utf8_lossy(&out.stderr).into_owned();
    assert_eq!(out.status.code(), Some(UNREACHABLE), "{told}");
    assert!(told.contains("did not answer") && !told.contains("intact nowhere"), "{told}");
    let whole: Vec<_> = bytes_of(&p.path("to")).into_iter().collect();
    assert!(!whole.is_empty() && whole.len() < contents.len(), "{} files", whole.len());
    for (name, bytes) in &whole {
        let n: usize = name.to_str().unwrap().parse().unwrap();
        assert!(*bytes == contents[n], "{n} is not whole");
    }
    fs::rename(&away, &from).unwrap();
    fs::write(p.path("to/3.damaged"), b"mine").unwrap();
    p.run(&["restore", "--from", from.to_str().unwrap(), "--to", "to"]).ok();
    fs::remove_file(p.path("to/3.damaged")).unwrap();
    for (n, content) in contents.iter().enumerate() {
        assert!(fs::read(p.path(&format!("to/{n}"))).unwrap() == *content, "{n}");
    }
    assert_eq!(bytes_of(&p.path("to")).len(), contents.len());

    // Back in time: nobody notices.
    fs::remove_dir_all(p.path("to")).unwrap();
    let mut child = slowly("10m");
    goes(&mut child);
    std::thread::sleep(Duration::from_secs(2));
    fs::rename(&away, &from).unwrap();
    let out = child.wait_with_output().unwrap();
    assert_eq!(out.status.code(), Some(0), "{}", String::from_utf8_lossy(&out.stderr));
    for (n, content) in contents.iter().enumerate() {
        assert!(fs::read(p.path(&format!("to/{n}"))).unwrap() == *content, "{n}");
    }
}

#[test]
fn a_normal_user() {
    const TEST: &str = "commands: a normal user";
    if !is_root() {
        return println!(
            "SKIP: {TEST}: needs root to become one (run by a normal user, every other test shows it)"
        );
    }
    let passwd = fs::read_to_string("/etc/passwd").unwrap();
    let Some(line) = passwd.lines().find(|l| l.starts_with("tests:")) else {
        return println!("SKIP: {TEST}: there is no user tests (useradd tests)");
    };
    let ids: Vec<u32> = line.split(':').skip(2).take(2).map(|id| id.parse().unwrap()).collect();
    let Some(p) = Place::new(TEST, &["a", "b"]) else { return };
    let program = p.path("mirrorfs");
    fs::copy(env!("CARGO_BIN_EXE_mirrorfs"), &program).unwrap();
    for entry in walkdir::WalkDir::new(p.path("")).into_iter().map(Result::unwrap) {
        chown(entry.path(), Some(ids[0]), Some(ids[1])).unwrap();
    }
    fs::set_permissions(p.path(""), fs::Permissions::from_mode(0o755)).unwrap();
    // A mount namespace of its own, in which the device is open to users as it is on any desktop, whatever it is here.
    let script = r#"
        set -eu
        mknod device c 10 229 && chmod 666 device && mount --bind device /dev/fuse || exit 77
        exec setpriv --reuid tests --regid tests --init-groups sh -eu -c '
            : <> /dev/fuse || exit 77
            ./mirrorfs mount m --replica replica-a --replica replica-b
            echo mine > m/f
            ./mirrorfs sync m
            ./mirrorfs status m
            ./mirrorfs mount m --replica replica-a --replica replica-b && exit 1
            pid=$(./mirrorfs status m --json | sed -n "s/.*\"pid\": \([0-9]*\).*/\1/p")
            stat -c "%U %a" m/f
            kill -9 $pid
            for i in $(seq 600); do ./mirrorfs status m 2>&1 | grep -q "add the line user_allow_other" && break; sleep 0.1; done
            if ls m 2>/dev/null; then exit 1; fi
            ./mirrorfs mount m --replica replica-a --replica replica-b -o noatime
            cat m/f
            ./mirrorfs umount m --wait
            ./mirrorfs restore --from replica-b --to to
            cat to/f
        '"#;
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-c", script]).current_dir(p.path("")).env("HOME", p.path("home"));
    command.env_remove("XDG_STATE_HOME").env_remove("XDG_RUNTIME_DIR");
    let ran = run(&mut command, LIMIT);
    if ran.code == Some(77) {
        return println!("SKIP: {TEST}: this machine lets nobody make the device usable: {}", ran.stderr);
    }
    let told = ran.ok().text();
    for word in ["created a new volume", "on 2 of 2 replicas", "healthy", "tests 6"] {
        assert!(told.contains(word), "{word}: {told}");
    }
    assert_eq!(told.matches("mine").count(), 2, "{told}");
}
