//! What commands may ask of the running daemon.
//!
//! Owns the translation of the parts' figures into the words of `control`.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use futures::FutureExt;
use futures::future::BoxFuture;
use tokio::sync::watch;

use super::crash::last_crash;
use super::serve::Running;
use super::signals::{cut_if_held, end_if_held};
use super::tenure::Tenure;
use crate::control::{
    Backend, CacheStatus, Failure, FsckRequest, Refused, ReplicaEntry, ReplicaRequest, ScrubCommand,
    ShutdownRequest, Status, SyncProgress, SyncReplica, SyncRequest,
};
use crate::exit::Exit;
use crate::fsck::Report;
use crate::ids::{Epoch, SegmentNo};
use crate::reconcile::{Reconciler, ScrubStatus};
use crate::replica::{Outbox, Place, ReplicaSpec, ReplicaState, ReplicaStatus, Requests};
use crate::trace::{self, OpFigures};
use crate::vfs::Vfs;

/// Longest wait for a group to be sealed; beyond it something is wrong that should be said.
const SEAL_DEADLINE: Duration = Duration::from_secs(3600);
/// How often a sync looks how far it is.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// How long the names of files are looked for: for a status, and for an answer that may take its time.
const NAME_QUICKLY: Duration = Duration::from_secs(1);
pub(super) const NAME: Duration = Duration::from_secs(10);

/// The files of which content was refused. Reads tables when there are any.
pub(super) fn refused(vfs: &Vfs, longest: Duration) -> Refused {
    let found = vfs.refused_files(longest);
    Refused { count: found.count as u64 + u64::from(found.more), files: found.names }
}

/// The daemon behind the control socket.
pub(super) struct Control(pub Arc<Running>);

