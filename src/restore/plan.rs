//! From inventories to a plan: which branch is the true one, where to begin, what to replay, who holds it.
//!
//! Owns the rules of epochs and starts. Pure: knows no network.
//!
//! * The valid epoch of a segment number is the highest claimed epoch whose first segment is at or below it; segments of
//!   other epochs under that number are a lost branch.
//! * A start is a checkpoint (or nothing) and an unbroken run of valid segments. Starts are ordered by how far their run
//!   reaches, then by how little they replay.
//! * A checkpoint that only a minority of the replicas holds comes after all other starts, however far it reaches: whoever
//!   writes to one replica can forge a checkpoint that reaches further than any true one.

use std::collections::{BTreeMap, BTreeSet};

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
    /// The claims that count.
    pub claims: BTreeMap<Epoch, Claim>,
    /// The first segment of each epoch, as claimed (or, where the claim is damaged everywhere, as inferred).
    pub first_segments: BTreeMap<Epoch, SegmentNo>,
    /// All valid segments.
    pub segments: BTreeMap<SegmentNo, Place>,
    /// Where to begin, best first. Not empty.
    pub starts: Vec<Start>,
    /// Replicas that are left out, and why.
    pub excluded: Vec<(usize, String)>,
    /// What a person should know.
    pub warnings: Vec<String>,
    /// What the survey found damaged.
    pub damaged: Vec<Damage>,
}

impl Plan {
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

/// Makes the plan. `expected` is the volume that the replicas should belong to, when that is known.
pub fn plan(inventories: &[Inventory], expected: Option<VolumeId>) -> Result<Plan, PlanError> {
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
    let claims = choose_claims(&usable, volume.volume, &mut warnings, &name);
    let mut first_segments: BTreeMap<_, _> = claims.iter().map(|(e, c)| (*e, c.first_segment)).collect();
    infer_claims(&usable, &mut first_segments, &mut warnings);
    let segments = places(&usable, &claims, &first_segments);
    let starts = starts(&usable, volume.volume, &claims, &first_segments, &segments)?;
    let claimed = usable.iter().flat_map(|(_, found)| &found.claimed);
    let damaged = usable.iter().flat_map(|(_, found)| found.damaged.iter().cloned()).collect();
    Ok(Plan {
        volume,
        replicas: inventories.iter().map(|i| i.replica.clone()).collect(),
        // A claim that cannot be read was made all the same.
        epoch: first_segments.keys().chain(claimed).max().copied().unwrap_or_default(),
        claims,
        first_segments,
        segments,
        starts,
        excluded,
        warnings,
        damaged,
    })
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

/// One claim per epoch. Two different claims of one epoch mean two writers that each reached only some replicas. A claim with
/// segments beats one without, since a claimer that gave up wrote none; then the one that more replicas hold wins, then the one
/// with more segments, then the smaller id.
fn choose_claims(
    usable: &Usable<'_>,
    volume: VolumeId,
    warnings: &mut Vec<String>,
    name: &dyn Fn(usize) -> String,
) -> BTreeMap<Epoch, Claim> {
    let mut chosen = BTreeMap::new();
    let epochs: BTreeSet<Epoch> = usable.iter().flat_map(|(_, f)| f.claims.keys().copied()).collect();
    for epoch in epochs {
        let mut rivals: BTreeMap<[u8; 16], (usize, usize, &Claim)> = BTreeMap::new();
        for (_, found) in usable.iter() {
            let Some(claim) = found.claims.get(&epoch).filter(|c| c.volume == volume) else { continue };
            let segments = found.segments.keys().filter(|(_, e)| *e == epoch).count();
            let rival = rivals.entry(claim.claim_id).or_insert((0, 0, claim));
            rival.0 += 1;
            rival.1 += segments;
        }
        let contested = rivals.len() > 1;
        // `max_by_key` keeps the last of equals, hence the reversal for the smaller id.
        let Some((_, (.., claim))) = rivals.into_iter().rev().max_by_key(|(_, (n, m, _))| (*m > 0, *n, *m))
        else {
            continue;
        };
        if contested {
            let losers: Vec<_> =
                usable.iter().filter(|(_, f)| overruled(f, claim)).map(|(i, _)| name(*i)).collect();
            warnings.push(format!(
                "epoch {epoch} was claimed twice; the claim of {} (process {}) counts, what {} hold of that epoch does not",
                claim.host,
                claim.pid,
                losers.join(", "),
            ));
        }
        chosen.insert(epoch, claim.clone());
    }
    chosen
}

/// Whether the replica holds another claim of the same epoch.
fn overruled(found: &Found, claim: &Claim) -> bool {
    found.claims.get(&claim.epoch).is_some_and(|c| c.claim_id != claim.claim_id)
}

fn counts(found: &Found, epoch: Epoch, claims: &BTreeMap<Epoch, Claim>) -> bool {
    claims.get(&epoch).is_none_or(|claim| !overruled(found, claim))
}

/// A claim is stored before any segment of its epoch. Where segments have none, it was damaged or lost: it began at the
/// lowest segment that is there, or before, where nothing is left anyway.
fn infer_claims(
    usable: &Usable<'_>,
    first_segments: &mut BTreeMap<Epoch, SegmentNo>,
    warnings: &mut Vec<String>,
) {
    let mut lowest: BTreeMap<Epoch, SegmentNo> = BTreeMap::new();
    for (number, epoch) in usable.iter().flat_map(|(_, f)| f.segments.keys()) {
        let first = lowest.entry(*epoch).or_insert(*number);
        *first = (*first).min(*number);
    }
    for (epoch, first) in lowest {
        first_segments.entry(epoch).or_insert_with(|| {
            warnings.push(format!(
                "the claim of epoch {epoch} is missing or damaged; its segments begin at {first}"
            ));
            first
        });
    }
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
    let fresh = segments.is_empty() && starts.is_empty() && unusable.is_empty();
    if fresh || segments.contains_key(&first) {
        let last = reach(segments, first);
        starts.push(Start { checkpoint: None, hash: None, agreed: true, first, last });
    }
    if starts.is_empty() {
        unusable.push("no usable checkpoint, and segment 1 is gone".to_owned());
        unusable.dedup();
        return Err(PlanError::Broken(unusable.join("; ")));
    }
    for start in &mut starts {
        start.agreed |= start.checkpoint.as_ref().is_some_and(|(_, held)| held.len() * 2 > usable.len());
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
