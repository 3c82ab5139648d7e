//! Server and client over a real socket, with a fake daemon behind it.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use futures::FutureExt;
use futures::future::BoxFuture;
use tokio::sync::watch;

use super::*;
use crate::exit::Exit;
use crate::ids::{Epoch, Lsn, SegmentNo, VolumeId};
use crate::reconcile::ScrubStatus;
use crate::replica::{LastError, ReplicaState, ReplicaStatus, Requests};

pub(crate) fn sample_status() -> Status {
    Status {
        volume: VolumeId::from_random([7; 16]),
        mountpoint: "/mnt/x".into(),
        state: "/state".into(),
        pid: 1,
        version: "0".into(),
        started_at: 1.5,
        epoch: Epoch(3),
        lsn: Lsn(99),
        sealed_lsn: Lsn(90),
        dirty_bytes: 1,
        staged_bytes: 2,
        staged_segments: 3,
        cache: CacheStatus { used_bytes: 1, limit_bytes: 2, hits: 3, misses: 4, corrupt: 0 },
        fsync: "local".into(),
        settings: [("fsync".to_owned(), "local".to_owned())].into(),
        read_only: None,
        fenced: None,
        sealing_error: None,
        last_crash: None,
        held_by: None,
        refused: Refused::default(),
        ops: Vec::new(),
        replicas: vec![ReplicaStatus {
            name: "a".parse().unwrap(),
            url: "file:///r/a".into(),
            state: ReplicaState::Healthy,
            cursor: SegmentNo(5),
            lag_segments: 0,
            lag_bytes: 0,
            lag_seconds: 0.0,
            last_error: Some(LastError { text: "broken".into(), kind: None, at: 2.5 }),
            upload_rate: 0.5,
            upload_limit: Some(1 << 20),
            download_limit: None,
            uploaded_objects: 1,
            uploaded_bytes: 6,
            read_latency: None,
            read_rate: None,
            damages: 0,
            joining: false,
            requests: Requests::default(),
        }],
    }
}

fn progress(left: u64, error: Option<&str>) -> SyncProgress {
    SyncProgress {
        lsn: Lsn(99),
        sealed: true,
        error: None,
        needed: 1,
        done: usize::from(left == 0),
        bytes_left: left,
        segments_left: left.min(1),
        refused: Refused::default(),
        replicas: vec![SyncReplica {
            name: "a".parse().unwrap(),
            done: left == 0,
            bytes_left: left,
            segments_left: left.min(1),
            error: error.map(str::to_owned),
        }],
    }
}

/// What the fake daemon does when asked to sync.
#[derive(Clone, Copy, PartialEq)]
enum Mood {
    Steps,
    Hangs,
    Fails,
}

struct Fake {
    mood: Mood,
    dropped: Arc<AtomicBool>,
}

struct NotesDrop(Arc<AtomicBool>);

impl Drop for NotesDrop {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

impl Backend for Fake {
    fn fsck(&self, _: FsckRequest) -> BoxFuture<'_, Result<crate::fsck::Report, Failure>> {
        async { Ok(crate::fsck::Report::default()) }.boxed()
    }

    fn status(&self) -> BoxFuture<'_, Status> {
        async { sample_status() }.boxed()
    }

    fn sync(
        &self,
        request: SyncRequest,
        sender: watch::Sender<SyncProgress>,
    ) -> BoxFuture<'_, Result<SyncProgress, Failure>> {
        let notes = NotesDrop(Arc::clone(&self.dropped));
        async move {
            let _notes = notes;
            request.replicas.needed(2)?;
            match self.mood {
                Mood::Fails => Err(Failure::new(Exit::Unreachable, "a cannot be reached")),
                Mood::Hangs => {
                    sender.send_replace(progress(10, Some("no route")));
                    std::future::pending().await
                }
                Mood::Steps => {
                    for left in [30, 20, 10] {
                        sender.send_replace(progress(left, None));
                        tokio::time::sleep(Duration::from_millis(250)).await;
                    }
                    Ok(progress(0, None))
                }
            }
        }
        .boxed()
    }

    fn replicas(&self) -> BoxFuture<'_, Vec<ReplicaEntry>> {
        async {
            sample_status()
                .replicas
                .into_iter()
                .map(|status| ReplicaEntry { status, replaces: None })
                .collect()
        }
        .boxed()
    }

    fn change_replicas(&self, request: ReplicaRequest) -> BoxFuture<'_, Result<Vec<ReplicaEntry>, Failure>> {
        async move {
            match request {
                ReplicaRequest::Detach { name, .. } => Err(Failure::new(Exit::Usage, format!("no {name}"))),
                _ => Ok(self.replicas().await),
            }
        }
        .boxed()
    }

    fn scrubs(&self) -> BoxFuture<'_, Result<Vec<ScrubStatus>, Failure>> {
        async { Ok(Vec::new()) }.boxed()
    }

    fn scrub(&self, command: ScrubCommand) -> BoxFuture<'_, Result<Vec<ScrubStatus>, Failure>> {
        async move {
            match command {
                ScrubCommand::Start(request) if request.deep => Ok(Vec::new()),
                _ => Err(Failure::new(Exit::Failure, "not that")),
            }
        }
        .boxed()
    }

    fn shutdown(&self, request: ShutdownRequest) -> BoxFuture<'_, Result<Status, Failure>> {
        let busy = self.mood == Mood::Fails;
        async move {
            match busy {
                true => Err(Failure::new(Exit::InUse, "busy")),
                false => Ok(Status { pid: if request.wait { 2 } else { 1 }, ..sample_status() }),
            }
        }
        .boxed()
    }

    fn reopen(&self) -> BoxFuture<'_, Result<(), Failure>> {
        async { Err(Failure::new(Exit::InUse, "busy")) }.boxed()
    }

    fn metrics(&self) -> BoxFuture<'_, String> {
        async { "mirrorfs_lsn 99\n".to_owned() }.boxed()
    }
}

