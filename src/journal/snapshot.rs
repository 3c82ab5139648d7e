//! A look at all keys as of one moment, while changes go on.
//!
//! Owns what changes since then have overwritten: each commit first notes the values that it is about to replace, once for each key. So a
//! snapshot costs memory only for what changes while it is open, and nothing when none is.

use std::collections::BTreeMap;
use std::ops::Bound;
use std::sync::{Arc, Weak};

use bytes::Bytes;
use parking_lot::Mutex;

use super::error::JournalError;
use super::memtable::Changes;
use super::shared::Shared;
use crate::ids::Lsn;

/// Overwritten values may take this much, about; then the snapshot is given up.
const MOST: usize = 64 << 20;
/// What an entry costs beyond key and value, roughly.
const OVERHEAD: usize = 112;

/// What was overwritten since a moment.
#[derive(Default)]
struct Old {
    values: BTreeMap<Bytes, Option<Bytes>>,
    bytes: usize,
    /// Why nothing is noted any more.
    ended: Option<JournalError>,
}

/// The snapshots that are open.
#[derive(Default)]
pub(super) struct Snapshots(Mutex<Vec<Weak<Mutex<Old>>>>);

impl Snapshots {
    /// Notes what `changes` are about to overwrite. Called with the commit lock held, before they become visible.
    pub(super) fn note(&self, shared: &Shared, changes: &Changes) {
        let mut open = self.0.lock();
        if open.is_empty() {
            return;
        }
        open.retain(|old| old.strong_count() > 0);
        for old in open.iter().filter_map(Weak::upgrade) {
            let mut old = old.lock();
            for key in changes.keys() {
                if old.ended.is_some() {
                    break;
                }
                if old.values.contains_key(key) {
                    continue;
                }
                match shared.get(None, key) {
                    Ok(value) => {
                        old.bytes += key.len() + value.as_ref().map_or(0, Bytes::len) + OVERHEAD;
                        old.values.insert(key.clone(), value);
                    }
                    Err(e) => old.ended = Some(e),
                }
                if old.bytes > MOST {
                    old.values.clear();
                    old.ended = Some(JournalError::Outrun);
                }
            }
        }
    }
}

/// All keys as of one moment. Dropping it ends its cost.
pub struct Snapshot {
    shared: Arc<Shared>,
    old: Arc<Mutex<Old>>,
    lsn: Lsn,
}

impl Snapshot {
    pub(super) fn take(shared: &Arc<Shared>) -> Self {
        let old = Arc::new(Mutex::new(Old::default()));
        // Between two transactions.
        let _turn = shared.commit.lock();
        shared.snapshots.0.lock().push(Arc::downgrade(&old));
        let lsn = Lsn(shared.last.load(std::sync::atomic::Ordering::SeqCst));
        Self { shared: Arc::clone(shared), old, lsn }
    }

    /// The newest record of that moment.
    #[must_use]
    pub fn lsn(&self) -> Lsn {
        self.lsn
    }

    /// The value of a key. [`JournalError::Outrun`] when too much has changed since.
    pub fn get(&self, key: &[u8]) -> Result<Option<Bytes>, JournalError> {
        // Read first: whatever has been overwritten by then is noted.
        let now = self.shared.get(None, key)?;
        let old = self.old.lock();
        match (&old.ended, old.values.get(key)) {
            (Some(e), _) => Err(e.clone()),
            (None, Some(before)) => Ok(before.clone()),
            (None, None) => Ok(now),
        }
    }

    /// Up to `limit` pairs with keys in `[start, end)`, in order; fewer only at the end of the range. Errors as [`Snapshot::get`].
    pub fn scan(&self, start: &[u8], end: &[u8], limit: usize) -> Result<Vec<(Bytes, Bytes)>, JournalError> {
        let mut out = Vec::new();
        let mut from = Bytes::copy_from_slice(start);
        while out.len() < limit && from < end {
            let missing = limit - out.len();
            let page = self.shared.scan(None, &from, end, missing)?;
            let whole = page.len() < missing;
            let until: Bytes = match page.last() {
                Some((last, _)) if !whole => [&last[..], &[0]].concat().into(),
                _ => Bytes::copy_from_slice(end),
            };
            let old = self.old.lock();
            if let Some(e) = &old.ended {
                return Err(e.clone());
            }
            let range = (Bound::Included(&from[..]), Bound::Excluded(&until[..]));
            let mut before = old.values.range::<[u8], _>(range).peekable();
            for (key, value) in page {
                while let Some((k, v)) = before.next_if(|(k, _)| **k < key) {
                    out.extend(v.clone().map(|v| (k.clone(), v)));
                }
                match before.next_if(|(k, _)| **k == key) {
                    Some((_, was)) => out.extend(was.clone().map(|v| (key, v))),
                    None => out.push((key, value)),
                }
            }
            for (k, v) in before {
                out.extend(v.clone().map(|v| (k.clone(), v)));
            }
            from = until;
        }
        out.truncate(limit);
        Ok(out)
    }
}
