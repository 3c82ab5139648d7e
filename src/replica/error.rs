//! What can go wrong with an object on a replica, in classes that callers decide by.
//!
//! Owns the mapping from object_store's errors (and what lies beneath them: HTTP answers, I/O errors) to [`ErrorKind`]. Knows no
//! operation and retries nothing.

use std::error::Error as StdError;
use std::fmt;

use object_store::client::{HttpError, HttpErrorKind};

use crate::ids::ReplicaName;

/// What kind of failure it was; this, not the text, is what callers decide by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ErrorKind {
    /// The replica answered: there is no such object (or, for a staged file, it is gone from local disk).
    Absent,
    /// The replica answered: the object exists already.
    Exists,
    /// Something that may pass: a refused connection, a 5xx answer, throttling.
    Transient,
    /// No answer within the deadline. The operation may or may not have taken effect.
    Timeout,
    /// The replica refused the credentials, or the operating system the permission.
    Denied,
    /// The answer contradicts what was stored: too short, wrong size, wrong checksum.
    Corrupt,
    /// No space is left there.
    Full,
    /// The backend cannot do it (such as conditional creation).
    Unsupported,
    /// The place itself is wrong: no such bucket or folder, a bad endpoint, a bad name.
    Config,
}

impl ErrorKind {
    /// Whether the same call may succeed later without anybody changing anything.
    #[must_use]
    pub fn is_passing(self) -> bool {
        matches!(self, ErrorKind::Transient | ErrorKind::Timeout)
    }

    /// What a person can do about it; empty when there is nothing to add.
    fn remedy(self) -> &'static str {
        match self {
            ErrorKind::Denied => "; check the replica's credentials and permissions",
            ErrorKind::Full => "; free space there or move the replica",
            ErrorKind::Unsupported => "; see the documentation on backends",
            ErrorKind::Config => "; check the replica's URL and options",
            ErrorKind::Transient | ErrorKind::Timeout => "; this may pass by itself",
            ErrorKind::Absent | ErrorKind::Exists | ErrorKind::Corrupt => "",
        }
    }
}

impl fmt::Display for ErrorKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            ErrorKind::Absent => "not there",
            ErrorKind::Exists => "exists already",
            ErrorKind::Transient => "temporary failure",
            ErrorKind::Timeout => "no answer in time",
            ErrorKind::Denied => "access denied",
            ErrorKind::Corrupt => "damaged answer",
            ErrorKind::Full => "no space left",
            ErrorKind::Unsupported => "not supported",
            ErrorKind::Config => "wrong place or options",
        })
    }
}

/// A failed operation on one object of one replica.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoreError {
    /// The replica.
    pub replica: ReplicaName,
    /// The operation, such as `get`.
    pub op: &'static str,
    /// The object, relative to the replica's root; empty for the replica as a whole.
    pub object: String,
    /// The class of the failure.
    pub kind: ErrorKind,
    /// What the backend said, in one line, without secrets.
    pub detail: String,
}

impl fmt::Display for StoreError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "replica {}: {}", self.replica, self.op)?;
        if !self.object.is_empty() {
            write!(f, " {}", self.object)?;
        }
        write!(f, ": {}", self.kind)?;
        if !self.detail.is_empty() {
            write!(f, " ({})", self.detail)?;
        }
        f.write_str(self.kind.remedy())
    }
}

impl StdError for StoreError {}

/// An error of our own wrappers that carries its class through object_store's error type.
#[derive(Clone, Debug)]
pub(super) struct Classed {
    /// The class it has.
    pub kind: ErrorKind,
    /// What to say.
    pub detail: String,
}

impl fmt::Display for Classed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.detail)
    }
}

impl StdError for Classed {}

impl Classed {
    /// Wraps it the way a backend would report it.
    pub fn into_object_store(self, path: &object_store::path::Path) -> object_store::Error {
        let path = path.to_string();
        let source = Box::new(self.clone());
        match self.kind {
            ErrorKind::Absent => object_store::Error::NotFound { path, source },
            ErrorKind::Exists => object_store::Error::AlreadyExists { path, source },
            ErrorKind::Denied => object_store::Error::PermissionDenied { path, source },
            _ => object_store::Error::Generic { store: "mirrorfs", source },
        }
    }
}

