//! The rows of one chunk in memory.
//!
//! A batch is the chunk's COPY stream as it came, and beside it 72 bytes a row: its two digests (64) and where
//! it begins (8). [`Groups`] add 4 bytes a row and 4 a group, and 16 bytes a row while they are made.
//! So a chunk takes its bytes and at most 96 bytes a row.
use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;

use crate::canonical::CanonicalError;
use crate::checksum::Checksum;
use crate::digest::Digest;
pub use crate::groups::Groups;
use crate::key::{self, KeyError};
use crate::layout::Layout;
use crate::pgcopy::{self, PgcopyError, Scanned, TupleScanner};
use crate::record::{RecordDigests, RecordHasher};
use crate::wire::{RecordEntry, WireError};

/// A stream that is not what its layout says, or a row without a key.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BatchError {
    /// Not a binary COPY stream of such rows.
    #[error(transparent)]
    Pgcopy(#[from] PgcopyError),
    /// A field is not what its type sends.
    #[error("row {row} of the batch: {source}")]
    Record {
        /// Its number, from 0.
        row: usize,
        /// What is wrong.
        source: CanonicalError,
    },
    /// The stream ended before its trailer.
    #[error("COPY stream ended without its trailer")]
    Unfinished,
    /// Bytes after the trailer.
    #[error("extra bytes after the end of the COPY stream")]
    AfterEnd,
    /// More rows than row numbers.
    #[error("more than 4294967295 rows in one batch")]
    TooManyRows,
    /// A key column is null.
    #[error("row {row} of the batch: key column {column} is null")]
    NullKey {
        /// The row's number, from 0.
        row: usize,
        /// Index of the column in the layout.
        column: usize,
    },
    /// Key bytes cannot be made.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// Keys cannot be packed.
    #[error(transparent)]
    Wire(#[from] WireError),
}

/// Takes a binary COPY stream in pieces of any size and hashes every tuple when it is complete.
#[derive(Debug)]
pub struct BatchBuilder {
    hasher: RecordHasher,
    columns: usize,
    key: Vec<usize>,
    data: Vec<u8>,
    stage: Stage,
    starts: Vec<usize>,
    digests: Vec<RecordDigests>,
    checksum: Checksum,
}

#[derive(Debug)]
enum Stage {
    Header,
    Tuples(TupleScanner),
    Ended,
    /// An error was reported; nothing that follows can be trusted.
    Broken(BatchError),
}

impl BatchBuilder {
    /// For rows of `layout`, which should be [valid](Layout::validate). The rows of a `keyless` batch have
    /// empty keys, whatever the layout says.
    pub fn new(layout: &Layout, keyless: bool) -> BatchBuilder {
        BatchBuilder {
            hasher: RecordHasher::new(layout),
            columns: layout.columns.len(),
            key: if keyless { Vec::new() } else { layout.key.clone() },
            data: Vec::new(),
            stage: Stage::Header,
            starts: Vec::new(),
            digests: Vec::new(),
            checksum: Checksum::default(),
        }
    }

    /// As [`BatchBuilder::new`], in the memory of a batch that is done with. Faulting fresh memory in costs
    /// about half as much as hashing narrow rows does, so whoever reads chunk after chunk should do this.
    ///
    /// Memory that something else still holds (clones of [`Batch::data`], [`Groups`]) is not reused.
    pub fn reusing(batch: Batch, layout: &Layout, keyless: bool) -> BatchBuilder {
        let Batch { data, mut starts, digests, .. } = batch;
        let mut builder = BatchBuilder::new(layout, keyless);
        if let Ok(mut data) = data.try_into_mut() {
            data.clear();
            builder.data = data.into();
        }
        if let Ok(mut digests) = Arc::try_unwrap(digests) {
            digests.clear();
            builder.digests = digests;
        }
        starts.clear();
        builder.starts = starts;
        builder
    }

    /// Appends the next piece of the stream.
    ///
    /// # Errors
    /// If the stream is not a COPY stream of such rows. The error stays: every later call returns it too.
    pub fn push(&mut self, copy_data: &[u8]) -> Result<(), BatchError> {
        if let Stage::Broken(error) = &self.stage {
            return Err(error.clone());
        }
        make_room(&mut self.data, copy_data.len());
        self.data.extend_from_slice(copy_data);
        self.scan().inspect_err(|error| self.stage = Stage::Broken(error.clone()))
    }

    fn scan(&mut self) -> Result<(), BatchError> {
        if matches!(self.stage, Stage::Header) {
            let Some(header) = pgcopy::parse_header(&self.data)? else { return Ok(()) };
            self.stage = Stage::Tuples(TupleScanner::new(self.columns, header));
            self.starts.push(header);
        }
        if let Stage::Tuples(scanner) = &mut self.stage {
            loop {
                match scanner.advance(&self.data)? {
                    Scanned::Incomplete => return Ok(()),
                    Scanned::Trailer => break,
                    Scanned::Tuple => {}
                }
                let row = self.digests.len();
                if u32::try_from(row + 1).is_err() {
                    return Err(BatchError::TooManyRows);
                }
                let digests = self
                    .hasher
                    .hash_tuple(&self.data, scanner.offsets())
                    .map_err(|source| BatchError::Record { row, source })?;
                self.checksum.add(&digests.row);
                make_room(&mut self.digests, 1);
                self.digests.push(digests);
                scanner.next_tuple();
                make_room(&mut self.starts, 1);
                self.starts.push(scanner.start());
            }
            let end = scanner.start();
            self.stage = Stage::Ended;
            return if end == self.data.len() { Ok(()) } else { Err(BatchError::AfterEnd) };
        }
        // Ended before this piece came.
        match self.data.len() == self.end() {
            true => Ok(()),
            false => Err(BatchError::AfterEnd),
        }
    }

    /// Where the stream ends if the trailer follows the last tuple.
    fn end(&self) -> usize {
        self.starts.last().map_or(0, |start| start + pgcopy::trailer().len())
    }

    /// Bytes of the stream so far.
    pub fn bytes(&self) -> usize {
        self.data.len()
    }

    /// Complete rows so far.
    pub fn rows(&self) -> usize {
        self.digests.len()
    }

    /// The batch, once the whole stream is in it.
    ///
    /// # Errors
    /// The error that [`BatchBuilder::push`] returned, or [`BatchError::Unfinished`].
    pub fn finish(self) -> Result<Batch, BatchError> {
        match self.stage {
            Stage::Ended => Ok(Batch {
                key: self.key,
                data: Bytes::from(self.data),
                starts: self.starts,
                digests: Arc::new(self.digests),
                checksum: self.checksum,
            }),
            Stage::Broken(error) => Err(error),
            Stage::Header | Stage::Tuples(_) => Err(BatchError::Unfinished),
        }
    }
}

/// Room for more at the end, an eighth at a time: doubling would leave a batch up to twice its size, and the allocator moves
/// large blocks without copying them.
fn make_room<T>(vec: &mut Vec<T>, more: usize) {
    const LEAST: usize = 4096;
    if vec.capacity() - vec.len() < more {
        vec.reserve_exact(more.max(vec.len() / 8).max(LEAST));
    }
}

/// The rows of one chunk, hashed.
#[derive(Debug, Clone)]
pub struct Batch {
    key: Vec<usize>,
    data: Bytes,
    /// Where each row begins, and where the last one ends.
    starts: Vec<usize>,
    /// Shared with the groups, which outlive a borrow of the batch.
    digests: Arc<Vec<RecordDigests>>,
    checksum: Checksum,
}

impl Batch {
    /// How many rows there are.
    pub fn len(&self) -> usize {
        self.digests.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.digests.is_empty()
    }

    /// The COPY stream as it came, header and trailer included.
    pub fn data(&self) -> &Bytes {
        &self.data
    }

    /// Where in [`Batch::data`] row `i` stands: its tuple with the field count, ready to be sent on in
    /// another COPY stream.
    ///
    /// # Panics
    /// If there is no row `i`.
    #[inline]
    pub fn row_range(&self, i: usize) -> Range<usize> {
        self.starts[i]..self.starts[i + 1]
    }

    /// The tuple of row `i`.
    ///
    /// # Panics
    /// If there is no row `i`.
    #[inline]
    pub fn row_bytes(&self, i: usize) -> &[u8] {
        &self.data[self.row_range(i)]
    }

    /// The digests of row `i`.
    ///
    /// # Panics
    /// If there is no row `i`.
    #[inline]
    pub fn digests(&self, i: usize) -> &RecordDigests {
        &self.digests[i]
    }

    /// The key bytes of row `i`; empty if the batch is keyless.
    ///
    /// # Errors
    /// [`BatchError::NullKey`] if one of its key columns is null.
    ///
    /// # Panics
    /// If there is no row `i`.
    pub fn key(&self, i: usize) -> Result<Vec<u8>, BatchError> {
        let mut key = Vec::new();
        self.key_into(i, &mut key)?;
        Ok(key)
    }

    /// Appends the key bytes of row `i` to `out`: [`Batch::key`] for loops.
    ///
    /// # Errors
    /// As [`Batch::key`]; `out` is then unchanged.
    ///
    /// # Panics
    /// If there is no row `i`.
    pub fn key_into(&self, i: usize, out: &mut Vec<u8>) -> Result<(), BatchError> {
        let row = self.row_bytes(i);
        if let [column] = *self.key {
            out.extend_from_slice(key_column(row, i, column)?);
            return Ok(());
        }
        let columns: Vec<&[u8]> =
            self.key.iter().map(|&column| key_column(row, i, column)).collect::<Result<_, _>>()?;
        Ok(key::encode(&columns, out)?)
    }

    /// Every record's digests and key, packed for reconciliation.
    ///
    /// # Errors
    /// If a key is too long to be one.
    pub fn packed_records(&self) -> Result<Vec<u8>, BatchError> {
        let mut packed = Vec::with_capacity(self.len() * (2 * Digest::LEN + 16));
        let mut key = Vec::new();
        for (i, digests) in self.digests.iter().enumerate() {
            key.clear();
            let key = match self.key_into(i, &mut key) {
                Ok(()) => Some(&*key),
                Err(BatchError::NullKey { .. }) => None,
                Err(error) => return Err(error),
            };
            RecordEntry { content: digests.content, row: digests.row, key }.encode(&mut packed)?;
        }
        Ok(packed)
    }

    /// Sum of all row digests.
    pub fn checksum(&self) -> Checksum {
        self.checksum
    }

    /// The rows grouped by content. Sorts them; keep what it returns.
    pub fn groups(&self) -> Groups {
        Groups::new(&self.digests)
    }
}

/// The value of one key column in the tuple of row `i`.
fn key_column(tuple: &[u8], i: usize, column: usize) -> Result<&[u8], BatchError> {
    pgcopy::field(tuple, column)?.ok_or(BatchError::NullKey { row: i, column })
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;
    use proptest::sample::Index;

    use super::*;
    use crate::samples;

    type Record = Vec<Option<Vec<u8>>>;

    fn layout_and_records() -> impl Strategy<Value = (Layout, Vec<Record>)> {
        samples::layout().prop_flat_map(|layout| {
            let sent = |record: Vec<Option<samples::Value>>| -> Record {
                record.into_iter().map(|value| value.map(|value| value.send(77, true))).collect()
            };
            let records = vec(samples::record(&layout).prop_map(sent), 0..6);
            (Just(layout), records)
        })
    }

    fn stream(records: &[Record]) -> Vec<u8> {
        let mut stream = pgcopy::header().to_vec();
        for record in records {
            let fields: Vec<_> = record.iter().map(Option::as_deref).collect();
            pgcopy::write_tuple(&fields, &mut stream).unwrap();
        }
        stream.extend(pgcopy::trailer());
        stream
    }

    fn fill(mut builder: BatchBuilder, stream: &[u8], cuts: &[Index]) -> Result<Batch, BatchError> {
        let mut cuts: Vec<usize> = cuts.iter().map(|cut| cut.index(stream.len() + 1)).collect();
        cuts.extend([0, stream.len()]);
        cuts.sort_unstable();
        for pair in cuts.windows(2) {
            builder.push(&stream[pair[0]..pair[1]])?;
            assert_eq!(builder.bytes(), pair[1]);
        }
        builder.finish()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(100))]

        #[test]
        fn any_split_gives_the_same_batch(
            (layout, records) in layout_and_records(),
            cuts in vec(any::<Index>(), 0..40),
        ) {
            let stream = stream(&records);
            let batch = fill(BatchBuilder::new(&layout, false), &stream, &cuts).unwrap();
            prop_assert_eq!(batch.len(), records.len());
            prop_assert_eq!(&batch.data()[..], &stream[..]);
            let hasher = RecordHasher::new(&layout);
            let mut checksum = Checksum::default();
            for (i, record) in records.iter().enumerate() {
                let fields: Vec<_> = record.iter().map(Option::as_deref).collect();
                let digests = hasher.hash(&fields).unwrap();
                prop_assert_eq!(batch.digests(i), &digests);
                checksum.add(&digests.row);

                let mut tuple = Vec::new();
                pgcopy::write_tuple(&fields, &mut tuple).unwrap();
                prop_assert_eq!(batch.row_bytes(i), &tuple[..]);

                let null = layout.key.iter().find(|column| fields[**column].is_none());
                match null {
                    Some(column) => {
                        prop_assert_eq!(batch.key(i), Err(BatchError::NullKey { row: i, column: *column }));
                    }
                    None => {
                        let columns: Vec<_> = layout.key.iter().filter_map(|column| fields[*column]).collect();
                        let mut key = Vec::new();
                        key::encode(&columns, &mut key).unwrap();
                        prop_assert_eq!(batch.key(i), Ok(key));
                    }
                }
            }
            prop_assert_eq!(batch.checksum(), checksum);

            // The same memory again for all rows but the first, without keys.
            let (digests, rows) = (batch.digests.to_vec(), batch.clone());
            let shorter = self::stream(records.get(1..).unwrap_or_default());
            let again = fill(BatchBuilder::reusing(batch, &layout, true), &shorter, &cuts).unwrap();
            prop_assert_eq!(&again.digests[..], digests.get(1..).unwrap_or_default());
            for i in 0..again.len() {
                prop_assert_eq!(again.row_bytes(i), rows.row_bytes(i + 1));
                prop_assert_eq!(again.key(i), Ok(Vec::new()));
            }
        }

        #[test]
        fn a_stream_cut_short_is_unfinished((layout, records) in layout_and_records(), cut: Index) {
            let stream = stream(&records);
            let short = &stream[..cut.index(stream.len())];
            let batch = fill(BatchBuilder::new(&layout, false), short, &[]);
            prop_assert_eq!(batch.err(), Some(BatchError::Unfinished));
        }

        #[test]
        fn damage_is_an_error_or_another_batch(
            (layout, records) in layout_and_records(),
            damage in (any::<Index>(), any::<u8>()),
            cuts in vec(any::<Index>(), 0..9),
        ) {
            let mut stream = stream(&records);
            let at = damage.0.index(stream.len());
            stream[at] = damage.1;
            let whole = fill(BatchBuilder::new(&layout, false), &stream, &[]);
            let pieces = fill(BatchBuilder::new(&layout, false), &stream, &cuts);
            prop_assert_eq!(whole.map(|b| b.digests), pieces.map(|b| b.digests));
        }
    }

    fn one_column() -> Layout {
        serde_json::from_str(
            r#"{"encoding_version":1,"columns":[{"name":"a","type_name":"int[]","canonical":{"array":"verbatim"}}],
                "content":[0],"key":[0],"rest":[]}"#,
        )
        .unwrap()
    }

    #[test]
    fn nothing_comes_after_the_end() {
        let mut builder = BatchBuilder::new(&one_column(), false);
        builder.push(&stream(&[])).unwrap();
        builder.push(&[]).unwrap();
        assert_eq!(builder.push(&[0]), Err(BatchError::AfterEnd));
        assert_eq!(builder.push(&[]), Err(BatchError::AfterEnd));
        assert_eq!(builder.finish().err(), Some(BatchError::AfterEnd));
        let glued = [stream(&[]), vec![1]].concat();
        assert_eq!(BatchBuilder::new(&one_column(), false).push(&glued), Err(BatchError::AfterEnd));
    }

    #[test]
    fn a_malformed_field_names_its_row() {
        let good = [0u8; 12].to_vec();
        let stream = stream(&[vec![Some(good)], vec![None], vec![Some(vec![1])]]);
        let mut builder = BatchBuilder::new(&one_column(), false);
        let error = BatchError::Record { row: 2, source: CanonicalError::Malformed("array") };
        assert_eq!(builder.push(&stream), Err(error.clone()));
        assert_eq!(builder.rows(), 2);
        assert_eq!(builder.finish().err(), Some(error));
    }

    #[test]
    fn memory_is_reused_unless_held() {
        let layout = one_column();
        let records = vec![vec![Some([0u8; 12].to_vec())]; 1000];
        let batch = fill(BatchBuilder::new(&layout, false), &stream(&records), &[]).unwrap();
        let (held, groups) = (batch.data().clone(), batch.groups());
        assert_eq!((groups.len(), groups.members(0).len()), (1, 1000));
        let builder = BatchBuilder::reusing(batch, &layout, false);
        assert_eq!((builder.bytes(), builder.rows()), (0, 0));
        assert_eq!((builder.data.capacity(), builder.digests.capacity()), (0, 0));
        assert_eq!(held.len(), stream(&records).len());

        let batch = fill(builder, &stream(&records), &[]).unwrap();
        let builder = BatchBuilder::reusing(batch, &layout, false);
        assert!(builder.data.capacity() >= held.len() && builder.digests.capacity() >= 1000);
    }
}
