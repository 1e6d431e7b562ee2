//! A sampled pass: entries of the hash index chosen by the leading bits of their digests, their rows and records fetched by key.
//!
//! What a chunk rests on is drawn, whoever wrote it: its own entries, the rows it found unchanged, and the keys of the records it dropped. A
//! content is drawn with everything that rests on it. Segments, ledger and lists of unchanged rows are in order of digest, so little more is
//! read of the first two than what is drawn. What neither the index nor the ledger knows is not drawn: only a full pass finds it.
use std::collections::{BTreeMap, HashMap};

use pg_dedup_record::digest::Digest;
use pg_dedup_record::wire;
use pgrx::Uuid;
use pgrx::pg_sys::panic::ErrorReport;
use pgrx::prelude::*;

use super::{Chunk, Rows, guard};
use crate::error::{Error, Result};
use crate::index::Target;
use crate::ledger;
use crate::matching::rested_on;
use crate::merge::Merge;
use crate::relation::{Access, Snapshot, Table};
use crate::segment;
use crate::sql::required;

/// `dedup.draw_sample`: chooses what a sampled pass looks at, once; returns how many keys that is.
///
/// # Errors
/// 42704 for an unknown pass, XX001 for damaged state.
#[pg_extern(volatile, parallel_unsafe, strict)]
pub fn draw_sample(reconciliation_id: i64) -> Result<i64, ErrorReport> {
    Ok(draw(reconciliation_id)?)
}

fn draw(reconciliation: i64) -> Result<i64> {
    let (run, sample, drawn, targets) = Spi::connect_mut(|client| -> Result<_> {
        // Locked: it is drawn once.
        let rows = client.update(
            "SELECT p.run_id, p.sample, p.drawn_at IS NOT NULL AS drawn, \
                 ARRAY(SELECT DISTINCT t.target_id FROM dedup.run_tables AS t WHERE t.run_id = p.run_id AND NOT t.keyless ORDER BY 1) AS targets \
             FROM dedup.reconciliations AS p WHERE p.reconciliation_id = $1 AND p.verdict = 'open' FOR NO KEY UPDATE",
            None,
            &[reconciliation.into()],
        )?;
        let row = rows
            .into_iter()
            .next()
            .ok_or_else(|| Error::undefined(format!("there is no open reconciliation {reconciliation}")))?;
        let run: Uuid = required(row["run_id"].value()?)?;
        let targets: Vec<i32> = required(row["targets"].value()?)?;
        Ok((run, required::<f64>(row["sample"].value()?)?, required::<bool>(row["drawn"].value()?)?, targets))
    })?;
    if !drawn {
        let bound = bound(sample);
        let mut contents = 0;
        for target in targets {
            contents += draw_target(reconciliation, run, target, bound)?;
        }
        Spi::run_with_args(
            "UPDATE dedup.reconciliations SET drawn_at = pg_catalog.clock_timestamp(), drawn_contents = $2 WHERE reconciliation_id = $1",
            &[reconciliation.into(), contents.into()],
        )?;
    }
    let keys = Spi::get_one_with_args::<i64>(
        "SELECT coalesce(pg_catalog.sum(key_count), 0)::pg_catalog.int8 FROM dedup.sampled_keys WHERE reconciliation_id = $1",
        &[reconciliation.into()],
    )?;
    required(keys)
}

/// The prefix that no digest of the sample reaches; none: every digest is in it.
fn bound(sample: f64) -> Option<u64> {
    // 2^64; what the fraction leaves of it is rounded down.
    const PREFIXES: f64 = 18_446_744_073_709_551_616.0;
    (sample < 1.0).then_some((sample * PREFIXES) as u64)
}

/// Draws from one target; returns how many different contents that are, at least.
fn draw_target(reconciliation: i64, run: Uuid, target_id: i32, bound: Option<u64>) -> Result<i64> {
    guard(target_id, Target::by_id(target_id)?.table)?;
    let snapshot = Snapshot::of_statement();
    let mut drawn = Drawn::new(reconciliation, run, target_id)?;
    let blocks = Table::open("segment_block", Access::Read)?;
    let segments = segment::segments_of(target_id, &snapshot)?;
    let mut unchanged = Unchanged::new(run, target_id, bound)?;
    let (mut contents, mut last) = (0, None);
    Merge::new(&blocks, &segments, &snapshot)?.until(bound).for_each(|entry| {
        if entry.stamp.tombstone {
            return Ok(());
        }
        let resting = unchanged.ordinals(&entry.digest, entry.key)?;
        for ordinal in std::iter::once(entry.stamp.ordinal).chain(resting) {
            if let Some(&chunk) = drawn.chunk_of.get(&ordinal) {
                drawn.add(chunk, entry.key)?;
                contents += i64::from(last.replace(entry.digest) != Some(entry.digest));
            }
        }
        Ok(())
    })?;
    // Of contents that the run only dropped those of one chunk are different ones; of several chunks they may be the same.
    let mut dropped = 0;
    for (ordinal, chunk) in drawn.chunk_of.clone() {
        let (mut of_chunk, mut last) = (0, None);
        draw_losers(ordinal, bound, |digest, key| {
            of_chunk += i64::from(last.replace(digest) != Some(digest));
            drawn.add(chunk, key)
        })?;
        dropped = dropped.max(of_chunk);
    }
    drawn.flush()?;
    Ok(contents.max(dropped))
}

