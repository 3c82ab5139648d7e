//! The witness: a small file outside sled that says what sled must contain.
//!
//! Owns the file and the multiset sum. sled can, after a flipped bit, return older intact values without a word; a sum
//! over (key, LSN, checksum) of all live keys, kept elsewhere, tells. Knows neither sled nor the tail.
//!
//! ```text
//! file = slot0 (4096 bytes) slot1 (4096 bytes); the valid one with the higher counter counts
//! slot = "MFSWIT01" counter:u64 state:u64 before.lsn:u64 before.sum:u128 after.lsn:u64 after.sum:u128
//!        tail_seq:u64 last:u64 crc32:u32
//! ```

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use super::disk::Disk;
use super::error::JournalError;
use crate::format::codec::{Decoder, FormatError};
use crate::ids::Lsn;

const MAGIC: &[u8; 8] = b"MFSWIT01";
const SLOT: u64 = 4096;
const LEN: usize = 8 * 3 + 24 * 2 + 16 + 4;

/// A sum over all live keys that does not depend on their order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Sum(pub(super) u128);

impl Sum {
    fn of(key: &[u8], lsn: Lsn, crc: u32) -> u128 {
        let mut h = blake3::Hasher::new();
        h.update(&lsn.0.to_le_bytes());
        h.update(&crc.to_le_bytes());
        h.update(key);
        let mut out = [0; 16];
        h.finalize_xof().fill(&mut out);
        u128::from_le_bytes(out)
    }

    /// Counts a key in.
    pub(super) fn add(&mut self, key: &[u8], lsn: Lsn, crc: u32) {
        self.0 = self.0.wrapping_add(Self::of(key, lsn, crc));
    }

    /// Counts in what another sum holds.
    pub(super) fn merge(&mut self, other: Sum) {
        self.0 = self.0.wrapping_add(other.0);
    }

    /// Counts a key out.
    pub(super) fn sub(&mut self, key: &[u8], lsn: Lsn, crc: u32) {
        self.0 = self.0.wrapping_sub(Self::of(key, lsn, crc));
    }
}

/// What sled is to hold at one applied LSN.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Point {
    /// Every record up to this one is in sled.
    pub(super) applied: Lsn,
    /// The sum over sled's keys then.
    pub(super) sum: Sum,
}

/// What the journal was doing when the witness was last written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    /// The directory is being made; nothing was ever acknowledged.
    Creating = 1,
    /// An import runs; sled holds a part.
    Importing = 2,
    /// sled is at `before`, at `after`, or in between.
    Open = 3,
    /// Closed in order: sled is at `after`, the tail ends at `last`.
    Clean = 4,
}

/// One statement of the witness.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Statement {
    /// What was going on.
    pub(super) state: State,
    /// Before the apply round under way (or the last one).
    pub(super) before: Point,
    /// After it.
    pub(super) after: Point,
    /// Highest tail file known to exist.
    pub(super) tail_seq: u64,
    /// Newest record, when `Clean`.
    pub(super) last: Lsn,
}

impl Statement {
    /// A journal at rest at `point`.
    pub(super) fn at(state: State, point: Point, tail_seq: u64) -> Self {
        Self { state, before: point, after: point, tail_seq, last: point.applied }
    }

    fn encode(&self, counter: u64) -> Vec<u8> {
        let mut b = Vec::with_capacity(LEN);
        b.extend_from_slice(MAGIC);
        b.extend_from_slice(&counter.to_le_bytes());
        b.extend_from_slice(&(self.state as u64).to_le_bytes());
        for p in [self.before, self.after] {
            b.extend_from_slice(&p.applied.0.to_le_bytes());
            b.extend_from_slice(&p.sum.0.to_le_bytes());
        }
        b.extend_from_slice(&self.tail_seq.to_le_bytes());
        b.extend_from_slice(&self.last.0.to_le_bytes());
        let crc = crc32fast::hash(&b);
        b.extend_from_slice(&crc.to_le_bytes());
        b
    }

    fn decode(bytes: &[u8]) -> Result<(u64, Self), FormatError> {
        let mut d = Decoder::new("witness", bytes);
        let body = d.clone().bytes(LEN - 4)?;
        if d.array::<8>()? != *MAGIC {
            return Err(d.error("no magic"));
        }
        let counter = d.u64()?;
        let state = match d.u64()? {
            1 => State::Creating,
            2 => State::Importing,
            3 => State::Open,
            4 => State::Clean,
            other => return Err(d.error(format!("unknown state {other}"))),
        };
        let mut point = || -> Result<Point, FormatError> {
            Ok(Point { applied: Lsn(d.u64()?), sum: Sum(u128::from_le_bytes(d.array()?)) })
        };
        let (before, after) = (point()?, point()?);
        let (tail_seq, last) = (d.u64()?, Lsn(d.u64()?));
        if d.u32()? != crc32fast::hash(body) {
            return Err(d.error("wrong checksum"));
        }
        Ok((counter, Self { state, before, after, tail_seq, last }))
    }
}

