//! Which replicas a volume has: those of the configuration, and what `mirrorfs replica` has changed since.
//!
//! Owns `members.json` in the state folder (mode 0600, since options may hold secrets) and the rule by which it and the configuration come
//! to one list. Knows nothing of a replica but its description.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::Error;
use super::state::write_durably;
use crate::exit::Exit;
use crate::ids::ReplicaName;
use crate::private;
use crate::replica::{ReplicaSpec, Store, check_distinct};

/// Name of the file in the state folder.
pub(super) const FILE: &str = "members.json";
/// Version of its content.
const VERSION: u32 = 1;

/// What to tell whoever mounts about folders that other users of the machine may enter: once for
/// each mount, since they may be open on purpose.
pub(super) async fn open_to_others(state: &Path, stores: &[Store]) -> Vec<String> {
    let state = private::Open::look(state).map(|open| open.warning("the state folder"));
    let replicas = futures::future::join_all(stores.iter().map(|store| async {
        let open = store.open_to_others().await?;
        Some(open.warning(&format!("the folder of replica {}", store.name())))
    }));
    state.into_iter().chain(replicas.await.into_iter().flatten()).collect()
}

/// A replica that was attached while the volume was mounted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Added {
    pub name: ReplicaName,
    pub url: String,
    #[serde(default)]
    pub options: BTreeMap<String, String>,
    /// The server that the URL is meant at: two servers may have buckets of one name.
    #[serde(default)]
    pub service: Option<String>,
}

/// A replica of the configuration that was detached.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Removed {
    pub name: ReplicaName,
    pub url: String,
    /// As above.
    #[serde(default)]
    pub service: Option<String>,
}

/// Whether a place is that of a replica.
fn is_place(url: &str, service: Option<&str>, spec: &ReplicaSpec) -> bool {
    url == spec.url && service.is_none_or(|service| service == spec.service())
}

impl Added {
    fn is(&self, spec: &ReplicaSpec) -> bool {
        is_place(&self.url, self.service.as_deref(), spec)
    }
}

impl Removed {
    fn is(&self, spec: &ReplicaSpec) -> bool {
        is_place(&self.url, self.service.as_deref(), spec)
    }
}

/// What was changed by command.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Members {
    version: u32,
    #[serde(default)]
    pub attached: Vec<Added>,
    #[serde(default)]
    pub detached: Vec<Removed>,
    /// Those to which nothing is shipped.
    #[serde(default)]
    pub paused: BTreeSet<ReplicaName>,
    /// Those that are being filled for the first time; with the one that goes when that is done.
    #[serde(default)]
    pub joining: BTreeMap<ReplicaName, Option<ReplicaName>>,
}

impl Members {
    /// Reads the file of a state folder; nothing was changed when there is none.
    pub fn read(state: &Path) -> Result<Self, Error> {
        let path = state.join(FILE);
        let failed = |why: String| {
            Error::new(
                Exit::Damaged,
                format!(
                    "{}: {why}: it lists replicas that were attached or detached by command; remove it to go on with those of \
                     the configuration",
                    path.display()
                ),
            )
        };
        match super::state::read_at_most(&path, crate::format::MAX_JSON as u64) {
            Ok(bytes) => {
                let members: Self = serde_json::from_slice(&bytes).map_err(|e| failed(e.to_string()))?;
                match members.version {
                    VERSION => Ok(members),
                    v => Err(Error::new(
                        Exit::TooNew,
                        format!(
                            "{} has version {v}, this mirrorfs knows {VERSION}: use the newer mirrorfs",
                            path.display()
                        ),
                    )),
                }
            }
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(Self::default()),
            Err(e) => Err(failed(e.to_string())),
        }
    }

    /// Writes the file durably.
    pub fn write(&self, state: &Path) -> io::Result<()> {
        let members = Self { version: VERSION, ..self.clone() };
        write_durably(state, FILE, &serde_json::to_vec_pretty(&members)?)
    }

    /// The volume's replicas: those of the configuration but the detached ones, then the attached ones. Two with one name or in one place
    /// are an error.
    pub fn apply(&self, configured: &[ReplicaSpec]) -> Result<Vec<ReplicaSpec>, Error> {
        let usage = |e: &dyn std::fmt::Display| Error::new(Exit::Usage, e.to_string());
        let gone = |spec: &ReplicaSpec| self.detached.iter().any(|d| d.is(spec));
        let mut specs: Vec<ReplicaSpec> = configured.iter().filter(|s| !gone(s)).cloned().collect();
        for added in &self.attached {
            if specs.iter().any(|s| added.is(s)) {
                // It stands in the configuration by now.
                continue;
            }
            if let Some(other) = specs.iter().find(|s| s.name == added.name) {
                return Err(Error::new(
                    Exit::Usage,
                    format!(
                        "replica {} is {} in the configuration, but {} was attached under that name: give the other one another name",
                        added.name, other.url, added.url
                    ),
                ));
            }
            specs.push(added.spec().map_err(|e| usage(&e))?);
        }
        if specs.is_empty() {
            return Err(Error::new(
                Exit::Usage,
                format!(
                    "every replica that is given was detached by command: attach one again, or remove {FILE} from the state folder"
                ),
            ));
        }
        check_distinct(&specs).map_err(|e| usage(&e))?;
        Ok(specs)
    }

