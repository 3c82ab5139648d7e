//! A transaction under way.
//!
//! Owns the changes until they are committed, and the limits of keys and values. Knows neither files nor threads.

use bytes::Bytes;

use super::error::JournalError;
use super::memtable::Changes;
use super::shared::Shared;
use super::{MAX_KEY, MAX_VALUE};
use crate::ids::Lsn;

/// Refuses what the store cannot hold safely.
pub(super) fn check(key: &Bytes, value: Option<&Bytes>) -> Result<(), JournalError> {
    if key.is_empty() || key.len() > MAX_KEY || key[0] == 0xff {
        return Err(JournalError::TooLarge { what: "key", len: key.len(), limit: MAX_KEY });
    }
    match value {
        Some(v) if v.len() > MAX_VALUE => {
            Err(JournalError::TooLarge { what: "value", len: v.len(), limit: MAX_VALUE })
        }
        _ => Ok(()),
    }
}

/// A transaction: sees its own changes over the newest state.
pub struct Tx<'a> {
    pub(super) shared: &'a Shared,
    pub(super) lsn: Lsn,
    pub(super) changes: Changes,
    /// The first change that was refused: the transaction cannot be committed.
    pub(super) refused: Option<JournalError>,
    pub(super) mark: u64,
}

impl Tx<'_> {
    /// The value of a key.
    pub fn get(&self, key: &[u8]) -> Result<Option<Bytes>, JournalError> {
        self.shared.get(Some(&self.changes), key)
    }

    /// Up to `limit` pairs with keys in `[start, end)`, in order.
    pub fn scan(&self, start: &[u8], end: &[u8], limit: usize) -> Result<Vec<(Bytes, Bytes)>, JournalError> {
        self.shared.scan(Some(&self.changes), start, end, limit)
    }

    /// The pair with the highest key in `[start, end)`.
    pub fn last_in(&self, start: &[u8], end: &[u8]) -> Result<Option<(Bytes, Bytes)>, JournalError> {
        self.shared.last_in(Some(&self.changes), start, end)
    }

    /// Sets a key. A key or value beyond [`MAX_KEY`] or [`MAX_VALUE`] makes the whole transaction fail at its end.
    pub fn put(&mut self, key: impl Into<Bytes>, value: impl Into<Bytes>) {
        self.change(key.into(), Some(value.into()));
    }

    /// Removes a key; no error when it is absent.
    pub fn delete(&mut self, key: impl Into<Bytes>) {
        self.change(key.into(), None);
    }

    fn change(&mut self, key: Bytes, value: Option<Bytes>) {
        match check(&key, value.as_ref()) {
            Ok(()) => {
                self.changes.insert(key, value);
            }
            Err(e) => self.refused = self.refused.take().or(Some(e)),
        }
    }

    /// The record speaks of block data that is durable only when the [`super::DataSync`] of the journal has been asked for this mark.
    pub fn rest_on(&mut self, mark: u64) {
        self.mark = self.mark.max(mark);
    }

    /// The mark that it rests on so far; 0 for none.
    #[must_use]
    pub fn mark(&self) -> u64 {
        self.mark
    }

    /// The LSN that the record will get.
    #[must_use]
    pub fn lsn(&self) -> Lsn {
        self.lsn
    }
}
