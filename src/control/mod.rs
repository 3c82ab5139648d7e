//! Commands talk to the daemon of a mount: HTTP with JSON over the Unix socket in its state folder.
//!
//! The daemon implements [`Backend`] and runs a [`Server`]; a command finds the daemon of a mountpoint through the
//! kernel's list of mounts and the [`Registry`], and asks it with a [`Client`].

mod client;
pub mod mounts;
mod registry;
mod replicas;
mod server;
mod socket;
mod types;

pub use client::{Client, ClientError};
pub use registry::{Entry, Registration, Registry};
pub use replicas::{FsckRequest, ReplicaEntry, ReplicaRequest, ScrubCommand};
pub use server::{SOCKET, Server};
pub use types::{
    Backend, CacheStatus, CrashNote, Failure, Refused, Replicas, ShutdownRequest, Status, SyncEvent,
    SyncProgress, SyncReplica, SyncRequest, Then, reason,
};

#[cfg(test)]
pub(crate) mod tests;
