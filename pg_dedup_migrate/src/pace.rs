//! Rest: where a run is slowed, a step that would keep a backend busy for a second at a stretch is drawn out, so that whoever is at work on the server
//! meanwhile waits for a few milliseconds of it, and its WAL comes in small amounts.
//!
//! Like the server's own cost-based vacuum delay: work for a while, then rest, in proportion. The proportion is the run's (`dedup.work_share`), and no
//! lock of shared memory is held while a backend rests.
use std::cell::Cell;
use std::time::{Duration, Instant};

use pgrx::datum::DatumWithOid;
use pgrx::prelude::*;
use pgrx::{Uuid, pg_sys};

use crate::error::Result;
use crate::sql::required;

/// Work between two rests. Shorter ones would be less than the clock of the server's latches can tell.
const WORK: Duration = Duration::from_millis(2);
/// What counts as work at a time: the rest of it was waiting for others.
const MOST_WORK: Duration = Duration::from_millis(100);

thread_local! {
    /// The share of its time that the backend is at work, and since when it is.
    static PACE: Cell<Option<(f64, Instant)>> = const { Cell::new(None) };
}

/// As long as it lives, [`point`] and [`rest_if_due`] rest.
#[must_use]
pub struct Pace(());

impl Drop for Pace {
    fn drop(&mut self) {
        PACE.set(None);
    }
}

/// Keeps to what a run may take.
///
/// # Errors
/// SPI's own.
pub fn of_run(run: Uuid) -> Result<Pace> {
    keep_to("SELECT dedup.work_share($1)", run.into())
}

/// Keeps to what the slowest of the runs into a target may take.
///
/// # Errors
/// SPI's own.
pub fn of_target(target_id: i32) -> Result<Pace> {
    keep_to("SELECT dedup.work_share_of_target($1)", target_id.into())
}

fn keep_to(sql: &str, whose: DatumWithOid<'_>) -> Result<Pace> {
    let share: f64 = required(Spi::get_one_with_args(sql, &[whose])?)?;
    PACE.set((share < 1.0).then(|| (share, Instant::now())));
    Ok(Pace(()))
}

/// Between two pieces of work, with nothing half done and no lock of shared memory held: lets interrupts in, and rests if it is time to.
pub fn point() {
    pgrx::check_for_interrupts!();
    rest_if_due();
}

/// [`point`] where somebody else sees to interrupts.
pub fn rest_if_due() {
    let Some((share, since)) = PACE.get() else { return };
    let worked = since.elapsed();
    if worked < WORK {
        return;
    }
    rest(worked.min(MOST_WORK).mul_f64(1.0 / share - 1.0));
    PACE.set(Some((share, Instant::now())));
}

/// Sleeps, and lets interrupts in meanwhile.
fn rest(pause: Duration) {
    let until = Instant::now() + pause;
    loop {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return;
        }
        // SAFETY: the backend's own latch; an interrupt is served below, and the latch is reset before it is looked for.
        unsafe {
            pg_sys::WaitLatch(
                pg_sys::MyLatch,
                (pg_sys::WL_LATCH_SET | pg_sys::WL_TIMEOUT | pg_sys::WL_EXIT_ON_PM_DEATH).cast_signed(),
                left.as_millis().max(1) as std::ffi::c_long,
                pg_sys::PG_WAIT_EXTENSION,
            );
            pg_sys::ResetLatch(pg_sys::MyLatch);
        }
        pgrx::check_for_interrupts!();
    }
}
