//! Random operations through a real mount, each done on a plain local directory beside it, which is the reference: the same answers
//! and the same tree, also after remounts, kills behind a sync, and machines lost.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::ffi::CString;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use support::mount::{How, Volume};
use support::run::seed;
use support::tree::Snapshot;

/// Few names, so that they collide.
const NAMES: [&str; 8] = ["a", "b", "c", "d", "e", "f", "g", "h"];
const OPERATIONS: usize = 6000;
const LARGEST: u64 = 3 << 20;

/// One operation, with everything that was drawn for it.
#[derive(Clone, Debug)]
enum Op {
    Write(PathBuf, u64, Vec<u8>),
    Append(PathBuf, Vec<u8>),
    Truncate(PathBuf, u64),
    Punch(PathBuf, u64, u64),
    Copy(PathBuf, PathBuf, u64, u64, usize),
    Mkdir(PathBuf),
    Rmdir(PathBuf),
    Unlink(PathBuf),
    Rename(PathBuf, PathBuf, u32),
    Link(PathBuf, PathBuf),
    Symlink(PathBuf, PathBuf),
    Chmod(PathBuf, u32),
    Xattr(PathBuf, Vec<u8>),
    Read(PathBuf, u64, usize),
}

fn draw(rng: &mut ChaCha8Rng) -> Op {
    let path = |rng: &mut ChaCha8Rng| -> PathBuf {
        (0..[1, 1, 1, 2, 2, 3][rng.random_range(0..6)])
            .map(|_| NAMES[rng.random_range(0..NAMES.len())])
            .collect()
    };
    let data = |rng: &mut ChaCha8Rng| {
        let len = if rng.random_bool(0.7) { rng.random_range(0..6000) } else { rng.random_range(0..300_000) };
        let byte = rng.random::<u8>();
        (0..len).map(|i| byte.wrapping_add((i / 7) as u8)).collect::<Vec<u8>>()
    };
    let offset = |rng: &mut ChaCha8Rng| {
        if rng.random_bool(0.5) { rng.random_range(0..10_000) } else { rng.random_range(0..LARGEST) }
    };
    match rng.random_range(0..100) {
        0..=21 => Op::Write(path(rng), offset(rng), data(rng)),
        22..=27 => Op::Append(path(rng), data(rng)),
        28..=33 => Op::Truncate(path(rng), offset(rng)),
        34..=37 => Op::Punch(path(rng), offset(rng), rng.random_range(1..400_000)),
        38..=41 => Op::Copy(path(rng), path(rng), offset(rng), offset(rng), rng.random_range(1..2_000_000)),
        42..=46 => Op::Mkdir(path(rng)),
        47..=52 => Op::Rmdir(path(rng)),
        53..=58 => Op::Unlink(path(rng)),
        59..=70 => Op::Rename(
            path(rng),
            path(rng),
            [0, 0, libc::RENAME_NOREPLACE, libc::RENAME_EXCHANGE][rng.random_range(0..4)],
        ),
        71..=77 => Op::Link(path(rng), path(rng)),
        78..=79 => Op::Symlink(path(rng), path(rng)),
        80..=83 => Op::Chmod(path(rng), rng.random_range(0..0o10000) | 0o700),
        84..=88 => Op::Xattr(path(rng), data(rng).into_iter().take(2000).collect()),
        _ => Op::Read(path(rng), offset(rng), rng.random_range(1..200_000)),
    }
}

fn checked(answer: i32) -> io::Result<Vec<u8>> {
    if answer < 0 { Err(io::Error::last_os_error()) } else { Ok(Vec::new()) }
}

fn c(path: &Path) -> CString {
    CString::new(path.as_os_str().as_bytes()).unwrap()
}

/// Opens without following a symbolic link at the end, so that both sides stay within their own tree.
fn open(path: &Path, flags: i32, create: bool) -> io::Result<File> {
    use std::os::unix::fs::OpenOptionsExt;
    OpenOptions::new().read(true).write(true).create(create).custom_flags(flags | libc::O_NOFOLLOW).open(path)
}

fn copy(from: &File, to: &File, at: u64, into: u64, len: usize) -> io::Result<Vec<u8>> {
    let (mut at, mut into, mut left) = (at as i64, into as i64, len);
    while left > 0 {
        // SAFETY: both descriptors are open and both offsets are ours.
        let n =
            unsafe { libc::copy_file_range(from.as_raw_fd(), &mut at, to.as_raw_fd(), &mut into, left, 0) };
        match n {
            0 => break,
            n if n < 0 => return Err(io::Error::last_os_error()),
            n => left -= n as usize,
        }
    }
    Ok(Vec::new())
}

