//! Kills a process that writes to the journal, at random moments, and looks at what is left.
//!
//! The child writes transactions that each continue a known sequence and prints a number after its barrier returned.
//! Afterwards the journal must hold a prefix of the sequence, not shorter than the last number printed, and again after
//! the next kill. `JOURNAL_KILLS` sets how many (default 24); `JOURNAL_SEED` the moments.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test")]

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use mirrorfs::format::record::Op;
use mirrorfs::ids::Lsn;
use mirrorfs::journal::{Journal, JournalError, Options, quarantine};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

const CHILD: &str = "JOURNAL_CRASH_CHILD";
const KEYS: u64 = 400;

fn options(dir: &Path) -> Options {
    Options { tail_file_size: 256 << 10, memtable_limit: 1 << 20, ..Options::new(dir, Arc::new(|_| Ok(()))) }
}

/// Changes of the n-th record: a function of n alone.
fn ops(n: u64) -> Vec<(Vec<u8>, Option<Vec<u8>>)> {
    let mut rng = ChaCha8Rng::seed_from_u64(n);
    (0..rng.random_range(1..5))
        .map(|_| {
            let key = [&[2][..], &rng.random_range(0..KEYS).to_be_bytes()].concat();
            let value = rng.random_bool(0.8).then(|| vec![n as u8; rng.random_range(1..3000)]);
            (key, value)
        })
        .collect()
}

fn model(upto: u64) -> BTreeMap<Vec<u8>, Vec<u8>> {
    let mut map = BTreeMap::new();
    for n in 1..=upto {
        for (key, value) in ops(n) {
            match value {
                Some(v) => map.insert(key, v),
                None => map.remove(&key),
            };
        }
    }
    map
}

fn write_one(j: &Journal, n: u64) {
    let ((), lsn) = j
        .transact::<_, JournalError>(|tx| {
            for (key, value) in ops(n) {
                match value {
                    Some(v) => tx.put(key, v),
                    None => tx.delete(key),
                }
            }
            Ok(())
        })
        .unwrap();
    assert_eq!(lsn, Lsn(n));
}

/// The process that gets killed (a test of its own name so that the test binary can start it).
#[test]
fn child() {
    let Ok(dir) = std::env::var(CHILD) else { return };
    let say = |n: u64| {
        let mut out = std::io::stdout().lock();
        writeln!(out, "@{n}").unwrap();
        out.flush().unwrap();
    };
    if let Some(dir) = dir.strip_prefix("import:") {
        let (j, _) = Journal::open(options(Path::new(dir))).unwrap();
        say(0);
        let mut ops = (0..20_000u32).map(|i| Ok(Op::put(i.to_be_bytes().to_vec(), vec![1; 300])));
        j.import(Lsn(9), &mut ops).unwrap();
        say(1);
        std::thread::sleep(Duration::from_secs(60));
    }
    let (j, opened) = Journal::open(options(Path::new(&dir))).unwrap();
    say(opened.last_lsn.0);
    for n in opened.last_lsn.0 + 1.. {
        write_one(&j, n);
        if n % 7 == 0 {
            j.barrier(Lsn(n)).unwrap();
            say(n);
        }
        if n % 50 == 0 {
            j.release(Lsn(n / 2));
        }
    }
}

/// Starts the child, kills it after `life`, and returns the last number it printed.
fn run_and_kill(arg: &str, life: Duration) -> Option<u64> {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["child", "--exact", "--nocapture", "--test-threads=1"])
        .env(CHILD, arg)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let out = BufReader::new(child.stdout.take().unwrap());
    let reader = std::thread::spawn(move || {
        // libtest prints its own words, the first number perhaps on the same line.
        let numbers = out.lines().map_while(Result::ok);
        numbers.filter_map(|l| l.rsplit_once('@').and_then(|(_, n)| n.parse::<u64>().ok())).last()
    });
    std::thread::sleep(life);
    let early = child.try_wait().unwrap();
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(early.is_none(), "the child ended by itself");
    reader.join().unwrap()
}

fn rng() -> ChaCha8Rng {
    let seed = std::env::var("JOURNAL_SEED").ok().and_then(|s| s.parse().ok()).unwrap_or_else(|| {
        std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_nanos() as u64
    });
    println!("JOURNAL_SEED={seed}");
    ChaCha8Rng::seed_from_u64(seed)
}

fn kills(default: u32) -> u32 {
    std::env::var("JOURNAL_KILLS").ok().and_then(|s| s.parse().ok()).unwrap_or(default)
}

#[test]
fn a_killed_writer_leaves_a_prefix_with_everything_acknowledged() {
    let mut rng = rng();
    let mut dir = tempfile::tempdir().unwrap();
    let (mut acknowledged, mut most) = (0, 0);
    for kill in 0..kills(24) {
        if rng.random_bool(0.1) {
            dir = tempfile::tempdir().unwrap();
            acknowledged = 0;
        }
        let arg = dir.path().to_str().unwrap();
        let life = Duration::from_millis(rng.random_range(1..700));
        acknowledged = run_and_kill(arg, life).unwrap_or(0).max(acknowledged);
        // Half the time the next child does the recovery, and may be killed at it.
        if rng.random_bool(0.5) {
            continue;
        }
        let (j, opened) = Journal::open(options(dir.path())).unwrap();
        let last = opened.last_lsn.0;
        most = most.max(last);
        assert!(last >= acknowledged, "kill {kill}: {acknowledged} was acknowledged, {last} is there");
        let got: BTreeMap<_, _> = j
            .scan(&[0], &[0xff], usize::MAX)
            .unwrap()
            .into_iter()
            .map(|(k, v)| (k.to_vec(), v.to_vec()))
            .collect();
        assert!(got == model(last), "kill {kill}: the state is not that of record {last}");
        j.verify().unwrap();
        if rng.random() {
            j.close().unwrap();
        }
    }
    println!("longest history {most}");
    assert!(most > 0, "nothing was ever written");
}

#[test]
fn a_killed_import_is_noticed_or_complete() {
    let mut rng = rng();
    for _ in 0..kills(24) / 4 {
        let dir = tempfile::tempdir().unwrap();
        let arg = format!("import:{}", dir.path().display());
        let said = run_and_kill(&arg, Duration::from_millis(rng.random_range(5..1500)));
        match Journal::open(options(dir.path())) {
            Ok((j, opened)) => {
                let n = j.scan(&[], &[0xff], usize::MAX).unwrap().len();
                assert_eq!(n, if opened.last_lsn == Lsn(9) { 20_000 } else { 0 });
                assert!(said != Some(1) || opened.last_lsn == Lsn(9));
            }
            Err(JournalError::Incomplete(_)) => {
                assert_ne!(said, Some(1));
                quarantine(dir.path(), "test").unwrap();
                assert!(Journal::open(options(dir.path())).unwrap().1.fresh);
            }
            Err(e) => panic!("{e}"),
        }
    }
}
