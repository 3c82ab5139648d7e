//! Replicas of every kind in one volume; one of them goes away for a while.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::fs;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use support::azurite::Azurite;
use support::gcs::GcsDouble;
use support::mount::{How, Mount, Volume};
use support::proxy::Proxy;
use support::run::{seed, wait_until};
use support::s3::S3Server;
use support::tree::{Content, Shape, Snapshot, build};

#[test]
fn one_of_every_kind_and_one_stops() {
    let Some(mut v) = Volume::new("replicas") else { return };
    let seed = seed("replicas");
    let (mut s3, gcs, azure) = (S3Server::start(), GcsDouble::start(), Azurite::start("replicas"));
    v.folder("dir");
    v.spec(&s3.spec("s3", "mirror", &[]));
    v.spec(&gcs.spec("gcs", "mirror", &[]));
    let mut others = vec!["dir", "gcs"];
    if let Some(azure) = &azure {
        v.spec(&azure.spec("azure", "mirror", &[]));
        others.push("azure");
    }
    let m = v.mount();
    let (before, during) = (m.path("before"), m.path("during"));
    fs::create_dir(&before).unwrap();
    build(&before, seed, Shape::SMALL);
    m.sync();

    s3.http.stop();
    fs::create_dir(&during).unwrap();
    let started = Instant::now();
    build(&during, seed + 1, Shape::SMALL);
    let count = others.len().to_string();
    m.ask(&["sync"], &["--replicas", &count, "--timeout", "120"]).ok();
    println!("written and on the others after {:?}", started.elapsed());
    // All cannot be; that is said, and it takes no longer than asked.
    let late = Instant::now();
    m.ask(&["sync"], &["--timeout", "2"]).with_code(8);
    assert!(late.elapsed() < Duration::from_secs(20));
    let stopped = m.replica_status("s3");
    assert_ne!(stopped["state"], "healthy", "{stopped}");
    assert!(stopped["lag_segments"].as_u64().unwrap() > 0, "{stopped}");
    assert!(!stopped["last_error"].is_null(), "{stopped}");
    for name in &others {
        assert_eq!(m.replica_status(name)["lag_segments"], 0, "{name}");
    }

    // Nothing cached: every block comes from one of the others, though the stopped one is asked for too.
    let expected = Snapshot::take(m.root());
    let fresh = v.mount_as(&How::usual().state("fresh").arg("--read-only"));
    expected.assert_same(&Snapshot::take(fresh.root()), "with an empty cache and one replica down");
    fresh.unmount();

    s3.http.restart();
    wait_until(Duration::from_secs(150), "the stopped replica catches up by itself", || {
        m.replica_status("s3")["lag_segments"] == 0
    });
    fs::write(m.path("afterwards"), b"all again").unwrap();
    m.sync();
    let expected = Snapshot::take(m.root());
    m.unmount();
    for name in others.iter().chain(&["s3"]) {
        let to = v.restore(name, &format!("restored-{name}"));
        expected.assert_same(&Snapshot::take(&to), &format!("restored from {name}"));
        fs::remove_dir_all(to).unwrap();
    }
}

/// Requests of one kind made of a replica so far.
fn requests(m: &Mount, name: &str, kind: &str) -> u64 {
    m.replica_status(name)["requests"][kind].as_u64().unwrap()
}

