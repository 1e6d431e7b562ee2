//! Which columns of a target table make up which digest.

use super::types;
use crate::error::{Error, Result};
use pg_dedup_record::ENCODING_VERSION;
use pg_dedup_record::layout::{Column, Layout};
use pgrx::pg_sys::{self, Oid};
use pgrx::{JsonB, PgSqlErrorCode, PgTupleDesc};
use std::ffi::CStr;

/// The layout of records for table `relid`: `columns` in the order of the COPY stream, of which `key` and
/// `content` name some, each in the order in which it is hashed. A column may be both.
///
/// The types are the target's own, written so that they mean the same under any `search_path`.
///
/// # Errors
/// 42P01 and 42703 for a table or column that does not exist, 42701 for one named twice, 428C9 for a generated
/// column, 22023 for a key or content column that is not among `columns` and for empty content, 0A000 for a
/// type that cannot be hashed.
pub fn target_layout(relid: Oid, columns: &[String], key: &[String], content: &[String]) -> Result<Layout> {
    let table = Table::read(relid)?;
    let described = columns.iter().map(|name| table.column(name)).collect::<Result<Vec<_>>>()?;
    let content = positions(columns, content, "content")?;
    let key = positions(columns, key, "key")?;
    let rest =
        (0..columns.len()).filter(|column| !content.contains(column) && !key.contains(column)).collect();
    let layout = Layout { encoding_version: ENCODING_VERSION, columns: described, content, key, rest };
    layout.validate().map_err(|error| {
        Error::invalid(format!("columns of table \"{}\" make no layout", table.name))
            .detail(format!("{error}."))
    })?;
    Ok(layout)
}

/// A layout as dedup's tables keep it.
///
/// # Errors
/// XX001 when it is none.
pub fn stored_layout(JsonB(layout): JsonB) -> Result<Layout> {
    serde_json::from_value(layout).map_err(|e| Error::corrupted(format!("unreadable layout: {e}")))
}

/// Where each of `names` stands among `columns`.
fn positions(columns: &[String], names: &[String], role: &str) -> Result<Vec<usize>> {
    let mut found = Vec::with_capacity(names.len());
    for name in names {
        let position = columns.iter().position(|column| column == name).ok_or_else(|| {
            Error::invalid(format!("{role} column \"{name}\" is not among the columns to migrate"))
        })?;
        if found.contains(&position) {
            return Err(named_twice(name));
        }
        found.push(position);
    }
    Ok(found)
}

fn named_twice(name: &str) -> Error {
    Error::new(PgSqlErrorCode::ERRCODE_DUPLICATE_COLUMN, format!("column \"{name}\" is named more than once"))
}

/// What `pg_attribute` says about a table.
struct Table {
    name: String,
    attributes: Vec<Attribute>,
}

struct Attribute {
    name: String,
    type_oid: Oid,
    typmod: i32,
    generated: bool,
}

impl Table {
    fn read(relid: Oid) -> Result<Table> {
        // SAFETY: answers null if there is no such relation; the lock is kept until the transaction ends, so
        // that what is read here stays true.
        let relation = unsafe { pg_sys::try_relation_open(relid, pg_sys::AccessShareLock as _) };
        if relation.is_null() {
            return Err(Error::new(
                PgSqlErrorCode::ERRCODE_UNDEFINED_TABLE,
                format!("relation with OID {} does not exist", relid.to_u32()),
            ));
        }
        // SAFETY: the relation is open until it is closed below; the descriptor is its own and not released
        // by the wrapper.
        let table = unsafe {
            let name = name_of(&(*(*relation).rd_rel).relname);
            let descriptor = PgTupleDesc::from_pg_unchecked((*relation).rd_att);
            let attributes =
                descriptor.iter().filter(|attribute| !attribute.attisdropped).map(Attribute::read);
            Table { name, attributes: attributes.collect() }
        };
        // SAFETY: opened above; nothing of it is referred to any more.
        unsafe { pg_sys::relation_close(relation, pg_sys::NoLock as _) };
        Ok(table)
    }

    fn column(&self, name: &str) -> Result<Column> {
        let attribute = self.attributes.iter().find(|attribute| attribute.name == name).ok_or_else(|| {
            Error::new(
                PgSqlErrorCode::ERRCODE_UNDEFINED_COLUMN,
                format!("column \"{name}\" of table \"{}\" does not exist", self.name),
            )
        })?;
        if attribute.generated {
            return Err(Error::new(
                PgSqlErrorCode::ERRCODE_GENERATED_ALWAYS,
                format!("column \"{name}\" of table \"{}\" is generated", self.name),
            )
            .hint("Leave it out: the target computes it from the other columns."));
        }
        let plan = types::send_plan(attribute.type_oid)
            .map_err(|error| error.hint(format!("Leave out column \"{name}\", or change its type.")))?;
        Ok(Column {
            name: attribute.name.clone(),
            type_name: types::qualified_name(attribute.type_oid, attribute.typmod),
            canonical: plan.canonical,
        })
    }
}

impl Attribute {
    fn read(form: &pg_sys::FormData_pg_attribute) -> Attribute {
        Attribute {
            name: name_of(&form.attname),
            type_oid: form.atttypid,
            typmod: form.atttypmod,
            generated: form.attgenerated != 0,
        }
    }
}

fn name_of(name: &pg_sys::NameData) -> String {
    // SAFETY: a NameData is NUL-terminated within its 64 bytes.
    unsafe { CStr::from_ptr(name.data.as_ptr()) }.to_string_lossy().into_owned()
}
