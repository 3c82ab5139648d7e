//! Several threads at once on the same few names, with cuts, seals and kills in between: afterwards all tables must be
//! consistent, every sealed state too, and no sector torn.
//!
//! What the threads do is random, what comes of it is not known; only what must always hold is checked. Every write is of
//! whole sectors that repeat one word, so that a mixed sector shows.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use mirrorfs::ids::Ino;
use mirrorfs::vfs::Vfs;
use mirrorfs::vfs::api::FileSystem;
use mirrorfs::vfs::types::{Caller, Fallocate, FileKind, RenameMode, SetAttr, VfsError, Wait, XattrMode};
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::check;
use crate::world::{BLOCK_SIZE, Setup, World};

const THREADS: u64 = 4;
const NAMES: [&[u8]; 5] = [b"a", b"b", b"c", b"d", b"e"];
const SECTOR: u64 = 512;
const ROUND: Duration = Duration::from_millis(1200);

/// One thread's view: what it refers to and has open, as the kernel would for it.
struct Worker {
    vfs: Arc<Vfs>,
    rng: ChaCha8Rng,
    held: Vec<(Ino, FileKind)>,
    opened: Vec<Ino>,
    done: u64,
    killed: bool,
}

impl Worker {
    fn name(&mut self) -> &'static [u8] {
        NAMES.choose(&mut self.rng).unwrap()
    }

    fn pick(&mut self, f: impl Fn(FileKind) -> bool) -> Option<Ino> {
        let all: Vec<Ino> = self.held.iter().filter(|h| f(h.1)).map(|h| h.0).collect();
        all.choose(&mut self.rng).copied()
    }

    fn dir(&mut self) -> Ino {
        self.pick(|k| k == FileKind::Directory).unwrap_or(Ino::ROOT)
    }

    fn file(&mut self) -> Ino {
        match self.opened.choose(&mut self.rng) {
            Some(ino) if self.rng.random() => *ino,
            _ => self.pick(|k| k == FileKind::Regular).unwrap_or(Ino::ROOT),
        }
    }

    fn sectors(&mut self, most: u64) -> u64 {
        self.rng.random_range(0..most) * SECTOR
    }

    /// Refusals that follow from what others do are fine; anything else is not.
    fn note<T>(&mut self, answer: Result<T, VfsError>) -> Option<T> {
        match answer {
            Ok(value) => Some(value),
            Err(VfsError::Io(e)) => panic!("{e}"),
            Err(VfsError::ReadOnly(_)) => {
                self.killed = true;
                None
            }
            Err(_) => None,
        }
    }

    fn check(&self, ino: Ino, bytes: &[u8]) {
        for (i, sector) in bytes.chunks(SECTOR as usize).enumerate() {
            let first = &sector[..8.min(sector.len())];
            assert!(
                sector.chunks(8).all(|w| w == &first[..w.len()]),
                "sector {i} of a read of {ino} is torn"
            );
        }
    }

    fn step(&mut self) {
        self.done += 1;
        let vfs = Arc::clone(&self.vfs);
        let caller = Caller::default();
        match self.rng.random_range(0..40) {
            0..4 => {
                let (dir, name) = (self.dir(), self.name());
                let made = vfs.create(dir, name, 0o644, &caller);
                if let Some(attr) = self.note(made) {
                    self.held.push((attr.ino, attr.kind));
                    self.opened.push(attr.ino);
                }
            }
            4 => {
                let (dir, name) = (self.dir(), self.name());
                let made = vfs.mkdir(dir, name, 0o755, &caller);
                if let Some(attr) = self.note(made) {
                    self.held.push((attr.ino, attr.kind));
                }
            }
            5..8 => {
                let (dir, name) = (self.dir(), self.name());
                let found = vfs.lookup(dir, name);
                if let Some(attr) = self.note(found) {
                    self.held.push((attr.ino, attr.kind));
                }
            }
            8..11 => {
                let (dir, name) = (self.dir(), self.name());
                let gone = vfs.unlink(dir, name);
                self.note(gone);
            }
            11 => {
                let (dir, name) = (self.dir(), self.name());
                let gone = vfs.rmdir(dir, name);
                self.note(gone);
            }
            12..15 => {
                let (from, name, to, new_name) = (self.dir(), self.name(), self.dir(), self.name());
                let mode = *[RenameMode::Replace, RenameMode::NoReplace, RenameMode::Exchange]
                    .choose(&mut self.rng)
                    .unwrap();
                let moved = vfs.rename(from, name, to, new_name, mode);
                self.note(moved);
            }
            15 => {
                let (ino, dir, name) = (self.file(), self.dir(), self.name());
                let linked = vfs.link(ino, dir, name);
                if let Some(attr) = self.note(linked) {
                    self.held.push((attr.ino, attr.kind));
                }
            }
            16..22 => {
                let (ino, at) = (self.file(), self.sectors(700));
                let len = self.sectors(200) + SECTOR;
                let word = self.rng.random::<u64>().to_le_bytes();
                let data: Vec<u8> = word.iter().copied().cycle().take(len as usize).collect();
                let written = vfs.write(ino, at, &data, Wait::Yes);
                self.note(written);
            }
            22..27 => {
                let (ino, at) = (self.file(), self.sectors(700));
                let read = vfs.read(ino, at, 100 << 10, Wait::Yes);
                if let Some(bytes) = self.note(read) {
                    self.check(ino, &bytes);
                }
            }
            27 | 28 => {
                let (ino, size) = (self.file(), self.sectors(600));
                let set = SetAttr { size: Some(size), ..SetAttr::default() };
                let cut = vfs.setattr(ino, &set, &caller);
                self.note(cut);
            }
            29 => {
                let (ino, at, len) = (self.file(), self.sectors(600), self.sectors(300) + SECTOR);
                let how = *[Fallocate::PunchHole, Fallocate::ZeroRange, Fallocate::Allocate]
                    .choose(&mut self.rng)
                    .unwrap();
                let punched = vfs.fallocate(ino, how, at, len, Wait::Yes);
                self.note(punched);
            }
            30..33 => {
                let (from, to) = (self.file(), self.file());
                let aligned = self.rng.random();
                let mut place = || {
                    let at = self.sectors(600);
                    if aligned { at / u64::from(BLOCK_SIZE) * u64::from(BLOCK_SIZE) } else { at }
                };
                let (at, then) = (place(), place());
                let len = self.sectors(600);
                let copied = vfs.copy_file_range(from, at, to, then, len, Wait::Yes);
                self.note(copied);
            }
            33 => {
                let ino = self.file();
                let opened = vfs.open(ino, true, self.rng.random_ratio(1, 4));
                if self.note(opened).is_some() {
                    self.opened.push(ino);
                }
            }
            34 | 35 => {
                if let Some(i) =
                    (!self.opened.is_empty()).then(|| self.rng.random_range(0..self.opened.len()))
                {
                    let ino = self.opened.swap_remove(i);
                    let flushed = vfs.flush(ino);
                    self.note(flushed);
                    vfs.release(ino);
                }
            }
            36 => {
                if let Some(i) = (!self.held.is_empty()).then(|| self.rng.random_range(0..self.held.len())) {
                    // Opens are given back before the last reference, as the kernel does.
                    let (ino, _) = self.held[i];
                    let last = self.held.iter().filter(|h| h.0 == ino).count() == 1;
                    if !(last && self.opened.contains(&ino)) {
                        self.held.swap_remove(i);
                        vfs.forget(ino, 1);
                    }
                }
            }
            37 => {
                let ino = self.file();
                let set = vfs.setxattr(ino, b"user.x", &self.done.to_le_bytes(), XattrMode::Any);
                self.note(set);
            }
            38 => {
                let dir = self.dir();
                let mut found = Vec::new();
                let listed = vfs.readdir(dir, 2, true, &mut |item| {
                    found.push((item.ino, item.kind));
                    true
                });
                self.note(listed);
                self.held.extend(found);
            }
            _ => {
                let ino = self.file();
                let synced = vfs.fsync(ino, false, Wait::Yes);
                self.note(synced);
            }
        }
        while self.held.len() > 60 {
            let i = self.rng.random_range(0..self.held.len());
            let (ino, _) = self.held[i];
            if self.opened.contains(&ino) {
                if let Some(at) = self.opened.iter().position(|o| *o == ino) {
                    self.opened.swap_remove(at);
                    vfs.release(ino);
                }
                continue;
            }
            self.held.swap_remove(i);
            vfs.forget(ino, 1);
        }
    }

    fn leave(mut self) -> u64 {
        for ino in self.opened.drain(..) {
            self.vfs.release(ino);
        }
        for (ino, _) in self.held.drain(..) {
            self.vfs.forget(ino, 1);
        }
        self.done
    }
}

