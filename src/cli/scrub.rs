//! `mirrorfs scrub`: looking after the replicas on demand.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use super::locate::{self, Located};
use super::progress::Progress;
use super::{CommandError, Outcome, human, output, replica, runtime};
use crate::control::{Client, ScrubCommand, reason};
use crate::exit::Exit;
use crate::ids::ReplicaName;
use crate::reconcile::{ScrubRequest, ScrubState, ScrubStatus};
use crate::replica::unix_now;

/// How often a command that waits asks.
const LOOK_EVERY: Duration = Duration::from_millis(200);
/// A replica that cannot be looked at for so long is not waited for.
const PATIENCE: Duration = Duration::from_secs(30);

/// Compare the replicas with what they should hold, and mend what is wrong
///
/// A plain scrub compares names and sizes; a deep one reads and verifies every stored byte. Both copy what is missing or damaged from local
/// disk or another replica, and delete nothing. The daemon does this by itself, too (scrub_interval, check_interval). A scrub goes on
/// after a restart. MOUNTPOINT may be left out inside a mounted volume, and when only one is mounted.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  mirrorfs scrub --deep --wait
  mirrorfs scrub start ~/files --replica off --deep
  mirrorfs scrub --dry-run --wait ~/files
  mirrorfs scrub status --json
  mirrorfs scrub pause && mirrorfs scrub resume
With --wait it ends with 7 when something could not be mended or was forged, and with 6 when a replica could not be looked at.")]
pub(super) struct Args {
    /// What to do: start (unless said otherwise), pause, resume, stop or status; then the mountpoint
    #[arg(value_name = "ACTION] [MOUNTPOINT", num_args = 0..=2)]
    words: Vec<PathBuf>,

    /// Only this replica
    #[arg(long, value_name = "NAME", env = "MIRRORFS_SCRUB_REPLICA")]
    replica: Option<ReplicaName>,

    /// Read and verify every stored byte
    #[arg(long, env = "MIRRORFS_DEEP", value_parser = clap::builder::FalseyValueParser::new())]
    deep: bool,

    /// Wait until it is over, and show how far it is
    #[arg(long, env = "MIRRORFS_WAIT", value_parser = clap::builder::FalseyValueParser::new())]
    wait: bool,

    /// Only find what is wrong, and change nothing
    #[arg(long, env = "MIRRORFS_DRY_RUN", value_parser = clap::builder::FalseyValueParser::new())]
    dry_run: bool,

