//! Where a replica is: its URL and options, checked, and the store they make.
//!
//! Owns the option names per scheme and the rule that two replicas must be different places; `clients` makes object_store's
//! clients of them. Opens no connection and touches no file except to resolve symlinks.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Component, Path as FsPath, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use object_store::ObjectStore;
use object_store::aws::AmazonS3ConfigKey;
use object_store::azure::AzureConfigKey;
use object_store::gcp::GoogleConfigKey;
use object_store::path::Path;

use super::folder::Folder;
use super::limit::Timetable;
use super::store::{Limits, Store};
use crate::ids::ReplicaName;

mod clients;

/// What is wrong with a replica's URL or options.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TargetError {
    /// The URL cannot be understood.
    #[error("replica {name}: URL {url:?}: {why}")]
    Url {
        /// The replica.
        name: String,
        /// The URL as given.
        url: String,
        /// What is wrong, and what would be right.
        why: String,
    },
    /// An option has no meaning for this kind of replica.
    #[error("replica {name}: unknown option {option:?} for {scheme}{}", nearest.as_ref().map(|n| format!(", did you mean {n:?}?")).unwrap_or_default())]
    UnknownOption {
        /// The replica.
        name: ReplicaName,
        /// The option as given.
        option: String,
        /// The kind of replica.
        scheme: Scheme,
        /// The known option that looks most like it.
        nearest: Option<String>,
    },
    /// An option's value cannot be used.
    #[error("replica {name}: option {option}: {why}")]
    Option {
        /// The replica.
        name: ReplicaName,
        /// The option.
        option: String,
        /// What is wrong with its value; never the value of a secret.
        why: String,
    },
    /// Two replicas are, or overlap in, the same place.
    #[error("replicas {a} and {b} {how}: losing it would lose both; give each a place of its own")]
    SamePlace {
        /// One of them.
        a: ReplicaName,
        /// The other.
        b: ReplicaName,
        /// In what way they meet.
        how: String,
    },
    /// Two replicas have one name.
    #[error("two replicas are called {name}: give each a name of its own (NAME=URL)")]
    SameName {
        /// The name.
        name: ReplicaName,
    },
    /// The client library refuses the combination.
    #[error("replica {name}: {why}")]
    Client {
        /// The replica.
        name: ReplicaName,
        /// What it says.
        why: String,
    },
}

/// The kinds of replica.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Scheme {
    /// A local folder.
    File,
    /// S3 or what speaks its language.
    S3,
    /// Google Cloud Storage.
    Gs,
    /// Azure blob storage.
    Az,
}

impl fmt::Display for Scheme {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Scheme::File => "file",
            Scheme::S3 => "s3",
            Scheme::Gs => "gs",
            Scheme::Az => "az",
        })
    }
}

const COMMON: [&str; 6] =
    ["timeout", "connect_timeout", "in_flight", "reads_in_flight", "upload_limit", "download_limit"];

impl Scheme {
    /// The options that mean something for this kind of replica.
    #[must_use]
    pub fn options(self) -> Vec<&'static str> {
        let own: &[&str] = match self {
            Scheme::File => &[],
            Scheme::S3 => &[
                "endpoint",
                "region",
                "access_key_id",
                "secret_access_key",
                "session_token",
                "allow_http",
                "virtual_hosted_style",
                "conditional_put",
                "checksum",
                "anonymous",
            ],
            Scheme::Gs => &[
                "base_url",
                "service_account",
                "service_account_key",
                "application_credentials",
                "bearer_token",
                "allow_http",
                "anonymous",
            ],
            Scheme::Az => &[
                "account",
                "account_key",
                "sas_token",
                "bearer_token",
                "client_id",
                "client_secret",
                "tenant_id",
                "endpoint",
                "emulator",
                "allow_http",
                "anonymous",
            ],
        };
        own.iter().chain(&COMMON).copied().collect()
    }
}

