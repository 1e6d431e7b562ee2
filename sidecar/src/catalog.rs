//! What the catalogs of either server say about a table.
//!
//! Type names are those of `format_type` under `search_path = pg_catalog` (sessions of role Admin), so a name means the
//! same on both sides and can be written into a cast.

use tokio_postgres::Row;

use crate::conn::Session;
use crate::error::{At, Error, Result};
use crate::names::TableName;

/// What sort of relation it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RelationKind {
    /// Ordinary table.
    Table,
    /// Partitioned table.
    Partitioned,
    /// Materialized view.
    MaterializedView,
    /// View.
    View,
    /// Foreign table.
    Foreign,
    /// Anything else: a sequence, an index, a composite type.
    Other,
}

impl RelationKind {
    fn of(code: &str) -> RelationKind {
        match code {
            "r" => RelationKind::Table,
            "p" => RelationKind::Partitioned,
            "m" => RelationKind::MaterializedView,
            "v" => RelationKind::View,
            "f" => RelationKind::Foreign,
            _ => RelationKind::Other,
        }
    }

    /// Whether its rows have positions (`ctid`) and can be sampled by page.
    pub fn has_pages(self) -> bool {
        matches!(self, RelationKind::Table | RelationKind::Partitioned | RelationKind::MaterializedView)
    }
}

/// Families of types that a cast treats differently.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    /// `text`
    Text,
    /// `varchar`, with its length
    Varchar(Option<i32>),
    /// `char(n)`, or `bpchar` without a length
    Bpchar(Option<i32>),
    /// `bit(n)`
    Bit(Option<i32>),
    /// `bit varying`
    Varbit(Option<i32>),
    /// An enum
    Enum,
    /// Array of `varchar`, with the elements' length
    VarcharArray(Option<i32>),
    /// Array of `char(n)`, `bit(n)` or `bit varying(n)` with a length
    SizedArray,
    /// Everything else
    Other,
}

impl Family {
    /// Family of a base type by its OID and type modifier; these OIDs are fixed for all versions of PostgreSQL.
    fn of(oid: u32, typmod: i32, typtype: &str) -> Family {
        // char and varchar store their length plus the four bytes of a header, bit types the length itself.
        let chars = (typmod >= 4).then_some(typmod - 4);
        let bits = (typmod >= 0).then_some(typmod);
        match oid {
            25 => Family::Text,
            1043 => Family::Varchar(chars),
            1042 => Family::Bpchar(chars),
            1560 => Family::Bit(bits),
            1562 => Family::Varbit(bits),
            1015 => Family::VarcharArray(chars),
            1014 | 1561 | 1563 if typmod >= 0 => Family::SizedArray,
            _ if typtype == "e" => Family::Enum,
            _ => Family::Other,
        }
    }
}

/// A column's type with its domains peeled off: their binary form is the base type's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ColumnType {
    /// Name as declared, a domain's name included.
    pub declared: String,
    /// The base type's name with its modifier.
    pub base: String,
    /// What casts have to know.
    pub family: Family,
    /// Whether it can be sent and received in binary.
    pub binary: bool,
    /// Whether it names objects of its own server (`reg*` types).
    pub names_objects: bool,
}

/// A column.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Column {
    /// Name.
    pub name: String,
    /// Type.
    pub kind: ColumnType,
    /// Declared or implied NOT NULL.
    pub not_null: bool,
    /// Identity column.
    pub identity: bool,
    /// Generated column.
    pub generated: bool,
    /// Has a default.
    pub has_default: bool,
    /// Identity, serial or generated uuid.
    pub surrogate: bool,
    /// A foreign key points at it.
    pub referenced: bool,
}

/// A table, view or the like.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Relation {
    /// OID.
    pub oid: u32,
    /// Name.
    pub name: TableName,
    /// Sort.
    pub kind: RelationKind,
    /// Columns in their order.
    pub columns: Vec<Column>,
}

impl Relation {
    /// Reads a relation; `None` if there is none of that name.
    pub async fn find(session: &Session, name: &TableName) -> Result<Option<Relation>> {
        let doing = "reading the catalog";
        let row = session
            .client
            .query_opt(
                "SELECT c.oid, c.relkind::text FROM pg_catalog.pg_class AS c \
                 JOIN pg_catalog.pg_namespace AS n ON n.oid = c.relnamespace WHERE n.nspname = $1 AND c.relname = $2",
                &[&name.schema, &name.table],
            )
            .await
            .at(session.side, doing)?;
        let Some(row) = row else { return Ok(None) };
        let oid: u32 = row.try_get(0).at(session.side, doing)?;
        let kind: String = row.try_get(1).at(session.side, doing)?;
        let rows = session.client.query(COLUMNS, &[&oid]).await.at(session.side, doing)?;
        let columns =
            rows.iter().map(column).collect::<std::result::Result<Vec<_>, _>>().at(session.side, doing)?;
        Ok(Some(Relation { oid, name: name.clone(), kind: RelationKind::of(&kind), columns }))
    }

    /// Reads a relation that must be there.
    pub async fn get(session: &Session, name: &TableName) -> Result<Relation> {
        Relation::find(session, name).await?.ok_or_else(|| {
            Error::new(session.side, crate::error::Kind::Refused, format!("table {name} does not exist"))
                .sqlstate("42P01")
                .hint("names are folded to lower case unless they are quoted")
        })
    }

