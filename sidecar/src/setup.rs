//! Creating a run: its tables, how each is read, its chunks. All of it commits at once, so a run is planned whole or
//! is not there.

use std::collections::BTreeMap;
use std::sync::Arc;

use pg_dedup_record::Layout;
use pg_dedup_record::sql::quote_ident;
use serde_json::json;
use uuid::Uuid;

use crate::catalog::{self, Relation};
use crate::cli::Verify;
use crate::config::{DEFAULT_ERROR_BUDGET, Job, TableOptions};
use crate::conn::{Endpoint, Role, Session, protocol_error};
use crate::error::{At, Error, Kind, Result, Side};
use crate::names::TableName;
use crate::plan::{self, PlannedChunk};
use crate::runs;
use crate::source::{self, SourceSpec};

/// One pair before it is part of a run.
pub struct Pair {
    /// The source.
    pub source: Relation,
    /// The target.
    pub target: Relation,
    /// How it is migrated.
    pub options: TableOptions,
}

/// A run that was planned.
pub struct Planned {
    /// Its id; of a plan that was taken back nobody's.
    pub run_id: Uuid,
    /// Its pairs and their chunks.
    pub tables: Vec<(Added, Vec<PlannedChunk>)>,
    /// Keeps the snapshot that tables without a key are read under.
    pub snapshot_keeper: Option<Session>,
}

/// A pair of the run, ready to be planned.
#[derive(Clone)]
pub struct Added {
    /// Its number.
    pub table_id: i32,
    /// The source.
    pub source: Relation,
    /// The target.
    pub target: Relation,
    /// How it is read.
    pub spec: SourceSpec,
    /// Columns and their roles.
    pub layout: Layout,
    /// Which rule chose the content columns, in words.
    pub content_rule: String,
}

/// Creates and plans a run on sessions of role Admin.
pub async fn create(
    job: &Job,
    endpoint: &Arc<Endpoint>,
    source: &Session,
    target: &Session,
) -> Result<Planned> {
    plan_and(job, endpoint, source, target, "COMMIT").await
}

/// Plans a run as [`create`] would, every check of both sides included, and leaves nothing of it.
pub async fn plan_only(
    job: &Job,
    endpoint: &Arc<Endpoint>,
    source: &Session,
    target: &Session,
) -> Result<Planned> {
    plan_and(job, endpoint, source, target, "ROLLBACK").await
}

/// Plans a run in a transaction of the target that ends with `end`.
async fn plan_and(
    job: &Job,
    endpoint: &Arc<Endpoint>,
    source: &Session,
    target: &Session,
    end: &str,
) -> Result<Planned> {
    let pairs = pairs(job, source, target).await?;
    target.client.batch_execute("BEGIN").await.at(Side::Target, "begin")?;
    match create_in_transaction(job, endpoint, source, target, &pairs).await {
        Ok(planned) => {
            target.client.batch_execute(end).await.at(Side::Target, "ending the plan's transaction")?;
            Ok(planned)
        }
        Err(error) => {
            // Best effort: a lost connection has no transaction to take back.
            let _ = target.client.batch_execute("ROLLBACK").await;
            Err(error)
        }
    }
}

