//! Flags, `-o` list, environment and file → one validated [`Config`].
//!
//! Owns every setting's range and default. A [`Layer`] is what one source gave, as text; a [`Config`] is what they come
//! to, checked. Flags win over the `-o` list, that over the environment, that over the file, that over defaults. Does no
//! I/O but reading the file and looking for the state folder. Never prints a secret: messages show a replica only by
//! its name and place.

use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use crate::exit::Exit;
use crate::format::volume::{MAX_BLOCK_SIZE, MIN_BLOCK_SIZE};
use crate::replica::{Place, ReplicaSpec, TargetError};

pub mod file;
pub mod keys;
pub mod layer;
mod replicas;
pub mod settings;
pub mod state;
pub mod units;

pub use layer::{Env, Layer};

/// On how many replicas an `fsync` must be committed before it returns.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Fsync {
    /// On none; stable local storage is enough.
    #[default]
    Local,
    /// On any one.
    One,
    /// On more than half.
    Quorum,
    /// On every one.
    All,
}

impl Fsync {
    /// How many replicas out of `of` that is.
    #[must_use]
    pub const fn needed(self, of: usize) -> usize {
        match self {
            Fsync::Local => 0,
            Fsync::One => 1,
            Fsync::Quorum => of / 2 + 1,
            Fsync::All => of,
        }
    }
}

impl FromStr for Fsync {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "local" => Ok(Fsync::Local),
            "one" => Ok(Fsync::One),
            "quorum" => Ok(Fsync::Quorum),
            "all" => Ok(Fsync::All),
            _ => Err(format!("{text:?} is not a level of fsync; use local, one, quorum or all")),
        }
    }
}

/// How blocks are stored in a volume that is being created.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Compression {
    /// Zstandard, skipped for blocks where it does not pay.
    #[default]
    Zstd,
    /// As they are.
    None,
}

impl FromStr for Compression {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "zstd" => Ok(Compression::Zstd),
            "none" => Ok(Compression::None),
            _ => Err(format!("{text:?} is not a compression; use zstd or none")),
        }
    }
}

/// Options of the kernel's mount.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MountOptions {
    /// Other users may enter, subject to permissions.
    pub allow_other: bool,
    /// Set-user-id bits have no effect.
    pub nosuid: bool,
    /// Device nodes cannot be opened.
    pub nodev: bool,
    /// Nothing can be executed.
    pub noexec: bool,
    /// Reading does not change access times.
    pub noatime: bool,
    /// Symbolic links are not followed.
    pub nosymfollow: bool,
    /// What is written to a file is synced before the call returns.
    pub sync: bool,
    /// Changes of names are synced before the call returns.
    pub dirsync: bool,
    /// What `/proc/mounts` and `df` show as the source; `None` for a name made of the volume's.
    pub fsname: Option<String>,
    /// Options for SELinux, for the kernel as they are.
    pub labels: Vec<String>,
    /// Each reading that is seen changes access times, not only the first since the last change.
    pub strictatime: bool,
    /// Listing does not change the access times of directories.
    pub nodiratime: bool,
    /// Access control lists are not supported.
    pub noacl: bool,
    /// Whether processors are kept awake in bursts of requests.
    pub low_latency: LowLatency,
    /// A daemon that has died is not started again; its mount stays dead.
    pub no_restart: bool,
}

/// When idle processors are kept from sleeping while requests come in bursts: each request then takes much less time, and the idle
/// processors more power.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LowLatency {
    /// On machines with few processors: there, a burst keeps most of them busy anyway.
    #[default]
    Auto,
    /// On any machine.
    On,
    /// Never.
    Off,
}

/// Processors up to which [`LowLatency::Auto`] keeps them awake.
const FEW: usize = 4;

impl LowLatency {
    /// What that means on this machine.
    #[must_use]
    pub fn wanted(self) -> bool {
        match self {
            Self::Auto => std::thread::available_parallelism().is_ok_and(|n| n.get() <= FEW),
            Self::On => true,
            Self::Off => false,
        }
    }
}

