//! Processes that still see a mount after it was unmounted here: those in other mount namespaces, such as containers.

use std::fmt;
use std::fs;
use std::path::PathBuf;

use super::mountinfo::mounts_of;

/// How many are named.
const MOST_NAMED: usize = 5;

/// A process in another mount namespace that has the mount.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Holder {
    /// Its process number.
    pub pid: u32,
    /// The name of its program.
    pub program: String,
    /// Where it sees the mount.
    pub path: String,
}

/// Those that hold a mount, as far as this process may see them.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Holders {
    /// Some of them, by process number.
    pub named: Vec<Holder>,
    /// How many more there are.
    pub more: usize,
}

impl Holders {
    /// Those of the mount with this device number (`major:minor`).
    #[must_use]
    pub fn of(device: &str) -> Self {
        let own = namespace("self");
        let mut pids: Vec<u32> = fs::read_dir("/proc")
            .into_iter()
            .flatten()
            .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
            .collect();
        pids.sort_unstable();
        let mut found = Self::default();
        for pid in pids {
            // Another user's process tells only root where it lives.
            let Some(there) = namespace(&pid.to_string()) else { continue };
            if own.as_ref() == Some(&there) {
                continue;
            }
            let mounts = mounts_of(pid).unwrap_or_default();
            let Some(mount) = mounts.into_iter().find(|m| m.device == device) else { continue };
            if found.named.len() == MOST_NAMED {
                found.more += 1;
                continue;
            }
            let program = fs::read(format!("/proc/{pid}/comm")).unwrap_or_default();
            found.named.push(Holder {
                pid,
                program: plain(String::from_utf8_lossy(&program).trim_end()),
                path: plain(&mount.mountpoint.to_string_lossy()),
            });
        }
        found
    }
}

impl fmt::Display for Holders {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.named.is_empty() {
            return f.write_str("a mount namespace without a process that can be seen");
        }
        for (i, holder) in self.named.iter().enumerate() {
            let comma = if i == 0 { "" } else { ", " };
            write!(f, "{comma}process {} ({}) at {}", holder.pid, holder.program, holder.path)?;
        }
        if self.more > 0 {
            write!(f, " and {} more", self.more)?;
        }
        Ok(())
    }
}

/// What tells the mount namespace of a process from others.
fn namespace(pid: &str) -> Option<PathBuf> {
    fs::read_link(format!("/proc/{pid}/ns/mnt")).ok()
}

/// Names come from other users: what a terminal would obey is replaced.
fn plain(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '?' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn those_of_this_namespace_hold_nothing() {
        let root = mounts_of(std::process::id()).unwrap().swap_remove(0);
        let own = namespace("self");
        for holder in Holders::of(&root.device).named {
            assert_ne!(namespace(&holder.pid.to_string()), own, "{holder:?}");
        }
        assert_eq!(Holders::of("0:999999"), Holders::default());
    }

    #[test]
    fn they_are_told_in_words() {
        assert_eq!(Holders::default().to_string(), "a mount namespace without a process that can be seen");
        let holder = |pid| Holder { pid, program: plain("sh\u{1b}[2J"), path: "/m".into() };
        let found = Holders { named: vec![holder(7), holder(8)], more: 3 };
        assert_eq!(found.to_string(), "process 7 (sh?[2J) at /m, process 8 (sh?[2J) at /m and 3 more");
    }
}
