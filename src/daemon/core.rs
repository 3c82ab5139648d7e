//! A volume that is open and at work, without a mount: its local state, sealing, shipping, and the end of it all in order.
//!
//! Owns the order in which the parts start and stop. `serve` puts a mount before it; tests use it as it is.
//!
//! Order at the end: pending changes committed → last group sealed → shipped as far as time allows → tenure released where all is →
//! shippers told to end → journal closed → lock released. Whatever is not shipped then waits in the state folder for the next time.

use std::path::Path;
use std::sync::atomic::AtomicU64;
use std::sync::mpsc;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tokio::runtime::{Handle, Runtime};
use tokio::sync::watch;
use tokio::task::JoinSet;

use super::catalog::Tables;
use super::checkpoints::{Checkpoints, LEAST_LOG, LEAST_SEGMENTS};
use super::fleet::{Fleet, FleetParts, Shipping};
use super::members::{self, Members};
use super::parts::{self, Parts};
use super::state::StateDir;
use super::tenure::Tenure;
use super::{Error, Takeover, open, unix_now, wall_clock};
use crate::cache::BlockStore;
use crate::config::settings::Settings;
use crate::config::{Config, Fsync};
use crate::exit::Exit;
use crate::format::volume::{Compression, Volume};
use crate::ids::{Epoch, Lsn, SegmentNo};
use crate::journal::Journal;
use crate::reconcile::{self, Reconciler};
use crate::replica::{self, Fence, FrameSource, Identity, Reader, Replica, ReplicaSpec, Store, Tuning};
use crate::txg::{CutSource, Engine, EngineOptions, SEGMENT_TARGET, Sealer, Staging};
use crate::vfs::types::VfsError;
use crate::vfs::{self, Durability, Vfs};

/// How often pending changes are committed locally.
const COMMIT_EVERY: Duration = Duration::from_secs(1);
/// Threads that fetch ahead: as many requests are under way for sequential readers. With 16 the last measurement was slower.
const PREFETCH: usize = 8;
/// Dirty bytes that end a transaction group before its time, in blocks that are mostly new.
const GROUP_BYTES: u64 = 16 << 20;
/// And in others.
const SPARSE_GROUP_BYTES: u64 = 256 << 20;
/// How long the last group may take at the end; what is not sealed then is sealed at the next mount.
const LAST_SEAL: Duration = Duration::from_secs(120);
/// How long tasks may take to end.
const LAST_TASKS: Duration = Duration::from_secs(5);
const INTERRUPTED: &str = "interrupted before the mount was live";
/// Why nothing can be written in a mount that was made read-only.
pub const MOUNTED_READ_ONLY: &str = "mounted read-only";
/// zstd level of frames.
const LEVEL: i32 = 1;

/// Makes the store of a replica.
pub type StoreMaker = Arc<dyn Fn(&ReplicaSpec) -> Result<Store, Error> + Send + Sync>;

/// How to open a volume, beside its configuration. All but the first is for tests.
#[derive(Clone)]
pub struct CoreOptions {
    /// See [`super::MountArgs::takeover`].
    pub takeover: Takeover,
    /// Makes the stores.
    pub stores: StoreMaker,
    /// Times and sizes of shippers.
    pub shipping: Tuning,
    /// Least time between two looks at a replica that something met elsewhere calls for, and the wait before one that failed is
    /// tried again.
    pub attention: (Duration, Duration),
    /// Bytes of log before which no checkpoint is due.
    pub checkpoint_after: u64,
    /// Bytes of a full segment.
    pub segments_of: u64,
}

impl Default for CoreOptions {
    fn default() -> Self {
        let make = |spec: &ReplicaSpec| {
            spec.store().map_err(|e| Error::new(Exit::Usage, format!("replica {}: {e}", spec.name)))
        };
        Self {
            takeover: Takeover::No,
            stores: Arc::new(make),
            shipping: Tuning::default(),
            attention: (Duration::from_secs(60), Duration::from_secs(10)),
            checkpoint_after: LEAST_LOG,
            segments_of: SEGMENT_TARGET,
        }
    }
}

/// Variable with the bytes of a full segment, for tests of the program itself: a large cut would have to be large otherwise.
const TEST_SEGMENT: &str = "MIRRORFS_TEST_SEGMENT";