impl Control {
    pub fn status_now(&self) -> Status {
        let r = &self.0;
        let space = &r.core.blocks.space;
        let progress = r.core.engine.as_ref().map(|e| e.progress()).unwrap_or_default();
        let (staged_segments, staged_bytes) = {
            let (oldest, bytes) = r.core.fleet.staging.oldest();
            (oldest.map_or(0, |o| r.core.fleet.staging.newest().0.saturating_sub(o.0) + 1), bytes)
        };
        let load = |n: &std::sync::atomic::AtomicU64| n.load(std::sync::atomic::Ordering::Relaxed);
        Status {
            volume: r.core.volume.volume,
            mountpoint: r.mountpoint.display().to_string(),
            state: r.core.state.path().display().to_string(),
            pid: std::process::id(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            started_at: r.core.started_at,
            epoch: r.core.epoch,
            lsn: r.core.journal.last_lsn(),
            sealed_lsn: if r.core.engine.is_some() { progress.sealed } else { r.core.opened_at },
            dirty_bytes: space.dirty(),
            staged_bytes,
            staged_segments,
            cache: CacheStatus {
                used_bytes: space.dirty() + space.clean(),
                limit_bytes: space.limit(),
                hits: load(&r.core.blocks.counters.hits),
                misses: load(&r.core.blocks.counters.misses),
                corrupt: load(&r.core.blocks.counters.corrupt),
            },
            fsync: r.core.fsync.to_owned(),
            settings: r.core.settings.clone(),
            read_only: r.core.vfs.read_only(),
            fenced: r.core.tenure.as_ref().and_then(Tenure::note),
            sealing_error: progress.error,
            last_crash: last_crash(r.core.state.path()),
            held_by: None,
            refused: refused(&r.core.vfs, NAME_QUICKLY),
            replicas: r.core.fleet.statuses(),
            ops: trace::figures(),
        }
    }

    /// Refuses to sync what cannot become more: a mount that was made read-only, or has become it.
    fn check_writable(&self) -> Result<(), Failure> {
        let r = &self.0;
        let Some(why) = r.core.vfs.read_only() else { return Ok(()) };
        if r.core.engine.is_some() {
            let fenced = r.core.fleet.statuses().iter().any(|s| s.state == ReplicaState::Fenced);
            return Err(Failure::new(if fenced { Exit::InUse } else { Exit::Failure }, why));
        }
        // Without an epoch the local state was built from the replicas, and has nothing that they lack.
        if r.core.epoch == Epoch(0) {
            return Ok(());
        }
        let message =
            "mounted read-only: what is not yet on the replicas is sent when it is mounted writable";
        Err(Failure::new(Exit::Failure, message))
    }

    fn reconciler(&self) -> Result<&Reconciler, Failure> {
        self.0.core.reconciler.as_deref().ok_or_else(|| {
            Failure::new(
                Exit::Failure,
                "mounted read-only: replicas are looked after only by a writable mount",
            )
        })
    }

    fn entries(&self) -> Vec<ReplicaEntry> {
        let fleet = &self.0.core.fleet;
        let entry = |status: ReplicaStatus| {
            let replaces = fleet.joining(&status.name).flatten();
            ReplicaEntry { status, replaces }
        };
        fleet.statuses().into_iter().map(entry).collect()
    }

    /// How far a sync is before there is a segment to wait for.
    fn sealing(&self, needed: usize) -> SyncProgress {
        let r = &self.0;
        SyncProgress {
            needed,
            bytes_left: r.core.blocks.space.dirty() * needed as u64,
            error: r.core.engine.as_ref().and_then(|e| e.progress().error),
            ..SyncProgress::default()
        }
    }

    fn progress(&self, segment: SegmentNo, needed: usize) -> SyncProgress {
        let fleet = &self.0.core.fleet;
        let mut replicas: Vec<SyncReplica> = fleet
            .roster
            .all()
            .iter()
            .map(|r| {
                let (cursor, backlog) = (r.cursor(), fleet.staging.backlog(r.cursor()));
                let after = fleet.staging.backlog(segment);
                let done = cursor >= segment;
                SyncReplica {
                    name: r.name().clone(),
                    done,
                    bytes_left: if done { 0 } else { backlog.bytes.saturating_sub(after.bytes) },
                    segments_left: segment.0.saturating_sub(cursor.0),
                    error: None,
                }
            })
            .collect();
        for (sync, status) in replicas.iter_mut().zip(fleet.statuses()) {
            if !sync.done {
                sync.error = status.last_error.map(|e| e.text);
            }
        }
        let mut nearest: Vec<(u64, u64)> = replicas.iter().map(|r| (r.bytes_left, r.segments_left)).collect();
        nearest.sort_unstable();
        SyncProgress {
            lsn: self.0.core.engine.as_ref().map_or(self.0.core.opened_at, |e| e.progress().sealed),
            sealed: true,
            error: None,
            needed,
            done: replicas.iter().filter(|r| r.done).count(),
            bytes_left: nearest.iter().take(needed).map(|r| r.0).sum(),
            segments_left: nearest.iter().take(needed).map(|r| r.1).sum(),
            replicas,
            refused: Refused::default(),
        }
    }

    /// The files of which content was refused, named with patience.
    async fn refused(&self) -> Refused {
        let running = Arc::clone(&self.0);
        let look = move || refused(&running.core.vfs, NAME);
        tokio::task::spawn_blocking(look).await.unwrap_or_default()
    }
}

impl Backend for Control {
    fn status(&self) -> BoxFuture<'_, Status> {
        async { self.status_now() }.boxed()
    }

