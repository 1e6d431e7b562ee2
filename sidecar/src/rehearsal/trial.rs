//! Rows tried on a temporary table of the target's shape: what it refuses, and how much room they take.

use std::collections::HashMap;
use std::collections::hash_map::Entry;

use pg_dedup_record::Batch;
use pg_dedup_record::fold::Way;
use pg_dedup_record::sql::{quote_ident, quote_literal};
use uuid::Uuid;

use crate::conn::Session;
use crate::error::{At, Error, Kind, Result, Side};
use crate::protocol::{ChunkCalls, GENERIC_PLANS};
use crate::setup::Added;
use crate::tables::TableWork;
use crate::write::{self, Judge, RefusedRow};

/// Room that the rows of a trial may take before they are measured and thrown away, in bytes of records.
const MEASURED_BYTES: u64 = 64 << 20;

/// What rows took, without what an empty table takes.
#[derive(Debug, Default, Clone, Copy)]
pub struct Measured {
    /// Rows.
    pub rows: u64,
    /// Bytes of the table, TOAST included.
    pub table_bytes: u64,
    /// Bytes of its indexes.
    pub index_bytes: u64,
}

/// What an empty table of the target's shape takes.
#[derive(Debug, Default, Clone, Copy)]
pub struct Empty {
    /// Bytes of the table, TOAST included.
    pub table_bytes: u64,
    /// Bytes of its indexes.
    pub index_bytes: u64,
}

/// The temporary table of one pair in one session.
struct Trial {
    table: TableWork,
    empty: Empty,
    rows: u64,
    bytes: u64,
}

/// The temporary tables of a session.
#[derive(Default)]
pub struct Trials {
    by_table: HashMap<i32, Trial>,
}

/// Of the rows that were tried.
pub struct Tried {
    /// Those that the target refuses.
    pub refused: Vec<RefusedRow>,
    /// The budget of refusals was used up: the rows after that were not tried.
    pub over_budget: bool,
}

impl Trials {
    /// Tries rows of a chunk.
    pub async fn attempt(
        &mut self,
        target: &Session,
        pair: &Added,
        batch: &Batch,
        rows: &[u32],
        error_budget: u64,
    ) -> Result<Tried> {
        let trial = self.of(target, pair).await?;
        let doing = "trying rows";
        target.client.batch_execute(&format!("BEGIN; {GENERIC_PLANS}")).await.at(Side::Target, doing)?;
        let calls = ChunkCalls { session: target, run: Uuid::nil(), chunk_id: "" };
        let mut judge = Budget { left: error_budget };
        let written = write::write_rows(calls, &trial.table, batch, rows, Way::Insert, &mut judge).await;
        let tried = match written {
            Ok(refused) => Tried { refused, over_budget: false },
            Err(error) if error.kind == Kind::OverBudget => {
                target.client.batch_execute("ROLLBACK").await.at(Side::Target, doing)?;
                return Ok(Tried { refused: Vec::new(), over_budget: true });
            }
            Err(error) => return Err(error),
        };
        target.client.batch_execute("COMMIT").await.at(Side::Target, doing)?;
        let written = rows.len() - tried.refused.len();
        trial.rows += written as u64;
        trial.bytes += rows.iter().map(|row| batch.row_range(*row as usize).len() as u64).sum::<u64>();
        Ok(tried)
    }

    /// What the rows took so far, if there is enough of them or `all` is wanted; they are thrown away.
    pub async fn measure(
        &mut self,
        target: &Session,
        table_id: i32,
        all: bool,
    ) -> Result<Option<(Measured, Empty)>> {
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
        let measured = Measured {
            rows: std::mem::take(&mut trial.rows),
            table_bytes: full.table_bytes.saturating_sub(trial.empty.table_bytes),
            index_bytes: full.index_bytes.saturating_sub(trial.empty.index_bytes),
        };
        trial.bytes = 0;
        Ok(Some((measured, trial.empty)))
    }

    async fn of(&mut self, target: &Session, pair: &Added) -> Result<&mut Trial> {
        match self.by_table.entry(pair.table_id) {
            Entry::Occupied(trial) => Ok(trial.into_mut()),
            Entry::Vacant(free) => {
                let name = name_of(pair.table_id);
                create(target, pair, &name).await?;
                let empty = sizes(target, &name).await?;
                let table = TableWork::into_table(pair, &name);
                Ok(free.insert(Trial { table, empty, rows: 0, bytes: 0 }))
            }
        }
    }
}

