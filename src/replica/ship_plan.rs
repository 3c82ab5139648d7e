//! Which segments to send next and how far the cursor may go.
//!
//! Pure. Owns one replica's window of segments in flight and the rule of invariant 5: the cursor moves over the contiguous prefix of
//! verified segments only. Knows no network and no clock.
//!
//! ```text
//! staged ──next()──▶ in flight ──verified()──▶ done ──(contiguous)──▶ behind the cursor
//!    ▲                   │
//!    └────── failed() ───┘
//! ```

use std::collections::{BTreeMap, BTreeSet};

use super::contract::Staged;
use crate::format::volume::Claim;
use crate::ids::{Epoch, SegmentNo};

/// One replica's window.
#[derive(Clone, Debug)]
pub struct ShipPlan {
    cursor: SegmentNo,
    /// Number and length of what is being sent.
    in_flight: BTreeMap<SegmentNo, u64>,
    /// Sent and verified, but with a gap before them.
    done: BTreeSet<SegmentNo>,
    most: usize,
    most_bytes: u64,
}

impl ShipPlan {
    /// Nothing in flight; at most `most` segments and `most_bytes` bytes at a time (but always one).
    #[must_use]
    pub fn new(cursor: SegmentNo, most: usize, most_bytes: u64) -> Self {
        Self { cursor, in_flight: BTreeMap::new(), done: BTreeSet::new(), most: most.max(1), most_bytes }
    }

    /// The segment up to which everything is verified.
    #[must_use]
    pub fn cursor(&self) -> SegmentNo {
        self.cursor
    }

    /// How many segments, from the cursor on, the window can span: what to ask the outbox for.
    #[must_use]
    pub fn span(&self) -> usize {
        2 * self.most
    }

    /// Whether nothing is being sent.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.in_flight.is_empty()
    }

    /// What to send now, out of what the outbox has after the cursor; marks it as in flight. Nothing beyond a gap is sent, so
    /// that a replica never holds more than a window of segments that its cursor does not cover.
    pub fn next(&mut self, staged: &[Staged]) -> Vec<Staged> {
        let mut chosen = Vec::new();
        let mut expected = self.cursor.next();
        for s in staged {
            if s.number < expected {
                continue;
            }
            let known = self.in_flight.contains_key(&s.number) || self.done.contains(&s.number);
            let bytes: u64 = self.in_flight.values().sum();
            let fits = self.in_flight.len() < self.most && bytes.saturating_add(s.len) <= self.most_bytes;
            let window = s.number.0 - self.cursor.0 <= self.span() as u64;
            if s.number != expected || !window || !(known || fits || self.in_flight.is_empty()) {
                break;
            }
            if !known {
                self.in_flight.insert(s.number, s.len);
                chosen.push(s.clone());
            }
            expected = expected.next();
        }
        chosen
    }

    /// A segment is stored and verified; gives the new cursor if it moves.
    pub fn verified(&mut self, number: SegmentNo) -> Option<SegmentNo> {
        self.in_flight.remove(&number);
        if number > self.cursor {
            self.done.insert(number);
        }
        let before = self.cursor;
        while self.done.remove(&self.cursor.next()) {
            self.cursor = self.cursor.next();
        }
        (self.cursor != before).then_some(self.cursor)
    }

    /// Sending failed; the segment will be given again.
    pub fn failed(&mut self, number: SegmentNo) {
        self.in_flight.remove(&number);
    }
}

/// What a replica's listing of segments says of its cursor: the end of the run, without gaps, of segments of valid epoch that
/// begins at segment 1. `sizes` are what is known of the right lengths; a segment of another length ends the run.
#[must_use]
pub fn true_cursor(
    listed: &BTreeMap<(SegmentNo, Epoch), u64>,
    claims: &[Claim],
    sizes: &BTreeMap<SegmentNo, u64>,
) -> SegmentNo {
    let mut cursor = SegmentNo(0);
    loop {
        let number = cursor.next();
        let Some(epoch) = super::volume::valid_epoch(claims, number) else { return cursor };
        match listed.get(&(number, epoch)) {
            Some(len) if sizes.get(&number).is_none_or(|expected| expected == len) => cursor = number,
            _ => return cursor,
        }
    }
}

