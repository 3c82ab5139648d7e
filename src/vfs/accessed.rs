//! Access times: noted in memory by whoever reads, kept in the journal later and in one go.
//!
//! Owns the rule by which a read counts, and the times that the journal does not have yet. What the kernel reads out of its own
//! cache is not seen here at all.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering};

use parking_lot::Mutex;

use super::types::{FileKind, Time, VfsError};
use super::{Result, Vfs};
use crate::format::tables::Body;
use crate::ids::Ino;

/// A day in seconds: then a read counts whatever was before.
const DAY: i64 = 86400;
/// Noted times above which they are kept at once.
const MANY: usize = 16 << 10;
/// Noted times above which no more are noted.
const TOO_MANY: usize = 1 << 20;
/// Bytes of content in inodes that are written again for their access times: while mounted, every few minutes, and at the end.
const INLINE_AT_ONCE: usize = 1 << 20;
const INLINE_AT_END: usize = 16 << 20;
/// Seconds after which noted times are kept.
const SOON: i64 = 600;

/// Which reads change an access time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(u8)]
pub enum Atime {
    /// None.
    #[default]
    Never,
    /// The first since the last change, and one a day.
    Relative,
    /// As [`Atime::Relative`], directories never.
    RelativeFiles,
    /// Each.
    Always,
}

/// The times that were noted.
#[derive(Default)]
pub(super) struct Accessed {
    rule: AtomicU8,
    /// How many there are; a hint that spares the lock.
    count: AtomicUsize,
    noted: Mutex<Noted>,
}

#[derive(Default)]
struct Noted {
    times: HashMap<Ino, Access>,
    /// Those that are not put off.
    fresh: usize,
    since: Option<Time>,
}

#[derive(Clone, Copy)]
struct Access {
    time: Time,
    /// Until the end: too much content would go with it.
    put_off: bool,
}

impl Noted {
    fn remove(&mut self, ino: Ino) {
        if self.times.remove(&ino).is_some_and(|a| !a.put_off) {
            self.fresh -= 1;
        }
    }
}

impl Accessed {
    fn rule(&self) -> Atime {
        match self.rule.load(Ordering::Relaxed) {
            1 => Atime::Relative,
            2 => Atime::RelativeFiles,
            3 => Atime::Always,
            _ => Atime::Never,
        }
    }

    /// The access time that was noted last.
    pub(super) fn get(&self, ino: Ino) -> Option<Time> {
        if self.count.load(Ordering::Relaxed) == 0 {
            return None;
        }
        self.noted.lock().times.get(&ino).map(|a| a.time)
    }

    /// Forgets what was noted: a time was set.
    pub(super) fn forget(&self, ino: Ino) {
        if self.count.load(Ordering::Relaxed) > 0 {
            let mut noted = self.noted.lock();
            noted.remove(ino);
            self.count.store(noted.times.len(), Ordering::Relaxed);
        }
    }

    fn put_off(&self, ino: Ino) {
        let mut noted = self.noted.lock();
        if let Some(access) = noted.times.get_mut(&ino)
            && !std::mem::replace(&mut access.put_off, true)
        {
            noted.fresh -= 1;
        }
    }

    fn forget_this(&self, ino: Ino, time: Time) {
        let mut noted = self.noted.lock();
        if noted.times.get(&ino).is_some_and(|a| a.time == time) {
            noted.remove(ino);
            self.count.store(noted.times.len(), Ordering::Relaxed);
        }
    }

    fn insert(&self, ino: Ino, now: Time) {
        let mut noted = self.noted.lock();
        if noted.times.len() < TOO_MANY || noted.times.contains_key(&ino) {
            let put_off = noted.times.get(&ino).map(|a| a.put_off);
            noted.times.insert(ino, Access { time: now, put_off: put_off.unwrap_or(false) });
            noted.fresh += usize::from(put_off.is_none());
            noted.since.get_or_insert(now);
            self.count.store(noted.times.len(), Ordering::Relaxed);
        }
    }

    /// What is to be kept now.
    fn due(&self, now: Time, all: bool) -> Vec<(Ino, Time)> {
        let mut noted = self.noted.lock();
        let long = noted.since.is_some_and(|since| now.secs.saturating_sub(since.secs) >= SOON);
        if !(all || (noted.fresh > 0 && (long || noted.fresh > MANY))) {
            return Vec::new();
        }
        noted.since = None;
        noted.times.iter().filter(|(_, a)| all || !a.put_off).map(|(ino, a)| (*ino, a.time)).collect()
    }
}

