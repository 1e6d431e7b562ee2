//! From a type's binary send bytes to bytes that are the same in every cluster.
//!
//! Send bytes of arrays and composites carry the OIDs of their element and attribute types, and OIDs of user
//! types differ between clusters; an array's null flag can stay set when its last null is gone. Both are made
//! uniform. Nothing else is touched, so the canonical form is as long as the send bytes:
//!
//! ```text
//! array       int32 dimensions · int32 has null ← recomputed · int32 element OID ← 0
//!             per dimension: int32 length, int32 lower bound · per element: int32 length or -1, bytes ↻
//! composite   int32 columns · per column: int32 type OID ← 0, int32 length or -1, bytes ↻
//! range       byte flags · per finite bound: int32 length, bytes ↻
//! multirange  int32 ranges · per range: int32 length, range ↻                (↻ = canonical in turn)
//! ```
//!
//! The formats are those of `array_send`, `record_send`, `range_send` and `multirange_send`.
use serde::{Deserialize, Serialize};

/// How the send bytes of one type become canonical.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Canonical {
    /// The send bytes as they are: every type that holds no array or composite.
    Verbatim,
    /// An array, by its element type.
    Array(Box<Canonical>),
    /// A composite, by its attribute types, dropped ones left out.
    Composite(Vec<Canonical>),
    /// A range, by its subtype.
    Range(Box<Canonical>),
    /// A multirange, by the subtype of its ranges (not by the range type).
    Multirange(Box<Canonical>),
}

/// A field that is not what its column's type sends, or a record that does not match its layout.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CanonicalError {
    /// The bytes end early, go on too long or contradict themselves.
    #[error("malformed binary {0} value")]
    Malformed(&'static str),
    /// A record with another number of columns than its layout has.
    #[error("record has {found} columns, layout has {expected}")]
    ColumnCount {
        /// Columns of the record.
        found: usize,
        /// Columns of the layout.
        expected: usize,
    },
    /// The layout names a column that it does not have.
    #[error("layout names column {0}, which it does not have")]
    NoSuchColumn(usize),
    /// A field longer than a binary COPY field can be.
    #[error("field of {0} bytes is longer than 2147483647")]
    FieldTooLong(usize),
}

// Limits and flags of PostgreSQL's array.h and rangetypes.h.
const MAX_DIMENSIONS: u32 = 6;
const RANGE_EMPTY: u8 = 0x01;
const RANGE_NO_LOWER: u8 = RANGE_EMPTY | 0x08 | 0x20;
const RANGE_NO_UPPER: u8 = RANGE_EMPTY | 0x10 | 0x40;

const ZERO_OID: [u8; 4] = [0; 4];

impl Canonical {
    /// An array of `element`.
    pub fn array(element: Canonical) -> Canonical {
        Canonical::Array(Box::new(element))
    }

    /// A composite of `attributes`.
    pub fn composite(attributes: Vec<Canonical>) -> Canonical {
        Canonical::Composite(attributes)
    }

    /// A range over `subtype`. Ranges carry no OIDs of their own, so one over a verbatim subtype is verbatim.
    pub fn range(subtype: Canonical) -> Canonical {
        match subtype {
            Canonical::Verbatim => Canonical::Verbatim,
            other => Canonical::Range(Box::new(other)),
        }
    }

    /// A multirange of ranges over `subtype`; verbatim if `subtype` is.
    pub fn multirange(subtype: Canonical) -> Canonical {
        match subtype {
            Canonical::Verbatim => Canonical::Verbatim,
            other => Canonical::Multirange(Box::new(other)),
        }
    }

    /// Whether the canonical bytes are the send bytes, whatever they are.
    #[inline]
    pub fn is_verbatim(&self) -> bool {
        matches!(self, Canonical::Verbatim)
    }

    /// Gives the canonical bytes of one field, in pieces, to `sink`. All pieces together are as long as
    /// `field`. On an error `sink` may have been given some of them.
    ///
    /// # Errors
    /// [`CanonicalError::Malformed`] if `field` is not the binary form of such a type.
    pub fn feed(&self, field: &[u8], sink: &mut impl FnMut(&[u8])) -> Result<(), CanonicalError> {
        match self {
            Canonical::Verbatim => {
                sink(field);
                Ok(())
            }
            Canonical::Array(element) => feed_array(element, field, sink),
            Canonical::Composite(attributes) => feed_composite(attributes, field, sink),
            Canonical::Range(subtype) => feed_range(subtype, field, sink),
            Canonical::Multirange(subtype) => feed_multirange(subtype, field, sink),
        }
    }
}

