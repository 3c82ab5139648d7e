//! What commands and daemon say to each other, as JSON: status, the progress of a sync, failures.
//!
//! Owns the words only; knows neither transport nor how anything is measured.

use std::collections::BTreeMap;

use futures::future::BoxFuture;
use tokio::sync::watch;

use crate::exit::Exit;
use crate::fsck::Report;
use crate::fuse::Holders;
use crate::ids::{Epoch, Lsn, ReplicaName, VolumeId};
use crate::reconcile::ScrubStatus;
use crate::replica::{FenceNote, ReplicaStatus};
use crate::trace::OpFigures;

use super::replicas::{FsckRequest, ReplicaEntry, ReplicaRequest, ScrubCommand};

/// State of a mounted volume at one moment.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Status {
    /// Identity of the volume.
    pub volume: VolumeId,
    /// Where it is mounted.
    pub mountpoint: String,
    /// Folder of the local state.
    pub state: String,
    /// Process of the daemon.
    pub pid: u32,
    /// Version of the daemon.
    pub version: String,
    /// Seconds since 1970 at which the mount became live.
    pub started_at: f64,
    /// The writer's tenure; 0 for a read-only mount that claimed none.
    pub epoch: Epoch,
    /// Last change made.
    pub lsn: Lsn,
    /// Last change that is part of a sealed transaction group.
    pub sealed_lsn: Lsn,
    /// Bytes of content written and not yet sealed.
    pub dirty_bytes: u64,
    /// Bytes of sealed segments that wait on local disk for a replica.
    pub staged_bytes: u64,
    /// Their number.
    pub staged_segments: u64,
    /// The local block cache.
    pub cache: CacheStatus,
    /// What `fsync` waits for: `local`, `one`, `quorum`, `all`.
    pub fsync: String,
    /// What the mount works with of the settings that only a new mount can change, in one spelling.
    #[serde(default)]
    pub settings: BTreeMap<String, String>,
    /// Why nobody can write; absent when one can.
    pub read_only: Option<String>,
    /// Another writer was seen: what, where and when. Nothing more is sent then.
    #[serde(default)]
    pub fenced: Option<FenceNote>,
    /// Why the last attempt to seal failed, when it did; it is tried again.
    #[serde(default)]
    pub sealing_error: Option<String>,
    /// The last death of a daemon of this volume on this machine.
    #[serde(default)]
    pub last_crash: Option<CrashNote>,
    /// Only where an unmount has ended a mount that others still used: those that did, in other mount namespaces.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub held_by: Option<Holders>,
    /// Files that lack content which was refused after `write` had returned.
    #[serde(default)]
    pub refused: Refused,
    /// Every replica, in the order of the configuration.
    pub replicas: Vec<ReplicaStatus>,
    /// Requests of the kernel since the start, by kind, dearest first, and where their time went.
    #[serde(default)]
    pub ops: Vec<OpFigures>,
}

/// What the guardian does after the death.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Then {
    /// Starts a new daemon.
    Restarts,
    /// Nothing, because it was told so (`--no-restart`).
    Stays,
    /// Nothing more, because the daemon died too often.
    GaveUp,
    /// Nothing, because this user cannot replace the dead mount without showing the folder below for a moment.
    WouldShow,
}

impl Then {
    /// A sentence for people, without its full stop.
    #[must_use]
    pub const fn meaning(self) -> &'static str {
        match self {
            Then::Restarts => "It is being started again",
            Then::Stays => "It is not started again (no_restart)",
            Then::GaveUp => "It died too often and is not started again",
            Then::WouldShow => {
                "It is not started again, because the folder below the mountpoint would show for a moment: for \
                 automatic restarts add the line user_allow_other to /etc/fuse.conf, or mount as root"
            }
        }
    }
}

/// One death of a daemon.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct CrashNote {
    /// Seconds since 1970.
    pub at: f64,
    /// Its process.
    pub pid: u32,
    /// In words: "killed by signal 9 (SIGKILL)".
    pub how: String,
    /// What follows.
    pub then: Then,
}

/// The local block cache at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct CacheStatus {
    /// Bytes of local disk that blocks take, dirty ones included.
    pub used_bytes: u64,
    /// Bytes they may take.
    pub limit_bytes: u64,
    /// Blocks that were read and found here, since the start.
    pub hits: u64,
    /// Blocks that had to be fetched, since the start.
    pub misses: u64,
    /// Cached blocks that did not match their hash and were dropped, since the start.
    #[serde(default)]
    pub corrupt: u64,
}

impl CacheStatus {
    /// Share of reads that were found here; `None` before the first.
    #[must_use]
    pub fn hit_ratio(&self) -> Option<f64> {
        let all = self.hits + self.misses;
        (all > 0).then(|| self.hits as f64 / all as f64)
    }
}

