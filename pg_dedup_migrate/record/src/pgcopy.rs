//! PostgreSQL's binary COPY format.
//!
//! ```text
//! header   PGCOPY\n\377\r\n\0 · int32 flags · int32 length of extension, extension
//! tuple    int16 fields · per field: int32 length or -1, bytes
//! trailer  int16 -1
//! ```
use std::ops::Range;

const SIGNATURE: &[u8; 11] = b"PGCOPY\n\xff\r\n\0";
const HEADER: [u8; HEADER_LEN] = *b"PGCOPY\n\xff\r\n\0\0\0\0\0\0\0\0\0";
const HEADER_LEN: usize = SIGNATURE.len() + 8;
/// Flags that a reader must understand; none is in use since OIDs went out with PostgreSQL 12.
const CRITICAL_FLAGS: u32 = 0xffff_0000;
const TRAILER: [u8; 2] = (-1i16).to_be_bytes();

/// A stream or a tuple that is not binary COPY data.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PgcopyError {
    /// The stream begins with something else.
    #[error("COPY data does not begin with the binary signature")]
    Signature,
    /// Flags that this reader does not know and must not ignore.
    #[error("unrecognized critical flags {0:#010x} in COPY header")]
    Flags(u32),
    /// The header's extension has a negative length.
    #[error("invalid COPY header")]
    Header,
    /// A tuple of another width than expected.
    #[error("COPY tuple has {found} fields, expected {expected}")]
    FieldCount {
        /// Its field count.
        found: i16,
        /// Columns of the layout.
        expected: usize,
    },
    /// A negative length other than that of a null.
    #[error("invalid length {0} of a COPY field")]
    FieldLength(i32),
    /// The bytes end before the tuple does.
    #[error("COPY tuple is truncated")]
    Truncated,
    /// The bytes go on after the tuple.
    #[error("extra bytes after COPY tuple")]
    TrailingBytes,
    /// More fields or longer ones than the format can say.
    #[error("record is too large for a COPY tuple")]
    TooLarge,
}

/// The header that begins a stream.
pub fn header() -> &'static [u8] {
    &HEADER
}

/// The trailer that ends it.
pub fn trailer() -> &'static [u8] {
    &TRAILER
}

/// Length of the header that `data` begins with; `None` if there is not enough of it yet.
///
/// # Errors
/// If it is not the header of a binary COPY stream.
pub fn parse_header(data: &[u8]) -> Result<Option<usize>, PgcopyError> {
    if !data.iter().zip(SIGNATURE).all(|(found, expected)| found == expected) {
        return Err(PgcopyError::Signature);
    }
    let words = data.get(SIGNATURE.len()..HEADER_LEN).map(|words| words.as_chunks::<4>().0);
    let Some([flags, extension]) = words else { return Ok(None) };
    let flags = u32::from_be_bytes(*flags);
    if flags & CRITICAL_FLAGS != 0 {
        return Err(PgcopyError::Flags(flags));
    }
    let extension = usize::try_from(i32::from_be_bytes(*extension)).map_err(|_| PgcopyError::Header)?;
    let length = HEADER_LEN + extension;
    Ok((length <= data.len()).then_some(length))
}

/// Puts the ranges of a tuple's fields within `data` into `fields`, `None` for nulls. `data` is one whole
/// tuple and nothing else.
///
/// # Errors
/// If it is not.
pub fn parse_tuple(data: &[u8], fields: &mut Vec<Option<Range<usize>>>) -> Result<(), PgcopyError> {
    fields.clear();
    let count = i16::from_be_bytes(read(data, 0).ok_or(PgcopyError::Truncated)?);
    if count < 0 {
        return Err(PgcopyError::FieldCount { found: count, expected: 0 });
    }
    let mut at = 2;
    for _ in 0..count {
        let length = read(data, at).ok_or(PgcopyError::Truncated)?;
        let end = field_end(at, length)?;
        if end > data.len() {
            return Err(PgcopyError::Truncated);
        }
        fields.push((i32::from_be_bytes(length) >= 0).then_some(at + 4..end));
        at = end;
    }
    if at == data.len() { Ok(()) } else { Err(PgcopyError::TrailingBytes) }
}

