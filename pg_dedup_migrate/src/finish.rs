//! `finish_chunk`: writes the chunk's segment and ledger, reads back what it wrote, closes its books.
//!
//! `verified` means: every row this transaction wrote for the chunk was read from the target again, hashed by the server, and is
//! what was sent. Order: the ordinal is drawn while claims and row locks are held, so that ordinals are commit order for any one
//! digest and key.
use pg_dedup_record::block::{Entry, Stamp};
use pg_dedup_record::checksum::Checksum;
use pg_dedup_record::digest::Digest;
use pg_dedup_record::wire;
use pgrx::pg_sys::panic::ErrorReport;
use pgrx::prelude::*;
use pgrx::{JsonB, Uuid, pg_sys};

use crate::chunk::{self, OpenChunk};
use crate::error::{Error, Result};
use crate::hash::rows;
use crate::keyset::{column_list, hash_of};
use crate::ledger;
use crate::lookup::Subject;
use crate::matching::Standing;
use crate::pace;
use crate::planning::ByIndex;
use crate::relation::{Access, Table};
use crate::repair;
use crate::segment::{SegmentWriter, next_number};
use crate::shmem::claims;
use crate::sql::{required, stored_digest};

/// The six counts and the six checksums of a chunk, in the order of the books: source, inserted, updated, unchanged, duplicate, quarantined.
pub struct Books {
    /// Records.
    pub counts: [i64; 6],
    /// Sums of their row digests.
    pub checksums: [Checksum; 6],
}

const SOURCE: usize = 0;
const INSERTED: usize = 1;
const UPDATED: usize = 2;
const DUPLICATE: usize = 4;

impl Books {
    /// Parses what the protocol sends.
    ///
    /// # Errors
    /// 22023 for anything but six counts and six checksums.
    pub fn parse(counts: &[i64], checksums: &[u8]) -> Result<Self> {
        let counts: [i64; 6] = counts.try_into().map_err(|_| Error::invalid("counts must be six numbers"))?;
        if counts.iter().any(|&n| n < 0) {
            return Err(Error::invalid("counts must not be negative"));
        }
        let (parts, rest) = checksums.as_chunks::<32>();
        let parts: &[[u8; 32]; 6] = parts
            .try_into()
            .ok()
            .filter(|_| rest.is_empty())
            .ok_or_else(|| Error::invalid("checksums must be six times 32 bytes"))?;
        Ok(Self { counts, checksums: std::array::from_fn(|i| Checksum::from_bytes(&parts[i])) })
    }

    /// Count and checksum of what was written now: inserted and updated, without what an earlier finish of the chunk left standing.
    fn written(&self, standing: &Standing) -> (i64, Checksum) {
        let mut sum = self.checksums[INSERTED];
        sum.merge(&self.checksums[UPDATED]);
        sum.subtract(&standing.checksum);
        (self.counts[INSERTED] + self.counts[UPDATED] - standing.count, sum)
    }

    /// source = inserted + updated + unchanged + duplicate + quarantined, for both. A CHECK holds it too; here it can be explained.
    fn check_balance(&self) -> Result<()> {
        let mut sum = Checksum::default();
        self.checksums[INSERTED..].iter().for_each(|c| sum.merge(c));
        let count: i64 = self.counts[INSERTED..].iter().sum();
        if count != self.counts[SOURCE] || sum != self.checksums[SOURCE] {
            return Err(Error::new(
                PgSqlErrorCode::ERRCODE_CHECK_VIOLATION,
                "the books of the chunk do not balance",
            )
            .detail(format!(
                "Source {} records, accounted for {count}; checksums {}.",
                self.counts[SOURCE],
                if sum == self.checksums[SOURCE] { "agree" } else { "differ" }
            )));
        }
        Ok(())
    }
}

/// `dedup.add_lists`: parts of the manifest and the ledger that `finish_chunk` would take, sent ahead of it in their order. Megabytes in one
/// message would be copied whole, several times, on either side.
///
/// # Errors
/// 55000 without an open chunk. What the lists hold is looked at by `finish_chunk`.
#[pg_extern(volatile, parallel_unsafe)]
fn add_lists(run: Uuid, chunk_id: &str, manifest: &[u8], ledger: &[u8]) -> Result<(), ErrorReport> {
    Ok(chunk::with_open(run, chunk_id, |chunk| {
        chunk.add_lists(manifest, ledger);
        Ok(())
    })?)
}

