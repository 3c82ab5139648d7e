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
use crate::format::volume::{Claim, Release, Volume};
use crate::ids::{Epoch, SegmentNo, VolumeId};
use crate::replica::volume::{self, Found, Tenures, VolumeError};
use crate::replica::{ErrorKind, FenceNote, FenceReason, Fenced, Limits, Store};
use crate::restore;

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
        /// What the replicas said that do not answer, or cannot be read. Whether one may write without them is for [`permit`] to say.
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
/// A replica that does not answer stops nobody who has a local state, nor a `read_only` mount. Without a state a writer
/// needs to know that it holds nothing newer, since going on without would cut that off for good: see [`permit`].
pub(super) fn decide(local: Option<&Local>, seen: &[Seen], read_only: bool) -> Result<Decision, Error> {
    let volume = one_volume(seen, local.map(|l| l.volume.volume))?;
    let (mut warnings, mut without) = (Vec::new(), Vec::new());
    // Without a state, what cannot be read may show another writer, or hold more than the others.
    let matters = local.is_none() && !read_only;
    for s in seen {
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

/// The writer who came after a local state, when `tenures`, those of one replica, show one.
pub(super) fn overtaken(local: &Local, replica: &Store, tenures: &Tenures) -> Option<Fenced> {
    let known = local.claims.iter().map(|c| c.epoch).max().unwrap_or_default();
    let there = || tenures.known.iter().rev().map(|t| &t.claim);
    let unreadable =
        !local.borrowed && tenures.highest > known.max(there().next().map_or(Epoch(0), |c| c.epoch));
    let reason = match rival(local, there()) {
        Some(claim) => {
            let is_rival = |claim: &&Claim| rival(local, std::iter::once(*claim)).is_some();
            let first = there().filter(is_rival).filter_map(Claim::begins).min();
            let claim = Some(Box::new(claim.clone()));
            let epoch = claim.as_ref().map_or(tenures.highest, |c| c.epoch);
            FenceReason::TakenOver { epoch, claim, first_segment: first.filter(|_| !unreadable) }
        }
        None if !local.borrowed && tenures.highest > known => {
            FenceReason::TakenOver { epoch: tenures.highest, claim: None, first_segment: None }
        }
        None => return None,
    };
    Some(Fenced { replica: replica.name().clone(), reason })
}

/// The refusal to go on with a state folder whose tenure another writer has ended.
pub(super) fn refuse(note: &FenceNote, state: &Path) -> Error {
    let state = state.display();
    Error::new(
        Exit::InUse,
        format!(
            "nothing more can be written with the state folder {state}: {} (seen {}). What was written with it and not sent is \
             still there: mirrorfs salvage --state {state} --to DIR copies it out. To follow the other writer mount with an \
             empty --state folder",
            note.text,
            when(note.at)
        ),
    )
}

fn when(at: u64) -> String {
    // The formatter knows years up to 9999.
    let time = (at < 253_402_300_800).then(|| UNIX_EPOCH + Duration::from_secs(at));
    time.map_or_else(|| format!("@{at}"), |t| humantime::format_rfc3339_seconds(t).to_string())
}

/// The last tenure but our own that the replicas show: all claims of its epoch (two when two machines claimed it on
/// different replicas), each with its release.
#[derive(Debug, Default, PartialEq)]
pub(super) struct LastTenure {
    epoch: Epoch,
    claims: Vec<(Claim, Option<Release>)>,
}

/// Finds it in what replicas hold. `own` are claims that were made with this state folder.
pub(super) fn last_tenure<'a>(
    found: impl Iterator<Item = &'a restore::Found> + Clone,
    own: &[Claim],
) -> LastTenure {
    let is_own = |claim: &Claim| own.iter().any(|o| o.claim_id == claim.claim_id);
    let foreign = |f: &'a restore::Found| {
        // A claim that cannot be read counts as somebody's, unless another replica has it.
        f.claimed.iter().copied().filter(move |e| f.claims.get(e).is_none_or(|c| !is_own(c)))
    };
    let readable_own = |epoch: Epoch| {
        let mut claims = found.clone().filter_map(|f| f.claims.get(&epoch)).peekable();
        claims.peek().is_some() && claims.all(is_own)
    };
    let epoch = found.clone().flat_map(foreign).filter(|e| !readable_own(*e)).max().unwrap_or_default();
    let mut last = LastTenure { epoch, claims: Vec::new() };
    for f in found {
        let Some(claim) = f.claims.get(&epoch).filter(|c| !is_own(c)) else { continue };
        let release = f.releases.get(&epoch).filter(|r| r.claim_id == claim.claim_id).cloned();
        match last.claims.iter_mut().find(|(c, _)| c.claim_id == claim.claim_id) {
            Some((_, known)) => *known = known.take().or(release),
            None => last.claims.push((claim.clone(), release)),
        }
    }
    last
}

