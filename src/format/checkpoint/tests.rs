//! Tests of checkpoints: round trips, damage, and the rule for dumps taken while changes go on.

use std::collections::BTreeMap;

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::*;
use crate::format::record::{Op, Record};

fn volume() -> VolumeId {
    VolumeId::from_random([5; 16])
}

fn key(n: u32) -> Vec<u8> {
    let mut k = vec![2];
    k.extend_from_slice(&u64::from(n).to_be_bytes());
    k
}

fn manifest(parts: Vec<PartInfo>) -> Manifest {
    Manifest {
        volume: volume(),
        number: SegmentNo(9),
        epoch: Epoch(2),
        commit_lsn: Lsn(80),
        lsn_begin: Lsn(50),
        lsn_end: Lsn(70),
        replay_from: SegmentNo(6),
        previous: SegmentHash([8; 32]),
        created_at: 1_790_000_000,
        entries: parts.iter().map(|p| p.entries).sum(),
        raw_bytes: 107_777,
        parts,
    }
}

fn part(index: u32, keys: std::ops::Range<u32>, len: usize) -> (Bytes, PartInfo) {
    let mut b = PartBuilder::new(volume(), Lsn(50));
    for k in keys {
        b.push(&key(k), &vec![k as u8; len]).unwrap();
    }
    let (bytes, info) = b.finish(index).unwrap();
    (bytes.into(), info)
}

fn damaged(bytes: &Bytes, damage: impl FnOnce(&mut Vec<u8>)) -> Bytes {
    let mut bad = bytes.to_vec();
    damage(&mut bad);
    bad.into()
}

#[test]
fn parts_and_manifest_round_trip() {
    let (a, ia) = part(0, 0..2, 3);
    let (b, ib) = part(1, 2..900, 100);
    let (c, ic) = part(2, 0..0, 0);
    assert_eq!(a[10], Codec::Raw as u8);
    assert_eq!(b[10], Codec::Zstd as u8);
    let m = manifest(vec![ia, ib, ic]);
    let bytes = m.encode().unwrap();
    assert_eq!(Manifest::decode(&bytes, SegmentNo(9), Epoch(2)), Ok(m.clone()));
    assert!(Manifest::decode(&bytes, SegmentNo(9), Epoch(1)).is_err());
    assert_eq!(parse_part(&a, &m, 0).unwrap().entries, 2);
    let got = parse_part(&b, &m, 1).unwrap();
    let entries = got.to_vec().unwrap();
    assert_eq!((entries.len(), got.entries, got.raw_bytes), (898, 898, 898 * 109));
    assert_eq!((&entries[0].0[..], &entries[0].1[..]), (&key(2)[..], &[2u8; 100][..]));
    assert_eq!(got.ends, Some((key(2).into(), key(899).into())));
    let empty = parse_part(&c, &m, 2).unwrap();
    assert!(empty.to_vec().unwrap().is_empty() && empty.ends.is_none());
    for (bytes, index) in [(&a, 1), (&b, 0), (&a, 3)] {
        assert!(parse_part(bytes, &m, index).is_err());
    }
}

#[test]
fn every_damage_is_refused() {
    for (bytes, _) in [part(0, 0..2, 3), part(0, 0..100, 40)] {
        for cut in 0..bytes.len() {
            assert!(verify_part(&bytes[..cut]).is_err(), "cut at {cut}");
        }
        for bit in 0..bytes.len() * 8 {
            let bad = damaged(&bytes, |b| b[bit / 8] ^= 1 << (bit % 8));
            assert!(verify_part(&bad).is_err(), "bit {bit}");
        }
    }
    let bytes = manifest(vec![part(0, 0..2, 3).1]).encode().unwrap();
    for bit in 0..bytes.len() * 8 {
        let mut bad = bytes.clone();
        bad[bit / 8] ^= 1 << (bit % 8);
        assert!(Manifest::decode(&bad, SegmentNo(9), Epoch(2)).is_err(), "bit {bit}");
    }
}

/// Makes the hash right again.
fn seal(bytes: &mut [u8]) {
    let at = bytes.len() - HASH_LEN;
    let hash = *blake3::hash(&bytes[..at]).as_bytes();
    bytes[at..].copy_from_slice(&hash);
}

