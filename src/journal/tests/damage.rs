//! Damage, loss and interruption of the files: what may be refused and what must never be returned.

use super::*;

fn tail_files(dir: &Path) -> Vec<PathBuf> {
    let mut all: Vec<_> = fs::read_dir(dir.join("tail")).unwrap().map(|e| e.unwrap().path()).collect();
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

/// Flips bits all over sled's files; whatever happens, no wrong and no older value is returned.
#[test]
fn flipped_bits_in_sled_are_never_silent() {
    let mut rng = ChaCha8Rng::seed_from_u64(seed());
    let root = tempfile::tempdir().unwrap();
    let dir = root.path().join("j");
    let (j, _) = open(&dir);
    // Several generations of every key, so that older intact values lie about.
    for generation in 0..4u8 {
        for n in 0..400u32 {
            let value = vec![generation; 3000];
            j.transact::<_, JournalError>(|tx| {
                tx.put(n.to_be_bytes().to_vec(), value);
                Ok(())
            })
            .unwrap();
        }
        j.shared.view.write().active.born = Instant::now().checked_sub(Duration::from_secs(9));
        wait_until("it is applied", || j.stats().applied_lsn == j.last_lsn());
    }
    let want = dump(&j);
    j.close().unwrap();
    // An open makes sled summarize what it has in a snapshot file.
    assert_eq!(dump(&open(&dir).0), want);
    let files: Vec<_> = walkdir::WalkDir::new(dir.join("db"))
        .into_iter()
        .map(|e| e.unwrap())
        .filter(|e| e.file_type().is_file())
        .map(|e| e.into_path())
        .collect();
    let (mut refused, mut right) = (0, 0);
    let by_name = |prefix: &str| -> Vec<_> {
        files.iter().filter(|f| f.file_name().unwrap().to_string_lossy().starts_with(prefix)).collect()
    };
    for n in 0..40 {
        let scratch = tempfile::tempdir().unwrap();
        snapshot(&dir, scratch.path());
        let kind = ["db", "db", "db", "snap", "conf"].choose(&mut rng).unwrap();
        let kind = by_name(kind);
        let Some(file) = kind.choose(&mut rng) else { continue };
        let bytes = fs::read(file).unwrap();
        // Where there is something: most of sled's file is empty.
        let used: Vec<_> = (0..bytes.len()).filter(|i| bytes[*i] != 0).collect();
        let Some(at) = used.choose(&mut rng) else { continue };
        let copy = scratch.path().join(file.strip_prefix(&dir).unwrap());
        let f = fs::File::options().write(true).open(&copy).unwrap();
        f.write_all_at(&[bytes[*at] ^ (1 << rng.random_range(0..8))], *at as u64).unwrap();
        match Journal::open(options(scratch.path())) {
            Err(JournalError::Damaged(_) | JournalError::Io { .. }) => refused += 1,
            Err(e) => panic!("{n}: {e} after a flip at {at} of {}", file.display()),
            Ok((j, _)) => match j.scan(&[], &[0xff], usize::MAX) {
                Ok(all) => {
                    assert!(
                        all.into_iter().collect::<Model>() == want,
                        "{n}: wrong after a flip at {at} of {}",
                        file.display()
                    );
                    right += 1;
                }
                Err(_) => refused += 1,
            },
        }
    }
    println!("{refused} refused, {right} right");
    // Without a flip such a copy is accepted.
    let scratch = tempfile::tempdir().unwrap();
    snapshot(&dir, scratch.path());
    assert_eq!(dump(&open(scratch.path()).0), want);
    assert!(refused > 0);
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
    }
    j.poison("the test meddled with sled");
}
