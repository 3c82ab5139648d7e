//! What to do with what was found: create a volume, go on with the local state, or bring the volume back from replicas.
//!
//! Owns that decision (a pure function) and the looking around before it. Writes nothing.

use futures::future::join_all;

use super::Error;
use super::state::Local;
use crate::exit::Exit;
use crate::format::volume::{Claim, Volume};
use crate::ids::VolumeId;
use crate::replica::volume::{self, Found, Tenures, VolumeError};
use crate::replica::{ErrorKind, Store};

/// One replica as it was found.
pub(super) struct Seen {
    pub store: Store,
    pub found: Result<Found, VolumeError>,
}

/// What to do.
#[derive(Debug, PartialEq)]
pub(super) enum Decision {
    /// Every replica is empty and there is no local state: a new volume.
    Create,
    /// Go on with the local state.
    GoOn {
        /// What a person should know.
        warnings: Vec<String>,
    },
    /// Bring the volume back from those replicas that hold it.
    Restore {
        /// What a person should know.
        warnings: Vec<String>,
    },
}

/// Looks what is at each replica's place.
pub(super) async fn look(stores: &[Store]) -> Vec<Seen> {
    join_all(
        stores
            .iter()
            .map(|store| async move { Seen { store: store.clone(), found: volume::inspect(store).await } }),
    )
    .await
}

/// The exit code that tells what is wrong with a replica.
pub(super) fn exit_of(error: &VolumeError) -> Exit {
    match error {
        VolumeError::Store(e) => match e.kind {
            ErrorKind::Corrupt => Exit::Damaged,
            ErrorKind::Unsupported => Exit::Usage,
            _ => Exit::Unreachable,
        },
        VolumeError::WrongVolume { .. } | VolumeError::Foreign { .. } => Exit::WrongVolume,
        VolumeError::Unreadable { error, .. } if error.newer => Exit::TooNew,
        VolumeError::Unreadable { .. } => Exit::Damaged,
        VolumeError::Held { .. } => Exit::InUse,
        VolumeError::NoConditions { .. } => Exit::Usage,
    }
}

impl From<VolumeError> for Error {
    fn from(e: VolumeError) -> Self {
        Error::new(exit_of(&e), e.to_string())
    }
}

/// Refuses replicas of different volumes (or of another one than expected).
fn one_volume(seen: &[Seen], expected: Option<VolumeId>) -> Result<Option<&Volume>, Error> {
    let mut first: Option<(&Store, &Volume)> = None;
    for s in seen {
        let Ok(Found::Volume(volume)) = &s.found else { continue };
        let (store, id) = (&s.store, volume.volume);
        if let Some(expected) = expected.filter(|e| *e != id) {
            return Err(Error::new(
                Exit::WrongVolume,
                format!(
                    "replica {} ({}) holds volume {id}, but the state folder belongs to volume {expected}: name the \
                     right replicas, or another --state folder",
                    store.name(),
                    store.url()
                ),
            ));
        }
        match first {
            Some((other, v)) if v.volume != id => {
                return Err(Error::new(
                    Exit::WrongVolume,
                    format!(
                        "replica {} ({}) holds volume {id}, but replica {} ({}) holds volume {}: name replicas of \
                         one volume",
                        store.name(),
                        store.url(),
                        other.name(),
                        other.url(),
                        v.volume
                    ),
                ));
            }
            _ => first = first.or(Some((store, volume))),
        }
    }
    Ok(first.map(|(_, v)| v))
}

