//! `mirrorfs salvage`: saves what a state folder holds and the volume does not.

use std::path::PathBuf;

use super::args::ReplicaArgs;
use super::{CommandError, Outcome, human, output};
use crate::config::{self, Env};
use crate::daemon::{self, REPORT, SalvageArgs, SalvageReport};
use crate::exit::Exit;

/// Problems that are printed one by one; all stand in the list beside the files.
const SHOWN: usize = 20;

/// Save what was written with a state folder and not sent, after another machine took the volume over
///
/// Also for a state whose replicas are lost. No daemon may use the folder; nothing is claimed or sent. Files that changed
/// since the other machine went on are copied with their attributes; SALVAGE.txt beside them tells what was renamed and
/// removed. A file of which something cannot be had is saved with the ending .incomplete, and the command ends with
/// code 7, or with 6 when a replica that may have it did not answer. What is not in the state folder is taken from the replicas it was used with, or those that are given.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  mirrorfs salvage --state ~/.local/state/mirrorfs/0123456789abcdef --to ~/saved
  mirrorfs salvage --state /var/lib/mirrorfs/files --to /mnt/usb/saved --config /etc/mirrorfs/files.toml
  mirrorfs salvage --state old-state --to everything --all --json")]
pub(super) struct Args {
    /// The state folder
    #[arg(long, value_name = "DIR", env = "MIRRORFS_STATE")]
    state: PathBuf,

    /// A new or empty folder for the files
    #[arg(long, value_name = "DIR", env = "MIRRORFS_TO")]
    to: PathBuf,

    /// Save the whole tree, not only what changed
    #[arg(long, env = "MIRRORFS_ALL", value_parser = clap::builder::FalseyValueParser::new())]
    all: bool,

    /// Print a report as JSON
    #[arg(long, env = "MIRRORFS_JSON", value_parser = clap::builder::FalseyValueParser::new())]
    json: bool,

    #[command(flatten)]
    replicas: ReplicaArgs,
}

pub(super) fn run(args: &Args) -> Outcome {
    let env = Env::current()?;
    let raw = args.replicas.raw(&env.cwd)?;
    let state = env.cwd.join(&args.state);
    let mut replicas = config::load_replicas(&raw, &env)?;
    if replicas.is_empty() {
        replicas = config::state::remembered(&state);
    }
    let to = env.cwd.join(&args.to);
    let salvage = SalvageArgs { state, to: to.clone(), all: args.all };
    let report = daemon::salvage(&salvage, &replicas, &mut |_, _| {})?;
    if args.json {
        output::print_json(&report)?;
    } else {
        let saved = &report.saved;
        output::print(&format!(
            "saved {}, {}, to {}; {REPORT} there tells of {} renamed and {} removed names",
            human::count(saved.files, "file"),
            human::size(saved.bytes),
            to.display(),
            saved.renamed.len(),
            saved.removed.len(),
        ))?;
    }
    judge(&report)
}

/// Tells of what is missing, and what that means for how the command ends.
fn judge(report: &SalvageReport) -> Outcome {
    for warning in &report.warnings {
        output::note(&format!("mirrorfs: warning: {warning}"));
    }
    let saved = &report.saved;
    let incomplete = saved.incomplete.iter().map(|i| format!("{} is incomplete: {}", i.path, i.why));
    let problems = saved.problems.iter().map(|p| format!("{}: {}", p.path, p.text));
    for line in incomplete.chain(problems).take(SHOWN) {
        output::note(&format!("mirrorfs: {line}"));
    }
    let damaged = saved.problems.iter().any(|p| p.kind == crate::restore::ProblemKind::Damaged);
    if !saved.incomplete.is_empty() || !report.unknown_segments.is_empty() || damaged {
        let silent = saved.incomplete.iter().any(|i| i.unreachable);
        if silent || !report.unreachable.is_empty() {
            let names = match &report.unreachable[..] {
                [] => "replicas".to_owned(),
                names => format!("replica {}", names.join(", ")),
            };
            let message = format!(
                "not everything is here: {} incomplete files, {} segments unknown; {names} did not answer and may have \
                 the rest: salvage again into another folder when it does",
                saved.incomplete.len(),
                report.unknown_segments.len()
            );
            return Err(CommandError::new(Exit::Unreachable, message));
        }
        let message = format!(
            "not everything is here: {} incomplete files, {} segments unknown; name replicas that have the rest with --replica",
            saved.incomplete.len(),
            report.unknown_segments.len()
        );
        return Err(CommandError::new(Exit::Damaged, message));
    }
    match saved.problems.iter().filter(|p| p.kind > crate::restore::ProblemKind::Attribute).count() {
        0 => Ok(()),
        n => Err(CommandError::new(Exit::Failure, format!("{n} entries could not be saved"))),
    }
}
