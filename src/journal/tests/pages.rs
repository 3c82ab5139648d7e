//! Tests of how the tail's files are written: in whole pages, and the next one is made ahead.

use super::*;

fn put_bytes(j: &Journal, model: &mut Model, key: String, value: Vec<u8>) {
    let (key, value) = (Bytes::from(key), Bytes::from(value));
    model.insert(key.clone(), value.clone());
    let done = j.transact::<_, JournalError>(|tx| {
        tx.put(key, value);
        Ok(())
    });
    j.barrier(done.unwrap().1).unwrap();
}

#[test]
fn groups_are_written_in_whole_pages_and_read_back() {
    let seed = rand::random();
    println!("seed {seed}");
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let root = tempfile::tempdir().unwrap();
    let (dir, copy) = (root.path().join("j"), root.path().join("copy"));
    let writes = Arc::new(Mutex::new(Vec::new()));
    let w = Arc::clone(&writes);
    let probe = Faults(move |act: &Act<'_>| {
        if let Act::Write(_, at, bytes) = act
            && on_tail(act)
        {
            w.lock().push((*at, bytes.len() as u64));
        }
        None
    });
    let (j, _) = Journal::open_on(options(&dir), Disk::probed(Arc::new(probe))).unwrap();
    let mut model = Model::new();
    for n in 0..300 {
        // Groups that end just before, at and behind the end of a page, among others.
        let len = if rng.random() { rng.random_range(3900..4100) } else { rng.random_range(0..20_000) };
        let mut value = vec![0; len];
        rng.fill(&mut value[..]);
        put_bytes(&j, &mut model, format!("k{}", n % 50), value);
    }
    let writes = writes.lock().clone();
    assert!(writes.len() >= 600, "a group and its confirmation each: {}", writes.len());
    assert!(writes.iter().all(|(at, len)| at % 4096 == 0 && len % 4096 == 0 && *len > 0));
    {
        let _guard = j.shared.witness.lock();
        snapshot(&dir, &copy);
    }
    assert!(dump(&open(&copy).0) == model);
}

#[test]
fn the_next_file_is_made_ahead() {
    let dir = tempfile::tempdir().unwrap();
    let makers = Arc::new(Mutex::new(Vec::new()));
    let m = Arc::clone(&makers);
    let probe = Faults(move |act: &Act<'_>| {
        if let Act::Create(path, _) = act
            && path.parent().is_some_and(|folder| folder.ends_with("tail"))
        {
            m.lock().push(std::thread::current().name().unwrap_or_default().to_owned());
        }
        None
    });
    let (j, _) = Journal::open_on(options(dir.path()), Disk::probed(Arc::new(probe))).unwrap();
    let mut model = Model::new();
    for round in 0..2 {
        // More than an eighth of a file.
        (0..4).for_each(|n| put_bytes(&j, &mut model, format!("{round}-{n}"), vec![1; 10 << 10]));
        let until = Instant::now() + Duration::from_secs(60);
        // Its name is there before it is complete.
        let tail = &j.shared.tail;
        while tail.bytes() == tail.files().iter().map(|file| file.size).sum::<u64>() {
            assert!(Instant::now() < until, "no spare file");
            std::thread::sleep(Duration::from_millis(5));
        }
        let before = j.shared.tail.newest_seq();
        (4..16).for_each(|n| put_bytes(&j, &mut model, format!("{round}-{n}"), vec![1; 10 << 10]));
        assert_eq!(j.shared.tail.newest_seq(), before + 1);
    }
    let makers = makers.lock().clone();
    assert!(makers.len() >= 2 && makers[1..].iter().all(|name| name == "journal-flush"), "{makers:?}");
    assert!(dump(&j) == model);
}
