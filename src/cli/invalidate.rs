//! `mirrorfs invalidate`: what the daemon starts beside itself, see [`crate::fuse::invalidator`].

use std::path::PathBuf;

use super::Outcome;
use crate::fuse::invalidator;

/// Has the kernel drop pages for the daemon behind standard input; started by the daemon itself
#[derive(Debug, clap::Args)]
#[command(name = invalidator::COMMAND, after_help = "Examples:
  mirrorfs invalidate 0:45 /home/me/files")]
pub(super) struct Args {
    /// Number of the mount's device, as major:minor
    device: String,

    /// Where it is mounted
    mountpoint: PathBuf,
}

pub(super) fn run(args: &Args) -> Outcome {
    invalidator::run(&args.device, &args.mountpoint);
    Ok(())
}
