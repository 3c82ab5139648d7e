//! A TCP proxy that misbehaves on command.
//!
//! Owns the connections that pass through it; knows no protocol. Used between a client and a server on loopback.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::Runtime;

/// What the proxy does to connections; changed while they run.
#[derive(Default)]
pub struct Faults {
    /// Milliseconds that each piece of data is held back, each way.
    pub latency_ms: AtomicU64,
    /// Bytes per second and direction; 0 is no limit.
    pub rate: AtomicU64,
    /// Swallow everything, answer nothing, keep connections open.
    pub blackhole: AtomicBool,
    /// Close new connections at once.
    pub refuse: AtomicBool,
    /// Cut each connection after this many bytes of answers; negative is never.
    pub cut_after: AtomicI64,
    /// So many answers are still to be lost: the request passes, the connection ends where the answer would begin.
    pub lost_answers: AtomicU64,
    /// Connections accepted so far.
    pub connections: AtomicU64,
}

/// The proxy, running until dropped.
pub struct Proxy {
    addr: SocketAddr,
    /// What it does.
    pub faults: Arc<Faults>,
    runtime: Option<Runtime>,
}

impl Proxy {
    /// Starts a proxy before `target`, faultless at first.
    pub fn start(target: SocketAddr) -> Self {
        let faults = Arc::new(Faults::default());
        faults.cut_after.store(-1, Ordering::Relaxed);
        let listener = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        listener.set_nonblocking(true).unwrap();
        let addr = listener.local_addr().unwrap();
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let shared = Arc::clone(&faults);
        runtime.spawn(async move {
            let listener = TcpListener::from_std(listener).unwrap();
            loop {
                let Ok((client, _)) = listener.accept().await else { continue };
                shared.connections.fetch_add(1, Ordering::Relaxed);
                if !shared.refuse.load(Ordering::Relaxed) {
                    tokio::spawn(connection(client, target, Arc::clone(&shared)));
                }
            }
        });
        Self { addr, faults, runtime: Some(runtime) }
    }

    /// Its URL.
    pub fn url(&self) -> String {
        format!("http://{}", self.addr)
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

async fn connection(client: TcpStream, target: SocketAddr, faults: Arc<Faults>) {
    let Ok(server) = TcpStream::connect(target).await else { return };
    let _ = (client.set_nodelay(true), server.set_nodelay(true));
    let (client_read, client_write) = client.into_split();
    let (server_read, server_write) = server.into_split();
    // When either way ends, both do.
    tokio::select! {
        () = pump(client_read, server_write, &faults, false) => {}
        () = pump(server_read, client_write, &faults, true) => {}
    }
}

async fn pump(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    faults: &Faults,
    answers: bool,
) {
    let mut buffer = vec![0; 16 * 1024];
    let mut passed: i64 = 0;
    loop {
        let n = match from.read(&mut buffer).await {
            Ok(0) | Err(_) => return,
            Ok(n) => n,
        };
        while faults.blackhole.load(Ordering::Relaxed) {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        let mut n = n;
        if answers {
            let lost =
                faults.lost_answers.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| n.checked_sub(1));
            if lost.is_ok() {
                return;
            }
            let cut = faults.cut_after.load(Ordering::Relaxed);
            if cut >= 0 {
                n = n.min(usize::try_from(cut - passed).unwrap_or(0));
            }
        }
        let latency = faults.latency_ms.load(Ordering::Relaxed);
        if latency > 0 {
            tokio::time::sleep(Duration::from_millis(latency)).await;
        }
        let rate = faults.rate.load(Ordering::Relaxed);
        if rate > 0 {
            tokio::time::sleep(Duration::from_secs_f64(n as f64 / rate as f64)).await;
        }
        if n == 0 || to.write_all(&buffer[..n]).await.is_err() {
            return;
        }
        passed += n as i64;
    }
}
