//! `mirrorfs salvage`: what a state folder still gives when its replicas are gone, and when a branch of it was sent already.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::collections::BTreeMap;
use std::fs::{self, OpenOptions};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::time::Duration;

use serde_json::Value;
use support::machine::{Machine, servers};
use support::mount::{How, bytes_of};
use support::run::{seed, wait_until};
use support::tree::Content;

const USAGE: i32 = 2;
const IN_USE: i32 = 5;
const UNREACHABLE: i32 = 6;

/// What is changed while nothing can be reached: where, and how many bytes.
const MIDDLE: usize = (1 << 20) + 12_288;
const CHANGED: usize = 8192;

#[test]
fn without_a_replica_what_is_missing_is_named() {
    let servers = servers();
    let settings = ["cache_size = \"16MiB\"", "commit_interval = \"500ms\""];
    let Some(machine) = Machine::new("salvage: no replica", &servers, &settings) else { return };
    let seed = seed("salvage: no replica");
    let v = &machine.v;
    let m = v.mount();
    // More than the cache holds: of the first one nothing is here any more.
    let noise = |n: u64| Content::new((seed & !3).wrapping_add(4 * n));
    let old = noise(0).take(5 << 20);
    fs::write(m.path("evicted"), &old).unwrap();
    fs::create_dir(m.path("dir")).unwrap();
    for i in 0..3 {
        fs::write(m.path(format!("dir/{i}")), noise(i + 1).take(8 << 20)).unwrap();
        m.sync();
    }
    // Changed while nothing can be reached: in the middle of a block, and at the end.
    machine.cut(true);
    let evicted = OpenOptions::new().write(true).open(m.path("evicted")).unwrap();
    // Whole pages: the kernel would have to read the rest of others, and may have forgotten them.
    evicted.write_all_at(&[7; CHANGED], MIDDLE as u64).unwrap();
    evicted.write_all_at(&[8; 3000], 5 << 20).unwrap();
    evicted.sync_all().unwrap();
    drop(evicted);
    fs::create_dir(m.path("dir/new")).unwrap();
    fs::write(m.path("dir/new/whole"), &old[..200_000]).unwrap();
    fs::set_permissions(m.path("dir/new/whole"), fs::Permissions::from_mode(0o640)).unwrap();
    xattr::set(m.path("dir/new/whole"), "user.why", b"unsent").unwrap();
    fs::hard_link(m.path("dir/new/whole"), m.path("linked")).unwrap();
    symlink("dir/new", m.path("symbolic")).unwrap();
    fs::set_permissions(m.path("dir/0"), fs::Permissions::from_mode(0o600)).unwrap();
    fs::write(m.path("SALVAGE.txt"), b"a file of the volume").unwrap();
    // Unlinked and still open: it is nobody's any more.
    let gone = fs::File::create(m.path("gone")).unwrap();
    gone.write_all_at(&[1; 10_000], 0).unwrap();
    fs::remove_file(m.path("gone")).unwrap();
    // Durable here, all of it.
    fs::File::open(m.root()).unwrap().sync_all().unwrap();
    let state = v.path("state");
    let (state_word, to) = (state.to_str().unwrap(), v.path("saved"));
    machine.salvage(&to, &[]).with_code(IN_USE).says(&["in use by another daemon"]);
    assert!(!to.exists());
    m.kill9();
    drop(gone);

    v.run(&[], &["salvage", "--state", v.path("nothing").to_str().unwrap(), "--to", to.to_str().unwrap()])
        .with_code(USAGE)
        .says(&["no state folder"]);
    let within = state.join("saved");
    v.run(&[], &["salvage", "--state", state_word, "--to", within.to_str().unwrap()])
        .with_code(USAGE)
        .says(&["lies in the state folder"]);
    let ran = machine.salvage(&to, &["--json"]).with_code(UNREACHABLE).says(&[
        "evicted is incomplete",
        "not asked",
        "did not answer",
    ]);
    let report: Value = serde_json::from_slice(&ran.stdout).unwrap();
    let mut files: Vec<PathBuf> = bytes_of(&to).into_keys().collect();
    files.sort();
    let expected = ["SALVAGE-1.txt", "SALVAGE.txt", "dir/new/whole", "evicted.incomplete", "linked"];
    assert_eq!(files, expected.map(PathBuf::from));
    assert_eq!(fs::read(to.join("SALVAGE.txt")).unwrap(), b"a file of the volume");
    let whole = fs::metadata(to.join("dir/new/whole")).unwrap();
    assert_eq!((whole.mode() & 0o7777, whole.nlink()), (0o640, 2));
    assert_eq!(fs::read(to.join("linked")).unwrap(), &old[..200_000]);
    assert_eq!(xattr::get(to.join("linked"), "user.why").unwrap().as_deref(), Some(&b"unsent"[..]));
    assert_eq!(fs::read_link(to.join("symbolic")).unwrap(), PathBuf::from("dir/new"));
    // What was written is there, what was not is a hole, and the holes are named.
    let found = fs::read(to.join("evicted.incomplete")).unwrap();
    assert_eq!(found.len(), (5 << 20) + 3000);
    assert!(found[MIDDLE..][..CHANGED].iter().all(|b| *b == 7));
    assert!(found[5 << 20..].iter().all(|b| *b == 8));
    let missing: Vec<(usize, usize)> =
        serde_json::from_value(report["incomplete"][0]["missing"].clone()).unwrap();
    let lost = |at: usize| missing.iter().any(|(from, to)| (*from..*to).contains(&at));
    for at in [0, 1 << 20, MIDDLE - 1, MIDDLE + CHANGED, (5 << 20) - 1] {
        assert!(lost(at) || found[at] == old[at], "{at} is wrong, and not said to be missing: {missing:?}");
    }
    assert!(lost(0) && !lost(MIDDLE) && !lost(5 << 20), "{missing:?}");
    assert_eq!(report["attributes"], serde_json::json!(["dir/0"]), "{report}");

    // With the replicas it is whole. By the folder's own memory of them their keys are not known.
    machine.cut(false);
    let again = v.path("again");
    machine.salvage(&again, &[]).ok();
    let mut right = old;
    right[MIDDLE..][..CHANGED].fill(7);
    right.extend([8; 3000]);
    assert!(fs::read(again.join("evicted")).unwrap() == right);
    // The state is as good as before.
    let m = v.mount();
    assert!(fs::read(m.path("evicted")).unwrap() == right);
    m.sync();
    m.unmount();
    let reader = v.mount_as(&How::usual().state("reader").arg("--read-only"));
    reader.unmount();
    let nothing = v.path("reader");
    v.run(&[], &["salvage", "--state", nothing.to_str().unwrap(), "--to", v.path("x").to_str().unwrap()])
        .with_code(USAGE)
        .says(&["read-only"]);
}