/// Everything a volume's daemon needs to know, checked.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// Folder of the local state; absolute; may not exist yet.
    pub state: PathBuf,
    /// At least one, names and places distinct, in the order given (the order of preference when nothing else decides).
    pub replicas: Vec<ReplicaSpec>,
    /// Bytes that blocks may take on local disk.
    pub cache_size: u64,
    /// Share of the disk of the state folder that stays free, 0 to 0.9.
    pub free_space_ratio: f64,
    /// How long a writer waits for space before it gets `ENOSPC`.
    pub space_wait: Duration,
    /// How long a read waits for replicas before it gets `EIO`.
    pub read_timeout: Duration,
    /// Bytes of a block, a power of two. Only for creating a volume: an existing one keeps its own.
    pub block_size: u32,
    /// Only for creating a volume.
    pub compression: Compression,
    /// What `fsync` waits for.
    pub fsync: Fsync,
    /// After this an `fsync` that waits for replicas fails with an error.
    pub fsync_timeout: Duration,
    /// Longest time between two cuts while something was written.
    pub commit_interval: Duration,
    /// Between two deep scrubs; `None` for never.
    pub scrub_interval: Option<Duration>,
    /// Between two comparisons of names and sizes; `None` for never.
    pub check_interval: Option<Duration>,
    /// Bytes per second, per replica, that scrubs and repairs may move; `None` for as fast as it goes.
    pub scrub_rate: Option<u64>,
    /// Nobody may write; no epoch is claimed.
    pub read_only: bool,
    /// Options of the kernel's mount.
    pub mount: MountOptions,
}

/// What is wrong with the configuration. Every one ends a command with [`Exit::Usage`].
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the message of each variant says what it is")]
pub enum ConfigError {
    #[error("cannot tell the working directory: {error}")]
    WorkingDirectory { error: std::io::Error },
    #[error("{variable} is not valid text")]
    NotText { variable: String },
    #[error("cannot read the configuration {}: {error}", path.display())]
    Read { path: PathBuf, error: std::io::Error },
    #[error("{place}: {detail}")]
    Value { place: String, detail: String },
    #[error("{place}: unknown key{suggestion}")]
    UnknownKey { place: String, suggestion: String },
    #[error("-o {option}: unknown option{suggestion}")]
    UnknownOption { option: String, suggestion: String },
    #[error(
        "no replica is given; name at least one with --replica [NAME=]URL or [replica.NAME] in --config FILE"
    )]
    NoReplica,
    #[error("{place}: {error}")]
    Replica { place: String, error: TargetError },
    #[error("{0}")]
    Replicas(TargetError),
    #[error(
        "the state folder {} and the replica {replica} ({}) lie one within the other; move one of them",
        state.display(), path.display()
    )]
    StateInReplica { state: PathBuf, replica: String, path: PathBuf },
    #[error(
        "neither XDG_STATE_HOME nor HOME is set, so there is no default for the state folder; give --state DIR"
    )]
    NoHome,
    #[error(
        "two state folders were used with these replicas, {} and {}; say which one with --state DIR",
        one.display(), other.display()
    )]
    TwoStates { one: PathBuf, other: PathBuf },
}

impl ConfigError {
    /// The code with which a command ends because of it.
    #[must_use]
    pub fn exit_code(&self) -> Exit {
        Exit::Usage
    }
}

/// What one command was given, before the file is read.
#[derive(Clone, Debug, Default)]
pub struct Raw {
    /// `--config`.
    pub config: Option<PathBuf>,
    /// The flags.
    pub flags: Layer,
    /// The values of `-o`.
    pub options: Vec<String>,
}

/// The kernel takes less than a page.
const MAX_FSNAME: usize = 4000;
const BLOCK_SIZES: (u64, u64) = (MIN_BLOCK_SIZE as u64, MAX_BLOCK_SIZE as u64);
const SCRUB_RATES: (u64, u64) = (16 << 10, 1 << 40);
const CACHE_SIZES: (u64, u64) = (16 << 20, 1 << 50);

impl Config {
    /// Reads all sources and checks the outcome.
    pub fn load(raw: &Raw, env: &Env) -> Result<Config, ConfigError> {
        let merged = Merged::read(raw, env)?;
        let replicas = replicas::resolve(merged.replicas(), &merged.replica_options())?;
        let config = Config::of(&merged, merged.state(env, &replicas)?, replicas)?;
        config.check_state()?;
        Ok(config)
    }

