//! Before images become rows again.
use std::collections::BTreeSet;

use pg_dedup_record::sql::quote_ident;
use pg_dedup_record::{Batch, BatchBuilder, pgcopy};
use pgrx::prelude::*;
use pgrx::{JsonB, pg_sys};

use super::step::{Plan, Step, layouts};
use crate::by_key::{Reading, rows_under};
use crate::copy::copy_in;
use crate::error::{Error, Result};
use crate::index::Target;
use crate::keyset::{column_list, qualified_name};
use crate::planning::{ByIndex, ExactTexts};
use crate::sql::{execute, ordinals, required};
use crate::upsert;

/// Images that are restored together have about this many bytes.
const BATCH_BYTES: usize = 8 << 20;

/// Restores the images of the planned rows; returns how many.
///
/// # Errors
/// 23000 when the target does not hold what was restored; whatever it refuses the rows with.
pub fn restore(step: &Step, plan: &Plan<'_>) -> Result<i64> {
    Ok(from_images(step, &plan.update, Way::Update)? + from_images(step, &plan.insert, Way::Insert)?)
}

/// Puts rows of a table without a key back that a repair deleted, and forgets their images; returns how many. Columns that the run did not deliver take
/// their defaults.
///
/// # Errors
/// Whatever the target refuses the rows with.
pub fn restore_keyless(target: &Target, ordinals: &BTreeSet<u64>) -> Result<i64> {
    let ordinals: Vec<i64> = ordinals.iter().map(|o| o.cast_signed()).collect();
    let mut restored = 0;
    let mut put_back = |images: Images| -> Result<()> {
        let (batch, _) = images.finish()?;
        restored += batch.len() as i64;
        copy_all(target.table, target, &batch)
    };
    Spi::connect(|client| -> Result<()> {
        let mut cursor = client.open_cursor(
            "SELECT image FROM dedup.before_images WHERE ordinal = ANY ($1)",
            &[ordinals.clone().into()],
        );
        let mut images = Images::new(target)?;
        loop {
            // Each may be as large as a row can be.
            let rows = cursor.fetch(8)?;
            if rows.is_empty() {
                return put_back(images);
            }
            for row in rows {
                let image: Vec<u8> = required(row["image"].value()?)?;
                images.batch.push(&image).map_err(unreadable)?;
                if images.batch.bytes() > BATCH_BYTES {
                    put_back(std::mem::replace(&mut images, Images::new(target)?))?;
                }
            }
        }
    })?;
    if restored > 0 {
        Spi::run_with_args("DELETE FROM dedup.before_images WHERE ordinal = ANY ($1)", &[ordinals.into()])?;
    }
    Ok(restored)
}

/// How a row comes back.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    Update,
    Insert,
}

/// Some images.
struct Images {
    batch: BatchBuilder,
    /// Of each the columns that the run did not deliver.
    others: Vec<Option<JsonB>>,
}

impl Images {
    fn new(target: &Target) -> Result<Self> {
        let mut batch = BatchBuilder::new(&target.layout, target.layout.key.is_empty());
        batch.push(pgcopy::header()).map_err(unreadable)?;
        Ok(Self { batch, others: Vec::new() })
    }

    /// The rows, with the columns that the run did not deliver.
    fn finish(mut self) -> Result<(Batch, Vec<Option<JsonB>>)> {
        self.batch.push(pgcopy::trailer()).map_err(unreadable)?;
        Ok((self.batch.finish().map_err(unreadable)?, self.others))
    }
}

/// Sends all rows of a batch into a table.
fn copy_all(table: pg_sys::Oid, target: &Target, batch: &Batch) -> Result<()> {
    let all: Vec<u32> = (0..batch.len() as u32).collect();
    copy_in(table, &target.layout, batch, &all).map(drop)
}

fn unreadable(error: pg_dedup_record::BatchError) -> Error {
    Error::corrupted(format!("a before image: {error}"))
}

