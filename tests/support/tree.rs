//! Trees of all kinds of files, made from a seed, and pictures of trees that can be compared.

use std::collections::{BTreeMap, HashMap};
use std::ffi::{CString, OsStr, OsString};
use std::fmt::Write as _;
use std::fs::{self, File, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use rand::seq::IndexedRandom;
use rand::{Rng, RngCore, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::run::is_root;

/// How big a tree is.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Entries that are not directories, about.
    pub files: usize,
    /// Directories, about.
    pub dirs: usize,
    /// Largest file with data all over, in bytes.
    pub largest: u64,
    /// Sockets among them, and further names of pipes and device nodes. (tar leaves out the former and makes copies of the latter.)
    pub sockets: bool,
}

impl Shape {
    /// What the acceptance test writes.
    pub const FULL: Shape = Shape { files: 2300, dirs: 60, largest: 40 << 20, sockets: true };
    /// A quick one.
    pub const SMALL: Shape = Shape { files: 200, dirs: 12, largest: 3 << 20, sockets: true };
}

const PAGE: usize = 4096;
const MIB: u64 = 1 << 20;

/// Makes the tree that `seed` stands for below `root`, an empty directory. The same seed makes the same tree anywhere.
pub fn build(root: &Path, seed: u64, shape: Shape) {
    let devices = is_root() && can_mknod();
    let mut b = Builder {
        rng: ChaCha8Rng::seed_from_u64(seed),
        root: root.to_owned(),
        dirs: vec![PathBuf::new()],
        files: Vec::new(),
        serial: 0,
        devices,
    };
    for _ in 0..shape.dirs {
        let parent = b.any_dir();
        let path = b.new_name(&parent);
        fs::create_dir(root.join(&path)).unwrap();
        b.dirs.push(path);
    }
    for i in 0..shape.files {
        // One directory gets many entries.
        let parent = if i % 3 == 0 { b.dirs[1].clone() } else { b.any_dir() };
        let path = b.new_name(&parent);
        b.entry(&path, i, shape);
        b.files.push(path);
    }
    b.finish();
}

struct Builder {
    rng: ChaCha8Rng,
    root: PathBuf,
    dirs: Vec<PathBuf>,
    files: Vec<PathBuf>,
    serial: u32,
    devices: bool,
}

impl Builder {
    fn any_dir(&mut self) -> PathBuf {
        self.dirs.choose(&mut self.rng).unwrap().clone()
    }

    fn new_name(&mut self, parent: &Path) -> PathBuf {
        self.serial += 1;
        let n = self.serial;
        let mut name = match self.rng.random_range(0..14) {
            0 => format!("-rf {n}").into_bytes(),
            1 => format!("line\nbreak\t{n}").into_bytes(),
            2 => format!("ünïcödé 日本語 🦀 {n}").into_bytes(),
            3 => [b"\xff\xfe\x80".as_slice(), n.to_string().as_bytes()].concat(),
            4 => format!("{n}{}", "x".repeat(255)).into_bytes()[..255].to_vec(),
            5 => format!("\"quoted' \\ `{n}` $HOME *?[]").into_bytes(),
            6 => format!(".hidden{n}").into_bytes(),
            7 => format!("...{n} ").into_bytes(),
            _ => format!("file{n}.dat").into_bytes(),
        };
        // Control characters are names too.
        if self.rng.random_ratio(1, 40) {
            name.truncate(240);
            name.extend_from_slice(b"\x01\x7f");
        }
        parent.join(OsString::from_vec(name))
    }

    fn entry(&mut self, path: &Path, i: usize, shape: Shape) {
        let full = self.root.join(path);
        match self.rng.random_range(0..100) {
            0..4 => {
                let mut target = vec![b't'; self.rng.random_range(1..400)];
                target[0] = self.rng.random_range(1..=255);
                if self.rng.random_bool(0.5) {
                    target = self
                        .files
                        .choose(&mut self.rng)
                        .map_or(target, |p| p.as_os_str().as_bytes().to_vec());
                }
                symlink(OsStr::from_bytes(&target), &full).unwrap();
            }
            4..8 if !self.files.is_empty() => {
                // Links to symbolic links and pipes are links too.
                let old = self.root.join(self.files.choose(&mut self.rng).unwrap());
                let kind = old.symlink_metadata().unwrap().file_type();
                if shape.sockets || kind.is_file() || kind.is_symlink() {
                    fs::hard_link(old, &full).unwrap();
                } else {
                    mknod(&full, libc::S_IFIFO | 0o600, 0);
                }
            }
            8..10 => mknod(&full, libc::S_IFIFO | 0o600, 0),
            10 if shape.sockets => mknod(&full, libc::S_IFSOCK | 0o600, 0),
            11 if self.devices => {
                let kind = if self.rng.random_bool(0.5) { libc::S_IFCHR } else { libc::S_IFBLK };
                let (major, minor) = (self.rng.random_range(1..400), self.rng.random_range(0..70_000));
                mknod(&full, kind | 0o600, libc::makedev(major, minor));
            }
            12..15 => self.sparse(&full),
            _ => self.regular(&full, i, shape),
        }
    }

    fn size(&mut self, i: usize, shape: Shape) -> u64 {
        let edges = [0, 1, 4095, 4096, 4097, 8192, 65_535, 65_536, MIB - 1, MIB, MIB + 1, 2 * MIB];
        let big = [shape.largest, shape.largest / 2 + 12_345, shape.largest / 3, shape.largest / 8 + 1];
        match i {
            _ if i >= 20 && i < 20 + edges.len() => edges[i - 20].min(shape.largest),
            _ if i >= 40 && i < 40 + big.len() => big[i - 40],
            _ => match self.rng.random_range(0..1000) {
                0..300 => self.rng.random_range(0..100),
                300..620 => self.rng.random_range(0..4200),
                620..880 => self.rng.random_range(4096..65_536),
                880..985 => self.rng.random_range(65_536..300_000),
                _ => self.rng.random_range(300_000..2_500_000).min(shape.largest),
            },
        }
    }

    fn regular(&mut self, full: &Path, i: usize, shape: Shape) {
        let size = self.size(i, shape);
        let f = File::create(full).unwrap();
        // A few contents come again and again, as in real trees.
        let seed =
            if self.rng.random_ratio(1, 8) { self.rng.random_range(0..5) } else { self.rng.next_u64() };
        let mut content = Content::new(seed);
        let mut at = 0;
        while at < size {
            let n = (size - at).min(MIB);
            f.write_all_at(&content.take(n as usize), at).unwrap();
            at += n;
        }
    }

    fn sparse(&mut self, full: &Path) {
        let f = File::create(full).unwrap();
        let size = 1_u64 << self.rng.random_range(13..41);
        let mut content = Content::new(self.rng.next_u64());
        for _ in 0..self.rng.random_range(0..5) {
            let n = self.rng.random_range(1..20_000);
            f.write_all_at(&content.take(n), self.rng.random_range(0..size)).unwrap();
        }
        if self.rng.random_bool(0.7) {
            let len = f.metadata().unwrap().len();
            f.set_len(len + self.rng.random_range(0..size)).unwrap();
        }
    }

    /// Owners, attributes, modes and times, in the order in which one does not undo the other.
    fn finish(mut self) {
        let all: Vec<PathBuf> = self.files.iter().chain(&self.dirs).cloned().collect();
        let mut seen = HashMap::new();
        for path in &all {
            let full = self.root.join(path);
            let meta = full.symlink_metadata().unwrap();
            if seen.insert(meta.ino(), ()).is_some() {
                continue;
            }
            let kind = meta.file_type();
            if is_root() && self.rng.random_ratio(1, 3) {
                let (uid, gid) = (self.rng.random_range(0..70_000), self.rng.random_range(0..70_000));
                std::os::unix::fs::lchown(&full, Some(uid), Some(gid)).unwrap();
            }
            if (kind.is_file() || kind.is_dir()) && self.rng.random_ratio(1, 8) {
                self.attributes(&full, kind.is_file());
            }
            if !kind.is_symlink() {
                let mode = self.mode(kind.is_dir());
                fs::set_permissions(&full, PermissionsExt::from_mode(mode)).unwrap();
            }
        }
        // Making entries changes the times of directories, so times come last.
        for path in &all {
            let times = [self.time(), self.time()];
            let c = cstring(&self.root.join(path));
            // SAFETY: a NUL-terminated string and two times.
            let done = unsafe {
                libc::utimensat(libc::AT_FDCWD, c.as_ptr(), times.as_ptr(), libc::AT_SYMLINK_NOFOLLOW)
            };
            assert_eq!(done, 0, "{}: {}", path.display(), std::io::Error::last_os_error());
        }
    }

    fn attributes(&mut self, full: &Path, file: bool) {
        for n in 0..self.rng.random_range(1..4) {
            let mut value = vec![0; self.rng.random_range(0..600)];
            self.rng.fill_bytes(&mut value);
            xattr::set(full, format!("user.key {n} ü"), &value).unwrap();
        }
        if is_root() && self.rng.random_ratio(1, 3) {
            xattr::set(full, "trusted.test", b"t").unwrap();
            if file {
                // A capability, version 2: cap_net_bind_service, permitted and effective. Changing the owner drops it.
                let mut cap = [0_u8; 20];
                (cap[0], cap[3], cap[5]) = (1, 2, 4);
                xattr::set(full, "security.capability", &cap).unwrap();
            }
        }
    }

    fn mode(&mut self, dir: bool) -> u32 {
        let mode = match self.rng.random_range(0..10) {
            0 => *[0, 0o7777, 0o4755, 0o2755, 0o1777, 0o6711, 0o2644].choose(&mut self.rng).unwrap(),
            1..4 => self.rng.random_range(0..=0o7777),
            _ => *[0o644, 0o600, 0o755, 0o444].choose(&mut self.rng).unwrap(),
        };
        match (is_root(), dir) {
            (true, _) => mode,
            // Others could not look at it again.
            (false, true) => mode | 0o700,
            (false, false) => mode | 0o600,
        }
    }

    fn time(&mut self) -> libc::timespec {
        let secs = match self.rng.random_range(0..10) {
            0 => self.rng.random_range(-2_000_000_000..0),
            1 => self.rng.random_range(4_300_000_000..13_000_000_000),
            _ => self.rng.random_range(0..1_800_000_000),
        };
        libc::timespec { tv_sec: secs, tv_nsec: self.rng.random_range(0..1_000_000_000) }
    }
}

/// Bytes without end, from a seed: noise, text or something between, so that compression has all cases.
pub struct Content {
    rng: ChaCha8Rng,
    kind: u64,
}

impl Content {
    /// The bytes that `seed` stands for.
    pub fn new(seed: u64) -> Self {
        Self { rng: ChaCha8Rng::seed_from_u64(seed), kind: seed % 4 }
    }

    /// The next `n` bytes.
    pub fn take(&mut self, n: usize) -> Vec<u8> {
        let mut out = vec![0; n];
        match self.kind {
            0 | 1 => self.rng.fill_bytes(&mut out),
            2 => {
                let words: [&[u8]; 6] = [b"lorem ", b"ipsum ", b"dolor ", b"sit ", b"amet\n", b"\0\0\0\0"];
                let mut text = Vec::with_capacity(n + 8);
                while text.len() < n {
                    text.extend_from_slice(words.choose(&mut self.rng).unwrap());
                }
                out.copy_from_slice(&text[..n]);
            }
            _ => {
                for page in out.chunks_mut(PAGE).step_by(3) {
                    self.rng.fill_bytes(page);
                }
            }
        }
        out
    }
}

fn can_mknod() -> bool {
    let dir = tempfile::tempdir().unwrap();
    let c = cstring(&dir.path().join("probe"));
    // SAFETY: a NUL-terminated string.
    let can = unsafe { libc::mknod(c.as_ptr(), libc::S_IFCHR | 0o600, libc::makedev(1, 3)) } == 0;
    if !can {
        println!("SKIP: no device nodes: not allowed here");
    }
    can
}

fn cstring(p: &Path) -> CString {
    CString::new(p.as_os_str().as_bytes()).unwrap()
}

fn mknod(p: &Path, mode: u32, dev: libc::dev_t) {
    // SAFETY: a NUL-terminated string.
    let done = unsafe { libc::mknod(cstring(p).as_ptr(), mode, dev) };
    assert_eq!(done, 0, "mknod {}: {}", p.display(), std::io::Error::last_os_error());
}

/// What one name leads to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Type and permission bits.
    pub mode: u32,
    /// Owner and group.
    pub owner: (u32, u32),
    /// Bytes; 0 for directories, whose size means nothing.
    pub size: u64,
    /// Last change of content.
    pub mtime: (i64, i64),
    /// Links; 0 for directories (see [`Snapshot::take`]).
    pub nlink: u64,
    /// Device number.
    pub rdev: u64,
    /// The first name in order that leads to the same inode.
    pub same_as: PathBuf,
    /// Target of a symbolic link.
    pub target: PathBuf,
    /// Extended attributes.
    pub xattrs: BTreeMap<OsString, Vec<u8>>,
    /// Hash of the content; equal whatever its holes.
    pub content: String,
}

