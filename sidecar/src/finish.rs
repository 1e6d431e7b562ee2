//! After the load: sequences past the highest key, VACUUM and ANALYZE, and the run's end.

use std::time::Duration;

use futures_util::{StreamExt, stream};
use pg_dedup_record::sql::quote_ident;
use tokio_postgres::types::ToSql;
use uuid::Uuid;

use crate::conn::{Endpoint, Role, Session};
use crate::error::{At, Result, Side};
use crate::names::TableName;
use crate::stop::Stop;

/// Has the target read back what its chunks did not, table by table, each in a transaction of its own. Another process may be at a table: then
/// its end is waited for.
pub async fn verify_written(target: &Session, run: Uuid, stop: &Stop) -> Result<()> {
    let doing = "verifying what was written";
    loop {
        let rows = target
            .client
            .query("SELECT dedup.unverified_tables($1::uuid)", &[&run])
            .await
            .at(Side::Target, doing)?;
        if rows.is_empty() {
            return Ok(());
        }
        for row in rows {
            let table: i32 = row.try_get(0).at(Side::Target, doing)?;
            let parameters: [&(dyn ToSql + Sync); 2] = [&run, &table];
            let verified =
                target.client.query_one("SELECT dedup.verify_written($1::uuid, $2::int4)", &parameters);
            tokio::select! {
                verified = verified => drop(verified.at(Side::Target, doing)?),
                () = stop.asked() => {
                    target.cancel().await;
                    return Ok(());
                }
            }
        }
        tokio::select! {
            () = tokio::time::sleep(OTHERS_AT_IT) => {}
            () = stop.asked() => return Ok(()),
        }
    }
}

/// Between two looks at a table that another process verifies.
const OTHERS_AT_IT: Duration = Duration::from_millis(500);

/// Opens chunks, of sources that workers read or that the target database reads, with records that foreign keys refused again, if later chunks may have satisfied them and they are fewer than `before`; answers how
/// many they are.
pub async fn retry_foreign_keys(
    target: &Session,
    run: Uuid,
    before: Option<i64>,
    local: bool,
) -> Result<Option<i64>> {
    target
        .client
        .query_one("SELECT dedup.retry_foreign_keys($1::uuid, $2::int8, $3::bool)", &[&run, &before, &local])
        .await
        .and_then(|row| row.try_get(0))
        .at(Side::Target, "retrying foreign keys")
}

/// Ends a run; answers its status. `running` means that chunks were reopened and there is more to do.
pub async fn complete(target: &Session, run: Uuid) -> Result<String> {
    target
        .client
        .query_one("SELECT dedup.complete_run($1::uuid)", &[&run])
        .await
        .and_then(|row| row.try_get(0))
        .at(Side::Target, "complete_run")
}

/// Sets the sequences behind the targets' columns past the highest value that was loaded. What can't be done is told,
/// and does not fail the run: its rows are there.
pub async fn advance_sequences(target: &Session, tables: &[TableName]) -> Result<()> {
    for table in tables {
        for (column, sequence) in sequences(target, table).await? {
            if let Err(error) = advance(target, table, &column, &sequence).await {
                tracing::warn!("sequence {sequence} of {table} is not set past the highest key: {error}");
            }
        }
    }
    Ok(())
}

