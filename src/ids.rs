//! Newtypes for the numbers and names that the modules hand to each other.
//!
//! Owns nothing but their printing and parsing; knows no module of the crate.

use std::fmt;
use std::str::FromStr;

macro_rules! number {
    ($(#[$meta:meta])* $name:ident, $inner:ty, $width:literal) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[derive(serde::Serialize, serde::Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub $inner);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(&self.0, f)
            }
        }

        impl $name {
            /// The number after this one; saturates at the type's end.
            #[must_use]
            pub const fn next(self) -> Self {
                Self(self.0.saturating_add(1))
            }

            /// The fixed-width hexadecimal form used in object names.
            #[must_use]
            pub fn hex(self) -> String {
                format!("{:0width$x}", self.0, width = $width)
            }
        }
    };
}

number!(
    /// Number of an inode. 1 is the root directory; 0 is never given.
    Ino, u64, 16
);
number!(
    /// Log sequence number of a record. The first record of a volume is 1; 0 means "before all".
    Lsn, u64, 16
);
number!(
    /// Number of a block, never reused within a volume. 0 means "no block" (a hole).
    BlockId, u64, 16
);
number!(
    /// Number of a segment. The first of a volume is 1; 0 means "before all".
    SegmentNo, u64, 16
);
number!(
    /// Number of a writer's tenure. The first is 1; 0 means "never mounted".
    Epoch, u32, 8
);

/// No inode and no block gets this number or a higher one: a volume that makes a million of them a
/// second comes here in a hundred thousand years. So a higher number is damage or forgery, and no
/// addition to a lower one wraps.
pub const NUMBERS_END: u64 = 1 << 62;

impl Ino {
    /// The root directory.
    pub const ROOT: Ino = Ino(1);
}

/// BLAKE3 hash of a block's raw content (not of its stored form).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlockHash(pub [u8; 32]);

impl BlockHash {
    /// Hashes a block's raw content.
    #[must_use]
    pub fn of(raw: &[u8]) -> Self {
        Self(*blake3::hash(raw).as_bytes())
    }
}

impl fmt::Display for BlockHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&blake3::Hash::from_bytes(self.0).to_hex())
    }
}

impl fmt::Debug for BlockHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "BlockHash({self})")
    }
}

/// UUID of a volume, written into every object that belongs to it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize)]
#[serde(transparent)]
pub struct VolumeId(pub uuid::Uuid);

impl VolumeId {
    /// A version 4 UUID from 16 random bytes, which the caller draws.
    #[must_use]
    pub fn from_random(bytes: [u8; 16]) -> Self {
        Self(uuid::Builder::from_random_bytes(bytes).into_uuid())
    }

    /// The 16 bytes as they stand in object headers.
    #[must_use]
    pub fn bytes(self) -> [u8; 16] {
        *self.0.as_bytes()
    }
}

impl fmt::Display for VolumeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

impl fmt::Debug for VolumeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "VolumeId({})", self.0)
    }
}

/// A replica's name within its volume: 1 to 64 characters out of `a-z A-Z 0-9 . _ -`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize)]
#[serde(transparent)]
pub struct ReplicaName(String);

impl ReplicaName {
    /// The name as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for ReplicaName {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        let ok = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
        if s.is_empty() || s.len() > 64 || !s.chars().all(ok) {
            return Err(format!("replica name {s:?} must be 1 to 64 characters out of a-z A-Z 0-9 . _ -"));
        }
        Ok(Self(s.to_owned()))
    }
}

impl fmt::Display for ReplicaName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl<'de> serde::Deserialize<'de> for ReplicaName {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        String::deserialize(d)?.parse().map_err(serde::de::Error::custom)
    }
}
