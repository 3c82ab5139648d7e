//! A local folder as an object store that notices when the folder itself is gone.
//!
//! Owns the rule that a replica's folder is made only on purpose ([`Folder::prepare`]): when its disk is not mounted, writes fail
//! with a clear error instead of filling the mountpoint beneath. Large objects are written past the kernel's cache, in the same steps and
//! under the same names as by object_store's local store, which does everything else.

use std::fmt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path as FsPath, PathBuf};
use std::sync::{Arc, OnceLock};

use async_trait::async_trait;
use bytes::Bytes;
use futures::stream::BoxStream;
use futures::{FutureExt, StreamExt};
use object_store::local::LocalFileSystem;
use object_store::path::Path;
use object_store::{
    CopyOptions, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStore, PutMode,
    PutMultipartOptions, PutOptions, PutPayload, PutResult, RenameOptions, Result,
};

use super::error::{Classed, ErrorKind};
use crate::direct;
use crate::private;

/// A folder that holds a replica.
#[derive(Clone, Debug)]
pub(super) struct Folder(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    root: PathBuf,
    /// The store and the filesystem that the folder was on when it was first used.
    opened: OnceLock<(Arc<LocalFileSystem>, Filesystem)>,
}

/// Which filesystem something lies on, told apart also after a restart. Displays as text that parses back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Filesystem {
    /// Device number: may change when disks are found in another order.
    dev: u64,
    /// What the filesystem says of itself; 0 when it says nothing. ext4 and btrfs derive it from their UUID.
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

    /// The local store, when the folder is there. Asked on a blocking thread: a dead network mount hangs for long.
    async fn store(&self, path: &Path) -> Result<Arc<LocalFileSystem>> {
        let (inner, path) = (Arc::clone(&self.0), path.clone());
        tokio::task::spawn_blocking(move || inner.store(&path)).await?
    }

    /// As [`Folder::store`] for reading: a folder that never was there holds nothing.
    async fn reading(&self, path: &Path) -> Result<Arc<LocalFileSystem>> {
        let (inner, path) = (Arc::clone(&self.0), path.clone());
        tokio::task::spawn_blocking(move || inner.reading(&path)).await?
    }

    /// A listing, or the one error that stands for it; nothing at all when the folder is absent.
    fn listing(
        self,
        list: impl FnOnce(&LocalFileSystem) -> BoxStream<'static, Result<ObjectMeta>> + Send + 'static,
    ) -> BoxStream<'static, Result<ObjectMeta>> {
        let stream = async move {
            match self.reading(&Path::default()).await {
                Ok(store) => list(&store),
                Err(object_store::Error::NotFound { .. }) => futures::stream::empty().boxed(),
                Err(e) => futures::stream::once(async { Err(e) }).boxed(),
            }
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

/// Writes an object durably under a temporary name, which no listing shows, and then gives it its own. False when there is no folder to
/// put it in yet.
fn put_large(dest: &FsPath, bytes: &[u8], new: bool) -> std::io::Result<bool> {
    let mut attempt = 1;
    let temporary = loop {
        let mut name = dest.as_os_str().to_owned();
        name.push(format!("#{attempt}"));
        let name = PathBuf::from(name);
        match direct::create(&name, bytes) {
            // Another write's, or what a killed one left.
            Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => attempt += 1,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(false),
            Err(e) => {
                let _ = std::fs::remove_file(&name);
                return Err(e);
            }
            Ok(()) => break name,
        }
    };
    let named = if new { std::fs::hard_link(&temporary, dest) } else { std::fs::rename(&temporary, dest) };
    let parent = dest.parent().unwrap_or(dest);
    let named = named.and_then(|()| std::fs::File::open(parent)?.sync_all());
    // It is gone already behind a rename.
    let _ = std::fs::remove_file(&temporary);
    named.map(|()| true)
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
            PutMode::Update(_) => return store.put_opts(at, payload, opts).await,
        };
        let dest = store.path_to_filesystem(at)?;
        if let [bytes] = payload.as_ref()
            && bytes.len() >= direct::LEAST
            && opts.attributes.is_empty()
        {
            let bytes = bytes.clone();
            let put = tokio::task::spawn_blocking(move || put_large(&dest, &bytes, new)).await?;
            match put {
                Ok(true) => {
                    return Ok(PutResult { e_tag: None, version: None, extensions: Default::default() });
                }
                Ok(false) => {}
                Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => {
                    let path = at.to_string();
                    return Err(object_store::Error::AlreadyExists { path, source: Box::new(e) });
                }
                Err(e) => {
                    return Err(object_store::Error::Generic { store: "folder", source: Box::new(e) });
                }
            }
        }
        store.put_opts(at, payload, opts).await
    }

    async fn put_multipart_opts(
        &self,
        at: &Path,
        opts: PutMultipartOptions,
    ) -> Result<Box<dyn MultipartUpload>> {
        self.store(at).await?.put_multipart_opts(at, opts).await
    }

    async fn get_opts(&self, at: &Path, options: GetOptions) -> Result<GetResult> {
        self.reading(at).await?.get_opts(at, options).await
    }

    async fn get_ranges(&self, at: &Path, ranges: &[std::ops::Range<u64>]) -> Result<Vec<Bytes>> {
        self.reading(at).await?.get_ranges(at, ranges).await
    }

    fn delete_stream(&self, paths: BoxStream<'static, Result<Path>>) -> BoxStream<'static, Result<Path>> {
        let this = self.clone();
        let stream = async move {
            match this.store(&Path::default()).await {
                Ok(store) => store.delete_stream(paths),
                Err(e) => futures::stream::once(async { Err(e) }).boxed(),
            }
        };
        stream.flatten_stream().boxed()
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        let prefix = prefix.cloned();
        self.clone().listing(move |s| s.list(prefix.as_ref()))
    }

    fn list_with_offset(
        &self,
        prefix: Option<&Path>,
        offset: &Path,
    ) -> BoxStream<'static, Result<ObjectMeta>> {
        let (prefix, offset) = (prefix.cloned(), offset.clone());
        self.clone().listing(move |s| s.list_with_offset(prefix.as_ref(), &offset))
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        self.reading(&Path::default()).await?.list_with_delimiter(prefix).await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        self.store(to).await?.copy_opts(from, to, options).await
    }

    async fn rename_opts(&self, from: &Path, to: &Path, options: RenameOptions) -> Result<()> {
        self.store(to).await?.rename_opts(from, to, options).await
    }
}
