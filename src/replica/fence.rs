//! Whether somebody else writes to the volume, known to all shippers at once.
//!
//! Owns the signal, its texts, the look at a replica's claims, and the mark of an orderly end. Decides nothing else: whoever sees another
//! writer raises the signal, everybody who writes ends by it.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use futures::stream::FuturesUnordered;
use tokio::sync::watch;

use super::attach::{AttachError, Identity};
use super::roster::Roster;
use super::shared::Replica;
use super::volume::{self, VolumeError};
use crate::format::names::{EPOCHS, ObjectName};
use crate::format::volume::{Claim, Release};
use crate::ids::{Epoch, ReplicaName, SegmentNo};

/// Wait after a look that failed.
const LOOK_AGAIN: Duration = Duration::from_millis(500);

/// Another writer was seen: nothing more may be written to any replica. Displays as a sentence with its remedy.
#[derive(Clone, Debug, PartialEq)]
pub struct Fenced {
    /// The replica on which it was seen.
    pub replica: ReplicaName,
    /// By what.
    pub reason: FenceReason,
}

/// What shows that somebody else writes, or wrote, where we would.
#[derive(Clone, Debug, PartialEq)]
pub enum FenceReason {
    /// A higher epoch was claimed, or ours by somebody else.
    TakenOver {
        /// The epoch.
        epoch: Epoch,
        /// Its claim; `None` when it cannot be read.
        claim: Option<Box<Claim>>,
        /// Where its branch leaves ours: the lowest first segment of all claims above ours; `None` when one cannot be read.
        first_segment: Option<SegmentNo>,
    },
    /// The replica holds a segment of our epoch that we have not sealed: the local state is older than it should be.
    Ahead {
        /// The segment.
        segment: SegmentNo,
        /// Its epoch.
        epoch: Epoch,
        /// The newest one that we have sealed.
        newest: SegmentNo,
    },
    /// The replica holds an intact segment under the name of one of ours, with other bytes.
    Contradicts {
        /// The segment.
        segment: SegmentNo,
        /// Its epoch.
        epoch: Epoch,
    },
}

impl fmt::Display for Fenced {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let replica = &self.replica;
        match &self.reason {
            FenceReason::TakenOver { epoch, claim: Some(claim), .. } => write!(
                f,
                "replica {replica}: epoch {epoch} was claimed by {} (process {}): it took the volume over, nothing more is \
                 written from here; {SAVE}",
                claim.host, claim.pid
            ),
            FenceReason::TakenOver { epoch, claim: None, .. } => write!(
                f,
                "replica {replica}: epoch {epoch} was claimed by somebody else (the claim cannot be read): nothing more is \
                 written from here; {SAVE}"
            ),
            FenceReason::Ahead { segment, epoch, newest } => write!(
                f,
                "replica {replica} holds segment {segment} of epoch {epoch}, but this state folder, which wrote that epoch, \
                 knows segments up to {newest} only: {OLD_STATE}"
            ),
            FenceReason::Contradicts { segment, epoch } => write!(
                f,
                "replica {replica} holds another segment {segment} of epoch {epoch} than this state folder: {OLD_STATE}"
            ),
        }
    }
}

const SAVE: &str = "unmount, and save what was not sent with `mirrorfs salvage`";
const OLD_STATE: &str = "it was copied, or set back to an older state (backup, snapshot), and nothing is written from here; mount \
                         with an empty --state folder to go on from the replicas";

/// [`Fenced`] as it is kept in the state folder and shown: what was seen, where and when.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct FenceNote {
    /// Seconds since 1970.
    pub at: u64,
    /// The replica on which it was seen.
    pub replica: ReplicaName,
    /// The epoch that was seen: another writer's, or ours with contents that are not ours.
    pub epoch: Epoch,
    /// The other writer's claim, when that is what was seen and it can be read.
    pub claim: Option<Claim>,
    /// The first segment that is not ours any more, when that is known.
    pub first_segment: Option<SegmentNo>,
    /// The same as a sentence.
    pub text: String,
}

