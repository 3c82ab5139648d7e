//! Tests of writing files: everything that a tree holds, damage, what is in the way, and the number
//! of requests.

use std::fs::{self, Permissions};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, symlink};
use std::path::Path;

use super::super::testing::World;
use super::super::{load, plan, survey};
use super::*;
use crate::format::record::Op;
use crate::format::tables::{
    BLOCKS_PER_CHUNK, Body, Dirent, Extents, Time, dirent_key, extent_key, inode_key, xattr_key,
};
use crate::ids::SegmentNo;

mod again;
mod hostile;

const BLOCK: usize = 64 << 10;

fn inode(kind: FileKind, size: usize, body: Body) -> Inode {
    let time = |secs, nanos| Time { secs, nanos };
    let owner = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
    Inode {
        nlink: 1,
        size: size as u64,
        atime: time(1_700_000_000, 1),
        mtime: time(1_600_000_000, 123_456_789),
        body,
        ..Inode::new(kind, 0o640, owner, time(1, 1))
    }
}

fn content(len: usize, seed: u8) -> Vec<u8> {
    let mut out = vec![0; len];
    blake3::Hasher::new().update(&[seed]).finalize_xof().fill(&mut out);
    out
}

trait Tree {
    fn node(&mut self, parent: u64, name: &[u8], ino: u64, inode: Inode);
    fn dir(&mut self, parent: u64, name: &[u8], ino: u64);
    fn file(&mut self, parent: u64, name: &[u8], ino: u64, raw: &[u8]);
}

impl Tree for World {
    fn node(&mut self, parent: u64, name: &[u8], ino: u64, inode: Inode) {
        let mut ops = vec![Op::put(inode_key(Ino(ino)), inode.encode())];
        if ino != 1 {
            let entry = Dirent { ino: Ino(ino), kind: inode.kind };
            ops.push(Op::put(dirent_key(Ino(parent), name), entry.encode()));
        }
        self.record(ops);
    }

    fn dir(&mut self, parent: u64, name: &[u8], ino: u64) {
        let mut dir = inode(FileKind::Directory, 0, Body::Blocks);
        dir.perm = 0o550;
        self.node(parent, name, ino, dir);
    }

    /// A file whose blocks of zeros are holes.
    fn file(&mut self, parent: u64, name: &[u8], ino: u64, raw: &[u8]) {
        let mut chunks = std::collections::BTreeMap::<u64, Extents>::new();
        for (i, block) in raw.chunks(BLOCK).enumerate() {
            if block.iter().any(|b| *b != 0) {
                let id = self.block(block.to_vec());
                let (chunk, at) = (i as u64 / BLOCKS_PER_CHUNK, i as u64 % BLOCKS_PER_CHUNK);
                chunks.entry(chunk).or_default().0[at as usize] = id;
            }
        }
        let ops =
            chunks.iter().map(|(chunk, extents)| Op::put(extent_key(Ino(ino), *chunk), extents.encode()));
        self.record(ops.collect());
        self.node(parent, name, ino, inode(FileKind::Regular, raw.len(), Body::Blocks));
    }
}

/// What a folder holds: names with content, of files.
fn files(path: &Path) -> Vec<(String, Vec<u8>)> {
    let mut found: Vec<_> = walkdir::WalkDir::new(path)
        .into_iter()
        .flatten()
        .filter(|e| e.file_type().is_file())
        .map(|e| {
            let name = e.path().strip_prefix(path).unwrap().to_str().unwrap().to_owned();
            (name, fs::read(e.path()).unwrap())
        })
        .collect();
    found.sort();
    found
}

async fn world(replicas: usize) -> World {
    let mut world = World::new(replicas).await;
    world.dir(0, b"", 1);
    world
}

async fn restored(
    world: &World,
    to: &Path,
    change: impl FnOnce(&mut Options),
) -> Result<Report, RestoreError> {
    let plan = plan(&survey(&world.stores).await, None).unwrap();
    let mut tables = Tables::default();
    load(&plan, &world.stores, &mut tables).await.unwrap();
    let mut options = Options {
        to: to.to_owned(),
        overwrite: false,
        filter: Filter::default(),
        block_size: world.volume.block_size,
    };
    change(&mut options);
    let mut last = Progress::default();
    let source = Source::new(&plan, &world.stores);
    let report = restore(&tables, &source, &options, &mut |p| last = *p).await?;
    assert_eq!(last, report.done);
    Ok(report)
}

