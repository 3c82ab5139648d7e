//! Stand-in until the real journal is merged.
#![allow(missing_docs)]
use crate::format::record::{Op, Record};
use crate::ids::Lsn;
use bytes::Bytes;
use parking_lot::{Mutex, RwLock};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

#[derive(Clone, Debug, thiserror::Error)]
pub enum JournalError {
    #[error("poisoned: {0}")]
    Poisoned(String),
    #[error("damaged: {0}")]
    Damaged(String),
    #[error("full: {0}")]
    Full(String),
}
#[derive(Default)]
pub struct Journal {
    map: RwLock<BTreeMap<Bytes, Bytes>>,
    log: Mutex<Vec<Record>>,
    lsn: AtomicU64,
}
pub struct Tx<'a> {
    j: &'a Journal,
    ops: Vec<Op>,
    over: BTreeMap<Bytes, Option<Bytes>>,
    lsn: Lsn,
}
impl Journal {
    pub fn get(&self, key: &[u8]) -> Result<Option<Bytes>, JournalError> {
        Ok(self.map.read().get(key).cloned())
    }
    pub fn scan(&self, s: &[u8], e: &[u8], limit: usize) -> Result<Vec<(Bytes, Bytes)>, JournalError> {
        Ok(self
            .map
            .read()
            .range(Bytes::copy_from_slice(s)..Bytes::copy_from_slice(e))
            .take(limit)
            .map(|(k, v)| (k.clone(), v.clone()))
            .collect())
    }
    pub fn transact<R, E: From<JournalError>>(
        &self,
        f: impl FnOnce(&mut Tx<'_>) -> Result<R, E>,
    ) -> Result<(R, Lsn), E> {
        let mut log = self.log.lock();
        let lsn = Lsn(self.lsn.load(Ordering::SeqCst) + 1);
        let mut tx = Tx { j: self, ops: vec![], over: BTreeMap::new(), lsn };
        let r = f(&mut tx)?;
        if tx.ops.is_empty() {
            return Ok((r, self.last_lsn()));
        }
        let mut m = self.map.write();
        for op in &tx.ops {
            match op {
                Op::Put { key, value } => {
                    m.insert(key.clone(), value.clone());
                }
                Op::Delete { key } => {
                    m.remove(key);
                }
            }
        }
        log.push(Record { lsn, ops: tx.ops });
        self.lsn.store(lsn.0, Ordering::SeqCst);
        Ok((r, lsn))
    }
    pub fn barrier(&self, _l: Lsn) -> Result<(), JournalError> {
        Ok(())
    }
    pub fn last_lsn(&self) -> Lsn {
        Lsn(self.lsn.load(Ordering::SeqCst))
    }
    pub fn durable_lsn(&self) -> Lsn {
        self.last_lsn()
    }
    pub fn records(
        &self,
        after: Lsn,
        upto: Lsn,
    ) -> Result<std::vec::IntoIter<Result<Record, JournalError>>, JournalError> {
        Ok(self
            .log
            .lock()
            .iter()
            .filter(|r| r.lsn > after && r.lsn <= upto)
            .cloned()
            .map(Ok)
            .collect::<Vec<_>>()
            .into_iter())
    }
    pub fn release(&self, _l: Lsn) {}
    pub fn poisoned(&self) -> Option<String> {
        None
    }
    pub fn poison(&self, _w: &str) {}
}
impl Tx<'_> {
    pub fn get(&self, key: &[u8]) -> Result<Option<Bytes>, JournalError> {
        match self.over.get(key) {
            Some(v) => Ok(v.clone()),
            None => self.j.get(key),
        }
    }
    pub fn scan(&self, s: &[u8], e: &[u8], limit: usize) -> Result<Vec<(Bytes, Bytes)>, JournalError> {
        let mut m: BTreeMap<Bytes, Bytes> = self.j.scan(s, e, usize::MAX)?.into_iter().collect();
        for (k, v) in self.over.range(Bytes::copy_from_slice(s)..Bytes::copy_from_slice(e)) {
            match v {
                Some(v) => {
                    m.insert(k.clone(), v.clone());
                }
                None => {
                    m.remove(k);
                }
            }
        }
        Ok(m.into_iter().take(limit).collect())
    }
    pub fn put(&mut self, k: impl Into<Bytes>, v: impl Into<Bytes>) {
        let (k, v) = (k.into(), v.into());
        self.over.insert(k.clone(), Some(v.clone()));
        self.ops.push(Op::Put { key: k, value: v });
    }
    pub fn delete(&mut self, k: impl Into<Bytes>) {
        let k = k.into();
        self.over.insert(k.clone(), None);
        self.ops.push(Op::Delete { key: k });
    }
    pub fn lsn(&self) -> Lsn {
        self.lsn
    }
}
pub fn stub() -> Arc<Journal> {
    Arc::new(Journal::default())
}
