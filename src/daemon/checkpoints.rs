//! When a checkpoint is due, and making one.
//!
//! Owns the rule. Runs on the sealing thread, between two groups.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::checkpoint::{Begin, End, Finished, dump};
use crate::format::local::SegmentValue;
use crate::format::segment::SegmentHash;
use crate::format::tables::{checkpoint_key, segment_key};
use crate::ids::{Epoch, SegmentNo, VolumeId};
use crate::journal::{Journal, JournalError};
use crate::replica::{Staged, StagedKind};
use crate::txg::{CutSource, Sealer, Staging};

/// A checkpoint is not due before the log since the last one has this many bytes, ...
pub(super) const LEAST_LOG: u64 = 4 << 20;
/// ... or this many segments: a restore needs a request for each of them.
pub(super) const LEAST_SEGMENTS: u64 = 256;
/// A request costs a restore about as much time as this many bytes of a checkpoint.
const REQUEST_BYTES: u64 = 64 << 10;

/// What the log since the last checkpoint amounts to.
#[derive(Clone, Copy, Debug)]
struct Log {
    bytes: u64,
    segments: u64,
}

/// Returns true if a checkpoint is due: the log since the last one outgrows that, in bytes or in
/// requests, so that restoring from it costs more than twice what a new one would.
fn is_due(log: Log, least: Log, last_checkpoint: u64) -> bool {
    log.bytes >= least.bytes.max(last_checkpoint)
        || log.segments >= least.segments.max(last_checkpoint / REQUEST_BYTES)
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
    /// Segments before which none is due.
    pub least_segments: u64,
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
        let log = Log { bytes: mark.log_bytes, segments: mark.segment.0.saturating_sub(mark.checkpoint.0) };
        let least = Log { bytes: self.least_log, segments: self.least_segments };
        if mark.segment.0 == 0 || !(lost || is_due(log, least, self.last_len)) {
            return Ok(());
        }
        // It is worth no writer's space; the next group asks again.
        if !self.staging.has_room(self.last_len.max(LEAST_LOG)) {
            log::debug!("a checkpoint is due, and put off for want of space");
            return Ok(());
        }
        let last = self.segment(mark.segment)?;
        if last.epoch != self.epoch {
            // Sealed by an earlier mount. A checkpoint of our epoch under its number would belong to no branch.
            return Ok(());
        }
        let begin = Begin {
            volume: self.volume,
            lsn: last.commit,
            replay_from: mark.segment.next(),
            previous: SegmentHash(mark.blake3),
        };
        let building = self.staging.checkpoints().join("building");
        let made = self.make(sealer, begin, &building);
        // What there is of it only takes space.
        let _ = std::fs::remove_dir_all(&building);
        let finished = made?;
        let folder = finished.path.clone();
        let named = self.log_it(sealer, &finished).inspect_err(|_| {
            let _ = std::fs::remove_dir_all(&folder);
        })?;
        let (number, entries) = (finished.manifest.number, finished.manifest.entries);
        log::info!("checkpoint as of segment {number}: {entries} entries, {} bytes", self.last_len);
        let staged = Staged {
            kind: StagedKind::Checkpoint,
            number,
            epoch: self.epoch,
            path: finished.path,
            len: self.last_len,
            cut_at: super::unix_now(),
        };
        self.staging.publish_checkpoint(staged, named);
        Ok(())
    }

    /// What the tables say of a sealed segment.
    fn segment(&self, number: SegmentNo) -> Result<SegmentValue, String> {
        let value = self.journal.get(&segment_key(number)).map_err(|e| e.to_string())?;
        let value = value.ok_or_else(|| format!("segment {number} is not in the tables"))?;
        SegmentValue::decode(&value).map_err(|e| e.to_string())
    }

    /// Dumps the tables and seals the group that makes the dump usable.
    fn make(&mut self, sealer: &mut Sealer, begin: Begin, building: &Path) -> Result<Finished, String> {
        let scan = |start: &[u8], end: &[u8], limit: usize| self.journal.scan(start, end, limit);
        let dumped = dump(&scan, begin, building).map_err(|e| e.to_string())?;
        let seen = self.journal.last_lsn();
        // What the scan saw may be newer than the last group: the next one, cut now, covers it.
        let cut = self.source.cut()?;
        let sealed = sealer.seal(&cut, super::wall_clock()).map_err(|e| e.to_string())?;
        let number = sealer.mark().segment;
        let commit_lsn = self.segment(number)?.commit;
        // Nothing sealed: nothing replicated has changed since the last group, and the scan saw
        // exactly that.
        let lsn = if sealed.is_some() { seen } else { begin.lsn };
        let end = End { lsn, number, epoch: self.epoch, commit_lsn, created_at: super::unix_now() as u64 };
        self.last_len = dumped.len();
        dumped.finish(end, &self.staging.checkpoints()).map_err(|e| e.to_string())
    }

    /// Writes name and hash of a checkpoint into the log, and seals that at once: a replica gets
    /// the checkpoint only after the segment that names it, which is returned.
    fn log_it(&self, sealer: &mut Sealer, finished: &Finished) -> Result<SegmentNo, String> {
        let number = finished.manifest.number;
        sealer.checkpointed(number).map_err(|e| e.to_string())?;
        let logged = self.journal.transact::<_, JournalError>(|tx| {
            tx.put(checkpoint_key(number, self.epoch), finished.hash.0.to_vec());
            Ok(())
        });
        logged.map_err(|e| e.to_string())?;
        let cut = self.source.cut()?;
        sealer.seal(&cut, super::wall_clock()).map_err(|e| e.to_string())?;
        Ok(sealer.mark().segment)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn due(bytes: u64, segments: u64, last: u64) -> bool {
        let least = Log { bytes: LEAST_LOG, segments: LEAST_SEGMENTS };
        is_due(Log { bytes, segments }, least, last)
    }

    #[test]
    fn due_when_the_log_outgrows_the_last_one() {
        assert!(!due(LEAST_LOG - 1, 1, 0));
        assert!(due(LEAST_LOG, 1, 0));
        assert!(!due(LEAST_LOG * 2, 1, LEAST_LOG * 3));
        assert!(due(LEAST_LOG * 3, 1, LEAST_LOG * 3));
    }

    #[test]
    fn due_when_many_small_groups_cost_a_request_each() {
        assert!(!due(1000, LEAST_SEGMENTS - 1, 0));
        assert!(due(1000, LEAST_SEGMENTS, 0));
        // A checkpoint of 64 MiB is worth a thousand requests.
        assert!(!due(1000, 1023, 64 << 20));
        assert!(due(1000, 1024, 64 << 20));
    }
}
