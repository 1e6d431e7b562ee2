//! `status`: what the SQL views say, readable.

use serde_json::{Map, Value};
use uuid::Uuid;

use crate::config::Job;
use crate::conn::{Endpoint, Role, Session};
use crate::error::{At, Result, Side};
use crate::runs;
use crate::summary::{print_json, print_text};

/// Lists the runs, or shows one.
pub async fn status(job: &Job, run: Option<&str>) -> Result<u8> {
    let target = Endpoint::resolve(Side::Target, &job.target)?.connect(Role::Admin).await?;
    runs::check_versions(&target).await?;
    match run {
        None => list(&target, job.json).await?,
        Some(wanted) => {
            let run = runs::find(&target, wanted).await?;
            show(&target, run.run_id, job.json).await?;
        }
    }
    Ok(0)
}

/// Rows of a query as JSON objects; every value is the server's.
async fn objects(target: &Session, sql: &str, run: Option<Uuid>) -> Result<Vec<Value>> {
    let sql = format!("SELECT pg_catalog.to_json(shown) FROM ({sql}) AS shown");
    let rows = match run {
        Some(run) => target.client.query(&sql, &[&run]).await,
        None => target.client.query(&sql, &[]).await,
    }
    .at(Side::Target, "reading the status")?;
    rows.iter().map(|row| row.try_get(0).at(Side::Target, "reading the status")).collect()
}

async fn list(target: &Session, json: bool) -> Result<()> {
    let runs = objects(
        target,
        "SELECT run_id, name, status, percent, verified, chunks, source_count, duplicate_count, quarantined_count, \
         date_trunc('second', started_at) AS started_at FROM dedup.progress JOIN dedup.runs AS r USING (run_id, name, status, started_at) \
         ORDER BY r.created_at DESC",
        None,
    )
    .await?;
    if json {
        return print_json(&runs);
    }
    if runs.is_empty() {
        print_text("no runs yet\n");
        return Ok(());
    }
    print_text(&table(
        &runs,
        &[
            "run_id",
            "name",
            "status",
            "percent",
            "verified",
            "chunks",
            "source_count",
            "duplicate_count",
            "quarantined_count",
            "started_at",
        ],
    ));
    Ok(())
}

async fn show(target: &Session, run: Uuid, json: bool) -> Result<()> {
    let progress = objects(target, "SELECT * FROM dedup.progress WHERE run_id = $1", Some(run))
        .await?
        .pop()
        .unwrap_or(Value::Null);
    let tables = objects(
        target,
        "SELECT t.table_id, t.source, g.target::text AS target, t.content_rule, count(*) AS chunks, \
             count(*) FILTER (WHERE c.status = 'verified') AS verified, coalesce(sum(c.source_count), 0)::int8 AS source_count, \
             coalesce(sum(c.duplicate_count), 0)::int8 AS duplicate_count, \
             coalesce(sum(c.quarantined_count), 0)::int8 AS quarantined_count \
         FROM dedup.run_tables AS t JOIN dedup.targets AS g USING (target_id) \
         LEFT JOIN dedup.checkpoints AS c USING (run_id, table_id) WHERE t.run_id = $1 \
         GROUP BY t.table_id, t.source, g.target, t.content_rule ORDER BY t.table_id",
        Some(run),
    )
    .await?;
    let failed = objects(
        target,
        "SELECT chunk_id, attempts, error_sqlstate, error_message, error_hint FROM dedup.checkpoints \
         WHERE run_id = $1 AND status = 'failed' ORDER BY chunk_no",
        Some(run),
    )
    .await?;
    let quarantine = objects(
        target,
        "SELECT sqlstate, reason, count(*) AS records FROM dedup.quarantine WHERE run_id = $1 \
         GROUP BY sqlstate, reason ORDER BY records DESC, sqlstate",
        Some(run),
    )
    .await?;
    let workers = objects(
        target,
        "SELECT worker_id, info ->> 'host' AS host, info ->> 'pid' AS pid, info ->> 'chunk_id' AS chunk_id, \
             round(extract(epoch FROM clock_timestamp() - heartbeat_at)::numeric, 1) AS seconds_since_heartbeat \
         FROM dedup.workers WHERE run_id = $1 AND heartbeat_at > clock_timestamp() - interval '5 minutes' ORDER BY started_at",
        Some(run),
    )
    .await?;
    if json {
        let mut all = match progress {
            Value::Object(all) => all,
            _ => Map::new(),
        };
        for (key, value) in
            [("tables", tables), ("failed_chunks", failed), ("quarantine", quarantine), ("workers", workers)]
        {
            all.insert(key.into(), Value::Array(value));
        }
        return print_json(&all);
    }
    let mut text = String::new();
    if let Value::Object(progress) = &progress {
        let width = progress.keys().map(String::len).max().unwrap_or(0);
        for (key, value) in progress.iter().filter(|(_, value)| !value.is_null()) {
            text.push_str(&format!("{key:<width$}  {}\n", cell(value)));
        }
    }
    for (title, rows) in
        [("tables", tables), ("failed chunks", failed), ("quarantine", quarantine), ("workers", workers)]
    {
        if let Some(Value::Object(first)) = rows.first() {
            let columns: Vec<&str> = first.keys().map(String::as_str).collect();
            text.push_str(&format!("\n{title}\n{}", table(&rows, &columns)));
        }
    }
    print_text(&text);
    Ok(())
}

fn cell(value: &Value) -> String {
    match value {
        Value::Null => String::new(),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

/// Rows as aligned columns; numbers to the right.
fn table(rows: &[Value], columns: &[&str]) -> String {
    let cells: Vec<Vec<String>> = rows
        .iter()
        .map(|row| columns.iter().map(|c| cell(row.get(c).unwrap_or(&Value::Null))).collect())
        .collect();
    let widths: Vec<usize> = columns
        .iter()
        .enumerate()
        .map(|(i, name)| cells.iter().map(|row| row[i].chars().count()).max().unwrap_or(0).max(name.len()))
        .collect();
    let mut text = String::new();
    let mut line = |parts: &mut dyn Iterator<Item = (usize, &str, bool)>| {
        let joined: Vec<String> = parts
            .map(
                |(width, part, right)| {
                    if right { format!("{part:>width$}") } else { format!("{part:<width$}") }
                },
            )
            .collect();
        text.push_str(joined.join("  ").trim_end());
        text.push('\n');
    };
    line(&mut columns.iter().zip(&widths).map(|(name, width)| (*width, *name, false)));
    for (row, values) in rows.iter().zip(&cells) {
        line(&mut columns.iter().zip(&widths).zip(values).map(|((name, width), value)| {
            (*width, value.as_str(), row.get(name).is_some_and(Value::is_number))
        }));
    }
    text
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn tables_line_up() {
        let rows = [json!({"name": "a", "n": 5}), json!({"name": "bcdef", "n": 1234, "x": null})];
        assert_eq!(table(&rows, &["name", "n"]), "name   n\na         5\nbcdef  1234\n");
    }
}
