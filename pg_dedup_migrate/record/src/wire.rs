//! Packed arguments of the worker protocol. All integers are big-endian.
//!
//! ```text
//! digests      32 bytes each, strictly ascending
//! row digests  32 bytes each, in the order of the keys they go with
//! keys         u32 length, key bytes
//! manifest     digest[32] · row digest[8] · u32 length, key bytes      strictly ascending by digest
//! ledger       digest[32] · u32 length, source key bytes               by digest, then key bytes
//! records      content digest[32] · row digest[32] · u32 length, key bytes; length 2^32 - 1: a key column is null     in any order
//! ```
//!
//! Decoding checks order and length as it goes. An iterator ends after its first error.
use crate::digest::Digest;

/// A packed list that is not what it should be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// The list ends within an entry.
    #[error("packed {list} is truncated in entry {entry}")]
    Truncated {
        /// Which list.
        list: &'static str,
        /// Entries before the one that is cut off.
        entry: usize,
    },
    /// An entry that does not come after the one before it.
    #[error("packed {list} is not sorted at entry {entry}")]
    Unsorted {
        /// Which list.
        list: &'static str,
        /// Entries before the one out of order.
        entry: usize,
    },
    /// Key bytes of 4 GiB or more.
    #[error("key of {0} bytes is too long")]
    KeyTooLong(usize),
}

/// A row inserted or updated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ManifestEntry<'a> {
    /// Content digest.
    pub digest: Digest,
    /// First bytes of the row digest.
    pub row_digest: [u8; Digest::SHORT_LEN],
    /// Key bytes in the target; empty for a keyless table.
    pub key: &'a [u8],
}

/// A duplicate that was not written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LedgerEntry<'a> {
    /// Content digest.
    pub digest: Digest,
    /// Key bytes in the source; empty for a keyless table.
    pub key: &'a [u8],
}

/// A record of the source, as reconciliation compares it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RecordEntry<'a> {
    /// Content digest.
    pub content: Digest,
    /// Row digest.
    pub row: Digest,
    /// Key bytes; empty for a keyless table, `None` where a key column is null.
    pub key: Option<&'a [u8]>,
}

/// Stands for the length of a key that is not there.
const NO_KEY: u32 = u32::MAX;

impl RecordEntry<'_> {
    /// Appends the packed entry to `out`.
    ///
    /// # Errors
    /// [`WireError::KeyTooLong`]; `out` is then unchanged.
    pub fn encode(&self, out: &mut Vec<u8>) -> Result<(), WireError> {
        let length = match self.key {
            Some(key) => key_length(key)?,
            None => NO_KEY.to_be_bytes(),
        };
        out.extend_from_slice(&self.content.0);
        out.extend_from_slice(&self.row.0);
        out.extend_from_slice(&length);
        out.extend_from_slice(self.key.unwrap_or_default());
        Ok(())
    }
}

impl ManifestEntry<'_> {
    /// Appends the packed entry to `out`.
    ///
    /// # Errors
    /// [`WireError::KeyTooLong`]; `out` is then unchanged.
    pub fn encode(&self, out: &mut Vec<u8>) -> Result<(), WireError> {
        let length = key_length(self.key)?;
        out.extend_from_slice(&self.digest.0);
        out.extend_from_slice(&self.row_digest);
        out.extend_from_slice(&length);
        out.extend_from_slice(self.key);
        Ok(())
    }
}

impl LedgerEntry<'_> {
    /// Appends the packed entry to `out`.
    ///
    /// # Errors
    /// [`WireError::KeyTooLong`]; `out` is then unchanged.
    pub fn encode(&self, out: &mut Vec<u8>) -> Result<(), WireError> {
        let length = key_length(self.key)?;
        out.extend_from_slice(&self.digest.0);
        out.extend_from_slice(&length);
        out.extend_from_slice(self.key);
        Ok(())
    }
}

/// Appends one key of a list of keys to `out`.
///
/// # Errors
/// [`WireError::KeyTooLong`]; `out` is then unchanged.
pub fn encode_key(key: &[u8], out: &mut Vec<u8>) -> Result<(), WireError> {
    out.extend_from_slice(&key_length(key)?);
    out.extend_from_slice(key);
    Ok(())
}

