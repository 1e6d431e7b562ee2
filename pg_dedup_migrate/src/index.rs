//! The hash index as SQL sees it: looking contents up, listing entries, figures, warming the filter.
use std::collections::{HashMap, HashSet};

use pg_dedup_record::block::BlockView;
use pg_dedup_record::layout::Layout;
use pgrx::pg_sys::panic::ErrorReport;
use pgrx::prelude::*;
use pgrx::{JsonB, PgRelation, Uuid, pg_sys};

use crate::chunk;
use crate::error::{Error, Result};
use crate::hash::layout::stored_layout;
use crate::keyset::{KeyTypes, qualified_name};
use crate::ledger;
use crate::lookup::{self, Place};
use crate::relation::{Access, Snapshot, Table};
use crate::segment::{self, BlockReader};
use crate::shmem::{self, claims, filter, warmth};
use crate::sql::required;

/// The targets of a run, by number.
///
/// # Errors
/// 42501 without SELECT on `dedup.run_tables`.
pub fn targets_of(run: Uuid) -> Result<Vec<i32>> {
    Spi::connect(|client| {
        client
            .select(
                "SELECT DISTINCT target_id FROM dedup.run_tables WHERE run_id = $1 ORDER BY 1",
                None,
                &[run.into()],
            )?
            .map(|row| required(row["target_id"].value()?))
            .collect()
    })
}

/// A row of `dedup.targets`.
pub struct Target {
    /// Its number.
    pub id: i32,
    /// The table.
    pub table: pg_sys::Oid,
    /// Columns and their roles.
    pub layout: Layout,
    /// How keys are read and printed.
    pub key_types: KeyTypes,
}

impl Target {
    /// The target that `condition` on `dedup.targets` picks.
    fn load(
        condition: &str,
        argument: pgrx::datum::DatumWithOid<'_>,
        missing: impl FnOnce() -> Error,
    ) -> Result<Self> {
        let (id, table, layout) = Spi::connect(|client| -> Result<_> {
            let rows = client.select(
                &format!("SELECT target_id, target::pg_catalog.oid AS target, layout FROM dedup.targets WHERE {condition}"),
                Some(1),
                &[argument],
            )?;
            let row = rows.into_iter().next().ok_or_else(missing)?;
            let layout: JsonB = required(row["layout"].value()?)?;
            Ok((required(row["target_id"].value()?)?, required(row["target"].value()?)?, layout))
        })?;
        let layout = stored_layout(layout)?;
        let key_types = KeyTypes::of(table, &layout)?;
        Ok(Self { id, table, layout, key_types })
    }

    /// The hash index of a table, for a caller who may read the table.
    ///
    /// # Errors
    /// 42704 when it has none, 42501 without SELECT on it.
    pub fn of(table: pg_sys::Oid) -> Result<Self> {
        may_read(table)?;
        Self::load("target OPERATOR(pg_catalog.=) $1::pg_catalog.oid", table.into(), || {
            Error::undefined(format!("{} has no hash index", qualified_name(table))).hint(
                "dedup.add_table gives a table one; SELECT target FROM dedup.targets lists those that have",
            )
        })
    }

    /// The target with this number.
    ///
    /// # Errors
    /// 42704 when there is none.
    pub fn by_id(id: i32) -> Result<Self> {
        Self::load("target_id OPERATOR(pg_catalog.=) $1", id.into(), || {
            Error::undefined(format!("there is no target {id}"))
        })
    }

    /// `postgres:///database/schema.table?key=value`
    fn location(&self, key: &[u8]) -> Result<String> {
        self.location_from(&self.base(), key)
    }

    /// The part that all of the target's locations share.
    fn base(&self) -> String {
        // SAFETY: look-ups by oid; strings are palloc'ed.
        let database = unsafe {
            std::ffi::CStr::from_ptr(pg_sys::get_database_name(pg_sys::MyDatabaseId))
                .to_string_lossy()
                .into_owned()
        };
        format!("postgres:///{database}/{}", qualified_name(self.table))
    }

