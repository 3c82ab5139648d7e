//! Temporary reader, until the replica module's is merged.
use crate::format::frame::decode_entry;
use crate::format::names::ObjectName;
use crate::format::tables::{BlockEntry, FrameLoc};
use crate::replica::{FetchError, FrameSource, Replica};
use bytes::Bytes;
use std::path::PathBuf;
use std::sync::Arc;
type Local = Arc<dyn Fn(&FrameLoc) -> Option<PathBuf> + Send + Sync>;
pub(super) struct Reader {
    replicas: Vec<Arc<Replica>>,
    handle: tokio::runtime::Handle,
    local: Option<Local>,
}
impl Reader {
    pub fn new(replicas: Vec<Arc<Replica>>, handle: tokio::runtime::Handle, local: Option<Local>) -> Self {
        Self { replicas, handle, local }
    }
}
impl FrameSource for Reader {
    fn fetch(
        &self,
        w: &BlockEntry,
        _a: &[BlockEntry],
        _d: &dyn Fn(&BlockEntry, Bytes),
    ) -> Result<Bytes, FetchError> {
        if let Some(path) = self.local.as_ref().and_then(|l| l(&w.loc)) {
            use std::os::unix::fs::FileExt;
            let mut buf = vec![0; w.loc.stored_len as usize];
            if std::fs::File::open(path).and_then(|f| f.read_exact_at(&mut buf, w.loc.offset)).is_ok()
                && let Ok(raw) = decode_entry(&buf, w)
                && crate::ids::BlockHash::of(&raw) == w.hash
            {
                return Ok(raw);
            }
        }
        let path = ObjectName::Segment(w.loc.segment, w.loc.epoch).path();
        let mut detail = String::new();
        for r in &self.replicas {
            let got =
                self.handle.block_on(r.store().get_range(&path, w.loc.offset, u64::from(w.loc.stored_len)));
            match got {
                Ok(b) => match decode_entry(&b, w) {
                    Ok(raw) => return Ok(raw),
                    Err(e) => detail += &format!("{}: {e}; ", r.name()),
                },
                Err(e) => detail += &format!("{e}; "),
            }
        }
        Err(FetchError::Unavailable { what: w.hash.to_string(), detail })
    }
}
