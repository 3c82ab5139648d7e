//! One pass over one replica: look, compare, read if it is a deep one, mend.
//!
//! Owns the order of a pass. What is wrong is decided in `plan` and `check`, when a pass is due in `memory`; counters go to whoever
//! listens.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::StreamExt;
use futures::stream;
use parking_lot::Mutex;

use super::catalog::{NamedCheckpoints, Sealed};
use super::inventory::Inventory;
use super::memory::Current;
use super::plan::{Expected, Plan, Wrong};
use super::repair::{Mender, Outcome, Stop, Target};
use crate::format::checkpoint::{Manifest, ManifestHash};
use crate::format::names::ObjectName;
use crate::ids::{Epoch, SegmentNo};
use crate::replica::volume::{self, Found, VolumeError};
use crate::replica::{Backlog, Fence, Outbox, ReplicaState, Staged, StoreError, chain};

/// Objects looked at at a time.
const AT_ONCE: usize = 4;
/// Failures to read one object after which it is passed over.
const PASSED_OVER: u32 = 3;
/// How often a replica may be set back within one pass.
const SET_BACKS: u32 = 5;
/// How often a replica that is being filled is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// A replica that is being filled and gets no further for so long is looked at as it is.
const STALLED: Duration = Duration::from_secs(30);
/// A look for another writer is this old at most when something is written.
const FENCE_EVERY: Duration = Duration::from_secs(5);

/// Why a pass ended before its end.
#[derive(Clone, Debug)]
pub(super) enum Broken {
    /// The replica does not answer: later, from where it was.
    Later(String),
    /// Nothing is to be done here: it is another volume's, or another writer's.
    Never(String),
}

impl From<Stop> for Broken {
    fn from(stop: Stop) -> Self {
        match stop {
            Stop::Replica(e) => Broken::Later(e.to_string()),
            Stop::Local(text) => Broken::Later(text),
        }
    }
}

impl From<StoreError> for Broken {
    fn from(e: StoreError) -> Self {
        Broken::Later(e.to_string())
    }
}

/// Listens to a pass.
pub(super) trait Listener: Send + Sync {
    /// How much there is to do.
    fn sized(&self, objects: u64, bytes: u64, plan: &Plan);
    /// An object is behind the pass. `position` moves on when it is given.
    fn seen(&self, name: &ObjectName, len: u64, outcome: &Outcome, position: Option<&str>);
    /// What the pass waits for at the moment; `stuck` says that it does not go on by itself.
    fn waits(&self, what: Option<String>, stuck: bool);
}

/// What a pass over a replica needs.
pub(super) struct Pass {
    pub mender: Mender,
    pub outbox: Arc<dyn Outbox>,
    pub fence: Arc<Fence>,
    /// How often each object could not be read.
    pub failures: Mutex<HashMap<String, u32>>,
    /// Objects that could not be mended, as far as that was told.
    pub told: Mutex<HashSet<String>>,
    /// When no other writer was to be seen.
    pub looked: Mutex<Option<Instant>>,
}

/// What is known before the replica is compared.
struct Ground {
    expected: Expected,
    sealed: BTreeMap<SegmentNo, Sealed>,
    manifests: BTreeMap<(SegmentNo, Epoch), Arc<Manifest>>,
    named: NamedCheckpoints,
    staged: BTreeMap<(SegmentNo, Epoch), PathBuf>,
}

