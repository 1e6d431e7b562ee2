//! What source and target bear: probed all the time, decided when it is this process's turn.
//!
//! ```text
//!   source: probes, sessions, snapshots ──────┐
//!   target: probes, sessions, lag, WAL, query ┴─signals──▶ controller ──▶ throttle_decide
//! ```
//!
//! Its sessions are its own: a commit that waits for a standby which does not answer, or a query of the user's that takes long, holds up nothing else.
//! Whatever does not answer in time is a signal that can't be read, which is bad.

use std::sync::Arc;
use std::time::{Duration, Instant};

use pg_dedup_throttle::signals::somebody_is_at_work;
use pg_dedup_throttle::{Decision, Turn, Watch};
use serde_json::{Value, json};
use tokio::sync::{mpsc, watch};
use uuid::Uuid;

use super::{REPORT, in_time};
use crate::conn::{Endpoint, Role, Session, UNWAITED};
use crate::error::{At, Error, Result, Side};

/// Time between two probes.
const PROBE: Duration = Duration::from_millis(100);

/// A server that is probed.
struct Probed {
    side: Side,
    endpoint: Arc<Endpoint>,
    session: Option<Session>,
    /// Why it can't be probed.
    unprobed: Option<String>,
}

impl Probed {
    fn new(side: Side, endpoint: Arc<Endpoint>) -> Self {
        Self { side, endpoint, session: None, unprobed: None }
    }

    /// The session, opened anew where there is none.
    async fn session(&mut self) -> Result<&Session> {
        let session = match self.session.take().filter(|session| !session.is_closed()) {
            Some(session) => session,
            None => in_time(self.side, "connecting", self.endpoint.connect(Role::Heartbeat)).await?,
        };
        Ok(self.session.insert(session))
    }

    /// Of the source a trivial query, of the target a commit that waits for the disk and writes next to nothing. Answers how many milliseconds it
    /// took.
    async fn probe(&mut self) -> Option<f64> {
        let (doing, sql) = match self.side {
            Side::Target => (
                "probing the target",
                "SELECT pg_catalog.pg_logical_emit_message(true, 'pg_dedup_migrate', '')",
            ),
            _ => ("probing the source", "SELECT pg_catalog.count(*) FROM pg_catalog.pg_namespace"),
        };
        let side = self.side;
        let probed = async {
            let session = self.session().await?;
            let began = Instant::now();
            in_time(side, doing, async { session.client.batch_execute(sql).await.at(side, doing) }).await?;
            Ok::<_, Error>(began.elapsed().as_secs_f64() * 1e3)
        };
        match probed.await {
            Ok(milliseconds) => {
                self.unprobed = None;
                Some(milliseconds)
            }
            // A server that is away, a standby that was made of the target, or a function that was taken from the role.
            Err(error) => {
                self.unprobed = Some(error.to_string());
                self.give_up().await;
                None
            }
        }
    }

    /// What the server says of itself, in time, or why it says nothing.
    async fn signals(&mut self, run: Uuid) -> Value {
        let side = self.side;
        let asked = async {
            let session = self.session().await?;
            in_time(side, "asking for signals", async {
                match side {
                    Side::Target => target_signals(session, run).await,
                    _ => source_signals(session).await,
                }
            })
            .await
        };
        let why = match asked.await {
            Ok(signals @ Value::Object(_)) => return signals,
            Ok(_) => "not an object".to_owned(),
            Err(error) => {
                self.give_up().await;
                error.to_string()
            }
        };
        json!({self.probe_name(): {"unknown": why}})
    }

    /// The signal that says why the server can't be probed.
    fn probe_name(&self) -> String {
        format!("{}_probe", self.side)
    }

    /// What is still being waited for is of no use any more.
    async fn give_up(&mut self) {
        if let Some(session) = self.session.take() {
            session.cancel().await;
        }
    }
}

/// Knows what the servers bear, and decides.
pub struct Decider {
    source: Option<Probed>,
    target: Probed,
    run: Uuid,
    process: Uuid,
    watch: Watch,
}

impl Decider {
    /// Without a source only the target is looked at.
    pub fn new(source: Option<Arc<Endpoint>>, target: Arc<Endpoint>, run: Uuid, process: Uuid) -> Self {
        Self {
            source: source.map(|source| Probed::new(Side::Source, source)),
            target: Probed::new(Side::Target, target),
            run,
            process,
            watch: Watch::default(),
        }
    }

    /// Probes, and decides whenever a turn comes, until that is dropped by whom it comes from.
    pub async fn go_on(mut self, mut turns: mpsc::Receiver<Value>, mut by_signals: watch::Receiver<bool>) {
        while by_signals.wait_for(|count| *count).await.is_ok() {
            let next = Instant::now() + PROBE;
            self.probe().await;
            match turns.try_recv() {
                Ok(turn) => {
                    if let Err(error) = self.decide(&turn).await {
                        tracing::debug!("no decision: {error}");
                        self.target.give_up().await;
                    }
                }
                Err(mpsc::error::TryRecvError::Empty) => tokio::time::sleep_until(next.into()).await,
                Err(mpsc::error::TryRecvError::Disconnected) => return,
            }
        }
    }

