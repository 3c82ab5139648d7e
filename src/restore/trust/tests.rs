//! Tests of the choice among claims: every combination of what three replicas can hold.

use super::*;
use crate::format::volume::testing::{claim, volume};

/// What a replica holds beside the claims of epochs 1 and 2, which all have.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Holds {
    /// Nothing: it lags, or is right.
    Less,
    /// An honest or forged claim of epoch 3 that goes on after segment 9.
    Extends,
    /// Another claim of epoch 3 that goes on after segment 9.
    Other,
    /// A claim of epoch 3 that cuts off what all others hold.
    Cuts,
    /// A claim after an implausible jump.
    Jumps,
    /// The name of a claim of epoch 3, and nothing readable under it.
    Junk,
}

const ALL: [Holds; 6] = [Holds::Less, Holds::Extends, Holds::Other, Holds::Cuts, Holds::Jumps, Holds::Junk];

fn found(holds: Holds) -> Found {
    let mut claims = vec![claim(1, 1, 1), claim(2, 2, 5)];
    match holds {
        Holds::Less | Holds::Junk => {}
        Holds::Extends => claims.push(claim(3, 3, 10)),
        Holds::Other => claims.push(claim(3, 4, 10)),
        Holds::Cuts => claims.push(claim(3, 5, 2)),
        Holds::Jumps => claims.push(claim(u32::MAX, 6, 1)),
    }
    let segments = (1..=9).map(|n| ((SegmentNo(n), Epoch(if n < 5 { 1 } else { 2 })), 100));
    let mut claimed: BTreeSet<Epoch> = claims.iter().map(|c| c.epoch).collect();
    if holds == Holds::Junk {
        claimed.insert(Epoch(3));
    }
    Found {
        volume: Some(volume(1)),
        claimed,
        claims: claims.into_iter().map(|c| (c.epoch, c)).collect(),
        segments: segments.collect(),
        ..Found::default()
    }
}

fn name(i: usize) -> ReplicaName {
    format!("r{i}").parse().unwrap()
}

fn chosen(all: &[Holds], own: &[Claim], trust: &Trust) -> Chosen {
    let found: Vec<_> = all.iter().map(|h| found(*h)).collect();
    let usable: Vec<_> = found.iter().enumerate().collect();
    choose(&usable, volume(1).volume, own, trust, &name)
}

/// The id of the claim of epoch 3 that counts.
fn third(chosen: &Chosen) -> Option<u8> {
    chosen.claims.get(&Epoch(3)).map(|c| c.claim_id[0])
}

fn combinations() -> impl Iterator<Item = Vec<Holds>> {
    (1..=4_u32).flat_map(|n| {
        (0..6_usize.pow(n)).map(move |code| (0..n).map(|i| ALL[code / 6_usize.pow(i) % 6]).collect())
    })
}

#[test]
fn a_claim_counts_on_a_majority_only_and_what_a_minority_holds_is_named() {
    for all in combinations() {
        let c = chosen(&all, &[], &Trust::Majority);
        let on = |h: Holds| all.iter().filter(|x| **x == h).count();
        let kinds = [(Holds::Extends, 3), (Holds::Other, 4), (Holds::Cuts, 5)];
        // Junk under its name: the replica has lost what it knew of epoch 3.
        let of = all.len() - on(Holds::Junk);
        let winner = kinds.iter().find(|(h, _)| is_majority(on(*h), of)).map(|(_, id)| *id);
        assert_eq!(third(&c), winner, "{all:?}");
        assert!(c.claims.contains_key(&Epoch(1)) && c.claims.contains_key(&Epoch(2)), "{all:?}");
        assert!(!c.claims.contains_key(&Epoch(u32::MAX)), "a jump never counts: {all:?}");
        assert!(c.highest <= Epoch(3), "a jump takes no number: {all:?}");
        assert_eq!(c.warnings.iter().filter(|w| w.contains("jumps")).count(), on(Holds::Jumps), "{all:?}");
        let doubts = kinds.iter().filter(|(h, _)| on(*h) > 0).count();
        assert_eq!(c.doubts.len(), if winner.is_some() { 0 } else { doubts }, "{all:?}");
        for doubt in &c.doubts {
            assert!(!doubt.on.is_empty() && !is_majority(doubt.on.len(), of), "{all:?}");
            assert!(doubt.to_string().contains(doubt.on[0].as_str()), "{doubt}");
        }
        // What does not count is remembered with its place, so that it is not copied.
        let disbelieved =
            kinds.iter().filter(|(_, id)| winner != Some(*id)).map(|(h, _)| on(*h)).sum::<usize>();
        assert_eq!(c.disbelieved.len(), disbelieved, "{all:?}");
    }
}

