//! Random operations on the filesystem and on the reference, compared one by one.
//!
//! Owns the choice of operations and the comparison. A run is a function of its seed; the last operations are printed
//! when it fails.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::sync::atomic::Ordering;

use mirrorfs::format::tables::name_cookie;
use mirrorfs::ids::Ino;
use mirrorfs::txg::Cut;
use mirrorfs::vfs::api::FileSystem;
use mirrorfs::vfs::types::{
    Attr, Caller, Fallocate, FileKind, RenameMode, Seek, SetAttr, SetTime, Time, VfsError, Wait, XattrMode,
};
use rand::seq::IndexedRandom;
use rand::{Rng, RngCore, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::check;
use crate::reference::{Body, Content, Meta, Model, New, Node};
use crate::world::{BLOCK_SIZE, Setup, World};

const NAMES: [&[u8]; 6] = [b"a", b"b", b"c", b"d", b"\xff\xfe odd", b"e"];
const BS: u64 = BLOCK_SIZE as u64;

/// What a run does beside operations.
#[derive(Clone, Copy)]
pub struct Plan {
    pub setup: Setup,
    pub operations: u64,
    /// Once in so many operations, on average.
    pub commit: u32,
    pub seal: u32,
    pub restart: u32,
    pub crash: u32,
    pub restore: u32,
    /// Of 1000 fetches so many fail, in some reads.
    pub failing: u32,
}

struct Log {
    seed: u64,
    step: u64,
    lines: VecDeque<String>,
}

impl Drop for Log {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- the last operations:");
            self.lines.iter().for_each(|l| eprintln!("{l}"));
            eprintln!("--- failed with MIRRORFS_SEED={} MIRRORFS_OPS={}", self.seed, self.step);
        }
    }
}

pub struct Run {
    plan: Plan,
    rng: ChaCha8Rng,
    world: World,
    model: Model,
    log: Log,
    /// A cut that is not sealed yet, and the reference at that moment.
    cut: Option<(Cut, Model)>,
    /// The reference at the last sealed cut.
    sealed: Model,
    /// Inode numbers that were given back.
    dead: Vec<Ino>,
    /// The reference after each operation since the last commit, while a crash is planned.
    window: Option<Window>,
    pub counts: BTreeMap<&'static str, u64>,
}

/// What of an inode must be that of one moment after a crash: attributes, xattrs, names.
type Named = (Meta, BTreeMap<Vec<u8>, Vec<u8>>, Option<BTreeMap<Vec<u8>, Ino>>);

/// What may be there after a crash.
struct Window {
    left: u32,
    past: Vec<Model>,
    /// From which of them on: the namespace, and single files, because they were synced since.
    floor: usize,
    floors: HashMap<Ino, usize>,
    /// Files that a copy went into: it is done in steps, and a crash may show the end of one.
    copied: BTreeSet<Ino>,
}

fn meta(a: &Attr) -> Meta {
    Meta {
        kind: a.kind,
        perm: a.perm,
        nlink: a.nlink,
        uid: a.uid,
        gid: a.gid,
        rdev: a.rdev,
        atime: a.atime,
        mtime: a.mtime,
        ctime: a.ctime,
        btime: a.btime,
    }
}

impl Run {
    pub fn new(seed: u64, plan: Plan) -> Self {
        let world = World::new(plan.setup);
        let root = world.vfs().getattr(Ino::ROOT).unwrap();
        let model = Model::new(meta(&root));
        Self {
            plan,
            rng: ChaCha8Rng::seed_from_u64(seed),
            log: Log { seed, step: 0, lines: VecDeque::new() },
            cut: None,
            sealed: model.clone(),
            dead: Vec::new(),
            window: None,
            counts: BTreeMap::new(),
            world,
            model,
        }
    }

    /// Does all operations of the plan.
    pub fn run(&mut self) {
        // A first state on the replica, so that there is always something to restore.
        self.begin_cut();
        self.finish_cut();
        for step in 1..=self.plan.operations {
            self.log.step = step;
            self.tick();
            self.event();
            self.operation();
            self.settle();
            self.note_past();
            if step % 500 == 0 {
                self.compare_all();
            }
            if step % 2500 == 0 {
                self.check_tables();
            }
        }
        self.check_tables();
        self.compare_all();
        self.finish_cut();
        self.begin_cut();
        self.finish_cut();
        self.restart();
        self.restore();
        self.check_tables();
    }

    fn tick(&mut self) {
        let now = self.world.clock.fetch_add(1, Ordering::SeqCst) + 1;
        self.model.now = Time { secs: now, nanos: 0 };
    }

    /// With a tiny cache the space in use decides what is cut and evicted: without this the run would depend on the pace
    /// of the thread that deletes.
    fn settle(&self) {
        if self.plan.failing > 0 {
            self.world.vfs().wait_reaped();
        }
    }

    fn say(&mut self, what: &'static str, text: String) {
        *self.counts.entry(what).or_default() += 1;
        if self.log.lines.len() == 60 {
            self.log.lines.pop_front();
        }
        self.log.lines.push_back(format!("{:6} {what} {text}", self.log.step));
    }

    fn once_in(&mut self, n: u32) -> bool {
        n > 0 && self.rng.random_ratio(1, n)
    }

    // ---- commits, cuts, restarts ---------------------------------------------------------------------------------

