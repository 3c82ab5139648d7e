//! One replica as a set of named objects.
//!
//! Owns the deadline of every call, the class of every error, and the verification of every write. Knows no segment and no
//! volume, keeps no state but counters and the speed seen, and repeats nothing except to resolve an ambiguous creation.

use std::future::Future;
use std::path::Path as FsPath;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::TryStreamExt;
use futures::stream::BoxStream;
use object_store::path::Path;
use object_store::{ObjectMeta, ObjectStore, ObjectStoreExt, PutMode, PutOptions, PutPayload, PutResult};
use parking_lot::Mutex;

use super::absence::Absence;
use super::error::{ErrorKind, StoreError, classify, one_line};
use super::folder::Seat;
use super::limit::Timetable;
use super::pace::Pace;
use super::throttle::Throttles;
use crate::format::names::ObjectName;
use crate::ids::ReplicaName;
use crate::private;

/// Files above this many bytes are sent in parts.
const SINGLE_PUT: u64 = 64 << 20;
/// Names that a listing keeps although mirrorfs does not make such; others are only counted.
const FOREIGN_KEPT: u64 = 10_000;
/// Names that a listing keeps at all.
const MOST_LISTED: usize = 1 << 24;
/// How often an ambiguous creation is tried.
const CREATE_TRIES: u32 = 3;

mod files;
mod limits;
mod raw;
mod read;

pub use raw::{RawSpeed, RawWork};

/// How long calls may take and how many run at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Until a connection stands.
    pub connect: Duration,
    /// Until a small answer is complete; transfers get more, by their size and the speed seen.
    pub call: Duration,
    /// Segments sent at a time.
    pub in_flight: usize,
    /// Objects and ranges read at a time, at least one.
    pub reads_in_flight: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(5),
            call: Duration::from_secs(15),
            in_flight: 4,
            reads_in_flight: 16,
        }
    }
}

/// An object and its size.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ObjectInfo {
    /// Its path, relative to the replica's root.
    pub path: String,
    /// Its size in bytes.
    pub size: u64,
}

/// What became of a creation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Created {
    /// The object is there and holds the given bytes, and nobody else made it.
    New,
    /// Somebody else made it before; these are its bytes.
    Existed(Bytes),
}

/// Whether a backend keeps the promise of conditional creation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Conditional {
    /// A second creation is refused.
    Works,
    /// A second creation overwrites, or is not supported: the backend cannot fence writers.
    Ignored,
}

/// What was asked of a replica so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Requests {
    /// Objects or ranges read.
    pub get: u64,
    /// Objects written, conditionally or not.
    pub put: u64,
    /// Existence and size asked for.
    pub head: u64,
    /// Listings.
    pub list: u64,
    /// Objects deleted.
    pub delete: u64,
    /// Calls that failed, absent objects not counted.
    pub failed: u64,
    /// Bytes of object content sent.
    pub bytes_sent: u64,
    /// Bytes of object content received.
    pub bytes_received: u64,
}

impl Requests {
    /// All requests together.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.get + self.put + self.head + self.list + self.delete
    }
}

#[derive(Default)]
struct Counters {
    get: AtomicU64,
    put: AtomicU64,
    head: AtomicU64,
    list: AtomicU64,
    delete: AtomicU64,
    failed: AtomicU64,
    sent: AtomicU64,
    received: AtomicU64,
}

#[derive(Default)]
struct Paces {
    up: Mutex<Pace>,
    down: Mutex<Pace>,
}

/// One replica's objects. Cheap to clone; clones share connections, counters, the speed seen and the limits of speed.
#[derive(Clone)]
pub struct Store {
    name: ReplicaName,
    url: Arc<str>,
    root: Path,
    backend: Arc<dyn ObjectStore>,
    /// The folder, when the replica is one.
    folder: Option<Arc<FsPath>>,
    /// False when the backend is known not to create conditionally and the user accepted that.
    conditional: bool,
    limits: Limits,
    counters: Arc<Counters>,
    paces: Arc<Paces>,
    throttles: Arc<Throttles>,
    /// Whether this clone is for work that lets others pass.
    background: bool,
    absence: Arc<Absence>,
    patience: Duration,
}

