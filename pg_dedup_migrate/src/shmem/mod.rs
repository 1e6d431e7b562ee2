//! Shared memory: the filter, the claims table and the warmth table, their locks and their life.
//!
//! | module | its idea |
//! |---|---|
//! | `memory` | where things stand in the segment, and access to them under their locks |
//! | `lock` | a lightweight lock held by a value |
//! | [`filter`] | was it perhaps written before? |
//! | [`claims`] | is it in flight, and whose is it? the backend's own claims |
//! | [`warmth`] | may the filter's "absent" be believed? |
//! | `transaction` | callbacks: what ends with a transaction or subtransaction |
//!
//! The algorithms, the argument why every record is written exactly once, and the order in which sweeps
//! lock partitions are in the crate `pg_dedup_shared`. This module adds the server's side of the argument,
//! beside the code that carries it: visibility before release (`transaction`), waiting and
//! subtransactions ([`claims`]).
//!
//! # Locks
//!
//! One named tranche: a lock for each partition of the claims table, and one for the warmth table. Partition locks
//! are taken in ascending order only; the warmth lock is taken alone. While one is held nothing of the
//! server is called that could raise an error, wait, or take another lock. The filter has no lock.
//!
//! # Without preloading
//!
//! Memory of this kind can be had only at server start. In a session that loads the library later,
//! [`attached`] is an error that says what to do, nothing can be claimed, and nothing is warm.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicPtr, Ordering};

use pgrx::pg_sys;
use pgrx::prelude::*;

use crate::error::{Error, Result};

pub mod claims;
pub mod filter;
mod lock;
mod memory;
mod prefetch;
mod transaction;
pub mod warmth;

pub use memory::Shared;
pub use pg_dedup_shared::Scope;

/// The hooks that stood before ours.
struct Hooks {
    request: pg_sys::shmem_request_hook_type,
    startup: pg_sys::shmem_startup_hook_type,
}

static PREVIOUS: OnceLock<Hooks> = OnceLock::new();

/// This process's view of the shared memory. Set in the postmaster, inherited by its children, and set
/// anew when the postmaster restarts its children after a crash.
static ATTACHED: AtomicPtr<Shared> = AtomicPtr::new(std::ptr::null_mut());

/// Installs the hooks and callbacks; called once by `_PG_init`, does nothing unless preloaded.
pub fn init() {
    // SAFETY: a plain flag of this process.
    if !unsafe { pg_sys::process_shared_preload_libraries_in_progress } {
        return;
    }
    PREVIOUS.get_or_init(|| {
        // SAFETY: libraries are loaded by one thread, before anything calls the hooks.
        unsafe {
            let previous = Hooks { request: pg_sys::shmem_request_hook, startup: pg_sys::shmem_startup_hook };
            pg_sys::shmem_request_hook = Some(request);
            pg_sys::shmem_startup_hook = Some(start_up);
            previous
        }
    });
    transaction::register();
}

/// Asks for memory and locks, while the server adds up what it will allocate.
#[pg_guard]
unsafe extern "C-unwind" fn request() {
    if let Some(previous) = PREVIOUS.get().and_then(|hooks| hooks.request) {
        // SAFETY: what the library before us installed to be called here.
        unsafe { previous() };
    }
    // SAFETY: called by the server in its request phase.
    unsafe { memory::request() };
}

/// Finds or sets up the memory that was asked for.
#[pg_guard]
unsafe extern "C-unwind" fn start_up() {
    if let Some(previous) = PREVIOUS.get().and_then(|hooks| hooks.startup) {
        // SAFETY: what the library before us installed to be called here.
        unsafe { previous() };
    }
    // SAFETY: called by the server when shared memory exists.
    let shared = unsafe { memory::start_up() };
    // A few words, once a server start or crash restart: leaked, because older pointers may be copied about.
    ATTACHED.store(Box::into_raw(Box::new(shared)), Ordering::Release);
}

/// The shared memory, or 55000 with the line to add to the configuration.
pub fn attached() -> Result<&'static Shared> {
    attached_if_preloaded().ok_or_else(|| {
        Error::state("pg_dedup_migrate is not preloaded")
            .detail("Claiming content hashes needs shared memory, which exists only if the library is loaded at server start.")
            .hint("Add the line shared_preload_libraries = 'pg_dedup_migrate' to postgresql.conf and restart the server.")
    })
}

/// The shared memory, if there is any.
pub fn attached_if_preloaded() -> Option<&'static Shared> {
    // SAFETY: null, or a box that is never freed.
    unsafe { ATTACHED.load(Ordering::Acquire).as_ref() }
}

/// The scope of one target of the current database.
pub fn scope(target: u32) -> Scope {
    // SAFETY: set once, when the backend connects to its database.
    Scope::new(unsafe { pg_sys::MyDatabaseId }.to_u32(), target)
}
