//! What can go wrong in the journal, and what to do about it.
//!
//! Owns the error type of the module; every text names the place and the remedy. Knows no errno.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::ids::Lsn;

/// An error of the journal. Cheap to clone: many waiters may get the same one.
#[derive(Clone, Debug, thiserror::Error)]
pub enum JournalError {
    /// A write or sync failed earlier (or somebody called `poison`): reads go on, changes do not.
    #[error("the journal takes no more changes since this happened: {0}; restart to recover from the tail")]
    Poisoned(String),
    /// Stored bytes are not what was written. Nothing of them was used.
    #[error("{0}; quarantine the journal and rebuild it from a replica")]
    Damaged(String),
    /// An import did not reach its end; what is there is only a part.
    #[error("{0}; quarantine the journal and start the restore again")]
    Incomplete(String),
    /// The operating system refused something.
    #[error("cannot {what} {}: {source}", path.display())]
    Io {
        /// What was tried, as an infinitive.
        what: &'static str,
        /// On which file or directory.
        path: PathBuf,
        /// The refusal.
        source: Arc<io::Error>,
    },
    /// No space left on the local disk. Goes away by itself when there is space again.
    #[error("no space left on the disk of {}: free some; nothing acknowledged is lost", path.display())]
    Full {
        /// The file or directory that needed the space.
        path: PathBuf,
    },
    /// Another process (or another handle of this one) has it open.
    #[error("{} is in use by another process: stop that one first", path.display())]
    Locked {
        /// The locked file.
        path: PathBuf,
    },
    /// The journal was closed.
    #[error("the journal is closed")]
    Closed,
    /// A key or value beyond what the store can hold safely.
    #[error("a {what} of {len} bytes exceeds the limit of {limit}")]
    TooLarge {
        /// "key" or "value".
        what: &'static str,
        /// Its length in bytes.
        len: usize,
        /// The longest allowed.
        limit: usize,
    },
    /// Records were asked for that the tail no longer holds.
    #[error("records after {after} were asked for, but the tail begins with {oldest}")]
    Gone {
        /// What was asked for.
        after: Lsn,
        /// The oldest record at hand.
        oldest: Lsn,
    },
    /// So much was changed since a snapshot was taken that it cannot be kept.
    #[error("too much was changed meanwhile: try again when less is written")]
    Outrun,
    /// A counter has no number left that was not given before.
    #[error("{0}")]
    Numbers(String),
    /// An import into a journal that already holds something.
    #[error("an import needs a fresh journal; this one is at record {last}: quarantine it first")]
    NotFresh {
        /// Its newest record.
        last: Lsn,
    },
}

impl JournalError {
    /// Wraps an operating system's error; "no space" becomes [`JournalError::Full`].
    pub(super) fn io(what: &'static str, path: &Path, source: io::Error) -> Self {
        if is_full(&source) {
            return Self::Full { path: path.to_owned() };
        }
        Self::Io { what, path: path.to_owned(), source: Arc::new(source) }
    }
}

/// Whether an error says that disk or quota is exhausted.
pub(super) fn is_full(e: &io::Error) -> bool {
    // sled hands on copies of errors, which have lost the system's number.
    matches!(e.raw_os_error(), Some(libc::ENOSPC | libc::EDQUOT))
        || matches!(e.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}
