//! The mount as the rest of the system sees it: mount(8), fstab, signals, a supervisor, the death of its daemon, locks.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use mirrorfs::fuse::{MountOptions, remount};
use support::mount::{How, LIMIT, Volume, is_mounted};
use support::run::{Ran, has_tool, is_root, run, wait_until};

fn kill(pid: u32, signal: i32) {
    // SAFETY: a process that the caller knows to be his.
    assert_eq!(unsafe { libc::kill(pid.try_into().unwrap(), signal) }, 0);
}

fn sh(script: &str) -> Ran {
    run(Command::new("sh").args(["-euc", script]), LIMIT)
}

// --- signals -------------------------------------------------------------------------------------------------------------

#[test]
fn a_signal_ends_a_mount_in_use_and_nothing_is_lost() {
    let Some(mut volume) = Volume::new("integration: busy") else { return };
    volume.folder("a");
    let mut m = volume.mount();
    fs::write(m.path("closed"), vec![1; 300_000]).unwrap();
    let mut file = File::create(m.path("open")).unwrap();
    file.write_all(&vec![2; 3_000_000]).unwrap();
    kill(m.pid(), libc::SIGHUP);
    kill(m.pid(), libc::SIGTERM);
    wait_until(LIMIT, "it is said to be in use", || m.told().contains("is in use"));
    assert!(is_mounted(m.root()), "a chance to close what is open");
    kill(m.pid(), libc::SIGTERM);
    let begin = Instant::now();
    let status = m.wait_end();
    assert!(status.success(), "{status}: {}", m.told());
    assert!(begin.elapsed() < Duration::from_secs(60), "{:?}", begin.elapsed());
    assert!(!is_mounted(m.root()));
    assert!(m.told().contains("SIGHUP"), "{}", m.told());
    assert!(file.sync_all().is_err(), "nobody is there to keep it");
    // Also on the replica: what the kernel held at that moment was shipped.
    let to = volume.path("to");
    volume.restore_to("a", &to);
    assert_eq!(fs::read(to.join("closed")).unwrap(), vec![1; 300_000]);
    assert_eq!(fs::read(to.join("open")).unwrap(), vec![2; 3_000_000]);
}

// --- a supervisor ----------------------------------------------------------------------------------------------------------

struct Supervisor {
    socket: UnixDatagram,
    path: PathBuf,
    heard: Vec<String>,
}

impl Supervisor {
    fn new(path: PathBuf) -> Self {
        let socket = UnixDatagram::bind(&path).unwrap();
        socket.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
        Self { socket, path, heard: Vec::new() }
    }

    /// All that was said since the last time.
    fn listen(&mut self) -> String {
        let mut buffer = vec![0; 64 << 10];
        let mut new = String::new();
        while let Ok(n) = self.socket.recv(&mut buffer) {
            new.push_str(std::str::from_utf8(&buffer[..n]).unwrap());
            new.push('\n');
        }
        self.heard.push(new.clone());
        new
    }

    fn wait_for(&mut self, what: &str) {
        wait_until(LIMIT, what, || self.listen().contains(what));
    }
}

/// Threads of a process that answer the kernel, stopped until this is dropped.
struct Frozen(Vec<i32>);

impl Frozen {
    /// `None`, visibly, where threads may not be stopped so.
    fn servers(pid: u32) -> Option<Self> {
        let tasks = fs::read_dir(format!("/proc/{pid}/task")).unwrap().map(Result::unwrap);
        let serving =
            tasks.filter(|t| fs::read_to_string(t.path().join("comm")).unwrap().starts_with("fuser-"));
        let all: Vec<i32> = serving.map(|t| t.file_name().to_str().unwrap().parse().unwrap()).collect();
        assert!(!all.is_empty());
        let mut frozen = Self(Vec::new());
        for tid in all {
            // SAFETY: numbers only; the thread is one of our child's.
            unsafe {
                if libc::ptrace(libc::PTRACE_SEIZE, tid, 0, 0) != 0 {
                    println!("SKIP: the watchdog's test: ptrace: {}", std::io::Error::last_os_error());
                    return None;
                }
                frozen.0.push(tid);
                assert_eq!(libc::ptrace(libc::PTRACE_INTERRUPT, tid, 0, 0), 0);
                assert_eq!(libc::waitpid(tid, std::ptr::null_mut(), libc::__WALL), tid);
            }
        }
        Some(frozen)
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        for tid in &self.0 {
            // SAFETY: as above.
            unsafe { libc::ptrace(libc::PTRACE_DETACH, *tid, 0, 0) };
        }
    }
}

