//! From what was decided to open parts: journal, block store, the sealed mark.
//!
//! Owns building, rebuilding and borrowing a local state. Starts no thread of the mount.

use std::collections::BTreeMap;
use std::fs;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use futures::future::join_all;

use super::fleet::cursor_of;
use super::open::{self, Decision};
use super::permit::{self, Question};
use super::rebuild::rebuild;
use super::restore::{self, Restored};
use super::state::{Local, StateDir};
use super::{Error, Takeover, random, unix_now};
use crate::cache::BlockStore;
use crate::cache::slots::SlotFile;
use crate::config::Config;
use crate::exit::Exit;
use crate::format::local::{SEALED_MARK, SealedMark};
use crate::format::names::ObjectName;
use crate::format::tables::local_key;
use crate::format::volume::{Claim, NO_SEGMENT};
use crate::ids::{Epoch, ReplicaName, SegmentNo, VolumeId};
use crate::journal::{self, Journal, JournalError, Opened};
use crate::replica::belief::{Testimony, Verdict, epoch_after, judge};
use crate::replica::volume::{self, Found, Tenures, VolumeError};
use crate::replica::{FenceNote, FenceReason, Fenced, Store, footer_of};
use crate::restore::SurveyError;
use crate::vfs;

/// The open local state.
pub(super) struct Parts {
    pub local: Local,
    pub journal: Arc<Journal>,
    pub blocks: Arc<BlockStore>,
    pub mark: SealedMark,
    pub notes: Vec<String>,
    /// Claims that the other replicas contradict: nothing is written to a replica as long as it holds its one.
    pub contests: Contests,
}

/// Disk space kept back so that a full disk still lets the journal open and begin a new file.
const BALLAST: u64 = 32 << 20;
/// With less disk than this the ballast is given up, and none is laid aside.
const SCARCE: u64 = 48 << 20;

/// Where the journal's data hook finds the slot file, which is opened after it.
pub(super) type SlotCell = Arc<OnceLock<Arc<SlotFile>>>;

fn open_journal(state: &StateDir, slots: &SlotCell) -> Result<(Arc<Journal>, Opened), JournalError> {
    let slots = Arc::clone(slots);
    let sync = move |mark| slots.get().map_or(Ok(()), |s| s.sync(mark));
    Journal::open(journal::Options { form: vfs::FORM, ..journal::Options::new(state.path(), Arc::new(sync)) })
}

/// Opens the journal; when the disk is full, gives up the ballast first. Lays it aside again when there is plenty.
pub(super) fn open_with_ballast(
    state: &StateDir,
    slots: &SlotCell,
) -> Result<(Arc<Journal>, Opened), JournalError> {
    let ballast = state.path().join("ballast");
    let free = || {
        let disk = rustix::fs::statvfs(state.path());
        disk.map_or(u64::MAX, |d| d.f_bavail.saturating_mul(d.f_frsize))
    };
    if free() < SCARCE && ballast.exists() {
        log::warn!(
            "the disk of the state folder is full; giving up {} to be able to start",
            ballast.display()
        );
        let _ = fs::remove_file(&ballast);
    }
    let opened = open_journal(state, slots);
    let laid_aside = fs::metadata(&ballast).map_or(0, |m| m.len());
    if opened.is_ok() && laid_aside < BALLAST && free() >= BALLAST + 2 * SCARCE {
        let filled = fs::File::create(&ballast).and_then(|f| {
            use std::os::fd::AsRawFd;
            // SAFETY: the descriptor is open; fallocate touches no memory of ours.
            match unsafe { libc::fallocate(f.as_raw_fd(), 0, 0, BALLAST as i64) } {
                0 => Ok(()),
                _ => Err(std::io::Error::last_os_error()),
            }
        });
        if let Err(e) = filled {
            log::warn!("no ballast could be laid aside: {e}");
            let _ = fs::remove_file(&ballast);
        }
    }
    opened
}

