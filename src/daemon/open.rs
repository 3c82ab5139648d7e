//! What to do with what was found: create a volume, go on with the local state, or bring the volume back from replicas;
//! and whether a machine that comes anew may write.
//!
//! Owns those decisions (pure functions) and the looking around before them. Writes nothing.

use std::path::Path;
use std::time::{Duration, UNIX_EPOCH};

use futures::future::join_all;

use super::Error;
use super::state::Local;
use crate::exit::Exit;
use crate::format::volume::{Claim, Volume};
use crate::ids::{Epoch, ReplicaName, VolumeId};
use crate::replica::belief::Testimony;
use crate::replica::volume::{self, Found, Tenures, VolumeError};
use crate::replica::{ErrorKind, FenceNote, FenceReason, Fenced, Limits, Store};

/// How long a replica may take for each answer when there is a local state to go on with: its shipper looks again, with
/// more patience, before it writes anything.
const QUICK_LOOK: Duration = Duration::from_secs(8);

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
        /// What the replicas said that do not answer, or cannot be read. Whether one may write without them is for [`super::permit::permit`] to say.
        without: Vec<String>,
    },
}

/// Looks what is at each replica's place, at all of them at once. With a local state none is waited for long.
pub(super) async fn look(stores: &[Store], has_local: bool) -> Vec<Seen> {
    join_all(stores.iter().map(|store| async move {
        let asked = if has_local { quick(store) } else { store.clone() };
        Seen { store: store.clone(), found: volume::inspect(&asked).await }
    }))
    .await
}

/// The same store with less patience.
pub(super) fn quick(store: &Store) -> Store {
    let limits = store.limits();
    store.clone().with_limits(Limits { call: limits.call.min(QUICK_LOOK), ..limits })
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
        VolumeError::Held { .. } | VolumeError::Contested { .. } => Exit::InUse,
        VolumeError::NoConditions { .. } => Exit::Usage,
    }
}

impl From<VolumeError> for Error {
    fn from(e: VolumeError) -> Self {
        Error::new(exit_of(&e), e.to_string())
    }
}

/// The replicas that hold another volume, a newer format or something foreign while more than half of those that answer hold the
/// expected volume, or one and the same: they are left out, so that one replica stops no mount.
pub(super) fn outvoted(seen: &[Seen], expected: Option<VolumeId>) -> Vec<ReplicaName> {
    let answering = seen.iter().filter(|s| !matches!(s.found, Err(VolumeError::Store(_)))).count();
    let id = |s: &Seen| match &s.found {
        Ok(Found::Volume(v)) => Some(v.volume),
        _ => None,
    };
    let holders = |wanted: VolumeId| seen.iter().filter(|s| id(s) == Some(wanted)).count();
    let known = expected.or_else(|| seen.iter().filter_map(id).max_by_key(|v| holders(*v)));
    let Some(right) = known.filter(|v| 2 * holders(*v) > answering) else { return Vec::new() };
    let wrong = seen.iter().filter(|s| match &s.found {
        Ok(Found::Volume(v)) => v.volume != right,
        Ok(_) | Err(VolumeError::Store(_)) => false,
        Err(e) => !e.is_damage(),
    });
    wrong.map(|s| s.store.name().clone()).collect()
}

