//! The running mount: attaching it, waiting for its end, and then the end of what is behind it (`core`).
//!
//! Owns the control socket, what becomes of a mount that is asked to end, and who is told how it ended.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use tokio::runtime::Runtime;
use tokio::sync::watch;

use super::backend::Control;
use super::core::{Core, CoreOptions};
use super::notify;
use super::signals::{Signals, asked_to_end, unmount_on_signal, watch_signals};
use super::{Error, MountArgs, Ready, ReadyInfo};
use crate::config::Config;
use crate::control::{Entry, Registry, Server};
use crate::exit::Exit;
use crate::fuse::{self, Session};
use crate::ids::SegmentNo;

/// How long the end waits for replicas that answer, so that an unmount usually leaves them complete.
const LAST_SHIP: Duration = Duration::from_secs(5);
/// The same when whoever unmounts wants to wait for all of them. Commands wait longer than this for an answer.
const LAST_SHIP_ALL: Duration = Duration::from_secs(420);

/// How long answers in progress may take at the end: a loaded machine needs some seconds to send one.
const LAST_ANSWERS: Duration = Duration::from_secs(10);

/// A live mount.
pub(super) struct Running {
    pub core: Core,
    pub mountpoint: PathBuf,
    session: OnceLock<Session>,
    /// Whether the end waits for all replicas.
    wait_for_all: AtomicBool,
    /// Whether a signal led to the end.
    by_signal: AtomicBool,
    /// Whether to mount again, writable.
    reopen: AtomicBool,
    closed: watch::Sender<Option<Closed>>,
}

/// How closing ended: with what code and words when not well.
type Closed = Result<(), (Exit, String)>;

impl Running {
    /// Ends the current group and waits until it is sealed. What programs have written and the kernel still holds
    /// belongs to it.
    pub async fn seal(self: &Arc<Self>, deadline: Instant) -> Result<SegmentNo, String> {
        let running = Arc::clone(self);
        let seal = move || {
            if running.core.engine.is_some() {
                running.flush_kernel()?;
            }
            running.core.seal(deadline)
        };
        tokio::task::spawn_blocking(seal).await.map_err(|e| e.to_string())?
    }

    /// Has the kernel hand over the pages that it has not written yet.
    fn flush_kernel(&self) -> Result<(), String> {
        let mut flushed = self.session.get().map_or(Ok(()), Session::flush);
        let known = self.core.vfs.take_refusals();
        // What was refused is remembered file by file. All else goes on to the replicas.
        if known
            && let Err(e) = &flushed
            && matches!(e.raw_os_error(), Some(libc::ENOSPC | libc::EIO | libc::EROFS))
        {
            log::info!("not all that programs have written can be stored: {e}");
            flushed = Ok(());
        }
        flushed.map_err(|e| format!("what programs have written cannot be flushed: {e}"))
    }

    /// Whether the end is to wait for all replicas, as long as [`LAST_SHIP_ALL`].
    pub fn wait_for_all(&self, wait: bool) {
        self.wait_for_all.store(wait, Ordering::Relaxed);
    }

    /// A signal leads to the end.
    pub fn ends_by_signal(&self) {
        self.by_signal.store(true, Ordering::Relaxed);
    }

    /// Unmounts a read-only mount, so that the main thread mounts it again, writable.
    pub async fn reopen(self: &Arc<Self>) -> Result<(), String> {
        self.reopen.store(true, Ordering::Relaxed);
        self.unmount().await.inspect_err(|_| self.reopen.store(false, Ordering::Relaxed))
    }

    /// Whether somebody can still use what was mounted.
    pub fn is_live(&self) -> bool {
        self.session.get().is_some_and(Session::is_live)
    }

    /// Processes in other mount namespaces that still have what was mounted. Blocking.
    pub fn holders(&self) -> fuse::Holders {
        self.session
            .get()
            .map_or_else(fuse::Holders::default, |session| fuse::Holders::of(&session.identity().device))
    }

    /// Takes the mount away although it is in use, after having the kernel hand over what it has not written. Blocking.
    pub fn evict(&self) -> std::io::Result<()> {
        self.session.get().map_or(Ok(()), Session::evict)
    }

    /// Ends what was mounted for those that still use it; what the kernel has not handed over is lost.
    pub fn cut(&self) -> std::io::Result<()> {
        self.session.get().map_or(Ok(()), Session::cut)
    }

    /// Has the main thread go on to the end although somebody still uses what was mounted.
    pub fn stop_serving(&self) {
        if let Some(session) = self.session.get() {
            session.abandon();
        }
    }

