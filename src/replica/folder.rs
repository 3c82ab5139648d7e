//! A local folder as an object store that notices when the folder itself is gone.
//!
//! Owns the rule that a replica's folder is made only on purpose ([`Folder::prepare`]): when its
//! disk is not mounted, writes fail with a clear error instead of filling the mountpoint beneath.
//! Objects are read, written and listed in `beneath`, which follows no link; object_store's local
//! store writes those that come in parts, and deletes.

use std::fmt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path as FsPath, PathBuf};
use std::sync::{Arc, OnceLock};

use async_trait::async_trait;
use bytes::Bytes;
use futures::stream::BoxStream;
use futures::{FutureExt, StreamExt, TryStreamExt};
use object_store::local::LocalFileSystem;
use object_store::path::Path;
use object_store::{
    CopyOptions, GetOptions, GetResult, GetResultPayload, ListResult, MultipartUpload, ObjectMeta,
    ObjectStore, PutMode, PutMultipartOptions, PutOptions, PutPayload, PutResult, RenameOptions, Result,
};

use self::beneath::Refused;
use super::error::{Classed, ErrorKind};
use crate::private;

mod beneath;

/// A folder that holds a replica.
#[derive(Clone, Debug)]
pub(super) struct Folder(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    root: PathBuf,
    /// The store and the filesystem that the folder was on when it was first used.
    opened: OnceLock<(Arc<LocalFileSystem>, Filesystem)>,
}

/// Which filesystem something lies on, told apart also after a restart. Displays as text that
/// parses back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Filesystem {
    /// Device number: may change when disks are found in another order.
    dev: u64,
    /// What the filesystem says of itself; 0 when it says nothing. ext4 and btrfs derive it from
    /// their UUID.
    id: u64,
}

impl Filesystem {
    fn of(path: &FsPath, meta: &std::fs::Metadata) -> std::io::Result<Self> {
        Ok(Self { dev: meta.dev(), id: rustix::fs::statvfs(path)?.f_fsid })
    }

    /// Whether both are the same filesystem.
    pub fn same(self, other: Self) -> bool {
        if self.id != 0 && other.id != 0 { self.id == other.id } else { self.dev == other.dev }
    }
}

impl fmt::Display for Filesystem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:x}:{:x}", self.dev, self.id)
    }
}

impl std::str::FromStr for Filesystem {
    type Err = ();

    fn from_str(text: &str) -> std::result::Result<Self, ()> {
        let (dev, id) = text.split_once(':').ok_or(())?;
        let hex = |text| u64::from_str_radix(text, 16).map_err(|_| ());
        Ok(Self { dev: hex(dev)?, id: hex(id)? })
    }
}

/// Where a replica's folder lies, or would lie.
#[derive(Clone, Debug)]
pub(super) struct Seat {
    /// The folder.
    pub root: PathBuf,
    /// Whether it is there.
    pub exists: bool,
    /// The filesystem of the folder, or of the nearest one above it that is there.
    pub filesystem: Filesystem,
}

impl Seat {
    /// Looks. Blocking.
    pub fn look(root: &FsPath) -> std::io::Result<Self> {
        let mut at = root;
        loop {
            match (std::fs::metadata(at), at.parent()) {
                (Ok(meta), _) => {
                    let filesystem = Filesystem::of(at, &meta)?;
                    return Ok(Self { root: root.to_owned(), exists: at == root, filesystem });
                }
                (Err(e), Some(parent)) if e.kind() == std::io::ErrorKind::NotFound => at = parent,
                (Err(e), _) => return Err(e),
            }
        }
    }
}

impl Folder {
    /// The folder at `root`, an absolute path; it need not exist yet.
    pub fn new(root: PathBuf) -> Self {
        Self(Arc::new(Inner { root, opened: OnceLock::new() }))
    }

    /// Makes the folder and those above it, durably and for their owner only.
    pub fn prepare(root: &FsPath) -> std::io::Result<()> {
        private::create_dir_all(root)?;
        let mut dir = Some(root);
        // A few levels up is where new entries can be; syncing one that is old costs nothing.
        for _ in 0..4 {
            let Some(d) = dir else { break };
            if let Ok(f) = std::fs::File::open(d) {
                let _ = f.sync_all();
            }
            dir = d.parent();
        }
        Ok(())
    }

    /// The local store, when the folder is there. Asked on a blocking thread: a dead network mount
    /// hangs for long.
    async fn store(&self, path: &Path) -> Result<Arc<LocalFileSystem>> {
        let (inner, path) = (Arc::clone(&self.0), path.clone());
        tokio::task::spawn_blocking(move || inner.store(&path)).await?
    }

    /// As [`Folder::store`] for reading: a folder that never was there holds nothing.
    async fn reading(&self, path: &Path) -> Result<Arc<LocalFileSystem>> {
        let (inner, path) = (Arc::clone(&self.0), path.clone());
        tokio::task::spawn_blocking(move || inner.reading(&path)).await?
    }

