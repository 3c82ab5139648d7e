//! Three folder replicas, one of them in the hands of somebody who forges claims, marks and names:
//! the volume goes on, shows the right content, and the other replicas get nothing of it.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use mirrorfs::format::names::ObjectName;
use mirrorfs::format::volume::{Claim, Release, Volume as VolumeFile};
use mirrorfs::ids::{Epoch, SegmentNo};
use support::mount::{Failed, How, Mount, Volume, bytes_of, segments};
use support::run::wait_until;
use support::tree::Content;

const IN_USE: i32 = 5;
const NOTICE: Duration = Duration::from_secs(90);
/// What a mount of a small volume takes at most, whatever lies on a replica.
const MOST_MEMORY_KIB: u64 = 256 << 10;

/// A volume on the replicas a, b and c, written and released once.
fn filled(test: &str) -> Option<Volume> {
    let mut v = Volume::new(test)?;
    for name in ["a", "b", "c"] {
        v.folder(name);
    }
    v.setting("commit_interval = \"300ms\"");
    let m = v.mount();
    for i in 0..4 {
        write(&m, &format!("f{i}"));
    }
    m.sync();
    m.unmount();
    Some(v)
}

fn content(name: &str) -> Vec<u8> {
    Content::new(name.bytes().map(u64::from).sum()).take(40_000)
}

fn write(m: &Mount, name: &str) {
    fs::write(m.path(name), content(name)).unwrap();
}

/// Everything that was ever written is there, and right.
fn check(m: &Mount, names: &[&str]) {
    for name in ["f0", "f1", "f2", "f3"].iter().chain(names) {
        assert!(fs::read(m.path(name)).unwrap() == content(name), "{name}");
    }
}

fn place(v: &Volume, replica: &str, name: ObjectName) -> PathBuf {
    v.path(&format!("replica-{replica}")).join(name.path())
}

/// The highest epoch below an implausible one that is claimed on a replica.
fn newest_epoch(v: &Volume, replica: &str) -> u32 {
    let names = fs::read_dir(v.path(&format!("replica-{replica}")).join("epochs")).unwrap();
    let epochs = names.filter_map(|e| {
        match ObjectName::parse(&format!("epochs/{}", e.unwrap().file_name().to_str().unwrap())) {
            Some(ObjectName::Claim(epoch)) if epoch.0 < 1000 => Some(epoch.0),
            _ => None,
        }
    });
    epochs.max().unwrap()
}

/// A whole, self-consistent claim by somebody else.
fn forged(v: &Volume, epoch: u32, first: u64) -> Claim {
    let volume = VolumeFile::decode(&fs::read(place(v, "b", ObjectName::Volume)).unwrap()).unwrap();
    Claim {
        volume: volume.volume,
        epoch: Epoch(epoch),
        claim_id: [0xee; 16],
        host: "evil".into(),
        pid: 666,
        claimed_at: 1_790_000_000,
        first_segment: SegmentNo(first),
        mirrorfs: "0.1.0".into(),
    }
}

fn put_claim(v: &Volume, replica: &str, claim: &Claim) {
    fs::write(place(v, replica, ObjectName::Claim(claim.epoch)), claim.encode().unwrap()).unwrap();
}

/// Nothing of the forger's is on the replicas that he cannot write to.
fn assert_clean(v: &Volume) {
    for name in ["b", "c"] {
        let objects: BTreeMap<PathBuf, Vec<u8>> = bytes_of(&v.path(&format!("replica-{name}")));
        for (path, bytes) in objects.iter().filter(|(path, _)| path.starts_with("epochs")) {
            let path = path.display();
            assert!(!bytes.windows(6).any(|w| w == b"\"evil\""), "{path} came to {name}");
        }
    }
}

fn peak_kib(m: &Mount) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", m.pid())).unwrap();
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:")).unwrap();
    line.split_whitespace().next().unwrap().parse().unwrap()
}

/// Removes a claim with the command, after having seen that it asks first.
fn void(v: &Volume, replica: &str, epoch: u32, more: &[&str]) {
    let epoch = epoch.to_string();
    let words = [&["replica", "void-claim", replica, &epoch], more].concat();
    let shown = v.run(&[], &words).with_code(2).says(&["--discard"]).text();
    assert!(shown.contains("evil (process 666)") && shown.contains("to be discarded"), "{shown}");
    let done = v.run(&[], &[&words[..], &["--discard"]].concat()).ok().text();
    assert!(done.contains("discarded") && !done.contains("to be discarded"), "{done}");
}

