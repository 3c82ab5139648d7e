//! Standard output and error without surprises: a reader that goes away (`| head`) ends the output, not the program.

use std::io::{ErrorKind, Write};

use super::{CommandError, Outcome};
use crate::exit::Exit;

/// Prints lines on standard output.
pub(super) fn print(text: &str) -> Outcome {
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

/// Prints a value as JSON on standard output.
pub(super) fn print_json<T: serde::Serialize + ?Sized>(value: &T) -> Outcome {
    let text = serde_json::to_string_pretty(value)
        .map_err(|error| CommandError::new(Exit::Failure, format!("cannot write JSON: {error}")))?;
    print(&text)
}

/// Prints a line on standard error, where nothing can be done about a failure.
pub(super) fn note(text: &str) {
    let _ = writeln!(std::io::stderr().lock(), "{text}");
}

/// Rows with aligned columns, two blanks apart; the last column is not padded.
pub(super) fn table(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| rows.iter().filter_map(|r| r.get(column)).map(|c| c.chars().count()).max();
    let widths: Vec<usize> = (0..columns).map(|column| width(column).unwrap_or(0)).collect();
    let mut out = String::new();
    for row in rows {
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
}
