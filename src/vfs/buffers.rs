//! Buffers for what is read, used again: a fresh one costs as much as the copy into it, in page faults and zeros.
//!
//! Owns a few of them. Knows nothing of what is read.

use bytes::{Bytes, BytesMut};
use parking_lot::Mutex;

/// Buffers kept at most.
const KEPT: usize = 8;
/// Bytes of a buffer that is worth keeping, at least and at most.
const LEAST: usize = 64 << 10;
const MOST: usize = 2 << 20;

static SPARE: Mutex<Vec<BytesMut>> = Mutex::new(Vec::new());

/// A buffer of `len` bytes; what is in it is of no meaning.
pub(super) fn take(len: usize) -> BytesMut {
    let spare = if len >= LEAST { SPARE.lock().pop() } else { None };
    match spare {
        // Zeros only what it was never filled with.
        Some(mut buffer) => {
            buffer.resize(len, 0);
            buffer
        }
        None => BytesMut::zeroed(len),
    }
}

/// Takes back what [`FileSystem::read`](super::api::FileSystem::read) answered, when nobody else holds it.
pub fn give_back(bytes: Bytes) {
    if !(LEAST..=MOST).contains(&bytes.len()) {
        return;
    }
    if let Ok(buffer) = bytes.try_into_mut()
        && buffer.capacity() <= MOST
    {
        let mut spare = SPARE.lock();
        if spare.len() < KEPT {
            spare.push(buffer);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_come_back_unless_somebody_holds_them() {
        for len in [LEAST, 4 * LEAST, 2 * LEAST, LEAST] {
            let mut buffer = take(len);
            assert_eq!(buffer.len(), len);
            buffer.fill(7);
            let bytes = buffer.freeze();
            let held = bytes.clone();
            give_back(bytes);
            assert!(held.iter().all(|b| *b == 7), "it is not given away while it is held");
            give_back(held);
        }
        assert!(SPARE.lock().len() <= KEPT);
    }
}
