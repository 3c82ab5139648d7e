//! A writer's tenure: who we are to the replicas, how it ends in good order, and what is kept when another writer ends it.
//!
//! Owns the fence of a mount and the note of it in the state folder. Knows nothing of what is written.

use std::path::Path;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use tokio::runtime::Handle;

use super::state::StateDir;
use super::unix_now;
use crate::ids::SegmentNo;
use crate::replica::{self, Fence, FenceNote, Fenced, Identity, Replica, Roster};
use crate::vfs::Vfs;

/// How long the end may take to mark the tenure as ended on all replicas together.
const MARK_END: Duration = Duration::from_secs(4);

/// The tenure of a writing mount.
pub(super) struct Tenure {
    /// Who we are to the replicas.
    pub identity: Arc<Identity>,
    /// Raised by whoever sees another writer.
    pub fence: Arc<Fence>,
    noted: Arc<OnceLock<FenceNote>>,
}

impl Tenure {
    /// From now on another writer who is seen makes `vfs` read-only, and is noted in the state folder `state`.
    pub fn begin(identity: Arc<Identity>, vfs: &Arc<Vfs>, state: &Path, handle: &Handle) -> Self {
        let noted = Arc::new(OnceLock::new());
        let (vfs, state, handle, note) =
            (Arc::downgrade(vfs), state.to_owned(), handle.clone(), Arc::clone(&noted));
        let fence = Fence::new(move |fenced| {
            // The filesystem knows the fence: neither may keep the other.
            if let Some(vfs) = vfs.upgrade() {
                vfs.set_read_only(&fenced.to_string());
            }
            let fenced = note.get_or_init(|| FenceNote::new(fenced, unix_now() as u64)).clone();
            let state = state.clone();
            // If this comes too late, the next mount sees it on the replica again.
            handle.spawn_blocking(move || {
                if let Err(e) = StateDir::note_fence(&state, &fenced) {
                    log::error!("that another machine took over is not noted: {e}");
                }
            });
        });
        Self { identity, fence, noted }
    }

    /// The other writer, when one was seen.
    pub fn note(&self) -> Option<FenceNote> {
        self.noted.get().cloned()
    }

    /// Returns when as many replicas as are `needed` hold everything up to `segment` and, looked at behind that, show no other
    /// writer: see [`replica::confirm`].
    pub async fn confirm(
        &self,
        roster: &Roster,
        segment: SegmentNo,
        needed: impl Fn(usize) -> usize,
    ) -> Result<(), Fenced> {
        replica::confirm(roster, &self.identity, &self.fence, segment, needed).await
    }

    /// Marks the tenure as ended on those replicas that hold everything up to `newest`, so that the next writer, wherever
    /// it is, needs no permission. To be called when nothing more will be sealed, while the shippers still run.
    pub async fn end(&self, replicas: &[Arc<Replica>], newest: SegmentNo) {
        let released = replica::release(replicas, &self.identity, &self.fence, newest, unix_now() as u64);
        match tokio::time::timeout(MARK_END, released).await {
            Ok(names) => log::debug!("the end of epoch {} is marked on {names:?}", self.identity.epoch()),
            Err(_) => {
                log::warn!("some replicas do not answer: the end of this tenure may not be marked there")
            }
        }
    }
}
