//! Replicas that are looked after: real mounts, `mirrorfs scrub` and `mirrorfs replica`, folders that are damaged, wiped, swapped,
//! attached and let go while the volume is in use.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rand::SeedableRng;
use rand::seq::IndexedRandom;
use serde_json::Value;
use support::mount::{How, Mount, Volume, bytes_of, flip_bit, segments};
use support::run::{seed, wait_until};
use support::tree::{Content, Snapshot};

const DAMAGED: i32 = 7;
const SOON: Duration = Duration::from_secs(120);

/// Two folder replicas, mounted, with some megabytes of content in several segments.
fn volume(test: &str) -> Option<(Volume, PathBuf, PathBuf)> {
    let mut volume = Volume::new(test)?;
    volume.setting("commit_interval = \"300ms\"");
    let (a, b) = (volume.folder("a"), volume.folder("b"));
    Some((volume, a, b))
}

fn fill(mount: &Mount, seed: u64) {
    let mut content = Content::new(seed);
    for i in 0..6 {
        fs::write(mount.path(format!("file{i}")), content.take(700_000)).unwrap();
        mount.sync();
    }
}

fn scrub(mount: &Mount, action: &str, more: &[&str]) -> Value {
    let more = [more, &["--json"]].concat();
    serde_json::from_slice(&mount.ask(&["scrub", action], &more).ok().stdout).unwrap()
}

fn of<'a>(list: &'a Value, name: &str) -> &'a Value {
    let found = list.as_array().unwrap().iter().find(|r| r["replica"] == name || r["name"] == name);
    found.unwrap_or_else(|| panic!("no {name} in {list}"))
}

/// All objects of two replicas are equal, byte for byte.
#[track_caller]
fn assert_equal(a: &Path, b: &Path) {
    let (left, right) = (bytes_of(a), bytes_of(b));
    let names = |m: &std::collections::BTreeMap<PathBuf, Vec<u8>>| m.keys().cloned().collect::<Vec<_>>();
    assert_eq!(names(&left), names(&right));
    for (path, bytes) in &left {
        assert!(bytes == &right[path], "{} differs", path.display());
    }
}

#[test]
fn what_is_damaged_wiped_or_new_is_mended_and_filled() {
    let Some((volume, a, b)) = volume("mended") else { return };
    let seed = seed("mended");
    let mount = volume.mount();
    fill(&mount, seed);
    let tree = Snapshot::take(mount.root());
    let c = volume.path("c");
    mount.ask(&["replica", "attach", &format!("c={}", c.display())], &["--wait"]).ok();
    let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(seed);
    // Not one that b lacks: what is nowhere cannot come back.
    let others = [0, 2, 4, 5].map(|i| segments(&a)[i].clone());
    flip_bit(others.choose(&mut rng).unwrap(), 0.4);
    let (short, gone) = (segments(&b)[1].clone(), segments(&b)[3].clone());
    fs::write(&short, b"cut off").unwrap();
    fs::remove_file(&gone).unwrap();
    fs::write(b.join("holiday.jpg"), "not ours").unwrap();
    fs::remove_dir_all(&c).unwrap();

    // Finding changes nothing, and says so with its code.
    let before = bytes_of(&b);
    let ran = mount
        .ask(&["scrub"], &["--dry-run", "--deep", "--wait", "--replica", "b", "--json"])
        .with_code(DAMAGED);
    let found: Value = serde_json::from_slice(&ran.stdout).unwrap();
    assert_eq!(of(&found, "b")["counters"]["bad"], 2, "{found}");
    assert_eq!(bytes_of(&b), before);

    let done = scrub(&mount, "start", &["--deep", "--wait"]);
    // (The flipped bit of a may have been met, and mended, while c was filled from it.)
    assert_eq!(of(&done, "b")["counters"]["repaired"], 2, "{done}");
    assert_eq!(of(&done, "b")["counters"]["foreign"], 1, "{done}");
    assert!(["a", "b", "c"].iter().all(|r| of(&done, r)["counters"]["left"] == 0), "{done}");
    assert_eq!(fs::read(b.join("holiday.jpg")).unwrap(), b"not ours", "what is not ours is not touched");
    fs::remove_file(b.join("holiday.jpg")).unwrap();
    assert_equal(&a, &b);
    assert_equal(&a, &c);

    // The small objects that say whose it is.
    fs::write(a.join("volume.json"), "rubbish").unwrap();
    fs::write(b.join("epochs/00000001.json"), "rubbish").unwrap();
    fs::remove_file(c.join("epochs/00000001.json")).unwrap();
    scrub(&mount, "start", &["--deep", "--wait"]);
    assert_equal(&a, &b);
    assert_equal(&a, &c);

    // Endings that look like a newer format's: only the number, and all but the last word.
    for (segment, from) in segments(&a).iter().zip([8, 328]) {
        let mut bytes = fs::read(segment).unwrap();
        let end = bytes.len();
        bytes[end - from..end - 6].fill(0x42);
        fs::write(segment, bytes).unwrap();
    }
    let done = scrub(&mount, "start", &["--deep", "--wait"]);
    assert_eq!(of(&done, "a")["counters"]["repaired"], 2, "{done}");
    assert_equal(&a, &b);

    // Set back to an older state: the newest segments are gone.
    for segment in segments(&c).iter().rev().take(2) {
        fs::remove_file(segment).unwrap();
    }
    scrub(&mount, "start", &["--wait"]);
    assert_equal(&a, &c);
    mount.unmount();
    for name in ["a", "b"] {
        tree.assert_same(&Snapshot::take(&volume.restore(name, &format!("from-{name}"))), name);
    }
    assert_equal(&a, &c);
}

