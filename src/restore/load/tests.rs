//! Tests of loading: exact states, and every kind of damage.

use bytes::Bytes;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::super::testing::World;
use super::super::{Tables, plan, survey};
use super::*;
use crate::format::checkpoint::ManifestHash;
use crate::format::tables::{block_key, inode_key, orphan_key, volume_key, xattr_key};
use crate::ids::Ino;
use crate::replica::ErrorKind;
use crate::replica::fault::{Fault, Op as FaultOp, Rule};

async fn attempt(world: &World) -> (Result<Loaded, LoadError>, Tables) {
    let plan = plan(&survey(&world.stores).await, Some(world.volume.volume)).unwrap();
    let mut tables = Tables::default();
    let loaded = load(&plan, &world.stores, &mut tables).await;
    (loaded, tables)
}

/// Loads, and checks that the state is exactly that of the commit in segment `number`.
async fn loads(world: &World, number: u64) -> Loaded {
    let (loaded, tables) = attempt(world).await;
    let loaded = loaded.unwrap();
    let (lsn, expected) = &world.commits[&SegmentNo(number)];
    assert_eq!((loaded.last_segment, loaded.commit_lsn), (SegmentNo(number), *lsn), "{:?}", loaded.warnings);
    assert!(tables == *expected, "{} entries, {} expected", tables.len(), expected.len());
    loaded
}

/// Five groups: segments 1, 2-4, 5, 6-7, 8.
async fn five(replicas: usize) -> World {
    let mut world = World::new(replicas).await;
    for segments in [1, 3, 1, 2, 1] {
        world.noise(5);
        world.cut(segments, true).await;
    }
    world
}

#[tokio::test]
async fn a_fresh_volume_is_empty() {
    let world = World::new(1).await;
    let (loaded, tables) = attempt(&world).await;
    let loaded = loaded.unwrap();
    assert!(tables.is_empty());
    assert_eq!((loaded.last_segment, loaded.commit_lsn, loaded.next_epoch), (SegmentNo(0), Lsn(0), Epoch(2)));
    assert!(loaded.warnings.is_empty() && loaded.lost.is_none());
}

#[tokio::test]
async fn the_whole_log_replays() {
    let world = five(2).await;
    let loaded = loads(&world, 8).await;
    assert_eq!(loaded.last_hash, world.hash);
    assert_eq!(loaded.last_epoch, Epoch(1));
    assert_eq!(loaded.segments.len(), 8);
    assert!(loaded.segments.iter().all(|s| s.hash.is_some()));
    assert_eq!(loaded.segments.iter().filter(|s| s.commit.is_some()).count(), 5);
    assert!(loaded.warnings.is_empty() && loaded.damaged.is_empty());
}

#[tokio::test]
async fn checkpoints_shorten_the_replay() {
    let mut world = five(2).await;
    world.checkpoint().await;
    let loaded = loads(&world, 8).await;
    assert_eq!(loaded.checkpoint, Some((SegmentNo(8), Epoch(1))));
    assert_eq!((loaded.last_hash, loaded.last_epoch), (world.hash, Epoch(1)));
    assert!(loaded.segments[..7].iter().all(|s| s.hash.is_none()) && loaded.segments.len() == 8);
    assert_eq!((loaded.segments[7].hash, loaded.segments[7].commit), (Some(world.hash), Some(world.lsn)));
    world.noise(4);
    world.cut(2, true).await;
    let loaded = loads(&world, 10).await;
    assert_eq!(loaded.checkpoint, Some((SegmentNo(8), Epoch(1))));
    assert_eq!(loaded.segments.iter().filter(|s| s.hash.is_some()).count(), 2);
    // The old segments need not be there.
    for n in 1..=8 {
        let path = world.segment(SegmentNo(n));
        world.delete(0, &path).await;
        world.delete(1, &path).await;
    }
    assert_eq!(loads(&world, 10).await.segments.len(), 2);
}

#[tokio::test]
async fn a_checkpoint_taken_during_changes_is_exact_and_needs_its_segments() {
    let mut world = five(1).await;
    let (begin, mut seen) = (world.lsn, world.live.clone());
    world.noise(3);
    // The scan has seen some of the changes and not others.
    for (i, (key, value)) in world.live.iter().enumerate() {
        if i % 2 == 0 {
            seen.insert(key.clone(), value.clone());
        }
    }
    world.cut(2, true).await;
    world.checkpoint_of(&seen, begin, SegmentNo(9)).await;
    let loaded = loads(&world, 10).await;
    assert_eq!(loaded.checkpoint, Some((SegmentNo(10), Epoch(1))));
    // Without segment 10 the checkpoint is no state at all: the log before it is used instead.
    world.delete(0, &world.segment(SegmentNo(10))).await;
    let loaded = loads(&world, 8).await;
    assert_eq!(loaded.checkpoint, None);
    assert_eq!(loaded.uncommitted, [SegmentNo(9)]);
}

