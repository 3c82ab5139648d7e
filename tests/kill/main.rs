//! The daemon is killed at random moments while programs write.
//!
//! What they were told is safe must be there afterwards; what is there must be a state that was; and each replica alone
//! must hold a state that was, at that very moment.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod large;
#[path = "../support/mod.rs"]
mod support;

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use support::mount::{How, LIMIT, Mount, Volume};
use support::run::{mirrorfs, run, seed};
use support::tree::{Content, Shape, Snapshot, build};

/// Kills, unless `MIRRORFS_TEST_KILLS` says otherwise.
const KILLS: usize = 50;

/// What the writers of one round were told, and how far they got.
#[derive(Default)]
struct Told {
    /// The daemon is about to be killed: errors are no failure from here on.
    dying: AtomicBool,
    /// Files `a/1..=n` were fsynced, renamed, and their directory fsynced.
    files: AtomicU64,
    /// Records 1..=n of `log` were fsynced.
    records: AtomicU64,
    /// Files `a/1..=n` are on all replicas, says `mirrorfs sync`.
    synced: AtomicU64,
}

/// What a writer does until the daemon dies under it.
type Writer = Box<dyn FnOnce(&Path, &Told) -> io::Result<()> + Send>;

/// Content of file `i`: mostly small, now and then some megabytes.
fn content(i: u64) -> Vec<u8> {
    let len = match i % 25 {
        7 => 1_500_000 + (i * 7919) % 1_000_000,
        n if n % 3 == 0 => (i * 31) % 4000,
        _ => (i * 7919) % 60_000,
    };
    let mut all = format!("file {i} of {len} bytes\n").into_bytes();
    all.extend(Content::new(i).take(len as usize));
    all
}

fn record(i: u64) -> String {
    format!("record {i:012} {:>43}\n", "x".repeat((i % 40) as usize))
}

/// Write a temporary file, fsync it, rename it, fsync the directory: as databases and editors do.
fn write_files(dir: &Path, told: &Told) -> io::Result<()> {
    let a = dir.join("a");
    for i in 1.. {
        let temporary = a.join("temporary");
        let mut f = File::create(&temporary)?;
        f.write_all(&content(i))?;
        f.sync_all()?;
        fs::rename(&temporary, a.join(i.to_string()))?;
        File::open(&a)?.sync_all()?;
        told.files.store(i, Ordering::SeqCst);
    }
    Ok(())
}

/// Things that are only done in order, never synced: the first of a pair is made before the second, files are closed before
/// the next is begun, and one file is replaced by renaming again and again.
fn write_in_order(dir: &Path) -> io::Result<()> {
    for i in 1_u64.. {
        fs::write(dir.join(format!("b/{i}")), content(i % 50 + 1))?;
        fs::create_dir(dir.join(format!("b/{i}.first")))?;
        File::create(dir.join(format!("b/{i}.second")))?;
        fs::write(dir.join("b/next"), content(i % 40 + 1))?;
        fs::rename(dir.join("b/next"), dir.join("b/current"))?;
        if i > 30 {
            let old = i - 30;
            fs::remove_file(dir.join(format!("b/{old}.second")))?;
            fs::remove_dir(dir.join(format!("b/{old}.first")))?;
            fs::remove_file(dir.join(format!("b/{old}")))?;
        }
    }
    Ok(())
}

/// A log that grows record by record, each synced.
fn write_log(dir: &Path, told: &Told) -> io::Result<()> {
    let mut f = OpenOptions::new().append(true).create(true).open(dir.join("log"))?;
    for i in 1.. {
        f.write_all(record(i).as_bytes())?;
        f.sync_data()?;
        told.records.store(i, Ordering::SeqCst);
    }
    Ok(())
}

