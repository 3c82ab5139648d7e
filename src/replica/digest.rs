//! SHA-256 of what several replicas are sent: computed once for all of them.
//!
//! Owns the sums of segments in memory, for as long as the segments are there. S3 wants the sum of each body, in its signature and as the
//! checksum by which the server notices damage on the way; for each replica anew it would be the dearest part of sending one thing to
//! several. Knows no replica and no object.

use std::collections::HashMap;
use std::sync::{Arc, LazyLock, OnceLock};

use aws_lc_rs::{digest, hmac};
use bytes::Bytes;
use object_store::Result;
use object_store::client::{
    CryptoProvider, DigestAlgorithm, DigestContext, HmacContext, Signer, SigningAlgorithm,
};
use parking_lot::Mutex;

type Sum = [u8; 32];
/// Sums by address and length, each computed when it is first wanted.
type Sums = HashMap<(usize, usize), Arc<OnceLock<Sum>>>;

/// By address and length. Two things that are in memory at the same time never share both, and none of these changes.
static SUMS: LazyLock<Mutex<Sums>> = LazyLock::new(Mutex::default);

fn place(bytes: &[u8]) -> (usize, usize) {
    (bytes.as_ptr() as usize, bytes.len())
}

/// Bytes whose sum is remembered while they are there.
struct Summed(Bytes);

impl AsRef<[u8]> for Summed {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

impl Drop for Summed {
    fn drop(&mut self) {
        SUMS.lock().remove(&place(&self.0));
    }
}

/// The same bytes; their sum is computed once, however often they (the whole of them) are sent.
#[must_use]
pub fn once(bytes: Bytes) -> Bytes {
    if bytes.is_empty() {
        return bytes;
    }
    match SUMS.lock().entry(place(&bytes)) {
        // They are of this kind already.
        std::collections::hash_map::Entry::Occupied(_) => return bytes,
        std::collections::hash_map::Entry::Vacant(place) => place.insert(Arc::default()),
    };
    Bytes::from_owner(Summed(bytes))
}

/// The primitives that requests are signed with; sums of bytes from [`once`] are remembered.
#[derive(Debug)]
pub(super) struct Crypto;

impl CryptoProvider for Crypto {
    fn digest(&self, algorithm: DigestAlgorithm) -> Result<Box<dyn DigestContext>> {
        match algorithm {
            DigestAlgorithm::Sha256 => Ok(Box::new(Digest::default())),
            _ => Err(unknown("digest")),
        }
    }

    fn hmac(&self, algorithm: DigestAlgorithm, secret: &[u8]) -> Result<Box<dyn HmacContext>> {
        match algorithm {
            DigestAlgorithm::Sha256 => {
                let key = hmac::Key::new(hmac::HMAC_SHA256, secret);
                Ok(Box::new(Hmac { context: hmac::Context::with_key(&key), tag: None }))
            }
            _ => Err(unknown("HMAC")),
        }
    }

    fn sign(&self, _: SigningAlgorithm, _: &[u8]) -> Result<Box<dyn Signer>> {
        Err(unknown("signature"))
    }
}

fn unknown(what: &str) -> object_store::Error {
    let source = format!("this {what} is not known here").into();
    object_store::Error::NotSupported { source }
}

#[derive(Default)]
struct Digest {
    context: Option<digest::Context>,
    /// The remembered sum of all that came so far.
    known: Option<Sum>,
    out: Vec<u8>,
}

impl DigestContext for Digest {
    fn update(&mut self, data: &[u8]) {
        if self.context.is_none() && self.known.is_none() {
            let cell = SUMS.lock().get(&place(data)).cloned();
            if let Some(cell) = cell {
                self.known = Some(*cell.get_or_init(|| sum(data)));
                return;
            }
        }
        self.context.get_or_insert_with(|| digest::Context::new(&digest::SHA256)).update(data);
    }

    fn finish(&mut self) -> Result<&[u8]> {
        self.out = match (self.known.take(), self.context.take()) {
            (Some(known), None) => known.to_vec(),
            (None, context) => {
                let context = context.unwrap_or_else(|| digest::Context::new(&digest::SHA256));
                context.finish().as_ref().to_vec()
            }
            // Nobody sends them so: a body is one piece.
            (Some(_), Some(_)) => {
                let source = "the sum of a segment that is only part of a body".into();
                return Err(object_store::Error::Generic { store: "mirrorfs", source });
            }
        };
        Ok(&self.out)
    }
}

fn sum(data: &[u8]) -> Sum {
    let mut out = [0; 32];
    out.copy_from_slice(digest::digest(&digest::SHA256, data).as_ref());
    out
}

struct Hmac {
    context: hmac::Context,
    tag: Option<hmac::Tag>,
}

impl HmacContext for Hmac {
    fn update(&mut self, data: &[u8]) {
        self.context.update(data);
    }

    fn finish(&mut self) -> Result<&[u8]> {
        let tag = self.context.clone().sign();
        Ok(hmac::Tag::as_ref(self.tag.insert(tag)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn digest_of(parts: &[&[u8]]) -> Result<Vec<u8>> {
        let mut context = Crypto.digest(DigestAlgorithm::Sha256).unwrap();
        parts.iter().for_each(|part| context.update(part));
        context.finish().map(<[u8]>::to_vec)
    }

    #[test]
    fn a_sum_is_remembered_as_long_as_the_bytes_are_there() {
        let plain: Vec<u8> = (0..100_000u32).map(|i| (i % 251) as u8).collect();
        let expected = sum(&plain).to_vec();
        assert_eq!(digest_of(&[&plain[..50], &plain[50..]]).unwrap(), expected);
        let shared = once(Bytes::from(plain.clone()));
        assert_eq!(shared, plain);
        let at = place(&shared);
        let known = || SUMS.lock().get(&at).map(|cell| cell.get().copied());
        assert_eq!(known(), Some(None));
        assert_eq!(digest_of(&[&shared]).unwrap(), expected);
        assert_eq!(known(), Some(Some(sum(&plain))));
        // What is remembered is taken, not computed.
        let copy = once(shared.clone());
        assert_eq!(digest_of(&[&copy]).unwrap(), expected);
        // A part of it is something else.
        assert_eq!(digest_of(&[&shared[1..]]).unwrap(), sum(&plain[1..]));
        assert_eq!(digest_of(&[&plain[..1], &shared[1..]]).unwrap(), expected);
        assert!(digest_of(&[&shared, b"more"]).is_err());
        drop(shared);
        assert!(known().is_some(), "somebody still has them");
        drop(copy);
        assert_eq!(known(), None);
        assert_eq!(digest_of(&[]).unwrap(), sum(b""));
    }

    #[test]
    fn hmacs_are_those_of_the_standard() {
        // RFC 4231, test case 2.
        let mut context = Crypto.hmac(DigestAlgorithm::Sha256, b"Jefe").unwrap();
        context.update(b"what do ya want ");
        context.update(b"for nothing?");
        let tag: String = context.finish().unwrap().iter().map(|b| format!("{b:02x}")).collect();
        assert_eq!(tag, "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843");
    }
}
