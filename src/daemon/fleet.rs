//! All replicas of a mounted volume together: who they are, who has what, and waiting for them.
//!
//! Owns the rules when staged segments may go and when a replica may, the tasks that ship, and the memory of commands that change the
//! list (`members`). Each replica ships for itself.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::StreamExt;
use futures::stream::FuturesUnordered;
use parking_lot::{Mutex, RwLock};
use tokio::runtime::Handle;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::core::StoreMaker;
use super::members::Members;
use crate::control::Failure;
use crate::exit::Exit;
use crate::format::tables::cursor_key;
use crate::ids::{ReplicaName, SegmentNo};
use crate::journal::{Journal, JournalError};
use crate::replica::health::HealthState;
use crate::replica::volume::{self, Found};
use crate::replica::{
    CursorStore, Fence, Identity, Outbox, Replica, ReplicaSpec, ReplicaState, ReplicaStatus, Roster, Shipper,
    Tuning, check_distinct,
};
use crate::txg::Staging;

/// A replica that lacks no more segments than this counts as filled: what is sealed all the time must not keep it from that.
const NEARLY: u64 = 4;
/// How long a shipper may take to end when its replica is detached.
const END: Duration = Duration::from_secs(10);

/// Cursors in the local tables, by name and place: a name given to another place begins anew.
pub(super) struct Cursors {
    pub journal: Arc<Journal>,
    pub places: RwLock<BTreeMap<ReplicaName, String>>,
}

/// Key of a replica's cursor.
pub(super) fn cursor_of(name: &ReplicaName, url: &str) -> Bytes {
    cursor_key(&format!("{name} {url}"))
}

/// Key of the filesystem that a folder replica lies on. It has the form of a cursor's key, with a name that no replica has.
fn filesystem_of(name: &ReplicaName, url: &str) -> Bytes {
    cursor_key(&format!("filesystem of {name} {url}"))
}

impl Cursors {
    fn url(&self, replica: &ReplicaName) -> String {
        self.places.read().get(replica).cloned().unwrap_or_default()
    }

    fn key(&self, replica: &ReplicaName) -> Bytes {
        cursor_of(replica, &self.url(replica))
    }

    fn put(&self, key: Bytes, value: Vec<u8>) -> Result<(), String> {
        let saved = self.journal.transact::<_, JournalError>(|tx| {
            tx.put(key, value);
            Ok(())
        });
        saved.map(|_| ()).map_err(|e| e.to_string())
    }

    /// Forgets a replica: when it comes back it is looked at from the beginning.
    fn forget(&self, replica: &ReplicaName) -> Result<(), String> {
        let url = self.url(replica);
        let forgotten = self.journal.transact::<_, JournalError>(|tx| {
            tx.delete(cursor_of(replica, &url));
            tx.delete(filesystem_of(replica, &url));
            Ok(())
        });
        self.places.write().remove(replica);
        forgotten.map(|_| ()).map_err(|e| e.to_string())
    }
}

impl CursorStore for Cursors {
    fn load(&self, replica: &ReplicaName) -> Result<SegmentNo, String> {
        let value = self.journal.get(&self.key(replica)).map_err(|e| e.to_string())?;
        let number = value.and_then(|v| v[..].try_into().ok()).map_or(0, u64::from_le_bytes);
        Ok(SegmentNo(number))
    }

    fn save(&self, replica: &ReplicaName, cursor: SegmentNo) -> Result<(), String> {
        self.put(self.key(replica), cursor.0.to_le_bytes().to_vec())
    }

    fn load_filesystem(&self, replica: &ReplicaName) -> Result<Option<String>, String> {
        let value = self.journal.get(&filesystem_of(replica, &self.url(replica)));
        let value = value.map_err(|e| e.to_string())?;
        Ok(value.map(|v| String::from_utf8_lossy(&v).into_owned()))
    }

    fn save_filesystem(&self, replica: &ReplicaName, filesystem: &str) -> Result<(), String> {
        self.put(filesystem_of(replica, &self.url(replica)), filesystem.as_bytes().to_vec())
    }
}

/// What shippers need that is the same for all.
#[derive(Clone)]
pub(super) struct Shipping {
    pub identity: Arc<Identity>,
    pub fence: Arc<Fence>,
    pub tuning: Tuning,
}

