//! mirrorfs: one directory kept safe on several clouds.

pub mod fuse;
pub mod vfs;

pub mod replica;

pub mod format;
pub mod ids;
