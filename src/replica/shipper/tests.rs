//! Tests of the shipper over memory with faults.

use bytes::Bytes;
use parking_lot::Mutex;

use super::*;
use crate::format::names::ObjectName;
use crate::format::volume::Claim;
use crate::format::volume::testing::claim;
use crate::ids::Epoch;
use crate::replica::fault::{Fault, Faults, Op, Rule};
use crate::replica::fence::confirm;
use crate::replica::testing::{FakeCursors, FakeOutbox, faulty, identity};
use crate::replica::{ErrorKind, ReplicaState, Store};

mod copies;

const SOON: Duration = Duration::from_secs(20);

mod contested;

struct Bench {
    outbox: Arc<FakeOutbox>,
    cursors: Arc<FakeCursors>,
    identity: Arc<Identity>,
    fenced: Arc<Mutex<Vec<Fenced>>>,
    fence: Arc<Fence>,
    closing: watch::Sender<bool>,
    replicas: Vec<Arc<Replica>>,
    faults: Vec<Faults>,
    stores: Vec<Store>,
    tuning: Tuning,
}

impl Bench {
    fn new(names: &[&str]) -> Self {
        let _ = env_logger::builder().is_test(true).try_init();
        let fenced = Arc::new(Mutex::new(Vec::new()));
        let told = Arc::clone(&fenced);
        let made: Vec<_> = names.iter().enumerate().map(|(i, n)| faulty(n, i as u64)).collect();
        Self {
            outbox: FakeOutbox::new(),
            cursors: Arc::default(),
            identity: identity(&[claim(1, 1, 1)]),
            fenced,
            fence: Fence::new(move |f| told.lock().push(f.clone())),
            closing: watch::channel(false).0,
            replicas: made.iter().map(|m| Arc::clone(&m.0)).collect(),
            faults: made.iter().map(|m| m.1.clone()).collect(),
            stores: made.iter().map(|m| m.2.clone()).collect(),
            tuning: Tuning {
                fence_every: Duration::from_millis(20),
                foreign_every: Duration::from_millis(100),
                source_every: Duration::from_millis(100),
                recheck_every: Duration::from_secs(1),
                ..Tuning::default()
            },
        }
    }

    fn start(&self, i: usize) -> tokio::task::JoinHandle<()> {
        let shipper = Shipper {
            replica: Arc::clone(&self.replicas[i]),
            peers: Roster::new(self.replicas.clone()),
            outbox: self.outbox.clone(),
            cursors: self.cursors.clone(),
            identity: Arc::clone(&self.identity),
            fence: Arc::clone(&self.fence),
            closing: self.closing.subscribe(),
            tuning: self.tuning,
        };
        tokio::spawn(shipper.run())
    }

    async fn reaches(&self, i: usize, number: u64) {
        let wait = self.replicas[i].wait_for(SegmentNo(number));
        let reached = tokio::time::timeout(SOON, wait).await;
        assert!(reached.is_ok(), "replica {i} is at {}: {:?}", self.replicas[i].cursor(), self.status(i));
    }

    fn status(&self, i: usize) -> ReplicaStatus {
        status(&self.replicas[i], &*self.outbox)
    }

