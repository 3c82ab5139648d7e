//! The invalidator's own process: it makes the calls, and ends the connection when the daemon dies during one.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::line::{Pages, read_request, write_answer};
use crate::fuse::abort::{abort_by_number, abort_connection};

/// More requests at a time than the daemon has threads to ask.
const MOST_THREADS: usize = 256;
/// How long to try to end the connection.
const ENDING: Duration = Duration::from_secs(120);
/// How often to look meanwhile.
const LOOK_EVERY: Duration = Duration::from_millis(20);
/// Room for the largest request of the kernel: a write of 1 MiB with its headers.
const LARGEST_REQUEST: usize = (1 << 20) + (64 << 10);

/// Serves the requests that come through standard input, with the connection to the kernel on standard output, until
/// the daemon is gone.
pub fn run(device: &str, mountpoint: &Path) {
    stand_alone();
    let ends = io::stdin().as_fd().try_clone_to_owned();
    let ends = ends.and_then(|socket| Ok((socket, io::stdout().as_fd().try_clone_to_owned()?)));
    let (socket, kernel) = match ends {
        Ok((socket, kernel)) => (UnixStream::from(socket), Arc::new(File::from(kernel))),
        Err(e) => return log::warn!("the invalidator of {} cannot start: {e}", mountpoint.display()),
    };
    let calls = Arc::clone(&kernel);
    let running = serve(socket, move |pages| invalidate(&calls, pages));
    let until = Instant::now() + ENDING;
    let mut told = false;
    while running.load(Ordering::Acquire) > 0 && Instant::now() < until {
        if let Err(e) = abort(device, mountpoint) {
            if !std::mem::replace(&mut told, true) {
                log::debug!("{}: the connection cannot be aborted: {e}", mountpoint.display());
            }
            refuse_requests(&kernel);
        }
        thread::sleep(LOOK_EVERY);
    }
}

/// Ends the connection. A call is in progress, so its device exists and the number is not another mount's.
fn abort(device: &str, mountpoint: &Path) -> io::Result<()> {
    match abort_connection(device, mountpoint) {
        // Detached, and still in use.
        Err(e) if e.kind() == io::ErrorKind::NotFound => abort_by_number(device),
        done => done,
    }
}

/// Runs each request in a thread of its own until the daemon is gone, because one may wait for a write whose handler
/// wants another one. Returns the number of those that still run.
fn serve(socket: UnixStream, call: impl Fn(Pages) -> i32 + Send + Sync + 'static) -> Arc<AtomicUsize> {
    let running = Arc::new(AtomicUsize::new(0));
    let call = Arc::new(call);
    let answers = Arc::new(Mutex::new(socket.try_clone()));
    while let Ok((ticket, pages)) = read_request(&socket) {
        let answer = {
            let (running, answers) = (Arc::clone(&running), Arc::clone(&answers));
            move |errno: i32| {
                if let Ok(socket) = &*answers.lock() {
                    // Fails when the daemon is gone.
                    let _ = write_answer(socket, ticket, errno);
                }
                running.fetch_sub(1, Ordering::AcqRel);
            }
        };
        if running.fetch_add(1, Ordering::AcqRel) >= MOST_THREADS {
            answer(libc::EAGAIN);
            continue;
        }
        let (call, refuse) = (Arc::clone(&call), answer.clone());
        let thread = thread::Builder::new().stack_size(128 << 10);
        if let Err(e) = thread.spawn(move || answer(call(pages))) {
            refuse(e.raw_os_error().unwrap_or(libc::EAGAIN));
        }
    }
    running
}

/// Has the kernel write back and drop pages; returns the error number. Waits for the daemon's answers to the writes.
fn invalidate(mut kernel: &File, pages: Pages) -> i32 {
    match kernel.write(&notification(pages)) {
        Ok(_) => 0,
        // The kernel does not have this inode in memory.
        Err(e) if e.raw_os_error() == Some(libc::ENOENT) => 0,
        Err(e) => e.raw_os_error().unwrap_or(libc::EIO),
    }
}

/// `FUSE_NOTIFY_INVAL_INODE` as the kernel reads it: length, code, 0, inode, offset, length, in the machine's order.
fn notification(pages: Pages) -> [u8; 40] {
    const INVAL_INODE: u32 = 2;
    let mut bytes = [0; 40];
    bytes[..4].copy_from_slice(&40_u32.to_ne_bytes());
    bytes[4..8].copy_from_slice(&INVAL_INODE.to_ne_bytes());
    bytes[16..24].copy_from_slice(&pages.ino.to_ne_bytes());
    bytes[24..32].copy_from_slice(&pages.offset.to_ne_bytes());
    bytes[32..].copy_from_slice(&pages.len.to_ne_bytes());
    bytes
}

