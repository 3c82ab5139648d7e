//! The check of a volume that is mounted: its tables as of one moment, while everything goes on.
//!
//! Owns what is looked at then, and what is not. Changes nothing.

use super::replica::{self, Ground};
use super::{Error, FsckArgs};
use crate::control::FsckRequest;
use crate::daemon::core::Core;
use crate::exit::Exit;
use crate::format::local::{SEALED_MARK, SealedMark};
use crate::format::tables::local_key;
use crate::fsck::{self, Input, Report, Reporter};

/// Checks a running volume. Blocking; not on a thread of the runtime.
pub(in crate::daemon) fn check(
    core: &Core,
    request: &FsckRequest,
    cancelled: &(dyn Fn() -> bool + Sync),
) -> Result<Report, Error> {
    let all = core.fleet.roster.all();
    let wanted = |name| request.all_replicas || request.replicas.contains(name);
    let chosen: Vec<_> = all.iter().filter(|r| wanted(r.name())).collect();
    if let Some(name) = request.replicas.iter().find(|name| !all.iter().any(|r| r.name() == *name)) {
        let names: Vec<_> = all.iter().map(|r| r.name().to_string()).collect();
        return Err(Error::new(
            Exit::Usage,
            format!("no replica is called {name}; there are {}", names.join(", ")),
        ));
    }
    let mut reporter = Reporter::new(request.limit);
    let snapshot = core.journal.snapshot();
    reporter.note(format!(
        "mounted: checked the tables as of change {}, while it goes on; the local journal's own files, the staging area and cached content \
         are checked when it is not mounted",
        snapshot.lsn()
    ));
    let input = Input {
        source: &snapshot,
        block_size: core.volume.block_size,
        segments: None,
        slots_len: None,
        last_lsn: Some(snapshot.lsn()),
        cancelled,
    };
    let checked = fsck::check(&input, request.limit)?;
    reporter.totals(checked.totals);
    let names = fsck::name_all(&input, &checked, checked.findings.list().iter().map(|f| &f.place))?;
    reporter.left(&checked.findings, &names, false);
    drop(checked);
    if chosen.is_empty() {
        return Ok(reporter.finish());
    }
    let mark = snapshot.get(&local_key(SEALED_MARK))?;
    let mark = mark.and_then(|v| SealedMark::decode(&v).ok()).unwrap_or_default();
    let touched = replica::touched(&core.journal, mark.lsn, core.journal.last_lsn());
    let claims = core.claims();
    let segments = replica::segments(&input)?;
    let ground = Ground { input: &input, volume: &core.volume, claims: &claims, mark, segments, touched };
    let args = FsckArgs { repair: false, deep: request.deep, limit: request.limit, replicas: &[], cancelled };
    for replica in chosen {
        core.handle().block_on(replica::check(replica.store(), Some(&ground), &args, &mut reporter))?;
    }
    Ok(reporter.finish())
}
