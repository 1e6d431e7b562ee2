//! Keys of a target: packed bytes to typed values, and conditions that find rows by key.
//!
//! Names and operators are always written with their schema, so that no search_path decides what a query means.
use std::ffi::CStr;
use std::hash::{DefaultHasher, Hasher};

use pg_dedup_record::key;
use pg_dedup_record::layout::Layout;
use pg_dedup_record::sql::quote_ident;
use pgrx::datum::DatumWithOid;
use pgrx::pg_sys;
use pgrx::prelude::*;

use crate::error::{Error, Result};
use crate::planning::ExactTexts;
use crate::sql::required;

/// A table's name, quoted and qualified.
pub fn qualified_name(relation: pg_sys::Oid) -> String {
    // SAFETY: look-ups by oid; the results are palloc'ed, NUL-terminated strings.
    unsafe {
        let name = pg_sys::get_rel_name(relation);
        let schema = pg_sys::get_namespace_name(pg_sys::get_rel_namespace(relation));
        if name.is_null() || schema.is_null() {
            return format!("{}", relation.to_u32());
        }
        CStr::from_ptr(pg_sys::quote_qualified_identifier(schema, name)).to_string_lossy().into_owned()
    }
}

/// A hash that tells keys apart, within one call or one pass over the data; it is kept no longer than that.
pub fn hash_of(parts: &[&[u8]]) -> u64 {
    let mut hasher = DefaultHasher::new();
    parts.iter().for_each(|part| hasher.write(part));
    hasher.finish()
}

/// The layout's columns of the row source `alias`, in COPY order.
pub fn column_list(layout: &Layout, alias: &str) -> String {
    let columns: Vec<String> =
        layout.columns.iter().map(|c| format!("{alias}.{}", quote_ident(&c.name))).collect();
    columns.join(", ")
}

/// The query of every row of a table, as `t`, in COPY order.
pub fn every_row(layout: &Layout, table: pg_sys::Oid) -> String {
    format!("SELECT {} FROM {} AS t", column_list(layout, "t"), qualified_name(table))
}

/// A half-open key range in the target's own order.
#[derive(Clone, Debug)]
pub struct KeyRange {
    /// First key in it, one text a key column; `None`: open.
    pub lower: Option<Vec<String>>,
    /// First key past it; `None`: open.
    pub upper: Option<Vec<String>>,
}

/// One key column's type.
#[derive(Clone, Debug)]
struct KeyType {
    column: String,
    type_name: String,
    oid: pg_sys::Oid,
    typmod: i32,
    array: pg_sys::Oid,
    length: i16,
    by_value: bool,
    alignment: i8,
    receive: pg_sys::Oid,
    receive_param: pg_sys::Oid,
    output: pg_sys::Oid,
    /// `OPERATOR(schema.=)`
    equals: String,
}

/// The key columns' types, in key order.
#[derive(Clone, Debug)]
pub struct KeyTypes(Vec<KeyType>);

impl KeyTypes {
    /// Looks up the key columns of `layout` in `target`.
    ///
    /// # Errors
    /// 42703 when a column is gone, 42883 for a type without equality or binary input.
    pub fn of(target: pg_sys::Oid, layout: &Layout) -> Result<Self> {
        layout.key.iter().map(|&i| KeyType::of(target, &layout.columns[i])).collect::<Result<_>>().map(Self)
    }

    /// May two equal values of the layout's column `index` differ in their bytes? For the commonest key types they cannot.
    pub fn may_differ(&self, index: usize, layout: &Layout) -> bool {
        let column = layout.key.iter().position(|&i| i == index);
        column.and_then(|at| self.0.get(at)).is_some_and(|key_type| {
            !matches!(
                key_type.oid,
                pg_sys::INT2OID
                    | pg_sys::INT4OID
                    | pg_sys::INT8OID
                    | pg_sys::UUIDOID
                    | pg_sys::DATEOID
                    | pg_sys::TIMESTAMPOID
                    | pg_sys::TIMESTAMPTZOID
                    | pg_sys::BYTEAOID
            )
        })
    }

