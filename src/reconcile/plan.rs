//! What should lie on a replica, against what does.
//!
//! Pure. Owns the rule what is missing, what is of the wrong size, what to read in a deep pass, and
//! what is none of our business. Knows no network; sizes come from listings.

use std::collections::{BTreeMap, BTreeSet};

use crate::format::names::ObjectName;
use crate::format::volume::Claim;
use crate::ids::{Epoch, SegmentNo};
use crate::replica::volume::valid_epoch;

/// What should be there.
#[derive(Clone, Debug, Default)]
pub struct Expected {
    /// Everything up to this segment.
    pub cursor: SegmentNo,
    /// Epoch and length of each segment up to there.
    pub segments: BTreeMap<SegmentNo, (Epoch, u64)>,
    /// All known claims.
    pub claims: Vec<Claim>,
    /// Marks of an orderly end that some replica holds.
    pub releases: BTreeSet<Epoch>,
    /// Checkpoints that the log names and some replica holds, with the sizes of their parts when
    /// their manifest could be read somewhere.
    pub checkpoints: BTreeMap<(SegmentNo, Epoch), Option<Vec<u64>>>,
    /// All checkpoints that the log names; `None` when that is not known.
    pub named: Option<BTreeSet<(SegmentNo, Epoch)>>,
}

/// What is wrong with an object by its listing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wrong {
    /// It is not there.
    Missing,
    /// It has this size instead of the right one.
    Size(u64),
}

