//! Where things stand in shared memory, and access to them under their locks.
//!
//! Three named areas, to be seen in `pg_shmem_allocations`: `pg_dedup_migrate` (counters and the warmth
//! table), `pg_dedup_migrate filter` and `pg_dedup_migrate claims`. All of it is valid when it is zero.
use std::cell::UnsafeCell;
use std::ffi::CStr;
use std::ops::{Deref, DerefMut};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use pg_dedup_shared::claims::{Exclusive, PARTITIONS, Table};
use pg_dedup_shared::filter::{BLOCK_BYTES, Block, Filter};
use pg_dedup_shared::partition::{Partition, Slot};
use pg_dedup_shared::warmth::Warmth;
use pgrx::pg_sys;

use super::lock::Held;
use crate::{guc, version};

/// The tranche that holds our locks, as wait events show it.
const TRANCHE: &CStr = c"pg_dedup_migrate";
/// The lock behind those of the partitions.
const WARMTH_LOCK: usize = PARTITIONS;
const LOCKS: i32 = PARTITIONS as i32 + 1;
/// The server aligns an area to its cache line.
const ALIGNMENT: usize = 128;

/// Keeps what different processors write out of each other's cache lines.
#[repr(C, align(64))]
struct Line<T>(T);

#[repr(C)]
struct Header {
    bits_set: Line<AtomicU64>,
    slots_used: [Line<AtomicU32>; PARTITIONS],
    warmth: Line<UnsafeCell<Warmth>>,
}

/// A process's view of the shared memory.
pub struct Shared {
    header: &'static Header,
    blocks: &'static [Block],
    slots: *mut Slot,
    slots_a_partition: usize,
    locks: *mut pg_sys::LWLockPadded,
}

/// How much of everything the settings ask for; they can't change while the server runs.
struct Sizes {
    blocks: usize,
    slots_a_partition: usize,
}

impl Sizes {
    fn configured() -> Self {
        Self {
            blocks: guc::filter_bytes() / BLOCK_BYTES,
            slots_a_partition: guc::claims_bytes() / size_of::<Slot>() / PARTITIONS,
        }
    }

    fn filter_bytes(&self) -> usize {
        self.blocks * BLOCK_BYTES
    }

    fn claims_bytes(&self) -> usize {
        self.slots_a_partition * PARTITIONS * size_of::<Slot>()
    }
}

/// Asks for memory and locks.
///
/// # Safety
/// Only in a `shmem_request_hook`.
pub unsafe fn request() {
    let sizes = Sizes::configured();
    for bytes in [size_of::<Header>(), sizes.filter_bytes(), sizes.claims_bytes()] {
        // SAFETY: we are in the request phase, as the caller promises.
        unsafe { pg_sys::RequestAddinShmemSpace(bytes + ALIGNMENT) };
    }
    // SAFETY: likewise; the name is constant.
    unsafe { pg_sys::RequestNamedLWLockTranche(TRANCHE.as_ptr(), LOCKS) };
}

/// Finds the areas, and sets them up if nobody did before.
///
/// # Safety
/// Only in a `shmem_startup_hook`, after [`request`].
pub unsafe fn start_up() -> Shared {
    let sizes = Sizes::configured();
    // SAFETY: in the startup hook the server's locks exist, and this process holds none of them.
    let _setting_up = unsafe { Held::exclusive(version::addin_shmem_init_lock()) };
    // SAFETY: the lock is held, and so much memory was asked for. Zeroed memory is a valid value of each
    // type (integers and atomics), and the server aligns areas to at least 64 bytes.
    unsafe {
        let header: *mut Header = area(c"pg_dedup_migrate", size_of::<Header>()).cast();
        let blocks: *mut Block = area(c"pg_dedup_migrate filter", sizes.filter_bytes()).cast();
        let slots: *mut Slot = area(c"pg_dedup_migrate claims", sizes.claims_bytes()).cast();
        Shared {
            header: &*header,
            blocks: std::slice::from_raw_parts(blocks, sizes.blocks),
            slots,
            slots_a_partition: sizes.slots_a_partition,
            locks: pg_sys::GetNamedLWLockTranche(TRANCHE.as_ptr()),
        }
    }
}

/// One area of shared memory, zeroed when it is new.
///
/// # Safety
/// `AddinShmemInitLock` is held, the bytes have been requested.
unsafe fn area(name: &CStr, bytes: usize) -> *mut u8 {
    let mut found = false;
    // SAFETY: as the caller promises; the function raises an error rather than return less than asked for.
    let start: *mut u8 = unsafe { pg_sys::ShmemInitStruct(name.as_ptr(), bytes, &mut found) }.cast();
    if !found {
        // SAFETY: the area has that many bytes, and nobody else knows of it yet.
        unsafe { start.write_bytes(0, bytes) };
    }
    start
}

