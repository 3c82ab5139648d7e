//! The guardian's loop: starts the daemon, passes signals on, and acts on what [`Policy`] decides.

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitStatus;
use std::time::{Duration, Instant};

use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, ChildStdout};
use tokio::signal::unix::{Signal, SignalKind, signal};

use super::policy::{Ended, MOST_DEATHS, Next, Policy};
use super::process::{Launch, describe, guard_memory};
use super::report::Line;
use crate::control::{CrashNote, Then};
use crate::daemon::{ReadyInfo, last_mount, note_crash, noted_end, reopen_log};
use crate::exit::Exit;
use crate::fuse::placeholder::{Placeholder, is_permitted, mounts_directly};
use crate::fuse::{MountIdentity, Presence, abort_connection};
use crate::replica::unix_now;

/// A dead mount answers at once.
const ANSWER: Duration = Duration::from_secs(5);
/// How often a user's guardian looks whether its placeholder shows.
const LOOK_EVERY: Duration = Duration::from_millis(500);

/// Variable with the number of deaths in a minute that are a crash loop, for tests that kill often.
const TEST_DEATHS: &str = "MIRRORFS_TEST_DEATHS";

fn most_deaths() -> usize {
    let wanted = std::env::var(TEST_DEATHS).ok().and_then(|v| v.parse().ok());
    wanted.inspect(|n| log::warn!("{n} deaths in a minute are a crash loop, because {TEST_DEATHS} is set"));
    wanted.unwrap_or(MOST_DEATHS)
}

/// What to guard.
#[derive(Clone, Debug)]
pub struct Guarded {
    /// `mount` and its arguments, without the program.
    pub arguments: Vec<OsString>,
    /// Working directory of the person who mounts.
    pub cwd: PathBuf,
    /// Where it is mounted; absolute.
    pub mountpoint: PathBuf,
    /// The local state folder.
    pub state: PathBuf,
    /// The daemon's log, if it has one of its own.
    pub log: Option<PathBuf>,
    /// The daemon is killed when the guardian dies: who started the guardian sees only that one.
    pub tied: bool,
    /// A daemon that has died is started again.
    pub restart: bool,
}

