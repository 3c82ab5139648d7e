//! `mirrorfs replica void-claim`: shows a claim on a replica, and removes it when told to.

use std::path::PathBuf;

use super::args::ReplicaArgs;
use super::{CommandError, Outcome, human, output, runtime};
use crate::config::{self, Env};
use crate::daemon::{self, VoidReport};
use crate::exit::Exit;
use crate::ids::Epoch;
use crate::replica::{ReplicaSpec, Store};

#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  mirrorfs replica void-claim off 8 --config home.toml
  mirrorfs replica void-claim off 8 --state ~/.local/state/mirrorfs/0123456789abcdef --discard
  mirrorfs replica void-claim /mnt/disk/mirror 4294967295 --discard")]
pub(super) struct Void {
    /// The replica: its name in --config, its name as --state remembers it, or its place
    #[arg(value_name = "NAME|URL")]
    place: String,

    /// The epoch that is claimed there
    #[arg(value_parser = clap::value_parser!(u32).range(1..))]
    epoch: u32,

    /// The state folder that is fenced by the claim: it is used again afterwards. No daemon may use
    /// it
    #[arg(long, value_name = "DIR", env = "MIRRORFS_STATE")]
    state: Option<PathBuf>,

    #[command(flatten)]
    replicas: ReplicaArgs,

    /// Remove the claim, and everything on that replica that was written under it
    #[arg(long)]
    discard: bool,

    /// Print a report as JSON
    #[arg(long, env = "MIRRORFS_JSON", value_parser = clap::builder::FalseyValueParser::new())]
    json: bool,
}

pub(super) fn run(args: &Void) -> Outcome {
    let env = Env::current()?;
    let raw = args.replicas.raw(&env.cwd)?;
    let state = args.state.as_ref().map(|dir| env.cwd.join(dir));
    let mut known = config::load_replicas(&raw, &env)?;
    if let (true, Some(state)) = (known.is_empty(), &state) {
        known = config::state::remembered(state);
    }
    let spec = match known.iter().find(|spec| spec.name.as_str() == args.place) {
        Some(spec) => spec.clone(),
        None => config::load_replica(&args.place, &raw, &env)?,
    };
    let store = |spec: &ReplicaSpec| {
        spec.store().map_err(|e| CommandError::new(Exit::Usage, format!("replica {}: {e}", spec.name)))
    };
    let others = known.iter().filter(|other| other.url != spec.url).map(store);
    let others: Vec<Store> = others.collect::<Result<_, _>>()?;
    let store = store(&spec)?;
    let work = daemon::void_claim(&store, &others, state.as_deref(), Epoch(args.epoch), args.discard);
    let report = runtime()?.block_on(work)?;
    if args.json {
        output::print_json(&report)?;
    } else {
        output::print(&show(&report))?;
    }
    if report.removed {
        return Ok(());
    }
    Err(CommandError::new(
        Exit::Usage,
        "nothing was changed. If nobody needs what is shown, repeat the command with --discard",
    ))
}

fn show(report: &VoidReport) -> String {
    let mut rows = vec![["replica".to_owned(), format!("{} ({})", report.replica, report.url)]];
    let mut row = |name: &str, value: String| rows.push([name.to_owned(), value]);
    row("epoch", report.epoch.to_string());
    match (&report.claim, &report.unreadable) {
        (Some(claim), _) => {
            row("claimed by", format!("{} (process {})", claim.host, claim.pid));
            row("claimed at", report.claimed_at.clone().unwrap_or_default());
            let first = claim.begins();
            row("goes on from", first.map_or_else(|| "nowhere yet".into(), |n| format!("segment {n}")));
        }
        (None, Some(why)) => row("claim", format!("cannot be read: {why}")),
        (None, None) => row("claim", "not there (any more)".to_owned()),
    }
    let size = human::size(report.bytes);
    let (lost, unlocked) = match report.removed {
        true => ("discarded", "usable again"),
        false => ("to be discarded", "fenced by it"),
    };
    row(lost, format!("{}, {size}, on this replica", human::count(report.segments, "segment")));
    let on: Vec<_> = report.elsewhere.iter().map(ToString::to_string).collect();
    row("also on", if on.is_empty() { "no other replica that answers".into() } else { on.join(", ") });
    if let Some(state) = &report.fenced {
        row(unlocked, format!("state folder {state}"));
    }
    output::table(&rows.into_iter().map(Vec::from).collect::<Vec<_>>())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_that_would_be_lost_is_shown() {
        let report = VoidReport {
            replica: "off".parse().unwrap(),
            url: "s3://b/x".into(),
            epoch: Epoch(8),
            claim: Some(crate::format::volume::testing::claim(8, 7, 30)),
            unreadable: None,
            claimed_at: Some("2026-11-29T10:00:00Z".into()),
            segments: 3,
            bytes: 2048,
            elsewhere: vec!["two".parse().unwrap()],
            fenced: Some("/s".into()),
            removed: false,
        };
        let text = show(&report);
        for word in [
            "off (s3://b/x)",
            "host7 (process 1)",
            "2026-11-29",
            "segment 30",
            "to be discarded",
            "3 segments, 2.0 KiB",
            "two",
            "/s",
        ] {
            assert!(text.contains(word), "{word}: {text}");
        }
        let gone = VoidReport { claim: None, unreadable: None, removed: true, ..report };
        let text = show(&gone);
        assert!(text.contains("not there") && text.contains("usable again"), "{text}");
    }
}
