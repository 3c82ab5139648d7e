//! Outages, and restores that are run again.

use std::time::Duration;

use super::*;
use crate::replica::ErrorKind;
use crate::replica::fault::{Fault, Op as Call, Rule};

/// Two files in two segments, one of several blocks.
async fn two_files() -> (World, [(String, Vec<u8>); 2]) {
    let mut w = world(1).await;
    let (a, b) = (content(3 * BLOCK + 5, 1), content(200, 2));
    w.dir(1, b"d", 5);
    w.file(5, b"a", 2, &a);
    w.cut(1, true).await;
    w.file(1, b"b", 3, &b);
    w.cut(1, true).await;
    (w, [("b".to_owned(), b), ("d/a".to_owned(), a)])
}

/// Restores while what is read of segments' content fails as told.
async fn restored_with(w: &World, to: &Path, rule: Rule) -> Report {
    let plan = plan(&survey(&w.stores).await, None).unwrap();
    let mut tables = Tables::default();
    load(&plan, &w.stores, &mut tables).await.unwrap();
    let options = Options {
        to: to.to_owned(),
        overwrite: false,
        filter: Filter::default(),
        block_size: w.volume.block_size,
    };
    w.faults[0].add(rule);
    let report = restore(&tables, &Source::new(&plan, &w.stores), &options, &mut |_| ()).await.unwrap();
    w.faults[0].clear();
    report
}

#[tokio::test]
async fn an_outage_is_waited_for() {
    let (mut w, expected) = two_files().await;
    w.stores[0] = w.stores[0].clone().with_patience(Duration::from_secs(60));
    for kind in [ErrorKind::Transient, ErrorKind::Denied, ErrorKind::Config, ErrorKind::Absent] {
        let temp = tempfile::tempdir().unwrap();
        let rule = Rule::always(Fault::Before(kind), &[Call::Get, Call::Head]).times(12);
        let report = restored_with(&w, temp.path(), rule).await;
        assert_eq!(report.problems, [], "{kind:?}");
        assert_eq!(report.damaged, [], "{kind:?}");
        assert_eq!(files(temp.path()), expected, "{kind:?}");
        open_up(temp.path());
    }
}

#[tokio::test]
async fn an_outage_that_lasts_is_no_damage_and_the_next_restore_goes_on() {
    let (w, expected) = two_files().await;
    for kind in [ErrorKind::Transient, ErrorKind::Denied, ErrorKind::Config, ErrorKind::Absent] {
        let temp = tempfile::tempdir().unwrap();
        let rule = Rule::always(Fault::Before(kind), &[Call::Get, Call::Head]);
        let report = restored_with(&w, temp.path(), rule).await;
        assert_eq!(report.worst(), Some(ProblemKind::Unreachable), "{kind:?}: {:?}", report.problems);
        assert!(report.problems.iter().all(|p| p.kind == ProblemKind::Unreachable), "{:?}", report.problems);
        assert!(!report.problems.iter().any(|p| p.text.contains("intact nowhere")));
        assert_eq!(report.damaged, [], "{kind:?}");
        assert_eq!(files(temp.path()), [], "{kind:?}");
        let report = restored(&w, temp.path(), |_| ()).await.unwrap();
        assert_eq!(report.problems, [], "{kind:?}");
        assert_eq!(files(temp.path()), expected);
        for dir in ["", "d"] {
            let meta = fs::metadata(temp.path().join(dir)).unwrap();
            assert!(dir.is_empty() || (time_of(&meta), meta.mode() & 0o7777) == (MTIME, 0o550), "{dir}");
        }
        open_up(temp.path());
    }
}

#[tokio::test]
async fn what_is_there_already_is_not_fetched_again() {
    let (mut w, expected) = two_files().await;
    let mut hard = inode(FileKind::Regular, 3, Body::Inline(b"abc".to_vec().into()));
    hard.nlink = 2;
    w.node(1, b"one", 7, hard.clone());
    w.node(5, b"other", 7, hard);
    w.node(1, b"link", 8, inode(FileKind::Symlink, 1, Body::Target(b"x".to_vec().into())));
    w.node(1, b"fifo", 9, inode(FileKind::Fifo, 0, Body::Blocks));
    w.node(1, b"hole", 10, inode(FileKind::Regular, 1 << 40, Body::Blocks));
    // Its last block holds more than the file.
    w.file(1, b"cut", 11, &content(BLOCK, 3));
    w.node(1, b"cut", 11, inode(FileKind::Regular, BLOCK - 10, Body::Blocks));
    w.cut(1, true).await;
    let temp = tempfile::tempdir().unwrap();
    let to = temp.path().join("to");
    assert_eq!(restored(&w, &to, |_| ()).await.unwrap().problems, []);
    let inodes = |name: &str| fs::symlink_metadata(to.join(name)).unwrap().ino();
    let before = ["one", "b", "d/a", "link", "fifo", "cut", "hole"].map(inodes);
    let report = restored(&w, &to, |_| ()).await.unwrap();
    assert_eq!(report.problems, []);
    assert_eq!(report.done.entries_done, report.done.entries);
    // But for the one block that no hash tells of, nothing is fetched.
    assert_eq!(report.done.bytes, BLOCK as u64 - 10);
    assert_eq!(["one", "b", "d/a", "link", "fifo", "cut", "hole"].map(inodes), before);
    assert_eq!(inodes("one"), inodes("d/other"));
    for (name, raw) in &expected {
        assert!(fs::read(to.join(name)).unwrap() == *raw);
    }
    for dir in ["", "d"] {
        assert_eq!(time_of(&fs::metadata(to.join(dir)).unwrap()), MTIME, "{dir}");
    }
    // One byte, in a block or in what was a hole, and it is another file.
    open_up(&to);
    for (name, at) in [("b", 7), ("d/a", 2 * BLOCK as u64), ("hole", 1 << 39), ("cut", 9), ("one", 1)] {
        use std::os::unix::fs::FileExt;
        fs::OpenOptions::new().write(true).open(to.join(name)).unwrap().write_all_at(b"#", at).unwrap();
    }
    let report = restored(&w, &to, |_| ()).await.unwrap();
    let mut told: Vec<_> = report.problems.iter().map(|p| (p.path.as_str(), p.kind)).collect();
    told.sort_unstable();
    let all = ["b", "cut", "d/a", "hole", "one"].map(|p| (p, ProblemKind::Skipped));
    assert!(all.iter().all(|one| told.contains(one)), "{told:?}");
    open_up(&to);
}

