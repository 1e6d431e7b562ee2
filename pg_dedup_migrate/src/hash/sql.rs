//! `content_hash` and the checksum functions.
// What SQL calls returns pgrx's ErrorReport, the one error type that keeps its SQLSTATE, and that is large.
#![allow(clippy::result_large_err)]

use super::send::{self, FieldReader};
use super::types;
use crate::error::{Error, Result};
use pg_dedup_record::checksum::Checksum;
use pg_dedup_record::record::ContentHasher;
use pgrx::callconv::{BoxRet, FcInfo};
use pgrx::pg_sys::panic::ErrorReport;
use pgrx::pg_sys::{self, Datum, Oid};
use pgrx::prelude::*;
use pgrx::{PgList, PgMemoryContexts, PgSqlErrorCode, VariadicArray, varlena};

/// A `bytea` that is a datum already.
struct ByteaDatum(Datum);

impl_sql_translatable!(ByteaDatum, "bytea");

// SAFETY: the datum is a palloc'd bytea: the only values made are those below.
unsafe impl BoxRet for ByteaDatum {
    unsafe fn box_into<'fcx>(self, fcinfo: &mut FcInfo<'fcx>) -> pgrx::datum::Datum<'fcx> {
        // SAFETY: as above, in the context in which the function was called or a longer-lived one.
        unsafe { fcinfo.return_raw_datum(self.0) }
    }
}

impl From<[u8; 32]> for ByteaDatum {
    fn from(bytes: [u8; 32]) -> Self {
        const SIZE: usize = pg_sys::VARHDRSZ + 32;
        // SAFETY: a fresh chunk of SIZE bytes, all of which are written.
        unsafe {
            let chunk = pg_sys::palloc(SIZE).cast::<pg_sys::varlena>();
            varlena::set_varsize_4b(chunk, SIZE as i32);
            chunk.cast::<u8>().add(pg_sys::VARHDRSZ).copy_from_nonoverlapping(bytes.as_ptr(), 32);
            ByteaDatum(Datum::from(chunk))
        }
    }
}

/// SHA-256 over the arguments as content columns in this order: see `COMMENT ON FUNCTION`.
///
/// What the argument types ask for is found out at the first row and kept in `fn_extra` for the rest of them.
#[pg_extern(sql = r#"
CREATE FUNCTION content_hash(VARIADIC "any") RETURNS bytea
    LANGUAGE c IMMUTABLE PARALLEL SAFE COST 10
    AS 'MODULE_PATHNAME', '@FUNCTION_NAME@';
COMMENT ON FUNCTION content_hash(VARIADIC "any") IS
    'SHA-256 of a record: for each argument its int32 length (-1 for NULL) and its canonical binary form';
"#)]
fn content_hash(fcinfo: pg_sys::FunctionCallInfo) -> Result<ByteaDatum, ErrorReport> {
    // SAFETY: the function manager's call data, ours for this call.
    let call = unsafe { &mut *fcinfo };
    // SAFETY: as many argument slots as `nargs` says follow the fixed part.
    let arguments = unsafe { call.args.as_slice(call.nargs as usize) };
    let reader = reader_of(call.flinfo, arguments.len())?;
    // SAFETY: the arguments are of the types that the reader was made for and outlive this call.
    unsafe { reader.read(|column| (!arguments[column].isnull).then_some(arguments[column].value)) }?;
    let mut hasher = ContentHasher::new();
    for (field, canonical) in reader.fields().iter().zip(reader.canonicals()) {
        hasher.column(*field, canonical).map_err(send::malformed)?;
    }
    reader.clear();
    Ok(hasher.finish().0.into())
}

