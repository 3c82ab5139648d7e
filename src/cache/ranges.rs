//! A set of byte ranges within one block: which bytes of a slot are valid.
//!
//! Owns the interval arithmetic; knows no slot and no file.

use crate::format::codec::{Decoder, FormatError, put_varint};

/// Sorted, disjoint, non-adjacent, non-empty ranges `[start, end)`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ranges(Vec<(u32, u32)>);

impl Ranges {
    /// Adds `[start, end)`, merging what it touches. Does nothing when the range is empty.
    pub fn insert(&mut self, start: u32, end: u32) {
        if start >= end {
            return;
        }
        // First range that ends at or after `start`, and first that begins after `end`: all between are swallowed.
        let from = self.0.partition_point(|r| r.1 < start);
        let to = self.0.partition_point(|r| r.0 <= end);
        if from == to {
            self.0.insert(from, (start, end));
        } else {
            let merged = (start.min(self.0[from].0), end.max(self.0[to - 1].1));
            self.0.drain(from + 1..to);
            self.0[from] = merged;
        }
    }

    /// Removes everything from `at` on.
    pub fn truncate(&mut self, at: u32) {
        self.0.retain(|r| r.0 < at);
        if let Some(last) = self.0.last_mut() {
            last.1 = last.1.min(at);
        }
    }

    /// Whether all of `[start, end)` is in the set. An empty range is.
    #[must_use]
    pub fn covers(&self, start: u32, end: u32) -> bool {
        if start >= end {
            return true;
        }
        let i = self.0.partition_point(|r| r.1 <= start);
        self.0.get(i).is_some_and(|r| r.0 <= start && end <= r.1)
    }

    /// Cuts `[start, end)` into pieces, each wholly inside the set (`true`) or outside (`false`), in order.
    pub fn pieces(&self, start: u32, end: u32) -> impl Iterator<Item = (u32, u32, bool)> + '_ {
        let mut at = start;
        let mut i = self.0.partition_point(|r| r.1 <= start);
        std::iter::from_fn(move || {
            if at >= end {
                return None;
            }
            let piece = match self.0.get(i) {
                Some(&(s, e)) if s <= at => {
                    i += 1;
                    (at, e.min(end), true)
                }
                Some(&(s, _)) => (at, s.min(end), false),
                None => (at, end, false),
            };
            at = piece.1;
            Some(piece)
        })
    }

    /// The ranges, in order.
    pub fn iter(&self) -> impl Iterator<Item = (u32, u32)> + '_ {
        self.0.iter().copied()
    }

    /// How many ranges there are.
    #[must_use]
    pub fn count(&self) -> usize {
        self.0.len()
    }

    /// Bytes in the set.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.0.iter().map(|r| u64::from(r.1 - r.0)).sum()
    }

    /// Appends the set's bytes: a count, then start and length of each range, as variable-length numbers.
    pub fn encode_into(&self, out: &mut Vec<u8>) {
        put_varint(out, self.0.len() as u64);
        for (s, e) in self.iter() {
            put_varint(out, u64::from(s));
            put_varint(out, u64::from(e - s));
        }
    }

    /// Reads a set whose ranges must end at or before `limit`.
    pub fn decode_from(d: &mut Decoder<'_>, limit: u32) -> Result<Self, FormatError> {
        let n = d.varint()?;
        let mut out = Self::default();
        let mut floor = 0u64;
        for _ in 0..n {
            let start = d.varint()?;
            let end = start.saturating_add(d.varint()?);
            if start < floor || end <= start || end > u64::from(limit) {
                return Err(d.error(format!("range {start}..{end} out of place")));
            }
            out.0.push((start as u32, end as u32));
            floor = end + 1;
        }
        Ok(out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::{Rng, SeedableRng};

    #[test]
    fn agrees_with_a_bitmap() {
        const N: u32 = 64;
        let seed: u64 = rand::random();
        println!("seed {seed}");
        let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(seed);
        for _ in 0..500 {
            let mut set = Ranges::default();
            let mut bits = [false; N as usize];
            for _ in 0..12 {
                let (a, b) = (rng.random_range(0..=N), rng.random_range(0..=N));
                if rng.random_bool(0.15) {
                    set.truncate(a);
                    bits[a as usize..].fill(false);
                } else {
                    set.insert(a, b);
                    (a..b).for_each(|i| bits[i as usize] = true);
                }
            }
            let (a, b) = (rng.random_range(0..=N), rng.random_range(0..=N));
            assert_eq!(set.covers(a, b), (a..b).all(|i| bits[i as usize]), "seed {seed} {set:?} {a}..{b}");
            let mut at = a;
            for (s, e, inside) in set.pieces(a, b) {
                assert!(s == at && e > s);
                assert!((s..e).all(|i| bits[i as usize] == inside), "seed {seed}");
                at = e;
            }
            assert!(a >= b || at == b);
            assert_eq!(set.bytes(), bits.iter().filter(|b| **b).count() as u64);
            let mut bytes = Vec::new();
            set.encode_into(&mut bytes);
            assert_eq!(Ranges::decode_from(&mut Decoder::new("ranges", &bytes), N), Ok(set));
        }
    }
}
