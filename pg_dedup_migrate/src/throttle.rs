//! The throttle of a session that migrates inside the target database: between its chunks it looks at the target and decides by the rule that the
//! sidecar's processes go by. `dedup.look_around` calls it.
use std::cell::RefCell;
use std::time::Instant;

use pg_dedup_throttle::{Decision, Turn, Watch};
use pgrx::pg_sys::panic::ErrorReport;
use pgrx::prelude::*;
use pgrx::{JsonB, Uuid};
use serde_json::json;

use crate::error::Error;
use crate::sql::required;

thread_local! {
    /// What this session has seen of its server.
    static WATCH: RefCell<Watch> = RefCell::default();
}

/// `dedup.commit_took`: a probe of the target took so many milliseconds.
#[pg_extern(volatile, parallel_unsafe)]
fn commit_took(milliseconds: f64) {
    WATCH.with_borrow_mut(|watch| watch.commit.add(milliseconds));
}

/// `dedup.decide_here`: reports this session as one that works on the run, and sets the run's limits if it is its turn. `bytes_per_second`: how
/// fast its last chunk was; `unprobed`: why the target can't be probed.
///
/// # Errors
/// 42704 for an unknown run; 42501 without the privileges of a worker.
#[pg_extern(volatile, parallel_unsafe)]
fn decide_here(
    run: Uuid,
    process: Uuid,
    bytes_per_second: Option<f64>,
    unprobed: Option<&str>,
) -> Result<(), ErrorReport> {
    let turn = Spi::get_one_with_args::<JsonB>(
        "SELECT turn FROM dedup.throttle_report($1, $2, 1, 1, 0)",
        &[run.into(), process.into()],
    )
    .map_err(Error::from)?;
    let Some(JsonB(mut turn)) = turn else { return Ok(()) };
    // What this session reads is not in what processes report.
    let reported = turn["throughput"].as_f64().unwrap_or(0.0);
    turn["throughput"] = (reported + bytes_per_second.unwrap_or(0.0)).into();
    let signals = Spi::get_one_with_args::<JsonB>("SELECT dedup.target_signals($1)", &[run.into()]);
    let JsonB(mut signals) = required(signals.map_err(Error::from)?)?;
    if let Some(why) = unprobed {
        signals["target_probe"] = json!({"unknown": why});
    }
    let Decision { limits, state, memory, reason, .. } =
        WATCH.with_borrow_mut(|watch| watch.decide(&Turn::from(&turn), &mut signals, Instant::now()));
    Spi::run_with_args(
        "SELECT dedup.throttle_decide($1, $2, $3, $4, $5, $6, $7, $8)",
        &[
            run.into(),
            process.into(),
            limits.rate.map(|rate| rate as i64).into(),
            limits.active.map(|active| active as i32).into(),
            state.name().into(),
            reason.into(),
            JsonB(signals).into(),
            JsonB(memory).into(),
        ],
    )
    .map_err(Error::from)?;
    Ok(())
}
