//! `mirrorfs fsck`: checks a volume's tables and replicas, and mends what can be mended without losing anything.
//!
//! Owns which state folder or daemon is meant, what is printed, and the codes of fsck(8).

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use super::locate;
use super::{CommandError, human, output, runtime};
use crate::config::{self, Config, Env, Layer, Raw};
use crate::control::{Client, FsckRequest, Registry, ScrubCommand};
use crate::daemon::{self, FsckArgs};
use crate::exit::{Exit, FsckExit};
use crate::fsck::{Outcome, Report};
use crate::ids::ReplicaName;
use crate::reconcile::ScrubRequest;
use crate::replica::ReplicaSpec;

/// Findings of one kind that are told, unless all are wanted.
const TOLD: usize = 20;

/// Check a volume's tables, and what its replicas hold, and mend what is wrong
///
/// Checks names, link counts, content, references and totals against each other, and tells what is wrong with its path. Changes nothing without
/// --repair. A volume that is not mounted is found by --state, by --config, or by the mountpoint at which its daemon died; of one that is
/// mounted the daemon checks the tables as they are at one moment. With --replica it is also checked what replicas hold and what each alone
/// would restore; where there is no local state, only that.
#[derive(Debug, clap::Args)]
#[command(after_help = after_help())]
pub(super) struct Args {
    /// The mountpoint, or any path below it
    mountpoint: Option<PathBuf>,

    /// The state folder of a volume that is not mounted
    #[arg(long, value_name = "DIR", env = "MIRRORFS_STATE")]
    state: Option<PathBuf>,

    /// Check this replica, too: its name, its place, or all; may be repeated
    #[arg(long, short, value_name = "NAME|URL|all", env = "MIRRORFS_FSCK_REPLICA", value_delimiter = ' ')]
    replica: Vec<String>,

    /// Configuration file (TOML) that names the replicas [env: MIRRORFS_CONFIG]
    #[arg(long, short, value_name = "FILE")]
    config: Option<PathBuf>,

    /// An option of one replica, or of all; may be repeated [env: MIRRORFS_REPLICA_OPTION, separated by blanks]
    #[arg(long, value_name = "[NAME.]KEY=VALUE")]
    replica_option: Vec<String>,

    /// Mend what can be mended without losing anything; the volume must not be mounted
    #[arg(long, env = "MIRRORFS_REPAIR", value_parser = clap::builder::FalseyValueParser::new())]
    repair: bool,

    /// Read and verify content, too: the cache, staged segments, every object of the replicas
    #[arg(long, env = "MIRRORFS_DEEP", value_parser = clap::builder::FalseyValueParser::new())]
    deep: bool,

    /// Tell every finding, not only the first of each kind
    #[arg(long, env = "MIRRORFS_ALL", value_parser = clap::builder::FalseyValueParser::new())]
    all: bool,

    /// Print a report as JSON
    #[arg(long, env = "MIRRORFS_JSON", value_parser = clap::builder::FalseyValueParser::new())]
    json: bool,
}

fn after_help() -> String {
    let rows = FsckExit::ALL.iter().map(|(exit, meaning)| format!("  {:>2}  {meaning}\n", exit.code()));
    format!(
        "Examples:
  mirrorfs fsck ~/files
  mirrorfs fsck --config home.toml --replica all --deep
  mirrorfs fsck --state ~/.local/state/mirrorfs/0123456789abcdef --repair
  mirrorfs fsck --replica s3://bucket/mirror --json
Exit codes, as those of fsck(8); several at once are added up:
{}",
        rows.collect::<String>()
    )
}

/// Whether the arguments call this command.
pub(super) fn is_meant(arguments: &[OsString]) -> bool {
    arguments.get(1).is_some_and(|a| a == "fsck")
}

impl CommandError {
    fn fsck_exit(&self) -> FsckExit {
        if self.exit == Exit::Usage { FsckExit::USAGE } else { FsckExit::FAILED }
    }
}

