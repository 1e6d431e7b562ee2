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

/// What decides about a table's rows: columns, constraints, unique indexes, triggers; names aside.
async fn shape(session: &Session, name: &TableName) -> Result<Option<BTreeSet<String>>> {
    let Some(relation) = Relation::find(session, name).await? else { return Ok(None) };
    let mut shape: BTreeSet<String> = relation
        .columns
        .iter()
        .map(|column| {
            format!(
                "column {} {}{}{}{}",
                column.name,
                column.kind.declared,
                if column.not_null { " not null" } else { "" },
                if column.generated { " generated" } else { "" },
                if column.identity { " identity" } else { "" }
            )
        })
        .collect();
    let doing = "reading constraints";
    let rows = session
        .client
        .query(
            "SELECT pg_catalog.pg_get_constraintdef(oid) FROM pg_catalog.pg_constraint WHERE conrelid = $1 AND contype <> 't' \
             UNION SELECT pg_catalog.substring(pg_catalog.pg_get_indexdef(indexrelid), 'USING .*') || ' (unique index)' \
                 FROM pg_catalog.pg_index WHERE indrelid = $1 AND indisunique AND indisvalid \
             UNION SELECT 'trigger ' || pg_catalog.substring(pg_catalog.pg_get_triggerdef(oid), 'TRIGGER \\S+ (.*)') \
                 FROM pg_catalog.pg_trigger WHERE tgrelid = $1 AND NOT tgisinternal AND tgenabled <> 'D'",
            &[&relation.oid],
        )
        .await
        .at(session.side, doing)?;
    for row in rows {
        shape.insert(row.try_get(0).at(session.side, doing)?);
    }
    Ok(Some(shape))
}
