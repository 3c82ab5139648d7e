//! Names of the objects on a replica.
//!
//! Owns the mapping between an object's identity and its path below the replica's root. Knows no content.
//!
//! ```text
//! volume.json
//! epochs/{epoch:08x}.json
//! epochs/{epoch:08x}.released.json
//! segments/{number >> 12:08x}/{number:016x}-{epoch:08x}.seg
//! checkpoints/{number:016x}-{epoch:08x}/part-{index:05}
//! checkpoints/{number:016x}-{epoch:08x}/manifest
//! ```
//!
//! A folder of `segments/` therefore holds 4096 numbers.

use std::fmt;

use super::{MAX_JSON, checkpoint, segment};
use crate::ids::{Epoch, SegmentNo};

/// Prefix of all writer's claims.
pub const EPOCHS: &str = "epochs/";
/// Prefix of all segments.
pub const SEGMENTS: &str = "segments/";
/// Prefix of all checkpoints.
pub const CHECKPOINTS: &str = "checkpoints/";

/// The most bytes of any object.
pub const MOST_BYTES: u64 = segment::MAX_LEN;

/// Segment numbers that share a folder, as a power of two.
const FOLDER_BITS: u32 = 12;

/// Identity of an object on a replica; prints as its path.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ObjectName {
    /// The description of the volume.
    Volume,
    /// A writer's claim.
    Claim(Epoch),
    /// The mark that a writer ended its tenure in good order.
    Release(Epoch),
    /// A segment.
    Segment(SegmentNo, Epoch),
    /// One part of a checkpoint.
    CheckpointPart(SegmentNo, Epoch, u32),
    /// A checkpoint's manifest, written last.
    CheckpointManifest(SegmentNo, Epoch),
}

impl ObjectName {
    /// Reads a path below the replica's root; `None` when it is not one that mirrorfs would make.
    #[must_use]
    pub fn parse(path: &str) -> Option<Self> {
        let name = if path == "volume.json" {
            Self::Volume
        } else if let Some(rest) = path.strip_prefix(EPOCHS) {
            match rest.strip_suffix(".released.json") {
                Some(hex) => Self::Release(epoch(hex)?),
                None => Self::Claim(epoch(rest.strip_suffix(".json")?)?),
            }
        } else if let Some(rest) = path.strip_prefix(SEGMENTS) {
            let (_, file) = rest.split_once('/')?;
            let (number, epoch) = pair(file.strip_suffix(".seg")?)?;
            Self::Segment(number, epoch)
        } else {
            let (folder, file) = path.strip_prefix(CHECKPOINTS)?.split_once('/')?;
            let (number, epoch) = pair(folder)?;
            match file.strip_prefix("part-") {
                Some(index) => Self::CheckpointPart(number, epoch, index.parse().ok()?),
                None if file == "manifest" => Self::CheckpointManifest(number, epoch),
                None => return None,
            }
        };
        // Whatever is not written exactly like this (upper case, signs, other widths or folders) is foreign.
        (name.to_string() == path).then_some(name)
    }

    /// The most bytes that such an object has. A larger one is damage, and is not read.
    #[must_use]
    pub fn most_bytes(&self) -> u64 {
        match self {
            Self::Volume => 1 << 20,
            Self::Claim(_) | Self::Release(_) => 64 << 10,
            Self::Segment(..) => segment::MAX_LEN,
            Self::CheckpointPart(..) => checkpoint::MAX_PART_LEN,
            Self::CheckpointManifest(..) => MAX_JSON as u64,
        }
    }

    /// The path below the replica's root.
    #[must_use]
    pub fn path(&self) -> String {
        self.to_string()
    }
}

