//! Rules of the house that the compiler does not know: headers, file lengths, the order of the modules, who may name which
//! dependency, and documents that keep up with the code.

#![allow(clippy::unwrap_used, clippy::panic)]

use std::fs;
use std::path::{Path, PathBuf};

/// Every file stays below this.
const MOST_LINES: usize = 700;

/// Files above [`MOST_LINES`]: their own ceiling, and why.
const LONG: [(&str, usize, &str); 1] =
    [("tests/model/ops.rs", 1200, "one arm for each operation of the model test")];

/// The modules in reading order. An import goes downwards only.
const ORDER: [&str; 25] = [
    "fuzz",
    "cli",
    "guardian",
    "daemon",
    "config",
    "control",
    "bench",
    "fuse",
    "fsck",
    "vfs",
    "txg",
    "cache",
    "journal",
    "reconcile",
    "restore",
    "checkpoint",
    "replica",
    "format",
    "trace",
    "priority",
    "direct",
    "private",
    "escape",
    "exit",
    "ids",
];

/// Dependencies that one folder alone may name.
const FENCED: [(&str, &str); 3] =
    [("sled::", "src/journal/"), ("fuser::", "src/fuse/"), ("object_store::", "src/replica/")];

/// Modules that know nothing of async.
const BLOCKING: [&str; 5] = ["vfs", "cache", "journal", "checkpoint", "format"];

struct Source {
    /// Relative to the crate.
    path: String,
    text: String,
}

impl Source {
    /// The lines with their numbers, comments left out.
    fn code(&self) -> impl Iterator<Item = (usize, &str)> {
        self.text
            .lines()
            .enumerate()
            .map(|(i, l)| (i + 1, l))
            .filter(|(_, l)| !l.trim_start().starts_with("//"))
    }

    /// The module of the crate that it belongs to; none for the roots.
    fn module(&self) -> Option<&str> {
        let rest = self.path.strip_prefix("src/")?;
        let name = rest.split(['/', '.']).next()?;
        (!matches!(rest, "lib.rs" | "main.rs")).then_some(name)
    }
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn read(path: &str) -> String {
    fs::read_to_string(root().join(path)).unwrap_or_else(|e| panic!("{path}: {e}"))
}

fn files(folder: &str, wanted: impl Fn(&Path) -> bool) -> Vec<Source> {
    let mut found = Vec::new();
    let mut folders = vec![root().join(folder)];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display())) {
            let path: PathBuf = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if wanted(&path) {
                let text = fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
                let path = path.strip_prefix(root()).unwrap().to_str().unwrap().to_owned();
                found.push(Source { path, text });
            }
        }
    }
    found.sort_by(|a, b| a.path.cmp(&b.path));
    assert!(!found.is_empty(), "nothing in {folder}");
    found
}

fn rust(folder: &str) -> Vec<Source> {
    files(folder, |path| path.extension().is_some_and(|e| e == "rs"))
}

fn report(faults: &[String]) {
    assert!(faults.is_empty(), "\n{}", faults.join("\n"));
}

/// The words of a line that begin with `prefix`, without it, up to the first character that no name has.
fn names_after<'a>(line: &'a str, prefix: &'a str) -> impl Iterator<Item = &'a str> {
    line.match_indices(prefix).filter_map(move |(at, _)| {
        let before = line[..at].chars().next_back();
        let whole = before.is_none_or(|c| !c.is_alphanumeric() && c != '_' && c != ':');
        let rest = &line[at + prefix.len()..];
        let end = rest.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(rest.len());
        whole.then_some(&rest[..end])
    })
}

#[test]
fn every_file_says_what_it_owns() {
    let all = rust("src").into_iter().chain(rust("tests")).chain(rust("benches"));
    report(
        &all.filter(|s| !s.text.starts_with("//! "))
            .map(|s| format!("{}: does not begin with `//!`", s.path))
            .collect::<Vec<_>>(),
    );
}

#[test]
fn no_file_grows_without_end() {
    let mut faults = Vec::new();
    for s in rust("src").into_iter().chain(rust("tests")).chain(rust("benches")) {
        let lines = s.text.lines().count();
        let most = LONG.iter().find(|(path, ..)| *path == s.path).map_or(MOST_LINES, |(_, most, _)| *most);
        if lines > most {
            faults.push(format!("{}: {lines} lines, more than {most}: split it", s.path));
        }
    }
    report(&faults);
}

