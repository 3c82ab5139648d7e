//! `mirrorfs fsck`: reads a state folder, a running daemon's tables or a replica, and has `crate::fsck` check them.
//!
//! Owns where tables come from and where mends go. A check works on a copy of the journal's files, so that it changes nothing; a repair
//! opens them as a mount does and puts every mend through an ordinary transaction, so that the replicas get it with the next group.

pub(super) mod live;
mod local;
mod replica;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::members::Members;
use super::parts::{SlotCell, journal_is_gone, open_with_ballast, sealed_mark};
use super::state::{Local, StateDir};
use super::{Error, wall_clock};
use crate::exit::Exit;
use crate::format::record::Op;
use crate::fsck::{self, Findings, Input, Kind, Names, Report, Reporter, Stop};
use crate::journal::{self, Journal, JournalError};
use crate::replica::ReplicaSpec;

use replica::Ground;

/// Rounds of mending and checking anew: structure, then counts, then the proof; two more for what mending brings to light.
const ROUNDS: usize = 6;
/// Changes put into one transaction, about.
const STEP: usize = 1000;
/// Folder in the state folder for the copy that is checked.
const COPY: &str = "fsck.tmp";

/// What to check, and how.
pub struct FsckArgs<'a> {
    /// Mend what can be mended.
    pub repair: bool,
    /// Read and verify content, too.
    pub deep: bool,
    /// At most so many findings of each kind are told.
    pub limit: usize,
    /// Replicas to check besides.
    pub replicas: &'a [ReplicaSpec],
    /// Asked now and then: whether to give up.
    pub cancelled: &'a (dyn Fn() -> bool + Sync),
}

impl From<Stop> for Error {
    fn from(stop: Stop) -> Self {
        let exit = match &stop {
            Stop::Cancelled => Exit::Failure,
            Stop::Tables(_) => Exit::Damaged,
        };
        Error::new(exit, stop.to_string())
    }
}

fn failure(what: &str, path: &Path, e: &std::io::Error) -> Error {
    Error::new(Exit::Failure, format!("cannot {what} {}: {e}", path.display()))
}

/// The copy of a journal's files; gone when dropped.
struct Copy(PathBuf);

impl Copy {
    fn of(state: &StateDir) -> Result<Self, Error> {
        let copy = Self(state.path().join(COPY));
        // An earlier check was killed.
        drop(Self(copy.0.clone()));
        let needed: u64 = ["db", "tail", "witness"].iter().map(|name| size(&state.path().join(name))).sum();
        let disk = rustix::fs::statvfs(state.path());
        let free = disk.map_or(u64::MAX, |d| d.f_bavail.saturating_mul(d.f_frsize));
        if free < needed.saturating_add(64 << 20) {
            return Err(Error::new(
                Exit::Failure,
                format!(
                    "the check works on a copy of the local tables, {needed} bytes, for which there is no room in {}: free some space",
                    state.path().display()
                ),
            ));
        }
        for name in ["db", "tail", "witness"] {
            copy_all(&state.path().join(name), &copy.0.join(name))?;
        }
        Ok(copy)
    }
}

impl Drop for Copy {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn size(path: &Path) -> u64 {
    match fs::metadata(path) {
        Ok(m) if m.is_dir() => {
            let entries = fs::read_dir(path).into_iter().flatten().flatten();
            entries.map(|e| size(&e.path())).sum()
        }
        Ok(m) => m.len(),
        Err(_) => 0,
    }
}

fn copy_all(from: &Path, to: &Path) -> Result<(), Error> {
    let failed = |e: std::io::Error| failure("copy", from, &e);
    let Ok(meta) = fs::metadata(from) else { return Ok(()) };
    if let Some(above) = to.parent() {
        fs::create_dir_all(above).map_err(failed)?;
    }
    if meta.is_dir() {
        fs::create_dir_all(to).map_err(failed)?;
        for entry in fs::read_dir(from).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            copy_all(&entry.path(), &to.join(entry.file_name()))?;
        }
        return Ok(());
    }
    fs::copy(from, to).map(|_| ()).map_err(failed)
}