impl CoreOptions {
    /// As by default, with what the environment says for tests.
    #[must_use]
    pub(super) fn with_test_settings() -> Self {
        let mut options = Self::default();
        if let Some(bytes) = std::env::var(TEST_SEGMENT).ok().and_then(|v| v.parse().ok()) {
            log::warn!("segments are closed at {bytes} bytes, because {TEST_SEGMENT} is set");
            options.segments_of = bytes;
        }
        options
    }
}

/// An open volume.
pub struct Core {
    /// Its identity.
    pub volume: Volume,
    /// The writer's tenure; 0 in a read-only mount.
    pub epoch: Epoch,
    /// What a person should know of the opening.
    pub notes: Vec<String>,
    /// Files and directories.
    pub vfs: Arc<Vfs>,
    /// Local content.
    pub blocks: Arc<BlockStore>,
    /// Replicas.
    pub fleet: Arc<Fleet>,
    pub(super) state: StateDir,
    pub(super) started_at: f64,
    /// The last sealed change when it was opened.
    pub(super) opened_at: Lsn,
    pub(super) fsync: &'static str,
    pub(super) settings: Settings,
    pub(super) journal: Arc<Journal>,
    /// None in a read-only mount.
    pub(super) engine: Option<Arc<Engine>>,
    /// Looks after the replicas; none in a read-only mount.
    pub reconciler: Option<Arc<Reconciler>>,
    /// None in a read-only mount.
    pub(super) tenure: Option<Tenure>,
    handle: Handle,
    closing: watch::Sender<bool>,
    tasks: Mutex<JoinSet<()>>,
    stop_commits: mpsc::Sender<()>,
}

/// fsync's way to the replicas.
struct RemoteFsync {
    vfs: Weak<Vfs>,
    engine: Arc<Engine>,
    fleet: Arc<Fleet>,
    identity: Arc<Identity>,
    fence: Arc<Fence>,
    level: Fsync,
    timeout: Duration,
    handle: Handle,
}

impl Durability for RemoteFsync {
    fn replicate(&self) -> Result<(), VfsError> {
        self.refuse_fenced()?;
        let deadline = Instant::now() + self.timeout;
        let segment = self.engine.sync(deadline).map_err(VfsError::TimedOut)?;
        // Stored, and behind that no other writer seen: whoever takes over now finds it.
        let needed = |of| self.level.needed(of);
        let confirm = replica::confirm(&self.fleet.roster, &self.identity, &self.fence, segment, needed);
        let left = deadline.saturating_duration_since(Instant::now());
        match self.handle.block_on(async { tokio::time::timeout(left, confirm).await }) {
            Ok(Ok(())) => self.refuse_fenced(),
            Ok(Err(fenced)) => Err(VfsError::ReadOnly(fenced.to_string())),
            Err(_) => {
                let why = self.fleet.lacking(segment);
                log::warn!("an fsync gave up after {:?}: {why}", self.timeout);
                Err(VfsError::TimedOut(why))
            }
        }
    }
}

impl RemoteFsync {
    /// A fenced mount may have nothing acknowledged: what it stores no longer counts.
    fn refuse_fenced(&self) -> Result<(), VfsError> {
        match self.vfs.upgrade().and_then(|vfs| vfs.read_only()) {
            Some(why) => Err(VfsError::ReadOnly(why)),
            None => Ok(()),
        }
    }
}

impl Core {
    /// Opens the volume of `config` (creating it, or bringing it back, as needed) and starts all that works in the background.
    /// `interrupted` breaks the opening off, which is no worse than a crash.
    pub fn open(
        config: &Config,
        runtime: &Runtime,
        options: CoreOptions,
        interrupted: impl Future<Output = ()>,
    ) -> Result<Core, Error> {
        let mut interrupted = std::pin::pin!(interrupted);
        let state = runtime.block_on(async {
            tokio::select! {
                state = StateDir::lock_when_free(&config.state) => state,
                () = &mut interrupted => Err(Error::new(Exit::Failure, INTERRUPTED)),
            }
        })?;
        let members = Members::read(state.path())?;
        let specs = members.apply(&config.replicas)?;
        let stores: Vec<Store> = specs
            .iter()
            .map(|s| Ok((options.stores)(s)?.with_patience(config.read_timeout)))
            .collect::<Result<_, Error>>()?;
        let mut local = state.read()?;
        if local.as_ref().is_some_and(|l| l.borrowed) {
            // A read-only mount built it from the replicas; they may have gone on since.
            state.clear()?;
            local = None;
        }
        let mut parts = runtime.block_on(async {
            let open = async {
                let seen = open::look(&stores, local.is_some()).await;
                let decision = open::decide(local.as_ref(), &seen, config.read_only)?;
                parts::open(config, &state, &stores, &seen, local, decision, &options.takeover).await
            };
            tokio::select! {
                parts = open => parts,
                () = &mut interrupted => Err(Error::new(Exit::Failure, INTERRUPTED)),
            }
        })?;
        if let Err(e) = crate::config::state::remember(&config.state, &specs) {
            log::warn!("cannot note the replicas in {}: {e}", config.state.display());
        }
        parts.notes.extend(members.notes(&config.replicas));
        parts.notes.extend(runtime.block_on(members::open_to_others(&config.state, &stores)));
        let journal = Arc::clone(&parts.journal);
        assemble(config, runtime.handle(), options, state, (specs, stores, members), parts).inspect_err(
            |_| {
                if let Err(e) = journal.close() {
                    log::warn!("closing the journal: {e}");
                }
            },
        )
    }