impl Pass {
    /// Runs the pass from where `current` is. Dropping it does no harm.
    /// With `whole` it first waits until the replica holds everything that was sealed by now, and what it lacks at the end is told.
    pub async fn run(&self, current: &Current, whole: bool, listener: &dyn Listener) -> Result<(), Broken> {
        let replica = &self.mender.replica;
        let mut set_backs = 0;
        // What the replica is to hold at the end, also where its cursor was set back. Otherwise it may lag.
        let mut goal = SegmentNo(0);
        // What was found missing and was left to the shipper: repaired when it is there.
        let mut filled = BTreeSet::new();
        if whole && !current.dry_run {
            goal = *self.outbox.watch().borrow();
            if !self.filled(goal, None, listener).await? {
                // Nothing moves: what can be had is mended one by one.
                set_backs = SET_BACKS;
            }
        }
        loop {
            self.check_fence(Duration::ZERO).await?;
            self.check_volume(current.dry_run).await?;
            let cursor = replica.cursor().max(goal);
            let found = self.mender.insist(|| Inventory::take(&self.mender.store)).await?;
            let ground = self.ground(cursor, &found, current.deep).await?;
            let plan = ground.expected.compare(&found.0);
            if plan.set_back && !current.dry_run && set_backs < SET_BACKS {
                set_backs += 1;
                goal = goal.max(*self.outbox.watch().borrow());
                log::warn!(
                    "replica {}: {} objects are missing, the newest among them: it was wiped or set back, and is filled again",
                    replica.name(),
                    plan.wrong.len()
                );
                let missing = plan.wrong.iter().filter(|(_, wrong)| *wrong == Wrong::Missing);
                filled.extend(missing.map(|(name, _)| name.path()));
                if !self.refill(goal, listener).await? {
                    // What can be had is mended one by one.
                    set_backs = SET_BACKS;
                }
                continue;
            }
            let mended = self.work(current, &ground, plan, &filled, listener).await?;
            if mended && !current.dry_run && replica.cursor() < goal {
                // All is there now, and its shipper has yet to see that.
                self.refill(goal, listener).await?;
            }
            return Ok(());
        }
    }

    /// Has the shipper look again and waits until the replica holds everything up to `newest`.
    async fn refill(&self, newest: SegmentNo, listener: &dyn Listener) -> Result<bool, Broken> {
        let replica = &self.mender.replica;
        let before = replica.attachments();
        replica.recheck();
        self.filled(newest, Some(before), listener).await
    }

