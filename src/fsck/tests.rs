//! Healthy volumes have no findings; each kind of damage is found, with its path, mended, and gone on the replica, too.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::*;
use crate::cache::BlockStore;
use crate::format::local::{CachedValue, FrameValue};
use crate::format::record::Op;
use crate::format::segment::verify_whole;
use crate::format::tables::{
    BlockEntry, Body, Dirent, Extents, FileKind, Inode, Time, block_key, block_refs_key, cached_key,
    dirent_key, extent_key, frame_key, inode_key, is_replicated, local_key, orphan_key, segment_key,
    volume_key, xattr_key,
};
use crate::ids::{BlockHash, BlockId, Epoch, Ino, VolumeId};
use crate::journal::{JournalError, Options as JournalOptions, Tx};
use crate::replica::{Outbox, Staged};
use crate::restore::Sink;
use crate::txg::{Sealer, Staging};
use crate::vfs::api::FileSystem;
use crate::vfs::types::{Caller, Fallocate, RenameMode, SetAttr, Wait, XattrMode};
use crate::vfs::{Options, Vfs};

const BS: u32 = 65536;
const ME: Caller = Caller { uid: 1, gid: 1, pid: 1, umask: 0 };
const NOW: Time = Time { secs: 9, nanos: 0 };

struct World {
    _dir: tempfile::TempDir,
    journal: Arc<Journal>,
    vfs: Arc<Vfs>,
    sealer: Sealer,
    staging: Arc<Staging>,
}

