//! Somebody who knows the format writes to one of several replicas. Real mounts and `mirrorfs
//! scrub`: what he made goes nowhere, is told, and what we know to be ours is repaired. Also what
//! may lie in a replica's folder instead of files and folders.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::time::Duration;

use mirrorfs::format::checkpoint::{Manifest, PartBuilder};
use mirrorfs::format::names::ObjectName;
use mirrorfs::format::record::{Op, Record};
use mirrorfs::format::segment::{Footer, SegmentBuilder, parse_footer};
use mirrorfs::format::tables::volume_key;
use mirrorfs::ids::SegmentNo;
use serde_json::Value;
use support::mount::{How, Mount, Volume, bytes_of, flip_bit, segments};
use support::run::{seed, wait_until};
use support::tree::{Content, Snapshot};

const DAMAGED: i32 = 7;
const SOON: Duration = Duration::from_secs(120);

/// Folder replicas of these names, which look after themselves only when asked.
fn volume<const N: usize>(test: &str, names: [&str; N]) -> Option<(Volume, [PathBuf; N])> {
    let mut volume = Volume::new(test)?;
    volume.setting("commit_interval = \"300ms\"");
    volume.setting("scrub_interval = \"off\"\ncheck_interval = \"off\"");
    let folders = names.map(|name| volume.folder(name));
    Some((volume, folders))
}

fn fill(mount: &Mount, seed: u64) {
    let mut content = Content::new(seed);
    for i in 0..5 {
        fs::write(mount.path(format!("file{i}")), content.take(300_000)).unwrap();
        mount.sync();
    }
}

fn scrub(mount: &Mount, code: i32) -> Value {
    let ran = mount.ask(&["scrub", "start"], &["--deep", "--wait", "--json"]).with_code(code);
    serde_json::from_slice(&ran.stdout).unwrap()
}

fn of<'a>(list: &'a Value, name: &str) -> &'a Value {
    let found = list.as_array().unwrap().iter().find(|r| r["replica"] == name);
    found.unwrap_or_else(|| panic!("no {name} in {list}"))
}

/// Waits until no segment is staged any more: what is missing can only come from other replicas.
fn trimmed(mount: &Mount) {
    wait_until(SOON, "the staging area is empty", || mount.status()["staged_segments"] == 0);
}

fn newest(replica: &Path) -> (PathBuf, Footer, Vec<u8>) {
    let path = segments(replica).pop().unwrap();
    let bytes = fs::read(&path).unwrap();
    let footer = parse_footer(&bytes, bytes.len() as u64).unwrap();
    (path, footer, bytes)
}

/// Puts a checkpoint of a volume without files onto a replica: whole by itself, as of segment
/// `number`. Gives its manifest's name.
fn forge_checkpoint(replica: &Path, number: SegmentNo) -> String {
    let (_, footer, _) = newest(replica);
    let (volume, epoch) = (footer.header.volume, footer.header.epoch);
    let lsn = footer.commit.unwrap();
    let mut part = PartBuilder::new(volume, lsn);
    part.push(&volume_key("forged"), b"yes").unwrap();
    let (bytes, info) = part.finish(0).unwrap();
    let manifest = Manifest {
        volume,
        number,
        epoch,
        commit_lsn: lsn,
        lsn_begin: lsn,
        lsn_end: lsn,
        replay_from: number.next(),
        previous: footer.hash,
        created_at: 1,
        entries: 1,
        raw_bytes: info.len,
        parts: vec![info],
    };
    let write = |name: ObjectName, bytes: &[u8]| {
        let path = replica.join(name.path());
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
    };
    write(ObjectName::CheckpointPart(number, epoch, 0), &bytes);
    let name = ObjectName::CheckpointManifest(number, epoch);
    write(name, &manifest.encode().unwrap());
    name.path()
}