    /// An array of each key column, from packed keys: what `unnest` takes.
    ///
    /// # Errors
    /// 22P03 when a key's bytes are not what its type sends.
    pub fn arrays(&self, keys: &[&[u8]]) -> Result<Vec<DatumWithOid<'static>>> {
        let mut columns: Vec<Vec<pg_sys::Datum>> =
            self.0.iter().map(|_| Vec::with_capacity(keys.len())).collect();
        for packed in keys {
            let parts = key::decode(self.0.len(), packed)
                .map_err(|e| Error::invalid(format!("malformed key: {e}")))?;
            for ((column, key_type), part) in columns.iter_mut().zip(&self.0).zip(parts) {
                column.push(key_type.receive(part));
            }
        }
        Ok(self
            .0
            .iter()
            .zip(columns)
            .map(|(key_type, mut values)| {
                // SAFETY: values are of the element type described by length, by_value and alignment.
                let array = unsafe {
                    pg_sys::construct_array(
                        values.as_mut_ptr(),
                        values.len() as i32,
                        key_type.oid,
                        key_type.length.into(),
                        key_type.by_value,
                        key_type.alignment,
                    )
                };
                // SAFETY: the array was just made, of this type, in the current memory context.
                unsafe { DatumWithOid::new(pg_sys::Datum::from(array), key_type.array) }
            })
            .collect())
    }

    /// Of each key column an array of these keys' values, in the text form of arrays.
    ///
    /// # Errors
    /// As [`KeyTypes::arrays`].
    pub fn texts(&self, keys: &[Vec<u8>]) -> Result<Vec<String>> {
        let _texts = ExactTexts::new();
        let columns: Vec<String> = (1..=self.0.len())
            .map(|i| format!("pg_catalog.array_agg(k.k{i}::pg_catalog.text ORDER BY k.n)::pg_catalog.text"))
            .collect();
        let keys: Vec<&[u8]> = keys.iter().map(Vec::as_slice).collect();
        let query = format!("SELECT ARRAY[{}] FROM {}", columns.join(", "), self.unnest());
        required(Spi::get_one_with_args(&query, &self.arrays(&keys)?)?)
    }

    /// `unnest($1, …) WITH ORDINALITY AS k(k1, …, n)`, for the arrays of [`KeyTypes::arrays`].
    pub fn unnest(&self) -> String {
        let parameters: Vec<String> = (1..=self.0.len()).map(|i| format!("${i}")).collect();
        let names: Vec<String> = (1..=self.0.len()).map(|i| format!("k{i}")).collect();
        format!(
            "ROWS FROM (pg_catalog.unnest({})) WITH ORDINALITY AS k({}, n)",
            parameters.join("), pg_catalog.unnest("),
            names.join(", ")
        )
    }

    /// `t.a = k.k1 AND …`, with the operators of the key's types.
    pub fn join_condition(&self) -> String {
        self.join_condition_of("t")
    }

    /// The same for the row source `alias`.
    pub fn join_condition_of(&self, alias: &str) -> String {
        let parts: Vec<String> = self
            .0
            .iter()
            .enumerate()
            .map(|(i, k)| format!("{alias}.{} {} k.k{}", quote_ident(&k.column), k.equals, i + 1))
            .collect();
        parts.join(" AND ")
    }

    /// `a.key = b.key` for two row sources that both have the key columns.
    pub fn same_key_condition(&self, a: &str, b: &str) -> String {
        let parts: Vec<String> = self
            .0
            .iter()
            .map(|k| {
                let column = quote_ident(&k.column);
                format!("{a}.{column} {} {b}.{column}", k.equals)
            })
            .collect();
        parts.join(" AND ")
    }

    /// A condition on `t` for a key range (`true` where there is none), and its text parameters.
    pub fn range_condition(&self, layout: &Layout, range: Option<&KeyRange>) -> (String, Vec<String>) {
        let columns: Vec<String> =
            layout.key.iter().map(|&i| format!("t.{}", quote_ident(&layout.columns[i].name))).collect();
        let mut parts = Vec::new();
        let mut arguments = Vec::new();
        let bounds = range.map(|r| [(">=", &r.lower), ("<", &r.upper)]);
        for (operator, bound) in bounds.into_iter().flatten() {
            let Some(bound) = bound else { continue };
            let values: Vec<String> = bound
                .iter()
                .zip(&self.0)
                .map(|(value, key_type)| {
                    arguments.push(value.clone());
                    format!("${}::pg_catalog.text::{}", arguments.len(), key_type.type_name)
                })
                .collect();
            parts.push(if columns.len() == 1 {
                format!("{} OPERATOR(pg_catalog.{operator}) {}", columns[0], values[0])
            } else {
                // Ranges are only used for built-in types, whose comparison operators are those of pg_catalog.
                format!("ROW({}) {operator} ROW({})", columns.join(", "), values.join(", "))
            });
        }
        if parts.is_empty() { ("true".to_owned(), arguments) } else { (parts.join(" AND "), arguments) }
    }

    /// `column=value&column=value`, percent-encoded, as locations have it.
    ///
    /// # Errors
    /// 22P03 when the bytes are not what the types send.
    pub fn query_string(&self, packed: &[u8]) -> Result<String> {
        let parts =
            key::decode(self.0.len(), packed).map_err(|e| Error::corrupted(format!("malformed key: {e}")))?;
        let parts: Vec<String> = self
            .0
            .iter()
            .zip(parts)
            .map(|(k, part)| {
                format!("{}={}", percent_encode(&k.column), percent_encode(&k.print(k.receive(part))))
            })
            .collect();
        Ok(parts.join("&"))
    }
}