/// Decides what to do. Anything wrong is an error that names the replica; nothing has been changed then.
///
/// A replica that does not answer stops nobody who has a local state. Without one it does, unless the mount is
/// `read_only`: it may hold the newest changes, and a new writer that goes on without them cuts them off for good.
pub(super) fn decide(local: Option<&Local>, seen: &[Seen], read_only: bool) -> Result<Decision, Error> {
    let volume = one_volume(seen, local.map(|l| l.volume.volume))?;
    let mut warnings = Vec::new();
    for s in seen {
        let Err(e) = &s.found else { continue };
        // What others hold is as good as before; its shipper writes nothing there until it is repaired.
        if e.is_damage() && (local.is_some() || volume.is_some()) {
            warnings.push(format!("goes on without it until it is repaired: {e}"));
            continue;
        }
        let unreachable = matches!(e, VolumeError::Store(_));
        if (local.is_some() || read_only && volume.is_some()) && unreachable {
            warnings.push(format!("goes on without it for now: {e}"));
            continue;
        }
        let hint = match (unreachable, volume) {
            (false, _) => "",
            (true, None) => "; mend it, or leave this replica out",
            (true, Some(_)) => {
                "; mend it, or mount with --read-only, or mount without this replica (what only it holds is given up then)"
            }
        };
        return Err(Error::new(exit_of(e), format!("{e}{hint}")));
    }
    match (local, volume) {
        (Some(_), _) => Ok(Decision::GoOn { warnings }),
        (None, Some(_)) => Ok(Decision::Restore { warnings }),
        (None, None) => match seen.iter().find(|s| s.found == Ok(Found::Headless)) {
            Some(s) => Err(Error::new(
                Exit::Damaged,
                format!(
                    "replica {} ({}) has objects of a volume but no volume.json: name a replica that is whole beside it, \
                     or empty its place",
                    s.store.name(),
                    s.store.url()
                ),
            )),
            None => Ok(Decision::Create),
        },
    }
}

/// The claim among `there` that takes the volume from us: one of an epoch of ours with another id, or one that we do not
/// know and that came after our first.
fn rival<'a>(local: &Local, there: impl IntoIterator<Item = &'a Claim>) -> Option<&'a Claim> {
    there.into_iter().find(|claim| match local.claims.iter().find(|c| c.epoch == claim.epoch) {
        Some(known) => known.claim_id != claim.claim_id,
        None => claim.epoch > local.own_since,
    })
}

