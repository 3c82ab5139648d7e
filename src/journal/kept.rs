//! Whether the kernel has kept sled's files ever since they were last open, so that they are what was written to them.
//!
//! Owns a small file beside sled that names the boot of the machine, the mount of the filesystem and the very file. A process that is
//! killed takes nothing with it that it had given to the kernel; a loss of power, a disk that was pulled out, or files that were put back
//! or copied may leave anything, and all of these change what is named. Where the kernel cannot tell, nothing is taken for granted.
//! The file needs no sync: without it sled is proved before it is used, as ever.

use std::fs;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, StatxFlags};

/// Name of the file, in the journal's folder.
const NAME: &str = "kept";

/// What an open found, and what it will leave to the next one.
#[derive(Clone, Debug)]
pub(super) struct Kept {
    path: PathBuf,
    db: PathBuf,
    so: bool,
}

impl Kept {
    /// Looks at `db`, sled's file, before it is opened. `dir` is the journal's folder.
    pub(super) fn look(dir: &Path, db: &Path) -> Self {
        let path = dir.join(NAME);
        let so = identity(db).is_some_and(|now| fs::read_to_string(&path).is_ok_and(|then| then == now));
        Self { path, db: db.to_owned(), so }
    }

    /// Whether the files are what was last written to them.
    pub(super) fn is_so(&self) -> bool {
        self.so
    }

    /// From now on they are kept. Where that cannot be written down they count as not kept.
    pub(super) fn note(&self) {
        let noted = match identity(&self.db) {
            Some(_) if self.so => return,
            Some(now) => fs::write(&self.path, now).is_ok(),
            None => false,
        };
        if !noted {
            self.forget();
        }
    }

    /// A write or a sync may have failed: what the kernel shows need not be what is on the disk, nor stay.
    pub(super) fn forget(&self) {
        match fs::remove_file(&self.path) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                log::warn!("cannot remove {}: {e}", self.path.display());
            }
            _ => {}
        }
    }
}

/// This boot, this mount, this file; `None` when the kernel does not say.
fn identity(file: &Path) -> Option<String> {
    // A mount's number that is never given again; rustix has no name for it yet.
    const MNT_ID_UNIQUE: StatxFlags = StatxFlags::from_bits_retain(0x4000);
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
    let wanted = StatxFlags::INO | StatxFlags::BTIME | MNT_ID_UNIQUE;
    let found = rustix::fs::statx(CWD, file, AtFlags::empty(), wanted).ok()?;
    if found.stx_mask & wanted.bits() != wanted.bits() {
        return None;
    }
    let (device, born) = ((found.stx_dev_major, found.stx_dev_minor), found.stx_btime);
    Some(format!(
        "boot {} mount {} device {}:{} file {} born {}.{:09}\n",
        boot.trim(),
        found.stx_mnt_id,
        device.0,
        device.1,
        found.stx_ino,
        born.tv_sec,
        born.tv_nsec
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_same_file_is_kept_and_only_until_it_is_forgotten() {
        let dir = tempfile::tempdir().unwrap();
        let db = dir.path().join("db");
        fs::write(&db, "x").unwrap();
        let look = || Kept::look(dir.path(), &db);
        assert!(!look().is_so(), "nothing was noted");
        look().note();
        if identity(&db).is_none() {
            // An old kernel, or a filesystem that knows no time of birth.
            assert!(!look().is_so());
            return;
        }
        assert!(look().is_so());
        look().forget();
        assert!(!look().is_so());
        look().note();
        for boot in ["", "boot 0 mount 0 device 0:0 file 0 born 0.0\n"] {
            fs::write(dir.path().join(NAME), boot).unwrap();
            assert!(!look().is_so(), "another boot");
        }
        look().note();
        // Put back from a copy, under the same name.
        fs::copy(&db, dir.path().join("copy")).unwrap();
        fs::rename(dir.path().join("copy"), &db).unwrap();
        assert!(!look().is_so(), "another file");
    }
}
