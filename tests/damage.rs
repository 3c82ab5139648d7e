//! Bits flip on a replica: reads stay right, and it is said.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;

use mirrorfs::format::tables::{Dirent, FileKind, Inode, dirent_key, inode_key};
use mirrorfs::ids::Ino;
use mirrorfs::journal::{self, Journal, JournalError, Tx};
use serde_json::{Value, json};
use support::mount::{How, Volume, bytes_of, flip_bit, segments};
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

/// Changes the local tables of a volume that is not mounted, as no operation would.
fn tamper(state: &std::path::Path, harm: impl FnOnce(&mut Tx<'_>)) {
    let (journal, _) = Journal::open(journal::Options::new(state, Arc::new(|_| Ok(())))).unwrap();
    journal
        .transact::<_, JournalError>(|tx| {
            harm(tx);
            Ok(())
        })
        .unwrap();
    journal.close().unwrap();
}

#[test]
fn fsck_finds_and_mends_and_its_code_says_how_it_ended() {
    let Some(mut v) = Volume::new("damage: fsck") else { return };
    let (a, b) = (v.folder("a"), v.folder("b"));
    let state = v.path("state");
    let content = Content::new(1).take(3_000_000);
    let m = v.mount();
    fs::create_dir(m.path("dir")).unwrap();
    fs::write(m.path("dir/file"), &content).unwrap();
    fs::write(m.path("dir/small"), b"small").unwrap();
    fs::hard_link(m.path("dir/small"), m.path("twin")).unwrap();
    m.sync();
    let ino = |name: &str| Ino(fs::metadata(m.path(name)).unwrap().ino());
    let (dir, file, small) = (ino("dir"), ino("dir/file"), ino("dir/small"));
    // While it is mounted the daemon checks, and repairs nothing.
    let ran = m.ask(&["fsck"], &["--replica", "all", "--json"]).ok();
    let report: Value = serde_json::from_slice(&ran.stdout).unwrap();
    assert_eq!((&report["errors"], &report["totals"]["inodes"]), (&json!(0), &json!(4)), "{report}");
    let same = "has the same metadata as this machine";
    assert_eq!(ran.text().matches(same).count(), 2, "{report}");
    m.ask(&["fsck"], &["--repair"]).with_code(8).says(&["unmount it"]);
    m.ask(&["fsck"], &["--replica", "nobody"]).with_code(16).says(&["no replica is called nobody"]);
    m.kill9();

    let all_but_lock = || {
        let mut all = bytes_of(&state);
        all.retain(|path, _| path.as_os_str() != "LOCK");
        all
    };
    let before = all_but_lock();
    v.fsck("state", &["--replica", "all", "--deep"]).ok();
    assert!(all_but_lock() == before, "a check has changed the state folder");
    let inode = |tx: &Tx<'_>, ino| Inode::decode(&tx.get(&inode_key(ino)).unwrap().unwrap()).unwrap();
    tamper(&state, |tx| {
        let wrong = Inode { nlink: 9, ..inode(tx, small) };
        tx.put(inode_key(small), wrong.encode());
        tx.delete(dirent_key(dir, b"file"));
        tx.put(dirent_key(dir, b"ghost"), Dirent { ino: Ino(9_999), kind: FileKind::Regular }.encode());
    });
    let before = all_but_lock();
    let found = v.fsck("state", &[]).with_code(4).text();
    let gone = format!("inode {file}: no name leads to it");
    for line in ["/dir/ghost: it leads to inode 9999", "link count 9, but 2 names", &gone, "--repair"] {
        assert!(found.contains(line), "{line}: {found}");
    }
    assert!(all_but_lock() == before, "a check has changed the state folder");
    let report = v.fsck("state", &["--json"]).with_code(4);
    let report: Value = serde_json::from_slice(&report.stdout).unwrap();
    assert_eq!((&report["errors"], &report["left"]), (&json!(3), &json!(3)), "{report}");
    let replica = v.fsck("state", &["--replica", "a"]).with_code(4).text();
    assert!(replica.contains("replica a restores 4 inodes"), "the replica is as good as before: {replica}");
    let mended = v.fsck("state", &["--repair"]).with_code(1).text();
    assert!(
        mended.contains("/dir/ghost: it leads to inode 9999, of which nothing is there: corrected"),
        "{mended}"
    );
    v.fsck("state", &[]).ok();
    let m = v.mount();
    let lost = format!("lost+found/#{file}");
    assert!(fs::read(m.path(&lost)).unwrap() == content);
    assert!(!m.path("dir/ghost").exists() && fs::metadata(m.path("twin")).unwrap().nlink() == 2);
    m.sync();
    m.unmount();
    // The replicas got the mend like any other change.
    let restored = v.restore("b", "restored");
    assert!(fs::read(restored.join(&lost)).unwrap() == content);
    v.fsck("state", &["--replica", "all", "--deep"]).ok();

    // A replica alone, with and without damage.
    let alone = |more: &[&str]| v.run(&["a"], &[&["fsck", "--replica", a.to_str().unwrap()], more].concat());
    alone(&["--deep"]).ok();
    alone(&["--repair"]).with_code(16).says(&["mirrorfs scrub"]);
    let first = &segments(&a)[0];
    flip_bit(first, 0.5);
    v.fsck("state", &["--replica", "a"]).ok();
    let deep = v.fsck("state", &["--replica", "a", "--deep"]).with_code(4).text();
    assert!(deep.contains("is damaged") && deep.contains("mirrorfs scrub --replica a --deep"), "{deep}");
    fs::remove_file(first).unwrap();
    let missing = v.fsck("state", &["--replica", "all"]).with_code(4).text();
    assert!(missing.contains("replica a: segments/") && missing.contains("is missing"), "{missing}");
    assert!(alone(&[]).with_code(4).text().contains("replica"));
    fs::rename(&b, b.with_extension("away")).unwrap();
    let silent = v.fsck("state", &["--replica", "b"]).with_code(8).text();
    assert!(silent.contains("not checked: replica b"), "{silent}");

    // What has no tables to look at.
    v.fsck("nothing", &[]).with_code(8).says(&["no state folder"]);
    v.run(&[], &["fsck", "--nonsense"]).with_code(16);
    fs::remove_dir_all(state.join("db")).unwrap();
    let gone = v.fsck("state", &[]).with_code(4).text();
    assert!(gone.contains("The next mount rebuilds the local tables"), "{gone}");
}
