//! dedup's own tables, opened, scanned and written natively.
//!
//! The safe face of heap and index access: nothing else in the crate touches relations. Privileges are checked
//! here, because native access bypasses the executor's checks. Locks are kept to the end of the transaction.
use std::ffi::CString;

use pgrx::{PgSqlErrorCode, pg_sys};

use crate::error::{Error, Result};

/// Schema of everything this extension owns.
pub const SCHEMA: &str = "dedup";

/// What the caller is going to do, which decides lock and privilege.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Read rows.
    Read,
    /// Add rows.
    Insert,
}

/// Oid of the table or index `name` in schema `dedup`.
///
/// # Errors
/// 42P01 when it is not there.
pub fn own_oid(name: &str) -> Result<pg_sys::Oid> {
    let missing = || {
        Error::new(PgSqlErrorCode::ERRCODE_UNDEFINED_TABLE, format!("relation dedup.{name} does not exist"))
            .hint("CREATE EXTENSION pg_dedup_migrate")
    };
    let schema = CString::new(SCHEMA).map_err(|_| missing())?;
    let relation = CString::new(name).map_err(|_| missing())?;
    // SAFETY: both are NUL-terminated strings that live through the calls; syscache look-ups in a transaction.
    let oid = unsafe {
        let namespace = pg_sys::get_namespace_oid(schema.as_ptr(), true);
        pg_sys::get_relname_relid(relation.as_ptr(), namespace)
    };
    if oid == pg_sys::InvalidOid { Err(missing()) } else { Ok(oid) }
}

/// An open table of schema `dedup`.
pub struct Table {
    rel: pg_sys::Relation,
}

impl Table {
    /// Opens `dedup.name`, checking the current user's privilege.
    ///
    /// # Errors
    /// 42P01 when it is not there, 42501 without the privilege.
    pub fn open(name: &str, access: Access) -> Result<Self> {
        let oid = own_oid(name)?;
        let (lock, privilege) = match access {
            Access::Read => (pg_sys::AccessShareLock, pg_sys::ACL_SELECT),
            Access::Insert => (pg_sys::RowExclusiveLock, pg_sys::ACL_INSERT),
        };
        // SAFETY: plain catalog look-ups inside a transaction.
        let granted = unsafe { pg_sys::pg_class_aclcheck(oid, pg_sys::GetUserId(), privilege) };
        if granted != pg_sys::AclResult::ACLCHECK_OK {
            return Err(Error::new(
                PgSqlErrorCode::ERRCODE_INSUFFICIENT_PRIVILEGE,
                format!("permission denied for table dedup.{name}"),
            ));
        }
        // SAFETY: the oid is a table's; the relation stays open as long as this value, the lock to the end.
        let rel = unsafe { pg_sys::table_open(oid, lock as pg_sys::LOCKMODE) };
        Ok(Self { rel })
    }

    /// The file that the rows lie in: another one after VACUUM FULL, CLUSTER or a restore, and then every [`Position`] is void.
    pub fn file(&self) -> pg_sys::Oid {
        // SAFETY: an open relation has its catalog row.
        unsafe { (*(*self.rel).rd_rel).relfilenode }
    }
}

impl Drop for Table {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            // SAFETY: opened by us and not closed before; on ERROR the resource owner closes it instead.
            unsafe { pg_sys::table_close(self.rel, pg_sys::NoLock as pg_sys::LOCKMODE) };
        }
    }
}

/// A registered snapshot, taken when it is made: sees what has committed until then and this transaction's own rows.
pub struct Snapshot {
    raw: pg_sys::Snapshot,
}

impl Snapshot {
    /// A snapshot of this moment, under REPEATABLE READ too.
    pub fn latest() -> Self {
        // SAFETY: in a transaction; CommandCounterIncrement makes rows this command wrote natively visible to us.
        let raw = unsafe {
            pg_sys::CommandCounterIncrement();
            pg_sys::RegisterSnapshot(pg_sys::GetLatestSnapshot())
        };
        Self { raw }
    }

