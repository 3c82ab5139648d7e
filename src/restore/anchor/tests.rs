//! Tests of loading past forged segments, which are self-consistent and of the right size.

use bytes::Bytes;

use super::super::testing::World;
use super::super::{Inventory, Tables, plan_by, survey};
use super::*;

/// A world on three replicas, and what a forger with the same past would write from segment `from`
/// on.
async fn forged(from: u64) -> (World, Vec<(String, Bytes)>) {
    let mut world = World::new(3).await;
    let mut twin = None;
    for n in 1..=6 {
        if n == from {
            let mut other = world.clone();
            other.stores = World::new(1).await.stores;
            twin = Some(other);
        }
        world.noise(3);
        world.cut(1, true).await;
    }
    let mut twin = twin.unwrap();
    for _ in from..=6 {
        twin.noise(4);
        twin.cut(1, true).await;
    }
    let mut objects = Vec::new();
    for n in from..=6 {
        let path = twin.segment(SegmentNo(n));
        objects.push((path.clone(), twin.stores[0].get(&path).await.unwrap()));
    }
    (world, objects)
}

async fn put(world: &World, replica: usize, objects: &[(String, Bytes)]) {
    for (path, bytes) in objects {
        world.stores[replica].put(path, bytes.clone()).await.unwrap();
    }
}

async fn loaded(world: &World, trust: &Trust) -> (Plan, Option<Anchor>, Loaded, Tables) {
    let inventories: Vec<Inventory> = survey(&world.stores).await;
    let mut plan = plan_by(&inventories, None, &[], trust).unwrap();
    let anchor = anchor(&mut plan, &world.stores, trust).await;
    let mut tables = Tables::default();
    let loaded = load_through(&plan, anchor, &world.stores, &mut tables).await.unwrap();
    (plan, anchor, loaded, tables)
}

#[tokio::test]
async fn one_replica_that_forges_any_run_of_segments_changes_nothing() {
    for from in 1..=6 {
        let (world, objects) = forged(from).await;
        for to in 0..objects.len() {
            for replica in 0..3 {
                let mut world = world.clone();
                let stores = world.stores.clone();
                let before = stores[replica].get(&objects[0].0).await.unwrap();
                put(&world, replica, &objects[..=to]).await;
                let (_, anchor, loaded, tables) = loaded(&world, &Trust::Majority).await;
                assert_eq!(anchor.unwrap().number, SegmentNo(6));
                let (lsn, right) = &world.commits[&SegmentNo(6)];
                assert_eq!(loaded.commit_lsn, *lsn, "{from} to +{to} on {replica}");
                assert!(tables == *right, "forged from {from} to +{to} on replica {replica}");
                // As it was, for the next round.
                world.stores[replica].put(&objects[0].0, before).await.unwrap();
                let good = (replica + 1) % 3;
                for (path, _) in &objects[1..=to] {
                    let bytes = stores[good].get(path).await.unwrap();
                    world.stores[replica].put(path, bytes).await.unwrap();
                }
                world.number = SegmentNo(6);
            }
        }
    }
}

#[tokio::test]
async fn of_two_that_differ_a_person_says_which() {
    let (mut world, objects) = forged(4).await;
    world.stores.truncate(2);
    put(&world, 0, &objects).await;
    let (plan, ..) = loaded(&world, &Trust::Follow).await;
    assert!(plan.doubts.iter().any(|d| d.contradicts), "{:?}", plan.doubts);
    let named = |i: usize| Trust::Replica(world.stores[i].name().clone());
    let (plan, _, _, tables) = loaded(&world, &named(1)).await;
    assert!(plan.doubts.is_empty() && tables == world.commits[&SegmentNo(6)].1);
    assert_eq!(plan.damaged[0].replica, *world.stores[0].name(), "the other one is named as wrong");
    let (.., tables) = loaded(&world, &named(0)).await;
    assert!(tables != world.commits[&SegmentNo(6)].1);
}

#[tokio::test]
async fn junk_after_the_newest_segment_stops_nothing() {
    let (world, _) = forged(6).await;
    let next = world.segment(SegmentNo(7));
    let mut newer = world.stores[0].get(&world.segment(SegmentNo(6))).await.unwrap().to_vec();
    // A footer, and a header in it, that say version 2.
    let end = newer.len();
    newer[end - 8] = 2;
    newer[end - 328 + 8] = 2;
    for junk in [b"junk".to_vec(), Vec::new(), newer] {
        world.stores[0].put(&next, junk.clone().into()).await.unwrap();
        let (_, _, loaded, tables) = loaded(&world, &Trust::Follow).await;
        assert!(tables == world.commits[&SegmentNo(6)].1, "{} bytes", junk.len());
        assert_eq!(loaded.last_segment, SegmentNo(6));
        let lost = loaded.lost.unwrap();
        assert!(lost.why.contains(world.stores[0].name().as_str()), "the replica is named: {}", lost.why);
    }
}
