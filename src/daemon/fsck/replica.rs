//! A replica: what it restores, in itself and against the local tables, and whether it holds what it should.
//!
//! Owns the order of these looks. Reading the replica is `crate::restore`'s, what it should hold and whether an object is intact
//! `crate::reconcile`'s. Writes nothing.

use std::collections::{BTreeMap, HashSet};

use bytes::Bytes;
use futures::StreamExt;
use futures::stream;

use super::FsckArgs;
use crate::daemon::Error;
use crate::daemon::fleet::cursor_of;
use crate::exit::Exit;
use crate::format::local::{SealedMark, SegmentValue};
use crate::format::names::ObjectName;
use crate::format::segment::SegmentHash;
use crate::format::tables::{number_of_key, prefix_range, table};
use crate::format::volume::{Claim, Volume};
use crate::fsck::{self, Findings, Input, Kind, Names, Place, Reporter, Stop};
use crate::ids::{Lsn, SegmentNo};
use crate::journal::Journal;
use crate::reconcile::plan::{Expected, Wrong};
use crate::reconcile::{self, Known, Verdict};
use crate::replica::{Identity, Store};
use crate::restore::fetch::{Meaning, Patience, meaning, read};
use crate::restore::{self, Loaded, Plan, SurveyError, Tables};

/// Objects read at a time.
const AT_ONCE: usize = 4;
/// Rows read at a time.
const PAGE: usize = 4096;

/// The local tables with which a replica is compared.
pub(in crate::daemon) struct Ground<'a> {
    pub input: &'a Input<'a>,
    pub volume: &'a Volume,
    pub claims: &'a [Claim],
    pub mark: SealedMark,
    /// All that the tables know.
    pub segments: BTreeMap<SegmentNo, SegmentValue>,
    /// Replicated keys that were changed since the mark; `None` when that is not known any more.
    pub touched: Option<HashSet<Bytes>>,
}

/// The keys that records in `(after, upto]` change.
pub(in crate::daemon) fn touched(journal: &Journal, after: Lsn, upto: Lsn) -> Option<HashSet<Bytes>> {
    let mut keys = HashSet::new();
    for record in journal.records(after, upto).ok()? {
        keys.extend(record.ok()?.ops.iter().map(|op| op.key().clone()));
    }
    Some(keys)
}

/// Checks one replica. One that cannot be looked at is reported as such; an error is only that the check was cancelled.
pub(in crate::daemon) async fn check(
    store: &Store,
    ground: Option<&Ground<'_>>,
    args: &FsckArgs<'_>,
    reporter: &mut Reporter,
) -> Result<(), Error> {
    match examine(store, ground, args, reporter).await {
        Err(e) if !(args.cancelled)() => {
            reporter.fail(e.to_string());
            Ok(())
        }
        other => other,
    }
}

/// An error says why it could not be looked at.
async fn examine(
    store: &Store,
    ground: Option<&Ground<'_>>,
    args: &FsckArgs<'_>,
    reporter: &mut Reporter,
) -> Result<(), Error> {
    let name = store.name().clone();
    let mut findings = Findings::new(args.limit);
    let inventories = restore::survey(std::slice::from_ref(store)).await;
    for inventory in &inventories {
        match &inventory.found {
            Ok(_) => {}
            Err(e @ SurveyError::Unreachable(_)) => return Err(Error::new(Exit::Unreachable, e.to_string())),
            Err(e @ SurveyError::Newer { .. }) => return Err(Error::new(Exit::TooNew, e.to_string())),
            Err(e @ SurveyError::NoVolume { .. }) => return Err(Error::new(Exit::NoVolume, e.to_string())),
        }
    }
    // Whatever else cannot be made out, this can.
    if let Some(ground) = ground {
        listing(store, ground, &mut findings).await?;
    }
    let expected = ground.map(|g| g.volume.volume);
    let plan = match restore::plan(&inventories, expected) {
        Ok(plan) => plan,
        Err(e) => {
            findings.about(Kind::ReplicaVolume, None, || format!("replica {name}: {e}"));
            reporter.left(&findings, &Names::default(), true);
            return Ok(());
        }
    };
    let mut tables = Tables::default();
    match restore::load(&plan, std::slice::from_ref(store), &mut tables).await {
        Ok(loaded) => look_at(store, &plan, &loaded, &tables, ground, args, reporter)?,
        Err(e @ (restore::LoadError::Unavailable { .. } | restore::LoadError::Newer { .. })) => return Err(e.into()),
        Err(e) => findings.about(Kind::ReplicaVolume, None, || {
            format!("replica {name} cannot be restored alone: {e}; mend it with mirrorfs scrub --replica {name} --deep")
        }),
    }
    drop(tables);
    if args.deep {
        let claims = ground.map_or_else(|| plan.claims.values().cloned().collect(), |g| g.claims.to_vec());
        let none = BTreeMap::new();
        let hashes = ground.map_or(&none, |g| &g.segments);
        deep(store, &plan, Identity { volume: plan.volume.clone(), claims }, hashes, args, &mut findings)
            .await?;
    }
    reporter.left(&findings, &Names::default(), true);
    Ok(())
}

