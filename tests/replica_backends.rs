//! One contract for every backend: folder, memory, S3, GCS (double), Azure (emulator), each bare and behind the fault wrapper.

#![allow(clippy::unwrap_used)]

mod support;

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use bytes::Bytes;
use mirrorfs::replica::fault::Faults;
use mirrorfs::replica::{Conditional, Created, ErrorKind, Limits, ObjectInfo, Store, StoreError};
use support::azurite::Azurite;
use support::gcs::GcsDouble;
use support::proxy::Proxy;
use support::s3::S3Server;

fn kind<T: std::fmt::Debug>(result: Result<T, StoreError>) -> ErrorKind {
    result.unwrap_err().kind
}

fn body(len: usize, seed: u8) -> Bytes {
    (0..len).map(|i| (i as u8).wrapping_mul(31).wrapping_add(seed)).collect::<Vec<_>>().into()
}

async fn with_and_without_faults(make: impl Fn(&str) -> Store) {
    conforms(make("bare/root")).await;
    conforms(make("wrapped/root").wrapped(|s| Faults::new(1).wrap(s))).await;
}

/// What mirrorfs relies on, from an empty place on.
async fn conforms(store: Store) {
    println!("{store:?}");
    store.prepare().await.unwrap();
    assert_eq!(store.list("").await, Ok(vec![]));
    assert_eq!(kind(store.get("volume.json").await), ErrorKind::Absent);
    assert_eq!(kind(store.get_range("volume.json", 0, 1).await), ErrorKind::Absent);
    assert_eq!(kind(store.head("volume.json").await), ErrorKind::Absent);
    assert_eq!(store.delete("volume.json").await, Ok(()));
    assert_eq!(store.self_test(1).await, Ok(Conditional::Works));
    assert_eq!(store.list("").await, Ok(vec![]), "the self-test leaves nothing");

    // Overwriting, ranges, sizes.
    let (old, new) = (body(100, 1), body(200_000, 2));
    for bytes in [&old, &new] {
        store.put("segments/00000000/a.seg", bytes.clone()).await.unwrap();
        assert_eq!(store.get("segments/00000000/a.seg").await.unwrap(), bytes);
    }
    let info = store.head("segments/00000000/a.seg").await.unwrap();
    assert_eq!(info, ObjectInfo { path: "segments/00000000/a.seg".into(), size: 200_000 });
    for (offset, len) in [(0, 1), (0, 200_000), (199_999, 1), (12_345, 6789), (7, 0)] {
        let got = store.get_range(&info.path, offset as u64, len as u64).await.unwrap();
        assert_eq!(got, new.slice(offset..offset + len));
    }
    assert_eq!(kind(store.get_range(&info.path, 199_990, 11).await), ErrorKind::Corrupt);
    assert_eq!(kind(store.get_range(&info.path, 200_000, 1).await), ErrorKind::Corrupt);
    assert_eq!(kind(store.get_range(&info.path, 900_000, 1).await), ErrorKind::Corrupt);
    store.put("empty", Bytes::new()).await.unwrap();
    assert_eq!(store.get("empty").await.unwrap(), Bytes::new());
    store.delete("empty").await.unwrap();

    // Conditional creation: one of many wins, everyone learns who.
    let racers = (0..8).map(|i| {
        let store = store.clone();
        async move { (i, store.put_if_absent("epochs/00000001.json", body(300, i)).await.unwrap()) }
    });
    let results = futures::future::join_all(racers).await;
    let winners: Vec<_> = results.iter().filter(|(_, c)| *c == Created::New).map(|(i, _)| *i).collect();
    assert_eq!(winners.len(), 1, "{results:?}");
    let kept = store.get("epochs/00000001.json").await.unwrap();
    assert_eq!(kept, body(300, winners[0]));
    for (i, created) in results {
        assert!(i == winners[0] || created == Created::Existed(kept.clone()));
    }
    // A body of some MiB: servers refuse it before they have read it all.
    let large = store.put_if_absent("epochs/00000001.json", body(3 << 20, 9)).await;
    assert_eq!(large, Ok(Created::Existed(kept)));

    // Listing: sorted, complete over pages, by whole folder names.
    for i in (0..13).rev() {
        store.put(&format!("segments/00000000/n{i:02}.seg"), body(i, 0)).await.unwrap();
    }
    store.put("segments2/x", body(1, 0)).await.unwrap();
    let listed = store.list("segments").await.unwrap();
    let expected: Vec<_> = ["segments/00000000/a.seg".to_owned()]
        .into_iter()
        .chain((0..13).map(|i| format!("segments/00000000/n{i:02}.seg")))
        .collect();
    assert_eq!(listed.iter().map(|o| o.path.clone()).collect::<Vec<_>>(), expected);
    assert_eq!(listed[3].size, 2);
    assert_eq!(store.list("segments/").await.unwrap(), listed);
    assert_eq!(store.list("nothing/here").await, Ok(vec![]));

    // Files, small and in parts.
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    for len in [5, 70 << 20] {
        let bytes = body(len, 3);
        std::fs::write(&file, &bytes).unwrap();
        store.put_file("checkpoints/big", &file, len as u64).await.unwrap();
        assert_eq!(store.get("checkpoints/big").await.unwrap(), bytes);
    }

    for object in store.list("").await.unwrap() {
        store.delete(&object.path).await.unwrap();
    }
    assert_eq!(store.list("").await, Ok(vec![]));
    let requests = store.requests();
    assert!(requests.put > 20 && requests.get > 20 && requests.bytes_sent > 70 << 20, "{requests:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn memory_conforms() {
    with_and_without_faults(|_| Store::in_memory("memory".parse().unwrap())).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn folder_conforms() {
    let dir = tempfile::tempdir().unwrap();
    with_and_without_faults(|path| {
        let folder = dir.path().join(path).join("a b#ü%20");
        support::spec("folder", folder.to_str().unwrap(), &[]).store().unwrap()
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn s3_conforms() {
    let server = S3Server::start();
    with_and_without_faults(|path| server.store(path)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn gcs_double_conforms() {
    let server = GcsDouble::start();
    with_and_without_faults(|path| server.store(path)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn azurite_conforms() {
    let Some(server) = Azurite::start("azurite_conforms") else { return };
    with_and_without_faults(|path| server.store(path)).await;
}

/// Wrong credentials and missing buckets are told apart from absent objects, on every operation.
async fn refuses(wrong_key: Store, wrong_bucket: Option<Store>) {
    let bucket = wrong_bucket.map(|store| (store, ErrorKind::Config));
    for (store, expected) in [(wrong_key, ErrorKind::Denied)].into_iter().chain(bucket) {
        assert_eq!(kind(store.get("a").await), expected, "{store:?}");
        assert_eq!(kind(store.put("a", body(9, 0)).await), expected, "{store:?}");
        assert_eq!(kind(store.put_if_absent("a", body(9, 0)).await), expected, "{store:?}");
        assert_eq!(kind(store.list("").await), expected, "{store:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn s3_refusals_are_classed() {
    let server = S3Server::start();
    let key = server.spec("key", "p", &[("secret_access_key", "wrong")]).store().unwrap();
    let options = S3Server::options(&server.http.url());
    let options: Vec<_> = options.iter().map(|(k, v)| (k.as_str(), v.as_str())).collect();
    refuses(key, None).await;
    // s3s-fs calls a missing bucket a missing key except in listings, and makes it on a put.
    let nowhere = support::spec("bucket", "s3://nowhere/p", &options).store().unwrap();
    assert_eq!(kind(nowhere.list("").await), ErrorKind::Config);
}

#[tokio::test(flavor = "multi_thread")]
async fn gcs_refusals_are_classed() {
    let server = GcsDouble::start();
    let key = server.spec("key", "p", &[("bearer_token", "wrong")]).store().unwrap();
    let url = server.http.url();
    let options = [("base_url", url.as_str()), ("bearer_token", support::gcs::TOKEN), ("allow_http", "true")];
    refuses(key, Some(support::spec("bucket", "gs://nowhere/p", &options).store().unwrap())).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn azure_refusals_are_classed() {
    let Some(server) = Azurite::start("azure_refusals_are_classed") else { return };
    let key = server.spec("key", "p", &[("account_key", "d3Jvbmc=")]).store().unwrap();
    let endpoint = format!("http://{}/{}", server.addr(), support::azurite::ACCOUNT);
    let options = [
        ("account", support::azurite::ACCOUNT),
        ("account_key", support::azurite::KEY),
        ("endpoint", &endpoint),
        ("allow_http", "true"),
    ];
    refuses(key, Some(support::spec("bucket", "az://nowhere/p", &options).store().unwrap())).await;
}

/// A replica behind a proxy that a test may disturb.
fn proxied(server: &S3Server) -> (Store, Proxy) {
    let proxy = Proxy::start(server.http.addr());
    let options = S3Server::options(&proxy.url());
    let options: Vec<_> = options.iter().map(|(k, v)| (k.as_str(), v.as_str())).collect();
    let limits = Limits { call: Duration::from_millis(700), ..Limits::default() };
    let store = support::spec("s3", "s3://bucket/p", &options).store().unwrap().with_limits(limits);
    (store, proxy)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stopped_server_is_transient_at_once_and_comes_back() {
    let mut server = S3Server::start();
    let store = server.store("p");
    store.put("a", body(9, 1)).await.unwrap();
    server.http.stop();
    let started = Instant::now();
    assert_eq!(kind(store.get("a").await), ErrorKind::Transient);
    assert_eq!(kind(store.put("b", body(9, 1)).await), ErrorKind::Transient);
    assert!(started.elapsed() < Duration::from_secs(3), "{:?}", started.elapsed());
    server.http.restart();
    assert_eq!(store.get("a").await.unwrap(), body(9, 1));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_silent_server_costs_one_deadline() {
    let server = S3Server::start();
    let (store, proxy) = proxied(&server);
    store.put("a", body(9, 1)).await.unwrap();
    proxy.faults.blackhole.store(true, Ordering::Relaxed);
    let started = Instant::now();
    assert_eq!(kind(store.get("a").await), ErrorKind::Timeout);
    assert_eq!(kind(store.list("").await), ErrorKind::Timeout);
    assert!(started.elapsed() < Duration::from_secs(2), "{:?}", started.elapsed());
    proxy.faults.blackhole.store(false, Ordering::Relaxed);
    assert_eq!(store.get("a").await.unwrap(), body(9, 1));
}

#[tokio::test(flavor = "multi_thread")]
async fn lost_answers_of_creations_are_resolved_over_the_wire() {
    let server = S3Server::start();
    let (store, proxy) = proxied(&server);
    for i in 0..4 {
        let path = format!("epochs/{i}");
        proxy.faults.lost_answers.store(i, Ordering::Relaxed);
        let mine = body(50, i as u8);
        let created = store.put_if_absent(&path, mine.clone()).await;
        proxy.faults.lost_answers.store(0, Ordering::Relaxed);
        match created {
            Ok(created) => assert_eq!(created, Created::New, "{i} answers lost"),
            // With many lost in a row it may give up, but it never says that somebody else was first.
            Err(e) => assert!(i > 2 && e.kind.is_passing(), "{i} answers lost: {e}"),
        }
        assert_eq!(store.get(&path).await.unwrap(), mine);
        assert_eq!(store.put_if_absent(&path, body(50, 99)).await, Ok(Created::Existed(mine)));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_cut_short_is_never_taken_for_whole() {
    let server = S3Server::start();
    let (store, proxy) = proxied(&server);
    let bytes = body(300_000, 5);
    store.put("a", bytes.clone()).await.unwrap();
    let mut failures = 0;
    for cut in [0, 100, 1_000, 100_000, 250_000] {
        proxy.faults.cut_after.store(cut, Ordering::Relaxed);
        match store.get_range("a", 10, 299_000).await {
            Ok(got) => assert_eq!(got, bytes.slice(10..299_010), "resumed after {cut}"),
            Err(e) => {
                assert!(
                    matches!(e.kind, ErrorKind::Transient | ErrorKind::Timeout | ErrorKind::Corrupt),
                    "{e}"
                );
                failures += 1;
            }
        }
    }
    assert!(failures > 0, "the proxy cut nothing");
    proxy.faults.cut_after.store(-1, Ordering::Relaxed);
    assert_eq!(store.get("a").await.unwrap(), bytes);
}
