//! Three folder replicas of one volume, one of them in the hands of somebody who knows the format.
//!
//! Each attack of the table in `attacks.rs` is tried on copies of one prepared volume. Always: the
//! other replicas keep what they hold and get nothing that the attacker made; a mount with its
//! state folder goes on and shows the honest content; a mount with an empty state shows it, too,
//! or is refused and names the hostile replica; a restore from the others gives it; no process
//! takes 256 MiB or a minute.
//!
//! `MIRRORFS_HOSTILE=WORDS` tries only the attacks whose names contain these words,
//! `MIRRORFS_HOSTILE_JOBS` says how many at a time.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod attacks;
mod forge;
#[path = "../support/mod.rs"]
mod support;
mod world;

use std::collections::BTreeMap;
use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Instant;

use attacks::{ATTACKS, Attack, Empty};
use support::mount::Mount;
use support::tree::{Content, Snapshot};
use world::{GOOD, HOSTILE, PEAK_KIB, Prepared, World};

const DAMAGED: i32 = 7;
const IN_USE: i32 = 5;
const UNREACHABLE: i32 = 6;

/// A way to meet an attack.
type Meeting = fn(&Prepared, &Attack);

#[test]
fn one_hostile_replica_of_three_changes_and_stops_nothing() {
    let Some(prepared) = Prepared::new() else { return };
    let only = std::env::var("MIRRORFS_HOSTILE").unwrap_or_default();
    let mut jobs: Vec<(&Attack, &str, Meeting)> = Vec::new();
    for attack in ATTACKS.iter().rev().filter(|attack| attack.name.contains(&only)) {
        jobs.push((attack, "with its state", with_its_state));
        jobs.push((attack, "with an empty state", with_an_empty_state));
        if attack.live {
            jobs.push((attack, "while mounted", while_mounted));
        }
    }
    let (next, began) = (AtomicUsize::new(0), Instant::now());
    let failed = Mutex::new(Vec::new());
    let workers = std::env::var("MIRRORFS_HOSTILE_JOBS").map_or(16, |n| n.parse().unwrap());
    thread::scope(|scope| {
        for _ in 0..workers {
            scope.spawn(|| {
                while let Some((attack, how, meet)) = jobs.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let start = Instant::now();
                    let met = catch_unwind(AssertUnwindSafe(|| meet(&prepared, attack)));
                    println!(
                        "{:6.1} s: {:?}: {}, {how}",
                        start.elapsed().as_secs_f32(),
                        attack.kind,
                        attack.name
                    );
                    if let Some(why) = judge(attack, &met) {
                        failed
                            .lock()
                            .unwrap()
                            .push(format!("{:?}: {}, {how}: {why}", attack.kind, attack.name));
                    }
                }
            });
        }
    });
    let mut kinds = BTreeMap::new();
    for (attack, ..) in &jobs {
        *kinds.entry(attack.kind).or_insert(0) += 1;
    }
    println!(
        "{} runs {kinds:?} in {:?}, {} KiB at most",
        jobs.len(),
        began.elapsed(),
        PEAK_KIB.load(Ordering::Relaxed)
    );
    let failed = failed.into_inner().unwrap();
    assert!(failed.is_empty(), "{} of {}:\n{}", failed.len(), jobs.len(), failed.join("\n\n"));
}

/// Why a run counts as failed. An attack that the program does not withstand yet may fail.
fn judge(attack: &Attack, met: &thread::Result<()>) -> Option<String> {
    let error = met.as_ref().err()?;
    let text = error.downcast_ref::<String>().cloned();
    let why = text.or_else(|| error.downcast_ref::<&str>().map(|s| (*s).to_owned())).unwrap_or_default();
    match attack.open {
        Some(reason) => {
            println!("OPEN: {}: {reason}: {why}", attack.name);
            None
        }
        None => Some(why),
    }
}

/// Shows the honest content, takes another file and looks at all replicas; what it shows then.
fn use_it(world: &World, mount: &Mount, tree: &Snapshot, looks: bool) -> Snapshot {
    tree.assert_same(&Snapshot::take(mount.root()), "the mount");
    fs::write(mount.path("written later"), Content::new(9).take(30_000)).unwrap();
    world.sync(mount);
    let later = Snapshot::take(mount.root());
    if looks {
        let done = world.scrub(mount);
        match done.code {
            Some(0) => world.check_repaired(),
            Some(DAMAGED | UNREACHABLE) => {
                let names = |line: &str| line.starts_with("c:") || line.contains("replica c ");
                assert!(done.told.lines().any(names), "scrub: {:?} {}", done.code, done.told);
            }
            _ => panic!("scrub: {:?} {}", done.code, done.told),
        }
        later.assert_same(&Snapshot::take(mount.root()), "after the scrub");
    }
    later
}

/// The good replicas are as they should be, and each of them gives back everything.
fn check_good(world: &World, tree: &Snapshot) {
    world.check_good();
    for replica in GOOD {
        let (ended, to) = world.restore(replica);
        assert_eq!(ended.code, Some(0), "{}", ended.told);
        tree.assert_same(&Snapshot::take(&to), &format!("restored from {replica}"));
    }
}

/// The attack is there before the machine that wrote the volume mounts it.
fn with_its_state(prepared: &Prepared, attack: &Attack) {
    let mut world = prepared.copy(attack.name);
    world.attack((attack.make)(&prepared.known));
    let outside = world.outside();
    let mount = world.mount("state", &[]).unwrap_or_else(|e| panic!("refused: {:?} {}", e.code, e.told));
    let later = use_it(&world, &mount, &prepared.tree, true);
    world.unmount(mount);
    assert!(world.outside() == outside, "something outside of the replica was changed");
    check_good(&world, &later);
}

/// The attack comes while the volume is mounted.
fn while_mounted(prepared: &Prepared, attack: &Attack) {
    let mut world = prepared.copy(attack.name);
    let mount = world.mount("state", &[]).unwrap_or_else(|e| panic!("refused: {:?} {}", e.code, e.told));
    world.attack((attack.make)(&prepared.known));
    let later = use_it(&world, &mount, &prepared.tree, true);
    world.unmount(mount);
    check_good(&world, &later);
}

/// The attack is there when a machine that has never seen the volume mounts it.
fn with_an_empty_state(prepared: &Prepared, attack: &Attack) {
    let mut world = prepared.copy(attack.name);
    world.attack((attack.make)(&prepared.known));
    let outside = world.outside();
    // Alone, the hostile replica may give anything, within the bounds.
    world.restore(HOSTILE);
    let mount = match (world.mount("empty", &[]), attack.empty) {
        (Ok(mount), Empty::Right) => mount,
        (Ok(_), Empty::Asks) => panic!("a minority was followed, or passed over in silence"),
        (Err(e), Empty::Right) => panic!("refused: {:?} {}", e.code, e.told),
        (Err(e), Empty::Asks) => {
            assert_eq!(e.code, Some(IN_USE), "{}", e.told);
            assert!(e.told.contains(&format!("replica {HOSTILE}")), "{}", e.told);
            world.check_good();
            let chosen = world.mount("empty", &[&format!("--takeover={}", GOOD[0])]);
            chosen.unwrap_or_else(|e| panic!("refused with --takeover: {:?} {}", e.code, e.told))
        }
    };
    let later = use_it(&world, &mount, &prepared.tree, false);
    world.unmount(mount);
    assert!(world.outside() == outside, "something outside of the replica was changed");
    check_good(&world, &later);
}
