//! The claim protocol with threads for transactions: every digest is written exactly once, everybody
//! gets through, and in the end nothing is claimed.
use std::collections::{HashMap, HashSet};
use std::ops::Deref;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};
use std::sync::{Condvar, Mutex, MutexGuard};
use std::time::Duration;

use pg_dedup_shared::book::{Book, NotClaimed};
use pg_dedup_shared::claims::{self, Claim, Exclusive, PARTITIONS, Refused, Run, Table};
use pg_dedup_shared::filter::{Block, Filter};
use pg_dedup_shared::partition::{Partition, Slot, capacity};
use pg_dedup_shared::prefetch::NoPrefetch;
use pg_dedup_shared::{Key, Scope};

struct Memory {
    partitions: Vec<Mutex<Vec<Slot>>>,
    used: Vec<AtomicU32>,
}

struct Guard<'a>(MutexGuard<'a, Vec<Slot>>, &'a AtomicU32);

impl Exclusive for Guard<'_> {
    fn partition(&mut self) -> Partition<'_> {
        Partition::new(&mut self.0, self.1)
    }
}

struct Reading<'a>(MutexGuard<'a, Vec<Slot>>);

impl Deref for Reading<'_> {
    type Target = [Slot];

    fn deref(&self) -> &[Slot] {
        &self.0
    }
}

impl Table for Memory {
    type Exclusive<'a> = Guard<'a>;
    type Shared<'a> = Reading<'a>;

    fn shared(&self, partition: usize) -> Reading<'_> {
        Reading(self.partitions[partition].lock().unwrap())
    }

    fn exclusive(&self, partition: usize) -> Guard<'_> {
        Guard(self.partitions[partition].lock().unwrap(), &self.used[partition])
    }
}

impl Memory {
    fn new(slots: usize) -> Self {
        Self {
            partitions: (0..PARTITIONS).map(|_| Mutex::new(vec![Slot::default(); slots])).collect(),
            used: (0..PARTITIONS).map(|_| AtomicU32::new(0)).collect(),
        }
    }

    fn used(&self) -> u32 {
        self.used.iter().map(|used| used.load(Relaxed)).sum()
    }
}

/// A small deterministic generator, so that a failing seed can be run again.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }
}

fn digest(seed: u64) -> [u8; 32] {
    let mut random = Random(seed);
    let mut digest = [0; 32];
    digest.chunks_exact_mut(8).for_each(|word| word.copy_from_slice(&random.next().to_be_bytes()));
    digest
}

fn sorted_keys(scope: Scope, seeds: impl Iterator<Item = u64>) -> Vec<Key> {
    let mut keys: Vec<Key> = seeds.map(|seed| scope.key(&digest(seed))).collect();
    keys.sort_unstable_by_key(|key| key.lead);
    keys
}

fn sweep(
    memory: &Memory,
    book: &mut Book,
    level: u32,
    keys: &[Key],
    xid: u32,
) -> Result<Vec<Claim>, Refused> {
    let mut out = vec![Claim::default(); keys.len()];
    let run = Run::new(keys.to_vec()).unwrap();
    book.sweep(memory, &NoPrefetch, level, run, xid, |other| other == xid, &mut out)?;
    Ok(out)
}

/// What the server would be: which transactions are in flight, and what was committed.
#[derive(Default)]
struct Server {
    in_flight: Mutex<HashSet<u32>>,
    ended: Condvar,
    segments: Mutex<HashMap<Key, u32>>,
}

impl Server {
    fn wait_for(&self, xid: u32) {
        let in_flight = self.in_flight.lock().unwrap();
        let (_guard, timeout) = self
            .ended
            .wait_timeout_while(in_flight, Duration::from_secs(60), |set| set.contains(&xid))
            .unwrap();
        assert!(!timeout.timed_out(), "waited too long for {xid}: a deadlock");
    }
}

#[test]
fn every_digest_is_written_exactly_once() {
    const THREADS: u64 = 4;
    const TRANSACTIONS: u64 = 150;
    const DIGESTS: u64 = 6000;
    let memory = Memory::new(128);
    let blocks: Vec<Block> = (0..64).map(|_| Block::default()).collect();
    let bits_set = AtomicU64::new(0);
    let filter = Filter::new(&blocks, &bits_set);
    let (server, next_xid) = (Server::default(), AtomicU32::new(3));
    let scope = Scope::new(5, 1);
    let aborted = AtomicU32::new(0);

    std::thread::scope(|threads| {
        for thread in 0..THREADS {
            let (memory, server, next_xid, aborted) = (&memory, &server, &next_xid, &aborted);
            threads.spawn(move || {
                let mut random = Random(thread);
                for _ in 0..TRANSACTIONS {
                    let seeds: HashSet<u64> = (0..random.below(600)).map(|_| random.below(DIGESTS)).collect();
                    let keys = sorted_keys(scope, seeds.into_iter());
                    let xid = next_xid.fetch_add(1, Relaxed);
                    server.in_flight.lock().unwrap().insert(xid);
                    let mut book = Book::new();
                    let found = |key: &Key| server.segments.lock().unwrap().contains_key(key);

                    // Probe.
                    let mut perhaps = Vec::new();
                    filter.probe(keys.iter().copied(), &NoPrefetch, &mut perhaps);
                    let candidates: Vec<Key> = (keys.iter().zip(&perhaps))
                        .filter(|(key, perhaps)| !(**perhaps && found(key)))
                        .map(|(key, _)| *key)
                        .collect();
                    // Claim.
                    let claims = sweep(memory, &mut book, 1, &candidates, xid).unwrap();
                    let mut pending = Vec::new();
                    let mut ours = Vec::new();
                    for (key, claim) in candidates.iter().zip(claims) {
                        match claim {
                            Claim::Ours => ours.push(*key),
                            Claim::Held(owner) => pending.push((*key, owner)),
                            Claim::AlreadyOurs => panic!("claimed twice in one sweep"),
                        }
                    }
                    // Recheck.
                    let mut seen = Vec::new();
                    filter.insert_all(ours.iter().copied(), &NoPrefetch, &mut seen);
                    let late: Vec<Key> = (ours.iter().zip(seen))
                        .filter(|(key, seen)| *seen && found(key))
                        .map(|(key, _)| *key)
                        .collect();
                    book.release(memory, &NoPrefetch, &late).unwrap();
                    ours.retain(|key| !late.contains(key));
                    // Resolve. What an aborted owner left is left alone here: to claim it again could
                    // close a circle, which the server would detect and this test would not.
                    for (_, owner) in pending {
                        server.wait_for(owner);
                    }
                    // Commit or abort: visible first, then claims, then whoever waits.
                    if random.below(4) > 0 {
                        let mut segments = server.segments.lock().unwrap();
                        for key in &ours {
                            assert_eq!(segments.insert(*key, xid), None, "written twice");
                        }
                    } else {
                        aborted.fetch_add(1, Relaxed);
                    }
                    assert_eq!(book.held(), ours.len());
                    book.end(memory, &NoPrefetch);
                    server.in_flight.lock().unwrap().remove(&xid);
                    server.ended.notify_all();
                }
            });
        }
    });
    assert_eq!(memory.used(), 0);
    assert!(aborted.load(Relaxed) > 0);
    assert!(server.segments.lock().unwrap().len() > DIGESTS as usize / 2);
}