    fn location_from(&self, base: &str, key: &[u8]) -> Result<String> {
        if self.layout.key.is_empty() {
            Ok(base.to_owned())
        } else {
            Ok(format!("{base}?{}", self.key_types.query_string(key)?))
        }
    }

    /// Where a digest stands now, newest first.
    fn places(&self, digest: &[u8; 32]) -> Result<Vec<Place>> {
        let places = lookup::places(self.id, &[*digest], &[0], &Snapshot::latest())?;
        let mut places = places.into_iter().next().map(|(_, p)| p).unwrap_or_default();
        places.sort_by_key(|p| std::cmp::Reverse(p.ordinal));
        Ok(places)
    }
}

/// Nobody learns a table's keys from its index who may not read the table.
///
/// # Errors
/// 42501.
pub fn may_read(table: pg_sys::Oid) -> Result<()> {
    // SAFETY: catalog look-ups inside a transaction.
    let granted = unsafe { pg_sys::pg_class_aclcheck(table, pg_sys::GetUserId(), pg_sys::ACL_SELECT) };
    if granted == pg_sys::AclResult::ACLCHECK_OK {
        return Ok(());
    }
    Err(Error::new(
        PgSqlErrorCode::ERRCODE_INSUFFICIENT_PRIVILEGE,
        format!("permission denied for table {}", qualified_name(table)),
    ))
}

fn one_digest(bytes: &[u8]) -> Result<[u8; 32]> {
    bytes.try_into().map_err(|_| {
        Error::invalid("a content hash has 32 bytes").detail(format!("{} were given.", bytes.len()))
    })
}

/// `dedup.locate`: where a content stands in a target, as a URI; NULL: nowhere.
///
/// # Errors
/// 42704 without a hash index, 42501 without SELECT on the target, 22023 for a hash that is not 32 bytes.
#[pg_extern(stable, parallel_unsafe, strict)]
fn locate(target: PgRelation, content_hash: &[u8]) -> Result<Option<String>, ErrorReport> {
    let target = Target::of(target.oid())?;
    let place = target.places(&one_digest(content_hash)?)?.into_iter().next();
    Ok(place.map(|p| target.location(&p.key)).transpose()?)
}

/// `dedup.maybe_seen`: the first pass alone. False: certainly not in the target; true: perhaps. A cold filter answers true.
///
/// # Errors
/// As [`locate`]; 55000 when the library is not preloaded.
#[pg_extern(volatile, parallel_unsafe, strict)]
fn maybe_seen(target: PgRelation, content_hash: &[u8]) -> Result<bool, ErrorReport> {
    let target = Target::of(target.oid())?;
    let digest = one_digest(content_hash)?;
    if !chunk::filter_is_warm()? {
        return Ok(true);
    }
    Ok(filter::contains(chunk::scope(target.id), &digest)?)
}

/// `dedup.provenance`: which run and chunk wrote a content; NULLs: it stood there before any run. No row: nowhere.
///
/// # Errors
/// As [`locate`].
#[pg_extern(stable, parallel_unsafe, strict)]
#[allow(clippy::type_complexity)] // the macro reads the columns from the type
fn provenance(
    target: PgRelation,
    content_hash: &[u8],
) -> Result<TableIterator<'static, (name!(run_id, Option<Uuid>), name!(chunk_id, Option<String>))>, ErrorReport>
{
    let target = Target::of(target.oid())?;
    let places = target.places(&one_digest(content_hash)?)?;
    let origins = places.iter().map(|place| origin(place.ordinal)).collect::<Result<Vec<_>>>()?;
    Ok(TableIterator::new(origins))
}

/// Which run and chunk an ordinal stands for.
fn origin(ordinal: u64) -> Result<(Option<Uuid>, Option<String>)> {
    Spi::connect(|client| {
        let rows = client.select(
            "SELECT run_id, chunk_id FROM dedup.ordinals WHERE ordinal = $1",
            Some(1),
            &[ordinal.cast_signed().into()],
        )?;
        match rows.into_iter().next() {
            Some(row) => Ok((row["run_id"].value()?, row["chunk_id"].value()?)),
            None => Ok((None, None)),
        }
    })
}

