//! From inventories to a plan: which branch is the true one, where to begin, what to replay, who holds it.
//!
//! Owns the rules of epochs and starts. Pure: knows no network.
//!
//! * The valid epoch of a segment number is the highest claimed epoch whose first segment is at or below it; segments of
//!   other epochs under that number are a lost branch.
//! * Which claims count where replicas differ is chosen in `trust`.
//! * A start is a checkpoint (or nothing) and an unbroken run of valid segments. Starts are ordered by how far their run
//!   reaches, then by how little they replay.
//! * A checkpoint that only a minority of the replicas holds comes after all other starts, however far it reaches: whoever
//!   writes to one replica can forge a checkpoint that reaches further than any true one.

use std::collections::{BTreeMap, BTreeSet};

use super::trust::{self, Doubt, Trust};
use super::{Damage, Found, Inventory};
use crate::format::checkpoint::{Manifest, ManifestHash};
use crate::format::volume::{Claim, Volume};
use crate::ids::{Epoch, ReplicaName, SegmentNo, VolumeId};

#[cfg(test)]
mod tests;

/// What is to be done to bring the volume back. Replicas are named by their place in the list that was surveyed.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The volume.
    pub volume: Volume,
    /// The replicas, in the order of the inventories.
    pub replicas: Vec<ReplicaName>,
    /// The highest epoch that was ever claimed; 0 when none was.
    pub epoch: Epoch,
    /// Those of them that can be read and belong to the volume.
    pub answering: Vec<usize>,
    /// The claims that count.
    pub claims: BTreeMap<Epoch, Claim>,
    /// The first segment of each epoch, as claimed (or, where the claim is damaged everywhere, as inferred).
    pub first_segments: BTreeMap<Epoch, SegmentNo>,
    /// All valid segments.
    pub segments: BTreeMap<SegmentNo, Place>,
    /// The segment up to which more than half of the replicas hold what any of them does.
    pub agreed: SegmentNo,
    /// Where to begin, best first. Not empty.
    pub starts: Vec<Start>,
    /// Replicas that are left out, and why.
    pub excluded: Vec<(usize, String)>,
    /// The replica that was named as the right one.
    pub believes: Option<ReplicaName>,
    /// Replicas that mark the end of a tenure, by the claim that they end.
    pub ends: Vec<(ReplicaName, [u8; 16])>,
    /// What is newer, and only on a minority of the replicas.
    pub doubts: Vec<Doubt>,
    /// Claims that do not count, and the replicas that hold them.
    pub disbelieved: Vec<(usize, Claim)>,
    /// What a person should know.
    pub warnings: Vec<String>,
    /// What the survey found damaged.
    pub damaged: Vec<Damage>,
}

impl Plan {
    /// The replicas that mark the end of this claim's tenure.
    #[must_use]
    pub fn marked(&self, claim: &Claim) -> Vec<ReplicaName> {
        let marks = self.ends.iter().filter(|(_, id)| *id == claim.claim_id);
        marks.map(|(name, _)| name.clone()).collect()
    }

    /// The epoch that the next writer claims.
    #[must_use]
    pub fn next_epoch(&self) -> Epoch {
        self.epoch.next()
    }
}

/// A valid segment and who holds it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// Its number.
    pub number: SegmentNo,
    /// Its epoch.
    pub epoch: Epoch,
    /// Its holders with the size each lists; those with the most frequent size first.
    pub holders: Vec<(usize, u64)>,
}

/// One way to bring the volume back.
#[derive(Clone, Debug, PartialEq)]
pub struct Start {
    /// The checkpoint to load and its holders; `None` replays from the first segment.
    pub checkpoint: Option<(Manifest, Vec<usize>)>,
    /// The hash of its manifest.
    pub hash: Option<ManifestHash>,
    /// Whether most of the replicas that were read hold this checkpoint (true when there is none): then it
    /// counts although the log does not name it.
    pub agreed: bool,
    /// First segment to replay.
    pub first: SegmentNo,
    /// Last segment of the unbroken run; below `first` when there is nothing to replay.
    pub last: SegmentNo,
}

