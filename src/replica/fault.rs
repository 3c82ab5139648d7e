//! A backend that fails on command, for tests.
//!
//! Owns a list of rules that a test changes while the store is in use: fail before or after taking effect, answer short or wrong
//! bytes, be late or slow, hang, be cut off. Random choices follow a seed. What happens to objects at rest (lost, damaged, rolled
//! back) is [`Memory`]'s business. Nothing in the program uses either; they are reached through their constructors only.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use bytes::{Bytes, BytesMut};
use futures::stream::BoxStream;
use futures::{FutureExt, StreamExt};
use object_store::path::Path;
use object_store::{
    CopyOptions, GetOptions, GetResult, GetResultPayload, ListResult, MultipartUpload, ObjectMeta,
    ObjectStore, PutMode, PutMultipartOptions, PutOptions, PutPayload, PutResult, RenameOptions, Result,
    UploadPart,
};
use parking_lot::Mutex;

use super::error::{Classed, ErrorKind};

mod memory;
#[cfg(test)]
mod tests;

pub use memory::{Memory, Objects};

/// The operations that rules tell apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Op {
    /// A whole object or a range is read.
    Get,
    /// Existence and size are asked for.
    Head,
    /// An object is written unconditionally, or a part or the end of a multipart upload.
    Put,
    /// An object is written if there is none.
    Create,
    /// A listing.
    List,
    /// A deletion.
    Delete,
    /// A copy or rename on the server; mirrorfs uses none.
    Copy,
}

/// What happens to an operation.
#[derive(Clone, Debug, PartialEq)]
pub enum Fault {
    /// It fails and changes nothing.
    Before(ErrorKind),
    /// It takes effect, and then fails: a lost answer.
    After(ErrorKind),
    /// It takes effect, and no answer ever comes.
    HangAfter,
    /// Nothing happens and no answer ever comes.
    Hang,
    /// It is late by this much.
    Delay(Duration),
    /// Bodies pass one after another, at so many bytes per second.
    Rate(u64),
    /// The body of a read ends half way.
    Short,
    /// One bit of the body of a read is wrong.
    Wrong,
}

/// When a fault strikes.
#[derive(Clone, Debug)]
pub struct Rule {
    /// Operations it strikes; empty for all.
    pub ops: Vec<Op>,
    /// Only objects whose path contains this.
    pub containing: String,
    /// What happens.
    pub fault: Fault,
    /// How many more times it strikes; `None` for ever.
    pub times: Option<u32>,
    /// Chance of each strike, 0 to 1.
    pub chance: f64,
}

impl Rule {
    /// A rule that always strikes these operations.
    #[must_use]
    pub fn always(fault: Fault, ops: &[Op]) -> Self {
        Self { ops: ops.to_vec(), containing: String::new(), fault, times: None, chance: 1.0 }
    }

    /// The same for objects whose path contains `part`.
    #[must_use]
    pub fn on(mut self, part: &str) -> Self {
        self.containing = part.to_owned();
        self
    }

    /// The same, but only `n` times.
    #[must_use]
    pub fn times(mut self, n: u32) -> Self {
        self.times = Some(n);
        self
    }

    /// The same, but only with this chance each time.
    #[must_use]
    pub fn chance(mut self, chance: f64) -> Self {
        self.chance = chance;
        self
    }
}

#[derive(Debug)]
struct Script {
    rules: Vec<Rule>,
    partitioned: bool,
    random: u64,
    /// Until when the link carries what was given to it under [`Fault::Rate`].
    busy_until: Option<Instant>,
    calls: BTreeMap<Op, u64>,
    struck: u64,
}

/// The handle by which a test commands the faults of one store.
#[derive(Clone, Debug)]
pub struct Faults(Arc<Mutex<Script>>);

