//! Going on with a run: what may differ from the first time, and what may not.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde_json::json;

use crate::cli::Verify;
use crate::config::{AlertOptions, Job, ThrottleOptions};
use crate::conn::{Endpoint, Session};
use crate::error::{At, Error, Kind, Result, Side};
use crate::runs::{self, Run};
use crate::setup;
use crate::tables::{self, TableWork};

/// Checks that a run may be gone on with, and makes it ready. Answers the session that keeps a new snapshot, if one was
/// needed.
pub async fn resume(
    job: &Job,
    run: &Run,
    endpoint: &Arc<Endpoint>,
    source: &Session,
    target: &Session,
) -> Result<Option<Session>> {
    match run.status.as_str() {
        "created" | "running" | "paused" | "failed" | "done" | "reconciled" => {}
        "halted" => {
            return Err(Error::here(
                Kind::Halted,
                format!("run {} is halted: a reconciliation found mismatches", run.run_id),
            )
            .hint(format!(
                "pg-dedup-migrate repair {0} sets it right, rollback {0} takes it back",
                run.run_id
            )));
        }
        other => {
            return Err(Error::refused(format!("run {} is {other} and can't be gone on with", run.run_id)));
        }
    }
    let tables = tables::load(target, run.run_id).await?;
    let identity = runs::identity(source).await?;
    let before = run.settings.get("source").and_then(|source| source.as_str()).unwrap_or(&identity);
    let mut differences = Vec::new();
    if before != identity {
        differences.push(format!("source: the run's is {before}, this one is {identity}"));
    }
    if job.verify.is_some_and(|verify| verify != run.verify) {
        let when = if run.verify == Verify::End { "at its end" } else { "chunk by chunk" };
        differences.push(format!("--verify: the run is verified {when}"));
    }
    differences.extend(differences_in_tables(job, &tables.into_values().collect::<Vec<_>>()));
    if !differences.is_empty() {
        return Err(Error::refused(format!("run {} was created for another job", run.run_id))
            .detail(differences.join("; "))
            .hint("resume it without naming tables, or start a new run"));
    }
    if job.throttle != ThrottleOptions::default() || job.alerts != AlertOptions::default() {
        let changes = json!({"throttle": job.throttle, "alerts": job.alerts});
        target
            .client
            .execute("SELECT dedup.change_settings($1::uuid, $2::jsonb)", &[&run.run_id, &changes])
            .await
            .at(Side::Target, "change_settings")?;
    }
    if matches!(run.status.as_str(), "paused" | "failed") {
        target
            .client
            .execute("SELECT dedup.resume_run($1::uuid)", &[&run.run_id])
            .await
            .at(Side::Target, "resume_run")?;
    }
    renew_snapshot(run, endpoint, target).await
}

/// What a resumed job says differently. Workers and rates may change; what was planned may not.
fn differences_in_tables(job: &Job, tables: &[TableWork]) -> Vec<String> {
    let known: BTreeMap<&str, &TableWork> =
        tables.iter().map(|table| (table.source.as_str(), table)).collect();
    let mut differences = Vec::new();
    for (source, target) in &job.tables {
        let name = source.to_string();
        let Some(table) = known.get(name.as_str()) else {
            differences.push(format!("{name} is not part of the run"));
            continue;
        };
        if table.target != *target {
            differences.push(format!("{name}: the run's target is {}, not {target}", table.target));
        }
    }
    for (source, options) in &job.options {
        let name = source.to_string();
        let Some(table) = known.get(name.as_str()) else { continue };
        let columns_of = |indexes: &[usize]| -> Vec<String> {
            indexes.iter().map(|&index| table.layout.columns[index].name.clone()).collect()
        };
        let same_set =
            |a: &[String], b: &[String]| a.len() == b.len() && a.iter().all(|name| b.contains(name));
        let content = columns_of(&table.layout.content);
        if options.content_columns.as_ref().is_some_and(|columns| !same_set(columns, &content)) {
            differences.push(format!("{name}: the run's content columns are {}", content.join(", ")));
        }
        if options
            .exclude_columns
            .as_ref()
            .is_some_and(|excluded| excluded.iter().any(|c| content.contains(c)))
        {
            differences.push(format!("{name}: the run's content columns are {}", content.join(", ")));
        }
        let key = columns_of(&table.layout.key);
        if options.key_columns.as_ref().is_some_and(|columns| !same_set(columns, &key)) {
            differences.push(format!("{name}: the run's key columns are {}", key.join(", ")));
        }
        if options.filter.is_some() && options.filter != table.spec.filter {
            let filter = table.spec.filter.as_deref().unwrap_or("none");
            differences.push(format!("{name}: the run's filter is {filter}"));
        }
        for (column, sql) in &options.transforms {
            if table.spec.transforms.get(column) != Some(sql) {
                differences.push(format!("{name}: the run has another transform of {column}, or none"));
            }
        }
    }
    differences
}

