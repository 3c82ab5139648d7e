//! `mirrorfs mount`: checks everything that can be checked at once, then serves the mount, usually in the background.

use std::ffi::OsString;
use std::path::PathBuf;

use super::args::{self, ReplicaArgs, VolumeArgs};
use super::background;
use super::{CommandError, Outcome, mountpoint, output};
use crate::config::{Config, Env, Raw, layer, state};
use crate::daemon::{self, MountArgs, Ready, ReadyInfo, Takeover};
use crate::exit::Exit;
use crate::guardian::{self, Guarded, Report};
use crate::ids::ReplicaName;

/// Mount a volume
///
/// Returns once the mount is live; the daemon goes on in the background and logs to daemon.log in its state folder. An
/// empty set of replicas becomes a new volume. With an empty state folder the volume is brought back from the replicas;
/// when the machine that wrote last has not unmounted in good order, that needs --takeover.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  mirrorfs mount ~/files --replica /mnt/disk/mirror --replica off=s3://bucket/mirror
  mirrorfs mount /srv/files --config /etc/mirrorfs/files.toml -o allow_other,noatime
  mirrorfs mount ~/files --config home.toml --foreground --log debug
In /etc/fstab, after scripts/install (or with /sbin/mount.mirrorfs a symbolic link to mirrorfs):
  /etc/mirrorfs/files.toml  /srv/files  mirrorfs  _netdev,nofail,allow_other  0  0")]
pub(super) struct Args {
    /// An existing directory
    mountpoint: PathBuf,

    #[command(flatten)]
    replicas: ReplicaArgs,

    /// Folder of the local state [env: MIRRORFS_STATE] [default: below $XDG_STATE_HOME/mirrorfs]
    #[arg(long, value_name = "DIR")]
    state: Option<String>,

    /// Local disk that blocks may take [env: MIRRORFS_CACHE_SIZE] [default: 10GiB]
    #[arg(long, value_name = "SIZE")]
    cache_size: Option<String>,

    /// Share of the disk that stays free [env: MIRRORFS_FREE_SPACE_RATIO] [default: 0.05]
    #[arg(long, value_name = "0..0.9")]
    free_space_ratio: Option<String>,

    /// How long writers wait for local space before ENOSPC [env: MIRRORFS_SPACE_WAIT] [default: 30s]
    #[arg(long, value_name = "TIME")]
    space_wait: Option<String>,

    /// How long reads wait for replicas before EIO [env: MIRRORFS_READ_TIMEOUT] [default: 30s]
    #[arg(long, value_name = "TIME")]
    read_timeout: Option<String>,

    /// What fsync waits for: local, one, quorum or all [env: MIRRORFS_FSYNC] [default: local]
    #[arg(long, value_name = "LEVEL")]
    fsync: Option<String>,

    /// After this an fsync that waits for replicas fails [env: MIRRORFS_FSYNC_TIMEOUT] [default: 1m]
    #[arg(long, value_name = "TIME")]
    fsync_timeout: Option<String>,

    /// Longest time until what was written is on its way to the replicas [env: MIRRORFS_COMMIT_INTERVAL] [default: 5s]
    #[arg(long, value_name = "TIME")]
    commit_interval: Option<String>,

    /// Time between two deep scrubs of a replica, or off [env: MIRRORFS_SCRUB_INTERVAL] [default: 7d]
    #[arg(long, value_name = "TIME")]
    scrub_interval: Option<String>,

    /// Time between two comparisons of a replica's names and sizes, or off [env: MIRRORFS_CHECK_INTERVAL] [default: 6h]
    #[arg(long, value_name = "TIME")]
    check_interval: Option<String>,

    /// Bytes per second, per replica, of scrubs and repairs, or off [env: MIRRORFS_SCRUB_RATE] [default: off]
    #[arg(long, value_name = "RATE")]
    scrub_rate: Option<String>,

    #[command(flatten)]
    volume: VolumeArgs,

    /// Nobody may write [env: MIRRORFS_READ_ONLY]
    #[arg(long)]
    read_only: bool,

    /// With an empty state folder: take the volume over from a machine that is gone without having unmounted it.
    /// What it has not sent is no part of the volume then. Where the replicas differ, the named one is right
    #[arg(long, value_name = "REPLICA", num_args = 0..=1, require_equals = true)]
    takeover: Option<Option<ReplicaName>>,

    /// Other users may enter, subject to permissions [env: MIRRORFS_ALLOW_OTHER]
    #[arg(long)]
    allow_other: bool,

    /// Options as in fstab: allow_other,ro,nosuid,nodev,noexec,noatime,cache_size=1GiB,…
    #[arg(short = 'o', long = "options", value_name = "LIST", env = "MIRRORFS_OPTIONS")]
    options: Vec<String>,

    /// Stay in the foreground and log to standard error
    #[arg(long, short, env = "MIRRORFS_FOREGROUND", value_parser = clap::builder::FalseyValueParser::new())]
    foreground: bool,

    /// Say nothing when it works, as mount(8) does
    #[arg(long, hide = true)]
    quiet: bool,

