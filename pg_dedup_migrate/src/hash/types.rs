//! What a column type looks like on the wire, read from the catalog once and before any row.
//!
//! A type is refused here, by name, when its send bytes do not mean the same everywhere: the `reg*` types send
//! OIDs that differ between databases, some types have no binary form at all, and in a SQL_ASCII database
//! nobody knows which characters the bytes of a text stand for.

use crate::error::{Error, Result};
use pg_dedup_record::canonical::Canonical;
use pgrx::pg_sys::{self, Oid};
use pgrx::{IntoDatum, PgTupleDesc, direct_function_call};
use std::ffi::{CStr, c_char};

/// How the values of one type are sent and what of the bytes is hashed.
#[derive(Debug, Clone)]
pub struct SendPlan {
    /// The type itself, below all domains.
    pub base_type: Oid,
    /// How to get at the send bytes.
    pub route: Route,
    /// What to hash of them.
    pub canonical: Canonical,
}

/// Ways to a value's send bytes: read straight from the datum where the stored form says it all, through the
/// type's own send function otherwise.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Route {
    /// Passed by value, sent as that many low bytes in network order.
    Word(u8),
    /// 16 bytes as they stand.
    Uuid,
    /// `int64` microseconds, `int32` days, `int32` months.
    Interval,
    /// `int64` microseconds, `int32` zone.
    TimeTz,
    /// The payload of a varlena as it stands.
    Bytes,
    /// The payload of a varlena, brought to UTF-8.
    Text,
    /// The digits of a `numeric`; through its send function where they are many, and for NaN and infinities.
    Numeric,
    /// The send function.
    Function(Oid),
}

impl Route {
    /// The send function this route may need, if any.
    pub fn function(self) -> Option<Oid> {
        match self {
            Route::Function(function) => Some(function),
            Route::Numeric => Some(Oid::from(pg_sys::F_NUMERIC_SEND)),
            _ => None,
        }
    }

    /// The shortcut for a built-in type; the layouts these rest on have not changed since 8.4 (`numeric`: 9.1)
    /// and cannot without breaking `pg_upgrade`.
    fn shortcut(base_type: Oid) -> Option<Route> {
        Some(match base_type {
            pg_sys::BOOLOID | pg_sys::CHAROID => Route::Word(1),
            pg_sys::INT2OID => Route::Word(2),
            pg_sys::INT4OID | pg_sys::FLOAT4OID | pg_sys::OIDOID | pg_sys::DATEOID => Route::Word(4),
            pg_sys::INT8OID
            | pg_sys::FLOAT8OID
            | pg_sys::TIMEOID
            | pg_sys::TIMESTAMPOID
            | pg_sys::TIMESTAMPTZOID
            | pg_sys::MONEYOID => Route::Word(8),
            pg_sys::UUIDOID => Route::Uuid,
            pg_sys::INTERVALOID => Route::Interval,
            pg_sys::TIMETZOID => Route::TimeTz,
            pg_sys::BYTEAOID => Route::Bytes,
            pg_sys::TEXTOID | pg_sys::VARCHAROID | pg_sys::BPCHAROID | pg_sys::JSONOID => Route::Text,
            pg_sys::NUMERICOID => Route::Numeric,
            _ => return None,
        })
    }
}

/// The types whose values are OIDs of objects in this very database.
const CATALOG_REFERENCES: [Oid; 11] = [
    pg_sys::REGCLASSOID,
    pg_sys::REGPROCOID,
    pg_sys::REGPROCEDUREOID,
    pg_sys::REGOPEROID,
    pg_sys::REGOPERATOROID,
    pg_sys::REGTYPEOID,
    pg_sys::REGROLEOID,
    pg_sys::REGNAMESPACEOID,
    pg_sys::REGCONFIGOID,
    pg_sys::REGDICTIONARYOID,
    pg_sys::REGCOLLATIONOID,
];

/// The plan for values of `type_oid`.
///
/// # Errors
/// 0A000 with a hint for what cannot be hashed (see the module), also where it is only a part of the type;
/// 42704 for a type that does not exist.
pub fn send_plan(type_oid: Oid) -> Result<SendPlan> {
    check_database_encoding()?;
    let mut outer = type_oid;
    let mut entry = TypeEntry::read(outer)?;
    while entry.kind == pg_sys::TYPTYPE_DOMAIN {
        outer = entry.domain_of;
        entry = TypeEntry::read(outer)?;
    }
    let canonical = canonical_form(type_oid).map_err(|refusal| refusal.of_type(type_oid))?;
    let route = Route::shortcut(outer).unwrap_or(Route::Function(entry.send));
    Ok(SendPlan { base_type: outer, route, canonical })
}

