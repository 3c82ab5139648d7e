//! Precedence of the sources, and every message about a value.

use super::*;

/// Loads with these replicas as flags and these settings, in a world that has `HOME` and nothing else.
pub(super) fn load(replicas: &[&str], settings: &[(&str, &str)]) -> Result<Config, ConfigError> {
    let mut flags = Layer::default();
    for replica in replicas {
        flags.add_replica(replica, format!("--replica {replica}"), Path::new("/base"));
    }
    for (key, value) in settings {
        flags.set(key, *value, keys::flag(key));
    }
    Config::load(&Raw { flags, ..Raw::default() }, &env(&[]))
}

fn env(vars: &[(&str, &str)]) -> Env {
    let vars = vars.iter().chain(&[("HOME", "/home/nobody-here")]);
    Env { vars: vars.map(|(k, v)| (k.into(), v.into())).collect(), cwd: "/base".into() }
}

#[test]
fn defaults() {
    let config = load(&["/r/a"], &[]).unwrap();
    assert!(config.state.starts_with("/home/nobody-here/.local/state/mirrorfs"), "{:?}", config.state);
    assert_eq!(config.cache_size, 10 << 30);
    assert!((config.free_space_ratio - 0.05).abs() < 1e-9);
    assert_eq!((config.space_wait, config.read_timeout), (Duration::from_secs(30), Duration::from_secs(30)));
    assert_eq!(config.block_size, 1 << 20);
    assert_eq!(config.compression, Compression::Zstd);
    assert_eq!(config.fsync, Fsync::Local);
    assert_eq!(config.fsync_timeout, Duration::from_secs(60));
    assert_eq!(config.commit_interval, Duration::from_secs(5));
    assert!(!config.read_only);
    assert_eq!(config.mount, MountOptions::default());
}

#[test]
fn flags_beat_options_beat_environment_beat_file() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("m.toml");
    let all = "cache_size = \"1GiB\"\ncommit_interval = \"1s\"\nfsync = \"one\"\nfsync_timeout = \"1s\"\n";
    std::fs::write(&file, format!("{all}state = \"/state\"\n[replica.f]\nurl = \"/r/file\"\n")).unwrap();
    let environment = env(&[
        ("MIRRORFS_CACHE_SIZE", "2GiB"),
        ("MIRRORFS_COMMIT_INTERVAL", "2s"),
        ("MIRRORFS_FSYNC", "quorum"),
        ("MIRRORFS_CONFIG", file.to_str().unwrap()),
    ]);
    let mut raw = Raw { options: vec!["cache_size=3GiB,commit_interval=3s".into()], ..Raw::default() };
    raw.flags.set("cache_size", "4GiB", "--cache-size");
    let config = Config::load(&raw, &environment).unwrap();
    assert_eq!(config.cache_size, 4 << 30);
    assert_eq!(config.commit_interval, Duration::from_secs(3));
    assert_eq!(config.fsync, Fsync::Quorum);
    assert_eq!(config.fsync_timeout, Duration::from_secs(1));
    assert_eq!(config.state, Path::new("/state"));
    assert_eq!(config.replicas[0].name.as_str(), "f");

    // A list of replicas replaces the list of a weaker source as a whole.
    raw.flags.add_replica("g=/r/flag", "--replica", Path::new("/base"));
    let config = Config::load(&raw, &environment).unwrap();
    assert_eq!(config.replicas.iter().map(|r| r.name.as_str()).collect::<Vec<_>>(), ["g"]);
}

