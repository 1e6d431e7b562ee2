//! COPY inside the server: the rows of a batch go into a table through the server's own COPY code, so that constraints, triggers,
//! partition routing and generated columns behave as they always do.
use std::cell::RefCell;
use std::collections::VecDeque;
use std::ffi::{CString, c_int, c_void};

use bytes::{Buf, Bytes};
use pg_dedup_record::layout::Layout;
use pg_dedup_record::refusal::{Refusal, RefusedAttempt, refuses_record};
use pg_dedup_record::{Batch, pgcopy};
use pgrx::prelude::*;
use pgrx::{PgTryBuilder, pg_guard, pg_sys};

use crate::error::{Error, Result};
use crate::keyset::qualified_name;

unsafe extern "C-unwind" {
    /// From parser/parse_relation.h, which the bindings leave out.
    fn addRangeTableEntryForRelation(
        pstate: *mut pg_sys::ParseState,
        rel: pg_sys::Relation,
        lockmode: c_int,
        alias: *mut c_void,
        inh: bool,
        in_from_clause: bool,
    ) -> *mut c_void;
}

thread_local! {
    /// What the COPY that is running has still to read. COPY's callback has no argument to carry it.
    static FEED: RefCell<VecDeque<Bytes>> = const { RefCell::new(VecDeque::new()) };
}

/// Runs `work` in a subtransaction of its own that ends with `SET CONSTRAINTS ALL IMMEDIATE`. What the target refuses for a reason that
/// lies in a record (classes 22, 23 and 44, and P0001) is taken back and returned, without a place; any other ERROR passes through.
///
/// # Errors
/// What `work` returns.
pub fn attempt(work: impl FnOnce() -> Result<()> + std::panic::UnwindSafe) -> Result<Option<RefusedAttempt>> {
    // SAFETY: plain globals of this backend, restored below; the subtransaction is released or rolled back on every path.
    let (context, owner) = unsafe { (pg_sys::CurrentMemoryContext, pg_sys::CurrentResourceOwner) };
    // SAFETY: inside a transaction, not in a parallel worker.
    unsafe { pg_sys::BeginInternalSubTransaction(std::ptr::null()) };
    // What a refused COPY leaves behind goes with the attempt: there may be thousands of them in one call.
    // SAFETY: a child of the caller's context, made current until the attempt is over.
    let own = unsafe {
        let own = pg_sys::AllocSetContextCreateExtended(
            context,
            c"dedup write attempt".as_ptr(),
            pg_sys::ALLOCSET_DEFAULT_MINSIZE as usize,
            pg_sys::ALLOCSET_DEFAULT_INITSIZE as usize,
            pg_sys::ALLOCSET_DEFAULT_MAXSIZE as usize,
        );
        pg_sys::CurrentMemoryContext = own;
        own
    };
    let outcome = PgTryBuilder::new(|| {
        let done = work().and_then(|()| Ok(Spi::run("SET CONSTRAINTS ALL IMMEDIATE")?));
        Ok(match done {
            // Of our own errors this alone lies in a record: a row that must stay because of what points at it.
            Err(error) if error.code() == PgSqlErrorCode::ERRCODE_FOREIGN_KEY_VIOLATION => {
                Ok(refused(&sqlstate(error.code()), &error.to_string()))
            }
            done => done.map(|()| None),
        })
    })
    .catch_others(|caught| {
        let report = match &caught {
            pg_sys::panic::CaughtError::PostgresError(report)
            | pg_sys::panic::CaughtError::ErrorReport(report)
            | pg_sys::panic::CaughtError::RustPanic { ereport: report, .. } => report,
        };
        let sqlstate = sqlstate(report.sql_error_code());
        if refuses_record(&sqlstate) { Ok(Ok(refused(&sqlstate, report.message()))) } else { Err(caught) }
    })
    .execute();
    FEED.with_borrow_mut(VecDeque::clear);
    // SAFETY: the subtransaction begun above is the current one.
    unsafe {
        match &outcome {
            Ok(Ok(None)) => pg_sys::ReleaseCurrentSubTransaction(),
            _ => pg_sys::RollbackAndReleaseCurrentSubTransaction(),
        }
        pg_sys::CurrentMemoryContext = context;
        pg_sys::CurrentResourceOwner = owner;
        pg_sys::MemoryContextDelete(own);
    }
    // Only now: whoever catches it, an exception block of PL/pgSQL say, takes back the subtransaction that it finds current.
    outcome.unwrap_or_else(|caught| caught.rethrow())
}

fn refused(sqlstate: &str, message: &str) -> Option<RefusedAttempt> {
    Some(RefusedAttempt { refusal: Refusal::by_target(sqlstate, message), constraint: None, line: None })
}

/// The five characters of a packed SQLSTATE: six bits each, counted from '0' (MAKE_SQLSTATE of utils/elog.h).
fn sqlstate(code: PgSqlErrorCode) -> String {
    (0..5).map(|i| char::from(b'0' + ((code as u32 >> (6 * i)) & 0x3f) as u8)).collect()
}

