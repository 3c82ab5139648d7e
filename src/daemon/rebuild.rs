//! Rebuilding the local tables after damage: from replicas, staged segments, and what the old tail still has.
//!
//! Owns the steps and their order, so that a crash between any two leaves a rebuild that the next mount goes on with:
//!
//! 1. read the tables back from replicas and staging (nothing is changed until that has worked);
//! 2. write into `state.json` that a rebuild runs, and from which folder;
//! 3. move `db`, `tail` and `witness` into that folder, then mark it complete;
//! 4. drop what an earlier attempt made, import, apply the old tail's records behind it, make them durable;
//! 5. take the note out of `state.json`.
//!
//! The slot file stays where it is: the records name its slots. It is opened only behind step 4.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::parts::{SlotCell, describe, identity_into, open_with_ballast};
use super::restore;
use super::state::{Local, StateDir};
use super::{Error, unix_now};
use crate::exit::Exit;
use crate::journal::{self, Journal, JournalError};
use crate::replica::{ReplicaSpec, Store};
use crate::restore::Trust;

/// Name of the file that says that everything was moved into a quarantine folder.
const COMPLETE: &str = "moved";
/// The journal's own files.
const JOURNAL: [&str; 3] = ["db", "tail", "witness"];

fn failed(what: &str, path: &Path, e: &std::io::Error) -> Error {
    Error::new(Exit::Failure, format!("rebuilding: cannot {what} {}: {e}", path.display()))
}

/// A name for the quarantine folder that is not taken.
fn free_name(state: &StateDir) -> String {
    let label = format!("quarantine-{:.0}", unix_now());
    let taken = |name: &str| state.path().join(name).exists();
    (0..)
        .map(|n| if n == 0 { label.clone() } else { format!("{label}-{n}") })
        .find(|name| !taken(name))
        .unwrap_or(label)
}

/// Moves the journal's files into `aside`; goes on where an interrupted move stopped.
fn move_aside(state: &StateDir, aside: &Path) -> Result<(), Error> {
    let marker = aside.join(COMPLETE);
    if marker.exists() {
        return Ok(());
    }
    fs::create_dir_all(aside).map_err(|e| failed("make", aside, &e))?;
    for name in JOURNAL {
        let from = state.path().join(name);
        if from.exists() {
            fs::rename(&from, aside.join(name)).map_err(|e| failed("move", &from, &e))?;
        }
    }
    let sync = |path: &Path| File::open(path).and_then(|d| d.sync_all());
    sync(aside).and_then(|()| sync(state.path())).map_err(|e| failed("sync", aside, &e))?;
    File::create(&marker).and_then(|f| f.sync_all()).map_err(|e| failed("write", &marker, &e))?;
    sync(aside).map_err(|e| failed("sync", aside, &e))
}

/// Drops what an earlier attempt made of the journal.
fn drop_attempt(state: &StateDir) -> Result<(), Error> {
    for name in JOURNAL {
        let path = state.path().join(name);
        let gone = if path.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
        match gone {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(failed("remove", &path, &e)),
            _ => {}
        }
    }
    Ok(())
}

/// Rebuilds the journal. `why` is for the notes; `holders` are the replicas that hold the volume.
pub(super) async fn rebuild(
    state: &StateDir,
    slots: &SlotCell,
    holders: Vec<Store>,
    local: &mut Local,
    why: &str,
    notes: &mut Vec<String>,
) -> Result<Arc<Journal>, Error> {
    log::warn!("rebuilding the local tables: {why}");
    identity_into(state, local)?;
    let mut sources = holders;
    match staging_as_store(state) {
        Ok(store) => sources.push(store),
        Err(e) => log::warn!("staged segments cannot be used for the rebuild: {e}"),
    }
    let mut restored = restore::fetch(&sources, &local.claims, &Trust::Majority, |_, _| Ok(())).await?;
    describe(&restored, notes);

    let name = match &local.rebuild {
        Some(name) => name.clone(),
        None => free_name(state),
    };
    local.rebuild = Some(name.clone());
    state.write(local)?;
    let aside: PathBuf = state.path().join(&name);
    move_aside(state, &aside)?;
    drop_attempt(state)?;

    let after = restored.loaded.commit_lsn;
    let salvaged = match journal::salvage(&aside, after) {
        Ok(salvaged) => salvaged,
        Err(JournalError::Gone { .. }) => {
            return Err(Error::new(
                Exit::Damaged,
                format!(
                    "the local tables are damaged ({why}), and what lies between the replicas' last commit (change {after}) \
                     and the local tail is on no reachable replica: mount again when the replica that has it can be \
                     reached; the damaged tables are in {}",
                    aside.display()
                ),
            ));
        }
        Err(e) => return Err(e.into()),
    };
    let end = salvaged.records.last().map_or(after, |r| r.lsn);
    if end < salvaged.proved {
        return Err(Error::new(
            Exit::Damaged,
            format!(
                "the local tail in {} is damaged behind change {end}, although changes up to {} were acknowledged and are on \
                 no reachable replica; nothing was changed. To give up what lies between, move the state folder away and mount \
                 again from the replicas (change {after})",
                aside.display(),
                salvaged.proved
            ),
        ));
    }
    let (journal, _) = open_with_ballast(state, slots)?;
    restore::import(&journal, &mut restored)?;
    let applied = restore::reapply(&journal, salvaged.records, after)?;
    restore::forget_unnamed(&journal, &restored.loaded.unnamed)?;
    local.rebuild = None;
    state.write(local)?;
    notes.push(format!(
        "the local tables were damaged ({why}) and have been rebuilt from replicas, with {applied} newer changes from the \
         local tail; the damaged ones are in {}",
        aside.display()
    ));
    Ok(journal)
}

/// The staging area as a source, which it can be because its files have the names of a replica.
fn staging_as_store(state: &StateDir) -> Result<Store, String> {
    let name = STAGING.parse()?;
    let path = state.staging().display().to_string();
    ReplicaSpec::parse(name, &path, Default::default(), state.path())
        .and_then(|spec| spec.store())
        .map_err(|e| e.to_string())
}

/// Name under which the staging area takes part in a rebuild.
const STAGING: &str = "local-staging-area";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_interrupted_move_is_finished_and_a_finished_one_is_not_repeated() {
        let dir = tempfile::tempdir().unwrap();
        let state = StateDir::lock(dir.path()).unwrap();
        let aside = dir.path().join("quarantine-1");
        fs::create_dir_all(dir.path().join("db")).unwrap();
        fs::write(dir.path().join("witness"), b"old").unwrap();
        // Interrupted behind the first rename.
        fs::create_dir_all(aside.join("tail")).unwrap();
        move_aside(&state, &aside).unwrap();
        assert!(aside.join("db").is_dir() && aside.join("tail").is_dir());
        assert_eq!(fs::read(aside.join("witness")).unwrap(), b"old");
        // What the rebuild makes now is not taken for the old one.
        fs::write(dir.path().join("witness"), b"new").unwrap();
        move_aside(&state, &aside).unwrap();
        assert_eq!(fs::read(aside.join("witness")).unwrap(), b"old");
        drop_attempt(&state).unwrap();
        assert!(!dir.path().join("witness").exists());
        assert_ne!(free_name(&state), "quarantine-1");
    }
}
