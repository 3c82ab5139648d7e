//! Limits of the format, which bound what decoding may take of memory.
//!
//! `docs/format.md` lists them under *Limits*. A reader refuses what goes beyond them before it
//! takes memory for it.

/// Longest key, in bytes.
pub const MAX_KEY: usize = 4 << 10;
/// Longest value, in bytes.
pub const MAX_VALUE: usize = 128 << 10;
/// Raw bytes of a compressed section for each stored byte, at most. A writer stores a section raw
/// that would shrink more.
pub const MAX_RATIO: u64 = 256;
/// Operations of a compressed section for each stored byte, at most. A writer stores a section raw
/// that would have more.
pub const OPS_PER_BYTE: u64 = 2;
/// Largest distance that a compressed section may refer back, as a power of two: a reader keeps
/// that much of its raw bytes.
pub const MAX_WINDOW_LOG: u32 = 22;
/// Largest `volume.json`, claim or release, in bytes.
pub const MAX_SMALL_JSON: usize = 64 << 10;

/// Whether a compressed section of `stored` bytes may hold `raw` bytes in `ops` operations.
#[must_use]
pub(super) fn is_plausible(stored: u64, raw: u64, ops: u64) -> bool {
    raw <= stored.saturating_mul(MAX_RATIO) && ops <= stored.saturating_mul(OPS_PER_BYTE)
}
