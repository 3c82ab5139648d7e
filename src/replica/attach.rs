//! Finding out, before anything is written, whether a replica is what it should be and how far it is.
//!
//! Owns the checks at the beginning and after every failure: the volume's identity, claims (ours and higher ones), and the cursor against
//! what lies there. Sends no segments.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Instant;

use super::contract::{CursorStore, Outbox};
use super::error::{ErrorKind, StoreError};
use super::fence::{Fence, FenceReason, Fenced};
use super::folder::{Filesystem, Seat};
use super::shared::Replica;
use super::ship_plan::true_cursor;
use super::sight::{self, Sight};
use super::store::{ObjectInfo, Store};
use super::volume::{self, Found, VolumeError};
use crate::format::names::{CHECKPOINTS, EPOCHS, ObjectName, SEGMENTS};
use crate::format::volume::{Claim, Volume};
use crate::ids::{Epoch, ReplicaName, SegmentNo};

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
#[derive(Clone, Debug)]
pub(super) struct Attached {
    /// Everything up to this segment.
    pub cursor: SegmentNo,
    /// The newest checkpoint; 0 when there is none.
    pub checkpoint: SegmentNo,
    /// When no other writer was to be seen.
    pub looked: Instant,
    /// Segments that lie beyond the cursor already.
    pub beyond: BTreeSet<(SegmentNo, Epoch)>,
    /// What a person should know of a branch that is not part of the volume.
    pub lost: Option<String>,
}

/// Checks a replica and finds its cursor. Nothing is written before all is found to be in order. Another writer that only this replica
/// shows keeps us from this replica, and from no other.
pub(super) async fn attach(
    replica: &Replica,
    identity: &Identity,
    outbox: &Arc<dyn Outbox>,
    cursors: &Arc<dyn CursorStore>,
    fence: &Fence,
) -> Result<Attached, AttachError> {
    match attach_alone(replica, identity, outbox, cursors).await {
        Err(AttachError::Fenced(by)) => Err(fence.weigh(replica, identity, by).await),
        other => other,
    }
}

/// As [`attach`], without asking other replicas.
async fn attach_alone(
    replica: &Replica,
    identity: &Identity,
    outbox: &Arc<dyn Outbox>,
    cursors: &Arc<dyn CursorStore>,
) -> Result<Attached, AttachError> {
    let store = replica.store();
    check_contest(replica, identity).await?;
    let saved = load(cursors, replica).await?;
    let ground = Ground::look(replica, cursors, saved).await?;
    let found = volume::expect(store, identity.volume.volume).await?;
    let is_whole = matches!(found, Found::Volume(_));
    if !is_whole {
        ground.check(store)?;
    }
    if found == Found::Empty && saved.0 == 0 {
        // The first use of this place.
        let unique = getrandom::u64().map_err(|e| AttachError::Local(format!("no random bytes: {e}")))?;
        store.prepare().await?;
        volume::require_conditions(store, u128::from(unique)).await?;
    }
    let looked = Instant::now();
    let claimed = claimed(replica, identity).await?;
    let (cursor, mut beyond) = match found {
        Found::Empty => (find_end(replica, identity, outbox, saved, BTreeMap::new()).await?, BTreeSet::new()),
        _ => find_cursor(replica, identity, outbox, saved).await?,
    };
    check_ahead(replica, identity, outbox, &beyond).await?;
    beyond.retain(|(number, _)| *number > cursor);
    if !is_whole {
        if saved.0 > 0 {
            log::warn!(
                "replica {} should hold everything up to segment {saved}, but its volume.json is gone: it was wiped, and is filled again",
                replica.name()
            );
        }
        volume::write_volume(store, &identity.volume).await?;
    }
    ground.save(replica, cursors).await?;
    put_claims(replica, identity, &claimed).await?;
    let manifests = store.list(CHECKPOINTS).await?;
    let checkpoint = manifests.iter().filter_map(|o| match ObjectName::parse(&o.path) {
        Some(ObjectName::CheckpointManifest(number, _)) if number <= cursor => Some(number),
        _ => None,
    });
    let checkpoint = checkpoint.max().unwrap_or_default();
    Ok(Attached { cursor, checkpoint, looked, lost: lost_branch(replica, identity, &beyond), beyond })
}

/// Fails while the replica holds a claim that the other replicas contradicted when the volume was mounted.
async fn check_contest(replica: &Replica, identity: &Identity) -> Result<(), AttachError> {
    let Some(claim) = replica.contest() else { return Ok(()) };
    match volume::read_claim(replica.store(), claim.epoch, identity.volume.volume).await {
        Ok(there) if there.claim_id == claim.claim_id => {
            let reason = FenceReason::TakenOver {
                epoch: claim.epoch,
                first_segment: claim.begins(),
                claim: Some(Box::new(claim)),
            };
            let by = Fenced { replica: replica.name().clone(), reason };
            Err(AttachError::Foreign(sight::contested(replica, &by)))
        }
        Err(VolumeError::Store(e)) if e.kind != ErrorKind::Absent => Err(e.into()),
        _ => {
            replica.set_contest(None);
            Ok(())
        }
    }
}

