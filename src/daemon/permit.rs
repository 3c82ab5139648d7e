//! Whether a machine that comes without a state of its own may write, by what the replicas show.
//! Pure.

use super::open::when;
use super::{Error, Takeover};
use crate::exit::Exit;
use crate::format::volume::{Claim, Release};
use crate::ids::{Epoch, ReplicaName, SegmentNo};
use crate::replica::Store;
use crate::restore::{self, Doubt, Trust};

/// The last tenure but our own that counts, and how many replicas mark its end.
#[derive(Debug, Default, PartialEq)]
pub(super) struct LastTenure {
    /// The highest epoch that somebody else has, also by a claim that cannot be read.
    epoch: Epoch,
    /// Its claim.
    claim: Option<Claim>,
    /// Its end, as more than half of the replicas that answer mark it.
    release: Option<Release>,
    /// Replicas that mark an end, although too few do.
    marked: Vec<ReplicaName>,
    /// Replicas that answer.
    of: usize,
}

/// Finds it in what replicas hold. `own` are claims that were made with this state folder.
pub(super) fn last_tenure<'a>(
    found: impl Iterator<Item = &'a restore::Found>,
    plan: &restore::Plan,
    own: &[Claim],
) -> LastTenure {
    let is_own = |claim: &Claim| own.iter().any(|o| o.claim_id == claim.claim_id);
    let claim = plan.claims.values().rev().find(|c| !is_own(c));
    // One that cannot be read counts as somebody's, unless it was contradicted.
    let known = |epoch: Epoch| {
        plan.claims.contains_key(&epoch) || plan.disbelieved.iter().any(|(_, c)| c.epoch == epoch)
    };
    let unread = Some(plan.epoch).filter(|e| e.0 > 0 && !known(*e));
    if let Some(epoch) = unread.filter(|e| claim.is_none_or(|c| c.epoch < *e)) {
        return LastTenure { epoch, of: plan.answering.len(), ..LastTenure::default() };
    }
    let Some(claim) = claim else { return LastTenure::default() };
    let ends = found.filter_map(|f| f.releases.get(&claim.epoch)).filter(|r| r.claim_id == claim.claim_id);
    let ends: Vec<&Release> = ends.collect();
    let of = plan.answering.len();
    let agreed = ends.iter().find(|end| {
        let same = ends.iter().filter(|other| other.last_segment == end.last_segment).count();
        // The replica that was named decides alone.
        let believed = |name: &ReplicaName| plan.ends.contains(&(name.clone(), claim.claim_id));
        2 * same > of || plan.believes.as_ref().is_some_and(believed)
    });
    LastTenure {
        epoch: claim.epoch,
        claim: Some(claim.clone()),
        release: agreed.map(|end| (*end).clone()),
        marked: plan.marked(claim),
        of,
    }
}

impl LastTenure {
    /// Whether one of `own`, as for [`permit`], came after it.
    fn is_ended_by(&self, own: &[Claim]) -> bool {
        own.iter().any(|claim| claim.epoch > self.epoch)
    }

    /// Whether it may still be running, and has to be ended by a claim before it is known where the
    /// next one begins. `own`: as for [`permit`].
    pub(super) fn may_go_on(&self, own: &[Claim]) -> bool {
        self.epoch > Epoch(0) && !self.is_ended_by(own) && self.release.is_none()
    }

    /// The writer of it, as a person should know.
    fn who(&self) -> String {
        let Some(claim) = &self.claim else {
            return format!("epoch {} was claimed by somebody (the claim cannot be read)", self.epoch);
        };
        let (host, pid, since) = (&claim.host, claim.pid, when(claim.claimed_at));
        format!("{host} (process {pid}) has it mounted since {since} (epoch {})", claim.epoch)
    }

    /// What is to be said of an end that too few replicas mark.
    fn half_marked(&self) -> String {
        if self.marked.is_empty() || self.release.is_some() {
            return String::new();
        }
        let on: Vec<_> = self.marked.iter().map(ToString::to_string).collect();
        let (n, of) = (on.len(), self.of);
        format!("; its end is marked only on replica {} ({n} of {of} that answer)", on.join(", "))
    }
}

