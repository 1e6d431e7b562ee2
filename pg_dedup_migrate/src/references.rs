//! Foreign keys that point at a target, and rows that do so through them.
use pgrx::datum::DatumWithOid;
use pgrx::pg_sys;
use pgrx::prelude::*;

use crate::error::{Error, Result};
use crate::keyset::{KeyTypes, qualified_name};
use crate::planning::ByIndex;
use crate::sql::required;

/// Which foreign keys are asked for.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Which {
    /// All.
    All,
    /// Those whose rows are changed when the row they point at is deleted: ON DELETE CASCADE, SET NULL, SET DEFAULT.
    ChangedByDeletion,
}

/// A foreign key that points at a target or a partition of it.
pub struct Reference {
    /// Name of the constraint.
    pub constraint: String,
    /// The table that references, quoted and qualified.
    pub referencing: String,
    /// The same.
    pub table: pg_sys::Oid,
    /// Says of a row `t` of the target and a row `r` of the referencing table that the one points at the other.
    pub matches: String,
}

/// The foreign keys that point at `target`.
///
/// # Errors
/// SPI's own.
pub fn of(target: pg_sys::Oid, which: Which) -> Result<Vec<Reference>> {
    Spi::connect(|client| {
        client
            .select(
                "SELECT c.conname::text AS name, r.oid AS relation, pg_catalog.format('%I.%I', n.nspname, r.relname) AS referencing, \
                    (SELECT pg_catalog.string_agg(pg_catalog.format('t.%I OPERATOR(%I.%s) r.%I', p.attname, os.nspname, o.oprname, f.attname), ' AND ') \
                     FROM ROWS FROM (pg_catalog.unnest(c.confkey), pg_catalog.unnest(c.conkey), pg_catalog.unnest(c.conpfeqop)) AS k(referenced, own, operator) \
                     JOIN pg_catalog.pg_attribute AS p ON p.attrelid = c.confrelid AND p.attnum = k.referenced \
                     JOIN pg_catalog.pg_attribute AS f ON f.attrelid = c.conrelid AND f.attnum = k.own \
                     JOIN pg_catalog.pg_operator AS o ON o.oid = k.operator JOIN pg_catalog.pg_namespace AS os ON os.oid = o.oprnamespace) \
                    || CASE WHEN c.confrelid <> $1 THEN pg_catalog.format( \
                        ' AND t.tableoid IN (SELECT p.relid FROM pg_catalog.pg_partition_tree(%s) AS p)', c.confrelid) ELSE '' END AS matches \
                 FROM pg_catalog.pg_constraint AS c JOIN pg_catalog.pg_class AS r ON r.oid = c.conrelid \
                 JOIN pg_catalog.pg_namespace AS n ON n.oid = r.relnamespace \
                 WHERE c.contype = 'f' AND (c.confrelid = $1 OR c.confrelid IN (SELECT p.relid FROM pg_catalog.pg_partition_tree($1) AS p)) \
                     AND ($2 OR c.confdeltype IN ('c', 'n', 'd')) AND c.conparentid = 0 \
                 ORDER BY c.conname, r.oid",
                None,
                &[target.into(), (which == Which::All).into()],
            )?
            .map(|row| {
                Ok(Reference {
                    constraint: required(row["name"].value()?)?,
                    referencing: required(row["referencing"].value()?)?,
                    table: required(row["relation"].value()?)?,
                    matches: required(row["matches"].value()?)?,
                })
            })
            .collect()
    })
}

/// Refuses to delete rows that other rows point at, as things are now; the rows are locked, so that none comes to.
///
/// # Errors
/// 23503 naming constraint and table.
pub fn refuse_pointed_at(table: pg_sys::Oid, key_types: &KeyTypes, keys: &[&[u8]]) -> Result<()> {
    let arguments = key_types.arrays(keys)?;
    let (unnest, condition) = (key_types.unnest(), key_types.join_condition());
    let name = qualified_name(table);
    let _plan = ByIndex::new();
    for reference in of(table, Which::All)? {
        // Rows of the table itself that go along may point at each other.
        let itself = if reference.table == table {
            format!(" AND NOT EXISTS (SELECT FROM {unnest} WHERE {})", key_types.join_condition_of("r"))
        } else {
            String::new()
        };
        if reference.points_at(&name, &unnest, &condition, &itself, &arguments)? {
            return Err(reference.violated(&name));
        }
    }
    Ok(())
}

impl Reference {
    /// 23503: rows point at rows of `target` that are to be deleted.
    pub fn violated(&self, target: &str) -> Error {
        Error::new(
            PgSqlErrorCode::ERRCODE_FOREIGN_KEY_VIOLATION,
            format!(
                "rows of {} point at rows of {target} through foreign key constraint \"{}\"",
                self.referencing, self.constraint
            ),
        )
        .hint("Delete those rows, or have them point elsewhere, then go on.")
    }

    /// Whether a row `r` points at one of the rows `t` of `target` that `condition` finds for `keys`, whose parameters are `arguments`. `further`
    /// is empty, or another condition, with AND before it.
    ///
    /// # Errors
    /// SPI's own.
    pub fn points_at(
        &self,
        target: &str,
        keys: &str,
        condition: &str,
        further: &str,
        arguments: &[DatumWithOid<'_>],
    ) -> Result<bool> {
        let query = format!(
            "SELECT EXISTS (SELECT FROM {keys} JOIN {target} AS t ON {condition} JOIN {} AS r ON {}{further})",
            self.referencing, self.matches
        );
        required(Spi::get_one_with_args(&query, arguments)?)
    }
}
