//! The books of a run, for people and as JSON whose keys are the columns' names.

use serde::Serialize;
use uuid::Uuid;

use crate::conn::Session;
use crate::error::{At, Result};

/// One failed chunk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct FailedChunk {
    /// Name of the chunk.
    pub chunk_id: String,
    /// The source table.
    pub source: String,
    /// SQLSTATE.
    pub error_sqlstate: Option<String>,
    /// Message.
    pub error_message: Option<String>,
    /// What can be done.
    pub error_hint: Option<String>,
}

/// The books of a run.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Summary {
    /// The run.
    pub run_id: Uuid,
    /// Its name.
    pub name: String,
    /// Its status.
    pub status: String,
    /// Chunks in the plan.
    pub chunks: i64,
    /// Chunks verified.
    pub verified: i64,
    /// Chunks written and not read back yet.
    pub unverified: i64,
    /// Chunks given up.
    pub failed: i64,
    /// Records read.
    pub source_count: i64,
    /// Records written as new rows.
    pub inserted_count: i64,
    /// Records that replaced a row.
    pub updated_count: i64,
    /// Records that stood in the target.
    pub unchanged_count: i64,
    /// Records dropped.
    pub duplicate_count: i64,
    /// Records set aside.
    pub quarantined_count: i64,
    /// Bytes read.
    pub source_bytes: i64,
    /// Seconds since the first lease.
    pub seconds: Option<f64>,
    /// Chunks given up, and why.
    pub failed_chunks: Vec<FailedChunk>,
}

impl Summary {
    /// Reads the books.
    pub async fn load(session: &Session, run: Uuid) -> Result<Summary> {
        let doing = "reading the books";
        let row = session
            .client
            .query_one(
                "SELECT p.run_id, p.name, p.status, p.chunks, p.verified, p.unverified, p.failed, p.source_count, p.inserted_count, \
                     p.updated_count, p.unchanged_count, p.duplicate_count, p.quarantined_count, p.source_bytes, \
                     extract(epoch FROM coalesce(r.finished_at, clock_timestamp()) - r.started_at)::float8 \
                 FROM dedup.progress AS p JOIN dedup.runs AS r USING (run_id) WHERE p.run_id = $1",
                &[&run],
            )
            .await
            .at(session.side, doing)?;
        let failed_chunks = failed_chunks(session, run).await?;
        let number = |index: usize| row.try_get::<_, i64>(index).at(session.side, doing);
        Ok(Summary {
            run_id: row.try_get(0).at(session.side, doing)?,
            name: row.try_get(1).at(session.side, doing)?,
            status: row.try_get(2).at(session.side, doing)?,
            chunks: number(3)?,
            verified: number(4)?,
            unverified: number(5)?,
            failed: number(6)?,
            source_count: number(7)?,
            inserted_count: number(8)?,
            updated_count: number(9)?,
            unchanged_count: number(10)?,
            duplicate_count: number(11)?,
            quarantined_count: number(12)?,
            source_bytes: number(13)?,
            seconds: row.try_get(14).at(session.side, doing)?,
            failed_chunks,
        })
    }

    /// The exit code that tells how the run ended.
    pub fn exit_code(&self) -> u8 {
        match self.status.as_str() {
            "done" | "reconciled" if self.quarantined_count > 0 => 3,
            "done" | "reconciled" => 0,
            "halted" => 4,
            _ => 1,
        }
    }

    /// The books as lines.
    pub fn text(&self) -> String {
        let mut text = format!("run {} ({}): {}\n", self.run_id, self.name, self.status);
        let counts = [
            ("source", self.source_count),
            ("= inserted", self.inserted_count),
            ("+ updated", self.updated_count),
            ("+ unchanged", self.unchanged_count),
            ("+ duplicate", self.duplicate_count),
            ("+ quarantined", self.quarantined_count),
        ];
        let width = counts.iter().map(|(_, count)| count.to_string().len()).max().unwrap_or(1);
        for (label, count) in counts {
            text.push_str(&format!("  {label:<14}{count:>width$}\n"));
        }
        text.push_str(&format!("  chunks: {} verified of {}", self.verified, self.chunks));
        if self.unverified > 0 {
            text.push_str(&format!(", {} written and not verified yet", self.unverified));
        }
        if self.failed > 0 {
            text.push_str(&format!(", {} failed", self.failed));
        }
        text.push('\n');
        if let Some(seconds) = self.seconds.filter(|seconds| *seconds > 0.0) {
            text.push_str(&format!(
                "  {:.1} MB in {:.1} s, {:.1} MB/s\n",
                self.source_bytes as f64 / 1e6,
                seconds,
                self.source_bytes as f64 / 1e6 / seconds
            ));
        }
        for chunk in &self.failed_chunks {
            text.push_str(&format!(
                "  chunk {} of {} failed: {} (SQLSTATE {})\n",
                chunk.chunk_id,
                chunk.source,
                chunk.error_message.as_deref().unwrap_or("no reason recorded"),
                chunk.error_sqlstate.as_deref().unwrap_or("-"),
            ));
            if let Some(hint) = &chunk.error_hint {
                text.push_str(&format!("    hint: {hint}\n"));
            }
        }
        text
    }

