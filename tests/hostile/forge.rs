//! What an attacker can make who knows the format: pure functions on the objects of one replica.

use std::collections::BTreeMap;
use std::io::Write as _;
use std::path::PathBuf;

use bytes::Bytes;
use mirrorfs::format::checkpoint::{Manifest, PartBuilder};
use mirrorfs::format::names::ObjectName;
use mirrorfs::format::record::{Op, Record};
use mirrorfs::format::segment::{
    FOOTER_LEN, Footer, HEADER_LEN, SegmentBuilder, SegmentHeader, parse_footer, reseal,
};
use mirrorfs::format::tables::{
    Body, Dirent, FileKind, Inode, Time, checkpoint_key, dirent_key, inode_key, volume_key,
};
use mirrorfs::format::volume::{Claim, Release, Volume};
use mirrorfs::ids::{Epoch, Ino, Lsn, SegmentNo};

/// The host that forged claims name.
pub const HOST: &str = "evil";
/// The id that forged claims have.
pub const ID: [u8; 16] = [0xee; 16];
/// The file that forged tables have in the root.
pub const FILE: &str = "evil";

/// What the attacker puts under a name.
#[derive(Clone, Debug)]
pub enum Put {
    /// These bytes.
    Bytes(Vec<u8>),
    /// A file of this length with nothing in it.
    Length(u64),
    /// A pipe, which blocks a reader.
    Fifo,
    /// A symbolic link to a copy of the named file or folder, outside of the replica.
    Outside,
    /// A folder.
    Folder,
    /// Nothing: the object is removed.
    Nothing,
}

/// Names, and what is put there.
pub type Changes = Vec<(String, Put)>;

/// One change that puts bytes under a name.
pub fn put(name: ObjectName, bytes: Vec<u8>) -> (String, Put) {
    (name.path(), Put::Bytes(bytes))
}

/// The objects of an honest replica, and what they say.
pub struct Known {
    /// All objects by name.
    pub objects: BTreeMap<String, Vec<u8>>,
    /// `volume.json`.
    pub volume: Volume,
    /// The newest claim.
    pub claim: Claim,
    /// Name of each segment; the first is number 1.
    pub segments: Vec<ObjectName>,
    /// Number and epoch of the only checkpoint.
    pub checkpoint: (SegmentNo, Epoch),
}

impl Known {
    /// Reads them.
    pub fn new(found: &BTreeMap<PathBuf, Vec<u8>>) -> Self {
        let objects: BTreeMap<String, Vec<u8>> =
            found.iter().map(|(path, bytes)| (path.to_str().unwrap().to_owned(), bytes.clone())).collect();
        let names: Vec<_> = objects.keys().map(|name| ObjectName::parse(name).unwrap()).collect();
        let epoch = names.iter().filter_map(|n| if let ObjectName::Claim(e) = n { Some(*e) } else { None });
        let epoch = epoch.max().unwrap();
        let claim = Claim::decode(&objects[&ObjectName::Claim(epoch).path()], epoch).unwrap();
        let mut segments: Vec<_> =
            names.iter().filter(|n| matches!(n, ObjectName::Segment(..))).copied().collect();
        segments.sort();
        let checkpoint = names.iter().find_map(|n| match n {
            ObjectName::CheckpointManifest(number, epoch) => Some((*number, *epoch)),
            _ => None,
        });
        let volume = Volume::decode(&objects["volume.json"]).unwrap();
        Self { volume, claim, segments, checkpoint: checkpoint.unwrap(), objects }
    }

    /// The bytes of an object.
    pub fn bytes(&self, name: ObjectName) -> Vec<u8> {
        self.objects[&name.path()].clone()
    }

    /// The newest epoch.
    pub fn epoch(&self) -> Epoch {
        self.claim.epoch
    }

    /// The epoch after the newest one.
    pub fn next_epoch(&self) -> Epoch {
        Epoch(self.epoch().0 + 1)
    }

    /// The newest segment.
    pub fn last(&self) -> ObjectName {
        *self.segments.last().unwrap()
    }

    /// The number of the newest segment.
    pub fn last_number(&self) -> SegmentNo {
        SegmentNo(self.segments.len() as u64)
    }

    /// What a segment's footer says.
    pub fn footer(&self, name: ObjectName) -> Footer {
        let bytes = &self.objects[&name.path()];
        parse_footer(bytes, bytes.len() as u64).unwrap()
    }

    /// The checkpoint's manifest, and its name.
    pub fn manifest(&self) -> (ObjectName, Manifest) {
        let (number, epoch) = self.checkpoint;
        let name = ObjectName::CheckpointManifest(number, epoch);
        (name, Manifest::decode(&self.objects[&name.path()], number, epoch).unwrap())
    }