fn key_length(key: &[u8]) -> Result<[u8; 4], WireError> {
    let too_long = WireError::KeyTooLong(key.len());
    let length = u32::try_from(key.len()).ok().filter(|&length| length != NO_KEY).ok_or(too_long)?;
    Ok(length.to_be_bytes())
}

/// The digests of a sorted list without duplicates.
///
/// # Errors
/// If its length is not a multiple of 32, or it is not strictly ascending.
pub fn digests(data: &[u8]) -> Result<&[[u8; Digest::LEN]], WireError> {
    let list = "digest list";
    let digests = unsorted(list, data)?;
    match digests.is_sorted_by(|a, b| a < b) {
        true => Ok(digests),
        false => {
            let ordered = digests.windows(2).take_while(|pair| pair[0] < pair[1]).count();
            Err(WireError::Unsorted { list, entry: ordered + 1 })
        }
    }
}

/// The row digests that go with a list of keys, in its order.
///
/// # Errors
/// If the length is not a multiple of 32.
pub fn row_digests(data: &[u8]) -> Result<&[[u8; Digest::LEN]], WireError> {
    unsorted("row digest list", data)
}

fn unsorted<'a>(list: &'static str, data: &'a [u8]) -> Result<&'a [[u8; Digest::LEN]], WireError> {
    match data.as_chunks() {
        (digests, []) => Ok(digests),
        (digests, _) => Err(WireError::Truncated { list, entry: digests.len() }),
    }
}

/// The keys of a packed list.
pub fn keys(data: &[u8]) -> Keys<'_> {
    Keys { reader: Reader { list: "key list", rest: data, entry: 0 } }
}

/// The entries of a packed manifest.
pub fn manifest(data: &[u8]) -> Manifest<'_> {
    Manifest { reader: Reader { list: "manifest", rest: data, entry: 0 }, last: None }
}

/// The entries of a packed ledger.
pub fn ledger(data: &[u8]) -> Ledger<'_> {
    Ledger { reader: Reader { list: "ledger", rest: data, entry: 0 }, last: None }
}

/// The entries of a packed list of records.
pub fn records(data: &[u8]) -> Records<'_> {
    Records { reader: Reader { list: "record list", rest: data, entry: 0 } }
}

/// Iterator of [`records`].
#[derive(Debug, Clone)]
pub struct Records<'a> {
    reader: Reader<'a>,
}

impl<'a> Iterator for Records<'a> {
    type Item = Result<RecordEntry<'a>, WireError>;

    fn next(&mut self) -> Option<Self::Item> {
        self.reader.entry(|reader| {
            let (content, row) = (Digest(reader.array()?), Digest(reader.array()?));
            let key = match reader.rest.first_chunk::<4>() {
                Some(length) if u32::from_be_bytes(*length) == NO_KEY => {
                    reader.array::<4>()?;
                    None
                }
                _ => Some(reader.key()?),
            };
            Ok(RecordEntry { content, row, key })
        })
    }
}

/// Iterator of [`keys`].
#[derive(Debug, Clone)]
pub struct Keys<'a> {
    reader: Reader<'a>,
}

/// Iterator of [`manifest`].
#[derive(Debug, Clone)]
pub struct Manifest<'a> {
    reader: Reader<'a>,
    last: Option<Digest>,
}

/// Iterator of [`ledger`].
#[derive(Debug, Clone)]
pub struct Ledger<'a> {
    reader: Reader<'a>,
    last: Option<LedgerEntry<'a>>,
}

impl<'a> Iterator for Keys<'a> {
    type Item = Result<&'a [u8], WireError>;

    fn next(&mut self) -> Option<Self::Item> {
        self.reader.entry(Reader::key)
    }
}

impl<'a> Iterator for Manifest<'a> {
    type Item = Result<ManifestEntry<'a>, WireError>;

    fn next(&mut self) -> Option<Self::Item> {
        let last = &mut self.last;
        self.reader.entry(|reader| {
            let digest = Digest(reader.array()?);
            let row_digest = reader.array()?;
            let key = reader.key()?;
            if last.is_some_and(|last| digest <= last) {
                return Err(reader.unsorted());
            }
            *last = Some(digest);
            Ok(ManifestEntry { digest, row_digest, key })
        })
    }
}