/// Where a replica's objects lie.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// A local folder, absolute.
    Folder(PathBuf),
    /// A bucket or container.
    Bucket {
        /// The kind.
        scheme: Scheme,
        /// Name of the bucket or container.
        bucket: String,
        /// Path of the replica's root within it, without slashes at the ends; may be empty.
        prefix: String,
    },
}

/// One replica as configured, checked.
#[derive(Clone, PartialEq, Eq)]
pub struct ReplicaSpec {
    /// Its name.
    pub name: ReplicaName,
    /// Its URL in normal form.
    pub url: String,
    /// Its options; may hold secrets.
    pub options: BTreeMap<String, String>,
    /// How long calls may take and how many run at once.
    pub limits: Limits,
    /// Bytes per second that may be sent.
    pub upload_limit: Timetable,
    /// Bytes per second that may be received.
    pub download_limit: Timetable,
    place: Place,
}

impl fmt::Debug for ReplicaSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let options: Vec<_> = self.options.keys().collect();
        write!(f, "ReplicaSpec({} at {}, options {options:?})", self.name, self.url)
    }
}

impl ReplicaSpec {
    /// Checks a replica's URL and options. A relative path is taken from `cwd`.
    pub fn parse(
        name: ReplicaName,
        url: &str,
        options: BTreeMap<String, String>,
        cwd: &FsPath,
    ) -> Result<Self, TargetError> {
        let place = parse_place(url, cwd).map_err(|why| TargetError::Url {
            name: name.to_string(),
            url: redact(url),
            why,
        })?;
        let scheme = place.scheme();
        let known = scheme.options();
        for option in options.keys() {
            if !known.contains(&option.as_str()) {
                let nearest = nearest(option, &known);
                let option = option.clone();
                return Err(TargetError::UnknownOption { name, option, scheme, nearest });
            }
        }
        let mut spec = Self {
            url: place.to_string(),
            name,
            options,
            limits: Limits::default(),
            upload_limit: Timetable::default(),
            download_limit: Timetable::default(),
            place,
        };
        spec.limits = spec.parse_limits()?;
        spec.upload_limit = spec.parse_rates("upload_limit")?;
        spec.download_limit = spec.parse_rates("download_limit")?;
        spec.check_values()?;
        Ok(spec)
    }

