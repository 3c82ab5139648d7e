//! Each kind of damage is found, mended without losing anything, and gone on the replica, too.

use super::*;

/// One way of damaging a volume, and what is to be found then.
struct Case {
    what: &'static str,
    harm: fn(&World, Known),
    found: &'static [(Kind, &'static str)],
    /// What stays when all was mended that can be.
    left: &'static [Kind],
}

const fn case(
    what: &'static str,
    found: &'static [(Kind, &'static str)],
    left: &'static [Kind],
    harm: fn(&World, Known),
) -> Case {
    Case { what, harm, found, left }
}

fn cases() -> Vec<Case> {
    use Kind::*;
    vec![
        case("link count", &[(LinkCount, "/d/small: link count 5, but 2 names")], &[], |w, k| {
            w.put_inode(k.small, |i| i.nlink = 5);
        }),
        case("link count of a directory", &[(LinkCount, "/d: link count 9, but 1 sub")], &[], |w, k| {
            w.put_inode(k.dir, |i| i.nlink = 9);
        }),
        case("parent", &[(WrongParent, "/d/e: its inode says that it lies in directory 77")], &[], |w, k| {
            w.put_inode(k.sub, |i| i.parent = Ino(77));
        }),
        case("dangling name", &[(NameLeadsNowhere, "/d/ghost: it leads to inode 900")], &[], |w, k| {
            w.name(k.dir, b"ghost", Ino(900), FileKind::Regular);
        }),
        case("name in a file", &[(NameInFile, "x: a name for inode")], &[], |w, k| {
            w.name(k.big, b"x", k.small, FileKind::Regular);
        }),
        case("illegal name", &[(NameIllegal, "has the impossible name \"..\"")], &[], |w, k| {
            w.name(k.dir, b"..", k.small, FileKind::Regular);
        }),
        case("kind of a name", &[(NameKind, "/d/small: the directory says Fifo")], &[], |w, k| {
            w.name(k.dir, b"small", k.small, FileKind::Fifo);
        }),
        case("misplaced name", &[(NameMisplaced, "/d/new: it is not in its place")], &[], |w, k| {
            let right = dirent_key(k.dir, b"new");
            let mut wrong = right.to_vec();
            wrong[12] ^= 1;
            let value = w.journal.get(&right).unwrap().unwrap();
            w.change(|tx| {
                tx.delete(right);
                tx.put(wrong, value);
            });
        }),
        case("file without a name", &[(NoName, "inode ")], &[], |w, k| {
            w.change(|tx| tx.delete(dirent_key(k.dir, b"new")));
        }),
        case(
            "tree without a name",
            &[(LinkCount, "/d: link count 3, but 0 sub"), (NoName, "inode 3: no name leads to it")],
            &[],
            |w, k| w.change(|tx| tx.delete(dirent_key(k.dir, b"e"))),
        ),
        case(
            "directory named twice",
            &[(NameTwice, "/again: a name too many for directory")],
            &[],
            |w, k| {
                w.name(Ino::ROOT, b"again", k.sub, FileKind::Directory);
            },
        ),
        case(
            "circle",
            &[(Cycle, "lie in each other"), (LinkCount, "/: link"), (LinkCount, "inode")],
            &[],
            |w, k| {
                w.change(|tx| {
                    tx.delete(dirent_key(Ino::ROOT, b"d"));
                    tx.put(
                        dirent_key(k.sub, b"loop"),
                        Dirent { ino: k.dir, kind: FileKind::Directory }.encode(),
                    );
                });
                w.put_inode(k.dir, |i| i.parent = k.sub);
            },
        ),
        case(
            "orphan with a name",
            &[(OrphanHasName, "/d/new: it is on the list of what is deleted")],
            &[],
            |w, k| {
                w.change(|tx| tx.put(orphan_key(k.new), Bytes::new()));
            },
        ),
        case("orphan that is wanted", &[(OrphanKept, "inode ")], &[], |w, k| {
            w.put_inode(k.open, |i| i.nlink = 1);
        }),
        case("orphan that is not listed", &[(NoName, "inode ")], &[], |w, k| {
            w.change(|tx| tx.delete(orphan_key(k.open)));
        }),
        case("orphan of nothing", &[(OrphanOfNothing, "inode 900 is on the list")], &[], |w, _| {
            w.change(|tx| tx.put(orphan_key(Ino(900)), Bytes::new()));
        }),
        case(
            "removed directory with names",
            &[(LinkCount, "/d: link"), (OrphanHasNames, "inode 3: a removed directory")],
            &[],
            |w, k| {
                w.change(|tx| {
                    tx.delete(dirent_key(k.dir, b"e"));
                    tx.put(orphan_key(k.sub), Bytes::new());
                });
                w.put_inode(k.sub, |i| i.nlink = 0);
            },
        ),
        case(
            "inode gone",
            &[(InodeMissing, "is not there, but there is content"), (Usage, "totals")],
            &[],
            |w, k| {
                w.change(|tx| tx.delete(inode_key(k.big)));
            },
        ),
        case(
            "directory's inode gone",
            &[(InodeMissing, "but names lie in it"), (LinkCount, "/d: link"), (Usage, "totals")],
            &[],
            |w, k| w.change(|tx| tx.delete(inode_key(k.sub))),
        ),
        case("attributes of nothing", &[(InodeMissing, "inode 900 is not there")], &[], |w, _| {
            w.change(|tx| tx.put(xattr_key(Ino(900), b"user.x"), "y"));
        }),
        case(
            "attribute too long",
            &[(Attribute, "/d/e/big: it has the impossible attribute")],
            &[Attribute],
            |w, k| {
                w.change(|tx| tx.put(xattr_key(k.big, &[b'x'; 300]), "y"));
            },
        ),
        case("directory with a size", &[(DirectorySize, "/d: a directory with size 7")], &[], |w, k| {
            w.put_inode(k.dir, |i| i.size = 7);
        }),
        case("allocated units", &[(Allocated, "/d/e/big: 5 units")], &[], |w, k| {
            w.put_inode(k.big, |i| i.blocks = 5);
        }),
        case(
            "beyond the end",
            &[(BlockBeyondEnd, "/d/new: size 10, but there is content up to")],
            &[],
            |w, k| {
                w.put_inode(k.new, |i| i.size = 10);
            },
        ),
        case(
            "inline and beyond",
            &[(Body, "/d/small: 8 bytes lie in the inode of a file of 3")],
            &[],
            |w, k| {
                w.put_inode(k.small, |i| i.size = 3);
            },
        ),
        case(
            "inline with blocks",
            &[(HiddenBlocks, "/d/new: it has blocks that nobody"), (Usage, "totals")],
            &[],
            |w, k| {
                w.put_inode(k.new, |i| {
                    i.body = crate::format::tables::Body::Inline("abc".into());
                    i.blocks = 8;
                });
            },
        ),
        case("target", &[(Target, "/d/e/link: its target of 0 bytes")], &[Target], |w, k| {
            w.put_inode(k.link, |i| i.body = crate::format::tables::Body::Target(Bytes::new()));
        }),
        case("empty extent", &[(EmptyExtent, "/d/small: a row of its content")], &[], |w, k| {
            w.change(|tx| tx.put(extent_key(k.small, 5), Extents::default().encode()));
        }),
        case(
            "dangling block",
            &[(BlockMissing, "/d/new: bytes 0 to 65536 are lost here")],
            &[BlockMissing],
            |w, k| {
                let id = w.blocks(k.new)[0];
                w.change(|tx| tx.delete(crate::format::tables::dirty_key(id)));
            },
        ),
        case("references", &[(BlockReferences, ": 9 references are counted, but 1 ")], &[], |w, k| {
            let id = w.blocks(k.new)[0];
            w.change(|tx| tx.put(block_refs_key(id), 8u64.to_le_bytes().to_vec()));
        }),
        case("references of nothing", &[(BlockReferences, "of block 900 are counted")], &[], |w, _| {
            w.change(|tx| tx.put(block_refs_key(BlockId(900)), 8u64.to_le_bytes().to_vec()));
        }),
        case("block of nobody", &[(BlockBeyondEnd, ""), (BlockUnused, "belongs to no file")], &[], |w, k| {
            // The second of two is taken away.
            let mut extents = Extents::default();
            extents.0[1] = w.blocks(k.new)[1];
            w.change(|tx| tx.put(extent_key(k.new, 0), extents.encode()));
            w.put_inode(k.new, |i| (i.size, i.blocks) = (70_000 - 1, 16));
        }),
        case(
            "place of a block",
            &[(BlockPlace, "/d/twin: bytes 131072 to 196608")],
            &[BlockPlace],
            |w, k| {
                let id = w.blocks(k.twin)[2];
                let key = block_key(id);
                let mut entry = BlockEntry::decode(&w.journal.get(&key).unwrap().unwrap()).unwrap();
                entry.loc.offset += 1 << 30;
                w.change(|tx| tx.put(key, entry.encode()));
            },
        ),
        case("frame's uses", &[(FrameUses, "77 uses are counted, but ")], &[], |w, k| {
            let entry = w.journal.get(&block_key(w.blocks(k.twin)[0])).unwrap().unwrap();
            let entry = BlockEntry::decode(&entry).unwrap();
            w.change(|tx| tx.put(frame_key(&entry.hash), FrameValue { entry, uses: 77 }.encode()));
        }),
        case("frame gone", &[(FrameUses, "is not in the table of frames")], &[], |w, k| {
            let entry = w.journal.get(&block_key(w.blocks(k.twin)[0])).unwrap().unwrap();
            w.change(|tx| tx.delete(frame_key(&BlockEntry::decode(&entry).unwrap().hash)));
        }),
        case("live bytes", &[(SegmentLive, "segment 1: 7 bytes in use are counted")], &[], |w, _| {
            let key = segment_key(SegmentNo(1));
            let value = SegmentValue::decode(&w.journal.get(&key).unwrap().unwrap()).unwrap();
            w.change(|tx| tx.put(key, SegmentValue { live: 7, ..value }.encode()));
        }),
        case("sealed mark", &[(SealedMark, "the log is sealed up to segment 9")], &[SealedMark], |w, _| {
            let mark = crate::format::local::SealedMark { segment: SegmentNo(9), ..*w.sealer.mark() };
            w.change(|tx| tx.put(local_key(crate::format::local::SEALED_MARK), mark.encode()));
        }),
        case("next inode", &[(NextNumber, "the next inode would get number 3")], &[], |w, _| {
            w.change(|tx| tx.put(volume_key(crate::vfs::NEXT_INO), 3u64.to_le_bytes().to_vec()));
        }),
        case(
            "next inode beyond all",
            &[(NextNumber, "would get number 18446744073709551614")],
            &[],
            |w, _| {
                w.change(|tx| tx.put(volume_key("next_ino"), (u64::MAX - 1).to_le_bytes().to_vec()));
            },
        ),
        case("next block beyond all", &[(NextNumber, "and there are none from")], &[], |w, _| {
            w.change(|tx| tx.put(volume_key("next_block"), (1u64 << 62).to_le_bytes().to_vec()));
        }),
        case("root marked as deleted", &[(OrphanHasName, "/: it is on the list of")], &[], |w, _| {
            w.change(|tx| tx.put(orphan_key(Ino::ROOT), Vec::new()));
        }),
        case("next block", &[(NextNumber, "the next block would get number 1")], &[], |w, _| {
            w.change(|tx| tx.put(volume_key(crate::cache::store::NEXT_BLOCK), 1u64.to_le_bytes().to_vec()));
        }),
        case("last inode", &[(NextNumber, "would get number 18446744073709551615, and")], &[], |w, _| {
            w.change(|tx| tx.put(volume_key(crate::vfs::NEXT_INO), u64::MAX.to_le_bytes().to_vec()));
        }),
        case("last block", &[(NextNumber, "would get number 18446744073709551612, and")], &[], |w, _| {
            let next = (u64::MAX - 3).to_le_bytes().to_vec();
            w.change(|tx| tx.put(volume_key(crate::cache::store::NEXT_BLOCK), next));
        }),
        case("usage", &[(Usage, "the totals say 1 units in 2 inodes")], &[], |w, _| {
            let usage = crate::vfs::Usage { blocks: 1, inodes: 2 };
            w.change(|tx| tx.put(volume_key(crate::vfs::USAGE), usage.encode()));
        }),
        case("slot of two", &[(SlotTwice, "lie in the same slot")], &[SlotTwice], |w, k| {
            let [a, b] = [w.blocks(k.new)[0], w.blocks(k.new)[1]].map(crate::format::tables::dirty_key);
            let slot = w.journal.get(&a).unwrap().unwrap()[0];
            let mut value = w.journal.get(&b).unwrap().unwrap().to_vec();
            value[0] = slot;
            w.change(|tx| tx.put(b, value));
        }),
        case("slot beyond the end", &[(SlotBeyondEnd, "its content is gone")], &[SlotBeyondEnd], |w, k| {
            let key = crate::format::tables::dirty_key(w.blocks(k.new)[0]);
            let value = w.journal.get(&key).unwrap().unwrap();
            let mut wrong = vec![0xff, 0x7f];
            wrong.extend_from_slice(&value[1..]);
            w.change(|tx| tx.put(key, wrong));
        }),
        case("cached twice", &[(CachedSlot, "as another cached block does")], &[], |w, _| {
            for n in [1, 2] {
                let value = CachedValue { slot: 900, len: 5 };
                w.change(|tx| tx.put(cached_key(&BlockHash([n; 32])), value.encode()));
            }
        }),
        case(
            "unreadable inode",
            &[(Unreadable, "/d/new: its inode cannot be read")],
            &[Unreadable],
            |w, k| {
                w.change(|tx| tx.put(inode_key(k.new), "x"));
            },
        ),
    ]
}

