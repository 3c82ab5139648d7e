//! The small JSON objects: `volume.json`, a writer's claim, and the mark of its end.
//!
//! Owns their members and limits. Knows no clock and draws no randomness: times and ids come from the caller.

use serde::{Deserialize, Serialize};

use super::codec::FormatError;
use super::json;
use super::limits::MAX_SMALL_JSON;
use crate::ids::{Epoch, SegmentNo, VolumeId};

/// Smallest block size of a volume, in bytes.
pub const MIN_BLOCK_SIZE: u32 = 64 << 10;
/// Largest block size of a volume, in bytes.
pub const MAX_BLOCK_SIZE: u32 = 16 << 20;

const VOLUME: &str = "mirrorfs volume";
const CLAIM: &str = "mirrorfs epoch claim";
const RELEASE: &str = "mirrorfs epoch release";

/// How new frames of a volume are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Compression {
    /// As they are.
    None,
    /// zstd where it pays.
    Zstd,
}

/// `volume.json`: what must be known before anything else of a volume can be read. Written once, never changed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Volume {
    /// Which volume it is.
    pub volume: VolumeId,
    /// Seconds since 1970 of its creation.
    pub created_at: u64,
    /// Bytes of a full block: a power of two from [`MIN_BLOCK_SIZE`] to [`MAX_BLOCK_SIZE`].
    pub block_size: u32,
    /// How new frames are stored.
    pub compression: Compression,
    /// Reserved for encryption: how the volume's key is wrapped. `null` means not encrypted.
    pub key_wrapping: Option<serde_json::Value>,
    /// The program that created it, such as `mirrorfs 0.1.0`.
    pub created_by: String,
}

impl Volume {
    /// The object's bytes.
    pub fn encode(&self) -> Result<Vec<u8>, FormatError> {
        self.check()?;
        json::encode(VOLUME, self)
    }

    /// Reads `volume.json`.
    pub fn decode(bytes: &[u8]) -> Result<Self, FormatError> {
        let volume: Self = json::decode(VOLUME, bytes, MAX_SMALL_JSON)?;
        volume.check()?;
        Ok(volume)
    }

    fn check(&self) -> Result<(), FormatError> {
        check_block_size(self.block_size)?;
        if self.key_wrapping.is_some() {
            return Err(FormatError::newer(VOLUME, "encrypted", "unencrypted volumes"));
        }
        Ok(())
    }
}

/// Refuses a block size that no volume may have.
pub fn check_block_size(bytes: u32) -> Result<(), FormatError> {
    if bytes.is_power_of_two() && (MIN_BLOCK_SIZE..=MAX_BLOCK_SIZE).contains(&bytes) {
        Ok(())
    } else {
        Err(FormatError::new(
            VOLUME,
            format!("block size {bytes} is not a power of two from 64 KiB to 16 MiB"),
        ))
    }
}

/// The first segment of a claim that only ends the tenure before it. Its maker then reads what was stored by then, and claims the next
/// epoch with the number where that ends; no segment is ever written under this one.
pub const NO_SEGMENT: SegmentNo = SegmentNo(u64::MAX);

/// `epochs/{epoch}.json`: one writer's claim of its tenure, created with put-if-absent, never changed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Claim {
    /// Which volume it is about.
    pub volume: VolumeId,
    /// The tenure.
    pub epoch: Epoch,
    /// 16 random bytes that tell this claim from another writer's claim of the same epoch.
    #[serde(with = "json::hex")]
    pub claim_id: [u8; 16],
    /// Name of the machine.
    pub host: String,
    /// Process on it.
    pub pid: u32,
    /// Seconds since 1970.
    pub claimed_at: u64,
    /// Number of the first segment that this writer may write, or [`NO_SEGMENT`]. Segments of lower epochs from here on are a lost branch.
    pub first_segment: SegmentNo,
    /// The writer's program version.
    pub mirrorfs: String,
}

impl Claim {
    /// Where this writer's branch begins; `None` when the claim only ends the tenure before it.
    #[must_use]
    pub fn begins(&self) -> Option<SegmentNo> {
        (self.first_segment != NO_SEGMENT).then_some(self.first_segment)
    }

    /// The object's bytes.
    pub fn encode(&self) -> Result<Vec<u8>, FormatError> {
        json::encode(CLAIM, self)
    }

    /// Reads a claim that was found under the name of `epoch`.
    pub fn decode(bytes: &[u8], epoch: Epoch) -> Result<Self, FormatError> {
        let claim: Self = json::decode(CLAIM, bytes, MAX_SMALL_JSON)?;
        if claim.epoch != epoch {
            return Err(FormatError::new(CLAIM, format!("it claims epoch {}, not {epoch}", claim.epoch)));
        }
        if claim.first_segment.0 == 0 {
            return Err(FormatError::new(CLAIM, "first segment 0"));
        }
        Ok(claim)
    }
}

/// `epochs/{epoch}.released.json`: the writer ended in good order; everything it had is on this replica.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Release {
    /// Which volume it is about.
    pub volume: VolumeId,
    /// The tenure that ended.
    pub epoch: Epoch,
    /// The claim that it ends.
    #[serde(with = "json::hex")]
    pub claim_id: [u8; 16],
    /// Seconds since 1970.
    pub released_at: u64,
    /// The last segment that is there when nothing was lost.
    pub last_segment: SegmentNo,
}

