//! The disk of the state folder fills up, from inside and from outside, while replicas are away.
//!
//! Writers must get ENOSPC in bounded time, reads must go on, and when there is space again, or replicas are back, everything must
//! work without a restart and nothing that was acknowledged be missing.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use support::mount::{How, Mount, Volume};
use support::run::{has_tool, is_root, wait_until};
use support::s3::S3Server;
use support::tree::Content;

/// Size of the small disk.
const DISK: u64 = 200 << 20;
/// No operation may take longer: a write waits two seconds for space, a read three for replicas; the rest is for slow machines.
const BOUND: Duration = Duration::from_secs(30);
/// Between two tries of writers, which fail at once while the disk is full.
const PAUSE: Duration = Duration::from_millis(10);
/// Longest time until things work again.
const AGAIN: Duration = Duration::from_secs(90);

/// A small filesystem of its own, mounted; gone when dropped.
struct SmallDisk(PathBuf);

impl SmallDisk {
    /// ext4 in a file, or memory; `None`, visibly, when neither can be had.
    fn mount(image: &Path, at: &Path) -> Option<Self> {
        fs::create_dir(at).unwrap();
        if !is_root() {
            println!("SKIPPED: full_disk: only root can mount a small disk");
            return None;
        }
        let run = |command: &mut Command| command.output().is_ok_and(|o| o.status.success());
        File::create(image).unwrap().set_len(DISK).unwrap();
        let ext4 = has_tool("full_disk (ext4)", "mkfs.ext4")
            && run(Command::new("mkfs.ext4").args(["-q", "-F", "-m", "0"]).arg(image))
            && run(Command::new("mount").args(["-o", "loop"]).arg(image).arg(at));
        if ext4 {
            fs::remove_dir(at.join("lost+found")).unwrap();
            return Some(Self(at.to_owned()));
        }
        println!("full_disk: no ext4 in a file here; memory instead");
        let size = format!("size={DISK}");
        if run(Command::new("mount").args(["-t", "tmpfs", "-o", &size, "tmpfs"]).arg(at)) {
            return Some(Self(at.to_owned()));
        }
        println!("SKIPPED: full_disk: neither a loop mount nor a tmpfs can be had");
        None
    }

    /// Fills it to the last byte.
    fn fill(&self) {
        let mut file = File::create(self.0.join("filler")).unwrap();
        for size in [1 << 20, 4096] {
            let piece = vec![0x5a; size];
            while file.write_all(&piece).is_ok() {}
        }
        // Some filesystems tell only now.
        let _ = file.sync_all();
        while file.write_all(&[0x5a; 4096]).is_ok() {}
    }

    fn empty(&self) {
        fs::remove_file(self.0.join("filler")).unwrap();
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        for _ in 0..50 {
            if Command::new("umount").arg(&self.0).output().is_ok_and(|o| o.status.success()) {
                return;
            }
            thread::sleep(Duration::from_millis(100));
        }
        let _ = Command::new("umount").arg("-l").arg(&self.0).output();
    }
}

fn content(name: &str, len: usize) -> Vec<u8> {
    let seed = u64::from_le_bytes(blake3::hash(name.as_bytes()).as_bytes()[..8].try_into().unwrap());
    // Of the kind that cannot be compressed.
    Content::new(seed & !3).take(len)
}

/// What was acknowledged: names and lengths of files that were fsynced together with their names.
#[derive(Default)]
struct Told(Mutex<BTreeMap<String, usize>>);

impl Told {
    fn add(&self, name: &str, len: usize) {
        self.0.lock().unwrap().insert(name.to_owned(), len);
    }

    fn all(&self) -> BTreeMap<String, usize> {
        self.0.lock().unwrap().clone()
    }
}

/// Runs an operation that must end in time, with success or one of these errors. Nothing may turn read-only.
#[track_caller]
fn bounded<T>(what: &str, allowed: &[i32], operation: impl FnOnce() -> io::Result<T>) -> Option<T> {
    let started = Instant::now();
    let done = operation();
    assert!(started.elapsed() < BOUND, "{what} took {:?}", started.elapsed());
    match done {
        Ok(done) => Some(done),
        Err(e) if e.raw_os_error().is_some_and(|code| allowed.contains(&code)) => None,
        Err(e) => panic!("{what}: {e}"),
    }
}

