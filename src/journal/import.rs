//! Filling an empty store with a restored state.
//!
//! Owns how it is done fast: on several threads, and with one sync at the end. That is enough because nothing of it counts before the
//! witness has said that the import is over; what an interrupted one leaves is thrown away.

use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, mpsc};

use bytes::Bytes;
use parking_lot::Mutex;

use super::error::JournalError;
use super::memtable::Changes;
use super::sled_store::{Change, SledStore, checksum};
use super::tx;
use super::witness::Sum;
use crate::format::record::Op;
use crate::ids::Lsn;

/// Payload between two flushes, which bounds what sled holds in memory.
const CHUNK: usize = 2 << 20;
/// Keys that a thread takes at a time.
const PIECE: usize = 2000;
/// Threads that fill sled: more only wait for one another there.
const THREADS: usize = 4;

type Pair = (Bytes, Bytes);
type Ops<'a> = dyn Iterator<Item = Result<Op, JournalError>> + 'a;

/// Loads `ops` into `store`, which is empty, and makes it durable; the values all carry `lsn`, up to which it is complete then. Fast where
/// keys ascend.
pub(super) fn load(store: &SledStore, lsn: Lsn, ops: &mut Ops<'_>) -> Result<Sum, JournalError> {
    let mut sum = Sum::default();
    let mut highest = None;
    while let Some(op) = ascending(store, lsn, ops, &mut highest, &mut sum)? {
        behind(store, lsn, op, ops, &mut highest, &mut sum)?;
    }
    store.apply(std::iter::empty(), Some(lsn), || {})?;
    Ok(sum)
}

/// Takes ops as long as their keys ascend beyond `highest`; answers the first that does not.
fn ascending(
    store: &SledStore,
    lsn: Lsn,
    ops: &mut Ops<'_>,
    highest: &mut Option<Bytes>,
    sum: &mut Sum,
) -> Result<Option<Op>, JournalError> {
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get().min(THREADS));
    let failed = AtomicBool::new(false);
    let (give, take) = mpsc::sync_channel::<Vec<Pair>>(threads);
    let take = Arc::new(Mutex::new(take));
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads)
            .map(|_| {
                let (take, failed) = (Arc::clone(&take), &failed);
                scope.spawn(move || work(store, lsn, &take, failed))
            })
            .collect();
        // When no worker is left, giving fails instead of waiting.
        drop(take);
        let fed = feed(store, ops, highest, give, &failed);
        for worker in workers {
            match worker.join() {
                Ok(part) => sum.merge(part?),
                Err(_) => return Err(JournalError::Poisoned("a thread of the import panicked".into())),
            }
        }
        fed
    })
}

fn feed(
    store: &SledStore,
    ops: &mut Ops<'_>,
    highest: &mut Option<Bytes>,
    give: mpsc::SyncSender<Vec<Pair>>,
    failed: &AtomicBool,
) -> Result<Option<Op>, JournalError> {
    loop {
        store.make_room_for_load(CHUNK)?;
        let mut bytes = 0;
        while bytes < CHUNK {
            let mut piece = Vec::with_capacity(PIECE);
            let mut rest = Ok(None);
            let mut end = false;
            while piece.len() < PIECE && bytes < CHUNK {
                let op = match ops.next().transpose() {
                    Ok(Some(op)) => op,
                    over => {
                        (rest, end) = (over, true);
                        break;
                    }
                };
                if highest.as_ref().is_some_and(|h| op.key() <= h.as_ref()) {
                    (rest, end) = (Ok(Some(op)), true);
                    break;
                }
                bytes += op.payload();
                // What there is none of needs no deletion.
                if let Op::Put { key, value } = op {
                    tx::check(&key, Some(&value))?;
                    *highest = Some(key.clone());
                    piece.push((key, value));
                }
            }
            // Refused when all workers have failed; they say why.
            if give.send(piece).is_err() || failed.load(Relaxed) || end {
                return rest;
            }
        }
        store.flush()?;
    }
}

/// Puts pieces into the store until there are no more.
fn work(
    store: &SledStore,
    lsn: Lsn,
    take: &Mutex<mpsc::Receiver<Vec<Pair>>>,
    failed: &AtomicBool,
) -> Result<Sum, JournalError> {
    let mut sum = Sum::default();
    loop {
        let next = take.lock().recv();
        let Ok(piece) = next else { return Ok(sum) };
        // sled keeps at most 16 pairs in a page and cuts a fuller one in two of 9 and 8: of keys that only ascend, each page would stay half
        // empty. So three of five go first, and the others find room between them.
        for first in [true, false] {
            for (n, (key, value)) in piece.iter().enumerate() {
                if (n % 5 % 2 == 0) != first {
                    continue;
                }
                let put = store.load(key, lsn, value);
                if put.is_err() {
                    failed.store(true, Relaxed);
                }
                put?;
                sum.add(key, lsn, checksum(key, lsn, value));
            }
        }
    }
}

/// Takes `op` and some that follow it, whose keys may be in the store already.
fn behind(
    store: &SledStore,
    lsn: Lsn,
    op: Op,
    ops: &mut Ops<'_>,
    highest: &mut Option<Bytes>,
    sum: &mut Sum,
) -> Result<(), JournalError> {
    // A later change of a key replaces an earlier one.
    let mut chunk = Changes::new();
    let mut bytes = 0;
    let mut next = Some(op);
    while let Some(op) = next {
        bytes += op.payload();
        let (key, value) = match op {
            Op::Put { key, value } => (key, Some(value)),
            Op::Delete { key } => (key, None),
        };
        tx::check(&key, value.as_ref())?;
        chunk.insert(key, value);
        next = if bytes < CHUNK { ops.next().transpose()? } else { None };
    }
    for (key, value) in &chunk {
        if let Some(old) = store.get(key)? {
            sum.sub(key, old.lsn, old.crc);
        }
        if let Some(value) = value {
            sum.add(key, lsn, checksum(key, lsn, value));
        }
    }
    let changes = chunk.iter().map(|(key, value)| Change { key, lsn, value: value.as_deref() });
    store.apply(changes, None, || {})?;
    if let Some((key, _)) = chunk.pop_last()
        && highest.as_ref().is_none_or(|h| key > *h)
    {
        *highest = Some(key);
    }
    Ok(())
}
