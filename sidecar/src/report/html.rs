//! A report as one HTML file that needs nothing else.

use indicatif::HumanCount;
use maud::{DOCTYPE, Markup, PreEscaped, html};

use crate::error::Result;
use crate::view::overview::{Reconciliation, Report};
use crate::view::{STYLE, parts, plots};

/// The file.
pub fn page(report: &Report) -> Result<Markup> {
    let o = &report.overview;
    Ok(html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                title { "Report of run " (o.run.name) }
                style { (PreEscaped(STYLE)) }
            }
            body {
                (parts::head(o))
                p.quiet {
                    "database " (report.database) ", owner " (o.run.owner) ", created " (parts::time(&o.run.created_at))
                    @if let Some(at) = &o.run.finished_at { ", finished " (parts::time(at)) }
                    @if let Some(at) = &o.run.bake_in_until { ", can be rolled back until " (parts::time(at)) }
                }
                (parts::books(&o.progress))
                (parts::tables(&o.tables))
                (parts::dedup_by_table(&o.tables))
                (parts::throughput(o)?)
                h2 { "Time a chunk took" }
                div.plot { (PreEscaped(plots::chunk_durations(&report.chunk_seconds)?)) }
                (phases(report))
                (reconciliations(&report.reconciliations))
                (parts::quarantine(o))
                (failed_chunks(report))
                (parts::chunk_map(o))
                (alert_log(report))
                (rollbacks(report))
                (parts::throttle(o))
                h2 { "Settings" }
                pre { code { (format!("{:#}", report.options)) } }
                h2 { "Versions" }
                table { @for (name, version) in &report.versions { tr { td { (name) } td { (parts::text(version)) } } } }
            }
        }
    })
}

fn phases(report: &Report) -> Markup {
    html! {
        h2 { "Where the time went" }
        table { tr { @for phase in report.phase_seconds.keys() { th.n { (phase) } } }
                tr { @for seconds in report.phase_seconds.values() { td.n { (format!("{:.1} s", seconds.as_f64().unwrap_or(0.0))) } } } }
        p.quiet { "seconds of all workers added up" }
    }
}

fn count(count: Option<u64>) -> String {
    count.map_or("–".into(), |count| HumanCount(count).to_string())
}

fn reconciliations(passes: &[Reconciliation]) -> Markup {
    html! {
        h2 { "Reconciliation" }
        @if passes.is_empty() { p { "The run was not reconciled." } }
        @if let Some(first) = passes.first() {
            div.scroll { table {
                tr { th { "pass" } th { "verdict" } th { "looked at" } th { "finished" } @for (name, _) in first.findings() { th.n { (name) } } }
                @for pass in passes {
                    tr { td { (pass.reconciliation_id) } td { (pass.told_verdict()) } td { (pass.extent()) } td { (pass.finished_at.as_deref().map_or("–".into(), parts::time)) }
                         @for (_, found) in pass.findings() { td.n { (count(found)) } } }
                }
            } }
        }
    }
}

fn failed_chunks(report: &Report) -> Markup {
    html! {
        @if !report.failed_chunks.is_empty() {
            h2 { "Failed chunks" }
            table { tr { th { "chunk" } th.n { "attempts" } th { "SQLSTATE" } th { "message" } th { "hint" } }
                @for chunk in &report.failed_chunks {
                    tr { td { (chunk.chunk_id) } td.n { (chunk.attempts) } td { (chunk.sqlstate.as_deref().unwrap_or_default()) }
                         td { (chunk.message.as_deref().unwrap_or_default()) } td { (chunk.hint.as_deref().unwrap_or_default()) } }
                } }
        }
    }
}

fn alert_log(report: &Report) -> Markup {
    html! {
        h2 { "Alerts that fired" }
        @if report.alert_log.is_empty() { p.quiet { "none" } }
        @else { table { tr { th { "" } th { "since" } th { "until" } th { "" } }
            @for alert in &report.alert_log {
                tr { td { (alert.severity) " " (alert.kind) } td { (parts::time(&alert.since)) } td { (alert.cleared_at.as_deref().map_or("still firing".into(), parts::time)) } td { (alert.message) } }
            } } }
    }
}

fn rollbacks(report: &Report) -> Markup {
    html! {
        @if !report.rollbacks.is_empty() {
            h2 { "Rollbacks" }
            @for rollback in &report.rollbacks { pre { code { (format!("{rollback:#}")) } } }
        }
    }
}
