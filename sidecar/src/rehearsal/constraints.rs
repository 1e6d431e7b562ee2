//! What no single row tells: unique constraints between the records themselves, and foreign keys, asked of the source and the target by query.

use futures_util::{SinkExt, TryStreamExt};
use pg_dedup_record::sql::quote_ident;

use super::prediction::{KEY_COLLISION, Refusal};
use super::trial::UNIQUE_VIOLATION;
use crate::catalog::RelationKind;
use crate::conn::Session;
use crate::error::{At, Error, Result, Side};
use crate::setup::Added;

/// What would be refused of one pair.
#[derive(Debug, Default)]
pub struct Found {
    /// By constraint, and how many contents these records have.
    pub refused: Vec<(Refusal, u64)>,
    /// What could not be looked at, and why.
    pub not_tried: Vec<String>,
}

/// What is known of the run.
pub struct Questions<'a> {
    /// Its pairs.
    pub pairs: &'a [&'a Added],
    /// Those of which records are refused for themselves.
    pub refusing: &'a [i32],
    /// The target has rows.
    pub occupied: bool,
}

/// Looks at the unique constraints and foreign keys of one pair's target. What the source guarantees itself is not asked for.
pub async fn look(source: &Session, target: &Session, pair: &Added, of: &Questions<'_>) -> Result<Found> {
    let mut found = Found::default();
    // Sources of one target are asked together.
    let beside: Vec<&Added> =
        of.pairs.iter().copied().filter(|other| other.target.oid == pair.target.oid).collect();
    if beside.first().is_some_and(|first| first.table_id == pair.table_id) {
        for unique in unique_indexes(target, pair.target.oid).await? {
            look_at_unique(source, pair, of, &beside, unique, &mut found).await?;
        }
    }
    for key in foreign_keys(target, pair.target.oid).await? {
        look_at_foreign_key(source, target, pair, of, &key, &mut found).await?;
    }
    Ok(found)
}

async fn look_at_unique(
    source: &Session,
    pair: &Added,
    of: &Questions<'_>,
    beside: &[&Added],
    unique: Unique,
    found: &mut Found,
) -> Result<()> {
    let name = unique.name;
    let Some(columns) = unique.columns else {
        found.not_tried.push(format!("{name}: a unique index on expressions, or of a part of the rows"));
        return Ok(());
    };
    if beside.iter().any(|pair| positions(pair, &columns).is_none()) {
        found.not_tried.push(format!("{name}: the target fills its columns itself"));
        return Ok(());
    }
    let is_key = positions(pair, &columns).is_some_and(|columns| {
        columns.len() == pair.layout.key.len() && columns.iter().all(|i| pair.layout.key.contains(i))
    });
    if of.occupied && !is_key {
        found.not_tried.push(format!("{name}: against rows that stand in the target"));
    }
    let records = repeated(source, beside, &columns, unique.nulls_are_equal).await?;
    if records > 0 {
        let mut refusal = Refusal::new(UNIQUE_VIOLATION, Some(name), records);
        if is_key {
            refusal.reason = KEY_COLLISION.to_owned();
        }
        found.refused.push((refusal, records));
    }
    Ok(())
}

async fn look_at_foreign_key(
    source: &Session,
    target: &Session,
    pair: &Added,
    of: &Questions<'_>,
    key: &ForeignKey,
    found: &mut Found,
) -> Result<()> {
    let name = &key.name;
    if positions(pair, &key.columns).is_none() {
        found.not_tried.push(format!("{name}: the target fills its columns itself"));
        return Ok(());
    }
    let parents: Vec<&Added> =
        of.pairs.iter().copied().filter(|other| other.target.oid == key.parent).collect();
    for parent in parents.iter().filter(|parent| of.refusing.contains(&parent.table_id)) {
        found
            .not_tried
            .push(format!("{name}: records that point at refused records of {}", parent.source.name));
    }
    if key.match_full {
        let (records, contents) = partly_null(source, pair, &key.columns).await?;
        if records > 0 {
            found.refused.push((Refusal::new("23503", Some(name.clone()), records), contents));
        }
    }
    if guaranteed(source, pair, key, &parents).await? {
        return Ok(());
    }
    let Some(compared) = key.comparable() else {
        found.not_tried.push(format!(
            "{name}: what is equal to a value of type {} only the target knows",
            key.column_types.join(", ")
        ));
        return Ok(());
    };
    let (records, contents) = dangling(source, target, pair, key, &compared, &parents).await?;
    if records > 0 {
        found.refused.push((Refusal::new("23503", Some(name.clone()), records), contents));
    }
    Ok(())
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
    column_types: Vec<String>,
    match_full: bool,
    /// Every row was checked.
    validated: bool,
}

