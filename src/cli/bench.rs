//! `mirrorfs bench`: how fast a directory is, alone or beside another one.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, SystemTime};

use serde::Serialize;

use super::{CommandError, Outcome, locate, output, runtime};
use crate::bench::{self, Event, Machine, Place, Plan, Row, Size, Workload};
use crate::config::units;
use crate::control::mounts::{self, Mount};
use crate::control::{Replicas, SyncRequest};
use crate::exit::Exit;

/// Measure how fast a directory is, alone or in turn with others
///
/// Works in a folder of its own in each directory and removes it afterwards. Each workload runs in one directory and
/// then in the others, before the next; shown is the median of the rounds. Before each measurement everything is
/// written back, and sent to the replicas. What needs empty kernel caches is measured only as root. A directory that fails or
/// is too slow at a workload is left out there.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  mirrorfs bench ~/files
  mirrorfs bench /srv/files --against /var/tmp --rounds 5 --json figures.json
  mirrorfs bench ~/files --against /var/tmp --against /mnt/other --limit 1m
  mirrorfs bench ~/files --workloads create,untar,remove --scale 0.1")]
pub(super) struct Args {
    /// The directory, on a mount of mirrorfs or anywhere else
    dir: PathBuf,

    /// Another directory, measured in turn; the table shows time in DIR / time here. May be given several times
    #[arg(long, value_name = "DIR", env = "MIRRORFS_AGAINST")]
    against: Vec<PathBuf>,

    /// How many times everything is measured
    #[arg(long, value_name = "NUMBER", env = "MIRRORFS_ROUNDS", default_value = "3", value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: u32,

    /// Which ones, separated by commas (all by default)
    #[arg(long, value_name = "LIST", env = "MIRRORFS_WORKLOADS", value_delimiter = ',')]
    workloads: Vec<Workload>,

    /// More or less work: 1 is a file of 2 GiB, 20,000 small files
    #[arg(long, value_name = "FACTOR", env = "MIRRORFS_SCALE", default_value = "1", value_parser = parse_scale)]
    scale: f64,

    /// Give up a workload in a directory after this long; preparing it has as much time again
    #[arg(long, value_name = "TIME", env = "MIRRORFS_LIMIT", default_value = "30m", value_parser = parse_limit)]
    limit: Duration,

    /// Before each measurement wait at most this long for the machine to have nothing else to do
    #[arg(long, value_name = "TIME", env = "MIRRORFS_IDLE", default_value = "10s", value_parser = parse_idle)]
    idle: Duration,

    /// A command to run before each measurement, through the shell: to wait for other filesystems' work in the background
    #[arg(long, value_name = "COMMAND", env = "MIRRORFS_SETTLE")]
    settle: Option<String>,

    /// Write all single figures to a file, as JSON (`-`: standard output instead of the table)
    #[arg(long, value_name = "FILE", env = "MIRRORFS_JSON")]
    json: Option<PathBuf>,
}

fn parse_scale(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(scale) if (0.0001..=100.0).contains(&scale) => Ok(scale),
        _ => Err("a number from 0.0001 to 100 is wanted".into()),
    }
}

fn parse_limit(text: &str) -> Result<Duration, String> {
    units::parse_duration(text, Duration::from_secs(1)..=Duration::from_secs(86400))
}

fn parse_idle(text: &str) -> Result<Duration, String> {
    units::parse_duration(text, Duration::ZERO..=Duration::from_secs(3600))
}

/// What `--json` writes; docs/performance.md describes it.
#[derive(Serialize)]
struct Report<'a> {
    /// Of this form: counted up when a field changes its meaning.
    format: u32,
    date: String,
    version: &'static str,
    machine: Machine,
    directories: &'a [Directory],
    rounds: u32,
    size: &'a Size,
    measured: u32,
    disturbed: u32,
    rows: &'a [Row],
}

#[derive(Debug, PartialEq, Eq, Serialize)]
struct Directory {
    /// What the table calls it.
    name: String,
    path: PathBuf,
    /// The kernel's name for the filesystem it lies on.
    filesystem: String,
}

/// Directories by their filesystems; where several have the same, with what their paths do not have in common.
fn directories(paths: &[PathBuf], mounts: &[Mount]) -> Vec<Directory> {
    let kind = |path: &PathBuf| {
        let real = path.canonicalize().unwrap_or_else(|_| path.clone());
        mounts::around(mounts, &real).map_or_else(|| "?".to_owned(), |m| m.fstype.clone())
    };
    let kinds: Vec<String> = paths.iter().map(kind).collect();
    let named = |(path, kind): (&PathBuf, &String)| {
        let short = kind.strip_prefix("fuse.").unwrap_or(kind);
        let alike: Vec<&Path> =
            paths.iter().zip(&kinds).filter(|(_, k)| *k == kind).map(|(p, _)| &**p).collect();
        let name = match alike.len() {
            1 => short.to_owned(),
            _ => format!("{short} {}", own_part(path, &alike).display()),
        };
        Directory { name, path: path.clone(), filesystem: kind.clone() }
    };
    paths.iter().zip(&kinds).map(named).collect()
}

