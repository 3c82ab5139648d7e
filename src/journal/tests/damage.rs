//! Damage, loss and interruption of the files: what may be refused and what must never be returned.

use super::super::sled_store::Change;
use super::*;

fn tail_files(dir: &Path) -> Vec<PathBuf> {
    let mut all: Vec<_> = fs::read_dir(dir.join("tail")).unwrap().map(|e| e.unwrap().path()).collect();
    // Spare files are nobody's.
    all.retain(|file| file.extension().is_some_and(|e| e == "tail"));
    all.sort();
    all
}

/// A journal with three acknowledged groups of one record each, as a crash leaves it; and the place of the groups.
fn three_groups(root: &Path) -> (PathBuf, PathBuf, Vec<(u64, u64)>) {
    let (dir, copy) = (root.join("j"), root.join("copy"));
    let (j, _) = open(&dir);
    for n in ["1", "2", "3"] {
        let lsn = put(&j, n, &n.repeat(30));
        j.barrier(lsn).unwrap();
    }
    {
        let _guard = j.shared.witness.lock();
        snapshot(&dir, &copy);
    }
    let file = tail_files(&copy).pop().unwrap();
    let mut groups = Vec::new();
    let mut reader = j.shared.tail.files()[0].reader().unwrap();
    let mut at = reader.position();
    while let tail::Found::Group { .. } = reader.next().unwrap() {
        groups.push((at, reader.position()));
        at = reader.position();
    }
    (copy, file, groups)
}

fn with_tail(copy: &Path, file: &Path, bytes: &[u8], check: impl FnOnce(Result<Model, JournalError>)) {
    let scratch = tempfile::tempdir().unwrap();
    snapshot(copy, scratch.path());
    fs::write(scratch.path().join("tail").join(file.file_name().unwrap()), bytes).unwrap();
    check(Journal::open(options(scratch.path())).map(|(j, _)| dump(&j)));
}

#[test]
fn a_torn_last_group_ends_the_replay_and_a_damaged_one_is_refused() {
    let root = tempfile::tempdir().unwrap();
    let (copy, file, groups) = three_groups(root.path());
    let bytes = fs::read(&file).unwrap();
    let (from, to) = groups[2];
    // Power loss while the third group was being written: no confirmation, any cut.
    for cut in (from..=to).step_by(5) {
        let mut torn = bytes.clone();
        torn[cut as usize..].fill(0);
        with_tail(&copy, &file, &torn, |got| {
            let n = got.unwrap().len();
            let whole = torn[..to as usize] == bytes[..to as usize];
            assert_eq!(n, if whole { 3 } else { 2 }, "cut at {cut}");
        });
    }
    // A flipped bit anywhere in what was acknowledged and confirmed.
    let last = to as usize + tail::GROUP;
    for at in (0..36).step_by(7).chain((from as usize - 150..last).step_by(9)) {
        let mut flipped = bytes.clone();
        flipped[at] ^= 0x20;
        with_tail(&copy, &file, &flipped, |got| match got {
            Ok(model) => assert_eq!(model.len(), 3, "flip at {at}"),
            Err(e) => assert!(matches!(e, JournalError::Damaged(_)), "flip at {at}: {e}"),
        });
    }
    // Gone altogether, or cut short as a file.
    with_tail(&copy, &file, &bytes[..from as usize], |got| assert_eq!(got.unwrap().len(), 2));
    with_tail(&copy, &file, &[], |got| assert!(matches!(got, Err(JournalError::Damaged(_)))));
}

