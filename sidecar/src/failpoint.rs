//! Named points where a test can stop a worker: in builds with the feature `failpoints`, and nowhere else.
//!
//! `PG_DEDUP_MIGRATE_FAILPOINT=name` or `name@3` (the third time it is reached). A worker that reaches it says
//! `failpoint NAME` on standard error and stands still, so that the test can kill it exactly there.

/// Where a worker can be stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Failpoint {
    /// A chunk is leased and nothing of it is read.
    Leased,
    /// The source was read.
    Read,
    /// The chunk's transaction is open.
    Begun,
    /// Digests are claimed.
    Claimed,
    /// Half of the new rows are sent.
    MiddleOfCopy,
    /// New rows are written.
    Copied,
    /// Pending digests are resolved.
    Resolved,
    /// Everything is written, the books are not closed.
    BeforeFinish,
    /// The books are closed, nothing is committed.
    BeforeCommit,
    /// The chunk is committed.
    AfterCommit,
}

impl Failpoint {
    /// Its name in the environment.
    #[cfg(feature = "failpoints")]
    fn name(self) -> &'static str {
        match self {
            Failpoint::Leased => "leased",
            Failpoint::Read => "read",
            Failpoint::Begun => "begun",
            Failpoint::Claimed => "claimed",
            Failpoint::MiddleOfCopy => "middle_of_copy",
            Failpoint::Copied => "copied",
            Failpoint::Resolved => "resolved",
            Failpoint::BeforeFinish => "before_finish",
            Failpoint::BeforeCommit => "before_commit",
            Failpoint::AfterCommit => "after_commit",
        }
    }
}

/// Stands still if a test asked for it.
#[cfg(feature = "failpoints")]
pub async fn reach(point: Failpoint) {
    use std::sync::atomic::{AtomicU64, Ordering};
    static REACHED: AtomicU64 = AtomicU64::new(0);
    let Ok(wanted) = std::env::var("PG_DEDUP_MIGRATE_FAILPOINT") else { return };
    let (name, times) = wanted.split_once('@').unwrap_or((&wanted, "1"));
    if name == point.name() && REACHED.fetch_add(1, Ordering::SeqCst) + 1 == times.parse().unwrap_or(1) {
        eprintln!("failpoint {name}");
        std::future::pending::<()>().await;
    }
}

/// Nothing, in builds for use.
#[cfg(not(feature = "failpoints"))]
#[inline]
pub async fn reach(_point: Failpoint) {}