pub(super) fn run(args: &Args) -> FsckExit {
    let cancelled = watch_interrupts();
    let outcome = checked(args, &cancelled);
    if cancelled.load(Ordering::Relaxed) {
        output::note("mirrorfs: interrupted; nothing but what was told is known");
        return FsckExit::CANCELLED;
    }
    let told = outcome.and_then(|report| {
        if args.json {
            output::print_json(&report)?;
        } else {
            output::print(&show(&report, args.repair))?;
        }
        Ok(report)
    });
    match told {
        Ok(report) => verdict(&report),
        Err(error) => {
            output::note(&format!("mirrorfs: {error}"));
            error.fsck_exit()
        }
    }
}

/// Set by the first SIGINT or SIGTERM; the second ends the process at once.
fn watch_interrupts() -> Arc<AtomicBool> {
    let flag = Arc::new(AtomicBool::new(false));
    let told = Arc::clone(&flag);
    let watch = move || {
        let Ok(runtime) = runtime() else { return };
        runtime.block_on(async {
            use tokio::signal::unix::{SignalKind, signal};
            let both = (signal(SignalKind::interrupt()), signal(SignalKind::terminate()));
            let (Ok(mut int), Ok(mut term)) = both else { return };
            loop {
                tokio::select! { _ = int.recv() => {} _ = term.recv() => {} }
                if told.swap(true, Ordering::Relaxed) {
                    std::process::exit(i32::from(FsckExit::CANCELLED.code()));
                }
            }
        });
    };
    // Without it a signal just ends the process.
    let _ = std::thread::Builder::new().name("mirrorfs-signals".into()).spawn(watch);
    flag
}

/// What is to be looked at.
enum Target {
    /// A state folder that some daemon of this user may use.
    State(PathBuf, u32),
    /// Replicas alone.
    Replicas(Vec<ReplicaSpec>),
}

fn usage(text: impl Into<String>) -> CommandError {
    CommandError::new(Exit::Usage, text)
}

/// Whether a word is a replica's name, and not its place.
fn is_name(word: &str) -> bool {
    word.parse::<ReplicaName>().is_ok()
}

fn checked(args: &Args, cancelled: &Arc<AtomicBool>) -> Result<Report, CommandError> {
    let env = Env::current()?;
    let raw = raw(args, &env)?;
    match target(args, &raw, &env)? {
        Target::State(state, owner) => {
            let client = Client::new(&state, owner);
            // A socket that a dead daemon left answers nobody.
            let lives = runtime()?.block_on(client.status()).is_ok();
            if lives { live(args, &client, cancelled) } else { at_rest(args, &raw, &env, &state, cancelled) }
        }
        Target::Replicas(_) if args.repair => Err(usage(
            "a replica is mended from the volume's other replicas: mount it, then mirrorfs scrub --deep",
        )),
        Target::Replicas(replicas) => {
            let ask = || cancelled.load(Ordering::Relaxed);
            Ok(daemon::fsck_replicas(&fsck_args(args, &replicas, &ask))?)
        }
    }
}

fn fsck_args<'a>(
    args: &Args,
    replicas: &'a [ReplicaSpec],
    cancelled: &'a (dyn Fn() -> bool + Sync),
) -> FsckArgs<'a> {
    FsckArgs { repair: args.repair, deep: args.deep, limit: limit(args), replicas, cancelled }
}

fn limit(args: &Args) -> usize {
    if args.all { usize::MAX } else { TOLD }
}

/// The configuration that was given, with the places among the replicas.
fn raw(args: &Args, env: &Env) -> Result<Raw, CommandError> {
    let mut flags = Layer::default();
    for word in args.replica.iter().filter(|w| !is_name(w)) {
        flags.add_replica(word, "--replica", &env.cwd);
    }
    for option in &args.replica_option {
        flags.add_replica_option(option, "--replica-option")?;
    }
    Ok(Raw { config: args.config.clone(), flags, options: Vec::new() })
}

