//! A query's rows, hashed one by one as the executor emits them.
//!
//! The executor hands every row to a receiver of ours while it still lies in the table's buffer: nothing is copied
//! into a tuple table, and memory does not grow with the number of rows. Interrupts are the executor's business; between two rows it rests where the run is slowed.
//!
//! ```text
//! SPI_execute_plan_extended ─▶ executor ─▶ receive_slot ─▶ FieldReader ─▶ RowView ─▶ on_row
//! ```

use super::send::{self, FieldReader};
use super::types;
use crate::error::{Error, Result};
use crate::pace;
use pg_dedup_record::digest::Digest;
use pg_dedup_record::key;
use pg_dedup_record::layout::Layout;
use pg_dedup_record::pgcopy;
use pg_dedup_record::record::{RecordDigests, RecordHasher};
use pgrx::datum::DatumWithOid;
use pgrx::pg_sys::{self, Datum, Oid};
use pgrx::{FromDatum, IntoDatum, PgSqlErrorCode, PgTupleDesc, pg_guard};
use std::ffi::{CStr, CString, c_int};
use std::ptr;

/// Runs `query` and calls `on_row` for each row; returns how many there were.
///
/// The query's columns are those of `layout`, in its order and in its types (modifiers may differ), then
/// `trailing` others of any type. It sees what the transaction's isolation level lets it see now and everything
/// this transaction has done so far; it may lock rows. An error that `on_row` returns stops the scan and is returned. The scan
/// runs without parallel workers, so `on_row` may write. What `on_row` allocates in the server lives
/// in the memory context that was current when `scan` was called.
///
/// # Errors
/// 42804 if the query's columns are not the layout's; ERRORs of the query pass through.
pub fn scan(
    query: &str,
    params: &[DatumWithOid<'_>],
    layout: &Layout,
    trailing: usize,
    on_row: impl FnMut(RowView<'_>) -> Result<()>,
) -> Result<u64> {
    scan_in(View::Latest, query, params, layout, trailing, on_row)
}

/// Which rows a scan sees.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum View {
    /// What is there now, as the isolation level allows, this command's own work included.
    Latest,
    /// What the statement that is being executed sees: several scans of one statement see the same. The query cannot lock rows.
    Statement,
}

/// [`scan`] in a view of one's choice.
///
/// # Errors
/// As [`scan`].
pub fn scan_in(
    view: View,
    query: &str,
    params: &[DatumWithOid<'_>],
    layout: &Layout,
    trailing: usize,
    mut on_row: impl FnMut(RowView<'_>) -> Result<()>,
) -> Result<u64> {
    layout.validate().map_err(|error| Error::invalid(error.to_string()))?;
    let text = CString::new(query).map_err(|_| Error::invalid("query contains a zero byte"))?;
    // SAFETY: reads a global of the backend.
    let caller = unsafe { pg_sys::CurrentMemoryContext };
    let session = SpiSession::open()?;
    let mut receiver = Receiver {
        base: Receiver::callbacks(),
        layout,
        hasher: RecordHasher::new(layout),
        trailing,
        caller,
        // SAFETY: as above; the context that connecting has made current, and that `close` deletes.
        home: unsafe { pg_sys::CurrentMemoryContext },
        reader: None,
        trailing_types: Vec::new(),
        on_row: &mut on_row,
        rows: 0,
        failure: None,
    };
    // SAFETY: the receiver begins with its DestReceiver and outlives the execution.
    let executed = unsafe { session.execute(&text, params, view, (&raw mut receiver).cast()) };
    let Receiver { reader, rows, failure, .. } = receiver;
    let started = reader.is_some();
    drop(reader);
    session.close();
    executed?;
    match failure {
        Some(error) => Err(error),
        None if !started => Err(Error::invalid("query to hash does not return rows")),
        None => Ok(rows),
    }
}

/// One row of a scan.
pub struct RowView<'row> {
    layout: &'row Layout,
    hasher: &'row RecordHasher,
    fields: &'row [Option<&'row [u8]>],
    trailing: &'row [(Option<Datum>, Oid)],
}

impl RowView<'_> {
    /// The row's two digests.
    ///
    /// # Errors
    /// XX001 if the binary form of a value is malformed.
    pub fn digests(&self) -> Result<RecordDigests> {
        self.hasher.hash(self.fields).map_err(send::malformed)
    }

    /// The digest over all of the row's columns alone.
    ///
    /// # Errors
    /// As [`RowView::digests`].
    pub fn row_digest(&self) -> Result<Digest> {
        self.hasher.hash_row(self.fields).map_err(send::malformed)
    }

    /// Appends the row's key bytes; false, and nothing appended, if a key column is NULL.
    ///
    /// # Errors
    /// 54000 if a key column is too long to be one.
    pub fn write_key(&self, out: &mut Vec<u8>) -> Result<bool> {
        let mut columns = [&[][..]; pg_sys::INDEX_MAX_KEYS as usize];
        let too_large = |message: String| Error::new(PgSqlErrorCode::ERRCODE_PROGRAM_LIMIT_EXCEEDED, message);
        let Some(columns) = columns.get_mut(..self.layout.key.len()) else {
            return Err(too_large(format!("key has {} columns", self.layout.key.len())));
        };
        for (bytes, &column) in columns.iter_mut().zip(&self.layout.key) {
            match self.fields[column] {
                Some(field) => *bytes = field,
                None => return Ok(false),
            }
        }
        key::encode(columns, out).map_err(|error| too_large(error.to_string()))?;
        Ok(true)
    }

    /// Appends the row as a tuple of the binary COPY format, columns in layout order.
    ///
    /// # Errors
    /// 54000 if the row is too large for the format.
    pub fn write_tuple(&self, out: &mut Vec<u8>) -> Result<()> {
        pgcopy::write_tuple(self.fields, out)
            .map_err(|error| Error::new(PgSqlErrorCode::ERRCODE_PROGRAM_LIMIT_EXCEEDED, error.to_string()))
    }

    /// The value of the `index`th trailing column.
    ///
    /// # Errors
    /// 42804 if the column is not of such a type, or there is none.
    pub fn trailing<T: FromDatum + IntoDatum>(&self, index: usize) -> Result<Option<T>> {
        match self.trailing.get(index) {
            Some(&(datum, oid)) if T::is_compatible_with(oid) => {
                // SAFETY: the datum is of type `oid`, which T reads, and valid while the row is current.
                Ok(unsafe { T::from_polymorphic_datum(datum.unwrap_or(Datum::null()), datum.is_none(), oid) })
            }
            Some(&(_, oid)) => Err(mismatch(format!(
                "trailing column {index} of the query has type {}, which was not expected",
                types::display_name(oid)
            ))),
            None => Err(mismatch(format!("query has no trailing column {index}"))),
        }
    }

    /// The command id (`cid`) in the `index`th trailing column.
    ///
    /// # Errors
    /// 42804 if the column is of another type, or there is none.
    pub fn trailing_command(&self, index: usize) -> Result<u32> {
        match self.trailing.get(index) {
            Some(&(Some(datum), oid)) if oid == pg_sys::CIDOID => Ok(datum.value() as u32),
            _ => Err(mismatch(format!("query has no command id in trailing column {index}"))),
        }
    }
}