fn from_images(step: &Step, keys: &[&[u8]], way: Way) -> Result<i64> {
    if keys.is_empty() {
        return Ok(0);
    }
    let mut restored = 0;
    let mut count = 0;
    for (layout_of, target) in layouts(step, &layout_ordinals(step)?)? {
        let layout_of: Vec<i64> = layout_of.into_iter().map(u64::cast_signed).collect();
        // As many keys at a time as keep the images within bounds if they are small; large ones flush earlier.
        for some in keys.chunks(20_000) {
            let some: Vec<Vec<u8>> = some.iter().map(|key| key.to_vec()).collect();
            let mut images = Images::new(&target)?;
            Spi::connect(|client| -> Result<()> {
                let mut cursor = client.open_cursor(
                    "SELECT b.image, b.other_columns FROM dedup.before_images AS b JOIN pg_catalog.unnest($2) AS k(key) USING (key) \
                     WHERE b.ordinal = $1 AND coalesce(b.layout_ordinal, b.ordinal) = ANY ($3)",
                    &[step.ordinal.cast_signed().into(), some.into(), layout_of.clone().into()],
                );
                loop {
                    // Each may be as large as a row can be.
                    let rows = cursor.fetch(8)?;
                    if rows.is_empty() {
                        return Ok(());
                    }
                    for row in rows {
                        let image: Vec<u8> = required(row["image"].value()?)?;
                        images.batch.push(&image).map_err(unreadable)?;
                        images.others.push(row["other_columns"].value()?);
                        count += 1;
                        if images.batch.bytes() > BATCH_BYTES {
                            let full = std::mem::replace(&mut images, Images::new(&target)?);
                            restored += put_back(step, &target, full, way)?;
                        }
                    }
                }
            })?;
            restored += put_back(step, &target, images, way)?;
        }
    }
    if count != keys.len() {
        return Err(Error::corrupted(format!("{} before images are gone", keys.len() - count)));
    }
    Ok(restored)
}

/// Finishes that name the columns which images of the step have; mostly the step's own alone.
fn layout_ordinals(step: &Step) -> Result<BTreeSet<u64>> {
    ordinals(
        "SELECT DISTINCT coalesce(layout_ordinal, ordinal) AS ordinal FROM dedup.before_images WHERE ordinal = $1",
        &[step.ordinal.cast_signed().into()],
    )
}

fn put_back(step: &Step, target: &Target, images: Images, way: Way) -> Result<i64> {
    let (batch, others) = images.finish()?;
    if batch.is_empty() {
        return Ok(0);
    }
    let Target { table, layout, key_types, .. } = target;
    let staging = upsert::staging_table(*table, layout)?;
    copy_all(staging, target, &batch)?;
    let keys = (0..batch.len())
        .map(|i| batch.key(i))
        .collect::<std::result::Result<Vec<_>, _>>()
        .map_err(unreadable)?;
    let keys: Vec<&[u8]> = keys.iter().map(Vec::as_slice).collect();
    let _plan = ByIndex::new();
    let put = match way {
        Way::Update => {
            let updated = upsert::replace_from(&qualified_name(staging), *table, layout, key_types)?;
            put_back_others(target, &keys, others)?;
            updated
        }
        Way::Insert => insert(target, staging, &keys, others)?,
    };
    if put != batch.len() as i64 {
        return Err(unlike(step, format!("{put} of {} rows could be restored.", batch.len())));
    }
    let mut same = 0;
    rows_under(Reading::Latest, *table, layout, key_types, &keys, |n, row| {
        same += usize::from(row.row_digest()? == batch.digests(n).row);
        Ok(())
    })?;
    if same == batch.len() {
        return Ok(put);
    }
    Err(unlike(step, format!("Of {} rows {} are not what they were.", batch.len(), batch.len() - same)))
}

