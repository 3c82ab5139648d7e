//! When a checkpoint is due, and making one.
//!
//! Owns the rule. Runs on the sealing thread, between two groups.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::checkpoint::{Begin, End, dump};
use crate::format::local::SegmentValue;
use crate::format::segment::SegmentHash;
use crate::format::tables::segment_key;
use crate::ids::{Epoch, Lsn, VolumeId};
use crate::journal::Journal;
use crate::replica::{Staged, StagedKind};
use crate::txg::{CutSource, Sealer, Staging};

/// A checkpoint is not due before the log since the last one has this many bytes.
pub(super) const LEAST_LOG: u64 = 4 << 20;

/// Whether a checkpoint is due: when the log since the last one outgrows it, restoring from it costs more than twice
/// what a new one would.
fn is_due(log_bytes: u64, least_log: u64, last_checkpoint: u64) -> bool {
    log_bytes >= least_log.max(last_checkpoint)
}

/// Makes checkpoints as they fall due.
pub(super) struct Checkpoints {
    pub journal: Arc<Journal>,
    pub staging: Arc<Staging>,
    pub source: Arc<dyn CutSource>,
    pub volume: VolumeId,
    pub epoch: Epoch,
    /// Bytes of log before which none is due.
    pub least_log: u64,
    /// Bytes of the last checkpoint; 0 when unknown.
    pub last_len: u64,
    /// A checkpoint up to this segment is damaged everywhere: a newer one is due at once.
    pub wanted: Arc<AtomicU64>,
}

impl Checkpoints {
    /// To be called behind each sealed group.
    pub fn after_seal(&mut self, sealer: &mut Sealer) -> Result<(), String> {
        let mark = *sealer.mark();
        let replace = self.wanted.load(Ordering::Relaxed);
        let lost = replace > 0 && mark.checkpoint.0 <= replace && mark.segment.0 > replace;
        if mark.segment.0 == 0 || !(lost || is_due(mark.log_bytes, self.least_log, self.last_len)) {
            return Ok(());
        }
        // It is worth no writer's space; the next group asks again.
        if !self.staging.has_room(self.last_len.max(LEAST_LOG)) {
            log::debug!("a checkpoint is due, and put off for want of space");
            return Ok(());
        }
        let commit = |number| -> Result<Lsn, String> {
            let value = self.journal.get(&segment_key(number)).map_err(|e| e.to_string())?;
            let value = value.ok_or_else(|| format!("segment {number} is not in the tables"))?;
            Ok(SegmentValue::decode(&value).map_err(|e| e.to_string())?.commit)
        };
        let begin = Begin {
            volume: self.volume,
            lsn: commit(mark.segment)?,
            replay_from: mark.segment.next(),
            previous: SegmentHash(mark.blake3),
        };
        let area = self.staging.checkpoints();
        let scan = |start: &[u8], end: &[u8], limit: usize| self.journal.scan(start, end, limit);
        let building = area.join("building");
        let dumped = dump(&scan, begin, &building).map_err(|e| {
            // What there is of it only takes space.
            let _ = std::fs::remove_dir_all(&building);
            e.to_string()
        })?;
        let seen = self.journal.last_lsn();
        // What the scan saw may be newer than the last group: the next one, cut now, covers it.
        let cut = self.source.cut()?;
        let sealed = sealer.seal(&cut, super::wall_clock()).map_err(|e| e.to_string())?;
        let number = sealer.mark().segment;
        let commit_lsn = commit(number)?;
        // Nothing sealed: nothing replicated has changed since the last group, and the scan saw exactly that.
        let lsn = if sealed.is_some() { seen } else { begin.lsn };
        let end = End { lsn, number, epoch: self.epoch, commit_lsn, created_at: super::unix_now() as u64 };
        let len = dumped.len();
        let (path, manifest) = dumped.finish(end, &area).map_err(|e| e.to_string())?;
        self.last_len = len;
        sealer.checkpointed(number).map_err(|e| e.to_string())?;
        log::info!("checkpoint as of segment {number}: {} entries, {len} bytes", manifest.entries);
        self.staging.publish_checkpoint(Staged {
            kind: StagedKind::Checkpoint,
            number,
            epoch: self.epoch,
            path,
            len,
            cut_at: super::unix_now(),
        });
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn due_when_the_log_outgrows_the_last_one() {
        assert!(!is_due(LEAST_LOG - 1, LEAST_LOG, 0));
        assert!(is_due(LEAST_LOG, LEAST_LOG, 0));
        assert!(!is_due(LEAST_LOG * 2, LEAST_LOG, LEAST_LOG * 3));
        assert!(is_due(LEAST_LOG * 3, LEAST_LOG, LEAST_LOG * 3));
    }
}