#[test]
fn imports_go_downwards() {
    let place = |module: &str| ORDER.iter().position(|m| *m == module);
    let mut faults = Vec::new();
    for s in rust("src") {
        let Some(own) = s.module() else { continue };
        let Some(from) = place(own) else {
            faults.push(format!(
                "{}: module {own} has no place in the order; give it one here and in docs/",
                s.path
            ));
            continue;
        };
        for (line, text) in s.code() {
            for name in names_after(text, "crate::") {
                match place(name) {
                    Some(to) if to >= from => {}
                    Some(_) => faults.push(format!("{}:{line}: {own} must not know {name}", s.path)),
                    // `crate::{a, b}` would hide from this test.
                    None if name.is_empty() => {
                        faults.push(format!("{}:{line}: name one module per `use`", s.path))
                    }
                    None => {}
                }
            }
        }
        // `super` must not lead out of the module.
        let parts = s.path.trim_end_matches(".rs").trim_end_matches("/mod").matches('/').count();
        let product = s.text.split("#[cfg(test)]").next().unwrap_or_default();
        if product.contains(&"super::".repeat(parts)) {
            faults.push(format!("{}: `super` leads out of {own}; write `crate::`", s.path));
        }
    }
    report(&faults);
}

#[test]
fn dependencies_stay_behind_their_fences() {
    let mut faults = Vec::new();
    for s in rust("src") {
        for (name, folder) in FENCED {
            if s.path.starts_with(folder) {
                continue;
            }
            for (line, text) in s.code() {
                if names_after(text, name).next().is_some() {
                    faults.push(format!("{}:{line}: `{name}` belongs into {folder}", s.path));
                }
            }
        }
    }
    report(&faults);
}

#[test]
fn all_that_a_person_reads_is_escaped() {
    let writer = "src/cli/output.rs";
    // Not to write: whether it is a terminal, and which descriptor it is. The invalidator's standard
    // output is the connection to the kernel.
    let handles =
        [writer, "src/cli/progress.rs", "src/guardian/report.rs", "src/fuse/invalidator/process.rs"];
    // Help, of which nothing comes from outside; a report to another process; the figures in a
    // file.
    let breaks = [
        ("src/cli/mod.rs", "exit.meaning()"),
        ("src/cli/mod.rs", "Exit codes:"),
        ("src/cli/fsck.rs", "exit.code()"),
        ("src/cli/background.rs", "serde_json::to_string"),
        ("src/cli/background.rs", ".join("),
        ("src/cli/bench.rs", "std::fs::write"),
        ("src/cli/status.rs", "output::print(&texts.join("),
        ("src/cli/status.rs", "output::table(&head)"),
    ];
    let mut faults = Vec::new();
    for s in rust("src").iter().filter(|s| s.path != writer && !is_test(&s.path)) {
        let product = s.text.find("#[cfg(test)]\nmod tests").unwrap_or(s.text.len());
        let lines = s.text[..product].lines().count();
        for (line, text) in s.code().take_while(|(line, _)| *line <= lines) {
            for word in ["println!", "print!", "eprintln!", "eprint!", "env_logger::", "set_hook("] {
                if names_after(text, word).next().is_some() {
                    faults.push(format!("{}:{line}: `{word}` outside {writer}", s.path));
                }
            }
            let handle =
                ["stdout()", "stderr()"].iter().any(|word| text.replace("use_stderr", "").contains(word));
            if handle && !handles.contains(&s.path.as_str()) {
                faults.push(format!("{}:{line}: writes past {writer}", s.path));
            }
            let known = breaks.iter().any(|(path, part)| s.path == *path && text.contains(part));
            if s.path.starts_with("src/cli/") && text.contains("\\n") && !known {
                faults.push(format!("{}:{line}: a line break of its own: use output::push_line", s.path));
            }
        }
    }
    report(&faults);
}

/// Whether a file of `src` holds tests alone.
fn is_test(path: &str) -> bool {
    path.ends_with("/tests.rs") || path.contains("/tests/") || path.ends_with("/testing.rs")
}

