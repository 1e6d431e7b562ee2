//! What `doctor` looks at in each pair of tables.

use std::collections::BTreeMap;

use serde_json::json;
use uuid::Uuid;

use super::{Findings, Level};
use crate::catalog::{Relation, RelationKind};
use crate::config::Job;
use crate::conn::Session;
use crate::error::{At, Error, Result, Side};
use crate::names::TableName;
use crate::setup::{self, Added, Pair};

/// How much the sources hold.
#[derive(Debug, Default, Clone)]
pub struct Amount {
    /// Records, by the statistics.
    pub records: f64,
    /// Bytes of tables and their indexes, by the target's tablespace that they go to.
    pub bytes: BTreeMap<String, f64>,
}

/// Checks every pair; answers how much the sources hold.
pub async fn check(
    job: &Job,
    names: &[(TableName, TableName)],
    source: &Session,
    target: &Session,
    extension: bool,
    findings: &mut Findings,
) -> Result<Amount> {
    let mut amount = Amount::default();
    for (source_name, target_name) in names {
        let source_table = match Relation::get(source, source_name).await {
            Ok(table) => table,
            Err(error) => {
                findings.blocker(source_name, &error);
                continue;
            }
        };
        check_source_table(source, &source_table, findings).await?;
        let (records, bytes) = amount_of(source, source_table.oid).await?;
        amount.records += records;
        let Some(target_table) = Relation::find(target, target_name).await? else {
            findings.blocker(source_name, &setup::missing_target(source_name, target_name));
            continue;
        };
        *amount.bytes.entry(tablespace_of(target, target_table.oid).await?).or_default() += bytes;
        check_target_table(target, &target_table, findings).await?;
        let pair = Pair { options: job.options_of(source_name), source: source_table, target: target_table };
        if extension {
            match try_out(source, target, &pair).await {
                Ok(added) => told(source, &pair, &added, findings).await?,
                Err(error) => findings.blocker(source_name, &error),
            }
        } else if let Err(error) = crate::source::delivered_columns(&pair.source, &pair.target, &pair.options)
        {
            findings.blocker(source_name, &error);
        }
    }
    Ok(amount)
}

/// Creates a run with this pair, and takes it back.
async fn try_out(source: &Session, target: &Session, pair: &Pair) -> Result<Added> {
    target.client.batch_execute("BEGIN").await.at(Side::Target, "trying it out")?;
    let added = async {
        let run: Uuid = target
            .client
            .query_one("SELECT dedup.create_run('doctor', $1::jsonb)", &[&json!({})])
            .await
            .and_then(|row| row.try_get(0))
            .at(Side::Target, "create_run")?;
        setup::add_table(source, target, run, pair).await
    }
    .await;
    target.client.batch_execute("ROLLBACK").await.at(Side::Target, "trying it out")?;
    added
}

/// What was found out by trying.
async fn told(source: &Session, pair: &Pair, added: &Added, findings: &mut Findings) -> Result<()> {
    let table = &pair.source.name;
    findings.add(Level::Ok, table, format!("content is {}", added.content_rule));
    if added.layout.key.is_empty() {
        findings
            .add(
                Level::Warning,
                table,
                "the target has no usable key: chunks are verified by scanning the table at the end",
            )
            .hint("a valid, immediate, total unique index on NOT NULL columns of the target makes a key");
        if !pair.source.kind.has_pages() {
            findings.add(Level::Warning, table, "no key and no positions: the source is read in one chunk");
        }
        return Ok(());
    }
    if added.spec.has_nullable_key() {
        findings.add(Level::Note, table, "the key can be null in the source: such records go to quarantine");
    }
    let key: Vec<&str> = added
        .layout
        .key
        .iter()
        .filter_map(|&index| added.layout.columns.get(index))
        .map(|column| column.name.as_str())
        .collect();
    if key.iter().any(|column| added.spec.transforms.contains_key(*column)) {
        findings.add(
            Level::Warning,
            table,
            "the key is computed by a transform: every chunk scans the whole source",
        );
    } else if pair.source.kind.has_pages() && !has_index(source, pair.source.oid, &key).await? {
        findings
            .add(
                Level::Warning,
                table,
                "no index of the source begins with the key: every chunk scans the whole table",
            )
            .hint(format!(
                "CREATE INDEX CONCURRENTLY ON {} ({})",
                table.quoted(),
                crate::names::quote_idents(key)
            ));
    }
    for (column, expression) in added.layout.columns.iter().zip(&added.spec.select) {
        if *expression != pg_dedup_record::sql::quote_ident(&column.name)
            && !added.spec.transforms.contains_key(&column.name)
        {
            findings.add(Level::Note, table, format!("{} is read as {expression}", column.name));
        }
    }
    Ok(())
}

/// Whether a valid B-tree index begins with the key's columns in their order.
async fn has_index(source: &Session, table: u32, key: &[&str]) -> Result<bool> {
    let doing = "looking for an index";
    let rows = source
        .client
        .query(
            "SELECT (SELECT array_agg(a.attname::text ORDER BY k.n) FROM unnest(i.indkey::int2[]) WITH ORDINALITY AS k(attnum, n) \
                 LEFT JOIN pg_catalog.pg_attribute AS a ON a.attrelid = i.indrelid AND a.attnum = k.attnum) \
             FROM pg_catalog.pg_index AS i JOIN pg_catalog.pg_class AS c ON c.oid = i.indexrelid \
             JOIN pg_catalog.pg_am AS m ON m.oid = c.relam \
             WHERE i.indrelid = $1 AND i.indisvalid AND i.indpred IS NULL AND m.amname = 'btree'",
            &[&table],
        )
        .await
        .at(Side::Source, doing)?;
    for row in rows {
        let columns: Vec<Option<String>> = row.try_get(0).at(Side::Source, doing)?;
        let begins = columns.len() >= key.len()
            && columns.iter().zip(key).all(|(column, wanted)| column.as_deref() == Some(*wanted));
        if begins {
            return Ok(true);
        }
    }
    Ok(false)
}

