//! All replicas of a mounted volume together: who has what, and waiting for them.
//!
//! Owns the rule when staged segments may go. Each replica ships for itself.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::StreamExt;
use futures::stream::FuturesUnordered;

use crate::format::tables::cursor_key;
use crate::ids::{ReplicaName, SegmentNo};
use crate::journal::{Journal, JournalError};
use crate::replica::{CursorStore, Outbox, Replica, ReplicaState, ReplicaStatus};
use crate::txg::Staging;

/// Cursors in the local tables, by name and place: a name given to another place begins anew.
pub(super) struct Cursors {
    pub journal: Arc<Journal>,
    pub places: BTreeMap<ReplicaName, String>,
}

/// Key of a replica's cursor.
pub(super) fn cursor_of(name: &ReplicaName, url: &str) -> Bytes {
    cursor_key(&format!("{name} {url}"))
}

/// Key of the filesystem that a folder replica lies on. It has the form of a cursor's key, with a name that no replica has.
fn filesystem_of(name: &ReplicaName, url: &str) -> Bytes {
    cursor_key(&format!("filesystem of {name} {url}"))
}

impl Cursors {
    fn url(&self, replica: &ReplicaName) -> &str {
        self.places.get(replica).map_or("", String::as_str)
    }

    fn key(&self, replica: &ReplicaName) -> Bytes {
        cursor_of(replica, self.url(replica))
    }
}

impl CursorStore for Cursors {
    fn load(&self, replica: &ReplicaName) -> Result<SegmentNo, String> {
        let value = self.journal.get(&self.key(replica)).map_err(|e| e.to_string())?;
        let number = value.and_then(|v| v[..].try_into().ok()).map_or(0, u64::from_le_bytes);
        Ok(SegmentNo(number))
    }

    fn save(&self, replica: &ReplicaName, cursor: SegmentNo) -> Result<(), String> {
        let key = self.key(replica);
        self.journal
            .transact::<_, JournalError>(|tx| {
                tx.put(key, cursor.0.to_le_bytes().to_vec());
                Ok(())
            })
            .map(|_| ())
            .map_err(|e| e.to_string())
    }

    fn load_filesystem(&self, replica: &ReplicaName) -> Result<Option<String>, String> {
        let value = self.journal.get(&filesystem_of(replica, self.url(replica)));
        let value = value.map_err(|e| e.to_string())?;
        Ok(value.map(|v| String::from_utf8_lossy(&v).into_owned()))
    }

    fn save_filesystem(&self, replica: &ReplicaName, filesystem: &str) -> Result<(), String> {
        let key = filesystem_of(replica, self.url(replica));
        let saved = self.journal.transact::<_, JournalError>(|tx| {
            tx.put(key, filesystem.as_bytes().to_vec());
            Ok(())
        });
        saved.map(|_| ()).map_err(|e| e.to_string())
    }
}

/// The replicas of a mounted volume, in the order of the configuration.
pub(super) struct Fleet {
    pub replicas: Vec<Arc<Replica>>,
    pub staging: Arc<Staging>,
}

/// Up to which segment staged files may go: what every replica has, or, when `short` of space, what any one has
/// (whoever lags copies it from there).
fn trimmable(cursors: impl Iterator<Item = SegmentNo> + Clone, short: bool) -> SegmentNo {
    let every = cursors.clone().min().unwrap_or_default();
    if short { cursors.max().unwrap_or_default() } else { every }
}

impl Fleet {
    /// Waits until `needed` replicas hold everything up to `segment`. Waits as long as it takes: bound it from outside.
    pub async fn wait_for(&self, segment: SegmentNo, needed: usize) {
        let mut waiting: FuturesUnordered<_> = self.replicas.iter().map(|r| r.wait_for(segment)).collect();
        for _ in 0..needed {
            if waiting.next().await.is_none() {
                return;
            }
        }
    }

    /// Waits until every replica holds everything sealed, at most until `until`. For those in trouble it waits only
    /// when `all` are wanted.
    pub async fn last_call(&self, until: Instant, all: bool) {
        let newest = self.staging.newest();
        while Instant::now() < until {
            let works = |s: &ReplicaStatus| matches!(s.state, ReplicaState::Healthy | ReplicaState::Degraded);
            if !self.statuses().iter().any(|s| s.cursor < newest && (all || works(s))) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Names of those that do not, with what keeps them.
    pub fn lacking(&self, segment: SegmentNo) -> String {
        let now = super::unix_now();
        let late = self.replicas.iter().filter(|r| r.cursor() < segment).map(|r| {
            let status = r.status(self.staging.backlog(r.cursor()), now);
            let why = status.last_error.map_or_else(String::new, |e| format!(" ({})", e.text));
            format!("{} lacks {} segments{why}", r.name(), status.lag_segments)
        });
        late.collect::<Vec<_>>().join("; ")
    }

    /// What `status` shows of each.
    pub fn statuses(&self) -> Vec<ReplicaStatus> {
        let now = super::unix_now();
        self.replicas.iter().map(|r| r.status(self.staging.backlog(r.cursor()), now)).collect()
    }

    /// Removes staged files as replicas take them over; ends when `stop` resolves.
    pub async fn trim(
        self: Arc<Self>,
        short: impl Fn() -> bool + Send,
        stop: impl Future<Output = ()> + Send,
    ) {
        let mut stop = std::pin::pin!(stop);
        loop {
            let upto = trimmable(self.replicas.iter().map(|r| r.cursor()), short());
            if self.staging.oldest().0.is_some_and(|oldest| oldest <= upto) {
                let staging = Arc::clone(&self.staging);
                let done = tokio::task::spawn_blocking(move || staging.trim(upto)).await;
                if let Err(e) = done {
                    log::error!("trimming the staging area: {e}");
                }
            }
            let dumped = self.replicas.iter().map(|r| r.checkpoint()).min().unwrap_or_default();
            let staging = Arc::clone(&self.staging);
            if let Err(e) = tokio::task::spawn_blocking(move || staging.trim_checkpoints(dumped)).await {
                log::error!("trimming the staging area: {e}");
            }
            tokio::select! {
                () = tokio::time::sleep(Duration::from_millis(200)) => {}
                () = &mut stop => return,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn staged_files_stay_until_they_are_elsewhere() {
        let cursors = [SegmentNo(3), SegmentNo(9), SegmentNo(0)];
        assert_eq!(trimmable(cursors.into_iter(), false), SegmentNo(0));
        assert_eq!(trimmable(cursors.into_iter(), true), SegmentNo(9));
        assert_eq!(trimmable([].into_iter(), true), SegmentNo(0));
    }
}
