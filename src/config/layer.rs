//! Raw settings as they were given, each with the place it came from, before anything is checked.
//!
//! Owns the layers' sources but the file: flags, the `-o` list, the environment. Knows no meaning of a value.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

use super::{ConfigError, keys};

/// One setting as text, and where it was given, for messages.
#[derive(Clone, Debug, PartialEq)]
pub struct Given {
    /// The text, variables already substituted.
    pub text: String,
    /// `--cache-size`, `MIRRORFS_CACHE_SIZE`, `m.toml:3: cache_size`.
    pub source: String,
}

/// One replica as it was given.
#[derive(Clone, Debug, PartialEq)]
pub struct GivenReplica {
    /// Its name, if one was given.
    pub name: Option<String>,
    /// Its URL or path; may hold secrets until it is validated.
    pub url: String,
    /// Options other than name and URL.
    pub options: BTreeMap<String, String>,
    /// Where it was given.
    pub source: String,
    /// What a relative path is relative to.
    pub base: PathBuf,
}

/// One option of replicas that were given elsewhere.
#[derive(Clone, Debug, PartialEq)]
pub struct GivenOption {
    /// Name of the replica; `None` means every one.
    pub replica: Option<String>,
    /// The option.
    pub key: String,
    /// Its value; may be a secret.
    pub value: String,
    /// Where it was given.
    pub source: String,
}

/// What one source gave. Earlier layers win over later ones, key by key; replicas only as a whole list.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Layer {
    /// Settings by key.
    pub values: BTreeMap<&'static str, Given>,
    /// Replicas in order.
    pub replicas: Vec<GivenReplica>,
    /// Options added to the replicas that count in the end, whichever layer gave them.
    pub replica_options: Vec<GivenOption>,
}

impl Layer {
    /// Adds a setting; `key` must be one of [`keys`].
    pub fn set(&mut self, key: &str, text: impl Into<String>, source: impl Into<String>) {
        if let Some(key) = keys::known(key) {
            self.values.insert(key, Given { text: text.into(), source: source.into() });
        }
    }

    /// Adds an option of a replica, written as `[NAME.]KEY=VALUE`.
    pub fn add_replica_option(&mut self, text: &str, source: &str) -> Result<(), ConfigError> {
        let Some((path, value)) = text.split_once('=') else {
            let detail = "must be of the form [NAME.]KEY=VALUE".to_owned();
            return Err(ConfigError::Value { place: source.to_owned(), detail });
        };
        let (replica, key) = path.rsplit_once('.').map_or((None, path), |(name, key)| (Some(name), key));
        self.replica_options.push(GivenOption {
            replica: replica.map(str::to_owned),
            key: key.replace('-', "_"),
            value: value.to_owned(),
            source: format!("{source} {path}"),
        });
        Ok(())
    }

    /// Adds a replica written as `[NAME=]URL`.
    pub fn add_replica(&mut self, text: &str, source: impl Into<String>, base: &Path) {
        let (name, url) = split_name(text);
        self.replicas.push(GivenReplica {
            name: name.map(str::to_owned),
            url: url.to_owned(),
            options: BTreeMap::new(),
            source: source.into(),
            base: base.to_owned(),
        });
    }
}

/// Splits `NAME=URL`; what stands before `=` is a name only when it is made of a name's characters.
#[must_use]
pub fn split_name(text: &str) -> (Option<&str>, &str) {
    match text.split_once('=') {
        Some((name, url)) if name.parse::<crate::ids::ReplicaName>().is_ok() => (Some(name), url),
        _ => (None, text),
    }
}

/// The part of the process's surroundings that configuration depends on, as a value so that tests can hold it.
#[derive(Clone, Debug, Default)]
pub struct Env {
    /// Environment variables.
    pub vars: BTreeMap<OsString, OsString>,
    /// Working directory.
    pub cwd: PathBuf,
}

impl Env {
    /// That of this process.
    pub fn current() -> Result<Env, ConfigError> {
        let cwd = std::env::current_dir().map_err(|error| ConfigError::WorkingDirectory { error })?;
        let mut vars: BTreeMap<OsString, OsString> = std::env::vars_os().collect();
        // At boot there may be none; the state must lie where it lies when the same user mounts by hand.
        if vars.get(std::ffi::OsStr::new("HOME")).is_none_or(|home| home.is_empty())
            // Then out of the system's list of users.
            && let Some(home) = std::env::home_dir().filter(|home| !home.as_os_str().is_empty())
        {
            vars.insert("HOME".into(), home.into());
        }
        Ok(Env { vars, cwd })
    }