/// Copies rows of a batch into `table`, in their order; returns how many the table took.
///
/// # Errors
/// 42P01 for a table that is gone; whatever the table refuses the rows with passes through as its own ERROR.
pub fn copy_in(table: pg_sys::Oid, layout: &Layout, batch: &Batch, rows: &[u32]) -> Result<u64> {
    let mut feed = VecDeque::with_capacity(rows.len() + 2);
    feed.push_back(Bytes::from_static(pgcopy::header()));
    feed.extend(rows.iter().map(|&row| batch.data().slice(batch.row_range(row as usize))));
    feed.push_back(Bytes::from_static(pgcopy::trailer()));
    FEED.set(feed);
    let columns = layout
        .columns
        .iter()
        .map(|c| CString::new(c.name.as_str()).map_err(|_| Error::invalid("a column name holds a zero byte")))
        .collect::<Result<Vec<_>>>()?;
    // SAFETY: the table is opened with the lock that COPY takes and closed when it is done; names and nodes are palloc'ed in the
    // current context and outlive the COPY; the callback reads only FEED. As the server's own table synchronisation does it.
    unsafe {
        let relation = pg_sys::table_open(table, pg_sys::RowExclusiveLock as pg_sys::LOCKMODE);
        may_copy_into(relation, table)?;
        let state = pg_sys::make_parsestate(std::ptr::null_mut());
        pg_sys::ffi::pg_guard_ffi_boundary(|| {
            addRangeTableEntryForRelation(
                state,
                relation,
                pg_sys::RowExclusiveLock as c_int,
                std::ptr::null_mut(),
                false,
                false,
            )
        });
        let mut names = std::ptr::null_mut();
        for column in &columns {
            names = pg_sys::lappend(names, pg_sys::makeString(pg_sys::pstrdup(column.as_ptr())).cast());
        }
        let format = pg_sys::makeDefElem(
            pg_sys::pstrdup(c"format".as_ptr()),
            pg_sys::makeString(pg_sys::pstrdup(c"binary".as_ptr())).cast(),
            -1,
        );
        let options = pg_sys::lappend(std::ptr::null_mut(), format.cast());
        let copy = pg_sys::BeginCopyFrom(
            state,
            relation,
            std::ptr::null_mut(),
            std::ptr::null(),
            false,
            Some(read_feed),
            names,
            options,
        );
        let written = pg_sys::CopyFrom(copy);
        pg_sys::EndCopyFrom(copy);
        pg_sys::free_parsestate(state);
        pg_sys::table_close(relation, pg_sys::NoLock as pg_sys::LOCKMODE);
        pg_sys::CommandCounterIncrement();
        Ok(written)
    }
}

/// What the COPY command checks before it calls the code we call: the privilege, row security, and that it is no system catalog.
///
/// # Safety
/// `relation` is the open relation with oid `table`.
unsafe fn may_copy_into(relation: pg_sys::Relation, table: pg_sys::Oid) -> Result<()> {
    let denied = |message: String| Error::new(PgSqlErrorCode::ERRCODE_INSUFFICIENT_PRIVILEGE, message);
    let name = qualified_name(table);
    // SAFETY: catalog look-ups about an open relation, by the caller's promise.
    let (granted, row_security, system) = unsafe {
        (
            pg_sys::pg_class_aclcheck(table, pg_sys::GetUserId(), pg_sys::ACL_INSERT),
            pg_sys::check_enable_rls(table, pg_sys::InvalidOid, true),
            pg_sys::IsSystemRelation(relation),
        )
    };
    if granted != pg_sys::AclResult::ACLCHECK_OK || system {
        return Err(denied(format!("permission denied for table {name}")));
    }
    if row_security == pg_sys::CheckEnableRlsResult::RLS_ENABLED as i32 {
        return Err(denied(format!("row security is active on {name}"))
            .hint("use a role with BYPASSRLS or the owner: a hidden row cannot be verified"));
    }
    Ok(())
}

/// COPY asks for between `min` and `max` bytes; fewer than `min` is the end.
#[pg_guard]
unsafe extern "C-unwind" fn read_feed(out: *mut c_void, _min: c_int, max: c_int) -> c_int {
    let max = usize::try_from(max).unwrap_or(0);
    // SAFETY: the server gives a buffer of `max` bytes.
    let out = unsafe { std::slice::from_raw_parts_mut(out.cast::<u8>(), max) };
    FEED.with_borrow_mut(|feed| {
        let mut filled = 0;
        while filled < out.len() {
            let Some(piece) = feed.front_mut() else { break };
            let take = piece.len().min(out.len() - filled);
            piece.copy_to_slice(&mut out[filled..filled + take]);
            filled += take;
            if piece.is_empty() {
                feed.pop_front();
            }
        }
        filled as c_int
    })
}
