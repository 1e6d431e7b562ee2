//! `dedup.overview` and `dedup.report`, typed as far as they are shown.

use serde::Deserialize;

/// A run as it is now.
#[derive(Debug, Clone, Deserialize)]
pub struct Overview {
    /// When it was asked for, as the target's clock has it.
    pub at: String,
    /// The run.
    pub run: Run,
    /// How far it is, with its books.
    pub progress: Books,
    /// How fast it goes and how well.
    pub slis: Slis,
    /// Seconds left.
    pub eta_seconds: Option<f64>,
    /// When it is to be done.
    pub deadline: Option<String>,
    /// Seconds until then; below 0: it has passed.
    pub seconds_to_deadline: Option<f64>,
    /// Its tables.
    pub tables: Vec<Table>,
    /// Seconds since 1970, bytes a second.
    pub throughput: Vec<(f64, f64)>,
    /// How it is throttled.
    pub throttle: Throttle,
    /// Processes that work on it.
    pub processes: u64,
    /// Alerts that fire.
    pub alerts: Vec<Alert>,
    /// A letter a chunk, or for several.
    pub chunk_map: String,
    /// Attempts at chunks that had to be made again.
    pub retries: u64,
    /// The target's filter.
    pub filter: Option<Filter>,
    /// Refused records by reason.
    pub quarantine: Vec<Quarantine>,
}

/// The run itself.
#[derive(Debug, Clone, Deserialize)]
pub struct Run {
    /// Its id.
    pub run_id: String,
    /// Its name.
    pub name: String,
    /// Its status.
    pub status: String,
    /// Who created it.
    pub owner: String,
    /// When it was created.
    pub created_at: String,
    /// When its first chunk was leased.
    pub started_at: Option<String>,
    /// When its last chunk was verified or given up.
    pub finished_at: Option<String>,
    /// Until when it can be rolled back.
    pub bake_in_until: Option<String>,
}

/// Chunks and books of a run or of a table.
#[derive(Debug, Clone, Default, Deserialize)]
pub struct Books {
    /// Records read.
    pub source_count: u64,
    /// Records written as new rows.
    pub inserted_count: u64,
    /// Records that replaced a row.
    pub updated_count: u64,
    /// Records that stood in the target.
    pub unchanged_count: u64,
    /// Records dropped.
    pub duplicate_count: u64,
    /// Records set aside.
    pub quarantined_count: u64,
    /// Bytes read.
    pub source_bytes: u64,
    /// Chunks in the plan.
    pub chunks: u64,
    /// Chunks verified.
    pub verified: u64,
    /// Chunks leased, or written and not verified.
    pub syncing: u64,
    /// Chunks given up.
    pub failed: u64,
    /// Chunks to do.
    pub pending: u64,
    /// Part written, by planned bytes.
    pub percent: Option<f64>,
}

