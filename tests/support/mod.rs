//! Servers and helpers that integration tests share.
//!
//! Owns what runs beside the program under test: object stores on loopback and a network that misbehaves, and what drives the
//! program itself: mounts that clean up after themselves, trees to write into them, pictures of trees to compare. Each server
//! has a thread and runtime of its own, so that tests may block, stop it and start it again on the same port.

// Each test binary uses its own part of this folder.
#![allow(dead_code, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

pub mod azurite;
pub mod gcs;
pub mod http;
pub mod log;
pub mod machine;
pub mod memfs;
pub mod moto;
pub mod mount;
pub mod process;
pub mod proxy;
pub mod run;
pub mod s3;
pub mod tree;

use std::collections::BTreeMap;
use std::path::Path;

use mirrorfs::replica::ReplicaSpec;

/// A replica's specification from a URL and `(option, value)` pairs.
pub fn spec(name: &str, url: &str, options: &[(&str, &str)]) -> ReplicaSpec {
    let options: BTreeMap<_, _> = options.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
    ReplicaSpec::parse(name.parse().unwrap(), url, options, Path::new("/")).unwrap()
}

/// How pjdfstest is told what we support; times differ at least by the kernel's clock tick.
pub const PJDFSTEST_TOML: &str = r#"
[features]
posix_fallocate = {}
rename_ctime = {}
utime_now = {}
utimensat = {}

[settings]
naptime = 0.03
"#;
