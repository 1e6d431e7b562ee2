//! A SHA-256 digest.
use std::fmt;
use std::str::FromStr;

/// 32 bytes of SHA-256, ordered bytewise: the order of claims, segments, blocks and packed lists alike.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Digest(pub [u8; Digest::LEN]);

impl Digest {
    /// Length in bytes.
    pub const LEN: usize = 32;
    /// Length of [`Digest::short`].
    pub const SHORT_LEN: usize = 8;

    /// The first eight bytes as a big-endian integer. Orders as the digest does, save for ties.
    #[inline]
    pub fn prefix(&self) -> u64 {
        let [a, b, c, d, e, f, g, h, ..] = self.0;
        u64::from_be_bytes([a, b, c, d, e, f, g, h])
    }

    /// The first eight bytes: what manifests and entries keep of a row digest, beside a whole content digest.
    #[inline]
    pub fn short(&self) -> [u8; Digest::SHORT_LEN] {
        self.prefix().to_be_bytes()
    }

    /// The digest in `bytes`, or `None` if they are not exactly [`Digest::LEN`].
    pub fn from_slice(bytes: &[u8]) -> Option<Digest> {
        bytes.try_into().ok().map(Digest)
    }

    /// The bytes.
    #[inline]
    pub fn as_bytes(&self) -> &[u8; Digest::LEN] {
        &self.0
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_hex(&self.0, f)
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Digest({self})")
    }
}

impl FromStr for Digest {
    type Err = HexError;

    fn from_str(text: &str) -> Result<Digest, HexError> {
        parse_hex(text).map(Digest)
    }
}

impl AsRef<[u8]> for Digest {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

/// A text that is not 64 hexadecimal digits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("expected 64 hexadecimal digits")]
pub struct HexError;

/// Writes 32 bytes as 64 lower case hexadecimal digits.
pub(crate) fn write_hex(bytes: &[u8; 32], f: &mut fmt::Formatter<'_>) -> fmt::Result {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let mut text = [0u8; 64];
    for (pair, byte) in text.as_chunks_mut::<2>().0.iter_mut().zip(bytes) {
        *pair = [DIGITS[usize::from(byte >> 4)], DIGITS[usize::from(byte & 15)]];
    }
    // Hexadecimal digits are ASCII, so the error cannot happen; it is passed on all the same.
    f.pad(std::str::from_utf8(&text).map_err(|_| fmt::Error)?)
}

/// Reads 64 hexadecimal digits of either case.
pub(crate) fn parse_hex(text: &str) -> Result<[u8; 32], HexError> {
    let (pairs, rest) = text.as_bytes().as_chunks::<2>();
    if pairs.len() != 32 || !rest.is_empty() {
        return Err(HexError);
    }
    let mut bytes = [0u8; 32];
    for (byte, [high, low]) in bytes.iter_mut().zip(pairs) {
        *byte = nibble(*high)? << 4 | nibble(*low)?;
    }
    Ok(bytes)
}

fn nibble(digit: u8) -> Result<u8, HexError> {
    match digit {
        b'0'..=b'9' => Ok(digit - b'0'),
        b'a'..=b'f' => Ok(digit - b'a' + 10),
        b'A'..=b'F' => Ok(digit - b'A' + 10),
        _ => Err(HexError),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn text_and_back(bytes: [u8; 32]) {
            let digest = Digest(bytes);
            let text = digest.to_string();
            prop_assert_eq!(text.len(), 64);
            prop_assert_eq!(text.parse::<Digest>(), Ok(digest));
            prop_assert_eq!(text.to_uppercase().parse::<Digest>(), Ok(digest));
        }

        #[test]
        fn prefix_orders_as_the_digest(a: [u8; 32], b: [u8; 32]) {
            let (a, b) = (Digest(a), Digest(b));
            prop_assert!(a.prefix() == b.prefix() || a.cmp(&b) == a.prefix().cmp(&b.prefix()));
        }

        #[test]
        fn other_texts_are_refused(text: String) {
            let hex = text.len() == 64 && text.bytes().all(|b| b.is_ascii_hexdigit());
            prop_assert_eq!(text.parse::<Digest>().is_ok(), hex);
        }
    }

    #[test]
    fn wrong_lengths_are_refused() {
        assert_eq!(Digest::from_slice(&[7; 32]), Some(Digest([7; 32])));
        assert_eq!(Digest::from_slice(&[7; 31]), None);
        assert_eq!(Digest::from_slice(&[7; 33]), None);
        assert_eq!("00".repeat(33).parse::<Digest>(), Err(HexError));
        assert_eq!(format!("{}g", "0".repeat(63)).parse::<Digest>(), Err(HexError));
    }
}