/// Files that lack content which programs wrote: it could not be stored when the kernel handed it over. It
/// is nowhere, and each of them stays listed until it is rewritten, truncated or removed.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Refused {
    /// How many they are.
    pub count: u64,
    /// The first of them: path within the volume (or inode) and error.
    pub files: Vec<String>,
}

impl Refused {
    /// What is wrong and what helps; `None` when nothing is.
    #[must_use]
    pub fn text(&self) -> Option<String> {
        let what = match self.count {
            0 => return None,
            1 => "1 file lacks bytes that programs wrote".to_owned(),
            n => format!("{n} files lack bytes that programs wrote"),
        };
        let more = if self.count > self.files.len() as u64 { ", …" } else { "" };
        Some(format!(
            "{what}, because they could not be stored: {}{more}. These bytes are nowhere: write them again, \
             truncate the file or remove it",
            self.files.join(", ")
        ))
    }
}

/// On how many replicas something is to be committed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Replicas {
    /// On every one.
    All,
    /// On more than half.
    Quorum,
    /// On any so many.
    Count(usize),
}

impl Replicas {
    /// How many out of `of` that is; an error when there are not so many.
    pub fn needed(self, of: usize) -> Result<usize, Failure> {
        match self {
            Replicas::All => Ok(of),
            Replicas::Quorum => Ok(of / 2 + 1),
            Replicas::Count(n) if n <= of => Ok(n),
            Replicas::Count(n) => {
                Err(Failure::new(Exit::Usage, format!("{n} replicas are asked for, but the volume has {of}")))
            }
        }
    }
}

impl std::str::FromStr for Replicas {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match (text, text.parse::<usize>()) {
            ("all", _) => Ok(Replicas::All),
            ("quorum", _) => Ok(Replicas::Quorum),
            (_, Ok(n)) if n > 0 => Ok(Replicas::Count(n)),
            _ => Err("must be all, quorum or a number from 1 on".to_owned()),
        }
    }
}

impl std::fmt::Display for Replicas {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Replicas::All => f.write_str("all"),
            Replicas::Quorum => f.write_str("quorum"),
            Replicas::Count(n) => write!(f, "{n}"),
        }
    }
}

/// "Commit what was written up to now."
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct SyncRequest {
    /// On how many replicas.
    pub replicas: Replicas,
    /// Seconds after which to give up waiting; `None` waits for ever. The server keeps it, not the backend.
    pub timeout_seconds: Option<f64>,
}

/// "Flush, seal, unmount."
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct ShutdownRequest {
    /// Whether to wait, for some minutes, until all replicas hold what was sealed at last.
    pub wait: bool,
}

/// How far a sync is.
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct SyncProgress {
    /// The change up to which is synced.
    pub lsn: Lsn,
    /// Whether all that is sealed; before that, what is left to send is an estimate.
    pub sealed: bool,
    /// What keeps it from being sealed.
    #[serde(default)]
    pub error: Option<String>,
    /// Replicas that must hold it.
    pub needed: usize,
    /// Replicas that do.
    pub done: usize,
    /// Bytes still to be sent to the `needed` replicas nearest to their end (or to be sealed).
    pub bytes_left: u64,
    /// The same in segments.
    pub segments_left: u64,
    /// Files that lack content which was refused: what is synced is not all that programs have written.
    #[serde(default)]
    pub refused: Refused,
    /// Every replica, in the order of the configuration.
    pub replicas: Vec<SyncReplica>,
}

/// How far a sync is on one replica.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct SyncReplica {
    /// Its name.
    pub name: ReplicaName,
    /// Whether it holds all that is synced.
    pub done: bool,
    /// Bytes it lacks.
    pub bytes_left: u64,
    /// Segments it lacks.
    pub segments_left: u64,
    /// What keeps it, if it has trouble.
    pub error: Option<String>,
}

/// What is wrong with a replica, without its name in front of it: for where the name stands already.
#[must_use]
pub fn reason<'a>(replica: &ReplicaName, error: &'a str) -> &'a str {
    error
        .strip_prefix("replica ")
        .and_then(|rest| rest.strip_prefix(replica.as_str()))
        .and_then(|rest| rest.strip_prefix(": "))
        .unwrap_or(error)
}

/// A refusal or failure, with the code a command ends with.
#[derive(Clone, Debug, PartialEq, thiserror::Error, serde::Serialize, serde::Deserialize)]
#[error("{message}")]
pub struct Failure {
    /// The code.
    pub exit: Exit,
    /// What is the matter and what helps.
    pub message: String,
}

impl Failure {
    /// A failure that ends a command with `exit`.
    #[must_use]
    pub fn new(exit: Exit, message: impl Into<String>) -> Self {
        Self { exit, message: message.into() }
    }
}

