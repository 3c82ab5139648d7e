//! What to do with what was found: create a volume, go on with the local state, or bring the volume back from replicas.
//!
//! Owns that decision (a pure function) and the looking around before it. Writes nothing.

use futures::future::join_all;

use super::Error;
use super::state::Local;
use crate::exit::Exit;
use crate::format::volume::Volume;
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
            ErrorKind::Config | ErrorKind::Unsupported => Exit::Usage,
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
pub(super) fn decide(local: Option<&Local>, seen: &[Seen]) -> Result<Decision, Error> {
    let volume = one_volume(seen, local.map(|l| l.volume.volume))?;
    let mut warnings = Vec::new();
    for s in seen {
        let Err(e) = &s.found else { continue };
        // What others hold is as good as before; its shipper writes nothing there until it is repaired.
        if e.is_damage() && (local.is_some() || volume.is_some()) {
            warnings.push(format!("goes on without it until it is repaired: {e}"));
            continue;
        }
        let unreachable = matches!(e, VolumeError::Store(e) if !matches!(e.kind, ErrorKind::Config | ErrorKind::Unsupported));
        if local.is_some() && unreachable {
            warnings.push(format!("goes on without it for now: {e}"));
            continue;
        }
        let hint = if unreachable { "; mend it, or mount without this replica" } else { "" };
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

/// Refuses to go on with a local state when another writer came after it. `tenures` are those of one replica.
pub(super) fn check_tenures(local: &Local, replica: &Store, tenures: &Tenures) -> Result<(), Error> {
    let Some(claim) = local.claim() else { return Ok(()) };
    let newer = tenures.known.iter().rev().find(|t| {
        t.claim.epoch > claim.epoch || (t.claim.epoch == claim.epoch && t.claim.claim_id != claim.claim_id)
    });
    let (epoch, by) = match newer {
        Some(t) => (t.claim.epoch, format!("{} (process {})", t.claim.host, t.claim.pid)),
        None if tenures.highest > claim.epoch => {
            (tenures.highest, "somebody (the claim cannot be read)".to_owned())
        }
        None => return Ok(()),
    };
    Err(Error::new(
        Exit::InUse,
        format!(
            "the volume was taken over: replica {} shows epoch {epoch} of {by}, this state has epoch {}. What was written here \
             and not sent is still in the state folder; to follow the other writer mount with an empty --state folder",
            replica.name(),
            claim.epoch
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
        assert_eq!(decide(None, &seen(vec![empty(), empty()])).unwrap(), Decision::Create);
        assert_eq!(decide(None, &seen(vec![empty(), v()])).unwrap(), Decision::Restore { warnings: vec![] });
        assert_eq!(decide(Some(&local), &seen(vec![v()])).unwrap(), Decision::GoOn { warnings: vec![] });
        let refused = |local: Option<&Local>, found| decide(local, &seen(found)).unwrap_err().exit_code();
        assert_eq!(refused(None, vec![v(), Ok(Found::Volume(volume(2)))]), Exit::WrongVolume);
        assert_eq!(refused(Some(&local), vec![Ok(Found::Volume(volume(2)))]), Exit::WrongVolume);
        assert_eq!(refused(None, vec![empty(), Err(ErrorKind::Timeout)]), Exit::Unreachable);
        assert_eq!(refused(None, vec![v(), Err(ErrorKind::Denied)]), Exit::Unreachable);
        assert_eq!(refused(None, vec![Ok(Found::Headless), empty()]), Exit::Damaged);
        let Decision::GoOn { warnings } =
            decide(Some(&local), &seen(vec![v(), Err(ErrorKind::Timeout)])).unwrap()
        else {
            panic!("an unreachable replica must not stop a mount with local state")
        };
        assert_eq!(warnings.len(), 1);
        // One that is damaged neither stops a mount with local state nor a restore from others; alone it does.
        let damaged = || Err(ErrorKind::Corrupt);
        let (all, any) =
            (decide(Some(&local), &seen(vec![v(), damaged()])), decide(None, &seen(vec![damaged(), v()])));
        assert!(matches!(all.unwrap(), Decision::GoOn { warnings } if warnings.len() == 1));
        assert!(matches!(any.unwrap(), Decision::Restore { warnings } if warnings[0].contains("r0")));
        assert_eq!(refused(None, vec![damaged(), damaged()]), Exit::Damaged);
        assert_eq!(refused(None, vec![damaged(), empty()]), Exit::Damaged);
        let Decision::GoOn { warnings } =
            decide(Some(&local), &seen(vec![v(), Err(ErrorKind::Timeout)])).unwrap()
        else {
            panic!("an unreachable replica must not stop a mount with local state")
        };
        assert!(warnings[0].contains("r1"), "{warnings:?}");
    }
}