impl LastTenure {
    /// A claim of it that was not released.
    fn open(&self) -> Option<&Claim> {
        self.claims.iter().find(|(_, release)| release.is_none()).map(|(claim, _)| claim)
    }

    /// Whether one of `own`, as for [`permit`], came behind it.
    fn is_ended_by(&self, own: &[Claim]) -> bool {
        own.iter().any(|claim| claim.epoch > self.epoch)
    }

    /// Whether it may still be under way, and has to be ended by a claim before it is known where the next one begins. `own`: as for
    /// [`permit`].
    pub(super) fn may_go_on(&self, own: &[Claim]) -> bool {
        let unreadable = self.epoch > Epoch(0) && self.claims.is_empty();
        !self.is_ended_by(own) && (self.open().is_some() || unreadable)
    }
}

/// Whether a machine without a state of its own may write; answers what a person should know. `own` are the claims that
/// it made when it tried before, `without` what replicas said that do not answer, `reached` the segment up to which the
/// others are intact.
///
/// * A tenure that was not released may still be under way: then only on `takeover`.
/// * A replica that does not answer may hold more than the others, unless the last tenure was released with all that it
///   had on one of them: then only on `takeover`, too.
/// * So may one that was not named, when less can be read than was there at the release.
pub(super) fn permit(
    last: &LastTenure,
    own: &[Claim],
    without: &[String],
    reached: SegmentNo,
    takeover: bool,
) -> Result<Vec<String>, Error> {
    let mut warnings = Vec::new();
    if last.may_go_on(own) {
        let who = last.open().map_or_else(
            || format!("epoch {} was claimed by somebody (the claim cannot be read)", last.epoch),
            |c| {
                let since = when(c.claimed_at);
                format!("{} (process {}) has it mounted since {since} (epoch {})", c.host, c.pid, c.epoch)
            },
        );
        if !takeover {
            let lost = match without {
                [] => String::new(),
                _ => format!(
                    "; these do not answer, and what only they hold is lost then: {}",
                    without.join("; ")
                ),
            };
            return Err(Error::new(
                Exit::InUse,
                format!(
                    "the volume is in use: {who}, and has not unmounted it in good order. Unmount it there, or, when that machine \
                     is gone, add --takeover: what it has not sent is then no part of the volume any more{lost}. To read only, \
                     mount with --read-only"
                ),
            ));
        }
        warnings.push(format!("took over: {who}, and has not unmounted it in good order"));
    }
    let releases: Vec<_> = last.claims.iter().filter_map(|(_, release)| release.as_ref()).collect();
    let released = !releases.is_empty() && releases.len() == last.claims.len();
    let newest = releases.iter().map(|r| r.last_segment).max().unwrap_or_default();
    if last.is_ended_by(own) && without.is_empty() {
        return Ok(warnings);
    }
    if without.is_empty() {
        // All that were named answer, and yet lack what was there: a replica that was not named may have it.
        if newest <= reached {
            return Ok(warnings);
        }
        let text = format!(
            "the last writer left segments up to {newest}, but only those up to {reached} can be read from the given replicas"
        );
        if takeover {
            warnings.push(format!("{text}: the others are given up"));
            return Ok(warnings);
        }
        return Err(Error::new(
            Exit::Damaged,
            format!(
                "{text}. Name the replicas that hold the others, or mount with --read-only, or add --takeover: what cannot be \
                 read is then no part of the volume any more"
            ),
        ));
    }
    if released && newest <= reached {
        warnings.extend(without.iter().map(|e| format!("goes on without it for now: {e}")));
        return Ok(warnings);
    }
    if takeover {
        warnings.extend(
            without.iter().map(|e| format!("goes on without it, what only it holds is given up: {e}")),
        );
        return Ok(warnings);
    }
    let why = if released {
        format!("the last writer had segments up to {newest}, those that answer are intact up to {reached}")
    } else {
        "the last writer has not ended in good order".to_owned()
    };
    Err(Error::new(
        Exit::Unreachable,
        format!(
            "{}; it may hold changes that the other replicas lack ({why}). Mend it, or mount with --read-only, or add \
             --takeover: what only it holds is then no part of the volume any more",
            without.join("; ")
        ),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::volume::testing::{self, volume};
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
        let tenures = |claims: Vec<Claim>, highest| Tenures {
            known: claims.into_iter().map(|claim| volume::Tenure { claim, release: None }).collect(),
            highest: Epoch(highest),
            damaged: Vec::new(),
        };
        let reason = |t: &Tenures| overtaken(&local, &store, t).map(|f| f.reason);
        assert_eq!(reason(&tenures(vec![claim(3, 1), claim(4, 1)], 4)), None);
        let note = |by: Option<Claim>, epoch, first: Option<u64>| {
            let (claim, first_segment) = (by.map(Box::new), first.map(SegmentNo));
            Some(FenceReason::TakenOver { epoch: Epoch(epoch), claim, first_segment })
        };
        let seen = tenures(vec![claim(3, 1), claim(5, 6), claim(7, 8)], 7);
        assert_eq!(reason(&seen), note(Some(claim(7, 8)), 7, Some(50)), "where the first of them begins");
        assert_eq!(reason(&tenures(vec![claim(4, 1)], 5)), note(None, 5, None));
        assert_eq!(reason(&tenures(vec![claim(5, 6)], 6)), note(Some(claim(5, 6)), 5, None));
        let note = FenceNote::new(&overtaken(&local, &store, &seen).unwrap(), 1_790_000_000);
        let error = refuse(&note, Path::new("/s"));
        assert_eq!(error.exit_code(), Exit::InUse);
        for word in ["h8 (process 17)", "2026-09-21T", "mirrorfs salvage --state /s --to"] {
            assert!(error.to_string().contains(word), "{word}: {error}");
        }
    }

    /// A replica with these claims, released at a segment or not.
    fn holding(claims: &[(Claim, Option<u64>)]) -> restore::Found {
        let mut found = restore::Found::default();
        for (claim, last) in claims {
            found.claimed.insert(claim.epoch);
            found.claims.insert(claim.epoch, claim.clone());
            if let Some(last) = last {
                let release = Release {
                    volume: claim.volume,
                    epoch: claim.epoch,
                    claim_id: claim.claim_id,
                    released_at: 2,
                    last_segment: SegmentNo(*last),
                };
                found.releases.insert(claim.epoch, release);
            }
        }
        found
    }

    #[test]
    fn who_comes_anew_needs_a_release_or_the_flag() {
        let ask = |found: &[restore::Found], own: &[Claim], takeover| {
            permit(&last_tenure(found.iter(), own), own, &[], SegmentNo(5), takeover)
        };
        let open = [holding(&[(claim(1, 1), Some(3)), (claim(2, 2), None)]), holding(&[(claim(1, 1), None)])];
        let error = ask(&open, &[], false).unwrap_err();
        assert_eq!(error.exit_code(), Exit::InUse);
        for word in ["h2", "process 17", "2026-09-21T", "Unmount it there", "--takeover"] {
            assert!(error.to_string().contains(word), "{word}: {error}");
        }
        assert!(ask(&open, &[], true).unwrap()[0].contains("h2"));
        // Released on one of them; its claim not yet on the other.
        let released = [
            holding(&[(claim(2, 2), Some(5))]),
            holding(&[(claim(1, 1), None)]),
            holding(&[(claim(2, 2), None)]),
        ];
        assert_eq!(ask(&released, &[], false).unwrap(), Vec::<String>::new());
        assert_eq!(ask(&[holding(&[])], &[], false).unwrap(), Vec::<String>::new(), "never mounted");
        // Something that was there at the end cannot be read.
        let short = [holding(&[(claim(2, 2), Some(6))])];
        let error = ask(&short, &[], false).unwrap_err();
        assert!(error.exit_code() == Exit::Damaged && error.to_string().contains("up to 6"), "{error}");
        assert_eq!(ask(&short, &[], true).unwrap().len(), 1);
        // The mark of a lost race ends nothing.
        let mut race = holding(&[(claim(2, 2), Some(5))]);
        race.claims.insert(Epoch(2), claim(2, 3));
        assert!(ask(&[race], &[], false).unwrap_err().to_string().contains("h3"));
        // Two machines claimed one epoch on different replicas: both must have ended.
        let both = [holding(&[(claim(2, 2), Some(5))]), holding(&[(claim(2, 3), None)])];
        assert!(ask(&both, &[], false).unwrap_err().to_string().contains("h3"));
        // One that cannot be read, here or everywhere.
        let mut damaged = holding(&[]);
        damaged.claimed.insert(Epoch(2));
        assert_eq!(ask(&[released[0].clone(), damaged.clone()], &[], false).unwrap(), Vec::<String>::new());
        assert!(ask(&[damaged], &[], false).unwrap_err().to_string().contains("cannot be read"));
        // Interrupted after our claim: it was decided then. Not when somebody came between.
        let own = [claim(3, 7)];
        let tried = [holding(&[(claim(2, 2), None), (claim(3, 7), None)])];
        assert_eq!(ask(&tried, &own, false).unwrap(), Vec::<String>::new());
        let overtaken = [holding(&[(claim(3, 7), None), (claim(4, 4), None)])];
        assert!(ask(&overtaken, &own, false).unwrap_err().to_string().contains("h4"));
        let beaten = [holding(&[(claim(3, 4), None)])];
        assert!(ask(&beaten, &own, false).unwrap_err().to_string().contains("h4"));
    }

    #[test]
    fn a_silent_replica_matters_unless_a_release_speaks_for_it() {
        let silent = ["replica r1: no route".to_owned()];
        let ask = |found: &restore::Found, reached, takeover| {
            let last = last_tenure(std::iter::once(found), &[]);
            permit(&last, &[], &silent, SegmentNo(reached), takeover)
        };
        let released = holding(&[(claim(2, 2), Some(5))]);
        assert!(ask(&released, 5, false).unwrap()[0].contains("goes on without it for now: replica r1"));
        let error = ask(&released, 4, false).unwrap_err();
        assert_eq!(error.exit_code(), Exit::Unreachable);
        assert!(
            error.to_string().contains("segments up to 5") && error.to_string().contains("--takeover"),
            "{error}"
        );
        assert!(ask(&released, 4, true).unwrap()[0].contains("given up"));
        let open = holding(&[(claim(2, 2), None)]);
        let error = ask(&open, 9, false).unwrap_err();
        assert!(error.exit_code() == Exit::InUse && error.to_string().contains("no route"), "{error}");
        assert_eq!(ask(&open, 9, true).unwrap().len(), 2);
        assert_eq!(ask(&holding(&[]), 0, false).unwrap_err().exit_code(), Exit::Unreachable, "nobody knows");
    }
}
