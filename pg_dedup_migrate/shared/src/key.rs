//! From a content hash to the bits that the shared structures work with.

/// Whose content hashes these are: one target of one database.
///
/// All scopes share the filter and the claims table. The salt, a one-to-one mix of database and target,
/// goes into the bits that are compared, so that the same content hash in two scopes never matches; it
/// stays out of the bits that say where to look, so that a sorted batch walks memory forwards in any
/// scope.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Scope {
    salt: u64,
}

impl Scope {
    /// The scope of one target (its number in the index) in the database with this OID.
    pub fn new(database: u32, target: u32) -> Self {
        Self { salt: mix((u64::from(database) << 32) | u64::from(target)) }
    }

    /// What the shared structures know of this content hash in this scope.
    #[inline]
    pub fn key(self, digest: &[u8; 32]) -> Key {
        let (words, _) = digest.as_chunks::<8>();
        Key { lead: u64::from_be_bytes(words[0]), fingerprint: u64::from_be_bytes(words[1]) ^ self.salt }
    }
}

/// The finalizer of SplitMix64 (Steele, Lea, Flood 2014): every input bit reaches every output bit, and
/// no two inputs share an output.
fn mix(value: u64) -> u64 {
    // Zero would mix to zero and leave the scope unsalted; no database has OID zero, but be plain about it.
    let mut z = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// A content hash in a scope, as the filter and the claims table see it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Key {
    /// The digest's first eight bytes, unsalted, big-endian: filter block, partition and slot grow with it.
    pub lead: u64,
    /// The next eight bytes, salted: what is stored and compared.
    pub fingerprint: u64,
}

/// Scales `fraction`, read as a binary fraction of one, to an index below `length`; monotone in `fraction`.
#[inline]
pub(crate) fn scale(fraction: u64, length: usize) -> usize {
    ((u128::from(fraction) * length as u128) >> 64) as usize
}

/// Packed digests as a slice of digests; `None` if bytes are left over.
pub fn unpack(packed: &[u8]) -> Option<&[[u8; 32]]> {
    let (digests, rest) = packed.as_chunks::<32>();
    rest.is_empty().then_some(digests)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scopes_keep_the_place_and_change_the_fingerprint() {
        let digest: [u8; 32] = std::array::from_fn(|i| i as u8 * 7);
        let keys: Vec<Key> = [(1, 1), (1, 2), (2, 1), (5, 9)]
            .into_iter()
            .map(|(database, target)| Scope::new(database, target).key(&digest))
            .collect();
        for (i, a) in keys.iter().enumerate() {
            for b in &keys[..i] {
                assert_eq!(a.lead, b.lead);
                assert_ne!(a.fingerprint, b.fingerprint);
            }
        }
    }

    #[test]
    fn scale_covers_the_range_in_order() {
        assert_eq!(scale(0, 10), 0);
        assert_eq!(scale(u64::MAX, 10), 9);
        assert!((0..1000u64).map(|i| scale(i << 54, 17)).is_sorted());
    }

    #[test]
    fn packed_digests_have_whole_length() {
        assert_eq!(unpack(&[0; 64]).map(<[_]>::len), Some(2));
        assert_eq!(unpack(&[0; 63]), None);
    }
}
