//! What a state folder holds beside its tables: staged segments, cached content, small files.
//!
//! Owns reading them. Changes nothing.

use std::collections::HashSet;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;

use bytes::Bytes;

use crate::daemon::members::Members;
use crate::daemon::state::StateDir;
use crate::format::codec::FormatError;
use crate::format::local::{CachedValue, SegmentValue};
use crate::format::names::ObjectName;
use crate::format::segment::verify_whole;
use crate::format::tables::{number_of_key, table};
use crate::fsck::{Findings, Fix, Input, Kind, Stop};
use crate::ids::{BlockHash, SegmentNo};

/// Calls `f` for each row of a table.
fn each(input: &Input<'_>, table: u8, mut f: impl FnMut(&Bytes, &[u8])) -> Result<(), Stop> {
    let mut rows = input.rows(table);
    while let Some((key, value)) = rows.next()? {
        f(&key, &value);
    }
    Ok(())
}

/// Checks the state folder's files against the tables. With `deep` content is read and verified. Answers what is to be said
/// although it is no error.
pub(super) fn check(
    state: &StateDir,
    input: &Input<'_>,
    deep: bool,
    findings: &mut Findings,
) -> Result<Option<String>, Stop> {
    if let Err(e) = Members::read(state.path()) {
        findings.about(Kind::StateFile, None, || e.to_string());
    }
    let note = check_staged(state, input, deep, findings)?;
    if deep {
        check_cached(state, input, findings)?;
    }
    Ok(note)
}

/// Staged segments must be whole. One that is neither staged nor, as far as the tables know, on a replica is no error: its file
/// goes once replicas hold it, and the record that says so may be lost with a killed daemon.
fn check_staged(
    state: &StateDir,
    input: &Input<'_>,
    deep: bool,
    findings: &mut Findings,
) -> Result<Option<String>, Stop> {
    let mut unknown = 0_u64;
    let mut cursors: Vec<(String, SegmentNo)> = Vec::new();
    each(input, table::CURSOR, |key, value| {
        let name = String::from_utf8_lossy(&key[1..]).into_owned();
        // Names of filesystems stand in the same table.
        if !name.starts_with("filesystem of ") {
            cursors.push((name, SegmentNo(value.try_into().map_or(0, u64::from_le_bytes))));
        }
    })?;
    let held = cursors.iter().map(|(_, c)| *c).max().unwrap_or_default();
    let mut newest = SegmentNo(0);
    each(input, table::SEGMENT, |key, value| {
        let number = SegmentNo(number_of_key(key).unwrap_or(0));
        newest = newest.max(number);
        let Ok(value) = SegmentValue::decode(value) else { return };
        let object = ObjectName::Segment(number, value.epoch);
        let path = state.staging().join(object.path());
        match fs::metadata(&path) {
            Err(_) if number > held => unknown += 1,
            Ok(m) if m.len() != value.len => findings.about(Kind::Staged, None, || {
                let is = m.len();
                format!(
                    "{} has {is} bytes instead of {}; the next mount removes it",
                    path.display(),
                    value.len
                )
            }),
            Ok(_) if deep => {
                let intact = fs::read(&path).map_err(|e| e.to_string()).and_then(|bytes| {
                    verify_whole(&bytes).map(|_| ()).map_err(|e: FormatError| e.to_string())
                });
                if let Err(e) = intact {
                    findings.about(Kind::Staged, None, || {
                        format!("{} is damaged ({e}): it is taken from a replica that has it", path.display())
                    });
                }
            }
            _ => {}
        }
    })?;
    for (name, cursor) in cursors.iter().filter(|(_, c)| *c > newest) {
        findings.about(Kind::Cursor, None, || {
            format!(
                "replica {name} is said to hold segment {cursor}, but the newest is {newest}: this state is older than that replica"
            )
        });
    }
    Ok((unknown > 0).then(|| {
        format!(
            "whether a replica holds {unknown} of the newest segments is not known here (a killed daemon may not have noted it): see \
             with --replica all, or mount"
        )
    }))
}

/// Compares cached blocks with their hashes.
fn check_cached(state: &StateDir, input: &Input<'_>, findings: &mut Findings) -> Result<(), Stop> {
    let Ok(slots) = File::open(state.slots()) else { return Ok(()) };
    // Those were told as what they are.
    let mut taken: HashSet<u32> = HashSet::new();
    each(input, table::DIRTY, |_, value| {
        if let Ok(value) = crate::cache::dirty::DirtyValue::decode(value, input.block_size) {
            taken.insert(value.slot);
        }
    })?;
    let mut buffer = Vec::new();
    each(input, table::CACHED, |key, value| {
        let (Ok(value), Ok(hash)) = (CachedValue::decode(value), <[u8; 32]>::try_from(&key[1..])) else {
            return;
        };
        if !taken.insert(value.slot) || value.len > input.block_size {
            return;
        }
        buffer.resize(value.len as usize, 0);
        let at = u64::from(value.slot) * u64::from(input.block_size);
        let read = slots.read_exact_at(&mut buffer, at);
        if read.is_err() || BlockHash::of(&buffer) != BlockHash(hash) {
            let fix = Fix::DeleteRow { key: key.clone() };
            findings.about(Kind::CachedContent, Some(fix), || {
                format!("cached block {} does not match its hash; a replica will be asked", BlockHash(hash))
            });
        }
    })
}
