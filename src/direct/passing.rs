//! Through the kernel's cache without staying there (`RWF_DONTCACHE`): pages are written back at once, and given free when that is done.
//!
//! For content that lies in another cache besides: that of the mount. Else each page that is written takes two pages of memory, and where
//! memory must be found first, that takes longer than the writing. Where kernel or filesystem do not know it, the cache is used as ever.

use std::fs::File;
use std::io::{self, IoSlice};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::LazyLock;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::buffer::spare_capacity;
use rustix::io::{Errno, ReadWriteFlags, pread, pwritev2};

use super::ALIGN;

/// `RWF_DONTCACHE` in linux/fs.h.
const DONT_CACHE: u32 = 0x80;
/// Shorter writes stay in the cache: the next one may go to the same page, or to the one beside it.
const LEAST: usize = 64 << 10;
/// The first Linux in which it may be trusted: 6.14 could lose a page that was written again meanwhile, 6.15 refuses it.
const SINCE: (u32, u32) = (6, 16);

/// Whether it may be tried. Not any more once a filesystem has refused it.
static USABLE: LazyLock<AtomicBool> = LazyLock::new(|| {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    AtomicBool::new(version_of(&release).is_some_and(|version| version >= SINCE))
});

/// The two first numbers of a kernel's release.
fn version_of(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(str::parse);
    Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
}

/// Whether the answer says that it cannot be had here; then it is not tried again.
fn is_refused(e: Errno, usable: &AtomicBool) -> bool {
    let refused = e == Errno::NOSYS || super::is_refused(&e.into());
    if refused {
        usable.store(false, Ordering::Relaxed);
    }
    refused
}

/// Writes all of `data` at `offset`.
pub fn write(file: &File, data: &[u8], offset: u64) -> io::Result<()> {
    write_if(&USABLE, file, data, offset)
}

fn write_if(usable: &AtomicBool, file: &File, data: &[u8], offset: u64) -> io::Result<()> {
    let mut done = 0;
    let whole_pages = offset.is_multiple_of(ALIGN as u64) && data.len().is_multiple_of(ALIGN);
    if data.len() >= LEAST && whole_pages && usable.load(Ordering::Relaxed) {
        let flags = ReadWriteFlags::from_bits_retain(DONT_CACHE);
        while done < data.len() {
            match pwritev2(file, &[IoSlice::new(&data[done..])], offset + done as u64, flags) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(n) => done += n,
                Err(Errno::INTR) => {}
                Err(e) if is_refused(e, usable) => break,
                Err(e) => return Err(e.into()),
            }
        }
    }
    file.write_all_at(&data[done..], offset + done as u64)
}

/// Reads `len` bytes at `offset`, zeros beyond the file's end, into memory that nobody had to clear before. Pages that the cache has
/// already are read there.
pub fn read(file: &File, len: usize, offset: u64) -> io::Result<Vec<u8>> {
    read_if(&USABLE, file, len, offset)
}

fn read_if(usable: &AtomicBool, file: &File, len: usize, offset: u64) -> io::Result<Vec<u8>> {
    let mut out = Vec::with_capacity(len);
    while out.len() < len {
        let at = offset + out.len() as u64;
        let passing = len - out.len() >= LEAST && usable.load(Ordering::Relaxed);
        let read = match passing {
            true => read_some(file, &mut out, len, at),
            false => pread(file, spare_capacity(&mut out), at),
        };
        match read {
            Ok(0) => break,
            Ok(_) | Err(Errno::INTR) => {}
            Err(e) if passing && is_refused(e, usable) => {}
            Err(e) => return Err(e.into()),
        }
    }
    // More may have been read where there was room for it, or less.
    out.resize(len, 0);
    Ok(out)
}

/// Appends what is at `at` to `out`, up to `len` bytes in all and to its capacity.
fn read_some(file: &File, out: &mut Vec<u8>, len: usize, at: u64) -> Result<usize, Errno> {
    let there = out.len();
    let spare = out.spare_capacity_mut();
    let room = spare.len().min(len - there);
    let part = libc::iovec { iov_base: spare.as_mut_ptr().cast(), iov_len: room };
    let (at, flags) = (libc::off_t::try_from(at).map_err(|_| Errno::INVAL)?, DONT_CACHE as libc::c_int);
    // SAFETY: `part` is memory that `out` owns and nobody else has, `room` bytes at most of it.
    let n = unsafe { libc::preadv2(file.as_raw_fd(), &raw const part, 1, at, flags) };
    let Ok(n) = usize::try_from(n) else {
        return Err(Errno::from_io_error(&io::Error::last_os_error()).unwrap_or(Errno::IO));
    };
    // SAFETY: the kernel has filled `n` bytes behind those that were there; `n` is `room` at most.
    unsafe { out.set_len(there + n.min(room)) };
    Ok(n)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_written_is_read_with_the_kernels_help_and_without() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        let all: Vec<u8> = (0..(1 << 20) + 777).map(|i: u32| (i * 13 % 251) as u8).collect();
        for usable in [USABLE.load(Ordering::Relaxed), false].map(AtomicBool::new) {
            let file =
                File::options().read(true).write(true).create(true).truncate(true).open(&path).unwrap();
            let read = |len, offset| read_if(&usable, &file, len, offset).unwrap();
            for (offset, len) in
                [(0, 1 << 20), (4096, 128 << 10), (100, 200_000), (8192, 4096), (1 << 20, 777)]
            {
                let part = &all[offset..offset + len];
                write_if(&usable, &file, part, offset as u64).unwrap();
                assert!(read(len, offset as u64) == part, "{usable:?} {offset} {len}");
            }
            file.sync_all().unwrap();
            assert!(read(all.len(), 0) == all, "{usable:?}");
            let mut beyond = all[500_000..].to_vec();
            beyond.resize(1 << 20, 0);
            assert!(read(1 << 20, 500_000) == beyond, "{usable:?}");
            assert!(read(0, 5).is_empty() && read(1 << 17, 5 << 20) == vec![0; 1 << 17]);
        }
    }

    #[test]
    fn only_a_refusal_ends_the_attempts() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        std::fs::write(&path, b"").unwrap();
        let usable = AtomicBool::new(true);
        assert!(write_if(&usable, &File::open(&path).unwrap(), &[0; LEAST], 0).is_err());
        assert!(!is_refused(Errno::NOSPC, &usable) && usable.load(Ordering::Relaxed));
        assert!(is_refused(Errno::OPNOTSUPP, &usable) && !usable.load(Ordering::Relaxed));
    }

    #[test]
    fn releases_are_compared_by_number() {
        assert_eq!(version_of("6.18.44-fc-v669\n"), Some((6, 18)));
        assert_eq!(version_of("6.9-rc1"), Some((6, 9)));
        assert_eq!(version_of("unknown"), None);
        assert_eq!(version_of(""), None);
    }
}