#[test]
fn a_supervisor_is_told_and_its_watchdog_means_it() {
    let Some(mut volume) = Volume::new("integration: supervisor") else { return };
    volume.folder("a");
    let mut supervisor = Supervisor::new(volume.path("notify"));
    let how =
        How::usual().env("NOTIFY_SOCKET", supervisor.path.to_str().unwrap()).env("WATCHDOG_USEC", "600000");
    let mut m = volume.start(&how);
    supervisor.wait_for("READY=1");
    assert!(is_mounted(m.root()), "ready before it was mounted");
    assert!(supervisor.heard.concat().contains("EXTEND_TIMEOUT_USEC="), "{:?}", supervisor.heard);
    assert!(supervisor.heard.concat().contains("STATUS=volume "), "{:?}", supervisor.heard);
    supervisor.wait_for("WATCHDOG=1");
    if let Some(frozen) = Frozen::servers(m.pid()) {
        wait_until(LIMIT, "the watchdog notices", || m.told().contains("the watchdog is not told"));
        supervisor.listen();
        std::thread::sleep(Duration::from_millis(700));
        assert!(!supervisor.listen().contains("WATCHDOG=1"), "it was told although nobody answers");
        drop(frozen);
        supervisor.wait_for("WATCHDOG=1");
    }
    kill(m.pid(), libc::SIGTERM);
    supervisor.wait_for("STOPPING=1");
    assert!(m.wait_end().success());
}

// --- locks ---------------------------------------------------------------------------------------------------------------

#[test]
fn locks_are_those_of_a_local_filesystem() {
    if !has_tool("integration: locks", "python3") {
        return;
    }
    let Some(mut volume) = Volume::new("integration: locks") else { return };
    volume.folder("a");
    let m = volume.mount();
    let (local, ours) = (volume.path("local"), m.path("ours"));
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/support/locks.py");
    let [local, ours] = [local, ours].map(|dir| {
        fs::create_dir(&dir).unwrap();
        run(Command::new("python3").arg(&script).arg(&dir), LIMIT).ok().text()
    });
    assert!(local.lines().count() > 90, "{local}");
    for (local, ours) in local.lines().zip(ours.lines()) {
        assert_eq!(local, ours, "local, and in the mount");
    }
    assert_eq!(local, ours);

    // What happens to the mount does not touch them: names, flags, a sync, the caches' eviction.
    fs::write(m.path("f"), "x").unwrap();
    let held = File::open(m.path("f")).unwrap();
    held.lock().unwrap();
    let taken = |what: &str, name: &str| {
        let other = File::open(m.path(name)).unwrap();
        assert!(matches!(other.try_lock(), Err(fs::TryLockError::WouldBlock)), "{what}");
    };
    taken("first", "f");
    fs::rename(m.path("f"), m.path("g")).unwrap();
    taken("renamed", "g");
    m.sync();
    taken("synced", "g");
    if is_root() {
        let flags = MountOptions { read_only: true, suid: true, dev: true, ..MountOptions::default() };
        remount(m.root(), &flags, false).unwrap();
        assert!(File::create(m.path("no")).is_err());
        taken("read-only", "g");
        remount(m.root(), &MountOptions { read_only: false, ..flags }, false).unwrap();
        taken("writable", "g");
    }
    fs::remove_file(m.path("g")).unwrap();
    drop(held);
    m.unmount();
}

