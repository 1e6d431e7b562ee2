//! The two digests of a record.
//!
//! The *content digest* is SHA-256 over the content columns in order, each as an int32 big-endian byte length
//! (-1 for a null) and its canonical bytes. The *row digest* is the same state continued over the key columns
//! that are not content and the remaining columns. That is also how fields stand in a binary COPY tuple, so
//! neighbouring verbatim columns are hashed as one slice of the stream.
use std::ops::Range;

use sha2::{Digest as _, Sha256};

use crate::canonical::{Canonical, CanonicalError, NULL, length_of};
use crate::digest::Digest;
use crate::layout::Layout;

/// What a record is known by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct RecordDigests {
    /// Digest of the content columns: equal means duplicate.
    pub content: Digest,
    /// Digest of all columns: equal means the very same row.
    pub row: Digest,
}

/// Hashes the records of one layout.
#[derive(Debug, Clone)]
pub struct RecordHasher {
    columns: usize,
    content: Vec<Step>,
    beyond: Vec<Step>,
}

/// What is hashed next.
#[derive(Debug, Clone)]
enum Step {
    /// Neighbouring columns whose bytes, length words included, are hashed as they stand in the stream.
    Run(Range<usize>),
    /// One column that has to be made canonical.
    Column(usize, Canonical),
}

impl RecordHasher {
    /// For records of `layout`, which should be [valid](Layout::validate).
    pub fn new(layout: &Layout) -> RecordHasher {
        RecordHasher {
            columns: layout.columns.len(),
            content: steps(layout, &layout.content),
            beyond: steps(layout, &layout.beyond_content()),
        }
    }

    /// The digests of a record given by its fields in layout order.
    ///
    /// # Errors
    /// If the number of fields is not the layout's, or a field is not what its type sends.
    pub fn hash(&self, fields: &[Option<&[u8]>]) -> Result<RecordDigests, CanonicalError> {
        self.check_width(fields)?;
        self.run(|step, hasher| feed_fields(fields, step, hasher))
    }

    /// The row digest alone of a record given by its fields in layout order, for less than both cost.
    ///
    /// # Errors
    /// As [`RecordHasher::hash`].
    pub fn hash_row(&self, fields: &[Option<&[u8]>]) -> Result<Digest, CanonicalError> {
        self.check_width(fields)?;
        let mut hasher = ContentHasher::new();
        for step in self.content.iter().chain(&self.beyond) {
            feed_fields(fields, step, &mut hasher)?;
        }
        Ok(hasher.finish())
    }

    fn check_width(&self, fields: &[Option<&[u8]>]) -> Result<(), CanonicalError> {
        if fields.len() == self.columns {
            Ok(())
        } else {
            Err(CanonicalError::ColumnCount { found: fields.len(), expected: self.columns })
        }
    }

    /// The digests of a tuple in `data`, whose fields' length words stand at `offsets`; one more offset is
    /// the tuple's end. All lie within `data`, as [`crate::pgcopy::TupleScanner`] leaves them.
    pub(crate) fn hash_tuple(&self, data: &[u8], offsets: &[usize]) -> Result<RecordDigests, CanonicalError> {
        let slice = |columns: Range<usize>| {
            let (start, end) = (offsets.get(columns.start), offsets.get(columns.end));
            start.zip(end).and_then(|(start, end)| data.get(*start..*end))
        };
        self.run(|step, hasher| {
            match step {
                Step::Run(columns) => {
                    let run = slice(columns.clone()).ok_or(CanonicalError::NoSuchColumn(columns.end))?;
                    hasher.state.update(run);
                }
                Step::Column(index, canonical) => {
                    let word = slice(*index..index + 1).and_then(<[u8]>::split_first_chunk::<4>);
                    let (length, value) = word.ok_or(CanonicalError::NoSuchColumn(*index))?;
                    hasher.column((*length != NULL).then_some(value), canonical)?;
                }
            }
            Ok(())
        })
    }

