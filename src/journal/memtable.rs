//! The newest changes, in memory: the layers above sled.
//!
//! Owns the active table (taking changes), the frozen ones (waiting for sled) and the merge of ordered layers.
//! Knows neither sled nor files.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Bound;
use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;

use crate::format::record::Op;
use crate::ids::Lsn;

/// What a node of the table costs beyond key and value, roughly.
const OVERHEAD: usize = 112;

/// The last change of each key within a stretch of records.
#[derive(Debug, Default)]
pub(super) struct MemTable {
    map: BTreeMap<Bytes, (Lsn, Option<Bytes>)>,
    /// Estimated memory in bytes.
    pub(super) bytes: usize,
    /// The newest record in it.
    pub(super) last: Lsn,
    /// When its first record came.
    pub(super) born: Option<Instant>,
}

impl MemTable {
    /// Takes the changes of one record; returns the growth in bytes.
    pub(super) fn insert(&mut self, lsn: Lsn, ops: Vec<Op>, now: impl FnOnce() -> Instant) -> usize {
        let before = self.bytes;
        for op in ops {
            let (key, value) = match op {
                Op::Put { key, value } => (key, Some(value)),
                Op::Delete { key } => (key, None),
            };
            let (klen, vlen) = (key.len(), value.as_ref().map_or(0, Bytes::len));
            match self.map.insert(key, (lsn, value)) {
                None => self.bytes += klen + vlen + OVERHEAD,
                Some((_, old)) => {
                    self.bytes = self.bytes + vlen - old.map_or(0, |v| v.len());
                }
            }
        }
        self.last = lsn;
        if self.born.is_none() {
            self.born = Some(now());
        }
        // Shrinking values may make this negative; the counters only need the sum, so wrap.
        self.bytes.wrapping_sub(before)
    }

    /// All entries in key order.
    pub(super) fn iter(&self) -> impl Iterator<Item = (&Bytes, Lsn, &Option<Bytes>)> {
        self.map.iter().map(|(k, (lsn, v))| (k, *lsn, v))
    }

    fn range<'a>(
        &'a self,
        start: &'a [u8],
        end: &'a [u8],
    ) -> impl DoubleEndedIterator<Item = (&'a Bytes, &'a Option<Bytes>)> {
        self.map.range::<[u8], _>((Bound::Included(start), Bound::Excluded(end))).map(|(k, (_, v))| (k, v))
    }
}

/// The layers that readers look through before they ask sled.
#[derive(Debug, Default)]
pub(super) struct View {
    /// Takes the changes of new records.
    pub(super) active: MemTable,
    /// On their way into sled, oldest first.
    pub(super) frozen: VecDeque<Arc<MemTable>>,
    /// How many tables were ever frozen.
    pub(super) freezes: u64,
    /// How many of them sled has at least in part. While this is not above what `freezes` was at some moment, sled
    /// differs from its state at that moment only by tables that were frozen then.
    pub(super) begun: u64,
}

/// Changes of a transaction not yet committed.
pub(super) type Changes = BTreeMap<Bytes, Option<Bytes>>;

/// One entry of an overlay: a key and its value, or its deletion.
pub(super) type Entry = (Bytes, Option<Bytes>);

type Layer<'a> = Box<dyn Iterator<Item = (&'a Bytes, &'a Option<Bytes>)> + 'a>;

impl View {
    /// Freezes the active table.
    pub(super) fn freeze(&mut self) {
        self.frozen.push_back(Arc::new(std::mem::take(&mut self.active)));
        self.freezes += 1;
    }

    /// The oldest frozen table, about to be applied; of the active one when none is frozen.
    pub(super) fn begin(&mut self) -> Option<Arc<MemTable>> {
        if self.frozen.is_empty() && self.active.born.is_some() {
            self.freeze();
        }
        let table = self.frozen.front().cloned();
        // Starting the same one again after a failure counts once.
        self.begun = self.freezes + 1 - self.frozen.len() as u64;
        table
    }