/// One replica's shipper.
struct Task {
    stop: watch::Sender<bool>,
    handle: JoinHandle<()>,
}

impl Task {
    /// Tells it to end, and drops it if it has not by `until`.
    async fn end(self, until: tokio::time::Instant) {
        self.stop.send_replace(true);
        let abort = self.handle.abort_handle();
        if tokio::time::timeout_at(until, self.handle).await.is_err() {
            abort.abort();
        }
    }
}

/// What is known of the list besides the replicas themselves.
struct Listed {
    specs: Vec<ReplicaSpec>,
    members: Members,
    tasks: BTreeMap<ReplicaName, Task>,
}

/// The replicas of a mounted volume, in the order of the configuration.
pub struct Fleet {
    /// The list that reader, shippers and reconciler share.
    pub(super) roster: Arc<Roster>,
    pub(super) staging: Arc<Staging>,
    pub(super) cursors: Arc<Cursors>,
    make: StoreMaker,
    /// The state folder.
    state: PathBuf,
    handle: Handle,
    /// None in a read-only mount.
    shipping: Option<Shipping>,
    listed: Mutex<Listed>,
    /// Held while the list changes, so that two commands do not meet.
    changing: tokio::sync::Mutex<()>,
}

/// Up to which segment staged files may go: what every replica has, or, when `short` of space, what any one has that
/// answers (whoever lags copies it from there). Each replica is its cursor, and whether it answers.
fn trimmable(replicas: impl Iterator<Item = (SegmentNo, bool)> + Clone, short: bool) -> SegmentNo {
    let every = replicas.clone().map(|(cursor, _)| cursor).min().unwrap_or_default();
    let answering = replicas.filter(|(_, answers)| *answers).map(|(cursor, _)| cursor).max();
    if short { answering.unwrap_or_default().max(every) } else { every }
}

/// Whether a replica was found in order and answers: only then its cursor says what others can copy from there.
fn answers(replica: &Replica) -> bool {
    replica.is_attached() && replica.health().state() != HealthState::Offline
}

/// What [`Fleet::open`] is given.
pub(super) struct FleetParts {
    pub specs: Vec<ReplicaSpec>,
    pub replicas: Vec<Arc<Replica>>,
    pub members: Members,
    pub staging: Arc<Staging>,
    pub journal: Arc<Journal>,
    pub make: StoreMaker,
    pub state: PathBuf,
    pub handle: Handle,
    pub shipping: Option<Shipping>,
}

impl Fleet {
    /// The fleet of a volume; nothing is shipped before [`Fleet::start`].
    pub(super) fn open(parts: FleetParts) -> Arc<Self> {
        let FleetParts { specs, replicas, members, staging, journal, make, state, handle, shipping } = parts;
        for replica in &replicas {
            // Those that are filled went out of the configuration meanwhile: then it must do without them.
            let others = replicas.iter().any(|r| !members.joining.contains_key(r.name()));
            replica.set_joining(others && members.joining.contains_key(replica.name()));
            replica.pause(members.paused.contains(replica.name()));
        }
        let places = specs.iter().map(|s| (s.name.clone(), s.url.clone())).collect();
        Arc::new(Self {
            roster: Roster::new(replicas),
            staging,
            cursors: Arc::new(Cursors { journal, places: RwLock::new(places) }),
            make,
            state,
            handle,
            shipping,
            listed: Mutex::new(Listed { specs, members, tasks: BTreeMap::new() }),
            changing: tokio::sync::Mutex::default(),
        })
    }

    /// Begins to ship to every replica; a read-only mount only recalls how far each is.
    pub fn start(&self) {
        for replica in self.roster.all().iter() {
            self.ship_to(replica);
        }
    }

