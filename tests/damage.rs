//! Bits flip on a replica: reads stay right, and it is said.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::fs;

use serde_json::Value;
use support::mount::{How, Volume, flip_bit, segments};
use support::tree::Content;

/// The sum of all numbers whose name speaks of damage.
fn counted(value: &Value) -> u64 {
    match value {
        Value::Object(map) => map
            .iter()
            .map(|(key, value)| match value.as_u64() {
                Some(n) if key.contains("damage") || key.contains("corrupt") => n,
                _ => counted(value),
            })
            .sum(),
        Value::Array(list) => list.iter().map(counted).sum(),
        _ => 0,
    }
}

#[test]
fn a_flipped_bit_on_the_preferred_replica_hurts_nobody() {
    let Some(mut v) = Volume::new("damage") else { return };
    let a = v.folder("a");
    v.folder("b");
    let content = |i: u64| Content::new(i * 4).take(300_000 + i as usize * 40_000);
    let m = v.mount();
    for i in 0..30 {
        fs::write(m.path(format!("f{i}")), content(i)).unwrap();
    }
    m.sync();
    m.unmount();
    // Noise does not compress, so nearly all of a segment is blocks: these hit blocks, not the index at the end.
    let all = segments(&a);
    assert!(!all.is_empty());
    for segment in &all {
        for at in [0.1, 0.3, 0.5, 0.7] {
            flip_bit(segment, at);
        }
    }

    let m = v.mount_as(&How::usual().state("fresh"));
    assert_eq!(counted(&m.status()), 0, "nothing was read yet: {}", m.status());
    for i in 0..30 {
        assert!(fs::read(m.path(format!("f{i}"))).unwrap() == content(i), "f{i} reads wrong");
    }
    let status = m.status();
    assert!(counted(&status) > 0, "not counted: {status}");
    let told = m.told();
    let warnings: Vec<_> =
        told.lines().filter(|l| (l.contains("WARN") || l.contains("ERROR")) && l.contains(".seg")).collect();
    assert!(warnings.iter().any(|l| l.contains("replica a")), "not logged with replica and object: {told}");
    assert!(!warnings.iter().any(|l| l.contains("replica b")), "the good one is blamed: {told}");
}

#[test]
fn a_block_that_nobody_has_intact_is_an_error_never_zeros() {
    let Some(mut v) = Volume::new("damage: everywhere") else { return };
    let (a, b) = (v.folder("a"), v.folder("b"));
    let m = v.mount();
    let content = Content::new(0).take(3 << 20);
    fs::write(m.path("lost"), &content).unwrap();
    m.sync();
    fs::write(m.path("kept"), &content[..2 << 20]).unwrap();
    m.unmount();
    for segment in [&segments(&a)[0], &segments(&b)[0]] {
        flip_bit(segment, 0.4);
    }
    let m = v.mount_as(&How::usual().state("fresh"));
    match fs::read(m.path("lost")) {
        Ok(bytes) => assert!(bytes == content, "wrong bytes were handed out"),
        Err(e) => assert_eq!(e.raw_os_error(), Some(libc::EIO), "{e}"),
    }
    let failed = fs::read(m.path("lost")).is_err();
    assert!(failed, "both copies of a block are damaged, and yet it was read");
    let told = m.told();
    let named = told.lines().any(|l| l.contains("ERROR") && (l.contains("lost") || l.contains("inode")));
    assert!(named, "the log does not name the file: {told}");
    // The daemon lives, and what is new is not harmed.
    fs::write(m.path("new"), b"new").unwrap();
    m.sync();
    m.unmount();
}

#[test]
fn a_journal_that_is_gone_is_never_taken_for_an_empty_volume() {
    let Some(mut v) = Volume::new("damage: journal gone") else { return };
    let replicas = [v.folder("a"), v.folder("b")];
    let content = Content::new(0).take(3 << 20);
    let m = v.mount();
    fs::write(m.path("kept"), &content).unwrap();
    m.sync();
    m.unmount();
    // A later tenure, which has written nothing.
    v.mount().unmount();
    let state = v.path("state");
    for part in ["db", "tail"] {
        fs::remove_dir_all(state.join(part)).unwrap();
    }
    fs::remove_file(state.join("witness")).unwrap();
    let away = |path: &std::path::Path| path.with_extension("away");
    for folder in &replicas {
        fs::rename(folder, away(folder)).unwrap();
    }
    // Nothing to rebuild it from, twice: the first attempt must not leave an empty journal to the second.
    for _ in 0..2 {
        assert!(v.try_mount(&How::usual()).is_err());
    }
    let to = v.path("saved");
    let ran = v.run(&[], &["salvage", "--state", state.to_str().unwrap(), "--to", to.to_str().unwrap()]);
    assert_ne!(ran.code, Some(0), "{}", ran.stderr);
    for folder in &replicas {
        fs::rename(away(folder), folder).unwrap();
    }
    let m = v.mount();
    assert!(fs::read(m.path("kept")).unwrap() == content);
    m.unmount();
}