    /// Whether the mount answers within `limit`. Blocking.
    pub fn answers(&self, limit: Duration) -> std::io::Result<()> {
        self.session.get().map_or(Ok(()), |session| session.answers(limit))
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
        let call = async { tokio::task::spawn_blocking(unmount).await.map_err(|e| e.to_string())? };
        unmounted(call, self.wait_closed()).await
    }

    /// Returns when everything is closed and the process is about to end.
    pub async fn wait_closed(&self) -> Closed {
        let mut closed = self.closed.subscribe();
        // The sender lives in self, so that there is always an answer.
        let closed = closed.wait_for(Option::is_some).await;
        closed.ok().and_then(|c| c.clone()).unwrap_or(Ok(()))
    }
}

/// Waits for the call that unmounts, or until everything is closed. The call returns when the kernel has given up all that it knew of
/// the files, which takes seconds for a million: by then all may be closed, and nobody may be left to answer.
async fn unmounted<T>(
    call: impl Future<Output = Result<(), String>>,
    closed: impl Future<Output = T>,
) -> Result<(), String> {
    tokio::select! {
        biased;
        done = call => done,
        _ = closed => Ok(()),
    }
}

/// Opens the volume, mounts it and serves it until it is unmounted. `ready` is called exactly once.
pub(super) fn run(
    config: &Config,
    mount: &MountArgs,
    runtime: &Arc<Runtime>,
    ready: Ready,
) -> Result<(), Error> {
    let begun = watch_signals(runtime, mount.log.clone())
        .and_then(|signals| Ok((start(config, mount, runtime, signals.clone())?, signals)));
    let (mut started, signals) = match begun {
        Ok(begun) => begun,
        Err(e) => {
            ready(Err(&e));
            return Err(e);
        }
    };
    let notes = started.take_notes();
    ready(Ok(ReadyInfo { volume: started.running.core.volume.volume, notes }));
    let mut config = config.clone();
    while started.serve(runtime)? == Ended::ToReopen {
        log::info!("mounting again, writable");
        config.read_only = false;
        let mount = &MountArgs { replaces: false, ..mount.clone() };
        started = start(&config, mount, runtime, signals.clone()).or_else(|e| {
            log::error!("cannot be mounted writable: {e}; mounting read-only again");
            config.read_only = true;
            start(&config, mount, runtime, signals.clone())
        })?;
        started.take_notes();
    }
    Ok(())
}

/// Why a mount ended.
#[derive(PartialEq)]
enum Ended {
    ForGood,
    ToReopen,
}

struct Started {
    running: Arc<Running>,
    notes: Vec<String>,
    signals: Signals,
    server: Option<Server>,
    registration: Option<crate::control::Registration>,
}

fn start(
    config: &Config,
    mount: &MountArgs,
    runtime: &Arc<Runtime>,
    mut signals: Signals,
) -> Result<Started, Error> {
    let _step = notify::opening(runtime);
    // To break off here does no harm; replicas may take long to answer.
    let options = CoreOptions { takeover: mount.takeover.clone(), ..CoreOptions::with_test_settings() };
    let mut core = Core::open(config, runtime, options, asked_to_end(&mut signals))?;
    let notes = std::mem::take(&mut core.notes);
    let attached = attach(config, mount, runtime, &core);
    let (session, server) = match attached {
        Ok(attached) => attached,
        Err(e) => {
            if let Err(e) = core.close(async {}) {
                log::warn!("{e}");
            }
            return Err(e);
        }
    };
    core.state.note_mounted(session.identity());
    let entry = Entry {
        mountpoint: session.mountpoint().to_owned(),
        state: core.state().to_owned(),
        pid: std::process::id(),
    };
    let registration = Registry::of_user()
        .enter(&entry)
        .inspect_err(|e| log::warn!("this mount will not be found by its mountpoint alone: {e}"))
        .ok();
    let running = Running {
        core,
        mountpoint: session.mountpoint().to_owned(),
        session: OnceLock::from(session),
        wait_for_all: AtomicBool::new(false),
        by_signal: AtomicBool::new(false),
        reopen: AtomicBool::new(false),
        closed: watch::channel(None).0,
    };
    Ok(Started { running: Arc::new(running), notes, signals, server: Some(server), registration })
}

