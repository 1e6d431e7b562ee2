//! Signs of life of this process's workers, on a connection of their own.
//!
//! A lease dies with its worker's heartbeat. A worker that could not give its chunk back takes a new identity: the old
//! one is no longer reported, so its lease runs out.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde_json::{Value, json};
use tokio::sync::watch;
use uuid::Uuid;

use crate::conn::{Endpoint, Role, Session};
use crate::error::Result;
use crate::protocol;

/// Time between two signs; a lease lasts 60 s unless the run says otherwise.
const INTERVAL: Duration = Duration::from_secs(3);

/// The identities that are reported, and what each is at.
#[derive(Clone, Default)]
pub struct Identities {
    workers: Arc<Mutex<HashMap<Uuid, Option<String>>>>,
}

impl Identities {
    /// A new identity.
    pub fn take(&self) -> Uuid {
        let id = Uuid::new_v4();
        self.lock().insert(id, None);
        id
    }

    /// Reports what a worker is at.
    pub fn at(&self, worker: Uuid, chunk: Option<&str>) {
        self.lock().insert(worker, chunk.map(str::to_owned));
    }

    /// Gives an identity up.
    pub fn leave(&self, worker: Uuid) {
        self.lock().remove(&worker);
    }

    fn list(&self) -> Vec<(Uuid, Option<String>)> {
        self.lock().iter().map(|(id, chunk)| (*id, chunk.clone())).collect()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<Uuid, Option<String>>> {
        self.workers.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

/// Tells the run's status, if it is another one than last heard.
pub fn tell(status: &watch::Sender<String>, now: String) {
    status.send_if_modified(|known| {
        let changed = *known != now;
        *known = now;
        changed
    });
}

/// The run's status as last heard.
pub type RunStatus = watch::Receiver<String>;

/// Reports until dropped.
pub struct Heartbeat {
    task: tokio::task::JoinHandle<()>,
}

impl Heartbeat {
    /// Connects, reports every identity once so that they are known before the first lease, and goes on reporting.
    pub async fn start(
        target: Arc<Endpoint>,
        run: Uuid,
        identities: Identities,
    ) -> Result<(Heartbeat, watch::Sender<String>)> {
        let session = target.connect(Role::Heartbeat).await?;
        let status = beat(&session, run, &identities).await?.unwrap_or_default();
        let (sender, _) = watch::channel(status);
        let task = tokio::spawn(go_on(target, session, run, identities, sender.clone()));
        Ok((Heartbeat { task }, sender))
    }
}

impl Drop for Heartbeat {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn go_on(
    target: Arc<Endpoint>,
    mut session: Session,
    run: Uuid,
    identities: Identities,
    status: watch::Sender<String>,
) {
    loop {
        tokio::time::sleep(INTERVAL).await;
        match beat(&session, run, &identities).await {
            Ok(Some(now)) => tell(&status, now),
            Ok(None) => {}
            Err(error) => {
                tracing::warn!("no heartbeat: {error}");
                match target.connect_patiently(Role::Heartbeat).await {
                    Ok(fresh) => session = fresh,
                    Err(error) => tracing::warn!("no heartbeat: {error}"),
                }
            }
        }
    }
}

/// One round; answers the run's status if anybody was reported.
async fn beat(session: &Session, run: Uuid, identities: &Identities) -> Result<Option<String>> {
    let mut status = None;
    for (worker, chunk) in identities.list() {
        status = Some(protocol::heartbeat(session, worker, run, &info(chunk.as_deref())).await?);
    }
    Ok(status)
}

fn info(chunk: Option<&str>) -> Value {
    json!({
        "host": whoami::hostname().unwrap_or_default(),
        "pid": std::process::id(),
        "version": env!("CARGO_PKG_VERSION"),
        "chunk_id": chunk,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_identity_that_left_is_not_reported() {
        let identities = Identities::default();
        let (a, b) = (identities.take(), identities.take());
        identities.at(b, Some("1:000001"));
        identities.leave(a);
        assert_eq!(identities.list(), [(b, Some("1:000001".to_owned()))]);
        assert_eq!(info(Some("x"))["chunk_id"], "x");
    }
}
