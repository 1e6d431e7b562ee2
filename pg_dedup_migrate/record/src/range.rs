//! Where chunks begin.

/// Cuts a table into chunks, given a sample of its rows in key order.
///
/// `weights` are the sizes of the sampled rows in bytes; each stands for an equal share of `total_records`
/// and for its own share of `total_bytes`. A chunk gets at most `chunk_bytes` and `max_records` by that
/// estimate, unless a single sampled row stands for more than that.
///
/// Returns indexes into the sample, strictly ascending and never 0: a chunk begins at the key of each. The
/// first chunk is open below and the last one above, so the chunks cover every key, sampled or not.
pub fn cut(
    weights: &[u64],
    total_bytes: u64,
    total_records: u64,
    chunk_bytes: u64,
    max_records: u64,
) -> Vec<usize> {
    let sampled = weights.len() as u128;
    let weight: u128 = weights.iter().map(|weight| u128::from(*weight)).sum();

    // Units are chosen so that no share is rounded: bytes × total weight, records × rows sampled.
    let bytes_limit = u128::from(chunk_bytes.max(1)).saturating_mul(weight);
    let records_limit = u128::from(max_records.max(1)).saturating_mul(sampled);

    let mut cuts = Vec::new();
    let (mut bytes, mut records) = (0u128, 0u128);
    for (index, weight) in weights.iter().enumerate() {
        let row_bytes = u128::from(*weight) * u128::from(total_bytes);
        let row_records = u128::from(total_records);
        bytes = bytes.saturating_add(row_bytes);
        records = records.saturating_add(row_records);
        if index > 0 && (bytes > bytes_limit || records > records_limit) {
            cuts.push(index);
            (bytes, records) = (row_bytes, row_records);
        }
    }
    cuts
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    /// The sample's rows of each chunk.
    fn chunks(cuts: &[usize], sampled: usize) -> Vec<std::ops::Range<usize>> {
        let bounds: Vec<usize> = [&[0], cuts, &[sampled]].concat();
        bounds.windows(2).map(|pair| pair[0]..pair[1]).collect()
    }

    proptest! {
        #[test]
        fn chunks_cover_all_and_keep_their_limits(
            weights in vec(0u64..1000, 1..200),
            (total_bytes, total_records) in (0u64..1 << 40, 0u64..1 << 30),
            (chunk_bytes, max_records) in (1u64..1 << 36, 1u64..1 << 28),
        ) {
            let cuts = cut(&weights, total_bytes, total_records, chunk_bytes, max_records);
            prop_assert!(cuts.is_sorted_by(|a, b| a < b));
            prop_assert!(cuts.iter().all(|index| (1..weights.len()).contains(index)));

            let weight: u64 = weights.iter().sum();
            let fits = |rows: std::ops::Range<usize>| {
                let share: u64 = weights[rows.clone()].iter().sum();
                let bytes = u128::from(share) * u128::from(total_bytes);
                let records = rows.len() as u128 * u128::from(total_records);
                bytes <= u128::from(chunk_bytes) * u128::from(weight)
                    && records <= u128::from(max_records) * weights.len() as u128
            };
            let chunks = chunks(&cuts, weights.len());
            prop_assert!(chunks.iter().all(|rows| !rows.is_empty() && (rows.len() == 1 || fits(rows.clone()))));
            // No chunk could have taken the row behind it.
            prop_assert!(chunks.iter().rev().skip(1).all(|rows| !fits(rows.start..rows.end + 1)));
        }

        #[test]
        fn extremes_never_panic(weights in vec(any::<u64>(), 0..50), totals: [u64; 4]) {
            let [bytes, records, chunk_bytes, max_records] = totals;
            let cuts = cut(&weights, bytes, records, chunk_bytes, max_records);
            prop_assert!(cuts.iter().all(|index| (1..weights.len()).contains(index)));
        }
    }

    #[test]
    fn small_tables_are_one_chunk() {
        assert!(cut(&[], 0, 0, 100, 100).is_empty());
        assert!(cut(&[5; 40], 1000, 40, 1000, 40).is_empty());
        assert!(cut(&[0; 40], 1000, 40, 1000, 40).is_empty());
    }

    #[test]
    fn bytes_and_records_both_cut() {
        assert_eq!(cut(&[1; 8], 800, 8, 200, 100), [2, 4, 6]);
        assert_eq!(cut(&[1; 8], 800, 8, 1000, 4), [4]);
        // One wide row among narrow ones has a chunk of its own.
        assert_eq!(cut(&[1, 1, 100, 1, 1], 104, 5, 50, 100), [2, 3]);
    }
}