/// `dedup.finish_chunk`; the packed arguments are described in docs/protocol.md.
///
/// # Errors
/// 22023 for malformed arguments, 23514 when the books do not balance, 23000 when the target does not hold what was sent.
#[pg_extern(volatile, parallel_unsafe)]
#[allow(clippy::too_many_arguments)] // the protocol's own argument list
fn finish_chunk(
    run: Uuid,
    chunk_id: &str,
    counts: Vec<i64>,
    checksums: &[u8],
    manifest: &[u8],
    ledger: &[u8],
    info: JsonB,
) -> Result<i64, ErrorReport> {
    let books = Books::parse(&counts, checksums)?;
    let _pace = pace::of_run(run)?;
    Ok(chunk::with_open(run, chunk_id, |chunk| {
        chunk.add_lists(manifest, ledger);
        finish(chunk, &books, &info)
    })?)
}

/// The work of [`finish_chunk`]; returns the ordinal.
///
/// # Errors
/// As there.
pub fn finish(chunk: &mut OpenChunk, books: &Books, info: &JsonB) -> Result<i64> {
    books.check_balance()?;
    let ordinal = draw_ordinal(chunk)?;
    repair::refuse_more_quarantine(chunk)?;
    repair::remove_extra(chunk)?;
    let tombstones = retractions(chunk, ordinal)?;
    let written = books.written(&chunk.standing);
    let lists = chunk.lists.clone();
    let manifest = read_manifest(&lists.manifest, &written)?;
    claims::verify_ours(chunk.scope(), manifest.iter().map(|e| e.digest.as_bytes()))?;
    check_refused_replacements(chunk, &manifest, &tombstones)?;

    let stale = repair::still_stale(chunk)?;
    write_segment(chunk, ordinal as u64, &manifest, &tombstones)?;
    repair::retract(chunk, &manifest, stale)?;
    ledger::write(chunk.target_id, ordinal, &lists.ledger, books.counts[DUPLICATE])?;
    write_unchanged(chunk, ordinal)?;
    if !chunk.verified_later {
        read_back(chunk, &written, &manifest)?;
    }
    close_books(chunk, books, &written, ordinal, info)?;
    chunk.finished = true;
    Ok(ordinal)
}

/// The chunk's ordinal, drawn on first need: after every claim, pending ones included, so that it is commit order.
///
/// # Errors
/// The server's own without USAGE on the sequence.
pub fn draw_ordinal(chunk: &mut OpenChunk) -> Result<i64> {
    if let Some(ordinal) = chunk.ordinal {
        return Ok(ordinal);
    }
    let ordinal = next_number("ordinal_seq")?;
    Spi::run_with_args(
        "INSERT INTO dedup.ordinals (ordinal, target_id, run_id, chunk_id, pass) VALUES ($1, $2, $3, $4, $5)",
        &[
            ordinal.into(),
            chunk.target_id.into(),
            chunk.run.into(),
            chunk.chunk_id.as_str().into(),
            chunk.pass.into(),
        ],
    )?;
    chunk.ordinal = Some(ordinal);
    Ok(ordinal)
}

/// (old digest, key) of the rows this chunk overwrote or removed, sorted: exactly those with a before image, so that what a savepoint
/// took back is not retracted. Without keys those that a repair removed.
fn retractions(chunk: &OpenChunk, ordinal: i64) -> Result<Vec<(Digest, Vec<u8>)>> {
    let mut places = with_images(ordinal)?;
    if chunk.keyless() {
        // Their images are numbered.
        places.iter_mut().for_each(|(_, key)| key.clear());
        places.dedup();
    }
    Ok(places)
}

fn with_images(ordinal: i64) -> Result<Vec<(Digest, Vec<u8>)>> {
    Spi::connect(|client| {
        let rows = client.select(
            "SELECT content_hash, key FROM dedup.before_images WHERE ordinal = $1 ORDER BY content_hash, key",
            None,
            &[ordinal.into()],
        )?;
        rows.into_iter()
            .map(|row| Ok((stored_digest(row["content_hash"].value()?)?, required(row["key"].value()?)?)))
            .collect()
    })
}

