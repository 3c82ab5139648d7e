//! The keys that configuration knows, their forms as flags and variables, and the nearest one to a misspelt key.
//!
//! Pure. A key is spelt `cache_size` in the file and in `-o`, `--cache-size` as a flag, `MIRRORFS_CACHE_SIZE` in the
//! environment.

/// Keys at the top of the file.
pub const VOLUME_KEYS: [&str; 14] = [
    "state",
    "cache_size",
    "free_space_ratio",
    "space_wait",
    "read_timeout",
    "block_size",
    "compression",
    "fsync",
    "fsync_timeout",
    "commit_interval",
    "scrub_interval",
    "check_interval",
    "scrub_rate",
    "read_only",
];

/// Keys of the table `[mount]`.
pub const MOUNT_KEYS: [&str; 15] = [
    "allow_other",
    "nosuid",
    "nodev",
    "noexec",
    "noatime",
    "strictatime",
    "nodiratime",
    "nosymfollow",
    "sync",
    "dirsync",
    "acl",
    "noacl",
    "fsname",
    "low_latency",
    "no_restart",
];

/// Keys that hold tables.
pub const TABLES: [&str; 2] = ["replica", "mount"];

/// Keys that hold a yes or no; in `-o` they may stand without a value.
pub fn switches() -> impl Iterator<Item = &'static str> {
    ["read_only"]
        .into_iter()
        .chain(MOUNT_KEYS.into_iter().filter(|key| !matches!(*key, "fsname" | "low_latency")))
}

/// Keys that are flags of the kernel's mount, which a remount can change.
pub const FLAGS: [&str; 8] =
    ["read_only", "nosuid", "nodev", "noexec", "noatime", "nosymfollow", "sync", "dirsync"];

/// The static spelling of a key of a volume or of the table `[mount]`.
#[must_use]
pub fn known(key: &str) -> Option<&'static str> {
    VOLUME_KEYS.into_iter().chain(MOUNT_KEYS).find(|k| *k == key)
}

/// The variable that sets a key: `cache_size` → `MIRRORFS_CACHE_SIZE`.
#[must_use]
pub fn variable(key: &str) -> String {
    format!("MIRRORFS_{}", key.to_ascii_uppercase())
}

/// The flag that sets a key: `cache_size` → `--cache-size`.
#[must_use]
pub fn flag(key: &str) -> String {
    format!("--{}", key.replace('_', "-"))
}

/// `; did you mean "…"?` for the known word nearest to `word`, or the list of all when none is near.
#[must_use]
pub fn suggestion<'a>(word: &str, known: impl IntoIterator<Item = &'a str>) -> String {
    let known: Vec<&str> = known.into_iter().collect();
    let nearest = known
        .iter()
        .map(|k| (strsim::damerau_levenshtein(&word.to_ascii_lowercase().replace('-', "_"), k), *k))
        .min();
    match nearest {
        Some((distance, k)) if distance <= (k.len() / 2).clamp(1, 3) => format!("; did you mean {k:?}?"),
        _ => format!("; known are {}", known.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nearest_key_is_named() {
        let near = |w| suggestion(w, VOLUME_KEYS);
        assert_eq!(near("cache-size"), "; did you mean \"cache_size\"?");
        assert_eq!(near("cachesize"), "; did you mean \"cache_size\"?");
        assert_eq!(near("fsnyc"), "; did you mean \"fsync\"?");
        assert_eq!(near("readonly"), "; did you mean \"read_only\"?");
        assert!(near("colour").starts_with("; known are state, cache_size"), "{}", near("colour"));
    }

    #[test]
    fn every_switch_is_a_key() {
        for key in switches() {
            assert!(known(key).is_some(), "{key}");
        }
    }
}
