//! Which bytes one request fetches, and what the answers of all replicas add up to.
//!
//! Pure. Owns the joining of neighbouring frames into one range and the verdict over failed reads. Knows no network and no clock.

use crate::format::tables::{BlockEntry, FrameLoc};
use crate::ids::{Epoch, SegmentNo};

/// Unwanted bytes between two frames that are fetched along rather than asked around.
const MOST_GAP: u64 = 64 << 10;
/// Longest range of more than one frame.
const MOST_BYTES: u64 = 16 << 20;

/// A range of one segment and the blocks in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Span {
    /// The segment.
    pub segment: SegmentNo,
    /// Its epoch.
    pub epoch: Epoch,
    /// First byte.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
    /// The block that is needed.
    pub wanted: BlockEntry,
    /// Others whose frames lie in the range, by offset.
    pub others: Vec<BlockEntry>,
}

impl Span {
    /// The range of one frame.
    #[must_use]
    pub fn of(wanted: &BlockEntry) -> Self {
        let FrameLoc { segment, epoch, offset, stored_len, .. } = wanted.loc;
        Self { segment, epoch, offset, len: u64::from(stored_len), wanted: *wanted, others: Vec::new() }
    }

    /// The range of a frame and of those of `ahead` that are its neighbours, or neighbours of neighbours, on either side: gaps of at
    /// most 64 KiB, 16 MiB in all.
    #[must_use]
    pub fn around(wanted: &BlockEntry, ahead: &[BlockEntry]) -> Self {
        let mut span = Self::of(wanted);
        let mut near: Vec<_> = ahead
            .iter()
            .filter(|b| (b.loc.segment, b.loc.epoch) == (span.segment, span.epoch) && b.hash != wanted.hash)
            .collect();
        near.sort_by_key(|b| b.loc.offset);
        near.dedup_by_key(|b| b.hash);
        let split = near.partition_point(|b| b.loc.offset < span.offset);
        let (before, after) = near.split_at(split);
        for block in after {
            let end = block.loc.offset.saturating_add(u64::from(block.loc.stored_len));
            let gap = block.loc.offset.checked_sub(span.end());
            let len = end.saturating_sub(span.offset);
            if gap.is_none_or(|g| g > MOST_GAP) || len > MOST_BYTES {
                break;
            }
            span.len = len;
            span.others.push(**block);
        }
        for block in before.iter().rev() {
            let end = block.loc.offset.saturating_add(u64::from(block.loc.stored_len));
            let gap = span.offset.checked_sub(end);
            let len = span.end().saturating_sub(block.loc.offset);
            if gap.is_none_or(|g| g > MOST_GAP) || len > MOST_BYTES {
                break;
            }
            (span.offset, span.len) = (block.loc.offset, len);
            span.others.insert(0, **block);
        }
        span
    }

    fn end(&self) -> u64 {
        self.offset.saturating_add(self.len)
    }

    /// Where a block's frame lies within the bytes of the range; `None` when it does not.
    #[must_use]
    pub fn part(&self, block: &BlockEntry) -> Option<std::ops::Range<usize>> {
        let start = usize::try_from(block.loc.offset.checked_sub(self.offset)?).ok()?;
        let end = start.checked_add(usize::try_from(block.loc.stored_len).ok()?)?;
        (end as u64 <= self.len).then_some(start..end)
    }
}

/// Puts blocks in the order in which they lie in their segments, and cuts that into the lists that one request each can fetch: neighbours,
/// of at most `most` stored bytes together (but always one). Those of `beside` come along where they lie beside a wanted one, and only there.
#[must_use]
pub fn ranges(wanted: Vec<BlockEntry>, beside: Vec<BlockEntry>, most: u64) -> Vec<Vec<BlockEntry>> {
    let mut blocks: Vec<_> = wanted.into_iter().map(|b| (b, true)).collect();
    blocks.extend(beside.into_iter().map(|b| (b, false)));
    blocks.sort_by_key(|(b, wanted)| (b.loc.segment, b.loc.epoch, b.loc.offset, !wanted));
    blocks.dedup_by_key(|(b, _)| b.hash);
    let mut all: Vec<(Vec<BlockEntry>, bool)> = Vec::new();
    for (block, wanted) in blocks {
        let end = |b: &BlockEntry| b.loc.offset.saturating_add(u64::from(b.loc.stored_len));
        let joins = |range: &[BlockEntry]| {
            range.first().zip(range.last()).is_some_and(|(first, last)| {
                let beside = (first.loc.segment, first.loc.epoch) == (block.loc.segment, block.loc.epoch);
                let gap = block.loc.offset.saturating_sub(end(last));
                beside && gap <= MOST_GAP && end(&block).saturating_sub(first.loc.offset) <= most
            })
        };
        match all.last_mut().filter(|(range, _)| joins(range)) {
            Some((range, needed)) => {
                range.push(block);
                *needed |= wanted;
            }
            None => all.push((vec![block], wanted)),
        }
    }
    all.into_iter().filter(|(_, needed)| *needed).map(|(range, _)| range).collect()
}