async fn check_source_table(source: &Session, table: &Relation, findings: &mut Findings) -> Result<()> {
    match table.kind {
        RelationKind::View | RelationKind::Foreign => {
            findings.add(
                Level::Note,
                &table.name,
                "a view or foreign table: planning reads it whole, chunks are as fast as its query",
            );
        }
        RelationKind::Other => {
            findings.blocker(&table.name, &Error::refused("not a table"));
        }
        RelationKind::Table | RelationKind::Partitioned | RelationKind::MaterializedView => {}
    }
    let doing = "looking at the source table";
    let row = source
        .client
        .query_one(
            "SELECT pg_catalog.has_table_privilege(oid, 'SELECT') OR pg_catalog.has_any_column_privilege(oid, 'SELECT'), \
                 relrowsecurity AND pg_catalog.row_security_active(oid) FROM pg_catalog.pg_class WHERE oid = $1",
            &[&table.oid],
        )
        .await
        .at(Side::Source, doing)?;
    if !row.try_get::<_, bool>(0).at(Side::Source, doing)? {
        findings
            .add(Level::Blocker, &table.name, "the source table may not be read")
            .hint(format!("GRANT SELECT ON {} TO the role", table.name.quoted()));
    }
    if row.try_get::<_, bool>(1).at(Side::Source, doing)? {
        findings
            .add(Level::Blocker, &table.name, "row security hides rows of the source table")
            .hint("use its owner or a role with BYPASSRLS");
    }
    Ok(())
}

/// Triggers and rules; what else a target must be the extension says itself.
async fn check_target_table(target: &Session, table: &Relation, findings: &mut Findings) -> Result<()> {
    let doing = "looking at the target table";
    let rows = target
        .client
        .query(
            "WITH RECURSIVE tree AS (SELECT $1::oid AS oid UNION SELECT i.inhrelid FROM pg_catalog.pg_inherits AS i \
                 JOIN tree ON tree.oid = i.inhparent) \
             SELECT DISTINCT t.tgname::text, (t.tgtype & 2) <> 0 AND (t.tgtype & 1) <> 0 FROM tree \
             JOIN pg_catalog.pg_trigger AS t ON t.tgrelid = tree.oid \
             WHERE NOT t.tgisinternal AND t.tgenabled <> 'D' AND t.tgenabled <> 'R' ORDER BY 1",
            &[&table.oid],
        )
        .await
        .at(Side::Target, doing)?;
    for row in rows {
        let name: String = row.try_get(0).at(Side::Target, doing)?;
        let before_row: bool = row.try_get(1).at(Side::Target, doing)?;
        if before_row {
            findings
                .add(Level::Warning, &table.name, format!("trigger {name} runs before each row"))
                .hint("a trigger that changes or drops rows makes verification fail; disable it for the load if it does");
        } else {
            findings.add(Level::Note, &table.name, format!("trigger {name} will fire"));
        }
    }
    let rules = target
        .client
        .query_one("SELECT relhasrules FROM pg_catalog.pg_class WHERE oid = $1", &[&table.oid])
        .await
        .and_then(|row| row.try_get::<_, bool>(0))
        .at(Side::Target, doing)?;
    if rules {
        findings.add(Level::Warning, &table.name, "rules of the target are not applied to what is loaded");
    }
    Ok(())
}

/// The tablespace that a table's rows go to; of a partitioned one, its own.
async fn tablespace_of(target: &Session, table: u32) -> Result<String> {
    target
        .client
        .query_one(
            "SELECT s.spcname::text FROM pg_catalog.pg_class AS c JOIN pg_catalog.pg_database AS d ON d.datname = pg_catalog.current_database() \
             JOIN pg_catalog.pg_tablespace AS s ON s.oid = CASE c.reltablespace WHEN 0 THEN d.dattablespace ELSE c.reltablespace END \
             WHERE c.oid = $1",
            &[&table],
        )
        .await
        .and_then(|row| row.try_get(0))
        .at(Side::Target, "asking for a tablespace")
}

/// Records and bytes that a table and its partitions hold; records that statistics don't know count as none.
async fn amount_of(source: &Session, table: u32) -> Result<(f64, f64)> {
    let doing = "reading statistics";
    let row = source
        .client
        .query_one(
            "WITH RECURSIVE tree AS (SELECT $1::oid AS oid UNION SELECT i.inhrelid FROM pg_catalog.pg_inherits AS i \
                 JOIN tree ON tree.oid = i.inhparent) \
             SELECT coalesce(sum(greatest(c.reltuples, 0)) FILTER (WHERE c.relkind <> 'p'), 0)::float8, \
                 coalesce(sum(pg_catalog.pg_total_relation_size(c.oid)) FILTER (WHERE c.relkind IN ('r', 'm')), 0)::float8 \
             FROM tree JOIN pg_catalog.pg_class AS c USING (oid)",
            &[&table],
        )
        .await
        .at(Side::Source, doing)?;
    Ok((row.try_get(0).at(Side::Source, doing)?, row.try_get(1).at(Side::Source, doing)?))
}