    fn ship_to(&self, replica: &Arc<Replica>) {
        let Some(shipping) = &self.shipping else {
            if let Ok(cursor) = self.cursors.load(replica.name()) {
                replica.set_cursor(cursor);
            }
            return;
        };
        let (stop, closing) = watch::channel(false);
        let shipper = Shipper {
            replica: Arc::clone(replica),
            peers: Arc::clone(&self.roster),
            outbox: Arc::clone(&self.staging) as Arc<dyn Outbox>,
            cursors: Arc::clone(&self.cursors) as Arc<dyn CursorStore>,
            identity: Arc::clone(&shipping.identity),
            fence: Arc::clone(&shipping.fence),
            closing,
            tuning: shipping.tuning,
        };
        let task = Task { stop, handle: self.handle.spawn(shipper.run()) };
        self.listed.lock().tasks.insert(replica.name().clone(), task);
    }

    /// Ends all shippers. Beyond `patience` they are dropped; what they sent and did not note is sent again.
    pub async fn stop(&self, patience: Duration) {
        let tasks = std::mem::take(&mut self.listed.lock().tasks);
        for task in tasks.values() {
            task.stop.send_replace(true);
        }
        let until = tokio::time::Instant::now() + patience;
        for task in tasks.into_values() {
            task.end(until).await;
        }
    }

    /// Descriptions of all replicas, with their secrets.
    pub fn specs(&self) -> Vec<ReplicaSpec> {
        self.listed.lock().specs.clone()
    }

    /// Whether a replica is being filled for the first time, and which one goes when that is done.
    pub fn joining(&self, name: &ReplicaName) -> Option<Option<ReplicaName>> {
        self.listed.lock().members.joining.get(name).cloned()
    }

    /// Takes a replica into the volume, which stays in use. It is filled in the background; `replaces` is detached when that is done.
    pub async fn attach(&self, spec: ReplicaSpec, replaces: Option<ReplicaName>) -> Result<(), Failure> {
        let shipping = self.shipping.as_ref().ok_or_else(read_only)?;
        let usage = |e: &dyn std::fmt::Display| Failure::new(Exit::Usage, e.to_string());
        let with_it = || {
            if let Some(old) = &replaces {
                self.known(old)?;
            }
            let mut specs = self.specs();
            specs.push(spec.clone());
            check_distinct(&specs).map_err(|e| usage(&e))?;
            Ok::<_, Failure>(specs)
        };
        with_it()?;
        let store = (self.make)(&spec).map_err(|e| usage(&e))?;
        let of_volume = |e: volume::VolumeError| Failure::new(super::open::exit_of(&e), e.to_string());
        store.prepare().await.map_err(|e| of_volume(e.into()))?;
        let found = volume::expect(&store, shipping.identity.volume.volume).await.map_err(of_volume)?;
        let unique = super::random().map_err(|e| Failure::new(e.exit_code(), e.to_string()))?;
        volume::require_conditions(&store, u128::from_le_bytes(unique)).await.map_err(of_volume)?;
        // From here on nothing waits for the network: trimming waits for this lock.
        let _one = self.changing.lock().await;
        let specs = with_it()?;
        // The rest (volume.json, claims, everything sealed) is the shipper's, as at every other start.
        let replica = Arc::new(Replica::new(store));
        replica.set_joining(true);
        self.change(|members| members.attach(&spec, replaces.clone())).await?;
        log::info!(
            "replica {} ({}) is attached{}",
            spec.name,
            spec.url,
            if found == Found::Empty { "" } else { "; it holds something of this volume already" }
        );
        self.cursors.places.write().insert(spec.name.clone(), spec.url.clone());
        self.listed.lock().specs = specs;
        self.roster.add(Arc::clone(&replica));
        self.remember();
        self.ship_to(&replica);
        Ok(())
    }

