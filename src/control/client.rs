//! A command's side of control: asks the daemon whose state folder is known.
//!
//! Every call has a deadline or, for a sync, a longest silence, so that a daemon that hangs cannot hang the command.

use std::path::{Path, PathBuf};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;

use super::replicas::{FsckRequest, ReplicaEntry, ReplicaRequest, ScrubCommand};
use super::server::SOCKET;
use super::socket;
use super::types::{Failure, ShutdownRequest, Status, SyncEvent, SyncProgress, SyncRequest};
use crate::exit::Exit;
use crate::fsck::Report;
use crate::reconcile::ScrubStatus;

/// An answer that needs no network is expected within this time.
const QUICK: Duration = Duration::from_secs(10);
/// A new replica is tried out, with the deadlines of its own calls.
const CHANGE: Duration = Duration::from_secs(180);
/// A shutdown flushes and seals, which may take its time on a slow disk, and may wait for replicas.
const SHUTDOWN: Duration = Duration::from_secs(600);
/// A check reads all tables, and replicas if asked.
const CHECK: Duration = Duration::from_secs(24 * 3600);
/// The longest silence within a sync; the server sends a sign of life every two seconds.
const SILENCE: Duration = Duration::from_secs(30);

/// Memory that an answer may take: that of a check with all its findings is the longest.
const LONGEST_ANSWER: usize = 256 << 20;
/// The same of one line of a sync's progress.
const LONGEST_LINE: usize = 1 << 20;

/// Why a question was not answered.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody listens: there is no daemon.
    #[error("no daemon answers at {}: {error}", socket.display())]
    NoDaemon {
        /// The socket tried.
        socket: PathBuf,
        /// What the system said.
        error: std::io::Error,
    },
    /// Another user listens there, who may have put the socket in the daemon's place. Nothing was
    /// sent.
    #[error(
        "{} is served by user {peer}, not by user {owner} whose volume it is, and was asked nothing; see who runs \
         it with: fuser -v {}", socket.display(), socket.display()
    )]
    Stranger {
        /// The socket tried.
        socket: PathBuf,
        /// Who listens.
        peer: u32,
        /// Who should.
        owner: u32,
    },
    /// The daemon took the question and did not answer in time or not in full.
    #[error("the daemon does not answer as it should: {detail}; see daemon.log in its state folder")]
    Broken {
        /// What happened.
        detail: String,
    },
    /// The daemon refused or failed.
    #[error(transparent)]
    Failed(#[from] Failure),
}

impl ClientError {
    /// The code with which a command ends because of it.
    #[must_use]
    pub fn exit_code(&self) -> Exit {
        match self {
            ClientError::NoDaemon { .. } | ClientError::Stranger { .. } | ClientError::Broken { .. } => {
                Exit::NotMounted
            }
            ClientError::Failed(failure) => failure.exit,
        }
    }
}

/// Asks one daemon. Each question uses a connection of its own.
#[derive(Clone, Debug)]
pub struct Client {
    socket: PathBuf,
    owner: u32,
}

impl Client {
    /// For the daemon of user `owner` that uses the state folder `state`; nothing is sent yet.
    #[must_use]
    pub fn new(state: &Path, owner: u32) -> Client {
        Client { socket: state.join(SOCKET), owner }
    }

    /// The state of things.
    pub async fn status(&self) -> Result<Status, ClientError> {
        self.get("/status").await
    }

    /// The numbers for Prometheus.
    pub async fn metrics(&self) -> Result<String, ClientError> {
        let bytes = self.whole(Method::GET, "/metrics", Vec::new(), QUICK).await?;
        String::from_utf8(bytes.to_vec()).map_err(broken)
    }

    /// The replicas, in their order.
    pub async fn replicas(&self) -> Result<Vec<ReplicaEntry>, ClientError> {
        self.get("/replicas").await
    }

    /// Changes the list of replicas; the list as it is then.
    pub async fn change_replicas(&self, request: &ReplicaRequest) -> Result<Vec<ReplicaEntry>, ClientError> {
        self.post("/replicas", request, CHANGE).await
    }

    /// What is done to look after the replicas.
    pub async fn scrubs(&self) -> Result<Vec<ScrubStatus>, ClientError> {
        self.get("/scrub").await
    }

    /// Begins, pauses, resumes or stops passes over replicas.
    pub async fn scrub(&self, command: &ScrubCommand) -> Result<Vec<ScrubStatus>, ClientError> {
        self.post("/scrub", command, QUICK).await
    }

    /// Checks the volume as it is now. Dropping the future ends the check.
    pub async fn fsck(&self, request: &FsckRequest) -> Result<Report, ClientError> {
        self.post("/fsck", request, CHECK).await
    }

    /// Asks for a flush, seal and unmount; the last status when it is done.
    pub async fn shutdown(&self, request: ShutdownRequest) -> Result<Status, ClientError> {
        self.post("/shutdown", &request, SHUTDOWN).await
    }

