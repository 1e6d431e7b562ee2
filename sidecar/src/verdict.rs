//! What a pass over a run has come to, as lines or JSON.

use serde::Serialize;
use uuid::Uuid;

use crate::conn::Session;
use crate::error::{At, Result};
use crate::summary::print;

/// Divergences shown as lines.
const SHOWN: usize = 20;

/// The verdict of a pass and what it rests on.
#[derive(Debug, Serialize)]
pub struct Verdict {
    /// The run.
    pub run_id: Uuid,
    /// Its name.
    pub name: String,
    /// Its status now.
    pub status: String,
    /// Number of the pass.
    pub reconciliation_id: i64,
    /// `clean`, `mismatch` or `abandoned`.
    pub verdict: String,
    /// The fraction of contents that were looked at; 1: all.
    pub sample: f64,
    /// Of a sample: different contents in it, at least.
    pub drawn_contents: Option<i64>,
    /// The target's snapshot that it holds for.
    pub target_snapshot: Option<String>,
    /// Records and rows by what was found of them.
    pub counts: Counts,
    /// Records and rows that differ, the first ones of each chunk.
    pub divergences: Vec<Divergence>,
}

/// Records and rows by what was found of them.
#[derive(Debug, Default, Serialize)]
#[allow(missing_docs)] // the columns of dedup.reconciled_chunks
pub struct Counts {
    pub source: i64,
    pub present: i64,
    pub duplicate: i64,
    pub quarantined: i64,
    pub missing: i64,
    pub changed: i64,
    pub extra: i64,
    pub surviving_duplicate: i64,
    pub foreign: i64,
    pub source_changed: i64,
}

/// One line of `dedup.divergences`.
#[derive(Debug, Serialize)]
pub struct Divergence {
    /// What kind.
    pub kind: String,
    /// The target.
    pub target: String,
    /// The chunk.
    pub chunk_id: String,
    /// `column=value`; for a table without a key the content hash.
    pub key: String,
}

impl Verdict {
    /// Reads a pass.
    pub async fn load(session: &Session, reconciliation: i64) -> Result<Verdict> {
        let doing = "reading the verdict";
        let row = session
            .client
            .query_one(
                "SELECT r.run_id, r.name, r.status, p.verdict, p.target_snapshot, p.sample, p.drawn_contents, \
                     ARRAY[sum(k.source_count), sum(k.present_count), sum(k.duplicate_count), sum(k.quarantined_count), sum(k.missing_count), \
                         sum(k.changed_count), sum(k.extra_count), sum(k.surviving_duplicate_count), sum(k.foreign_count), \
                         sum(k.source_changed_count)]::int8[] \
                 FROM dedup.reconciliations AS p JOIN dedup.runs AS r USING (run_id) JOIN dedup.reconciled_chunks AS k USING (reconciliation_id) \
                 WHERE p.reconciliation_id = $1 GROUP BY r.run_id, p.reconciliation_id",
                &[&reconciliation],
            )
            .await
            .at(session.side, doing)?;
        let counts: Vec<i64> = row.try_get(7).at(session.side, doing)?;
        let count = |index: usize| counts.get(index).copied().unwrap_or_default();
        let lines = session
            .client
            .query(
                "SELECT d.kind, t.target::text, d.chunk_id, coalesce(d.key, 'h:' || encode(d.content_hash, 'hex')) \
                 FROM dedup.divergences AS d JOIN dedup.targets AS t USING (target_id) WHERE d.reconciliation_id = $1 \
                 ORDER BY d.state <> 'open', d.divergence_id",
                &[&reconciliation],
            )
            .await
            .at(session.side, doing)?;
        let divergences = lines
            .iter()
            .map(|line| {
                let text = |index: usize| line.try_get::<_, String>(index).at(session.side, doing);
                Ok(Divergence { kind: text(0)?, target: text(1)?, chunk_id: text(2)?, key: text(3)? })
            })
            .collect::<Result<_>>()?;
        Ok(Verdict {
            run_id: row.try_get(0).at(session.side, doing)?,
            name: row.try_get(1).at(session.side, doing)?,
            status: row.try_get(2).at(session.side, doing)?,
            reconciliation_id: reconciliation,
            verdict: row.try_get(3).at(session.side, doing)?,
            target_snapshot: row.try_get(4).at(session.side, doing)?,
            sample: row.try_get(5).at(session.side, doing)?,
            drawn_contents: row.try_get(6).at(session.side, doing)?,
            counts: Counts {
                source: count(0),
                present: count(1),
                duplicate: count(2),
                quarantined: count(3),
                missing: count(4),
                changed: count(5),
                extra: count(6),
                surviving_duplicate: count(7),
                foreign: count(8),
                source_changed: count(9),
            },
            divergences,
        })
    }

    /// Records and rows that are wrong, extra ones left out if somebody wants to keep them.
    pub fn to_repair(&self, extra: bool) -> i64 {
        let counts = &self.counts;
        let wrong = counts.missing + counts.changed + counts.surviving_duplicate;
        if extra { wrong + counts.extra } else { wrong }
    }

