//! `mirrorfs restore`: copies files out of one replica, without mounting and without local state.
//!
//! Owns the order of the steps and their exit codes; the steps themselves are [`crate::restore`]'s.

use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use super::args::{ReplicaArgs, set};
use super::progress::Progress;
use super::{CommandError, Outcome, human, output};
use crate::config::{self, Env};
use crate::exit::Exit;
use crate::replica::{ErrorKind, Store};
use crate::restore::{
    self, Filter, LoadError, Loaded, Plan, PlanError, ProblemKind, Report, RestoreError, Source, SurveyError,
    Tables, TreeError,
};

/// Problems that are printed one by one; the rest is only counted, and all stand in the JSON.
const SHOWN: usize = 20;

/// Copy the tree, or parts of it, out of one replica, verifying every block
///
/// Files that exist are left alone unless --overwrite is given; those with the right content count as done, so that a
/// restore that was interrupted goes on when it is run again. While the replica does not answer it is waited for, as long
/// as read_timeout (30 s); then the command ends with code 6. A file of which a block is lost is kept with the ending
/// .damaged, and the command ends with code 7.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  mirrorfs restore --from s3://bucket/mirror --to /mnt/new
  mirrorfs restore --from /mnt/disk/mirror --to . projects/notes.txt photos/2026
  mirrorfs restore --from off --config home.toml --list --json")]
pub(super) struct Args {
    /// The replica: its place, or its name in the configuration
    #[arg(long, value_name = "URL", env = "MIRRORFS_FROM")]
    from: String,

    /// The folder to copy into; created when missing
    #[arg(long, value_name = "DIR", env = "MIRRORFS_TO", required_unless_present = "list")]
    to: Option<PathBuf>,

    /// What to copy, as paths within the volume; everything when missing
    #[arg(value_name = "PATH")]
    paths: Vec<PathBuf>,

    /// List instead of copying
    #[arg(long, env = "MIRRORFS_LIST", value_parser = clap::builder::FalseyValueParser::new())]
    list: bool,

    /// Replace files that exist
    #[arg(long, env = "MIRRORFS_OVERWRITE", value_parser = clap::builder::FalseyValueParser::new())]
    overwrite: bool,

    /// How long the replica is waited for when it does not answer, such as 5m [env: MIRRORFS_READ_TIMEOUT]
    #[arg(long, value_name = "TIME")]
    read_timeout: Option<String>,

    /// Print JSON: one object per line with --list, else a report
    #[arg(long, env = "MIRRORFS_JSON", value_parser = clap::builder::FalseyValueParser::new())]
    json: bool,

    #[command(flatten)]
    replicas: ReplicaArgs,
}

/// The volume as one replica has it.
struct Opened {
    plan: Plan,
    tables: Tables,
    loaded: Loaded,
    stores: [Store; 1],
}

pub(super) fn run(args: &Args) -> Outcome {
    let env = Env::current()?;
    let mut raw = args.replicas.raw(&env.cwd)?;
    set(&mut raw.flags, "read_timeout", args.read_timeout.as_deref());
    let spec = config::load_replica(&args.from, &raw, &env)?;
    let filter = Filter::new(args.paths.iter().map(|path| path.as_os_str().as_bytes())).map_err(of_tree)?;
    let store = spec.store().map_err(|error| CommandError::new(Exit::Usage, error.to_string()))?;
    let store = store.with_patience(config::read_timeout(&raw, &env)?);
    // Writing files blocks the task that does it; fetching goes on in the other threads.
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|error| CommandError::new(Exit::Failure, format!("cannot start: {error}")))?;
    runtime.block_on(async {
        let opened = open(store).await?;
        warn(&opened.loaded);
        match &args.to {
            Some(to) if !args.list => copy(args, env.cwd.join(to), filter, &opened).await?,
            _ => list(args, &filter, &opened)?,
        }
        match &opened.loaded.lost {
            Some(lost) => Err(CommandError::new(
                Exit::Damaged,
                format!(
                    "the replica holds segments {} to {} that cannot be used ({}); this is the state before them. \
                     Another replica may have them intact",
                    lost.from, lost.upto, lost.why
                ),
            )),
            None => Ok(()),
        }
    })
}

async fn open(store: Store) -> Result<Opened, CommandError> {
    let stores = [store];
    let inventories = restore::survey(&stores).await;
    for inventory in &inventories {
        if let Err(error) = &inventory.found {
            return Err(of_survey(error));
        }
    }
    let plan = restore::plan(&inventories, None).map_err(|error| of_plan(&error))?;
    let mut tables = Tables::default();
    let loaded = restore::load(&plan, &stores, &mut tables).await.map_err(|error| of_load(&error))?;
    Ok(Opened { plan, tables, loaded, stores })
}

/// Says what a person should know of the state that was found.
fn warn(loaded: &Loaded) {
    for warning in &loaded.warnings {
        output::note(&format!("mirrorfs: warning: {warning}"));
    }
    for damage in &loaded.damaged {
        output::note(&format!("mirrorfs: damaged: {}: {}", damage.object, damage.why));
    }
}

fn list(args: &Args, filter: &Filter, opened: &Opened) -> Outcome {
    let mut lines = String::new();
    let mut outcome = Ok(());
    let mut wrong = 0_usize;
    let mut emit = |entry: restore::Listed| {
        if args.json {
            outcome =
                std::mem::replace(&mut outcome, Ok(())).and_then(|()| output::push_json(&mut lines, &entry));
        } else {
            output::push_line(&mut lines, entry.to_string());
        }
        if lines.len() > 64 << 10 && outcome.is_ok() {
            outcome = output::print(&lines);
            lines.clear();
        }
    };
    let mut complain = |error: TreeError| {
        wrong += 1;
        output::note(&format!("mirrorfs: {error}"));
    };
    restore::list(&opened.tables, filter, &mut emit, &mut complain).map_err(of_tree)?;
    outcome?;
    output::print(&lines)?;
    if wrong > 0 {
        return Err(CommandError::new(Exit::Damaged, format!("{wrong} entries cannot be read")));
    }
    Ok(())
}

