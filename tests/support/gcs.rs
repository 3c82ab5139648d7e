//! A double of the XML interface of Google Cloud Storage.
//!
//! **It says what we believe of GCS, and no more**: no emulator that object_store can talk to exists. It answers what
//! object_store's client asks: put (with `x-goog-if-generation-match`), get with ranges, head, delete, list by pages, and
//! multipart uploads. Objects live in memory.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use http_body_util::BodyExt;
use hyper::body::Incoming;
use hyper::{Method, Request, Response, StatusCode};
use mirrorfs::replica::{ReplicaSpec, Store};

use super::http::{Body, Handler, HttpServer, full};

/// The bucket that exists.
pub const BUCKET: &str = "bucket";
/// The token that is accepted.
pub const TOKEN: &str = "test-token";
/// Objects on a page of a listing, small so that paging is exercised.
const PAGE: usize = 5;
const WHEN_HTTP: &str = "Fri, 20 Nov 2026 12:00:00 GMT";
const WHEN_ISO: &str = "2026-11-20T12:00:00.000Z";

#[derive(Default)]
struct Bucket {
    objects: BTreeMap<String, (Bytes, u64)>,
    uploads: BTreeMap<String, BTreeMap<u32, Bytes>>,
    generation: u64,
}

/// The double, with one bucket, empty at first.
pub struct GcsDouble {
    /// The server, to stop and restart; objects stay.
    pub http: HttpServer,
    bucket: Arc<Mutex<Bucket>>,
}

impl GcsDouble {
    /// Starts it.
    pub fn start() -> Self {
        let bucket: Arc<Mutex<Bucket>> = Arc::default();
        let shared = Arc::clone(&bucket);
        let handler: Handler = Arc::new(move |request| {
            let bucket = Arc::clone(&shared);
            Box::pin(answer(bucket, request))
        });
        Self { http: HttpServer::start(handler), bucket }
    }

    /// Flips one bit of an object; `path` is its full name in the bucket.
    pub fn flip_bit(&self, path: &str, bit: usize) {
        let mut bucket = self.bucket.lock().unwrap();
        let (body, _) = bucket.objects.get_mut(path).unwrap();
        let mut bytes = body.to_vec();
        bytes[bit / 8] ^= 1 << (bit % 8);
        *body = bytes.into();
    }

    /// A replica on this server, below `prefix`, with more options.
    pub fn spec(&self, name: &str, prefix: &str, more: &[(&str, &str)]) -> ReplicaSpec {
        let url = self.http.url();
        let mut options = vec![("base_url", url.as_str()), ("bearer_token", TOKEN), ("allow_http", "true")];
        options.retain(|(k, _)| !more.iter().any(|(m, _)| m == k));
        options.extend(more);
        super::spec(name, &format!("gs://{BUCKET}/{prefix}"), &options)
    }

    /// The store of such a replica.
    pub fn store(&self, prefix: &str) -> Store {
        self.spec("gcs", prefix, &[]).store().unwrap()
    }
}

fn plain(status: StatusCode, text: String) -> Response<Body> {
    let mut answer = Response::new(full(text));
    *answer.status_mut() = status;
    answer
}

fn error(status: StatusCode, code: &str) -> Response<Body> {
    plain(status, format!("<?xml version='1.0'?><Error><Code>{code}</Code><Message>double</Message></Error>"))
}

/// Undoes percent-encoding.
fn decode(text: &str) -> String {
    percent(&text.replace('+', " "))
}