#[tokio::test]
async fn an_unfinished_group_is_left_out() {
    let mut world = five(2).await;
    world.noise(5);
    world.cut(2, false).await;
    let loaded = loads(&world, 8).await;
    assert_eq!(loaded.uncommitted, [SegmentNo(9), SegmentNo(10)]);
    assert!(loaded.warnings[0].contains("never completed"), "{:?}", loaded.warnings);
    assert!(loaded.lost.is_none());
}

#[tokio::test]
async fn content_that_nobody_names_yet_counts_only_with_the_group_that_names_it() {
    let mut world = five(2).await;
    let at_eight = world.commits[&SegmentNo(8)].clone();
    // Two groups of content only, as a large cut begins with.
    let mut unnamed = Vec::new();
    for number in [10, 11] {
        unnamed.push(world.block(format!("content {number}").into_bytes()));
        world.cut(if number == 10 { 2 } else { 1 }, true).await;
        world.commits.insert(SegmentNo(number), at_eight.clone());
        assert_eq!(loads(&world, number).await.unnamed, unnamed);
    }
    let before = world.clone();
    world.noise(3);
    world.cut(2, true).await;
    let loaded = loads(&world, 13).await;
    assert!(loaded.unnamed.is_empty() && loaded.warnings.is_empty(), "{:?}", loaded.warnings);
    // The rest never came: whoever goes on takes them out of the log, which is then the same for all readers.
    let mut world = before;
    world.claim(Epoch(2)).await;
    world.record(unnamed.iter().map(|id| Op::delete(block_key(*id))).collect());
    world.cut(1, true).await;
    let loaded = loads(&world, 12).await;
    assert!(loaded.unnamed.is_empty() && loaded.segments.len() == 12);
}

#[tokio::test]
async fn a_damaged_copy_is_taken_from_another_replica_and_reported() {
    let world = five(2).await;
    world.checkpoint().await;
    let stem = "checkpoints/0000000000000008-00000001";
    world.spoil(0, &format!("{stem}/part-00000"), 50).await;
    let loaded = loads(&world, 8).await;
    assert_eq!(loaded.damaged.len(), 1);
    assert!(
        loaded.damaged[0].object.ends_with("part-00000") && loaded.damaged[0].replica.as_str() == "alpha"
    );
    for store in &world.stores {
        store.delete(&format!("{stem}/manifest")).await.unwrap();
    }
    // Footer, records or index, length, absence.
    world.spoil(0, &world.segment(SegmentNo(1)), 100).await;
    world.spoil(0, &world.segment(SegmentNo(2)), 340).await;
    world.shorten(0, &world.segment(SegmentNo(5)), 10).await;
    world.delete(0, &world.segment(SegmentNo(6))).await;
    world.spoil(1, &world.segment(SegmentNo(8)), 1).await;
    let loaded = loads(&world, 8).await;
    let mut damaged: Vec<_> = loaded.damaged.iter().map(|d| (d.replica.as_str(), d.object.clone())).collect();
    damaged.sort();
    let expect = |r: &'static str, n| (r, world.segment(SegmentNo(n)));
    // The shortened copy and the absent one are not even asked for; nor is the second one where the first is good.
    assert_eq!(damaged, [expect("alpha", 1), expect("alpha", 2)]);
}

#[tokio::test]
async fn lengths_that_holders_differ_about_are_looked_at() {
    let mut world = five(3).await;
    world.checkpoint().await;
    let len = |world: &World, n| {
        let path = world.segment(SegmentNo(n));
        let store = world.stores[2].clone();
        async move { store.head(&path).await.unwrap().size }
    };
    let (third, fourth) = (len(&world, 3).await, len(&world, 4).await);
    // Most holders have a copy that is cut off; of 4 nobody has a whole one.
    for replica in 0..2 {
        world.shorten(replica, &world.segment(SegmentNo(3)), 10).await;
        world.shorten(replica, &world.segment(SegmentNo(4)), 10).await;
    }
    world.spoil(2, &world.segment(SegmentNo(4)), 50).await;
    world.noise(1);
    world.cut(1, true).await;
    let loaded = loads(&world, 9).await;
    assert_eq!((loaded.segments[2].number, loaded.segments[2].len), (SegmentNo(3), third));
    assert_eq!(loaded.segments[3].len, fourth - 10, "what most list");
    let damaged: Vec<_> = loaded.damaged.iter().map(|d| (d.replica.as_str(), d.object.clone())).collect();
    let third = world.segment(SegmentNo(3));
    assert_eq!(damaged, [("alpha", third.clone()), ("beta", third)]);
}