/// Opens, builds or rebuilds the local state as `decision` says, and claims the epoch of this mount. `takeover`: see
/// [`permit::permit`].
pub(super) async fn open(
    config: &Config,
    state: &StateDir,
    stores: &[Store],
    seen: &[open::Seen],
    local: Option<Local>,
    decision: Decision,
    takeover: &Takeover,
) -> Result<Parts, Error> {
    let slots = SlotCell::default();
    let mut notes = Vec::new();
    let (local, journal, contests) = match (decision, local) {
        (Decision::GoOn { warnings }, Some(local)) => {
            notes.extend(warnings);
            go_on(config, state, &slots, seen, local, &mut notes).await?
        }
        (Decision::Create, _) => {
            if config.read_only {
                return Err(Error::new(
                    Exit::NoVolume,
                    "there is no volume on these replicas, and a read-only mount creates none",
                ));
            }
            set_aside(state, &mut notes)?;
            let volume = super::create(config, stores).await?;
            notes.push(format!(
                "created a new volume {} on {}",
                volume.volume,
                stores.iter().map(Store::url).collect::<Vec<_>>().join(", ")
            ));
            let mut local = Local::new(volume, Vec::new(), false);
            let intended = intend(&mut local, Epoch(0), SegmentNo(1))?;
            state.intend(&intended)?;
            put_claim(&local, &intended, stores, &mut notes).await?;
            let (journal, _) = open_with_ballast(state, &slots)?;
            complete(state, &local)?;
            (local, journal, Contests::new())
        }
        (decision, _) => {
            let without = match decision {
                Decision::Restore { warnings, without } => {
                    notes.extend(warnings);
                    without
                }
                Decision::GoOn { .. } | Decision::Create => Vec::new(),
            };
            set_aside(state, &mut notes)?;
            let (local, mut restored) =
                take_over(config, state, seen, &without, takeover, &mut notes).await?;
            let contests = std::mem::take(&mut restored.contests);
            describe(&restored, &mut notes);
            let (journal, _) = open_with_ballast(state, &slots)?;
            restore::import(&journal, &mut restored)?;
            restore::forget_unnamed(&journal, &restored.loaded.unnamed)?;
            save_cursors(&journal, &holders(seen, None), &restored.cursors)?;
            complete(state, &local)?;
            (local, journal, contests)
        }
    };
    let blocks =
        BlockStore::open(&state.slots(), local.volume.block_size, config.cache_size, Arc::clone(&journal))
            .map_err(|e| Error::new(Exit::Failure, e.to_string()))?;
    blocks.space.set_free_ratio(config.free_space_ratio);
    let _ = slots.set(Arc::clone(blocks.slots()));
    let mark = sealed_mark(&journal)?;
    journal.release(mark.lsn);
    Ok(Parts { local, journal, blocks, mark, notes, contests })
}

pub(super) fn sealed_mark(journal: &Journal) -> Result<SealedMark, Error> {
    match journal.get(&local_key(SEALED_MARK))? {
        Some(value) => {
            SealedMark::decode(&value).map_err(|e| Error::new(Exit::Damaged, format!("local journal: {e}")))
        }
        None => Ok(SealedMark::default()),
    }
}

const GONE: &str = "the local journal is gone, and with it changes that no replica had";

/// Whether there is nothing of a journal in a state folder: to open it would make an empty one.
pub(super) fn journal_is_gone(state: &StateDir) -> bool {
    ["witness", "db", "tail"].iter().all(|name| state.path().join(name).symlink_metadata().is_err())
}

