//! `mirrorfs status`: what is mounted, and how far each replica is.

use std::path::PathBuf;

use super::locate::{self, Located};
use super::{CommandError, Outcome, human, output, runtime};
use crate::control::{Status, reason};
use crate::ids::Epoch;
use crate::replica::{ReplicaState, ReplicaStatus, unix_now};
use crate::trace::OpFigures;

/// Show the state of one mount, or of all
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  mirrorfs status
  mirrorfs status ~/files
  mirrorfs status ~/files --ops
  mirrorfs status ~/files --json | jq '.replicas[] | {name, lag_bytes}'
With a MOUNTPOINT, --json prints one object; without, a list.")]
pub(super) struct Args {
    /// A mountpoint, or any path below it; all mounts when missing
    mountpoint: Option<PathBuf>,

    /// Show requests of the kernel by kind, and where their time went, instead
    #[arg(long, requires = "mountpoint", env = "MIRRORFS_OPS", value_parser = clap::builder::FalseyValueParser::new())]
    ops: bool,

    /// Print JSON
    #[arg(long, env = "MIRRORFS_JSON", value_parser = clap::builder::FalseyValueParser::new())]
    json: bool,
}

pub(super) fn run(args: &Args) -> Outcome {
    let now = unix_now();
    if let Some(mountpoint) = &args.mountpoint {
        let located = locate::find(mountpoint, true)?;
        let client = located.client()?;
        let status = runtime()?.block_on(client.status()).map_err(|error| located.explain(error.into()))?;
        return match (args.json, args.ops) {
            (true, true) => output::print_json(&status.ops),
            (true, false) => output::print_json(&status),
            (false, true) => output::print(&show_ops(&status.ops)),
            (false, false) => output::print(&show(&status, now)),
        };
    }
    let all = locate::all()?;
    let asked: Vec<(Located, Result<Status, CommandError>)> = runtime()?.block_on(async {
        let asks = all.into_iter().map(|located| async {
            let status = match located.client() {
                Ok(client) => client.status().await.map_err(|error| located.explain(error.into())),
                Err(error) => Err(error),
            };
            (located, status)
        });
        futures::future::join_all(asks).await
    });
    let living: Vec<&Status> = asked.iter().filter_map(|(_, status)| status.as_ref().ok()).collect();
    if args.json {
        output::print_json(&living)?;
    } else if asked.is_empty() {
        output::print("no mirrorfs volume is mounted")?;
    } else {
        let texts: Vec<String> = living.iter().map(|status| show(status, now)).collect();
        output::print(&texts.join("\n"))?;
    }
    for (_, status) in &asked {
        if let Err(error) = status {
            output::note(&format!("mirrorfs: {error}"));
        }
    }
    // One that does not answer is told of, but the question what is mounted has been answered.
    Ok(())
}