    /// `Some(Some(v))` = the value, `Some(None)` = deleted, `None` = ask sled.
    pub(super) fn get(&self, key: &[u8]) -> Option<Option<Bytes>> {
        if let Some((_, v)) = self.active.map.get(key) {
            return Some(v.clone());
        }
        self.frozen.iter().rev().find_map(|f| f.map.get(key)).map(|(_, v)| v.clone())
    }

    /// The entries in `[start, end)`, newest layer first, until `limit` of them are values. Covers every key up to
    /// the last returned one when the limit was met, else the whole range. `start` must lie before `end`.
    pub(super) fn overlay(
        &self,
        own: Option<&Changes>,
        start: &[u8],
        end: &[u8],
        limit: usize,
    ) -> Vec<Entry> {
        let mut layers: Vec<Layer<'_>> = Vec::with_capacity(2 + self.frozen.len());
        if let Some(own) = own {
            layers.push(Box::new(own.range::<[u8], _>((Bound::Included(start), Bound::Excluded(end)))));
        }
        layers.push(Box::new(self.active.range(start, end)));
        for f in self.frozen.iter().rev() {
            layers.push(Box::new(f.range(start, end)));
        }
        merge(layers, false, limit)
    }

    /// Like [`View::overlay`] from the end backwards, until the first value.
    pub(super) fn overlay_back(&self, own: Option<&Changes>, start: &[u8], end: &[u8]) -> Vec<Entry> {
        let mut layers: Vec<Layer<'_>> = Vec::with_capacity(2 + self.frozen.len());
        if let Some(own) = own {
            let range = own.range::<[u8], _>((Bound::Included(start), Bound::Excluded(end)));
            layers.push(Box::new(range.rev()));
        }
        layers.push(Box::new(self.active.range(start, end).rev()));
        for f in self.frozen.iter().rev() {
            layers.push(Box::new(f.range(start, end).rev()));
        }
        merge(layers, true, 1)
    }
}

/// Merges ordered layers; of equal keys the earlier layer's entry wins.
fn merge(layers: Vec<Layer<'_>>, backwards: bool, limit: usize) -> Vec<Entry> {
    let mut layers: Vec<_> = layers.into_iter().map(Iterator::peekable).collect();
    let mut out = Vec::new();
    let mut values = 0;
    while values < limit {
        let mut best: Option<&Bytes> = None;
        for layer in &mut layers {
            if let Some((key, _)) = layer.peek() {
                let better = best.is_none_or(|b| if backwards { *key > b } else { *key < b });
                if better {
                    best = Some(key);
                }
            }
        }
        let Some(key) = best.cloned() else { break };
        let mut found: Option<Option<Bytes>> = None;
        for layer in &mut layers {
            if let Some((_, v)) = layer.next_if(|(k, _)| **k == key)
                && found.is_none()
            {
                found = Some(v.clone());
            }
        }
        let value = found.flatten();
        values += usize::from(value.is_some());
        out.push((key, value));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(lsn: u64, ops: Vec<Op>) -> MemTable {
        let mut t = MemTable::default();
        t.insert(Lsn(lsn), ops, Instant::now);
        t
    }

    #[test]
    fn newer_layers_win_and_limits_count_values() {
        let frozen = table(1, vec![Op::put("a", "1"), Op::put("b", "1"), Op::put("d", "1")]);
        let active = table(2, vec![Op::delete("a"), Op::put("b", "2"), Op::put("c", "2")]);
        let mut view = View { active: frozen, ..View::default() };
        view.freeze();
        view.active = active;
        let mut own = Changes::new();
        own.insert("c".into(), None);
        let got = view.overlay(Some(&own), b"a", b"z", 10);
        let want: Vec<Entry> = vec![
            ("a".into(), None),
            ("b".into(), Some("2".into())),
            ("c".into(), None),
            ("d".into(), Some("1".into())),
        ];
        assert_eq!(got, want);
        assert_eq!(view.overlay(Some(&own), b"a", b"z", 1), want[..2]);
        assert_eq!(view.overlay_back(None, b"a", b"d"), [("c".into(), Some("2".into()))]);
        assert_eq!(view.get(b"a"), Some(None));
        assert_eq!(view.get(b"x"), None);
    }
}