/// Directories are written without permission for their owner; a later clean-up by others than root
/// needs it.
fn open_up(path: &Path) {
    for entry in walkdir::WalkDir::new(path).into_iter().flatten() {
        if entry.file_type().is_dir() {
            let _ = fs::set_permissions(entry.path(), Permissions::from_mode(0o700));
        }
    }
}

fn time_of(meta: &fs::Metadata) -> (i64, i64) {
    (meta.mtime(), meta.mtime_nsec())
}

const MTIME: (i64, i64) = (1_600_000_000, 123_456_789);

#[tokio::test]
async fn everything_in_a_tree_comes_back() {
    let mut w = world(2).await;
    w.dir(1, b"dir", 2);
    w.dir(2, b"deep", 3);
    let long = content(3 * BLOCK + 100, 1);
    w.file(3, b"blocks", 4, &long);
    let inline = Body::Inline(b"small".to_vec().into());
    w.node(2, b"inline", 5, inode(FileKind::Regular, 9, inline));
    w.node(1, b"empty", 6, inode(FileKind::Regular, 0, Body::Blocks));
    let mut hard = inode(FileKind::Regular, 3, Body::Inline(b"abc".to_vec().into()));
    hard.nlink = 2;
    hard.perm = 0o4711;
    w.node(1, b"one", 7, hard.clone());
    w.node(3, b"other", 7, hard);
    w.node(1, b"link", 8, inode(FileKind::Symlink, 9, Body::Target(b"/nowhere/".to_vec().into())));
    w.node(1, b"fifo", 9, inode(FileKind::Fifo, 0, Body::Blocks));
    w.node(1, b"socket", 10, inode(FileKind::Socket, 0, Body::Blocks));
    w.record(vec![
        Op::put(xattr_key(Ino(4), b"user.note"), &b"v\0w"[..]),
        Op::put(xattr_key(Ino(2), b"user.dir"), &b"d"[..]),
    ]);
    w.cut(2, true).await;
    let temp = tempfile::tempdir().unwrap();
    let to = temp.path().join("new/folder");
    let report = restored(&w, &to, |_| ()).await.unwrap();
    assert_eq!(report.problems, []);
    assert_eq!(report.done.entries_done, 11);
    assert_eq!((report.done.bytes, report.done.bytes_done), (long.len() as u64 + 8, long.len() as u64 + 8));
    let meta = |p: &str| fs::symlink_metadata(to.join(p)).unwrap();
    assert_eq!(fs::read(to.join("dir/deep/blocks")).unwrap(), long);
    assert_eq!(fs::read(to.join("dir/inline")).unwrap(), b"small\0\0\0\0");
    assert_eq!(meta("empty").len(), 0);
    assert_eq!(fs::read_link(to.join("link")).unwrap(), Path::new("/nowhere/"));
    assert!(meta("fifo").file_type().is_fifo() && meta("socket").file_type().is_socket());
    assert_eq!(meta("one").ino(), meta("dir/deep/other").ino());
    assert_eq!(meta("one").mode() & 0o7777, 0o4711);
    for path in
        ["", "dir", "dir/deep", "dir/deep/blocks", "dir/inline", "empty", "one", "link", "fifo", "socket"]
    {
        assert_eq!(time_of(&meta(path)), MTIME, "{path}");
    }
    assert_eq!((meta("fifo").mode() & 0o7777, meta("dir/deep/blocks").mode() & 0o7777), (0o640, 0o640));
    assert_eq!((meta("dir").mode() & 0o7777, meta("").mode() & 0o7777), (0o550, 0o550));
    assert_eq!(xattr::get(to.join("dir/deep/blocks"), "user.note").unwrap().unwrap(), b"v\0w");
    assert_eq!(xattr::get(to.join("dir"), "user.dir").unwrap().unwrap(), b"d");
    open_up(&to);
}