/// Refuses databases whose text cannot be brought to UTF-8.
///
/// # Errors
/// 0A000.
pub fn check_database_encoding() -> Result<()> {
    // SAFETY: reads a global of the backend.
    let encoding = unsafe { pg_sys::GetDatabaseEncoding() };
    if encoding != pg_sys::pg_enc::PG_SQL_ASCII as i32 {
        return Ok(());
    }
    Err(Error::unsupported("cannot hash values in a database with encoding SQL_ASCII")
        .detail("The characters that its text stands for are not known, so it cannot be brought to UTF-8.")
        .hint("Use a target database with encoding UTF8."))
}

/// The type that `name` (as [`qualified_name`] writes it) stands for, below all domains.
///
/// # Errors
/// 42704 if there is none.
pub fn base_type_named(name: &str) -> Result<Oid> {
    // SAFETY: to_regtype takes a text and returns an OID or NULL; both are what the conversion expects.
    let named: Option<Oid> = unsafe { direct_function_call(pg_sys::to_regtype, &[name.into_datum()]) };
    named.map(base_type).ok_or_else(|| Error::undefined(format!("type \"{name}\" does not exist")))
}

/// The type below all domains.
pub fn base_type(type_oid: Oid) -> Oid {
    // SAFETY: a catalog look-up; raises an ERROR for an OID that is no type.
    unsafe { pg_sys::getBaseType(type_oid) }
}

/// The type's name with its modifier, qualified so that it reads the same under any `search_path`.
pub fn qualified_name(type_oid: Oid, typmod: i32) -> String {
    let flags = pg_sys::FORMAT_TYPE_TYPEMOD_GIVEN
        | pg_sys::FORMAT_TYPE_ALLOW_INVALID
        | pg_sys::FORMAT_TYPE_FORCE_QUALIFY;
    // SAFETY: with ALLOW_INVALID the result is a palloc'd string for every OID.
    unsafe { owned_string(pg_sys::format_type_extended(type_oid, typmod, flags as _)) }
}

/// The type's name for a message.
pub fn display_name(type_oid: Oid) -> String {
    // SAFETY: the result is a palloc'd string for every OID ("???" for one that is no type).
    unsafe { owned_string(pg_sys::format_type_be(type_oid)) }
}

/// Is this the row type of a table, view or the like, rather than a type made by CREATE TYPE?
pub fn is_table_row(type_oid: Oid) -> bool {
    // SAFETY: catalog look-ups that answer InvalidOid and 0 for what they do not find.
    let relkind = unsafe { pg_sys::get_rel_relkind(pg_sys::get_typ_typrelid(base_type(type_oid))) };
    relkind != 0 && relkind as u8 != pg_sys::RELKIND_COMPOSITE_TYPE
}

/// Copies a palloc'd C string and frees it.
///
/// # Safety
/// `pointer` is a NUL-terminated palloc'd string that nobody else uses.
unsafe fn owned_string(pointer: *mut c_char) -> String {
    // SAFETY: by this function's contract. Names are in the database's encoding; messages show what can be shown.
    let text = unsafe { CStr::from_ptr(pointer) }.to_string_lossy().into_owned();
    // SAFETY: palloc'd and no longer used.
    unsafe { pg_sys::pfree(pointer.cast()) };
    text
}

/// What the walk needs of a `pg_type` row.
struct TypeEntry {
    kind: u8,
    defined: bool,
    send: Oid,
    domain_of: Oid,
}

impl TypeEntry {
    fn read(type_oid: Oid) -> Result<TypeEntry> {
        let cache = pg_sys::SysCacheIdentifier::TYPEOID as i32;
        let Some(key) = type_oid.into_datum() else {
            return Err(Error::undefined("type with OID 0 does not exist"));
        };
        // SAFETY: the cache TYPEOID has one key, an OID.
        let tuple = unsafe { pg_sys::SearchSysCache1(cache, key) };
        if tuple.is_null() {
            return Err(Error::undefined(format!("type with OID {} does not exist", type_oid.to_u32())));
        }
        // SAFETY: a tuple of this cache is a pg_type row, whose fixed part is FormData_pg_type.
        let row = unsafe { &*pg_sys::heap_tuple_get_struct::<pg_sys::FormData_pg_type>(tuple) };
        let entry = TypeEntry {
            kind: row.typtype as u8,
            defined: row.typisdefined,
            send: row.typsend,
            domain_of: row.typbasetype,
        };
        // SAFETY: the pin taken above; `row` is not used any more.
        unsafe { pg_sys::ReleaseSysCache(tuple) };
        Ok(entry)
    }
}

