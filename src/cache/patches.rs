//! Small synced writes to a dirty block: what goes into the journal's record itself, so that one sync suffices.
//!
//! Owns, for one block, which bytes of its slot changed since the journal last heard of it, and which *patches* (copies of such
//! bytes) stand in the local table. Pure; knows neither slots nor the journal.
//!
//! An open writes the patches of a block over its slot, in their order. So that this gives what the newest durable record speaks of, a
//! record does one of two things with what changed since the one before it: it adds a patch for all of it, or it
//! deletes every patch of the block and is written only behind a sync of the slots. Bytes in no patch are those of that sync, then.

use super::ranges::Ranges;

/// More changed bytes than this in one block are not copied into a record.
pub const MOST_BYTES: u64 = 32 << 10;
/// When more places than this have changed, they and what lies between them count as one.
const MOST_RANGES: usize = 8;
/// A block with this many patches is synced instead of getting another one.
const MOST_PATCHES: usize = 64;

/// A patch: its number, which gives the order, and which bytes of the slot it holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Patch {
    /// Counts up within the block.
    pub number: u32,
    /// First byte.
    pub start: u32,
    /// Behind the last byte.
    pub end: u32,
}

/// What the next record does with a block's patches.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// Patches that it adds.
    pub put: Vec<Patch>,
    /// Numbers of those that it deletes.
    pub delete: Vec<u32>,
    /// It may be written only when the slot's bytes are durable.
    pub sync: bool,
}

/// See the module's head.
#[derive(Debug, Default)]
pub struct Patches {
    fresh: Ranges,
    standing: Vec<Patch>,
    next: u32,
    planned: Option<Plan>,
}

impl Patches {
    /// Those that an open found, in order.
    pub fn found(standing: Vec<Patch>) -> Self {
        let next = standing.last().map_or(0, |p| p.number + 1);
        Self { standing, next, ..Self::default() }
    }

    /// Bytes `[start, end)` of the slot were changed.
    pub fn changed(&mut self, start: u32, end: u32) {
        self.fresh.insert(start, end);
        if self.fresh.count() > MOST_RANGES {
            let (first, last) =
                self.fresh.iter().fold((u32::MAX, 0), |(low, high), (s, e)| (low.min(s), high.max(e)));
            self.fresh.insert(first, last);
        }
    }

    /// Nothing from `at` on counts any more.
    pub fn truncate(&mut self, at: u32) {
        self.fresh.truncate(at);
    }

    /// Bytes that changed since the journal last heard of the block.
    pub fn fresh_bytes(&self) -> u64 {
        self.fresh.bytes()
    }