impl World {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (journal, _) = Journal::open(JournalOptions::new(dir.path(), Arc::new(|| Ok(())))).unwrap();
        let blocks = BlockStore::open(&dir.path().join("slots"), BS, 1 << 30, Arc::clone(&journal)).unwrap();
        let staging = Staging::open(&dir.path().join("staging"), &journal, Arc::clone(&blocks)).unwrap();
        let volume = VolumeId::from_random([7; 16]);
        let sealer = Sealer::new(
            Arc::clone(&journal),
            Arc::clone(&blocks),
            Arc::clone(&staging),
            volume,
            Epoch(1),
            1,
            Default::default(),
        );
        let options = Options {
            clock: Arc::new(|| Time { secs: 1, nanos: 0 }),
            remote_fsync: false,
            space_wait: Duration::from_secs(1),
        };
        let vfs = Vfs::open(Arc::clone(&journal), blocks, options).unwrap();
        Self { _dir: dir, journal, vfs, sealer: sealer.unwrap(), staging }
    }

    /// Some of everything: directories, a file in blocks and one inline, two names, a shared block, a link, attributes, an orphan.
    fn filled() -> (Self, Known) {
        let mut w = Self::new();
        let dir = w.dir(Ino::ROOT, "d");
        let sub = w.dir(dir, "e");
        let big = w.file(sub, "big", &[1; 200_000]);
        let small = w.file(dir, "small", b"inline");
        let twin = w.file(dir, "twin", b"");
        w.vfs.copy_file_range(big, 0, twin, 0, 200_000, Wait::Yes).unwrap();
        w.vfs.link(small, sub, b"other").unwrap();
        let link = w.vfs.symlink(sub, b"link", b"../small", &ME).unwrap().ino;
        w.vfs.setxattr(big, b"user.x", b"value", XattrMode::Any).unwrap();
        w.seal();
        w.vfs.write(small, 4, b"more", Wait::Yes).unwrap();
        let new = w.file(dir, "new", &[3; 70_000]);
        w.vfs.write(big, 5, b"changed", Wait::Yes).unwrap();
        w.vfs.commit().unwrap();
        let open = w.vfs.create(dir, b"open", 0o644, &ME).unwrap().ino;
        w.vfs.write(open, 0, &[4; 70_000], Wait::Yes).unwrap();
        w.vfs.unlink(dir, b"open").unwrap();
        w.vfs.commit().unwrap();
        (w, Known { dir, sub, big, small, twin, link, new, open })
    }

    fn dir(&self, parent: Ino, name: &str) -> Ino {
        self.vfs.mkdir(parent, name.as_bytes(), 0o755, &ME).unwrap().ino
    }

    fn file(&self, parent: Ino, name: &str, content: &[u8]) -> Ino {
        let ino = self.vfs.create(parent, name.as_bytes(), 0o644, &ME).unwrap().ino;
        self.vfs.write(ino, 0, content, Wait::Yes).unwrap();
        self.vfs.release(ino);
        ino
    }

    fn seal(&mut self) {
        let cut = self.vfs.cut().unwrap();
        self.sealer.seal(&cut, NOW).unwrap();
    }

    fn check(&self) -> Vec<(Kind, String)> {
        check_source(&*self.journal, None)
    }

    fn plan(&self) -> Vec<Mend> {
        let input = input(&*self.journal, None);
        let checked = super::check(&input, usize::MAX).unwrap();
        super::plan(&*self.journal, checked.findings.list(), NOW, (1, 1)).unwrap()
    }

    /// Mends until there is nothing to mend.
    fn repair(&self) {
        for round in 0.. {
            let mends = self.plan();
            if mends.is_empty() {
                return;
            }
            assert!(round < 5, "{mends:?}\n{:?}", self.check());
            for mend in mends {
                self.change(|tx| {
                    for op in mend.ops.clone() {
                        match op {
                            Op::Put { key, value } => tx.put(key, value),
                            Op::Delete { key } => tx.delete(key),
                        }
                    }
                });
            }
        }
    }

    fn change(&self, f: impl FnOnce(&mut Tx<'_>)) {
        self.journal
            .transact::<_, JournalError>(|tx| {
                f(tx);
                Ok(())
            })
            .unwrap();
    }

    fn inode(&self, ino: Ino) -> Inode {
        Inode::decode(&self.journal.get(&inode_key(ino)).unwrap().unwrap()).unwrap()
    }

    fn put_inode(&self, ino: Ino, f: impl FnOnce(&mut Inode)) {
        let mut inode = self.inode(ino);
        f(&mut inode);
        self.change(|tx| tx.put(inode_key(ino), inode.encode()));
    }

    fn blocks(&self, ino: Ino) -> Vec<BlockId> {
        let value = self.journal.get(&extent_key(ino, 0)).unwrap().unwrap();
        Extents::decode(&value).unwrap().0.into_iter().filter(|b| b.0 != 0).collect()
    }

    fn name(&self, parent: Ino, name: &[u8], ino: Ino, kind: FileKind) {
        self.change(|tx| tx.put(dirent_key(parent, name), Dirent { ino, kind }.encode()));
    }

    /// What a replica makes of all that was sealed.
    fn replica(&self) -> (Tables, BTreeMap<SegmentNo, SegmentValue>) {
        let (mut tables, mut segments) = (Tables::default(), BTreeMap::new());
        let mut ops = Vec::new();
        for Staged { number, epoch, path, len, .. } in self.staging.segments_after(SegmentNo(0), usize::MAX) {
            let meta = verify_whole(&std::fs::read(path).unwrap()).unwrap();
            ops.extend(meta.index.into_iter().map(|(id, e)| Op::put(block_key(id), e.encode())));
            ops.extend(meta.records.into_iter().flat_map(|r| r.ops).filter(|op| is_replicated(op.key())));
            let commit = meta.footer.commit.unwrap_or_default();
            segments
                .insert(number, SegmentValue { epoch, len, blake3: [0; 32], commit, cut_at: 0.0, live: 0 });
        }
        tables.apply(ops).unwrap();
        (tables, segments)
    }
}

impl Drop for World {
    fn drop(&mut self) {
        self.vfs.stop_reaper();
        let _ = self.journal.close();
    }
}

#[derive(Clone, Copy)]
struct Known {
    dir: Ino,
    sub: Ino,
    big: Ino,
    small: Ino,
    twin: Ino,
    link: Ino,
    new: Ino,
    open: Ino,
}

fn input<'a>(source: &'a dyn Source, segments: Option<&'a BTreeMap<SegmentNo, SegmentValue>>) -> Input<'a> {
    Input {
        source,
        block_size: BS,
        segments,
        slots_len: Some(16 << 20),
        last_lsn: None,
        cancelled: &|| false,
    }
}

fn check_source(
    source: &dyn Source,
    segments: Option<&BTreeMap<SegmentNo, SegmentValue>>,
) -> Vec<(Kind, String)> {
    let input = input(source, segments);
    let checked = super::check(&input, 100).unwrap();
    let list = checked.findings.list();
    let names = name_all(&input, &checked, list.iter().map(|f| &f.place)).unwrap();
    list.iter()
        .map(|f| (f.kind, format!("{}: {}", names.show(&f.place).unwrap_or_default(), f.text)))
        .collect()
}