/// Does one operation below `root`: what it read, or the error.
fn apply(root: &Path, op: &Op) -> Result<Vec<u8>, i32> {
    let done = match op {
        Op::Write(p, at, data) => {
            open(&root.join(p), 0, true).and_then(|f| f.write_all_at(data, *at)).map(|()| Vec::new())
        }
        Op::Append(p, data) => open(&root.join(p), libc::O_APPEND, false)
            .and_then(|mut f| io::Write::write_all(&mut f, data))
            .map(|()| Vec::new()),
        Op::Truncate(p, size) => {
            open(&root.join(p), 0, false).and_then(|f| f.set_len(*size)).map(|()| Vec::new())
        }
        Op::Punch(p, at, len) => open(&root.join(p), 0, false).and_then(|f| {
            let how = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
            // SAFETY: the descriptor is open.
            checked(unsafe { libc::fallocate(f.as_raw_fd(), how, *at as i64, *len as i64) })
        }),
        Op::Copy(from, to, at, into, len) => open(&root.join(from), 0, false)
            .and_then(|from| Ok((from, open(&root.join(to), 0, false)?)))
            .and_then(|(from, to)| copy(&from, &to, *at, *into, *len)),
        Op::Mkdir(p) => fs::create_dir(root.join(p)).map(|()| Vec::new()),
        Op::Rmdir(p) => fs::remove_dir(root.join(p)).map(|()| Vec::new()),
        Op::Unlink(p) => fs::remove_file(root.join(p)).map(|()| Vec::new()),
        Op::Rename(from, to, flags) => {
            let (from, to) = (c(&root.join(from)), c(&root.join(to)));
            // SAFETY: both are valid C strings.
            checked(unsafe {
                libc::renameat2(libc::AT_FDCWD, from.as_ptr(), libc::AT_FDCWD, to.as_ptr(), *flags)
            })
        }
        Op::Link(from, to) => fs::hard_link(root.join(from), root.join(to)).map(|()| Vec::new()),
        Op::Symlink(target, at) => symlink(target, root.join(at)).map(|()| Vec::new()),
        Op::Chmod(p, mode) => {
            let path = root.join(p);
            match path.symlink_metadata() {
                Ok(meta) if meta.is_symlink() => Ok(Vec::new()),
                Ok(_) => fs::set_permissions(&path, fs::Permissions::from_mode(*mode)).map(|()| Vec::new()),
                Err(e) => Err(e),
            }
        }
        Op::Xattr(p, value) => {
            let path = root.join(p);
            match path.symlink_metadata() {
                Ok(meta) if meta.is_file() || meta.is_dir() => {
                    xattr::set(&path, "user.k", value).map(|()| Vec::new())
                }
                Ok(_) => Ok(Vec::new()),
                Err(e) => Err(e),
            }
        }
        Op::Read(p, at, len) => open(&root.join(p), 0, false).and_then(|f| {
            let mut buf = vec![0; *len];
            let n = f.read_at(&mut buf, *at)?;
            buf.truncate(n);
            Ok(buf)
        }),
    };
    done.map_err(|e| e.raw_os_error().unwrap_or(0))
}

/// A picture without what differs between two filesystems that were written one after the other.
fn picture(root: &Path) -> Snapshot {
    let mut taken = Snapshot::take(root);
    for entry in taken.entries.values_mut() {
        entry.mtime = (0, 0);
    }
    taken
}

#[test]
fn random_operations_do_what_a_local_directory_does() {
    let Some(mut v) = Volume::new("mount model") else { return };
    let seed = seed("mount model");
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    v.folder("a");
    v.folder("b");
    v.setting("cache_size = \"32MiB\"");
    let plain = v.path("plain");
    fs::create_dir(&plain).unwrap();
    let (mut life, mut done) = (0, 0);
    let mut m = v.mount_as(&How::usual().state("state0"));
    for n in 0..OPERATIONS {
        let op = draw(&mut rng);
        let (ours, theirs) = (apply(m.root(), &op), apply(&plain, &op));
        assert!(
            ours == theirs,
            "operation {n}, seed {seed}: {:.200}: {ours:.200?} instead of {theirs:.200?}",
            format!("{op:?}")
        );
        done += usize::from(ours.is_ok());
        if n % 1000 != 999 {
            continue;
        }
        picture(&plain).assert_same(&picture(m.root()), &format!("behind operation {n}, seed {seed}"));
        match (n / 1000) % 3 {
            0 => {
                m.unmount();
                m = v.mount_as(&How::usual().state(&format!("state{life}")));
            }
            1 => {
                m.sync();
                m.kill9();
                m = v.mount_as(&How::usual().state(&format!("state{life}")));
            }
            _ => {
                // The machine is lost, and all replicas but one.
                m.sync();
                m.kill9();
                life += 1;
                let only = if life % 2 == 0 { "a" } else { "b" };
                let how = How::usual().state(&format!("state{life}")).only(&[only]);
                m = v.mount_as(&how.arg("--takeover"));
                picture(&plain).assert_same(&picture(m.root()), &format!("from {only} alone, seed {seed}"));
                m.unmount();
                m = v.mount_as(&How::usual().state(&format!("state{life}")));
            }
        }
        picture(&plain).assert_same(&picture(m.root()), &format!("brought back behind {n}, seed {seed}"));
    }
    m.unmount();
    assert!(done > OPERATIONS / 6, "only {done} operations were possible, seed {seed}");
}
