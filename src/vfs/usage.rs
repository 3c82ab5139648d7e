//! How much of the volume is used: a counter kept in every transaction that changes it.
//!
//! Owns the counter's key and bytes.

use bytes::Bytes;

use crate::format::tables::volume_key;
use crate::journal::{Journal, JournalError, Tx};

pub(crate) const USAGE: &str = "usage";

/// What the volume holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Allocated space in units of 512 bytes.
    pub blocks: u64,
    /// Inodes, the root included.
    pub inodes: u64,
}

impl Usage {
    /// Reads the stored counters; zeros when there are none.
    pub(crate) fn decode(value: Option<Bytes>) -> Self {
        let at = |v: &Bytes, i: usize| {
            v.get(i..i + 8).and_then(|b| b.try_into().ok()).map_or(0, u64::from_le_bytes)
        };
        value.map_or_else(Self::default, |v| Self { blocks: at(&v, 0), inodes: at(&v, 8) })
    }

    /// The bytes to store.
    pub(crate) fn encode(self) -> Vec<u8> {
        [self.blocks.to_le_bytes(), self.inodes.to_le_bytes()].concat()
    }
}

/// Adds to the counters within `tx`.
pub(super) fn change(tx: &mut Tx<'_>, blocks: i64, inodes: i64) -> Result<(), JournalError> {
    if blocks == 0 && inodes == 0 {
        return Ok(());
    }
    let now = Usage::decode(tx.get(&volume_key(USAGE))?);
    let then = Usage {
        blocks: now.blocks.saturating_add_signed(blocks),
        inodes: now.inodes.saturating_add_signed(inodes),
    };
    tx.put(volume_key(USAGE), then.encode());
    Ok(())
}

/// The counters now.
pub(super) fn read(journal: &Journal) -> Result<Usage, JournalError> {
    Ok(Usage::decode(journal.get(&volume_key(USAGE))?))
}
