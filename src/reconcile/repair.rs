//! Reading one object of a replica and, when it is damaged, writing it again.
//!
//! Owns where intact bytes come from (what we know ourselves, local disk, the other replicas in the order of their health, pieces of all of
//! them and of the cache), that they are checked before they are written, and that what was written is read back. Decides nothing about which objects to look at.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;

use super::catalog::Catalog;
use super::check::{Known, Verdict, check, may_copy};
use super::mend::piece_together;
use crate::format::checkpoint::{Manifest, ManifestHash};
use crate::format::names::{MANIFEST, ObjectName, part_file};
use crate::format::segment::{SegmentHash, parse_footer};
use crate::format::volume::Release;
use crate::replica::health::{self, Event, HealthState};
use crate::replica::{
    Created, ErrorKind, Identity, Replica, Roster, Staged, Store, StoreError, chain, jitter,
};

/// How often an object is asked for before it is given up, and the first wait in between.
const TRIES: u32 = 4;
const WAIT: Duration = Duration::from_millis(250);

/// An object to look at, and what is known of it.
#[derive(Clone)]
pub(super) struct Target {
    pub name: ObjectName,
    /// Its right size, or the listed one.
    pub len: u64,
    /// A segment's hash.
    pub hash: Option<SegmentHash>,
    /// A checkpoint's manifest, for its parts.
    pub manifest: Option<Arc<Manifest>>,
    /// The hash of a checkpoint's manifest, as the log names it.
    pub named: Option<ManifestHash>,
    /// A segment as the tables know it.
    pub staged: Option<Staged>,
    /// Where its file, or for a checkpoint its folder, may lie on local disk.
    pub local: Option<PathBuf>,
}

impl Target {
    /// An object of which nothing is known but its name.
    pub fn named(name: ObjectName) -> Self {
        Self { name, len: 0, hash: None, manifest: None, named: None, staged: None, local: None }
    }

    pub fn known(&self) -> Known<'_> {
        Known { hash: self.hash, manifest: self.manifest.as_deref(), named: self.named }
    }

    /// Why no replica's copy of the object may be taken: nothing here says what it must be. (A release is compared with
    /// the claims, see `check`.)
    fn unknown(&self, identity: &Identity) -> Option<&'static str> {
        let known = match self.name {
            ObjectName::Volume | ObjectName::Release(_) | ObjectName::Segment(..) => true,
            ObjectName::Claim(epoch) => identity.claims.iter().any(|c| c.epoch == epoch),
            ObjectName::CheckpointManifest(..) => self.named.is_some(),
            ObjectName::CheckpointPart(..) => self.named.is_some() && self.manifest.is_some(),
        };
        (!known).then_some("nothing here says what it must be, so no replica's copy is taken")
    }
}

/// What became of an object.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Outcome {
    /// It was intact.
    Intact,
    /// It was bad in this way, and was mended with so many bytes.
    Repaired(String, u64),
    /// It is bad in this way, and could not be mended for that reason; `None` when it was not to be.
    Left(String, Option<String>),
    /// No replica has it any more, and nothing is lost by that: a part of a checkpoint (a newer one will do), or the mark of an older
    /// tenure's end.
    Useless(String),
    /// It is whole but not what it should be, or newer: left alone.
    Other(String),
    /// It has a name of ours, and no writer of this volume made it as far as the log says: never copied, and left alone.
    Forged(String),
}

/// Why looking at objects cannot go on.
#[derive(Clone, Debug)]
pub(super) enum Stop {
    /// The replica does not answer, or refuses.
    Replica(StoreError),
    /// Something local failed.
    Local(String),
}

/// Looks at objects of one replica.
pub(super) struct Mender {
    pub replica: Arc<Replica>,
    /// Its store, for work that nobody waits for.
    pub store: Store,
    pub roster: Arc<Roster>,
    pub identity: Arc<Identity>,
    pub catalog: Arc<dyn Catalog>,
}