fn target(args: &Args, raw: &Raw, env: &Env) -> Result<Target, CommandError> {
    if let Some(state) = &args.state {
        return Ok(Target::State(env.cwd.join(state), me()));
    }
    let configured = args.config.is_some() || !raw.flags.replicas.is_empty();
    if let Some(mountpoint) = &args.mountpoint {
        return mounted(mountpoint, env);
    }
    if !configured {
        let located = locate::one(None)?;
        return match (&located.entry, located.user) {
            (Some(entry), Some(user)) => Ok(Target::State(entry.state.clone(), user)),
            _ => Err(located.client().err().unwrap_or_else(|| usage("name the state folder with --state"))),
        };
    }
    let config = Config::load(raw, env)?;
    if config.state.join("state.json").exists() {
        return Ok(Target::State(config.state, me()));
    }
    match args.replica.is_empty() {
        true => Err(CommandError::new(
            Exit::NoVolume,
            format!(
                "there is no local state in {}: name its folder with --state, or check replicas alone with --replica all",
                config.state.display()
            ),
        )),
        false => {
            let wanted = |spec: &ReplicaSpec| {
                let named = |w: &String| w == "all" || !is_name(w) || *w == spec.name.as_str();
                args.replica.iter().any(named)
            };
            Ok(Target::Replicas(config.replicas.into_iter().filter(wanted).collect()))
        }
    }
}

fn me() -> u32 {
    rustix::process::geteuid().as_raw()
}

/// The state of what is mounted there, or was until its daemon died.
fn mounted(mountpoint: &Path, env: &Env) -> Result<Target, CommandError> {
    let not_there = match locate::find(mountpoint, true) {
        Ok(located) => match (located.entry, located.user) {
            (Some(entry), Some(user)) => return Ok(Target::State(entry.state, user)),
            _ => usage(format!(
                "cannot tell which state folder {} has: name it with --state",
                mountpoint.display()
            )),
        },
        Err(error) => error,
    };
    let path = env.cwd.join(mountpoint);
    let left = [Some(path.clone()), path.canonicalize().ok()].into_iter().flatten();
    let left = left.filter_map(|path| Registry::of_user().find_left(&path)).next();
    match left.filter(|entry| entry.state.join("state.json").exists()) {
        Some(entry) => Ok(Target::State(entry.state, me())),
        None => Err(CommandError::new(
            not_there.exit,
            format!("{not_there}; name the state folder of what was mounted there with --state or --config"),
        )),
    }
}

/// Checks a state folder that no daemon uses.
fn at_rest(
    args: &Args,
    raw: &Raw,
    env: &Env,
    state: &Path,
    cancelled: &Arc<AtomicBool>,
) -> Result<Report, CommandError> {
    let mut chosen = Vec::new();
    if !args.replica.is_empty() {
        let configured = config::load_replicas(raw, env)?;
        let members = daemon::fsck_members(state, &configured)?;
        for word in &args.replica {
            match word.as_str() {
                "all" => chosen.clone_from(&members),
                name if is_name(name) => match members.iter().find(|s| s.name.as_str() == name) {
                    Some(spec) => chosen.push(spec.clone()),
                    None => {
                        return Err(usage(format!(
                            "no replica is called {name}: name its place, or give --config FILE"
                        )));
                    }
                },
                place => chosen.push(config::load_replica(place, raw, env)?),
            }
        }
        if chosen.is_empty() {
            return Err(usage(
                "no replica is known of this state: name its place with --replica URL, or give --config FILE",
            ));
        }
    }
    let ask = || cancelled.load(Ordering::Relaxed);
    Ok(daemon::fsck_state(state, &fsck_args(args, &chosen, &ask))?)
}