#[test]
fn an_overfull_partition_leaves_nothing_claimed() {
    let memory = Memory::new(64);
    let scope = Scope::new(5, 1);
    let mut book = Book::new();
    let standing = sorted_keys(scope, 0..100);
    assert!(sweep(&memory, &mut book, 1, &standing, 7).unwrap().iter().all(|c| *c == Claim::Ours));
    // Evenly spread, but too many.
    let many = sorted_keys(scope, 1000..1000 + 128 * 64);
    assert_eq!(sweep(&memory, &mut book, 1, &many, 7), Err(Refused::Full));
    assert_eq!((memory.used(), book.held()), (100, 100));
    // Few, but all in one partition near the end, behind others that have been claimed by then.
    let mut skewed = sorted_keys(scope, 2000..2100);
    skewed.retain(|key| key.partition() < 120);
    skewed.extend((0..=capacity(64) as u64).map(|i| Key { lead: u64::MAX - 200 + i, fingerprint: i }));
    assert_eq!(sweep(&memory, &mut book, 1, &skewed, 7), Err(Refused::Full));
    assert_eq!((memory.used(), book.held()), (100, 100));
    book.end(&memory, &NoPrefetch);
    assert_eq!((memory.used(), book.held()), (0, 0));
}

#[test]
fn claims_of_subtransactions_go_with_them() {
    let memory = Memory::new(64);
    let scope = Scope::new(5, 1);
    let mut book = Book::new();
    let keys = sorted_keys(scope, 0..90);
    sweep(&memory, &mut book, 1, &keys[..30], 7).unwrap();
    sweep(&memory, &mut book, 2, &keys[20..60], 7).unwrap();
    sweep(&memory, &mut book, 3, &keys[50..], 7).unwrap();
    assert_eq!((memory.used(), book.held()), (90, 30 + 40 + 40));
    book.hand_over(3, 2);
    book.abort(&memory, &NoPrefetch, 3);
    assert_eq!((memory.used(), book.held()), (90, 110));
    book.abort(&memory, &NoPrefetch, 2);
    assert_eq!((memory.used(), book.held()), (30, 30));
    sweep(&memory, &mut book, 4, &keys[25..40], 7).unwrap();
    book.hand_over(4, 1);
    assert_eq!((memory.used(), book.held()), (40, 45));
    // One count each, the latest first; not claimed at all: nothing happens.
    book.release(&memory, &NoPrefetch, &keys[25..35]).unwrap();
    assert_eq!((memory.used(), book.held()), (35, 35));
    assert_eq!(book.release(&memory, &NoPrefetch, &keys[38..45]), Err(NotClaimed));
    assert_eq!((memory.used(), book.held()), (35, 35));
    book.end(&memory, &NoPrefetch);
    assert_eq!((memory.used(), book.held()), (0, 0));
}

#[test]
fn scopes_do_not_meet() {
    let memory = Memory::new(64);
    let (mut one, mut other) = (Book::new(), Book::new());
    let first = sweep(&memory, &mut one, 1, &sorted_keys(Scope::new(5, 1), 0..50), 7).unwrap();
    let second = sweep(&memory, &mut other, 1, &sorted_keys(Scope::new(5, 2), 0..50), 8).unwrap();
    assert!(first.iter().chain(&second).all(|claim| *claim == Claim::Ours));
    assert_eq!(memory.used(), 100);
    for (target, xid) in [(1, Some(7)), (2, Some(8)), (3, None)] {
        let mut asked = 0;
        claims::owners(&memory, &sorted_keys(Scope::new(5, target), 0..50), |_, owner| {
            assert_eq!(owner, xid);
            asked += 1;
        });
        assert_eq!(asked, 50);
    }
    one.end(&memory, &NoPrefetch);
    other.end(&memory, &NoPrefetch);
    assert_eq!(memory.used(), 0);
}

#[test]
fn unsorted_keys_are_refused() {
    let mut keys = sorted_keys(Scope::new(5, 1), 0..10);
    keys.swap(3, 4);
    assert!(Run::new(keys).is_none());
}
