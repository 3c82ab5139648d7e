//! Fetching the objects that a load needs, each from the first holder that has it intact.
//!
//! Owns the order of asking and what a failure means. Applies nothing.

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use tokio::task::JoinHandle;

use super::super::fetch::{Meaning, Patience, meaning, read, rounds};
use super::super::{Damage, Place};
use super::LoadError;
use crate::format::checkpoint::{Manifest, Part, parse_part};
use crate::format::codec::FormatError;
use crate::format::names::ObjectName;
use crate::format::segment::{FOOTER_LEN, SegmentMeta, parse_footer, parse_meta};
use crate::ids::VolumeId;
use crate::replica::{Store, StoreError};

/// How much of a segment's end is asked for, in bytes; between these it follows what was needed lately.
const TAIL: (u64, u64) = (64 << 10, 4 << 20);
/// Records and index up to this length are fetched ahead of their turn. Larger ones wait for it, so
/// that only one of them is in memory.
const AHEAD: u64 = TAIL.1;

/// A spawned task that ends with its handle.
pub(super) struct Task<T>(JoinHandle<T>);

impl<T: Send + 'static> Task<T> {
    pub(super) fn spawn(work: impl Future<Output = T> + Send + 'static) -> Self {
        Self(tokio::spawn(work))
    }

    pub(super) async fn join(mut self) -> Result<T, LoadError> {
        (&mut self.0).await.map_err(|e| match e.try_into_panic() {
            // A bug of ours stays one, as if no task had been between.
            Ok(payload) => std::panic::resume_unwind(payload),
            Err(e) => LoadError::Unavailable { object: "an object".into(), detail: e.to_string() },
        })
    }
}

impl<T> Drop for Task<T> {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// What came of asking the holders of an object, one after the other.
pub(super) struct Fetched<T> {
    pub value: Option<T>,
    /// The holder that had it.
    pub from: Option<usize>,
    /// Copies found damaged on the way.
    damaged: Vec<Damage>,
    /// Holders that did not answer.
    silent: Vec<String>,
    /// Copies that say they are of a newer format.
    newer: Vec<String>,
    /// How many replicas answer. One that alone says "newer" is damaged.
    of: usize,
    /// It is too large to be fetched ahead: to be asked for when it is needed.
    pub postponed: bool,
}

/// When a segment is fetched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum When {
    /// Before it is needed, unless it is large.
    Ahead,
    /// Now that it is needed.
    Needed,
}

/// The value; or why there is none; or an error when that is not certain.
pub(super) fn settle<T>(
    object: &ObjectName,
    fetched: Fetched<T>,
    damaged: &mut Vec<Damage>,
) -> Result<Result<T, String>, LoadError> {
    let whys: Vec<_> = fetched.damaged.iter().map(|d| format!("replica {}: {}", d.replica, d.why)).collect();
    damaged.extend(fetched.damaged);
    match fetched.value {
        Some(value) => Ok(Ok(value)),
        None if 2 * fetched.newer.len() > fetched.of => {
            Err(LoadError::Newer { object: object.path(), why: fetched.newer.join("; ") })
        }
        None if !fetched.silent.is_empty() => {
            Err(LoadError::Unavailable { object: object.path(), detail: fetched.silent.join("; ") })
        }
        None => {
            let whys: Vec<_> = whys.into_iter().chain(fetched.newer).collect();
            Ok(Err(format!("no replica holds an intact copy ({})", whys.join("; "))))
        }
    }
}

/// Reads objects from whoever holds them.
#[derive(Clone)]
pub(super) struct Reader {
    stores: Arc<[Store]>,
    volume: VolumeId,
    bytes: Arc<AtomicU64>,
    /// How many of the stores answer.
    of: usize,
    /// How many bytes of a segment's end to ask for.
    tail: Arc<AtomicU64>,
}

enum ReadError {
    Store(StoreError),
    Format(FormatError),
    Postponed,
}

impl Reader {
    pub(super) fn new(stores: &[Store], volume: VolumeId, of: usize) -> Self {
        let tail = Arc::new(AtomicU64::new(TAIL.0 * 2));
        Self { stores: stores.into(), volume, bytes: Arc::default(), of, tail }
    }

    /// Bytes fetched so far.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    /// Begins to fetch a segment without its frames, asking its holders but those in `without`.
    pub(super) fn begin(&self, place: &Place, without: Vec<usize>, when: When) -> Task<Fetched<SegmentMeta>> {
        let (reader, mut place) = (self.clone(), place.clone());
        place.holders.retain(|(holder, _)| !without.contains(holder));
        Task::spawn(async move {
            let object = ObjectName::Segment(place.number, place.epoch).path();
            let (reader, place, path) = (&reader, &place, object.as_str());
            let get =
                |(holder, size), patience| reader.segment((holder, size), path, place, (when, patience));
            reader.ask(path, &place.holders, |(holder, _)| *holder, get).await
        })
    }

    /// Begins to find out how long a segment is, from the first holder whose copy has an intact end.
    pub(super) fn begin_end(&self, place: &Place) -> Task<Fetched<u64>> {
        let (reader, place) = (self.clone(), place.clone());
        Task::spawn(async move {
            let object = ObjectName::Segment(place.number, place.epoch).path();
            let (reader, place, path) = (&reader, &place, object.as_str());
            let get = |(holder, size), patience| reader.end((holder, size), path, place, patience);
            reader.ask(path, &place.holders, |(holder, _)| *holder, get).await
        })
    }