/// Columns that take their values from an ascending sequence, by identity or default, with the sequence's quoted name.
async fn sequences(target: &Session, table: &TableName) -> Result<Vec<(String, String)>> {
    let doing = "looking for sequences";
    let rows = target
        .client
        .query(
            "SELECT DISTINCT a.attname::text, pg_catalog.format('%I.%I', sn.nspname, s.relname) \
             FROM pg_catalog.pg_class AS c JOIN pg_catalog.pg_namespace AS n ON n.oid = c.relnamespace \
             JOIN pg_catalog.pg_attribute AS a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped \
             LEFT JOIN pg_catalog.pg_attrdef AS d ON d.adrelid = c.oid AND d.adnum = a.attnum \
             JOIN pg_catalog.pg_depend AS p ON (p.classid = 'pg_catalog.pg_attrdef'::pg_catalog.regclass AND p.objid = d.oid \
                     AND p.refclassid = 'pg_catalog.pg_class'::pg_catalog.regclass) \
                 OR (p.refclassid = 'pg_catalog.pg_class'::pg_catalog.regclass AND p.refobjid = c.oid AND p.refobjsubid = a.attnum \
                     AND p.classid = 'pg_catalog.pg_class'::pg_catalog.regclass AND p.deptype IN ('a', 'i')) \
             JOIN pg_catalog.pg_class AS s ON s.relkind = 'S' \
                 AND s.oid = CASE WHEN p.classid = 'pg_catalog.pg_attrdef'::pg_catalog.regclass THEN p.refobjid ELSE p.objid END \
             JOIN pg_catalog.pg_namespace AS sn ON sn.oid = s.relnamespace \
             JOIN pg_catalog.pg_sequence AS q ON q.seqrelid = s.oid AND q.seqincrement > 0 \
             WHERE n.nspname = $1 AND c.relname = $2 AND a.atttypid IN (20, 21, 23, 1700) ORDER BY 1",
            &[&table.schema, &table.table],
        )
        .await
        .at(Side::Target, doing)?;
    rows.iter()
        .map(|row| Ok((row.try_get(0).at(Side::Target, doing)?, row.try_get(1).at(Side::Target, doing)?)))
        .collect()
}

async fn advance(target: &Session, table: &TableName, column: &str, sequence: &str) -> Result<()> {
    let sql = format!(
        "SELECT pg_catalog.setval($1::text::pg_catalog.regclass, GREATEST(highest::int8, s.last_value)) \
         FROM (SELECT max({}) AS highest FROM {}) AS loaded, {sequence} AS s \
         WHERE highest > s.last_value OR (highest = s.last_value AND NOT s.is_called)",
        quote_ident(column),
        table.quoted(),
    );
    target.client.query_opt(&sql, &[&sequence]).await.at(Side::Target, "setting a sequence")?;
    Ok(())
}

/// Makes the targets ready for use: visibility map and statistics. Told, not fatal, where it can't be done. TOAST tables, which may be nearly all
/// of the data, are left to autovacuum: no plan looks at their visibility map or statistics, and reading them all again would take long.
pub async fn vacuum_analyze(endpoint: &Endpoint, tables: &[TableName], at_once: usize) -> Result<()> {
    stream::iter(tables)
        .for_each_concurrent(at_once, |table| async move {
            if let Err(error) = vacuum(endpoint, table).await {
                tracing::warn!("{table} was not vacuumed and analyzed: {error}");
            }
        })
        .await;
    Ok(())
}

/// An autovacuum worker that took to the table meanwhile holds the lock that VACUUM needs. The server sends it away for us, but only after
/// `deadlock_timeout`, one second by default, in which nobody does anything. Not every role may set it: then it is waited for.
const IMPATIENT: &str = "SELECT pg_catalog.set_config('deadlock_timeout', '10ms', false) \
                         WHERE pg_catalog.has_parameter_privilege('deadlock_timeout', 'SET')";

/// What of a target's VACUUM can be done while it is still being written to, unless an autovacuum worker is at it. Told at the end, should it not be possible.
pub async fn vacuum_early(target: &Session, table: &TableName) {
    let vacuum = format!("VACUUM (PROCESS_TOAST FALSE, SKIP_LOCKED) {}", table.quoted());
    // One by one: VACUUM stands in no transaction, and the server takes several statements for one.
    for sql in ["SET client_min_messages = error", &vacuum, "RESET client_min_messages"] {
        if let Err(error) = target.client.batch_execute(sql).await {
            tracing::debug!("{table} was not vacuumed early: {error}");
        }
    }
}

async fn vacuum(endpoint: &Endpoint, table: &TableName) -> Result<()> {
    let session = endpoint.connect(Role::Admin).await?;
    session.client.batch_execute(IMPATIENT).await.at(Side::Target, "setting deadlock_timeout")?;
    session
        .client
        .batch_execute(&format!("VACUUM (ANALYZE, PROCESS_TOAST FALSE) {}", table.quoted()))
        .await
        .at(Side::Target, "VACUUM")
}
