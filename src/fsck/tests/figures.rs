//! How long a check of many files takes, and what memory.

use super::*;

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
    let (journal, _) = Journal::open(JournalOptions::new(dir.path(), Arc::new(|_| Ok(())))).unwrap();
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
