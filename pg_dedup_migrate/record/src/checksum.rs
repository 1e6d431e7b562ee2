//! Checksum of a set of records.
use std::fmt;
use std::str::FromStr;

use crate::digest::{Digest, HexError, parse_hex, write_hex};

/// Sum of digests, read as big-endian 256-bit integers, mod 2^256.
///
/// The sum does not depend on order, adds across parts and subtracts. Two equal records count twice, where
/// an XOR would cancel them out.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Checksum(
    /// Least significant word first.
    [u64; 4],
);

impl Checksum {
    /// Adds one digest.
    #[inline]
    pub fn add(&mut self, digest: &Digest) {
        self.merge(&Checksum::from_bytes(&digest.0));
    }

    /// Adds the checksum of another set.
    #[inline]
    pub fn merge(&mut self, other: &Checksum) {
        let mut carry = false;
        for (word, more) in self.0.iter_mut().zip(other.0) {
            let (sum, first) = word.overflowing_add(more);
            let (sum, second) = sum.overflowing_add(u64::from(carry));
            *word = sum;
            carry = first | second;
        }
    }

    /// Takes the checksum of a subset out again.
    #[inline]
    pub fn subtract(&mut self, other: &Checksum) {
        let mut borrow = false;
        for (word, less) in self.0.iter_mut().zip(other.0) {
            let (rest, first) = word.overflowing_sub(less);
            let (rest, second) = rest.overflowing_sub(u64::from(borrow));
            *word = rest;
            borrow = first | second;
        }
    }

    /// The sum as 32 big-endian bytes.
    pub fn to_bytes(&self) -> [u8; 32] {
        let mut bytes = [0u8; 32];
        for (out, word) in bytes.as_chunks_mut::<8>().0.iter_mut().zip(self.0.iter().rev()) {
            *out = word.to_be_bytes();
        }
        bytes
    }

    /// The sum that [`Checksum::to_bytes`] wrote.
    #[inline]
    pub fn from_bytes(bytes: &[u8; 32]) -> Checksum {
        let mut words = [0u64; 4];
        for (word, chunk) in words.iter_mut().rev().zip(bytes.as_chunks::<8>().0) {
            *word = u64::from_be_bytes(*chunk);
        }
        Checksum(words)
    }
}

impl fmt::Display for Checksum {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_hex(&self.to_bytes(), f)
    }
}

impl fmt::Debug for Checksum {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Checksum({self})")
    }
}

impl FromStr for Checksum {
    type Err = HexError;

    fn from_str(text: &str) -> Result<Checksum, HexError> {
        parse_hex(text).map(|bytes| Checksum::from_bytes(&bytes))
    }
}

impl<'a> FromIterator<&'a Digest> for Checksum {
    fn from_iter<I: IntoIterator<Item = &'a Digest>>(digests: I) -> Checksum {
        let mut sum = Checksum::default();
        for digest in digests {
            sum.add(digest);
        }
        sum
    }
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    fn sum(digests: &[[u8; 32]]) -> Checksum {
        let mut sum = Checksum::default();
        digests.iter().for_each(|bytes| sum.add(&Digest(*bytes)));
        sum
    }

    /// Schoolbook addition, byte by byte.
    fn oracle(digests: &[[u8; 32]]) -> [u8; 32] {
        let mut total = [0u8; 32];
        for digest in digests {
            let mut carry = 0;
            for (out, byte) in total.iter_mut().zip(digest).rev() {
                let sum = u16::from(*out) + u16::from(*byte) + carry;
                (*out, carry) = (sum as u8, sum >> 8);
            }
        }
        total
    }

    /// Digests whose carries run far.
    fn digest() -> impl Strategy<Value = [u8; 32]> {
        let word = prop_oneof![Just(0), Just(1), Just(u64::MAX), any::<u64>()];
        prop::array::uniform4(word).prop_map(|words| Checksum(words).to_bytes())
    }

    proptest! {
        #[test]
        fn adds_as_integers(digests in vec(digest(), 0..20)) {
            prop_assert_eq!(sum(&digests).to_bytes(), oracle(&digests));
        }

        #[test]
        fn order_is_nothing(digests in vec(digest(), 0..20).prop_flat_map(|d| (Just(d.clone()), Just(d).prop_shuffle()))) {
            prop_assert_eq!(sum(&digests.0), sum(&digests.1));
        }

        #[test]
        fn parts_add_and_subtract(a in vec(digest(), 0..9), b in vec(digest(), 0..9)) {
            let whole = sum(&[a.clone(), b.clone()].concat());
            let mut merged = sum(&a);
            merged.merge(&sum(&b));
            prop_assert_eq!(merged, whole);
            merged.subtract(&sum(&a));
            prop_assert_eq!(merged, sum(&b));
            merged.subtract(&sum(&b));
            prop_assert_eq!(merged, Checksum::default());
        }

        #[test]
        fn bytes_and_text_and_back(bytes: [u8; 32]) {
            let sum = Checksum::from_bytes(&bytes);
            prop_assert_eq!(sum.to_bytes(), bytes);
            prop_assert_eq!(sum.to_string(), Digest(bytes).to_string());
            prop_assert_eq!(sum.to_string().parse(), Ok(sum));
        }
    }

    #[test]
    fn pairs_do_not_cancel_out() {
        let pair = sum(&[[9; 32], [9; 32]]);
        assert_ne!(pair, Checksum::default());
        assert_ne!(pair, sum(&[[9; 32]]));
    }
}
