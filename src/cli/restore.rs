//! `mirrorfs restore`: copies files out of one replica, without mounting and without local state.

use std::path::PathBuf;

use super::args::ReplicaArgs;
use super::{CommandError, Outcome};
use crate::config::{self, Env};
use crate::exit::Exit;

/// Copy the tree, or parts of it, out of one replica, verifying every block
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  mirrorfs restore --from s3://bucket/mirror --to /mnt/new
  mirrorfs restore --from /mnt/disk/mirror --to . projects/notes.txt photos/2026
  mirrorfs restore --from off --config home.toml --list --json")]
pub(super) struct Args {
    /// The replica: its place, or its name in the configuration
    #[arg(long, value_name = "URL", env = "MIRRORFS_FROM")]
    from: String,

    /// The folder to copy into; created when missing
    #[arg(long, value_name = "DIR", env = "MIRRORFS_TO", required_unless_present = "list")]
    to: Option<PathBuf>,

    /// What to copy, as paths within the volume; everything when missing
    #[arg(value_name = "PATH")]
    paths: Vec<PathBuf>,

    /// List instead of copying
    #[arg(long, env = "MIRRORFS_LIST", value_parser = clap::builder::FalseyValueParser::new())]
    list: bool,

    /// Replace files that exist
    #[arg(long, env = "MIRRORFS_OVERWRITE", value_parser = clap::builder::FalseyValueParser::new())]
    overwrite: bool,

    /// Print JSON: one object per line with --list, else a summary
    #[arg(long, env = "MIRRORFS_JSON", value_parser = clap::builder::FalseyValueParser::new())]
    json: bool,

    #[command(flatten)]
    replicas: ReplicaArgs,
}

pub(super) fn run(args: &Args) -> Outcome {
    let env = Env::current()?;
    let raw = args.replicas.raw(&env.cwd)?;
    let spec = config::load_replica(&args.from, &raw, &env)?;
    let _ = (&args.to, &args.paths, args.list, args.overwrite, args.json);
    Err(CommandError::new(Exit::Failure, format!("restoring from {} is not built yet", spec.url)))
}
