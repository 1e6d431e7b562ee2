//! What a rehearsal foresees, as lines or JSON.

use std::time::Duration;

use indicatif::{HumanBytes, HumanCount};
use pg_dedup_record::refusal::condition_name;
use serde::Serialize;

use crate::error::Result;
use crate::progress::duration;
use crate::summary::print;

/// What a run would do, and take.
#[derive(Debug, Serialize)]
pub struct Prediction {
    /// The source.
    pub source: String,
    /// The target.
    pub target: String,
    /// The fraction of the source that was read.
    pub sample: f64,
    /// Workers that read it.
    pub workers: u16,
    /// By pair.
    pub tables: Vec<TablePrediction>,
    /// Bytes of the source a second, while it was read, hashed and tried.
    pub bytes_per_second: f64,
    /// Seconds for all of it at that rate.
    pub seconds: f64,
    /// Seconds it may take; none: no deadline was given.
    pub deadline_seconds: Option<f64>,
    /// Whether it would be kept.
    pub deadline_kept: Option<bool>,
}

/// What a run would do to one target.
#[derive(Debug, Serialize)]
pub struct TablePrediction {
    /// The source.
    pub source: String,
    /// The target.
    pub target: String,
    /// Which rule chose the content columns, in words.
    pub content_rule: String,
    /// Records that were looked at.
    pub looked_at: u64,
    /// Records of the source.
    pub records: u64,
    /// Bytes of the source, as it sends them.
    pub bytes: u64,
    /// Chunks.
    pub chunks: u64,
    /// Rows that would be written.
    pub inserted: u64,
    /// Rows that would be overwritten.
    pub updated: u64,
    /// Rows that stand there already.
    pub unchanged: u64,
    /// Records that would be dropped as duplicates.
    pub duplicates: u64,
    /// Duplicates a record.
    pub dedup_ratio: f64,
    /// How sure the duplicates are.
    pub duplicates_are: Certainty,
    /// Records that the target would refuse, by constraint.
    pub refused: Vec<Refusal>,
    /// Chunks that would fail: more of their records are refused than the error budget allows.
    pub chunks_over_budget: u64,
    /// Bytes that the table grows by, TOAST included.
    pub table_bytes: u64,
    /// Bytes that its indexes grow by.
    pub index_bytes: u64,
    /// Bytes that the hash index grows by.
    pub hash_index_bytes: u64,
    /// Bytes that the ledger of dropped duplicates grows by.
    pub ledger_bytes: u64,
    /// Bytes of WAL, without full page images.
    pub wal_bytes: u64,
    /// What was not looked at, and why.
    pub not_tried: Vec<String>,
}

/// How sure a figure is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Certainty {
    /// Counted.
    Exact,
    /// Counted in a part of all contents, all of whose records were seen: good to a thousandth.
    Close,
    /// Concluded from a part of the records.
    Estimated,
}

/// Reason of records whose key another record has, with another content.
pub const KEY_COLLISION: &str = "key_collision";

/// Records that the target would refuse for one reason.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Refusal {
    /// SQLSTATE.
    pub sqlstate: String,
    /// Its name.
    pub reason: String,
    /// The constraint, where there is one.
    pub constraint: Option<String>,
    /// Records.
    pub records: u64,
}

impl Refusal {
    /// Of records refused with this SQLSTATE.
    pub fn new(sqlstate: &str, constraint: Option<String>, records: u64) -> Refusal {
        Refusal {
            sqlstate: sqlstate.to_owned(),
            reason: condition_name(sqlstate).to_owned(),
            constraint,
            records,
        }
    }
}

impl Prediction {
    /// The exit code that tells it: a chunk would fail or the deadline be missed; records would be set aside; or neither.
    pub fn exit_code(&self) -> u8 {
        if self.deadline_kept == Some(false) || self.tables.iter().any(|table| table.chunks_over_budget > 0) {
            1
        } else if self.tables.iter().any(|table| !table.refused.is_empty()) {
            3
        } else {
            0
        }
    }

    /// Whether the deadline would be kept.
    pub fn judge(&mut self, deadline: Option<Duration>) {
        self.deadline_seconds = deadline.map(|deadline| deadline.as_secs_f64());
        self.deadline_kept = self.deadline_seconds.map(|deadline| self.seconds <= deadline);
    }

    /// Prints it on standard output.
    pub fn print(&self, json: bool) -> Result<()> {
        print(self, json, || self.text())
    }

