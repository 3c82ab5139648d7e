//! The flags that describe a volume, shared by `init`, `mount` and `restore`.
//!
//! Their variables are read by [`crate::config`], not by clap: only there can a message say which source a value came
//! from, and the `-o` list stand between flags and environment.

use std::path::{Path, PathBuf};

use crate::config::{ConfigError, Layer, Raw, layer};

/// Where the replicas are.
#[derive(Debug, Default, clap::Args)]
pub(super) struct ReplicaArgs {
    /// Configuration file (TOML) [env: MIRRORFS_CONFIG]
    #[arg(long, short, value_name = "FILE")]
    pub config: Option<PathBuf>,

    /// A replica: a folder, s3://bucket/prefix, gs://… or az://…; may be repeated; replaces the file's list
    /// [env: MIRRORFS_REPLICA, separated by blanks]
    #[arg(long, short, value_name = "[NAME=]URL")]
    pub replica: Vec<String>,

    /// An option of one replica, or of all, such as off.endpoint=https://…; may be repeated
    /// [env: MIRRORFS_REPLICA_OPTION, separated by blanks]
    #[arg(long, value_name = "[NAME.]KEY=VALUE")]
    pub replica_option: Vec<String>,
}

impl ReplicaArgs {
    pub fn raw(&self, cwd: &Path) -> Result<Raw, ConfigError> {
        let mut flags = Layer::default();
        for (number, replica) in self.replica.iter().enumerate() {
            // Not the text itself: it may hold a secret.
            let name =
                layer::split_name(replica).0.map_or_else(|| format!("number {}", number + 1), str::to_owned);
            flags.add_replica(replica, format!("--replica {name}"), cwd);
        }
        for option in &self.replica_option {
            flags.add_replica_option(option, "--replica-option")?;
        }
        Ok(Raw { config: self.config.clone(), flags, options: Vec::new() })
    }
}

/// How a new volume stores its blocks.
#[derive(Debug, Default, clap::Args)]
pub(super) struct VolumeArgs {
    /// Bytes of a block of a new volume, a power of two, such as 1MiB [env: MIRRORFS_BLOCK_SIZE]
    #[arg(long, value_name = "SIZE")]
    pub block_size: Option<String>,

    /// How a new volume stores blocks: zstd or none [env: MIRRORFS_COMPRESSION]
    #[arg(long, value_name = "HOW")]
    pub compression: Option<String>,
}

impl VolumeArgs {
    pub fn add_to(&self, flags: &mut Layer) {
        set(flags, "block_size", self.block_size.as_deref());
        set(flags, "compression", self.compression.as_deref());
    }
}

/// Enters a flag that was given.
pub(super) fn set(flags: &mut Layer, key: &str, value: Option<&str>) {
    if let Some(value) = value {
        flags.set(key, value, crate::config::keys::flag(key));
    }
}