/// Refuses to go on with a local state when another writer came after it. `tenures` are those of one replica.
pub(super) fn check_tenures(local: &Local, replica: &Store, tenures: &Tenures) -> Result<(), Error> {
    let known = local.claims.iter().map(|c| c.epoch).max().unwrap_or_default();
    let (epoch, by) = match rival(local, tenures.known.iter().rev().map(|t| &t.claim)) {
        Some(claim) => (claim.epoch, format!("{} (process {})", claim.host, claim.pid)),
        None if !local.borrowed && tenures.highest > known => {
            (tenures.highest, "somebody (the claim cannot be read)".to_owned())
        }
        None => return Ok(()),
    };
    Err(Error::new(
        Exit::InUse,
        format!(
            "the volume was taken over: replica {} shows epoch {epoch} of {by}, this state has epoch {}. What was \
             written here and not sent is still in the state folder; to follow the other writer mount with an empty \
             --state folder",
            replica.name(),
            local.epoch()
        ),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::volume::Compression;
    use crate::replica::StoreError;

    fn volume(n: u8) -> Volume {
        Volume {
            volume: VolumeId::from_random([n; 16]),
            created_at: 1,
            block_size: 1 << 20,
            compression: Compression::Zstd,
            key_wrapping: None,
            created_by: "test".into(),
        }
    }

    fn seen(found: Vec<Result<Found, ErrorKind>>) -> Vec<Seen> {
        found
            .into_iter()
            .enumerate()
            .map(|(i, found)| {
                let store = Store::in_memory(format!("r{i}").parse().unwrap());
                let found = found.map_err(|kind| {
                    VolumeError::Store(StoreError {
                        replica: store.name().clone(),
                        op: "get",
                        object: "volume.json".into(),
                        kind,
                        detail: "test".into(),
                    })
                });
                Seen { store, found }
            })
            .collect()
    }

    #[test]
    fn decides_by_what_is_there() {
        let v = || Ok(Found::Volume(volume(1)));
        let empty = || Ok(Found::Empty);
        let local = Local::new(volume(1), Vec::new(), true);
        assert_eq!(decide(None, &seen(vec![empty(), empty()]), false).unwrap(), Decision::Create);
        assert_eq!(
            decide(None, &seen(vec![empty(), v()]), false).unwrap(),
            Decision::Restore { warnings: vec![] }
        );
        assert_eq!(
            decide(Some(&local), &seen(vec![v()]), false).unwrap(),
            Decision::GoOn { warnings: vec![] }
        );
        let refused =
            |local: Option<&Local>, found| decide(local, &seen(found), false).unwrap_err().exit_code();
        assert_eq!(refused(None, vec![v(), Ok(Found::Volume(volume(2)))]), Exit::WrongVolume);
        assert_eq!(refused(Some(&local), vec![Ok(Found::Volume(volume(2)))]), Exit::WrongVolume);
        assert_eq!(refused(None, vec![empty(), Err(ErrorKind::Timeout)]), Exit::Unreachable);
        assert_eq!(refused(None, vec![v(), Err(ErrorKind::Denied)]), Exit::Unreachable);
        assert_eq!(refused(None, vec![Ok(Found::Headless), empty()]), Exit::Damaged);
        let Decision::GoOn { warnings } =
            decide(Some(&local), &seen(vec![v(), Err(ErrorKind::Timeout)]), false).unwrap()
        else {
            panic!("an unreachable replica must not stop a mount with local state")
        };
        assert_eq!(warnings.len(), 1);
        // One that is damaged neither stops a mount with local state nor a restore from others; alone it does.
        let damaged = || Err(ErrorKind::Corrupt);
        let (all, any) = (
            decide(Some(&local), &seen(vec![v(), damaged()]), false),
            decide(None, &seen(vec![damaged(), v()]), false),
        );
        assert!(matches!(all.unwrap(), Decision::GoOn { warnings } if warnings.len() == 1));
        assert!(matches!(any.unwrap(), Decision::Restore { warnings } if warnings[0].contains("r0")));
        assert_eq!(refused(None, vec![damaged(), damaged()]), Exit::Damaged);
        assert_eq!(refused(None, vec![damaged(), empty()]), Exit::Damaged);
        assert!(warnings[0].contains("r1"), "{warnings:?}");
        let found = || seen(vec![v(), Err(ErrorKind::Config)]);
        assert!(
            matches!(decide(Some(&local), &found(), false), Ok(Decision::GoOn { .. })),
            "its bucket is gone"
        );
        assert!(
            matches!(decide(None, &found(), true), Ok(Decision::Restore { warnings }) if warnings.len() == 1)
        );
        assert_eq!(refused(None, vec![v(), Err(ErrorKind::Config)]), Exit::Unreachable);
        let nothing = decide(None, &seen(vec![empty(), Err(ErrorKind::Timeout)]), true).unwrap_err();
        assert_eq!(nothing.exit_code(), Exit::Unreachable);
    }

    #[test]
    fn a_rival_is_told_from_our_own_claims() {
        let claim = |epoch, id| Claim {
            volume: volume(1).volume,
            epoch: crate::ids::Epoch(epoch),
            claim_id: [id; 16],
            host: "h".into(),
            pid: 1,
            claimed_at: 1,
            first_segment: crate::ids::SegmentNo(1),
            mirrorfs: "test".into(),
        };
        // We restored behind epoch 2 (which we saw), and claimed 3 and, without a replica, 4.
        let mut local = Local::new(volume(1), vec![claim(2, 9), claim(3, 1), claim(4, 1)], false);
        local.own_since = crate::ids::Epoch(3);
        let found = |there: &[Claim]| rival(&local, there).map(|c| c.epoch.0);
        assert_eq!(
            found(&[claim(1, 7), claim(2, 9), claim(3, 1)]),
            None,
            "an old one that was never seen is harmless"
        );
        assert_eq!(
            found(&[claim(2, 9), claim(3, 1), claim(4, 5)]),
            Some(4),
            "taken over while we were offline"
        );
        assert_eq!(found(&[claim(3, 5)]), Some(3));
        assert_eq!(found(&[claim(3, 1), claim(4, 1), claim(6, 1)]), Some(6));
    }
}
