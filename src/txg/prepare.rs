//! Getting blocks ready for a segment: read, hash, compress; several at a time, in order.
//!
//! Owns the threads that do so. Decides nothing: what becomes of a block is the sealer's.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::{self, Scope, ScopedJoinHandle};

use parking_lot::Mutex;

use super::seal::SealError;
use crate::cache::BlockStore;
use crate::cache::dirty::DirtyBlock;
use crate::format::codec::FormatError;
use crate::format::frame::{FrameEncoder, Packed};
use crate::format::tables::BlockEntry;
use crate::ids::BlockHash;
use crate::priority;

/// Bytes of content prepared at a time; twice as much is in memory.
const BATCH: u64 = 4 << 20;
/// Blocks prepared at a time.
const MOST: usize = 512;
/// Below this many bytes no thread is worth its start.
const ALONE: u64 = 256 << 10;

/// A block's content and how it is stored.
pub(super) struct Prepared {
    pub raw: Vec<u8>,
    pub hash: BlockHash,
    /// The frame that holds it already, as the tables say.
    pub known: Option<BlockEntry>,
    /// How it is stored; none when it is stored already, or another block of the same cut with equal content was packed.
    pub packed: Option<Packed>,
}

/// What came of some blocks of a batch, with their places in it.
type Numbered = Vec<(usize, Result<Prepared, SealError>)>;
/// What came of each block of a batch, in order.
type Batch = Vec<(Arc<DirtyBlock>, Result<Prepared, SealError>)>;

/// A batch that is being prepared.
pub(super) struct Started<'scope> {
    blocks: Vec<Arc<DirtyBlock>>,
    workers: Vec<ScopedJoinHandle<'scope, Numbered>>,
    done: Numbered,
}

impl Started<'_> {
    /// Waits for it.
    pub fn finish(self) -> Batch {
        let mut done = self.done;
        for worker in self.workers {
            match worker.join() {
                Ok(part) => done.extend(part),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
        done.sort_by_key(|(n, _)| *n);
        self.blocks.into_iter().zip(done).map(|(block, (_, prepared))| (block, prepared)).collect()
    }
}

/// Prepares blocks.
pub(super) struct Preparer {
    blocks: Arc<BlockStore>,
    /// One for each thread: a compressor keeps memory between blocks.
    encoders: Vec<Mutex<FrameEncoder>>,
}

impl Preparer {
    /// With zstd at `level` (0: none) on as many threads as there are CPUs, four at most.
    pub fn new(blocks: Arc<BlockStore>, level: i32) -> Result<Self, FormatError> {
        let threads = thread::available_parallelism().map_or(1, |n| n.get().clamp(1, 4));
        let encoders =
            (0..threads).map(|_| FrameEncoder::new(level).map(Mutex::new)).collect::<Result<_, _>>()?;
        Ok(Self { blocks, encoders })
    }

    /// Packs content that was left unpacked.
    pub fn pack(&self, raw: &[u8]) -> Result<Packed, SealError> {
        match self.encoders.first() {
            Some(encoder) => Ok(encoder.lock().pack(raw)?),
            None => Ok(Packed::default()),
        }
    }

    /// Begins to prepare a batch. `packed` are the contents of this cut that somebody packs.
    pub fn start<'scope>(
        &'scope self,
        scope: &'scope Scope<'scope, '_>,
        blocks: Vec<Arc<DirtyBlock>>,
        packed: &Arc<Mutex<HashSet<BlockHash>>>,
    ) -> Started<'scope> {
        let bytes: u64 = blocks.iter().map(|b| u64::from(b.len())).sum();
        let next = Arc::new(AtomicUsize::new(0));
        let mut workers = Vec::new();
        if bytes >= ALONE {
            for encoder in self.encoders.iter().take(blocks.len()) {
                let (next, all, packed) = (Arc::clone(&next), blocks.clone(), Arc::clone(packed));
                let work = move || {
                    priority::give_way();
                    self.work(&all, &next, encoder, &packed)
                };
                // Without threads it is done here.
                let Ok(worker) =
                    thread::Builder::new().name("mirrorfs-seal".into()).spawn_scoped(scope, work)
                else {
                    break;
                };
                workers.push(worker);
            }
        }
        let done = match self.encoders.first() {
            Some(encoder) if workers.is_empty() => self.work(&blocks, &next, encoder, packed),
            _ => Vec::new(),
        };
        Started { blocks, workers, done }
    }

    fn work(
        &self,
        blocks: &[Arc<DirtyBlock>],
        next: &AtomicUsize,
        encoder: &Mutex<FrameEncoder>,
        packed: &Mutex<HashSet<BlockHash>>,
    ) -> Numbered {
        let mut done = Vec::new();
        let mut encoder = encoder.lock();
        loop {
            let n = next.fetch_add(1, Ordering::Relaxed);
            let Some(block) = blocks.get(n) else { return done };
            done.push((n, self.one(block, &mut encoder, packed)));
        }
    }

    fn one(
        &self,
        block: &DirtyBlock,
        encoder: &mut FrameEncoder,
        packed: &Mutex<HashSet<BlockHash>>,
    ) -> Result<Prepared, SealError> {
        let raw = self.blocks.seal_content(block)?;
        let hash = BlockHash::of(&raw);
        let known = self.blocks.frame(&hash)?.filter(|e| e.loc.raw_len as usize == raw.len());
        let packed = match known.is_none() && packed.lock().insert(hash) {
            true => Some(encoder.pack(&raw)?),
            false => None,
        };
        Ok(Prepared { raw, hash, known, packed })
    }
}

/// Cuts a list of blocks into batches.
pub(super) fn batches(blocks: Vec<Arc<DirtyBlock>>) -> Vec<Vec<Arc<DirtyBlock>>> {
    let mut all: Vec<Vec<_>> = Vec::new();
    let mut bytes = BATCH;
    for block in blocks {
        match all.last_mut() {
            Some(batch) if bytes < BATCH && batch.len() < MOST => {
                bytes += u64::from(block.len());
                batch.push(block);
            }
            _ => {
                bytes = u64::from(block.len());
                all.push(vec![block]);
            }
        }
    }
    all
}
