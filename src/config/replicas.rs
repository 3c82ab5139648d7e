//! The list of replicas: names for those without one, all places distinct.
//!
//! What URL and options mean is [`crate::replica::target`]'s; this file knows only that a replica is a name and a place.

use std::collections::{BTreeMap, BTreeSet};

use super::ConfigError;
use super::layer::GivenReplica;
use crate::ids::ReplicaName;
use crate::replica::target::{self, ReplicaSpec};

/// Checks each replica and the list as a whole.
pub(super) fn resolve(given: &[GivenReplica]) -> Result<Vec<ReplicaSpec>, ConfigError> {
    if given.is_empty() {
        return Err(ConfigError::NoReplica);
    }
    let derived = derived_names(given);
    let mut specs: Vec<(ReplicaSpec, &str)> = Vec::with_capacity(given.len());
    for (replica, derived) in given.iter().zip(&derived) {
        let wrong = |detail: String| ConfigError::Value { place: replica.source.clone(), detail };
        let name: ReplicaName = replica.name.as_deref().unwrap_or(derived).parse().map_err(wrong)?;
        let spec = ReplicaSpec::parse(name, &absolute(replica), &replica.options).map_err(wrong)?;
        for (earlier, source) in &specs {
            if earlier.name == spec.name {
                return Err(ConfigError::SameName {
                    name: spec.name.to_string(),
                    one: (*source).to_owned(),
                    other: replica.source.clone(),
                });
            }
            if target::same_place(earlier, &spec) {
                return Err(ConfigError::SamePlace {
                    one: earlier.name.to_string(),
                    other: spec.name.to_string(),
                    url: spec.url.clone(),
                });
            }
        }
        specs.push((spec, &replica.source));
    }
    Ok(specs.into_iter().map(|(spec, _)| spec).collect())
}

/// The URL, or the absolute form of a plain path.
pub(super) fn absolute(replica: &GivenReplica) -> String {
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
            "two replicas are named \"a\" (--replica a=/x and --replica a=/y); give each its own name"
        );
        assert_eq!(
            error(&["a=/x", "b=/x/"]),
            "the replicas a and b are the same place (/x/); losing it would lose both, so name it once"
        );
    }
}
