//! Who else rests on what leaves a target: runs whose records were dropped as duplicates of its rows or found unchanged there, and runs that changed
//! or replaced its rows.
//!
//! One walk over the index, in order of digest, with what others rest on looked up beside it, as much at a time as fits `maintenance_work_mem`.
use std::collections::{BTreeMap, HashMap, HashSet};

use pg_dedup_record::digest::Digest;
use pgrx::Uuid;
use pgrx::prelude::*;

use super::heirs::subject;
use super::{Part, Rollback};
use crate::by_key::{Reading, rows_under};
use crate::error::{Error, Result};
use crate::index::Target;
use crate::ledger;
use crate::lookup::{self, Place};
use crate::matching::rested_on;
use crate::merge::Merge;
use crate::passes::{Pass, Passes};
use crate::relation::{Access, Snapshot, Table};
use crate::segment;
use crate::sql::{self, required};

/// Ordinals that are none of the rollback's, of runs that stand; parameters: target, run, chunk or null.
const OTHERS: &str = "dedup.ordinals AS o JOIN dedup.runs AS r ON r.run_id = o.run_id \
     WHERE o.target_id = $1 AND r.status <> 'rolled_back' \
         AND NOT (o.run_id = $2 AND ($3::pg_catalog.text IS NULL OR o.chunk_id = $3))";

/// What becomes of an entry whose finish is taken back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// Its row goes, or is again what it was before.
    Goes,
    /// The finish with this ordinal, which stays, changed the row.
    Overwritten(u64),
    /// As [`Fate::Overwritten`], and the finish `heir`, which stays, too, had found the row unchanged before.
    Awaited {
        /// Who changed the row.
        by: u64,
        /// Whose it is if it comes back.
        heir: u64,
    },
    /// Records of the finish with this ordinal, which stays, rest on the row.
    Rested(u64),
}

/// Records of others that rest on a target's rows, as far as their digests are in one pass.
#[derive(Default)]
struct Interests {
    /// Contents that were dropped as duplicates, and by which finish first.
    by_content: HashMap<[u8; 32], u64>,
    /// Rows found unchanged, sorted.
    by_row: Vec<([u8; 16], u64)>,
}

impl Interests {
    fn load(rollback: &Rollback, part: &Part, pass: Pass) -> Result<Self> {
        let mut interests = Self::default();
        for_each_other(
            rollback,
            part,
            "SELECT l.ordinal, l.entries FROM dedup.ledger_block AS l WHERE l.ordinal IN (SELECT o.ordinal FROM ",
            |ordinal, block| {
                for digest in ledger::parse(block)?.digests().filter(|d| pass.has(d.as_bytes())) {
                    let first = interests.by_content.entry(*digest.as_bytes()).or_insert(ordinal);
                    *first = ordinal.min(*first);
                }
                Ok(())
            },
        )?;
        for_each_other(
            rollback,
            part,
            "SELECT u.ordinal, u.rows AS entries FROM dedup.unchanged_rows AS u WHERE u.ordinal IN (SELECT o.ordinal FROM ",
            |ordinal, rows| {
                interests.by_row.extend(
                    rows.as_chunks::<16>()
                        .0
                        .iter()
                        .filter(|row| pass.has_prefix(&row[..]))
                        .map(|&row| (row, ordinal)),
                );
                Ok(())
            },
        )?;
        interests.by_row.sort_unstable();
        Ok(interests)
    }

    /// Who found this row unchanged last, before some finish.
    fn found_before(&self, content: &Digest, key: &[u8], before: u64) -> Option<u64> {
        if self.by_row.is_empty() {
            return None;
        }
        let sought = rested_on(content, key);
        let end = self.by_row.partition_point(|found| *found < (sought, before));
        let (row, ordinal) = *self.by_row[..end].last()?;
        (row == sought).then_some(ordinal)
    }