fn me() -> u32 {
    rustix::process::geteuid().as_raw()
}

/// Serves a fake daemon in `state` until the runtime ends.
fn serve(state: &Path, mood: Mood) -> (Client, Arc<AtomicBool>) {
    let dropped = Arc::new(AtomicBool::new(false));
    let server = Server::bind(state).unwrap();
    let backend = Arc::new(Fake { mood, dropped: Arc::clone(&dropped) });
    tokio::spawn(server.serve(backend, std::future::pending()));
    (Client::new(state, me()), dropped)
}

fn all(timeout_seconds: Option<f64>) -> SyncRequest {
    SyncRequest { replicas: Replicas::All, timeout_seconds }
}

#[tokio::test]
async fn questions_are_answered_over_the_socket() {
    let dir = tempfile::tempdir().unwrap();
    let (client, _) = serve(dir.path(), Mood::Steps);
    assert_eq!(client.status().await.unwrap(), sample_status());
    assert_eq!(client.metrics().await.unwrap(), "mirrorfs_lsn 99\n");
    assert_eq!(client.shutdown(ShutdownRequest::default()).await.unwrap(), sample_status());
    assert_eq!(client.shutdown(ShutdownRequest { wait: true }).await.unwrap().pid, 2);
}

#[tokio::test]
async fn a_socket_path_longer_than_an_address_works() {
    let dir = tempfile::tempdir().unwrap();
    let deep = dir.path().join("x".repeat(120));
    std::fs::create_dir(&deep).unwrap();
    let (client, _) = serve(&deep, Mood::Steps);
    assert_eq!(client.status().await.unwrap(), sample_status());
}

#[tokio::test]
async fn a_sync_shows_its_steps_and_its_end() {
    let dir = tempfile::tempdir().unwrap();
    let (client, _) = serve(dir.path(), Mood::Steps);
    let mut seen = Vec::new();
    let done = client.sync(all(None), |p| seen.push(p.bytes_left)).await.unwrap();
    assert_eq!(done, progress(0, None));
    assert!(seen.len() >= 2 && seen.is_sorted_by(|a, b| a >= b), "{seen:?}");
}

#[tokio::test]
async fn a_sync_that_takes_too_long_is_given_up_and_says_for_whom() {
    let dir = tempfile::tempdir().unwrap();
    let (client, dropped) = serve(dir.path(), Mood::Hangs);
    let started = Instant::now();
    let error = client.sync(all(Some(0.5)), |_| {}).await.unwrap_err();
    assert!(started.elapsed() < Duration::from_secs(5), "{:?}", started.elapsed());
    assert_eq!(error.exit_code(), Exit::TimedOut);
    assert_eq!(
        error.to_string(),
        "gave up waiting: 0 of 1 replicas hold everything; waiting for a (no route); sending goes on in the background"
    );
    assert!(dropped.load(Ordering::SeqCst));
}