#[test]
fn the_highest_epoch_stops_nothing_and_is_removed_by_command() {
    let Some(v) = filled("hostile claims: highest epoch") else { return };
    put_claim(&v, "a", &forged(&v, u32::MAX, 1));
    let before = newest_epoch(&v, "b");
    let m = v.mount();
    assert!(m.told().contains("void-claim") && m.told().contains("replica a"), "{}", m.told());
    write(&m, "after");
    m.ask(&["sync"], &["--replicas", "2", "--timeout", "60"]).ok();
    check(&m, &["after"]);
    m.unmount();
    assert_clean(&v);
    assert_eq!(newest_epoch(&v, "b"), before + 1);
    // With an empty state, too; the end is marked on two of three.
    let m = v.mount_as(&How::usual().state("empty"));
    check(&m, &["after"]);
    m.unmount();
    assert_eq!(newest_epoch(&v, "c"), before + 2);
    void(&v, "a", u32::MAX, &[]);
    let m = v.mount_as(&How::usual().state("empty"));
    m.sync();
    check(&m, &["after"]);
    m.unmount();
    let restored = v.restore("a", "restored-a");
    assert!(fs::read(restored.join("after")).unwrap() == content("after"), "a is filled again");
}

#[test]
fn a_plausible_claim_on_one_of_three_stops_only_that_replica() {
    let Some(v) = filled("hostile claims: next epoch") else { return };
    let m = v.mount();
    let epoch = newest_epoch(&v, "b");
    // As a takeover would look, from the beginning of the volume.
    put_claim(&v, "a", &forged(&v, epoch + 1, 1));
    write(&m, "during");
    wait_until(NOTICE, "the replica is set apart", || {
        let a = m.replica_status("a");
        a["state"] == "foreign"
            && a["last_error"]["text"].as_str().is_some_and(|t| t.contains("void-claim a"))
    });
    write(&m, "later");
    m.ask(&["sync"], &["--replicas", "2", "--timeout", "60"]).ok();
    assert!(m.status()["read_only"].is_null(), "{}", m.status());
    check(&m, &["during", "later"]);
    m.unmount();
    assert_clean(&v);
    // The state goes on, and again: the claim has an epoch that we now have ourselves.
    for i in 0..2 {
        let m = v.mount();
        assert!(m.told().contains("evil") && m.told().contains("replica a"), "{}", m.told());
        write(&m, &format!("again{i}"));
        m.ask(&["sync"], &["--replicas", "2", "--timeout", "60"]).ok();
        m.unmount();
    }
    assert_clean(&v);
    let all = ["during", "later", "again0", "again1"];
    // An empty state sees two of three agree.
    let m = v.mount_as(&How::usual().state("empty").arg("--takeover"));
    check(&m, &all);
    m.unmount();
    assert_clean(&v);
    void(&v, "a", epoch + 1, &[]);
    let m = v.mount_as(&How::usual().state("empty"));
    m.sync();
    check(&m, &all);
    m.unmount();
    let restored = v.restore("a", "restored-a");
    assert!(fs::read(restored.join("again1")).unwrap() == content("again1"), "a holds the volume again");
}

/// An empty state meets a claim of a newer epoch on one of three replicas, which goes on after the
/// last segment or from the first one.
fn asks_before_it_follows(cuts: bool) {
    let Some(v) = filled(&format!("hostile claims: empty state, {cuts}")) else { return };
    let epoch = newest_epoch(&v, "b") + 1;
    let last = segments(&v.path("replica-b")).len() as u64;
    let claim = forged(&v, epoch, if cuts { 1 } else { last + 1 });
    put_claim(&v, "a", &claim);
    let release = Release {
        volume: claim.volume,
        epoch: claim.epoch,
        claim_id: claim.claim_id,
        released_at: 1_790_000_001,
        last_segment: SegmentNo(last),
    };
    fs::write(place(&v, "a", ObjectName::Release(claim.epoch)), release.encode().unwrap()).unwrap();
    let all = || ["a", "b", "c"].map(|n| bytes_of(&v.path(&format!("replica-{n}"))));
    let before = all();
    let Failed { code, told } =
        v.try_mount(&How::usual().state("new")).err().expect("a minority decides nothing");
    assert_eq!(code, Some(IN_USE), "{told}");
    for word in ["replica a (1 of 3", "evil", "--takeover"] {
        assert!(told.contains(word), "{word}: {told}");
    }
    assert_eq!(told.contains("contradicts what the others hold"), cuts, "{told}");
    assert!(before == all(), "asking changes nothing");
    let none = v.try_mount(&How::usual().state("new").arg("--takeover=x")).err().expect("there is no x");
    assert!(none.told.contains("a, b, c"), "{}", none.told);
    // What cuts off the others is not followed, unless the replica is named.
    let how = How::usual().state("new").arg(if cuts { "--takeover" } else { "--takeover=b" });
    let m = v.mount_as(&how);
    assert!(!cuts || m.told().contains("is not followed"), "{}", m.told());
    check(&m, &[]);
    write(&m, "of the new one");
    m.ask(&["sync"], &["--replicas", "2", "--timeout", "60"]).ok();
    m.unmount();
    assert_clean(&v);
    void(&v, "a", epoch, &[]);
    let m = v.mount_as(&How::usual().state("new"));
    m.sync();
    check(&m, &["of the new one"]);
    m.unmount();
}

