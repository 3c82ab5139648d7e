//! Values of sled in brief, in memory: so much of each as looking up takes, for many more keys than sled's own cache has pages for.
//!
//! Owns the memory, its bound, and the rule that makes a stale entry impossible. Knows no table: what is kept of a key and its value is
//! said by a [`Form`].
//!
//! What is kept is always what *sled* holds: newer changes lie in the layers above, which are asked first. So it is changed where
//! sled is, in one place and by one thread (the applier), behind each step of a round and before the round's table is taken off those layers.
//! A reader who has found nothing here, reads sled and then fills in what it found must not bring back what was replaced meanwhile: it
//! takes a [`Ticket`] first, and every change in that part of the memory makes the ticket void.

use std::collections::VecDeque;
use std::hash::{BuildHasher, RandomState};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use hashbrown::HashTable;
use parking_lot::Mutex;

/// Parts, each with a lock of its own.
const SHARDS: usize = 16;
/// Memory comes, and is given up, in chunks of this size.
const CHUNK: usize = 32 << 10;
/// Chunks of a part at most: 45 MiB in all. With a place for each entry it is some 64 MiB, which is about a million files.
const CHUNKS: usize = 90;
/// Of the room, in eighths, what one first byte of a key may take of what is [offered](Briefs::offer): keys are offered in order, and
/// who looks up needs more than one table.
const SHARE: usize = 5;

/// What is kept in memory of keys and values. Both append to the buffer and answer whether anything is kept; of equal brief keys the keys
/// must be equal.
#[derive(Clone, Copy, Debug)]
pub struct Form {
    /// The brief form of a key.
    pub key: fn(&[u8], &mut Vec<u8>) -> bool,
    /// The brief form of a key's value.
    pub value: fn(&[u8], &[u8], &mut Vec<u8>) -> bool,
}

impl Form {
    /// Nothing is kept.
    pub const NONE: Self = Self { key: |_, _| false, value: |_, _, _| false };
}

/// The state of a part before somebody read sled.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ticket(u64);

/// Values in brief.
pub(super) struct Briefs {
    form: Form,
    hasher: RandomState,
    shards: Vec<Mutex<Shard>>,
    /// Bytes that were offered and taken, by the key's first byte.
    offered: [AtomicUsize; 256],
    /// Chunks of a part at most.
    chunks: usize,
}

/// Records `[length of key][length of value][key][value]` in chunks, the oldest of which goes when there are too many.
#[derive(Default)]
struct Shard {
    chunks: VecDeque<Vec<u8>>,
    /// The number of the first chunk; numbers go round.
    first: u16,
    /// Where records lie: number of the chunk, and place in it.
    index: HashTable<(u16, u16)>,
    /// Counts changes.
    changes: u64,
}

impl Briefs {
    pub(super) fn new(form: Form) -> Self {
        Self::with_chunks(form, CHUNKS)
    }

    fn with_chunks(form: Form, chunks: usize) -> Self {
        Self {
            form,
            hasher: RandomState::new(),
            shards: (0..SHARDS).map(|_| Mutex::default()).collect(),
            offered: [const { AtomicUsize::new(0) }; 256],
            chunks,
        }
    }

    /// Appends the brief value of a key to `out`. Else a ticket to [`fill`](Self::fill) it in with; none when nothing is kept of this key.
    pub(super) fn get(&self, key: &[u8], out: &mut Vec<u8>) -> Result<(), Option<Ticket>> {
        let Some((hash, key)) = self.key(key) else { return Err(None) };
        let shard = self.shard(hash).lock();
        match shard.find(hash, &key) {
            Some(at) => {
                out.extend_from_slice(shard.record(at).1);
                Ok(())
            }
            None => Err(Some(Ticket(shard.changes))),
        }
    }

    /// Keeps the value that sled had after `ticket` was given, unless anything has changed since; appends its brief form to `out`. `false`
    /// when there is none.
    pub(super) fn fill(&self, ticket: Ticket, key: &[u8], value: &[u8], out: &mut Vec<u8>) -> bool {
        let from = out.len();
        if !(self.form.value)(key, value, out) {
            out.truncate(from);
            return false;
        }
        if let Some((hash, key)) = self.key(key) {
            let mut shard = self.shard(hash).lock();
            if shard.changes == ticket.0 {
                self.put(&mut shard, hash, &key, &out[from..]);
            }
        }
        true
    }

