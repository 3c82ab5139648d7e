//! The daemon dies: its mount stays, dead, and the guardian starts it again. Real mounts, real kills.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::fs::{self, File};
use std::os::unix::fs::chown;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;

use serde_json::Value;
use support::mount::{LIMIT, Volume, detach, is_mounted};
use support::run::{Ran, is_root, mirrorfs, run, wait_until};

/// How often the daemon is killed in one test; more with `MIRRORFS_KILLS`.
const KILLS: usize = 8;
const CRASHED: i32 = 11;
const NOT_MOUNTED: i32 = 9;

/// A volume and a mountpoint.
struct Place {
    volume: Volume,
    config: PathBuf,
}

impl Place {
    fn new(test: &str) -> Option<Self> {
        let mut volume = Volume::new(test)?;
        volume.folder("a");
        fs::create_dir(volume.path("m")).unwrap();
        let config = volume.config(&[]);
        Some(Self { volume, config })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.volume.path(name)
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = mirrorfs();
        command.args(args).current_dir(self.path("")).env("HOME", self.path(""));
        command.env("XDG_RUNTIME_DIR", self.path("")).env_remove("XDG_STATE_HOME");
        command
    }

    fn run(&self, args: &[&str]) -> Ran {
        run(&mut self.command(args), LIMIT)
    }

    fn mounting(&self) -> Vec<&str> {
        vec!["mount", "m", "--config", self.config.to_str().unwrap(), "--state", "state"]
    }

    /// Mounts in the background.
    fn mount(&self, more: &[&str], vars: &[(&str, &str)]) -> Ran {
        let mut command = self.command(&[&self.mounting(), more].concat());
        run(command.envs(vars.iter().copied()), LIMIT)
    }

    fn status(&self) -> Option<Value> {
        let ran = self.run(&["status", "m", "--json"]);
        (ran.code == Some(0)).then(|| serde_json::from_slice(&ran.stdout).unwrap())
    }

    /// The daemon that serves now.
    fn pid(&self) -> i32 {
        let mut pid = 0;
        wait_until(LIMIT, "a daemon answers", || {
            pid = self.status().map_or(0, |status| i32::try_from(status["pid"].as_i64().unwrap()).unwrap());
            pid != 0
        });
        pid
    }

    fn log(&self) -> String {
        fs::read_to_string(self.path("state/daemon.log")).unwrap_or_default()
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        for pid in processes_with(self.config.to_str().unwrap()) {
            kill(pid, libc::SIGKILL);
        }
        for _ in 0..5 {
            let c = std::ffi::CString::new(self.path("m").to_str().unwrap()).unwrap();
            // SAFETY: a NUL-terminated string.
            unsafe { libc::umount2(c.as_ptr(), libc::MNT_DETACH) };
        }
        detach(&self.path("m"));
        if thread::panicking() {
            println!("--- daemon.log ---\n{}", self.log());
            let foreground = fs::read_to_string(self.path("foreground.log")).unwrap_or_default();
            println!("--- in the foreground ---\n{foreground}");
        }
    }
}

fn kill(pid: i32, signal: i32) {
    // SAFETY: touches no memory.
    unsafe { libc::kill(pid, signal) };
}

fn runs(pid: i32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit(") ").next().is_some_and(|rest| !rest.is_empty() && !rest.starts_with(['Z', 'X']))
}

/// The processes of mirrorfs with `word` in their command line; guardians first.
fn processes_with(word: &str) -> Vec<i32> {
    let line = |pid: i32| {
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        String::from_utf8_lossy(&line).into_owned()
    };
    let all = fs::read_dir("/proc").unwrap().filter_map(|e| e.ok()?.file_name().to_str()?.parse().ok());
    let mut all: Vec<i32> = all.filter(|pid| line(*pid).contains(word) && runs(*pid)).collect();
    all.sort_by_key(|pid| line(*pid).contains("--guarded"));
    all
}

fn kills() -> usize {
    std::env::var("MIRRORFS_KILLS").ok().and_then(|n| n.parse().ok()).unwrap_or(KILLS)
}