/// The middle of a path, without what all of `alike` begin and end with; all of it, when that leaves nothing.
fn own_part(path: &Path, alike: &[&Path]) -> PathBuf {
    let parts = |p: &Path| p.components().map(|c| c.as_os_str().to_owned()).collect::<Vec<_>>();
    let (mine, all) = (parts(path), alike.iter().map(|p| parts(p)).collect::<Vec<_>>());
    let first = (0..mine.len()).take_while(|i| all.iter().all(|p| p.get(*i) == mine.get(*i))).count();
    let from_end = |p: &[std::ffi::OsString], i: usize| p.iter().rev().nth(i).cloned();
    let last =
        (0..mine.len()).take_while(|i| all.iter().all(|p| from_end(p, *i) == from_end(&mine, *i))).count();
    let own: PathBuf = mine.iter().take(mine.len() - last).skip(first).collect();
    if own.as_os_str().is_empty() { path.to_owned() } else { own }
}

pub(super) fn run(args: &Args) -> Outcome {
    let failed = |text: String| CommandError::new(Exit::Failure, text);
    let paths: Vec<PathBuf> = std::iter::once(&args.dir).chain(&args.against).cloned().collect();
    let directories = directories(&paths, &mounts::all().unwrap_or_default());
    let size = Size::default().scaled(args.scale);
    let mut places = paths
        .iter()
        .map(|dir| Place::new(dir, size.clone(), args.limit))
        .collect::<Result<Vec<_>, _>>()
        .map_err(|e| failed(format!("cannot measure: {e}")))?;
    let workloads = if args.workloads.is_empty() { Workload::ALL.to_vec() } else { args.workloads.clone() };
    let told = |workload: Workload, place: usize, event: Event| {
        let (workload, name) = (workload.name(), &directories[place].name);
        match event {
            Event::Taken(t) => {
                output::note(&format!("{workload:16} {:8.3} s  {name}", t.time.as_secs_f64()));
            }
            Event::Failed(why) => output::note(&format!("{workload:16}   failed    {name}: {why}")),
        }
    };
    let settle = || {
        paths.iter().for_each(|dir| settle(dir));
        if let Some(command) = &args.settle {
            settle_with(command);
        }
    };
    let plan = Plan { workloads: &workloads, rounds: args.rounds, idle: args.idle };
    let outcome = bench::run(&mut places, plan, settle, told);
    let folders: Vec<PathBuf> = places.iter().map(|p| p.root().to_owned()).collect();
    drop(places);
    for folder in folders.iter().filter(|f| f.symlink_metadata().is_ok()) {
        output::note(&format!("{} could not be removed in time", folder.display()));
    }
    let report = Report {
        format: 1,
        date: humantime::format_rfc3339_seconds(SystemTime::now()).to_string(),
        version: env!("CARGO_PKG_VERSION"),
        machine: Machine::here(),
        directories: &directories,
        rounds: args.rounds,
        size: &size,
        measured: outcome.measured,
        disturbed: outcome.disturbed,
        rows: &outcome.rows,
    };
    match args.json.as_deref() {
        Some(path) if path == Path::new("-") => output::print_json(&report)?,
        json => {
            if let Some(path) = json {
                let trouble =
                    |e: String| failed(format!("cannot write the figures to {}: {e}", path.display()));
                let text = serde_json::to_string_pretty(&report).map_err(|e| trouble(e.to_string()))?;
                std::fs::write(path, text + "\n").map_err(|e| trouble(e.to_string()))?;
            }
            output::print(&table(&outcome.rows, &directories))?;
        }
    }
    if outcome.disturbed > 0 {
        let (disturbed, measured) = (outcome.disturbed, outcome.measured);
        output::note(&format!(
            "{disturbed} of {measured} measurements began while the machine had other work"
        ));
    }
    // What is compared with may fail; what was asked for may not.
    match outcome.rows.iter().find_map(|row| Some((row.workload, row.failed.first()?.as_ref()?))) {
        Some((workload, why)) => {
            Err(failed(format!("{} failed in {}: {why}", workload.name(), args.dir.display())))
        }
        None => Ok(()),
    }
}

/// Waits until the directory has written back what it has, and its replicas have it, too.
fn settle(dir: &Path) {
    if let Ok(file) = std::fs::File::open(dir) {
        let _ = rustix::fs::syncfs(&file);
    }
    let Ok(client) = locate::find(dir, true).and_then(|located| located.client()) else { return };
    let Ok(runtime) = runtime() else { return };
    let request = SyncRequest { replicas: Replicas::All, timeout_seconds: Some(120.0) };
    // A replica that is away must not end the benchmark.
    if let Err(error) = runtime.block_on(client.sync(request, |_| ())) {
        output::note(&format!("measuring although the replicas lag: {error}"));
    }
}

