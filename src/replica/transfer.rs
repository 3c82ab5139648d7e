//! Carrying one staged object to a replica.
//!
//! Owns where its bytes come from (local disk, else another replica that has it) and that they are
//! compared with the hash that the tables know before they are sent, so that neither damage nor a
//! forgery spreads. Knows no cursor, no order and no backoff.

use std::path::Path as FsPath;
use std::sync::Arc;

use bytes::Bytes;

use super::chain;
use super::contract::Staged;
use super::error::{ErrorKind, StoreError};
use super::health;
use super::shared::{Damage, DamageKind, Replica};
use super::shelf::Shelf;
use crate::direct;
use crate::format::codec::FormatError;
use crate::format::names::{MANIFEST, ObjectName, checkpoint_folder};
use crate::format::segment::{self, FOOTER_LEN, SegmentHash};
use crate::ids::{Epoch, SegmentNo, VolumeId};

/// Segments above this length are sent from their file without being held, and checked, in memory.
const MOST_IN_MEMORY: u64 = 64 << 20;

/// Why an object did not arrive.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum SendError {
    /// The replica failed.
    Replica(StoreError),
    /// Nobody has intact bytes of the object; the replica is not to blame.
    Source(String),
    /// The replica holds an intact object of that name with other bytes.
    Contradicts(SegmentNo, Epoch),
}

impl From<StoreError> for SendError {
    fn from(e: StoreError) -> Self {
        SendError::Replica(e)
    }
}

/// Where a segment's bytes come from, and what they must be.
pub(super) struct Source<'a> {
    /// The volume.
    pub volume: VolumeId,
    /// The replicas to ask; the one that lacks the segment among them does no harm.
    pub peers: &'a [Arc<Replica>],
    /// Segments in memory.
    pub shelf: Option<&'a Shelf>,
    /// The segment's hash, when it is known. Nothing else is sent under its name.
    pub hash: Option<SegmentHash>,
}

/// Sees that `to` holds a segment; its bytes come from memory, its file or a peer. Gives the bytes
/// sent: none when an equal one is there already. `listed` says that there is something of its
/// name. An intact segment is never replaced by another one.
pub(super) async fn send_segment(
    to: &Replica,
    source: &Source<'_>,
    staged: &Staged,
    listed: bool,
) -> Result<u64, SendError> {
    let volume = source.volume;
    let object = ObjectName::Segment(staged.number, staged.epoch).path();
    if staged.len > MOST_IN_MEMORY {
        match send_large(to, source, staged, &object).await {
            // Its file is gone or cut off: below, others are asked.
            Err(SendError::Replica(e)) if matches!(e.kind, ErrorKind::Absent | ErrorKind::Corrupt) => {}
            done => return done,
        }
    }
    let read = read_checked(&staged.path, volume, staged, source.hash);
    let local = match source.shelf {
        Some(shelf) => shelf.get(staged.number, staged.epoch, staged.len, read).await,
        None => read.await,
    };
    let local = match local {
        Ok(bytes) => Ok(bytes),
        Err(local) => from_peers(to, source, staged, &object).await.map_err(|peers| match peers {
            _ if peers.is_empty() => format!("local copy: {local}"),
            peers => format!("local copy: {local}; {peers}"),
        }),
    };
    let bytes = match local {
        Ok(bytes) => bytes,
        Err(why) => {
            // Then the replica's own copy, which does not look as expected, may be the only good
            // one.
            if listed
                && let There::Intact(hash) = there(to, volume, staged, &object).await?
                && source.hash.is_none_or(|known| known == hash)
            {
                return Ok(0);
            }
            return Err(SendError::Source(format!("no intact copy of {object} is to be had: {why}")));
        }
    };
    let len = bytes.len() as u64;
    if !listed {
        match to.store().put_new(&object, bytes.clone()).await {
            Ok(()) => return Ok(len),
            Err(e) if e.kind == ErrorKind::Exists => {}
            Err(e) => return Err(e.into()),
        }
    }
    if is_there(to, volume, staged, &object, &bytes).await? {
        return Ok(0);
    }
    to.store().put(&object, bytes).await?;
    Ok(len)
}