fn percent(text: &str) -> String {
    let mut out = Vec::new();
    let mut bytes = text.bytes();
    while let Some(b) = bytes.next() {
        if b == b'%' {
            let hex: Vec<u8> = bytes.by_ref().take(2).collect();
            out.push(u8::from_str_radix(std::str::from_utf8(&hex).unwrap(), 16).unwrap());
        } else {
            out.push(b);
        }
    }
    String::from_utf8(out).unwrap()
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

fn stored(mut answer: Response<Body>, generation: u64) -> Response<Body> {
    let headers = answer.headers_mut();
    headers.insert("etag", format!("\"{generation}\"").parse().unwrap());
    headers.insert("x-goog-generation", generation.to_string().parse().unwrap());
    headers.insert("last-modified", WHEN_HTTP.parse().unwrap());
    answer
}

async fn answer(bucket: Arc<Mutex<Bucket>>, request: Request<Incoming>) -> Response<Body> {
    let (head, body) = request.into_parts();
    // Like a real server, it takes the whole request before it judges it.
    let Ok(body) = body.collect().await else {
        return error(StatusCode::BAD_REQUEST, "IncompleteBody");
    };
    let body = body.to_bytes();
    let header = |name: &str| head.headers.get(name).and_then(|v| v.to_str().ok());
    if header("authorization") != Some(&format!("Bearer {TOKEN}")) {
        return error(StatusCode::UNAUTHORIZED, "AuthenticationRequired");
    }
    let path = head.uri.path().trim_start_matches('/');
    let (name, key) = path.split_once('/').unwrap_or((path, ""));
    if percent(name) != BUCKET {
        return error(StatusCode::NOT_FOUND, "NoSuchBucket");
    }
    let key = percent(key);
    let query: BTreeMap<String, String> = head
        .uri
        .query()
        .unwrap_or_default()
        .split('&')
        .filter_map(|pair| pair.split_once('='))
        .map(|(k, v)| (decode(k), decode(v)))
        .collect();
    let mut bucket = bucket.lock().unwrap();
    let upload = query.get("uploadId").cloned();
    match (&head.method, upload) {
        (&Method::GET, _) if key.is_empty() => list(&bucket, &query),
        (&Method::PUT, None) => {
            if header("x-goog-if-generation-match") == Some("0") && bucket.objects.contains_key(&key) {
                return error(StatusCode::PRECONDITION_FAILED, "PreconditionFailed");
            }
            put(&mut bucket, key, body, String::new())
        }
        (&Method::POST, None) if head.uri.query().is_some_and(|q| q.starts_with("uploads")) => {
            bucket.generation += 1;
            let id = format!("upload-{}", bucket.generation);
            bucket.uploads.insert(id.clone(), BTreeMap::new());
            let text = format!(
                "<InitiateMultipartUploadResult><UploadId>{id}</UploadId></InitiateMultipartUploadResult>"
            );
            plain(StatusCode::OK, text)
        }
        (&Method::PUT, Some(id)) => {
            let number: u32 = query.get("partNumber").unwrap().parse().unwrap();
            let Some(parts) = bucket.uploads.get_mut(&id) else {
                return error(StatusCode::NOT_FOUND, "NoSuchUpload");
            };
            parts.insert(number, body);
            stored(plain(StatusCode::OK, String::new()), u64::from(number))
        }
        (&Method::POST, Some(id)) => {
            let Some(parts) = bucket.uploads.remove(&id) else {
                return error(StatusCode::NOT_FOUND, "NoSuchUpload");
            };
            let whole: Vec<u8> = parts.into_values().flatten().collect();
            let text =
                "<CompleteMultipartUploadResult><ETag>\"whole\"</ETag></CompleteMultipartUploadResult>";
            put(&mut bucket, key, whole.into(), text.to_owned())
        }
        (&Method::DELETE, Some(id)) => {
            bucket.uploads.remove(&id);
            plain(StatusCode::NO_CONTENT, String::new())
        }
        (&Method::DELETE, None) => match bucket.objects.remove(&key) {
            Some(_) => plain(StatusCode::NO_CONTENT, String::new()),
            None => error(StatusCode::NOT_FOUND, "NoSuchKey"),
        },
        (&Method::GET | &Method::HEAD, _) => match bucket.objects.get(&key) {
            Some((body, generation)) => {
                stored(get(body, header("range"), head.method == Method::HEAD), *generation)
            }
            None => error(StatusCode::NOT_FOUND, "NoSuchKey"),
        },
        _ => error(StatusCode::NOT_IMPLEMENTED, "NotImplemented"),
    }
}

fn put(bucket: &mut Bucket, key: String, body: Bytes, text: String) -> Response<Body> {
    bucket.generation += 1;
    let generation = bucket.generation;
    bucket.objects.insert(key, (body, generation));
    stored(plain(StatusCode::OK, text), generation)
}

fn get(body: &Bytes, range: Option<&str>, head: bool) -> Response<Body> {
    let len = body.len();
    let Some(range) = range.and_then(|r| r.strip_prefix("bytes=")) else {
        let mut answer = Response::new(full(if head { Bytes::new() } else { body.clone() }));
        answer.headers_mut().insert("content-length", len.into());
        return answer;
    };
    let (start, end) = range.split_once('-').unwrap();
    let start: usize = start.parse().unwrap();
    let end = end.parse().map_or(len, |e: usize| (e + 1).min(len));
    if start >= len {
        return error(StatusCode::RANGE_NOT_SATISFIABLE, "InvalidRange");
    }
    let mut answer = Response::new(full(body.slice(start..end)));
    *answer.status_mut() = StatusCode::PARTIAL_CONTENT;
    let range = format!("bytes {start}-{}/{len}", end - 1);
    answer.headers_mut().insert("content-range", range.parse().unwrap());
    answer
}

fn list(bucket: &Bucket, query: &BTreeMap<String, String>) -> Response<Body> {
    let prefix = query.get("prefix").map_or("", String::as_str);
    let after = query.get("continuation-token").or(query.get("start-after")).cloned().unwrap_or_default();
    let mut found = bucket
        .objects
        .iter()
        .filter(|(k, _)| k.starts_with(prefix) && k.as_str() > after.as_str())
        .peekable();
    let mut text = String::from("<?xml version='1.0'?><ListBucketResult>");
    let mut last = String::new();
    for (key, (body, generation)) in found.by_ref().take(PAGE) {
        text += &format!(
            "<Contents><Key>{}</Key><Size>{}</Size><LastModified>{WHEN_ISO}</LastModified>\
             <ETag>\"{generation}\"</ETag></Contents>",
            escape(key),
            body.len()
        );
        last.clone_from(key);
    }
    if found.peek().is_some() {
        text += &format!("<NextContinuationToken>{}</NextContinuationToken>", escape(&last));
    }
    plain(StatusCode::OK, text + "</ListBucketResult>")
}