impl Shared {
    /// The filter; needs no lock.
    pub fn filter(&self) -> Filter<'_> {
        Filter::new(self.blocks, &self.header.bits_set.0)
    }

    /// Slots in each partition of the claims table.
    pub fn slots_a_partition(&self) -> usize {
        self.slots_a_partition
    }

    /// Slots in use, by partition; each figure is right at some moment of the call.
    pub fn slots_used(&self) -> impl Iterator<Item = u32> {
        self.header.slots_used.iter().map(|used| used.0.load(Ordering::Relaxed))
    }

    /// The warmth table, to read.
    pub fn warmth(&self) -> impl Deref<Target = Warmth> {
        // SAFETY: the lock is ours and is taken in this file only, by guards that don't outlive a call.
        let lock = unsafe { Held::shared(self.lock(WARMTH_LOCK)) };
        WarmthGuard { _lock: lock, warmth: self.header.warmth.0.get().cast_const() }
    }

    /// The warmth table, to change.
    pub fn warmth_mut(&self) -> impl DerefMut<Target = Warmth> {
        // SAFETY: as above.
        let lock = unsafe { Held::exclusive(self.lock(WARMTH_LOCK)) };
        WarmthGuardMut { _lock: lock, warmth: self.header.warmth.0.get() }
    }

    fn lock(&self, number: usize) -> *mut pg_sys::LWLock {
        assert!(number <= WARMTH_LOCK);
        // SAFETY: the tranche has one lock more than there are partitions.
        unsafe { &raw mut (*self.locks.add(number)).lock }
    }

    /// Where a partition's slots begin.
    fn slots(&self, partition: usize) -> *mut Slot {
        assert!(partition < PARTITIONS);
        // SAFETY: the area has so many slots for each of the partitions.
        unsafe { self.slots.add(partition * self.slots_a_partition) }
    }
}

impl Table for Shared {
    type Exclusive<'a> = LockedPartition<'a>;
    type Shared<'a> = ReadPartition<'a>;

    fn exclusive(&self, partition: usize) -> LockedPartition<'_> {
        // SAFETY: a lock of ours; sweeps take each once, everybody else one at a time.
        let lock = unsafe { Held::exclusive(self.lock(partition)) };
        // SAFETY: the slots belong to this partition alone, and while its lock is held nobody else refers to them.
        let slots = unsafe { std::slice::from_raw_parts_mut(self.slots(partition), self.slots_a_partition) };
        LockedPartition { slots, used: &self.header.slots_used[partition].0, _lock: lock }
    }

    fn shared(&self, partition: usize) -> ReadPartition<'_> {
        // SAFETY: a lock of ours, taken alone.
        let lock = unsafe { Held::shared(self.lock(partition)) };
        // SAFETY: while the lock is held by readers nobody writes to the slots.
        let slots = unsafe { std::slice::from_raw_parts(self.slots(partition), self.slots_a_partition) };
        ReadPartition { slots, _lock: lock }
    }
}

/// A partition of the claims table, locked exclusively.
pub struct LockedPartition<'a> {
    slots: &'a mut [Slot],
    used: &'a AtomicU32,
    _lock: Held<'a>,
}

impl Exclusive for LockedPartition<'_> {
    fn partition(&mut self) -> Partition<'_> {
        Partition::new(self.slots, self.used)
    }
}

/// A partition of the claims table, locked for reading.
pub struct ReadPartition<'a> {
    slots: &'a [Slot],
    _lock: Held<'a>,
}

impl Deref for ReadPartition<'_> {
    type Target = [Slot];

    fn deref(&self) -> &[Slot] {
        self.slots
    }
}

struct WarmthGuard<'a> {
    warmth: *const Warmth,
    _lock: Held<'a>,
}

impl Deref for WarmthGuard<'_> {
    type Target = Warmth;

    fn deref(&self) -> &Warmth {
        // SAFETY: in the header; the lock is held, so nobody changes it.
        unsafe { &*self.warmth }
    }
}

struct WarmthGuardMut<'a> {
    warmth: *mut Warmth,
    _lock: Held<'a>,
}

impl Deref for WarmthGuardMut<'_> {
    type Target = Warmth;

    fn deref(&self) -> &Warmth {
        // SAFETY: in the header; the lock is held exclusively.
        unsafe { &*self.warmth }
    }
}

impl DerefMut for WarmthGuardMut<'_> {
    fn deref_mut(&mut self) -> &mut Warmth {
        // SAFETY: in the header; the lock is held exclusively, and the guard is borrowed exclusively.
        unsafe { &mut *self.warmth }
    }
}