    fn event(&mut self) {
        let space = &self.world.stack().blocks.space;
        // Keep out of the range where writers are slowed.
        let heavy = space.dirty() + space.staged() > space.limit() / 3;
        if heavy || self.once_in(self.plan.seal) {
            self.begin_cut();
            self.finish_cut();
        } else if self.cut.is_none() && self.once_in(self.plan.seal) {
            self.begin_cut();
        } else if self.cut.is_some() && self.once_in(8) {
            self.finish_cut();
        }
        if self.once_in(self.plan.commit) {
            self.say("commit", String::new());
            self.world.vfs().commit().unwrap();
            self.committed();
        }
        if self.once_in(400) {
            self.say("drop_clean", String::new());
            self.world.stack().blocks.drop_all_clean();
        }
        if self.once_in(self.plan.restart) {
            self.restart();
        }
        if self.once_in(self.plan.restore) {
            self.restore();
        }
        if self.window.is_none() && self.once_in(self.plan.crash) {
            let left = *[0, 1, 3, 10, 40].choose(&mut self.rng).unwrap();
            self.say("commit", format!("a crash will follow after {left} operations"));
            self.world.vfs().commit().unwrap();
            let past = vec![self.model.clone()];
            self.window =
                Some(Window { left, past, floor: 0, floors: HashMap::new(), copied: BTreeSet::new() });
        }
        if let Some(window) = &mut self.window {
            if window.left == 0 {
                self.crash();
            } else {
                window.left -= 1;
            }
        }
    }

    /// All that was done is durable.
    fn committed(&mut self) {
        if let Some(window) = &mut self.window {
            window.past = vec![self.model.clone()];
            window.floor = 0;
            window.floors.clear();
            window.copied.clear();
        }
    }

    /// One file, and all names, are durable.
    fn synced(&mut self, ino: Ino) {
        if let Some(window) = &mut self.window {
            window.floor = window.past.len() - 1;
            window.floors.insert(ino, window.floor);
        }
    }

    fn note_past(&mut self) {
        if let Some(window) = &mut self.window {
            window.past.push(self.model.clone());
        }
    }

    fn begin_cut(&mut self) {
        if self.cut.is_none() {
            self.say("cut", String::new());
            let cut = self.world.cut();
            self.cut = Some((cut, self.model.clone()));
            self.committed();
        }
    }

    fn finish_cut(&mut self) {
        let Some((cut, model)) = self.cut.take() else { return };
        if self.once_in(4) {
            // The replicas are out of reach: what needs them fails and is tried again.
            self.world.source.failing.store(700, Ordering::Relaxed);
            let failed = self.world.seal(&cut).is_err();
            self.world.source.failing.store(0, Ordering::Relaxed);
            if failed {
                self.say("seal fails", String::new());
            } else {
                self.sealed_now(model);
                return;
            }
        }
        self.world.seal(&cut).unwrap();
        self.sealed_now(model);
    }

    fn sealed_now(&mut self, model: Model) {
        self.say("sealed", format!("up to segment {}", self.world.replay.last));
        self.sealed = model;
        if self.once_in(3) {
            self.check_sealed();
        }
    }

    /// The replica holds exactly the reference's state at the cut.
    fn check_sealed(&self) {
        let decoded = check::consistent(&self.world.replay.tables, BLOCK_SIZE);
        check::equals(&decoded, &self.sealed, BLOCK_SIZE);
    }

    fn restart(&mut self) {
        self.say("restart", String::new());
        self.cut = None;
        self.window = None;
        self.world.restart();
        self.model.restart();
        self.compare_all();
        self.look_up_all();
    }

    fn restore(&mut self) {
        self.say("restore", format!("segment {}", self.world.replay.last));
        self.check_sealed();
        self.cut = None;
        self.window = None;
        self.world.restore();
        self.model = self.sealed.clone();
        self.model.now = Time { secs: self.world.clock.load(Ordering::SeqCst), nanos: 0 };
        self.model.restart();
        self.compare_all();
        self.look_up_all();
    }

    /// References for everything, as the kernel would take them while it walks.
    fn look_up_all(&mut self) {
        self.dead.clear();
        let Some(root) = self.model.nodes.get_mut(&Ino::ROOT) else { return };
        root.refs = 1;
        let names: Vec<(Ino, Vec<u8>)> = self
            .model
            .nodes
            .iter()
            .flat_map(|(ino, n)| n.entries().into_iter().flat_map(|e| e.keys().map(|k| (*ino, k.clone()))))
            .collect();
        for (parent, name) in names {
            let attr = self.world.vfs().lookup(parent, &name).unwrap();
            assert_eq!(self.model.lookup(parent, &name), Ok(attr.ino));
        }
    }

    // ---- comparing -----------------------------------------------------------------------------------------------

    fn compare_attr(&self, ino: Ino, attr: &Attr) {
        let node = &self.model.nodes[&ino];
        assert_eq!((attr.ino, meta(attr), attr.size), (ino, node.meta, node.size()), "attributes of {ino}");
        assert_eq!(attr.generation, 1);
    }

    /// Compares attributes of those inodes that are still there.
    fn compare(&self, inos: &[Ino]) {
        for ino in inos {
            if self.model.nodes.contains_key(ino) {
                self.compare_attr(*ino, &self.world.vfs().getattr(*ino).unwrap());
            }
        }
    }

    fn read(&self, ino: Ino, offset: u64, len: u64) -> Result<Vec<u8>, VfsError> {
        let vfs = self.world.vfs();
        match vfs.read(ino, offset, len as u32, Wait::No) {
            Err(VfsError::WouldBlock) => vfs.read(ino, offset, len as u32, Wait::Yes),
            other => other,
        }
        .map(|b| b.to_vec())
    }

    fn compare_bytes(&self, ino: Ino, offset: u64, len: u64) {
        let expected = self.model.nodes[&ino].content().unwrap().read(offset, len);
        let got = self.read(ino, offset, len).unwrap();
        same_bytes(ino, offset, &got, &expected);
    }