    /// Leave the mount dead when its daemon dies, instead of starting it again [env: MIRRORFS_NO_RESTART]
    #[arg(long)]
    no_restart: bool,

    /// Set by the command that starts the guardian in the background
    #[arg(long, hide = true)]
    ready_on_stdout: bool,

    /// Set by the guardian for the daemon
    #[arg(long, hide = true)]
    guarded: bool,

    /// Set by the guardian: what relative paths are relative to
    #[arg(long, hide = true, value_name = "DIR")]
    cwd: Option<PathBuf>,

    /// Set by the guardian when an earlier daemon has died
    #[arg(long, hide = true)]
    restarted: bool,

    /// Without a guardian, for tests and measurements of the daemon itself
    #[arg(long, hide = true, env = "MIRRORFS_UNGUARDED", value_parser = clap::builder::FalseyValueParser::new())]
    unguarded: bool,
}

impl Args {
    fn raw(&self, env: &Env) -> Result<Raw, CommandError> {
        let mut raw = self.replicas.raw(&env.cwd)?;
        raw.options.clone_from(&self.options);
        self.volume.add_to(&mut raw.flags);
        for (key, value) in [
            ("state", &self.state),
            ("cache_size", &self.cache_size),
            ("free_space_ratio", &self.free_space_ratio),
            ("space_wait", &self.space_wait),
            ("read_timeout", &self.read_timeout),
            ("fsync", &self.fsync),
            ("fsync_timeout", &self.fsync_timeout),
            ("commit_interval", &self.commit_interval),
            ("scrub_interval", &self.scrub_interval),
            ("check_interval", &self.check_interval),
            ("scrub_rate", &self.scrub_rate),
        ] {
            args::set(&mut raw.flags, key, value.as_deref());
        }
        args::set(&mut raw.flags, "read_only", self.read_only.then_some("true"));
        args::set(&mut raw.flags, "allow_other", self.allow_other.then_some("true"));
        args::set(&mut raw.flags, "no_restart", self.no_restart.then_some("true"));
        Ok(raw)
    }

    /// Whether `--takeover` or `-o takeover` is given. It is a decision of one moment, so a variable, which would make it
    /// at every mount, cannot give it.
    fn takeover(&self, env: &Env, arguments: &[OsString]) -> Result<Takeover, CommandError> {
        let listed = layer::mount_list(&self.options, &env.cwd)?.takeover;
        let said = |a: &OsString| a.to_string_lossy().contains("takeover");
        if listed && !arguments.iter().any(said) {
            let message = "MIRRORFS_OPTIONS: takeover must be given on the command line, when it is needed";
            return Err(CommandError::new(Exit::Usage, message));
        }
        Ok(match &self.takeover {
            // It was meant for the first start.
            _ if self.restarted => Takeover::No,
            Some(Some(name)) => Takeover::From(name.clone()),
            Some(None) => Takeover::Yes,
            None if listed => Takeover::Yes,
            None => Takeover::No,
        })
    }

    fn env(&self) -> Result<Env, CommandError> {
        let mut env = Env::current()?;
        if let Some(cwd) = &self.cwd {
            env.cwd.clone_from(cwd);
        }
        Ok(env)
    }
}

/// Checks what `mirrorfs` with these arguments would mount, and does not (`mount -f`).
pub(super) fn check_only(arguments: &[OsString]) -> Exit {
    #[derive(clap::Parser)]
    struct Alone {
        #[command(flatten)]
        args: Args,
    }
    let parsed = <Alone as clap::Parser>::try_parse_from(arguments.iter().skip(1));
    super::finish(parsed.map_err(|e| CommandError::new(Exit::Usage, e.to_string())).and_then(|alone| {
        let env = Env::current()?;
        let config = Config::load(&alone.args.raw(&env)?, &env)?;
        mountpoint::check(&alone.args.mountpoint, &env.cwd, &config)?;
        Ok(())
    }))
}

pub(super) fn run(args: Args, arguments: &[OsString]) -> Outcome {
    if args.guarded {
        return run_daemon(&args, arguments);
    }
    if args.ready_on_stdout {
        return run_guardian_in_background(&args, arguments);
    }
    let Prepared { config, checked, made, takeover, cwd } = prepare(&args, arguments)?;
    if let Some(warning) = &checked.warning {
        output::note(&format!("mirrorfs: warning: {warning}"));
    }
    let mountpoint = checked.path.clone();
    if !args.foreground {
        let info = background::start(arguments, &config.state, made.as_deref())?;
        warn(&info);
        return if args.quiet { Ok(()) } else { output::print(&announce(&info, &mountpoint)) };
    }
    let state = config.state.clone();
    let outcome = if args.unguarded {
        let ready: Ready = Box::new(move |outcome| {
            if let Ok(info) = outcome {
                warn(&info);
                announce(&info, &mountpoint).lines().for_each(output::note);
            }
        });
        let mount = MountArgs { mountpoint: checked.path, takeover, log: None, replaces: false };
        daemon::run(config, mount, ready).map_err(CommandError::from)
    } else {
        let guarded = guarded(&config, &checked.path, cwd, arguments, Way::Foreground);
        guard(guarded, |line| {
            if let Ok(info) = line {
                warn(info);
                announce(info, &mountpoint).lines().for_each(output::note);
            }
        })
    };
    if let (Err(_), Some(made)) = (&outcome, made) {
        state::discard(&state, &made);
    }
    outcome
}

