//! `purge`: what is older than it is kept goes; the extension decides what that is, batch by batch.

use std::time::Duration;

use serde_json::json;

use crate::cli::PurgeArgs;
use crate::config::Job;
use crate::conn::{Endpoint, Role, Session};
use crate::error::{At, Result, Side};
use crate::runs;
use crate::stop::Stop;
use crate::summary::{print_json, print_text};

/// One kind of rows of one run.
struct Old {
    run: uuid::Uuid,
    name: String,
    what: String,
    rows: i64,
    kept_because: Option<String>,
}

/// Says what would go, or deletes it.
pub async fn purge(job: &Job, args: &PurgeArgs, stop: Stop) -> Result<u8> {
    let session = Endpoint::resolve(Side::Target, &job.target)?.connect(Role::Admin).await?;
    runs::check_versions(&session).await?;
    let ages = [args.reconciliations, args.history, args.archives].map(|age| format!("{} s", age.as_secs()));
    let mut told = Vec::new();
    for old in purgeable(&session, &ages).await? {
        let (verb, rows) = match &old.kept_because {
            Some(_) => ("stays", old.rows),
            None if args.dry_run => ("would go", old.rows),
            None if stop.finishing() => break,
            None => match delete(&session, &old, &ages, &stop).await? {
                Some(rows) => ("went", rows),
                // Somebody else was faster, or it is needed again.
                None => continue,
            },
        };
        if job.json {
            told.push(json!({"run_id": old.run, "name": old.name, "what": old.what, "rows": rows, "outcome": verb, "kept_because": old.kept_because}));
        } else {
            let why = old.kept_because.map(|why| format!(": {why}")).unwrap_or_default();
            print_text(&format!("run {} ({}): {}, {rows} rows, {verb}{why}\n", old.run, old.name, old.what));
        }
    }
    if job.json {
        print_json(&told)?;
    }
    Ok(if stop.finishing() { 130 } else { 0 })
}

async fn purgeable(session: &Session, ages: &[String; 3]) -> Result<Vec<Old>> {
    let doing = "looking for what is old";
    let rows = session
        .client
        .query(
            "SELECT p.run_id, r.name, p.what, p.rows, p.kept_because \
             FROM dedup.purgeable($1::text::interval, $2::text::interval, $3::text::interval) AS p JOIN dedup.runs AS r USING (run_id)",
            &[&ages[0], &ages[1], &ages[2]],
        )
        .await
        .at(Side::Target, doing)?;
    rows.iter()
        .map(|row| {
            Ok(Old {
                run: row.try_get(0).at(Side::Target, doing)?,
                name: row.try_get(1).at(Side::Target, doing)?,
                what: row.try_get(2).at(Side::Target, doing)?,
                rows: row.try_get(3).at(Side::Target, doing)?,
                kept_because: row.try_get(4).at(Side::Target, doing)?,
            })
        })
        .collect()
}

/// Deletes in small transactions; answers how many rows, none: it may not go any more.
async fn delete(session: &Session, old: &Old, ages: &[String; 3], stop: &Stop) -> Result<Option<i64>> {
    let doing = "purging";
    let may: bool = session
        .client
        .query_one(
            "SELECT dedup.begin_purge($1::uuid, $2::text, $3::text::interval, $4::text::interval, $5::text::interval)",
            &[&old.run, &old.what, &ages[0], &ages[1], &ages[2]],
        )
        .await
        .and_then(|row| row.try_get(0))
        .at(Side::Target, doing)?;
    if !may {
        return Ok(None);
    }
    let mut all = 0;
    loop {
        let gone: i64 = session
            .client
            .query_one(
                "SELECT dedup.purge_batch($1::uuid, $2::text, $3::text::interval)",
                &[&old.run, &old.what, &ages[2]],
            )
            .await
            .and_then(|row| row.try_get(0))
            .at(Side::Target, doing)?;
        all += gone;
        if gone == 0 || stop.finishing() {
            break;
        }
        // Others come first.
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    session
        .client
        .execute(
            "SELECT dedup.log_event($1::uuid, NULL, 'purged', jsonb_build_object('what', $2::text, 'rows', $3::int8))",
            &[&old.run, &old.what, &all],
        )
        .await
        .at(Side::Target, doing)?;
    Ok(Some(all))
}
