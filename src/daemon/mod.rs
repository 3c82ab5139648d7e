//! Composition root: opens a volume, starts its parts, serves the mount, shuts down in order.
//!
//! For now only the interface that the command line calls.

use std::path::PathBuf;

use crate::config::Config;
use crate::exit::Exit;
use crate::ids::VolumeId;

/// Why a volume could not be created or served.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct Error {
    exit: Exit,
    message: String,
}

impl Error {
    /// An error that ends a command with `exit`.
    #[must_use]
    pub fn new(exit: Exit, message: impl Into<String>) -> Self {
        Self { exit, message: message.into() }
    }

    /// The code with which a command ends because of it.
    #[must_use]
    pub fn exit_code(&self) -> Exit {
        self.exit
    }
}

/// Where and how to mount; everything else is in the [`Config`].
#[derive(Clone, Debug, PartialEq)]
pub struct MountArgs {
    /// Absolute path of the mountpoint, an existing directory.
    pub mountpoint: PathBuf,
}

/// A volume that was just created.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct VolumeInfo {
    /// Its identity.
    pub volume: VolumeId,
    /// Bytes of a block.
    pub block_size: u32,
    /// The replicas that hold its `volume.json`, without secrets.
    pub replicas: Vec<String>,
}

/// What there is to say once a mount is live.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct ReadyInfo {
    /// Identity of the volume.
    pub volume: VolumeId,
    /// Lines for the person who mounts: "created a new volume on a, b", "restored from a up to …".
    pub notes: Vec<String>,
}

/// Called once: when the mount is live, or when it cannot be.
pub type Ready = Box<dyn FnOnce(Result<ReadyInfo, &Error>) + Send>;

/// Creates a volume on all replicas of `config`, which must be empty.
pub fn init(config: &Config) -> Result<VolumeInfo, Error> {
    let _ = config;
    Err(Error::new(Exit::Failure, "creating volumes is not built yet"))
}

/// Mounts the volume and serves it until it is unmounted.
pub fn run(config: Config, mount: MountArgs, ready: Ready) -> Result<(), Error> {
    let _ = (config, mount);
    let error = Error::new(Exit::Failure, "mounting is not built yet");
    ready(Err(&error));
    Err(error)
}
