//! Servers and helpers that integration tests share.
//!
//! Owns what runs beside the program under test: object stores on loopback and a network that misbehaves. Each server has a thread
//! and runtime of its own, so that tests may block, stop it and start it again on the same port.

// Each test binary uses its own part of this folder.
#![allow(dead_code, clippy::unwrap_used, clippy::panic)]

pub mod azurite;
pub mod gcs;
pub mod http;
pub mod proxy;
pub mod s3;

use std::collections::BTreeMap;
use std::path::Path;

use mirrorfs::replica::ReplicaSpec;

/// A replica's specification from a URL and `(option, value)` pairs.
pub fn spec(name: &str, url: &str, options: &[(&str, &str)]) -> ReplicaSpec {
    let options: BTreeMap<_, _> = options.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
    ReplicaSpec::parse(name.parse().unwrap(), url, options, Path::new("/")).unwrap()
}