    /// A column by name.
    pub fn column(&self, name: &str) -> Option<&Column> {
        self.columns.iter().find(|column| column.name == name)
    }
}

/// The tables of a schema that can be migrated, partitions left to their parents.
pub async fn tables_of_schema(session: &Session, schema: &str) -> Result<Vec<TableName>> {
    let rows = session
        .client
        .query(
            "SELECT c.relname::text FROM pg_catalog.pg_class AS c JOIN pg_catalog.pg_namespace AS n ON n.oid = c.relnamespace \
             WHERE n.nspname = $1 AND c.relkind IN ('r', 'p') AND NOT c.relispartition \
             AND NOT EXISTS (SELECT FROM pg_catalog.pg_inherits AS i WHERE i.inhrelid = c.oid) \
             AND NOT EXISTS (SELECT FROM pg_catalog.pg_depend AS d WHERE d.classid = 'pg_catalog.pg_class'::pg_catalog.regclass \
                 AND d.objid = c.oid AND d.deptype = 'e') \
             ORDER BY c.relname",
            &[&schema],
        )
        .await
        .at(session.side, "listing tables")?;
    rows.iter()
        .map(|row| row.try_get::<_, String>(0).map(|table| TableName::new(schema, table)))
        .collect::<std::result::Result<_, _>>()
        .at(session.side, "listing tables")
}

fn column(row: &Row) -> std::result::Result<Column, tokio_postgres::Error> {
    let base_oid: u32 = row.try_get("base_oid")?;
    let typmod: i32 = row.try_get("typmod")?;
    let typtype: String = row.try_get("typtype")?;
    Ok(Column {
        name: row.try_get("name")?,
        kind: ColumnType {
            declared: row.try_get("declared")?,
            base: row.try_get("base")?,
            family: Family::of(base_oid, typmod, &typtype),
            binary: row.try_get("binary")?,
            names_objects: row.try_get("names_objects")?,
        },
        not_null: row.try_get("not_null")?,
        identity: row.try_get("identity")?,
        generated: row.try_get("generated")?,
        has_default: row.try_get("has_default")?,
        surrogate: row.try_get("surrogate")?,
        referenced: row.try_get("referenced")?,
    })
}

/// Columns of a relation. `attgenerated` came with version 12, hence the detour over jsonb.
const COLUMNS: &str = "
WITH RECURSIVE peeled AS (
    SELECT a.attnum, a.atttypid AS typid, a.atttypmod AS typmod, 0 AS depth
    FROM pg_catalog.pg_attribute AS a WHERE a.attrelid = $1 AND a.attnum > 0 AND NOT a.attisdropped
    UNION ALL
    SELECT p.attnum, t.typbasetype, t.typtypmod, p.depth + 1
    FROM peeled AS p JOIN pg_catalog.pg_type AS t ON t.oid = p.typid WHERE t.typtype = 'd'
), base AS (
    SELECT DISTINCT ON (attnum) attnum, typid, typmod, depth FROM peeled ORDER BY attnum, depth DESC
)
SELECT a.attname::text AS name,
    pg_catalog.format_type(a.atttypid, a.atttypmod) AS declared,
    pg_catalog.format_type(b.typid, b.typmod) AS base,
    b.typid AS base_oid, b.typmod, t.typtype::text AS typtype,
    (t.typsend <> 0 AND t.typreceive <> 0) AS binary,
    (t.typname LIKE 'reg%' AND t.typnamespace = 'pg_catalog'::pg_catalog.regnamespace) AS names_objects,
    (a.attnotnull OR EXISTS (SELECT FROM peeled AS p JOIN pg_catalog.pg_type AS d ON d.oid = p.typid
        WHERE p.attnum = a.attnum AND d.typtype = 'd' AND d.typnotnull)) AS not_null,
    (a.attidentity <> '') AS identity,
    (coalesce(pg_catalog.to_jsonb(a) ->> 'attgenerated', '') <> '') AS generated,
    (d.adbin IS NOT NULL) AS has_default,
    (a.attidentity <> '' OR coalesce(pg_catalog.pg_get_expr(d.adbin, d.adrelid)
        ~ '^(nextval\\(|gen_random_uuid\\(\\)|uuidv[47]\\(|([^.(]+\\.)?uuid_generate_v\\d)', false)) AS surrogate,
    EXISTS (SELECT FROM pg_catalog.pg_constraint AS f WHERE f.contype = 'f' AND f.confrelid = a.attrelid
        AND a.attnum = ANY (f.confkey)) AS referenced
FROM pg_catalog.pg_attribute AS a
JOIN base AS b ON b.attnum = a.attnum
JOIN pg_catalog.pg_type AS t ON t.oid = b.typid
LEFT JOIN pg_catalog.pg_attrdef AS d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
WHERE a.attrelid = $1 AND a.attnum > 0 AND NOT a.attisdropped
ORDER BY a.attnum";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn families_know_their_lengths() {
        assert_eq!(Family::of(1043, 9, "b"), Family::Varchar(Some(5)));
        assert_eq!(Family::of(1043, -1, "b"), Family::Varchar(None));
        assert_eq!(Family::of(1560, 3, "b"), Family::Bit(Some(3)));
        assert_eq!(Family::of(1014, 7, "b"), Family::SizedArray);
        assert_eq!(Family::of(1014, -1, "b"), Family::Other);
        assert_eq!(Family::of(99_999, -1, "e"), Family::Enum);
        assert_eq!(Family::of(20, -1, "b"), Family::Other);
    }
}
