//! From findings to the report.
//!
//! Owns what is counted as an error, as mended and as left, and how much is told.

use std::collections::BTreeMap;

use super::paths::Names;
use super::types::{Finding, Findings, Kind, Line, Outcome, Place, Report, Severity, Totals};

/// A report that is being put together.
pub struct Reporter {
    limit: usize,
    told: BTreeMap<Kind, usize>,
    report: Report,
}

impl Reporter {
    /// An empty one that tells at most `limit` findings of each kind.
    #[must_use]
    pub fn new(limit: usize) -> Self {
        Self { limit, told: BTreeMap::new(), report: Report::default() }
    }

    /// Something that a person should know.
    pub fn note(&mut self, text: impl Into<String>) {
        self.report.notes.push(text.into());
    }

    /// Something that should have been checked and could not be.
    pub fn fail(&mut self, text: impl Into<String>) {
        self.report.failed.push(text.into());
    }

    /// How much was looked at.
    pub fn totals(&mut self, totals: Totals) {
        self.report.totals = totals;
    }

    /// A finding was mended.
    pub fn corrected(&mut self, finding: &Finding, names: &Names) {
        *self.report.counts.entry(finding.kind).or_default() += 1;
        if finding.kind.severity() == Severity::Error {
            self.report.errors += 1;
            self.report.corrected += 1;
        }
        self.tell(finding, names, Outcome::Corrected);
    }

    /// All that a check found, and that stays as it is. `repaired`: what could be mended has been.
    pub fn left(&mut self, findings: &Findings, names: &Names, repaired: bool) {
        for (kind, n) in findings.counts() {
            *self.report.counts.entry(*kind).or_default() += n;
        }
        self.report.errors += findings.errors();
        self.report.left += findings.errors();
        for finding in findings.list() {
            let outcome = match finding.kind.severity() {
                Severity::Harmless => Outcome::Harmless,
                Severity::Error if finding.fix.is_some() && !repaired => Outcome::Correctable,
                Severity::Error => Outcome::Left,
            };
            self.tell(finding, names, outcome);
        }
    }

    fn tell(&mut self, finding: &Finding, names: &Names, outcome: Outcome) {
        let told = self.told.entry(finding.kind).or_default();
        *told += 1;
        if *told > self.limit {
            return;
        }
        let ino = match &finding.place {
            Place::Inode(ino) => Some(*ino),
            Place::Volume | Place::Name(..) => None,
        };
        let path = names.show(&finding.place);
        self.report.findings.push(Line {
            kind: finding.kind,
            path,
            ino,
            problem: finding.text.clone(),
            outcome,
        });
    }

    /// The whole.
    #[must_use]
    pub fn finish(self) -> Report {
        self.report
    }
}
