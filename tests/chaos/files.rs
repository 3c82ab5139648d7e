//! Random operations on files, each done on the filesystem and on the model.
//!
//! Owns the choice of operations, and that a read gives the model's bytes or an error.

use mirrorfs::ids::Ino;
use mirrorfs::vfs::Vfs;
use mirrorfs::vfs::api::FileSystem;
use mirrorfs::vfs::types::{Caller, Fallocate, RenameMode, SetAttr, VfsError, Wait, XattrMode};
use rand::seq::IndexedRandom;
use rand::{Rng, RngCore};
use rand_chacha::ChaCha8Rng;

use crate::model::{Body, Model, same};

const NAMES: [&str; 7] = ["a", "b", "c", "d", "e", "f", "g"];
/// Longest file; a few blocks.
const LONGEST: usize = 300 << 10;

/// What a random operation did.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Did {
    /// It was done, or was not possible.
    Fine,
    /// Content could not be had from any replica; nothing is wrong with that while they fail.
    Unreadable,
}

/// The filesystem and its model, in step.
pub struct Files<'a> {
    pub vfs: &'a Vfs,
    pub model: &'a mut Model,
    pub rng: &'a mut ChaCha8Rng,
}

impl Files<'_> {
    /// Does one operation. Gives its name too.
    pub fn step(&mut self) -> (&'static str, Did) {
        match self.rng.random_range(0..100) {
            0..18 => ("create", self.create()),
            18..32 => ("write", self.write()),
            32..36 => ("truncate", self.truncate()),
            36..40 => ("punch", self.punch()),
            40..44 => ("copy", self.copy()),
            44..49 => ("mkdir", self.mkdir()),
            49..57 => ("remove", self.remove()),
            57..65 => ("rename", self.rename()),
            65..68 => ("link", self.link()),
            68..70 => ("symlink", self.symlink()),
            70..74 => ("attributes", self.attributes()),
            74..78 => ("fsync", self.fsync()),
            _ => ("read", self.read()),
        }
    }

    /// Runs something on the inode of a path, holding references only meanwhile.
    fn at<T>(&self, path: &str, what: impl FnOnce(Ino) -> T) -> T {
        let mut held = Vec::new();
        let mut ino = Ino::ROOT;
        for name in path.split('/').filter(|n| !n.is_empty()) {
            ino = self
                .vfs
                .lookup(ino, name.as_bytes())
                .unwrap_or_else(|e| panic!("looking up {path}: {e}"))
                .ino;
            held.push(ino);
        }
        let done = what(ino);
        held.into_iter().for_each(|ino| self.vfs.forget(ino, 1));
        done
    }

    /// A path that may be new, in some directory.
    fn path(&mut self) -> (String, String, &'static str) {
        let mut dirs = self.model.paths(|b| *b == Body::Dir);
        dirs.retain(|d| d.matches('/').count() < 3);
        dirs.push(String::new());
        let dir = dirs.choose(self.rng).unwrap().clone();
        let name = NAMES.choose(self.rng).unwrap();
        let path = if dir.is_empty() { (*name).to_owned() } else { format!("{dir}/{name}") };
        (path, dir, name)
    }

    fn pick(&mut self, is: impl Fn(&Body) -> bool) -> Option<String> {
        self.model.paths(is).choose(self.rng).cloned()
    }

    fn file(&mut self) -> Option<String> {
        self.pick(|b| matches!(b, Body::File(_)))
    }

    fn bytes(&mut self) -> Vec<u8> {
        let len = match self.rng.random_range(0..10) {
            0..5 => self.rng.random_range(1..5000),
            5..8 => self.rng.random_range(5000..70_000),
            _ => self.rng.random_range(70_000..140_000),
        };
        let mut bytes = vec![self.rng.random(); len];
        // Noise, or mostly not.
        let noise = if self.rng.random() { len } else { len / 8 };
        self.rng.fill_bytes(&mut bytes[..noise]);
        bytes
    }

    fn perm(&mut self) -> u16 {
        self.rng.random_range(0..0o1000)
    }

    fn create(&mut self) -> Did {
        let ((path, dir, name), perm, bytes) = (self.path(), self.perm(), self.bytes());
        if self.model.names.contains_key(&path) {
            return Did::Fine;
        }
        self.at(&dir, |dir| {
            let ino = self.vfs.create(dir, name.as_bytes(), perm, &Caller::default()).unwrap().ino;
            self.vfs.write(ino, 0, &bytes, Wait::Yes).unwrap();
            self.vfs.flush(ino).unwrap();
            self.vfs.release(ino);
            self.vfs.forget(ino, 1);
        });
        self.model.make(&path, Body::File(bytes), perm);
        Did::Fine
    }

    fn write(&mut self) -> Did {
        let Some(path) = self.file() else { return Did::Fine };
        let bytes = self.bytes();
        let at = self.rng.random_range(0..=self.model.data(&path).len() + 3000).min(LONGEST - bytes.len());
        let done = self.at(&path, |ino| self.vfs.write(ino, at as u64, &bytes, Wait::Yes));
        assert_eq!(done, Ok(bytes.len() as u32), "writing {path}");
        let data = self.model.data(&path);
        if data.len() < at + bytes.len() {
            data.resize(at + bytes.len(), 0);
        }
        data[at..at + bytes.len()].copy_from_slice(&bytes);
        Did::Fine
    }

    fn truncate(&mut self) -> Did {
        let Some(path) = self.file() else { return Did::Fine };
        let size = self.rng.random_range(0..=(self.model.data(&path).len() + 5000).min(LONGEST));
        let set = SetAttr { size: Some(size as u64), ..SetAttr::default() };
        match self.at(&path, |ino| self.vfs.setattr(ino, &set, &Caller::default())) {
            Ok(attr) => assert_eq!(attr.size, size as u64),
            Err(e) => panic!("truncating {path} to {size}: {e}"),
        }
        self.model.data(&path).resize(size, 0);
        Did::Fine
    }

    fn punch(&mut self) -> Did {
        let Some(path) = self.file() else { return Did::Fine };
        let len = self.model.data(&path).len();
        let from = self.rng.random_range(0..=len);
        let n = self.rng.random_range(1..100_000);
        let done = self
            .at(&path, |ino| self.vfs.fallocate(ino, Fallocate::PunchHole, from as u64, n as u64, Wait::Yes));
        assert_eq!(done, Ok(()), "punching {path}");
        self.model.data(&path)[from..(from + n).min(len)].fill(0);
        Did::Fine
    }

    fn copy(&mut self) -> Did {
        let (Some(from), Some(to)) = (self.file(), self.file()) else { return Did::Fine };
        let source = self.model.data(&from).clone();
        let n = self.rng.random_range(0..=source.len());
        if n == 0 || self.model.names[&from] == self.model.names[&to] {
            return Did::Fine;
        }
        let done = self.at(&from, |from| {
            self.at(&to, |to| self.vfs.copy_file_range(from, 0, to, 0, n as u64, Wait::Yes))
        });
        match done {
            Ok(n) => {
                let (n, data) = (n as usize, self.model.data(&to));
                data.resize(data.len().max(n), 0);
                data[..n].copy_from_slice(&source[..n]);
                Did::Fine
            }
            Err(VfsError::Io(_)) => Did::Unreadable,
            Err(e) => panic!("copying {from} to {to}: {e}"),
        }
    }

    fn mkdir(&mut self) -> Did {
        let ((path, dir, name), perm) = (self.path(), self.perm());
        if !self.model.names.contains_key(&path) {
            self.at(&dir, |dir| {
                let made = self.vfs.mkdir(dir, name.as_bytes(), perm, &Caller::default()).unwrap();
                self.vfs.forget(made.ino, 1);
            });
            self.model.make(&path, Body::Dir, perm);
        }
        Did::Fine
    }

    fn symlink(&mut self) -> Did {
        let (path, dir, name) = self.path();
        if !self.model.names.contains_key(&path) {
            self.at(&dir, |dir| {
                let made = self.vfs.symlink(dir, name.as_bytes(), b"to/where", &Caller::default()).unwrap();
                self.vfs.forget(made.ino, 1);
            });
            self.model.make(&path, Body::Link(b"to/where".to_vec()), 0o777);
        }
        Did::Fine
    }

    fn link(&mut self) -> Did {
        let (path, dir, name) = self.path();
        let Some(file) = self.file().filter(|_| !self.model.names.contains_key(&path)) else {
            return Did::Fine;
        };
        self.at(&file, |ino| {
            self.at(&dir, |dir| {
                self.vfs.link(ino, dir, name.as_bytes()).unwrap();
                self.vfs.forget(ino, 1);
            });
        });
        self.model.link(&file, &path);
        Did::Fine
    }

    fn remove(&mut self) -> Did {
        let Some(path) = self.pick(|_| true).filter(|p| !self.model.has_children(p)) else {
            return Did::Fine;
        };
        let (dir, name) = path.rsplit_once('/').unwrap_or(("", &path));
        let is_dir = self.model.node(&path).body == Body::Dir;
        let done = self.at(dir, |dir| match is_dir {
            true => self.vfs.rmdir(dir, name.as_bytes()),
            false => self.vfs.unlink(dir, name.as_bytes()),
        });
        assert_eq!(done, Ok(()), "removing {path}");
        self.model.remove(&path);
        Did::Fine
    }

    fn rename(&mut self) -> Did {
        let (to, to_dir, to_name) = self.path();
        let Some(from) = self.pick(|_| true) else { return Did::Fine };
        let is_dir = |m: &Model, p: &str| m.node(p).body == Body::Dir;
        let into_itself = to == from || to.starts_with(&format!("{from}/"));
        let replaces = self.model.names.contains_key(&to);
        if into_itself
            || replaces
                && (is_dir(self.model, &to) != is_dir(self.model, &from) || self.model.has_children(&to))
        {
            return Did::Fine;
        }
        let (from_dir, from_name) = from.rsplit_once('/').unwrap_or(("", &from));
        let done = self.at(from_dir, |old| {
            self.at(&to_dir, |new| {
                self.vfs.rename(old, from_name.as_bytes(), new, to_name.as_bytes(), RenameMode::Replace)
            })
        });
        assert_eq!(done, Ok(()), "renaming {from} to {to}");
        self.model.rename(&from, &to);
        Did::Fine
    }

    fn attributes(&mut self) -> Did {
        let Some(path) = self.pick(|b| !matches!(b, Body::Link(_))) else { return Did::Fine };
        let perm = self.perm();
        let value = vec![7; self.rng.random_range(0..200)];
        self.at(&path, |ino| {
            let set = SetAttr { perm: Some(perm), ..SetAttr::default() };
            self.vfs.setattr(ino, &set, &Caller::default()).unwrap();
            self.vfs.setxattr(ino, b"user.x", &value, XattrMode::Any).unwrap();
        });
        let node = self.model.node_mut(&path);
        node.perm = perm;
        node.xattrs.insert(b"user.x".to_vec(), value);
        Did::Fine
    }

    fn fsync(&mut self) -> Did {
        if let Some(path) = self.file() {
            let done = self.at(&path, |ino| self.vfs.fsync(ino, false, Wait::Yes));
            assert_eq!(done, Ok(()), "syncing {path}");
        }
        Did::Fine
    }

    fn read(&mut self) -> Did {
        let Some(path) = self.file() else { return Did::Fine };
        let len = self.model.data(&path).len();
        let from = self.rng.random_range(0..=len);
        let n = self.rng.random_range(1..150_000);
        match self.at(&path, |ino| self.vfs.read(ino, from as u64, n as u32, Wait::Yes)) {
            Ok(bytes) => {
                same(&path, from as u64, &bytes, &self.model.data(&path)[from..(from + n).min(len)]);
                Did::Fine
            }
            Err(VfsError::Io(_)) => Did::Unreadable,
            Err(e) => panic!("reading {path}: {e}"),
        }
    }

    /// Files that no model knows, which a kill may or may not leave.
    pub fn junk(&mut self) {
        for i in 0..self.rng.random_range(1..4) {
            let (name, bytes) = (format!("junk-{i}"), self.bytes());
            let ino = self.vfs.create(Ino::ROOT, name.as_bytes(), 0o644, &Caller::default()).unwrap().ino;
            self.vfs.write(ino, 0, &bytes, Wait::Yes).unwrap();
            self.vfs.release(ino);
            self.vfs.forget(ino, 1);
        }
    }

    /// Removes what of them is left.
    pub fn remove_junk(&mut self) {
        for i in 0..4 {
            match self.vfs.unlink(Ino::ROOT, format!("junk-{i}").as_bytes()) {
                Ok(()) | Err(VfsError::NotFound) => {}
                Err(e) => panic!("removing junk: {e}"),
            }
        }
    }
}