/// Asks for a full sync again and again.
fn sync_all(m: &Path, told: &Told) {
    while !told.dying.load(Ordering::SeqCst) {
        let before = told.files.load(Ordering::SeqCst);
        let ran = run(mirrorfs().arg("sync").arg(m).args(["--timeout", "60"]), LIMIT);
        if ran.code == Some(0) {
            told.synced.store(before, Ordering::SeqCst);
        } else if !told.dying.load(Ordering::SeqCst) {
            thread::sleep(Duration::from_millis(300));
            assert!(told.dying.load(Ordering::SeqCst), "{} failed: {}", ran.call, ran.stderr);
        }
        thread::sleep(Duration::from_millis(150));
    }
}

fn names(dir: &Path) -> BTreeSet<String> {
    fs::read_dir(dir)
        .unwrap_or_else(|e| panic!("{}: {e}", dir.display()))
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .collect()
}

/// Checks that `dir` is a state in which one round's folder once was, and not older than what was told. Answers how many
/// files and records there are.
fn check_round(dir: &Path, files: u64, records: u64, what: &str) -> (u64, u64) {
    let whole = |path: &Path, wanted: &[u8]| {
        let got = fs::read(path).unwrap_or_else(|e| panic!("{what}: {}: {e}", path.display()));
        assert!(got == wanted, "{what}: {} has wrong content ({} bytes)", path.display(), got.len());
    };
    // Renamed after its content was synced: a name means all of it, and names come in order.
    let mut found = 0;
    if dir.join("a").exists() {
        let names = names(&dir.join("a"));
        found = names.iter().filter(|n| *n != "temporary").count() as u64;
        for i in 1..=found {
            assert!(names.contains(&i.to_string()), "{what}: {found} files, but not {i}: {names:?}");
            whole(&dir.join(format!("a/{i}")), &content(i));
        }
    }
    assert!(found >= files, "{what}: {files} files were synced, {found} are there");

    let log = fs::read_to_string(dir.join("log")).unwrap_or_default();
    let length = record(1).len();
    let lines = (log.len() / length) as u64;
    for i in 1..=lines {
        let at = (i - 1) as usize * length;
        assert_eq!(log[at..at + length], record(i), "{what}: record {i}");
    }
    assert!(lines >= records, "{what}: {records} records were synced, {lines} are there");

    if dir.join("b").exists() {
        check_order(&dir.join("b"), what, &whole);
    }
    (found, lines)
}

fn check_order(b: &Path, what: &str, whole: &dyn Fn(&Path, &[u8])) {
    let all = names(b);
    let numbers = |suffix: &str| -> BTreeSet<u64> {
        all.iter().filter_map(|n| n.strip_suffix(suffix)?.parse().ok()).collect()
    };
    let (plain, first, second) = (numbers(""), numbers(".first"), numbers(".second"));
    let newest = plain.last().copied().unwrap_or(0);
    let oldest = plain.first().copied().unwrap_or(1);
    for i in oldest..=newest {
        assert!(plain.contains(&i), "{what}: b/{i} is missing between {oldest} and {newest}");
        // The newest may be half written: it was not closed yet.
        if i < newest || first.contains(&i) {
            whole(&b.join(i.to_string()), &content(i % 50 + 1));
        }
    }
    for i in &second {
        assert!(first.contains(i), "{what}: b/{i}.second without b/{i}.first");
    }
    for i in &first {
        assert!(plain.contains(i), "{what}: b/{i}.first without b/{i}");
        // Created in order, removed in order: in between both are there.
        let both = *i < newest && *i > oldest;
        assert!(!both || second.contains(i), "{what}: b/{i}.first without b/{i}.second");
    }
    // Replaced by a rename after it was closed: always one whole version, the last one or the one before.
    if all.contains("current") {
        let got = fs::read(b.join("current")).unwrap();
        let versions = [newest, newest.saturating_sub(1)].map(|i| content(i % 40 + 1));
        assert!(versions.contains(&got), "{what}: b/current is no version of {newest}: {} bytes", got.len());
    } else {
        assert!(newest <= 1, "{what}: b/current is gone at {newest}");
    }
}

