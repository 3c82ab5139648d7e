//! The command line: arguments, dispatch, and how a command ends.
//!
//! One file per subcommand. Owns what is printed; the work is done by the daemon, which most commands only ask.

use std::ffi::OsString;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::config::ConfigError;
use crate::control::{ClientError, Failure};
use crate::daemon;
use crate::exit::{Exit, FsckExit};

mod args;
mod background;
mod bench;
mod fsck;
mod helper;
mod human;
mod init;
mod invalidate;
mod locate;
mod mount;
mod mountpoint;
mod output;
mod progress;
mod remount;
mod replica;
mod restore;
mod salvage;
mod scrub;
mod status;
mod sync;
mod umount;
mod version;
mod void;

#[derive(Debug, Parser)]
#[command(
    name = "mirrorfs",
    version,
    about = "One directory kept safe on several clouds",
    after_help = exit_table(),
    subcommand_required = true,
    arg_required_else_help = true
)]
struct Cli {
    #[command(subcommand)]
    command: Command,

    /// What to log: error, warn, info, debug, trace, or a list such as `info,mirrorfs::replica=debug`
    #[arg(long, global = true, value_name = "FILTER", env = "MIRRORFS_LOG", hide_env_values = true)]
    log: Option<String>,
}

#[derive(Debug, Subcommand)]
#[allow(clippy::large_enum_variant, reason = "there is one, for a moment")]
enum Command {
    Init(init::Args),
    Mount(Box<mount::Args>),
    Umount(umount::Args),
    Sync(sync::Args),
    Status(status::Args),
    Replica(replica::Args),
    Scrub(scrub::Args),
    Fsck(fsck::Args),
    Restore(restore::Args),
    Salvage(salvage::Args),
    Bench(bench::Args),
    Version(version::Args),
    #[command(hide = true)]
    Invalidate(invalidate::Args),
}

/// Why a command did not do what it was asked, and the code it ends with.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub(crate) struct CommandError {
    exit: Exit,
    message: String,
}

impl CommandError {
    pub(crate) fn new(exit: Exit, message: impl Into<String>) -> Self {
        Self { exit, message: message.into() }
    }
}

impl From<ConfigError> for CommandError {
    fn from(error: ConfigError) -> Self {
        Self::new(error.exit_code(), error.to_string())
    }
}

impl From<ClientError> for CommandError {
    fn from(error: ClientError) -> Self {
        Self::new(error.exit_code(), error.to_string())
    }
}

impl From<Failure> for CommandError {
    fn from(failure: Failure) -> Self {
        Self::new(failure.exit, failure.message)
    }
}

impl From<daemon::Error> for CommandError {
    fn from(error: daemon::Error) -> Self {
        Self::new(error.exit_code(), error.to_string())
    }
}

type Outcome = Result<(), CommandError>;

/// Runs the program.
#[must_use]
pub fn main() -> ExitCode {
    // Whatever a command makes beside what it was asked to make holds the volume's content or its
    // secrets.
    crate::private::set_umask();
    match helper::translate(std::env::args_os().collect()) {
        helper::Call::Own(arguments) => run_own(&arguments),
        helper::Call::Mount { arguments, fake } => {
            helper::exit_code(if fake { mount::check_only(&arguments) } else { run_as(&arguments) }).into()
        }
        helper::Call::Remount { mountpoint, options } => {
            output::start_log(None, "warn");
            helper::exit_code(finish(remount::run(mountpoint.as_ref(), options))).into()
        }
        helper::Call::Wrong(why) => {
            helper::exit_code(finish(Err(CommandError::new(Exit::Usage, why)))).into()
        }
    }
}

/// Runs a command as it was typed. `fsck` has codes of its own, those of fsck(8).
fn run_own(arguments: &[OsString]) -> ExitCode {
    match parse(arguments) {
        Ok(Cli { command: Command::Fsck(args), log }) => {
            output::start_log(log.as_deref(), "warn");
            fsck::run(&args).into()
        }
        Ok(cli) => run_parsed(cli, arguments).into(),
        Err(Exit::Usage) if fsck::is_meant(arguments) => FsckExit::USAGE.into(),
        Err(exit) => exit.into(),
    }
}

