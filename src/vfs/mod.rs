//! Inodes, directories, files: the POSIX rules. Knows no sled, no network.

pub mod api;
pub mod types;
