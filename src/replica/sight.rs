//! What one replica shows of other writers, verified before it is believed.
//!
//! Reads claims above ours and the ends of segments that we did not write. A name alone is damage,
//! never another writer.

use super::attach::{AttachError, Identity};
use super::belief::{Testimony, plausible_end};
use super::error::{ErrorKind, StoreError};
use super::fence::{FenceReason, Fenced};
use super::shared::Replica;
use super::store::Store;
use super::volume::{self, VolumeError};
use crate::format::names::{EPOCHS, ObjectName};
use crate::format::segment::{self, FOOTER_LEN, Footer, SegmentHash};
use crate::ids::{Epoch, SegmentNo, VolumeId};

/// The most claims above ours that are read; there is hardly ever more than one.
const READ_CLAIMS: usize = 16;

/// What a replica shows above our epoch.
#[derive(Debug)]
pub(super) enum Sight {
    /// Nothing.
    Clear {
        /// Whether a claim of our epoch is listed.
        ours: bool,
    },
    /// Names of claims, none of which can be verified: the highest epoch, and why.
    Damaged(Epoch, String),
    /// Another writer's claim, verified.
    Rival(Box<Fenced>),
}

/// The error for a replica that shows another writer's claim, or damaged claims, which the other
/// replicas do not.
pub(super) fn contested_claim(replica: &Replica, epoch: Epoch, text: String) -> VolumeError {
    let replica = replica.name().clone();
    let remedy = format!(
        "A machine that is cut off from the others may have claimed the volume there: if so, unmount it. If the claim is forged or \
         of no use, remove it: mirrorfs replica void-claim {replica} {epoch}"
    );
    VolumeError::Contested { replica, text, remedy }
}

/// The error for a replica that alone shows what `by` says.
pub(super) fn contested(replica: &Replica, by: &Fenced) -> VolumeError {
    let text = by.shown();
    let (segment, epoch) = match by.reason {
        FenceReason::TakenOver { epoch, .. } => return contested_claim(replica, epoch, text),
        FenceReason::Ahead { segment, epoch, .. } | FenceReason::Contradicts { segment, epoch } => {
            (segment, epoch)
        }
    };
    let remedy = format!(
        "A copy of this state folder may have written it: if so, unmount that one. If not, delete {}",
        ObjectName::Segment(segment, epoch)
    );
    VolumeError::Contested { replica: replica.name().clone(), text, remedy }
}

/// Looks for claims above ours, with one request when there is none.
pub(super) async fn look(replica: &Replica, identity: &Identity) -> Result<Sight, AttachError> {
    let ours = identity.epoch();
    let before = ObjectName::Claim(Epoch(ours.0.saturating_sub(1))).path();
    let listed = replica.store().list_after(EPOCHS, &before).await?;
    let claims = listed.iter().filter_map(|o| match ObjectName::parse(&o.path) {
        Some(ObjectName::Claim(epoch)) => Some(epoch),
        _ => None,
    });
    above(replica, identity, claims.filter(|e| *e >= ours).collect()).await
}

