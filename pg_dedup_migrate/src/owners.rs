//! Whose the entries of the hash index are, from a run's point of view.
use std::collections::HashMap;

use pgrx::Uuid;
use pgrx::prelude::*;

use crate::error::Result;
use crate::sql::required;

/// Who wrote an entry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Owner {
    /// Rows that stood there before any run, or an ordinal that is not known any more.
    Nobody,
    /// This run, from this table of it.
    Table(i32, String),
    /// An earlier or later run, from what this table of the run reads, too.
    SameSource(i32),
    /// A run of another source, or a row that was kept for a run when another one was rolled back.
    Other,
}

impl Owner {
    /// Did this table of the run write it, or another run from the same source?
    pub fn is_table(&self, table_id: i32) -> bool {
        match self {
            Owner::Table(table, _) | Owner::SameSource(table) => *table == table_id,
            Owner::Nobody | Owner::Other => false,
        }
    }
}

/// Who wrote what, each ordinal asked for once.
pub struct Owners {
    run: Uuid,
    target: i32,
    known: HashMap<u64, Owner>,
}

impl Owners {
    /// Of nothing so far.
    pub fn new(run: Uuid, target: i32) -> Self {
        Self { run, target, known: HashMap::new() }
    }

    /// Whose an ordinal is.
    ///
    /// # Errors
    /// SPI's own.
    pub fn of(&mut self, ordinal: u64) -> Result<Owner> {
        if let Some(known) = self.known.get(&ordinal) {
            return Ok(known.clone());
        }
        let found = owner(self.run, self.target, ordinal)?;
        self.known.insert(ordinal, found.clone());
        Ok(found)
    }
}

/// Looks up whose an ordinal is.
fn owner(run: Uuid, target: i32, ordinal: u64) -> Result<Owner> {
    Spi::connect(|client| {
        // Of the same source: the same table of the same system, and this run reads all of it, or the same part.
        let rows = client.select(
            "SELECT o.run_id, o.chunk_id, c.table_id, o.heir_of IS NOT NULL AS inherited, ( \
                 SELECT m.table_id FROM dedup.run_tables AS m JOIN dedup.runs AS mr ON mr.run_id = m.run_id, dedup.run_tables AS t JOIN dedup.runs AS tr ON tr.run_id = t.run_id \
                 WHERE m.run_id = $1 AND m.target_id = $2 AND t.run_id = o.run_id AND t.table_id = c.table_id AND t.source OPERATOR(pg_catalog.=) m.source \
                     AND tr.options OPERATOR(pg_catalog.#>>) '{settings,source}' IS NOT DISTINCT FROM mr.options OPERATOR(pg_catalog.#>>) '{settings,source}' \
                     AND (m.source_spec OPERATOR(pg_catalog.->>) 'where' IS NULL \
                          OR m.source_spec OPERATOR(pg_catalog.->>) 'where' IS NOT DISTINCT FROM t.source_spec OPERATOR(pg_catalog.->>) 'where') \
                 ORDER BY m.table_id LIMIT 1) AS same \
             FROM dedup.ordinals AS o LEFT JOIN dedup.checkpoints AS c USING (run_id, chunk_id) WHERE o.ordinal = $3",
            Some(1),
            &[run.into(), target.into(), ordinal.cast_signed().into()],
        )?;
        let Some(row) = rows.into_iter().next() else { return Ok(Owner::Nobody) };
        let inherited = required::<bool>(row["inherited"].value()?)?;
        Ok(match (row["run_id"].value::<Uuid>()?, row["table_id"].value::<i32>()?) {
            (None, _) => Owner::Nobody,
            // What was kept for a run's records need not be among them.
            (Some(_), _) if inherited => Owner::Other,
            (Some(by), Some(table)) if by == run => Owner::Table(table, required(row["chunk_id"].value()?)?),
            _ => row["same"].value::<i32>()?.map_or(Owner::Other, Owner::SameSource),
        })
    })
}
