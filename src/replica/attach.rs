//! Finding out, before anything is written, whether a replica is what it should be and how far it is.
//!
//! Owns the checks at the beginning and after every failure: the volume's identity, claims (ours and higher ones), and the cursor against
//! what lies there. Sends no segments.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::contract::{CursorStore, Outbox};
use super::error::{ErrorKind, StoreError};
use super::fence::{FenceReason, Fenced, taken_over};
use super::shared::Replica;
use super::ship_plan::true_cursor;
use super::store::Store;
use super::volume::{self, Found, VolumeError};
use crate::format::names::{CHECKPOINTS, EPOCHS, ObjectName, SEGMENTS};
use crate::format::volume::{Claim, Volume};
use crate::ids::{Epoch, SegmentNo};

/// Who we are: what must stand on every replica before we write segments there.
#[derive(Clone, Debug, PartialEq)]
pub struct Identity {
    /// The volume.
    pub volume: Volume,
    /// All known claims by ascending epoch; the last one is ours.
    pub claims: Vec<Claim>,
}

impl Identity {
    /// Our epoch; 0 when there are no claims.
    #[must_use]
    pub fn epoch(&self) -> Epoch {
        self.claims.last().map_or(Epoch(0), |c| c.epoch)
    }
}

/// Why a replica cannot be written to.
#[derive(Clone, Debug)]
pub(super) enum AttachError {
    /// It failed; later it may not.
    Store(StoreError),
    /// It is not ours; only a person can change that.
    Foreign(VolumeError),
    /// Somebody else writes to the volume.
    Fenced(Box<Fenced>),
    /// Local bookkeeping failed.
    Local(String),
}

impl From<VolumeError> for AttachError {
    fn from(e: VolumeError) -> Self {
        match e {
            VolumeError::Store(e) => AttachError::Store(e),
            e => AttachError::Foreign(e),
        }
    }
}

impl From<StoreError> for AttachError {
    fn from(e: StoreError) -> Self {
        AttachError::Store(e)
    }
}

/// What is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Attached {
    /// Everything up to this segment.
    pub cursor: SegmentNo,
    /// The newest checkpoint; 0 when there is none.
    pub checkpoint: SegmentNo,
}

/// Checks a replica and finds its cursor.
pub(super) async fn attach(
    replica: &Replica,
    identity: &Identity,
    outbox: &Arc<dyn Outbox>,
    cursors: &Arc<dyn CursorStore>,
) -> Result<Attached, AttachError> {
    let store = replica.store();
    let saved = load(cursors, replica).await?;
    let found = volume::expect(store, identity.volume.volume).await?;
    if !matches!(found, Found::Volume(_)) {
        if saved.0 > 0 {
            log::warn!(
                "replica {} should hold everything up to segment {saved}, but its volume.json is gone: it was wiped, and is filled again",
                replica.name()
            );
        }
        volume::write_volume(store, &identity.volume).await?;
    }
    put_claims(replica, identity).await?;
    let cursor = find_cursor(replica, identity, outbox, saved, found != Found::Empty).await?;
    let manifests = store.list(CHECKPOINTS).await?;
    let checkpoint = manifests.iter().filter_map(|o| match ObjectName::parse(&o.path) {
        Some(ObjectName::CheckpointManifest(number, _)) if number <= cursor => Some(number),
        _ => None,
    });
    Ok(Attached { cursor, checkpoint: checkpoint.max().unwrap_or_default() })
}