/// The replica's tables in themselves, and against the local ones.
fn look_at(
    store: &Store,
    plan: &Plan,
    loaded: &Loaded,
    tables: &Tables,
    ground: Option<&Ground<'_>>,
    args: &FsckArgs<'_>,
    reporter: &mut Reporter,
) -> Result<(), Error> {
    let name = store.name();
    let segments = loaded.segments.iter().map(|s| {
        let (blake3, commit) = (s.hash.unwrap_or_default().0, s.commit.unwrap_or_default());
        (s.number, SegmentValue { epoch: s.epoch, len: s.len, blake3, commit, cut_at: 0.0, live: 0 })
    });
    let segments: BTreeMap<SegmentNo, SegmentValue> = segments.collect();
    let input = Input {
        source: tables,
        block_size: plan.volume.block_size,
        segments: Some(&segments),
        slots_len: None,
        last_lsn: Some(loaded.commit_lsn),
        cancelled: args.cancelled,
    };
    let mut checked = fsck::check(&input, args.limit)?;
    for damage in &loaded.damaged {
        checked
            .findings
            .about(Kind::ReplicaObject, None, || format!("{} is damaged: {}", damage.object, damage.why));
    }
    if let Some(lost) = &loaded.lost {
        // Several segments are under way at a time, and may arrive in any order.
        let cursor = ground.map(|g| cursor(g.input, store)).transpose()?;
        if cursor.is_some_and(|cursor| lost.from > cursor) {
            reporter.note(format!(
                "replica {name} has some of segments {} to {} and lacks others, which are still to be sent",
                lost.from, lost.upto
            ));
        } else {
            checked.findings.about(Kind::ReplicaVolume, None, || {
                format!("segments {} to {} cannot be restored: {}", lost.from, lost.upto, lost.why)
            });
        }
    }
    if ground.is_none() {
        reporter.totals(checked.totals);
    }
    let names = fsck::name_all(&input, &checked, checked.findings.list().iter().map(|f| &f.place))?;
    let findings = checked.findings.on(&format!("replica {name}"));
    reporter.left(&findings, &names, true);
    let (n, segment) = (checked.totals.inodes, loaded.last_segment);
    reporter.note(format!("replica {name} restores {n} inodes, as of segment {segment}"));
    match ground {
        Some(ground) => metadata(store, loaded, tables, ground, args, reporter),
        None => Ok(()),
    }
}

fn metadata(
    store: &Store,
    loaded: &Loaded,
    tables: &Tables,
    ground: &Ground<'_>,
    args: &FsckArgs<'_>,
    reporter: &mut Reporter,
) -> Result<(), Error> {
    let name = store.name();
    let behind = ground.mark.segment.0.saturating_sub(loaded.last_segment.0);
    let Some(touched) = ground.touched.as_ref().filter(|_| loaded.last_segment == ground.mark.segment) else {
        reporter.note(match behind {
            0 => format!("replica {name}: its metadata was not compared, as the volume is being changed"),
            n => format!("replica {name}: it lacks {n} segments that are still to be sent; its metadata was not compared"),
        });
        return Ok(());
    };
    let mut findings = Findings::new(args.limit);
    fsck::compare(ground.input.source, tables, touched, args.cancelled, &mut |differs| {
        findings.push(Kind::ReplicaDiffers, differs.place(), None, || {
            format!("replica {name} at segment {}: {}", loaded.last_segment, differs.text())
        });
    })?;
    if findings.list().is_empty() {
        reporter.note(format!(
            "replica {name} has the same metadata as this machine at segment {}",
            loaded.last_segment
        ));
        return Ok(());
    }
    // Paths as they are here.
    let checked = fsck::check(ground.input, 0)?;
    let names = fsck::name_all(ground.input, &checked, findings.list().iter().map(|f| &f.place))?;
    reporter.left(&findings, &names, true);
    Ok(())
}

