//! Which mounts the kernel has, read from `/proc/self/mountinfo`, and the escaping that file uses.
//!
//! Asking the kernel rather than the mountpoint itself: a mount whose daemon is dead answers no system call.

use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

/// The type under which mirrorfs is mounted.
pub const FSTYPE: &str = "fuse.mirrorfs";

/// The type of what a user's guardian holds a mountpoint with.
const PLACEHOLDER: &str = "fuse.mirrorfs-guard";

/// One mount.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount {
    /// Where.
    pub mountpoint: PathBuf,
    /// Of which type.
    pub fstype: String,
    /// What it calls itself.
    pub source: String,
    /// The user who mounted it, as the kernel noted; none for what is not FUSE.
    pub user: Option<u32>,
}

impl Mount {
    /// Whether a user's guardian holds the place with it.
    #[must_use]
    pub fn is_placeholder(&self) -> bool {
        self.fstype == PLACEHOLDER
    }

    /// Whether it is one of ours.
    #[must_use]
    pub fn is_mirrorfs(&self) -> bool {
        self.fstype == FSTYPE
    }
}

/// All mounts, in the order they were made.
pub fn all() -> std::io::Result<Vec<Mount>> {
    Ok(parse(&std::fs::read("/proc/self/mountinfo")?))
}

/// The mount one sees at `path`, which must be a mountpoint itself; the topmost, if several are stacked.
#[must_use]
pub fn at<'a>(mounts: &'a [Mount], path: &Path) -> Option<&'a Mount> {
    mounts.iter().rev().find(|m| m.mountpoint == path)
}

/// The mount in which `path` lies.
#[must_use]
pub fn around<'a>(mounts: &'a [Mount], path: &Path) -> Option<&'a Mount> {
    path.ancestors().find_map(|ancestor| at(mounts, ancestor))
}

fn parse(text: &[u8]) -> Vec<Mount> {
    text.split(|b| *b == b'\n').filter_map(parse_line).collect()
}

/// `36 35 98:0 /root /mountpoint rw,noatime shared:1 - fstype source options`
fn parse_line(line: &[u8]) -> Option<Mount> {
    let mut words = line.split(|b| *b == b' ');
    let mountpoint = unescape(words.nth(4)?);
    words.find(|word| *word == b"-")?;
    let fstype = unescape(words.next()?).to_string_lossy().into_owned();
    let source = unescape(words.next()?).to_string_lossy().into_owned();
    // The source is escaped by the kernel: nothing in it can pass for an option.
    let options = words.next().unwrap_or_default().split(|b| *b == b',');
    let user = options.filter_map(|o| o.strip_prefix(b"user_id=")).next();
    let user = user.and_then(|id| std::str::from_utf8(id).ok()?.parse().ok());
    Some(Mount { mountpoint: mountpoint.into(), fstype, source, user })
}

/// Undoes the kernel's `\040` for blanks, tabs, line feeds and backslashes.
pub(super) fn unescape(text: &[u8]) -> OsString {
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some((&byte, after)) = rest.split_first() {
        let octal = after.get(..3).filter(|_| byte == b'\\');
        let value = octal.and_then(|digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok());
        out.push(value.unwrap_or(byte));
        rest = if value.is_some() { &after[3..] } else { after };
    }
    OsString::from_vec(out)
}

/// The reverse of [`unescape`].
pub(super) fn escape(path: &Path) -> Vec<u8> {
    let mut out = Vec::new();
    for byte in path.as_os_str().as_bytes() {
        match byte {
            b' ' | b'\t' | b'\n' | b'\\' => out.extend(format!("\\{byte:03o}").bytes()),
            _ => out.push(*byte),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &[u8] = b"22 1 254:1 / / rw,relatime shared:1 - ext4 /dev/root rw\n\
        40 22 0:38 / /mnt/my\\040files rw,nosuid shared:9 master:2 - fuse.mirrorfs mirrorfs rw,user_id=0\n\
        41 40 0:39 / /mnt/my\\040files/a\\134b rw - tmpfs none rw\n\
        42 22 0:40 / /mnt rw - tmpfs\n";

    #[test]
    fn mountinfo_is_read_with_its_escapes() {
        let mounts = parse(TEXT);
        assert_eq!(mounts.len(), 3, "the broken line is passed over");
        let ours = at(&mounts, Path::new("/mnt/my files")).unwrap();
        assert!(ours.is_mirrorfs());
        assert_eq!((ours.source.as_str(), ours.user), ("mirrorfs", Some(0)));
        assert_eq!(at(&mounts, Path::new("/")).unwrap().user, None);
        assert_eq!(around(&mounts, Path::new("/mnt/my files/x/y")), Some(ours));
        assert_eq!(around(&mounts, Path::new("/mnt/my files/a\\b/c")).unwrap().fstype, "tmpfs");
        assert_eq!(around(&mounts, Path::new("/mnt/other")).unwrap().fstype, "ext4");
        assert_eq!(at(&mounts, Path::new("/mnt/other")), None);
    }

    #[test]
    fn the_topmost_of_stacked_mounts_is_seen() {
        let mounts = parse(b"1 0 0:1 / /m rw - ext4 a rw\n2 1 0:2 / /m rw - fuse.mirrorfs b rw\n");
        assert_eq!(at(&mounts, Path::new("/m")).unwrap().source, "b");
    }

    #[test]
    fn escapes_come_back() {
        let odd = Path::new("/a b\tc\\040\nd/é");
        assert_eq!(unescape(&escape(odd)), odd.as_os_str());
        assert!(!escape(odd).contains(&b' '));
    }

    #[test]
    fn this_machine_has_mounts() {
        assert!(at(&all().unwrap(), Path::new("/")).is_some());
    }
}
