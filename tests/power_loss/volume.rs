//! The volume that is found after a power loss: opened without a mount, read as a whole, written to.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use mirrorfs::config::{Config, Env, Layer, Raw};
use mirrorfs::daemon::{Core, CoreOptions};
use mirrorfs::ids::Ino;
use mirrorfs::vfs::Vfs;
use mirrorfs::vfs::api::FileSystem;
use mirrorfs::vfs::types::{Caller, FileKind, VfsError, Wait};
use tokio::runtime::Runtime;

use crate::SEGMENT;
use crate::oracle::{Body, Found, Tree};

/// No opening takes longer.
const PATIENCE: Duration = Duration::from_secs(60);

/// How to open it.
#[derive(Clone, Debug)]
pub struct Open {
    pub state: PathBuf,
    pub replicas: Vec<PathBuf>,
    pub read_only: bool,
    pub cache: &'static str,
}

/// Opens the volume; the error as text.
pub fn open(runtime: &Runtime, how: &Open) -> Result<Core, String> {
    let mut flags = Layer::default();
    flags.set("state", how.state.to_str().unwrap(), "test");
    flags.set("block_size", "64KiB", "test");
    flags.set("cache_size", how.cache, "test");
    flags.set("commit_interval", "300ms", "test");
    flags.set("free_space_ratio", "0", "test");
    flags.set("read_timeout", "1s", "test");
    flags.set("read_only", if how.read_only { "true" } else { "false" }, "test");
    for replica in &how.replicas {
        let name = replica.file_name().unwrap().to_str().unwrap();
        flags.add_replica(&format!("{name}={}", replica.display()), "test", Path::new("/"));
    }
    let raw = Raw { flags, ..Raw::default() };
    let config = Config::load(&raw, &Env { vars: BTreeMap::new(), cwd: "/".into() }).unwrap();
    let late = async { tokio::time::sleep(PATIENCE).await };
    let options = CoreOptions { segments_of: SEGMENT, ..CoreOptions::default() };
    Core::open(&config, runtime, options, late).map_err(|e| e.to_string())
}

/// The trees of all folders at the top.
pub fn read(vfs: &Vfs) -> Result<BTreeMap<String, Tree>, String> {
    let mut all = BTreeMap::new();
    for (name, ino, kind) in list(vfs, Ino::ROOT)? {
        let mut tree = Tree::new();
        read_below(vfs, String::new(), (Ino::ROOT, &name), ino, kind, &mut tree)?;
        all.insert(name, tree);
    }
    Ok(all)
}

fn list(vfs: &Vfs, dir: Ino) -> Result<Vec<(String, Ino, FileKind)>, String> {
    let (mut names, mut after) = (Vec::new(), 0);
    loop {
        let mut more = false;
        vfs.readdir(dir, after, false, &mut |item| {
            (more, after) = (true, item.cookie);
            if item.name != b"." && item.name != b".." {
                names.push((String::from_utf8_lossy(item.name).into_owned(), item.ino, item.kind));
            }
            true
        })
        .map_err(|e| format!("listing {dir}: {e}"))?;
        if !more {
            return Ok(names);
        }
    }
}

fn read_below(
    vfs: &Vfs,
    path: String,
    (parent, name): (Ino, &str),
    ino: Ino,
    kind: FileKind,
    tree: &mut Tree,
) -> Result<(), String> {
    let attr = vfs.lookup(parent, name.as_bytes()).map_err(|e| format!("{path}: {e}"))?;
    if attr.ino != ino {
        return Err(format!("{path} is {} in its directory's list, but leads to {}", ino, attr.ino));
    }
    let body = match kind {
        FileKind::Directory => {
            for (name, child, kind) in list(vfs, ino)? {
                let below = if path.is_empty() { name.clone() } else { format!("{path}/{name}") };
                read_below(vfs, below, (ino, &name), child, kind, tree)?;
            }
            Body::Dir
        }
        FileKind::Symlink => {
            let target = vfs.readlink(ino).map_err(|e| format!("{path}: {e}"))?;
            Body::Link(String::from_utf8_lossy(&target).into_owned())
        }
        _ => match content(vfs, ino, attr.size) {
            Ok(bytes) => Body::File(bytes),
            Err(e) => Body::Unread(e),
        },
    };
    let xattr = match vfs.getxattr(ino, b"user.mark") {
        Ok(value) => Some(value.to_vec()),
        Err(VfsError::NoAttribute) => None,
        Err(e) => return Err(format!("{path}: its attribute: {e}")),
    };
    vfs.forget(ino, 1);
    let time = i128::from(attr.mtime.secs) * 1_000_000_000 + i128::from(attr.mtime.nanos);
    tree.insert(path, Found { ino: ino.0, mode: attr.perm.into(), time, xattr, body });
    Ok(())
}

fn content(vfs: &Vfs, ino: Ino, size: u64) -> Result<Vec<u8>, String> {
    let mut all = Vec::new();
    while (all.len() as u64) < size {
        let piece = vfs.read(ino, all.len() as u64, 1 << 20, Wait::Yes).map_err(|e| e.to_string())?;
        if piece.is_empty() {
            return Err(format!("it ends at {} of {size}", all.len()));
        }
        all.extend_from_slice(&piece);
    }
    Ok(all)
}

/// A new file at the top, fsynced.
pub fn write_synced(vfs: &Vfs, name: &str, bytes: &[u8]) -> Result<(), VfsError> {
    let ino = vfs.create(Ino::ROOT, name.as_bytes(), 0o644, &Caller::default())?.ino;
    let done = vfs.write(ino, 0, bytes, Wait::Yes).and_then(|_| vfs.fsync(ino, false, Wait::Yes));
    vfs.release(ino);
    vfs.forget(ino, 1);
    done
}
