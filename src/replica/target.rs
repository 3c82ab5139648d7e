//! Stand-in until the replica branch brings the real one.
#![allow(missing_docs)]

use std::collections::BTreeMap;

use crate::ids::ReplicaName;

#[derive(Clone, Debug, PartialEq)]
pub struct ReplicaSpec {
    pub name: ReplicaName,
    pub url: String,
    pub options: BTreeMap<String, String>,
}

impl ReplicaSpec {
    pub fn parse(
        name: ReplicaName,
        url: &str,
        options: &BTreeMap<String, String>,
    ) -> Result<ReplicaSpec, String> {
        if url.is_empty() {
            return Err("a replica needs a URL".into());
        }
        Ok(ReplicaSpec { name, url: url.to_owned(), options: options.clone() })
    }

    pub fn local_path(&self) -> Option<&std::path::Path> {
        let path = self.url.strip_prefix("file://").unwrap_or(&self.url);
        path.starts_with('/').then(|| std::path::Path::new(path))
    }
}

pub fn same_place(a: &ReplicaSpec, b: &ReplicaSpec) -> bool {
    a.url.trim_end_matches('/') == b.url.trim_end_matches('/')
}
