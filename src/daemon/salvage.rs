//! Saving what a state folder holds and no replica of the volume does: after another machine took over, or when the
//! replicas are lost.
//!
//! Owns finding where the folder's branch begins, and the reading of its content: written blocks, cached ones, staged
//! segments, and replicas where they answer. Claims nothing, sends nothing, and changes the folder no more than a replay.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures::future::join_all;
use tokio::runtime::Runtime;
use tokio::sync::watch;

use super::Error;
use super::open::quick;
use super::parts::{SlotCell, journal_is_gone, open_with_ballast, sealed_mark};
use super::state::{Local, StateDir};
use crate::cache::dirty::Piece;
use crate::cache::{BlockStore, StoreError, Supply};
use crate::escape;
use crate::exit::Exit;
use crate::format::local::SegmentValue;
use crate::format::names::ObjectName;
use crate::format::record::{Op, Record};
use crate::format::segment::verify_whole;
use crate::format::tables::{BlockEntry, FrameLoc, segment_key, table};
use crate::format::volume::Claim;
use crate::ids::{BlockId, Epoch, SegmentNo, VolumeId};
use crate::journal::Journal;
use crate::replica::volume::{self, Found, VolumeError};
use crate::replica::{FenceNote, FetchError, FrameSource, Reader, Replica, ReplicaSpec, Roster, Store};
use crate::restore::fetch::{Meaning, Patience, meaning, read};
use crate::restore::{self, BlockContent, Changes, MissingPiece, RestoreError, Saved, Sink, Tables, Wanted};

/// Name of the report that lies beside the files.
pub const REPORT: &str = "SALVAGE.txt";
/// How long replicas may take to give one block.
const FETCH: Duration = Duration::from_secs(20);
/// Blocks in a row that no replica gave in time: then none is asked any more.
const PATIENCE: u32 = 3;
/// Entries of the tables read at a time.
const PAGE: usize = 4096;
/// More than any state folder holds, so that nothing is evicted.
const NO_LIMIT: u64 = 1 << 50;

/// What to save, and where to.
#[derive(Clone, Debug)]
pub struct SalvageArgs {
    /// The state folder; no daemon may use it.
    pub state: PathBuf,
    /// A new or empty folder.
    pub to: PathBuf,
    /// Everything, not only what changed since the branch began.
    pub all: bool,
}

/// What was saved.
#[derive(Clone, Debug, serde::Serialize)]
pub struct SalvageReport {
    /// The volume.
    pub volume: VolumeId,
    /// Who ended this state's tenure, when somebody did.
    pub fenced: Option<FenceNote>,
    /// What changed after this segment was saved; absent when everything was.
    pub after_segment: Option<SegmentNo>,
    /// Segments of the branch that are not here and that no replica gave: what changed in them is not known.
    pub unknown_segments: Vec<SegmentNo>,
    /// The replicas that were asked for content.
    pub replicas: Vec<String>,
    /// The replicas that may have what is missing, and did not answer.
    pub unreachable: Vec<String>,
    /// The files.
    #[serde(flatten)]
    pub saved: Saved,
    /// What a person should know.
    pub warnings: Vec<String>,
}

fn failure(e: impl std::fmt::Display) -> Error {
    Error::new(Exit::Failure, e.to_string())
}