fn feed_array(element: &Canonical, field: &[u8], sink: &mut impl FnMut(&[u8])) -> Result<(), CanonicalError> {
    let mut reader = Reader { rest: field, what: "array" };
    let dimensions = reader.u32()?;
    let flag = reader.u32()?;
    reader.u32()?;
    if dimensions > MAX_DIMENSIONS || flag > 1 {
        return Err(reader.malformed());
    }
    let shape = reader.rest;
    let mut elements = u64::from(dimensions > 0);
    for _ in 0..dimensions {
        let length = i32::from_be_bytes(reader.array()?);
        reader.u32()?;
        let length = u64::try_from(length).map_err(|_| reader.malformed())?;
        elements = elements.checked_mul(length).ok_or(reader.malformed())?;
    }

    // The flag stands before the elements: one walk to find a null (and every error), then the output. An
    // element takes four bytes at least, so the walk ends with the field, however many the shape claims.
    let body = reader.rest;
    let mut has_null = false;
    for _ in 0..elements {
        has_null |= reader.field()?.is_none();
    }
    reader.finish()?;

    sink(&dimensions.to_be_bytes());
    sink(&u32::from(has_null).to_be_bytes());
    sink(&ZERO_OID);
    if element.is_verbatim() {
        sink(shape);
        return Ok(());
    }
    sink(&shape[..shape.len() - body.len()]);
    let mut reader = Reader { rest: body, what: "array" };
    for _ in 0..elements {
        feed_field(element, &mut reader, sink)?;
    }
    Ok(())
}

fn feed_composite(
    attributes: &[Canonical],
    field: &[u8],
    sink: &mut impl FnMut(&[u8]),
) -> Result<(), CanonicalError> {
    let mut reader = Reader { rest: field, what: "composite" };
    let count: [u8; 4] = reader.array()?;
    if usize::try_from(u32::from_be_bytes(count)) != Ok(attributes.len()) {
        return Err(reader.malformed());
    }
    sink(&count);
    for attribute in attributes {
        reader.u32()?;
        sink(&ZERO_OID);
        feed_field(attribute, &mut reader, sink)?;
    }
    reader.finish()
}

fn feed_range(subtype: &Canonical, field: &[u8], sink: &mut impl FnMut(&[u8])) -> Result<(), CanonicalError> {
    let mut reader = Reader { rest: field, what: "range" };
    let [flags] = reader.array()?;
    sink(&[flags]);
    for absent in [RANGE_NO_LOWER, RANGE_NO_UPPER] {
        if flags & absent == 0 && !feed_field(subtype, &mut reader, sink)? {
            return Err(reader.malformed());
        }
    }
    reader.finish()
}

fn feed_multirange(
    subtype: &Canonical,
    field: &[u8],
    sink: &mut impl FnMut(&[u8]),
) -> Result<(), CanonicalError> {
    let mut reader = Reader { rest: field, what: "multirange" };
    let count = reader.u32()?;
    sink(&count.to_be_bytes());
    for _ in 0..count {
        let range = reader.field()?.ok_or(reader.malformed())?;
        sink(&length_of(range)?);
        feed_range(subtype, range, sink)?;
    }
    reader.finish()
}

/// Passes one length-prefixed value on; false if it was null.
fn feed_field(
    canonical: &Canonical,
    reader: &mut Reader<'_>,
    sink: &mut impl FnMut(&[u8]),
) -> Result<bool, CanonicalError> {
    match reader.field()? {
        None => {
            sink(&NULL);
            Ok(false)
        }
        Some(value) => {
            sink(&length_of(value)?);
            canonical.feed(value, sink)?;
            Ok(true)
        }
    }
}

/// What stands in the place of a length for a null.
pub(crate) const NULL: [u8; 4] = (-1i32).to_be_bytes();

/// The length word of a value that is not null.
pub(crate) fn length_of(value: &[u8]) -> Result<[u8; 4], CanonicalError> {
    let length = i32::try_from(value.len()).map_err(|_| CanonicalError::FieldTooLong(value.len()))?;
    Ok(length.to_be_bytes())
}

/// Reads a nested value front to back.
struct Reader<'a> {
    rest: &'a [u8],
    what: &'static str,
}

impl<'a> Reader<'a> {
    fn malformed(&self) -> CanonicalError {
        CanonicalError::Malformed(self.what)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], CanonicalError> {
        let (head, rest) = self.rest.split_first_chunk::<N>().ok_or(self.malformed())?;
        self.rest = rest;
        Ok(*head)
    }

    fn u32(&mut self) -> Result<u32, CanonicalError> {
        Ok(u32::from_be_bytes(self.array()?))
    }

