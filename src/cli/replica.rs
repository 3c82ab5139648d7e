//! `mirrorfs replica`: the replicas of a mounted volume, and changing which they are.

use std::path::{Path, PathBuf};
use std::time::Duration;

use super::args::ReplicaArgs;
use super::locate::{self, Located};
use super::progress::Progress;
use super::{CommandError, Outcome, human, output, runtime};
use crate::config::{self, Env};
use crate::control::{Client, ReplicaEntry, ReplicaRequest, reason};
use crate::exit::Exit;
use crate::ids::{ReplicaName, SegmentNo};
use crate::replica::{RawSpeed, RawWork, ReplicaSpec, ReplicaState};

/// How often a command that waits asks.
const LOOK_EVERY: Duration = Duration::from_millis(200);

/// List the replicas of a mounted volume, attach and detach them, pause and resume shipping
///
/// Everything but void-claim and bench is done by the running daemon while the volume stays in use, and remembered in its state folder.
/// MOUNTPOINT may be left out inside a mounted volume, and when only one is mounted.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  mirrorfs replica list
  mirrorfs replica attach off=s3://bucket/mirror ~/files --wait
  mirrorfs replica replace old new=/mnt/disk2/mirror
  mirrorfs replica pause off && mirrorfs replica resume off
  mirrorfs replica void-claim off 8 --config home.toml
  mirrorfs replica bench s3://bucket/mirror --replica-option region=eu-central-1")]
pub(super) struct Args {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, clap::Subcommand)]
enum Action {
    /// Show each replica: its state, how far it is, what it replaces
    List(List),
    /// Take a new replica in and fill it from the others
    Attach(Attach),
    /// Let a replica go; what it holds stays there
    Detach(Detach),
    /// Attach a new replica, and detach an old one once the new one is filled
    Replace(Replace),
    /// Send nothing to a replica until it is resumed, also after a remount
    Pause(Named),
    /// Send to a replica again
    Resume(Named),
    /// Show a writer's claim on a replica, and remove it when it is forged or of no use
    VoidClaim(super::void::Void),
    /// Measure how fast a place is by itself, with bare requests, before or beside its use
    Bench(Bench),
}

#[derive(Debug, clap::Args)]
struct Bench {
    /// The place: a folder that is there, s3://bucket/prefix, gs://… or az://…, or the name of one in --config
    #[arg(value_name = "[NAME=]URL")]
    place: String,

    /// Configuration file (TOML) that describes it [env: MIRRORFS_CONFIG]
    #[arg(long, short, value_name = "FILE")]
    config: Option<PathBuf>,

    /// An option of it, such as endpoint=https://…; may be repeated [env: MIRRORFS_REPLICA_OPTION, separated by blanks]
    #[arg(long, value_name = "KEY=VALUE")]
    replica_option: Vec<String>,

    /// Objects that are written, read and deleted
    #[arg(long, value_name = "NUMBER", env = "MIRRORFS_OBJECTS", default_value = "32", value_parser = clap::value_parser!(u32).range(1..=100_000))]
    objects: u32,

    /// Bytes of each
    #[arg(long, value_name = "SIZE", env = "MIRRORFS_OBJECT_SIZE", default_value = "16MiB", value_parser = parse_size)]
    object_size: usize,

    /// Bytes of the ranges in which they are read
    #[arg(long, value_name = "SIZE", env = "MIRRORFS_RANGE_SIZE", default_value = "4MiB", value_parser = parse_size)]
    range_size: usize,

    /// Print JSON
    #[arg(long, env = "MIRRORFS_JSON", value_parser = clap::builder::FalseyValueParser::new())]
    json: bool,
}

/// A size that one object may have here.
fn parse_size(text: &str) -> Result<usize, String> {
    let size = config::units::parse_size(text, 1..=256 << 20)?;
    usize::try_from(size).map_err(|e| e.to_string())
}

#[derive(Debug, clap::Args)]
struct Common {
    /// The mountpoint, or any path below it
    mountpoint: Option<PathBuf>,

    /// Print the replicas as JSON
    #[arg(long, env = "MIRRORFS_JSON", value_parser = clap::builder::FalseyValueParser::new())]
    json: bool,
}

#[derive(Debug, clap::Args)]
struct List {
    #[command(flatten)]
    common: Common,
}

#[derive(Debug, clap::Args)]
struct Place {
    /// The new replica: a folder, s3://bucket/prefix, gs://… or az://…, or the name of one in --config
    #[arg(value_name = "[NAME=]URL")]
    place: String,

    #[command(flatten)]
    common: Common,

    /// Configuration file (TOML) that describes the new replica [env: MIRRORFS_CONFIG]
    #[arg(long, short, value_name = "FILE")]
    config: Option<PathBuf>,

