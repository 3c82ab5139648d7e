//! Healthy volumes have no findings; each kind of damage is found, with its path, mended, and gone on the replica, too.

mod damage;
mod figures;

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
    dirent_key, extent_key, frame_key, inode_key, local_key, orphan_key, segment_key, volume_key, xattr_key,
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
        let (journal, _) = Journal::open(JournalOptions::new(dir.path(), Arc::new(|_| Ok(())))).unwrap();
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
            ops.extend(meta.records.to_vec().unwrap().into_iter().flat_map(|r| r.ops));
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
