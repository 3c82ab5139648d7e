//! Bytes of the tail: files of groups of records.
//!
//! Owns the layout and the reading of one file. A group is what one fdatasync made durable: group n+1 is written only
//! after the sync of group n returned, so only the last group of the last file can be torn, and a bad group in front
//! of a good one is damage. After each sync a *confirmation* is written where the next group will begin (it is not
//! synced and the next group overwrites it): it tells a flipped bit in an acknowledged group from a torn write.
//!
//! ```text
//! file   = header (4096 bytes: "MFSTAIL1" seq:u64 first_lsn:u64 size:u64 crc32:u32) group* zeros
//! group  = kind:u32 ("MFg1" records | "MFc1" confirmation) length:u32 payload_crc:u32 reserved:u32
//!          first:u64 last:u64 header_crc:u32 reserved:u32   (40 bytes), payload, padding to 8
//! ```
//! Both checksums begin with the file's number, so that groups left over from a recycled file's former life are
//! never valid. A file's number is never used twice, and after an open a new file is begun: no two different groups
//! of one file ever begin at the same place, except a confirmation and its successor.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use crate::format::codec::Decoder;
use crate::format::record::Record;
use crate::ids::Lsn;

use super::error::JournalError;

/// Where the first group begins.
pub(super) const HEADER: u64 = 4096;
/// Length of a group's header.
pub(super) const GROUP: usize = 40;
const MAGIC: &[u8; 8] = b"MFSTAIL1";
const RECORDS: u32 = u32::from_le_bytes(*b"MFg1");
const CONFIRM: u32 = u32::from_le_bytes(*b"MFc1");

fn crc(seq: u64, bytes: &[u8]) -> u32 {
    let mut h = crc32fast::Hasher::new();
    h.update(&seq.to_le_bytes());
    h.update(bytes);
    h.finalize()
}

/// The header of file `seq`.
pub(super) fn file_header(seq: u64, first: Lsn, size: u64) -> Vec<u8> {
    let mut b = Vec::with_capacity(HEADER as usize);
    b.extend_from_slice(MAGIC);
    for n in [seq, first.0, size] {
        b.extend_from_slice(&n.to_le_bytes());
    }
    let sum = crc(seq, &b);
    b.extend_from_slice(&sum.to_le_bytes());
    b.resize(HEADER as usize, 0);
    b
}

/// First LSN and size out of the header of file `seq`; an error text when it is not its header.
pub(super) fn read_file_header(file: &File, seq: u64) -> Result<(Lsn, u64), String> {
    let mut b = [0; 36];
    file.read_exact_at(&mut b, 0).map_err(|e| format!("its header cannot be read: {e}"))?;
    let fields = || {
        let mut d = Decoder::new("tail header", &b);
        Ok::<_, crate::format::codec::FormatError>((d.array::<8>()?, d.u64()?, d.u64()?, d.u64()?, d.u32()?))
    };
    match fields() {
        Ok((magic, n, first, size, sum)) if magic == *MAGIC && n == seq && sum == crc(seq, &b[..32]) => {
            Ok((Lsn(first), size))
        }
        _ => Err("its header is not valid".into()),
    }
}

fn group_header(kind: u32, seq: u64, len: u32, payload_crc: u32, first: Lsn, last: Lsn) -> [u8; GROUP] {
    let mut h = [0; GROUP];
    h[0..4].copy_from_slice(&kind.to_le_bytes());
    h[4..8].copy_from_slice(&len.to_le_bytes());
    h[8..12].copy_from_slice(&payload_crc.to_le_bytes());
    h[16..24].copy_from_slice(&first.0.to_le_bytes());
    h[24..32].copy_from_slice(&last.0.to_le_bytes());
    let sum = crc(seq, &h[..32]);
    h[32..36].copy_from_slice(&sum.to_le_bytes());
    h
}

/// Completes a group in place: `buf` begins with [`GROUP`] bytes of room for the header, then the records.
pub(super) fn seal_group(buf: &mut Vec<u8>, seq: u64, first: Lsn, last: Lsn) {
    let payload = crc(seq, &buf[GROUP..]);
    // The journal's buffer limit and the file size keep this far below 4 GiB.
    let len = (buf.len() - GROUP) as u32;
    let header = group_header(RECORDS, seq, len, payload, first, last);
    buf[..GROUP].copy_from_slice(&header);
    buf.resize(buf.len().next_multiple_of(8), 0);
}

/// The confirmation that everything up to `last` is synced.
pub(super) fn confirmation(seq: u64, last: Lsn) -> [u8; GROUP] {
    group_header(CONFIRM, seq, 0, crc(seq, &[]), last, last)
}

struct Header {
    kind: u32,
    len: u64,
    payload_crc: u32,
    first: Lsn,
    last: Lsn,
}