/// Calls `visit` with contents and keys of the records that were dropped under an ordinal and belong to the sample.
fn draw_losers(
    ordinal: u64,
    bound: Option<u64>,
    mut visit: impl FnMut(Digest, &[u8]) -> Result<()>,
) -> Result<()> {
    let reached = bound.unwrap_or(u64::MAX).to_be_bytes().to_vec();
    let blocks: Vec<Vec<u8>> = Spi::connect(|client| -> Result<_> {
        client
            .select(
                "SELECT l.entries FROM dedup.ledger_block AS l WHERE l.ordinal = $1 AND ($3 OR l.first_digest OPERATOR(pg_catalog.<) $2) ORDER BY l.first_digest",
                None,
                &[ordinal.cast_signed().into(), reached.into(), bound.is_none().into()],
            )?
            .map(|row| required(row["entries"].value()?))
            .collect()
    })?;
    for bytes in blocks {
        let block = ledger::parse(&bytes)?;
        for entry in (0..block.len()).map(|i| block.entry(i)) {
            if bound.is_none_or(|bound| entry.digest.prefix() < bound) {
                visit(entry.digest, entry.key)?;
            }
        }
    }
    Ok(())
}

/// Keys that were drawn, by chunk, written when they are many.
struct Drawn {
    reconciliation: i64,
    chunks: Vec<String>,
    /// The chunk that finished under an ordinal.
    chunk_of: HashMap<u64, u32>,
    keys: BTreeMap<u32, (Vec<u8>, i64)>,
    bytes: usize,
}

impl Drawn {
    /// Bytes of keys that are held back.
    const HELD: usize = 16 << 20;

    fn new(reconciliation: i64, run: Uuid, target: i32) -> Result<Self> {
        let finished: Vec<(u64, String)> = Spi::connect(|client| -> Result<_> {
            client
                .select(
                    "SELECT o.ordinal, o.chunk_id FROM dedup.ordinals AS o \
                     WHERE o.run_id = $1 AND o.target_id = $2 AND o.heir_of IS NULL AND o.chunk_id IS NOT NULL \
                     ORDER BY o.chunk_id",
                    None,
                    &[run.into(), target.into()],
                )?
                .map(|row| {
                    let ordinal: i64 = required(row["ordinal"].value()?)?;
                    Ok((ordinal.cast_unsigned(), required(row["chunk_id"].value()?)?))
                })
                .collect()
        })?;
        let mut chunks: Vec<String> = Vec::new();
        let mut chunk_of = HashMap::with_capacity(finished.len());
        for (ordinal, chunk) in finished {
            if chunks.last() != Some(&chunk) {
                chunks.push(chunk);
            }
            chunk_of.insert(ordinal, chunks.len() as u32 - 1);
        }
        Ok(Self { reconciliation, chunks, chunk_of, keys: BTreeMap::new(), bytes: 0 })
    }

    fn add(&mut self, chunk: u32, key: &[u8]) -> Result<()> {
        let (keys, count) = self.keys.entry(chunk).or_default();
        let before = keys.len();
        wire::encode_key(key, keys).map_err(|e| Error::corrupted(e.to_string()))?;
        *count += 1;
        self.bytes += keys.len() - before;
        if self.bytes > Self::HELD { self.flush() } else { Ok(()) }
    }

    fn flush(&mut self) -> Result<()> {
        self.bytes = 0;
        for (chunk, (keys, count)) in std::mem::take(&mut self.keys) {
            pgrx::check_for_interrupts!();
            Spi::run_with_args(
                "INSERT INTO dedup.sampled_keys (reconciliation_id, chunk_id, keys, key_count) VALUES ($1, $2, $3, $4)",
                &[
                    self.reconciliation.into(),
                    self.chunks[chunk as usize].as_str().into(),
                    keys.into(),
                    count.into(),
                ],
            )?;
        }
        Ok(())
    }
}

/// Rows that the run found unchanged, of the part of the sample that is being looked at.
struct Unchanged {
    run: Uuid,
    target: i32,
    bound: Option<u64>,
    /// How many prefixes a part has.
    step: u64,
    /// First prefix of the next part; none: this is the last one.
    next: Option<u64>,
    /// Names of rows, and the ordinals of the chunks that rest on them, sorted.
    rows: Vec<([u8; 16], u64)>,
}

impl Unchanged {
    /// Rows of a part, roughly: 24 bytes each.
    const ROWS: u64 = 4 << 20;