    /// A variable; an empty one counts as unset.
    #[must_use]
    pub fn os(&self, name: &str) -> Option<&OsString> {
        self.vars.get(std::ffi::OsStr::new(name)).filter(|v| !v.is_empty())
    }

    /// A variable that must be text.
    pub fn text(&self, name: &str) -> Result<Option<String>, ConfigError> {
        self.os(name)
            .map(|v| {
                v.to_str()
                    .map(str::to_owned)
                    .ok_or_else(|| ConfigError::NotText { variable: name.to_owned() })
            })
            .transpose()
    }

    /// The settings given as `MIRRORFS_…`. `MIRRORFS_REPLICA` and
    /// `MIRRORFS_REPLICA_OPTION` hold any number, separated by white space.
    pub fn layer(&self) -> Result<Layer, ConfigError> {
        let mut layer = Layer::default();
        for key in keys::VOLUME_KEYS.into_iter().chain(keys::MOUNT_KEYS) {
            let variable = keys::variable(key);
            if let Some(text) = self.text(&variable)? {
                layer.set(key, text, variable);
            }
        }
        for replica in self.text("MIRRORFS_REPLICA")?.unwrap_or_default().split_whitespace() {
            layer.add_replica(replica, "MIRRORFS_REPLICA", &self.cwd);
        }
        let variable = "MIRRORFS_REPLICA_OPTION";
        for option in self.text(variable)?.unwrap_or_default().split_whitespace() {
            layer.add_replica_option(option, variable)?;
        }
        Ok(layer)
    }
}

/// What a `-o` list holds: settings, and the path of a configuration file.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct MountList {
    /// The settings.
    pub layer: Layer,
    /// `config=FILE`.
    pub config: Option<PathBuf>,
    /// `takeover`.
    pub takeover: bool,
    /// SELinux's options as they were given (`context=…`), in order: the kernel's business alone.
    pub labels: Vec<String>,
}

/// Words that mean nothing to us: they concern whoever reads fstab, or are the default, or ask for what FUSE does not have
/// and a filesystem may ignore.
const IGNORED: [&str; 24] = [
    "_netdev",
    "_rnetdev",
    "nofail",
    "auto",
    "noauto",
    "user",
    "nouser",
    "users",
    "nousers",
    "owner",
    "noowner",
    "group",
    "nogroup",
    "defaults",
    "default_permissions",
    "lazytime",
    "nolazytime",
    "iversion",
    "noiversion",
    "silent",
    "loud",
    "nomand",
    "nonempty",
    "big_writes",
];

/// The same with a value: what the kernel shows of a FUSE mount and mount(8) gives back when it remounts.
const IGNORED_VALUES: [&str; 8] =
    ["subtype", "user_id", "group_id", "rootmode", "fd", "max_read", "blksize", "comment"];

/// Words that take back a switch.
const REVERSED: [(&str, &str); 8] = [
    ("suid", "nosuid"),
    ("dev", "nodev"),
    ("exec", "noexec"),
    ("atime", "noatime"),
    ("diratime", "nodiratime"),
    ("symfollow", "nosymfollow"),
    ("async", "sync"),
    ("rw", "read_only"),
];

/// What SELinux takes.
const LABELS: [&str; 5] = ["context", "fscontext", "defcontext", "rootcontext", "seclabel"];

/// Has unknown words passed over, as `mount -s` wants it.
pub const SLOPPY: &str = "x-mirrorfs.sloppy";

/// Words of `-o` that are no keys of the file.
const TAKES_VALUE: [&str; 3] = ["config", "replica", "replica_option"];

