//! Segments in memory on their way to several replicas: sealed or read once, sent to all of them.
//!
//! Owns a bounded number of bytes that somebody may want next; those sent last stay longest. Holds only what was checked, or was
//! never out of memory. Knows no file and no replica.

use std::collections::VecDeque;
use std::sync::Arc;

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::sync::OnceCell;

use crate::ids::{Epoch, SegmentNo};

/// Bytes kept.
const MOST_BYTES: u64 = 64 << 20;

type Key = (SegmentNo, Epoch);
type Place = Arc<OnceCell<Bytes>>;

/// The segments in memory.
#[derive(Debug, Default)]
pub struct Shelf {
    /// Least recently wanted first, each with its length.
    places: Mutex<VecDeque<(Key, u64, Place)>>,
}

impl Shelf {
    /// Puts a segment there.
    pub fn put(&self, number: SegmentNo, epoch: Epoch, bytes: Bytes) {
        let len = bytes.len() as u64;
        let mut places = self.places.lock();
        places.retain(|(key, ..)| *key != (number, epoch));
        places.push_back(((number, epoch), len, Arc::new(OnceCell::new_with(Some(bytes)))));
        shorten(&mut places);
    }

    /// A segment of `len` bytes: from here, else what `read` gives, which is kept for those who ask next. Who asks meanwhile waits for
    /// the one who reads. A failure is nobody else's.
    pub async fn get<E>(
        &self,
        number: SegmentNo,
        epoch: Epoch,
        len: u64,
        read: impl Future<Output = Result<Bytes, E>>,
    ) -> Result<Bytes, E> {
        let key = (number, epoch);
        let place = {
            let mut places = self.places.lock();
            let found = places.iter().position(|(k, ..)| *k == key).and_then(|at| places.remove(at));
            let entry = found.unwrap_or_else(|| (key, len, Place::default()));
            let place = Arc::clone(&entry.2);
            places.push_back(entry);
            shorten(&mut places);
            place
        };
        let got = place.get_or_try_init(|| read).await.cloned();
        if got.is_err() {
            self.places.lock().retain(|(k, _, p)| *k != key || !Arc::ptr_eq(p, &place));
        }
        got
    }

    /// Takes away what nobody will want any more.
    pub fn forget(&self, segments: &[Key]) {
        self.places.lock().retain(|(key, ..)| !segments.contains(key));
    }

    /// Bytes kept here.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.places.lock().iter().map(|(_, len, _)| len).sum()
    }
}

/// Lets the least recently wanted go, until the rest fits; one always stays, however large.
fn shorten(places: &mut VecDeque<(Key, u64, Place)>) {
    let mut bytes: u64 = places.iter().map(|(_, len, _)| len).sum();
    while bytes > MOST_BYTES
        && places.len() > 1
        && let Some((_, len, _)) = places.pop_front()
    {
        bytes -= len;
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    fn segment(n: u64) -> Bytes {
        Bytes::from(vec![n as u8; 16 << 20])
    }

    #[tokio::test]
    async fn what_several_want_is_read_once_and_goes_when_nobody_wants_it() {
        let shelf = Shelf::default();
        let reads = AtomicU32::new(0);
        let get = |n: u64| {
            let reads = &reads;
            let read = async move {
                reads.fetch_add(1, Ordering::Relaxed);
                tokio::task::yield_now().await;
                Ok::<_, ()>(segment(n))
            };
            shelf.get(SegmentNo(n), Epoch(1), 16 << 20, read)
        };
        let (a, b) = tokio::join!(get(1), get(1));
        assert_eq!((a, b), (Ok(segment(1)), Ok(segment(1))));
        assert_eq!(reads.load(Ordering::Relaxed), 1);
        shelf.put(SegmentNo(2), Epoch(1), segment(2));
        get(2).await.unwrap();
        assert_eq!(reads.load(Ordering::Relaxed), 1);
        for n in 3..=4 {
            get(n).await.unwrap();
        }
        get(1).await.unwrap();
        get(5).await.unwrap();
        assert_eq!((shelf.bytes(), reads.load(Ordering::Relaxed)), (64 << 20, 4));
        get(2).await.unwrap();
        assert_eq!(reads.load(Ordering::Relaxed), 5, "the least recently wanted one went");
        shelf.forget(&[1, 2, 3, 4].map(|n| (SegmentNo(n), Epoch(1))));
        assert_eq!(shelf.bytes(), 16 << 20);
    }

    #[tokio::test]
    async fn a_failure_is_not_kept() {
        let shelf = Shelf::default();
        let at = (SegmentNo(1), Epoch(1));
        shelf.get(at.0, at.1, 5, async { Err::<Bytes, _>("gone") }).await.unwrap_err();
        assert_eq!(shelf.bytes(), 0);
        let got = shelf.get(at.0, at.1, 5, async { Ok::<_, ()>(Bytes::from_static(b"bytes")) }).await;
        assert_eq!(got.unwrap(), "bytes");
    }
}
