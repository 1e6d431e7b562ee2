//! What ends with a transaction or a subtransaction: claims are dropped, strangers are settled.
//!
//! # Visible first, then released
//!
//! Both rest on the same order in the server (`access/transam/xact.c`, the same in 15 to 18):
//!
//! - `CommitTransaction`: `RecordTransactionCommit`, `ProcArrayEndTransaction`, **`XACT_EVENT_COMMIT`**,
//!   `ResourceOwnerRelease(… LOCKS …)`;
//! - `AbortTransaction`: `LWLockReleaseAll`, `RecordTransactionAbort`, `ProcArrayEndTransaction`,
//!   **`XACT_EVENT_ABORT`**, `ResourceOwnerRelease(… LOCKS …)`;
//! - `AbortSubTransaction`: `LWLockReleaseAll`, `RecordTransactionAbort` (takes the ids out of the proc array),
//!   **`SUBXACT_EVENT_ABORT_SUB`**, `ResourceOwnerRelease(… LOCKS …)`;
//! - `CommitSubTransaction`: ids become children of the parent, **`SUBXACT_EVENT_COMMIT_SUB`**, then
//!   `XactLockTableDelete`.
//!
//! So when the callback drops a claim, the owner has left the proc array: whoever finds the slot free takes
//! its snapshot later and sees what was committed. And the lock on the transaction id falls after the
//! callback: whoever waited for the owner finds its claims gone.
//!
//! After `RecordTransactionCommit` an error would be a PANIC. The callbacks therefore allocate nothing, wait for
//! nothing but lightweight locks that are held for short loops, and give up rather than fail.
//!
//! A process that dies otherwise takes the server through a crash restart, which makes the memory anew.
use std::ffi::c_void;

use pgrx::pg_sys;
use pgrx::pg_sys::panic::ErrorReport;
use pgrx::prelude::*;

use super::{claims, warmth};
use crate::error::Error;

/// Registers the callbacks; children of the postmaster inherit them.
pub fn register() {
    // SAFETY: the functions have the expected signatures and live as long as the process.
    unsafe {
        pg_sys::RegisterXactCallback(Some(on_transaction), std::ptr::null_mut());
        pg_sys::RegisterSubXactCallback(Some(on_subtransaction), std::ptr::null_mut());
    }
}

#[pg_guard]
unsafe extern "C-unwind" fn on_transaction(event: pg_sys::XactEvent::Type, _argument: *mut c_void) {
    match event {
        pg_sys::XactEvent::XACT_EVENT_COMMIT => {
            warmth::transaction_ended(true);
            claims::transaction_ended();
        }
        pg_sys::XactEvent::XACT_EVENT_ABORT => {
            warmth::transaction_ended(false);
            claims::transaction_ended();
        }
        // The last moment at which this may fail: a prepared transaction goes on without its process,
        // and nobody would be told of its end.
        pg_sys::XactEvent::XACT_EVENT_PRE_PREPARE => refuse_to_prepare(),
        // Parallel workers neither claim nor mark.
        _ => {}
    }
}

fn refuse_to_prepare() {
    let error = if claims::held() > 0 {
        Error::unsupported("cannot PREPARE a transaction that has claimed content hashes")
    } else if warmth::has_marks() {
        Error::unsupported("cannot PREPARE a transaction that has written to the hash index's segments")
    } else {
        return;
    };
    ErrorReport::from(error.hint("Use COMMIT.")).report(PgLogLevel::ERROR);
}

#[pg_guard]
unsafe extern "C-unwind" fn on_subtransaction(
    event: pg_sys::SubXactEvent::Type,
    level: pg_sys::SubTransactionId,
    parent: pg_sys::SubTransactionId,
    _argument: *mut c_void,
) {
    match event {
        pg_sys::SubXactEvent::SUBXACT_EVENT_COMMIT_SUB => claims::subtransaction_committed(level, parent),
        pg_sys::SubXactEvent::SUBXACT_EVENT_ABORT_SUB => claims::subtransaction_aborted(level),
        _ => {}
    }
}
