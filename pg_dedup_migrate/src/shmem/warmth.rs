//! Whether the filter's "absent" may be believed, for each database's `dedup.segment`.
//!
//! The argument is in `pg_dedup_shared::warmth`. In short: after a restart everything is cold, and a look-up
//! goes to the segments; a warm-up reads them all; a *stranger*, a transaction that changes the segment
//! tables other than through claims, makes it cold again. Ask [`is_warm`] after the sweep, not before.
use std::cell::RefCell;
use std::collections::HashSet;

pub use pg_dedup_shared::warmth::Generation;
use pg_dedup_shared::warmth::{Area, Mark};
use pgrx::PgSqlErrorCode;
use pgrx::pg_sys::{self, Oid};

use super::{Shared, attached_if_preloaded};
use crate::error::{Error, Result};

thread_local! {
    /// What this transaction has marked; kept until its end, whatever its subtransactions come to: a
    /// mark too many costs look-ups, one too few a duplicate.
    static MARKS: RefCell<Vec<Mark>> = const { RefCell::new(Vec::new()) };
}

fn area(database: Oid, segment: Oid) -> Area {
    Area { database: database.to_u32(), segment: segment.to_u32() }
}

/// Whether the filter covers every committed entry. Never without shared memory.
pub fn is_warm(database: Oid, segment: Oid) -> bool {
    attached_if_preloaded().is_some_and(|shared| shared.warmth().is_warm(area(database, segment)))
}

/// Begins a warm-up; take the snapshot to read with after this. `None`: it has to stay cold, because there is
/// no shared memory, no place left, or recovery is on (entries arrive there without setting bits).
pub fn begin_warm_up(database: Oid, segment: Oid) -> Option<Generation> {
    // SAFETY: asks a flag in shared memory.
    if unsafe { pg_sys::RecoveryInProgress() } {
        return None;
    }
    attached_if_preloaded()?.warmth_mut().begin_warm_up(area(database, segment))
}

/// Gives the places of databases free that are not among these.
pub fn forget_dropped(databases: &HashSet<u32>) {
    if let Some(shared) = attached_if_preloaded() {
        shared.warmth_mut().forget(|database| !databases.contains(&database));
    }
}

/// Ends a warm-up that has set the bits of every entry of its snapshot. `false` if it was marked cold
/// meanwhile: begin again.
pub fn end_warm_up(generation: Generation) -> bool {
    attached_if_preloaded().is_some_and(|shared| shared.warmth_mut().end_warm_up(generation))
}

/// To be called before entries come in by another way: cold until this transaction ends, and after that too
/// if it commits. Calling it again does nothing. Without shared memory there is nothing to do.
pub fn mark_cold_until_end_of_transaction(database: Oid, segment: Oid) -> Result<()> {
    let Some(shared) = attached_if_preloaded() else { return Ok(()) };
    let area = area(database, segment);
    MARKS.with_borrow_mut(|marks| {
        if marks.iter().any(|mark| mark.area() == area) {
            return Ok(());
        }
        // Room first: nothing may fail between the mark and its note.
        marks
            .try_reserve(1)
            .map_err(|_| Error::new(PgSqlErrorCode::ERRCODE_OUT_OF_MEMORY, "out of memory"))?;
        let mark = shared.warmth_mut().mark(area);
        marks.push(mark);
        Ok(())
    })
}

/// Whether this transaction has marked anything.
pub(super) fn has_marks() -> bool {
    MARKS.with_borrow(|marks| !marks.is_empty())
}

/// The transaction has ended and, if it committed, is visible. Called where an error would be fatal: does
/// nothing rather than fail.
pub(super) fn transaction_ended(committed: bool) {
    let Some(shared) = attached_if_preloaded() else { return };
    // The result says whether there still is a list; if not, the process exits with nothing in it.
    let _ = MARKS.try_with(|marks| {
        if let Ok(mut marks) = marks.try_borrow_mut()
            && !marks.is_empty()
        {
            settle(shared, &mut marks, committed);
        }
    });
}

fn settle(shared: &Shared, marks: &mut Vec<Mark>, committed: bool) {
    let mut warmth = shared.warmth_mut();
    for mark in marks.drain(..) {
        warmth.settle(mark, committed);
    }
}
