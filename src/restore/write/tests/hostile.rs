//! Tables of an attacker, and a folder in which others change things: nothing is written but what
//! this restore made.

use super::*;
use crate::format::tables::table;
use crate::restore::write::dirs::{Dirs, FileId};
use crate::restore::write::target::{First, Linked};

/// An entry under a cookie that is not its own.
fn elsewhere(parent: u64, cookie: u64, name: &[u8], ino: u64, kind: FileKind) -> Op {
    let mut key = vec![table::DIRENT];
    key.extend_from_slice(&parent.to_be_bytes());
    key.extend_from_slice(&cookie.to_be_bytes());
    key.extend_from_slice(name);
    Op::put(key, Dirent { ino: Ino(ino), kind }.encode())
}

#[tokio::test]
async fn two_entries_of_one_name_are_damage() {
    let mut w = world(1).await;
    let raw = content(100, 1);
    w.file(1, b"x", 2, &raw);
    let mut device = inode(FileKind::BlockDevice, 0, Body::Blocks);
    device.rdev = 7 << 8; // a loop device
    w.record(vec![
        Op::put(inode_key(Ino(3)), device.encode()),
        // Before and after the place of the name, so that one of them comes second.
        elsewhere(1, 3, b"x", 3, FileKind::BlockDevice),
        elsewhere(1, u64::MAX >> 1, b"x", 3, FileKind::BlockDevice),
        // Alone, but not where the name belongs.
        elsewhere(1, 9, b"y", 2, FileKind::Regular),
        elsewhere(1, 0, b"z", 2, FileKind::Regular),
    ]);
    w.cut(1, true).await;
    for overwrite in [false, true] {
        let temp = tempfile::tempdir().unwrap();
        let report = restored(&w, temp.path(), |o| o.overwrite = overwrite).await.unwrap();
        let texts: Vec<_> = report.problems.iter().map(|p| (p.kind, p.text.as_str())).collect();
        assert_eq!(texts.len(), 4, "{texts:?}");
        for (kind, text) in texts {
            assert!(kind == ProblemKind::Damaged && text.contains("not its own"), "{text}");
        }
        assert_eq!(files(temp.path()), [("x".to_owned(), raw.clone())]);
        assert_eq!(fs::read_dir(temp.path()).unwrap().count(), 1);
    }
}

#[tokio::test]
async fn directories_in_a_cycle_end() {
    let mut w = world(1).await;
    w.dir(1, b"a", 2);
    w.dir(2, b"b", 3);
    w.dir(3, b"a", 2);
    let root = Dirent { ino: Ino::ROOT, kind: FileKind::Directory };
    w.record(vec![Op::put(dirent_key(Ino(3), b"root"), root.encode())]);
    w.file(3, b"f", 9, b"content");
    w.cut(1, true).await;
    let temp = tempfile::tempdir().unwrap();
    let report = restored(&w, temp.path(), |_| ()).await.unwrap();
    let paths: Vec<_> = report.problems.iter().map(|p| (p.path.as_str(), p.kind)).collect();
    assert_eq!(paths, [("a/b/a", ProblemKind::Damaged), ("a/b/root", ProblemKind::Damaged)]);
    assert_eq!(files(temp.path()), [("a/b/f".to_owned(), b"content".to_vec())]);
    open_up(temp.path());
}

fn target(path: &Path) -> Target {
    Target::open(path, ".mirrorfs-restore".into()).unwrap()
}

fn name(name: &'static str) -> Name {
    Name { dir: 0, name: Bytes::from_static(name.as_bytes()) }
}

/// A file made by the target.
fn make(target: &mut Target, at: &Name, raw: &[u8], replace: bool) -> io::Result<First> {
    let draft = target.begin(0, raw.len() as u64)?;
    target.write(draft, 0, raw)?;
    let inode = inode(FileKind::Regular, raw.len(), Body::Blocks);
    let placed = target.place(draft, at, replace, &Wished { inode: &inode, xattrs: &[] });
    if placed.is_err() {
        target.discard(draft);
    }
    placed.map(|(first, _)| first)
}

#[test]
fn content_goes_only_to_the_file_that_was_made() {
    let temp = tempfile::tempdir().unwrap();
    let victim = temp.path().join("victim");
    fs::write(&victim, "mine").unwrap();
    let to = temp.path().join("to");
    let mut target = target(&to);
    // So many that the first is not open any more.
    let drafts: Vec<_> = (0..100).map(|_| target.begin(0, 4).unwrap()).collect();
    let folder = to.join(".mirrorfs-restore");
    let swap = |n: usize, put: &dyn Fn(&Path)| {
        let at = folder.join(n.to_string());
        fs::remove_file(&at).unwrap();
        put(&at);
    };
    swap(0, &|at| symlink(&victim, at).unwrap());
    swap(1, &|at| fs::hard_link(&victim, at).unwrap());
    swap(2, &|at| fs::write(at, "").unwrap());
    swap(3, &|at| {
        rustix::fs::mknodat(
            rustix::fs::CWD,
            at,
            rustix::fs::FileType::Fifo,
            rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR,
            0,
        )
        .unwrap();
    });
    swap(4, &|at| fs::create_dir(at).unwrap());
    for draft in &drafts[..5] {
        let error = target.write(*draft, 0, b"evil").unwrap_err();
        assert!(error.to_string().contains("put in its place"), "{error}");
    }
    target.write(drafts[5], 0, b"good").unwrap();
    assert_eq!(fs::read(&victim).unwrap(), b"mine");
}