    /// The first part of the checkpoint.
    pub fn part(&self) -> ObjectName {
        ObjectName::CheckpointPart(self.checkpoint.0, self.checkpoint.1, 0)
    }

    /// A claim of another writer.
    pub fn rival(&self, epoch: Epoch, first: u64) -> Claim {
        Claim {
            epoch,
            claim_id: ID,
            host: HOST.into(),
            pid: 666,
            claimed_at: self.claim.claimed_at + 1,
            first_segment: SegmentNo(first),
            ..self.claim.clone()
        }
    }

    /// The mark that a writer ended in good order after segment `last`.
    pub fn end_of(&self, claim: &Claim, last: u64) -> Release {
        Release {
            volume: claim.volume,
            epoch: claim.epoch,
            claim_id: claim.claim_id,
            released_at: claim.claimed_at + 1,
            last_segment: SegmentNo(last),
        }
    }

    /// A claim of another writer, and its end.
    pub fn tenure(&self, epoch: Epoch, first: u64, last: u64) -> Changes {
        let claim = self.rival(epoch, first);
        let release = self.end_of(&claim, last);
        vec![
            put(ObjectName::Claim(epoch), claim.encode().unwrap()),
            put(ObjectName::Release(epoch), release.encode().unwrap()),
        ]
    }

    /// A whole segment with these operations in place of an honest one, with the same
    /// predecessor and the same commit.
    pub fn instead_of(&self, name: ObjectName, ops: Vec<Op>) -> Vec<u8> {
        let footer = self.footer(name);
        segment(footer.header, footer.commit.unwrap(), ops)
    }

    /// Header and LSN of a segment after the newest one.
    pub fn after_last(&self, epoch: Epoch) -> (SegmentHeader, Lsn) {
        let footer = self.footer(self.last());
        let number = footer.header.number.next();
        let header =
            SegmentHeader { number, epoch, txg_first: number, previous: footer.hash, ..footer.header };
        (header, footer.commit.unwrap().next())
    }

    /// A checkpoint of these tables as of segment `number`, whole by itself: its objects.
    pub fn checkpoint_of(&self, number: SegmentNo, tables: &BTreeMap<Bytes, Bytes>) -> Changes {
        let footer = self.footer(self.last());
        let epoch = if number == self.checkpoint.0 { self.checkpoint.1 } else { self.epoch() };
        let lsn = footer.commit.unwrap();
        let mut builder = PartBuilder::new(self.volume.volume, lsn);
        for (key, value) in tables {
            builder.push(key, value).unwrap();
        }
        let (part, info) = builder.finish(0).unwrap();
        let manifest = Manifest {
            volume: self.volume.volume,
            number,
            epoch,
            commit_lsn: lsn,
            lsn_begin: lsn,
            lsn_end: lsn,
            replay_from: number.next(),
            previous: footer.hash,
            created_at: 1,
            entries: tables.len() as u64,
            raw_bytes: tables.iter().map(|(k, v)| (k.len() + v.len()) as u64).sum(),
            parts: vec![info],
        };
        vec![
            put(ObjectName::CheckpointPart(number, epoch, 0), part),
            put(ObjectName::CheckpointManifest(number, epoch), manifest.encode().unwrap()),
        ]
    }
}

/// A whole segment of one record.
pub fn segment(header: SegmentHeader, lsn: Lsn, ops: Vec<Op>) -> Vec<u8> {
    let mut builder = SegmentBuilder::new(header);
    builder.push(&Record { lsn, ops }).unwrap();
    builder.finish(Some(lsn)).unwrap().0.to_vec()
}

/// A directory's inode.
pub fn directory(parent: u64) -> Bytes {
    let mut inode = Inode::new(FileKind::Directory, 0o755, (0, 0), Time::default());
    inode.parent = Ino(parent);
    inode.encode()
}

/// The operations that put a file of the attacker's into the root.
pub fn evil_file() -> Vec<Op> {
    let ino = Ino(1_000_000);
    let mut inode = Inode::new(FileKind::Regular, 0o4755, (0, 0), Time::default());
    inode.size = 4;
    inode.body = Body::Inline(Bytes::from_static(b"evil"));
    vec![
        Op::put(inode_key(ino), inode.encode()),
        Op::put(dirent_key(Ino::ROOT, FILE.as_bytes()), entry(ino, FileKind::Regular)),
        Op::put(volume_key("next_ino"), 1_000_001_u64.to_le_bytes().to_vec()),
    ]
}

/// A directory entry's value.
pub fn entry(ino: Ino, kind: FileKind) -> Bytes {
    Dirent { ino, kind }.encode()
}