/// `dedup.indexed_target`: the number of a target's hash index, for a caller who may read the table.
///
/// # Errors
/// 42704 without a hash index, 42501 without SELECT on the target.
#[pg_extern(stable, parallel_unsafe, strict)]
fn indexed_target(target: PgRelation) -> Result<i32, ErrorReport> {
    Ok(Target::of(target.oid())?.id)
}

/// `dedup.segment_entries`: unpacks a block of a segment.
///
/// # Errors
/// XX001 for a damaged block, 42704 for an unknown target, 42501 without SELECT on it.
#[pg_extern(stable, parallel_unsafe, strict)]
#[allow(clippy::type_complexity)] // the macro reads the columns from the type
fn segment_entries(
    target_id: i32,
    entries: &[u8],
) -> Result<
    TableIterator<
        'static,
        (
            name!(content_hash, Vec<u8>),
            name!(ordinal, i64),
            name!(tombstone, bool),
            name!(target_location_uri, String),
        ),
    >,
    ErrorReport,
> {
    let target = Target::by_id(target_id)?;
    may_read(target.table)?;
    let view = BlockView::parse(entries)
        .map_err(|e| Error::corrupted("a segment's block is damaged").detail(e.to_string()))?;
    let base = target.base();
    let rows = (0..view.len())
        .map(|i| {
            let entry = view.entry(i);
            let uri = target.location_from(&base, entry.key)?;
            let ordinal = entry.stamp.ordinal.cast_signed();
            Ok((entry.digest.as_bytes().to_vec(), ordinal, entry.stamp.tombstone, uri))
        })
        .collect::<Result<Vec<_>>>()?;
    Ok(TableIterator::new(rows))
}

/// `dedup.filter_stats`: filter and claims in shared memory.
///
/// # Errors
/// 55000 when the library is not preloaded.
#[pg_extern(volatile, parallel_unsafe)]
#[allow(clippy::type_complexity)] // the macro reads the columns from the type
fn filter_stats() -> Result<
    TableIterator<
        'static,
        (
            name!(warm, bool),
            name!(filter_bytes, i64),
            name!(bits_set, i64),
            name!(fill, f64),
            name!(predicted_false_positive_rate, f64),
            name!(claim_slots, i64),
            name!(claims_held, i64),
        ),
    >,
    ErrorReport,
> {
    let warm = chunk::filter_is_warm()?;
    let filter = filter::stats()?;
    let claims = claims::stats()?;
    Ok(TableIterator::once((
        warm,
        filter.bytes as i64,
        filter.bits_set as i64,
        filter.fill,
        filter.predicted_fpr,
        claims.slots as i64,
        claims.used as i64,
    )))
}

/// Databases that the server has.
fn databases() -> Result<HashSet<u32>> {
    Spi::connect(|client| {
        client
            .select("SELECT oid FROM pg_catalog.pg_database", None, &[])?
            .map(|row| Ok(required::<pg_sys::Oid>(row["oid"].value()?)?.to_u32()))
            .collect()
    })
}

/// `dedup.warm_filter`: reads every segment into the filter, so that new contents need no look-up; returns the entries read, 0 when
/// it was warm.
///
/// # Errors
/// 55000 when the library is not preloaded or the server is in recovery.
#[pg_extern(volatile, parallel_unsafe)]
fn warm_filter() -> Result<i64, ErrorReport> {
    Ok(warm()?)
}