/// Sends a segment that is not to be held in memory from its file. Rare, so that one more request
/// to look first does no harm.
async fn send_large(
    to: &Replica,
    source: &Source<'_>,
    staged: &Staged,
    object: &str,
) -> Result<u64, SendError> {
    let at = staged.len.saturating_sub(FOOTER_LEN as u64);
    let footer = to.store().read_local(object, &staged.path, at, FOOTER_LEN as u64).await?;
    let found = segment::parse_footer(&footer, staged.len).map_err(|e| SendError::Source(e.to_string()))?;
    if source.hash.is_some_and(|known| known != found.hash) {
        let text = format!("{} is not the segment that was sealed here", staged.path.display());
        return Err(SendError::Source(text));
    }
    match to.store().head(object).await {
        Ok(_) => {
            if is_there(to, source.volume, staged, object, &footer).await? {
                return Ok(0);
            }
        }
        Err(e) if e.kind == ErrorKind::Absent => {}
        Err(e) => return Err(e.into()),
    }
    to.store().put_file(object, &staged.path, staged.len).await?;
    Ok(staged.len)
}

/// What a replica holds under a segment's name.
enum There {
    /// That segment, whole, with this hash.
    Intact(SegmentHash),
    /// Something damaged, or nothing any more: to be written.
    Damaged,
}

/// Whether the replica holds the segment that ends with the bytes of `ours`; an error when it holds
/// another intact one.
async fn is_there(
    to: &Replica,
    volume: VolumeId,
    staged: &Staged,
    object: &str,
    ours: &[u8],
) -> Result<bool, SendError> {
    let ours = segment::parse_footer(ours, staged.len).map_err(|e| SendError::Source(e.to_string()))?;
    // Size and footer say enough when they are equal: the footer's hash covers every byte.
    let size = match to.store().head(object).await {
        Ok(info) => info.size,
        Err(e) if e.kind == ErrorKind::Absent => return Ok(false),
        Err(e) => return Err(e.into()),
    };
    if size == staged.len {
        let at = size - FOOTER_LEN as u64;
        let footer = to.store().get_range(object, at, FOOTER_LEN as u64).await?;
        if segment::parse_footer(&footer, size).is_ok_and(|footer| footer.hash == ours.hash) {
            return Ok(true);
        }
    }
    match there(to, volume, staged, object).await? {
        There::Intact(hash) if hash == ours.hash => Ok(true),
        There::Intact(_) => Err(SendError::Contradicts(staged.number, staged.epoch)),
        There::Damaged => {
            log::warn!("replica {}: {object} is damaged there, and is written again", to.name());
            Ok(false)
        }
    }
}

/// Reads and checks what lies there, every byte.
async fn there(to: &Replica, volume: VolumeId, staged: &Staged, object: &str) -> Result<There, SendError> {
    let bytes = match to.store().get(object).await {
        Ok(bytes) => bytes,
        Err(e) if matches!(e.kind, ErrorKind::Absent | ErrorKind::Corrupt) => return Ok(There::Damaged),
        Err(e) => return Err(e.into()),
    };
    let (number, epoch) = (staged.number, staged.epoch);
    let check = move || check_segment(&bytes, volume, number, epoch);
    match tokio::task::spawn_blocking(check).await {
        Ok(Ok(hash)) => Ok(There::Intact(hash)),
        // Not damage: written by a newer mirrorfs.
        Ok(Err(e)) if e.newer => Err(SendError::Contradicts(number, epoch)),
        Ok(Err(_)) => Ok(There::Damaged),
        Err(e) => Err(SendError::Source(e.to_string())),
    }
}

/// Sends a checkpoint's parts, and after all of them its manifest. Gives objects and bytes sent.
pub(super) async fn send_checkpoint(to: &Replica, staged: &Staged) -> Result<(u64, u64), SendError> {
    let folder = checkpoint_folder(staged.number, staged.epoch);
    let dir = staged.path.clone();
    let listed = tokio::task::spawn_blocking(move || files_of(&dir)).await;
    let files = match listed {
        Ok(Ok(files)) => files,
        Ok(Err(e)) => return Err(SendError::Source(format!("staged {folder}: {e}"))),
        Err(e) => return Err(SendError::Source(format!("staged {folder}: {e}"))),
    };
    if files.last().is_none_or(|(name, _)| name != MANIFEST) {
        return Err(SendError::Source(format!("staged {folder} has no manifest")));
    }
    let mut bytes = 0;
    for (name, len) in &files {
        let file = staged.path.join(name);
        match to.store().put_file(&format!("{folder}/{name}"), &file, *len).await {
            Ok(()) => bytes += len,
            Err(e) if e.kind == ErrorKind::Absent => {
                return Err(SendError::Source(format!("staged {folder}/{name} is gone")));
            }
            Err(e) => return Err(e.into()),
        }
    }
    Ok((files.len() as u64, bytes))
}