/// Reads lists as given to `-o`, in order: `allow_other,ro,cache_size=1GiB,x-systemd.automount`. A comma within a value
/// is written `\,`, or the value stands in double quotes. The later of two words that contradict each other counts.
pub fn mount_list(lists: &[String], cwd: &Path) -> Result<MountList, ConfigError> {
    let mut found = MountList::default();
    let words: Vec<String> = lists.iter().flat_map(|list| split_list(list)).collect();
    let sloppy = words.iter().any(|word| word == SLOPPY);
    for word in words {
        let (key, value) = match word.split_once('=') {
            Some((key, value)) => (key, Some(value)),
            None => (word.as_str(), None),
        };
        let key = key.replace('-', "_");
        let source = format!("-o {key}");
        let reversed = REVERSED.iter().find(|(word, _)| *word == key);
        match (key.as_str(), value) {
            ("", None) => {}
            // util-linux keeps `X-` to itself, but mount -s and others may pass it on.
            _ if word.starts_with("x-") || word.starts_with("X-") => {}
            ("ro", None) => found.layer.set("read_only", "true", "-o ro"),
            ("relatime" | "strictatime", None) => {
                found.layer.set("noatime", "false", source.clone());
                found.layer.set("strictatime", (key == "strictatime").to_string(), source);
            }
            (_, None) if reversed.is_some() => {
                let key = reversed.map_or("", |(_, key)| key);
                found.layer.set(key, "false", source);
            }
            ("takeover", None) => found.takeover = true,
            ("config", Some(path)) => found.config = Some(cwd.join(path)),
            ("replica", Some(replica)) => found.layer.add_replica(replica, source, cwd),
            ("replica_option", Some(option)) => found.layer.add_replica_option(option, &source)?,
            (known, None) if keys::switches().any(|key| key == known) => {
                found.layer.set(known, "true", source)
            }
            (known, Some(value)) if keys::known(known).is_some() => found.layer.set(known, value, source),
            (known, None) if keys::known(known).is_some() || TAKES_VALUE.contains(&known) => {
                return Err(ConfigError::Value {
                    place: source,
                    detail: format!("needs a value: {known}=…"),
                });
            }
            (label, _) if LABELS.contains(&label) => found.labels.push(word.clone()),
            (word, None) if IGNORED.contains(&word) => {}
            (word, Some(_)) if IGNORED_VALUES.contains(&word) => {}
            (_, _) if sloppy => {}
            (unknown, _) => {
                let known = ["ro", "rw", "takeover"]
                    .into_iter()
                    .chain(TAKES_VALUE)
                    .chain(keys::VOLUME_KEYS)
                    .chain(keys::MOUNT_KEYS);
                return Err(ConfigError::UnknownOption {
                    option: unknown.to_owned(),
                    suggestion: keys::suggestion(unknown, known),
                });
            }
        }
    }
    Ok(found)
}

/// The words of a list. `\,`, `\\` and `\"` stand for the second character; a value that begins with `"` goes on to the next one.
#[must_use]
pub fn split_list(list: &str) -> Vec<String> {
    let mut words = Vec::new();
    let (mut word, mut quoted) = (String::new(), false);
    let mut chars = list.chars().peekable();
    while let Some(c) = chars.next() {
        match c {
            '\\' if chars.peek().is_some_and(|n| matches!(n, ',' | '\\' | '"')) => word.extend(chars.next()),
            '"' if quoted || word.ends_with('=') => quoted = !quoted,
            ',' if !quoted => words.push(std::mem::take(&mut word)),
            _ => word.push(c),
        }
    }
    words.push(word);
    words
}

