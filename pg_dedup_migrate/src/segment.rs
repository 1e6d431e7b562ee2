//! Segments: immutable sorted sets of (content digest → location), packed into rows of `dedup.segment_block`.
//!
//! A segment is written whole by one transaction and never changed. Its id is drawn anew for every attempt, so an
//! aborted attempt can leave dead rows but never rows that look like somebody else's. Rows are written natively:
//! the statement triggers that mark the filter cold are for rows that come in any other way.
use std::cell::RefCell;
use std::rc::Rc;

use pg_dedup_record::block::{BlockBuilder, BlockView, Entry, Stamp};
use pg_dedup_record::digest::Digest;
use pgrx::prelude::*;
use pgrx::{IntoDatum, pg_sys};

use crate::error::{Error, Result};
use crate::pace;
use crate::relation::{self, Access, BytesDatum, Condition, Direction, IndexScan, Inserter, Snapshot, Table};

/// Entries that a block holds at most, roughly: when they have no key.
pub const ENTRIES_PER_BLOCK: usize = 200;

/// What one row of `dedup.segment` says.
#[derive(Clone, Debug)]
pub struct Segment {
    /// The segment's id.
    pub id: i64,
    /// 0: written by a chunk.
    pub level: i32,
    /// Tombstones among them.
    pub tombstones: i64,
    /// Rows in `dedup.segment_block`.
    pub blocks: i32,
    /// Lowest ordinal among the entries.
    pub first_ordinal: i64,
    /// Highest ordinal among the entries.
    pub last_ordinal: i64,
}

impl Segment {
    fn of(row: &relation::Row<'_>) -> Result<Self> {
        Ok(Self {
            id: row.int8(1)?,
            level: row.int4(3)?,
            tombstones: row.int8(7)?,
            blocks: row.int4(8)?,
            first_ordinal: row.int8(4)?,
            last_ordinal: row.int8(5)?,
        })
    }
}

/// The next number of one of dedup's sequences.
///
/// # Errors
/// 42P01 when the sequence is not there; the server's own ERROR without USAGE on it.
pub fn next_number(sequence: &str) -> Result<i64> {
    let oid = relation::own_oid(sequence)?;
    // SAFETY: nextval(regclass), given a sequence's oid; it checks privileges itself.
    let number = unsafe { pgrx::direct_function_call::<i64>(pg_sys::nextval_oid, &[oid.into_datum()]) };
    number.ok_or_else(|| Error::corrupted(format!("dedup.{sequence} gave no number")))
}

/// Writes one segment; entries come sorted by (digest, ordinal).
pub struct SegmentWriter<'a> {
    id: i64,
    target: i32,
    level: i32,
    rows: Rc<RefCell<Inserter<'a>>>,
    builder: BlockBuilder,
    blocks: i32,
    entries: i64,
    tombstones: i64,
    ordinals: Option<(u64, u64)>,
}

impl<'a> SegmentWriter<'a> {
    /// Begins a segment of `target` in `blocks`, an open `dedup.segment_block`.
    ///
    /// # Errors
    /// When no segment id can be drawn.
    pub fn new(blocks: &'a Table, target: i32, level: i32) -> Result<Self> {
        Self::beside(Rc::new(RefCell::new(Inserter::new(blocks))), target, level)
    }

    /// As [`SegmentWriter::new`], its blocks written through an inserter that others write through, too.
    ///
    /// # Errors
    /// As there.
    pub fn beside(rows: Rc<RefCell<Inserter<'a>>>, target: i32, level: i32) -> Result<Self> {
        Ok(Self {
            id: next_number("segment_id_seq")?,
            target,
            level,
            rows,
            builder: BlockBuilder::new(),
            blocks: 0,
            entries: 0,
            tombstones: 0,
            ordinals: None,
        })
    }

    /// Adds an entry.
    ///
    /// # Errors
    /// XX000 for an entry that fits no block or is out of order.
    pub fn push(&mut self, entry: &Entry<'_>) -> Result<()> {
        if !self.builder.try_push(entry).map_err(internal)? {
            self.flush()?;
            if !self.builder.try_push(entry).map_err(internal)? {
                return Err(Error::invalid("an entry does not fit a block").detail("The key is too long."));
            }
        }
        self.entries += 1;
        self.tombstones += i64::from(entry.stamp.tombstone);
        let ordinal = entry.stamp.ordinal;
        self.ordinals = Some(
            self.ordinals.map_or((ordinal, ordinal), |(low, high)| (low.min(ordinal), high.max(ordinal))),
        );
        Ok(())
    }

