//! What no single row tells: unique constraints between the records themselves, and foreign keys, asked of the source and the target by query.

use futures_util::{SinkExt, TryStreamExt};
use pg_dedup_record::sql::quote_ident;

use super::prediction::Refusal;
use crate::catalog::RelationKind;
use crate::conn::Session;
use crate::error::{At, Error, Result, Side};
use crate::setup::Added;

/// What would be refused of one pair.
#[derive(Debug, Default)]
pub struct Found {
    /// By constraint.
    pub refused: Vec<Refusal>,
    /// What could not be looked at, and why.
    pub not_tried: Vec<String>,
}

/// Looks at the unique constraints and foreign keys of one pair's target. What the source guarantees itself is not asked for.
pub async fn look(source: &Session, target: &Session, pair: &Added, all: &[&Added]) -> Result<Found> {
    let mut found = Found::default();
    for unique in unique_indexes(target, pair.target.oid).await? {
        match unique.columns {
            None => found
                .not_tried
                .push(format!("{}: unique index on expressions or a part of the rows", unique.name)),
            Some(columns) if positions(pair, &columns).is_none() => {
                found.not_tried.push(format!("{}: the target fills its columns itself", unique.name));
            }
            Some(columns) => {
                let records = repeated(source, pair, &columns, unique.nulls_are_equal).await?;
                found.add("23505", unique.name, records);
            }
        }
    }
    for key in foreign_keys(target, pair.target.oid).await? {
        if positions(pair, &key.columns).is_none() {
            found.not_tried.push(format!("{}: the target fills its columns itself", key.name));
            continue;
        }
        let parents: Vec<&Added> =
            all.iter().copied().filter(|other| other.target.oid == key.parent).collect();
        let records = dangling(source, target, pair, &key, &parents).await?;
        found.add("23503", key.name, records);
    }
    Ok(found)
}

impl Found {
    fn add(&mut self, sqlstate: &str, constraint: String, records: u64) {
        if records > 0 {
            self.refused.push(Refusal::new(sqlstate, Some(constraint), records));
        }
    }
}

/// A unique index of a target.
struct Unique {
    name: String,
    /// None: on expressions, or of a part of the rows.
    columns: Option<Vec<String>>,
    nulls_are_equal: bool,
}

async fn unique_indexes(session: &Session, table: u32) -> Result<Vec<Unique>> {
    let doing = "reading the unique indexes";
    // The catalog of 15 and later says whether nulls are equal; to_jsonb finds it where it is.
    let rows = session
        .client
        .query(
            "SELECT c.relname::text, CASE WHEN i.indpred IS NULL AND i.indexprs IS NULL THEN \
                 (SELECT array_agg(a.attname::text ORDER BY k.n) FROM pg_catalog.unnest(i.indkey::int2[]) WITH ORDINALITY AS k(attnum, n) \
                  JOIN pg_catalog.pg_attribute AS a ON a.attrelid = i.indrelid AND a.attnum = k.attnum WHERE k.n <= i.indnkeyatts) END, \
                 coalesce((pg_catalog.to_jsonb(i) ->> 'indnullsnotdistinct')::bool, false) \
             FROM pg_catalog.pg_index AS i JOIN pg_catalog.pg_class AS c ON c.oid = i.indexrelid \
             WHERE i.indrelid = $1 AND i.indisunique AND i.indisvalid ORDER BY 1",
            &[&table],
        )
        .await
        .at(session.side, doing)?;
    rows.iter()
        .map(|row| {
            Ok(Unique {
                name: row.try_get(0).at(session.side, doing)?,
                columns: row.try_get(1).at(session.side, doing)?,
                nulls_are_equal: row.try_get(2).at(session.side, doing)?,
            })
        })
        .collect()
}

/// A foreign key of a target.
struct ForeignKey {
    name: String,
    columns: Vec<String>,
    parent: u32,
    parent_name: String,
    parent_columns: Vec<String>,
    parent_types: Vec<String>,
}

