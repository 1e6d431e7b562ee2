//! The upsert path: rows that stand in the target and are replaced or removed.
//!
//! What is overwritten or removed leaves a before image; the before images of a transaction are what `finish_chunk` retracts, so that a
//! savepoint taken back takes its retractions with it.
use std::hash::{DefaultHasher, Hash, Hasher};

use pg_dedup_record::digest::Digest;
use pg_dedup_record::layout::Layout;
use pg_dedup_record::sql::{quote_ident, quote_literal};
use pgrx::datum::DatumWithOid;
use pgrx::pg_sys;
use pgrx::pg_sys::panic::ErrorReport;
use pgrx::prelude::*;
use pgrx::{JsonB, Uuid};

use crate::chunk::{self, OpenChunk};
use crate::error::{Error, Result};
use crate::finish::draw_ordinal;
use crate::hash::rows;
use crate::keyset::{KeyTypes, column_list, qualified_name};
use crate::matching::unpack_keys;
use crate::planning::{ByIndex, ExactTexts};
use crate::references;
use crate::sql::{execute, required};

/// Name of the staging table: whoever puts the same columns into the same target within one transaction shares it.
fn staging_name(target: pg_sys::Oid, layout: &Layout) -> String {
    // Only this backend ever reads the name, so that any hash that is fixed for a process will do.
    let mut columns = DefaultHasher::new();
    for column in &layout.columns {
        (&column.name, &column.type_name).hash(&mut columns);
    }
    format!("pg_temp.dedup_upsert_{}_{:016x}", target.to_u32(), columns.finish())
}

/// `dedup.upsert_staging`: an empty temporary table, dropped at commit, that takes changed rows in layout order; returns its name.
///
/// It is made once a transaction and belongs outside of the savepoints of single attempts: made anew under each of them, the locks of
/// thousands of dropped tables would fill the server's lock table.
///
/// # Errors
/// 55000 without an open chunk, 42501 without TEMPORARY on the database.
#[pg_extern(volatile, parallel_unsafe)]
fn upsert_staging(run: Uuid, chunk_id: &str) -> Result<String, ErrorReport> {
    Ok(chunk::with_open(run, chunk_id, |chunk| stage(chunk.target, &chunk.layout))?)
}

/// The work of [`upsert_staging`].
///
/// # Errors
/// As there.
pub fn stage(target: pg_sys::Oid, layout: &Layout) -> Result<String> {
    let name = staging_name(target, layout);
    let bytes: Option<i64> = Spi::get_one_with_args(
        "SELECT pg_catalog.pg_relation_size(pg_catalog.to_regclass($1))",
        &[name.as_str().into()],
    )?;
    match bytes {
        None => {
            let columns = column_list(layout, "t");
            Spi::run(&format!(
                "CREATE TEMPORARY TABLE {} ON COMMIT DROP AS SELECT {columns} FROM {} AS t WITH NO DATA",
                &name["pg_temp.".len()..],
                qualified_name(target)
            ))?;
        }
        Some(0) => {}
        // Rows that an earlier attempt left, dead ones mostly: each further attempt would read past all of them.
        Some(_) => Spi::run(&format!("TRUNCATE TABLE {name}"))?,
    }
    Ok(name)
}

/// The table that [`stage`] makes.
///
/// # Errors
/// As there.
pub fn staging_table(target: pg_sys::Oid, layout: &Layout) -> Result<pg_sys::Oid> {
    let name = stage(target, layout)?;
    required(Spi::get_one_with_args("SELECT pg_catalog.to_regclass($1)::pg_catalog.oid", &[name.into()])?)
}

/// `dedup.apply_upserts`: replaces the rows that stand under the staged records' keys, keeping before images; empties the staging table.
///
/// # Errors
/// Whatever the target refuses the new rows with; 55000 when a staged key has no row.
#[pg_extern(volatile, parallel_unsafe)]
fn apply_upserts(run: Uuid, chunk_id: &str) -> Result<i64, ErrorReport> {
    Ok(chunk::with_open(run, chunk_id, apply)?)
}

/// The work of [`apply_upserts`].
///
/// # Errors
/// As there.
pub fn apply(chunk: &mut OpenChunk) -> Result<i64> {
    after_claim(chunk)?;
    let _plan = ByIndex::new();
    let staging = staging_name(chunk.target, &chunk.layout);
    let target = chunk.target_name();
    let same_key = chunk.key_types.same_key_condition("t", "s");
    let images = keep_before_images(
        chunk,
        &format!("{staging} AS s JOIN {target} AS t ON {same_key}"),
        &[],
        "update",
    )?;
    let updated = replace_from(&staging, chunk.target, &chunk.layout, &chunk.key_types)?;
    let staged = execute(&format!("DELETE FROM {staging}"), &[])?;
    if updated != staged || images != staged {
        return Err(Error::state(format!(
            "{updated} of {staged} changed rows of {target} could be replaced"
        ))
        .hint("look for a trigger, rule or policy that hides or drops rows of the target"));
    }
    Ok(updated)
}

