//! Entries for the fuzzer into what the journal reads from the local disk.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::tail::{self, Found, GroupReader};
use super::witness;
use crate::ids::Lsn;

/// Number of the tail file that the bytes are taken for.
const SEQ: u64 = 9;

/// Reads `bytes` as a file of the tail, as a replay does.
pub fn tail_file(bytes: &[u8]) {
    let Ok(fd) = rustix::fs::memfd_create("tail", rustix::fs::MemfdFlags::CLOEXEC) else { return };
    let file = File::from(fd);
    if file.write_all_at(bytes, 0).is_err() {
        return;
    }
    let size = match tail::read_file_header(&file, SEQ) {
        Ok((_, size)) => size,
        // The groups are read all the same: few inputs have the right checksum.
        Err(_) => bytes.len() as u64,
    };
    let mut reader = GroupReader::new(file, SEQ, size);
    let mut expected = Lsn(1);
    while let Ok(Found::Group { first, last, payload }) = reader.next() {
        if let Ok(records) = tail::records_of(Path::new("tail"), first, last, &payload) {
            expected = records.last().map_or(expected, |r| r.lsn.next());
        }
    }
    // The size is what the header says, whatever there is.
    if size <= 64 << 20 {
        let _ = reader.proof_of_more(expected);
    }
}

/// Makes the checksums of a tail file right again.
pub fn reseal_tail(bytes: &mut [u8]) {
    tail::reseal(bytes, SEQ);
}

/// Reads `bytes` as a slot of the witness.
pub fn witness(bytes: &[u8]) {
    witness::fuzz(bytes);
}
