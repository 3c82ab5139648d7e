//! What the filesystem must hold, by path; and pictures of what one does hold.
//!
//! Knows names, content, permissions and attributes; nothing of replicas. Owns the comparison.

use std::collections::BTreeMap;

use mirrorfs::ids::Ino;
use mirrorfs::vfs::Vfs;
use mirrorfs::vfs::api::FileSystem;
use mirrorfs::vfs::types::{Attr, FileKind, VfsError, Wait};

/// What an inode is.
#[derive(Clone, Debug, PartialEq)]
pub enum Body {
    File(Vec<u8>),
    Dir,
    Link(Vec<u8>),
}

/// What an inode must be.
#[derive(Clone, Debug, PartialEq)]
pub struct Node {
    pub body: Body,
    pub perm: u16,
    pub xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
}

/// The whole tree: paths (`a/b`; the root is empty) to inodes, of which one may have several names.
#[derive(Clone, Debug, Default)]
pub struct Model {
    pub names: BTreeMap<String, u64>,
    pub nodes: BTreeMap<u64, Node>,
    next: u64,
}

impl Model {
    pub fn make(&mut self, path: &str, body: Body, perm: u16) {
        self.next += 1;
        self.nodes.insert(self.next, Node { body, perm, xattrs: BTreeMap::new() });
        self.names.insert(path.to_owned(), self.next);
    }

    pub fn node(&self, path: &str) -> &Node {
        &self.nodes[&self.names[path]]
    }

    pub fn node_mut(&mut self, path: &str) -> &mut Node {
        self.nodes.get_mut(&self.names[path]).unwrap()
    }

    pub fn data(&mut self, path: &str) -> &mut Vec<u8> {
        match &mut self.node_mut(path).body {
            Body::File(data) => data,
            other => panic!("{path} is {other:?}"),
        }
    }

    pub fn remove(&mut self, path: &str) {
        let id = self.names.remove(path).unwrap();
        if !self.names.values().any(|n| *n == id) {
            self.nodes.remove(&id);
        }
    }

    pub fn link(&mut self, from: &str, to: &str) {
        self.names.insert(to.to_owned(), self.names[from]);
    }

    /// Moves a name and all below it; what was at `to` is replaced.
    pub fn rename(&mut self, from: &str, to: &str) {
        if self.names.contains_key(to) {
            if self.names[to] == self.names[from] {
                return;
            }
            self.remove(to);
        }
        let below = format!("{from}/");
        let moved: Vec<String> =
            self.names.keys().filter(|k| *k == from || k.starts_with(&below)).cloned().collect();
        for name in moved {
            let id = self.names.remove(&name).unwrap();
            self.names.insert(format!("{to}{}", &name[from.len()..]), id);
        }
    }

    /// Paths whose inodes are of this kind.
    pub fn paths(&self, is: impl Fn(&Body) -> bool) -> Vec<String> {
        self.names.iter().filter(|(_, id)| is(&self.nodes[id].body)).map(|(p, _)| p.clone()).collect()
    }

    pub fn has_children(&self, path: &str) -> bool {
        let below = format!("{path}/");
        self.names.range(below.clone()..).next().is_some_and(|(k, _)| k.starts_with(&below))
    }

    /// Fails, with words, where a picture shows something else.
    pub fn assert_shown(&self, picture: &Picture) {
        let (names, shown): (Vec<_>, Vec<_>) = (self.names.keys().collect(), picture.0.keys().collect());
        assert_eq!(names, shown, "names");
        for (path, entry) in &picture.0 {
            let node = self.node(path);
            assert_eq!(entry.attr.perm, node.perm, "permissions of {path}");
            assert_eq!(entry.xattrs, node.xattrs, "attributes of {path}");
            match (&node.body, entry.attr.kind) {
                (Body::Dir, FileKind::Directory) => {}
                (Body::Link(bytes), FileKind::Symlink) => assert_eq!(&entry.bytes, bytes, "{path}"),
                (Body::File(bytes), FileKind::Regular) => same(path, 0, &entry.bytes, bytes),
                (body, kind) => panic!("{path} is {kind:?} and not {body:?}"),
            }
            if entry.attr.kind != FileKind::Directory {
                let links = self.names.values().filter(|id| **id == self.names[path]).count();
                assert_eq!(entry.attr.nlink as usize, links, "links of {path}");
            }
        }
    }
}

/// Fails, with words, where bytes from `offset` of a file on differ.
pub fn same(path: &str, offset: u64, got: &[u8], expected: &[u8]) {
    if got != expected {
        let at = got.iter().zip(expected).position(|(a, b)| a != b);
        panic!(
            "WRONG BYTES in {path} from {offset} on: {} of {} bytes, the first difference at {at:?}",
            got.len(),
            expected.len()
        );
    }
}

/// One name in a picture.
#[derive(Clone, Debug, PartialEq)]
pub struct Entry {
    pub attr: Attr,
    pub xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    /// Content, or a link's target.
    pub bytes: Vec<u8>,
}

/// All that a filesystem shows.
#[derive(Clone, Debug, PartialEq, Default)]
pub struct Picture(pub BTreeMap<String, Entry>);

impl Picture {
    /// Looks at everything.
    pub fn take(vfs: &Vfs) -> Result<Self, VfsError> {
        let mut picture = Self::default();
        picture.add(vfs, Ino::ROOT, "")?;
        Ok(picture)
    }

    fn add(&mut self, vfs: &Vfs, dir: Ino, prefix: &str) -> Result<(), VfsError> {
        let mut names = Vec::new();
        vfs.readdir(dir, 0, false, &mut |item| {
            names.push(String::from_utf8_lossy(item.name).into_owned());
            true
        })?;
        for name in names.into_iter().filter(|n| n != "." && n != "..") {
            let attr = vfs.lookup(dir, name.as_bytes())?;
            let path = if prefix.is_empty() { name } else { format!("{prefix}/{name}") };
            let added = self.entry(vfs, &attr, &path);
            vfs.forget(attr.ino, 1);
            added?;
        }
        Ok(())
    }

    fn entry(&mut self, vfs: &Vfs, attr: &Attr, path: &str) -> Result<(), VfsError> {
        let mut xattrs = BTreeMap::new();
        for name in vfs.listxattr(attr.ino)? {
            let value = vfs.getxattr(attr.ino, &name)?.to_vec();
            xattrs.insert(name, value);
        }
        let bytes = match attr.kind {
            FileKind::Regular => {
                vfs.read(attr.ino, 0, u32::try_from(attr.size).unwrap(), Wait::Yes)?.to_vec()
            }
            FileKind::Symlink => vfs.readlink(attr.ino)?.to_vec(),
            _ => Vec::new(),
        };
        // Who references an inode, and how much of it is where, is of this machine only.
        let attr = Attr { blocks: 0, ..*attr };
        self.0.insert(path.to_owned(), Entry { attr, xattrs, bytes });
        if attr.kind == FileKind::Directory {
            self.add(vfs, attr.ino, path)?;
        }
        Ok(())
    }

    /// Fails, with words, where another picture shows something else.
    pub fn assert_same(&self, other: &Self, what: &str) {
        let (a, b): (Vec<_>, Vec<_>) = (self.0.keys().collect(), other.0.keys().collect());
        assert_eq!(a, b, "{what}: names");
        for (path, entry) in &self.0 {
            let found = &other.0[path];
            same(&format!("{path} ({what})"), 0, &found.bytes, &entry.bytes);
            assert_eq!((&found.attr, &found.xattrs), (&entry.attr, &entry.xattrs), "{what}: {path}");
        }
    }
}
