//! How many blocks use each frame, and how many bytes of each segment are alive.
//!
//! Owns the derived local tables that say so; changed only inside the transactions that change blocks.

use crate::cache::StoreError;
use crate::format::local::{FrameValue, SegmentValue};
use crate::format::tables::{BlockEntry, frame_key, segment_key};
use crate::journal::Tx;

/// One more block uses the frame.
pub(super) fn use_frame(tx: &mut Tx<'_>, entry: &BlockEntry) -> Result<(), StoreError> {
    let key = frame_key(&entry.hash);
    let frame = match tx.get(&key)? {
        Some(value) => {
            let mut frame = FrameValue::decode(&value)?;
            frame.uses += 1;
            if frame.entry.loc != entry.loc {
                // Stored once more, because the older copy is lost (or a crash hid it): the newer one counts.
                add_live(tx, &frame.entry, -i64::from(frame.entry.loc.stored_len))?;
                add_live(tx, entry, i64::from(entry.loc.stored_len))?;
                frame.entry = *entry;
            }
            frame
        }
        None => {
            add_live(tx, entry, i64::from(entry.loc.stored_len))?;
            FrameValue { entry: *entry, uses: 1 }
        }
    };
    tx.put(key, frame.encode());
    Ok(())
}

/// One block less uses the frame.
pub(super) fn unuse_frame(tx: &mut Tx<'_>, entry: &BlockEntry) -> Result<(), StoreError> {
    let key = frame_key(&entry.hash);
    let Some(value) = tx.get(&key)? else { return Ok(()) };
    let mut frame = FrameValue::decode(&value)?;
    if frame.uses > 1 {
        frame.uses -= 1;
        tx.put(key, frame.encode());
    } else {
        tx.delete(key);
        add_live(tx, &frame.entry, -i64::from(frame.entry.loc.stored_len))?;
    }
    Ok(())
}

fn add_live(tx: &mut Tx<'_>, entry: &BlockEntry, delta: i64) -> Result<(), StoreError> {
    let key = segment_key(entry.loc.segment);
    if let Some(value) = tx.get(&key)? {
        let mut segment = SegmentValue::decode(&value)?;
        segment.live = segment.live.saturating_add_signed(delta);
        tx.put(key, segment.encode());
    }
    Ok(())
}