async fn create_in_transaction(
    job: &Job,
    endpoint: &Arc<Endpoint>,
    source: &Session,
    target: &Session,
    pairs: &[Pair],
) -> Result<Planned> {
    let name = job.name.clone().unwrap_or_else(|| match job.stands_for {
        None => endpoint.database().to_owned(),
        Some(_) => format!("{} (staging)", endpoint.database()),
    });
    let mut options = json!({
        "verify": job.verify.unwrap_or_default(),
        "sidecar_version": env!("CARGO_PKG_VERSION"),
        "settings": {
            "source": runs::identity(source).await?,
            "chunk_bytes": job.chunk_bytes,
            "error_budget": job.error_budget.unwrap_or(DEFAULT_ERROR_BUDGET),
            "index_existing": job.index_existing,
            "throttle": job.throttle,
            "alerts": job.alerts,
        },
    });
    if let Some(days) = job.bake_in_days {
        options["settings"]["bake_in_days"] = days.into();
    }
    if let Some(seconds) = job.lease_seconds {
        options["lease_seconds"] = seconds.into();
    }
    let run_id: Uuid = target
        .client
        .query_one("SELECT dedup.create_run($1::text, $2::jsonb)", &[&name, &options])
        .await
        .and_then(|row| row.try_get(0))
        .at(Side::Target, "create_run")?;
    if job.verify == Some(Verify::End) {
        tracing::info!("chunks are verified when everything is written, by scanning each target");
    }
    let mut added = Vec::new();
    for pair in pairs {
        let pair_added = add_table(source, target, run_id, pair).await?;
        tracing::info!(
            "{} -> {}: content is {}",
            pair.source.name,
            pair.target.name,
            pair_added.content_rule
        );
        added.push(pair_added);
    }
    let snapshot_keeper = keep_snapshot(endpoint, &mut added).await?;
    for pair in &added {
        set_source_spec(target, run_id, pair.table_id, &pair.spec).await?;
    }
    let mut plans = plan_all(job, endpoint, &added, snapshot_keeper.as_ref()).await?;
    let mut tables = Vec::with_capacity(added.len());
    for pair in added {
        let chunks = plans
            .remove(&pair.table_id)
            .ok_or_else(|| Error::here(Kind::Protocol, format!("{} was not planned", pair.source.name)))?;
        add_chunks(target, run_id, pair.table_id, &chunks).await?;
        let bytes: u64 = chunks.iter().map(|chunk| chunk.bytes).sum();
        tracing::info!("{}: {} chunks, about {:.1} MB", pair.source.name, chunks.len(), bytes as f64 / 1e6);
        tables.push((pair, chunks));
    }
    Ok(Planned { run_id, tables, snapshot_keeper })
}

/// The pairs that a job names, with their catalogs.
async fn pairs(job: &Job, source: &Session, target: &Session) -> Result<Vec<Pair>> {
    let mut pairs = Vec::new();
    for (source_name, target_name) in named_tables(job, source).await? {
        let source = Relation::get(source, &source_name).await?;
        let Some(target) = Relation::find(target, &target_name).await? else {
            return Err(missing_target(&source_name, &target_name));
        };
        pairs.push(Pair { options: job.options_of(&source_name), source, target });
    }
    Ok(pairs)
}

/// Source and target names of a job; a schema's tables keep their names.
pub async fn named_tables(job: &Job, source: &Session) -> Result<Vec<(TableName, TableName)>> {
    let mut names = job.tables.clone();
    for schema in &job.schemas {
        let found = catalog::tables_of_schema(source, schema).await?;
        if found.is_empty() {
            return Err(Error::new(
                Side::Source,
                Kind::Refused,
                format!("schema {} has no tables, or does not exist", quote_ident(schema)),
            ));
        }
        for table in found {
            if !names.iter().any(|(source, _)| *source == table) {
                names.push((table.clone(), table));
            }
        }
    }
    if let Some(unknown) = job.options.keys().find(|table| !names.iter().any(|(source, _)| source == *table))
    {
        return Err(Error::usage(format!("options are given for {unknown}, which is not migrated")));
    }
    Ok(names)
}

/// The error for a target that is not there, with the line that would create it.
pub fn missing_target(source: &TableName, target: &TableName) -> Error {
    let error =
        Error::new(Side::Target, Kind::Refused, format!("table {target} does not exist")).sqlstate("42P01");
    error.hint(format!("pg_dump --schema-only --table='{}' SOURCE | psql TARGET{}", source.quoted(), {
        if source == target { String::new() } else { format!(", then rename it to {target}") }
    }))
}