    fn compare_content(&self, ino: Ino) {
        let content = self.model.nodes[&ino].content().unwrap();
        let pages: BTreeSet<u64> = content.pages().map(|p| p / BS).collect();
        for block in pages {
            self.compare_bytes(ino, block * BS, BS);
        }
        // No data where none should be.
        let mut at = 0;
        while let Ok(data) = self.world.vfs().lseek(ino, at, Seek::Data) {
            assert!(content.is_zero(at, data), "lseek leaps over data of {ino} between {at} and {data}");
            let hole = self.world.vfs().lseek(ino, data, Seek::Hole).unwrap();
            assert!(hole > data && hole <= content.size);
            let mut from = data;
            while from < hole {
                let n = (hole - from).min(BS);
                self.compare_bytes(ino, from, n);
                from += n;
            }
            at = hole;
        }
        assert!(content.is_zero(at, content.size), "data of {ino} behind {at} is missing");
        self.compare_bytes(ino, content.size.saturating_sub(10), 100);
    }

    fn list(&self, ino: Ino) -> BTreeMap<Vec<u8>, Ino> {
        let mut names = BTreeMap::new();
        let mut last = 0;
        self.world
            .vfs()
            .readdir(ino, 0, false, &mut |item| {
                assert!(item.cookie > last, "cookies ascend");
                last = item.cookie;
                assert!(names.insert(item.name.to_vec(), item.ino).is_none(), "a name appears twice");
                true
            })
            .unwrap();
        assert_eq!(names.remove(&b"."[..]), Some(ino));
        assert_eq!(names.remove(&b".."[..]), Some(self.model.nodes[&ino].parent));
        names
    }

    /// The whole tree: names, attributes, xattrs, content.
    fn compare_all(&self) {
        let vfs = self.world.vfs();
        for (ino, node) in &self.model.nodes {
            self.compare_attr(*ino, &vfs.getattr(*ino).unwrap());
            let names = vfs.listxattr(*ino).unwrap();
            assert_eq!(names.iter().collect::<Vec<_>>(), node.xattrs.keys().collect::<Vec<_>>());
            for (name, value) in &node.xattrs {
                assert_eq!(vfs.getxattr(*ino, name).unwrap(), value);
            }
            match &node.body {
                Body::Dir(entries) => assert_eq!(&self.list(*ino), entries, "names in {ino}"),
                Body::Link(target) => assert_eq!(vfs.readlink(*ino).unwrap(), target),
                Body::File(_) => self.compare_content(*ino),
                Body::Other => {}
            }
        }
    }

    /// The local tables: all sums right, nothing left of what is gone.
    fn check_tables(&mut self) {
        let vfs = self.world.vfs();
        vfs.wait_reaped();
        vfs.commit().unwrap();
        self.committed();
        for ino in self.dead.drain(..) {
            assert_eq!(self.world.vfs().getattr(ino).map(|a| a.ino), Err(VfsError::Stale));
        }
        let stack = self.world.stack();
        let tables = check::dump(&stack.journal);
        let decoded = check::consistent(&tables, BLOCK_SIZE);
        check::fsck(&tables, &decoded, BLOCK_SIZE);
        let sealed = &self.world.replay.tables;
        check::fsck(sealed, &check::decode(sealed, BLOCK_SIZE), BLOCK_SIZE);
        check::derived(&tables, &decoded);
        let inodes: Vec<_> = decoded.inodes.keys().collect();
        assert_eq!(inodes, self.model.nodes.keys().collect::<Vec<_>>(), "inodes that exist");
        let usage = self.world.vfs().usage().unwrap();
        assert_eq!(usage.inodes, self.model.nodes.len() as u64);
        let stat = self.world.vfs().statfs().unwrap();
        assert_eq!(stat.blocks - stat.free, usage.blocks.div_ceil(8));
        let (clean, dirty) = stack.blocks.counts();
        assert_eq!(dirty, decoded.dirty.len(), "dirty blocks in memory and in the table");
        assert_eq!((clean, stack.blocks.space.clean()), check::cached(&tables), "clean blocks");
        let valid: u64 = decoded.dirty.values().map(|d| d.valid.bytes()).sum();
        if self.cut.is_none() {
            assert_eq!(stack.blocks.space.dirty(), valid, "bytes of dirty blocks");
        }
        assert_eq!(stack.vfs.pending_files(), 0);
    }

    // ---- crashing ------------------------------------------------------------------------------------------------

    fn crash(&mut self) {
        let window = self.window.take().unwrap();
        self.say("crash", format!("{} operations after a commit", window.past.len() - 1));
        self.cut = None;
        let litter = self.rng.random();
        self.world.crash(litter);
        let found = self.discover();
        self.explain(&found, &window);
        self.model = found;
        self.look_up_all();
    }

    /// The filesystem as it is, read through the vfs.
    fn discover(&self) -> Model {
        let vfs = self.world.vfs();
        let mut nodes = BTreeMap::new();
        let mut todo = vec![(Ino::ROOT, Ino::ROOT)];
        while let Some((ino, parent)) = todo.pop() {
            let attr = vfs.getattr(ino).unwrap();
            let names = vfs.listxattr(ino).unwrap();
            let xattrs =
                names.into_iter().map(|n| (n.clone(), vfs.getxattr(ino, &n).unwrap().to_vec())).collect();
            let is_dir = attr.kind == FileKind::Directory;
            let body = match attr.kind {
                FileKind::Directory => {
                    let mut entries = BTreeMap::new();
                    vfs.readdir(ino, 2, false, &mut |item| {
                        entries.insert(item.name.to_vec(), item.ino);
                        true
                    })
                    .unwrap();
                    todo.extend(entries.values().filter(|i| !nodes.contains_key(*i)).map(|i| (*i, ino)));
                    Body::Dir(entries)
                }
                FileKind::Regular => Body::File(self.content_of(ino, attr.size)),
                FileKind::Symlink => Body::Link(vfs.readlink(ino).unwrap().to_vec()),
                _ => Body::Other,
            };
            let parent = if is_dir { parent } else { Ino(0) };
            nodes.insert(ino, Node { meta: meta(&attr), xattrs, body, parent, refs: 0, opens: 0 });
        }
        Model { nodes, now: self.model.now }
    }