    /// What becomes of the entries of one content that leave; `said` is all that the index says about it, by ordinal. A row in the place of one with
    /// this content may be `kept`, [`subject`] of its entry: then this one does not come back.
    fn judge(
        &self,
        content: &Digest,
        said: &[Place],
        leaves: impl Fn(u64) -> bool,
        kept: &HashSet<u64>,
        mut tell: impl FnMut(&Place, Fate),
    ) {
        let mut stays: Vec<Place> = Vec::new();
        let mut sought = self.by_content.get(content.as_bytes()).copied();
        if sought.is_some() {
            stays = said.iter().filter(|p| !leaves(p.ordinal)).cloned().collect();
            lookup::keep_standing(&mut stays);
            let gone = said
                .iter()
                .filter(|p| p.tombstone && leaves(p.ordinal) && kept.contains(&subject(p.ordinal, &p.key)));
            let gone: Vec<&Place> = gone.collect();
            stays.retain(|p| !gone.iter().any(|gone| gone.key == p.key && gone.ordinal > p.ordinal));
        }
        for (at, place) in said.iter().enumerate().filter(|(_, p)| leaves(p.ordinal) && !p.tombstone) {
            let next = said[at + 1..].iter().find(|p| p.key == place.key && p.ordinal > place.ordinal);
            let fate = match next {
                Some(next) if leaves(next.ordinal) => Fate::Goes,
                Some(next) => {
                    let heir = self.found_before(content, &place.key, next.ordinal);
                    heir.filter(|heir| *heir > place.ordinal).map_or(
                        Fate::Overwritten(next.ordinal),
                        |heir| Fate::Awaited { by: next.ordinal, heir },
                    )
                }
                None => {
                    let by_content = if stays.is_empty() { sought.take() } else { None };
                    // What stood there with the same content stands there again.
                    let before = said[..at].iter().rev().find(|p| p.key == place.key && !leaves(p.ordinal));
                    let comes_back = before.is_some_and(|p| !p.tombstone);
                    // An entry that was handed over has a later ordinal than whoever found its row unchanged, and so has a row that was written
                    // anew: in between it was taken away, by a finish that stays.
                    let taken = |found: u64| {
                        let mut between = said.iter().filter(|p| p.key == place.key && !leaves(p.ordinal));
                        between.any(|p| p.tombstone && (found..place.ordinal).contains(&p.ordinal))
                    };
                    let by_row = || {
                        let found = self.found_before(content, &place.key, u64::MAX);
                        found.filter(|found| !comes_back && !taken(*found))
                    };
                    by_content.or_else(by_row).map_or(Fate::Goes, Fate::Rested)
                }
            };
            tell(place, fate);
        }
    }
}

/// Calls `visit` with the ordinal and the packed column of what `query` finds of others.
fn for_each_other(
    rollback: &Rollback,
    part: &Part,
    query: &str,
    mut visit: impl FnMut(u64, &[u8]) -> Result<()>,
) -> Result<()> {
    Spi::connect(|client| {
        let mut cursor = client.open_cursor(
            format!("{query} {OTHERS})").as_str(),
            &[part.target.id.into(), rollback.run.into(), rollback.chunk.clone().into()],
        );
        loop {
            let rows = cursor.fetch(64)?;
            if rows.is_empty() {
                return Ok(());
            }
            for row in rows {
                let ordinal: i64 = required(row["ordinal"].value()?)?;
                let packed: Vec<u8> = required(row["entries"].value()?)?;
                visit(ordinal.cast_unsigned(), &packed)?;
            }
        }
    })
}

/// How much there is to look at: records of others that rest on rows of the target, whoever wrote these.
///
/// # Errors
/// SPI's own.
pub fn scale(rollback: &Rollback, part: &Part) -> Result<usize> {
    let arguments = [part.target.id.into(), rollback.run.into(), rollback.chunk.clone().into()];
    let (blocks, unchanged) = Spi::get_two_with_args::<i64, i64>(
        &format!(
            "SELECT (SELECT pg_catalog.count(*) FROM dedup.ledger_block AS l WHERE l.ordinal IN (SELECT o.ordinal FROM {OTHERS})), \
                 (SELECT coalesce(pg_catalog.sum(pg_catalog.length(u.rows)), 0)::pg_catalog.int8 FROM dedup.unchanged_rows AS u \
                  WHERE u.ordinal IN (SELECT o.ordinal FROM {OTHERS}))"
        ),
        &arguments,
    )?;
    Ok(required(blocks)?.unsigned_abs() as usize * segment::ENTRIES_PER_BLOCK
        + required(unchanged)?.unsigned_abs() as usize / 16)
}

