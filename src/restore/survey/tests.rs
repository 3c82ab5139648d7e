//! Tests of the survey: what is found, and each way in which a replica cannot be used.

use super::super::testing::World;
use super::*;
use crate::replica::fault::{Fault, Op, Rule};

async fn two() -> World {
    let mut world = World::new(2).await;
    world.noise(3);
    world.cut(1, true).await;
    world.checkpoint().await;
    world
}

#[tokio::test]
async fn finds_everything_and_ignores_foreign_objects() {
    let world = two().await;
    world.put_all("segments/readme.txt", b"x".to_vec()).await;
    world.put_all("epochs/old/x.json", b"x".to_vec()).await;
    let found = survey(&world.stores).await;
    assert_eq!(found.len(), 2);
    for inventory in found {
        let found = inventory.found.unwrap();
        assert_eq!(found.volume, Some(world.volume.clone()));
        assert_eq!(found.claims[&Epoch(1)].first_segment, SegmentNo(1));
        assert_eq!(found.segments.len(), 1);
        assert_eq!(found.checkpoints.keys().copied().collect::<Vec<_>>(), [(SegmentNo(1), Epoch(1))]);
        assert!(found.damaged.is_empty(), "{:?}", found.damaged);
    }
}

#[tokio::test]
async fn names_what_is_damaged() {
    let world = two().await;
    let stem = "checkpoints/0000000000000001-00000001";
    world.spoil(0, "volume.json", 40).await;
    world.spoil(0, "epochs/00000001.json", 90).await;
    world.spoil(0, &format!("{stem}/manifest"), 90).await;
    world.shorten(1, &format!("{stem}/part-00000"), 1).await;
    let found: Vec<_> = survey(&world.stores).await.into_iter().map(|i| i.found.unwrap()).collect();
    assert_eq!(found[0].volume, None);
    let objects: Vec<_> = found[0].damaged.iter().map(|d| d.object.as_str()).collect();
    assert_eq!(objects, ["volume.json", "epochs/00000001.json", &format!("{stem}/manifest")]);
    assert!(found[0].claims.is_empty() && found[0].checkpoints.is_empty());
    assert_eq!(found[1].damaged[0].object, format!("{stem}/part-00000"));
    assert_eq!(found[1].checkpoints.len(), 1);
}

#[tokio::test]
async fn unusable_replicas_are_errors_with_their_name() {
    let world = two().await;
    world.faults[0].partition(true);
    let found = survey(&world.stores).await;
    let error = found[0].found.as_ref().unwrap_err();
    assert!(matches!(error, SurveyError::Unreachable(_)), "{error}");
    assert!(error.to_string().contains("alpha"));
    assert!(found[1].found.is_ok());
    world.faults[0].partition(false);
    // An error of listing is an error, not an empty replica.
    world.faults[0].add(Rule::always(Fault::Before(ErrorKind::Denied), &[Op::List]));
    assert!(matches!(survey(&world.stores).await[0].found, Err(SurveyError::Unreachable(_))));
    world.faults[0].clear();

    world.delete(0, "volume.json").await;
    let error = survey(&world.stores).await.remove(0).found.unwrap_err();
    assert!(matches!(error, SurveyError::NoVolume { .. }));
    assert!(error.to_string().contains("alpha"));

    let text = String::from_utf8(world.volume.encode().unwrap()).unwrap();
    let (body, _) = text.split_once(",\n  \"blake3\"").unwrap();
    let body = body.replace("\"format_version\": 1", "\"format_version\": 9");
    let hash = blake3::hash(body.as_bytes()).to_hex();
    let newer = format!("{body},\n  \"blake3\": \"{hash}\"\n}}\n");
    world.stores[0].put("volume.json", newer.into()).await.unwrap();
    let error = survey(&world.stores).await.remove(0).found.unwrap_err();
    assert!(error.to_string().contains("upgrade"), "{error}");
}
