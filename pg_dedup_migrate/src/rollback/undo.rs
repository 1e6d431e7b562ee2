//! One finish is taken back.
use std::collections::{HashMap, HashSet};

use pg_dedup_record::block::{Entry, Stamp};
use pg_dedup_record::digest::Digest;
use pgrx::Uuid;
use pgrx::prelude::*;

use super::look::{Alone, Findings, look};
use super::restore::restore;
use super::{Rollback, Undone};
use crate::by_key::{Reading, rows_under};
use crate::chunk::{self, required};
use crate::error::{Error, Result};
use crate::hash::layout::stored_layout;
use crate::hash::rows;
use crate::index::Target;
use crate::keyset::{column_list, qualified_name};
use crate::planning::ByIndex;
use crate::references::{self, Which};
use crate::relation::{Access, Snapshot, Table};
use crate::segment::{self, BlockReader, Segment, SegmentWriter, next_number};
use crate::shmem::filter;

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
    fn load(step: &Step, segments: &[Segment], snapshot: &Snapshot) -> Result<Self> {
        let mut done = Self { written: Vec::new(), removed: Vec::new(), unknown: Vec::new() };
        Spi::connect(|client| -> Result<()> {
            let rows = client.select(
                "SELECT key, content_hash, action = 'delete' AS removed FROM dedup.before_images WHERE ordinal = $1 ORDER BY key",
                None,
                &[step.ordinal.cast_signed().into()],
            )?;
            for row in rows {
                let content = content_hash(row["content_hash"].value()?)?;
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

/// A content hash as dedup's tables keep it.
///
/// # Errors
/// XX001 when it is null or not 32 bytes.
pub fn content_hash(bytes: Option<Vec<u8>>) -> Result<Digest> {
    Digest::from_slice(&required(bytes)?)
        .ok_or_else(|| Error::corrupted("a before image's content hash is not 32 bytes"))
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

/// Takes a finish back; `None`: a newer one that touched one of its rows comes first.
///
/// # Errors
/// As `dedup.undo_ordinal`.
pub fn undo(step: &Step, careful: bool) -> Result<Option<Undone>> {
    let snapshot = Snapshot::latest();
    let segments = step.segments(&snapshot)?;
    let done = Done::load(step, &segments, &snapshot)?;
    let (plan, findings) = if careful || step.overwritten {
        let Some((plan, findings)) = look(step, &done)? else { return Ok(None) };
        (plan, findings)
    } else {
        (trusting(step, &done)?, Findings::default())
    };
    let deleted = delete(step, &plan.delete)?;
    let restored = restore(step, &plan)?;
    forget(step, &segments, &findings)?;
    Ok(Some(Undone { deleted, restored, left_alone: findings.alone.len() as i64 }))
}

fn not_as_written(step: &Step) -> Error {
    Error::new(
        PgSqlErrorCode::ERRCODE_T_R_SERIALIZATION_FAILURE,
        format!("a row of {} is not what was written", qualified_name(step.target.table)),
    )
}

/// The plan if every row is what was written. Rows to be restored are looked at first, rows to be deleted when they are.
fn trusting<'a>(step: &Step, done: &'a Done) -> Result<Plan<'a>> {
    let Target { table, layout, key_types, .. } = &step.target;
    let mut plan = Plan::default();
    let mut replaced: Vec<&Written> = Vec::new();
    for row in &done.written {
        match &row.replaced {
            Some(image) => {
                replaced.push(row);
                plan.update.push(&image.key);
            }
            None => plan.delete.push((&row.key, Some(row))),
        }
    }
    let mut same = 0;
    rows_under(Reading::Locked, *table, layout, key_types, &plan.update, |n, row| {
        same += usize::from(row.row_digest()?.short() == replaced[n].row_digest);
        Ok(())
    })?;
    plan.insert = done.removed.iter().map(|image| image.key.as_slice()).collect();
    let mut occupied = false;
    rows_under(Reading::Latest, *table, layout, key_types, &plan.insert, |_, _| {
        occupied = true;
        Ok(())
    })?;
    if same == replaced.len() && !occupied && done.unknown.is_empty() {
        Ok(plan)
    } else {
        Err(not_as_written(step))
    }
}

fn delete(step: &Step, rows: &[(&[u8], Option<&Written>)]) -> Result<i64> {
    if rows.is_empty() {
        return Ok(0);
    }
    let Target { table, layout, key_types, .. } = &step.target;
    let keys: Vec<&[u8]> = rows.iter().map(|(key, _)| *key).collect();
    if !references::of(*table, Which::All)?.is_empty() {
        // No row may come to point at them between the check and the deletion, which might take it along.
        rows_under(Reading::Locked, *table, layout, key_types, &keys, |_, _| Ok(()))?;
        references::refuse_pointed_at(*table, key_types, &keys)?;
    }
    let _plan = ByIndex::new();
    let query = format!(
        "DELETE FROM {} AS t USING {} WHERE {} RETURNING {}, k.n",
        qualified_name(*table),
        key_types.unnest(),
        key_types.join_condition(),
        column_list(layout, "t")
    );
    let mut same = true;
    let deleted = rows::scan(&query, &key_types.arrays(&keys)?, layout, 1, |row| {
        if let (_, Some(written)) = rows[required(row.trailing::<i64>(0)?)? as usize - 1] {
            same &= row.row_digest()?.short() == written.row_digest;
        }
        Ok(())
    })?;
    if !same || deleted != rows.len() as u64 {
        // Of rows that were looked at before, and locked, none can have changed.
        return Err(if rows.iter().any(|(_, unchecked)| unchecked.is_some()) {
            not_as_written(step)
        } else {
            Error::state(format!(
                "{deleted} of {} rows of {} could be deleted",
                rows.len(),
                qualified_name(*table)
            ))
            .hint("look for a trigger, rule or policy that hides or keeps rows of the target")
        });
    }
    Ok(deleted.cast_signed())
}

/// Takes entries, ledger and images of the finish away; enters what the index has to say of the rows that were left alone.
fn forget(step: &Step, segments: &[Segment], findings: &Findings) -> Result<()> {
    segment::delete(segments)?;
    segment::write_tombstones(step.target.id, findings.tombstones.clone())?;
    tell_index(step, findings)?;
    let ordinal = step.ordinal.cast_signed();
    let kept: Vec<Vec<u8>> = findings
        .alone
        .iter()
        .filter_map(|alone| alone.image.as_ref())
        .map(|image| image.key.clone())
        .collect();
    // Whoever mends a row by hand still finds what it was.
    Spi::run_with_args(
        "DELETE FROM dedup.before_images WHERE ordinal = $1 AND key <> ALL ($2)",
        &[ordinal.into(), kept.into()],
    )?;
    forget_lists(ordinal)?;
    report(step, &findings.alone)
}

/// Takes away what the finish dropped as duplicates or found unchanged.
///
/// # Errors
/// 42501 without the privileges of a worker.
pub fn forget_lists(ordinal: i64) -> Result<()> {
    for table in ["ledger_block", "unchanged_rows"] {
        Spi::run_with_args(&format!("DELETE FROM dedup.{table} WHERE ordinal = $1"), &[ordinal.into()])?;
    }
    Ok(())
}

/// What the index says from now on, under an ordinal that is nobody's: rows that are left alone stand like rows that stood there before any run;
/// what they would have been again stands nowhere, nor does what was overwritten.
fn tell_index(step: &Step, findings: &Findings) -> Result<()> {
    let mut entries: Vec<(Digest, bool, [u8; Digest::SHORT_LEN], &[u8])> = Vec::new();
    for alone in &findings.alone {
        if let Some((digests, key)) = &alone.stands {
            entries.push((digests.content, false, digests.row.short(), key));
        }
        if let Some(image) = &alone.image {
            entries.push((image.content, true, [0; Digest::SHORT_LEN], &image.key));
        }
    }
    entries.extend(findings.buried.iter().map(|(content, key)| (*content, true, [0; 8], key.as_slice())));
    if entries.is_empty() {
        return Ok(());
    }
    entries.sort_unstable();
    let ordinal = next_number("ordinal_seq")?;
    Spi::run_with_args(
        "INSERT INTO dedup.ordinals (ordinal, target_id) VALUES ($1, $2)",
        &[ordinal.into(), step.target.id.into()],
    )?;
    let blocks = Table::open("segment_block", Access::Insert)?;
    let segments = Table::open("segment", Access::Insert)?;
    let mut writer = SegmentWriter::new(&blocks, step.target.id, 0)?;
    for &(digest, tombstone, row_digest, key) in &entries {
        let stamp = Stamp { ordinal: ordinal.cast_unsigned(), tombstone };
        writer.push(&Entry { digest, stamp, row_digest, key })?;
    }
    let mut contents: Vec<[u8; 32]> = entries.iter().map(|(digest, ..)| digest.0).collect();
    contents.dedup();
    // Without shared memory there is no filter that could miss them.
    if crate::shmem::attached().is_ok() {
        filter::set_sorted(chunk::scope(step.target.id), contents.iter(), &mut Vec::new())?;
    }
    writer.finish(&segments)?;
    Ok(())
}

/// Names the rows that are left alone, and why.
///
/// # Errors
/// SPI's own.
pub fn report(step: &Step, alone: &[Alone]) -> Result<()> {
    if alone.is_empty() {
        return Ok(());
    }
    let texts = alone
        .iter()
        .map(|a| match a.key.is_empty() {
            true => Ok(None),
            false => step.target.key_types.query_string(&a.key).map(Some),
        })
        .collect::<Result<Vec<_>>>()?;
    Ok(Spi::run_with_args(
        "INSERT INTO dedup.left_alone (rollback_id, run_id, chunk_id, target_id, ordinal, key, packed_key, content_hash, reason) \
         SELECT $1, $2, $3, $4, $5, u.key, u.packed, u.content, u.reason \
         FROM ROWS FROM (pg_catalog.unnest($6), pg_catalog.unnest($7), pg_catalog.unnest($8), pg_catalog.unnest($9)) AS u(key, packed, content, reason)",
        &[
            step.rollback.into(),
            step.run.into(),
            step.chunk.as_str().into(),
            step.target.id.into(),
            step.ordinal.cast_signed().into(),
            texts.into(),
            alone
                .iter()
                .map(|a| Some(a.key.clone()).filter(|key| !key.is_empty()))
                .collect::<Vec<_>>()
                .into(),
            alone.iter().map(|a| a.written.map(|digest| digest.0.to_vec())).collect::<Vec<_>>().into(),
            alone.iter().map(|a| a.reason.name().to_owned()).collect::<Vec<_>>().into(),
        ],
    )?)
}

/// Which of these ordinals leave with the rollback and have not been taken back yet.
///
/// # Errors
/// SPI's own.
pub fn pending(step: &Step, ordinals: &HashSet<u64>) -> Result<HashSet<u64>> {
    let ordinals: Vec<i64> = ordinals.iter().map(|o| o.cast_signed()).collect();
    Spi::connect(|client| {
        client
            .select(
                "SELECT ordinal FROM dedup.rollback_steps WHERE rollback_id = $1 AND ordinal = ANY ($2) AND undone_at IS NULL",
                None,
                &[step.rollback.into(), ordinals.into()],
            )?
            .map(|row| Ok(required::<i64>(row["ordinal"].value()?)?.cast_unsigned()))
            .collect()
    })
}