fn read_manifest<'a>(bytes: &'a [u8], written: &(i64, Checksum)) -> Result<Vec<wire::ManifestEntry<'a>>> {
    let entries: Vec<_> = wire::manifest(bytes)
        .collect::<std::result::Result<_, _>>()
        .map_err(|e| Error::invalid(format!("malformed manifest: {e}")))?;
    if entries.len() as i64 != written.0 || (entries.is_empty() && written.1 != Checksum::default()) {
        return Err(Error::invalid("the manifest does not list what the books say was written")
            .detail(format!("{} entries, {} rows written.", entries.len(), written.0)));
    }
    Ok(entries)
}

/// Contents of rows that were about to be replaced counted as gone when the chunk's digests were claimed. A row that the target then
/// would not let go still holds its content: if the chunk wrote that under another key, it would stand there twice.
fn check_refused_replacements(
    chunk: &OpenChunk,
    manifest: &[wire::ManifestEntry<'_>],
    tombstones: &[(Digest, Vec<u8>)],
) -> Result<()> {
    let is_stale = |place: &Subject| chunk.stale.binary_search_by(|(stale, _)| stale.cmp(place)).is_ok();
    for place in chunk.leaving.iter().filter(|place| !is_stale(place)) {
        let (digest, key) = place;
        let gone = tombstones.binary_search_by(|(d, k)| (d.as_bytes(), k).cmp(&(digest, key))).is_ok();
        if !gone && manifest.binary_search_by(|e| e.digest.as_bytes().cmp(digest)).is_ok() {
            return Err(Error::state(format!(
                "a row of {} kept content that the chunk wrote under another key",
                chunk.target_name()
            ))
            .detail(format!("The row is {}.", chunk.key_types.query_string(key)?))
            .hint("mend what the target refused to replace the row for, then requeue the chunk"));
        }
    }
    Ok(())
}

/// Which rows the chunk found unchanged: whoever takes out what another run wrote sees that its records rest on them.
fn write_unchanged(chunk: &OpenChunk, ordinal: i64) -> Result<()> {
    if chunk.unchanged.is_empty() {
        return Ok(());
    }
    Ok(Spi::run_with_args(
        "INSERT INTO dedup.unchanged_rows (ordinal, target_id, rows) VALUES ($1, $2, $3)",
        &[ordinal.into(), chunk.target_id.into(), chunk.unchanged.as_flattened().to_vec().into()],
    )?)
}

fn write_segment(
    chunk: &OpenChunk,
    ordinal: u64,
    manifest: &[wire::ManifestEntry<'_>],
    tombstones: &[(Digest, Vec<u8>)],
) -> Result<()> {
    if manifest.is_empty() && tombstones.is_empty() {
        return Ok(());
    }
    let blocks = Table::open("segment_block", Access::Insert)?;
    let segments = Table::open("segment", Access::Insert)?;
    let mut writer = SegmentWriter::new(&blocks, chunk.target_id, 0)?;
    let mut tombstones = tombstones.iter().peekable();
    let bury = |writer: &mut SegmentWriter<'_>, digest: &Digest, key: &[u8]| {
        let stamp = Stamp { ordinal, tombstone: true };
        writer.push(&Entry { digest: *digest, stamp, row_digest: [0; 8], key })
    };
    for entry in manifest {
        while let Some((digest, key)) = tombstones.next_if(|(d, _)| *d <= entry.digest) {
            // The same content under the same key again (only other columns changed): the entry stands, nothing is retracted.
            if (*digest, key.as_slice()) != (entry.digest, entry.key) {
                bury(&mut writer, digest, key)?;
            }
        }
        let stamp = Stamp { ordinal, tombstone: false };
        writer.push(&Entry { digest: entry.digest, stamp, row_digest: entry.row_digest, key: entry.key })?;
    }
    for (digest, key) in tombstones {
        bury(&mut writer, digest, key)?;
    }
    writer.finish(&segments)?;
    Ok(())
}

/// Reads what this transaction wrote and compares it with what was sent.
///
/// By range where keys order alike: one pass over neighbouring rows, and the sum of digests says it all. Otherwise, and where the sum
/// differs, row by row by the keys written.
fn read_back(
    chunk: &OpenChunk,
    written: &(i64, Checksum),
    manifest: &[wire::ManifestEntry<'_>],
) -> Result<()> {
    if manifest.is_empty() {
        return Ok(());
    }
    let _plan = ByIndex::new();
    if chunk.range.is_none() {
        return read_back_by_key(chunk, written, manifest);
    }
    let mut expected = Rows { count: written.0, sum: written.1, keyed: 0 };
    manifest.iter().for_each(|e| expected.add_keyed(e.key, e.row_digest));
    if read_back_by_range(chunk, None)? == expected {
        return Ok(());
    }
    // Chunks that this transaction did before may have written into the range.
    let since = read_back_by_range(chunk, Some(chunk.begun))?;
    if since == expected {
        return Ok(());
    }
    read_back_by_key(chunk, written, manifest)?;
    let more = since.count - written.0;
    if more > 0 {
        return Err(unlike(chunk, format!("It holds {more} rows more than were sent.")));
    }
    Ok(())
}

/// What a set of rows adds up to, in whatever order.
#[derive(Default, PartialEq)]
struct Rows {
    count: i64,
    /// Of the row digests.
    sum: Checksum,
    /// Of hashes over each key and the beginning of its row digest: every entry of a manifest names the row it was made for.
    keyed: u64,
}

impl Rows {
    fn add_keyed(&mut self, key: &[u8], row_digest: [u8; Digest::SHORT_LEN]) {
        self.keyed = self.keyed.wrapping_add(hash_of(&[&row_digest, key]));
    }
}

/// The rows in the chunk's range that this transaction wrote, or wrote since a command of it.
fn read_back_by_range(chunk: &OpenChunk, since: Option<pg_sys::CommandId>) -> Result<Rows> {
    let (condition, arguments) = chunk.key_types.range_condition(&chunk.layout, chunk.range.as_ref());
    let (system, trailing) = if since.is_some() { ("t.xmin, t.cmin", 2) } else { ("t.xmin", 1) };
    let query = format!(
        "SELECT {}, {system} FROM {} AS t WHERE {condition}",
        column_list(&chunk.layout, "t"),
        chunk.target_name()
    );
    let arguments: Vec<_> = arguments.into_iter().map(Into::into).collect();
    let mut found = Rows::default();
    let mut key = Vec::new();
    let mut own = OwnRows::default();
    rows::scan(&query, &arguments, &chunk.layout, trailing, |row| {
        let earlier = match since {
            Some(since) => row.trailing_command(1)? < since,
            None => false,
        };
        if own.contains(&row)? && !earlier {
            let digest = row.row_digest()?;
            key.clear();
            row.write_key(&mut key)?;
            found.count += 1;
            found.sum.add(&digest);
            found.add_keyed(&key, digest.short());
        }
        Ok(())
    })?;
    Ok(found)
}

/// What the target holds is not what was sent.
fn unlike(chunk: &OpenChunk, detail: String) -> Error {
    Error::new(
        PgSqlErrorCode::ERRCODE_INTEGRITY_CONSTRAINT_VIOLATION,
        format!("{} does not hold what was sent", chunk.target_name()),
    )
    .detail(detail)
    .hint("look for a trigger, rule or policy that rewrites, adds or drops rows of the target")
}

/// Row by row. An entry has but the beginning of its row digest, which says which rows differ; whether any does, the sum of whole ones says.
fn read_back_by_key(
    chunk: &OpenChunk,
    written: &(i64, Checksum),
    manifest: &[wire::ManifestEntry<'_>],
) -> Result<()> {
    let keys: Vec<&[u8]> = manifest.iter().map(|e| e.key).collect();
    let arrays = chunk.key_types.arrays(&keys)?;
    let query = format!(
        "SELECT {}, t.xmin, k.n FROM {} JOIN {} AS t ON {}",
        column_list(&chunk.layout, "t"),
        chunk.key_types.unnest(),
        chunk.target_name(),
        chunk.key_types.join_condition()
    );
    let mut seen = vec![false; manifest.len()];
    let mut different = 0usize;
    let mut sum = Checksum::default();
    let mut example = None;
    let mut own = OwnRows::default();
    rows::scan(&query, &arrays, &chunk.layout, 2, |row| {
        let n = required(row.trailing::<i64>(1)?)? as usize - 1;
        let entry = &manifest[n];
        let digests = row.digests()?;
        seen[n] = true;
        sum.add(&digests.row);
        if !own.contains(&row)? || digests.row.short() != entry.row_digest || digests.content != entry.digest
        {
            different += 1;
            example.get_or_insert(n);
        }
        Ok(())
    })?;
    let missing = seen.iter().filter(|s| !**s).count();
    let Some(n) = example.or_else(|| seen.iter().position(|s| !s)) else {
        let same = sum == written.1;
        return if same { Ok(()) } else { Err(unlike(chunk, "The checksums of its rows differ.".into())) };
    };
    Err(unlike(
        chunk,
        format!(
            "Of {} rows {missing} are missing and {different} differ; the first is {}.",
            manifest.len(),
            chunk.key_types.query_string(manifest[n].key)?
        ),
    ))
}

/// Which rows this transaction wrote, in whatever savepoint: the last answer is remembered, for the rows of a chunk share it.
#[derive(Default)]
struct OwnRows {
    last: Option<(pg_sys::TransactionId, bool)>,
}

impl OwnRows {
    /// About a row whose first trailing column is its xmin.
    fn contains(&mut self, row: &rows::RowView<'_>) -> Result<bool> {
        let xmin: pg_sys::TransactionId = required(row.trailing(0)?)?;
        if let Some((last, answer)) = self.last
            && last == xmin
        {
            return Ok(answer);
        }
        // SAFETY: looks at this backend's own state.
        let answer = unsafe { pg_sys::TransactionIdIsCurrentTransactionId(xmin) };
        self.last = Some((xmin, answer));
        Ok(answer)
    }
}

fn close_books(
    chunk: &OpenChunk,
    books: &Books,
    written: &(i64, Checksum),
    ordinal: i64,
    info: &JsonB,
) -> Result<()> {
    let checksums: Vec<Vec<u8>> = books.checksums.iter().map(|c| c.to_bytes().to_vec()).collect();
    let info = serde_json::to_string(&info.0).map_err(|e| Error::invalid(format!("unreadable info: {e}")))?;
    let updated = Spi::connect_mut(|client| {
        client
            .update(
                "UPDATE dedup.checkpoints AS c SET status = CASE WHEN $6 THEN 'syncing' ELSE 'verified' END, \
                    repair = NULL, verified_at = CASE WHEN NOT $6 THEN pg_catalog.clock_timestamp() END, written_at = pg_catalog.clock_timestamp(), ordinal = $3, \
                    source_count = $4[1], inserted_count = $4[2], updated_count = $4[3], unchanged_count = $4[4], duplicate_count = $4[5], \
                    quarantined_count = $4[6], checksum = $5[1], inserted_checksum = $5[2], updated_checksum = $5[3], \
                    unchanged_checksum = $5[4], duplicate_checksum = $5[5], quarantined_checksum = $5[6], \
                    written_count = $8, written_checksum = $9, \
                    source_bytes = (i ->> 'source_bytes')::pg_catalog.int8, source_lsn = (i ->> 'source_lsn')::pg_catalog.pg_lsn, timings = i OPERATOR(pg_catalog.-) 'source_bytes' OPERATOR(pg_catalog.-) 'source_lsn' \
                 FROM (SELECT $7::pg_catalog.jsonb) AS info(i) WHERE c.run_id = $1 AND c.chunk_id = $2",
                None,
                &[
                    chunk.run.into(),
                    chunk.chunk_id.as_str().into(),
                    ordinal.into(),
                    books.counts.to_vec().into(),
                    checksums.into(),
                    chunk.verified_later.into(),
                    info.into(),
                    written.0.into(),
                    written.1.to_bytes().to_vec().into(),
                ],
            )
            .map(|rows| rows.len())
    })?;
    if updated == 1 {
        Ok(())
    } else {
        Err(Error::corrupted(format!("checkpoint of chunk {} is gone", chunk.chunk_id)))
    }
}
