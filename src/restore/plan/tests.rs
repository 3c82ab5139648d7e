//! Tests of the plan, on inventories made by hand.

use super::*;
use crate::format::segment::SegmentHash;
use crate::format::volume::Release;
use crate::format::volume::testing::{self, volume};
use crate::ids::Lsn;
use crate::restore::SurveyError;

fn claim(epoch: u32, first: u64, id: u8) -> (Epoch, Claim) {
    (Epoch(epoch), testing::claim(epoch, id, first))
}

fn segments(numbers: impl IntoIterator<Item = u64>, epoch: u32) -> Vec<((SegmentNo, Epoch), u64)> {
    numbers.into_iter().map(|n| ((SegmentNo(n), Epoch(epoch)), 1000 + n)).collect()
}

fn manifest(number: u64, epoch: u32, from: u64) -> ((SegmentNo, Epoch), Manifest) {
    let manifest = Manifest {
        volume: volume(1).volume,
        number: SegmentNo(number),
        epoch: Epoch(epoch),
        commit_lsn: Lsn(9),
        lsn_begin: Lsn(9),
        lsn_end: Lsn(9),
        replay_from: SegmentNo(from),
        previous: SegmentHash::default(),
        created_at: 1,
        entries: 0,
        raw_bytes: 0,
        parts: vec![],
    };
    ((SegmentNo(number), Epoch(epoch)), manifest)
}

fn found(
    claims: &[(Epoch, Claim)],
    segments: Vec<((SegmentNo, Epoch), u64)>,
    checkpoints: &[((SegmentNo, Epoch), Manifest)],
) -> Found {
    Found {
        volume: Some(volume(1)),
        claims: claims.iter().cloned().collect(),
        segments: segments.into_iter().collect(),
        checkpoints: checkpoints.iter().cloned().collect(),
        ..Found::default()
    }
}

fn inventories(all: Vec<Result<Found, SurveyError>>) -> Vec<Inventory> {
    let names = ["alpha", "beta", "gamma"];
    let one = |(found, name): (_, &&str)| Inventory {
        replica: name.parse().unwrap(),
        url: format!("memory://{name}"),
        found,
    };
    all.into_iter().zip(&names).map(one).collect()
}

fn made(all: Vec<Found>) -> Plan {
    plan(&inventories(all.into_iter().map(Ok).collect()), None).unwrap()
}

fn no_volume() -> SurveyError {
    SurveyError::NoVolume { replica: "beta".parse().unwrap(), url: "x".into() }
}

/// First, last and checkpoint of each start.
fn starts(plan: &Plan) -> Vec<(u64, u64, Option<u64>)> {
    let number = |s: &Start| s.checkpoint.as_ref().map(|(m, _)| m.number.0);
    plan.starts.iter().map(|s| (s.first.0, s.last.0, number(s))).collect()
}

#[test]
fn a_fresh_volume_starts_from_nothing() {
    let p = made(vec![found(&[], vec![], &[])]);
    assert_eq!(starts(&p), [(1, 0, None)]);
    assert_eq!((p.epoch, p.next_epoch()), (Epoch(0), Epoch(1)));
    let p = made(vec![found(&[claim(1, 1, 1)], vec![], &[])]);
    assert_eq!((starts(&p), p.next_epoch()), (vec![(1, 0, None)], Epoch(2)));
}

#[test]
fn the_union_of_replicas_counts() {
    let c = [claim(1, 1, 1)];
    let p = made(vec![found(&c, segments([1, 2, 5], 1), &[]), found(&c, segments([2, 3, 4], 1), &[])]);
    assert_eq!(starts(&p), [(1, 5, None)]);
    let holders = |n: u64| p.segments[&SegmentNo(n)].holders.iter().map(|h| h.0).collect::<Vec<_>>();
    assert_eq!((holders(1), holders(2), holders(4)), (vec![0], vec![0, 1], vec![1]));
}

#[test]
fn holders_with_the_usual_size_come_first() {
    let c = [claim(1, 1, 1)];
    let sized = |n| vec![((SegmentNo(1), Epoch(1)), n)];
    let p = made(vec![found(&c, sized(5), &[]), found(&c, sized(9), &[]), found(&c, sized(9), &[])]);
    assert_eq!(p.segments[&SegmentNo(1)].holders, [(1, 9), (2, 9), (0, 5)]);
    let p = made(vec![found(&c, sized(5), &[]), found(&c, sized(9), &[])]);
    assert_eq!(p.segments[&SegmentNo(1)].holders, [(1, 9), (0, 5)]);
}

#[test]
fn a_higher_epoch_cuts_off_the_lost_branch() {
    // Epoch 1 wrote to 6, epoch 2 took over after 4; epoch 3 after 3 and epoch 4 has written nothing yet.
    let c = [claim(1, 1, 1), claim(2, 5, 2)];
    let mut s = segments(1..=6, 1);
    s.extend(segments(5..=5, 2));
    let p = made(vec![found(&c, s.clone(), &[])]);
    assert_eq!(starts(&p), [(1, 5, None)]);
    assert_eq!(p.segments[&SegmentNo(5)].epoch, Epoch(2));
    assert!(!p.segments.contains_key(&SegmentNo(6)));
    let c = [claim(1, 1, 1), claim(2, 5, 2), claim(3, 4, 3)];
    let p = made(vec![found(&c, s, &[manifest(5, 2, 5), manifest(3, 1, 4)])]);
    // The checkpoint of the lost branch is out, too.
    assert_eq!(starts(&p), [(4, 3, Some(3)), (1, 3, None)]);
    assert_eq!(p.epoch, Epoch(3));
}

