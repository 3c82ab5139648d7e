//! The replicas of a mounted volume, as everybody who asks or serves them shares the list.
//!
//! Owns who is on the list and the waking of those who wait for a change. Decides nothing: the daemon attaches and detaches.

use std::sync::Arc;

use tokio::sync::watch;

use super::shared::Replica;
use crate::ids::ReplicaName;

/// A list of replicas that may change while it is in use. Whoever has taken a copy keeps it until the next look.
pub struct Roster(watch::Sender<Arc<Vec<Arc<Replica>>>>);

impl Roster {
    /// A list of these, in this order.
    #[must_use]
    pub fn new(replicas: Vec<Arc<Replica>>) -> Arc<Self> {
        Arc::new(Self(watch::channel(Arc::new(replicas)).0))
    }

    /// The list as it is now.
    #[must_use]
    pub fn all(&self) -> Arc<Vec<Arc<Replica>>> {
        Arc::clone(&self.0.borrow())
    }

    /// Those that count for `fsync` and for what may be forgotten here: all that are not being filled for the first time.
    #[must_use]
    pub fn voters(&self) -> Vec<Arc<Replica>> {
        self.all().iter().filter(|r| !r.is_joining()).cloned().collect()
    }

    /// All but the one of that name.
    #[must_use]
    pub fn others(&self, name: &ReplicaName) -> Vec<Arc<Replica>> {
        self.all().iter().filter(|r| r.name() != name).cloned().collect()
    }

    /// The one of that name.
    #[must_use]
    pub fn get(&self, name: &ReplicaName) -> Option<Arc<Replica>> {
        self.all().iter().find(|r| r.name() == name).cloned()
    }

    /// Puts one at the end of the list, unless its name is taken.
    pub fn add(&self, replica: Arc<Replica>) -> bool {
        self.0.send_if_modified(|list| {
            if list.iter().any(|r| r.name() == replica.name()) {
                return false;
            }
            Arc::make_mut(list).push(replica);
            true
        })
    }

    /// Takes one off the list and gives it.
    pub fn remove(&self, name: &ReplicaName) -> Option<Arc<Replica>> {
        let mut removed = None;
        self.0.send_if_modified(|list| {
            let Some(at) = list.iter().position(|r| r.name() == name) else { return false };
            removed = Some(Arc::make_mut(list).remove(at));
            true
        });
        removed
    }

    /// Tells everybody who watches that something about the list is different.
    pub fn touch(&self) {
        self.0.send_modify(|_| {});
    }

    /// Changes of the list.
    #[must_use]
    pub fn watch(&self) -> watch::Receiver<Arc<Vec<Arc<Replica>>>> {
        self.0.subscribe()
    }
}