/// Positions in a table without a key mean nothing under another snapshot: such a table starts over, and what it has
/// written already is found to be there.
pub async fn renew_snapshot(
    run: &Run,
    endpoint: &Arc<Endpoint>,
    target: &Session,
) -> Result<Option<Session>> {
    let tables = tables::load(target, run.run_id).await?;
    let mut unfinished = Vec::new();
    for table in tables.values().filter(|table| table.spec.snapshot.is_some()) {
        let open: i64 = target
            .client
            .query_one(
                "SELECT count(*) FROM dedup.checkpoints WHERE run_id = $1 AND table_id = $2 AND status <> 'verified' \
                 AND written_at IS NULL",
                &[&run.run_id, &table.table_id],
            )
            .await
            .and_then(|row| row.try_get(0))
            .at(Side::Target, "reading the checkpoints")?;
        if open > 0 {
            unfinished.push(table);
        }
    }
    if unfinished.is_empty() {
        return Ok(None);
    }
    let (keeper, snapshot) = setup::export_snapshot(endpoint).await?;
    for table in unfinished {
        tracing::info!("{} has no key and starts over under a new snapshot", table.source);
        // The snapshot first: workers that are still there lease under it from now on, and what they leased before is fenced.
        let mut spec = table.spec.clone();
        spec.snapshot = Some(snapshot.clone());
        setup::set_source_spec(target, run.run_id, table.table_id, &spec).await?;
        target
            .client
            .execute("SELECT dedup.restart_table($1::uuid, $2::int4)", &[&run.run_id, &table.table_id])
            .await
            .at(Side::Target, "restart_table")?;
    }
    Ok(Some(keeper))
}

#[cfg(test)]
mod tests {
    use pg_dedup_record::{Canonical, Column, ENCODING_VERSION, Layout};

    use super::*;
    use crate::config::TableOptions;
    use crate::names::TableName;
    use crate::source::SourceSpec;

    fn table() -> TableWork {
        let column = |name: &str| Column {
            name: name.into(),
            type_name: "text".into(),
            canonical: Canonical::Verbatim,
        };
        TableWork {
            table_id: 1,
            source: "public.t".into(),
            target: TableName::new("public", "t"),
            spec: SourceSpec {
                relation: "\"public\".\"t\"".into(),
                select: vec![],
                key: vec![],
                key_types: vec![],
                key_nullable: vec![],
                filter: Some("a > 1".into()),
                snapshot: None,
                transforms: BTreeMap::new(),
            },
            layout: Layout {
                encoding_version: ENCODING_VERSION,
                columns: vec![column("id"), column("a")],
                content: vec![1],
                key: vec![0],
                rest: vec![],
            },
            keyless: false,
            copy_in: String::new(),
        }
    }

    fn job(options: TableOptions) -> Job {
        let name = TableName::new("public", "t");
        Job {
            tables: vec![(name.clone(), name.clone())],
            options: BTreeMap::from([(name, options)]),
            ..Job::default()
        }
    }

    #[test]
    fn the_same_job_may_go_on() {
        let same = TableOptions {
            content_columns: Some(vec!["a".into()]),
            key_columns: Some(vec!["id".into()]),
            filter: Some("a > 1".into()),
            ..TableOptions::default()
        };
        assert!(differences_in_tables(&job(same), &[table()]).is_empty());
        assert!(differences_in_tables(&Job::default(), &[table()]).is_empty());
    }

    #[test]
    fn another_job_is_named_as_such() {
        let other = TableOptions {
            content_columns: Some(vec!["id".into()]),
            filter: Some("a > 2".into()),
            transforms: BTreeMap::from([("a".into(), "upper(a)".into())]),
            ..TableOptions::default()
        };
        assert_eq!(differences_in_tables(&job(other), &[table()]).len(), 3);
        let mut elsewhere = job(TableOptions { filter: Some("a > 1".into()), ..TableOptions::default() });
        elsewhere.tables[0].1 = TableName::new("public", "u");
        assert_eq!(differences_in_tables(&elsewhere, &[table()]).len(), 1);
    }
}
