//! Counts the writes that the kernel handed over from its page cache and that are not answered yet.
//!
//! A sync of the filesystem does not wait for these answers in newer kernels, so the daemon does.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use parking_lot::{Condvar, Mutex};

/// Rounds in which a sync waits. Each clears what the kernel had in flight: a few hundred writes.
const ROUNDS: usize = 40;
/// The kernel sends its next writes when some are answered: looked for so often, after this pause.
const LOOKS: usize = 4;
const PAUSE: Duration = Duration::from_millis(5);

/// The writes in progress.
#[derive(Default)]
pub(super) struct Handed {
    state: Mutex<State>,
    ended: Condvar,
}

#[derive(Default)]
struct State {
    next: u64,
    running: BTreeSet<u64>,
}

/// One write; it has ended when this is dropped.
pub(super) struct Ticket(Arc<Handed>, u64);

impl Handed {
    /// A write begins.
    pub(super) fn begin(self: &Arc<Self>) -> Ticket {
        let mut state = self.state.lock();
        let number = state.next;
        state.next += 1;
        state.running.insert(number);
        Ticket(Arc::clone(self), number)
    }

    /// Waits until the writes that are in progress have ended. False when there were none.
    fn wait(&self) -> bool {
        let mut state = self.state.lock();
        let next = state.next;
        let mut waited = false;
        while state.running.first().is_some_and(|oldest| *oldest < next) {
            waited = true;
            self.ended.wait(&mut state);
        }
        waited
    }

    /// Waits until nothing is in progress that the kernel had in hand before the call. Later writes do not count,
    /// as far as they can be told apart. Each write ends by itself: it waits for space and replicas only so long.
    pub(super) fn settle(&self) {
        let mut quiet = 0;
        for _ in 0..ROUNDS {
            quiet = if self.wait() { 0 } else { quiet + 1 };
            if quiet == LOOKS {
                return;
            }
            thread::sleep(PAUSE);
        }
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.0.state.lock().running.remove(&self.1);
        self.0.ended.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[test]
    fn a_sync_waits_for_writes_that_began_before_it() {
        let handed = Arc::new(Handed::default());
        assert!(!handed.wait());
        handed.settle();
        let (first, second) = (handed.begin(), handed.begin());
        let (tell, told) = mpsc::channel();
        let waiting = Arc::clone(&handed);
        let thread = thread::spawn(move || tell.send(waiting.wait()).unwrap());
        drop(second);
        assert!(told.recv_timeout(Duration::from_millis(50)).is_err(), "the first is in progress");
        drop(first);
        assert!(told.recv_timeout(Duration::from_secs(60)).unwrap());
        thread.join().unwrap();
        // Another that begins while it waits does not hold it up.
        let first = handed.begin();
        let waiting = Arc::clone(&handed);
        let thread = thread::spawn(move || waiting.wait());
        thread::sleep(Duration::from_millis(20));
        let _later = handed.begin();
        drop(first);
        thread.join().unwrap();
    }
}