/// Whom to believe where the replicas differ.
pub(super) fn trust(takeover: &Takeover, holders: &[Store]) -> Result<Trust, Error> {
    match takeover {
        Takeover::No => Ok(Trust::Majority),
        Takeover::Yes => Ok(Trust::Follow),
        Takeover::From(name) if holders.iter().any(|s| s.name() == name) => Ok(Trust::Replica(name.clone())),
        Takeover::From(name) => {
            let names: Vec<_> = holders.iter().map(|s| s.name().as_str()).collect();
            let text = format!(
                "--takeover={name}: there is no such replica that answers and holds the volume; there are {}",
                names.join(", ")
            );
            Err(Error::new(Exit::Usage, text))
        }
    }
}

/// What [`permit`] judges by.
pub(super) struct Question<'a> {
    /// The last tenure.
    pub last: &'a LastTenure,
    /// Claims that this machine made when it tried before.
    pub own: &'a [Claim],
    /// What replicas said that do not answer.
    pub without: &'a [String],
    /// What only a minority of the replicas holds.
    pub doubts: &'a [Doubt],
}

/// Whether a machine without a state of its own may write; gives what a person should know.
/// `reached` is the segment up to which the replicas are intact.
///
/// * A tenure that was not released, or is so on a minority of the replicas only, may still be running: then only on `takeover`.
/// * What only a minority holds may be forged: then only on `takeover`. What contradicts the others is not followed, and where neither
///   side is a majority a replica must be named.
/// * A replica that does not answer may hold more than the others, unless the last tenure was released with all that it
///   had on the others: then only on `takeover`, too.
/// * So may one that was not named, when less can be read than was there at the release.
pub(super) fn permit(
    question: &Question<'_>,
    reached: SegmentNo,
    takeover: &Takeover,
) -> Result<Vec<String>, Error> {
    let Question { last, own, without, doubts } = question;
    let agreed = *takeover != Takeover::No;
    let mut warnings = doubted(doubts, takeover)?;
    if last.may_go_on(own) {
        let (who, half) = (last.who(), last.half_marked());
        if !agreed {
            let mut more: Vec<String> = doubts.iter().map(ToString::to_string).collect();
            if !without.is_empty() {
                let silent = without.join("; ");
                more.push(format!("these do not answer, and what only they hold is lost then: {silent}"));
            }
            let more = more.into_iter().map(|text| format!("; {text}")).collect::<String>();
            return Err(Error::new(
                Exit::InUse,
                format!(
                    "the volume is in use: {who}, and has not unmounted it in good order{half}. Unmount it there, or, when that \
                     machine is gone, add --takeover: what it has not sent is then no part of the volume any more{more}. To read \
                     only, mount with --read-only"
                ),
            ));
        }
        warnings.push(format!("took over: {who}, and has not unmounted it in good order{half}"));
    } else if !agreed && !doubts.is_empty() && !last.is_ended_by(own) {
        let text: Vec<_> = doubts.iter().map(ToString::to_string).collect();
        return Err(Error::new(
            Exit::InUse,
            format!(
                "{}. That may be a writer who reached no other replica, or a forgery. Add --takeover to go on from what is newest and \
                 contradicts nothing, or --takeover=REPLICA to go on from what that replica holds. To read only, mount with \
                 --read-only",
                text.join("; ")
            ),
        ));
    }
    warnings.extend(lacking(question, reached, agreed)?);
    Ok(warnings)
}

/// What only a minority holds: what is done about it, or the refusal where only naming a replica
/// helps.
fn doubted(doubts: &[Doubt], takeover: &Takeover) -> Result<Vec<String>, Error> {
    if *takeover != Takeover::Yes {
        return Ok(Vec::new());
    }
    let tie = doubts.iter().find(|d| d.contradicts && 2 * d.on.len() >= d.of);
    if let Some(doubt) = tie {
        return Err(Error::new(
            Exit::InUse,
            format!(
                "{doubt}, and no majority of the replicas says which is right. Say it: --takeover=REPLICA goes on from what that \
                 replica holds, and what the others hold beyond that is then no part of the volume any more"
            ),
        ));
    }
    let done = |d: &Doubt| if d.contradicts { "is not followed" } else { "is part of the volume now" };
    Ok(doubts.iter().map(|d| format!("{d}: that {}", done(d))).collect())
}