// --- mount(8) --------------------------------------------------------------------------------------------------------------

/// A world of its own in which mount(8) finds us. Only the thread that made it lives there, with the processes it starts.
struct World {
    dir: tempfile::TempDir,
}

impl World {
    /// `None`, visibly, when it cannot be made.
    fn new(test: &str) -> Option<Self> {
        let tools = ["mount", "umount", "findmnt", "mountpoint"];
        if !is_root() || !tools.iter().all(|tool| has_tool(test, tool)) || Volume::new(test).is_none() {
            println!("SKIP: {test}: needs root");
            return None;
        }
        // SAFETY: no memory is touched. This thread alone moves.
        assert_eq!(unsafe { libc::unshare(libc::CLONE_NEWNS) }, 0, "{}", std::io::Error::last_os_error());
        let dir = tempfile::tempdir().unwrap();
        let install = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/install");
        let ran = sh(&format!(
            // Other tests' mounts must not live on because of a copy here.
            "mount --make-rprivate /
             findmnt -rn -t fuse.mirrorfs -o TARGET | while read -r m; do umount -l \"$m\" || true; done
             cd {dir}
             mount -t tmpfs none . && cd {dir} && mkdir over work prefix m r && chmod 700 r
             mount -t overlay none -o lowerdir=$(realpath /sbin),upperdir=over,workdir=work /sbin
             {install} --prefix {dir}/prefix --binary {program}",
            dir = dir.path().display(),
            install = install.display(),
            program = env!("CARGO_BIN_EXE_mirrorfs"),
        ));
        if ran.code != Some(0) {
            println!("SKIP: {test}: this system does not allow a /sbin of our own: {}", ran.stderr);
            return None;
        }
        fs::write(
            dir.path().join("c.toml"),
            "free_space_ratio = 0\ncache_size = \"64MiB\"\nstate = \"s\"\n[replica.a]\nurl = \"r\"\n",
        )
        .unwrap();
        Some(Self { dir })
    }

    fn sh(&self, script: &str) -> Ran {
        sh(&format!("cd {}\n{script}", self.dir.path().display()))
    }

    /// The kernel's line for our mount, without its path; empty when there is none.
    fn line(&self) -> String {
        self.sh("findmnt -rn -M m -o FSTYPE,SOURCE,OPTIONS || true")
            .text()
            .replace(self.dir.path().to_str().unwrap(), "DIR")
    }
}

impl Drop for World {
    fn drop(&mut self) {
        // A daemon whose mount is taken away ends by itself.
        self.sh("dir=$PWD; for m in m m2; do umount -l $m || true; done; cd /; umount -l $dir || true");
    }
}

