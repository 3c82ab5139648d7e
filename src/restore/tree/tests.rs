//! Tests of filters, the walk and listings.

use super::super::Sink;
use super::*;
use crate::format::record::Op;
use crate::format::tables::{Dirent, Time, dirent_key, inode_key};

fn inode(kind: FileKind) -> Inode {
    Inode {
        nlink: 1,
        size: 9,
        mtime: Time { secs: 1_790_000_000, nanos: 5 },
        body: if kind == FileKind::Symlink { Body::Target(Bytes::from_static(b"a/b")) } else { Body::Blocks },
        ..Inode::new(kind, 0o4751, (7, 8), Time::default())
    }
}

/// Tables out of `(parent, name, ino, kind)`; the root is there.
fn tree(names: &[(u64, &[u8], u64, FileKind)]) -> Tables {
    let mut ops = vec![Op::put(inode_key(Ino(1)), inode(FileKind::Directory).encode())];
    for (parent, name, ino, kind) in names {
        let entry = Dirent { ino: Ino(*ino), kind: *kind };
        ops.push(Op::put(dirent_key(Ino(*parent), name), entry.encode()));
        ops.push(Op::put(inode_key(Ino(*ino)), inode(*kind).encode()));
    }
    let mut tables = Tables::default();
    tables.apply(ops).unwrap();
    tables
}

fn sample() -> Tables {
    use FileKind::{Directory as D, Regular as F, Symlink as L};
    tree(&[(1, b"b", 2, D), (1, b"a", 3, F), (2, b"z", 4, F), (2, b"c", 5, D), (5, b"x", 6, L)])
}

fn paths(tables: &Tables, filter: &[&str]) -> Result<Vec<(String, bool)>, TreeError> {
    let mut out = Vec::new();
    let filter = Filter::new(filter)?;
    walk(tables, &filter, &mut |e| out.push((text(&e.joined()), e.selected)), &mut |e| panic!("{e}"))?;
    Ok(out)
}

fn all(paths: &[&str], selected: bool) -> Vec<(String, bool)> {
    paths.iter().map(|p| ((*p).to_owned(), selected)).collect()
}

#[test]
fn walks_in_order_parents_first() {
    let t = sample();
    assert_eq!(paths(&t, &[]).unwrap(), all(&["", "a", "b", "b/c", "b/c/x", "b/z"], true));
    assert_eq!(paths(&t, &["/"]).unwrap(), paths(&t, &[]).unwrap());
    assert!(paths(&Tables::default(), &[]).unwrap().is_empty());
}

#[test]
fn filters_keep_the_way_and_what_is_below() {
    let t = sample();
    let expected = [all(&["", "b"], false), all(&["b/c", "b/c/x"], true)].concat();
    assert_eq!(paths(&t, &["b/c"]).unwrap(), expected);
    assert_eq!(paths(&t, &["./b//c/"]).unwrap(), expected);
    assert_eq!(paths(&t, &["/b/c", "b/c/x"]).unwrap(), expected);
    assert_eq!(paths(&t, &["b/nothing", "a"]), Err(TreeError::NotFound("b/nothing".into())));
    assert_eq!(paths(&t, &["a/below"]), Err(TreeError::NotFound("a/below".into())));
    assert!(matches!(paths(&t, &["b/../a"]), Err(TreeError::BadPath(_))));
}

#[test]
fn what_is_wrong_is_told_and_the_rest_is_walked() {
    use FileKind::{Directory as D, Regular as F};
    let mut t = tree(&[
        (1, b"..", 2, F),
        (1, b"a/b", 3, F),
        (1, b"loop", 1, D),
        (1, b"gone", 4, F),
        (1, b"kind", 5, F),
        (1, b"bad", 6, F),
        (1, b"z", 7, F),
    ]);
    t.apply(vec![
        Op::delete(inode_key(Ino(4))),
        Op::put(inode_key(Ino(5)), inode(D).encode()),
        Op::put(inode_key(Ino(6)), &b"\x01"[..]),
    ])
    .unwrap();
    let (mut seen, mut wrong) = (Vec::new(), Vec::new());
    walk(&t, &Filter::default(), &mut |e| seen.push(text(&e.joined())), &mut |e| wrong.push(e.to_string()))
        .unwrap();
    assert_eq!(seen, ["", "z"]);
    assert_eq!(wrong.len(), 6, "{wrong:?}");
    for part in ["\"..\"", "\"a/b\"", "loop", "gone", "kind", "bad"] {
        assert!(wrong.iter().any(|w| w.contains(part)), "{part}: {wrong:?}");
    }
}

#[test]
fn lists_for_people_and_programs() {
    let t = tree(&[(1, b"l\xff", 2, FileKind::Symlink), (1, b"old", 3, FileKind::Regular)]);
    let mut old = inode(FileKind::Regular);
    old.mtime = Time { secs: -5, nanos: 1 };
    let mut t = t;
    t.apply(vec![Op::put(inode_key(Ino(3)), old.encode())]).unwrap();
    let mut lines = Vec::new();
    list(&t, &Filter::default(), &mut |l| lines.push(l), &mut |e| panic!("{e}")).unwrap();
    let shown: Vec<_> = lines.iter().map(ToString::to_string).collect();
    assert_eq!(shown[0], "drwsr-x--x     7     8            9 2026-09-21T14:13:20Z .");
    assert!(shown[1].starts_with("lrwsr-x--x") && shown[1].ends_with("l\\xff -> a/b"), "{}", shown[1]);
    assert!(shown[2].contains(" @-5 "), "{}", shown[2]);
    let json = serde_json::to_value(&lines[1]).unwrap();
    assert_eq!(json["path_hex"], "6cff");
    assert_eq!(json["kind"], "symlink");
    assert_eq!(json["target"], "a/b");
    assert!(serde_json::to_value(&lines[2]).unwrap().get("path_hex").is_none());
}