/// What cannot be read although it may be there: a warning, or the refusal.
fn lacking(question: &Question<'_>, reached: SegmentNo, agreed: bool) -> Result<Vec<String>, Error> {
    let Question { last, own, without, .. } = question;
    let mut warnings = Vec::new();
    if last.is_ended_by(own) && without.is_empty() {
        return Ok(warnings);
    }
    let newest = last.release.as_ref().map(|r| r.last_segment).unwrap_or_default();
    if without.is_empty() {
        // All that were named answer, and yet lack what was there: a replica that was not named may
        // have it.
        if newest <= reached {
            return Ok(warnings);
        }
        let text = format!(
            "the last writer left segments up to {newest}, but only those up to {reached} can be read from the given replicas"
        );
        if agreed {
            warnings.push(format!("{text}: the others are given up"));
            return Ok(warnings);
        }
        return Err(Error::new(
            Exit::Damaged,
            format!(
                "{text}. Name the replicas that hold the others, or mount with --read-only, or add --takeover: what cannot be \
                 read is then no part of the volume any more"
            ),
        ));
    }
    let released = last.release.is_some();
    if released && newest <= reached {
        warnings.extend(without.iter().map(|e| format!("goes on without it for now: {e}")));
        return Ok(warnings);
    }
    if agreed {
        warnings.extend(
            without.iter().map(|e| format!("goes on without it, what only it holds is given up: {e}")),
        );
        return Ok(warnings);
    }
    let why = if released {
        format!("the last writer had segments up to {newest}, those that answer are intact up to {reached}")
    } else {
        "the last writer has not ended in good order".to_owned()
    };
    Err(Error::new(
        Exit::Unreachable,
        format!(
            "{}; it may hold changes that the other replicas lack ({why}). Repair it, or mount with --read-only, or add \
             --takeover: what only it holds is then no part of the volume any more",
            without.join("; ")
        ),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::volume::testing::{self, volume};

    fn claim(epoch: u32, id: u8) -> Claim {
        let (host, pid, claimed_at) = (format!("h{id}"), 17, 1_790_000_000);
        Claim { host, pid, claimed_at, ..testing::claim(epoch, id, u64::from(epoch) * 10) }
    }

    /// A replica with these claims, released at a segment or not.
    fn holding(claims: &[(Claim, Option<u64>)]) -> restore::Found {
        let mut found = restore::Found::default();
        for (claim, last) in claims {
            found.claimed.insert(claim.epoch);
            found.claims.insert(claim.epoch, claim.clone());
            if let Some(last) = last {
                let release = Release {
                    volume: claim.volume,
                    epoch: claim.epoch,
                    claim_id: claim.claim_id,
                    released_at: 2,
                    last_segment: SegmentNo(*last),
                };
                found.releases.insert(claim.epoch, release);
            }
        }
        found
    }

    fn said(takeover: bool) -> Takeover {
        if takeover { Takeover::Yes } else { Takeover::No }
    }

    fn last_of(found: &[restore::Found], own: &[Claim]) -> (LastTenure, Vec<Doubt>) {
        let one = |(i, found): (usize, &restore::Found)| restore::Inventory {
            replica: format!("r{i}").parse().unwrap(),
            url: "memory://".into(),
            found: Ok(restore::Found { volume: Some(volume(1)), ..found.clone() }),
        };
        let inventories: Vec<_> = found.iter().enumerate().map(one).collect();
        let plan = restore::plan_by(&inventories, None, own, &Trust::Majority).unwrap();
        (last_tenure(inventories.iter().filter_map(|i| i.found.as_ref().ok()), &plan, own), plan.doubts)
    }

    #[test]
    fn who_comes_anew_needs_a_release_or_the_flag() {
        let ask = |found: &[restore::Found], own: &[Claim], takeover| {
            let (last, doubts) = last_of(found, own);
            let question = Question { last: &last, own, without: &[], doubts: &doubts };
            permit(&question, SegmentNo(5), &said(takeover))
        };
        let both = |one: Option<u64>, two: Option<u64>| holding(&[(claim(1, 1), one), (claim(2, 2), two)]);
        let open = [both(Some(3), None), both(None, None)];
        let error = ask(&open, &[], false).unwrap_err();
        assert_eq!(error.exit_code(), Exit::InUse);
        for word in ["h2", "process 17", "2026-09-21T", "Unmount it there", "--takeover"] {
            assert!(error.to_string().contains(word), "{word}: {error}");
        }
        assert!(ask(&open, &[], true).unwrap()[0].contains("h2"));
        // Released on two; the third lags, or is damaged.
        let mut damaged = holding(&[]);
        damaged.claimed.insert(Epoch(2));
        for third in [holding(&[(claim(1, 1), None)]), both(None, None), damaged.clone()] {
            let released = [both(None, Some(5)), third, both(None, Some(5))];
            assert_eq!(ask(&released, &[], false).unwrap(), Vec::<String>::new());
        }
        // On fewer it may be forged.
        for others in
            [vec![both(None, None)], vec![damaged.clone()], vec![both(None, None), both(None, None)]]
        {
            let found = [vec![both(None, Some(5))], others].concat();
            let error = ask(&found, &[], false).unwrap_err();
            let one = format!("replica r0 (1 of {} that answer)", found.len());
            assert!(error.exit_code() == Exit::InUse && error.to_string().contains(&one), "{error}");
            assert!(!ask(&found, &[], true).unwrap().is_empty());
        }
        assert_eq!(ask(&[holding(&[])], &[], false).unwrap(), Vec::<String>::new(), "never mounted");
        // Something that was there at the end cannot be read.
        let short = [holding(&[(claim(2, 2), Some(6))])];
        let error = ask(&short, &[], false).unwrap_err();
        assert!(error.exit_code() == Exit::Damaged && error.to_string().contains("up to 6"), "{error}");
        assert_eq!(ask(&short, &[], true).unwrap().len(), 1);
        // The mark of a lost race ends nothing.
        let mut race = holding(&[(claim(2, 2), Some(5))]);
        race.claims.insert(Epoch(2), claim(2, 3));
        assert!(ask(&[race], &[], false).unwrap_err().to_string().contains("h3"));
        // Two machines claimed one epoch on different replicas: no majority says which counts, so a
        // replica is named.
        let two = [holding(&[(claim(2, 2), Some(5))]), holding(&[(claim(2, 3), None)])];
        assert!(ask(&two, &[], false).unwrap_err().to_string().contains("h3"));
        assert!(ask(&two, &[], true).unwrap_err().to_string().contains("--takeover=REPLICA"));
        // One that cannot be read anywhere.
        assert!(ask(&[damaged], &[], false).unwrap_err().to_string().contains("cannot be read"));
        // Interrupted after our claim: it was decided then. Not when somebody came between.
        let own = [claim(3, 7)];
        let tried = [holding(&[(claim(2, 2), None), (claim(3, 7), None)])];
        assert_eq!(ask(&tried, &own, false).unwrap(), Vec::<String>::new());
        let overtaken = [holding(&[(claim(3, 7), None), (claim(4, 4), None)])];
        assert!(ask(&overtaken, &own, false).unwrap_err().to_string().contains("h4"));
        let beaten = [holding(&[(claim(3, 4), None)])];
        assert!(ask(&beaten, &own, false).unwrap_err().to_string().contains("h4"));
    }

    #[test]
    fn a_silent_replica_matters_unless_a_release_speaks_for_it() {
        let silent = ["replica r1: no route".to_owned()];
        let ask = |found: &restore::Found, reached, takeover| {
            let (last, doubts) = last_of(std::slice::from_ref(found), &[]);
            let question = Question { last: &last, own: &[], without: &silent, doubts: &doubts };
            permit(&question, SegmentNo(reached), &said(takeover))
        };
        let released = holding(&[(claim(2, 2), Some(5))]);
        assert!(ask(&released, 5, false).unwrap()[0].contains("goes on without it for now: replica r1"));
        let error = ask(&released, 4, false).unwrap_err();
        assert_eq!(error.exit_code(), Exit::Unreachable);
        assert!(
            error.to_string().contains("segments up to 5") && error.to_string().contains("--takeover"),
            "{error}"
        );
        assert!(ask(&released, 4, true).unwrap()[0].contains("given up"));
        let open = holding(&[(claim(2, 2), None)]);
        let error = ask(&open, 9, false).unwrap_err();
        assert!(error.exit_code() == Exit::InUse && error.to_string().contains("no route"), "{error}");
        assert_eq!(ask(&open, 9, true).unwrap().len(), 2);
        assert_eq!(ask(&holding(&[]), 0, false).unwrap_err().exit_code(), Exit::Unreachable, "nobody knows");
    }
}
