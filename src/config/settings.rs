//! Settings in one spelling, by key: what a mount works with, and what a list of options asks for,
//! can be compared.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use super::layer::MountList;
use super::units::{exact_duration, exact_size};
use super::{Compression, Config, ConfigError, Env, Fsync, LowLatency, Merged, replicas};

/// Values by key, each in one spelling.
pub type Settings = BTreeMap<String, String>;

impl Config {
    /// Every setting that only a new mount can change, but for the list of replicas.
    #[must_use]
    pub fn settings(&self) -> Settings {
        let yes_no = |on: bool| if on { "true" } else { "false" }.to_owned();
        let interval = |time: Option<Duration>| time.map_or("off".to_owned(), exact_duration);
        let compression = match self.compression {
            Compression::Zstd => "zstd",
            Compression::None => "none",
        };
        let fsync = match self.fsync {
            Fsync::Local => "local",
            Fsync::One => "one",
            Fsync::Quorum => "quorum",
            Fsync::All => "all",
        };
        let low_latency = match self.mount.low_latency {
            LowLatency::Auto => "auto",
            LowLatency::On => "on",
            LowLatency::Off => "off",
        };
        [
            ("state", super::real_path(&self.state).display().to_string()),
            ("cache_size", exact_size(self.cache_size)),
            ("free_space_ratio", self.free_space_ratio.to_string()),
            ("space_wait", exact_duration(self.space_wait)),
            ("read_timeout", exact_duration(self.read_timeout)),
            ("block_size", exact_size(self.block_size.into())),
            ("compression", compression.to_owned()),
            ("fsync", fsync.to_owned()),
            ("fsync_timeout", exact_duration(self.fsync_timeout)),
            ("commit_interval", exact_duration(self.commit_interval)),
            ("scrub_interval", interval(self.scrub_interval)),
            ("check_interval", interval(self.check_interval)),
            ("scrub_rate", self.scrub_rate.map_or("off".to_owned(), exact_size)),
            ("allow_other", yes_no(self.mount.allow_other)),
            ("strictatime", yes_no(self.mount.strictatime)),
            ("nodiratime", yes_no(self.mount.nodiratime)),
            ("acl", yes_no(!self.mount.noacl)),
            ("noacl", yes_no(self.mount.noacl)),
            ("low_latency", low_latency.to_owned()),
            ("no_restart", yes_no(self.mount.no_restart)),
        ]
        .map(|(key, value)| (key.to_owned(), value))
        .into()
    }
}

/// What a list of options asks for of those settings, in the same spelling, and the replicas that
/// it names: name and URL.
///
/// # Errors
/// What is wrong with a value.
pub fn asked_for(list: &MountList, env: &Env) -> Result<(Settings, BTreeMap<String, String>), ConfigError> {
    let merged = Merged { layers: vec![list.layer.clone()], labels: Vec::new() };
    let state = merged.text("state").map_or_else(PathBuf::new, |given| env.cwd.join(&given.text));
    let specs = match merged.replicas() {
        [] => Vec::new(),
        given => replicas::resolve(given, &merged.replica_options())?,
    };
    let named = specs.iter().map(|s| (s.name.to_string(), s.url.clone())).collect();
    let mut settings = Config::of(&merged, state, specs)?.settings();
    settings.retain(|key, _| list.layer.values.contains_key(key.as_str()));
    Ok((settings, named))
}

/// The keys of `asked` that are not in force in a mount that works with `in_force`.
#[must_use]
pub fn not_in_force<'a>(asked: &'a Settings, in_force: &Settings) -> Vec<&'a str> {
    asked
        .iter()
        .filter(|(key, value)| in_force.get(*key) != Some(value))
        .map(|(key, _)| key.as_str())
        .collect()
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::config::Raw;
    use crate::config::keys;
    use crate::config::layer::mount_list;

    fn env() -> Env {
        Env { vars: [("HOME".into(), "/home/x".into())].into(), cwd: "/base".into() }
    }

    fn asked(list: &str) -> (Settings, BTreeMap<String, String>) {
        asked_for(&mount_list(&[list.to_owned()], Path::new("/base")).unwrap(), &env()).unwrap()
    }

    #[test]
    fn every_key_but_flags_of_the_kernel_has_a_setting() {
        let raw = Raw { options: vec!["replica=/r,state=/s".into()], ..Raw::default() };
        let settings = Config::load(&raw, &env()).unwrap().settings();
        for key in keys::VOLUME_KEYS.into_iter().chain(keys::MOUNT_KEYS) {
            let expected = !keys::FLAGS.contains(&key) && key != "fsname";
            assert_eq!(settings.contains_key(key), expected, "{key}");
        }
    }

    #[test]
    fn what_is_in_force_is_told_apart_in_any_spelling() {
        let raw = Raw {
            options: vec![
                "replica=a=/r,state=s,cache_size=1024MiB,fsync=one,allow_other,space_wait=60".into(),
            ],
            ..Raw::default()
        };
        let config = Config::load(&raw, &env()).unwrap();
        let (settings, none) = asked(
            "rw,nodev,relatime,allow_other,cache-size=1GiB,fsync=one,space_wait=1m,state=/base/s,scrub_rate=off,acl,default_permissions",
        );
        assert!(none.is_empty());
        assert_eq!(not_in_force(&settings, &config.settings()), [""; 0]);
        let (settings, _) = asked("cache_size=2GiB,fsync=one,noacl,strictatime,state=/other");
        assert_eq!(
            not_in_force(&settings, &config.settings()),
            ["cache_size", "noacl", "state", "strictatime"]
        );
        let (settings, replicas) = asked("replica=a=/r,replica=b=s3://bucket/p");
        assert!(settings.is_empty());
        assert_eq!(replicas["a"], config.replicas[0].url);
        assert_eq!(replicas["b"], "s3://bucket/p");
        assert!(asked_for(&mount_list(&["cache_size=x".into()], Path::new("/")).unwrap(), &env()).is_err());
    }
}