async fn foreign_keys(session: &Session, table: u32) -> Result<Vec<ForeignKey>> {
    let doing = "reading the foreign keys";
    let rows = session
        .client
        .query(
            "SELECT f.conname::text, f.confrelid, pg_catalog.format('%I.%I', n.nspname, p.relname), \
                 (SELECT array_agg(a.attname::text ORDER BY k.n) FROM pg_catalog.unnest(f.conkey) WITH ORDINALITY AS k(attnum, n) \
                  JOIN pg_catalog.pg_attribute AS a ON a.attrelid = f.conrelid AND a.attnum = k.attnum), \
                 (SELECT array_agg(a.attname::text ORDER BY k.n) FROM pg_catalog.unnest(f.confkey) WITH ORDINALITY AS k(attnum, n) \
                  JOIN pg_catalog.pg_attribute AS a ON a.attrelid = f.confrelid AND a.attnum = k.attnum), \
                 (SELECT array_agg(pg_catalog.format_type(a.atttypid, a.atttypmod) ORDER BY k.n) \
                  FROM pg_catalog.unnest(f.conkey) WITH ORDINALITY AS k(attnum, n) \
                  JOIN pg_catalog.pg_attribute AS a ON a.attrelid = f.conrelid AND a.attnum = k.attnum) \
             FROM pg_catalog.pg_constraint AS f JOIN pg_catalog.pg_class AS p ON p.oid = f.confrelid \
                 JOIN pg_catalog.pg_namespace AS n ON n.oid = p.relnamespace \
             WHERE f.conrelid = $1 AND f.contype = 'f' AND f.conparentid = 0 ORDER BY 1",
            &[&table],
        )
        .await
        .at(session.side, doing)?;
    rows.iter()
        .map(|row| {
            let list = |index: usize| row.try_get::<_, Vec<String>>(index).at(session.side, doing);
            Ok(ForeignKey {
                name: row.try_get(0).at(session.side, doing)?,
                parent: row.try_get(1).at(session.side, doing)?,
                parent_name: row.try_get(2).at(session.side, doing)?,
                columns: list(3)?,
                parent_columns: list(4)?,
                parent_types: list(5)?,
            })
        })
        .collect()
}

/// Where these columns stand in a pair's layout; none: not all of them are delivered.
fn positions(pair: &Added, columns: &[String]) -> Option<Vec<usize>> {
    columns.iter().map(|name| pair.layout.columns.iter().position(|column| column.name == *name)).collect()
}

/// The expressions that deliver these columns.
fn delivered<'p>(pair: &'p Added, columns: &[String]) -> Vec<&'p str> {
    let positions = positions(pair, columns).unwrap_or_default();
    positions.into_iter().map(|i| pair.spec.select[i].as_str()).collect()
}

/// Whether these columns go over as they stand in the source's table.
fn are_bare(pair: &Added, columns: &[String]) -> bool {
    matches!(pair.source.kind, RelationKind::Table | RelationKind::Partitioned)
        && delivered(pair, columns).iter().zip(columns).all(|(sql, name)| *sql == quote_ident(name))
}

fn content(pair: &Added) -> String {
    let columns: Vec<&str> = pair.layout.content.iter().map(|&i| pair.spec.select[i].as_str()).collect();
    columns.join(", ")
}

fn from(pair: &Added) -> String {
    let filter = pair.spec.filter_condition().map(|filter| format!(" WHERE {filter}")).unwrap_or_default();
    format!("{}{filter}", pair.spec.relation)
}

fn named(prefix: &str, expressions: &[&str]) -> String {
    let columns: Vec<String> =
        expressions.iter().enumerate().map(|(i, sql)| format!("{sql} AS {prefix}{i}")).collect();
    columns.join(", ")
}

