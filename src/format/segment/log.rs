//! The records of a segment: kept as they are stored, and read one operation at a time.
//!
//! What 64 MiB of records would take in memory as lists of operations is a multiple of that, and a
//! few stored bytes may unpack to them. So they are checked once without keeping anything, and
//! unpacked again by each reader.

use bytes::Bytes;

use super::{Footer, WHAT};
use crate::format::codec::FormatError;
use crate::format::frame::Codec;
use crate::format::limits::OPS_PER_BYTE;
use crate::format::record::{OpRef, Record, read_head, read_op};
use crate::format::tables::{is_well_formed, table};
use crate::format::unpack::Unpacker;
use crate::ids::Lsn;

/// The records of one segment, verified.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RecordLog {
    codec: Codec,
    stored: Bytes,
    raw_len: u64,
    records: u32,
}

impl RecordLog {
    /// Takes the records of the segment with this footer after checking all of them.
    pub(super) fn new(footer: &Footer, stored: &[u8]) -> Result<Self, FormatError> {
        let mut log = Self {
            codec: footer.records_codec,
            stored: Bytes::new(),
            raw_len: footer.records_raw,
            records: footer.records,
        };
        log.check(footer, stored)?;
        // A copy, so that a small log does not keep the large buffer that it was read in.
        log.stored = Bytes::copy_from_slice(stored);
        Ok(log)
    }

    /// Number of records.
    #[must_use]
    pub fn len(&self) -> usize {
        self.records as usize
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.records == 0
    }

    /// Bytes that it takes in memory.
    #[must_use]
    pub fn stored_len(&self) -> usize {
        self.stored.len()
    }

    /// Calls `each` with every operation, in order, and the LSN of its record.
    pub fn visit<E: From<FormatError>>(
        &self,
        mut each: impl FnMut(Lsn, OpRef<'_>) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut u = Unpacker::new(WHAT, self.codec, &self.stored, self.raw_len)?;
        for _ in 0..self.records {
            let (lsn, count) = read_head(&mut u)?;
            for _ in 0..count {
                each(lsn, read_op(&mut u)?)?;
            }
        }
        Ok(())
    }

    /// All records as a list. Takes a multiple of the records' bytes: not for what a stranger may
    /// have written.
    pub fn to_vec(&self) -> Result<Vec<Record>, FormatError> {
        let mut records: Vec<Record> = Vec::new();
        self.visit(|lsn, op| {
            match records.last_mut().filter(|r| r.lsn == lsn) {
                Some(record) => record.ops.push(op.to_op()),
                None => records.push(Record { lsn, ops: vec![op.to_op()] }),
            }
            Ok::<_, FormatError>(())
        })?;
        Ok(records)
    }

    /// Checks everything but what the values mean, with the memory of one operation.
    fn check(&self, footer: &Footer, stored: &[u8]) -> Result<(), FormatError> {
        let mut u = Unpacker::new("records of a segment", self.codec, stored, self.raw_len)?;
        let most = match self.codec {
            Codec::Raw => u64::MAX,
            Codec::Zstd => stored.len() as u64 * OPS_PER_BYTE,
        };
        let (mut first, mut last, mut total) = (None, Lsn(0), 0u64);
        for _ in 0..self.records {
            let (lsn, count) = read_head(&mut u)?;
            total = total.saturating_add(count);
            if total > most {
                return Err(u.error(format!("{total} operations in {} stored bytes", stored.len())));
            }
            if lsn <= last {
                return Err(u.error(format!("record {lsn} is out of order")));
            }
            (first, last) = (first.or(Some(lsn)), lsn);
            for _ in 0..count {
                let refused = refuse(&read_op(&mut u)?);
                if let Some(why) = refused {
                    return Err(u.error(format!("{why} in record {lsn}")));
                }
            }
        }
        if first.map(|first| (first, last)) != footer.lsns {
            return Err(u.error("first or last record is not the one promised"));
        }
        u.finish()
    }
}

/// Why an operation cannot stand in a segment.
fn refuse(op: &OpRef<'_>) -> Option<String> {
    let key = op.key();
    match op {
        _ if !is_well_formed(key) => {
            let start = &key[..key.len().min(20)];
            Some(format!("the impossible key {start:02x?} of {} bytes", key.len()))
        }
        OpRef::Put { .. } if key[0] == table::BLOCK => Some("a block's entry".into()),
        _ => None,
    }
}