/// Why no plan can be made.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    /// No replica could be read.
    #[error("no replica can be used: {}", .0.join("; "))]
    NoReplica(Vec<String>),
    /// They belong to different volumes.
    #[error("the replicas belong to different volumes: {}; name those of one volume", .0.join(", "))]
    Mixed(Vec<String>),
    /// `volume.json` is damaged on all.
    #[error("volume.json is damaged on every replica: {}", .0.join("; "))]
    NoVolume(Vec<String>),
    /// There is something, but no unbroken run to begin with.
    #[error("nothing to begin with: {0}")]
    Broken(String),
}

/// The epoch whose segment of this number counts; `None` when no claim reaches so low.
#[must_use]
pub fn valid_epoch(first_segments: &BTreeMap<Epoch, SegmentNo>, number: SegmentNo) -> Option<Epoch> {
    first_segments.iter().rev().find(|(_, first)| **first <= number).map(|(epoch, _)| *epoch)
}

/// Makes the plan by what more than half of the replicas hold. `expected` is the volume that they should belong to, when that is known.
pub fn plan(inventories: &[Inventory], expected: Option<VolumeId>) -> Result<Plan, PlanError> {
    plan_by(inventories, expected, &[], &Trust::Majority)
}

/// Makes the plan. `own` are claims that this state folder made before it was complete.
pub fn plan_by(
    inventories: &[Inventory],
    expected: Option<VolumeId>,
    own: &[Claim],
    trust: &Trust,
) -> Result<Plan, PlanError> {
    let mut excluded = Vec::new();
    let mut usable = Vec::new();
    for (i, inventory) in inventories.iter().enumerate() {
        match &inventory.found {
            Ok(found) => usable.push((i, found)),
            Err(e) => excluded.push((i, e.to_string())),
        }
    }
    let name = |i: usize| inventories[i].replica.to_string();
    let volume = choose_volume(&mut usable, &mut excluded, expected, &name)?;
    let mut warnings: Vec<String> =
        excluded.iter().map(|(i, why)| format!("replica {} was left out: {why}", name(*i))).collect();
    let named = |i: usize| inventories[i].replica.clone();
    let chosen = trust::choose(&usable, volume.volume, own, trust, &named);
    warnings.extend(chosen.warnings);
    let (claims, first_segments) = (chosen.claims, chosen.firsts);
    let mut segments = places(&usable, &claims, &first_segments);
    let end = match trust {
        // It may have more than the others say there is.
        Trust::Replica(_) => None,
        _ => cut_at_end(&usable, &claims, &mut segments, &mut warnings),
    };
    let mut doubts = chosen.doubts;
    if let Trust::Replica(believed) = trust {
        let at = inventories.iter().position(|i| i.replica == *believed);
        let last =
            segments.values().filter(|p| p.holders.iter().any(|(i, _)| Some(*i) == at)).map(|p| p.number);
        let last = last.max().unwrap_or_default();
        segments.retain(|number, _| *number <= last);
    }
    let agreed = agreed(witnesses(&segments), &segments);
    let mut starts = starts(&usable, volume.volume, &claims, &first_segments, &segments, trust, &named)?;
    let is_beyond =
        |s: &Start| s.checkpoint.as_ref().is_some_and(|(m, _)| end.is_some_and(|end| m.number > end));
    starts.retain(|s| !is_beyond(s));
    if starts.is_empty() {
        return Err(PlanError::Broken("the only checkpoints lie beyond the end of the volume".to_owned()));
    }
    let last = starts.first().map_or(SegmentNo(0), |s| s.last);
    if last > agreed && !matches!(trust, Trust::Replica(_)) {
        let on =
            segments.get(&last).map_or_else(Vec::new, |p| p.holders.iter().map(|(i, _)| named(*i)).collect());
        let what = format!("what was written from segment {} to {last}", agreed.next());
        doubts.push(Doubt { on, of: usable.len(), what, contradicts: false });
    }
    let damaged = usable.iter().flat_map(|(_, found)| found.damaged.iter().cloned()).collect();
    let ends =
        usable.iter().flat_map(|(i, f)| f.releases.values().map(|r| (named(*i), r.claim_id))).collect();
    let believes = match trust {
        Trust::Replica(name) => Some(name.clone()),
        Trust::Majority | Trust::Follow => None,
    };
    Ok(Plan {
        volume,
        replicas: inventories.iter().map(|i| i.replica.clone()).collect(),
        answering: usable.iter().map(|(i, _)| *i).collect(),
        epoch: chosen.highest.max(first_segments.keys().next_back().copied().unwrap_or_default()),
        claims,
        first_segments,
        segments,
        agreed,
        starts,
        excluded,
        believes,
        ends,
        doubts,
        disbelieved: chosen.disbelieved,
        warnings,
        damaged,
    })
}

