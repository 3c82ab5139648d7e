//! mirrorfs: one directory kept safe on several clouds.

pub mod cli;
pub mod config;
pub mod daemon;

pub mod control;

pub mod vfs;

pub mod replica;

pub mod restore;

pub mod checkpoint;

pub mod format;

pub mod exit;
pub mod ids;
