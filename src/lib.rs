//! mirrorfs: one directory kept safe on several clouds.

pub mod vfs;

pub mod journal;

pub mod replica;

pub mod format;
pub mod ids;