/// Gives the rows that stand under the keys of the rows in `staging` the values that these have; returns how many.
///
/// # Errors
/// 428C9 where an identity column GENERATED ALWAYS would have to change; whatever the target refuses.
pub fn replace_from(
    staging: &str,
    target: pg_sys::Oid,
    layout: &Layout,
    key_types: &KeyTypes,
) -> Result<i64> {
    let name = qualified_name(target);
    let same_key = key_types.same_key_condition("t", "s");
    let fixed = generated_always(target, layout)?;
    refuse_to_change(&fixed, &format!("{staging} AS s JOIN {name} AS t ON {same_key}"), &name)?;
    let assignments: Vec<String> = (0..layout.columns.len())
        .filter(|i| !layout.key.contains(i) || key_types.may_differ(*i, layout))
        .map(|i| &layout.columns[i].name)
        .filter(|column| !fixed.contains(column))
        .map(|column| format!("{0} = s.{0}", quote_ident(column)))
        .collect();
    execute(
        &format!("UPDATE {name} AS t SET {} FROM {staging} AS s WHERE {same_key}", assignments.join(", ")),
        &[],
    )
}

/// Rows that are changed without a claim would be changed without a manifest: nobody would retract what they held.
fn after_claim(chunk: &OpenChunk) -> Result<()> {
    if chunk.claimed {
        Ok(())
    } else {
        Err(Error::state("rows are changed after claim").hint("see the worker protocol"))
    }
}

/// Identity columns GENERATED ALWAYS among the delivered ones: COPY may write them, UPDATE may not.
fn generated_always(target: pg_sys::Oid, layout: &Layout) -> Result<Vec<String>> {
    Spi::connect(|client| {
        client
            .select(
                "SELECT a.attname::pg_catalog.text AS name FROM pg_catalog.pg_attribute AS a \
                 WHERE a.attrelid = $1 AND a.attnum > 0 AND NOT a.attisdropped AND a.attidentity = 'a'",
                None,
                &[target.into()],
            )?
            .map(|row| required(row["name"].value()?))
            .filter(|name: &Result<String>| match name {
                Ok(name) => layout.columns.iter().any(|column| column.name == *name),
                Err(_) => true,
            })
            .collect()
    })
}

/// Refuses upserts that would have to change a column which the target does not let change.
fn refuse_to_change(fixed: &[String], pairs: &str, target: &str) -> Result<()> {
    for name in fixed {
        let column = quote_ident(name);
        let differs =
            format!("SELECT EXISTS (SELECT FROM {pairs} WHERE s.{column} IS DISTINCT FROM t.{column})");
        if Spi::get_one::<bool>(&differs)? == Some(true) {
            return Err(Error::new(
                PgSqlErrorCode::ERRCODE_GENERATED_ALWAYS,
                format!(
                    "column {column} of {target} changed in the source and is an identity GENERATED ALWAYS"
                ),
            )
            .hint(format!("ALTER TABLE {target} ALTER COLUMN {column} SET GENERATED BY DEFAULT")));
        }
    }
    Ok(())
}

/// `dedup.delete_superseded`: removes the rows under the packed keys, whose records now carry content that other rows have already.
///
/// # Errors
/// Whatever the target refuses the deletion with (23503 where a foreign key points at the row).
#[pg_extern(volatile, parallel_unsafe)]
fn delete_superseded(run: Uuid, chunk_id: &str, keys: &[u8]) -> Result<i64, ErrorReport> {
    Ok(chunk::with_open(run, chunk_id, |chunk| delete(chunk, &unpack_keys(keys)?))?)
}

/// The work of [`delete_superseded`].
///
/// # Errors
/// As there.
pub fn delete(chunk: &mut OpenChunk, keys: &[&[u8]]) -> Result<i64> {
    delete_rows(chunk, keys, |chunk, from, arrays| {
        let images = keep_before_images(chunk, from, arrays, "delete")?;
        if images != keys.len() as i64 {
            return Err(not_all_removed(chunk, images, keys));
        }
        Ok(())
    })
}

/// `dedup.take_back`: removes rows under the packed keys that this chunk wrote, before it turned out that another row keeps their content.
///
/// # Errors
/// 23503 where a foreign key points at a row.
#[pg_extern(volatile, parallel_unsafe)]
fn take_back(run: Uuid, chunk_id: &str, keys: &[u8]) -> Result<i64, ErrorReport> {
    Ok(chunk::with_open(run, chunk_id, |chunk| take_back_rows(chunk, &unpack_keys(keys)?))?)
}

