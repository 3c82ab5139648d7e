//! Tests of a disk that is full in the middle of a round.

use super::*;

/// Some 3 MB of changes, so that a round has a dozen steps.
fn much(j: &Journal, model: &mut Model, round: u32) {
    let mut rng = ChaCha8Rng::seed_from_u64(u64::from(round));
    for i in 0..60u32 {
        let changes: Vec<(Bytes, Bytes)> = (0..10)
            .map(|n| {
                // Half of the keys are those of the former rounds.
                let key = if n % 2 == 0 { format!("k{}", i * 10 + n) } else { format!("k{round}-{i}-{n}") };
                let mut value = vec![0; 5000];
                rng.fill(&mut value[..]);
                (Bytes::from(key), Bytes::from(value))
            })
            .collect();
        j.transact::<_, JournalError>(|tx| {
            changes.iter().for_each(|(k, v)| tx.put(k.clone(), v.clone()));
            Ok(())
        })
        .unwrap();
        model.extend(changes);
    }
}

fn pretend(j: &Journal, what: Option<(u32, bool)>) {
    *j.shared.store().unwrap().pretend.lock() = what;
}

#[test]
fn a_round_broken_off_for_want_of_space_is_redone() {
    let dir = tempfile::tempdir().unwrap();
    let (j, _) = open(dir.path());
    let mut model = Model::new();
    for round in 0..6 {
        // Between steps our own look at the disk says so; or sled meets it and must be opened anew.
        let sticks = round % 2 == 1;
        pretend(&j, Some((round * 2, sticks)));
        much(&j, &mut model, round);
        let copy = tempfile::tempdir().unwrap();
        if !sticks {
            wait_until("the round is broken off", || j.shared.applier_full.load(SeqCst));
            assert_eq!(dump(&j), model, "reads go on");
            j.barrier(j.last_lsn()).unwrap();
            assert!(matches!(j.verify(), Err(JournalError::Full { .. })), "nothing can be said now");
            snapshot(dir.path(), copy.path());
            pretend(&j, None);
        }
        wait_until("everything is applied", || j.shared.applied.load(SeqCst) == j.last_lsn().0);
        assert_eq!(dump(&j), model);
        j.verify().unwrap();
        assert_eq!(j.poisoned(), None);
        if !sticks {
            // Killed in that moment: the next start finishes the round.
            let (other, _) = open(copy.path());
            assert_eq!(dump(&other), model);
            other.verify().unwrap();
            other.close().unwrap();
        }
    }
    j.close().unwrap();
    drop(j);
    let (j, opened) = open(dir.path());
    assert!(opened.clean);
    assert_eq!(dump(&j), model);
    j.verify().unwrap();
}

#[test]
fn closing_in_the_middle_of_a_round_is_a_crash_and_loses_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let (j, _) = open(dir.path());
    let mut model = Model::new();
    pretend(&j, Some((3, false)));
    much(&j, &mut model, 1);
    wait_until("the round is broken off", || j.shared.applier_full.load(SeqCst));
    j.close().unwrap();
    drop(j);
    let (j, opened) = open(dir.path());
    assert!(!opened.clean);
    assert_eq!(dump(&j), model);
    j.verify().unwrap();
}

#[test]
fn what_is_laid_aside_does_not_show_and_stays() {
    use std::os::unix::fs::MetadataExt;
    let dir = tempfile::tempdir().unwrap();
    let (j, _) = open(dir.path());
    let store = j.shared.store().unwrap();
    let file = dir.path().join("db/db");
    let len = fs::metadata(&file).unwrap().len();
    store.reserve(20 << 20).unwrap();
    let meta = fs::metadata(&file).unwrap();
    assert_eq!(meta.len(), len);
    assert!(meta.blocks() * 512 >= len + (20 << 20), "{} blocks", meta.blocks());
    assert!(matches!(store.reserve(1 << 60), Err(JournalError::Full { .. })));
    assert!(!store.is_stuck());
    assert_eq!(fs::metadata(&file).unwrap().blocks(), meta.blocks(), "a failed attempt takes nothing");
}