/// A picture of a whole tree.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Snapshot {
    /// By path, the root being the empty one.
    pub entries: BTreeMap<PathBuf, Entry>,
}

impl Snapshot {
    /// Takes one of everything below `root`, the root itself left out.
    pub fn take(root: &Path) -> Self {
        let mut first: HashMap<(u64, u64), PathBuf> = HashMap::new();
        let mut entries = BTreeMap::new();
        let mut paths: Vec<PathBuf> = walkdir::WalkDir::new(root)
            .min_depth(1)
            .into_iter()
            .map(|e| {
                e.unwrap_or_else(|e| panic!("cannot list: {e}")).path().strip_prefix(root).unwrap().to_owned()
            })
            .collect();
        paths.sort();
        for path in paths {
            let full = root.join(&path);
            let same_as = {
                let meta = full.symlink_metadata().unwrap_or_else(|e| panic!("{}: {e}", full.display()));
                first.entry((meta.dev(), meta.ino())).or_insert_with(|| path.clone()).clone()
            };
            entries.insert(path, entry(&full, same_as));
        }
        Self { entries }
    }

    /// What is different, one line each, at most 40; empty when nothing is.
    pub fn diff(&self, other: &Self) -> String {
        let mut out = String::new();
        let mut lines = 0;
        let mut say = |line: String| {
            lines += 1;
            if lines <= 40 {
                let _ = writeln!(out, "{line}");
            }
        };
        for (path, a) in &self.entries {
            match other.entries.get(path) {
                None => say(format!("- {}: missing", path.display())),
                Some(b) if a != b => say(format!("! {}: {}", path.display(), a.differences(b))),
                Some(_) => {}
            }
        }
        for path in other.entries.keys().filter(|p| !self.entries.contains_key(*p)) {
            say(format!("+ {}: extra", path.display()));
        }
        if lines > 40 {
            let _ = writeln!(out, "… {} more", lines - 40);
        }
        out
    }

