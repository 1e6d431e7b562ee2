//! A table without a key: every row that the run wrote is found by one scan, by its content.
use std::collections::HashMap;

use pg_dedup_record::digest::Digest;
use pgrx::pg_sys;
use pgrx::prelude::*;

use super::look::{Alone, Reason};
use super::undo::{Step, forget_lists, report};
use super::{Undone, ordinals_left};
use crate::chunk::required;
use crate::error::{Error, Result};
use crate::hash::rows;
use crate::keyset::{column_list, qualified_name};
use crate::passes::Passes;
use crate::references::{self, Which};
use crate::relation::{Access, Snapshot, Table};
use crate::segment::{self, BlockReader};
use crate::upsert::execute;

/// Rows deleted by one statement.
const BATCH: usize = 50_000;

/// A row of the target: its table and its place there.
type Place = (pg_sys::Oid, String);

/// Takes back all that leaves the target.
///
/// # Errors
/// 23503 when a foreign key points at one of the rows, XX001 for damaged state.
pub fn undo(step: &Step) -> Result<Undone> {
    let leaving = ordinals_left(step)?;
    let snapshot = Snapshot::latest();
    let mut segments = segment::segments_of(step.target.id, &snapshot)?;
    segments
        .retain(|s| s.first_ordinal == s.last_ordinal && leaving.contains(&s.last_ordinal.cast_unsigned()));
    let blocks = Table::open("segment_block", Access::Read)?;
    let mut reader = BlockReader::new(&blocks, &snapshot)?;
    let entries: usize = segments.iter().map(|s| s.blocks as usize * 200).sum();
    let mut undone = Undone::default();
    let mut alone: Vec<Alone> = Vec::new();
    for pass in Passes::of(entries, 96).each() {
        // How often each row, by content and beginning of its digest, was written.
        let mut written: HashMap<([u8; 32], [u8; 8]), u32> = HashMap::new();
        for segment in &segments {
            segment::for_each_entry(&mut reader, segment.id, |entry| {
                if !entry.stamp.tombstone && pass.has(entry.digest.as_bytes()) {
                    *written.entry((*entry.digest.as_bytes(), entry.row_digest)).or_default() += 1;
                }
                Ok(())
            })?;
        }
        let rows = find(step, &mut written)?;
        for some in rows.chunks(BATCH) {
            undone.deleted += delete(step, some)?;
        }
        for ((content, _), count) in written {
            alone.extend((0..count).map(|_| Alone {
                key: Vec::new(),
                image: Vec::new(),
                written: Some(Digest(content)),
                stands: None,
                reason: Reason::Gone,
            }));
        }
    }
    segment::delete(&segments)?;
    for ordinal in leaving {
        forget_lists(ordinal.cast_signed())?;
    }
    report(step, &alone)?;
    undone.left_alone = alone.len() as i64;
    Ok(undone)
}

/// Where rows of these contents lie, of each as many as were written; what is found is counted down.
fn find(step: &Step, written: &mut HashMap<([u8; 32], [u8; 8]), u32>) -> Result<Vec<Place>> {
    let mut places = Vec::new();
    if written.is_empty() {
        return Ok(places);
    }
    let query = format!(
        "SELECT {}, t.tableoid, t.ctid::pg_catalog.text FROM {} AS t",
        column_list(&step.target.layout, "t"),
        qualified_name(step.target.table)
    );
    rows::scan(&query, &[], &step.target.layout, 2, |row| {
        let digests = row.digests()?;
        let subject = (*digests.content.as_bytes(), digests.row.short());
        if let Some(left) = written.get_mut(&subject) {
            places.push((required(row.trailing(0)?)?, required(row.trailing(1)?)?));
            *left -= 1;
            if *left == 0 {
                written.remove(&subject);
            }
        }
        Ok(())
    })?;
    places.sort_unstable_by(|a, b| (a.0.to_u32(), &a.1).cmp(&(b.0.to_u32(), &b.1)));
    Ok(places)
}

fn delete(step: &Step, rows: &[Place]) -> Result<i64> {
    let name = qualified_name(step.target.table);
    let references = references::of(step.target.table, Which::All)?;
    let mut deleted = 0;
    for of_table in rows.chunk_by(|a, b| a.0 == b.0) {
        let places: Vec<String> = of_table.iter().map(|(_, place)| place.clone()).collect();
        let leaf = qualified_name(of_table[0].0);
        for reference in &references {
            let query = format!(
                "SELECT EXISTS (SELECT FROM {leaf} AS t JOIN {} AS r ON {} WHERE t.ctid = ANY ($1::pg_catalog.tid[]))",
                reference.referencing, reference.matches
            );
            if required(Spi::get_one_with_args::<bool>(&query, &[places.clone().into()])?)? {
                return Err(Error::new(
                    PgSqlErrorCode::ERRCODE_FOREIGN_KEY_VIOLATION,
                    format!(
                        "rows of {} point at rows of {name} through foreign key constraint \"{}\"",
                        reference.referencing, reference.constraint
                    ),
                ));
            }
        }
        let count = execute(
            &format!("DELETE FROM ONLY {leaf} AS t WHERE t.ctid = ANY ($1::pg_catalog.tid[])"),
            &[places.into()],
        )?;
        if count != of_table.len() as i64 {
            return Err(Error::new(
                PgSqlErrorCode::ERRCODE_T_R_SERIALIZATION_FAILURE,
                format!("rows of {name} changed while they were deleted"),
            ));
        }
        deleted += count;
    }
    Ok(deleted)
}