    /// Prints the books on standard output, the last thing a run says.
    pub fn print(&self, json: bool) -> Result<()> {
        print(self, json, || self.text())
    }
}

/// Prints a value on standard output, as one line of JSON or as its text.
pub fn print(value: &impl Serialize, json: bool, text: impl FnOnce() -> String) -> Result<()> {
    if json {
        print_json(value)
    } else {
        print_text(&text());
        Ok(())
    }
}

/// Prints a value as one line of JSON.
pub fn print_json(value: &impl Serialize) -> Result<()> {
    let line = serde_json::to_string(value)
        .map_err(|e| crate::error::Error::here(crate::error::Kind::Protocol, format!("unprintable: {e}")))?;
    print_text(&format!("{line}\n"));
    Ok(())
}

/// Prints text on standard output. A reader that has gone away is no error of ours.
pub fn print_text(text: &str) {
    use std::io::Write;
    let _ = std::io::stdout().write_all(text.as_bytes());
}

async fn failed_chunks(session: &Session, run: Uuid) -> Result<Vec<FailedChunk>> {
    let doing = "reading failed chunks";
    let rows = session
        .client
        .query(
            "SELECT c.chunk_id, t.source, c.error_sqlstate, c.error_message, c.error_hint FROM dedup.checkpoints AS c \
             JOIN dedup.run_tables AS t USING (run_id, table_id) WHERE c.run_id = $1 AND c.status = 'failed' \
             ORDER BY c.chunk_no LIMIT 100",
            &[&run],
        )
        .await
        .at(session.side, doing)?;
    rows.iter()
        .map(|row| {
            Ok(FailedChunk {
                chunk_id: row.try_get(0)?,
                source: row.try_get(1)?,
                error_sqlstate: row.try_get(2)?,
                error_message: row.try_get(3)?,
                error_hint: row.try_get(4)?,
            })
        })
        .collect::<std::result::Result<_, tokio_postgres::Error>>()
        .at(session.side, doing)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn summary(status: &str, quarantined: i64) -> Summary {
        Summary {
            run_id: Uuid::nil(),
            name: "n".into(),
            status: status.into(),
            chunks: 2,
            verified: 1,
            unverified: 0,
            failed: 1,
            source_count: 10,
            inserted_count: 6,
            updated_count: 1,
            unchanged_count: 1,
            duplicate_count: 2 - quarantined.min(2),
            quarantined_count: quarantined,
            source_bytes: 5_000_000,
            seconds: Some(2.0),
            failed_chunks: vec![FailedChunk {
                chunk_id: "1:000002".into(),
                source: "public.t".into(),
                error_sqlstate: Some("42501".into()),
                error_message: Some("permission denied".into()),
                error_hint: Some("GRANT".into()),
            }],
        }
    }

    #[test]
    fn exit_codes_tell_how_it_ended() {
        assert_eq!(summary("done", 0).exit_code(), 0);
        assert_eq!(summary("done", 1).exit_code(), 3);
        assert_eq!(summary("failed", 1).exit_code(), 1);
        assert_eq!(summary("halted", 0).exit_code(), 4);
    }

    #[test]
    fn the_text_shows_the_equation_and_the_failures() {
        let text = summary("failed", 0).text();
        for part in [
            "source        10",
            "= inserted     6",
            "1 verified of 2, 1 failed",
            "2.5 MB/s",
            "1:000002",
            "hint: GRANT",
        ] {
            assert!(text.contains(part), "{part} in\n{text}");
        }
    }

    #[test]
    fn json_has_the_columns_names() {
        let json = serde_json::to_value(summary("done", 0)).unwrap();
        for key in [
            "run_id",
            "status",
            "source_count",
            "inserted_count",
            "updated_count",
            "unchanged_count",
            "duplicate_count",
            "quarantined_count",
        ] {
            assert!(json.get(key).is_some(), "{key}");
        }
    }
}