    fn sync(
        &self,
        request: SyncRequest,
        progress: watch::Sender<SyncProgress>,
    ) -> BoxFuture<'_, Result<SyncProgress, Failure>> {
        async move {
            let of = || self.0.core.fleet.roster.all().len();
            let needed = request.replicas.needed(of())?;
            self.check_writable()?;
            let sealing = self.0.seal(Instant::now() + SEAL_DEADLINE);
            tokio::pin!(sealing);
            let sealed = loop {
                progress.send_replace(self.sealing(needed));
                tokio::select! {
                    sealed = &mut sealing => break sealed,
                    () = tokio::time::sleep(LOOK_EVERY) => self.check_writable()?,
                }
            };
            let segment = match sealed {
                Ok(segment) => segment,
                Err(e) => {
                    let text = self.refused().await.text().map_or_else(String::new, |t| format!("; {t}"));
                    let message = format!("what was written could not be sealed: {e}{text}");
                    return Err(Failure::new(Exit::Failure, message));
                }
            };
            // Replicas that are attached or detached meanwhile count as well.
            let needed_of = move |of| request.replicas.needed(of).unwrap_or(of);
            let (fleet, tenure) = (&self.0.core.fleet, &self.0.core.tenure);
            let waiting = async {
                fleet.wait_for(segment, needed_of).await;
                // What is stored counts when nobody had taken over by then.
                match tenure {
                    Some(tenure) => tenure.confirm(&fleet.roster, segment, needed_of).await,
                    None => Ok(()),
                }
            };
            tokio::pin!(waiting);
            loop {
                progress.send_replace(self.progress(segment, needed_of(of())));
                tokio::select! {
                    confirmed = &mut waiting => return match confirmed {
                        Ok(()) => {
                            let done = self.progress(segment, needed_of(of()));
                            Ok(SyncProgress { refused: self.refused().await, ..done })
                        }
                        Err(fenced) => Err(Failure::new(Exit::InUse, fenced.to_string())),
                    },
                    () = tokio::time::sleep(LOOK_EVERY) => self.check_writable()?,
                }
            }
        }
        .boxed()
    }

    fn replicas(&self) -> BoxFuture<'_, Vec<ReplicaEntry>> {
        async { self.entries() }.boxed()
    }

    fn change_replicas(&self, request: ReplicaRequest) -> BoxFuture<'_, Result<Vec<ReplicaEntry>, Failure>> {
        async move {
            let fleet = &self.0.core.fleet;
            match request {
                ReplicaRequest::Attach { name, url, options, replaces } => {
                    let spec = ReplicaSpec::parse(name, &url, options, std::path::Path::new("/"))
                        .map_err(|e| Failure::new(Exit::Usage, e.to_string()))?;
                    if let Place::Folder(folder) = spec.place()
                        && crate::config::overlap(self.0.core.state(), folder)
                    {
                        let text = format!(
                            "replica {} and the state folder lie one within the other: choose another place",
                            spec.name
                        );
                        return Err(Failure::new(Exit::Usage, text));
                    }
                    fleet.attach(spec, replaces).await?;
                }
                ReplicaRequest::Detach { name, force } => fleet.detach(&name, force).await?,
                ReplicaRequest::Pause { name } => fleet.pause(&name, true).await?,
                ReplicaRequest::Resume { name } => fleet.pause(&name, false).await?,
            }
            Ok(self.entries())
        }
        .boxed()
    }

    fn scrubs(&self) -> BoxFuture<'_, Result<Vec<ScrubStatus>, Failure>> {
        async { Ok(self.reconciler()?.status()) }.boxed()
    }

    fn scrub(&self, command: ScrubCommand) -> BoxFuture<'_, Result<Vec<ScrubStatus>, Failure>> {
        async move {
            let reconciler = self.reconciler()?;
            let done = match &command {
                ScrubCommand::Start(request) => reconciler.begin(request),
                ScrubCommand::Pause { replica } => reconciler.pause(replica.as_ref(), true),
                ScrubCommand::Resume { replica } => reconciler.pause(replica.as_ref(), false),
                ScrubCommand::Stop { replica } => reconciler.stop(replica.as_ref()),
            };
            done.map_err(|e| Failure::new(Exit::Usage, e))?;
            reconciler.save().await;
            Ok(reconciler.status())
        }
        .boxed()
    }

    fn shutdown(&self, request: ShutdownRequest) -> BoxFuture<'_, Result<Status, Failure>> {
        async move {
            let running = Arc::clone(&self.0);
            running.wait_for_all(request.wait);
            running.unmount().await.map_err(|e| {
                running.wait_for_all(false);
                Failure::new(Exit::InUse, e)
            })?;
            // A task of its own: it goes on when the command that asked goes away.
            let held = tokio::spawn(end_if_held(Arc::clone(&running)));
            let held_by =
                held.await.map_err(|e| Failure::new(Exit::Failure, format!("unmounting broke off: {e}")))?;
            let closed = running.wait_closed().await;
            closed.map_err(|(exit, message)| Failure::new(exit, message))?;
            Ok(Status { held_by, ..self.status_now() })
        }
        .boxed()
    }

    fn fsck(&self, request: FsckRequest) -> BoxFuture<'_, Result<Report, Failure>> {
        async move {
            let running = Arc::clone(&self.0);
            let given_up = Arc::new(AtomicBool::new(false));
            // Dropped when nobody waits any more.
            let _guard = GiveUp(Arc::clone(&given_up));
            let work = move || {
                let cancelled = || given_up.load(Ordering::Relaxed);
                super::fsck::live::check(&running.core, &request, &cancelled)
            };
            match tokio::task::spawn_blocking(work).await {
                Ok(Ok(report)) => Ok(report),
                Ok(Err(e)) => Err(Failure::new(e.exit_code(), e.to_string())),
                Err(e) => Err(Failure::new(Exit::Failure, format!("the check broke off: {e}"))),
            }
        }
        .boxed()
    }

    fn reopen(&self) -> BoxFuture<'_, Result<(), Failure>> {
        async move {
            if self.0.core.engine.is_some() {
                return Err(Failure::new(Exit::Usage, "it is mounted writable already"));
            }
            self.0.reopen().await.map_err(|e| Failure::new(Exit::InUse, e))?;
            let freed = tokio::spawn(cut_if_held(Arc::clone(&self.0)));
            let freed = freed.await.map_err(|e| Failure::new(Exit::Failure, e.to_string()))?;
            freed.map_err(|e| Failure::new(Exit::InUse, e))
        }
        .boxed()
    }

    fn metrics(&self) -> BoxFuture<'_, String> {
        async {
            let scrubs = self.0.core.reconciler.as_ref().map(|r| r.status()).unwrap_or_default();
            let status = self.status_now();
            metrics(&status) + &scrub_metrics(&scrubs) + &op_metrics(&status.ops)
        }
        .boxed()
    }
}

