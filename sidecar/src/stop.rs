//! Stopping: the first Ctrl-C (or SIGTERM) lets the chunks in flight end, the second abandons them.

use tokio::sync::watch;

use crate::error::{Error, Kind, Result};

/// How urgently the process is to end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Urgency {
    /// Not at all.
    GoOn,
    /// Lease nothing more; end what was begun.
    Finish,
    /// Abandon what was begun.
    Abort,
}

/// What the rest of the process watches.
#[derive(Debug, Clone)]
pub struct Stop {
    receiver: watch::Receiver<Urgency>,
}

impl Stop {
    /// Listens for signals from now on.
    ///
    /// # Errors
    /// If the system won't let signals be heard: then Ctrl-C would end the process in the middle of a chunk.
    pub fn listen() -> Result<Stop> {
        let mut signals = Signals::new()
            .map_err(|e| Error::here(Kind::Refused, format!("can't listen for signals: {e}")))?;
        let (sender, receiver) = watch::channel(Urgency::GoOn);
        tokio::spawn(async move {
            signals.next().await;
            tracing::warn!(
                "interrupted: the chunks in flight are finished first; interrupt again to abandon them"
            );
            sender.send_replace(Urgency::Finish);
            signals.next().await;
            tracing::warn!("interrupted again: the chunks in flight are abandoned");
            sender.send_replace(Urgency::Abort);
            // Keeps the channel, and swallows what else comes.
            loop {
                signals.next().await;
            }
        });
        Ok(Stop { receiver })
    }

    /// Whether nothing more is to be begun.
    pub fn finishing(&self) -> bool {
        *self.receiver.borrow() >= Urgency::Finish
    }

    /// Returns when nothing more is to be begun.
    pub async fn asked(&self) {
        self.reached(Urgency::Finish).await;
    }

    /// Returns when what was begun is to be abandoned.
    pub async fn aborted(&self) {
        self.reached(Urgency::Abort).await;
    }

    async fn reached(&self, urgency: Urgency) {
        let mut receiver = self.receiver.clone();
        if receiver.wait_for(|now| *now >= urgency).await.is_err() {
            // Nobody listens for signals any more, so none will come.
            std::future::pending::<()>().await;
        }
    }
}

/// Ctrl-C and SIGTERM, heard without gaps: a second one right after the first counts.
#[cfg(unix)]
struct Signals {
    interrupt: tokio::signal::unix::Signal,
    terminate: tokio::signal::unix::Signal,
}

#[cfg(unix)]
impl Signals {
    fn new() -> std::io::Result<Signals> {
        use tokio::signal::unix::{SignalKind, signal};
        Ok(Signals {
            interrupt: signal(SignalKind::interrupt())?,
            terminate: signal(SignalKind::terminate())?,
        })
    }

    async fn next(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
        }
    }
}

/// Ctrl-C, where there are no other signals.
#[cfg(not(unix))]
struct Signals;

#[cfg(not(unix))]
impl Signals {
    fn new() -> std::io::Result<Signals> {
        Ok(Signals)
    }

    async fn next(&mut self) {
        if tokio::signal::ctrl_c().await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}