#[test]
fn many_small_files_cost_few_requests() {
    const FILES: u64 = 1000;
    let Some(mut v) = Volume::new("replicas: requests") else { return };
    let mut content = Content::new(seed("requests"));
    v.folder("a");
    v.folder("b");
    let m = v.mount();
    let puts = ["a", "b"].map(|name| requests(&m, name, "put"));
    fs::create_dir(m.path("d")).unwrap();
    for n in 0..FILES {
        fs::write(m.path(format!("d/{n}")), content.take(8192)).unwrap();
    }
    m.sync();
    for (name, before) in ["a", "b"].into_iter().zip(puts) {
        let puts = requests(&m, name, "put") - before;
        assert!(puts <= FILES / 100, "{puts} PUTs on {name}");
    }
    let expected = Snapshot::take(m.root());
    m.unmount();
    // Of one replica alone, so that none is asked because another one is late.
    let fresh = v.mount_as(&How::usual().state("fresh").only(&["a"]).arg("--read-only"));
    let before = requests(&fresh, "a", "get");
    expected.assert_same(&Snapshot::take(fresh.root()), "with an empty cache");
    let gets = requests(&fresh, "a", "get") - before;
    assert!(gets <= FILES / 100, "{gets} GETs");
    let text = fresh.ask(&["status"], &[]).ok().text();
    assert!(text.contains("REQUESTS  PUT  GET"), "{text}");
    fresh.unmount();
}

#[test]
fn a_replica_that_hangs_slows_nobody_else() {
    let Some(mut v) = Volume::new("replicas: hanging") else { return };
    let s3 = S3Server::start();
    let proxy = Proxy::start(s3.http.addr());
    let options = S3Server::options(&proxy.url());
    let options: Vec<_> = options.iter().map(|(k, v)| (k.as_str(), v.as_str())).collect();
    v.replica("hang", &format!("s3://{}/mirror", support::s3::BUCKET), &options);
    v.folder("dir");
    v.setting("cache_size = \"64MiB\"");
    let m = v.mount();
    fs::write(m.path("first"), Content::new(4).take(1 << 20)).unwrap();
    m.sync();
    proxy.faults.blackhole.store(true, Ordering::Relaxed);
    // More than the cache holds: what only the folder has can be evicted, and comes back from there.
    let content = |i: u64| Content::new(i * 4).take(8 << 20);
    let started = Instant::now();
    for i in 0..20 {
        fs::write(m.path(format!("f{i}")), content(i)).unwrap();
        m.ask(&["sync"], &["--replicas", "1", "--timeout", "60"]).ok();
    }
    for i in 0..20 {
        assert!(fs::read(m.path(format!("f{i}"))).unwrap() == content(i), "f{i}");
    }
    assert!(started.elapsed() < Duration::from_secs(120), "took {:?}", started.elapsed());
    assert!(m.replica_status("hang")["lag_segments"].as_u64().unwrap() > 0);
    proxy.faults.blackhole.store(false, Ordering::Relaxed);
    m.sync();
    m.unmount();
}

#[test]
fn fsync_waits_for_as_many_replicas_as_the_volume_asks() {
    let Some(mut v) = Volume::new("replicas: fsync") else { return };
    let mut s3 = S3Server::start();
    v.folder("dir");
    v.spec(&s3.spec("s3", "mirror", &[]));
    v.setting("fsync = \"all\"\nfsync_timeout = \"3s\"");
    let m = v.mount();
    let f = fs::File::create(m.path("f")).unwrap();
    std::io::Write::write_all(&mut &f, b"everywhere").unwrap();
    f.sync_all().unwrap();
    m.kill9();
    for name in ["dir", "s3"] {
        let to = v.restore(name, &format!("restored-{name}"));
        assert_eq!(fs::read(to.join("f")).unwrap(), b"everywhere", "{name}");
    }
    let m = v.mount();
    s3.http.stop();
    let f = fs::File::create(m.path("g")).unwrap();
    std::io::Write::write_all(&mut &f, b"not everywhere").unwrap();
    let started = Instant::now();
    let refused = f.sync_all().unwrap_err();
    assert!(matches!(refused.raw_os_error(), Some(libc::ETIMEDOUT | libc::EIO)), "{refused}");
    assert!(started.elapsed() < Duration::from_secs(30), "{:?}", started.elapsed());
    s3.http.restart();
    wait_until(Duration::from_secs(60), "fsync works again", || f.sync_all().is_ok());
}