/// Says so when it is dropped.
struct GiveUp(Arc<AtomicBool>);

impl Drop for GiveUp {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// One number of the work on a replica.
type ScrubFigure = fn(&ScrubStatus) -> f64;

/// How replicas are looked after, in the text form that Prometheus reads.
fn scrub_metrics(scrubs: &[ScrubStatus]) -> String {
    use std::fmt::Write;
    let figures: [(&str, &str, ScrubFigure); 5] = [
        ("scrub_examined_bytes", "Bytes read by the pass under way, or the last one", |s| {
            s.counters.examined_bytes as f64
        }),
        ("scrub_bad", "Objects found bad by it", |s| s.counters.bad as f64),
        ("scrub_repaired", "Of these, mended", |s| s.counters.repaired as f64),
        ("scrub_left", "Of these, not to be mended", |s| s.counters.left as f64),
        ("scrub_last_end", "When the last pass ended, in seconds since 1970", |s| {
            s.last.as_ref().map_or(0.0, |l| l.finished_at)
        }),
    ];
    let mut out = String::new();
    for (name, help, value) in figures {
        let _ = writeln!(out, "# HELP mirrorfs_{name} {help}\n# TYPE mirrorfs_{name} gauge");
        for s in scrubs {
            let _ = writeln!(out, "mirrorfs_{name}{{replica=\"{}\"}} {}", s.replica, value(s));
        }
    }
    out
}

/// Where requests spend their time, in the text form that Prometheus reads.
fn op_metrics(ops: &[OpFigures]) -> String {
    use std::fmt::Write;
    let mut out =
        "# HELP mirrorfs_requests_total Requests of the kernel\n# TYPE mirrorfs_requests_total counter\n"
            .to_owned();
    for op in ops {
        let _ = writeln!(out, "mirrorfs_requests_total{{kind=\"{}\"}} {}", op.name, op.count);
    }
    out += "# HELP mirrorfs_request_seconds_total Their time, by stage\n# TYPE mirrorfs_request_seconds_total counter\n";
    for op in ops {
        for (stage, seconds) in &op.stages {
            let labels = format!("kind=\"{}\",stage=\"{stage}\"", op.name);
            let _ = writeln!(out, "mirrorfs_request_seconds_total{{{labels}}} {seconds}");
        }
    }
    out
}

/// One number of a replica.
type Figure = fn(&ReplicaStatus) -> f64;

/// The status in the text form that Prometheus reads.
fn metrics(s: &Status) -> String {
    use std::fmt::Write;
    let mut out = String::new();
    let mut gauge = |name: &str, help: &str, value: f64| {
        let _ = writeln!(
            out,
            "# HELP mirrorfs_{name} {help}\n# TYPE mirrorfs_{name} gauge\nmirrorfs_{name} {value}"
        );
    };
    gauge("lsn", "Last change made", s.lsn.0 as f64);
    gauge("sealed_lsn", "Last change in a sealed transaction group", s.sealed_lsn.0 as f64);
    gauge("dirty_bytes", "Content written and not yet sealed", s.dirty_bytes as f64);
    gauge("staged_bytes", "Sealed segments waiting on local disk", s.staged_bytes as f64);
    gauge("cache_used_bytes", "Local disk taken by blocks", s.cache.used_bytes as f64);
    gauge("cache_limit_bytes", "Local disk that blocks may take", s.cache.limit_bytes as f64);
    gauge("cache_hits", "Block reads answered locally", s.cache.hits as f64);
    gauge("cache_misses", "Block reads that needed a replica", s.cache.misses as f64);
    gauge("cache_corrupt", "Cached blocks dropped for a wrong hash", s.cache.corrupt as f64);
    gauge("refused_files", "Files that lack bytes which could not be stored", s.refused.count as f64);
    gauge("read_only", "1 when nobody can write", f64::from(u8::from(s.read_only.is_some())));
    let per_replica: [(&str, &str, Figure); 6] = [
        ("replica_cursor", "Segment up to which everything is there", |r| r.cursor.0 as f64),
        ("replica_lag_bytes", "Bytes of sealed segments it lacks", |r| r.lag_bytes as f64),
        ("replica_lag_seconds", "Age of the oldest segment it lacks", |r| r.lag_seconds),
        ("replica_uploaded_bytes", "Bytes sent", |r| r.uploaded_bytes as f64),
        ("replica_failed_requests", "Requests that failed", |r| r.requests.failed as f64),
        ("replica_damages", "Damaged or missing places met while reading", |r| r.damages as f64),
    ];
    for (name, help, value) in per_replica {
        let _ = writeln!(out, "# HELP mirrorfs_{name} {help}\n# TYPE mirrorfs_{name} gauge");
        for r in &s.replicas {
            let _ = writeln!(out, "mirrorfs_{name}{{replica=\"{}\"}} {}", r.name, value(r));
        }
    }
    out += &request_metrics(&s.replicas);
    out
}

/// What was asked of replicas since the start, in the text form that Prometheus reads.
fn request_metrics(replicas: &[ReplicaStatus]) -> String {
    use std::fmt::Write;
    let mut out = String::new();
    let mut counter = |name: &str, help: &str, label: &str, kinds: &[(&str, RequestFigure)]| {
        let _ = writeln!(out, "# HELP mirrorfs_{name} {help}\n# TYPE mirrorfs_{name} counter");
        for r in replicas {
            for (kind, value) in kinds {
                let labels = format!("replica=\"{}\",{label}=\"{kind}\"", r.name);
                let _ = writeln!(out, "mirrorfs_{name}{{{labels}}} {}", value(&r.requests));
            }
        }
    };
    let kinds: [(&str, RequestFigure); 5] = [
        ("put", |r| r.put),
        ("get", |r| r.get),
        ("head", |r| r.head),
        ("list", |r| r.list),
        ("delete", |r| r.delete),
    ];
    counter("replica_requests_total", "Requests made of a replica", "kind", &kinds);
    let bytes: [(&str, RequestFigure); 2] = [("sent", |r| r.bytes_sent), ("received", |r| r.bytes_received)];
    counter("replica_bytes_total", "Bytes of objects", "direction", &bytes);
    out
}

/// One count of the requests of a replica.
type RequestFigure = fn(&Requests) -> u64;