#[tokio::test]
async fn a_waiting_command_that_goes_away_ends_the_wait() {
    let dir = tempfile::tempdir().unwrap();
    let (client, dropped) = serve(dir.path(), Mood::Hangs);
    let waiting = client.sync(all(None), |_| {});
    assert!(tokio::time::timeout(Duration::from_millis(500), waiting).await.is_err());
    for _ in 0..100 {
        if dropped.load(Ordering::SeqCst) {
            return;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("the backend still works for nobody");
}

#[tokio::test]
async fn failures_keep_their_code() {
    let dir = tempfile::tempdir().unwrap();
    let (client, _) = serve(dir.path(), Mood::Fails);
    let error = client.sync(all(None), |_| {}).await.unwrap_err();
    assert_eq!((error.exit_code(), error.to_string().as_str()), (Exit::Unreachable, "a cannot be reached"));
    let error = client.shutdown(ShutdownRequest::default()).await.unwrap_err();
    assert_eq!((error.exit_code(), error.to_string().as_str()), (Exit::InUse, "busy"));
    let request = SyncRequest { replicas: Replicas::Count(3), timeout_seconds: None };
    let error = client.sync(request, |_| {}).await.unwrap_err();
    assert_eq!(error.exit_code(), Exit::Usage);
}

#[tokio::test]
async fn no_daemon_is_told_from_a_failing_one() {
    let dir = tempfile::tempdir().unwrap();
    let error = Client::new(dir.path(), me()).status().await.unwrap_err();
    assert!(matches!(error, ClientError::NoDaemon { .. }), "{error}");
    assert_eq!(error.exit_code(), Exit::NotMounted);
    // A socket that a killed daemon left behind.
    drop(std::os::unix::net::UnixListener::bind(dir.path().join(SOCKET)).unwrap());
    let error = Client::new(dir.path(), me()).status().await.unwrap_err();
    assert!(matches!(error, ClientError::NoDaemon { .. }), "{error}");
    // Which the next daemon replaces.
    let (client, _) = serve(dir.path(), Mood::Steps);
    client.status().await.unwrap();
}

#[tokio::test]
async fn a_socket_is_its_owners_alone_and_goes_with_the_server() {
    use std::os::unix::fs::PermissionsExt;
    let dir = tempfile::tempdir().unwrap();
    let server = Server::bind(dir.path()).unwrap();
    let socket = dir.path().join(SOCKET);
    assert_eq!(std::fs::metadata(&socket).unwrap().permissions().mode() & 0o777, 0o600);
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let backend = Arc::new(Fake { mood: Mood::Steps, dropped: Arc::default() });
    let running = tokio::spawn(server.serve(backend, async {
        let _ = stopped.await;
    }));
    Client::new(dir.path(), me()).status().await.unwrap();
    stop.send(()).unwrap();
    tokio::time::timeout(Duration::from_secs(5), running).await.unwrap().unwrap().unwrap();
    assert!(!socket.exists());
}

#[tokio::test]
async fn an_unknown_request_says_that_the_daemon_is_older() {
    let dir = tempfile::tempdir().unwrap();
    serve(dir.path(), Mood::Steps);
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let mut stream = tokio::net::UnixStream::connect(dir.path().join(SOCKET)).await.unwrap();
    stream.write_all(b"POST /future HTTP/1.0\r\n\r\n").await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    assert!(answer.starts_with("HTTP/1.0 404"), "{answer}");
    assert!(answer.contains("does not know this request"), "{answer}");
}

#[tokio::test]
async fn a_socket_of_another_user_is_asked_nothing() {
    let dir = tempfile::tempdir().unwrap();
    // The path of the second is longer than an address.
    let long = dir.path().join("x".repeat(120));
    std::fs::create_dir(&long).unwrap();
    for state in [dir.path(), &long] {
        serve(state, Mood::Steps);
        Client::new(state, me()).status().await.unwrap();
        let error = Client::new(state, me() + 1).status().await.unwrap_err();
        assert!(matches!(error, ClientError::Stranger { .. }), "{error}");
        assert_eq!(error.exit_code(), Exit::NotMounted);
        let request = SyncRequest { replicas: Replicas::All, timeout_seconds: None };
        let error = Client::new(state, me() + 1).sync(request, |_| {}).await.unwrap_err();
        assert!(error.to_string().contains("was asked nothing"), "{error}");
    }
}

#[tokio::test]
async fn an_answer_without_end_is_cut_off() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let dir = tempfile::tempdir().unwrap();
    let listener = tokio::net::UnixListener::bind(dir.path().join(SOCKET)).unwrap();
    tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        let _ = stream.read(&mut [0; 4096]).await;
        let head = b"HTTP/1.1 200 OK\r\ncontent-type: application/x-ndjson\r\n\r\n";
        stream.write_all(head).await.unwrap();
        while stream.write_all(&[b'x'; 1 << 16]).await.is_ok() {}
    });
    let request = SyncRequest { replicas: Replicas::All, timeout_seconds: None };
    let error = Client::new(dir.path(), me()).sync(request, |_| {}).await.unwrap_err();
    assert!(error.to_string().contains("its lines do not end"), "{error}");
}
