//! What a segment's hash must be: by the chain of hashes where the tables do not say, else by
//! agreement.
//!
//! A restore that begins with a checkpoint does not read the segments before it, so their hashes
//! are unknown here. Each segment's header names the hash of the one before it, and the hash of a
//! segment covers its header. So from the first known hash the others follow, downwards, by one
//! small read each, whoever gives the answer.

use std::sync::Arc;

use futures::stream::{self, StreamExt};

use super::contract::{Outbox, Staged};
use super::shared::Replica;
use crate::format::names::ObjectName;
use crate::format::segment::{FOOTER_LEN, Footer, SegmentHash, parse_footer};
use crate::ids::{SegmentNo, VolumeId};

/// Footers read at a time.
const AT_ONCE: usize = 8;

/// Learns the hashes of all segments from `from` on that are not known, as far as the chain goes,
/// and notes them in the outbox. What a replica says counts only if it fits a hash that is known
/// already.
pub async fn learn(outbox: &Arc<dyn Outbox>, replicas: &[Arc<Replica>], volume: VolumeId, from: SegmentNo) {
    let asked = Arc::clone(outbox);
    let before = SegmentNo(from.0.saturating_sub(1));
    let listed = tokio::task::spawn_blocking(move || {
        let all = asked.segments_after(before, usize::MAX);
        // Those to read: without a hash, or right after one without.
        let lacks: Vec<bool> = all.iter().map(|s| asked.hash(s.number).is_none()).collect();
        let mut after_one = false;
        let mut wanted = Vec::new();
        for (staged, lacks) in all.into_iter().zip(lacks) {
            if lacks || after_one {
                wanted.push(staged);
            }
            after_one = lacks;
        }
        wanted
    });
    let Ok(mut wanted) = listed.await else { return };
    wanted.reverse();
    let mut footers = stream::iter(wanted)
        .map(|staged| async move {
            let footers = footers(replicas, volume, &staged).await;
            (staged, footers)
        })
        .buffered(AT_ONCE);
    while let Some((staged, found)) = footers.next().await {
        let Some(hash) = outbox.hash(staged.number) else { continue };
        let Some((_, footer)) = found.into_iter().find(|(_, footer)| footer.hash == hash) else { continue };
        outbox.learned(staged.number, staged.epoch, hash, Some(footer.object_len));
        let before = SegmentNo(staged.number.0.saturating_sub(1));
        let asked = Arc::clone(outbox);
        let one = SegmentNo(before.0.saturating_sub(1));
        let known = tokio::task::spawn_blocking(move || asked.segments_after(one, 1)).await;
        if let Some(older) = known.ok().and_then(|k| k.into_iter().next()).filter(|s| s.number == before)
            && outbox.hash(before).is_none()
        {
            outbox.learned(before, older.epoch, footer.header.previous, None);
        }
    }
}

/// The footers that the replicas give for a segment, whole by themselves, by the place of the
/// replica in the list. Stops at none: they may differ.
async fn footers(replicas: &[Arc<Replica>], volume: VolumeId, staged: &Staged) -> Vec<(usize, Footer)> {
    let object = ObjectName::Segment(staged.number, staged.epoch).path();
    let mut found: Vec<(usize, Footer)> = Vec::new();
    for (i, replica) in replicas.iter().enumerate().filter(|(_, r)| r.is_attached()) {
        // Its own length: the one that is known here may be what another replica made up.
        let Ok(info) = replica.store().head(&object).await else { continue };
        let Some(at) = info.size.checked_sub(FOOTER_LEN as u64) else { continue };
        let Ok(bytes) = replica.store().get_range(&object, at, FOOTER_LEN as u64).await else { continue };
        if let Ok(footer) = parse_footer(&bytes, info.size)
            && footer.expect(volume, staged.number, staged.epoch).is_ok()
        {
            found.push((i, footer));
        }
    }
    found
}

/// Where nothing says what a segment's hash is: an error when replicas hold different whole copies,
/// since any of them may be forged.
pub async fn agree(
    replicas: &[Arc<Replica>],
    volume: VolumeId,
    staged: &Staged,
    hash: SegmentHash,
) -> Result<(), String> {
    let others = footers(replicas, volume, staged).await;
    let other = others.into_iter().find(|(_, footer)| footer.hash != hash);
    match other.and_then(|(i, _)| replicas.get(i)) {
        None => Ok(()),
        Some(replica) => Err(format!(
            "the replicas hold different copies (replica {} another one than hash {hash}), and nothing here says which \
             is right",
            replica.name()
        )),
    }
}
