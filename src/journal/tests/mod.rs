//! Tests of the journal as a whole; those of its parts stand beside the parts.

mod brief;
mod damage;
mod full;
mod pages;

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::SeqCst};
use std::time::{Duration, Instant};

use bytes::Bytes;
use parking_lot::Mutex;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::disk::{Act, Disk, Probe};
use super::*;

type Model = BTreeMap<Bytes, Bytes>;

fn options(dir: &Path) -> Options {
    Options { tail_file_size: 128 << 10, ..Options::new(dir, Arc::new(|_| Ok(()))) }
}

fn open(dir: &Path) -> (Arc<Journal>, Opened) {
    Journal::open(options(dir)).unwrap()
}

fn put(j: &Journal, key: &str, value: &str) -> Lsn {
    j.transact::<_, JournalError>(|tx| {
        tx.put(key.to_owned(), value.to_owned());
        Ok(())
    })
    .unwrap()
    .1
}

fn dump(j: &Journal) -> Model {
    j.scan(&[], &[0xff], usize::MAX).unwrap().into_iter().collect()
}

/// Copies what a crash would leave: the files as they are now. A crash is one moment, so when a file goes away under the
/// copy it begins anew.
fn snapshot(from: &Path, to: &Path) {
    for _ in 0..100 {
        if try_snapshot(from, to).is_ok() {
            return;
        }
        fs::remove_dir_all(to).unwrap();
    }
    panic!("{} never stands still", from.display());
}

fn try_snapshot(from: &Path, to: &Path) -> std::io::Result<()> {
    fs::create_dir_all(to)?;
    for entry in walkdir::WalkDir::new(from).min_depth(1) {
        let entry = entry?;
        let target = to.join(entry.path().strip_prefix(from).unwrap());
        if entry.file_type().is_dir() {
            fs::create_dir_all(target)?;
        } else {
            fs::copy(entry.path(), target)?;
        }
    }
    Ok(())
}

fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let until = Instant::now() + Duration::from_secs(20);
    while !done() {
        assert!(Instant::now() < until, "waited in vain until {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A seed from the environment (`JOURNAL_SEED`) or the clock, printed.
pub(super) fn seed() -> u64 {
    let seed = std::env::var("JOURNAL_SEED").ok().and_then(|s| s.parse().ok()).unwrap_or_else(|| {
        std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_nanos() as u64
    });
    println!("JOURNAL_SEED={seed}");
    seed
}

#[test]
fn round_trip_and_reopen() {
    let dir = tempfile::tempdir().unwrap();
    let (j, opened) = open(dir.path());
    assert_eq!(opened, Opened { last_lsn: Lsn(0), replayed: 0, fresh: true, clean: true });
    assert_eq!(put(&j, "a", "1"), Lsn(1));
    let got = j.transact::<_, JournalError>(|tx| {
        assert_eq!(tx.lsn(), Lsn(2));
        tx.put("b", "2");
        tx.delete("a");
        tx.put("c", "3");
        assert_eq!(tx.get(b"a")?, None);
        assert_eq!(tx.get(b"b")?.as_deref(), Some(&b"2"[..]));
        assert_eq!(tx.last_in(b"a", b"z")?.unwrap().0, "c");
        assert_eq!(tx.last_in(b"a", b"c")?.unwrap().0, "b");
        Ok(tx.scan(b"a", b"z", 9)?.len())
    });
    assert_eq!(got.unwrap(), (2, Lsn(2)));
    // Nothing changed: no record.
    assert_eq!(j.transact::<_, JournalError>(|tx| tx.get(b"b")).unwrap().1, Lsn(2));
    j.barrier(Lsn(2)).unwrap();
    assert_eq!(j.durable_lsn(), Lsn(2));
    let records: Vec<_> = j.records(Lsn(0), Lsn(2)).unwrap().map(Result::unwrap).collect();
    assert_eq!(records.len(), 2);
    assert_eq!(records[1].ops, [Op::delete("a"), Op::put("b", "2"), Op::put("c", "3")]);
    j.close().unwrap();
    j.close().unwrap();
    assert!(matches!(j.get(b"b"), Err(JournalError::Closed)));
    assert!(matches!(j.transact::<_, JournalError>(|_| Ok(())), Err(JournalError::Closed)));
    let (j, opened) = open(dir.path());
    assert_eq!(opened, Opened { last_lsn: Lsn(2), replayed: 0, fresh: false, clean: true });
    assert_eq!(dump(&j), Model::from([("b".into(), "2".into()), ("c".into(), "3".into())]));
    assert_eq!(j.records(Lsn(1), Lsn(2)).unwrap().count(), 1);
    assert_eq!(put(&j, "d", "4"), Lsn(3));
    j.verify().unwrap();
}

#[test]
fn a_failed_transaction_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let (j, _) = open(dir.path());
    put(&j, "a", "1");
    let failed = j.transact::<(), JournalError>(|tx| {
        tx.put("a", "2");
        tx.put("b", "2");
        Err(JournalError::Closed)
    });
    assert!(failed.is_err());
    let long = j.transact::<_, JournalError>(|tx| {
        tx.put("b", "2");
        tx.put("c", vec![0; MAX_VALUE + 1]);
        Ok(())
    });
    assert!(matches!(long, Err(JournalError::TooLarge { what: "value", .. })));
    assert!(
        j.transact::<_, JournalError>(|tx| {
            tx.put(vec![0xff, 1], "x");
            Ok(())
        })
        .is_err()
    );
    assert_eq!(j.last_lsn(), Lsn(1));
    assert_eq!(dump(&j), Model::from([("a".into(), "1".into())]));
}

/// The same random changes on the journal and on a map, with scans, crashes and reopens between.
#[test]
fn equals_a_map_under_random_changes_and_reopens() {
    let mut rng = ChaCha8Rng::seed_from_u64(seed());
    let root = tempfile::tempdir().unwrap();
    let mut dir = root.path().join("0");
    let mut model = Model::new();
    let key =
        |rng: &mut ChaCha8Rng| Bytes::from(vec![b'a' + rng.random_range(0..3u8), rng.random_range(0..40)]);
    let mut last = Lsn(0);
    for life in 0..12 {
        let (j, opened) = Journal::open(Options { memtable_limit: 1 << 20, ..options(&dir) }).unwrap();
        assert_eq!(opened.last_lsn, last, "life {life}");
        assert_eq!(dump(&j), model, "life {life}");
        for _ in 0..rng.random_range(0..400) {
            let fail = rng.random_bool(0.1);
            let mut next = model.clone();
            let done = j.transact::<_, JournalError>(|tx| {
                for _ in 0..rng.random_range(1..6) {
                    let k = key(&mut rng);
                    if rng.random_bool(0.4) {
                        next.remove(&k);
                        tx.delete(k);
                    } else {
                        let v = Bytes::from(vec![rng.random(); rng.random_range(0..3000)]);
                        next.insert(k.clone(), v.clone());
                        tx.put(k, v);
                    }
                }
                let (a, b, n) = (key(&mut rng), key(&mut rng), rng.random_range(1..20));
                if a < b {
                    let want: Vec<_> =
                        next.range(a.clone()..b.clone()).map(|(k, v)| (k.clone(), v.clone())).collect();
                    assert_eq!(tx.scan(&a, &b, n)?, want[..n.min(want.len())]);
                    assert_eq!(tx.last_in(&a, &b)?, want.last().cloned());
                }
                if fail { Err(JournalError::Closed) } else { Ok(()) }
            });
            if done.is_ok() {
                model = next;
            }
            let k = key(&mut rng);
            assert_eq!(j.get(&k).unwrap(), model.get(&k).cloned());
            if rng.random_bool(0.02) {
                j.barrier(j.last_lsn()).unwrap();
            }
            if rng.random_bool(0.01) {
                j.shared.view.write().active.born = Instant::now().checked_sub(Duration::from_secs(9));
            }
            if rng.random_bool(0.01) {
                j.release(Lsn(rng.random_range(0..=j.last_lsn().0)));
            }
        }
        last = j.last_lsn();
        if rng.random() {
            j.close().unwrap();
        } else {
            // A crash with everything durable, some of it perhaps half applied.
            j.barrier(last).unwrap();
            let next = root.path().join(format!("{}", life + 1));
            // Hold the applier between rounds while copying: copying file by file is no atomic snapshot.
            let guard = j.shared.witness.lock();
            snapshot(&dir, &next);
            drop(guard);
            dir = next;
        }
    }
}

#[test]
fn readers_see_whole_transactions() {
    let dir = tempfile::tempdir().unwrap();
    let (j, _) = Journal::open(Options { memtable_limit: 2 << 20, ..options(dir.path()) }).unwrap();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for t in 0..2u8 {
            let (j, stop) = (&j, &stop);
            scope.spawn(move || {
                let mut n = 0u64;
                while !stop.load(SeqCst) {
                    // The pair moves: each transaction removes it here and puts it there.
                    let (from, to) = (n % 50, (n + 1) % 50);
                    j.transact::<_, JournalError>(|tx| {
                        for part in 0..2u8 {
                            tx.delete(vec![t, from as u8, part]);
                            tx.put(vec![t, to as u8, part], [&n.to_be_bytes()[..], &[0; 900]].concat());
                        }
                        Ok(())
                    })
                    .unwrap();
                    n += 1;
                }
            });
            scope.spawn(move || {
                while !stop.load(SeqCst) {
                    let got = j.scan(&[t], &[t + 1], 1000).unwrap();
                    assert!(got.is_empty() || got.len() == 2, "{got:?}");
                    assert!(got.is_empty() || got[0].1 == got[1].1);
                    let last = j.last_in(&[t], &[t + 1]).unwrap();
                    assert!(last.is_none_or(|(k, _)| k[2] == 1));
                }
            });
        }
        wait_until("four rounds went by", || j.stats().rounds > 4);
        stop.store(true, SeqCst);
    });
    j.verify().unwrap();
}