    /// Panics with the differences if there are any.
    #[track_caller]
    pub fn assert_same(&self, other: &Self, what: &str) {
        let diff = self.diff(other);
        assert!(diff.is_empty(), "{what}: expected against found:\n{diff}");
    }
}

impl Entry {
    fn differences(&self, o: &Self) -> String {
        let mut out = String::new();
        let mut say = |name: &str, a: String, b: String| {
            if a != b {
                let _ = write!(out, "{name} {a} → {b}; ");
            }
        };
        say("mode", format!("{:o}", self.mode), format!("{:o}", o.mode));
        say("owner", format!("{:?}", self.owner), format!("{:?}", o.owner));
        say("size", self.size.to_string(), o.size.to_string());
        say("mtime", format!("{:?}", self.mtime), format!("{:?}", o.mtime));
        say("nlink", self.nlink.to_string(), o.nlink.to_string());
        say("rdev", format!("{:x}", self.rdev), format!("{:x}", o.rdev));
        say("same as", self.same_as.display().to_string(), o.same_as.display().to_string());
        say("target", self.target.display().to_string(), o.target.display().to_string());
        say("xattrs", brief(&self.xattrs), brief(&o.xattrs));
        say("content", self.content.clone(), o.content.clone());
        out
    }
}

fn brief(xattrs: &BTreeMap<OsString, Vec<u8>>) -> String {
    let all: Vec<_> =
        xattrs.iter().map(|(k, v)| format!("{k:?}={}", &blake3::hash(v).to_hex()[..8])).collect();
    format!("[{}]", all.join(", "))
}