impl<'a> Iterator for Ledger<'a> {
    type Item = Result<LedgerEntry<'a>, WireError>;

    fn next(&mut self) -> Option<Self::Item> {
        let last = &mut self.last;
        self.reader.entry(|reader| {
            let digest = Digest(reader.array()?);
            let key = reader.key()?;
            if last.is_some_and(|last| (digest, key) < (last.digest, last.key)) {
                return Err(reader.unsorted());
            }
            let entry = LedgerEntry { digest, key };
            *last = Some(entry);
            Ok(entry)
        })
    }
}

impl std::iter::FusedIterator for Keys<'_> {}
impl std::iter::FusedIterator for Manifest<'_> {}
impl std::iter::FusedIterator for Ledger<'_> {}
impl std::iter::FusedIterator for Records<'_> {}

/// Reads a packed list front to back.
#[derive(Debug, Clone)]
struct Reader<'a> {
    list: &'static str,
    rest: &'a [u8],
    entry: usize,
}

impl<'a> Reader<'a> {
    /// The next entry as `read` reads it; nothing more after an error.
    fn entry<T>(
        &mut self,
        read: impl FnOnce(&mut Self) -> Result<T, WireError>,
    ) -> Option<Result<T, WireError>> {
        if self.rest.is_empty() {
            return None;
        }
        let result = read(self);
        match result {
            Ok(_) => self.entry += 1,
            Err(_) => self.rest = &[],
        }
        Some(result)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], WireError> {
        let (head, rest) = self.rest.split_first_chunk::<N>().ok_or(self.truncated())?;
        self.rest = rest;
        Ok(*head)
    }