#[test]
fn one_sync_serves_many_barriers() {
    let dir = tempfile::tempdir().unwrap();
    let synced = Arc::new(AtomicUsize::new(0));
    let count = synced.clone();
    let slow = move |_| {
        count.fetch_add(1, SeqCst);
        std::thread::sleep(Duration::from_millis(3));
        Ok(())
    };
    let (j, _) = Journal::open(Options::new(dir.path(), Arc::new(slow))).unwrap();
    std::thread::scope(|scope| {
        for t in 0..16 {
            let j = &j;
            scope.spawn(move || {
                for n in 0..20 {
                    let lsn = put(j, &format!("{t}"), &format!("{n}"));
                    j.barrier(lsn).unwrap();
                    assert!(j.durable_lsn() >= lsn);
                }
            });
        }
    });
    let stats = j.stats();
    assert_eq!(stats.syncs, synced.load(SeqCst) as u64, "block data is synced before each tail sync");
    assert!(stats.syncs < 160, "{} syncs for 320 barriers", stats.syncs);
}

/// Fails the acts that `fail` picks.
struct Faults<F>(F);

impl<F: Fn(&Act<'_>) -> Option<i32> + Send + Sync> Probe for Faults<F> {
    fn before(&self, act: &Act<'_>) -> io::Result<()> {
        (self.0)(act).map_or(Ok(()), |errno| Err(io::Error::from_raw_os_error(errno)))
    }
}

fn on_tail(act: &Act<'_>) -> bool {
    matches!(act, Act::Write(p, ..) | Act::Sync(p) if p.extension().is_some_and(|e| e == "tail"))
}

