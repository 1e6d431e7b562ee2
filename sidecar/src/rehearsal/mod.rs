//! `run --dry-run`: everything that a run would do but writing.
//!
//! ```text
//!   plan       as for a run, every check of both sides included, in a transaction that is taken back
//!   lanes      read a chunk ─▶ what of it the target has ─▶ contents met before ─▶ rows tried on a temporary table
//!   queries    unique constraints and foreign keys, which no single row tells
//!   prediction records, duplicates, refusals, sizes, time
//! ```
//!
//! The target's tables are read and never written; rows go into temporary tables of their shape, which are measured and emptied again. With a
//! sample, chunks are drawn by lot, small ones where a table has few.

mod constraints;
mod contents;
mod draw;
mod prediction;
mod shape;
mod stage;
mod tally;
mod trial;

use std::time::{Duration, Instant};

use self::constraints::Questions;
use self::draw::draw;
use self::prediction::Prediction;
use self::stage::Stage;
use crate::config::Job;
use crate::conn::{Role, Session};
use crate::error::Result;
use crate::progress::Progress;
use crate::run::Ends;
use crate::setup::{self, Added};
use crate::stop::Stop;

/// How a run is rehearsed.
#[derive(Debug, Clone, Copy)]
pub struct Rehearsal {
    /// The fraction of chunks that are read; 1: all.
    pub sample: f64,
    /// What the run may take.
    pub deadline: Option<Duration>,
}

/// Foresees a run and prints what it would come to.
pub async fn rehearse(job: &Job, rehearsal: Rehearsal, stop: Stop) -> Result<u8> {
    let mut ends = Ends::connect(job).await?;
    let source = ends.source.connect(Role::Planner).await?;
    let planned =
        setup::plan_only(job, &ends.source, &ends.source.connect(Role::Admin).await?, &ends.admin).await?;
    let drawn = draw(&planned, &source, rehearsal.sample).await?;
    let mut stage = Stage::prepare(&ends, job, &planned.tables, drawn, &stop).await?;
    let plan = stage.plan();
    let started = Instant::now();
    {
        let _progress = Progress::show(stage.counters.clone(), plan);
        stage = stage.play(job.workers).await?;
    }
    let took = started.elapsed();
    drop(planned.snapshot_keeper);
    if stop.finishing() {
        tracing::warn!("interrupted; nothing was written, and nothing is foreseen");
        return Ok(130);
    }
    let mut prediction = stage.foresee(job, took, rehearsal.sample);
    ends.revive().await?;
    let pairs: Vec<&Added> = planned.tables.iter().map(|(pair, _)| pair).collect();
    let asked = tokio::select! {
        asked = ask(&mut ends, &source, &stage, &pairs, &mut prediction) => Some(asked?),
        () = stop.asked() => None,
    };
    if asked.is_none() {
        source.cancel().await;
        ends.admin.cancel().await;
        return Ok(130);
    }
    prediction.judge(rehearsal.deadline);
    prediction.print(job.json)?;
    Ok(prediction.exit_code())
}

/// Asks what no single record tells, and says what is not known.
async fn ask(
    ends: &mut Ends,
    source: &Session,
    stage: &Stage,
    pairs: &[&Added],
    prediction: &mut Prediction,
) -> Result<()> {
    let refusing: Vec<i32> = pairs
        .iter()
        .zip(&prediction.tables)
        .filter(|(_, foreseen)| !foreseen.refused.is_empty())
        .map(|(pair, _)| pair.table_id)
        .collect();
    for (pair, foreseen) in pairs.iter().zip(&mut prediction.tables) {
        let part = &stage.parts[&pair.table_id];
        if part.occupied && !part.indexed {
            foreseen.not_tried.push(
                "which records repeat rows that stand there: they are not indexed (the run does that first)"
                    .into(),
            );
        }
        if prediction.sample < 1.0 {
            foreseen
                .not_tried
                .push("unique constraints and foreign keys: all records are needed for that".into());
            continue;
        }
        let questions = Questions { pairs, refusing: &refusing, occupied: part.occupied };
        match constraints::look(source, &ends.admin, pair, &questions).await {
            Ok(looked) => {
                foreseen.refuse(looked.refused);
                foreseen.not_tried.extend(looked.not_tried);
            }
            // What was read and tried is not thrown away for that.
            Err(error) => {
                foreseen.not_tried.push(format!("unique constraints and foreign keys: {error}"));
                ends.revive().await?;
            }
        }
    }
    Ok(())
}
