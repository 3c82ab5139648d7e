//! Benchmarks of directories: what `mirrorfs bench` and `scripts/bench` run.
//!
//! Owns the workloads, the order in which they alternate between directories, and the statistics. Knows nothing of mirrorfs:
//! a directory is a directory, of whatever filesystem, so that all are measured alike.
//!
//! Machines are noisy, so what counts is the *ratio* of two directories measured in turn (A B A B, each workload by
//! itself), and of several rounds the median. A directory that fails, or takes too long, at one workload is left out there
//! and goes on with the next.

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::time::Duration;

use serde::{Serialize, Serializer};

mod machine;
mod workloads;

pub use machine::Machine;
use workloads::{Buffer, Needs};
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
    /// More than the time that was allowed.
    #[error("took longer than {} s", .0.as_secs_f64())]
    TooSlow(Duration),
    /// What it needs could not be made, because of this.
    #[error("cannot be prepared: {0}")]
    Unprepared(String),
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

impl Trouble {
    fn of_preparation(self) -> Self {
        match self {
            Self::TooSlow(_) | Self::Io { .. } => Self::Unprepared(self.to_string()),
            other => other,
        }
    }
}

/// Figures of one workload, per directory, in the order of the rounds.
#[derive(Clone, Debug)]
pub struct Row {
    /// Its name.
    pub workload: Workload,
    /// What is counted.
    pub unit: &'static str,
    /// Operations per run.
    pub count: u64,
    /// Seconds of each round, per directory. After a failure there are fewer.
    pub seconds: Vec<Vec<f64>>,
    /// Why a directory has no more figures.
    pub failed: Vec<Option<String>>,
    /// Why there are no figures at all.
    pub skipped: Option<String>,
}

impl Row {
    fn new(workload: Workload, places: usize) -> Self {
        let (seconds, failed) = (vec![Vec::new(); places], vec![None; places]);
        Self { workload, unit: workload.unit(), count: 0, seconds, failed, skipped: None }
    }

    /// Median time of a directory, in seconds.
    #[must_use]
    pub fn median(&self, place: usize) -> Option<f64> {
        median(self.seconds.get(place)?)
    }

    /// Median over the rounds of time of the first directory / time of this one, of the same round.
    #[must_use]
    pub fn ratio(&self, place: usize) -> Option<f64> {
        let (a, b) = (self.seconds.first()?, self.seconds.get(place)?);
        median(&a.iter().zip(b).map(|(a, b)| a / b.max(1e-9)).collect::<Vec<_>>())
    }
}

impl Serialize for Row {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        #[derive(Serialize)]
        struct Told<'a> {
            workload: Workload,
            unit: &'static str,
            count: u64,
            seconds: &'a [Vec<f64>],
            medians: Vec<Option<f64>>,
            ratios: Vec<Option<f64>>,
            failed: &'a [Option<String>],
            skipped: &'a Option<String>,
        }
        let places = 0..self.seconds.len();
        Told {
            workload: self.workload,
            unit: self.unit,
            count: self.count,
            seconds: &self.seconds,
            medians: places.clone().map(|p| self.median(p)).collect(),
            ratios: places.map(|p| self.ratio(p)).collect(),
            failed: &self.failed,
            skipped: &self.skipped,
        }
        .serialize(serializer)
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

/// How to run.
#[derive(Clone, Copy, Debug)]
pub struct Plan<'a> {
    /// What to run, in this order.
    pub workloads: &'a [Workload],
    /// How many times.
    pub rounds: u32,
    /// How long to wait, before each measurement, for the machine to have nothing else to do.
    pub idle: Duration,
}

/// What a run gave.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// One for each workload.
    pub rows: Vec<Row>,
    /// Measurements in all.
    pub measured: u32,
    /// Those that were begun although the machine was still at work.
    pub disturbed: u32,
}

/// What is going on.
#[derive(Clone, Debug)]
pub enum Event {
    /// A measurement.
    Taken(Taken),
    /// The directory has none for this workload: why.
    Failed(String),
}

