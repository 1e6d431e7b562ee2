//! Matching: what stands in the target under the keys of a chunk's records.
//!
//! `match_keys` locks those rows, hashes them and says of each record what its key's row is. Whether a record is *unchanged* is decided
//! from the locked row, never from the index. Within a pass the first record of a key wins.
use std::collections::{HashMap, HashSet};
use std::rc::Rc;

use pg_dedup_record::checksum::Checksum;
use pg_dedup_record::digest::Digest;
use pg_dedup_record::{key, wire};
use pgrx::Uuid;
use pgrx::pg_sys::panic::ErrorReport;
use pgrx::prelude::*;

use crate::chunk::{self, OpenChunk};
use crate::error::{Error, Result};
use crate::hash::rows;
use crate::keyset::column_list;
use crate::lookup;
use crate::pace;
use crate::planning::ByIndex;
use crate::relation::Snapshot;
use crate::repair;
use crate::sql::required;

/// What stands in the target under a record's key. The numbers are what `dedup.match_keys` answers, one byte a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Match {
    /// No row.
    Absent = 0,
    /// A row equal in every column.
    Unchanged = 1,
    /// Another row, to be replaced.
    Changed = 2,
    /// Another row, written by this very pass: the second record with the key does not overwrite it.
    Collision = 3,
    /// An equal row, written by another chunk of this very pass: the record was delivered twice.
    Redelivered = 4,
    /// An equal row that this very chunk inserted when it finished before (it is done again for what was left over then).
    Inserted = 5,
    /// An equal row that this very chunk updated when it finished before.
    Updated = 6,
}

/// What an earlier finish of the same chunk wrote and `match_keys` found equal: it counts in the books, but is not written again.
#[derive(Clone, Copy, Debug, Default)]
pub struct Standing {
    /// Rows.
    pub count: i64,
    /// Sum of their row digests.
    pub checksum: Checksum,
}

/// `dedup.match_keys`: what stands under each of the packed keys; locks the rows it finds.
///
/// # Errors
/// 22023 for malformed arguments, 55000 without an open chunk, 55P03 after lock_timeout.
#[pg_extern(volatile, parallel_unsafe)]
fn match_keys(run: Uuid, chunk_id: &str, keys: &[u8], row_digests: &[u8]) -> Result<Vec<u8>, ErrorReport> {
    let _pace = pace::of_run(run)?;
    let matches = chunk::with_open(run, chunk_id, |chunk| {
        if chunk.claimed {
            return Err(Error::state("match_keys comes before claim").hint("see the worker protocol"));
        }
        let keys = unpack_keys(keys)?;
        let (digests, rest) = row_digests.as_chunks::<32>();
        if digests.len() != keys.len() || !rest.is_empty() {
            return Err(Error::invalid("there must be one row digest of 32 bytes a key"));
        }
        match_rows(chunk, &keys, digests)
    })?;
    Ok(matches.into_iter().map(|m| m as u8).collect())
}

/// The keys of a packed list.
///
/// # Errors
/// 22023 when it is malformed.
pub fn unpack_keys(bytes: &[u8]) -> Result<Vec<&[u8]>> {
    wire::keys(bytes)
        .collect::<std::result::Result<_, _>>()
        .map_err(|e| Error::invalid(format!("malformed keys: {e}")))
}