/// Adds a pair to a run, and lets both sides check it.
pub async fn add_table(source: &Session, target: &Session, run: Uuid, pair: &Pair) -> Result<Added> {
    let delivered = source::delivered_columns(&pair.source, &pair.target, &pair.options)?;
    let mut spec = SourceSpec::named(&pair.source, &pair.options);
    let (surrogate, referenced) = key_in_source(target, pair).await?;
    let options = json!({
        "source": &spec,
        "columns": delivered,
        "exclude_columns": pair.options.exclude_columns.clone().unwrap_or_default(),
        "surrogate_key": surrogate,
        "key_referenced": referenced,
    });
    let doing = format!("adding {}", pair.source.name);
    let row = target
        .client
        .query_one(
            "WITH added AS MATERIALIZED (SELECT dedup.add_table($1::uuid, $2::text, $3::oid::regclass, $4::text[], $5::text[], \
             $6::jsonb) AS table_id) SELECT table_id FROM added",
            &[
                &run,
                &pair.source.name.to_string(),
                &pair.target.oid,
                &pair.options.key_columns,
                &pair.options.content_columns,
                &options,
            ],
        )
        .await
        .at(Side::Target, &doing)?;
    let table_id: i32 = row.try_get(0).at(Side::Target, &doing)?;
    let row = target
        .client
        .query_one(
            "SELECT layout::text, content_rule FROM dedup.run_tables WHERE run_id = $1 AND table_id = $2",
            &[&run, &table_id],
        )
        .await
        .at(Side::Target, &doing)?;
    let layout: String = row.try_get(0).at(Side::Target, &doing)?;
    let rule: String = row.try_get(1).at(Side::Target, &doing)?;
    let layout: Layout = serde_json::from_str(&layout)
        .map_err(|e| protocol_error(Side::Target, format!("unreadable layout: {e}")))?;
    layout.validate().map_err(|e| protocol_error(Side::Target, format!("unusable layout: {e}")))?;
    spec = spec.complete(&pair.source, &pair.target, &layout)?;
    check_query(source, &pair.source.name, &spec, &layout).await?;
    Ok(Added {
        table_id,
        source: pair.source.clone(),
        target: pair.target.clone(),
        spec,
        layout,
        content_rule: rule,
    })
}

/// Whether the target's key is a surrogate in the source, and whether a foreign key points at it there.
async fn key_in_source(target: &Session, pair: &Pair) -> Result<(bool, bool)> {
    let key: Option<Vec<String>> = target
        .client
        .query_one(
            "SELECT dedup.usable_key($1::oid::regclass, $2::text[])",
            &[&pair.target.oid, &pair.options.key_columns],
        )
        .await
        .and_then(|row| row.try_get(0))
        .at(Side::Target, "looking for the key")?;
    let Some([key]) = key.as_deref() else { return Ok((false, false)) };
    if pair.options.transforms.contains_key(key) {
        return Ok((false, false));
    }
    Ok(pair.source.column(key).map_or((false, false), |column| (column.surrogate, column.referenced)))
}

/// Lets the source check the query before anything is planned: unknown types, columns, casts, privileges.
async fn check_query(source: &Session, table: &TableName, spec: &SourceSpec, layout: &Layout) -> Result<()> {
    let open = source::Range { kind: source::RangeKind::Key, lower: None, upper: None };
    let whole = source.client.prepare(&format!("{} LIMIT 0", spec.query(&open))).await;
    let Err(error) = whole else { return Ok(()) };
    // Which column is it?
    for (column, expression) in layout.columns.iter().zip(&spec.select) {
        let alone = format!("SELECT {expression} FROM {} LIMIT 0", spec.relation);
        if let Err(error) = source.client.prepare(&alone).await {
            let doing = format!(
                "column {} of {table} can't be read as the target wants it",
                quote_ident(&column.name)
            );
            return Err(Error::record_driver(Side::Source, &doing, error));
        }
    }
    Err(Error::record_driver(Side::Source, &format!("{table} can't be read as the target wants it"), error))
}

/// One snapshot for all tables without a key: positions mean something only under it.
async fn keep_snapshot(endpoint: &Arc<Endpoint>, added: &mut [Added]) -> Result<Option<Session>> {
    if added.iter().all(|pair| !pair.spec.key.is_empty()) {
        return Ok(None);
    }
    let (keeper, snapshot) = export_snapshot(endpoint).await?;
    for pair in added.iter_mut().filter(|pair| pair.spec.key.is_empty()) {
        pair.spec.snapshot = Some(snapshot.clone());
    }
    Ok(Some(keeper))
}