/// Reads bytes as a statement, also with the checksum that they should have: what was read is
/// written alike. For fuzzing.
pub(super) fn fuzz(bytes: &[u8]) {
    let _ = Statement::decode(bytes);
    let Some(body) = bytes.get(..LEN - 4) else { return };
    let mut sealed = body.to_vec();
    sealed.extend_from_slice(&crc32fast::hash(body).to_le_bytes());
    if let Ok((counter, now)) = Statement::decode(&sealed) {
        assert!(now.encode(counter) == sealed, "a statement is written otherwise than it was read");
    }
}

/// The witness file, open for statements.
pub(super) struct Witness {
    disk: Disk,
    path: PathBuf,
    file: File,
    counter: u64,
    /// The newest statement.
    pub(super) now: Statement,
}

impl Witness {
    /// Makes the file, saying `Creating`. Its directory must be synced by the caller's next step; this does it.
    pub(super) fn create(disk: &Disk, dir: &Path) -> Result<Self, JournalError> {
        let path = dir.join("witness");
        let tmp = dir.join("witness.tmp");
        let err = |e| JournalError::io("create the witness", &path, e);
        let now = Statement::at(State::Creating, Point::default(), 0);
        let file = disk.create_zeroed(&tmp, 2 * SLOT).map_err(err)?;
        disk.write(&file, &tmp, SLOT, &now.encode(1)).map_err(err)?;
        disk.sync(&file, &tmp).map_err(err)?;
        disk.rename(&tmp, &path).map_err(err)?;
        disk.sync_dir(dir).map_err(err)?;
        Ok(Self { disk: disk.clone(), file, counter: 1, now, path })
    }

    /// Reads the newest statement; `None` when there is no file. Changes nothing.
    pub(super) fn open(disk: &Disk, dir: &Path) -> Result<Option<Self>, JournalError> {
        let path = dir.join("witness");
        let file = match OpenOptions::new().read(true).write(true).open(&path) {
            Ok(f) => f,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(JournalError::io("open the witness", &path, e)),
        };
        let mut best: Option<(u64, Statement)> = None;
        for slot in 0..2 {
            let mut buf = [0; LEN];
            if file.read_exact_at(&mut buf, slot * SLOT).is_ok()
                && let Ok((counter, now)) = Statement::decode(&buf)
                && best.is_none_or(|(c, _)| counter > c)
            {
                best = Some((counter, now));
            }
        }
        let Some((counter, now)) = best else {
            return Err(JournalError::Damaged(format!("no valid statement in {}", path.display())));
        };
        Ok(Some(Self { disk: disk.clone(), path, file, counter, now }))
    }

    /// Makes what was read durable. A process that was killed may have left its last statement with the kernel; to write over the one
    /// before it would leave none if power were lost then.
    pub(super) fn settle(&self) -> Result<(), JournalError> {
        self.disk
            .sync(&self.file, &self.path)
            .map_err(|e| JournalError::io("sync the witness", &self.path, e))
    }

    /// Writes a new statement and makes it durable.
    pub(super) fn say(&mut self, now: Statement) -> Result<(), JournalError> {
        let counter = self.counter + 1;
        let at = (counter % 2) * SLOT;
        self.disk
            .write(&self.file, &self.path, at, &now.encode(counter))
            .and_then(|()| self.disk.sync(&self.file, &self.path))
            .map_err(|e| JournalError::io("write the witness", &self.path, e))?;
        self.counter = counter;
        self.now = now;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_forget_order_and_torn_slots_fall_back() {
        let mut a = Sum::default();
        a.add(b"x", Lsn(1), 7);
        a.add(b"y", Lsn(2), 8);
        let mut b = Sum::default();
        b.add(b"y", Lsn(2), 8);
        b.add(b"z", Lsn(2), 8);
        b.add(b"x", Lsn(1), 7);
        assert_ne!(a, b);
        b.sub(b"z", Lsn(2), 8);
        assert_eq!(a, b);

        let dir = tempfile::tempdir().unwrap();
        let disk = Disk::default();
        let mut w = Witness::create(&disk, dir.path()).unwrap();
        let one = Statement::at(State::Open, Point { applied: Lsn(5), sum: a }, 1);
        let two = Statement::at(State::Clean, Point { applied: Lsn(6), sum: b }, 2);
        w.say(one).unwrap();
        w.say(two).unwrap();
        assert_eq!(Witness::open(&disk, dir.path()).unwrap().unwrap().now, two);
        let newest = (w.counter % 2) * SLOT;
        for at in 0..LEN as u64 {
            let mut byte = [0];
            w.file.read_exact_at(&mut byte, newest + at).unwrap();
            w.file.write_all_at(&[byte[0] ^ 0x10], newest + at).unwrap();
            assert_eq!(Witness::open(&disk, dir.path()).unwrap().unwrap().now, one, "flip at {at}");
            w.file.write_all_at(&byte, newest + at).unwrap();
        }
    }
}