#[test]
fn a_part_cannot_unpack_to_more_than_its_bytes_are_worth() {
    // What a writer would compress most: many short entries, and long values of zeros.
    for (keys, len) in [(0..200_000u32, 0), (0..120, MAX_VALUE)] {
        let (bytes, _) = part(0, keys.clone(), len);
        let part = verify_part(&bytes).unwrap();
        assert_eq!(part.entries as usize, keys.len());
        let zstd = bytes[10] == Codec::Zstd as u8;
        let stored = bytes.len() as u64 - 96;
        assert!(!zstd || is_plausible(stored, part.raw_len, keys.len() as u64));
    }
    // The same by one who does not keep to that.
    let forge = |raw: &[u8], entries: u32| {
        let stored = zstd::bulk::compress(raw, 19).unwrap();
        let (good, _) = part(0, 0..1, 0);
        let mut bytes = good[..40].to_vec();
        bytes[10] = Codec::Zstd as u8;
        for n in [entries, raw.len() as u32, stored.len() as u32] {
            bytes.extend_from_slice(&n.to_le_bytes());
        }
        bytes.resize(HEADER_LEN, 0);
        bytes.extend_from_slice(&stored);
        bytes.resize(bytes.len() + HASH_LEN, 0);
        seal(&mut bytes);
        Bytes::from(bytes)
    };
    assert!(verify_part(&forge(&[0; MAX_PART_RAW], MAX_PART_RAW as u32 / 2)).is_err());
    assert!(verify_part(&forge(&[0; MAX_PART_RAW], u32::MAX)).is_err());
    assert!(verify_part(&forge(&[0; 64], 32)).is_err(), "empty keys");
    let mut one = Vec::new();
    put_blob(&mut one, &key(7));
    put_blob(&mut one, b"value");
    assert_eq!(verify_part(&forge(&one, 1)).unwrap().to_vec().unwrap().len(), 1);
    assert!(verify_part(&forge(&[&one[..], &[0]].concat(), 1)).is_err(), "more than the entries");
    one[1] = 0x0a;
    assert!(verify_part(&forge(&one, 1)).is_err(), "an unknown table");
}

#[test]
fn forged_headers_never_panic() {
    let mut rng = ChaCha8Rng::seed_from_u64(3);
    let (bytes, _) = part(0, 0..100, 40);
    let mut newer = 0;
    for _ in 0..20_000 {
        let bad = damaged(&bytes, |bad| {
            for _ in 0..rng.random_range(1..3) {
                let at = rng.random_range(8..bad.len() - 32);
                bad[at] = rng.random();
            }
            seal(bad);
        });
        match verify_part(&bad) {
            Ok(part) => assert!(part.entries <= 100),
            Err(e) => newer += u32::from(e.newer),
        }
    }
    assert!(newer > 0);
}

#[test]
fn builders_and_manifests_refuse_nonsense() {
    let mut b = PartBuilder::new(volume(), Lsn(1));
    assert!(b.is_empty() && !b.is_full());
    assert!(b.push(&[0x81, 1], b"").is_err());
    assert!(b.push(b"", b"").is_err());
    b.push(&key(1), b"").unwrap();
    assert!(b.push(&key(1), b"").is_err());
    assert!(b.push(&key(2), &vec![0; MAX_VALUE + 1]).is_err());
    for n in 2..=PART_TARGET / MAX_VALUE + 2 {
        b.push(&key(n as u32), &vec![0; MAX_VALUE]).unwrap();
    }
    assert!(b.is_full());
    let good = Manifest { raw_bytes: 0, ..manifest(vec![]) };
    assert!(good.encode().is_ok());
    for bad in [
        Manifest { lsn_begin: Lsn(71), ..good.clone() },
        Manifest { lsn_end: Lsn(81), ..good.clone() },
        Manifest { replay_from: SegmentNo(11), ..good.clone() },
        Manifest { replay_from: SegmentNo(10), ..good.clone() },
        Manifest { replay_from: SegmentNo(0), ..good.clone() },
        Manifest { entries: 1, ..good.clone() },
        Manifest { raw_bytes: 1, ..good.clone() },
        manifest(vec![PartInfo { len: MAX_PART_LEN + 1, blake3: [0; 32], entries: 1 }]),
        manifest(vec![PartInfo { len: 95, blake3: [0; 32], entries: 1 }]),
        manifest(vec![PartInfo { len: 100, blake3: [0; 32], entries: 1 << 32 }]),
    ] {
        assert!(bad.encode().is_err(), "{bad:?}");
    }
    let still = Manifest { replay_from: SegmentNo(10), lsn_begin: Lsn(70), ..good };
    assert!(still.encode().is_ok());
}

type Table = BTreeMap<Vec<u8>, Vec<u8>>;

fn apply(table: &mut Table, ops: &[Op]) {
    for op in ops {
        match op {
            Op::Put { key, value } => table.insert(key.to_vec(), value.to_vec()),
            Op::Delete { key } => table.remove(&key[..]),
        };
    }
}

