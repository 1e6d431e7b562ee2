//! Seconds that chunks took by phase, in this process.

use std::sync::LazyLock;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};

/// What a phase is told by.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct Phase {
    phase: &'static str,
}

/// The histograms, one a phase.
pub type Phases = Family<Phase, Histogram, fn() -> Histogram>;

/// Of all lanes of the process.
static PHASES: LazyLock<Phases> =
    // 1 ms to 9 minutes.
    LazyLock::new(|| {
        Family::new_with_constructor(|| Histogram::new(exponential_buckets(0.001, 2.0, 20)))
    });

/// A phase of a chunk took so many seconds.
pub fn took(phase: &'static str, seconds: f64) {
    PHASES.get_or_create(&Phase { phase }).observe(seconds);
}

/// The histograms, to be exported.
pub fn all() -> Phases {
    PHASES.clone()
}
