//! The rule by which a run is slowed: what servers say of themselves goes in, limits come out. The sidecar's processes decide by it, and so does a
//! session that migrates inside the target database.
//!
//! ```text
//!   probes ──▶ Latency ─┐
//!   signals (JSON) ─────┴─▶ verdicts ──bad?──▶ controller ──▶ Decision, which throttle_decide takes
//! ```
#![forbid(unsafe_code)]
#![warn(missing_docs)]

pub mod controller;
pub mod decision;
pub mod signals;

pub use controller::{Limits, State};
pub use decision::{Decision, Turn, Watch};
pub use signals::Latency;

/// Bytes a second that a run is never slowed below, unless it says otherwise.
pub const LEAST_RATE: f64 = 1e6;
