//! Tests of deadlines, verification and ambiguous creation, over a faulty backend.

use super::files::PART;
use super::*;
use crate::replica::fault::{Fault, Faults, Op, Rule};

fn faulty() -> (Store, Faults) {
    let faults = Faults::new(1);
    let limits = Limits { call: Duration::from_millis(200), ..Limits::default() };
    let store = Store::in_memory("m".parse().unwrap()).with_limits(limits).wrapped(|s| faults.wrap(s));
    (store, faults)
}

fn kind<T: std::fmt::Debug>(result: Result<T, StoreError>) -> ErrorKind {
    result.unwrap_err().kind
}

#[tokio::test]
async fn a_lost_answer_of_a_creation_is_resolved() {
    let (store, faults) = faulty();
    let mine = Bytes::from_static(b"mine");
    for fault in [Fault::After(ErrorKind::Transient), Fault::After(ErrorKind::Exists), Fault::HangAfter] {
        faults.add(Rule::always(fault.clone(), &[Op::Create]).times(1));
        let path = format!("epochs/{}", faults.struck());
        assert_eq!(store.put_if_absent(&path, mine.clone()).await, Ok(Created::New), "{fault:?}");
        let other = store.put_if_absent(&path, Bytes::from_static(b"other")).await;
        assert_eq!(other, Ok(Created::Existed(mine.clone())), "{fault:?}");
    }
    assert_eq!(faults.struck(), 3);
}

#[tokio::test]
async fn a_creation_that_failed_for_good_says_so() {
    let (store, faults) = faulty();
    faults.partition(true);
    assert_eq!(kind(store.put_if_absent("a", Bytes::new()).await), ErrorKind::Transient);
    faults.clear();
    faults.add(Rule::always(Fault::Before(ErrorKind::Denied), &[]));
    assert_eq!(kind(store.put_if_absent("a", Bytes::new()).await), ErrorKind::Denied);
    assert_eq!(faults.calls(Op::Create), 2, "a refusal is not tried again");
}

#[tokio::test]
async fn nothing_hangs_and_short_bodies_are_noticed() {
    let (store, faults) = faulty();
    store.put("a", Bytes::from_static(b"0123456789")).await.unwrap();
    faults.add(Rule::always(Fault::Hang, &[]));
    assert_eq!(kind(store.get("a").await), ErrorKind::Timeout);
    assert_eq!(kind(store.head("a").await), ErrorKind::Timeout);
    assert_eq!(kind(store.put("a", Bytes::new()).await), ErrorKind::Timeout);
    assert_eq!(kind(store.list("").await), ErrorKind::Timeout);
    assert_eq!(kind(store.delete("a").await), ErrorKind::Timeout);
    faults.clear();
    faults.add(Rule::always(Fault::Short, &[Op::Get]).times(2));
    assert_eq!(kind(store.get("a").await), ErrorKind::Corrupt);
    assert_eq!(kind(store.get_range("a", 2, 4).await), ErrorKind::Corrupt);
    assert_eq!(store.get_range("a", 2, 4).await.unwrap(), "2345");
    assert_eq!(kind(store.get_range("a", 8, 4).await), ErrorKind::Corrupt, "beyond the end");
    assert_eq!(kind(store.get_range("a", 80, 4).await), ErrorKind::Corrupt, "start beyond the end");
    assert_eq!(store.requests().failed, 9);
}

#[tokio::test]
async fn a_backend_that_overwrites_is_found_out() {
    let (store, faults) = faulty();
    assert_eq!(store.self_test(7).await, Ok(Conditional::Works));
    assert_eq!(store.list("").await, Ok(vec![]), "the test cleans up");
    faults.add(Rule::always(Fault::Before(ErrorKind::Unsupported), &[Op::Create]));
    assert_eq!(store.self_test(8).await, Ok(Conditional::Ignored));
    let forced = store.without_conditions();
    assert_eq!(forced.put_if_absent("a", Bytes::from_static(b"1")).await, Ok(Created::New));
    let second = forced.put_if_absent("a", Bytes::from_static(b"2")).await;
    assert_eq!(second, Ok(Created::Existed(Bytes::from_static(b"1"))));
}

#[tokio::test]
async fn a_folder_is_made_on_purpose_only() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("disk/replica");
    let spec = crate::replica::ReplicaSpec::parse(
        "f".parse().unwrap(),
        root.to_str().unwrap(),
        std::collections::BTreeMap::new(),
        dir.path(),
    )
    .unwrap();
    let store = spec.store().unwrap();
    assert_eq!(kind(store.get("volume.json").await), ErrorKind::Absent);
    assert_eq!(store.list("").await, Ok(vec![]));
    let refused = store.put("volume.json", Bytes::new()).await.unwrap_err();
    assert!(refused.kind == ErrorKind::Config && refused.detail.contains("mounted"), "{refused}");
    store.prepare().await.unwrap();
    store.put("a/b/c", Bytes::from_static(b"x")).await.unwrap();
    assert_eq!(store.list("a").await, Ok(vec![ObjectInfo { path: "a/b/c".into(), size: 1 }]));
    std::fs::rename(&root, dir.path().join("gone")).unwrap();
    assert_eq!(kind(store.put("a/b/c", Bytes::new()).await), ErrorKind::Config);
    assert_eq!(kind(store.list("").await), ErrorKind::Config, "an empty listing would mean: wiped");
}

#[tokio::test]
async fn local_files_are_sent_whole_or_not_at_all() {
    let (store, _) = faulty();
    let store = store.with_limits(Limits::default());
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("f");
    assert_eq!(kind(store.put_file("a", &file, 3).await), ErrorKind::Absent);
    let len = SINGLE_PUT + PART + 5;
    let handle = std::fs::File::create(&file).unwrap();
    handle.set_len(len).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&handle, b"end", len - 3).unwrap();
    assert_eq!(kind(store.put_file("a", &file, len + 1).await), ErrorKind::Corrupt);
    assert_eq!(kind(store.head("a").await), ErrorKind::Absent);
    store.put_file("a", &file, len).await.unwrap();
    assert_eq!(store.get_range("a", len - 4, 4).await.unwrap(), &b"\0end"[..]);
}