#[test]
fn a_hole_between_tail_files_is_damage() {
    let root = tempfile::tempdir().unwrap();
    let dir = root.path().join("j");
    let (j, _) = open(&dir);
    for n in 0..300u32 {
        let lsn = j.transact::<_, JournalError>(|tx| {
            tx.put(n.to_be_bytes().to_vec(), vec![1; 2000]);
            Ok(())
        });
        j.barrier(lsn.unwrap().1).unwrap();
    }
    let copy = root.path().join("copy");
    {
        let _guard = j.shared.witness.lock();
        snapshot(&dir, &copy);
    }
    let files = tail_files(&copy);
    assert!(files.len() > 3);
    for gone in &files {
        let scratch = tempfile::tempdir().unwrap();
        snapshot(&copy, scratch.path());
        fs::remove_file(scratch.path().join("tail").join(gone.file_name().unwrap())).unwrap();
        match Journal::open(options(scratch.path())) {
            Err(JournalError::Damaged(_)) => {}
            Ok((j, o)) => {
                // Only the newest file, not yet known to the witness, could vanish unseen; applied ones are not needed.
                let applied = j.stats().applied_lsn;
                assert!(o.last_lsn == Lsn(300) && applied > Lsn(0) || Some(gone) == files.last(), "{gone:?}");
            }
            Err(e) => panic!("{e}"),
        }
    }
}

/// A closed journal in `dir` with several generations of every key, so that older intact values lie about; its content, and sled's files.
fn generations(dir: &Path) -> (Model, Vec<PathBuf>) {
    let (j, _) = open(dir);
    for generation in 0..4u8 {
        for n in 0..400u32 {
            let value = vec![generation; 3000];
            j.transact::<_, JournalError>(|tx| {
                tx.put(n.to_be_bytes().to_vec(), value);
                Ok(())
            })
            .unwrap();
        }
        apply_all(&j);
    }
    let want = dump(&j);
    j.close().unwrap();
    // An open makes sled summarize what it has in a snapshot file.
    assert_eq!(dump(&open(dir).0), want);
    let files = walkdir::WalkDir::new(dir.join("db"))
        .into_iter()
        .map(|e| e.unwrap())
        .filter(|e| e.file_type().is_file())
        .map(|e| e.into_path())
        .collect();
    (want, files)
}

/// Waits until all that was committed is in sled.
fn apply_all(j: &Journal) {
    age(j);
    wait_until("it is applied", || j.stats().applied_lsn == j.last_lsn());
}

/// Makes what is not in sled yet old enough to be applied now.
fn age(j: &Journal) {
    if let Some(born) = &mut j.shared.view.write().active.born {
        *born = Instant::now().checked_sub(Duration::from_secs(9)).unwrap_or(*born);
    }
    j.shared.wished.notify_all();
}

/// Flips a bit somewhere in one of `files`, in the copies of `dir`; `None` when there is nothing to flip.
fn flip(rng: &mut ChaCha8Rng, dir: &Path, files: &[PathBuf], copies: &[&Path]) -> Option<String> {
    let kind = ["db", "db", "db", "snap", "conf"].choose(rng).unwrap();
    let named = |f: &&PathBuf| f.file_name().unwrap().to_string_lossy().starts_with(kind);
    let file = files.iter().filter(named).collect::<Vec<_>>().choose(rng).copied()?;
    let bytes = fs::read(file).unwrap();
    if bytes.is_empty() {
        return None;
    }
    // Where there is something: much of sled's file is empty.
    let at = (0..10_000).map(|_| rng.random_range(0..bytes.len())).find(|at| bytes[*at] != 0)?;
    let bit = 1 << rng.random_range(0..8);
    for copy in copies {
        let copy = copy.join(file.strip_prefix(dir).unwrap());
        let f = fs::File::options().write(true).open(&copy).unwrap();
        f.write_all_at(&[bytes[at] ^ bit], at as u64).unwrap();
    }
    Some(format!("a flip of {bit} at {at} of {}", file.display()))
}

