//! Fetching the content of many blocks: few large ranged reads, each block verified.
//!
//! Owns the grouping of frames into requests and the search for an intact copy. Knows no files.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;

use super::fetch::{Meaning, Patience, meaning, read, rounds};
use super::{Damage, Plan};
use crate::format::frame;
use crate::format::names::ObjectName;
use crate::format::tables::BlockEntry;
use crate::ids::{BlockHash, Epoch, SegmentNo};
use crate::replica::Store;

/// Bytes between two frames that are fetched along rather than asked for apart.
const GAP: u64 = 64 << 10;
/// A request grows until it spans this many bytes.
const REQUEST: u64 = 4 << 20;

/// The replicas that hold the frames.
#[derive(Clone)]
pub struct Source {
    stores: Arc<[Store]>,
    holders: Arc<BTreeMap<(SegmentNo, Epoch), Vec<usize>>>,
    /// All replicas of the volume.
    all: Arc<[usize]>,
}

impl Source {
    /// The stores that were surveyed, asked for each segment in the order in which the plan knows
    /// its holders.
    #[must_use]
    pub fn new(plan: &Plan, stores: &[Store]) -> Self {
        let holders = plan.segments.values().map(|place| {
            let holders = place.holders.iter().map(|(holder, _)| *holder).collect();
            ((place.number, place.epoch), holders)
        });
        let excluded = |i: &usize| plan.excluded.iter().any(|(e, _)| e == i);
        let all = (0..stores.len()).filter(|i| !excluded(i)).collect();
        Self { stores: stores.into(), holders: Arc::new(holders.collect()), all }
    }

    fn holders(&self, segment: (SegmentNo, Epoch)) -> Vec<usize> {
        // A segment that nobody lists is asked for everywhere: a listing may be behind.
        self.holders.get(&segment).cloned().unwrap_or_else(|| self.all.to_vec())
    }

    /// Whether no replica answers any more, and none is waited for.
    pub(super) fn is_away(&self) -> bool {
        let is_away = |i: &usize| {
            let store = &self.stores[*i];
            store.absence().away_for(Instant::now()).is_some_and(|away| away >= store.patience())
        };
        self.all.iter().all(is_away)
    }

    /// Fetches the frames of a request; one answer per frame, in the same order.
    pub(super) async fn fetch(&self, request: &Request) -> Answer {
        let holders = self.holders(request.segment);
        let mut asking = Asking::new(request);
        let mut left = holders.clone();
        for patience in rounds(holders.len()) {
            let mut silent = Vec::new();
            // What a replica said that is asked once more does not count.
            asking.silence.iter_mut().for_each(Vec::clear);
            for holder in std::mem::take(&mut left) {
                if !asking.ask(&self.stores[holder], *patience).await {
                    silent.push(holder);
                }
                if asking.is_done() {
                    return asking.answer();
                }
            }
            left = silent;
            if left.is_empty() {
                break;
            }
        }
        asking.answer()
    }
}

/// A request while its holders are asked, one after the other.
struct Asking<'a> {
    request: &'a Request,
    blocks: Vec<Option<Bytes>>,
    damaged: Vec<Damage>,
    /// What replicas said that answered, for each frame.
    whys: Vec<Vec<String>>,
    /// Why others did not answer, for each frame.
    silence: Vec<Vec<String>>,
}

impl<'a> Asking<'a> {
    fn new(request: &'a Request) -> Self {
        let n = request.frames.len();
        Self {
            request,
            blocks: vec![None; n],
            damaged: Vec::new(),
            whys: vec![Vec::new(); n],
            silence: vec![Vec::new(); n],
        }
    }

    fn wanted(&self) -> Vec<usize> {
        (0..self.blocks.len()).filter(|i| self.blocks[*i].is_none()).collect()
    }

    fn is_done(&self) -> bool {
        self.blocks.iter().all(Option::is_some)
    }