#[test]
fn names_that_the_filesystem_takes_for_one_are_not_merged() {
    // What a filesystem that ignores case shows under "up" is the inode of "UP": here by a link.
    let temp = tempfile::tempdir().unwrap();
    let mut target = target(temp.path());
    let told = |e: io::Error| assert!(e.to_string().contains("does not tell their names apart"), "{e}");
    make(&mut target, &name("UP"), b"one", true).unwrap();
    fs::hard_link(temp.path().join("UP"), temp.path().join("up")).unwrap();
    for replace in [false, true] {
        told(make(&mut target, &name("up"), b"other", replace).unwrap_err());
        let link = inode(FileKind::Symlink, 1, Body::Target(b"x".to_vec().into()));
        let wished = Wished { inode: &link, xattrs: &[] };
        told(target.special(&name("up"), None, replace, &wished).unwrap_err());
    }
    told(target.existing(&name("up")).unwrap_err());
    assert_eq!(fs::read(temp.path().join("UP")).unwrap(), b"one");
    assert_eq!(fs::read_dir(temp.path().join(".mirrorfs-restore")).unwrap().count(), 0);
    target.remove_drafts();
    assert!(!temp.path().join(".mirrorfs-restore").exists());
}

#[test]
fn a_second_name_is_one_only_where_it_is_another() {
    let temp = tempfile::tempdir().unwrap();
    let mut target = target(temp.path());
    let inode = inode(FileKind::Regular, 3, Body::Blocks);
    let wished = Wished { inode: &inode, xattrs: &[] };
    let mut first = make(&mut target, &name("UP"), b"one", false).unwrap();
    assert_eq!(target.link_file(&mut first, &name("b"), false, &wished).unwrap(), Linked::Link);
    // A restore that is run again finds both names.
    let mut again = First { names: 1, ..first.clone() };
    assert_eq!(target.link_file(&mut again, &name("b"), false, &wished).unwrap(), Linked::Link);
    // One name more than the inode has links: the filesystem took two for one.
    let error = target.link_file(&mut again, &name("b"), false, &wished).unwrap_err();
    assert!(error.to_string().contains("does not tell"), "{error}");
    // Where the first name leads elsewhere meanwhile, that is not linked.
    fs::remove_file(temp.path().join("UP")).unwrap();
    fs::write(temp.path().join("UP"), "foreign").unwrap();
    assert!(target.link_file(&mut first, &name("c"), false, &wished).is_err());
    assert!(!temp.path().join("c").exists());
}

#[test]
fn a_directory_that_is_replaced_is_not_used() {
    let temp = tempfile::tempdir().unwrap();
    let (to, outside) = (temp.path().join("to"), temp.path().join("outside"));
    for path in [&to, &outside] {
        fs::create_dir(path).unwrap();
    }
    let open = |path: &Path| rustix::fs::open(path, rustix::fs::OFlags::PATH, rustix::fs::Mode::empty());
    let mut dirs = Dirs::new(open(&to).unwrap()).unwrap();
    let numbers: Vec<_> =
        (0..200).map(|n| dirs.make(0, &Bytes::from(format!("d{n}")), Ino(n + 2)).unwrap().number).collect();
    assert_eq!(FileId::of_open(&dirs.open(numbers[150]).unwrap()).unwrap(), dirs.id(numbers[150]));
    fs::remove_dir(to.join("d0")).unwrap();
    symlink(&outside, to.join("d0")).unwrap();
    fs::remove_dir(to.join("d1")).unwrap();
    fs::rename(&outside, to.join("d1")).unwrap();
    assert!(dirs.open(numbers[0]).is_err());
    assert!(dirs.open(numbers[1]).is_err());
    assert!(dirs.open(numbers[2]).is_ok());
}

#[tokio::test]
async fn what_lies_under_a_name_is_never_opened_as_content() {
    let mut w = world(1).await;
    for (i, at) in [&b"link"[..], b"fifo", b"dir", b"foreign"].into_iter().enumerate() {
        w.file(1, at, i as u64 + 2, &content(100, 1));
    }
    w.cut(1, true).await;
    for overwrite in [false, true] {
        let temp = tempfile::tempdir().unwrap();
        let (to, victim) = (temp.path().join("to"), temp.path().join("victim"));
        fs::create_dir_all(to.join("dir")).unwrap();
        fs::write(&victim, "mine").unwrap();
        symlink(&victim, to.join("link")).unwrap();
        fs::hard_link(&victim, to.join("foreign")).unwrap();
        let mode = rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR;
        let fifo = rustix::fs::FileType::Fifo;
        rustix::fs::mknodat(rustix::fs::CWD, to.join("fifo"), fifo, mode, 0).unwrap();
        let report = restored(&w, &to, |o| o.overwrite = overwrite).await.unwrap();
        assert_eq!(fs::read(&victim).unwrap(), b"mine");
        assert_eq!(
            fs::metadata(&victim).unwrap().mode() & 0o7777,
            0o644 & fs::metadata(&victim).unwrap().mode()
        );
        let refused: Vec<_> = report.problems.iter().map(|p| p.path.as_str()).collect();
        let expected: &[&str] = if overwrite { &["dir"] } else { &["dir", "fifo", "foreign", "link"] };
        let mut refused = refused;
        refused.sort_unstable();
        assert_eq!(refused, expected, "{:?}", report.problems);
        open_up(&to);
    }
}
