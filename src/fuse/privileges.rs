//! When the set-user-id and set-group-id bits fall, because the content or the owner of a file
//! changes.
//!
//! The kernel leaves this to the daemon (`FUSE_HANDLE_KILLPRIV_V2`) and marks the requests of a
//! process that may not keep the bits. fuser 0.18 passes that mark on with WRITE only, so for the
//! other requests the rights of the calling process are read.

use std::fs;

use super::shared::Shared;
use crate::ids::Ino;
use crate::vfs::api::VfsResult;
use crate::vfs::types::{Attr, Caller, FileKind, SetAttr};

const SET_UID: u16 = 0o4000;
const SET_GID: u16 = 0o2000;
const GROUP_EXECUTE: u16 = 0o0010;

/// The number of `CAP_FSETID`, the right to keep the bits.
const CAP_FSETID: u32 = 4;

/// What is done to a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Change {
    /// Its content is changed.
    Content,
    /// Its content is changed, and the kernel says that the process may not keep the bits.
    ContentUnprivileged,
    /// Its owner or group is set, perhaps to what it was.
    Owner,
}

impl Change {
    /// What the kernel's SETATTR says was done, if bits may fall with it.
    pub(super) fn of_setattr(set: &SetAttr) -> Option<Self> {
        // A chown that names neither owner nor group comes as a new change time alone.
        let only_ctime = set.ctime.is_some() && *set == SetAttr { ctime: set.ctime, ..SetAttr::default() };
        // Before some changes of content the kernel only tells that bits are to fall: then nothing
        // at all is to be set.
        let nothing = *set == SetAttr::default();
        match set {
            SetAttr { perm: Some(_), .. } => None,
            SetAttr { uid: Some(_), .. } | SetAttr { gid: Some(_), .. } => Some(Self::Owner),
            _ if only_ctime => Some(Self::Owner),
            SetAttr { size: Some(_), .. } => Some(Self::Content),
            _ if nothing => Some(Self::Content),
            _ => None,
        }
    }
}

/// The rights of a process that count here.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Rights {
    /// It has `CAP_FSETID`.
    keeps: bool,
    /// Its groups.
    groups: Vec<u32>,
}

impl Rights {
    /// What can be known without asking for more.
    fn of_ids(caller: &Caller) -> Self {
        Self { keeps: caller.uid == 0, groups: vec![caller.gid] }
    }

    /// Out of the text of `/proc/PID/status`. `same_namespace`: its capabilities count outside of
    /// its user namespace, too.
    ///
    /// A process may act in the name of another one (overlayfs and NFS servers do): then what the
    /// text says is not about `caller`, and only its ids count.
    fn parse(status: &str, caller: &Caller, same_namespace: impl FnOnce() -> bool) -> Self {
        let numbers = |key: &str| -> Vec<u32> {
            let line = status.lines().find_map(|line| line.strip_prefix(key));
            line.map(|l| l.split_whitespace().filter_map(|n| n.parse().ok()).collect()).unwrap_or_default()
        };
        // Real, effective, saved, and the one that counts for files.
        if numbers("Uid:").get(3) != Some(&caller.uid) || numbers("Gid:").get(3) != Some(&caller.gid) {
            return Self::of_ids(caller);
        }
        let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
        let effective = effective.and_then(|l| u64::from_str_radix(l.trim(), 16).ok());
        let capable = effective.is_some_and(|bits| bits & (1 << CAP_FSETID) != 0);
        let mut groups = numbers("Groups:");
        groups.push(caller.gid);
        Self { keeps: capable && (caller.uid == 0 || same_namespace()), groups }
    }

    /// Those of a process that waits for our answer.
    fn of(caller: &Caller) -> Self {
        let Ok(status) = fs::read_to_string(format!("/proc/{}/status", caller.pid)) else {
            return Self::of_ids(caller);
        };
        let namespace = |of: &str| fs::read_link(format!("/proc/{of}/ns/user")).ok();
        Self::parse(&status, caller, || {
            namespace("self").is_some_and(|ours| namespace(&caller.pid.to_string()) == Some(ours))
        })
    }

    /// What is left of `perm` after `change` of a file of the group `gid`, as on ext4: no
    /// set-user-id; no set-group-id where the group may execute, or to a process that is not in the
    /// group.
    fn left_of(&self, perm: u16, gid: u32, change: Change) -> u16 {
        let keeps = self.keeps && change != Change::ContentUnprivileged;
        if keeps && change == Change::Content {
            return perm;
        }
        let gid_falls = perm & GROUP_EXECUTE != 0 || !(keeps || self.groups.contains(&gid));
        perm & !SET_UID & if gid_falls { !SET_GID } else { !0 }
    }
}

/// The permission bits that `caller` leaves by `change`, when they are not those that the file has.
fn left(attr: &Attr, caller: &Caller, change: Change) -> Option<u16> {
    // The usual case: then nothing is looked up.
    if attr.perm & (SET_UID | SET_GID) == 0 || matches!(attr.kind, FileKind::Directory | FileKind::Symlink) {
        return None;
    }
    let perm = Rights::of(caller).left_of(attr.perm, attr.gid, change);
    (perm != attr.perm).then_some(perm)
}