/// Goes on with the local state.
async fn go_on(
    config: &Config,
    state: &StateDir,
    slots: &SlotCell,
    seen: &[open::Seen],
    mut local: Local,
    notes: &mut Vec<String>,
) -> Result<(Local, Arc<Journal>, Contests), Error> {
    if let Some(note) = &local.fenced {
        return Err(open::refuse(note, state.path()));
    }
    let (answering, contests) = check_rivals(state, seen, &local, notes).await?;
    let opened = match &local.rebuild {
        Some(folder) => Err(format!("an earlier rebuild from {folder} was interrupted")),
        // An empty one that is made here would pass for the volume's at the next mount, if the rebuild failed.
        None if journal_is_gone(state) => Err(GONE.to_owned()),
        None => match open_with_ballast(state, slots) {
            Ok((journal, opened)) if opened.fresh => {
                journal.close()?;
                Err(GONE.to_owned())
            }
            Ok((journal, opened)) => {
                if !opened.clean {
                    let n = opened.replayed;
                    notes.push(format!("recovered after an unclean stop: {n} records replayed"));
                }
                Ok(journal)
            }
            Err(e @ (JournalError::Damaged(_) | JournalError::Incomplete(_))) => Err(e.to_string()),
            Err(e) => return Err(e.into()),
        },
    };
    let rebuilt = opened.is_err();
    let journal = match opened {
        Ok(journal) => journal,
        Err(why) => {
            require_replicas(state, &local, seen, &why)?;
            rebuild(state, slots, holders(seen, Some(local.volume.volume)), &mut local, &why, notes).await?
        }
    };
    if !config.read_only {
        let mark = sealed_mark(&journal)?;
        // A rebuilt state knows all that the replicas have committed; what was only begun there is a lost branch.
        if !rebuilt {
            refuse_older_state(state, &answering, &local, mark.segment, notes).await?;
        }
        let highest = local.claims.iter().map(|c| c.epoch).max().unwrap_or_default();
        let intended = intend(&mut local, highest, mark.segment.next())?;
        // Written down first: after a crash in between, the next mount knows the claim as its own.
        complete(state, &local)?;
        // The shippers put it where it could not be put now, before anything else.
        let holders = holders(seen, Some(local.volume.volume))
            .into_iter()
            .filter(|h| answering.iter().any(|a| a.name() == h.name()));
        put_claim(&local, &intended, &holders.collect::<Vec<_>>(), notes).await?;
    }
    Ok((local, journal, contests))
}

/// A replica that shows a claim which the others contradict.
pub(super) type Contests = Vec<(ReplicaName, Claim)>;

/// Asks all replicas whether another writer came after the local state. Gives those that answer and show none, and the claims that the
/// others contradict. Nothing is written, and nothing noted, before all have been heard.
async fn check_rivals(
    state: &StateDir,
    seen: &[open::Seen],
    local: &Local,
    notes: &mut Vec<String>,
) -> Result<(Vec<Store>, Contests), Error> {
    let left_out = open::outvoted(seen, Some(local.volume.volume));
    let reachable = seen.iter().filter(|s| s.found.is_ok() && !left_out.contains(s.store.name()));
    let reachable: Vec<Store> = reachable.map(|s| s.store.clone()).collect();
    let asked = tenures(&reachable, local).await;
    // Those that have not answered by now are left to their shippers.
    let (mut answering, mut said) = (Vec::new(), Vec::new());
    for (store, tenures) in reachable.iter().zip(asked) {
        match tenures {
            Ok(tenures) => {
                notes.extend(tenures.damaged.iter().map(|e| format!("needs repair: {e}")));
                said.push((store.name().clone(), open::testify(local, store, &tenures)));
                answering.push(store.clone());
            }
            Err(VolumeError::Store(e)) => notes.push(format!("its claims were not checked: {e}")),
            Err(e) => return Err(e.into()),
        }
    }
    let apart = match judge(&said) {
        Verdict::Ours { apart } => apart,
        Verdict::Unknown(said) => return Err(open::undecided(&said)),
        Verdict::TakenOver(by) => {
            let note = FenceNote::new(&by, unix_now() as u64);
            StateDir::note_fence(state.path(), &note)?;
            return Err(open::refuse(&note, state.path()));
        }
    };
    answering.retain(|store| !apart.iter().any(|(name, _)| name == store.name()));
    let contests = said.into_iter().filter_map(|(name, said)| match said {
        Testimony::Rival(by) => Some((name, by.claim()?.clone())),
        _ => None,
    });
    notes.extend(apart.into_iter().map(|(name, shown)| {
        format!(
            "nothing is written to replica {name}, and the other replicas do not show what it shows: {shown} (mirrorfs replica \
             void-claim removes such a claim)"
        )
    }));
    Ok((answering, contests.collect()))
}