fn mismatch(message: String) -> Error {
    Error::new(PgSqlErrorCode::ERRCODE_DATATYPE_MISMATCH, message)
}

/// Our end of the executor: a `DestReceiver` with what it needs behind it.
#[repr(C)]
struct Receiver<'a> {
    base: pg_sys::DestReceiver,
    layout: &'a Layout,
    hasher: RecordHasher,
    trailing: usize,
    /// Current while `on_row` runs.
    caller: pg_sys::MemoryContext,
    /// Where what lives as long as the scan is allocated.
    home: pg_sys::MemoryContext,
    /// Made when the executor says what the rows look like.
    reader: Option<FieldReader>,
    /// The trailing columns' types, and their values in the current row.
    trailing_types: Vec<(Option<Datum>, Oid)>,
    on_row: &'a mut dyn FnMut(RowView<'_>) -> Result<()>,
    rows: u64,
    failure: Option<Error>,
}

impl Receiver<'_> {
    fn callbacks() -> pg_sys::DestReceiver {
        pg_sys::DestReceiver {
            receiveSlot: Some(receive_slot),
            rStartup: Some(start_up),
            rShutdown: Some(no_op),
            rDestroy: Some(no_op),
            // Neither DestNone, with which SPI would not call it a SELECT, nor DestSPI, whose tuple table SPI
            // would look for. The executor itself does not ask.
            mydest: pg_sys::CommandDest::DestTuplestore,
        }
    }

    /// Prepares for rows of this shape, if it is the layout's.
    fn expect(&mut self, shape: &[Oid]) -> Result<()> {
        let columns = &self.layout.columns;
        if shape.len() != columns.len() + self.trailing {
            return Err(mismatch(format!(
                "query has {} columns, but the layout and what was asked for beside it have {}",
                shape.len(),
                columns.len() + self.trailing
            )));
        }
        let (own, trailing) = shape.split_at(columns.len());
        let mut plans = Vec::with_capacity(columns.len());
        for (&type_oid, column) in own.iter().zip(columns) {
            let plan = types::send_plan(type_oid)?;
            if plan.base_type != types::base_type_named(&column.type_name)?
                || plan.canonical != column.canonical
            {
                return Err(mismatch(format!(
                    "column \"{}\" of the query has type {}, but the layout has {}",
                    column.name,
                    types::display_name(type_oid),
                    column.type_name
                ))
                .hint(format!("Cast the column to {} in the query.", column.type_name)));
            }
            plans.push(plan);
        }
        // SAFETY: `home` lives until the SPI session is closed, after the receiver has been dropped.
        self.reader = Some(unsafe { FieldReader::new(plans, self.home) });
        self.trailing_types = trailing.iter().map(|&oid| (None, oid)).collect();
        Ok(())
    }

    /// Takes one row.
    ///
    /// # Safety
    /// `slot` holds a row of the shape that `expect` was told, all of it deformed.
    unsafe fn take(&mut self, slot: &pg_sys::TupleTableSlot) -> Result<()> {
        let Some(reader) = self.reader.as_mut() else { return Err(mismatch("no columns expected".into())) };
        let (values, nulls) = (slot.tts_values, slot.tts_isnull);
        let value = |column: usize| {
            // SAFETY: the slot has that many columns, deformed, by this function's contract.
            unsafe { (!*nulls.add(column)).then(|| *values.add(column)) }
        };
        // SAFETY: the slot's datums are of the types `expect` saw and stay put until this callback returns.
        unsafe { reader.read(value) }?;
        let columns = self.layout.columns.len();
        for (index, (datum, _)) in self.trailing_types.iter_mut().enumerate() {
            *datum = value(columns + index);
        }
        let row = RowView {
            layout: self.layout,
            hasher: &self.hasher,
            fields: reader.fields(),
            trailing: &self.trailing_types,
        };
        // SAFETY: still there, as it was current when the scan began, further up this very stack.
        let executor = unsafe { send::switch_context(self.caller) };
        let outcome = (self.on_row)(row);
        // SAFETY: the context that was current before.
        unsafe { send::switch_context(executor) };
        reader.clear();
        outcome
    }
}

