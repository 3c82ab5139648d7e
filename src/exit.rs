//! What the number means with which a command ends.
//!
//! Owns the one table of exit codes; `--help` and the README show the same one. Knows no module of the crate.

/// How a command ended. The numbers are part of the interface: scripts branch on them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Exit {
    /// All was done.
    Done = 0,
    /// Something failed that no other code describes.
    Failure = 1,
    /// The command line or the configuration is wrong; nothing was touched.
    Usage = 2,
    /// There is no volume at the place named.
    NoVolume = 3,
    /// Another volume than the expected one lies there.
    WrongVolume = 4,
    /// Another daemon uses the volume's state, or a newer writer has taken the volume over (fenced).
    InUse = 5,
    /// A replica cannot be reached, or refuses us.
    Unreachable = 6,
    /// Something stored is damaged and no intact copy was found.
    Damaged = 7,
    /// The time allowed ran out; what was begun goes on in the background.
    TimedOut = 8,
    /// Nothing of mirrorfs is mounted there, or its daemon does not answer.
    NotMounted = 9,
    /// The volume was written by a newer mirrorfs than this one.
    TooNew = 10,
    /// The daemon died again and again; its mount stays dead until somebody mounts or unmounts.
    Crashed = 11,
}

impl Exit {
    /// All codes, in order.
    pub const ALL: [Exit; 12] = [
        Exit::Done,
        Exit::Failure,
        Exit::Usage,
        Exit::NoVolume,
        Exit::WrongVolume,
        Exit::InUse,
        Exit::Unreachable,
        Exit::Damaged,
        Exit::TimedOut,
        Exit::NotMounted,
        Exit::TooNew,
        Exit::Crashed,
    ];

    /// The number given to the operating system.
    #[must_use]
    pub const fn code(self) -> u8 {
        self as u8
    }

    /// The meaning of a number that another process of mirrorfs ended with. Unknown ones are plain failures.
    #[must_use]
    pub fn from_code(code: u8) -> Exit {
        Exit::ALL.into_iter().find(|e| e.code() == code).unwrap_or(Exit::Failure)
    }

    /// A few words for the table in `--help`.
    #[must_use]
    pub const fn meaning(self) -> &'static str {
        match self {
            Exit::Done => "done",
            Exit::Failure => "failed for another reason",
            Exit::Usage => "wrong command line or configuration",
            Exit::NoVolume => "no volume there",
            Exit::WrongVolume => "another volume is there",
            Exit::InUse => "volume in use, or fenced by a newer writer",
            Exit::Unreachable => "replica unreachable or access denied",
            Exit::Damaged => "damaged, and no intact copy found",
            Exit::TimedOut => "time ran out (work goes on in the background)",
            Exit::NotMounted => "not mounted there, or the daemon does not answer",
            Exit::TooNew => "volume written by a newer mirrorfs",
            Exit::Crashed => "the daemon died again and again",
        }
    }
}

impl From<Exit> for std::process::ExitCode {
    fn from(exit: Exit) -> Self {
        exit.code().into()
    }
}

impl serde::Serialize for Exit {
    fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.serialize_u8(self.code())
    }
}

impl<'de> serde::Deserialize<'de> for Exit {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        u8::deserialize(d).map(Exit::from_code)
    }
}

/// How `mirrorfs fsck` ended: the codes of fsck(8), which scripts know. Several at once are added up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FsckExit(u8);

impl FsckExit {
    /// Nothing is wrong.
    pub const CLEAN: Self = Self(0);
    /// Errors were found and mended.
    pub const CORRECTED: Self = Self(1);
    /// Errors were found and are left.
    pub const LEFT: Self = Self(4);
    /// Something could not be checked.
    pub const FAILED: Self = Self(8);
    /// The command line or the configuration is wrong.
    pub const USAGE: Self = Self(16);
    /// It was interrupted.
    pub const CANCELLED: Self = Self(32);

    /// All codes with their meanings, for `fsck --help`.
    pub const ALL: [(Self, &str); 6] = [
        (Self::CLEAN, "no errors"),
        (Self::CORRECTED, "errors corrected"),
        (Self::LEFT, "errors left"),
        (Self::FAILED, "something could not be checked"),
        (Self::USAGE, "wrong command line or configuration"),
        (Self::CANCELLED, "interrupted"),
    ];

    /// Both.
    #[must_use]
    pub const fn and(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// The number given to the operating system.
    #[must_use]
    pub const fn code(self) -> u8 {
        self.0
    }
}

impl From<FsckExit> for std::process::ExitCode {
    fn from(exit: FsckExit) -> Self {
        exit.code().into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_comes_back_from_its_number() {
        for (number, exit) in Exit::ALL.into_iter().enumerate() {
            assert_eq!(usize::from(exit.code()), number);
            assert_eq!(Exit::from_code(exit.code()), exit);
        }
        assert_eq!(Exit::from_code(101), Exit::Failure);
    }
}