/// Refuses to rebuild tables of which nothing at all is left here, unless every replica can be read: nobody could say how much those
/// hold that are away, and what is sealed behind the others would cut that off for good.
fn require_replicas(state: &StateDir, local: &Local, seen: &[open::Seen], why: &str) -> Result<(), Error> {
    let has_tail = |dir: &std::path::Path| dir.join("tail").symlink_metadata().is_ok();
    let aside = local.rebuild.as_ref().map(|name| state.path().join(name));
    if has_tail(state.path()) && local.rebuild.is_none() || aside.is_some_and(|dir| has_tail(&dir)) {
        return Ok(());
    }
    let unread = seen.iter().filter_map(|s| match &s.found {
        Ok(Found::Volume(_) | Found::Empty) => None,
        Ok(Found::Headless) => Some(format!("replica {} has no volume.json", s.store.name())),
        Err(e) => Some(e.to_string()),
    });
    let unread: Vec<String> = unread.collect();
    let any = seen.iter().any(|s| matches!(s.found, Ok(Found::Volume(_))));
    if any && unread.is_empty() {
        return Ok(());
    }
    let unread = if unread.is_empty() { "no replica holds the volume".to_owned() } else { unread.join("; ") };
    Err(Error::new(
        Exit::Unreachable,
        format!(
            "{why}; they can be rebuilt when all replicas can be read: {unread}. To go on without those that cannot, mount with an \
             empty --state folder"
        ),
    ))
}

/// The tenures that replicas show, asked for at once and without much patience.
async fn tenures(stores: &[Store], local: &Local) -> Vec<Result<Tenures, VolumeError>> {
    let ask = |store: &Store| {
        let store = open::quick(store);
        let ours = local.claims.iter().map(|c| c.epoch).max().unwrap_or_default();
        async move { volume::tenures(&store, local.volume.volume, ours).await }
    };
    join_all(stores.iter().map(ask)).await
}

/// Segments looked for behind our newest one; those of a group in flight may arrive out of order.
const LOOK_BEHIND: u64 = 4;

/// Refuses a state folder that is older than what the replicas hold of our own epoch: it was copied or rolled back, and what it would
/// write now would take the place of what its twin has written. A name alone proves nothing, and one replica less than the others.
async fn refuse_older_state(
    state: &StateDir,
    stores: &[Store],
    local: &Local,
    newest: SegmentNo,
    notes: &mut Vec<String>,
) -> Result<(), Error> {
    let (volume, epoch) = (local.volume.volume, local.epoch());
    let look = |store: &Store| {
        let (name, store) = (store.name().clone(), open::quick(store));
        async move {
            for number in (newest.0 + 1..=newest.0 + LOOK_BEHIND).map(SegmentNo) {
                match footer_of(&store, volume, number, epoch).await {
                    Ok(None) => {}
                    Ok(Some(_)) => {
                        let reason = FenceReason::Ahead { segment: number, epoch, newest };
                        let by = Fenced { replica: name.clone(), reason };
                        return (name, Testimony::Rival(Box::new(by)));
                    }
                    Err(_) => return (name, Testimony::Silent),
                }
            }
            (name, Testimony::Clear)
        }
    };
    match judge(&join_all(stores.iter().map(look)).await) {
        Verdict::TakenOver(by) => Err(Error::new(
            Exit::InUse,
            format!(
                "the state folder {} is older than what the replicas hold: {}, so that was written with another copy of this \
                 folder. Use that copy, or mount with an empty --state folder to go on from the replicas",
                state.path().display(),
                by.shown(),
            ),
        )),
        Verdict::Ours { apart } | Verdict::Unknown(apart) => {
            notes.extend(apart.into_iter().map(|(_, shown)| {
                format!(
                    "{shown}; the other replicas do not, so it is not believed, and nothing is written there"
                )
            }));
            Ok(())
        }
    }
}

/// The claim of this mount: the epoch after `highest`. It is entered into `local`, and counts once it is on a replica.
fn intend(local: &mut Local, highest: Epoch, first_segment: SegmentNo) -> Result<Claim, Error> {
    let epoch = epoch_after(highest).ok_or_else(|| {
        Error::new(
            Exit::Damaged,
            format!(
                "epoch {highest} is claimed, and no later one can be: that claim is forged or damaged. Remove it: mirrorfs replica \
                 void-claim REPLICA {highest}"
            ),
        )
    })?;
    let claim = Claim {
        volume: local.volume.volume,
        epoch,
        claim_id: random()?,
        host: host_name(),
        pid: std::process::id(),
        claimed_at: unix_now() as u64,
        first_segment,
        mirrorfs: env!("CARGO_PKG_VERSION").to_owned(),
    };
    if local.own_since == Epoch(0) {
        local.own_since = claim.epoch;
    }
    local.claims.push(claim.clone());
    Ok(claim)
}

