//! fsynced means on the platter: power is lost at hundreds of moments of a recorded life of a volume.
//!
//! A recording filesystem (`record`) lies below the state folder and two folder replicas while programs (`work`) write through a
//! real mount, which is shipped, trimmed, evicted, unmounted, killed and mounted again meanwhile. For each of many moments a disk
//! is made up that a power loss may leave (`platter`): what was synced is there, the rest is dropped, reordered or torn. The
//! volume is opened from it and compared with what the programs had been told (`oracle`). Some of these disks are recorded in
//! turn while the volume recovers, and cut once more.
//!
//! `MIRRORFS_POWER_CUTS` sets how many moments (CI takes a few; `scripts/power-loss` many), `MIRRORFS_TEST_SEED` the choices.
//! Threads and clocks make each recording another one: a disk that fails is kept in `MIRRORFS_POWER_KEEP`, if that is set.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod disk;
mod oracle;
mod platter;
mod record;
#[path = "../support/mod.rs"]
mod support;
mod volume;
mod work;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use disk::{Op, Tree as Disk};
use oracle::{Book, Checked, Promise};
use platter::{Platter, Rules};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use record::{Recorder, Recording};
use support::mount::{How, LIMIT, Mount, Volume};
use support::run::{mirrorfs, run, seed};
use tokio::runtime::Runtime;
use volume::Open;
use work::Writer;

/// Bytes at which a segment is closed here: most cuts go in several groups then.
const SEGMENT: u64 = 24 << 10;
/// Moments of each recording, unless `MIRRORFS_POWER_CUTS` says otherwise.
const CUTS: usize = 24;
const WRITERS: u64 = 4;

/// A place for a disk, and everything that happened to it.
struct Life {
    /// Where the disk is: the recorder's mount, later the disks that are made up, so that all paths stay the same.
    disk: PathBuf,
    _place: tempfile::TempDir,
    recording: Recording,
    book: Book,
    cache: &'static str,
    /// Nothing ever reached a replica.
    alone: bool,
}

/// How a volume lives while it is recorded.
#[derive(Clone, Copy, PartialEq)]
struct Plan {
    cache: &'static str,
    interval: &'static str,
    alone: bool,
    /// Length of its parts.
    part: Duration,
}

struct Scene<'a> {
    v: &'a Volume,
    how: How,
    recorder: Arc<Recorder>,
    book: Book,
    rng: ChaCha8Rng,
    generation: u32,
    part: Duration,
    /// `mirrorfs sync` now and then.
    asks: bool,
}

fn place() -> tempfile::TempDir {
    let memory = Path::new("/dev/shm");
    let mut builder = tempfile::Builder::new();
    builder.prefix("mirrorfs-power");
    if memory.is_dir() { builder.tempdir_in(memory) } else { builder.tempdir() }.unwrap()
}

