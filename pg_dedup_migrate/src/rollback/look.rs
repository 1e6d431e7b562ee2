//! Which rows of a finish are still what it wrote, and whose they are where they aren't.
use std::collections::{BTreeMap, HashMap, HashSet};
use std::ops::ControlFlow;

use pg_dedup_record::digest::Digest;
use pg_dedup_record::record::RecordDigests;
use pgrx::prelude::*;

use super::dependents::{others, staying};
use super::step::{Done, Image, Plan, Step, Written, pending};
use crate::by_key::{Reading, rows_under};
use crate::error::Result;
use crate::index::Target;
use crate::lookup;
use crate::relation::Snapshot;
use crate::sql::{required, stored_digest};

/// Why a row is left alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// It is not what was written.
    Changed,
    /// There is no row.
    Gone,
    /// A row stands where one was removed.
    Occupied,
}

impl Reason {
    /// Its name in SQL.
    pub fn name(self) -> &'static str {
        match self {
            Reason::Changed => "changed",
            Reason::Gone => "gone",
            Reason::Occupied => "occupied",
        }
    }
}

/// A row that is left alone.
pub struct Alone {
    /// Its key; empty in a table without one.
    pub key: Vec<u8>,
    /// What stood there before: its image is kept.
    pub image: Option<Image>,
    /// The content that was written; `None`: its row was removed.
    pub written: Option<Digest>,
    /// The row that stands there now, with its own key, if it is nobody's.
    pub stands: Option<(RecordDigests, Vec<u8>)>,
    /// The content that stands there now, whosever it is.
    pub content: Option<Digest>,
    /// Why.
    pub reason: Reason,
}

/// What was found out about rows that are not what was written.
#[derive(Default)]
pub struct Findings {
    /// Rows that are left alone.
    pub alone: Vec<Alone>,
    /// Contents that others took away from a row, as they would have without what is taken back.
    pub tombstones: Vec<(Digest, u64, Vec<u8>)>,
    /// Contents of rows of nobody's that are overwritten.
    pub buried: Vec<(Digest, Vec<u8>)>,
}

/// A row that stands under a key of the finish.
struct Row {
    digests: RecordDigests,
    key: Vec<u8>,
    /// The ordinal that the index has it under.
    owner: Option<u64>,
}

/// The next change of a row, by whomever, after the finish: its before image holds what the finish left.
struct Next {
    ordinal: u64,
    content: Digest,
}

/// Looks at every row, and locks it; `None`: a newer finish that touched one comes first.
///
/// # Errors
/// XX001 for damaged state.
pub fn look<'a>(step: &Step, done: &'a Done) -> Result<Option<(Plan<'a>, Findings)>> {
    let images = done.removed.iter().chain(&done.unknown).map(|image| image.key.as_slice());
    let keys: Vec<&[u8]> = done.written.iter().map(|w| w.key.as_slice()).chain(images).collect();
    let mut found: Vec<Option<Row>> = keys.iter().map(|_| None).collect();
    let Target { table, layout, key_types, .. } = &step.target;
    rows_under(Reading::Locked, *table, layout, key_types, &keys, |n, row| {
        let mut key = Vec::new();
        row.write_key(&mut key)?;
        found[n] = Some(Row { digests: row.digests()?, key, owner: None });
        Ok(())
    })?;
    // Where nobody has changed rows of the target since, one that looks as it was written is it.
    let doubtful: Vec<usize> =
        (0..keys.len()).filter(|&n| step.overwritten || !is_written(done, n, found[n].as_ref())).collect();
    name_owners(step, &doubtful, &mut found)?;
    let next = next_changes(step, &doubtful.iter().map(|&n| keys[n]).collect::<Vec<_>>())?;
    let owners = doubtful.iter().filter_map(|&n| found[n].as_ref()?.owner);
    let known: HashSet<u64> = next.values().map(|next| next.ordinal).chain(owners).collect();
    let later = known.iter().copied().filter(|&ordinal| ordinal > step.ordinal).collect();
    if !pending(step, &later)?.is_empty() {
        return Ok(None);
    }
    let others = others(step.run, step.only_chunk.as_deref(), &known)?;
    let rewritten = if step.overwritten { rewritten(step, done)? } else { HashSet::new() };
    let removed_again = if step.overwritten { removed_again(step, done)? } else { HashMap::new() };
    let mut judge =
        Judge { step, others, removed_again, plan: Plan::default(), findings: Findings::default() };
    for (n, key) in keys.iter().enumerate() {
        let row = found[n].as_ref();
        let next = next.get(*key);
        let gone = n.checked_sub(done.written.len());
        match gone.map(|n| done.removed.get(n).ok_or_else(|| &done.unknown[n - done.removed.len()])) {
            None if rewritten.contains(&n) => {}
            None => judge.written(&done.written[n], row, next, is_written(done, n, row))?,
            Some(Ok(image)) => judge.removed(image, row, next, true)?,
            Some(Err(image)) => judge.removed(image, row, next, false)?,
        }
    }
    Ok(Some((judge.plan, judge.findings)))
}

