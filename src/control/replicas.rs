//! What commands and daemon say to each other about replicas and scrubs, as JSON.
//!
//! Owns the words only.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::ids::ReplicaName;
use crate::reconcile::ScrubRequest;
use crate::replica::ReplicaStatus;

/// A change of the list of replicas.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "do", rename_all = "snake_case")]
pub enum ReplicaRequest {
    /// Take one in, and fill it.
    Attach {
        /// Its name.
        name: ReplicaName,
        /// Its place, absolute.
        url: String,
        /// Its options; may hold secrets.
        #[serde(default)]
        options: BTreeMap<String, String>,
        /// The one that goes when it is filled.
        #[serde(default)]
        replaces: Option<ReplicaName>,
    },
    /// Let one go.
    Detach {
        /// Its name.
        name: ReplicaName,
        /// Also when it alone holds something.
        #[serde(default)]
        force: bool,
    },
    /// Ship nothing to it any more.
    Pause {
        /// Its name.
        name: ReplicaName,
    },
    /// Ship to it again.
    Resume {
        /// Its name.
        name: ReplicaName,
    },
}

/// One replica in `mirrorfs replica list`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ReplicaEntry {
    /// As in `status`.
    #[serde(flatten)]
    pub status: ReplicaStatus,
    /// The replica that goes when this one is filled.
    #[serde(default)]
    pub replaces: Option<ReplicaName>,
}

/// What to do about passes over replicas.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "do", rename_all = "snake_case")]
pub enum ScrubCommand {
    /// Begin one.
    Start(ScrubRequest),
    /// Do nothing until it is resumed.
    Pause {
        /// Over this replica only.
        replica: Option<ReplicaName>,
    },
    /// Go on.
    Resume {
        /// Over this replica only.
        replica: Option<ReplicaName>,
    },
    /// Give up the pass under way.
    Stop {
        /// Over this replica only.
        replica: Option<ReplicaName>,
    },
}

/// "Check the volume as it is now."
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FsckRequest {
    /// Read and verify what replicas hold, too.
    #[serde(default)]
    pub deep: bool,
    /// At most so many findings of each kind are told.
    pub limit: usize,
    /// Replicas to check besides, by name.
    #[serde(default)]
    pub replicas: Vec<ReplicaName>,
    /// All of them.
    #[serde(default)]
    pub all_replicas: bool,
}
