//! The running mount: starting its parts, waiting for its end, shutting down in order.
//!
//! Order at the end: no more requests (unmount) → pending changes committed → last group sealed → shippers told to end →
//! journal closed → lock released. Whatever is not shipped then waits in the state folder for the next mount.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock, Weak, mpsc};
use std::time::{Duration, Instant};

use tokio::runtime::{Handle, Runtime};
use tokio::sync::watch;
use tokio::task::JoinSet;

use super::backend::Control;
use super::checkpoints::Checkpoints;
use super::fleet::{Cursors, Fleet};
use super::parts::{self, Parts};
use super::state::StateDir;
use super::tenure::Tenure;
use super::{Error, MountArgs, Ready, ReadyInfo, open, unix_now, wall_clock};
use crate::cache::BlockStore;
use crate::config::{Config, Fsync};
use crate::control::{Entry, Registry, Server};
use crate::exit::Exit;
use crate::format::volume::{Compression, Volume};
use crate::fuse::{self, Session};
use crate::ids::{Epoch, Lsn, SegmentNo};
use crate::journal::Journal;
use crate::replica::{self, Fence, FrameSource, Identity, Outbox, Reader, Replica, Shipper, Tuning};
use crate::txg::{Engine, EngineOptions, Sealer, Staging};
use crate::vfs::types::VfsError;
use crate::vfs::{self, Durability, Vfs};

/// How often pending changes are committed locally.
const COMMIT_EVERY: Duration = Duration::from_secs(1);
/// Dirty bytes that end a transaction group before its time.
const GROUP_BYTES: u64 = 16 << 20;
/// How long a writer waits for space.
const SPACE_WAIT: Duration = Duration::from_secs(30);
/// How long the last group may take at the end; what is not sealed then is sealed at the next mount.
const LAST_SEAL: Duration = Duration::from_secs(120);
/// How long the end waits for replicas that answer, so that an unmount usually leaves them complete.
const LAST_SHIP: Duration = Duration::from_secs(5);
/// The same when whoever unmounts wants to wait for all of them. Commands wait longer than this for an answer.
const LAST_SHIP_ALL: Duration = Duration::from_secs(420);
/// zstd level of frames.
const LEVEL: i32 = 1;

/// A live mount.
pub(super) struct Running {
    pub volume: Volume,
    pub epoch: Epoch,
    pub mountpoint: PathBuf,
    pub state: StateDir,
    pub started_at: f64,
    /// The last sealed change when it was opened.
    pub opened_at: Lsn,
    pub fsync: &'static str,
    pub journal: Arc<Journal>,
    pub blocks: Arc<BlockStore>,
    pub vfs: Arc<Vfs>,
    /// None for a read-only mount.
    pub engine: Option<Arc<Engine>>,
    pub fleet: Arc<Fleet>,
    /// None for a read-only mount.
    pub tenure: Option<Tenure>,
    session: OnceLock<Session>,
    /// Whether the end waits for all replicas.
    wait_for_all: AtomicBool,
    closed: watch::Sender<Option<Closed>>,
}

/// How closing ended: with what code and words when not well.
type Closed = Result<(), (Exit, String)>;

impl Running {
    /// Ends the current group and waits until it is sealed. What programs have written and the kernel still holds
    /// belongs to it.
    pub async fn seal(self: &Arc<Self>, deadline: Instant) -> Result<SegmentNo, String> {
        let Some(engine) = self.engine.clone() else { return Ok(self.fleet.staging.newest()) };
        let running = Arc::clone(self);
        tokio::task::spawn_blocking(move || {
            running.flush_kernel()?;
            loop {
                match running.vfs.commit() {
                    Ok(_) => return engine.sync(deadline),
                    // There is space again when replicas have taken what is staged.
                    Err(VfsError::NoSpace) if Instant::now() < deadline => {
                        std::thread::sleep(Duration::from_millis(200));
                    }
                    Err(e) => return Err(e.to_string()),
                }
            }
        })
        .await
        .map_err(|e| e.to_string())?
    }

    /// Has the kernel hand over the pages that it has not written yet.
    fn flush_kernel(&self) -> Result<(), String> {
        let flushed = self.session.get().map_or(Ok(()), Session::flush);
        flushed.map_err(|e| format!("what programs have written cannot be flushed: {e}"))
    }

