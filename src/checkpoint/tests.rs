//! Tests of writing and reading staged checkpoints.

use std::collections::BTreeMap;

use super::*;

type Table = BTreeMap<Vec<u8>, Vec<u8>>;

fn scan(table: &Table) -> impl Fn(&[u8], &[u8], usize) -> Batch<String> + '_ {
    |start, end, limit| {
        let range = table.range(start.to_vec()..end.to_vec()).take(limit);
        Ok(range.map(|(k, v)| (k.clone().into(), v.clone().into())).collect())
    }
}

fn begin() -> Begin {
    Begin {
        volume: VolumeId::from_random([4; 16]),
        lsn: Lsn(10),
        replay_from: SegmentNo(3),
        previous: SegmentHash([1; 32]),
    }
}

fn end() -> End {
    End { lsn: Lsn(12), number: SegmentNo(5), epoch: Epoch(1), commit_lsn: Lsn(20), created_at: 7 }
}

fn table(n: u32, len: usize) -> Table {
    let mut t: Table = (0..n)
        .map(|i| {
            let mut k = vec![2];
            k.extend_from_slice(&u64::from(i).to_be_bytes());
            (k, blake3::hash(&i.to_le_bytes()).as_bytes().iter().copied().cycle().take(len).collect())
        })
        .collect();
    t.insert(vec![0x81, 1], vec![1]);
    t
}

#[test]
fn a_checkpoint_holds_the_replicated_tables() {
    let staging = tempfile::tempdir().unwrap();
    for (n, len) in [(0, 0), (1, 3), (10_000, 1000)] {
        let t = table(n, len);
        let temp = staging.path().join("new");
        fs::create_dir_all(temp.join("left over")).unwrap();
        let dump = dump(&scan(&t), begin(), &temp).unwrap();
        assert_eq!(dump.is_empty(), n == 0);
        let Finished { path, manifest, hash } = dump.finish(end(), staging.path()).unwrap();
        assert_eq!(hash, ManifestHash::of(&fs::read(path.join(MANIFEST)).unwrap()));
        assert!(!temp.exists());
        assert_eq!(manifest.entries, u64::from(n));
        assert_eq!(manifest.parts.len(), if n == 10_000 { 2 } else { n as usize });
        assert_eq!(read_manifest(&path, SegmentNo(5), Epoch(1)).unwrap(), manifest);
        let mut got = Table::new();
        read(&path, &manifest, &mut |part| {
            got.extend(part.to_vec().unwrap().iter().map(|(k, v)| (k.to_vec(), v.to_vec())));
            Ok(())
        })
        .unwrap();
        let mut expected = t;
        expected.retain(|k, _| k[0] < 0x80);
        assert!(got == expected);
        let listed = staged(staging.path()).unwrap();
        assert_eq!(listed.len(), 1);
        assert_eq!(listed[0].0, manifest);
        let objects = objects(&manifest, &path);
        assert_eq!(listed[0].2, objects.iter().map(|(_, f)| fs::metadata(f).unwrap().len()).sum::<u64>());
        assert_eq!(objects.last().unwrap().0, "checkpoints/0000000000000005-00000001/manifest");
        fs::remove_dir_all(path).unwrap();
    }
}

#[test]
fn leftovers_and_halves_are_removed_and_a_second_finish_is_harmless() {
    let staging = tempfile::tempdir().unwrap();
    let t = table(5, 5);
    let make = |name: &str| dump(&scan(&t), begin(), &staging.path().join(name)).unwrap();
    let path = make("a").finish(end(), staging.path()).unwrap().path;
    let again = make("b").finish(end(), staging.path()).unwrap().path;
    assert_eq!(path, again);
    make("c");
    let half = staging.path().join("0000000000000009-00000001");
    fs::create_dir(&half).unwrap();
    fs::write(half.join("part-00000"), b"x").unwrap();
    fs::write(staging.path().join("file"), b"x").unwrap();
    assert_eq!(staged(staging.path()).unwrap().len(), 1);
    let left: Vec<_> = fs::read_dir(staging.path()).unwrap().map(|e| e.unwrap().path()).collect();
    assert_eq!(left, [path]);
}

#[test]
fn damage_and_a_failing_scan_are_errors() {
    let staging = tempfile::tempdir().unwrap();
    let t = table(5, 5);
    let Finished { path, manifest, .. } =
        dump(&scan(&t), begin(), &staging.path().join("new")).unwrap().finish(end(), staging.path()).unwrap();
    let part = path.join("part-00000");
    let mut bytes = fs::read(&part).unwrap();
    bytes[70] ^= 1;
    fs::write(&part, &bytes).unwrap();
    let error = read(&path, &manifest, &mut |_| Ok(())).unwrap_err();
    assert!(matches!(error, CheckpointError::Format(_)), "{error}");
    fs::remove_file(&part).unwrap();
    assert!(matches!(read(&path, &manifest, &mut |_| Ok(())), Err(CheckpointError::Io { .. })));
    let failing = |_: &[u8], _: &[u8], _: usize| Err::<Vec<(Bytes, Bytes)>, _>("poisoned");
    let error = dump(&failing, begin(), &staging.path().join("new")).unwrap_err();
    assert!(error.to_string().contains("poisoned"));
}
