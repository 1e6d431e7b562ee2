//! Work that is tried again while the reason it fails for may pass by itself.

use backon::{BackoffBuilder, ExponentialBuilder};

use crate::error::{Policy, Result};
use crate::stop::Stop;

/// Tries that are made in all.
const TRIES: usize = 5;

/// Tries until it is done, or fails for a reason that stays, or a person asked to stop. `what` begins the line about a try that failed.
///
/// # Errors
/// The last try's.
pub async fn patiently<T>(stop: &Stop, what: &str, mut attempt: impl AsyncFnMut() -> Result<T>) -> Result<T> {
    let mut pauses = ExponentialBuilder::default().with_jitter().with_max_times(TRIES - 1).build();
    loop {
        let error = match attempt().await {
            Ok(done) => return Ok(done),
            Err(error) => error,
        };
        let pause = pauses.next().filter(|_| error.policy() == Policy::Retry && !stop.finishing());
        let Some(pause) = pause else { return Err(error) };
        tracing::warn!("{what}{error}; next try in {:.1} s", pause.as_secs_f64());
        tokio::time::sleep(pause).await;
    }
}
