//! Finding the path of an inode, for messages about files that cannot be read or could not be stored.
//!
//! Files do not know their names, so all names are looked through, in the background, one search at a time and for a bounded time.
//! Reads only the journal.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::cache::store::scan_table;
use crate::format::codec::FormatError;
use crate::format::tables::{Dirent, Inode, dirent_range, inode_key, number_of_key, split_dirent_key, table};
use crate::ids::Ino;
use crate::journal::{Journal, JournalError};

/// Longest search.
const LONGEST: Duration = Duration::from_secs(10);
/// Directories on the way to the root that are followed.
const DEEPEST: usize = 512;
/// Names of one directory read at a time.
const PAGE: usize = 4096;

/// Says where files are. One per filesystem.
#[derive(Default)]
pub(super) struct Pathfinder {
    searching: Arc<AtomicBool>,
}

impl Pathfinder {
    /// Logs `what` is the matter with `ino` and `why`, with a path of the file or the reason why there is none. Returns at once.
    pub fn report(&self, journal: &Arc<Journal>, ino: Ino, what: &'static str, why: String) {
        if self.searching.swap(true, Ordering::AcqRel) {
            log::error!(
                "inode {ino} {what} (its path is not looked for: another search is in progress): {why}"
            );
            return;
        }
        let (journal, busy, text) = (Arc::clone(journal), Busy(Arc::clone(&self.searching)), why.clone());
        let search = move || {
            let started = Instant::now();
            match path_of(&journal, ino, started + LONGEST) {
                Ok(path) => log::error!("{path} (inode {ino}) {what}: {text}"),
                Err(e) => log::error!("inode {ino} {what} ({e}): {text}"),
            }
            // Many files may be concerned: most of the time is for other things.
            drop(journal);
            std::thread::sleep(started.elapsed());
            drop(busy);
        };
        if let Err(e) = std::thread::Builder::new().name("mirrorfs-path".into()).spawn(search) {
            log::error!("inode {ino} {what} (its path is not looked for: {e}): {why}");
        }
    }
}

/// Ends the search also when it panics.
struct Busy(Arc<AtomicBool>);

impl Drop for Busy {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Release);
    }
}

/// Why a search through the names ended before the last one.
enum Stop {
    AllFound,
    Why(String),
}

impl From<JournalError> for Stop {
    fn from(e: JournalError) -> Self {
        Stop::Why(format!("its path cannot be told: {e}"))
    }
}

impl From<FormatError> for Stop {
    fn from(e: FormatError) -> Self {
        Stop::Why(format!("its path cannot be told: {e}"))
    }
}

/// One path of an inode from the root of the volume.
pub(super) struct InodePath {
    /// From the inode upwards.
    names: Vec<Vec<u8>>,
    /// It reaches the root.
    whole: bool,
}

impl std::fmt::Display for InodePath {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let text = |name: &[u8]| String::from_utf8_lossy(name).replace(|c: char| c.is_control(), "?");
        if self.names.is_empty() {
            f.write_str("/")?;
        }
        if !self.whole {
            // A part of the path is better than none.
            f.write_str("/...")?;
        }
        self.names.iter().rev().try_for_each(|name| write!(f, "/{}", text(name)))
    }
}

/// One path of an inode from the root of the volume, or why there is none to be told.
fn path_of(journal: &Journal, ino: Ino, until: Instant) -> Result<String, String> {
    let (mut found, ended) = search(journal, &HashSet::from([ino]), until);
    found.remove(&ino).map(|path| path.to_string()).ok_or_else(|| match ended {
        Err(Stop::Why(why)) => why,
        _ => "it has no name any more".to_owned(),
    })
}

/// One path of each inode, as far as they are found within [`LONGEST`] or `longest`.
pub(super) fn paths_of(
    journal: &Journal,
    wanted: &HashSet<Ino>,
    longest: Duration,
) -> HashMap<Ino, InodePath> {
    search(journal, wanted, Instant::now() + longest.min(LONGEST)).0
}

/// Looks through all names once. Returns what was found, and why the search ended.
fn search(
    journal: &Journal,
    wanted: &HashSet<Ino>,
    until: Instant,
) -> (HashMap<Ino, InodePath>, Result<(), Stop>) {
    let mut found = HashMap::new();
    if wanted.contains(&Ino::ROOT) {
        found.insert(Ino::ROOT, InodePath { names: Vec::new(), whole: true });
    }
    if found.len() == wanted.len() {
        return (found, Ok(()));
    }
    let late = || Stop::Why(format!("its path was not found within {} s", LONGEST.as_secs()));
    let mut seen = 0u64;
    let ended = scan_table::<Stop>(journal, table::DIRENT, |key, value| {
        seen += 1;
        if seen.is_multiple_of(1024) && Instant::now() >= until {
            return Err(late());
        }
        let entry = Dirent::decode(value)?;
        if wanted.contains(&entry.ino)
            && !found.contains_key(&entry.ino)
            && let (Some(parent), Some((_, name))) = (number_of_key(key), split_dirent_key(key))
        {
            found.insert(entry.ino, climb(journal, Ino(parent), name.to_vec(), until));
        }
        if found.len() == wanted.len() { Err(Stop::AllFound) } else { Ok(()) }
    });
    (found, ended)
}