impl std::fmt::Debug for Store {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Store({} at {})", self.name, self.url)
    }
}

impl Store {
    /// A store over any backend. `url` is what status and messages show: no secrets in it. Objects lie below `root`.
    #[must_use]
    pub fn over(
        name: ReplicaName,
        url: &str,
        root: Path,
        backend: Arc<dyn ObjectStore>,
        limits: Limits,
    ) -> Self {
        Self {
            name,
            url: url.into(),
            root,
            backend,
            folder: None,
            conditional: true,
            limits,
            counters: Arc::default(),
            paces: Arc::default(),
            throttles: Arc::new(Throttles::new(
                Timetable::default(),
                Timetable::default(),
                Timetable::default(),
                limits.reads_in_flight,
            )),
            background: false,
            absence: Arc::default(),
            patience: super::DEADLINE,
        }
    }

    /// A store in memory, empty, for tests.
    #[must_use]
    pub fn in_memory(name: ReplicaName) -> Self {
        let url = format!("memory://{name}");
        let backend = Arc::new(object_store::memory::InMemory::new());
        Self::over(name, &url, Path::default(), backend, Limits::default())
    }

    /// Names the folder that [`Store::prepare`] makes.
    pub(super) fn in_folder(mut self, folder: &FsPath) -> Self {
        self.folder = Some(folder.into());
        self
    }

    /// Says that the backend cannot create conditionally: creation then looks first and writes second, which does not
    /// protect against two writers at the same moment.
    #[must_use]
    pub fn without_conditions(mut self) -> Self {
        self.conditional = false;
        self
    }

    /// The same store with its backend replaced by what `wrap` makes of it, and other limits; used to inject faults.
    #[must_use]
    pub fn wrapped(mut self, wrap: impl FnOnce(Arc<dyn ObjectStore>) -> Arc<dyn ObjectStore>) -> Self {
        self.backend = wrap(self.backend);
        self
    }

    /// The same store with other limits.
    #[must_use]
    pub fn with_limits(mut self, limits: Limits) -> Self {
        self.limits = limits;
        self.throttles = Arc::new(self.throttles.with_reads(limits.reads_in_flight));
        self
    }

    /// The same store, whose absence a restore waits for as long as this.
    #[must_use]
    pub fn with_patience(mut self, patience: Duration) -> Self {
        self.patience = patience;
        self
    }

    /// How long a restore waits while it is away.
    #[must_use]
    pub fn patience(&self) -> Duration {
        self.patience
    }

    /// What readers that wait for it know of its absence.
    #[must_use]
    pub fn absence(&self) -> &Absence {
        &self.absence
    }

    /// The replica's name.
    #[must_use]
    pub fn name(&self) -> &ReplicaName {
        &self.name
    }

    /// The replica's URL, without secrets.
    #[must_use]
    pub fn url(&self) -> &str {
        &self.url
    }

    /// Its limits.
    #[must_use]
    pub fn limits(&self) -> Limits {
        self.limits
    }

    /// Whether creation is conditional, as configured; [`Store::self_test`] finds out whether the backend agrees.
    #[must_use]
    pub fn is_conditional(&self) -> bool {
        self.conditional
    }

    /// What was asked of it so far.
    #[must_use]
    pub fn requests(&self) -> Requests {
        let c = &self.counters;
        let get = |a: &AtomicU64| a.load(Ordering::Relaxed);
        Requests {
            get: get(&c.get),
            put: get(&c.put),
            head: get(&c.head),
            list: get(&c.list),
            delete: get(&c.delete),
            failed: get(&c.failed),
            bytes_sent: get(&c.sent),
            bytes_received: get(&c.received),
        }
    }

    /// Speed of uploads as seen lately, one transfer at a time, in bytes per second.
    #[must_use]
    pub fn upload_rate(&self) -> f64 {
        self.paces.up.lock().rate()
    }