#[tokio::test]
async fn what_a_damaged_replica_left_goes_when_it_is_repaired() {
    let mut w = world(1).await;
    let raw = content(BLOCK, 1);
    w.file(1, b"f", 2, &raw);
    w.file(1, b"g", 3, b"g");
    // The user's own, or the volume's.
    w.node(1, b"g.damaged", 4, inode(FileKind::Regular, 0, Body::Blocks));
    w.cut(1, true).await;
    let path = w.segment(SegmentNo(1));
    let good = w.stores[0].get(&path).await.unwrap();
    w.spoil(0, &path, good.len() - 300).await;
    let temp = tempfile::tempdir().unwrap();
    for _ in 0..2 {
        let report = restored(&w, temp.path(), |_| ()).await.unwrap();
        assert_eq!(report.worst(), Some(ProblemKind::Damaged));
        let names: Vec<_> = files(temp.path()).into_iter().map(|(name, _)| name).collect();
        assert_eq!(names, ["f.damaged", "g", "g.damaged"], "the second does not leave another one");
    }
    fs::write(temp.path().join("f.damaged-1"), "mine").unwrap();
    w.stores[0].put(&path, good).await.unwrap();
    let report = restored(&w, temp.path(), |_| ()).await.unwrap();
    assert_eq!(report.problems, []);
    let names: Vec<_> = files(temp.path()).into_iter().map(|(name, _)| name).collect();
    assert_eq!(names, ["f", "f.damaged-1", "g", "g.damaged"]);
}

#[tokio::test]
async fn what_a_killed_restore_left_is_cleared_and_finished() {
    let (w, expected) = two_files().await;
    let temp = tempfile::tempdir().unwrap();
    let to = temp.path();
    // As it is left: a folder of drafts, directories without their attributes.
    for dir in ["", ".mirrorfs-restore", "d"] {
        let _ = fs::create_dir(to.join(dir));
        fs::set_permissions(to.join(dir), Permissions::from_mode(0o700)).unwrap();
    }
    fs::write(to.join(".mirrorfs-restore/17"), "half").unwrap();
    let report = restored(&w, to, |_| ()).await.unwrap();
    assert_eq!(report.problems, []);
    assert_eq!(files(to), expected);
    assert!(!to.join(".mirrorfs-restore").exists());
    for dir in ["", "d"] {
        let meta = fs::metadata(to.join(dir)).unwrap();
        assert_eq!((time_of(&meta), meta.mode() & 0o7777), (MTIME, 0o550), "{dir}");
    }
    open_up(to);
}

#[tokio::test]
async fn a_folder_of_drafts_is_not_taken_from_others() {
    let (w, _) = two_files().await;
    let temp = tempfile::tempdir().unwrap();
    let (to, outside) = (temp.path().join("to"), temp.path().join("outside"));
    for dir in [&to, &outside] {
        fs::create_dir(dir).unwrap();
    }
    fs::write(outside.join("1"), "mine").unwrap();
    symlink(&outside, to.join(".mirrorfs-restore")).unwrap();
    let error = restored(&w, &to, |_| ()).await.unwrap_err();
    assert!(error.to_string().contains("no folder of a restore"), "{error}");
    assert!(outside.join("1").exists());
    fs::remove_file(to.join(".mirrorfs-restore")).unwrap();
    // Two at a time.
    let held = Target::open(&to, ".mirrorfs-restore".into()).unwrap();
    let error = restored(&w, &to, |_| ()).await.unwrap_err();
    assert!(error.to_string().contains("another restore"), "{error}");
    drop(held);
    assert_eq!(restored(&w, &to, |_| ()).await.unwrap().problems, []);
    open_up(&to);
}
