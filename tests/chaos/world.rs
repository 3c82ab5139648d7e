//! One volume with replicas in memory: the whole daemon but for the mount, in a temporary folder.
//!
//! Owns opening, killing, losing and closing it, and what replicas hold. Knows nothing of files.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use mirrorfs::config::{Config, Env, Layer, Raw};
use mirrorfs::daemon::{Core, CoreOptions, Error, Takeover};
use mirrorfs::fsck::Input;
use mirrorfs::reconcile::{ScrubRequest, ScrubStatus};
use mirrorfs::replica::fault::{Faults, Memory, Objects};
use mirrorfs::replica::{Limits, ReplicaState, Tuning};
use tokio::runtime::Runtime;

/// How long anything may take that works at all.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// A replica as the test holds it.
pub struct Site {
    pub name: String,
    pub memory: Memory,
    pub faults: Faults,
}

/// The volume.
pub struct World {
    dir: tempfile::TempDir,
    pub sites: Vec<Site>,
    runtime: Option<Runtime>,
    core: Option<Core>,
    /// How many machines were lost.
    states: u32,
}

impl World {
    pub fn new(seed: u64, replicas: usize) -> Self {
        let sites = (0..replicas).map(|i| Site {
            name: format!("r{i}"),
            memory: Memory::new(),
            faults: Faults::new(seed.wrapping_add(i as u64)),
        });
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
        let mut world = Self {
            dir: scratch(),
            sites: sites.collect(),
            runtime: Some(runtime.unwrap()),
            core: None,
            states: 0,
        };
        world.open().unwrap();
        world
    }

    pub fn core(&self) -> &Core {
        self.core.as_ref().unwrap()
    }

    pub fn runtime(&self) -> &Runtime {
        self.runtime.as_ref().unwrap()
    }

    fn state(&self) -> PathBuf {
        self.dir.path().join(format!("state-{}", self.states))
    }

    /// Opens the volume with the local state as it is.
    pub fn open(&mut self) -> Result<(), Error> {
        assert!(self.core.is_none());
        let config = self.config(&self.state(), |_| true, false);
        let core = Core::open(&config, self.runtime(), self.options(true), std::future::pending())?;
        self.core = Some(core);
        Ok(())
    }

    /// Ends the daemon as a kill would. The local state stays as it is.
    pub fn kill(&mut self) {
        if let Some(core) = self.core.take() {
            core.abandon();
        }
    }

    /// Ends the daemon in order, waiting for no replica.
    pub fn close(&mut self) -> Result<(), Error> {
        self.core.take().map_or(Ok(()), |core| core.close(std::future::ready(())))
    }

    /// Loses the local state; the volume must be closed or killed.
    pub fn lose_state(&mut self) {
        assert!(self.core.is_none());
        std::fs::remove_dir_all(self.state()).unwrap();
        self.states += 1;
    }

    /// Opens the volume read-only from one replica alone, without faults and local state, and shows it.
    pub fn alone<T>(&self, site: usize, look: impl FnOnce(&Core) -> T) -> T {
        let name = self.sites[site].name.clone();
        let state = self.dir.path().join(format!("alone-{name}"));
        let config = self.config(&state, |n| n == name, true);
        let core = Core::open(&config, self.runtime(), self.options(false), std::future::pending());
        let core = core.unwrap_or_else(|e| panic!("{name} alone: {e}"));
        let seen = look(&core);
        core.abandon();
        drop(core);
        let _ = std::fs::remove_dir_all(state);
        seen
    }

    fn config(&self, state: &Path, with: impl Fn(&str) -> bool, read_only: bool) -> Config {
        let mut flags = Layer::default();
        flags.set("state", state.to_str().unwrap(), "test");
        flags.set("block_size", "64KiB", "test");
        flags.set("cache_size", "64MiB", "test");
        flags.set("commit_interval", "100ms", "test");
        flags.set("read_timeout", "1s", "test");
        flags.set("check_interval", "1s", "test");
        flags.set("scrub_interval", "2s", "test");
        flags.set("read_only", if read_only { "true" } else { "false" }, "test");
        for site in self.sites.iter().filter(|s| with(&s.name)) {
            // The place is not used: stores are made by name.
            let place = self.dir.path().join("places").join(&site.name);
            flags.add_replica(&format!("{}={}", site.name, place.display()), "test", self.dir.path());
        }
        let raw = Raw { flags, ..Raw::default() };
        Config::load(&raw, &Env { vars: BTreeMap::new(), cwd: self.dir.path().to_owned() }).unwrap()
    }