#[test]
fn the_file_named_by_a_flag_wins_over_the_others() {
    let dir = tempfile::tempdir().unwrap();
    for (name, fsync) in [("flag", "one"), ("option", "quorum"), ("variable", "all")] {
        std::fs::write(dir.path().join(name), format!("fsync = \"{fsync}\"\n[replica.a]\nurl = \"/r\""))
            .unwrap();
    }
    let path = |name: &str| dir.path().join(name);
    let environment = env(&[("MIRRORFS_CONFIG", path("variable").to_str().unwrap())]);
    let mut raw = Raw::default();
    assert_eq!(Config::load(&raw, &environment).unwrap().fsync, Fsync::All);
    raw.options = vec![format!("config={}", path("option").display())];
    assert_eq!(Config::load(&raw, &environment).unwrap().fsync, Fsync::Quorum);
    raw.config = Some(path("flag"));
    assert_eq!(Config::load(&raw, &environment).unwrap().fsync, Fsync::One);
}

#[test]
fn read_only_can_be_taken_back_by_a_stronger_source() {
    let mut raw = Raw { options: vec!["rw,replica=/r".into()], ..Raw::default() };
    let environment = env(&[("MIRRORFS_READ_ONLY", "yes")]);
    assert!(!Config::load(&raw, &environment).unwrap().read_only);
    raw.options = vec!["replica=/r".into()];
    assert!(Config::load(&raw, &environment).unwrap().read_only);
}

#[test]
fn every_wrong_value_is_named_with_its_source() {
    for (key, value, message) in [
        (
            "cache_size",
            "1MiB",
            "--cache-size: \"1MiB\" is out of range; it must lie between 16MiB and 1024TiB",
        ),
        ("block_size", "1KiB", "--block-size: \"1KiB\" is out of range; it must lie between 64KiB and 16MiB"),
        (
            "block_size",
            "1000000",
            "--block-size: \"1000000\" is not a power of two; use one, such as \"256KiB\" or \"1MiB\"",
        ),
        (
            "free_space_ratio",
            "0.95",
            "--free-space-ratio: \"0.95\" is out of range; it must lie between 0 and 0.9",
        ),
        (
            "free_space_ratio",
            "5%",
            "--free-space-ratio: \"5%\" is not a share of the disk; write a number from 0 to 0.9, such as 0.05",
        ),
        ("space_wait", "11m", "--space-wait: \"11m\" is out of range; it must lie between 0ms and 10m"),
        (
            "read_timeout",
            "500ms",
            "--read-timeout: \"500ms\" is out of range; it must lie between 1s and 10m",
        ),
        ("compression", "gzip", "--compression: \"gzip\" is not a compression; use zstd or none"),
        ("fsync", "two", "--fsync: \"two\" is not a level of fsync; use local, one, quorum or all"),
        ("fsync_timeout", "0s", "--fsync-timeout: \"0s\" is out of range; it must lie between 1s and 1h"),
        (
            "commit_interval",
            "1ms",
            "--commit-interval: \"1ms\" is out of range; it must lie between 100ms and 1h",
        ),
        ("read_only", "maybe", "--read-only: \"maybe\" is neither true nor false"),
        ("allow_other", "", "--allow-other: \"\" is neither true nor false"),
        ("state", "", "--state: is empty"),
    ] {
        let error = load(&["/r/a"], &[(key, value)]).unwrap_err();
        assert_eq!(error.to_string(), message);
        assert_eq!(error.exit_code(), Exit::Usage);
    }
}

#[test]
fn a_text_that_is_not_utf8_is_refused() {
    use std::os::unix::ffi::OsStringExt;
    let mut environment = env(&[]);
    environment.vars.insert("MIRRORFS_FSYNC".into(), std::ffi::OsString::from_vec(vec![0xff]));
    let error = Config::load(&Raw::default(), &environment).unwrap_err();
    assert_eq!(error.to_string(), "MIRRORFS_FSYNC is not valid text");
}

#[test]
fn state_and_replica_must_not_lie_one_within_the_other() {
    for (replica, state) in [("/r/a", "/r/a/state"), ("/r/a/copy", "/r/a"), ("/r/a", "/r/a")] {
        let error = load(&[replica], &[("state", state)]).unwrap_err().to_string();
        assert!(error.contains("lie one within the other"), "{error}");
    }
    load(&["/r/a"], &[("state", "/r/ab")]).unwrap();
}

