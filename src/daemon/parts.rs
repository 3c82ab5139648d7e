//! From what was decided to open parts: journal, block store, the sealed mark.
//!
//! Owns building, rebuilding and borrowing a local state. Starts no thread of the mount.

use std::collections::BTreeMap;
use std::fs;
use std::sync::{Arc, OnceLock};

use super::fleet::cursor_of;
use super::open::{self, Decision};
use super::restore::{self, Restored};
use super::state::{Local, StateDir};
use super::{Error, random, unix_now};
use crate::cache::BlockStore;
use crate::cache::slots::SlotFile;
use crate::config::Config;
use crate::exit::Exit;
use crate::format::local::{SEALED_MARK, SealedMark};
use crate::format::names::ObjectName;
use crate::format::tables::local_key;
use crate::format::volume::{Claim, Volume};
use crate::ids::{Epoch, ReplicaName, SegmentNo};
use crate::journal::{self, Journal, JournalError, Opened};
use crate::replica::volume::{self, Found};
use crate::replica::{ReplicaSpec, Store};

/// The open local state.
pub(super) struct Parts {
    pub local: Local,
    pub journal: Arc<Journal>,
    pub blocks: Arc<BlockStore>,
    pub mark: SealedMark,
    pub notes: Vec<String>,
}

/// Disk space kept back so that a full disk still lets the journal open.
const BALLAST: u64 = 8 << 20;

/// Where the journal's data hook finds the slot file, which is opened after it.
type SlotCell = Arc<OnceLock<Arc<SlotFile>>>;

fn open_journal(state: &StateDir, slots: &SlotCell) -> Result<(Arc<Journal>, Opened), JournalError> {
    let slots = Arc::clone(slots);
    let sync = move || slots.get().map_or(Ok(()), |s| s.sync());
    Journal::open(journal::Options::new(state.path(), Arc::new(sync)))
}