impl fmt::Display for ObjectName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Volume => f.write_str("volume.json"),
            Self::Claim(e) => write!(f, "{EPOCHS}{:08x}.json", e.0),
            Self::Release(e) => write!(f, "{EPOCHS}{:08x}.released.json", e.0),
            Self::Segment(n, e) => {
                write!(f, "{SEGMENTS}{:08x}/{:016x}-{:08x}.seg", n.0 >> FOLDER_BITS, n.0, e.0)
            }
            Self::CheckpointPart(n, e, i) => {
                write!(f, "{CHECKPOINTS}{:016x}-{:08x}/{}", n.0, e.0, part_file(*i))
            }
            Self::CheckpointManifest(n, e) => write!(f, "{CHECKPOINTS}{:016x}-{:08x}/{MANIFEST}", n.0, e.0),
        }
    }
}

/// File name of a checkpoint's manifest within its folder.
pub const MANIFEST: &str = "manifest";

/// File name of part `index` within a checkpoint's folder.
#[must_use]
pub fn part_file(index: u32) -> String {
    format!("part-{index:05}")
}

/// Folder of a checkpoint, without a trailing slash.
#[must_use]
pub fn checkpoint_folder(number: SegmentNo, epoch: Epoch) -> String {
    format!("{CHECKPOINTS}{}", checkpoint_stem(number, epoch))
}

/// Last component of a checkpoint's folder; also the name of its staging folder.
#[must_use]
pub fn checkpoint_stem(number: SegmentNo, epoch: Epoch) -> String {
    format!("{:016x}-{:08x}", number.0, epoch.0)
}

fn epoch(hex: &str) -> Option<Epoch> {
    u32::from_str_radix(hex, 16).ok().filter(|e| *e != 0).map(Epoch)
}

fn pair(stem: &str) -> Option<(SegmentNo, Epoch)> {
    let (number, e) = stem.split_once('-')?;
    let number = u64::from_str_radix(number, 16).ok().filter(|n| *n != 0)?;
    Some((SegmentNo(number), epoch(e)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_round_trip() {
        let (n, e) = (SegmentNo(0x12_3456), Epoch(7));
        for (name, path) in [
            (ObjectName::Volume, "volume.json"),
            (ObjectName::Claim(e), "epochs/00000007.json"),
            (ObjectName::Release(e), "epochs/00000007.released.json"),
            (ObjectName::Segment(n, e), "segments/00000123/0000000000123456-00000007.seg"),
            (ObjectName::CheckpointPart(n, e, 42), "checkpoints/0000000000123456-00000007/part-00042"),
            (ObjectName::CheckpointManifest(n, e), "checkpoints/0000000000123456-00000007/manifest"),
        ] {
            assert_eq!(name.to_string(), path);
            assert_eq!(ObjectName::parse(path), Some(name));
        }
        let last = ObjectName::Segment(SegmentNo(u64::MAX), Epoch(u32::MAX));
        assert_eq!(ObjectName::parse(&last.path()), Some(last));
        let wide = ObjectName::CheckpointPart(n, e, 123_456);
        assert_eq!(ObjectName::parse(&wide.path()), Some(wide));
    }

    #[test]
    fn foreign_names_are_refused() {
        for path in [
            "",
            "volume.json ",
            "/volume.json",
            "Volume.json",
            "epochs/7.json",
            "epochs/0000000A.json",
            "epochs/00000000.json",
            "epochs/+0000007.json",
            "epochs/00000007.json.tmp",
            "segments/0000000000000001-00000001.seg",
            "segments/00000001/0000000000000001-00000001.seg",
            "segments/00000000/0000000000000000-00000001.seg",
            "segments/00000000/0000000000000001-00000001.seg/x",
            "segments/00000000/0000000000000001.seg",
            "checkpoints/0000000000000001-00000001",
            "checkpoints/0000000000000001-00000001/part-1",
            "checkpoints/0000000000000001-00000001/manifest.json",
            "checkpoints/0000000000000001-00000001/x/manifest",
            "photos/cat.jpg",
        ] {
            assert_eq!(ObjectName::parse(path), None, "{path}");
        }
    }
}
