//! Rows that are kept for those who rest on them.
use std::collections::{HashMap, HashSet};

use pg_dedup_record::block::{Entry, Stamp};
use pg_dedup_record::digest::Digest;
use pgrx::prelude::*;

use super::awaited::{self, Awaited};
use super::dependents::{Fate, images_of_others, scale, walk};
use super::{Part, Rollback};
use crate::error::Result;
use crate::keyset::hash_of;
use crate::lookup::Place;
use crate::relation::{Access, Table};
use crate::segment::{self, SegmentWriter, next_number};
use crate::sql::{required, stored_digest};

/// Rows that were kept for others.
#[derive(Default)]
pub struct HandedOver {
    /// How many.
    pub rows: i64,
    /// The ordinals that they stand under now, with those they were written under.
    pub ordinals: HashMap<u64, u64>,
    /// [`subject`] of those that replaced a row.
    pub replaced: HashSet<u64>,
    /// [`subject`] of entries that go with their writer though their rows may come back.
    pub awaited: HashSet<u64>,
}

/// Whom a row is kept for, and who wrote it: rows of one such pair stand under one new ordinal.
type Heritage = (u64, u64);

/// Keeps the rows that records of others rest on: they get an entry of the other's chunk, under a new ordinal, and their before images, if they
/// have any, become its before images.
///
/// # Errors
/// XX001 for damaged state, 42501 without the privileges of a worker.
pub fn hand_over(rollback: &Rollback, part: &Part) -> Result<HandedOver> {
    let entries = scale(rollback, part)?;
    let mut handed_over = HandedOver::default();
    if entries == 0 {
        return Ok(handed_over);
    }
    let images = keys_with_images(rollback, part)?;
    let blocks = Table::open("segment_block", Access::Insert)?;
    let segments = Table::open("segment", Access::Insert)?;
    let mut writer = SegmentWriter::new(&blocks, part.target.id, 0)?;
    let mut ordinals: HashMap<Heritage, (u64, i64)> = HashMap::new();
    let mut moved: Vec<Moved> = Vec::new();
    let mut awaited: Vec<Awaited> = Vec::new();
    // Of one content: entries are written in order.
    let mut pending: Vec<(Digest, u64, Place)> = Vec::new();
    let mut flush = |pending: &mut Vec<(Digest, u64, Place)>| -> Result<()> {
        pending.sort_unstable_by(|a, b| (a.1, &a.2.key).cmp(&(b.1, &b.2.key)));
        for (digest, ordinal, place) in pending.drain(..) {
            let stamp = Stamp { ordinal, tombstone: false };
            writer.push(&Entry { digest, stamp, row_digest: place.row_digest, key: &place.key })?;
        }
        Ok(())
    };
    let kept = kept_images(rollback, part, entries, &images)?;
    walk(rollback, part, entries, &kept, |digest, place, fate| {
        let heir = match fate {
            Fate::Rested(heir) => heir,
            Fate::Awaited { by, heir } => {
                let key = place.key.clone();
                awaited.push(Awaited { writer: place.ordinal, by, heir, key, content: *digest });
                return Ok(());
            }
            Fate::Goes | Fate::Overwritten(_) => return Ok(()),
        };
        if pending.last().is_some_and(|(last, ..)| last != digest) {
            flush(&mut pending)?;
        }
        let ordinal = match ordinals.get_mut(&(heir, place.ordinal)) {
            Some((known, rows)) => {
                *rows += 1;
                *known
            }
            None => {
                let ordinal = inherited_ordinal(heir, place.ordinal, 0)?;
                ordinals.insert((heir, place.ordinal), (ordinal, 1));
                ordinal
            }
        };
        if images.contains(&subject(place.ordinal, &place.key)) {
            handed_over.replaced.insert(subject(ordinal, &place.key));
            moved.push(Moved { from: place.ordinal, to: ordinal, key: place.key.clone(), content: *digest });
        }
        handed_over.rows += 1;
        pending.push((*digest, ordinal, place.clone()));
        Ok(())
    })?;
    flush(&mut pending)?;
    writer.finish(&segments)?;
    for ((_, writer), (ordinal, rows)) in ordinals {
        Spi::run_with_args(
            "UPDATE dedup.ordinals SET heir_rows = $2 WHERE ordinal = $1",
            &[ordinal.cast_signed().into(), rows.into()],
        )?;
        handed_over.ordinals.insert(ordinal, writer);
    }
    for row in awaited::enter(awaited)? {
        if images.contains(&subject(row.writer, &row.key)) {
            moved.push(row.image());
        }
        handed_over.awaited.insert(subject(row.writer, &row.key));
    }
    let tombstones = move_images(&moved)?;
    segment::write_tombstones(part.target.id, tombstones)?;
    Ok(handed_over)
}