    fn options(&self, faulty: bool) -> CoreOptions {
        let sites: BTreeMap<String, (Memory, Faults)> = self
            .sites
            .iter()
            .map(|s| {
                (s.name.clone(), (s.memory.clone(), if faulty { s.faults.clone() } else { Faults::new(0) }))
            })
            .collect();
        let limits =
            Limits { call: Duration::from_millis(if faulty { 150 } else { 20_000 }), ..Limits::default() };
        CoreOptions {
            stores: Arc::new(move |spec| {
                let (memory, faults) = &sites[spec.name.as_str()];
                Ok(memory.store(spec.name.clone(), limits, faults))
            }),
            shipping: Tuning {
                fence_every: Duration::from_millis(30),
                foreign_every: Duration::from_millis(200),
                source_every: Duration::from_millis(200),
                recheck_every: Duration::from_millis(200),
                ..Tuning::default()
            },
            attention: (Duration::from_millis(50), Duration::from_millis(100)),
            checkpoint_after: 3000,
            // Most cuts are large ones then, which go in several groups.
            segments_of: 3000,
            // The machine that had it is gone.
            takeover: match self.states > 0 && !self.state().join("state.json").exists() {
                true => Takeover::Yes,
                false => Takeover::No,
            },
        }
    }

    /// Seals what there is; replicas must be well.
    pub fn seal(&self) {
        let sealed = self.core().seal(Instant::now() + PATIENCE);
        sealed.unwrap_or_else(|e| panic!("{e}\n{}", self.told()));
    }

    /// Seals if that is possible soon: what was partly overwritten may have to come from a replica that does not answer.
    pub fn try_seal(&self) -> bool {
        self.core().seal(Instant::now() + Duration::from_millis(300)).is_ok()
    }

    /// Whether every replica is well and holds everything that is sealed.
    fn is_converged(&self) -> bool {
        let statuses = self.core().fleet.statuses();
        let newest = statuses.iter().map(|s| s.cursor).max().unwrap_or_default();
        statuses.iter().all(|s| s.cursor == newest && s.lag_segments == 0 && s.state == ReplicaState::Healthy)
    }

