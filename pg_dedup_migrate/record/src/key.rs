//! Key columns as one byte string.
//!
//! Key bytes of one column are its send bytes. Of several: for every column but the last an u32 big-endian
//! length and its bytes, then the last one's bytes. Key bytes tell keys apart and are compared for equality;
//! their order is not the key's.

use sha2::{Digest as _, Sha256};

use crate::digest::Digest;

/// Key bytes that are not those of so many columns, or cannot be made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum KeyError {
    /// The bytes end within a column.
    #[error("key bytes are truncated")]
    Truncated,
    /// Bytes without a column to hold them.
    #[error("extra bytes in the key of a table without one")]
    TrailingBytes,
    /// A key column of 4 GiB or more.
    #[error("key column of {0} bytes is too long")]
    TooLong(usize),
}

/// Appends the key bytes of `columns`, none of which is null, to `out`.
///
/// # Errors
/// [`KeyError::TooLong`]; `out` is then unchanged.
pub fn encode(columns: &[&[u8]], out: &mut Vec<u8>) -> Result<(), KeyError> {
    let Some((last, others)) = columns.split_last() else { return Ok(()) };
    let before = out.len();
    for column in others {
        match u32::try_from(column.len()) {
            Ok(length) => out.extend_from_slice(&length.to_be_bytes()),
            Err(_) => {
                out.truncate(before);
                return Err(KeyError::TooLong(column.len()));
            }
        }
        out.extend_from_slice(column);
    }
    out.extend_from_slice(last);
    Ok(())
}

/// The send bytes of each of `columns` key columns.
///
/// # Errors
/// If `key` does not hold as many.
pub fn decode(columns: usize, key: &[u8]) -> Result<Vec<&[u8]>, KeyError> {
    let Some(others) = columns.checked_sub(1) else {
        return if key.is_empty() { Ok(Vec::new()) } else { Err(KeyError::TrailingBytes) };
    };
    let mut rest = key;
    let mut values = Vec::with_capacity(columns.min(32));
    for _ in 0..others {
        let (length, tail) = rest.split_first_chunk::<4>().ok_or(KeyError::Truncated)?;
        let length = usize::try_from(u32::from_be_bytes(*length)).map_err(|_| KeyError::Truncated)?;
        let (value, tail) = tail.split_at_checked(length).ok_or(KeyError::Truncated)?;
        values.push(value);
        rest = tail;
    }
    values.push(rest);
    Ok(values)
}

/// SHA-256 of key bytes: the same everywhere and always, where a key is remembered by a part of it.
pub fn digest(key: &[u8]) -> Digest {
    Digest(Sha256::digest(key).into())
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    fn encoded(columns: &[Vec<u8>]) -> Vec<u8> {
        let columns: Vec<_> = columns.iter().map(Vec::as_slice).collect();
        let mut out = Vec::new();
        encode(&columns, &mut out).unwrap();
        out
    }

    proptest! {
        #[test]
        fn key_and_back(columns in vec(vec(any::<u8>(), 0..12), 0..5)) {
            let key = encoded(&columns);
            let decoded = decode(columns.len(), &key).unwrap();
            prop_assert_eq!(decoded, columns.iter().map(Vec::as_slice).collect::<Vec<_>>());
        }

        #[test]
        fn different_keys_differ(a in vec(vec(0..2u8, 0..4), 3), b in vec(vec(0..2u8, 0..4), 3)) {
            prop_assert_eq!(a == b, encoded(&a) == encoded(&b));
        }

        #[test]
        fn garbage_never_panics(columns in 0usize..5, key in vec(any::<u8>(), 0..40)) {
            if let Ok(values) = decode(columns, &key) {
                prop_assert_eq!(values.len(), columns);
                prop_assert_eq!(encoded(&values.iter().map(|v| v.to_vec()).collect::<Vec<_>>()), key);
            }
        }
    }

    #[test]
    fn a_digest_is_what_sha256_says() {
        let hex = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
        assert_eq!(digest(b"").to_string(), hex);
    }

    #[test]
    fn format_is_the_protocol_s() {
        assert_eq!(encoded(&[b"one".to_vec()]), b"one");
        assert_eq!(encoded(&[b"ab".to_vec(), b"c".to_vec()]), b"\0\0\0\x02abc");
        assert_eq!(decode(0, b"x"), Err(KeyError::TrailingBytes));
        assert_eq!(decode(2, b"\0\0\0\x02a"), Err(KeyError::Truncated));
    }
}
