//! A finish that is taken back: what it did, and what is to be done about its rows.
use std::collections::{BTreeSet, HashMap, HashSet};

use pg_dedup_record::digest::Digest;
use pgrx::prelude::*;
use pgrx::{JsonB, Uuid};

use super::Rollback;
use crate::by_key::{Reading, rows_under};
use crate::error::{Error, Result};
use crate::hash::layout::stored_layout;
use crate::index::Target;
use crate::keyset::KeyTypes;
use crate::relation::{Access, Snapshot, Table};
use crate::segment::{self, BlockReader, Segment};
use crate::sql::{self, required, stored_digest};

/// A finish that is taken back.
pub struct Step {
    /// The rollback.
    pub rollback: i64,
    /// The run.
    pub run: Uuid,
    /// `None`: every chunk of the run leaves.
    pub only_chunk: Option<String>,
    /// The chunk.
    pub chunk: String,
    /// The finish.
    pub ordinal: u64,
    /// The target, with the columns that the chunk's run delivered.
    pub target: Target,
    /// Rows that others changed are overwritten.
    pub forced: bool,
    /// A row that looks as it was written may not be it.
    pub overwritten: bool,
}

impl Step {
    /// A step of a rollback.
    ///
    /// # Errors
    /// 42704 when the rollback has no such step.
    pub fn load(rollback: &Rollback, ordinal: i64) -> Result<Self> {
        let (target_id, chunk, layout) = Spi::connect(|client| -> Result<_> {
            let rows = client.select(
                "SELECT s.target_id, s.chunk_id, t.layout FROM dedup.rollback_steps AS s JOIN dedup.ordinals AS o USING (ordinal) \
                     JOIN dedup.run_tables AS t ON t.run_id = coalesce(o.heir_of, o.run_id) AND t.table_id = coalesce(o.heir_table, s.table_id) \
                 WHERE s.rollback_id = $1 AND s.ordinal = $2 AND s.undone_at IS NULL",
                Some(1),
                &[rollback.id.into(), ordinal.into()],
            )?;
            let row = rows.into_iter().next().ok_or_else(|| {
                Error::undefined(format!("rollback {} has no step {ordinal} left", rollback.id))
            })?;
            Ok((
                required(row["target_id"].value()?)?,
                required(row["chunk_id"].value::<String>()?)?,
                required(row["layout"].value()?)?,
            ))
        })?;
        let mut target = Target::by_id(target_id)?;
        // Nobody indexes the rows anew meanwhile; chunks are kept out by the run's status.
        Spi::run_with_args(
            "SELECT pg_catalog.pg_advisory_xact_lock_shared(dedup.lock_class(), $1)",
            &[target_id.into()],
        )?;
        // Content and key are the index's; what else was delivered is the run's.
        target.layout = stored_layout(layout)?;
        Ok(Self {
            rollback: rollback.id,
            run: rollback.run,
            only_chunk: rollback.chunk.clone(),
            chunk,
            ordinal: ordinal.cast_unsigned(),
            target,
            forced: rollback.forced,
            overwritten: rollback.overwritten,
        })
    }

    /// The segments that hold its entries and no others.
    ///
    /// # Errors
    /// 42501 without SELECT on the segment tables.
    pub fn segments(&self, snapshot: &Snapshot) -> Result<Vec<Segment>> {
        segment::segments_of_ordinal(self.target.id, self.ordinal.cast_signed(), snapshot)
    }
}

/// A before image, without the row.
#[derive(Clone)]
pub struct Image {
    /// The key that it is kept under: the row's, in the bytes that it had then.
    pub key: Vec<u8>,
    /// The content that the row had.
    pub content: Digest,
}

/// A row that the finish wrote.
pub struct Written {
    /// Its key.
    pub key: Vec<u8>,
    /// Its content.
    pub content: Digest,
    /// The beginning of its row digest.
    pub row_digest: [u8; Digest::SHORT_LEN],
    /// The row that it replaced. Other bytes of its key may mean the same (1.0 and 1.00).
    pub replaced: Option<Image>,
}

/// What the finish did.
pub struct Done {
    /// Rows written, by key.
    pub written: Vec<Written>,
    /// Rows removed.
    pub removed: Vec<Image>,
    /// Rows replaced of which the index does not know by what.
    pub unknown: Vec<Image>,
}

