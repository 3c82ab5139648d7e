//! Finding the path of an inode, for messages about files that cannot be read.
//!
//! Files do not know their names, so all names are looked through, in the background, one search at a time and for a bounded time.
//! Reads only the journal.

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
    /// Logs that `ino` cannot be read and `why`, with a path of the file or the reason why there is none to be told. Returns at once.
    pub fn report(&self, journal: &Arc<Journal>, ino: Ino, why: String) {
        if self.searching.swap(true, Ordering::AcqRel) {
            log::error!(
                "inode {ino} cannot be read (its path is not looked for: another search is under way): {why}"
            );
            return;
        }
        let (journal, busy, text) = (Arc::clone(journal), Busy(Arc::clone(&self.searching)), why.clone());
        let search = move || {
            let started = Instant::now();
            match path_of(&journal, ino, started + LONGEST) {
                Ok(path) => log::error!("{path} (inode {ino}) cannot be read: {text}"),
                Err(e) => log::error!("inode {ino} cannot be read ({e}): {text}"),
            }
            // Many files may be concerned: most of the time is for other things.
            drop(journal);
            std::thread::sleep(started.elapsed());
            drop(busy);
        };
        if let Err(e) = std::thread::Builder::new().name("mirrorfs-path".into()).spawn(search) {
            log::error!("inode {ino} cannot be read (its path is not looked for: {e}): {why}");
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
    Found(Ino, Vec<u8>),
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

/// One path of an inode from the root of the volume, or why there is none to be told.
fn path_of(journal: &Journal, ino: Ino, until: Instant) -> Result<String, String> {
    if ino == Ino::ROOT {
        return Ok("/".to_owned());
    }
    let late = || Stop::Why(format!("its path was not found within {} s", LONGEST.as_secs()));
    let mut seen = 0u64;
    let found = scan_table::<Stop>(journal, table::DIRENT, |key, value| {
        seen += 1;
        if seen.is_multiple_of(1024) && Instant::now() >= until {
            return Err(late());
        }
        match (Dirent::decode(value)?, number_of_key(key), split_dirent_key(key)) {
            (entry, Some(parent), Some((_, name))) if entry.ino == ino => {
                Err(Stop::Found(Ino(parent), name.to_vec()))
            }
            _ => Ok(()),
        }
    });
    let (mut dir, name) = match found {
        Err(Stop::Found(parent, name)) => (parent, name),
        Err(Stop::Why(why)) => return Err(why),
        Ok(()) => return Err("it has no name any more".to_owned()),
    };
    let mut names = vec![name];
    while dir != Ino::ROOT {
        if names.len() > DEEPEST || Instant::now() >= until {
            names.push(b"...".to_vec());
            break;
        }
        match name_of_directory(journal, dir, until) {
            Ok((parent, name)) => {
                names.push(name);
                dir = parent;
            }
            // A part of the path is better than none.
            Err(_) => {
                names.push(b"...".to_vec());
                break;
            }
        }
    }
    let text = |name: &Vec<u8>| String::from_utf8_lossy(name).replace(|c: char| c.is_control(), "?");
    Ok(names.iter().rev().map(|n| format!("/{}", text(n))).collect())
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