#[test]
fn each_damage_is_found_and_mended() {
    // All of them, also when one fails.
    let failed = cases().iter().filter(|c| std::panic::catch_unwind(|| try_case(c)).is_err()).count();
    assert_eq!(failed, 0, "cases failed");
}

fn try_case(case: &Case) {
    {
        let what = case.what;
        let (mut w, known) = World::filled();
        assert_eq!(w.check(), [], "{what}: before");
        (case.harm)(&w, known);
        let found = w.check();
        let shown = format!("{what}: {found:#?}");
        // Nothing more than what is expected; what follows from it may come besides in the same breath.
        let more = [Kind::Usage, Kind::LinkCount, Kind::WrongParent, Kind::Allocated];
        for (kind, text) in case.found {
            assert!(found.iter().any(|(k, t)| k == kind && t.contains(text)), "{kind:?} {text:?}: {shown}");
        }
        for (kind, _) in &found {
            assert!(case.found.iter().any(|(k, _)| k == kind) || more.contains(kind), "{kind:?}: {shown}");
        }
        w.repair();
        let mut left: Vec<Kind> =
            w.check().into_iter().map(|(k, _)| k).filter(|k| !more.contains(k)).collect();
        left.dedup();
        assert_eq!(left, case.left, "{what}: {:#?}", w.check());
        if case.left.is_empty() {
            assert_eq!(w.check(), [], "{what}");
            content_is_there(&w, known, what);
            w.seal();
            let (tables, segments) = w.replica();
            assert_eq!(check_source(&tables, Some(&segments)), [], "{what}: on the replica");
            assert_eq!(w.check(), [], "{what}: behind the seal");
        }
    }
}