/// Makes the control socket and the mount.
fn attach(
    config: &Config,
    mount: &MountArgs,
    runtime: &Arc<Runtime>,
    core: &Core,
) -> Result<(Session, Server), Error> {
    // On as on ext4. Whoever does not own the mount's root pays a request for each path that he walks (the kernel does not
    // remember that the root has none), and another for each inode: hence `noacl`.
    let acl = !config.mount.noacl;
    let mount_options = fuse::MountOptions {
        fsname: config.mount.fsname.clone().unwrap_or_else(|| format!("mirrorfs:{}", core.volume.volume)),
        allow_other: config.mount.allow_other,
        read_only: config.read_only,
        suid: !config.mount.nosuid,
        dev: !config.mount.nodev,
        noexec: config.mount.noexec,
        noatime: config.mount.noatime,
        nosymfollow: config.mount.nosymfollow,
        sync: config.mount.sync,
        dirsync: config.mount.dirsync,
        labels: config.mount.labels.clone(),
        strictatime: config.mount.strictatime,
        nodiratime: config.mount.nodiratime,
        acl,
        low_latency: config.mount.low_latency.wanted(),
        replaces: mount.replaces,
        invalidator: true,
        ..fuse::MountOptions::default()
    };
    let server = {
        let _guard = runtime.enter();
        Server::bind(core.state()).map_err(|e| {
            Error::new(
                Exit::Failure,
                format!("cannot make the control socket in {}: {e}", core.state().display()),
            )
        })?
    };
    let session = fuse::mount(
        Arc::clone(&core.vfs) as Arc<dyn crate::vfs::api::FileSystem>,
        &mount.mountpoint,
        &mount_options,
    )
    .map_err(|e| {
        let exit = match &e {
            fuse::MountError::Mountpoint { .. } => Exit::Usage,
            fuse::MountError::Unmounted(_) => Exit::NotMounted,
            _ => Exit::Failure,
        };
        Error::new(exit, e.to_string())
    })?;
    Ok((session, server))
}

impl Started {
    /// What there is to say, logged.
    fn take_notes(&mut self) -> Vec<String> {
        let notes = std::mem::take(&mut self.notes);
        notes.iter().for_each(|note| match note.strip_prefix("warning: ") {
            Some(warning) => log::warn!("{warning}"),
            None => log::info!("{note}"),
        });
        notes
    }

    /// Serves until the mount is gone, then shuts down.
    fn serve(mut self, runtime: &Arc<Runtime>) -> Result<Ended, Error> {
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
        let watch = notify::live(&running);
        let ended = running.session.get().map_or(Ok(()), Session::wait);
        signals.abort();
        drop(watch);
        // Whoever mounts again at once finds that this one is ending, and waits.
        running.core.state.note_ending();
        // A new mount in the same place makes an entry of its own.
        drop(self.registration.take());
        let reopen = running.reopen.load(Ordering::Relaxed);
        let step = (!reopen).then(|| notify::ending(runtime));
        if let Err(e) = &ended {
            log::error!("serving the mount ended: {e}");
        }
        let closed = self.close();
        let told = closed.as_ref().copied().map_err(|e| (e.exit_code(), e.to_string()));
        running.closed.send_replace(Some(told));
        stop_server.send_replace(true);
        if let Some(server) = server {
            // An answer under way is finished; a client that hangs is not waited for.
            let _ = runtime.block_on(async { tokio::time::timeout(LAST_ANSWERS, server).await });
        }
        drop(step);
        closed?;
        ended.map_err(|e| Error::new(Exit::Failure, format!("serving the mount ended: {e}")))?;
        Ok(if reopen { Ended::ToReopen } else { Ended::ForGood })
    }

    fn close(&self) -> Result<(), Error> {
        let running = &self.running;
        let all = running.wait_for_all.load(Ordering::Relaxed);
        let mut signals = self.signals.clone();
        // The one that led here has been heeded.
        signals.mark_unchanged();
        let mut hurry = running.by_signal.load(Ordering::Relaxed);
        running.core.close(async move {
            let until = Instant::now() + if all { LAST_SHIP_ALL } else { LAST_SHIP };
            let mut ship = std::pin::pin!(running.core.fleet.last_call(until, all));
            loop {
                tokio::select! {
                    () = &mut ship => break,
                    () = asked_to_end(&mut signals) => {
                        if hurry {
                            log::info!("asked to end by a signal");
                            break;
                        }
                        // systemd unmounts, and then sends one to all that is left: that is no haste.
                        hurry = true;
                    }
                }
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn an_unmount_that_the_kernel_takes_its_time_for_is_over_when_all_is_closed() {
        let never = std::future::pending::<Result<(), String>>;
        assert_eq!(unmounted(never(), async { 7 }).await, Ok(()));
        assert_eq!(unmounted(async { Ok(()) }, std::future::pending::<i32>()).await, Ok(()));
        let busy = async { Err("in use".to_owned()) };
        assert_eq!(unmounted(busy, std::future::pending::<i32>()).await, Err("in use".to_owned()));
    }
}
