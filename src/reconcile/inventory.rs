//! What lies on a replica, by its own listing.
//!
//! Owns the listing only; decides nothing.

use std::collections::BTreeMap;

use crate::format::names::{CHECKPOINTS, EPOCHS, ObjectName};
use crate::ids::{Epoch, SegmentNo};
use crate::replica::{Store, StoreError};

/// Objects by path, with their sizes.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Inventory(pub BTreeMap<String, u64>);

impl Inventory {
    /// Everything on a replica.
    pub async fn take(store: &Store) -> Result<Self, StoreError> {
        Ok(Self(store.list("").await?.into_iter().map(|o| (o.path, o.size)).collect()))
    }

    /// The small and few objects of a replica: checkpoints, claims, releases.
    pub async fn of_small(store: &Store) -> Result<Self, StoreError> {
        let (checkpoints, epochs) = futures::join!(store.list(CHECKPOINTS), store.list(EPOCHS));
        Ok(Self(checkpoints?.into_iter().chain(epochs?).map(|o| (o.path, o.size)).collect()))
    }

    /// The checkpoints that are complete by their names: their manifest is there.
    pub fn checkpoints(&self) -> impl Iterator<Item = (SegmentNo, Epoch)> + '_ {
        self.0.keys().filter_map(|path| match ObjectName::parse(path) {
            Some(ObjectName::CheckpointManifest(number, epoch)) => Some((number, epoch)),
            _ => None,
        })
    }

    /// The releases.
    pub fn releases(&self) -> impl Iterator<Item = Epoch> + '_ {
        self.0.keys().filter_map(|path| match ObjectName::parse(path) {
            Some(ObjectName::Release(epoch)) => Some(epoch),
            _ => None,
        })
    }
}
