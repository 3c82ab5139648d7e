//! Values in brief through the whole journal: what is read of them is never older than what was committed before.

use rand::seq::SliceRandom;

use super::*;

const KEYS: usize = 48;

/// The first eight bytes of values of keys that begin with `k`.
const FIRST: Form = Form {
    key: |key, out| {
        out.extend_from_slice(key);
        key.first() == Some(&b'k')
    },
    value: |_, value, out| {
        out.extend_from_slice(value.get(..8).unwrap_or_default());
        value.len() >= 8
    },
};

fn with_briefs(dir: &Path) -> Arc<Journal> {
    let options = Options { form: FIRST, memtable_limit: 1 << 20, ..options(dir) };
    Journal::open(options).unwrap().0
}

fn key(n: usize) -> Vec<u8> {
    format!("k{n:02}").into_bytes()
}

/// The version that a key has; 0 is none.
fn version(j: &Journal, n: usize) -> u64 {
    let mut out = Vec::new();
    match j.brief(&key(n), &mut out).unwrap() {
        Brief::Absent => 0,
        Brief::Short => u64::from_le_bytes(out[..].try_into().unwrap()),
        Brief::Whole(_) => panic!("not brief"),
    }
}

#[test]
fn brief_values_are_those_of_the_newest_layer() {
    let dir = tempfile::tempdir().unwrap();
    let j = with_briefs(dir.path());
    put(&j, "k00", "12345678 and more");
    put(&j, "k01", "short");
    put(&j, "other", "12345678 and more");
    let look = |j: &Journal| {
        let mut out = Vec::new();
        let found = ["k00", "k01", "other", "k02"].map(|k| j.brief(k.as_bytes(), &mut out).unwrap());
        assert_eq!(found[0], Brief::Short);
        assert_eq!(found[1], Brief::Whole("short".into()));
        assert_eq!(found[3], Brief::Absent);
        assert!(out.starts_with(b"12345678"));
    };
    look(&j);
    j.barrier(j.last_lsn()).unwrap();
    wait_until("all is in sled", || j.stats().applied_lsn == j.last_lsn());
    look(&j);
    look(&j);
    put(&j, "k00", "abcdefgh and more");
    let mut out = Vec::new();
    assert_eq!(j.brief(b"k00", &mut out).unwrap(), Brief::Short);
    assert_eq!(out, b"abcdefgh");
    j.close().unwrap();
    assert!(matches!(j.brief(b"k00", &mut out), Err(JournalError::Closed)));
}

/// Several threads change keys, others read them in brief, while rounds move all of it into sled, and the journal is opened anew.
#[test]
fn no_reader_sees_what_was_replaced_before_it_came() {
    let seed = seed();
    let dir = tempfile::tempdir().unwrap();
    // Odd versions are values, even ones deletions; of each key only one thread makes them.
    let begun: Vec<AtomicU64> = (0..KEYS).map(|_| AtomicU64::new(0)).collect();
    let done: Vec<AtomicU64> = (0..KEYS).map(|_| AtomicU64::new(0)).collect();
    for life in 0..2 {
        let j = with_briefs(dir.path());
        for (n, last) in done.iter().enumerate() {
            let last = last.load(SeqCst);
            assert_eq!(version(&j, n), last * (last % 2), "key {n} behind the open");
        }
        let writing = AtomicUsize::new(2);
        std::thread::scope(|scope| {
            for writer in 0..2 {
                let (j, begun, done, writing) = (&j, &begun, &done, &writing);
                scope.spawn(move || {
                    let mut rng = ChaCha8Rng::seed_from_u64(seed + 10 * life + writer);
                    for turn in 0..600 {
                        let mut mine: Vec<usize> = (0..KEYS).filter(|n| n % 2 == writer as usize).collect();
                        mine.shuffle(&mut rng);
                        mine.truncate(rng.random_range(1..5));
                        for n in &mine {
                            begun[*n].fetch_add(1, SeqCst);
                        }
                        let size = rng.random_range(8..4000);
                        j.transact::<_, JournalError>(|tx| {
                            // So that tables are full, and go to sled, again and again.
                            tx.put(format!("filler-{writer}-{turn}"), vec![0; 2000]);
                            for n in &mine {
                                let version = begun[*n].load(SeqCst);
                                let mut value = version.to_le_bytes().to_vec();
                                value.resize(size, b'.');
                                if version % 2 == 1 { tx.put(key(*n), value) } else { tx.delete(key(*n)) }
                            }
                            Ok(())
                        })
                        .unwrap();
                        for n in &mine {
                            done[*n].fetch_add(1, SeqCst);
                        }
                    }
                    writing.fetch_sub(1, SeqCst);
                });
            }
            for reader in 0..2 {
                let (j, begun, done, writing) = (&j, &begun, &done, &writing);
                scope.spawn(move || {
                    let mut rng = ChaCha8Rng::seed_from_u64(seed + 10 * life + 5 + reader);
                    while writing.load(SeqCst) > 0 {
                        let n = rng.random_range(0..KEYS);
                        let oldest = done[n].load(SeqCst);
                        let seen = version(j, n);
                        let newest = begun[n].load(SeqCst);
                        let fits = match seen {
                            0 => oldest % 2 == 0 || newest > oldest,
                            seen => (oldest..=newest).contains(&seen),
                        };
                        assert!(fits, "key {n}: version {seen}, not of {oldest} to {newest}");
                    }
                });
            }
        });
        j.barrier(j.last_lsn()).unwrap();
        wait_until("all is in sled", || j.stats().applied_lsn == j.last_lsn());
        for (n, last) in done.iter().enumerate() {
            let last = last.load(SeqCst);
            assert_eq!(version(&j, n), last * (last % 2), "key {n}");
            assert_eq!(j.get(&key(n)).unwrap().is_some(), last % 2 == 1);
        }
        assert!(j.stats().rounds > 5 && j.stats().brief_bytes > 0);
        j.close().unwrap();
    }
}