/// Saves the unsent changes of a state folder. `replicas` are asked for what is not here; those that do not answer are
/// left out. `progress` is called with the files and bytes saved so far.
pub fn salvage(
    args: &SalvageArgs,
    replicas: &[ReplicaSpec],
    progress: &mut dyn FnMut(u64, u64),
) -> Result<SalvageReport, Error> {
    check_places(args)?;
    let state = StateDir::lock(&args.state)?;
    let local = readable(&state)?;
    let gone = || Error::new(Exit::Damaged, "the local journal is gone: there is nothing to be saved from");
    // To open it would make an empty one, which the next mount would take for the volume's.
    if journal_is_gone(&state) {
        return Err(gone());
    }
    let slots = SlotCell::default();
    let (journal, opened) = open_with_ballast(&state, &slots)?;
    if opened.fresh {
        journal.close()?;
        return Err(gone());
    }
    let outcome = (|| {
        let blocks =
            BlockStore::open(&state.slots(), local.volume.block_size, NO_LIMIT, Arc::clone(&journal))
                .map_err(failure)?;
        let _ = slots.set(Arc::clone(blocks.slots()));
        let runtime = super::runtime()?;
        let mut warnings = Vec::new();
        let (stores, unreachable) = runtime.block_on(answering(replicas, local.volume.volume, &mut warnings));
        let work = Work {
            state: &state,
            local: &local,
            journal: &journal,
            blocks: &blocks,
            runtime: &runtime,
            stores,
            unreachable: RefCell::new(unreachable),
        };
        let report = work.run(args, warnings, progress);
        // A fetch that hangs is not waited for.
        runtime.shutdown_background();
        report
    })();
    journal.close()?;
    outcome
}

fn check_places(args: &SalvageArgs) -> Result<(), Error> {
    if !args.state.join("state.json").exists() {
        let message =
            format!("{} is no state folder of mirrorfs (state.json is not there)", args.state.display());
        return Err(Error::new(Exit::Usage, message));
    }
    let state = fs::canonicalize(&args.state).map_err(failure)?;
    let inside = args.to.ancestors().any(|above| fs::canonicalize(above).is_ok_and(|real| real == state));
    if inside {
        return Err(Error::new(Exit::Usage, format!("{} lies in the state folder", args.to.display())));
    }
    match fs::read_dir(&args.to).map(|mut entries| entries.next().is_some()) {
        Ok(true) => Err(Error::new(
            Exit::Usage,
            format!("{} is not empty: give a new or an empty folder", args.to.display()),
        )),
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            Err(Error::new(Exit::Usage, format!("{}: {e}", args.to.display())))
        }
        _ => Ok(()),
    }
}

/// The state, when there is something in it that could be saved.
fn readable(state: &StateDir) -> Result<Local, Error> {
    let local = state.read()?.ok_or_else(|| failure("state.json has gone"))?;
    if local.borrowed {
        let message = "this state was made by a read-only mount: it holds nothing that the replicas lack";
        return Err(Error::new(Exit::Usage, message));
    }
    if let Some(folder) = &local.rebuild {
        return Err(Error::new(
            Exit::Damaged,
            format!("the local tables were being rebuilt from {folder}: mount again to finish that first"),
        ));
    }
    Ok(local)
}

/// Those replicas that answer and hold the volume; and the names of those that do not answer.
async fn answering(
    specs: &[ReplicaSpec],
    volume: VolumeId,
    warnings: &mut Vec<String>,
) -> (Vec<Store>, BTreeSet<String>) {
    let (mut stores, mut silent) = (Vec::new(), BTreeSet::new());
    for spec in specs {
        match spec.store() {
            Ok(store) => stores.push(store),
            Err(e) => warnings.push(format!("replica {} is not asked: {e}", spec.name)),
        }
    }
    let look = |store: &Store| {
        let store = quick(store);
        async move { volume::expect(&store, volume).await }
    };
    let found = join_all(stores.iter().map(look)).await;
    let mut whole = Vec::new();
    for (store, found) in stores.into_iter().zip(found) {
        match found {
            Ok(Found::Volume(_) | Found::Headless) => whole.push(store),
            Ok(Found::Empty) => warnings.push(format!("replica {} is empty", store.name())),
            Err(e) => {
                if matches!(e, VolumeError::Store(_)) {
                    silent.insert(store.name().to_string());
                }
                warnings.push(format!("not asked: {e}"));
            }
        }
    }
    (whole, silent)
}

struct Work<'a> {
    state: &'a StateDir,
    local: &'a Local,
    journal: &'a Arc<Journal>,
    blocks: &'a Arc<BlockStore>,
    runtime: &'a Runtime,
    stores: Vec<Store>,
    /// Replicas that did not answer.
    unreachable: RefCell<BTreeSet<String>>,
}

