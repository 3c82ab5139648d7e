//! Mounts whose daemon dies or ends while something still waits for it, or uses the mount elsewhere: nothing may hang.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use support::mount::{How, LIMIT, Mount, Volume, is_mounted};
use support::run::{Ran, has_tool, is_root, run, wait_until};
use support::s3::S3Server;

/// What hangs is given this long on a slow machine.
const BOUND: Duration = Duration::from_secs(60);

/// Processes of this machine whose command line has these words.
fn processes(words: &[&str]) -> Vec<u32> {
    let pids = fs::read_dir("/proc").unwrap().filter_map(|e| e.ok()?.file_name().to_str()?.parse().ok());
    pids.filter(|pid: &u32| {
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let line: Vec<&[u8]> = line.split(|b| *b == 0).collect();
        words.iter().all(|word| line.contains(&word.as_bytes()))
    })
    .collect()
}

fn invalidators(root: &Path) -> Vec<u32> {
    processes(&["invalidate", root.to_str().unwrap()])
}

/// The daemon's process; that of the mount is its guardian's.
fn daemon(mount: &Mount) -> u32 {
    mount.status()["pid"].as_u64().unwrap().try_into().unwrap()
}

/// A dead mount stays dead.
fn without_restart() -> How {
    How::usual().arg("--no-restart")
}

fn kill(pid: u32, signal: i32) {
    // SAFETY: a process that this test started.
    unsafe { libc::kill(i32::try_from(pid).unwrap(), signal) };
}

/// A question to the mount, by another program: one that hangs is killed and fails the test.
#[track_caller]
fn stat(root: &Path) -> Ran {
    run(Command::new("stat").arg("-f").arg(root), BOUND)
}

/// A program that is ended with the test. Files of a full mount are open only in such: a process that closes its copy of
/// one, also between fork and exec, waits until the pages are written.
struct Program(Child);

