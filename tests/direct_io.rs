//! Direct writes beside readers: what a direct write has finished is seen by every later read, and
//! stays.
//!
//! `MIRRORFS_DIRECT_ROUNDS` makes the number of writes another one.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::fs::{self, File, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use support::mount::Volume;

/// The size of a request that the kernel splits, in bytes.
const LEN: usize = 655_360;
const PAGE: usize = 4096;

/// Memory that direct I/O takes, and that two may look at.
struct Pages {
    at: *mut u8,
    len: usize,
}

// SAFETY: it is memory of our own; who writes it has it alone.
unsafe impl Send for Pages {}

impl Pages {
    fn new(len: usize) -> Self {
        Self::map(len, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1)
    }

    fn of(file: &File, len: usize) -> Self {
        Self::map(len, libc::MAP_SHARED, file.as_raw_fd())
    }

    fn map(len: usize, flags: i32, fd: i32) -> Self {
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping.
        let at = unsafe { libc::mmap(std::ptr::null_mut(), len, prot, flags, fd, 0) };
        assert_ne!(at, libc::MAP_FAILED);
        Self { at: at.cast(), len }
    }

    fn fill(&mut self, value: u8) {
        // SAFETY: all of it is ours.
        unsafe { self.at.write_bytes(value, self.len) };
    }

    fn bytes(&self) -> &[u8] {
        // SAFETY: nobody writes while this is borrowed, but for a mapped file, which is read as it
        // happens to be.
        unsafe { std::slice::from_raw_parts(self.at, self.len) }
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: all of it is ours.
        unsafe { std::slice::from_raw_parts_mut(self.at, self.len) }
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        // SAFETY: nothing refers to it any more.
        unsafe { libc::munmap(self.at.cast(), self.len) };
    }
}

/// Something that writes past the cache and returns when the write has ended.
trait Writer {
    fn write(&mut self, file: &File, data: &Pages, at: u64);
}

/// `pwrite`.
struct Plain;

impl Writer for Plain {
    fn write(&mut self, file: &File, data: &Pages, at: u64) {
        file.write_all_at(data.bytes(), at).unwrap();
    }
}

/// The kernel's asynchronous I/O, as libaio uses it.
struct Aio(libc::c_ulong);

/// The kernel's `struct iocb`.
#[repr(C)]
#[derive(Default)]
struct Iocb {
    data: u64,
    key: u32,
    rw_flags: u32,
    opcode: u16,
    priority: i16,
    fd: u32,
    buf: u64,
    len: u64,
    offset: i64,
    reserved: u64,
    flags: u32,
    event_fd: u32,
}

impl Aio {
    fn new() -> Self {
        let mut context: libc::c_ulong = 0;
        // SAFETY: a pointer to a number that is 0.
        assert_eq!(unsafe { libc::syscall(libc::SYS_io_setup, 8, &raw mut context) }, 0);
        Self(context)
    }
}

impl Writer for Aio {
    fn write(&mut self, file: &File, data: &Pages, at: u64) {
        const PWRITE: u16 = 1;
        let mut request = Iocb {
            opcode: PWRITE,
            fd: file.as_raw_fd().cast_unsigned(),
            buf: data.at as u64,
            len: data.len as u64,
            offset: at.cast_signed(),
            ..Iocb::default()
        };
        let mut list = [&raw mut request];
        // `struct io_event`: data, request, result, result2.
        let mut event = [0_i64; 4];
        // SAFETY: request, buffer and event outlive the wait for its end.
        unsafe {
            assert_eq!(libc::syscall(libc::SYS_io_submit, self.0, 1, list.as_mut_ptr()), 1);
            let no_limit: *const libc::timespec = std::ptr::null();
            assert_eq!(libc::syscall(libc::SYS_io_getevents, self.0, 1, 1, event.as_mut_ptr(), no_limit), 1);
        }
        assert_eq!(event[2], i64::try_from(data.len).unwrap());
    }
}

impl Drop for Aio {
    fn drop(&mut self) {
        // SAFETY: our own context.
        unsafe { libc::syscall(libc::SYS_io_destroy, self.0) };
    }
}

/// `io_uring`.
struct Ring(io_uring::IoUring);

impl Writer for Ring {
    fn write(&mut self, file: &File, data: &Pages, at: u64) {
        let fd = io_uring::types::Fd(file.as_raw_fd());
        let len = u32::try_from(data.len).unwrap();
        let request = io_uring::opcode::Write::new(fd, data.at, len).offset(at).build();
        // SAFETY: the buffer outlives the wait for its end.
        unsafe { self.0.submission().push(&request).unwrap() };
        self.0.submit_and_wait(1).unwrap();
        let ended = self.0.completion().next().unwrap();
        assert_eq!(ended.result(), i32::try_from(data.len).unwrap());
    }
}

fn rounds() -> usize {
    std::env::var("MIRRORFS_DIRECT_ROUNDS").ok().and_then(|n| n.parse().ok()).unwrap_or(300)
}

