//! Content that the kernel hands over and that cannot be stored: told until it is written again, and never shown.
//!
//! The allowance is full of what the only replica cannot take. Programs write into the kernel's cache; `fsync`, `msync`
//! or `close` report the error once. Then there is space again, and everybody who asks must still be told.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::{AsRawFd, IntoRawFd};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::PathBuf;
use std::time::Duration;

use support::mount::{How, Mount, Volume};
use support::run::wait_until;

/// Longest time until space is there again, or the kernel has dropped its pages.
const AGAIN: Duration = Duration::from_secs(120);
/// Exit code of a command that could not do all.
const FAILURE: i32 = 1;
/// The same when the time allowed ran out.
const TIMED_OUT: i32 = 8;

/// A mount whose allowance is full, and the way to space.
struct Full {
    mount: Mount,
    volume: Volume,
    replica: PathBuf,
}

impl Full {
    fn new(test: &str) -> Option<Self> {
        let mut volume = Volume::new(test)?;
        volume.setting("cache_size = \"16MiB\"\nspace_wait = \"200ms\"\ncommit_interval = \"500ms\"");
        let replica = volume.folder("r");
        let mount = volume.mount_as(&How::usual());
        fs::write(mount.path("base"), b"0").unwrap();
        mount.sync();
        fs::rename(&replica, volume.path("away")).unwrap();
        File::create(&replica).unwrap();
        // Past the kernel's cache, so that the error comes here and now.
        let mut filler =
            OpenOptions::new().write(true).create(true).custom_flags(libc::O_DIRECT).open(mount.path("full"));
        let mut full = false;
        for n in 0..64u8 {
            full = filler.as_mut().unwrap().write_all(&noise(n, 1 << 20)).is_err();
            if full {
                break;
            }
        }
        assert!(full, "the allowance takes more than it should");
        Some(Self { mount, volume, replica })
    }

    /// The replica is back and takes what waits.
    fn make_space(&self) {
        fs::remove_file(&self.replica).unwrap();
        fs::rename(self.volume.path("away"), &self.replica).unwrap();
        fs::remove_file(self.mount.path("full")).unwrap();
        let probe = OpenOptions::new().write(true).create(true).custom_flags(libc::O_DIRECT).clone();
        wait_until(AGAIN, "there is space again", || {
            let file = probe.open(self.mount.path("probe"));
            file.and_then(|mut f| f.write_all(&noise(200, 1 << 20))).is_ok()
        });
    }

    /// `mirrorfs sync` must fail and name the file.
    fn sync_names(&self, name: &str) {
        let ran = self.mount.ask(&["sync"], &["--timeout", "170", "--json"]).with_code(FAILURE).says(&[name]);
        let told: serde_json::Value = serde_json::from_slice(&ran.stdout).unwrap();
        assert_eq!(told["refused"]["count"], 1, "{told}");
        let status = self.mount.status();
        assert!(status["refused"]["files"][0].as_str().unwrap().starts_with(name), "{status}");
        assert!(self.mount.ask(&["status"], &[]).ok().text().contains("1 file lacks bytes"));
    }

    /// What the replica holds of a file.
    fn restored(&self, to: &str, name: &str) -> Vec<u8> {
        fs::read(self.volume.restore("r", to).join(name)).unwrap()
    }
}

/// Bytes that cannot be compressed.
fn noise(seed: u8, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    blake3::Hasher::new().update(&[seed]).finalize_xof().fill(&mut bytes);
    bytes
}

fn code<T: std::fmt::Debug>(done: io::Result<T>) -> i32 {
    done.unwrap_err().raw_os_error().unwrap()
}

