//! Looking after replicas: a worker for each, for as long as it is on the list.
//!
//! Owns which workers there are, and hands them commands. Writes nothing itself.

mod listen;
mod worker;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::runtime::Handle;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use self::worker::{Tasks, Worker};
use super::catalog::Catalog;
use super::memory::Intervals;
use super::types::{ScrubRequest, ScrubStatus};
use crate::ids::ReplicaName;
use crate::replica::{Fence, Identity, Outbox, Roster};

/// How often and how fast.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Settings {
    /// Between two deep passes; `None` for never.
    pub deep_every: Option<Duration>,
    /// Between two passes of any kind; `None` for never.
    pub check_every: Option<Duration>,
    /// Least time between two passes that something met elsewhere calls for.
    pub attention: Duration,
    /// Wait after a failure before it is tried again.
    pub retry: Duration,
    /// Bytes per second read and written by passes and repairs, per replica; `None` for as fast as it goes.
    pub rate: Option<u64>,
}

impl Settings {
    fn intervals(&self) -> Intervals {
        Intervals {
            deep: self.deep_every.map(|d| d.as_secs_f64()),
            shallow: self.check_every.map(|d| d.as_secs_f64()),
            attention: self.attention.as_secs_f64(),
        }
    }
}

/// What the reconciler shares with the rest of the daemon.
pub struct Shared {
    /// How often and how fast.
    pub settings: Settings,
    /// The replicas to look after.
    pub roster: Arc<Roster>,
    /// What must stand on each.
    pub identity: Arc<Identity>,
    /// Raised when another writer is seen: then nothing more is written.
    pub fence: Arc<Fence>,
    /// What is sealed.
    pub catalog: Arc<dyn Catalog>,
    /// What is staged.
    pub outbox: Arc<dyn Outbox>,
    /// Where the tasks run.
    pub handle: Handle,
}

/// Looks after all replicas of a volume.
pub struct Reconciler {
    shared: Arc<Shared>,
    workers: Mutex<BTreeMap<ReplicaName, (Arc<Worker>, Tasks)>>,
    ended: AtomicBool,
}

impl Reconciler {
    /// Begins to look after every replica on the list, and everyone that joins it, until `closing`.
    pub fn start(shared: Shared, mut closing: watch::Receiver<bool>) -> Arc<Self> {
        let shared = Arc::new(shared);
        let me = Arc::new(Self {
            shared: Arc::clone(&shared),
            workers: Mutex::default(),
            ended: AtomicBool::new(false),
        });
        me.follow();
        let follower = Arc::clone(&me);
        shared.handle.clone().spawn(async move {
            let mut list = shared.roster.watch();
            loop {
                tokio::select! {
                    _ = closing.wait_for(|c| *c) => break,
                    changed = list.changed() => {
                        if changed.is_err() {
                            break;
                        }
                        follower.follow();
                    }
                }
            }
            follower.end().await;
        });
        me
    }

    /// Ends all passes and repairs, for good; when it returns nothing more is written. What is under way goes on at the next start.
    pub async fn end(&self) {
        self.ended.store(true, Ordering::Relaxed);
        let workers = std::mem::take(&mut *self.workers.lock());
        for (worker, tasks) in workers.into_values() {
            for task in tasks {
                task.abort();
                let _ = task.await;
            }
            worker.save().await;
        }
    }

    /// Begins with those that are new on the list, and leaves those that are gone.
    fn follow(&self) {
        let all = self.shared.roster.all();
        let mut workers = self.workers.lock();
        if self.ended.load(Ordering::Relaxed) {
            return;
        }
        workers.retain(|_, (worker, tasks)| {
            // One that was detached and attached again in between is another one.
            let stays = all.iter().any(|r| Arc::ptr_eq(r, worker.replica()));
            if !stays {
                tasks.iter().for_each(JoinHandle::abort);
            }
            stays
        });
        for replica in all.iter() {
            if workers.contains_key(replica.name()) {
                continue;
            }
            let worker = Worker::new(&self.shared, replica);
            let tasks = worker.start();
            workers.insert(replica.name().clone(), (worker, tasks));
        }
    }

    fn chosen(&self, replica: Option<&ReplicaName>) -> Result<Vec<Arc<Worker>>, String> {
        let workers = self.workers.lock();
        match replica {
            None => Ok(workers.values().map(|(w, _)| Arc::clone(w)).collect()),
            Some(name) => match workers.get(name) {
                Some((worker, _)) => Ok(vec![Arc::clone(worker)]),
                None => {
                    let names: Vec<_> = workers.keys().map(ReplicaName::as_str).collect();
                    Err(format!("no replica is called {name}; there are {}", names.join(", ")))
                }
            },
        }
    }

    /// Begins a pass, or joins one of the same kind that was asked for before. A pause ends by it. The error says that there is no such
    /// replica.
    pub fn begin(&self, request: &ScrubRequest) -> Result<(), String> {
        for worker in self.chosen(request.replica.as_ref())? {
            worker.begin(request);
        }
        Ok(())
    }

    /// Pauses or resumes, also for later mounts.
    pub fn pause(&self, replica: Option<&ReplicaName>, paused: bool) -> Result<(), String> {
        for worker in self.chosen(replica)? {
            worker.pause(paused);
        }
        Ok(())
    }

    /// Gives up the pass under way; the next comes when it is due.
    pub fn stop(&self, replica: Option<&ReplicaName>) -> Result<(), String> {
        for worker in self.chosen(replica)? {
            worker.stop();
        }
        Ok(())
    }

    /// What is done about each replica, in the order of the list.
    #[must_use]
    pub fn status(&self) -> Vec<ScrubStatus> {
        let all = self.shared.roster.all();
        let workers = self.workers.lock();
        all.iter().filter_map(|r| workers.get(r.name())).map(|(worker, _)| worker.status()).collect()
    }

    /// Saves what is remembered, as at the end of a command.
    pub async fn save(&self) {
        let workers: Vec<_> = self.workers.lock().values().map(|(w, _)| Arc::clone(w)).collect();
        for worker in workers {
            worker.save().await;
        }
    }
}
