//! Indexing rows that stand in a table already, and dropping a table's entries.
//!
//! All of it takes the index's lock exclusively: no chunk is in flight on the target meanwhile.
use pg_dedup_record::block::{Entry, Stamp};
use pg_dedup_record::digest::Digest;
use pgrx::pg_sys::panic::ErrorReport;
use pgrx::prelude::*;
use pgrx::{PgRelation, pg_sys};

use crate::chunk;
use crate::error::{Error, Result};
use crate::hash::rows;
use crate::index::Target;
use crate::keyset::{every_row, qualified_name};
use crate::lookup::{self, Place};
use crate::merge::Merge;
use crate::relation::{Access, Snapshot, Table};
use crate::segment::{self, BlockReader, Segment, SegmentWriter};
use crate::shmem::{self, filter};

/// `dedup.index_existing`: hashes the rows that stand in a target into its index; returns the entries added. Rows that are indexed already
/// are left alone.
///
/// # Errors
/// 42704 when the table is no target yet, 55000 when the library is not preloaded, 42501 where row security hides rows.
#[pg_extern(volatile, parallel_unsafe, strict)]
fn index_existing(target: PgRelation) -> Result<i64, ErrorReport> {
    let target = Target::of(target.oid())?;
    shmem::attached()?;
    lock_exclusively(target.id)?;
    refuse_row_security(target.table, "cannot be indexed")?;
    // Entries of rows that are gone would make later records duplicates of nothing: only a reindex may say that the files are new.
    Spi::run_with_args("SELECT dedup.check_filenodes($1)", &[target.id.into()]).map_err(Error::from)?;
    // Rows of one scan have different keys: only what was indexed before can stand there already.
    let indexed_before = !segment::segments_of(target.id, &Snapshot::latest())?.is_empty();
    Ok(index_rows(&target, if indexed_before { Before::Kept } else { Before::Nothing })?)
}

/// `dedup.reindex_target`: drops a target's entries and hashes its rows anew, whatever happened to them; returns the entries. Rows that the old
/// entries describe stay those of the run that wrote them.
///
/// # Errors
/// As [`index_existing`].
#[pg_extern(volatile, parallel_unsafe, strict)]
fn reindex_target(target: PgRelation) -> Result<i64, ErrorReport> {
    let target = Target::of(target.oid())?;
    shmem::attached()?;
    lock_exclusively(target.id)?;
    refuse_row_security(target.table, "cannot be indexed")?;
    // A halted run stays so until it is reconciled, which needs an index that describes the rows there are.
    refuse_open_runs(&target, &["running", "paused", "failed", "rolling_back"])?;
    Spi::run_with_args(
        "UPDATE dedup.targets SET filenodes = dedup.leaf_filenodes(target) WHERE target_id = $1",
        &[target.id.into()],
    )
    .map_err(Error::from)?;
    let old: Vec<Segment> = segment::segments_of(target.id, &Snapshot::latest())?;
    let before = if old.is_empty() {
        Before::Nothing
    } else if is_readable(&old)? {
        Before::Renewed
    } else {
        pgrx::warning!("the old entries are damaged: which run wrote which row is not known any more");
        end_bake_in(target.id)?;
        segment::delete(&old)?;
        Before::Nothing
    };
    let entries = index_rows(&target, before)?;
    if before == Before::Renewed {
        keep_history(&target, &old)?;
        segment::delete(&old)?;
    }
    Ok(entries)
}

/// Entries that are no longer the last word about their content and key, and tombstones: a rollback goes back to what was before them.
fn keep_history(target: &Target, old: &[Segment]) -> Result<()> {
    let snapshot = Snapshot::latest();
    let read = Table::open("segment_block", Access::Read)?;
    let blocks = Table::open("segment_block", Access::Insert)?;
    let segments = Table::open("segment", Access::Insert)?;
    let mut writer = SegmentWriter::new(&blocks, target.id, 0)?;
    Merge::new(&read, old, &snapshot)?.for_each_content(|digest, said, standing| {
        if said.len() == standing.len() {
            return Ok(());
        }
        let stands =
            |place: &Place| standing.iter().any(|s| s.key == place.key && s.ordinal == place.ordinal);
        for place in said.iter().filter(|place| place.tombstone || !stands(place)) {
            let stamp = Stamp { ordinal: place.ordinal, tombstone: place.tombstone };
            writer.push(&Entry { digest: *digest, stamp, row_digest: place.row_digest, key: &place.key })?;
        }
        Ok(())
    })?;
    writer.finish(&segments)?;
    Ok(())
}