/// The work of [`match_keys`]; remembers in the chunk what its records are about to replace.
///
/// # Errors
/// As there.
pub fn match_rows(chunk: &mut OpenChunk, keys: &[&[u8]], row_digests: &[[u8; 32]]) -> Result<Vec<Match>> {
    let _plan = ByIndex::new();
    let mut matches = vec![Match::Absent; keys.len()];
    let query = format!(
        "SELECT {}, k.n FROM {} JOIN {} AS t ON {} ORDER BY k.n FOR NO KEY UPDATE OF t",
        column_list(&chunk.layout, "t"),
        chunk.key_types.unnest(),
        chunk.target_name(),
        chunk.key_types.join_condition()
    );
    // (content digest, position) of each row found.
    let mut found: Vec<([u8; 32], u32)> = Vec::new();
    // Keys as they are stored, where these are not the bytes sent: 1.0 and 1.00 are one key. Entries carry the stored ones.
    let mut stored: HashMap<u32, Vec<u8>> = HashMap::new();
    let mut key = Vec::new();
    rows::scan(&query, &chunk.key_types.arrays(keys)?, &chunk.layout, 1, |row| {
        let n = required(row.trailing::<i64>(0)?)? as usize - 1;
        let digests = row.digests()?;
        matches[n] =
            if digests.row.as_bytes() == &row_digests[n] { Match::Unchanged } else { Match::Changed };
        found.push((*digests.content.as_bytes(), n as u32));
        key.clear();
        if row.write_key(&mut key)? && key != keys[n] {
            stored.insert(n as u32, key.clone());
        }
        Ok(())
    })?;
    found.sort_unstable();
    let key_of = |n: u32| stored.get(&n).map_or(keys[n as usize], Vec::as_slice);

    if chunk.repair.is_some() {
        chunk.own_rows = Rc::new(found.iter().map(|&(_, n)| key_of(n).to_vec()).collect());
        let foreign = repair::not_ours(chunk, &found, &matches, &key_of)?;
        found.retain(|(_, n)| !foreign.contains(n));
        for n in foreign {
            matches[n as usize] = Match::Absent;
        }
    }
    let updated_before = updated_before(chunk)?;
    let twins = repair::twins(chunk, &found, &matches, &key_of)?;
    let mut written = written_by_this_pass(chunk, &found, &key_of)?;
    written.retain(|(n, _)| !twins.contains(n));
    for &n in &twins {
        matches[n as usize] = Match::Changed;
    }
    let repeated = if written.is_empty() { Vec::new() } else { repeated(keys) };
    for (n, by_this_chunk) in written {
        let m = &mut matches[n as usize];
        *m = match (*m, by_this_chunk) {
            (Match::Unchanged, false) => Match::Redelivered,
            (Match::Unchanged, true) => {
                // What a record becomes is decided by the first with its key: the others are duplicates or collisions.
                if !repeated[n as usize] {
                    chunk.standing.count += 1;
                    chunk.standing.checksum.add(&Digest(row_digests[n as usize]));
                }
                if updated_before.contains(keys[n as usize]) { Match::Updated } else { Match::Inserted }
            }
            // The very record changed in the source since: it may replace itself.
            (_, true) => Match::Changed,
            (_, false) => Match::Collision,
        };
    }
    if !stored.is_empty() {
        part_spellings(keys, &found, &key_of, &mut matches);
    }
    if chunk.shares_target {
        remember_unchanged(chunk, &found, &key_of, &mut matches)?;
    }
    let mut unchanged: Vec<[u8; 16]> = found
        .iter()
        .filter(|&&(_, n)| matches[n as usize] == Match::Unchanged)
        .map(|&(content, n)| rested_on(&Digest(content), key_of(n)))
        .collect();
    unchanged.sort_unstable();
    chunk.unchanged = unchanged.into();
    let mut leaving: Vec<_> = found
        .into_iter()
        .filter(|&(_, n)| matches[n as usize] == Match::Changed)
        .map(|(digest, n)| (digest, key_of(n).to_vec()))
        .collect();
    leaving.sort_unstable();
    leaving.dedup();
    chunk.leaving = leaving.into();
    chunk.respelled =
        Rc::new(stored.into_iter().map(|(n, stored)| (keys[n as usize].to_vec(), stored)).collect());
    Ok(matches)
}

/// Of each key, whether it was asked for before in the same list.
fn repeated(keys: &[&[u8]]) -> Vec<bool> {
    let mut seen = HashSet::with_capacity(keys.len());
    keys.iter().map(|key| !seen.insert(*key)).collect()
}

/// How a row found unchanged is remembered: the beginnings of its content digest and of a digest of its packed key.
pub fn rested_on(content: &Digest, key: &[u8]) -> [u8; 16] {
    let mut both = [0; 16];
    both[..8].copy_from_slice(&content.short());
    both[8..].copy_from_slice(&key::digest(key).short());
    both
}

/// One row under two keys that differ in their bytes ('a' and 'A' under a collation that ignores case): the first record has it. Keys of the
/// same bytes are told apart by whoever asks.
fn part_spellings<'k>(
    keys: &[&[u8]],
    found: &[([u8; 32], u32)],
    key_of: &dyn Fn(u32) -> &'k [u8],
    matches: &mut [Match],
) {
    let mut positions: Vec<u32> = found.iter().map(|(_, n)| *n).collect();
    positions.sort_unstable();
    let mut holder: HashMap<&[u8], u32> = HashMap::with_capacity(positions.len());
    for n in positions {
        let first = *holder.entry(key_of(n)).or_insert(n);
        if keys[first as usize] != keys[n as usize] {
            matches[n as usize] = match matches[n as usize] {
                Match::Unchanged => Match::Redelivered,
                _ => Match::Collision,
            };
        }
    }
}