    #[inline]
    fn run(
        &self,
        feed: impl Fn(&Step, &mut ContentHasher) -> Result<(), CanonicalError>,
    ) -> Result<RecordDigests, CanonicalError> {
        let mut hasher = ContentHasher::new();
        for step in &self.content {
            feed(step, &mut hasher)?;
        }
        if self.beyond.is_empty() {
            let digest = hasher.finish();
            return Ok(RecordDigests { content: digest, row: digest });
        }
        let content = hasher.clone().finish();
        for step in &self.beyond {
            feed(step, &mut hasher)?;
        }
        Ok(RecordDigests { content, row: hasher.finish() })
    }
}

/// Hashes the fields that a step is about.
fn feed_fields(
    fields: &[Option<&[u8]>],
    step: &Step,
    hasher: &mut ContentHasher,
) -> Result<(), CanonicalError> {
    let (columns, canonical) = match step {
        Step::Run(columns) => (columns.clone(), &Canonical::Verbatim),
        Step::Column(index, canonical) => (*index..index + 1, canonical),
    };
    for index in columns {
        let field = fields.get(index).ok_or(CanonicalError::NoSuchColumn(index))?;
        hasher.column(*field, canonical)?;
    }
    Ok(())
}

/// Joins neighbouring verbatim columns into runs.
fn steps(layout: &Layout, indexes: &[usize]) -> Vec<Step> {
    let mut steps: Vec<Step> = Vec::new();
    for &index in indexes {
        let canonical = layout.columns.get(index).map_or(&Canonical::Verbatim, |column| &column.canonical);
        match steps.last_mut() {
            Some(Step::Run(run)) if run.end == index && canonical.is_verbatim() => run.end += 1,
            _ if canonical.is_verbatim() => steps.push(Step::Run(index..index + 1)),
            _ => steps.push(Step::Column(index, canonical.clone())),
        }
    }
    steps
}

/// Hashes content one column after another.
#[derive(Debug, Clone, Default)]
pub struct ContentHasher {
    state: Sha256,
}

impl ContentHasher {
    /// A hasher that has seen no column.
    #[inline]
    pub fn new() -> ContentHasher {
        ContentHasher { state: Sha256::new() }
    }

    /// Adds the next column: its send bytes, `None` for a null.
    ///
    /// # Errors
    /// If the field is not what its type sends; the hasher is of no use after that.
    pub fn column(&mut self, field: Option<&[u8]>, canonical: &Canonical) -> Result<(), CanonicalError> {
        match field {
            None => {
                self.state.update(NULL);
                Ok(())
            }
            Some(field) => {
                self.state.update(length_of(field)?);
                canonical.feed(field, &mut |bytes| self.state.update(bytes))
            }
        }
    }

