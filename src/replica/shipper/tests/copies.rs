//! Tests of copies from replica to replica: only the segment that is known by its hash is taken.

use super::*;
use crate::format::segment::{SegmentHash, parse_footer};
use crate::replica::testing::{chained, content, segment};

/// A whole segment of number 2 with other content.
fn forged() -> Vec<u8> {
    segment(2, 1, &[content(77, 4000)]).0
}

#[tokio::test]
async fn a_forged_copy_is_not_taken() {
    let bench = Bench::new(&["a", "b", "c"]);
    let _tasks = [bench.start(0), bench.start(1)];
    let sealed: Vec<_> = (0..3).map(|_| bench.outbox.seal(1, 4000).0).collect();
    bench.reaches(0, 3).await;
    bench.reaches(1, 3).await;
    bench.stores[0].put(&segment_path(2, 1), forged().into()).await.unwrap();
    for n in 1..=3 {
        bench.outbox.unstage(n, false);
    }
    // a is asked first.
    bench.faults[1].add(Rule::always(Fault::Delay(Duration::from_millis(50)), &[Op::Get]));
    let _c = bench.start(2);
    bench.reaches(2, 3).await;
    assert_eq!(bench.stored(2, 2, 1).await, sealed[1]);
    assert!(bench.fenced.lock().is_empty());
}

#[tokio::test]
async fn where_no_hash_is_known_copies_that_differ_are_not_taken() {
    let bench = Bench::new(&["a", "b", "c"]);
    let _tasks = [bench.start(0), bench.start(1)];
    let sealed: Vec<_> = (0..2).map(|_| bench.outbox.seal(1, 4000).0).collect();
    bench.reaches(0, 2).await;
    bench.reaches(1, 2).await;
    bench.outbox.hashes.lock().clear();
    for n in 1..=2 {
        bench.outbox.unstage(n, false);
    }
    bench.stores[0].put(&segment_path(2, 1), forged().into()).await.unwrap();
    let _c = bench.start(2);
    bench
        .eventually("the complaint", || {
            bench.status(2).last_error.is_some_and(|e| e.text.contains("hold different copies"))
        })
        .await;
    assert_eq!(bench.replicas[2].cursor(), SegmentNo(1));
    bench.stores[0].put(&segment_path(2, 1), sealed[1].clone().into()).await.unwrap();
    bench.reaches(2, 2).await;
}

#[tokio::test]
async fn the_chain_of_hashes_tells_what_a_restore_did_not_read() {
    let bench = Bench::new(&["a", "b"]);
    let _tasks = [bench.start(0), bench.start(1)];
    let mut previous = SegmentHash::default();
    for n in 1..=5u64 {
        let (bytes, hash) = chained(n, previous);
        bench.outbox.stage(n, 1, &bytes);
        previous = hash;
    }
    bench.reaches(0, 5).await;
    bench.reaches(1, 5).await;
    let known = |n| bench.outbox.hashes.lock().get(&SegmentNo(n)).copied();
    bench.outbox.hashes.lock().insert(SegmentNo(5), previous);
    // One of them lies about the segment in the middle.
    let (lie, lied) = chained(3, SegmentHash([9; 32]));
    bench.stores[0].put(&segment_path(3, 1), lie.into()).await.unwrap();
    let outbox: Arc<dyn Outbox> = bench.outbox.clone();
    chain::learn(&outbox, &bench.replicas, bench.identity.volume.volume, SegmentNo(1)).await;
    let footer = |bytes: &Bytes| parse_footer(bytes, bytes.len() as u64).unwrap();
    for n in 1..=5 {
        assert_eq!(known(n), Some(footer(&bench.stored(1, n, 1).await).hash), "{n}");
    }
    assert_ne!(known(3), Some(lied));
}

#[tokio::test]
async fn a_shipper_that_lacks_a_source_goes_on_as_soon_as_one_is_repaired() {
    let mut bench = Bench::new(&["a", "b"]);
    bench.tuning.source_every = Duration::from_secs(3600);
    let _a = bench.start(0);
    let (bytes, _) = bench.outbox.seal(1, 4000);
    bench.reaches(0, 1).await;
    let mut bad = bytes.clone();
    bad[300] ^= 4;
    bench.stores[0].put(&segment_path(1, 1), bad.into()).await.unwrap();
    bench.outbox.unstage(1, false);
    let _b = bench.start(1);
    bench.eventually("the complaint", || !bench.replicas[0].damages().is_empty()).await;
    bench.stores[0].put(&segment_path(1, 1), bytes.clone().into()).await.unwrap();
    bench.replicas[1].source_repaired();
    bench.reaches(1, 1).await;
    assert_eq!(bench.stored(1, 1, 1).await, bytes);
}