#[tokio::test]
async fn owners_and_devices_come_back_for_root_and_are_named_for_others() {
    let mut w = world(1).await;
    let mut file = inode(FileKind::Regular, 0, Body::Blocks);
    (file.uid, file.gid, file.perm) = (12_345, 23_456, 0o6755);
    w.node(1, b"file", 2, file);
    let mut device = inode(FileKind::CharDevice, 0, Body::Blocks);
    device.rdev = (1 << 8) | 3; // /dev/null
    w.node(1, b"null", 3, device);
    w.cut(1, true).await;
    let temp = tempfile::tempdir().unwrap();
    let report = restored(&w, temp.path(), |_| ()).await.unwrap();
    let meta = fs::metadata(temp.path().join("file")).unwrap();
    if rustix::process::geteuid().is_root() {
        assert_eq!((meta.uid(), meta.gid(), meta.mode() & 0o7777), (12_345, 23_456, 0o6755));
        let made = fs::metadata(temp.path().join("null"));
        match report.worst() {
            None => assert_eq!(made.unwrap().rdev(), rustix::fs::makedev(1, 3)),
            // In a container root may lack the right to make devices.
            Some(kind) => assert_eq!(kind, ProblemKind::Failed),
        }
    } else {
        assert_eq!(meta.mode() & 0o7777, 0o755);
        let kinds: Vec<_> = report.problems.iter().map(|p| p.kind).collect();
        assert_eq!(kinds, [ProblemKind::Skipped, ProblemKind::Attribute]);
    }
}

#[tokio::test]
async fn a_file_whose_list_cannot_be_set_is_not_open_to_its_group() {
    let mut w = world(1).await;
    // With a list, the bits of the group are its mask.
    for (name, ino, kind) in [(b"file", 2, FileKind::Regular), (b"fifo", 3, FileKind::Fifo)] {
        let mut node = inode(kind, 0, Body::Blocks);
        node.perm = 0o674;
        w.node(1, name, ino, node);
        w.record(vec![Op::put(xattr_key(Ino(ino), b"system.posix_acl_access"), &b"no list"[..])]);
    }
    w.cut(1, true).await;
    let temp = tempfile::tempdir().unwrap();
    let report = restored(&w, temp.path(), |_| ()).await.unwrap();
    assert_eq!(report.problems.len(), 2, "{:?}", report.problems);
    for name in ["file", "fifo"] {
        let mode = fs::metadata(temp.path().join(name)).unwrap().mode();
        assert_eq!(mode & 0o7777, 0o604, "{name}");
    }
}

#[tokio::test]
async fn sparse_files_stay_sparse() {
    let mut w = world(1).await;
    let mut raw = vec![0; 100 * BLOCK];
    raw[70 * BLOCK + 8192..70 * BLOCK + 8200].fill(7);
    w.file(1, b"sparse", 2, &raw);
    w.node(1, b"hole", 3, inode(FileKind::Regular, 1 << 40, Body::Blocks));
    w.cut(1, true).await;
    let temp = tempfile::tempdir().unwrap();
    let report = restored(&w, temp.path(), |_| ()).await.unwrap();
    assert_eq!(report.problems, []);
    let meta = fs::metadata(temp.path().join("sparse")).unwrap();
    assert_eq!(meta.len(), raw.len() as u64);
    assert!(meta.blocks() * 512 <= 16 << 10, "{} blocks", meta.blocks());
    assert!(fs::read(temp.path().join("sparse")).unwrap() == raw);
    assert_eq!(fs::metadata(temp.path().join("hole")).unwrap().len(), 1 << 40);
}

#[tokio::test]
async fn a_shrunk_file_is_cut_at_its_size() {
    let mut w = world(1).await;
    let raw = content(2 * BLOCK, 3);
    w.file(1, b"file", 2, &raw);
    w.node(1, b"file", 2, inode(FileKind::Regular, BLOCK - 10, Body::Blocks));
    w.cut(1, true).await;
    let temp = tempfile::tempdir().unwrap();
    restored(&w, temp.path(), |_| ()).await.unwrap();
    assert!(fs::read(temp.path().join("file")).unwrap() == raw[..BLOCK - 10]);
}

