//! `mirrorfs version`.

use super::{Outcome, output};

/// Show the version
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  mirrorfs version
  mirrorfs version --json")]
pub(super) struct Args {
    /// Print JSON
    #[arg(long, env = "MIRRORFS_JSON", value_parser = clap::builder::FalseyValueParser::new())]
    json: bool,
}

pub(super) fn run(args: &Args) -> Outcome {
    let version = env!("CARGO_PKG_VERSION");
    if args.json {
        return output::print_json(&serde_json::json!({ "name": "mirrorfs", "version": version }));
    }
    output::print(&format!("mirrorfs {version}"))
}