/// [`subject`] of the before images that don't come back: of rows that are kept, and of rows that others changed since. Another row with such a content may
/// have to be kept for want of it, which may have replaced a row, too.
fn kept_images(
    rollback: &Rollback,
    part: &Part,
    entries: usize,
    images: &HashSet<u64>,
) -> Result<HashSet<u64>> {
    if images.is_empty() {
        return Ok(HashSet::new());
    }
    let mut kept = images_of_others(rollback, part)?;
    loop {
        let mut more = HashSet::new();
        walk(rollback, part, entries, &kept, |_, place, fate| {
            let subject = subject(place.ordinal, &place.key);
            if matches!(fate, Fate::Rested(_)) && images.contains(&subject) {
                more.insert(subject);
            }
            Ok(())
        })?;
        if more.is_subset(&kept) {
            return Ok(kept);
        }
        kept.extend(more);
    }
}

/// What a before image is known by, within a rollback.
pub fn subject(ordinal: u64, key: &[u8]) -> u64 {
    hash_of(&[&ordinal.to_be_bytes(), key])
}

/// [`subject`] of each before image of what is taken back.
///
/// # Errors
/// SPI's own.
pub fn keys_with_images(rollback: &Rollback, part: &Part) -> Result<HashSet<u64>> {
    Spi::connect(|client| {
        let mut hashes = HashSet::new();
        let mut cursor = client.open_cursor(
            "SELECT ordinal, key FROM dedup.before_images WHERE run_id = $1 AND target_id = $2 AND ($3::pg_catalog.text IS NULL OR chunk_id = $3)",
            &[rollback.run.into(), part.target.id.into(), rollback.chunk.clone().into()],
        );
        loop {
            let rows = cursor.fetch(10_000)?;
            if rows.is_empty() {
                return Ok(hashes);
            }
            for row in rows {
                let ordinal: i64 = required(row["ordinal"].value()?)?;
                let key: Vec<u8> = required(row["key"].value()?)?;
                hashes.insert(subject(ordinal.cast_unsigned(), &key));
            }
        }
    })
}

/// An ordinal of the heir's chunk for so many rows that `writer` wrote; it remembers whose columns their row digests are about.
///
/// # Errors
/// SPI's own.
pub fn inherited_ordinal(heir: u64, writer: u64, rows: i64) -> Result<u64> {
    let ordinal = next_number("ordinal_seq")?;
    Spi::run_with_args(
        "INSERT INTO dedup.ordinals (ordinal, target_id, run_id, chunk_id, pass, heir_of, heir_table, heir_rows) \
         SELECT $1, h.target_id, h.run_id, h.chunk_id, 0, coalesce(w.heir_of, w.run_id), coalesce(w.heir_table, c.table_id), $4 \
         FROM dedup.ordinals AS h, dedup.ordinals AS w LEFT JOIN dedup.checkpoints AS c ON c.run_id = w.run_id AND c.chunk_id = w.chunk_id \
         WHERE h.ordinal = $2 AND w.ordinal = $3",
        &[ordinal.into(), heir.cast_signed().into(), writer.cast_signed().into(), rows.into()],
    )?;
    Ok(ordinal.cast_unsigned())
}

/// A row with a before image that is handed over.
pub struct Moved {
    /// The ordinal that it was written under.
    pub from: u64,
    /// The ordinal that it stands under now.
    pub to: u64,
    /// Its key.
    pub key: Vec<u8>,
    /// Its content.
    pub content: Digest,
}

/// Before images go with the rows they belong to; returns what these held before, and hold no more: (content, ordinal, key).
///
/// # Errors
/// SPI's own.
pub fn move_images(moved: &[Moved]) -> Result<Vec<(Digest, u64, Vec<u8>)>> {
    if moved.is_empty() {
        return Ok(Vec::new());
    }
    let from: Vec<i64> = moved.iter().map(|m| m.from.cast_signed()).collect();
    let keys: Vec<Vec<u8>> = moved.iter().map(|m| m.key.clone()).collect();
    let to: Vec<i64> = moved.iter().map(|m| m.to.cast_signed()).collect();
    let written: HashSet<(u64, &[u8], Digest)> =
        moved.iter().map(|m| (m.to, m.key.as_slice(), m.content)).collect();
    let held = Spi::connect_mut(|client| -> Result<Vec<(Digest, u64, Vec<u8>)>> {
        client
            .update(
                "UPDATE dedup.before_images AS b SET ordinal = o.ordinal, run_id = o.run_id, chunk_id = o.chunk_id \
                 FROM ROWS FROM (pg_catalog.unnest($1), pg_catalog.unnest($2), pg_catalog.unnest($3)) AS u(old, key, new) \
                     JOIN dedup.ordinals AS o ON o.ordinal = u.new \
                 WHERE b.ordinal = u.old AND b.key = u.key RETURNING b.content_hash, b.ordinal, b.key",
                None,
                &[from.into(), keys.into(), to.into()],
            )?
            .map(|row| {
                let ordinal: i64 = required(row["ordinal"].value()?)?;
                Ok((
                    stored_digest(row["content_hash"].value()?)?,
                    ordinal.cast_unsigned(),
                    required(row["key"].value()?)?,
                ))
            })
            .collect()
    })?;
    // A row whose other columns alone were changed holds that content still.
    Ok(held
        .into_iter()
        .filter(|(content, to, key)| !written.contains(&(*to, key.as_slice(), *content)))
        .collect())
}