/// One line of the answer to a sync: any number of `Progress`, then one of the others.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SyncEvent {
    /// It goes on; also sent as a sign of life.
    Progress(SyncProgress),
    /// It is done.
    Done(SyncProgress),
    /// It failed or was given up.
    Failed(Failure),
}

/// The daemon, as the control server sees it. A future may be dropped when the command that asked goes away: what was
/// begun then goes on or not, but nothing is left half changed.
pub trait Backend: Send + Sync + 'static {
    /// The state of things; quick, and never waits for the network.
    fn status(&self) -> BoxFuture<'_, Status>;

    /// Cuts and seals what was written before the call, then waits until as many replicas as asked for hold it. Puts
    /// what is left into `progress` whenever it changes; only the newest value is seen.
    fn sync(
        &self,
        request: SyncRequest,
        progress: watch::Sender<SyncProgress>,
    ) -> BoxFuture<'_, Result<SyncProgress, Failure>>;

    /// Flushes, unmounts, seals. A mount that is still used in another mount namespace is ended after some seconds; the
    /// status says who used it. Answers with the last status once everything is closed and the process is about to
    /// end; with a failure when the mount is busy (then everything goes on as before) or when not all could be sealed.
    fn shutdown(&self, request: ShutdownRequest) -> BoxFuture<'_, Result<Status, Failure>>;

    /// Unmounts a mount that was made read-only and mounts it again, writable. Answers when it is unmounted; with a failure when
    /// it is in use or writable already.
    fn reopen(&self) -> BoxFuture<'_, Result<(), Failure>>;

    /// The replicas, in their order.
    fn replicas(&self) -> BoxFuture<'_, Vec<ReplicaEntry>>;

    /// Changes the list of replicas, durably. Answers the list as it is then; filling a new one goes on in the background.
    fn change_replicas(&self, request: ReplicaRequest) -> BoxFuture<'_, Result<Vec<ReplicaEntry>, Failure>>;

    /// What is done to look after the replicas.
    fn scrubs(&self) -> BoxFuture<'_, Result<Vec<ScrubStatus>, Failure>>;

    /// Begins, pauses, resumes or stops passes over replicas. Answers at once.
    fn scrub(&self, command: ScrubCommand) -> BoxFuture<'_, Result<Vec<ScrubStatus>, Failure>>;

    /// Checks the tables as they are at one moment, and replicas if asked. Changes nothing; ends early when the future is dropped.
    fn fsck(&self, request: FsckRequest) -> BoxFuture<'_, Result<Report, Failure>>;

    /// The numbers in the text form that Prometheus reads.
    fn metrics(&self) -> BoxFuture<'_, String>;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_that_lack_bytes_are_named() {
        let mut refused = Refused::default();
        assert_eq!(refused.text(), None);
        refused = Refused { count: 1, files: vec!["/a (no space left)".into()] };
        assert_eq!(
            refused.text().unwrap(),
            "1 file lacks bytes that programs wrote, because they could not be stored: /a (no space left). \
             These bytes are nowhere: write them again, truncate the file or remove it"
        );
        refused.count = 3;
        let text = refused.text().unwrap();
        assert!(text.starts_with("3 files lack ") && text.contains("/a (no space left), …. "), "{text}");
    }

    #[test]
    fn a_number_of_replicas_is_read_and_checked() {
        assert_eq!("all".parse(), Ok(Replicas::All));
        assert_eq!("quorum".parse(), Ok(Replicas::Quorum));
        assert_eq!("2".parse(), Ok(Replicas::Count(2)));
        for wrong in ["", "0", "-1", "most"] {
            assert_eq!(
                wrong.parse::<Replicas>(),
                Err("must be all, quorum or a number from 1 on".to_owned())
            );
        }
        assert_eq!(Replicas::Quorum.needed(4), Ok(3));
        assert_eq!(Replicas::All.needed(4), Ok(4));
        assert_eq!(Replicas::Count(4).needed(4), Ok(4));
        let error = Replicas::Count(5).needed(4).unwrap_err();
        assert_eq!(
            (error.exit, error.message.as_str()),
            (Exit::Usage, "5 replicas are asked for, but the volume has 4")
        );
    }

    #[test]
    fn a_name_is_not_said_twice() {
        let a: ReplicaName = "a".parse().unwrap();
        assert_eq!(reason(&a, "replica a: get x: no route"), "get x: no route");
        for other in ["no route", "replica ab: no route", "replica a"] {
            assert_eq!(reason(&a, other), other);
        }
    }

    #[test]
    fn the_hit_ratio_needs_reads() {
        assert_eq!(CacheStatus::default().hit_ratio(), None);
        assert_eq!(CacheStatus { hits: 3, misses: 1, ..CacheStatus::default() }.hit_ratio(), Some(0.75));
    }
}