    fn content_of(&self, ino: Ino, size: u64) -> Content {
        let mut content = Content::default();
        content.size = size;
        let mut at = 0;
        while let Ok(data) = self.world.vfs().lseek(ino, at, Seek::Data) {
            let hole = self.world.vfs().lseek(ino, data, Seek::Hole).unwrap();
            let mut from = data;
            while from < hole {
                let bytes = self.read(ino, from, (hole - from).min(1 << 20)).unwrap();
                content.write(from, &bytes);
                from += bytes.len() as u64;
            }
            at = hole;
        }
        content
    }

    /// Whether what a crash left is a past that may be: the namespace of one moment since the last commit, and each
    /// file with attributes of one such moment and bytes of such moments.
    fn explain(&self, found: &Model, window: &Window) {
        let names = |m: &Model| -> BTreeMap<Ino, Named> {
            m.nodes
                .iter()
                .filter(|(_, n)| n.meta.nlink > 0)
                .map(|(ino, n)| {
                    let mut meta = n.meta;
                    if n.content().is_some() {
                        // A file's attributes may be of another moment, but not its links.
                        meta = Meta { nlink: meta.nlink, ..FILE };
                    }
                    (*ino, (meta, n.xattrs.clone(), n.entries().cloned()))
                })
                .collect()
        };
        let wanted = names(found);
        let moment = window.past[window.floor..].iter().position(|m| names(m) == wanted);
        let Some(moment) = moment else {
            for (i, past) in window.past.iter().enumerate().skip(window.floor) {
                eprintln!("--- against moment {i}:");
                let past = names(past);
                for ino in past.keys().chain(wanted.keys()).collect::<BTreeSet<_>>() {
                    if past.get(ino) != wanted.get(ino) {
                        eprintln!("{ino}: then {:?}\n   found {:?}", past.get(ino), wanted.get(ino));
                    }
                }
            }
            panic!("the names after the crash are those of no moment since the last commit");
        };
        let _ = moment;
        for (ino, node) in &found.nodes {
            let Some(content) = node.content() else { continue };
            let from = window.floors.get(ino).copied().unwrap_or(0);
            let in_steps = window.copied.contains(ino);
            let fits = |n: &Node| n.size() == node.size() || in_steps && n.size() > node.size();
            let pasts: Vec<&Node> = window.past[from..].iter().filter_map(|m| m.nodes.get(ino)).collect();
            assert!(
                pasts.iter().any(|n| n.meta == node.meta && fits(n)),
                "attributes of {ino} after the crash: {:?}, size {}; were: {:#?}",
                node.meta,
                node.size(),
                pasts.iter().map(|n| (n.meta, n.size())).collect::<Vec<_>>()
            );
            let contents: Vec<&Content> = pasts.iter().filter_map(|n| n.content()).collect();
            if contents.iter().any(|c| c.same(content)) {
                continue;
            }
            let pages: BTreeSet<u64> =
                contents.iter().flat_map(|c| c.pages()).chain(content.pages()).collect();
            for page in pages {
                let got = content.read(page, 4096);
                let mut known: Vec<Vec<u8>> = contents.iter().map(|c| c.read(page, 4096)).collect();
                known.iter_mut().for_each(|k| k.resize(4096, 0));
                if known.iter().any(|k| k[..got.len()] == got[..]) {
                    continue;
                }
                for (i, byte) in got.iter().enumerate() {
                    assert!(
                        known.iter().any(|k| k[i] == *byte),
                        "byte {} of {ino} is {byte} after the crash and never was",
                        page + i as u64
                    );
                }
            }
        }
    }

    // ---- operations ----------------------------------------------------------------------------------------------

    fn name(&mut self) -> Vec<u8> {
        match self.rng.random_range(0..400) {
            0 => Vec::new(),
            1 => b".".to_vec(),
            2 => b"..".to_vec(),
            3 => vec![b'x'; 255],
            4 => vec![b'x'; 256],
            5 => b"a/b".to_vec(),
            _ => NAMES.choose(&mut self.rng).unwrap().to_vec(),
        }
    }

    fn pick(&mut self, f: impl Fn(&Node) -> bool) -> Option<Ino> {
        let inos: Vec<Ino> = self.model.nodes.iter().filter(|(_, n)| f(n)).map(|(i, _)| *i).collect();
        inos.choose(&mut self.rng).copied()
    }

    fn dir(&mut self) -> Ino {
        self.pick(|n| n.refs > 0 && n.entries().is_some()).unwrap_or(Ino::ROOT)
    }

    fn any(&mut self) -> Ino {
        self.pick(|n| n.refs > 0 || n.opens > 0).unwrap_or(Ino::ROOT)
    }

    /// A regular file if there is one; now and then something else.
    fn file(&mut self) -> Ino {
        if self.once_in(50) {
            return self.any();
        }
        self.pick(|n| (n.refs > 0 || n.opens > 0) && n.content().is_some()).unwrap_or(Ino::ROOT)
    }