fn parse(seq: u64, h: &[u8]) -> Option<Header> {
    let kind = u32::from_le_bytes(h.get(0..4)?.try_into().ok()?);
    if kind != RECORDS && kind != CONFIRM {
        return None;
    }
    let mut d = Decoder::new("group", h.get(4..GROUP)?);
    let len = u64::from(d.u32().ok()?);
    let payload_crc = d.u32().ok()?;
    d.u32().ok()?;
    let (first, last) = (Lsn(d.u64().ok()?), Lsn(d.u64().ok()?));
    (d.u32().ok()? == crc(seq, &h[..32])).then_some(Header { kind, len, payload_crc, first, last })
}

/// What stands at the reading position.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Found {
    /// A whole, valid group; the position moved past it.
    Group {
        /// Its first record.
        first: Lsn,
        /// Its last record.
        last: Lsn,
        /// The records' bytes.
        payload: Vec<u8>,
    },
    /// Everything up to this record was synced, and no whole group follows.
    Confirmed(Lsn),
    /// Nothing valid.
    End,
}

/// Reads the groups of one file in order.
pub(super) struct GroupReader {
    file: File,
    seq: u64,
    size: u64,
    at: u64,
}

impl GroupReader {
    /// Reads from the first group on.
    pub(super) fn new(file: File, seq: u64, size: u64) -> Self {
        Self { file, seq, size, at: HEADER }
    }

    /// Where the next group begins.
    #[cfg(test)]
    pub(super) fn position(&self) -> u64 {
        self.at
    }

