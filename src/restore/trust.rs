//! Which claims count when the replicas of a volume differ. Pure.
//!
//! A claim counts when more than half of the replicas that answer hold it, or this state folder
//! made it. A newer one on fewer may be an honest writer's that reached no other replica, or a
//! forgery: a person decides. See `docs/rfcs/0002-believing-claims.md`.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use super::Found;
use crate::format::volume::Claim;
use crate::ids::{Epoch, ReplicaName, SegmentNo, VolumeId};
use crate::replica::belief::plausible_end;

/// Whom to believe when replicas differ.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Trust {
    /// What more than half of the replicas hold that answer.
    #[default]
    Majority,
    /// Also what a minority holds beyond that, as long as it takes nothing from the others.
    Follow,
    /// What this replica holds. The others only help where its objects are damaged.
    Replica(ReplicaName),
}

/// Something newer that only a minority of the replicas holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Doubt {
    /// The replicas that hold it.
    pub on: Vec<ReplicaName>,
    /// How many replicas answer.
    pub of: usize,
    /// What it is.
    pub what: String,
    /// It contradicts what others hold: to follow it would discard that, so only naming a replica
    /// decides.
    pub contradicts: bool,
}

impl fmt::Display for Doubt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let on: Vec<_> = self.on.iter().map(ToString::to_string).collect();
        write!(
            f,
            "{} is only on replica {} ({} of {} that answer)",
            self.what,
            on.join(", "),
            on.len(),
            self.of
        )?;
        f.write_str(if self.contradicts { ", and contradicts what the others hold" } else { "" })
    }
}

/// What was chosen.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Chosen {
    /// The claims that count.
    pub claims: BTreeMap<Epoch, Claim>,
    /// The first segment of each epoch that counts.
    pub firsts: BTreeMap<Epoch, SegmentNo>,
    /// The highest epoch that is taken, also by a claim that does not count.
    pub highest: Epoch,
    /// Claims that do not count, and where they are.
    pub disbelieved: Vec<(usize, Claim)>,
    /// Newer claims on a minority, whether they count or not.
    pub doubts: Vec<Doubt>,
    /// What a person should know.
    pub warnings: Vec<String>,
}

/// One claim and the replicas that hold it.
struct Candidate<'a> {
    claim: &'a Claim,
    holders: Vec<usize>,
    segments: usize,
}

/// More than half of `of`.
pub(super) fn is_majority(n: usize, of: usize) -> bool {
    2 * n > of
}

/// Chooses among the claims of the replicas, each given with its place in the list. `own` are
/// claims that this state folder made.
pub(super) fn choose(
    usable: &[(usize, &Found)],
    volume: VolumeId,
    own: &[Claim],
    trust: &Trust,
    name: &dyn Fn(usize) -> ReplicaName,
) -> Chosen {
    let names = usable.iter().flat_map(|(_, f)| f.claimed.iter().chain(f.claims.keys()).copied());
    let end = plausible_end(Epoch(0), names.chain(own.iter().map(|c| c.epoch)));
    let mut chosen = Chosen { highest: taken(usable, end), ..Chosen::default() };
    for (i, found) in usable {
        if let Some((epoch, claim)) = found.claims.range(end.next()..).next_back().filter(|(e, _)| **e > end)
        {
            chosen.warnings.push(format!(
                "replica {}: a claim of epoch {epoch} by {} is damage, since no writer jumps there from epoch {end} (mirrorfs replica \
                 void-claim {} {epoch} removes it)",
                name(*i),
                claim.host,
                name(*i),
            ));
        }
    }
    let mut newer = Vec::new();
    // Epochs that count because this folder claimed them: they say nothing of what others have claimed before.
    let mut alone = BTreeSet::new();
    let epochs: BTreeSet<Epoch> = usable.iter().flat_map(|(_, f)| f.claims.keys().copied()).collect();
    for epoch in epochs.into_iter().filter(|e| *e <= end) {
        let (candidates, of) = (candidates(usable, volume, epoch), voters(usable, epoch));
        let trusted = |c: &Candidate<'_>| match trust {
            Trust::Replica(believed) => c.holders.iter().any(|i| name(*i) == *believed),
            _ => is_majority(c.holders.len(), of) || own.iter().any(|o| o.claim_id == c.claim.claim_id),
        };
        let best = candidates.iter().position(trusted);
        if candidates.len() > 1 {
            chosen.warnings.push(contested(epoch, &candidates, best, name));
        }
        if let Some(best) = best {
            if !is_majority(candidates[best].holders.len(), of) {
                alone.insert(epoch);
            }
            chosen.claims.insert(epoch, candidates[best].claim.clone());
            chosen.firsts.insert(epoch, candidates[best].claim.first_segment);
        }
        newer.extend(candidates.into_iter().enumerate().filter(|(i, _)| best != Some(*i)).map(|(_, c)| c));
    }
    infer(usable, end, trust, name, &mut chosen);
    let top = chosen.firsts.keys().rev().find(|e| !alone.contains(e)).copied().unwrap_or_default();
    minority(usable, trust, (newer, top), name, &mut chosen);
    chosen
}