#[test]
fn blocking_modules_know_no_async() {
    let mut faults = Vec::new();
    for s in rust("src").iter().filter(|s| s.module().is_some_and(|m| BLOCKING.contains(&m))) {
        for (line, text) in s.code() {
            for word in ["async fn", "async move", ".await", "block_on"] {
                if text.contains(word) {
                    faults.push(format!("{}:{line}: `{word}` in a module that knows no async", s.path));
                }
            }
        }
    }
    report(&faults);
}

#[test]
fn nothing_of_a_machine_is_committed() {
    let text = |path: &Path| {
        path.extension().is_none_or(|e| ["rs", "md", "toml", "sh", "yml", "json"].iter().any(|x| e == *x))
    };
    // Where this crate was first built. Put together, so that this file passes.
    let place = concat!("/wo", "rk/");
    let mut faults = Vec::new();
    let folders = ["src", "docs", "scripts", ".ci"];
    for s in folders.iter().flat_map(|f| files(f, text)).chain(rust("tests")).chain(rust("benches")) {
        for (i, line) in s.text.lines().enumerate() {
            if line.contains(place) {
                faults.push(format!("{}:{}: a place on somebody's machine", s.path, i + 1));
            }
        }
    }
    report(&faults);
}

#[test]
fn both_licences_are_there() {
    assert!(read("LICENSE-APACHE").contains("Apache License"));
    assert!(read("LICENSE-MIT").contains("Permission is hereby granted"));
    assert!(read("Cargo.toml").contains("license = \"Apache-2.0 OR MIT\""));
}

#[test]
fn the_format_document_names_every_table() {
    let (code, doc) = (read("src/format/tables/keys.rs"), read("docs/format.md"));
    let mut seen = 0;
    for line in code.lines().filter(|l| l.trim_start().starts_with("pub const ")) {
        let Some((name, value)) = line.trim().trim_start_matches("pub const ").split_once(": u8 = 0x") else {
            continue;
        };
        if name == "FIRST_LOCAL" {
            continue;
        }
        let byte = value.trim_end_matches(';');
        seen += 1;
        assert!(doc.contains(&format!("\n| {byte} |")), "docs/format.md lacks table {byte} ({name})");
    }
    assert!(seen >= 15, "only {seen} tables found: has their form in the code changed?");
}

#[test]
fn the_semantics_document_names_every_errno() {
    let doc = read("docs/semantics.md");
    let code = read("src/fuse/errno.rs");
    let table = code.split("#[cfg(test)]").next().unwrap_or_default();
    let mut seen = 0;
    for name in table.lines().flat_map(|l| names_after(l, "Errno::")) {
        let name = if name == "NO_XATTR" { "ENODATA" } else { name };
        seen += 1;
        assert!(doc.contains(&format!("`{name}`")), "docs/semantics.md does not say when {name} is answered");
    }
    assert!(seen >= 20, "only {seen} errnos found: has their form in the code changed?");
}

#[test]
fn the_architecture_document_names_every_module() {
    let (doc, lib) = (read("docs/architecture.md"), read("src/lib.rs"));
    let declared: Vec<&str> = lib
        .lines()
        .filter_map(|l| l.trim_start_matches("pub ").strip_prefix("mod ")?.strip_suffix(';'))
        .collect();
    assert_eq!(declared, ORDER, "src/lib.rs declares the modules in reading order");
    for module in ORDER {
        assert!(doc.contains(&format!("| `{module}` |")), "docs/architecture.md says nothing of {module}");
    }
}

#[test]
fn the_scanner_sees_what_it_should() {
    let found = |line, prefix| names_after(line, prefix).collect::<Vec<_>>();
    assert_eq!(found("use crate::vfs::types;", "crate::"), ["vfs"]);
    assert_eq!(found("(crate::ids::Lsn, crate::cache::Slot)", "crate::"), ["ids", "cache"]);
    assert_eq!(found("use crate::{ids, vfs};", "crate::"), [""]);
    assert_eq!(found("let x = sled::open(p);", "sled::"), ["open"]);
    assert!(found("use my_sled::Db; use super::sled::Db;", "sled::").is_empty());
}
