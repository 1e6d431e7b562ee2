//! Rows that one run had found unchanged before another changed them, and whose writer is taken back: they come back with the other's rollback, and are the
//! first one's then. Until then the other's before image holds such a row, and says whose it is.
//!
//! ```text
//!   writer ── wrote the row           taken back: its image, if it has one, becomes the heir's
//!   heir   ── found it unchanged      taken back: what stood there before the writer becomes the other's image
//!   other  ── changed it              taken back: the row comes back, with an entry of the heir's
//! ```
use std::collections::{HashMap, HashSet};

use pg_dedup_record::digest::Digest;
use pgrx::prelude::*;

use super::heirs::{Moved, inherited_ordinal, move_images, subject};
use super::step::{Plan, Step, pending};
use super::undo;
use crate::by_key::{Reading, rows_under};
use crate::error::Result;
use crate::index::Target;
use crate::matching::rested_on;
use crate::segment;
use crate::sql::{required, stored_digest};

/// A row that is awaited.
pub struct Awaited {
    /// Who wrote it, and is taken back.
    pub writer: u64,
    /// Who changed it.
    pub by: u64,
    /// Who found it unchanged.
    pub heir: u64,
    /// Its key.
    pub key: Vec<u8>,
    /// Its content.
    pub content: Digest,
}

/// Enters the heirs into the images that hold the rows; answers those whose image does: where somebody had changed the row by hand, it is nobody's any more.
///
/// # Errors
/// SPI's own.
pub fn enter(awaited: Vec<Awaited>) -> Result<Vec<Awaited>> {
    if awaited.is_empty() {
        return Ok(awaited);
    }
    let by: Vec<i64> = awaited.iter().map(|a| a.by.cast_signed()).collect();
    let heirs: Vec<i64> = awaited.iter().map(|a| a.heir.cast_signed()).collect();
    let keys: Vec<Vec<u8>> = awaited.iter().map(|a| a.key.clone()).collect();
    let contents: Vec<Vec<u8>> = awaited.iter().map(|a| a.content.0.to_vec()).collect();
    let entered = Spi::connect_mut(|client| -> Result<HashSet<u64>> {
        client
            .update(
                "UPDATE dedup.before_images AS b SET heir = u.heir \
                 FROM ROWS FROM (pg_catalog.unnest($1), pg_catalog.unnest($2), pg_catalog.unnest($3), pg_catalog.unnest($4)) AS u(ordinal, heir, key, content) \
                 WHERE b.ordinal = u.ordinal AND b.key = u.key AND b.content_hash = u.content RETURNING b.ordinal, b.key",
                None,
                &[by.into(), heirs.into(), keys.into(), contents.into()],
            )?
            .map(|row| {
                let ordinal: i64 = required(row["ordinal"].value()?)?;
                Ok(subject(ordinal.cast_unsigned(), &required::<Vec<u8>>(row["key"].value()?)?))
            })
            .collect()
    })?;
    Ok(awaited.into_iter().filter(|a| entered.contains(&subject(a.by, &a.key))).collect())
}

impl Awaited {
    /// The writer's before image, which goes to the heir.
    pub fn image(&self) -> Moved {
        Moved { from: self.writer, to: self.heir, key: self.key.clone(), content: self.content }
    }
}

/// Nobody waits for these rows any more, since the heir is taken back: the images that hold them become what stood there before the writer.
///
/// # Errors
/// SPI's own.
pub fn give_up(step: &Step) -> Result<()> {
    let ordinal = step.ordinal.cast_signed();
    let mut heirs: HashSet<u64> = Spi::connect(|client| -> Result<_> {
        client
            .select(
                "SELECT DISTINCT heir FROM dedup.before_images WHERE ordinal = $1 AND heir IS NOT NULL",
                None,
                &[ordinal.into()],
            )?
            .map(|row| Ok(required::<i64>(row["heir"].value()?)?.cast_unsigned()))
            .collect()
    })?;
    // Of the rollback's own finishes the later one is undone first: its image is to be what the earlier one found no more.
    heirs = pending(step, &heirs)?;
    if is_heir(step.ordinal)? {
        pass_on(step)?;
        heirs.insert(step.ordinal);
    }
    if heirs.is_empty() {
        return Ok(());
    }
    let heirs: Vec<i64> = heirs.into_iter().map(u64::cast_signed).collect();
    let taken = Spi::connect_mut(|client| -> Result<Vec<(Digest, u64, Vec<u8>)>> {
        client
            .update(
                "WITH before AS (DELETE FROM dedup.before_images AS b USING dedup.before_images AS n \
                     WHERE n.heir = ANY ($1) AND (n.heir = $2 OR n.ordinal = $2) AND b.ordinal = n.heir AND b.key = n.key \
                     RETURNING n.ordinal AS of, b.key, b.image, b.content_hash, b.other_columns, coalesce(b.layout_ordinal, b.ordinal) AS layout_ordinal, b.heir) \
                 UPDATE dedup.before_images AS n \
                 SET image = x.image, content_hash = x.content_hash, other_columns = coalesce(x.other_columns, n.other_columns), layout_ordinal = x.layout_ordinal, heir = x.heir \
                 FROM before AS x WHERE n.ordinal = x.of AND n.key = x.key RETURNING n.content_hash, n.ordinal, n.key",
                None,
                &[heirs.clone().into(), ordinal.into()],
            )?
            .map(|row| {
                let of: i64 = required(row["ordinal"].value()?)?;
                Ok((stored_digest(row["content_hash"].value()?)?, of.cast_unsigned(), required(row["key"].value()?)?))
            })
            .collect()
    })?;
    Spi::run_with_args(
        "DELETE FROM dedup.before_images WHERE heir = ANY ($1) AND (heir = $2 OR ordinal = $2)",
        &[heirs.into(), ordinal.into()],
    )?;
    let taken = taken.into_iter().filter(|(_, of, _)| *of != step.ordinal).collect();
    segment::write_tombstones(step.target.id, taken)
}