impl Work<'_> {
    fn run(
        &self,
        args: &SalvageArgs,
        mut warnings: Vec<String>,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<SalvageReport, Error> {
        let mut tables = Tables::default();
        self.read_tables(&mut tables)?;
        let (mut after, mut unknown) = (None, Vec::new());
        let mut changes = Changes::default();
        if !args.all {
            let fork = self.fork(&mut warnings)?;
            unknown = self.changes(fork, &mut changes, &mut warnings)?;
            after = Some(fork);
        }
        let wanted = if args.all { Wanted::All } else { Wanted::Changed(&changes) };
        let content = self.content();
        let saved =
            restore::save(&tables, &wanted, &content, &args.to, self.local.volume.block_size, progress)
                .map_err(|e| match e {
                    RestoreError::Tree(e) => Error::new(Exit::Damaged, e.to_string()),
                    e => failure(e),
                })?;
        let report = SalvageReport {
            volume: self.local.volume.volume,
            fenced: self.local.fenced.clone(),
            after_segment: after,
            unknown_segments: unknown,
            replicas: self.stores.iter().map(|s| s.name().to_string()).collect(),
            unreachable: self.unreachable.take().into_iter().collect(),
            saved,
            warnings,
        };
        write_report(&args.to, &report).map_err(|e| failure(format!("{}: {e}", args.to.display())))?;
        Ok(report)
    }

    fn read_tables(&self, tables: &mut Tables) -> Result<(), Error> {
        let (mut start, end) = (Bytes::new(), [table::FIRST_LOCAL]);
        loop {
            let page = self.journal.scan(&start, &end, PAGE)?;
            let Some((last, _)) = page.last() else { return Ok(()) };
            start = [&last[..], &[0]].concat().into();
            let ops = page.into_iter().map(|(key, value)| Op::Put { key, value }).collect();
            tables.apply(ops).map_err(failure)?;
        }
    }

    /// Where those begin who claimed the volume behind us, by the claims that stand on the replicas now: who is fenced first sees a claim
    /// that does not say so yet. `None` when it is not said, or a claim cannot be read.
    fn others_begin(&self) -> Option<SegmentNo> {
        let mut first = None;
        for store in &self.stores {
            let (volume, ours) = (self.local.volume.volume, self.local.epoch());
            let tenures = self.runtime.block_on(volume::tenures(store, volume, ours)).ok()?;
            if !tenures.damaged.is_empty() {
                return None;
            }
            let claims = tenures.known.iter().map(|t| &t.claim).filter(|c| c.epoch > self.local.epoch());
            first = claims.filter_map(Claim::begins).chain(first).min();
        }
        first
    }

    /// The last segment that this state and the volume have in common, as far as that is known.
    fn fork(&self, warnings: &mut Vec<String>) -> Result<SegmentNo, Error> {
        let newest = sealed_mark(self.journal)?.segment;
        let noted = self.local.fenced.as_ref().and_then(|note| note.first_segment);
        if let Some(first) = noted.or_else(|| self.others_begin()) {
            return Ok(SegmentNo(first.0.saturating_sub(1)).min(newest));
        }
        let mut least: Option<SegmentNo> = None;
        crate::cache::store::scan_table::<StoreError>(self.journal, table::CURSOR, |key, value| {
            // Names of filesystems stand in the same table.
            if !key[1..].starts_with(b"filesystem of ") {
                let cursor = SegmentNo(value.try_into().map_or(0, u64::from_le_bytes));
                least = Some(least.map_or(cursor, |l| l.min(cursor)));
            }
            Ok(())
        })
        .map_err(failure)?;
        let fork = least.unwrap_or_default().min(newest);
        warnings.push(format!(
            "where another writer went on is not known: what changed since segment {fork}, which every replica held, is saved"
        ));
        Ok(fork)
    }

    /// Collects what changed after segment `after`; gives those segments whose records are not to be had.
    fn changes(
        &self,
        after: SegmentNo,
        changes: &mut Changes,
        warnings: &mut Vec<String>,
    ) -> Result<Vec<SegmentNo>, Error> {
        let mark = sealed_mark(self.journal)?;
        let mut unknown = Vec::new();
        for number in (after.0 + 1..=mark.segment.0).map(SegmentNo) {
            match self.segment(number) {
                Ok(records) => records.iter().for_each(|r| changes.note(r)),
                Err(why) => {
                    log::warn!("segment {number}: {why}");
                    unknown.push(number);
                }
            }
        }
        if let (Some(first), n) = (unknown.first(), unknown.len()) {
            warnings.push(format!(
                "{n} segment(s) from {first} on are neither here nor on a replica that was asked: what changed in them is not \
                 known. Name the replicas with --replica or --config, or save everything with --all"
            ));
        }
        for record in self.journal.records(mark.lsn, self.journal.last_lsn())? {
            changes.note(&record?);
        }
        Ok(unknown)
    }

    /// The records of a sealed segment: from the staging area, or from a replica.
    fn segment(&self, number: SegmentNo) -> Result<Vec<Record>, String> {
        let value = self.journal.get(&segment_key(number)).map_err(|e| e.to_string())?;
        let value = value.ok_or("it is not in the tables")?;
        let value = SegmentValue::decode(&value).map_err(|e| e.to_string())?;
        let object = ObjectName::Segment(number, value.epoch);
        let expected = |bytes: &[u8]| {
            let meta = verify_whole(bytes).map_err(|e| e.to_string())?;
            let footer = &meta.footer;
            footer.expect(self.local.volume.volume, number, value.epoch).map_err(|e| e.to_string())?;
            // Another writer's segment cannot have our epoch, but a copy of this state may have written one.
            match footer.hash.0 == value.blake3 || value.blake3 == [0; 32] {
                true => meta.records.to_vec().map_err(|e| e.to_string()),
                false => Err("it is not the one that this state wrote".to_owned()),
            }
        };
        let mut whys = Vec::new();
        match fs::read(self.state.staging().join(object.path())) {
            Ok(bytes) => match expected(&bytes) {
                Ok(records) => return Ok(records),
                Err(e) => whys.push(e),
            },
            Err(e) => whys.push(format!("not staged ({})", e.kind())),
        }
        for store in &self.stores {
            let fetched = self.runtime.block_on(read(store, &object.path(), None, Patience::Full));
            if fetched.as_ref().is_err_and(|e| meaning(e) == Meaning::Unreachable) {
                self.unreachable.borrow_mut().insert(store.name().to_string());
            }
            match fetched.map_err(|e| e.to_string()).and_then(|bytes| expected(&bytes)) {
                Ok(records) => return Ok(records),
                Err(e) => whys.push(e),
            }
        }
        Err(whys.join("; "))
    }

    fn content(&self) -> LocalContent {
        let staging = self.state.staging();
        let staged: BTreeSet<(SegmentNo, Epoch)> = staged(&staging);
        let local = move |loc: &FrameLoc| {
            let object = ObjectName::Segment(loc.segment, loc.epoch);
            staged.contains(&(loc.segment, loc.epoch)).then(|| staging.join(object.path()))
        };
        let replicas = self.stores.iter().map(|s| Arc::new(Replica::new(s.clone()))).collect();
        // Nobody gives this signal: a fetch ends by its deadline.
        let (open, closing) = watch::channel(false);
        let reader =
            Reader::new(Roster::new(replicas), Some(Arc::new(local)), self.runtime.handle().clone(), closing)
                .with_deadline(FETCH);
        LocalContent {
            blocks: Arc::clone(self.blocks),
            reader,
            silent: AtomicU32::new(0),
            has_replicas: !self.stores.is_empty(),
            _open: open,
        }
    }
}