#[tokio::test]
async fn a_damaged_block_is_taken_from_another_replica_and_if_none_has_it_the_file_is_marked() {
    let mut w = world(2).await;
    w.dir(1, b"d", 5);
    let (a, b) = (content(2 * BLOCK, 1), content(2 * BLOCK, 2));
    w.file(5, b"a", 2, &a);
    w.file(1, b"b", 3, &b);
    w.cut(1, true).await;
    let path = w.segment(SegmentNo(1));
    // Frames lie in the order a0 a1 b0 b1 behind a header of 128 bytes; this is the middle of a1.
    let len = w.stores[0].get(&path).await.unwrap().len();
    let at = len - (128 + BLOCK + BLOCK / 2);
    w.spoil(0, &path, at).await;
    let temp = tempfile::tempdir().unwrap();
    let report = restored(&w, &temp.path().join("x"), |_| ()).await.unwrap();
    assert_eq!(report.problems, []);
    assert_eq!(report.damaged.len(), 1);
    assert_eq!((report.damaged[0].replica.as_str(), report.damaged[0].object.as_str()), ("alpha", &path[..]));
    assert!(fs::read(temp.path().join("x/d/a")).unwrap() == a);

    w.spoil(1, &path, at).await;
    let report = restored(&w, &temp.path().join("y"), |_| ()).await.unwrap();
    assert_eq!(report.worst(), Some(ProblemKind::Damaged));
    assert_eq!(report.problems.len(), 1);
    let problem = &report.problems[0];
    assert_eq!(problem.path, "d/a");
    for part in
        ["offset 65536", "alpha", "beta", "segment 1", &crate::ids::BlockHash::of(&a[BLOCK..]).to_string()]
    {
        assert!(problem.text.contains(part), "{part}: {}", problem.text);
    }
    assert_eq!(report.damaged.len(), 2);
    let to = temp.path().join("y");
    assert!(!to.join("d/a").exists());
    let kept = fs::read(to.join("d/a.damaged")).unwrap();
    assert!(kept[..BLOCK] == a[..BLOCK] && kept[BLOCK..].iter().all(|b| *b == 0));
    assert!(fs::read(to.join("b")).unwrap() == b);
    assert_eq!(time_of(&fs::metadata(to.join("d")).unwrap()), MTIME);

    // The segment gone from one replica and cut short on the other: what is still there is found.
    w.delete(0, &path).await;
    w.shorten(1, &path, len - (128 + BLOCK / 2)).await;
    w.checkpoint().await;
    let report = restored(&w, &temp.path().join("z"), |_| ()).await.unwrap();
    assert_eq!(report.worst(), Some(ProblemKind::Damaged));
    assert!(temp.path().join("z/d/a.damaged").exists() && temp.path().join("z/b.damaged").exists());
    open_up(temp.path());
}

#[tokio::test]
async fn what_is_there_is_left_alone_unless_told() {
    let mut w = world(1).await;
    w.dir(1, b"d", 5);
    w.file(5, b"f", 2, &content(100, 1));
    w.node(5, b"l", 3, inode(FileKind::Symlink, 1, Body::Target(b"x".to_vec().into())));
    w.file(5, b"new", 4, &content(100, 2));
    w.cut(1, true).await;
    let temp = tempfile::tempdir().unwrap();
    let d = temp.path().join("d");
    fs::create_dir(&d).unwrap();
    fs::set_permissions(&d, Permissions::from_mode(0o711)).unwrap();
    fs::write(d.join("f"), "mine").unwrap();
    fs::write(d.join("l"), "mine").unwrap();
    let report = restored(&w, temp.path(), |_| ()).await.unwrap();
    let told: Vec<_> = report.problems.iter().map(|p| (p.path.as_str(), p.kind)).collect();
    assert_eq!(told, [("d/f", ProblemKind::Skipped), ("d/l", ProblemKind::Skipped)]);
    assert_eq!(
        (fs::read(d.join("f")).unwrap(), fs::read(d.join("l")).unwrap()),
        (b"mine".into(), b"mine".into())
    );
    assert_eq!(fs::metadata(&d).unwrap().mode() & 0o7777, 0o711);
    assert!(fs::read(d.join("new")).unwrap() == content(100, 2));
    let report = restored(&w, temp.path(), |o| o.overwrite = true).await.unwrap();
    assert_eq!(report.problems, []);
    assert!(fs::read(d.join("f")).unwrap() == content(100, 1));
    assert_eq!(fs::read_link(d.join("l")).unwrap(), Path::new("x"));
    assert_eq!(fs::metadata(&d).unwrap().mode() & 0o7777, 0o550);
    open_up(temp.path());
}

