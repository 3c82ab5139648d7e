//! Threads for requests that must wait: for a replica, for space, for a sync.
//!
//! Owns a bounded number of threads, started when there is work and ended when there has been none for a while, and
//! the queue behind them. Knows nothing of what the work is.

use std::collections::VecDeque;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use super::guard::{guarded, guarded_since};

type Job = Box<dyn FnOnce() + Send>;

/// How long a thread waits for more work before it ends.
const LINGER: Duration = Duration::from_secs(20);

/// A bounded set of threads for work that blocks.
pub(super) struct Pool {
    name: &'static str,
    limit: usize,
    shared: Arc<Shared>,
}

struct Shared {
    state: Mutex<State>,
    /// There is work, or the pool is closing.
    work: Condvar,
    /// The last thread has ended.
    ended: Condvar,
}

#[derive(Default)]
struct State {
    queue: VecDeque<(Instant, Job)>,
    threads: usize,
    idle: usize,
    closing: bool,
}

impl Pool {
    /// A pool of at most `limit` threads; none is started yet.
    pub(super) fn new(name: &'static str, limit: usize) -> Self {
        let shared = Shared { state: Mutex::default(), work: Condvar::new(), ended: Condvar::new() };
        Self { name, limit: limit.max(1), shared: Arc::new(shared) }
    }

    /// Runs `job` on one of the threads, behind the jobs that wait already. Runs it at once, on the calling thread,
    /// when there is no thread at all to be had, or the pool is closed.
    pub(super) fn run(&self, job: impl FnOnce() + Send + 'static) {
        if let Err(job) = self.queue(Box::new(job)) {
            guarded(self.name, job);
        }
    }

    /// As [`Pool::run`], but never on the calling thread: returns false when there is no thread.
    pub(super) fn try_run(&self, job: impl FnOnce() + Send + 'static) -> bool {
        self.queue(Box::new(job)).is_ok()
    }

    fn queue(&self, job: Job) -> Result<(), Job> {
        let mut state = self.shared.state.lock();
        let start = state.idle <= state.queue.len() && state.threads < self.limit;
        if start && !state.closing {
            let (shared, name) = (Arc::clone(&self.shared), self.name);
            match thread::Builder::new().name(self.name.to_owned()).spawn(move || shared.serve(name)) {
                Ok(_) => state.threads += 1,
                Err(e) => log::warn!("cannot start a thread {}: {e}; {} are there", self.name, state.threads),
            }
        }
        if state.threads == 0 || state.closing {
            return Err(job);
        }
        state.queue.push_back((Instant::now(), job));
        drop(state);
        self.shared.work.notify_one();
        Ok(())
    }

    /// Lets the threads finish what waits, and returns when they have ended.
    pub(super) fn close(&self) {
        let mut state = self.shared.state.lock();
        state.closing = true;
        self.shared.work.notify_all();
        while state.threads > 0 {
            self.shared.ended.wait(&mut state);
        }
    }
}

impl Shared {
    fn serve(&self, name: &'static str) {
        let mut state = self.state.lock();
        loop {
            if let Some((queued, job)) = state.queue.pop_front() {
                drop(state);
                guarded_since(name, Some(queued), job);
                state = self.state.lock();
                continue;
            }
            if state.closing {
                break;
            }
            state.idle += 1;
            let late = self.work.wait_for(&mut state, LINGER).timed_out();
            state.idle -= 1;
            if late && state.queue.is_empty() {
                break;
            }
        }
        state.threads -= 1;
        if state.threads == 0 {
            self.ended.notify_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::sync::mpsc;

    use super::*;

    #[test]
    fn runs_everything_with_no_more_threads_than_allowed() {
        let pool = Pool::new("test-pool", 3);
        let now = Arc::new(AtomicUsize::new(0));
        let most = Arc::new(AtomicUsize::new(0));
        let done = Arc::new(AtomicUsize::new(0));
        for _ in 0..50 {
            let (now, most, done) = (now.clone(), most.clone(), done.clone());
            pool.run(move || {
                most.fetch_max(now.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
                thread::sleep(Duration::from_millis(2));
                now.fetch_sub(1, Ordering::SeqCst);
                done.fetch_add(1, Ordering::SeqCst);
            });
        }
        pool.close();
        assert_eq!(done.load(Ordering::SeqCst), 50);
        assert_eq!(most.load(Ordering::SeqCst), 3);
    }

    #[test]
    fn a_blocked_job_does_not_hold_up_the_next() {
        let pool = Pool::new("test-pool", 2);
        let (release, blocked) = mpsc::channel::<()>();
        let (tell, told) = mpsc::channel();
        pool.run(move || blocked.recv().unwrap());
        pool.run(move || tell.send(()).unwrap());
        told.recv_timeout(Duration::from_secs(10)).unwrap();
        release.send(()).unwrap();
        pool.close();
    }

    #[test]
    fn survives_a_panic_and_works_after_close() {
        let pool = Pool::new("test-pool", 1);
        pool.run(|| panic!("on purpose"));
        let (tell, told) = mpsc::channel();
        let again = tell.clone();
        pool.run(move || tell.send(1).unwrap());
        assert_eq!(told.recv_timeout(Duration::from_secs(10)).unwrap(), 1);
        pool.close();
        assert!(!pool.try_run(|| panic!("must not run")));
        pool.run(move || again.send(2).unwrap());
        assert_eq!(told.try_recv().unwrap(), 2);
    }
}