#[test]
fn to_follow_takes_what_adds_and_never_what_cuts_off() {
    for all in combinations() {
        let c = chosen(&all, &[], &Trust::Follow);
        let on = |h: Holds| all.iter().filter(|x| **x == h).count();
        let kinds: Vec<_> = [(Holds::Extends, 3), (Holds::Other, 4), (Holds::Cuts, 5)]
            .into_iter()
            .filter(|(h, _)| on(*h) > 0)
            .collect();
        let of = all.len() - on(Holds::Junk);
        let majority = kinds.iter().find(|(h, _)| is_majority(on(*h), of)).map(|(_, id)| *id);
        let alone = match kinds[..] {
            [(Holds::Extends | Holds::Other, id)] => Some(id),
            _ => None,
        };
        assert_eq!(third(&c), majority.or(alone), "{all:?}");
        assert_eq!(
            c.doubts.iter().any(|d| d.contradicts),
            majority.is_none() && alone.is_none() && !kinds.is_empty(),
            "{all:?}"
        );
    }
}

#[test]
fn a_named_replica_decides_and_so_does_our_own_claim() {
    for all in combinations() {
        for (i, holds) in all.iter().enumerate() {
            let c = chosen(&all, &[], &Trust::Replica(name(i)));
            let id = match holds {
                Holds::Extends => Some(3),
                Holds::Other => Some(4),
                Holds::Cuts => Some(5),
                Holds::Less | Holds::Jumps | Holds::Junk => None,
            };
            assert_eq!(third(&c), id, "{all:?} by r{i}");
            assert_eq!(c.doubts, [], "{all:?} by r{i}");
        }
        // What this folder claimed itself cannot be forged, though others may have won the race for
        // its epoch.
        let own = [claim(3, 3, 10)];
        let others = all.iter().filter(|h| matches!(h, Holds::Other | Holds::Cuts)).count();
        if all.contains(&Holds::Extends) && others == 0 {
            assert_eq!(third(&chosen(&all, &own, &Trust::Majority)), Some(3), "{all:?}");
        }
    }
}

#[test]
fn junk_names_of_segments_begin_no_epoch() {
    let (mut a, b, c) = (found(Holds::Less), found(Holds::Less), found(Holds::Less));
    a.segments.insert((SegmentNo(1), Epoch(3)), 7);
    let by = |all: &[&Found]| {
        let usable: Vec<_> = all.iter().copied().enumerate().collect();
        choose(&usable, volume(1).volume, &[], &Trust::Majority, &name)
    };
    assert!(!by(&[&a, &b, &c]).firsts.contains_key(&Epoch(3)));
    assert!(!by(&[&a, &b]).firsts.contains_key(&Epoch(3)));
    assert_eq!(by(&[&a]).firsts[&Epoch(3)], SegmentNo(1), "alone, its claim was lost");
    let (mut d, mut e) = (a.clone(), a.clone());
    d.claims.remove(&Epoch(2));
    e.claims.remove(&Epoch(2));
    assert_eq!(by(&[&d, &e, &b]).firsts[&Epoch(3)], SegmentNo(1), "lost on two of three");
}

#[test]
fn our_own_later_claim_does_not_hide_what_a_minority_holds() {
    // An interrupted takeover has left our claim of epoch 4 on r0. Another writer's claim of epoch 3 is on r0, too.
    let mut first = found(Holds::Extends);
    let ours = claim(4, 7, 10);
    first.claims.insert(Epoch(4), ours.clone());
    first.claimed.insert(Epoch(4));
    let second = found(Holds::Less);
    let usable = [(0, &first), (1, &second)];
    let by = |trust| choose(&usable, volume(1).volume, std::slice::from_ref(&ours), trust, &name);
    let asked = by(&Trust::Majority);
    assert_eq!(asked.doubts.len(), 1, "{:?}", asked.doubts);
    assert!(asked.doubts[0].what.contains("epoch 3"), "{:?}", asked.doubts);
    assert_eq!(third(&by(&Trust::Follow)), Some(3), "a person has said to follow it");
}