fn run_as(arguments: &[OsString]) -> Exit {
    parse(arguments).map_or_else(|exit| exit, |cli| run_parsed(cli, arguments))
}

/// Help goes to standard output and is no error.
fn parse(arguments: &[OsString]) -> Result<Cli, Exit> {
    Cli::try_parse_from(arguments).map_err(|error| {
        output::help(&error, arguments);
        if error.use_stderr() { Exit::Usage } else { Exit::Done }
    })
}

fn run_parsed(cli: Cli, arguments: &[OsString]) -> Exit {
    let quiet = !matches!(cli.command, Command::Mount(_));
    output::start_log(cli.log.as_deref(), if quiet { "warn" } else { "info" });
    finish(run(cli.command, arguments))
}

/// Says why a command failed; answers its code.
fn finish(outcome: Outcome) -> Exit {
    match outcome {
        Ok(()) => Exit::Done,
        Err(error) => {
            // Empty: another process has said it.
            if !error.message.is_empty() {
                output::note(&format!("mirrorfs: {error}"));
            }
            error.exit
        }
    }
}

/// Whether `mirrorfs WORD` is a command.
fn is_command(word: &str) -> bool {
    use clap::CommandFactory;
    word == "help" || Cli::command().find_subcommand(word).is_some()
}

fn run(command: Command, arguments: &[OsString]) -> Outcome {
    match command {
        Command::Init(args) => init::run(args),
        Command::Mount(args) => mount::run(*args, arguments),
        Command::Umount(args) => umount::run(&args),
        Command::Sync(args) => sync::run(&args),
        Command::Status(args) => status::run(&args),
        Command::Replica(args) => replica::run(args),
        Command::Scrub(args) => scrub::run(args),
        // Dispatched before, as it has codes of its own.
        // Has ended before, with codes of its own.
        Command::Fsck(_) => Ok(()),
        Command::Restore(args) => restore::run(&args),
        Command::Salvage(args) => salvage::run(&args),
        Command::Bench(args) => bench::run(&args),
        Command::Version(args) => version::run(&args),
        Command::Invalidate(args) => invalidate::run(&args),
    }
}

/// A runtime for a command that asks a daemon: one thread is enough.
fn runtime() -> Result<tokio::runtime::Runtime, CommandError> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| CommandError::new(Exit::Failure, format!("cannot start: {error}")))
}

fn exit_table() -> String {
    let rows = Exit::ALL.iter().map(|exit| format!("  {:>2}  {}\n", exit.code(), exit.meaning()));
    format!("Exit codes:\n{}", rows.collect::<String>())
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_arguments_are_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_command_shows_examples() {
        for command in Cli::command().get_subcommands_mut() {
            let help = command.render_long_help().to_string();
            assert!(help.contains("Examples:\n  mirrorfs "), "{} has none:\n{help}", command.get_name());
        }
    }

    #[test]
    fn every_flag_can_be_set_by_a_variable() {
        for command in Cli::command().get_subcommands() {
            for argument in command.get_arguments().filter(|a| a.get_long().is_some() && !a.is_hide_set()) {
                let help = argument.get_help().map(ToString::to_string).unwrap_or_default();
                let name = argument.get_long().unwrap_or_default();
                let named = argument.get_env().is_some() || help.contains("[env: MIRRORFS_");
                // To take over is a decision of one moment.
                let never = matches!(name, "help" | "takeover");
                assert!(named || never, "{} --{name}", command.get_name());
            }
        }
    }

    #[test]
    fn help_and_readme_list_every_exit_code() {
        let help = Cli::command().render_help().to_string();
        let readme = include_str!("../../README.md");
        for exit in Exit::ALL {
            assert!(help.contains(&format!("{:>2}  {}\n", exit.code(), exit.meaning())), "{help}");
            assert!(readme.contains(&format!("| {} | {} |\n", exit.code(), exit.meaning())), "{exit:?}");
        }
    }
}
