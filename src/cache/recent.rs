//! Blocks that were fetched ahead and will be read in a moment: their content in memory.
//!
//! Owns a bounded number of bytes, first come, first gone. What is fetched ahead goes to its slot past the kernel's cache, so that the
//! reader would have to wait for the disk without it. The clock is whoever calls [`Recent::tick`].

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use bytes::Bytes;
use parking_lot::Mutex;

use crate::ids::BlockHash;

/// Bytes kept: more than is fetched ahead for one reader.
const MOST: u64 = 80 << 20;
/// Ticks after which what nobody asks for goes.
const TICKS: u64 = 3;

/// Content in memory.
#[derive(Debug, Default)]
pub(super) struct Recent {
    kept: Mutex<Kept>,
    /// Whether there is anything: every read of a cached block asks, and as a rule there is nothing. Changed under the lock and read
    /// without it, so it is a hint, by which nobody can read old bytes. Who is told "nothing" reads the slot, which has the same ones, since
    /// both were compared with the hash; who is told "something" looks under the lock. (Who finds a block in the LRU that was put here
    /// before does see it: the LRU's lock lies between.)
    some: AtomicBool,
}

#[derive(Debug, Default)]
struct Kept {
    /// With the tick at which somebody wanted it last.
    blocks: HashMap<BlockHash, (Bytes, u64)>,
    order: VecDeque<BlockHash>,
    bytes: u64,
    now: u64,
}

impl Recent {
    /// Keeps verified content for a while.
    pub fn put(&self, hash: BlockHash, raw: Bytes) {
        let mut kept = self.kept.lock();
        kept.put(hash, raw);
        self.some.store(!kept.blocks.is_empty(), Relaxed);
    }

    /// Whether there is nothing. Costs no lock.
    pub fn is_empty(&self) -> bool {
        !self.some.load(Relaxed)
    }

    /// The content of a block, if it is here.
    pub fn get(&self, hash: &BlockHash) -> Option<Bytes> {
        if self.is_empty() {
            return None;
        }
        let kept = &mut *self.kept.lock();
        let (raw, wanted) = kept.blocks.get_mut(hash)?;
        *wanted = kept.now;
        Some(raw.clone())
    }

    /// A second or so has passed.
    pub fn tick(&self) {
        let mut kept = self.kept.lock();
        kept.tick();
        self.some.store(!kept.blocks.is_empty(), Relaxed);
    }
}

impl Kept {
    fn put(&mut self, hash: BlockHash, raw: Bytes) {
        let len = raw.len() as u64;
        if len > MOST / 4 || self.blocks.contains_key(&hash) {
            return;
        }
        self.bytes += len;
        self.blocks.insert(hash, (raw, self.now));
        self.order.push_back(hash);
        while self.bytes > MOST {
            let Some(first) = self.order.pop_front() else { return };
            if let Some((raw, _)) = self.blocks.remove(&first) {
                self.bytes -= raw.len() as u64;
            }
        }
    }

    fn tick(&mut self) {
        self.now += 1;
        let (now, blocks) = (self.now, &mut self.blocks);
        blocks.retain(|_, (_, wanted)| *wanted + TICKS > now);
        self.order.retain(|hash| blocks.contains_key(hash));
        self.bytes = blocks.values().map(|(raw, _)| raw.len() as u64).sum();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_come_first_gone_and_nothing_stays_unwanted() {
        let block = |i: u8| (BlockHash([i; 32]), Bytes::from(vec![i; 8 << 20]));
        let recent = Recent::default();
        let held = || {
            let kept = recent.kept.lock();
            (kept.bytes, kept.order.len())
        };
        for i in 0..11 {
            let (hash, raw) = block(i);
            recent.put(hash, raw.clone());
            recent.put(hash, raw);
        }
        assert_eq!(held(), (MOST, 10));
        assert!(recent.get(&block(0).0).is_none());
        assert_eq!(recent.get(&block(8).0).unwrap(), block(8).1);
        for _ in 0..TICKS - 1 {
            recent.tick();
        }
        assert!(recent.get(&block(3).0).is_some());
        recent.tick();
        assert_eq!(held(), (8 << 20, 1));
        assert!(recent.get(&block(3).0).is_some() && recent.get(&block(8).0).is_none());
        recent.put(BlockHash([99; 32]), Bytes::from(vec![0; 21 << 20]));
        assert!(recent.get(&BlockHash([99; 32])).is_none(), "too large");
        for _ in 0..TICKS {
            recent.tick();
        }
        assert_eq!((held(), recent.some.load(Relaxed)), ((0, 0), false));
        recent.put(block(3).0, block(3).1);
        assert_eq!(recent.get(&block(3).0).unwrap(), block(3).1);
    }
}
