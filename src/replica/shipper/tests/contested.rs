//! One of three replicas shows what the others do not.

use super::*;

#[tokio::test]
async fn one_of_three_that_shows_another_writer_is_set_apart() {
    let whole = |c: Claim| (ObjectName::Claim(c.epoch).path(), claim_bytes(&c));
    let (ahead, _) = crate::replica::testing::segment(9, 1, &[crate::replica::testing::content(7, 900)]);
    for (path, bytes) in [
        whole(claim(2, 9, 1)),
        whole(claim(u32::MAX, 9, 1)),
        (ObjectName::Claim(Epoch(2)).path(), Bytes::from_static(b"junk")),
        (segment_path(9, 1), ahead.into()),
    ] {
        let bench = Bench::new(&["a", "b", "c"]);
        bench.fence.ask(Roster::new(bench.replicas.clone()));
        let tasks: Vec<_> = (0..3).map(|i| bench.start(i)).collect();
        bench.outbox.seal(1, 10);
        for i in 0..3 {
            bench.reaches(i, 1).await;
        }
        bench.stores[0].put(&path, bytes.clone()).await.unwrap();
        bench.replicas[0].recheck();
        bench.eventually("it is set apart", || bench.status(0).state == ReplicaState::Foreign).await;
        let text = bench.status(0).last_error.unwrap().text;
        let remedy = if path.starts_with("epochs") { "void-claim a" } else { "delete segments/" };
        assert!(text.contains("replica a") && text.contains(remedy), "{path}: {text}");
        // The others go on, and nothing of it comes to them.
        bench.outbox.seal(1, 10);
        bench.reaches(1, 2).await;
        bench.reaches(2, 2).await;
        assert!(bench.fence.seen().is_none() && bench.stores[1].head(&path).await.is_err(), "{path}");
        assert!(bench.stores[0].head(&segment_path(2, 1)).await.is_err(), "{path}");
        // Removed, the replica is the volume's again; on two of three it is the truth.
        bench.stores[0].delete(&path).await.unwrap();
        bench.reaches(0, 2).await;
        if path == ObjectName::Claim(Epoch(2)).path() && bytes.len() > 4 {
            bench.stores[0].put(&path, bytes.clone()).await.unwrap();
            bench.stores[2].put(&path, bytes.clone()).await.unwrap();
            bench.replicas[0].recheck();
            bench.eventually("two of three are believed", || bench.fence.seen().is_some()).await;
            for task in tasks {
                tokio::time::timeout(SOON, task).await.unwrap().unwrap();
            }
        }
    }
}
