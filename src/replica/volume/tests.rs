//! Tests of `volume.json` and claims over memory with faults.

use bytes::Bytes;

use super::*;
use crate::format::volume::testing::{claim as make_claim, volume};
use crate::replica::fault::{Fault, Faults, Op, Rule};

fn faulty(name: &str) -> (Store, Faults) {
    let faults = Faults::new(3);
    (Store::in_memory(name.parse().unwrap()).wrapped(|s| faults.wrap(s)), faults)
}

#[tokio::test]
async fn a_volume_is_made_once_and_never_taken_for_another() {
    let (store, _) = faulty("a");
    assert_eq!(inspect(&store).await, Ok(Found::Empty));
    create(&store, &volume(1)).await.unwrap();
    create(&store, &volume(1)).await.unwrap();
    assert_eq!(expect(&store, volume(1).volume).await, Ok(Found::Volume(volume(1))));
    for result in [create(&store, &volume(2)).await, expect(&store, volume(2).volume).await.map(|_| ())] {
        let text = result.unwrap_err().to_string();
        assert!(text.contains(&volume(1).volume.to_string()) && text.contains(&volume(2).volume.to_string()));
    }
}

#[tokio::test]
async fn what_is_not_empty_is_told_apart() {
    let (store, _) = faulty("a");
    store.put("holiday/beach.jpg", Bytes::from_static(b"x")).await.unwrap();
    let error = inspect(&store).await.unwrap_err();
    assert!(
        matches!(&error, VolumeError::Foreign { example, .. } if example == "holiday/beach.jpg"),
        "{error}"
    );
    let (store, _) = faulty("b");
    store.put(&ObjectName::Segment(SegmentNo(1), Epoch(1)).path(), Bytes::new()).await.unwrap();
    assert_eq!(inspect(&store).await, Ok(Found::Headless));
    store.put("volume.json", Bytes::from_static(b"{}")).await.unwrap();
    assert!(matches!(inspect(&store).await, Err(VolumeError::Unreadable { .. })));
}

#[tokio::test]
async fn a_lost_race_names_the_holder_and_a_lost_answer_is_no_lost_race() {
    let (a, faults) = faulty("a");
    let (b, b_faults) = faulty("b");
    let stores = [b.clone(), a.clone()];
    faults.add(Rule::always(Fault::After(ErrorKind::Transient), &[Op::Create]).times(1));
    let claimed = claim(&stores, &make_claim(1, 7, 1), &[]).await.unwrap();
    assert_eq!(claimed.on.len(), 2);
    let error = claim(&stores, &make_claim(1, 8, 1), &[]).await.unwrap_err();
    assert!(matches!(&error, VolumeError::Held { claim, .. } if claim.claim_id == [7; 16]), "{error}");
    assert!(error.to_string().contains("host7"), "{error}");
    claim(&stores, &make_claim(1, 7, 1), &[]).await.unwrap();

    b_faults.partition(true);
    let claimed = claim(&stores, &make_claim(2, 7, 10), &[]).await.unwrap();
    assert_eq!((claimed.on.len(), claimed.failed.len()), (1, 1));
    faults.partition(true);
    assert!(matches!(claim(&stores, &make_claim(3, 7, 20), &[]).await, Err(VolumeError::Store(_))));
}

#[tokio::test]
async fn tenures_are_read_with_their_ends() {
    let (a, _) = faulty("a");
    let stores = [a.clone()];
    for (epoch, first) in [(2, 5), (1, 1), (3, 9)] {
        claim(&stores, &make_claim(epoch, epoch as u8, first), &[]).await.unwrap();
    }
    let end = |epoch: u32, id: u8| Release {
        volume: volume(1).volume,
        epoch: Epoch(epoch),
        claim_id: [id; 16],
        released_at: 3,
        last_segment: SegmentNo(8),
    };
    assert_eq!(release(&stores, &end(1, 1)).await, vec![]);
    assert_eq!(release(&stores, &end(2, 99)).await, vec![]);
    let found = tenures(&a, volume(1).volume, Epoch(0)).await.unwrap();
    assert_eq!((found.names.last(), found.damaged.len()), (Some(&Epoch(3)), 0));
    let found = found.known;
    let seen: Vec<_> = found.iter().map(|t| (t.claim.epoch.0, t.release.is_some())).collect();
    assert_eq!(seen, [(1, true), (2, false), (3, false)]);
    let others = tenures(&a, volume(2).volume, Epoch(0)).await.unwrap();
    assert!(others.known.is_empty() && others.unread.len() == 3, "another volume's claims prove nothing");
    let claims: Vec<_> = found.iter().map(|t| t.claim.clone()).collect();
    let epochs: Vec<_> = (0..11).map(|n| valid_epoch(&claims, SegmentNo(n)).map_or(0, |e| e.0)).collect();
    assert_eq!(epochs, [0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3]);
}

