//! Which folder holds a volume's local state when nobody names one.
//!
//! Folders lie in `$XDG_STATE_HOME/mirrorfs/`. The one that was last used with any of the same replicas is taken again,
//! so that adding or dropping a replica does not lose what waits to be sent; otherwise a new name is made of the
//! replicas' places. Knows nothing else of what the folder holds.

use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use super::ConfigError;
use super::layer::Env;
use crate::private;
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

/// The replicas that `dir` was last used with, as far as that can be told: options beside the server are not noted, and
/// secrets must come from the environment.
#[must_use]
pub fn remembered(dir: &Path) -> Vec<ReplicaSpec> {
    let text = std::fs::read_to_string(dir.join(MEMORY)).unwrap_or_default();
    let spec = |(n, line): (usize, &str)| {
        let name = format!("remembered-{}", n + 1).parse().ok()?;
        let (url, option) = match line.split_once(' ') {
            Some((url, server)) if !line.starts_with("file:") => (url, Some(server)),
            _ => (line, None),
        };
        let key = |server: &str| match url.split("://").next() {
            Some("gs") => "base_url",
            Some("az") if !server.starts_with("http") => "account",
            _ => "endpoint",
        };
        let server = option.map(|server| (key(server).to_owned(), server.to_owned()));
        // It was allowed before, or it would not be noted.
        let plain = option.filter(|server| server.starts_with("http://"));
        let plain = plain.map(|_| ("allow_http".to_owned(), "true".to_owned()));
        let options = server.into_iter().chain(plain).collect();
        ReplicaSpec::parse(name, url, options, Path::new("/")).ok()
    };
    text.lines().enumerate().filter_map(spec).collect()
}

/// Creates the folder, for its owner only, with all folders above it. Answers the topmost folder that was missing.
/// One that another user owns or may write to is refused.
pub fn create(dir: &Path) -> std::io::Result<Option<PathBuf>> {
    let made = dir.ancestors().take_while(|folder| folder.symlink_metadata().is_err()).last();
    private::create_dir_all(dir)?;
    private::require_own(dir)?;
    Ok(made.map(Path::to_owned))
}

/// Takes away a folder that was created for a mount which then failed, with those above it up to `made`, unless they
/// hold something of value or somebody uses them. Answers whether the folder is gone.
pub fn discard(dir: &Path, made: &Path) -> bool {
    // The first is written last when a state is built: without it there is nothing that the replicas lack. By the second
    // the next mount knows the claim that this one has made.
    if ["state.json", "claiming.json"].iter().any(|name| dir.join(name).symlink_metadata().is_ok()) {
        return false;
    }
    if let Ok(lock) = std::fs::File::open(dir.join("LOCK")) {
        // SAFETY: the descriptor is open; flock touches no memory.
        if unsafe { libc::flock(lock.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) } != 0 {
            return false;
        }
    }
    if std::fs::remove_dir_all(dir).is_err() {
        return false;
    }
    let above = dir.ancestors().skip(1).take_while(|folder| folder.starts_with(made));
    for folder in above {
        // Not when something else lies there by now.
        if std::fs::remove_dir(folder).is_err() {
            break;
        }
    }
    true
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
        let urls = |specs: &[ReplicaSpec]| specs.iter().map(|s| s.url.clone()).collect::<Vec<_>>();
        assert_eq!(urls(&remembered(&ab)), urls(&specs(&["/r/a", "/r/b"])));
        std::fs::write(ab.join(MEMORY), "file:///r/a b\ns3://b/p http://h:1\ngs://b\nnonsense://\n").unwrap();
        let found = remembered(&ab);
        assert_eq!(found.len(), 3, "{found:?}");
        assert_eq!(found[1].options.get("endpoint").map(String::as_str), Some("http://h:1"));
        remember(&ab, &specs(&["/r/a", "/r/b"])).unwrap();
        let d = default_dir(&env, &specs(&["/r/d"])).unwrap();
        assert_ne!(d, ab);
        create(&d).unwrap();
        remember(&d, &specs(&["/r/d"])).unwrap();
        let error = default_dir(&env, &specs(&["/r/a", "/r/d"])).unwrap_err().to_string();
        assert!(error.contains("two state folders"), "{error}");
        assert!(error.contains("--state"), "{error}");
    }

    #[test]
    fn what_was_made_for_nothing_goes_away_again() {
        let dir = tempfile::tempdir().unwrap();
        let state = dir.path().join("a/b/c");
        let made = create(&state).unwrap().unwrap();
        assert_eq!(made, dir.path().join("a"));
        assert_eq!(create(&state).unwrap(), None);
        std::fs::write(state.join("daemon.log"), "x").unwrap();
        std::fs::write(dir.path().join("a/other"), "x").unwrap();
        assert!(discard(&state, &made));
        assert!(dir.path().join("a/other").exists() && !dir.path().join("a/b").exists());

        let made = create(&state).unwrap().unwrap();
        std::fs::write(state.join("state.json"), "{}").unwrap();
        assert!(!discard(&state, &made));
        std::fs::remove_file(state.join("state.json")).unwrap();
        let lock = std::fs::File::create(state.join("LOCK")).unwrap();
        // SAFETY: the descriptor is open.
        assert_eq!(unsafe { libc::flock(lock.as_raw_fd(), libc::LOCK_EX) }, 0);
        assert!(!discard(&state, &made), "somebody uses it");
        drop(lock);
        assert!(discard(&state, &made) && !dir.path().join("a/b").exists());
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