/// Everything that was written before the damage is still to be had, under whatever name.
fn content_is_there(w: &World, known: Known, what: &str) {
    let mut all: Vec<Vec<u8>> = Vec::new();
    let mut stack = vec![Ino::ROOT];
    let mut met = std::collections::HashSet::new();
    while let Some(dir) = stack.pop() {
        assert!(met.insert(dir), "{what}: met twice");
        let mut found = Vec::new();
        w.vfs
            .readdir(dir, 2, false, &mut |item| {
                found.push((item.ino, item.kind, item.name.to_vec()));
                true
            })
            .unwrap();
        for (ino, kind, name) in found {
            assert!(w.vfs.lookup(dir, &name).is_ok(), "{what}: {name:?}");
            match kind {
                FileKind::Directory => stack.push(ino),
                FileKind::Regular => {
                    let inode = w.inode(ino);
                    let mut content = Vec::new();
                    if let Body::Inline(bytes) = &inode.body {
                        content.extend_from_slice(bytes);
                    } else {
                        let value = w.journal.get(&extent_key(ino, 0)).unwrap();
                        for id in value.map(|v| Extents::decode(&v).unwrap().0).into_iter().flatten() {
                            if id.0 != 0 {
                                let len = w.vfs.blocks().block_len(id).unwrap();
                                let mut part = vec![0; len as usize];
                                w.vfs.blocks().read(id, 0, &mut part, &Default::default()).unwrap();
                                content.extend(part);
                            }
                        }
                    }
                    all.push(content);
                }
                _ => {}
            }
        }
    }
    let bytes = |byte: u8| all.iter().flatten().filter(|b| **b == byte).count();
    // `big` (but for what was overwritten) and its twin; `new`; two names of the small one.
    assert_eq!(bytes(1), 2 * 200_000 - 7, "{what}");
    assert_eq!(bytes(3), 70_000, "{what}");
    // What was inline is gone only where the inode itself was replaced.
    assert!(what == "inline with blocks" || all.iter().any(|c| c == b"inlimore"), "{what}");
    let _ = known;
}
