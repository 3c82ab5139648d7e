//! The words of a check: findings, what mends them, the report.
//!
//! Owns no rule.

use std::collections::BTreeMap;
use std::fmt;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::format::tables::{BlockEntry, FileKind};
use crate::ids::{BlockHash, BlockId, Ino, SegmentNo};

/// What sort of thing is wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[expect(missing_docs, reason = "docs/fsck.md has a table of them")]
pub enum Kind {
    Journal,
    Unreadable,
    RootMissing,
    NameLeadsNowhere,
    NameKind,
    NameIllegal,
    NameMisplaced,
    NameInFile,
    NameTwice,
    InodeMissing,
    WrongParent,
    Cycle,
    NoName,
    OrphanHasName,
    OrphanKept,
    OrphanHasNames,
    OrphanOfNothing,
    LinkCount,
    DirectorySize,
    Allocated,
    Size,
    Body,
    Target,
    Attribute,
    HiddenBlocks,
    EmptyExtent,
    BlockMissing,
    BlockBeyondEnd,
    BlockLength,
    BlockPlace,
    BlockReferences,
    BlockUnused,
    BlockTwice,
    DirtyBlock,
    SlotTwice,
    SlotBeyondEnd,
    FrameUses,
    SegmentLive,
    SegmentOrder,
    SealedMark,
    NextNumber,
    Usage,
    CachedSlot,
    CachedContent,
    Cursor,
    Staged,
    StateFile,
    ReplicaObject,
    ReplicaVolume,
    ReplicaDiffers,
}

/// How bad a finding is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Severity {
    /// Expected after a crash, and put right by the next mount: no reason for alarm.
    Harmless,
    /// Must not be.
    Error,
}

impl Kind {
    /// How bad it is.
    #[must_use]
    pub fn severity(self) -> Severity {
        match self {
            Kind::CachedSlot | Kind::CachedContent => Severity::Harmless,
            _ => Severity::Error,
        }
    }

    /// The word for it in reports.
    #[must_use]
    pub fn word(self) -> String {
        match serde_json::to_value(self) {
            Ok(serde_json::Value::String(word)) => word,
            _ => format!("{self:?}"),
        }
    }
}

/// What mends a finding. Structure is mended first; counts are taken anew behind it.
#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the fields are what the words say")]
pub enum Fix {
    /// Takes a name away that leads nowhere, cannot be, or is one too many.
    RemoveName { key: Bytes },
    /// Puts a name to its place in the directory's order.
    MoveName { key: Bytes },
    /// Writes the inode's kind beside the name.
    SetNameKind { key: Bytes, kind: FileKind },
    /// Makes an inode for what is left of one.
    MakeInode { ino: Ino, directory: bool, size: u64 },
    /// Writes the directory's parent.
    SetParent { ino: Ino, parent: Ino },
    /// Gives it a name in `/lost+found`.
    Adopt { ino: Ino },
    /// Takes a directory out of a circle, and gives it a name in `/lost+found`.
    BreakCycle { ino: Ino, parent: Ino },
    /// Takes it off the list of what is deleted.
    Unlist { ino: Ino },
    /// Moves blocks that nothing shows into a file of their own in `/lost+found`.
    MoveBlocks { ino: Ino, size: u64 },
    /// Makes a file in `/lost+found` out of one block.
    AdoptBlock { block: BlockId, len: u32 },
    /// Writes the size.
    SetSize { ino: Ino, size: u64 },
    /// Removes a row that says nothing.
    DeleteRow { key: Bytes },
    /// Writes the link count.
    SetLinks { ino: Ino, links: u32 },
    /// A directory has no size and no blocks.
    ClearDirectory { ino: Ino },
    /// Writes the allocated units.
    SetUnits { ino: Ino, units: u64 },
    /// Writes the references of a block.
    SetReferences { block: BlockId, references: u64 },
    /// Writes how many blocks use a frame (0: nobody).
    SetFrame { hash: BlockHash, entry: Option<Box<BlockEntry>>, uses: u64 },
    /// Writes a segment's live bytes.
    SetLive { segment: SegmentNo, live: u64 },
    /// Writes the next number to be given.
    SetNext { name: &'static str, next: u64 },
    /// Writes the totals.
    SetUsage { blocks: u64, inodes: u64 },
}

impl Fix {
    /// Whether counts depend on it, so that they are to be taken anew behind it.
    #[must_use]
    pub fn is_structure(&self) -> bool {
        matches!(
            self,
            Fix::RemoveName { .. }
                | Fix::MoveName { .. }
                | Fix::SetNameKind { .. }
                | Fix::MakeInode { .. }
                | Fix::SetParent { .. }
                | Fix::Adopt { .. }
                | Fix::BreakCycle { .. }
                | Fix::Unlist { .. }
                | Fix::MoveBlocks { .. }
                | Fix::AdoptBlock { .. }
                | Fix::SetSize { .. }
                // Nothing new may be given a number that is in use.
                | Fix::SetNext { .. }
        )
    }
}

/// Where a finding is to be looked for.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Place {
    /// The volume as a whole, or something that has no path.
    Volume,
    /// An inode.
    Inode(Ino),
    /// A name in a directory.
    Name(Ino, Bytes),
}