/// Runs the workloads in `places` in turn.
///
/// `settle` is called before every measurement and returns when nothing goes on in the background of any of them; `told` hears
/// of every measurement. What fails is left out, and the row says so.
pub fn run(
    places: &mut [Place],
    plan: Plan<'_>,
    mut settle: impl FnMut(),
    mut told: impl FnMut(Workload, usize, Event),
) -> Outcome {
    let mut rows: BTreeMap<Workload, Row> = BTreeMap::new();
    // What a directory cannot even prepare is not tried for each workload again.
    let mut hopeless: HashMap<(usize, Needs), String> = HashMap::new();
    let mut buffer = Buffer::new();
    let mut outcome = Outcome { rows: Vec::new(), measured: 0, disturbed: 0 };
    for _ in 0..plan.rounds {
        for &workload in plan.workloads {
            let row = rows.entry(workload).or_insert_with(|| Row::new(workload, places.len()));
            for (number, place) in places.iter_mut().enumerate() {
                if row.skipped.is_some() || row.failed[number].is_some() {
                    continue;
                }
                let key = (number, workload.needs());
                std::mem::swap(&mut place.buffer, &mut buffer);
                let taken = match hopeless.get(&key) {
                    Some(why) => Err(Trouble::Unprepared(why.clone())),
                    None => place.prepare(workload).map_err(|e| e.of_preparation()).and_then(|()| {
                        settle();
                        outcome.measured += 1;
                        outcome.disturbed += u32::from(!machine::wait_idle(plan.idle));
                        place.run(workload, plan.idle)
                    }),
                };
                std::mem::swap(&mut place.buffer, &mut buffer);
                match taken {
                    Ok(taken) => {
                        row.count = taken.count;
                        row.seconds[number].push(taken.time.as_secs_f64());
                        told(workload, number, Event::Taken(taken));
                    }
                    Err(Trouble::Skipped(why)) => row.skipped = Some(why),
                    Err(error) => {
                        if let Trouble::Unprepared(why) = &error
                            && key.1 != Needs::Nothing
                        {
                            hopeless.entry(key).or_insert_with(|| why.clone());
                        }
                        row.failed[number] = Some(error.to_string());
                        told(workload, number, Event::Failed(error.to_string()));
                    }
                }
            }
        }
    }
    outcome.rows = plan.workloads.iter().filter_map(|w| rows.remove(w)).collect();
    outcome
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

    fn plan(workloads: &[Workload]) -> Plan<'_> {
        Plan { workloads, rounds: 2, idle: Duration::ZERO }
    }

    fn places(dirs: &[tempfile::TempDir], limit: Duration) -> Vec<Place> {
        let size = Size { big: 3 * MIB, files: 40, random: 16, synced: 8 };
        dirs.iter().map(|d| Place::new(d.path(), size.clone(), limit).unwrap()).collect()
    }

    #[test]
    fn a_workload_has_the_same_name_in_json_as_on_the_command_line() {
        for workload in Workload::ALL {
            assert_eq!(serde_json::to_value(workload).unwrap(), workload.name());
        }
    }

    #[test]
    fn every_workload_runs_in_two_folders_in_turn() {
        // Emptying the machine's caches would disturb whatever else runs here.
        let all: Vec<Workload> = Workload::ALL.into_iter().filter(|w| !w.name().ends_with("-cold")).collect();
        let dirs = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
        let mut places = places(&dirs, Duration::from_secs(600));
        let mut order = Vec::new();
        let told = |w, place, event| match event {
            Event::Taken(_) => order.push((w, place)),
            Event::Failed(why) => panic!("{w:?}: {why}"),
        };
        let outcome = run(&mut places, plan(&all), || (), told);
        assert_eq!(outcome.rows.len(), all.len());
        for row in &outcome.rows {
            match &row.skipped {
                Some(why) => assert!(why.contains("tar"), "{why}"),
                None => {
                    assert_eq!(row.seconds.iter().map(Vec::len).collect::<Vec<_>>(), [2, 2]);
                    assert!(row.count > 0 && row.ratio(1).unwrap() > 0.0, "{row:?}");
                }
            }
        }
        assert_eq!(order[..2], [(Workload::SeqWrite, 0), (Workload::SeqWrite, 1)]);
        drop(places);
        for dir in &dirs {
            assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "it leaves nothing behind");
        }
    }

    #[test]
    fn what_fails_or_is_too_slow_is_left_out_and_the_others_go_on() {
        let dirs = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
        let mut places = places(&dirs, Duration::from_secs(600));
        places[1].set_limit(Duration::ZERO);
        std::fs::remove_dir_all(places[2].root()).unwrap();
        let workloads = [Workload::Create, Workload::StatWarm, Workload::ReadSmallWarm];
        let mut failures = 0;
        let told = |_, _, event| failures += u32::from(matches!(event, Event::Failed(_)));
        let rows = run(&mut places, plan(&workloads), || (), told).rows;
        for row in &rows {
            assert_eq!(row.seconds.iter().map(Vec::len).collect::<Vec<_>>(), [2, 0, 0], "{row:?}");
            let failed: Vec<_> = row.failed.iter().map(|f| f.as_deref().unwrap_or_default()).collect();
            assert!(failed[0].is_empty() && failed[1].contains("longer than 0 s"), "{failed:?}");
            assert!(failed[2].contains("No such file"), "{failed:?}");
            assert_eq!(row.ratio(1), None);
        }
        assert!(rows[1].failed[1].as_ref().unwrap().starts_with("cannot be prepared: took"), "{rows:?}");
        assert_eq!(failures, 6, "not tried again in the second round");
        let told = serde_json::to_value(&rows[0]).unwrap();
        assert_eq!(told["workload"], "create");
        assert_eq!(told["ratios"][0], 1.0);
        assert!(told["medians"][1].is_null() && told["failed"][2].is_string(), "{told}");
    }
}