fn is_heir(ordinal: u64) -> Result<bool> {
    required(Spi::get_one_with_args(
        "SELECT EXISTS (SELECT FROM dedup.before_images WHERE heir = $1)",
        &[ordinal.cast_signed().into()],
    )?)
}

/// Others may have found such rows unchanged, too: the last of them is the heir then.
fn pass_on(step: &Step) -> Result<()> {
    let mut sought: HashMap<[u8; 16], Awaited> = Spi::connect(|client| -> Result<_> {
        client
            .select(
                "SELECT ordinal, key, content_hash FROM dedup.before_images WHERE heir = $1",
                None,
                &[step.ordinal.cast_signed().into()],
            )?
            .map(|row| {
                let by = required::<i64>(row["ordinal"].value()?)?.cast_unsigned();
                let (key, content): (Vec<u8>, _) =
                    (required(row["key"].value()?)?, stored_digest(row["content_hash"].value()?)?);
                Ok((rested_on(&content, &key), Awaited { writer: step.ordinal, by, heir: 0, key, content }))
            })
            .collect()
    })?;
    Spi::connect(|client| -> Result<()> {
        let mut cursor = client.open_cursor(
            "SELECT u.ordinal, u.rows FROM dedup.unchanged_rows AS u JOIN dedup.ordinals AS o USING (ordinal) JOIN dedup.runs AS r USING (run_id) \
             WHERE o.target_id = $1 AND u.ordinal <> $2 AND r.status OPERATOR(pg_catalog.<>) ALL ('{rolled_back,rolling_back}') ORDER BY u.ordinal",
            &[step.target.id.into(), step.ordinal.cast_signed().into()],
        );
        loop {
            let some = cursor.fetch(64)?;
            if some.is_empty() {
                return Ok(());
            }
            for finish in some {
                let ordinal = required::<i64>(finish["ordinal"].value()?)?.cast_unsigned();
                let rows: Vec<u8> = required(finish["rows"].value()?)?;
                for row in rows.as_chunks::<16>().0 {
                    if let Some(awaited) = sought.get_mut(row).filter(|awaited| ordinal < awaited.by) {
                        awaited.heir = ordinal;
                    }
                }
            }
        }
    })?;
    let inherited = enter(sought.into_values().filter(|awaited| awaited.heir > 0).collect())?;
    let images: Vec<Moved> = inherited.iter().map(Awaited::image).collect();
    segment::write_tombstones(step.target.id, move_images(&images)?)
}

/// Of rows that came back those that somebody waited for get an entry of theirs.
///
/// # Errors
/// XX001 for damaged state, 42501 without the privileges of a worker.
pub fn hand_over(step: &Step, plan: &Plan<'_>) -> Result<()> {
    let found: Vec<(Vec<u8>, i64)> = Spi::connect(|client| -> Result<_> {
        client
            .select(
                "SELECT key, heir FROM dedup.before_images WHERE ordinal = $1 AND heir IS NOT NULL ORDER BY heir, key",
                None,
                &[step.ordinal.cast_signed().into()],
            )?
            .map(|row| Ok((required(row["key"].value()?)?, required(row["heir"].value()?)?)))
            .collect()
    })?;
    if found.is_empty() {
        return Ok(());
    }
    let back: HashSet<&[u8]> = plan.update.iter().chain(&plan.insert).copied().collect();
    for same in found.chunk_by(|a, b| a.1 == b.1) {
        let keys: Vec<&[u8]> =
            same.iter().map(|(key, _)| key.as_slice()).filter(|key| back.contains(key)).collect();
        enter_rows(step, same[0].1.cast_unsigned(), &keys)?;
    }
    Ok(())
}

/// Entries of the heir's chunk for the rows under these keys.
fn enter_rows(step: &Step, heir: u64, keys: &[&[u8]]) -> Result<()> {
    let mut rows = Vec::with_capacity(keys.len());
    let Target { id, table, layout, key_types } = &step.target;
    rows_under(Reading::Latest, *table, layout, key_types, keys, |_, row| {
        let mut key = Vec::new();
        row.write_key(&mut key)?;
        let digests = row.digests()?;
        rows.push((digests.content, digests.row.short(), key));
        Ok(())
    })?;
    if rows.is_empty() {
        return Ok(());
    }
    let ordinal = inherited_ordinal(heir, heir, rows.len() as i64)?;
    let images: Vec<Moved> = rows
        .iter()
        .map(|(content, _, key)| Moved { from: heir, to: ordinal, key: key.clone(), content: *content })
        .collect();
    segment::write_tombstones(*id, move_images(&images)?)?;
    let entries = rows.iter().map(|(content, row, key)| (*content, false, *row, key.as_slice()));
    undo::enter(*id, ordinal, entries.collect())
}