/// Random operations, some of which fail, as applications do them.
fn stir(w: &mut World, rng: &mut ChaCha8Rng, steps: usize) {
    let mut dirs = vec![Ino::ROOT];
    let mut files: Vec<Ino> = Vec::new();
    let name = |rng: &mut ChaCha8Rng| format!("n{}", rng.random_range(0..12)).into_bytes();
    for _ in 0..steps {
        let (dir, other) = (dirs[rng.random_range(0..dirs.len())], dirs[rng.random_range(0..dirs.len())]);
        let (a, b) = (name(rng), name(rng));
        let file = files.get(rng.random_range(0..files.len().max(1))).copied();
        let v = Arc::clone(&w.vfs);
        match (rng.random_range(0..14), file) {
            (0, _) => dirs.extend(v.mkdir(dir, &a, 0o755, &ME).map(|x| x.ino)),
            (1 | 2, _) => files.extend(v.create(dir, &a, 0o644, &ME).map(|x| x.ino)),
            (3, _) => _ = v.unlink(dir, &a),
            (4, _) => _ = v.rmdir(dir, &a),
            (5, _) => {
                let mode = [RenameMode::Replace, RenameMode::NoReplace, RenameMode::Exchange]
                    [rng.random_range(0..3)];
                _ = v.rename(dir, &a, other, &b, mode);
            }
            (6, Some(f)) => _ = v.link(f, dir, &a),
            (7 | 8, Some(f)) => {
                let len = [10, 5000, 70_000, 200_000][rng.random_range(0..4)];
                _ = v.write(f, rng.random_range(0..300_000), &vec![rng.random(); len], Wait::Yes);
            }
            (9, Some(f)) => {
                let set = SetAttr { size: Some(rng.random_range(0..300_000)), ..SetAttr::default() };
                _ = v.setattr(f, &set, &ME);
            }
            (10, Some(f)) => {
                _ = v.fallocate(f, Fallocate::PunchHole, rng.random_range(0..100_000), 150_000, Wait::Yes)
            }
            (11, Some(f)) => {
                let g = files[rng.random_range(0..files.len())];
                _ = v.copy_file_range(f, 0, g, 0, 200_000, Wait::Yes);
            }
            (12, Some(f)) => _ = v.setxattr(f, b"user.a", &[1; 100], XattrMode::Any),
            (13, _) => match rng.random_range(0..3) {
                0 => w.seal(),
                1 => _ = v.commit().unwrap(),
                _ => v.forget(file.unwrap_or(Ino(999)), 100),
            },
            _ => _ = v.symlink(dir, &a, &b, &ME),
        }
    }
}

#[test]
fn healthy_volumes_have_no_findings_whatever_was_done() {
    let seed = std::env::var("MIRRORFS_SEED").map_or_else(|_| rand::random(), |s| s.parse().unwrap());
    println!("fsck: MIRRORFS_SEED={seed}");
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    assert_eq!(check_source(&Tables::default(), Some(&BTreeMap::new())), []);
    for _ in 0..6 {
        let mut w = World::new();
        for _ in 0..4 {
            stir(&mut w, &mut rng, 120);
            // While files are open, deletions under way, and changes pending.
            assert_eq!(check_source(&w.journal.snapshot(), None), []);
        }
        w.seal();
        w.vfs.wait_reaped();
        assert_eq!(w.check(), []);
        w.vfs.blocks().housekeep().unwrap();
        assert_eq!(w.check(), []);
        let (tables, segments) = w.replica();
        assert_eq!(check_source(&tables, Some(&segments)), []);
    }
}

