//! The attacks, each a small function that says what is put where.

use bytes::Bytes;
use mirrorfs::format::names::ObjectName;
use mirrorfs::format::record::Op;
use mirrorfs::format::tables::{FileKind, Inode, Time, dirent_key, inode_key, orphan_key, table, volume_key};
use mirrorfs::ids::{Epoch, Ino, SegmentNo, VolumeId};

use super::forge::{self, Changes, Known, Put, edited, evil_file, evil_tables, half, put};

/// What is attacked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    Volume,
    Claim,
    Release,
    Segment,
    Manifest,
    Part,
    Folder,
}

/// How a mount with an empty state may end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Empty {
    /// It shows the honest content.
    Right,
    /// It is refused, and names the hostile replica.
    Asks,
}

/// One attack.
pub struct Attack {
    pub kind: Kind,
    pub name: &'static str,
    pub make: fn(&Known) -> Changes,
    pub empty: Empty,
    /// Also done while the volume is mounted.
    pub live: bool,
    /// Why the program does not withstand it yet.
    pub open: Option<&'static str>,
}

impl Attack {
    const fn open(mut self, why: &'static str) -> Self {
        self.open = Some(why);
        self
    }

    const fn live(mut self) -> Self {
        self.live = true;
        self
    }
}

const fn right(kind: Kind, name: &'static str, make: fn(&Known) -> Changes) -> Attack {
    Attack { kind, name, make, empty: Empty::Right, live: false, open: None }
}

const fn asks(kind: Kind, name: &'static str, make: fn(&Known) -> Changes) -> Attack {
    Attack { kind, name, make, empty: Empty::Asks, live: false, open: None }
}