#[test]
fn a_higher_epoch_on_one_of_two_counts_only_by_decision() {
    let old = found(&[claim(1, 1, 1)], segments(1..=9, 1), &[]);
    let new = found(&[claim(1, 1, 1), claim(2, 8, 2)], segments(1..=7, 1), &[]);
    let all = inventories(vec![Ok(old), Ok(new)]);
    let by = |trust: &Trust| plan_by(&all, None, &[], trust).unwrap();
    for trust in [Trust::Majority, Trust::Follow] {
        let p = by(&trust);
        assert_eq!(starts(&p), [(1, 9, None)], "to follow it would cut off segments 8 and 9");
        assert!(p.doubts[0].contradicts && p.doubts[0].to_string().contains("beta"), "{:?}", p.doubts);
        assert_eq!(p.disbelieved.len(), 1);
        assert_eq!(p.next_epoch(), Epoch(3), "its number is taken");
    }
    let p = by(&Trust::Replica("beta".parse().unwrap()));
    assert_eq!((starts(&p), p.doubts.len()), (vec![(1, 7, None)], 0));
    let p = by(&Trust::Replica("alpha".parse().unwrap()));
    assert_eq!((starts(&p), p.disbelieved.len()), (vec![(1, 9, None)], 1));
}

#[test]
fn what_only_one_replica_has_written_is_in_doubt() {
    let c = [claim(1, 1, 1)];
    let (short, long) = (found(&c, segments(1..=5, 1), &[]), found(&c, segments(1..=9, 1), &[]));
    for (all, agreed) in [
        (vec![long.clone()], 9),
        (vec![long.clone(), short.clone()], 5),
        (vec![long.clone(), short.clone(), short.clone()], 5),
        (vec![long.clone(), long.clone(), short.clone()], 9),
    ] {
        let p = made(all);
        assert_eq!((starts(&p), p.agreed), (vec![(1, 9, None)], SegmentNo(agreed)));
        assert_eq!(p.doubts.len(), usize::from(agreed < 9), "{:?}", p.doubts);
    }
    let doubt = made(vec![short.clone(), long.clone()]).doubts.remove(0).to_string();
    assert!(doubt.contains("segment 6 to 9") && doubt.contains("beta (1 of 2"), "{doubt}");
    // After the end that a majority has, nothing follows.
    let end = Release {
        volume: volume(1).volume,
        epoch: Epoch(1),
        claim_id: [1; 16],
        released_at: 1,
        last_segment: SegmentNo(5),
    };
    let mut ended = short;
    ended.releases.insert(Epoch(1), end);
    let p = made(vec![ended.clone(), ended, long]);
    assert_eq!((starts(&p), p.doubts.len()), (vec![(1, 5, None)], 0));
    assert!(p.warnings[0].contains("segments 6 to 9 are no part"), "{:?}", p.warnings);
}

#[test]
fn a_checkpoint_on_a_minority_is_the_last_resort() {
    let c = [claim(1, 1, 1)];
    let with = |checkpoints: &[((SegmentNo, Epoch), Manifest)]| found(&c, segments(1..=9, 1), checkpoints);
    let forged = with(&[manifest(4, 1, 5), manifest(9, 1, 10)]);
    let p = made(vec![forged.clone(), with(&[manifest(4, 1, 5)]), with(&[])]);
    assert_eq!(starts(&p), [(5, 9, Some(4)), (1, 9, None), (10, 9, Some(9))]);
    let all = inventories(vec![Ok(forged), Ok(with(&[])), Ok(with(&[]))]);
    let p = plan_by(&all, None, &[], &Trust::Replica("alpha".parse().unwrap())).unwrap();
    assert_eq!(starts(&p), [(10, 9, Some(9)), (5, 9, Some(4)), (1, 9, None)]);
}

#[test]
fn two_claims_of_one_epoch_the_one_on_more_replicas_wins() {
    let a = found(&[claim(1, 1, 1), claim(2, 3, 7)], [segments(1..=2, 1), segments(3..=4, 2)].concat(), &[]);
    let b = found(&[claim(1, 1, 1), claim(2, 2, 5)], [segments(1..=1, 1), segments(2..=9, 2)].concat(), &[]);
    let p = made(vec![a.clone(), b.clone(), a.clone()]);
    assert_eq!(starts(&p), [(1, 4, None)]);
    assert_eq!(p.segments[&SegmentNo(3)].holders.len(), 2);
    assert_eq!(p.segments[&SegmentNo(1)].holders.len(), 3);
    assert!(p.warnings[0].contains("claimed twice") && p.warnings[0].contains("beta"), "{:?}", p.warnings);
    // With one against one neither counts: a person decides.
    for all in [vec![a.clone(), b.clone()], vec![b, a]] {
        let p = made(all);
        assert_eq!(starts(&p), [(1, 2, None)]);
        assert!(p.doubts.iter().filter(|d| d.contradicts).count() == 2, "{:?}", p.doubts);
    }
}