/// Nobody knows any more which rows the runs on a target wrote: they cannot be rolled back.
fn end_bake_in(target: i32) -> Result<()> {
    Ok(Spi::run_with_args(
        "UPDATE dedup.runs AS r SET bake_in_until = pg_catalog.clock_timestamp() FROM dedup.run_tables AS t \
         WHERE t.run_id = r.run_id AND t.target_id = $1 AND r.status NOT IN ('created', 'rolled_back')",
        &[target.into()],
    )?)
}

/// What becomes of rows that have an entry already.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Before {
    /// None has.
    Nothing,
    /// They are left alone.
    Kept,
    /// They get another one under the same ordinal: the old ones go.
    Renewed,
}

/// Can all of these be read?
fn is_readable(segments: &[Segment]) -> Result<bool> {
    let snapshot = Snapshot::latest();
    let blocks = Table::open("segment_block", Access::Read)?;
    let mut reader = BlockReader::new(&blocks, &snapshot)?;
    for segment in segments {
        match segment::for_each_entry(&mut reader, segment.id, |_| Ok(())) {
            Err(error) if error.code() == PgSqlErrorCode::ERRCODE_DATA_CORRUPTED => return Ok(false),
            read => read?,
        }
    }
    Ok(true)
}

/// `dedup.forget_target`: drops a target's entries; its rows stay. Returns the segments dropped.
///
/// # Errors
/// 42704 when the table has no index.
#[pg_extern(volatile, parallel_unsafe, strict)]
fn forget_target(target: PgRelation) -> Result<i64, ErrorReport> {
    let target = Target::of(target.oid())?;
    lock_exclusively(target.id)?;
    refuse_open_runs(&target, &["running", "paused", "failed", "halted", "rolling_back"])?;
    end_bake_in(target.id)?;
    let segments = drop_entries(target.id)?;
    Spi::run_with_args(
        "UPDATE dedup.targets SET filenodes = dedup.leaf_filenodes(target), indexed_at = NULL WHERE target_id = $1",
        &[target.id.into()],
    )
    .map_err(Error::from)?;
    Spi::run_with_args(
        "SELECT dedup.log_event(NULL, NULL, 'target_forgotten', pg_catalog.jsonb_build_object('target', $1::pg_catalog.text))",
        &[qualified_name(target.table).into()],
    )
    .map_err(Error::from)?;
    Ok(segments)
}

/// The exclusive lock on a target's hash index, until the transaction ends: no chunk is in flight on it.
///
/// # Errors
/// SPI's own.
pub fn lock_exclusively(target: i32) -> Result<()> {
    Ok(Spi::run_with_args(
        "SELECT pg_catalog.pg_advisory_xact_lock(dedup.lock_class(), $1)",
        &[target.into()],
    )?)
}

/// A row that is hidden from this role would be missing; `so` says what that would lead to.
///
/// # Errors
/// 42501 where row security applies to the role.
pub fn refuse_row_security(table: pg_sys::Oid, so: &str) -> Result<()> {
    if Spi::get_one_with_args::<bool>("SELECT pg_catalog.row_security_active($1)", &[table.into()])?
        != Some(true)
    {
        return Ok(());
    }
    Err(Error::new(
        PgSqlErrorCode::ERRCODE_INSUFFICIENT_PRIVILEGE,
        format!("row security is active on {}", qualified_name(table)),
    )
    .hint(format!("use a role with BYPASSRLS or the owner: a hidden row {so}")))
}

/// A run that is open counts on its entries: without them it would write its own records again, or never miss what is gone.
fn refuse_open_runs(target: &Target, statuses: &[&str]) -> Result<()> {
    let open = Spi::get_one_with_args::<String>(
        "SELECT pg_catalog.min(r.run_id::pg_catalog.text) FROM dedup.run_tables AS t JOIN dedup.runs AS r USING (run_id) \
         WHERE t.target_id = $1 AND r.status OPERATOR(pg_catalog.=) ANY ($2)",
        &[target.id.into(), statuses.iter().map(|&status| status.to_owned()).collect::<Vec<_>>().into()],
    )?;
    let Some(run) = open else { return Ok(()) };
    Err(Error::new(
        PgSqlErrorCode::ERRCODE_OBJECT_IN_USE,
        format!("run {run} on {} is still open", qualified_name(target.table)),
    )
    .hint(format!("finish it, or give it up: SELECT dedup.cancel_run('{run}')")))
}

