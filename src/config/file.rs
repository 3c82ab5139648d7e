//! The configuration file: TOML into a layer of raw settings, with lines for messages and `${VAR}` substituted.
//!
//! Knows the file's shape (top keys, `[replica.NAME]` or `[[replica]]`, `[mount]`), not what values mean. It walks the
//! spanned tree by hand rather than through serde, because serde's answer to an unknown key names neither the nearest
//! known one nor, for nested tables, its own line.

use std::collections::BTreeMap;
use std::path::Path;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::layer::{Env, GivenReplica, Layer};
use super::{ConfigError, keys};

/// Reads the file at `path`.
pub fn read(path: &Path, env: &Env) -> Result<Layer, ConfigError> {
    let text =
        std::fs::read_to_string(path).map_err(|error| ConfigError::Read { path: path.to_owned(), error })?;
    parse(&text, path, env)
}

/// Reads `text`; `path` is its name in messages, and relative paths in it are relative to its folder.
pub fn parse(text: &str, path: &Path, env: &Env) -> Result<Layer, ConfigError> {
    let file = File { text, path, env };
    let table = DeTable::parse(text).map_err(|error| ConfigError::Value {
        place: file.at(error.span().map_or(0, |s| s.start)),
        detail: format!("not valid TOML: {}", error.message()),
    })?;
    file.top(table.get_ref())
}

struct File<'a> {
    text: &'a str,
    path: &'a Path,
    env: &'a Env,
}

type Entry<'a, 'i> = (&'a str, &'a Spanned<DeValue<'i>>, usize);

impl File<'_> {
    fn top(&self, table: &DeTable<'_>) -> Result<Layer, ConfigError> {
        let mut layer = Layer::default();
        for (key, value, at) in in_order(table) {
            match (key, value.get_ref()) {
                ("replica", DeValue::Table(replicas)) => {
                    for (name, replica, at) in in_order(replicas) {
                        let DeValue::Table(options) = replica.get_ref() else {
                            return Err(self.wrong(
                                at,
                                "replica",
                                "write each replica as a table: [replica.NAME] with a url",
                            ));
                        };
                        layer.replicas.push(self.replica(Some(name), options, at)?);
                    }
                }
                ("replica", DeValue::Array(replicas)) => {
                    for replica in replicas.iter() {
                        let at = replica.span().start;
                        let DeValue::Table(options) = replica.get_ref() else {
                            return Err(self.wrong(
                                at,
                                key,
                                "write each replica as a table: [[replica]] with a url",
                            ));
                        };
                        layer.replicas.push(self.replica(None, options, at)?);
                    }
                }
                ("mount", DeValue::Table(options)) => {
                    for (key, value, at) in in_order(options) {
                        if !keys::MOUNT_KEYS.contains(&key) {
                            return Err(self.unknown(at, &format!("mount.{key}"), key, &keys::MOUNT_KEYS));
                        }
                        let path = format!("mount.{key}");
                        layer.set(key, self.scalar(value.get_ref(), at, &path)?, self.key_at(at, &path));
                    }
                }
                ("replica" | "mount", _) => return Err(self.wrong(at, key, "must be a table")),
                _ if keys::VOLUME_KEYS.contains(&key) => {
                    let mut text = self.scalar(value.get_ref(), at, key)?;
                    if key == "state" {
                        text = self.base().join(text).to_string_lossy().into_owned();
                    }
                    layer.set(key, text, self.key_at(at, key));
                }
                _ => {
                    let known: Vec<&str> = keys::VOLUME_KEYS.into_iter().chain(keys::TABLES).collect();
                    return Err(self.unknown(at, key, key, &known));
                }
            }
        }
        Ok(layer)
    }

    fn replica(
        &self,
        name: Option<&str>,
        table: &DeTable<'_>,
        at: usize,
    ) -> Result<GivenReplica, ConfigError> {
        let prefix = name.map_or_else(|| "replica".to_owned(), |n| format!("replica.{n}"));
        let mut options = BTreeMap::new();
        for (key, value, at) in in_order(table) {
            let text = self.scalar(value.get_ref(), at, &format!("{prefix}.{key}"))?;
            options.insert(key.to_owned(), text);
        }
        let own_name = if name.is_none() { options.remove("name") } else { None };
        let Some(url) = options.remove("url") else {
            return Err(self.wrong(
                at,
                &prefix,
                "has no url; give it one: url = \"s3://bucket/prefix\" or a path",
            ));
        };
        Ok(GivenReplica {
            name: name.map(str::to_owned).or(own_name),
            url,
            options,
            source: self.key_at(at, &prefix),
            base: self.base().to_owned(),
        })
    }

    fn scalar(&self, value: &DeValue<'_>, at: usize, key: &str) -> Result<String, ConfigError> {
        match value {
            DeValue::String(text) => substitute(text, &|name| self.env.text(name).ok().flatten())
                .map_err(|detail| self.wrong(at, key, &detail)),
            DeValue::Integer(number) if number.radix() == 10 => Ok(number.as_str().to_owned()),
            DeValue::Integer(_) => Err(self.wrong(at, key, "write the number in decimal")),
            DeValue::Float(number) => Ok(number.as_str().to_owned()),
            DeValue::Boolean(yes) => Ok(yes.to_string()),
            DeValue::Datetime(_) | DeValue::Array(_) | DeValue::Table(_) => {
                Err(self.wrong(at, key, "must be a string, a number, true or false"))
            }
        }
    }

    fn base(&self) -> &Path {
        self.path.parent().unwrap_or(Path::new("/"))
    }

    fn at(&self, offset: usize) -> String {
        let before = self.text.get(..offset).unwrap_or(self.text);
        format!("{}:{}", self.path.display(), before.matches('\n').count() + 1)
    }

    fn key_at(&self, offset: usize, key: &str) -> String {
        format!("{}: {key}", self.at(offset))
    }

    fn wrong(&self, at: usize, key: &str, detail: &str) -> ConfigError {
        ConfigError::Value { place: self.key_at(at, key), detail: detail.to_owned() }
    }

    fn unknown(&self, at: usize, path: &str, key: &str, known: &[&str]) -> ConfigError {
        ConfigError::UnknownKey {
            place: self.key_at(at, path),
            suggestion: keys::suggestion(key, known.iter().copied()),
        }
    }
}

