//! Segments in memory on their way to several replicas: sealed or read once, sent to all of them.
//!
//! Owns a bounded number of bytes that somebody may want next; those sent last stay longest. What had to go is still found as long as it
//! is being sent, since then it is in memory all the same. Holds only what was checked, or was never out of memory. Knows no file and no
//! replica.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::sync::OnceCell;

use super::digest;
use crate::ids::{Epoch, SegmentNo};

/// Bytes kept.
const MOST_BYTES: u64 = 64 << 20;

/// Replicas take segments briskly when the last one was taken at most so long ago.
const BRISK: Duration = Duration::from_millis(500);

type Key = (SegmentNo, Epoch);

/// One segment.
#[derive(Debug)]
struct Place {
    key: Key,
    len: u64,
    bytes: Arc<OnceCell<Arc<Bytes>>>,
    /// Whether somebody has asked for it.
    taken: bool,
}

/// The segments in memory.
#[derive(Debug, Default)]
pub struct Shelf {
    /// Least recently wanted first.
    places: Mutex<VecDeque<Place>>,
    /// What was given to somebody, while anybody has it.
    lent: Mutex<HashMap<Key, Weak<Bytes>>>,
    /// When a segment was taken last.
    taken_at: Mutex<Option<Instant>>,
}

/// Bytes in somebody's hands.
struct Lent(Arc<Bytes>);

impl AsRef<[u8]> for Lent {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

impl Shelf {
    /// Puts a segment there, unless it is full of others that nobody has asked for yet: those are sent first.
    pub fn put(&self, number: SegmentNo, epoch: Epoch, bytes: Bytes) {
        let (key, len) = ((number, epoch), bytes.len() as u64);
        let mut places = self.places.lock();
        places.retain(|p| p.key != key);
        self.lent.lock().remove(&key);
        if make_room(&mut places, len) {
            let bytes = Arc::new(OnceCell::new_with(Some(Arc::new(digest::once(bytes)))));
            places.push_back(Place { key, len, bytes, taken: false });
        }
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
        let bytes = {
            let mut places = self.places.lock();
            *self.taken_at.lock() = Some(Instant::now());
            let found = places.iter().position(|p| p.key == key).and_then(|at| places.remove(at));
            if found.is_none()
                && let Some(lent) = self.lent.lock().get(&key).and_then(Weak::upgrade)
            {
                return Ok(Bytes::from_owner(Lent(lent)));
            }
            let place = found.unwrap_or_else(|| {
                while !make_room(&mut places, len) {
                    places.pop_front();
                }
                Place { key, len, bytes: Arc::default(), taken: true }
            });
            let bytes = Arc::clone(&place.bytes);
            places.push_back(Place { taken: true, ..place });
            bytes
        };
        let read = async { read.await.map(|bytes| Arc::new(digest::once(bytes))) };
        match bytes.get_or_try_init(|| read).await {
            Ok(got) => {
                let mut lent = self.lent.lock();
                lent.retain(|_, bytes| bytes.strong_count() > 0);
                lent.insert(key, Arc::downgrade(got));
                Ok(Bytes::from_owner(Lent(Arc::clone(got))))
            }
            Err(e) => {
                self.places.lock().retain(|p| p.key != key || !Arc::ptr_eq(&p.bytes, &bytes));
                Err(e)
            }
        }
    }

    /// Whether more than half of the room is taken by segments that wait for being sent, although some are just being sent: who waits a
    /// little before the next ones saves reading them again. Where nothing has been taken for a while, waiting would be in vain.
    #[must_use]
    pub fn is_crowded(&self, now: Instant) -> bool {
        let brisk = self.taken_at.lock().is_some_and(|at| now.saturating_duration_since(at) < BRISK);
        let waiting: u64 = self.places.lock().iter().filter(|p| !p.taken).map(|p| p.len).sum();
        brisk && waiting > MOST_BYTES / 2
    }

    /// Takes away what nobody will want any more.
    pub fn forget(&self, segments: &[Key]) {
        self.places.lock().retain(|p| !segments.contains(&p.key));
        self.lent.lock().retain(|key, _| !segments.contains(key));
    }

    /// Bytes kept here.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        total(&self.places.lock())
    }
}

fn total(places: &VecDeque<Place>) -> u64 {
    places.iter().map(|p| p.len).sum()
}

/// Lets go of what somebody had already, until `len` bytes fit; one always fits alone.
fn make_room(places: &mut VecDeque<Place>, len: u64) -> bool {
    loop {
        if places.is_empty() || total(places).saturating_add(len) <= MOST_BYTES {
            return true;
        }
        let Some(taken) = places.iter().position(|p| p.taken) else { return false };
        places.remove(taken);
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
    async fn what_nobody_has_asked_for_stays_before_what_comes_later() {
        let shelf = Shelf::default();
        let get = |n: u64| shelf.get(SegmentNo(n), Epoch(1), 16 << 20, async { Err::<Bytes, _>("not here") });
        (1..=6).for_each(|n| shelf.put(SegmentNo(n), Epoch(1), segment(n)));
        assert!(!shelf.is_crowded(Instant::now()), "nobody takes anything");
        assert_eq!(get(1).await, Ok(segment(1)));
        let now = Instant::now();
        assert!(shelf.is_crowded(now) && !shelf.is_crowded(now + BRISK * 2));
        shelf.put(SegmentNo(7), Epoch(1), segment(7));
        for (n, kept) in [(2, true), (3, true), (4, true), (7, true), (5, false)] {
            assert_eq!(get(n).await.is_ok(), kept, "{n}");
        }
        assert!(!shelf.is_crowded(Instant::now()), "all are being sent");
    }

    #[tokio::test]
    async fn what_is_being_sent_is_found_without_a_place() {
        let shelf = Shelf::default();
        let get = |n: u64, read: bool| {
            shelf.get(SegmentNo(n), Epoch(1), 16 << 20, async move {
                if read { Ok(segment(n)) } else { Err("not here") }
            })
        };
        let sent = get(1, true).await.unwrap();
        for n in 2..=5 {
            get(n, true).await.unwrap();
        }
        assert_eq!(shelf.bytes(), 64 << 20);
        let again = get(1, false).await.unwrap();
        assert_eq!((again.as_ptr(), again.len()), (sent.as_ptr(), sent.len()), "the same memory");
        drop(sent);
        drop(get(1, false).await.unwrap());
        drop(again);
        assert_eq!(get(1, false).await, Err("not here"), "nobody has it any more");
        // Another segment may have the number of one that was given up.
        let sent = get(6, true).await.unwrap();
        shelf.forget(&[(SegmentNo(6), Epoch(1))]);
        assert_eq!(get(6, false).await, Err("not here"));
        drop(sent);
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