    /// Fetches one part of a checkpoint.
    pub(super) async fn part(&self, manifest: &Manifest, index: u32, holders: &[usize]) -> Fetched<Part> {
        let object = ObjectName::CheckpointPart(manifest.number, manifest.epoch, index).path();
        let len = manifest.parts.get(index as usize).map_or(0, |p| p.len);
        let path = object.as_str();
        let get = |holder, patience| async move {
            let bytes = self.read(holder, path, (0, len), patience).await?;
            parse_part(&bytes, manifest, index).map_err(ReadError::Format)
        };
        self.ask(path, holders, |holder| *holder, get).await
    }

    /// Asks the holders of an object one after the other until one gives it: all of them briefly, then with patience those that did
    /// not answer.
    async fn ask<H: Copy, T, F: Future<Output = Result<T, ReadError>>>(
        &self,
        object: &str,
        holders: &[H],
        number: impl Fn(&H) -> usize,
        get: impl Fn(H, Patience) -> F,
    ) -> Fetched<T> {
        let mut fetched = Fetched::nothing(self.of);
        let mut left = holders.to_vec();
        for patience in rounds(holders.len()) {
            fetched.silent.clear();
            let mut silent = Vec::new();
            for holder in left {
                let before = fetched.silent.len();
                let answer = get(holder, *patience).await;
                if self.take(&mut fetched, number(&holder), object, answer) {
                    return fetched;
                }
                if fetched.silent.len() > before {
                    silent.push(holder);
                }
            }
            left = silent;
        }
        fetched
    }

    async fn read(
        &self,
        holder: usize,
        object: &str,
        range: (u64, u64),
        patience: Patience,
    ) -> Result<Bytes, ReadError> {
        let bytes =
            read(&self.stores[holder], object, Some(range), patience).await.map_err(ReadError::Store)?;
        self.bytes.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        Ok(bytes)
    }

    /// A segment's length, when its end is intact.
    async fn end(
        &self,
        (holder, size): (usize, u64),
        object: &str,
        place: &Place,
        patience: Patience,
    ) -> Result<u64, ReadError> {
        let footer = size.min(FOOTER_LEN as u64);
        let tail = self.read(holder, object, (size - footer, footer), patience).await?;
        parse_footer(&tail, size)
            .and_then(|f| f.expect(self.volume, place.number, place.epoch))
            .map(|()| size)
            .map_err(ReadError::Format)
    }

    /// Footer, index and records of a segment; the frames stay where they are.
    async fn segment(
        &self,
        (holder, size): (usize, u64),
        object: &str,
        place: &Place,
        (when, patience): (When, Patience),
    ) -> Result<SegmentMeta, ReadError> {
        let ask = self.tail.load(Ordering::Relaxed).min(size);
        let tail = self.read(holder, object, (size - ask, ask), patience).await?;
        let footer = parse_footer(&tail, size).map_err(ReadError::Format)?;
        footer.expect(self.volume, place.number, place.epoch).map_err(ReadError::Format)?;
        let range = footer.meta_range();
        let tail_start = size - ask;
        let needed = range.end - range.start + FOOTER_LEN as u64;
        self.tail.store((needed + needed / 4).clamp(TAIL.0, TAIL.1), Ordering::Relaxed);
        if when == When::Ahead && needed > AHEAD {
            return Err(ReadError::Postponed);
        }
        let meta = if range.start >= tail_start {
            tail.slice((range.start - tail_start) as usize..(range.end - tail_start) as usize)
        } else if needed > AHEAD {
            // What is large is read once more as a whole instead of being put together, which would
            // take it twice in memory.
            drop(tail);
            self.read(holder, object, (range.start, range.end - range.start), patience).await?
        } else {
            let missing_end = tail_start.min(range.end);
            let missing = (range.start, missing_end - range.start);
            let head = self.read(holder, object, missing, patience).await?;
            let mut meta = head.to_vec();
            if range.end > tail_start {
                meta.extend_from_slice(&tail[..(range.end - tail_start) as usize]);
            }
            meta.into()
        };
        parse_meta(&footer, &meta).map_err(ReadError::Format)
    }

    /// Notes an answer; true when the search is over.
    fn take<T>(
        &self,
        fetched: &mut Fetched<T>,
        holder: usize,
        object: &str,
        answer: Result<T, ReadError>,
    ) -> bool {
        let replica = self.stores[holder].name().clone();
        let why = match answer {
            Ok(value) => {
                fetched.value = Some(value);
                fetched.from = Some(holder);
                return true;
            }
            Err(ReadError::Postponed) => {
                fetched.postponed = true;
                return true;
            }
            Err(ReadError::Format(e)) if e.newer => {
                fetched.newer.push(format!("replica {replica}: {e}"));
                return false;
            }
            Err(ReadError::Store(e)) if meaning(&e) == Meaning::Unreachable => {
                fetched.silent.push(e.to_string());
                return false;
            }
            Err(ReadError::Store(e)) => format!("{} ({})", e.kind, e.detail),
            Err(ReadError::Format(e)) => e.to_string(),
        };
        fetched.damaged.push(Damage { replica, object: object.to_owned(), why });
        false
    }
}

impl<T> Fetched<T> {
    fn nothing(of: usize) -> Self {
        Self {
            value: None,
            from: None,
            damaged: Vec::new(),
            silent: Vec::new(),
            newer: Vec::new(),
            of,
            postponed: false,
        }
    }
}
