//! Checking the tables of a volume against each other, and planning how to mend them.
//!
//! Owns the rules that every healthy set of tables keeps (the inverse of what `vfs`, `cache` and `txg` write), the findings where one
//! does not, and for each finding what mends it without losing anything. Pure: it reads tables through [`Source`] and answers changes;
//! knows no disk, no journal's inside and no network.
//!
//! ```text
//! Source: journal, snapshot of one, a replica's tables ─ check ─▶ findings ─ paths ─▶ report
//!                                                                    └─ plan ─▶ changes, for ordinary transactions
//! ```
//!
//! Memory: tables are streamed in the order of their keys. What is kept is 40 bytes for each inode and 40 for each block, and the
//! findings.

mod blocks;
mod compare;
mod inodes;
mod names;
mod paths;
mod repair;
mod report;
#[cfg(test)]
mod tests;
mod types;

use std::collections::BTreeMap;

use bytes::Bytes;

use crate::format::local::SegmentValue;
use crate::format::tables::prefix_range;
use crate::ids::{Lsn, SegmentNo};
use crate::journal::{Journal, Snapshot};
use crate::restore::Tables;

pub use compare::{Difference, compare};
pub use paths::{Names, name_all};
pub use repair::{Mend, plan};
pub use report::Reporter;
pub use types::{Finding, Findings, Fix, Kind, Line, Outcome, Place, Report, Severity, Totals};

/// Rows of a table read at a time.
const PAGE: usize = 1024;

/// Why a check ended before its end.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Stop {
    /// Somebody wanted it to end.
    #[error("cancelled")]
    Cancelled,
    /// The tables cannot be read.
    #[error("the tables cannot be read: {0}")]
    Tables(String),
}

/// Ordered key-value tables as of one moment.
pub trait Source {
    /// The value of a key.
    fn get(&self, key: &[u8]) -> Result<Option<Bytes>, Stop>;
    /// Up to `limit` pairs with keys in `[start, end)`, in order.
    fn scan(&self, start: &[u8], end: &[u8], limit: usize) -> Result<Vec<(Bytes, Bytes)>, Stop>;
}

fn unreadable(e: impl std::fmt::Display) -> Stop {
    Stop::Tables(e.to_string())
}

/// For a journal that nobody changes meanwhile.
impl Source for Journal {
    fn get(&self, key: &[u8]) -> Result<Option<Bytes>, Stop> {
        Journal::get(self, key).map_err(unreadable)
    }

    fn scan(&self, start: &[u8], end: &[u8], limit: usize) -> Result<Vec<(Bytes, Bytes)>, Stop> {
        Journal::scan(self, start, end, limit).map_err(unreadable)
    }
}

impl Source for Snapshot {
    fn get(&self, key: &[u8]) -> Result<Option<Bytes>, Stop> {
        Snapshot::get(self, key).map_err(unreadable)
    }

    fn scan(&self, start: &[u8], end: &[u8], limit: usize) -> Result<Vec<(Bytes, Bytes)>, Stop> {
        Snapshot::scan(self, start, end, limit).map_err(unreadable)
    }
}

impl Source for Tables {
    fn get(&self, key: &[u8]) -> Result<Option<Bytes>, Stop> {
        Ok(Tables::get(self, key).cloned())
    }

    fn scan(&self, start: &[u8], end: &[u8], limit: usize) -> Result<Vec<(Bytes, Bytes)>, Stop> {
        let rows = self.range(Bytes::copy_from_slice(start), Bytes::copy_from_slice(end));
        Ok(rows.take(limit).map(|(k, v)| (k.clone(), v.clone())).collect())
    }
}

/// What is to be checked.
pub struct Input<'a> {
    /// The tables.
    pub source: &'a dyn Source,
    /// Bytes of a full block.
    pub block_size: u32,
    /// The segments that there are, when `source` has replicated tables only (a replica's); `None` for a machine's own tables.
    pub segments: Option<&'a BTreeMap<SegmentNo, SegmentValue>>,
    /// Length of the slot file in bytes, when that is known.
    pub slots_len: Option<u64>,
    /// The newest record, when that is known.
    pub last_lsn: Option<Lsn>,
    /// Asked now and then: whether to give up.
    pub cancelled: &'a dyn Fn() -> bool,
}