/// All of them.
pub const ATTACKS: &[Attack] = &[
    right(Kind::Volume, "volume.json of another volume", |k| {
        let mut volume = k.volume.clone();
        volume.volume = VolumeId::from_random([6; 16]);
        vec![put(ObjectName::Volume, volume.encode().unwrap())]
    }),
    right(Kind::Volume, "volume.json with another block size", |k| {
        let mut volume = k.volume.clone();
        volume.block_size = if volume.block_size == 65536 { 131_072 } else { 65536 };
        vec![put(ObjectName::Volume, volume.encode().unwrap())]
    })
    .live(),
    right(Kind::Volume, "volume.json of a newer format", |k| {
        let bytes = k.bytes(ObjectName::Volume);
        vec![put(ObjectName::Volume, edited(&bytes, "\"format_version\": 1", "\"format_version\": 2"))]
    }),
    right(Kind::Volume, "volume.json of 3 GiB", |_| vec![length(ObjectName::Volume, 3 << 30)]).live(),
    right(Kind::Volume, "volume.json cut short", |k| {
        vec![put(ObjectName::Volume, half(&k.bytes(ObjectName::Volume)))]
    }),
    right(Kind::Volume, "a claim in the place of volume.json", |k| {
        vec![put(ObjectName::Volume, k.bytes(ObjectName::Claim(k.epoch())))]
    }),
    right(Kind::Volume, "a pipe in the place of volume.json", |_| vec![fifo(ObjectName::Volume)]),
    right(Kind::Claim, "claim of the highest epoch", |k| vec![claim(k, Epoch(u32::MAX), 1, forge::HOST)])
        .live(),
    asks(Kind::Claim, "claim of the next epoch from the first segment", |k| {
        k.tenure(k.next_epoch(), 1, k.last_number().0)
    })
    .live(),
    asks(Kind::Claim, "claim of the next epoch after the last segment", |k| {
        k.tenure(k.next_epoch(), k.last_number().0 + 1, k.last_number().0)
    })
    .live(),
    asks(Kind::Claim, "forty claims one after the other", |k| {
        (1..=40).map(|i| claim(k, Epoch(k.epoch().0 + i), 1, forge::HOST)).collect()
    }),
    // Two of three hold the true one, and that it has ended.
    right(Kind::Claim, "claim of another writer in the place of the newest", |k| {
        k.tenure(k.epoch(), k.claim.first_segment.0, k.last_number().0)
    }),
    right(Kind::Claim, "claim of 12 GiB", |k| vec![length(ObjectName::Claim(k.next_epoch()), 12 << 30)])
        .live(),
    right(Kind::Claim, "newest claim cut short", |k| {
        let name = ObjectName::Claim(k.epoch());
        vec![put(name, half(&k.bytes(name)))]
    }),
    right(Kind::Claim, "old claim under a new name", |k| {
        vec![put(ObjectName::Claim(k.next_epoch()), k.bytes(ObjectName::Claim(k.epoch())))]
    }),
    right(Kind::Claim, "old claim in the place of the newest", |k| {
        vec![put(ObjectName::Claim(k.epoch()), k.bytes(ObjectName::Claim(Epoch(1))))]
    }),
    right(Kind::Claim, "all claims and marks removed", |k| {
        let mine = k.objects.keys().filter(|name| name.starts_with("epochs/"));
        mine.map(|name| (name.clone(), Put::Nothing)).collect()
    }),
    asks(Kind::Claim, "claim whose host paints on the terminal", |k| {
        let mut changes = k.tenure(k.next_epoch(), k.last_number().0 + 1, k.last_number().0);
        changes[0] = claim(k, k.next_epoch(), k.last_number().0 + 1, "\u{1b}[2Jevil\r\n\u{9b}31m");
        changes
    })
    .live(),
    right(Kind::Release, "mark of the end with a later last segment", |k| {
        let release = k.end_of(&k.claim, u64::MAX);
        vec![put(ObjectName::Release(k.epoch()), release.encode().unwrap())]
    }),
    right(Kind::Release, "mark of the end with an earlier last segment", |k| {
        let release = k.end_of(&k.claim, 1);
        vec![put(ObjectName::Release(k.epoch()), release.encode().unwrap())]
    }),
    right(Kind::Release, "mark of the end for another claim", |k| {
        let mut release = k.end_of(&k.claim, k.last_number().0);
        release.claim_id = forge::ID;
        vec![put(ObjectName::Release(k.epoch()), release.encode().unwrap())]
    }),
    right(Kind::Release, "mark of the end of 5 GiB", |k| {
        vec![length(ObjectName::Release(k.epoch()), 5 << 30)]
    }),
    right(Kind::Release, "old mark under the next name", |k| {
        vec![put(ObjectName::Release(k.next_epoch()), k.bytes(ObjectName::Release(k.epoch())))]
    }),
    right(Kind::Release, "mark of the end cut short", |k| {
        let name = ObjectName::Release(k.epoch());
        vec![put(name, half(&k.bytes(name)))]
    }),
    right(Kind::Segment, "forged content of the last segment", |k| last(k, evil_file())).live(),
    right(Kind::Segment, "forged content of a segment in the middle", |k| {
        let name = k.segments[k.segments.len() - 3];
        vec![put(name, k.instead_of(name, evil_file()))]
    })
    .live(),
    right(Kind::Segment, "forged content of the first segment", |k| {
        vec![put(k.segments[0], k.instead_of(k.segments[0], evil_file()))]
    }),
    right(Kind::Segment, "a forged segment after the last one", |k| vec![appended(k, k.epoch())]).live(),
    asks(Kind::Segment, "a forged branch with claim and mark", |k| {
        let next = k.last_number().0 + 1;
        let mut changes = k.tenure(k.next_epoch(), next, next);
        changes.push(appended(k, k.next_epoch()));
        changes
    })
    .live(),
    right(Kind::Segment, "last segment cut short", |k| vec![put(k.last(), half(&k.bytes(k.last())))]),
    right(Kind::Segment, "two segments exchanged", |k| {
        let (a, b) = (k.segments[1], k.segments[2]);
        vec![put(a, k.bytes(b)), put(b, k.bytes(a))]
    }),
    right(Kind::Segment, "old segment under a new number", |k| {
        let name = ObjectName::Segment(k.last_number().next(), k.epoch());
        vec![put(name, k.bytes(k.segments[0]))]
    }),
    right(Kind::Segment, "last segment again under the next epoch", |k| {
        vec![put(ObjectName::Segment(k.last_number(), k.next_epoch()), k.bytes(k.last()))]
    }),
    right(Kind::Segment, "segment of 300 GiB in the place of the last", |k| {
        vec![length(k.last(), 300 << 30)]
    }),
    right(Kind::Segment, "segment of 300 GiB after the last", |k| {
        vec![length(ObjectName::Segment(k.last_number().next(), k.epoch()), 300 << 30)]
    })
    .live(),
    right(Kind::Segment, "rubbish after the last", |k| {
        vec![put(ObjectName::Segment(k.last_number().next(), k.epoch()), b"rubbish".to_vec())]
    })
    .live(),
    right(Kind::Segment, "segment of a newer format after the last", |k| {
        let mut bytes = k.bytes(k.last());
        let end = bytes.len();
        (bytes[end - 8], bytes[end - 320]) = (2, 2);
        vec![put(ObjectName::Segment(k.last_number().next(), k.epoch()), bytes)]
    }),
    right(Kind::Segment, "small segment of 30 million empty keys", |k| {
        vec![put(k.last(), forge::bomb(&k.footer(k.last()), b"", 30_000_000))]
    }),
    right(Kind::Segment, "small segments of 12 million keys", |k| {
        let names = k.segments.iter().rev().take(3);
        names.map(|name| put(*name, forge::bomb(&k.footer(*name), b"\x02\x01", 12_000_000))).collect()
    }),
    right(Kind::Segment, "directories in a circle", |k| {
        last(
            k,
            vec![
                Op::put(inode_key(Ino(5000)), forge::directory(5001)),
                Op::put(inode_key(Ino(5001)), forge::directory(5000)),
                Op::put(dirent_key(Ino(5000), b"in"), forge::entry(Ino(5001), FileKind::Directory)),
                Op::put(dirent_key(Ino(5001), b"out"), forge::entry(Ino(5000), FileKind::Directory)),
                Op::put(dirent_key(Ino::ROOT, b"round"), forge::entry(Ino(5000), FileKind::Directory)),
            ],
        )
    }),
    right(Kind::Segment, "counters at the end of numbers", |k| {
        let end = Bytes::copy_from_slice(&u64::MAX.to_le_bytes());
        let names = ["next_ino", "next_block"];
        last(k, names.map(|name| Op::put(volume_key(name), end.clone())).to_vec())
    }),
    right(Kind::Segment, "root marked as deleted", |k| {
        last(k, vec![Op::put(orphan_key(Ino::ROOT), Bytes::new())])
    }),
    right(Kind::Segment, "root that is a file", |k| {
        let file = Inode::new(FileKind::Regular, 0o644, (0, 0), Time::default());
        last(k, vec![Op::put(inode_key(Ino::ROOT), file.encode())])
    }),
    right(Kind::Segment, "a file and a device under one name", |k| {
        let mut device = Inode::new(FileKind::CharDevice, 0o666, (0, 0), Time::default());
        device.rdev = 0x0103;
        let mut second = dirent_key(Ino::ROOT, forge::FILE.as_bytes()).to_vec();
        second[9..17].copy_from_slice(&(u64::MAX >> 1).to_be_bytes());
        let mut ops = evil_file();
        ops.push(Op::put(inode_key(Ino(1_000_000 - 1)), device.encode()));
        ops.push(Op::put(second, forge::entry(Ino(1_000_000 - 1), FileKind::CharDevice)));
        last(k, ops)
    }),
    right(Kind::Segment, "keys of unknown and of local tables", |k| {
        let keys = [vec![0x7e, 1], vec![table::LOCAL, b's'], vec![table::SEGMENT, 0, 0, 0, 0, 0, 0, 0, 1]];
        last(k, keys.map(|key| Op::put(key, &b"x"[..])).to_vec())
    }),
    right(Kind::Segment, "a pipe in the place of a segment", |k| vec![fifo(k.segments[1])]).live(),
    right(Kind::Manifest, "forged checkpoint as of the last segment", |k| {
        k.checkpoint_of(k.last_number(), &evil_tables())
    })
    .live(),
    right(Kind::Manifest, "forged checkpoint far ahead", |k| {
        k.checkpoint_of(SegmentNo(1 << 40), &evil_tables())
    })
    .live(),
    right(Kind::Manifest, "forged checkpoint in the place of the true one", |k| {
        k.checkpoint_of(k.checkpoint.0, &evil_tables())
    })
    .live(),
    right(Kind::Manifest, "forged checkpoint that the forged last segment names", |k| {
        let number = SegmentNo(k.last_number().0 - 1);
        let mut changes = k.checkpoint_of(number, &evil_tables());
        let Put::Bytes(manifest) = &changes[1].1 else { unreachable!() };
        let mut ops = evil_file();
        ops.push(forge::naming(number, k.epoch(), manifest));
        changes.extend(last(k, ops));
        changes
    }),
    right(Kind::Manifest, "manifest cut short", |k| {
        let (name, _) = k.manifest();
        vec![put(name, half(&k.bytes(name)))]
    }),
    right(Kind::Manifest, "manifest of 3 GiB", |k| vec![length(k.manifest().0, 3 << 30)]).live(),
    right(Kind::Manifest, "true checkpoint under another number", |k| {
        let number = k.checkpoint.0.next();
        let (name, _) = k.manifest();
        vec![
            put(ObjectName::CheckpointPart(number, k.epoch(), 0), k.bytes(k.part())),
            put(ObjectName::CheckpointManifest(number, k.epoch()), k.bytes(name)),
        ]
    }),
    right(Kind::Manifest, "manifest removed", |k| vec![(k.manifest().0.path(), Put::Nothing)]),
    right(Kind::Part, "forged part under the true manifest", |k| {
        let Put::Bytes(part) = k.checkpoint_of(k.checkpoint.0, &evil_tables()).remove(0).1 else {
            unreachable!()
        };
        vec![put(k.part(), part)]
    })
    .live(),
    right(Kind::Part, "part cut short", |k| vec![put(k.part(), half(&k.bytes(k.part())))]),
    right(Kind::Part, "part of 2 GiB", |k| vec![length(k.part(), 2 << 30)]).live(),
    right(Kind::Part, "small part of 4 million entries", |k| forge::part_bomb(k, 4_000_000)),
    right(Kind::Part, "segment in the place of a part", |k| vec![put(k.part(), k.bytes(k.segments[0]))]),
    right(Kind::Part, "a pipe in the place of a part", |k| vec![fifo(k.part())]),
    right(Kind::Folder, "segments behind a symbolic link", |_| vec![("segments".into(), Put::Outside)]),
    right(Kind::Folder, "a segment behind a symbolic link", |k| vec![(k.last().path(), Put::Outside)]),
    right(Kind::Folder, "a folder in the place of a segment", |k| vec![(k.last().path(), Put::Folder)])
        .open("a scrub waits twice for 30 s for the shipper, which cannot put a file there"),
    right(Kind::Folder, "ten thousand names that mean nothing", |k| {
        let junk = |i| vec![(format!("epochs/{i}.json~"), Put::Bytes(Vec::new())), appended_junk(k, i)];
        (0..5000).flat_map(junk).collect()
    }),
];

fn length(name: ObjectName, bytes: u64) -> (String, Put) {
    (name.path(), Put::Length(bytes))
}

fn fifo(name: ObjectName) -> (String, Put) {
    (name.path(), Put::Fifo)
}

fn claim(known: &Known, epoch: Epoch, first: u64, host: &str) -> (String, Put) {
    let mut claim = known.rival(epoch, first);
    claim.host = host.into();
    put(ObjectName::Claim(epoch), claim.encode().unwrap())
}

/// These operations in the place of the last segment's.
fn last(known: &Known, ops: Vec<Op>) -> Changes {
    vec![put(known.last(), known.instead_of(known.last(), ops))]
}

fn appended(known: &Known, epoch: Epoch) -> (String, Put) {
    let (header, lsn) = known.after_last(epoch);
    put(ObjectName::Segment(header.number, epoch), forge::segment(header, lsn, evil_file()))
}

fn appended_junk(known: &Known, i: u64) -> (String, Put) {
    (format!("segments/00000000/{:016X}-{:08x}.seg", 1 << 40 | i, known.epoch().0), Put::Bytes(Vec::new()))
}