    /// Lets a replica go; what it holds stays there. The last one stays, and so does one that alone holds something, unless `force`.
    pub async fn detach(&self, name: &ReplicaName, force: bool) -> Result<(), Failure> {
        let _one = self.changing.lock().await;
        self.shipping.as_ref().ok_or_else(read_only)?;
        let spec = self.known(name)?;
        let others: Vec<_> = self.roster.voters().into_iter().filter(|r| r.name() != name).collect();
        if others.is_empty() {
            return Err(Failure::new(
                Exit::Usage,
                format!(
                    "replica {name} cannot go: no other one holds the volume (attach another, and wait until it is filled)"
                ),
            ));
        }
        // One that is away may never come back: what it held does not count.
        let furthest = others.iter().filter(|r| answers(r)).map(|r| r.cursor()).max().unwrap_or_default();
        if !force && !self.staging.holds_all_after(furthest) {
            return Err(Failure::new(
                Exit::InUse,
                format!(
                    "replica {name} cannot go yet: of those that answer it alone holds segments after {furthest}; wait until \
                     another has them (see: mirrorfs status), or give them up with --force"
                ),
            ));
        }
        self.change(|members| members.detach(&spec)).await?;
        self.roster.remove(name);
        let task = self.listed.lock().tasks.remove(name);
        if let Some(task) = task {
            task.end(tokio::time::Instant::now() + END).await;
        }
        self.listed.lock().specs.retain(|s| s.name != *name);
        if let Err(e) = self.cursors.forget(name) {
            log::warn!("replica {name}: its cursor is not forgotten: {e}");
        }
        self.remember();
        log::info!("replica {name} ({}) is detached", spec.url);
        Ok(())
    }

    /// Stops or resumes shipping to a replica, also for later mounts.
    pub async fn pause(&self, name: &ReplicaName, paused: bool) -> Result<(), Failure> {
        let _one = self.changing.lock().await;
        self.known(name)?;
        self.change(|members| {
            if paused {
                members.paused.insert(name.clone());
            } else {
                members.paused.remove(name);
            }
        })
        .await?;
        if let Some(replica) = self.roster.get(name) {
            replica.pause(paused);
        }
        Ok(())
    }

    fn known(&self, name: &ReplicaName) -> Result<ReplicaSpec, Failure> {
        let listed = self.listed.lock();
        listed.specs.iter().find(|s| s.name == *name).cloned().ok_or_else(|| {
            let names: Vec<_> = listed.specs.iter().map(|s| s.name.as_str()).collect();
            Failure::new(Exit::Usage, format!("no replica is called {name}; there are {}", names.join(", ")))
        })
    }

    /// Changes what is remembered; first on disk, then here.
    async fn change(&self, edit: impl FnOnce(&mut Members)) -> Result<(), Failure> {
        let mut members = self.listed.lock().members.clone();
        edit(&mut members);
        let (state, written) = (self.state.clone(), members.clone());
        let done = tokio::task::spawn_blocking(move || written.write(&state)).await;
        match done {
            Ok(Ok(())) => {
                self.listed.lock().members = members;
                Ok(())
            }
            Ok(Err(e)) => {
                let file = self.state.join(super::members::FILE);
                Err(Failure::new(Exit::Failure, format!("cannot write {}: {e}", file.display())))
            }
            Err(e) => Err(Failure::new(Exit::Failure, e.to_string())),
        }
    }

    /// Notes the places for whoever looks for the state folder by its replicas.
    fn remember(&self) {
        if let Err(e) = crate::config::state::remember(&self.state, &self.specs()) {
            log::warn!("cannot note the replicas in {}: {e}", self.state.display());
        }
    }

    /// Replicas that were attached and are filled count from now on, and those that they replace go.
    async fn settle(&self) {
        let newest = self.staging.newest();
        for replica in self.roster.all().iter().filter(|r| r.is_attached()) {
            let name = replica.name();
            let Some(old) = self.joining(name) else { continue };
            if replica.is_joining() {
                if replica.cursor().0.saturating_add(NEARLY) < newest.0 {
                    continue;
                }
                replica.set_joining(false);
                // What else the others have (checkpoints, above all) is copied by whoever looks after replicas.
                replica.call_attention();
                self.roster.touch();
                log::info!("replica {name} is filled: it counts from now on");
            }
            if let Some(old) = old
                && let Err(e) = self.detach(&old, false).await
            {
                // Tried again at the next look. Until then what the new one lacks stays staged, so that the old one can go soon.
                log::debug!("replica {old}, which {name} replaces, is not detached yet: {e}");
                continue;
            }
            let _one = self.changing.lock().await;
            if let Err(e) = self.change(|members| drop(members.joining.remove(name))).await {
                log::warn!("replica {name}: {e}");
            }
        }
    }