impl Mender {
    /// Reads an object and says whether it is bad.
    pub async fn examine(&self, target: &Target) -> Result<Outcome, Stop> {
        let mut seen = self.verdict(target).await?;
        if matches!(seen, Verdict::Damaged(_)) {
            // Once more: it may have been the way here that was at fault.
            seen = self.verdict(target).await?;
        }
        match seen {
            Verdict::Intact => Ok(Outcome::Intact),
            Verdict::Other(what) => Ok(Outcome::Other(what)),
            Verdict::Damaged(what) => Ok(Outcome::Left(what, None)),
        }
    }

    /// Writes an object that is bad in the way that `what` says.
    pub async fn repair(&self, target: &Target, what: String) -> Result<Outcome, Stop> {
        let path = target.name.path();
        let (bytes, from) = match self.intact(target).await? {
            Ok(found) => found,
            Err(why) => return Ok(Outcome::Left(what, Some(why))),
        };
        let len = bytes.len() as u64;
        if let ObjectName::Volume | ObjectName::Claim(_) = target.name {
            // Somebody may have made it since it was found missing: what says whose the replica is must not be taken from him.
            let created = self.insist(|| self.store.put_if_absent(&path, bytes.clone())).await?;
            if let Created::Existed(there) = created
                && let Verdict::Other(what) = self.check(target, there).await?
            {
                return Ok(Outcome::Other(what));
            }
        }
        self.insist(|| self.store.put(&path, bytes.clone())).await?;
        match self.verdict(target).await? {
            Verdict::Intact => {
                log::info!(
                    "replica {}: {path} was bad ({what}) and is mended with {len} bytes from {from}",
                    self.replica.name()
                );
                self.replica.forget_damage(&path);
                // Others may wait for an intact copy of it.
                self.roster.all().iter().for_each(|r| r.source_repaired());
                Ok(Outcome::Repaired(what, len))
            }
            Verdict::Damaged(again) | Verdict::Other(again) => {
                Ok(Outcome::Left(what, Some(format!("it was written again and is still bad: {again}"))))
            }
        }
    }

    /// What the replica holds under the target's name.
    async fn verdict(&self, target: &Target) -> Result<Verdict, Stop> {
        let path = target.name.path();
        match self.insist(|| self.store.get(&path)).await {
            Ok(bytes) => self.check(target, bytes).await,
            Err(Stop::Replica(e)) if matches!(e.kind, ErrorKind::Absent | ErrorKind::Corrupt) => {
                Ok(Verdict::Damaged(if e.kind == ErrorKind::Absent { "missing".into() } else { e.detail }))
            }
            Err(e) => Err(e),
        }
    }

    async fn check(&self, target: &Target, bytes: Bytes) -> Result<Verdict, Stop> {
        let (target, identity) = (target.clone(), Arc::clone(&self.identity));
        tokio::task::spawn_blocking(move || check(&target.name, &bytes, &identity, target.known()))
            .await
            .map_err(|e| Stop::Local(e.to_string()))
    }

    /// Intact bytes of an object and where they come from; or why there are none.
    async fn intact(&self, target: &Target) -> Result<Result<(Bytes, String), String>, Stop> {
        if let Some(bytes) = self.made_here(target) {
            return Ok(Ok((bytes, "local knowledge".into())));
        }
        if let Some(why) = target.unknown(&self.identity) {
            return Ok(Err(why.to_owned()));
        }
        let (mut said, mut damaged) = (Vec::new(), Vec::new());
        if let Some(bytes) = self.local_file(target).await {
            match self.check(target, bytes.clone()).await? {
                Verdict::Intact => return Ok(Ok((bytes, "local disk".into()))),
                Verdict::Damaged(why) => {
                    damaged.push(bytes);
                    said.push(format!("local copy: {why}"));
                }
                Verdict::Other(why) => said.push(format!("local copy: {why}")),
            }
        }
        let path = target.name.path();
        for peer in self.peers(target.len) {
            match peer.store().background().get(&path).await {
                Ok(bytes) => match self.check(target, bytes.clone()).await? {
                    Verdict::Intact => match self.agreed(target, &bytes).await {
                        Ok(()) => return Ok(Ok((bytes, format!("replica {}", peer.name())))),
                        Err(why) => said.push(format!("replica {}: {why}", peer.name())),
                    },
                    Verdict::Damaged(why) => {
                        damaged.push(bytes);
                        said.push(format!("replica {}: {why}", peer.name()));
                    }
                    Verdict::Other(why) => said.push(format!("replica {}: {why}", peer.name())),
                },
                Err(e) => {
                    peer.note(&Event::of_error(&e, 0.5));
                    said.push(e.to_string());
                }
            }
        }
        // Without a hash, what is put together could be what a forged copy says.
        if let (ObjectName::Segment(..), Some(_)) = (target.name, target.hash) {
            damaged.extend(self.store.get(&path).await.ok());
            let (target, identity, catalog) =
                (target.clone(), Arc::clone(&self.identity), Arc::clone(&self.catalog));
            let pieced = tokio::task::spawn_blocking(move || {
                piece_together(&damaged, &identity, target.len, target.hash, &|block| catalog.cached(block))
            });
            if let Some(bytes) = pieced.await.map_err(|e| Stop::Local(e.to_string()))? {
                return Ok(Ok((bytes, "pieces of damaged copies and of the cache".into())));
            }
        }
        Ok(Err(match said.is_empty() {
            true => "there is no other copy".to_owned(),
            false => said.join("; "),
        }))
    }