/// Rows found unchanged have no entry of this pass that would tell a later record of another source that their key is taken: such keys are
/// remembered for the run. Rows that other chunks found unchanged in this pass are taken.
fn remember_unchanged<'k>(
    chunk: &OpenChunk,
    found: &[([u8; 32], u32)],
    key_of: &dyn Fn(u32) -> &'k [u8],
    matches: &mut [Match],
) -> Result<()> {
    let open: Vec<u32> = found
        .iter()
        .map(|(_, n)| *n)
        .filter(|n| matches!(matches[*n as usize], Match::Unchanged | Match::Changed))
        .collect();
    let taken: HashSet<Vec<u8>> = Spi::connect(|client| -> Result<_> {
        client
            .select(
                "SELECT p.key FROM dedup.pass_keys AS p JOIN pg_catalog.unnest($5) AS k(key) USING (key) \
                 WHERE p.run_id = $1 AND p.target_id = $2 AND p.pass = $3 AND p.chunk_id <> $4",
                None,
                &[
                    chunk.run.into(),
                    chunk.target_id.into(),
                    chunk.pass.into(),
                    chunk.chunk_id.as_str().into(),
                    open.iter().map(|n| key_of(*n).to_vec()).collect::<Vec<_>>().into(),
                ],
            )?
            .map(|row| required(row["key"].value()?))
            .collect()
    })?;
    let rested = repair::rows_of_other_chunks(chunk)?;
    let content_of: HashMap<u32, Digest> =
        if rested.is_empty() { HashMap::new() } else { found.iter().map(|&(d, n)| (n, Digest(d))).collect() };
    let is_rested = |n: u32| content_of.get(&n).is_some_and(|d| rested.contains(&rested_on(d, key_of(n))));
    let mut unchanged: Vec<Vec<u8>> = Vec::new();
    for n in open {
        let m = &mut matches[n as usize];
        match (*m, taken.contains(key_of(n)) || is_rested(n)) {
            (Match::Unchanged, true) => *m = Match::Redelivered,
            (Match::Unchanged, false) => unchanged.push(key_of(n).to_vec()),
            (_, true) => *m = Match::Collision,
            (_, false) => {}
        }
    }
    Ok(Spi::run_with_args(
        "INSERT INTO dedup.pass_keys (run_id, target_id, pass, key, chunk_id) \
         SELECT $1, $2, $3, k.key, $4 FROM pg_catalog.unnest($5) AS k(key) ON CONFLICT DO NOTHING",
        &[
            chunk.run.into(),
            chunk.target_id.into(),
            chunk.pass.into(),
            chunk.chunk_id.as_str().into(),
            unchanged.into(),
        ],
    )?)
}

/// Keys of the rows that earlier finishes of this chunk updated.
fn updated_before(chunk: &OpenChunk) -> Result<HashSet<Vec<u8>>> {
    Spi::connect(|client| {
        client
            .select(
                "SELECT key FROM dedup.before_images WHERE run_id = $1 AND chunk_id = $2 AND action = 'update'",
                None,
                &[chunk.run.into(), chunk.chunk_id.as_str().into()],
            )?
            .map(|row| required(row["key"].value()?))
            .collect()
    })
}

/// Positions of the rows found whose entry carries an ordinal of this run's current pass, and whether it is this very chunk's.
fn written_by_this_pass<'k>(
    chunk: &OpenChunk,
    found: &[([u8; 32], u32)],
    key_of: &dyn Fn(u32) -> &'k [u8],
) -> Result<Vec<(u32, bool)>> {
    let ordinals: HashMap<u64, bool> = Spi::connect(|client| -> Result<_> {
        client
            .select(
                "SELECT ordinal, chunk_id FROM dedup.ordinals WHERE run_id = $1 AND pass = $2 AND target_id = $3",
                None,
                &[chunk.run.into(), chunk.pass.into(), chunk.target_id.into()],
            )?
            .map(|row| {
                let ordinal: i64 = required(row["ordinal"].value()?)?;
                Ok((ordinal as u64, row["chunk_id"].value::<String>()?.as_ref() == Some(&chunk.chunk_id)))
            })
            .collect()
    })?;
    let Some(&oldest) = ordinals.keys().min() else { return Ok(Vec::new()) };

    let mut digests: Vec<[u8; 32]> = found.iter().map(|(digest, _)| *digest).collect();
    digests.dedup();
    let wanted: Vec<u32> = (0..digests.len() as u32).collect();
    let places =
        lookup::places_since(chunk.target_id, &digests, &wanted, oldest as i64, &Snapshot::latest())?;
    let mut written = Vec::new();
    for (i, places) in places {
        let digest = &digests[i as usize];
        let start = found.partition_point(|(d, _)| d < digest);
        for &(_, n) in found[start..].iter().take_while(|(d, _)| d == digest) {
            let place = places.iter().find(|p| p.key == key_of(n));
            written.extend(
                place.and_then(|p| ordinals.get(&p.ordinal)).map(|&by_this_chunk| (n, by_this_chunk)),
            );
        }
    }
    Ok(written)
}
