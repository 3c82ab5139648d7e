//! Where mirrorfs differs from ext4, and why. The aim is an empty list; each is in docs/semantics.md too.

/// One thing that differs.
pub struct Deviation {
    pub case: &'static str,
    /// The line's key, or how it begins, with a `*` at the end.
    pub key: &'static str,
    /// What mirrorfs says, as noted; `*` for anything.
    pub ours: &'static str,
    /// It need not differ: that depends on what the kernel has in its cache.
    pub sometimes: bool,
}

impl Deviation {
    pub fn covers(&self, key: &str, ours: &str) -> bool {
        let key = self.key.strip_suffix('*').map_or(self.key == key, |start| key.starts_with(start));
        key && (self.ours == "*" || self.ours == ours)
    }
}

const fn differs(case: &'static str, key: &'static str, ours: &'static str) -> Deviation {
    Deviation { case, key, ours, sometimes: false }
}

const fn sometimes(case: &'static str, key: &'static str, ours: &'static str) -> Deviation {
    Deviation { case, key, ours, sometimes: true }
}

pub const ALL: &[Deviation] = &[
    // fuser 0.18 knows no FUSE_TMPFILE.
    differs("tmpfile", "open", "Err(\"EOPNOTSUPP\")"),
    differs("tmpfile", "*", "(nothing)"),
    // fuser 0.18 knows no FUSE_STATX, which carries it.
    differs("statx", "birth time is there", "false"),
    // The kernel's FUSE keeps times of files itself, and moves none when the size stays.
    differs("which_times_move", "truncate same", "Ok(()) "),
    // The kernel's FUSE moves the time before it can know that the value is the same.
    differs("which_times_move", "setxattr same", "Ok(()) c+"),
    // What the kernel reads out of its own cache the daemon does not see, so no access is noted.
    sometimes("atime", "read", "\"old\""),
    sometimes("atime", "mmap", "\"old\""),
    sometimes("atime", "following", "\"old\""),
    sometimes("atime", "first read after a change", "false"),
    sometimes("atime", "what a read moves", "\"\""),
    // FUSE's answer to statfs has no room for it.
    differs("statfs_numbers", "id is not zero", "false"),
    // A promise of space could not be kept: see fallocate.
    differs("fallocate_and_truncate", "takes space", "false"),
    // No file flags, and no FIEMAP: the kernel's FUSE does not ask for it.
    differs("file_flags", "FIEMAP", "Err(\"EOPNOTSUPP\")"),
    differs("file_flags", "FITRIM by a user", "Err(\"ENOTTY\")"),
    differs("file_flags", "fsgetxattr*", "Err(\"ENOTTY\")"),
    differs("file_flags", "get *", "Err(\"ENOTTY\")"),
    differs("file_flags", "set immutable", "false"),
    differs("file_flags", "write to immutable", "(nothing)"),
    // The kernel does not clear what a mapping left behind the end when a write further on enlarges a FUSE file.
    differs("mmap_and_truncate", "after a write further on", "*"),
    // Files on FUSE cannot do these.
    differs("rwf_flags", "nowait, cached", "Err(\"EOPNOTSUPP\")"),
    differs("rwf_flags", "nowait at the end", "Err(\"EOPNOTSUPP\")"),
    differs("rwf_flags", "uncached", "Err(\"EOPNOTSUPP\")"),
    differs("fallocate_modes", "collapse: *", "*"),
    differs("fallocate_modes", "insert: *", "*"),
    // Files on FUSE can be polled (always ready).
    differs("descriptors", "epoll", "Ok(())"),
    // The kernel's FUSE overlooks all options of a remount through mount(2).
    differs("remount_options", "unknown option", "\"false\""),
];
