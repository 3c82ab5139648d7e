//! The guardian: the daemon's parent, which starts it again when it dies.
//!
//! Owns when a daemon is started, when that stops, and what is noted about a death. Knows nothing of volumes and replicas.
//!
//! A mount whose daemon was killed answers `ENOTCONN`. The guardian leaves it in place, so that the folder below never shows,
//! and starts the daemon again, which puts its new mount in the place of the dead one ([`crate::fuse`]). The guardian is the
//! process that a supervisor or a shell sees: it passes signals on to the daemon and ends with the daemon's exit code.

mod policy;
mod process;
mod report;
mod run;

pub use report::{Line, Report};
pub use run::{Guarded, run};