/// Has the daemon check.
fn live(args: &Args, client: &Client, cancelled: &Arc<AtomicBool>) -> Result<Report, CommandError> {
    let mut request = FsckRequest { deep: args.deep, limit: limit(args), ..FsckRequest::default() };
    for word in &args.replica {
        match word.as_str() {
            "all" => request.all_replicas = true,
            word => {
                let name = word.split_once('=').map_or(word, |(name, _)| name);
                let name = name.parse().map_err(|_| {
                    usage(format!("{word}: the volume is mounted, name the replica by its name"))
                })?;
                request.replicas.push(name);
            }
        }
    }
    if args.repair && args.replica.is_empty() {
        let text = "the volume is mounted: unmount it, then repair. (Replicas are mended while it is mounted, with --replica.)";
        return Err(CommandError::new(Exit::InUse, text));
    }
    runtime()?.block_on(async {
        let given_up = async {
            while !cancelled.load(Ordering::Relaxed) {
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        };
        let mut report = tokio::select! {
            report = client.fsck(&request) => report?,
            () = given_up => return Err(CommandError::new(Exit::Failure, "interrupted")),
        };
        if args.repair {
            let names: Vec<Option<ReplicaName>> = if request.all_replicas {
                vec![None]
            } else {
                request.replicas.iter().cloned().map(Some).collect()
            };
            for replica in names {
                client
                    .scrub(&ScrubCommand::Start(ScrubRequest { replica, deep: args.deep, dry_run: false }))
                    .await?;
            }
            report.notes.push(
                "a scrub was begun, which mends the replicas; see how far it is with mirrorfs scrub status"
                    .into(),
            );
        }
        Ok(report)
    })
}

fn verdict(report: &Report) -> FsckExit {
    let mut exit = FsckExit::CLEAN;
    if report.corrected > 0 {
        exit = exit.and(FsckExit::CORRECTED);
    }
    if report.left > 0 {
        exit = exit.and(FsckExit::LEFT);
    }
    if !report.failed.is_empty() {
        exit = exit.and(FsckExit::FAILED);
    }
    exit
}

fn show(report: &Report, repaired: bool) -> String {
    let mut text = String::new();
    for line in &report.findings {
        output::push_line(&mut text, line.to_string());
    }
    for (kind, n) in &report.counts {
        let told = report.findings.iter().filter(|l| l.kind == *kind).count() as u64;
        if *n > told {
            let more = n - told;
            output::push_line(
                &mut text,
                format!("… and {more} more of kind {}; --all tells them", kind.word()),
            );
        }
    }
    for note in &report.notes {
        output::push_line(&mut text, format!("note: {note}"));
    }
    for failed in &report.failed {
        output::push_line(&mut text, format!("not checked: {failed}"));
    }
    let t = &report.totals;
    let looked = format!(
        "{}, {}, {}, {}",
        human::count(t.inodes, "inode"),
        human::count(t.names, "name"),
        human::count(t.blocks, "block"),
        human::count(t.segments, "segment")
    );
    let can = report.findings.iter().any(|l| l.outcome == Outcome::Correctable);
    let hint = if can && !repaired { "; mend them with --repair" } else { "" };
    text + &match report.errors {
        0 => format!("{looked}: clean"),
        n => format!(
            "{looked}: {}, {} corrected, {} left{hint}",
            human::count(n, "error"),
            report.corrected,
            report.left
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fsck::{Kind, Line};

    #[test]
    fn the_end_tells_what_is_left() {
        let mut report = Report::default();
        assert_eq!(verdict(&report).code(), 0);
        assert!(show(&report, false).ends_with("0 segments: clean"));
        (report.errors, report.corrected, report.left) = (3, 1, 2);
        report.counts.insert(Kind::LinkCount, 3);
        let line = |outcome| Line {
            kind: Kind::LinkCount,
            path: Some("/a/b".into()),
            ino: None,
            problem: "link count 3, but 2 names".into(),
            outcome,
        };
        report.findings = vec![line(Outcome::Corrected), line(Outcome::Correctable)];
        report.failed.push("replica x".into());
        assert_eq!(verdict(&report).code(), 1 + 4 + 8);
        let text = show(&report, false);
        assert!(
            text.contains("/a/b: link count 3, but 2 names: corrected\n/a/b: link count 3, but 2 names\n"),
            "{text}"
        );
        assert!(text.contains("… and 1 more of kind link_count"), "{text}");
        assert!(text.ends_with("3 errors, 1 corrected, 2 left; mend them with --repair"), "{text}");
    }

    #[test]
    fn names_and_places_are_told_apart() {
        assert!(is_name("off") && is_name("all"));
        assert!(!is_name("/mnt/x") && !is_name("off=/mnt/x") && !is_name("s3://b/p") && !is_name("./x"));
        let words = |list: &[&str]| list.iter().map(OsString::from).collect::<Vec<_>>();
        assert!(
            is_meant(&words(&["mirrorfs", "fsck", "--what"])) && !is_meant(&words(&["mirrorfs", "mount"]))
        );
    }
}
