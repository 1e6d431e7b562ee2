//! The throttle: how fast this process reads, and its part in deciding how fast all of them may.
//!
//! ```text
//!   lanes ──bytes──▶ pace                                    once a second, each process
//!                     ▲  share of the rate      throttle_report ──▶ turn? ──▶ controller ──▶ throttle_decide
//!                     └───────────────────────────────┘               ▲
//!                       source: probes, sessions, snapshots ──────────┤ signals
//!                       target: probes, sessions, lag, WAL, disk ─────┘
//! ```
//!
//! The limits stand in the target's `dedup.throttle`, so that all workers of a run obey one; whichever process comes first in a second decides.

mod controller;
mod signals;

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use async_speed_limit::Limiter;
use serde_json::{Value, json};
use tokio::sync::{Notify, watch};
use uuid::Uuid;

use self::controller::{Bounds, Limits, Memory};
use self::signals::{Latency, Thresholds};
use crate::conn::{Endpoint, Role, Session};
use crate::error::{At, Error, Result, Side};
use crate::heartbeat;
use crate::progress::Counters;

/// Time between two reports.
const REPORT: Duration = Duration::from_secs(1);
/// Time between two probes.
const PROBE: Duration = Duration::from_millis(100);
/// Time that the target has to say how it is.
const PATIENCE: Duration = Duration::from_secs(5);
/// Bytes a second that a run is never slowed below, unless it says otherwise.
const LEAST_RATE: f64 = 1e6;

/// Said where the target gives no limits.
const UNASKED: &str = "the throttle can't be asked";

/// How fast this process may read.
pub struct Throttle {
    limiter: Limiter,
    /// Of what is written: as fast as is read.
    writing: Limiter,
    /// The limit was raised: who waits by the old one need not.
    raised: Notify,
    /// Why it is slowed, and to what.
    note: Mutex<Option<String>>,
}

impl Default for Throttle {
    fn default() -> Throttle {
        Throttle {
            limiter: Limiter::new(f64::INFINITY),
            writing: Limiter::new(f64::INFINITY),
            raised: Notify::new(),
            note: Mutex::default(),
        }
    }
}

impl std::fmt::Debug for Throttle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Throttle")
            .field("limit", &self.limiter.speed_limit())
            .field("note", &self.note())
            .finish()
    }
}

impl Throttle {
    /// Waits until so many bytes more may have been read.
    pub async fn pace(&self, bytes: usize) {
        self.wait(&self.limiter, bytes).await;
    }

    /// Waits until so many bytes more may have been written.
    pub async fn pace_writing(&self, bytes: usize) {
        self.wait(&self.writing, bytes).await;
    }

    /// At 1 kB a second a piece is a minute's: that long nobody waits for a limit that is no more.
    async fn wait(&self, limiter: &Limiter, bytes: usize) {
        tokio::select! {
            () = limiter.consume(bytes) => {}
            () = self.raised.notified() => {}
        }
    }

    /// Reads at most so many bytes a second, whatever signals say; none: no limit.
    pub fn at_most(&self, rate: Option<u64>) {
        self.allow(rate.map(|rate| rate as f64), None);
    }