fn entry(full: &Path, same_as: PathBuf) -> Entry {
    let meta = full.symlink_metadata().unwrap();
    let kind = meta.file_type();
    let (dir, device) = (kind.is_dir(), kind.is_block_device() || kind.is_char_device());
    // Special files and symbolic links have none (that are ours), and opening a pipe would wait.
    let xattrs = if kind.is_file() || dir {
        let names = xattr::list(full).unwrap_or_else(|e| panic!("listxattr {}: {e}", full.display()));
        names.map(|n| (n.clone(), xattr::get(full, &n).unwrap().unwrap())).collect()
    } else {
        BTreeMap::new()
    };
    Entry {
        mode: meta.mode(),
        owner: (meta.uid(), meta.gid()),
        size: if dir { 0 } else { meta.size() },
        mtime: (meta.mtime(), meta.mtime_nsec()),
        nlink: if dir { 0 } else { meta.nlink() },
        rdev: if device { meta.rdev() } else { 0 },
        same_as,
        target: if kind.is_symlink() { fs::read_link(full).unwrap() } else { PathBuf::new() },
        xattrs,
        content: if kind.is_file() { hash(full) } else { String::new() },
    }
}

/// Files up to this size are read from end to end; of larger ones only what the filesystem calls data.
const READ_WHOLE: u64 = 64 << 20;

