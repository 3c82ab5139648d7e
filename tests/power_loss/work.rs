//! The programs that write: each in its folder, noting in its diary what it did.
//!
//! Owns the choice of what is done, in patterns as mail servers, databases, editors, logs and careless programs have them.

use std::collections::HashMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rand::seq::IteratorRandom;
use rand::{Rng, RngCore, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::oracle::{Body, Diary, Event, FileNo, Found, NEVER, Names, Thing, Tree, What};
use crate::record::Recorder;

/// Block size of the volume.
pub const BLOCK: u64 = 64 << 10;
const XATTR: &str = "user.mark";
/// Longest file.
const LONGEST: u64 = 1 << 20;

/// A program at work. `None` as a result of what it does: the daemon died under it.
pub struct Writer {
    recorder: Arc<Recorder>,
    root: PathBuf,
    pub diary: Diary,
    names: Names,
    contents: HashMap<FileNo, Vec<u8>>,
    rng: ChaCha8Rng,
    dying: Arc<AtomicBool>,
    next: u32,
    /// Kept open, with what the kernel keeps back of it.
    held: Option<(FileNo, File)>,
}

impl Writer {
    pub fn new(recorder: Arc<Recorder>, folder: &str, seed: u64, dying: Arc<AtomicBool>) -> Self {
        Self {
            recorder,
            root: PathBuf::new(),
            diary: Diary { folder: folder.to_owned(), ..Diary::default() },
            names: Names::default(),
            contents: HashMap::new(),
            rng: ChaCha8Rng::seed_from_u64(seed),
            dying,
            next: 0,
            held: None,
        }
    }

    /// Goes on below this mountpoint until told to stop, or until the daemon dies.
    pub fn run(&mut self, mount: &Path, until: impl Fn() -> bool) {
        self.root = mount.join(&self.diary.folder);
        while !until() {
            if self.step().is_none() {
                self.held = None;
                return;
            }
        }
        self.let_go();
    }

    fn now(&self) -> usize {
        self.recorder.now()
    }

    fn at(&self, path: &str) -> PathBuf {
        self.root.join(path)
    }

    /// Does something and notes it.
    fn act<T>(&mut self, what: What, does: impl FnOnce(&Self) -> io::Result<T>) -> Option<T> {
        let start = self.now();
        self.diary.events.push(Event { start, end: NEVER, what });
        let done = does(self);
        let end = self.now();
        let event = self.diary.events.last_mut().unwrap();
        match done {
            Ok(t) => {
                event.end = end;
                self.names.apply(&event.what);
                match &event.what {
                    What::Create(_, file) => {
                        self.contents.insert(*file, Vec::new());
                    }
                    What::Write(file, at, bytes) => {
                        let all = self.contents.get_mut(file).unwrap();
                        let end = *at as usize + bytes.len();
                        if all.len() < end {
                            all.resize(end, 0);
                        }
                        all[*at as usize..end].copy_from_slice(bytes);
                    }
                    What::Truncate(file, len) => {
                        self.contents.get_mut(file).unwrap().resize(*len as usize, 0)
                    }
                    What::Clear(file, at, len) => {
                        let all = self.contents.get_mut(file).unwrap();
                        let end = ((at + len) as usize).min(all.len());
                        if let Some(range) = all.get_mut(*at as usize..end) {
                            range.fill(0);
                        }
                    }
                    _ => {}
                }
                Some(t)
            }
            Err(e) => {
                assert!(
                    self.dying.load(Ordering::SeqCst),
                    "{:?} failed while the daemon lived: {e}",
                    self.diary.events.last().unwrap()
                );
                None
            }
        }
    }

    fn step(&mut self) -> Option<()> {
        self.dir("")?;
        match self.rng.random_range(0..100) {
            0..22 => self.mail(),
            22..32 => self.database(),
            32..42 => self.log(),
            42..60 => self.hold(),
            60..66 => self.editor(),
            66..70 => self.map(),
            70..74 => self.copy(),
            _ => self.careless(),
        }
    }

    fn bytes(&mut self, most: u64) -> Arc<[u8]> {
        let len = match self.rng.random_range(0..10) {
            0..3 => self.rng.random_range(1..300),
            3..7 => self.rng.random_range(1..6000),
            _ => self.rng.random_range(1..=most.max(2)),
        }
        .min(most.max(1));
        let mut bytes = vec![0; len as usize];
        self.rng.fill_bytes(&mut bytes);
        bytes.into()
    }

    fn files(&self, prefix: &str) -> Vec<String> {
        let of =
            self.names.things.iter().filter(|(p, t)| matches!(t, Thing::File(_)) && p.starts_with(prefix));
        of.map(|(p, _)| p.clone()).collect()
    }

    fn pick(&mut self, prefix: &str) -> Option<String> {
        self.files(prefix).into_iter().choose(&mut self.rng)
    }

    fn number(&self, path: &str) -> FileNo {
        match self.names.things[path] {
            Thing::File(f) => f,
            _ => unreachable!("{path} is a file"),
        }
    }

    fn dir(&mut self, path: &str) -> Option<()> {
        if self.names.things.contains_key(path) {
            return Some(());
        }
        self.act(What::Mkdir(path.into()), |w| fs::create_dir(w.at(path)))
    }

    fn create(&mut self, path: &str) -> Option<(FileNo, File)> {
        self.next += 1;
        let number = self.next;
        let file = self.act(What::Create(path.into(), number), |w| {
            OpenOptions::new().read(true).write(true).create_new(true).open(w.at(path))
        })?;
        Some((number, file))
    }

    fn write(&mut self, (number, file): (FileNo, &File), at: u64, bytes: Arc<[u8]>) -> Option<()> {
        self.act(What::Write(number, at, Arc::clone(&bytes)), |_| file.write_all_at(&bytes, at))
    }

    fn sync(&mut self, number: FileNo, file: &File) -> Option<()> {
        let data_only = self.rng.random();
        self.act(What::Sync(Some(number)), |_| if data_only { file.sync_data() } else { file.sync_all() })
    }

    fn sync_dir(&mut self, path: &str) -> Option<()> {
        self.act(What::Sync(None), |w| File::open(w.at(path))?.sync_all())
    }

    fn close(&mut self, number: FileNo, file: File) -> Option<()> {
        self.act(What::Close(number), |_| {
            use std::os::fd::IntoRawFd;
            // SAFETY: the descriptor is ours and is not used again.
            match unsafe { libc::close(file.into_raw_fd()) } {
                0 => Ok(()),
                _ => Err(io::Error::last_os_error()),
            }
        })
    }

    fn remove(&mut self, path: &str) -> Option<()> {
        self.act(What::Remove(path.into()), |w| match w.names.things[path] {
            Thing::Dir => fs::remove_dir(w.at(path)),
            _ => fs::remove_file(w.at(path)),
        })
    }

    fn rename(&mut self, from: &str, to: &str) -> Option<()> {
        self.act(What::Rename(from.into(), to.into()), |w| fs::rename(w.at(from), w.at(to)))
    }

    /// A message: written aside, synced, moved to its name, its folder synced. Old ones go.
    fn mail(&mut self) -> Option<()> {
        for dir in ["mail", "mail/tmp", "mail/cur"] {
            self.dir(dir)?;
        }
        self.next += 1;
        let name = self.next;
        let (tmp, cur) = (format!("mail/tmp/{name}"), format!("mail/cur/{name}"));
        let (number, file) = self.create(&tmp)?;
        let most = if self.rng.random_bool(0.1) { 200_000 } else { 8000 };
        let mut at = 0;
        for _ in 0..self.rng.random_range(1..3) {
            let bytes = self.bytes(most);
            let len = bytes.len() as u64;
            self.write((number, &file), at, bytes)?;
            at += len;
        }
        self.sync(number, &file)?;
        self.close(number, file)?;
        if self.rng.random_bool(0.2) {
            self.act(What::Link(tmp.clone(), cur.clone()), |w| fs::hard_link(w.at(&tmp), w.at(&cur)))?;
            self.remove(&tmp)?;
        } else {
            self.rename(&tmp, &cur)?;
        }
        if self.rng.random_bool(0.6) {
            self.sync_dir("mail/cur")?;
        }
        while self.files("mail/cur/").len() > 25 {
            let old = self.pick("mail/cur/")?;
            self.remove(&old)?;
        }
        Some(())
    }

    /// Pages of a database, with a journal of what they were.
    fn database(&mut self) -> Option<()> {
        const PAGE: u64 = 4096;
        let (number, db) = if self.names.things.contains_key("db") {
            (self.number("db"), self.reopen("db", 0)?)
        } else {
            self.create("db")?
        };
        let pages: Vec<u64> =
            (0..self.rng.random_range(1..5)).map(|_| self.rng.random_range(0..40)).collect();
        let (log, journal) = self.create("db-journal")?;
        let mut at = 0;
        for page in &pages {
            let content = &self.contents[&number];
            let from = ((page * PAGE) as usize).min(content.len());
            let old: Arc<[u8]> = content[from..(from + PAGE as usize).min(content.len())].into();
            if !old.is_empty() {
                let len = old.len() as u64;
                self.write((log, &journal), at, old)?;
                at += len;
            }
        }
        self.sync(log, &journal)?;
        self.sync_dir("")?;
        for page in pages {
            let mut new = vec![0; PAGE as usize];
            self.rng.fill_bytes(&mut new);
            self.write((number, &db), page * PAGE, new.into())?;
        }
        self.sync(number, &db)?;
        if self.rng.random() {
            self.act(What::Truncate(log, 0), |_| journal.set_len(0))?;
            self.sync(log, &journal)?;
        }
        self.close(log, journal)?;
        self.close(number, db)?;
        self.remove("db-journal")
    }

    fn reopen(&mut self, path: &str, flags: i32) -> Option<File> {
        match OpenOptions::new().read(true).write(true).custom_flags(flags).open(self.at(path)) {
            Ok(file) => Some(file),
            Err(e) => {
                assert!(self.dying.load(Ordering::SeqCst), "opening {path}: {e}");
                None
            }
        }
    }

    /// Records at the end of a file, each synced: by the call, by the way it was opened.
    fn log(&mut self) -> Option<()> {
        if !self.names.things.contains_key("log") {
            let (number, file) = self.create("log")?;
            self.close(number, file)?;
        }
        let number = self.number("log");
        let way = self.rng.random_range(0..3);
        let flags = libc::O_APPEND | [0, libc::O_SYNC, libc::O_DSYNC][way];
        let file = self.reopen("log", flags)?;
        for _ in 0..self.rng.random_range(1..4) {
            let at = self.contents[&number].len() as u64;
            let bytes = self.bytes(3000);
            self.write((number, &file), at, bytes)?;
            match way {
                0 => self.sync(number, &file)?,
                _ => {
                    // The write was the sync: of itself, and of all that had been done when it began.
                    let Event { start, end, .. } = *self.diary.events.last().unwrap();
                    self.diary.events.push(Event { start, end, what: What::Sync(None) });
                    // Its end is that of the write, which it covers.
                    self.diary.events.push(Event { start: end, end, what: What::Durable(number) });
                }
            }
        }
        if self.contents[&number].len() > 300_000 {
            self.act(What::Truncate(number, 0), |_| file.set_len(0))?;
        }
        self.close(number, file)
    }

    /// A big file that stays open: written anywhere, cut, punched, now and then synced.
    fn hold(&mut self) -> Option<()> {
        let (number, file) = match self.held.take() {
            Some(held) => held,
            None => {
                let name = format!("big{}", self.rng.random_range(0..3));
                match self.names.things.contains_key(&name) {
                    true => (self.number(&name), self.reopen(&name, 0)?),
                    false => self.create(&name)?,
                }
            }
        };
        for _ in 0..self.rng.random_range(1..5) {
            let len = self.contents[&number].len() as u64;
            match self.rng.random_range(0..20) {
                0..14 => {
                    let at = if self.rng.random() { len } else { self.rng.random_range(0..=len) };
                    let bytes = self.bytes(200_000.min(LONGEST - at.min(LONGEST - 1)));
                    self.write((number, &file), at.min(LONGEST), bytes)?;
                }
                14..16 => {
                    let to = self.rng.random_range(0..=len + 10_000);
                    self.act(What::Truncate(number, to), |_| file.set_len(to))?;
                }
                16..18 if len > 0 => {
                    let at = self.rng.random_range(0..len);
                    let n = self.rng.random_range(1..=BLOCK * 2);
                    self.act(What::Clear(number, at, n), |_| punch(&file, at, n))?;
                }
                _ => self.sync(number, &file)?,
            }
        }
        if self.rng.random_bool(0.3) {
            return self.close(number, file);
        }
        self.held = Some((number, file));
        Some(())
    }

    fn let_go(&mut self) {
        if let Some((number, file)) = self.held.take() {
            self.close(number, file);
        }
    }

    /// Replaces a file by a new version, closed and renamed, mostly not synced.
    fn editor(&mut self) -> Option<()> {
        if self.names.things.contains_key("doc.new") {
            self.remove("doc.new")?;
        }
        let (number, file) = self.create("doc.new")?;
        let most = if self.rng.random_bool(0.3) { 150_000 } else { 5000 };
        let bytes = self.bytes(most);
        self.write((number, &file), 0, bytes)?;
        if self.rng.random_bool(0.2) {
            self.sync(number, &file)?;
        }
        self.close(number, file)?;
        self.rename("doc.new", "doc")
    }

    /// Writes through a shared mapping.
    fn map(&mut self) -> Option<()> {
        if !self.names.things.contains_key("map") {
            let (number, file) = self.create("map")?;
            let bytes: Arc<[u8]> = vec![7; 100_000].into();
            self.write((number, &file), 0, bytes)?;
            self.close(number, file)?;
        }
        let number = self.number("map");
        let len = self.contents[&number].len();
        let bytes = self.bytes(20_000);
        let at = self.rng.random_range(0..len - bytes.len());
        let mut mapper = match Mapper::start(&self.at("map"), at, &bytes) {
            Ok(mapper) => mapper,
            Err(e) => panic!("starting the program that maps: {e}"),
        };
        // As the kernel has it from the first store on, and the file cannot be closed behind our back.
        self.act(What::Write(number, at as u64, bytes), |_| mapper.answer())?;
        self.act(What::Sync(Some(number)), |_| mapper.go_on().and_then(|()| mapper.answer()))
    }

    /// Copies a range between files, in the filesystem as far as it can.
    fn copy(&mut self) -> Option<()> {
        let Some(from) = self.pick("big") else { return Some(()) };
        let source = self.number(&from);
        let all = self.contents[&source].clone();
        if all.is_empty() {
            return Some(());
        }
        let to = "copied";
        let (number, file) = match self.names.things.contains_key(to) {
            true => (self.number(to), self.reopen(to, 0)?),
            false => self.create(to)?,
        };
        let start = self.rng.random_range(0..all.len() as u64) / BLOCK * BLOCK;
        let len = (all.len() as u64 - start).min(self.rng.random_range(1..4 * BLOCK));
        let bytes: Arc<[u8]> = all[start as usize..(start + len) as usize].into();
        let input = self.reopen(&from, 0)?;
        self.act(What::Write(number, start, bytes), |_| {
            let (mut at, mut into, mut left) = (start as i64, start as i64, len as usize);
            while left > 0 {
                // SAFETY: both descriptors are open, the offsets are ours.
                let n = unsafe {
                    libc::copy_file_range(input.as_raw_fd(), &mut at, file.as_raw_fd(), &mut into, left, 0)
                };
                match n {
                    0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                    n if n < 0 => return Err(io::Error::last_os_error()),
                    n => left -= n as usize,
                }
            }
            Ok(())
        })?;
        if self.rng.random() {
            self.sync(number, &file)?;
        }
        self.close(number, file)
    }

    /// Changes of names and attributes that nobody syncs.
    fn careless(&mut self) -> Option<()> {
        self.dir("c")?;
        let n = self.rng.random_range(0..12);
        let path = format!("c/{n}");
        let there = self.names.things.get(&path).cloned();
        match (self.rng.random_range(0..12), there) {
            (0..4, None) => {
                let (number, file) = self.create(&path)?;
                let bytes = self.bytes(30_000);
                self.write((number, &file), 0, bytes)?;
                self.close(number, file)
            }
            (4..5, None) => self.dir(&path),
            (5..6, None) => {
                let target = format!("to {}", self.rng.random::<u32>());
                self.act(What::Symlink(path.clone(), target.clone()), |w| {
                    std::os::unix::fs::symlink(&target, w.at(&path))
                })
            }
            (6..8, None) => match self.pick("c/") {
                Some(from) => self
                    .act(What::Link(from.clone(), path.clone()), |w| fs::hard_link(w.at(&from), w.at(&path))),
                None => Some(()),
            },
            (0..3, Some(Thing::File(_))) => {
                let mode = self.rng.random_range(0..0o1000) | 0o600;
                self.act(What::Mode(path.clone(), mode), |w| {
                    fs::set_permissions(w.at(&path), fs::Permissions::from_mode(mode))
                })
            }
            (3..5, Some(Thing::File(_))) => {
                let value = self.bytes(500).to_vec();
                self.act(What::Xattr(path.clone(), value.clone()), |w| xattr::set(w.at(&path), XATTR, &value))
            }
            (5..6, Some(Thing::File(_))) => {
                let nanos = self.rng.random_range(0..1i64 << 60);
                let time = UNIX_EPOCH + Duration::from_nanos(nanos as u64);
                self.act(What::Time(path.clone(), nanos.into()), |w| {
                    File::open(w.at(&path))?.set_times(fs::FileTimes::new().set_modified(time))
                })
            }
            (6..9, Some(Thing::File(_))) => match self.pick("c/") {
                Some(other) if other != path && self.number(&other) != self.number(&path) => {
                    self.rename(&path, &other)
                }
                _ => Some(()),
            },
            (_, Some(Thing::Dir)) => {
                let to = format!("c/d{}", self.rng.random_range(0..4));
                match self.rng.random_range(0..4) {
                    0 => self.remove(&path),
                    1 if !self.names.things.contains_key(&to) => self.rename(&path, &to),
                    2 if self.names.things.contains_key(&to) => self.remove(&to),
                    _ => Some(()),
                }
            }
            (_, Some(_)) => self.remove(&path),
            _ => Some(()),
        }
    }
}

/// A process of its own that writes through a shared mapping: while a page of one is brought in, nobody in the process can get memory,
/// and the recorder, on which the answer depends, is in ours.
struct Mapper {
    child: std::process::Child,
    told: io::BufReader<std::process::ChildStdout>,
}

const MAPPER: &str = "MIRRORFS_POWER_MAPPER";

impl Mapper {
    fn start(path: &Path, at: usize, bytes: &[u8]) -> io::Result<Self> {
        let mut child = std::process::Command::new(std::env::current_exe()?)
            .args(["work::mapper", "--exact", "--nocapture", "--test-threads=1"])
            .env(MAPPER, path)
            .env("MIRRORFS_POWER_AT", at.to_string())
            .env("MIRRORFS_POWER_LEN", bytes.len().to_string())
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .stderr(std::process::Stdio::null())
            .spawn()?;
        child.stdin.as_mut().unwrap().write_all(bytes)?;
        let told = io::BufReader::new(child.stdout.take().unwrap());
        Ok(Self { child, told })
    }

    fn go_on(&mut self) -> io::Result<()> {
        self.child.stdin.as_mut().unwrap().write_all(b"g")
    }

    /// Waits until it has done a step.
    fn answer(&mut self) -> io::Result<()> {
        let mut line = String::new();
        while self.told.read_line(&mut line)? > 0 {
            if line.trim_end().ends_with('@') {
                return Ok(());
            }
            line.clear();
        }
        Err(io::ErrorKind::UnexpectedEof.into())
    }
}

impl Drop for Mapper {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The process that maps (a test of its own name so that the test binary can start it).
#[test]
fn mapper() {
    let Some(path) = std::env::var_os(MAPPER) else { return };
    let number = |name: &str| std::env::var(name).unwrap().parse::<usize>().unwrap();
    let (at, mut bytes) = (number("MIRRORFS_POWER_AT"), vec![0; number("MIRRORFS_POWER_LEN")]);
    io::stdin().read_exact(&mut bytes).unwrap();
    let file = OpenOptions::new().read(true).write(true).open(path).unwrap();
    let len = file.metadata().unwrap().len() as usize;
    assert!(at + bytes.len() <= len);
    // SAFETY: a new mapping of a file that nobody cuts while it is mapped; the result is checked. If the daemon dies the
    // store below kills this process, which is what it is for.
    unsafe {
        let (rights, way) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED);
        let base = libc::mmap(std::ptr::null_mut(), len, rights, way, file.as_raw_fd(), 0);
        assert_ne!(base, libc::MAP_FAILED);
        std::ptr::copy_nonoverlapping(bytes.as_ptr(), base.cast::<u8>().add(at), bytes.len());
        println!("@");
        io::stdin().read_exact(&mut [0]).unwrap();
        assert_eq!(libc::msync(base, len, libc::MS_SYNC), 0);
    }
    println!("@");
}

fn punch(file: &File, at: u64, len: u64) -> io::Result<()> {
    let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    // SAFETY: the descriptor is open; no memory of ours is touched.
    match unsafe { libc::fallocate(file.as_raw_fd(), mode, at as i64, len as i64) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// What lies below a folder of a mount that lives.
pub fn look(folder: &Path) -> Tree {
    let mut tree = Tree::new();
    if !folder.exists() {
        return tree;
    }
    tree.insert(String::new(), found(folder));
    for entry in walkdir::WalkDir::new(folder).min_depth(1) {
        let entry = entry.unwrap();
        let path = entry.path().strip_prefix(folder).unwrap().to_str().unwrap().to_owned();
        tree.insert(path, found(entry.path()));
    }
    tree
}

fn found(path: &Path) -> Found {
    let meta = fs::symlink_metadata(path).unwrap();
    let body = if meta.is_dir() {
        Body::Dir
    } else if meta.is_symlink() {
        Body::Link(fs::read_link(path).unwrap().to_str().unwrap().to_owned())
    } else {
        Body::File(fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display())))
    };
    let time = meta.modified().unwrap_or(SystemTime::UNIX_EPOCH);
    let nanos = time.duration_since(UNIX_EPOCH).map_or(0, |d| d.as_nanos() as i128);
    let xattr = if meta.is_symlink() { None } else { xattr::get(path, XATTR).unwrap_or(None) };
    Found { ino: meta.ino(), mode: meta.mode() & 0o7777, time: nanos, xattr, body }
}