    /// What the sources come to, with this state folder and these replicas.
    fn of(merged: &Merged, state: PathBuf, replicas: Vec<ReplicaSpec>) -> Result<Config, ConfigError> {
        Ok(Config {
            state,
            replicas,
            cache_size: merged
                .get("cache_size", 10 << 30, |t| units::parse_size(t, CACHE_SIZES.0..=CACHE_SIZES.1))?,
            free_space_ratio: merged.get("free_space_ratio", 0.05, free_space_ratio)?,
            space_wait: merged.get("space_wait", Duration::from_secs(30), |t| {
                units::parse_duration(t, Duration::ZERO..=Duration::from_secs(600))
            })?,
            read_timeout: merged.read_timeout()?,
            block_size: merged.get("block_size", 1 << 20, block_size)?,
            compression: merged.get("compression", Compression::default(), str::parse)?,
            fsync: merged.get("fsync", Fsync::default(), str::parse)?,
            fsync_timeout: merged.get("fsync_timeout", Duration::from_secs(60), |t| {
                units::parse_duration(t, Duration::from_secs(1)..=Duration::from_secs(3600))
            })?,
            commit_interval: merged.get("commit_interval", Duration::from_secs(5), |t| {
                units::parse_duration(t, Duration::from_millis(100)..=Duration::from_secs(3600))
            })?,
            scrub_interval: merged.get("scrub_interval", Some(Duration::from_secs(7 * 86400)), interval)?,
            check_interval: merged.get("check_interval", Some(Duration::from_secs(6 * 3600)), interval)?,
            scrub_rate: merged.get("scrub_rate", None, |t| match t {
                "off" => Ok(None),
                t => units::parse_size(t.strip_suffix("/s").unwrap_or(t), SCRUB_RATES.0..=SCRUB_RATES.1)
                    .map(Some),
            })?,
            read_only: merged.get("read_only", false, yes_or_no)?,
            mount: MountOptions {
                allow_other: merged.get("allow_other", false, yes_or_no)?,
                nosuid: merged.get("nosuid", false, yes_or_no)?,
                nodev: merged.get("nodev", false, yes_or_no)?,
                noexec: merged.get("noexec", false, yes_or_no)?,
                noatime: merged.get("noatime", false, yes_or_no)?,
                nosymfollow: merged.get("nosymfollow", false, yes_or_no)?,
                sync: merged.get("sync", false, yes_or_no)?,
                dirsync: merged.get("dirsync", false, yes_or_no)?,
                fsname: merged.get("fsname", None, fsname)?,
                labels: merged.labels.clone(),
                strictatime: merged.get("strictatime", false, yes_or_no)?,
                nodiratime: merged.get("nodiratime", false, yes_or_no)?,
                noacl: merged.get("noacl", false, yes_or_no)?,
                low_latency: merged.get("low_latency", LowLatency::Auto, low_latency)?,
                no_restart: merged.get("no_restart", false, yes_or_no)?,
            },
        })
    }

    fn check_state(&self) -> Result<(), ConfigError> {
        let state = real_path(&self.state);
        for replica in &self.replicas {
            let Place::Folder(folder) = replica.place() else { continue };
            let folder = real_path(folder);
            if overlap(&state, &folder) {
                return Err(ConfigError::StateInReplica {
                    state: self.state.clone(),
                    replica: replica.name.to_string(),
                    path: folder,
                });
            }
        }
        Ok(())
    }
}

/// The replicas that the sources name, for commands that can do without: none is no error.
pub fn load_replicas(raw: &Raw, env: &Env) -> Result<Vec<ReplicaSpec>, ConfigError> {
    let merged = Merged::read(raw, env)?;
    match merged.replicas() {
        [] => Ok(Vec::new()),
        given => replicas::resolve(given, &merged.replica_options()),
    }
}

/// One replica, for commands that need no volume's configuration (`restore`): `from` is the name of a replica in the
/// sources, or `[NAME=]URL`.
pub fn load_replica(from: &str, raw: &Raw, env: &Env) -> Result<ReplicaSpec, ConfigError> {
    let merged = Merged::read(raw, env)?;
    let mut wanted = Layer::default();
    wanted.add_replica(from, "--from", &env.cwd);
    let wanted = wanted.replicas.pop().ok_or(ConfigError::NoReplica)?;
    replicas::find(&wanted, merged.replicas(), &merged.replica_options())?.ok_or(ConfigError::NoReplica)
}

/// How long replicas that do not answer are waited for, for commands that need no volume's configuration.
pub fn read_timeout(raw: &Raw, env: &Env) -> Result<Duration, ConfigError> {
    Merged::read(raw, env)?.read_timeout()
}

/// Whether two places are one, or lie one within the other.
#[must_use]
pub fn overlap(a: &Path, b: &Path) -> bool {
    let (a, b) = (real_path(a), real_path(b));
    a.starts_with(&b) || b.starts_with(&a)
}

/// The path with as many symbolic links resolved as exist, for comparing places.
#[must_use]
pub fn real_path(path: &Path) -> PathBuf {
    path.ancestors()
        .find_map(|ancestor| {
            let real = ancestor.canonicalize().ok()?;
            let rest = path.strip_prefix(ancestor).ok()?;
            // Joining nothing would append a slash.
            Some(if rest.as_os_str().is_empty() { real } else { real.join(rest) })
        })
        .unwrap_or_else(|| path.to_owned())
}