impl Input<'_> {
    fn is_local(&self) -> bool {
        self.segments.is_none()
    }

    /// All rows of a table.
    #[must_use]
    pub fn rows(&self, table: u8) -> Rows<'_> {
        let (start, end) = prefix_range(&[table]);
        Rows::new(self.source, self.cancelled, start, end)
    }
}

/// The rows of a range of keys, one after the other.
pub struct Rows<'a> {
    source: &'a dyn Source,
    cancelled: &'a dyn Fn() -> bool,
    next: Bytes,
    end: Bytes,
    page: std::vec::IntoIter<(Bytes, Bytes)>,
    peeked: Option<(Bytes, Bytes)>,
    done: bool,
}

impl<'a> Rows<'a> {
    fn new(source: &'a dyn Source, cancelled: &'a dyn Fn() -> bool, start: Bytes, end: Bytes) -> Self {
        let page = Vec::new().into_iter();
        Self { source, cancelled, next: start, end, page, peeked: None, done: false }
    }

    /// The next row; `None` behind the last.
    #[expect(clippy::should_implement_trait, reason = "it can fail, and its callers stop at the first error")]
    pub fn next(&mut self) -> Result<Option<(Bytes, Bytes)>, Stop> {
        if let Some(row) = self.peeked.take() {
            return Ok(Some(row));
        }
        loop {
            if let Some(row) = self.page.next() {
                return Ok(Some(row));
            }
            if self.done {
                return Ok(None);
            }
            if (self.cancelled)() {
                return Err(Stop::Cancelled);
            }
            let page = self.source.scan(&self.next, &self.end, PAGE)?;
            match page.last() {
                Some((last, _)) => self.next = [&last[..], &[0]].concat().into(),
                None => self.done = true,
            }
            self.page = page.into_iter();
        }
    }

    fn peek(&mut self) -> Result<Option<&(Bytes, Bytes)>, Stop> {
        if self.peeked.is_none() {
            self.peeked = self.next()?;
        }
        Ok(self.peeked.as_ref())
    }

    /// The next row, if its number (the 8 bytes behind the table's) is this one.
    fn next_of(&mut self, number: u64) -> Result<Option<(Bytes, Bytes)>, Stop> {
        match self.peek()? {
            Some((key, _)) if number_of(key) == number => self.next(),
            _ => Ok(None),
        }
    }

    /// The number of the next row.
    fn peek_number(&mut self) -> Result<Option<u64>, Stop> {
        Ok(self.peek()?.map(|(key, _)| number_of(key)))
    }
}

/// The number in a key; 0, which nothing has, for a key that is too short.
fn number_of(key: &[u8]) -> u64 {
    crate::format::tables::number_of_key(key).unwrap_or(0)
}

/// What a check found.
pub struct Checked {
    /// What is wrong.
    pub findings: Findings,
    /// How much was looked at.
    pub totals: Totals,
    nodes: names::Nodes,
}

/// Checks all tables. `limit` bounds the findings of one kind that are kept; all are counted.
pub fn check(input: &Input<'_>, limit: usize) -> Result<Checked, Stop> {
    let mut findings = Findings::new(limit);
    let mut totals = Totals::default();
    let mut blocks = blocks::Blocks::read(input, &mut findings)?;
    let mut nodes = inodes::read(input, &mut blocks, &mut findings, &mut totals)?;
    names::check(input, &mut nodes, &mut findings, &mut totals)?;
    blocks.check_uses(input, &mut findings)?;
    totals.blocks = blocks.len();
    totals.segments = blocks.segments.len() as u64;
    Ok(Checked { findings, totals, nodes })
}

/// All that is wrong as lines with paths, for tests that end with a check: none when all is well.
pub fn lines(input: &Input<'_>) -> Result<Vec<String>, Stop> {
    let checked = check(input, 100)?;
    let list = checked.findings.list();
    let names = name_all(input, &checked, list.iter().map(|f| &f.place))?;
    let line = |f: &Finding| {
        let path = names.show(&f.place).map_or_else(String::new, |path| format!("{path}: "));
        format!("{}: {path}{}", f.kind.word(), f.text)
    };
    Ok(list.iter().filter(|f| f.kind.severity() == Severity::Error).map(line).collect())
}