    /// Sees that an object's folder lies in the replica, before object_store's local store, which
    /// follows links, works there.
    async fn within(&self, at: &Path, make: bool) -> Result<()> {
        let (root, object) = (self.0.root.clone(), at.clone());
        let look = move || beneath::folder_of(&root, object.as_ref(), make).map(|_| ());
        tokio::task::spawn_blocking(look).await?.map_err(|e| refused(at, e))
    }

    /// The objects below `prefix` whose paths come after `offset`, or the one error that stands for
    /// them; nothing at all when the folder is absent.
    fn listing(self, prefix: Option<Path>, offset: Option<Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        let list = async move {
            let at = prefix.unwrap_or_default();
            self.reading(&Path::default()).await?;
            let (root, below) = (self.0.root.clone(), at.clone());
            let found = tokio::task::spawn_blocking(move || beneath::list(&root, below.as_ref())).await?;
            found.map_err(|e| refused(&at, e))
        };
        let stream = async move {
            let found = match list.await {
                Ok(found) => found,
                Err(object_store::Error::NotFound { .. }) => Vec::new(),
                Err(e) => return futures::stream::once(async { Err(e) }).boxed(),
            };
            let objects = found.into_iter().map(|listed| ObjectMeta {
                location: Path::parse(&listed.path).unwrap_or_else(|_| Path::from(listed.path.as_str())),
                last_modified: listed.modified.into(),
                size: listed.len,
                e_tag: Some(listed.tag),
                version: None,
            });
            let later = objects.filter(move |o| offset.as_ref().is_none_or(|offset| o.location > *offset));
            futures::stream::iter(later.map(Ok).collect::<Vec<_>>()).boxed()
        };
        stream.flatten_stream().boxed()
    }
}

impl Inner {
    fn store(&self, path: &Path) -> Result<Arc<LocalFileSystem>> {
        let fail = |kind, detail: String| Err(Classed { kind, detail }.into_object_store(path));
        let meta = match std::fs::metadata(&self.root) {
            Ok(meta) if meta.is_dir() => meta,
            Ok(_) => return fail(ErrorKind::Config, format!("{} is not a folder", self.root.display())),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                let text = format!(
                    "the folder {} does not exist: is its disk mounted? `mirrorfs init` makes it",
                    self.root.display()
                );
                return fail(ErrorKind::Config, text);
            }
            Err(e) => {
                return Err(object_store::Error::Generic { store: "folder", source: Box::new(e) });
            }
        };
        let filesystem = || {
            let of = Filesystem::of(&self.root, &meta);
            of.map_err(|e| object_store::Error::Generic { store: "folder", source: Box::new(e) })
        };
        if let Some((store, before)) = self.opened.get() {
            if before.dev != meta.dev() && !before.same(filesystem()?) {
                let text = format!(
                    "{} is on another filesystem than before: is its disk mounted?",
                    self.root.display()
                );
                return fail(ErrorKind::Config, text);
            }
            return Ok(Arc::clone(store));
        }
        let filesystem = filesystem()?;
        let store =
            LocalFileSystem::new_with_prefix(&self.root)?.with_fsync(true).with_automatic_cleanup(true);
        Ok(Arc::clone(&self.opened.get_or_init(|| (Arc::new(store), filesystem)).0))
    }

    fn reading(&self, path: &Path) -> Result<Arc<LocalFileSystem>> {
        if matches!(std::fs::symlink_metadata(&self.root), Err(e) if e.kind() == std::io::ErrorKind::NotFound)
            && self.opened.get().is_none()
        {
            let detail = format!("the folder {} does not exist", self.root.display());
            return Err(Classed { kind: ErrorKind::Absent, detail }.into_object_store(path));
        }
        self.store(path)
    }
}

/// What the backend reports where something below the folder is refused.
fn refused(at: &Path, why: Refused) -> object_store::Error {
    let (path, kind) = (at.to_string(), ErrorKind::Config);
    match why {
        Refused::Io(e) if e.kind() == std::io::ErrorKind::NotFound => {
            object_store::Error::NotFound { path, source: Box::new(e) }
        }
        Refused::Io(e) if e.kind() == std::io::ErrorKind::AlreadyExists => {
            object_store::Error::AlreadyExists { path, source: Box::new(e) }
        }
        Refused::Io(e) => object_store::Error::Generic { store: "folder", source: Box::new(e) },
        Refused::NoFolder(detail) => Classed { kind, detail }.into_object_store(at),
        // As good as damaged: it is written again from where it is right.
        Refused::NoFile(detail) => Classed { kind: ErrorKind::Corrupt, detail }.into_object_store(at),
    }
}