/// Puts another whole segment in the place of the newest one.
fn forge_segment(replica: &Path) -> PathBuf {
    let (path, footer, _) = newest(replica);
    let mut builder = SegmentBuilder::new(footer.header);
    let lsn = footer.commit.unwrap();
    builder.push(&Record { lsn, ops: vec![Op::put(volume_key("forged"), &b"yes"[..])] }).unwrap();
    let (bytes, _) = builder.finish(Some(lsn)).unwrap();
    fs::write(&path, &bytes).unwrap();
    path.strip_prefix(replica).unwrap().to_owned()
}

#[test]
fn a_forged_checkpoint_is_told_and_goes_nowhere() {
    let Some((volume, [a, b, c])) = volume("forged checkpoint", ["a", "b", "c"]) else { return };
    let mount = volume.mount();
    fill(&mount, seed("forged checkpoint"));
    let tree = Snapshot::take(mount.root());
    let good = [bytes_of(&a), bytes_of(&b)];
    let number = newest(&c).1.header.number;
    let forged = [forge_checkpoint(&c, number), forge_checkpoint(&c, SegmentNo(number.0 - 1))];

    let told = scrub(&mount, DAMAGED);
    assert_eq!(of(&told, "c")["counters"]["forged"], 2, "{told}");
    for name in ["a", "b"] {
        let counters = &of(&told, name)["counters"];
        assert!(counters["forged"] == 0 && counters["bad"] == 0, "{name}: {told}");
    }
    let findings = of(&told, "c")["findings"].to_string();
    assert!(forged.iter().all(|path| findings.contains(path)), "{told}");
    assert!(findings.contains("the log does not name this checkpoint"), "{told}");
    assert_eq!([bytes_of(&a), bytes_of(&b)], good, "nothing was copied");
    assert!(forged.iter().all(|path| c.join(path).exists()), "nor deleted");
    mount.unmount();

    // A mount that sees the others, too, is not misled, and is the next writer.
    let mount = volume.mount_as(&How::usual().state("fresh"));
    tree.assert_same(&Snapshot::take(mount.root()), "mounted anew");
    let told = scrub(&mount, DAMAGED);
    assert_eq!(of(&told, "c")["counters"]["forged"], 2, "the next writer knows it, too: {told}");
    assert!(!a.join(&forged[0]).exists() && !b.join(&forged[0]).exists());
    mount.unmount();
}

#[test]
fn a_new_replica_gets_the_segment_that_was_sealed() {
    let Some((volume, [a, b])) = volume("forged segment", ["a", "b"]) else { return };
    let mount = volume.mount();
    fill(&mount, seed("forged segment"));
    let tree = Snapshot::take(mount.root());
    trimmed(&mount);
    let forged = forge_segment(&a);
    assert_ne!(fs::read(a.join(&forged)).unwrap(), fs::read(b.join(&forged)).unwrap());
    let c = volume.path("c");
    mount.ask(&["replica", "attach", &format!("c={}", c.display())], &["--wait"]).ok();
    assert!(fs::read(c.join(&forged)).unwrap() == fs::read(b.join(&forged)).unwrap(), "c got the true one");
    // And a copy that differs from the known one is repaired.
    let done = scrub(&mount, 0);
    assert_eq!(of(&done, "a")["counters"]["left"], 0, "{done}");
    assert!(bytes_of(&a) == bytes_of(&b) && bytes_of(&b) == bytes_of(&c));
    mount.unmount();
    tree.assert_same(&Snapshot::take(&volume.restore("a", "from-a")), "a");
}

#[test]
fn scrub_says_repaired_only_of_what_is_there() {
    let Some((volume, [a, b])) = volume("true words", ["a", "b"]) else { return };
    let mount = volume.mount();
    fill(&mount, seed("true words"));
    let tree = Snapshot::take(mount.root());
    trimmed(&mount);
    // The source of what b lacks is damaged at first.
    let objects = bytes_of(&a).len();
    flip_bit(&segments(&a)[1], 0.5);
    for entry in fs::read_dir(&b).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() { fs::remove_dir_all(path).unwrap() } else { fs::remove_file(path).unwrap() }
    }
    let done = scrub(&mount, 0);
    assert!(bytes_of(&a) == bytes_of(&b), "b is whole when the command returns: {done}");
    let counters = &of(&done, "b")["counters"];
    assert!(counters["left"] == 0 && counters["repaired"] == counters["bad"], "{done}");
    assert!(counters["repaired"].as_u64().unwrap() >= objects as u64 - 1, "{done}");
    mount.unmount();
    tree.assert_same(&Snapshot::take(&volume.restore("b", "from-b")), "b");
}