#[test]
fn a_snapshot_stays_as_it_was_while_everything_changes() {
    let mut rng = ChaCha8Rng::seed_from_u64(5);
    let mut w = World::new();
    stir(&mut w, &mut rng, 200);
    let all = |source: &dyn Source| source.scan(&[0], &[0xff], usize::MAX).unwrap();
    let before = all(&*w.journal);
    let snapshot = w.journal.snapshot();
    stir(&mut w, &mut rng, 300);
    w.seal();
    w.vfs.wait_reaped();
    assert_ne!(all(&*w.journal), before);
    assert_eq!(all(&snapshot), before);
    // In small pages too, and key by key.
    let (mut start, mut paged) = (Bytes::from_static(&[0]), Vec::new());
    loop {
        let page = snapshot.scan(&start, &[0xff], 7).unwrap();
        let Some((last, _)) = page.last() else { break };
        start = [&last[..], &[0]].concat().into();
        paged.extend(page);
    }
    assert_eq!(paged, before);
    for (key, value) in &before {
        assert_eq!(snapshot.get(key).unwrap().as_ref(), Some(value));
    }
}

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
        case("next block", &[(NextNumber, "the next block would get number 1")], &[], |w, _| {
            w.change(|tx| tx.put(volume_key(crate::cache::store::NEXT_BLOCK), 1u64.to_le_bytes().to_vec()));
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

/// By hand: `MIRRORFS_FILES=1000000 cargo test --release --lib -- --ignored --nocapture many_files`. Shows how long a check takes and what
/// memory.
#[test]
#[ignore = "takes minutes; for figures"]
fn many_files() {
    let resident = || {
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let line = status.lines().find(|l| l.starts_with("VmRSS")).unwrap().to_owned();
        line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() / 1024
    };
    let n: u64 = std::env::var("MIRRORFS_FILES").map_or(100_000, |n| n.parse().unwrap());
    let w = World::new();
    let mut root = w.inode(Ino::ROOT);
    let dir = tempfile::tempdir().unwrap();
    let (journal, _) = Journal::open(JournalOptions::new(dir.path(), Arc::new(|| Ok(())))).unwrap();
    root.nlink = 2 + 1000;
    let entry = |id: u64| {
        let loc = crate::format::tables::FrameLoc {
            segment: SegmentNo(1),
            epoch: Epoch(1),
            offset: 256,
            stored_len: 100,
            raw_len: 5000,
            codec: 1,
        };
        BlockEntry { hash: BlockHash::of(&id.to_le_bytes()), loc }
    };
    let ops = (2..n + 2).flat_map(|i| {
        // A directory for each thousand.
        let is_dir = i < 1002;
        let parent = if is_dir { Ino::ROOT } else { Ino(2 + i % 1000) };
        let kind = if is_dir { FileKind::Directory } else { FileKind::Regular };
        let (size, blocks) = if is_dir { (0, 0) } else { (5000, 16) };
        let inode = Inode { kind, nlink: if is_dir { 2 } else { 1 }, parent, size, blocks, ..root.clone() };
        let mut ops = vec![
            Op::put(inode_key(Ino(i)), inode.encode()),
            Op::put(
                dirent_key(parent, format!("file number {i}").as_bytes()),
                Dirent { ino: Ino(i), kind }.encode(),
            ),
        ];
        if !is_dir {
            let mut extents = Extents::default();
            extents.0[0] = BlockId(i);
            ops.push(Op::put(extent_key(Ino(i), 0), extents.encode()));
            ops.push(Op::put(block_key(BlockId(i)), entry(i).encode()));
            ops.push(Op::put(frame_key(&entry(i).hash), FrameValue { entry: entry(i), uses: 1 }.encode()));
        }
        ops
    });
    let files = n - 1000;
    let segment = SegmentValue {
        epoch: Epoch(1),
        len: 1 << 30,
        blake3: [0; 32],
        commit: crate::ids::Lsn(1),
        cut_at: 0.0,
        live: files * 100,
    };
    let mark = crate::format::local::SealedMark {
        lsn: crate::ids::Lsn(1),
        segment: SegmentNo(1),
        ..Default::default()
    };
    let usage = crate::vfs::Usage { blocks: files * 16, inodes: n + 1 };
    let rest = [
        Op::put(inode_key(Ino::ROOT), root.encode()),
        Op::put(volume_key(crate::vfs::NEXT_INO), (n + 2).to_le_bytes().to_vec()),
        Op::put(volume_key(crate::cache::store::NEXT_BLOCK), (n + 2).to_le_bytes().to_vec()),
        Op::put(volume_key(crate::vfs::USAGE), usage.encode()),
        Op::put(segment_key(SegmentNo(1)), segment.encode()),
        Op::put(local_key(crate::format::local::SEALED_MARK), mark.encode()),
    ];
    journal.import(crate::ids::Lsn(1), &mut ops.chain(rest).map(Ok)).unwrap();
    let before = resident();
    let began = std::time::Instant::now();
    let most = std::sync::atomic::AtomicU64::new(0);
    let asked = std::sync::atomic::AtomicU64::new(0);
    let look = || {
        use std::sync::atomic::Ordering;
        if asked.fetch_add(1, Ordering::Relaxed).is_multiple_of(64) {
            most.fetch_max(resident(), Ordering::Relaxed);
        }
        false
    };
    let input = Input { cancelled: &look, ..input(&*journal, None) };
    assert_eq!(lines(&input).unwrap(), Vec::<String>::new());
    let most = most.into_inner();
    println!("{n} inodes: {:?}, {before} MiB resident before, {most} MiB at most", began.elapsed());
    journal.close().unwrap();
}