    /// Waits until the replica was attached once more than `before` and holds everything up to `newest`; not so when for long nothing
    /// moves.
    async fn filled(
        &self,
        newest: SegmentNo,
        before: Option<u64>,
        listener: &dyn Listener,
    ) -> Result<bool, Broken> {
        let replica = &self.mender.replica;
        let mut moved = (Instant::now(), replica.cursor());
        loop {
            if before != Some(replica.attachments()) && replica.is_attached() && replica.cursor() >= newest {
                listener.waits(None, false);
                return Ok(true);
            }
            if replica.cursor() != moved.1 {
                moved = (Instant::now(), replica.cursor());
            }
            if moved.0.elapsed() >= STALLED {
                listener.waits(None, false);
                return Ok(false);
            }
            if let Some(fenced) = self.fence.seen() {
                return Err(Broken::Never(fenced.to_string()));
            }
            let status = replica.status(Backlog::default(), 0.0);
            match status.state {
                ReplicaState::Paused => return Err(Broken::Later("the replica is paused".into())),
                ReplicaState::Foreign => {
                    let why = status.last_error.map_or_else(|| "it is not ours".to_owned(), |e| e.text);
                    return Err(Broken::Later(why));
                }
                state => {
                    let lacks = newest.0.saturating_sub(replica.cursor().0);
                    let stuck = !matches!(state, ReplicaState::Healthy | ReplicaState::Degraded);
                    let why = status
                        .last_error
                        .filter(|_| stuck)
                        .map_or_else(String::new, |e| format!(" ({})", e.text));
                    listener.waits(Some(format!("is being filled, lacks {lacks} segments{why}")), stuck);
                }
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    /// Mends and reads what the plan names; returns true if nothing bad is left. `filled` are objects that were missing before: each
    /// counts as repaired when it is there, in a deep pass when it was read and is right.
    async fn work(
        &self,
        current: &Current,
        ground: &Ground,
        plan: Plan,
        filled: &BTreeSet<String>,
        listener: &dyn Listener,
    ) -> Result<bool, Broken> {
        let behind = |name: &ObjectName| !current.position.is_empty() && name.path() <= current.position;
        let mut present = plan.present.clone();
        present.retain(|(name, _)| !behind(name) || filled.contains(&name.path()));
        let to_read: &[(ObjectName, u64)] = if current.deep { &present } else { &[] };
        let wrong: Vec<Target> = plan.wrong.iter().map(|(name, _)| ground.target(*name, 0)).collect();
        let bytes = to_read.iter().map(|(_, len)| len).chain(wrong.iter().map(|t| &t.len)).sum();
        let objects = (plan.wrong.len() + if current.deep { to_read.len() } else { present.len() }) as u64;
        listener.sized(objects, bytes, &plan);
        for path in &plan.foreign {
            log::debug!("replica {}: {path} is not mirrorfs's", self.mender.replica.name());
        }
        for (name, why) in &plan.forged {
            self.tell(name, &format!("{name} is not copied: {why}"));
        }
        let mut mended = self.mend_missing(current, &plan.wrong, wrong, listener).await?;
        let was_missing = |name: &ObjectName, len, outcome| match outcome {
            Outcome::Intact if filled.contains(&name.path()) => Outcome::Repaired("missing".into(), len),
            other => other,
        };
        if !current.deep {
            for (name, len) in &present {
                listener.seen(name, 0, &was_missing(name, *len, Outcome::Intact), None);
            }
            return Ok(mended);
        }
        let mut examined = stream::iter(present)
            .map(|(name, len)| async move {
                let target = ground.target(name, len);
                (name, len, self.examine(&target, !current.dry_run).await)
            })
            .buffered(AT_ONCE);
        while let Some((name, len, outcome)) = examined.next().await {
            let outcome = was_missing(&name, len, outcome?);
            mended &= !is_left(&outcome);
            let path = name.path();
            listener.seen(&name, len, &outcome, Some(path.as_str()).filter(|_| !behind(&name)));
        }
        Ok(mended)
    }

    /// Says something of an object, the first time as an error.
    fn tell(&self, name: &ObjectName, text: &str) {
        let first = self.told.lock().insert(name.path());
        let level = if first { log::Level::Error } else { log::Level::Debug };
        log::log!(level, "replica {}: {text}", self.mender.replica.name());
    }

    /// Writes what the listing lacks, a checkpoint's manifest only after all of its parts. Returns true if nothing is left.
    async fn mend_missing(
        &self,
        current: &Current,
        wrong: &[(ObjectName, Wrong)],
        targets: Vec<Target>,
        listener: &dyn Listener,
    ) -> Result<bool, Broken> {
        let mut all = true;
        let text = |wrong: &Wrong| match wrong {
            Wrong::Missing => "missing".to_owned(),
            Wrong::Size(size) => format!("{size} bytes long"),
        };
        let is_manifest = |name: &ObjectName| matches!(name, ObjectName::CheckpointManifest(..));
        let mut incomplete: BTreeSet<(SegmentNo, Epoch)> = BTreeSet::new();
        for manifests in [false, true] {
            let some = wrong.iter().zip(&targets).filter(|((name, _), _)| is_manifest(name) == manifests);
            let some = some.filter(|((name, _), _)| match name {
                ObjectName::CheckpointManifest(n, e) => !incomplete.contains(&(*n, *e)),
                _ => true,
            });
            let jobs: Vec<_> = some
                .map(|((name, wrong), target)| {
                    // What is there may be whole, and something else: it is read before it is overwritten.
                    (*name, text(wrong), *wrong != Wrong::Missing, target.clone())
                })
                .collect();
            let mut mended = stream::iter(jobs)
                .map(|(name, what, there, target)| async move {
                    let outcome = match (there, current.dry_run) {
                        (true, dry_run) => match self.examine(&target, !dry_run).await {
                            // Whole, but not of the right length.
                            Ok(Outcome::Intact) => Ok(Outcome::Other(format!("{what}, but whole"))),
                            other => other,
                        },
                        (false, true) => Ok(Outcome::Left(what, None)),
                        (false, false) => self.repair(&target, what).await,
                    };
                    (name, target.len, outcome)
                })
                .buffered(AT_ONCE);
            while let Some((name, len, outcome)) = mended.next().await {
                let outcome = outcome?;
                all &= !is_left(&outcome);
                if let (
                    ObjectName::CheckpointPart(n, e, _),
                    Outcome::Left(..) | Outcome::Useless(_) | Outcome::Other(_),
                ) = (&name, &outcome)
                {
                    incomplete.insert((*n, *e));
                }
                listener.seen(&name, len, &outcome, None);
            }
        }
        Ok(all)
    }

    /// Looks at one object and mends it. One that cannot be read again and again is passed over.
    pub async fn examine(&self, target: &Target, mend: bool) -> Result<Outcome, Broken> {
        let outcome = self.mender.examine(target).await;
        match (self.forgive(target, outcome)?, mend) {
            (Outcome::Left(what, None), true) => self.repair(target, what).await,
            (outcome, _) => Ok(outcome),
        }
    }

    async fn repair(&self, target: &Target, what: String) -> Result<Outcome, Broken> {
        self.check_fence(FENCE_EVERY).await?;
        let outcome = self.mender.repair(target, what).await;
        let outcome = self.forgive(target, outcome)?;
        if let (
            ObjectName::CheckpointPart(number, ..) | ObjectName::CheckpointManifest(number, _),
            Outcome::Left(what, Some(_)),
        ) = (target.name, &outcome)
        {
            self.mender.catalog.want_checkpoint(number);
            return Ok(Outcome::Useless(what.clone()));
        }
        if let (ObjectName::Release(_), Outcome::Left(what, Some(_))) = (target.name, &outcome) {
            // The mark of an older tenure's end: that we came after it says the same.
            return Ok(Outcome::Useless(what.clone()));
        }
        if let Outcome::Left(what, Some(why)) = &outcome {
            // Tried again and again, told once.
            self.tell(&target.name, &format!("{} is bad ({what}) and cannot be mended: {why}", target.name));
        }
        Ok(outcome)
    }

    fn forgive(&self, target: &Target, outcome: Result<Outcome, Stop>) -> Result<Outcome, Broken> {
        let path = target.name.path();
        let mut failures = self.failures.lock();
        match outcome {
            Err(Stop::Replica(e)) => {
                let count = failures.entry(path).or_default();
                *count += 1;
                if *count < PASSED_OVER {
                    return Err(Stop::Replica(e).into());
                }
                Ok(Outcome::Left("cannot be read or written".into(), Some(e.to_string())))
            }
            Err(e) => Err(e.into()),
            Ok(outcome) => {
                failures.remove(&path);
                Ok(outcome)
            }
        }
    }

    /// Nothing is written where another writer was seen.
    async fn check_fence(&self, age: Duration) -> Result<(), Broken> {
        if let Some(fenced) = self.fence.seen() {
            return Err(Broken::Never(fenced.to_string()));
        }
        if self.looked.lock().is_some_and(|at| at.elapsed() < age) {
            return Ok(());
        }
        let at = Instant::now();
        match crate::replica::look_for_rivals(&self.mender.replica, &self.mender.identity, &self.fence).await
        {
            Ok(None) => {
                *self.looked.lock() = Some(at);
                Ok(())
            }
            Ok(Some(fenced)) => Err(Broken::Never(fenced.to_string())),
            Err(why) => Err(Broken::Later(why)),
        }
    }

    /// Sees that the replica is ours; writes a damaged `volume.json` again where our own claim proves that.
    pub async fn check_volume(&self, dry_run: bool) -> Result<(), Broken> {
        let (replica, identity) = (&self.mender.replica, &self.mender.identity);
        match volume::expect(replica.store(), identity.volume.volume).await {
            Ok(Found::Volume(_) | Found::Empty | Found::Headless) => Ok(()),
            Err(VolumeError::Store(e)) if e.kind != crate::replica::ErrorKind::Corrupt => Err(e.into()),
            Err(e) if e.is_damage() => {
                // The newest first: it is the likeliest to be there.
                let proof = async {
                    for claim in identity.claims.iter().rev() {
                        let found = volume::read_claim(replica.store(), claim.epoch, claim.volume).await;
                        if found.is_ok_and(|f| f.claim_id == claim.claim_id) {
                            return true;
                        }
                    }
                    false
                };
                if !proof.await {
                    return Err(Broken::Never(format!(
                        "{e}; no claim there proves that it is this volume's, so it is left alone"
                    )));
                }
                if !dry_run {
                    self.repair(&Target::named(ObjectName::Volume), e.to_string()).await?;
                    replica.recheck();
                }
                Ok(())
            }
            Err(e) => {
                replica.recheck();
                Err(Broken::Never(e.to_string()))
            }
        }
    }

    /// Writes claims again that cannot be read: a replica is not written to while the one of our own epoch is damaged.
    pub async fn check_claims(&self, dry_run: bool) -> Result<(), Broken> {
        let (replica, identity) = (&self.mender.replica, &self.mender.identity);
        for claim in &identity.claims {
            match volume::read_claim(replica.store(), claim.epoch, claim.volume).await {
                Err(e) if e.is_damage() && !dry_run => {
                    self.repair(&Target::named(ObjectName::Claim(claim.epoch)), e.to_string()).await?;
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// What is sealed, asked for off the async threads.
    async fn sealed(&self, after: SegmentNo, limit: usize) -> Result<Vec<Sealed>, Broken> {
        let catalog = Arc::clone(&self.mender.catalog);
        let sealed = tokio::task::spawn_blocking(move || catalog.segments(after, limit)).await;
        sealed.map_err(|e| Broken::Later(e.to_string()))?.map_err(Broken::Later)
    }

    /// The checkpoints that the log names.
    async fn named(&self) -> Result<NamedCheckpoints, Broken> {
        let catalog = Arc::clone(&self.mender.catalog);
        let named = tokio::task::spawn_blocking(move || catalog.checkpoints()).await;
        named.map_err(|e| Broken::Later(e.to_string()))?.map_err(Broken::Later)
    }

    /// Learns the hashes of segments that a restore did not read, from `from` on.
    async fn learn(&self, from: SegmentNo) {
        let (replicas, volume) = (self.mender.roster.all(), self.mender.identity.volume.volume);
        chain::learn(&self.outbox, &replicas, volume, from).await;
    }

    /// All sealed segments. Those that are to be read, or to be copied, with their hashes.
    async fn all_sealed(
        &self,
        cursor: SegmentNo,
        found: &Inventory,
        deep: bool,
    ) -> Result<BTreeMap<SegmentNo, Sealed>, Broken> {
        let sealed = self.sealed(SegmentNo(0), usize::MAX).await?;
        let is_wrong = |s: &Staged| {
            found.0.get(&ObjectName::Segment(s.number, s.epoch).path()).is_none_or(|len| *len != s.len)
        };
        let unknown = sealed.iter().filter(|s| s.hash.is_none() && s.staged.number <= cursor);
        let lowest = unknown.filter(|s| deep || is_wrong(&s.staged)).map(|s| s.staged.number).min();
        let sealed = match lowest {
            None => sealed,
            Some(lowest) => {
                self.learn(lowest).await;
                self.sealed(SegmentNo(0), usize::MAX).await?
            }
        };
        Ok(sealed.into_iter().map(|s| (s.staged.number, s)).collect())
    }

    /// Gathers what the replica should hold: by the tables and the log, never by what some replica holds.
    async fn ground(&self, cursor: SegmentNo, found: &Inventory, deep: bool) -> Result<Ground, Broken> {
        let sealed = self.all_sealed(cursor, found, deep).await?;
        let named = self.named().await?;
        let mut keys: BTreeSet<_> = found.checkpoints().collect();
        let mut releases: BTreeSet<_> = found.releases().collect();
        for peer in self.peers() {
            // One that does not answer has nothing to say.
            if let Ok(small) = Inventory::of_small(peer.store()).await {
                keys.extend(small.checkpoints());
                releases.extend(small.releases());
            }
        }
        let mut staged = BTreeMap::new();
        if let Some(checkpoint) = self.outbox.checkpoint(SegmentNo(0), cursor) {
            let key = (checkpoint.number, checkpoint.epoch);
            staged.insert(key, checkpoint.path);
        }
        let mut manifests = BTreeMap::new();
        let mut checkpoints = BTreeMap::new();
        for key in keys.into_iter().filter(|key| key.0 <= cursor) {
            let Some(hash) = named.get(&key) else { continue };
            let manifest = self.manifest(key, *hash).await;
            checkpoints.insert(key, manifest.as_ref().map(|m| m.parts.iter().map(|p| p.len).collect()));
            manifests.extend(manifest.map(|m| (key, Arc::new(m))));
        }
        let ours = self.mender.identity.epoch();
        releases.retain(|epoch| *epoch < ours);
        let expected = Expected {
            cursor,
            segments: sealed.iter().map(|(n, s)| (*n, (s.staged.epoch, s.staged.len))).collect(),
            claims: self.mender.identity.claims.clone(),
            releases,
            checkpoints,
            named: Some(named.keys().copied().collect()),
        };
        Ok(Ground { expected, sealed, manifests, named, staged })
    }

    fn peers(&self) -> Vec<Arc<crate::replica::Replica>> {
        let mut others = self.mender.roster.others(self.mender.replica.name());
        others.retain(|p| p.is_attached());
        others
    }

    /// A checkpoint's manifest, from a replica that has the one that the log names.
    async fn manifest(&self, (number, epoch): (SegmentNo, Epoch), named: ManifestHash) -> Option<Manifest> {
        let path = ObjectName::CheckpointManifest(number, epoch).path();
        let volume = self.mender.identity.volume.volume;
        for replica in std::iter::once(Arc::clone(&self.mender.replica)).chain(self.peers()) {
            let Ok(bytes) = replica.store().get(&path).await else { continue };
            if ManifestHash::of(&bytes) == named
                && let Ok(manifest) = Manifest::decode(&bytes, number, epoch)
                && manifest.volume == volume
            {
                return Some(manifest);
            }
        }
        None
    }

    /// What is known of an object that was named while reading.
    pub async fn target_of(&self, name: ObjectName) -> Result<Target, Broken> {
        match name {
            ObjectName::Segment(number, _) => {
                let one = || self.sealed(SegmentNo(number.0.saturating_sub(1)), 1);
                let mut sealed = one().await?;
                if sealed.first().is_some_and(|s| s.hash.is_none()) {
                    self.learn(number).await;
                    sealed = one().await?;
                }
                let sealed = sealed.into_iter().next().filter(|s| s.staged.number == number);
                Ok(segment_target(name, 0, sealed.as_ref()))
            }
            ObjectName::CheckpointPart(number, epoch, _) | ObjectName::CheckpointManifest(number, epoch) => {
                let named = self.named().await?.get(&(number, epoch)).copied();
                let manifest = match named {
                    Some(named) => self.manifest((number, epoch), named).await.map(Arc::new),
                    None => None,
                };
                Ok(Target { manifest, named, ..Target::named(name) })
            }
            _ => Ok(Target::named(name)),
        }
    }
}

/// Whether something bad stays as it is.
fn is_left(outcome: &Outcome) -> bool {
    matches!(outcome, Outcome::Left(..) | Outcome::Other(_))
}

fn segment_target(name: ObjectName, len: u64, sealed: Option<&Sealed>) -> Target {
    Target {
        len: sealed.map_or(len, |s| s.staged.len),
        hash: sealed.and_then(|s| s.hash),
        staged: sealed.map(|s| s.staged.clone()),
        local: sealed.map(|s| s.staged.path.clone()),
        ..Target::named(name)
    }
}

impl Ground {
    fn target(&self, name: ObjectName, len: u64) -> Target {
        match name {
            ObjectName::Segment(number, _) => segment_target(name, len, self.sealed.get(&number)),
            ObjectName::CheckpointPart(number, epoch, index) => {
                let manifest = self.manifests.get(&(number, epoch)).cloned();
                let right =
                    manifest.as_ref().and_then(|m| m.parts.get(index as usize)).map_or(len, |p| p.len);
                let local = self.staged.get(&(number, epoch)).cloned();
                let named = self.named.get(&(number, epoch)).copied();
                Target { len: right, manifest, local, named, ..Target::named(name) }
            }
            ObjectName::CheckpointManifest(number, epoch) => {
                let local = self.staged.get(&(number, epoch)).cloned();
                let named = self.named.get(&(number, epoch)).copied();
                Target { len, local, named, ..Target::named(name) }
            }
            _ => Target { len, ..Target::named(name) },
        }
    }
}
