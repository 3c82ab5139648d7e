//! Sending local files: reading them, and large ones in parts.
//!
//! Owns part length and parts in flight. Deadlines and counters are the parent's.

use std::path::Path as FsPath;

use bytes::Bytes;
use futures::TryStreamExt;
use object_store::{ObjectStoreExt, PutPayload};

use super::Store;
use crate::replica::error::{ErrorKind, StoreError};

/// Length of a part.
pub(super) const PART: u64 = 16 << 20;
/// Parts in flight at a time.
const PARTS_IN_FLIGHT: usize = 3;

impl Store {
    pub(super) async fn put_parts(&self, path: &str, file: &FsPath, len: u64) -> Result<(), StoreError> {
        let at = self.at("put", path)?;
        let start = self.backend.put_multipart(&at);
        let mut upload = self.call("put", path, self.limits.call, start).await?;
        let mut parts = futures::stream::FuturesUnordered::new();
        let mut offset = 0;
        let sent = async {
            while offset < len || !parts.is_empty() {
                if offset < len && parts.len() < PARTS_IN_FLIGHT {
                    let n = PART.min(len - offset);
                    let body = self.read_local(path, file, offset, n).await?;
                    offset += n;
                    let part = upload.put_part(PutPayload::from_bytes(body));
                    parts.push(async move {
                        self.pay_upload(n).await;
                        self.upload("put", path, n, part).await
                    });
                } else {
                    parts.try_next().await?;
                }
            }
            Ok(())
        };
        let sent: Result<(), StoreError> = sent.await;
        drop(parts);
        let finished = match sent {
            Ok(()) => {
                let deadline = self.limits.call * 4;
                self.call("put", path, deadline, upload.complete()).await.map(|_| ())
            }
            Err(e) => Err(e),
        };
        if finished.is_err() {
            // What is left of a multipart upload costs money; that this fails too must not hide the first error.
            let _ = self.call("put", path, self.limits.call, upload.abort()).await;
        }
        finished
    }

    /// Reads a stretch of a local file.
    pub(in crate::replica) async fn read_local(
        &self,
        path: &str,
        file: &FsPath,
        offset: u64,
        len: u64,
    ) -> Result<Bytes, StoreError> {
        let owned = file.to_owned();
        let read = move || -> std::io::Result<Vec<u8>> {
            use std::os::unix::fs::FileExt;
            let file = std::fs::File::open(owned)?;
            let mut body = vec![0; usize::try_from(len).unwrap_or(usize::MAX)];
            file.read_exact_at(&mut body, offset)?;
            Ok(body)
        };
        let error = |kind, text: String| {
            self.error("put", path, kind, format!("local file {}: {text}", file.display()))
        };
        match tokio::task::spawn_blocking(read).await {
            Ok(Ok(body)) => Ok(Bytes::from(body)),
            Ok(Err(e)) if e.kind() == std::io::ErrorKind::NotFound => {
                Err(error(ErrorKind::Absent, "gone".to_owned()))
            }
            Ok(Err(e)) if e.kind() == std::io::ErrorKind::UnexpectedEof => {
                Err(error(ErrorKind::Corrupt, "shorter than it should be".to_owned()))
            }
            Ok(Err(e)) => Err(error(ErrorKind::Transient, e.to_string())),
            Err(e) => Err(error(ErrorKind::Transient, e.to_string())),
        }
    }
}