/// Whether a read now counts, when the file was last accessed and changed at these moments.
fn counts(rule: Atime, kind: FileKind, accessed: Time, inode: (Time, Time), now: Time) -> bool {
    let (mtime, ctime) = inode;
    match rule {
        Atime::Never => false,
        Atime::RelativeFiles if kind == FileKind::Directory => false,
        Atime::Relative | Atime::RelativeFiles => {
            accessed <= mtime || accessed <= ctime || now.secs.saturating_sub(accessed.secs) >= DAY
        }
        Atime::Always => accessed != now,
    }
}

impl Vfs {
    /// Which reads are to change access times from now on.
    pub fn set_atime(&self, rule: Atime) {
        self.accessed.rule.store(rule as u8, Ordering::Relaxed);
    }

    /// Notes that `ino` is read.
    pub(super) fn note_access(&self, ino: Ino) {
        let rule = self.accessed.rule();
        if rule == Atime::Never || self.read_only().is_some() {
            return;
        }
        let Ok(inode) = self.inode(ino) else { return };
        let accessed = self.accessed.get(ino).unwrap_or(inode.atime);
        let now = self.now();
        if counts(rule, inode.kind, accessed, (inode.mtime, inode.ctime), now) {
            self.accessed.insert(ino, now);
        }
    }

    /// Puts noted access times into the journal: those of some minutes together, or when they are many, or `all`. Not those
    /// with which much content would go.
    pub fn keep_accessed(&self, all: bool) -> Result<()> {
        let mut allowance = if all { INLINE_AT_END } else { INLINE_AT_ONCE };
        for (ino, time) in self.accessed.due(self.now(), all) {
            // With the inode goes the content that lies in it, to the journal and to each replica: for a few files that is
            // right, for a million that were only read it is not. Those times stay in memory.
            let carried = match self.load(ino).map(|inode| inode.body) {
                Ok(Body::Inline(content)) => content.len(),
                _ => 0,
            };
            if carried > allowance {
                // Not looked at again every time.
                self.accessed.put_off(ino);
                continue;
            }
            allowance -= carried;
            let kept = self.modify(ino, |_, inode| {
                // Unless a time has been set meanwhile.
                if self.accessed.get(ino) == Some(time) {
                    inode.atime = time;
                }
                Ok(())
            });
            match kept {
                Ok(_) | Err(VfsError::Stale) => self.accessed.forget_this(ino, time),
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(secs: i64) -> Time {
        Time { secs, nanos: 0 }
    }

    #[test]
    fn the_relative_rule_is_the_kernels() {
        let file = |accessed, changed, now| {
            counts(Atime::Relative, FileKind::Regular, at(accessed), (at(changed), at(changed)), at(now))
        };
        assert!(file(10, 10, 20), "read for the first time since the change");
        assert!(!file(11, 10, 20), "read since then");
        assert!(!file(11, 10, 11 + DAY - 1));
        assert!(file(11, 10, 11 + DAY));
        assert!(
            counts(Atime::Relative, FileKind::Regular, at(11), (at(10), at(12)), at(20)),
            "a chmod since"
        );
        let dir = |rule| counts(rule, FileKind::Directory, at(1), (at(2), at(2)), at(3));
        assert!(
            dir(Atime::Relative) && dir(Atime::Always) && !dir(Atime::RelativeFiles) && !dir(Atime::Never)
        );
        assert!(counts(Atime::Always, FileKind::Regular, at(11), (at(10), at(10)), at(12)));
    }

    #[test]
    fn times_are_kept_together_and_late() {
        let noted = Accessed::default();
        assert!(noted.due(at(0), true).is_empty());
        noted.insert(Ino(5), at(100));
        assert_eq!(noted.get(Ino(5)), Some(at(100)));
        assert!(noted.due(at(101), false).is_empty());
        assert_eq!(noted.due(at(100 + SOON), false), [(Ino(5), at(100))]);
        noted.insert(Ino(5), at(900));
        noted.forget_this(Ino(5), at(100));
        assert_eq!(noted.get(Ino(5)), Some(at(900)), "noted anew since");
        noted.forget(Ino(5));
        assert_eq!(noted.get(Ino(5)), None);
        noted.insert(Ino(6), at(900));
        noted.put_off(Ino(6));
        noted.insert(Ino(7), at(901));
        assert_eq!(
            noted.due(at(901 + SOON), false),
            [(Ino(7), at(901))],
            "what was put off waits for the end"
        );
        noted.forget_this(Ino(7), at(901));
        assert!(noted.due(at(9999), false).is_empty());
        noted.insert(Ino(6), at(950));
        assert_eq!(noted.due(at(9999), true), [(Ino(6), at(950))]);
        noted.forget(Ino(6));
        assert_eq!(noted.noted.lock().fresh, 0);
    }
}