/// Guards a mount until it is gone, or stays dead. `ready` is called once: when the mount is live, or with the reason why
/// it cannot be (which the daemon has written to standard error, too).
///
/// # Errors
/// The code to end with, and what there is to say beyond what the daemon has said; it may be empty.
pub fn run(
    guarded: Guarded,
    ready: impl FnOnce(Result<&ReadyInfo, (Exit, &str)>),
) -> Result<(), (Exit, String)> {
    let failed = |e: std::io::Error| (Exit::Failure, format!("the guardian cannot run: {e}"));
    let oom_score = guard_memory();
    if let Err(e) = std::env::set_current_dir("/") {
        log::debug!("cannot leave the working directory: {e}");
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(failed)?;
    runtime.block_on(async {
        let mut ready = Some(ready);
        let mut tell = |line: Result<&ReadyInfo, (Exit, &str)>| {
            if let Some(ready) = ready.take() {
                ready(line);
            }
        };
        let outcome = match Guardian::new(guarded, oom_score) {
            Ok(mut guardian) => guardian.watch(&mut tell).await,
            Err(error) => Err(error),
        };
        if let Err((exit, message)) = &outcome {
            tell(Err((*exit, message)));
        }
        outcome
    })
}

type Tell<'a> = dyn FnMut(Result<&ReadyInfo, (Exit, &str)>) + 'a;

/// The signals that are passed on to the daemon.
struct Signals {
    term: Signal,
    int: Signal,
    hup: Signal,
}

impl Signals {
    fn catch() -> std::io::Result<Self> {
        let catch = |kind: SignalKind| signal(kind);
        Ok(Self {
            term: catch(SignalKind::terminate())?,
            int: catch(SignalKind::interrupt())?,
            hup: catch(SignalKind::hangup())?,
        })
    }

    async fn next(&mut self) -> libc::c_int {
        tokio::select! {
            _ = self.term.recv() => libc::SIGTERM,
            _ = self.int.recv() => libc::SIGINT,
            _ = self.hup.recv() => libc::SIGHUP,
        }
    }
}

/// A daemon that has ended.
struct Life {
    /// Its process; 0 when it could not be started.
    pid: u32,
    /// How it ended, in words.
    how: String,
    status: Option<ExitStatus>,
}

struct Guardian {
    guarded: Guarded,
    launch: Launch,
    policy: Policy,
    signals: Signals,
    placeholder: Option<Placeholder>,
    /// This user may mount without the helper. Otherwise only a placeholder keeps the folder below from showing while the
    /// helper replaces the dead mount.
    direct: bool,
    /// The mount that was live last.
    mount: Option<MountIdentity>,
    /// A signal has asked for the end.
    asked: bool,
}

impl Guardian {
    fn new(guarded: Guarded, oom_score: Option<i32>) -> Result<Self, (Exit, String)> {
        let failed = |e: std::io::Error| (Exit::Failure, format!("signals cannot be caught: {e}"));
        let signals = Signals::catch().map_err(failed)?;
        let direct = mounts_directly();
        let placeholder = (!direct && is_permitted())
            .then(|| Placeholder::mount(&guarded.mountpoint))
            .transpose()
            .map_err(|e| (Exit::Failure, e.to_string()))?;
        let launch = Launch {
            arguments: guarded.arguments.clone(),
            cwd: guarded.cwd.clone().into_os_string(),
            tied: guarded.tied,
            oom_score,
        };
        let policy = Policy::new(guarded.restart, most_deaths());
        Ok(Self { guarded, launch, policy, signals, placeholder, direct, mount: None, asked: false })
    }

    /// Starts daemons until nothing is to be started any more.
    async fn watch(&mut self, tell: &mut Tell<'_>) -> Result<(), (Exit, String)> {
        let mut again = false;
        loop {
            let lived = match self.live(again, tell).await {
                Ok((pid, status)) => Life { pid, how: self.describe(status), status: Some(status) },
                // For want of memory or processes, which may be what the last one died of.
                Err(e) if again => Life { pid: 0, how: format!("cannot be started: {e}"), status: None },
                Err(e) => return Err((Exit::Failure, format!("the daemon cannot be started: {e}"))),
            };
            let mount = self.what_is_left(again, &lived).await;
            again = true;
            let ended = Ended { was_live: self.mount.is_some(), asked: self.asked, mount };
            let end = || lived.status.map_or(Ok(()), as_daemon);
            match self.policy.next(ended, Instant::now()) {
                Next::End => return end(),
                Next::Remove => {
                    self.remove_dead();
                    return end();
                }
                Next::Stay => return Err(self.stays(&lived, Then::Stays)),
                Next::GiveUp => return Err(self.stays(&lived, Then::GaveUp)),
                Next::Restart(_) if !(self.direct || self.placeholder.is_some()) => {
                    return Err(self.stays(&lived, Then::WouldShow));
                }
                Next::Restart(pause) => {
                    self.note(&lived, Then::Restarts);
                    log::error!("the daemon (process {}) died: {}; starting it again", lived.pid, lived.how);
                    if !self.wait(pause).await {
                        self.remove_dead();
                        return Ok(());
                    }
                }
            }
        }
    }

    fn describe(&self, status: ExitStatus) -> String {
        describe(status, self.guarded.log.as_deref())
    }

    /// What became of the mount when a daemon has ended.
    async fn what_is_left(&mut self, again: bool, lived: &Life) -> Presence {
        let noted = last_mount(&self.guarded.state, lived.pid);
        let is_new = noted.is_some();
        self.mount = noted.or(self.mount.take());
        let left = self.presence().await;
        // A daemon that dies while it replaces the dead mount has taken that away and noted no mount of its own.
        let unmounted = Some(i32::from(Exit::NotMounted.code()));
        let in_order = lived.status.is_some_and(|s| s.success() || s.code() == unmounted)
            || noted_end(&self.guarded.state, lived.pid);
        if left == Presence::Gone && again && !is_new && !in_order && self.is_held().await {
            return Presence::Dead;
        }
        left
    }

    /// Whether a dead mount or our placeholder is at the mountpoint.
    async fn is_held(&self) -> bool {
        if self.placeholder.as_ref().is_some_and(Placeholder::is_there) {
            return true;
        }
        let mountpoint = self.guarded.mountpoint.clone();
        let ask = tokio::task::spawn_blocking(move || crate::fuse::is_gone(&mountpoint));
        tokio::time::timeout(ANSWER, ask).await.is_ok_and(|asked| asked.unwrap_or(false))
    }

    /// Starts a daemon and waits for its end.
    async fn live(&mut self, again: bool, tell: &mut Tell<'_>) -> std::io::Result<(u32, ExitStatus)> {
        let mut child = self.launch.start(again)?;
        let pid = child.id().unwrap_or(0);
        let mut line = child.stdout.take().map(|pipe| BufReader::new(pipe).lines());
        let mut look = tokio::time::interval(LOOK_EVERY);
        let mut covered = false;
        loop {
            tokio::select! {
                report = next_line(&mut line), if line.is_some() => {
                    line = None;
                    match report {
                        Some(Line::Ready(info)) => {
                            covered = true;
                            self.mount = last_mount(&self.guarded.state, pid).or(self.mount.take());
                            if again {
                                log::info!("the daemon lives again (process {pid})");
                            }
                            tell(Ok(&info));
                        }
                        Some(Line::Failed { exit, message }) => tell(Err((exit, &message))),
                        None => {}
                    }
                }
                signal = self.signals.next() => {
                    self.asked |= signal != libc::SIGHUP;
                    if signal == libc::SIGHUP && self.guarded.log.is_some() {
                        reopen_log(self.guarded.log.as_deref());
                    }
                    // Before it is live, the daemon may not have caught SIGHUP yet.
                    if signal != libc::SIGHUP || covered {
                        pass_on(&child, signal);
                    }
                }
                _ = look.tick(), if covered && self.placeholder.is_some() => {
                    // Somebody unmounted the volume. What the daemon still does is nobody's business.
                    if self.placeholder.as_ref().is_some_and(|p| !p.is_covered()) {
                        self.placeholder = None;
                    }
                }
                status = child.wait() => return Ok((pid, status?)),
            }
        }
    }

    /// Waits before a restart; false when somebody asks for the end meanwhile, or takes the dead mount away.
    async fn wait(&mut self, pause: Duration) -> bool {
        let end = tokio::time::Instant::now() + pause;
        loop {
            tokio::select! {
                () = tokio::time::sleep_until(end) => break,
                signal = self.signals.next() => {
                    if signal != libc::SIGHUP {
                        return false;
                    }
                }
            }
        }
        self.presence().await == Presence::Dead
    }

    /// What became of the mount that was live last.
    async fn presence(&self) -> Presence {
        let Some(mount) = self.mount.clone() else { return Presence::Gone };
        let device = mount.device.clone();
        let ask = tokio::task::spawn_blocking(move || mount.presence());
        match tokio::time::timeout(ANSWER, ask).await {
            Ok(Ok(presence)) => presence,
            // No answer: nobody serves it, and something keeps the connection open. Its users would wait for ever.
            _ => {
                if let Err(e) = abort_connection(&device, &self.guarded.mountpoint) {
                    log::error!(
                        "{}: programs there may wait for ever: {e}",
                        self.guarded.mountpoint.display()
                    );
                }
                Presence::Dead
            }
        }
    }

    fn remove_dead(&self) {
        if let Err(e) = crate::fuse::remove_dead(&self.guarded.mountpoint) {
            log::error!("the dead mount at {} stays: {e}", self.guarded.mountpoint.display());
        }
    }

    /// Notes a death after which the mount stays dead; returns how the guardian ends.
    fn stays(&mut self, lived: &Life, then: Then) -> (Exit, String) {
        self.note(lived, then);
        let (pid, how) = (lived.pid, &lived.how);
        // Unserved from now on, it still hides the folder below.
        std::mem::forget(self.placeholder.take());
        let exit = if then == Then::GaveUp { Exit::Crashed } else { Exit::Failure };
        let why = then.meaning();
        let mountpoint = self.guarded.mountpoint.display();
        let message = format!(
            "the daemon of {mountpoint} (process {pid}) died: {how}. {why}. Everything that was fsynced is safe in {}. \
             To go on, mount again; to remove the dead mount: mirrorfs umount {mountpoint}",
            self.guarded.state.display()
        );
        (exit, message)
    }

    fn note(&self, lived: &Life, then: Then) {
        let note = CrashNote { at: unix_now(), pid: lived.pid, how: lived.how.clone(), then };
        if let Err(e) = note_crash(&self.guarded.state, &note) {
            log::warn!("the death of the daemon cannot be noted in {}: {e}", self.guarded.state.display());
        }
    }
}

/// The report, or `None` when the daemon ends without one.
async fn next_line(lines: &mut Option<tokio::io::Lines<BufReader<ChildStdout>>>) -> Option<Line> {
    let text = lines.as_mut()?.next_line().await.ok()??;
    serde_json::from_str(&text).ok()
}

fn pass_on(child: &Child, signal: libc::c_int) {
    let Some(pid) = child.id().and_then(|pid| i32::try_from(pid).ok()) else { return };
    // SAFETY: our own child, which is not reaped yet.
    unsafe { libc::kill(pid, signal) };
}

/// The daemon has said why it ended.
fn as_daemon(status: ExitStatus) -> Result<(), (Exit, String)> {
    match status.code() {
        Some(0) => Ok(()),
        code => {
            let exit = code.and_then(|code| u8::try_from(code).ok()).map_or(Exit::Failure, Exit::from_code);
            Err((exit, String::new()))
        }
    }
}
