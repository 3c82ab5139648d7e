//! Blocks that were fetched ahead and will be read in a moment: their content in memory.
//!
//! Owns a bounded number of bytes, first come, first gone. What is fetched ahead goes to its slot past the kernel's cache, so that the
//! reader would have to wait for the disk without it. Pure; the clock is whoever calls [`Recent::tick`].

use std::collections::{HashMap, VecDeque};

use bytes::Bytes;

use crate::ids::BlockHash;

/// Bytes kept: more than is fetched ahead for one reader.
const MOST: u64 = 80 << 20;
/// Ticks after which what nobody asks for goes.
const TICKS: u64 = 3;

/// Content in memory.
#[derive(Debug, Default)]
pub(super) struct Recent {
    /// With the tick at which somebody wanted it last.
    blocks: HashMap<BlockHash, (Bytes, u64)>,
    order: VecDeque<BlockHash>,
    bytes: u64,
    now: u64,
}

impl Recent {
    /// Keeps verified content for a while.
    pub fn put(&mut self, hash: BlockHash, raw: Bytes) {
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

    /// Whether there is nothing.
    pub fn is_empty(&self) -> bool {
        self.blocks.is_empty()
    }

    /// The content of a block, if it is here.
    pub fn get(&mut self, hash: &BlockHash) -> Option<Bytes> {
        let (raw, wanted) = self.blocks.get_mut(hash)?;
        *wanted = self.now;
        Some(raw.clone())
    }

    /// A second or so has passed.
    pub fn tick(&mut self) {
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
        let mut recent = Recent::default();
        for i in 0..11 {
            let (hash, raw) = block(i);
            recent.put(hash, raw.clone());
            recent.put(hash, raw);
        }
        assert_eq!((recent.bytes, recent.order.len()), (MOST, 10));
        assert!(recent.get(&block(0).0).is_none());
        assert_eq!(recent.get(&block(8).0).unwrap(), block(8).1);
        for _ in 0..TICKS - 1 {
            recent.tick();
        }
        assert!(recent.get(&block(3).0).is_some());
        recent.tick();
        assert_eq!((recent.bytes, recent.order.len()), (8 << 20, 1));
        assert!(recent.get(&block(3).0).is_some() && recent.get(&block(8).0).is_none());
        recent.put(BlockHash([99; 32]), Bytes::from(vec![0; 21 << 20]));
        assert!(recent.get(&BlockHash([99; 32])).is_none(), "too large");
    }
}
