//! Which folder holds a volume's local state when nobody names one.
//!
//! Folders lie in `$XDG_STATE_HOME/mirrorfs/`. The one that was last used with any of the same replicas is taken again,
//! so that adding or dropping a replica does not lose what waits to be sent; otherwise a new name is made of the
//! replicas' places. Knows nothing else of what the folder holds.

use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use super::ConfigError;
use super::layer::Env;
use crate::replica::ReplicaSpec;

/// Name of the file in a state folder that lists the replicas it was last used with, one place a line.
const MEMORY: &str = "replicas";

/// The folder to use for these replicas.
pub fn default_dir(env: &Env, replicas: &[ReplicaSpec]) -> Result<PathBuf, ConfigError> {
    let base = base(env)?;
    let mut places: Vec<String> = replicas.iter().map(place).collect();
    places.sort_unstable();
    let mut used: Vec<PathBuf> = std::fs::read_dir(&base)
        .into_iter()
        .flatten()
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|dir| {
            let known = std::fs::read_to_string(dir.join(MEMORY)).unwrap_or_default();
            known.lines().any(|line| places.iter().any(|place| place == line))
        })
        .collect();
    used.sort();
    match (used.pop(), used.pop()) {
        (None, _) => {
            let name = blake3::hash(places.join("\n").as_bytes()).to_hex();
            Ok(base.join(&name[..16]))
        }
        (Some(one), None) => Ok(one),
        (Some(one), Some(other)) => Err(ConfigError::TwoStates { one: other, other: one }),
    }
}

/// Notes in `dir` which replicas it is used with. To be called by the owner of the folder's lock.
pub fn remember(dir: &Path, replicas: &[ReplicaSpec]) -> std::io::Result<()> {
    let text: String = replicas.iter().map(|r| place(r) + "\n").collect();
    let path = dir.join(MEMORY);
    if std::fs::read_to_string(&path).is_ok_and(|old| old == text) {
        return Ok(());
    }
    let temporary = dir.join("replicas.new");
    let mut file =
        std::fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&temporary)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()?;
    std::fs::rename(&temporary, &path)
}

/// Creates the folder, for its owner only, with all folders above it.
pub fn create(dir: &Path) -> std::io::Result<()> {
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(dir)
}

/// What tells a replica from all others: its URL and, as buckets of two servers may have the same name, its server.
fn place(replica: &ReplicaSpec) -> String {
    let mut text = replica.url.clone();
    for option in ["endpoint", "base_url", "account"] {
        if let Some(value) = replica.options.get(option) {
            text.push(' ');
            text.push_str(value);
        }
    }
    text.replace('\n', " ")
}

fn base(env: &Env) -> Result<PathBuf, ConfigError> {
    // The XDG specification says that a relative path is to be ignored.
    let absolute = |name: &str| env.os(name).map(PathBuf::from).filter(|p| p.is_absolute());
    let home = absolute("XDG_STATE_HOME").or_else(|| absolute("HOME").map(|h| h.join(".local/state")));
    home.map(|h| h.join("mirrorfs")).ok_or(ConfigError::NoHome)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn specs(urls: &[&str]) -> Vec<ReplicaSpec> {
        let config = super::super::tests::load(urls, &[]).unwrap();
        config.replicas
    }

    fn env(name: &str, dir: &Path) -> Env {
        Env { vars: [(name.into(), dir.into())].into(), cwd: "/".into() }
    }

    #[test]
    fn the_folder_follows_from_the_replicas_in_any_order() {
        let dir = tempfile::tempdir().unwrap();
        let env = env("XDG_STATE_HOME", dir.path());
        let ab = default_dir(&env, &specs(&["/r/a", "/r/b"])).unwrap();
        assert_eq!(ab, default_dir(&env, &specs(&["/r/b", "/r/a"])).unwrap());
        assert_eq!(ab.parent().unwrap(), dir.path().join("mirrorfs"));
        assert_ne!(ab, default_dir(&env, &specs(&["/r/a"])).unwrap());
    }

    #[test]
    fn a_used_folder_is_found_again_when_a_replica_joins() {
        let dir = tempfile::tempdir().unwrap();
        let env = env("XDG_STATE_HOME", dir.path());
        let ab = default_dir(&env, &specs(&["/r/a", "/r/b"])).unwrap();
        create(&ab).unwrap();
        remember(&ab, &specs(&["/r/a", "/r/b"])).unwrap();
        assert_eq!(default_dir(&env, &specs(&["/r/b", "/r/c"])).unwrap(), ab);
        let d = default_dir(&env, &specs(&["/r/d"])).unwrap();
        assert_ne!(d, ab);
        create(&d).unwrap();
        remember(&d, &specs(&["/r/d"])).unwrap();
        let error = default_dir(&env, &specs(&["/r/a", "/r/d"])).unwrap_err().to_string();
        assert!(error.contains("two state folders"), "{error}");
        assert!(error.contains("--state"), "{error}");
    }

    #[test]
    fn home_is_the_fallback_and_must_exist() {
        let replicas = specs(&["/r/a"]);
        let dir = default_dir(&env("HOME", Path::new("/home/x")), &replicas).unwrap();
        assert!(dir.starts_with("/home/x/.local/state/mirrorfs"), "{dir:?}");
        let error = default_dir(&env("XDG_STATE_HOME", Path::new("relative")), &replicas).unwrap_err();
        assert_eq!(
            error.to_string(),
            "neither XDG_STATE_HOME nor HOME is set, so there is no default for the state folder; give --state DIR"
        );
    }
}
