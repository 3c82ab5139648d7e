//! The daemon's side of control: HTTP over the Unix socket in the state folder.
//!
//! Owns routes, the deadline of a sync and the pace of its progress lines; every answer comes from the [`Backend`]. Only
//! the owner of the socket (and root) can connect: that is all the authentication there is.

use std::future::Future;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use futures::stream::BoxStream;
use futures::{FutureExt, StreamExt};
use tokio::net::UnixListener;
use tokio::sync::{mpsc, watch};

use super::replicas::{FsckRequest, ReplicaRequest, ScrubCommand};
use super::socket;
use super::types::{Backend, Failure, ShutdownRequest, SyncEvent, SyncProgress, SyncRequest, reason};
use crate::exit::Exit;

/// Name of the socket in the state folder.
pub const SOCKET: &str = "control.sock";

/// Shortest time between two progress lines.
const PACE: Duration = Duration::from_millis(100);
/// Longest time between two lines; the client counts on it to tell a slow daemon from a dead one.
const SIGN_OF_LIFE: Duration = Duration::from_secs(2);

/// A socket that takes connections, not yet answered.
#[derive(Debug)]
pub struct Server {
    listener: UnixListener,
    path: PathBuf,
}

impl Server {
    /// Binds the socket in `state`, whose lock the caller holds: one that lies there is a dead daemon's. Needs a tokio
    /// runtime.
    pub fn bind(state: &Path) -> std::io::Result<Server> {
        let path = state.join(SOCKET);
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let (short, _folder) = socket::short(&path)?;
        let listener = UnixListener::bind(&short)?;
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600))?;
        Ok(Server { listener, path })
    }

    /// Answers until `stop` resolves, then finishes answers under way and removes the socket.
    pub async fn serve(
        self,
        backend: Arc<dyn Backend>,
        stop: impl Future<Output = ()> + Send + 'static,
    ) -> std::io::Result<()> {
        let outcome = axum::serve(self.listener, router(backend)).with_graceful_shutdown(stop).await;
        // Already gone when the state folder was deleted under us.
        let _ = std::fs::remove_file(&self.path);
        outcome
    }
}

fn router(backend: Arc<dyn Backend>) -> Router {
    Router::new()
        .route("/status", get(status))
        .route("/sync", post(sync))
        .route("/shutdown", post(shutdown))
        .route("/reopen", post(reopen))
        .route("/replicas", get(replicas).post(change_replicas))
        .route("/scrub", get(scrubs).post(scrub))
        .route("/fsck", post(fsck))
        .route("/metrics", get(metrics))
        .fallback(unknown)
        .with_state(backend)
}

async fn status(State(backend): State<Arc<dyn Backend>>) -> Response {
    axum::Json(backend.status().await).into_response()
}

async fn shutdown(State(backend): State<Arc<dyn Backend>>, request: axum::Json<ShutdownRequest>) -> Response {
    // In a task of its own: a shutdown once begun goes on when the command that asked for it is interrupted.
    match tokio::spawn(async move { backend.shutdown(request.0).await }).await {
        Ok(Ok(status)) => axum::Json(status).into_response(),
        Ok(Err(failure)) => refuse(StatusCode::CONFLICT, &failure),
        Err(error) => {
            let failure = Failure::new(Exit::Failure, format!("shutting down broke off: {error}"));
            refuse(StatusCode::INTERNAL_SERVER_ERROR, &failure)
        }
    }
}

async fn reopen(State(backend): State<Arc<dyn Backend>>) -> Response {
    answer(tokio::spawn(async move { backend.reopen().await }).await)
}

async fn replicas(State(backend): State<Arc<dyn Backend>>) -> Response {
    axum::Json(backend.replicas().await).into_response()
}

async fn change_replicas(
    State(backend): State<Arc<dyn Backend>>,
    request: axum::Json<ReplicaRequest>,
) -> Response {
    // In a task of its own: what was begun is finished when the command that asked for it is interrupted.
    answer(tokio::spawn(async move { backend.change_replicas(request.0).await }).await)
}

async fn scrubs(State(backend): State<Arc<dyn Backend>>) -> Response {
    answer(Ok(backend.scrubs().await))
}

async fn scrub(State(backend): State<Arc<dyn Backend>>, command: axum::Json<ScrubCommand>) -> Response {
    answer(tokio::spawn(async move { backend.scrub(command.0).await }).await)
}