    /// Whether another replica's copy, intact by itself, may be taken. A release must fit the claims; where a segment's hash
    /// is not known, all replicas must hold the same.
    async fn agreed(&self, target: &Target, bytes: &Bytes) -> Result<(), String> {
        if let ObjectName::Release(epoch) = target.name {
            let release = Release::decode(bytes, epoch).map_err(|e| e.to_string())?;
            return match may_copy(&release, &self.identity) {
                true => Ok(()),
                false => Err("it does not fit the claims of this volume, so it is not copied".to_owned()),
            };
        }
        let (ObjectName::Segment(..), None, Some(staged)) = (target.name, target.hash, &target.staged) else {
            return Ok(());
        };
        let footer = parse_footer(bytes, bytes.len() as u64).map_err(|e| e.to_string())?;
        let others = self.roster.others(self.replica.name());
        chain::agree(&others, self.identity.volume.volume, staged, footer.hash).await
    }

    /// The small objects that we can write out of our head.
    fn made_here(&self, target: &Target) -> Option<Bytes> {
        let bytes = match target.name {
            ObjectName::Volume => self.identity.volume.encode().ok()?,
            ObjectName::Claim(epoch) => {
                self.identity.claims.iter().find(|c| c.epoch == epoch)?.encode().ok()?
            }
            _ => return None,
        };
        Some(bytes.into())
    }

    async fn local_file(&self, target: &Target) -> Option<Bytes> {
        let local = target.local.clone()?;
        let path = match target.name {
            ObjectName::CheckpointPart(_, _, index) => local.join(part_file(index)),
            ObjectName::CheckpointManifest(..) => local.join(MANIFEST),
            _ => local,
        };
        tokio::task::spawn_blocking(move || std::fs::read(path)).await.ok()?.ok().map(Bytes::from)
    }

    /// The other replicas, those first that answer and are near.
    fn peers(&self, len: u64) -> Vec<Arc<Replica>> {
        let peers = self.roster.others(self.replica.name());
        let healths: Vec<_> = peers.iter().map(|p| p.health()).collect();
        health::order(&healths, len, Instant::now())
            .into_iter()
            .filter_map(|i| peers.get(i).cloned())
            .collect()
    }

    /// Asks again when an answer fails to come, unless the replica as a whole is down.
    pub async fn insist<T, F>(&self, mut ask: impl FnMut() -> F) -> Result<T, Stop>
    where
        F: Future<Output = Result<T, StoreError>>,
    {
        let mut wait = WAIT;
        let mut tries = 1;
        loop {
            match ask().await {
                Ok(value) => {
                    self.replica.note(&Event::Success);
                    return Ok(value);
                }
                Err(e) => {
                    self.replica.note(&Event::of_error(&e, jitter()));
                    let down = self.replica.health().state() == HealthState::Offline;
                    if !e.kind.is_passing() || down || tries >= TRIES {
                        return Err(Stop::Replica(e));
                    }
                    tries += 1;
                    tokio::time::sleep(wait).await;
                    wait *= 2;
                }
            }
        }
    }
}
