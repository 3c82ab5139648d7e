//! Starting without some replicas, or without any.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::fs::{self, File};
use std::io::Write;
use std::time::{Duration, Instant};

use support::machine::{Machine, servers};
use support::mount::{Failed, How, Mount};
use support::run::{seed, wait_until};
use support::tree::{Content, Shape, Snapshot, build};

const IN_USE: i32 = 5;
const UNREACHABLE: i32 = 6;
/// A mount that waits for nobody takes less, also on a slow machine.
const QUICK: Duration = Duration::from_secs(40);

fn written(m: &Mount, name: &str, content: &[u8]) {
    let mut file = File::create(m.path(name)).unwrap();
    file.write_all(content).unwrap();
    file.sync_all().unwrap();
}

/// How long the replica `name` has been behind: its state and its lag in segments.
fn shown(m: &Mount, name: &str) -> (String, u64) {
    let status = m.replica_status(name);
    (status["state"].as_str().unwrap().to_owned(), status["lag_segments"].as_u64().unwrap())
}

#[test]
fn offline_with_the_local_state_alone() {
    let servers = servers();
    let Some(machine) = Machine::new("degraded: offline", &servers, &["commit_interval = \"500ms\""]) else {
        return;
    };
    let seed = seed("degraded: offline");
    let v = &machine.v;
    let m = v.mount();
    build(m.root(), seed, Shape { files: 60, dirs: 5, largest: 2 << 20, sockets: true });
    m.sync();
    let mut expected = Snapshot::take(m.root());
    m.unmount();

    machine.cut(true);
    for life in 0..2_u64 {
        let started = Instant::now();
        let m = v.mount();
        println!("mounted without a replica in {:?}", started.elapsed());
        assert!(started.elapsed() < QUICK, "{:?}", started.elapsed());
        for name in ["one", "two"] {
            assert!(
                m.told().contains(&format!("goes on without it for now: replica {name}")),
                "{}",
                m.told()
            );
        }
        expected.assert_same(&Snapshot::take(m.root()), "what is cached");
        let began = Instant::now();
        written(&m, &format!("offline {life}"), &Content::new(seed + life).take(3 << 20));
        fs::write(m.path("again"), format!("life {life}")).unwrap();
        assert!(began.elapsed() < QUICK, "{:?}", began.elapsed());
        wait_until(Duration::from_secs(60), "the replicas are shown to be away and behind", || {
            ["one", "two"].iter().all(|name| {
                let (state, lag) = shown(&m, name);
                state != "healthy" && lag > life
            })
        });
        expected = Snapshot::take(m.root());
        if life == 0 {
            m.unmount();
            continue;
        }
        // They come back: everything goes there by itself, first of all the claims of both lives.
        machine.cut(false);
        wait_until(Duration::from_secs(150), "the replicas have caught up", || {
            ["one", "two"].iter().all(|name| shown(&m, name) == ("healthy".into(), 0))
        });
        m.unmount();
    }
    for (server, name) in servers.iter().zip(["one", "two"]) {
        let epochs = server.bucket_dir().join("mirror/epochs");
        for (epoch, released) in [(1, true), (2, false), (3, true)] {
            assert!(epochs.join(format!("{epoch:08x}.json")).exists(), "{name}: no claim {epoch}");
            let mark = epochs.join(format!("{epoch:08x}.released.json")).exists();
            assert_eq!(mark, released, "{name}: the end of epoch {epoch}");
        }
        let to = v.restore(name, &format!("restored-{name}"));
        expected.assert_same(&Snapshot::take(&to), &format!("restored from {name}"));
    }
}

#[test]
fn an_empty_state_and_a_replica_that_is_away() {
    let mut servers = servers();
    let Some(machine) = Machine::new("degraded: empty state", &servers, &[]) else { return };
    let v = &machine.v;
    let m = v.mount();
    written(&m, "first", b"first");
    m.sync();
    m.unmount();

    // The one that is left knows that all was everywhere: nobody needs to be asked.
    servers[1].http.stop();
    let m = v.mount_as(&How::usual().state("second"));
    assert!(m.told().contains("goes on without it for now: replica two"), "{}", m.told());
    assert_eq!(fs::read(m.path("first")).unwrap(), b"first");
    written(&m, "second", b"second");
    m.ask(&["sync"], &["--replicas", "1", "--timeout", "60"]).ok();
    m.unmount();
    // It was released where it was complete. The other one catches up.
    servers[1].http.restart();
    // One replica of two has more than the other: that may be a forgery, so a person is asked.
    let Failed { code, told } = v.try_mount(&How::usual().state("third")).err().unwrap();
    assert_eq!(code, Some(IN_USE), "{told}");
    assert!(told.contains("only on replica one (1 of 2 that answer)"), "{told}");
    let m = v.mount_as(&How::usual().state("third").arg("--takeover"));
    assert_eq!(fs::read(m.path("second")).unwrap(), b"second");
    m.sync();
    m.kill9();

    // Killed: whether it had more, and on which replica, nobody knows.
    servers[1].http.stop();
    let Failed { code, told } = v.try_mount(&How::usual().state("fourth")).err().unwrap();
    assert_eq!(code, Some(IN_USE), "{told}");
    for word in ["has not unmounted it in good order", "replica two", "--takeover"] {
        assert!(told.contains(word), "{word}: {told}");
    }
    v.mount_as(&How::usual().state("reader").arg("--read-only")).unmount();
    let m = v.mount_as(&How::usual().state("fourth").arg("--takeover"));
    assert!(m.told().contains("what only it holds is given up: replica two"), "{}", m.told());
    assert_eq!(fs::read(m.path("second")).unwrap(), b"second");
    m.unmount();
    // The one that is left has lost segments that the release speaks of.
    let segments = support::mount::segments(&servers[0].bucket_dir().join("mirror"));
    fs::remove_file(segments.last().unwrap()).unwrap();
    let Failed { code, told } = v.try_mount(&How::usual().state("fifth")).err().unwrap();
    assert_eq!(code, Some(UNREACHABLE), "{told}");
    assert!(told.contains("replica two") && told.contains("intact up to"), "{told}");
    // With the other one back nothing is missing.
    servers[1].http.restart();
    let m = v.mount_as(&How::usual().state("fifth").arg("--takeover"));
    assert_eq!(fs::read(m.path("second")).unwrap(), b"second");
    m.sync();
    m.unmount();
}