#[test]
fn fsync_levels_count_replicas() {
    let needed = |of| [Fsync::Local, Fsync::One, Fsync::Quorum, Fsync::All].map(|f| f.needed(of));
    assert_eq!(needed(1), [0, 1, 1, 1]);
    assert_eq!(needed(2), [0, 1, 2, 2]);
    assert_eq!(needed(3), [0, 1, 2, 3]);
}

#[test]
fn a_path_is_compared_by_what_it_really_is() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir(dir.path().join("real")).unwrap();
    std::os::unix::fs::symlink("real", dir.path().join("link")).unwrap();
    let real = dir.path().canonicalize().unwrap().join("real/not/yet");
    assert_eq!(real_path(&dir.path().join("link/not/yet")), real);
}

#[test]
fn options_reach_the_replicas_of_any_source() {
    let environment = env(&[
        ("MIRRORFS_REPLICA", "a=s3://b/p c=/r"),
        ("MIRRORFS_REPLICA_OPTION", "a.region=weak a.endpoint=https://h:1"),
    ]);
    let mut raw = Raw::default();
    raw.flags.add_replica_option("a.region=strong", "--replica-option").unwrap();
    let config = Config::load(&raw, &environment).unwrap();
    assert_eq!(config.replicas[0].options["region"], "strong");
    assert_eq!(config.replicas[0].options["endpoint"], "https://h:1");
    assert!(config.replicas[1].options.is_empty());

    let environment2 = env(&[
        ("MIRRORFS_REPLICA", "c=/r"),
        ("MIRRORFS_REPLICA_OPTION", "upload_limit=08:00,1MiB;23:00,off reads_in_flight=3"),
        ("MIRRORFS_FREE_SPACE_RATIO", "0"),
    ]);
    let limited = Config::load(&Raw::default(), &environment2).unwrap();
    assert!(limited.free_space_ratio == 0.0 && limited.replicas[0].limits.reads_in_flight == 3);
    let noon = crate::replica::limit::WeekMinute::new(2, 12, 0);
    assert_eq!(limited.replicas[0].upload_limit.at(noon), Some(1 << 20));

    raw.flags.add_replica_option("aa.region=x", "--replica-option").unwrap();
    let error = Config::load(&raw, &environment).unwrap_err().to_string();
    assert_eq!(error, "--replica-option aa.region: no replica is called aa; did you mean \"a\"?");
}

#[test]
fn an_unknown_option_of_a_replica_names_it_and_the_nearest() {
    let mut raw = Raw::default();
    raw.flags.add_replica("a=s3://b/p", "--replica a", Path::new("/base"));
    raw.flags.add_replica_option("regoin=x", "--replica-option").unwrap();
    let error = Config::load(&raw, &env(&[])).unwrap_err().to_string();
    assert_eq!(error, "--replica a: replica a: unknown option \"regoin\" for s3, did you mean \"region\"?");
}

#[test]
fn one_replica_is_found_by_name_or_place() {
    let environment = env(&[("MIRRORFS_REPLICA", "a=s3://b/p c=/r")]);
    let find = |from: &str| load_replica(from, &Raw::default(), &environment).unwrap();
    assert_eq!(find("a").url, "s3://b/p");
    assert_eq!(find("x").url, "file:///base/x");
    assert_eq!((find("n=gs://g/h").name.as_str(), find("n=gs://g/h").url.as_str()), ("n", "gs://g/h"));
}

#[test]
fn the_documentation_names_every_key() {
    let text = include_str!("../../docs/configuration.md");
    for key in keys::VOLUME_KEYS.into_iter().chain(keys::MOUNT_KEYS) {
        assert!(text.contains(&format!("`{key}`")), "{key}");
    }
    use crate::replica::Scheme;
    for scheme in [Scheme::File, Scheme::S3, Scheme::Gs, Scheme::Az] {
        for option in scheme.options() {
            assert!(text.contains(&format!("`{option}`")), "{option}");
        }
    }
}
