//! Taking down what a pass meets.
//!
//! Owns that only the pass under way is heard.

use std::sync::Arc;
use std::time::Instant;

use super::super::memory::Current;
use super::super::pass::Listener;
use super::super::plan::Plan;
use super::super::repair::Outcome;
use super::super::types::ScrubState;
use super::worker::{SAVE_EVERY, Worker};
use crate::format::names::ObjectName;

/// Listens to one pass. What a pass still says when another one was asked for meanwhile is not heard: it would move the new one's position.
pub(super) struct Watch {
    pub worker: Arc<Worker>,
    /// Number of the pass that was asked for last when this one was taken up.
    pub asked: u64,
}

impl Watch {
    /// Does something to the pass under way, if that is still this one.
    fn with_current(&self, what: impl FnOnce(&mut Current)) {
        let (mut memory, live) = (self.worker.memory.lock(), self.worker.live.lock());
        if let Some(current) = memory.current.as_mut().filter(|_| live.asked == self.asked) {
            what(current);
        }
    }
}

impl Listener for Watch {
    fn sized(&self, objects: u64, bytes: u64, plan: &Plan) {
        self.with_current(|current| {
            let c = &mut current.counters;
            (c.total, c.total_bytes) = (c.examined + objects, c.examined_bytes + bytes);
            (c.foreign, c.left_over) = (plan.foreign.len() as u64, plan.left_over.len() as u64);
            c.forged = plan.forged.len() as u64;
        });
        for (name, why) in &plan.forged {
            self.worker.note(name, &Outcome::Forged((*why).to_owned()));
        }
    }

    fn seen(&self, name: &ObjectName, len: u64, outcome: &Outcome, position: Option<&str>) {
        self.with_current(|current| {
            let c = &mut current.counters;
            c.examined += 1;
            c.examined_bytes += len;
            match outcome {
                Outcome::Intact => {}
                Outcome::Forged(_) => c.forged += 1,
                Outcome::Useless(_) => c.left_over += 1,
                Outcome::Repaired(_, bytes) => {
                    c.bad += 1;
                    c.repaired += 1;
                    c.repaired_bytes += bytes;
                }
                Outcome::Left(..) | Outcome::Other(_) => {
                    c.bad += 1;
                    c.left += 1;
                }
            }
            if let Some(position) = position {
                position.clone_into(&mut current.position);
            }
        });
        let worker = &self.worker;
        worker.note(name, outcome);
        let due = position.is_some() && worker.live.lock().saved.is_none_or(|at| at.elapsed() >= SAVE_EVERY);
        if due {
            worker.live.lock().saved = Some(Instant::now());
            let me = Arc::clone(worker);
            worker.shared.handle.spawn(async move { me.save().await });
        }
    }

    fn waits(&self, what: Option<String>, stuck: bool) {
        let mut live = self.worker.live.lock();
        live.state = if stuck { ScrubState::Waiting } else { ScrubState::Running };
        live.detail = what;
    }
}