/// Have others changed or removed rows of the target after what is taken back, or, in a chunk that was done again, written rows that were gone?
fn has_later_changes(rollback: &Rollback, part: &Part) -> Result<bool> {
    required(Spi::get_one_with_args(
        "SELECT EXISTS (SELECT FROM dedup.before_images AS b WHERE b.target_id = $1 AND b.ordinal OPERATOR(pg_catalog.>) $4 \
             AND NOT EXISTS (SELECT FROM dedup.rollback_steps AS s WHERE s.ordinal = b.ordinal AND s.undone_at IS NOT NULL) \
             AND NOT (b.run_id = $2 AND ($3::pg_catalog.text IS NULL OR b.chunk_id = $3))) \
         OR EXISTS (SELECT FROM dedup.ordinals AS a JOIN dedup.ordinals AS o USING (run_id, chunk_id) \
             WHERE o.target_id = $1 AND o.ordinal OPERATOR(pg_catalog.>) $4 AND a.ordinal OPERATOR(pg_catalog.<) o.ordinal \
             AND NOT (o.run_id = $2 AND ($3::pg_catalog.text IS NULL OR o.chunk_id = $3)))",
        &[
            part.target.id.into(),
            rollback.run.into(),
            rollback.chunk.clone().into(),
            part.oldest().cast_signed().into(),
        ],
    )?)
}

/// Whether rows of what is taken back have a later history, so that a row which looks as it was written may not be it: others changed some, a chunk was done
/// again, or some were removed, whose places others may have written to, and cleared, since. A row that was gone and is written again leaves no before image.
///
/// # Errors
/// SPI's own.
pub fn is_overwritten(rollback: &Rollback, parts: &[Part]) -> Result<bool> {
    let again = required(Spi::get_one_with_args::<bool>(
        "SELECT EXISTS (SELECT FROM dedup.ordinals AS a JOIN dedup.ordinals AS o USING (run_id, chunk_id) \
             WHERE o.run_id = $1 AND ($2::pg_catalog.text IS NULL OR o.chunk_id = $2) AND a.ordinal OPERATOR(pg_catalog.<) o.ordinal) \
         OR EXISTS (SELECT FROM dedup.before_images AS b WHERE b.run_id = $1 AND ($2::pg_catalog.text IS NULL OR b.chunk_id = $2) AND b.action = 'delete' \
             AND EXISTS (SELECT FROM dedup.ordinals AS o WHERE o.target_id = b.target_id AND o.ordinal OPERATOR(pg_catalog.>) b.ordinal AND o.run_id <> $1))",
        &[rollback.run.into(), rollback.chunk.clone().into()],
    )?)?;
    parts.iter().try_fold(again, |any, part| Ok(any || has_later_changes(rollback, part)?))
}

/// Walks over the entries that leave, and what becomes of each; `kept`: [`subject`] of those that replaced a row and are kept for others.
///
/// # Errors
/// XX001 for damaged state; what `visit` returns.
pub fn walk(
    rollback: &Rollback,
    part: &Part,
    entries: usize,
    kept: &HashSet<u64>,
    mut visit: impl FnMut(&Digest, &Place, Fate) -> Result<()>,
) -> Result<()> {
    let snapshot = Snapshot::latest();
    let blocks = Table::open("segment_block", Access::Read)?;
    let segments = segment::segments_of(part.target.id, &snapshot)?;
    for pass in Passes::of(entries, size_of::<([u8; 32], u64)>() * 2).each() {
        let interests = Interests::load(rollback, part, pass)?;
        Merge::new(&blocks, &segments, &snapshot)?.for_each_content(|digest, said, _| {
            if !pass.has(digest.as_bytes()) || !said.iter().any(|p| part.has(p.ordinal)) {
                return Ok(());
            }
            let mut told = Ok(());
            interests.judge(
                digest,
                said,
                |ordinal| part.has(ordinal),
                kept,
                |place, fate| {
                    if told.is_ok() {
                        told = visit(digest, place, fate);
                    }
                },
            );
            told
        })?;
    }
    Ok(())
}

