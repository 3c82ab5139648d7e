//! Tests of the patience of reads.

use super::*;
use crate::replica::fault::{Fault, Faults, Op, Rule};

const PATH: &str = "segments/x";

async fn store(patience: Duration) -> (Store, Faults) {
    let faults = Faults::new(1);
    let store =
        Store::in_memory("alpha".parse().unwrap()).wrapped(|b| faults.wrap(b)).with_patience(patience);
    store.put("volume.json", Bytes::from_static(b"v")).await.unwrap();
    store.put(PATH, Bytes::from_static(b"content")).await.unwrap();
    (store, faults)
}

async fn kind_of(store: &Store, path: &str, patience: Patience) -> Result<Bytes, ErrorKind> {
    read(store, path, None, patience).await.map_err(|e| e.kind)
}

#[tokio::test]
async fn an_outage_of_any_kind_is_waited_for_once_it_answered() {
    let (store, faults) = store(Duration::from_secs(60)).await;
    for kind in [ErrorKind::Transient, ErrorKind::Timeout, ErrorKind::Denied, ErrorKind::Config] {
        assert_eq!(kind_of(&store, "volume.json", Patience::Full).await.unwrap(), "v");
        // More failures than a first contact is forgiven.
        faults.add(Rule::always(Fault::Before(kind), &[]).times(9));
        assert_eq!(kind_of(&store, PATH, Patience::Full).await.unwrap(), "content", "{kind:?}");
        faults.clear();
    }
}

#[tokio::test]
async fn an_outage_ends_by_its_limit_and_is_shared() {
    let (store, faults) = store(Duration::from_millis(30)).await;
    kind_of(&store, PATH, Patience::Full).await.unwrap();
    faults.partition(true);
    assert_eq!(kind_of(&store, PATH, Patience::Full).await, Err(ErrorKind::Transient));
    let before = faults.calls(Op::Get);
    assert_eq!(kind_of(&store, PATH, Patience::Full).await, Err(ErrorKind::Transient));
    assert_eq!(faults.calls(Op::Get) - before, 1, "it is known to be away");
}

#[tokio::test]
async fn another_replica_is_asked_before_an_outage_is_waited_for() {
    let (store, faults) = store(Duration::from_secs(600)).await;
    kind_of(&store, PATH, Patience::Full).await.unwrap();
    faults.partition(true);
    assert_eq!(kind_of(&store, PATH, Patience::Brief).await, Err(ErrorKind::Transient));
    assert!(faults.calls(Op::Get) <= 4);
}

#[tokio::test]
async fn a_missing_object_is_damage_only_where_the_replica_is_there() {
    let (store, faults) = store(Duration::from_millis(30)).await;
    kind_of(&store, PATH, Patience::Full).await.unwrap();
    assert_eq!(kind_of(&store, "segments/none", Patience::Full).await, Err(ErrorKind::Absent));
    // The folder is gone with everything in it, and comes back.
    for name in ["volume.json", PATH] {
        store.delete(name).await.unwrap();
    }
    assert_eq!(kind_of(&store, PATH, Patience::Full).await, Err(ErrorKind::Transient));
    assert!(list(&store, "segments").await.is_err());
    store.put("volume.json", Bytes::from_static(b"v")).await.unwrap();
    store.put(PATH, Bytes::from_static(b"content")).await.unwrap();
    assert_eq!(kind_of(&store, "volume.json", Patience::Full).await.unwrap(), "v");
    faults.add(Rule::always(Fault::Before(ErrorKind::Absent), &[]).times(2));
    assert_eq!(kind_of(&store, PATH, Patience::Full).await.unwrap(), "content");
    // Back before it was asked whether it is there.
    faults.add(Rule::always(Fault::Before(ErrorKind::Absent), &[Op::Get]).times(1));
    assert_eq!(kind_of(&store, PATH, Patience::Full).await.unwrap(), "content");
}

#[tokio::test]
async fn one_object_that_is_refused_is_no_outage() {
    let (store, faults) = store(Duration::from_secs(600)).await;
    kind_of(&store, "volume.json", Patience::Full).await.unwrap();
    faults.add(Rule::always(Fault::Before(ErrorKind::Denied), &[]).on(PATH));
    assert_eq!(kind_of(&store, PATH, Patience::Full).await, Err(ErrorKind::Denied));
    assert!(faults.calls(Op::Get) <= 4);
}

#[tokio::test]
async fn a_listing_that_is_refused_is_no_outage() {
    let (store, faults) = store(Duration::from_secs(600)).await;
    kind_of(&store, "volume.json", Patience::Full).await.unwrap();
    for kind in [ErrorKind::Denied, ErrorKind::Config] {
        faults.add(Rule::always(Fault::Before(kind), &[Op::List]));
        let before = faults.calls(Op::List);
        assert_eq!(list(&store, "segments").await.map_err(|e| e.kind), Err(kind));
        assert!(faults.calls(Op::List) - before <= 4);
        faults.clear();
    }
    // All of it is refused for a while, as with credentials that have expired.
    faults.add(Rule::always(Fault::Before(ErrorKind::Denied), &[]).times(9));
    assert_eq!(list(&store, "segments").await.unwrap().len(), 1);
}
