//! What bounds the traffic of a replica: who waits before which call.
//!
//! Owns the rule that waiting comes before a call and its deadline, and what does not wait: small objects read or created whole,
//! which say who writes to the volume. They only count.

use std::sync::Arc;
use std::time::Duration;

use super::{Store, StoreError};
use crate::replica::limit::Timetable;

/// Whole objects up to this many bytes are read without waiting.
const SMALL: u64 = 64 << 10;

impl Store {
    /// The same store with limits of speed, shared by all clones made from now on.
    #[must_use]
    pub fn with_rates(mut self, upload: Timetable, download: Timetable) -> Self {
        self.throttles = Arc::new(self.throttles.with_reads(self.limits.reads_in_flight));
        self.throttles.up.set(upload);
        self.throttles.down.set(download);
        self
    }

    /// A clone for work that nobody waits for: its reads and writes let those of others pass first, obey the rate of
    /// [`Store::set_background_rate`] besides, and take at most half of the places among the reads.
    #[must_use]
    pub fn background(&self) -> Self {
        Self { background: true, ..self.clone() }
    }

    /// Bounds what all background clones of this store read and write together, in bytes per second; at once, also for those that
    /// wait already.
    pub fn set_background_rate(&self, rate: Option<u64>) {
        self.throttles.background.set(Timetable::always(rate));
    }

    /// The limits of the moment for uploads and downloads, in bytes per second.
    #[must_use]
    pub fn rates(&self) -> (Option<u64>, Option<u64>) {
        (self.throttles.up.rate(), self.throttles.down.rate())
    }

    /// How long the limits let no download begin.
    pub(in crate::replica) fn download_wait(&self) -> Duration {
        self.throttles.down.wait()
    }

    /// Waits until `len` bytes may be sent.
    pub(super) async fn pay_upload(&self, len: u64) {
        if self.background {
            self.throttles.background.pass(len, false).await;
        }
        self.throttles.up.pass(len, self.background).await;
    }

    /// Waits until `len` bytes may be received.
    pub(super) async fn pay_download(&self, len: u64) {
        if self.background {
            self.throttles.background.pass(len, false).await;
        }
        self.throttles.down.pass(len, self.background).await;
    }

    /// Waits until a whole object may be received, whose size nobody has told; gives the bytes that are paid for, if any. Asks for
    /// the size only when there is something to wait for.
    pub(super) async fn pay_for_whole(&self, path: &str) -> Result<u64, StoreError> {
        let behind = self.background && !self.throttles.background.wait().is_zero();
        if !behind && self.throttles.down.wait().is_zero() {
            return Ok(0);
        }
        match self.head(path).await?.size {
            small if small <= SMALL => Ok(0),
            size => {
                self.pay_download(size).await;
                Ok(size)
            }
        }
    }

    pub(super) fn charge_download(&self, len: u64) {
        if self.background {
            self.throttles.background.charge(len);
        }
        self.throttles.down.charge(len);
    }