    async fn probe(&mut self) {
        let of_source = async {
            match &mut self.source {
                Some(source) => source.probe().await,
                None => None,
            }
        };
        let (read, commit) = tokio::join!(of_source, self.target.probe());
        read.into_iter().for_each(|milliseconds| self.watch.read.add(milliseconds));
        commit.into_iter().for_each(|milliseconds| self.watch.commit.add(milliseconds));
    }

    /// Where others are at work, what is usual for them is learnt before the first chunk is read. Signals of the source have to be there for the
    /// first decision: what can't be read is bad.
    pub async fn look_around(&mut self) {
        self.probe().await;
        if somebody_is_at_work(&self.signals().await) {
            let until = Instant::now() + REPORT;
            while Instant::now() < until {
                self.probe().await;
                tokio::time::sleep(PROBE).await;
            }
        }
    }

    /// Decides how fast the run may go.
    ///
    /// # Errors
    /// The target does not take the decision.
    pub async fn decide(&mut self, turn: &Value) -> Result<()> {
        let mut signals = self.signals().await;
        for probed in self.source.iter().chain([&self.target]) {
            if let Some(why) = &probed.unprobed {
                signals[probed.probe_name()] = json!({"unknown": why});
            }
        }
        let Decision { before, limits, state, memory, reason } =
            self.watch.decide(&Turn::from(turn), &mut signals, Instant::now());
        if limits.rate.is_none() != before.rate.is_none() {
            match limits.rate {
                Some(rate) => {
                    tracing::warn!(
                        "slowed to {:.1} MB/s: {}",
                        rate / 1e6,
                        reason.as_deref().unwrap_or_default()
                    );
                }
                None => tracing::info!("as fast as it goes again"),
            }
        }
        let (run, process) = (self.run, self.process);
        let target = self.target.session().await?;
        let doing = "throttle_decide";
        in_time(Side::Target, doing, async {
            target
                .client
                .execute(
                    &format!("SELECT dedup.throttle_decide($1::uuid, $2::uuid, $3::int8, $4::int4, $5::text, $6::text, $7::jsonb, $8::jsonb), {UNWAITED}"),
                    &[
                        &run,
                        &process,
                        &limits.rate.map(|rate| rate as i64),
                        &limits.active.map(|active| active as i32),
                        &state.name(),
                        &reason,
                        &signals,
                        &memory,
                    ],
                )
                .await
                .at(Side::Target, doing)
        })
        .await
        .map(drop)
    }

    /// What both servers say of themselves, in time.
    async fn signals(&mut self) -> Value {
        let run = self.run;
        let of_source = async {
            match &mut self.source {
                Some(source) => source.signals(run).await,
                None => json!({}),
            }
        };
        let (mut signals, of_source) = tokio::join!(self.target.signals(run), of_source);
        if let (Value::Object(all), Value::Object(of_source)) = (&mut signals, of_source) {
            all.extend(of_source);
        }
        signals
    }
}

async fn target_signals(target: &Session, run: Uuid) -> Result<Value> {
    let doing = "asking for signals";
    let row = target.client.query_one("SELECT dedup.target_signals($1::uuid)", &[&run]).await;
    row.and_then(|row| row.try_get(0)).at(Side::Target, doing)
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
                 'snapshot_age', CASE WHEN pg_catalog.bool_or(a.state IS NULL) THEN '{\"unknown\": \"snapshots of others may not be seen; GRANT pg_read_all_stats\"}'::pg_catalog.jsonb \
                     ELSE (SELECT pg_catalog.to_jsonb(pg_catalog.max(extract(epoch FROM pg_catalog.clock_timestamp() - s.since))::pg_catalog.float8) FROM ( \
                         SELECT b.xact_start FROM pg_catalog.pg_stat_activity AS b WHERE (b.backend_xmin IS NOT NULL OR b.backend_xid IS NOT NULL) AND b.backend_type = 'client backend' AND b.application_name NOT LIKE 'pg-dedup-migrate/%' \
                         UNION ALL SELECT x.prepared FROM pg_catalog.pg_prepared_xacts AS x) AS s(since)) END, \
                 'xmin_age', (SELECT pg_catalog.to_jsonb(pg_catalog.max(pg_catalog.age(h.xmin))::pg_catalog.float8 / pg_catalog.current_setting('autovacuum_freeze_max_age')::pg_catalog.float8) FROM ( \
                     SELECT l.xmin FROM pg_catalog.pg_replication_slots AS l UNION ALL SELECT l.catalog_xmin FROM pg_catalog.pg_replication_slots AS l \
                     UNION ALL SELECT b.backend_xmin FROM pg_catalog.pg_stat_replication AS b UNION ALL SELECT x.transaction FROM pg_catalog.pg_prepared_xacts AS x \
                     UNION ALL SELECT x.xid FROM pg_catalog.pg_stat_activity AS b, LATERAL (VALUES (b.backend_xmin), (b.backend_xid)) AS x(xid) WHERE b.application_name NOT LIKE 'pg-dedup-migrate/%') AS h(xmin))) \
             FROM pg_catalog.pg_stat_activity AS a WHERE (a.backend_type = 'client backend' OR a.backend_type IS NULL AND a.usesysid IS NOT NULL) AND a.application_name NOT LIKE 'pg-dedup-migrate/%'",
            &[],
        )
        .await
        .and_then(|row| row.try_get(0))
        .at(Side::Source, "asking for signals")
}