    /// Why and to what the process is slowed.
    pub fn note(&self) -> Option<String> {
        self.note.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn allow(&self, rate: Option<f64>, reason: Option<String>) {
        let limit = rate.unwrap_or(f64::INFINITY);
        let before = self.limiter.speed_limit();
        if before != limit {
            self.limiter.set_speed_limit(limit);
            self.writing.set_speed_limit(limit);
            if limit > before {
                self.raised.notify_waiters();
            }
        }
        let note = rate.map(|rate| {
            let why = reason.map(|reason| format!(": {reason}")).unwrap_or_default();
            format!("slowed to {:.1} MB/s{why}", rate / 1e6)
        });
        *self.note.lock().unwrap_or_else(PoisonError::into_inner) = note;
    }
}

/// Reports, and decides when it is this process's turn, until dropped.
pub struct Throttling {
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Throttling {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// What a process throttles.
pub struct Flow {
    /// The source, where it is read.
    pub source: Option<Arc<Endpoint>>,
    /// The target.
    pub target: Arc<Endpoint>,
    /// The run.
    pub run: Uuid,
    /// Chunks in hand at a time.
    pub lanes: u16,
    /// With the throttle that lanes go by.
    pub counters: Arc<Counters>,
    /// Who is told the run's status.
    pub status: Option<watch::Sender<String>>,
}

impl Flow {
    /// Reports once, so that nothing is read faster than it may, and goes on reporting.
    pub async fn start(self) -> Throttling {
        let mut reporter = Reporter::new(self);
        let joined = async {
            reporter.connect().await?;
            // Signals of the source have to be there for the first decision: what can't be read is bad.
            reporter.probe_source().await;
            reporter.look_around().await?;
            reporter.report().await
        };
        if let Err(error) = joined.await {
            reporter.lose(&error);
        }
        Throttling { task: tokio::spawn(reporter.go_on()) }
    }
}

/// The process's part.
struct Reporter {
    flow: Flow,
    process: Uuid,
    source: Option<Session>,
    target: Option<Session>,
    read: Latency,
    commit: Latency,
    /// Signals count.
    by_signals: bool,
    /// Why the target can't be probed.
    unprobed: Option<String>,
    /// Where the target's WAL was at the last decision.
    wal: Option<(Instant, f64)>,
}

impl Reporter {
    fn new(flow: Flow) -> Reporter {
        Reporter {
            flow,
            process: Uuid::new_v4(),
            source: None,
            target: None,
            read: Latency::default(),
            commit: Latency::default(),
            by_signals: true,
            unprobed: None,
            wal: None,
        }
    }

    async fn go_on(mut self) {
        loop {
            match self.second().await {
                Ok(()) => {}
                Err(error) => {
                    self.lose(&error);
                    self.target = None;
                    tokio::time::sleep(REPORT).await;
                }
            }
        }
    }

    /// Without an answer nobody knows what source and target bear: then it is little.
    fn lose(&mut self, error: &Error) {
        let throttle = &self.flow.counters.throttle;
        if !throttle.note().is_some_and(|note| note.contains(UNASKED)) {
            tracing::warn!("{UNASKED}: {error}");
        }
        throttle.allow(Some(LEAST_RATE), Some(UNASKED.to_owned()));
    }

    async fn connect(&mut self) -> Result<()> {
        if self.target.as_ref().is_none_or(Session::is_closed) {
            self.target = Some(self.flow.target.connect_patiently(Role::Heartbeat).await?);
        }
        Ok(())
    }

    /// Probes for a second and reports.
    async fn second(&mut self) -> Result<()> {
        let until = Instant::now() + REPORT;
        self.connect().await?;
        if !self.by_signals {
            tokio::time::sleep_until(until.into()).await;
        }
        self.probe_until(until).await?;
        self.report().await
    }

    async fn probe_until(&mut self, until: Instant) -> Result<()> {
        while Instant::now() < until {
            let next = Instant::now() + PROBE;
            self.probe_source().await;
            self.probe_target().await?;
            tokio::time::sleep_until(next.into()).await;
        }
        Ok(())
    }

    /// Where others are at work, what is usual for them is learnt before the first chunk is read.
    async fn look_around(&mut self) -> Result<()> {
        let Some(target) = &self.target else { return Ok(()) };
        let doing = "looking around";
        let sql = "SELECT EXISTS (SELECT FROM dedup.runs WHERE run_id = $1 AND (options #>> '{settings,throttle,off}')::bool)";
        let row = target.client.query_one(sql, &[&self.flow.run]).await.at(Side::Target, doing)?;
        if row.try_get(0).at(Side::Target, doing)? {
            return Ok(());
        }
        let mut signals = self.target_signals().await;
        self.look_at_source(&mut signals).await;
        if signals::somebody_is_at_work(&signals) {
            self.probe_until(Instant::now() + REPORT).await?;
        }
        Ok(())
    }

    async fn probe_source(&mut self) {
        let Some(endpoint) = &self.flow.source else { return };
        if self.source.as_ref().is_none_or(Session::is_closed) {
            // Best effort: without it the signals of the source are unknown, which is bad.
            self.source = endpoint.connect(Role::Heartbeat).await.ok();
        }
        let Some(session) = &self.source else { return };
        let began = Instant::now();
        match session.client.batch_execute("SELECT pg_catalog.count(*) FROM pg_catalog.pg_namespace").await {
            Ok(()) => self.read.add(milliseconds(began)),
            Err(_) => self.source = None,
        }
    }

    /// A commit that waits for the disk and writes next to nothing.
    async fn probe_target(&mut self) -> Result<()> {
        let Some(session) = &self.target else { return Ok(()) };
        let began = Instant::now();
        let probe = "SELECT pg_catalog.pg_logical_emit_message(true, 'pg_dedup_migrate', '')";
        match session.client.batch_execute(probe).await {
            Ok(()) => {
                self.commit.add(milliseconds(began));
                self.unprobed = None;
            }
            Err(error) if error.is_closed() => {
                return Err(Error::driver(Side::Target, "probing the target", error));
            }
            // A standby that was made of the target, or a function that was taken from the role.
            Err(error) => self.unprobed = Some(error.to_string()),
        }
        Ok(())
    }

    async fn report(&mut self) -> Result<()> {
        let read = self.flow.counters.throttle.limiter.total_bytes_consumed() as i64;
        let Some(target) = &self.target else { return Ok(()) };
        let doing = "throttle_report";
        let row = target
            .client
            .query_one(
                "SELECT run_status, allowed, by_signals, reason, turn FROM dedup.throttle_report($1::uuid, $2::uuid, $3::int4, $4::int8)",
                &[&self.flow.run, &self.process, &i32::from(self.flow.lanes), &read],
            )
            .await
            .at(Side::Target, doing)?;
        if let (Some(status), Some(now)) =
            (&self.flow.status, row.try_get::<_, Option<String>>(0).at(Side::Target, doing)?)
        {
            heartbeat::tell(status, now);
        }
        let allowed: Option<f64> = row.try_get(1).at(Side::Target, doing)?;
        self.flow.counters.throttle.allow(allowed, row.try_get(3).at(Side::Target, doing)?);
        self.by_signals = row.try_get::<_, Option<bool>>(2).at(Side::Target, doing)?.unwrap_or(true);
        match row.try_get::<_, Option<Value>>(4).at(Side::Target, doing)? {
            Some(turn) => self.decide(&turn).await,
            None => Ok(()),
        }
    }

    async fn decide(&mut self, turn: &Value) -> Result<()> {
        let mut signals = self.target_signals().await;
        self.look_at_source(&mut signals).await;
        let number = |value: &Value| value.as_f64();
        let wal_now = number(&signals["wal_position"]).map(|position| (Instant::now(), position));
        let wal_per_second = match (self.wal, wal_now) {
            (Some((then, before)), Some((now, position))) if now > then => {
                Some((position - before) / (now - then).as_secs_f64())
            }
            _ => None,
        };
        self.wal = wal_now;
        let options = &turn["options"];
        let most = number(&options["max_rate"]);
        let least = number(&options["min_rate"]).unwrap_or(LEAST_RATE);
        let bounds = Bounds { least: least.min(most.unwrap_or(f64::MAX)), most };
        let limits = Limits {
            rate: number(&turn["byte_rate"]),
            active: turn["active_chunks"].as_u64().and_then(|active| u32::try_from(active).ok()),
        };
        let hardly_moving = limits.rate.is_some_and(|rate| rate <= bounds.least);
        self.read.learn(hardly_moving);
        self.commit.learn(hardly_moving);
        if let Some(why) = &self.unprobed {
            signals["target_probe"] = json!({"unknown": why});
        }
        let mut bad =
            signals::verdicts(&signals, &self.read, &self.commit, wal_per_second, &Thresholds::default());
        for (name, latency) in [("source_read_ms", &self.read), ("target_commit_ms", &self.commit)] {
            signals[name] = json!(latency.high());
        }
        let memory: Memory = serde_json::from_value(turn["controller"].clone()).unwrap_or_default();
        let throughput = number(&turn["throughput"]).unwrap_or(0.0);
        let lanes = turn["lanes"].as_u64().and_then(|lanes| u32::try_from(lanes).ok()).unwrap_or(1);
        let begins = turn["controller"].as_object().is_some_and(serde_json::Map::is_empty);
        let gently = begins && bad.is_empty() && signals::somebody_is_at_work(&signals);
        let (next, memory, state) = if gently {
            bad.push("others are at work, so it begins gently".to_owned());
            controller::begin_gently(bounds)
        } else {
            controller::decide(limits, memory, bounds, !bad.is_empty(), throughput, lanes)
        };
        if next.rate.is_none() != limits.rate.is_none() {
            match next.rate {
                Some(rate) => tracing::warn!("slowed to {:.1} MB/s: {}", rate / 1e6, bad.join("; ")),
                None => tracing::info!("as fast as it goes again"),
            }
        }
        let memory = serde_json::to_value(memory).map_err(|e| Error::refused(e.to_string()))?;
        let reason = (!bad.is_empty()).then(|| bad.join("; "));
        let Some(target) = &self.target else { return Ok(()) };
        target
            .client
            .execute(
                "SELECT dedup.throttle_decide($1::uuid, $2::uuid, $3::int8, $4::int4, $5::text, \
                     coalesce($6::text, (SELECT reason FROM dedup.throttle WHERE run_id = $1 AND $5 <> 'free')), $7::jsonb, $8::jsonb)",
                &[
                    &self.flow.run,
                    &self.process,
                    &next.rate.map(|rate| rate as i64),
                    &next.active.map(|active| active as i32),
                    &state.name(),
                    &reason,
                    &signals,
                    &memory,
                ],
            )
            .await
            .at(Side::Target, "throttle_decide")?;
        Ok(())
    }

    /// What the target says of itself, in time.
    async fn target_signals(&self) -> Value {
        let Some(target) = &self.target else { return json!({}) };
        let parameters: [&(dyn tokio_postgres::types::ToSql + Sync); 1] = [&self.flow.run];
        let asked = target.client.query_one("SELECT dedup.target_signals($1::uuid)", &parameters);
        let why = match tokio::time::timeout(PATIENCE, asked).await {
            Ok(Ok(row)) => match row.try_get(0) {
                Ok(signals) => return signals,
                Err(error) => error.to_string(),
            },
            Ok(Err(error)) => error.to_string(),
            Err(_) => {
                target.cancel().await;
                format!("no answer within {} s", PATIENCE.as_secs())
            }
        };
        json!({"target_probe": {"unknown": why}})
    }

    async fn look_at_source(&mut self, signals: &mut Value) {
        if self.flow.source.is_none() {
            return;
        }
        let looked = match &self.source {
            Some(session) => source_signals(session).await,
            None => Err(Error::refused("the source can't be reached")),
        };
        match looked {
            Ok(Value::Object(of_source)) => {
                for (name, value) in of_source {
                    signals[name] = value;
                }
            }
            Ok(_) => signals["source_probe"] = json!({"unknown": "not an object"}),
            Err(error) => {
                signals["source_probe"] = json!({"unknown": error.to_string()});
                self.source = None;
            }
        }
    }
}

fn milliseconds(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1e3
}

/// What the source says of itself; the same questions as `dedup.target_signals` asks.
async fn source_signals(source: &Session) -> Result<Value> {
    source
        .client
        .query_one(
            "SELECT pg_catalog.jsonb_build_object( \
                 'source_sessions', CASE WHEN pg_catalog.bool_or(a.state IS NULL) THEN '{\"unknown\": \"the state of sessions may not be seen; GRANT pg_read_all_stats\"}'::pg_catalog.jsonb \
                     ELSE pg_catalog.to_jsonb(pg_catalog.count(*) FILTER (WHERE a.state <> 'idle' OR a.state_change > pg_catalog.clock_timestamp() - '2 s'::pg_catalog.interval)) END, \
                 'source_connections', (SELECT pg_catalog.count(*)::pg_catalog.float8 / pg_catalog.current_setting('max_connections')::pg_catalog.float8 \
                     FROM pg_catalog.pg_stat_activity AS c WHERE c.backend_type = 'client backend' OR c.backend_type IS NULL AND c.usesysid IS NOT NULL), \
                 'snapshot_age', (SELECT pg_catalog.max(extract(epoch FROM pg_catalog.clock_timestamp() - s.xact_start))::pg_catalog.float8 \
                     FROM pg_catalog.pg_stat_activity AS s WHERE s.backend_xmin IS NOT NULL AND s.backend_type = 'client backend' AND s.application_name NOT LIKE 'pg-dedup-migrate/%')) \
             FROM pg_catalog.pg_stat_activity AS a WHERE (a.backend_type = 'client backend' OR a.backend_type IS NULL AND a.usesysid IS NOT NULL) AND a.application_name NOT LIKE 'pg-dedup-migrate/%'",
            &[],
        )
        .await
        .and_then(|row| row.try_get(0))
        .at(Side::Source, "asking for signals")
}