impl Done {
    /// What a step's finish did.
    ///
    /// # Errors
    /// XX001 for damaged state.
    pub fn load(step: &Step, segments: &[Segment], snapshot: &Snapshot) -> Result<Self> {
        let mut done = Self { written: Vec::new(), removed: Vec::new(), unknown: Vec::new() };
        Spi::connect(|client| -> Result<()> {
            let rows = client.select(
                "SELECT key, content_hash, action = 'delete' AS removed FROM dedup.before_images WHERE ordinal = $1 ORDER BY key",
                None,
                &[step.ordinal.cast_signed().into()],
            )?;
            for row in rows {
                let content = stored_digest(row["content_hash"].value()?)?;
                let image = Image { key: required(row["key"].value()?)?, content };
                let removed = required::<bool>(row["removed"].value()?)?;
                if removed { done.removed.push(image) } else { done.unknown.push(image) }
            }
            Ok(())
        })?;
        let blocks = Table::open("segment_block", Access::Read)?;
        let mut reader = BlockReader::new(&blocks, snapshot)?;
        for segment in segments {
            segment::for_each_entry(&mut reader, segment.id, |entry| {
                if !entry.stamp.tombstone {
                    done.written.push(Written {
                        key: entry.key.to_vec(),
                        content: entry.digest,
                        row_digest: entry.row_digest,
                        replaced: None,
                    });
                }
                Ok(())
            })?;
        }
        // Rows that were written together lie together.
        done.written.sort_unstable_by(|a, b| a.key.cmp(&b.key));
        for image in std::mem::take(&mut done.unknown) {
            match done.written.binary_search_by(|w| w.key.cmp(&image.key)) {
                Ok(at) => done.written[at].replaced = Some(image),
                Err(_) => done.unknown.push(image),
            }
        }
        done.match_spellings(step)?;
        Ok(done)
    }

    /// Rows whose key was written in other bytes than it had are found by their rows.
    fn match_spellings(&mut self, step: &Step) -> Result<()> {
        if self.unknown.is_empty() {
            return Ok(());
        }
        let Target { table, layout, key_types, .. } = &step.target;
        let standing = |keys: &[&[u8]]| -> Result<HashMap<Vec<u8>, usize>> {
            let mut found = HashMap::new();
            rows_under(Reading::Latest, *table, layout, key_types, keys, |n, row| {
                let mut key = Vec::new();
                row.write_key(&mut key)?;
                found.insert(key, n);
                Ok(())
            })?;
            Ok(found)
        };
        let written: Vec<&[u8]> = self.written.iter().map(|w| w.key.as_slice()).collect();
        let unknown: Vec<&[u8]> = self.unknown.iter().map(|image| image.key.as_slice()).collect();
        let (written, unknown) = (standing(&written)?, standing(&unknown)?);
        let mut matched: Vec<(usize, usize)> =
            unknown.iter().filter_map(|(key, &n)| written.get(key).map(|&at| (n, at))).collect();
        matched.sort_unstable_by_key(|&(n, _)| std::cmp::Reverse(n));
        for (n, at) in matched {
            self.written[at].replaced = Some(self.unknown.swap_remove(n));
        }
        Ok(())
    }
}

/// What is to be done about the rows of a finish.
#[derive(Default)]
pub struct Plan<'a> {
    /// Rows to delete; those of which it is not known yet that they are what was written have that beside them.
    pub delete: Vec<(&'a [u8], Option<&'a Written>)>,
    /// Rows that get their image back by an update.
    pub update: Vec<&'a [u8]>,
    /// Rows that get their image back by an insertion.
    pub insert: Vec<&'a [u8]>,
}

/// The target of a step with the columns that each of these finishes was written by, together those with the same.
///
/// # Errors
/// XX001 for damaged state.
pub fn layouts(step: &Step, ordinals: &BTreeSet<u64>) -> Result<Vec<(BTreeSet<u64>, Target)>> {
    let ordinals: Vec<i64> = ordinals.iter().map(|o| o.cast_signed()).collect();
    let found: Vec<(Vec<i64>, JsonB)> = Spi::connect(|client| -> Result<_> {
        client
            .select(
                "SELECT pg_catalog.array_agg(o.ordinal) AS ordinals, t.layout FROM dedup.ordinals AS o LEFT JOIN dedup.checkpoints AS c USING (run_id, chunk_id) \
                     JOIN dedup.run_tables AS t ON t.run_id = coalesce(o.heir_of, o.run_id) AND t.table_id = coalesce(o.heir_table, c.table_id) \
                 WHERE o.ordinal = ANY ($1) GROUP BY t.layout",
                None,
                &[ordinals.into()],
            )?
            .map(|row| Ok((required(row["ordinals"].value()?)?, required(row["layout"].value()?)?)))
            .collect()
    })?;
    let Target { id, table, .. } = step.target;
    found
        .into_iter()
        .map(|(ordinals, layout)| {
            let layout = stored_layout(layout)?;
            let key_types = KeyTypes::of(table, &layout)?;
            Ok((
                ordinals.into_iter().map(i64::cast_unsigned).collect(),
                Target { id, table, key_types, layout },
            ))
        })
        .collect()
}

/// Which of these ordinals leave with the rollback and have not been taken back yet.
///
/// # Errors
/// SPI's own.
pub fn pending(step: &Step, ordinals: &HashSet<u64>) -> Result<HashSet<u64>> {
    let ordinals: Vec<i64> = ordinals.iter().map(|o| o.cast_signed()).collect();
    sql::ordinals(
        "SELECT ordinal FROM dedup.rollback_steps WHERE rollback_id = $1 AND ordinal = ANY ($2) AND undone_at IS NULL",
        &[step.rollback.into(), ordinals.into()],
    )
}