impl Scene<'_> {
    fn writers(&mut self, dying: &Arc<AtomicBool>) -> Vec<Writer> {
        self.generation += 1;
        (0..WRITERS)
            .map(|w| {
                let folder = format!("g{}w{w}", self.generation);
                Writer::new(Arc::clone(&self.recorder), &folder, self.rng.random(), Arc::clone(dying))
            })
            .collect()
    }

    /// Has them all write for a while, and asks for full syncs meanwhile; then they stop, or the daemon is killed.
    fn work(
        &mut self,
        m: Mount,
        writers: &mut [Writer],
        dying: &Arc<AtomicBool>,
        kill: bool,
    ) -> Option<Mount> {
        let started = Instant::now();
        let length = self.part.mul_f64(self.rng.random_range(0.7..1.3));
        let root = m.root().to_owned();
        let ended = AtomicBool::new(false);
        let (asks, mut syncs) = (self.asks, Vec::new());
        let mut m = Some(m);
        thread::scope(|s| {
            for w in writers.iter_mut() {
                let (root, ended) = (&root, &ended);
                s.spawn(move || w.run(root, || ended.load(Ordering::SeqCst)));
            }
            let (recorder, ended, root) = (&self.recorder, &ended, &root);
            let asking = s.spawn(move || {
                let mut done = Vec::new();
                while asks && !ended.load(Ordering::SeqCst) && !dying.load(Ordering::SeqCst) {
                    let start = recorder.now();
                    let ran = run(mirrorfs().arg("sync").arg(root).args(["--timeout", "60"]), LIMIT);
                    if ran.code == Some(0) {
                        done.push((start, recorder.now()));
                    } else {
                        thread::sleep(Duration::from_millis(300));
                        assert!(dying.load(Ordering::SeqCst), "{}: {}", ran.call, ran.stderr);
                    }
                    thread::sleep(Duration::from_millis(300));
                }
                done
            });
            thread::sleep(length.saturating_sub(started.elapsed()));
            if kill {
                dying.store(true, Ordering::SeqCst);
                m.take().unwrap().kill9();
            }
            ended.store(true, Ordering::SeqCst);
            syncs = asking.join().unwrap();
        });
        self.book.everything.extend(&syncs);
        self.book.replicated.extend(&syncs);
        m
    }

    fn unmount(&mut self, m: Mount) {
        let start = self.recorder.now();
        m.unmount();
        let end = self.recorder.now();
        self.book.everything.push((start, end));
        // It waits for replicas as long as they go on.
        self.book.replicated.push((start, end));
    }

    /// Mounts after a kill, and sees what is left of those that were killed.
    fn recover(&mut self) -> Mount {
        let m = self.v.mount_as(&self.how);
        let cut = self.recorder.now();
        for n in 0..self.book.diaries.len() {
            let diary = &self.book.diaries[n];
            if diary.died.is_none() || diary.recovered.is_some() || diary.removed.is_some() {
                continue;
            }
            let tree = work::look(&m.path(&diary.folder));
            let (from, to) = self
                .book
                .lengths(n, cut, &tree)
                .unwrap_or_else(|e| panic!("after a kill, {}: {e}", self.book.diaries[n].folder));
            self.book.diaries[n].recovered = Some((cut, from, to));
        }
        m
    }

    fn enter(&mut self, writers: Vec<Writer>, died: bool) {
        let now = self.recorder.now();
        for w in writers {
            let mut diary = w.diary;
            diary.died = died.then_some(now);
            self.book.diaries.push(diary);
        }
    }
}

/// Records a volume from its creation on: orderly ends, kills, and what comes after.
fn live(v: &Volume, disk_place: tempfile::TempDir, seed: u64, plan: Plan) -> Life {
    let disk = disk_place.path().join("disk");
    fs::create_dir(&disk).unwrap();
    let recorder = Arc::new(Recorder::mount(Disk::new(), &disk));
    let how = How::usual().state(disk.join("state").to_str().unwrap());
    let how = how.env("MIRRORFS_TEST_SEGMENT", &SEGMENT.to_string());
    let mut scene = Scene {
        v,
        how,
        recorder,
        book: Book::default(),
        rng: ChaCha8Rng::seed_from_u64(seed),
        generation: 0,
        part: plan.part,
        asks: !plan.alone,
    };
    let dying = Arc::new(AtomicBool::new(false));
    let mut writers = scene.writers(&dying);
    let mut m = v.mount_as(&scene.how);
    if !plan.alone {
        m = scene.work(m, &mut writers, &dying, false).unwrap();
        scene.unmount(m);
        m = v.mount_as(&scene.how);
    }
    scene.work(m, &mut writers, &dying, true);
    scene.enter(writers, true);
    // Killed again soon: what was read back must not be built upon before it is on the platter.
    for part in [plan.part / 4, plan.part] {
        scene.part = part;
        let m = scene.recover();
        let dying = Arc::new(AtomicBool::new(false));
        let mut writers = scene.writers(&dying);
        scene.work(m, &mut writers, &dying, true);
        scene.enter(writers, true);
    }
    let m = scene.recover();
    let dying = Arc::new(AtomicBool::new(false));
    let mut writers = scene.writers(&dying);
    let old: Vec<usize> = (0..scene.book.diaries.len()).filter(|n| *n < WRITERS as usize).collect();
    for n in old {
        scene.book.diaries[n].removed = Some(scene.recorder.now());
        let _ = fs::remove_dir_all(m.path(&scene.book.diaries[n].folder));
    }
    let m = scene.work(m, &mut writers, &dying, false).unwrap();
    if plan.alone {
        m.kill9()
    } else {
        scene.unmount(m)
    }
    scene.enter(writers, plan.alone);

    // The recorder saw everything: what it did again is what is there.
    let Scene { recorder, book, .. } = scene;
    assert_eq!(recorder.mapped(), 0, "something below the state folder is written through a shared mapping");
    let there = support::mount::bytes_of(&disk);
    if !plan.alone {
        for replica in ["a", "b"] {
            let groups = support::log::Log::read(&disk.join(replica)).groups(replica);
            println!("{replica}: {groups:?}");
            assert!(groups.early > 0, "no cut was large");
        }
    }
    let recorder = Arc::into_inner(recorder).unwrap();
    let recording = recorder.end();
    let mut replayed = recording.start.clone();
    recording.ops.iter().for_each(|op| replayed.apply(op));
    replayed.sweep();
    replayed.store(&disk);
    assert!(support::mount::bytes_of(&disk) == there, "the recording is not complete");
    Life { disk, _place: disk_place, recording, book, cache: plan.cache, alone: plan.alone }
}