    /// Its state folder.
    #[must_use]
    pub fn state(&self) -> &Path {
        self.state.path()
    }

    /// The claims that a replica is to hold; none in a read-only mount, which knows of none.
    pub(super) fn claims(&self) -> Vec<crate::format::volume::Claim> {
        self.tenure.as_ref().map_or_else(Vec::new, |t| t.identity.claims.clone())
    }

    /// The runtime in which its tasks run.
    pub(super) fn handle(&self) -> &Handle {
        &self.handle
    }

    /// Ends the current group and waits until it is sealed. Gives the segment that covers everything changed before the call. Blocking.
    pub fn seal(&self, deadline: Instant) -> Result<SegmentNo, String> {
        let Some(engine) = &self.engine else { return Ok(self.fleet.staging.newest()) };
        loop {
            match self.vfs.commit() {
                Ok(_) => return engine.settle(deadline),
                // There is space again when replicas have taken what is staged.
                Err(VfsError::NoSpace) if Instant::now() < deadline => {
                    std::thread::sleep(Duration::from_millis(200));
                }
                Err(e) => return Err(e.to_string()),
            }
        }
    }

    /// Ends everything in order. `ship` is waited for between the last seal and the end of shipping. Blocking.
    pub fn close(&self, ship: impl Future<Output = ()>) -> Result<(), Error> {
        let _ = self.stop_commits.send(());
        self.vfs.stop_reaper();
        let mut trouble = None;
        if let Some(engine) = &self.engine {
            if let Err(e) = self.vfs.keep_accessed(true) {
                log::warn!("not all access times are kept: {e}");
            }
            let sealed = self
                .vfs
                .commit()
                .map_err(|e| e.to_string())
                .and_then(|_| engine.settle(Instant::now() + LAST_SEAL));
            // Also noted for the command that waits: soon the tables are closed.
            if let Some(text) = super::backend::refused(&self.vfs, super::backend::NAME).text() {
                log::error!("{text}");
            }
            if let Err(e) = sealed {
                log::error!("not everything is sealed; it is kept in the state folder: {e}");
                trouble = Some(Error::new(
                    Exit::Failure,
                    format!("unmounted, but not everything is sealed ({e}); mount again to go on"),
                ));
            }
            engine.stop();
            self.handle.block_on(async {
                ship.await;
                if let Some(reconciler) = &self.reconciler {
                    reconciler.end().await;
                }
                if let Some(tenure) = self.tenure.as_ref().filter(|_| trouble.is_none()) {
                    tenure.end(&self.fleet.roster.all(), self.fleet.staging.newest()).await;
                }
            });
        }
        self.stop_tasks();
        if let Err(e) = self.blocks.housekeep() {
            log::warn!("the cache's index is not saved: {e}");
        }
        self.journal.close()?;
        trouble.map_or(Ok(()), Err)
    }

    /// Ends everything as a kill would: nothing more is committed, sealed or noted. Blocking.
    pub fn abandon(&self) {
        self.journal.poison("abandoned");
        let _ = self.stop_commits.send(());
        self.stop_tasks();
        self.vfs.stop_reaper();
        if let Some(engine) = &self.engine {
            engine.stop();
        }
        if let Err(e) = self.journal.close() {
            log::debug!("closing an abandoned journal: {e}");
        }
    }