    /// An option of the new replica, such as endpoint=https://…; may be repeated
    /// [env: MIRRORFS_REPLICA_OPTION, separated by blanks]
    #[arg(long, value_name = "KEY=VALUE")]
    replica_option: Vec<String>,

    /// Wait until the new replica is filled
    #[arg(long, env = "MIRRORFS_WAIT", value_parser = clap::builder::FalseyValueParser::new())]
    wait: bool,
}

#[derive(Debug, clap::Args)]
struct Attach {
    #[command(flatten)]
    place: Place,
}

#[derive(Debug, clap::Args)]
struct Replace {
    /// The replica that goes
    #[arg(value_name = "OLD")]
    old: ReplicaName,

    #[command(flatten)]
    place: Place,
}

#[derive(Debug, clap::Args)]
struct Detach {
    /// The replica
    #[arg(value_name = "NAME")]
    name: ReplicaName,

    #[command(flatten)]
    common: Common,

    /// Also when it alone holds something: that is given up
    #[arg(long, env = "MIRRORFS_FORCE", value_parser = clap::builder::FalseyValueParser::new())]
    force: bool,
}

#[derive(Debug, clap::Args)]
struct Named {
    /// The replica
    #[arg(value_name = "NAME")]
    name: ReplicaName,

    #[command(flatten)]
    common: Common,
}

pub(super) fn run(args: Args) -> Outcome {
    match args.action {
        Action::List(list) => {
            let located = locate::one(list.common.mountpoint.as_deref())?;
            let client = located.client()?;
            let entries = runtime()?.block_on(client.replicas()).map_err(|e| located.explain(e.into()))?;
            print(&entries, list.common.json)
        }
        Action::Attach(attach) => add(&attach.place, None),
        Action::Replace(replace) => add(&replace.place, Some(replace.old)),
        Action::Detach(detach) => {
            change(&detach.common, &ReplicaRequest::Detach { name: detach.name, force: detach.force })
        }
        Action::Pause(named) => change(&named.common, &ReplicaRequest::Pause { name: named.name }),
        Action::Resume(named) => change(&named.common, &ReplicaRequest::Resume { name: named.name }),
        Action::VoidClaim(void) => super::void::run(&void),
        Action::Bench(bench) => measure(&bench),
    }
}

fn change(common: &Common, request: &ReplicaRequest) -> Outcome {
    let located = locate::one(common.mountpoint.as_deref())?;
    let entries = ask(&located, request)?;
    print(&entries, common.json)
}

fn ask(located: &Located, request: &ReplicaRequest) -> Result<Vec<ReplicaEntry>, CommandError> {
    let client = located.client()?;
    runtime()?.block_on(client.change_replicas(request)).map_err(|e| located.explain(e.into()))
}

fn add(place: &Place, replaces: Option<ReplicaName>) -> Outcome {
    let spec = spec(&place.place, place.config.as_deref(), &place.replica_option)?;
    let located = locate::one(place.common.mountpoint.as_deref())?;
    let name = spec.name.clone();
    let request = ReplicaRequest::Attach {
        name: name.clone(),
        url: spec.url.clone(),
        options: spec.options.clone(),
        replaces,
    };
    let mut entries = ask(&located, &request)?;
    super::init::warn_of_open_folder(&spec);
    if place.wait {
        let client = located.client()?;
        entries = runtime()?.block_on(filled(&client, &name)).map_err(|e| located.explain(e))?;
    }
    print(&entries, place.common.json)?;
    if !place.common.json && !place.wait {
        output::note(&format!(
            "replica {name} is being filled; it counts for fsync when that is done (see: mirrorfs replica list)"
        ));
    }
    Ok(())
}

/// A replica, with what configuration and options say of it.
fn spec(place: &str, config: Option<&Path>, options: &[String]) -> Result<ReplicaSpec, CommandError> {
    let env = Env::current()?;
    let args = ReplicaArgs {
        config: config.map(Path::to_owned),
        replica: Vec::new(),
        replica_option: options.to_vec(),
    };
    let raw = args.raw(&env.cwd)?;
    Ok(config::load_replica(place, &raw, &env)?)
}

/// Figures of one place, as JSON.
#[derive(serde::Serialize)]
struct Measured<'a> {
    url: &'a str,
    work: RawWork,
    speed: RawSpeed,
}