#[test]
fn a_failed_sync_poisons_and_nobody_hangs() {
    for errno in [libc::EIO, libc::ENOSPC] {
        let dir = tempfile::tempdir().unwrap();
        let broken = Arc::new(AtomicBool::new(false));
        let b = broken.clone();
        let probe = Faults(move |act: &Act<'_>| {
            (b.load(SeqCst) && on_tail(act) && matches!(act, Act::Sync(_))).then_some(errno)
        });
        let (j, _) = Journal::open_on(options(dir.path()), Disk::probed(Arc::new(probe))).unwrap();
        let lsn = put(&j, "a", "1");
        j.barrier(lsn).unwrap();
        broken.store(true, SeqCst);
        let lsn = put(&j, "a", "2");
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| assert!(matches!(j.barrier(lsn), Err(JournalError::Poisoned(_)))));
            }
        });
        broken.store(false, SeqCst);
        let refused = j.transact::<_, JournalError>(|tx| {
            tx.put("a", "3");
            Ok(())
        });
        assert!(matches!(refused, Err(JournalError::Poisoned(_))));
        assert!(j.poisoned().is_some());
        assert_eq!(j.get(b"a").unwrap().as_deref(), Some(&b"2"[..]));
        assert!(j.close().is_err());
        drop(j);
        let (j, opened) = open(dir.path());
        assert!(!opened.clean);
        assert!(opened.last_lsn >= Lsn(1));
        assert!(dump(&j).contains_key(&b"a"[..]));
    }
}

#[test]
fn what_a_killed_process_left_is_synced_before_it_is_built_upon() {
    let dir = tempfile::tempdir().unwrap();
    let (j, _) = open(dir.path());
    let lsn = put(&j, "a", "1");
    j.barrier(lsn).unwrap();
    // As a kill leaves it.
    let after = tempfile::tempdir().unwrap();
    snapshot(dir.path(), after.path());
    let acts = Arc::new(Mutex::new(Vec::new()));
    let noted = Arc::clone(&acts);
    let probe = Faults(move |act: &Act<'_>| {
        noted.lock().push(format!("{act:?}"));
        None
    });
    let (j, _) = Journal::open_on(options(after.path()), Disk::probed(Arc::new(probe))).unwrap();
    let lsn = put(&j, "a", "2");
    j.barrier(lsn).unwrap();
    j.close().unwrap();
    let acts = acts.lock();
    let first = |starts: &str, has: &str| acts.iter().position(|a| a.starts_with(starts) && a.contains(has));
    let said = first("Write", "witness").unwrap();
    assert!(first("Sync(", "witness").unwrap() < said, "over the only statement that is certain: {acts:?}");
    assert!(first("SyncDir", "tail").unwrap() < said, "of a tail file whose name may be lost: {acts:?}");
    assert!(first("Create", "tail").is_none_or(|at| first("SyncDir", "tail").unwrap() < at));
}

#[test]
fn a_failing_data_sync_poisons() {
    let dir = tempfile::tempdir().unwrap();
    let fail: DataSync = Arc::new(|_| Err(io::Error::other("gone")));
    let (j, _) = Journal::open(Options::new(dir.path(), fail)).unwrap();
    let lsn = put(&j, "a", "1");
    assert!(matches!(j.barrier(lsn), Err(JournalError::Poisoned(why)) if why.contains("gone")));
    let panics: DataSync = Arc::new(|_| panic!("in the hook"));
    let dir = tempfile::tempdir().unwrap();
    let (j, _) = Journal::open(Options::new(dir.path(), panics)).unwrap();
    let lsn = put(&j, "a", "1");
    assert!(matches!(j.barrier(lsn), Err(JournalError::Poisoned(_))));
}

#[test]
fn a_full_disk_is_no_poison() {
    let dir = tempfile::tempdir().unwrap();
    let full = Arc::new(AtomicBool::new(true));
    let f = full.clone();
    let probe = Faults(move |act: &Act<'_>| {
        (f.load(SeqCst) && matches!(act, Act::Create(p, _) if p.ends_with("next.tmp")))
            .then_some(libc::ENOSPC)
    });
    let (j, _) = Journal::open_on(options(dir.path()), Disk::probed(Arc::new(probe))).unwrap();
    let lsn = put(&j, "a", "1");
    assert!(matches!(j.barrier(lsn), Err(JournalError::Full { .. })));
    let refused = j.transact::<_, JournalError>(|tx| {
        tx.put("a", "2");
        Ok(())
    });
    assert!(matches!(refused, Err(JournalError::Full { .. })));
    assert_eq!(j.poisoned(), None);
    full.store(false, SeqCst);
    wait_until("there is space again", || j.barrier(lsn).is_ok());
    let lsn = put(&j, "b", "2");
    j.barrier(lsn).unwrap();
    j.close().unwrap();
    assert_eq!(dump(&open(dir.path()).0).len(), 2);
}

