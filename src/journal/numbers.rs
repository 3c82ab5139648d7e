//! Numbers that are given once: a counter of which the journal always has a value that was not
//! given yet.
//!
//! Owns how far numbers are reserved. Knows neither what is numbered nor under which key.

use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use parking_lot::Mutex;

use super::{Journal, JournalError};
use crate::ids::NUMBERS_END;

/// Numbers reserved by one record.
const STEP: u64 = 4096;

/// A counter in the journal.
pub struct Numbers {
    key: Bytes,
    next: AtomicU64,
    /// Numbers below are reserved.
    reserved: Mutex<u64>,
    /// Why none are given, when the journal's value cannot be right.
    refused: Option<String>,
}

impl Numbers {
    /// The counter at `key`, which begins at `first`. `what` is numbered, and `highest` is the
    /// highest number in use. A value that would give a number a second time is refused, not at
    /// once but when a number is wanted: what is there can be read.
    pub fn open(
        journal: &Journal,
        key: Bytes,
        what: &str,
        first: u64,
        highest: Option<u64>,
    ) -> Result<Self, JournalError> {
        let stored = journal.get(&key)?;
        let (next, refused) = match check(stored.as_deref(), what, first, highest) {
            Ok(next) => (next, None),
            Err(why) => {
                log::error!("{why}");
                (first, Some(why))
            }
        };
        Ok(Self { key, next: AtomicU64::new(next), reserved: Mutex::new(next), refused })
    }

    /// The next number; never inside a transaction.
    pub fn take(&self, journal: &Journal) -> Result<u64, JournalError> {
        if let Some(why) = &self.refused {
            return Err(JournalError::Numbers(why.clone()));
        }
        let next = |n: u64| (n < NUMBERS_END).then_some(n + 1);
        let number = self.next.fetch_update(Ordering::AcqRel, Ordering::Acquire, next).map_err(|_| {
            JournalError::Numbers(format!("all numbers below {NUMBERS_END} were given: {REMEDY}"))
        })?;
        let mut reserved = self.reserved.lock();
        if number >= *reserved {
            let upto = number + STEP;
            journal.transact::<_, JournalError>(|tx| {
                tx.put(self.key.clone(), upto.to_le_bytes().to_vec());
                Ok(())
            })?;
            *reserved = upto;
        }
        Ok(number)
    }
}

const REMEDY: &str = "unmount, and check the volume with mirrorfs fsck";

/// The number to go on with.
fn check(stored: Option<&[u8]>, what: &str, first: u64, highest: Option<u64>) -> Result<u64, String> {
    let wrong = |why: String| Err(format!("no {what} can be made: {why}; {REMEDY}"));
    let next = match stored.map(|v| v.try_into().map(u64::from_le_bytes)) {
        None => first,
        Some(Ok(next)) => next,
        Some(Err(_)) => return wrong("the number of the next one cannot be read".to_owned()),
    };
    match highest {
        Some(highest) if highest >= next => {
            wrong(format!("the next one would get number {next}, but {highest} is in use"))
        }
        // A reservation goes a step beyond.
        _ if next < first || next > NUMBERS_END + STEP => wrong(format!("its number would be {next}")),
        _ => Ok(next),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::journal::Options;

    #[test]
    fn no_value_gives_a_number_twice() {
        let stored = |n: u64| n.to_le_bytes();
        for (value, highest, next) in [
            (None, None, Some(2)),
            (None, Some(1), Some(2)),
            (None, Some(2), None),
            (Some(7), Some(6), Some(7)),
            (Some(7), Some(7), None),
            (Some(0), None, None),
            (Some(1), None, None),
            (Some(NUMBERS_END), None, Some(NUMBERS_END)),
            (Some(u64::MAX), None, None),
            (Some(u64::MAX - 3), Some(5), None),
        ] {
            let value = value.map(stored);
            let got = check(value.as_ref().map(|v| &v[..]), "file", 2, highest);
            assert_eq!(got.as_ref().ok().copied(), next, "{value:?} {highest:?}: {got:?}");
        }
        assert!(check(Some(b"short"), "file", 2, None).unwrap_err().contains("cannot be read"));
    }

    #[test]
    fn numbers_are_reserved_before_they_are_given_and_end() {
        let dir = tempfile::tempdir().unwrap();
        let (journal, _) = Journal::open(Options::new(dir.path(), Arc::new(|_| Ok(())))).unwrap();
        let key = Bytes::from_static(b"\x01n");
        let stored = || journal.get(&key).unwrap().map(|v| u64::from_le_bytes(v[..].try_into().unwrap()));
        let numbers = Numbers::open(&journal, key.clone(), "file", 5, None).unwrap();
        assert_eq!(stored(), None);
        for n in 5..5 + 2 * STEP {
            assert_eq!(numbers.take(&journal).unwrap(), n);
            assert!(stored().unwrap() > n);
        }
        let again = Numbers::open(&journal, key.clone(), "file", 5, Some(8000)).unwrap();
        assert!(again.take(&journal).unwrap() >= 5 + 2 * STEP);
        journal
            .transact::<_, JournalError>(|tx| {
                tx.put(key.clone(), (NUMBERS_END - 1).to_le_bytes().to_vec());
                Ok(())
            })
            .unwrap();
        let last = Numbers::open(&journal, key.clone(), "file", 5, Some(6)).unwrap();
        assert_eq!(last.take(&journal).unwrap(), NUMBERS_END - 1);
        for _ in 0..3 {
            assert!(matches!(last.take(&journal), Err(JournalError::Numbers(_))));
        }
        assert!(stored().unwrap() >= NUMBERS_END);
        journal.close().unwrap();
    }
}