fn show(status: &Status, now: f64) -> String {
    let cache = &status.cache;
    let ratio =
        cache.hit_ratio().map_or_else(|| "no reads yet".to_owned(), |r| format!("{:.1} % hits", r * 100.0));
    let volume = match status.epoch {
        Epoch(0) => status.volume.to_string(),
        epoch => format!("{}, epoch {epoch}", status.volume),
    };
    let head = [
        ("mountpoint", status.mountpoint.clone()),
        ("volume", volume),
        ("state", format!("{} (daemon {}, version {})", status.state, status.pid, status.version)),
        ("up for", human::seconds(now - status.started_at)),
        (
            "writing",
            status.read_only.as_ref().map_or_else(
                || format!("yes, fsync waits for {}", status.fsync),
                |reason| format!("no: {reason}"),
            ),
        ),
        ("changes", format!("{} made, bookkeeping included; sealed up to {}", status.lsn, status.sealed_lsn)),
        (
            "in hand",
            format!(
                "{} not yet sealed, {} in {} kept for replicas",
                human::size(status.dirty_bytes),
                human::size(status.staged_bytes),
                human::count(status.staged_segments, "segment")
            ),
        ),
        (
            "cache",
            format!("{} of {}, {ratio}", human::size(cache.used_bytes), human::size(cache.limit_bytes)),
        ),
    ];
    let crash = status.last_crash.as_ref().map(|crash| {
        let ago = human::seconds(now - crash.at);
        (
            "last crash",
            format!("{ago} ago: the daemon died: {}; everything that was fsynced is there", crash.how),
        )
    });
    let head: Vec<Vec<String>> = head.into_iter().chain(crash).map(|(k, v)| vec![k.to_owned(), v]).collect();
    let titles = ["REPLICA", "STATE", "CURSOR", "BEHIND", "SENT", "RATE", "URL"];
    let mut rows: Vec<Vec<String>> = vec![titles.map(str::to_owned).to_vec()];
    rows.extend(status.replicas.iter().map(row));
    let mut errors = String::new();
    if let Some(error) = &status.sealing_error {
        output::push_line(&mut errors, format!("nothing more can be sealed for now: {error}"));
    }
    if let Some(text) = status.refused.text() {
        output::push_line(&mut errors, text);
    }
    if cache.corrupt > 0 {
        let line = format!("cached blocks that were damaged and fetched anew: {}", cache.corrupt);
        output::push_line(&mut errors, line);
    }
    errors.extend(status.replicas.iter().map(|r| trouble(r, now)));
    format!("{}\n{}\n{}{errors}", output::table(&head), output::table(&rows), requests(&status.replicas))
}

/// What was asked of each replica since the start.
fn requests(replicas: &[ReplicaStatus]) -> String {
    let titles = ["REQUESTS", "PUT", "GET", "HEAD", "LIST", "DELETE", "FAILED", "SENT", "RECEIVED"];
    let mut rows: Vec<Vec<String>> = vec![titles.map(str::to_owned).to_vec()];
    rows.extend(replicas.iter().map(|replica| {
        let r = &replica.requests;
        let counts = [r.put, r.get, r.head, r.list, r.delete, r.failed].map(|n| n.to_string());
        let bytes = [r.bytes_sent, r.bytes_received].map(human::size);
        std::iter::once(replica.name.to_string()).chain(counts).chain(bytes).collect()
    }));
    output::table(&rows)
}

/// Requests by kind, and the shares of their time.
fn show_ops(ops: &[OpFigures]) -> String {
    let titles = ["REQUEST", "COUNT", "TOGETHER", "MEAN", "MEDIAN", "99 %", "LONGEST", "WHERE THE TIME WENT"];
    let mut rows: Vec<Vec<String>> = vec![titles.map(str::to_owned).to_vec()];
    for op in ops {
        let share = |part: f64| part / op.seconds.max(1e-12) * 100.0;
        let stages: Vec<String> = op
            .stages
            .iter()
            .filter(|(_, part)| share(*part) >= 0.5)
            .map(|(name, part)| format!("{name} {:.0} %", share(*part)))
            .collect();
        rows.push(vec![
            op.name.clone(),
            op.count.to_string(),
            format!("{:.3} s", op.seconds),
            human::brief(op.seconds / (op.count.max(1)) as f64),
            human::brief(op.median),
            human::brief(op.p99),
            human::brief(op.longest),
            stages.join(", "),
        ]);
    }
    output::table(&rows)
}

fn row(replica: &ReplicaStatus) -> Vec<String> {
    let behind = if replica.lag_segments == 0 {
        "-".to_owned()
    } else {
        format!(
            "{}, {}, {}",
            human::count(replica.lag_segments, "segment"),
            human::size(replica.lag_bytes),
            human::seconds(replica.lag_seconds)
        )
    };
    vec![
        replica.name.to_string(),
        if replica.joining {
            format!("{}, being filled", state(replica.state))
        } else {
            state(replica.state)
        },
        replica.cursor.to_string(),
        behind,
        human::size(replica.uploaded_bytes),
        human::rate(replica.upload_rate),
        replica.url.clone(),
    ]
}

