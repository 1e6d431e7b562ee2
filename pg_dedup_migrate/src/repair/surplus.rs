//! Rows that are too many.
use std::collections::{HashMap, HashSet};

use pg_dedup_record::digest::Digest;
use pgrx::prelude::*;

use super::{Repair, is_indexed, listed};
use crate::by_key::{Reading, rows_under};
use crate::by_place;
use crate::chunk::OpenChunk;
use crate::error::{Error, Result};
use crate::lookup::{self, Subject};
use crate::matching::{Match, rested_on};
use crate::references;
use crate::relation::Snapshot;
use crate::sql::{self, required};
use crate::upsert;

/// Rows that are equal to their records and are to be claimed all the same: those of the run whose content an older row holds, too, and, where all that
/// stood in the table before was indexed, those that the index does not know. They are folded, or get their entry.
///
/// # Errors
/// XX001 for a damaged block.
pub fn twins<'k>(
    chunk: &OpenChunk,
    found: &[([u8; 32], u32)],
    matches: &[Match],
    key_of: &dyn Fn(u32) -> &'k [u8],
) -> Result<HashSet<u32>> {
    if chunk.repair.is_none() {
        return Ok(HashSet::new());
    }
    let mut digests: Vec<[u8; 32]> = found.iter().map(|(digest, _)| *digest).collect();
    digests.dedup();
    let wanted: Vec<u32> = (0..digests.len() as u32).collect();
    let places: HashMap<u32, Vec<lookup::Place>> =
        lookup::places(chunk.target_id, &digests, &wanted, &Snapshot::latest())?.into_iter().collect();
    let indexed = is_indexed(chunk.target_id)?;
    let own_ordinals = ordinals_of_run(chunk, places.values().flatten().map(|p| p.ordinal))?;
    // Each row that the run wrote with every older place of its content.
    let mut suspects: Vec<(u32, Subject)> = Vec::new();
    let mut twins = HashSet::new();
    for &(digest, n) in found.iter().filter(|(_, n)| matches[*n as usize] == Match::Unchanged) {
        let Ok(at) = digests.binary_search(&digest) else { continue };
        let places = places.get(&(at as u32)).map(Vec::as_slice).unwrap_or_default();
        let own = places.iter().find(|p| p.key == key_of(n)).map(|p| p.ordinal);
        if own.is_none() {
            twins.extend(indexed.then_some(n));
            continue;
        }
        let own = own.filter(|own| own_ordinals.contains(own));
        let older = places.iter().filter(|p| p.key != key_of(n) && own.is_some_and(|own| p.ordinal < own));
        suspects.extend(older.map(|p| (n, (digest, p.key.clone()))));
    }
    let keys: Vec<&[u8]> = suspects.iter().map(|(_, (_, key))| key.as_slice()).collect();
    rows_under(Reading::Latest, chunk.target, &chunk.layout, &chunk.key_types, &keys, |at, row| {
        let (n, (digest, _)) = &suspects[at];
        if row.digests()?.content.as_bytes() == digest {
            twins.insert(*n);
        }
        Ok(())
    })?;
    Ok(twins)
}

/// Of these ordinals those of the chunk's run.
fn ordinals_of_run(chunk: &OpenChunk, ordinals: impl Iterator<Item = u64>) -> Result<HashSet<u64>> {
    let ordinals: HashSet<i64> = ordinals.map(u64::cast_signed).collect();
    sql::ordinals(
        "SELECT ordinal FROM dedup.ordinals WHERE ordinal = ANY ($1) AND run_id = $2",
        &[ordinals.into_iter().collect::<Vec<_>>().into(), chunk.run.into()],
    )
}

/// Rows of the chunk that the source does not have, as long as they are what was found; locked. A record may have come back since.
///
/// # Errors
/// 55000 when a record of another source is one of them.
pub fn extra_rows(chunk: &OpenChunk) -> Result<Vec<Subject>> {
    let mut listed: Vec<(Digest, Vec<u8>)> = listed(chunk, "extra", true)?
        .into_iter()
        .filter_map(|(content, key)| key.map(|key| (content, key)))
        .filter(|(_, key)| !chunk.own_rows.contains(key))
        .collect();
    listed.sort_unstable();
    listed.dedup();
    refuse_rested_on(chunk, &listed)?;
    still_there(chunk, listed)
}