impl Program {
    fn start(command: &mut Command) -> Self {
        Self(command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap())
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A mount whose cache is full of what cannot be sent, so that writes wait for very long.
struct Full {
    // Ended in this order.
    mount: Mount,
    daemon: u32,
    _writer: Program,
    _server: S3Server,
    volume: Volume,
}

impl Full {
    fn new(test: &str) -> Option<Self> {
        let mut volume = Volume::new(test)?;
        let mut server = S3Server::start();
        volume.spec(&server.spec("off", "x", &[]));
        volume.setting("cache_size = \"64MiB\"\nspace_wait = \"10m\"\ncommit_interval = \"500ms\"");
        let mount = volume.mount_as(&without_restart());
        let daemon = daemon(&mount);
        server.http.stop();
        // Past the kernel's cache, so that its limit of dirty pages plays no part.
        let mut dd = Command::new("dd");
        dd.args(["if=/dev/urandom", "bs=1M", "count=256", "oflag=direct"]);
        let writer = Program::start(dd.arg(format!("of={}", mount.path("big").display())));
        let size = || fs::metadata(mount.path("big")).map_or(0, |m| m.len());
        let (mut seen, mut since) = (0, Instant::now());
        while seen == 0 || since.elapsed() < Duration::from_secs(8) {
            thread::sleep(Duration::from_millis(100));
            let now = size();
            if now != seen {
                (seen, since) = (now, Instant::now());
            }
            assert!(seen < 256 << 20, "the cache is not full");
        }
        println!("{test}: a write waits after {} MiB", seen >> 20);
        Some(Self { mount, daemon, _writer: writer, _server: server, volume })
    }

    /// Leaves pages in the kernel that the daemon does not take for now, and asks for something that waits for them.
    fn wait_for_pages(&self) -> Program {
        const SCRIPT: &str = "import os, sys\nf = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)\n\
            os.write(f, b'x' * 100)\nos.lseek(f, 0, os.SEEK_DATA)";
        let asks = Program::start(Command::new("python3").args(["-c", SCRIPT]).arg(self.mount.path("small")));
        wait_until(BOUND, "a call to the kernel waits", || {
            let mut callers = invalidators(self.mount.root());
            callers.push(self.daemon);
            callers.iter().any(|pid| threads_in_kernel(*pid) > 0)
        });
        asks
    }
}

/// Threads of `pid` that sleep uninterruptibly.
fn threads_in_kernel(pid: u32) -> usize {
    let Ok(tasks) = fs::read_dir(format!("/proc/{pid}/task")) else { return 0 };
    let state = |path: &Path| {
        let stat = fs::read_to_string(path.join("stat")).unwrap_or_default();
        stat.rsplit_once(") ").and_then(|(_, rest)| rest.chars().next())
    };
    tasks.filter(|t| t.as_ref().is_ok_and(|t| state(&t.path()) == Some('D'))).count()
}

#[test]
fn a_daemon_killed_while_pages_are_pulled_leaves_nothing_that_hangs() {
    const TEST: &str = "dead mounts: pull";
    if !has_tool(TEST, "python3") {
        return;
    }
    let Some(full) = Full::new(TEST) else { return };
    let (mount, volume) = (&full.mount, &full.volume);
    let root = mount.root().to_owned();
    let _asks = full.wait_for_pages();
    // The mount works meanwhile.
    stat(&root).ok();
    let pid = full.daemon;
    let begin = Instant::now();
    kill(pid, libc::SIGKILL);
    let lock = File::open(volume.path("state/LOCK")).unwrap();
    // A thread that cannot be killed would keep the daemon's descriptors open.
    wait_until(BOUND, "the daemon is gone and LOCK is free", || {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        // Its parent may not have waited for it yet.
        (stat.is_empty() || stat.contains(") Z "))
            // SAFETY: a call on a number.
            && unsafe { libc::flock(lock.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) } == 0
    });
    drop(lock);
    wait_until(BOUND, "the invalidator is gone", || invalidators(&root).is_empty());
    assert!(is_mounted(&root), "the folder below would show");
    stat(&root).with_code(1).says(&["not connected"]);
    println!("{TEST}: all was over after {:?}", begin.elapsed());
}

#[test]
fn an_invalidator_that_was_killed_is_started_again() {
    let Some(mut volume) = Volume::new("dead mounts: again") else { return };
    volume.folder("a");
    let mount = volume.mount();
    let file = File::create(mount.path("f")).unwrap();
    let ask = |at: u64| {
        file.write_at(&[7; 100], at).unwrap();
        // SAFETY: a call on a number.
        unsafe { libc::lseek(file.as_raw_fd(), i64::try_from(at).unwrap(), libc::SEEK_DATA) }
    };
    assert!(invalidators(mount.root()).is_empty(), "it is started when needed");
    assert_eq!(ask(1 << 20), 1 << 20);
    let first = invalidators(mount.root());
    assert_eq!(first.len(), 1, "{first:?}");
    kill(first[0], libc::SIGTERM);
    assert_eq!(ask(2 << 20), 2 << 20);
    assert_eq!(invalidators(mount.root()), first, "it takes no signal for itself");
    kill(first[0], libc::SIGKILL);
    assert_eq!(ask(3 << 20), 3 << 20);
    let second = invalidators(mount.root());
    assert!(second.len() == 1 && second != first, "{first:?} {second:?}");
    let root = mount.root().to_owned();
    drop(file);
    mount.unmount();
    wait_until(BOUND, "the invalidator is gone", || invalidators(&root).is_empty());
}

#[test]
fn a_connection_can_be_ended_and_the_mount_stays() {
    const TEST: &str = "dead mounts: abort";
    if !is_root() {
        return println!("SKIP: {TEST}: without root that takes a mounted fusectl");
    }
    let Some(mut volume) = Volume::new(TEST) else { return };
    volume.folder("a");
    let mount = volume.mount();
    let root = mount.root().to_owned();
    let entry = mirrorfs::fuse::mountinfo::mount_at(&root).unwrap().unwrap();
    // A daemon that answers nothing.
    kill(daemon(&mount), libc::SIGSTOP);
    let asks = Command::new("stat").arg("-f").arg(&root).stderr(Stdio::piped()).spawn().unwrap();
    mirrorfs::fuse::abort_connection("0:999999", &root).unwrap_err();
    mirrorfs::fuse::abort_connection(&entry.device, &root).unwrap();
    let asked = asks.wait_with_output().unwrap();
    assert!(!asked.status.success());
    assert!(stat(&root).stderr.contains("not connected"));
    let there = mirrorfs::fuse::mountinfo::mount_at(&root).unwrap().unwrap();
    assert_eq!((there.id, there.device), (entry.id, entry.device), "it is still in the tree");
    mount.kill9();
}

#[test]
fn an_unmount_ends_although_another_namespace_has_the_mount() {
    const TEST: &str = "dead mounts: elsewhere";
    if !is_root() {
        return println!("SKIP: {TEST}: needs root");
    }
    let Some(mut volume) = Volume::new(TEST) else { return };
    volume.folder("a");
    let mut mount = volume.mount_as(&How::usual().arg("--commit-interval=1h"));
    let root = mount.root().to_owned();
    // A container, as it were: it has a file open, writes to it, and lives on.
    let script = "exec 5>held; printf before >&5; echo ready; read x; printf after >&5; sync held || echo failed; read x";
    let mut holder = Command::new("unshare")
        .args(["--mount", "--propagation", "private", "sh", "-c", script])
        .current_dir(&root)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut told = BufReader::new(holder.stdout.take().unwrap()).lines();
    assert_eq!(told.next().unwrap().unwrap(), "ready");
    let begin = Instant::now();
    let ran = mount.ask(&["umount"], &[]).ok();
    println!("{TEST}: {:?}: {} {}", begin.elapsed(), ran.text(), ran.stderr);
    assert!(begin.elapsed() < LIMIT / 2, "{:?}", begin.elapsed());
    assert!(ran.text().contains("unmounted"), "{}", ran.text());
    let named = format!("process {} (sh) at {}", holder.id(), root.display());
    let ran = ran.says(&["still mounted elsewhere", &named]);
    drop(ran);
    assert!(mount.wait_end().success(), "{}", mount.told());
    assert!(mount.told().contains(&named), "{}", mount.told());
    assert!(!is_mounted(&root));
    holder.stdin.as_mut().unwrap().write_all(b"\n").unwrap();
    assert_eq!(told.next().unwrap().unwrap(), "failed");
    holder.kill().unwrap();
    holder.wait().unwrap();
    drop(mount);
    let restored = volume.restore("a", "to");
    assert_eq!(fs::read_to_string(restored.join("held")).unwrap(), "before");
    volume.mount().unmount();
}

#[test]
fn an_unmount_ends_a_connection_that_something_keeps_open() {
    const TEST: &str = "dead mounts: kept open";
    if !is_root() {
        return println!("SKIP: {TEST}: without root that takes a mounted fusectl");
    }
    let Some(mut volume) = Volume::new(TEST) else { return };
    volume.folder("a");
    let mount = volume.mount_as(&without_restart());
    let root = mount.root().to_owned();
    let daemon = daemon(&mount);
    let file = File::create(mount.path("f")).unwrap();
    file.write_at(&[7; 100], 0).unwrap();
    // SAFETY: a call on a number.
    unsafe { libc::lseek(file.as_raw_fd(), 0, libc::SEEK_DATA) };
    drop(file);
    let holds = invalidators(&root);
    assert_eq!(holds.len(), 1, "{holds:?}");
    // Asleep, it holds the connection open when the daemon is gone.
    kill(holds[0], libc::SIGSTOP);
    kill(daemon, libc::SIGKILL);
    // Nobody answers: without an end of the connection this would be the state of things for ever.
    let mut asks = Program::start(Command::new("cat").arg(root.join("none")));
    let ran = mount.ask(&["umount"], &[]);
    wait_until(BOUND, "a question without an answer ends", || asks.0.try_wait().unwrap().is_some());
    kill(holds[0], libc::SIGCONT);
    ran.ok();
    assert!(!is_mounted(&root));
    wait_until(BOUND, "the invalidator is gone", || invalidators(&root).is_empty());
    mount.kill9();
}
