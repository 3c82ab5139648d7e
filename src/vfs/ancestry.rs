//! The way from a directory up to the root.
//!
//! Pure. Healthy tables always lead to the root; damaged or forged ones may lead round in a circle,
//! which must end, too.

use super::Result;
use crate::ids::Ino;

/// How two directories stand to each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ancestry {
    /// The way to the root does not pass the other one.
    Apart,
    /// It does, or both are the same.
    Below,
    /// There is no way to the root: this directory is above itself.
    Cycle(Ino),
}

/// Whether `dir` is `top` or below it; `above` gives a directory's parent.
///
/// Takes memory for one number, however deep the tree is: the walk compares each directory with one
/// that it has passed, and moves that mark up after 1, 2, 4, … steps. In a circle it meets the mark
/// at the latest when the steps between two moves are more than the circle has directories.
pub(super) fn is_below(top: Ino, dir: Ino, above: impl Fn(Ino) -> Result<Ino>) -> Result<Ancestry> {
    let (mut at, mut mark) = (dir, dir);
    let (mut steps, mut until) = (0_u64, 1_u64);
    while at != Ino::ROOT {
        if at == top {
            return Ok(Ancestry::Below);
        }
        at = above(at)?;
        if at == mark {
            return Ok(Ancestry::Cycle(at));
        }
        steps += 1;
        if steps == until {
            (mark, steps, until) = (at, 0, until.saturating_mul(2));
        }
    }
    // Nothing is moved below the root but what is not the root.
    Ok(if top == Ino::ROOT { Ancestry::Below } else { Ancestry::Apart })
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    #[test]
    fn every_walk_ends() {
        // A chain 100 -> 99 -> … -> 2 -> root.
        let chain = |ino: Ino| Ok(Ino(ino.0 - 1));
        assert_eq!(is_below(Ino(50), Ino(100), chain), Ok(Ancestry::Below));
        assert_eq!(is_below(Ino(50), Ino(50), chain), Ok(Ancestry::Below));
        assert_eq!(is_below(Ino(50), Ino(49), chain), Ok(Ancestry::Apart));
        assert_eq!(is_below(Ino(50), Ino::ROOT, chain), Ok(Ancestry::Apart));
        assert_eq!(is_below(Ino::ROOT, Ino(3), chain), Ok(Ancestry::Below));
        // A circle of any size, with a way of any length into it.
        for size in 1..40 {
            for way in 0..40 {
                let walked = Cell::new(0);
                let circle = |ino: Ino| {
                    walked.set(walked.get() + 1);
                    Ok(Ino(if ino.0 == 1000 { 1000 + size - 1 } else { ino.0 - 1 }))
                };
                let found = is_below(Ino(5), Ino(1000 + size - 1 + way), circle);
                assert!(
                    matches!(found, Ok(Ancestry::Cycle(at)) if at.0 < 1000 + size),
                    "{size} {way}: {found:?}"
                );
                assert!(walked.get() <= 4 * (size + way) + 4, "{size} {way}: {} steps", walked.get());
            }
        }
        let broken = is_below(Ino(5), Ino(9), |_| Err(super::super::VfsError::Stale));
        assert_eq!(broken, Err(super::super::VfsError::Stale));
    }
}