/// Refuses replicas of different volumes (or of another one than expected).
fn one_volume(seen: &[Seen], expected: Option<VolumeId>) -> Result<Option<&Volume>, Error> {
    let mut first: Option<(&Store, &Volume)> = None;
    let left_out = outvoted(seen, expected);
    for s in seen {
        let Ok(Found::Volume(volume)) = &s.found else { continue };
        if left_out.contains(s.store.name()) {
            continue;
        }
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
/// A replica that does not answer stops nobody who has a local state, nor a `read_only` mount. Without a state a writer
/// needs to know that it holds nothing newer, since going on without would cut that off for good: see
/// [`super::permit::permit`].
pub(super) fn decide(local: Option<&Local>, seen: &[Seen], read_only: bool) -> Result<Decision, Error> {
    let volume = one_volume(seen, local.map(|l| l.volume.volume))?;
    let (mut warnings, mut without) = (Vec::new(), Vec::new());
    // Without a state, what cannot be read may show another writer, or hold more than the others.
    let matters = local.is_none() && !read_only;
    let left_out = outvoted(seen, local.map(|l| l.volume.volume));
    for s in seen {
        if left_out.contains(s.store.name()) {
            let what = match &s.found {
                Err(e) => e.to_string(),
                Ok(_) => format!("replica {} ({}) holds another volume", s.store.name(), s.store.url()),
            };
            warnings.push(format!(
                "goes on without it, since most of the replicas hold the right volume: {what}"
            ));
            continue;
        }
        let e = match &s.found {
            Err(e) => e,
            Ok(Found::Headless) if matters && volume.is_some() => {
                let (name, url) = (s.store.name(), s.store.url());
                without.push(format!("replica {name} ({url}) has objects of a volume but no volume.json"));
                continue;
            }
            Ok(_) => continue,
        };
        // What others hold is as good as before; its shipper writes nothing there until it is repaired.
        if e.is_damage() && (local.is_some() || volume.is_some()) {
            if matters {
                without.push(e.to_string());
            } else {
                warnings.push(format!("goes on without it until it is repaired: {e}"));
            }
            continue;
        }
        let unreachable = matches!(e, VolumeError::Store(_));
        if (local.is_some() || read_only && volume.is_some()) && unreachable {
            warnings.push(format!("goes on without it for now: {e}"));
            continue;
        }
        if unreachable && volume.is_some() {
            without.push(e.to_string());
            continue;
        }
        let hint = if unreachable { "; mend it, or leave this replica out" } else { "" };
        return Err(Error::new(exit_of(e), format!("{e}{hint}")));
    }
    match (local, volume) {
        (Some(_), _) => Ok(Decision::GoOn { warnings }),
        (None, Some(_)) => Ok(Decision::Restore { warnings, without }),
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

/// What a replica with these tenures says of a local state: whether another writer came after it.
pub(super) fn testify(local: &Local, replica: &Store, tenures: &Tenures) -> Testimony {
    let there = || tenures.known.iter().rev().map(|t| &t.claim);
    let known = local.claims.iter().map(|c| c.epoch).max().unwrap_or_default();
    let unread = tenures.unread.iter().copied().filter(|e| *e > known);
    let unread: Vec<Epoch> = if local.borrowed { Vec::new() } else { unread.collect() };
    if let Some(claim) = rival(local, there()) {
        let is_rival = |claim: &&Claim| rival(local, std::iter::once(*claim)).is_some();
        let first = there().filter(is_rival).filter_map(Claim::begins).min();
        let reason = FenceReason::TakenOver {
            epoch: claim.epoch,
            claim: Some(Box::new(claim.clone())),
            first_segment: first.filter(|_| unread.is_empty()),
        };
        return Testimony::Rival(Box::new(Fenced { replica: replica.name().clone(), reason }));
    }
    if !unread.is_empty() {
        let why = tenures.damaged.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ");
        return Testimony::Unclear(why);
    }
    let knows_us = there().any(|c| local.claims.iter().any(|own| own.claim_id == c.claim_id));
    if knows_us || local.claims.is_empty() { Testimony::Clear } else { Testimony::Silent }
}

/// The refusal to mount while no replica that answers can be believed. Nothing is noted: with another replica the answer may differ.
pub(super) fn undecided(said: &[(ReplicaName, String)]) -> Error {
    let shown = said.iter().map(|(_, why)| why.as_str()).collect::<Vec<_>>().join("; ");
    let remedy = said
        .first()
        .map_or_else(String::new, |(name, _)| format!("mirrorfs replica void-claim {name} EPOCH"));
    Error::new(
        Exit::Damaged,
        format!(
            "whether another machine writes to the volume is not clear, and no replica that answers knows better: {shown}. Mount \
             when another replica answers, or remove the damaged claim: {remedy}"
        ),
    )
}

/// The refusal to go on with a state folder whose tenure another writer has ended.
pub(super) fn refuse(note: &FenceNote, state: &Path) -> Error {
    let state = state.display();
    Error::new(
        Exit::InUse,
        format!(
            "nothing more can be written with the state folder {state}: {} (seen {}). What was written with it and not sent is \
             still there: mirrorfs salvage --state {state} --to DIR copies it out. To follow the other writer mount with an \
             empty --state folder{}",
            note.text,
            when(note.at),
            way_back(note, &state.to_string()),
        ),
    )
}

/// How a state that was fenced by a claim that should not be is used again.
fn way_back(note: &FenceNote, state: &str) -> String {
    if note.claim.is_none() {
        return String::new();
    }
    format!(
        ". If that claim is forged or of no use, remove it, and use this folder again: mirrorfs replica void-claim {} {} --state \
         {state}",
        note.replica, note.epoch
    )
}

pub(super) fn when(at: u64) -> String {
    // The formatter knows years up to 9999.
    let time = (at < 253_402_300_800).then(|| UNIX_EPOCH + Duration::from_secs(at));
    time.map_or_else(|| format!("@{at}"), |t| humantime::format_rfc3339_seconds(t).to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::volume::testing::{self, volume};
    use crate::ids::SegmentNo;
    use crate::replica::StoreError;

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
            Decision::Restore { warnings: vec![], without: vec![] }
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
        let without = |found| match decide(None, &seen(found), false).unwrap() {
            Decision::Restore { warnings, without } if warnings.is_empty() => without,
            other => panic!("{other:?}"),
        };
        assert!(without(vec![v(), Err(ErrorKind::Denied)])[0].contains("r1"), "for permit to judge");
        assert_eq!(without(vec![Err(ErrorKind::Config), v(), Err(ErrorKind::Timeout)]).len(), 2);
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
        assert!(
            matches!(any.unwrap(), Decision::Restore { without, .. } if without[0].contains("r0")),
            "it may show another writer"
        );
        assert_eq!(without(vec![v(), Ok(Found::Headless)]).len(), 1);
        assert_eq!(refused(None, vec![damaged(), damaged()]), Exit::Damaged);
        assert_eq!(refused(None, vec![damaged(), empty()]), Exit::Damaged);
        assert!(warnings[0].contains("r1"), "{warnings:?}");
        let found = || seen(vec![v(), Err(ErrorKind::Config)]);
        assert!(
            matches!(decide(Some(&local), &found(), false), Ok(Decision::GoOn { .. })),
            "its bucket is gone"
        );
        assert!(
            matches!(decide(None, &found(), true), Ok(Decision::Restore { warnings, without }) if warnings.len() == 1 && without.is_empty())
        );
        let nothing = decide(None, &seen(vec![empty(), Err(ErrorKind::Timeout)]), true).unwrap_err();
        assert_eq!(nothing.exit_code(), Exit::Unreachable);
    }

    fn claim(epoch: u32, id: u8) -> Claim {
        let (host, pid, claimed_at) = (format!("h{id}"), 17, 1_790_000_000);
        Claim { host, pid, claimed_at, ..testing::claim(epoch, id, u64::from(epoch) * 10) }
    }

    #[test]
    fn a_rival_is_told_from_our_own_claims() {
        // We restored behind epoch 2 (which we saw), and claimed 3 and, without a replica, 4.
        let mut local = Local::new(volume(1), vec![claim(2, 9), claim(3, 1), claim(4, 1)], false);
        local.own_since = Epoch(3);
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
        let store = Store::in_memory("r".parse().unwrap());
        let tenures = |claims: Vec<Claim>, unread: &[u32]| Tenures {
            known: claims.into_iter().map(|claim| volume::Tenure { claim, release: None }).collect(),
            unread: unread.iter().map(|e| Epoch(*e)).collect(),
            ..Tenures::default()
        };
        let reason = |t: &Tenures| match testify(&local, &store, t) {
            Testimony::Rival(by) => Some(by.reason),
            _ => None,
        };
        assert_eq!(testify(&local, &store, &tenures(vec![claim(3, 1), claim(4, 1)], &[])), Testimony::Clear);
        assert_eq!(
            testify(&local, &store, &tenures(vec![claim(1, 8)], &[])),
            Testimony::Silent,
            "it knows nothing"
        );
        let taken = |by: Claim, first: Option<u64>| {
            let (epoch, claim, first_segment) = (by.epoch, Some(Box::new(by)), first.map(SegmentNo));
            Some(FenceReason::TakenOver { epoch, claim, first_segment })
        };
        let seen = tenures(vec![claim(3, 1), claim(5, 6), claim(7, 8)], &[]);
        assert_eq!(reason(&seen), taken(claim(7, 8), Some(50)), "where the first of them begins");
        let junk = testify(&local, &store, &tenures(vec![claim(4, 1)], &[5]));
        assert!(matches!(junk, Testimony::Unclear(_)), "a name proves nothing: {junk:?}");
        assert_eq!(reason(&tenures(vec![claim(5, 6)], &[6])), taken(claim(5, 6), None));
        let Testimony::Rival(by) = testify(&local, &store, &seen) else { panic!("a rival") };
        let note = FenceNote::new(&by, 1_790_000_000);
        let error = refuse(&note, Path::new("/s"));
        assert_eq!(error.exit_code(), Exit::InUse);
        for word in [
            "h8 (process 17)",
            "2026-09-21T",
            "mirrorfs salvage --state /s --to",
            "mirrorfs replica void-claim r 7 --state /s",
        ] {
            assert!(error.to_string().contains(word), "{word}: {error}");
        }
    }
}
