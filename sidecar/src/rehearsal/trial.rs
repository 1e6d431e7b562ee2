//! Rows tried on a temporary table of the target's shape: what it refuses, and how much room they take.

use std::collections::HashMap;
use std::collections::hash_map::Entry;

use pg_dedup_record::fold::Way;
use pg_dedup_record::{Batch, WritePlan};
use uuid::Uuid;

use super::shape::Shape;
use crate::conn::Session;
use crate::error::{At, Result, Side};
use crate::protocol::{ChunkCalls, GENERIC_PLANS};
use crate::setup::Added;
use crate::tables::TableWork;
use crate::write;

/// Room that the rows of a trial may take before they are measured and thrown away, in bytes of records.
const MEASURED_BYTES: u64 = 64 << 20;

/// What a table takes, or grew by.
#[derive(Debug, Default, Clone, Copy)]
pub struct Sizes {
    /// Bytes of the table, TOAST included.
    pub table_bytes: u64,
    /// Bytes of its indexes.
    pub index_bytes: u64,
}

/// What rows took.
#[derive(Debug, Default, Clone, Copy)]
pub struct Measured {
    /// Rows.
    pub rows: u64,
    /// Without what an empty table takes.
    pub grown: Sizes,
    /// What that is.
    pub empty: Sizes,
}

/// The temporary table of one pair in one session.
struct Trial {
    table: TableWork,
    empty: Sizes,
    rows: u64,
    bytes: u64,
}

/// The temporary tables of a session.
#[derive(Default)]
pub struct Trials {
    by_table: HashMap<i32, Trial>,
}

/// A row that the target refused for good.
#[derive(Debug)]
pub struct RefusedRow {
    /// Its number in the batch.
    pub row: u32,
    /// Why.
    pub sqlstate: String,
    /// Name of the constraint it violates.
    pub constraint: Option<String>,
}

/// More records of a chunk are refused than a run puts up with.
pub struct OverBudget;

impl Trials {
    /// Tries rows of a chunk; `refused` more may be refused. Answers which are.
    pub async fn attempt(
        &mut self,
        target: &Session,
        pair: &Added,
        shape: &Shape,
        batch: &Batch,
        rows: &[u32],
        refused: u64,
    ) -> Result<std::result::Result<Vec<RefusedRow>, OverBudget>> {
        let trial = self.of(target, pair, shape).await?;
        let doing = "trying rows";
        target.client.batch_execute(&format!("BEGIN; {GENERIC_PLANS}")).await.at(Side::Target, doing)?;
        let calls = ChunkCalls { session: target, run: Uuid::nil(), chunk_id: "", throttle: None };
        let mut left = refused;
        let mut refused = Vec::new();
        let mut plan = WritePlan::new(rows.len());
        while let Some(positions) = plan.next() {
            let Some(attempt) =
                write::write(calls, &trial.table, batch, &rows[positions], Way::Insert).await?
            else {
                plan.accepted();
                continue;
            };
            let Some(position) = plan.refused(attempt.line) else { continue };
            // Two rows of a trial may share a value that is unique; that is asked by query.
            if attempt.refusal.sqlstate != UNIQUE_VIOLATION {
                let Some(fewer) = left.checked_sub(1) else {
                    target.client.batch_execute("ROLLBACK").await.at(Side::Target, doing)?;
                    return Ok(Err(OverBudget));
                };
                left = fewer;
            }
            refused.push(RefusedRow {
                row: rows[position],
                sqlstate: attempt.refusal.sqlstate,
                constraint: attempt.constraint.map(|(_, name)| name),
            });
        }
        target.client.batch_execute("COMMIT").await.at(Side::Target, doing)?;
        trial.rows += (rows.len() - refused.len()) as u64;
        trial.bytes += rows.iter().map(|row| batch.row_range(*row as usize).len() as u64).sum::<u64>();
        Ok(Ok(refused))
    }

    /// What the rows took so far, if there is enough of them or `all` is wanted; they are thrown away.
    pub async fn measure(&mut self, target: &Session, table_id: i32, all: bool) -> Result<Option<Measured>> {
        let Some(trial) = self.by_table.get_mut(&table_id) else { return Ok(None) };
        if trial.rows == 0 || !all && trial.bytes < MEASURED_BYTES {
            return Ok(None);
        }
        let name = name_of(table_id);
        let full = sizes(target, &name).await?;
        target
            .client
            .batch_execute(&format!("TRUNCATE {name}"))
            .await
            .at(Side::Target, "emptying a temporary table")?;
        trial.bytes = 0;
        Ok(Some(Measured {
            rows: std::mem::take(&mut trial.rows),
            grown: Sizes {
                table_bytes: full.table_bytes.saturating_sub(trial.empty.table_bytes),
                index_bytes: full.index_bytes.saturating_sub(trial.empty.index_bytes),
            },
            empty: trial.empty,
        }))
    }

    async fn of(&mut self, target: &Session, pair: &Added, shape: &Shape) -> Result<&mut Trial> {
        match self.by_table.entry(pair.table_id) {
            Entry::Occupied(trial) => Ok(trial.into_mut()),
            Entry::Vacant(free) => {
                let name = name_of(pair.table_id);
                shape.create(target, &name).await?;
                let empty = sizes(target, &name).await?;
                let table = TableWork::into_table(pair, &name);
                Ok(free.insert(Trial { table, empty, rows: 0, bytes: 0 }))
            }
        }
    }
}

/// Name of a pair's temporary table.
pub fn name_of(table_id: i32) -> String {
    format!("pg_temp.rehearsal_{table_id}")
}

async fn sizes(target: &Session, name: &str) -> Result<Sizes> {
    let doing = "measuring a temporary table";
    let row = target
        .client
        .query_one(
            "SELECT pg_catalog.pg_table_size(t), pg_catalog.pg_indexes_size(t) FROM pg_catalog.to_regclass($1) AS t",
            &[&name],
        )
        .await
        .at(Side::Target, doing)?;
    let bytes = |index: usize| -> Result<u64> {
        Ok(row.try_get::<_, Option<i64>>(index).at(Side::Target, doing)?.unwrap_or(0).unsigned_abs())
    };
    Ok(Sizes { table_bytes: bytes(0)?, index_bytes: bytes(1)? })
}

/// SQLSTATE of what is asked by query instead.
pub const UNIQUE_VIOLATION: &str = "23505";
