//! What lies on each replica.
//!
//! Owns listing and reading the small objects: volume, claims, releases, manifests. Decides nothing.

use std::collections::{BTreeMap, BTreeSet};

use futures::future::join_all;
use futures::stream::{self, StreamExt};

use super::Damage;
use super::fetch::{Meaning, Patience, list, meaning, read};
use crate::format::checkpoint::{Manifest, ManifestHash};
use crate::format::codec::FormatError;
use crate::format::names::ObjectName;
use crate::format::volume::{Claim, Release, Volume};
use crate::ids::{Epoch, ReplicaName, SegmentNo};
use crate::replica::{ErrorKind, ObjectInfo, Store, StoreError};

#[cfg(test)]
mod tests;

/// Small objects read at a time from one replica.
const IN_FLIGHT: usize = 8;
/// Claims and marks of the end that a volume can have: a mount every ten minutes for years.
const MOST_EPOCHS: usize = 1 << 18;

/// One replica as it was found.
#[derive(Clone, Debug)]
pub struct Inventory {
    /// Its name.
    pub replica: ReplicaName,
    /// Its URL, without secrets.
    pub url: String,
    /// What it holds, or why that is not known.
    pub found: Result<Found, SurveyError>,
}

/// What a replica holds.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Found {
    /// Its `volume.json`; `None` when that is damaged.
    pub volume: Option<Volume>,
    /// Its intact claims.
    pub claims: BTreeMap<Epoch, Claim>,
    /// The epochs of all its claims, damaged ones too.
    pub claimed: BTreeSet<Epoch>,
    /// Its intact marks of tenures that ended in good order.
    pub releases: BTreeMap<Epoch, Release>,
    /// Its segments, with their sizes.
    pub segments: BTreeMap<(SegmentNo, Epoch), u64>,
    /// Its checkpoints with an intact manifest and, by their listed sizes, all parts.
    pub checkpoints: BTreeMap<(SegmentNo, Epoch), Manifest>,
    /// The hashes of their manifests, by which the log names them.
    pub manifests: BTreeMap<(SegmentNo, Epoch), ManifestHash>,
    /// What of all that is damaged.
    pub damaged: Vec<Damage>,
}

/// Why a replica cannot be used.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum SurveyError {
    /// It did not answer, or refused.
    #[error(transparent)]
    Unreachable(#[from] StoreError),
    /// It answers, but there is no `volume.json`.
    #[error("replica {replica} at {url} holds no mirrorfs volume (volume.json is not there)")]
    NoVolume {
        /// The replica.
        replica: ReplicaName,
        /// Where it is.
        url: String,
    },
    /// A newer mirrorfs wrote it.
    #[error("replica {replica}: {object}: {why}")]
    Newer {
        /// The replica.
        replica: ReplicaName,
        /// The object.
        object: String,
        /// What is newer about it.
        why: String,
    },
}

/// Looks at all replicas at once. The answers stand in the order of `stores`. Objects of a newer format make a replica unreadable when
/// more than half of the replicas that answer have such; fewer are damage, since one replica can say anything.
pub async fn survey(stores: &[Store]) -> Vec<Inventory> {
    let each = stores.iter().map(|store| Surveyor { store, found: Found::default(), newer: None }.run());
    let answers = join_all(each).await;
    let (answering, newer) = answers
        .iter()
        .flatten()
        .fold((0, 0), |(all, newer), (_, n)| (all + 1, newer + usize::from(n.is_some())));
    let stop = 2 * newer > answering;
    let found = answers.into_iter().map(|answer| match answer? {
        (_, Some(newer)) if stop => Err(newer),
        (found, _) => Ok(found),
    });
    let named = |(store, found): (&Store, _)| Inventory {
        replica: store.name().clone(),
        url: store.url().to_owned(),
        found,
    };
    stores.iter().zip(found).map(named).collect()
}

struct Surveyor<'a> {
    store: &'a Store,
    found: Found,
    /// The first object of a newer format.
    newer: Option<SurveyError>,
}