fn warm() -> Result<i64> {
    shmem::attached()?;
    let (database, segment) = chunk::warmth_key()?;
    if warmth::is_warm(database, segment) {
        return Ok(0);
    }
    // The snapshot is taken after the warm-up is announced: what commits later has set its own bits.
    let begun = match warmth::begin_warm_up(database, segment) {
        Some(generation) => Some(generation),
        None => {
            warmth::forget_dropped(&databases()?);
            warmth::begin_warm_up(database, segment)
        }
    };
    let generation = begun.ok_or_else(|| {
        Error::state("the filter cannot be warmed now")
            .detail("The server is in recovery, or shared memory keeps track of as many databases as it can.")
    })?;
    let snapshot = Snapshot::latest();
    let targets: Vec<i32> = Spi::connect(|client| -> Result<Vec<i32>> {
        client
            .select("SELECT target_id FROM dedup.targets", None, &[])?
            .map(|row| required(row["target_id"].value()?))
            .collect()
    })?;
    let blocks = Table::open("segment_block", Access::Read)?;
    let mut reader = BlockReader::new(&blocks, &snapshot)?;
    let mut entries = 0;
    let (mut digests, mut seen) = (Vec::new(), Vec::new());
    for target in targets {
        let scope = chunk::scope(target);
        for segment in segment::segments_of(target, &snapshot)? {
            reader.start(segment.id);
            while let Some(block) = reader.next()? {
                pgrx::check_for_interrupts!();
                digests.clear();
                digests.extend(block.digests().map(|digest| digest.0));
                seen.clear();
                filter::set_sorted(scope, digests.iter(), &mut seen)?;
                entries += block.len() as i64;
            }
        }
    }
    if !warmth::end_warm_up(generation) {
        return Err(Error::new(
            PgSqlErrorCode::ERRCODE_OBJECT_IN_USE,
            "entries came into the segments while the filter was read",
        )
        .hint("call dedup.warm_filter() again when the restore or the manual change has committed"));
    }
    Ok(entries)
}

/// Statement trigger on the segment tables: rows that do not come from this code are not in the filter.
///
/// # Errors
/// None: without shared memory there is no filter to mark.
#[pg_trigger]
fn mark_filter_cold<'a>(
    trigger: &'a pgrx::PgTrigger<'a>,
) -> Result<Option<PgHeapTuple<'a, impl WhoAllocated>>, ErrorReport> {
    let _ = trigger.name();
    let (database, segment) = chunk::warmth_key()?;
    warmth::mark_cold_until_end_of_transaction(database, segment)?;
    Ok(None::<PgHeapTuple<'a, pgrx::AllocatedByPostgres>>)
}

/// `dedup.key_text`: a packed key as `column=value&…`; NULL for an empty one.
///
/// # Errors
/// 42704 for an unknown target, XX001 for bytes that are no key of it.
#[pg_extern(stable, parallel_unsafe, strict)]
fn key_text(target_id: i32, key: &[u8]) -> Result<Option<String>, ErrorReport> {
    if key.is_empty() {
        return Ok(None);
    }
    Ok(Some(Target::by_id(target_id)?.key_types.query_string(key)?))
}

/// `dedup.ledger_entries`: unpacks the ledger of one ordinal: (content hash, source key, where the survivor stands).
///
/// # Errors
/// XX001 for a damaged block, 42704 for an unknown target.
#[pg_extern(stable, parallel_unsafe, strict)]
#[allow(clippy::type_complexity)] // the macro reads the columns from the type
fn ledger_entries(
    target_id: i32,
    entries: &[u8],
) -> Result<
    TableIterator<
        'static,
        (name!(content_hash, Vec<u8>), name!(source_key, Option<String>), name!(survivor, Option<String>)),
    >,
    ErrorReport,
> {
    let target = Target::by_id(target_id)?;
    let view = ledger::parse(entries)?;
    let mut digests: Vec<[u8; 32]> = view.digests().map(|digest| digest.0).collect();
    digests.dedup();
    let wanted: Vec<u32> = (0..digests.len() as u32).collect();
    let places: HashMap<u32, Vec<Place>> =
        lookup::places(target.id, &digests, &wanted, &Snapshot::latest())?.into_iter().collect();
    let mut rows = Vec::with_capacity(view.len());
    let mut group = 0u32;
    for i in 0..view.len() {
        let entry = view.entry(i);
        while &digests[group as usize] != entry.digest.as_bytes() {
            group += 1;
        }
        let survivor = places.get(&group).and_then(|p| p.iter().max_by_key(|p| p.ordinal));
        rows.push((
            entry.digest.as_bytes().to_vec(),
            (!target.layout.key.is_empty()).then(|| target.key_types.query_string(entry.key)).transpose()?,
            survivor.map(|p| target.location(&p.key)).transpose()?,
        ));
    }
    Ok(TableIterator::new(rows))
}