struct Test {
    v: Volume,
    rng: ChaCha8Rng,
    kills: usize,
    replicas: [&'static str; 2],
    /// Where replicas are restored to.
    scratch: tempfile::TempDir,
}

impl Test {
    /// One round of writing that ends with a kill; answers what was told.
    fn write_and_kill(&mut self, m: Mount, round: usize) -> Arc<Told> {
        let dir = m.path(format!("round{round}"));
        for d in ["a", "b"] {
            fs::create_dir_all(dir.join(d)).unwrap();
        }
        if round >= 2 {
            // It may never have been: the kill came before anything was synced.
            match fs::remove_dir_all(m.path(format!("round{}", round - 2))) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => panic!("round {}: {e}", round - 2),
                _ => {}
            }
        }
        let told = Arc::new(Told::default());
        let mut writers = Vec::new();
        let mut spawn = |work: Writer| {
            let (dir, told) = (dir.clone(), Arc::clone(&told));
            writers.push(thread::spawn(move || {
                let error = work(&dir, &told).unwrap_err();
                assert!(told.dying.load(Ordering::SeqCst), "a writer failed while the daemon lived: {error}");
            }));
        };
        spawn(Box::new(write_files));
        spawn(Box::new(|dir, _| write_in_order(dir)));
        spawn(Box::new(write_log));
        let root = m.root().to_owned();
        let asking = Arc::clone(&told);
        writers.push(thread::spawn(move || sync_all(&root, &asking)));

        let long = if self.rng.random_bool(0.2) { 60 } else { 1800 };
        thread::sleep(Duration::from_millis(self.rng.random_range(0..long)));
        told.dying.store(true, Ordering::SeqCst);
        m.kill9();
        for w in writers {
            w.join().unwrap();
        }
        told
    }

    /// What `replica` restores right now must be a past state that is not older than what `sync` said.
    fn check_replica(&self, replica: &str, rounds: &[(usize, Arc<Told>)], what: &str) {
        let to = self.scratch.path().join("restored");
        self.v.restore_to(replica, &to);
        for (round, told) in rounds {
            let dir = to.join(format!("round{round}"));
            check_round(
                &dir,
                told.synced.load(Ordering::SeqCst),
                0,
                &format!("{what}: {replica}: round {round}"),
            );
        }
        fs::remove_dir_all(to).unwrap();
    }

    fn go(mut self) {
        let mut told: Vec<(usize, Arc<Told>)> = Vec::new();
        let mut m = Some(self.v.mount());
        let mut totals = (0, 0);
        for round in 0..self.kills {
            let started = Instant::now();
            let live = m.take().unwrap();
            told.push((round, self.write_and_kill(live, round)));
            if told.len() > 2 {
                told.remove(0);
            }
            let what = format!("kill {round}");
            if round % 5 == 0 {
                // As the kill left it: a check changes nothing.
                self.v.fsck("state", &[]).ok();
            }
            // The oldest round was being removed while writing: nothing is promised of it.
            let recent: Vec<_> = told.iter().filter(|(r, _)| r + 1 >= round).cloned().collect();
            for replica in self.replicas {
                self.check_replica(replica, &recent, &what);
            }
            if self.rng.random_ratio(1, 5) {
                // Killed again while it recovers.
                let recovering = self.v.start(&How::usual());
                thread::sleep(Duration::from_millis(self.rng.random_range(0..400)));
                recovering.kill9();
            }
            let again = self.v.mount();
            for (r, t) in &recent {
                let dir: PathBuf = again.path(format!("round{r}"));
                let (files, records) = (t.files.load(Ordering::SeqCst), t.records.load(Ordering::SeqCst));
                let found = check_round(&dir, files, records, &format!("{what}: mounted: round {r}"));
                totals = (totals.0 + found.0, totals.1 + found.1);
            }
            println!("{what}: {:?}", started.elapsed());
            m = Some(again);
        }
        assert!(totals.0 > 100 && totals.1 > 100, "hardly anything was written: {totals:?}");
        let m = m.unwrap();
        m.sync();
        m.unmount();
        for replica in self.replicas {
            self.check_replica(replica, &told, "at the end");
        }
    }
}

