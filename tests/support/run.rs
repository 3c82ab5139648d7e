//! Running programs with a deadline, so that a hang is a failure with words.

use std::io::Read;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

/// How a program ended.
pub struct Ran {
    /// Its exit code; `None` when a signal ended it, ours after the deadline among them.
    pub code: Option<i32>,
    /// What it printed.
    pub stdout: Vec<u8>,
    /// What it complained.
    pub stderr: String,
    /// How it was called, for messages.
    pub call: String,
}

impl Ran {
    /// Panics with everything there is to know unless it ended with 0.
    #[track_caller]
    pub fn ok(self) -> Self {
        self.with_code(0)
    }

    /// Panics with everything there is to know unless it ended with `code`.
    #[track_caller]
    pub fn with_code(self, code: i32) -> Self {
        assert!(
            self.code == Some(code),
            "{}\nended with {:?}, not {code}\nstdout: {}\nstderr: {}",
            self.call,
            self.code,
            String::from_utf8_lossy(&self.stdout),
            self.stderr
        );
        self
    }

    /// Panics unless it complained of each of these.
    #[track_caller]
    pub fn says(self, words: &[&str]) -> Self {
        for word in words {
            assert!(self.stderr.contains(word), "{}\ndoes not say {word:?} but: {}", self.call, self.stderr);
        }
        self
    }

    /// What it printed, as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).trim().to_owned()
    }
}

/// Runs `command` to its end, or kills it and its children after `limit`.
#[track_caller]
pub fn run(command: &mut Command, limit: Duration) -> Ran {
    let call = format!("{command:?}");
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).process_group(0);
    let mut child = command.spawn().unwrap_or_else(|e| panic!("{call}: {e}"));
    let drain = |mut pipe: Box<dyn Read + Send>| {
        thread::spawn(move || {
            let mut bytes = Vec::new();
            let _ = pipe.read_to_end(&mut bytes);
            bytes
        })
    };
    let stdout = drain(Box::new(child.stdout.take().unwrap()));
    let stderr = drain(Box::new(child.stderr.take().unwrap()));
    let until = Instant::now() + limit;
    let mut late = false;
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        if Instant::now() > until && !late {
            late = true;
            // SAFETY: our own child's process group, which is not reaped yet.
            unsafe { libc::kill(-i32::try_from(child.id()).unwrap(), libc::SIGKILL) };
        }
        thread::sleep(Duration::from_millis(5));
    };
    let mut stderr = String::from_utf8_lossy(&stderr.join().unwrap()).into_owned();
    if late {
        stderr.push_str(&format!("\n(killed: still running after {limit:?})"));
    }
    Ran { code: status.code(), stdout: stdout.join().unwrap(), stderr, call }
}

/// The program under test, in an environment without settings of ours.
pub fn mirrorfs() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_mirrorfs"));
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("MIRRORFS_") {
            command.env_remove(name);
        }
    }
    // The disk of the machine that tests may be as full as it likes.
    command.env("MIRRORFS_FREE_SPACE_RATIO", "0");
    command
}

/// Whether a tool is there; says visibly when it is not.
pub fn has_tool(test: &str, tool: &str) -> bool {
    let found = std::env::var_os("PATH")
        .is_some_and(|path| std::env::split_paths(&path).any(|dir| dir.join(tool).is_file()));
    if !found {
        println!("SKIP: {test}: {tool} is not installed");
    }
    found
}

/// Whether we are root.
pub fn is_root() -> bool {
    // SAFETY: no preconditions.
    unsafe { libc::geteuid() == 0 }
}

/// Waits until `done`; panics after `limit`.
#[track_caller]
pub fn wait_until(limit: Duration, what: &str, mut done: impl FnMut() -> bool) {
    let until = Instant::now() + limit;
    while !done() {
        assert!(Instant::now() < until, "not within {limit:?}: {what}");
        thread::sleep(Duration::from_millis(50));
    }
}

/// The seed of a random test: `MIRRORFS_TEST_SEED`, or a fresh one. Printed, so that a failure can be repeated.
pub fn seed(test: &str) -> u64 {
    let given = std::env::var("MIRRORFS_TEST_SEED").ok().map(|s| s.parse().unwrap());
    let seed = given.unwrap_or_else(rand::random);
    println!("{test}: MIRRORFS_TEST_SEED={seed}");
    seed
}
