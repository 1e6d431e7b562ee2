//! Foreign keys that point at rows which are to be deleted.
use pg_dedup_record::block::Stamp;
use pgrx::prelude::*;

use super::dependents::{keys_with_images, owners, subject};
use super::{Part, Rollback};
use crate::chunk::required;
use crate::error::{Error, Result};
use crate::hash::rows;
use crate::index::Target;
use crate::keyset::{KeyTypes, column_list, qualified_name};
use crate::merge::Merge;
use crate::planning::ByIndex;
use crate::references::{self, Reference, Which};
use crate::relation::{Access, Snapshot, Table};
use crate::segment;

/// Keys looked at together.
const BATCH: usize = 20_000;
/// Rows named in a refusal.
const NAMED: usize = 5;

/// Refuses a rollback that would delete rows which other rows point at, unless those leave with it.
///
/// # Errors
/// 23503 naming constraints and keys.
pub fn refuse(rollback: &Rollback, parts: &[Part]) -> Result<()> {
    let mut complaints: Vec<String> = Vec::new();
    for part in parts.iter().filter(|part| !part.target.layout.key.is_empty()) {
        let references = references::of(part.target.table, Which::All)?;
        if references.is_empty() {
            continue;
        }
        let mut found: Vec<(usize, String)> = Vec::new();
        for_each_batch(rollback, part, |keys| {
            for (n, reference) in references.iter().enumerate() {
                for key in pointed_at(part, reference, parts, keys)? {
                    found.push((n, part.target.key_types.query_string(&key)?));
                }
            }
            Ok(())
        })?;
        for (n, reference) in references.iter().enumerate() {
            let keys: Vec<&str> =
                found.iter().filter(|(m, _)| *m == n).map(|(_, key)| key.as_str()).collect();
            if !keys.is_empty() {
                let more = if keys.len() > NAMED { ", …" } else { "" };
                complaints.push(format!(
                    "Rows of {} point at {} of {} through \"{}\": {}{more}.",
                    reference.referencing,
                    keys.len(),
                    qualified_name(part.target.table),
                    reference.constraint,
                    keys[..keys.len().min(NAMED)].join(", ")
                ));
            }
        }
    }
    if complaints.is_empty() {
        return Ok(());
    }
    Err(Error::new(
        PgSqlErrorCode::ERRCODE_FOREIGN_KEY_VIOLATION,
        format!("foreign keys point at rows that {} wrote", rollback.name()),
    )
    .detail(complaints.join(" "))
    .hint("Delete those rows, or have them point elsewhere, then roll back."))
}

/// Calls `visit` with the keys of rows that were inserted by what is taken back.
fn for_each_batch(
    rollback: &Rollback,
    part: &Part,
    mut visit: impl FnMut(&[Vec<u8>]) -> Result<()>,
) -> Result<()> {
    let snapshot = Snapshot::latest();
    let blocks = Table::open("segment_block", Access::Read)?;
    let mut segments = segment::segments_of(part.target.id, &snapshot)?;
    segments.retain(|s| {
        part.ordinals.range(s.first_ordinal.cast_unsigned()..=s.last_ordinal.cast_unsigned()).next().is_some()
    });
    // A row with a before image stood there before.
    let images = keys_with_images(rollback, part)?;
    let mut batch: Vec<Vec<u8>> = Vec::with_capacity(BATCH);
    Merge::new(&blocks, &segments, &snapshot)?.for_each(|entry| {
        let Stamp { ordinal, tombstone } = entry.stamp;
        if part.has(ordinal) && !tombstone && !images.contains(&subject(ordinal, entry.key)) {
            batch.push(entry.key.to_vec());
            if batch.len() == BATCH {
                visit(&batch)?;
                batch.clear();
            }
        }
        Ok(())
    })?;
    visit(&batch)
}

/// Those of the keys whose rows are pointed at by rows that stay as they are.
fn pointed_at(part: &Part, reference: &Reference, parts: &[Part], keys: &[Vec<u8>]) -> Result<Vec<Vec<u8>>> {
    let keys: Vec<&[u8]> = keys.iter().map(Vec::as_slice).collect();
    if keys.is_empty() {
        return Ok(Vec::new());
    }
    let _plan = ByIndex::new();
    let Target { table, key_types, .. } = &part.target;
    let arguments = key_types.arrays(&keys)?;
    let from = format!(
        "{} JOIN {} AS t ON {} JOIN {} AS r ON {}",
        key_types.unnest(),
        qualified_name(*table),
        key_types.join_condition(),
        reference.referencing,
        reference.matches
    );
    let Some(other) = parts.iter().find(|other| other.target.table == reference.table) else {
        return Spi::connect(|client| {
            client
                .select(&format!("SELECT DISTINCT k.n FROM {from} ORDER BY k.n"), None, &arguments)?
                .map(|row| Ok(keys[required::<i64>(row["n"].value()?)? as usize - 1].to_vec()))
                .collect()
        });
    };
    // The referencing table is a target, too: its rows may leave as well.
    let mut rows: Vec<([u8; 32], Vec<u8>)> = Vec::new();
    let mut at: Vec<usize> = Vec::new();
    let query = format!("SELECT {}, k.n FROM {from}", column_list(&other.target.layout, "r"));
    rows::scan(&query, &arguments, &other.target.layout, 1, |row| {
        let mut key = Vec::new();
        row.write_key(&mut key)?;
        rows.push((*row.digests()?.content.as_bytes(), key));
        at.push(required(row.trailing::<i64>(0)?)? as usize - 1);
        Ok(())
    })?;
    let owners = owners(other.target.id, &rows)?;
    let mut found: Vec<usize> = at
        .into_iter()
        .zip(owners)
        .filter(|(_, owner)| !owner.is_some_and(|owner| other.has(owner)))
        .map(|(n, _)| n)
        .collect();
    found.sort_unstable();
    found.dedup();
    Ok(found.into_iter().map(|n| keys[n].to_vec()).collect())
}

/// Refuses to delete rows that other rows point at, as things are now; the rows are locked, so that none comes to.
///
/// # Errors
/// 23503 naming constraint and table.
pub fn refuse_now(target: &Target, key_types: &KeyTypes, keys: &[&[u8]]) -> Result<()> {
    let arguments = key_types.arrays(keys)?;
    let (unnest, condition) = (key_types.unnest(), key_types.join_condition());
    let name = qualified_name(target.table);
    let _plan = ByIndex::new();
    for reference in references::of(target.table, Which::All)? {
        // Rows of the table itself that go along may point at each other.
        let itself = if reference.table == target.table {
            format!(" AND NOT EXISTS (SELECT FROM {unnest} WHERE {})", key_types.join_condition_of("r"))
        } else {
            String::new()
        };
        let query = format!(
            "SELECT EXISTS (SELECT FROM {unnest} JOIN {name} AS t ON {condition} JOIN {} AS r ON {}{itself})",
            reference.referencing, reference.matches
        );
        if required(Spi::get_one_with_args::<bool>(&query, &arguments)?)? {
            return Err(reference.violated(&name));
        }
    }
    Ok(())
}