    /// The exit code that tells it.
    pub fn exit_code(&self) -> u8 {
        match self.verdict.as_str() {
            // A strict pass found mismatches, and only a strict one can say that they are gone.
            "clean" if self.status == "halted" => 4,
            "clean" if self.counts.quarantined > 0 => 3,
            "clean" => 0,
            "mismatch" => 4,
            _ => 1,
        }
    }

    /// The verdict as lines.
    pub fn text(&self) -> String {
        let counts = &self.counts;
        let mut text = match self.verdict.as_str() {
            "clean" if self.sample < 1.0 => format!(
                "run {} ({}): a sample is clean, {}\n{}",
                self.run_id,
                self.name,
                self.status,
                self.confidence()
            ),
            "clean" => format!("run {} ({}): clean, {}\n", self.run_id, self.name, self.status),
            "mismatch" => format!("run {} ({}): MISMATCHES, {}\n", self.run_id, self.name, self.status),
            _ => format!(
                "run {} ({}): {}: the run went on meanwhile, reconcile it again\n",
                self.run_id, self.name, self.verdict
            ),
        };
        let always = [
            ("source", counts.source),
            ("= present", counts.present),
            ("+ duplicate", counts.duplicate),
            ("+ quarantined", counts.quarantined),
        ];
        let sometimes = [
            ("+ missing", counts.missing),
            ("+ changed", counts.changed),
            ("extra", counts.extra),
            ("surviving duplicate", counts.surviving_duplicate),
            ("foreign", counts.foreign),
            ("source changed", counts.source_changed),
        ];
        let width = always.iter().chain(&sometimes).map(|(_, n)| n.to_string().len()).max().unwrap_or(1);
        for (label, count) in always.iter().chain(sometimes.iter().filter(|(_, count)| *count > 0)) {
            text.push_str(&format!("  {label:<20}{count:>width$}\n"));
        }
        for divergence in self.divergences.iter().take(SHOWN) {
            text.push_str(&format!(
                "  {} {} {} (chunk {})\n",
                divergence.kind, divergence.target, divergence.key, divergence.chunk_id
            ));
        }
        if self.divergences.len() > SHOWN {
            text.push_str("  further ones are in dedup.divergences\n");
        }
        text
    }

    /// What a clean sample says of the rest. Where n contents were looked at and none differs, the part that does is below 3/n with a confidence
    /// of 95 % (the rule of three). A record that changed in its source says nothing of its content.
    fn confidence(&self) -> String {
        let contents = self.drawn_contents.unwrap_or(0) - self.counts.source_changed;
        let part = self.sample * 100.0;
        if contents <= 3 {
            return format!(
                "  {part} % of the contents: {} of them, too few to say anything of the others\n",
                contents.max(0)
            );
        }
        format!(
            "  {part} % of the contents, {contents} of them: with a confidence of 95 % fewer than 1 in {} of those that were written or dropped differ\n",
            contents / 3
        )
    }

    /// Prints it on standard output.
    pub fn print(&self, json: bool) -> Result<()> {
        print(self, json, || self.text())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn verdict(verdict: &str, counts: Counts) -> Verdict {
        let divergence = Divergence {
            kind: "missing".into(),
            target: "public.t".into(),
            chunk_id: "1:000001".into(),
            key: "id=5".into(),
        };
        Verdict {
            run_id: Uuid::nil(),
            name: "orders".into(),
            status: if verdict == "mismatch" { "halted" } else { "reconciled" }.into(),
            reconciliation_id: 1,
            verdict: verdict.into(),
            target_snapshot: None,
            sample: 1.0,
            drawn_contents: None,
            divergences: if counts.missing > 0 { vec![divergence] } else { Vec::new() },
            counts,
        }
    }

    #[test]
    fn exit_codes_tell_the_verdict() {
        assert_eq!(verdict("clean", Counts::default()).exit_code(), 0);
        assert_eq!(verdict("clean", Counts { quarantined: 1, ..Counts::default() }).exit_code(), 3);
        assert_eq!(verdict("mismatch", Counts::default()).exit_code(), 4);
        assert_eq!(verdict("abandoned", Counts::default()).exit_code(), 1);
    }

    #[test]
    fn a_sample_says_how_much_it_is_worth() {
        let sample = |contents, source_changed| Verdict {
            sample: 0.01,
            drawn_contents: Some(contents),
            ..verdict("clean", Counts { source_changed, ..Counts::default() })
        };
        let text = sample(3000, 0).text();
        assert!(text.contains("a sample is clean") && text.contains("1 % of the contents, 3000"), "{text}");
        assert!(text.contains("1 in 1000 "), "{text}");
        assert!(sample(3000, 1500).text().contains("1 in 500 "));
        assert!(sample(2, 0).text().contains("too few"));
    }

    #[test]
    fn mismatches_are_named() {
        let text =
            verdict("mismatch", Counts { source: 10, present: 9, missing: 1, ..Counts::default() }).text();
        assert!(text.contains("MISMATCHES, halted"), "{text}");
        assert!(text.contains("+ missing"), "{text}");
        assert!(text.contains("missing public.t id=5 (chunk 1:000001)"), "{text}");
        assert!(!text.contains("foreign"), "{text}");
    }
}