/// The segments whose files lie in the staging area.
fn staged(staging: &Path) -> BTreeSet<(SegmentNo, Epoch)> {
    let entries = |dir: &Path| fs::read_dir(dir).into_iter().flatten().flatten().map(|e| e.path()).collect();
    let folders: Vec<PathBuf> = entries(&staging.join("segments"));
    let files = folders.iter().flat_map(|folder| -> Vec<PathBuf> { entries(folder) });
    files
        .filter_map(|file| match ObjectName::parse(file.strip_prefix(staging).ok()?.to_str()?) {
            Some(ObjectName::Segment(number, epoch)) => Some((number, epoch)),
            _ => None,
        })
        .collect()
}

/// Content out of the state folder, and what replicas still give.
struct LocalContent {
    blocks: Arc<BlockStore>,
    reader: Reader,
    /// Blocks in a row that nobody gave in time.
    silent: AtomicU32,
    /// Whether there are replicas that can be asked.
    has_replicas: bool,
    /// As long as it is there the reader goes on.
    _open: watch::Sender<bool>,
}

/// Why a stretch of a block is not to be had.
struct Lack {
    why: String,
    unreachable: bool,
}

impl Lack {
    fn lost(why: impl std::fmt::Display) -> Self {
        Self { why: why.to_string(), unreachable: false }
    }
}