    /// Whether the end is to wait for all replicas, as long as [`LAST_SHIP_ALL`].
    pub fn wait_for_all(&self, wait: bool) {
        self.wait_for_all.store(wait, Ordering::Relaxed);
    }

    /// Unmounts; the main thread then does the rest.
    pub async fn unmount(self: &Arc<Self>) -> Result<(), String> {
        let running = Arc::clone(self);
        let unmount = move || match running.session.get() {
            Some(session) => session.unmount(false).map_err(|e| match e.kind() {
                std::io::ErrorKind::ResourceBusy => format!(
                    "{} is in use: close what is open there (see `fuser -vm {}`) and try again",
                    running.mountpoint.display(),
                    running.mountpoint.display()
                ),
                _ => format!("cannot unmount {}: {e}", running.mountpoint.display()),
            }),
            None => Ok(()),
        };
        tokio::task::spawn_blocking(unmount).await.map_err(|e| e.to_string())?
    }

    /// Returns when everything is closed and the process is about to end.
    pub async fn wait_closed(&self) -> Closed {
        let mut closed = self.closed.subscribe();
        // The sender lives in self, so that there is always an answer.
        let closed = closed.wait_for(Option::is_some).await;
        closed.ok().and_then(|c| c.clone()).unwrap_or(Ok(()))
    }
}

/// fsync's way to the replicas.
struct RemoteFsync {
    vfs: Weak<Vfs>,
    engine: Arc<Engine>,
    fleet: Arc<Fleet>,
    identity: Arc<Identity>,
    fence: Arc<Fence>,
    needed: usize,
    timeout: Duration,
    handle: Handle,
}

