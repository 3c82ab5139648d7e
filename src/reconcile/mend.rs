//! A whole segment out of damaged copies: each frame from whichever copy has it intact, or from cached content.
//!
//! Pure. Owns the putting together; what comes out is a segment whose hash is right, or nothing.

use std::collections::BTreeMap;

use bytes::Bytes;

use crate::format::frame::FrameEncoder;
use crate::format::segment::{FOOTER_LEN, Footer, HEADER_LEN, SegmentHash, parse_footer, parse_meta};
use crate::format::tables::BlockEntry;
use crate::format::{frame, segment};
use crate::replica::Identity;

/// zstd levels at which frames are made; the same content at the same level gives the same bytes.
const LEVELS: [i32; 2] = [1, 0];

/// Puts a segment together. `len` and `hash` are what is known of it; `cached` gives the raw content of a block that is at hand.
pub(super) fn piece_together(
    copies: &[Bytes],
    identity: &Identity,
    len: u64,
    hash: Option<SegmentHash>,
    cached: &dyn Fn(&BlockEntry) -> Option<Bytes>,
) -> Option<Bytes> {
    let footers = copies.iter().filter(|c| c.len() as u64 == len).filter_map(|c| {
        let footer = parse_footer(c, len).ok()?;
        let right = footer.header.volume == identity.volume.volume && hash.is_none_or(|h| h == footer.hash);
        right.then_some((c, footer))
    });
    let (ending, footer) = footers.into_iter().next()?;
    let meta = footer.meta_range();
    let meta = meta.start as usize..meta.end as usize;
    // Records and index in one piece, from any copy that is long enough.
    let (based, parsed) = copies.iter().find_map(|c| {
        let bytes = c.get(meta.clone())?;
        Some((bytes, parse_meta(&footer, bytes).ok()?))
    })?;
    let mut whole = vec![0; len as usize];
    whole.get_mut(..HEADER_LEN)?.copy_from_slice(&footer.header.encode());
    whole.get_mut(meta)?.copy_from_slice(based);
    let end = ending.len() - FOOTER_LEN;
    whole.get_mut(end..)?.copy_from_slice(ending.get(end..)?);
    let frames: BTreeMap<u64, BlockEntry> = parsed
        .index
        .into_iter()
        .map(|(_, entry)| entry)
        .filter(|e| (e.loc.segment, e.loc.epoch) == (footer.header.number, footer.header.epoch))
        .map(|e| (e.loc.offset, e))
        .collect();
    for (offset, entry) in &frames {
        let start = usize::try_from(*offset).ok()?;
        let range = start..start.checked_add(entry.loc.stored_len as usize)?;
        let from_copy = copies
            .iter()
            .filter_map(|c| c.get(range.clone()))
            .find(|stored| frame::decode_entry(stored, entry).is_ok());
        match from_copy {
            Some(stored) => whole.get_mut(range)?.copy_from_slice(stored),
            None => whole.get_mut(range)?.copy_from_slice(&encoded(&cached(entry)?, entry)?),
        }
    }
    is_right(&whole, &footer).then(|| whole.into())
}

/// The frame that content must have had.
fn encoded(raw: &[u8], entry: &BlockEntry) -> Option<Vec<u8>> {
    LEVELS.iter().find_map(|level| {
        let frame = FrameEncoder::new(*level).ok()?.encode(raw).ok()?;
        (frame.bytes.len() == entry.loc.stored_len as usize).then_some(frame.bytes)
    })
}

fn is_right(whole: &[u8], footer: &Footer) -> bool {
    segment::verify_whole(whole).is_ok_and(|meta| meta.footer.hash == footer.hash)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::segment::{SegmentBuilder, SegmentHeader};
    use crate::format::tables::Time;
    use crate::format::volume::testing::volume;
    use crate::ids::{BlockHash, BlockId, Epoch, Lsn, SegmentNo};

    fn identity() -> Identity {
        Identity { volume: volume(1), claims: Vec::new() }
    }

    /// A segment of three frames, one of them compressed, and their raw content.
    fn sample() -> (Vec<u8>, Vec<(BlockEntry, Vec<u8>)>) {
        let header = SegmentHeader {
            volume: identity().volume.volume,
            number: SegmentNo(1),
            epoch: Epoch(1),
            cut_at: Time { secs: 1_790_000_000, nanos: 0 },
            txg_first: SegmentNo(1),
            previous: SegmentHash::default(),
        };
        let mut builder = SegmentBuilder::new(header);
        let mut noise = vec![0; 5000];
        blake3::Hasher::new().finalize_xof().fill(&mut noise);
        let mut blocks = Vec::new();
        for (i, raw) in [noise, vec![7; 9000], b"small".repeat(300)].into_iter().enumerate() {
            let frame = frame::encode(&raw, 1).unwrap();
            let loc = builder.push_frame(&frame.bytes).unwrap();
            let entry = BlockEntry { hash: BlockHash::of(&raw), loc };
            builder.push_index(BlockId(i as u64 + 1), entry).unwrap();
            blocks.push((entry, raw));
        }
        (builder.finish(Some(Lsn(1))).unwrap().0.to_vec(), blocks)
    }

    fn mended(copies: &[Vec<u8>], len: usize, cache: &[(BlockEntry, Vec<u8>)]) -> Option<Bytes> {
        let copies: Vec<Bytes> = copies.iter().map(|c| c.clone().into()).collect();
        let cached =
            |e: &BlockEntry| cache.iter().find(|(c, _)| c.hash == e.hash).map(|(_, raw)| raw.clone().into());
        piece_together(&copies, &identity(), len as u64, None, &cached)
    }

    #[test]
    fn copies_damaged_in_different_places_make_a_whole_one() {
        let (good, blocks) = sample();
        let at = |i: usize| blocks[i].0.loc.offset as usize + 20;
        let (mut one, mut two) = (good.clone(), good.clone());
        one[at(0)] ^= 1;
        one[3] ^= 1;
        two[at(1)] ^= 1;
        two[good.len() - 10] ^= 1;
        assert_eq!(mended(&[one.clone(), two.clone()], good.len(), &[]).unwrap(), good);
        assert_eq!(mended(&[one.clone()], good.len(), &[]), None);
        // What no copy has may be in the cache.
        assert_eq!(mended(&[one], good.len(), &blocks[..1]).unwrap(), good);
        let cut = good[..good.len() / 2].to_vec();
        assert_eq!(mended(&[cut], good.len(), &blocks), None, "nobody knows its index");
    }

    #[test]
    fn every_single_damage_is_mended_from_the_cache_or_refused() {
        let (good, blocks) = sample();
        let frames = HEADER_LEN..blocks[2].0.loc.offset as usize + blocks[2].0.loc.stored_len as usize;
        for i in (0..good.len()).step_by(7) {
            let mut bad = good.clone();
            bad[i] ^= 0x40;
            match mended(&[bad], good.len(), &blocks) {
                Some(whole) => assert_eq!(whole, good),
                None => assert!(!frames.contains(&i) && i >= HEADER_LEN, "byte {i} lies in a frame"),
            }
        }
    }
}
