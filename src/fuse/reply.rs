//! Answers: one function for each shape of reply, taking what the filesystem said.

use bytes::Bytes;
use fuser::{
    Errno, Generation, ReplyAttr, ReplyData, ReplyEmpty, ReplyEntry, ReplyLseek, ReplyStatfs, ReplyWrite,
    ReplyXattr,
};

use super::adapter::TTL;
use super::convert::file_attr;
use super::errno::errno;
use crate::vfs::api::VfsResult;
use crate::vfs::buffers::give_back;
use crate::vfs::types::{Attr, StatFs};

pub(super) fn entry(reply: ReplyEntry, answer: VfsResult<Attr>) {
    match answer {
        Ok(a) => reply.entry(&TTL, &file_attr(&a), Generation(a.generation.into())),
        Err(e) => reply.error(errno(&e)),
    }
}

pub(super) fn attr(reply: ReplyAttr, answer: VfsResult<Attr>) {
    match answer {
        Ok(a) => reply.attr(&TTL, &file_attr(&a)),
        Err(e) => reply.error(errno(&e)),
    }
}

pub(super) fn empty(reply: ReplyEmpty, answer: VfsResult<()>) {
    match answer {
        Ok(()) => reply.ok(),
        Err(e) => reply.error(errno(&e)),
    }
}

pub(super) fn data(reply: ReplyData, answer: VfsResult<Bytes>) {
    match answer {
        Ok(bytes) => {
            reply.data(&bytes);
            give_back(bytes);
        }
        Err(e) => reply.error(errno(&e)),
    }
}

pub(super) fn written(reply: ReplyWrite, answer: VfsResult<u32>) {
    match answer {
        Ok(n) => reply.written(n),
        Err(e) => reply.error(errno(&e)),
    }
}

/// As [`written`]; the adapter never asks to copy more than 32 bits can tell.
pub(super) fn copied(reply: ReplyWrite, answer: VfsResult<u64>) {
    written(reply, answer.map(|n| u32::try_from(n).unwrap_or(u32::MAX)));
}

pub(super) fn offset(reply: ReplyLseek, answer: VfsResult<u64>) {
    match answer.map(i64::try_from) {
        Ok(Ok(n)) => reply.offset(n),
        Ok(Err(_)) => reply.error(Errno::EOVERFLOW),
        Err(e) => reply.error(errno(&e)),
    }
}

pub(super) fn statfs(reply: ReplyStatfs, answer: VfsResult<StatFs>) {
    match answer {
        Ok(s) => {
            let (blocks, free, size) = (s.blocks, s.free, s.block_size);
            reply.statfs(blocks, free, free, s.inodes, s.inodes_free, size, s.name_max, size);
        }
        Err(e) => reply.error(errno(&e)),
    }
}

/// A value or a list of names, as the caller's buffer of `size` bytes allows; 0 asks for the length only.
pub(super) fn xattr(reply: ReplyXattr, value: &[u8], size: u32) {
    match u32::try_from(value.len()) {
        Ok(len) if size == 0 => reply.size(len),
        Ok(len) if len <= size => reply.data(value),
        _ => reply.error(Errno::ERANGE),
    }
}
