//! `mirrorfs sync`: waits until what was written is on the replicas.

use std::path::PathBuf;
use std::time::Duration;

use super::progress::Progress;
use super::{CommandError, Outcome, human, locate, output, runtime};
use crate::config::units;
use crate::control::{Client, Refused, Replicas, SyncProgress, SyncRequest, reason};
use crate::exit::Exit;

/// Wait until everything written so far is committed on the replicas
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  mirrorfs sync ~/files
  mirrorfs sync ~/files --replicas quorum --timeout 10m || echo 'not yet safe'")]
pub(super) struct Args {
    /// The mountpoint, or any path below it
    mountpoint: PathBuf,

    /// On how many replicas: all, quorum or a number
    #[arg(long, value_name = "HOW MANY", env = "MIRRORFS_REPLICAS", default_value = "all")]
    replicas: Replicas,

    /// Give up waiting after this time (a number is seconds) with exit code 8; sending goes on
    #[arg(long, value_name = "TIME", env = "MIRRORFS_TIMEOUT", value_parser = parse_timeout)]
    timeout: Option<Duration>,

    /// Print the outcome as JSON
    #[arg(long, env = "MIRRORFS_JSON", value_parser = clap::builder::FalseyValueParser::new())]
    json: bool,
}

fn parse_timeout(text: &str) -> Result<Duration, String> {
    units::parse_duration(text, Duration::from_millis(1)..=Duration::from_secs(30 * 86400))
}

pub(super) fn run(args: &Args) -> Outcome {
    let located = locate::find(&args.mountpoint, true)?;
    let client = located.client()?;
    let timeout_seconds = args.timeout.map(|t| t.as_secs_f64());
    let request = SyncRequest { replicas: args.replicas, timeout_seconds };
    let done = runtime()?.block_on(wait(&client, request)).map_err(|error| located.explain(error))?;
    let whole = require_whole(&done.refused);
    if args.json {
        output::print_json(&done)?;
        return whole;
    }
    whole?;
    output::print(&format!(
        "synced up to change {} on {} of {} replicas",
        done.lsn,
        done.replicas.iter().filter(|r| r.done).count(),
        done.replicas.len()
    ))
}

/// It is no success when bytes that programs wrote could not be stored.
pub(super) fn require_whole(refused: &Refused) -> Outcome {
    refused.text().map_or(Ok(()), |text| Err(CommandError::new(Exit::Failure, text)))
}

/// Syncs with a bar; also what `umount --wait` does first.
pub(super) async fn wait(client: &Client, request: SyncRequest) -> Result<SyncProgress, CommandError> {
    let mut progress = Progress::new("syncing");
    let outcome = client.sync(request, |step| progress.update(step.bytes_left, &detail(step))).await;
    progress.finish();
    Ok(outcome?)
}

/// The replicas that are waited for, the trouble of those that have any.
fn detail(step: &SyncProgress) -> String {
    if !step.sealed {
        return match &step.error {
            Some(error) => format!(", cannot be sealed yet: {error}"),
            None => ", sealing".to_owned(),
        };
    }
    let waiting: Vec<String> = step
        .replicas
        .iter()
        .filter(|r| !r.done)
        .map(|r| match &r.error {
            Some(error) => format!("{}: {}", r.name, reason(&r.name, error)),
            None => format!("{}: {}", r.name, human::size(r.bytes_left)),
        })
        .collect();
    let count = format!(", {} of {} replicas done", step.done, step.needed);
    if waiting.is_empty() { count } else { format!("{count} ({})", waiting.join(", ")) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::SyncReplica;

    #[test]
    fn the_detail_says_who_is_waited_for_and_why() {
        let replica = |name: &str, left: u64, error: Option<&str>| SyncReplica {
            name: name.parse().unwrap(),
            done: left == 0,
            bytes_left: left,
            segments_left: 1,
            error: error.map(str::to_owned),
        };
        let mut step = SyncProgress { needed: 2, ..SyncProgress::default() };
        assert_eq!(detail(&step), ", sealing");
        step.error = Some("disk full".into());
        assert_eq!(detail(&step), ", cannot be sealed yet: disk full");
        step.sealed = true;
        step.done = 1;
        step.replicas =
            vec![replica("a", 0, None), replica("b", 2048, None), replica("c", 9, Some("no route"))];
        assert_eq!(detail(&step), ", 1 of 2 replicas done (b: 2.0 KiB, c: no route)");
    }

    #[test]
    fn a_timeout_is_a_time() {
        assert_eq!(parse_timeout("5"), Ok(Duration::from_secs(5)));
        assert_eq!(parse_timeout("2m"), Ok(Duration::from_secs(120)));
        assert!(parse_timeout("0").unwrap_err().contains("out of range"));
    }
}
