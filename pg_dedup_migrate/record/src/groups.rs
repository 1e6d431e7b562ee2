//! Rows of a batch grouped by content.
use std::sync::Arc;

use crate::digest::Digest;
use crate::record::RecordDigests;

/// The rows of a batch grouped by content digest: groups ascend by digest, and the members of a group by row
/// number, so the first of them is the row that came first.
///
/// 4 bytes a row and 4 a group; the digests are the batch's own.
#[derive(Debug, Clone)]
pub struct Groups {
    digests: Arc<Vec<RecordDigests>>,
    members: Vec<u32>,
    /// Where in `members` each group begins, and where the last one ends.
    starts: Vec<u32>,
}

impl Groups {
    pub(crate) fn new(digests: &Arc<Vec<RecordDigests>>) -> Groups {
        // Prefix and row number in one integer: sorted without a look at the digests. Rows of equal prefix
        // nearly always have equal digests and are in place then; where not, they are sorted again.
        let mut order: Vec<u128> = (0u32..)
            .zip(digests.iter())
            .map(|(row, digests)| u128::from(digests.content.prefix()) << u32::BITS | u128::from(row))
            .collect();
        order.sort_unstable();

        let row = |packed: &u128| *packed as u32;
        let content = |packed: &u128| digests[row(packed) as usize].content;
        // A batch has fewer than 2^32 rows, so sums of them fit.
        let mut starts = Vec::with_capacity(digests.len() + 1);
        let mut end = 0u32;
        starts.push(end);
        for run in order.chunk_by_mut(|a, b| a >> u32::BITS == b >> u32::BITS) {
            if run.len() > 1 && run.iter().any(|packed| content(packed) != content(&run[0])) {
                run.sort_unstable_by_key(|packed| (content(packed), row(packed)));
                for group in run.chunk_by(|a, b| content(a) == content(b)) {
                    end += group.len() as u32;
                    starts.push(end);
                }
            } else {
                end += run.len() as u32;
                starts.push(end);
            }
        }
        starts.shrink_to_fit();
        let members = order.iter().map(row).collect();
        Groups { digests: Arc::clone(digests), members, starts }
    }

    /// How many groups there are: distinct contents.
    pub fn len(&self) -> usize {
        self.starts.len() - 1
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.members.is_empty()
    }

    /// The content digest of group `g`.
    ///
    /// # Panics
    /// If there is no group `g`.
    #[inline]
    pub fn digest(&self, g: usize) -> &Digest {
        &self.digests[self.members[self.starts[g] as usize] as usize].content
    }

    /// The rows of group `g`, at least one.
    ///
    /// # Panics
    /// If there is no group `g`.
    #[inline]
    pub fn members(&self, g: usize) -> &[u32] {
        &self.members[self.starts[g] as usize..self.starts[g + 1] as usize]
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    /// Few digests, some of which share their first eight bytes.
    fn digest() -> impl Strategy<Value = RecordDigests> {
        (0u8..4, 0u8..3).prop_map(|(prefix, rest)| {
            let mut bytes = [0xee; 32];
            (bytes[7], bytes[8]) = (prefix, rest);
            RecordDigests { content: Digest(bytes), row: Digest([1; 32]) }
        })
    }

    proptest! {
        #[test]
        fn groups_are_those_of_a_map(digests in vec(digest(), 0..60)) {
            let mut expected: BTreeMap<Digest, Vec<u32>> = BTreeMap::new();
            for (row, digests) in digests.iter().enumerate() {
                expected.entry(digests.content).or_default().push(row as u32);
            }
            let groups = Groups::new(&Arc::new(digests));
            let found: Vec<_> =
                (0..groups.len()).map(|g| (*groups.digest(g), groups.members(g).to_vec())).collect();
            prop_assert_eq!(groups.is_empty(), found.is_empty());
            prop_assert_eq!(found, expected.into_iter().collect::<Vec<_>>());
        }
    }
}
