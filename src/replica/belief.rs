//! Which claims are believed when replicas differ: pure rules, so that one replica that lies
//! decides nothing.
//!
//! A claim carries no signature. What one replica alone shows may be forged, so the number of
//! replicas decides, and a name without verified content decides nothing. The reasons are in
//! `docs/rfcs/0002-believing-claims.md`.

use std::collections::BTreeSet;

use super::fence::Fenced;
use crate::ids::{Epoch, ReplicaName};

/// Epochs that may be missing between two claims. Writers claim one epoch after the other and put
/// older claims first, so a hole comes only from claims that were lost. A larger one is damage: it
/// would use up the numbers that later writers need.
pub const MOST_SKIPPED: u32 = 64;

/// The highest epoch up to which the claims `named` leave no hole that is too large, seen from
/// `from`. What lies above is implausible, whatever it says.
#[must_use]
pub fn plausible_end(from: Epoch, named: impl IntoIterator<Item = Epoch>) -> Epoch {
    let named: BTreeSet<Epoch> = named.into_iter().filter(|e| *e > from).collect();
    let mut end = from;
    for epoch in named {
        if epoch.0 - end.0 > MOST_SKIPPED + 1 {
            break;
        }
        end = epoch;
    }
    end
}

/// The epoch after `highest`; `None` when the numbers are used up.
#[must_use]
pub fn epoch_after(highest: Epoch) -> Option<Epoch> {
    highest.0.checked_add(1).map(Epoch)
}

/// What one replica says when it is asked whether another writer took the volume over.
#[derive(Clone, Debug, PartialEq)]
pub enum Testimony {
    /// It does not answer, or holds nothing of ours by which it could know.
    Silent,
    /// It knows our tenure, and shows no other.
    Clear,
    /// It shows something above ours that fails verification.
    Unclear(String),
    /// It shows another writer, verified.
    Rival(Box<Fenced>),
}

/// What follows from what all replicas say.
#[derive(Clone, Debug, PartialEq)]
pub enum Verdict {
    /// We are the writer. Nothing is written to the replicas that say otherwise.
    Ours {
        /// Those replicas, and what each shows.
        apart: Vec<(ReplicaName, String)>,
    },
    /// More replicas show another writer than know only us.
    TakenOver(Box<Fenced>),
    /// No replica can be believed: those that answer hold damaged claims.
    Unknown(Vec<(ReplicaName, String)>),
}

/// Judges. A tie goes to us: our own state knows our tenure, too, and no replica can forge that.
#[must_use]
pub fn judge(testimonies: &[(ReplicaName, Testimony)]) -> Verdict {
    let clear = testimonies.iter().filter(|(_, t)| *t == Testimony::Clear).count();
    let rivals = testimonies.iter().filter_map(|(_, t)| match t {
        Testimony::Rival(fenced) => Some(fenced),
        _ => None,
    });
    let rivals: Vec<_> = rivals.collect();
    if rivals.len() > clear
        && let Some(newest) = rivals.iter().max_by_key(|f| f.epoch())
    {
        return Verdict::TakenOver((*newest).clone());
    }
    let apart = testimonies.iter().filter_map(|(name, t)| match t {
        Testimony::Rival(fenced) => Some((name.clone(), fenced.shown())),
        Testimony::Unclear(why) => Some((name.clone(), why.clone())),
        Testimony::Silent | Testimony::Clear => None,
    });
    let apart: Vec<_> = apart.collect();
    if clear == 0 && !apart.is_empty() { Verdict::Unknown(apart) } else { Verdict::Ours { apart } }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::volume::testing::claim;
    use crate::replica::FenceReason;

    #[test]
    fn a_jump_is_damage_and_a_row_with_small_holes_is_not() {
        let end = |from: u32, named: &[u32]| plausible_end(Epoch(from), named.iter().map(|e| Epoch(*e))).0;
        assert_eq!(end(0, &[]), 0);
        assert_eq!(end(0, &[1, 2, 3, u32::MAX]), 3);
        assert_eq!(end(7, &[1, 2, 3, 8]), 8, "what lies below does not matter");
        assert_eq!(end(7, &[7 + MOST_SKIPPED + 1]), 7 + MOST_SKIPPED + 1);
        assert_eq!(end(7, &[7 + MOST_SKIPPED + 2]), 7);
        // A laptop that was mounted a thousand times without its network: each claim is there in
        // the end.
        let offline: Vec<u32> = (8..1008).collect();
        assert_eq!(end(7, &offline), 1007);
        assert_eq!(end(u32::MAX - 1, &[u32::MAX]), u32::MAX);
        assert_eq!(epoch_after(Epoch(u32::MAX)), None);
        assert_eq!(epoch_after(Epoch(3)), Some(Epoch(4)));
    }

    /// All combinations of what up to four replicas can say.
    #[test]
    fn more_replicas_must_show_a_rival_than_know_only_us() {
        let rival = |n: usize| {
            let name: ReplicaName = format!("r{n}").parse().unwrap();
            let claim = Some(Box::new(claim(5 + n as u32, 9, 4)));
            let reason = FenceReason::TakenOver { epoch: Epoch(5 + n as u32), claim, first_segment: None };
            Box::new(Fenced { replica: name, reason })
        };
        let say = |kind: usize, n: usize| match kind {
            0 => Testimony::Silent,
            1 => Testimony::Clear,
            2 => Testimony::Unclear("junk".into()),
            _ => Testimony::Rival(rival(n)),
        };
        for replicas in 0..=4_u32 {
            for code in 0..4_usize.pow(replicas) {
                let kinds: Vec<_> = (0..replicas).map(|i| code / 4_usize.pow(i) % 4).collect();
                let said: Vec<_> = kinds
                    .iter()
                    .enumerate()
                    .map(|(n, kind)| (format!("r{n}").parse().unwrap(), say(*kind, n)))
                    .collect();
                let count = |kind| kinds.iter().filter(|k| **k == kind).count();
                let (clear, unclear, rivals) = (count(1), count(2), count(3));
                match judge(&said) {
                    Verdict::TakenOver(by) => {
                        assert!(rivals > clear, "{kinds:?}");
                        let last = kinds.iter().rposition(|k| *k == 3).unwrap();
                        assert_eq!(by.epoch(), Epoch(5 + last as u32), "the newest is named");
                    }
                    Verdict::Unknown(apart) => {
                        assert!(clear == 0 && rivals == 0 && unclear > 0, "{kinds:?}");
                        assert_eq!(apart.len(), unclear);
                    }
                    Verdict::Ours { apart } => {
                        assert!(rivals <= clear && (clear > 0 || unclear == 0), "{kinds:?}");
                        assert_eq!(apart.len(), rivals + unclear, "each is named");
                    }
                }
            }
        }
    }
}
