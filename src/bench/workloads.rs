//! The workloads themselves: plain system calls, timed.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use serde::Serialize;
use tempfile::TempDir;

use super::{MIB, Size, Taken, Trouble};
use crate::private;

/// Small files per directory.
const PER_DIR: u32 = 1_000;
/// Bytes of a small file and of a random access.
const SMALL: usize = 4096;
/// Threads of the parallel workloads.
const THREADS: u32 = 8;

macro_rules! workloads {
    ($($name:ident $text:literal $unit:literal),+ $(,)?) => {
        /// Something applications do.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
        #[allow(missing_docs, reason = "the text says it")]
        pub enum Workload { $(#[serde(rename = $text)] $name),+ }

        impl Workload {
            /// All, in the order in which one prepares the next.
            pub const ALL: [Self; [$($text),+].len()] = [$(Self::$name),+];

            /// Its name on the command line.
            #[must_use]
            pub fn name(self) -> &'static str {
                match self { $(Self::$name => $text),+ }
            }

            /// What it counts.
            #[must_use]
            pub fn unit(self) -> &'static str {
                match self { $(Self::$name => $unit),+ }
            }
        }
    };
}

workloads! {
    SeqWrite "seq-write" "MiB",
    SeqReadCold "seq-read-cold" "MiB",
    SeqReadWarm "seq-read-warm" "MiB",
    RandReadCold "rand-read-cold" "reads",
    RandReadWarm "rand-read-warm" "reads",
    RandWrite "rand-write" "writes",
    RandWriteSync "rand-write-sync" "writes",
    Create "create" "files",
    CreateSync "create-sync" "files",
    CreateSync8 "create-sync-8" "files",
    StatWarm "stat-warm" "files",
    StatCold "stat-cold" "files",
    ReadSmallWarm "read-small-warm" "files",
    Untar "untar" "files",
    Remove "remove" "files",
}

/// What must be there before a workload can run, beside a folder.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Needs {
    Nothing,
    Big,
    Small,
    Archive,
    Unpacked,
}

impl Workload {
    pub(super) fn needs(self) -> Needs {
        match self {
            Self::SeqWrite | Self::Create | Self::CreateSync | Self::CreateSync8 => Needs::Nothing,
            Self::SeqReadCold
            | Self::SeqReadWarm
            | Self::RandReadCold
            | Self::RandReadWarm
            | Self::RandWrite
            | Self::RandWriteSync => Needs::Big,
            Self::StatWarm | Self::StatCold | Self::ReadSmallWarm => Needs::Small,
            Self::Untar => Needs::Archive,
            Self::Remove => Needs::Unpacked,
        }
    }
}

impl std::str::FromStr for Workload {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let all = Self::ALL.map(Self::name).join(", ");
        let found = Self::ALL.into_iter().find(|w| w.name() == text);
        found.ok_or_else(|| format!("there is no workload {text:?}; there are: {all}"))
    }
}

/// How long something may take, and since when it runs. Looking at the clock each time would be part of what is measured.
#[derive(Clone, Copy, Debug)]
struct Watch {
    limit: Duration,
    begin: Instant,
}

impl Watch {
    fn left(&self) -> Duration {
        self.limit.saturating_sub(self.begin.elapsed())
    }

    /// Complains when the time is over; looks every 64th time.
    fn check(&self, number: u64) -> Result<(), Trouble> {
        match number.is_multiple_of(64) && self.left().is_zero() {
            true => Err(Trouble::TooSlow(self.limit)),
            false => Ok(()),
        }
    }
}

/// 1 MiB of noise to write, and to read into. One for all directories, handed from one to the next: where it happens to lie in memory
/// and in the processor's caches must make no difference between them.
#[derive(Debug, Default)]
pub(super) struct Buffer {
    bytes: Vec<u8>,
    /// Makes every block written different from all others.
    stamp: u64,
}

impl Buffer {
    pub(super) fn new() -> Self {
        let mut bytes = vec![0; MIB as usize];
        let seed = format!("{} {:?}", std::process::id(), std::time::SystemTime::now());
        blake3::Hasher::new_keyed(blake3::hash(seed.as_bytes()).as_bytes()).finalize_xof().fill(&mut bytes);
        Self { bytes, stamp: 0 }
    }

    fn stamp(&mut self) {
        self.stamp += 1;
        for page in self.bytes.chunks_mut(SMALL) {
            page[..8].copy_from_slice(&self.stamp.to_le_bytes());
        }
    }
}

/// A directory that is measured; what was made in it goes when this is dropped.
#[derive(Debug)]
pub struct Place {
    root: PathBuf,
    /// Beside, on a local disk: a private folder for the archive to unpack. In a shared folder, a
    /// name that can be guessed could be another user's file by the time it is unpacked.
    scratch: TempDir,
    size: Size,
    pub(super) buffer: Buffer,
    watch: Watch,
    random: u64,
}