/// The word under which the state also stands in JSON.
pub(super) fn state(state: ReplicaState) -> String {
    let word = serde_json::to_value(state).ok();
    word.as_ref().and_then(serde_json::Value::as_str).unwrap_or("?").to_owned()
}

/// Lines about what went wrong on a replica; none when nothing did.
fn trouble(replica: &ReplicaStatus, now: f64) -> String {
    let mut lines = String::new();
    if let Some(error) = &replica.last_error {
        let age = human::seconds(now - error.at);
        let reason = reason(&replica.name, &error.text);
        output::push_line(&mut lines, format!("last error of {}, {age} ago: {reason}", replica.name));
    }
    if replica.damages > 0 {
        let line = format!("damaged places found on {}: {}", replica.name, replica.damages);
        output::push_line(&mut lines, line);
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::Refused;
    use crate::control::tests::sample_status;

    #[test]
    fn requests_are_shown_with_the_shares_of_their_stages() {
        let op = OpFigures {
            name: "lookup".into(),
            count: 4,
            seconds: 0.002,
            longest: 0.0015,
            median: 0.000_128,
            p99: 0.002,
            stages: vec![("own".into(), 0.0005), ("tables".into(), 0.0015)],
        };
        let text = show_ops(&[op]);
        assert!(
            text.ends_with(
                "lookup   4      0.002 s   500 µs  128 µs  2.0 ms  1.5 ms   own 25 %, tables 75 %\n"
            ),
            "{text}"
        );
    }

    #[test]
    fn a_status_shows_everything() {
        let mut status = sample_status();
        status.replicas[0].lag_segments = 2;
        status.replicas[0].lag_bytes = 3 << 20;
        status.replicas[0].lag_seconds = 75.0;
        let text = show(&status, 62.5);
        assert_eq!(
            text,
            format!(
                "mountpoint  /mnt/x\n\
                 volume      {}, epoch 3\n\
                 state       /state (daemon 1, version 0)\n\
                 up for      1 m 1 s\n\
                 writing     yes, fsync waits for local\n\
                 changes     99 made, bookkeeping included; sealed up to 90\n\
                 in hand     1 B not yet sealed, 2 B in 3 segments kept for replicas\n\
                 cache       1 B of 2 B, 42.9 % hits\n\
                 \n\
                 REPLICA  STATE    CURSOR  BEHIND                         SENT  RATE  URL\n\
                 a        healthy  5       2 segments, 3.0 MiB, 1 m 15 s  6 B   -     file:///r/a\n\
                 \n\
                 REQUESTS  PUT  GET  HEAD  LIST  DELETE  FAILED  SENT  RECEIVED\n\
                 a         0    0    0     0     0       0       0 B   0 B\n\
                 last error of a, 1 m ago: broken\n",
                status.volume
            )
        );
        status.replicas[0].last_error = None;
        status.replicas[0].damages = 3;
        assert!(show(&status, 0.0).ends_with("\ndamaged places found on a: 3\n"));
        status.read_only = Some("a newer writer took over".into());
        status.epoch = Epoch(0);
        status.cache.corrupt = 2;
        status.sealing_error = Some("disk full".into());
        status.refused = Refused { count: 1, files: vec!["/a (no space left)".into()] };
        let text = show(&status, 0.0);
        for line in [
            "writing     no: a newer writer took over\n",
            "cached blocks that were damaged and fetched anew: 2\n",
            "nothing more can be sealed for now: disk full\n",
            "1 file lacks bytes that programs wrote, because they could not be stored: /a (no space left). ",
        ] {
            assert!(text.contains(line), "{text}");
        }
        assert!(!text.contains("epoch"), "{text}");
    }
}
