//! A report as Markdown, to be put into a ticket.

use std::fmt::Write;

use indicatif::{HumanBytes, HumanCount};

use crate::view::overview::Report;
use crate::view::parts::{self, left, time};

/// The text.
pub fn page(report: &Report) -> String {
    let mut text = String::new();
    // Writing to a string cannot fail.
    let _ = write(&mut text, report);
    text
}

/// A cell: what would end it is escaped, and what would be taken for HTML.
fn cell(text: &str) -> String {
    let text = text.replace('&', "&amp;").replace('<', "&lt;");
    text.replace('\\', "\\\\").replace('|', "\\|").replace('\n', " ")
}

fn row<S: AsRef<str>>(text: &mut String, cells: impl IntoIterator<Item = S>) -> std::fmt::Result {
    for part in cells {
        write!(text, "| {} ", cell(part.as_ref()))?;
    }
    writeln!(text, "|")
}

fn head(text: &mut String, cells: &[&str]) -> std::fmt::Result {
    row(text, cells)?;
    writeln!(text, "|{}", "---|".repeat(cells.len()))
}

fn write(text: &mut String, report: &Report) -> std::fmt::Result {
    let o = &report.overview;
    writeln!(text, "# Run {} ({})\n", cell(&o.run.name), o.run.status)?;
    writeln!(
        text,
        "Run `{}`, database {}, owner {}, as of {}.",
        o.run.run_id,
        cell(&report.database),
        cell(&o.run.owner),
        time(&o.at)
    )?;
    for (what, at) in [
        ("began", &o.run.started_at),
        ("finished", &o.run.finished_at),
        ("can be rolled back until", &o.run.bake_in_until),
        ("was to be done by", &o.deadline),
    ] {
        if let Some(at) = at {
            writeln!(text, "It {what} {}.", time(at))?;
        }
    }
    if o.eta_seconds.is_some() {
        writeln!(text, "Left: {}.", left(o.eta_seconds))?;
    }

    let books = &o.progress;
    writeln!(text, "\n## Books\n")?;
    head(text, &["records read", "inserted", "updated", "unchanged", "duplicate", "quarantined"])?;
    let counts = std::iter::once(books.source_count).chain(books.outcomes().map(|(_, count)| count));
    row(text, counts.map(|count| HumanCount(count).to_string()))?;

    writeln!(text, "\n## Tables\n")?;
    head(
        text,
        &["source", "target", "written", "chunks", "failed", "records", "duplicates", "quarantined", "read"],
    )?;
    for table in &o.tables {
        let books = &table.books;
        row(
            text,
            [
                table.source.clone(),
                table.target.clone(),
                books.written(),
                format!("{}/{}", books.verified, books.chunks),
                books.failed.to_string(),
                HumanCount(books.source_count).to_string(),
                match books.dedup_ratio() {
                    Some(part) => format!("{} ({:.1} %)", HumanCount(books.duplicate_count), part * 100.0),
                    None => "0".into(),
                },
                HumanCount(books.quarantined_count).to_string(),
                HumanBytes(books.source_bytes).to_string(),
            ],
        )?;
    }

    writeln!(text, "\n## Reconciliation\n")?;
    if report.reconciliations.is_empty() {
        writeln!(text, "The run was not reconciled.")?;
    }
    for pass in &report.reconciliations {
        let at = pass.finished_at.as_deref().map_or("not finished".into(), time);
        let found: Vec<String> = pass
            .findings()
            .into_iter()
            .filter_map(|(name, count)| count.map(|count| format!("{} {name}", HumanCount(count))))
            .collect();
        let found = if found.is_empty() { "its detail was purged".into() } else { found.join(", ") };
        writeln!(
            text,
            "- Pass {}: **{}** ({at}), {}: {found}.",
            pass.reconciliation_id,
            pass.told_verdict(),
            pass.extent()
        )?;
    }

    if !o.quarantine.is_empty() {
        writeln!(text, "\n## Quarantine\n")?;
        head(text, &["SQLSTATE", "reason", "records"])?;
        for line in &o.quarantine {
            row(text, [line.sqlstate.clone(), line.reason.clone(), HumanCount(line.records).to_string()])?;
        }
    }
    if !report.failed_chunks.is_empty() {
        writeln!(text, "\n## Failed chunks\n")?;
        head(text, &["chunk", "attempts", "SQLSTATE", "message", "hint"])?;
        for chunk in &report.failed_chunks {
            let or_none = |part: &Option<String>| part.clone().unwrap_or_default();
            row(
                text,
                [
                    chunk.chunk_id.clone(),
                    chunk.attempts.to_string(),
                    or_none(&chunk.sqlstate),
                    or_none(&chunk.message),
                    or_none(&chunk.hint),
                ],
            )?;
        }
    }
    writeln!(text, "\n## Alerts that fired\n")?;
    if report.alert_log.is_empty() {
        writeln!(text, "None.")?;
    }
    for alert in &report.alert_log {
        let until = alert.cleared_at.as_deref().map_or("still firing".into(), time);
        writeln!(
            text,
            "- {} {}: {} ({} – {until})",
            alert.severity,
            alert.kind,
            cell(&alert.message),
            time(&alert.since)
        )?;
    }
    let phases: Vec<String> = report
        .phase_seconds
        .iter()
        .map(|(phase, seconds)| format!("{phase} {:.1} s", seconds.as_f64().unwrap_or(0.0)))
        .collect();
    if !phases.is_empty() {
        writeln!(text, "\n## Where the time went\n\n{} (all workers added up).", phases.join(", "))?;
    }
    writeln!(text, "\n## Settings\n\n```json\n{:#}\n```", report.options)?;
    writeln!(text, "\n## Versions\n")?;
    for (name, version) in &report.versions {
        writeln!(text, "- {name}: {}", parts::text(version))?;
    }
    Ok(())
}
