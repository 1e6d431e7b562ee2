//! Indexing rows that stand in a table already, and dropping a table's entries.
//!
//! All of it takes the index's lock exclusively: no chunk is in flight on the target meanwhile.
use std::collections::HashMap;

use pg_dedup_record::block::{Entry, Stamp};
use pg_dedup_record::digest::Digest;
use pgrx::PgRelation;
use pgrx::pg_sys::panic::ErrorReport;
use pgrx::prelude::*;

use crate::chunk;
use crate::error::{Error, Result};
use crate::hash::rows;
use crate::index::Target;
use crate::keyset::{column_list, qualified_name};
use crate::lookup::{self, Place};
use crate::relation::{Access, Snapshot, Table};
use crate::segment::{self, SegmentWriter, next_number};
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
    lock_exclusively(&target)?;
    refuse_row_security(&target)?;
    // Entries of rows that are gone would make later records duplicates of nothing: only a reindex may say that the files are new.
    Spi::run_with_args("SELECT dedup.check_filenodes($1)", &[target.id.into()]).map_err(Error::from)?;
    Ok(index_rows(&target)?)
}

/// `dedup.reindex_target`: drops a target's entries and hashes its rows anew, whatever happened to them; returns the entries.
///
/// # Errors
/// As [`index_existing`].
#[pg_extern(volatile, parallel_unsafe, strict)]
fn reindex_target(target: PgRelation) -> Result<i64, ErrorReport> {
    let target = Target::of(target.oid())?;
    shmem::attached()?;
    lock_exclusively(&target)?;
    refuse_row_security(&target)?;
    // A halted run stays so until it is reconciled, which needs an index that describes the rows there are.
    refuse_open_runs(&target, &["running", "paused", "failed", "rolling_back"])?;
    drop_entries(target.id)?;
    Spi::run_with_args(
        "UPDATE dedup.targets SET filenodes = dedup.leaf_filenodes(target) WHERE target_id = $1",
        &[target.id.into()],
    )
    .map_err(Error::from)?;
    Ok(index_rows(&target)?)
}

/// `dedup.forget_target`: drops a target's entries; its rows stay. Returns the segments dropped.
///
/// # Errors
/// 42704 when the table has no index.
#[pg_extern(volatile, parallel_unsafe, strict)]
fn forget_target(target: PgRelation) -> Result<i64, ErrorReport> {
    let target = Target::of(target.oid())?;
    lock_exclusively(&target)?;
    refuse_open_runs(&target, &["running", "paused", "failed", "halted", "rolling_back"])?;
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

fn lock_exclusively(target: &Target) -> Result<()> {
    Ok(Spi::run_with_args(
        "SELECT pg_catalog.pg_advisory_xact_lock(dedup.lock_class(), $1)",
        &[target.id.into()],
    )?)
}

/// A row that is hidden from this role would be missing in the index, and its content be written once more.
fn refuse_row_security(target: &Target) -> Result<()> {
    if Spi::get_one_with_args::<bool>("SELECT pg_catalog.row_security_active($1)", &[target.table.into()])?
        != Some(true)
    {
        return Ok(());
    }
    Err(Error::new(
        PgSqlErrorCode::ERRCODE_INSUFFICIENT_PRIVILEGE,
        format!("row security is active on {}", qualified_name(target.table)),
    )
    .hint("use a role with BYPASSRLS or the owner: a hidden row cannot be indexed"))
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
    row_digest: [u8; 8],
    key: Vec<u8>,
}

fn index_rows(target: &Target) -> Result<i64> {
    /// Entries are sorted and written in batches of this many; memory about 100 bytes each.
    const BATCH: usize = 1_000_000;
    let query =
        format!("SELECT {} FROM {} AS t", column_list(&target.layout, "t"), qualified_name(target.table));
    let ordinal = next_number("ordinal_seq")?;
    Spi::run_with_args(
        "INSERT INTO dedup.ordinals (ordinal, target_id) VALUES ($1, $2)",
        &[ordinal.into(), target.id.into()],
    )?;
    // Rows of one scan have different keys: only what was indexed before can stand there already.
    let indexed_before = !segment::segments_of(target.id, &Snapshot::latest())?.is_empty();
    let mut batch: Vec<Indexed> = Vec::new();
    let mut added = 0;
    rows::scan(&query, &[], &target.layout, 0, |row| {
        let digests = row.digests()?;
        let mut key = Vec::new();
        row.write_key(&mut key)?;
        batch.push(Indexed { digest: digests.content, row_digest: digests.row.short(), key });
        if batch.len() == BATCH {
            added += write_batch(target, ordinal, indexed_before, &mut batch)?;
        }
        Ok(())
    })?;
    added += write_batch(target, ordinal, indexed_before, &mut batch)?;
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

/// Writes a batch as one segment, without what the index has already, and sets its filter bits before the commit.
fn write_batch(target: &Target, ordinal: i64, indexed_before: bool, batch: &mut Vec<Indexed>) -> Result<i64> {
    batch.sort_unstable_by(|a, b| (&a.digest, &a.key).cmp(&(&b.digest, &b.key)));
    let mut digests: Vec<[u8; 32]> = batch.iter().map(|e| *e.digest.as_bytes()).collect();
    digests.dedup();
    let wanted: Vec<u32> = if indexed_before { (0..digests.len() as u32).collect() } else { Vec::new() };
    let snapshot = Snapshot::latest();
    let known: HashMap<u32, Vec<Place>> =
        lookup::places(target.id, &digests, &wanted, &snapshot)?.into_iter().collect();
    let blocks = Table::open("segment_block", Access::Insert)?;
    let segments = Table::open("segment", Access::Insert)?;
    let mut writer = SegmentWriter::new(&blocks, target.id, 0)?;
    let mut added = 0;
    let mut group = 0u32;
    for entry in batch.iter() {
        while &digests[group as usize] != entry.digest.as_bytes() {
            group += 1;
        }
        let stands = known
            .get(&group)
            .is_some_and(|places| places.binary_search_by(|p| p.key.cmp(&entry.key)).is_ok());
        if !stands {
            let stamp = Stamp { ordinal: ordinal as u64, tombstone: false };
            writer.push(&Entry {
                digest: entry.digest,
                stamp,
                row_digest: entry.row_digest,
                key: &entry.key,
            })?;
            added += 1;
        }
    }
    filter::set_sorted(chunk::scope(target.id), digests.iter(), &mut Vec::new())?;
    writer.finish(&segments)?;
    batch.clear();
    Ok(added)
}
