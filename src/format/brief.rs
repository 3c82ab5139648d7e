//! Brief forms of what looking up names needs: which inode a name leads to, and an inode's attributes without its content.
//!
//! Owns their bytes: a name and its file's attributes take some 45 together. They are kept in memory only, and derived from the tables'
//! values again at each start, so they may change with any version. Knows nothing of where they are kept.

use super::codec::{Decoder, FormatError, put_varint};
use super::tables::{
    Body, Dirent, FileKind, Inode, Time, name_cookie, number_of_key, split_dirent_key, table,
};
use crate::ids::Ino;

const ONE_NAME: u8 = 1 << 3;
const CHANGED_AS_WRITTEN: u8 = 1 << 4;
const ACCESSED_AS_MADE: u8 = 1 << 5;
const PLAIN: u8 = 1 << 6;
const NO_PARENT: u8 = 1 << 7;
const KIND: u8 = 0b111;

/// Appends the brief form of a key; `false` for one of which nothing is kept.
#[must_use]
pub fn key(key: &[u8], out: &mut Vec<u8>) -> bool {
    let (Some(table), Some(number)) = (key.first().copied(), number_of_key(key)) else { return false };
    out.push(table);
    put_varint(out, number);
    match table {
        table::INODE => key.len() == 9,
        table::DIRENT => {
            // Without the hash: where damage has put a name in a wrong place, it must not stand for the right one.
            let Some((cookie, name)) = split_dirent_key(key) else { return false };
            out.extend_from_slice(name);
            cookie == name_cookie(name)
        }
        _ => false,
    }
}

/// Appends the brief form of a key's value; `false` when there is none, also for a value that cannot be read.
#[must_use]
pub fn value(key: &[u8], value: &[u8], out: &mut Vec<u8>) -> bool {
    match key.first() {
        Some(&table::INODE) => Inode::decode_head(value).is_ok_and(|(inode, body)| {
            put_inode(&inode, body.len(), out);
            true
        }),
        Some(&table::DIRENT) => Dirent::decode(value).is_ok_and(|dirent| {
            out.push(dirent.kind as u8);
            put_varint(out, dirent.ino.0);
            true
        }),
        _ => false,
    }
}

/// A directory entry out of its brief form.
pub fn dirent(brief: &[u8]) -> Result<Dirent, FormatError> {
    let mut d = Decoder::new("brief directory entry", brief);
    let kind = kind(&mut d)?;
    Ok(Dirent { kind, ino: Ino(d.varint()?) })
}

/// An inode out of its brief form: without what it holds, so its body is always [`Body::Blocks`]; of a symbolic link the size is the
/// target's length.
pub fn inode(brief: &[u8]) -> Result<Inode, FormatError> {
    let mut d = Decoder::new("brief inode", brief);
    let head = d.clone().u8()?;
    let has = |flag: u8| head & flag != 0;
    let kind = kind(&mut d)?;
    let (perm, uid, gid) = (d.u16()?, small(&mut d)?, small(&mut d)?);
    let nlink = if has(ONE_NAME) { 1 } else { small(&mut d)? };
    let (size, blocks) = (d.varint()?, d.varint()?);
    let btime = time(&mut d, Time::default())?;
    let mtime = time(&mut d, btime)?;
    let ctime = if has(CHANGED_AS_WRITTEN) { mtime } else { time(&mut d, mtime)? };
    let atime = if has(ACCESSED_AS_MADE) { btime } else { time(&mut d, btime)? };
    let (generation, flags, rdev) =
        if has(PLAIN) { (1, 0, 0) } else { (small(&mut d)?, small(&mut d)?, small(&mut d)?) };
    let parent = Ino(if has(NO_PARENT) { 0 } else { d.varint()? });
    let body = Body::Blocks;
    Ok(Inode {
        kind,
        perm,
        uid,
        gid,
        nlink,
        rdev,
        size,
        blocks,
        atime,
        mtime,
        ctime,
        btime,
        generation,
        flags,
        parent,
        body,
    })
}