/// The class of an object_store error.
pub(super) fn classify(error: &object_store::Error) -> ErrorKind {
    if let Some(kind) = beneath(error) {
        return kind;
    }
    match error {
        object_store::Error::NotFound { .. } => ErrorKind::Absent,
        object_store::Error::AlreadyExists { .. } | object_store::Error::Precondition { .. } => {
            ErrorKind::Exists
        }
        object_store::Error::PermissionDenied { .. } | object_store::Error::Unauthenticated { .. } => {
            ErrorKind::Denied
        }
        object_store::Error::NotSupported { .. } | object_store::Error::NotImplemented { .. } => {
            ErrorKind::Unsupported
        }
        object_store::Error::InvalidPath { .. } | object_store::Error::UnknownConfigurationKey { .. } => {
            ErrorKind::Config
        }
        _ => by_text(&error.to_string()),
    }
}

/// What the errors beneath say, when they are of types that tell.
fn beneath(error: &object_store::Error) -> Option<ErrorKind> {
    let text = error.to_string();
    if let Some(kind) = by_code(&text) {
        return Some(kind);
    }
    let mut next: Option<&(dyn StdError + 'static)> = error.source();
    while let Some(e) = next {
        if let Some(c) = e.downcast_ref::<Classed>() {
            return Some(c.kind);
        }
        if let Some(h) = e.downcast_ref::<HttpError>() {
            return Some(match h.kind() {
                HttpErrorKind::Timeout => ErrorKind::Timeout,
                _ if h.to_string().contains("builder error") => ErrorKind::Config,
                _ => ErrorKind::Transient,
            });
        }
        if let Some(io) = e.downcast_ref::<std::io::Error>()
            && let Some(kind) = by_io(io)
        {
            return Some(kind);
        }
        next = e.source();
    }
    None
}

/// The class of an I/O error of a local folder; `None` when the wrapping error knows better.
fn by_io(io: &std::io::Error) -> Option<ErrorKind> {
    match io.raw_os_error()? {
        libc::ENOSPC | libc::EDQUOT | libc::EFBIG => Some(ErrorKind::Full),
        libc::EACCES | libc::EPERM | libc::EROFS => Some(ErrorKind::Denied),
        libc::ENOTDIR | libc::EISDIR | libc::ENAMETOOLONG | libc::ELOOP => Some(ErrorKind::Config),
        libc::ENOENT | libc::EEXIST => None,
        libc::ETIMEDOUT => Some(ErrorKind::Timeout),
        _ => Some(ErrorKind::Transient),
    }
}

/// The class of an error body's code, where the code says more than the status does.
fn by_code(text: &str) -> Option<ErrorKind> {
    const PLACE: [&str; 4] = ["NoSuchBucket", "ContainerNotFound", "InvalidBucketName", "PermanentRedirect"];
    const DENIED: [&str; 8] = [
        "InvalidAccessKeyId",
        "SignatureDoesNotMatch",
        "ExpiredToken",
        "InvalidToken",
        "AuthenticationFailed",
        "AuthorizationFailure",
        "InvalidAuthenticationInfo",
        "RequestTimeTooSkewed",
    ];
    const CORRUPT: [&str; 5] =
        ["BadDigest", "InvalidDigest", "Md5Mismatch", "XAmzContentSHA256Mismatch", "InvalidRange"];
    const FULL: [&str; 3] = ["QuotaExceeded", "InsufficientStorage", "XMinioStorageFull"];
    let has = |codes: &[&str]| codes.iter().any(|c| text.contains(c));
    if has(&PLACE) {
        Some(ErrorKind::Config)
    } else if has(&DENIED) {
        Some(ErrorKind::Denied)
    } else if has(&CORRUPT) {
        Some(ErrorKind::Corrupt)
    } else if has(&FULL) {
        Some(ErrorKind::Full)
    } else {
        None
    }
}

/// The class of an error known by its text only: an HTTP status, or words of object_store's own complaints.
fn by_text(text: &str) -> ErrorKind {
    if let Some(status) = status_of(text) {
        return match status {
            401 | 403 => ErrorKind::Denied,
            404 => ErrorKind::Absent,
            408 | 504 => ErrorKind::Timeout,
            409 | 412 => ErrorKind::Exists,
            416 => ErrorKind::Corrupt,
            501 | 505 => ErrorKind::Unsupported,
            507 => ErrorKind::Full,
            429 | 500..=599 => ErrorKind::Transient,
            _ => ErrorKind::Config,
        };
    }
    let lower = text.to_ascii_lowercase();
    if lower.contains("non-partial response") {
        ErrorKind::Unsupported
    } else if lower.contains("range") || lower.contains("content-length") {
        ErrorKind::Corrupt
    } else if lower.contains("redirect without location") || lower.contains("credential") {
        ErrorKind::Config
    } else {
        ErrorKind::Transient
    }
}

/// The HTTP status in object_store's text `... status code: 403 Forbidden ...`, as its error types are private.
fn status_of(text: &str) -> Option<u16> {
    let rest = text.split("status code: ").nth(1)?;
    rest.get(..3)?.parse().ok()
}

/// The text of an error and of what lies beneath, in one line of bounded length.
pub(super) fn one_line(error: &dyn StdError) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(e) = next {
        let more = e.to_string();
        if !text.contains(&more) {
            text.push_str(": ");
            text.push_str(&more);
        }
        next = e.source();
    }
    let mut line = without_retries(&text.split_whitespace().collect::<Vec<_>>().join(" "));
    if line.chars().count() > 400 {
        line = line.chars().take(400).collect::<String>() + "…";
    }
    line
}