/// The work of [`take_back`]. Rows that were there before the chunk have their before images already, of an update that is a removal now;
/// the others leave none.
///
/// # Errors
/// As there.
pub fn take_back_rows(chunk: &mut OpenChunk, keys: &[&[u8]]) -> Result<i64> {
    delete_rows(chunk, keys, |chunk, from, arrays| {
        let ordinal = draw_ordinal(chunk)?;
        let (mut stored, mut others) = (Vec::new(), Vec::new());
        scan_with_others(chunk, from, arrays, |row| {
            let mut key = Vec::new();
            row.write_key(&mut key)?;
            stored.push(key);
            others.push(row.trailing::<JsonB>(0)?);
            Ok(())
        })?;
        execute(
            "UPDATE dedup.before_images AS i SET action = 'delete', other_columns = u.others \
             FROM ROWS FROM (pg_catalog.unnest($2), pg_catalog.unnest($3)) AS u(key, others) \
             WHERE i.ordinal OPERATOR(pg_catalog.=) $1 AND i.key OPERATOR(pg_catalog.=) u.key",
            &[ordinal.into(), stored.into(), others.into()],
        )
        .map(drop)
    })
}

/// Deletes the rows under these keys, each of which has to be there, after `keep` has seen to the rows `t` of a FROM clause.
fn delete_rows(
    chunk: &mut OpenChunk,
    keys: &[&[u8]],
    keep: impl FnOnce(&mut OpenChunk, &str, &[DatumWithOid<'_>]) -> Result<()>,
) -> Result<i64> {
    after_claim(chunk)?;
    let _plan = ByIndex::new();
    let arrays = chunk.key_types.arrays(keys)?;
    let target = chunk.target_name();
    let (unnest, condition) = (chunk.key_types.unnest(), chunk.key_types.join_condition());
    let from = format!("{unnest} JOIN {target} AS t ON {condition}");
    // No row may come to point at them between the check and the deletion, which would take it along.
    execute(&format!("SELECT FROM {from} FOR UPDATE OF t"), &arrays)?;
    refuse_to_cascade(chunk, &unnest, &condition, &arrays)?;
    keep(chunk, &from, &arrays)?;
    let deleted = execute(&format!("DELETE FROM {target} AS t USING {unnest} WHERE {condition}"), &arrays)?;
    if deleted == keys.len() as i64 { Ok(deleted) } else { Err(not_all_removed(chunk, deleted, keys)) }
}

fn not_all_removed(chunk: &OpenChunk, removed: i64, keys: &[&[u8]]) -> Error {
    Error::state(format!(
        "{removed} of {} superseded rows of {} could be removed",
        keys.len(),
        chunk.target_name()
    ))
    .hint("look for a trigger, rule or policy that hides or keeps rows of the target")
}

/// A row that goes must not take rows of other tables along: what ON DELETE CASCADE or SET NULL would do to them is in no books.
fn refuse_to_cascade(
    chunk: &OpenChunk,
    unnest: &str,
    condition: &str,
    arrays: &[DatumWithOid<'_>],
) -> Result<()> {
    for reference in references::of(chunk.target, references::Which::ChangedByDeletion)? {
        if reference.points_at(&chunk.target_name(), unnest, condition, "", arrays)? {
            return Err(Error::new(
                PgSqlErrorCode::ERRCODE_FOREIGN_KEY_VIOLATION,
                format!(
                    "removing the row would change rows of {} through foreign key constraint \"{}\"",
                    reference.referencing, reference.constraint
                ),
            ));
        }
    }
    Ok(())
}

/// Before images on their way to `dedup.before_images`.
#[derive(Default)]
struct Images {
    keys: Vec<Vec<u8>>,
    contents: Vec<Vec<u8>>,
    tuples: Vec<Vec<u8>>,
    /// Of each the columns that the run does not deliver.
    others: Vec<Option<JsonB>>,
    bytes: usize,
}

impl Images {
    /// Takes one.
    fn push(&mut self, key: Vec<u8>, content: &Digest, tuple: Vec<u8>, others: Option<JsonB>) {
        self.bytes += tuple.len();
        self.keys.push(key);
        self.contents.push(content.as_bytes().to_vec());
        self.tuples.push(tuple);
        self.others.push(others);
    }

    /// Stores them; returns how many they were.
    fn write(self, chunk: &OpenChunk, ordinal: i64, action: &str) -> Result<i64> {
        execute(
            "INSERT INTO dedup.before_images (ordinal, target_id, run_id, chunk_id, action, key, content_hash, image, other_columns) \
             SELECT $1, $2, $3, $4, $5, u.key, u.hash, u.image, u.others \
             FROM ROWS FROM (pg_catalog.unnest($6), pg_catalog.unnest($7), pg_catalog.unnest($8), pg_catalog.unnest($9)) AS u(key, hash, image, others)",
            &[
                ordinal.into(),
                chunk.target_id.into(),
                chunk.run.into(),
                chunk.chunk_id.as_str().into(),
                action.into(),
                self.keys.into(),
                self.contents.into(),
                self.tuples.into(),
                self.others.into(),
            ],
        )
    }
}

/// Stores the rows `t` of `from` as they are now; returns how many.
fn keep_before_images(
    chunk: &mut OpenChunk,
    from: &str,
    arguments: &[DatumWithOid<'_>],
    action: &str,
) -> Result<i64> {
    /// Images are written in batches of about this many bytes.
    const BATCH_BYTES: usize = 8 << 20;
    let ordinal = draw_ordinal(chunk)?;
    let mut images = Images::default();
    let mut kept = 0;
    let chunk = &*chunk;
    let mut keep = |row: rows::RowView<'_>, others: Option<JsonB>| {
        let (mut key, mut tuple) = (Vec::new(), Vec::new());
        row.write_key(&mut key)?;
        row.write_tuple(&mut tuple)?;
        images.push(key, &row.digests()?.content, tuple, others);
        if images.bytes > BATCH_BYTES {
            kept += std::mem::take(&mut images).write(chunk, ordinal, action)?;
        }
        Ok(())
    };
    if action == "delete" {
        scan_with_others(chunk, from, arguments, |row| {
            let others = row.trailing(0)?;
            keep(row, others)
        })?;
    } else {
        let query = format!("SELECT {} FROM {from}", column_list(&chunk.layout, "t"));
        rows::scan(&query, arguments, &chunk.layout, 0, |row| keep(row, None))?;
    }
    Ok(kept + images.write(chunk, ordinal, action)?)
}

/// Reads the rows `t` of `from`. What is removed takes along the columns that the run does not deliver: they are a row's trailing column.
fn scan_with_others(
    chunk: &OpenChunk,
    from: &str,
    arguments: &[DatumWithOid<'_>],
    each: impl FnMut(rows::RowView<'_>) -> Result<()>,
) -> Result<()> {
    let others = other_columns(chunk)?;
    let others = if others.is_empty() {
        "NULL::pg_catalog.jsonb".to_owned()
    } else {
        let names: Vec<String> = others.iter().map(|name| quote_literal(name)).collect();
        let values: Vec<String> =
            others.iter().map(|name| format!("t.{}::pg_catalog.text", quote_ident(name))).collect();
        format!(
            "pg_catalog.jsonb_object(ARRAY[{}]::pg_catalog.text[], ARRAY[{}])",
            names.join(", "),
            values.join(", ")
        )
    };
    let _texts = ExactTexts::new();
    let query = format!("SELECT {}, {others} FROM {from}", column_list(&chunk.layout, "t"));
    rows::scan(&query, arguments, &chunk.layout, 1, each).map(drop)
}

/// Stores rows of a table without a key that are about to be removed: they are kept under their content and a number.
///
/// # Errors
/// SPI's own.
pub fn keep_keyless_images(chunk: &mut OpenChunk, rows: Vec<(Digest, Vec<u8>)>) -> Result<()> {
    let ordinal = draw_ordinal(chunk)?;
    let mut images = Images::default();
    for (n, (content, tuple)) in rows.into_iter().enumerate() {
        let key = [content.as_bytes().as_slice(), &(n as u64).to_be_bytes()].concat();
        images.push(key, &content, tuple, None);
    }
    images.write(chunk, ordinal, "delete").map(drop)
}

/// The target's columns that the run does not deliver and that do not follow from others.
fn other_columns(chunk: &OpenChunk) -> Result<Vec<String>> {
    let delivered: Vec<String> = chunk.layout.columns.iter().map(|column| column.name.clone()).collect();
    Spi::connect(|client| {
        client
            .select(
                "SELECT a.attname::pg_catalog.text AS name FROM pg_catalog.pg_attribute AS a WHERE a.attrelid = $1 AND a.attnum > 0 AND NOT a.attisdropped \
                    AND a.attgenerated = '' AND a.attname::pg_catalog.text OPERATOR(pg_catalog.<>) ALL ($2) ORDER BY a.attnum",
                None,
                &[chunk.target.into(), delivered.into()],
            )?
            .map(|row| required(row["name"].value()?))
            .collect()
    })
}