/// How many replicas have a say about an epoch: one that lists a claim that cannot be read, or
/// segments without their claim, has lost what it knew.
fn voters(usable: &[(usize, &Found)], epoch: Epoch) -> usize {
    let has_lost = |f: &Found| {
        !f.claims.contains_key(&epoch)
            && (f.claimed.contains(&epoch) || f.segments.keys().any(|(_, e)| *e == epoch))
    };
    usable.iter().filter(|(_, f)| !has_lost(f)).count()
}

/// The claims of one epoch.
fn candidates<'a>(usable: &[(usize, &'a Found)], volume: VolumeId, epoch: Epoch) -> Vec<Candidate<'a>> {
    let mut by_id: BTreeMap<[u8; 16], Candidate<'a>> = BTreeMap::new();
    for (i, found) in usable {
        let Some(claim) = found.claims.get(&epoch).filter(|c| c.volume == volume) else { continue };
        let candidate =
            by_id.entry(claim.claim_id).or_insert(Candidate { claim, holders: Vec::new(), segments: 0 });
        candidate.holders.push(*i);
        candidate.segments += found.segments.keys().filter(|(_, e)| *e == epoch).count();
    }
    let mut all: Vec<_> = by_id.into_values().collect();
    all.sort_by_key(|c| std::cmp::Reverse((c.holders.len(), c.segments)));
    all
}

