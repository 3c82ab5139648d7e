//! What the tests through a real mount share.

#![allow(dead_code, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

pub mod memfs;

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
