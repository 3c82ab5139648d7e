//! What a supervisor such as systemd is told: that the mount is live, how it fares, that it is ending; and the watchdog.
//!
//! Speaks only when `NOTIFY_SOCKET` is set (`Type=notify`). Everything is best effort: a supervisor that is gone hinders nothing.

use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use sd_notify::NotifyState;
use tokio::runtime::Runtime;

use super::backend::Control;
use super::serve::Running;
use crate::control::Status;
use crate::escape;
use crate::replica::ReplicaState;

/// How often a long step says that it goes on, and how much time it asks for.
const SIGN_OF_LIFE: Duration = Duration::from_secs(5);
const MORE_TIME: Duration = Duration::from_secs(30);
/// An end that takes longer than this hangs.
const LONGEST_END: Duration = Duration::from_secs(600);
/// How often the line of status is looked at.
const STATUS_EVERY: Duration = Duration::from_secs(5);

fn supervised() -> bool {
    std::env::var_os("NOTIFY_SOCKET").is_some_and(|s| !s.is_empty())
}

fn tell(states: &[NotifyState<'_>]) {
    if let Err(e) = sd_notify::notify(states) {
        log::debug!("the supervisor cannot be told: {e}");
    }
}

/// A step that may take long, until it is dropped.
pub(super) struct Step(Option<tokio::task::JoinHandle<()>>);

impl Drop for Step {
    fn drop(&mut self) {
        if let Some(task) = &self.0 {
            task.abort();
        }
    }
}

/// The volume is being opened, which may mean to bring it back from its replicas.
pub(super) fn opening(runtime: &Runtime) -> Step {
    step(runtime, "opening the volume", false)
}

/// The mount is gone or about to go; what is left is sealed and sent.
pub(super) fn ending(runtime: &Runtime) -> Step {
    step(runtime, "sealing and sending what is left", true)
}

fn step(runtime: &Runtime, what: &'static str, end: bool) -> Step {
    if !supervised() {
        return Step(None);
    }
    if end {
        tell(&[NotifyState::Stopping]);
    }
    let begin = Instant::now();
    Step(Some(runtime.spawn(async move {
        while !end || begin.elapsed() < LONGEST_END {
            let more = u32::try_from(MORE_TIME.as_micros()).unwrap_or(u32::MAX);
            tell(&[NotifyState::Status(what), NotifyState::ExtendTimeoutUsec(more)]);
            tokio::time::sleep(SIGN_OF_LIFE).await;
        }
    })))
}

/// Watches over a live mount until it is dropped.
pub(super) struct Watch {
    _stop: Option<mpsc::Sender<()>>,
}

/// Says that the mount is live, and from now on how it fares; when a watchdog is asked for, asks the mount itself, through the
/// kernel, and reports only when it answers.
pub(super) fn live(running: &Arc<Running>) -> Watch {
    if !supervised() {
        return Watch { _stop: None };
    }
    let first = describe(&Control(Arc::clone(running)).status_now());
    tell(&[NotifyState::Ready, NotifyState::Status(&first)]);
    let (stop, stopped) = mpsc::channel();
    let watchdog = sd_notify::watchdog_enabled();
    let running = Arc::downgrade(running);
    let watching = thread::Builder::new().name("mirrorfs-watch".into()).spawn(move || {
        let mut said = first;
        let mut status_at = Instant::now();
        // Twice within the time that the supervisor allows, and no answer may take longer than what is left of it.
        let pace = watchdog.map_or(STATUS_EVERY, |w| (w / 3).clamp(Duration::from_millis(10), STATUS_EVERY));
        while let Err(mpsc::RecvTimeoutError::Timeout) = stopped.recv_timeout(pace) {
            let Some(running) = running.upgrade() else { return };
            if watchdog.is_some() {
                match running.answers(pace) {
                    Ok(()) => tell(&[NotifyState::Watchdog]),
                    Err(e) => log::error!("the mount does not answer ({e}): the watchdog is not told"),
                }
            }
            if status_at.elapsed() >= STATUS_EVERY {
                status_at = Instant::now();
                let now = describe(&Control(running).status_now());
                if now != said {
                    tell(&[NotifyState::Status(&now)]);
                    said = now;
                }
            }
        }
    });
    if let Err(e) = watching {
        log::error!("no thread for the supervisor's watchdog: {e}");
    }
    Watch { _stop: Some(stop) }
}

/// One line on how a mount fares.
fn describe(status: &Status) -> String {
    let mut line = format!("volume {} on {}", status.volume, status.mountpoint);
    if let Some(why) = &status.read_only {
        line.push_str(&format!("; read-only: {why}"));
    }
    for replica in &status.replicas {
        let behind = match replica.lag_segments {
            0 => String::new(),
            _ => format!(" behind by {:.1} MiB", replica.lag_bytes as f64 / f64::from(1 << 20)),
        };
        let state = match (replica.state, behind.is_empty()) {
            (ReplicaState::Healthy, true) => "ok".to_owned(),
            (ReplicaState::Healthy, false) => behind.trim_start().to_owned(),
            (other, _) => format!("{}{behind}", format!("{other:?}").to_lowercase()),
        };
        line.push_str(&format!("; {} {state}", replica.name));
    }
    escape::line(&line.replace('\n', " ")).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::tests::sample_status;

    #[test]
    fn the_line_of_status_names_what_is_behind() {
        let mut status = sample_status();
        status.replicas[0].lag_segments = 2;
        status.replicas[0].lag_bytes = 3 << 20;
        let line = describe(&status);
        assert!(line.contains("on /mnt/x") && line.contains("; a behind by 3.0 MiB"), "{line}");
        status.read_only = Some("two\nlines\x1b".into());
        status.replicas[0].lag_segments = 0;
        let line = describe(&status);
        assert!(line.contains("; read-only: two lines\\x1b; a ok"), "{line}");
    }
}
