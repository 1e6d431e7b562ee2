//! What looks at a run beside the work: alerts are brought up to date every few seconds, and, where an address is given, metrics, health and
//! a page are served.

mod http;
mod metrics;
pub mod phases;
mod probe;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use uuid::Uuid;

use self::probe::Probe;
use crate::config::Job;
use crate::conn::{Endpoint, Role};
use crate::error::{Error, Result, Side};
use crate::runs;

/// Time between two looks at the alerts.
const CHECK: Duration = Duration::from_secs(3);

/// Where metrics and page will be served: taken before anything is begun, so that an address in use is known at once.
#[derive(Debug)]
pub struct Served(Option<TcpListener>);

impl Served {
    /// Takes the address; none: nothing is served.
    pub async fn at(address: Option<SocketAddr>) -> Result<Served> {
        let Some(address) = address else { return Ok(Served(None)) };
        let listener = TcpListener::bind(address).await.map_err(|e| {
            Error::refused(format!("can't serve metrics at {address}: {e}"))
                .hint("choose another --metrics-addr")
        })?;
        Ok(Served(Some(listener)))
    }
}

/// Looks at a run until ended or dropped.
pub struct Observation {
    probe: Arc<Probe>,
    tasks: Vec<JoinHandle<()>>,
}

impl Observation {
    /// Starts looking.
    pub fn start(served: Served, target: Arc<Endpoint>, run: Uuid) -> Observation {
        let probe = Arc::new(Probe::new(target, run));
        let mut tasks = vec![tokio::spawn(watch(probe.clone()))];
        if let Served(Some(listener)) = served {
            if let Ok(address) = listener.local_addr() {
                tracing::info!("metrics and a page at http://{address}/");
            }
            tasks.push(tokio::spawn(http::serve(listener, probe.clone())));
        }
        Observation { probe, tasks }
    }

    /// Looks at the run that a command names, before the command begins.
    pub async fn of(job: &Job, wanted: &str) -> Result<Observation> {
        let served = Served::at(job.metrics_addr).await?;
        let target = Arc::new(Endpoint::resolve(Side::Target, &job.target)?);
        let admin = target.connect(Role::Admin).await?;
        runs::check_versions(&admin).await?;
        let run = runs::find(&admin, wanted).await?;
        admin.close().await;
        Ok(Observation::start(served, target, run.run_id))
    }

    /// A last look, so that what is over is told so.
    pub async fn end(self) {
        if let Err(error) = self.probe.check_alerts(Duration::ZERO).await {
            tracing::debug!("alerts: {error}");
        }
    }
}

impl Drop for Observation {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
    }
}

async fn watch(probe: Arc<Probe>) {
    let mut known = BTreeMap::new();
    let mut failing = false;
    loop {
        match probe.check_alerts(CHECK * 2 / 3).await {
            Ok(firing) => {
                failing = false;
                for (kind, told) in firing.iter().filter(|(kind, _)| !known.contains_key(*kind)) {
                    tracing::warn!(alert = kind, "alert: {told}");
                }
                for kind in known.keys().filter(|kind| !firing.contains_key(*kind)) {
                    tracing::info!(alert = kind, "alert {kind} is over");
                }
                known = firing;
            }
            Err(error) if !std::mem::replace(&mut failing, true) => {
                tracing::warn!("alerts are not looked at: {error}");
            }
            Err(_) => {}
        }
        tokio::time::sleep(CHECK).await;
    }
}
