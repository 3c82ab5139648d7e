//! Fetching the content of many blocks: few large ranged reads, each block verified.
//!
//! Owns the grouping of frames into requests and the search for an intact copy. Knows no files.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;

use super::fetch::{Meaning, meaning, read};
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
    /// The stores that were surveyed, asked for each segment in the order in which the plan knows its holders.
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

    /// Fetches the frames of a request; one answer per frame, in the same order.
    pub(super) async fn fetch(&self, request: &Request) -> Answer {
        let mut answer = Answer {
            blocks: vec![Err("no replica holds its segment".into()); request.frames.len()],
            damaged: Vec::new(),
        };
        let mut whys: Vec<Vec<String>> = vec![Vec::new(); request.frames.len()];
        for (nth, holder) in self.holders(request.segment).into_iter().enumerate() {
            let store = &self.stores[holder];
            let mut wanted: Vec<usize> =
                (0..request.frames.len()).filter(|i| answer.blocks[*i].is_err()).collect();
            if wanted.is_empty() {
                break;
            }
            // Once together, so that one bad frame costs one request; after that each alone.
            if nth == 0 || wanted.len() == request.frames.len() {
                match read(store, &request.object(), Some((request.start, request.len()))).await {
                    Ok(bytes) => {
                        for i in std::mem::take(&mut wanted) {
                            let (offset, entry) = &request.frames[i];
                            let at = (offset - request.start) as usize;
                            let stored =
                                bytes.get(at..at + entry.loc.stored_len as usize).unwrap_or_default();
                            match frame::decode_entry(stored, entry) {
                                Ok(raw) => answer.blocks[i] = Ok(raw),
                                Err(e) => {
                                    whys[i].push(format!("replica {}: {e}", store.name()));
                                    answer.note(store, request, e.to_string(), e.newer);
                                }
                            }
                        }
                    }
                    Err(e) if meaning(&e) == Meaning::Unreachable => {
                        for i in std::mem::take(&mut wanted) {
                            whys[i].push(e.to_string());
                        }
                    }
                    // Perhaps cut short: single frames may be there still.
                    Err(e) => answer.note(store, request, format!("{} ({})", e.kind, e.detail), false),
                }
            }
            for i in wanted {
                let entry = &request.frames[i].1;
                let range = (entry.loc.offset, u64::from(entry.loc.stored_len));
                let got = read(store, &request.object(), Some(range)).await.map_err(|e| {
                    let damaged = meaning(&e) == Meaning::Damaged;
                    (e.to_string(), damaged)
                });
                let got = got.and_then(|bytes| {
                    frame::decode_entry(&bytes, entry).map_err(|e| (e.to_string(), !e.newer))
                });
                match got {
                    Ok(raw) => answer.blocks[i] = Ok(raw),
                    Err((why, damaged)) => {
                        if damaged {
                            answer.note(store, request, why.clone(), false);
                        }
                        whys[i].push(format!("replica {}: {why}", store.name()));
                    }
                }
            }
        }
        for (block, why) in answer.blocks.iter_mut().zip(whys) {
            if block.is_err() && !why.is_empty() {
                *block = Err(why.join("; "));
            }
        }
        answer
    }
}

/// Frames of one segment that are fetched together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Request {
    pub segment: (SegmentNo, Epoch),
    pub start: u64,
    pub end: u64,
    /// Offset and entry, ascending by offset; each frame once for every content that is expected of it.
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
    pub blocks: Vec<Result<Bytes, String>>,
    /// Copies found damaged.
    pub damaged: Vec<Damage>,
}

impl Answer {
    fn note(&mut self, store: &Store, request: &Request, why: String, newer: bool) {
        if !newer {
            self.damaged.push(Damage { replica: store.name().clone(), object: request.object(), why });
        }
    }
}

/// One block that is wanted, for a place that the caller knows by `what`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Want<T> {
    pub entry: BlockEntry,
    pub what: T,
}

/// Groups wants into requests, in the order of segments. The second part says for each want of a request which of its
/// frames it is: blocks of equal content share one.
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