async fn fsck(State(backend): State<Arc<dyn Backend>>, request: axum::Json<FsckRequest>) -> Response {
    // Not in a task of its own: it ends with the command that asked for it.
    answer(Ok(backend.fsck(request.0).await))
}

fn answer<T: serde::Serialize>(outcome: Result<Result<T, Failure>, tokio::task::JoinError>) -> Response {
    match outcome {
        Ok(Ok(value)) => axum::Json(value).into_response(),
        Ok(Err(failure)) => refuse(StatusCode::CONFLICT, &failure),
        Err(error) => {
            let failure = Failure::new(Exit::Failure, format!("it broke off: {error}"));
            refuse(StatusCode::INTERNAL_SERVER_ERROR, &failure)
        }
    }
}

async fn metrics(State(backend): State<Arc<dyn Backend>>) -> Response {
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], backend.metrics().await).into_response()
}

async fn unknown() -> Response {
    // An older daemon that a newer command talks to.
    let version = env!("CARGO_PKG_VERSION");
    let message =
        format!("the daemon (version {version}) does not know this request; remount to run this version");
    refuse(StatusCode::NOT_FOUND, &Failure::new(Exit::Failure, message))
}

fn refuse(code: StatusCode, failure: &Failure) -> Response {
    (code, axum::Json(failure)).into_response()
}

async fn sync(State(backend): State<Arc<dyn Backend>>, request: axum::Json<SyncRequest>) -> Response {
    let (lines, receiver) = mpsc::channel::<SyncEvent>(1);
    tokio::spawn(run_sync(backend, request.0, lines));
    let stream = futures::stream::unfold(receiver, |mut receiver| async move {
        let event = receiver.recv().await?;
        Some((line(&event), receiver))
    });
    let stream: BoxStream<'static, _> = stream.boxed();
    ([(header::CONTENT_TYPE, "application/x-ndjson")], Body::from_stream(stream)).into_response()
}

/// Drives one sync and turns it into lines. Ends early, dropping the sync, when nobody reads the lines any more.
async fn run_sync(backend: Arc<dyn Backend>, request: SyncRequest, lines: mpsc::Sender<SyncEvent>) {
    let (progress, mut changes) = watch::channel(SyncProgress::default());
    let work = backend.sync(request, progress).fuse();
    let deadline = async {
        match request.timeout_seconds.and_then(|s| Duration::try_from_secs_f64(s).ok()) {
            Some(time) => tokio::time::sleep(time).await,
            None => std::future::pending().await,
        }
    };
    let (mut work, mut deadline) = (std::pin::pin!(work), std::pin::pin!(deadline));
    let mut open = true;
    loop {
        let pause = async {
            tokio::time::sleep(PACE).await;
            if open {
                // The sender lives as long as the backend likes; when it is gone only signs of life are left to send.
                let alive = tokio::time::timeout(SIGN_OF_LIFE - PACE, changes.changed()).await;
                open = !matches!(alive, Ok(Err(_)));
            } else {
                tokio::time::sleep(SIGN_OF_LIFE - PACE).await;
            }
        };
        let last = tokio::select! {
            biased;
            outcome = &mut work => Some(match outcome {
                Ok(done) => SyncEvent::Done(done),
                Err(failure) => SyncEvent::Failed(failure),
            }),
            () = &mut deadline => Some(SyncEvent::Failed(gave_up(&changes.borrow()))),
            () = lines.closed() => return,
            () = pause => None,
        };
        let over = last.is_some();
        let event = last.unwrap_or_else(|| SyncEvent::Progress(changes.borrow_and_update().clone()));
        if lines.send(event).await.is_err() || over {
            return;
        }
    }
}

fn gave_up(progress: &SyncProgress) -> Failure {
    let waiting: Vec<String> = progress
        .replicas
        .iter()
        .filter(|r| !r.done)
        .map(|r| match &r.error {
            Some(error) => format!("{} ({})", r.name, reason(&r.name, error)),
            None => r.name.to_string(),
        })
        .collect();
    let missing = match &progress.error {
        Some(error) => format!("; it cannot be sealed: {error}"),
        None if waiting.is_empty() => String::new(),
        None => format!("; waiting for {}", waiting.join(", ")),
    };
    Failure::new(
        Exit::TimedOut,
        format!(
            "gave up waiting: {} of {} replicas hold everything{missing}; sending goes on in the background",
            progress.done, progress.needed
        ),
    )
}

fn line(event: &SyncEvent) -> Result<Vec<u8>, serde_json::Error> {
    let mut line = serde_json::to_vec(event)?;
    line.push(b'\n');
    Ok(line)
}