#[tokio::test]
async fn damage_everywhere_ends_at_the_commit_before() {
    let world = five(2).await;
    for replica in 0..2 {
        world.spoil(replica, &world.segment(SegmentNo(7)), 200).await;
    }
    let loaded = loads(&world, 5).await;
    let lost = loaded.lost.unwrap();
    assert_eq!((lost.from, lost.upto), (SegmentNo(7), SegmentNo(8)));
    assert!(
        loaded.warnings.iter().any(|w| w.contains("0000000000000007-00000001.seg")),
        "{:?}",
        loaded.warnings
    );
    assert_eq!(loaded.damaged.len(), 2);
    assert_eq!(loaded.uncommitted, [SegmentNo(6)]);
}

#[tokio::test]
async fn a_missing_segment_ends_the_replay_with_a_warning() {
    let world = five(1).await;
    world.delete(0, &world.segment(SegmentNo(3))).await;
    let loaded = loads(&world, 1).await;
    assert_eq!(loaded.lost.unwrap().from, SegmentNo(3));
    assert!(loaded.warnings[0].contains("segments 3 to 8"), "{:?}", loaded.warnings);
}

#[tokio::test]
async fn a_checkpoint_damaged_everywhere_gives_way_to_an_older_one() {
    let mut world = five(2).await;
    world.checkpoint().await;
    world.noise(3);
    world.cut(1, true).await;
    world.checkpoint().await;
    for replica in 0..2 {
        world.spoil(replica, "checkpoints/0000000000000009-00000001/part-00000", 9).await;
    }
    let loaded = loads(&world, 9).await;
    assert_eq!(loaded.checkpoint, Some((SegmentNo(8), Epoch(1))));
    for replica in 0..2 {
        world.spoil(replica, "checkpoints/0000000000000008-00000001/part-00000", 9).await;
    }
    let loaded = loads(&world, 9).await;
    assert_eq!(loaded.checkpoint, None);
    assert_eq!(loaded.warnings.len(), 2);
    for replica in 0..2 {
        world.delete(replica, &world.segment(SegmentNo(1))).await;
    }
    let (loaded, _) = attempt(&world).await;
    assert!(matches!(loaded, Err(LoadError::Nothing(_))), "{loaded:?}");
}

#[tokio::test]
async fn silence_is_not_loss() {
    let world = five(2).await;
    let path = world.segment(SegmentNo(6));
    world.spoil(0, &path, 300).await;
    let rule = Rule::always(Fault::Before(ErrorKind::Transient), &[FaultOp::Get]).on(&path);
    world.faults[1].add(rule);
    let (loaded, _) = attempt(&world).await;
    let error = loaded.unwrap_err();
    assert!(matches!(&error, LoadError::Unavailable { object, .. } if *object == path), "{error}");
    world.faults[1].clear();
    let once = Rule::always(Fault::Before(ErrorKind::Transient), &[FaultOp::Get]).on(&path).times(1);
    world.faults[1].add(once);
    loads(&world, 8).await;
}

#[tokio::test]
async fn a_new_epoch_goes_on_where_it_took_over() {
    let mut world = five(2).await;
    let mut branch = world.clone();
    // The old writer goes on, unseen; the new one takes over after segment 8.
    world.noise(4);
    world.cut(3, true).await;
    branch.claim(Epoch(2)).await;
    let loaded = loads(&branch, 8).await;
    assert_eq!(loaded.next_epoch, Epoch(3));
    assert!(loaded.lost.is_none() && loaded.uncommitted.is_empty());
    branch.noise(2);
    branch.cut(1, true).await;
    let loaded = loads(&branch, 9).await;
    assert_eq!((loaded.last_epoch, loaded.segments[8].epoch), (Epoch(2), Epoch(2)));
    assert_eq!(loaded.last_hash, branch.hash);
    // The checkpoint of the lost branch is of no use.
    world.checkpoint().await;
    assert_eq!(loads(&branch, 9).await.checkpoint, None);
}