#[tokio::test]
async fn links_in_the_way_lead_nowhere() {
    let mut w = world(1).await;
    w.dir(1, b"d", 5);
    w.file(5, b"f", 2, &content(100, 1));
    w.file(1, b"g", 3, &content(100, 1));
    w.node(1, b"h", 4, inode(FileKind::Regular, 1, Body::Inline(b"h".to_vec().into())));
    w.cut(1, true).await;
    for overwrite in [false, true] {
        let temp = tempfile::tempdir().unwrap();
        let (outside, to) = (temp.path().join("outside"), temp.path().join("to"));
        fs::create_dir(&outside).unwrap();
        fs::write(outside.join("g"), "mine").unwrap();
        fs::create_dir(&to).unwrap();
        symlink(&outside, to.join("d")).unwrap();
        symlink(outside.join("g"), to.join("g")).unwrap();
        symlink(outside.join("new"), to.join("h")).unwrap();
        let report = restored(&w, &to, |o| o.overwrite = overwrite).await.unwrap();
        let paths: Vec<_> = report.problems.iter().map(|p| p.path.as_str()).collect();
        let expected: &[&str] = if overwrite { &["d", "d/f"] } else { &["d", "d/f", "g", "h"] };
        assert_eq!(paths, expected, "{:?}", report.problems);
        assert_eq!(fs::read_dir(&outside).unwrap().count(), 1);
        assert_eq!(fs::read(outside.join("g")).unwrap(), b"mine");
        assert_eq!(fs::symlink_metadata(to.join("g")).unwrap().is_symlink(), !overwrite);
        open_up(&to);
    }
}

#[tokio::test]
async fn only_the_wanted_part_comes_back() {
    let mut w = world(1).await;
    w.dir(1, b"d", 5);
    w.file(5, b"f", 2, &content(100, 1));
    w.file(1, b"g", 3, &content(100, 1));
    w.cut(1, true).await;
    let temp = tempfile::tempdir().unwrap();
    let to = temp.path().join("x");
    restored(&w, &to, |o| o.filter = Filter::new(["d/f"]).unwrap()).await.unwrap();
    let found: Vec<_> = walkdir::WalkDir::new(&to)
        .into_iter()
        .map(|e| e.unwrap().path().strip_prefix(&to).unwrap().to_owned())
        .collect();
    assert_eq!(found, [Path::new(""), Path::new("d"), Path::new("d/f")]);
    let error = restored(&w, &to, |o| o.filter = Filter::new(["nope"]).unwrap()).await.unwrap_err();
    assert!(error.to_string().contains("nope"));
    open_up(temp.path());
}

#[tokio::test]
async fn thousands_of_small_files_take_few_requests() {
    let mut w = world(1).await;
    for n in 0..2_000u64 {
        let raw = content(5_000, (n % 251) as u8);
        w.file(1, format!("{:03}-{n}", n % 17).as_bytes(), n + 2, &raw);
    }
    w.cut(3, true).await;
    let before = w.stores[0].requests().get;
    let temp = tempfile::tempdir().unwrap();
    let report = restored(&w, temp.path(), |_| ()).await.unwrap();
    assert_eq!(report.problems, []);
    assert_eq!(report.done.entries_done, 2_001);
    let requests = w.stores[0].requests().get - before;
    assert!(requests < 30, "{requests} requests");
    for n in [0u64, 1_234, 1_999] {
        let raw = fs::read(temp.path().join(format!("{:03}-{n}", n % 17))).unwrap();
        assert!(raw == content(5_000, (n % 251) as u8));
    }
}