    fn size_of(&self, ino: Ino) -> u64 {
        self.model.nodes[&ino].content().map_or(0, |c| c.size)
    }

    /// An offset that is likely to be interesting.
    fn offset(&mut self, ino: Ino) -> u64 {
        let size = self.size_of(ino);
        match self.rng.random_range(0..20) {
            0..5 => 0,
            5..9 => size.min(4 << 20),
            9..12 => self.rng.random_range(0..8192),
            12..15 => self.rng.random_range(0..24) * BS,
            15..19 => self.rng.random_range(0..=size.clamp(1, 2 << 20)),
            _ => *[1 << 40, 5 * BS - 1, (1 << 62) + 77, i64::MAX as u64 - 100].choose(&mut self.rng).unwrap(),
        }
    }

    fn len(&mut self) -> u64 {
        match self.rng.random_range(0..20) {
            0 => 0,
            1..9 => self.rng.random_range(1..3000),
            9..13 => self.rng.random_range(1..20_000),
            13..16 => *[4096, BS, BS - 1, BS + 1, 2 * BS].choose(&mut self.rng).unwrap(),
            16..19 => self.rng.random_range(1..200_000),
            _ => self.rng.random_range(1..400_000),
        }
    }

    fn data(&mut self, len: u64) -> Vec<u8> {
        let mut data = vec![0; len as usize];
        match self.rng.random_range(0..4) {
            // Equal blocks, so that frames are shared.
            0 => data.fill(self.rng.random_range(0..3)),
            _ => self.rng.fill_bytes(&mut data),
        }
        data
    }

    fn caller(&mut self) -> Caller {
        Caller { uid: self.rng.random_range(0..3), gid: self.rng.random_range(0..3), pid: 1, umask: 0 }
    }

    fn forget_dead(&mut self, before: &[Ino]) {
        let gone: Vec<Ino> = before.iter().filter(|i| !self.model.nodes.contains_key(i)).copied().collect();
        self.dead.extend(gone);
    }

    fn operation(&mut self) {
        let many = self.model.nodes.len() > 60;
        match self.rng.random_range(0..112) {
            0..7 => self.make(if many { 3 } else { 0 }),
            7..13 => self.unlink(),
            13..16 => self.rmdir(),
            16..24 => self.rename(),
            24..27 => self.link(),
            27..44 => self.write(),
            44..56 => self.do_read(),
            56..62 => self.truncate(),
            62..67 => self.fallocate(),
            67..70 => self.lseek(),
            70..76 => self.copy(),
            76..80 => self.setattr(),
            80..84 => self.xattr(),
            84..88 => self.readdir(),
            88..93 => self.lookup(),
            93..97 => self.open(),
            97..102 => self.release(),
            102..105 => self.forget(),
            105..107 => self.getattr(),
            107..109 => self.flush(),
            109 => self.fsync(),
            110 => self.readlink(),
            _ => self.make(9),
        }
    }

    fn make(&mut self, shift: u32) {
        let (parent, name, caller) = (self.dir(), self.name(), self.caller());
        let perm = *[0o644, 0o755, 0o600, 0o2755, 0o1777].choose(&mut self.rng).unwrap();
        let kind = match self.rng.random_range(0..10) + shift {
            0..5 => FileKind::Regular,
            5..7 => FileKind::Directory,
            7..9 => FileKind::Symlink,
            9 => FileKind::Fifo,
            _ => *[FileKind::Socket, FileKind::CharDevice, FileKind::BlockDevice, FileKind::Regular]
                .choose(&mut self.rng)
                .unwrap(),
        };
        let by_mknod = kind == FileKind::Regular && self.once_in(4);
        let target: &[u8] = match self.rng.random_range(0..40) {
            0 => b"",
            1 => &[b't'; 4096],
            2 => &[b't'; 4095],
            _ => b"../some/where",
        };
        let rdev = if matches!(kind, FileKind::CharDevice | FileKind::BlockDevice) { 0x0102 } else { 0 };
        let perm = if kind == FileKind::Symlink { 0o777 } else { perm };
        self.say("make", format!("{kind:?} {name:?} in {parent}"));
        let vfs = self.world.vfs();
        let opens = kind == FileKind::Regular && !by_mknod;
        let got = match kind {
            FileKind::Regular if opens => vfs.create(parent, &name, perm, &caller),
            FileKind::Directory => vfs.mkdir(parent, &name, perm, &caller),
            FileKind::Symlink => vfs.symlink(parent, &name, target, &caller),
            kind => vfs.mknod(parent, &name, kind, perm, rdev, &caller),
        };
        let new = New { kind, perm, rdev, target: if kind == FileKind::Symlink { target } else { b"" } };
        if let Ok(attr) = &got {
            assert!(
                !self.model.nodes.contains_key(&attr.ino) && !self.dead.contains(&attr.ino),
                "a number twice"
            );
        }
        let ino = got.as_ref().ok().map(|a| a.ino);
        let expected = self.model.make(parent, &name, &new, &caller, ino);
        assert_eq!(got.as_ref().map(|_| ()).map_err(Clone::clone), expected);
        if let Ok(attr) = &got {
            if opens {
                self.model.nodes.get_mut(&attr.ino).unwrap().opens += 1;
            }
            self.compare_attr(attr.ino, attr);
            self.compare(&[attr.ino]);
        }
        self.compare(&[parent]);
    }

    fn unlink(&mut self) {
        let (parent, name) = (self.dir(), self.name());
        let ino: Vec<Ino> = self.model.find(parent, &name).into_iter().collect();
        self.say("unlink", format!("{name:?} in {parent} {ino:?}"));
        let got = self.world.vfs().unlink(parent, &name);
        assert_eq!(got, self.model.unlink(parent, &name));
        self.forget_dead(&ino);
        self.compare(&[parent]);
        self.compare(&ino);
    }

