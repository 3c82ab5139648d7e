//! Removing a claim that should not be: forged, or of a writer that is gone for good and wrote
//! nothing of use.
//!
//! Acts on one replica, and on the state folder that the claim has fenced. Shows everything first,
//! and changes nothing without consent.

use std::path::Path;

use futures::future::join_all;
use serde::Serialize;

use super::state::{Local, StateDir};
use super::{Error, open};
use crate::exit::Exit;
use crate::format::names::{CHECKPOINTS, ObjectName, SEGMENTS};
use crate::format::volume::Claim;
use crate::ids::{Epoch, ReplicaName, VolumeId};
use crate::replica::volume::{self, Found, VolumeError};
use crate::replica::{ErrorKind, Store};

/// What there is to know before a claim is removed, and whether it was.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct VoidReport {
    /// The replica.
    pub replica: ReplicaName,
    /// Its URL, without secrets.
    pub url: String,
    /// The epoch.
    pub epoch: Epoch,
    /// The claim; `None` when there is none, or it cannot be read.
    pub claim: Option<Claim>,
    /// Why it cannot be read.
    pub unreadable: Option<String>,
    /// When it was claimed, as text.
    pub claimed_at: Option<String>,
    /// Segments that were written under it.
    pub segments: u64,
    /// Their bytes.
    pub bytes: u64,
    /// The other replicas that hold the same claim.
    pub elsewhere: Vec<ReplicaName>,
    /// The state folder that is fenced by it.
    pub fenced: Option<String>,
    /// Whether claim, segments and fence are gone now.
    pub removed: bool,
}

/// Looks at the claim of `epoch` on `store`, and removes it with what was written under it when
/// `discard`. `others` are the volume's other replicas; `state` is the folder whose fence is taken
/// back.
pub async fn void_claim(
    store: &Store,
    others: &[Store],
    state: Option<&Path>,
    epoch: Epoch,
    discard: bool,
) -> Result<VoidReport, Error> {
    let locked = state.filter(|dir| dir.join("state.json").exists()).map(StateDir::lock).transpose()?;
    let local = locked.as_ref().map(StateDir::read).transpose()?.flatten();
    if state.is_some() && local.is_none() {
        let dir = state.unwrap_or(Path::new("")).display();
        return Err(Error::new(Exit::Usage, format!("{dir} is no state folder: it holds no state.json")));
    }
    let volume = volume_of(store, local.as_ref()).await?;
    let (claim, unreadable) = match volume::read_claim(store, epoch, volume).await {
        Ok(claim) => (Some(claim), None),
        Err(VolumeError::Store(e)) if e.kind == ErrorKind::Absent => (None, None),
        Err(VolumeError::Store(e)) if e.kind != ErrorKind::Corrupt => {
            return Err(Error::new(Exit::Unreachable, e.to_string()));
        }
        Err(e) => (None, Some(e.to_string())),
    };
    if let Some(claim) = &claim {
        refuse_own(local.as_ref(), claim)?;
    }
    // What lies under an epoch of this folder is its own, whoever forged the claim.
    let ours = local.as_ref().is_some_and(|l| l.claims.iter().any(|c| c.epoch == epoch));
    let objects = if ours { Vec::new() } else { written_under(store, epoch).await? };
    let fenced = local.as_ref().is_some_and(|l| is_fenced_by(l, epoch, claim.as_ref()));
    let mut report = VoidReport {
        replica: store.name().clone(),
        url: store.url().to_owned(),
        epoch,
        claimed_at: claim.as_ref().map(|c| open::when(c.claimed_at)),
        segments: objects.iter().filter(|(path, _)| path.starts_with(SEGMENTS)).count() as u64,
        bytes: objects.iter().map(|(_, size)| size).sum(),
        elsewhere: elsewhere(others, epoch, volume, claim.as_ref()).await,
        fenced: state.filter(|_| fenced).map(|dir| dir.display().to_string()),
        claim,
        unreadable,
        removed: false,
    };
    let there = report.claim.is_some() || report.unreadable.is_some() || !objects.is_empty();
    if !there && !fenced {
        return Err(Error::new(
            Exit::Usage,
            format!("replica {}: nothing is claimed or written under epoch {epoch}", report.replica),
        ));
    }
    // Of one replica among several.
    if 2 * (report.elsewhere.len() + 1) > others.len() + 1 && !others.is_empty() {
        let on: Vec<_> = report.elsewhere.iter().map(ToString::to_string).collect();
        return Err(Error::new(
            Exit::InUse,
            format!(
                "the claim of epoch {epoch} is on replica {} and also on {}: that is a writer of the volume, not what one replica \
                 made up. Nothing was changed",
                report.replica,
                on.join(", ")
            ),
        ));
    }
    if discard {
        remove(store, epoch, &objects).await?;
        if let (Some(state), Some(mut local), true) = (&locked, local, fenced) {
            local.fenced = None;
            state.write(&local)?;
        }
        report.removed = true;
    }
    Ok(report)
}