    /// Reads a command-line value `[NAME=]URL`. Without a name the replica is called after its place: the last part of its
    /// path, made unique among `taken` by a number.
    pub fn parse_arg(arg: &str, taken: &[ReplicaName], cwd: &FsPath) -> Result<Self, TargetError> {
        let named = arg.split_once('=').filter(|(name, _)| !name.contains('/') && !name.contains(':'));
        if let Some((name, url)) = named {
            let name = name.parse().map_err(|why| TargetError::Url {
                name: name.to_owned(),
                url: redact(url),
                why,
            })?;
            return Self::parse(name, url, BTreeMap::new(), cwd);
        }
        let last = arg.trim_end_matches('/').rsplit('/').next().unwrap_or_default();
        let base: String = last
            .chars()
            .map(|c| if c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-') { c } else { '-' })
            .take(48)
            .collect();
        let base = if base.chars().any(|c| c.is_ascii_alphanumeric()) { base } else { "replica".to_owned() };
        let mut n = 1;
        loop {
            let text = if n == 1 { base.clone() } else { format!("{base}-{n}") };
            let name: ReplicaName =
                text.parse().map_err(|why| TargetError::Url { name: text.clone(), url: redact(arg), why })?;
            if !taken.contains(&name) {
                return Self::parse(name, arg, BTreeMap::new(), cwd);
            }
            n += 1;
        }
    }

    /// Where its objects lie.
    #[must_use]
    pub fn place(&self) -> &Place {
        &self.place
    }

    /// Builds the store. Opens no connection; wrong credentials show at the first call.
    pub fn store(&self) -> Result<Store, TargetError> {
        let fail = |e: object_store::Error| TargetError::Client {
            name: self.name.clone(),
            why: super::error::one_line(&e),
        };
        let over = |prefix: &str, backend: Arc<dyn ObjectStore>| {
            let root = Path::parse(prefix).map_err(|e| fail(e.into()))?;
            let store = Store::over(self.name.clone(), &self.url, root, backend, self.limits);
            Ok(store.with_rates(self.upload_limit.clone(), self.download_limit.clone()))
        };
        match &self.place {
            Place::Folder(folder) => Ok(over("", Arc::new(Folder::new(folder.clone())))?.in_folder(folder)),
            Place::Bucket { scheme: Scheme::S3, prefix, .. } => {
                let store = over(prefix, Arc::new(self.s3().build().map_err(fail)?))?;
                Ok(if self.conditional() { store } else { store.without_conditions() })
            }
            Place::Bucket { scheme: Scheme::Gs, prefix, .. } => {
                over(prefix, Arc::new(self.gs().build().map_err(fail)?))
            }
            Place::Bucket { prefix, .. } => over(prefix, Arc::new(self.az().build().map_err(fail)?)),
        }
    }

    fn option(&self, name: &str) -> Option<&str> {
        self.options.get(name).map(String::as_str)
    }

    fn flag(&self, name: &str) -> bool {
        self.option(name).is_some_and(|v| parse_bool(v) == Some(true))
    }

    fn conditional(&self) -> bool {
        self.option("conditional_put") != Some("disabled")
    }

    fn bad(&self, option: &str, why: impl Into<String>) -> TargetError {
        TargetError::Option { name: self.name.clone(), option: option.to_owned(), why: why.into() }
    }

    fn parse_limits(&self) -> Result<Limits, TargetError> {
        let mut limits = Limits::default();
        let duration = |option: &str, into: &mut Duration| {
            let Some(text) = self.option(option) else { return Ok(()) };
            let parsed =
                humantime::parse_duration(text).map_err(|e| self.bad(option, format!("{text:?}: {e}")))?;
            if parsed < Duration::from_millis(100) || parsed > Duration::from_secs(600) {
                return Err(self.bad(option, format!("{text:?} is not between 100ms and 10m")));
            }
            *into = parsed;
            Ok(())
        };
        duration("timeout", &mut limits.call)?;
        duration("connect_timeout", &mut limits.connect)?;
        let number = |option: &str, most: usize, into: &mut usize| {
            let Some(text) = self.option(option) else { return Ok(()) };
            *into = match text.parse() {
                Ok(n) if (1..=most).contains(&n) => n,
                _ => return Err(self.bad(option, format!("{text:?} is not a number from 1 to {most}"))),
            };
            Ok(())
        };
        number("in_flight", 64, &mut limits.in_flight)?;
        number("reads_in_flight", 256, &mut limits.reads_in_flight)?;
        Ok(limits)
    }

    fn parse_rates(&self, option: &str) -> Result<Timetable, TargetError> {
        let Some(text) = self.option(option) else { return Ok(Timetable::default()) };
        Timetable::parse(text).map_err(|why| self.bad(option, why))
    }

    /// Checks the values that the client library would misread or refuse late.
    fn check_values(&self) -> Result<(), TargetError> {
        for option in ["allow_http", "virtual_hosted_style", "emulator", "anonymous"] {
            if let Some(v) = self.option(option)
                && parse_bool(v).is_none()
            {
                return Err(self.bad(option, format!("{v:?} is neither true nor false")));
            }
        }
        for (option, allowed) in
            [("conditional_put", &["etag", "disabled"][..]), ("checksum", &["sha256", "crc64nvme", "none"])]
        {
            if let Some(v) = self.option(option)
                && !allowed.contains(&v)
            {
                return Err(self.bad(option, format!("{v:?} is none of {}", allowed.join(", "))));
            }
        }
        for option in ["endpoint", "base_url"] {
            let Some(v) = self.option(option) else { continue };
            let parsed = url::Url::parse(v).map_err(|e| self.bad(option, format!("{v:?}: {e}")))?;
            match parsed.scheme() {
                "https" => {}
                "http" if self.flag("allow_http") => {}
                "http" => return Err(self.bad(option, "is plain http: set allow_http = true to accept that")),
                other => return Err(self.bad(option, format!("{other}:// is neither https:// nor http://"))),
            }
        }
        Ok(())
    }

    /// The account and server that a bucket's name is relative to.
    #[must_use]
    pub fn service(&self) -> String {
        let of = |text: Option<String>| text.unwrap_or_default().trim_end_matches('/').to_ascii_lowercase();
        match &self.place {
            Place::Folder(_) => String::new(),
            Place::Bucket { scheme: Scheme::S3, .. } => {
                of(self.s3().get_config_value(&AmazonS3ConfigKey::Endpoint))
            }
            Place::Bucket { scheme: Scheme::Gs, .. } => {
                of(self.gs().get_config_value(&GoogleConfigKey::BaseUrl))
            }
            Place::Bucket { .. } => {
                let b = self.az();
                let part = |key| of(b.get_config_value(&key));
                let (account, endpoint) = (part(AzureConfigKey::AccountName), part(AzureConfigKey::Endpoint));
                format!("{account} {endpoint} {}", part(AzureConfigKey::UseEmulator))
            }
        }
    }
}

impl Place {
    /// The kind of replica.
    #[must_use]
    pub fn scheme(&self) -> Scheme {
        match self {
            Place::Folder(_) => Scheme::File,
            Place::Bucket { scheme, .. } => *scheme,
        }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Place::Folder(path) => write!(f, "file://{}", path.display()),
            Place::Bucket { scheme, bucket, prefix } if prefix.is_empty() => write!(f, "{scheme}://{bucket}"),
            Place::Bucket { scheme, bucket, prefix } => write!(f, "{scheme}://{bucket}/{prefix}"),
        }
    }
}