    fn rmdir(&mut self) {
        let (parent, name) = (self.dir(), self.name());
        let ino: Vec<Ino> = self.model.find(parent, &name).into_iter().collect();
        self.say("rmdir", format!("{name:?} in {parent} {ino:?}"));
        let got = self.world.vfs().rmdir(parent, &name);
        assert_eq!(got, self.model.rmdir(parent, &name));
        self.forget_dead(&ino);
        self.compare(&[parent]);
        self.compare(&ino);
    }

    fn rename(&mut self) {
        let (from, name, to, new_name) = (self.dir(), self.name(), self.dir(), self.name());
        let mode = match self.rng.random_range(0..4) {
            0 => RenameMode::Exchange,
            1 => RenameMode::NoReplace,
            _ => RenameMode::Replace,
        };
        let inos: Vec<Ino> =
            [self.model.find(from, &name), self.model.find(to, &new_name)].into_iter().flatten().collect();
        self.say("rename", format!("{name:?} in {from} to {new_name:?} in {to}, {mode:?} {inos:?}"));
        let got = self.world.vfs().rename(from, &name, to, &new_name, mode);
        assert_eq!(got, self.model.rename((from, &name), (to, &new_name), mode));
        self.forget_dead(&inos);
        self.compare(&[from, to]);
        self.compare(&inos);
        assert_eq!(self.list(to), *self.model.nodes[&to].entries().unwrap());
    }

    fn link(&mut self) {
        let (ino, parent, name) = (self.any(), self.dir(), self.name());
        if self.model.nodes[&ino].refs == 0 {
            return;
        }
        self.say("link", format!("{ino} as {name:?} in {parent}"));
        let got = self.world.vfs().link(ino, parent, &name);
        let expected = self.model.link(ino, parent, &name);
        assert_eq!(got.as_ref().map(|_| ()).map_err(Clone::clone), expected);
        if let Ok(attr) = &got {
            self.compare_attr(ino, attr);
        }
        self.compare(&[ino, parent]);
    }

    fn write(&mut self) {
        let ino = self.file();
        let (offset, len) = (self.offset(ino), self.len());
        let data = self.data(len);
        self.say("write", format!("{ino} at {offset}, {len} bytes"));
        let mut got = self.world.vfs().write(ino, offset, &data, Wait::No);
        if got == Err(VfsError::WouldBlock) {
            got = self.world.vfs().write(ino, offset, &data, Wait::Yes);
        }
        assert_eq!(got, self.model.write(ino, offset, &data));
        self.compare(&[ino]);
        if got.is_ok() && self.once_in(2) {
            self.compare_bytes(ino, offset.saturating_sub(100), len + 200);
        }
    }

    fn do_read(&mut self) {
        let ino = self.file();
        if self.model.nodes[&ino].content().is_none() {
            let got = self.read(ino, 0, 10);
            assert!(self.model.nodes[&ino].entries().is_none() || got == Err(VfsError::IsDirectory));
            return;
        }
        let (offset, len) = (self.offset(ino), self.len());
        self.say("read", format!("{ino} at {offset}, {len} bytes"));
        if self.plan.failing > 0 && self.once_in(3) {
            self.world.source.failing.store(self.plan.failing, Ordering::Relaxed);
            let got = self.read(ino, offset, len);
            self.world.source.failing.store(0, Ordering::Relaxed);
            match got {
                // Never wrong bytes.
                Ok(bytes) => {
                    let expected = self.model.nodes[&ino].content().unwrap().read(offset, len);
                    same_bytes(ino, offset, &bytes, &expected);
                }
                Err(VfsError::Io(_)) => *self.counts.entry("read fails").or_default() += 1,
                Err(e) => panic!("reading {ino}: {e:?}"),
            }
        }
        self.compare_bytes(ino, offset, len);
    }

    fn truncate(&mut self) {
        let ino = self.file();
        let size = match self.rng.random_range(0..8) {
            0 => 0,
            1 => i64::MAX as u64 + u64::from(self.once_in(2)),
            2 | 3 => self.rng.random_range(0..=self.size_of(ino).min(1 << 40)),
            _ => self.offset(ino),
        };
        let mtime = self.once_in(3).then_some(SetTime::At(Time { secs: 5, nanos: 6 }));
        let set = SetAttr { size: Some(size), mtime, ..SetAttr::default() };
        self.set(ino, &set);
        if let Some(content) = self.model.nodes[&ino].content() {
            let size = content.size;
            self.compare_bytes(ino, size.saturating_sub(3000), 5000);
        }
    }

    fn set(&mut self, ino: Ino, set: &SetAttr) {
        self.say("setattr", format!("{ino} {set:?}"));
        let got = self.world.vfs().setattr(ino, set, &Caller::default());
        let expected = self.model.setattr(ino, set);
        assert_eq!(got.as_ref().map(|_| ()).map_err(Clone::clone), expected);
        if let Ok(attr) = &got {
            self.compare_attr(ino, attr);
        }
        self.compare(&[ino]);
    }

    fn setattr(&mut self) {
        let ino = self.any();
        let time = |rng: &mut ChaCha8Rng| match rng.random_range(0..4) {
            0 => Some(SetTime::Now),
            1 => Some(SetTime::At(Time {
                secs: rng.random_range(-5..5),
                nanos: rng.random_range(0..1_000_000_000),
            })),
            _ => None,
        };
        let set = SetAttr {
            atime: time(&mut self.rng),
            mtime: time(&mut self.rng),
            perm: self.once_in(2).then(|| self.rng.random_range(0..0o10000)),
            uid: self.once_in(3).then(|| self.rng.random_range(0..5)),
            gid: self.once_in(3).then(|| self.rng.random_range(0..5)),
            ctime: self.once_in(5).then_some(Time { secs: 77, nanos: 1 }),
            size: None,
        };
        self.set(ino, &set);
    }