#[tokio::test]
async fn a_segment_off_the_chain_is_refused() {
    let mut world = five(2).await;
    let mut other = world.clone();
    world.noise(2);
    other.noise(3);
    world.cut(1, true).await;
    let good = world.stores[1].get(&world.segment(SegmentNo(9))).await.unwrap();
    // A second writer of the same epoch: same names, another history. Its 9 and 10 lie on alpha.
    other.cut(1, true).await;
    other.noise(1);
    other.cut(1, true).await;
    let path = world.segment(SegmentNo(9));
    world.stores[0].put(&path, good.clone()).await.unwrap();
    world.stores[1].put(&path, good).await.unwrap();
    let loaded = loads(&world, 9).await;
    assert_eq!(loaded.lost.as_ref().unwrap().from, SegmentNo(10));
    assert!(loaded.warnings[0].contains("does not continue"), "{:?}", loaded.warnings);
    // Where a right copy exists it is found, and the wrong one is reported.
    let wrong = other.stores[0].get(&other.segment(SegmentNo(10))).await.unwrap();
    world.noise(1);
    world.cut(1, true).await;
    world.stores[0].put(&world.segment(SegmentNo(10)), wrong).await.unwrap();
    let loaded = loads(&world, 10).await;
    assert_eq!(loaded.damaged.len(), 1, "{:?}", loaded.damaged);
    assert_eq!(loaded.damaged[0].replica.as_str(), "alpha");
}

#[tokio::test]
async fn large_records_are_fetched_in_two_reads() {
    let mut world = World::new(1).await;
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    for i in 0..40u8 {
        let value: Vec<u8> = (0..20_000).map(|_| rng.random()).collect();
        world.record(vec![Op::put(xattr_key(Ino(1), &[i + 1]), value)]);
    }
    world.cut(1, true).await;
    world.noise(1);
    world.cut(1, true).await;
    let loaded = loads(&world, 2).await;
    assert!(loaded.bytes > 800_000);
}

/// Records of one group are kept in memory up to 1 KiB in tests: the rest is fetched again.
#[tokio::test]
async fn a_large_group_is_applied_without_all_of_it_in_memory() {
    let mut world = World::new(2).await;
    world.noise(3);
    let mut rng = ChaCha8Rng::seed_from_u64(2);
    for i in 0..40u8 {
        let value: Vec<u8> = (0..200).map(|_| rng.random()).collect();
        world.record(vec![Op::put(xattr_key(Ino(1), &[i + 1]), value)]);
    }
    world.cut(8, true).await;
    let loaded = loads(&world, 8).await;
    assert!(loaded.warnings.is_empty() && loaded.damaged.is_empty(), "{:?}", loaded.warnings);
    // The same where the first holder has none of it.
    for number in 1..=8 {
        world.delete(0, &world.segment(SegmentNo(number))).await;
    }
    loads(&world, 8).await;
}

#[tokio::test]
async fn tables_that_contradict_themselves_are_used_only_when_there_are_no_others() {
    let mut world = five(2).await;
    // A checkpoint that is whole, and has a mark of deletion on the root.
    let mut forged = world.live.clone();
    forged.insert(orphan_key(Ino::ROOT), Bytes::new());
    world.checkpoint_of(&forged, world.lsn, world.number.next()).await;
    let loaded = loads(&world, 8).await;
    assert_eq!((loaded.checkpoint, loaded.flaws.len()), (None, 0));
    assert!(loaded.warnings[0].contains("checkpoint 8 of epoch 1 gives tables"), "{:?}", loaded.warnings);
    // When the log says so itself there is nothing better.
    world.record(vec![Op::put(volume_key("next_ino"), 1u64.to_le_bytes().to_vec())]);
    world.cut(1, true).await;
    let loaded = loads(&world, 9).await;
    assert!(loaded.flaws[0].fatal, "{:?}", loaded.flaws);
    assert!(loaded.flaws[0].text.contains("the next inode would get number 1"), "{:?}", loaded.flaws);
}

#[tokio::test]
async fn flaws_do_not_make_a_load_depend_on_what_cannot_be_reached() {
    let mut world = five(1).await;
    let mut odd = world.live.clone();
    odd.insert(orphan_key(Ino::ROOT), Bytes::new());
    world.checkpoint_of(&odd, world.lsn, world.number.next()).await;
    world.noise(1);
    world.cut(1, true).await;
    let first = world.segment(SegmentNo(1));
    let rule = Rule::always(Fault::Before(ErrorKind::Transient), &[FaultOp::Get]).on(&first);
    world.faults[0].add(rule);
    let (loaded, _) = attempt(&world).await;
    let loaded = loaded.unwrap();
    assert_eq!((loaded.last_segment, loaded.flaws.len()), (SegmentNo(9), 1));
    assert!(loaded.warnings.iter().any(|w| w.contains("was not tried")), "{:?}", loaded.warnings);
}

