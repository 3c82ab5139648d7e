//! The list of replicas: names for those without one, all places distinct.
//!
//! What URL and options mean is [`ReplicaSpec`]'s business; this file knows only that a replica is a name and a place.

use std::collections::{BTreeMap, BTreeSet};

use super::layer::{GivenOption, GivenReplica};
use super::{ConfigError, keys};
use crate::ids::ReplicaName;
use crate::replica::{ReplicaSpec, check_distinct};

/// Checks each replica and the list as a whole.
pub(super) fn resolve(
    given: &[GivenReplica],
    extra: &[&GivenOption],
) -> Result<Vec<ReplicaSpec>, ConfigError> {
    if given.is_empty() {
        return Err(ConfigError::NoReplica);
    }
    let mut specs: Vec<ReplicaSpec> = Vec::with_capacity(given.len());
    for (replica, derived) in given.iter().zip(derived_names(given)) {
        let name = replica.name.as_deref().unwrap_or(&derived);
        let mut options = replica.options.clone();
        for option in extra.iter().filter(|o| o.replica.as_deref().is_none_or(|n| n == name)) {
            options.insert(option.key.clone(), option.value.clone());
        }
        let name: ReplicaName =
            name.parse().map_err(|detail| ConfigError::Value { place: replica.source.clone(), detail })?;
        let spec = ReplicaSpec::parse(name, &replica.url, options, &replica.base)
            .map_err(|error| ConfigError::Replica { place: replica.source.clone(), error })?;
        specs.push(spec);
    }
    let names: Vec<&str> = specs.iter().map(|s| s.name.as_str()).collect();
    for option in extra {
        if let Some(name) = option.replica.as_deref().filter(|n| !names.contains(n)) {
            let near = keys::suggestion(name, names.iter().copied());
            let detail = format!("no replica is called {name}{near}");
            return Err(ConfigError::Value { place: option.source.clone(), detail });
        }
    }
    check_distinct(&specs).map_err(ConfigError::Replicas)?;
    Ok(specs)
}

/// The replica that `from` names: by its name in the other sources, or else as `[NAME=]URL`.
pub(super) fn find(
    from: &GivenReplica,
    given: &[GivenReplica],
    extra: &[&GivenOption],
) -> Result<Option<ReplicaSpec>, ConfigError> {
    let named = from.name.is_none() && given.iter().any(|r| r.name.as_deref() == Some(from.url.as_str()));
    let list = if named { given } else { std::slice::from_ref(from) };
    let mut specs = resolve(list, extra)?.into_iter();
    Ok(if named { specs.find(|s| s.name.as_str() == from.url) } else { specs.next() })
}

/// The URL, or the absolute form of a plain path.
fn absolute(replica: &GivenReplica) -> String {
    if replica.url.is_empty() || replica.url.contains("://") {
        return replica.url.clone();
    }
    replica.base.join(&replica.url).to_string_lossy().into_owned()
}

/// A name for each replica out of its URL alone, so that it stays the same when the list changes. Those that would get
/// the same name, or a name that was given to another, get a piece of their URL's hash as well.
fn derived_names(given: &[GivenReplica]) -> Vec<String> {
    let words: Vec<String> = given.iter().map(|r| word(&absolute(r))).collect();
    let taken: BTreeSet<&str> = given.iter().filter_map(|r| r.name.as_deref()).collect();
    let mut count: BTreeMap<&str, usize> = BTreeMap::new();
    for (word, _) in words.iter().zip(given).filter(|(_, r)| r.name.is_none()) {
        *count.entry(word).or_default() += 1;
    }
    words
        .iter()
        .zip(given)
        .map(|(word, replica)| {
            if count.get(word.as_str()).is_some_and(|n| *n > 1) || taken.contains(word.as_str()) {
                let hash = blake3::hash(absolute(replica).trim_end_matches('/').as_bytes()).to_hex();
                format!("{word}-{}", &hash[..6])
            } else {
                word.clone()
            }
        })
        .collect()
}

/// The last part of a path, the bucket of a cloud's URL.
fn word(url: &str) -> String {
    let (scheme, rest) = url.split_once("://").unwrap_or(("file", url));
    let place = rest.split(['?', '#']).next().unwrap_or_default();
    let part = if scheme == "file" {
        place.rsplit('/').find(|p| !p.is_empty())
    } else {
        place.split('/').next().and_then(|authority| authority.rsplit('@').next())
    };
    let ok = |c: char| if c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-') { c } else { '_' };
    let word: String = part.unwrap_or_default().chars().take(50).map(ok).collect();
    if word.is_empty() { "replica".to_owned() } else { word }
}

#[cfg(test)]
mod tests {
    use super::super::tests::load;

    fn names(urls: &[&str]) -> Vec<String> {
        load(urls, &[]).unwrap().replicas.iter().map(|r| r.name.to_string()).collect()
    }

    #[test]
    fn names_come_from_the_place() {
        assert_eq!(names(&["/mnt/disk one/", "s3://bucket/deep/prefix"]), ["disk_one", "bucket"]);
        assert_eq!(names(&["off=/mnt/a", "b"]), ["off", "b"]);
    }

    #[test]
    fn equal_names_get_a_hash_that_does_not_depend_on_the_order() {
        let mut one = names(&["/x/copy", "/y/copy"]);
        let mut other = names(&["/y/copy", "/x/copy"]);
        other.reverse();
        assert_eq!(one, other);
        assert!(one[0].starts_with("copy-") && one[0] != one[1], "{one:?}");
        one = names(&["copy=/x/a", "/y/copy"]);
        assert!(one[1].starts_with("copy-"), "{one:?}");
    }

    #[test]
    fn a_list_without_sense_is_refused() {
        let error = |urls: &[&str]| load(urls, &[]).unwrap_err().to_string();
        assert!(error(&[]).starts_with("no replica is given; name at least one with --replica"));
        assert_eq!(
            error(&["a=/x", "a=/y"]),
            "two replicas are called a: give each a name of its own (NAME=URL)"
        );
        assert_eq!(
            error(&["a=/x", "b=/x/"]),
            "replicas a and b are the same folder /x: losing it would lose both; give each a place of its own"
        );
    }
}