#[test]
fn an_epoch_whose_claim_is_damaged_is_not_claimed_again() {
    let whole = || found(&[claim(1, 1, 1)], segments(1..=2, 1), &[]);
    let mut damaged = whole();
    damaged.claimed = [Epoch(1), Epoch(2)].into();
    let p = made(vec![damaged.clone()]);
    assert_eq!((starts(&p), p.next_epoch()), (vec![(1, 2, None)], Epoch(3)));
    let p = made(vec![damaged.clone(), damaged.clone(), whole()]);
    assert_eq!(p.next_epoch(), Epoch(3));
    let p = made(vec![damaged, whole(), whole()]);
    assert_eq!(p.next_epoch(), Epoch(2), "a name on one of three proves nothing");
}

#[test]
fn a_damaged_claim_is_inferred() {
    let c = [claim(1, 1, 1)];
    let p = made(vec![found(&c, [segments(1..=5, 1), segments(4..=6, 2)].concat(), &[])]);
    assert_eq!(starts(&p), [(1, 6, None)]);
    assert_eq!(p.epoch, Epoch(2));
    assert!(p.warnings[0].contains("claim of epoch 2"), "{:?}", p.warnings);
}

#[test]
fn the_farthest_reach_comes_first_then_the_newest_checkpoint() {
    let c = [claim(1, 1, 1)];
    let checkpoints = [manifest(3, 1, 2), manifest(5, 1, 6), manifest(9, 1, 8), manifest(11, 1, 10)];
    let p = made(vec![found(&c, segments([1, 2, 3, 4, 5, 6, 8, 9, 10], 1), &checkpoints)]);
    // 9 reaches 10; 5 and 3 and nothing reach 6; 11 is not usable without segment 11.
    assert_eq!(starts(&p), [(8, 10, Some(9)), (6, 6, Some(5)), (2, 6, Some(3)), (1, 6, None)]);
}

#[test]
fn equal_checkpoints_have_several_holders() {
    let c = [claim(1, 1, 1)];
    let s = || segments(3..=3, 1);
    let p = made(vec![
        found(&c, s(), &[manifest(2, 1, 3)]),
        found(&c, s(), &[]),
        found(&c, vec![], &[manifest(2, 1, 3)]),
    ]);
    assert_eq!(p.starts.len(), 1);
    assert_eq!(p.starts[0].checkpoint.as_ref().unwrap().1, [0, 2]);
}

#[test]
fn without_a_beginning_there_is_no_plan() {
    let c = [claim(1, 1, 1)];
    let broken = plan(&inventories(vec![Ok(found(&c, segments(2..=4, 1), &[]))]), None);
    assert!(matches!(broken, Err(PlanError::Broken(_))), "{broken:?}");
    let broken = plan(&inventories(vec![Ok(found(&c, segments([2, 4], 1), &[manifest(4, 1, 2)]))]), None);
    assert!(matches!(&broken, Err(PlanError::Broken(why)) if why.contains("segment 3")), "{broken:?}");
    // A checkpoint alone, its segments gone, must not look like a fresh volume.
    let broken = plan(&inventories(vec![Ok(found(&c, vec![], &[manifest(4, 1, 2)]))]), None);
    assert!(matches!(broken, Err(PlanError::Broken(_))), "{broken:?}");
    let none = plan(&inventories(vec![Err(no_volume())]), None);
    assert!(matches!(none, Err(PlanError::NoReplica(_))), "{none:?}");
}

#[test]
fn replicas_of_other_volumes_are_never_mixed() {
    let mut other = found(&[], vec![], &[]);
    other.volume = Some(volume(2));
    let all = inventories(vec![Ok(found(&[], vec![], &[])), Ok(other), Err(no_volume())]);
    assert!(matches!(&plan(&all, None), Err(PlanError::Mixed(names)) if names.len() == 2));
    let p = plan(&all, Some(volume(2).volume)).unwrap();
    assert_eq!(p.volume, volume(2));
    let mut excluded: Vec<_> = p.excluded.iter().map(|(i, _)| *i).collect();
    excluded.sort_unstable();
    assert_eq!(excluded, [0, 2]);
    assert!(matches!(plan(&all, Some(volume(3).volume)), Err(PlanError::NoReplica(_))));
}

#[test]
fn a_damaged_volume_json_is_taken_from_another_replica() {
    let mut damaged = found(&[claim(1, 1, 1)], segments(1..=2, 1), &[]);
    damaged.volume = None;
    let whole = found(&[claim(1, 1, 1)], vec![], &[]);
    let p = made(vec![damaged.clone(), whole]);
    assert_eq!(starts(&p), [(1, 2, None)]);
    let alone = plan(&inventories(vec![Ok(damaged)]), None);
    assert!(matches!(alone, Err(PlanError::NoVolume(_))), "{alone:?}");
}