    /// What to tell whoever mounts about the differences.
    pub fn notes(&self, configured: &[ReplicaSpec]) -> Vec<String> {
        let detached = self.detached.iter().filter(|d| configured.iter().any(|s| d.is(s))).map(|d| {
            format!(
                "replica {} ({}) stays out: it was detached by command; take it out of the configuration too",
                d.name, d.url
            )
        });
        let attached = self.attached.iter().filter(|a| !configured.iter().any(|s| a.is(s))).map(|a| {
            format!("replica {} ({}) was attached by command; add it to the configuration too", a.name, a.url)
        });
        detached.chain(attached).collect()
    }

    /// Takes a replica in that will be filled; `replaces` goes when that is done.
    pub fn attach(&mut self, spec: &ReplicaSpec, replaces: Option<ReplicaName>) {
        self.detached.retain(|d| !d.is(spec));
        self.attached.retain(|a| !a.is(spec));
        self.attached.push(Added {
            name: spec.name.clone(),
            url: spec.url.clone(),
            options: spec.options.clone(),
            service: Some(spec.service()),
        });
        self.joining.insert(spec.name.clone(), replaces);
        self.paused.remove(&spec.name);
    }

    /// Lets a replica go.
    pub fn detach(&mut self, spec: &ReplicaSpec) {
        self.attached.retain(|a| !a.is(spec));
        self.detached.retain(|d| !d.is(spec));
        // Also when it was attached by command: it may stand in the configuration by now.
        let (name, url, service) = (spec.name.clone(), spec.url.clone(), Some(spec.service()));
        self.detached.push(Removed { name, url, service });
        self.joining.remove(&spec.name);
        for old in self.joining.values_mut() {
            if old.as_ref() == Some(&spec.name) {
                *old = None;
            }
        }
        self.paused.remove(&spec.name);
    }
}

impl Added {
    fn spec(&self) -> Result<ReplicaSpec, crate::replica::TargetError> {
        // The URL is in normal form: no relative paths.
        ReplicaSpec::parse(self.name.clone(), &self.url, self.options.clone(), &PathBuf::from("/"))
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn spec(name: &str, url: &str) -> ReplicaSpec {
        ReplicaSpec::parse(name.parse().unwrap(), url, BTreeMap::new(), Path::new("/")).unwrap()
    }

    fn names(specs: &[ReplicaSpec]) -> Vec<&str> {
        specs.iter().map(|s| s.name.as_str()).collect()
    }

    #[test]
    fn commands_outlast_the_configuration() {
        let configured = [spec("a", "/r/a"), spec("b", "/r/b")];
        let mut members = Members::default();
        assert_eq!(names(&members.apply(&configured).unwrap()), ["a", "b"]);
        members.attach(&spec("c", "/r/c"), Some("b".parse().unwrap()));
        assert_eq!(names(&members.apply(&configured).unwrap()), ["a", "b", "c"]);
        members.detach(&configured[1]);
        assert_eq!(members.joining.values().flatten().count(), 0);
        assert_eq!(names(&members.apply(&configured).unwrap()), ["a", "c"]);
        assert_eq!(members.notes(&configured).len(), 2);
        // Written into the configuration, under another name even.
        let later = [spec("a", "/r/a"), spec("third", "/r/c")];
        assert_eq!(names(&members.apply(&later).unwrap()), ["a", "third"]);
        assert_eq!(members.notes(&later), Vec::<String>::new());
        // Back again.
        members.attach(&configured[1], None);
        assert_eq!(names(&members.apply(&configured).unwrap()), ["a", "b", "c"]);
        let clash = [spec("c", "/r/other")];
        assert!(members.apply(&clash).unwrap_err().to_string().contains("another name"));
        members.detach(&configured[0]);
        assert!(members.apply(&configured[..1]).is_ok(), "attached ones are left");
    }

    #[test]
    fn one_url_at_two_servers_is_two_places() {
        let at = |name: &str, server: &str| {
            let options = BTreeMap::from([("endpoint".to_owned(), server.to_owned())]);
            ReplicaSpec::parse(name.parse().unwrap(), "s3://b/p", options, Path::new("/")).unwrap()
        };
        let configured = [at("a", "https://one"), at("b", "https://two")];
        let mut members = Members::default();
        members.detach(&configured[0]);
        assert_eq!(names(&members.apply(&configured).unwrap()), ["b"]);
        members.attach(&at("c", "https://three"), None);
        assert_eq!(names(&members.apply(&configured).unwrap()), ["b", "c"]);
    }

    #[test]
    fn the_file_round_trips_and_is_private() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(Members::read(dir.path()).unwrap(), Members::default());
        let mut members = Members::default();
        members.attach(&spec("c", "/r/c"), None);
        members.paused.insert("a".parse().unwrap());
        members.write(dir.path()).unwrap();
        let read = Members::read(dir.path()).unwrap();
        assert_eq!(
            (&read.attached, &read.paused, &read.joining),
            (&members.attached, &members.paused, &members.joining)
        );
        let mode = fs::metadata(dir.path().join(FILE)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        fs::write(dir.path().join(FILE), "{}").unwrap();
        assert!(Members::read(dir.path()).is_err());
    }
}
