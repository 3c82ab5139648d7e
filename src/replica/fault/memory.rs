//! A backend in memory whose objects a test may lose, damage and put back as they once were.
//!
//! Owns the objects at rest. No fault of [`Faults`](super::Faults) applies here, and no deadline: what the handle is told has happened when the
//! call returns, behind the back of whoever uses the stores.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;
use futures::{FutureExt, TryStreamExt};
use object_store::memory::InMemory;
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt, PutPayload, Result};

use super::super::store::{Limits, Store};
use super::Faults;
use crate::ids::ReplicaName;

/// All objects of a replica by their path.
pub type Objects = BTreeMap<String, Bytes>;

/// Objects in memory. Clones share them.
#[derive(Clone, Debug, Default)]
pub struct Memory(Arc<InMemory>);

impl Memory {
    /// Nothing yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// A store over these objects that obeys `faults`.
    #[must_use]
    pub fn store(&self, name: ReplicaName, limits: Limits, faults: &Faults) -> Store {
        let url = format!("memory://{name}");
        Store::over(name, &url, Path::default(), faults.wrap(Arc::clone(&self.0) as _), limits)
    }

    /// A store over these objects without faults.
    #[must_use]
    pub fn plain(&self, name: ReplicaName) -> Store {
        self.store(name, Limits::default(), &Faults::new(0))
    }

    /// All objects as they are now.
    #[must_use]
    pub fn objects(&self) -> Objects {
        let listed = now(self.0.list(None).try_collect::<Vec<_>>()).unwrap_or_default();
        let body = |at: &Path| now(async { self.0.get(at).await?.bytes().await });
        listed.iter().filter_map(|m| Some((m.location.to_string(), body(&m.location).ok()?))).collect()
    }

    /// Makes the objects be these and no others: a roll back, or a wipe. What is written at the same moment may survive.
    pub fn set(&self, objects: &Objects) {
        let there = self.objects();
        for path in there.keys().filter(|p| !objects.contains_key(*p)) {
            self.lose(path);
        }
        for (path, body) in objects.iter().filter(|(p, b)| there.get(*p) != Some(b)) {
            self.put(path, body.clone());
        }
    }

    /// Deletes an object. Answers whether it was there.
    pub fn lose(&self, path: &str) -> bool {
        let at = Path::from(path);
        let was_there = now(self.0.head(&at)).is_ok();
        was_there && now(self.0.delete(&at)).is_ok()
    }

    /// Puts an object in place of whatever is there.
    pub fn put(&self, path: &str, body: Bytes) {
        // InMemory refuses no unconditional write.
        let _ = now(self.0.put(&Path::from(path), PutPayload::from_bytes(body)));
    }

    /// Flips a bit of an object (counted modulo its length). Answers whether there was one to flip.
    pub fn flip(&self, path: &str, bit: u64) -> bool {
        self.change(path, |body| {
            let bits = body.len() as u64 * 8;
            if bits > 0 {
                let bit = bit % bits;
                body[(bit / 8) as usize] ^= 1 << (bit % 8);
            }
            bits > 0
        })
    }

    /// Cuts an object off at `len` bytes. Answers whether it was longer.
    pub fn cut(&self, path: &str, len: usize) -> bool {
        self.change(path, |body| {
            let is_longer = body.len() > len;
            body.truncate(len);
            is_longer
        })
    }

    fn change(&self, path: &str, change: impl FnOnce(&mut Vec<u8>) -> bool) -> bool {
        let body = now(async { self.0.get(&Path::from(path)).await?.bytes().await });
        let Ok(body) = body else { return false };
        let mut body = body.to_vec();
        let is_changed = change(&mut body);
        if is_changed {
            self.put(path, body.into());
        }
        is_changed
    }
}

/// What a future of InMemory gives: it waits for nothing.
fn now<T>(future: impl Future<Output = Result<T>>) -> Result<T> {
    future.now_or_never().unwrap_or_else(|| {
        Err(object_store::Error::Generic { store: "memory", source: "it waits for something".into() })
    })
}
