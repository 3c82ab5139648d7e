//! Whether an object's bytes are what they should be. Needs no key: hashes are over stored bytes.
//!
//! Pure. Owns the verdict per kind of object; the formats are in `crate::format`.

use crate::format::checkpoint::{self, Manifest, ManifestHash};
use crate::format::codec::FormatError;
use crate::format::names::ObjectName;
use crate::format::segment::{self, SegmentHash};
use crate::format::volume::{Claim, Release, Volume};
use crate::ids::{SegmentNo, VolumeId};
use crate::replica::Identity;

/// What an object's bytes turned out to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// What they should be.
    Intact,
    /// Damaged: to be written again.
    Damaged(String),
    /// Whole, but something else than expected, or of a newer format: never overwritten.
    Other(String),
}

/// What is known of the object beforehand.
#[derive(Clone, Copy, Default)]
pub struct Known<'a> {
    /// A segment's hash.
    pub hash: Option<SegmentHash>,
    /// The manifest that a checkpoint's part belongs to.
    pub manifest: Option<&'a Manifest>,
    /// The hash of a checkpoint's manifest, as the log names it.
    pub named: Option<ManifestHash>,
}

/// Checks an object's bytes.
pub fn check(name: &ObjectName, bytes: &[u8], identity: &Identity, known: Known<'_>) -> Verdict {
    let id = identity.volume.volume;
    let result = match name {
        ObjectName::Volume => match Volume::decode(bytes) {
            Ok(found) if found.volume == id && found != identity.volume => {
                return Verdict::Damaged("it says something else of this volume than is known here".into());
            }
            other => other.map(|v| v.volume),
        },
        ObjectName::Claim(epoch) => {
            let ours = identity.claims.iter().find(|c| c.epoch == *epoch);
            match (Claim::decode(bytes, *epoch), ours) {
                (Ok(found), Some(ours)) if ours.claim_id != found.claim_id => {
                    return Verdict::Other(format!("another writer's claim, of {}", found.host));
                }
                (Ok(found), Some(ours)) if *ours != found => {
                    return Verdict::Damaged(
                        "it says something else than the claim that is known here".into(),
                    );
                }
                (other, _) => other.map(|c| c.volume),
            }
        }
        ObjectName::Release(epoch) => match Release::decode(bytes, *epoch) {
            Ok(found) if found.volume == id && contradicts(&found, identity) => {
                return Verdict::Damaged("it says something else than the claims that are known here".into());
            }
            other => other.map(|r| r.volume),
        },
        ObjectName::Segment(number, epoch) => return check_segment(bytes, id, (*number, *epoch), known.hash),
        ObjectName::CheckpointManifest(number, epoch) => match known.named {
            Some(named) if ManifestHash::of(bytes) != named => {
                return Verdict::Damaged(format!("it is not the one that the log names (hash {named})"));
            }
            _ => Manifest::decode(bytes, *number, *epoch).map(|m| m.volume),
        },
        ObjectName::CheckpointPart(_, _, index) => match known.manifest {
            Some(manifest) => checkpoint::parse_part(bytes, manifest, *index).map(|p| p.volume),
            None => checkpoint::verify_part(bytes).map(|p| p.volume),
        },
    };
    match result {
        Ok(volume) if volume == id => Verdict::Intact,
        Ok(volume) => Verdict::Other(format!("belongs to volume {volume}")),
        Err(e) => damaged(&e),
    }
}

/// Whether the mark of a tenure's end may be copied to other replicas: it says what the claims say anyway, whose tenure it
/// was and that the next one begins right after it. So no forger gains by it.
pub(super) fn may_copy(release: &Release, identity: &Identity) -> bool {
    let claims = &identity.claims;
    let Some(claim) = claims.iter().find(|c| c.epoch == release.epoch) else { return false };
    // A claim that only ends a tenure begins nowhere.
    let next = claims.iter().filter(|c| c.epoch > release.epoch).filter_map(Claim::begins).min();
    claim.claim_id == release.claim_id && next.is_none_or(|first| first == release.last_segment.next())
}

/// Returns true if the mark names another end than the claims do. Of a tenure whose claim is not
/// known, nothing is said.
fn contradicts(release: &Release, identity: &Identity) -> bool {
    identity.claims.iter().any(|c| c.epoch == release.epoch) && !may_copy(release, identity)
}

fn check_segment(
    bytes: &[u8],
    volume: VolumeId,
    (number, epoch): (SegmentNo, crate::ids::Epoch),
    hash: Option<SegmentHash>,
) -> Verdict {
    let footer = match segment::parse_footer(bytes, bytes.len() as u64) {
        Ok(footer) => footer,
        // What we know the hash of is of our format, and so is what begins in it.
        Err(e) if hash.is_some() || segment::parse_header(bytes).is_ok() => {
            return Verdict::Damaged(e.to_string());
        }
        Err(e) => return damaged(&e),
    };
    if !footer.covers(bytes) {
        return Verdict::Damaged("its content does not match its hash".into());
    }
    if footer.header.volume != volume {
        return Verdict::Other(format!("belongs to volume {}", footer.header.volume));
    }
    if let Err(e) = footer.expect(volume, number, epoch) {
        // A whole segment under another one's name: the store mixed them up.
        return damaged(&e);
    }
    match hash {
        Some(hash) if hash != footer.hash => Verdict::Damaged(format!(
            "another segment than the one that the log knows (hash {}, not {hash}): forged, or mixed up",
            footer.hash
        )),
        _ => Verdict::Intact,
    }
}

fn damaged(e: &FormatError) -> Verdict {
    if e.newer { Verdict::Other(e.to_string()) } else { Verdict::Damaged(e.to_string()) }
}