    /// Makes the replica's folder when it is one and absent; nothing for a bucket, which people make. Only `init`, or a first
    /// mount on empty replicas, calls this.
    pub async fn prepare(&self) -> Result<(), StoreError> {
        let Some(folder) = self.folder.clone() else { return Ok(()) };
        let made = tokio::task::spawn_blocking(move || super::folder::Folder::prepare(&folder));
        let made = async {
            made.await?.map_err(|e| object_store::Error::Generic { store: "folder", source: Box::new(e) })
        };
        self.call("make folder", "", self.limits.call, made).await
    }

    /// Where the replica's folder lies when it is one.
    pub(super) async fn seat(&self) -> Result<Option<Seat>, StoreError> {
        let Some(folder) = self.folder.clone() else { return Ok(None) };
        let look = tokio::task::spawn_blocking(move || Seat::look(&folder));
        let look = async {
            look.await?.map_err(|e| object_store::Error::Generic { store: "folder", source: Box::new(e) })
        };
        self.call("look at folder", "", self.limits.call, look).await.map(Some)
    }

    /// Who besides its owner may enter the replica's folder, when it is one; `None` also when that
    /// cannot be told.
    pub async fn open_to_others(&self) -> Option<private::Open> {
        let folder = self.folder.clone()?;
        let look = tokio::task::spawn_blocking(move || private::Open::look(&folder));
        let look = async { Ok(look.await?) };
        self.call("look at folder", "", self.limits.call, look).await.ok().flatten()
    }

    /// The object's size.
    pub async fn head(&self, path: &str) -> Result<ObjectInfo, StoreError> {
        let at = self.at("head", path)?;
        bump(&self.counters.head);
        let meta = self.call("head", path, self.limits.call, self.backend.head(&at)).await?;
        Ok(ObjectInfo { path: path.to_owned(), size: meta.size })
    }

    /// All objects in the folder `prefix` (whole path segments; empty for everything) and below it, sorted by path.
    pub async fn list(&self, prefix: &str) -> Result<Vec<ObjectInfo>, StoreError> {
        let at = self.at("list", prefix)?;
        self.pages(prefix, self.backend.list(Some(&at))).await
    }

    /// As [`Store::list`], but only what sorts after the path `after`: cheap where that is little, however much lies before.
    pub async fn list_after(&self, prefix: &str, after: &str) -> Result<Vec<ObjectInfo>, StoreError> {
        let (at, offset) = (self.at("list", prefix)?, self.at("list", after)?);
        let mut found = self.pages(prefix, self.backend.list_with_offset(Some(&at), &offset)).await?;
        // Some servers begin at the front all the same.
        found.retain(|o| o.path.as_str() > after);
        Ok(found)
    }

    async fn pages(
        &self,
        prefix: &str,
        mut pages: BoxStream<'static, object_store::Result<ObjectMeta>>,
    ) -> Result<Vec<ObjectInfo>, StoreError> {
        bump(&self.counters.list);
        let (mut found, mut foreign) = (Vec::new(), 0_u64);
        // The deadline is for every page, not for the whole: a listing may be long, but it must go on.
        while let Some(meta) = self.call("list", prefix, self.limits.call, pages.try_next()).await? {
            let Some(path) = self.relative(&meta.location) else { continue };
            // Any number of names may lie there that are nothing to us.
            if ObjectName::parse(&path).is_none() {
                foreign += 1;
                if foreign > FOREIGN_KEPT {
                    continue;
                }
            }
            if found.len() >= MOST_LISTED {
                let text =
                    format!("more than {MOST_LISTED} objects are listed, so most of them must be junk");
                return Err(self.error("list", prefix, ErrorKind::Corrupt, text));
            }
            found.push(ObjectInfo { path, size: meta.size });
        }
        if foreign > FOREIGN_KEPT {
            log::warn!("replica {}: {foreign} names below {prefix:?} are none of mirrorfs", self.name);
        }
        found.sort();
        Ok(found)
    }

    /// Writes the object, whether or not it exists, and checks that it is there with its full size.
    pub async fn put(&self, path: &str, body: Bytes) -> Result<(), StoreError> {
        let len = body.len() as u64;
        self.pay_upload(len).await;
        self.put_payload(path, body, PutMode::Overwrite).await?;
        self.verify_size(path, len).await
    }