    fn flush(&mut self) -> Result<()> {
        // An interrupt between blocks leaves nothing half done: the transaction goes with it.
        pace::point();
        let Some(first) = self.builder.first_digest() else { return Ok(()) };
        let first = BytesDatum::new(first.as_bytes());
        let entries = BytesDatum::new(&self.builder.finish());
        self.rows.borrow_mut().insert(&[self.id.into(), self.blocks.into(), first.datum(), entries.datum()]);
        self.blocks += 1;
        Ok(())
    }

    /// Writes the last block and the segment's own row in `segments`, an open `dedup.segment`. Without entries nothing is written.
    ///
    /// # Errors
    /// As [`SegmentWriter::push`].
    pub fn finish(mut self, segments: &Table) -> Result<Option<Segment>> {
        self.flush()?;
        let Some((low, high)) = self.ordinals else { return Ok(None) };
        // SAFETY: clock call without arguments.
        let now = unsafe { pg_sys::GetCurrentTimestamp() };
        Inserter::new(segments).insert(&[
            self.id.into(),
            self.target.into(),
            self.level.into(),
            (low as i64).into(),
            (high as i64).into(),
            self.entries.into(),
            self.tombstones.into(),
            self.blocks.into(),
            now.into(),
        ]);
        Ok(Some(Segment {
            id: self.id,
            level: self.level,
            tombstones: self.tombstones,
            blocks: self.blocks,
            first_ordinal: low as i64,
            last_ordinal: high as i64,
        }))
    }
}

fn internal(error: pg_dedup_record::block::BlockError) -> Error {
    Error::corrupted(format!("cannot pack an index entry: {error}"))
}

/// The segments of a target that the snapshot sees, the largest levels first: whoever looks for a digest finds it there more often than not, and
/// need not look on.
///
/// # Errors
/// 42501 without SELECT on `dedup.segment`.
pub fn segments_of(target: i32, snapshot: &Snapshot) -> Result<Vec<Segment>> {
    let table = Table::open("segment", Access::Read)?;
    let mut scan = IndexScan::new(&table, "segment_target", snapshot, 1)?;
    scan.start(&[Condition::int4_eq(1, target)]);
    let mut found = Vec::new();
    while let Some(row) = scan.next(Direction::Forward) {
        found.push(Segment::of(&row)?);
    }
    found.sort_by_key(|s| std::cmp::Reverse((s.level, s.id)));
    Ok(found)
}

/// The segments of a target that hold entries of one ordinal and no other.
///
/// # Errors
/// 42501 without SELECT on `dedup.segment`.
pub fn segments_of_ordinal(target: i32, ordinal: i64, snapshot: &Snapshot) -> Result<Vec<Segment>> {
    let table = Table::open("segment", Access::Read)?;
    let mut scan = IndexScan::new(&table, "segment_ordinal", snapshot, 2)?;
    scan.start(&[Condition::int4_eq(1, target), Condition::int8_eq(2, ordinal)]);
    let mut found = Vec::new();
    while let Some(row) = scan.next(Direction::Forward) {
        let segment = Segment::of(&row)?;
        if segment.last_ordinal == ordinal {
            found.push(segment);
        }
    }
    Ok(found)
}

/// Says of contents that they no longer stand under these keys.
///
/// # Errors
/// 42501 without INSERT on the segment tables.
pub fn write_tombstones(target: i32, mut tombstones: Vec<(Digest, u64, Vec<u8>)>) -> Result<()> {
    if tombstones.is_empty() {
        return Ok(());
    }
    tombstones.sort_unstable();
    let blocks = Table::open("segment_block", Access::Insert)?;
    let segments = Table::open("segment", Access::Insert)?;
    let mut writer = SegmentWriter::new(&blocks, target, 0)?;
    for (digest, ordinal, key) in &tombstones {
        let stamp = Stamp { ordinal: *ordinal, tombstone: true };
        writer.push(&Entry { digest: *digest, stamp, row_digest: [0; Digest::SHORT_LEN], key })?;
    }
    writer.finish(&segments)?;
    Ok(())
}

/// Entries that segments hold at most, roughly.
pub fn most_entries(segments: &[Segment]) -> usize {
    segments.iter().map(|segment| segment.blocks as usize * ENTRIES_PER_BLOCK).sum()
}