/// What the claims named on the replica say, those of our epoch and above.
pub(super) async fn above(
    replica: &Replica,
    identity: &Identity,
    mut named: Vec<Epoch>,
) -> Result<Sight, AttachError> {
    let ours = identity.epoch();
    let clear = Sight::Clear { ours: named.contains(&ours) };
    named.retain(|e| *e > ours);
    named.sort_unstable();
    let Some(highest) = named.last().copied() else { return Ok(clear) };
    let end = plausible_end(ours, named.iter().copied());
    let plausible: Vec<Epoch> = named.iter().copied().filter(|e| *e <= end).collect();
    let mut why = (plausible.len() < named.len()).then(|| {
        format!(
            "{} names a claim after a jump from epoch {end}, which no writer makes",
            ObjectName::Claim(highest)
        )
    });
    // The first segments of later claims are hardly ever lower, but it is not impossible.
    let (mut first, mut all_read) = (None, plausible.len() <= READ_CLAIMS && why.is_none());
    let (mut newest, mut gone) = (None, 0);
    let read = plausible.len().min(READ_CLAIMS);
    for epoch in plausible.into_iter().rev().take(READ_CLAIMS).rev() {
        match volume::read_claim(replica.store(), epoch, identity.volume.volume).await {
            Ok(claim) => {
                first = first.into_iter().chain(claim.begins()).min();
                newest = Some(Box::new(claim));
            }
            // Listed, and gone a moment later.
            Err(VolumeError::Store(e)) if e.kind == ErrorKind::Absent => gone += 1,
            Err(VolumeError::Store(e)) if e.kind != ErrorKind::Corrupt => return Err(e.into()),
            Err(e) => {
                all_read = false;
                why = Some(e.to_string());
            }
        }
    }
    match (newest, why) {
        (Some(claim), _) => {
            let reason = FenceReason::TakenOver {
                epoch: claim.epoch,
                claim: Some(claim),
                first_segment: first.filter(|_| all_read),
            };
            Ok(Sight::Rival(Box::new(Fenced { replica: replica.name().clone(), reason })))
        }
        (None, None) if gone == read => Ok(clear),
        (None, why) => {
            let why = why.unwrap_or_else(|| "claims come and go".to_owned());
            Ok(Sight::Damaged(highest, format!("replica {}: {why}", replica.name())))
        }
    }
}

/// What another replica says to what `replica` shows in `by`.
pub(super) async fn testify(
    other: &Replica,
    identity: &Identity,
    replica: &Replica,
    by: &Fenced,
) -> Testimony {
    let sight = match look(other, identity).await {
        Ok(sight) => sight,
        Err(AttachError::Foreign(e)) => return Testimony::Unclear(e.to_string()),
        Err(_) => return Testimony::Silent,
    };
    let clear = match sight {
        Sight::Rival(by) => return Testimony::Rival(by),
        Sight::Damaged(_, why) => return Testimony::Unclear(why),
        // Without our claim it was not asked since we are here: it knows nothing.
        Sight::Clear { ours: false } => return Testimony::Silent,
        Sight::Clear { ours: true } => Testimony::Clear,
    };
    let volume = identity.volume.volume;
    let segment = match by.reason {
        FenceReason::TakenOver { .. } => return clear,
        FenceReason::Ahead { segment, epoch, .. } | FenceReason::Contradicts { segment, epoch } => {
            (segment, epoch)
        }
    };
    let theirs = match end_of(other.store(), volume, segment.0, segment.1).await {
        Ok(Some(hash)) => hash,
        Ok(None) => return clear,
        Err(_) => return Testimony::Silent,
    };
    let same = match by.reason {
        FenceReason::Contradicts { .. } => {
            matches!(end_of(replica.store(), volume, segment.0, segment.1).await, Ok(Some(hash)) if hash == theirs)
        }
        _ => true,
    };
    if !same {
        return clear;
    }
    Testimony::Rival(Box::new(Fenced { replica: other.name().clone(), reason: by.reason.clone() }))
}

/// The hash of a segment by its verified end; `None` when there is none, or it is damaged.
pub async fn end_of(
    store: &Store,
    volume: VolumeId,
    number: SegmentNo,
    epoch: Epoch,
) -> Result<Option<SegmentHash>, StoreError> {
    Ok(footer_of(store, volume, number, epoch).await?.map(|f| f.hash))
}

/// The verified end of a segment; `None` when there is none, or it is damaged.
pub async fn footer_of(
    store: &Store,
    volume: VolumeId,
    number: SegmentNo,
    epoch: Epoch,
) -> Result<Option<Footer>, StoreError> {
    let object = ObjectName::Segment(number, epoch).path();
    let footer = async {
        let size = store.head(&object).await?.size;
        let Some(at) = size.checked_sub(FOOTER_LEN as u64) else { return Ok(None) };
        let end = store.get_range(&object, at, FOOTER_LEN as u64).await?;
        let footer = segment::parse_footer(&end, size).ok();
        Ok(footer.filter(|f| f.expect(volume, number, epoch).is_ok()))
    };
    match footer.await {
        Err(StoreError { kind: ErrorKind::Absent | ErrorKind::Corrupt, .. }) => Ok(None),
        other => other,
    }
}