/// A content under a key.
type Place = (Digest, Vec<u8>);

/// Of the rows written those that stood there before, by what stays of the index: somebody took them away or changed them, and the finish, of a repair,
/// wrote them again. They are whose they were, unless what they replaced is a row of a finish that stays.
fn rewritten(step: &Step, done: &Done) -> Result<HashSet<usize>> {
    let chunk = step.only_chunk.as_deref();
    let place = |image: &Image| (image.content, image.key.clone());
    let replaced = done.written.iter().filter_map(|written| written.replaced.as_ref()).map(place).collect();
    let theirs =
        standing(step, &replaced, |o| o != step.ordinal, |ordinals| others(step.run, chunk, ordinals))?;
    let is_again = |written: &Written| {
        let replaced = written.replaced.as_ref();
        replaced.is_none_or(|image| image.content != written.content && !theirs.contains(&place(image)))
    };
    let place = |written: &Written| (written.content, written.key.clone());
    let again = done.written.iter().filter(|written| is_again(written)).map(place).collect();
    let stood = standing(step, &again, |o| o < step.ordinal, |ordinals| staying(step.run, chunk, ordinals))?;
    let is_rewritten = |written: &Written| is_again(written) && stood.contains(&place(written));
    Ok((0..done.written.len()).filter(|&n| is_rewritten(&done.written[n])).collect())
}

/// Those of these places where the content stands, by the last that the index has from finishes which `count` and are among those that `stay`.
fn standing(
    step: &Step,
    places: &HashSet<Place>,
    count: impl Fn(u64) -> bool,
    stay: impl FnOnce(&HashSet<u64>) -> Result<HashSet<u64>>,
) -> Result<HashSet<Place>> {
    let (digests, wanted) = lookup::distinct(places.iter().map(|(content, _)| *content));
    // Of each place all that is said: ordinals, and whether it stands.
    let mut said: HashMap<Place, Vec<(u64, bool)>> = HashMap::new();
    lookup::for_each_hit(step.target.id, &digests, &wanted, 0, &Snapshot::latest(), |_, entry| {
        let place = (entry.digest, entry.key.to_vec());
        if count(entry.stamp.ordinal) && places.contains(&place) {
            said.entry(place).or_default().push((entry.stamp.ordinal, !entry.stamp.tombstone));
        }
        Ok(ControlFlow::Continue(()))
    })?;
    let stay = stay(&said.values().flatten().map(|(ordinal, _)| *ordinal).collect())?;
    said.retain(|_, said| {
        said.iter().filter(|(ordinal, _)| stay.contains(ordinal)).max().is_some_and(|(_, stands)| *stands)
    });
    Ok(said.into_keys().collect())
}

