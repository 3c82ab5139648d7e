//! The record: one atomic batch of metadata changes under one LSN.
//!
//! Owns the byte form of a record, the same in the journal's tail and in a segment. Knows no table and no file.
//!
//! ```text
//! record  = lsn:varint  count:varint  op*
//! op      = 0x00 key:blob            delete
//!         | 0x01 key:blob value:blob put
//! blob    = length:varint bytes
//! ```

use bytes::Bytes;

use super::codec::{Decoder, FormatError, put_blob, put_varint};
use crate::ids::Lsn;

const DELETE: u8 = 0;
const PUT: u8 = 1;

/// One change of the metadata key space.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Op {
    /// Sets `key` to `value`.
    Put {
        /// Table byte and key.
        key: Bytes,
        /// The whole new value.
        value: Bytes,
    },
    /// Removes `key`; no error when it is absent.
    Delete {
        /// Table byte and key.
        key: Bytes,
    },
}

impl Op {
    /// A put of borrowed or owned bytes.
    pub fn put(key: impl Into<Bytes>, value: impl Into<Bytes>) -> Self {
        Op::Put { key: key.into(), value: value.into() }
    }

    /// A delete of a borrowed or owned key.
    pub fn delete(key: impl Into<Bytes>) -> Self {
        Op::Delete { key: key.into() }
    }

    /// The key it changes.
    #[must_use]
    pub fn key(&self) -> &Bytes {
        match self {
            Op::Put { key, .. } | Op::Delete { key } => key,
        }
    }

    /// Bytes of key and value together.
    #[must_use]
    pub fn payload(&self) -> usize {
        match self {
            Op::Put { key, value } => key.len() + value.len(),
            Op::Delete { key } => key.len(),
        }
    }
}

/// An atomic batch of changes; applying it twice gives what applying it once gives.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// Its place in the order of all records.
    pub lsn: Lsn,
    /// The changes, in order.
    pub ops: Vec<Op>,
}

impl Record {
    /// Appends the record's bytes to `out`.
    pub fn encode(&self, out: &mut Vec<u8>) {
        encode(self.lsn, &self.ops, out);
    }

    /// Reads one record from the front of `d`.
    pub fn decode(d: &mut Decoder<'_>) -> Result<Self, FormatError> {
        let lsn = Lsn(d.varint()?);
        let count = d.varint()?;
        let mut ops = Vec::with_capacity(count.min(1024) as usize);
        for _ in 0..count {
            let kind = d.u8()?;
            let key = Bytes::copy_from_slice(d.blob()?);
            ops.push(match kind {
                DELETE => Op::Delete { key },
                PUT => Op::Put { key, value: Bytes::copy_from_slice(d.blob()?) },
                other => return Err(d.error(format!("unknown operation {other} in record {lsn}"))),
            });
        }
        Ok(Self { lsn, ops })
    }
}

/// Appends the bytes of a record made of borrowed operations to `out`.
pub fn encode<'a>(
    lsn: Lsn,
    ops: impl IntoIterator<Item = &'a Op, IntoIter: ExactSizeIterator>,
    out: &mut Vec<u8>,
) {
    let ops = ops.into_iter();
    put_varint(out, lsn.0);
    put_varint(out, ops.len() as u64);
    for op in ops {
        match op {
            Op::Put { key, value } => {
                out.push(PUT);
                put_blob(out, key);
                put_blob(out, value);
            }
            Op::Delete { key } => {
                out.push(DELETE);
                put_blob(out, key);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn round_trip_and_truncation() {
        let record =
            Record { lsn: Lsn(300), ops: vec![Op::put(&b"\x01k"[..], &b"v"[..]), Op::delete(&b"\x02q"[..])] };
        let mut bytes = Vec::new();
        record.encode(&mut bytes);
        let mut d = Decoder::new("record", &bytes);
        assert_eq!(Record::decode(&mut d), Ok(record));
        assert!(d.finish().is_ok());
        for cut in 0..bytes.len() {
            assert!(Record::decode(&mut Decoder::new("record", &bytes[..cut])).is_err(), "cut at {cut}");
        }
    }
}