impl Release {
    /// The object's bytes.
    pub fn encode(&self) -> Result<Vec<u8>, FormatError> {
        json::encode(RELEASE, self)
    }

    /// Reads the mark that was found under the name of `epoch`.
    pub fn decode(bytes: &[u8], epoch: Epoch) -> Result<Self, FormatError> {
        let release: Self = json::decode(RELEASE, bytes, MAX_SMALL_JSON)?;
        if release.epoch != epoch {
            return Err(FormatError::new(
                RELEASE,
                format!("it releases epoch {}, not {epoch}", release.epoch),
            ));
        }
        Ok(release)
    }
}

/// What tests of other modules begin with.
#[cfg(test)]
pub(crate) mod testing {
    use super::*;

    /// A volume told apart by `seed`.
    pub(crate) fn volume(seed: u8) -> Volume {
        Volume {
            volume: VolumeId::from_random([seed; 16]),
            created_at: 1,
            block_size: 1 << 20,
            compression: Compression::Zstd,
            key_wrapping: None,
            created_by: "test".into(),
        }
    }

    /// A claim on `volume(1)`.
    pub(crate) fn claim(epoch: u32, id: u8, first: u64) -> Claim {
        Claim {
            volume: volume(1).volume,
            epoch: Epoch(epoch),
            claim_id: [id; 16],
            host: format!("host{id}"),
            pid: 1,
            claimed_at: 2,
            first_segment: SegmentNo(first),
            mirrorfs: "test".into(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn volume() -> Volume {
        Volume {
            volume: VolumeId::from_random([7; 16]),
            created_at: 1_790_000_000,
            block_size: 1 << 20,
            compression: Compression::Zstd,
            key_wrapping: None,
            created_by: "mirrorfs 0.1.0".into(),
        }
    }

    fn claim() -> Claim {
        Claim {
            volume: volume().volume,
            epoch: Epoch(3),
            claim_id: [0xab; 16],
            host: "host \"é".into(),
            pid: 17,
            claimed_at: 1_790_000_001,
            first_segment: SegmentNo(12),
            mirrorfs: "0.1.0".into(),
        }
    }

    /// The text with other members and the checksum that belongs to it.
    fn edited(bytes: &[u8], from: &str, to: &str) -> Vec<u8> {
        let text = std::str::from_utf8(bytes).unwrap();
        let (body, _) = text.split_once(",\n  \"blake3\"").unwrap();
        assert!(body.contains(from), "{from} is not in {body}");
        let body = body.replace(from, to);
        let hash = blake3::hash(body.as_bytes()).to_hex();
        format!("{body},\n  \"blake3\": \"{hash}\"\n}}\n").into_bytes()
    }

    #[test]
    fn objects_round_trip() {
        assert_eq!(Volume::decode(&volume().encode().unwrap()), Ok(volume()));
        assert_eq!(Claim::decode(&claim().encode().unwrap(), Epoch(3)), Ok(claim()));
        assert!(Claim::decode(&claim().encode().unwrap(), Epoch(4)).is_err());
        let release = Release {
            volume: volume().volume,
            epoch: Epoch(3),
            claim_id: [1; 16],
            released_at: 5,
            last_segment: SegmentNo(9),
        };
        assert_eq!(Release::decode(&release.encode().unwrap(), Epoch(3)), Ok(release));
        let json: serde_json::Value = serde_json::from_slice(&claim().encode().unwrap()).unwrap();
        assert_eq!(json["claim_id"], "ab".repeat(16));
    }

    #[test]
    fn newer_formats_say_upgrade_and_unknown_members_are_ignored() {
        let bytes = volume().encode().unwrap();
        for (from, to) in [
            ("\"format_version\": 1", "\"format_version\": 2"),
            ("\"requires\": []", "\"requires\": [\"parity\"]"),
            ("\"key_wrapping\": null", "\"key_wrapping\": {\"kdf\": \"argon2id\"}"),
        ] {
            let error = Volume::decode(&edited(&bytes, from, to)).unwrap_err();
            assert!(error.newer && error.to_string().contains("upgrade mirrorfs"), "{error}");
        }
        let more = edited(&bytes, "\"created_at\"", "\"colour\": \"blue\",\n  \"created_at\"");
        assert_eq!(Volume::decode(&more), Ok(volume()));
        let other = edited(&bytes, "\"mirrorfs volume\"", "\"mirrorfs epoch claim\"");
        assert!(!Volume::decode(&other).unwrap_err().newer);
    }

    #[test]
    fn block_size_has_bounds() {
        for good in [64 << 10, 1 << 20, 16 << 20] {
            assert!(check_block_size(good).is_ok());
        }
        for bad in [0, 1, 4096, 32 << 10, (1 << 20) + 1, 3 << 20, 32 << 20] {
            assert!(check_block_size(bad).is_err(), "{bad}");
            let text = format!("\"block_size\": {bad}");
            let bytes = edited(&volume().encode().unwrap(), "\"block_size\": 1048576", &text);
            assert!(Volume::decode(&bytes).is_err());
        }
    }

    #[test]
    fn every_damage_is_refused() {
        let bytes = claim().encode().unwrap();
        for cut in 0..bytes.len() {
            assert!(Claim::decode(&bytes[..cut], Epoch(3)).is_err(), "cut at {cut}");
        }
        for bit in 0..bytes.len() * 8 {
            let mut bad = bytes.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(Claim::decode(&bad, Epoch(3)).is_err(), "bit {bit}");
        }
    }
}