    /// Writes an object that should not be there yet, and checks it as [`Store::put`] does. [`ErrorKind::Exists`] says that there is
    /// one: another's, or ours if an answer was lost. A backend without conditions overwrites: look first.
    pub async fn put_new(&self, path: &str, body: Bytes) -> Result<(), StoreError> {
        let len = body.len() as u64;
        let mode = if self.conditional { PutMode::Create } else { PutMode::Overwrite };
        self.pay_upload(len).await;
        self.put_payload(path, body, mode).await?;
        self.verify_size(path, len).await
    }

    /// Writes the content of a local file of `len` bytes as [`Store::put`] does, in parts when it is large.
    /// [`ErrorKind::Absent`] says that the local file is gone.
    pub async fn put_file(&self, path: &str, file: &FsPath, len: u64) -> Result<(), StoreError> {
        if len > SINGLE_PUT {
            self.put_parts(path, file, len).await?;
        } else {
            self.pay_upload(len).await;
            let body = self.read_local(path, file, 0, len).await?;
            self.put_payload(path, body, PutMode::Overwrite).await?;
        }
        self.verify_size(path, len).await
    }

    /// Writes the object only if there is none. An ambiguous answer is resolved by reading back: bytes equal to ours are
    /// ours, so `body` should be unique to the caller where that matters. It should be small, too: it waits for no limit.
    pub async fn put_if_absent(&self, path: &str, body: Bytes) -> Result<Created, StoreError> {
        self.throttles.up.charge(body.len() as u64);
        let mut failure = None;
        for attempt in 0..CREATE_TRIES {
            if attempt > 0 {
                tokio::time::sleep(Duration::from_millis(100 << attempt)).await;
            }
            let tried = match self.conditional {
                true => self.put_payload(path, body.clone(), PutMode::Create).await,
                false => self.put_unless_seen(path, body.clone()).await,
            };
            let Err(e) = tried else {
                self.verify_size(path, body.len() as u64).await?;
                return Ok(Created::New);
            };
            if !(e.kind == ErrorKind::Exists || e.kind.is_passing()) {
                return Err(e);
            }
            match self.get(path).await {
                Ok(found) if found == body => return Ok(Created::New),
                Ok(found) => return Ok(Created::Existed(found)),
                Err(read) if read.kind == ErrorKind::Absent => failure = Some(e),
                // Neither the creation nor the reading says what is there: the caller learns the first.
                Err(_) => return Err(e),
            }
        }
        Err(failure.unwrap_or_else(|| self.error("create", path, ErrorKind::Transient, "no clear answer")))
    }

    /// Deletes the object; that it is not there is no error.
    pub async fn delete(&self, path: &str) -> Result<(), StoreError> {
        let at = self.at("delete", path)?;
        bump(&self.counters.delete);
        match self.call("delete", path, self.limits.call, self.backend.delete(&at)).await {
            Err(e) if e.kind == ErrorKind::Absent => Ok(()),
            other => other,
        }
    }

    /// Finds out whether creation is conditional: creates an object under `selftest/` twice and deletes it. `unique` keeps
    /// concurrent tests apart.
    pub async fn self_test(&self, unique: u128) -> Result<Conditional, StoreError> {
        let path = format!("selftest/{unique:032x}");
        let first = Bytes::from(format!("first {unique:032x}\n"));
        let second = Bytes::from(format!("second {unique:032x}\n"));
        let created = match self.put_payload(&path, first, PutMode::Create).await {
            Err(e) if e.kind == ErrorKind::Unsupported => return Ok(Conditional::Ignored),
            other => other,
        };
        let verdict = match created {
            Err(e) => Err(e),
            Ok(_) => match self.put_payload(&path, second, PutMode::Create).await {
                Ok(_) => Ok(Conditional::Ignored),
                Err(e) if e.kind == ErrorKind::Exists => Ok(Conditional::Works),
                Err(e) => Err(e),
            },
        };
        let deleted = self.delete(&path).await;
        let verdict = verdict?;
        deleted.map(|()| verdict)
    }