/// Moments to cut at: anywhere, and around the ends of syncs and renames.
fn moments(ops: &[Op], n: usize, rng: &mut ChaCha8Rng) -> Vec<usize> {
    let edges: Vec<usize> = ops
        .iter()
        .enumerate()
        .filter(|(_, op)| matches!(op, Op::Sync { .. } | Op::Rename { .. } | Op::Unlink { .. }))
        .map(|(i, _)| i)
        .collect();
    let mut all: Vec<usize> = (0..n)
        .map(|_| match rng.random_range(0..3) {
            0 if !edges.is_empty() => edges[rng.random_range(0..edges.len())] + rng.random_range(0..2),
            _ => rng.random_range(0..=ops.len()),
        })
        .collect();
    all.sort_unstable();
    all
}

#[derive(Default)]
struct Tally {
    cuts: usize,
    opened: usize,
    again: usize,
    restored: usize,
    /// Cuts at which a replica held content that nobody named yet.
    in_large: usize,
    checked: Checked,
    faults: Vec<String>,
}

impl Life {
    fn how(&self, replicas: &[&str]) -> Open {
        Open {
            state: self.disk.join("state"),
            replicas: replicas.iter().map(|r| self.disk.join(r)).collect(),
            read_only: false,
            cache: self.cache,
        }
    }

    fn put(&self, image: &Disk) {
        if self.disk.exists() {
            fs::remove_dir_all(&self.disk).unwrap();
        }
        image.store(&self.disk);
    }

    /// Opens what lies on the disk and compares it with what must be there. `gaps`: not everything may be readable.
    fn look(
        &self,
        rt: &Runtime,
        how: &Open,
        cut: usize,
        gaps: bool,
    ) -> Result<(Checked, BTreeMap<String, oracle::Tree>), String> {
        let started = Instant::now();
        let core = volume::open(rt, how).map_err(|e| format!("it does not open: {e}"))?;
        let done = (|| {
            if let Some(note) = core.notes.iter().find(|n| n.contains("rebuil") || n.contains("aside")) {
                // Before anything was promised a state may be begun anew.
                if self.book.check(cut, Promise::Local, &BTreeMap::new(), gaps).is_err() {
                    return Err(format!("its local state was found damaged: {note}"));
                }
            }
            let found = volume::read(&core.vfs)?;
            let checked = self.book.check(cut, Promise::Local, &found, gaps)?;
            Ok((checked, found))
        })();
        core.abandon();
        if started.elapsed() > Duration::from_secs(30) {
            return Err(format!("it took {:?}", started.elapsed()));
        }
        done
    }

    /// What one replica alone gives back.
    fn restore(&self, rt: &Runtime, replica: &str, cut: usize) -> Result<Checked, String> {
        let promised = self.book.replicated.iter().any(|(_, end)| *end <= cut);
        if !promised {
            return Ok(Checked::default());
        }
        let how = Open { state: self.disk.join("elsewhere"), read_only: true, ..self.how(&[replica]) };
        let core = volume::open(rt, &how).map_err(|e| format!("{replica} alone does not open: {e}"))?;
        let done = volume::read(&core.vfs)
            .and_then(|found| self.book.check(cut, Promise::Replicated, &found, false));
        core.abandon();
        let _ = fs::remove_dir_all(&how.state);
        done.map_err(|e| format!("{replica} alone: {e}"))
    }

