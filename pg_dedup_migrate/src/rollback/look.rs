//! Which rows of a finish are still what it wrote, and whose they are where they aren't.
use std::collections::{BTreeMap, HashMap, HashSet};

use pg_dedup_record::digest::Digest;
use pg_dedup_record::record::RecordDigests;
use pgrx::prelude::*;

use super::dependents::{of_runs, owners};
use super::undo::{Done, Plan, Step, Written, pending};
use crate::by_key::{Reading, rows_under};
use crate::chunk::required;
use crate::error::{Error, Result};
use crate::index::Target;
use crate::keyset::qualified_name;

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
    /// The key that its before image, if there is one, is kept under.
    pub image: Vec<u8>,
    /// The content that was written; `None`: its row was removed.
    pub written: Option<Digest>,
    /// What stands there now.
    pub stands: Option<RecordDigests>,
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
}

/// A row that stands under a key of the finish.
struct Row {
    digests: RecordDigests,
    key: Vec<u8>,
}

/// The next change of a row, by whomever, after the finish: its before image holds what the finish left.
struct Next {
    ordinal: u64,
    content: Digest,
}

/// Looks at every row, and locks it; `None`: a newer finish that touched one comes first.
///
/// # Errors
/// 55006 when another run changed a row and the rollback is not forced.
pub fn look<'a>(step: &Step, done: &'a Done) -> Result<Option<(Plan<'a>, Findings)>> {
    let keys: Vec<&[u8]> = done
        .written
        .iter()
        .map(|written| &written.key)
        .chain(&done.removed)
        .chain(&done.unknown)
        .map(Vec::as_slice)
        .collect();
    let mut found: Vec<Option<Row>> = keys.iter().map(|_| None).collect();
    let Target { table, layout, key_types, .. } = &step.target;
    rows_under(Reading::Locked, *table, layout, key_types, &keys, |n, row| {
        let mut key = Vec::new();
        row.write_key(&mut key)?;
        found[n] = Some(Row { digests: row.digests()?, key });
        Ok(())
    })?;
    let is_written = |n: usize| {
        let row = found[n].as_ref();
        done.written.get(n).is_some_and(|w| row.is_some_and(|r| r.digests.row.short() == w.row_digest))
    };
    // Where nobody else has changed rows of the target since, one that looks as it was written is it.
    let doubtful: Vec<usize> = (0..keys.len()).filter(|&n| step.overwritten || !is_written(n)).collect();
    let next = next_changes(step, &doubtful.iter().map(|&n| keys[n]).collect::<Vec<_>>())?;
    let standing: Vec<([u8; 32], Vec<u8>)> = doubtful
        .iter()
        .filter_map(|&n| found[n].as_ref())
        .map(|row| (row.digests.content.0, row.key.clone()))
        .collect();
    let owners = owners(step.target.id, &standing)?;
    let mut owner_of: HashMap<&[u8], u64> = HashMap::new();
    for ((_, key), owner) in standing.iter().zip(owners) {
        if let Some(owner) = owner {
            owner_of.insert(key, owner);
        }
    }
    let later: HashSet<u64> = next
        .values()
        .map(|next| next.ordinal)
        .chain(owner_of.values().copied())
        .filter(|&ordinal| ordinal > step.ordinal)
        .collect();
    if !pending(step, &later)?.is_empty() {
        return Ok(None);
    }
    let others = of_runs(&later)?;

    let mut plan = Plan::default();
    let mut findings = Findings::default();
    let doubtful: HashSet<usize> = doubtful.into_iter().collect();
    for (n, &key) in keys.iter().enumerate() {
        let row = found[n].as_ref();
        let next = next.get(key).filter(|_| doubtful.contains(&n));
        let owner = row.and_then(|row| owner_of.get(row.key.as_slice())).copied();
        let Some(written) = done.written.get(n) else {
            // The finish removed a row, or replaced one by what the index does not know.
            let removed = n < done.written.len() + done.removed.len();
            let alone = |reason| Alone {
                key: key.to_vec(),
                image: key.to_vec(),
                written: None,
                stands: row.map(|row| row.digests),
                reason,
            };
            match (row, owner.filter(|owner| others.contains(owner))) {
                (Some(_), Some(owner)) if next.is_none() => {
                    refuse_theirs(step)?;
                    findings.tombstones.push(give_image(step, key, owner)?);
                }
                (None, _) if removed || step.forced => plan.insert.push(key),
                (Some(_), _) if step.forced => plan.update.push(key),
                (Some(_), _) if removed => findings.alone.push(alone(Reason::Occupied)),
                (Some(_), _) => findings.alone.push(alone(Reason::Changed)),
                (None, _) => findings.alone.push(alone(Reason::Gone)),
            }
            continue;
        };
        if let Some(next) =
            next.filter(|next| others.contains(&next.ordinal) && next.content == written.content)
        {
            refuse_theirs(step)?;
            findings.tombstones.extend(pass_on(step, written, next.ordinal)?);
            continue;
        }
        let alone = |reason| Alone {
            key: key.to_vec(),
            image: written.replaced.clone().unwrap_or_default(),
            written: Some(written.content),
            stands: row.map(|row| row.digests),
            reason,
        };
        match (row, &written.replaced) {
            (Some(_), Some(image)) if is_written(n) || step.forced => plan.update.push(image),
            (Some(_), None) if is_written(n) || step.forced => plan.delete.push((key, None)),
            (None, Some(image)) if step.forced => plan.insert.push(image),
            (Some(_), _) => findings.alone.push(alone(Reason::Changed)),
            (None, _) => findings.alone.push(alone(Reason::Gone)),
        }
    }
    Ok(Some((plan, findings)))
}

