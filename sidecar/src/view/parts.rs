//! Parts of pages: a run's books, tables, throttle, alerts and chunks as HTML. Whatever is text is escaped.

use indicatif::{HumanBytes, HumanCount};
use maud::{Markup, PreEscaped, html};
use serde_json::Value;

use super::overview::{Books, Overview, Table};
use super::plots;
use crate::error::Result;
use crate::progress::duration;

/// A time as the server's JSON has it, to the second, with its zone.
pub fn time(text: &str) -> String {
    let Some(second) = text.get(..19) else { return text.to_owned() };
    let zone = text[19..].trim_start_matches(['.', '0', '1', '2', '3', '4', '5', '6', '7', '8', '9']);
    let zone = if zone == "+00:00" { " UTC" } else { zone };
    format!("{}{zone}", second.replace('T', " "))
}

/// A time left; none: not known.
pub fn left(seconds: Option<f64>) -> String {
    seconds.map_or("–".into(), duration)
}

/// A value of the server's as text.
pub fn text(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

fn percent(part: Option<f64>) -> String {
    part.map_or("–".into(), |part| format!("{:.1} %", part * 100.0))
}

/// What a run is and how far.
pub fn head(o: &Overview) -> Markup {
    let books = &o.progress;
    html! {
        h1 { (o.run.name) " " span.quiet { (o.run.status) } }
        p.quiet { "run " code { (o.run.run_id) } @if let Some(at) = &o.run.started_at { ", began " (time(at)) } ", as of " (time(&o.at)) }
        div.tiles {
            div.tile { "done" b #percent { (books.written()) } }
            div.tile { "left" b { (left(o.eta_seconds)) } @if let Some(at) = &o.deadline { span.quiet { "deadline " (time(at)) } } }
            div.tile { "last minute" b { (format!("{:.1} MB/s", o.slis.migration_throughput_gbps * 125.0)) } span.quiet { (format!("{:.3} Gbit/s", o.slis.migration_throughput_gbps)) } }
            div.tile { "chunks a minute" b { (o.slis.chunk_completion_rate) } }
            div.tile { "duplicates" b { (percent(o.slis.dedup_ratio)) } }
            div.tile { "mismatches" b { (o.slis.reconciliation_mismatch_count) } }
            div.tile { "last chunk" b { (o.slis.checkpoint_lag.map_or("–".into(), |s| format!("{s:.0} s ago"))) } }
            div.tile { "processes" b { (o.processes) } }
        }
    }
}

/// Alerts that fire.
pub fn alerts(o: &Overview) -> Markup {
    html! {
        h2 { "Alerts" }
        @if o.alerts.is_empty() { p.quiet { "none" } }
        @for alert in &o.alerts {
            div class={ "alert " (alert.severity) } {
                b { (alert.severity) " " (alert.kind) } " " (alert.message) span.quiet { " since " (time(&alert.since)) }
                div { code { (alert.look_at) } }
            }
        }
    }
}

/// Where the records went; the books balance, so the columns add up to the first.
pub fn books(books: &Books) -> Markup {
    html! {
        h2 { "Books" }
        table { tr { th.n { "records read" } @for (name, _) in books.outcomes() { th.n { (name) } } th.n { "read" } }
                tr { td.n { (HumanCount(books.source_count)) } @for (_, count) in books.outcomes() { td.n { (HumanCount(count)) } } td.n { (HumanBytes(books.source_bytes)) } } }
    }
}

/// Tables with their progress.
pub fn tables(tables: &[Table]) -> Markup {
    html! {
        h2 { "Tables" }
        div.scroll { table {
            tr { th { "source" } th { "target" } th { "" } th.n { "written" } th.n { "left" } th.n { "chunks" } th.n { "failed" } th.n { "records" } th.n { "duplicates" } th.n { "quarantined" } th.n { "read" } }
            @for table in tables {
                @let books = &table.books;
                tr {
                    td { (table.source) } td { (table.target) div.quiet { "content is " (table.content_rule) } }
                    td { div.bar { i style={ "width:" (format!("{:.1}", books.percent.unwrap_or(0.0))) "%" } {} } }
                    td.n { (books.written()) } td.n { (left(table.eta_seconds)) }
                    td.n { (books.verified) "/" (books.chunks) } td.n { (books.failed) } td.n { (HumanCount(books.source_count)) }
                    td.n { (HumanCount(books.duplicate_count)) " " span.quiet { (percent(books.dedup_ratio())) } } td.n { (books.quarantined_count) } td.n { (HumanBytes(books.source_bytes)) }
                }
            }
        } }
    }
}

/// Bytes a second over time.
pub fn throughput(o: &Overview) -> Result<Markup> {
    Ok(html! { h2 { "Throughput" } div.plot { (PreEscaped(plots::throughput(&o.throughput)?)) } })
}

/// How the run is throttled, and why.
pub fn throttle(o: &Overview) -> Markup {
    let throttle = &o.throttle;
    html! {
        h2 { "Throttle" }
        p { b { (throttle.state) }
            @if let Some(rate) = throttle.allowed { ", at most " (format!("{:.1} MB/s", rate / 1e6)) } @else { ", no limit" }
            @if throttle.cap.is_some() { " (capped by dedup.set_rate)" }
            @if let Some(chunks) = throttle.active_chunks { ", " (chunks) " chunks at a time" }
            @if let Some(reason) = &throttle.reason { ": " (reason) } }
        @if !throttle.signals.is_empty() {
            details { summary.quiet { "signals" } table { @for (name, value) in &throttle.signals { tr { td { (name) } td { (signal(value)) } } } } }
        }
    }
}

fn signal(value: &Value) -> String {
    match value {
        Value::Null => "–".into(),
        Value::Number(n) => n
            .as_f64()
            .map_or(n.to_string(), |n| format!("{n:.3}").trim_end_matches('0').trim_end_matches('.').into()),
        Value::Object(fields) if fields.contains_key("unknown") => {
            fields["unknown"].as_str().unwrap_or_default().into()
        }
        other => other.to_string(),
    }
}

/// The chunks by state.
pub fn chunk_map(o: &Overview) -> Markup {
    let chunks = o.progress.chunks;
    let shown = o.chunk_map.len() as u64;
    html! {
        h2 { "Chunks" }
        div.map { @for letter in o.chunk_map.chars() { i class=(letter) {} } }
        p.quiet.key {
            @for (letter, name) in [("v", "verified"), ("w", "written"), ("s", "syncing"), ("p", "pending"), ("f", "failed")] { i class=(letter) {} (name) }
            @if chunks > shown { " – " (chunks.div_ceil(shown.max(1))) " chunks a square, the one to look at counts" }
        }
    }
}

/// Refused records by reason.
pub fn quarantine(o: &Overview) -> Markup {
    html! {
        @if !o.quarantine.is_empty() {
            h2 { "Quarantine" }
            table { tr { th { "SQLSTATE" } th { "reason" } th.n { "records" } } @for line in &o.quarantine { tr { td { (line.sqlstate) } td { (line.reason) } td.n { (HumanCount(line.records)) } } } }
        }
    }
}

/// The part of duplicates, table by table.
pub fn dedup_by_table(tables: &[Table]) -> Markup {
    html! {
        h2 { "Duplicates by table" }
        table { @for table in tables {
            @let part = table.books.dedup_ratio().unwrap_or(0.0) * 100.0;
            tr { td { (table.source) } td style="width:60%" { div.bar { i style={ "width:" (format!("{part:.1}")) "%" } {} } } td.n { (format!("{part:.1} %")) } }
        } }
    }
}
