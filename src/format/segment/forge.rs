//! Making the hashes of a segment right again, as an attacker does who knows the format. For
//! fuzzing and tests.

use super::{FOOTER_LEN, HEADER_LEN};

/// Recomputes every checksum and hash of `segment`, whose lengths stay as they are. Does nothing
/// with what is too short.
pub fn reseal(segment: &mut [u8]) {
    let Some(end) = segment.len().checked_sub(FOOTER_LEN).filter(|end| *end >= HEADER_LEN) else { return };
    let crc = crc32fast::hash(&segment[..124]);
    segment[124..HEADER_LEN].copy_from_slice(&crc.to_le_bytes());
    let header = segment[..HEADER_LEN].to_vec();
    segment[end..end + HEADER_LEN].copy_from_slice(&header);
    let mut frames = [0; 8];
    frames.copy_from_slice(&segment[end + 144..end + 152]);
    let meta = usize::try_from(u64::from_le_bytes(frames))
        .ok()
        .and_then(|len| len.checked_add(HEADER_LEN))
        .unwrap_or(end)
        .min(end);
    let mut hasher = blake3::Hasher::new();
    hasher.update(&header);
    hasher.update(&segment[meta..end]);
    segment[end + 224..end + 256].copy_from_slice(hasher.finalize().as_bytes());
    let body = blake3::hash(&segment[..end]);
    segment[end + 256..end + 288].copy_from_slice(body.as_bytes());
    let hash = blake3::hash(&segment[end..end + 288]);
    segment[end + 288..end + 320].copy_from_slice(hash.as_bytes());
}