#[test]
fn damage_met_while_reading_is_mended_by_itself() {
    let Some((mut volume, a, b)) = volume("met") else { return };
    volume.setting("scrub_interval = \"off\"\ncheck_interval = \"off\"");
    let mount = volume.mount();
    fill(&mount, seed("met"));
    let good = fs::read(mount.path("file3")).unwrap();
    mount.unmount();
    let whole = bytes_of(&a);
    for segment in segments(&a)[1..].iter().chain(&segments(&b)[..1]) {
        flip_bit(segment, 0.5);
    }
    // A new state has nothing in its cache.
    let mount = volume.mount_as(&How::usual().state("fresh"));
    assert!(fs::read(mount.path("file3")).unwrap() == good);
    for i in 0..6 {
        assert_eq!(fs::read(mount.path(format!("file{i}"))).unwrap().len(), 700_000);
    }
    wait_until(SOON, "what reads have met is mended", || {
        let status = mount.status();
        let met: u64 =
            status["replicas"].as_array().unwrap().iter().map(|r| r["damages"].as_u64().unwrap()).sum();
        let scrubs = scrub(&mount, "status", &[]);
        let findings = scrubs.as_array().unwrap().iter().flat_map(|s| s["findings"].as_array().unwrap());
        let mended = findings.filter(|f| f["outcome"] == "repaired").count() as u64;
        met > 0 && mended == met
    });
    // Those that no read has met are found by a scrub.
    scrub(&mount, "start", &["--deep", "--wait"]);
    for (path, bytes) in whole.iter().filter(|(p, _)| p.starts_with("segments")) {
        assert!(fs::read(a.join(path)).unwrap() == *bytes, "{}", path.display());
    }
    mount.unmount();
}

#[test]
fn the_list_of_replicas_changes_in_use_and_is_remembered() {
    let Some((volume, a, b)) = volume("list") else { return };
    let mount = volume.mount();
    fill(&mount, seed("list"));
    let (c, d) = (volume.path("c"), volume.path("d"));
    let names = |mount: &Mount| {
        let list: Value =
            serde_json::from_slice(&mount.ask(&["replica", "list"], &["--json"]).ok().stdout).unwrap();
        let name = |r: &Value| r["name"].as_str().unwrap().to_owned();
        list.as_array().unwrap().iter().map(name).collect::<Vec<_>>()
    };
    // Wrong ones are refused, and change nothing.
    let attach = |place: &Path, name: &str| {
        mount.ask(&["replica", "attach", &format!("{name}={}", place.display())], &[])
    };
    attach(&a, "twice").with_code(2).says(&["twice", "same folder"]);
    attach(&volume.path("other"), "a").with_code(2).says(&["two replicas are called a"]);
    let stranger = volume.path("stranger");
    fs::create_dir(&stranger).unwrap();
    fs::write(stranger.join("photo"), "x").unwrap();
    attach(&stranger, "s").with_code(4).says(&["not empty"]);
    attach(&volume.path("state").join("inside"), "s").with_code(2).says(&["state folder"]);
    mount.ask(&["replica", "detach", "nobody"], &[]).with_code(2).says(&["nobody", "a, b"]);
    assert_eq!(names(&mount), ["a", "b"]);

    attach(&c, "c").ok();
    wait_until(SOON, "c is filled", || mount.replica_status("c")["joining"] == false);
    // Paused, it falls behind, and stays so after a remount.
    mount.ask(&["replica", "pause", "c"], &[]).ok();
    fs::write(mount.path("while paused"), "x").unwrap();
    mount.ask(&["sync"], &["--replicas", "2", "--timeout", "60"]).ok();
    assert_eq!(mount.replica_status("c")["state"], "paused");
    mount.ask(&["replica", "detach", "b"], &[]).ok();
    mount.unmount();
    let held = bytes_of(&b);

    // The configuration still says a and b.
    let mount = volume.mount();
    assert_eq!(names(&mount), ["a", "c"]);
    assert_eq!(mount.replica_status("c")["state"], "paused");
    mount.ask(&["replica", "detach", "a"], &[]).with_code(5).says(&["it alone holds"]);
    mount.ask(&["replica", "resume", "c"], &[]).ok();
    mount.sync();
    assert_eq!(bytes_of(&b), held, "a detached replica is not written");

    // One takes the place of another.
    fs::write(mount.path("more"), vec![7; 300_000]).unwrap();
    mount.ask(&["replica", "replace", "a", &format!("d={}", d.display())], &["--wait"]).ok();
    assert_eq!(names(&mount), ["c", "d"]);
    fs::write(mount.path("last"), "last").unwrap();
    mount.sync();
    let tree = Snapshot::take(mount.root());
    mount.ask(&["replica", "detach", "c"], &[]).ok();
    mount.ask(&["replica", "detach", "d"], &[]).with_code(2).says(&["no other one"]);
    // And one that was let go comes back, catching up.
    mount.ask(&["replica", "attach", &format!("b={}", b.display())], &["--wait"]).ok();
    mount.sync();
    mount.unmount();
    for (name, place) in [("b", &b), ("d", &d)] {
        let to = volume.path(&format!("from-{name}"));
        let from = place.to_str().unwrap();
        support::run::run(support::run::mirrorfs().args(["restore", "--from", from, "--to"]).arg(&to), SOON)
            .ok();
        tree.assert_same(&Snapshot::take(&to), name);
    }
}

