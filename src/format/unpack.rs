//! Reading a section piece by piece, so that unpacking takes the memory of one entry and not that
//! of the whole section.
//!
//! An *item* is what the caller reads at a time (an operation, an entry). The bytes of the item at
//! hand stay in the buffer until the next one begins.

use std::io::Read;
use std::ops::Range;

use super::codec::{FormatError, varint_of};
use super::frame::Codec;
use super::limits::MAX_WINDOW_LOG;

/// Bytes unpacked at a time.
const PIECE: usize = 64 << 10;

enum Source<'a> {
    Raw(&'a [u8]),
    Zstd(Box<zstd::stream::read::Decoder<'static, &'a [u8]>>),
}

/// Reads the raw bytes of a section in order.
pub(super) struct Unpacker<'a> {
    what: &'static str,
    source: Source<'a>,
    buf: Vec<u8>,
    /// Where the item at hand begins in `buf`.
    item: usize,
    /// The next byte to read in `buf`.
    at: usize,
    /// Raw bytes that were not taken from the source yet.
    left: u64,
}

impl<'a> Unpacker<'a> {
    /// Reads `stored`, which unpacks to exactly `raw_len` bytes. Takes no memory for them yet.
    pub fn new(
        what: &'static str,
        codec: Codec,
        stored: &'a [u8],
        raw_len: u64,
    ) -> Result<Self, FormatError> {
        let source = match codec {
            Codec::Raw => Source::Raw(stored),
            Codec::Zstd => {
                let failed = |e: std::io::Error| FormatError::new(what, format!("zstd: {e}"));
                let mut decoder = zstd::stream::read::Decoder::with_buffer(stored).map_err(failed)?;
                decoder.window_log_max(MAX_WINDOW_LOG).map_err(failed)?;
                Source::Zstd(Box::new(decoder.single_frame()))
            }
        };
        Ok(Self { what, source, buf: Vec::new(), item: 0, at: 0, left: raw_len })
    }

    /// A complaint about what is being read.
    pub fn error(&self, why: impl Into<String>) -> FormatError {
        FormatError::new(self.what, why)
    }

    /// Raw bytes that were not read yet.
    pub fn remaining(&self) -> u64 {
        self.left + (self.buf.len() - self.at) as u64
    }

    /// The next item begins here; the bytes of the one before may go.
    pub fn begin_item(&mut self) {
        self.item = self.at;
    }

    /// Takes one byte.
    pub fn u8(&mut self) -> Result<u8, FormatError> {
        self.need(1)?;
        let byte = self.buf[self.at];
        self.at += 1;
        Ok(byte)
    }

    /// Takes an unsigned LEB128 number of at most 64 bits.
    pub fn varint(&mut self) -> Result<u64, FormatError> {
        let what = self.what;
        varint_of(what, || self.u8())
    }

    /// Takes a byte string of at most `most` bytes; gives its place in the item.
    pub fn blob(&mut self, most: usize) -> Result<Range<usize>, FormatError> {
        let len = self.varint()?;
        if len > most as u64 {
            return Err(self.error(format!("a byte string of {len} bytes, {most} are allowed")));
        }
        let len = len as usize;
        self.need(len)?;
        let start = self.at - self.item;
        self.at += len;
        Ok(start..start + len)
    }

    /// Bytes of the item at hand.
    pub fn bytes(&self, place: Range<usize>) -> &[u8] {
        &self.buf[self.item + place.start..self.item + place.end]
    }

    /// Has the next `n` bytes in the buffer.
    fn need(&mut self, n: usize) -> Result<(), FormatError> {
        let have = self.buf.len() - self.at;
        if have >= n {
            return Ok(());
        }
        if (n - have) as u64 > self.left {
            return Err(self.error(format!("{n} bytes wanted, {} left", self.remaining())));
        }
        self.buf.drain(..self.item);
        self.at -= self.item;
        self.item = 0;
        let from = self.buf.len();
        let more = ((n - have).max(PIECE) as u64).min(self.left);
        self.buf.resize(from + more as usize, 0);
        let piece = &mut self.buf[from..];
        let read = match &mut self.source {
            Source::Raw(bytes) => bytes.read_exact(piece),
            Source::Zstd(decoder) => decoder.read_exact(piece),
        };
        if let Err(e) = read {
            return Err(self.error(format!("its stored bytes are damaged: {e}")));
        }
        self.left -= more;
        Ok(())
    }

    /// Fails unless everything was read and nothing more is stored.
    pub fn finish(mut self) -> Result<(), FormatError> {
        if self.remaining() != 0 {
            return Err(self.error(format!("{} bytes too many", self.remaining())));
        }
        let rest = match &mut self.source {
            Source::Raw(bytes) => bytes.len(),
            Source::Zstd(decoder) => match decoder.read(&mut [0]) {
                Ok(0) => decoder.get_ref().len(),
                Ok(more) => more,
                Err(e) => return Err(self.error(format!("its stored bytes are damaged: {e}"))),
            },
        };
        match rest {
            0 => Ok(()),
            _ => Err(self.error("more is stored than it unpacks to")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn items(codec: Codec, stored: &[u8], raw_len: u64) -> Result<Vec<Vec<u8>>, FormatError> {
        let mut u = Unpacker::new("test", codec, stored, raw_len)?;
        let mut out = Vec::new();
        while u.remaining() > 0 {
            u.begin_item();
            let (a, b) = (u.blob(200_000)?, u.blob(10)?);
            out.push([u.bytes(a), u.bytes(b)].concat());
        }
        u.finish().map(|()| out)
    }

    #[test]
    fn items_come_back_whatever_their_size() {
        let mut raw = Vec::new();
        let mut expected = Vec::new();
        for n in [0, 1, 63 << 10, 64 << 10, 65 << 10, 200_000, 3, 150_000] {
            let long: Vec<u8> = (0..n).map(|i| (i * 7 + n) as u8).collect();
            super::super::codec::put_blob(&mut raw, &long);
            super::super::codec::put_blob(&mut raw, b"short");
            expected.push([&long[..], b"short"].concat());
        }
        let packed = zstd::bulk::compress(&raw, 3).unwrap();
        let len = raw.len() as u64;
        assert_eq!(items(Codec::Raw, &raw, len).unwrap(), expected);
        assert_eq!(items(Codec::Zstd, &packed, len).unwrap(), expected);
        // Neither more nor less than was promised, and nothing behind it.
        for wrong in [len - 1, len + 1, u64::MAX] {
            assert!(items(Codec::Raw, &raw, wrong).is_err());
            assert!(items(Codec::Zstd, &packed, wrong).is_err());
        }
        assert!(items(Codec::Zstd, &[&packed[..], &[0]].concat(), len).is_err());
        assert!(items(Codec::Zstd, &[&packed[..], &packed[..]].concat(), len).is_err());
        for cut in 0..packed.len() {
            assert!(items(Codec::Zstd, &packed[..cut], len).is_err(), "cut at {cut}");
        }
    }

    #[test]
    fn a_window_beyond_the_limit_is_refused() {
        // A frame header that asks the reader to keep 128 MiB: magic, descriptor without a size,
        // window descriptor (17 << 3).
        let bomb = [0x28, 0xb5, 0x2f, 0xfd, 0x00, 17 << 3, 0x01, 0x00, 0x00];
        let error = items(Codec::Zstd, &bomb, 64 << 20).unwrap_err();
        assert!(error.why.contains("memory"), "{error}");
    }
}