    fn stop_tasks(&self) {
        self.closing.send_replace(true);
        let mut tasks = std::mem::take(&mut *self.tasks.lock());
        let fleet = Arc::clone(&self.fleet);
        self.handle.block_on(async move {
            let all = async { while tasks.join_next().await.is_some() {} };
            let _ = tokio::join!(fleet.stop(LAST_TASKS), tokio::time::timeout(LAST_TASKS, all));
        });
    }
}

type Listed = (Vec<ReplicaSpec>, Vec<Store>, Members);

fn assemble(
    config: &Config,
    handle: &Handle,
    core_options: CoreOptions,
    state: StateDir,
    (specs, stores, members): Listed,
    parts: Parts,
) -> Result<Core, Error> {
    let Parts { local, journal, blocks, mark, notes, contests } = parts;
    let failure = |e: &dyn std::fmt::Display| Error::new(Exit::Failure, e.to_string());
    let volume = local.volume.clone();
    let epoch = local.epoch();
    let staging = Staging::open(&state.staging(), &journal, Arc::clone(&blocks)).map_err(|e| failure(&e))?;
    let options = vfs::Options {
        clock: Arc::new(wall_clock),
        remote_fsync: config.fsync != Fsync::Local && !config.read_only,
        space_wait: config.space_wait,
    };
    super::restore::check_local(&journal)?;
    let vfs = Vfs::open(Arc::clone(&journal), Arc::clone(&blocks), options).map_err(|e| failure(&e))?;
    vfs.set_atime(match &config.mount {
        mount if mount.noatime => vfs::Atime::Never,
        mount if mount.strictatime => vfs::Atime::Always,
        mount if mount.nodiratime => vfs::Atime::RelativeFiles,
        _ => vfs::Atime::Relative,
    });
    let (closing, closing_seen) = watch::channel(false);
    let tenure = (!config.read_only).then(|| {
        let identity = Arc::new(Identity { volume: volume.clone(), claims: local.claims.clone() });
        Tenure::begin(identity, &vfs, state.path(), handle)
    });
    let shipping = tenure.as_ref().map(|tenure| Shipping {
        identity: Arc::clone(&tenure.identity),
        fence: Arc::clone(&tenure.fence),
        tuning: core_options.shipping,
    });
    let fleet = Fleet::open(FleetParts {
        specs,
        replicas: stores.into_iter().map(|s| Arc::new(Replica::new(s))).collect(),
        members,
        staging: Arc::clone(&staging),
        journal: Arc::clone(&journal),
        make: core_options.stores,
        state: state.path().to_owned(),
        handle: handle.clone(),
        shipping: shipping.clone(),
    });
    for (name, claim) in contests {
        if let Some(replica) = fleet.roster.get(&name) {
            replica.set_contest(Some(claim));
        }
    }
    if let Some(tenure) = &tenure {
        tenure.fence.ask(Arc::clone(&fleet.roster));
    }
    let local_files = {
        let staging = Arc::clone(&staging);
        move |loc: &crate::format::tables::FrameLoc| staging.file_of(loc)
    };
    let reader = Reader::new(
        Arc::clone(&fleet.roster),
        Some(Arc::new(local_files)),
        handle.clone(),
        closing_seen.clone(),
    );
    let reader: Arc<dyn FrameSource> = Arc::new(reader.with_deadline(config.read_timeout));
    blocks.set_source(reader);
    vfs.start_prefetch(PREFETCH).map_err(|e| failure(&e))?;

    let mut tasks = JoinSet::new();
    let (engine, reconciler) = match shipping {
        None => {
            vfs.set_read_only(MOUNTED_READ_ONLY);
            fleet.start();
            (None, None)
        }
        Some(shipping) => {
            let level = match volume.compression {
                Compression::Zstd => LEVEL,
                Compression::None => 0,
            };
            let sealer = Sealer::new(
                Arc::clone(&journal),
                Arc::clone(&blocks),
                Arc::clone(&staging),
                volume.volume,
                epoch,
                level,
                mark,
            )
            .map_err(|e| failure(&e))?
            .with_segments_of(core_options.segments_of);
            let wanted = Arc::new(AtomicU64::new(0));
            let mut checkpoints = Checkpoints {
                journal: Arc::clone(&journal),
                staging: Arc::clone(&staging),
                source: Arc::clone(&vfs) as Arc<dyn CutSource>,
                volume: volume.volume,
                epoch,
                least_log: core_options.checkpoint_after,
                least_segments: LEAST_SEGMENTS,
                last_len: 0,
                wanted: Arc::clone(&wanted),
            };
            let engine = Engine::start(
                Arc::clone(&vfs) as Arc<dyn CutSource>,
                Arc::clone(&journal),
                Arc::clone(&blocks),
                sealer,
                EngineOptions {
                    interval: config.commit_interval,
                    bytes: GROUP_BYTES,
                    most: SPARSE_GROUP_BYTES.min(config.cache_size / 8).max(GROUP_BYTES),
                    clock: Arc::new(wall_clock),
                },
                Box::new(move |sealer| checkpoints.after_seal(sealer)),
            )
            .map_err(|e| failure(&e))?;
            vfs.set_durability(Arc::new(RemoteFsync {
                vfs: Arc::downgrade(&vfs),
                engine: Arc::clone(&engine),
                fleet: Arc::clone(&fleet),
                identity: Arc::clone(&shipping.identity),
                fence: Arc::clone(&shipping.fence),
                level: config.fsync,
                timeout: config.fsync_timeout,
                handle: handle.clone(),
            }));
            fleet.start();
            let short = {
                let blocks = Arc::clone(&blocks);
                move || blocks.space.staged() > blocks.space.limit() / 2
            };
            tasks.spawn_on(Arc::clone(&fleet).trim(short, raised(closing_seen.clone())), handle);
            let settings = reconcile::Settings {
                deep_every: config.scrub_interval,
                check_every: config.check_interval,
                attention: core_options.attention.0,
                retry: core_options.attention.1,
                rate: config.scrub_rate,
            };
            let catalog = Tables {
                journal: Arc::clone(&journal),
                staging: Arc::clone(&staging),
                blocks: Arc::clone(&blocks),
                wanted,
            };
            let shared = reconcile::Shared {
                settings,
                roster: Arc::clone(&fleet.roster),
                identity: shipping.identity,
                fence: shipping.fence,
                catalog: Arc::new(catalog),
                outbox: staging,
                handle: handle.clone(),
            };
            let reconciler = Reconciler::start(shared, closing_seen);
            (Some(engine), Some(reconciler))
        }
    };
    let (stop_commits, stopped) = mpsc::channel::<()>();
    start_commits(&vfs, &journal, stopped).map_err(|e| failure(&e))?;
    Ok(Core {
        volume,
        epoch,
        notes,
        vfs,
        blocks,
        fleet,
        state,
        started_at: unix_now(),
        opened_at: mark.lsn,
        fsync: fsync_name(config.fsync),
        settings: config.settings(),
        journal,
        engine,
        reconciler,
        tenure,
        handle: handle.clone(),
        closing,
        tasks: Mutex::new(tasks),
        stop_commits,
    })
}