    fn fallocate(&mut self) {
        let ino = self.file();
        let (offset, len) = (self.offset(ino), self.len());
        let how = *[
            Fallocate::Allocate,
            Fallocate::KeepSize,
            Fallocate::PunchHole,
            Fallocate::PunchHole,
            Fallocate::ZeroRange,
            Fallocate::ZeroRangeKeepSize,
        ]
        .choose(&mut self.rng)
        .unwrap();
        self.say("fallocate", format!("{ino} {how:?} at {offset}, {len} bytes"));
        let got = self.world.vfs().fallocate(ino, how, offset, len, Wait::Yes);
        assert_eq!(got, self.model.fallocate(ino, how, offset, len));
        self.compare(&[ino]);
        if got.is_ok() {
            self.compare_bytes(ino, offset.saturating_sub(100), len + 200);
        }
    }

    fn lseek(&mut self) {
        let ino = self.file();
        let offset = self.offset(ino);
        let vfs = self.world.vfs();
        let (data, hole) = (vfs.lseek(ino, offset, Seek::Data), vfs.lseek(ino, offset, Seek::Hole));
        let Some(content) = self.model.nodes[&ino].content() else { return };
        match &data {
            Ok(at) => {
                assert!(*at >= offset && *at < content.size);
                assert!(content.is_zero(offset, *at), "data before {at}");
            }
            Err(e) => {
                assert_eq!(*e, VfsError::NoSuchOffset);
                assert!(content.is_zero(offset, content.size), "data behind {offset}");
            }
        }
        match &hole {
            Ok(at) => {
                assert!(*at >= offset && *at <= content.size);
                assert!(content.is_zero(*at, at + 1));
                assert_eq!(data == Ok(offset), *at > offset, "{offset} is data or a hole: {data:?} {hole:?}");
            }
            Err(e) => {
                assert_eq!(*e, VfsError::NoSuchOffset);
                assert!(offset >= content.size);
            }
        }
        self.say("lseek", format!("{ino} at {offset}: {data:?} {hole:?}"));
    }

    fn copy(&mut self) {
        let source = self.file();
        let target = if self.once_in(3) { source } else { self.file() };
        let (mut from, mut to, mut len) = (self.offset(source), self.offset(target), self.len());
        match self.rng.random_range(0..4) {
            0 => (from, to) = (from / BS * BS, to / BS * BS),
            1 => {
                to = to / BS * BS + from % BS;
                len *= 3;
            }
            2 => (from, to, len) = (0, 0, 2 << 20),
            _ => {}
        }
        self.say("copy", format!("{source} at {from} to {target} at {to}, {len} bytes"));
        let vfs = self.world.vfs();
        let mut got = vfs.copy_file_range(source, from, target, to, len, Wait::No);
        if got == Err(VfsError::WouldBlock) {
            got = vfs.copy_file_range(source, from, target, to, len, Wait::Yes);
        }
        let possible = self.model.can_copy((source, from), (target, to), len);
        match (&got, &possible) {
            (Ok(n), Ok(most)) => {
                assert!(n <= most && (*n > 0 || *most == 0), "{n} of {most} bytes copied");
                self.model.copy((source, from), (target, to), *n);
                if let Some(window) = &mut self.window {
                    window.copied.insert(target);
                }
                self.compare_bytes(target, to.saturating_sub(100), n + 200);
            }
            _ => assert_eq!(got, possible),
        }
        self.compare(&[source, target]);
    }

    fn xattr(&mut self) {
        let ino = self.any();
        let name: &[u8] = match self.rng.random_range(0..30) {
            0 => b"",
            1 => &[b'n'; 256],
            2 => &[b'n'; 255],
            n => [&b"user.a"[..], b"user.b", b"user.ab"][n % 3],
        };
        let vfs = self.world.vfs();
        match self.rng.random_range(0..6) {
            0 => {
                let got = vfs.getxattr(ino, name).map(|v| v.to_vec());
                let node = &self.model.nodes[&ino];
                assert_eq!(got, node.xattrs.get(name).cloned().ok_or(VfsError::NoAttribute));
            }
            1 => {
                let got = vfs.removexattr(ino, name);
                assert_eq!(got, self.model.removexattr(ino, name));
                self.say("removexattr", format!("{ino} {name:?} {got:?}"));
            }
            _ => {
                let mode =
                    *[XattrMode::Any, XattrMode::Create, XattrMode::Replace].choose(&mut self.rng).unwrap();
                let len = *[0, 10, 300, 65536, 65537].choose(&mut self.rng).unwrap();
                let len = if len > 1000 && !self.once_in(10) { 20 } else { len };
                let value = self.data(len);
                let got = self.world.vfs().setxattr(ino, name, &value, mode);
                assert_eq!(got, self.model.setxattr(ino, name, &value, mode));
                self.say("setxattr", format!("{ino} {name:?} {mode:?} {got:?}"));
            }
        }
        self.compare(&[ino]);
    }