impl KeyType {
    fn of(target: pg_sys::Oid, column: &pg_dedup_record::layout::Column) -> Result<Self> {
        let name = std::ffi::CString::new(column.name.as_str())
            .map_err(|_| Error::invalid("a column name holds a zero byte"))?;
        // SAFETY: catalog look-ups by oid and name; every out pointer is ours.
        unsafe {
            let number = pg_sys::get_attnum(target, name.as_ptr());
            if number <= 0 {
                return Err(Error::new(
                    pgrx::PgSqlErrorCode::ERRCODE_UNDEFINED_COLUMN,
                    format!(
                        "column {} of {} does not exist",
                        quote_ident(&column.name),
                        qualified_name(target)
                    ),
                ));
            }
            let (mut oid, mut typmod, mut collation) = (pg_sys::InvalidOid, -1, pg_sys::InvalidOid);
            pg_sys::get_atttypetypmodcoll(target, number, &mut oid, &mut typmod, &mut collation);
            let (mut length, mut by_value, mut alignment) = (0i16, false, 0i8);
            pg_sys::get_typlenbyvalalign(oid, &mut length, &mut by_value, &mut alignment);
            let (mut receive, mut receive_param) = (pg_sys::InvalidOid, pg_sys::InvalidOid);
            pg_sys::getTypeBinaryInputInfo(oid, &mut receive, &mut receive_param);
            let (mut output, mut is_varlena) = (pg_sys::InvalidOid, false);
            pg_sys::getTypeOutputInfo(oid, &mut output, &mut is_varlena);
            let entry = pg_sys::lookup_type_cache(oid, pg_sys::TYPECACHE_EQ_OPR as i32);
            let equals = (*entry).eq_opr;
            let array = pg_sys::get_array_type(oid);
            if equals == pg_sys::InvalidOid || array == pg_sys::InvalidOid {
                return Err(Error::new(
                    pgrx::PgSqlErrorCode::ERRCODE_UNDEFINED_FUNCTION,
                    format!("key column {} has a type without equality", quote_ident(&column.name)),
                ));
            }
            Ok(Self {
                column: column.name.clone(),
                type_name: column.type_name.clone(),
                oid,
                typmod,
                array,
                length,
                by_value,
                alignment: alignment as _,
                receive,
                receive_param,
                output,
                equals: operator_name(equals),
            })
        }
    }

    fn receive(&self, bytes: &[u8]) -> pg_sys::Datum {
        let mut buffer = bytes.to_vec();
        // Receive functions expect a zero byte behind the data.
        buffer.push(0);
        let mut message = pg_sys::StringInfoData {
            data: buffer.as_mut_ptr().cast(),
            len: bytes.len() as i32,
            maxlen: buffer.len() as i32,
            cursor: 0,
        };
        // SAFETY: the message is ours and outlives the call; the function is the type's own receive function.
        unsafe { pg_sys::OidReceiveFunctionCall(self.receive, &mut message, self.receive_param, self.typmod) }
    }

    fn print(&self, value: pg_sys::Datum) -> String {
        // SAFETY: the function is the type's own output function; the result is a palloc'ed string.
        unsafe {
            CStr::from_ptr(pg_sys::OidOutputFunctionCall(self.output, value)).to_string_lossy().into_owned()
        }
    }
}

/// `OPERATOR(schema.name)` of an operator.
fn operator_name(operator: pg_sys::Oid) -> String {
    // SAFETY: look-ups by oid of an operator that the type cache named; strings are palloc'ed.
    unsafe {
        let name = CStr::from_ptr(pg_sys::get_opname(operator)).to_string_lossy().into_owned();
        let tuple = pg_sys::SearchSysCache1(pg_sys::SysCacheIdentifier::OPEROID as i32, operator.into());
        let namespace = if tuple.is_null() {
            pg_sys::Oid::from(pg_sys::PG_CATALOG_NAMESPACE)
        } else {
            let form = pg_sys::heap_tuple_get_struct::<pg_sys::FormData_pg_operator>(tuple);
            let namespace = (*form).oprnamespace;
            pg_sys::ReleaseSysCache(tuple);
            namespace
        };
        let schema = CStr::from_ptr(pg_sys::get_namespace_name(namespace)).to_string_lossy().into_owned();
        format!("OPERATOR({}.{name})", quote_ident(&schema))
    }
}

/// Percent-encodes all but unreserved characters.
fn percent_encode(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'~' => out.push(byte as char),
            _ => out.push_str(&format!("%{byte:02X}")),
        }
    }
    out
}
