//! The small objects that say whose a replica is: `volume.json` and the writers' claims.
//!
//! Owns reading, creating and comparing them. Knows neither segments nor shipping, and deletes nothing.

use std::collections::BTreeSet;

use futures::future::join_all;
use futures::stream::{self, StreamExt};

use super::belief::plausible_end;
use super::error::{ErrorKind, StoreError};
use super::store::{Conditional, Created, Store};
use crate::format::codec::FormatError;
use crate::format::names::{EPOCHS, ObjectName};
use crate::format::volume::{Claim, Release, Volume};
use crate::ids::{Epoch, ReplicaName, SegmentNo, VolumeId};

/// Small objects read at a time from one replica.
const IN_FLIGHT: usize = 8;

/// Why a replica cannot be used as part of a volume.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum VolumeError {
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The replica belongs to another volume.
    #[error(
        "replica {replica} ({url}) holds volume {found}, not {expected}: give it another place, or use that volume"
    )]
    WrongVolume {
        /// The replica.
        replica: ReplicaName,
        /// Its URL.
        url: String,
        /// The volume there.
        found: VolumeId,
        /// The volume that was meant.
        expected: VolumeId,
    },
    /// There is something, but no volume.
    #[error(
        "replica {replica} ({url}) is not empty and holds no mirrorfs volume (found {example}): give it an empty place"
    )]
    Foreign {
        /// The replica.
        replica: ReplicaName,
        /// Its URL.
        url: String,
        /// One of the objects there.
        example: String,
    },
    /// One of the small objects cannot be read.
    #[error("replica {replica}: {object}: {error}")]
    Unreadable {
        /// The replica.
        replica: ReplicaName,
        /// The object.
        object: String,
        /// Why; `newer` tells damage from a newer format.
        error: FormatError,
    },
    /// Another writer holds the epoch.
    #[error(
        "replica {replica}: epoch {} is held by {} (process {}) since {}: that machine writes to this volume; \
         unmount it there, or mount again with --takeover when that machine is gone",
        claim.epoch, claim.host, claim.pid, claim.claimed_at
    )]
    Held {
        /// The replica on which it was seen.
        replica: ReplicaName,
        /// The other writer's claim.
        claim: Box<Claim>,
    },
    /// It shows another writer, or damaged claims, and the other replicas do not.
    #[error(
        "{text}. The other replicas do not show that, so they are written to, and replica {replica} is not. {remedy}"
    )]
    Contested {
        /// The replica.
        replica: ReplicaName,
        /// What it shows; names the replica.
        text: String,
        /// What a person can do.
        remedy: String,
    },
    /// The backend cannot tell the first writer from the second.
    #[error(
        "replica {replica} ({url}) cannot create an object only if it is absent, so it cannot keep two writers apart; \
         set conditional_put = \"disabled\" for it to accept that risk"
    )]
    NoConditions {
        /// The replica.
        replica: ReplicaName,
        /// Its URL.
        url: String,
    },
}

/// What lies at a replica's place.
#[derive(Clone, Debug, PartialEq)]
pub enum Found {
    /// Nothing at all.
    Empty,
    /// Objects of a volume, but no `volume.json` (wiped in part); never taken for an empty place.
    Headless,
    /// A volume.
    Volume(Volume),
}

/// A writer's tenure as found on a replica.
#[derive(Clone, Debug, PartialEq)]
pub struct Tenure {
    /// Its claim.
    pub claim: Claim,
    /// The mark of its orderly end, when there is one.
    pub release: Option<Release>,
}

/// The tenures found on a replica.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Tenures {
    /// Those that can be read, by ascending epoch.
    pub known: Vec<Tenure>,
    /// All epochs of which the replica lists a claim, also one that cannot be read. A name proves nothing.
    pub names: BTreeSet<Epoch>,
    /// Those of `names` whose claim failed verification.
    pub unread: BTreeSet<Epoch>,
    /// What failed verification, to be told and repaired.
    pub damaged: Vec<VolumeError>,
}

