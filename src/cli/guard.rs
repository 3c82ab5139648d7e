//! `mirrorfs guard`: what the daemon starts beside itself, see [`crate::fuse::guardian`].

use std::path::PathBuf;

use super::Outcome;
use crate::fuse::guardian;

/// Takes a mount away when the daemon behind standard input dies; started by the daemon itself
#[derive(Debug, clap::Args)]
#[command(name = guardian::COMMAND, after_help = "Examples:
  mirrorfs guard 0:45 4294967301 /home/me/files")]
pub(super) struct Args {
    /// Number of the mount's device, as major:minor
    device: String,

    /// Its number that is never given again, or 0
    unique: u64,

    /// Where it is mounted
    mountpoint: PathBuf,
}

pub(super) fn run(args: &Args) -> Outcome {
    let mounted = guardian::Mounted { device: args.device.clone(), unique: args.unique };
    guardian::guard(&mounted, &args.mountpoint);
    Ok(())
}
