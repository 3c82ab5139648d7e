//! An S3 server in the test process: s3s over a temporary folder, with signatures checked.
//!
//! Owns one bucket and one key pair. s3s-fs lets several conditional creations of one key win, so writes of a key take turns here.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use http_body_util::BodyExt;
use hyper::Response;
use mirrorfs::replica::{ReplicaSpec, Store};
use s3s::auth::SimpleAuth;
use s3s::service::S3ServiceBuilder;

use super::http::{Handler, HttpServer, full};

/// The bucket that exists.
pub const BUCKET: &str = "bucket";
/// The key pair that is accepted.
pub const ACCESS: &str = "test-access";
/// Its secret.
pub const SECRET: &str = "test-secret";

/// An S3 server with one bucket, empty at first.
pub struct S3Server {
    /// The server, to stop and restart; objects stay.
    pub http: HttpServer,
    dir: tempfile::TempDir,
}

impl S3Server {
    /// Starts it.
    pub fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join(BUCKET)).unwrap();
        let files = s3s_fs::FileSystem::new(dir.path()).unwrap();
        let mut service = S3ServiceBuilder::new(files);
        service.set_auth(SimpleAuth::from_single(ACCESS, SECRET));
        let service = service.build();
        let turns: Arc<Mutex<HashMap<String, Arc<tokio::sync::Mutex<()>>>>> = Arc::default();
        let handler: Handler = Arc::new(move |request| {
            let service = service.clone();
            let turn = (request.method() == hyper::Method::PUT).then(|| {
                let key = request.uri().path().to_owned();
                Arc::clone(turns.lock().unwrap().entry(key).or_default())
            });
            Box::pin(async move {
                let _turn = match &turn {
                    Some(turn) => Some(turn.lock().await),
                    None => None,
                };
                match service.call(request.map(s3s::Body::from)).await {
                    Ok(answer) => answer.map(|body| body.map_err(Into::into).boxed_unsync()),
                    Err(e) => {
                        let mut answer = Response::new(full(format!("{e:?}")));
                        *answer.status_mut() = hyper::StatusCode::INTERNAL_SERVER_ERROR;
                        answer
                    }
                }
            })
        });
        Self { http: HttpServer::start(handler), dir }
    }

    /// The folder in which the bucket's objects lie as files, to damage them.
    pub fn bucket_dir(&self) -> PathBuf {
        self.dir.path().join(BUCKET)
    }

    /// The options of a replica that reaches this server through `endpoint`.
    pub fn options(endpoint: &str) -> Vec<(String, String)> {
        [
            ("endpoint", endpoint),
            ("access_key_id", ACCESS),
            ("secret_access_key", SECRET),
            ("region", "us-east-1"),
            ("allow_http", "true"),
        ]
        .map(|(k, v)| (k.to_owned(), v.to_owned()))
        .to_vec()
    }

    /// A replica on this server, below `prefix`, with more options.
    pub fn spec(&self, name: &str, prefix: &str, more: &[(&str, &str)]) -> ReplicaSpec {
        let mut options = Self::options(&self.http.url());
        options.extend(more.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())));
        ReplicaSpec::parse(
            name.parse().unwrap(),
            &format!("s3://{BUCKET}/{prefix}"),
            options.into_iter().collect(),
            std::path::Path::new("/"),
        )
        .unwrap()
    }

    /// The store of such a replica.
    pub fn store(&self, prefix: &str) -> Store {
        self.spec("s3", prefix, &[]).store().unwrap()
    }
}
