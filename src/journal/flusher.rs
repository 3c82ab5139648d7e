//! The flusher: one thread that makes buffered records durable, once for all who wait.
//!
//! Owns the writing end of the tail. Knows neither sled nor the memtables.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use super::error::JournalError;
use super::shared::{FLUSH_AT, Shared};
use super::tail::GROUP;
use super::tail_set::Writer;
use crate::ids::Lsn;

/// Records nobody waits for are durable after this long.
const TICK: Duration = Duration::from_secs(1);

/// Runs until stopped or poisoned. A panic poisons.
pub(super) fn run(shared: &Arc<Shared>, writer: Writer) {
    if catch_unwind(AssertUnwindSafe(|| serve(shared, writer))).is_err() {
        shared.poison_with(&JournalError::Poisoned("the journal's flusher thread panicked".into()));
    }
    shared.pending.lock().stop = true;
    shared.wake_all();
}

fn serve(s: &Shared, mut writer: Writer) {
    let mut spare = Vec::new();
    loop {
        {
            let mut p = s.pending.lock();
            let durable = s.durable.load(SeqCst);
            let asked = !p.buf.is_empty() && (p.want.0 > durable || p.buf.len() >= FLUSH_AT);
            // After a failure for want of space wait for the tick: the disk does not empty itself at once.
            if !asked && !p.stop || p.full.is_some() {
                s.flush_wanted.wait_for(&mut p, TICK);
            }
            if p.buf.is_empty() {
                if p.stop {
                    return;
                }
                continue;
            }
        }
        if s.poisoned.load(SeqCst) {
            return;
        }
        match flush(s, &mut writer, &mut spare) {
            Ok(()) => {}
            Err(full @ JournalError::Full { .. }) => {
                let mut p = s.pending.lock();
                p.attempts += 1;
                if p.full.is_none() {
                    log::warn!("journal: {full}");
                }
                p.full = Some(full);
                s.flushed.notify_all();
                s.room_made.notify_all();
                if p.stop {
                    return;
                }
            }
            Err(e) => {
                s.poison_with(&e);
                return;
            }
        }
    }
}

/// One group: data first, then the records that speak of it.
fn flush(s: &Shared, writer: &mut Writer, spare: &mut Vec<u8>) -> Result<(), JournalError> {
    // Room first: the buffer is taken only when it can be written.
    let (first, len) = {
        let p = s.pending.lock();
        (p.first, p.buf.len())
    };
    writer.make_room(first, len)?;
    let (mut buf, first, last): (Vec<u8>, Lsn, Lsn) = {
        let mut p = s.pending.lock();
        if !writer.fits(p.buf.len()) {
            // It grew meanwhile: once more, with the new length.
            return Ok(());
        }
        spare.clear();
        (std::mem::replace(&mut p.buf, std::mem::take(spare)), p.first, p.last)
    };
    (s.data_sync)().map_err(|e| JournalError::Poisoned(format!("syncing block data failed: {e}")))?;
    writer.append(&mut buf, first, last)?;
    {
        let mut p = s.pending.lock();
        s.durable.store(last.0, SeqCst);
        p.full = None;
        p.attempts += 1;
    }
    s.count.syncs.fetch_add(1, SeqCst);
    s.count.progress.fetch_add(1, SeqCst);
    s.flushed.notify_all();
    s.room_made.notify_all();
    debug_assert!(buf.len() >= GROUP);
    // Keep an ordinary buffer for the next group, not one that a burst blew up.
    if buf.capacity() <= 4 * FLUSH_AT {
        *spare = buf;
    }
    Ok(())
}