fn open(path: &Path, flags: i32) -> File {
    OpenOptions::new().read(true).write(true).custom_flags(flags).open(path).unwrap()
}

/// Writes `rounds` times while others read through the cache and a mapping; answers after how many
/// writes the next look at the file showed anything else.
fn stale(path: &Path, writer: &mut dyn Writer, rounds: usize) -> usize {
    let mut data = Pages::new(LEN);
    fs::write(path, [0; LEN]).unwrap();
    let direct = open(path, libc::O_DIRECT);
    let (cached, mapped) = (open(path, 0), Pages::of(&open(path, 0), LEN));
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                let (file, mut room) = (open(path, 0), vec![0; LEN]);
                while !stop.load(Ordering::Relaxed) {
                    file.read_exact_at(&mut room, 0).unwrap();
                }
            });
        }
        let mut room = vec![0; LEN];
        let mut bad = 0;
        for round in 0..rounds {
            let value = u8::try_from(round % 255).unwrap() + 1;
            data.fill(value);
            writer.write(&direct, &data, 0);
            cached.read_exact_at(&mut room, 0).unwrap();
            let right = room.iter().all(|b| *b == value) && mapped.bytes().iter().all(|b| *b == value);
            bad += usize::from(!right);
        }
        stop.store(true, Ordering::Relaxed);
        bad
    })
}

/// After the readers: one byte of each page is written through the cache. The rest of the page must
/// not be older than the last direct write.
fn is_undone(path: &Path, value: u8) -> bool {
    let cached = open(path, 0);
    for page in 0..LEN / PAGE {
        cached.write_all_at(b"Z", (page * PAGE) as u64).unwrap();
    }
    cached.sync_all().unwrap();
    let mut found = Pages::new(LEN);
    open(path, libc::O_DIRECT).read_exact_at(found.bytes_mut(), 0).unwrap();
    found.bytes().chunks(PAGE).any(|page| page[0] != b'Z' || page[1..].iter().any(|b| *b != value))
}

fn check(test: &str, mut writer: impl Writer) {
    let Some(mut v) = Volume::new(test) else { return };
    v.folder("a");
    let m = v.mount();
    let (path, rounds) = (m.path("file"), rounds());
    let bad = stale(&path, &mut writer, rounds);
    assert_eq!(bad, 0, "{bad} of {rounds} finished writes were not seen by the read after them");
    let last = u8::try_from((rounds - 1) % 255).unwrap() + 1;
    assert!(!is_undone(&path, last), "a later write through the cache undid a direct one");
    m.unmount();
}

#[test]
fn finished_asynchronous_writes_are_seen_and_stay() {
    check("direct: aio", Aio::new());
}

#[test]
fn finished_writes_of_io_uring_are_seen_and_stay() {
    match io_uring::IoUring::new(8) {
        Ok(ring) => check("direct: io_uring", Ring(ring)),
        Err(e) => println!("SKIP: this kernel gives no io_uring: {e}"),
    }
}

#[test]
fn finished_synchronous_writes_are_seen_and_stay() {
    check("direct: pwrite", Plain);
}

/// Several asynchronous writes that enlarge the file, each of a piece of its own, beside readers of
/// the end.
#[test]
fn writes_that_enlarge_the_file_are_seen() {
    let Some(mut v) = Volume::new("direct: enlarging") else { return };
    v.folder("a");
    let m = v.mount();
    let path = m.path("file");
    fs::write(&path, b"").unwrap();
    let (direct, cached) = (open(&path, libc::O_DIRECT), open(&path, 0));
    let stop = AtomicBool::new(false);
    let piece = 3 * PAGE;
    thread::scope(|scope| {
        scope.spawn(|| {
            let file = open(&path, 0);
            while !stop.load(Ordering::Relaxed) {
                let end = file.metadata().unwrap().len();
                let mut room = vec![0; 4 * PAGE];
                let _ = file.read_at(&mut room, end.saturating_sub(2 * PAGE as u64)).unwrap();
            }
        });
        let mut writers: Vec<Box<dyn Writer>> = vec![Box::new(Plain), Box::new(Aio::new())];
        if let Ok(ring) = io_uring::IoUring::new(8) {
            writers.push(Box::new(Ring(ring)));
        }
        let (mut data, mut room) = (Pages::new(piece), vec![0; piece]);
        for round in 0..rounds().min(1000) {
            let (value, at) = (u8::try_from(round % 255).unwrap() + 1, (round * piece) as u64);
            data.fill(value);
            let chosen = round % writers.len();
            writers[chosen].write(&direct, &data, at);
            let n = cached.read_at(&mut room, at).unwrap();
            assert!(n == piece && room.iter().all(|b| *b == value), "round {round}: {n} bytes");
        }
        stop.store(true, Ordering::Relaxed);
    });
    drop((direct, cached));
    m.unmount();
}