/// `value` as [`split_list`] reads it back.
#[must_use]
pub fn escape_value(value: &str) -> String {
    let mut out = String::with_capacity(value.len());
    for c in value.chars() {
        if matches!(c, ',' | '\\' | '"') {
            out.push('\\');
        }
        out.push(c);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(text: &str) -> Result<MountList, String> {
        mount_list(&[text.to_owned()], Path::new("/base")).map_err(|e| e.to_string())
    }

    fn values(list: &MountList) -> Vec<(&str, &str)> {
        list.layer.values.iter().map(|(k, g)| (*k, g.text.as_str())).collect()
    }

    #[test]
    fn what_fstab_gives_is_taken_or_passed_over() {
        let found = list("rw,_netdev,nofail,noauto,user,x-systemd.automount,comment=a,defaults,,").unwrap();
        assert_eq!(values(&found), [("read_only", "false")]);
        assert!(!found.takeover && list("ro,takeover").unwrap().takeover);
        assert!(list("takeover=yes").is_err());
        let found = list("allow_other,ro,noatime").unwrap();
        assert_eq!(values(&found), [("allow_other", "true"), ("noatime", "true"), ("read_only", "true")]);
    }

    #[test]
    fn the_later_of_a_word_and_its_reverse_wins() {
        let found = list("user,noexec,nosuid,nodev,exec,relatime,sync,dirsync,async").unwrap();
        assert_eq!(
            values(&found),
            [
                ("dirsync", "true"),
                ("noatime", "false"),
                ("nodev", "true"),
                ("noexec", "false"),
                ("nosuid", "true"),
                ("strictatime", "false"),
                ("sync", "false")
            ]
        );
        let found = list("noatime,strictatime,diratime,nodiratime").unwrap();
        assert_eq!(values(&found), [("noatime", "false"), ("nodiratime", "true"), ("strictatime", "true")]);
        let found = list("user_id=0,group_id=0,max_read=4096,X-mount.mkdir=0755,subtype=mirrorfs").unwrap();
        assert_eq!(found, MountList::default());
    }

    #[test]
    fn commas_are_escaped_or_quoted() {
        let found = list(r#"context="u:r:t:s0:c1,c2",fsname=a\,b\"c"#).unwrap();
        assert_eq!(found.labels, ["context=u:r:t:s0:c1,c2"]);
        assert_eq!(values(&found), [("fsname", "a,b\"c")]);
        for odd in ["a,b", "\\", "\"x\"", "x\\,\"y", "", "a=b"] {
            let words = split_list(&format!("k={},l", escape_value(odd)));
            assert_eq!(words, [format!("k={odd}"), "l".to_owned()]);
        }
    }

    #[test]
    fn keys_take_values_and_the_later_wins() {
        let found = list(
            "cache_size=1GiB,cache-size=2GiB,config=m.toml,replica=b=/mnt/b\\,c,state=/s,allow_other=no",
        )
        .unwrap();
        assert_eq!(values(&found), [("allow_other", "no"), ("cache_size", "2GiB"), ("state", "/s")]);
        assert_eq!(found.config, Some("/base/m.toml".into()));
        assert_eq!(found.layer.replicas[0].name.as_deref(), Some("b"));
        assert_eq!(found.layer.replicas[0].url, "/mnt/b,c");
        assert_eq!(found.layer.values["cache_size"].source, "-o cache_size");
    }

    #[test]
    fn an_unknown_option_is_refused_with_the_nearest_one() {
        assert_eq!(
            list("alow_other").unwrap_err(),
            "-o alow_other: unknown option; did you mean \"allow_other\"?"
        );
        assert_eq!(
            list("cachesize=1").unwrap_err(),
            "-o cachesize: unknown option; did you mean \"cache_size\"?"
        );
        assert!(list("huge_writes").unwrap_err().contains("known are ro, rw, takeover, config"));
        list("huge_writes,x-mirrorfs.sloppy").unwrap();
        assert_eq!(list("cache_size").unwrap_err(), "-o cache_size: needs a value: cache_size=…");
        assert_eq!(list("config").unwrap_err(), "-o config: needs a value: config=…");
    }

    #[test]
    fn a_name_is_what_stands_before_the_first_equals_sign() {
        assert_eq!(split_name("a=/x"), (Some("a"), "/x"));
        assert_eq!(split_name("/x=y"), (None, "/x=y"));
        assert_eq!(split_name("s3://b/p?region=x"), (None, "s3://b/p?region=x"));
        assert_eq!(split_name("off.site=s3://b/p?region=x"), (Some("off.site"), "s3://b/p?region=x"));
    }

    #[test]
    fn a_replica_option_names_its_replica_or_means_all() {
        let found =
            list("replica_option=off.site.endpoint=http://h:1,replica_option=allow-http=yes").unwrap();
        let options: Vec<_> = found.layer.replica_options.iter().collect();
        assert_eq!((options[0].replica.as_deref(), options[0].key.as_str()), (Some("off.site"), "endpoint"));
        assert_eq!((options[1].replica.as_deref(), options[1].key.as_str()), (None, "allow_http"));
        assert_eq!(options[1].value, "yes");
        assert_eq!(
            list("replica_option=region").unwrap_err(),
            "-o replica_option: must be of the form [NAME.]KEY=VALUE"
        );
    }

    #[test]
    fn the_environment_gives_keys_and_replicas() {
        let env = Env {
            vars: [
                ("MIRRORFS_CACHE_SIZE", "1GiB"),
                ("MIRRORFS_REPLICA", "/a  b=/b\n/c"),
                ("MIRRORFS_FSYNC", ""),
            ]
            .map(|(k, v)| (k.into(), v.into()))
            .into(),
            cwd: "/base".into(),
        };
        let layer = env.layer().unwrap();
        assert_eq!(layer.values.len(), 1);
        assert_eq!(layer.values["cache_size"].source, "MIRRORFS_CACHE_SIZE");
        let urls: Vec<&str> = layer.replicas.iter().map(|r| r.url.as_str()).collect();
        assert_eq!(urls, ["/a", "/b", "/c"]);
    }
}