/// Where an epoch was claimed.
#[derive(Clone, Debug, PartialEq)]
pub struct Claimed {
    /// Replicas that hold our claim; never empty.
    pub on: Vec<ReplicaName>,
    /// Replicas that could not be asked; their shippers will put the claim there before anything else.
    pub failed: Vec<StoreError>,
    /// Replicas that hold something else in its place, fewer than hold our claim.
    pub refused: Vec<VolumeError>,
}

/// Looks what is at a replica's place. Objects that are not mirrorfs's and no `volume.json` is [`VolumeError::Foreign`].
pub async fn inspect(store: &Store) -> Result<Found, VolumeError> {
    let object = ObjectName::Volume.path();
    match store.get(&object).await {
        Ok(bytes) => Ok(Found::Volume(Volume::decode(&bytes).map_err(|e| unreadable(store, &object, e))?)),
        // The listing also tells a missing bucket, which some servers report as a missing object.
        Err(e) if e.kind == ErrorKind::Absent => {
            let objects = store.list("").await?;
            let is_ours = |path: &str| ObjectName::parse(path).is_some() || path.starts_with("selftest/");
            match objects.iter().find(|o| !is_ours(&o.path)) {
                Some(foreign) => Err(VolumeError::Foreign {
                    replica: store.name().clone(),
                    url: store.url().to_owned(),
                    example: foreign.path.clone(),
                }),
                None if objects.iter().all(|o| o.path.starts_with("selftest/")) => Ok(Found::Empty),
                None => Ok(Found::Headless),
            }
        }
        Err(e) => Err(e.into()),
    }
}

/// Reads a replica's volume and checks that it is the expected one.
pub async fn expect(store: &Store, expected: VolumeId) -> Result<Found, VolumeError> {
    let found = inspect(store).await?;
    if let Found::Volume(volume) = &found {
        check(store, volume, expected)?;
    }
    Ok(found)
}

fn check(store: &Store, volume: &Volume, expected: VolumeId) -> Result<(), VolumeError> {
    if volume.volume == expected {
        return Ok(());
    }
    Err(VolumeError::WrongVolume {
        replica: store.name().clone(),
        url: store.url().to_owned(),
        found: volume.volume,
        expected,
    })
}

/// Refuses a backend that ignores conditions, unless its options accept that. A new folder must have been made ([`Store::prepare`]).
pub async fn require_conditions(store: &Store, unique: u128) -> Result<(), VolumeError> {
    if !store.is_conditional() {
        return Ok(());
    }
    match store.self_test(unique).await? {
        Conditional::Works => Ok(()),
        Conditional::Ignored => {
            Err(VolumeError::NoConditions { replica: store.name().clone(), url: store.url().to_owned() })
        }
    }
}

/// Writes `volume.json`, making the replica's folder when it is one. That the same volume is there already is no error.
pub async fn create(store: &Store, volume: &Volume) -> Result<(), VolumeError> {
    store.prepare().await?;
    write_volume(store, volume).await
}

pub(super) async fn write_volume(store: &Store, volume: &Volume) -> Result<(), VolumeError> {
    let object = ObjectName::Volume.path();
    let bytes = volume.encode().map_err(|e| unreadable(store, &object, e))?;
    match store.put_if_absent(&object, bytes.into()).await? {
        Created::New => Ok(()),
        Created::Existed(bytes) => {
            let found = Volume::decode(&bytes).map_err(|e| unreadable(store, &object, e))?;
            check(store, &found, volume.volume)
        }
    }
}

/// The epochs of which a replica lists a claim, and a mark of the end.
async fn list_epochs(store: &Store) -> Result<(BTreeSet<Epoch>, BTreeSet<Epoch>), StoreError> {
    let listed = store.list(EPOCHS).await?;
    let (mut claims, mut releases) = (BTreeSet::new(), BTreeSet::new());
    for object in listed {
        match ObjectName::parse(&object.path) {
            Some(ObjectName::Claim(epoch)) => claims.insert(epoch),
            Some(ObjectName::Release(epoch)) => releases.insert(epoch),
            _ => false,
        };
    }
    Ok((claims, releases))
}

