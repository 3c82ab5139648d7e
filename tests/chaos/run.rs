//! One seed: episodes of operations while replicas misbehave and the daemon is killed, then the proof that all is well.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use mirrorfs::replica::fault::Objects;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::files::{Did, Files};
use crate::harm;
use crate::model::{Model, Picture};
use crate::world::{PATIENCE, World};

/// Whether somebody looks for damage to what replicas hold.
const REPAIRED: bool = true;

/// How often what happened, over all seeds.
pub type Counts = BTreeMap<&'static str, u64>;

/// A run.
pub struct Run {
    rng: ChaCha8Rng,
    world: World,
    model: Model,
    /// The replica whose objects stay as they are.
    keeper: usize,
    /// What replicas held at some moment.
    past: Vec<Objects>,
    /// Whether anything was wrong with replicas since they were all equal.
    troubled: bool,
    log: VecDeque<String>,
    pub counts: Counts,
}

impl Run {
    pub fn new(seed: u64) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let replicas = rng.random_range(2..=3);
        let keeper = rng.random_range(0..replicas);
        Self {
            world: World::new(seed, replicas),
            model: Model::default(),
            keeper,
            past: vec![Objects::new(); replicas],
            troubled: false,
            log: VecDeque::new(),
            counts: Counts::new(),
            rng,
        }
    }

    /// Everything.
    pub fn run(&mut self) {
        for _ in 0..self.rng.random_range(2..=5) {
            self.episode();
        }
        self.prove();
    }

    fn say(&mut self, what: &'static str, more: String) {
        *self.counts.entry(what).or_default() += 1;
        if self.log.len() == 60 {
            self.log.pop_front();
        }
        self.log.push_back(format!("{what} {more}"));
    }

    fn once_in(&mut self, n: u32) -> bool {
        self.rng.random_ratio(1, n)
    }

    fn episode(&mut self) {
        for i in 0..self.world.sites.len() {
            if self.once_in(2) {
                let how = harm::sicken(&self.world.sites[i], &mut self.rng);
                self.troubled = true;
                self.say(how, format!("r{i}"));
            }
        }
        for _ in 0..self.rng.random_range(8..24) {
            self.files(|files| files.step());
            self.event();
        }
        if self.once_in(3) {
            self.stop();
        }
        self.heal();
        if self.once_in(2) {
            // So that staged files go, and what is read next comes from replicas.
            self.world.seal();
            if self.world.converge(Duration::from_millis(1500)) {
                self.say("converged meanwhile", String::new());
                self.troubled = false;
                if self.once_in(2) {
                    // Staged files go a moment later.
                    std::thread::sleep(Duration::from_millis(250));
                    self.world.core().blocks.drop_all_clean();
                }
            }
        }
    }

    fn heal(&mut self) {
        self.world.sites.iter().for_each(|s| s.faults.clear());
        self.say("healed", String::new());
    }

    /// Runs operations.
    fn files(&mut self, work: impl FnOnce(&mut Files<'_>) -> (&'static str, Did)) {
        let (vfs, model, rng) = (&self.world.core().vfs, &mut self.model, &mut self.rng);
        let (what, did) = work(&mut Files { vfs, model, rng });
        assert_eq!(self.world.core().vfs.read_only(), None, "the volume turned read-only");
        if did == Did::Unreadable {
            assert!(self.troubled, "{what} fails though all replicas are well:\n{}", self.world.told());
            self.say("unreadable", what.to_owned());
        }
        self.say(what, String::new());
    }

    /// What happens between operations.
    fn event(&mut self) {
        match self.rng.random_range(0..24) {
            0 | 1 => {
                self.say("drop_clean", String::new());
                self.world.core().blocks.drop_all_clean();
            }
            2 => {
                let sealed = self.world.try_seal();
                self.say(if sealed { "seal" } else { "seal fails" }, String::new());
            }
            3..6 => std::thread::sleep(Duration::from_millis(self.rng.random_range(1..40))),
            6 => {
                let i = self.rng.random_range(0..self.past.len());
                let (objects, keeper) = (self.world.sites[i].memory.objects(), self.kept());
                if harm::is_plain(&objects, &keeper) {
                    self.past[i] = objects;
                }
            }
            7 if REPAIRED => self.harm(),
            8 => self.heal(),
            _ => {}
        }
    }

    /// What the keeper holds.
    fn kept(&self) -> Objects {
        self.world.sites[self.keeper].memory.objects()
    }

    /// Damages a replica that is not the keeper.
    fn harm(&mut self) {
        let others: Vec<_> = (0..self.past.len()).filter(|i| *i != self.keeper).collect();
        let i = *others.choose(&mut self.rng).unwrap();
        let keeper = self.kept();
        let how = harm::damage(&self.world.sites[i], &self.past[i], &keeper, REPAIRED, &mut self.rng);
        self.troubled = true;
        self.say(how, format!("r{i}"));
    }

    /// Ends the daemon, one way or another, and starts it again.
    fn stop(&mut self) {
        match self.rng.random_range(0..5) {
            0 => {
                self.say("restart", String::new());
                // Content that only the keeper has, and that a block needs to be sealed, would be waited for: for minutes, and in vain
                // as long as it refuses.
                self.world.sites[self.keeper].faults.clear();
                self.world.close().unwrap();
            }
            1 => {
                self.say("lost machine", String::new());
                self.lose_machine();
                return;
            }
            _ => {
                self.say("kill", String::new());
                self.world.core().vfs.commit().unwrap();
                if self.once_in(2) {
                    let (vfs, model, rng) = (&self.world.core().vfs, &mut self.model, &mut self.rng);
                    Files { vfs, model, rng }.junk();
                }
                self.world.kill();
            }
        }
        if self.once_in(4) {
            self.harm();
        }
        self.start();
    }

    /// Starts the daemon, at the latest when replicas are well again.
    fn start(&mut self) {
        if let Err(e) = self.world.open() {
            self.say("cannot open", e.to_string());
            self.heal();
            self.world.open().unwrap_or_else(|e| panic!("cannot open though all replicas are well: {e}"));
        }
        self.world.fsck();
        let (vfs, model, rng) = (&self.world.core().vfs, &mut self.model, &mut self.rng);
        Files { vfs, model, rng }.remove_junk();
    }

    /// Loses the local state once the keeper holds everything.
    fn lose_machine(&mut self) {
        self.heal();
        self.world.seal();
        let keeper = self.world.sites[self.keeper].name.clone();
        let core = self.world.core();
        let replica = || core.fleet.statuses().into_iter().find(|s| s.name.as_str() == keeper).unwrap();
        let until = std::time::Instant::now() + PATIENCE;
        while replica().lag_segments > 0 {
            assert!(std::time::Instant::now() < until, "the keeper never catches up:\n{}", self.world.told());
            std::thread::sleep(Duration::from_millis(2));
        }
        self.world.kill();
        self.world.lose_state();
        // A new writer wants to see all.
        self.heal();
        self.start();
    }

    /// Everything that must hold in the end.
    fn prove(&mut self) {
        self.heal();
        self.world.seal();
        self.world.scrub();
        assert!(self.world.converge(PATIENCE), "replicas do not converge:\n{}", self.world.told());
        self.say("converged", String::new());
        self.world.core().blocks.drop_all_clean();
        let picture = Picture::take(&self.world.core().vfs).unwrap();
        self.model.assert_shown(&picture);
        self.world.assert_same_segments();
        self.world.fsck();
        self.world.close().unwrap();
        for i in 0..self.world.sites.len() {
            let alone = self.world.alone(i, |core| Picture::take(&core.vfs).unwrap());
            picture.assert_same(&alone, &format!("r{i} alone"));
        }
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let log: Vec<_> = self.log.iter().map(String::as_str).collect();
            eprintln!("--- the last that happened:\n{}\n---", log.join("\n"));
        }
    }
}