#[tokio::test]
async fn an_older_state_is_not_better_than_one_with_flaws() {
    let mut world = five(1).await;
    world.checkpoint().await;
    world.record(vec![Op::delete(inode_key(Ino::ROOT))]);
    world.cut(1, true).await;
    let loaded = loads(&world, 9).await;
    assert_eq!((loaded.last_segment, loaded.flaws.is_empty()), (SegmentNo(9), false));
}

#[tokio::test]
async fn a_manifest_that_misstates_its_parts_is_not_used() {
    let world = five(1).await;
    world.checkpoint().await;
    let path = "checkpoints/0000000000000008-00000001/manifest";
    let bytes = world.stores[0].get(path).await.unwrap();
    let manifest = Manifest::decode(&bytes, SegmentNo(8), Epoch(1)).unwrap();
    let other = Manifest { raw_bytes: manifest.raw_bytes + 1, ..manifest };
    world.put_all(path, other.encode().unwrap()).await;
    let loaded = loads(&world, 8).await;
    assert_eq!(loaded.checkpoint, None);
    assert!(loaded.warnings[0].contains("its manifest says"), "{:?}", loaded.warnings);
}

/// Random damage on one or two of three replicas never changes the result; on all of them it never gives another state
/// than that of some commit.
#[tokio::test]
async fn random_damage() {
    let seed = rand::random();
    println!("seed {seed}");
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    for round in 0..60 {
        let mut world = five(3).await;
        if rng.random() {
            world.checkpoint().await;
            world.noise(3);
            world.cut(2, true).await;
        }
        let spoilt = if round % 2 == 0 { 2 } else { 3 };
        for replica in 0..spoilt {
            for object in world.stores[replica].list("").await.unwrap() {
                if object.path == "volume.json" && replica == 0 {
                    continue;
                }
                match rng.random_range(0..8) {
                    0 => world.delete(replica, &object.path).await,
                    1 => {
                        let at = rng.random_range(1..=object.size as usize);
                        world.spoil(replica, &object.path, at).await;
                    }
                    2 => {
                        let by = rng.random_range(1..=object.size as usize);
                        world.shorten(replica, &object.path, by).await;
                    }
                    _ => {}
                }
            }
        }
        if spoilt == 2 {
            loads(&world, world.number.0).await;
            continue;
        }
        let Ok(plan) = plan(&survey(&world.stores).await, None) else { continue };
        let mut tables = Tables::default();
        match load(&plan, &world.stores, &mut tables).await {
            Ok(loaded) => {
                let (lsn, expected) = &world.commits[&loaded.last_segment];
                assert_eq!(loaded.commit_lsn, *lsn);
                assert!(tables == *expected);
                // Nothing that is listed is left out in silence.
                let listed = plan.segments.keys().next_back().copied().unwrap_or_default();
                let said = loaded.lost.is_some() || !loaded.uncommitted.is_empty();
                assert_eq!(said, loaded.last_segment < listed);
            }
            Err(LoadError::Nothing(_)) => {}
            Err(e) => panic!("{e}"),
        }
    }
}

/// Not a test of behaviour: `cargo test --release -- --ignored --nocapture how_fast` prints a rate.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "takes a while; prints how fast a checkpoint loads"]
async fn how_fast_a_checkpoint_loads() {
    use crate::format::tables::{Dirent, FileKind, Inode, dirent_key, inode_key};
    let mut world = World::new(1).await;
    let files = 1_000_000u64;
    let t = Time { secs: 1_790_000_000, nanos: 7 };
    for ino in 2..files + 2 {
        let inode = Inode {
            size: ino * 37,
            blocks: 8,
            mtime: Time { secs: t.secs + ino as i64, nanos: (ino * 7919 % 1_000_000_000) as u32 },
            ..Inode::new(FileKind::Regular, 0o644, (1000, 1000), t)
        };
        let name = format!("file-{ino:08}.dat");
        let entry = Dirent { ino: Ino(ino), kind: FileKind::Regular };
        world.live.insert(inode_key(Ino(ino)), inode.encode());
        world.live.insert(dirent_key(Ino(1 + ino / 1000), name.as_bytes()), entry.encode());
    }
    world.noise(1);
    world.cut(1, true).await;
    let begun = std::time::Instant::now();
    world.checkpoint().await;
    println!("dump: {:.0} files/s", files as f64 / begun.elapsed().as_secs_f64());
    let begun = std::time::Instant::now();
    let loaded = loads(&world, 1).await;
    let rate = files as f64 / begun.elapsed().as_secs_f64();
    println!("load: {rate:.0} files/s, {} bytes", loaded.bytes);
}