impl Surveyor<'_> {
    async fn run(mut self) -> Result<(Found, Option<SurveyError>), SurveyError> {
        match read(self.store, &ObjectName::Volume.path(), None, Patience::Full).await {
            Ok(bytes) => {
                // Of a newer format: the whole replica is.
                self.found.volume = match Volume::decode(&bytes) {
                    Err(e) if e.newer => return Err(self.newer(&ObjectName::Volume.path(), e)),
                    decoded => self.take(&ObjectName::Volume.path(), decoded),
                };
            }
            Err(e) if e.kind == ErrorKind::Absent => {
                let (replica, url) = (self.store.name().clone(), self.store.url().to_owned());
                return Err(SurveyError::NoVolume { replica, url });
            }
            Err(e) if meaning(&e) == Meaning::Damaged => {
                self.damaged(&ObjectName::Volume.path(), format!("{}: {}", e.kind, e.detail));
            }
            Err(e) => return Err(e.into()),
        }
        let (epochs, segments, checkpoints) = futures::try_join!(
            list(self.store, "epochs"),
            list(self.store, "segments"),
            list(self.store, "checkpoints"),
        )?;
        for object in segments {
            if let Some(ObjectName::Segment(number, epoch)) = ObjectName::parse(&object.path) {
                self.found.segments.insert((number, epoch), object.size);
            }
        }
        self.epochs(epochs).await?;
        self.checkpoints(checkpoints).await?;
        Ok((self.found, self.newer))
    }

    async fn epochs(&mut self, listed: Vec<ObjectInfo>) -> Result<(), SurveyError> {
        if listed.len() > MOST_EPOCHS {
            let object = "epochs/".to_owned();
            let detail = format!("more than {MOST_EPOCHS} objects are listed, so most of them must be junk");
            let replica = self.store.name().clone();
            return Err(StoreError { replica, op: "list", object, kind: ErrorKind::Corrupt, detail }.into());
        }
        self.found.claimed.extend(listed.iter().filter_map(|o| match ObjectName::parse(&o.path) {
            Some(ObjectName::Claim(epoch)) => Some(epoch),
            _ => None,
        }));
        for (path, body) in self.read_all(listed).await? {
            match (ObjectName::parse(&path), body) {
                (Some(ObjectName::Claim(epoch)), Ok(bytes)) => {
                    if let Some(claim) = self.take(&path, Claim::decode(&bytes, epoch)) {
                        self.found.claims.insert(epoch, claim);
                    }
                }
                (Some(ObjectName::Release(epoch)), Ok(bytes)) => {
                    if let Some(release) = self.take(&path, Release::decode(&bytes, epoch)) {
                        self.found.releases.insert(epoch, release);
                    }
                }
                (Some(_), Err(why)) => self.damaged(&path, why),
                _ => {}
            }
        }
        Ok(())
    }

    async fn checkpoints(&mut self, listed: Vec<ObjectInfo>) -> Result<(), SurveyError> {
        let mut parts: BTreeMap<(SegmentNo, Epoch), BTreeMap<u32, u64>> = BTreeMap::new();
        let mut manifests = Vec::new();
        for object in listed {
            match ObjectName::parse(&object.path) {
                Some(ObjectName::CheckpointPart(number, epoch, index)) => {
                    parts.entry((number, epoch)).or_default().insert(index, object.size);
                }
                Some(ObjectName::CheckpointManifest(..)) => manifests.push(object),
                _ => {}
            }
        }
        for (path, body) in self.read_all(manifests).await? {
            let Some(ObjectName::CheckpointManifest(number, epoch)) = ObjectName::parse(&path) else {
                continue;
            };
            let manifest = match body {
                Ok(bytes) => {
                    self.found.manifests.insert((number, epoch), ManifestHash::of(&bytes));
                    self.take(&path, Manifest::decode(&bytes, number, epoch))
                }
                Err(why) => {
                    self.damaged(&path, why);
                    None
                }
            };
            let Some(manifest) = manifest else { continue };
            // A part that is missing or too short is no reason to give up the checkpoint: another replica may have it.
            for (index, info) in manifest.parts.iter().enumerate() {
                let index = index as u32;
                let size = parts.get(&(number, epoch)).and_then(|p| p.get(&index));
                if size != Some(&info.len) {
                    let part = ObjectName::CheckpointPart(number, epoch, index).path();
                    let why = size.map_or("missing".into(), |n| format!("{n} bytes instead of {}", info.len));
                    self.damaged(&part, why);
                }
            }
            self.found.checkpoints.insert((number, epoch), manifest);
        }
        Ok(())
    }

    /// The bytes of each object, or why it is damaged.
    async fn read_all(
        &self,
        listed: Vec<ObjectInfo>,
    ) -> Result<Vec<(String, Result<bytes::Bytes, String>)>, SurveyError> {
        let store = self.store;
        let answers: Vec<_> =
            stream::iter(listed.into_iter().filter(|o| ObjectName::parse(&o.path).is_some()))
                .map(|object| async move {
                    // Before the read, which would refuse it, too: the request is saved.
                    let most = ObjectName::parse(&object.path).map_or(0, |name| name.most_bytes());
                    if object.size > most {
                        let why = format!("{} bytes are too many, at most {most} can be right", object.size);
                        return Ok((object.path, Err(why)));
                    }
                    match read(store, &object.path, None, Patience::Full).await {
                        Ok(bytes) => Ok((object.path, Ok(bytes))),
                        Err(e) if meaning(&e) == Meaning::Damaged => {
                            Ok((object.path, Err(format!("{}: {}", e.kind, e.detail))))
                        }
                        Err(e) => Err(SurveyError::Unreachable(e)),
                    }
                })
                .buffered(IN_FLIGHT)
                .collect()
                .await;
        answers.into_iter().collect()
    }

    fn damaged(&mut self, path: &str, why: String) {
        self.found.damaged.push(Damage { replica: self.store.name().clone(), object: path.to_owned(), why });
    }

    /// A decoded object; `None` (and a line on the damage list) when it fails verification. One that says it is of a newer format is only
    /// one object of one replica, so it stops nothing that the other replicas allow.
    fn take<T>(&mut self, path: &str, decoded: Result<T, FormatError>) -> Option<T> {
        match decoded {
            Ok(value) => Some(value),
            Err(e) => {
                self.damaged(path, e.to_string());
                if e.newer && self.newer.is_none() {
                    self.newer = Some(self.newer(path, e));
                }
                None
            }
        }
    }

    fn newer(&self, path: &str, e: FormatError) -> SurveyError {
        SurveyError::Newer { replica: self.store.name().clone(), object: path.to_owned(), why: e.why }
    }
}
