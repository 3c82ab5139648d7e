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
use super::limits::{MAX_KEY, MAX_VALUE};
use super::unpack::Unpacker;
use crate::ids::Lsn;

const DELETE: u8 = 0;
const PUT: u8 = 1;

/// Bytes of the shortest operation: its kind, and a key of one byte.
const LEAST_OP: u64 = 3;

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

/// An operation whose bytes lie in the buffer that it was read into.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OpRef<'a> {
    /// Sets `key` to `value`.
    Put {
        /// Table byte and key.
        key: &'a [u8],
        /// The whole new value.
        value: &'a [u8],
    },
    /// Removes `key`.
    Delete {
        /// Table byte and key.
        key: &'a [u8],
    },
}

impl<'a> OpRef<'a> {
    /// The key it changes.
    #[must_use]
    pub fn key(&self) -> &'a [u8] {
        match self {
            OpRef::Put { key, .. } | OpRef::Delete { key } => key,
        }
    }

    /// A copy that owns its bytes.
    #[must_use]
    pub fn to_op(&self) -> Op {
        match self {
            OpRef::Put { key, value } => {
                Op::Put { key: Bytes::copy_from_slice(key), value: Bytes::copy_from_slice(value) }
            }
            OpRef::Delete { key } => Op::Delete { key: Bytes::copy_from_slice(key) },
        }
    }
}

/// What stands before the operations of a record: its LSN and how many there are. A count that the
/// bytes cannot hold is refused.
pub(super) fn read_head(u: &mut Unpacker<'_>) -> Result<(Lsn, u64), FormatError> {
    let lsn = Lsn(u.varint()?);
    let count = u.varint()?;
    if lsn.0 == 0 || count == 0 || count > u.remaining() / LEAST_OP {
        return Err(u.error(format!("record {lsn} of {count} operations")));
    }
    Ok((lsn, count))
}

/// Reads one operation.
pub(super) fn read_op<'u>(u: &'u mut Unpacker<'_>) -> Result<OpRef<'u>, FormatError> {
    u.begin_item();
    let kind = u.u8()?;
    let key = u.blob(MAX_KEY)?;
    let value = match kind {
        DELETE => None,
        PUT => Some(u.blob(MAX_VALUE)?),
        other => return Err(u.error(format!("unknown operation {other}"))),
    };
    let key = u.bytes(key);
    Ok(match value {
        Some(value) => OpRef::Put { key, value: u.bytes(value) },
        None => OpRef::Delete { key },
    })
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
        if count > d.remaining() as u64 / LEAST_OP {
            return Err(d.error(format!("record {lsn} of {count} operations in {} bytes", d.remaining())));
        }
        // The list grows with the bytes that are read: a wrong count costs nothing.
        let mut ops = Vec::with_capacity(count.min(1024) as usize);
        for _ in 0..count {
            ops.push(Self::decode_op(d, lsn)?);
        }
        Ok(Self { lsn, ops })
    }

    fn decode_op(d: &mut Decoder<'_>, lsn: Lsn) -> Result<Op, FormatError> {
        let kind = d.u8()?;
        let key = d.blob()?;
        if key.is_empty() || key.len() > MAX_KEY {
            return Err(d.error(format!("a key of {} bytes in record {lsn}", key.len())));
        }
        let key = Bytes::copy_from_slice(key);
        match kind {
            DELETE => Ok(Op::Delete { key }),
            PUT => {
                let value = d.blob()?;
                if value.len() > MAX_VALUE {
                    return Err(d.error(format!("a value of {} bytes in record {lsn}", value.len())));
                }
                Ok(Op::Put { key, value: Bytes::copy_from_slice(value) })
            }
            other => Err(d.error(format!("unknown operation {other} in record {lsn}"))),
        }
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

    #[test]
    fn counts_and_lengths_are_checked_before_memory_is_taken() {
        let decode = |bytes: &[u8]| Record::decode(&mut Decoder::new("record", bytes));
        // More operations than the bytes can hold, an empty key, a key and a value beyond the
        // limits.
        let mut many = vec![1];
        put_varint(&mut many, u64::MAX);
        many.extend_from_slice(&[0; 1000]);
        assert!(decode(&many).unwrap_err().why.contains("operations in 1000 bytes"));
        assert!(decode(&[1, 1, DELETE, 0, 9]).unwrap_err().why.contains("a key of 0 bytes"));
        for (key, value, good) in
            [(MAX_KEY, MAX_VALUE, true), (MAX_KEY + 1, 1, false), (1, MAX_VALUE + 1, false)]
        {
            let mut bytes = Vec::new();
            encode(Lsn(1), &[Op::put(vec![2; key], vec![0; value])], &mut bytes);
            assert_eq!(decode(&bytes).is_ok(), good, "{key} {value}");
        }
    }
}