fn measure(bench: &Bench) -> Outcome {
    let spec = spec(&bench.place, bench.config.as_deref(), &bench.replica_option)?;
    let failed = |e: &dyn std::fmt::Display| CommandError::new(Exit::Failure, format!("cannot measure: {e}"));
    let store = spec.store().map_err(|e| failed(&e))?;
    let work = RawWork {
        objects: bench.objects as usize,
        object_bytes: bench.object_size,
        puts: spec.limits.in_flight,
        range_bytes: bench.range_size,
        gets: spec.limits.reads_in_flight,
    };
    let unique = u128::from(getrandom::u64().map_err(|e| failed(&e))?);
    // As many threads as the daemon would use.
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().map_err(|e| failed(&e))?;
    let speed = runtime.block_on(store.measure(work, unique)).map_err(|e| failed(&e))?;
    if bench.json {
        return output::print_json(&Measured { url: &spec.url, work, speed });
    }
    output::print(&measured(&work, &speed))
}

fn measured(work: &RawWork, speed: &RawSpeed) -> String {
    let rate = |seconds: f64| human::rate(speed.bytes as f64 / seconds.max(1e-9));
    let of = |bytes: usize| human::size(bytes as u64);
    let all = human::size(speed.bytes);
    let rows = [
        [
            "written".to_owned(),
            rate(speed.put_seconds),
            format!("{all} in objects of {}, {} at a time", of(work.object_bytes), work.puts),
        ],
        [
            "read".to_owned(),
            rate(speed.get_seconds),
            format!("{all} in ranges of {}, {} at a time", of(work.range_bytes), work.gets),
        ],
        ["an answer".to_owned(), human::brief(speed.answer_seconds), "median, one byte".to_owned()],
    ];
    output::table(&rows.map(Vec::from))
}

/// Waits until a replica is filled, and the one that it replaces is gone.
async fn filled(client: &Client, name: &ReplicaName) -> Result<Vec<ReplicaEntry>, CommandError> {
    let mut progress = Progress::new("filling");
    let mut until = None;
    let outcome = loop {
        let entries = match client.replicas().await {
            Ok(entries) => entries,
            Err(e) => break Err(e.into()),
        };
        let Some(entry) = entries.iter().find(|e| e.status.name == *name) else {
            break Err(CommandError::new(Exit::Failure, format!("replica {name} was detached meanwhile")));
        };
        let status = &entry.status;
        if !status.joining && entry.replaces.is_none() {
            // What was sealed by then is there as well before anybody relies on it.
            let last = *until.get_or_insert(SegmentNo(status.cursor.0 + status.lag_segments));
            if status.cursor >= last {
                break Ok(entries);
            }
        }
        if matches!(status.state, ReplicaState::Foreign | ReplicaState::Fenced) {
            let why = status.last_error.as_ref().map_or_else(String::new, |e| e.text.clone());
            break Err(CommandError::new(Exit::WrongVolume, why));
        }
        let trouble = status.last_error.as_ref().filter(|_| status.state != ReplicaState::Healthy);
        let detail = trouble.map_or_else(String::new, |e| format!(", {}", reason(name, &e.text)));
        progress.update(status.lag_bytes, &detail);
        tokio::time::sleep(LOOK_EVERY).await;
    };
    progress.finish();
    outcome
}

fn print(entries: &[ReplicaEntry], json: bool) -> Outcome {
    if json { output::print_json(entries) } else { output::print(&show(entries)) }
}

fn show(entries: &[ReplicaEntry]) -> String {
    let titles = ["NAME", "STATE", "CURSOR", "BEHIND", "URL"];
    let mut rows = vec![titles.map(str::to_owned).to_vec()];
    rows.extend(entries.iter().map(|entry| {
        let s = &entry.status;
        let mut state = super::status::state(s.state);
        match (&entry.replaces, s.joining) {
            (Some(old), _) => state += &format!(", replaces {old}"),
            (None, true) => state += ", being filled",
            (None, false) => {}
        }
        let behind = match s.lag_segments {
            0 => "-".to_owned(),
            n => format!("{}, {}", human::count(n, "segment"), human::size(s.lag_bytes)),
        };
        vec![s.name.to_string(), state, s.cursor.to_string(), behind, s.url.clone()]
    }));
    output::table(&rows)
}

/// Whether a word could be a path rather than an action of `scrub`.
pub(super) fn is_path(word: &str) -> bool {
    word.contains('/') || word.starts_with('.') || Path::new(word).is_dir()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::tests::sample_status;

    #[test]
    fn the_list_says_what_is_being_filled_and_replaced() {
        let status = sample_status().replicas.remove(0);
        let mut entry = ReplicaEntry { status, replaces: None };
        assert!(show(std::slice::from_ref(&entry)).contains("healthy  5"));
        entry.status.joining = true;
        entry.status.lag_segments = 2;
        entry.status.lag_bytes = 2048;
        let text = show(std::slice::from_ref(&entry));
        assert!(text.contains("healthy, being filled  5       2 segments, 2.0 KiB  file:///r/a"), "{text}");
        entry.replaces = Some("old".parse().unwrap());
        assert!(show(&[entry]).contains("healthy, replaces old"));
    }
}