    /// sled has a new value of `key`, or none.
    pub(super) fn change(&self, key: &[u8], value: Option<&[u8]>) {
        let Some((hash, brief)) = self.key(key) else { return };
        let mut new = Vec::with_capacity(64);
        let kept = value.is_some_and(|value| (self.form.value)(key, value, &mut new));
        let mut shard = self.shard(hash).lock();
        shard.changes = shard.changes.wrapping_add(1);
        if kept {
            self.put(&mut shard, hash, &brief, &new);
        } else {
            self.remove(&mut shard, hash, &brief);
        }
    }

    /// A value that somebody read in passing, who knows that it does not change meanwhile: kept as long as there is room.
    pub(super) fn offer(&self, key: &[u8], value: &[u8]) {
        let Some((hash, brief)) = self.key(key) else { return };
        let taken = &self.offered[usize::from(key.first().copied().unwrap_or_default())];
        if taken.load(Relaxed) > SHARDS * self.chunks * CHUNK * SHARE / 8 {
            return;
        }
        let mut new = Vec::with_capacity(64);
        if !(self.form.value)(key, value, &mut new) {
            return;
        }
        let mut shard = self.shard(hash).lock();
        if shard.has_room(self.chunks, brief.len() + new.len()) && shard.find(hash, &brief).is_none() {
            self.put(&mut shard, hash, &brief, &new);
            taken.fetch_add(brief.len() + new.len() + 2, Relaxed);
        }
    }

    /// Bytes that it occupies, about.
    pub(super) fn bytes(&self) -> usize {
        self.shards.iter().map(|shard| shard.lock().bytes()).sum()
    }

    fn key(&self, key: &[u8]) -> Option<(u64, Vec<u8>)> {
        let mut brief = Vec::with_capacity(64);
        (self.form.key)(key, &mut brief).then(|| (self.hasher.hash_one(&brief), brief))
    }

    fn shard(&self, hash: u64) -> &Mutex<Shard> {
        // Not the bits that the index takes.
        &self.shards[(hash >> 32) as usize % SHARDS]
    }

    fn rehash(&self, shard: &Shard, at: (u16, u16)) -> u64 {
        self.hasher.hash_one(shard.record(at).0)
    }

    fn put(&self, shard: &mut Shard, hash: u64, key: &[u8], value: &[u8]) {
        let (Ok(key_len), Ok(value_len)) = (u8::try_from(key.len()), u8::try_from(value.len())) else {
            return self.remove(shard, hash, key);
        };
        if let Some(at) = shard.find(hash, key) {
            if shard.replace(at, value) {
                return;
            }
            self.remove(shard, hash, key);
        }
        let len = key.len() + value.len() + 2;
        if shard.chunks.back().is_none_or(|chunk| chunk.len() + len > CHUNK) {
            if shard.chunks.len() >= self.chunks {
                self.drop_oldest(shard);
            }
            shard.chunks.push_back(Vec::with_capacity(CHUNK));
        }
        let number = shard.first.wrapping_add((shard.chunks.len() - 1) as u16);
        let Some(chunk) = shard.chunks.back_mut() else { return };
        let at = (number, chunk.len() as u16);
        chunk.extend_from_slice(&[key_len, value_len]);
        chunk.extend_from_slice(key);
        chunk.extend_from_slice(value);
        // Taken out while it grows, because its hashes are those of the records.
        let mut index = std::mem::take(&mut shard.index);
        index.insert_unique(hash, at, |at| self.rehash(shard, *at));
        shard.index = index;
    }

    fn remove(&self, shard: &mut Shard, hash: u64, key: &[u8]) {
        if let Some(at) = shard.find(hash, key)
            && let Ok(entry) = shard.index.find_entry(hash, |found| *found == at)
        {
            entry.remove();
        }
    }

    /// Gives up the oldest chunk, and what the index says of it.
    fn drop_oldest(&self, shard: &mut Shard) {
        let number = shard.first;
        let mut at = 0;
        while shard.chunks.front().is_some_and(|chunk| at < chunk.len()) {
            let place = (number, at as u16);
            let hash = self.rehash(shard, place);
            let (key, value) = shard.record(place);
            at += key.len() + value.len() + 2;
            // Unless it has been replaced, by one that lies elsewhere.
            if let Ok(entry) = shard.index.find_entry(hash, |found| *found == place) {
                entry.remove();
            }
        }
        shard.chunks.pop_front();
        shard.first = number.wrapping_add(1);
    }
}

impl Shard {
    /// Key and value at a place.
    fn record(&self, (number, at): (u16, u16)) -> (&[u8], &[u8]) {
        let chunk = &self.chunks[usize::from(number.wrapping_sub(self.first))];
        let record = &chunk[usize::from(at)..];
        let (key, value) = (usize::from(record[0]), usize::from(record[1]));
        record[2..2 + key + value].split_at(key)
    }