impl Books {
    /// What became of the records read, by name.
    pub fn outcomes(&self) -> [(&'static str, u64); 5] {
        [
            ("inserted", self.inserted_count),
            ("updated", self.updated_count),
            ("unchanged", self.unchanged_count),
            ("duplicate", self.duplicate_count),
            ("quarantined", self.quarantined_count),
        ]
    }

    /// Chunks by state; written ones that wait for verification are among the syncing.
    pub fn states(&self) -> [(&'static str, u64); 4] {
        [
            ("pending", self.pending),
            ("syncing", self.syncing),
            ("failed", self.failed),
            ("verified", self.verified),
        ]
    }

    /// How much is written, in words.
    pub fn written(&self) -> String {
        self.percent.map_or("–".into(), |percent| format!("{percent:.1} %"))
    }

    /// Part of the records that were dropped as duplicates.
    pub fn dedup_ratio(&self) -> Option<f64> {
        (self.source_count > 0).then(|| self.duplicate_count as f64 / self.source_count as f64)
    }
}

/// What `dedup.slis` says.
#[derive(Debug, Clone, Deserialize)]
pub struct Slis {
    /// Source bits in 10⁹ a second over the last minute.
    pub migration_throughput_gbps: f64,
    /// Chunks verified in the last minute.
    pub chunk_completion_rate: f64,
    /// Part of the records that were dropped as duplicates.
    pub dedup_ratio: Option<f64>,
    /// Mismatches that nobody mended.
    pub reconciliation_mismatch_count: f64,
    /// Seconds since the last chunk was written.
    pub checkpoint_lag: Option<f64>,
    /// Part of the attempts that failed.
    pub chunk_failure_rate: Option<f64>,
}

/// A table of the run.
#[derive(Debug, Clone, Deserialize)]
pub struct Table {
    /// Where it comes from.
    pub source: String,
    /// Where it goes.
    pub target: String,
    /// Which rule chose the content columns.
    pub content_rule: String,
    /// Chunks and books.
    #[serde(flatten)]
    pub books: Books,
    /// Seconds until it is done.
    pub eta_seconds: Option<f64>,
}

/// How the run is throttled.
#[derive(Debug, Clone, Deserialize)]
pub struct Throttle {
    /// free, slowed, recovering or off.
    pub state: String,
    /// Why it was last slowed.
    pub reason: Option<String>,
    /// Bytes a second that it may read in all.
    pub allowed: Option<f64>,
    /// Bytes a second that `dedup.set_rate` allows.
    pub cap: Option<f64>,
    /// Chunks at a time.
    pub active_chunks: Option<u64>,
    /// Signals as they were last read.
    pub signals: serde_json::Map<String, serde_json::Value>,
}

/// An alert that fires.
#[derive(Debug, Clone, Deserialize)]
pub struct Alert {
    /// P1 or P2.
    pub severity: String,
    /// What is wrong.
    pub kind: String,
    /// When it was first seen.
    pub since: String,
    /// In words.
    pub message: String,
    /// What to look at first.
    pub look_at: String,
}

/// The target's filter.
#[derive(Debug, Clone, Deserialize)]
pub struct Filter {
    /// Whether it knows every entry.
    pub warm: bool,
    /// Part of its bits that are set.
    pub fill: f64,
    /// Part of new contents that it sends to the index for nothing.
    pub predicted_false_positive_rate: f64,
    /// Its size.
    pub filter_bytes: f64,
    /// Contents that transactions in flight are writing.
    pub claims_held: f64,
    /// How many that may be.
    pub claim_slots: f64,
}

/// Records refused for one reason.
#[derive(Debug, Clone, Deserialize)]
pub struct Quarantine {
    /// SQLSTATE.
    pub sqlstate: String,
    /// The condition's name.
    pub reason: String,
    /// How many.
    pub records: u64,
}

/// All there is to report of a run.
#[derive(Debug, Clone, Deserialize)]
pub struct Report {
    /// As it is now.
    #[serde(flatten)]
    pub overview: Overview,
    /// The target's database.
    pub database: String,
    /// What the run was created with.
    pub options: serde_json::Value,
    /// Extension, hash and server.
    pub versions: serde_json::Map<String, serde_json::Value>,
    /// Passes that compared source and target.
    pub reconciliations: Vec<Reconciliation>,
    /// Seconds since 1970 when a chunk was written, seconds that it took.
    pub chunk_seconds: Vec<(f64, f64)>,
    /// Seconds of all chunks by phase.
    pub phase_seconds: serde_json::Map<String, serde_json::Value>,
    /// Chunks given up.
    pub failed_chunks: Vec<FailedChunk>,
    /// Alerts that fired.
    pub alert_log: Vec<LoggedAlert>,
    /// Rollbacks.
    pub rollbacks: Vec<serde_json::Value>,
}

/// A pass that compared source and target.
#[derive(Debug, Clone, Deserialize)]
pub struct Reconciliation {
    /// Its number.
    pub reconciliation_id: u64,
    /// open, clean, mismatch or abandoned.
    pub verdict: String,
    /// Fraction of the contents looked at.
    pub sample: f64,
    /// Whether a changed source is a mismatch.
    pub is_strict: bool,
    /// When it ended.
    pub finished_at: Option<String>,
    /// The clean pass that released its mismatches.
    pub released_by: Option<u64>,
    /// Records compared; none: its detail was purged.
    pub source_count: Option<u64>,
    /// Records whose very row is there.
    pub present_count: Option<u64>,
    /// Records dropped whose content is there.
    pub duplicate_count: Option<u64>,
    /// Records in quarantine.
    pub quarantined_count: Option<u64>,
    /// Records that are not there.
    pub missing_count: Option<u64>,
    /// Records whose row is another.
    pub changed_count: Option<u64>,
    /// Rows that the source does not have.
    pub extra_count: Option<u64>,
    /// Rows of one content.
    pub surviving_duplicate_count: Option<u64>,
    /// Rows that no run wrote.
    pub foreign_count: Option<u64>,
    /// Records that changed in the source.
    pub source_changed_count: Option<u64>,
}

impl Reconciliation {
    /// What a pass found, by the names of the target's columns.
    pub fn findings(&self) -> [(&'static str, Option<u64>); 10] {
        [
            ("source", self.source_count),
            ("present", self.present_count),
            ("duplicate", self.duplicate_count),
            ("quarantined", self.quarantined_count),
            ("missing", self.missing_count),
            ("changed", self.changed_count),
            ("extra", self.extra_count),
            ("surviving duplicate", self.surviving_duplicate_count),
            ("foreign", self.foreign_count),
            ("source changed", self.source_changed_count),
        ]
    }

    /// How much a pass looked at.
    pub fn extent(&self) -> String {
        let strictly = if self.is_strict { ", strictly" } else { "" };
        if self.sample < 1.0 {
            format!("a sample of {:.2} %{strictly}", self.sample * 100.0)
        } else {
            format!("everything{strictly}")
        }
    }

    /// The verdict, with what became of it.
    pub fn told_verdict(&self) -> String {
        match self.released_by {
            Some(later) => format!("{}, released by pass {later}", self.verdict),
            None => self.verdict.clone(),
        }
    }
}

/// A chunk given up.
#[derive(Debug, Clone, Deserialize)]
pub struct FailedChunk {
    /// The chunk.
    pub chunk_id: String,
    /// Leases it had.
    pub attempts: u64,
    /// SQLSTATE.
    pub sqlstate: Option<String>,
    /// Why.
    pub message: Option<String>,
    /// What to do.
    pub hint: Option<String>,
}

/// An alert that fires or has fired.
#[derive(Debug, Clone, Deserialize)]
pub struct LoggedAlert {
    /// P1 or P2.
    pub severity: String,
    /// What was wrong.
    pub kind: String,
    /// From when.
    pub since: String,
    /// Until when.
    pub cleared_at: Option<String>,
    /// In words.
    pub message: String,
}
