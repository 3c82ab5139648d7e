//! Benchmarks of directories: what `mirrorfs bench` and `scripts/bench` run.
//!
//! Owns the workloads, the order in which they alternate between directories, and the statistics. Knows nothing of mirrorfs:
//! a directory is a directory, of whatever filesystem, so that all are measured alike.
//!
//! Machines are noisy, so what counts is the *ratio* of two directories measured in turn (A B A B, each workload by
//! itself), and of several rounds the median.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use serde::Serialize;

mod workloads;

pub use workloads::{Place, Workload};

/// How much work.
#[derive(Clone, Debug, Serialize)]
pub struct Size {
    /// Bytes of the big file, a multiple of 1 MiB.
    pub big: u64,
    /// Small files of 4 KiB.
    pub files: u32,
    /// Random reads or writes of 4 KiB.
    pub random: u32,
    /// Files or writes that are synced one by one.
    pub synced: u32,
}

impl Size {
    /// Everything multiplied; at least a little of each remains.
    #[must_use]
    pub fn scaled(&self, by: f64) -> Self {
        let scale = |n: f64, least: f64| (n * by).round().max(least);
        Self {
            big: scale(self.big as f64 / MIB as f64, 1.0) as u64 * MIB,
            files: scale(f64::from(self.files), 16.0) as u32,
            random: scale(f64::from(self.random), 16.0) as u32,
            synced: scale(f64::from(self.synced), 8.0) as u32,
        }
    }
}

impl Default for Size {
    fn default() -> Self {
        Self { big: 2048 * MIB, files: 20_000, random: 20_000, synced: 2_000 }
    }
}

pub(crate) const MIB: u64 = 1 << 20;

/// What one run of a workload took.
#[derive(Clone, Copy, Debug)]
pub struct Taken {
    /// Wall clock.
    pub time: Duration,
    /// How many operations (files, reads, MiB) that was.
    pub count: u64,
}

/// Why a workload has no figure.
#[derive(Debug, thiserror::Error)]
pub enum Trouble {
    /// Something this machine or user lacks; the other workloads go on.
    #[error("{0}")]
    Skipped(String),
    /// The directory failed.
    #[error("{what} {}: {source}", path.display())]
    Io {
        /// What was tried.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
}

/// Figures of one workload, per directory, in the order of the rounds.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// Its name.
    pub workload: Workload,
    /// What is counted.
    pub unit: &'static str,
    /// Operations per run.
    pub count: u64,
    /// Seconds of each round, per directory.
    pub seconds: Vec<Vec<f64>>,
    /// Why there are no figures.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub skipped: Option<String>,
}

impl Row {
    /// Median time of a directory, in seconds.
    #[must_use]
    pub fn median(&self, place: usize) -> Option<f64> {
        median(self.seconds.get(place)?)
    }

    /// Median over the rounds of first time / second time, of the same round.
    #[must_use]
    pub fn ratio(&self) -> Option<f64> {
        let (a, b) = (self.seconds.first()?, self.seconds.get(1)?);
        median(&a.iter().zip(b).map(|(a, b)| a / b.max(1e-9)).collect::<Vec<_>>())
    }
}

/// The middle one, or the mean of the two in the middle.
#[must_use]
pub fn median(values: &[f64]) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let half = sorted.len() / 2;
    let upper = *sorted.get(half)?;
    Some(if sorted.len() % 2 == 1 { upper } else { f64::midpoint(sorted[half - 1], upper) })
}

/// Runs `workloads` in `places` in turn, `rounds` times.
///
/// `settle(place)` is called before every measurement and returns when nothing goes on in the background of any of them;
/// `told` hears of every measurement.
///
/// # Errors
/// The first failure of a directory. What this machine cannot do is no failure: the row says so.
pub fn run(
    places: &mut [Place],
    workloads: &[Workload],
    rounds: u32,
    mut settle: impl FnMut(),
    mut told: impl FnMut(Workload, usize, Taken),
) -> Result<Vec<Row>, Trouble> {
    let mut rows: BTreeMap<Workload, Row> = BTreeMap::new();
    for _ in 0..rounds {
        for &workload in workloads {
            let row = rows.entry(workload).or_insert_with(|| Row {
                workload,
                unit: workload.unit(),
                count: 0,
                seconds: vec![Vec::new(); places.len()],
                skipped: None,
            });
            for (number, place) in places.iter_mut().enumerate() {
                if row.skipped.is_some() {
                    break;
                }
                let taken = place.prepare(workload).and_then(|()| {
                    settle();
                    place.run(workload)
                });
                match taken {
                    Ok(taken) => {
                        row.count = taken.count;
                        row.seconds[number].push(taken.time.as_secs_f64());
                        told(workload, number, taken);
                    }
                    Err(Trouble::Skipped(why)) => row.skipped = Some(why),
                    Err(error) => return Err(error),
                }
            }
        }
    }
    Ok(workloads.iter().filter_map(|w| rows.remove(w)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_the_middle() {
        assert_eq!(median(&[]), None);
        assert_eq!(median(&[3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), Some(2.5));
    }

    #[test]
    fn every_workload_runs_in_two_folders_in_turn() {
        let dirs = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
        let size = Size { big: 3 * MIB, files: 40, random: 16, synced: 8 };
        let mut places: Vec<Place> =
            dirs.iter().map(|d| Place::new(d.path(), size.clone()).unwrap()).collect();
        let mut order = Vec::new();
        let rows = run(&mut places, &Workload::ALL, 2, || (), |w, place, _| order.push((w, place))).unwrap();
        assert_eq!(rows.len(), Workload::ALL.len());
        for row in &rows {
            match &row.skipped {
                // Caches can be dropped by root only.
                Some(why) => assert!(why.contains("root") || why.contains("tar"), "{why}"),
                None => {
                    assert_eq!(row.seconds.iter().map(Vec::len).collect::<Vec<_>>(), [2, 2]);
                    assert!(row.count > 0 && row.ratio().unwrap() > 0.0, "{row:?}");
                }
            }
        }
        assert_eq!(order[..2], [(Workload::SeqWrite, 0), (Workload::SeqWrite, 1)]);
        drop(places);
        for dir in &dirs {
            assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "it leaves nothing behind");
        }
    }
}