    /// An error about this replica.
    pub(super) fn error(
        &self,
        op: &'static str,
        object: &str,
        kind: ErrorKind,
        detail: impl Into<String>,
    ) -> StoreError {
        StoreError { replica: self.name.clone(), op, object: object.to_owned(), kind, detail: detail.into() }
    }

    fn at(&self, op: &'static str, path: &str) -> Result<Path, StoreError> {
        let joined = match (self.root.as_ref(), path) {
            (root, "") => Path::parse(root),
            ("", path) => Path::parse(path),
            (root, path) => Path::parse(format!("{root}/{path}")),
        };
        joined.map_err(|e| self.error(op, path, ErrorKind::Config, one_line(&e)))
    }

    fn relative(&self, at: &Path) -> Option<String> {
        let at = at.as_ref();
        let rest = match self.root.as_ref() {
            "" => at,
            root => at.strip_prefix(root)?.strip_prefix('/')?,
        };
        Some(rest.to_owned())
    }

    /// Runs one request under a deadline and gives its error a class.
    async fn call<T>(
        &self,
        op: &'static str,
        object: &str,
        deadline: Duration,
        request: impl Future<Output = object_store::Result<T>>,
    ) -> Result<T, StoreError> {
        let result = match tokio::time::timeout(deadline, request).await {
            Ok(Ok(value)) => return Ok(value),
            Ok(Err(e)) => self.error(op, object, classify(&e), one_line(&e)),
            Err(_) => self.error(
                op,
                object,
                ErrorKind::Timeout,
                format!("gave up after {:.1} s", deadline.as_secs_f64()),
            ),
        };
        if result.kind != ErrorKind::Absent {
            bump(&self.counters.failed);
        }
        Err(result)
    }

    async fn put_payload(&self, path: &str, body: Bytes, mode: PutMode) -> Result<PutResult, StoreError> {
        let op = if matches!(mode, PutMode::Overwrite) { "put" } else { "create" };
        let at = self.at(op, path)?;
        let len = body.len() as u64;
        let request = self.backend.put_opts(&at, PutPayload::from_bytes(body), PutOptions::from(mode));
        self.upload(op, path, len, request).await
    }

    /// Runs an upload of `len` bytes under a deadline that follows the speed seen.
    async fn upload<T>(
        &self,
        op: &'static str,
        path: &str,
        len: u64,
        request: impl Future<Output = object_store::Result<T>>,
    ) -> Result<T, StoreError> {
        bump(&self.counters.put);
        let started = Instant::now();
        let deadline = self.paces.up.lock().budget(self.limits.call, len);
        let result = self.call(op, path, deadline, request).await;
        match &result {
            Ok(_) => {
                self.counters.sent.fetch_add(len, Ordering::Relaxed);
                self.paces.up.lock().done(len, started.elapsed());
            }
            Err(e) if e.kind == ErrorKind::Timeout => self.paces.up.lock().gave_up(),
            Err(_) => {}
        }
        result
    }

    /// Creation for backends that ignore conditions: looks first.
    async fn put_unless_seen(&self, path: &str, body: Bytes) -> Result<PutResult, StoreError> {
        match self.head(path).await {
            Ok(_) => Err(self.error("create", path, ErrorKind::Exists, "")),
            Err(e) if e.kind == ErrorKind::Absent => self.put_payload(path, body, PutMode::Overwrite).await,
            Err(e) => Err(e),
        }
    }

    async fn verify_size(&self, path: &str, len: u64) -> Result<(), StoreError> {
        match self.head(path).await {
            Ok(info) if info.size == len => Ok(()),
            Ok(info) => {
                let text = format!("{} bytes there after writing {len}", info.size);
                Err(self.error("put", path, ErrorKind::Corrupt, text))
            }
            Err(e) if e.kind == ErrorKind::Absent => {
                Err(self.error("put", path, ErrorKind::Corrupt, "not there after writing it"))
            }
            Err(e) => Err(e),
        }
    }
}

fn bump(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

#[cfg(test)]
mod tests;
