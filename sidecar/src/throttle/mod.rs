//! The throttle: how fast this process reads, and its part in deciding how fast all of them may.
//!
//! ```text
//!   lanes ──bytes──▶ pace                        once a second, each process
//!                     ▲  share of the rate      throttle_report ──▶ turn? ──▶ decider
//!                     └───────────────────────────────┘                         │ throttle_decide
//!                                                     dedup.throttle ◀──────────┘
//! ```
//!
//! The limits stand in the target's `dedup.throttle`, so that all workers of a run obey one; whichever process comes first in a second decides. What the
//! decider waits for, on sessions of its own, holds up no report.

mod decider;

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_speed_limit::Limiter;
use pg_dedup_throttle::LEAST_RATE;
use serde_json::Value;
use tokio::sync::{Notify, mpsc, watch};
use uuid::Uuid;

use self::decider::Decider;
use crate::conn::{Endpoint, Role, Session, UNWAITED};
use crate::error::{At, Error, Kind, Result, Side};
use crate::heartbeat;
use crate::progress::Counters;

/// Time between two reports.
const REPORT: Duration = Duration::from_secs(1);
/// Time that a server has to answer.
const PATIENCE: Duration = Duration::from_secs(5);

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
    tasks: [tokio::task::JoinHandle<()>; 2],
}

impl Drop for Throttling {
    fn drop(&mut self) {
        self.tasks.iter().for_each(tokio::task::JoinHandle::abort);
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
        let process = Uuid::new_v4();
        let (turns, mut to_decide) = mpsc::channel(1);
        let (by_signals, signals_count) = watch::channel(true);
        let mut decider = Decider::new(self.source.clone(), self.target.clone(), self.run, process);
        let mut reporter = Reporter { flow: self, process, target: None, turns, by_signals };
        let joined = async {
            reporter.connect().await?;
            if reporter.goes_by_signals().await? {
                decider.look_around().await;
            }
            reporter.report().await?;
            // What was decided counts for the first chunk, too.
            if let Ok(turn) = to_decide.try_recv() {
                decider.decide(&turn).await?;
                reporter.report().await?;
            }
            Ok(())
        };
        if let Err(error) = joined.await {
            reporter.lose(&error);
        }
        let tasks = [tokio::spawn(reporter.go_on()), tokio::spawn(decider.go_on(to_decide, signals_count))];
        Throttling { tasks }
    }
}

/// Waits for a server's answer as long as the throttle has patience.
async fn in_time<T>(side: Side, doing: &'static str, answer: impl Future<Output = Result<T>>) -> Result<T> {
    tokio::time::timeout(PATIENCE, answer).await.unwrap_or_else(|_| {
        let why = format!("{doing}: no answer within {} s", PATIENCE.as_secs());
        Err(Error::new(side, Kind::Connection, why))
    })
}

/// Tells the target once a second how much this process has read, and learns how much it may.
struct Reporter {
    flow: Flow,
    process: Uuid,
    target: Option<Session>,
    /// To the decider: it is this process's turn.
    turns: mpsc::Sender<Value>,
    /// To the decider: signals count.
    by_signals: watch::Sender<bool>,
}

impl Reporter {
    async fn go_on(mut self) {
        let mut every = tokio::time::interval(REPORT);
        every.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        every.tick().await;
        loop {
            every.tick().await;
            let reported = async {
                self.connect().await?;
                self.report().await
            };
            if let Err(error) = reported.await {
                self.lose(&error);
                self.target = None;
            }
        }
    }

    /// Without an answer nobody knows what source and target bear: then it is little.
    fn lose(&mut self, error: &Error) {
        let throttle = &self.flow.counters.throttle;
        if !throttle.note().is_some_and(|note| note.contains(UNASKED)) {
            tracing::warn!("{UNASKED}: {error}");
        }
        // A lower cap counts on.
        let rate = LEAST_RATE.min(throttle.limiter.speed_limit());
        throttle.allow(Some(rate), Some(UNASKED.to_owned()));
    }

    async fn connect(&mut self) -> Result<()> {
        if self.target.as_ref().is_none_or(Session::is_closed) {
            self.target = Some(self.flow.target.connect_patiently(Role::Heartbeat).await?);
        }
        Ok(())
    }

    async fn goes_by_signals(&self) -> Result<bool> {
        let Some(target) = &self.target else { return Ok(true) };
        let doing = "asking for the throttle's settings";
        let sql = "SELECT NOT coalesce((options #>> '{settings,throttle,off}')::bool, false) FROM dedup.runs WHERE run_id = $1";
        let row = target.client.query_one(sql, &[&self.flow.run]).await.at(Side::Target, doing)?;
        row.try_get(0).at(Side::Target, doing)
    }

    async fn report(&mut self) -> Result<()> {
        let Some(target) = &self.target else { return Ok(()) };
        let counters = &self.flow.counters;
        let read = counters.throttle.limiter.total_bytes_consumed() as i64;
        let busy = counters.busy.load(Ordering::Relaxed).cast_signed();
        let doing = "throttle_report";
        let asked = async {
            target
                .client
                .query_one(
                    &format!(
                        "SELECT run_status, allowed, by_signals, reason, turn, {UNWAITED} \
                     FROM dedup.throttle_report($1::uuid, $2::uuid, $3::int4, $4::int4, $5::int8)"
                    ),
                    &[&self.flow.run, &self.process, &i32::from(self.flow.lanes), &busy, &read],
                )
                .await
                .at(Side::Target, doing)
        };
        let row = in_time(Side::Target, doing, asked).await?;
        if let (Some(status), Some(now)) =
            (&self.flow.status, row.try_get::<_, Option<String>>(0).at(Side::Target, doing)?)
        {
            heartbeat::tell(status, now);
        }
        let allowed: Option<f64> = row.try_get(1).at(Side::Target, doing)?;
        counters.throttle.allow(allowed, row.try_get(3).at(Side::Target, doing)?);
        let by_signals = row.try_get::<_, Option<bool>>(2).at(Side::Target, doing)?.unwrap_or(true);
        self.by_signals.send_if_modified(|known| std::mem::replace(known, by_signals) != by_signals);
        if let Some(turn) = row.try_get::<_, Option<Value>>(4).at(Side::Target, doing)? {
            // If it is still at the last one, the turn passes to another process.
            let _ = self.turns.try_send(turn);
        }
        Ok(())
    }
}