/// Cuts and seals while the threads run; every sealed state must be consistent.
fn cut_until(world: &mut World, end: Instant, rng: &mut ChaCha8Rng) {
    while Instant::now() < end {
        world.clock.fetch_add(1, Ordering::SeqCst);
        let cut = world.cut();
        if rng.random() {
            std::thread::sleep(Duration::from_millis(rng.random_range(0..30)));
        }
        world.seal(&cut).unwrap();
        check::consistent(&world.replay.tables, BLOCK_SIZE);
        if rng.random_ratio(1, 4) {
            world.stack().blocks.drop_all_clean();
        }
        if rng.random_ratio(1, 3) {
            world.vfs().commit().unwrap();
        }
    }
}

/// Checks the local tables and what the memory says of them. All threads are gone.
fn check_all(world: &mut World) {
    world.vfs().wait_reaped();
    let cut = world.cut();
    world.seal(&cut).unwrap();
    world.vfs().commit().unwrap();
    let stack = world.stack();
    let tables = check::dump(&stack.journal);
    let decoded = check::consistent(&tables, BLOCK_SIZE);
    check::fsck(&tables, &decoded, BLOCK_SIZE);
    check::derived(&tables, &decoded);
    assert!(decoded.orphans.is_empty(), "orphans that nobody refers to: {:?}", decoded.orphans);
    assert!(decoded.dirty.is_empty(), "dirty blocks behind the last seal");
    assert_eq!(stack.blocks.counts().1, 0);
    assert_eq!(stack.blocks.space.dirty(), 0, "bytes of dirty blocks");
    assert_eq!((stack.blocks.counts().0, stack.blocks.space.clean()), check::cached(&tables));
    assert_eq!(stack.vfs.pending_files(), 0);
    // The replica says the same.
    let sealed = check::consistent(&world.replay.tables, BLOCK_SIZE);
    check::fsck(&world.replay.tables, &sealed, BLOCK_SIZE);
    assert_eq!(sealed.inodes, decoded.inodes);
    assert_eq!(sealed.dirents, decoded.dirents);
    assert_eq!(sealed.extents, decoded.extents);
    assert_eq!(sealed.blocks, decoded.blocks);
}

