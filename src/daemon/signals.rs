//! Signals: which ones the daemon heeds, and what it does about them.
//!
//! SIGTERM and SIGINT unmount: at once when nobody uses the mount; else, after [`BUSY`] or a second signal, although it is in
//! use. SIGHUP opens the log anew. All others are the system's.

use std::fs::OpenOptions;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::runtime::Runtime;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

use super::Error;
use super::serve::Running;
use crate::exit::Exit;
use crate::fuse::Holders;

/// How long a mount that is in use may become free before it is taken away from its users.
const BUSY: Duration = Duration::from_secs(10);
/// How often that is tried.
const TRY_EVERY: Duration = Duration::from_millis(200);
/// Why nothing can be written any more once it was taken away.
const EVICTED: &str = "it was unmounted while in use";

/// How often this process was asked to end by a signal.
pub(super) type Signals = watch::Receiver<u32>;

/// Counts SIGTERM and SIGINT from now on, and opens `log` anew at each SIGHUP.
pub(super) fn watch_signals(runtime: &Arc<Runtime>, log: Option<PathBuf>) -> Result<Signals, Error> {
    let failed = |e: std::io::Error| Error::new(Exit::Failure, format!("signals cannot be caught: {e}"));
    let _guard = runtime.enter();
    let mut term = signal(SignalKind::terminate()).map_err(failed)?;
    let mut int = signal(SignalKind::interrupt()).map_err(failed)?;
    let mut hup = signal(SignalKind::hangup()).map_err(failed)?;
    let (count, signals) = watch::channel(0);
    runtime.spawn(async move {
        loop {
            tokio::select! {
                _ = term.recv() => {}
                _ = int.recv() => {}
                _ = hup.recv() => {
                    reopen_log(log.as_deref());
                    continue;
                }
            }
            count.send_modify(|n| *n += 1);
        }
    });
    Ok(signals)
}

/// A log that was moved away is begun anew; without one of our own there is nothing to do.
pub fn reopen_log(log: Option<&Path>) {
    let Some(path) = log else { return log::info!("SIGHUP: nothing to do") };
    match OpenOptions::new().append(true).create(true).mode(0o600).open(path) {
        Ok(file) => {
            for standard in [libc::STDOUT_FILENO, libc::STDERR_FILENO] {
                // SAFETY: both descriptors are open; dup2 replaces the second atomically.
                unsafe { libc::dup2(file.as_raw_fd(), standard) };
            }
            log::info!("SIGHUP: this log was opened anew");
        }
        Err(e) => log::error!("SIGHUP: cannot open {}: {e}", path.display()),
    }
}

/// Returns at the next signal that was not yet seen here.
pub(super) async fn asked_to_end(signals: &mut Signals) {
    if signals.changed().await.is_err() {
        // The task that counts has ended, with the runtime.
        std::future::pending::<()>().await;
    }
}

/// Unmounts at the first signal, and does not come back without.
pub(super) async fn unmount_on_signal(running: Arc<Running>, mut signals: Signals) {
    asked_to_end(&mut signals).await;
    log::info!("asked to end by a signal: unmounting");
    running.ends_by_signal();
    let begin = Instant::now();
    let mut told = false;
    loop {
        let busy = match running.unmount().await {
            Ok(()) if !running.is_live() => return,
            Ok(()) if told => String::new(),
            Ok(()) => elsewhere(&running, &holders(&running).await),
            Err(busy) => busy,
        };
        if !std::mem::replace(&mut told, true) {
            log::warn!("{busy}; detaching it anyway in {} s, or at a second signal", BUSY.as_secs());
        }
        tokio::select! {
            () = tokio::time::sleep(TRY_EVERY) => {}
            () = asked_to_end(&mut signals) => break,
        }
        if begin.elapsed() > BUSY {
            break;
        }
    }
    tokio::select! {
        () = evict(&running) => {}
        () = asked_to_end(&mut signals) => log::error!("asked again: not waiting for what programs have written last"),
    }
    stop(&running);
}

/// Waits until nobody uses what was unmounted here; after [`BUSY`] ends it as a signal does. Returns those that used it
/// then.
pub(super) async fn end_if_held(running: Arc<Running>) -> Option<Holders> {
    let begin = Instant::now();
    while running.is_live() {
        if begin.elapsed() > BUSY {
            let found = holders(&running).await;
            log::warn!("{}; ending it", elsewhere(&running, &found));
            evict(&running).await;
            stop(&running);
            return Some(found);
        }
        tokio::time::sleep(TRY_EVERY).await;
    }
    None
}

/// The same for a mount that nobody could write to: it ends without a word to its users, as nothing can be lost.
pub(super) async fn cut_if_held(running: Arc<Running>) -> Result<(), String> {
    let begin = Instant::now();
    while running.is_live() {
        if begin.elapsed() > BUSY {
            let told = elsewhere(&running, &holders(&running).await);
            log::warn!("{told}; ending it");
            return running.cut().map_err(|e| format!("{told}, and cannot be ended there: {e}"));
        }
        tokio::time::sleep(TRY_EVERY).await;
    }
    Ok(())
}

fn elsewhere(running: &Running, holders: &Holders) -> String {
    format!("{} is unmounted, but still mounted elsewhere: {holders}", running.mountpoint.display())
}

async fn holders(running: &Arc<Running>) -> Holders {
    let running = Arc::clone(running);
    tokio::task::spawn_blocking(move || running.holders()).await.unwrap_or_default()
}

/// Takes over what programs have written so far, and detaches the mount wherever it can be reached.
async fn evict(running: &Arc<Running>) {
    let running = Arc::clone(running);
    match tokio::task::spawn_blocking(move || running.evict()).await {
        Ok(Ok(())) => {
            log::warn!("detached while in use; programs that have files open there get errors from now on")
        }
        Ok(Err(e)) => log::error!("detaching while in use: {e}"),
        Err(e) => log::error!("detaching while in use: {e}"),
    }
}

/// What programs would write from now on must fail, as nobody would keep it.
fn stop(running: &Running) {
    running.core.vfs.set_read_only(EVICTED);
    running.stop_serving();
}