/// Fails when two replicas have one name, or are or overlap in the same place.
pub fn check_distinct(replicas: &[ReplicaSpec]) -> Result<(), TargetError> {
    for (i, a) in replicas.iter().enumerate() {
        for b in replicas.iter().skip(i + 1) {
            if a.name == b.name {
                return Err(TargetError::SameName { name: a.name.clone() });
            }
            if let Some(how) = same_place(a, b) {
                return Err(TargetError::SamePlace { a: a.name.clone(), b: b.name.clone(), how });
            }
        }
    }
    Ok(())
}

/// In what way two replicas are, or overlap in, the same place; `None` when they are apart.
#[must_use]
pub fn same_place(a: &ReplicaSpec, b: &ReplicaSpec) -> Option<String> {
    match (&a.place, &b.place) {
        (Place::Folder(x), Place::Folder(y)) => {
            let (x, y) = (resolve(x), resolve(y));
            if x == y {
                Some(format!("are the same folder {}", x.display()))
            } else if x.starts_with(&y) || y.starts_with(&x) {
                Some(format!("lie one within the other ({} and {})", x.display(), y.display()))
            } else {
                None
            }
        }
        (
            Place::Bucket { scheme: s, bucket: x, prefix: p },
            Place::Bucket { scheme: t, bucket: y, prefix: q },
        ) if s == t && x == y && a.service() == b.service() => {
            let within = |inner: &str, outer: &str| {
                outer.is_empty() || inner.strip_prefix(outer).is_some_and(|rest| rest.starts_with('/'))
            };
            if p == q {
                Some(format!("are the same place {}", a.url))
            } else if within(p, q) || within(q, p) {
                Some(format!("lie one within the other ({} and {})", a.url, b.url))
            } else {
                None
            }
        }
        _ => None,
    }
}