/// The value of field `index` of a tuple that `data` begins with, `None` for a null. Fields behind it are not
/// looked at.
///
/// # Errors
/// If the tuple has no such field, or ends before it.
pub fn field(data: &[u8], index: usize) -> Result<Option<&[u8]>, PgcopyError> {
    let count = i16::from_be_bytes(read(data, 0).ok_or(PgcopyError::Truncated)?);
    if usize::try_from(count).is_ok_and(|count| index < count) {
        let mut at = 2;
        for _ in 0..index {
            at = field_end(at, read(data, at).ok_or(PgcopyError::Truncated)?)?;
        }
        let length = read(data, at).ok_or(PgcopyError::Truncated)?;
        let value = data.get(at + 4..field_end(at, length)?).ok_or(PgcopyError::Truncated)?;
        return Ok((i32::from_be_bytes(length) >= 0).then_some(value));
    }
    Err(PgcopyError::FieldCount { found: count, expected: index + 1 })
}

/// Appends a tuple of `fields` to `out`.
///
/// # Errors
/// [`PgcopyError::TooLarge`] for more than 32767 fields or one of 2 GiB; `out` is then unchanged.
pub fn write_tuple(fields: &[Option<&[u8]>], out: &mut Vec<u8>) -> Result<(), PgcopyError> {
    let count = i16::try_from(fields.len()).map_err(|_| PgcopyError::TooLarge)?;
    if fields.iter().flatten().any(|field| i32::try_from(field.len()).is_err()) {
        return Err(PgcopyError::TooLarge);
    }
    out.extend_from_slice(&count.to_be_bytes());
    for field in fields {
        let length = field.map_or(-1, |field| field.len() as i32);
        out.extend_from_slice(&length.to_be_bytes());
        out.extend_from_slice(field.unwrap_or_default());
    }
    Ok(())
}

/// Finds tuples in a stream that grows: it goes on where it ran out of bytes, so a wide tuple that comes in
/// many pieces is still walked once.
#[derive(Debug, Clone)]
pub struct TupleScanner {
    columns: usize,
    /// Where the next tuple begins.
    at: usize,
    /// Of the tuple at hand: where its fields' length words stand, then its end. Empty before its field
    /// count has been read; the last one may lie beyond the bytes that are there.
    offsets: Vec<usize>,
}

/// What [`TupleScanner::advance`] came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scanned {
    /// A whole tuple; its fields are at [`TupleScanner::offsets`].
    Tuple,
    /// The end of the stream.
    Trailer,
    /// More bytes are needed.
    Incomplete,
}

impl TupleScanner {
    /// For tuples of `columns` fields, the first of them at `at`.
    pub fn new(columns: usize, at: usize) -> TupleScanner {
        TupleScanner { columns, at, offsets: Vec::with_capacity(columns.saturating_add(1).min(1 << 11)) }
    }

    /// Scans on in `data`, the whole stream so far. After a tuple, call [`TupleScanner::next_tuple`].
    ///
    /// # Errors
    /// If what stands there is not a tuple of so many fields.
    #[inline]
    pub fn advance(&mut self, data: &[u8]) -> Result<Scanned, PgcopyError> {
        let mut end = match self.offsets.last() {
            Some(end) => *end,
            None => {
                let Some(count) = read(data, self.at) else { return Ok(Scanned::Incomplete) };
                if count == TRAILER {
                    self.at += TRAILER.len();
                    return Ok(Scanned::Trailer);
                }
                let found = i16::from_be_bytes(count);
                if usize::try_from(found) != Ok(self.columns) {
                    return Err(PgcopyError::FieldCount { found, expected: self.columns });
                }
                self.offsets.push(self.at + 2);
                self.at + 2
            }
        };
        while self.offsets.len() <= self.columns {
            let Some(length) = read(data, end) else { return Ok(Scanned::Incomplete) };
            end = field_end(end, length)?;
            self.offsets.push(end);
        }
        Ok(if end <= data.len() { Scanned::Tuple } else { Scanned::Incomplete })
    }

    /// Where the tuple at hand begins.
    #[inline]
    pub fn start(&self) -> usize {
        self.at
    }

    /// Where the tuple's fields begin, length words included, and after them its end.
    #[inline]
    pub fn offsets(&self) -> &[usize] {
        &self.offsets
    }

    /// Leaves the tuple at hand for the one behind it.
    #[inline]
    pub fn next_tuple(&mut self) {
        if let Some(end) = self.offsets.last() {
            self.at = *end;
        }
        self.offsets.clear();
    }
}

#[inline]
fn read<const N: usize>(data: &[u8], at: usize) -> Option<[u8; N]> {
    data.get(at..)?.first_chunk::<N>().copied()
}