fn put_inode(inode: &Inode, body: usize, out: &mut Vec<u8>) {
    let plain = (inode.generation, inode.flags, inode.rdev) == (1, 0, 0);
    let mut head = inode.kind as u8;
    for (flag, set) in [
        (ONE_NAME, inode.nlink == 1),
        (CHANGED_AS_WRITTEN, inode.ctime == inode.mtime),
        (ACCESSED_AS_MADE, inode.atime == inode.btime),
        (PLAIN, plain),
        (NO_PARENT, inode.parent == Ino(0)),
    ] {
        head |= if set { flag } else { 0 };
    }
    out.push(head);
    out.extend_from_slice(&inode.perm.to_le_bytes());
    put_varint(out, inode.uid.into());
    put_varint(out, inode.gid.into());
    if head & ONE_NAME == 0 {
        put_varint(out, inode.nlink.into());
    }
    let (size, blocks) = match inode.kind {
        FileKind::Symlink => (body as u64, 0),
        _ => (inode.size, inode.blocks),
    };
    put_varint(out, size);
    put_varint(out, blocks);
    put_time(out, inode.btime, Time::default());
    put_time(out, inode.mtime, inode.btime);
    if head & CHANGED_AS_WRITTEN == 0 {
        put_time(out, inode.ctime, inode.mtime);
    }
    if head & ACCESSED_AS_MADE == 0 {
        put_time(out, inode.atime, inode.btime);
    }
    if !plain {
        for n in [inode.generation, inode.flags, inode.rdev] {
            put_varint(out, n.into());
        }
    }
    if head & NO_PARENT == 0 {
        put_varint(out, inode.parent.0);
    }
}

fn kind(d: &mut Decoder<'_>) -> Result<FileKind, FormatError> {
    let kind = d.u8()? & KIND;
    FileKind::from_byte(kind).ok_or_else(|| d.error(format!("unknown kind {kind}")))
}

fn small(d: &mut Decoder<'_>) -> Result<u32, FormatError> {
    let n = d.varint()?;
    u32::try_from(n).map_err(|_| d.error(format!("{n} is too much")))
}

/// A moment as its distance from another one.
fn put_time(out: &mut Vec<u8>, time: Time, from: Time) {
    put_signed(out, time.secs.wrapping_sub(from.secs));
    put_signed(out, i64::from(time.nanos) - i64::from(from.nanos));
}

fn time(d: &mut Decoder<'_>, from: Time) -> Result<Time, FormatError> {
    let secs = from.secs.wrapping_add(signed(d)?);
    let nanos = i64::from(from.nanos).wrapping_add(signed(d)?);
    let nanos = u32::try_from(nanos).map_err(|_| d.error(format!("{nanos} nanoseconds")))?;
    Ok(Time { secs, nanos })
}

/// Small numbers of either sign stay short.
fn put_signed(out: &mut Vec<u8>, n: i64) {
    put_varint(out, ((n << 1) ^ (n >> 63)) as u64);
}