/// A column that the run did not deliver: its quoted name, and its value as an expression on the JSON object `o.others`.
fn other_columns(target: &Target, others: &[Option<JsonB>]) -> Result<Vec<(String, String)>> {
    // A column that was added since has no value here: it takes its default.
    let Some(JsonB(serde_json::Value::Object(known))) = others.iter().flatten().next() else {
        return Ok(Vec::new());
    };
    let names: Vec<String> = known.keys().cloned().collect();
    Spi::connect(|client| {
        client
            .select(
                "SELECT pg_catalog.quote_ident(a.attname) AS name, \
                     pg_catalog.format('(o.others OPERATOR(pg_catalog.->>) %L)::%s', a.attname, pg_catalog.format_type(a.atttypid, a.atttypmod)) AS value \
                 FROM pg_catalog.pg_attribute AS a WHERE a.attrelid = $1 AND a.attname::pg_catalog.text OPERATOR(pg_catalog.=) ANY ($2) \
                     AND a.attnum > 0 AND NOT a.attisdropped AND a.attgenerated = '' ORDER BY a.attnum",
                None,
                &[target.table.into(), names.into()],
            )?
            .map(|row| Ok((required(row["name"].value()?)?, required(row["value"].value()?)?)))
            .collect()
    })
}

/// Inserts the staged rows, those that have values of further columns with these.
fn insert(target: &Target, staging: pg_sys::Oid, keys: &[&[u8]], others: Vec<Option<JsonB>>) -> Result<i64> {
    let Target { table, layout, key_types, .. } = target;
    let columns: Vec<String> = layout.columns.iter().map(|c| quote_ident(&c.name)).collect();
    let further = other_columns(target, &others)?;
    let (with, without): (Vec<_>, Vec<_>) = keys.iter().zip(others).partition(|(_, others)| others.is_some());
    let mut put = 0;
    for (rows, further) in [(without, Vec::new()), (with, further)] {
        if rows.is_empty() {
            continue;
        }
        let (keys, others): (Vec<&[u8]>, Vec<Option<JsonB>>) = rows.into_iter().unzip();
        let (names, values): (Vec<String>, Vec<String>) = further.into_iter().unzip();
        let mut arguments = key_types.arrays(&keys)?;
        let position = arguments.len() + 1;
        arguments.push(others.into());
        let _texts = ExactTexts::new();
        put += execute(
            &format!(
                "INSERT INTO {} ({}) OVERRIDING SYSTEM VALUE SELECT {} FROM {} JOIN {} AS s ON {} \
                     JOIN pg_catalog.unnest(${position}) WITH ORDINALITY AS o(others, n) ON o.n = k.n",
                qualified_name(*table),
                columns.iter().chain(&names).cloned().collect::<Vec<_>>().join(", "),
                std::iter::once(column_list(layout, "s")).chain(values).collect::<Vec<_>>().join(", "),
                key_types.unnest(),
                qualified_name(staging),
                key_types.join_condition_of("s"),
            ),
            &arguments,
        )?;
    }
    Ok(put)
}

/// Gives rows that were updated their values of further columns, where the images have them.
fn put_back_others(target: &Target, keys: &[&[u8]], others: Vec<Option<JsonB>>) -> Result<()> {
    let further = other_columns(target, &others)?;
    let (keys, others): (Vec<&[u8]>, Vec<Option<JsonB>>) =
        keys.iter().zip(others).filter(|(_, others)| others.is_some()).unzip();
    let further: Vec<String> = further.into_iter().map(|(name, value)| format!("{name} = {value}")).collect();
    if keys.is_empty() || further.is_empty() {
        return Ok(());
    }
    let key_types = &target.key_types;
    let mut arguments = key_types.arrays(&keys)?;
    let position = arguments.len() + 1;
    arguments.push(others.into());
    let _texts = ExactTexts::new();
    execute(
        &format!(
            "UPDATE {} AS t SET {} FROM {} JOIN pg_catalog.unnest(${position}) WITH ORDINALITY AS o(others, n) ON o.n = k.n WHERE {}",
            qualified_name(target.table),
            further.join(", "),
            key_types.unnest(),
            key_types.join_condition()
        ),
        &arguments,
    )?;
    Ok(())
}

fn unlike(step: &Step, detail: String) -> Error {
    Error::new(
        PgSqlErrorCode::ERRCODE_INTEGRITY_CONSTRAINT_VIOLATION,
        format!("{} does not hold what was restored", qualified_name(step.target.table)),
    )
    .detail(detail)
    .hint("look for a trigger, rule or policy that rewrites, adds or drops rows of the target")
}
