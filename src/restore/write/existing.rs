//! Whether a file that is there already has the content that is to be restored.
//!
//! Owns the comparison. Blocks are compared by their hashes, so that a restore that is run again
//! need not fetch what an earlier one brought.

use std::io;
use std::os::fd::OwnedFd;

use bytes::Bytes;

use super::Piece;
use super::drafts::{next_data, read_at};
use crate::format::frame::MAX_RAW;
use crate::ids::BlockHash;
use crate::restore::content::Want;

/// Bytes read at a time.
const READ: usize = 1 << 20;

/// What came of a comparison.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Compared {
    Same,
    Differs,
    /// These blocks are longer than what the file holds of them, and have to be fetched to be
    /// compared. All else is the same.
    Unsure(Vec<Want<Piece>>),
}

/// Compares a file of `size` bytes with what is in `pieces`, ascending; between them are holes.
pub(super) fn compare(fd: &OwnedFd, size: u64, pieces: &[Want<Piece>]) -> io::Result<Compared> {
    let mut unsure = Vec::new();
    let mut at = 0;
    let mut buffer = Vec::new();
    for want in pieces {
        let Piece { offset, len, .. } = want.what;
        if offset < at || len as usize > MAX_RAW || !is_zero(fd, at, offset)? {
            return Ok(Compared::Differs);
        }
        at = offset + u64::from(len);
        if want.entry.loc.raw_len != len {
            unsure.push(*want);
            continue;
        }
        buffer.resize(len as usize, 0);
        let n = read_at(fd, offset, &mut buffer)?;
        if n < buffer.len() || BlockHash::of(&buffer) != want.entry.hash {
            return Ok(Compared::Differs);
        }
    }
    match is_zero(fd, at, size)? {
        false => Ok(Compared::Differs),
        true if unsure.is_empty() => Ok(Compared::Same),
        true => Ok(Compared::Unsure(unsure)),
    }
}

/// The same for a file whose content stands in its inode; the rest of it is a hole.
pub(super) fn compare_inline(fd: &OwnedFd, size: u64, content: &Bytes) -> io::Result<bool> {
    Ok(holds(fd, 0, content)? && is_zero(fd, content.len() as u64, size)?)
}

/// Whether the file holds these bytes there.
pub(super) fn holds(fd: &OwnedFd, offset: u64, content: &[u8]) -> io::Result<bool> {
    let mut buffer = vec![0; content.len()];
    Ok(read_at(fd, offset, &mut buffer)? == content.len() && buffer == content)
}

/// Whether two files hold the same.
pub(super) fn same(one: &OwnedFd, other: &OwnedFd, size: u64) -> io::Result<bool> {
    let mut buffers = (vec![0; READ], vec![0; READ]);
    let mut at = 0;
    while at < size {
        let n = read_at(one, at, &mut buffers.0)?;
        if n == 0 || read_at(other, at, &mut buffers.1)? != n || buffers.0[..n] != buffers.1[..n] {
            return Ok(false);
        }
        at += n as u64;
    }
    Ok(true)
}

fn is_zero(fd: &OwnedFd, start: u64, end: u64) -> io::Result<bool> {
    let mut at = start;
    let mut buffer = Vec::new();
    while at < end {
        let Some(data) = next_data(fd, at)?.filter(|data| *data < end) else { return Ok(true) };
        buffer.resize(READ.min(usize::try_from(end - data).unwrap_or(READ)), 0);
        let n = read_at(fd, data, &mut buffer)?;
        if n == 0 || buffer[..n].iter().any(|b| *b != 0) {
            return Ok(false);
        }
        at = data + n as u64;
    }
    Ok(true)
}
