//! Reading and writing past the kernel's cache: the aligned memory that it takes, and whole files.
//!
//! Knows not what the files are: staged segments and those in a replica's folder, the slots of clean blocks, the journal's tail. What is
//! staged is sent from memory as a rule, and read from disk only by a replica that lags; what a replica has is hardly read at all. In
//! the kernel's cache it would cost a copy, and push out what applications read. Where a filesystem cannot do without the cache, it is used.

pub mod passing;

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::ops::Deref;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use bytes::Bytes;

use crate::private;

/// Addresses, offsets and lengths are multiples of this; enough for every disk there is.
pub const ALIGN: usize = 4096;
/// Bytes written at a time.
const PIECE: usize = 2 << 20;
/// Shorter files are not worth it.
pub const LEAST: usize = 1 << 20;

/// Makes `path` a file of these bytes for its owner only, durably (but for its name, which is its
/// folder's).
pub fn write(path: &Path, bytes: &[u8]) -> io::Result<()> {
    if bytes.len() >= LEAST && past_the_cache(path, bytes)? {
        return Ok(());
    }
    let mut file = private::create_file(path)?;
    file.write_all(bytes)?;
    file.sync_all()
}

/// As [`write`], for a file that must not be there yet.
pub fn create(path: &Path, bytes: &[u8]) -> io::Result<()> {
    drop(OpenOptions::new().write(true).create_new(true).mode(private::FILE).open(path)?);
    write(path, bytes)
}

