//! What lies in the log of a folder replica, read with nothing but the format.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use mirrorfs::format::segment::{SegmentMeta, verify_whole};
use mirrorfs::ids::{BlockHash, BlockId, Lsn, SegmentNo};

use super::mount::{bytes_of, segments};

/// A replica's log.
#[derive(Debug, Default)]
pub struct Log {
    /// Its segments, those that its claims say count, up to the first that is missing.
    pub segments: Vec<SegmentMeta>,
    /// Others lie behind that one, since several are sent at a time.
    pub hole: bool,
    /// Those that are not intact; they count as missing.
    pub damaged: Vec<PathBuf>,
}

/// What a log says of groups of content: those that commit what the one before committed.
#[derive(Debug, Default)]
pub struct Groups {
    /// How many there are.
    pub early: usize,
    /// Blocks of such groups at the end of the log, which nobody came to name.
    pub unnamed: usize,
    /// Segments behind the last commit.
    pub open: usize,
}

impl Log {
    /// Reads it from the folder of a replica.
    pub fn read(replica: &Path) -> Self {
        let mut claims = Vec::new();
        for (path, bytes) in bytes_of(&replica.join("epochs")) {
            let is_claim =
                path.extension().is_some_and(|x| x == "json") && !path.to_str().unwrap().contains("released");
            if let Some(claim) = serde_json::from_slice::<serde_json::Value>(&bytes).ok().filter(|_| is_claim)
            {
                claims.push((claim["epoch"].as_u64().unwrap(), claim["first_segment"].as_u64().unwrap()));
            }
        }
        let valid =
            |number: SegmentNo| claims.iter().filter(|(_, first)| *first <= number.0).map(|c| c.0).max();
        let (mut log, mut by_number) = (Self::default(), BTreeMap::new());
        for path in segments(replica) {
            match verify_whole(&fs::read(&path).unwrap()) {
                Ok(meta) => {
                    let header = &meta.footer.header;
                    if valid(header.number) == Some(u64::from(header.epoch.0)) {
                        by_number.insert(header.number, meta);
                    }
                }
                Err(_) => log.damaged.push(path),
            }
        }
        for (number, meta) in by_number {
            let previous = log.segments.last().map(|m| m.footer.hash).unwrap_or_default();
            log.hole |= number.0 != log.segments.len() as u64 + 1 || meta.footer.header.previous != previous;
            if log.hole {
                break;
            }
            log.segments.push(meta);
        }
        log
    }

    /// Looks at its groups; panics when the number of a block was given twice, or a group has neither records nor the commit of the
    /// group before.
    #[track_caller]
    pub fn groups(&self, what: &str) -> Groups {
        let (mut groups, mut commit, mut records, mut blocks) = (Groups::default(), Lsn(0), 0, 0);
        let mut known: BTreeMap<BlockId, (BlockHash, SegmentNo)> = BTreeMap::new();
        for meta in &self.segments {
            let number = meta.footer.header.number;
            for (id, entry) in &meta.index {
                let (before, at) = *known.entry(*id).or_insert((entry.hash, number));
                assert!(
                    before == entry.hash,
                    "{what}: the number of block {id} was given twice, in segments {at} and {number}"
                );
            }
            blocks += meta.index.len();
            records += meta.records.len();
            groups.open += 1;
            if let Some(next) = meta.footer.commit {
                let early = next == commit && records == 0;
                assert!(
                    early || records > 0,
                    "{what}: group {number} names nothing, and commits {next} behind {commit}"
                );
                groups.early += usize::from(early);
                groups.unnamed = if early { groups.unnamed + blocks } else { 0 };
                (commit, records, blocks, groups.open) = (next, 0, 0, 0);
            }
        }
        groups
    }
}