impl FenceNote {
    /// The note of what was seen at `at`, in seconds since 1970.
    #[must_use]
    pub fn new(fenced: &Fenced, at: u64) -> Self {
        let (epoch, claim, first_segment) = match &fenced.reason {
            FenceReason::TakenOver { epoch, claim, first_segment } => {
                (*epoch, claim.as_deref().cloned(), *first_segment)
            }
            FenceReason::Ahead { epoch, .. } | FenceReason::Contradicts { epoch, .. } => (*epoch, None, None),
        };
        Self { at, replica: fenced.replica.clone(), epoch, claim, first_segment, text: fenced.to_string() }
    }
}

/// The signal that all shippers of a volume share. Once raised it stays.
pub struct Fence {
    seen: watch::Sender<Option<Fenced>>,
    notify: Box<dyn Fn(&Fenced) + Send + Sync>,
}

impl Fence {
    /// Not raised. `notify` is called once, when it is.
    #[must_use]
    pub fn new(notify: impl Fn(&Fenced) + Send + Sync + 'static) -> Arc<Self> {
        Arc::new(Self { seen: watch::channel(None).0, notify: Box::new(notify) })
    }

    /// What was seen, if anything.
    #[must_use]
    pub fn seen(&self) -> Option<Fenced> {
        self.seen.borrow().clone()
    }

    /// Returns when the signal is raised, which may be never.
    pub async fn raised(&self) -> Fenced {
        let mut seen = self.seen.subscribe();
        let raised = seen.wait_for(Option::is_some).await.ok().and_then(|f| f.clone());
        match raised {
            Some(fenced) => fenced,
            // The sender lives in self.
            None => std::future::pending().await,
        }
    }

    /// Raises the signal, unless it was raised before.
    pub fn raise(&self, fenced: Fenced) {
        let first = self.seen.send_if_modified(|seen| {
            let first = seen.is_none();
            if first {
                *seen = Some(fenced.clone());
            }
            first
        });
        if first {
            log::error!("{fenced}");
            (self.notify)(&fenced);
        }
    }
}

/// Looks, with one request, whether an epoch above ours was claimed on the replica: any, since claims of those between may be missing.
pub(super) async fn look(replica: &Replica, identity: &Identity) -> Result<(), AttachError> {
    let ours = ObjectName::Claim(identity.epoch()).path();
    let listed = replica.store().list_after(EPOCHS, &ours).await?;
    let higher = listed.iter().filter_map(|o| match ObjectName::parse(&o.path) {
        Some(ObjectName::Claim(epoch)) => Some(epoch),
        _ => None,
    });
    let higher: Vec<Epoch> = higher.collect();
    if higher.is_empty() { Ok(()) } else { Err(taken_over(replica, identity, &higher).await) }
}

/// Looks, with one request, for another writer, and raises the signal when there is one. The error says why nothing can be said.
pub async fn look_for_rivals(
    replica: &Replica,
    identity: &Identity,
    fence: &Fence,
) -> Result<Option<Fenced>, String> {
    match look(replica, identity).await {
        Ok(()) => Ok(None),
        Err(AttachError::Fenced(fenced)) => {
            fence.raise((*fenced).clone());
            Ok(Some(*fenced))
        }
        Err(AttachError::Store(e)) => Err(e.to_string()),
        Err(AttachError::Foreign(e)) => Err(e.to_string()),
        Err(AttachError::Local(text)) => Err(text),
    }
}

/// The most claims above ours that are read; there is hardly ever more than one.
const READ_CLAIMS: usize = 16;

/// The error for claims above ours that are listed: their names alone are enough to stop.
pub(super) async fn taken_over(replica: &Replica, identity: &Identity, epochs: &[Epoch]) -> AttachError {
    let mut epochs = epochs.to_vec();
    epochs.sort_unstable();
    let epoch = epochs.last().copied().unwrap_or_default();
    // The first segments of later claims are hardly ever lower, but it is not impossible.
    let (mut first, mut all_read) = (None, epochs.len() <= READ_CLAIMS);
    let mut newest = None;
    for epoch in epochs.into_iter().rev().take(READ_CLAIMS).rev() {
        match volume::read_claim(replica.store(), epoch, identity.volume.volume).await {
            Ok(claim) => {
                first = first.into_iter().chain(claim.begins()).min();
                newest = Some(Box::new(claim));
            }
            Err(e @ VolumeError::WrongVolume { .. }) => return e.into(),
            Err(_) => all_read = false,
        }
    }
    let claim = newest.filter(|c| c.epoch == epoch);
    let reason = FenceReason::TakenOver { epoch, claim, first_segment: first.filter(|_| all_read) };
    AttachError::Fenced(Box::new(Fenced { replica: replica.name().clone(), reason }))
}