impl Faults {
    /// No faults yet; random choices follow `seed`.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        let script = Script {
            rules: Vec::new(),
            partitioned: false,
            random: seed,
            busy_until: None,
            calls: BTreeMap::new(),
            struck: 0,
        };
        Self(Arc::new(Mutex::new(script)))
    }

    /// Lets random choices follow another seed from now on.
    pub fn reseed(&self, seed: u64) {
        self.0.lock().random = seed;
    }

    /// Wraps a backend so that it obeys this handle; fits [`super::Store::wrapped`].
    #[must_use]
    pub fn wrap(&self, inner: Arc<dyn ObjectStore>) -> Arc<dyn ObjectStore> {
        Arc::new(FaultStore { inner, faults: self.clone() })
    }

    /// Adds a rule. The first rule that fits an operation decides.
    pub fn add(&self, rule: Rule) {
        self.0.lock().rules.push(rule);
    }

    /// Removes all rules and heals a partition. What hangs stays hanging.
    pub fn clear(&self) {
        let mut script = self.0.lock();
        script.rules.clear();
        script.partitioned = false;
        script.busy_until = None;
    }

    /// Cuts the replica off (every operation fails at once, as with a refused connection), or joins it again.
    pub fn partition(&self, cut: bool) {
        self.0.lock().partitioned = cut;
    }

    /// How often an operation was asked for.
    #[must_use]
    pub fn calls(&self, op: Op) -> u64 {
        self.0.lock().calls.get(&op).copied().unwrap_or(0)
    }

    /// How often a fault struck.
    #[must_use]
    pub fn struck(&self) -> u64 {
        self.0.lock().struck
    }

    fn next(&self, op: Op, path: &str) -> Option<Fault> {
        let mut script = self.0.lock();
        *script.calls.entry(op).or_default() += 1;
        if script.partitioned {
            script.struck += 1;
            return Some(Fault::Before(ErrorKind::Transient));
        }
        for i in 0..script.rules.len() {
            let Some(rule) = script.rules.get(i) else { break };
            let fits = (rule.ops.is_empty() || rule.ops.contains(&op))
                && path.contains(&rule.containing)
                && rule.times != Some(0);
            let chance = rule.chance;
            if !fits || (chance < 1.0 && unit(&mut script.random) >= chance) {
                continue;
            }
            script.struck += 1;
            let Some(rule) = script.rules.get_mut(i) else { break };
            if let Some(times) = &mut rule.times {
                *times -= 1;
            }
            return Some(rule.fault.clone());
        }
        None
    }

    fn random(&self) -> u64 {
        split_mix(&mut self.0.lock().random)
    }

    /// Waits until a link of `rate` bytes per second has carried `len` bytes behind all that was given to it before.
    async fn carry(&self, len: u64, rate: u64) {
        let until = {
            let mut script = self.0.lock();
            let now = Instant::now();
            let from = script.busy_until.unwrap_or(now).max(now);
            let until = from + Duration::from_secs_f64(len as f64 / rate.max(1) as f64);
            script.busy_until = Some(until);
            until
        };
        tokio::time::sleep_until(until.into()).await;
    }

    /// Runs an operation that sends `len` bytes the way the rules say.
    async fn run<T>(
        &self,
        op: Op,
        path: &Path,
        len: usize,
        inner: impl Future<Output = Result<T>>,
    ) -> Result<T> {
        match self.next(op, path.as_ref()) {
            None | Some(Fault::Short | Fault::Wrong) => inner.await,
            Some(Fault::Rate(rate)) => {
                self.carry(len as u64, rate).await;
                inner.await
            }
            Some(Fault::Delay(time)) => {
                tokio::time::sleep(time).await;
                inner.await
            }
            Some(Fault::Before(kind)) => Err(failure(kind, op, path)),
            Some(Fault::After(kind)) => {
                inner.await?;
                Err(failure(kind, op, path))
            }
            Some(Fault::HangAfter) => {
                inner.await?;
                std::future::pending().await
            }
            Some(Fault::Hang) => std::future::pending().await,
        }
    }
}

fn failure(kind: ErrorKind, op: Op, path: &Path) -> object_store::Error {
    Classed { kind, detail: format!("injected failure of {op:?}") }.into_object_store(path)
}

/// SplitMix64, a small public-domain generator.
fn split_mix(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

fn unit(state: &mut u64) -> f64 {
    (split_mix(state) >> 11) as f64 / (1u64 << 53) as f64
}

#[derive(Debug)]
struct FaultStore {
    inner: Arc<dyn ObjectStore>,
    faults: Faults,
}

impl fmt::Display for FaultStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} with faults", self.inner)
    }
}

impl FaultStore {
    /// Reads, and spoils the body if told to.
    async fn spoil(&self, fault: &Fault, at: &Path, options: GetOptions) -> Result<GetResult> {
        let result = self.inner.get_opts(at, options).await?;
        let (meta, range) = (result.meta.clone(), result.range.clone());
        let (attributes, extensions) = (result.attributes.clone(), result.extensions.clone());
        let mut body = BytesMut::from(&result.bytes().await?[..]);
        if *fault == Fault::Short {
            body.truncate(body.len() / 2);
        } else if !body.is_empty() {
            let bit = self.faults.random() % (body.len() as u64 * 8);
            body[(bit / 8) as usize] ^= 1 << (bit % 8);
        }
        let body = body.freeze();
        let payload = GetResultPayload::Stream(futures::stream::once(async { Ok(body) }).boxed());
        Ok(GetResult { payload, meta, range, attributes, extensions })
    }
}

#[async_trait]
#[deny(clippy::missing_trait_methods)]
impl ObjectStore for FaultStore {
    async fn put_opts(&self, at: &Path, payload: PutPayload, opts: PutOptions) -> Result<PutResult> {
        let op = if matches!(opts.mode, PutMode::Create) { Op::Create } else { Op::Put };
        let len = payload.content_length();
        self.faults.run(op, at, len, self.inner.put_opts(at, payload, opts)).await
    }