impl Drop for Place {
    fn drop(&mut self) {
        self.watch.begin = Instant::now();
        let _ = self.remove(&self.root, 3);
        // The other folder removes itself.
    }
}

/// Makes a folder that only this user can enter, with a name that cannot be guessed.
fn private_folder(within: &Path) -> Result<TempDir, Trouble> {
    let permissions = fs::Permissions::from_mode(private::DIR);
    let made = tempfile::Builder::new().prefix("mirrorfs-bench.").permissions(permissions).tempdir_in(within);
    made.map_err(io("make", &within.join("mirrorfs-bench.*")))
}

fn io(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Trouble {
    let path = path.to_owned();
    move |source| Trouble::Io { what, path, source }
}

impl Place {
    /// Makes a folder of its own in `dir`. `limit` bounds each preparation, each run, and the removal at the end.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn new(dir: &Path, size: Size, limit: Duration) -> Result<Self, Trouble> {
        let scratch = private_folder(&std::env::temp_dir())?;
        // Removed by us, since a slow filesystem gets only so much time for it.
        let root = private_folder(dir)?.keep();
        let watch = Watch { limit, begin: Instant::now() };
        Ok(Self { root, scratch, size, buffer: Buffer::default(), watch, random: 0x9E37_79B9_7F4A_7C15 })
    }

    /// The folder that it works in.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    #[cfg(test)]
    pub(super) fn set_limit(&mut self, limit: Duration) {
        self.watch.limit = limit;
    }

    fn archive(&self) -> PathBuf {
        self.scratch.path().join("small.tar")
    }

    fn big(&self) -> PathBuf {
        self.root.join("big")
    }

    fn small(&self, number: u32) -> PathBuf {
        self.root.join(Self::small_name(number))
    }

    fn small_name(number: u32) -> String {
        format!("small/{:03}/{number:07}", number / PER_DIR)
    }

    /// A number below `below`, from SplitMix64 (Steele, Lea, Flood 2014).
    fn next(&mut self, below: u64) -> u64 {
        self.random = self.random.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.random;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        (z ^ (z >> 31)) % below.max(1)
    }

    /// Makes what a workload needs, untimed.
    ///
    /// # Errors
    /// When the directory fails or is too slow, or this user may not do it.
    pub fn prepare(&mut self, workload: Workload) -> Result<(), Trouble> {
        use Workload as W;
        self.watch.begin = Instant::now();
        match workload.needs() {
            Needs::Nothing => {}
            Needs::Big => {
                if !fs::metadata(self.big()).is_ok_and(|m| m.len() == self.size.big) {
                    self.write_big()?;
                }
            }
            Needs::Small => self.have_small()?,
            Needs::Archive => {
                self.remove(&self.root.join("untar"), 2)?;
                self.pack()?;
            }
            Needs::Unpacked => {
                if !self.root.join("untar").join(Self::small_name(self.size.files - 1)).exists() {
                    self.remove(&self.root.join("untar"), 2)?;
                    self.pack()?;
                    self.unpack()?;
                }
            }
        }
        match workload {
            W::SeqWrite => self.remove(&self.big(), 0)?,
            W::Create => self.remove(&self.root.join("small"), 1)?,
            W::CreateSync | W::CreateSync8 => {
                let dir = self.root.join("synced");
                self.remove(&dir, 0)?;
                fs::create_dir(&dir).map_err(io("make", &dir))?;
            }
            W::SeqReadWarm | W::RandReadWarm => drop(self.read_big()?),
            W::StatWarm => self.stat()?,
            W::ReadSmallWarm => self.read_small()?,
            // Nobody is to wait for the disk that the archive lies on.
            W::Untar => drop(fs::read(self.archive()).map_err(io("read", &self.archive()))?),
            _ => {}
        }
        Ok(())
    }

    /// Runs one workload, prepared before. When it has emptied the caches it waits for the echo of that, at most `idle`.
    ///
    /// # Errors
    /// When the directory fails or is too slow, or this user may not do it.
    pub fn run(&mut self, workload: Workload, idle: Duration) -> Result<Taken, Trouble> {
        use Workload as W;
        if matches!(workload, W::SeqReadCold | W::RandReadCold | W::StatCold) {
            drop_caches()?;
            super::machine::wait_idle(idle.min(Duration::from_secs(2)));
        }
        self.watch.begin = Instant::now();
        let begin = self.watch.begin;
        let count = match workload {
            W::SeqWrite => self.write_big()?,
            W::SeqReadCold | W::SeqReadWarm => self.read_big()?,
            W::RandReadCold | W::RandReadWarm => self.read_random()?,
            W::RandWrite => self.write_random(self.size.random, false)?,
            W::RandWriteSync => self.write_random(self.size.synced, true)?,
            W::Create => self.create().map(|()| u64::from(self.size.files))?,
            W::CreateSync => self.create_synced(1)?,
            W::CreateSync8 => self.create_synced(THREADS)?,
            W::StatWarm | W::StatCold => self.stat().map(|()| u64::from(self.size.files))?,
            W::ReadSmallWarm => self.read_small().map(|()| u64::from(self.size.files))?,
            W::Untar => self.unpack()?,
            W::Remove => {
                self.remove(&self.root.join("untar"), 2)?;
                u64::from(self.size.files)
            }
        };
        Ok(Taken { time: begin.elapsed(), count })
    }

    fn write_big(&mut self) -> Result<u64, Trouble> {
        let path = self.big();
        let mut file = File::create(&path).map_err(io("create", &path))?;
        for number in 0..self.size.big / MIB {
            self.watch.check(number * 64)?;
            self.buffer.stamp();
            file.write_all(&self.buffer.bytes).map_err(io("write", &path))?;
        }
        file.sync_all().map_err(io("sync", &path))?;
        Ok(self.size.big / MIB)
    }

    fn read_big(&mut self) -> Result<u64, Trouble> {
        let path = self.big();
        let mut file = File::open(&path).map_err(io("open", &path))?;
        let mut total = 0;
        loop {
            match file.read(&mut self.buffer.bytes).map_err(io("read", &path))? {
                0 => break,
                n => total += n as u64,
            }
            self.watch.check(0)?;
        }
        // What was read is no longer our pattern, but just as random.
        Ok(total / MIB)
    }

    fn read_random(&mut self) -> Result<u64, Trouble> {
        let path = self.big();
        let file = File::open(&path).map_err(io("open", &path))?;
        let mut page = [0; SMALL];
        for number in 0..self.size.random {
            self.watch.check(number.into())?;
            let at = self.next(self.size.big / SMALL as u64) * SMALL as u64;
            file.read_exact_at(&mut page, at).map_err(io("read", &path))?;
        }
        Ok(u64::from(self.size.random))
    }

    fn write_random(&mut self, count: u32, sync_each: bool) -> Result<u64, Trouble> {
        let path = self.big();
        let file = OpenOptions::new().write(true).open(&path).map_err(io("open", &path))?;
        for number in 0..count {
            self.watch.check(number.into())?;
            self.buffer.stamp += 1;
            let from = self.next(MIB / SMALL as u64) as usize * SMALL;
            let stamp = self.buffer.stamp;
            self.buffer.bytes[from..from + 8].copy_from_slice(&stamp.to_le_bytes());
            let at = self.next(self.size.big / SMALL as u64) * SMALL as u64;
            file.write_all_at(&self.buffer.bytes[from..from + SMALL], at).map_err(io("write", &path))?;
            if sync_each {
                file.sync_data().map_err(io("sync", &path))?;
            }
        }
        file.sync_all().map_err(io("sync", &path))?;
        Ok(u64::from(count))
    }

    fn create(&mut self) -> Result<(), Trouble> {
        let top = self.root.join("small");
        fs::create_dir(&top).map_err(io("make", &top))?;
        for number in 0..self.size.files {
            self.watch.check(number.into())?;
            let path = self.small(number);
            if number % PER_DIR == 0
                && let Some(dir) = path.parent()
            {
                fs::create_dir(dir).map_err(io("make", dir))?;
                self.buffer.stamp();
            }
            let from = number as usize % (MIB as usize / SMALL) * SMALL;
            self.buffer.bytes[from + 8..from + 12].copy_from_slice(&number.to_le_bytes());
            File::create(&path)
                .and_then(|mut f| f.write_all(&self.buffer.bytes[from..from + SMALL]))
                .map_err(io("create", &path))?;
        }
        Ok(())
    }

    fn create_synced(&mut self, threads: u32) -> Result<u64, Trouble> {
        self.buffer.stamp();
        let each = self.size.synced.div_ceil(threads);
        let (root, page, watch) = (self.root.join("synced"), &self.buffer.bytes[..SMALL], self.watch);
        let work = |thread: u32| -> Result<(), Trouble> {
            for number in 0..each {
                watch.check(number.into())?;
                let path = root.join(format!("{thread}-{number}"));
                let write = |mut f: File| f.write_all(page).and_then(|()| f.sync_all());
                File::create(&path).and_then(write).map_err(io("write", &path))?;
            }
            Ok(())
        };
        std::thread::scope(|scope| {
            let work = &work;
            let running: Vec<_> = (0..threads).map(|t| scope.spawn(move || work(t))).collect();
            let died = || Trouble::Skipped("a thread of the benchmark died".into());
            running.into_iter().try_for_each(|t| t.join().unwrap_or_else(|_| Err(died())))
        })?;
        Ok(u64::from(each * threads))
    }

    fn stat(&self) -> Result<(), Trouble> {
        (0..self.size.files).try_for_each(|number| {
            self.watch.check(number.into())?;
            let path = self.small(number);
            fs::metadata(&path).map(drop).map_err(io("stat", &path))
        })
    }

    fn read_small(&self) -> Result<(), Trouble> {
        let mut page = [0; SMALL];
        (0..self.size.files).try_for_each(|number| {
            self.watch.check(number.into())?;
            let path = self.small(number);
            File::open(&path).and_then(|mut f| f.read_exact(&mut page)).map_err(io("read", &path))
        })
    }

    /// Makes the small files if they are not there.
    fn have_small(&mut self) -> Result<(), Trouble> {
        if !self.small(self.size.files - 1).exists() {
            self.remove(&self.root.join("small"), 1)?;
            self.create()?;
        }
        Ok(())
    }

    /// The small files as an archive, once.
    fn pack(&mut self) -> Result<(), Trouble> {
        if self.archive().exists() {
            return Ok(());
        }
        self.have_small()?;
        let mut command = Command::new("tar");
        let made = self.tar(command.arg("-cf").arg(self.archive()).arg("-C").arg(&self.root).arg("small"));
        if made.is_err() {
            let _ = fs::remove_file(self.archive());
        }
        made
    }

    fn unpack(&self) -> Result<u64, Trouble> {
        let dir = self.root.join("untar");
        fs::create_dir(&dir).map_err(io("make", &dir))?;
        self.tar(Command::new("tar").arg("-xf").arg(self.archive()).arg("-C").arg(&dir))?;
        Ok(u64::from(self.size.files))
    }

    /// Runs tar, as long as there is time.
    fn tar(&self, command: &mut Command) -> Result<(), Trouble> {
        let absent = |error| Trouble::Skipped(format!("cannot run tar: {error}"));
        let child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().map_err(absent)?;
        let pid = rustix::process::Pid::from_child(&child);
        let (left, (done, waits)) = (self.watch.left(), channel::<()>());
        let watcher = std::thread::spawn(move || {
            let late = waits.recv_timeout(left) == Err(RecvTimeoutError::Timeout);
            late && rustix::process::kill_process(pid, rustix::process::Signal::KILL).is_ok()
        });
        let output = child.wait_with_output().map_err(absent)?;
        drop(done);
        if output.status.success() {
            return Ok(());
        }
        if watcher.join().unwrap_or(false) {
            return Err(Trouble::TooSlow(self.watch.limit));
        }
        Err(Trouble::Io {
            what: "run tar in",
            path: self.root.clone(),
            source: io::Error::other(String::from_utf8_lossy(&output.stderr).trim().to_owned()),
        })
    }

    /// Removes a file, or a folder that has `levels` of folders below it; looks at the time for each of these.
    fn remove(&self, path: &Path, levels: u32) -> Result<(), Trouble> {
        self.watch.check(0)?;
        let is_dir = match fs::symlink_metadata(path) {
            Ok(found) => found.is_dir(),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(io("remove", path)(error)),
        };
        if levels > 0 && is_dir {
            for entry in fs::read_dir(path).map_err(io("list", path))? {
                self.remove(&entry.map_err(io("list", path))?.path(), levels - 1)?;
            }
        }
        let result = if is_dir { fs::remove_dir_all(path) } else { fs::remove_file(path) };
        result.map_err(io("remove", path))
    }
}

/// Everything goes from the kernel's caches. What is dirty would stay, so it is written before; and whoever serves a mount hears of
/// each inode that was let go, which takes a moment.
fn drop_caches() -> Result<(), Trouble> {
    rustix::fs::sync();
    fs::write("/proc/sys/vm/drop_caches", "3")
        .map_err(|error| Trouble::Skipped(format!("only root can empty the kernel's caches ({error})")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;

    #[test]
    fn what_is_unpacked_lies_where_nobody_else_can_put_it() {
        let dir = tempfile::tempdir().unwrap();
        let size = Size { big: MIB, files: 16, random: 16, synced: 8 };
        let places = [0, 1].map(|_| Place::new(dir.path(), size.clone(), Duration::from_secs(60)).unwrap());
        for place in &places {
            for folder in [place.root(), place.scratch.path()] {
                assert_eq!(fs::metadata(folder).unwrap().mode() & 0o7777, 0o700, "{}", folder.display());
            }
            assert_eq!(place.archive().parent(), Some(place.scratch.path()));
            assert!(!place.archive().exists());
        }
        assert_ne!(places[0].root(), places[1].root(), "a name that cannot be told beforehand");
    }
}