/// Refuses a rollback that would take away what others rest on, unless it is forced.
///
/// # Errors
/// 55006 naming the runs.
pub fn refuse(rollback: &Rollback, parts: &[Part]) -> Result<()> {
    if rollback.forced {
        return Ok(());
    }
    let (mut rested, mut overwritten): (BTreeMap<u64, i64>, BTreeMap<u64, i64>) = Default::default();
    for part in parts {
        let entries = scale(rollback, part)?;
        if entries > 0 || has_later_changes(rollback, part)? {
            walk(rollback, part, entries, &HashSet::new(), |_, _, fate| {
                match fate {
                    Fate::Goes => {}
                    Fate::Overwritten(by) | Fate::Awaited { by, .. } => {
                        *overwritten.entry(by).or_default() += 1
                    }
                    Fate::Rested(by) => *rested.entry(by).or_default() += 1,
                }
                Ok(())
            })?;
        }
        for_each_replaced(rollback, part, |by, _| *overwritten.entry(by).or_default() += 1)?;
    }
    // What became nobody's since is for the steps to leave alone.
    let standing = others(rollback.run, rollback.chunk.as_deref(), &overwritten.keys().copied().collect())?;
    overwritten.retain(|by, _| standing.contains(by));
    if rested.is_empty() && overwritten.is_empty() {
        return Ok(());
    }
    let mut lines = Vec::new();
    for (finishes, what) in [
        (rested, "rest on {n} of its rows: they were dropped as duplicates of them, or found unchanged"),
        (overwritten, "changed {n} of its rows"),
    ] {
        for (run, name, count) in by_run(&finishes)? {
            let what = what.replace("{n}", &count.to_string());
            let subject = if what.starts_with("rest") { "Records of run" } else { "Run" };
            lines.push(format!("{subject} {run} ({name}) {what}."));
        }
    }
    Err(Error::new(
        PgSqlErrorCode::ERRCODE_OBJECT_IN_USE,
        format!("other runs depend on what {} wrote", rollback.name()),
    )
    .detail(lines.join(" "))
    .hint("Roll those back first, or force it: rows that others rest on are kept for them."))
}

/// Finishes by the run they belong to: run, name, sum.
fn by_run(finishes: &BTreeMap<u64, i64>) -> Result<Vec<(Uuid, String, i64)>> {
    let (ordinals, counts): (Vec<i64>, Vec<i64>) =
        finishes.iter().map(|(ordinal, count)| (ordinal.cast_signed(), *count)).unzip();
    Spi::connect(|client| {
        client
            .select(
                "SELECT r.run_id, r.name, pg_catalog.sum(u.n)::pg_catalog.int8 AS n \
                 FROM ROWS FROM (pg_catalog.unnest($1), pg_catalog.unnest($2)) AS u(ordinal, n) JOIN dedup.ordinals AS o USING (ordinal) \
                     JOIN dedup.runs AS r USING (run_id) GROUP BY r.run_id ORDER BY r.created_at",
                None,
                &[ordinals.into(), counts.into()],
            )?
            .map(|row| Ok((required(row["run_id"].value()?)?, required(row["name"].value()?)?, required(row["n"].value()?)?)))
            .collect()
    })
}

/// [`subject`] of each before image of what is taken back whose row a finish that stays has changed, or written anew, since: the image becomes that
/// finish's, and what it holds does not come back.
///
/// # Errors
/// SPI's own; XX001 for damaged state.
pub fn images_of_others(rollback: &Rollback, part: &Part) -> Result<HashSet<u64>> {
    let mut images = HashSet::new();
    let mut tell = |_, image| {
        images.insert(image);
    };
    for_each_changed(rollback, part, false, &mut tell)?;
    for_each_written_anew(rollback, part, &mut tell)?;
    Ok(images)
}

/// Tells the finishes of others that wrote rows under keys whose rows were removed by what is taken back, or found such a row there; and [`subject`] of
/// what was removed.
fn for_each_replaced(rollback: &Rollback, part: &Part, mut tell: impl FnMut(u64, u64)) -> Result<()> {
    for_each_changed(rollback, part, true, &mut tell)?;
    for_each_written_anew(rollback, part, &mut tell)
}

/// Tells the finishes of others that changed or removed rows under keys whose rows were changed (or `removed`: those alone) before by what is taken back.
fn for_each_changed(
    rollback: &Rollback,
    part: &Part,
    removed: bool,
    tell: &mut impl FnMut(u64, u64),
) -> Result<()> {
    if part.target.layout.key.is_empty() {
        return Ok(());
    }
    Spi::connect(|client| -> Result<()> {
        let found = client.select(
            "SELECT b.ordinal AS image, b.key, n.ordinal FROM dedup.before_images AS b JOIN dedup.before_images AS n USING (target_id, key) \
             WHERE b.run_id = $1 AND b.target_id = $2 AND (b.action = 'delete' OR NOT $4) AND ($3::pg_catalog.text IS NULL OR b.chunk_id = $3) \
                 AND n.ordinal OPERATOR(pg_catalog.>) b.ordinal AND NOT (n.run_id = $1 AND ($3::pg_catalog.text IS NULL OR n.chunk_id = $3)) \
                 AND NOT EXISTS (SELECT FROM dedup.rollback_steps AS s WHERE s.ordinal = n.ordinal AND s.undone_at IS NOT NULL)",
            None,
            &[rollback.run.into(), part.target.id.into(), rollback.chunk.clone().into(), removed.into()],
        )?;
        for row in found {
            let image: i64 = required(row["image"].value()?)?;
            let key: Vec<u8> = required(row["key"].value()?)?;
            let by: i64 = required(row["ordinal"].value()?)?;
            tell(by.cast_unsigned(), subject(image.cast_unsigned(), &key));
        }
        Ok(())
    })
}