    /// The snapshot of the statement that is being executed.
    pub fn of_statement() -> Self {
        // SAFETY: in a statement, as every SQL function is, so there is an active snapshot.
        Self { raw: unsafe { pg_sys::RegisterSnapshot(pg_sys::GetActiveSnapshot()) } }
    }
}

impl Drop for Snapshot {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            // SAFETY: registered by us; on ERROR the resource owner unregisters it instead.
            unsafe { pg_sys::UnregisterSnapshot(self.raw) };
        }
    }
}

/// Which way an index scan walks.
#[derive(Clone, Copy)]
pub enum Direction {
    /// Ascending.
    Forward,
    /// Descending.
    Backward,
}

/// A condition of an index scan on the index column with this number (from 1).
pub struct Condition {
    column: i16,
    strategy: u32,
    procedure: pg_sys::RegProcedure,
    argument: pg_sys::Datum,
}

impl Condition {
    /// bigint column = value
    pub fn int8_eq(column: i16, value: i64) -> Self {
        Self {
            column,
            strategy: pg_sys::BTEqualStrategyNumber,
            procedure: pg_sys::F_INT8EQ.into(),
            argument: value.into(),
        }
    }

    /// int column = value
    pub fn int4_eq(column: i16, value: i32) -> Self {
        Self {
            column,
            strategy: pg_sys::BTEqualStrategyNumber,
            procedure: pg_sys::F_INT4EQ.into(),
            argument: value.into(),
        }
    }

    /// bytea column <= value. The scan keeps a reference: the value must live, unmoved, until the scan is restarted or ends.
    pub fn bytea_le(column: i16, value: &BytesDatum) -> Self {
        Self {
            column,
            strategy: pg_sys::BTLessEqualStrategyNumber,
            procedure: pg_sys::F_BYTEALE.into(),
            argument: value.datum(),
        }
    }
}

/// A bytea datum in memory of our own, with its four-byte header.
pub struct BytesDatum {
    // u32 words keep the header aligned.
    words: Vec<u32>,
}

impl BytesDatum {
    /// A copy of `bytes` behind a varlena header.
    pub fn new(bytes: &[u8]) -> Self {
        let total = bytes.len() + pg_sys::VARHDRSZ;
        let mut words = vec![0u32; total.div_ceil(4)];
        // SAFETY: the buffer holds `total` bytes; the header is written through the server's own macro.
        unsafe {
            let start = words.as_mut_ptr().cast::<u8>();
            pgrx::varlena::set_varsize_4b(start.cast(), total as i32);
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), start.add(pg_sys::VARHDRSZ), bytes.len());
        }
        Self { words }
    }

    /// The datum; valid as long as this value.
    pub fn datum(&self) -> pg_sys::Datum {
        pg_sys::Datum::from(self.words.as_ptr())
    }
}

/// One index scan over a table, restartable with other conditions.
pub struct IndexScan<'a> {
    _table: &'a Table,
    _snapshot: &'a Snapshot,
    index: pg_sys::Relation,
    scan: pg_sys::IndexScanDesc,
    slot: *mut pg_sys::TupleTableSlot,
}

impl<'a> IndexScan<'a> {
    /// A scan of `table` through its index `dedup.index`, with as many conditions as every `start` will give.
    ///
    /// # Errors
    /// 42P01 when the index is not there.
    pub fn new(table: &'a Table, index: &str, snapshot: &'a Snapshot, conditions: usize) -> Result<Self> {
        let oid = own_oid(index)?;
        // SAFETY: table and index are open and the snapshot registered for as long as the scan lives ('a).
        unsafe {
            let index = pg_sys::index_open(oid, pg_sys::AccessShareLock as pg_sys::LOCKMODE);
            let scan = begin_scan(table.rel, index, snapshot.raw, conditions as i32);
            let slot = pg_sys::table_slot_create(table.rel, std::ptr::null_mut());
            Ok(Self { _table: table, _snapshot: snapshot, index, scan, slot })
        }
    }