/// Waits until all is on the replicas. Files that lack bytes for want of space are named until they are removed.
#[track_caller]
fn all_is_sent(mount: &Mount) {
    let mut lost = 0;
    wait_until(AGAIN, "all is sent", || {
        let files = mount.status()["refused"]["files"].as_array().unwrap().clone();
        for file in &files {
            let text = file.as_str().unwrap();
            let path = text.split(" (").next().unwrap().trim_start_matches('/');
            bounded(path, &[libc::ENOENT, libc::ENOSPC], || fs::remove_file(mount.path(path)));
        }
        lost += files.len();
        mount.ask(&["sync"], &["--timeout", "60"]).code == Some(0)
    });
    println!("full_disk: {lost} files that lacked bytes were removed");
}

/// Writes a file durably; false when there is no space for it.
#[track_caller]
fn write(mount: &Mount, told: &Told, name: &str, len: usize) -> bool {
    let path = mount.path(name);
    let done = bounded(name, &[libc::ENOSPC], || {
        let mut file = File::create(&path)?;
        file.write_all(&content(name, len))?;
        file.sync_all()?;
        File::open(path.parent().unwrap())?.sync_all()
    });
    if done.is_some() {
        told.add(name, len);
    }
    done.is_some()
}

/// Reads files that were acknowledged; counts those that were there. What is only on replicas may be out of reach.
#[track_caller]
fn read_all(mount: &Mount, files: &BTreeMap<String, usize>, allowed: &[i32]) -> usize {
    let mut there = 0;
    for (name, len) in files {
        let path = mount.path(name);
        support::mount::drop_page_cache(&path);
        if let Some(found) = bounded(name, allowed, || fs::read(&path)) {
            assert!(found == content(name, *len), "{name} has other bytes than were acknowledged");
            there += 1;
        }
    }
    there
}

#[track_caller]
fn still_writable(mount: &Mount) {
    let status = mount.status();
    assert!(status["read_only"].is_null(), "{status}\n{}", mount.told());
}

#[track_caller]
fn write_again(mount: &Mount, told: &Told, name: &str, len: usize) {
    wait_until(AGAIN, "there is space again", || write(mount, told, name, len));
}

#[test]
fn a_full_disk_stops_writers_and_nothing_else() {
    let Some(mut volume) = Volume::new("full_disk") else { return };
    let mut s3 = S3Server::start();
    let folder = volume.folder("folder");
    let mut options = S3Server::options(&s3.http.url());
    options.push(("connect_timeout".into(), "1s".into()));
    let options: Vec<(&str, &str)> = options.iter().map(|(k, v)| (k.as_str(), v.as_str())).collect();
    volume.replica("cloud", "s3://bucket/p", &options);
    let Some(disk) = SmallDisk::mount(&volume.path("image"), &volume.path("state")) else { return };
    let how = ["--free-space-ratio=0.05", "--space-wait=2s", "--read-timeout=3s", "--commit-interval=1s"];
    let how = how.iter().fold(How::usual(), |how, arg| how.arg(arg));
    let mount = volume.mount_as(&how);
    let told = Told::default();
    let mut phase = Phase::new();

    for dir in ["old", "outside", "new", "names"] {
        fs::create_dir(mount.path(dir)).unwrap();
    }
    for i in 0..10 {
        assert!(write(&mount, &told, &format!("old/{i}"), 2 << 20));
    }
    mount.sync();
    let old = told.all();
    phase.end("prepared");

    // Somebody else fills the disk, again and again, while programs write: large files, and many names.
    outside(&disk, &mount, &told);
    // What is not sent yet would take the space of what comes.
    all_is_sent(&mount);
    phase.end("filled from outside");

    // Now the replicas are away, and what is written stays here until there is no more room.
    s3.http.stop();
    let away = volume.path("away");
    fs::rename(&folder, &away).unwrap();
    // A folder that is only gone would be made again.
    fs::write(&folder, "not a folder").unwrap();
    let (mut refused, mut i) = (0, 0);
    while refused < 3 {
        refused = if write(&mount, &told, &format!("new/{i}"), 1 << 20) { 0 } else { refused + 1 };
        i += 1;
        assert!(i < 1000, "the disk is never full");
    }
    println!("full_disk: {i} files of 1 MiB until ENOSPC");
    still_writable(&mount);
    phase.end("filled from inside");

    // What no replica has is all there; what they have may be, or is told to be out of reach, in time.
    let new: BTreeMap<_, _> = told.all().into_iter().filter(|(n, _)| n.starts_with("new/")).collect();
    let few = || format!("only {} files until the disk was full: {}", new.len(), mount.status());
    assert!(new.len() > 20, "{}", few());
    assert_eq!(read_all(&mount, &new, &[]), new.len());
    let there = read_all(&mount, &old, &[libc::EIO]);
    println!("full_disk: {there} of {} old files were still local", old.len());
    assert!(bounded("listing", &[], || fs::read_dir(mount.path("new"))).unwrap().count() >= new.len());
    phase.end("read while full");

    // Not a byte is left on the disk: still nothing but ENOSPC.
    disk.fill();
    for i in 0..20 {
        let path = mount.path(format!("names/full{i}"));
        bounded("mkdir", &[libc::ENOSPC], || fs::create_dir(&path));
    }
    for i in 0..3 {
        write(&mount, &told, &format!("new/brimful{i}"), 100_000);
    }
    assert_eq!(read_all(&mount, &new, &[]), new.len());
    still_writable(&mount);
    disk.empty();
    phase.end("brimful");

    // Replicas that are back take what is staged, and everything works again.
    fs::remove_file(&folder).unwrap();
    fs::rename(&away, &folder).unwrap();
    s3.http.restart();
    write_again(&mount, &told, "new/after", 3 << 20);
    assert_eq!(read_all(&mount, &old, &[]), old.len());
    all_is_sent(&mount);
    for i in 0..4 {
        write_again(&mount, &told, &format!("new/again{i}"), 2 << 20);
    }
    phase.end("works again");

    // A crash while the disk is full to the brim: the next mount starts all the same, and has everything.
    disk.fill();
    mount.kill9();
    let mount = volume.mount_as(&how);
    let all = told.all();
    assert_eq!(read_all(&mount, &all, &[]), all.len());
    disk.empty();
    write_again(&mount, &told, "new/restarted", 1 << 20);
    phase.end("killed while full");

    mount.sync();
    let all = told.all();
    assert_eq!(read_all(&mount, &all, &[]), all.len());
    let seen = support::mount::bytes_of(mount.root());
    mount.unmount();
    for replica in ["folder", "cloud"] {
        let restored = volume.restore(replica, &format!("from-{replica}"));
        let bytes = support::mount::bytes_of(&restored);
        assert_eq!(bytes.keys().collect::<Vec<_>>(), seen.keys().collect::<Vec<_>>(), "{replica}");
        for (path, bytes) in &bytes {
            assert!(seen[path] == *bytes, "{replica}: {} differs", path.display());
        }
    }
    phase.end("restored from each replica");
}