/// What A sends in the seconds before it learns of B lies on the replicas, and is no part of the volume.
#[test]
fn what_was_sent_too_late_is_found_on_the_replicas() {
    let servers = servers();
    let settings = ["commit_interval = \"200ms\""];
    let Some(a) = Machine::new("salvage: lost branch, A", &servers, &settings) else { return };
    let b = Machine::new("salvage: lost branch, B", &servers, &settings).unwrap();
    let seed = seed("salvage: lost branch");
    let ma = a.v.mount();
    fs::write(ma.path("common"), b"common").unwrap();
    ma.sync();
    let mb = b.v.mount_as(&How::usual().arg("--takeover"));
    // At once, before A looks: it is sent, and A forgets its own copy.
    let mut late = BTreeMap::new();
    for i in 0..5_u64 {
        let content = Content::new(seed + i).take(100_000);
        let _ = fs::write(ma.path(format!("late{i}")), &content);
        late.insert(format!("late{i}"), content);
    }
    wait_until(Duration::from_secs(90), "A turns read-only", || !ma.status()["read_only"].is_null());
    let sent = ma.status()["staged_segments"] == 0;
    println!("A had {}", if sent { "sent it all" } else { "not sent it all" });
    late.retain(|name, content| fs::read(ma.path(name)).is_ok_and(|found| found == *content));
    fs::write(mb.path("of b"), b"b").unwrap();
    mb.sync();
    mb.unmount();
    ma.unmount();
    // Sealed and trimmed segments are asked for where they are; cached content would be here.
    let to = a.v.path("saved");
    a.salvage(&to, &[]).ok();
    for (name, content) in &late {
        assert!(fs::read(to.join(name)).is_ok_and(|found| found == *content), "{name} is not saved");
    }
    assert!(!to.join("common").exists());
    a.proxies.iter().for_each(|p| p.faults.refuse.store(true, Ordering::Relaxed));
    a.cut(true);
    let blind = a.salvage(&a.v.path("blind"), &[]);
    if sent && !late.is_empty() {
        blind.with_code(UNREACHABLE).says(&["neither here nor on a replica", "--all"]);
        // Content is in the cache: everything together can be saved all the same.
        let all = a.v.path("all");
        a.salvage(&all, &["--all"]).ok();
        for (name, content) in &late {
            assert!(fs::read(all.join(name)).is_ok_and(|found| found == *content), "{name} is not saved");
        }
    }
}