/// The files of a staged checkpoint with their lengths, the manifest last.
fn files_of(dir: &FsPath) -> std::io::Result<Vec<(String, u64)>> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(dir)? {
        let entry = entry?;
        if let Ok(name) = entry.file_name().into_string() {
            files.push((name, entry.metadata()?.len()));
        }
    }
    files.sort_by_key(|(name, _)| (name == MANIFEST, name.clone()));
    Ok(files)
}

async fn read_checked(
    path: &FsPath,
    volume: VolumeId,
    staged: &Staged,
    known: Option<SegmentHash>,
) -> Result<Bytes, String> {
    let (path, number, epoch) = (path.to_owned(), staged.number, staged.epoch);
    let read = move || -> Result<Bytes, String> {
        let bytes = direct::read(&path).map_err(|e| format!("{}: {e}", path.display()))?;
        check_known(&bytes, volume, number, epoch, known).map_err(|e| format!("{}: {e}", path.display()))?;
        Ok(bytes.into())
    };
    tokio::task::spawn_blocking(read).await.map_err(|e| e.to_string())?
}

/// Asks the peers for a segment, those first that should have it and are near; the error says what
/// each answered.
async fn from_peers(
    to: &Replica,
    source: &Source<'_>,
    staged: &Staged,
    object: &str,
) -> Result<Bytes, String> {
    let volume = source.volume;
    let peers: Vec<_> = source.peers.iter().filter(|p| p.name() != to.name()).collect();
    let healths: Vec<_> = peers.iter().map(|p| p.health()).collect();
    let mut order = health::order(&healths, staged.len, std::time::Instant::now());
    order.sort_by_key(|i| peers.get(*i).is_none_or(|p| p.cursor() < staged.number));
    let mut said = Vec::new();
    for peer in order.into_iter().filter_map(|i| peers.get(i)) {
        let bytes = match peer.store().get(object).await {
            Ok(bytes) => bytes,
            Err(e) => {
                if e.kind != ErrorKind::Absent {
                    peer.note_error(&e);
                }
                said.push(e.to_string());
                continue;
            }
        };
        let (number, epoch, known, checked) = (staged.number, staged.epoch, source.hash, bytes.clone());
        let check = tokio::task::spawn_blocking(move || check_known(&checked, volume, number, epoch, known));
        match check.await {
            Ok(Ok(hash)) => {
                if known.is_none() {
                    chain::agree(source.peers, volume, staged, hash).await?;
                }
                log::info!("replica {}: taking {object} from replica {}", to.name(), peer.name());
                return Ok(bytes);
            }
            Ok(Err(e)) => {
                // First, so that the repair of the copy finds who waits for it.
                to.set_waits_for_source(true);
                peer.note_damage(Damage {
                    object: object.to_owned(),
                    segment: staged.number,
                    offset: 0,
                    len: bytes.len() as u64,
                    block: None,
                    kind: DamageKind::Wrong,
                });
                said.push(format!("replica {}: {e}", peer.name()));
            }
            Err(e) => said.push(e.to_string()),
        }
    }
    Err(said.join("; "))
}

/// As [`check_segment`], and that it has the known hash.
fn check_known(
    bytes: &[u8],
    volume: VolumeId,
    number: SegmentNo,
    epoch: Epoch,
    known: Option<SegmentHash>,
) -> Result<SegmentHash, FormatError> {
    let hash = check_segment(bytes, volume, number, epoch)?;
    match known {
        Some(known) if known != hash => {
            let why = format!("it is not the one that the log knows (hash {hash}, not {known})");
            Err(FormatError::new("segment", why))
        }
        _ => Ok(hash),
    }
}

/// Checks that `bytes` are that segment, every one of them; gives its hash.
fn check_segment(
    bytes: &[u8],
    volume: VolumeId,
    number: SegmentNo,
    epoch: Epoch,
) -> Result<SegmentHash, FormatError> {
    let footer = segment::parse_footer(bytes, bytes.len() as u64)?;
    footer.expect(volume, number, epoch)?;
    if !footer.covers(bytes) {
        return Err(FormatError::new("segment", "its content is damaged"));
    }
    Ok(footer.hash)
}