    fn key(&mut self) -> Result<&'a [u8], WireError> {
        let length = u32::from_be_bytes(self.array()?);
        let length = usize::try_from(length).map_err(|_| self.truncated())?;
        let (key, rest) = self.rest.split_at_checked(length).ok_or(self.truncated())?;
        self.rest = rest;
        Ok(key)
    }

    fn truncated(&self) -> WireError {
        WireError::Truncated { list: self.list, entry: self.entry }
    }

    fn unsorted(&self) -> WireError {
        WireError::Unsorted { list: self.list, entry: self.entry }
    }
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    type Row = ([u8; 32], [u8; 8], Vec<u8>);

    fn rows() -> impl Strategy<Value = Vec<Row>> {
        // Few first bytes, so that digests meet.
        let digest = (0u8..6).prop_map(|first| {
            let mut digest = [7; 32];
            digest[0] = first;
            digest
        });
        vec((digest, any::<[u8; 8]>(), vec(0u8..3, 0..5)), 0..8)
    }

    fn packed_manifest(rows: &[Row]) -> Vec<u8> {
        let mut out = Vec::new();
        for (digest, row_digest, key) in rows {
            let entry = ManifestEntry { digest: Digest(*digest), row_digest: *row_digest, key };
            entry.encode(&mut out).unwrap();
        }
        out
    }

    fn packed_ledger(rows: &[Row]) -> Vec<u8> {
        let mut out = Vec::new();
        for (digest, _, key) in rows {
            LedgerEntry { digest: Digest(*digest), key }.encode(&mut out).unwrap();
        }
        out
    }

    proptest! {
        #[test]
        fn manifest_and_back(rows in rows()) {
            let packed = packed_manifest(&rows);
            let read: Result<Vec<Row>, _> = manifest(&packed)
                .map(|entry| entry.map(|e| (e.digest.0, e.row_digest, e.key.to_vec())))
                .collect();
            match rows.windows(2).position(|pair| pair[0].0 >= pair[1].0) {
                None => prop_assert_eq!(read, Ok(rows)),
                Some(i) => prop_assert_eq!(read, Err(WireError::Unsorted { list: "manifest", entry: i + 1 })),
            }
        }

        #[test]
        fn ledger_and_back(rows in rows()) {
            let packed = packed_ledger(&rows);
            let read: Result<Vec<_>, _> =
                ledger(&packed).map(|entry| entry.map(|e| (e.digest.0, e.key.to_vec()))).collect();
            let pairs: Vec<_> = rows.into_iter().map(|(digest, _, key)| (digest, key)).collect();
            match pairs.windows(2).position(|pair| pair[0] > pair[1]) {
                None => prop_assert_eq!(read, Ok(pairs)),
                Some(i) => prop_assert_eq!(read, Err(WireError::Unsorted { list: "ledger", entry: i + 1 })),
            }
        }

        #[test]
        fn keys_and_back(expected in vec(vec(any::<u8>(), 0..9), 0..6)) {
            let mut packed = Vec::new();
            expected.iter().for_each(|key| encode_key(key, &mut packed).unwrap());
            let read: Result<Vec<&[u8]>, _> = keys(&packed).collect();
            prop_assert_eq!(read, Ok(expected.iter().map(Vec::as_slice).collect()));
        }

        #[test]
        fn records_and_back(expected in vec((any::<[u8; 32]>(), any::<[u8; 32]>(), prop::option::of(vec(any::<u8>(), 0..9))), 0..6)) {
            let mut packed = Vec::new();
            for (content, row, key) in &expected {
                let entry = RecordEntry { content: Digest(*content), row: Digest(*row), key: key.as_deref() };
                entry.encode(&mut packed).unwrap();
            }
            let read: Result<Vec<_>, _> =
                records(&packed).map(|r| r.map(|r| (r.content.0, r.row.0, r.key.map(<[u8]>::to_vec)))).collect();
            prop_assert_eq!(read, Ok(expected.clone()));
            for cut in 0..packed.len() {
                let whole = records(&packed[..cut]).filter(Result::is_ok).count();
                prop_assert!(whole <= expected.len());
                prop_assert!(records(&packed[..cut]).all(|r| r.is_ok()) || records(&packed[..cut]).last().is_some_and(|r| r.is_err()));
            }
        }

        #[test]
        fn digests_are_strictly_ascending(rows in rows()) {
            let list: Vec<[u8; 32]> = rows.iter().map(|row| row.0).collect();
            let flat = list.as_flattened();
            prop_assert_eq!(row_digests(flat), Ok(&list[..]));
            match list.windows(2).position(|pair| pair[0] >= pair[1]) {
                None => prop_assert_eq!(digests(flat), Ok(&list[..])),
                Some(i) => {
                    prop_assert_eq!(digests(flat), Err(WireError::Unsorted { list: "digest list", entry: i + 1 }));
                }
            }
        }

        /// A cut within an entry is found, and the iterator ends there.
        #[test]
        fn truncation_is_found(rows in rows(), cut: prop::sample::Index) {
            let mut rows = rows;
            rows.sort();
            rows.dedup_by_key(|row| row.0);
            prop_assume!(!rows.is_empty());
            let packed = packed_manifest(&rows);
            let cut = cut.index(packed.len());
            let whole: Vec<usize> = (0..=rows.len()).map(|n| packed_manifest(&rows[..n]).len()).collect();
            let entry = whole.iter().filter(|length| **length <= cut).count() - 1;
            let mut entries = manifest(&packed[..cut]);
            prop_assert_eq!(entries.by_ref().take(entry).filter(Result::is_ok).count(), entry);
            let end = (!whole.contains(&cut)).then_some(Err(WireError::Truncated { list: "manifest", entry }));
            prop_assert_eq!(entries.next(), end);
            prop_assert_eq!(entries.next(), None);
        }

        #[test]
        fn garbage_never_panics(data in vec(prop_oneof![Just(0u8), any::<u8>()], 0..200)) {
            let _ = manifest(&data).count();
            let _ = ledger(&data).count();
            let _ = keys(&data).count();
            let _ = records(&data).count();
            let _ = (digests(&data), row_digests(&data));
        }
    }

    #[test]
    fn lists_of_digests_have_whole_ones() {
        let truncated = |list, entry| Err(WireError::Truncated { list, entry });
        assert_eq!(digests(&[0; 33]), truncated("digest list", 1));
        assert_eq!(row_digests(&[0; 31]), truncated("row digest list", 0));
        assert_eq!(digests(&[]), Ok(&[][..]));
    }
}
