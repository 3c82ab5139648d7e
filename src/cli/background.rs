//! The daemon's process in the background: how it is started, and how it says that the mount is live or cannot be.
//!
//! The program starts itself again rather than forking, because a fork of a process with threads is a trap. The child's
//! standard output is a pipe to the parent; the child takes it away from everyone else, writes one line of JSON, and
//! closes it. A child that dies before has its last words read from the log.

use std::ffi::OsString;
use std::fs::File;
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use super::{CommandError, output};
use crate::daemon::ReadyInfo;
use crate::exit::Exit;

/// Name of the log in the state folder.
const LOG: &str = "daemon.log";
/// A log larger than this is set aside when the daemon starts; one older one is kept.
const LOG_LIMIT: u64 = 16 << 20;
/// After this long the person is told that it takes time.
const PATIENCE: Duration = Duration::from_secs(5);
/// Lines of the log shown when the daemon died without a word.
const LAST_WORDS: usize = 10;

#[derive(Debug, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
enum Line {
    Ready(ReadyInfo),
    Failed { exit: Exit, message: String },
}

/// Starts this program again with the same arguments, in the background, and waits for its report.
pub(super) fn start(arguments: &[OsString], state: &Path) -> Result<ReadyInfo, CommandError> {
    let failed =
        |what: &str, error: std::io::Error| CommandError::new(Exit::Failure, format!("{what}: {error}"));
    let path = state.join(LOG);
    let mut log =
        open_log(&path).map_err(|error| failed(&format!("cannot write {}", path.display()), error))?;
    let begin = log.seek(SeekFrom::End(0)).unwrap_or(0);
    let program =
        std::env::current_exe().map_err(|error| failed("cannot tell which program this is", error))?;
    let mut child = Command::new(program)
        .args(arguments.iter().skip(1))
        .arg("--ready-on-stdout")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(log)
        .spawn()
        .map_err(|error| failed("cannot start the daemon", error))?;
    match wait_for_line(&mut child, &path) {
        Some(Line::Ready(info)) => Ok(info),
        Some(Line::Failed { exit, message }) => {
            // It is about to end; wait, so that its lock is free when this command returns.
            let _ = child.wait();
            Err(CommandError::new(exit, message))
        }
        None => Err(died(&mut child, &path, begin)),
    }
}

fn wait_for_line(child: &mut Child, log: &Path) -> Option<Line> {
    let (sender, receiver) = mpsc::channel();
    let pipe = child.stdout.take()?;
    std::thread::spawn(move || {
        let mut line = String::new();
        let read = BufReader::new(pipe).read_line(&mut line);
        let _ = sender.send(read.ok().and_then(|_| serde_json::from_str(&line).ok()));
    });
    if let Ok(line) = receiver.recv_timeout(PATIENCE) {
        return line;
    }
    output::note(&format!("still opening the volume; see {}", log.display()));
    receiver.recv().ok().flatten()
}

fn died(child: &mut Child, log: &Path, begin: u64) -> CommandError {
    let status = child.wait();
    let exit = match status.as_ref().ok().and_then(std::process::ExitStatus::code) {
        Some(code) => match u8::try_from(code).map(Exit::from_code) {
            Ok(Exit::Done) | Err(_) => Exit::Failure,
            Ok(exit) => exit,
        },
        None => Exit::Failure,
    };
    let how = status.map_or_else(|error| error.to_string(), |status| status.to_string());
    let words = last_lines(log, begin).unwrap_or_default();
    let words = if words.is_empty() { String::new() } else { format!(":\n{words}") };
    CommandError::new(
        exit,
        format!("the daemon ended before the mount was live ({how}); see {}{words}", log.display()),
    )
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

/// The child's way to report. Nothing else can write to it, and no further child inherits it.
#[derive(Debug)]
pub(super) struct Report {
    pipe: File,
}

impl Report {
    /// Takes standard output for itself, sends everyone else's output to standard error (the log), and leaves the
    /// terminal's session.
    pub fn take() -> Result<Report, CommandError> {
        let failed = |error: std::io::Error| {
            CommandError::new(Exit::Failure, format!("cannot run in the background: {error}"))
        };
        let pipe: OwnedFd = std::io::stdout().as_fd().try_clone_to_owned().map_err(failed)?;
        // SAFETY: both descriptors are open for the whole of the process; dup2 replaces the first atomically.
        if unsafe { libc::dup2(std::io::stderr().as_raw_fd(), libc::STDOUT_FILENO) } < 0 {
            return Err(failed(std::io::Error::last_os_error()));
        }
        // SAFETY: setsid has no preconditions. It fails for the leader of a group, which a started child is not; then
        // there is nothing lost but the separation from the terminal.
        if unsafe { libc::setsid() } < 0 {
            log::debug!("cannot leave the session: {}", std::io::Error::last_os_error());
        }
        Ok(Report { pipe: pipe.into() })
    }

    /// The mount is live.
    pub fn ready(self, info: &ReadyInfo) {
        self.send(&Line::Ready(info.clone()));
    }

    /// It cannot be.
    pub fn failed(self, exit: Exit, message: &str) {
        self.send(&Line::Failed { exit, message: message.to_owned() });
    }

    fn send(mut self, line: &Line) {
        let text = serde_json::to_string(line).unwrap_or_default() + "\n";
        // The command that waited may have been interrupted; the mount stays.
        if let Err(error) = self.pipe.write_all(text.as_bytes()) {
            log::debug!("nobody waits for the report: {error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_report_s_line_comes_back() {
        let line = Line::Failed { exit: Exit::InUse, message: "a\nb".into() };
        let text = serde_json::to_string(&line).unwrap();
        assert!(!text.contains('\n'));
        match serde_json::from_str(&text).unwrap() {
            Line::Failed { exit, message } => assert_eq!((exit, message.as_str()), (Exit::InUse, "a\nb")),
            Line::Ready(info) => panic!("{info:?}"),
        }
    }

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