/// All segments that the local tables know.
pub(in crate::daemon) fn segments(input: &Input<'_>) -> Result<BTreeMap<SegmentNo, SegmentValue>, Stop> {
    let mut all = BTreeMap::new();
    let mut rows = input.rows(table::SEGMENT);
    while let Some((key, value)) = rows.next()? {
        if let (Some(number), Ok(value)) = (number_of_key(&key), SegmentValue::decode(&value)) {
            all.insert(SegmentNo(number), value);
        }
    }
    Ok(all)
}

/// How far the replica is, by its name and place or, when it is called by another name now, by its place.
fn cursor(input: &Input<'_>, store: &Store) -> Result<SegmentNo, Stop> {
    let number = |v: &[u8]| SegmentNo(v.try_into().map_or(0, u64::from_le_bytes));
    if let Some(value) = input.source.get(&cursor_of(store.name(), store.url()))? {
        return Ok(number(&value));
    }
    let (start, end) = prefix_range(&[table::CURSOR]);
    let is_place = |key: &[u8]| key[1..].splitn(2, |b| *b == b' ').nth(1) == Some(store.url().as_bytes());
    let rows = input.source.scan(&start, &end, PAGE)?;
    Ok(rows.iter().find(|(key, _)| is_place(key)).map_or(SegmentNo(0), |(_, v)| number(v)))
}

/// Compares the replica's list of objects with what the local tables say that it holds.
async fn listing(store: &Store, ground: &Ground<'_>, findings: &mut Findings) -> Result<(), Error> {
    let name = store.name();
    let cursor = cursor(ground.input, store)?;
    let listed = store.list("").await.map_err(|e| Error::new(Exit::Unreachable, e.to_string()))?;
    let found: BTreeMap<String, u64> = listed.into_iter().map(|o| (o.path, o.size)).collect();
    let expected = Expected {
        cursor,
        segments: ground.segments.iter().map(|(n, v)| (*n, (v.epoch, v.len))).collect(),
        // A claim is put by the shipper of a replica that was away, before anything else.
        claims: ground.claims.iter().filter(|c| c.first_segment <= cursor).cloned().collect(),
        ..Expected::default()
    };
    for (object, wrong) in expected.compare(&found).wrong {
        findings.about(Kind::ReplicaObject, None, || {
            let what = match wrong {
                Wrong::Missing => "is missing".to_owned(),
                Wrong::Size(size) => format!("has {size} bytes, which is not its size"),
            };
            format!("replica {name}: {} {what}: mend it with mirrorfs scrub --replica {name}", object.path())
        });
    }
    Ok(())
}

/// Reads every segment and checkpoint that counts and verifies it.
async fn deep(
    store: &Store,
    plan: &Plan,
    identity: Identity,
    known: &BTreeMap<SegmentNo, SegmentValue>,
    args: &FsckArgs<'_>,
    findings: &mut Findings,
) -> Result<(), Error> {
    let name = store.name();
    let objects = plan.segments.values().map(|place| ObjectName::Segment(place.number, place.epoch));
    let claims = plan.claims.keys().map(|epoch| ObjectName::Claim(*epoch));
    let all: Vec<ObjectName> = std::iter::once(ObjectName::Volume).chain(claims).chain(objects).collect();
    let mut read = stream::iter(all)
        .map(|object| async move { (object, read(store, &object.path(), None, Patience::Full).await) })
        .buffered(AT_ONCE);
    while let Some((object, got)) = read.next().await {
        if (args.cancelled)() {
            return Err(Stop::Cancelled.into());
        }
        let hash = match object {
            ObjectName::Segment(number, _) => known.get(&number).map(|v| v.blake3).filter(|h| *h != [0; 32]),
            _ => None,
        };
        let known = Known { hash: hash.map(SegmentHash), ..Known::default() };
        let why = match got {
            Ok(bytes) => match reconcile::check(&object, &bytes, &identity, known) {
                Verdict::Intact => continue,
                Verdict::Damaged(why) | Verdict::Other(why) => why,
            },
            // What was not read is not known to be damaged.
            Err(e) if meaning(&e) == Meaning::Unreachable => {
                return Err(Error::new(Exit::Unreachable, e.to_string()));
            }
            Err(e) => e.to_string(),
        };
        findings.push(Kind::ReplicaObject, Place::Volume, None, || {
            format!(
                "replica {name}: {} is damaged ({why}): mend it with mirrorfs scrub --replica {name} --deep",
                object.path()
            )
        });
    }
    Ok(())
}