/// Fails all requests that wait to be read, so that the call that waits for their answers returns. The last resort of a
/// user whose machine shows no control files.
fn refuse_requests(kernel: &File) {
    // SAFETY: changes a flag of a descriptor that only this process uses any more.
    if unsafe { libc::fcntl(kernel.as_raw_fd(), libc::F_SETFL, libc::O_RDWR | libc::O_NONBLOCK) } < 0 {
        return;
    }
    let mut request = vec![0; LARGEST_REQUEST];
    loop {
        let mut device = kernel;
        match device.read(&mut request) {
            Ok(n) if n > 0 => {
                if let Some(refusal) = refusal(&request[..n]) {
                    // Fails when the request was given up meanwhile.
                    let _ = device.write(&refusal);
                }
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            // Nothing waits, or the connection has ended.
            _ => return,
        }
    }
}

/// The answer `ENOTCONN` to a request; `None` for a request that takes no answer.
fn refusal(request: &[u8]) -> Option<[u8; 16]> {
    const FORGET: [u32; 3] = [2, 36, 42];
    let opcode = u32::from_ne_bytes(request.get(4..8)?.try_into().ok()?);
    let unique = request.get(8..16)?;
    if FORGET.contains(&opcode) {
        return None;
    }
    let mut bytes = [0; 16];
    bytes[..4].copy_from_slice(&16_u32.to_ne_bytes());
    bytes[4..8].copy_from_slice(&(-libc::ENOTCONN).to_ne_bytes());
    bytes[8..].copy_from_slice(unique);
    Some(bytes)
}

/// Keeps away what may end the daemon: the terminal's signals, those to a group, and a busy directory.
fn stand_alone() {
    // SAFETY: calls on numbers; a new process leads no group, and if it does nothing is lost but the separation.
    unsafe {
        libc::setsid();
        for signal in [libc::SIGHUP, libc::SIGINT, libc::SIGTERM, libc::SIGQUIT, libc::SIGPIPE] {
            libc::signal(signal, libc::SIG_IGN);
        }
        // What was inherited by mistake, above standard error, must not keep a mount or a pipe open.
        libc::syscall(libc::SYS_close_range, 3u32, u32::MAX, 0u32);
    }
    if let Err(e) = std::env::set_current_dir("/") {
        log::debug!("cannot leave the working directory: {e}");
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::super::line::Line;
    use super::*;

    #[test]
    fn a_request_that_waits_holds_up_no_other() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let line = Line::new(ours);
        let (release, blocked) = mpsc::channel::<()>();
        let blocked = Mutex::new(blocked);
        let helper = thread::spawn(move || {
            serve(theirs, move |pages| match pages.ino {
                1 => blocked.lock().recv().map_or(libc::EIO, |()| 0),
                ino => i32::try_from(ino).unwrap(),
            })
        });
        let (asks, delivers) = (Arc::clone(&line), Arc::clone(&line));
        thread::spawn(move || delivers.deliver());
        let waits = thread::spawn(move || asks.ask(Pages { ino: 1, offset: 0, len: 0 }));
        assert_eq!(line.ask(Pages { ino: 7, offset: 0, len: 0 }), Some(7));
        assert!(!waits.is_finished());
        line.close();
        let running = helper.join().unwrap();
        release.send(()).unwrap();
        assert_eq!(waits.join().unwrap(), Some(0), "what is in progress is still answered");
        let until = Instant::now() + Duration::from_secs(60);
        while running.load(Ordering::Acquire) > 0 {
            assert!(Instant::now() < until);
            thread::sleep(LOOK_EVERY);
        }
    }

    #[test]
    fn requests_that_take_no_answer_get_none() {
        let request = |opcode: u32| {
            let mut bytes = vec![0; 40];
            bytes[4..8].copy_from_slice(&opcode.to_ne_bytes());
            bytes[8..16].copy_from_slice(&99_u64.to_ne_bytes());
            bytes
        };
        let answer = refusal(&request(16)).unwrap();
        assert_eq!(answer[4..8], (-libc::ENOTCONN).to_ne_bytes());
        assert_eq!(answer[8..], 99_u64.to_ne_bytes());
        for forget in [2, 36, 42] {
            assert_eq!(refusal(&request(forget)), None);
        }
        assert_eq!(refusal(&[0; 10]), None);
    }
}