    async fn put_multipart_opts(
        &self,
        at: &Path,
        opts: PutMultipartOptions,
    ) -> Result<Box<dyn MultipartUpload>> {
        let inner = self.faults.run(Op::Put, at, 0, self.inner.put_multipart_opts(at, opts)).await?;
        Ok(Box::new(FaultUpload { inner, at: at.clone(), faults: self.faults.clone() }))
    }

    async fn get_opts(&self, at: &Path, options: GetOptions) -> Result<GetResult> {
        let op = if options.head { Op::Head } else { Op::Get };
        // Decided once: a rule with a count must not be asked twice.
        match self.faults.next(op, at.as_ref()) {
            Some(fault @ (Fault::Short | Fault::Wrong)) => self.spoil(&fault, at, options).await,
            Some(Fault::Delay(time)) => {
                tokio::time::sleep(time).await;
                self.inner.get_opts(at, options).await
            }
            Some(Fault::Rate(rate)) => {
                let result = self.inner.get_opts(at, options).await?;
                let len = result.range.end.saturating_sub(result.range.start);
                self.faults.carry(if op == Op::Get { len } else { 0 }, rate).await;
                Ok(result)
            }
            Some(Fault::Before(kind) | Fault::After(kind)) => Err(failure(kind, op, at)),
            Some(Fault::Hang | Fault::HangAfter) => std::future::pending().await,
            None => self.inner.get_opts(at, options).await,
        }
    }

    async fn get_ranges(&self, at: &Path, ranges: &[Range<u64>]) -> Result<Vec<Bytes>> {
        self.faults.run(Op::Get, at, 0, self.inner.get_ranges(at, ranges)).await
    }

    fn delete_stream(&self, paths: BoxStream<'static, Result<Path>>) -> BoxStream<'static, Result<Path>> {
        let (inner, faults) = (Arc::clone(&self.inner), self.faults.clone());
        paths
            .then(move |path| {
                let (inner, faults) = (Arc::clone(&inner), faults.clone());
                async move {
                    let path = path?;
                    let one = futures::stream::once(futures::future::ready(Ok(path.clone()))).boxed();
                    let delete = async {
                        let mut done = inner.delete_stream(one);
                        done.next().await.unwrap_or_else(|| Ok(path.clone()))
                    };
                    faults.run(Op::Delete, &path, 0, delete).await
                }
            })
            .boxed()
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        let (faults, at) = (self.faults.clone(), prefix.cloned().unwrap_or_default());
        let inner = self.inner.list(prefix);
        let listed = async move { faults.run(Op::List, &at, 0, async { Ok(inner) }).await };
        flatten(listed)
    }

    fn list_with_offset(
        &self,
        prefix: Option<&Path>,
        offset: &Path,
    ) -> BoxStream<'static, Result<ObjectMeta>> {
        let (faults, at) = (self.faults.clone(), prefix.cloned().unwrap_or_default());
        let inner = self.inner.list_with_offset(prefix, offset);
        let listed = async move { faults.run(Op::List, &at, 0, async { Ok(inner) }).await };
        flatten(listed)
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        let at = prefix.cloned().unwrap_or_default();
        self.faults.run(Op::List, &at, 0, self.inner.list_with_delimiter(prefix)).await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        self.faults.run(Op::Copy, to, 0, self.inner.copy_opts(from, to, options)).await
    }

    async fn rename_opts(&self, from: &Path, to: &Path, options: RenameOptions) -> Result<()> {
        self.faults.run(Op::Copy, to, 0, self.inner.rename_opts(from, to, options)).await
    }
}

/// A stream that comes out of a future, or the future's error as its only item.
fn flatten(
    stream: impl Future<Output = Result<BoxStream<'static, Result<ObjectMeta>>>> + Send + 'static,
) -> BoxStream<'static, Result<ObjectMeta>> {
    let stream = stream.map(|s| s.unwrap_or_else(|e| futures::stream::once(async { Err(e) }).boxed()));
    stream.flatten_stream().boxed()
}

#[derive(Debug)]
struct FaultUpload {
    inner: Box<dyn MultipartUpload>,
    at: Path,
    faults: Faults,
}

#[async_trait]
impl MultipartUpload for FaultUpload {
    fn put_part(&mut self, data: PutPayload) -> UploadPart {
        let len = data.content_length();
        let (part, faults, at) = (self.inner.put_part(data), self.faults.clone(), self.at.clone());
        async move { faults.run(Op::Put, &at, len, part).await }.boxed()
    }

    async fn complete(&mut self) -> Result<PutResult> {
        self.faults.run(Op::Put, &self.at, 0, self.inner.complete()).await
    }

    async fn abort(&mut self) -> Result<()> {
        self.inner.abort().await
    }
}
