//! Reading and writing little-endian fields in byte slices.
//!
//! Owns the bounds checks that every decoder of this crate relies on; knows no format by itself.

use std::fmt;

/// A decoder's complaint: what was read and why it cannot be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FormatError {
    /// What was being decoded, such as `segment header`.
    pub what: &'static str,
    /// Why it is refused.
    pub why: String,
    /// The bytes are not damaged but of a format that only a newer mirrorfs reads: never "repair" them.
    pub newer: bool,
}

impl FormatError {
    /// A complaint about `what`.
    pub fn new(what: &'static str, why: impl Into<String>) -> Self {
        Self { what, why: why.into(), newer: false }
    }

    /// Says that `what` is of a format (`found`) that came after this program (which knows `known`).
    pub fn newer(what: &'static str, found: impl fmt::Display, known: impl fmt::Display) -> Self {
        let why = format!("newer format ({found}; this mirrorfs reads {known}): upgrade mirrorfs");
        Self { what, why, newer: true }
    }
}

impl fmt::Display for FormatError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.what, self.why)
    }
}

impl std::error::Error for FormatError {}

/// A cursor over bytes that never reads past their end.
#[derive(Clone, Debug)]
pub struct Decoder<'a> {
    what: &'static str,
    rest: &'a [u8],
}

impl<'a> Decoder<'a> {
    /// Starts reading `bytes`; `what` names them in errors.
    #[must_use]
    pub fn new(what: &'static str, bytes: &'a [u8]) -> Self {
        Self { what, rest: bytes }
    }

    /// A complaint about what is being read.
    pub fn error(&self, why: impl Into<String>) -> FormatError {
        FormatError::new(self.what, why)
    }

    /// Bytes not yet read.
    #[must_use]
    pub fn remaining(&self) -> usize {
        self.rest.len()
    }

    /// Takes `n` bytes.
    pub fn bytes(&mut self, n: usize) -> Result<&'a [u8], FormatError> {
        if n > self.rest.len() {
            return Err(self.error(format!("{n} bytes wanted, {} left", self.rest.len())));
        }
        let (head, rest) = self.rest.split_at(n);
        self.rest = rest;
        Ok(head)
    }

    /// Takes all that is left.
    pub fn rest(&mut self) -> &'a [u8] {
        std::mem::take(&mut self.rest)
    }

    /// Takes an array of `N` bytes.
    pub fn array<const N: usize>(&mut self) -> Result<[u8; N], FormatError> {
        let mut out = [0; N];
        out.copy_from_slice(self.bytes(N)?);
        Ok(out)
    }

    /// Takes one byte.
    pub fn u8(&mut self) -> Result<u8, FormatError> {
        Ok(self.array::<1>()?[0])
    }

    /// Takes a little-endian u16.
    pub fn u16(&mut self) -> Result<u16, FormatError> {
        Ok(u16::from_le_bytes(self.array()?))
    }

    /// Takes a little-endian u32.
    pub fn u32(&mut self) -> Result<u32, FormatError> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    /// Takes a little-endian u64.
    pub fn u64(&mut self) -> Result<u64, FormatError> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    /// Takes a little-endian i64.
    pub fn i64(&mut self) -> Result<i64, FormatError> {
        Ok(i64::from_le_bytes(self.array()?))
    }

    /// Takes an unsigned LEB128 number of at most 64 bits.
    pub fn varint(&mut self) -> Result<u64, FormatError> {
        let what = self.what;
        varint_of(what, || self.u8())
    }

    /// Takes a byte string preceded by its length as a variable-length number.
    pub fn blob(&mut self) -> Result<&'a [u8], FormatError> {
        let n = self.varint()?;
        let n = usize::try_from(n).map_err(|_| self.error("a length exceeds the address space"))?;
        self.bytes(n)
    }

    /// Fails unless everything was read.
    pub fn finish(self) -> Result<(), FormatError> {
        if self.rest.is_empty() {
            Ok(())
        } else {
            Err(self.error(format!("{} bytes too many", self.rest.len())))
        }
    }
}

/// Reads an unsigned LEB128 number of at most 64 bits out of single bytes.
pub(super) fn varint_of(
    what: &'static str,
    mut next: impl FnMut() -> Result<u8, FormatError>,
) -> Result<u64, FormatError> {
    let mut value = 0u64;
    for shift in (0..64).step_by(7) {
        let byte = next()?;
        let bits = u64::from(byte & 0x7f);
        if shift == 63 && bits > 1 {
            break;
        }
        value |= bits << shift;
        if byte & 0x80 == 0 {
            return Ok(value);
        }
    }
    Err(FormatError::new(what, "a variable-length number is longer than 64 bits"))
}

/// Appends an unsigned LEB128 number.
pub fn put_varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push((value & 0x7f) as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

/// Appends a byte string preceded by its length as a variable-length number.
pub fn put_blob(out: &mut Vec<u8>, bytes: &[u8]) {
    put_varint(out, bytes.len() as u64);
    out.extend_from_slice(bytes);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn varint_round_trips_and_refuses_overlong() {
        for value in [0, 1, 127, 128, 300, u64::from(u32::MAX), u64::MAX] {
            let mut out = Vec::new();
            put_varint(&mut out, value);
            let mut d = Decoder::new("test", &out);
            assert_eq!(d.varint(), Ok(value));
            assert!(d.finish().is_ok());
        }
        assert!(Decoder::new("test", &[0xff; 10]).varint().is_err());
        assert!(Decoder::new("test", &[0x80]).varint().is_err());
    }

    #[test]
    fn never_reads_past_the_end() {
        let mut d = Decoder::new("test", &[1, 2, 3]);
        assert!(d.u32().is_err());
        assert_eq!(d.u16(), Ok(0x0201));
        assert!(d.clone().finish().is_err());
        assert_eq!(d.rest(), &[3]);
    }
}