    /// (Re)starts the scan.
    pub fn start(&mut self, conditions: &[Condition]) {
        let mut keys: Vec<pg_sys::ScanKeyData> = conditions
            .iter()
            .map(|c| {
                let mut key = pg_sys::ScanKeyData::default();
                // SAFETY: writes the key we own; procedure and strategy belong to the column's btree class.
                unsafe {
                    pg_sys::ScanKeyInit(&mut key, c.column, c.strategy as u16, c.procedure, c.argument)
                };
                key
            })
            .collect();
        // SAFETY: index_rescan copies the keys.
        unsafe {
            pg_sys::index_rescan(self.scan, keys.as_mut_ptr(), keys.len() as i32, std::ptr::null_mut(), 0)
        };
    }

    /// The next row the snapshot sees, or `None` at the end.
    pub fn next(&mut self, direction: Direction) -> Option<Row<'_>> {
        let direction = match direction {
            Direction::Forward => pg_sys::ScanDirection::ForwardScanDirection,
            Direction::Backward => pg_sys::ScanDirection::BackwardScanDirection,
        };
        // SAFETY: scan and slot are live; the row borrows self, so that it cannot outlive the slot's pin.
        let found = unsafe { pg_sys::index_getnext_slot(self.scan, direction, self.slot) };
        found.then_some(Row { slot: self.slot, _scan: std::marker::PhantomData })
    }
}

/// One forward scan of an index alone: what its entries say and where their rows lie, whether anybody sees those rows or not.
pub struct EntryScan<'a> {
    scan: IndexScan<'a>,
}

/// Where a row lies in a table's file.
#[derive(Clone, Copy, Debug)]
pub struct Position(pg_sys::ItemPointerData);

impl<'a> EntryScan<'a> {
    /// A scan of the entries of `table`'s index `dedup.index` that meet the conditions.
    ///
    /// # Errors
    /// 42P01 when the index is not there.
    pub fn new(
        table: &'a Table,
        index: &str,
        snapshot: &'a Snapshot,
        conditions: &[Condition],
    ) -> Result<Self> {
        let mut scan = IndexScan::new(table, index, snapshot, conditions.len())?;
        // SAFETY: a scan that was begun and not started yet; B-trees can return their entries.
        unsafe { (*scan.scan).xs_want_itup = true };
        scan.start(conditions);
        Ok(Self { scan })
    }

    /// The next entry: where its row lies, and the first eight bytes of the bytea in index column `column` (numbered from 1).
    ///
    /// # Errors
    /// XX001 when that column holds less.
    pub fn next(&mut self, column: usize) -> Result<Option<(Position, [u8; 8])>> {
        let scan = self.scan.scan;
        // SAFETY: the scan is live and wants its entries; entry and descriptor stay valid until it moves. Plain bytea, which an
        // entry holds inline.
        unsafe {
            let position = pg_sys::index_getnext_tid(scan, pg_sys::ScanDirection::ForwardScanDirection);
            if position.is_null() {
                return Ok(None);
            }
            let mut values = [pg_sys::Datum::null(); pg_sys::INDEX_MAX_KEYS as usize];
            let mut nulls = [true; pg_sys::INDEX_MAX_KEYS as usize];
            pg_sys::index_deform_tuple(
                (*scan).xs_itup,
                (*scan).xs_itupdesc,
                values.as_mut_ptr(),
                nulls.as_mut_ptr(),
            );
            let value = values[column - 1].cast_mut_ptr::<pg_sys::varlena>();
            if nulls[column - 1] || pgrx::varlena::varsize_any_exhdr(value) < 8 {
                return Err(Error::corrupted("an index of a dedup table holds a short digest"));
            }
            Ok(Some((
                Position(*position),
                pgrx::varlena::vardata_any(value).cast::<[u8; 8]>().read_unaligned(),
            )))
        }
    }
}

/// Reads rows of a table by their positions.
pub struct Fetcher<'a> {
    table: &'a Table,
    snapshot: &'a Snapshot,
    slot: *mut pg_sys::TupleTableSlot,
}