/// All writers' tenures on a replica. What fails verification (damaged, newer, another volume's) is no error, since other replicas
/// may know better. Claims above an implausible jump from `ours`, the highest epoch known here, are not read.
pub async fn tenures(store: &Store, volume: VolumeId, ours: Epoch) -> Result<Tenures, VolumeError> {
    let (names, releases) = list_epochs(store).await?;
    let end = plausible_end(ours, names.iter().copied());
    let (plausible, beyond): (BTreeSet<Epoch>, BTreeSet<Epoch>) = names.iter().partition(|e| **e <= end);
    let mut found = Tenures { names, ..Tenures::default() };
    if let (Some(first), Some(last)) = (beyond.first(), beyond.last()) {
        let why = format!(
            "{} claim(s) of epochs {first} to {last} after a jump from {end}: no writer leaves so many epochs out",
            beyond.len()
        );
        found.damaged.push(unreadable(
            store,
            &ObjectName::Claim(*last).path(),
            FormatError::new("claims", why),
        ));
    }
    found.unread = beyond;
    let mut read = stream::iter(plausible)
        .map(|epoch| {
            let released = releases.contains(&epoch);
            async move {
                let release =
                    async { if released { read_release(store, epoch).await.map(Some) } else { Ok(None) } };
                let (claim, release) = futures::join!(read_claim(store, epoch, volume), release);
                (epoch, claim, release)
            }
        })
        .buffered(IN_FLIGHT);
    while let Some((epoch, claim, release)) = read.next().await {
        let release = found.intact(release)?.flatten();
        let Some(claim) = found.intact(claim)? else {
            found.unread.insert(epoch);
            continue;
        };
        // A mark of another claim is left from a lost race and ends nothing.
        let release = release.filter(|r| r.claim_id == claim.claim_id);
        found.known.push(Tenure { claim, release });
    }
    drop(read);
    found.known.sort_by_key(|t| t.claim.epoch);
    Ok(found)
}

impl Tenures {
    fn intact<T>(&mut self, read: Result<T, VolumeError>) -> Result<Option<T>, VolumeError> {
        match read {
            Ok(value) => Ok(Some(value)),
            // Listed, and gone a moment later: voided meanwhile.
            Err(VolumeError::Store(e)) if e.kind == ErrorKind::Absent => Ok(None),
            Err(VolumeError::Store(e)) if e.kind != ErrorKind::Corrupt => Err(e.into()),
            Err(e) => {
                self.damaged.push(e);
                Ok(None)
            }
        }
    }
}

impl VolumeError {
    /// Whether one object there is damaged: what others hold is as good as before, but nothing may be written to the replica until it is
    /// repaired.
    #[must_use]
    pub fn is_damage(&self) -> bool {
        match self {
            Self::Unreadable { error, .. } => !error.newer,
            Self::Store(e) => e.kind == ErrorKind::Corrupt,
            _ => false,
        }
    }
}

async fn read_release(store: &Store, epoch: Epoch) -> Result<Release, VolumeError> {
    let object = ObjectName::Release(epoch).path();
    let bytes = store.get(&object).await?;
    Release::decode(&bytes, epoch).map_err(|e| unreadable(store, &object, e))
}

/// Reads one claim.
pub async fn read_claim(store: &Store, epoch: Epoch, volume: VolumeId) -> Result<Claim, VolumeError> {
    let object = ObjectName::Claim(epoch).path();
    let bytes = store.get(&object).await?;
    let claim = Claim::decode(&bytes, epoch).map_err(|e| unreadable(store, &object, e))?;
    if claim.volume != volume {
        return Err(VolumeError::WrongVolume {
            replica: store.name().clone(),
            url: store.url().to_owned(),
            found: claim.volume,
            expected: volume,
        });
    }
    Ok(claim)
}

/// Puts a claim on one replica; [`VolumeError::Held`] when another writer was first.
pub async fn put_claim(store: &Store, claim: &Claim) -> Result<(), VolumeError> {
    let object = ObjectName::Claim(claim.epoch).path();
    let bytes = claim.encode().map_err(|e| unreadable(store, &object, e))?;
    match store.put_if_absent(&object, bytes.into()).await? {
        Created::New => Ok(()),
        Created::Existed(bytes) => {
            let other = Claim::decode(&bytes, claim.epoch).map_err(|e| unreadable(store, &object, e))?;
            if other.claim_id == claim.claim_id {
                return Ok(());
            }
            Err(VolumeError::Held { replica: store.name().clone(), claim: Box::new(other) })
        }
    }
}