/// The hash of all pages that are not zeros, with their places.
pub fn hash(path: &Path) -> String {
    let f =
        OpenOptions::new().read(true).open(path).unwrap_or_else(|e| panic!("open {}: {e}", path.display()));
    let size = f.metadata().unwrap().len();
    let mut hasher = blake3::Hasher::new();
    let mut at = 0;
    let mut buffer = vec![0; MIB as usize];
    while at < size {
        let mut end = size;
        if size > READ_WHOLE {
            let Some(data) = seek(&f, at, libc::SEEK_DATA) else { break };
            // Whole pages, so that the same bytes are hashed the same way whatever the extents.
            at = data / PAGE as u64 * PAGE as u64;
            end = seek(&f, data, libc::SEEK_HOLE).unwrap_or(size).next_multiple_of(PAGE as u64).min(size);
        }
        while at < end {
            let n = (end - at).min(MIB) as usize;
            f.read_exact_at(&mut buffer[..n], at)
                .unwrap_or_else(|e| panic!("read {} at {at}: {e}", path.display()));
            for (i, page) in buffer[..n].chunks(PAGE).enumerate() {
                if page.iter().any(|b| *b != 0) {
                    hasher.update(&(at + (i * PAGE) as u64).to_le_bytes());
                    hasher.update(page);
                }
            }
            at += n as u64;
        }
    }
    hasher.finalize().to_hex()[..16].to_owned()
}

fn seek(f: &File, at: u64, whence: i32) -> Option<u64> {
    // SAFETY: a valid descriptor.
    let n = unsafe { libc::lseek(f.as_raw_fd(), i64::try_from(at).unwrap(), whence) };
    u64::try_from(n).ok()
}
