//! `report`: all there is to say of a run, for people who were not there; `--archive` keeps it with the log, the ledger and the quarantine.

mod archive;
mod html;
mod markdown;

use serde_json::Value;
use tokio_postgres::IsolationLevel;
use uuid::Uuid;

use crate::cli::{ReportArgs, ReportFormat};
use crate::config::Job;
use crate::conn::{Endpoint, Role, Session, protocol_error};
use crate::error::{At, Result, Side};
use crate::runs;
use crate::summary::print_text;
use crate::view::overview::Report;

/// A report: as the target gives it, and typed.
struct Document {
    json: Value,
    report: Report,
}

impl Document {
    async fn load(session: &impl tokio_postgres::GenericClient, run: Uuid) -> Result<Document> {
        let doing = "asking for a report";
        let mut json: Value = session
            .query_one("SELECT dedup.report($1::uuid)", &[&run])
            .await
            .and_then(|row| row.try_get(0))
            .at(Side::Target, doing)?;
        json["versions"]["sidecar"] = env!("CARGO_PKG_VERSION").into();
        let report = serde_json::from_value(json.clone())
            .map_err(|e| protocol_error(Side::Target, format!("{doing}: {e}")))?;
        Ok(Document { json, report })
    }

    fn as_text(&self, format: ReportFormat) -> Result<String> {
        Ok(match format {
            ReportFormat::Html => html::page(&self.report)?.into_string(),
            ReportFormat::Md => markdown::page(&self.report),
            ReportFormat::Json => format!("{:#}\n", self.json),
        })
    }
}

/// Prints a report, or archives it.
pub async fn report(job: &Job, args: &ReportArgs) -> Result<u8> {
    let mut session = Endpoint::resolve(Side::Target, &job.target)?.connect(Role::Admin).await?;
    runs::check_versions(&session).await?;
    let run = runs::find(&session, &args.run).await?;
    let Some(dir) = &args.archive else {
        let document = Document::load(&session.client, run.run_id).await?;
        print_text(&document.as_text(args.format)?);
        return Ok(0);
    };
    let began = began_at(&session).await?;
    // One snapshot: report, log and ledger tell of the same moment.
    let transaction = session
        .client
        .build_transaction()
        .isolation_level(IsolationLevel::RepeatableRead)
        .read_only(true)
        .start()
        .await
        .at(Side::Target, "begin")?;
    let document = Document::load(&transaction, run.run_id).await?;
    let ended = transaction
        .query_one(
            "SELECT status, dedup.ended_at(run_id)::text FROM dedup.runs WHERE run_id = $1",
            &[&run.run_id],
        )
        .await
        .at(Side::Target, "asking for the end of the run")?;
    let status: String = ended.try_get(0).at(Side::Target, "asking for the end of the run")?;
    let ended_at: Option<String> = ended.try_get(1).at(Side::Target, "asking for the end of the run")?;
    let archive = archive::write(&transaction, &run, &document, dir).await?;
    transaction.commit().await.at(Side::Target, "commit")?;
    session
        .client
        .execute(
            "SELECT dedup.record_archive($1::uuid, $2::text, $3::bytea, $4::int8, $5::text::timestamptz, $6::text, $7::text::timestamptz)",
            &[
                &run.run_id,
                &archive.location,
                &archive.manifest_sha256,
                &(archive.bytes as i64),
                &began,
                &status,
                &ended_at,
            ],
        )
        .await
        .at(Side::Target, "record_archive")?;
    tracing::info!("run {} ({}) is archived: {}", run.run_id, run.name, archive.directory.display());
    print_text(&format!("{}\n", archive.directory.display()));
    Ok(0)
}

/// The target's clock, before its snapshot is taken.
async fn began_at(session: &Session) -> Result<String> {
    session
        .client
        .query_one("SELECT pg_catalog.clock_timestamp()::text", &[])
        .await
        .and_then(|row| row.try_get(0))
        .at(Side::Target, "asking for the time")
}
