//! The frame around the small JSON objects of a replica: format, version, required features, checksum.
//!
//! Owns the text before and after the members of such an object. Knows none of them.
//!
//! ```text
//! {
//!   "format": "mirrorfs volume",
//!   "format_version": 1,
//!   "requires": [],
//!   … members …,
//!   "blake3": "<64 hex digits: BLAKE3 of every byte before the comma that ends the line above>"
//! }
//! ```
//!
//! Rule for other versions: a higher `format_version`, or a name in `requires` that the reader does not know, makes the
//! object unreadable ("upgrade mirrorfs"). Within a version, members that the reader does not know are ignored; so a
//! writer may add one only if ignoring it does no harm, and must add a name to `requires` otherwise.

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::codec::FormatError;

/// The version of all JSON objects that this program writes.
pub(super) const VERSION: u32 = 1;
/// Largest manifest that is read, in bytes. Other objects are smaller, see `limits`.
pub const MAX_LEN: usize = 16 << 20;

const BEFORE_HASH: &str = ",\n  \"blake3\": \"";
const AFTER_HASH: &str = "\"\n}\n";
const HASH_LEN: usize = 64;

#[derive(Serialize)]
struct Written<'a, T> {
    format: &'a str,
    format_version: u32,
    requires: [&'a str; 0],
    #[serde(flatten)]
    body: &'a T,
}

#[derive(Deserialize)]
struct Envelope {
    format: String,
    format_version: u32,
    #[serde(default)]
    requires: FirstOf,
}

/// The first of a list of names: one that is not known is reason enough, however many there are.
#[derive(Default)]
struct FirstOf(Option<String>);

impl<'de> Deserialize<'de> for FirstOf {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        struct Names;
        impl<'de> serde::de::Visitor<'de> for Names {
            type Value = FirstOf;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("a list of names")
            }

            fn visit_seq<A: serde::de::SeqAccess<'de>>(self, mut names: A) -> Result<FirstOf, A::Error> {
                let first = names.next_element()?;
                while names.next_element::<serde::de::IgnoredAny>()?.is_some() {}
                Ok(FirstOf(first))
            }
        }
        d.deserialize_seq(Names)
    }
}

/// The bytes of `body` as an object of kind `what`.
pub(super) fn encode<T: Serialize>(what: &'static str, body: &T) -> Result<Vec<u8>, FormatError> {
    let written = Written { format: what, format_version: VERSION, requires: [], body };
    let text = serde_json::to_string_pretty(&written).map_err(|e| FormatError::new(what, e.to_string()))?;
    let mut out = text
        .strip_suffix("\n}")
        .ok_or_else(|| FormatError::new(what, "unexpected JSON text"))?
        .as_bytes()
        .to_vec();
    let hash = blake3::hash(&out).to_hex();
    out.extend_from_slice(BEFORE_HASH.as_bytes());
    out.extend_from_slice(hash.as_bytes());
    out.extend_from_slice(AFTER_HASH.as_bytes());
    Ok(out)
}

/// Reads an object of kind `what` and of at most `most` bytes after checking its checksum and
/// version.
pub(super) fn decode<T: DeserializeOwned>(
    what: &'static str,
    bytes: &[u8],
    most: usize,
) -> Result<T, FormatError> {
    let bad = |why: String| FormatError::new(what, why);
    if bytes.len() > most {
        return Err(bad(format!("{} bytes are too many", bytes.len())));
    }
    let text = std::str::from_utf8(bytes).map_err(|_| bad("not UTF-8".into()))?;
    let (body, hash) = text
        .strip_suffix(AFTER_HASH)
        .and_then(|t| t.split_at_checked(t.len().checked_sub(HASH_LEN)?))
        .and_then(|(t, hash)| Some((t.strip_suffix(BEFORE_HASH)?, hash)))
        .ok_or_else(|| bad("its checksum is missing (damaged, cut short, or edited by hand)".into()))?;
    if blake3::hash(body.as_bytes()).to_hex().as_str() != hash {
        return Err(bad("its checksum does not match (damaged, or edited by hand)".into()));
    }
    let envelope: Envelope = serde_json::from_str(text).map_err(|e| bad(e.to_string()))?;
    if envelope.format != what {
        return Err(bad(format!("it is a {:?}", envelope.format.chars().take(40).collect::<String>())));
    }
    if envelope.format_version > VERSION {
        return Err(FormatError::newer(what, envelope.format_version, VERSION));
    }
    if envelope.format_version == 0 {
        return Err(bad("format version 0".into()));
    }
    if let Some(feature) = envelope.requires.0 {
        let feature: String = feature.chars().take(40).collect();
        return Err(FormatError::newer(what, format_args!("needs {feature:?}"), VERSION));
    }
    serde_json::from_str(text).map_err(|e| bad(e.to_string()))
}

/// Hexadecimal text of byte arrays, for `#[serde(with = …)]`.
pub(super) mod hex {
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub(in crate::format) fn text(bytes: &[u8]) -> String {
        bytes.iter().map(|b| format!("{b:02x}")).collect()
    }

    pub(in crate::format) fn parse<const N: usize>(text: &str) -> Option<[u8; N]> {
        let digits = text.as_bytes();
        if digits.len() != 2 * N || !digits.iter().all(|c| matches!(c, b'0'..=b'9' | b'a'..=b'f')) {
            return None;
        }
        let mut out = [0; N];
        for (byte, pair) in out.iter_mut().zip(digits.chunks_exact(2)) {
            *byte = u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()?;
        }
        Some(out)
    }

    pub(in crate::format) fn serialize<S: Serializer>(bytes: &[u8], s: S) -> Result<S::Ok, S::Error> {
        s.serialize_str(&text(bytes))
    }

    pub(in crate::format) fn deserialize<'de, D: Deserializer<'de>, const N: usize>(
        d: D,
    ) -> Result<[u8; N], D::Error> {
        let text = String::deserialize(d)?;
        parse(&text).ok_or_else(|| {
            D::Error::custom(format!("{} characters are not {N} bytes in hexadecimal", text.len()))
        })
    }
}
