//! When to fetch ahead: a window that doubles while a file is read in order.
//!
//! Pure; knows neither blocks nor replicas.

/// Largest window in blocks.
const MAX_BLOCKS: u64 = 32;

/// What a file's reads looked like so far.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Window {
    next_offset: u64,
    blocks: u64,
    /// First block index not yet asked for.
    asked: u64,
}

impl Window {
    /// Notes a read of `[offset, offset + len)`; answers the block indexes to fetch ahead, `[from, to)`, empty for none.
    pub fn note(&mut self, offset: u64, len: u64, block_size: u64) -> (u64, u64) {
        let sequential = offset == self.next_offset
            || (offset < self.next_offset && offset + (1 << 20) > self.next_offset);
        let end = offset + len;
        let here = end.div_ceil(block_size);
        if !sequential {
            *self = Self { next_offset: end, blocks: 0, asked: here };
            return (0, 0);
        }
        self.next_offset = self.next_offset.max(end);
        self.asked = self.asked.max(here);
        // Ask again only when half of what was asked for is used up.
        if self.asked > here + self.blocks / 2 {
            return (0, 0);
        }
        self.blocks = (self.blocks * 2).clamp(2, MAX_BLOCKS);
        let from = self.asked;
        self.asked = here + self.blocks;
        (from, self.asked)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn grows_while_reading_in_order_and_never_asks_twice() {
        let mut w = Window::default();
        let mut asked = 0;
        for i in 0..200u64 {
            let (from, to) = w.note(i * 65536, 65536, 65536);
            if from < to {
                assert!(from >= asked, "block {from} asked twice");
                assert!(to - (i + 1) <= MAX_BLOCKS);
                asked = to;
            }
        }
        assert!(asked >= 200 + MAX_BLOCKS / 2);
    }

    #[test]
    fn random_reads_ask_for_nothing() {
        let mut w = Window::default();
        w.note(0, 4096, 65536);
        for i in [900u64, 3, 700, 12, 555] {
            assert_eq!(w.note(i << 24, 4096, 65536), (0, 0));
        }
    }
}