/// Sees that all known claims stand on the replica, and that none is above ours.
async fn put_claims(replica: &Replica, identity: &Identity) -> Result<(), AttachError> {
    let store = replica.store();
    let listed = store.list(EPOCHS).await?;
    let there: Vec<Epoch> = listed
        .iter()
        .filter_map(|o| match ObjectName::parse(&o.path) {
            Some(ObjectName::Claim(epoch)) => Some(epoch),
            _ => None,
        })
        .collect();
    if let Some(higher) = there.iter().copied().filter(|e| *e > identity.epoch()).max() {
        return Err(taken_over(replica, identity, higher).await);
    }
    for claim in &identity.claims {
        let ours = claim.epoch == identity.epoch();
        if there.contains(&claim.epoch) && !ours {
            continue;
        }
        match volume::put_claim(store, claim).await {
            Ok(()) => {}
            Err(VolumeError::Held { claim, replica }) if ours => {
                let reason = FenceReason::TakenOver { epoch: claim.epoch, claim: Some(claim) };
                return Err(AttachError::Fenced(Box::new(Fenced { replica, reason })));
            }
            Err(e) => return Err(e.into()),
        }
    }
    Ok(())
}

/// Compares the saved cursor with the replica, by one request when they agree and by a listing when they do not.
async fn find_cursor(
    replica: &Replica,
    identity: &Identity,
    outbox: &Arc<dyn Outbox>,
    saved: SegmentNo,
    has_objects: bool,
) -> Result<SegmentNo, AttachError> {
    let store = replica.store();
    if saved.0 > 0 {
        let staged = segments_after(outbox, SegmentNo(saved.0 - 1), 1).await?;
        let known = staged.first().filter(|s| s.number == saved);
        let epoch = known.map(|s| s.epoch).or_else(|| volume::valid_epoch(&identity.claims, saved));
        if let Some(epoch) = epoch {
            match store.head(&ObjectName::Segment(saved, epoch).path()).await {
                Ok(info) if known.is_none_or(|s| s.len == info.size) => return Ok(saved),
                Ok(_) => {}
                Err(e) if e.kind == ErrorKind::Absent => {}
                Err(e) => return Err(e.into()),
            }
        }
    } else if !has_objects {
        return Ok(saved);
    }
    let listed = list_segments(store).await?;
    let sizes = segments_after(outbox, SegmentNo(0), usize::MAX).await?;
    let sizes: BTreeMap<_, _> = sizes.into_iter().map(|s| (s.number, s.len)).collect();
    let found = true_cursor(&listed, &identity.claims, &sizes);
    if found < saved {
        let text = format!(
            "replica {}: everything up to segment {saved} was there, now only up to {found}: it was wiped or rolled back, and is filled again",
            replica.name()
        );
        log::warn!("{text}");
        replica.tell(text, None);
    }
    Ok(found)
}

/// All segments on a replica with their sizes.
pub(super) async fn list_segments(store: &Store) -> Result<BTreeMap<(SegmentNo, Epoch), u64>, StoreError> {
    let listed = store.list(SEGMENTS).await?;
    let segment = |path: &str| match ObjectName::parse(path) {
        Some(ObjectName::Segment(number, epoch)) => Some((number, epoch)),
        _ => None,
    };
    Ok(listed.iter().filter_map(|o| Some((segment(&o.path)?, o.size))).collect())
}

/// [`Outbox::segments_after`] off the async threads: it may read from disk.
pub(super) async fn segments_after(
    outbox: &Arc<dyn Outbox>,
    after: SegmentNo,
    limit: usize,
) -> Result<Vec<super::contract::Staged>, AttachError> {
    let outbox = Arc::clone(outbox);
    let listed = tokio::task::spawn_blocking(move || outbox.segments_after(after, limit)).await;
    listed.map_err(|e| AttachError::Local(e.to_string()))
}

async fn load(cursors: &Arc<dyn CursorStore>, replica: &Replica) -> Result<SegmentNo, AttachError> {
    let (cursors, name) = (Arc::clone(cursors), replica.name().clone());
    match tokio::task::spawn_blocking(move || cursors.load(&name)).await {
        Ok(Ok(cursor)) => Ok(cursor),
        Ok(Err(e)) => Err(AttachError::Local(e)),
        Err(e) => Err(AttachError::Local(e.to_string())),
    }
}