    /// Recovers with a recorder below, writes, and cuts again at several moments of that.
    fn again(
        &self,
        rt: &Runtime,
        image: &Disk,
        cut: usize,
        rules: Rules,
        rng: &mut ChaCha8Rng,
    ) -> Result<usize, String> {
        fs::remove_dir_all(&self.disk).unwrap();
        fs::create_dir(&self.disk).unwrap();
        let recorder = Recorder::mount(image.clone(), &self.disk);
        let mut told: Vec<(usize, usize)> = Vec::new();
        let content = |n: usize| format!("second life {n} ").into_bytes().repeat(n * 1500 + 1);
        let written = (|| {
            let core =
                volume::open(rt, &self.how(&["a", "b"])).map_err(|e| format!("it does not open: {e}"))?;
            for n in 0..4 {
                let done = volume::write_synced(&core.vfs, &format!("again{n}"), &content(n));
                done.map_err(|e| format!("writing after the recovery: {e}"))?;
                told.push((n, recorder.now()));
            }
            if rng.random() {
                core.close(async { tokio::time::sleep(Duration::from_millis(50)).await })
                    .map_err(|e| e.to_string())?;
            } else {
                core.abandon();
            }
            Ok(())
        })();
        let recording = recorder.end();
        written.map_err(|e: String| format!("recorded again: {e}"))?;
        let mut platter = Platter::new(&recording.start, rules);
        let mut cuts = 0;
        for moment in moments(&recording.ops, 4, rng) {
            while platter.now() < moment {
                platter.push(&recording.ops[platter.now()]);
            }
            let image = platter.image(rng);
            self.put(&image);
            let what = |e: String| format!("cut again at {moment} of {}: {e}", recording.ops.len());
            let (_, found) = self.look(rt, &self.how(&["a", "b"]), cut, false).map_err(|e| {
                keep(&image);
                what(e)
            })?;
            for (n, _) in told.iter().filter(|(_, at)| *at <= moment) {
                match found.get(&format!("again{n}")).and_then(|t| t.get("")).map(|f| &f.body) {
                    Some(oracle::Body::File(bytes)) if *bytes == content(*n) => {}
                    _ => return Err(what(format!("again{n} was synced and is not there"))),
                }
            }
            cuts += 1;
        }
        Ok(cuts)
    }

    /// Cuts at `n` moments, under both rules.
    fn cut(&self, rt: &Runtime, n: usize, rng: &mut ChaCha8Rng, tally: &mut Tally) {
        for rules in [Rules::Journal, Rules::Folders] {
            let mut platter = Platter::new(&self.recording.start, rules);
            for cut in moments(&self.recording.ops, n / 2, rng) {
                while platter.now() < cut {
                    platter.push(&self.recording.ops[platter.now()]);
                }
                let image = platter.image(rng);
                let before = tally.faults.len();
                self.cut_at(rt, &image, cut, rules, rng, tally);
                if tally.faults.len() > before {
                    keep(&image);
                    // Is it the loss, or already so when the daemon is merely killed?
                    let mut whole = self.recording.start.clone();
                    self.recording.ops[..cut].iter().for_each(|op| whole.apply(op));
                    whole.sweep();
                    self.put(&whole);
                    let killed = self.look(rt, &self.how(&["a", "b"]), cut, false);
                    let killed = killed.map_or_else(|e| e, |_| "well".into());
                    tally.faults[before].push_str(&format!("\n    with nothing lost: {killed}"));
                    println!("{}", tally.faults[before]);
                }
                if tally.faults.len() >= 10 {
                    return;
                }
            }
        }
    }