/// What a listing comes to.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Plan {
    /// Objects to write, in the order in which to write them: what others rest on comes first.
    pub wrong: Vec<(ObjectName, Wrong)>,
    /// Objects that look right, by path: what a deep pass reads.
    pub present: Vec<(ObjectName, u64)>,
    /// `volume.json` or the segment at the cursor is gone: the replica was wiped or set back, and
    /// is to be filled in order.
    pub set_back: bool,
    /// Objects that mirrorfs would not make.
    pub foreign: Vec<String>,
    /// Objects with names of ours that no writer of this volume made, as far as the log says; why
    /// that is thought.
    pub forged: Vec<(ObjectName, &'static str)>,
    /// Objects that nothing needs.
    pub left_over: Vec<(String, &'static str)>,
}

/// Why a checkpoint is not copied.
pub(super) const UNNAMED: &str =
    "the log does not name this checkpoint: it was forged, or the record of it is lost";

impl Expected {
    /// Compares with a listing of paths and sizes.
    #[must_use]
    pub fn compare(&self, found: &BTreeMap<String, u64>) -> Plan {
        let mut plan = Plan::default();
        let mut look = |name: ObjectName, size: Option<u64>| match found.get(&name.path()) {
            None => plan.wrong.push((name, Wrong::Missing)),
            Some(there) if size.is_some_and(|s| s != *there) => plan.wrong.push((name, Wrong::Size(*there))),
            Some(there) => plan.present.push((name, *there)),
        };
        look(ObjectName::Volume, None);
        for claim in &self.claims {
            look(ObjectName::Claim(claim.epoch), None);
        }
        for epoch in &self.releases {
            look(ObjectName::Release(*epoch), None);
        }
        for (number, (epoch, len)) in self.segments.range(..=self.cursor) {
            look(ObjectName::Segment(*number, *epoch), Some(*len));
        }
        for ((number, epoch), parts) in self.checkpoints.range(..=(self.cursor, Epoch(u32::MAX))) {
            // Its manifest cannot be read anywhere: then nothing can be said of its parts, and it
            // is of no use.
            for (i, len) in parts.iter().flatten().enumerate() {
                look(ObjectName::CheckpointPart(*number, *epoch, i as u32), Some(*len));
            }
            look(ObjectName::CheckpointManifest(*number, *epoch), None);
        }
        let missing = |name: ObjectName| plan.wrong.contains(&(name, Wrong::Missing));
        let newest =
            self.segments.get(&self.cursor).map(|(epoch, _)| ObjectName::Segment(self.cursor, *epoch));
        plan.set_back = missing(ObjectName::Volume) || newest.is_some_and(missing);
        plan.present.sort_by_key(|(name, _)| name.path());
        self.sort_out(found, &mut plan);
        plan
    }

    /// Finds what is there and not expected.
    fn sort_out(&self, found: &BTreeMap<String, u64>, plan: &mut Plan) {
        let complete = self.checkpoints.keys().next_back().copied();
        for path in found.keys() {
            let Some(name) = ObjectName::parse(path) else {
                match path.starts_with("selftest/") {
                    true => plan.left_over.push((path.clone(), "left by a self-test")),
                    false => plan.foreign.push(path.clone()),
                }
                continue;
            };
            let why = match name {
                ObjectName::Segment(number, epoch) => {
                    let lost = valid_epoch(&self.claims, number).is_some_and(|valid| epoch < valid);
                    lost.then_some("of a lost branch")
                }
                ObjectName::CheckpointPart(number, epoch, _)
                | ObjectName::CheckpointManifest(number, epoch)
                    if valid_epoch(&self.claims, number).is_some_and(|valid| epoch < valid) =>
                {
                    Some("of a lost branch")
                }
                ObjectName::CheckpointManifest(number, epoch) => {
                    if self.named.as_ref().is_some_and(|named| !named.contains(&(number, epoch))) {
                        plan.forged.push((name, UNNAMED));
                    }
                    None
                }
                ObjectName::CheckpointPart(number, epoch, index) => {
                    match self.checkpoints.get(&(number, epoch)) {
                        Some(Some(parts)) => {
                            (index as usize >= parts.len()).then_some("not part of its checkpoint")
                        }
                        Some(None) => Some("of a checkpoint without a readable manifest"),
                        // One beyond all complete ones may be on its way.
                        None => complete
                            .is_some_and(|c| (number, epoch) < c)
                            .then_some("of an unfinished checkpoint"),
                    }
                }
                _ => None,
            };
            if let Some(why) = why {
                plan.left_over.push((path.clone(), why));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::volume::testing;

    fn claim(epoch: u32, first: u64) -> Claim {
        testing::claim(epoch, 0, first)
    }

    fn expected() -> Expected {
        Expected {
            cursor: SegmentNo(4),
            segments: (1..=6).map(|n| (SegmentNo(n), (Epoch(if n < 3 { 1 } else { 2 }), 10 + n))).collect(),
            claims: vec![claim(1, 1), claim(2, 3)],
            releases: [Epoch(1)].into(),
            checkpoints: [
                ((SegmentNo(2), Epoch(1)), Some(vec![5, 6])),
                ((SegmentNo(9), Epoch(2)), Some(vec![1])),
            ]
            .into(),
            named: None,
        }
    }

    /// All that should be there.
    fn whole() -> BTreeMap<String, u64> {
        let mut found: BTreeMap<String, u64> = (1..=4)
            .map(|n| (ObjectName::Segment(SegmentNo(n), Epoch(if n < 3 { 1 } else { 2 })).path(), 10 + n))
            .collect();
        for name in [
            ObjectName::Volume,
            ObjectName::Claim(Epoch(1)),
            ObjectName::Claim(Epoch(2)),
            ObjectName::Release(Epoch(1)),
        ] {
            found.insert(name.path(), 100);
        }
        let at = (SegmentNo(2), Epoch(1));
        found.insert(ObjectName::CheckpointPart(at.0, at.1, 0).path(), 5);
        found.insert(ObjectName::CheckpointPart(at.0, at.1, 1).path(), 6);
        found.insert(ObjectName::CheckpointManifest(at.0, at.1).path(), 50);
        found
    }

    #[test]
    fn a_whole_replica_has_nothing_wrong() {
        let plan = expected().compare(&whole());
        assert_eq!((plan.wrong.len(), plan.set_back), (0, false), "{plan:?}");
        assert_eq!(plan.present.len(), whole().len());
        let paths: Vec<_> = plan.present.iter().map(|(n, _)| n.path()).collect();
        assert!(paths.is_sorted());
        assert!(plan.foreign.is_empty() && plan.left_over.is_empty());
    }

    #[test]
    fn holes_and_sizes_are_found_and_parts_come_before_manifests() {
        let mut found = whole();
        let segment = |n, e| ObjectName::Segment(SegmentNo(n), Epoch(e));
        found.remove(&segment(2, 1).path());
        found.insert(segment(3, 2).path(), 1);
        let manifest = ObjectName::CheckpointManifest(SegmentNo(2), Epoch(1));
        let part = ObjectName::CheckpointPart(SegmentNo(2), Epoch(1), 1);
        found.remove(&manifest.path());
        found.remove(&part.path());
        let plan = expected().compare(&found);
        assert_eq!(
            plan.wrong,
            [
                (segment(2, 1), Wrong::Missing),
                (segment(3, 2), Wrong::Size(1)),
                (part, Wrong::Missing),
                (manifest, Wrong::Missing)
            ]
        );
        assert!(!plan.set_back, "a hole is mended in place");
        found.remove(&segment(4, 2).path());
        assert!(expected().compare(&found).set_back);
        let mut found = whole();
        found.remove("volume.json");
        assert!(expected().compare(&found).set_back);
        let plan = expected().compare(&BTreeMap::new());
        assert!(plan.set_back && plan.present.is_empty());
    }

    #[test]
    fn what_is_not_ours_and_what_nothing_needs_is_told_apart() {
        let mut found = whole();
        let lost = ObjectName::Segment(SegmentNo(3), Epoch(1)).path();
        let ahead = ObjectName::Segment(SegmentNo(5), Epoch(2)).path();
        let stale = ObjectName::CheckpointPart(SegmentNo(1), Epoch(1), 0).path();
        let coming = ObjectName::CheckpointPart(SegmentNo(12), Epoch(2), 0).path();
        for path in ["holiday.jpg", "selftest/1", &lost, &ahead, &stale, &coming] {
            found.insert(path.to_owned(), 1);
        }
        let plan = expected().compare(&found);
        assert_eq!(plan.foreign, ["holiday.jpg"]);
        let left: Vec<_> = plan.left_over.iter().map(|(p, _)| p.as_str()).collect();
        assert_eq!(left, [stale.as_str(), lost.as_str(), "selftest/1"]);
        assert!(plan.wrong.is_empty());
    }

    #[test]
    fn a_checkpoint_that_the_log_does_not_name_is_told() {
        let (named, lost) = ((SegmentNo(2), Epoch(1)), (SegmentNo(4), Epoch(1)));
        let mut found = whole();
        for (number, epoch) in [lost, (SegmentNo(4), Epoch(2)), (SegmentNo(900), Epoch(2))] {
            found.insert(ObjectName::CheckpointManifest(number, epoch).path(), 50);
        }
        let expected = Expected { named: Some([named].into()), ..expected() };
        let plan = expected.compare(&found);
        let forged: Vec<_> = plan.forged.iter().map(|(name, _)| *name).collect();
        let manifest = |n, e| ObjectName::CheckpointManifest(SegmentNo(n), Epoch(e));
        assert_eq!(forged, [manifest(4, 2), manifest(900, 2)]);
        assert_eq!(plan.left_over, [(manifest(4, 1).path(), "of a lost branch")]);
        assert!(plan.wrong.is_empty(), "nothing is expected because some replica has it");
    }
}