/// Reads a file past the cache: it is wanted once.
pub fn read(path: &Path) -> io::Result<Vec<u8>> {
    let len = usize::try_from(std::fs::metadata(path)?.len()).unwrap_or(usize::MAX);
    let file = match open(path, OpenOptions::new().read(true)) {
        Ok(file) if len >= LEAST => file,
        _ => return std::fs::read(path),
    };
    let mut buffer = Aligned::new(PIECE);
    let mut bytes = Vec::with_capacity(len);
    loop {
        // A read that ends within a page is the last one.
        match file.read_at(buffer.bytes(), bytes.len() as u64) {
            Ok(0) => return Ok(bytes),
            Ok(n) => {
                bytes.extend_from_slice(&buffer.bytes()[..n]);
                if !n.is_multiple_of(ALIGN) {
                    return Ok(bytes);
                }
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => return std::fs::read(path),
        }
    }
}

/// False when the filesystem cannot.
fn past_the_cache(path: &Path, bytes: &[u8]) -> io::Result<bool> {
    let written = open(path, OpenOptions::new().write(true).create(true).truncate(true).mode(private::FILE))
        .and_then(|file| write_all(&file, bytes).map(|()| file));
    let file = match written {
        Err(e) if is_refused(&e) => return Ok(false),
        other => other?,
    };
    file.set_len(bytes.len() as u64)?;
    file.sync_all()?;
    Ok(true)
}

/// Writes `bytes` at the beginning of a file, padded with zeros to whole pages; only what is not aligned is copied.
fn write_all(file: &File, bytes: &[u8]) -> io::Result<()> {
    let straight = match bytes.as_ptr().addr().is_multiple_of(ALIGN) {
        true => bytes.len() / ALIGN * ALIGN,
        false => 0,
    };
    let (straight, rest) = bytes.split_at(straight);
    file.write_all_at(straight, 0)?;
    match rest {
        [] => Ok(()),
        rest => {
            let mut buffer = Aligned::new(rest.len().next_multiple_of(ALIGN).min(PIECE));
            buffer.write(file, rest, straight.len() as u64)
        }
    }
}

/// Opens a file that is read and written past the cache.
pub fn open(path: &Path, options: &mut OpenOptions) -> io::Result<File> {
    options.custom_flags(libc::O_DIRECT).open(path)
}

/// Whether this says that the filesystem cannot do without the cache.
#[must_use]
pub fn is_refused(e: &io::Error) -> bool {
    matches!(e.raw_os_error(), Some(libc::EINVAL | libc::EOPNOTSUPP))
}

/// Memory that may be read into and written from past the cache.
pub struct Aligned {
    memory: Vec<u8>,
    start: usize,
    len: usize,
}

impl Aligned {
    /// `len` bytes, a multiple of [`ALIGN`].
    #[must_use]
    pub fn new(len: usize) -> Self {
        let memory = vec![0; len + ALIGN];
        let start = memory.as_ptr().align_offset(ALIGN).min(ALIGN);
        Self { memory, start, len }
    }

    fn bytes(&mut self) -> &mut [u8] {
        &mut self.memory[self.start..self.start + self.len]
    }

    /// Writes `data` at `offset` of a file that [`open`] gave, padded with zeros to whole pages.
    pub fn write(&mut self, file: &File, data: &[u8], offset: u64) -> io::Result<()> {
        let len = self.len;
        let buffer = self.bytes();
        for (n, piece) in data.chunks(len).enumerate() {
            let padded = piece.len().next_multiple_of(ALIGN);
            buffer[..piece.len()].copy_from_slice(piece);
            buffer[piece.len()..padded].fill(0);
            file.write_all_at(&buffer[..padded], offset + (n * len) as u64)?;
        }
        Ok(())
    }
}

/// Bytes that are put together to be written by [`write`], which need not copy them then, unless there are more than were expected.
pub struct Gathered {
    memory: Vec<u8>,
    start: usize,
}

impl Gathered {
    /// None yet, with memory for `expected` bytes.
    #[must_use]
    pub fn new(expected: usize) -> Self {
        if expected < LEAST {
            return Self { memory: Vec::with_capacity(expected), start: 0 };
        }
        let mut memory: Vec<u8> = Vec::with_capacity(expected + ALIGN);
        let start = memory.as_ptr().align_offset(ALIGN).min(ALIGN);
        memory.resize(start, 0);
        Self { memory, start }
    }

    /// Appends.
    pub fn extend_from_slice(&mut self, bytes: &[u8]) {
        self.memory.extend_from_slice(bytes);
    }

    /// The bytes, in the memory where they are, unless that is much more than they need.
    #[must_use]
    pub fn into_bytes(mut self) -> Bytes {
        if self.memory.capacity() / 2 > self.memory.len() {
            self.memory.shrink_to_fit();
        }
        Bytes::from(self.memory).split_off(self.start)
    }
}

impl Deref for Gathered {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.memory[self.start..]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_of_every_length_hold_what_was_written() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        for len in [0, 1, LEAST - 1, LEAST, LEAST + 1, PIECE, PIECE + ALIGN, 2 * PIECE + 12345] {
            let bytes: Vec<u8> = (0..len).map(|i| (i * 7 % 251) as u8).collect();
            write(&path, &bytes).unwrap();
            assert!(std::fs::read(&path).unwrap() == bytes, "{len}");
            assert!(read(&path).unwrap() == bytes, "{len}");
        }
        for expected in [0, LEAST - 1, LEAST, 2 * LEAST] {
            for len in [0, 1, LEAST - 1, LEAST, LEAST + 12345] {
                let bytes: Vec<u8> = (0..len).map(|i| (i * 11 % 253) as u8).collect();
                let mut gathered = Gathered::new(expected);
                bytes.chunks(100_000).for_each(|piece| gathered.extend_from_slice(piece));
                assert!(*gathered == *bytes, "{expected}, {len}");
                let gathered = gathered.into_bytes();
                assert!(gathered == bytes, "{expected}, {len}");
                if expected >= len.max(LEAST) && len >= LEAST {
                    assert!(gathered.as_ptr().addr().is_multiple_of(ALIGN), "{expected}, {len}");
                }
                write(&path, &gathered).unwrap();
                assert!(std::fs::read(&path).unwrap() == bytes, "{expected}, {len}");
            }
        }
        assert_eq!(read(&dir.path().join("none")).unwrap_err().kind(), io::ErrorKind::NotFound);
        let there = create(&path, &[7; LEAST]).unwrap_err();
        assert_eq!(there.kind(), io::ErrorKind::AlreadyExists);
        let other = dir.path().join("other");
        create(&other, &[7; LEAST + 1]).unwrap();
        assert!(std::fs::read(&other).unwrap() == [7; LEAST + 1]);
    }
}