    /// A length word and as many bytes; `None` for a null.
    fn field(&mut self) -> Result<Option<&'a [u8]>, CanonicalError> {
        let length = i32::from_be_bytes(self.array()?);
        if length == -1 {
            return Ok(None);
        }
        let length = usize::try_from(length).map_err(|_| self.malformed())?;
        let (value, rest) = self.rest.split_at_checked(length).ok_or(self.malformed())?;
        self.rest = rest;
        Ok(Some(value))
    }

    fn finish(&self) -> Result<(), CanonicalError> {
        if self.rest.is_empty() { Ok(()) } else { Err(self.malformed()) }
    }
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;
    use crate::samples;

    fn fed(canonical: &Canonical, field: &[u8]) -> Result<Vec<u8>, CanonicalError> {
        let mut out = Vec::new();
        canonical.feed(field, &mut |bytes| out.extend_from_slice(bytes)).map(|()| out)
    }

    fn typed_value() -> impl Strategy<Value = (Canonical, samples::Value)> {
        samples::canonical().prop_flat_map(|canonical| {
            let value = samples::value(&canonical);
            (Just(canonical), value)
        })
    }

    proptest! {
        #[test]
        fn clusters_agree((canonical, value) in typed_value(), oid: u32, stale: bool) {
            let sent = value.send(oid, stale);
            let canonical_bytes = fed(&canonical, &sent);
            prop_assert_eq!(canonical_bytes.as_ref().map(Vec::len), Ok(sent.len()));
            prop_assert_eq!(canonical_bytes, Ok(value.send(0, false)));
        }

        #[test]
        fn canonical_bytes_are_canonical((canonical, value) in typed_value()) {
            let bytes = value.send(0, false);
            prop_assert_eq!(fed(&canonical, &bytes), Ok(bytes));
        }

        #[test]
        fn every_truncation_is_an_error((canonical, value) in typed_value(), cut: prop::sample::Index) {
            let sent = value.send(1, false);
            prop_assume!(!canonical.is_verbatim() && !sent.is_empty());
            prop_assert!(fed(&canonical, &sent[..cut.index(sent.len())]).is_err());
            prop_assert!(fed(&canonical, &[&sent[..], &[0]].concat()).is_err());
        }

        #[test]
        fn garbage_never_panics(canonical in samples::canonical(), field in vec(any::<u8>(), 0..80)) {
            if let Ok(out) = fed(&canonical, &field) {
                prop_assert_eq!(out.len(), field.len());
            }
        }

        /// Garbage that looks like the real thing gets further in.
        #[test]
        fn damage_never_panics(
            (canonical, value) in typed_value(),
            damage in vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
        ) {
            let mut sent = value.send(23, true);
            for (at, byte) in damage {
                if !sent.is_empty() {
                    let at = at.index(sent.len());
                    sent[at] = byte;
                }
            }
            if let Ok(out) = fed(&canonical, &sent) {
                prop_assert_eq!(out.len(), sent.len());
            }
        }

        #[test]
        fn json_and_back(canonical in samples::canonical()) {
            let json = serde_json::to_string(&canonical).unwrap();
            prop_assert_eq!(serde_json::from_str::<Canonical>(&json).unwrap(), canonical);
        }
    }

    #[test]
    fn json_is_snake_case() {
        let nested = Canonical::array(Canonical::composite(vec![Canonical::Verbatim]));
        let json = serde_json::to_string(&nested).unwrap();
        assert_eq!(json, r#"{"array":{"composite":["verbatim"]}}"#);
    }

    #[test]
    fn ranges_of_verbatim_types_collapse() {
        assert_eq!(Canonical::range(Canonical::Verbatim), Canonical::Verbatim);
        assert_eq!(Canonical::multirange(Canonical::range(Canonical::Verbatim)), Canonical::Verbatim);
        let array = Canonical::array(Canonical::Verbatim);
        assert_eq!(Canonical::range(array.clone()), Canonical::Range(Box::new(array)));
    }

    /// `'[2:3][1:2]={{1,2},{3,NULL}}'::smallint[]` as PostgreSQL sends it.
    #[test]
    fn array_of_two_dimensions() {
        let mut sent = vec![0, 0, 0, 2, 0, 0, 0, 1, 0, 0, 0, 21];
        sent.extend([0, 0, 0, 2, 0, 0, 0, 2, 0, 0, 0, 2, 0, 0, 0, 1]);
        sent.extend([0, 0, 0, 2, 0, 1, 0, 0, 0, 2, 0, 2, 0, 0, 0, 2, 0, 3, 255, 255, 255, 255]);
        let mut expected = sent.clone();
        expected[11] = 0;
        let array = Canonical::array(Canonical::Verbatim);
        assert_eq!(fed(&array, &sent), Ok(expected.clone()));
        sent[7] = 0;
        assert_eq!(fed(&array, &sent), Ok(expected));
    }

    #[test]
    fn a_huge_shape_ends_with_its_bytes() {
        let mut sent = vec![0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 21];
        sent.extend([127, 255, 255, 255, 0, 0, 0, 1, 127, 255, 255, 255, 0, 0, 0, 1]);
        let array = Canonical::array(Canonical::Verbatim);
        assert_eq!(fed(&array, &sent), Err(CanonicalError::Malformed("array")));
        sent[12..16].copy_from_slice(&(-1i32).to_be_bytes());
        assert_eq!(fed(&array, &sent), Err(CanonicalError::Malformed("array")));
    }

    #[test]
    fn empty_ranges_have_no_bounds() {
        let range = Canonical::range(Canonical::array(Canonical::Verbatim));
        assert_eq!(fed(&range, &[RANGE_EMPTY]), Ok(vec![RANGE_EMPTY]));
        assert!(fed(&range, &[0]).is_err());
    }
}
