//! Standard output, standard error and the log without surprises.
//!
//! Everything that a person reads passes here, and [`escape`] takes from it what a terminal would
//! obey: names of files, hosts and errors of servers come from outside. A reader that goes away
//! (`| head`) ends the output, not the program. `tests/tidy.rs` holds that nothing else writes to
//! the two.

use std::backtrace::{Backtrace, BacktraceStatus};
use std::ffi::OsString;
use std::io::{ErrorKind, Write};

use super::{CommandError, Outcome};
use crate::escape;
use crate::exit::Exit;

/// Prints lines on standard output. What a line says of things outside is added with [`push_line`]
/// or [`table`].
pub(super) fn print(text: &str) -> Outcome {
    write_out(&escape::lines(text))
}

fn write_out(text: &str) -> Outcome {
    let mut out = std::io::stdout().lock();
    let end = if text.is_empty() || text.ends_with('\n') { "" } else { "\n" };
    match out
        .write_all(text.as_bytes())
        .and_then(|()| out.write_all(end.as_bytes()))
        .and_then(|()| out.flush())
    {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => {
            Err(CommandError::new(Exit::Failure, format!("cannot write to standard output: {error}")))
        }
        _ => Ok(()),
    }
}

/// Prints a value as JSON on standard output, to a terminal or not: for a parser the value is the
/// same.
pub(super) fn print_json<T: serde::Serialize + ?Sized>(value: &T) -> Outcome {
    let text = serde_json::to_string_pretty(value)
        .map_err(|error| CommandError::new(Exit::Failure, format!("cannot write JSON: {error}")))?;
    write_out(&escape::json(&text))
}

/// Prints a message on standard error, where nothing can be done about a failure. Lines after the
/// first are indented.
pub(super) fn note(text: &str) {
    let _ = writeln!(std::io::stderr().lock(), "{}", escape::message(text));
}

/// Adds one line to a text that is to be printed. A line break in it came from outside, and is
/// escaped.
pub(super) fn push_line(text: &mut String, line: impl AsRef<str>) {
    text.push_str(&escape::line(line.as_ref()));
    text.push('\n');
}

/// The same for a value as JSON on one line.
pub(super) fn push_json<T: serde::Serialize>(text: &mut String, value: &T) -> Outcome {
    let json = serde_json::to_string(value)
        .map_err(|error| CommandError::new(Exit::Failure, format!("cannot write JSON: {error}")))?;
    text.push_str(&escape::json(&json));
    text.push('\n');
    Ok(())
}

/// Prints help, or what is wrong with a command line. It is in colours unless an argument or
/// variable, which is shown again, holds something that a terminal would obey.
pub(super) fn help(error: &clap::Error, arguments: &[OsString]) {
    let unsafe_argument = |argument: &OsString| {
        let text = argument.to_string_lossy();
        escape::line(&text) != text
    };
    let ours = |name: &OsString| name.to_string_lossy().starts_with("MIRRORFS_");
    let mut variables = std::env::vars_os().filter(|(name, _)| ours(name)).map(|(_, value)| value);
    if !arguments.iter().any(unsafe_argument) && !variables.any(|value| unsafe_argument(&value)) {
        // A reader that closed early is no error.
        let _ = error.print();
    } else if error.use_stderr() {
        let _ = writeln!(std::io::stderr().lock(), "{}", escape::lines(error.to_string().trim_end()));
    } else {
        let _ = print(&error.to_string());
    }
}

/// Starts the log on standard error, and has panics told there in the same way.
pub(super) fn start_log(filter: Option<&str>, default: &str) {
    let mut builder = env_logger::Builder::new();
    builder.filter_module(crate::fuse::NOISE, log::LevelFilter::Off);
    builder.parse_filters(filter.unwrap_or(default));
    builder.format(|out, record| {
        let (time, level, target) = (out.timestamp_millis(), record.level(), record.target());
        let style = out.default_level_style(level);
        let text = record.args().to_string();
        writeln!(out, "[{time} {style}{level:<5}{style:#} {target}] {}", escape::message(&text))
    });
    // Fails only when a log is running already, as in a test that calls main twice.
    let _ = builder.try_init();
    std::panic::set_hook(Box::new(|info| {
        let thread = std::thread::current();
        let trace = Backtrace::capture();
        let trace = match trace.status() {
            BacktraceStatus::Captured => format!("\n{trace}"),
            _ => String::new(),
        };
        note(&format!("thread '{}' {info}{trace}", thread.name().unwrap_or("<unnamed>")));
    }));
}

/// Rows with aligned columns, two blanks apart; the last column is not padded.
pub(super) fn table(rows: &[Vec<String>]) -> String {
    // Before the widths are taken. A cell is never more than one line.
    let escaped = |cell: &String| escape::line(cell).into_owned();
    let rows: Vec<Vec<String>> = rows.iter().map(|row| row.iter().map(escaped).collect()).collect();
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| rows.iter().filter_map(|r| r.get(column)).map(|c| c.chars().count()).max();
    let widths: Vec<usize> = (0..columns).map(|column| width(column).unwrap_or(0)).collect();
    let mut out = String::new();
    for row in &rows {
        let mut line = String::new();
        for (cell, width) in row.iter().zip(&widths) {
            line.push_str(cell);
            line.extend(std::iter::repeat_n(' ', width - cell.chars().count() + 2));
        }
        out.push_str(line.trim_end());
        out.push('\n');
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_aligned_and_lines_end_without_blanks() {
        let rows = [["NAME", "LAG", "ERROR"], ["é", "12 MiB", ""], ["longer", "-", "a b"]];
        let rows: Vec<Vec<String>> = rows.iter().map(|r| r.map(str::to_owned).to_vec()).collect();
        assert_eq!(table(&rows), "NAME    LAG     ERROR\né       12 MiB\nlonger  -       a b\n");
        assert_eq!(table(&[]), "");
    }

    #[test]
    fn a_cell_and_a_line_are_one_line_whatever_is_in_them() {
        let rows = vec![vec!["a\nb".to_owned(), "x".to_owned()], vec!["c".to_owned(), "\x1b[2J".to_owned()]];
        assert_eq!(table(&rows), "a\\nb  x\nc     \\x1b[2J\n");
        let mut text = String::new();
        push_line(&mut text, "error: \u{202e}x\nmirrorfs: all is well");
        assert_eq!(text, "error: \\u{202e}x\\nmirrorfs: all is well\n");
        push_json(&mut text, &"\u{9b}\n").unwrap();
        assert!(text.ends_with("\n\"\\u009b\\n\"\n"), "{text}");
    }
}
