//! Killed in the middle of a large cut, when replicas hold groups of content that nobody names yet.
//!
//! Segments are closed at [`SEGMENT`] bytes here instead of 16 MiB, so that a cut of some megabytes goes in many groups.
//! `MIRRORFS_TEST_LARGE_KILLS` sets how many kills (CI takes a few).

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rand::{Rng, RngCore, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::support::log::{Groups, Log};
use crate::support::mount::{Failed, How, LIMIT, Mount, Volume, bytes_of, segments};
use crate::support::run::{mirrorfs, run, seed, wait_until};
use crate::support::tree::Snapshot;

/// Kills of each test, unless `MIRRORFS_TEST_LARGE_KILLS` says otherwise.
const KILLS: usize = 3;
/// Bytes at which a segment is closed.
const SEGMENT: u64 = 64 << 10;
const BLOCK: u64 = 64 << 10;
/// Files that are there at a time.
const KEPT: u64 = 6;
/// Where a file is overwritten later, behind its first block, and for how many bytes.
const PATCH: (u64, usize) = (70_000, 100_000);
const IN_USE: i32 = 5;
const INCOMPLETE: i32 = 7;
const REPLICAS: [&str; 2] = ["a", "b"];

fn kills() -> usize {
    std::env::var("MIRRORFS_TEST_LARGE_KILLS").map_or(KILLS, |n| n.parse().unwrap())
}

fn how(state: &str) -> How {
    How::usual().state(state).env("MIRRORFS_TEST_SEGMENT", &SEGMENT.to_string())
}

fn volume(test: &str) -> Option<Volume> {
    let mut v = Volume::new(test)?;
    REPLICAS.iter().for_each(|name| drop(v.folder(name)));
    v.setting(&format!("block_size = {BLOCK}"));
    // Nothing is cut but by `mirrorfs sync`, or when 16 MiB wait.
    v.setting("commit_interval = \"1h\"");
    Some(v)
}

// ---- what is written -------------------------------------------------------------------------------------------------

/// What a writer was told. Step `n`: file `n` is written aside, fsynced and renamed; a part of file `n - 2` is overwritten and
/// fsynced; file `n - KEPT` is removed.
#[derive(Default)]
struct Told {
    dying: AtomicBool,
    /// Files up to here are safe.
    files: AtomicU64,
    /// The overwriting of steps up to here.
    patches: AtomicU64,
    /// Files up to here are on all replicas, says `mirrorfs sync`.
    synced: AtomicU64,
}

impl Told {
    fn files(&self) -> u64 {
        self.files.load(Ordering::SeqCst)
    }
}

/// Bytes that no compression makes fewer.
fn bytes(key: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    ChaCha8Rng::seed_from_u64(key).fill_bytes(&mut bytes);
    bytes
}

fn content(key: u64, n: u64) -> Vec<u8> {
    bytes(key ^ (n << 20), 200_000 + (n * 7919) as usize % 600_000)
}

fn patch(key: u64, n: u64) -> Vec<u8> {
    bytes(key ^ (n << 20) ^ 1, PATCH.1)
}

fn step(dir: &Path, key: u64, n: u64, told: &Told) -> io::Result<()> {
    let mut f = File::create(dir.join("temporary"))?;
    f.write_all(&content(key, n))?;
    f.sync_all()?;
    fs::rename(dir.join("temporary"), dir.join(n.to_string()))?;
    File::open(dir)?.sync_all()?;
    told.files.store(n, Ordering::SeqCst);
    if n > 2 {
        let f = OpenOptions::new().write(true).open(dir.join((n - 2).to_string()))?;
        f.write_all_at(&patch(key, n - 2), PATCH.0)?;
        f.sync_all()?;
    }
    told.patches.store(n, Ordering::SeqCst);
    if n > KEPT {
        fs::remove_file(dir.join((n - KEPT).to_string()))?;
    }
    Ok(())
}

/// Checks that `dir` is a state that once was, with at least `files` and the overwriting of step `patches`. Answers the newest file.
fn check(dir: &Path, key: u64, files: u64, patches: u64, what: &str) -> u64 {
    let Ok(list) = fs::read_dir(dir) else {
        assert_eq!(files, 0, "{what}: {} is not there", dir.display());
        return 0;
    };
    let names: BTreeSet<String> = list.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    let found: BTreeSet<u64> = names.iter().filter_map(|n| n.parse().ok()).collect();
    let newest = found.last().copied().unwrap_or(0);
    assert!(newest >= files, "{what}: {files} files were synced, {newest} is the newest");
    // The oldest is removed last in a step.
    let removed = newest > KEPT && !found.contains(&(newest - KEPT));
    let oldest = (newest + u64::from(removed)).saturating_sub(KEPT).max(1);
    assert!(found.iter().copied().eq(oldest..=newest), "{what}: a hole in {found:?}");
    for n in found {
        let path = dir.join(n.to_string());
        let got = fs::read(&path).unwrap_or_else(|e| panic!("{what}: {}: {e}", path.display()));
        let old = content(key, n);
        let mut new = old.clone();
        new[PATCH.0 as usize..][..PATCH.1].copy_from_slice(&patch(key, n));
        // Step n + 2 overwrites it.
        let must = newest > n + 2 || newest == n + 2 && (removed || patches >= newest);
        let may = newest >= n + 2;
        let whole = match (must, may) {
            (true, _) => got == new,
            (false, false) => got == old,
            // In the middle of it, page by page.
            (false, true) => {
                let pages = || (0..got.len()).step_by(4096).map(|at| at..(at + 4096).min(got.len()));
                got.len() == old.len()
                    && pages().all(|p| got[p.clone()] == old[p.clone()] || got[p.clone()] == new[p])
            }
        };
        assert!(
            whole,
            "{what}: file {n} of {newest} has wrong content ({} bytes of {})",
            got.len(),
            old.len()
        );
    }
    newest
}

// ---- the tests -------------------------------------------------------------------------------------------------------

struct Test {
    v: Rc<Volume>,
    rng: ChaCha8Rng,
    seed: u64,
    /// Kills that came when a replica held content that nobody named.
    hit: usize,
    /// Segments on replica a before the last large cut.
    before: usize,
}

impl Test {
    fn new(test: &str) -> Option<Self> {
        let v = Rc::new(volume(test)?);
        let seed = seed(test);
        Some(Self { v, rng: ChaCha8Rng::seed_from_u64(seed), seed, hit: 0, before: 0 })
    }

    fn key(&self, round: usize) -> u64 {
        self.seed.rotate_left(7).wrapping_add(round as u64)
    }

    fn replica(&self, name: &str) -> PathBuf {
        self.v.path(&format!("replica-{name}"))
    }

    /// Writes some megabytes, asks for a sync, goes on writing, and ends the daemon by `end`, mostly in the middle of that cut.
    fn write_until<T>(&mut self, m: Mount, round: usize, end: impl FnOnce(Mount) -> T) -> (T, Arc<Told>) {
        if self.rng.random() {
            // Nothing to send: what the shippers note is behind the last commit then.
            m.sync();
            m.sync();
        }
        let dir = m.path(format!("round{round}"));
        fs::create_dir(&dir).unwrap();
        if round >= 2 {
            let _ = fs::remove_dir_all(m.path(format!("round{}", round - 2)));
        }
        let (key, told) = (self.key(round), Arc::new(Told::default()));
        let before: u64 = self.rng.random_range(8..14);
        let writer = {
            let (dir, told) = (dir.clone(), Arc::clone(&told));
            thread::spawn(move || {
                for n in 1.. {
                    if let Err(e) = step(&dir, key, n, &told) {
                        assert!(
                            told.dying.load(Ordering::SeqCst),
                            "a writer failed while the daemon lived: {e}"
                        );
                        return;
                    }
                    // Slower when it has its part: the cut shall not wait for the processor.
                    thread::sleep(Duration::from_millis(if n < before { 0 } else { 30 }));
                }
            })
        };
        wait_until(LIMIT, "the first part is written", || told.files() >= before);
        let start = segments(&self.replica("a")).len();
        self.before = start;
        let syncing = {
            let (root, told) = (m.root().to_owned(), Arc::clone(&told));
            thread::spawn(move || {
                let written = told.files();
                let ran = run(mirrorfs().arg("sync").arg(&root).args(["--timeout", "60"]), LIMIT);
                match ran.code {
                    Some(0) => told.synced.store(written, Ordering::SeqCst),
                    _ => assert!(told.dying.load(Ordering::SeqCst), "{}: {}", ran.call, ran.stderr),
                }
            })
        };
        // So many segments later, or at any moment.
        let later = self.rng.random_range(1..20);
        if self.rng.random_ratio(4, 5) {
            let until = Instant::now() + Duration::from_secs(20);
            while segments(&self.replica("a")).len() < start + later
                && !syncing.is_finished()
                && Instant::now() < until
            {
                thread::sleep(Duration::from_millis(1));
            }
        } else {
            thread::sleep(Duration::from_millis(self.rng.random_range(0..700)));
        }
        told.dying.store(true, Ordering::SeqCst);
        let ended = end(m);
        writer.join().unwrap();
        syncing.join().unwrap();
        (ended, told)
    }

    /// Whether a replica has segments behind one that is missing: several are sent at a time.
    fn has_hole(&self, replica: &str) -> bool {
        Log::read(&self.replica(replica)).hole
    }

    fn groups(&self, replica: &str, what: &str) -> Groups {
        let log = Log::read(&self.replica(replica));
        assert!(log.damaged.is_empty(), "{what}: {replica}: {:?}", log.damaged);
        log.groups(&format!("{what}: {replica}"))
    }

    /// What `replica` alone restores must be a past state that is not older than what `sync` said.
    fn check_replica(&self, replica: &str, rounds: &[(usize, Arc<Told>)], what: &str) {
        let to = self.v.path("restored");
        let ran = self.v.run(&[], &["restore", "--from", replica, "--to", to.to_str().unwrap()]);
        if self.has_hole(replica) {
            ran.with_code(INCOMPLETE).says(&["this is the state before them"]);
        } else {
            ran.ok();
        }
        for (round, told) in rounds {
            let (dir, synced) = (to.join(format!("round{round}")), told.synced.load(Ordering::SeqCst));
            check(&dir, self.key(*round), synced, 0, &format!("{what}: {replica} alone: round {round}"));
        }
        fs::remove_dir_all(to).unwrap();
    }

    /// Everything is sent: each replica alone gives all of it, and nothing is found wrong anywhere.
    fn check_sent(&self, m: Mount, state: &str, what: &str) {
        m.sync();
        let expected = Snapshot::take(m.root());
        m.unmount();
        for replica in REPLICAS {
            let to = self.v.restore(replica, "restored");
            expected.assert_same(&Snapshot::take(&to), &format!("{what}: restored from {replica}"));
            fs::remove_dir_all(to).unwrap();
            let left = self.groups(replica, what);
            assert_eq!(left.unnamed, 0, "{what}: {replica} ends with blocks that nobody names");
        }
        self.v.fsck(state, &["--replica", "all", "--deep"]).ok();
    }

    /// What the kill left on the replicas: each restores, alone, and none counts as damaged.
    fn check_left(&mut self, rounds: &[(usize, Arc<Told>)], what: &str) {
        let mut hit = false;
        for replica in REPLICAS {
            let found = self.groups(replica, what);
            println!("{what}: {replica}: {found:?}");
            hit |= found.unnamed > 0;
            self.check_replica(replica, rounds, what);
            let mut fsck = mirrorfs();
            fsck.env("XDG_STATE_HOME", self.v.path("nothing"));
            let ran = run(fsck.args(["fsck", "--replica"]).arg(self.replica(replica)), LIMIT);
            if self.has_hole(replica) {
                // Alone it cannot be told from a loss.
                let told = ran.with_code(4).text();
                assert!(told.contains(" 1 error, "), "{what}: {replica}: {told}");
            } else {
                ran.ok();
            }
        }
        self.hit += usize::from(hit);
    }

    fn check_mounted(&self, m: &Mount, rounds: &[(usize, Arc<Told>)], local: bool, what: &str) {
        for (round, told) in rounds {
            let (files, patches) = match local {
                true => (told.files(), told.patches.load(Ordering::SeqCst)),
                false => (told.synced.load(Ordering::SeqCst), 0),
            };
            check(
                &m.path(format!("round{round}")),
                self.key(*round),
                files,
                patches,
                &format!("{what}: mounted: round {round}"),
            );
        }
    }
}

/// The last rounds, of which something is promised: the one before them was being removed.
fn recent(told: &[(usize, Arc<Told>)]) -> &[(usize, Arc<Told>)] {
    &told[told.len().saturating_sub(2)..]
}

#[test]
fn killed_in_the_middle_of_a_large_cut() {
    let Some(mut t) = Test::new("kill: large cut") else { return };
    let mut m = t.v.mount_as(&how("state"));
    m.sync();
    let mut told = Vec::new();
    for round in 0..kills() * 4 {
        if round >= kills() && t.hit > 0 {
            break;
        }
        let what = format!("kill {round}");
        let ((), news) = t.write_until(m, round, Mount::kill9);
        told.push((round, news));
        t.check_left(recent(&told), &what);
        t.v.fsck("state", &["--replica", "all"]).ok();
        if t.rng.random_ratio(1, 4) {
            // Once more while it recovers.
            let recovering = t.v.start(&how("state"));
            thread::sleep(Duration::from_millis(t.rng.random_range(0..400)));
            recovering.kill9();
        }
        m = t.v.mount_as(&how("state"));
        t.check_mounted(&m, recent(&told), true, &what);
        if round % 2 == 1 {
            t.check_sent(m, "state", &what);
            m = t.v.mount_as(&how("state"));
        }
    }
    t.check_sent(m, "state", "at the end");
    println!("{} of {} kills in the middle", t.hit, told.len());
    assert!(t.hit > 0, "no kill came in the middle of a cut");
}

impl Test {
    /// Whoever had the volume before is refused, and changes nothing.
    fn refused(&self, state: &str, what: &str) {
        for how in [how(state), how(state).arg("--takeover")] {
            let Failed { code, told } = self.v.try_mount(&how).err().expect("its state was overtaken");
            assert_eq!(code, Some(IN_USE), "{what}: {told}");
        }
    }

    /// Another machine mounts without a state. `from` are the replicas that it knows.
    fn come(v: &Volume, state: &str, from: &[&str]) -> Mount {
        v.mount_as(&how(state).only(from).arg("--takeover"))
    }

    /// The machine dies for good. Answers what it was told.
    fn die(&mut self, m: Mount, round: usize) -> Arc<Told> {
        let ((), told) = self.write_until(m, round, Mount::kill9);
        if told.synced.load(Ordering::SeqCst) == 0 {
            // It had sent less to one of the replicas.
            let there = segments(&self.replica("a"));
            let kept = self.rng.random_range(self.before.min(there.len())..=there.len());
            there[kept..].iter().for_each(|path| fs::remove_file(path).unwrap());
        }
        told
    }

    /// Another machine takes over in the middle of it, while the first one still seals and sends.
    fn overtake(&mut self, m: Mount, round: usize, next: &str) -> (Mount, Arc<Told>) {
        let (v, next) = (Rc::clone(&self.v), next.to_owned());
        self.write_until(m, round, move |m| {
            let other = Self::come(&v, &next, &[]);
            fs::write(other.path(format!("of {next}")), next.repeat(50_000)).unwrap();
            other.sync();
            wait_until(LIMIT, "the former writer turns read-only", || !m.status()["read_only"].is_null());
            m.kill9();
            other
        })
    }
}

#[test]
fn the_machine_is_gone_in_the_middle_of_a_large_cut() {
    let Some(mut t) = Test::new("kill: machine gone in a large cut") else { return };
    let mut m = t.v.mount_as(&how("life0"));
    m.sync();
    let mut told = Vec::new();
    for round in 0..kills() {
        let (last, next, what) =
            (format!("life{round}"), format!("life{}", round + 1), format!("death {round}"));
        let came = if round == 1 || t.rng.random_ratio(1, 8) {
            println!("{what}: {next} comes in the middle of it");
            let (came, news) = t.overtake(m, round, &next);
            told.push((round, news));
            came
        } else {
            let from = if t.rng.random_ratio(1, 3) { vec!["a"] } else { Vec::new() };
            let news = t.die(m, round);
            told.push((round, news));
            t.check_left(recent(&told), &what);
            if t.rng.random_ratio(1, 3) {
                let reader = t.v.mount_as(&how("reader").only(&["b"]).arg("--read-only"));
                t.check_mounted(&reader, recent(&told), false, &format!("{what}: read only"));
                reader.unmount();
                fs::remove_dir_all(t.v.path("reader")).unwrap();
            }
            println!("{what}: {next} comes with {from:?}");
            let came = Test::come(&t.v, &next, &from);
            if from.is_empty() {
                came
            } else {
                // It goes on with one replica, and finds the other one later, which may have more of the machine that is gone.
                t.check_mounted(&came, recent(&told), false, &what);
                fs::write(came.path(format!("of {next}")), next.repeat(200_000)).unwrap();
                came.sync();
                match t.rng.random() {
                    true => came.unmount(),
                    false => came.kill9(),
                }
                t.v.mount_as(&how(&next))
            }
        };
        t.check_mounted(&came, recent(&told), false, &what);
        t.refused(&last, &what);
        if t.rng.random() {
            // Else its first cut is a large one.
            t.check_sent(came, &next, &what);
            let before = REPLICAS.map(|r| bytes_of(&t.replica(r)));
            t.refused(&last, &what);
            assert!(
                REPLICAS.map(|r| bytes_of(&t.replica(r))) == before,
                "{what}: a machine that was refused wrote"
            );
            m = t.v.mount_as(&how(&next));
        } else {
            m = came;
        }
    }
    t.check_sent(m, &format!("life{}", kills()), "at the end");
    println!("{} of {} in the middle", t.hit, kills());
}