#[tokio::test]
async fn a_claim_that_fails_verification_hides_no_other() {
    let (a, _) = faulty("a");
    let stores = [a.clone()];
    for epoch in [1, 2, 3] {
        claim(&stores, &make_claim(epoch, epoch as u8, epoch.into()), &[]).await.unwrap();
    }
    let path = ObjectName::Claim(Epoch(3)).path();
    let whole = a.get(&path).await.unwrap();
    a.put(&path, Bytes::from_static(b"{ damaged")).await.unwrap();
    let found = tenures(&a, volume(1).volume, Epoch(0)).await.unwrap();
    assert_eq!(found.known.iter().map(|t| t.claim.epoch.0).collect::<Vec<_>>(), [1, 2]);
    assert_eq!(found.unread, [Epoch(3)].into());
    assert!(found.damaged.len() == 1 && found.damaged[0].to_string().contains(&path), "{found:?}");
    let text = String::from_utf8(whole.to_vec()).unwrap();
    let (body, _) = text.split_once(",\n  \"blake3\"").unwrap();
    let body = body.replace("\"format_version\": 1", "\"format_version\": 9");
    let newer = format!("{body},\n  \"blake3\": \"{}\"\n}}\n", blake3::hash(body.as_bytes()).to_hex());
    a.put(&path, newer.into_bytes().into()).await.unwrap();
    let found = tenures(&a, volume(1).volume, Epoch(0)).await.unwrap();
    assert_eq!((found.known.len(), &found.unread), (2, &[Epoch(3)].into()));
    assert!(!found.damaged[0].is_damage() && found.damaged[0].to_string().contains("upgrade"), "{found:?}");
    // A jump that no writer makes is damage, however whole the claim is.
    put_claim(&a, &make_claim(u32::MAX, 9, 1)).await.unwrap();
    let found = tenures(&a, volume(1).volume, Epoch(2)).await.unwrap();
    assert_eq!((found.known.len(), found.unread.len()), (2, 2));
    assert!(found.damaged.iter().any(|e| e.to_string().contains("epochs/ffffffff.json")), "{found:?}");
}

#[tokio::test]
async fn older_claims_are_put_first_and_one_replica_holds_up_no_other() {
    let (a, _) = faulty("a");
    let (b, b_faults) = faulty("b");
    let (c, _) = faulty("c");
    let stores = [a.clone(), b.clone(), c.clone()];
    let older: Vec<Claim> = (1..5).map(|e| make_claim(e, 7, e.into())).collect();
    // Junk in the place of the new claim: that replica is left out, and named.
    put_claim(&a, &older[0]).await.unwrap();
    a.put(&ObjectName::Claim(Epoch(5)).path(), Bytes::from_static(b"junk")).await.unwrap();
    let claimed = claim(&stores, &make_claim(5, 7, 9), &older).await.unwrap();
    assert_eq!(claimed.on.len(), 2);
    assert!(
        matches!(&claimed.refused[..], [VolumeError::Unreadable { replica, .. }] if replica.as_str() == "a")
    );
    for store in [&b, &c] {
        let found = tenures(store, volume(1).volume, Epoch(0)).await.unwrap();
        assert_eq!(found.known.len(), 5, "{}", store.name());
    }
    // Broken off before the new claim stands there, none of the older ones is missing.
    b_faults.add(Rule::always(Fault::Before(ErrorKind::Denied), &[Op::Create]));
    let older: Vec<Claim> = (1..9).map(|e| make_claim(e, 7, e.into())).collect();
    let claimed = claim(&stores, &make_claim(9, 7, 20), &older).await.unwrap();
    assert_eq!((claimed.on.len(), claimed.failed.len()), (2, 1));
    assert_eq!(tenures(&b, volume(1).volume, Epoch(0)).await.unwrap().known.len(), 5);
    // Another writer's claim on half of them wins, on fewer it does not.
    let (d, _) = faulty("d");
    put_claim(&d, &make_claim(1, 9, 1)).await.unwrap();
    let held = claim(&[c.clone(), d.clone()], &make_claim(10, 7, 30), &[]).await.unwrap();
    assert_eq!(held.on.len(), 2, "another epoch is no matter");
    put_claim(&d, &make_claim(11, 9, 30)).await.unwrap();
    let two = claim(&[c.clone(), d.clone()], &make_claim(11, 7, 30), &[]).await;
    assert!(matches!(two, Err(VolumeError::Held { .. })), "{two:?}");
    put_claim(&d, &make_claim(12, 9, 30)).await.unwrap();
    let three = claim(&[a, c, d], &make_claim(12, 7, 30), &[]).await.unwrap();
    assert_eq!((three.on.len(), three.refused.len()), (2, 1));
}

#[tokio::test]
async fn a_backend_without_conditions_is_refused_unless_accepted() {
    let (store, faults) = faulty("a");
    require_conditions(&store, 1).await.unwrap();
    faults.add(Rule::always(Fault::Before(ErrorKind::Unsupported), &[Op::Create]));
    assert!(matches!(require_conditions(&store, 2).await, Err(VolumeError::NoConditions { .. })));
    require_conditions(&store.without_conditions(), 3).await.unwrap();
}
