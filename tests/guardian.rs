//! The daemon dies: its mount stays, dead, and the guardian starts it again. Real mounts, real kills.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::chown;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rand::{Rng, SeedableRng};
use serde_json::Value;
use support::mount::{LIMIT, Volume, detach, is_mounted};
use support::run::{Ran, is_root, mirrorfs, run, wait_until};

/// How often the daemon is killed in one test; more with `MIRRORFS_KILLS`.
const KILLS: usize = 8;
const CRASHED: i32 = 11;
const NOT_MOUNTED: i32 = 9;

/// A volume, a mountpoint with a marker below it, and who mounts.
struct Place {
    volume: Volume,
    config: PathBuf,
    user: Option<(u32, u32)>,
}

impl Place {
    fn new(test: &str) -> Option<Self> {
        let mut volume = Volume::new(test)?;
        volume.folder("a");
        fs::create_dir(volume.path("m")).unwrap();
        let config = volume.config(&[]);
        Some(Self { volume, config, user: None })
    }

    /// For a normal user, to whom everything belongs.
    fn of_user(test: &str) -> Option<Self> {
        let mut place = Self::new(test)?;
        if !is_root() {
            return Some(place);
        }
        let passwd = fs::read_to_string("/etc/passwd").unwrap();
        let Some(line) = passwd.lines().find(|line| line.starts_with("tests:")) else {
            println!("SKIP: {test}: there is no user tests (useradd tests)");
            return None;
        };
        let ids: Vec<u32> = line.split(':').skip(2).take(2).map(|id| id.parse().unwrap()).collect();
        for name in ["", "m", "replica-a", "all.toml"] {
            chown(place.path(name), Some(ids[0]), Some(ids[1])).unwrap();
        }
        place.user = Some((ids[0], ids[1]));
        Some(place)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.volume.path(name)
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = mirrorfs();
        command.args(args).current_dir(self.path("")).env("HOME", self.path(""));
        command.env("XDG_RUNTIME_DIR", self.path("")).env_remove("XDG_STATE_HOME");
        if let Some((uid, gid)) = self.user {
            command.uid(uid).gid(gid);
        }
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

    /// What lies in the folder below the mountpoint, seen through a bind of its parent.
    fn below(&self) -> Vec<String> {
        let bind = self.path("bind");
        fs::create_dir_all(&bind).unwrap();
        let (from, to) = (self.path(""), bind.clone());
        let call = |args: &[&str]| Command::new(args[0]).args(&args[1..]).status().unwrap().success();
        assert!(call(&["mount", "--bind", from.to_str().unwrap(), to.to_str().unwrap()]));
        let names = fs::read_dir(bind.join("m")).unwrap();
        let names = names.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        assert!(call(&["umount", to.to_str().unwrap()]));
        names
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

/// What a program that writes by path has seen.
#[derive(Default)]
struct Written {
    /// Names of files that were written and fsynced.
    synced: Vec<String>,
    failed: usize,
    longest_outage: Duration,
}

/// Writes small files by path, fsyncs each, and goes on whatever happens.
fn write_by_path(root: &Path, stop: &AtomicBool) -> Written {
    let mut written = Written::default();
    let mut last_good = Instant::now();
    for n in 0.. {
        if stop.load(Ordering::Relaxed) {
            break;
        }
        let name = format!("f{n}");
        let write = || -> std::io::Result<()> {
            let mut file = File::create(root.join(&name))?;
            file.write_all(name.as_bytes())?;
            file.sync_all()
        };
        match write() {
            Ok(()) => {
                written.longest_outage = written.longest_outage.max(last_good.elapsed());
                last_good = Instant::now();
                written.synced.push(name);
            }
            Err(_) => {
                written.failed += 1;
                thread::sleep(Duration::from_millis(1));
            }
        }
    }
    written
}

/// The program of the issue: it writes by path while the daemon is killed again and again.
fn nothing_lands_below(place: &Place) {
    let deaths = (kills() + 5).to_string();
    place.mount(&[], &[("MIRRORFS_TEST_DEATHS", &deaths)]).ok();
    let seed = std::env::var("MIRRORFS_SEED").ok().and_then(|s| s.parse().ok()).unwrap_or(7_u64);
    println!("seed {seed}");
    let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(seed);
    let stop = Arc::new(AtomicBool::new(false));
    let writer = {
        let (root, stop, user) = (place.path("m"), Arc::clone(&stop), place.user);
        thread::spawn(move || {
            if let Some((uid, _)) = user {
                // SAFETY: this thread alone becomes the user, for files only.
                unsafe { libc::syscall(libc::SYS_setfsuid, uid) };
            }
            write_by_path(&root, &stop)
        })
    };
    for _ in 0..kills() {
        let pid = place.pid();
        thread::sleep(Duration::from_millis(rng.random_range(0..300)));
        kill(pid, libc::SIGKILL);
        wait_until(LIMIT, "the daemon is gone", || !runs(pid));
    }
    place.pid();
    thread::sleep(Duration::from_millis(200));
    stop.store(true, Ordering::Relaxed);
    let written = writer.join().unwrap();
    println!(
        "{} kills: {} files fsynced, {} writes failed, longest outage {:?}",
        kills(),
        written.synced.len(),
        written.failed,
        written.longest_outage
    );
    assert!(written.failed > 0, "no kill was noticed: the test shows nothing");
    assert_eq!(place.below(), Vec::<String>::new(), "written below the mountpoint");
    let there = |name: &String| place.user.is_some() || fs::read(place.path("m").join(name)).is_ok();
    let lost: Vec<_> = written.synced.iter().filter(|name| !there(name)).collect();
    assert_eq!(lost, Vec::<&String>::new(), "fsynced, and lost");
    place.run(&["umount", "m"]).ok();
    assert!(!is_mounted(&place.path("m")));
    wait_until(LIMIT, "all processes end", || processes_with(place.config.to_str().unwrap()).is_empty());
    // The replica has all of it, for a user's mount, too.
    let restored = place.volume.restore("a", "restored");
    for name in &written.synced {
        assert_eq!(fs::read(restored.join(name)).unwrap(), name.as_bytes(), "{name}");
    }
}

#[test]
fn a_program_that_writes_by_path_never_writes_below_the_mount() {
    let Some(place) = Place::new("guardian: by path") else { return };
    nothing_lands_below(&place);
}

#[test]
fn a_user_s_program_never_writes_below_the_mount() {
    let Some(place) = Place::of_user("guardian: user") else { return };
    nothing_lands_below(&place);
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
