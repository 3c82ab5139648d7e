//! Writing a checkpoint into a local folder, and reading it back.
//!
//! Owns the files of a staged checkpoint: parts and manifest as they will lie on a replica. Knows neither the journal
//! (a function scans it) nor replicas. What a dump means is said in `format::checkpoint`.
//!
//! Two steps, because the segment that makes a checkpoint usable is cut only after the scan has ended: [`dump`] writes
//! the parts, [`Dump::finish`] the manifest, and moves the folder to its final name. All of it blocks.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use bytes::Bytes;

use crate::format::checkpoint::{
    MAX_PART_LEN, Manifest, ManifestHash, Part, PartBuilder, PartInfo, parse_part,
};
use crate::format::codec::FormatError;
use crate::format::names::{MANIFEST, ObjectName, checkpoint_folder, checkpoint_stem, part_file};
use crate::format::segment::SegmentHash;
use crate::format::tables::table;
use crate::ids::{Epoch, Lsn, SegmentNo, VolumeId};
use crate::private;

#[cfg(test)]
mod tests;

/// Entries asked of the scan at a time.
const BATCH: usize = 4096;

/// Why a checkpoint cannot be written or read.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// A file or folder.
    #[error("{path}: {source}")]
    Io {
        /// Which one.
        path: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
    /// Its content.
    #[error(transparent)]
    Format(#[from] FormatError),
    /// The scan failed or was told to end.
    #[error("the scan of the tables ended: {0}")]
    Scan(String),
}

fn at(path: &Path) -> impl FnOnce(io::Error) -> CheckpointError + '_ {
    move |source| CheckpointError::Io { path: path.to_owned(), source }
}

/// What is known when the scan begins; taken under the lock that orders commits and sealing.
#[derive(Clone, Copy, Debug)]
pub struct Begin {
    /// The volume.
    pub volume: VolumeId,
    /// The last LSN in the tables.
    pub lsn: Lsn,
    /// One after the last segment of the last group whose block entries and records are all in the tables.
    pub replay_from: SegmentNo,
    /// Hash of the segment before that one; zeros when `replay_from` is 1.
    pub previous: SegmentHash,
}

/// What is known once a segment commits everything that the scan saw.
#[derive(Clone, Copy, Debug)]
pub struct End {
    /// The last LSN that was in the tables when [`dump`] returned.
    pub lsn: Lsn,
    /// The first segment whose commit is at or after that LSN.
    pub number: SegmentNo,
    /// Its epoch.
    pub epoch: Epoch,
    /// Its commit.
    pub commit_lsn: Lsn,
    /// Seconds since 1970.
    pub created_at: u64,
}

/// The parts of a checkpoint, durable in a temporary folder.
#[derive(Debug)]
pub struct Dump {
    begin: Begin,
    folder: PathBuf,
    parts: Vec<PartInfo>,
    entries: u64,
    raw_bytes: u64,
}

/// A checkpoint that is complete on local disk.
#[derive(Debug)]
pub struct Finished {
    /// Its folder.
    pub path: PathBuf,
    /// Its manifest.
    pub manifest: Manifest,
    /// The hash of the manifest's bytes, which the log is to name.
    pub hash: ManifestHash,
}

/// What a scan of the tables gives: keys and values, in order.
pub type Batch<E> = Result<Vec<(Bytes, Bytes)>, E>;

/// Gives up to the third argument's number of entries from the first argument's key up to, not including, the second's.
pub type Scan<'a, E> = dyn Fn(&[u8], &[u8], usize) -> Batch<E> + 'a;

/// Writes the replicated tables into part files in `folder`, which is emptied first. `scan(start, end, limit)` gives up to
/// `limit` entries of `[start, end)` in order; each key may be read at another moment.
pub fn dump<E: std::fmt::Display>(
    scan: &Scan<'_, E>,
    begin: Begin,
    folder: &Path,
) -> Result<Dump, CheckpointError> {
    match fs::remove_dir_all(folder) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(at(folder)(e)),
        _ => private::create_dir_all(folder).map_err(at(folder))?,
    }
    let mut dump = Dump { begin, folder: folder.to_owned(), parts: Vec::new(), entries: 0, raw_bytes: 0 };
    let mut part = PartBuilder::new(begin.volume, begin.lsn);
    let mut start = vec![0];
    loop {
        let batch =
            scan(&start, &[table::FIRST_LOCAL], BATCH).map_err(|e| CheckpointError::Scan(e.to_string()))?;
        let Some((last, _)) = batch.last() else { break };
        start.clear();
        start.extend_from_slice(last);
        start.push(0);
        for (key, value) in &batch {
            part.push(key, value)?;
            dump.entries += 1;
            dump.raw_bytes += (key.len() + value.len()) as u64;
            if part.is_full() {
                dump.store(&mut part)?;
            }
        }
    }
    if !part.is_empty() {
        dump.store(&mut part)?;
    }
    Ok(dump)
}

impl Dump {
    fn store(&mut self, part: &mut PartBuilder) -> Result<(), CheckpointError> {
        let index = u32::try_from(self.parts.len())
            .map_err(|_| FormatError::new("checkpoint", "it has too many parts"))?;
        let (bytes, info) = part.finish(index)?;
        write_synced(&self.folder.join(part_file(index)), &bytes)?;
        self.parts.push(info);
        Ok(())
    }