    fn cut_at(
        &self,
        rt: &Runtime,
        image: &Disk,
        cut: usize,
        rules: Rules,
        rng: &mut ChaCha8Rng,
        tally: &mut Tally,
    ) {
        let total = self.recording.ops.len();
        let fault = |what: String| format!("{rules:?}, cut at {cut} of {total}: {what}");
        self.put(image);
        tally.cuts += 1;
        let unnamed = |r: &str| {
            let replica = self.disk.join(r);
            replica.join("segments").exists() && support::log::Log::read(&replica).groups(r).unnamed > 0
        };
        tally.in_large += usize::from(!self.alone && (unnamed("a") || unnamed("b")));
        // First without any replica, as after a storm; then the same disk with them.
        let without = self.alone || rng.random_bool(0.25);
        let has_state = image.nodes[&disk::ROOT].names.contains_key(std::ffi::OsStr::new("state"))
            && self.disk.join("state/state.json").exists();
        if without && has_state {
            // Below a file there is no folder, nor can one be made.
            fs::write(self.disk.join("x"), "").unwrap();
            let how = Open { replicas: vec![self.disk.join("x/a"), self.disk.join("x/b")], ..self.how(&[]) };
            match self.look(rt, &how, cut, !self.alone) {
                Ok((checked, _)) => tally.checked += checked,
                Err(e) => return tally.faults.push(fault(format!("without replicas: {e}"))),
            }
            tally.opened += 1;
        }
        match self.look(rt, &self.how(&["a", "b"]), cut, false) {
            Ok((checked, _)) => tally.checked += checked,
            Err(e) => return tally.faults.push(fault(e)),
        }
        tally.opened += 1;
        if !self.alone && rng.random_bool(0.2) {
            self.put(image);
            let replica = if rng.random() { "a" } else { "b" };
            match self.restore(rt, replica, cut) {
                Ok(checked) => tally.checked += checked,
                Err(e) => return tally.faults.push(fault(e)),
            }
            tally.restored += 1;
        }
        if rng.random_bool(0.15) {
            match self.again(rt, image, cut, rules, rng) {
                Ok(cuts) => tally.again += cuts,
                Err(e) => tally.faults.push(fault(e)),
            }
        }
    }
}

fn keep(image: &Disk) {
    if let Some(folder) = std::env::var_os("MIRRORFS_POWER_KEEP") {
        let folder = PathBuf::from(folder);
        fs::create_dir_all(&folder).unwrap();
        let n = fs::read_dir(&folder).unwrap().count();
        image.store(&folder.join(n.to_string()));
    }
}

fn lose_power(test: &str, plan: Plan) {
    let Some(mut v) = Volume::new(test) else { return };
    let seed = seed(test);
    let cuts = std::env::var("MIRRORFS_POWER_CUTS").map_or(CUTS, |n| n.parse().unwrap());
    let place = place();
    for name in ["a", "b"] {
        v.replica(name, place.path().join("disk").join(name).to_str().unwrap(), &[]);
    }
    v.setting("block_size = \"64KiB\"");
    v.setting(&format!("cache_size = {:?}", plan.cache));
    v.setting(&format!("commit_interval = {:?}", plan.interval));
    let started = Instant::now();
    let life = live(&v, place, seed, plan);
    let recorded = started.elapsed();
    let count = |is: fn(&Op) -> bool| life.recording.ops.iter().filter(|op| is(op)).count();
    println!(
        "{test}: {} operations recorded in {recorded:?}: {} writes, {} syncs, {} renames, {} removals",
        life.recording.ops.len(),
        count(|op| matches!(op, Op::Write { .. })),
        count(|op| matches!(op, Op::Sync { .. })),
        count(|op| matches!(op, Op::Rename { .. })),
        count(|op| matches!(op, Op::Unlink { .. })),
    );
    let rt = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let mut tally = Tally::default();
    life.cut(&rt, cuts, &mut ChaCha8Rng::seed_from_u64(seed), &mut tally);
    println!(
        "{test}: {} cuts ({} in a large cut), {} openings, {} restores, {} second cuts in {:?}; {:?}; {} faults",
        tally.cuts,
        tally.in_large,
        tally.opened,
        tally.restored,
        tally.again,
        started.elapsed() - recorded,
        tally.checked,
        tally.faults.len(),
    );
    rt.shutdown_background();
    assert!(tally.faults.is_empty(), "seed {seed}:\n{}", tally.faults.join("\n"));
    assert!(
        cuts < 20 || tally.checked.required > 100 && tally.checked.exact > 1 << 20,
        "hardly anything was compared"
    );
}

#[test]
fn what_was_synced_survives_a_power_loss() {
    let part = Duration::from_millis(900);
    lose_power("power loss", Plan { cache: "16MiB", interval: "300ms", alone: false, part });
}

#[test]
fn what_was_synced_survives_a_power_loss_with_nothing_shipped() {
    let part = Duration::from_millis(800);
    lose_power("power loss, alone", Plan { cache: "1GiB", interval: "1h", alone: true, part });
}