/// Checks (and mends) what a state folder holds, and what replicas hold of it. No daemon may use it.
pub fn fsck_state(dir: &Path, args: &FsckArgs<'_>) -> Result<Report, Error> {
    if !dir.join("state.json").exists() {
        let text = format!("{} is no state folder of mirrorfs (state.json is not there)", dir.display());
        return Err(Error::new(Exit::NoVolume, text));
    }
    let state = StateDir::lock(dir)?;
    let Some(local) = state.read()? else {
        return Err(Error::new(Exit::NoVolume, "state.json has gone"));
    };
    if let Some(folder) = &local.rebuild {
        let text =
            format!("the local tables are being rebuilt from {folder}: mount again to finish that first");
        return Err(Error::new(Exit::Damaged, text));
    }
    let mut reporter = Reporter::new(args.limit);
    if args.repair {
        refuse_repair(&local, &state)?;
    }
    if let Some(note) = &local.fenced {
        reporter.note(format!(
            "another machine took the volume over; this state is not part of it any more: {}",
            note.text
        ));
    }
    if journal_is_gone(&state) {
        return Ok(without_journal(reporter, "the local journal is gone"));
    }
    let copy = if args.repair { None } else { Some(Copy::of(&state)?) };
    let opened = match &copy {
        Some(copy) => Journal::open(journal::Options::new(&copy.0, Arc::new(|_| Ok(())))),
        None => open_with_ballast(&state, &SlotCell::default()),
    };
    let journal = match opened {
        Ok((journal, opened)) => {
            if opened.replayed > 0 {
                reporter.note(format!("{} changes were taken from the tail of the journal", opened.replayed));
            }
            journal
        }
        Err(e @ (JournalError::Damaged(_) | JournalError::Incomplete(_))) => {
            return Ok(without_journal(reporter, &e.to_string()));
        }
        Err(e) => return Err(e.into()),
    };
    let work = Work { state: &state, local: &local, journal: &journal, args };
    let outcome = work.run(reporter);
    // Of a copy nothing is to be kept; and what is mended is durable by now.
    let closed = journal.close();
    drop(copy);
    if args.repair {
        closed?;
    }
    outcome
}

/// What a state is that may not be written to.
fn refuse_repair(local: &Local, state: &StateDir) -> Result<(), Error> {
    if let Some(note) = &local.fenced {
        return Err(super::open::refuse(note, state.path()));
    }
    if local.borrowed {
        let text = "this state was made by a read-only mount: remove the folder, it holds nothing that the replicas lack";
        return Err(Error::new(Exit::Usage, text));
    }
    Ok(())
}

/// The report when there are no tables to look at.
fn without_journal(mut reporter: Reporter, why: &str) -> Report {
    let mut findings = Findings::new(1);
    findings.about(Kind::Journal, None, || {
        format!("{why}. The next mount rebuilds the local tables from the replicas and what is left here")
    });
    reporter.left(&findings, &Names::default(), true);
    reporter.finish()
}

/// Checks replicas, each alone, without a local state.
pub fn fsck_replicas(args: &FsckArgs<'_>) -> Result<Report, Error> {
    let mut reporter = Reporter::new(args.limit);
    let runtime = super::runtime()?;
    for spec in args.replicas {
        let store =
            spec.store().map_err(|e| Error::new(Exit::Usage, format!("replica {}: {e}", spec.name)))?;
        runtime.block_on(replica::check(&store, None, args, &mut reporter))?;
    }
    // A request that hangs is not waited for.
    runtime.shutdown_background();
    Ok(reporter.finish())
}

/// The replicas of a state folder: those that are configured, as changed by command; without any, those that it was last used with.
pub fn fsck_members(dir: &Path, configured: &[ReplicaSpec]) -> Result<Vec<ReplicaSpec>, Error> {
    if configured.is_empty() {
        return Ok(crate::config::state::remembered(dir));
    }
    Members::read(dir)?.apply(configured)
}

