//! Reading whole objects and ranges.
//!
//! Owns the deadline of a body, which follows the speed seen, and the check of its length: no answer takes more memory than its kind of
//! object may have, whatever its server says. What has to be waited for before is the business of `limits`.

use std::sync::OnceLock;
use std::sync::atomic::Ordering;
use std::time::Instant;

use bytes::{Bytes, BytesMut};
use futures::TryStreamExt;
use object_store::{GetOptions, GetRange, GetResult, GetResultPayload, ObjectStore};

use super::{Store, bump};
use crate::format::names::{MOST_BYTES, ObjectName};
use crate::replica::error::{ErrorKind, StoreError};

impl Store {
    /// The whole object, if it is no larger than its kind may be; else [`ErrorKind::Corrupt`].
    pub async fn get(&self, path: &str) -> Result<Bytes, StoreError> {
        let at = self.at("get", path)?;
        let most = ObjectName::parse(path).map_or(MOST_BYTES, |name| name.most_bytes());
        let paid = self.pay_for_whole(path).await?;
        let _place = self.throttles.place(self.background).await;
        bump(&self.counters.get);
        let asked = self.backend.get_opts(&at, GetOptions::new());
        let answer = self.call("get", path, self.limits.call, asked).await;
        let answer = answer.inspect_err(|_| self.give_back_download(paid))?;
        let len = answer.meta.size;
        if len > most {
            self.give_back_download(paid);
            return Err(self.too_large(path, len, most));
        }
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
        if len > MOST_BYTES {
            return Err(self.too_large(path, len, MOST_BYTES));
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

    fn too_large(&self, object: &str, len: u64, most: u64) -> StoreError {
        bump(&self.counters.failed);
        let text = format!("{len} bytes are too many, such an object has at most {most}");
        self.error("get", object, ErrorKind::Corrupt, text)
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
        let body = match self.call(op, object, deadline, at_most(answer, len)).await {
            Ok(Some(body)) => body,
            Ok(None) => {
                bump(&self.counters.failed);
                let text = format!("long answer: more than {len} bytes");
                return Err(self.error(op, object, ErrorKind::Corrupt, text));
            }
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

/// The body; `None` when it is longer than `len`, of which no more is taken than shows that.
async fn at_most(answer: GetResult, len: u64) -> object_store::Result<Option<Bytes>> {
    let mut pieces = match answer.payload {
        // Read up to the length that the file had when it was opened.
        GetResultPayload::File(..) => {
            let body = answer.bytes().await?;
            return Ok((body.len() as u64 <= len).then_some(body));
        }
        GetResultPayload::Stream(pieces) => pieces,
    };
    let fits = |n: usize| n as u64 <= len;
    let Some(first) = pieces.try_next().await? else { return Ok(Some(Bytes::new())) };
    if !fits(first.len()) {
        return Ok(None);
    }
    let Some(second) = pieces.try_next().await? else { return Ok(Some(first)) };
    let mut body = BytesMut::with_capacity(usize::try_from(len).unwrap_or(first.len()));
    body.extend_from_slice(&first);
    let mut next = Some(second);
    while let Some(piece) = next {
        if !fits(body.len() + piece.len()) {
            return Ok(None);
        }
        body.extend_from_slice(&piece);
        next = pieces.try_next().await?;
    }
    Ok(Some(body.freeze()))
}

#[cfg(test)]
mod tests {
    use futures::StreamExt;
    use futures::stream;

    use super::*;
    use crate::ids::{Epoch, SegmentNo};

    #[tokio::test]
    async fn each_kind_of_object_has_its_bound() {
        let store = Store::in_memory("a".parse().unwrap());
        let epoch = Epoch(1);
        for name in [ObjectName::Volume, ObjectName::Claim(epoch), ObjectName::Release(epoch)] {
            let most = usize::try_from(name.most_bytes()).unwrap();
            store.put(&name.path(), vec![7; most].into()).await.unwrap();
            assert_eq!(store.get(&name.path()).await.unwrap().len(), most);
            store.put(&name.path(), vec![7; most + 1].into()).await.unwrap();
            let error = store.get(&name.path()).await.unwrap_err();
            assert_eq!(error.kind, ErrorKind::Corrupt);
            assert!(error.to_string().contains(&format!("{} bytes are too many", most + 1)), "{error}");
        }
        let segment = ObjectName::Segment(SegmentNo(1), epoch).path();
        let error = store.get_range(&segment, 0, MOST_BYTES + 1).await.unwrap_err();
        assert_eq!(error.kind, ErrorKind::Corrupt, "before anything is asked");
    }

    #[tokio::test]
    async fn an_answer_longer_than_it_says_is_not_taken() {
        let store = Store::in_memory("a".parse().unwrap());
        store.put("epochs/00000001.json", Bytes::from_static(b"12345")).await.unwrap();
        let at = store.at("get", "epochs/00000001.json").unwrap();
        for (pieces, whole) in [
            (vec!["12345"], Some("12345")),
            (vec!["12", "34", "5"], Some("12345")),
            (vec![], Some("")),
            (vec!["123456"], None),
            (vec!["12", "34", "56"], None),
        ] {
            let mut answer = store.backend.get_opts(&at, GetOptions::new()).await.unwrap();
            // It never ends: what is too long is not read to its end.
            let more = stream::repeat_with(|| Ok(Bytes::from_static(b"more")));
            let pieces = stream::iter(pieces).map(|p| Ok(Bytes::from_static(p.as_bytes())));
            let body = if whole.is_none() { pieces.chain(more).boxed() } else { pieces.boxed() };
            answer.payload = GetResultPayload::Stream(body);
            let taken = at_most(answer, 5).await.unwrap();
            assert_eq!(taken.as_deref(), whole.map(str::as_bytes));
        }
    }

    #[tokio::test]
    async fn names_of_nobody_are_counted_and_not_kept() {
        let store = Store::in_memory("a".parse().unwrap());
        for i in 0..super::super::FOREIGN_KEPT + 50 {
            store.put(&format!("epochs/junk-{i}"), Bytes::new()).await.unwrap();
        }
        store.put("epochs/00000001.json", Bytes::new()).await.unwrap();
        store.put("epochs/zz.json", Bytes::new()).await.unwrap();
        let listed = store.list("epochs").await.unwrap();
        assert_eq!(listed.len() as u64, super::super::FOREIGN_KEPT + 1);
        assert!(listed.iter().any(|o| o.path == "epochs/00000001.json"));
    }
}