    /// The digest of the columns so far.
    #[inline]
    pub fn finish(self) -> Digest {
        Digest(self.state.finalize().into())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::layout::Column;
    use crate::pgcopy::{self, Scanned, TupleScanner};
    use crate::samples::{self, Value};

    fn layout_and_record() -> impl Strategy<Value = (Layout, Vec<Option<Value>>)> {
        samples::layout().prop_flat_map(|layout| {
            let record = samples::record(&layout);
            (Just(layout), record)
        })
    }

    /// The definition, written down.
    fn oracle(columns: &[usize], record: &[Option<Value>]) -> Vec<u8> {
        let mut bytes = Vec::new();
        for column in columns {
            match &record[*column] {
                None => bytes.extend((-1i32).to_be_bytes()),
                Some(value) => {
                    let canonical = value.send(0, false);
                    bytes.extend((canonical.len() as i32).to_be_bytes());
                    bytes.extend(canonical);
                }
            }
        }
        bytes
    }

    proptest! {
        #[test]
        fn fields_and_tuples_hash_as_defined((layout, record) in layout_and_record(), oid: u32, stale: bool) {
            let content = oracle(&layout.content, &record);
            let row = [content.clone(), oracle(&layout.beyond_content(), &record)].concat();
            let expected = RecordDigests {
                content: Digest(Sha256::digest(&content).into()),
                row: Digest(Sha256::digest(&row).into()),
            };

            let sent: Vec<_> = record.iter().map(|v| v.as_ref().map(|v| v.send(oid, stale))).collect();
            let fields: Vec<_> = sent.iter().map(Option::as_deref).collect();
            let hasher = RecordHasher::new(&layout);
            prop_assert_eq!(hasher.hash(&fields), Ok(expected));
            prop_assert_eq!(hasher.hash_row(&fields), Ok(expected.row));

            let mut stream = vec![0xaa; 5];
            pgcopy::write_tuple(&fields, &mut stream).unwrap();
            let mut scanner = TupleScanner::new(fields.len(), 5);
            prop_assert_eq!(scanner.advance(&stream), Ok(Scanned::Tuple));
            prop_assert_eq!(hasher.hash_tuple(&stream, scanner.offsets()), Ok(expected));

            let mut streaming = ContentHasher::new();
            for column in &layout.content {
                streaming.column(fields[*column], &layout.columns[*column].canonical).unwrap();
            }
            prop_assert_eq!(streaming.finish(), expected.content);
        }
    }

    fn verbatim(columns: usize, content: &[usize], key: &[usize], rest: &[usize]) -> Layout {
        let column = |i: usize| Column {
            name: i.to_string(),
            type_name: "text".into(),
            canonical: Canonical::Verbatim,
        };
        Layout {
            encoding_version: crate::ENCODING_VERSION,
            columns: (0..columns).map(column).collect(),
            content: content.to_vec(),
            key: key.to_vec(),
            rest: rest.to_vec(),
        }
    }

    #[test]
    fn neighbouring_verbatim_columns_are_one_run() {
        let hasher = RecordHasher::new(&verbatim(6, &[1, 2, 3, 5], &[0], &[4]));
        assert!(matches!(&hasher.content[..], [Step::Run(a), Step::Run(b)] if *a == (1..4) && *b == (5..6)));
        assert!(matches!(&hasher.beyond[..], [Step::Run(a), Step::Run(b)] if *a == (0..1) && *b == (4..5)));
    }

    /// SHA-256 of `00000003 616263 ffffffff`, and of that and `00000001 6b`, by another implementation
    /// (`sha256sum`).
    #[test]
    fn known_digests() {
        let hasher = RecordHasher::new(&verbatim(3, &[1, 2], &[0], &[]));
        let digests = hasher.hash(&[Some(b"k"), Some(b"abc"), None]).unwrap();
        assert_eq!(
            digests.content.to_string(),
            "c0ada85024ec45defae4352ed5c814bb86b7c2f8106c1970de7ed030ad43435c"
        );
        assert_eq!(
            digests.row.to_string(),
            "0063db8d43c2152dd9cb4c7ad4e81724f1dea6ea5d1b95e5f941cf06e6daa5e6"
        );
    }

    #[test]
    fn null_and_empty_differ_and_so_do_columns() {
        let hasher = RecordHasher::new(&verbatim(2, &[0, 1], &[], &[]));
        let hash = |a, b| hasher.hash(&[a, b]).unwrap().content;
        assert_ne!(hash(None, Some(b"x".as_slice())), hash(Some(b"".as_slice()), Some(b"x")));
        assert_ne!(hash(Some(b"ab"), Some(b"c")), hash(Some(b"a"), Some(b"bc")));
        assert_eq!(hash(Some(b"a"), None), hasher.hash(&[Some(b"a"), None]).unwrap().row);
    }

    #[test]
    fn wrong_records_and_layouts_are_errors() {
        let hasher = RecordHasher::new(&verbatim(2, &[0, 1], &[], &[]));
        let narrow = CanonicalError::ColumnCount { found: 1, expected: 2 };
        assert_eq!(hasher.hash(&[None]), Err(narrow.clone()));
        assert_eq!(hasher.hash_row(&[None]), Err(narrow));
        let hasher = RecordHasher::new(&verbatim(1, &[0, 7], &[], &[]));
        assert_eq!(hasher.hash(&[None]), Err(CanonicalError::NoSuchColumn(7)));
        assert!(hasher.hash_tuple(&[0; 6], &[2, 6]).is_err());
    }
}
