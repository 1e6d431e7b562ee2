//! Before images become rows again.
use pg_dedup_record::{Batch, BatchBuilder, pgcopy};
use pgrx::prelude::*;

use super::undo::{Plan, Step};
use crate::by_key::{Reading, rows_under};
use crate::chunk::required;
use crate::copy::copy_in;
use crate::error::{Error, Result};
use crate::index::Target;
use crate::keyset::{column_list, qualified_name, quote_ident};
use crate::planning::{ByIndex, ExactTexts};
use crate::upsert::{self, execute};

/// Images that are restored together have about this many bytes.
const BATCH_BYTES: usize = 8 << 20;

/// Restores the images of the planned rows; returns how many.
///
/// # Errors
/// 23000 when the target does not hold what was restored; whatever it refuses the rows with.
pub fn restore(step: &Step, plan: &Plan<'_>) -> Result<i64> {
    Ok(from_images(step, &plan.update, Way::Update)? + from_images(step, &plan.insert, Way::Insert)?)
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
    /// Of each the whole row as text, if the table has columns that the run did not deliver.
    full_rows: Vec<Option<String>>,
}

impl Images {
    fn new(step: &Step) -> Result<Self> {
        let mut batch = BatchBuilder::new(&step.target.layout, false);
        batch.push(pgcopy::header()).map_err(unreadable)?;
        Ok(Self { batch, full_rows: Vec::new() })
    }
}

fn unreadable(error: pg_dedup_record::BatchError) -> Error {
    Error::corrupted(format!("a before image: {error}"))
}

fn from_images(step: &Step, keys: &[&[u8]], way: Way) -> Result<i64> {
    if keys.is_empty() {
        return Ok(0);
    }
    let mut restored = 0;
    // As many keys at a time as keep the images within bounds if they are small; large ones flush earlier.
    for some in keys.chunks(20_000) {
        let some: Vec<Vec<u8>> = some.iter().map(|key| key.to_vec()).collect();
        let mut images = Images::new(step)?;
        let mut count = 0;
        Spi::connect(|client| -> Result<()> {
            let mut cursor = client.open_cursor(
                "SELECT b.image, b.full_row FROM dedup.before_images AS b JOIN pg_catalog.unnest($2) AS k(key) USING (key) WHERE b.ordinal = $1",
                &[step.ordinal.cast_signed().into(), some.clone().into()],
            );
            loop {
                let rows = cursor.fetch(100)?;
                if rows.is_empty() {
                    return Ok(());
                }
                for row in rows {
                    let image: Vec<u8> = required(row["image"].value()?)?;
                    images.batch.push(&image).map_err(unreadable)?;
                    images.full_rows.push(row["full_row"].value()?);
                    count += 1;
                    if images.batch.bytes() > BATCH_BYTES {
                        restored += put_back(step, std::mem::replace(&mut images, Images::new(step)?), way)?;
                    }
                }
            }
        })?;
        restored += put_back(step, images, way)?;
        if count != some.len() {
            return Err(Error::corrupted(format!("{} before images are gone", some.len() - count)));
        }
    }
    Ok(restored)
}

fn put_back(step: &Step, images: Images, way: Way) -> Result<i64> {
    let Images { mut batch, full_rows } = images;
    batch.push(pgcopy::trailer()).map_err(unreadable)?;
    let batch = batch.finish().map_err(unreadable)?;
    if batch.is_empty() {
        return Ok(0);
    }
    let Target { table, layout, key_types, .. } = &step.target;
    let by_text = way == Way::Insert && full_rows.iter().all(Option::is_some);
    let put = if by_text {
        insert_texts(step, full_rows.into_iter().flatten().collect())?
    } else {
        let staging = upsert::staging_table(*table, layout)?;
        let name = qualified_name(staging);
        let all: Vec<u32> = (0..batch.len() as u32).collect();
        copy_in(staging, layout, &batch, &all)?;
        let _plan = ByIndex::new();
        match way {
            Way::Update => upsert::replace_from(&name, *table, layout, key_types)?,
            Way::Insert => {
                let columns: Vec<String> = layout.columns.iter().map(|c| quote_ident(&c.name)).collect();
                execute(
                    &format!(
                        "INSERT INTO {} ({}) OVERRIDING SYSTEM VALUE SELECT {} FROM {name} AS s",
                        qualified_name(*table),
                        columns.join(", "),
                        column_list(layout, "s")
                    ),
                    &[],
                )?
            }
        }
    };
    if put != batch.len() as i64 {
        return Err(unlike(step, format!("{put} of {} rows could be restored.", batch.len())));
    }
    read_back(step, &batch)?;
    Ok(put)
}

/// Whole rows, with the columns that the run did not deliver.
fn insert_texts(step: &Step, rows: Vec<String>) -> Result<i64> {
    let name = qualified_name(step.target.table);
    let columns: Vec<String> = Spi::connect(|client| -> Result<_> {
        client
            .select(
                "SELECT a.attname::pg_catalog.text AS name FROM pg_catalog.pg_attribute AS a \
                 WHERE a.attrelid = $1 AND a.attnum > 0 AND NOT a.attisdropped AND a.attgenerated = '' ORDER BY a.attnum",
                None,
                &[step.target.table.into()],
            )?
            .map(|row| Ok(quote_ident(&required::<String>(row["name"].value()?)?)))
            .collect()
    })?;
    let _texts = ExactTexts::new();
    let values: Vec<String> = columns.iter().map(|column| format!("(u.whole).{column}")).collect();
    execute(
        &format!(
            "INSERT INTO {name} ({}) OVERRIDING SYSTEM VALUE SELECT {} \
             FROM (SELECT r.row::{name} AS whole FROM pg_catalog.unnest($1) AS r(row) OFFSET 0) AS u",
            columns.join(", "),
            values.join(", ")
        ),
        &[rows.into()],
    )
}

fn unlike(step: &Step, detail: String) -> Error {
    Error::new(
        PgSqlErrorCode::ERRCODE_INTEGRITY_CONSTRAINT_VIOLATION,
        format!("{} does not hold what was restored", qualified_name(step.target.table)),
    )
    .detail(detail)
    .hint("look for a trigger, rule or policy that rewrites, adds or drops rows of the target")
}

/// Every row that came back is read again: it is what the image says, byte for byte.
fn read_back(step: &Step, batch: &Batch) -> Result<()> {
    let Target { table, layout, key_types, .. } = &step.target;
    let keys = (0..batch.len())
        .map(|i| batch.key(i))
        .collect::<std::result::Result<Vec<_>, _>>()
        .map_err(unreadable)?;
    let keys: Vec<&[u8]> = keys.iter().map(Vec::as_slice).collect();
    let mut same = 0;
    rows_under(Reading::Latest, *table, layout, key_types, &keys, |n, row| {
        same += usize::from(row.row_digest()? == batch.digests(n).row);
        Ok(())
    })?;
    if same == batch.len() {
        return Ok(());
    }
    Err(unlike(step, format!("Of {} rows {} are not what they were.", batch.len(), batch.len() - same)))
}