#[test]
fn killed_at_random_moments() {
    let Some(mut v) = Volume::new("kill") else { return };
    let seed = seed("kill");
    let kills = std::env::var("MIRRORFS_TEST_KILLS").map_or(KILLS, |n| n.parse().unwrap());
    v.folder("a");
    v.folder("b");
    // Many small groups, so that kills hit all stages of them.
    v.setting("commit_interval = \"300ms\"");
    // In memory where there is such a place: a restore ends by syncing its filesystem, with all that others write there.
    let memory = Path::new("/dev/shm");
    let scratch =
        if memory.is_dir() { tempfile::tempdir_in(memory).unwrap() } else { tempfile::tempdir().unwrap() };
    Test { v, rng: ChaCha8Rng::seed_from_u64(seed), kills, replicas: ["a", "b"], scratch }.go();
}

#[test]
fn a_file_is_rewritten_as_an_editor_does_and_never_half() {
    let Some(mut v) = Volume::new("kill: editor") else { return };
    v.folder("a");
    let mut m = v.mount();
    let version = |i: u64| format!("version {i}\n").into_bytes().repeat(20_000 + i as usize * 100);
    let mut i = 0;
    for _ in 0..5 {
        for _ in 0..15 {
            i += 1;
            let mut f = File::create(m.path(".doc.swp")).unwrap();
            f.write_all(&version(i)).unwrap();
            f.sync_all().unwrap();
            fs::rename(m.path(".doc.swp"), m.path("doc")).unwrap();
        }
        File::open(m.root()).unwrap().sync_all().unwrap();
        // One more that is not waited for.
        fs::write(m.path(".doc.swp"), version(i + 1)).unwrap();
        fs::rename(m.path(".doc.swp"), m.path("doc")).unwrap();
        m.kill9();
        m = v.mount();
        let got = fs::read(m.path("doc")).unwrap();
        assert!(got == version(i) || got == version(i + 1), "half a version: {} bytes", got.len());
    }
    m.unmount();
}

#[test]
fn killed_while_it_is_brought_back() {
    let Some(mut v) = Volume::new("kill: brought back") else { return };
    let seed = seed("kill: brought back");
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    v.folder("a");
    v.folder("b");
    v.setting("commit_interval = \"300ms\"");
    let m = v.mount();
    for part in 0..5 {
        let dir = m.path(format!("part{part}"));
        fs::create_dir(&dir).unwrap();
        build(&dir, seed.wrapping_add(part), Shape { files: 120, dirs: 6, largest: 1 << 20, sockets: true });
        m.sync();
    }
    let mut expected = Snapshot::take(m.root());
    m.unmount();
    // Again and again into the same state folder, as a machine would that fails while it starts; then on from there.
    for life in 0..3 {
        let mut how = How::usual().state(&format!("life{life}"));
        if life > 0 {
            // The one before was killed; the first one had ended in good order.
            how = how.arg("--takeover");
        }
        for _ in 0..5 {
            let coming = v.start(&how);
            thread::sleep(Duration::from_millis(rng.random_range(0..250)));
            coming.kill9();
        }
        let m = v.mount_as(&how);
        expected.assert_same(&Snapshot::take(m.root()), &format!("life {life}"));
        fs::write(m.path(format!("of life {life}")), content(life)).unwrap();
        m.sync();
        expected = Snapshot::take(m.root());
        // The next one begins without this state.
        m.kill9();
    }
    for replica in ["a", "b"] {
        let to = v.restore(replica, &format!("restored-{replica}"));
        expected.assert_same(&Snapshot::take(&to), &format!("restored from {replica}"));
    }
}
