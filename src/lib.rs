//! mirrorfs: one directory kept safe on several clouds.

pub mod vfs;

pub mod replica;

pub mod restore;

pub mod checkpoint;

pub mod format;
pub mod ids;