/// The path with symlinks resolved as far as it exists.
fn resolve(path: &FsPath) -> PathBuf {
    let mut missing = Vec::new();
    let mut at = path;
    loop {
        if let Ok(real) = at.canonicalize() {
            return missing.iter().rev().fold(real, |p, part| p.join(part));
        }
        match (at.parent(), at.file_name()) {
            (Some(parent), Some(name)) => {
                missing.push(name.to_owned());
                at = parent;
            }
            _ => return path.to_owned(),
        }
    }
}

fn parse_place(url: &str, cwd: &FsPath) -> Result<Place, String> {
    if url.is_empty() {
        return Err(
            "is empty; give a path, file:///…, s3://bucket/…, gs://bucket/… or az://container/…".to_owned()
        );
    }
    let Some((scheme, rest)) = url.split_once("://") else {
        return Ok(Place::Folder(normal(&cwd.join(url))));
    };
    let scheme = match scheme.to_ascii_lowercase().as_str() {
        "file" => {
            let parsed = url::Url::parse(url).map_err(|e| e.to_string())?;
            return match parsed.to_file_path() {
                Ok(path) if parsed.query().is_none() && parsed.fragment().is_none() => {
                    Ok(Place::Folder(normal(&path)))
                }
                _ => Err("is not of the form file:///absolute/path".to_owned()),
            };
        }
        "s3" | "s3a" => Scheme::S3,
        "gs" | "gcs" => Scheme::Gs,
        "az" | "azure" => Scheme::Az,
        other => {
            let known = ["file", "s3", "gs", "az"];
            let hint = nearest(other, &known).map(|n| format!(", did you mean {n}://?")).unwrap_or_default();
            return Err(format!("the scheme {other}:// is none of file, s3, gs, az{hint}"));
        }
    };
    if let Some(c) =
        rest.chars().find(|c| matches!(c, '?' | '#' | '@') || c.is_control() || c.is_whitespace())
    {
        return Err(match c {
            '@' => "credentials do not belong in the URL; use options or the environment".to_owned(),
            c => format!("the character {c:?} is not allowed; options are given apart from the URL"),
        });
    }
    let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
    if bucket.is_empty() {
        return Err(format!("names no bucket; write {scheme}://bucket/prefix"));
    }
    if bucket.contains(':') {
        return Err("a bucket's name has no port; give the server as option `endpoint`".to_owned());
    }
    let prefix = prefix.trim_matches('/');
    Path::parse(prefix).map_err(|e| e.to_string())?;
    Ok(Place::Bucket { scheme, bucket: bucket.to_owned(), prefix: prefix.to_owned() })
}

/// The absolute path without `.` and `..`, by its text only.
fn normal(path: &FsPath) -> PathBuf {
    let mut out = PathBuf::new();
    for part in path.components() {
        match part {
            Component::CurDir => {}
            Component::ParentDir => {
                out.pop();
            }
            other => out.push(other),
        }
    }
    out
}

/// The URL without what may be a secret before an `@` or after a `?`.
fn redact(url: &str) -> String {
    let url = url.split('?').next().unwrap_or_default();
    match (url.split_once("://"), url.rsplit_once('@')) {
        (Some((scheme, _)), Some((_, rest))) => format!("{scheme}://…@{rest}"),
        _ => url.to_owned(),
    }
}

fn parse_bool(text: &str) -> Option<bool> {
    match text {
        "true" | "yes" | "on" | "1" => Some(true),
        "false" | "no" | "off" | "0" => Some(false),
        _ => None,
    }
}

/// The known word most like `word`, when one is near enough to be meant.
fn nearest(word: &str, known: &[&str]) -> Option<String> {
    let best = known.iter().map(|k| (strsim::jaro_winkler(word, k), k)).max_by(|a, b| a.0.total_cmp(&b.0))?;
    (best.0 > 0.65).then(|| (*best.1).to_owned())
}

#[cfg(test)]
mod tests;
