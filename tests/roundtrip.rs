//! A whole tree, back from each replica alone: by mounting with empty local state, and by `restore`.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::fs;

use support::mount::{How, Volume, flip_bit, segments};
use support::run::seed;
use support::s3::S3Server;
use support::tree::{Shape, Snapshot, build};

#[test]
fn every_replica_alone_brings_everything_back() {
    let Some(mut v) = Volume::new("roundtrip") else { return };
    let seed = seed("roundtrip");
    let server = S3Server::start();
    v.folder("a");
    v.folder("b");
    v.spec(&server.spec("s", "deep/prefix", &[]));
    let plain = v.path("plain");
    fs::create_dir(&plain).unwrap();
    build(&plain, seed, Shape::FULL);
    let expected = Snapshot::take(&plain);
    assert!(expected.entries.len() >= 2000, "only {} entries", expected.entries.len());
    // It is compared with this picture from here on.
    fs::remove_dir_all(&plain).unwrap();

    let m = v.mount();
    build(m.root(), seed, Shape::FULL);
    expected.assert_same(&Snapshot::take(m.root()), "while mounted");
    m.sync();
    m.unmount();

    let again = v.mount();
    expected.assert_same(&Snapshot::take(again.root()), "mounted again with its state");
    again.unmount();
    fs::remove_dir_all(v.path("state")).unwrap();

    for name in ["a", "b", "s"] {
        let how = How::usual().state(&format!("only-{name}")).only(&[name]);
        let m = v.mount_as(&how.arg("--read-only"));
        expected.assert_same(&Snapshot::take(m.root()), &format!("mounted from {name} alone"));
        assert_eq!(fs::write(m.path("new"), b"").unwrap_err().raw_os_error(), Some(libc::EROFS));
        m.unmount();
        let to = v.restore(name, &format!("restored-{name}"));
        expected.assert_same(&Snapshot::take(&to), &format!("restored from {name}"));
        fs::remove_dir_all(to).unwrap();
    }

    // Life goes on: a new writer on what two of them hold, with the third one back later.
    let m = v.mount_as(&How::usual().state("next").only(&["a", "s"]));
    fs::write(m.path("after"), b"the first life").unwrap();
    m.sync();
    m.unmount();
    let m = v.mount_as(&How::usual().state("next"));
    m.sync();
    m.unmount();
    let m = v.mount_as(&How::usual().state("last").only(&["b"]).arg("--read-only"));
    assert_eq!(fs::read(m.path("after")).unwrap(), b"the first life");
    let mut found = Snapshot::take(m.root());
    found.entries.remove("after".as_ref() as &std::path::Path);
    expected.assert_same(&found, "after another life");
}

#[test]
fn segments_damaged_here_and_there_are_taken_from_each_other() {
    let Some(mut v) = Volume::new("roundtrip: damaged here and there") else { return };
    let seed = seed("damaged here and there");
    let (a, b) = (v.folder("a"), v.folder("b"));
    let m = v.mount();
    for part in 0..6 {
        let dir = m.path(format!("part{part}"));
        fs::create_dir(&dir).unwrap();
        build(&dir, seed + part, Shape { files: 60, dirs: 4, largest: 2 << 20, sockets: true });
        m.sync();
    }
    let expected = Snapshot::take(m.root());
    m.unmount();
    let (on_a, on_b) = (segments(&a), segments(&b));
    assert_eq!(on_a.len(), on_b.len());
    assert!(on_a.len() >= 6);
    for (i, (a, b)) in on_a.iter().zip(&on_b).enumerate() {
        // Never the same one twice; damaged near the end, where index and records are, or cut short.
        match i % 4 {
            0 => flip_bit(a, 0.999),
            1 => flip_bit(b, 0.5),
            2 => fs::write(b, &fs::read(b).unwrap()[..100]).unwrap(),
            _ => fs::remove_file(a).unwrap(),
        }
    }
    let m = v.mount_as(&How::usual().state("fresh"));
    expected.assert_same(&Snapshot::take(m.root()), "from two damaged replicas together");
}