    fn new(run: Uuid, target: i32, bound: Option<u64>) -> Result<Self> {
        let all = Spi::get_one_with_args::<i64>(
            "SELECT coalesce(pg_catalog.sum(pg_catalog.length(u.rows) OPERATOR(pg_catalog./) 16), 0)::pg_catalog.int8 \
             FROM dedup.unchanged_rows AS u JOIN dedup.ordinals AS o USING (ordinal) WHERE o.run_id = $1 AND u.target_id = $2",
            &[run.into(), target.into()],
        )?;
        let parts = required(all)?.cast_unsigned().div_ceil(Self::ROWS);
        // Without any there is nothing to load.
        let next = (parts > 0).then_some(0);
        Ok(Self {
            run,
            target,
            bound,
            step: (u64::MAX / parts.max(1)).saturating_add(1),
            next,
            rows: Vec::new(),
        })
    }

    /// Under which ordinals chunks rest on a row. Digests are asked for in order.
    fn ordinals(&mut self, digest: &Digest, key: &[u8]) -> Result<Vec<u64>> {
        while let Some(first) = self.next.filter(|&first| digest.prefix() >= first) {
            self.load(first)?;
        }
        let content = digest.short();
        let at = self.rows.partition_point(|(row, _)| row[..8] < content[..]);
        if self.rows.get(at).is_none_or(|(row, _)| row[..8] != content[..]) {
            return Ok(Vec::new());
        }
        let name = rested_on(digest, key);
        let with_content = self.rows[at..].iter().take_while(|(row, _)| row[..8] == content[..]);
        Ok(with_content.filter(|(row, _)| *row == name).map(|(_, ordinal)| *ordinal).collect())
    }

    fn load(&mut self, first: u64) -> Result<()> {
        let end = first.checked_add(self.step).filter(|&end| self.bound.is_none_or(|bound| end < bound));
        self.next = end;
        let past = end.or(self.bound);
        self.rows.clear();
        Spi::connect(|client| -> Result<()> {
            let lists = client.select(
                "SELECT u.ordinal, u.rows FROM dedup.unchanged_rows AS u JOIN dedup.ordinals AS o USING (ordinal) \
                 WHERE o.run_id = $1 AND u.target_id = $2",
                None,
                &[self.run.into(), self.target.into()],
            )?;
            for list in lists {
                let ordinal = required::<i64>(list["ordinal"].value()?)?.cast_unsigned();
                let packed: Vec<u8> = required(list["rows"].value()?)?;
                let rows = packed.as_chunks::<16>().0;
                let prefix = |row: &[u8; 16]| row.first_chunk().map_or(0, |first| u64::from_be_bytes(*first));
                let from = rows.partition_point(|row| prefix(row) < first);
                let to = past.map_or(rows.len(), |past| rows.partition_point(|row| prefix(row) < past));
                self.rows.extend(rows[from..to].iter().map(|row| (*row, ordinal)));
            }
            Ok(())
        })?;
        self.rows.sort_unstable();
        Ok(())
    }
}

/// Keys that were drawn of a chunk, sorted.
///
/// # Errors
/// XX001 for a malformed list.
pub fn keys_of(reconciliation: i64, chunk_id: &str) -> Result<Vec<Vec<u8>>> {
    let mut keys: Vec<Vec<u8>> = Vec::new();
    Spi::connect(|client| -> Result<()> {
        let lists = client.select(
            "SELECT keys FROM dedup.sampled_keys WHERE reconciliation_id = $1 AND chunk_id = $2",
            None,
            &[reconciliation.into(), chunk_id.into()],
        )?;
        for list in lists {
            let packed: Vec<u8> = required(list["keys"].value()?)?;
            for key in wire::keys(&packed) {
                keys.push(key.map_err(|e| Error::corrupted(format!("sampled keys: {e}")))?.to_vec());
            }
        }
        Ok(())
    })?;
    keys.sort_unstable();
    keys.dedup();
    Ok(keys)
}

/// Keys of a chunk that are fetched one by one; of more the whole chunk is read.
pub const FETCHED: usize = 20_000;

/// `dedup.sampled_keys`: what a worker asks the source for, of each key column an array of the values that were drawn, as text; NULL: nothing was
/// drawn, an empty array: so much that the whole chunk is to be read.
///
/// # Errors
/// 42704 for an unknown chunk.
#[pg_extern(name = "sampled_keys", volatile, parallel_unsafe, strict)]
pub fn sampled_keys(reconciliation_id: i64, chunk_id: &str) -> Result<Option<Vec<String>>, ErrorReport> {
    let chunk = Chunk::load(reconciliation_id, chunk_id)?;
    let Rows::Sampled(keys) = &chunk.rows else {
        return Err(Error::state(format!("reconciliation {reconciliation_id} is not a sampled one")).into());
    };
    Ok(match keys.len() {
        0 => None,
        1..=FETCHED => Some(chunk.key_types.texts(keys)?),
        _ => Some(Vec::new()),
    })
}