/// Runs `by_path.py`, in which the daemon is killed again and again; `before` is what the shell does first.
fn by_path(place: &Place, before: &str, as_user: &str) -> Ran {
    let program = place.path("mirrorfs");
    fs::copy(env!("CARGO_BIN_EXE_mirrorfs"), &program).unwrap();
    fs::write(place.path("by_path.py"), include_str!("support/by_path.py")).unwrap();
    let kills = kills();
    let script = format!(
        "set -eu\n{before}\nexec {as_user} python3 by_path.py ./mirrorfs m {} state {kills}",
        place.config.display()
    );
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-c", &script]).current_dir(place.path("")).env("HOME", place.path(""));
    command.env("MIRRORFS_TEST_DEATHS", (kills + 5).to_string()).env("MIRRORFS_FREE_SPACE_RATIO", "0");
    // Not a python that only root may run.
    command.env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
    command.env_remove("XDG_STATE_HOME").env_remove("XDG_RUNTIME_DIR");
    run(&mut command, LIMIT * 5)
}

#[test]
fn a_program_that_writes_by_path_never_writes_below_the_mount() {
    if !is_root() {
        return println!("SKIP: needs root (as a normal user, the next test shows the same)");
    }
    let Some(place) = Place::new("guardian: by path") else { return };
    println!("{}", by_path(&place, "", "").ok().text());
    wait_until(LIMIT, "all processes end", || processes_with(place.config.to_str().unwrap()).is_empty());
    let restored = place.volume.restore("a", "restored");
    assert!(fs::read_dir(restored).unwrap().count() > 0);
}

#[test]
fn a_user_s_program_never_writes_below_the_mount() {
    const TEST: &str = "guardian: user";
    if !is_root() {
        return println!("SKIP: {TEST}: needs root to become a user");
    }
    let passwd = fs::read_to_string("/etc/passwd").unwrap();
    let Some(line) = passwd.lines().find(|line| line.starts_with("tests:")) else {
        return println!("SKIP: {TEST}: there is no user tests (useradd tests)");
    };
    let ids: Vec<u32> = line.split(':').skip(2).take(2).map(|id| id.parse().unwrap()).collect();
    let Some(place) = Place::new(TEST) else { return };
    fs::write(place.path("fuse.conf"), "user_allow_other\n").unwrap();
    for name in ["", "m", "replica-a", "all.toml"] {
        chown(place.path(name), Some(ids[0]), Some(ids[1])).unwrap();
    }
    // A mount namespace of its own, in which the device is open to users as it is on any desktop.
    let device = "mknod device c 10 229 && chmod 666 device && mount --bind device /dev/fuse && \
                  mount --bind fuse.conf /etc/fuse.conf || exit 77";
    let user = "setpriv --reuid tests --regid tests --init-groups";
    let ran = by_path(&place, device, user);
    if ran.code == Some(77) {
        return println!("SKIP: {TEST}: nobody may make the device usable here: {}", ran.stderr);
    }
    println!("{}", ran.ok().text());
    wait_until(LIMIT, "all processes end", || processes_with(place.config.to_str().unwrap()).is_empty());
}

#[test]
fn a_crash_loop_ends_and_the_mount_stays_dead() {
    let Some(place) = Place::new("guardian: loop") else { return };
    place.mount(&[], &[("MIRRORFS_TEST_DEATHS", "3")]).ok();
    fs::write(place.path("m/f"), "kept").unwrap();
    File::open(place.path("m/f")).unwrap().sync_all().unwrap();
    for _ in 0..3 {
        let pid = place.pid();
        kill(pid, libc::SIGKILL);
        wait_until(LIMIT, "the daemon is gone", || !runs(pid));
    }
    let config = place.config.to_str().unwrap().to_owned();
    wait_until(LIMIT, "the guardian ends", || processes_with(&config).is_empty());
    let enotconn = |path: &Path| fs::read_dir(path).unwrap_err().raw_os_error() == Some(libc::ENOTCONN);
    assert!(is_mounted(&place.path("m")) && enotconn(&place.path("m")));
    place.run(&["status", "m"]).with_code(NOT_MOUNTED).says(&[
        "has died",
        "killed by signal 9 (SIGKILL)",
        "died too often",
        "Everything that was fsynced is safe",
        "mirrorfs umount",
    ]);
    // A person mounts again: in the place of the dead one.
    place.mount(&[], &[]).ok().says(&["a daemon that has died"]);
    assert_eq!(fs::read(place.path("m/f")).unwrap(), b"kept");
    let status = place.run(&["status", "m"]).ok().text();
    assert!(status.contains("last crash"), "{status}");
    place.run(&["umount", "m"]).ok();
    assert!(!is_mounted(&place.path("m")), "the dead mount is left below");
}

