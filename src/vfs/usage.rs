//! How much of the volume is used: a counter kept in every transaction that changes it.
//!
//! Owns the counter's key and bytes.

use bytes::Bytes;

use crate::format::tables::volume_key;
use crate::journal::{Journal, JournalError, Tx};

const USAGE: &str = "usage";

/// What the volume holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Allocated space in units of 512 bytes.
    pub blocks: u64,
    /// Inodes, the root included.
    pub inodes: u64,
}

fn decode(value: Option<Bytes>) -> Usage {
    let at =
        |v: &Bytes, i: usize| v.get(i..i + 8).and_then(|b| b.try_into().ok()).map_or(0, u64::from_le_bytes);
    value.map_or_else(Usage::default, |v| Usage { blocks: at(&v, 0), inodes: at(&v, 8) })
}

/// Adds to the counters within `tx`.
pub(super) fn change(tx: &mut Tx<'_>, blocks: i64, inodes: i64) -> Result<(), JournalError> {
    if blocks == 0 && inodes == 0 {
        return Ok(());
    }
    let now = decode(tx.get(&volume_key(USAGE))?);
    let mut value = Vec::with_capacity(16);
    value.extend_from_slice(&now.blocks.saturating_add_signed(blocks).to_le_bytes());
    value.extend_from_slice(&now.inodes.saturating_add_signed(inodes).to_le_bytes());
    tx.put(volume_key(USAGE), value);
    Ok(())
}

/// The counters now.
pub(super) fn read(journal: &Journal) -> Result<Usage, JournalError> {
    Ok(decode(journal.get(&volume_key(USAGE))?))
}