impl ForeignKey {
    /// Types that values of the columns are compared in; none: equality is more than that of values or characters.
    fn comparable(&self) -> Option<Vec<&'static str>> {
        self.column_types
            .iter()
            .map(|name| match name.split('(').next().unwrap_or_default().trim() {
                "smallint" | "integer" | "bigint" => Some("bigint"),
                "uuid" => Some("uuid"),
                "date" => Some("date"),
                "numeric" => Some("numeric"),
                "timestamp with time zone" => Some("timestamptz"),
                "timestamp without time zone" => Some("timestamp"),
                "bytea" => Some("bytea"),
                "boolean" => Some("bool"),
                "text" | "character varying" => Some("text"),
                _ => None,
            })
            .collect()
    }
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
                  JOIN pg_catalog.pg_attribute AS a ON a.attrelid = f.conrelid AND a.attnum = k.attnum), \
                 f.confmatchtype = 'f', f.convalidated \
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
                column_types: list(5)?,
                match_full: row.try_get(6).at(session.side, doing)?,
                validated: row.try_get(7).at(session.side, doing)?,
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
async fn repeated(
    source: &Session,
    pairs: &[&Added],
    columns: &[String],
    nulls_are_equal: bool,
) -> Result<u64> {
    if let [pair] = pairs
        && is_unique_in_source(source, pair, columns, nulls_are_equal).await?
    {
        return Ok(0);
    }
    let names: Vec<String> = (0..columns.len()).map(|i| format!("u{i}")).collect();
    let nulls = if nulls_are_equal {
        String::new()
    } else {
        let set: Vec<String> = names.iter().map(|u| format!("{u} IS NOT NULL")).collect();
        format!(" WHERE {}", set.join(" AND "))
    };
    // Contents as digests: not every type has an order.
    let records: Vec<String> = pairs
        .iter()
        .map(|pair| {
            format!(
                "SELECT {}, {} AS content FROM {}",
                named("u", &delivered(pair, columns)),
                content_digest(pair),
                from(pair)
            )
        })
        .collect();
    // UNION tells records of the same values and content once.
    let sql = format!(
        "SELECT pg_catalog.count(*) - pg_catalog.count(DISTINCT ROW({})) FROM (SELECT DISTINCT * FROM ({}) AS a) AS r{nulls}",
        names.join(", "),
        records.join(" UNION ALL "),
    );
    let [repeated] = counts(source, &sql, "looking for records that share unique values").await?;
    Ok(repeated)
}

/// Whether an index of the source says that no two records share these values.
async fn is_unique_in_source(
    source: &Session,
    pair: &Added,
    columns: &[String],
    nulls_are_equal: bool,
) -> Result<bool> {
    if !are_bare(pair, columns) {
        return Ok(false);
    }
    let is_unique = unique_indexes(source, pair.source.oid).await?.iter().any(|index| {
        index.columns.as_ref().is_some_and(|own| own.iter().all(|column| columns.contains(column)))
            && (index.nulls_are_equal || !nulls_are_equal)
    });
    // Of inherited children the parent's index says nothing.
    Ok(is_unique
        && (pair.source.kind == RelationKind::Partitioned || !has_children(source, pair.source.oid).await?))
}

/// A digest of a record's content in the source's SQL, good enough to tell contents apart there.
fn content_digest(pair: &Added) -> String {
    let columns: Vec<&str> = pair.layout.content.iter().map(|&i| pair.spec.select[i].as_str()).collect();
    format!("pg_catalog.md5(ROW({})::pg_catalog.text)", columns.join(", "))
}