/// The reader kept with this call site, made at the first call.
fn reader_of<'call>(flinfo: *mut pg_sys::FmgrInfo, arguments: usize) -> Result<&'call mut FieldReader> {
    // SAFETY: null, or the function manager's data about this call site.
    let Some(site) = (unsafe { flinfo.as_mut() }) else {
        return Err(undetermined());
    };
    if site.fn_extra.is_null() {
        let plans = (0..arguments)
            .map(|argument| types::send_plan(argument_type(site, argument, arguments)?))
            .collect::<Result<Vec<_>>>()?;
        // SAFETY: `fn_mcxt` lives as long as `fn_extra` is used. The reader is dropped with it; that it refers
        // to a child of it is no matter, as dropping does not look there.
        site.fn_extra = unsafe {
            let reader = FieldReader::new(plans, site.fn_mcxt);
            PgMemoryContexts::For(site.fn_mcxt).leak_and_drop_on_delete(reader).cast()
        };
    }
    // SAFETY: set above, by this call or an earlier one of this call site; calls do not overlap.
    Ok(unsafe { &mut *site.fn_extra.cast::<FieldReader>() })
}

/// The type of an argument, if it is one column's value.
fn argument_type(site: &mut pg_sys::FmgrInfo, argument: usize, arguments: usize) -> Result<Oid> {
    let refuse = |message: &str, hint: &str| {
        Err(Error::new(PgSqlErrorCode::ERRCODE_DATATYPE_MISMATCH, message).hint(hint))
    };
    // SAFETY: reads the call's expression tree.
    if unsafe { pg_sys::get_fn_expr_variadic(site) } {
        return refuse(
            "content_hash does not take its columns as a VARIADIC array",
            "Pass the columns one by one: content_hash(a, b, c).",
        );
    }
    // SAFETY: as above; InvalidOid if it cannot tell.
    let type_oid = unsafe { pg_sys::get_fn_expr_argtype(site, argument as i32) };
    match type_oid {
        Oid::INVALID => Err(undetermined()),
        pg_sys::UNKNOWNOID => refuse(
            &format!("argument {} of content_hash is a literal of unknown type", argument + 1),
            "Cast it to the type of the column it stands for, as in 'x'::text.",
        ),
        pg_sys::RECORDOID => refuse_row(),
        _ if arguments == 1 && types::is_table_row(type_oid) => refuse_row(),
        _ if is_whole_row(site, argument) => refuse_row(),
        _ => Ok(type_oid),
    }
}

fn refuse_row() -> Result<Oid> {
    Err(Error::new(
        PgSqlErrorCode::ERRCODE_DATATYPE_MISMATCH,
        "content_hash does not take a whole row as one argument",
    )
    .detail("A row as one value does not hash as its columns do.")
    .hint("List the content columns: content_hash(t.a, t.b, t.c)."))
}

fn undetermined() -> Error {
    Error::new(
        PgSqlErrorCode::ERRCODE_INDETERMINATE_DATATYPE,
        "could not determine the types of the arguments",
    )
}

/// Is the argument written as a reference to a whole row of a table?
fn is_whole_row(site: &pg_sys::FmgrInfo, argument: usize) -> bool {
    // SAFETY: the call's expression tree, read-only; every node begins with its tag.
    unsafe {
        if site.fn_expr.is_null() || (*site.fn_expr).type_ != pg_sys::NodeTag::T_FuncExpr {
            return false;
        }
        let call = site.fn_expr.cast::<pg_sys::FuncExpr>();
        match PgList::<pg_sys::Node>::from_pg((*call).args).get_ptr(argument) {
            Some(node) if (*node).type_ == pg_sys::NodeTag::T_Var => {
                (*node.cast::<pg_sys::Var>()).varattno == 0
            }
            _ => false,
        }
    }
}

/// The version of the canonical encoding; digests of different versions never compare.
#[pg_extern(immutable, parallel_safe)]
fn content_hash_version() -> i32 {
    i32::from(pg_dedup_record::ENCODING_VERSION)
}

/// Adds a digest to a sum: transition function of `checksum`.
#[pg_extern(sql = r#"
CREATE FUNCTION checksum_accum(sum bytea, digest bytea) RETURNS bytea
    LANGUAGE c IMMUTABLE STRICT PARALLEL SAFE
    AS 'MODULE_PATHNAME', '@FUNCTION_NAME@';
COMMENT ON FUNCTION checksum_accum(bytea, bytea) IS
    'adds one 32-byte digest to a sum mod 2^256; part of the aggregate checksum';