fn signed(d: &mut Decoder<'_>) -> Result<i64, FormatError> {
    let n = d.varint()?;
    Ok((n >> 1) as i64 ^ -((n & 1) as i64))
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use rand::{Rng, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    use super::super::tables::{dirent_key, inode_key, volume_key};
    use super::*;

    fn any(rng: &mut ChaCha8Rng) -> Inode {
        let kind = any_kind(rng);
        let btime = any_time(rng);
        let mut near = |from: Time| match rng.random_range(0..3) {
            0 => from,
            1 => Time {
                secs: from.secs.wrapping_add(rng.random_range(-3..3)),
                nanos: rng.random_range(0..1_000_000_000),
            },
            _ => any_time(rng),
        };
        let mtime = near(btime);
        let (ctime, atime) = (near(mtime), near(btime));
        let mut number = |often: u32| if rng.random() { often } else { rng.random() };
        let (uid, gid, nlink, rdev, generation, flags) =
            (number(0), number(1000), number(1), number(0), number(1), number(0));
        let len = rng.random_range(0..40);
        let body = match kind {
            FileKind::Symlink => Body::Target(Bytes::from(vec![b't'; len])),
            FileKind::Regular if rng.random() => Body::Inline(Bytes::from(vec![b'c'; len])),
            _ => Body::Blocks,
        };
        Inode {
            kind,
            perm: rng.random_range(0..0o10000),
            uid,
            gid,
            nlink,
            rdev,
            size: if let Body::Target(t) = &body {
                t.len() as u64
            } else {
                rng.random::<u64>() >> rng.random_range(0..64)
            },
            blocks: if kind == FileKind::Symlink { 0 } else { rng.random_range(0..100) },
            atime,
            mtime,
            ctime,
            btime,
            generation,
            flags,
            parent: Ino(if kind == FileKind::Directory { rng.random() } else { 0 }),
            body,
        }
    }

    fn any_kind(rng: &mut ChaCha8Rng) -> FileKind {
        FileKind::from_byte(rng.random_range(1..=7)).unwrap()
    }

    fn any_time(rng: &mut ChaCha8Rng) -> Time {
        let secs = if rng.random() { rng.random_range(0..2_000_000_000) } else { rng.random() };
        Time { secs, nanos: rng.random_range(0..1_000_000_000) }
    }

    #[test]
    fn everything_but_the_content_comes_back() {
        let seed = rand::random();
        println!("seed {seed}");
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        for _ in 0..2000 {
            let inode = any(&mut rng);
            let mut brief = Vec::new();
            assert!(value(&inode_key(Ino(7)), &inode.encode(), &mut brief));
            assert_eq!(super::inode(&brief).unwrap(), Inode { body: Body::Blocks, ..inode });
            // Cut short it is refused, not misread.
            brief.pop();
            assert!(super::inode(&brief).is_err());
            let entry = Dirent { ino: Ino(rng.random()), kind: any_kind(&mut rng) };
            let mut brief = Vec::new();
            assert!(value(&dirent_key(Ino(1), b"n"), &entry.encode(), &mut brief));
            assert_eq!(dirent(&brief).unwrap(), entry);
        }
    }

    #[test]
    fn a_usual_file_takes_little() {
        let made = Time { secs: 1_790_000_000, nanos: 123_456_789 };
        let written = Time { nanos: made.nanos + 100_000, ..made };
        let inode = Inode {
            size: 4096,
            blocks: 8,
            mtime: written,
            ctime: written,
            body: Body::Inline(Bytes::from(vec![0; 4096])),
            ..Inode::new(FileKind::Regular, 0o644, (1000, 1000), made)
        };
        let mut brief = Vec::new();
        assert!(value(&inode_key(Ino(1)), &inode.encode(), &mut brief));
        assert!(brief.len() <= 24, "{}", brief.len());
    }

    #[test]
    fn keys_stay_apart_and_others_are_left_out() {
        let of = |k: &[u8]| {
            let mut out = Vec::new();
            key(k, &mut out).then_some(out)
        };
        let keys = [
            inode_key(Ino(1)),
            inode_key(Ino(300)),
            dirent_key(Ino(1), b"a"),
            dirent_key(Ino(1), b"ab"),
            dirent_key(Ino(300), b"a"),
        ];
        let briefs: std::collections::HashSet<_> = keys.iter().map(|k| of(k).unwrap()).collect();
        assert_eq!(briefs.len(), keys.len());
        assert_eq!(of(&volume_key("usage")), None);
        assert_eq!(of(b""), None);
        let mut misplaced = keys[2].to_vec();
        misplaced[12] ^= 1;
        assert_eq!(of(&misplaced), None, "its hash is not the name's");
        assert!(!value(&keys[0], b"nonsense", &mut Vec::new()));
    }
}