#[test]
fn memory_is_bounded() {
    let dir = tempfile::tempdir().unwrap();
    let (j, _) = Journal::open(Options { memtable_limit: 2 << 20, ..options(dir.path()) }).unwrap();
    for n in 0..3000u32 {
        j.transact::<_, JournalError>(|tx| {
            tx.put(n.to_be_bytes().to_vec(), vec![n as u8; 4000]);
            Ok(())
        })
        .unwrap();
        assert!(j.stats().memtable_bytes < (2 << 20) + 20_000);
    }
    assert!(j.stats().waits > 0);
    assert_eq!(dump(&j).len(), 3000);
}

#[test]
fn released_files_are_recycled_and_old_records_gone() {
    let dir = tempfile::tempdir().unwrap();
    let (j, _) = Journal::open(Options { memtable_limit: 1 << 20, ..options(dir.path()) }).unwrap();
    let mut pinned = None;
    for n in 0..1200u32 {
        let value = vec![n as u8; 2000];
        let lsn = j
            .transact::<_, JournalError>(|tx| {
                tx.put((n % 50).to_be_bytes().to_vec(), value);
                Ok(())
            })
            .unwrap()
            .1;
        if n % 20 == 0 {
            j.barrier(lsn).unwrap();
        }
        if n == 300 {
            pinned = Some((lsn, j.records(Lsn(100), lsn).unwrap()));
        }
        if n > 300 {
            j.release(lsn);
        }
    }
    j.shared.view.write().active.born = Instant::now().checked_sub(Duration::from_secs(9));
    wait_until("everything is applied", || j.stats().applied_lsn == j.last_lsn());
    j.release(j.last_lsn());
    std::thread::sleep(Duration::from_millis(300));
    // A reader keeps its files, whatever was released meanwhile.
    let (lsn, iter) = pinned.take().unwrap();
    let got: Vec<_> = iter.map(|r| r.unwrap().lsn.0).collect();
    assert_eq!(got, (101..=lsn.0).collect::<Vec<_>>());
    wait_until("the tail is cut", || {
        // Again and again: to look at the files, as here, keeps them while it lasts.
        j.shared.wishes.lock().cut = true;
        j.shared.tail.files().len() == 1
    });
    assert!(j.stats().tail_bytes <= 3 * (128 << 10));
    assert!(matches!(j.records(Lsn(5), Lsn(6)), Err(JournalError::Gone { .. })));
    let last = j.last_lsn();
    assert_eq!(j.records(last, last).unwrap().count(), 0);
    let state = dump(&j);
    j.close().unwrap();
    let (j, _) = open(dir.path());
    assert_eq!(dump(&j), state);
}

#[test]
fn a_second_open_is_locked_out() {
    let dir = tempfile::tempdir().unwrap();
    let (_j, _) = open(dir.path());
    assert!(matches!(Journal::open(options(dir.path())), Err(JournalError::Locked { .. })));
}