/// At most this many segments that we have not sealed are looked at: junk may have any number of names.
const LOOK_AHEAD: usize = 16;

/// Fails when the replica holds a segment of our epoch that we have not sealed: then somebody wrote with a newer copy of our state. A
/// name without an intact segment is damage.
async fn check_ahead(
    replica: &Replica,
    identity: &Identity,
    outbox: &Arc<dyn Outbox>,
    beyond: &BTreeSet<(SegmentNo, Epoch)>,
) -> Result<(), AttachError> {
    // Asked for after the listing: what our own shippers sent meanwhile is sealed by now.
    let newest = *outbox.watch().borrow();
    let ahead = beyond.iter().filter(|(number, epoch)| *epoch >= identity.epoch() && *number > newest);
    for (segment, epoch) in ahead.copied().take(LOOK_AHEAD) {
        let (store, volume) = (replica.store(), identity.volume.volume);
        if sight::end_of(store, volume, segment, epoch).await?.is_some() {
            let reason = FenceReason::Ahead { segment, epoch, newest };
            return Err(AttachError::Fenced(Box::new(Fenced { replica: replica.name().clone(), reason })));
        }
        log::warn!(
            "replica {}: {} is damaged, and nobody here wrote it",
            replica.name(),
            ObjectName::Segment(segment, epoch)
        );
    }
    Ok(())
}

/// What to say of segments that later claims made invalid.
fn lost_branch(
    replica: &Replica,
    identity: &Identity,
    beyond: &BTreeSet<(SegmentNo, Epoch)>,
) -> Option<String> {
    let lost = |n: SegmentNo, e: Epoch| volume::valid_epoch(&identity.claims, n).is_some_and(|v| v > e);
    let lost: Vec<_> = beyond.iter().filter(|(n, e)| lost(*n, *e)).collect();
    let (first, epoch) = lost.first()?;
    let by = identity.claims.iter().find(|c| c.epoch == *epoch);
    let by = by.map_or_else(String::new, |c| format!(" by {} (process {})", c.host, c.pid));
    Some(format!(
        "replica {} holds {} segment(s) from {first} on, written{by} in epoch {epoch}, that are not part of the volume: it was \
         brought back from another replica that did not have them, or they belong to a group that was never completed",
        replica.name(),
        lost.len()
    ))
}

/// The epochs claimed on the replica; an error when one is above ours.
async fn claimed(replica: &Replica, identity: &Identity) -> Result<Vec<Epoch>, AttachError> {
    let listed = replica.store().list(EPOCHS).await?;
    let claims = listed.iter().filter_map(|o| match ObjectName::parse(&o.path) {
        Some(ObjectName::Claim(epoch)) => Some(epoch),
        _ => None,
    });
    let there: Vec<Epoch> = claims.collect();
    let ours = there.iter().copied().filter(|e| *e >= identity.epoch());
    match sight::above(replica, identity, ours.collect()).await? {
        Sight::Clear { .. } => Ok(there),
        Sight::Damaged(epoch, text) => {
            Err(AttachError::Foreign(sight::contested_claim(replica, epoch, text)))
        }
        Sight::Rival(by) => Err(AttachError::Fenced(by)),
    }
}

/// Sees that all known claims stand on the replica, where `there` are already.
async fn put_claims(replica: &Replica, identity: &Identity, there: &[Epoch]) -> Result<(), AttachError> {
    let store = replica.store();
    for claim in &identity.claims {
        let ours = claim.epoch == identity.epoch();
        if there.contains(&claim.epoch) && !ours {
            continue;
        }
        match volume::put_claim(store, claim).await {
            Ok(()) => {}
            Err(VolumeError::Held { claim, replica }) if ours => {
                let first_segment = claim.begins();
                let reason = FenceReason::TakenOver { epoch: claim.epoch, claim: Some(claim), first_segment };
                return Err(AttachError::Fenced(Box::new(Fenced { replica, reason })));
            }
            Err(e) => return Err(e.into()),
        }
    }
    Ok(())
}

/// Compares the saved cursor with the replica, by two requests when they agree and by a whole listing when they do not. Gives the
/// cursor and what is listed: all that lies beyond the saved one, at least.
async fn find_cursor(
    replica: &Replica,
    identity: &Identity,
    outbox: &Arc<dyn Outbox>,
    saved: SegmentNo,
) -> Result<(SegmentNo, BTreeSet<(SegmentNo, Epoch)>), AttachError> {
    let store = replica.store();
    if saved.0 > 0 && holds(store, identity, outbox, saved).await? {
        let before = SegmentNo(saved.0 - 1);
        let listed = store.list_after(SEGMENTS, &ObjectName::Segment(before, Epoch(u32::MAX)).path()).await?;
        return Ok((saved, segments_of(&listed).into_keys().collect()));
    }
    let listed = list_segments(store).await?;
    let all = listed.keys().copied().collect();
    Ok((find_end(replica, identity, outbox, saved, listed).await?, all))
}

