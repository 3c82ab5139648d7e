//! `mirrorfs init`: creates a volume.

use super::args::{ReplicaArgs, VolumeArgs};
use super::{Outcome, output};
use crate::config::{Config, Env, units};
use crate::daemon;
use crate::private;
use crate::replica::{Place, ReplicaSpec};

/// Create a volume on all given replicas, which must be empty
///
/// `mount` does this by itself when every replica is empty; `init` is for choosing the block size first, or for
/// checking that every replica can be written.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  mirrorfs init --replica /mnt/disk/mirror --replica s3://bucket/mirror
  mirrorfs init --config home.toml --block-size 256KiB --compression none")]
pub(super) struct Args {
    #[command(flatten)]
    replicas: ReplicaArgs,

    #[command(flatten)]
    volume: VolumeArgs,

    /// Print the new volume as JSON
    #[arg(long, env = "MIRRORFS_JSON", value_parser = clap::builder::FalseyValueParser::new())]
    json: bool,
}

pub(super) fn run(args: Args) -> Outcome {
    let env = Env::current()?;
    let mut raw = args.replicas.raw(&env.cwd)?;
    args.volume.add_to(&mut raw.flags);
    let config = Config::load(&raw, &env)?;
    let info = daemon::init(&config)?;
    if args.json {
        return output::print_json(&info);
    }
    let block = units::exact_size(info.block_size.into());
    output::print(&format!("created volume {} with blocks of {block} on", info.volume))?;
    output::print(&output::table(&replica_rows(&config)))?;
    config.replicas.iter().for_each(warn_of_open_folder);
    Ok(())
}

/// Tells that other users may enter the folder of a replica. The daemon tells the same at each
/// mount.
pub(super) fn warn_of_open_folder(replica: &ReplicaSpec) {
    if let Place::Folder(folder) = replica.place()
        && let Some(open) = private::Open::look(folder)
    {
        output::note(&format!(
            "mirrorfs: {}",
            open.warning(&format!("the folder of replica {}", replica.name))
        ));
    }
}

fn replica_rows(config: &Config) -> Vec<Vec<String>> {
    config.replicas.iter().map(|r| vec![format!("  {}", r.name), r.url.clone()]).collect()
}
