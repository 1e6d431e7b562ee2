//! The ledger: which duplicates a chunk dropped, packed into rows of `dedup.ledger_block` in order of digest.
//!
//! Written natively, as segments are: a chunk of a hundred thousand records may drop most of them.
use pg_dedup_record::block::{BlockBuilder, BlockError, BlockView, Entry, Stamp};
use pg_dedup_record::wire;
use pgrx::Uuid;
use pgrx::prelude::*;

use crate::error::{Error, Result};
use crate::pace;
use crate::relation::{Access, BytesDatum, Inserter, Table};
use crate::sql::required;

/// Writes the packed ledger of one finished chunk, which must list as many records as its books call duplicates.
///
/// # Errors
/// 22023 for a malformed ledger or another count; 42501 without INSERT on `dedup.ledger_block`.
pub fn write(target: i32, ordinal: i64, ledger: &[u8], duplicates: i64) -> Result<()> {
    let table = Table::open("ledger_block", Access::Insert)?;
    let mut writer = LedgerWriter {
        target,
        ordinal,
        rows: Inserter::new(&table),
        builder: BlockBuilder::new(),
        blocks: 0,
    };
    let mut count = 0;
    for entry in wire::ledger(ledger) {
        let entry = entry.map_err(|e| Error::invalid(format!("malformed ledger: {e}")))?;
        writer.push(&Entry {
            digest: entry.digest,
            stamp: Stamp { ordinal: ordinal.cast_unsigned(), tombstone: false },
            row_digest: [0; 8],
            key: entry.key,
        })?;
        count += 1;
    }
    writer.flush();
    if count != duplicates {
        return Err(Error::invalid("the ledger does not list what the books say was dropped")
            .detail(format!("{count} entries, {duplicates} duplicates.")));
    }
    Ok(())
}

/// Calls `visit` with every record that a chunk dropped, by its content and its key.
///
/// # Errors
/// XX001 for a damaged block; what `visit` returns.
pub fn for_each_dropped(run: Uuid, chunk: &str, mut visit: impl FnMut(&Entry<'_>)) -> Result<()> {
    Spi::connect(|client| {
        let blocks = client.select(
            "SELECT l.entries FROM dedup.ordinals AS o JOIN dedup.ledger_block AS l USING (ordinal) WHERE o.run_id = $1 AND o.chunk_id = $2",
            None,
            &[run.into(), chunk.into()],
        )?;
        for block in blocks {
            let bytes: Vec<u8> = required(block["entries"].value()?)?;
            let block = parse(&bytes)?;
            (0..block.len()).for_each(|i| visit(&block.entry(i)));
        }
        Ok(())
    })
}

/// Reads a row of `dedup.ledger_block`.
///
/// # Errors
/// XX001 when its bytes are damaged.
pub fn parse(entries: &[u8]) -> Result<BlockView<'_>> {
    BlockView::parse(entries).map_err(|e| Error::corrupted("a ledger block is damaged").detail(e.to_string()))
}

struct LedgerWriter<'a> {
    target: i32,
    ordinal: i64,
    rows: Inserter<'a>,
    builder: BlockBuilder,
    blocks: i32,
}

impl LedgerWriter<'_> {
    fn push(&mut self, entry: &Entry<'_>) -> Result<()> {
        let unfit = |e: BlockError| Error::invalid(format!("malformed ledger: {e}"));
        if !self.builder.try_push(entry).map_err(unfit)? {
            self.flush();
            self.builder.try_push(entry).map_err(unfit)?;
        }
        Ok(())
    }

    fn flush(&mut self) {
        pace::point();
        let Some(first) = self.builder.first_digest() else { return };
        let first = BytesDatum::new(first.as_bytes());
        let entries = BytesDatum::new(&self.builder.finish());
        self.rows.insert(&[
            self.ordinal.into(),
            self.target.into(),
            self.blocks.into(),
            first.datum(),
            entries.datum(),
        ]);
        self.blocks += 1;
    }
}
