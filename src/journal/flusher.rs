//! Making buffered records durable, once for all who wait.
//!
//! Owns the writing end of the tail, and a thread for what nobody waits for. Knows neither sled nor the memtables.
//!
//! Whoever waits first *leads*: writes and syncs everything that is buffered, on its own thread, while those who come meanwhile
//! wait for it and one of them leads next. So a lone `fsync` costs no change of threads, and many share a group.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use parking_lot::MutexGuard;

use super::error::JournalError;
use super::shared::{FLUSH_AT, LOOK_AGAIN, Pending, Shared};
use super::tail::GROUP;
use super::tail_set::Writer;
use crate::ids::Lsn;

/// Records nobody waits for are durable after this long.
const TICK: Duration = Duration::from_secs(1);

/// What the leader needs.
pub(super) struct Flush {
    writer: Writer,
    spare: Vec<u8>,
}

impl Flush {
    pub(super) fn new(writer: Writer) -> Self {
        Self { writer, spare: Vec::new() }
    }
}

/// The thread: runs until stopped or poisoned. A panic poisons.
pub(super) fn run(shared: &Arc<Shared>) {
    if catch_unwind(AssertUnwindSafe(|| serve(shared))).is_err() {
        shared.poison_with(&JournalError::Poisoned("the journal's flusher thread panicked".into()));
    }
    shared.pending.lock().stop = true;
    shared.wake_all();
}

fn serve(s: &Shared) {
    loop {
        let mut p = s.pending.lock();
        if s.tail.is_short() && !p.stop {
            drop(p);
            s.tail.stock();
            continue;
        }
        // After a failure for want of space wait for the tick: the disk does not empty itself at once.
        if !p.stop && (p.buf.len() < FLUSH_AT || p.full.is_some()) {
            s.flush_wanted.wait_for(&mut p, TICK);
        }
        if p.leading {
            s.flushed.wait_for(&mut p, LOOK_AGAIN);
            continue;
        }
        if p.buf.is_empty() {
            if p.stop {
                return;
            }
            continue;
        }
        let stop = p.stop;
        let (p, done) = lead(s, p);
        drop(p);
        if s.poisoned.load(SeqCst) || (stop && done.is_err()) {
            return;
        }
    }
}

/// Makes everything that is buffered durable, on this thread; nobody else may be leading. What came of it is noted for all who
/// wait; an error other than a full disk poisons.
pub(super) fn lead<'a>(
    s: &'a Shared,
    mut pending: MutexGuard<'a, Pending>,
) -> (MutexGuard<'a, Pending>, Result<(), JournalError>) {
    if let Err(e) = s.healthy() {
        return (pending, Err(e));
    }
    pending.leading = true;
    drop(pending);
    let done = catch_unwind(AssertUnwindSafe(|| flush(s, &mut s.flush.lock())));
    let done = done.unwrap_or_else(|_| {
        Err(JournalError::Poisoned("the journal panicked while it wrote its tail".into()))
    });
    match &done {
        Err(JournalError::Full { .. }) | Ok(()) => {}
        Err(e) => s.poison_with(e),
    }
    let mut p = s.pending.lock();
    p.leading = false;
    if let Err(full @ JournalError::Full { .. }) = &done {
        p.attempts += 1;
        if p.full.is_none() {
            log::warn!("journal: {full}");
        }
        p.full = Some(full.clone());
    }
    s.flushed.notify_all();
    s.room_made.notify_all();
    (p, done)
}

/// One group: data first, then the records that speak of it.
fn flush(s: &Shared, Flush { writer, spare }: &mut Flush) -> Result<(), JournalError> {
    // Room first: the buffer is taken only when it can be written.
    let (first, len) = {
        let p = s.pending.lock();
        (p.first, p.buf.len())
    };
    if len == 0 {
        return Ok(());
    }
    writer.make_room(first, len)?;
    let (mut buf, first, last, mark): (Vec<u8>, Lsn, Lsn, u64) = {
        let mut p = s.pending.lock();
        if !writer.fits(p.buf.len()) {
            // It grew meanwhile: once more, with the new length.
            return Ok(());
        }
        spare.clear();
        (std::mem::replace(&mut p.buf, std::mem::take(spare)), p.first, p.last, std::mem::take(&mut p.mark))
    };
    (s.data_sync)(mark).map_err(|e| JournalError::Poisoned(format!("syncing block data failed: {e}")))?;
    writer.append(&mut buf, first, last)?;
    if s.tail.is_short() {
        s.flush_wanted.notify_one();
    }
    {
        let mut p = s.pending.lock();
        s.durable.store(last.0, SeqCst);
        p.full = None;
        p.attempts += 1;
    }
    s.count.syncs.fetch_add(1, SeqCst);
    s.count.progress.fetch_add(1, SeqCst);
    debug_assert!(buf.len() >= GROUP);
    // Keep an ordinary buffer for the next group, not one that a burst blew up.
    if buf.capacity() <= 4 * FLUSH_AT {
        *spare = buf;
    }
    Ok(())
}