#[test]
fn without_restart_the_mount_stays_dead() {
    let Some(place) = Place::new("guardian: no restart") else { return };
    place.mount(&["--no-restart"], &[]).ok();
    let pid = place.pid();
    kill(pid, libc::SIGKILL);
    let config = place.config.to_str().unwrap().to_owned();
    wait_until(LIMIT, "the guardian ends", || processes_with(&config).is_empty());
    assert!(is_mounted(&place.path("m")));
    place.run(&["status", "m"]).with_code(NOT_MOUNTED).says(&["no_restart"]);
    assert!(place.log().contains("is not started again"), "{}", place.log());
    place.run(&["umount", "m"]).ok();
    assert!(!is_mounted(&place.path("m")));
    assert_eq!(fs::read_dir(place.path("m")).unwrap().count(), 0);
}

fn foreground(place: &Place, more: &[&str]) -> Child {
    let log = File::create(place.path("foreground.log")).unwrap();
    let mut command = place.command(&[place.mounting().as_slice(), &["--foreground"], more].concat());
    command.env("MIRRORFS_TEST_DEATHS", "2");
    let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn().unwrap();
    place.pid();
    child
}

#[test]
fn in_the_foreground_the_guardian_is_the_process_that_counts() {
    let Some(place) = Place::new("guardian: foreground") else { return };
    // A signal goes on to the daemon, which ends in good order.
    let mut guardian = foreground(&place, &[]);
    let pid = place.pid();
    kill(guardian.id().try_into().unwrap(), libc::SIGTERM);
    assert!(guardian.wait().unwrap().success());
    assert!(!runs(pid) && !is_mounted(&place.path("m")));
    // Killed, it takes the daemon with it. The dead mount stays, and the next one takes its place.
    let mut guardian = foreground(&place, &[]);
    let pid = place.pid();
    guardian.kill().unwrap();
    guardian.wait().unwrap();
    wait_until(LIMIT, "the daemon dies", || !runs(pid));
    assert!(is_mounted(&place.path("m")));
    let mut guardian = foreground(&place, &[]);
    // A crash loop has a code of its own, so that a supervisor can stop, too.
    for _ in 0..2 {
        let pid = place.pid();
        kill(pid, libc::SIGABRT);
        wait_until(LIMIT, "the daemon is gone", || !runs(pid));
    }
    assert_eq!(guardian.wait().unwrap().code(), Some(CRASHED));
    assert!(is_mounted(&place.path("m")));
    place.run(&["umount", "m"]).ok();
}

#[test]
fn who_unmounts_a_dead_mount_ends_the_restarts() {
    let Some(place) = Place::new("guardian: unmounted") else { return };
    place.mount(&[], &[]).ok();
    let pid = place.pid();
    let config = place.config.to_str().unwrap().to_owned();
    let guardian = processes_with(&config)[0];
    assert_ne!(guardian, pid);
    kill(guardian, libc::SIGSTOP);
    kill(pid, libc::SIGKILL);
    wait_until(LIMIT, "the daemon is gone", || !runs(pid));
    let told = place.run(&["umount", "m"]).ok().text();
    assert!(told.contains("whose daemon was gone"), "{told}");
    kill(guardian, libc::SIGCONT);
    wait_until(LIMIT, "the guardian ends", || processes_with(&config).is_empty());
    assert!(!is_mounted(&place.path("m")));
}