async fn copy(args: &Args, to: PathBuf, filter: Filter, opened: &Opened) -> Outcome {
    let source = Source::new(&opened.plan, &opened.stores);
    let options = restore::Options {
        to,
        overwrite: args.overwrite,
        filter,
        block_size: opened.loaded.volume.block_size,
    };
    let mut bar = Progress::new("restoring");
    let mut show = |step: &restore::Progress| {
        let detail = format!(", {} of {} entries done", step.entries_done, step.entries);
        bar.update(step.bytes.saturating_sub(step.bytes_done), &detail);
    };
    let outcome = restore::restore(&opened.tables, &source, &options, &mut show).await;
    bar.finish();
    let report = outcome.map_err(of_restore)?;
    if args.json {
        output::print_json(&report)?;
    } else {
        output::print(&format!(
            "restored {} of {} entries, {}, to {} (the state of change {})",
            report.done.entries_done,
            report.done.entries,
            human::size(report.done.bytes_done),
            options.to.display(),
            opened.loaded.commit_lsn
        ))?;
    }
    judge(&report)
}

/// Tells of the problems, and what they mean for how the command ends.
fn judge(report: &Report) -> Outcome {
    for problem in report.problems.iter().take(SHOWN) {
        output::note(&format!("mirrorfs: {}: {}", problem.path, problem.text));
    }
    if let Some(more @ 1..) = report.problems.len().checked_sub(SHOWN) {
        output::note(&format!("mirrorfs: and {more} more; --json shows all"));
    }
    let count = |kind: ProblemKind| report.problems.iter().filter(|p| p.kind == kind).count();
    match report.worst() {
        None | Some(ProblemKind::Attribute) => Ok(()),
        Some(ProblemKind::Skipped) => Err(CommandError::new(
            Exit::Failure,
            format!(
                "{} entries were left out; give --overwrite to replace what exists, and run as root for device nodes",
                count(ProblemKind::Skipped)
            ),
        )),
        Some(ProblemKind::Failed) => Err(CommandError::new(
            Exit::Failure,
            format!("{} entries could not be written", count(ProblemKind::Failed)),
        )),
        Some(ProblemKind::Damaged) => Err(CommandError::new(
            Exit::Damaged,
            format!(
                "{} entries are damaged on this replica; another replica may have them intact",
                count(ProblemKind::Damaged)
            ),
        )),
        Some(ProblemKind::Unreachable) => Err(CommandError::new(
            Exit::Unreachable,
            format!(
                "the replica did not answer: {} of {} entries are restored. Run the same command again when it answers; \
                 what is there already is not fetched again",
                report.done.entries_done, report.done.entries
            ),
        )),
    }
}

fn of_survey(error: &SurveyError) -> CommandError {
    let exit = match error {
        SurveyError::Unreachable(error) => match error.kind {
            ErrorKind::Corrupt => Exit::Damaged,
            ErrorKind::Config => Exit::Usage,
            _ => Exit::Unreachable,
        },
        SurveyError::NoVolume { .. } => Exit::NoVolume,
        SurveyError::Newer { .. } => Exit::TooNew,
    };
    CommandError::new(exit, error.to_string())
}

fn of_plan(error: &PlanError) -> CommandError {
    let exit = match error {
        PlanError::NoReplica(_) => Exit::Unreachable,
        PlanError::Mixed(_) => Exit::WrongVolume,
        PlanError::NoVolume(_) | PlanError::Broken(_) => Exit::Damaged,
    };
    CommandError::new(exit, error.to_string())
}

fn of_load(error: &LoadError) -> CommandError {
    let exit = match error {
        LoadError::Unavailable { .. } => Exit::Unreachable,
        LoadError::Newer { .. } => Exit::TooNew,
        LoadError::Nothing(_) => Exit::Damaged,
        LoadError::Sink(_) => Exit::Failure,
    };
    CommandError::new(exit, error.to_string())
}

fn of_tree(error: TreeError) -> CommandError {
    let exit = match error {
        TreeError::BadPath(_) => Exit::Usage,
        TreeError::NotFound(_) => Exit::Failure,
        TreeError::Format { .. } | TreeError::Inconsistent { .. } => Exit::Damaged,
    };
    CommandError::new(exit, error.to_string())
}

fn of_restore(error: RestoreError) -> CommandError {
    match error {
        RestoreError::Tree(error) => of_tree(error),
        RestoreError::Target { .. } => CommandError::new(Exit::Failure, error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::restore::Problem;

    #[test]
    fn the_worst_problem_decides_how_it_ends() {
        let ends = |kinds: &[ProblemKind]| {
            let problem = |kind: &ProblemKind| Problem { path: "a".into(), kind: *kind, text: "b".into() };
            let report = Report { problems: kinds.iter().map(problem).collect(), ..Report::default() };
            judge(&report).map_or_else(|error| error.exit, |()| Exit::Done)
        };
        use ProblemKind::{Attribute, Damaged, Failed, Skipped, Unreachable};
        assert_eq!(ends(&[]), Exit::Done);
        assert_eq!(ends(&[Attribute]), Exit::Done);
        assert_eq!(ends(&[Attribute, Skipped]), Exit::Failure);
        assert_eq!(ends(&[Failed, Skipped]), Exit::Failure);
        assert_eq!(ends(&[Damaged, Skipped]), Exit::Damaged);
        assert_eq!(ends(&[Damaged, Unreachable]), Exit::Unreachable);
    }
}
