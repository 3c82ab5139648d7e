//! What happens to replicas: how their calls fail, and what becomes of their objects.
//!
//! Owns the random choice of both. One replica, the keeper, fails like all others but loses nothing that it holds.

use std::time::Duration;

use mirrorfs::replica::ErrorKind;
use mirrorfs::replica::fault::{Fault, Objects, Op, Rule};
use rand::seq::IndexedRandom;
use rand::{Rng, RngCore};
use rand_chacha::ChaCha8Rng;

use crate::world::Site;

/// How calls of a replica fail from now on.
pub fn sicken(site: &Site, rng: &mut ChaCha8Rng) -> &'static str {
    let writes = [Op::Put, Op::Create, Op::Delete];
    let all: [Op; 0] = [];
    let chance = *[0.1, 0.4, 0.9].choose(rng).unwrap();
    let few = rng.random_range(1..6);
    let rule = |fault, ops: &[Op]| Rule::always(fault, ops).chance(chance);
    match rng.random_range(0..13) {
        0 => {
            site.faults.partition(true);
            "partition"
        }
        1 => {
            site.faults.add(rule(Fault::Before(ErrorKind::Transient), &all));
            "fails before"
        }
        2 => {
            site.faults.add(rule(Fault::After(ErrorKind::Transient), &writes));
            "fails after"
        }
        3 => {
            site.faults.add(Rule::always(Fault::Hang, &all).times(few));
            "hangs"
        }
        4 => {
            site.faults.add(Rule::always(Fault::HangAfter, &writes).times(few));
            "hangs after"
        }
        5 => {
            site.faults.add(rule(Fault::Delay(Duration::from_millis(rng.random_range(1..60))), &all));
            "late"
        }
        6 => {
            site.faults.add(Rule::always(Fault::Rate(rng.random_range(100_000..3_000_000)), &all));
            "slow"
        }
        7 => {
            site.faults.add(rule(Fault::Short, &[Op::Get]));
            "short"
        }
        8 => {
            site.faults.add(rule(Fault::Wrong, &[Op::Get]));
            "wrong"
        }
        9 => {
            site.faults.add(Rule::always(Fault::Before(ErrorKind::Denied), &all));
            "denied"
        }
        10 => {
            site.faults.add(Rule::always(Fault::Before(ErrorKind::Full), &[Op::Put, Op::Create]));
            "full"
        }
        11 => {
            site.faults.add(rule(Fault::Before(ErrorKind::Transient), &[Op::List, Op::Head]));
            site.faults.add(rule(Fault::Wrong, &[Op::Get]));
            "fails and lies"
        }
        _ => {
            site.faults.add(rule(Fault::After(ErrorKind::Timeout), &writes));
            site.faults.add(rule(Fault::Delay(Duration::from_millis(20)), &all));
            site.faults.add(rule(Fault::Short, &[Op::Get]));
            "a bit of all"
        }
    }
}

/// Whether each of a replica's small objects is that of the keeper, as far as both have it.
pub fn is_plain(objects: &Objects, keeper: &Objects) -> bool {
    let small = |p: &String| !p.starts_with("segments/");
    objects.iter().filter(|(p, _)| small(p)).all(|(p, b)| keeper.get(p).is_none_or(|k| k == b))
}

/// Damages what a replica holds: all of it, or also single objects. `past` is what it held once. Of `volume.json` and the claims only
/// the one or the other are spoiled: without both nothing says whose the replica is, and only a person may decide.
pub fn damage(
    site: &Site,
    past: &Objects,
    keeper: &Objects,
    single: bool,
    rng: &mut ChaCha8Rng,
) -> &'static str {
    let objects = site.memory.objects();
    let paths: Vec<&String> = objects.keys().collect();
    let is_head = |p: &String| p == "volume.json" || p.starts_with("epochs/");
    let some = |rng: &mut ChaCha8Rng| -> Vec<String> {
        let n = rng.random_range(1..=3);
        let mut some: Vec<String> = (0..n).filter_map(|_| paths.choose(rng).map(|p| (*p).clone())).collect();
        // A release proves nothing: it is a claim that says whose the replica is.
        let is_claim = |p: &String| p.starts_with("epochs/") && !p.ends_with(".released.json");
        let may = is_plain(&objects, keeper) && objects.keys().any(is_claim);
        let one = some.iter().find(|p| is_head(p)).filter(|_| may).cloned();
        some.retain(|p| !is_head(p));
        some.extend(one);
        some
    };
    match rng.random_range(0..if single { 5 } else { 2 }) {
        0 => {
            site.memory.set(&Objects::new());
            "wiped"
        }
        1 => {
            site.memory.set(past);
            "rolled back"
        }
        2 => {
            some(rng).iter().for_each(|p| _ = site.memory.lose(p));
            "loses objects"
        }
        3 => {
            some(rng).iter().for_each(|p| _ = site.memory.flip(p, rng.next_u64()));
            "rots"
        }
        _ => {
            for p in some(rng) {
                site.memory.cut(&p, rng.random_range(0..objects[&p].len().max(1)));
            }
            "loses ends"
        }
    }
}
