//! Where the replicas agree: one segment whose hash more than half of them hold. As each segment
//! names the hash of the one before it, a load that reaches this one has read nothing forged on the
//! way.

use std::collections::BTreeMap;

use futures::future::join_all;

use super::trust::{Doubt, Trust, is_majority};
use super::{Damage, LoadError, Loaded, Plan, Sink, load};
use crate::format::names::ObjectName;
use crate::format::segment::SegmentHash;
use crate::ids::SegmentNo;
use crate::replica::{Store, footer_of};

/// A segment that a load has to reach, and its hash.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Anchor {
    /// Its number.
    pub number: SegmentNo,
    /// Its hash.
    pub hash: SegmentHash,
}

/// Finds it by the ends of one segment on all its holders. Copies that differ are taken out of the
/// plan, as damage. Where no hash has a majority, that is a doubt. With one replica there is
/// nothing to compare.
pub async fn anchor(plan: &mut Plan, stores: &[Store], trust: &Trust) -> Option<Anchor> {
    let number = match trust {
        Trust::Replica(_) => plan.segments.keys().next_back().copied()?,
        Trust::Majority | Trust::Follow => plan.agreed,
    };
    let place = plan.segments.get(&number)?.clone();
    if plan.answering.len() < 2 {
        return None;
    }
    let volume = plan.volume.volume;
    let asked = place.holders.iter().map(|(holder, _)| async move {
        (*holder, footer_of(&stores[*holder], volume, number, place.epoch).await)
    });
    let mut held: BTreeMap<[u8; 32], Vec<usize>> = BTreeMap::new();
    let mut damaged = Vec::new();
    for (holder, footer) in join_all(asked).await {
        match footer {
            Ok(Some(footer)) => held.entry(footer.hash.0).or_default().push(holder),
            Ok(None) => damaged.push(holder),
            // It may be right: the load asks again, with more patience.
            Err(_) => {}
        }
    }
    let object = ObjectName::Segment(number, place.epoch).path();
    let believed = match trust {
        Trust::Replica(name) => held.iter().find(|(_, on)| on.iter().any(|i| plan.replicas[*i] == *name)),
        Trust::Majority | Trust::Follow => held.iter().max_by_key(|(_, on)| on.len()),
    };
    let (hash, on) = believed.map(|(hash, on)| (SegmentHash(*hash), on.clone()))?;
    let others: Vec<usize> = held.values().flatten().copied().filter(|i| !on.contains(i)).collect();
    let of = plan.answering.len();
    if !others.is_empty() && !is_majority(on.len(), of) && !matches!(trust, Trust::Replica(_)) {
        let fewest = held.values().min_by_key(|on| on.len()).cloned().unwrap_or_default();
        plan.doubts.push(Doubt {
            on: fewest.iter().map(|i| plan.replicas[*i].clone()).collect(),
            of,
            what: format!("this content of segment {number}"),
            contradicts: true,
        });
    }
    let wrong = others
        .iter()
        .map(|i| (*i, "other content than the other replicas hold"))
        .chain(damaged.iter().map(|i| (*i, "its end is damaged")));
    for (holder, why) in wrong {
        let replica = plan.replicas[holder].clone();
        plan.damaged.push(Damage { replica, object: object.clone(), why: why.to_owned() });
        if let Some(place) = plan.segments.get_mut(&number) {
            place.holders.retain(|(i, _)| *i != holder);
        }
    }
    Some(Anchor { number, hash })
}

/// Loads, and takes care that the result passes through `anchor`: a forged copy may continue the
/// segment before it, so where the load ends too early it is repeated with each replica asked last
/// in turn. Gives the load that got furthest.
pub async fn load_through(
    plan: &Plan,
    anchor: Option<Anchor>,
    stores: &[Store],
    sink: &mut dyn Sink,
) -> Result<Loaded, LoadError> {
    let first = load(plan, stores, sink).await?;
    let Some(anchor) = anchor.filter(|a| !passes(&first, *a)) else { return Ok(first) };
    let (mut best, mut order) = (first.last_segment, None);
    for last in &plan.answering {
        let mut other = plan.clone();
        for place in other.segments.values_mut() {
            place.holders.sort_by_key(|(holder, _)| holder == last);
        }
        let loaded = load(&other, stores, sink).await?;
        if passes(&loaded, anchor) {
            return Ok(loaded);
        }
        if loaded.last_segment > best {
            (best, order) = (loaded.last_segment, Some(other));
        }
    }
    load(order.as_ref().unwrap_or(plan), stores, sink).await
}

/// Whether the load read the segment of the anchor, or more than half of the replicas vouch for the
/// checkpoint that made that needless.
fn passes(loaded: &Loaded, anchor: Anchor) -> bool {
    let seen = loaded.segments.iter().find(|s| s.number == anchor.number);
    loaded.last_segment >= anchor.number && seen.is_some_and(|s| s.hash.is_none_or(|hash| hash == anchor.hash))
        // The group that the anchor belongs to was never completed.
        || loaded.uncommitted.contains(&anchor.number)
}

#[cfg(test)]
mod tests;