/// Where a field ends whose length word stands at `at`.
#[inline]
fn field_end(at: usize, length: [u8; 4]) -> Result<usize, PgcopyError> {
    match i32::from_be_bytes(length) {
        -1 => Ok(at + 4),
        length => match usize::try_from(length) {
            Ok(length) => Ok(at + 4 + length),
            Err(_) => Err(PgcopyError::FieldLength(length)),
        },
    }
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::option;
    use proptest::prelude::*;

    use super::*;

    fn fields() -> impl Strategy<Value = Vec<Option<Vec<u8>>>> {
        vec(option::of(vec(any::<u8>(), 0..20)), 0..6)
    }

    fn tuple(fields: &[Option<Vec<u8>>]) -> Vec<u8> {
        let fields: Vec<_> = fields.iter().map(Option::as_deref).collect();
        let mut out = Vec::new();
        write_tuple(&fields, &mut out).unwrap();
        out
    }

    proptest! {
        #[test]
        fn tuple_and_back(fields in fields()) {
            let tuple = tuple(&fields);
            let mut ranges = vec![Some(3..5)];
            prop_assert_eq!(parse_tuple(&tuple, &mut ranges), Ok(()));
            let parsed: Vec<_> = ranges.iter().map(|r| r.clone().map(|r| tuple[r].to_vec())).collect();
            prop_assert_eq!(&parsed, &fields);
            for (index, value) in fields.iter().enumerate() {
                prop_assert_eq!(field(&tuple, index), Ok(value.as_deref()));
            }
            prop_assert!(field(&tuple, fields.len()).is_err());
            for cut in 0..tuple.len() {
                prop_assert_eq!(parse_tuple(&tuple[..cut], &mut ranges), Err(PgcopyError::Truncated));
            }
            prop_assert_eq!(
                parse_tuple(&[&tuple[..], &[0]].concat(), &mut ranges),
                Err(PgcopyError::TrailingBytes)
            );
        }

        #[test]
        fn scanner_takes_one_byte_at_a_time(fields in fields()) {
            let mut stream = tuple(&fields);
            let end = stream.len();
            stream.extend(trailer());
            let mut scanner = TupleScanner::new(fields.len(), 0);
            for length in 0..end {
                prop_assert_eq!(scanner.advance(&stream[..length]), Ok(Scanned::Incomplete));
            }
            prop_assert_eq!(scanner.advance(&stream[..end]), Ok(Scanned::Tuple));
            prop_assert_eq!(scanner.offsets().len(), fields.len() + 1);
            prop_assert_eq!(scanner.offsets().last(), Some(&end));
            scanner.next_tuple();
            prop_assert_eq!(scanner.start(), end);
            prop_assert_eq!(scanner.advance(&stream[..end + 1]), Ok(Scanned::Incomplete));
            prop_assert_eq!(scanner.advance(&stream), Ok(Scanned::Trailer));
            prop_assert_eq!(scanner.start(), stream.len());
        }

        #[test]
        fn garbage_never_panics(data in vec(any::<u8>(), 0..60), columns in 0usize..4) {
            let mut fields = Vec::new();
            let _ = parse_header(&data);
            let _ = parse_tuple(&data, &mut fields);
            let _ = field(&data, columns);
            let mut scanner = TupleScanner::new(columns, 0);
            while scanner.advance(&data) == Ok(Scanned::Tuple) {
                scanner.next_tuple();
            }
            prop_assert!(scanner.start() <= data.len());
        }
    }

    #[test]
    fn header_in_pieces() {
        let mut stream = header().to_vec();
        stream[18] = 3;
        stream.extend([1, 2, 3]);
        for length in 0..stream.len() {
            assert_eq!(parse_header(&stream[..length]), Ok(None));
        }
        assert_eq!(parse_header(&stream), Ok(Some(22)));
        stream[18] = 0;
        assert_eq!(parse_header(&stream), Ok(Some(19)));
    }

    #[test]
    fn foreign_headers_are_refused_early() {
        assert_eq!(parse_header(b"PGCOPX"), Err(PgcopyError::Signature));
        let with = |at: usize, byte| {
            let mut stream = header().to_vec();
            stream[at] = byte;
            parse_header(&stream)
        };
        assert_eq!(with(12, 1), Err(PgcopyError::Flags(0x1_0000)));
        assert_eq!(with(14, 1), Ok(Some(19)));
        assert_eq!(with(15, 0x80), Err(PgcopyError::Header));
    }

    #[test]
    fn tuples_of_another_width_are_refused() {
        let tuple = tuple(&[None, None]);
        let wrong = PgcopyError::FieldCount { found: 2, expected: 3 };
        assert_eq!(TupleScanner::new(3, 0).advance(&tuple), Err(wrong));
        let mut negative = tuple;
        negative[5] = 0xfe;
        assert_eq!(TupleScanner::new(2, 0).advance(&negative), Err(PgcopyError::FieldLength(-2)));
    }
}