/// What another run changed is its own, unless the rollback is forced.
fn refuse_theirs(step: &Step) -> Result<()> {
    if step.forced {
        return Ok(());
    }
    Err(Error::new(
        PgSqlErrorCode::ERRCODE_OBJECT_IN_USE,
        format!("another run changed rows of {}", qualified_name(step.target.table)),
    )
    .hint("Roll that run back first, or force it."))
}

/// The next change of each of these rows after the finish.
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
                 WHERE b.target_id = $1 AND b.ordinal OPERATOR(pg_catalog.>) $2 ORDER BY b.key, b.ordinal",
                None,
                &[step.target.id.into(), step.ordinal.cast_signed().into(), keys.into()],
            )?
            .map(|row| {
                let ordinal: i64 = required(row["ordinal"].value()?)?;
                let next = Next {
                    ordinal: ordinal.cast_unsigned(),
                    content: content_hash(row["content_hash"].value()?)?,
                };
                Ok((required(row["key"].value()?)?, next))
            })
            .collect()
    })
}

fn content_hash(bytes: Option<Vec<u8>>) -> Result<Digest> {
    Digest::from_slice(&required(bytes)?)
        .ok_or_else(|| Error::corrupted("a before image's content hash is not 32 bytes"))
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
    let before = Spi::get_one_with_args::<Vec<u8>>(
        "UPDATE dedup.before_images AS n SET key = b.key, image = b.image, content_hash = b.content_hash, full_row = b.full_row \
         FROM dedup.before_images AS b WHERE n.ordinal = $1 AND n.key = $2 AND b.ordinal = $3 AND b.key = $4 RETURNING n.content_hash",
        &[next_ordinal.into(), key.into(), step.ordinal.cast_signed().into(), image.clone().into()],
    )?;
    Ok(Some((content_hash(before)?, next, image.clone())))
}

/// Another run wrote a row where the finish had removed one: it replaced what stood there before. Returns what it took away then.
fn give_image(step: &Step, key: &[u8], owner: u64) -> Result<(Digest, u64, Vec<u8>)> {
    let before = Spi::get_one_with_args::<Vec<u8>>(
        "INSERT INTO dedup.before_images (ordinal, target_id, run_id, chunk_id, action, key, content_hash, image, full_row) \
         SELECT o.ordinal, b.target_id, o.run_id, o.chunk_id, 'update', b.key, b.content_hash, b.image, b.full_row \
         FROM dedup.before_images AS b, dedup.ordinals AS o WHERE b.ordinal = $1 AND b.key = $2 AND o.ordinal = $3 RETURNING content_hash",
        &[step.ordinal.cast_signed().into(), key.to_vec().into(), owner.cast_signed().into()],
    )?;
    Ok((content_hash(before)?, owner, key.to_vec()))
}
