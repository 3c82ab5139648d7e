//! Composition root: opens a volume, starts its parts, serves the mount, shuts down in order.
//!
//! Owns the order in which things start and stop. The parts know nothing of each other but the traits they are given.

mod backend;
mod catalog;
mod checkpoints;
mod core;
mod crash;
mod fleet;
mod fsck;
mod members;
mod notify;
mod open;
mod parts;
mod permit;
mod rebuild;
mod restore;
mod salvage;
mod serve;
mod signals;
mod state;
mod tenure;
mod void;

pub use self::core::{Core, CoreOptions, MOUNTED_READ_ONLY, StoreMaker};
pub use crash::{last_crash, last_mount, note_crash, noted_end};
pub use fleet::Fleet;
pub use fsck::{FsckArgs, fsck_members, fsck_replicas, fsck_state};
pub use signals::reopen_log;

pub use salvage::{REPORT, SalvageArgs, SalvageReport, salvage};
pub use void::{VoidReport, void_claim};

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use crate::config::{Compression, Config};
use crate::exit::Exit;
use crate::format::tables::Time;
use crate::format::volume::{self as format_volume, Volume};
use crate::ids::{ReplicaName, VolumeId};
use crate::journal::JournalError;
use crate::replica::{Store, unix_now, volume};

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

impl From<JournalError> for Error {
    fn from(e: JournalError) -> Self {
        let exit = match &e {
            JournalError::Damaged(_) | JournalError::Incomplete(_) => Exit::Damaged,
            JournalError::Locked { .. } => Exit::InUse,
            _ => Exit::Failure,
        };
        Error::new(exit, format!("local journal: {e}"))
    }
}

/// Whether a machine without a state of its own may take the volume over.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Takeover {
    /// Only where no question is open.
    #[default]
    No,
    /// The former writer is gone, and what cannot be read is given up.
    Yes,
    /// Also: where the replicas differ, this one is right.
    From(ReplicaName),
}

/// Where and how to mount; everything else is in the [`Config`].
#[derive(Clone, Debug, PartialEq)]
pub struct MountArgs {
    /// Absolute path of the mountpoint, an existing directory.
    pub mountpoint: PathBuf,
    /// With an empty state folder: go on although another machine has not said that it is done, or a replica that may
    /// hold more does not answer.
    pub takeover: Takeover,
    /// The file that standard error goes to; opened anew at SIGHUP.
    pub log: Option<PathBuf>,
    /// Only take the place of a dead mount. When that is gone, somebody has unmounted it: then mount nothing.
    pub replaces: bool,
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

/// The wall clock as file times have it.
fn wall_clock() -> Time {
    match SystemTime::now().duration_since(UNIX_EPOCH) {
        Ok(d) => Time { secs: d.as_secs() as i64, nanos: d.subsec_nanos() },
        Err(_) => Time::default(),
    }
}

fn random<const N: usize>() -> Result<[u8; N], Error> {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes)
        .map_err(|e| Error::new(Exit::Failure, format!("the system gives no random bytes: {e}")))?;
    Ok(bytes)
}

fn runtime() -> Result<tokio::runtime::Runtime, Error> {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(std::thread::available_parallelism().map_or(2, |n| n.get().clamp(2, 8)))
        .thread_name("mirrorfs-net")
        .enable_all()
        .build()
        .map_err(|e| Error::new(Exit::Failure, format!("cannot start threads: {e}")))
}

fn stores(config: &Config) -> Result<Vec<Store>, Error> {
    config
        .replicas
        .iter()
        .map(|spec| spec.store().map_err(|e| Error::new(Exit::Usage, format!("replica {}: {e}", spec.name))))
        .collect()
}

/// Creates a volume on all replicas of `config`, which must be empty.
pub fn init(config: &Config) -> Result<VolumeInfo, Error> {
    let stores = stores(config)?;
    runtime()?
        .block_on(async {
            let seen = open::look(&stores, false).await;
            match open::decide(None, &seen, false)? {
                open::Decision::Create => create(config, &stores).await,
                _ => {
                    let there = seen.iter().find(|s| matches!(s.found, Ok(volume::Found::Volume(_))));
                    let place = there
                        .map_or_else(String::new, |s| format!(" {} ({})", s.store.name(), s.store.url()));
                    Err(Error::new(
                        Exit::WrongVolume,
                        format!("replica{place} holds a volume already: mount it, or give another place"),
                    ))
                }
            }
        })
        .map(|volume| VolumeInfo {
            volume: volume.volume,
            block_size: volume.block_size,
            replicas: stores.iter().map(|s| s.url().to_owned()).collect(),
        })
}

/// Writes a new volume's `volume.json` on every replica, after making sure that each can keep two writers apart.
async fn create(config: &Config, stores: &[Store]) -> Result<Volume, Error> {
    let volume = Volume {
        volume: VolumeId::from_random(random()?),
        created_at: unix_now() as u64,
        block_size: config.block_size,
        compression: match config.compression {
            Compression::Zstd => format_volume::Compression::Zstd,
            Compression::None => format_volume::Compression::None,
        },
        key_wrapping: None,
        created_by: format!("mirrorfs {}", env!("CARGO_PKG_VERSION")),
    };
    volume.encode().map_err(|e| Error::new(Exit::Usage, e.to_string()))?;
    for store in stores {
        store.prepare().await.map_err(volume::VolumeError::from)?;
        volume::require_conditions(store, u128::from_le_bytes(random()?)).await?;
    }
    for store in stores {
        volume::create(store, &volume).await?;
    }
    Ok(volume)
}

/// Mounts the volume and serves it until it is unmounted.
pub fn run(config: Config, mount: MountArgs, ready: Ready) -> Result<(), Error> {
    let runtime = match runtime() {
        Ok(runtime) => Arc::new(runtime),
        Err(e) => {
            ready(Err(&e));
            return Err(e);
        }
    };
    serve::run(&config, &mount, &runtime, ready)
}