/// Flips bits all over sled's files; whatever happens, no wrong and no older value is returned. What a proof at once finds, one in the
/// background finds, too, whatever is changed meanwhile: after a clean close, and after a kill behind which the kernel has kept the files.
#[test]
fn flipped_bits_in_sled_are_never_silent() {
    let mut rng = ChaCha8Rng::seed_from_u64(seed());
    let root = tempfile::tempdir().unwrap();
    let (dir, killed) = (root.path().join("j"), root.path().join("killed"));
    let (want, files) = generations(&dir);
    snapshot(&dir, &killed);
    {
        // As a kill leaves it: open, nothing of a round under way.
        let mut w = witness::Witness::open(&Disk::default(), &killed).unwrap().unwrap();
        let now = Statement { state: State::Open, ..w.now };
        w.say(now).unwrap();
    }
    let mut outcomes = [0, 0];
    for n in 0..32 {
        let from = if n % 2 == 0 { &dir } else { &killed };
        let (a, b) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        snapshot(from, a.path());
        snapshot(from, b.path());
        keep(b.path());
        // Without a flip such a copy is accepted.
        let what = match n {
            0 | 1 => "nothing".to_owned(),
            _ => match flip(&mut rng, &dir, &files, &[a.path(), b.path()]) {
                Some(what) => what,
                None => continue,
            },
        };
        let right = match Journal::open(options(a.path())) {
            Err(JournalError::Damaged(_) | JournalError::Io { .. }) => false,
            Err(e) => panic!("{n}: {e} after {what}"),
            Ok((j, _)) => match j.scan(&[], &[0xff], usize::MAX) {
                Ok(all) => {
                    assert!(all.into_iter().collect::<Model>() == want, "{n}: wrong after {what}");
                    true
                }
                Err(_) => false,
            },
        };
        assert!(right || n > 1);
        let later = Journal::open(Options { prove_at_once: 0, ..options(b.path()) });
        let outcome = later.and_then(|(j, opened)| changed_while_proved(&mut rng, &j, &opened, &want, &what));
        assert_eq!(outcome.is_ok(), right, "{n}: {what}: {outcome:?}");
        outcomes[usize::from(right)] += 1;
    }
    println!("{} refused, {} right", outcomes[0], outcomes[1]);
    assert!(outcomes[0] > 0 && outcomes[1] > 1);
}

/// Overwrites some of what is there while the proof is under way, and waits for its end; fails as the journal does.
fn changed_while_proved(
    rng: &mut ChaCha8Rng,
    j: &Journal,
    opened: &Opened,
    want: &Model,
    what: &str,
) -> Result<(), JournalError> {
    assert_eq!(opened.replayed, 0);
    let mut expected = want.clone();
    for _ in 0..8 {
        let key = Bytes::copy_from_slice(&rng.random_range(0..400u32).to_be_bytes());
        j.transact::<_, JournalError>(|tx| {
            tx.put(key.clone(), "new");
            Ok(())
        })?;
        expected.insert(key, "new".into());
        if rng.random_bool(0.3) {
            age(j);
        }
    }
    j.verify()?;
    assert!(dump(j) == expected, "wrong after {what}");
    Ok(())
}

/// Says of a copy that the kernel has kept it since it was last open.
fn keep(dir: &Path) {
    kept::Kept::look(dir, &dir.join("db/db")).note();
}

/// Rounds that are applied while a proof is under way neither hold it up nor alarm it.
#[test]
fn a_proof_goes_on_while_rounds_are_applied() {
    let mut rng = ChaCha8Rng::seed_from_u64(seed());
    let dir = tempfile::tempdir().unwrap();
    let (j, _) = open(dir.path());
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let changes = scope.spawn(|| {
            for n in 0u64.. {
                j.transact::<_, JournalError>(|tx| {
                    for _ in 0..4 {
                        let key = rng.random_range(0..400u32).to_be_bytes().to_vec();
                        if rng.random_bool(0.3) {
                            tx.delete(key)
                        } else {
                            tx.put(key, n.to_le_bytes().to_vec())
                        }
                    }
                    Ok(())
                })
                .unwrap();
                age(&j);
                if stop.load(SeqCst) {
                    return;
                }
            }
        });
        let begun = j.stats().rounds;
        for _ in 0..3 {
            j.verify().unwrap();
        }
        wait_until("rounds are applied", || j.stats().rounds > begun + 2);
        stop.store(true, SeqCst);
        changes.join().unwrap();
    });
    j.verify().unwrap();
    j.close().unwrap();
}