#[test]
fn a_scrub_goes_on_after_a_kill_and_stays_paused() {
    let Some((mut volume, a, b)) = volume("resumed") else { return };
    // Slow enough to be met on its way.
    volume.setting("scrub_rate = \"256KiB\"");
    let mount = volume.mount();
    fill(&mount, seed("resumed"));
    flip_bit(segments(&b).last().unwrap(), 0.5);
    scrub(&mount, "start", &["--deep"]);
    let position =
        |mount: &Mount| of(&scrub(mount, "status", &[]), "b")["counters"]["examined"].as_u64().unwrap();
    wait_until(SOON, "it is on its way", || position(&mount) >= 2);
    scrub(&mount, "pause", &[]);
    let paused = position(&mount);
    wait_until(SOON, "it is paused", || of(&scrub(&mount, "status", &[]), "b")["state"] == "paused");
    mount.kill9();
    let mount = volume.mount();
    wait_until(SOON, "the pause is remembered", || {
        of(&scrub(&mount, "status", &[]), "b")["state"] == "paused"
    });
    let now = position(&mount);
    assert!(now >= 1 && now <= paused + 4, "{now} after {paused}");
    scrub(&mount, "resume", &[]);
    wait_until(SOON, "it comes to its end", || {
        let status = scrub(&mount, "status", &[]);
        ["a", "b"].iter().all(|r| of(&status, r)["last"]["deep"] == true)
    });
    let status = scrub(&mount, "status", &[]);
    assert_eq!(of(&status, "b")["last"]["counters"]["repaired"], 1, "{status}");
    // What has begun can be given up.
    scrub(&mount, "start", &["--deep"]);
    scrub(&mount, "stop", &[]);
    let status = scrub(&mount, "status", &[]);
    assert_eq!(of(&status, "a")["last"]["error"], "stopped by command", "{status}");
    mount.unmount();
    for (left, right) in segments(&a).iter().zip(segments(&b)) {
        assert!(fs::read(left).unwrap() == fs::read(right).unwrap());
    }
}

#[test]
fn a_replica_of_another_volume_is_never_touched() {
    let Some((volume, a, b)) = volume("swapped") else { return };
    let mut other = Volume::new("swapped-other").unwrap();
    let theirs = other.folder("x");
    let mount = other.mount();
    fs::write(mount.path("theirs"), "theirs").unwrap();
    mount.sync();
    mount.unmount();

    let mount = volume.mount();
    fill(&mount, 5);
    let kept = volume.path("kept");
    fs::rename(&b, &kept).unwrap();
    fs::rename(&theirs, &b).unwrap();
    let before = bytes_of(&b);
    mount.ask(&["scrub"], &["--deep", "--wait"]).with_code(6).says(&["b", "volume"]);
    wait_until(SOON, "it is told to be foreign", || mount.replica_status("b")["state"] == "foreign");
    fs::write(mount.path("more"), "more").unwrap();
    mount.ask(&["sync"], &["--replicas", "1", "--timeout", "60"]).ok();
    assert_eq!(bytes_of(&b), before);
    // Ours comes back.
    fs::rename(&b, &theirs).unwrap();
    fs::rename(&kept, &b).unwrap();
    mount.ask(&["scrub"], &["--wait"]);
    wait_until(SOON, "ours is taken in again", || mount.replica_status("b")["state"] == "healthy");
    mount.sync();
    scrub(&mount, "start", &["--deep", "--wait"]);
    mount.unmount();
    for (left, right) in segments(&a).iter().zip(segments(&b)) {
        assert!(fs::read(left).unwrap() == fs::read(right).unwrap());
    }
}

#[test]
fn what_no_replica_has_intact_is_pieced_together_from_the_cache() {
    let Some((volume, a, b)) = volume("pieced") else { return };
    let mount = volume.mount();
    fill(&mount, seed("pieced"));
    let whole = bytes_of(&a);
    for replica in [&a, &b] {
        // The same place of both: what lies there is in no replica any more.
        flip_bit(&segments(replica)[2], 0.5);
    }
    let done = scrub(&mount, "start", &["--deep", "--wait"]);
    assert!(["a", "b"].iter().all(|r| of(&done, r)["counters"]["left"] == 0), "{done}");
    assert_eq!(bytes_of(&a), whole);
    assert_equal(&a, &b);
    mount.unmount();
}
