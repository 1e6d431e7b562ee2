//! What a pass found, entered into `dedup.divergences`.
use pg_dedup_record::digest::Digest;
use pgrx::Uuid;
use pgrx::prelude::*;

use crate::error::Result;

/// A kind of difference between source and target.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(usize)]
pub enum Kind {
    /// The source has the record, the target has neither it nor, if it was dropped as a duplicate, its content.
    Missing,
    /// The row under the record's key is another one.
    Changed,
    /// A run wrote the row, and the source does not have it.
    Extra,
    /// Two rows of one content.
    SurvivingDuplicate,
    /// No run wrote the row.
    Foreign,
    /// The source is not what it was when the chunk was read.
    SourceChanged,
}

impl Kind {
    /// All, in the order of the columns of `dedup.reconciled_chunks`.
    pub const ALL: [Kind; 6] = [
        Kind::Missing,
        Kind::Changed,
        Kind::Extra,
        Kind::SurvivingDuplicate,
        Kind::Foreign,
        Kind::SourceChanged,
    ];

    /// Its name in SQL.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Missing => "missing",
            Kind::Changed => "changed",
            Kind::Extra => "extra",
            Kind::SurvivingDuplicate => "surviving_duplicate",
            Kind::Foreign => "foreign",
            Kind::SourceChanged => "source_changed",
        }
    }

    /// Whether it says that something is wrong; a changed source does if one asks for it.
    fn is_mismatch(self, strict: bool) -> bool {
        self != Kind::Foreign && (strict || self != Kind::SourceChanged)
    }

    /// How many of a chunk are listed by key: of rows that are none of the run's business fewer, there may be as many as the table has.
    fn listed(self) -> usize {
        if self == Kind::Foreign { 1_000 } else { 10_000 }
    }
}

/// What was found of one chunk.
#[derive(Default)]
pub struct Findings {
    counts: [i64; Kind::ALL.len()],
    listed: Vec<(Kind, Option<Vec<u8>>, Digest)>,
}

impl Findings {
    /// Adds one; without a key where it has none, or a null in it.
    pub fn add(&mut self, kind: Kind, key: Option<&[u8]>, content: Digest) {
        let count = &mut self.counts[kind as usize];
        *count += 1;
        if *count <= kind.listed() as i64 {
            self.listed.push((kind, key.map(<[u8]>::to_vec), content));
        }
    }

    /// How many of a kind.
    pub fn count(&self, kind: Kind) -> i64 {
        self.counts[kind as usize]
    }

    /// How many say that something is wrong.
    pub fn mismatches(&self, strict: bool) -> i64 {
        Kind::ALL.iter().filter(|kind| kind.is_mismatch(strict)).map(|&kind| self.count(kind)).sum()
    }

    /// Lists them in `dedup.divergences`; `key_text` prints a key.
    ///
    /// # Errors
    /// What `key_text` returns.
    pub fn enter(
        &self,
        reconciliation: i64,
        run: Uuid,
        chunk_id: &str,
        target: i32,
        strict: bool,
        key_text: impl Fn(&[u8]) -> Result<String>,
    ) -> Result<()> {
        if self.listed.is_empty() {
            return Ok(());
        }
        let texts = self
            .listed
            .iter()
            .map(|(_, key, _)| key.as_deref().map(&key_text).transpose())
            .collect::<Result<Vec<_>>>()?;
        let keys = self.listed.iter().map(|(_, key, _)| key.clone());
        let kinds = self.listed.iter().map(|(kind, ..)| kind.name().to_owned());
        let state = |kind: Kind| if kind.is_mismatch(strict) { "open" } else { "reported" };
        let states = self.listed.iter().map(|(kind, ..)| state(*kind).to_owned());
        let contents = self.listed.iter().map(|(_, _, content)| content.as_bytes().to_vec());
        Spi::run_with_args(
            "INSERT INTO dedup.divergences (reconciliation_id, run_id, chunk_id, target_id, kind, key, packed_key, content_hash, state) \
             SELECT $1, $2, $3, $4, u.kind, u.key, u.packed, u.content, u.state \
             FROM ROWS FROM (pg_catalog.unnest($5), pg_catalog.unnest($6), pg_catalog.unnest($7), pg_catalog.unnest($8), pg_catalog.unnest($9)) \
                 AS u(kind, key, packed, content, state)",
            &[
                reconciliation.into(),
                run.into(),
                chunk_id.into(),
                target.into(),
                kinds.collect::<Vec<_>>().into(),
                texts.into(),
                keys.collect::<Vec<_>>().into(),
                contents.collect::<Vec<_>>().into(),
                states.collect::<Vec<_>>().into(),
            ],
        )?;
        Ok(())
    }
}
