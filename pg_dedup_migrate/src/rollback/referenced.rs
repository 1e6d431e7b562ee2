//! Foreign keys that point at rows which are to be deleted.
use pg_dedup_record::digest::Digest;
use pg_dedup_record::layout::Layout;
use pgrx::JsonB;
use pgrx::prelude::*;

use super::heirs::{HandedOver, keys_with_images, subject};
use super::layout::is_handed_over;
use super::{Part, Rollback};
use crate::error::{Error, Result};
use crate::hash::layout::stored_layout;
use crate::hash::rows;
use crate::index::Target;
use crate::indexing::refuse_row_security;
use crate::keyset::{column_list, qualified_name};
use crate::lookup::{self, Place};
use crate::merge::Merge;
use crate::planning::ByIndex;
use crate::references::{self, Reference, Which};
use crate::relation::{Access, Snapshot, Table};
use crate::segment;
use crate::sql::required;

/// Keys looked at together.
const BATCH: usize = 20_000;
/// Rows named in a refusal.
const NAMED: usize = 5;

/// Refuses a rollback that would delete rows which other rows point at, unless those leave with it.
///
/// # Errors
/// 23503 naming constraints and keys.
pub fn refuse(rollback: &Rollback, parts: &[Part], handed_over: &[HandedOver]) -> Result<()> {
    let mut complaints: Vec<String> = Vec::new();
    for (part, handed_over) in parts.iter().zip(handed_over) {
        let references = references::of(part.target.table, Which::All)?;
        // What is hidden would be changed along: the server follows foreign keys past row security.
        for reference in &references {
            refuse_row_security(reference.table, "could be lost with the row it points at")?;
        }
        if references.is_empty() || part.target.layout.key.is_empty() {
            continue;
        }
        let mut found: Vec<(usize, String)> = Vec::new();
        for_each_batch(rollback, part, handed_over, |keys| {
            for (n, reference) in references.iter().enumerate() {
                for key in pointed_at(rollback, part, reference, parts, keys)? {
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
    handed_over: &HandedOver,
    mut visit: impl FnMut(&[Vec<u8>]) -> Result<()>,
) -> Result<()> {
    let snapshot = Snapshot::latest();
    let blocks = Table::open("segment_block", Access::Read)?;
    let mut segments = segment::segments_of(part.target.id, &snapshot)?;
    segments
        .retain(|s| part.overlaps(s) || handed_over.ordinals.contains_key(&s.last_ordinal.cast_unsigned()));
    // A row with a before image stood there before.
    let images = keys_with_images(rollback, part)?;
    let mut batch: Vec<Vec<u8>> = Vec::with_capacity(BATCH);
    Merge::new(&blocks, &segments, &snapshot)?.for_each_content(|_, said, _| {
        for place in said.iter().filter(|p| part.has(p.ordinal) && !p.tombstone) {
            if images.contains(&subject(place.ordinal, &place.key))
                || is_handed_over(place, said, handed_over)
            {
                continue;
            }
            batch.push(place.key.clone());
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
fn pointed_at(
    rollback: &Rollback,
    part: &Part,
    reference: &Reference,
    parts: &[Part],
    keys: &[Vec<u8>],
) -> Result<Vec<Vec<u8>>> {
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
    let root = Spi::get_one_with_args::<pgrx::pg_sys::Oid>(
        "SELECT coalesce(pg_catalog.pg_partition_root($1)::pg_catalog.oid, $1)",
        &[reference.table.into()],
    )?;
    let other = parts.iter().find(|o| o.target.table == reference.table || Some(o.target.table) == root);
    let Some(other) = other else {
        return Spi::connect(|client| {
            client
                .select(&format!("SELECT DISTINCT k.n FROM {from} ORDER BY k.n"), None, &arguments)?
                .map(|row| Ok(keys[required::<i64>(row["n"].value()?)? as usize - 1].to_vec()))
                .collect()
        });
    };
    // The referencing table is a target, too: its rows may leave as well, if they are what was written.
    let layout = delivered(rollback, other)?;
    let mut rows: Vec<(Digest, Vec<u8>)> = Vec::new();
    let mut at: Vec<(usize, [u8; Digest::SHORT_LEN])> = Vec::new();
    let query = format!("SELECT {}, k.n FROM {from}", column_list(&layout, "r"));
    rows::scan(&query, &arguments, &layout, 1, |row| {
        let mut key = Vec::new();
        row.write_key(&mut key)?;
        let digests = row.digests()?;
        rows.push((digests.content, key));
        at.push((required(row.trailing::<i64>(0)?)? as usize - 1, digests.row.short()));
        Ok(())
    })?;
    let owners = lookup::owners(other.target.id, &rows)?;
    let leaves = |place: Option<Place>, row: [u8; Digest::SHORT_LEN]| {
        place.is_some_and(|p| other.has(p.ordinal) && (rollback.forced || p.row_digest == row))
    };
    let mut found: Vec<usize> = at
        .into_iter()
        .zip(owners)
        .filter(|((_, row), place)| !leaves(place.clone(), *row))
        .map(|((n, _), _)| n)
        .collect();
    found.sort_unstable();
    found.dedup();
    Ok(found.into_iter().map(|n| keys[n].to_vec()).collect())
}

/// The columns that the run delivered to a target; its sources mostly deliver the same.
fn delivered(rollback: &Rollback, part: &Part) -> Result<Layout> {
    let layout = Spi::get_one_with_args::<JsonB>(
        "SELECT layout FROM dedup.run_tables WHERE run_id = $1 AND target_id = $2 ORDER BY table_id LIMIT 1",
        &[rollback.run.into(), part.target.id.into()],
    )?;
    stored_layout(required(layout)?)
}
