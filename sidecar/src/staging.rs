//! `run --staging`: the same run into another database, whose tables have to be like the target's: else it would prove nothing.

use std::collections::BTreeSet;

use crate::catalog::Relation;
use crate::config::Job;
use crate::conn::{Endpoint, Role, Session};
use crate::error::{At, Error, Result, Side};
use crate::names::TableName;
use crate::run::Ends;
use crate::{runs, setup};

/// Checks that staging is another database than the target, with the same tables. `ends` go to staging.
pub async fn check(job: &Job, target: &str, source: &Session, ends: &Ends) -> Result<()> {
    let endpoint = Endpoint::resolve(Side::Target, target)?;
    let target = endpoint.connect(Role::Admin).await?;
    let (wanted, staging) = (runs::identity(&target).await?, runs::identity(&ends.admin).await?);
    // Where clusters may not be told apart, their addresses have to do.
    let known = !wanted.starts_with('-');
    if wanted == staging && (known || endpoint.place() == ends.target.place()) {
        return Err(Error::usage("--staging names the target itself")
            .hint("give the staging database with --staging, and the one that it stands for with --target"));
    }
    for (_, name) in setup::named_tables(job, source).await? {
        let Some(wanted) = shape(&target, &name).await? else {
            return Err(
                Error::refused(format!("table {name} does not exist in the target")).sqlstate("42P01")
            );
        };
        let Some(staged) = shape(&ends.admin, &name).await? else {
            return Err(Error::refused(format!("table {name} does not exist in the staging database"))
                .sqlstate("42P01")
                .hint(format!("pg_dump --schema-only --table='{}' TARGET | psql STAGING", name.quoted())));
        };
        let differences: Vec<String> =
            [("only in the target", &wanted, &staged), ("only in staging", &staged, &wanted)]
                .iter()
                .flat_map(|(where_, ours, theirs)| {
                    ours.difference(theirs).map(move |what| format!("{what} ({where_})"))
                })
                .collect();
        if !differences.is_empty() {
            return Err(Error::refused(format!("table {name} is another one in the staging database"))
                .detail(differences.join("; "))
                .hint("make it as the target's is: what is tried on it would tell nothing"));
        }
    }
    tracing::info!("staging: {} stands for {}", ends.target.place(), endpoint.place());
    Ok(())
}

/// What decides about a table's rows, and those of its partitions: columns and their types, defaults, constraints, unique indexes, triggers, row
/// security. Names aside, but for those of columns and types.
async fn shape(session: &Session, name: &TableName) -> Result<Option<BTreeSet<String>>> {
    let Some(relation) = Relation::find(session, name).await? else { return Ok(None) };
    let doing = "reading the shape of a table";
    let rows = session
        .client
        .query(
            "WITH tree AS (SELECT p.relid, CASE WHEN p.relid = $1::oid THEN '' ELSE \
                     pg_catalog.format('partition %s: ', pg_catalog.pg_get_expr(c.relpartbound, c.oid)) END AS place \
                 FROM (SELECT $1::oid::regclass AS relid UNION SELECT relid FROM pg_catalog.pg_partition_tree($1::oid::regclass)) AS p JOIN pg_catalog.pg_class AS c ON c.oid = p.relid), \
             attribute AS (SELECT t.place, a.*, CASE WHEN e.typelem <> 0 AND e.typcategory = 'A' THEN e.typelem ELSE e.oid END AS type \
                 FROM tree AS t JOIN pg_catalog.pg_attribute AS a ON a.attrelid = t.relid AND a.attnum > 0 AND NOT a.attisdropped \
                     JOIN pg_catalog.pg_type AS e ON e.oid = a.atttypid) \
             SELECT place || pg_catalog.format('table of kind %s%s%s', c.relkind, \
                     CASE WHEN c.relrowsecurity THEN ', row security' ELSE '' END, ', partitioned by ' || pg_catalog.pg_get_partkeydef(c.oid)) \
                 FROM tree JOIN pg_catalog.pg_class AS c ON c.oid = tree.relid \
             UNION SELECT pg_catalog.concat_ws(' ', place || 'column ' || a.attname, pg_catalog.format_type(a.atttypid, a.atttypmod), \
                     'collate ' || nullif(a.attcollation, 0)::pg_catalog.regcollation, CASE WHEN a.attnotnull THEN 'not null' END, \
                     CASE WHEN a.attidentity <> '' THEN 'identity' END, CASE WHEN a.attgenerated <> '' THEN 'generated' ELSE 'default' END || ' ' || \
                     (SELECT pg_catalog.pg_get_expr(d.adbin, d.adrelid) FROM pg_catalog.pg_attrdef AS d WHERE d.adrelid = a.attrelid AND d.adnum = a.attnum)) \
                 FROM attribute AS a \
             UNION SELECT pg_catalog.format('enum %s: %s', pg_catalog.format_type(e.enumtypid, NULL), pg_catalog.string_agg(e.enumlabel, ', ' ORDER BY e.enumsortorder)) \
                 FROM pg_catalog.pg_enum AS e WHERE e.enumtypid IN (SELECT type FROM attribute) GROUP BY e.enumtypid \
             UNION SELECT pg_catalog.concat_ws(' ', 'domain', pg_catalog.format_type(y.oid, NULL), pg_catalog.format_type(y.typbasetype, y.typtypmod), \
                     CASE WHEN y.typnotnull THEN 'not null' END, \
                     (SELECT pg_catalog.string_agg(pg_catalog.pg_get_constraintdef(c.oid), ' ' ORDER BY pg_catalog.pg_get_constraintdef(c.oid)) \
                      FROM pg_catalog.pg_constraint AS c WHERE c.contypid = y.oid)) \
                 FROM pg_catalog.pg_type AS y WHERE y.typtype = 'd' AND y.oid IN (SELECT type FROM attribute) \
             UNION SELECT place || pg_catalog.pg_get_constraintdef(c.oid) FROM tree JOIN pg_catalog.pg_constraint AS c ON c.conrelid = tree.relid WHERE c.contype <> 't' \
             UNION SELECT place || 'unique index ' || pg_catalog.regexp_replace(pg_catalog.substring(pg_catalog.pg_get_indexdef(i.indexrelid), 'USING .*'), ' WITH \\([^)]*\\)', '') \
                 FROM tree JOIN pg_catalog.pg_index AS i ON i.indrelid = tree.relid WHERE i.indisunique AND i.indisvalid \
             UNION SELECT place || 'trigger ' || pg_catalog.replace(pg_catalog.pg_get_triggerdef(g.oid), pg_catalog.quote_ident(g.tgname), '…') \
                 FROM tree JOIN pg_catalog.pg_trigger AS g ON g.tgrelid = tree.relid WHERE NOT g.tgisinternal AND g.tgenabled <> 'D'",
            &[&relation.oid],
        )
        .await
        .at(session.side, doing)?;
    rows.iter().map(|row| row.try_get(0).at(session.side, doing)).collect::<Result<_>>().map(Some)
}
