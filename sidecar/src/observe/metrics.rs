//! A run as OpenMetrics text. What the target knows is the same from every process; phases are this one's.

use std::sync::atomic::AtomicU64;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::{ConstGauge, Gauge};
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::{Registry, Unit};

use super::phases;
use crate::error::{Error, Result};
use crate::view::overview::Overview;

/// What OpenMetrics text is served as.
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct State {
    state: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfTable {
    table: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Outcome {
    table: String,
    outcome: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Refused {
    sqlstate: String,
    reason: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Firing {
    severity: String,
    kind: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Signal {
    signal: String,
}

type Gauges<L> = Family<L, Gauge<f64, AtomicU64>>;

/// The text; without an overview the target did not answer.
pub fn exposition(overview: Option<&Overview>) -> Result<String> {
    let mut registry = Registry::with_prefix("pg_dedup_migrate");
    registry.register(
        "build",
        "Version of the worker",
        Info::new(vec![("version", env!("CARGO_PKG_VERSION"))]),
    );
    registry.register_with_unit(
        "chunk_phase",
        "Time that chunks of this process took by phase",
        Unit::Seconds,
        phases::all(),
    );
    registry.register("target_up", "1: the target answers", ConstGauge::new(i64::from(overview.is_some())));
    if let Some(overview) = overview {
        let of_run = registry
            .sub_registry_with_label(("run".into(), label(&overview.run.name).into()))
            .sub_registry_with_label(("run_id".into(), overview.run.run_id.clone().into()));
        slis(of_run, overview);
        books(of_run, overview);
        throttle(of_run, overview);
        filter(of_run, overview);
        alerts(of_run, overview);
    }
    let mut text = String::new();
    encode(&mut text, &registry).map_err(|e| Error::refused(format!("can't write metrics: {e}")))?;
    Ok(text)
}

/// The encoder writes label values as they are: what would end one is escaped here.
fn label(text: &str) -> String {
    text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

/// OpenMetrics wants the singular.
fn ratio() -> Unit {
    Unit::Other("ratio".into())
}

fn gauge(registry: &mut Registry, name: &str, help: &str, value: Option<f64>) {
    if let Some(value) = value {
        registry.register(name, help, ConstGauge::new(value));
    }
}

fn gauge_in(registry: &mut Registry, name: &str, help: &str, unit: Unit, value: Option<f64>) {
    if let Some(value) = value {
        registry.register_with_unit(name, help, unit, ConstGauge::new(value));
    }
}

fn slis(registry: &mut Registry, o: &Overview) {
    let status = Gauges::<State>::default();
    status.get_or_create(&State { state: o.run.status.clone() }).set(1.0);
    registry.register("run_status", "1 for the status that the run has", status);
    gauge(
        registry,
        "migration_throughput_gbps",
        "Source bits in 10^9 a second over the last minute",
        Some(o.slis.migration_throughput_gbps),
    );
    gauge(
        registry,
        "chunk_completion_rate",
        "Chunks verified in the last minute",
        Some(o.slis.chunk_completion_rate),
    );
    gauge(registry, "dedup_ratio", "Part of the records dropped as duplicates", o.slis.dedup_ratio);
    gauge(
        registry,
        "reconciliation_mismatch_count",
        "Mismatches that the last reconciliation found and nobody mended",
        Some(o.slis.reconciliation_mismatch_count),
    );
    gauge_in(
        registry,
        "checkpoint_lag",
        "Time since the last chunk was written",
        Unit::Seconds,
        o.slis.checkpoint_lag,
    );
    gauge_in(
        registry,
        "chunk_failure",
        "Part of the attempts at chunks that failed, of the last ten minutes",
        ratio(),
        o.slis.chunk_failure_rate,
    );
    gauge_in(registry, "eta", "Time left", Unit::Seconds, o.eta_seconds);
    gauge_in(registry, "time_to_deadline", "Time until the deadline", Unit::Seconds, o.seconds_to_deadline);
    gauge(registry, "processes", "Processes that work on the run", Some(o.processes as f64));
}

fn books(registry: &mut Registry, o: &Overview) {
    let records = Family::<Outcome, CounterValue>::default();
    let bytes = Family::<OfTable, CounterValue>::default();
    let progress = Gauges::<OfTable>::default();
    let eta = Gauges::<OfTable>::default();
    for table in &o.tables {
        let of_table = OfTable { table: label(&table.source) };
        bytes.get_or_create(&of_table).inc_by(table.books.source_bytes);
        progress.get_or_create(&of_table).set(table.books.percent.unwrap_or(0.0) / 100.0);
        if let Some(seconds) = table.eta_seconds {
            eta.get_or_create(&of_table).set(seconds);
        }
        for (outcome, count) in table.books.outcomes() {
            records.get_or_create(&Outcome { table: label(&table.source), outcome }).inc_by(count);
        }
    }
    registry.register("records", "Records read, by what became of them", records);
    registry.register_with_unit("source", "Source read by chunks that are written", Unit::Bytes, bytes);
    registry.register_with_unit("table_progress", "Part written, by planned bytes", ratio(), progress);
    registry.register_with_unit("table_eta", "Time until the table is done", Unit::Seconds, eta);
    let chunks = Gauges::<State>::default();
    for (state, count) in o.progress.states() {
        chunks.get_or_create(&State { state: state.to_owned() }).set(count as f64);
    }
    registry.register("chunks", "Chunks of the plan by state", chunks);
    registry.register(
        "chunk_retries",
        "Attempts at chunks that had to be made again",
        ConstCounter::new(o.retries),
    );
    let quarantine = Gauges::<Refused>::default();
    for line in &o.quarantine {
        let refused = Refused { sqlstate: label(&line.sqlstate), reason: label(&line.reason) };
        quarantine.get_or_create(&refused).set(line.records as f64);
    }
    registry.register("quarantined_records", "Records in quarantine by reason", quarantine);
}

fn throttle(registry: &mut Registry, o: &Overview) {
    let throttle = &o.throttle;
    let states = Gauges::<State>::default();
    for state in ["free", "slowed", "recovering", "off"] {
        states
            .get_or_create(&State { state: state.to_owned() })
            .set(f64::from(u8::from(throttle.state == state)));
    }
    registry.register("throttle_state", "1 for the state that the throttle is in", states);
    gauge(
        registry,
        "throttle_limit_bytes_per_second",
        "Bytes a second that all workers may read together; absent: no limit",
        throttle.allowed,
    );
    gauge(
        registry,
        "throttle_active_chunks",
        "Chunks that may be worked on at a time; absent: as many as there are workers",
        throttle.active_chunks.map(|chunks| chunks as f64),
    );
    let signals = Gauges::<Signal>::default();
    let unread = Gauges::<Signal>::default();
    for (name, value) in &throttle.signals {
        let signal = Signal { signal: name.clone() };
        if let Some(value) = value.as_f64() {
            signals.get_or_create(&signal).set(value);
        } else if let Some(free) = value["free_bytes"].as_f64() {
            signals.get_or_create(&signal).set(free);
        }
        if !value.is_null() {
            unread.get_or_create(&signal).set(f64::from(u8::from(value.get("unknown").is_some())));
        }
    }
    registry.register("throttle_signal", "Signals of source and target as they were last read", signals);
    registry.register("throttle_signal_unknown", "1: the signal can't be read", unread);
    if let Some(reason) =
        throttle.reason.as_ref().filter(|_| matches!(throttle.state.as_str(), "slowed" | "recovering"))
    {
        registry.register(
            "throttle_reason",
            "Why the run is slowed",
            Info::new(vec![("reason", label(&without_figures(reason)))]),
        );
    }
}

/// A reason with `#` for each figure: with the figures every second would be a series of its own.
fn without_figures(reason: &str) -> String {
    let mut plain = String::with_capacity(reason.len());
    for c in reason.chars() {
        let digit = c.is_ascii_digit() || c == '.' && plain.ends_with('#');
        match (digit, plain.ends_with('#')) {
            (true, true) => {}
            (true, false) => plain.push('#'),
            (false, _) => plain.push(c),
        }
    }
    plain
}

fn filter(registry: &mut Registry, o: &Overview) {
    let Some(filter) = &o.filter else { return };
    gauge(registry, "filter_warm", "1: the filter knows every entry", Some(f64::from(u8::from(filter.warm))));
    gauge_in(registry, "filter_fill", "Part of the filter's bits that are set", ratio(), Some(filter.fill));
    gauge_in(
        registry,
        "filter_false_positive",
        "Part of new contents that the filter sends to the index for nothing, by its fill",
        ratio(),
        Some(filter.predicted_false_positive_rate),
    );
    gauge_in(registry, "filter_size", "Memory of the filter", Unit::Bytes, Some(filter.filter_bytes));
    gauge(
        registry,
        "claims_held",
        "Contents that transactions in flight are writing",
        Some(filter.claims_held),
    );
    gauge(registry, "claim_slots", "Contents that may be so at a time", Some(filter.claim_slots));
}

fn alerts(registry: &mut Registry, o: &Overview) {
    let firing = Gauges::<Firing>::default();
    for alert in &o.alerts {
        firing.get_or_create(&Firing { severity: alert.severity.clone(), kind: alert.kind.clone() }).set(1.0);
    }
    registry.register("alert_firing", "1 for every alert that fires", firing);
}

type CounterValue = prometheus_client::metrics::counter::Counter<u64, AtomicU64>;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn label_values_are_escaped() {
        assert_eq!(label("a \"b\" \\ c\n"), "a \\\"b\\\" \\\\ c\\n");
    }

    #[test]
    fn a_target_that_is_away_is_told() {
        let text = exposition(None).unwrap();
        assert!(text.contains("pg_dedup_migrate_target_up 0\n"), "{text}");
        assert!(text.ends_with("# EOF\n"), "{text}");
    }
}