/// An ordinal that is no run's: what is said under it stays true whichever run is taken back.
///
/// # Errors
/// 42501 without INSERT on `dedup.ordinals`.
pub fn nobodys_ordinal(target: i32) -> Result<i64> {
    let ordinal = next_number("ordinal_seq")?;
    Spi::run_with_args(
        "INSERT INTO dedup.ordinals (ordinal, target_id) VALUES ($1, $2)",
        &[ordinal.into(), target.into()],
    )?;
    Ok(ordinal)
}

/// Deletes segments.
///
/// # Errors
/// 42501 without DELETE on the segment tables.
pub fn delete(segments: &[Segment]) -> Result<()> {
    let ids: Vec<i64> = segments.iter().map(|segment| segment.id).collect();
    Spi::run_with_args("DELETE FROM dedup.segment_block WHERE segment_id = ANY ($1)", &[ids.clone().into()])?;
    Ok(Spi::run_with_args("DELETE FROM dedup.segment WHERE segment_id = ANY ($1)", &[ids.into()])?)
}

/// Reads the blocks of segments.
pub struct BlockReader<'a> {
    ascending: IndexScan<'a>,
    seeking: IndexScan<'a>,
    /// What the seeking scan compares with, by reference: it must live until the next seek.
    sought: BytesDatum,
}

/// Name of the index that orders blocks by their first digest.
pub const BLOCK_INDEX: &str = "segment_block_digest";

impl<'a> BlockReader<'a> {
    /// A reader of `blocks`, an open `dedup.segment_block`, as the snapshot sees it.
    ///
    /// # Errors
    /// 42P01 when the index is not there.
    pub fn new(blocks: &'a Table, snapshot: &'a Snapshot) -> Result<Self> {
        Ok(Self {
            ascending: IndexScan::new(blocks, BLOCK_INDEX, snapshot, 1)?,
            seeking: IndexScan::new(blocks, BLOCK_INDEX, snapshot, 2)?,
            sought: BytesDatum::new(&[]),
        })
    }

    /// Begins to read a segment from its first block.
    pub fn start(&mut self, segment: i64) {
        self.ascending.start(&[Condition::int8_eq(1, segment)]);
    }

    /// The next block in digest order, verified.
    ///
    /// # Errors
    /// XX001 naming segment and block when its bytes are damaged.
    pub fn next(&mut self) -> Result<Option<BlockView<'_>>> {
        match self.ascending.next(Direction::Forward) {
            Some(row) => parse(&row, false).map(Some),
            None => Ok(None),
        }
    }

    /// Begins to read, backwards, at the last block that can hold `digest`.
    pub fn seek(&mut self, segment: i64, digest: &[u8; 32]) {
        self.sought = BytesDatum::new(digest);
        self.seeking.start(&[Condition::int8_eq(1, segment), Condition::bytea_le(2, &self.sought)]);
    }

    /// The next block, backwards, from where [`BlockReader::seek`] went.
    ///
    /// # Errors
    /// As [`BlockReader::next`].
    pub fn previous(&mut self) -> Result<Option<BlockView<'_>>> {
        match self.seeking.next(Direction::Backward) {
            Some(row) => parse(&row, false).map(Some),
            None => Ok(None),
        }
    }
}

/// Reads a row of `dedup.segment_block`. The checksum is looked at unless the caller has done so before.
///
/// # Errors
/// XX001 naming segment and block when its bytes are damaged.
pub fn parse<'a>(row: &relation::Row<'a>, verified: bool) -> Result<BlockView<'a>> {
    let bytes = row.plain_bytes(4)?;
    let (segment, block) = (row.int8(1)?, row.int4(2)?);
    let view = if verified { BlockView::parse_verified(bytes) } else { BlockView::parse(bytes) };
    view.map_err(|error| damaged(segment).detail(format!("Block {block}: {error}.")))
}

/// XX001: what a segment holds is not what was written.
pub fn damaged(segment: i64) -> Error {
    Error::corrupted(format!("segment {segment} of the hash index is damaged"))
        .hint("restore dedup.segment_block from a backup, or rebuild the index with dedup.reindex_target")
}

/// Calls `visit` with every entry of a segment, in order.
///
/// # Errors
/// XX001 for a damaged block; what `visit` returns.
pub fn for_each_entry(
    reader: &mut BlockReader<'_>,
    segment: i64,
    mut visit: impl FnMut(&Entry<'_>) -> Result<()>,
) -> Result<()> {
    reader.start(segment);
    while let Some(block) = reader.next()? {
        pace::point();
        for i in 0..block.len() {
            visit(&block.entry(i))?;
        }
    }
    Ok(())
}
