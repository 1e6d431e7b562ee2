//! Which of a segment's blocks can hold a digest.

/// The first block, from `from` on, that can hold digests whose first eight bytes are `prefix`; the next ones can as long as they begin with
/// `prefix`, too. `firsts` are the first eight bytes of each block's first digest, ascending.
///
/// For digests that are looked for in ascending order: the nearer the block, the fewer steps, O(log distance).
pub fn first_to_hold(firsts: &[u64], prefix: u64, from: usize) -> usize {
    // It is the last block that begins below: entries with this prefix may stand at its end.
    let Some(ahead) = firsts.get(from + 1..) else { return from };
    let mut step = 1;
    while ahead.get(step - 1).is_some_and(|&first| first < prefix) {
        step *= 2;
    }
    let below = step / 2;
    from + below + ahead[below..ahead.len().min(step)].partition_point(|&first| first < prefix)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn it_is_what_a_scan_finds(
            mut firsts in prop::collection::vec(0u64..30, 1..40),
            prefix in 0u64..32,
            from in 0usize..40,
        ) {
            firsts.sort_unstable();
            let from = from % firsts.len();
            let scan = (from..firsts.len()).take_while(|&i| i == from || firsts[i] < prefix).last();
            prop_assert_eq!(Some(first_to_hold(&firsts, prefix, from)), scan);
        }
    }

    #[test]
    fn no_blocks() {
        assert_eq!(first_to_hold(&[], 1, 0), 0);
    }
}