    /// Waits until as many replicas as `needed` says, out of how many there are, hold everything up to `segment`. Waits as long as it
    /// takes: bound it from outside.
    pub async fn wait_for(&self, segment: SegmentNo, needed: impl Fn(usize) -> usize) {
        loop {
            let all = self.roster.all();
            if all.iter().filter(|r| r.cursor() >= segment).count() >= needed(all.len()) {
                return;
            }
            let mut moved: FuturesUnordered<_> =
                all.iter().filter(|r| r.cursor() < segment).map(|r| r.wait_for(segment)).collect();
            let mut list = self.roster.watch();
            tokio::select! {
                Some(()) = moved.next() => {}
                _ = list.changed() => {}
                // A change between the look and the wait, and cursors that went back.
                () = tokio::time::sleep(Duration::from_millis(100)) => {}
            }
        }
    }

    /// Waits until every replica holds everything sealed, at most until `until`. For those in trouble it waits only
    /// when `all` are wanted.
    pub async fn last_call(&self, until: Instant, all: bool) {
        let newest = self.staging.newest();
        while Instant::now() < until {
            let works = |s: &ReplicaStatus| {
                matches!(s.state, ReplicaState::Healthy | ReplicaState::Degraded) && !s.joining
            };
            if !self.statuses().iter().any(|s| s.cursor < newest && (all || works(s))) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Names of those that do not, with what keeps them.
    pub fn lacking(&self, segment: SegmentNo) -> String {
        let now = super::unix_now();
        let all = self.roster.all();
        let late = all.iter().filter(|r| r.cursor() < segment).map(|r| {
            let status = r.status(self.staging.backlog(r.cursor()), now);
            let why = status.last_error.map_or_else(String::new, |e| format!(" ({})", e.text));
            format!("{} lacks {} segments{why}", r.name(), status.lag_segments)
        });
        late.collect::<Vec<_>>().join("; ")
    }

    /// What `status` shows of each.
    pub fn statuses(&self) -> Vec<ReplicaStatus> {
        let now = super::unix_now();
        self.roster.all().iter().map(|r| r.status(self.staging.backlog(r.cursor()), now)).collect()
    }

    /// Removes staged files as replicas take them over; ends when `stop` resolves.
    pub async fn trim(
        self: Arc<Self>,
        short: impl Fn() -> bool + Send,
        stop: impl Future<Output = ()> + Send,
    ) {
        let mut stop = std::pin::pin!(stop);
        loop {
            self.settle().await;
            // A replica whose copies are counted on here must not be let go before they are gone here.
            let one = self.changing.lock().await;
            let upto = trimmable(self.roster.voters().iter().map(|r| (r.cursor(), answers(r))), short());
            if self.staging.oldest().0.is_some_and(|oldest| oldest <= upto) {
                let staging = Arc::clone(&self.staging);
                let done = tokio::task::spawn_blocking(move || staging.trim(upto)).await;
                if let Err(e) = done {
                    log::error!("trimming the staging area: {e}");
                }
            }
            drop(one);
            if self.staging.has_checkpoints() {
                let dumped = self.roster.voters().iter().map(|r| r.checkpoint()).min().unwrap_or_default();
                let staging = Arc::clone(&self.staging);
                if let Err(e) = tokio::task::spawn_blocking(move || staging.trim_checkpoints(dumped)).await {
                    log::error!("trimming the staging area: {e}");
                }
            }
            tokio::select! {
                () = tokio::time::sleep(Duration::from_millis(200)) => {}
                () = &mut stop => return,
            }
        }
    }
}

fn read_only() -> Failure {
    Failure::new(Exit::Failure, "mounted read-only: its replicas can be changed only in a writable mount")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn staged_files_stay_until_they_are_elsewhere() {
        let cursors =
            [(SegmentNo(3), true), (SegmentNo(9), false), (SegmentNo(7), true), (SegmentNo(0), true)];
        assert_eq!(trimmable(cursors.into_iter(), false), SegmentNo(0));
        assert_eq!(trimmable(cursors.into_iter(), true), SegmentNo(7), "what is away may not come back");
        assert_eq!(trimmable([(SegmentNo(2), false)].into_iter(), true), SegmentNo(2), "all have it");
        assert_eq!(trimmable([].into_iter(), true), SegmentNo(0));
    }
}