/// A session that holds a snapshot, and the snapshot's name.
pub async fn export_snapshot(endpoint: &Arc<Endpoint>) -> Result<(Session, String)> {
    let keeper = endpoint.connect(Role::Planner).await?;
    keeper
        .client
        .batch_execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
        .await
        .at(endpoint.side, "exporting a snapshot")?;
    let snapshot: String = keeper
        .client
        .query_one("SELECT pg_catalog.pg_export_snapshot()", &[])
        .await
        .and_then(|row| row.try_get(0))
        .at(endpoint.side, "exporting a snapshot")?;
    Ok((keeper, snapshot))
}

/// Stores how workers read a table.
pub async fn set_source_spec(target: &Session, run: Uuid, table_id: i32, spec: &SourceSpec) -> Result<()> {
    let spec = serde_json::to_value(spec).map_err(|e| Error::here(Kind::Protocol, e.to_string()))?;
    target
        .client
        .execute("SELECT dedup.set_source_spec($1::uuid, $2::int4, $3::jsonb)", &[&run, &table_id, &spec])
        .await
        .at(Side::Target, "set_source_spec")?;
    Ok(())
}

/// Plans all tables, as many at once as there are workers; those without a key under their snapshot.
async fn plan_all(
    job: &Job,
    endpoint: &Arc<Endpoint>,
    added: &[Added],
    keeper: Option<&Session>,
) -> Result<BTreeMap<i32, Vec<PlannedChunk>>> {
    let mut plans = BTreeMap::new();
    if let Some(keeper) = keeper {
        for pair in added.iter().filter(|pair| pair.spec.key.is_empty()) {
            let chunks = plan::plan_table(keeper, &pair.spec, &pair.source, job.chunk_bytes).await?;
            plans.insert(pair.table_id, chunks);
        }
    }
    let keyed: Vec<Added> = added.iter().filter(|pair| !pair.spec.key.is_empty()).cloned().collect();
    let queue = Arc::new(std::sync::Mutex::new(keyed));
    let mut planners = tokio::task::JoinSet::new();
    let planned = queue.lock().map_or(0, |queue| queue.len()).min(usize::from(job.workers));
    for _ in 0..planned {
        planners.spawn(plan_from(queue.clone(), endpoint.clone(), job.chunk_bytes));
    }
    while let Some(ended) = planners.join_next().await {
        let done =
            ended.map_err(|e| Error::here(Kind::Protocol, format!("a planner ended badly: {e}")))??;
        plans.extend(done);
    }
    Ok(plans)
}

async fn plan_from(
    queue: Arc<std::sync::Mutex<Vec<Added>>>,
    endpoint: Arc<Endpoint>,
    chunk_bytes: u64,
) -> Result<Vec<(i32, Vec<PlannedChunk>)>> {
    let session = endpoint.connect(Role::Planner).await?;
    let mut done = Vec::new();
    loop {
        let next = queue.lock().unwrap_or_else(std::sync::PoisonError::into_inner).pop();
        let Some(pair) = next else { return Ok(done) };
        done.push((pair.table_id, plan::plan_table(&session, &pair.spec, &pair.source, chunk_bytes).await?));
    }
}

async fn add_chunks(target: &Session, run: Uuid, table_id: i32, chunks: &[PlannedChunk]) -> Result<()> {
    let chunks = serde_json::to_value(chunks).map_err(|e| Error::here(Kind::Protocol, e.to_string()))?;
    target
        .client
        .execute("SELECT dedup.add_chunks($1::uuid, $2::int4, $3::jsonb)", &[&run, &table_id, &chunks])
        .await
        .at(Side::Target, "add_chunks")?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_target_comes_with_the_line_that_makes_it() {
        let table = TableName::new("s", "T");
        let error = missing_target(&table, &table);
        assert_eq!(error.sqlstate.as_deref(), Some("42P01"));
        assert!(error.hint.unwrap().contains("pg_dump --schema-only --table='\"s\".\"T\"'"));
    }
}