    /// Bytes of all parts.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.parts.iter().map(|p| p.len).sum()
    }

    /// Whether the tables were empty.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.parts.is_empty()
    }

    /// Where the parts lie until [`Dump::finish`].
    #[must_use]
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Writes the manifest and moves the folder into `staging` under its final name. After a crash there is either
    /// the whole checkpoint or nothing of that name.
    pub fn finish(self, end: End, staging: &Path) -> Result<Finished, CheckpointError> {
        let manifest = Manifest {
            volume: self.begin.volume,
            number: end.number,
            epoch: end.epoch,
            commit_lsn: end.commit_lsn,
            lsn_begin: self.begin.lsn,
            lsn_end: end.lsn,
            replay_from: self.begin.replay_from,
            previous: self.begin.previous,
            created_at: end.created_at,
            entries: self.entries,
            raw_bytes: self.raw_bytes,
            parts: self.parts,
        };
        let bytes = manifest.encode()?;
        let path = staging.join(checkpoint_stem(end.number, end.epoch));
        if path.exists() {
            // Of the same segment, so it says the same; the older one may be in use by a shipper.
            fs::remove_dir_all(&self.folder).map_err(at(&self.folder))?;
            let bytes = read_bounded(&path.join(MANIFEST), crate::format::MAX_JSON as u64)?;
            let manifest = Manifest::decode(&bytes, end.number, end.epoch)?;
            return Ok(Finished { path, manifest, hash: ManifestHash::of(&bytes) });
        }
        write_synced(&self.folder.join(MANIFEST), &bytes)?;
        sync_folder(&self.folder)?;
        fs::rename(&self.folder, &path).map_err(at(&path))?;
        sync_folder(staging)?;
        Ok(Finished { path, manifest, hash: ManifestHash::of(&bytes) })
    }
}

fn write_synced(path: &Path, bytes: &[u8]) -> Result<(), CheckpointError> {
    let mut file = private::create_file(path).map_err(at(path))?;
    file.write_all(bytes).and_then(|()| file.sync_all()).map_err(at(path))
}

fn sync_folder(path: &Path) -> Result<(), CheckpointError> {
    File::open(path).and_then(|f| f.sync_all()).map_err(at(path))
}

/// Reads a file of at most `most` bytes.
fn read_bounded(path: &Path, most: u64) -> Result<Vec<u8>, CheckpointError> {
    let mut bytes = Vec::new();
    let file = File::open(path).map_err(at(path))?;
    file.take(most + 1).read_to_end(&mut bytes).map_err(at(path))?;
    if bytes.len() as u64 > most {
        return Err(FormatError::new("checkpoint", format!("{} is too long", path.display())).into());
    }
    Ok(bytes)
}

/// Reads a staged checkpoint's manifest.
pub fn read_manifest(folder: &Path, number: SegmentNo, epoch: Epoch) -> Result<Manifest, CheckpointError> {
    let bytes = read_bounded(&folder.join(MANIFEST), crate::format::MAX_JSON as u64)?;
    Ok(Manifest::decode(&bytes, number, epoch)?)
}

/// Reads a staged checkpoint's parts in order, each verified.
pub fn read(
    folder: &Path,
    manifest: &Manifest,
    each: &mut dyn FnMut(Part) -> Result<(), CheckpointError>,
) -> Result<(), CheckpointError> {
    for index in 0..manifest.parts.len() as u32 {
        let bytes = read_bounded(&folder.join(part_file(index)), MAX_PART_LEN)?;
        each(parse_part(&bytes, manifest, index)?)?;
    }
    Ok(())
}

/// The complete checkpoints in `staging`, ascending, with their folders and total bytes; every other folder there is
/// left over from a crash and is removed.
pub fn staged(staging: &Path) -> Result<Vec<(Manifest, PathBuf, u64)>, CheckpointError> {
    let mut found = Vec::new();
    for entry in fs::read_dir(staging).map_err(at(staging))? {
        let path = entry.map_err(at(staging))?.path();
        let id = path.file_name().and_then(|n| n.to_str()).and_then(|stem| {
            match ObjectName::parse(&format!("checkpoints/{stem}/{MANIFEST}")) {
                Some(ObjectName::CheckpointManifest(number, epoch)) => Some((number, epoch)),
                _ => None,
            }
        });
        let manifest = match id {
            Some((number, epoch)) => match read_manifest(&path, number, epoch) {
                Ok(manifest) => Some(manifest),
                // Only what is certainly no checkpoint of ours goes; an error of reading says nothing of that.
                Err(CheckpointError::Format(e)) if !e.newer => None,
                Err(CheckpointError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => None,
                Err(e) => return Err(e),
            },
            None => None,
        };
        match manifest {
            Some(manifest) => {
                let len = fs::metadata(path.join(MANIFEST)).map_err(at(&path))?.len();
                let len = len + manifest.parts_len();
                found.push((manifest, path, len));
            }
            None if path.is_dir() => fs::remove_dir_all(&path).map_err(at(&path))?,
            None => fs::remove_file(&path).map_err(at(&path))?,
        }
    }
    found.sort_by_key(|(m, ..)| (m.number, m.epoch));
    Ok(found)
}

/// The object names and local files of a staged checkpoint in the order in which they are to be stored: the manifest
/// last.
#[must_use]
pub fn objects(manifest: &Manifest, folder: &Path) -> Vec<(String, PathBuf)> {
    let remote = checkpoint_folder(manifest.number, manifest.epoch);
    (0..manifest.parts.len() as u32)
        .map(part_file)
        .chain([MANIFEST.to_owned()])
        .map(|file| (format!("{remote}/{file}"), folder.join(file)))
        .collect()
}