/// Records of other chunks, of whatever run, that were found to be these very rows would be lost with them.
fn refuse_rested_on(chunk: &OpenChunk, rows: &[(Digest, Vec<u8>)]) -> Result<()> {
    if rows.is_empty() {
        return Ok(());
    }
    let sought: HashSet<[u8; 16]> = rows.iter().map(|(content, key)| rested_on(content, key)).collect();
    Spi::connect(|client| {
        let mut cursor = client.open_cursor(
            "SELECT o.run_id, u.rows FROM dedup.unchanged_rows AS u JOIN dedup.ordinals AS o USING (ordinal) JOIN dedup.runs AS r ON r.run_id = o.run_id \
             WHERE u.target_id = $1 AND r.status <> 'rolled_back' AND NOT (o.run_id = $2 AND o.chunk_id = $3) \
                 AND NOT EXISTS (SELECT FROM dedup.run_tables AS a JOIN dedup.checkpoints AS c ON c.run_id = o.run_id AND c.chunk_id = o.chunk_id AND c.table_id = a.table_id, \
                     dedup.run_tables AS b JOIN dedup.checkpoints AS d ON d.run_id = $2 AND d.chunk_id = $3 AND d.table_id = b.table_id \
                     WHERE a.run_id = o.run_id AND b.run_id = $2 AND a.source = b.source)",
            &[chunk.target_id.into(), chunk.run.into(), chunk.chunk_id.as_str().into()],
        );
        loop {
            let found = cursor.fetch(16)?;
            if found.is_empty() {
                return Ok(());
            }
            for row in found {
                let packed: Vec<u8> = required(row["rows"].value()?)?;
                if packed.as_chunks::<16>().0.iter().any(|row| sought.contains(row)) {
                    let run: pgrx::Uuid = required(row["run_id"].value()?)?;
                    return Err(Error::state(format!(
                        "a record of run {run} is one of the rows to be deleted"
                    ))
                    .detail("It was found unchanged there.")
                    .hint("Repair without deleting extra rows, or roll that run back."));
                }
            }
        }
    })
}

/// Those of these rows that hold this content; locked.
fn still_there(chunk: &OpenChunk, listed: Vec<(Digest, Vec<u8>)>) -> Result<Vec<Subject>> {
    let keys: Vec<&[u8]> = listed.iter().map(|(_, key)| key.as_slice()).collect();
    let mut extra = Vec::new();
    rows_under(Reading::Locked, chunk.target, &chunk.layout, &chunk.key_types, &keys, |n, row| {
        let (content, key) = &listed[n];
        if row.digests()?.content == *content {
            extra.push((content.0, key.clone()));
        }
        Ok(())
    })?;
    Ok(extra)
}

/// Deletes rows that are too many, before images kept.
///
/// # Errors
/// 23503 when a foreign key points at one of them.
pub fn remove_extra(chunk: &mut OpenChunk) -> Result<()> {
    if !chunk.extra.is_empty() {
        let extra = chunk.extra.clone();
        let keys: Vec<&[u8]> = extra.iter().map(Vec::as_slice).collect();
        // Rows that point at one may be deleted by another chunk.
        references::refuse_pointed_at(chunk.target, &chunk.key_types, &keys).map_err(|error| {
            Error::new(PgSqlErrorCode::ERRCODE_LOCK_NOT_AVAILABLE, error.to_string())
                .hint("Repair the tables that reference it as well, or delete those rows.")
        })?;
        upsert::delete(chunk, &keys)?;
    }
    if chunk.repair == Some(Repair::DeleteExtra) && chunk.keyless() {
        remove_by_content(chunk)
    } else {
        Ok(())
    }
}

/// In a table without a key: one row of each content that was found too many.
fn remove_by_content(chunk: &mut OpenChunk) -> Result<()> {
    let extra: Vec<[u8; 32]> =
        listed(chunk, "extra", true)?.into_iter().map(|(content, _)| content.0).collect();
    if extra.is_empty() {
        return Ok(());
    }
    let mut left: HashSet<[u8; 32]> = extra.iter().copied().collect();
    let mut images: Vec<(Digest, Vec<u8>)> = Vec::new();
    let places = by_place::find(chunk.target, &chunk.layout, |row| {
        let content = row.digests()?.content;
        if !left.remove(content.as_bytes()) {
            return Ok(false);
        }
        let mut image = Vec::new();
        row.write_tuple(&mut image)?;
        images.push((content, image));
        Ok(true)
    })?;
    upsert::keep_keyless_images(chunk, images)?;
    by_place::delete(chunk.target, &places).map(drop)
}
