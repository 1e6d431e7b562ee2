//! The tables of a run as workers need them: how to read each, how to write it.

use std::collections::HashMap;

use pg_dedup_record::Layout;
use uuid::Uuid;

use crate::conn::{Session, protocol_error};
use crate::error::{At, Error, Result};
use crate::names::{TableName, quote_idents};
use crate::setup::Added;
use crate::source::SourceSpec;

/// One source and target pair.
#[derive(Debug, Clone)]
pub struct TableWork {
    /// Number in the run.
    pub table_id: i32,
    /// The source as it was named.
    pub source: String,
    /// The target.
    pub target: TableName,
    /// How the source is read.
    pub spec: SourceSpec,
    /// Columns and their roles.
    pub layout: Layout,
    /// No key: rows are told apart by content alone.
    pub keyless: bool,
    /// The COPY that writes rows.
    pub copy_in: String,
}

impl TableWork {
    /// A pair whose rows go into `into`, whose name is quoted already.
    pub fn into_table(pair: &Added, into: &str) -> TableWork {
        TableWork {
            table_id: pair.table_id,
            source: pair.source.name.to_string(),
            copy_in: copy_into(&pair.layout, into),
            target: pair.target.name.clone(),
            spec: pair.spec.clone(),
            layout: pair.layout.clone(),
            keyless: pair.layout.key.is_empty(),
        }
    }

    /// The COPY of rows in layout order into a table, whose name is quoted already.
    pub fn copy_into(&self, table: &str) -> String {
        copy_into(&self.layout, table)
    }
}

fn copy_into(layout: &Layout, table: &str) -> String {
    let columns = quote_idents(layout.columns.iter().map(|column| column.name.as_str()));
    format!("COPY {table} ({columns}) FROM STDIN (FORMAT binary)")
}

/// The tables of a run by number; those that the target database reads itself are left out: on the source their names are other tables, or none.
pub async fn load(session: &Session, run: Uuid) -> Result<HashMap<i32, TableWork>> {
    let doing = "reading the run's tables";
    let rows = session
        .client
        .query(
            "SELECT t.table_id, t.source, n.nspname::text, c.relname::text, t.source_spec::text, t.layout::text, t.keyless \
             FROM dedup.run_tables AS t JOIN dedup.targets AS g USING (target_id) \
             JOIN pg_catalog.pg_class AS c ON c.oid = g.target JOIN pg_catalog.pg_namespace AS n ON n.oid = c.relnamespace \
             WHERE t.run_id = $1 AND NOT t.source_spec ? 'local' ORDER BY t.table_id",
            &[&run],
        )
        .await
        .at(session.side, doing)?;
    let mut tables = HashMap::new();
    for row in rows {
        let table = read(session, &row)?;
        tables.insert(table.table_id, table);
    }
    Ok(tables)
}

fn read(session: &Session, row: &tokio_postgres::Row) -> Result<TableWork> {
    let doing = "reading the run's tables";
    let text = |index: usize| row.try_get::<_, String>(index).at(session.side, doing);
    let unreadable = |what: &str, error: &dyn std::fmt::Display| -> Error {
        protocol_error(session.side, format!("unreadable {what}: {error}"))
    };
    let spec: SourceSpec =
        serde_json::from_str(&text(4)?).map_err(|e| unreadable("description of a source", &e))?;
    let layout: Layout = serde_json::from_str(&text(5)?).map_err(|e| unreadable("layout", &e))?;
    layout.validate().map_err(|e| unreadable("layout", &e))?;
    let target = TableName::new(text(2)?, text(3)?);
    Ok(TableWork {
        table_id: row.try_get(0).at(session.side, doing)?,
        source: text(1)?,
        copy_in: copy_into(&layout, &target.quoted()),
        target,
        spec,
        layout,
        keyless: row.try_get(6).at(session.side, doing)?,
    })
}