/// The volume that the claim should be of.
async fn volume_of(store: &Store, local: Option<&Local>) -> Result<VolumeId, Error> {
    if let Some(local) = local {
        return Ok(local.volume.volume);
    }
    match volume::inspect(store).await? {
        Found::Volume(volume) => Ok(volume.volume),
        Found::Empty | Found::Headless => Err(Error::new(
            Exit::NoVolume,
            format!(
                "replica {} ({}) has no volume.json: name the --state folder, too",
                store.name(),
                store.url()
            ),
        )),
    }
}

/// Refuses what the state folder itself has claimed.
fn refuse_own(local: Option<&Local>, claim: &Claim) -> Result<(), Error> {
    let own = local.is_some_and(|l| l.claims.iter().any(|c| c.claim_id == claim.claim_id));
    if !own {
        return Ok(());
    }
    Err(Error::new(
        Exit::Usage,
        format!(
            "the claim of epoch {} is this state folder's own, or one that it builds on; nothing was changed",
            claim.epoch
        ),
    ))
}

/// Whether the state folder was fenced by this claim. One that is gone from the replica can be told
/// by its epoch only.
fn is_fenced_by(local: &Local, epoch: Epoch, claim: Option<&Claim>) -> bool {
    local.fenced.as_ref().is_some_and(|note| {
        let noted = note.claim.as_ref();
        note.epoch == epoch && noted.is_none_or(|n| claim.is_none_or(|c| c.claim_id == n.claim_id))
    })
}

/// Segments and checkpoints of the epoch, with their sizes.
async fn written_under(store: &Store, epoch: Epoch) -> Result<Vec<(String, u64)>, Error> {
    let mut found = Vec::new();
    for prefix in [CHECKPOINTS, SEGMENTS] {
        let listed = store.list(prefix).await.map_err(VolumeError::from)?;
        found.extend(listed.into_iter().filter(|o| match ObjectName::parse(&o.path) {
            Some(
                ObjectName::Segment(_, e)
                | ObjectName::CheckpointPart(_, e, _)
                | ObjectName::CheckpointManifest(_, e),
            ) => e == epoch,
            _ => false,
        }));
    }
    Ok(found.into_iter().map(|o| (o.path, o.size)).collect())
}

/// The other replicas that hold the same claim.
async fn elsewhere(
    others: &[Store],
    epoch: Epoch,
    volume: VolumeId,
    claim: Option<&Claim>,
) -> Vec<ReplicaName> {
    let Some(claim) = claim else { return Vec::new() };
    let asked = others.iter().map(|store| async move {
        let there = volume::read_claim(&open::quick(store), epoch, volume).await;
        there.is_ok_and(|c| c.claim_id == claim.claim_id).then(|| store.name().clone())
    });
    join_all(asked).await.into_iter().flatten().collect()
}

/// The claim goes last, so that a run that was broken off is repeated.
async fn remove(store: &Store, epoch: Epoch, objects: &[(String, u64)]) -> Result<(), Error> {
    let small = [ObjectName::Release(epoch).path(), ObjectName::Claim(epoch).path()];
    for path in objects.iter().map(|(path, _)| path).chain(&small) {
        store.delete(path).await.map_err(VolumeError::from)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests;