/// One thing that is wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// What sort of thing.
    pub kind: Kind,
    /// Where.
    pub place: Place,
    /// What exactly, without the path.
    pub text: String,
    /// What mends it; `None` when nothing does that loses nothing.
    pub fix: Option<Fix>,
}

/// All that is wrong: counted, and kept up to a limit of each kind.
#[derive(Clone, Debug, Default)]
pub struct Findings {
    limit: usize,
    list: Vec<Finding>,
    counts: BTreeMap<Kind, u64>,
}

impl Findings {
    /// Nothing yet; at most `limit` of one kind will be kept.
    #[must_use]
    pub fn new(limit: usize) -> Self {
        Self { limit, ..Self::default() }
    }

    /// One more. `text` is only made when the finding is kept.
    pub fn push(&mut self, kind: Kind, place: Place, fix: Option<Fix>, text: impl FnOnce() -> String) {
        let count = self.counts.entry(kind).or_default();
        *count += 1;
        if *count <= self.limit as u64 {
            self.list.push(Finding { kind, place, text: text(), fix });
        }
    }

    /// One more about an inode.
    pub fn at(&mut self, kind: Kind, ino: Ino, fix: Option<Fix>, text: impl FnOnce() -> String) {
        self.push(kind, Place::Inode(ino), fix, text);
    }

    /// One more about nothing that has a path.
    pub fn about(&mut self, kind: Kind, fix: Option<Fix>, text: impl FnOnce() -> String) {
        self.push(kind, Place::Volume, fix, text);
    }

    /// Those that were kept, in the order in which they were met.
    #[must_use]
    pub fn list(&self) -> &[Finding] {
        &self.list
    }

    /// How many there are of each kind, kept or not.
    #[must_use]
    pub fn counts(&self) -> &BTreeMap<Kind, u64> {
        &self.counts
    }

    /// How many must not be.
    #[must_use]
    pub fn errors(&self) -> u64 {
        self.counts.iter().filter(|(k, _)| k.severity() == Severity::Error).map(|(_, n)| n).sum()
    }

    /// The same, said of something else than the local tables: with `whose` before each text, and nothing that mends them from here.
    #[must_use]
    pub fn on(mut self, whose: &str) -> Self {
        for finding in &mut self.list {
            finding.text = format!("{whose}: {}", finding.text);
            finding.fix = None;
        }
        self
    }
}

/// How much was looked at.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Totals {
    /// Inodes, those that are being deleted included.
    pub inodes: u64,
    /// Names.
    pub names: u64,
    /// Blocks that are known, sealed or not.
    pub blocks: u64,
    /// Segments.
    pub segments: u64,
}

/// What became of a finding.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// It was mended.
    Corrected,
    /// It can be mended with `--repair`.
    Correctable,
    /// It cannot be mended here: the text says what to do.
    Left,
    /// The next mount puts it right by itself.
    Harmless,
}

/// A finding as it is reported.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Line {
    /// What sort of thing.
    pub kind: Kind,
    /// The path within the volume, or what else tells where it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path: Option<String>,
    /// The inode.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ino: Option<Ino>,
    /// What is wrong.
    pub problem: String,
    /// What became of it.
    pub outcome: Outcome,
}

impl fmt::Display for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(path) = &self.path {
            write!(f, "{path}: ")?;
        }
        f.write_str(&self.problem)?;
        match self.outcome {
            Outcome::Corrected => f.write_str(": corrected"),
            Outcome::Correctable | Outcome::Left => Ok(()),
            Outcome::Harmless => f.write_str(" (harmless)"),
        }
    }
}

/// What a check, or a repair, came to.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// How much was looked at.
    pub totals: Totals,
    /// What is wrong, as far as it was kept.
    pub findings: Vec<Line>,
    /// How many there are of each kind, kept or not.
    pub counts: BTreeMap<Kind, u64>,
    /// Errors found.
    pub errors: u64,
    /// Of these, how many were mended.
    pub corrected: u64,
    /// Of these, how many are left.
    pub left: u64,
    /// What a person should know.
    pub notes: Vec<String>,
    /// What should have been checked and could not be.
    #[serde(default)]
    pub failed: Vec<String>,
}