    /// Asks for a read-only mount to be made anew, writable; it is unmounted when this returns.
    pub async fn reopen(&self) -> Result<(), ClientError> {
        self.whole(Method::POST, "/reopen", Vec::new(), SHUTDOWN).await.map(drop)
    }

    /// Syncs, and shows each step to `watch`. Dropping the future ends only the waiting.
    pub async fn sync(
        &self,
        request: SyncRequest,
        mut watch: impl FnMut(&SyncProgress),
    ) -> Result<SyncProgress, ClientError> {
        let body = serde_json::to_vec(&request).map_err(broken)?;
        let mut response = within(SILENCE, self.ask(Method::POST, "/sync", body)).await?;
        if response.status() != StatusCode::OK {
            let bytes = within(QUICK, body_of(response)).await?;
            return Err(failure(&bytes));
        }
        let mut buffer: Vec<u8> = Vec::new();
        loop {
            while let Some(end) = buffer.iter().position(|b| *b == b'\n') {
                let line: Vec<u8> = buffer.drain(..=end).collect();
                match serde_json::from_slice(&line).map_err(broken)? {
                    SyncEvent::Progress(progress) => watch(&progress),
                    SyncEvent::Done(progress) => return Ok(progress),
                    SyncEvent::Failed(failure) => return Err(failure.into()),
                }
            }
            let frame = within(SILENCE, async { response.frame().await.transpose().map_err(broken) }).await?;
            match frame {
                Some(_) if buffer.len() > LONGEST_LINE => return Err(broken("its lines do not end")),
                Some(frame) => buffer.extend(frame.into_data().unwrap_or_default()),
                None => return Err(broken("it ended before the sync was done")),
            }
        }
    }

    async fn get<A: DeserializeOwned>(&self, path: &str) -> Result<A, ClientError> {
        let bytes = self.whole(Method::GET, path, Vec::new(), QUICK).await?;
        serde_json::from_slice(&bytes).map_err(broken)
    }

    async fn post<A: DeserializeOwned>(
        &self,
        path: &str,
        request: &impl Serialize,
        time: Duration,
    ) -> Result<A, ClientError> {
        let body = serde_json::to_vec(request).map_err(broken)?;
        let bytes = self.whole(Method::POST, path, body, time).await?;
        serde_json::from_slice(&bytes).map_err(broken)
    }

    async fn whole(
        &self,
        method: Method,
        path: &str,
        body: Vec<u8>,
        time: Duration,
    ) -> Result<Bytes, ClientError> {
        let (status, bytes) = within(time, async {
            let response = self.ask(method, path, body).await?;
            let status = response.status();
            Ok((status, body_of(response).await?))
        })
        .await?;
        if status == StatusCode::OK { Ok(bytes) } else { Err(failure(&bytes)) }
    }

    async fn ask(
        &self,
        method: Method,
        path: &str,
        body: Vec<u8>,
    ) -> Result<Response<Incoming>, ClientError> {
        let absent = |error| ClientError::NoDaemon { socket: self.socket.clone(), error };
        let (short, _folder) = socket::short(&self.socket).map_err(absent)?;
        let stream = UnixStream::connect(&short).await.map_err(absent)?;
        // The path comes from a file that the owner wrote, and may lead to any socket of this
        // machine.
        let peer = stream.peer_cred().map_err(absent)?.uid();
        if peer != self.owner {
            return Err(ClientError::Stranger { socket: self.socket.clone(), peer, owner: self.owner });
        }
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(broken)?;
        tokio::spawn(async move {
            if let Err(error) = connection.await {
                log::debug!("control connection: {error}");
            }
        });
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header("host", "mirrorfs")
            .header("content-type", "application/json")
            .body(Full::new(Bytes::from(body)))
            .map_err(broken)?;
        sender.send_request(request).await.map_err(broken)
    }
}

async fn body_of(response: Response<Incoming>) -> Result<Bytes, ClientError> {
    let body = Limited::new(response.into_body(), LONGEST_ANSWER);
    Ok(body.collect().await.map_err(broken)?.to_bytes())
}

async fn within<T>(
    time: Duration,
    work: impl Future<Output = Result<T, ClientError>>,
) -> Result<T, ClientError> {
    tokio::time::timeout(time, work)
        .await
        .unwrap_or_else(|_| Err(broken(format!("no answer for {} s", time.as_secs()))))
}

fn failure(body: &[u8]) -> ClientError {
    match serde_json::from_slice::<Failure>(body) {
        Ok(failure) => failure.into(),
        Err(_) => broken(String::from_utf8_lossy(body)),
    }
}

fn broken(detail: impl std::fmt::Display) -> ClientError {
    ClientError::Broken { detail: detail.to_string() }
}
