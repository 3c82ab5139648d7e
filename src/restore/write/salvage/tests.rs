//! A test of what is saved.

use super::*;
use crate::format::tables::{Dirent, Extents, Time, block_key, dirent_key, extent_key, inode_key};
use crate::ids::Lsn;
use crate::restore::Sink;

fn inode(kind: FileKind, size: u64, body: Body) -> Bytes {
    Inode {
        nlink: 1,
        size,
        mtime: Time { secs: 1_700_000_000, nanos: 5 },
        parent: Ino::ROOT,
        body,
        ..Inode::new(kind, 0o700, (0, 0), Time::default())
    }
    .encode()
}

fn named(dir: u64, name: &str, ino: u64, kind: FileKind) -> Op {
    Op::put(dirent_key(Ino(dir), name.as_bytes()), Dirent { ino: Ino(ino), kind }.encode())
}

fn blocks(ids: &[u64]) -> Bytes {
    let mut all = [BlockId(0); 64];
    all.iter_mut().zip(ids).for_each(|(block, id)| *block = BlockId(*id));
    Extents(all).encode()
}

fn record(lsn: u64, ops: Vec<Op>) -> Record {
    Record { lsn: Lsn(lsn), ops }
}

/// Block 7 is whole, of block 8 a piece is missing.
struct Blocks;

impl BlockContent for Blocks {
    fn read(&self, block: BlockId, out: &mut [u8]) -> Vec<MissingPiece> {
        out.fill(block.0 as u8);
        match block {
            BlockId(7) => Vec::new(),
            _ => {
                vec![MissingPiece { start: 10, end: 20, why: "nobody has it".into(), unreachable: false }]
            }
        }
    }
}

#[test]
fn what_changed_is_saved_and_what_is_missing_is_named() {
    let root = Ino::ROOT.0;
    let dir = FileKind::Directory;
    let file = FileKind::Regular;
    let old = vec![
        Op::put(inode_key(Ino::ROOT), inode(dir, 0, Body::Blocks)),
        named(root, "d", 10, dir),
        Op::put(inode_key(Ino(10)), inode(dir, 0, Body::Blocks)),
        named(root, "untouched", 11, file),
        Op::put(inode_key(Ino(11)), inode(file, 3, Body::Inline("old".into()))),
        named(10, "whole", 12, file),
        Op::put(inode_key(Ino(12)), inode(file, 100, Body::Blocks)),
        named(10, "half", 13, file),
        named(root, "chmodded", 14, file),
        Op::put(extent_key(Ino(14), 0), blocks(&[7])),
        named(root, "gone", 15, file),
        named(root, "b", 16, file),
        Op::put(inode_key(Ino(16)), inode(file, 3, Body::Inline("abc".into()))),
    ];
    let new = [
        vec![Op::put(extent_key(Ino(12), 0), blocks(&[7]))],
        vec![
            Op::put(extent_key(Ino(13), 0), blocks(&[7, 8])),
            Op::put(inode_key(Ino(13)), inode(file, 65536 + 40, Body::Blocks)),
        ],
        vec![Op::put(inode_key(Ino(14)), inode(file, 100, Body::Blocks))],
        vec![Op::delete(dirent_key(Ino::ROOT, b"gone")), Op::delete(block_key(BlockId(3)))],
        // An editor: a temporary file that takes a name.
        vec![named(root, "tmp", 17, file)],
        vec![Op::put(inode_key(Ino(17)), inode(file, 3, Body::Inline("new".into())))],
        vec![Op::delete(dirent_key(Ino::ROOT, b"tmp")), named(root, "edited", 17, file)],
        vec![Op::delete(dirent_key(Ino::ROOT, b"b")), named(10, "c", 16, file)],
        vec![Op::delete(dirent_key(Ino(10), b"c")), named(root, "d2", 16, file)],
        vec![named(root, "brief", 18, file)],
        vec![Op::delete(dirent_key(Ino::ROOT, b"brief"))],
    ];
    let (mut tables, mut changes) = (Tables::default(), Changes::default());
    tables.apply(old).unwrap();
    for (i, ops) in new.into_iter().enumerate() {
        changes.note(&record(i as u64 + 1, ops.clone()));
        tables.apply(ops).unwrap();
    }
    let tmp = tempfile::tempdir().unwrap();
    let to = tmp.path().join("to");
    let saved = save(&tables, &Wanted::Changed(&changes), &Blocks, &to, 65536, &mut |_, _| {}).unwrap();
    let read = |name: &str| std::fs::read(to.join(name)).unwrap();
    assert_eq!(read("d/whole"), [7; 100]);
    assert_eq!(read("edited"), b"new");
    assert!(!to.join("untouched").exists() && !to.join("chmodded").exists() && !to.join("d/half").exists());
    let half = read("d/half.incomplete");
    assert_eq!(half.len(), 65536 + 40);
    assert!(half[65536..65546].iter().chain(&half[65556..]).all(|b| *b == 8));
    assert!(half[65546..65556].iter().all(|b| *b == 0));
    let lacks = Incomplete {
        path: "d/half".into(),
        missing: vec![(65546, 65556)],
        why: "nobody has it".into(),
        unreachable: false,
    };
    assert_eq!(saved.incomplete, [lacks]);
    assert_eq!(saved.renamed, [("d2".to_owned(), "b".to_owned())]);
    assert_eq!(saved.removed, ["gone"]);
    assert_eq!(saved.attributes, ["chmodded"]);
    assert_eq!((saved.files, saved.bytes), (2, 100 + 3 + 65536 + 30));
    let list = saved.list();
    for line in ["d/half lacks bytes 65546..65556: nobody has it", "b -> d2", "  gone", "  chmodded"] {
        assert!(list.contains(line), "{line}: {list}");
    }
    let all = tmp.path().join("all");
    let saved = save(&tables, &Wanted::All, &Blocks, &all, 65536, &mut |_, _| {}).unwrap();
    assert_eq!(saved.files, 5);
    assert_eq!(std::fs::read(all.join("untouched")).unwrap(), b"old");
    assert_eq!(saved.problems.iter().filter(|p| p.kind > ProblemKind::Attribute).count(), 0, "{saved:?}");
}