#[test]
fn scrub_says_what_is_left() {
    let Some((volume, [a, b])) = volume("what is left", ["a", "b"]) else { return };
    let mount = volume.mount();
    fill(&mount, seed("what is left"));
    trimmed(&mount);
    // A segment that is nowhere any more, and that nobody can put together: its index is gone.
    let lost = segments(&a)[2].clone();
    let bytes = fs::read(&lost).unwrap();
    fs::write(&lost, &bytes[..bytes.len() / 2]).unwrap();
    for segment in &segments(&b)[2..] {
        fs::remove_file(segment).unwrap();
    }
    let told = scrub(&mount, DAMAGED);
    let left = |name| of(&told, name)["counters"]["left"].as_u64().unwrap();
    assert!(left("a") >= 1 && left("b") >= 1, "{told}");
    let path = lost.strip_prefix(&a).unwrap();
    assert!(of(&told, "b")["findings"].to_string().contains(path.to_str().unwrap()), "{told}");
    // What can be had is there.
    assert_eq!(segments(&b).len(), segments(&a).len() - 1);
    mount.kill9();
}

#[test]
fn many_small_groups_give_a_checkpoint() {
    let Some((mut volume, [a])) = volume("many groups", ["a"]) else { return };
    volume.setting("fsync = \"one\"");
    let mount = volume.mount();
    let file = fs::File::create(mount.path("counter")).unwrap();
    let has_one = || fs::read_dir(a.join("checkpoints")).is_ok_and(|mut found| found.next().is_some());
    for n in 0..256u32 {
        if n == 200 {
            assert!(!has_one(), "not yet");
        }
        std::os::unix::fs::FileExt::write_all_at(&file, &n.to_le_bytes(), 0).unwrap();
        file.sync_all().unwrap();
    }
    drop(file);
    mount.sync();
    wait_until(SOON, "a checkpoint", has_one);
    let done = scrub(&mount, 0);
    assert_eq!(of(&done, "a")["counters"]["forged"], 0, "the log names it: {done}");
    mount.unmount();
    let to = volume.restore("a", "from-a");
    assert_eq!(fs::read(to.join("counter")).unwrap(), 255u32.to_le_bytes());
}

#[test]
fn links_and_fifos_in_a_replica_neither_lead_outside_nor_hang() {
    let Some((volume, [a, b])) = volume("links", ["a", "b"]) else { return };
    let mount = volume.mount();
    fill(&mount, seed("links"));
    let fifo = segments(&a)[1].clone();
    fs::remove_file(&fifo).unwrap();
    let made = std::process::Command::new("mkfifo").arg(&fifo).status().unwrap();
    assert!(made.success());
    let done = scrub(&mount, 0);
    assert_eq!(of(&done, "a")["counters"]["repaired"], 1, "{done}");
    assert!(bytes_of(&a) == bytes_of(&b));

    let outside = volume.path("outside");
    fs::rename(a.join("segments"), &outside).unwrap();
    symlink(&outside, a.join("segments")).unwrap();
    let before = bytes_of(&outside);
    fs::write(mount.path("more"), "more").unwrap();
    let said = || mount.replica_status("a")["last_error"]["text"].as_str().unwrap_or_default().to_owned();
    mount.ask(&["sync"], &["--replicas", "1", "--timeout", "60"]).ok();
    wait_until(SOON, "the link is told", || said().contains("symbolic link"));
    assert!(bytes_of(&outside) == before, "nothing is written through the link");
    fs::remove_file(a.join("segments")).unwrap();
    fs::rename(&outside, a.join("segments")).unwrap();
    mount.sync();
    assert!(bytes_of(&a) == bytes_of(&b));
    mount.unmount();
}