fn settle_with(command: &str) {
    let why = match Command::new("sh").arg("-c").arg(command).status() {
        Ok(status) if status.success() => return,
        Ok(status) => status.to_string(),
        Err(error) => error.to_string(),
    };
    output::note(&format!("measuring although this did not succeed ({why}): {command}"));
}

/// Medians, what they mean per second, and the ratios.
fn table(rows: &[Row], directories: &[Directory]) -> String {
    let mut lines: Vec<Vec<String>> = Vec::new();
    let mut notes = String::new();
    let mut head = vec!["workload".to_owned()];
    for (place, directory) in directories.iter().enumerate() {
        head.extend([directory.name.clone(), if place == 0 { "per second" } else { "ratio" }.to_owned()]);
    }
    lines.push(head);
    for row in rows {
        let name = row.workload.name();
        let mut line = vec![name.to_owned()];
        if let Some(why) = &row.skipped {
            line.push(format!("skipped: {why}"));
            lines.push(line);
            continue;
        }
        for (place, directory) in directories.iter().enumerate() {
            if let Some(why) = &row.failed[place] {
                output::push_line(&mut notes, format!("{name} failed in {}: {why}", directory.name));
                line.extend(["failed".to_owned(), "-".to_owned()]);
                continue;
            }
            let missing = || "-".to_owned();
            line.push(row.median(place).map_or_else(missing, |s| format!("{s:.3} s")));
            let second = if place == 0 {
                row.median(0).map(|s| format!("{:.0} {}", row.count as f64 / s.max(1e-9), row.unit))
            } else {
                row.ratio(place).map(|r| format!("{r:.2}"))
            };
            line.push(second.unwrap_or_else(missing));
        }
        lines.push(line);
    }
    output::table(&lines) + &notes
}

#[cfg(test)]
mod tests {
    use super::*;

    fn directory(name: &str) -> Directory {
        Directory { name: name.into(), path: "/x".into(), filesystem: name.into() }
    }

    #[test]
    fn the_table_shows_medians_ratios_and_what_failed_or_was_skipped() {
        let row = |workload, seconds: Vec<Vec<f64>>, skipped: Option<&str>| Row {
            workload,
            unit: "files",
            count: 100,
            failed: vec![None; seconds.len()],
            seconds,
            skipped: skipped.map(str::to_owned),
        };
        let mut rows = [
            row(Workload::Create, vec![vec![2.0, 4.0, 3.0], vec![1.0, 1.0, 1.0], vec![]], None),
            row(Workload::StatCold, vec![vec![], vec![], vec![]], Some("not root")),
        ];
        rows[0].failed[2] = Some("took longer than 5 s".into());
        let text = table(&rows, &[directory("mirrorfs"), directory("ext4"), directory("s3fs")]);
        let lines: Vec<Vec<&str>> = text.lines().map(|l| l.split_whitespace().collect()).collect();
        assert_eq!(lines[0], ["workload", "mirrorfs", "per", "second", "ext4", "ratio", "s3fs", "ratio"]);
        assert_eq!(lines[1], ["create", "3.000", "s", "33", "files", "1.000", "s", "3.00", "failed", "-"]);
        assert_eq!(lines[2], ["stat-cold", "skipped:", "not", "root"]);
        assert!(text.ends_with("create failed in s3fs: took longer than 5 s\n"), "{text}");
    }

    #[test]
    fn directories_are_named_by_their_filesystems() {
        let mount = |at: &str, fstype: &str| Mount {
            mountpoint: at.into(),
            fstype: fstype.into(),
            source: String::new(),
            user: None,
        };
        let mounts = [mount("/", "ext4"), mount("/no/m", "fuse.mirrorfs"), mount("/no/n", "fuse.mirrorfs")];
        let names = |paths: &[&str]| {
            let paths: Vec<PathBuf> = paths.iter().map(PathBuf::from).collect();
            directories(&paths, &mounts).into_iter().map(|d| (d.name, d.filesystem)).collect::<Vec<_>>()
        };
        let pair = |name: &str, kind: &str| (name.to_owned(), kind.to_owned());
        assert_eq!(names(&["/no/m/x", "/no"]), [pair("mirrorfs", "fuse.mirrorfs"), pair("ext4", "ext4")]);
        let both = [pair("mirrorfs m", "fuse.mirrorfs"), pair("mirrorfs n", "fuse.mirrorfs")];
        assert_eq!(names(&["/no/m/x", "/no/n/x"]), both);
        let within = [pair("ext4 /no", "ext4"), pair("ext4 deep/er", "ext4")];
        assert_eq!(names(&["/no", "/no/deep/er"]), within);
    }

    #[test]
    fn a_scale_is_sensible() {
        assert_eq!(parse_scale("0.5"), Ok(0.5));
        assert!(parse_scale("0").is_err() && parse_scale("NaN").is_err() && parse_scale("x").is_err());
    }
}
