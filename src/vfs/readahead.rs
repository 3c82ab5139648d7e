//! When to fetch ahead: a window that doubles while a file is read in order.
//!
//! Pure; knows neither blocks nor replicas.

/// Largest window in bytes, where the cache is not small.
pub(super) const MOST: u64 = 48 << 20;
/// Smallest number of blocks that the largest window has.
const LEAST_BLOCKS: u64 = 2;
/// By how many bytes a read may lie before or behind where the last one ended and still count as in order: the kernel asks for several
/// pieces at a time, and they overtake one another.
const NEAR: u64 = 2 << 20;
/// Bytes read in order before anything is fetched ahead: who reads a few bytes somewhere gets a little more from the kernel, and that is
/// no reading in order.
const LEAST: u64 = 256 << 10;

/// What a file's reads looked like so far.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Window {
    next_offset: u64,
    /// Where reading in order began.
    since: u64,
    blocks: u64,
    /// First block index not yet asked for.
    asked: u64,
}

impl Window {
    /// Notes a read of `[offset, offset + len)`; answers the block indexes to fetch ahead, `[from, to)`, empty for none. No more than
    /// `most` bytes are ahead of the reader (but always some blocks).
    pub fn note(&mut self, offset: u64, len: u64, block_size: u64, most: u64) -> (u64, u64) {
        let sequential = offset.abs_diff(self.next_offset) <= NEAR;
        let end = offset + len;
        let here = end.div_ceil(block_size);
        if !sequential {
            *self = Self { next_offset: end, since: offset, blocks: 0, asked: here };
            return (0, 0);
        }
        self.next_offset = self.next_offset.max(end);
        if self.next_offset.saturating_sub(self.since) < LEAST {
            return (0, 0);
        }
        self.asked = self.asked.max(here);
        // Ask again only when a third of what was asked for is used up: in pieces worth several requests, and long before the rest is.
        if self.asked > here + self.blocks * 2 / 3 {
            return (0, 0);
        }
        self.blocks = (self.blocks * 2).clamp(LEAST_BLOCKS, (most / block_size).max(LEAST_BLOCKS));
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
            let (from, to) = w.note(i * 65536, 65536, 65536, 2 << 20);
            if from < to {
                assert!(from >= asked, "block {from} asked twice");
                assert!(to - (i + 1) <= 32);
                asked = to;
            }
        }
        assert!(asked >= 200 + 32 / 2);
    }

    #[test]
    fn reads_that_overtake_one_another_are_in_order() {
        let mut w = Window::default();
        let mut asked = 0;
        for i in (0..800u64).map(|i| i ^ 3) {
            let (from, to) = w.note(i << 17, 1 << 17, 1 << 20, 32 << 20);
            assert!(from == to || from >= asked);
            asked = asked.max(to);
        }
        assert_eq!(w.blocks, 32);
        assert!(asked >= 100 + 32 / 2);
    }

    #[test]
    fn a_little_more_than_a_few_bytes_asks_for_nothing() {
        let mut w = Window::default();
        for offset in [500 << 20, (500 << 20) + 16384, (500 << 20) + 65536] {
            assert_eq!(w.note(offset, 65536, 1 << 20, MOST), (0, 0));
        }
        let (from, to) = w.note((500 << 20) + 131_072, 131_072, 1 << 20, MOST);
        assert!(from == 501 && to > from, "{from} {to}");
    }

    #[test]
    fn random_reads_ask_for_nothing() {
        let mut w = Window::default();
        w.note(0, 4096, 65536, MOST);
        for i in [900u64, 3, 700, 12, 555] {
            assert_eq!(w.note(i << 24, 4096, 65536, MOST), (0, 0));
        }
    }
}
