//! A session that asks the target about the run.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::Value;
use tokio::sync::Mutex;
use uuid::Uuid;

use crate::conn::{Endpoint, Role, Session, UNWAITED, protocol_error};
use crate::error::{At, Error, Kind, Result, Side};
use crate::view::overview::Overview;

/// How long the target may take to answer.
const PATIENCE: Duration = Duration::from_secs(5);
/// How old an overview may be: however many look, the target is asked so often.
const FRESH: Duration = Duration::from_secs(1);
/// So many times what the last one took must have gone by before the next one is asked for: a run of very many chunks costs a tenth of a core at most.
const REST: u32 = 9;

/// Asks about one run, on sessions of its own that are made anew when they are lost.
pub struct Probe {
    target: Arc<Endpoint>,
    run: Uuid,
    inner: Mutex<Inner>,
    /// The session that alerts are looked at on.
    alerts: Mutex<Option<Session>>,
}

#[derive(Default)]
struct Inner {
    session: Option<Session>,
    last: Option<Last>,
    /// When the target last gave no answer.
    failed: Option<Instant>,
}

fn no_answer() -> Error {
    let why = format!("the target gave no answer within {} s", PATIENCE.as_secs());
    Error::new(Side::Target, Kind::Connection, why)
}

/// An overview, when it was there, and how long it took.
struct Last {
    at: Instant,
    took: Duration,
    overview: Arc<Overview>,
}

/// The session, opened anew where there is none.
async fn opened<'s>(session: &'s mut Option<Session>, target: &Endpoint) -> Result<&'s Session> {
    let open = match session.take().filter(|session| !session.is_closed()) {
        Some(session) => session,
        None => target.connect(Role::Observer).await?,
    };
    Ok(session.insert(open))
}

impl Probe {
    /// Not connected yet.
    pub fn new(target: Arc<Endpoint>, run: Uuid) -> Probe {
        Probe { target, run, inner: Mutex::default(), alerts: Mutex::default() }
    }

    /// Brings the run's alerts up to date, unless somebody has a moment ago; answers those that fire, in words, by kind. On a session of its own: whoever
    /// asks for an overview meanwhile does not wait for it.
    pub async fn check_alerts(&self, unless_within: Duration) -> Result<BTreeMap<String, String>> {
        let mut session = self.alerts.lock().await;
        let checked = async {
            let session = opened(&mut session, &self.target).await?;
            self.firing(session, unless_within).await
        };
        if let Ok(firing) = tokio::time::timeout(PATIENCE, checked).await {
            return firing;
        }
        // Whoever hangs there is left to its own timeouts.
        *session = None;
        Err(no_answer())
    }

    async fn firing(&self, session: &Session, unless_within: Duration) -> Result<BTreeMap<String, String>> {
        let doing = "looking at the alerts";
        session
            .client
            .execute(
                // It holds the run's row, which signs of life refer to.
                &format!("SELECT dedup.check_alerts($1::uuid, pg_catalog.make_interval(secs => $2::float8)), {UNWAITED}"),
                &[&self.run, &unless_within.as_secs_f64()],
            )
            .await
            .at(Side::Target, doing)?;
        let rows = session
            .client
            .query(
                "SELECT kind, severity || ' ' || kind || ': ' || message || '; ' || look_at FROM dedup.alerts WHERE run_id = $1::uuid",
                &[&self.run],
            )
            .await
            .at(Side::Target, doing)?;
        rows.iter()
            .map(|row| Ok((row.try_get(0).at(Side::Target, doing)?, row.try_get(1).at(Side::Target, doing)?)))
            .collect()
    }

    /// The run as it is now, or was a moment ago.
    pub async fn overview(&self) -> Result<Arc<Overview>> {
        let doing = "asking for an overview";
        let mut inner = self.inner.lock().await;
        if let Some(last) = &inner.last
            && last.at.elapsed() < FRESH.max(last.took * REST)
        {
            return Ok(last.overview.clone());
        }
        // However many wait for an answer that does not come, the target is asked once.
        if inner.failed.is_some_and(|at| at.elapsed() < PATIENCE) {
            return Err(no_answer());
        }
        let began = Instant::now();
        let parameters: [&(dyn tokio_postgres::types::ToSql + Sync); 1] = [&self.run];
        let asked = async {
            let session = opened(&mut inner.session, &self.target).await?;
            session
                .client
                .query_one("SELECT dedup.overview($1::uuid)", &parameters)
                .await
                .at(Side::Target, doing)
        };
        let Ok(row) = tokio::time::timeout(PATIENCE, asked).await else {
            inner.failed = Some(Instant::now());
            if let Some(session) = inner.session.take() {
                session.cancel().await;
            }
            return Err(no_answer());
        };
        let row = row?;
        inner.failed = None;
        let document: Value = row.try_get(0).at(Side::Target, doing)?;
        let overview = serde_json::from_value(document)
            .map_err(|e| protocol_error(Side::Target, format!("{doing}: {e}")))?;
        let overview = Arc::new(overview);
        inner.last =
            Some(Last { at: Instant::now(), took: began.elapsed(), overview: Arc::clone(&overview) });
        Ok(overview)
    }
}