fn contested(
    epoch: Epoch,
    candidates: &[Candidate<'_>],
    best: Option<usize>,
    name: &dyn Fn(usize) -> ReplicaName,
) -> String {
    let others = candidates.iter().enumerate().filter(|(i, _)| best != Some(*i));
    let on: Vec<_> = others.flat_map(|(_, c)| &c.holders).map(|i| name(*i).to_string()).collect();
    match best {
        Some(best) => format!(
            "epoch {epoch} was claimed twice; the claim of {} (process {}) counts, what {} hold of that epoch does not",
            candidates[best].claim.host,
            candidates[best].claim.pid,
            on.join(", "),
        ),
        None => {
            format!("epoch {epoch} was claimed twice, and no claim of it counts; {} hold one", on.join(", "))
        }
    }
}

/// The highest epoch that the next writer cannot have. One replica's name without a readable claim
/// does not count, since any number of such names costs nothing.
fn taken(usable: &[(usize, &Found)], end: Epoch) -> Epoch {
    let readable = usable.iter().flat_map(|(_, f)| f.claims.keys().copied());
    let mut named: BTreeMap<Epoch, usize> = BTreeMap::new();
    for (_, found) in usable {
        let segments: BTreeSet<Epoch> = found.segments.keys().map(|(_, e)| *e).collect();
        for epoch in found.claimed.union(&segments) {
            *named.entry(*epoch).or_default() += 1;
        }
    }
    let named = named.into_iter().filter(|(_, n)| is_majority(*n, usable.len())).map(|(e, _)| e);
    readable.chain(named).filter(|e| *e <= end).max().unwrap_or_default()
}

/// A claim is stored before any segment of its epoch. Where the segments have none, it was damaged
/// or lost: it began at the lowest segment that is there. Names alone say so, therefore more than
/// half of the replicas must have them.
fn infer(
    usable: &[(usize, &Found)],
    end: Epoch,
    trust: &Trust,
    name: &dyn Fn(usize) -> ReplicaName,
    chosen: &mut Chosen,
) {
    let mut lowest: BTreeMap<Epoch, (SegmentNo, usize)> = BTreeMap::new();
    let believed = |i: usize| match trust {
        Trust::Replica(believed) => name(i) == *believed,
        _ => true,
    };
    let of = usable.iter().filter(|(i, _)| believed(*i)).count();
    for (_, found) in usable.iter().filter(|(i, _)| believed(*i)) {
        let mut first: BTreeMap<Epoch, SegmentNo> = BTreeMap::new();
        for (number, epoch) in found.segments.keys() {
            first.entry(*epoch).or_insert(*number);
        }
        for (epoch, number) in first {
            let entry = lowest.entry(epoch).or_insert((number, 0));
            *entry = (entry.0.min(number), entry.1 + 1);
        }
    }
    let next = end.next();
    for (epoch, (first, holders)) in lowest {
        let known = chosen.firsts.contains_key(&epoch);
        let claimed = usable.iter().any(|(_, f)| f.claims.contains_key(&epoch));
        if known || claimed && of > 1 || epoch > next || !is_majority(holders, of) {
            continue;
        }
        chosen.firsts.insert(epoch, first);
        chosen.highest = chosen.highest.max(epoch);
        chosen
            .warnings
            .push(format!("the claim of epoch {epoch} is missing or damaged; its segments begin at {first}"));
    }
}

/// What becomes of claims that a minority holds. Those up to `top` are superseded by one that counts.
fn minority(
    usable: &[(usize, &Found)],
    trust: &Trust,
    (candidates, top): (Vec<Candidate<'_>>, Epoch),
    name: &dyn Fn(usize) -> ReplicaName,
    chosen: &mut Chosen,
) {
    let rivals = |epoch: Epoch| candidates.iter().filter(|c| c.claim.epoch == epoch).count();
    for candidate in &candidates {
        let claim = candidate.claim;
        chosen.disbelieved.extend(candidate.holders.iter().map(|i| (*i, claim.clone())));
        if claim.epoch <= top || matches!(trust, Trust::Replica(_)) {
            continue;
        }
        let others = usable.iter().filter(|(i, _)| !candidate.holders.contains(i));
        // What the others hold would be cut off from here on.
        let theirs =
            others.filter_map(|(_, f)| f.segments.keys().next_back()).map(|(number, _)| *number).max();
        let cuts = claim.begins().is_some_and(|first| theirs.is_some_and(|last| first <= last));
        let contradicts = cuts || rivals(claim.epoch) > 1;
        chosen.doubts.push(Doubt {
            on: candidate.holders.iter().map(|i| name(*i)).collect(),
            of: voters(usable, claim.epoch),
            what: format!("the claim of epoch {} by {} (process {})", claim.epoch, claim.host, claim.pid),
            contradicts,
        });
        if *trust == Trust::Follow && !contradicts {
            chosen.claims.insert(claim.epoch, claim.clone());
            chosen.firsts.insert(claim.epoch, claim.first_segment);
            chosen.disbelieved.retain(|(_, c)| c.claim_id != claim.claim_id);
        }
    }
}

#[cfg(test)]
mod tests;