    /// The numbers of all patches in the table.
    pub fn numbers(&self) -> impl Iterator<Item = u32> + '_ {
        self.standing.iter().map(|p| p.number)
    }

    /// What the next record is to do; `small`: somebody waits for it, and it is to hold the bytes itself if they are few. Takes
    /// effect with [`Patches::done`]; until then it may be asked again.
    pub fn plan(&mut self, small: bool) -> Plan {
        let plan = if self.fresh.count() == 0 {
            Plan::default()
        } else if small
            && self.fresh.bytes() <= MOST_BYTES
            && self.standing.len() + self.fresh.count() <= MOST_PATCHES
        {
            let number = |(n, (start, end))| Patch { number: self.next + n as u32, start, end };
            let put: Vec<_> = self.fresh.iter().enumerate().map(number).collect();
            let covered = |p: &&Patch| put.iter().any(|new| new.start <= p.start && p.end <= new.end);
            let delete = self.standing.iter().filter(covered).map(|p| p.number).collect();
            Plan { put, delete, sync: false }
        } else {
            Plan { put: Vec::new(), delete: self.numbers().collect(), sync: true }
        };
        self.planned = Some(plan.clone());
        plan
    }

    /// The record with the last plan was committed.
    pub fn done(&mut self) {
        let Some(plan) = self.planned.take() else { return };
        self.standing.retain(|p| !plan.delete.contains(&p.number));
        self.next += plan.put.len() as u32;
        self.standing.extend(plan.put);
        self.fresh = Ranges::default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::{Rng, SeedableRng};

    fn patch(number: u32, start: u32, end: u32) -> Patch {
        Patch { number, start, end }
    }

    #[test]
    fn small_changes_are_patched_and_large_ones_synced() {
        let mut p = Patches::default();
        assert_eq!(p.plan(true), Plan::default(), "nothing changed");
        p.changed(100, 200);
        p.changed(300, 400);
        let plan = p.plan(true);
        assert_eq!(
            plan,
            Plan { put: vec![patch(0, 100, 200), patch(1, 300, 400)], delete: vec![], sync: false }
        );
        assert_eq!(p.plan(true), plan, "the record was not committed");
        p.done();
        p.changed(50, 250);
        assert_eq!(p.plan(true), Plan { put: vec![patch(2, 50, 250)], delete: vec![0], sync: false });
        p.done();
        p.changed(0, MOST_BYTES as u32 + 1);
        assert_eq!(p.plan(true), Plan { put: vec![], delete: vec![1, 2], sync: true });
        p.done();
        p.changed(7, 8);
        assert_eq!(p.plan(false), Plan { put: vec![], delete: vec![], sync: true }, "nobody waits");
        p.done();
        assert_eq!(p.plan(true), Plan::default());
    }

    #[test]
    fn many_places_are_one_and_many_patches_end_in_a_sync() {
        let mut p = Patches::default();
        (0..20).for_each(|n| p.changed(n * 100, n * 100 + 1));
        let put = p.plan(true).put;
        assert!(put.len() <= MOST_RANGES);
        assert_eq!((put[0], put.last().unwrap().end), (patch(0, 0, 1601), 1901));
        p.done();
        let mut syncs = 0;
        for n in 0..1000u32 {
            p.changed(10_000 + 10 * n, 10_005 + 10 * n);
            syncs += u32::from(p.plan(true).sync);
            p.done();
            assert!(p.numbers().count() <= MOST_PATCHES);
        }
        assert_eq!(syncs, 1000 / (MOST_PATCHES as u32 + 1));
    }

    /// A slot whose bytes may or may not have come to the disk since its last sync, and a table that is at some durable record.
    #[test]
    fn patches_over_any_leftover_give_what_the_record_spoke_of() {
        const LEN: usize = 40;
        let seed: u64 = rand::random();
        println!("seed {seed}");
        let mut rng = rand::rngs::StdRng::seed_from_u64(seed);
        for _ in 0..2000 {
            let mut patches = Patches::default();
            let mut slot = [0u8; LEN];
            // Each byte on the disk is the synced one or any written since.
            let mut possible: Vec<Vec<u8>> = vec![vec![0]; LEN];
            let mut table: Vec<(Patch, Vec<u8>)> = Vec::new();
            for _ in 0..rng.random_range(1..12) {
                let start = rng.random_range(0..LEN);
                let end = rng.random_range(start + 1..=LEN);
                for at in start..end {
                    slot[at] = rng.random();
                    possible[at].push(slot[at]);
                }
                patches.changed(start as u32, end as u32);
                if rng.random_bool(0.3) {
                    continue;
                }
                let plan = patches.plan(rng.random_bool(0.8));
                if plan.sync {
                    (0..LEN).for_each(|at| possible[at] = vec![slot[at]]);
                }
                table.retain(|(p, _)| !plan.delete.contains(&p.number));
                table.extend(plan.put.iter().map(|p| (*p, slot[p.start as usize..p.end as usize].to_vec())));
                patches.done();
                // Power is lost here, or behind further writes that no record speaks of.
                let mut more = possible.clone();
                if rng.random_bool(0.5) {
                    let patched = |at: usize| {
                        table.iter().any(|(p, _)| (p.start as usize..p.end as usize).contains(&at))
                    };
                    (0..LEN).filter(|at| patched(*at)).for_each(|at| more[at].push(rng.random()));
                }
                let mut disk: Vec<u8> =
                    more.iter().map(|values| values[rng.random_range(0..values.len())]).collect();
                for (p, bytes) in &table {
                    disk[p.start as usize..p.end as usize].copy_from_slice(bytes);
                }
                assert_eq!(disk, slot);
            }
        }
    }
}