/// Records whose values in unique columns an earlier one has, contents counted once: the others are dropped as duplicates.
async fn repeated(source: &Session, pair: &Added, columns: &[String], nulls_are_equal: bool) -> Result<u64> {
    let doing = "looking for records that share unique values";
    if are_bare(pair, columns) {
        let unique = unique_indexes(source, pair.source.oid).await?;
        let is_unique = |index: &Unique| {
            index.columns.as_ref().is_some_and(|own| own.iter().all(|column| columns.contains(column)))
                && (index.nulls_are_equal || !nulls_are_equal)
        };
        // Of inherited children the parent's index says nothing.
        if unique.iter().any(is_unique) && pair.source.kind == RelationKind::Partitioned
            || unique.iter().any(is_unique) && !has_children(source, pair.source.oid).await?
        {
            return Ok(0);
        }
    }
    let unique = delivered(pair, columns);
    let names: Vec<String> = (0..unique.len()).map(|i| format!("u{i}")).collect();
    let nulls = if nulls_are_equal {
        String::new()
    } else {
        format!(
            " WHERE {}",
            names.iter().map(|u| format!("{u} IS NOT NULL")).collect::<Vec<_>>().join(" AND ")
        )
    };
    // Contents as digests: not every type has an order.
    let sql = format!(
        "SELECT pg_catalog.count(*) - pg_catalog.count(DISTINCT ROW({})) FROM (SELECT DISTINCT {}, \
         pg_catalog.md5(ROW({})::pg_catalog.text) AS content FROM {}) AS r{nulls}",
        names.join(", "),
        named("u", &unique),
        content(pair),
        from(pair)
    );
    count(source, &sql, doing).await
}

async fn has_children(source: &Session, table: u32) -> Result<bool> {
    let doing = "looking for inherited tables";
    source
        .client
        .query_one("SELECT EXISTS (SELECT FROM pg_catalog.pg_inherits WHERE inhparent = $1)", &[&table])
        .await
        .and_then(|row| row.try_get(0))
        .at(source.side, doing)
}

async fn count(session: &Session, sql: &str, doing: &str) -> Result<u64> {
    let row = session.client.query_one(sql, &[]).await.with_records(session.side, doing)?;
    Ok(row.try_get::<_, i64>(0).with_records(session.side, doing)?.unsigned_abs())
}

/// Records that point at rows which neither stand in the target nor come with the run.
async fn dangling(
    source: &Session,
    target: &Session,
    pair: &Added,
    key: &ForeignKey,
    parents: &[&Added],
) -> Result<u64> {
    if guaranteed(source, pair, key, parents).await? {
        return Ok(0);
    }
    let doing = "looking for records that point at nothing";
    let pointing = delivered(pair, &key.columns);
    let names: Vec<String> = (0..pointing.len()).map(|i| format!("f{i}")).collect();
    let mut conditions: Vec<String> = names.iter().map(|f| format!("{f} IS NOT NULL")).collect();
    for parent in parents {
        let pointed_at = delivered(parent, &key.parent_columns);
        if pointed_at.len() == names.len() {
            let equal: Vec<String> = (0..names.len()).map(|i| format!("p.p{i} = r.f{i}")).collect();
            conditions.push(format!(
                "NOT EXISTS (SELECT FROM ({}) AS p WHERE {})",
                survivors(parent, &key.parent_columns, &pointed_at),
                equal.join(" AND ")
            ));
        }
    }
    // Those that are left, with how many records have each, are looked for in the target.
    let left = format!(
        "SELECT {0}, pg_catalog.count(*) FROM (SELECT {1} FROM {2}) AS r WHERE {3} GROUP BY {0}",
        names.join(", "),
        named("f", &pointing),
        from(pair),
        conditions.join(" AND ")
    );
    let columns: Vec<String> =
        names.iter().zip(&key.parent_types).map(|(name, kind)| format!("{name} {kind}")).collect();
    target
        .client
        .batch_execute(&format!("CREATE TEMPORARY TABLE rehearsal_keys ({}, n int8)", columns.join(", ")))
        .await
        .at(Side::Target, doing)?;
    pipe(source, &left, target, "COPY pg_temp.rehearsal_keys FROM STDIN (FORMAT binary)").await?;
    let equal: Vec<String> = names
        .iter()
        .zip(&key.parent_columns)
        .map(|(name, column)| format!("t.{} = k.{name}", quote_ident(column)))
        .collect();
    let dangling = count(
        target,
        &format!(
            "SELECT coalesce(sum(k.n), 0)::int8 FROM pg_temp.rehearsal_keys AS k WHERE NOT EXISTS (SELECT FROM {} AS t WHERE {})",
            key.parent_name,
            equal.join(" AND ")
        ),
        doing,
    )
    .await?;
    target.client.batch_execute("DROP TABLE pg_temp.rehearsal_keys").await.at(Side::Target, doing)?;
    Ok(dangling)
}

