//! Tests of removing a claim: what is refused, what is shown, what is gone afterwards.

use bytes::Bytes;

use super::*;
use crate::format::volume::testing::{claim, volume};
use crate::ids::SegmentNo;
use crate::replica::FenceNote;

async fn replica(name: &str, claims: &[Claim]) -> Store {
    let store = Store::in_memory(name.parse().unwrap());
    volume::create(&store, &volume(1)).await.unwrap();
    for claim in claims {
        volume::put_claim(&store, claim).await.unwrap();
    }
    store
}

/// A state folder of the writer of `own`, fenced by `by`.
fn fenced_state(dir: &std::path::Path, own: &Claim, by: &Claim) {
    let state = StateDir::lock(dir).unwrap();
    let mut local = Local::new(volume(1), vec![own.clone()], false);
    local.own_since = own.epoch;
    local.fenced = Some(FenceNote {
        at: 7,
        replica: "a".parse().unwrap(),
        epoch: by.epoch,
        claim: Some(by.clone()),
        first_segment: None,
        text: "taken over".into(),
    });
    state.write(&local).unwrap();
}

async fn objects(store: &Store) -> Vec<String> {
    store.list("").await.unwrap().into_iter().map(|o| o.path).collect()
}

#[tokio::test]
async fn only_what_one_replica_shows_is_removed_and_only_on_consent() {
    let own = claim(1, 1, 1);
    let forged = claim(u32::MAX, 9, 1);
    let a = replica("a", &[own.clone(), forged.clone()]).await;
    let b = replica("b", std::slice::from_ref(&own)).await;
    let (mine, theirs) =
        (ObjectName::Segment(SegmentNo(1), Epoch(1)), ObjectName::Segment(SegmentNo(1), forged.epoch));
    for name in [mine, theirs] {
        a.put(&name.path(), Bytes::from_static(b"12345")).await.unwrap();
    }
    let before = objects(&a).await;
    let others = [b.clone()];
    let ask = |discard| void_claim(&a, &others, None, forged.epoch, discard);
    let report = ask(false).await.unwrap();
    assert_eq!(report.claim.as_ref(), Some(&forged));
    assert_eq!((report.segments, report.bytes, report.removed), (1, 5, false));
    assert_eq!(objects(&a).await, before, "looking changes nothing");
    // What more than half of the replicas hold is no forgery.
    let refused = void_claim(&a, &others, None, own.epoch, true).await.unwrap_err();
    assert_eq!(refused.exit_code(), Exit::InUse);
    assert!(refused.to_string().contains("also on b"), "{refused}");
    assert_eq!(objects(&a).await, before);
    assert!(ask(true).await.unwrap().removed);
    assert_eq!(objects(&a).await, [ObjectName::Claim(Epoch(1)).path(), mine.path(), "volume.json".into()]);
    assert_eq!(ask(true).await.unwrap_err().exit_code(), Exit::Usage, "nothing is left of it");
}

#[tokio::test]
async fn a_state_is_used_again_and_its_own_claims_are_safe() {
    let (own, forged) = (claim(3, 1, 1), claim(4, 9, 1));
    let a = replica("a", &[own.clone(), forged.clone()]).await;
    let dir = tempfile::tempdir().unwrap();
    fenced_state(dir.path(), &own, &forged);
    let fenced = || StateDir::lock(dir.path()).unwrap().read().unwrap().unwrap().fenced.is_some();
    let ask = |epoch, discard| void_claim(&a, &[], Some(dir.path()), epoch, discard);
    let refused = ask(own.epoch, true).await.unwrap_err();
    assert!(refused.to_string().contains("own"), "{refused}");
    assert!(ask(forged.epoch, false).await.unwrap().fenced.is_some() && fenced());
    // The claim was deleted by hand: the state is used again all the same.
    a.delete(&ObjectName::Claim(forged.epoch).path()).await.unwrap();
    let report = ask(forged.epoch, true).await.unwrap();
    assert!(report.claim.is_none() && report.removed && !fenced());
    let busy = StateDir::lock(dir.path()).unwrap();
    assert_eq!(ask(forged.epoch, true).await.unwrap_err().exit_code(), Exit::InUse);
    drop(busy);
    let nowhere = void_claim(&a, &[], Some(std::path::Path::new("/nowhere")), forged.epoch, true).await;
    assert_eq!(nowhere.unwrap_err().exit_code(), Exit::Usage);
}

#[tokio::test]
async fn a_forged_claim_of_our_own_epoch_goes_without_what_we_have_written() {
    let (own, forged) = (claim(3, 1, 1), claim(3, 9, 1));
    let a = replica("a", std::slice::from_ref(&forged)).await;
    let segment = ObjectName::Segment(SegmentNo(1), Epoch(3)).path();
    a.put(&segment, Bytes::from_static(b"ours")).await.unwrap();
    let dir = tempfile::tempdir().unwrap();
    fenced_state(dir.path(), &own, &forged);
    let report = void_claim(&a, &[], Some(dir.path()), forged.epoch, true).await.unwrap();
    assert!(report.removed && report.segments == 0);
    assert_eq!(objects(&a).await, [segment, "volume.json".into()]);
    assert!(StateDir::lock(dir.path()).unwrap().read().unwrap().unwrap().fenced.is_none());
}
