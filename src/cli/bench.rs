//! `mirrorfs bench`: how fast a directory is, alone or beside another one.

use std::path::{Path, PathBuf};

use serde::Serialize;

use super::{CommandError, Outcome, locate, output, runtime};
use crate::bench::{self, Place, Row, Size, Workload};
use crate::control::{Replicas, SyncRequest};
use crate::exit::Exit;

/// Measure how fast a directory is, alone or in turn with another one
///
/// Works in a folder of its own in each directory and removes it afterwards. Each workload runs in one directory and
/// then in the other, before the next; shown is the median of the rounds. Before each measurement everything is
/// written back, and sent to the replicas. What needs empty kernel caches is measured only as root.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  mirrorfs bench ~/files
  mirrorfs bench /srv/files --against /var/tmp --rounds 5 --json figures.json
  mirrorfs bench ~/files --workloads create,untar,remove --scale 0.1")]
pub(super) struct Args {
    /// The directory, on a mount of mirrorfs or anywhere else
    dir: PathBuf,

    /// Another directory, measured in turn; the table shows time in DIR / time here
    #[arg(long, value_name = "DIR", env = "MIRRORFS_AGAINST")]
    against: Option<PathBuf>,

    /// How many times everything is measured
    #[arg(long, value_name = "NUMBER", env = "MIRRORFS_ROUNDS", default_value = "3", value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: u32,

    /// Which ones, separated by commas (all by default)
    #[arg(long, value_name = "LIST", env = "MIRRORFS_WORKLOADS", value_delimiter = ',')]
    workloads: Vec<Workload>,

    /// More or less work: 1 is a file of 2 GiB, 20,000 small files
    #[arg(long, value_name = "FACTOR", env = "MIRRORFS_SCALE", default_value = "1", value_parser = parse_scale)]
    scale: f64,

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

#[derive(Serialize)]
struct Report<'a> {
    directories: &'a [PathBuf],
    rounds: u32,
    size: &'a Size,
    version: &'static str,
    rows: &'a [Row],
}

pub(super) fn run(args: &Args) -> Outcome {
    let trouble = |e: bench::Trouble| CommandError::new(Exit::Failure, format!("cannot measure: {e}"));
    let directories: Vec<PathBuf> = std::iter::once(&args.dir).chain(&args.against).cloned().collect();
    let size = Size::default().scaled(args.scale);
    let mut places = directories
        .iter()
        .map(|dir| Place::new(dir, size.clone()))
        .collect::<Result<Vec<_>, _>>()
        .map_err(trouble)?;
    let workloads = if args.workloads.is_empty() { Workload::ALL.to_vec() } else { args.workloads.clone() };
    let told = |workload: Workload, place: usize, taken: bench::Taken| {
        let dir = directories[place].display();
        output::note(&format!("{:16} {:8.3} s  {dir}", workload.name(), taken.time.as_secs_f64()));
    };
    let settle = || directories.iter().for_each(|dir| settle(dir));
    let rows = bench::run(&mut places, &workloads, args.rounds, settle, told).map_err(trouble)?;
    drop(places);
    let report = Report {
        directories: &directories,
        rounds: args.rounds,
        size: &size,
        version: env!("CARGO_PKG_VERSION"),
        rows: &rows,
    };
    match args.json.as_deref() {
        Some(path) if path == Path::new("-") => return output::print_json(&report),
        Some(path) => {
            let failed = |e: String| {
                CommandError::new(
                    Exit::Failure,
                    format!("cannot write the figures to {}: {e}", path.display()),
                )
            };
            let text = serde_json::to_string_pretty(&report).map_err(|e| failed(e.to_string()))?;
            std::fs::write(path, text + "\n").map_err(|e| failed(e.to_string()))?;
        }
        None => {}
    }
    output::print(&table(&rows, directories.len()))
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

/// Medians, what they mean per second, and the ratio.
fn table(rows: &[Row], places: usize) -> String {
    let mut lines: Vec<Vec<String>> = Vec::new();
    let mut head = vec!["workload".to_owned(), "time".into(), "per second".into()];
    if places > 1 {
        head.extend(["against".into(), "ratio".into()]);
    }
    lines.push(head);
    for row in rows {
        let mut line = vec![row.workload.name().to_owned()];
        if let Some(why) = &row.skipped {
            line.push(format!("skipped: {why}"));
            lines.push(line);
            continue;
        }
        let seconds = |place| row.median(place).map_or_else(|| "-".to_owned(), |s| format!("{s:.3} s"));
        let speed = row
            .median(0)
            .map_or_else(String::new, |s| format!("{:.0} {}", row.count as f64 / s.max(1e-9), row.unit));
        line.extend([seconds(0), speed]);
        if places > 1 {
            line.push(seconds(1));
            line.push(row.ratio().map_or_else(|| "-".to_owned(), |r| format!("{r:.2}")));
        }
        lines.push(line);
    }
    output::table(&lines)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_shows_medians_ratios_and_what_was_skipped() {
        let row = |workload, seconds: Vec<Vec<f64>>, skipped: Option<&str>| Row {
            workload,
            unit: "files",
            count: 100,
            seconds,
            skipped: skipped.map(str::to_owned),
        };
        let rows = [
            row(Workload::Create, vec![vec![2.0, 4.0, 3.0], vec![1.0, 1.0, 1.0]], None),
            row(Workload::StatCold, vec![vec![], vec![]], Some("not root")),
        ];
        let text = table(&rows, 2);
        let lines: Vec<Vec<&str>> = text.lines().map(|l| l.split_whitespace().collect()).collect();
        assert_eq!(lines[1], ["create", "3.000", "s", "33", "files", "1.000", "s", "3.00"]);
        assert_eq!(lines[2], ["stat-cold", "skipped:", "not", "root"]);
    }

    #[test]
    fn a_scale_is_sensible() {
        assert_eq!(parse_scale("0.5"), Ok(0.5));
        assert!(parse_scale("0").is_err() && parse_scale("NaN").is_err() && parse_scale("x").is_err());
    }
}