/// The text without object_store's account of its retries, which would bury what went wrong.
fn without_retries(text: &str) -> String {
    const FROM: &str = ", after ";
    const LIMIT: &str = "retry_timeout: ";
    let cut = || {
        let (before, rest) = text.split_once(FROM)?;
        let (_, rest) = rest.split_once(LIMIT)?;
        let (_, after) = rest.split_once(' ')?;
        // The time it took stands before it: "... in 52.1ms, after 1 retries, max_retries: 1, retry_timeout: 15s - ...".
        let before = before.rsplit_once(" in ").map_or(before, |(before, _)| before);
        Some(format!("{before}: {}", after.trim_start_matches("- ")))
    };
    cut().unwrap_or_else(|| text.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn retries_are_not_told() {
        let text = "Generic S3 error: Error performing GET http://h/o in 52.1ms, after 1 retries, max_retries: 1, \
                    retry_timeout: 15s - HTTP error: refused";
        assert_eq!(
            without_retries(text),
            "Generic S3 error: Error performing GET http://h/o: HTTP error: refused"
        );
        for other in ["plain", "lost in space, after all"] {
            assert_eq!(without_retries(other), other);
        }
    }

    fn generic(text: &str) -> object_store::Error {
        object_store::Error::Generic { store: "S3", source: text.to_owned().into() }
    }

    fn io(code: i32) -> object_store::Error {
        object_store::Error::Generic { store: "x", source: Box::new(std::io::Error::from_raw_os_error(code)) }
    }

    #[test]
    fn classes_follow_status_code_and_errno() {
        let status = |s: &str| classify(&generic(&format!("Server returned non-2xx status code: {s}")));
        assert_eq!(status("403 Forbidden: AccessDenied"), ErrorKind::Denied);
        assert_eq!(status("503 Service Unavailable: SlowDown"), ErrorKind::Transient);
        assert_eq!(status("404 Not Found: <Code>NoSuchBucket</Code>"), ErrorKind::Config);
        assert_eq!(status("404 Not Found: <Code>NoSuchKey</Code>"), ErrorKind::Absent);
        assert_eq!(status("416 Range Not Satisfiable"), ErrorKind::Corrupt);
        assert_eq!(status("507 Insufficient Storage"), ErrorKind::Full);
        assert_eq!(status("400 Bad Request: <Code>BadDigest</Code>"), ErrorKind::Corrupt);
        assert_eq!(classify(&io(libc::ENOSPC)), ErrorKind::Full);
        assert_eq!(classify(&io(libc::EACCES)), ErrorKind::Denied);
        assert_eq!(classify(&io(libc::EIO)), ErrorKind::Transient);
        assert_eq!(classify(&io(libc::ENOTDIR)), ErrorKind::Config);
        for kind in [ErrorKind::Absent, ErrorKind::Denied, ErrorKind::Full, ErrorKind::Transient] {
            let e = Classed { kind, detail: "made up".into() }.into_object_store(&"a/b".into());
            assert_eq!(classify(&e), kind);
        }
    }

    #[test]
    fn text_names_replica_object_and_remedy() {
        let e = StoreError {
            replica: "alpha".parse().unwrap(),
            op: "get",
            object: "volume.json".into(),
            kind: ErrorKind::Denied,
            detail: "403".into(),
        };
        let text = e.to_string();
        for part in ["alpha", "get", "volume.json", "denied", "credentials"] {
            assert!(text.contains(part), "{text}");
        }
    }
}
