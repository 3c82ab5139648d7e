//! Writing staged files while the next segment is put together.
//!
//! Owns the threads that do so, for one transaction group. A group of one segment needs none.

use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, SyncSender};
use std::thread::{self, Scope, ScopedJoinHandle};

use bytes::Bytes;
use parking_lot::Mutex;

use super::staging::{Staging, StagingError};
use crate::ids::{Epoch, SegmentNo};

/// Files written at a time besides the one that is put together.
const AT_A_TIME: usize = 2;

type Job = (SegmentNo, Bytes);

/// The files of one group on their way to the local disk.
pub(super) struct Writers<'scope, 'env> {
    scope: &'scope Scope<'scope, 'env>,
    staging: &'scope Staging,
    epoch: Epoch,
    queue: Option<SyncSender<Job>>,
    threads: Vec<ScopedJoinHandle<'scope, Result<(), StagingError>>>,
}

impl<'scope, 'env> Writers<'scope, 'env> {
    pub fn new(scope: &'scope Scope<'scope, 'env>, staging: &'scope Staging, epoch: Epoch) -> Self {
        Self { scope, staging, epoch, queue: None, threads: Vec::new() }
    }

    /// Writes a file, sooner or later: [`Writers::finish`] says whether it is there. The `last` one of a group that had no other is
    /// written at once.
    pub fn write(&mut self, number: SegmentNo, bytes: Bytes, last: bool) -> Result<(), StagingError> {
        if self.queue.is_none() && !last {
            self.start();
        }
        // Nobody takes from the queue any more when each has failed: `finish` says why.
        match &self.queue {
            Some(queue) => drop(queue.send((number, bytes))),
            None => self.staging.write(number, self.epoch, bytes)?,
        }
        Ok(())
    }

    fn start(&mut self) {
        // No more than one waits: what is not written yet is in memory.
        let (queue, jobs) = mpsc::sync_channel(1);
        let jobs = Arc::new(Mutex::new(jobs));
        for _ in 0..AT_A_TIME {
            let (jobs, staging, epoch) = (Arc::clone(&jobs), self.staging, self.epoch);
            let work = move || write_all(&jobs, staging, epoch);
            // With no thread at all, everything is written where it is put together.
            match thread::Builder::new().name("mirrorfs-stage".into()).spawn_scoped(self.scope, work) {
                Ok(thread) => self.threads.push(thread),
                Err(e) => log::debug!("no thread to write staged files: {e}"),
            }
        }
        self.queue = (!self.threads.is_empty()).then_some(queue);
    }

    /// Waits until all files are durable, or none is written any more.
    pub fn finish(&mut self) -> Result<(), StagingError> {
        self.queue = None;
        let mut result = Ok(());
        for thread in self.threads.drain(..) {
            match thread.join() {
                Ok(written) => result = result.and(written),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
        result
    }
}

/// Writes what comes, up to the first failure.
fn write_all(jobs: &Mutex<Receiver<Job>>, staging: &Staging, epoch: Epoch) -> Result<(), StagingError> {
    loop {
        let job = jobs.lock().recv();
        let Ok((number, bytes)) = job else { return Ok(()) };
        staging.write(number, epoch, bytes)?;
    }
}