impl LocalContent {
    /// Fills `out` with a stretch of a sealed block from `start` on.
    fn sealed(&self, entry: &BlockEntry, start: u32, out: &mut [u8]) -> Result<(), Lack> {
        match self.blocks.read_sealed(entry, start, out, &Supply::new()) {
            Err(StoreError::Miss(_)) => {}
            other => return other.map_err(Lack::lost),
        }
        if entry.is_without_content() {
            return Err(Lack::lost("the rest of it was lost when it was overwritten in part"));
        }
        let unreachable = self.has_replicas;
        if self.silent.load(Ordering::Relaxed) >= PATIENCE {
            return Err(Lack { why: "no replica answers".to_owned(), unreachable });
        }
        let raw = self.reader.fetch(entry, &[], &|_, _| {}).map_err(|e| match e {
            FetchError::Unavailable { .. } => {
                self.silent.fetch_add(1, Ordering::Relaxed);
                Lack { why: e.to_string(), unreachable }
            }
            e => Lack::lost(e),
        })?;
        self.silent.store(0, Ordering::Relaxed);
        let supply = Supply::from([(entry.hash, raw)]);
        self.blocks.read_sealed(entry, start, out, &supply).map_err(Lack::lost)
    }
}

impl BlockContent for LocalContent {
    fn read(&self, block: BlockId, out: &mut [u8]) -> Vec<MissingPiece> {
        let end = out.len() as u32;
        let missing = |start, end, lack: Lack| MissingPiece {
            start,
            end,
            why: lack.why,
            unreachable: lack.unreachable,
        };
        let Some(dirty) = self.blocks.dirty(block) else {
            let read = self.blocks.entry(block).map_err(Lack::lost);
            let read = read.and_then(|entry| self.sealed(&entry, 0, out));
            return read.map_or_else(|lack| vec![missing(0, end, lack)], |()| Vec::new());
        };
        let mut lacks = Vec::new();
        let pieces = dirty.with(|content| {
            let pieces = content.pieces(0, end);
            for piece in &pieces {
                if let Piece::Slot { start, end } = *piece
                    && let Err(e) = content.slot.read(start, &mut out[start as usize..end as usize])
                {
                    lacks.push(missing(start, end, Lack::lost(e)));
                }
            }
            pieces
        });
        for piece in pieces {
            match piece {
                Piece::Slot { .. } => {}
                Piece::Zero { start, end } => out[start as usize..end as usize].fill(0),
                Piece::Base { start, end, entry } => {
                    if let Err(lack) = self.sealed(&entry, start, &mut out[start as usize..end as usize]) {
                        lacks.push(missing(start, end, lack));
                    }
                }
            }
        }
        lacks.sort_by_key(|m| m.start);
        lacks
    }
}

/// Lays the report beside the files, under a name that none of them has.
fn write_report(to: &Path, report: &SalvageReport) -> std::io::Result<()> {
    let mut text = report.saved.list();
    for warning in &report.warnings {
        text.push_str(&format!("\nNote: {}\n", escape::line(warning)));
    }
    let names = (1..).map(|n| format!("SALVAGE-{n}.txt"));
    for name in std::iter::once(REPORT.to_owned()).chain(names) {
        match fs::OpenOptions::new().write(true).create_new(true).open(to.join(name)) {
            Ok(mut file) => {
                file.write_all(text.as_bytes())?;
                return file.sync_all();
            }
            Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}