/// `rStartup`: the executor says what rows will look like.
#[pg_guard]
unsafe extern "C-unwind" fn start_up(
    base: *mut pg_sys::DestReceiver,
    _operation: c_int,
    shape: pg_sys::TupleDesc,
) {
    // SAFETY: `base` is the first field of the Receiver that `scan` has passed in; nobody else uses it now.
    let receiver = unsafe { &mut *base.cast::<Receiver<'_>>() };
    // SAFETY: the executor's descriptor, valid during this call and not ours to release.
    let descriptor = unsafe { PgTupleDesc::from_pg_unchecked(shape) };
    let shape: Vec<Oid> = descriptor.iter().map(|attribute| attribute.atttypid).collect();
    receiver.failure = receiver.expect(&shape).err();
}

/// `receiveSlot`: one row; false stops the scan.
#[pg_guard]
unsafe extern "C-unwind" fn receive_slot(
    slot: *mut pg_sys::TupleTableSlot,
    base: *mut pg_sys::DestReceiver,
) -> bool {
    // SAFETY: as in `start_up`.
    let receiver = unsafe { &mut *base.cast::<Receiver<'_>>() };
    if receiver.failure.is_some() {
        return false;
    }
    let columns = receiver.layout.columns.len() + receiver.trailing;
    // SAFETY: the executor's slot, valid during this call, of the shape given to `start_up`.
    let outcome = unsafe {
        if usize::try_from((*slot).tts_nvalid).unwrap_or(0) < columns {
            pg_sys::slot_getsomeattrs_int(slot, columns as c_int);
        }
        receiver.take(&*slot)
    };
    match outcome {
        Ok(()) => {
            receiver.rows += 1;
            pace::rest_if_due();
            true
        }
        Err(error) => {
            receiver.failure = Some(error);
            false
        }
    }
}

/// `rShutdown` and `rDestroy`: the receiver belongs to `scan`.
#[pg_guard]
unsafe extern "C-unwind" fn no_op(_base: *mut pg_sys::DestReceiver) {}

/// A connection to SPI. Closed by hand, not by a destructor: after an ERROR the transaction machinery
/// does it.
struct SpiSession(());

impl SpiSession {
    fn open() -> Result<SpiSession> {
        // SAFETY: allowed wherever SQL is; each open session is closed or swept up at abort.
        spi_ok("SPI_connect", unsafe { pg_sys::SPI_connect() })?;
        Ok(SpiSession(()))
    }

    fn close(self) {
        // SAFETY: connected by `open`.
        unsafe { pg_sys::SPI_finish() };
    }

    /// Runs one statement, its rows going to `receiver`.
    ///
    /// # Safety
    /// `receiver` is a live `DestReceiver` for as long as this takes.
    unsafe fn execute(
        &self,
        query: &CStr,
        params: &[DatumWithOid<'_>],
        view: View,
        receiver: *mut pg_sys::DestReceiver,
    ) -> Result<()> {
        let mut types: Vec<Oid> = params.iter().map(DatumWithOid::oid).collect();
        // SAFETY: connected; the plan is freed with the session's memory.
        let plan = unsafe { pg_sys::SPI_prepare(query.as_ptr(), types.len() as c_int, types.as_mut_ptr()) };
        if plan.is_null() {
            // SAFETY: SPI_prepare says here why.
            return spi_ok("SPI_prepare", unsafe { pg_sys::SPI_result });
        }
        let options = pg_sys::SPIExecuteOptions {
            params: param_list(params),
            // Not read-only: a fresh snapshot, after CommandCounterIncrement.
            read_only: view == View::Statement,
            allow_nonatomic: false,
            must_return_tuples: true,
            tcount: 0,
            dest: receiver,
            owner: ptr::null_mut(),
        };
        // SAFETY: plan and options are valid, and so is `receiver` by this function's contract.
        let code = unsafe { pg_sys::SPI_execute_plan_extended(plan, &options) };
        spi_ok("SPI_execute_plan_extended", code)
    }
}

/// The parameters as the executor wants them, palloc'd; null for none.
fn param_list(params: &[DatumWithOid<'_>]) -> pg_sys::ParamListInfo {
    if params.is_empty() {
        return ptr::null_mut();
    }
    // SAFETY: makes room for that many, of which each is written here.
    unsafe {
        let list = pg_sys::makeParamList(params.len() as c_int);
        for (slot, param) in (*list).params.as_mut_slice(params.len()).iter_mut().zip(params) {
            let datum = param.datum().map(|datum| datum.sans_lifetime());
            *slot = pg_sys::ParamExternData {
                value: datum.unwrap_or(Datum::null()),
                isnull: datum.is_none(),
                pflags: pg_sys::PARAM_FLAG_CONST as u16,
                ptype: param.oid(),
            };
        }
        list
    }
}

/// SPI's own failures, which are bugs of the caller; a failing query raises an ERROR instead.
fn spi_ok(call: &str, code: c_int) -> Result<()> {
    if code >= 0 {
        return Ok(());
    }
    // SAFETY: a static string for every code.
    let reason = unsafe { CStr::from_ptr(pg_sys::SPI_result_code_string(code)) }.to_string_lossy();
    Err(Error::new(PgSqlErrorCode::ERRCODE_INTERNAL_ERROR, format!("{call} failed: {reason}")))
}
