//! The kernel's list of mounts, as far as we read it. Pure but for one file read.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

/// One mount.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MountEntry {
    /// The kernel's number of it, used again when it is gone.
    pub id: u64,
    /// Where it is mounted.
    pub mountpoint: PathBuf,
    /// Its type, such as `fuse.mirrorfs`.
    pub fstype: String,
    /// What is mounted, as the mounter named it.
    pub source: String,
    /// Device number, as `major:minor`.
    pub device: String,
}

/// All mounts that this process sees, in the order of mounting.
///
/// # Errors
/// When the kernel's list cannot be read.
pub fn mounts() -> io::Result<Vec<MountEntry>> {
    Ok(parse(&fs::read("/proc/self/mountinfo")?))
}

/// All mounts that the process `pid` sees, which may live in a world of its own.
///
/// # Errors
/// When they cannot be read: the process has ended, or is another user's.
pub fn mounts_of(pid: u32) -> io::Result<Vec<MountEntry>> {
    Ok(parse(&fs::read(format!("/proc/{pid}/mountinfo"))?))
}

/// The topmost mount at exactly this (canonical) path.
///
/// # Errors
/// When the kernel's list cannot be read.
pub fn mount_at(path: &Path) -> io::Result<Option<MountEntry>> {
    Ok(mounts()?.into_iter().rev().find(|m| m.mountpoint == path))
}

fn parse(text: &[u8]) -> Vec<MountEntry> {
    text.split(|b| *b == b'\n').filter_map(parse_line).collect()
}

/// `36 35 98:0 /root /mnt/point rw,noatime master:1 - ext3 /dev/root rw`
fn parse_line(line: &[u8]) -> Option<MountEntry> {
    let mut fields = line.split(|b| *b == b' ');
    let id = std::str::from_utf8(fields.next()?).ok()?.parse().ok()?;
    let device = fields.nth(1)?;
    let mountpoint = fields.nth(1)?;
    let mut behind = fields.skip_while(|f| *f != b"-").skip(1);
    let text = |f: &[u8]| String::from_utf8_lossy(&unescape(f)).into_owned();
    Some(MountEntry {
        id,
        mountpoint: PathBuf::from(OsString::from_vec(unescape(mountpoint))),
        fstype: text(behind.next()?),
        source: text(behind.next()?),
        device: text(device),
    })
}

/// Undoes the kernel's `\040` for a space and the like.
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((first, behind)) = rest.split_first() {
        let octal = (*first == b'\\').then(|| behind.get(..3)).flatten().and_then(|digits| {
            digits.iter().try_fold(0_u8, |n, d| match d {
                b'0'..=b'7' => n.checked_mul(8)?.checked_add(d - b'0'),
                _ => None,
            })
        });
        match octal {
            Some(byte) => {
                out.push(byte);
                rest = &behind[3..];
            }
            None => {
                out.push(*first);
                rest = behind;
            }
        }
    }
    out
}

/// Whether `path`'s filesystem type is a FUSE one.
pub(super) fn is_fuse(entry: &MountEntry) -> bool {
    entry.fstype == "fuse" || entry.fstype.starts_with("fuse.")
}

/// Our own type.
pub(super) const FSTYPE: &str = "fuse.mirrorfs";

/// What [`FSTYPE`] has after `fuse.`.
pub(super) const SUBTYPE: &str = "mirrorfs";

/// The same for what a guardian holds a mountpoint with; see [`super::placeholder`].
pub(super) const PLACEHOLDER_SUBTYPE: &str = "mirrorfs-guard";

/// Whether it is a mount of ours.
#[must_use]
pub fn is_mirrorfs(entry: &MountEntry) -> bool {
    entry.fstype == FSTYPE
}

/// Whether a guardian of ours holds the place with it.
#[must_use]
pub fn is_placeholder(entry: &MountEntry) -> bool {
    entry.fstype.strip_prefix("fuse.") == Some(PLACEHOLDER_SUBTYPE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_odd_names_and_optional_fields() {
        let text = b"22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/root rw\n\
            40 22 0:45 / /mnt/a\\040b\\134c rw,nosuid - fuse.mirrorfs vol\\054x rw,user_id=0\n\
            broken line\n";
        let all = parse(text);
        assert_eq!(all.len(), 2);
        assert_eq!(all[0].fstype, "ext4");
        assert_eq!(all[1].mountpoint, Path::new("/mnt/a b\\c"));
        assert_eq!(all[1].source, "vol,x");
        assert_eq!((all[1].device.as_str(), all[1].id), ("0:45", 40));
        assert!(is_mirrorfs(&all[1]) && is_fuse(&all[1]));
    }

    #[test]
    fn a_backslash_that_escapes_nothing_stays() {
        assert_eq!(unescape(b"a\\9x\\"), b"a\\9x\\");
        assert_eq!(unescape(b"\\777"), b"\\777");
    }

    #[test]
    fn this_machine_has_a_root() {
        assert!(mount_at(Path::new("/")).unwrap().is_some());
    }
}
