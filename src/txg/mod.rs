//! Transaction groups: the cut, sealing into segments, staging on local disk.
//!
//! Owns the order "freeze, seal, stage durably, register, publish". Knows no replica: shippers read the staging area.

mod engine;
mod prepare;
mod seal;
mod staging;
mod writers;

pub use engine::{AfterSeal, Engine, EngineOptions, Progress};
pub use seal::{SEGMENT_TARGET, SealError, Sealer};
pub use staging::{Staging, StagingError};

use crate::cache::dirty::DirtyBlock;
use crate::ids::Lsn;
use std::sync::Arc;

/// One transaction group, as the cut found it.
pub struct Cut {
    /// The state it completes: every record up to here.
    pub lsn: Lsn,
    /// The blocks it froze that are in no segment yet.
    pub frozen: Vec<Arc<DirtyBlock>>,
}

/// Whoever collects changes: the filesystem.
pub trait CutSource: Send + Sync {
    /// Ends the collecting transaction group: the state of this moment, exactly. An error means that nothing was cut.
    fn cut(&self) -> Result<Cut, String>;
    /// Whether anything waits that is not in the journal yet.
    fn has_pending(&self) -> bool;
}