    /// Waits until every replica holds everything, at most for `patience`. Answers whether that is so.
    pub fn converge(&self, patience: Duration) -> bool {
        let until = Instant::now() + patience;
        while !self.is_converged() {
            if Instant::now() > until {
                return false;
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        true
    }

    /// Has everything on every replica read and mended, until nothing is found any more; at most for [`PATIENCE`].
    pub fn scrub(&self) {
        let reconciler = self.core().reconciler.as_ref().unwrap();
        let until = Instant::now() + PATIENCE;
        let mut found = Vec::new();
        loop {
            reconciler.begin(&ScrubRequest { deep: true, ..ScrubRequest::default() }).unwrap();
            let passes = loop {
                let passes = reconciler.status();
                if passes.iter().all(|p| p.done == p.asked) {
                    break passes;
                }
                assert!(
                    Instant::now() < until,
                    "scrubs do not end: {passes:#?}\n{found:#?}\n{}\n{}",
                    self.told(),
                    self.differing()
                );
                std::thread::sleep(Duration::from_millis(2));
            };
            // What only one replica had cannot be mended. A checkpoint is but a shortcut for restores, and a release says something only to
            // the next writer.
            let is_extra =
                |object: &str| object.starts_with("checkpoints/") || object.ends_with(".released.json");
            let is_harmless = |p: &ScrubStatus| {
                p.findings.iter().all(|f| is_extra(&f.object) && f.outcome.starts_with("left"))
            };
            let is_clean = |p: &ScrubStatus| {
                p.last.as_ref().is_some_and(|l| {
                    let c = l.counters;
                    l.deep && l.error.is_none() && (c.bad == 0 || c.bad == c.left && is_harmless(p))
                })
            };
            if passes.iter().all(is_clean) {
                return;
            }
            found = passes.iter().flat_map(|p| p.findings.clone()).collect();
            assert!(Instant::now() < until, "scrubs mend not everything: {passes:#?}\n{}", self.told());
        }
    }

    /// Objects that are not the same on the first replica and another, for messages.
    fn differing(&self) -> String {
        let first = self.sites[0].memory.objects();
        let others = self.sites[1..].iter().flat_map(|site| {
            let objects = site.memory.objects();
            let paths: BTreeSet<_> = first.keys().chain(objects.keys()).collect();
            let differs = paths.into_iter().filter(|p| first.get(*p) != objects.get(*p));
            let text = |found: Option<&bytes::Bytes>| found.map(|b| String::from_utf8_lossy(b).into_owned());
            differs
                .map(|p| {
                    format!("{}: {p}: {:?}, {:?}\n", site.name, text(first.get(p)), text(objects.get(p)))
                })
                .collect::<Vec<_>>()
        });
        others.collect()
    }

    /// How the replicas do, for messages.
    pub fn told(&self) -> String {
        let statuses = self.core().fleet.statuses();
        let one = |s: &mirrorfs::replica::ReplicaStatus| {
            let why = s.last_error.as_ref().map_or("", |e| e.text.as_str());
            format!("{}: {:?}, cursor {}, lacks {}; {why}", s.name, s.state, s.cursor, s.lag_segments)
        };
        statuses.iter().map(one).collect::<Vec<_>>().join("\n")
    }

    /// Fails, with words, where the local tables contradict each other. Nothing waits for it.
    pub fn fsck(&self) {
        let snapshot = self.core().vfs.journal().snapshot();
        let input = Input {
            source: &snapshot,
            block_size: self.core().volume.block_size,
            segments: None,
            slots_len: None,
            last_lsn: Some(snapshot.lsn()),
            cancelled: &|| false,
        };
        assert_eq!(mirrorfs::fsck::lines(&input).unwrap(), Vec::<String>::new(), "fsck");
    }

    /// Fails, with words, where two replicas hold different segments. Where a later writer took a number, the earlier one's segment
    /// is not part of the volume.
    pub fn assert_same_segments(&self) {
        let valid = |site: &Site| -> Objects {
            let mut newest: BTreeMap<String, (String, bytes::Bytes)> = BTreeMap::new();
            for (path, body) in site.memory.objects() {
                if let Some((number, _epoch)) =
                    path.strip_prefix("segments/").and_then(|p| p.rsplit_once('-'))
                {
                    // In order of epochs: the last one stays.
                    newest.insert(number.to_owned(), (path.clone(), body));
                }
            }
            newest.into_values().collect()
        };
        let first = valid(&self.sites[0]);
        for site in &self.sites[1..] {
            let other = valid(site);
            let (a, b): (Vec<_>, Vec<_>) = (first.keys().collect(), other.keys().collect());
            assert_eq!(a, b, "segments on r0 and {}", site.name);
            let differing: Vec<_> = first.iter().filter(|(k, v)| other[*k] != **v).map(|(k, _)| k).collect();
            assert!(differing.is_empty(), "r0 and {} differ in {differing:?}", site.name);
        }
    }
}

impl Drop for World {
    fn drop(&mut self) {
        self.kill();
        if let Some(runtime) = self.runtime.take() {
            // What hangs for ever hangs in there.
            runtime.shutdown_background();
        }
    }
}

/// A folder in memory where there is one: what is tested here is order and content, not a disk's syncs.
fn scratch() -> tempfile::TempDir {
    let memory = Path::new("/dev/shm");
    match memory.is_dir() {
        true => tempfile::tempdir_in(memory).or_else(|_| tempfile::tempdir()),
        false => tempfile::tempdir(),
    }
    .unwrap()
}