#[test]
fn an_empty_state_asks_before_it_follows_what_one_replica_adds() {
    asks_before_it_follows(false);
}

#[test]
fn an_empty_state_asks_before_it_follows_what_cuts_off_the_others() {
    asks_before_it_follows(true);
}

#[test]
fn names_alone_stop_nothing_and_the_replica_is_named() {
    let Some(v) = filled("hostile claims: names") else { return };
    let epoch = newest_epoch(&v, "b");
    let newest = segments(&v.path("replica-b")).len() as u64;
    let whole = fs::read(place(&v, "b", ObjectName::Segment(SegmentNo(newest), Epoch(epoch)))).unwrap();
    let mut newer = whole.clone();
    let end = newer.len();
    (newer[end - 8], newer[end - 320]) = (2, 2);
    let junk = [
        (ObjectName::Segment(SegmentNo(newest + 1), Epoch(epoch)), b"newest + 1".to_vec()),
        (ObjectName::Segment(SegmentNo(newest + 2), Epoch(epoch)), newer),
        (ObjectName::Segment(SegmentNo(newest + 1), Epoch(epoch + 1)), whole),
        (ObjectName::Claim(Epoch(epoch + 1)), b"{}".to_vec()),
        (ObjectName::Claim(Epoch(epoch + 2)), b"junk".to_vec()),
    ];
    for (name, bytes) in &junk {
        fs::write(place(&v, "a", *name), bytes).unwrap();
    }
    let m = v.mount();
    assert!(m.told().contains("replica a"), "{}", m.told());
    write(&m, "after");
    m.ask(&["sync"], &["--replicas", "2", "--timeout", "60"]).ok();
    check(&m, &["after"]);
    m.unmount();
    let m = v.mount_as(&How::usual().state("empty"));
    assert!(m.told().contains("replica a"), "{}", m.told());
    check(&m, &["after"]);
    m.unmount();
    assert_clean(&v);
}

#[test]
fn objects_without_bounds_are_not_read() {
    let Some(v) = filled("hostile claims: oversized") else { return };
    let epoch = newest_epoch(&v, "b");
    let large = |name: ObjectName, bytes: u64| {
        let file = fs::File::create(place(&v, "a", name)).unwrap();
        file.set_len(bytes).unwrap();
    };
    large(ObjectName::Claim(Epoch(epoch + 1)), 12 << 30);
    large(ObjectName::Release(Epoch(epoch)), 5 << 30);
    large(ObjectName::Claim(Epoch(1)), 3 << 30);
    for state in ["state", "empty"] {
        let m = v.mount_as(&How::usual().state(state));
        assert!(m.told().contains("too many"), "{}", m.told());
        check(&m, &[]);
        write(&m, state);
        m.ask(&["sync"], &["--replicas", "2", "--timeout", "60"]).ok();
        let peak = peak_kib(&m);
        assert!(peak < MOST_MEMORY_KIB, "{peak} KiB");
        m.unmount();
    }
    // The replica's volume.json, too; and names without end that are nothing to us.
    large(ObjectName::Volume, 3 << 30);
    let folder: PathBuf = v.path("replica-a").join("epochs");
    for i in 0..20_000 {
        fs::write(Path::new(&folder).join(format!("junk-{i}")), b"").unwrap();
    }
    for state in ["empty", "new"] {
        let m = v.mount_as(&How::usual().state(state));
        check(&m, &["state", "empty"]);
        let peak = peak_kib(&m);
        assert!(peak < MOST_MEMORY_KIB, "{peak} KiB");
        m.unmount();
    }
    assert_clean(&v);
}
