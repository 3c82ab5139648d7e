//! mirrorfs: one directory kept safe on several clouds.
//!
//! A mounted directory whose every change is journaled on the local disk and mirrored to several independent *replicas*
//! (buckets or folders). Any one replica alone brings the whole volume back. This crate is the program and its parts;
//! `docs/architecture.md` tells the whole story, `docs/semantics.md` what applications may rely on, `docs/format.md`
//! every byte that is stored.
//!
//! # The way of the data
//!
//! ```text
//!             app
//!              │ read, write, rename, fsync …
//!         ┌────▼────┐
//!         │  fuse   │ decode, ask, answer, errno table
//!         └────┬────┘
//!         ┌────▼────┐   names, inodes, files: POSIX rules
//!         │   vfs   │
//!         └─┬─────┬─┘
//!  metadata │     │ content
//!   ┌───────▼─┐ ┌─▼───────┐
//!   │ journal │ │  cache  │ journal: tail (the truth), memtable, sled behind
//!   └───────┬─┘ └─┬─────▲─┘ cache: dirty blocks pinned, clean ones evictable, one slot file
//!   records │ cut │     │ a block that is not local
//!        ┌──▼─────▼┐  ┌─┴──────┐
//!        │   txg   │  │ reader │ nearest healthy replica, hedged, verified
//!        └────┬────┘  └─▲──────┘
//!    segments │ staged  │
//!        ┌────▼─────────┴───┐
//!        │ replica: shipper │ one per replica, each with its own cursor
//!        └──┬─────┬─────┬───┘
//!          S3    GCS   folder …
//! ```
//!
//! # The words
//!
//! | word | meaning |
//! |---|---|
//! | volume | one filesystem; has a UUID |
//! | replica | one place that holds a full copy of the volume |
//! | record | one atomic batch of metadata changes, numbered by an LSN |
//! | block | up to `block_size` bytes of one file's content at one moment; has a number from its first write on, a hash once sealed |
//! | frame | the stored form of a block's bytes in a segment; blocks of equal content share one |
//! | slot | one block-sized place in the local slot file |
//! | transaction group | everything changed up to a *cut*: what becomes durable on replicas, all or nothing |
//! | segment | one immutable object of frames and records, identical on every replica |
//! | checkpoint | a dump of all metadata, so that a restore need not replay the whole log |
//! | epoch | the number of a writer's tenure; a higher one fences off a lower one |
//! | cursor | per replica: the segment up to which everything is known to be there |
//!
//! # The modules
//!
//! In reading order; imports go downwards only (`tests/tidy.rs` holds them to it).

#[doc(hidden)]
pub mod fuzz;

pub mod cli;
pub mod guardian;
pub mod daemon;
pub mod config;
pub mod control;
pub mod bench;

pub mod fuse;
pub mod fsck;
pub mod vfs;
pub mod txg;
pub mod cache;
pub mod journal;

pub mod reconcile;
pub mod restore;
pub mod checkpoint;
pub mod replica;

pub mod format;
pub mod trace;
pub mod priority;
pub mod direct;
pub mod private;
pub mod escape;
pub mod exit;
pub mod ids;
