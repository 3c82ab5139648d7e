//! The filesystem against a reference model: random operations through the vfs over a real journal, block store, sealer
//! and staging area, with restarts, crashes, lost machines and failing replicas in between.
//!
//! `MIRRORFS_SEED` repeats a run, `MIRRORFS_OPS` sets its length (a failing run prints both).

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod check;
mod ops;
mod reference;
mod threads;
mod world;

use std::time::Duration;

use ops::{Plan, Run};
use world::Setup;

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|v| v.parse().unwrap_or_else(|_| panic!("{name} is not a number")))
}

#[test]
fn threads_leave_consistent_tables() {
    let seed = number("MIRRORFS_SEED").unwrap_or_else(rand::random);
    println!("threads: MIRRORFS_SEED={seed}");
    threads::run(seed, number("MIRRORFS_ROUNDS").unwrap_or(6) as u32);
}

fn play(what: &str, plan: Plan) {
    let seed = number("MIRRORFS_SEED").unwrap_or_else(rand::random);
    let plan = Plan { operations: number("MIRRORFS_OPS").unwrap_or(plan.operations), ..plan };
    println!("{what}: MIRRORFS_SEED={seed} MIRRORFS_OPS={}", plan.operations);
    let started = std::time::Instant::now();
    let mut run = Run::new(seed, plan);
    run.run();
    println!("{what}: {:?} {:?}", started.elapsed(), run.counts);
}

#[test]
fn all_operations_agree_with_the_reference() {
    let setup = Setup { limit: 256 << 20, space_wait: Duration::from_secs(5) };
    play(
        "roomy",
        Plan {
            setup,
            operations: 65_000,
            commit: 150,
            seal: 150,
            restart: 4000,
            crash: 1500,
            restore: 6000,
            failing: 0,
        },
    );
}

#[test]
fn content_comes_back_from_the_replica_when_the_cache_is_tiny() {
    let setup = Setup { limit: 3 << 20, space_wait: Duration::from_secs(5) };
    play(
        "tiny cache",
        Plan {
            setup,
            operations: 40_000,
            commit: 150,
            seal: 40,
            restart: 4000,
            crash: 2000,
            restore: 6000,
            failing: 300,
        },
    );
}
