//! The socket between the daemon and its invalidator: requests one way, error numbers the other way, in any order.

use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::mpsc::{SyncSender, sync_channel};

use parking_lot::Mutex;

/// Bytes of an encoded request.
const REQUEST: usize = 32;
/// Bytes of an encoded answer.
const ANSWER: usize = 12;

/// Pages of an inode that the kernel is to write back and to drop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::fuse) struct Pages {
    pub ino: u64,
    /// Where they begin.
    pub offset: i64,
    /// How many bytes; 0: to the end.
    pub len: i64,
}

/// Reads the next request with its ticket; an error when the daemon is gone.
pub(super) fn read_request(mut socket: &UnixStream) -> io::Result<(u64, Pages)> {
    let mut bytes = [0; REQUEST];
    socket.read_exact(&mut bytes)?;
    let [ticket, ino, offset, len] = [0, 1, 2, 3].map(|i| word(&bytes[8 * i..]));
    Ok((ticket, Pages { ino, offset: offset.cast_signed(), len: len.cast_signed() }))
}

/// Sends the error number with which a request ended; 0 is success.
pub(super) fn write_answer(mut socket: &UnixStream, ticket: u64, errno: i32) -> io::Result<()> {
    let mut bytes = [0; ANSWER];
    bytes[..8].copy_from_slice(&ticket.to_le_bytes());
    bytes[8..].copy_from_slice(&errno.to_le_bytes());
    socket.write_all(&bytes)
}

fn word(bytes: &[u8]) -> u64 {
    bytes.iter().take(8).rev().fold(0, |n, b| n << 8 | u64::from(*b))
}

/// The daemon's end.
#[derive(Debug)]
pub(super) struct Line {
    socket: UnixStream,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    last_ticket: u64,
    closed: bool,
    /// The threads that wait, by ticket.
    waiting: HashMap<u64, SyncSender<i32>>,
}

impl Line {
    pub fn new(socket: UnixStream) -> Arc<Self> {
        Arc::new(Self { socket, state: Mutex::default() })
    }

    /// Sends a request and waits for the error number; `None` when the other side is gone, whatever became of the
    /// request.
    pub fn ask(&self, pages: Pages) -> Option<i32> {
        let (sender, answer) = sync_channel(1);
        {
            let mut state = self.state.lock();
            if state.closed {
                return None;
            }
            state.last_ticket += 1;
            let ticket = state.last_ticket;
            state.waiting.insert(ticket, sender);
            let words = [ticket, pages.ino, pages.offset.cast_unsigned(), pages.len.cast_unsigned()];
            let bytes: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
            // Under the lock, so that requests are not mixed. The other side reads whatever its requests wait for.
            if (&self.socket).write_all(&bytes).is_err() {
                state.waiting.remove(&ticket);
                return None;
            }
        }
        answer.recv().ok()
    }

    /// Hands answers to the threads that wait for them, until the other side is gone.
    pub fn deliver(&self) {
        let mut bytes = [0; ANSWER];
        while (&self.socket).read_exact(&mut bytes).is_ok() {
            let errno = i32::from_le_bytes([bytes[8], bytes[9], bytes[10], bytes[11]]);
            if let Some(waits) = self.state.lock().waiting.remove(&word(&bytes)) {
                // The channel has room for the one answer.
                let _ = waits.try_send(errno);
            }
        }
        let mut state = self.state.lock();
        state.closed = true;
        state.waiting.clear();
    }

    /// Lets the other side end.
    pub fn close(&self) {
        // Fails only when the other side is gone already.
        let _ = self.socket.shutdown(Shutdown::Write);
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    #[test]
    fn answers_find_their_requests_in_any_order() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let line = Line::new(ours);
        let asks: Vec<_> = (1..=3_i64)
            .map(|n| {
                let line = Arc::clone(&line);
                thread::spawn(move || line.ask(Pages { ino: 1 << 40, offset: n, len: -n }))
            })
            .collect();
        let delivers = Arc::clone(&line);
        let delivers = thread::spawn(move || delivers.deliver());
        let mut requests: Vec<_> = (0..3).map(|_| read_request(&theirs).unwrap()).collect();
        requests.sort_by_key(|(_, pages)| -pages.offset);
        for (ticket, pages) in requests {
            assert_eq!((pages.ino, pages.len), (1 << 40, -pages.offset));
            write_answer(&theirs, ticket, i32::try_from(pages.offset).unwrap() * 10).unwrap();
        }
        let answers: Vec<_> = asks.into_iter().map(|ask| ask.join().unwrap()).collect();
        assert_eq!(answers, [Some(10), Some(20), Some(30)]);
        line.close();
        assert!(read_request(&theirs).is_err(), "the other side sees the end");
        drop(theirs);
        delivers.join().unwrap();
        assert_eq!(line.ask(Pages { ino: 1, offset: 0, len: 0 }), None);
    }

    #[test]
    fn a_side_that_dies_leaves_nobody_waiting() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let line = Line::new(ours);
        let asks = Arc::clone(&line);
        let asks = thread::spawn(move || asks.ask(Pages { ino: 1, offset: 0, len: 0 }));
        read_request(&theirs).unwrap();
        drop(theirs);
        line.deliver();
        assert_eq!(asks.join().unwrap(), None);
    }
}
