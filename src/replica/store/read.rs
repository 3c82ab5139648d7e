//! Reading whole objects and ranges.
//!
//! Owns the deadline of a body, which follows the speed seen, and the check of its length. What has to be waited for before is the
//! business of `limits`.

use std::sync::OnceLock;
use std::sync::atomic::Ordering;
use std::time::Instant;

use bytes::Bytes;
use object_store::{GetOptions, GetRange, GetResult, ObjectStore};

use super::{Store, bump};
use crate::replica::error::{ErrorKind, StoreError};

impl Store {
    /// The whole object, whose size the caller knows to be reasonable.
    pub async fn get(&self, path: &str) -> Result<Bytes, StoreError> {
        let at = self.at("get", path)?;
        let paid = self.pay_for_whole(path).await?;
        let _place = self.throttles.place(self.background).await;
        bump(&self.counters.get);
        let asked = self.backend.get_opts(&at, GetOptions::new());
        let answer = self.call("get", path, self.limits.call, asked).await;
        let answer = answer.inspect_err(|_| self.give_back_download(paid))?;
        let len = answer.meta.size;
        self.charge_download(len.saturating_sub(paid));
        self.body("get", path, answer, len).await
    }

    /// Exactly `len` bytes from `offset` on; fewer is [`ErrorKind::Corrupt`].
    pub async fn get_range(&self, path: &str, offset: u64, len: u64) -> Result<Bytes, StoreError> {
        self.get_range_begun(path, offset, len, &OnceLock::new()).await
    }

    /// As [`Store::get_range`]; `begun` is set when all limits let the request go.
    pub(in crate::replica) async fn get_range_begun(
        &self,
        path: &str,
        offset: u64,
        len: u64,
        begun: &OnceLock<Instant>,
    ) -> Result<Bytes, StoreError> {
        let at = self.at("get", path)?;
        if len == 0 {
            return Ok(Bytes::new());
        }
        self.pay_download(len).await;
        let _place = self.throttles.place(self.background).await;
        let _ = begun.set(Instant::now());
        bump(&self.counters.get);
        let end = offset.saturating_add(len);
        let options = GetOptions { range: Some(GetRange::Bounded(offset..end)), ..GetOptions::new() };
        let answer = self.call("get", path, self.limits.call, self.backend.get_opts(&at, options)).await;
        let answer = answer.inspect_err(|_| self.give_back_download(len))?;
        self.body("get", path, answer, len).await
    }

    /// Takes the body of an answer, which must be `len` bytes long.
    pub(super) async fn body(
        &self,
        op: &'static str,
        object: &str,
        answer: GetResult,
        len: u64,
    ) -> Result<Bytes, StoreError> {
        let (started, base) = (Instant::now(), self.limits.call);
        let deadline = self.paces.down.lock().budget(base, len);
        let body = match self.call(op, object, deadline, answer.bytes()).await {
            Ok(body) => body,
            Err(e) => {
                if e.kind == ErrorKind::Timeout {
                    self.paces.down.lock().gave_up();
                }
                return Err(e);
            }
        };
        self.counters.received.fetch_add(body.len() as u64, Ordering::Relaxed);
        if body.len() as u64 != len {
            bump(&self.counters.failed);
            let text = format!("short answer: {} bytes instead of {len}", body.len());
            return Err(self.error(op, object, ErrorKind::Corrupt, text));
        }
        self.paces.down.lock().done(len, started.elapsed());
        Ok(body)
    }
}