    fn find(&self, hash: u64, key: &[u8]) -> Option<(u16, u16)> {
        self.index.find(hash, |at| self.record(*at).0 == key).copied()
    }

    /// Puts a value of the same length in place of the one there; `false` when its length is another.
    fn replace(&mut self, (number, at): (u16, u16), value: &[u8]) -> bool {
        let chunk = &mut self.chunks[usize::from(number.wrapping_sub(self.first))];
        let record = &mut chunk[usize::from(at)..];
        let (key, old) = (usize::from(record[0]), usize::from(record[1]));
        if old != value.len() {
            return false;
        }
        record[2 + key..2 + key + old].copy_from_slice(value);
        true
    }

    fn has_room(&self, chunks: usize, len: usize) -> bool {
        self.chunks.len() < chunks || self.chunks.back().is_some_and(|chunk| chunk.len() + len + 2 <= CHUNK)
    }

    fn bytes(&self) -> usize {
        // Each place costs itself and a byte of the table's.
        self.chunks.len() * CHUNK + self.index.capacity() * 8 / 7 * (size_of::<(u16, u16)>() + 1)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;
    use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};

    use parking_lot::RwLock;
    use rand::{Rng, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    use super::super::tests::seed;
    use super::*;

    /// Keys that begin with `k`, values that do not begin with `-`, whole.
    const WHOLE: Form = Form {
        key: |key, out| {
            out.extend_from_slice(key);
            key.first() == Some(&b'k')
        },
        value: |_, value, out| {
            out.extend_from_slice(value);
            value.first() != Some(&b'-')
        },
    };

    fn found(briefs: &Briefs, key: &[u8]) -> Option<Vec<u8>> {
        let mut out = Vec::new();
        briefs.get(key, &mut out).ok().map(|()| out)
    }

    #[test]
    fn what_was_changed_since_the_ticket_is_not_filled_in() {
        let briefs = Briefs::new(WHOLE);
        let mut out = Vec::new();
        let ticket = briefs.get(b"k", &mut out).unwrap_err().unwrap();
        briefs.change(b"k", Some(b"new"));
        assert!(briefs.fill(ticket, b"k", b"old", &mut out));
        assert_eq!((&out[..], found(&briefs, b"k").unwrap()), (&b"old"[..], b"new".to_vec()));
        briefs.change(b"k", None);
        assert!(briefs.fill(ticket, b"k", b"old", &mut out));
        assert_eq!(found(&briefs, b"k"), None);
        let ticket = briefs.get(b"k", &mut out).unwrap_err().unwrap();
        assert!(briefs.fill(ticket, b"k", b"then", &mut out));
        assert_eq!(found(&briefs, b"k").unwrap(), b"then");
    }

    #[test]
    fn what_has_no_brief_form_is_not_kept() {
        let briefs = Briefs::new(WHOLE);
        let mut out = Vec::new();
        assert!(briefs.get(b"x", &mut out).unwrap_err().is_none());
        briefs.change(b"k", Some(b"value"));
        briefs.change(b"k", Some(b"-none"));
        assert_eq!(found(&briefs, b"k"), None);
        let ticket = briefs.get(b"k", &mut out).unwrap_err().unwrap();
        assert!(!briefs.fill(ticket, b"k", b"-none", &mut out));
        assert!(out.is_empty());
        // Too long for a record: what was there goes all the same.
        briefs.change(b"k", Some(b"value"));
        briefs.change(b"k", Some(&[b'v'; 300]));
        assert_eq!(found(&briefs, b"k"), None);
    }

    #[test]
    fn it_never_answers_but_with_the_newest_value_and_stays_within_its_bound() {
        let mut rng = ChaCha8Rng::seed_from_u64(seed());
        let briefs = Briefs::with_chunks(WHOLE, 2);
        // Numbers of chunks go round.
        briefs.shards.iter().for_each(|s| s.lock().first = u16::MAX - 3);
        let mut model: HashMap<Vec<u8>, Vec<u8>> = HashMap::new();
        let mut hits = 0;
        for _ in 0..200_000 {
            let key = format!("k{}", rng.random_range(0..30_000)).into_bytes();
            let value = vec![rng.random_range(b'a'..=b'z'); rng.random_range(1..60)];
            match rng.random_range(0..8) {
                0..4 => {
                    briefs.change(&key, Some(&value));
                    model.insert(key, value);
                }
                4 => {
                    briefs.change(&key, None);
                    model.remove(&key);
                }
                5 => {
                    if let Some(value) = model.get(&key) {
                        briefs.offer(&key, value);
                    }
                }
                _ => match (briefs.get(&key, &mut Vec::new()), model.get(&key)) {
                    (Ok(()), value) => {
                        hits += 1;
                        assert_eq!(found(&briefs, &key).as_ref(), value);
                    }
                    (Err(ticket), Some(value)) => {
                        assert!(briefs.fill(ticket.unwrap(), &key, value, &mut Vec::new()));
                        assert_eq!(found(&briefs, &key).as_ref(), Some(value));
                    }
                    (Err(_), None) => {}
                },
            }
        }
        let bound = SHARDS * 2 * CHUNK;
        assert!(hits > 1000, "{hits}");
        assert!(briefs.shards.iter().all(|s| s.lock().chunks.len() == 2), "full");
        assert!(briefs.bytes() < bound * 2, "{} for {bound}", briefs.bytes());
        for shard in &briefs.shards {
            let shard = shard.lock();
            let keys: Vec<&[u8]> = shard.index.iter().map(|at| shard.record(*at).0).collect();
            let single: std::collections::HashSet<_> = keys.iter().collect();
            assert_eq!(keys.len(), single.len(), "one entry for each key");
        }
    }

    #[test]
    fn offers_take_free_room_only_and_leave_some_to_other_tables() {
        let briefs = Briefs::with_chunks(WHOLE, 2);
        briefs.change(b"k", Some(b"there"));
        briefs.offer(b"k", b"offered");
        assert_eq!(found(&briefs, b"k").unwrap(), b"there");
        for n in 0..100_000 {
            briefs.offer(format!("k{n}").as_bytes(), &[b'v'; 20]);
        }
        let used: usize =
            briefs.shards.iter().map(|s| s.lock().chunks.iter().map(Vec::len).sum::<usize>()).sum();
        let room = SHARDS * 2 * CHUNK;
        assert!(used > room / 2 && used < room * 6 / 8, "{used} of {room}");
        assert!(found(&briefs, b"k").is_some() && found(&briefs, b"k0").is_some());
    }

    /// Readers fill in what they read while one thread changes it: none ever sees what was replaced before it came.
    #[test]
    fn readers_never_bring_back_what_was_replaced() {
        const KEYS: usize = 24;
        let seed = seed();
        let briefs = Briefs::with_chunks(WHOLE, 1);
        // Versions; the odd ones are values, the even ones say that there is none.
        let sled: Vec<RwLock<u64>> = (0..KEYS).map(|_| RwLock::new(0)).collect();
        let done: Vec<AtomicU64> = (0..KEYS).map(|_| AtomicU64::new(0)).collect();
        let key = |n: usize| format!("k{n}").into_bytes();
        let text = |version: u64| format!("{version:08}").into_bytes();
        let value = |version: u64| (version % 2 == 1).then(|| text(version));
        let ended = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut rng = ChaCha8Rng::seed_from_u64(seed);
                for _ in 0..60_000 {
                    let n = rng.random_range(0..KEYS);
                    let version = *sled[n].read() + rng.random_range(1..3);
                    *sled[n].write() = version;
                    if rng.random_range(0..4) == 0 {
                        std::thread::yield_now();
                    }
                    briefs.change(&key(n), value(version).as_deref());
                    done[n].store(version, SeqCst);
                }
                ended.store(true, SeqCst);
            });
            for reader in 1..4 {
                let (briefs, sled, done, ended) = (&briefs, &sled, &done, &ended);
                scope.spawn(move || {
                    let mut rng = ChaCha8Rng::seed_from_u64(seed.wrapping_add(reader));
                    while !ended.load(SeqCst) {
                        let n = rng.random_range(0..KEYS);
                        let before = done[n].load(SeqCst);
                        let mut out = Vec::new();
                        let seen = match briefs.get(&key(n), &mut out) {
                            Ok(()) => String::from_utf8(out).unwrap().parse().unwrap(),
                            Err(ticket) => {
                                let version = *sled[n].read();
                                if rng.random_range(0..4) == 0 {
                                    std::thread::yield_now();
                                }
                                if let Some(value) = value(version) {
                                    assert!(briefs.fill(ticket.unwrap(), &key(n), &value, &mut out));
                                }
                                version
                            }
                        };
                        assert!(seen >= before, "key {n}: version {seen}, though {before} was there before");
                    }
                });
            }
        });
        for (n, version) in sled.iter().enumerate() {
            if let Some(found) = found(&briefs, &key(n)) {
                assert_eq!(Some(found), value(*version.read()));
            }
        }
    }
}
