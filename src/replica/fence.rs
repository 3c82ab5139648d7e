//! Whether somebody else writes to the volume, known to all shippers at once.
//!
//! Owns the signal, its texts, and the mark of an orderly end. What a replica shows is read in `sight`, and whether it is believed is
//! decided in `belief`: the caller that sees another writer asks the other replicas before it raises the signal.

use std::fmt;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use futures::StreamExt;
use futures::stream::FuturesUnordered;
use tokio::sync::watch;

use super::attach::{AttachError, Identity};
use super::belief::{Testimony, Verdict, judge};
use super::roster::Roster;
use super::shared::Replica;
use super::sight::{self, Sight};
use super::volume;
use crate::format::volume::{Claim, Release};
use crate::ids::{Epoch, ReplicaName, SegmentNo};

/// Wait after a look that failed.
const LOOK_AGAIN: Duration = Duration::from_millis(500);
/// Wait after a look at a replica that only a person can put right.
const LOOK_MUCH_LATER: Duration = Duration::from_secs(5);

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

impl Fenced {
    /// The epoch that was seen.
    #[must_use]
    pub fn epoch(&self) -> Epoch {
        match &self.reason {
            FenceReason::TakenOver { epoch, .. }
            | FenceReason::Ahead { epoch, .. }
            | FenceReason::Contradicts { epoch, .. } => *epoch,
        }
    }

    /// The other writer's claim, when that is what was seen and it can be read.
    #[must_use]
    pub fn claim(&self) -> Option<&Claim> {
        match &self.reason {
            FenceReason::TakenOver { claim, .. } => claim.as_deref(),
            FenceReason::Ahead { .. } | FenceReason::Contradicts { .. } => None,
        }
    }

    /// What was seen, without what follows from it.
    #[must_use]
    pub fn shown(&self) -> String {
        let replica = &self.replica;
        match &self.reason {
            FenceReason::TakenOver { epoch, claim: Some(claim), .. } => {
                format!(
                    "replica {replica}: epoch {epoch} was claimed by {} (process {})",
                    claim.host, claim.pid
                )
            }
            FenceReason::TakenOver { epoch, claim: None, .. } => {
                format!(
                    "replica {replica}: epoch {epoch} was claimed by somebody else (the claim cannot be read)"
                )
            }
            FenceReason::Ahead { segment, epoch, newest } => format!(
                "replica {replica} holds segment {segment} of epoch {epoch}, but this state folder, which wrote that epoch, \
                 knows segments up to {newest} only"
            ),
            FenceReason::Contradicts { segment, epoch } => {
                format!(
                    "replica {replica} holds another segment {segment} of epoch {epoch} than this state folder"
                )
            }
        }
    }
}

impl fmt::Display for Fenced {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (shown, replica, epoch) = (self.shown(), &self.replica, self.epoch());
        match &self.reason {
            FenceReason::TakenOver { claim, .. } => {
                let took = if claim.is_some() { "it took the volume over, " } else { "" };
                write!(
                    f,
                    "{shown}: {took}nothing more is written from here; {SAVE}. If that claim is forged or of no use: unmount, \
                     and remove it with `mirrorfs replica void-claim {replica} {epoch}`"
                )
            }
            FenceReason::Ahead { .. } | FenceReason::Contradicts { .. } => write!(f, "{shown}: {OLD_STATE}"),
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
    /// The replicas that are asked before one of them is believed. Without them each is believed at once.
    witnesses: OnceLock<Arc<Roster>>,
}

impl Fence {
    /// Not raised. `notify` is called once, when it is.
    #[must_use]
    pub fn new(notify: impl Fn(&Fenced) + Send + Sync + 'static) -> Arc<Self> {
        Arc::new(Self { seen: watch::channel(None).0, notify: Box::new(notify), witnesses: OnceLock::new() })
    }

    /// Names the replicas that are asked before one of them is believed. Only the first call counts.
    pub fn ask(&self, witnesses: Arc<Roster>) {
        let _ = self.witnesses.set(witnesses);
    }

    /// The error for another writer that `replica` shows: [`AttachError::Fenced`] when more replicas show one than know only us,
    /// else [`AttachError::Foreign`], for this replica alone.
    pub(super) async fn weigh(&self, replica: &Replica, identity: &Identity, by: Box<Fenced>) -> AttachError {
        let others = self.witnesses.get().map_or_else(Vec::new, |roster| roster.voters());
        let others = others.iter().filter(|r| r.name() != replica.name());
        let asked = others.map(|other| {
            let by = &by;
            async move { (other.name().clone(), sight::testify(other, identity, replica, by).await) }
        });
        let mut said = futures::future::join_all(asked).await;
        let contested = sight::contested(replica, &by);
        said.push((replica.name().clone(), Testimony::Rival(by)));
        match judge(&said) {
            Verdict::TakenOver(by) => AttachError::Fenced(by),
            Verdict::Ours { .. } | Verdict::Unknown(_) => AttachError::Foreign(contested),
        }
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
pub(super) async fn look(replica: &Replica, identity: &Identity, fence: &Fence) -> Result<(), AttachError> {
    match sight::look(replica, identity).await? {
        Sight::Clear { .. } => Ok(()),
        Sight::Damaged(epoch, text) => {
            Err(AttachError::Foreign(sight::contested_claim(replica, epoch, text)))
        }
        Sight::Rival(by) => Err(fence.weigh(replica, identity, by).await),
    }
}

/// Looks, with one request, for another writer, and raises the signal when there is one. The error says why nothing can be said.
pub async fn look_for_rivals(
    replica: &Replica,
    identity: &Identity,
    fence: &Fence,
) -> Result<Option<Fenced>, String> {
    match look(replica, identity, fence).await {
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
            match look(replica, identity, fence).await {
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
        match look(replica, identity, fence).await {
            Ok(()) => *confirmed = (*confirmed).max(stored),
            Err(AttachError::Fenced(fenced)) => {
                fence.raise((*fenced).clone());
                return Err(*fenced);
            }
            Err(AttachError::Store(e)) => {
                replica.note_error(&e);
                tokio::time::sleep(LOOK_AGAIN).await;
            }
            Err(AttachError::Foreign(_)) => tokio::time::sleep(LOOK_MUCH_LATER).await,
            Err(AttachError::Local(_)) => tokio::time::sleep(LOOK_AGAIN).await,
        }
    }
}
