//! How fast a place is without mirrorfs: bare requests of object_store, timed.
//!
//! Owns objects below `selftest/` of its own, which it deletes again. What it measures is what everything else is compared with, so
//! it asks no limit, verifies nothing and counts nothing; and what we do ourselves for folders, the library does here.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::StreamExt;
use object_store::local::LocalFileSystem;
use object_store::{GetOptions, GetRange, ObjectStore, PutMode, PutOptions, PutPayload};
use tokio::task::{JoinError, JoinSet};

use super::Store;
use crate::replica::error::{ErrorKind, StoreError, classify, one_line};

/// What [`Store::measure`] does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
pub struct RawWork {
    /// Objects that are written and read.
    pub objects: usize,
    /// Bytes of each.
    pub object_bytes: usize,
    /// Written at a time.
    pub puts: usize,
    /// Bytes of each range that is read.
    pub range_bytes: usize,
    /// Read at a time.
    pub gets: usize,
}

/// What came of it.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
pub struct RawSpeed {
    /// Seconds until all objects were written.
    pub put_seconds: f64,
    /// Seconds until all their bytes were read, in ranges.
    pub get_seconds: f64,
    /// Median seconds until one byte was read, one request after the other.
    pub answer_seconds: f64,
    /// Bytes written, and read.
    pub bytes: u64,
}

/// Single bytes that are asked for.
const ANSWERS: usize = 21;

impl Store {
    /// Writes and reads objects of random bytes with bare requests, several at a time, and takes the time. `unique` keeps concurrent
    /// runs apart. A folder must be there already. What was written is deleted, also when something failed.
    pub async fn measure(&self, work: RawWork, unique: u128) -> Result<RawSpeed, StoreError> {
        let paths: Vec<String> =
            (0..work.objects).map(|n| format!("selftest/{unique:032x}/{n:06}")).collect();
        let speed = self.time_all(&work, &paths, unique).await;
        let deleted = futures::stream::iter(&paths).map(|path| self.delete(path)).buffer_unordered(8);
        let deleted: Vec<_> = deleted.collect().await;
        let speed = speed?;
        deleted.into_iter().collect::<Result<Vec<()>, _>>()?;
        Ok(speed)
    }

    async fn time_all(&self, work: &RawWork, paths: &[String], unique: u128) -> Result<RawSpeed, StoreError> {
        let bodies = bodies(work.object_bytes, work.puts, unique);
        let backend = match &self.folder {
            Some(folder) => {
                let store = LocalFileSystem::new_with_prefix(folder).map_err(|e| self.told("put", "", &e))?;
                Arc::new(store.with_fsync(true)) as Arc<dyn ObjectStore>
            }
            None => Arc::clone(&self.backend),
        };
        let started = Instant::now();
        let puts = paths.iter().enumerate().map(|(n, path)| {
            let body = bodies.get(n % bodies.len().max(1)).cloned().unwrap_or_default();
            let (store, path) = (self.clone(), path.clone());
            let backend = Arc::clone(&backend);
            async move { store.raw_put(&backend, &path, body).await }
        });
        all(puts, work.puts).await?;
        let put_seconds = started.elapsed().as_secs_f64();

        let (len, step) = (work.object_bytes as u64, work.range_bytes.max(1) as u64);
        let ranges = paths.iter().flat_map(|path| {
            (0..len.div_ceil(step)).map(move |n| (path, n * step..((n + 1) * step).min(len)))
        });
        let started = Instant::now();
        let gets = ranges.map(|(path, range)| {
            let (store, path) = (self.clone(), path.clone());
            async move { store.raw_get(&path, range).await }
        });
        all(gets, work.gets).await?;
        let get_seconds = started.elapsed().as_secs_f64();

        let mut answers = Vec::with_capacity(ANSWERS);
        if let Some(path) = paths.first() {
            for _ in 0..ANSWERS {
                let started = Instant::now();
                self.raw_get(path, 0..1).await?;
                answers.push(started.elapsed());
            }
        }
        answers.sort_unstable();
        let answer = answers.get(ANSWERS / 2).copied().unwrap_or(Duration::ZERO);
        let bytes = work.objects as u64 * len;
        Ok(RawSpeed { put_seconds, get_seconds, answer_seconds: answer.as_secs_f64(), bytes })
    }

    async fn raw_put(&self, backend: &dyn ObjectStore, path: &str, body: Bytes) -> Result<(), StoreError> {
        let at = self.at("put", path)?;
        let mode = if self.is_conditional() { PutMode::Create } else { PutMode::Overwrite };
        let put = backend.put_opts(&at, PutPayload::from_bytes(body), PutOptions::from(mode)).await;
        put.map(|_| ()).map_err(|e| self.told("put", path, &e))
    }

    async fn raw_get(&self, path: &str, range: std::ops::Range<u64>) -> Result<(), StoreError> {
        let at = self.at("get", path)?;
        let wanted = range.end - range.start;
        let options = GetOptions { range: Some(GetRange::Bounded(range)), ..GetOptions::new() };
        let told = |e| self.told("get", path, &e);
        let got = self.backend.get_opts(&at, options).await.map_err(told)?.bytes().await.map_err(told)?;
        match got.len() as u64 == wanted {
            true => Ok(()),
            false => Err(self.error(
                "get",
                path,
                ErrorKind::Corrupt,
                format!("{} bytes instead of {wanted}", got.len()),
            )),
        }
    }

    fn told(&self, op: &'static str, path: &str, e: &object_store::Error) -> StoreError {
        self.error(op, path, classify(e), one_line(e))
    }
}

/// Runs all, `most` at a time, each as a task of its own, so that every core can be used; the first failure ends it.
async fn all(
    work: impl Iterator<Item = impl Future<Output = Result<(), StoreError>> + Send + 'static>,
    most: usize,
) -> Result<(), StoreError> {
    let mut running = JoinSet::new();
    for one in work {
        if running.len() >= most.max(1) {
            finished(running.join_next().await)?;
        }
        running.spawn(one);
    }
    while !running.is_empty() {
        finished(running.join_next().await)?;
    }
    Ok(())
}

fn finished(done: Option<Result<Result<(), StoreError>, JoinError>>) -> Result<(), StoreError> {
    match done {
        Some(Ok(done)) => done,
        // Nobody aborts one.
        Some(Err(e)) => std::panic::resume_unwind(e.into_panic()),
        None => Ok(()),
    }
}

/// As many bodies as are under way at a time. They do not compress.
fn bodies(len: usize, count: usize, unique: u128) -> Vec<Bytes> {
    let body = |n: usize| {
        let mut bytes = vec![0; len];
        let mut hasher = blake3::Hasher::new();
        hasher.update(&unique.to_le_bytes()).update(&n.to_le_bytes());
        hasher.finalize_xof().fill(&mut bytes);
        Bytes::from(bytes)
    };
    (0..count.max(1)).map(body).collect()
}