/// Records whose columns are null in part, which MATCH FULL refuses, and how many contents they have.
async fn partly_null(source: &Session, pair: &Added, columns: &[String]) -> Result<(u64, u64)> {
    let doing = "looking for keys that are null in part";
    let pointing = delivered(pair, columns).join(", ");
    let sql = format!(
        "SELECT pg_catalog.count(*), pg_catalog.count(DISTINCT content) FROM (SELECT pg_catalog.num_nulls({pointing}) AS nulls, {} AS content FROM {}) AS r \
         WHERE nulls > 0 AND nulls < {}",
        content_digest(pair),
        from(pair),
        columns.len()
    );
    let [records, contents] = counts(source, &sql, doing).await?;
    Ok((records, contents))
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

/// The numbers in the one row that a query gives.
async fn counts<const N: usize>(session: &Session, sql: &str, doing: &str) -> Result<[u64; N]> {
    let row = session.client.query_one(sql, &[]).await.with_records(session.side, doing)?;
    let mut counts = [0; N];
    for (index, count) in counts.iter_mut().enumerate() {
        *count = row.try_get::<_, i64>(index).with_records(session.side, doing)?.unsigned_abs();
    }
    Ok(counts)
}

/// Records that point at rows which neither stand in the target nor come with the run, and how many contents they have.
async fn dangling(
    source: &Session,
    target: &Session,
    pair: &Added,
    key: &ForeignKey,
    types: &[&str],
    parents: &[&Added],
) -> Result<(u64, u64)> {
    let doing = "looking for records that point at nothing";
    let pointing = delivered(pair, &key.columns);
    let names: Vec<String> = (0..pointing.len()).map(|i| format!("f{i}")).collect();
    let mut conditions: Vec<String> = names.iter().map(|f| format!("{f} IS NOT NULL")).collect();
    // What is too long for the column is refused for that.
    for (name, kind) in names.iter().zip(&key.column_types) {
        if let Some(length) = kind.strip_prefix("character varying(").and_then(|rest| rest.strip_suffix(')'))
        {
            conditions.push(format!("pg_catalog.char_length({name}) <= {length}"));
        }
    }
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
    // Those that are left, with how many records have each, are looked for in the target; in types that hold every value of the source's.
    let values: Vec<String> = names.iter().zip(types).map(|(name, kind)| format!("{name}::{kind}")).collect();
    let left = format!(
        "SELECT {}, pg_catalog.count(*), pg_catalog.count(DISTINCT content) FROM (SELECT {}, {} AS content FROM {}) AS r WHERE {} GROUP BY {}",
        values.join(", "),
        named("f", &pointing),
        content_digest(pair),
        from(pair),
        conditions.join(" AND "),
        names.join(", "),
    );
    let columns: Vec<String> = names.iter().zip(types).map(|(name, kind)| format!("{name} {kind}")).collect();
    let create = format!(
        "DROP TABLE IF EXISTS pg_temp.rehearsal_keys; CREATE TEMPORARY TABLE rehearsal_keys ({}, records int8, contents int8)",
        columns.join(", ")
    );
    target.client.batch_execute(&create).await.at(Side::Target, doing)?;
    pipe(source, &left, target, "COPY pg_temp.rehearsal_keys FROM STDIN (FORMAT binary)").await?;
    let equal: Vec<String> = names
        .iter()
        .zip(&key.parent_columns)
        .zip(types)
        .map(|((name, column), kind)| format!("t.{}::{kind} = k.{name}", quote_ident(column)))
        .collect();
    let sql = format!(
        "SELECT coalesce(sum(k.records), 0)::int8, coalesce(sum(k.contents), 0)::int8 FROM pg_temp.rehearsal_keys AS k \
         WHERE NOT EXISTS (SELECT FROM {} AS t WHERE {})",
        key.parent_name,
        equal.join(" AND ")
    );
    let [records, contents] = counts(target, &sql, doing).await?;
    target.client.batch_execute("DROP TABLE pg_temp.rehearsal_keys").await.at(Side::Target, doing)?;
    Ok((records, contents))
}

/// The rows of a parent that are written. Of records with the same content one is, and which one nobody knows: the first by the columns that
/// are pointed at stands for it.
fn survivors(parent: &Added, columns: &[String], pointed_at: &[&str]) -> String {
    let positions = positions(parent, columns).unwrap_or_default();
    let named = named("p", pointed_at);
    if positions.iter().all(|i| parent.layout.content.contains(i)) {
        return format!("SELECT {named} FROM {}", from(parent));
    }
    let digest = content_digest(parent);
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
    let own = foreign_keys(source, pair.source.oid).await?;
    Ok(parents.iter().any(|parent| {
        // All of the parent comes, its pointed-at columns as they are, and none of it is dropped.
        let whole = parent.spec.filter.is_none() && are_bare(parent, &key.parent_columns);
        let kept = positions(parent, &key.parent_columns)
            .is_some_and(|columns| columns.iter().all(|i| parent.layout.content.contains(i)));
        whole
            && kept
            && own.iter().any(|own| {
                own.validated
                    && own.parent == parent.source.oid
                    && own.columns == key.columns
                    && own.parent_columns == key.parent_columns
            })
    }))
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