impl Shared {
    /// The permission bits to set because of `change`, if it changes them.
    pub(super) fn fallen_privileges(&self, ino: Ino, caller: &Caller, change: Change) -> Option<u16> {
        left(&self.fs.getattr(ino).ok()?, caller, change)
    }

    /// Takes the bits from `ino` that fall with `change`, and has the kernel ask for the others.
    pub(super) fn drop_privileges(&self, ino: Ino, caller: &Caller, change: Change) -> VfsResult<()> {
        if let Some(perm) = self.fallen_privileges(ino, caller, change) {
            self.fs.setattr(ino, &SetAttr { perm: Some(perm), ..SetAttr::default() }, caller)?;
            self.forget_attr(ino);
        }
        Ok(())
    }

    /// Before an access list is set: takes set-group-id from `ino` unless the caller may keep it or
    /// is in its group, as chmod does.
    pub(super) fn drop_foreign_setgid(&self, ino: Ino, caller: &Caller) -> VfsResult<()> {
        let attr = self.fs.getattr(ino)?;
        if attr.perm & SET_GID == 0 {
            return Ok(());
        }
        let rights = Rights::of(caller);
        if rights.keeps || rights.groups.contains(&attr.gid) {
            return Ok(());
        }
        let set = SetAttr { perm: Some(attr.perm & !SET_GID), ..SetAttr::default() };
        self.fs.setattr(ino, &set, caller).map(drop)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const USER: Caller = Caller { uid: 7, gid: 8, pid: 0, umask: 0 };
    const ROOT: Caller = Caller { uid: 0, gid: 0, pid: 0, umask: 0 };

    fn status(uid: u32, gid: u32, groups: &str, capabilities: &str) -> String {
        format!(
            "Name:\tx\nUid:\t1\t1\t1\t{uid}\nGid:\t1\t1\t1\t{gid}\nGroups:\t{groups} \nCapEff:\t{capabilities}\n"
        )
    }

    #[test]
    fn rights_are_those_of_the_caller_and_of_nobody_else() {
        let text = status(7, 8, "9 10", "0000000000000000");
        let user = Rights { keeps: false, groups: vec![9, 10, 8] };
        assert_eq!(Rights::parse(&text, &USER, || true), user);
        let text = status(7, 8, "", "0000000000000010");
        assert!(Rights::parse(&text, &USER, || true).keeps);
        assert!(!Rights::parse(&text, &USER, || false).keeps, "in a namespace of its own");
        // Root that gave the right away.
        let text = status(0, 0, "", "00000000ffffffef");
        assert!(!Rights::parse(&text, &ROOT, || true).keeps);
        // Another one acts in the caller's name.
        for text in [status(0, 0, "9", "ffffffffffffffff"), String::new(), "Uid:\tx".into()] {
            assert_eq!(Rights::parse(&text, &USER, || true), Rights { keeps: false, groups: vec![8] });
        }
        assert!(Rights::parse("", &ROOT, || false).keeps);
    }

    #[test]
    fn a_setattr_tells_what_was_done() {
        let ctime = Some(crate::vfs::types::Time::default());
        let nothing = SetAttr::default();
        for (set, change) in [
            (SetAttr { uid: Some(1), ctime, ..nothing }, Some(Change::Owner)),
            (SetAttr { gid: Some(1), ..nothing }, Some(Change::Owner)),
            (SetAttr { ctime, ..nothing }, Some(Change::Owner)),
            (SetAttr { size: Some(1), ctime, ..nothing }, Some(Change::Content)),
            (nothing, Some(Change::Content)),
            (SetAttr { perm: Some(0o4755), ctime, ..nothing }, None),
            (SetAttr { mtime: Some(crate::vfs::types::SetTime::Now), ctime, ..nothing }, None),
        ] {
            assert_eq!(Change::of_setattr(&set), change, "{set:?}");
        }
    }

    #[test]
    fn bits_fall_as_on_ext4() {
        let member = Rights { keeps: false, groups: vec![8, 12] };
        let stranger = Rights { keeps: false, groups: vec![8] };
        let root = Rights { keeps: true, groups: vec![0] };
        for (who, perm, content, owner) in [
            (&member, 0o6755, 0o0755, 0o0755),
            (&member, 0o6744, 0o2744, 0o2744),
            (&stranger, 0o6755, 0o0755, 0o0755),
            (&stranger, 0o6744, 0o0744, 0o0744),
            (&stranger, 0o1744, 0o1744, 0o1744),
            (&root, 0o6755, 0o6755, 0o0755),
            (&root, 0o6744, 0o6744, 0o2744),
        ] {
            assert_eq!(who.left_of(perm, 12, Change::Content), content, "{who:?} {perm:o}");
            assert_eq!(who.left_of(perm, 12, Change::Owner), owner, "{who:?} {perm:o}");
        }
        assert_eq!(root.left_of(0o6744, 12, Change::ContentUnprivileged), 0o0744);
    }
}