    /// Takes back what was paid for bytes that did not come.
    pub(super) fn give_back_download(&self, len: u64) {
        if self.background {
            self.throttles.background.give_back(len);
        }
        self.throttles.down.give_back(len);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use bytes::Bytes;

    use super::super::Limits;
    use super::*;
    use crate::replica::ErrorKind;
    use crate::replica::fault::{Fault, Faults, Op, Rule};

    fn limited(upload: &str, download: &str) -> (Store, Faults) {
        let faults = Faults::new(1);
        let limits = Limits { call: Duration::from_millis(400), ..Limits::default() };
        let store = Store::in_memory("m".parse().unwrap()).with_limits(limits).wrapped(|s| faults.wrap(s));
        let table = |text| Timetable::parse(text).unwrap();
        (store.with_rates(table(upload), table(download)), faults)
    }

    fn kib(n: usize) -> Bytes {
        vec![7; n << 10].into()
    }

    #[tokio::test]
    async fn transfers_keep_the_average_and_waiting_is_no_timeout() {
        let (store, _) = limited("100KiB", "200KiB");
        assert_eq!(store.rates(), (Some(100 << 10), Some(200 << 10)));
        let started = Instant::now();
        for i in 0..4 {
            store.put(&format!("a{i}"), kib(100)).await.unwrap();
        }
        // The first second's worth is free, and the last runs into debt: three seconds' worth at least two seconds long, each
        // wait longer than the deadline of a call.
        assert!(started.elapsed() > Duration::from_millis(1900), "{:?}", started.elapsed());
        let started = Instant::now();
        for i in 0..4 {
            assert_eq!(store.get(&format!("a{i}")).await.unwrap(), kib(100));
            assert_eq!(store.get_range(&format!("a{i}"), 0, 100 << 10).await.unwrap(), kib(100));
        }
        assert!(started.elapsed() > Duration::from_millis(2400), "{:?}", started.elapsed());
        assert_eq!(store.requests().failed, 0);
    }

    #[tokio::test]
    async fn what_says_who_writes_does_not_wait() {
        let (store, _) = limited("2KiB", "2KiB");
        store.put("big", kib(100)).await.unwrap();
        store.get("big").await.unwrap();
        let started = Instant::now();
        store.put_if_absent("claim", kib(1)).await.unwrap();
        store.get("claim").await.unwrap();
        store.list("").await.unwrap();
        assert!(started.elapsed() < Duration::from_secs(5), "{:?}", started.elapsed());
        let wait = Duration::from_millis(100);
        assert!(tokio::time::timeout(wait, store.put("other", kib(1))).await.is_err());
        assert!(tokio::time::timeout(wait, store.get("big")).await.is_err());
        assert!(tokio::time::timeout(wait, store.get_range("big", 0, 1)).await.is_err());
    }

    #[tokio::test]
    async fn what_a_dead_replica_did_not_give_is_not_paid_for() {
        let (store, faults) = limited("off", "10KiB");
        store.put("a", kib(20)).await.unwrap();
        faults.partition(true);
        let started = Instant::now();
        for _ in 0..20 {
            assert_eq!(store.get_range("a", 0, 20 << 10).await.unwrap_err().kind, ErrorKind::Transient);
        }
        faults.partition(false);
        store.get_range("a", 0, 20 << 10).await.unwrap();
        assert!(started.elapsed() < Duration::from_secs(5), "{:?}", started.elapsed());
    }

    #[tokio::test]
    async fn background_work_obeys_a_rate_of_its_own() {
        let (store, _) = limited("off", "off");
        store.put("a", kib(100)).await.unwrap();
        let background = store.background();
        store.set_background_rate(Some(100 << 10));
        let started = Instant::now();
        for _ in 0..3 {
            background.get("a").await.unwrap();
            store.get("a").await.unwrap();
        }
        background.clone().put("b", kib(1)).await.unwrap();
        assert!(started.elapsed() > Duration::from_millis(1900), "{:?}", started.elapsed());
        store.set_background_rate(None);
        background.get("a").await.unwrap();
    }

    #[tokio::test]
    async fn reads_at_a_time_are_bounded_and_waiting_for_a_place_is_no_timeout() {
        let (store, faults) = limited("off", "off");
        let limits = Limits { reads_in_flight: 1, ..store.limits() };
        let store = store.with_limits(limits);
        store.put("a", kib(1)).await.unwrap();
        faults.add(Rule::always(Fault::Delay(Duration::from_millis(150)), &[Op::Get]));
        let started = Instant::now();
        let reads = (0..5).map(|_| store.get_range("a", 0, 1));
        for read in futures::future::join_all(reads).await {
            read.unwrap();
        }
        assert!(started.elapsed() >= Duration::from_millis(750), "{:?}", started.elapsed());
    }
}