/// Whether the segment of the saved cursor is there.
pub(super) async fn holds(
    store: &Store,
    identity: &Identity,
    outbox: &Arc<dyn Outbox>,
    saved: SegmentNo,
) -> Result<bool, AttachError> {
    let staged = segments_after(outbox, SegmentNo(saved.0.saturating_sub(1)), 1).await?;
    let known = staged.first().filter(|s| s.number == saved);
    let epoch = known.map(|s| s.epoch).or_else(|| volume::valid_epoch(&identity.claims, saved));
    let Some(epoch) = epoch else { return Ok(false) };
    match store.head(&ObjectName::Segment(saved, epoch).path()).await {
        Ok(info) => Ok(known.is_none_or(|s| s.len == info.size)),
        Err(e) if e.kind == ErrorKind::Absent => Ok(false),
        Err(e) => Err(e.into()),
    }
}

/// The cursor by what is listed, and a word when that is less than it was.
async fn find_end(
    replica: &Replica,
    identity: &Identity,
    outbox: &Arc<dyn Outbox>,
    saved: SegmentNo,
    listed: BTreeMap<(SegmentNo, Epoch), u64>,
) -> Result<SegmentNo, AttachError> {
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
    Ok(segments_of(&store.list(SEGMENTS).await?))
}

fn segments_of(listed: &[ObjectInfo]) -> BTreeMap<(SegmentNo, Epoch), u64> {
    let segment = |path: &str| match ObjectName::parse(path) {
        Some(ObjectName::Segment(number, epoch)) => Some((number, epoch)),
        _ => None,
    };
    listed.iter().filter_map(|o| Some((segment(&o.path)?, o.size))).collect()
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

/// A folder replica's filesystem, now and when it was last seen with something in it.
///
/// A folder that is empty though it held the volume was wiped, and is filled again, if it lies where it lay. If it lies on another
/// filesystem, its disk is not mounted: what is written there would fill the wrong disk, and be hidden as soon as the right one is back.
struct Ground {
    seat: Option<Seat>,
    before: Option<Filesystem>,
}

impl Ground {
    async fn look(
        replica: &Replica,
        cursors: &Arc<dyn CursorStore>,
        saved: SegmentNo,
    ) -> Result<Self, AttachError> {
        let store = replica.store();
        let Some(mut seat) = store.seat().await? else { return Ok(Self { seat: None, before: None }) };
        let before = ask(cursors, replica, |c, name| c.load_filesystem(name)).await?;
        let before = before.and_then(|text| text.parse::<Filesystem>().ok()).filter(|_| saved.0 > 0);
        if !seat.exists && before.is_some_and(|b| b.same(seat.filesystem)) {
            log::warn!(
                "replica {}: its folder {} was deleted; it is made again",
                replica.name(),
                seat.root.display()
            );
            store.prepare().await?;
            seat.exists = true;
        }
        Ok(Self { seat: Some(seat), before })
    }

    /// Fails when the folder, in which there is no volume, is on another filesystem than before.
    fn check(&self, store: &Store) -> Result<(), AttachError> {
        let (Some(seat), Some(before)) = (&self.seat, self.before) else { return Ok(()) };
        if before.same(seat.filesystem) {
            return Ok(());
        }
        let text = format!(
            "{} is {} and on another filesystem than before: is its disk mounted? Nothing is written there until it is (to \
             fill a new place give the replica another name)",
            seat.root.display(),
            if seat.exists { "empty" } else { "missing" },
        );
        Err(store.error("look at folder", "", ErrorKind::Config, text).into())
    }

    async fn save(&self, replica: &Replica, cursors: &Arc<dyn CursorStore>) -> Result<(), AttachError> {
        let Some(now) = self.seat.as_ref().map(|s| s.filesystem).filter(|f| self.before != Some(*f)) else {
            return Ok(());
        };
        ask(cursors, replica, move |c, name| c.save_filesystem(name, &now.to_string())).await
    }
}

async fn load(cursors: &Arc<dyn CursorStore>, replica: &Replica) -> Result<SegmentNo, AttachError> {
    ask(cursors, replica, |c, name| c.load(name)).await
}

/// Asks the cursor store off the async threads.
async fn ask<T: Send + 'static>(
    cursors: &Arc<dyn CursorStore>,
    replica: &Replica,
    what: impl FnOnce(&dyn CursorStore, &ReplicaName) -> Result<T, String> + Send + 'static,
) -> Result<T, AttachError> {
    let (cursors, name) = (Arc::clone(cursors), replica.name().clone());
    match tokio::task::spawn_blocking(move || what(&*cursors, &name)).await {
        Ok(answer) => answer.map_err(AttachError::Local),
        Err(e) => Err(AttachError::Local(e.to_string())),
    }
}