/// Opens the journal; when the disk is full, gives up the ballast first.
fn open_with_ballast(state: &StateDir, slots: &SlotCell) -> Result<(Arc<Journal>, Opened), JournalError> {
    let ballast = state.path().join("ballast");
    let opened = match open_journal(state, slots) {
        Err(JournalError::Full { .. }) if ballast.exists() => {
            log::warn!(
                "the disk of the state folder is full; giving up {} to be able to start",
                ballast.display()
            );
            let _ = fs::remove_file(&ballast);
            open_journal(state, slots)
        }
        other => other,
    };
    if opened.is_ok() && !ballast.exists() {
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

/// Opens, builds or rebuilds the local state as `decision` says.
pub(super) async fn open(
    config: &Config,
    state: &StateDir,
    stores: &[Store],
    seen: &[open::Seen],
    local: Option<Local>,
    decision: Decision,
) -> Result<Parts, Error> {
    let slots = SlotCell::default();
    let mut notes = Vec::new();
    let (local, journal) = match (decision, local) {
        (Decision::GoOn { warnings }, Some(local)) => {
            notes.extend(warnings);
            for store in stores {
                let reachable = seen.iter().any(|s| s.store.name() == store.name() && s.found.is_ok());
                if reachable {
                    match volume::tenures(store, local.volume.volume).await {
                        Ok(tenures) => {
                            open::check_tenures(&local, store, &tenures)?;
                            notes.extend(tenures.damaged.iter().map(|e| format!("needs repair: {e}")));
                        }
                        Err(volume::VolumeError::Store(e)) => {
                            notes.push(format!("its claims were not checked: {e}"))
                        }
                        Err(e) => return Err(e.into()),
                    }
                }
            }
            let journal = match open_with_ballast(state, &slots) {
                Ok((journal, opened)) if !opened.fresh => {
                    if !opened.clean {
                        notes.push(format!(
                            "recovered after an unclean stop: {} records replayed",
                            opened.replayed
                        ));
                    }
                    journal
                }
                Ok((journal, _)) => {
                    journal.close()?;
                    rebuild(state, &slots, seen, &local, "the local journal is gone", &mut notes).await?
                }
                Err(e @ (JournalError::Damaged(_) | JournalError::Incomplete(_))) => {
                    rebuild(state, &slots, seen, &local, &e.to_string(), &mut notes).await?
                }
                Err(e) => return Err(e.into()),
            };
            (local, journal)
        }
        (Decision::Create, _) => {
            set_aside(state, &mut notes)?;
            if config.read_only {
                return Err(Error::new(
                    Exit::NoVolume,
                    "there is no volume on these replicas, and a read-only mount creates none",
                ));
            }
            let volume = super::create(config, stores).await?;
            notes.push(format!(
                "created a new volume {} on {}",
                volume.volume,
                stores.iter().map(Store::url).collect::<Vec<_>>().join(", ")
            ));
            let (journal, _) = open_with_ballast(state, &slots)?;
            let local = take_over(config, state, stores, volume, Vec::new(), Epoch(0), SegmentNo(1)).await?;
            (local, journal)
        }
        (Decision::Restore { warnings } | Decision::GoOn { warnings }, _) => {
            notes.extend(warnings);
            set_aside(state, &mut notes)?;
            let restored = restore::fetch(&holders(seen)).await?;
            describe(&restored, &mut notes);
            let (journal, _) = open_with_ballast(state, &slots)?;
            restore::import(&journal, &restored)?;
            save_cursors(&journal, &holders(seen), &restored.cursors)?;
            let loaded = &restored.loaded;
            let local = take_over(
                config,
                state,
                &intact(seen),
                loaded.volume.clone(),
                restored.claims,
                Epoch(loaded.next_epoch.0.saturating_sub(1)),
                loaded.last_segment.next(),
            )
            .await?;
            (local, journal)
        }
    };
    let blocks =
        BlockStore::open(&state.slots(), local.volume.block_size, config.cache_size, Arc::clone(&journal))
            .map_err(|e| Error::new(Exit::Failure, e.to_string()))?;
    let _ = slots.set(Arc::clone(blocks.slots()));
    let mark = match journal.get(&local_key(SEALED_MARK))? {
        Some(value) => SealedMark::decode(&value)
            .map_err(|e| Error::new(Exit::Damaged, format!("local journal: {e}")))?,
        None => SealedMark::default(),
    };
    journal.release(mark.lsn);
    Ok(Parts { local, journal, blocks, mark, notes })
}

/// The replicas that hold the volume.
fn holders(seen: &[open::Seen]) -> Vec<Store> {
    seen.iter().filter(|s| matches!(s.found, Ok(Found::Volume(_)))).map(|s| s.store.clone()).collect()
}

/// Where the epoch may be claimed: not on a replica of which it is not known whose it is.
fn intact(seen: &[open::Seen]) -> Vec<Store> {
    seen.iter().filter(|s| !matches!(&s.found, Err(e) if e.is_damage())).map(|s| s.store.clone()).collect()
}

/// Whatever lies in the state folder without having been completed is kept, but out of the way.
fn set_aside(state: &StateDir, notes: &mut Vec<String>) -> Result<(), Error> {
    if let Some(folder) = state.set_aside(&format!("{:.0}", unix_now()))? {
        notes.push(format!("an unfinished local state was moved to {}", folder.display()));
    }
    Ok(())
}

fn describe(restored: &Restored, notes: &mut Vec<String>) {
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

/// Claims the next epoch on all replicas (unless read-only) and completes the state folder.
async fn take_over(
    config: &Config,
    state: &StateDir,
    stores: &[Store],
    volume: Volume,
    mut claims: Vec<Claim>,
    highest: Epoch,
    first_segment: SegmentNo,
) -> Result<Local, Error> {
    if !config.read_only {
        let claim = Claim {
            volume: volume.volume,
            epoch: highest.next(),
            claim_id: random()?,
            host: host_name(),
            pid: std::process::id(),
            claimed_at: unix_now() as u64,
            first_segment,
            mirrorfs: env!("CARGO_PKG_VERSION").to_owned(),
        };
        let claimed = volume::claim(stores, &claim).await?;
        if let Some(e) = claimed.failed.first() {
            log::warn!("the epoch is not claimed there yet: {e}");
        }
        claims.push(claim);
    }
    let local = Local::new(volume, claims, config.read_only);
    mirror_identity(state, &local)?;
    state.write(&local)?;
    Ok(local)
}

/// Lays the volume's small objects into the staging area, so that a rebuild can read it like a replica.
fn mirror_identity(state: &StateDir, local: &Local) -> Result<(), Error> {
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

/// Builds the tables anew from replicas, staged segments and what the old tail still has.
async fn rebuild(
    state: &StateDir,
    slots: &SlotCell,
    seen: &[open::Seen],
    local: &Local,
    why: &str,
    notes: &mut Vec<String>,
) -> Result<Arc<Journal>, Error> {
    log::warn!("rebuilding the local tables: {why}");
    let aside = journal::quarantine(state.path(), &format!("{:.0}", unix_now()))
        .map_err(|e| Error::new(Exit::Failure, format!("cannot move the damaged journal aside: {e}")))?;
    mirror_identity(state, local)?;
    let mut sources = holders(seen);
    let name: ReplicaName = "staging".parse().map_err(|e: String| Error::new(Exit::Failure, e))?;
    let path = state.staging().display().to_string();
    match ReplicaSpec::parse(name, &path, BTreeMap::new(), state.path()).and_then(|spec| spec.store()) {
        Ok(store) => sources.push(store),
        Err(e) => log::warn!("staged segments cannot be used for the rebuild: {e}"),
    }
    let restored = restore::fetch(&sources).await?;
    describe(&restored, notes);
    let (journal, _) = open_with_ballast(state, slots)?;
    restore::import(&journal, &restored)?;
    save_cursors(&journal, &holders(seen), &restored.cursors)?;
    let after = restored.loaded.commit_lsn;
    let records = match journal::salvage(&aside, after) {
        Ok(records) => records,
        Err(JournalError::Gone { .. }) => {
            return Err(Error::new(
                Exit::Damaged,
                format!(
                    "the local tables are damaged ({why}), and what lies between the replicas' last commit ({after}) and \
                     the local tail is on no reachable replica: attach the replica that has it; the damaged journal is in {}",
                    aside.display()
                ),
            ));
        }
        Err(e) => return Err(e.into()),
    };
    let applied = restore::reapply(&journal, records, after)?;
    notes.push(format!(
        "the local tables were damaged ({why}) and have been rebuilt from replicas, with {applied} newer records from the local \
         tail; the damaged ones are in {}",
        aside.display()
    ));
    Ok(journal)
}