/// Puts the claim on all of `stores` that can be reached. With a state that claimed before it is no error when none can:
/// the shippers put it there before anything else.
async fn put_claim(
    local: &Local,
    claim: &Claim,
    stores: &[Store],
    notes: &mut Vec<String>,
) -> Result<(), Error> {
    if stores.is_empty() && local.claims.len() > 1 {
        return Ok(());
    }
    match volume::claim(stores, claim, &local.claims).await {
        Ok(claimed) => {
            claimed.failed.iter().for_each(|e| log::warn!("the epoch is not claimed there yet: {e}"));
            notes.extend(claimed.refused.iter().map(|e| format!("nothing is written there: {e}")));
            Ok(())
        }
        Err(volume::VolumeError::Store(e)) if local.own_since != claim.epoch => {
            log::warn!("the epoch is not claimed on any replica yet: {e}");
            Ok(())
        }
        Err(e) => Err(e.into()),
    }
}

/// Wait before a restore begins anew because a replica does not answer any more.
const READ_AGAIN: Duration = Duration::from_secs(1);
/// How often a restore begins anew because the former writer was still writing.
const TAKE_OVER_TRIES: usize = 5;

/// Reads the volume back and claims the next epoch, when [`permit::permit`] allows it. What the former writer stored between
/// the reading and the claim would be lost, although he may have acknowledged it: the claim says at which segment the new branch begins,
/// and cannot be changed. So when somebody may still be writing, a claim comes first that only ends that: behind it he acknowledges
/// nothing more, and what is read then is all that he did.
async fn take_over(
    config: &Config,
    state: &StateDir,
    seen: &[open::Seen],
    without: &[String],
    takeover: &Takeover,
    notes: &mut Vec<String>,
) -> Result<(Local, Restored), Error> {
    let holders = holders(seen, None);
    let trust = permit::trust(takeover, &holders)?;
    for _ in 0..TAKE_OVER_TRIES {
        let own = state.intended();
        let (mut last, mut without) = (permit::LastTenure::default(), without.to_vec());
        let mut silent_names: Vec<ReplicaName> = Vec::new();
        let mut doubts = Vec::new();
        let restored = restore::fetch(&holders, &own, &trust, |inventories, plan| {
            let silent = inventories.iter().filter_map(|i| match &i.found {
                Err(e @ SurveyError::Unreachable(_)) => Some(e.to_string()),
                _ => None,
            });
            without.extend(silent);
            let gone = inventories.iter().filter(|i| i.found.is_err()).map(|i| i.replica.clone());
            silent_names.extend(gone);
            let reached = plan.starts.first().map_or(SegmentNo(0), |s| s.last);
            last = permit::last_tenure(inventories.iter().filter_map(|i| i.found.as_ref().ok()), plan, &own);
            doubts.clone_from(&plan.doubts);
            // Before much is read: by the listings alone.
            if config.read_only {
                return Ok(());
            }
            let question = Question { last: &last, own: &own, without: &without, doubts: &doubts };
            permit::permit(&question, reached, takeover).map(|_| ())
        })
        .await?;
        let loaded = &restored.loaded;
        let mut local = Local::new(loaded.volume.clone(), restored.claims.clone(), config.read_only);
        if config.read_only {
            notes.extend(doubts.iter().map(|d| format!("{d}; a read-only mount does not decide about that")));
            return Ok((local, restored));
        }
        let question = Question { last: &last, own: &own, without: &without, doubts: &doubts };
        let warnings = permit::permit(&question, loaded.last_segment, takeover)?;
        let highest = Epoch(loaded.next_epoch.0.saturating_sub(1));
        let ends = last.may_go_on(&own);
        let first = if ends { NO_SEGMENT } else { loaded.last_segment.next() };
        let intended = intend(&mut local, highest, first)?;
        state.intend(&intended)?;
        // A replica that holds a claim that does not count is not written to before that is removed.
        let contested = |s: &&Store| restored.contests.iter().any(|(name, _)| name == s.name());
        let claimants: Vec<Store> = holders.iter().filter(|s| !contested(s)).cloned().collect();
        put_claim(&local, &intended, &claimants, notes).await?;
        if ends {
            log::info!("the former writer's tenure is ended; reading what was stored by then");
            notes.extend(warnings);
            continue;
        }
        let (newer, failed) = restore::listed(&holders).await;
        if let Some(name) =
            failed.iter().find(|n| restored.cursors.contains_key(*n) && !silent_names.contains(*n))
        {
            // It may have been given more between the reading and the claim.
            log::warn!("replica {name} answered before and does not now; reading again");
            tokio::time::sleep(READ_AGAIN).await;
            continue;
        }
        let overtaken = newer.difference(&restored.listed).any(|(n, _)| *n > loaded.last_segment);
        if !overtaken {
            notes.extend(warnings);
            return Ok((local, restored));
        }
        log::info!("the former writer stored more meanwhile; reading again");
    }
    Err(Error::new(
        Exit::InUse,
        "another machine keeps writing to this volume, or a replica answers only now and then: unmount it there first, or leave \
         that replica out",
    ))
}