/// All layers, the winning one first.
struct Merged {
    layers: Vec<Layer>,
    labels: Vec<String>,
}

impl Merged {
    fn read(raw: &Raw, env: &Env) -> Result<Merged, ConfigError> {
        let options = layer::mount_list(&raw.options, &env.cwd)?;
        let variable = || env.os("MIRRORFS_CONFIG").map(PathBuf::from);
        let path = raw.config.clone().or(options.config).or_else(variable);
        let file = path.map(|path| file::read(&env.cwd.join(path), env)).transpose()?;
        let given = [raw.flags.clone(), options.layer, env.layer()?];
        Ok(Merged { layers: given.into_iter().chain(file).collect(), labels: options.labels })
    }

    /// The state folder that is given, or the usual one of these replicas.
    fn state(&self, env: &Env, replicas: &[ReplicaSpec]) -> Result<PathBuf, ConfigError> {
        match self.text("state") {
            Some(given) if given.text.is_empty() => {
                Err(ConfigError::Value { place: given.source.clone(), detail: "is empty".to_owned() })
            }
            Some(given) => Ok(env.cwd.join(&given.text)),
            None => state::default_dir(env, replicas),
        }
    }

    fn text(&self, key: &str) -> Option<&layer::Given> {
        self.layers.iter().find_map(|layer| layer.values.get(key))
    }

    fn get<T>(
        &self,
        key: &str,
        default: T,
        parse: impl FnOnce(&str) -> Result<T, String>,
    ) -> Result<T, ConfigError> {
        let Some(given) = self.text(key) else { return Ok(default) };
        parse(&given.text).map_err(|detail| ConfigError::Value { place: given.source.clone(), detail })
    }

    fn read_timeout(&self) -> Result<Duration, ConfigError> {
        self.get("read_timeout", Duration::from_secs(30), |t| {
            units::parse_duration(t, Duration::from_secs(1)..=Duration::from_secs(600))
        })
    }

    /// The weakest first, so that the strongest is applied last.
    fn replica_options(&self) -> Vec<&layer::GivenOption> {
        self.layers.iter().rev().flat_map(|l| &l.replica_options).collect()
    }

    fn replicas(&self) -> &[layer::GivenReplica] {
        self.layers.iter().map(|l| l.replicas.as_slice()).find(|r| !r.is_empty()).unwrap_or_default()
    }
}

fn interval(text: &str) -> Result<Option<Duration>, String> {
    match text {
        "off" => Ok(None),
        text => units::parse_duration(text, Duration::from_secs(1)..=Duration::from_secs(10 * 365 * 86400))
            .map(Some),
    }
}

fn block_size(text: &str) -> Result<u32, String> {
    let size = units::parse_size(text, BLOCK_SIZES.0..=BLOCK_SIZES.1)?;
    match u32::try_from(size) {
        Ok(size) if size.is_power_of_two() => Ok(size),
        _ => Err(format!("{text:?} is not a power of two; use one, such as \"256KiB\" or \"1MiB\"")),
    }
}

fn free_space_ratio(text: &str) -> Result<f64, String> {
    match text.trim().parse::<f64>() {
        Ok(ratio) if (0.0..=0.9).contains(&ratio) => Ok(ratio),
        Ok(_) => Err(format!("{text:?} is out of range; it must lie between 0 and 0.9")),
        Err(_) => {
            Err(format!("{text:?} is not a share of the disk; write a number from 0 to 0.9, such as 0.05"))
        }
    }
}

fn fsname(text: &str) -> Result<Option<String>, String> {
    if text.is_empty() || text.len() > MAX_FSNAME || text.chars().any(char::is_control) {
        return Err(format!("must be a line of 1 to {MAX_FSNAME} bytes"));
    }
    Ok(Some(text.to_owned()))
}

fn low_latency(text: &str) -> Result<LowLatency, String> {
    match text {
        "auto" => Ok(LowLatency::Auto),
        other => match yes_or_no(other) {
            Ok(true) => Ok(LowLatency::On),
            Ok(false) => Ok(LowLatency::Off),
            Err(_) => Err(format!("{text:?} is none of auto, on and off")),
        },
    }
}

fn yes_or_no(text: &str) -> Result<bool, String> {
    match text.to_ascii_lowercase().as_str() {
        "true" | "yes" | "on" | "1" => Ok(true),
        "false" | "no" | "off" | "0" => Ok(false),
        _ => Err(format!("{text:?} is neither true nor false")),
    }
}

#[cfg(test)]
mod tests;