impl Durability for RemoteFsync {
    fn replicate(&self) -> Result<(), VfsError> {
        self.refuse_fenced()?;
        let deadline = Instant::now() + self.timeout;
        let segment = self.engine.sync(deadline).map_err(VfsError::TimedOut)?;
        // Stored, and behind that no other writer seen: whoever takes over now finds it.
        let confirm =
            replica::confirm(&self.fleet.replicas, &self.identity, &self.fence, segment, self.needed);
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

/// Opens the volume, mounts it and serves it until it is unmounted. `ready` is called exactly once.
pub(super) fn run(
    config: &Config,
    mount: &MountArgs,
    runtime: &Arc<Runtime>,
    ready: Ready,
) -> Result<(), Error> {
    let started = watch_signals(runtime).and_then(|signals| start(config, mount, runtime, signals));
    let mut started = match started {
        Ok(started) => started,
        Err(e) => {
            ready(Err(&e));
            return Err(e);
        }
    };
    let notes = std::mem::take(&mut started.notes);
    notes.iter().for_each(|note| log::info!("{note}"));
    ready(Ok(ReadyInfo { volume: started.running.volume.volume, notes }));
    started.serve(runtime)
}

struct Started {
    running: Arc<Running>,
    notes: Vec<String>,
    closing: watch::Sender<bool>,
    tasks: JoinSet<()>,
    stop_commits: mpsc::Sender<()>,
    signals: Signals,
    server: Option<Server>,
    _registration: Option<crate::control::Registration>,
}

fn start(
    config: &Config,
    mount: &MountArgs,
    runtime: &Arc<Runtime>,
    mut signals: Signals,
) -> Result<Started, Error> {
    let state = StateDir::lock(&config.state)?;
    let stores = super::stores(config)?;
    let mut local = state.read()?;
    if local.as_ref().is_some_and(|l| l.borrowed) {
        // A read-only mount built it from the replicas; they may have gone on since.
        state.clear()?;
        local = None;
    }
    let parts = runtime.block_on(async {
        let open = async {
            let seen = open::look(&stores, local.is_some()).await;
            let decision = open::decide(local.as_ref(), &seen, config.read_only)?;
            parts::open(config, &state, &stores, &seen, local, decision, mount.takeover).await
        };
        tokio::select! {
            parts = open => parts,
            // To break off here is no worse than a crash, which does no harm; replicas may take long to answer.
            () = asked_to_end(&mut signals) => {
                Err(Error::new(Exit::Failure, "interrupted before the mount was live"))
            }
        }
    })?;
    if let Err(e) = crate::config::state::remember(&config.state, &config.replicas) {
        log::warn!("cannot note the replicas in {}: {e}", config.state.display());
    }
    let journal = Arc::clone(&parts.journal);
    assemble(config, mount, runtime, signals, state, &stores, parts).inspect_err(|_| {
        if let Err(e) = journal.close() {
            log::warn!("closing the journal: {e}");
        }
    })
}

#[allow(clippy::too_many_lines, clippy::too_many_arguments)]
fn assemble(
    config: &Config,
    mount: &MountArgs,
    runtime: &Arc<Runtime>,
    signals: Signals,
    state: StateDir,
    stores: &[crate::replica::Store],
    parts: Parts,
) -> Result<Started, Error> {
    let Parts { local, journal, blocks, mark, notes } = parts;
    let failure = |e: &dyn std::fmt::Display| Error::new(Exit::Failure, e.to_string());
    let volume = local.volume.clone();
    let epoch = local.epoch();
    let staging = Staging::open(&state.staging(), &journal, Arc::clone(&blocks)).map_err(|e| failure(&e))?;
    let options = vfs::Options {
        clock: Arc::new(wall_clock),
        remote_fsync: config.fsync != Fsync::Local && !config.read_only,
        space_wait: SPACE_WAIT,
    };
    let vfs = Vfs::open(Arc::clone(&journal), Arc::clone(&blocks), options).map_err(|e| failure(&e))?;

    let (closing, closing_seen) = watch::channel(false);
    let replicas: Vec<Arc<Replica>> = stores.iter().map(|s| Arc::new(Replica::new(s.clone()))).collect();
    let fleet = Arc::new(Fleet { replicas: replicas.clone(), staging: Arc::clone(&staging) });
    let local_files = {
        let staging = Arc::clone(&staging);
        move |loc: &crate::format::tables::FrameLoc| staging.file_of(loc)
    };
    let reader: Arc<dyn FrameSource> = Arc::new(Reader::new(
        replicas.clone(),
        Some(Arc::new(local_files)),
        runtime.handle().clone(),
        closing_seen.clone(),
    ));
    blocks.set_source(reader);
    vfs.start_prefetch(4).map_err(|e| failure(&e))?;

    let mut tasks = JoinSet::new();
    let cursors: Arc<dyn crate::replica::CursorStore> = {
        let places = stores.iter().map(|s| (s.name().clone(), s.url().to_owned())).collect();
        Arc::new(Cursors { journal: Arc::clone(&journal), places })
    };
    let mut tenure = None;
    let engine = if config.read_only {
        vfs.set_read_only("mounted read-only");
        for replica in &replicas {
            if let Ok(cursor) = cursors.load(replica.name()) {
                replica.set_cursor(cursor);
            }
        }
        None
    } else {
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
        .map_err(|e| failure(&e))?;
        let mut checkpoints = Checkpoints {
            journal: Arc::clone(&journal),
            staging: Arc::clone(&staging),
            source: Arc::clone(&vfs) as Arc<dyn crate::txg::CutSource>,
            volume: volume.volume,
            epoch,
            last_len: 0,
        };
        let engine = Engine::start(
            Arc::clone(&vfs) as Arc<dyn crate::txg::CutSource>,
            Arc::clone(&journal),
            Arc::clone(&blocks),
            sealer,
            EngineOptions {
                interval: config.commit_interval,
                bytes: GROUP_BYTES,
                clock: Arc::new(wall_clock),
            },
            Box::new(move |sealer| checkpoints.after_seal(sealer)),
        )
        .map_err(|e| failure(&e))?;
        let identity = Arc::new(Identity { volume: volume.clone(), claims: local.claims.clone() });
        let begun = Tenure::begin(&identity, &vfs, state.path(), runtime.handle());
        let fence = Arc::clone(&begun.fence);
        tenure = Some(begun);
        vfs.set_durability(Arc::new(RemoteFsync {
            vfs: Arc::downgrade(&vfs),
            engine: Arc::clone(&engine),
            fleet: Arc::clone(&fleet),
            identity: Arc::clone(&identity),
            fence: Arc::clone(&fence),
            needed: config.fsync.needed(replicas.len()),
            timeout: config.fsync_timeout,
            handle: runtime.handle().clone(),
        }));
        for replica in &replicas {
            let shipper = Shipper {
                replica: Arc::clone(replica),
                peers: replicas.clone(),
                outbox: Arc::clone(&staging) as Arc<dyn Outbox>,
                cursors: Arc::clone(&cursors),
                identity: Arc::clone(&identity),
                fence: Arc::clone(&fence),
                closing: closing_seen.clone(),
                tuning: Tuning::default(),
            };
            tasks.spawn_on(shipper.run(), runtime.handle());
        }
        let short = {
            let blocks = Arc::clone(&blocks);
            move || blocks.space.staged() > blocks.space.limit() / 2
        };
        let mut stop = closing_seen.clone();
        let stop = async move {
            let _ = stop.wait_for(|c| *c).await;
        };
        tasks.spawn_on(Arc::clone(&fleet).trim(short, stop), runtime.handle());
        Some(engine)
    };

    let mount_options = fuse::MountOptions {
        fsname: format!("mirrorfs:{}", volume.volume),
        allow_other: config.mount.allow_other,
        read_only: config.read_only,
        suid: !config.mount.nosuid,
        dev: !config.mount.nodev,
        noexec: config.mount.noexec,
        noatime: config.mount.noatime,
        ..fuse::MountOptions::default()
    };
    let server = {
        let _guard = runtime.enter();
        Server::bind(state.path()).map_err(|e| {
            Error::new(
                Exit::Failure,
                format!("cannot make the control socket in {}: {e}", state.path().display()),
            )
        })?
    };
    let session = fuse::mount(
        Arc::clone(&vfs) as Arc<dyn crate::vfs::api::FileSystem>,
        &mount.mountpoint,
        &mount_options,
    )
    .map_err(|e| {
        let exit = match &e {
            fuse::MountError::Mountpoint { .. } => Exit::Usage,
            _ => Exit::Failure,
        };
        Error::new(exit, e.to_string())
    })?;
    let entry = Entry {
        mountpoint: session.mountpoint().to_owned(),
        state: state.path().to_owned(),
        pid: std::process::id(),
    };
    let registration = Registry::of_user()
        .enter(&entry)
        .inspect_err(|e| log::warn!("this mount will not be found by its mountpoint alone: {e}"))
        .ok();

    let (stop_commits, stopped) = mpsc::channel::<()>();
    start_commits(&vfs, &journal, stopped).map_err(|e| failure(&e))?;
    let running = Running {
        volume,
        epoch,
        mountpoint: session.mountpoint().to_owned(),
        state,
        started_at: unix_now(),
        opened_at: mark.lsn,
        fsync: fsync_name(config.fsync),
        journal,
        blocks,
        vfs,
        engine,
        fleet,
        tenure,
        session: OnceLock::from(session),
        wait_for_all: AtomicBool::new(false),
        closed: watch::channel(None).0,
    };
    Ok(Started {
        running: Arc::new(running),
        notes,
        closing,
        tasks,
        stop_commits,
        signals,
        server: Some(server),
        _registration: registration,
    })
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

impl Started {
    /// Serves until the mount is gone, then shuts down.
    fn serve(mut self, runtime: &Arc<Runtime>) -> Result<(), Error> {
        let running = Arc::clone(&self.running);
        let (stop_server, server_stopped) = watch::channel(false);
        let server = self.server.take().map(|server| {
            let mut stop = server_stopped.clone();
            let stop = async move {
                let _ = stop.wait_for(|s| *s).await;
            };
            runtime.spawn(server.serve(Arc::new(Control(Arc::clone(&running))), stop))
        });
        let signals = runtime.spawn(unmount_on_signal(Arc::clone(&running), self.signals.clone()));
        let ended = running.session.get().map_or(Ok(()), Session::wait);
        signals.abort();
        if let Err(e) = &ended {
            log::error!("serving the mount ended: {e}");
        }
        let closed = self.close(runtime);
        let told = closed.as_ref().copied().map_err(|e| (e.exit_code(), e.to_string()));
        running.closed.send_replace(Some(told));
        stop_server.send_replace(true);
        if let Some(server) = server {
            // An answer under way is finished; a client that hangs is not waited for.
            let _ = runtime.block_on(async { tokio::time::timeout(Duration::from_secs(2), server).await });
        }
        closed?;
        ended.map_err(|e| Error::new(Exit::Failure, format!("serving the mount ended: {e}")))
    }

    fn close(&mut self, runtime: &Runtime) -> Result<(), Error> {
        let running = &self.running;
        let _ = self.stop_commits.send(());
        running.vfs.stop_reaper();
        let mut trouble = None;
        if let Some(engine) = &running.engine {
            let sealed = running
                .vfs
                .commit()
                .map_err(|e| e.to_string())
                .and_then(|_| engine.sync(Instant::now() + LAST_SEAL));
            if let Err(e) = sealed {
                log::error!("not everything is sealed; it is kept in the state folder: {e}");
                trouble = Some(Error::new(
                    Exit::Failure,
                    format!("unmounted, but not everything is sealed ({e}); mount again to go on"),
                ));
            }
            engine.stop();
            let all = running.wait_for_all.load(Ordering::Relaxed);
            let until = Instant::now() + if all { LAST_SHIP_ALL } else { LAST_SHIP };
            let mut signals = self.signals.clone();
            // The one that led here has been heeded.
            signals.mark_unchanged();
            runtime.block_on(async {
                tokio::select! {
                    () = running.fleet.last_call(until, all) => {}
                    () = asked_to_end(&mut signals) => log::info!("asked to end by a signal"),
                }
                if let Some(tenure) = running.tenure.as_ref().filter(|_| trouble.is_none()) {
                    tenure.end(&running.fleet.replicas, running.fleet.staging.newest()).await;
                }
            });
        }
        self.closing.send_replace(true);
        let tasks = std::mem::take(&mut self.tasks);
        runtime.block_on(async move {
            let mut tasks = tasks;
            let all = async { while tasks.join_next().await.is_some() {} };
            // Beyond this they are dropped; what they sent and did not note is sent again.
            let _ = tokio::time::timeout(Duration::from_secs(5), all).await;
        });
        if let Err(e) = running.blocks.housekeep() {
            log::warn!("the cache's index is not saved: {e}");
        }
        running.journal.close()?;
        trouble.map_or(Ok(()), Err)
    }
}

/// How often this process was asked to end by a signal.
type Signals = watch::Receiver<u32>;

/// Counts SIGTERM and SIGINT from now on.
fn watch_signals(runtime: &Arc<Runtime>) -> Result<Signals, Error> {
    use tokio::signal::unix::{SignalKind, signal};
    let failed = |e: std::io::Error| Error::new(Exit::Failure, format!("signals cannot be caught: {e}"));
    let _guard = runtime.enter();
    let mut term = signal(SignalKind::terminate()).map_err(failed)?;
    let mut int = signal(SignalKind::interrupt()).map_err(failed)?;
    let (count, signals) = watch::channel(0);
    runtime.spawn(async move {
        loop {
            tokio::select! {
                _ = term.recv() => {}
                _ = int.recv() => {}
            }
            count.send_modify(|n| *n += 1);
        }
    });
    Ok(signals)
}

/// Returns at the next signal that was not yet seen here.
async fn asked_to_end(signals: &mut Signals) {
    if signals.changed().await.is_err() {
        // The task that counts has ended, with the runtime.
        std::future::pending::<()>().await;
    }
}

/// SIGTERM and SIGINT unmount; a second one unmounts lazily.
async fn unmount_on_signal(running: Arc<Running>, mut signals: Signals) {
    let mut lazy = false;
    loop {
        asked_to_end(&mut signals).await;
        log::info!("asked to end by a signal: unmounting");
        let busy = match running.unmount().await {
            Ok(()) => return,
            Err(e) => e,
        };
        if !lazy {
            lazy = true;
            log::warn!("{busy}; a second signal detaches it anyway");
            continue;
        }
        if let Some(session) = running.session.get()
            && let Err(e) = session.unmount(true)
        {
            log::error!("cannot detach: {e}");
        }
    }
}