fn name_of(table_id: i32) -> String {
    format!("pg_temp.rehearsal_{table_id}")
}

/// Makes a table of the target's shape: columns, constraints, indexes, generated columns. Columns that the source does not deliver take their
/// defaults, but no number is drawn from a sequence of the target's.
async fn create(target: &Session, pair: &Added, name: &str) -> Result<()> {
    let doing = "making a temporary table like the target";
    let client = &target.client;
    let row = client
        .query_one(
            "SELECT (SELECT string_agg(o, ', ') FROM pg_catalog.pg_class AS c, pg_catalog.unnest(c.reloptions) AS o WHERE c.oid = $1 AND c.relkind = 'r'), \
                 (SELECT string_agg('(' || pg_catalog.pg_get_partition_constraintdef(p.relid) || ')', ' OR ') \
                  FROM pg_catalog.pg_partition_tree($1) AS p WHERE p.isleaf AND p.relid <> $1)",
            &[&pair.target.oid],
        )
        .await
        .at(Side::Target, doing)?;
    let options: Option<String> = row.try_get(0).at(Side::Target, doing)?;
    let partitions: Option<String> = row.try_get(1).at(Side::Target, doing)?;
    let with = options.map(|options| format!(" WITH ({options})")).unwrap_or_default();
    let mut sql = format!(
        "CREATE TEMPORARY TABLE {name} (LIKE {} INCLUDING ALL EXCLUDING DEFAULTS){with}",
        pair.target.name.quoted()
    );
    // A row for which there is no partition.
    if let Some(partitions) = partitions {
        sql.push_str(&format!("; ALTER TABLE {name} ADD CONSTRAINT partitions CHECK ({partitions})"));
    }
    let delivered: Vec<&str> = pair.layout.columns.iter().map(|column| column.name.as_str()).collect();
    let defaults = client
        .query(
            "SELECT a.attname::text, pg_catalog.pg_get_expr(d.adbin, d.adrelid), EXISTS (SELECT FROM pg_catalog.pg_depend AS p \
                 JOIN pg_catalog.pg_class AS s ON s.oid = p.refobjid AND s.relkind = 'S' \
                 WHERE p.classid = 'pg_catalog.pg_attrdef'::pg_catalog.regclass AND p.objid = d.oid AND p.refclassid = 'pg_catalog.pg_class'::pg_catalog.regclass) \
             FROM pg_catalog.pg_attrdef AS d JOIN pg_catalog.pg_attribute AS a ON a.attrelid = d.adrelid AND a.attnum = d.adnum \
             WHERE d.adrelid = $1 AND a.attgenerated = '' AND NOT a.attname = ANY ($2::text[])",
            &[&pair.target.oid, &delivered],
        )
        .await
        .at(Side::Target, doing)?;
    for (n, row) in defaults.iter().enumerate() {
        let column: String = row.try_get(0).at(Side::Target, doing)?;
        let default: String = row.try_get(1).at(Side::Target, doing)?;
        let numbers: bool = row.try_get(2).at(Side::Target, doing)?;
        let default = if numbers {
            let sequence = format!("{name}_{n}");
            sql.push_str(&format!("; CREATE TEMPORARY SEQUENCE {sequence}"));
            format!("pg_catalog.nextval({}::pg_catalog.regclass)", quote_literal(&sequence))
        } else {
            default
        };
        sql.push_str(&format!("; ALTER TABLE {name} ALTER {} SET DEFAULT {default}", quote_ident(&column)));
    }
    client.batch_execute(&sql).await.at(Side::Target, doing)
}

async fn sizes(target: &Session, name: &str) -> Result<Empty> {
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
    Ok(Empty { table_bytes: bytes(0)?, index_bytes: bytes(1)? })
}

/// Gives up when as many records are refused as a run would put up with in a chunk.
struct Budget {
    left: u64,
}

impl Judge for Budget {
    async fn attempt_refused(&mut self, _: &str) -> Result<()> {
        Ok(())
    }

    async fn row_refused(&mut self, _: &RefusedRow) -> Result<()> {
        match self.left.checked_sub(1) {
            Some(left) => {
                self.left = left;
                Ok(())
            }
            None => Err(Error::here(Kind::OverBudget, "too many records are refused")),
        }
    }
}