    /// Lists a directory in pieces, with changes between them.
    fn readdir(&mut self) {
        let ino = if self.once_in(20) { self.any() } else { self.dir() };
        let plus = self.rng.random();
        self.say("readdir", format!("{ino} plus {plus}"));
        let Some(before) = self.model.nodes[&ino].entries().cloned() else {
            let got = self.world.vfs().readdir(ino, 0, plus, &mut |_| true);
            assert_eq!(got, Err(VfsError::NotDirectory));
            return;
        };
        let mut seen: Vec<(u64, Vec<u8>)> = Vec::new();
        let mut ever: BTreeSet<Vec<u8>> = before.keys().cloned().collect();
        let mut always = ever.clone();
        let mut after = 0;
        loop {
            let room = self.rng.random_range(1..5);
            let mut got = Vec::new();
            let mut full = false;
            let answer = self.world.vfs().readdir(ino, after, plus, &mut |item| {
                if got.len() == room {
                    full = true;
                    return false;
                }
                got.push((item.cookie, item.name.to_vec(), item.ino, item.kind, item.attr));
                true
            });
            assert_eq!(answer, Ok(()));
            for (cookie, name, to, kind, attr) in got {
                after = cookie;
                assert_eq!(self.model.nodes[&to].meta.kind, kind);
                match &name[..] {
                    b"." => assert_eq!((cookie, to), (1, ino)),
                    b".." => assert_eq!((cookie, to), (2, self.model.nodes[&ino].parent)),
                    _ => {
                        assert_eq!(self.model.find(ino, &name), Some(to));
                        assert_eq!(cookie, name_cookie(&name));
                        assert_eq!(attr.is_some(), plus);
                        if let Some(attr) = attr {
                            self.compare_attr(to, &attr);
                            self.model.nodes.get_mut(&to).unwrap().refs += 1;
                        }
                        seen.push((cookie, name));
                    }
                }
            }
            if !full {
                break;
            }
            // Something changes meanwhile.
            if self.once_in(2) {
                self.tick();
                match self.rng.random_range(0..3) {
                    0 => self.make(0),
                    1 => self.unlink(),
                    _ => self.rename(),
                }
                let Some(now) = self.model.nodes.get(&ino).and_then(|n| n.entries()) else { return };
                ever.extend(now.keys().cloned());
                always.retain(|n| now.contains_key(n));
            }
        }
        assert!(seen.is_sorted() && seen.windows(2).all(|w| w[0] != w[1]), "in order, each once");
        let seen: BTreeSet<Vec<u8>> = seen.into_iter().map(|s| s.1).collect();
        assert!(seen.is_subset(&ever) && always.is_subset(&seen), "listed {seen:?} of {always:?}");
    }

    fn lookup(&mut self) {
        let (parent, name) = (self.dir(), self.name());
        self.say("lookup", format!("{name:?} in {parent}"));
        let got = self.world.vfs().lookup(parent, &name);
        let expected = self.model.lookup(parent, &name);
        assert_eq!(got.as_ref().map(|a| a.ino).map_err(Clone::clone), expected);
        if let Ok(attr) = &got {
            self.compare_attr(attr.ino, attr);
        }
    }

    fn open(&mut self) {
        let ino = self.any();
        let truncate = self.once_in(6);
        self.say("open", format!("{ino} truncate {truncate}"));
        let got = self.world.vfs().open(ino, true, truncate);
        assert_eq!(got, self.model.open(ino, truncate));
        self.compare(&[ino]);
    }

    fn release(&mut self) {
        if let Some(ino) = self.pick(|n| n.opens > 0) {
            self.say("release", format!("{ino}"));
            self.world.vfs().release(ino);
            self.model.release(ino);
            self.forget_dead(&[ino]);
        }
    }

    fn forget(&mut self) {
        if let Some(ino) = self.pick(|n| n.refs > 0).filter(|i| *i != Ino::ROOT) {
            let refs = self.model.nodes[&ino].refs;
            let n = if self.once_in(2) { refs } else { self.rng.random_range(1..=refs) };
            self.say("forget", format!("{ino} {n}"));
            self.world.vfs().forget(ino, n);
            self.model.forget(ino, n);
            self.forget_dead(&[ino]);
        }
    }

    fn getattr(&mut self) {
        let ino = self.any();
        self.compare(&[ino]);
    }

    fn flush(&mut self) {
        let ino = self.any();
        self.say("flush", format!("{ino}"));
        self.world.vfs().flush(ino).unwrap();
    }

    fn fsync(&mut self) {
        let ino = self.any();
        self.say("fsync", format!("{ino}"));
        if self.model.nodes[&ino].entries().is_some() {
            self.world.vfs().fsyncdir(ino, Wait::Yes).unwrap();
        } else {
            self.world.vfs().fsync(ino, false, Wait::Yes).unwrap();
        }
        self.synced(ino);
    }

    fn readlink(&mut self) {
        let ino = self.any();
        let got = self.world.vfs().readlink(ino).map(|t| t.to_vec());
        match &self.model.nodes[&ino].body {
            Body::Link(target) => assert_eq!(got.as_ref(), Ok(target)),
            _ => assert_eq!(got, Err(VfsError::Invalid)),
        }
    }
}

const FILE: Meta = Meta {
    kind: FileKind::Regular,
    perm: 0,
    nlink: 0,
    uid: 0,
    gid: 0,
    rdev: 0,
    atime: Time { secs: 0, nanos: 0 },
    mtime: Time { secs: 0, nanos: 0 },
    ctime: Time { secs: 0, nanos: 0 },
    btime: Time { secs: 0, nanos: 0 },
};

fn same_bytes(ino: Ino, offset: u64, got: &[u8], expected: &[u8]) {
    assert_eq!(got.len(), expected.len(), "length of a read of {ino} at {offset}");
    if got != expected {
        let at = got.iter().zip(expected).position(|(a, b)| a != b).unwrap_or(0);
        panic!("byte {} of {ino} is {}, not {}", offset + at as u64, got[at], expected[at]);
    }
}
