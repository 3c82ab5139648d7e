//! Reading objects with patience.
//!
//! Owns what a failed read means, and for how long it is repeated. Knows no content.

use std::time::{Duration, Instant};

use bytes::Bytes;

use crate::format::names::ObjectName;
use crate::replica::{ErrorKind, ObjectInfo, Store, StoreError};

/// Waits between tries while a replica has never answered: its place is more likely wrong than
/// away.
#[cfg(not(test))]
const FIRST: [Duration; 3] = [Duration::from_millis(250), Duration::from_secs(1), Duration::from_secs(3)];
#[cfg(test)]
const FIRST: [Duration; 2] = [Duration::from_millis(1); 2];
/// The one wait where another replica may have the object.
#[cfg(not(test))]
const BRIEF: Duration = Duration::from_millis(250);
#[cfg(test)]
const BRIEF: Duration = Duration::from_millis(1);
/// First and longest wait during an outage.
#[cfg(not(test))]
const OUTAGE: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(1));
#[cfg(test)]
const OUTAGE: (Duration, Duration) = (Duration::from_millis(1), Duration::from_millis(10));

/// What a failed read means for the one who wants the object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Meaning {
    /// The replica answered, and the object is not, or not wholly, there.
    Damaged,
    /// The replica did not answer; it may well hold the object.
    Unreachable,
}

/// What a failure that [`read`] gave means. An object that is absent because its replica is away
/// was given another kind there.
pub(crate) fn meaning(error: &StoreError) -> Meaning {
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

/// For how long a replica that does not answer is waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Patience {
    /// Hardly: another replica is asked first.
    Brief,
    /// As long as the store says.
    Full,
}

/// The order in which `holders` are asked: briefly first where there are several, then those that
/// did not answer with patience.
pub(super) fn rounds(holders: usize) -> &'static [Patience] {
    if holders > 1 { &[Patience::Brief, Patience::Full] } else { &[Patience::Full] }
}

/// One read's failures so far.
struct Tries {
    patience: Patience,
    failures: u32,
    first: Option<Instant>,
}

impl Tries {
    fn new(patience: Patience) -> Self {
        Self { patience, failures: 0, first: None }
    }

    /// How long to wait before the next try; `None` when there is to be none. `away` is how long
    /// the replica has given no answer.
    fn wait(&mut self, kind: ErrorKind, store: &Store, away: Duration, now: Instant) -> Option<Duration> {
        let waited = now.saturating_duration_since(*self.first.get_or_insert(now));
        let nth = self.failures;
        self.failures += 1;
        if !store.absence().has_answered() {
            return kind.is_passing().then(|| FIRST.get(nth as usize).copied()).flatten();
        }
        // Credentials expire and are renewed, folders are unmounted and mounted again.
        let is_outage = kind.is_passing() || matches!(kind, ErrorKind::Denied | ErrorKind::Config);
        let limit = store.patience();
        match self.patience {
            _ if !is_outage || waited >= limit || away >= limit => None,
            Patience::Brief => (nth == 0 && away <= BRIEF).then_some(BRIEF),
            Patience::Full => Some((OUTAGE.0 * 2_u32.saturating_pow(nth.min(10))).min(OUTAGE.1)),
        }
    }

    /// Waits before the next try, or gives the error that ends the read.
    async fn again(&mut self, error: StoreError, store: &Store) -> Result<(), StoreError> {
        let now = Instant::now();
        let away = store.absence().failed(now);
        match self.wait(error.kind, store, away, now) {
            Some(wait) => {
                tokio::time::sleep(wait).await;
                Ok(())
            }
            None => Err(error),
        }
    }
}

/// The whole object, or a range of it. What may pass by itself is tried again; that the object is
/// not there, or is refused, is believed only of a replica that is there itself.
pub(crate) async fn read(
    store: &Store,
    path: &str,
    range: Option<(u64, u64)>,
    patience: Patience,
) -> Result<Bytes, StoreError> {
    let mut tries = Tries::new(patience);
    // The kind of failure that was met just before the replica was found to be there.
    let mut confirmed = None;
    loop {
        let answer = match range {
            Some((offset, len)) => store.get_range(path, offset, len).await,
            None => store.get(path).await,
        };
        let error = match answer {
            Ok(bytes) => {
                store.absence().answered();
                return Ok(bytes);
            }
            Err(e) => e,
        };
        let kind = error.kind;
        let is_doubtful = matches!(kind, ErrorKind::Absent | ErrorKind::Denied | ErrorKind::Config);
        let error = match is_doubtful && path != ObjectName::Volume.path() {
            true if confirmed == Some(kind) => return Err(error),
            true => match present(store).await {
                // It may have come back in between: only a second look counts.
                Ok(()) => {
                    confirmed = Some(kind);
                    continue;
                }
                Err(e) => e,
            },
            false => error,
        };
        confirmed = None;
        if matches!(error.kind, ErrorKind::Absent | ErrorKind::Corrupt) {
            return Err(error);
        }
        tries.again(error, store).await?;
    }
}

/// Whether the replica itself is there: an unmounted disk or a deleted bucket lacks every object.
async fn present(store: &Store) -> Result<(), StoreError> {
    let object = ObjectName::Volume.path();
    match store.head(&object).await {
        Ok(_) => {
            store.absence().answered();
            Ok(())
        }
        Err(e) if e.kind == ErrorKind::Absent => {
            let detail = format!("{object} is not there: is the replica away?");
            Err(StoreError { kind: ErrorKind::Transient, detail, ..e })
        }
        Err(e) => Err(e),
    }
}

/// As [`Store::list`], with the patience of [`read`]: a listing that is refused twice by a replica
/// that is there is no outage. The caller has read `volume.json` there already.
pub(super) async fn list(store: &Store, prefix: &str) -> Result<Vec<ObjectInfo>, StoreError> {
    let mut tries = Tries::new(Patience::Full);
    // The kind of refusal that was met while the replica was there.
    let mut confirmed = None;
    loop {
        let listed = store.list(prefix).await;
        // A folder that is moved away meanwhile lists as empty.
        let error = match (listed, present(store).await) {
            (Ok(listed), Ok(())) => return Ok(listed),
            (Err(e), Ok(())) if matches!(e.kind, ErrorKind::Denied | ErrorKind::Config) => {
                if confirmed == Some(e.kind) {
                    return Err(e);
                }
                confirmed = Some(e.kind);
                continue;
            }
            (Err(e), _) | (_, Err(e)) => e,
        };
        confirmed = None;
        tries.again(error, store).await?;
    }
}

#[cfg(test)]
mod tests;