/// Tells the finishes of others whose rows stand under keys whose rows were removed by what is taken back.
fn for_each_written_anew(rollback: &Rollback, part: &Part, tell: &mut impl FnMut(u64, u64)) -> Result<()> {
    /// Keys looked at together.
    const BATCH: i64 = 20_000;
    if part.target.layout.key.is_empty() {
        return Ok(());
    }
    Spi::connect(|client| {
        let mut cursor = client.open_cursor(
            "SELECT ordinal, key FROM dedup.before_images WHERE run_id = $1 AND target_id = $2 AND action = 'delete' \
                 AND ($3::pg_catalog.text IS NULL OR chunk_id = $3)",
            &[rollback.run.into(), part.target.id.into(), rollback.chunk.clone().into()],
        );
        loop {
            let rows = cursor.fetch(BATCH)?;
            if rows.is_empty() {
                return Ok(());
            }
            let (mut images, mut keys): (Vec<u64>, Vec<Vec<u8>>) = Default::default();
            for row in rows {
                images.push(required::<i64>(row["ordinal"].value()?)?.cast_unsigned());
                keys.push(required(row["key"].value()?)?);
            }
            let keys: Vec<&[u8]> = keys.iter().map(Vec::as_slice).collect();
            let (mut found, mut at): (Vec<(Digest, Vec<u8>)>, Vec<usize>) = Default::default();
            let Target { table, layout, key_types, .. } = &part.target;
            rows_under(Reading::Latest, *table, layout, key_types, &keys, |n, row| {
                let mut key = Vec::new();
                row.write_key(&mut key)?;
                found.push((row.digests()?.content, key));
                at.push(n);
                Ok(())
            })?;
            for (owner, n) in lookup::owners(part.target.id, &found)?.into_iter().zip(at) {
                if let Some(owner) = owner
                    && !part.has(owner.ordinal)
                    && owner.ordinal > part.oldest()
                {
                    tell(owner.ordinal, subject(images[n], keys[n]));
                }
            }
        }
    })
}

/// Of these ordinals those of runs that stand, but for what is taken back: neither nobody's nor taken back before.
///
/// # Errors
/// SPI's own.
pub fn others(run: Uuid, chunk: Option<&str>, ordinals: &HashSet<u64>) -> Result<HashSet<u64>> {
    of_those_that_stay(run, chunk, ordinals, false)
}

/// As [`others`], with what is nobody's.
///
/// # Errors
/// SPI's own.
pub fn staying(run: Uuid, chunk: Option<&str>, ordinals: &HashSet<u64>) -> Result<HashSet<u64>> {
    of_those_that_stay(run, chunk, ordinals, true)
}