    async fn eventually(&self, what: &str, mut holds: impl FnMut() -> bool) {
        let deadline = Instant::now() + SOON;
        while !holds() {
            assert!(Instant::now() < deadline, "{what} does not come true");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// The segment as it lies on a replica.
    async fn stored(&self, i: usize, number: u64, epoch: u32) -> Bytes {
        self.stores[i].get(&segment_path(number, epoch)).await.unwrap()
    }
}

fn segment_path(number: u64, epoch: u32) -> String {
    ObjectName::Segment(SegmentNo(number), Epoch(epoch)).path()
}

fn claim_bytes(claim: &Claim) -> Bytes {
    claim.encode().unwrap().into()
}

#[tokio::test]
async fn a_new_replica_gets_identity_segments_and_checkpoint() {
    let bench = Bench::new(&["a"]);
    let sealed: Vec<_> = (0..9).map(|_| bench.outbox.seal(1, 5000).0).collect();
    bench.outbox.stage_checkpoint(7, 1, 3);
    let task = bench.start(0);
    bench.reaches(0, 9).await;
    for (i, bytes) in sealed.iter().enumerate() {
        assert_eq!(bench.stored(0, i as u64 + 1, 1).await, bytes);
    }
    bench.outbox.seal(1, 10);
    bench.reaches(0, 10).await;
    let manifest = ObjectName::CheckpointManifest(SegmentNo(7), Epoch(1)).path();
    bench.eventually("the checkpoint", || bench.status(0).uploaded_objects == 14).await;
    let objects = bench.stores[0].list("").await.unwrap();
    assert_eq!(objects.len(), 10 + 4 + 2, "{objects:?}");
    assert!(objects.iter().any(|o| o.path == manifest));
    let status = bench.status(0);
    assert_eq!((status.state, status.lag_segments, status.cursor), (ReplicaState::Healthy, 0, SegmentNo(10)));
    assert_eq!(bench.cursors.0.lock().values().copied().collect::<Vec<_>>(), [SegmentNo(10)]);
    bench.closing.send_replace(true);
    task.await.unwrap();
}

#[tokio::test]
async fn random_faults_delay_but_neither_lose_nor_advance_wrongly() {
    let bench = Bench::new(&["a"]);
    let seed: u64 = rand::random();
    println!("seed {seed}");
    let faults = Faults::new(seed);
    let limits = crate::replica::Limits { call: Duration::from_millis(50), ..Default::default() };
    let store = bench.stores[0].clone().with_limits(limits).wrapped(|s| faults.wrap(s));
    let mut bench = bench;
    bench.replicas[0] = Arc::new(Replica::new(store));
    for fault in [
        Fault::Before(ErrorKind::Transient),
        Fault::After(ErrorKind::Transient),
        Fault::HangAfter,
        Fault::Hang,
        Fault::Delay(Duration::from_millis(20)),
    ] {
        faults.add(Rule::always(fault, &[]).chance(0.02));
    }
    let sealed: Vec<_> = (0..30).map(|_| bench.outbox.seal(1, 3000).0).collect();
    let task = bench.start(0);
    let mut cursor = bench.replicas[0].watch_cursor();
    let watched = async {
        while *cursor.borrow() < SegmentNo(30) {
            cursor.changed().await.unwrap();
            let now = *cursor.borrow_and_update();
            // Only what is there, whole, is behind the cursor: at every moment.
            for n in (now.0.saturating_sub(5)..=now.0).filter(|n| *n > 0) {
                assert_eq!(bench.stored(0, n, 1).await, sealed[n as usize - 1]);
            }
        }
    };
    tokio::time::timeout(SOON * 3, watched).await.unwrap();
    assert!(faults.struck() > 0);
    bench.closing.send_replace(true);
    task.await.unwrap();
}

#[tokio::test]
async fn a_dead_replica_slows_nobody_and_catches_up_by_itself() {
    let bench = Bench::new(&["a", "b", "c"]);
    bench.faults[1].partition(true);
    bench.faults[2].add(Rule::always(Fault::Hang, &[]));
    let _tasks: Vec<_> = (0..3).map(|i| bench.start(i)).collect();
    let started = Instant::now();
    for n in 1..=30 {
        bench.outbox.seal(1, 2000);
        bench.reaches(0, n).await;
    }
    assert!(started.elapsed() < Duration::from_secs(5), "{:?}", started.elapsed());
    bench.eventually("offline", || bench.status(1).state == ReplicaState::Offline).await;
    bench.eventually("offline", || bench.status(2).state == ReplicaState::Offline).await;
    let status = bench.status(1);
    assert_eq!((status.lag_segments, status.cursor), (30, SegmentNo(0)));
    assert!(status.last_error.unwrap().text.contains("replica b"));
    for i in [1, 2] {
        bench.faults[i].clear();
        bench.reaches(i, 30).await;
        bench.eventually("healthy", || bench.status(i).state == ReplicaState::Healthy).await;
    }
}

#[tokio::test]
async fn what_is_not_staged_any_more_comes_from_a_peer() {
    let bench = Bench::new(&["a", "b"]);
    let _a = bench.start(0);
    let sealed: Vec<_> = (0..8).map(|_| bench.outbox.seal(1, 4000).0).collect();
    bench.reaches(0, 8).await;
    // The file is gone; the outbox has forgotten others altogether; one is damaged on local disk.
    bench.outbox.unstage(2, false);
    for n in [3, 4] {
        bench.outbox.unstage(n, true);
    }
    let mut bad = sealed[4].clone();
    bad[200] ^= 1;
    std::fs::write(bench.outbox.path(5), bad).unwrap();
    let _b = bench.start(1);
    bench.reaches(1, 8).await;
    for (i, bytes) in sealed.iter().enumerate() {
        assert_eq!(bench.stored(1, i as u64 + 1, 1).await, bytes);
    }
}

#[tokio::test]
async fn damage_on_a_peer_does_not_spread() {
    let bench = Bench::new(&["a", "b"]);
    let _a = bench.start(0);
    let (bytes, _) = bench.outbox.seal(1, 4000);
    bench.reaches(0, 1).await;
    let mut bad = bytes.clone();
    bad[300] ^= 4;
    bench.stores[0].put(&segment_path(1, 1), bad.into()).await.unwrap();
    bench.outbox.unstage(1, false);
    let _b = bench.start(1);
    bench.eventually("the complaint", || bench.status(1).last_error.is_some()).await;
    let text = bench.status(1).last_error.unwrap().text;
    assert!(text.contains("no intact copy") && text.contains("replica a"), "{text}");
    assert_eq!(bench.replicas[0].damages().len(), 1);
    assert_eq!(bench.replicas[1].cursor(), SegmentNo(0));
    // As soon as there is an intact copy again, it goes on.
    std::fs::write(bench.outbox.path(1), &bytes).unwrap();
    bench.reaches(1, 1).await;
}

#[tokio::test]
async fn a_wiped_or_rolled_back_replica_is_noticed_and_filled_again() {
    let bench = Bench::new(&["a", "b"]);
    let sealed: Vec<_> = (0..6).map(|_| bench.outbox.seal(1, 2000).0).collect();
    let tasks = [bench.start(0), bench.start(1)];
    bench.reaches(0, 6).await;
    bench.reaches(1, 6).await;
    bench.closing.send_replace(true);
    for task in tasks {
        task.await.unwrap();
    }
    bench.closing.send_replace(false);
    // b lost everything, a its end; a's last segment but two is cut off besides.
    for object in bench.stores[1].list("").await.unwrap() {
        bench.stores[1].delete(&object.path).await.unwrap();
    }
    bench.stores[0].delete(&segment_path(6, 1)).await.unwrap();
    bench.stores[0].put(&segment_path(4, 1), Bytes::from_static(b"cut")).await.unwrap();
    for n in 1..=3 {
        bench.outbox.unstage(n, false);
    }
    for replica in &bench.replicas {
        replica.set_cursor(SegmentNo(0));
    }
    let _tasks = [bench.start(0), bench.start(1)];
    bench.reaches(0, 6).await;
    bench.reaches(1, 6).await;
    for i in [0, 1] {
        for (n, bytes) in sealed.iter().enumerate() {
            assert_eq!(bench.stored(i, n as u64 + 1, 1).await, bytes, "replica {i}");
        }
        assert!(bench.status(i).last_error.unwrap().text.contains("wiped or rolled back"));
    }
    assert!(bench.stores[1].head("volume.json").await.is_ok());
}

#[tokio::test]
async fn another_volume_is_never_touched() {
    let bench = Bench::new(&["a", "b"]);
    let mut other = bench.identity.volume.clone();
    other.volume = crate::ids::VolumeId::from_random([9; 16]);
    crate::replica::volume::create(&bench.stores[0], &other).await.unwrap();
    bench.stores[1].put("photos/cat.jpg", Bytes::from_static(b"x")).await.unwrap();
    bench.outbox.seal(1, 10);
    let _tasks = [bench.start(0), bench.start(1)];
    for i in [0, 1] {
        bench.eventually("foreign", || bench.status(i).state == ReplicaState::Foreign).await;
        tokio::time::sleep(Duration::from_millis(300)).await;
        assert_eq!(bench.stores[i].list("").await.unwrap().len(), 1, "nothing was written");
    }
    assert!(bench.status(0).last_error.unwrap().text.contains(&other.volume.to_string()));
}

#[tokio::test]
async fn a_higher_epoch_fences_and_another_claim_of_ours_too() {
    for (by, before) in
        [(claim(2, 9, 4), false), (claim(3, 9, 4), false), (claim(1, 9, 1), true), (claim(5, 9, 1), true)]
    {
        let bench = Bench::new(&["a"]);
        let path = ObjectName::Claim(by.epoch).path();
        if before {
            bench.stores[0].put(&path, claim_bytes(&by)).await.unwrap();
        }
        let task = bench.start(0);
        if !before {
            bench.outbox.seal(1, 10);
            bench.reaches(0, 1).await;
            bench.stores[0].put(&path, claim_bytes(&by)).await.unwrap();
            tokio::time::sleep(bench.tuning.fence_every * 2).await;
        }
        bench.outbox.seal(1, 10);
        tokio::time::timeout(SOON, task).await.unwrap().unwrap();
        let fenced = bench.fenced.lock().clone();
        let first_segment = Some(by.first_segment);
        let reason =
            FenceReason::TakenOver { epoch: by.epoch, claim: Some(Box::new(by.clone())), first_segment };
        assert_eq!((fenced.len(), &fenced[0].reason), (1, &reason));
        assert_eq!(bench.status(0).state, ReplicaState::Fenced);
        let newest = segment_path(bench.outbox.watch().borrow().0, 1);
        assert!(bench.stores[0].head(&newest).await.is_err(), "nothing was written after {by:?}");
    }
}

#[tokio::test]
async fn whatever_was_sent_or_read_is_followed_by_a_look() {
    let mut bench = Bench::new(&["a"]);
    bench.tuning.fence_every = Duration::from_millis(100);
    bench.tuning.recheck_every = Duration::from_secs(3600);
    let task = bench.start(0);
    bench.eventually("it is attached", || bench.replicas[0].is_attached()).await;
    let looks = || bench.status(0).requests.list;
    // Who has no contact does no harm, and costs nothing.
    tokio::time::sleep(bench.tuning.fence_every * 4).await;
    let (idle, all) = (looks(), bench.status(0).requests);
    tokio::time::sleep(bench.tuning.fence_every * 4).await;
    assert_eq!(bench.status(0).requests, all);
    bench.replicas[0].store().get(&ObjectName::Volume.path()).await.unwrap();
    bench.eventually("a look behind the read", || looks() > idle).await;
    // Sent a moment ago, and then nothing more: it learns of the other one all the same.
    let by = claim(2, 9, 1);
    bench.outbox.seal(1, 10);
    bench.reaches(0, 1).await;
    bench.stores[0].put(&ObjectName::Claim(by.epoch).path(), claim_bytes(&by)).await.unwrap();
    tokio::time::timeout(SOON, task).await.unwrap().unwrap();
    assert!(bench.fence.seen().is_some());
}

#[tokio::test]
async fn a_tenure_is_released_where_all_is_and_nobody_else() {
    let bench = Bench::new(&["a", "b", "c"]);
    bench.outbox.seal(1, 10);
    bench.outbox.seal(1, 10);
    // One works, one has nothing because it is down, one is not attached any more.
    bench.faults[1].partition(true);
    let _tasks = [bench.start(0), bench.start(1)];
    bench.reaches(0, 2).await;
    bench.replicas[2].set_cursor(SegmentNo(2));
    let release = async || {
        let newest = SegmentNo(2);
        crate::replica::release(&bench.replicas, &bench.identity, &bench.fence, newest, 7).await
    };
    assert_eq!(release().await, [bench.replicas[0].name().clone()]);
    let mark = bench.stores[0].get("epochs/00000001.released.json").await.unwrap();
    let mark = crate::format::volume::Release::decode(&mark, Epoch(1)).unwrap();
    let ours = bench.identity.claims[0].claim_id;
    assert_eq!((mark.claim_id, mark.last_segment, mark.released_at), (ours, SegmentNo(2), 7));
    // Somebody else is there: he is told of, and nothing more is marked.
    let by = claim(2, 9, 3);
    bench.stores[0].put(&ObjectName::Claim(by.epoch).path(), claim_bytes(&by)).await.unwrap();
    assert!(release().await.is_empty() && bench.fence.seen().is_some());
}

#[tokio::test]
async fn a_replica_that_was_away_learns_all_claims_first() {
    let mut bench = Bench::new(&["a", "b"]);
    let _a = bench.start(0);
    bench.outbox.seal(1, 100);
    bench.outbox.seal(1, 100);
    bench.reaches(0, 2).await;
    bench.closing.send_replace(true);
    // The next tenure begins at 3; b has never been seen.
    bench.closing = watch::channel(false).0;
    bench.identity = identity(&[claim(1, 1, 1), claim(2, 2, 3)]);
    bench.outbox.seal(2, 100);
    let _tasks = [bench.start(0), bench.start(1)];
    bench.reaches(1, 3).await;
    bench.reaches(0, 3).await;
    for path in ["epochs/00000001.json", "epochs/00000002.json", &segment_path(2, 1), &segment_path(3, 2)] {
        assert!(bench.stores[1].head(path).await.is_ok(), "{path}");
    }
}

#[tokio::test]
async fn refused_and_full_replicas_are_named_and_reads_do_not_suffer() {
    let bench = Bench::new(&["a", "b"]);
    for (i, kind) in [(0, ErrorKind::Denied), (1, ErrorKind::Full)] {
        bench.faults[i].add(Rule::always(Fault::Before(kind), &[Op::Create]).on("segments/"));
    }
    bench.outbox.seal(1, 10);
    let _tasks = [bench.start(0), bench.start(1)];
    bench.eventually("denied", || bench.status(0).state == ReplicaState::Denied).await;
    bench.eventually("full", || bench.status(1).state == ReplicaState::Full).await;
    for i in [0, 1] {
        assert_eq!(bench.replicas[i].health().state(), crate::replica::health::HealthState::Healthy);
        tokio::time::sleep(Duration::from_millis(1000)).await;
        assert!(bench.faults[i].struck() < 8, "the waits grow: {} tries", bench.faults[i].struck());
        bench.faults[i].clear();
        bench.reaches(i, 1).await;
        bench.eventually("healthy", || bench.status(i).state == ReplicaState::Healthy).await;
    }
}

#[tokio::test]
async fn a_paused_replica_waits_and_goes_on() {
    let bench = Bench::new(&["a"]);
    let _a = bench.start(0);
    bench.outbox.seal(1, 10);
    bench.reaches(0, 1).await;
    bench.replicas[0].pause(true);
    tokio::time::sleep(Duration::from_millis(50)).await;
    bench.outbox.seal(1, 10);
    tokio::time::sleep(Duration::from_millis(200)).await;
    let status = bench.status(0);
    assert_eq!((status.state, status.cursor, status.lag_segments), (ReplicaState::Paused, SegmentNo(1), 1));
    bench.replicas[0].pause(false);
    bench.reaches(0, 2).await;
}

#[tokio::test]
async fn one_replica_that_shows_a_newer_writer_stops_writing_to_all() {
    let bench = Bench::new(&["a", "b"]);
    let tasks = [bench.start(0), bench.start(1)];
    bench.outbox.seal(1, 10);
    bench.reaches(0, 1).await;
    bench.reaches(1, 1).await;
    // The new writer never reached b; what we send there hangs at this moment.
    bench.faults[1].add(Rule::always(Fault::Hang, &[]).on("segments/"));
    let by = claim(2, 9, 2);
    bench.stores[0].put(&ObjectName::Claim(by.epoch).path(), claim_bytes(&by)).await.unwrap();
    tokio::time::sleep(bench.tuning.fence_every * 2).await;
    bench.outbox.seal(1, 10);
    for task in tasks {
        tokio::time::timeout(SOON, task).await.unwrap().unwrap();
    }
    assert_eq!(bench.fenced.lock().len(), 1, "said once");
    assert!(bench.stores[1].head(&segment_path(2, 1)).await.is_err());
    for i in [0, 1] {
        assert_eq!(bench.status(i).state, ReplicaState::Fenced);
        let text = bench.status(i).last_error.unwrap().text;
        assert!(text.contains("replica a") && text.contains("host9"), "{text}");
    }
}

#[tokio::test]
async fn a_store_counts_when_a_later_look_shows_no_other_writer() {
    let mut bench = Bench::new(&["a", "b"]);
    bench.tuning.fence_every = Duration::from_secs(3600);
    let _tasks = [bench.start(0), bench.start(1)];
    let roster = Roster::new(bench.replicas.clone());
    let confirmed = |n| confirm(&roster, &bench.identity, &bench.fence, SegmentNo(n), |_| 2);
    bench.outbox.seal(1, 10);
    let lists = || bench.faults[0].calls(Op::List);
    bench.reaches(0, 1).await;
    bench.reaches(1, 1).await;
    let before = lists();
    let both = futures::join!(confirmed(1), confirmed(1));
    assert_eq!(both, (Ok(()), Ok(())));
    assert_eq!(lists() - before, 1, "who waits shares the look");
    // A look that fails is made again; a claim that it shows then counts, though the shipper has not looked yet.
    bench.outbox.seal(1, 10);
    bench.reaches(1, 2).await;
    bench.faults[1].add(Rule::always(Fault::Before(ErrorKind::Transient), &[Op::List]).times(1));
    let by = claim(4, 9, 2);
    bench.stores[1].put(&ObjectName::Claim(by.epoch).path(), claim_bytes(&by)).await.unwrap();
    let fenced = tokio::time::timeout(SOON, confirmed(2)).await.unwrap().unwrap_err();
    assert_eq!(fenced.replica.as_str(), "b");
    assert_eq!(*bench.fenced.lock(), [fenced]);
}

/// Runs the shipper of replica 0 to its end by a fence, and gives what raised it.
async fn ends_fenced(bench: &Bench) -> FenceReason {
    tokio::time::timeout(SOON, bench.start(0)).await.unwrap().unwrap();
    assert_eq!(bench.status(0).state, ReplicaState::Fenced);
    let fenced = bench.fenced.lock().clone();
    assert_eq!(fenced.len(), 1);
    fenced[0].reason.clone()
}

#[tokio::test]
async fn a_state_that_is_older_than_the_replica_writes_nothing() {
    // Segments of our epoch that we never sealed, one beyond a gap; with and without a saved cursor, and on a folder of more.
    for (saved, there) in [(2, vec![3]), (0, vec![3, 4]), (2, vec![4]), (2, vec![5000])] {
        let bench = Bench::new(&["a"]);
        let task = bench.start(0);
        bench.outbox.seal(1, 10);
        bench.outbox.seal(1, 10);
        bench.reaches(0, 2).await;
        task.abort();
        bench.cursors.0.lock().insert("a".parse().unwrap(), SegmentNo(saved));
        // What else we would write must not be written either.
        bench.stores[0].delete("volume.json").await.unwrap();
        bench.stores[0].delete("epochs/00000001.json").await.unwrap();
        for n in &there {
            let blocks = [crate::replica::testing::content(77, 900)];
            let (theirs, _) = crate::replica::testing::segment(*n, 1, &blocks);
            bench.stores[0].put(&segment_path(*n, 1), theirs.into()).await.unwrap();
        }
        let before = bench.stores[0].list("").await.unwrap();
        let (segment, newest) = (SegmentNo(there[0]), SegmentNo(2));
        assert_eq!(ends_fenced(&bench).await, FenceReason::Ahead { segment, epoch: Epoch(1), newest });
        let text = bench.status(0).last_error.unwrap().text;
        assert!(text.contains("set back to an older state") && text.contains("replica a"), "{text}");
        assert_eq!(bench.stores[0].list("").await.unwrap(), before);
    }
}

#[tokio::test]
async fn an_intact_segment_is_never_replaced_by_another() {
    // Seen at attach, and not seen (it comes while we send); with conditions and without.
    let (theirs, _) = crate::replica::testing::segment(2, 1, &[crate::replica::testing::content(77, 900)]);
    for late in [false, true] {
        let bench = Bench::new(&["a"]);
        bench.outbox.seal(1, 10);
        if !late {
            bench.outbox.seal(1, 10);
            bench.stores[0].put(&segment_path(2, 1), theirs.clone().into()).await.unwrap();
            let reason = FenceReason::Contradicts { segment: SegmentNo(2), epoch: Epoch(1) };
            assert_eq!(ends_fenced(&bench).await, reason);
        } else {
            let task = bench.start(0);
            bench.reaches(0, 1).await;
            bench.stores[0].put(&segment_path(2, 1), theirs.clone().into()).await.unwrap();
            bench.outbox.seal(1, 10);
            tokio::time::timeout(SOON, task).await.unwrap().unwrap();
            assert_eq!(bench.fenced.lock().len(), 1);
        }
        assert_eq!(bench.stored(0, 2, 1).await, theirs);
        assert_eq!(bench.replicas[0].cursor(), SegmentNo(1));
    }
}

#[tokio::test]
async fn what_is_there_is_not_sent_again_and_damage_is_written_over() {
    for conditional in [true, false] {
        let mut bench = Bench::new(&["a"]);
        if !conditional {
            let store = bench.replicas[0].store().clone().without_conditions();
            bench.replicas[0] = Arc::new(Replica::new(store));
        }
        let sealed: Vec<_> = (0..4).map(|_| bench.outbox.seal(1, 5000).0).collect();
        crate::replica::volume::create(&bench.stores[0], &bench.identity.volume).await.unwrap();
        // 1 is missing; 2 is there; 3 is damaged in its middle and 4 is cut off.
        let mut bad = sealed[2].clone();
        bad[300] ^= 1;
        let footer = bad.len() - 20;
        bad[footer] ^= 1;
        for (n, bytes) in [(2, sealed[1].clone()), (3, bad), (4, sealed[3][..900].to_vec())] {
            bench.stores[0].put(&segment_path(n, 1), bytes.into()).await.unwrap();
        }
        let _task = bench.start(0);
        bench.reaches(0, 4).await;
        for (i, bytes) in sealed.iter().enumerate() {
            assert_eq!(bench.stored(0, i as u64 + 1, 1).await, bytes);
        }
        // Counted behind the cursor.
        bench.eventually("three are counted", || bench.status(0).uploaded_objects >= 3).await;
        assert_eq!(bench.status(0).uploaded_objects, 3, "{conditional}");
        assert!(bench.fenced.lock().is_empty());
        // In the normal case a segment costs a put and the look that verifies it, no more.
        let asked = |r: crate::replica::Requests| (r.put, r.head, r.get);
        // (A new look at the replica may fall between, so the cheapest of several counts.)
        let mut costs = Vec::new();
        for n in 5..10 {
            let before = asked(bench.status(0).requests);
            bench.outbox.seal(1, 10);
            bench.reaches(0, n).await;
            let after = asked(bench.status(0).requests);
            costs.push((after.0 - before.0, after.1 - before.1, after.2 - before.2));
        }
        assert_eq!(costs.iter().min(), Some(&(1, 1, 0)), "{costs:?}");
    }
}

#[tokio::test]
async fn a_lost_answer_of_our_own_is_no_contradiction() {
    let bench = Bench::new(&["a"]);
    bench.faults[0]
        .add(Rule::always(Fault::After(ErrorKind::Exists), &[Op::Create]).on("segments/").times(1));
    let (bytes, _) = bench.outbox.seal(1, 5000);
    let _task = bench.start(0);
    bench.reaches(0, 1).await;
    assert_eq!(bench.stored(0, 1, 1).await, bytes);
    assert!(bench.fenced.lock().is_empty());
}

#[tokio::test]
async fn a_lost_branch_on_a_replica_is_told() {
    let mut bench = Bench::new(&["a"]);
    let _first = bench.start(0);
    for _ in 0..5 {
        bench.outbox.seal(1, 10);
    }
    bench.reaches(0, 5).await;
    bench.closing.send_replace(true);
    // Brought back from a replica that had 1 to 3 only; this one is attached again.
    bench.closing = watch::channel(false).0;
    bench.identity = identity(&[claim(1, 1, 1), claim(2, 2, 4)]);
    bench.cursors.0.lock().clear();
    let old = std::mem::replace(&mut bench.outbox, FakeOutbox::new());
    for n in 1..=3 {
        bench.outbox.stage(n, 1, &std::fs::read(old.path(n)).unwrap());
    }
    let _task = bench.start(0);
    bench.reaches(0, 3).await;
    bench.eventually("the word", || bench.status(0).last_error.is_some()).await;
    let text = bench.status(0).last_error.unwrap().text;
    assert!(text.contains("2 segment(s) from 4 on") && text.contains("host1"), "{text}");
    bench.outbox.seal(2, 10);
    bench.reaches(0, 4).await;
    assert!(bench.stores[0].head(&segment_path(5, 1)).await.is_ok(), "nothing is deleted");
}

#[tokio::test]
async fn a_wiped_folder_is_filled_again_but_not_the_mountpoint_of_a_missing_disk() {
    let mut bench = Bench::new(&["a"]);
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("above/replica");
    spec_of(&root, dir.path()).prepare().await.unwrap();
    // Each turn is a daemon of its own: nothing is remembered but cursors.
    let fresh = |bench: &mut Bench| {
        bench.replicas[0] = Arc::new(Replica::new(spec_of(&root, dir.path())));
        bench.closing = watch::channel(false).0;
        bench.start(0)
    };
    let segment = |n| root.join(segment_path(n, 1));
    bench.outbox.seal(1, 100);
    let task = fresh(&mut bench);
    bench.reaches(0, 1).await;
    let filesystem = bench.cursors.1.lock().values().next().unwrap().clone();
    task.abort();
    // Wiped, and deleted with what is above it, on the same filesystem: it heals by itself.
    for wiped in [&root, &dir.path().join("above")] {
        std::fs::remove_dir_all(wiped).unwrap();
        if *wiped == root {
            std::fs::create_dir(&root).unwrap();
        }
        let task = fresh(&mut bench);
        bench.reaches(0, 1).await;
        assert!(segment(1).exists());
        task.abort();
    }
    // Empty, or missing, on another filesystem than before: nothing is written.
    for missing in [false, true] {
        std::fs::remove_dir_all(&root).unwrap();
        if !missing {
            std::fs::create_dir(&root).unwrap();
        }
        bench.cursors.1.lock().insert("a".parse().unwrap(), "fff0:fff1".into());
        let task = fresh(&mut bench);
        bench.eventually("the complaint", || bench.status(0).last_error.is_some()).await;
        let text = bench.status(0).last_error.unwrap().text;
        assert!(text.contains("is its disk mounted"), "{text}");
        bench.eventually("the state", || bench.status(0).state == ReplicaState::Offline).await;
        tokio::time::sleep(Duration::from_millis(300)).await;
        assert!(!root.exists() || std::fs::read_dir(&root).unwrap().next().is_none());
        assert_eq!(bench.cursors.0.lock().values().copied().collect::<Vec<_>>(), [SegmentNo(1)]);
        // The disk is back.
        bench.cursors.1.lock().insert("a".parse().unwrap(), filesystem.clone());
        bench.reaches(0, 1).await;
        bench.eventually("the segment", || segment(1).exists()).await;
        task.abort();
    }
}

fn spec_of(root: &std::path::Path, cwd: &std::path::Path) -> Store {
    let none = std::collections::BTreeMap::new();
    let spec = crate::replica::ReplicaSpec::parse("a".parse().unwrap(), root.to_str().unwrap(), none, cwd);
    spec.unwrap().store().unwrap()
}