    fn text(&self) -> String {
        let mut text = format!("{} -> {}: foreseen, nothing written\n", self.source, self.target);
        if self.sample < 1.0 {
            text.push_str(&format!("  from {} % of the source\n", self.sample * 100.0));
        }
        for table in &self.tables {
            text.push_str(&table.text());
        }
        let sum = |of: fn(&TablePrediction) -> u64| HumanBytes(self.tables.iter().map(of).sum());
        text.push_str(&format!(
            "in all: tables {}, indexes {}, hash index {}, ledger {}, WAL {} and full page images\n",
            sum(|t| t.table_bytes),
            sum(|t| t.index_bytes),
            sum(|t| t.hash_index_bytes),
            sum(|t| t.ledger_bytes),
            sum(|t| t.wal_bytes),
        ));
        text.push_str(&format!(
            "time: {} at {:.1} MB/s, measured with {} workers without WAL and verification\n",
            duration(self.seconds),
            self.bytes_per_second / 1e6,
            self.workers
        ));
        if let (Some(deadline), Some(kept)) = (self.deadline_seconds, self.deadline_kept) {
            text.push_str(&format!(
                "deadline {}: {}\n",
                duration(deadline),
                if kept { "kept" } else { "MISSED" }
            ));
        }
        text
    }
}

impl TablePrediction {
    /// Takes records out that were taken for written, or for duplicates of those, and are refused, with what they would take. A record that is
    /// refused for two reasons is taken out twice.
    pub fn refuse(&mut self, refused: Vec<(Refusal, u64)>) {
        let records: u64 = refused.iter().map(|(refusal, _)| refusal.records).sum();
        let contents: u64 = refused.iter().map(|(_, contents)| contents).sum();
        let written = self.inserted + self.updated;
        if written > 0 {
            let left = 1.0 - contents.min(written) as f64 / written as f64;
            for bytes in [
                &mut self.table_bytes,
                &mut self.index_bytes,
                &mut self.hash_index_bytes,
                &mut self.wal_bytes,
            ] {
                *bytes = (*bytes as f64 * left) as u64;
            }
        }
        self.inserted = self.inserted.saturating_sub(contents);
        self.duplicates = self.duplicates.saturating_sub(records - contents.min(records));
        self.dedup_ratio = if self.records > 0 { self.duplicates as f64 / self.records as f64 } else { 0.0 };
        self.refused.extend(refused.into_iter().map(|(refusal, _)| refusal));
    }

    fn text(&self) -> String {
        let mut text = format!("{} -> {}: content is {}\n", self.source, self.target, self.content_rule);
        let about = if self.duplicates_are == Certainty::Exact { "" } else { "about " };
        text.push_str(&format!(
            "  source       {} records, {}, {} chunks\n",
            HumanCount(self.records),
            HumanBytes(self.bytes),
            self.chunks
        ));
        text.push_str(&format!("  = inserted   {about}{}\n", HumanCount(self.inserted)));
        for (label, count) in [("updated", self.updated), ("unchanged", self.unchanged)] {
            if count > 0 {
                text.push_str(&format!("  + {label:<10} {}\n", HumanCount(count)));
            }
        }
        text.push_str(&format!(
            "  + duplicate  {about}{} ({:.2} %)\n",
            HumanCount(self.duplicates),
            self.dedup_ratio * 100.0
        ));
        for refusal in &self.refused {
            let constraint = refusal.constraint.as_ref().map(|c| format!(" ({c})")).unwrap_or_default();
            text.push_str(&format!(
                "  refused      {} {}{constraint}\n",
                HumanCount(refusal.records),
                refusal.reason
            ));
        }
        if self.chunks_over_budget > 0 {
            text.push_str(&format!(
                "  {} chunks would fail: more of their records are refused than --error-budget allows\n",
                self.chunks_over_budget
            ));
        }
        text.push_str(&format!(
            "  grows by     table {}, indexes {}, hash index {}, ledger {}, WAL {}\n",
            HumanBytes(self.table_bytes),
            HumanBytes(self.index_bytes),
            HumanBytes(self.hash_index_bytes),
            HumanBytes(self.ledger_bytes),
            HumanBytes(self.wal_bytes),
        ));
        for what in &self.not_tried {
            text.push_str(&format!("  not tried    {what}\n"));
        }
        text
    }
}