impl<'a> Fetcher<'a> {
    /// A reader of `table` as the snapshot sees it.
    pub fn new(table: &'a Table, snapshot: &'a Snapshot) -> Self {
        // SAFETY: the table is open for as long as the slot lives ('a).
        let slot = unsafe { pg_sys::table_slot_create(table.rel, std::ptr::null_mut()) };
        Self { table, snapshot, slot }
    }

    /// The row at a position; `None` where the snapshot sees none.
    pub fn fetch(&mut self, position: Position) -> Option<Row<'_>> {
        let mut position = position.0;
        // SAFETY: table, snapshot and slot are live; the row borrows self, so that it cannot outlive the slot's pin. Positions beyond the
        // table's end are for the server to refuse.
        let found = unsafe {
            pg_sys::table_tuple_fetch_row_version(self.table.rel, &mut position, self.snapshot.raw, self.slot)
        };
        found.then_some(Row { slot: self.slot, _scan: std::marker::PhantomData })
    }
}

impl Drop for Fetcher<'_> {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            // SAFETY: ours and live; on ERROR the resource owner releases its pin instead.
            unsafe { pg_sys::ExecDropSingleTupleTableSlot(self.slot) };
        }
    }
}

impl Drop for IndexScan<'_> {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            // SAFETY: all three are ours and live; on ERROR the resource owner releases them instead.
            unsafe {
                pg_sys::ExecDropSingleTupleTableSlot(self.slot);
                pg_sys::index_endscan(self.scan);
                pg_sys::index_close(self.index, pg_sys::NoLock as pg_sys::LOCKMODE);
            }
        }
    }
}

#[cfg(not(feature = "pg18"))]
unsafe fn begin_scan(
    heap: pg_sys::Relation,
    index: pg_sys::Relation,
    snapshot: pg_sys::Snapshot,
    keys: i32,
) -> pg_sys::IndexScanDesc {
    // SAFETY: the caller's promise: all are open and live.
    unsafe { pg_sys::index_beginscan(heap, index, snapshot, keys, 0) }
}

#[cfg(feature = "pg18")]
unsafe fn begin_scan(
    heap: pg_sys::Relation,
    index: pg_sys::Relation,
    snapshot: pg_sys::Snapshot,
    keys: i32,
) -> pg_sys::IndexScanDesc {
    // SAFETY: the caller's promise: all are open and live; no instrumentation is asked for.
    unsafe { pg_sys::index_beginscan(heap, index, snapshot, std::ptr::null_mut(), keys, 0) }
}

/// A row of a scan, valid until the scan moves.
pub struct Row<'a> {
    slot: *mut pg_sys::TupleTableSlot,
    _scan: std::marker::PhantomData<&'a ()>,
}

impl<'a> Row<'a> {
    fn datum(&self, column: i32) -> Result<pg_sys::Datum> {
        let mut is_null = false;
        // SAFETY: the slot holds a row; dedup's tables have that many columns. What is deformed already is read without a call.
        let datum = unsafe {
            if i32::from((*self.slot).tts_nvalid) >= column {
                let index = column as usize - 1;
                is_null = *(*self.slot).tts_isnull.add(index);
                *(*self.slot).tts_values.add(index)
            } else {
                pg_sys::slot_getattr(self.slot, column, &mut is_null)
            }
        };
        if is_null {
            Err(Error::corrupted(format!("column {column} of a dedup table is null")))
        } else {
            Ok(datum)
        }
    }

    /// bigint column (numbered from 1).
    pub fn int8(&self, column: i32) -> Result<i64> {
        Ok(self.datum(column)?.value() as i64)
    }

    /// int column (numbered from 1).
    pub fn int4(&self, column: i32) -> Result<i32> {
        Ok(self.datum(column)?.value() as i32)
    }