/// The rows of a parent that are written. Of records with the same content one is, and which one nobody knows: the first by the columns that
/// are pointed at stands for it.
fn survivors(parent: &Added, columns: &[String], pointed_at: &[&str]) -> String {
    let positions = positions(parent, columns).unwrap_or_default();
    let named = named("p", pointed_at);
    if positions.iter().all(|i| parent.layout.content.contains(i)) {
        return format!("SELECT {named} FROM {}", from(parent));
    }
    let digest = format!("pg_catalog.md5(ROW({})::pg_catalog.text)", content(parent));
    format!(
        "SELECT DISTINCT ON ({digest}) {named} FROM {} ORDER BY {digest}, {}",
        from(parent),
        pointed_at.join(", ")
    )
}

/// Whether the source's own foreign key says that there is none.
async fn guaranteed(source: &Session, pair: &Added, key: &ForeignKey, parents: &[&Added]) -> Result<bool> {
    if !are_bare(pair, &key.columns) {
        return Ok(false);
    }
    let own = foreign_keys_of_source(source, pair.source.oid).await?;
    Ok(parents.iter().any(|parent| {
        // All of the parent comes, its pointed-at columns as they are, and none of it is dropped.
        let whole = parent.spec.filter.is_none() && are_bare(parent, &key.parent_columns);
        let kept = positions(parent, &key.parent_columns)
            .is_some_and(|columns| columns.iter().all(|i| parent.layout.content.contains(i)));
        whole
            && kept
            && own.iter().any(|own| {
                own.parent == parent.source.oid
                    && own.columns == key.columns
                    && own.parent_columns == key.parent_columns
            })
    }))
}

/// The foreign keys that the source has checked.
async fn foreign_keys_of_source(source: &Session, table: u32) -> Result<Vec<ForeignKey>> {
    let doing = "reading the foreign keys";
    let mut keys = foreign_keys(source, table).await?;
    let valid: Vec<String> = source
        .client
        .query_one(
            "SELECT coalesce(array_agg(conname::text), '{}') FROM pg_catalog.pg_constraint WHERE conrelid = $1 AND contype = 'f' AND convalidated",
            &[&table],
        )
        .await
        .and_then(|row| row.try_get(0))
        .at(source.side, doing)?;
    keys.retain(|key| valid.contains(&key.name));
    Ok(keys)
}

/// Copies the rows of a query on the source into the target.
async fn pipe(source: &Session, query: &str, target: &Session, into: &str) -> Result<()> {
    let doing = "copying what is pointed at";
    let out = format!("COPY ({query}) TO STDOUT (FORMAT binary)");
    let stream = source.client.copy_out(&out).await.with_records(Side::Source, doing)?;
    let sink = target.client.copy_in(into).await.with_records(Side::Target, doing)?;
    let mut stream = std::pin::pin!(stream);
    let mut sink = std::pin::pin!(sink);
    while let Some(piece) = stream.try_next().await.with_records(Side::Source, doing)? {
        sink.send(piece).await.with_records(Side::Target, doing)?;
    }
    match sink.finish().await {
        Ok(_) => Ok(()),
        Err(error) => Err(Error::record_driver(Side::Target, doing, error)),
    }
}
