//! The staging area: sealed objects on local disk, from sealing until every replica has them.
//!
//! Owns the files below `staging/` and what is known of every segment of the volume. Decides nothing about when a
//! segment may go; it is told. Segments lie under the same names as on a replica, so that a rebuild of the local tables
//! can read the area like one.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::sync::watch;

use crate::cache::space::Admission;
use crate::cache::store::scan_table;
use crate::cache::{BlockStore, is_full};
use crate::direct;
use crate::format::codec::FormatError;
use crate::format::local::SegmentValue;
use crate::format::names::ObjectName;
use crate::format::segment::SegmentHash;
use crate::format::tables::{FrameLoc, number_of_key, table};
use crate::ids::{Epoch, SegmentNo};
use crate::journal::{Journal, JournalError};
use crate::replica::{Backlog, Outbox, Shelf, Staged, StagedKind};

/// Why the staging area cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum StagingError {
    /// A file operation failed.
    #[error("staging area {path}: {source}")]
    Io {
        /// File or folder.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The journal refuses.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// The segment table holds bytes that cannot be.
    #[error("local tables are damaged: {0}")]
    Format(#[from] FormatError),
}

fn at<T>(path: &Path, result: io::Result<T>) -> Result<T, StagingError> {
    result.map_err(|source| StagingError::Io { path: path.to_owned(), source })
}

/// Longest wait before more is sealed.
const MOST_PACE: Duration = Duration::from_secs(2);

/// The staging area.
pub struct Staging {
    dir: PathBuf,
    blocks: Arc<BlockStore>,
    state: Mutex<State>,
    newest: watch::Sender<SegmentNo>,
    /// What was written just now, for the shippers.
    shelf: Arc<Shelf>,
}

#[derive(Default)]
struct State {
    /// Every published segment of the volume.
    known: BTreeMap<SegmentNo, Known>,
    /// Files that are complete and not published yet. Their blocks count as sealed before the segment is published, and may be
    /// evicted at once: until then nobody else has them.
    written: BTreeMap<SegmentNo, Epoch>,
    /// Each with the segment that names it in the log.
    checkpoints: BTreeMap<SegmentNo, (Staged, SegmentNo)>,
    /// Bytes of segments' files.
    bytes: u64,
}

impl State {
    /// Bytes of all files.
    fn total(&self) -> u64 {
        self.bytes + self.checkpoints.values().map(|(c, _)| c.len).sum::<u64>()
    }
}

#[derive(Clone, Copy)]
struct Known {
    epoch: Epoch,
    len: u64,
    /// `None` when a restore did not read the segment, and nobody has learned it since.
    hash: Option<SegmentHash>,
    cut_at: f64,
    on_disk: bool,
}

impl Known {
    fn new(v: &SegmentValue, on_disk: bool) -> Self {
        let hash = (v.blake3 != [0; 32]).then_some(SegmentHash(v.blake3));
        Self { epoch: v.epoch, len: v.len, hash, cut_at: v.cut_at, on_disk }
    }
}

impl Staging {
    /// Opens the area in `dir`: keeps the files of registered segments, removes what a crash left unregistered (no byte of
    /// it was ever sent).
    pub fn open(dir: &Path, journal: &Journal, blocks: Arc<BlockStore>) -> Result<Arc<Self>, StagingError> {
        for sub in ["segments", "checkpoints"] {
            at(dir, fs::create_dir_all(dir.join(sub)))?;
        }
        // The folders' own names, too: a power loss must not take them away with what was registered in them since.
        for folder in [dir.join("segments"), dir.to_owned(), dir.join("..")] {
            at(&folder, File::open(&folder).and_then(|f| f.sync_all()))?;
        }
        let mut state = State::default();
        scan_table::<StagingError>(journal, table::SEGMENT, |key, value| {
            let v = SegmentValue::decode(value)?;
            let number = SegmentNo(number_of_key(key).unwrap_or(0));
            let known = Known::new(&v, false);
            state.known.insert(number, known);
            Ok(())
        })?;
        for path in segment_files(dir)? {
            let name = path.strip_prefix(dir).ok().and_then(|p| ObjectName::parse(&p.to_string_lossy()));
            let len = at(&path, fs::metadata(&path))?.len();
            let known = match name {
                Some(ObjectName::Segment(number, epoch)) => {
                    state.known.get_mut(&number).filter(|k| k.epoch == epoch && k.len == len)
                }
                _ => None,
            };
            match known {
                Some(known) => {
                    known.on_disk = true;
                    state.bytes += len;
                }
                None => {
                    log::info!("removing {}: not registered, left by a crash", path.display());
                    at(&path, fs::remove_file(&path))?;
                }
            }
        }
        // A checkpoint is written again when it is due; half a one is of no use.
        let folder = dir.join("checkpoints");
        for entry in at(&folder, fs::read_dir(&folder))? {
            let path = at(&folder, entry)?.path();
            at(&path, fs::remove_dir_all(&path).or_else(|_| fs::remove_file(&path)))?;
        }
        let newest = state.known.keys().next_back().copied().unwrap_or_default();
        blocks.space.set_staged(state.bytes);
        Ok(Arc::new(Self {
            dir: dir.to_owned(),
            blocks,
            state: Mutex::new(state),
            newest: watch::channel(newest).0,
            shelf: Arc::default(),
        }))
    }

    /// Where a segment's file lies.
    pub fn segment_path(&self, number: SegmentNo, epoch: Epoch) -> PathBuf {
        self.dir.join(ObjectName::Segment(number, epoch).path())
    }

    /// Folder in which a checkpoint is built and kept.
    pub fn checkpoints(&self) -> PathBuf {
        self.dir.join("checkpoints")
    }

    /// Writes a segment's file durably, and keeps it in memory for a while. It is not sent before [`Staging::publish`].
    pub fn write(&self, number: SegmentNo, epoch: Epoch, bytes: Bytes) -> Result<(), StagingError> {
        let path = self.segment_path(number, epoch);
        let write = || {
            let folder = path.parent().unwrap_or(&self.dir);
            if !folder.exists() {
                fs::create_dir_all(folder)?;
                File::open(self.dir.join("segments"))?.sync_all()?;
            }
            direct::write(&path, &bytes)?;
            File::open(folder)?.sync_all()
        };
        // The cache gives way: sealing is what makes dirty content clean, it must not wait for a person.
        let mut written = write();
        while let Err(e) = &written
            && is_full(e)
            && self.blocks.make_space(bytes.len() as u64)
        {
            written = write();
        }
        if written.is_err() {
            // Half a file would only take space.
            let _ = fs::remove_file(&path);
        } else {
            self.shelf.put(number, epoch, bytes);
            self.state.lock().written.insert(number, epoch);
        }
        at(&path, written)
    }

    /// Waits a little while replicas are busy with what was published just now and keep taking more: what is sealed meanwhile would not
    /// find room in memory and have to be read again. Never for long, and not when writers wait for space.
    pub fn pace(&self) {
        let until = Instant::now() + MOST_PACE;
        while self.shelf.is_crowded(Instant::now())
            && self.blocks.space.admit() == Admission::Now
            && Instant::now() < until
        {
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Removes files of segments that will not be registered.
    pub fn discard(&self, segments: &[(SegmentNo, Epoch)]) {
        {
            let mut state = self.state.lock();
            state.written.retain(|number, epoch| !segments.contains(&(*number, *epoch)));
        }
        self.shelf.forget(segments);
        for (number, epoch) in segments {
            let _ = fs::remove_file(self.segment_path(*number, *epoch));
        }
    }

    /// Hands registered segments to the shippers.
    pub fn publish(&self, segments: &[(SegmentNo, SegmentValue)]) {
        let mut state = self.state.lock();
        for (number, v) in segments {
            state.bytes += v.len;
            let known = Known::new(v, true);
            state.known.insert(*number, known);
            state.written.remove(number);
        }
        self.blocks.space.set_staged(state.total());
        if let Some((last, _)) = segments.last() {
            self.newest.send_replace(*last);
        }
    }

    /// Hands a finished checkpoint, which segment `named` names in the log, to the shippers; older ones go.
    pub fn publish_checkpoint(&self, staged: Staged, named: SegmentNo) {
        let mut state = self.state.lock();
        let newest = staged.number;
        state.checkpoints.insert(newest, (staged, named));
        let kept = state.checkpoints.split_off(&newest);
        for (old, _) in std::mem::replace(&mut state.checkpoints, kept).into_values() {
            let _ = fs::remove_dir_all(&old.path);
        }
        self.blocks.space.set_staged(state.total());
        drop(state);
        self.newest.send_modify(|_| {});
    }

    /// Whether a checkpoint is staged.
    pub fn has_checkpoints(&self) -> bool {
        !self.state.lock().checkpoints.is_empty()
    }

    /// Removes checkpoints up to `upto`, which no replica waits for any more; all of them when writers are refused for want of
    /// space: a checkpoint only makes restores shorter, and another one will be made.
    pub fn trim_checkpoints(&self, upto: SegmentNo) {
        let full = || self.blocks.space.admit() == Admission::Full;
        let gone = {
            let mut state = self.state.lock();
            let first = state.checkpoints.keys().next().copied();
            let Some(first) = first else { return };
            let kept = match (first > upto, full()) {
                (true, false) => return,
                (_, true) => BTreeMap::new(),
                (false, false) => state.checkpoints.split_off(&upto.next()),
            };
            let gone = std::mem::replace(&mut state.checkpoints, kept);
            self.blocks.space.set_staged(state.total());
            gone
        };
        for (number, (checkpoint, _)) in gone {
            if number > upto {
                log::info!("the checkpoint of segment {number} is given up: there is no space for it");
            }
            let _ = fs::remove_dir_all(&checkpoint.path);
        }
    }

    /// Whether the local disk and the allowance have room for another `bytes` that can be done without.
    pub fn has_room(&self, bytes: u64) -> bool {
        self.blocks.admit() == Admission::Now
            && self.blocks.space.dirty() + self.blocks.space.staged() + bytes <= self.blocks.space.limit()
    }

    /// Removes the files of all segments up to `upto`.
    pub fn trim(&self, upto: SegmentNo) {
        let mut gone = Vec::new();
        {
            let mut state = self.state.lock();
            let mut freed = 0;
            for (number, known) in state.known.range_mut(..=upto) {
                if known.on_disk {
                    known.on_disk = false;
                    freed += known.len;
                    gone.push((*number, known.epoch));
                }
            }
            state.bytes -= freed.min(state.bytes);
            self.blocks.space.set_staged(state.total());
        }
        self.discard(&gone);
    }

    /// Up to `limit` segments with numbers above `after`, in order, also beyond a gap (a segment that was lost everywhere).
    pub fn known_after(&self, after: SegmentNo, limit: usize) -> Vec<Staged> {
        let state = self.state.lock();
        let staged = |(number, known): (&SegmentNo, &Known)| Staged {
            kind: StagedKind::Segment,
            number: *number,
            epoch: known.epoch,
            path: self.segment_path(*number, known.epoch),
            len: known.len,
            cut_at: known.cut_at,
        };
        state.known.range(after.next()..).take(limit).map(staged).collect()
    }

    /// Oldest segment that still has a file, and the bytes of all files.
    pub fn oldest(&self) -> (Option<SegmentNo>, u64) {
        let state = self.state.lock();
        (state.known.iter().find(|(_, k)| k.on_disk).map(|(n, _)| *n), state.total())
    }

    /// Whether every segment after `after` lies here.
    pub fn holds_all_after(&self, after: SegmentNo) -> bool {
        self.state.lock().known.range(after.next()..).all(|(_, k)| k.on_disk)
    }

    /// The newest published segment.
    pub fn newest(&self) -> SegmentNo {
        *self.newest.borrow()
    }

    /// The local file that holds a frame, if there is one, published or not.
    pub fn file_of(&self, loc: &FrameLoc) -> Option<PathBuf> {
        let state = self.state.lock();
        let on_disk = state.known.get(&loc.segment).is_some_and(|k| k.on_disk && k.epoch == loc.epoch)
            || state.written.get(&loc.segment) == Some(&loc.epoch);
        on_disk.then(|| self.segment_path(loc.segment, loc.epoch))
    }
}

/// All files below `segments/`, two levels deep.
fn segment_files(dir: &Path) -> Result<Vec<PathBuf>, StagingError> {
    let top = dir.join("segments");
    let mut files = Vec::new();
    for folder in at(&top, fs::read_dir(&top))? {
        let folder = at(&top, folder)?.path();
        if !folder.is_dir() {
            files.push(folder);
            continue;
        }
        for entry in at(&folder, fs::read_dir(&folder))? {
            files.push(at(&folder, entry)?.path());
        }
    }
    Ok(files)
}

impl Outbox for Staging {
    fn segments_after(&self, after: SegmentNo, limit: usize) -> Vec<Staged> {
        let mut next = after.next();
        let mut found = self.known_after(after, limit);
        let run =
            found.iter().take_while(|s| s.number == std::mem::replace(&mut next, s.number.next())).count();
        found.truncate(run);
        found
    }

    fn backlog(&self, after: SegmentNo) -> Backlog {
        let state = self.state.lock();
        let mut backlog = Backlog::default();
        for (_, known) in state.known.range(after.next()..) {
            if backlog.segments == 0 {
                backlog.oldest_cut_at = known.cut_at;
            }
            backlog.segments += 1;
            backlog.bytes += known.len;
        }
        backlog
    }

    fn checkpoint(&self, after: SegmentNo, cursor: SegmentNo) -> Option<Staged> {
        self.state
            .lock()
            .checkpoints
            .range(after.next()..=cursor.max(after.next()))
            .rev()
            // What the replica's own log does not name yet could not be told from a forgery there.
            .find(|(number, (_, named))| **number <= cursor && *named <= cursor)
            .map(|(_, (staged, _))| staged.clone())
    }

    fn hash(&self, number: SegmentNo) -> Option<SegmentHash> {
        self.state.lock().known.get(&number).and_then(|k| k.hash)
    }

    fn learned(&self, number: SegmentNo, epoch: Epoch, hash: SegmentHash, len: Option<u64>) {
        let mut state = self.state.lock();
        let Some(known) = state.known.get_mut(&number).filter(|k| k.epoch == epoch) else { return };
        known.hash = Some(hash);
        if let Some(len) = len.filter(|_| !known.on_disk) {
            known.len = len;
        }
    }

    fn shelf(&self) -> Option<Arc<Shelf>> {
        Some(Arc::clone(&self.shelf))
    }

    fn watch(&self) -> watch::Receiver<SegmentNo> {
        self.newest.subscribe()
    }
}
