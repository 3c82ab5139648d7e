//! Chaos: the whole daemon but for the mount, over replicas that fail, hang, lie, lose objects, roll back and return, killed now
//! and then. In the end all replicas are equal without help, each alone holds the model's state, and no read gave wrong bytes.
//!
//! `MIRRORFS_TEST_SEED` repeats one seed (a failing run prints it), `MIRRORFS_CHAOS_SEEDS` says how many are tried,
//! `MIRRORFS_CHAOS_FIRST` from which one on, `MIRRORFS_CHAOS_JOBS` how many at a time. `scripts/chaos` runs thousands.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod files;
mod harm;
mod model;
mod run;
mod world;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use run::{Counts, Run};

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|v| v.parse().unwrap_or_else(|_| panic!("{name} is not a number")))
}

#[test]
fn replicas_converge_whatever_happens() {
    if std::env::var_os("MIRRORFS_TEST_LOG").is_some() {
        let _ = env_logger::Builder::new()
            .parse_env("MIRRORFS_TEST_LOG")
            .format_timestamp_millis()
            .is_test(false)
            .try_init();
    }
    let one = number("MIRRORFS_TEST_SEED");
    let first = one.or(number("MIRRORFS_CHAOS_FIRST")).unwrap_or_else(rand::random);
    let seeds = if one.is_some() { 1 } else { number("MIRRORFS_CHAOS_SEEDS").unwrap_or(200) };
    // Most of a seed's time is waiting.
    let jobs = number("MIRRORFS_CHAOS_JOBS").unwrap_or(6).min(seeds);
    let (next, began) = (AtomicU64::new(0), Instant::now());
    let done: Mutex<(Counts, Vec<Duration>)> = Mutex::default();
    let failed: Mutex<Vec<u64>> = Mutex::default();
    std::thread::scope(|scope| {
        for _ in 0..jobs {
            scope.spawn(|| {
                loop {
                    let n = next.fetch_add(1, Ordering::Relaxed);
                    if n >= seeds || !failed.lock().unwrap().is_empty() {
                        return;
                    }
                    let seed = first.wrapping_add(n);
                    let began = Instant::now();
                    let run = catch_unwind(AssertUnwindSafe(|| {
                        let mut run = Run::new(seed);
                        run.run();
                        std::mem::take(&mut run.counts)
                    }));
                    match run {
                        Ok(counts) => {
                            let mut done = done.lock().unwrap();
                            counts.into_iter().for_each(|(k, v)| *done.0.entry(k).or_default() += v);
                            done.1.push(began.elapsed());
                        }
                        Err(_) => {
                            eprintln!(
                                "failed: repeat with MIRRORFS_TEST_SEED={seed} cargo test --test chaos"
                            );
                            failed.lock().unwrap().push(seed);
                        }
                    }
                }
            });
        }
    });
    let (counts, mut took) = done.into_inner().unwrap();
    took.sort();
    println!("{} seeds from {first} on in {:?}: {counts:?}", took.len(), began.elapsed());
    if let (Some(middle), Some(longest)) = (took.get(took.len() / 2), took.last()) {
        println!("one takes {middle:?}, the longest {longest:?}");
    }
    let failed = failed.into_inner().unwrap();
    assert!(failed.is_empty(), "these seeds failed: {failed:?}");
}
