//! Reading objects with patience.
//!
//! Owns repeats of what may pass by itself. Knows no content.

use std::time::Duration;

use bytes::Bytes;

use crate::replica::{ErrorKind, Store, StoreError};

/// Waits between tries of one read.
#[cfg(not(test))]
const WAITS: [Duration; 3] = [Duration::from_millis(250), Duration::from_secs(1), Duration::from_secs(3)];
#[cfg(test)]
const WAITS: [Duration; 2] = [Duration::from_millis(1); 2];

/// What a failed read means for the one who wants the object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Meaning {
    /// The replica answered, and the object is not, or not wholly, there.
    Damaged,
    /// The replica did not answer; it may well hold the object.
    Unreachable,
}

pub(super) fn meaning(error: &StoreError) -> Meaning {
    match error.kind {
        ErrorKind::Absent | ErrorKind::Corrupt => Meaning::Damaged,
        ErrorKind::Exists
        | ErrorKind::Transient
        | ErrorKind::Timeout
        | ErrorKind::Denied
        | ErrorKind::Full
        | ErrorKind::Unsupported
        | ErrorKind::Config => Meaning::Unreachable,
    }
}

/// The whole object, or a range of it; what may pass by itself is tried again.
pub(super) async fn read(store: &Store, path: &str, range: Option<(u64, u64)>) -> Result<Bytes, StoreError> {
    let mut waits = WAITS.iter();
    loop {
        let answer = match range {
            Some((offset, len)) => store.get_range(path, offset, len).await,
            None => store.get(path).await,
        };
        match answer {
            Err(e) if e.kind.is_passing() => match waits.next() {
                Some(wait) => tokio::time::sleep(*wait).await,
                None => return Err(e),
            },
            other => return other,
        }
    }
}