fn of_those_that_stay(
    run: Uuid,
    chunk: Option<&str>,
    ordinals: &HashSet<u64>,
    nobodys: bool,
) -> Result<HashSet<u64>> {
    let ordinals: Vec<i64> = ordinals.iter().map(|o| o.cast_signed()).collect();
    sql::ordinals(
        "SELECT o.ordinal FROM dedup.ordinals AS o WHERE o.ordinal = ANY ($1) AND (o.run_id IS NOT NULL OR $4) \
                     AND (o.run_id = $2 AND ($3::pg_catalog.text IS NULL OR o.chunk_id = $3)) IS NOT TRUE \
                     AND NOT EXISTS (SELECT FROM dedup.rollback_steps AS s WHERE s.ordinal = o.ordinal AND s.undone_at IS NOT NULL)",
        &[ordinals.into(), run.into(), chunk.into(), nobodys.into()],
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(ordinal: u64, tombstone: bool, key: u8) -> Place {
        Place { ordinal, tombstone, row_digest: [0; 8], key: vec![key] }
    }

    fn fates(interests: &Interests, said: &[Place], leaving: &[u64]) -> Vec<(u64, Fate)> {
        let mut told = Vec::new();
        interests.judge(
            &Digest([7; 32]),
            said,
            |o| leaving.contains(&o),
            &HashSet::new(),
            |p, fate| told.push((p.ordinal, fate)),
        );
        told
    }

    fn dropped_by(ordinal: u64) -> Interests {
        Interests { by_content: HashMap::from([([7; 32], ordinal)]), by_row: Vec::new() }
    }

    #[test]
    fn what_nobody_rests_on_goes() {
        let said = [place(1, false, 1), place(5, false, 2)];
        assert_eq!(fates(&Interests::default(), &said, &[1, 5]), [(1, Fate::Goes), (5, Fate::Goes)]);
        assert_eq!(fates(&Interests::default(), &said, &[9]), []);
    }

    #[test]
    fn one_row_is_kept_for_a_content() {
        let said = [place(1, false, 1), place(2, false, 2)];
        assert_eq!(fates(&dropped_by(4), &said, &[1, 2]), [(1, Fate::Rested(4)), (2, Fate::Goes)]);
    }

    #[test]
    fn none_is_kept_where_another_row_stays() {
        let said = [place(1, false, 1), place(2, false, 2)];
        assert_eq!(fates(&dropped_by(4), &said, &[2]), [(2, Fate::Goes)]);
        // The other one is retracted by what leaves: it comes back.
        let said = [place(1, false, 1), place(2, true, 1), place(2, false, 2)];
        assert_eq!(fates(&dropped_by(4), &said, &[2]), [(2, Fate::Goes)]);
    }

    #[test]
    fn what_does_not_come_back_is_not_counted_on() {
        let said = [place(1, false, 1), place(2, true, 1), place(2, false, 2)];
        let kept = HashSet::from([subject(2, &[1])]);
        let mut told = Vec::new();
        dropped_by(4).judge(&Digest([7; 32]), &said, |o| o == 2, &kept, |_, fate| told.push(fate));
        assert_eq!(told, [Fate::Rested(4)]);
    }

    #[test]
    fn changes_by_others_are_told() {
        let said = [place(1, false, 1), place(3, true, 1)];
        assert_eq!(fates(&dropped_by(4), &said, &[1]), [(1, Fate::Overwritten(3))]);
        assert_eq!(fates(&dropped_by(4), &said, &[1, 3]), [(1, Fate::Goes)]);
        // Other columns changed, the content did not.
        let said = [place(1, false, 1), place(3, false, 1)];
        assert_eq!(fates(&Interests::default(), &said, &[1]), [(1, Fate::Overwritten(3))]);
    }

    #[test]
    fn rows_found_unchanged_and_changed_then_are_awaited() {
        let by_row = vec![(rested_on(&Digest([7; 32]), &[1]), 2), (rested_on(&Digest([7; 32]), &[1]), 3)];
        let interests = Interests { by_content: HashMap::new(), by_row };
        let said = [place(1, false, 1), place(4, true, 1)];
        assert_eq!(fates(&interests, &said, &[1]), [(1, Fate::Awaited { by: 4, heir: 3 })]);
        // Not those who found one before it, or after it was changed.
        let said = [place(5, false, 1), place(6, true, 1)];
        assert_eq!(fates(&interests, &said, &[5]), [(5, Fate::Overwritten(6))]);
        let said = [place(1, false, 1), place(2, true, 1)];
        assert_eq!(fates(&interests, &said, &[1]), [(1, Fate::Overwritten(2))]);
    }

    #[test]
    fn rows_found_unchanged_before_they_were_taken_away_are_not_rested_on() {
        let by_row = vec![(rested_on(&Digest([7; 32]), &[1]), 6)];
        let interests = Interests { by_content: HashMap::new(), by_row };
        let said = [place(1, false, 1), place(8, true, 1), place(9, false, 1)];
        assert_eq!(fates(&interests, &said, &[9]), [(9, Fate::Goes)]);
    }

    #[test]
    fn rows_found_unchanged_are_rested_on() {
        let by_row = vec![(rested_on(&Digest([7; 32]), &[1]), 6)];
        let interests = Interests { by_content: HashMap::new(), by_row };
        let said = [place(1, false, 1), place(1, false, 2)];
        assert_eq!(fates(&interests, &said, &[1]), [(1, Fate::Rested(6)), (1, Fate::Goes)]);
        // Whoever had it before has it still when it was handed over under a later ordinal.
        let said = [place(9, false, 1)];
        assert_eq!(fates(&interests, &said, &[9]), [(9, Fate::Rested(6))]);
        // Nor is it rested on where what stood there before comes back.
        let said = [place(1, false, 1), place(9, false, 1)];
        assert_eq!(fates(&interests, &said, &[9]), [(9, Fate::Goes)]);
    }
}