#[tokio::test]
async fn a_very_deep_tree_comes_back() {
    let mut w = world(1).await;
    for depth in 1..1_500u64 {
        w.dir(depth, b"d", depth + 1);
        // Opened again in the end, each by another way.
        w.file(depth, b"e", 10_000 + depth, &content(10, (depth % 251) as u8));
    }
    w.file(1_500, b"f", 5_000, &content(10, 1));
    w.cut(1, true).await;
    let temp = tempfile::tempdir().unwrap();
    let report = restored(&w, temp.path(), |_| ()).await.unwrap();
    assert_eq!(report.problems, []);
    assert_eq!(report.done.entries_done, 3_000);
    assert_eq!(walkdir::WalkDir::new(temp.path()).max_open(10).into_iter().count(), 3_000);
    open_up(temp.path());
}

/// Removes what is too deep for the standard library.
fn remove(path: &Path) {
    assert!(std::process::Command::new("rm").arg("-rf").arg(path).status().unwrap().success());
}

#[test]
fn directories_are_found_again_in_steps_of_their_number() {
    const DEPTH: u64 = 5_000;
    let temp = tempfile::tempdir().unwrap();
    let flags = rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::DIRECTORY;
    let root = rustix::fs::open(temp.path(), flags, rustix::fs::Mode::empty()).unwrap();
    let mut dirs = dirs::Dirs::new(root).unwrap();
    // Two chains side by side, longer than a path may be, with a leaf at each level of the first.
    let mut all = Vec::new();
    for chain in ["a", "b"] {
        let mut at = 0;
        for n in 0..DEPTH {
            let parent = at;
            at = dirs.make(parent, &Bytes::from(chain), Ino(n)).unwrap().number;
            all.push(at);
            if chain == "a" {
                all.push(dirs.make(parent, &Bytes::from("leaf"), Ino(n)).unwrap().number);
            }
        }
    }
    assert_eq!(dirs.steps(), 0, "each is met beside the last one");
    for number in all.iter().rev() {
        let fd = dirs.open_with_parent(*number).unwrap();
        assert_eq!(dirs::FileId::of_open(&fd).unwrap(), dirs.id(*number));
    }
    // Up the one chain, once down and then up the other.
    assert!(dirs.steps() < 5 * DEPTH, "{}", dirs.steps());
    // Leaves from the top down: beside each other.
    let before = dirs.steps();
    for number in all.iter().take(2 * DEPTH as usize).skip(1).step_by(2) {
        dirs.open(*number).unwrap();
    }
    assert!(dirs.steps() - before < 4 * DEPTH, "{}", dirs.steps() - before);
    drop(dirs);
    remove(&temp.path().join("a"));
    remove(&temp.path().join("b"));
}

#[test]
fn requests_join_neighbours_and_share_equal_frames() {
    use crate::format::tables::{BlockEntry, FrameLoc};
    use crate::ids::{BlockHash, Epoch};
    use crate::restore::content::requests;
    let want = |segment, offset, len, what: u32| Want {
        entry: BlockEntry {
            hash: BlockHash([1; 32]),
            loc: FrameLoc {
                segment: SegmentNo(segment),
                epoch: Epoch(1),
                offset,
                stored_len: len,
                raw_len: len,
                codec: 0,
            },
        },
        what,
    };
    let wants = vec![
        want(2, 100, 50, 0),
        want(1, 150, 50, 1),
        want(1, 100, 50, 2),
        want(1, 100, 50, 3),
        want(1, 1_000_000, 50, 4),
        want(1, 1_000_050, 4 << 20, 5),
        want(1, 6_000_000, 16 << 20, 6),
    ];
    let made: Vec<_> = requests(wants)
        .into_iter()
        .map(|(r, users)| (r.segment.0.0, r.start, r.end, r.frames.len(), users))
        .collect();
    let mib = 1 << 20;
    assert_eq!(
        made,
        [
            (1, 100, 200, 2, vec![(0, 2), (0, 3), (1, 1)]),
            (1, 1_000_000, 1_000_050, 1, vec![(0, 4)]),
            (1, 1_000_050, 1_000_050 + 4 * mib, 1, vec![(0, 5)]),
            (1, 6_000_000, 6_000_000 + 16 * mib, 1, vec![(0, 6)]),
            (2, 100, 150, 1, vec![(0, 0)]),
        ]
    );
}