#[test]
fn missing_parts_are_damage_and_quarantine_starts_anew() {
    let root = tempfile::tempdir().unwrap();
    let dir = root.path().join("j");
    let (j, _) = open(&dir);
    for n in 0..5 {
        let lsn = put(&j, &format!("{n}"), "x");
        j.barrier(lsn).unwrap();
    }
    drop(j);
    for part in ["db", "db/db", "witness", "tail"] {
        let scratch = tempfile::tempdir().unwrap();
        snapshot(&dir, scratch.path());
        let path = scratch.path().join(part);
        if path.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) }.unwrap();
        let got = Journal::open(options(scratch.path()));
        assert!(matches!(got, Err(JournalError::Damaged(_))), "{part}");
        let aside = quarantine(scratch.path(), "now").unwrap();
        assert_eq!(quarantine(scratch.path(), "now").unwrap(), scratch.path().join("quarantine-now-2"));
        let (j, opened) = open(scratch.path());
        assert!(opened.fresh);
        // Rebuild: a restored state up to record 2, the rest from the old tail.
        let ops = [Op::put("0", "x"), Op::put("1", "x")];
        j.import(Lsn(2), &mut ops.into_iter().map(Ok)).unwrap();
        if part != "tail" {
            let salvaged = salvage(&aside, Lsn(2)).unwrap();
            assert_eq!(Some(salvaged.proved), salvaged.records.last().map(|r| r.lsn));
            for record in salvaged.records {
                let lsn = j.transact::<_, JournalError>(|tx| {
                    for op in &record.ops {
                        match op {
                            Op::Put { key, value } => tx.put(key.clone(), value.clone()),
                            Op::Delete { key } => tx.delete(key.clone()),
                        }
                    }
                    Ok(())
                });
                assert_eq!(lsn.unwrap().1, record.lsn);
            }
            assert_eq!(dump(&j).len(), 5);
        }
        j.close().unwrap();
    }
}

#[test]
fn import_loads_and_an_interrupted_one_is_noticed() {
    let root = tempfile::tempdir().unwrap();
    let dir = root.path().join("j");
    let (j, _) = open(&dir);
    let n = 3000u32;
    let mut ops = (0..n)
        .map(|i| Op::put(i.to_be_bytes().to_vec(), vec![i as u8; 500]))
        .chain([Op::delete(5u32.to_be_bytes().to_vec())])
        .map(Ok);
    j.import(Lsn(777), &mut ops).unwrap();
    assert_eq!(j.last_lsn(), Lsn(777));
    assert_eq!(dump(&j).len() as u32, n - 1);
    j.verify().unwrap();
    let lsn = put(&j, "new", "x");
    assert_eq!(lsn, Lsn(778));
    j.barrier(lsn).unwrap();
    assert_eq!(j.records(Lsn(777), lsn).unwrap().count(), 1);
    assert!(matches!(j.records(Lsn(776), lsn), Err(JournalError::Gone { .. })));
    assert!(matches!(j.import(Lsn(9), &mut std::iter::empty()), Err(JournalError::NotFresh { .. })));
    let copy = root.path().join("copy");
    snapshot(&dir, &copy);
    for d in [&copy, &dir] {
        if d == &dir {
            j.close().unwrap();
        }
        let (j, opened) = open(d);
        assert_eq!(opened.last_lsn, Lsn(778));
        assert_eq!(dump(&j).len() as u32, n);
    }

    let dir = root.path().join("k");
    let (j, _) = open(&dir);
    let copy = root.path().join("half");
    let mut ops = (0..n).map(|i| {
        if i == 2900 {
            snapshot(&dir, &copy);
        }
        Ok(Op::put(i.to_be_bytes().to_vec(), vec![i as u8; 500]))
    });
    j.import(Lsn(5), &mut ops).unwrap();
    assert!(matches!(Journal::open(options(&copy)), Err(JournalError::Incomplete(_))));

    let dir = root.path().join("l");
    let (j, _) = open(&dir);
    let mut ops = [Ok(Op::put("a", "1")), Err(JournalError::Damaged("the dump".into()))].into_iter();
    assert!(matches!(j.import(Lsn(5), &mut ops), Err(JournalError::Damaged(_))));
    assert!(j.poisoned().is_some());
    drop(j);
    assert!(matches!(Journal::open(options(&dir)), Err(JournalError::Incomplete(_))));
}