/// The path of `name` in `dir`, found by going up to the root.
fn climb(journal: &Journal, mut dir: Ino, name: Vec<u8>, until: Instant) -> InodePath {
    let mut names = vec![name];
    while dir != Ino::ROOT {
        let in_time = names.len() <= DEEPEST && Instant::now() < until;
        match in_time.then(|| name_of_directory(journal, dir, until)) {
            Some(Ok((parent, name))) => {
                names.push(name);
                dir = parent;
            }
            _ => return InodePath { names, whole: false },
        }
    }
    InodePath { names, whole: true }
}

/// A directory's parent and its name there.
fn name_of_directory(journal: &Journal, dir: Ino, until: Instant) -> Result<(Ino, Vec<u8>), Stop> {
    let gone = || Stop::Why("its directory is gone".to_owned());
    let value = journal.get(&inode_key(dir))?.ok_or_else(gone)?;
    let parent = Inode::decode(&value)?.parent;
    let (mut start, end) = dirent_range(parent, 0);
    while Instant::now() < until {
        let page = journal.scan(&start, &end, PAGE)?;
        let Some((last, _)) = page.last() else { return Err(gone()) };
        let mut next = last.to_vec();
        next.push(0);
        for (key, value) in &page {
            if Dirent::decode(value)?.ino == dir
                && let Some((_, name)) = split_dirent_key(key)
            {
                return Ok((parent, name.to_vec()));
            }
        }
        start = next.into();
    }
    Err(gone())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::tables::{FileKind, dirent_key};
    use crate::journal::Options;

    #[test]
    fn paths_are_found_through_directories_or_it_is_said_why_not() {
        let dir = tempfile::tempdir().unwrap();
        let (journal, _) = Journal::open(Options::new(dir.path(), Arc::new(|_| Ok(())))).unwrap();
        let vfs = {
            let blocks = crate::cache::BlockStore::open(
                &dir.path().join("slots"),
                65536,
                1 << 30,
                Arc::clone(&journal),
            );
            let options = crate::vfs::Options {
                clock: Arc::new(crate::format::tables::Time::default),
                remote_fsync: false,
                space_wait: Duration::ZERO,
            };
            crate::vfs::Vfs::open(Arc::clone(&journal), blocks.unwrap(), options).unwrap()
        };
        use crate::vfs::api::FileSystem;
        let me = crate::vfs::types::Caller::default();
        let a = vfs.mkdir(Ino::ROOT, b"a", 0o755, &me).unwrap().ino;
        let b = vfs.mkdir(a, b"b c", 0o755, &me).unwrap().ino;
        for i in 0..50 {
            vfs.create(a, format!("other{i}").as_bytes(), 0o644, &me).unwrap();
        }
        let file = vfs.create(b, b"file\n", 0o644, &me).unwrap().ino;
        let until = Instant::now() + LONGEST;
        assert_eq!(path_of(&journal, file, until).unwrap(), "/a/b c/file?");
        assert_eq!(path_of(&journal, Ino::ROOT, until).unwrap(), "/");
        let all = paths_of(&journal, &HashSet::from([file, b, Ino(999)]), LONGEST);
        assert_eq!(all.len(), 2);
        assert_eq!((all[&file].to_string(), all[&b].to_string()), ("/a/b c/file?".into(), "/a/b c".into()));
        assert_eq!(path_of(&journal, Ino(999), until).unwrap_err(), "it has no name any more");
        journal
            .transact::<_, JournalError>(|tx| {
                tx.put(
                    dirent_key(Ino(500), b"x"),
                    Dirent { ino: Ino(501), kind: FileKind::Regular }.encode(),
                );
                Ok(())
            })
            .unwrap();
        assert_eq!(path_of(&journal, Ino(501), until).unwrap(), "/.../x", "a part is better than nothing");
        // Two directories that lie in each other.
        let inode =
            |parent| Inode { parent, ..Inode::new(FileKind::Directory, 0o755, (0, 0), Default::default()) };
        journal
            .transact::<_, JournalError>(|tx| {
                for (dir, other, kind) in [
                    (600, 601, FileKind::Directory),
                    (601, 600, FileKind::Directory),
                    (600, 602, FileKind::Regular),
                ] {
                    let entry = Dirent { ino: Ino(other), kind };
                    tx.put(dirent_key(Ino(dir), other.to_string().as_bytes()), entry.encode());
                }
                tx.put(inode_key(Ino(600)), inode(Ino(601)).encode());
                tx.put(inode_key(Ino(601)), inode(Ino(600)).encode());
                Ok(())
            })
            .unwrap();
        let path = path_of(&journal, Ino(602), until).unwrap();
        assert!(path.starts_with("/.../") && path.ends_with("/601/600/602"), "{path}");
        vfs.stop_reaper();
        journal.close().unwrap();
    }
}