    /// Asks one replica for what is still wanted. False when it did not answer.
    async fn ask(&mut self, store: &Store, patience: Patience) -> bool {
        let request = self.request;
        let mut wanted = self.wanted();
        // Once together, so that one bad frame costs one request; after that each alone.
        if wanted.len() == request.frames.len() {
            let range = (request.start, request.len());
            match read(store, &request.object(), Some(range), patience).await {
                Ok(bytes) => {
                    for i in wanted {
                        let (offset, entry) = &request.frames[i];
                        let at = (offset - request.start) as usize;
                        let stored = bytes.get(at..at + entry.loc.stored_len as usize).unwrap_or_default();
                        self.decode(i, store, stored);
                    }
                    return true;
                }
                Err(e) if meaning(&e) == Meaning::Unreachable => {
                    wanted.into_iter().for_each(|i| self.silence[i].push(e.to_string()));
                    return false;
                }
                // Perhaps cut short: single frames may be there still.
                Err(e) => self.note(store, format!("{} ({})", e.kind, e.detail)),
            }
            wanted = self.wanted();
        }
        let mut answers = true;
        for i in wanted {
            let entry = &request.frames[i].1;
            let range = (entry.loc.offset, u64::from(entry.loc.stored_len));
            match read(store, &request.object(), Some(range), patience).await {
                Ok(bytes) => self.decode(i, store, &bytes),
                Err(e) if meaning(&e) == Meaning::Unreachable => {
                    answers = false;
                    self.silence[i].push(e.to_string());
                }
                Err(e) => {
                    self.note(store, e.to_string());
                    self.whys[i].push(format!("replica {}: {e}", store.name()));
                }
            }
        }
        answers
    }

    fn decode(&mut self, frame: usize, store: &Store, stored: &[u8]) {
        match frame::decode_entry(stored, &self.request.frames[frame].1) {
            Ok(raw) => self.blocks[frame] = Some(raw),
            Err(e) => {
                self.whys[frame].push(format!("replica {}: {e}", store.name()));
                if !e.newer {
                    self.note(store, e.to_string());
                }
            }
        }
    }

    fn note(&mut self, store: &Store, why: String) {
        let object = self.request.object();
        self.damaged.push(Damage { replica: store.name().clone(), object, why });
    }

    fn answer(self) -> Answer {
        let whys = self.whys.into_iter().zip(self.silence);
        let blocks = self.blocks.into_iter().zip(whys).map(|(block, (whys, silence))| match block {
            Some(raw) => Ok(raw),
            None if !silence.is_empty() => Err(Missing::Unreachable(silence.join("; "))),
            None if whys.is_empty() => Err(Missing::Lost("no replica holds its segment".into())),
            None => Err(Missing::Lost(whys.join("; "))),
        });
        Answer { blocks: blocks.collect(), damaged: self.damaged }
    }
}

/// Frames of one segment that are fetched together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Request {
    pub segment: (SegmentNo, Epoch),
    pub start: u64,
    pub end: u64,
    /// Offset and entry, ascending by offset; each frame once for every content that is expected of
    /// it.
    pub frames: Vec<(u64, BlockEntry)>,
}

impl Request {
    fn object(&self) -> String {
        ObjectName::Segment(self.segment.0, self.segment.1).path()
    }

    fn len(&self) -> u64 {
        self.end - self.start
    }
}

/// What came of a request.
pub(super) struct Answer {
    /// For each frame its block's content, or what each replica said.
    pub blocks: Vec<Result<Bytes, Missing>>,
    /// Copies found damaged.
    pub damaged: Vec<Damage>,
}

/// Why there is no content of a block, with what each replica said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Missing {
    /// Every replica answered, and none holds an intact copy.
    Lost(String),
    /// A replica that may hold it did not answer.
    Unreachable(String),
}

/// One block that is wanted, for a place that the caller knows by `what`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Want<T> {
    pub entry: BlockEntry,
    pub what: T,
}

/// Groups wants into requests, in the order of segments. The second part says for each want of a
/// request which of its frames it is: blocks of equal content share one.
pub(super) fn requests<T: Copy>(mut wants: Vec<Want<T>>) -> Vec<(Request, Vec<(usize, T)>)> {
    let place = |e: &BlockEntry| (e.loc.segment, e.loc.epoch, e.loc.offset, e.loc.stored_len);
    wants.sort_by_key(|w| (place(&w.entry), w.entry.hash));
    let mut out: Vec<(Request, Vec<(usize, T)>)> = Vec::new();
    let mut last: Option<(BlockHash, (SegmentNo, Epoch, u64, u32))> = None;
    for want in wants {
        let loc = &want.entry.loc;
        let segment = (loc.segment, loc.epoch);
        let end = loc.offset.saturating_add(u64::from(loc.stored_len));
        let same = last == Some((want.entry.hash, place(&want.entry)));
        last = Some((want.entry.hash, place(&want.entry)));
        let open = out.last_mut().filter(|(r, _)| {
            r.segment == segment
                && (same
                    || (loc.offset <= r.end.saturating_add(GAP) && end.saturating_sub(r.start) <= REQUEST))
        });
        match open {
            Some((request, users)) => {
                if !same {
                    request.frames.push((loc.offset, want.entry));
                    request.end = request.end.max(end);
                }
                users.push((request.frames.len() - 1, want.what));
            }
            None => {
                let frames = vec![(loc.offset, want.entry)];
                out.push((Request { segment, start: loc.offset, end, frames }, vec![(0, want.what)]));
            }
        }
    }
    out
}