/// Opens an object as the answer to a request. Blocking.
fn get(root: &FsPath, at: &Path, options: &GetOptions) -> Result<GetResult> {
    let (file, found) = beneath::open(root, at.as_ref()).map_err(|e| refused(at, e))?;
    let failed = |e: std::io::Error| object_store::Error::Generic { store: "folder", source: Box::new(e) };
    let meta = ObjectMeta {
        location: at.clone(),
        last_modified: found.modified().map_err(failed)?.into(),
        size: found.len(),
        e_tag: Some(beneath::tag(&found)),
        version: None,
    };
    options.check_preconditions(&meta)?;
    let range = match &options.range {
        Some(range) => range
            .as_range(meta.size)
            .map_err(|e| object_store::Error::Generic { store: "folder", source: Box::new(e) })?,
        None => 0..meta.size,
    };
    Ok(GetResult {
        payload: GetResultPayload::File(file, root.join(at.as_ref())),
        meta,
        range,
        attributes: Default::default(),
        extensions: Default::default(),
    })
}

impl fmt::Display for Folder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "folder {}", self.0.root.display())
    }
}

#[async_trait]
#[deny(clippy::missing_trait_methods)]
impl ObjectStore for Folder {
    async fn put_opts(&self, at: &Path, payload: PutPayload, opts: PutOptions) -> Result<PutResult> {
        let store = self.store(at).await?;
        let new = match opts.mode {
            PutMode::Create => true,
            PutMode::Overwrite => false,
            PutMode::Update(_) => {
                self.within(at, true).await?;
                return store.put_opts(at, payload, opts).await;
            }
        };
        if !opts.attributes.is_empty() {
            self.within(at, true).await?;
            return store.put_opts(at, payload, opts).await;
        }
        let bytes = match payload.as_ref() {
            [bytes] => bytes.clone(),
            pieces => pieces.concat().into(),
        };
        let (root, object) = (self.0.root.clone(), at.clone());
        let put = move || beneath::put(&root, object.as_ref(), &bytes, new);
        let tag = tokio::task::spawn_blocking(put).await?.map_err(|e| refused(at, e))?;
        Ok(PutResult { e_tag: Some(tag), version: None, extensions: Default::default() })
    }

    async fn put_multipart_opts(
        &self,
        at: &Path,
        opts: PutMultipartOptions,
    ) -> Result<Box<dyn MultipartUpload>> {
        let store = self.store(at).await?;
        self.within(at, true).await?;
        store.put_multipart_opts(at, opts).await
    }

    async fn get_opts(&self, at: &Path, options: GetOptions) -> Result<GetResult> {
        self.reading(at).await?;
        let (root, at) = (self.0.root.clone(), at.clone());
        tokio::task::spawn_blocking(move || get(&root, &at, &options)).await?
    }

    async fn get_ranges(&self, at: &Path, ranges: &[std::ops::Range<u64>]) -> Result<Vec<Bytes>> {
        let mut found = Vec::with_capacity(ranges.len());
        for range in ranges {
            let options = GetOptions { range: Some(range.clone().into()), ..GetOptions::new() };
            found.push(self.get_opts(at, options).await?.bytes().await?);
        }
        Ok(found)
    }

    fn delete_stream(&self, paths: BoxStream<'static, Result<Path>>) -> BoxStream<'static, Result<Path>> {
        let this = self.clone();
        let stream = async move {
            match this.store(&Path::default()).await {
                Ok(store) => {
                    let checked = paths.and_then(move |at| {
                        let this = this.clone();
                        async move { this.within(&at, false).await.map(|()| at) }
                    });
                    store.delete_stream(checked.boxed())
                }
                Err(e) => futures::stream::once(async { Err(e) }).boxed(),
            }
        };
        stream.flatten_stream().boxed()
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        self.clone().listing(prefix.cloned(), None)
    }

    fn list_with_offset(
        &self,
        prefix: Option<&Path>,
        offset: &Path,
    ) -> BoxStream<'static, Result<ObjectMeta>> {
        self.clone().listing(prefix.cloned(), Some(offset.clone()))
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        let all: Vec<ObjectMeta> = self.list(prefix).try_collect().await?;
        let mut found =
            ListResult { common_prefixes: Vec::new(), objects: Vec::new(), extensions: Default::default() };
        let base = prefix.cloned().unwrap_or_default();
        for object in all {
            let mut parts = object.location.prefix_match(&base).into_iter().flatten();
            match (parts.next(), parts.next()) {
                (Some(folder), Some(_)) => {
                    let folder = base.clone().join(folder);
                    if !found.common_prefixes.contains(&folder) {
                        found.common_prefixes.push(folder);
                    }
                }
                _ => found.objects.push(object.clone()),
            }
        }
        found.common_prefixes.sort_unstable();
        Ok(found)
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        let store = self.store(to).await?;
        self.within(from, false).await?;
        self.within(to, true).await?;
        store.copy_opts(from, to, options).await
    }

    async fn rename_opts(&self, from: &Path, to: &Path, options: RenameOptions) -> Result<()> {
        let store = self.store(to).await?;
        self.within(from, false).await?;
        self.within(to, true).await?;
        store.rename_opts(from, to, options).await
    }
}