struct Work<'a> {
    state: &'a StateDir,
    local: &'a Local,
    journal: &'a Arc<Journal>,
    args: &'a FsckArgs<'a>,
}

impl Work<'_> {
    fn run(&self, mut reporter: Reporter) -> Result<Report, Error> {
        if let Err(e) = self.journal.verify() {
            if matches!(e, JournalError::Damaged(_)) {
                return Ok(without_journal(reporter, &e.to_string()));
            }
            return Err(e.into());
        }
        let slots = fs::metadata(self.state.slots()).map(|m| m.len());
        let input = Input {
            source: &**self.journal,
            block_size: self.local.volume.block_size,
            segments: None,
            slots_len: Some(slots.unwrap_or(0)),
            last_lsn: Some(self.journal.last_lsn()),
            cancelled: self.args.cancelled,
        };
        let mut first = None;
        for _ in 0..ROUNDS {
            let limit = if self.args.repair { usize::MAX } else { self.args.limit };
            let mut checked = fsck::check(&input, limit)?;
            let said = local::check(self.state, &input, self.args.deep, &mut checked.findings)?;
            if let Some(said) = said.filter(|_| first.is_none()) {
                reporter.note(said);
            }
            reporter.totals(*first.get_or_insert(checked.totals));
            let mends = match self.args.repair {
                true => fsck::plan(input.source, checked.findings.list(), wall_clock(), owner())?,
                false => Vec::new(),
            };
            let names = fsck::name_all(&input, &checked, checked.findings.list().iter().map(|f| &f.place))?;
            if mends.is_empty() {
                reporter.left(&checked.findings, &names, self.args.repair);
                break;
            }
            self.apply(mends.iter().map(|m| &m.ops[..]))?;
            for mend in &mends {
                if let Some(finding) = checked.findings.list().get(mend.finding) {
                    reporter.corrected(finding, &names);
                }
            }
        }
        self.replicas(&input, &mut reporter)?;
        Ok(reporter.finish())
    }

    /// Puts mends through ordinary transactions, durably.
    fn apply<'a>(&self, mends: impl Iterator<Item = &'a [Op]>) -> Result<(), Error> {
        let mut step: Vec<&Op> = Vec::new();
        let put = |step: &mut Vec<&Op>| -> Result<(), JournalError> {
            self.journal.transact::<_, JournalError>(|tx| {
                for op in step.drain(..) {
                    match op.clone() {
                        Op::Put { key, value } => tx.put(key, value),
                        Op::Delete { key } => tx.delete(key),
                    }
                }
                Ok(())
            })?;
            Ok(())
        };
        for ops in mends {
            // What mends one finding is never torn apart.
            step.extend(ops);
            if step.len() >= STEP {
                put(&mut step)?;
            }
        }
        put(&mut step)?;
        self.journal.barrier(self.journal.last_lsn())?;
        Ok(())
    }

    fn replicas(&self, input: &Input<'_>, reporter: &mut Reporter) -> Result<(), Error> {
        if self.args.replicas.is_empty() {
            return Ok(());
        }
        let runtime = super::runtime()?;
        let mark = sealed_mark(self.journal)?;
        let touched = replica::touched(self.journal, mark.lsn, self.journal.last_lsn());
        let segments = replica::segments(input)?;
        let ground =
            Ground { input, volume: &self.local.volume, claims: &self.local.claims, mark, segments, touched };
        for spec in self.args.replicas {
            let store = match spec.store() {
                Ok(store) => store,
                Err(e) => {
                    reporter.fail(format!("replica {}: {e}", spec.name));
                    continue;
                }
            };
            runtime.block_on(replica::check(&store, Some(&ground), self.args, reporter))?;
        }
        // A request that hangs is not waited for.
        runtime.shutdown_background();
        Ok(())
    }
}

/// Whom new files in `/lost+found` belong to.
fn owner() -> (u32, u32) {
    // SAFETY: these two calls only read the process's credentials.
    unsafe { (libc::getuid(), libc::getgid()) }
}