    /// Makes what is read durable.
    pub(super) fn sync(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    /// The next group.
    pub(super) fn next(&mut self) -> io::Result<Found> {
        let mut h = [0; GROUP];
        if self.at.saturating_add(GROUP as u64) > self.size {
            return Ok(Found::End);
        }
        match self.file.read_exact_at(&mut h, self.at) {
            Ok(()) => {}
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => return Ok(Found::End),
            Err(e) => return Err(e),
        }
        let Some(head) = parse(self.seq, &h) else { return Ok(Found::End) };
        if head.kind == CONFIRM {
            return Ok(Found::Confirmed(head.last));
        }
        let from = self.at + GROUP as u64;
        if from.saturating_add(head.len) > self.size {
            return Ok(Found::End);
        }
        // What the header says may be more than there is.
        if from + head.len > self.file.metadata()?.len() {
            return Ok(Found::End);
        }
        let mut payload = vec![0; head.len as usize];
        match self.file.read_exact_at(&mut payload, from) {
            Ok(()) => {}
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => return Ok(Found::End),
            Err(e) => return Err(e),
        }
        if crc(self.seq, &payload) != head.payload_crc {
            return Ok(Found::End);
        }
        self.at = (from + head.len).next_multiple_of(8);
        Ok(Found::Group { first: head.first, last: head.last, payload })
    }

    /// Looks behind an end for proof that more was synced once: the newest LSN that a valid header names, if it is
    /// at or after `expected`.
    pub(super) fn proof_of_more(&self, expected: Lsn) -> io::Result<Option<Lsn>> {
        const CHUNK: usize = 1 << 20;
        let mut newest = None;
        let mut from = self.at;
        let mut buf = vec![0; CHUNK + GROUP];
        while from < self.size {
            let want = ((self.size - from) as usize).min(buf.len());
            let got = read_up_to(&self.file, &mut buf[..want], from)?;
            let mut at = 0;
            while at < CHUNK && at + GROUP <= got {
                if let Some(h) = parse(self.seq, &buf[at..at + GROUP]) {
                    let whole_header_here = from + at as u64 == self.at && h.kind == RECORDS;
                    // The torn group's own header proves nothing; a confirmation or a later group does.
                    if !whole_header_here && h.last >= expected {
                        newest = newest.max(Some(h.last));
                    }
                }
                at += 8;
            }
            if got < want {
                break;
            }
            from += CHUNK as u64;
        }
        Ok(newest)
    }
}

fn read_up_to(file: &File, buf: &mut [u8], from: u64) -> io::Result<usize> {
    let mut got = 0;
    while got < buf.len() {
        match file.read_at(&mut buf[got..], from + got as u64) {
            Ok(0) => break,
            Ok(n) => got += n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(got)
}

/// Decodes the records of a group and checks that they are `first..=last` without a gap.
pub(super) fn records_of(
    path: &Path,
    first: Lsn,
    last: Lsn,
    payload: &[u8],
) -> Result<Vec<Record>, JournalError> {
    let bad = |why: String| JournalError::Damaged(format!("tail file {}: {why}", path.display()));
    let mut d = Decoder::new("tail record", payload);
    let mut out = Vec::new();
    let mut expected = first;
    while d.remaining() > 0 {
        let record = Record::decode(&mut d).map_err(|e| bad(e.to_string()))?;
        if record.lsn != expected {
            return Err(bad(format!("record {} where {expected} belongs", record.lsn)));
        }
        expected = expected.next();
        out.push(record);
    }
    if expected != last.next() {
        return Err(bad(format!("a group ends before its last record {last}")));
    }
    Ok(out)
}

/// Makes the checksums of a file right again, as far as its groups follow each other. For fuzzing.
pub(super) fn reseal(bytes: &mut [u8], seq: u64) {
    if bytes.len() < HEADER as usize {
        return;
    }
    bytes[8..16].copy_from_slice(&seq.to_le_bytes());
    let sum = crc(seq, &bytes[..32]);
    bytes[32..36].copy_from_slice(&sum.to_le_bytes());
    let mut at = HEADER as usize;
    while at + GROUP <= bytes.len() {
        let mut len = [0; 4];
        len.copy_from_slice(&bytes[at + 4..at + 8]);
        let end = (at + GROUP).saturating_add(u32::from_le_bytes(len) as usize);
        if let Some(payload) = bytes.get(at + GROUP..end) {
            let sum = crc(seq, payload);
            bytes[at + 8..at + 12].copy_from_slice(&sum.to_le_bytes());
        }
        let sum = crc(seq, &bytes[at..at + 32]);
        bytes[at + 32..at + 36].copy_from_slice(&sum.to_le_bytes());
        at = end.next_multiple_of(8);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::record::Op;

    fn group(seq: u64, lsns: std::ops::RangeInclusive<u64>) -> Vec<u8> {
        let mut buf = vec![0; GROUP];
        for lsn in lsns.clone() {
            Record { lsn: Lsn(lsn), ops: vec![Op::put("key", vec![7; lsn as usize])] }.encode(&mut buf);
        }
        seal_group(&mut buf, seq, Lsn(*lsns.start()), Lsn(*lsns.end()));
        buf
    }

    fn file(parts: &[&[u8]]) -> (tempfile::NamedTempFile, u64) {
        let f = tempfile::NamedTempFile::new().unwrap();
        let mut all = file_header(9, Lsn(1), 8192);
        parts.iter().for_each(|p| all.extend_from_slice(p));
        all.resize(8192, 0);
        f.as_file().write_all_at(&all, 0).unwrap();
        (f, 8192)
    }

    #[test]
    fn reads_groups_and_tells_torn_from_damaged() {
        let (a, b, confirm) = (group(9, 1..=3), group(9, 4..=9), confirmation(9, Lsn(9)));
        let (f, size) = file(&[&a, &b, &confirm]);
        assert_eq!(read_file_header(f.as_file(), 9), Ok((Lsn(1), 8192)));
        assert!(read_file_header(f.as_file(), 8).is_err());
        let mut r = GroupReader::new(f.reopen().unwrap(), 9, size);
        let Found::Group { first, last, payload } = r.next().unwrap() else { panic!() };
        assert_eq!(records_of(f.path(), first, last, &payload).unwrap().len(), 3);
        assert!(matches!(r.next().unwrap(), Found::Group { last: Lsn(9), .. }));
        assert_eq!(r.next().unwrap(), Found::Confirmed(Lsn(9)));
        assert_eq!(r.proof_of_more(Lsn(10)).unwrap(), None);

        // The last group is torn and nothing confirms it.
        for cut in 0..b.len() {
            let (f, size) = file(&[&a, &b[..cut]]);
            let mut r = GroupReader::new(f.reopen().unwrap(), 9, size);
            r.next().unwrap();
            let whole = b[cut..].iter().all(|x| *x == 0);
            assert_eq!(r.next().unwrap() == Found::End, !whole, "cut {cut}");
            assert_eq!(r.proof_of_more(Lsn(if whole { 10 } else { 4 })).unwrap(), None, "cut {cut}");
        }
        // A flipped bit in a confirmed group, and in one that another follows.
        for at in 0..a.len() + b.len() {
            let mut all = [a.clone(), b.clone(), confirm.to_vec()].concat();
            all[at] ^= 4;
            let (f, size) = file(&[&all]);
            let mut r = GroupReader::new(f.reopen().unwrap(), 9, size);
            let mut expected = Lsn(1);
            while let Found::Group { last, .. } = r.next().unwrap() {
                expected = last.next();
            }
            let whole = expected == Lsn(10);
            assert_eq!(r.proof_of_more(expected).unwrap().is_some(), !whole, "flip at {at}");
        }
        // Another file's groups are nothing.
        let (f, size) = file(&[&group(8, 1..=3)]);
        let mut r = GroupReader::new(f.reopen().unwrap(), 9, size);
        assert_eq!(r.next().unwrap(), Found::End);
        assert_eq!(r.proof_of_more(Lsn(1)).unwrap(), None);
    }
}