"#)]
fn checksum_accum(fcinfo: pg_sys::FunctionCallInfo) -> Result<ByteaDatum, ErrorReport> {
    // SAFETY: declared STRICT with two bytea arguments, so both are there.
    let (sum, digest) = unsafe { ((*fcinfo).args.as_slice(2)[0].value, (*fcinfo).args.as_slice(2)[1].value) };
    // SAFETY: both are bytea.
    let (mut total, added) = unsafe { (checksum_of(bytes_of(sum))?, checksum_of(bytes_of(digest))?) };
    total.merge(&added);
    // SAFETY: asks how we were called; nothing is written through the null.
    let in_aggregate = unsafe { pg_sys::AggCheckCallContext(fcinfo, std::ptr::null_mut()) } != 0;
    // SAFETY: a bytea.
    if in_aggregate && unsafe { varlena::varatt_is_4b_u(sum.cast_mut_ptr()) } {
        // The aggregate's own state, 32 bytes behind a long header: written in place, it need not be copied.
        // SAFETY: `checksum_of` has seen that it is 32 bytes long; inside an aggregate the first argument is
        // the function's to change.
        unsafe {
            let state = sum.cast_mut_ptr::<u8>().add(pg_sys::VARHDRSZ);
            state.copy_from_nonoverlapping(total.to_bytes().as_ptr(), 32);
        }
        return Ok(ByteaDatum(sum));
    }
    Ok(total.to_bytes().into())
}

/// The sum as 64 hexadecimal digits: final function of `checksum`.
#[pg_extern(immutable, parallel_safe)]
fn checksum_text(sum: &[u8]) -> Result<String, ErrorReport> {
    Ok(checksum_of(sum)?.to_string())
}

/// Sum mod 2^256 of 32-byte values; NULLs count nothing, and so does an empty list.
#[pg_extern(immutable, parallel_safe)]
fn checksum_add(parts: VariadicArray<'_, &[u8]>) -> Result<ByteaDatum, ErrorReport> {
    let mut total = Checksum::default();
    for part in parts.iter().flatten() {
        total.merge(&checksum_of(part)?);
    }
    Ok(total.to_bytes().into())
}

// The state is the sum itself, so partial sums combine by being added, as digests are.
extension_sql!(
    r#"
CREATE AGGREGATE checksum(bytea) (
    SFUNC = checksum_accum,
    STYPE = bytea,
    COMBINEFUNC = checksum_accum,
    FINALFUNC = checksum_text,
    INITCOND = E'\\x0000000000000000000000000000000000000000000000000000000000000000',
    PARALLEL = SAFE
);
COMMENT ON AGGREGATE checksum(bytea) IS
    'sum of 32-byte digests mod 2^256 as 64 hexadecimal digits; does not depend on order, NULLs are ignored';
COMMENT ON FUNCTION checksum_text(bytea) IS 'a 32-byte sum as 64 hexadecimal digits; part of the aggregate checksum';
COMMENT ON FUNCTION checksum_add(VARIADIC bytea[]) IS 'sum of 32-byte checksums mod 2^256; NULLs count nothing';
COMMENT ON FUNCTION content_hash_version() IS 'version of the canonical encoding that content_hash uses';
"#,
    name = "hash_functions",
    requires = [content_hash_version, checksum_accum, checksum_text, checksum_add]
);

fn checksum_of(bytes: &[u8]) -> Result<Checksum> {
    bytes.try_into().map(Checksum::from_bytes).map_err(|_| wrong_length(bytes.len()))
}

fn wrong_length(length: usize) -> Error {
    Error::invalid(format!("a checksum is made of values of 32 bytes, not {length}"))
}

/// The payload of a bytea.
///
/// # Safety
/// `datum` is a bytea.
unsafe fn bytes_of<'call>(datum: Datum) -> &'call [u8] {
    // SAFETY: by this function's contract; detoasting gives back its argument if there is nothing to do, and
    // else a copy in the per-call context.
    unsafe {
        let mut pointer = datum.cast_mut_ptr::<pg_sys::varlena>();
        if varlena::varatt_is_1b_e(pointer) || varlena::varatt_is_4b_c(pointer) {
            pointer = pg_sys::pg_detoast_datum_packed(pointer);
        }
        let (start, length) = (varlena::vardata_any(pointer), varlena::varsize_any_exhdr(pointer));
        std::slice::from_raw_parts(start.cast(), length)
    }
}