/// How many replicas can know how far the volume goes: those that hold its beginning. A wiped one does not, nor does the staging area
/// that takes part in a rebuild.
fn witnesses(segments: &BTreeMap<SegmentNo, Place>) -> usize {
    segments.values().next().map_or(0, |place| place.holders.len())
}

/// The segment up to which more than half of the replicas hold everything that any of them does, as far as names say.
fn agreed(of: usize, segments: &BTreeMap<SegmentNo, Place>) -> SegmentNo {
    let mut tips: BTreeMap<usize, SegmentNo> = BTreeMap::new();
    for place in segments.values() {
        tips.extend(place.holders.iter().map(|(i, _)| (*i, place.number)));
    }
    let mut tips: Vec<_> = tips.into_values().collect();
    tips.sort_unstable_by_key(|tip| std::cmp::Reverse(*tip));
    tips.get(of / 2).copied().unwrap_or_default()
}

/// Where the last writer ended in good order, as more than half of the replicas say, nothing follows.
fn cut_at_end(
    usable: &Usable<'_>,
    claims: &BTreeMap<Epoch, Claim>,
    segments: &mut BTreeMap<SegmentNo, Place>,
    warnings: &mut Vec<String>,
) -> Option<SegmentNo> {
    let (epoch, claim) = claims.last_key_value()?;
    let mut ends: BTreeMap<SegmentNo, usize> = BTreeMap::new();
    let releases = usable.iter().filter_map(|(_, f)| f.releases.get(epoch));
    for release in releases.filter(|r| r.claim_id == claim.claim_id) {
        *ends.entry(release.last_segment).or_default() += 1;
    }
    let end = ends.into_iter().find(|(_, n)| trust::is_majority(*n, usable.len())).map(|(end, _)| end);
    // With one replica there is nobody to contradict it, and what it has beyond is more than the mark says.
    let end = end.filter(|_| usable.len() > 1)?;
    let beyond = segments.split_off(&end.next());
    if let (Some(first), Some(last)) = (beyond.first_key_value(), beyond.last_key_value()) {
        warnings.push(format!(
            "segments {} to {} are no part of the volume: its last writer ended with segment {end}",
            first.0, last.0
        ));
    }
    Some(end)
}

type Usable<'a> = Vec<(usize, &'a Found)>;

fn choose_volume(
    usable: &mut Usable<'_>,
    excluded: &mut Vec<(usize, String)>,
    expected: Option<VolumeId>,
    name: &dyn Fn(usize) -> String,
) -> Result<Volume, PlanError> {
    let volume_of = |found: &Found| found.volume.as_ref().map(|v| v.volume);
    if let Some(expected) = expected {
        usable.retain(|(i, found)| match volume_of(found) {
            Some(other) if other != expected => {
                excluded.push((*i, format!("replica {} belongs to volume {other}", name(*i))));
                false
            }
            _ => true,
        });
    }
    if usable.is_empty() {
        return Err(PlanError::NoReplica(excluded.iter().map(|(_, why)| why.clone()).collect()));
    }
    let volumes: BTreeSet<_> = usable.iter().filter_map(|(_, found)| volume_of(found)).collect();
    if volumes.len() > 1 {
        let lines = usable.iter().filter_map(|(i, f)| Some(format!("{}: {}", name(*i), volume_of(f)?)));
        return Err(PlanError::Mixed(lines.collect()));
    }
    usable.iter().find_map(|(_, found)| found.volume.clone()).ok_or_else(|| {
        PlanError::NoVolume(
            usable
                .iter()
                .flat_map(|(_, f)| &f.damaged)
                .map(|d| format!("{}: {}", d.replica, d.why))
                .collect(),
        )
    })
}

/// Whether the replica holds another claim of the same epoch.
fn overruled(found: &Found, claim: &Claim) -> bool {
    found.claims.get(&claim.epoch).is_some_and(|c| c.claim_id != claim.claim_id)
}

fn counts(found: &Found, epoch: Epoch, claims: &BTreeMap<Epoch, Claim>) -> bool {
    claims.get(&epoch).is_none_or(|claim| !overruled(found, claim))
}