    /// Print JSON
    #[arg(long, env = "MIRRORFS_JSON", value_parser = clap::builder::FalseyValueParser::new())]
    json: bool,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Action {
    Start,
    Pause,
    Resume,
    Stop,
    Status,
}

/// The action and the mountpoint among at most two words.
fn split(words: &[PathBuf]) -> Result<(Action, Option<PathBuf>), CommandError> {
    let action = |word: &PathBuf| match word.to_str() {
        Some("start") => Some(Action::Start),
        Some("pause") => Some(Action::Pause),
        Some("resume") => Some(Action::Resume),
        Some("stop") => Some(Action::Stop),
        Some("status") => Some(Action::Status),
        _ => None,
    };
    let unknown = |word: &PathBuf| {
        CommandError::new(
            Exit::Usage,
            format!(
                "{} is neither an action (start, pause, resume, stop, status) nor a mountpoint",
                word.display()
            ),
        )
    };
    match words {
        [] => Ok((Action::Start, None)),
        [word] => match action(word) {
            Some(action) => Ok((action, None)),
            None if replica::is_path(&word.to_string_lossy()) => Ok((Action::Start, Some(word.clone()))),
            None => Err(unknown(word)),
        },
        [first, second, ..] => Ok((action(first).ok_or_else(|| unknown(first))?, Some(second.clone()))),
    }
}

pub(super) fn run(args: Args) -> Outcome {
    let (action, mountpoint) = split(&args.words)?;
    if action != Action::Start && (args.deep || args.dry_run) {
        return Err(CommandError::new(Exit::Usage, "--deep and --dry-run belong to scrub start"));
    }
    let located = locate::one(mountpoint.as_deref())?;
    let client = located.client()?;
    let replica = args.replica.clone();
    let command = match action {
        Action::Start => {
            Some(ScrubCommand::Start(ScrubRequest { replica, deep: args.deep, dry_run: args.dry_run }))
        }
        Action::Pause => Some(ScrubCommand::Pause { replica }),
        Action::Resume => Some(ScrubCommand::Resume { replica }),
        Action::Stop => Some(ScrubCommand::Stop { replica }),
        Action::Status => None,
    };
    let runtime = runtime()?;
    let asked = runtime.block_on(async {
        match &command {
            Some(command) => client.scrub(command).await,
            None => client.scrubs().await,
        }
    });
    let mut statuses = chosen(asked.map_err(|e| located.explain(e.into()))?, args.replica.as_ref());
    let wait = args.wait && matches!(action, Action::Start | Action::Resume | Action::Status);
    let mut given_up = Vec::new();
    if wait {
        (statuses, given_up) = runtime.block_on(over(&client, &located, statuses, args.replica.as_ref()))?;
    }
    if args.json {
        output::print_json(&statuses)?;
    } else {
        output::print(&show(&statuses, unix_now()))?;
    }
    if wait { verdict(&statuses, &given_up) } else { Ok(()) }
}

fn chosen(statuses: Vec<ScrubStatus>, replica: Option<&ReplicaName>) -> Vec<ScrubStatus> {
    statuses.into_iter().filter(|s| replica.is_none_or(|name| s.replica == *name)).collect()
}

/// Waits until the passes that were asked for are over; gives also the replicas that were not to be looked at.
async fn over(
    client: &Client,
    located: &Located,
    mut statuses: Vec<ScrubStatus>,
    replica: Option<&ReplicaName>,
) -> Result<(Vec<ScrubStatus>, Vec<ReplicaName>), CommandError> {
    let tickets: Vec<(ReplicaName, u64)> = statuses.iter().map(|s| (s.replica.clone(), s.asked)).collect();
    let mut progress = Progress::new("scrubbing");
    let mut stuck: Vec<(ReplicaName, Instant)> = Vec::new();
    let outcome = loop {
        let is_open = |s: &&ScrubStatus| {
            let ticket = tickets.iter().find(|(name, _)| *name == s.replica).map_or(0, |(_, n)| *n);
            s.done < ticket || (ticket == 0 && s.state == ScrubState::Running)
        };
        let open: Vec<&ScrubStatus> = statuses.iter().filter(is_open).collect();
        stuck.retain(|(name, _)| open.iter().any(|s| s.replica == *name && s.state != ScrubState::Running));
        for s in open.iter().filter(|s| s.state != ScrubState::Running) {
            if !stuck.iter().any(|(name, _)| *name == s.replica) {
                stuck.push((s.replica.clone(), Instant::now()));
            }
        }
        let is_stuck =
            |s: &&ScrubStatus| stuck.iter().any(|(n, at)| *n == s.replica && at.elapsed() >= PATIENCE);
        if open.iter().all(is_stuck) {
            break Ok(open.iter().map(|s| s.replica.clone()).collect());
        }
        let left =
            open.iter().map(|s| s.counters.total_bytes.saturating_sub(s.counters.examined_bytes)).sum();
        progress.update(left, &detail(&open));
        tokio::time::sleep(LOOK_EVERY).await;
        match client.scrubs().await {
            Ok(now) => statuses = chosen(now, replica),
            Err(e) => break Err(located.explain(e.into())),
        }
    };
    progress.finish();
    outcome.map(|given_up| (statuses, given_up))
}

fn detail(open: &[&ScrubStatus]) -> String {
    let bad: u64 = open.iter().map(|s| s.counters.bad).sum();
    let waiting: Vec<String> =
        open.iter().filter_map(|s| Some(format!("{}: {}", s.replica, s.detail.as_ref()?))).collect();
    let mut text = if bad > 0 { format!(", {bad} bad so far") } else { String::new() };
    if !waiting.is_empty() {
        text += &format!(" ({})", waiting.join(", "));
    }
    text
}

/// The code to end with.
fn verdict(statuses: &[ScrubStatus], given_up: &[ReplicaName]) -> Outcome {
    let last = |s: &ScrubStatus| s.last.clone().unwrap_or_default();
    let names = |wanted: &dyn Fn(&ScrubStatus) -> bool| {
        let names: Vec<_> = statuses.iter().filter(|s| wanted(s)).map(|s| s.replica.as_str()).collect();
        names.join(", ")
    };
    let left = |s: &ScrubStatus| !last(s).dry_run && last(s).counters.left > 0;
    let found = |s: &ScrubStatus| last(s).dry_run && last(s).counters.bad > 0;
    if statuses.iter().any(left) {
        let text = format!("not everything could be mended on {} (see above)", names(&left));
        return Err(CommandError::new(Exit::Damaged, text));
    }
    if statuses.iter().any(found) {
        let text = format!("something is wrong on {} (see above)", names(&found));
        return Err(CommandError::new(Exit::Damaged, text));
    }
    let forged = |s: &ScrubStatus| last(s).counters.forged > 0;
    if statuses.iter().any(forged) {
        let text =
            format!("someone else has written objects of this volume to {} (see above)", names(&forged));
        return Err(CommandError::new(Exit::Damaged, text));
    }
    let failed = |s: &ScrubStatus| given_up.contains(&s.replica) || last(s).error.is_some();
    if statuses.iter().any(failed) {
        let why = |s: &ScrubStatus| {
            let why = last(s).error.or_else(|| s.detail.clone()).unwrap_or_else(|| "no answer".into());
            format!("{}: {}", s.replica, reason(&s.replica, &why))
        };
        let whys: Vec<_> = statuses.iter().filter(|s| failed(s)).map(why).collect();
        let text = format!("not every replica could be looked at: {}", whys.join("; "));
        return Err(CommandError::new(Exit::Unreachable, text));
    }
    Ok(())
}

fn show(statuses: &[ScrubStatus], now: f64) -> String {
    let titles = ["REPLICA", "STATE", "EXAMINED", "BAD", "REPAIRED", "LEFT", "NEXT DEEP"];
    let mut rows = vec![titles.map(str::to_owned).to_vec()];
    for s in statuses {
        let c = &s.counters;
        let word = serde_json::to_value(s.state).ok();
        let mut state = word.as_ref().and_then(serde_json::Value::as_str).unwrap_or("?").to_owned();
        if s.started_at.is_some() {
            state += if s.deep { ", deep" } else { "" };
            state += if s.dry_run { ", dry run" } else { "" };
        }
        if s.state == ScrubState::Running
            && let Some(eta) = s.eta_seconds
        {
            state += &format!(", {}, about {} left", human::rate(s.rate), human::seconds(eta));
        }
        let next = s
            .next_deep_at
            .map_or_else(|| "never".to_owned(), |at| format!("in {}", human::seconds((at - now).max(0.0))));
        rows.push(vec![
            s.replica.to_string(),
            state,
            format!(
                "{} of {}, {}",
                c.examined,
                human::count(c.total.max(c.examined), "object"),
                human::size(c.examined_bytes)
            ),
            c.bad.to_string(),
            c.repaired.to_string(),
            c.left.to_string(),
            next,
        ]);
    }
    let mut text = output::table(&rows);
    for s in statuses {
        for finding in &s.findings {
            let (object, problem, outcome) = (&finding.object, &finding.problem, &finding.outcome);
            output::push_line(&mut text, format!("{}: {object}: {problem}: {outcome}", s.replica));
        }
        if s.counters.foreign > 0 {
            let objects = human::count(s.counters.foreign, "object");
            let line = format!("{}: {objects} that are not mirrorfs's are left alone", s.replica);
            output::push_line(&mut text, line);
        }
        if s.counters.forged > 0 {
            let line = format!(
                "{}: {} that no writer of this volume made, as far as its log says: not copied, left alone",
                s.replica,
                human::count(s.counters.forged, "object")
            );
            output::push_line(&mut text, line);
        }
        if s.counters.left_over > 0 {
            let objects = human::count(s.counters.left_over, "object");
            output::push_line(
                &mut text,
                format!("{}: {objects} that nothing needs are left alone", s.replica),
            );
        }
        if let Some(detail) = &s.detail {
            output::push_line(&mut text, format!("{}: {detail}", s.replica));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reconcile::{Counters, Summary};

    fn status() -> ScrubStatus {
        ScrubStatus {
            replica: "a".parse().unwrap(),
            state: ScrubState::Idle,
            detail: None,
            deep: false,
            dry_run: false,
            asked: 1,
            done: 1,
            started_at: None,
            counters: Counters { examined: 3, total: 3, examined_bytes: 2048, ..Counters::default() },
            rate: 0.0,
            eta_seconds: None,
            findings: Vec::new(),
            last: Some(Summary::default()),
            next_deep_at: Some(160.0),
        }
    }

    #[test]
    fn words_are_told_apart() {
        let words =
            |list: &[&str]| split(&list.iter().map(PathBuf::from).collect::<Vec<_>>()).map_err(|e| e.message);
        assert_eq!(words(&[]), Ok((Action::Start, None)));
        assert_eq!(words(&["/mnt/x"]), Ok((Action::Start, Some("/mnt/x".into()))));
        assert_eq!(words(&["status"]), Ok((Action::Status, None)));
        assert_eq!(words(&["stop", "x"]), Ok((Action::Stop, Some("x".into()))));
        assert!(words(&["strat"]).unwrap_err().contains("neither"));
        assert!(words(&["strat", "x"]).is_err());
    }

    #[test]
    fn the_end_tells_what_is_left() {
        let mut s = status();
        assert!(verdict(&[s.clone()], &[]).is_ok());
        assert_eq!(verdict(&[s.clone()], &["a".parse().unwrap()]).unwrap_err().exit, Exit::Unreachable);
        s.last.as_mut().unwrap().counters.left = 1;
        assert_eq!(verdict(&[s.clone()], &[]).unwrap_err().exit, Exit::Damaged);
        let mut forged = status();
        forged.last.as_mut().unwrap().counters.forged = 1;
        assert_eq!(verdict(&[forged], &[]).unwrap_err().exit, Exit::Damaged);
        let text = show(&[s], 100.0);
        assert!(
            text.contains("a        idle   3 of 3 objects, 2.0 KiB  0    0         0     in 1 m"),
            "{text}"
        );
    }
}