#[test]
fn mount_8_takes_it_for_a_filesystem() {
    let Some(w) = World::new("integration: mount(8)") else { return };
    let ran = w
        .sh("mount -t fuse.mirrorfs c.toml m -o noatime,nodev,_netdev,nofail,allow_other,x-systemd.automount")
        .ok();
    assert_eq!((ran.text().as_str(), ran.stderr.as_str()), ("", ""), "a mount that works says nothing");
    let line = w.line();
    assert!(line.starts_with("fuse.mirrorfs DIR/c.toml rw,nodev,noatime,"), "{line}");
    w.sh("mountpoint -q m; df -t fuse.mirrorfs m | grep -q c.toml; echo hi > m/f").ok();

    // The flags change, the options that FUSE shows come back, and nothing else is touched.
    let ran = w.sh("mount -o remount,ro m; ! touch m/no 2>/dev/null").ok();
    assert_eq!(ran.stderr, "", "it was mounted with allow_other before");
    assert!(w.line().starts_with("fuse.mirrorfs DIR/c.toml ro,nodev,noatime,"), "{}", w.line());
    w.sh("mount -o remount,rw,nosuid m; touch m/yes").ok();
    assert!(w.line().starts_with("fuse.mirrorfs DIR/c.toml rw,nosuid,nodev,noatime,"), "{}", w.line());
    w.sh("exec 5>m/busy; mount -o remount,ro m").with_code(32).says(&["open for writing", "fuser -vm"]);
    w.sh("mount -o remount,cache_size=1GiB m").ok().says(&["does not change cache_size"]);
    // What is in force already is no news, in whatever spelling it comes.
    for same in
        ["acl,space_wait=0.5m,fsync=local,relatime", "cache_size=65536KiB,allow_other", "replica=a=$PWD/r"]
    {
        let ran = w.sh(&format!("mount -o remount,{same} m")).ok();
        assert_eq!((ran.text().as_str(), ran.stderr.as_str()), ("", ""), "{same}");
    }
    w.sh("mount -o remount,fsync=local,noacl,replica=$PWD/s m")
        .ok()
        .says(&["does not change noacl, the list of replicas: that"]);
    w.sh("exec 5>m/busy; umount m").with_code(32);
    w.sh("umount c.toml").ok();
    assert_eq!(w.line(), "");

    // At once again, although the last daemon is still sealing and sending; by both names, and by the helper of FUSE.
    for (n, how) in ["-t mirrorfs c.toml", "-t fuse.mirrorfs c.toml", "-t mirrorfs r -o state=s"]
        .iter()
        .cycle()
        .take(6)
        .enumerate()
    {
        w.sh(&format!("mount {how} m; test $(cat m/f) = hi; echo {n} > m/{n}; umount m")).ok();
    }
    w.sh("mirrorfs=prefix/bin/mirrorfs; $mirrorfs $PWD/c.toml $PWD/m -o rw,dev,suid; test $(cat m/5) = 5; umount m").ok();

    // Read-only, then writable: the daemon opens the volume anew.
    w.sh("mount -r -t mirrorfs c.toml m; ! touch m/no 2>/dev/null").ok();
    assert!(w.line().contains("/c.toml ro,"), "{}", w.line());
    w.sh("exec 5<m/f; mount -o remount,rw m").with_code(32).says(&["is in use"]);
    w.sh("mount -o remount,rw m; touch m/now; umount m").ok();

    // Taken out of the tree while in use: the daemon stays for who uses it, and everything written is kept.
    w.sh("mount -t mirrorfs c.toml m; exec 5>m/lazy; echo one >&5; umount -l m; echo two >&5; exec 5>&-
          mount -t mirrorfs c.toml m; test \"$(cat m/lazy)\" = \"$(printf 'one\ntwo')\"; umount m")
        .ok();

    // Errors, with the codes of mount(8).
    w.sh("mount -t mirrorfs -o bogus c.toml m").with_code(1).says(&["-o bogus: unknown option"]);
    w.sh("mount -t mirrorfs -o ro none.toml m").with_code(1).says(&["none.toml"]);
    w.sh("mount -f -t mirrorfs c.toml m; ! mountpoint -q m").ok();
    w.sh("mount -f -t mirrorfs -o cache_size=1 c.toml m").with_code(1).says(&["cache_size"]);
    w.sh("mount -s -t mirrorfs -o bogus c.toml m; umount m").ok();
    w.sh("mkdir r2; mkdir m2; mount -t mirrorfs c.toml m; mount -t mirrorfs c.toml m2")
        .with_code(32)
        .says(&["in use"]);
    w.sh("mount -t mirrorfs r2 m -o state=s2").with_code(32).says(&["already mounted"]);
    w.sh("umount m").ok();

    // fstab: all of it, one line by its directory, and again, which does nothing.
    w.sh("echo \"$PWD/c.toml $PWD/m mirrorfs _netdev,nofail,noexec 0 0\" > fstab
          echo \"$PWD/r2 $PWD/m2 fuse.mirrorfs noauto,user,state=s2,replica=b=$PWD/r3\\134,x 0 0\" >> fstab
          mount -T fstab -a; mount -T fstab -a; mountpoint -q m; if mountpoint -q m2; then exit 9; fi
          mount -T fstab m2; touch m2/x; ls r3,x/volume.json; umount m2 m")
        .ok();
}