/// Why a type, or a part of it, cannot be hashed; or that looking failed.
enum Refusal {
    /// The part at fault, why, and what to do.
    Unhashable {
        part: Oid,
        why: String,
        hint: &'static str,
    },
    Failed(Error),
}

impl From<Error> for Refusal {
    fn from(error: Error) -> Self {
        Refusal::Failed(error)
    }
}

impl Refusal {
    /// The error to report when `whole` was asked for.
    fn of_type(self, whole: Oid) -> Error {
        match self {
            Refusal::Failed(error) => error,
            Refusal::Unhashable { part, why, hint } => {
                let mut error =
                    Error::unsupported(format!("cannot hash values of type {}", display_name(whole)));
                if part != whole {
                    error = error.detail(format!("It is made of type {}: {why}.", display_name(part)));
                } else {
                    error = error.detail(format!("{}{}.", why[..1].to_uppercase(), &why[1..]));
                }
                error.hint(hint)
            }
        }
    }
}

const HINT_TEXT: &str = "Leave the column out of the content columns, or change it to type text.";

/// Walks a type down to its leaves.
fn canonical_form(type_oid: Oid) -> Result<Canonical, Refusal> {
    // SAFETY: raises an ERROR when the stack is nearly used up, as the recursion below might bring about.
    unsafe { pg_sys::check_stack_depth() };
    let entry = TypeEntry::read(type_oid)?;
    let refuse = |why: String, hint| Err(Refusal::Unhashable { part: type_oid, why, hint });
    if !entry.defined {
        return refuse("it is only a shell".into(), "Complete the type with CREATE TYPE.");
    }
    if entry.kind == pg_sys::TYPTYPE_PSEUDO {
        return refuse("it is a pseudo-type".into(), "Cast the value to the type it is stored in.");
    }
    if CATALOG_REFERENCES.contains(&type_oid) {
        return refuse("its values are OIDs, which differ between databases".into(), HINT_TEXT);
    }
    if entry.kind == pg_sys::TYPTYPE_DOMAIN {
        return canonical_form(entry.domain_of);
    }
    if entry.send == Oid::INVALID {
        return refuse("it has no binary send function".into(), HINT_TEXT);
    }
    match entry.kind {
        pg_sys::TYPTYPE_COMPOSITE => {
            let attributes = attribute_types(type_oid);
            let forms = attributes.into_iter().map(canonical_form).collect::<Result<Vec<_>, _>>()?;
            Ok(Canonical::composite(forms))
        }
        pg_sys::TYPTYPE_RANGE => {
            // SAFETY: a catalog look-up.
            let subtype = unsafe { pg_sys::get_range_subtype(type_oid) };
            Ok(Canonical::range(canonical_form(subtype)?))
        }
        pg_sys::TYPTYPE_MULTIRANGE => {
            // SAFETY: catalog look-ups.
            let subtype = unsafe { pg_sys::get_range_subtype(pg_sys::get_multirange_range(type_oid)) };
            Ok(Canonical::multirange(canonical_form(subtype)?))
        }
        _ => {
            // SAFETY: a catalog look-up; InvalidOid for what is not a true array.
            let element = unsafe { pg_sys::get_element_type(type_oid) };
            if element == Oid::INVALID {
                return Ok(Canonical::Verbatim);
            }
            Ok(Canonical::array(canonical_form(element)?))
        }
    }
}

/// The types of a composite type's attributes, in order; dropped ones are not sent and not listed.
fn attribute_types(type_oid: Oid) -> Vec<Oid> {
    // SAFETY: `type_oid` is a composite type; the descriptor is a copy, which PgTupleDesc frees.
    let descriptor =
        unsafe { PgTupleDesc::from_pg_is_copy(pg_sys::lookup_rowtype_tupdesc_copy(type_oid, -1)) };
    descriptor
        .iter()
        .filter(|attribute| !attribute.attisdropped)
        .map(|attribute| attribute.atttypid)
        .collect()
}
