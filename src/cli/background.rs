//! The guardian's process in the background: how it is started, and how the command learns whether the mount is live.
//!
//! The program starts itself again rather than forking, because a fork of a process with threads is a trap. The child's
//! standard output is a pipe to the parent; the child takes it away from everyone else, writes one line of JSON
//! ([`Line`]), and closes it. If the child dies before that, its last words are read from the log.

use std::ffi::OsString;
use std::fs::File;
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use tokio::signal::unix::{SignalKind, signal};

use super::{CommandError, output};
use crate::config::state;
use crate::daemon::ReadyInfo;
use crate::exit::Exit;
use crate::guardian::Line;

/// Name of the log in the state folder.
pub(super) const LOG: &str = "daemon.log";
/// A log larger than this is set aside when the daemon starts; one older one is kept.
const LOG_LIMIT: u64 = 16 << 20;
/// After this long the person is told that it takes time.
const PATIENCE: Duration = Duration::from_secs(5);
/// Lines of the log shown when the daemon died without a word.
const LAST_WORDS: usize = 10;

/// Starts this program again with the same arguments, in the background, and waits for its report. When it fails and
/// the state folder was `made` for it, that is taken away again with the log in it, which is shown instead.
pub(super) fn start(
    arguments: &[OsString],
    state: &Path,
    made: Option<&Path>,
) -> Result<ReadyInfo, CommandError> {
    let failed =
        |what: &str, error: std::io::Error| CommandError::new(Exit::Failure, format!("{what}: {error}"));
    let path = state.join(LOG);
    let mut log =
        open_log(&path).map_err(|error| failed(&format!("cannot write {}", path.display()), error))?;
    let begin = log.seek(SeekFrom::End(0)).unwrap_or(0);
    let program =
        std::env::current_exe().map_err(|error| failed("cannot tell which program this is", error))?;
    let mut child = Command::new(program)
        // Whatever the file is called: `mount.mirrorfs` would read the arguments as those of mount(8).
        .arg0("mirrorfs")
        .args(arguments.iter().skip(1))
        .arg("--ready-on-stdout")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(log)
        .spawn()
        .map_err(|error| failed("cannot start the daemon", error))?;
    let (mut error, silent) = match super::runtime()?.block_on(wait_for_line(&mut child, &path)) {
        Ok(Some(Line::Ready(info))) => return Ok(info),
        Ok(Some(Line::Failed { exit, message })) => {
            // It is about to end; wait, so that its lock is free when this command returns.
            let _ = child.wait();
            (CommandError::new(exit, message), false)
        }
        Ok(None) => (died(&mut child), true),
        Err(error) => (error, false),
    };
    let words = last_lines(&path, begin).unwrap_or_default();
    let gone = made.is_some_and(|made| state::discard(state, made));
    // The daemon's own last line is what is about to be said.
    let words = words.strip_suffix(&format!("mirrorfs: {error}")).unwrap_or(&words).trim_end();
    if !words.is_empty() && (gone || silent) {
        words.lines().for_each(output::note);
    }
    if silent && !gone {
        error.message += &format!("; see {}", path.display());
    }
    Err(error)
}

async fn wait_for_line(child: &mut Child, log: &Path) -> Result<Option<Line>, CommandError> {
    let failed = |error| CommandError::new(Exit::Failure, format!("cannot wait for the daemon: {error}"));
    let mut term = signal(SignalKind::terminate()).map_err(failed)?;
    let mut int = signal(SignalKind::interrupt()).map_err(failed)?;
    let (sender, mut receiver) = tokio::sync::oneshot::channel();
    let Some(pipe) = child.stdout.take() else { return Ok(None) };
    std::thread::spawn(move || {
        let mut line = String::new();
        let read = BufReader::new(pipe).read_line(&mut line);
        let _ = sender.send(read.ok().and_then(|_| serde_json::from_str(&line).ok()));
    });
    let patience = tokio::time::sleep(PATIENCE);
    tokio::pin!(patience);
    let mut patient = true;
    loop {
        tokio::select! {
            line = &mut receiver => return Ok(line.ok().flatten()),
            () = &mut patience, if patient => {
                patient = false;
                output::note(&format!("still opening the volume; see {}", log.display()));
            }
            _ = term.recv() => break,
            _ = int.recv() => break,
        }
    }
    // The daemon must not appear later, when nobody expects it any more.
    // SAFETY: our own child, which is not reaped yet.
    unsafe { libc::kill(child.id().cast_signed(), libc::SIGTERM) };
    let until = Instant::now() + PATIENCE;
    while matches!(child.try_wait(), Ok(None)) && Instant::now() < until {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let message = match child.try_wait() {
        Ok(None) => format!("interrupted; the daemon (process {}) is ending", child.id()),
        _ => "interrupted; nothing is mounted".to_owned(),
    };
    Err(CommandError::new(Exit::Failure, message))
}

fn died(child: &mut Child) -> CommandError {
    let status = child.wait();
    let exit = match status.as_ref().ok().and_then(std::process::ExitStatus::code) {
        Some(code) => match u8::try_from(code).map(Exit::from_code) {
            Ok(Exit::Done) | Err(_) => Exit::Failure,
            Ok(exit) => exit,
        },
        None => Exit::Failure,
    };
    let how = status.map_or_else(|error| error.to_string(), |status| status.to_string());
    CommandError::new(exit, format!("the daemon ended before the mount was live ({how})"))
}

fn open_log(path: &Path) -> std::io::Result<File> {
    if std::fs::metadata(path).is_ok_and(|m| m.len() > LOG_LIMIT) {
        let mut old: PathBuf = path.to_owned();
        old.set_extension("log.old");
        std::fs::rename(path, old)?;
    }
    std::fs::OpenOptions::new().append(true).create(true).mode(0o600).open(path)
}

fn last_lines(path: &Path, begin: u64) -> std::io::Result<String> {
    let mut file = File::open(path)?;
    file.seek(SeekFrom::Start(begin))?;
    let mut bytes = Vec::new();
    file.take(1 << 20).read_to_end(&mut bytes)?;
    let text = String::from_utf8_lossy(&bytes);
    let lines: Vec<&str> = text.lines().collect();
    Ok(lines[lines.len().saturating_sub(LAST_WORDS)..].join("\n"))
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn the_last_words_are_those_of_this_start() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(LOG);
        std::fs::write(&path, "old\n").unwrap();
        let begin = 4;
        let lines: String = (1..=12).map(|n| format!("line {n}\n")).collect();
        open_log(&path).unwrap().write_all(lines.as_bytes()).unwrap();
        let words = last_lines(&path, begin).unwrap();
        assert_eq!(words.lines().count(), LAST_WORDS);
        assert!(words.starts_with("line 3\n") && words.ends_with("line 12"), "{words}");
        assert_eq!(last_lines(&path, 4 + lines.len() as u64).unwrap(), "");
    }

    #[test]
    fn a_large_log_is_set_aside() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(LOG);
        File::create(&path).unwrap().set_len(LOG_LIMIT + 1).unwrap();
        open_log(&path).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().len(), 0);
        assert_eq!(std::fs::metadata(dir.path().join("daemon.log.old")).unwrap().len(), LOG_LIMIT + 1);
    }
}