/// The tables of a volume that has nothing but the attacker's file.
pub fn evil_tables() -> BTreeMap<Bytes, Bytes> {
    let mut tables = BTreeMap::new();
    tables.insert(inode_key(Ino::ROOT), directory(1));
    tables.insert(volume_key("next_block"), Bytes::copy_from_slice(&1_000_000_u64.to_le_bytes()));
    tables.insert(volume_key("usage"), Bytes::copy_from_slice(&[0; 16]));
    for op in evil_file() {
        if let Op::Put { key, value } = op {
            tables.insert(key, value);
        }
    }
    tables
}

/// The operation that makes the log name a manifest.
pub fn naming(number: SegmentNo, epoch: Epoch, manifest: &[u8]) -> Op {
    Op::put(checkpoint_key(number, epoch), blake3::hash(manifest).as_bytes().to_vec())
}

/// The text of a JSON object with another member, and the checksum that belongs to it.
pub fn edited(bytes: &[u8], from: &str, to: &str) -> Vec<u8> {
    let text = std::str::from_utf8(bytes).unwrap();
    let (body, _) = text.split_once(",\n  \"blake3\"").unwrap();
    assert!(body.contains(from), "{from} is not in {body}");
    let body = body.replace(from, to);
    let hash = blake3::hash(body.as_bytes()).to_hex();
    format!("{body},\n  \"blake3\": \"{hash}\"\n}}\n").into_bytes()
}

/// The first half.
pub fn half(bytes: &[u8]) -> Vec<u8> {
    bytes[..bytes.len() / 2].to_vec()
}

/// `times` repetitions of `piece` after `head`, as one zstd frame; and their raw length.
fn packed(head: &[u8], piece: &[u8], times: u64) -> (Vec<u8>, u64) {
    let mut out = zstd::stream::write::Encoder::new(Vec::new(), 3).unwrap();
    out.write_all(head).unwrap();
    let per = (64 << 10) / piece.len() as u64;
    let many = piece.repeat(per as usize);
    for _ in 0..times / per {
        out.write_all(&many).unwrap();
    }
    out.write_all(&piece.repeat((times % per) as usize)).unwrap();
    (out.finish().unwrap(), head.len() as u64 + times * piece.len() as u64)
}

fn varint(mut value: u64) -> Vec<u8> {
    let mut out = Vec::new();
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
    out
}

/// A small segment that unpacks to `times` operations, each with the key `key` to be deleted.
pub fn bomb(honest: &Footer, key: &[u8], times: u64) -> Vec<u8> {
    let lsn = honest.commit.unwrap();
    let mut out = segment(honest.header, lsn, evil_file());
    let head = [varint(lsn.0), varint(times)].concat();
    let operation = [&[0][..], &varint(key.len() as u64), key].concat();
    let (records, raw) = packed(&head, &operation, times);
    let mut footer = out.split_off(out.len() - FOOTER_LEN);
    out.truncate(HEADER_LEN);
    let whole = (HEADER_LEN + records.len() + FOOTER_LEN) as u64;
    footer[136..144].copy_from_slice(&whole.to_le_bytes());
    footer[160..168].copy_from_slice(&(records.len() as u64).to_le_bytes());
    footer[168..176].copy_from_slice(&raw.to_le_bytes());
    footer[180] = 1;
    out.extend_from_slice(&records);
    out.extend_from_slice(&footer);
    reseal(&mut out);
    out
}

/// A checkpoint part that unpacks to `times` entries of 4 bytes; with the manifest that names it.
pub fn part_bomb(known: &Known, times: u32) -> Changes {
    let (name, mut manifest) = known.manifest();
    let mut part = known.bytes(known.part())[..64].to_vec();
    let (entries, raw) = packed(&[], &[2, 2, 0, 0], u64::from(times));
    part[10] = 1;
    part[40..44].copy_from_slice(&times.to_le_bytes());
    part[44..48].copy_from_slice(&(raw as u32).to_le_bytes());
    part[48..52].copy_from_slice(&(entries.len() as u32).to_le_bytes());
    part.extend_from_slice(&entries);
    let hash = *blake3::hash(&part).as_bytes();
    part.extend_from_slice(&hash);
    manifest.parts.truncate(1);
    manifest.parts[0].len = part.len() as u64;
    manifest.parts[0].blake3 = hash;
    manifest.parts[0].entries = u64::from(times);
    manifest.entries = u64::from(times);
    manifest.raw_bytes = raw - 2 * u64::from(times);
    vec![put(known.part(), part), put(name, manifest.encode().unwrap())]
}