/// What one replica said when asked for a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// It has not got the object, or not these bytes.
    Unusable,
    /// It could not be asked, and that may pass.
    Passing,
    /// It could not be asked, and that will not pass by waiting.
    Lasting,
}

/// What to do when no replica gave a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Ask again after a while.
    Retry,
    /// All answered, none has it.
    Lost,
    /// Some could not be asked, and waiting will not change that.
    Unavailable,
}

/// The verdict over the answers of all replicas, which must be at least one.
#[must_use]
pub fn verdict(answers: &[Answer]) -> Verdict {
    if answers.contains(&Answer::Passing) {
        Verdict::Retry
    } else if answers.is_empty() || answers.contains(&Answer::Lasting) {
        Verdict::Unavailable
    } else {
        Verdict::Lost
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::BlockHash;

    fn block(offset: u64, len: u32) -> BlockEntry {
        BlockEntry {
            hash: BlockHash::of(&offset.to_le_bytes()),
            loc: FrameLoc {
                segment: SegmentNo(1),
                epoch: Epoch(1),
                offset,
                stored_len: len,
                raw_len: len,
                codec: 0,
            },
        }
    }

    #[test]
    fn neighbours_are_joined_up_to_gap_and_length() {
        let wanted = block(1_000_000, 1000);
        let near = block(1_001_000, 500);
        let over_gap = block(1_001_500 + MOST_GAP, 500);
        let beyond = block(1_002_001 + 2 * MOST_GAP, 500);
        let before = block(999_000 - MOST_GAP, 1000);
        let span = Span::around(&wanted, &[beyond, over_gap, near, before]);
        assert_eq!(span.others, [before, near, over_gap]);
        assert_eq!((span.offset, span.end()), (999_000 - MOST_GAP, 1_002_000 + MOST_GAP));
        assert_eq!(span.part(&near), Some((2000 + MOST_GAP) as usize..(2500 + MOST_GAP) as usize));
        assert_eq!(span.part(&beyond), None);

        let mut elsewhere = near;
        elsewhere.loc.segment = SegmentNo(2);
        assert_eq!(Span::around(&wanted, &[elsewhere, wanted]), Span::of(&wanted));
        let mib: Vec<_> = (0..30).map(|i| block(i << 20, 1 << 20)).collect();
        let span = Span::around(&mib[3], &mib);
        assert_eq!((span.len, span.others.len()), (16 << 20, 15));
        let overlapping = block(1_000_500, 1000);
        assert_eq!(
            Span::around(&wanted, &[overlapping]),
            Span::of(&wanted),
            "never trusts an impossible layout"
        );
    }

    #[test]
    fn what_is_wanted_is_asked_for_as_it_lies() {
        let at = |i: u64| block(i << 20, 1 << 20);
        let wanted: Vec<_> = [6, 0, 3, 1, 2, 9, 4].map(at).to_vec();
        let beside = [5, 7, 11, 12].map(at).to_vec();
        let places = |beside: &[BlockEntry], most| {
            let ranges = ranges(wanted.clone(), beside.to_vec(), most);
            ranges
                .iter()
                .map(|r| r.iter().map(|b| b.loc.offset >> 20).collect::<Vec<_>>())
                .collect::<Vec<_>>()
        };
        assert_eq!(places(&[], 4 << 20), [vec![0, 1, 2, 3], vec![4], vec![6], vec![9]]);
        assert_eq!(places(&[], 8 << 20), [vec![0, 1, 2, 3, 4], vec![6], vec![9]]);
        assert_eq!(places(&[], 1), [[0], [1], [2], [3], [4], [6], [9]]);
        assert_eq!(places(&beside, 1), places(&[], 1), "nothing but what is wanted");
        assert_eq!(places(&beside, 4 << 20), [vec![0, 1, 2, 3], vec![4, 5, 6, 7], vec![9]]);
        assert_eq!(places(&wanted, 4 << 20), places(&[], 4 << 20), "each once");
        let mut elsewhere = at(1);
        elsewhere.loc.segment = SegmentNo(2);
        assert_eq!(ranges(vec![elsewhere, at(0)], Vec::new(), 4 << 20), [[at(0)], [elsewhere]]);
    }

    #[test]
    fn verdicts() {
        use Answer::{Lasting, Passing, Unusable};
        assert_eq!(verdict(&[Unusable, Unusable]), Verdict::Lost);
        assert_eq!(verdict(&[Unusable, Passing, Lasting]), Verdict::Retry);
        assert_eq!(verdict(&[Unusable, Lasting]), Verdict::Unavailable);
        assert_eq!(verdict(&[]), Verdict::Unavailable);
    }
}