/// Closes a file and returns what `close` reports.
fn close(file: File) -> io::Result<()> {
    // SAFETY: the descriptor is open and nobody else's any more.
    if unsafe { libc::close(file.into_raw_fd()) } == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[test]
fn a_failed_fsync_is_told_until_the_file_is_written_again() {
    let Some(full) = Full::new("refused-write") else { return };
    let path = full.mount.path("x");
    let file = File::create(&path).unwrap();
    let reader = File::open(&path).unwrap();
    (&file).write_all(&[b'x'; 10_000]).unwrap();
    assert_eq!(code(file.sync_all()), libc::ENOSPC);
    // Nobody opens it: the daemon has the kernel drop its pages.
    wait_until(AGAIN, "descriptors that were open read nothing, too", || {
        reader.read_at(&mut [0; 100], 4096).is_err_and(|e| e.raw_os_error() == Some(libc::EIO))
    });
    full.make_space();
    for _ in 0..3 {
        assert_eq!(code(file.sync_all()), libc::ENOSPC, "a later fsync must not succeed");
    }
    assert_eq!(code(File::open(&path).unwrap().sync_all()), libc::ENOSPC, "nor by another descriptor");
    assert_eq!(code(close(File::open(&path).unwrap())), libc::ENOSPC, "nor may close");
    full.sync_names("/x");
    // The bytes are stored nowhere, and nobody reads them, or zeros in their place.
    assert_eq!(full.restored("lost", "x"), b"");
    assert_eq!(code(fs::read(&path)), libc::EIO);
    assert_eq!(code(fs::copy(&path, full.mount.path("copy"))), libc::EIO);
    // Written again, through the same descriptor, the last page in part.
    file.write_all_at(&[b'y'; 10_000], 0).unwrap();
    file.sync_all().unwrap();
    full.mount.sync();
    assert_eq!(fs::read(&path).unwrap(), [b'y'; 10_000]);
    assert_eq!(full.restored("whole", "x"), [b'y'; 10_000]);
    close(file).unwrap();
    drop(reader);
    full.mount.unmount();
}

#[test]
fn a_sync_tells_what_was_refused_when_it_asked_for_it() {
    let Some(full) = Full::new("refused-sync") else { return };
    let path = full.mount.path("x");
    let mut file = File::create(&path).unwrap();
    // Only the kernel has it until the sync asks for it.
    file.write_all(&[b'x'; 10_000]).unwrap();
    full.mount.ask(&["sync"], &["--timeout", "2"]).with_code(TIMED_OUT);
    full.make_space();
    for _ in 0..3 {
        full.sync_names("/x (no space left)");
    }
    assert_eq!(code(fs::read(&path)), libc::EIO);
    drop(file);
    File::create(&path).unwrap();
    full.mount.sync();
    full.mount.unmount();
}

#[test]
fn what_close_reported_is_told_again_until_the_file_is_removed() {
    let Some(full) = Full::new("refused-close") else { return };
    let path = full.mount.path("dir/x");
    fs::create_dir(path.parent().unwrap()).unwrap();
    let mut file = File::create(&path).unwrap();
    file.write_all(b"some words").unwrap();
    assert_eq!(code(close(file)), libc::ENOSPC);
    full.make_space();
    assert_eq!(code(close(File::open(&path).unwrap())), libc::ENOSPC);
    assert_eq!(code(fs::read(&path)), libc::EIO);
    full.sync_names("/dir/x");
    // A change of one byte changes no others: they are still held, and stored with it.
    let file = OpenOptions::new().read(true).write(true).open(&path).unwrap();
    file.write_all_at(b"S", 0).unwrap();
    // No fsync has seen the first error yet: the kernel tells it now, once.
    let _ = file.sync_all();
    file.sync_all().unwrap();
    assert_eq!(fs::read(&path).unwrap(), b"Some words");
    drop(file);
    full.mount.sync();
    fs::remove_file(&path).unwrap();
    full.mount.unmount();
}

#[test]
fn truncating_ends_it_and_so_does_removing() {
    let Some(full) = Full::new("refused-truncate") else { return };
    let [a, b] = ["a", "b"].map(|name| full.mount.path(name));
    for path in [&a, &b] {
        let mut file = File::create(path).unwrap();
        file.write_all(&[b'x'; 10_000]).unwrap();
        assert_eq!(code(file.sync_all()), libc::ENOSPC);
    }
    full.make_space();
    assert_eq!(code(File::open(&a).unwrap().sync_all()), libc::ENOSPC);
    let ran = full.mount.ask(&["sync"], &["--timeout", "170"]).with_code(FAILURE);
    ran.says(&["2 files lack bytes", "/a (", "/b ("]);
    let file = File::create(&a).unwrap();
    file.sync_all().unwrap();
    fs::remove_file(&b).unwrap();
    full.mount.sync();
    assert_eq!(fs::read(&a).unwrap(), b"");
    close(file).unwrap();
    full.mount.unmount();
}

#[test]
fn a_failed_msync_is_told_until_the_mapping_is_written_again() {
    const LEN: usize = 3 * 4096;
    let Some(full) = Full::new("refused-mmap") else { return };
    let path = full.mount.path("x");
    let file = OpenOptions::new().read(true).write(true).create(true).truncate(true).open(&path).unwrap();
    file.set_len(LEN as u64).unwrap();
    // SAFETY: a fresh mapping of an open file that is that long; nobody cuts it.
    let map = unsafe {
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        libc::mmap(std::ptr::null_mut(), LEN, prot, libc::MAP_SHARED, file.as_raw_fd(), 0)
    };
    assert_ne!(map, libc::MAP_FAILED);
    // SAFETY: within the mapping, which nothing else in this process uses.
    let fill = |byte: u8| unsafe { std::ptr::write_bytes(map.cast::<u8>(), byte, LEN) };
    let msync = || match unsafe { libc::msync(map, LEN, libc::MS_SYNC) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    };
    fill(b'm');
    assert_eq!(code(msync()), libc::ENOSPC);
    full.make_space();
    for _ in 0..3 {
        assert_eq!(code(msync()), libc::ENOSPC, "a later msync must not succeed");
    }
    full.sync_names("/x");
    assert_eq!(full.restored("lost", "x"), [0; LEN]);
    assert_eq!(code(fs::read(&path)), libc::EIO);
    fill(b'n');
    msync().unwrap();
    full.mount.sync();
    assert_eq!(fs::read(&path).unwrap(), [b'n'; LEN]);
    assert_eq!(full.restored("whole", "x"), [b'n'; LEN]);
    // SAFETY: ours, and not used any more.
    unsafe { libc::munmap(map, LEN) };
    drop(file);
    full.mount.unmount();
}

#[test]
fn an_unmount_says_what_is_lost_and_the_next_mount_shows_what_is_stored() {
    let Some(mut full) = Full::new("refused-umount") else { return };
    let path = full.mount.path("x");
    let mut file = File::create(&path).unwrap();
    file.write_all(&[b'x'; 10_000]).unwrap();
    assert_eq!(code(file.sync_all()), libc::ENOSPC);
    drop(file);
    full.make_space();
    full.mount.ask(&["umount"], &["--wait"]).with_code(FAILURE).says(&["/x"]);
    assert!(path.exists(), "what was to be waited for can never come, so that it is still mounted");
    full.mount.ask(&["umount"], &[]).with_code(FAILURE).says(&["1 file lacks bytes", "/x"]);
    full.mount.wait_end();
    assert!(full.mount.told().contains("1 file lacks bytes"), "the log says so, too");
    let mount = full.volume.mount();
    assert_eq!(fs::read(mount.path("x")).unwrap(), b"");
    File::open(mount.path("x")).unwrap().sync_all().unwrap();
    mount.sync();
    mount.unmount();
}