/// Puts those of `older` on a replica that it does not list, in their order, and then `claim`. So a replica never shows a claim
/// without those before it, and a jump between epochs is damage. An older one that differs there is left alone.
async fn put_in_order(store: &Store, claim: &Claim, older: &[Claim]) -> Result<(), VolumeError> {
    if !older.is_empty() {
        let (there, _) = list_epochs(store).await?;
        for old in older.iter().filter(|c| c.epoch < claim.epoch && !there.contains(&c.epoch)) {
            match put_claim(store, old).await {
                Ok(()) | Err(VolumeError::Held { .. } | VolumeError::Unreadable { .. }) => {}
                Err(e) => return Err(e),
            }
        }
    }
    put_claim(store, claim).await
}

/// Claims an epoch on all given replicas, after the claims in `older` that they lack. Those that create conditionally come first,
/// otherwise they are asked in the order of their names, until one has taken the claim, so that of two writers at most one goes on; then
/// the others at once. A lost race is [`VolumeError::Held`]: the first one asked, or half of those that answer, hold another claim.
/// Replicas that cannot be asked, or hold something that is no claim, are listed, and it is an error only when all do.
pub async fn claim(stores: &[Store], claim: &Claim, older: &[Claim]) -> Result<Claimed, VolumeError> {
    let mut stores: Vec<_> = stores.iter().collect();
    // One that overwrites silently cannot decide who was first; where there is no other the user has accepted that.
    stores.sort_by_key(|s| (!s.is_conditional(), s.name()));
    let mut claimed = Claimed { on: Vec::new(), failed: Vec::new(), refused: Vec::new() };
    let mut rest = stores.into_iter();
    for store in rest.by_ref() {
        match put_in_order(store, claim, older).await {
            Ok(()) => {
                claimed.on.push(store.name().clone());
                break;
            }
            Err(e @ VolumeError::Held { .. }) => return Err(e),
            Err(e) => claimed.not_on(e),
        }
    }
    let put = |s| async move { (s, put_in_order(s, claim, older).await) };
    for (store, result) in join_all(rest.map(put)).await {
        match result {
            Ok(()) => claimed.on.push(store.name().clone()),
            Err(e) => claimed.not_on(e),
        }
    }
    let held: Vec<_> = claimed.refused.iter().filter(|e| matches!(e, VolumeError::Held { .. })).collect();
    if let Some(by) = held.first().filter(|_| held.len() >= claimed.on.len()) {
        return Err((*by).clone());
    }
    match (claimed.failed.first(), claimed.refused.first()) {
        (_, Some(e)) if claimed.on.is_empty() => Err(e.clone()),
        (Some(e), None) if claimed.on.is_empty() => Err(e.clone().into()),
        _ => Ok(claimed),
    }
}

impl Claimed {
    fn not_on(&mut self, error: VolumeError) {
        match error {
            VolumeError::Store(e) => self.failed.push(e),
            e => self.refused.push(e),
        }
    }
}

/// Marks the orderly end of a tenure on all given replicas; gives the errors of those where that failed.
pub async fn release(stores: &[Store], release: &Release) -> Vec<VolumeError> {
    let object = ObjectName::Release(release.epoch).path();
    let put = |store: Store| {
        let (object, release) = (object.clone(), release.clone());
        async move {
            let bytes = release.encode().map_err(|e| unreadable(&store, &object, e))?;
            store.put(&object, bytes.into()).await.map_err(VolumeError::from)
        }
    };
    join_all(stores.iter().cloned().map(put)).await.into_iter().filter_map(Result::err).collect()
}

/// The epoch whose segment `number` counts: the highest whose first segment is at or below it. `None` before all claims.
#[must_use]
pub fn valid_epoch<'a>(claims: impl IntoIterator<Item = &'a Claim>, number: SegmentNo) -> Option<Epoch> {
    claims.into_iter().filter(|c| c.first_segment <= number).map(|c| c.epoch).max()
}

fn unreadable(store: &Store, object: &str, error: FormatError) -> VolumeError {
    VolumeError::Unreadable { replica: store.name().clone(), object: object.to_owned(), error }
}

#[cfg(test)]
mod tests;