    /// bytea column (numbered from 1) with STORAGE PLAIN, in the page itself: never compressed, never moved out.
    pub fn plain_bytes(&self, column: i32) -> Result<&'a [u8]> {
        let pointer = self.datum(column)?.cast_mut_ptr::<pg_sys::varlena>();
        // SAFETY: PLAIN storage makes it an inline, uncompressed varlena in the page that the slot keeps pinned.
        unsafe {
            if pgrx::varlena::varatt_is_4b_u(pointer)
                || pgrx::varlena::varatt_is_1b(pointer) && !pgrx::varlena::varatt_is_1b_e(pointer)
            {
                let length = pgrx::varlena::varsize_any_exhdr(pointer);
                Ok(std::slice::from_raw_parts(pgrx::varlena::vardata_any(pointer).cast::<u8>(), length))
            } else {
                Err(Error::corrupted("a packed block is compressed or out of line")
                    .hint("dedup's tables keep STORAGE PLAIN; restore the column's storage and the segment"))
            }
        }
    }
}

/// Adds rows to one table and its indexes, past the executor: no trigger fires.
pub struct Inserter<'a> {
    table: &'a Table,
    bulk: *mut pg_sys::BulkInsertStateData,
    indexes: Vec<(pg_sys::Relation, *mut pg_sys::IndexInfo)>,
    command: pg_sys::CommandId,
}

impl<'a> Inserter<'a> {
    /// Opens every index of the table for insertion.
    pub fn new(table: &'a Table) -> Self {
        // SAFETY: the table is open; the list and the infos live in the current memory context.
        unsafe {
            let list = pg_sys::RelationGetIndexList(table.rel);
            let mut indexes = Vec::new();
            if !list.is_null() {
                for i in 0..(*list).length as usize {
                    let oid = (*(*list).elements.add(i)).oid_value;
                    let index = pg_sys::index_open(oid, pg_sys::RowExclusiveLock as pg_sys::LOCKMODE);
                    indexes.push((index, pg_sys::BuildIndexInfo(index)));
                }
            }
            Self {
                table,
                bulk: pg_sys::GetBulkInsertState(),
                indexes,
                command: pg_sys::GetCurrentCommandId(true),
            }
        }
    }

    /// Inserts one row; no column may be null.
    ///
    /// # Errors
    /// Whatever the server raises (disk full, interrupt) passes through as its own ERROR.
    pub fn insert(&mut self, values: &[pg_sys::Datum]) {
        let nulls = vec![false; values.len()];
        let mut values = values.to_vec();
        // SAFETY: as many values as the table has columns, of their types; the tuple is freed after the index entries are made.
        unsafe {
            let descriptor = (*self.table.rel).rd_att;
            debug_assert_eq!((*descriptor).natts as usize, values.len());
            let tuple = pg_sys::heap_form_tuple(descriptor, values.as_mut_ptr(), nulls.as_ptr().cast_mut());
            pg_sys::heap_insert(self.table.rel, tuple, self.command, 0, self.bulk);
            for &(index, info) in &self.indexes {
                let mut keys = [pg_sys::Datum::null(); pg_sys::INDEX_MAX_KEYS as usize];
                let mut key_nulls = [false; pg_sys::INDEX_MAX_KEYS as usize];
                for k in 0..(*info).ii_NumIndexAttrs as usize {
                    // dedup's indexes are on plain columns.
                    keys[k] = values[(*info).ii_IndexAttrNumbers[k] as usize - 1];
                    key_nulls[k] = false;
                }
                let unique = if (*(*index).rd_index).indisunique {
                    pg_sys::IndexUniqueCheck::UNIQUE_CHECK_YES
                } else {
                    pg_sys::IndexUniqueCheck::UNIQUE_CHECK_NO
                };
                pg_sys::index_insert(
                    index,
                    keys.as_mut_ptr(),
                    key_nulls.as_mut_ptr(),
                    &mut (*tuple).t_self,
                    self.table.rel,
                    unique,
                    false,
                    info,
                );
            }
            pg_sys::heap_freetuple(tuple);
        }
    }
}

impl Drop for Inserter<'_> {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            // SAFETY: ours and live; on ERROR the resource owner releases pins and relations instead.
            unsafe {
                pg_sys::FreeBulkInsertState(self.bulk);
                for &(index, _) in &self.indexes {
                    pg_sys::index_close(index, pg_sys::NoLock as pg_sys::LOCKMODE);
                }
            }
        }
    }
}