#[cfg(test)]
mod tests {
    use rand::{Rng, SeedableRng};

    use super::*;
    use crate::format::volume::testing;
    use crate::replica::StagedKind;

    fn staged(numbers: impl IntoIterator<Item = u64>) -> Vec<Staged> {
        let one = |n| Staged {
            kind: StagedKind::Segment,
            number: SegmentNo(n),
            epoch: Epoch(1),
            path: "x".into(),
            len: 10,
            cut_at: 0.0,
        };
        numbers.into_iter().map(one).collect()
    }

    fn numbers(staged: &[Staged]) -> Vec<u64> {
        staged.iter().map(|s| s.number.0).collect()
    }

    #[test]
    fn the_window_is_bounded_by_count_bytes_and_distance() {
        let mut plan = ShipPlan::new(SegmentNo(0), 3, 1000);
        assert_eq!(numbers(&plan.next(&staged(1..50))), [1, 2, 3]);
        assert_eq!(plan.verified(SegmentNo(2)), None);
        assert_eq!(numbers(&plan.next(&staged(1..50))), [4]);
        for n in 3..6 {
            assert_eq!(plan.verified(SegmentNo(n)), None);
            plan.next(&staged(1..50));
        }
        assert!(plan.next(&staged(1..50)).is_empty(), "1 is stuck: nothing goes beyond the window");
        let mut plan = ShipPlan::new(SegmentNo(4), 3, 25);
        assert_eq!(numbers(&plan.next(&staged(1..50))), [5, 6], "bytes");
        let mut plan = ShipPlan::new(SegmentNo(4), 3, 5);
        assert_eq!(numbers(&plan.next(&staged(5..50))), [5], "always one");
        let mut plan = ShipPlan::new(SegmentNo(4), 3, 500);
        assert!(plan.next(&staged(6..50)).is_empty(), "a gap");
    }

    #[test]
    fn the_cursor_never_passes_what_is_not_verified() {
        let seed: u64 = rand::random();
        println!("seed {seed}");
        let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(seed);
        let mut plan = ShipPlan::new(SegmentNo(0), 4, 1 << 20);
        let (mut flying, mut stored) = (Vec::new(), BTreeSet::new());
        while plan.cursor() < SegmentNo(500) {
            let from = plan.cursor().0 + 1;
            flying.extend(numbers(&plan.next(&staged(from..(from + 8).min(501)))));
            assert!(flying.len() <= 4);
            let i = rng.random_range(0..flying.len());
            let number = flying.swap_remove(i);
            if rng.random_bool(0.3) {
                plan.failed(SegmentNo(number));
            } else {
                assert!(stored.insert(number), "{number} was sent twice");
                plan.verified(SegmentNo(number));
            }
            assert!((1..=plan.cursor().0).all(|n| stored.contains(&n)));
        }
    }

    #[test]
    fn a_listing_gives_the_run_of_valid_epochs() {
        let claim = |epoch, first| testing::claim(epoch, 0, first);
        let claims = [claim(1, 1), claim(2, 3)];
        let mut listed: BTreeMap<_, _> = [(1, 1), (2, 1), (3, 1), (4, 1), (3, 2), (5, 2)]
            .map(|(n, e)| ((SegmentNo(n), Epoch(e)), 7))
            .into();
        let none = BTreeMap::new();
        assert_eq!(true_cursor(&listed, &claims, &none), SegmentNo(3), "4 of epoch 1 is a lost branch");
        listed.insert((SegmentNo(4), Epoch(2)), 7);
        assert_eq!(true_cursor(&listed, &claims, &none), SegmentNo(5));
        let sizes = [(SegmentNo(2), 8)].into();
        assert_eq!(true_cursor(&listed, &claims, &sizes), SegmentNo(1), "2 is cut off");
        assert_eq!(true_cursor(&BTreeMap::new(), &claims, &none), SegmentNo(0));
        assert_eq!(true_cursor(&listed, &[], &none), SegmentNo(0));
    }
}