/// Entries in the order of the file: the parser sorts them by name, but the order of replicas is the person's.
fn in_order<'a, 'i>(table: &'a DeTable<'i>) -> Vec<Entry<'a, 'i>> {
    let mut entries: Vec<Entry<'a, 'i>> =
        table.iter().map(|(key, value)| (key.get_ref().as_ref(), value, key.span().start)).collect();
    entries.sort_by_key(|(_, _, at)| *at);
    entries
}

/// Replaces `${NAME}` by the variable's value and `$$` by `$`. Done on values after parsing, so that no value can change
/// the file's structure.
fn substitute(text: &str, lookup: &dyn Fn(&str) -> Option<String>) -> Result<String, String> {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(dollar) = rest.find('$') {
        out.push_str(&rest[..dollar]);
        rest = &rest[dollar + 1..];
        if let Some(after) = rest.strip_prefix('$') {
            out.push('$');
            rest = after;
        } else if let Some(after) = rest.strip_prefix('{') {
            let Some((name, after)) = after.split_once('}') else {
                return Err("\"${\" is not closed by \"}\"".to_owned());
            };
            let well_formed = !name.is_empty() && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_');
            if !well_formed {
                return Err(format!("\"${{{name}}}\" is not the name of a variable"));
            }
            out.push_str(&lookup(name).ok_or_else(|| {
                format!("the variable {name} is not set (or not text); set it, or write $$ for a literal dollar sign")
            })?);
            rest = after;
        } else {
            return Err("\"$\" must be followed by {NAME}; write $$ for a literal dollar sign".to_owned());
        }
    }
    out.push_str(rest);
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Layer, String> {
        let env = Env {
            vars: [("BUCKET", "b1"), ("TRICK", "x\"\nread_only = true")]
                .map(|(k, v)| (k.into(), v.into()))
                .into(),
            cwd: "/".into(),
        };
        parse(text, Path::new("/etc/m.toml"), &env).map_err(|e| e.to_string())
    }

    #[test]
    fn a_whole_file() {
        let layer = read(concat!(
            "cache_size = \"1GiB\"\nread_only = false\nfsync_timeout = 30\nstate = \"s\"\n\n",
            "[replica.z]\nurl = \"s3://${BUCKET}/p$$\"\nregion = \"eu-1\"\n",
            "[replica.a]\nurl = \"copy\"\n[mount]\nallow_other = true\n"
        ))
        .unwrap();
        let values: Vec<_> =
            layer.values.iter().map(|(k, g)| (*k, g.text.as_str(), g.source.as_str())).collect();
        assert_eq!(
            values,
            [
                ("allow_other", "true", "/etc/m.toml:12: mount.allow_other"),
                ("cache_size", "1GiB", "/etc/m.toml:1: cache_size"),
                ("fsync_timeout", "30", "/etc/m.toml:3: fsync_timeout"),
                ("read_only", "false", "/etc/m.toml:2: read_only"),
                ("state", "/etc/s", "/etc/m.toml:4: state"),
            ]
        );
        let [z, a] = &layer.replicas[..] else { panic!("{:?}", layer.replicas) };
        assert_eq!((z.name.as_deref(), z.url.as_str()), (Some("z"), "s3://b1/p$"));
        assert_eq!(z.options, [("region".to_owned(), "eu-1".to_owned())].into());
        assert_eq!(z.source, "/etc/m.toml:6: replica.z");
        assert_eq!(
            (a.name.as_deref(), a.url.as_str(), a.base.as_path()),
            (Some("a"), "copy", Path::new("/etc"))
        );
    }

    #[test]
    fn replicas_as_a_list_keep_their_order_and_may_have_names() {
        let layer = read("[[replica]]\nurl = \"/b\"\n[[replica]]\nname = \"x\"\nurl = \"/a\"\n").unwrap();
        let found: Vec<_> = layer.replicas.iter().map(|r| (r.name.as_deref(), r.url.as_str())).collect();
        assert_eq!(found, [(None, "/b"), (Some("x"), "/a")]);
    }

    #[test]
    fn a_variable_cannot_change_the_structure() {
        let layer = read("state = \"/${TRICK}\"").unwrap();
        assert_eq!(layer.values.len(), 1);
        assert_eq!(layer.values["state"].text, "/x\"\nread_only = true");
    }

    #[test]
    fn every_error_names_line_key_and_remedy() {
        for (text, message) in [
            ("\ncachesize = 1", "/etc/m.toml:2: cachesize: unknown key; did you mean \"cache_size\"?"),
            ("[replicas.a]\nurl=\"/a\"", "/etc/m.toml:1: replicas: unknown key; did you mean \"replica\"?"),
            (
                "[mount]\n\nalow_other = true",
                "/etc/m.toml:3: mount.alow_other: unknown key; did you mean \"allow_other\"?",
            ),
            (
                "state = \"${NOPE}\"",
                "/etc/m.toml:1: state: the variable NOPE is not set (or not text); set it, or write $$ for a literal dollar sign",
            ),
            (
                "[replica.a]\nurl = \"s3://${NOPE}\"",
                "/etc/m.toml:2: replica.a.url: the variable NOPE is not set (or not text); set it, or write $$ for a literal dollar sign",
            ),
            ("state = \"${HOME\"", "/etc/m.toml:1: state: \"${\" is not closed by \"}\""),
            ("state = \"${a-b}\"", "/etc/m.toml:1: state: \"${a-b}\" is not the name of a variable"),
            (
                "state = \"a$b\"",
                "/etc/m.toml:1: state: \"$\" must be followed by {NAME}; write $$ for a literal dollar sign",
            ),
            ("state = [1]", "/etc/m.toml:1: state: must be a string, a number, true or false"),
            ("cache_size = 0x10", "/etc/m.toml:1: cache_size: write the number in decimal"),
            (
                "[replica.a]\nregion = \"x\"",
                "/etc/m.toml:1: replica.a: has no url; give it one: url = \"s3://bucket/prefix\" or a path",
            ),
            ("replica = \"/a\"", "/etc/m.toml:1: replica: must be a table"),
            (
                "replica = [\"/a\"]",
                "/etc/m.toml:1: replica: write each replica as a table: [[replica]] with a url",
            ),
            (
                "[replica]\na = \"/a\"",
                "/etc/m.toml:2: replica: write each replica as a table: [replica.NAME] with a url",
            ),
        ] {
            assert_eq!(read(text).unwrap_err(), message, "{text}");
        }
        let error = read("state = \"x\"\nfsync = = 1").unwrap_err();
        assert!(error.starts_with("/etc/m.toml:2: not valid TOML: "), "{error}");
    }

    #[test]
    fn a_missing_file_is_named() {
        let error = super::read(Path::new("/nonexistent/m.toml"), &Env::default()).unwrap_err().to_string();
        assert!(
            error.starts_with("cannot read the configuration /nonexistent/m.toml: No such file"),
            "{error}"
        );
    }
}