/// How the guardian runs.
#[derive(Clone, Copy, PartialEq)]
enum Way {
    Foreground,
    Background,
}

fn guarded(
    config: &Config,
    mountpoint: &std::path::Path,
    cwd: PathBuf,
    arguments: &[OsString],
    way: Way,
) -> Guarded {
    Guarded {
        arguments: arguments.iter().skip(1).filter(|a| *a != "--ready-on-stdout").cloned().collect(),
        cwd,
        mountpoint: mountpoint.to_owned(),
        state: config.state.clone(),
        log: (way == Way::Background).then(|| config.state.join(background::LOG)),
        tied: way == Way::Foreground,
        restart: !config.mount.no_restart,
    }
}

fn guard(guarded: Guarded, ready: impl FnOnce(Result<&ReadyInfo, (Exit, &str)>)) -> Outcome {
    guardian::run(guarded, ready).map_err(|(exit, message)| CommandError::new(exit, message))
}

/// What can be checked is checked.
struct Prepared {
    config: Config,
    checked: mountpoint::Checked,
    /// What was made for the state folder: it goes away again when there will be no mount.
    made: Option<PathBuf>,
    takeover: Takeover,
    /// What relative paths were relative to.
    cwd: PathBuf,
}

fn prepare(args: &Args, arguments: &[OsString]) -> Result<Prepared, CommandError> {
    let env = args.env()?;
    let takeover = args.takeover(&env, arguments)?;
    let config = Config::load(&args.raw(&env)?, &env)?;
    let check = if args.guarded { mountpoint::check_for_daemon } else { mountpoint::check };
    let checked = check(&args.mountpoint, &env.cwd, &config)?;
    mountpoint::check_fuse()?;
    let made = state::create(&config.state).map_err(|error| {
        let message = format!("cannot use the state folder {}: {error}", config.state.display());
        CommandError::new(Exit::Failure, message)
    })?;
    Ok(Prepared { config, checked, made, takeover, cwd: env.cwd })
}

/// The process that [`background::start`] started: reports once on what was its standard output, and guards.
fn run_guardian_in_background(args: &Args, arguments: &[OsString]) -> Outcome {
    // It ends with the command that started it, until the mount is live.
    let report = take_report(true)?;
    let (prepared, report) = prepare_or_report(args, arguments, report)?;
    let Prepared { config, checked, cwd, .. } = prepared;
    guard(guarded(&config, &checked.path, cwd, arguments, Way::Background), |line| match line {
        Ok(info) => report.ready(info),
        Err((exit, message)) => report.failed(exit, message),
    })
}

/// The process that the guardian started: reports once on what was its standard output, and serves.
fn run_daemon(args: &Args, arguments: &[OsString]) -> Outcome {
    let report = take_report(false)?;
    let (prepared, report) = prepare_or_report(args, arguments, report)?;
    let Prepared { config, checked, takeover, .. } = prepared;
    let ready: Ready = Box::new(move |outcome| match outcome {
        Ok(info) => report.ready(&info),
        Err(error) => report.failed(error.exit_code(), &error.to_string()),
    });
    let log = (!args.foreground).then(|| config.state.join(background::LOG));
    let mount = MountArgs { mountpoint: checked.path, takeover, log, replaces: args.restarted };
    Ok(daemon::run(config, mount, ready)?)
}

/// See [`Report::take`].
fn take_report(follow: bool) -> Result<Report, CommandError> {
    let failed = |error| CommandError::new(Exit::Failure, format!("cannot run in the background: {error}"));
    Report::take(follow).map_err(failed)
}

fn prepare_or_report(
    args: &Args,
    arguments: &[OsString],
    report: Report,
) -> Result<(Prepared, Report), CommandError> {
    match prepare(args, arguments) {
        Ok(prepared) => Ok((prepared, report)),
        Err(error) => {
            report.failed(error.exit, &error.message);
            Err(error)
        }
    }
}

fn is_warning(note: &str) -> bool {
    note.starts_with("warning: ")
}

/// What mount(8) is told, too.
fn warn(info: &ReadyInfo) {
    info.notes
        .iter()
        .filter(|note| is_warning(note))
        .for_each(|note| output::note(&format!("mirrorfs: {note}")));
}

fn announce(info: &ReadyInfo, mountpoint: &std::path::Path) -> String {
    let mut text = String::new();
    let notes = info.notes.iter().filter(|note| !is_warning(note));
    notes.for_each(|note| output::push_line(&mut text, note));
    output::push_line(&mut text, format!("mounted volume {} on {}", info.volume, mountpoint.display()));
    text
}
