//! mirrorfs: one directory kept safe on several clouds.

pub mod cli;
pub mod config;
pub mod daemon;

pub mod control;

pub mod fuse;
pub mod vfs;

pub mod txg;

pub mod cache;
pub mod journal;

pub mod replica;

pub mod restore;

pub mod checkpoint;

pub mod format;

pub mod exit;
pub mod ids;
