//! How many different contents there are among records: exact as long as they fit, estimated in bounded memory beyond.

use std::collections::HashMap;
use std::collections::hash_map::Entry;

use pg_dedup_record::digest::Digest;

/// Contents by digest, and in how many chunks each was met.
///
/// When they become too many only those whose digest begins with one more zero bit are kept. A content is kept with all its records or not at
/// all, and digests are spread evenly whatever the data is: `n` kept of one in `2^k` stand for `n * 2^k`, give or take a part of `1 / sqrt(n)`.
#[derive(Debug)]
pub struct Contents {
    met: HashMap<u64, u32>,
    most: usize,
    /// Leading zero bits of the digests that are kept.
    zeros: u32,
}

impl Contents {
    /// None yet; at most so many are kept.
    pub fn new(most: usize) -> Contents {
        Contents { met: HashMap::new(), most: most.max(1), zeros: 0 }
    }

    /// Whether a content was met, as far as it is kept.
    pub fn has(&self, content: &Digest) -> bool {
        self.keeps(content) && self.met.contains_key(&name(content))
    }

    /// A content was met in so many records of a chunk; answers how many of them had it before them, or as many as those stand for.
    pub fn add(&mut self, content: &Digest, records: u32) -> f64 {
        if records == 0 || !self.keeps(content) {
            return 0.0;
        }
        let repeated = match self.met.entry(name(content)) {
            Entry::Occupied(mut met) => {
                *met.get_mut() = met.get().saturating_add(1);
                records
            }
            Entry::Vacant(new) => {
                new.insert(1);
                records - 1
            }
        };
        let stands_for = self.each_stands_for();
        while self.met.len() > self.most {
            self.zeros += 1;
            // The name has the digest's leading bits at its end.
            let zeros = self.zeros;
            self.met.retain(|name, _| name.trailing_zeros() >= zeros);
        }
        f64::from(repeated) * stands_for
    }

    /// Different contents.
    pub fn distinct(&self) -> f64 {
        self.met.len() as f64 * self.each_stands_for()
    }

    /// Contents that were met in one chunk.
    pub fn met_once(&self) -> f64 {
        self.met.values().filter(|times| **times == 1).count() as f64 * self.each_stands_for()
    }

    /// Whether all are kept.
    pub fn is_exact(&self) -> bool {
        self.zeros == 0
    }

    fn keeps(&self, content: &Digest) -> bool {
        content.prefix().leading_zeros() >= self.zeros
    }

    fn each_stands_for(&self) -> f64 {
        2f64.powi(self.zeros as i32)
    }
}

/// 64 bits of a digest: its prefix from behind, so that the bits which are zero in all that is kept come last.
fn name(content: &Digest) -> u64 {
    content.prefix().reverse_bits()
}

/// How many different contents there are in all, concluded from some chunks: `seen` is the sum of the contents of each, `distinct` are different
/// ones, `once` of these were met in one chunk, and `all` is what that sum would be over all chunks. Haas and Stokes' estimator Duj1, which
/// PostgreSQL's ANALYZE uses, too; of contents in chunks, because records of one content often stand side by side.
pub fn in_all(seen: f64, distinct: f64, once: f64, all: f64) -> f64 {
    if seen <= 0.0 || seen >= all {
        return distinct;
    }
    let estimate = seen * distinct / (seen - once + once * seen / all);
    estimate.clamp(distinct, all)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use sha2::{Digest as _, Sha256};

    use super::*;

    fn content(n: u32) -> Digest {
        Digest(Sha256::digest(n.to_be_bytes()).into())
    }

    proptest! {
        #[test]
        fn exact_while_they_fit(records in prop::collection::vec(0u32..50, 0..400)) {
            let mut contents = Contents::new(50);
            let mut repeated = 0.0;
            for record in &records {
                repeated += contents.add(&content(*record), 1);
            }
            let distinct: std::collections::BTreeSet<_> = records.iter().collect();
            prop_assert!(contents.is_exact());
            prop_assert_eq!(contents.distinct(), distinct.len() as f64);
            prop_assert_eq!(repeated, (records.len() - distinct.len()) as f64);
            prop_assert!(distinct.iter().all(|n| contents.has(&content(**n))));
            let once = distinct.iter().filter(|n| records.iter().filter(|r| **r == ***n).count() == 1).count();
            prop_assert_eq!(contents.met_once(), once as f64);
        }
    }

    /// 200,000 contents, a quarter of them in three records of two chunks, in the memory of 10,000.
    #[test]
    fn close_when_they_do_not() {
        let mut contents = Contents::new(10_000);
        let mut repeated = 0.0;
        for n in 0..200_000 {
            repeated += contents.add(&content(n), if n % 4 == 0 { 2 } else { 1 });
        }
        for n in (0..200_000).step_by(4) {
            repeated += contents.add(&content(n), 1);
        }
        assert!(!contents.is_exact() && contents.met.len() <= 10_000);
        for (figure, wanted) in
            [(contents.distinct(), 200_000.0), (repeated, 100_000.0), (contents.met_once(), 150_000.0)]
        {
            assert!((figure / wanted - 1.0f64).abs() < 0.05, "{figure} for {wanted}");
        }
    }

    #[test]
    fn a_sample_of_pairs_tells_of_all_pairs() {
        // 1,000,000 records, every content in two chunks; one in ten is looked at, 5,000 pairs meet.
        let estimate = in_all(100_000.0, 95_000.0, 90_000.0, 1_000_000.0);
        assert!((estimate / 500_000.0 - 1.0).abs() < 0.01, "{estimate}");
        // Every content is in one chunk, and none was met in another.
        assert_eq!(in_all(1000.0, 1000.0, 1000.0, 50_000.0), 50_000.0);
        // Everything was looked at, or nothing.
        assert_eq!(in_all(10.0, 7.0, 5.0, 10.0), 7.0);
        assert_eq!(in_all(0.0, 0.0, 0.0, 10.0), 0.0);
    }
}