/// Marks our tenure as ended in good order, on those replicas that hold everything up to `newest`, the newest segment there is, and
/// show no other writer. Answers those on which the mark stands now. Nothing is marked once somebody else was seen. What fails is only
/// logged: without the mark the next writer has to say that he takes over. Bound it from outside.
pub async fn release(
    replicas: &[Arc<Replica>],
    identity: &Identity,
    fence: &Fence,
    newest: SegmentNo,
    released_at: u64,
) -> Vec<ReplicaName> {
    let Some(claim) = identity.claims.last().filter(|_| fence.seen().is_none()) else { return Vec::new() };
    let mark = Release {
        volume: claim.volume,
        epoch: claim.epoch,
        claim_id: claim.claim_id,
        released_at,
        last_segment: newest,
    };
    let complete = |r: &&Arc<Replica>| r.is_attached() && !r.is_paused() && r.cursor() >= newest;
    let each = replicas.iter().filter(complete).map(|replica| {
        let mark = &mark;
        async move {
            match look(replica, identity).await {
                Ok(()) if fence.seen().is_none() => {}
                Ok(()) => return None,
                Err(AttachError::Fenced(fenced)) => {
                    fence.raise(*fenced);
                    return None;
                }
                Err(e) => {
                    log::debug!("replica {}: not released there: {e:?}", replica.name());
                    return None;
                }
            }
            let failed = volume::release(std::slice::from_ref(replica.store()), mark).await;
            failed.iter().for_each(|e| log::warn!("the end of this tenure is not marked there: {e}"));
            failed.is_empty().then(|| replica.name().clone())
        }
    });
    futures::future::join_all(each).await.into_iter().flatten().collect()
}

/// Returns when enough replicas hold everything up to `segment` and each of them, looked at *after* it had stored that, showed no
/// other writer. `needed` says how many out of how many (those that are being filled for the first time not counted) that is; it is asked
/// again when the list changes. Whoever takes over later therefore finds the segment. One small request per replica and group of
/// segments, shared by all who wait. Waits as long as it takes: bound it from outside.
pub async fn confirm(
    roster: &Roster,
    identity: &Identity,
    fence: &Fence,
    segment: SegmentNo,
    needed: impl Fn(usize) -> usize,
) -> Result<(), Fenced> {
    let mut changes = roster.watch();
    loop {
        changes.mark_unchanged();
        let voters = roster.voters();
        let enough = async {
            let mut waiting: FuturesUnordered<_> =
                voters.iter().map(|r| confirm_one(r, identity, fence, segment)).collect();
            for _ in 0..needed(voters.len()) {
                match waiting.next().await {
                    Some(confirmed) => confirmed?,
                    None => break,
                }
            }
            Ok(())
        };
        tokio::select! {
            done = enough => {
                done?;
                return fence.seen().map_or(Ok(()), Err);
            }
            _ = changes.changed() => {}
        }
    }
}

async fn confirm_one(
    replica: &Replica,
    identity: &Identity,
    fence: &Fence,
    segment: SegmentNo,
) -> Result<(), Fenced> {
    loop {
        tokio::select! {
            fenced = fence.raised() => return Err(fenced),
            () = replica.wait_for(segment) => {}
        }
        let mut confirmed = replica.confirmed().await;
        if *confirmed >= segment {
            return Ok(());
        }
        // The order matters: what counts is what was there before the look.
        let stored = replica.cursor();
        match look(replica, identity).await {
            Ok(()) => *confirmed = (*confirmed).max(stored),
            Err(AttachError::Fenced(fenced)) => {
                fence.raise((*fenced).clone());
                return Err(*fenced);
            }
            Err(AttachError::Store(e)) => {
                replica.note_error(&e);
                tokio::time::sleep(LOOK_AGAIN).await;
            }
            Err(AttachError::Foreign(_) | AttachError::Local(_)) => tokio::time::sleep(LOOK_AGAIN).await,
        }
    }
}