pub fn run(seed: u64, rounds: u32) {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut world = World::new(Setup { limit: 64 << 20, space_wait: Duration::from_secs(20) });
    let mut counts: HashMap<&str, u64> = HashMap::new();
    for round in 0..rounds {
        let stop = Arc::new(AtomicBool::new(false));
        let running = Arc::new(AtomicU64::new(THREADS));
        let (sender, receiver) = mpsc::channel();
        let threads: Vec<_> = (0..THREADS)
            .map(|n| {
                let worker = Worker {
                    vfs: Arc::clone(world.vfs()),
                    rng: ChaCha8Rng::seed_from_u64(seed ^ (u64::from(round) << 8 | n)),
                    held: Vec::new(),
                    opened: Vec::new(),
                    done: 0,
                    killed: false,
                };
                let (stop, running, sender) = (Arc::clone(&stop), Arc::clone(&running), sender.clone());
                std::thread::spawn(move || {
                    let mut worker = worker;
                    while !stop.load(Ordering::Relaxed) && !worker.killed {
                        worker.step();
                    }
                    let done = worker.leave();
                    running.fetch_sub(1, Ordering::SeqCst);
                    let _ = sender.send(done);
                })
            })
            .collect();
        cut_until(&mut world, Instant::now() + ROUND, &mut rng);
        let kill = round % 2 == 1;
        if kill {
            world.stack().journal.poison("killed by the test");
        }
        stop.store(true, Ordering::Relaxed);
        for _ in 0..THREADS {
            match receiver.recv_timeout(Duration::from_secs(60)) {
                Ok(done) => *counts.entry("operations").or_default() += done,
                Err(_) => {
                    let stuck = running.load(Ordering::SeqCst);
                    // A thread that panicked has said why; one that hangs would hang the test.
                    assert!(threads.iter().any(|t| t.is_finished()), "{stuck} threads hang: a deadlock");
                    panic!("{stuck} threads failed or hang");
                }
            }
        }
        threads.into_iter().for_each(|t| t.join().unwrap());
        if kill {
            world.crash(rng.random());
        }
        check_all(&mut world);
        if round % 3 == 2 {
            world.restore();
            check_all(&mut world);
        }
    }
    println!("threads: {counts:?}, {} fetched", world.source.fetched.load(Ordering::Relaxed));
}