#[test]
fn an_interrupted_round_is_redone_and_proved() {
    let root = tempfile::tempdir().unwrap();
    let dir = root.path().join("j");
    let (j, _) = open(&dir);
    for (key, value) in [("a", "1"), ("b", "1"), ("c", "1")] {
        put(&j, key, value);
    }
    j.shared.view.write().active.born = Instant::now().checked_sub(Duration::from_secs(9));
    wait_until("it is applied", || j.stats().applied_lsn == Lsn(3));
    // The applier stands still from here on: it needs the witness for a round.
    let mut witness = j.shared.witness.lock();
    put(&j, "a", "2");
    j.transact::<_, JournalError>(|tx| {
        tx.delete("b");
        tx.put("d", "2");
        Ok(())
    })
    .unwrap();
    let announced = j.last_lsn();
    let want = dump(&j);
    let store = j.shared.store().unwrap();
    let mut sum = witness.now.after.sum;
    for (key, lsn) in [("a", 1), ("b", 2)] {
        sum.sub(key.as_bytes(), Lsn(lsn), sled_store::checksum(key.as_bytes(), Lsn(lsn), b"1"));
    }
    for (key, lsn) in [("a", 4), ("d", 5)] {
        sum.add(key.as_bytes(), Lsn(lsn), sled_store::checksum(key.as_bytes(), Lsn(lsn), b"2"));
    }
    let before = witness.now.after;
    let after = Point { applied: announced, sum };
    let said = Statement { state: State::Open, before, after, tail_seq: 1, last: announced };
    witness.say(said).unwrap();
    // Later records, which are not of the round.
    put(&j, "e", "3");
    j.barrier(j.last_lsn()).unwrap();
    let mut all = want;
    all.insert("e".into(), "3".into());
    let a = Change { key: b"a", lsn: Lsn(4), value: Some(b"2") };
    let b = Change { key: b"b", lsn: Lsn(5), value: None };
    let stray = Change { key: b"c", lsn: Lsn(1), value: Some(b"older") };
    for (n, changes) in [vec![], vec![a], vec![b], vec![stray]].into_iter().enumerate() {
        let wrong = n == 3;
        store.apply(changes.into_iter(), None, || {}).unwrap();
        let copy = root.path().join(format!("{n}"));
        snapshot(&dir, &copy);
        match Journal::open(options(&copy)) {
            Ok((j, opened)) => {
                assert!(!wrong && !opened.clean);
                assert_eq!(dump(&j), all);
                assert_eq!(j.stats().applied_lsn, announced);
            }
            Err(e) => assert!(wrong && matches!(e, JournalError::Damaged(_)), "{n}: {e}"),
        }
        // Proved in the background, where the kernel has kept it; else at once, whatever its size.
        for kept in [false, true] {
            let copy = root.path().join(format!("{n}-{kept}"));
            snapshot(&dir, &copy);
            if kept {
                keep(&copy);
            }
            match Journal::open(Options { prove_at_once: 0, ..options(&copy) }) {
                Ok((j, _)) => {
                    assert!(kept || !wrong);
                    assert_eq!(j.verify().is_err(), wrong, "{n}");
                    assert!(wrong || dump(&j) == all);
                    wait_until("it is poisoned", || j.poisoned().is_some() == wrong);
                }
                Err(e) => assert!(wrong && !kept && matches!(e, JournalError::Damaged(_)), "{n}: {e}"),
            }
        }
    }
    j.poison("the test meddled with sled");
}