fn places(
    usable: &Usable<'_>,
    claims: &BTreeMap<Epoch, Claim>,
    first_segments: &BTreeMap<Epoch, SegmentNo>,
) -> BTreeMap<SegmentNo, Place> {
    let mut places: BTreeMap<SegmentNo, Place> = BTreeMap::new();
    for (i, found) in usable {
        for ((number, epoch), size) in &found.segments {
            if valid_epoch(first_segments, *number) == Some(*epoch) && counts(found, *epoch, claims) {
                let place = places.entry(*number).or_insert_with(|| Place {
                    number: *number,
                    epoch: *epoch,
                    holders: Vec::new(),
                });
                place.holders.push((*i, *size));
            }
        }
    }
    for place in places.values_mut() {
        let sizes: Vec<u64> = place.holders.iter().map(|(_, size)| *size).collect();
        let votes = |size: u64| sizes.iter().filter(|s| **s == size).count();
        // A cut-short copy is smaller: among equally frequent sizes the larger one is tried first.
        place.holders.sort_by_key(|(i, size)| (std::cmp::Reverse((votes(*size), *size)), *i));
    }
    places
}

fn starts(
    usable: &Usable<'_>,
    volume: VolumeId,
    claims: &BTreeMap<Epoch, Claim>,
    first_segments: &BTreeMap<Epoch, SegmentNo>,
    segments: &BTreeMap<SegmentNo, Place>,
    trust: &Trust,
    name: &dyn Fn(usize) -> ReplicaName,
) -> Result<Vec<Start>, PlanError> {
    let mut starts: Vec<Start> = Vec::new();
    let mut unusable = Vec::new();
    for (i, found) in usable {
        for ((number, epoch), manifest) in &found.checkpoints {
            let valid = valid_epoch(first_segments, *number) == Some(*epoch) && manifest.volume == volume;
            if !valid || !counts(found, *epoch, claims) {
                continue;
            }
            let hash = found.manifests.get(&(*number, *epoch)).copied();
            let same =
                |s: &&mut Start| s.checkpoint.as_ref().is_some_and(|(m, _)| m == manifest) && s.hash == hash;
            if let Some((_, holders)) = starts.iter_mut().find(same).and_then(|s| s.checkpoint.as_mut()) {
                holders.push(*i);
                continue;
            }
            let last = reach(segments, manifest.replay_from);
            if last < *number {
                unusable
                    .push(format!("checkpoint {number} needs segment {}, which no replica has", last.next()));
                continue;
            }
            starts.push(Start {
                checkpoint: Some((manifest.clone(), vec![*i])),
                hash,
                agreed: false,
                first: manifest.replay_from,
                last,
            });
        }
    }
    let first = SegmentNo(1);
    // Segments of which none counts are no fresh volume.
    let none = usable.iter().all(|(_, f)| f.segments.is_empty());
    let fresh = none && starts.is_empty() && unusable.is_empty();
    if fresh || segments.contains_key(&first) {
        let last = reach(segments, first);
        starts.push(Start { checkpoint: None, hash: None, agreed: true, first, last });
    }
    if starts.is_empty() {
        unusable.push("no usable checkpoint, and segment 1 is gone".to_owned());
        unusable.dedup();
        return Err(PlanError::Broken(unusable.join("; ")));
    }
    let of = witnesses(segments).max(1);
    // Whoever writes to one replica can forge a checkpoint; one on a minority is the last resort.
    for start in &mut starts {
        start.agreed |= start.checkpoint.as_ref().is_some_and(|(_, holders)| match trust {
            Trust::Replica(believed) => holders.iter().any(|i| name(*i) == *believed),
            _ => trust::is_majority(holders.len(), of),
        });
    }
    let number = |s: &Start| s.checkpoint.as_ref().map(|(m, _)| m.number);
    starts.sort_by_key(|s| std::cmp::Reverse((s.agreed, s.last, number(s))));
    Ok(starts)
}

/// The last segment of the unbroken run that begins at `first`; the one before `first` when that is missing.
fn reach(segments: &BTreeMap<SegmentNo, Place>, first: SegmentNo) -> SegmentNo {
    let mut last = SegmentNo(first.0.saturating_sub(1));
    for number in segments.range(first..).map(|(number, _)| *number) {
        if number != last.next() {
            break;
        }
        last = number;
    }
    last
}