/// `cargo test --lib journal -- --ignored --nocapture figures`
#[test]
#[ignore = "prints figures"]
fn figures() {
    let dir = tempfile::tempdir_in(std::env::var("JOURNAL_DIR").unwrap_or_else(|_| ".".into())).unwrap();
    let (j, _) = Journal::open(Options::new(dir.path(), Arc::new(|_| Ok(())))).unwrap();
    let tx = |n: u64| {
        j.transact::<_, JournalError>(|tx| {
            tx.put([&[2][..], &n.to_be_bytes()].concat(), vec![7; 90]);
            tx.put([&[3][..], &n.to_be_bytes()].concat(), vec![8; 12]);
            Ok(())
        })
        .unwrap()
        .1
    };
    let rate = |n: u64, t: Instant| (n as f64 / t.elapsed().as_secs_f64()) as u64;
    let t = Instant::now();
    (0..60_000).for_each(|n| {
        tx(n);
    });
    println!("burst of 60,000 transactions of two puts: {}/s", rate(60_000, t));
    let t = Instant::now();
    (60_000..1_000_000).for_each(|n| {
        tx(n);
    });
    println!("940,000 more, held back by sled: {}/s, {} waits", rate(940_000, t), j.stats().waits);
    let t = Instant::now();
    while j.stats().applied_lsn < j.last_lsn() {
        std::thread::sleep(Duration::from_millis(10));
    }
    println!("rest applied after {:?}; {:?}", t.elapsed(), j.stats());
    let t = Instant::now();
    let mut n = 1_000_000;
    while t.elapsed() < Duration::from_secs(2) {
        j.barrier(tx(n)).unwrap();
        n += 1;
    }
    println!("one thread, barrier each: {}/s", rate(n - 1_000_000, t));
    let done = AtomicU64::new(0);
    let t = Instant::now();
    std::thread::scope(|scope| {
        for k in 0..8 {
            let (done, tx, j) = (&done, &tx, &j);
            scope.spawn(move || {
                while t.elapsed() < Duration::from_secs(2) {
                    let n = done.fetch_add(1, SeqCst);
                    j.barrier(tx(2_000_000 + k * 100_000 + n % 100_000)).unwrap();
                }
            });
        }
    });
    println!("8 threads, barrier each: {}/s", rate(done.load(SeqCst), t));
    let t = Instant::now();
    for n in 0..200_000u64 {
        j.get(&[&[2][..], &(n * 5).to_be_bytes()].concat()).unwrap().unwrap();
    }
    println!("get from sled: {}/s", rate(200_000, t));
    let t = Instant::now();
    assert_eq!(j.scan(&[2], &[3], 10_000).unwrap().len(), 10_000);
    println!("scan of 10,000: {:?}", t.elapsed());
    let t = Instant::now();
    j.verify().unwrap();
    println!("verify: {:?}", t.elapsed());
    let t = Instant::now();
    j.close().unwrap();
    println!("close: {:?}", t.elapsed());
    drop(j);
    let t = Instant::now();
    let (j, _) = Journal::open(Options::new(dir.path(), Arc::new(|_| Ok(())))).unwrap();
    println!("open: {:?}", t.elapsed());
    j.release(j.last_lsn());
    let t = Instant::now();
    for n in 0..1_000_000u64 {
        let n = n.wrapping_mul(2_654_435_761) % 1_000_000;
        j.transact::<_, JournalError>(|tx| {
            tx.put([&[2][..], &n.to_be_bytes()].concat(), vec![9; 90]);
            Ok(())
        })
        .unwrap();
        if n % 1000 == 0 {
            j.release(j.last_lsn());
        }
    }
    println!("churn, 1,000,000 random overwrites: {}/s; {:?}", rate(1_000_000, t), j.stats());
}

#[test]
fn a_read_that_sled_overtook_is_done_again() {
    let dir = tempfile::tempdir().unwrap();
    let (j, _) = open(dir.path());
    put(&j, "a", "1");
    let mut reads = 0;
    let reads = std::cell::RefCell::new(&mut reads);
    let seen = j.shared.consistently(
        |view| view.get(b"a"),
        |_, seen| {
            **reads.borrow_mut() += 1;
            if **reads.borrow() == 1 {
                put(&j, "a", "2");
                j.shared.view.write().active.born = Instant::now().checked_sub(Duration::from_secs(9));
                wait_until("it is applied", || j.stats().applied_lsn == Lsn(2));
                put(&j, "a", "3");
            }
            Ok(seen)
        },
    );
    assert_eq!(seen.unwrap(), Some(Some("3".into())));
    assert_eq!(**reads.borrow(), 2);
}