fn drop_entries(target_id: i32) -> Result<i64> {
    Spi::run_with_args(
        "DELETE FROM dedup.segment_block WHERE segment_id IN (SELECT segment_id FROM dedup.segment WHERE target_id = $1)",
        &[target_id.into()],
    )?;
    Spi::connect_mut(|client| {
        Ok(client.update("DELETE FROM dedup.segment WHERE target_id = $1", None, &[target_id.into()])?.len()
            as i64)
    })
}

/// One entry of a batch being indexed.
struct Indexed {
    digest: Digest,
    ordinal: i64,
    row_digest: [u8; 8],
    key: Vec<u8>,
    /// It has an entry already.
    stands: bool,
}

fn index_rows(target: &Target, before: Before) -> Result<i64> {
    /// Entries are sorted and written in batches of this many; memory about 100 bytes each.
    const BATCH: usize = 1_000_000;
    let query = every_row(&target.layout, target.table);
    let ordinal = segment::nobodys_ordinal(target.id)?;
    let mut batch: Vec<Indexed> = Vec::new();
    let mut added = 0;
    rows::scan(&query, &[], &target.layout, 0, |row| {
        let digests = row.digests()?;
        let mut key = Vec::new();
        row.write_key(&mut key)?;
        batch.push(Indexed {
            digest: digests.content,
            ordinal,
            row_digest: digests.row.short(),
            key,
            stands: false,
        });
        if batch.len() == BATCH {
            added += write_batch(target, before, &mut batch)?;
        }
        Ok(())
    })?;
    added += write_batch(target, before, &mut batch)?;
    Spi::run_with_args(
        "UPDATE dedup.targets SET indexed_at = pg_catalog.clock_timestamp(), filenodes = dedup.leaf_filenodes(target) WHERE target_id = $1",
        &[target.id.into()],
    )?;
    Spi::run_with_args(
        "SELECT dedup.log_event(NULL, NULL, 'target_indexed', \
         pg_catalog.jsonb_build_object('target', $1::pg_catalog.text, 'entries', $2::pg_catalog.int8))",
        &[qualified_name(target.table).into(), added.into()],
    )?;
    Ok(added)
}

/// Writes a batch as one segment and sets its filter bits before the commit.
fn write_batch(target: &Target, before: Before, batch: &mut Vec<Indexed>) -> Result<i64> {
    batch.sort_unstable_by(|a, b| (&a.digest, &a.key).cmp(&(&b.digest, &b.key)));
    let mut digests: Vec<[u8; 32]> = batch.iter().map(|e| *e.digest.as_bytes()).collect();
    digests.dedup();
    let wanted: Vec<u32> =
        if before == Before::Nothing { Vec::new() } else { (0..digests.len() as u32).collect() };
    let known = lookup::places(target.id, &digests, &wanted, &Snapshot::latest())?;
    for (group, places) in known {
        let digest = &digests[group as usize];
        let from = batch.partition_point(|e| e.digest.as_bytes() < digest);
        for entry in batch[from..].iter_mut().take_while(|e| e.digest.as_bytes() == digest) {
            if let Ok(at) = places.binary_search_by(|p| p.key.cmp(&entry.key)) {
                entry.ordinal = places[at].ordinal.cast_signed();
                entry.stands = true;
            }
        }
    }
    if before == Before::Kept {
        batch.retain(|entry| !entry.stands);
    } else {
        batch.sort_unstable_by(|a, b| (&a.digest, a.ordinal, &a.key).cmp(&(&b.digest, b.ordinal, &b.key)));
    }
    let blocks = Table::open("segment_block", Access::Insert)?;
    let segments = Table::open("segment", Access::Insert)?;
    let mut writer = SegmentWriter::new(&blocks, target.id, 0)?;
    for entry in batch.iter() {
        let stamp = Stamp { ordinal: entry.ordinal.cast_unsigned(), tombstone: false };
        writer.push(&Entry { digest: entry.digest, stamp, row_digest: entry.row_digest, key: &entry.key })?;
    }
    filter::set_sorted(chunk::scope(target.id), digests.iter(), &mut Vec::new())?;
    writer.finish(&segments)?;
    let added = batch.len() as i64;
    batch.clear();
    Ok(added)
}