/// Puts a checkpoint of made-up tables, as of segment `number`, onto one replica.
async fn forge(world: &World, replica: usize, number: u64) -> ManifestHash {
    let mut forger = world.clone();
    forger.stores = vec![world.stores[replica].clone()];
    forger.number = SegmentNo(number);
    forger.lsn = world.commits.range(..=SegmentNo(number)).next_back().unwrap().1.0;
    forger.live = [(Bytes::from_static(b"\x01forged"), Bytes::from_static(b"yes"))].into();
    forger.checkpoint().await
}

#[tokio::test]
async fn a_checkpoint_forged_on_one_of_three_replicas_is_not_begun_with() {
    // Of the newest segment, of one that is still to come, of an older one.
    for number in [8, 9, 1000, 4] {
        let world = five(3).await;
        forge(&world, 2, number).await;
        let loaded = loads(&world, 8).await;
        assert_eq!((loaded.checkpoint, loaded.segments.len()), (None, 8), "{number}");
    }
    // Beside a true one that the log names, and under its name.
    for number in [9, 1000, 8] {
        let mut world = five(3).await;
        let hash = world.checkpoint().await;
        world.name_checkpoint(hash).await;
        forge(&world, 2, number).await;
        assert_eq!(loads(&world, 9).await.checkpoint, Some((SegmentNo(8), Epoch(1))), "{number}");
    }
}

#[tokio::test]
async fn what_the_log_says_of_a_checkpoint_counts_more_than_its_holders() {
    let mut world = five(3).await;
    let hash = world.checkpoint().await;
    world.name_checkpoint(hash).await;
    for replica in [1, 2] {
        forge(&world, replica, 8).await;
    }
    let loaded = loads(&world, 9).await;
    assert_eq!(loaded.checkpoint, None, "the log comes before a checkpoint that only one replica holds");
    let told = loaded.warnings.join("; ");
    assert!(told.contains("the log names another one") && told.contains("beta, gamma"), "{told}");
    // Where the log does not go back that far, the one that it names is used, though only one replica holds it.
    for replica in 0..3 {
        let path = world.segment(SegmentNo(1));
        world.delete(replica, &path).await;
    }
    let loaded = loads(&world, 9).await;
    assert_eq!(loaded.checkpoint, Some((SegmentNo(8), Epoch(1))));
}

#[tokio::test]
async fn a_named_checkpoint_on_one_replica_is_better_than_an_older_state() {
    for gone in [true, false] {
        let mut world = five(3).await;
        let hash = world.checkpoint().await;
        world.name_checkpoint(hash).await;
        let manifest = ObjectName::CheckpointManifest(SegmentNo(8), Epoch(1)).path();
        for replica in [1, 2] {
            world.delete(replica, &manifest).await;
        }
        // A segment before the checkpoint is missing, or damaged, everywhere.
        let path = world.segment(SegmentNo(3));
        for replica in 0..3 {
            match gone {
                true => world.delete(replica, &path).await,
                false => world.shorten(replica, &path, 20).await,
            }
        }
        let loaded = loads(&world, 9).await;
        assert_eq!(loaded.checkpoint, Some((SegmentNo(8), Epoch(1))), "{gone}: {:?}", loaded.warnings);
    }
}

#[tokio::test]
async fn a_minority_alone_is_used_only_when_it_is_named_alone() {
    let world = five(3).await;
    forge(&world, 2, 8).await;
    for replica in 0..3 {
        let path = world.segment(SegmentNo(1));
        world.delete(replica, &path).await;
    }
    let (loaded, _) = attempt(&world).await;
    let error = loaded.unwrap_err().to_string();
    assert!(error.contains("only a minority of the replicas holds it") && error.contains("gamma"), "{error}");
    let mut alone = world.clone();
    alone.stores = vec![world.stores[2].clone()];
    assert_eq!(attempt(&alone).await.0.unwrap().checkpoint, Some((SegmentNo(8), Epoch(1))));
}