/// A random model of the daemon: records change a few keys; cuts fix a commit; block entries of a cut enter the tables
/// only later, when its group is sealed; a scan reads a few keys at a time in between.
#[test]
fn a_dump_taken_while_changes_go_on_loads_exactly() {
    let seed: u64 = rand::random();
    println!("seed {seed}");
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut usable = 0;
    let mut wrong = [0; 2];
    for _ in 0..3_000 {
        let Some(run) = fuzzy_run(&mut rng) else { continue };
        usable += 1;
        for upto in run.number..run.sealed.len() {
            assert!(run.exact(run.replay_from, upto), "usable from {} to {upto}", run.number);
        }
        // The rules are not idle: replaying from one group later, or stopping one earlier, may give a wrong state.
        wrong[0] += u32::from(!run.exact(run.replay_from + 1, run.number));
        wrong[1] += u32::from(run.number > 0 && !run.exact(run.replay_from, run.number - 1));
    }
    assert!(usable > 300, "{usable} runs");
    assert!(wrong.iter().all(|n| *n > 0), "{wrong:?}");
}

struct Run {
    seen: Table,
    replay_from: usize,
    number: usize,
    sealed: Vec<(Group, Table)>,
}

impl Run {
    fn exact(&self, from: usize, upto: usize) -> bool {
        let mut table = self.seen.clone();
        for (group, _) in self.sealed.iter().take(upto + 1).skip(from) {
            apply(&mut table, &group.index);
            for record in &group.records {
                apply(&mut table, &record.ops);
            }
        }
        table == self.sealed[upto].1
    }
}

struct Group {
    commit: u64,
    index: Vec<Op>,
    records: Vec<Record>,
}

fn fuzzy_run(rng: &mut ChaCha8Rng) -> Option<Run> {
    let mut live = Table::new();
    let mut lsn = 0;
    let mut next_block = 1u32;
    let mut open: (Vec<Op>, Vec<Record>) = Default::default();
    let mut cut: Option<Group> = None; // cut, not yet sealed: at most one
    let mut sealed: Vec<(Group, Table)> = Vec::new(); // with the state at its commit
    let mut states: BTreeMap<u64, Table> = BTreeMap::new();
    let mut scan: Option<(usize, Vec<u8>, Table)> = None; // groups sealed at its begin, position, seen
    let mut done: Option<(u64, usize, Table)> = None;
    let scan_at = rng.random_range(0..60);
    for step in 0..300 {
        match rng.random_range(0..12) {
            0..7 => {
                lsn += 1;
                let ops: Vec<_> = (0..rng.random_range(1..4))
                    .map(|_| {
                        let k = key(rng.random_range(0..12));
                        if rng.random_ratio(1, 3) { Op::delete(k) } else { Op::put(k, vec![rng.random()]) }
                    })
                    .collect();
                apply(&mut live, &ops);
                open.1.push(Record { lsn: Lsn(lsn), ops });
                if rng.random_ratio(1, 3) {
                    // A block of this group: its entry enters the tables at sealing.
                    let mut k = vec![6];
                    k.extend_from_slice(&next_block.to_be_bytes());
                    next_block += 1;
                    open.0.push(Op::put(k, vec![rng.random()]));
                }
            }
            7..9 if cut.is_none() && lsn > 0 => {
                let (index, records) = std::mem::take(&mut open);
                // The state a restore must give: all index entries of sealed groups and of this one, all records.
                let mut state = live.clone();
                apply(&mut state, &index);
                states.insert(lsn, state);
                cut = Some(Group { commit: lsn, index, records });
            }
            9 => {
                if let Some(group) = cut.take() {
                    lsn += 1; // the sealer's own batch; not shipped, as all of it is in the index
                    apply(&mut live, &group.index);
                    let state = states.remove(&group.commit).unwrap();
                    sealed.push((group, state));
                }
            }
            _ => {}
        }
        if step == scan_at {
            scan = Some((sealed.len(), Vec::new(), Table::new()));
        }
        if let Some((groups, position, seen)) = scan.as_mut().filter(|_| rng.random_ratio(1, 4)) {
            let found: Vec<_> =
                live.range(position.clone()..).take(2).map(|(k, v)| (k.clone(), v.clone())).collect();
            if let Some((last, _)) = found.last() {
                *position = last.iter().copied().chain([0]).collect();
                seen.extend(found);
            } else {
                done = Some((lsn, *groups, std::mem::take(seen)));
                scan = None;
            }
        }
    }
    let (lsn_end, replay_from, seen) = done?;
    let number = sealed.iter().position(|(g, _)| g.commit >= lsn_end)?;
    Some(Run { seen, replay_from, number, sealed })
}
