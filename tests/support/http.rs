//! A small HTTP/1.1 server for test doubles.
//!
//! Owns the listening socket and its connections; what is answered is the handler's business. Stopping cuts every connection.

use std::convert::Infallible;
use std::future::Future;
use std::net::{Ipv4Addr, SocketAddr};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::{Request, Response};
use tokio::net::{TcpListener, TcpSocket};
use tokio::runtime::Runtime;

/// An error of a streamed body.
pub type BodyError = Box<dyn std::error::Error + Send + Sync>;
/// Any body.
pub type Body = UnsyncBoxBody<Bytes, BodyError>;
/// What answers requests.
pub type Handler =
    Arc<dyn Fn(Request<Incoming>) -> Pin<Box<dyn Future<Output = Response<Body>> + Send>> + Send + Sync>;

/// A body of known bytes.
pub fn full(bytes: impl Into<Bytes>) -> Body {
    Full::new(bytes.into()).map_err(|never| match never {}).boxed_unsync()
}

/// A server on a port of its own.
pub struct HttpServer {
    addr: SocketAddr,
    handler: Handler,
    frozen: Arc<AtomicBool>,
    runtime: Option<Runtime>,
}

impl HttpServer {
    /// Starts on a free port of 127.0.0.1.
    pub fn start(handler: Handler) -> Self {
        let addr = (Ipv4Addr::LOCALHOST, 0).into();
        let mut server = Self { addr, handler, frozen: Arc::default(), runtime: None };
        server.restart();
        server
    }

    /// Its URL.
    pub fn url(&self) -> String {
        format!("http://{}", self.addr)
    }

    /// Where it listens.
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// Takes connections and requests and answers none of them, as a stopped process would; or goes on.
    pub fn hang(&self, hang: bool) {
        self.frozen.store(hang, Ordering::Relaxed);
    }

    /// Cuts all connections and stops listening: later connections are refused.
    pub fn stop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }

    /// Starts again, on the same port when it ran before.
    pub fn restart(&mut self) {
        self.stop();
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let addr = self.addr;
        let listening = async move {
            for _ in 0..200 {
                let socket = TcpSocket::new_v4().unwrap();
                socket.set_reuseaddr(true).unwrap();
                if socket.bind(addr).is_ok()
                    && let Ok(listener) = socket.listen(256)
                {
                    return listener;
                }
                // The old listener goes away when its task is dropped, a moment after the stop.
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            panic!("port of {addr} stays taken");
        };
        // The caller may be inside a runtime, where blocking is forbidden: another thread waits.
        let (runtime, listener) = std::thread::spawn(move || {
            let listener = runtime.block_on(listening);
            (runtime, listener)
        })
        .join()
        .unwrap();
        self.addr = listener.local_addr().unwrap();
        runtime.spawn(serve(listener, Arc::clone(&self.handler), Arc::clone(&self.frozen)));
        self.runtime = Some(runtime);
    }
}

impl Drop for HttpServer {
    fn drop(&mut self) {
        self.stop();
    }
}

async fn serve(listener: TcpListener, handler: Handler, frozen: Arc<AtomicBool>) {
    loop {
        let Ok((stream, _)) = listener.accept().await else { continue };
        let _ = stream.set_nodelay(true);
        let (handler, frozen) = (Arc::clone(&handler), Arc::clone(&frozen));
        tokio::spawn(async move {
            let service = hyper::service::service_fn(move |request| {
                let (handler, frozen) = (Arc::clone(&handler), Arc::clone(&frozen));
                async move {
                    while frozen.load(Ordering::Relaxed) {
                        tokio::time::sleep(Duration::from_millis(10)).await;
                    }
                    Ok::<_, Infallible>(handler(request).await)
                }
            });
            let io = hyper_util::rt::TokioIo::new(stream);
            let _ = hyper::server::conn::http1::Builder::new().serve_connection(io, service).await;
        });
    }
}