/// Returns when the signal is given, also when nobody can give it any more.
async fn raised(mut signal: watch::Receiver<bool>) {
    let _ = signal.wait_for(|s| *s).await;
}

fn fsync_name(level: Fsync) -> &'static str {
    match level {
        Fsync::Local => "local",
        Fsync::One => "one",
        Fsync::Quorum => "quorum",
        Fsync::All => "all",
    }
}

/// Starts the thread that commits pending changes every second.
fn start_commits(vfs: &Arc<Vfs>, journal: &Arc<Journal>, stop: mpsc::Receiver<()>) -> std::io::Result<()> {
    let (vfs, journal) = (Arc::clone(vfs), Arc::clone(journal));
    std::thread::Builder::new().name("mirrorfs-commit".into()).spawn(move || {
        let mut failed = false;
        while let Err(mpsc::RecvTimeoutError::Timeout) = stop.recv_timeout(COMMIT_EVERY) {
            if let Err(e) = vfs.keep_accessed(false) {
                log::debug!("access times wait: {e}");
            }
            let idle = vfs.pending_files() == 0 && journal.last_lsn() == journal.durable_lsn();
            let done =
                if idle { vfs.blocks().housekeep().map_err(Into::into) } else { vfs.commit().map(|_| ()) };
            match done {
                Ok(()) => failed = false,
                Err(e) if !failed => {
                    failed = true;
                    log::error!("changes cannot be committed: {e}");
                }
                Err(_) => {}
            }
            if failed && let Err(e) = vfs.blocks().housekeep() {
                log::debug!("making room: {e}");
            }
        }
    })?;
    Ok(())
}
