//! What is fetched along with a small block that is missing: what was written at about the same time lies beside it in its segment,
//! and will often be read at about the same time.
//!
//! Pure. Owns the stretch of the segment. Stretches are aligned, so that whoever reads all files of a folder, in whatever order,
//! fetches each byte once.

use std::collections::VecDeque;
use std::ops::Range;

use crate::format::tables::{BlockEntry, FrameLoc};
use crate::ids::{Epoch, SegmentNo};

/// Blocks up to this many raw bytes are small.
const SMALL: u32 = 256 << 10;
/// First and largest stretch, in stored bytes: powers of two.
const STRETCH: (u64, u64) = (1 << 20, 4 << 20);
/// Segments that are remembered.
const RECENT: usize = 32;
/// Raw bytes fetched along at most.
const MOST_RAW: u64 = 16 << 20;

/// Whether others are to be fetched along with this block.
#[must_use]
pub fn is_small(loc: &FrameLoc) -> bool {
    loc.raw_len <= SMALL
}

/// The segments in which blocks were missing lately, and their stretches.
#[derive(Clone, Debug, Default)]
pub struct Near {
    /// The last one first.
    recent: VecDeque<(SegmentNo, Epoch, u64)>,
}

impl Near {
    /// The bytes of its segment to fetch around a missing block: twice as many with each further miss in one segment.
    pub fn stretch(&mut self, loc: &FrameLoc) -> Range<u64> {
        let known = self.recent.iter().position(|(s, e, _)| (*s, *e) == (loc.segment, loc.epoch));
        let before = known.and_then(|at| self.recent.remove(at));
        let stretch = before.map_or(STRETCH.0, |(.., stretch)| (stretch * 2).min(STRETCH.1));
        self.recent.push_front((loc.segment, loc.epoch, stretch));
        self.recent.truncate(RECENT);
        let first = loc.offset - loc.offset % stretch;
        first..first.saturating_add(stretch)
    }
}

/// Those of `others`, the blocks sealed shortly before and after it, that are fetched along with `wanted`; of those behind it first,
/// up to `most` raw bytes.
#[must_use]
pub fn choose(
    wanted: &FrameLoc,
    stretch: &Range<u64>,
    mut others: Vec<BlockEntry>,
    most: u64,
) -> Vec<BlockEntry> {
    let most = most.min(MOST_RAW);
    others.retain(|e| {
        let loc = &e.loc;
        let beside =
            (loc.segment, loc.epoch) == (wanted.segment, wanted.epoch) && loc.offset != wanted.offset;
        beside && is_small(loc) && stretch.contains(&loc.offset) && !e.is_without_content()
    });
    // Behind it in order, then before it, nearest first: what lies between is never left out, as one request is to get all.
    others.sort_by_key(|e| match e.loc.offset.checked_sub(wanted.offset) {
        Some(behind) => (false, behind),
        None => (true, wanted.offset - e.loc.offset),
    });
    let mut raw = 0;
    others.retain(|e| {
        raw += u64::from(e.loc.raw_len);
        raw <= most
    });
    others
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::BlockHash;

    fn block(segment: u64, offset: u64, len: u32) -> BlockEntry {
        let (segment, epoch) = (SegmentNo(segment), Epoch(1));
        let loc = FrameLoc { segment, epoch, offset, stored_len: len, raw_len: len, codec: 0 };
        BlockEntry { hash: BlockHash::of(&offset.to_le_bytes()), loc }
    }

    #[test]
    fn stretches_are_aligned_and_grow_within_a_segment() {
        let mut near = Near::default();
        let mib = |r: Range<u64>| (r.start >> 20, r.end >> 20);
        assert_eq!(mib(near.stretch(&block(1, (9 << 20) + 5, 8192).loc)), (9, 10));
        assert_eq!(mib(near.stretch(&block(1, (11 << 20) + 5, 8192).loc)), (10, 12));
        assert_eq!(mib(near.stretch(&block(1, (2 << 20) + 5, 8192).loc)), (0, 4));
        assert_eq!(mib(near.stretch(&block(1, (2 << 20) + 5, 8192).loc)), (0, 4));
        assert_eq!(mib(near.stretch(&block(2, (2 << 20) + 5, 8192).loc)), (2, 3));
        assert_eq!(mib(near.stretch(&block(1, (9 << 20) + 5, 8192).loc)), (8, 12));
        for n in 3..3 + RECENT as u64 {
            near.stretch(&block(n, 0, 8192).loc);
        }
        assert_eq!(mib(near.stretch(&block(1, (9 << 20) + 5, 8192).loc)), (9, 10), "forgotten");
    }

    #[test]
    fn small_neighbours_of_the_same_segment_are_chosen_nearest_first() {
        let all: Vec<_> = (0..10).map(|i| block(1, i * 8192, 8192)).collect();
        let wanted = all[4].loc;
        let offsets =
            |chosen: Vec<BlockEntry>| chosen.iter().map(|e| e.loc.offset / 8192).collect::<Vec<_>>();
        assert_eq!(
            offsets(choose(&wanted, &(0..1 << 20), all.clone(), u64::MAX)),
            [5, 6, 7, 8, 9, 3, 2, 1, 0]
        );
        assert_eq!(offsets(choose(&wanted, &(16384..1 << 20), all.clone(), 7 * 8192)), [5, 6, 7, 8, 9, 3, 2]);
        assert_eq!(offsets(choose(&wanted, &(0..1 << 20), all.clone(), 3 * 8192)), [5, 6, 7]);
        let others = vec![block(2, 8192, 8192), block(1, 8192, SMALL + 1)];
        assert!(choose(&wanted, &(0..1 << 20), others, u64::MAX).is_empty());
    }
}