/// Of the rows removed those that another run, which stays, removed again since, and by which finish first.
fn removed_again<'s>(step: &Step, done: &'s Done) -> Result<HashMap<(Digest, &'s [u8]), u64>> {
    let asked: HashMap<(Digest, &[u8]), &'s [u8]> =
        done.removed.iter().map(|i| ((i.content, i.key.as_slice()), i.key.as_slice())).collect();
    let (digests, wanted) = lookup::distinct(done.removed.iter().map(|image| image.content));
    let mut said: Vec<(u64, (Digest, &'s [u8]))> = Vec::new();
    lookup::for_each_hit(
        step.target.id,
        &digests,
        &wanted,
        step.ordinal.cast_signed(),
        &Snapshot::latest(),
        |_, entry| {
            if entry.stamp.tombstone
                && entry.stamp.ordinal > step.ordinal
                && let Some(&key) = asked.get(&(entry.digest, entry.key))
            {
                said.push((entry.stamp.ordinal, (entry.digest, key)));
            }
            Ok(ControlFlow::Continue(()))
        },
    )?;
    let others =
        others(step.run, step.only_chunk.as_deref(), &said.iter().map(|(ordinal, _)| *ordinal).collect())?;
    said.retain(|(ordinal, _)| others.contains(ordinal));
    // The earliest of a place is entered last.
    said.sort_unstable_by_key(|(ordinal, _)| std::cmp::Reverse(*ordinal));
    Ok(said.into_iter().map(|(ordinal, place)| (place, ordinal)).collect())
}

/// Whether a row looks as the finish wrote it.
fn is_written(done: &Done, n: usize, row: Option<&Row>) -> bool {
    done.written.get(n).zip(row).is_some_and(|(written, row)| row.digests.row.short() == written.row_digest)
}

/// Decides row by row.
struct Judge<'a, 's> {
    step: &'s Step,
    /// Finishes of other runs that stand.
    others: HashSet<u64>,
    /// Rows that another run removed again after the finish, and by which finish.
    removed_again: HashMap<(Digest, &'s [u8]), u64>,
    plan: Plan<'a>,
    findings: Findings,
}

impl<'a> Judge<'a, '_> {
    /// Is the row another run's by now?
    fn is_theirs(&self, row: Option<&Row>) -> bool {
        row.and_then(|row| row.owner).is_some_and(|owner| self.others.contains(&owner))
    }

    fn written(
        &mut self,
        written: &'a Written,
        row: Option<&Row>,
        next: Option<&Next>,
        is_written: bool,
    ) -> Result<()> {
        let changed_by = next.filter(|n| self.others.contains(&n.ordinal) && n.content == written.content);
        if let (Some(next), true) = (changed_by, self.step.forced) {
            self.findings.tombstones.extend(pass_on(self.step, written, next.ordinal)?);
            return Ok(());
        }
        let theirs = changed_by.is_some() || self.is_theirs(row);
        let image = written.replaced.as_ref();
        match row {
            Some(row) if !theirs && (is_written || self.step.forced) => {
                self.overwrite(row, image.map(|image| image.content));
                match image {
                    Some(image) => self.plan.update.push(&image.key),
                    None => self.plan.delete.push((&written.key, None)),
                }
            }
            None if self.step.forced && image.is_some() && !theirs => {
                self.plan.insert.extend(image.map(|image| image.key.as_slice()));
            }
            _ => {
                let reason = if row.is_some() { Reason::Changed } else { Reason::Gone };
                self.leave(&written.key, image, Some(written.content), row, theirs, reason);
            }
        }
        Ok(())
    }

    /// A row that the finish removed, or replaced by what the index does not know.
    fn removed(
        &mut self,
        image: &'a Image,
        row: Option<&Row>,
        next: Option<&Next>,
        removed: bool,
    ) -> Result<()> {
        let theirs = self.is_theirs(row);
        match row {
            // Somebody wrote a row there, which somebody removed again: that one replaced what stood there before.
            None if next.is_some_and(|next| self.others.contains(&next.ordinal)) => {
                let next_ordinal = next.map_or(0, |next| next.ordinal);
                let first = first_after(self.step, &image.key, next, next_ordinal)?;
                if self.step.forced && first != next_ordinal && !has_image(&image.key, first)? {
                    self.findings.tombstones.push(give_image(self.step, &image.key, first, "update")?);
                } else {
                    self.leave(&image.key, Some(image), None, row, theirs, Reason::Gone);
                }
            }
            // Whoever wrote it anew is gone, and who removed that one removes this one.
            None if let Some(&by) = self.removed_again.get(&(image.content, image.key.as_slice()))
                && !has_image(&image.key, by)? =>
            {
                give_image(self.step, &image.key, by, "delete")?;
            }
            None if removed || self.step.forced => self.plan.insert.push(&image.key),
            // Somebody wrote it again, and nobody else has it.
            Some(row) if removed && !theirs && row.digests.content == image.content => {
                self.plan.update.push(&image.key);
            }
            Some(row) if theirs && self.step.forced => {
                let first = first_after(self.step, &image.key, next, row.owner.unwrap_or_default())?;
                if has_image(&image.key, first)? {
                    self.leave(&image.key, Some(image), None, Some(row), theirs, Reason::Occupied);
                } else {
                    self.findings.tombstones.push(give_image(self.step, &image.key, first, "update")?);
                }
            }
            Some(row) if self.step.forced => {
                self.overwrite(row, Some(image.content));
                self.plan.update.push(&image.key);
            }
            _ => {
                let reason = match row {
                    None => Reason::Gone,
                    Some(_) if removed => Reason::Occupied,
                    Some(_) => Reason::Changed,
                };
                self.leave(&image.key, Some(image), None, row, theirs, reason);
            }
        }
        Ok(())
    }

    /// What the index says of a row that somebody put there is true no longer.
    fn overwrite(&mut self, row: &Row, becomes: Option<Digest>) {
        // What the run itself wrote goes with its own entries.
        if row.owner.is_some_and(|owner| owner > self.step.ordinal) && becomes != Some(row.digests.content) {
            self.findings.buried.push((row.digests.content, row.key.clone()));
        }
    }

    fn leave(
        &mut self,
        key: &[u8],
        image: Option<&Image>,
        written: Option<Digest>,
        row: Option<&Row>,
        theirs: bool,
        reason: Reason,
    ) {
        // What is another run's has its entry.
        let stands = row.filter(|_| !theirs).map(|row| (row.digests, row.key.clone()));
        let content = row.map(|row| row.digests.content);
        self.findings.alone.push(Alone {
            key: key.to_vec(),
            image: image.cloned(),
            written,
            stands,
            content,
            reason,
        });
    }
}

/// Looks up under which ordinals the index has these rows.
fn name_owners(step: &Step, doubtful: &[usize], found: &mut [Option<Row>]) -> Result<()> {
    let standing: Vec<usize> = doubtful.iter().copied().filter(|&n| found[n].is_some()).collect();
    let rows: Vec<(Digest, Vec<u8>)> = standing
        .iter()
        .filter_map(|&n| found[n].as_ref())
        .map(|row| (row.digests.content, row.key.clone()))
        .collect();
    for (n, place) in standing.into_iter().zip(lookup::owners(step.target.id, &rows)?) {
        if let Some(row) = &mut found[n] {
            row.owner = place.map(|place| place.ordinal);
        }
    }
    Ok(())
}

/// The next change of each of these rows after the finish, but for changes that were taken back before.
fn next_changes(step: &Step, keys: &[&[u8]]) -> Result<BTreeMap<Vec<u8>, Next>> {
    if keys.is_empty() {
        return Ok(BTreeMap::new());
    }
    let keys: Vec<Vec<u8>> = keys.iter().map(|key| key.to_vec()).collect();
    Spi::connect(|client| {
        client
            .select(
                "SELECT DISTINCT ON (b.key) b.key, b.ordinal, b.content_hash \
                 FROM dedup.before_images AS b JOIN pg_catalog.unnest($3) AS k(key) USING (key) \
                 WHERE b.target_id = $1 AND b.ordinal OPERATOR(pg_catalog.>) $2 \
                     AND NOT EXISTS (SELECT FROM dedup.rollback_steps AS s WHERE s.ordinal = b.ordinal AND s.undone_at IS NOT NULL) \
                 ORDER BY b.key, b.ordinal",
                None,
                &[step.target.id.into(), step.ordinal.cast_signed().into(), keys.into()],
            )?
            .map(|row| {
                let ordinal: i64 = required(row["ordinal"].value()?)?;
                let content = stored_digest(row["content_hash"].value()?)?;
                Ok((required(row["key"].value()?)?, Next { ordinal: ordinal.cast_unsigned(), content }))
            })
            .collect()
    })
}

/// Another run changed the row afterwards: what it found there is what stood there before the finish. Returns what it took away then.
fn pass_on(step: &Step, written: &Written, next: u64) -> Result<Option<(Digest, u64, Vec<u8>)>> {
    let (key, next_ordinal) = (written.key.clone(), next.cast_signed());
    let Some(image) = &written.replaced else {
        Spi::run_with_args(
            "DELETE FROM dedup.before_images WHERE ordinal = $1 AND key = $2",
            &[next_ordinal.into(), key.into()],
        )?;
        return Ok(None);
    };
    Spi::run_with_args(
        "UPDATE dedup.before_images AS n \
         SET key = b.key, image = b.image, content_hash = b.content_hash, other_columns = coalesce(b.other_columns, n.other_columns), \
             layout_ordinal = coalesce(b.layout_ordinal, b.ordinal), heir = b.heir \
         FROM dedup.before_images AS b WHERE n.ordinal = $1 AND n.key = $2 AND b.ordinal = $3 AND b.key = $4",
        &[next_ordinal.into(), key.into(), step.ordinal.cast_signed().into(), image.key.clone().into()],
    )?;
    Ok(Some((image.content, next, image.key.clone())))
}

/// The first finish that wrote a row in the place of one that was removed; `last` wrote the one that stands there.
fn first_after(step: &Step, key: &[u8], next: Option<&Next>, last: u64) -> Result<u64> {
    let Some(next) = next else { return Ok(last) };
    // Whoever wrote it is gone, and this one stands for it.
    if let Some(heir) = heir_of(key, next.ordinal)? {
        return Ok(heir);
    }
    // The next change found what the first one had written.
    let mut first = next.ordinal;
    let digest = [next.content.0];
    lookup::for_each_hit(step.target.id, &digest, &[0], 0, &Snapshot::latest(), |_, entry| {
        if !entry.stamp.tombstone && entry.key == key && entry.stamp.ordinal > step.ordinal {
            first = first.min(entry.stamp.ordinal);
        }
        Ok(ControlFlow::Continue(()))
    })?;
    Ok(first)
}

/// Whose a row is that a finish changed, if it comes back and its writer does not.
fn heir_of(key: &[u8], ordinal: u64) -> Result<Option<u64>> {
    let heir = Spi::get_one_with_args::<i64>(
        "SELECT pg_catalog.max(heir) FROM dedup.before_images WHERE ordinal = $1 AND key = $2",
        &[ordinal.cast_signed().into(), key.to_vec().into()],
    )?;
    Ok(heir.map(i64::cast_unsigned))
}

/// Did a finish replace or remove a row under this key? Then it did not find the place empty.
fn has_image(key: &[u8], ordinal: u64) -> Result<bool> {
    required(Spi::get_one_with_args(
        "SELECT EXISTS (SELECT FROM dedup.before_images WHERE ordinal = $1 AND key = $2)",
        &[ordinal.cast_signed().into(), key.to_vec().into()],
    )?)
}

/// Another run wrote a row where the finish had removed one, or removed one that was written anew: it replaced, or removed, what stood there before. Returns
/// what it took away then.
fn give_image(step: &Step, key: &[u8], owner: u64, action: &str) -> Result<(Digest, u64, Vec<u8>)> {
    let before = Spi::get_one_with_args::<Vec<u8>>(
        "INSERT INTO dedup.before_images (ordinal, target_id, run_id, chunk_id, action, key, content_hash, image, other_columns, layout_ordinal, heir) \
         SELECT o.ordinal, b.target_id, o.run_id, o.chunk_id, $4, b.key, b.content_hash, b.image, b.other_columns, coalesce(b.layout_ordinal, b.ordinal), b.heir \
         FROM dedup.before_images AS b, dedup.ordinals AS o WHERE b.ordinal = $1 AND b.key = $2 AND o.ordinal = $3 RETURNING content_hash",
        &[step.ordinal.cast_signed().into(), key.to_vec().into(), owner.cast_signed().into(), action.into()],
    )?;
    Ok((stored_digest(before)?, owner, key.to_vec()))
}