/// Completes the state folder: from now on it counts.
fn complete(state: &StateDir, local: &Local) -> Result<(), Error> {
    identity_into(state, local)?;
    state.write(local)
}

/// The replicas that hold the volume.
fn holders(seen: &[open::Seen], expected: Option<VolumeId>) -> Vec<Store> {
    let left_out = open::outvoted(seen, expected);
    let holds =
        |s: &&open::Seen| matches!(s.found, Ok(Found::Volume(_))) && !left_out.contains(s.store.name());
    seen.iter().filter(holds).map(|s| s.store.clone()).collect()
}

/// Whatever lies in the state folder without having been completed is kept, but out of the way.
fn set_aside(state: &StateDir, notes: &mut Vec<String>) -> Result<(), Error> {
    if let Some(folder) = state.set_aside(&format!("{:.0}", unix_now()))? {
        notes.push(format!("an unfinished local state was moved to {}", folder.display()));
    }
    Ok(())
}

pub(super) fn describe(restored: &Restored, notes: &mut Vec<String>) {
    let loaded = &restored.loaded;
    notes.push(format!(
        "brought volume {} back from its replicas, as of change {} (segment {})",
        loaded.volume.volume, loaded.commit_lsn, loaded.last_segment
    ));
    if let Some(lost) = &loaded.lost {
        notes.push(format!("segments {} to {} could not be used: {}", lost.from, lost.upto, lost.why));
    }
    notes.extend(loaded.warnings.iter().cloned());
    notes.extend(
        loaded.damaged.iter().map(|d| format!("replica {}: {} is damaged: {}", d.replica, d.object, d.why)),
    );
}

fn save_cursors(
    journal: &Journal,
    stores: &[Store],
    cursors: &BTreeMap<ReplicaName, SegmentNo>,
) -> Result<(), Error> {
    journal.transact::<_, JournalError>(|tx| {
        for store in stores {
            if let Some(cursor) = cursors.get(store.name()) {
                tx.put(cursor_of(store.name(), store.url()), cursor.0.to_le_bytes().to_vec());
            }
        }
        Ok(())
    })?;
    Ok(())
}

/// Lays the volume's small objects into the staging area, so that a rebuild can read it like a replica.
pub(super) fn identity_into(state: &StateDir, local: &Local) -> Result<(), Error> {
    let staging = state.staging();
    let failed = |e: &dyn std::fmt::Display| {
        Error::new(Exit::Failure, format!("cannot write to {}: {e}", staging.display()))
    };
    fs::create_dir_all(staging.join("epochs")).map_err(|e| failed(&e))?;
    let write = |name: ObjectName, bytes: Vec<u8>| fs::write(staging.join(name.path()), bytes);
    let bytes = local.volume.encode().map_err(|e| failed(&e))?;
    write(ObjectName::Volume, bytes).map_err(|e| failed(&e))?;
    for claim in &local.claims {
        let bytes = claim.encode().map_err(|e| failed(&e))?;
        write(ObjectName::Claim(claim.epoch), bytes).map_err(|e| failed(&e))?;
    }
    Ok(())
}

fn host_name() -> String {
    fs::read_to_string("/proc/sys/kernel/hostname").map_or_else(|_| "unknown".into(), |s| s.trim().to_owned())
}