/// Fills and empties the disk while one thread writes large files and another one makes names.
fn outside(disk: &SmallDisk, mount: &Mount, told: &Told) {
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let large = scope.spawn(|| {
            let mut refused = 0;
            for i in 0.. {
                if done.load(Ordering::Relaxed) {
                    break;
                }
                let name = format!("outside/{}", i % 8);
                let path = mount.path(&name);
                // Written anew each time, so that the volume does not grow.
                bounded("removing", &[libc::ENOENT, libc::ENOSPC], || fs::remove_file(&path));
                told.0.lock().unwrap().remove(&name);
                refused += usize::from(!write(mount, told, &name, 3 << 20));
                thread::sleep(PAUSE);
            }
            refused
        });
        let names = scope.spawn(|| {
            let mut refused = 0;
            for i in 0.. {
                if done.load(Ordering::Relaxed) {
                    break;
                }
                let (dir, file) =
                    (mount.path(format!("names/{}", i % 500)), format!("names/{}/f{i}", i % 500));
                bounded("mkdir", &[libc::EEXIST, libc::ENOSPC], || fs::create_dir(&dir));
                let made = bounded("creating", &[libc::ENOENT, libc::ENOSPC], || {
                    fs::write(mount.path(&file), vec![b'x'; i % 3000])
                });
                refused += usize::from(made.is_none());
                thread::sleep(PAUSE / 10);
            }
            refused
        });
        for _ in 0..3 {
            disk.fill();
            thread::sleep(Duration::from_millis(1500));
            disk.empty();
            thread::sleep(Duration::from_millis(700));
        }
        done.store(true, Ordering::Relaxed);
        let (large, names) = (large.join().unwrap(), names.join().unwrap());
        println!(
            "full_disk: {large} large files and {names} names were refused while somebody else filled the disk"
        );
    });
    still_writable(mount);
    write_again(mount, told, "outside/behind", 1 << 20);
}

/// Says how long each part took.
struct Phase(Instant);

impl Phase {
    fn new() -> Self {
        Self(Instant::now())
    }

    fn end(&mut self, what: &str) {
        println!("full_disk: {what}: {:.1} s", self.0.elapsed().as_secs_f64());
        self.0 = Instant::now();
    }
}
