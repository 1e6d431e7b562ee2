//! The filter against the `bloomfilter` crate: never a false negative, and an error rate near that of a
//! filter that is not blocked.
use std::sync::atomic::AtomicU64;

use bloomfilter::Bloom;
use pg_dedup_shared::filter::{Block, Filter};
use pg_dedup_shared::prefetch::NoPrefetch;
use pg_dedup_shared::{Key, Scope};
use proptest::prelude::*;

/// Uniform digests, as SHA-256 gives them.
fn digest(mut seed: u64) -> [u8; 32] {
    std::array::from_fn(|_| {
        seed = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (seed ^ (seed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z >> 37) as u8
    })
}

fn blocks(count: usize) -> Vec<Block> {
    (0..count).map(|_| Block::default()).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever was set is found, by single and by batched calls; what the oracle finds and we don't was never set.
    #[test]
    fn no_false_negatives(
        set in prop::collection::vec(any::<u64>(), 0..2000),
        asked in prop::collection::vec(any::<u64>(), 0..500),
        size in 1usize..200,
        scope in (any::<u32>(), any::<u32>()),
    ) {
        let (memory, bits_set) = (blocks(size), AtomicU64::new(0));
        let filter = Filter::new(&memory, &bits_set);
        let scope = Scope::new(scope.0, scope.1);
        let mut oracle = Bloom::new_for_fp_rate(set.len().max(1), 0.001).unwrap();
        let mut keys: Vec<Key> = set.iter().map(|seed| scope.key(&digest(*seed))).collect();
        keys.sort_unstable_by_key(|key| key.lead);
        filter.insert_all(keys.iter().copied(), &NoPrefetch, &mut Vec::new());
        set.iter().for_each(|seed| oracle.set(&digest(*seed)));

        let mut perhaps = Vec::new();
        filter.probe(keys.iter().copied(), &NoPrefetch, &mut perhaps);
        prop_assert!(perhaps.iter().all(|hit| *hit));
        for seed in asked {
            let (ours, theirs) = (filter.contains(scope.key(&digest(seed))), oracle.check(&digest(seed)));
            if !ours {
                prop_assert!(!set.contains(&seed));
            }
            if !theirs {
                prop_assert!(!set.contains(&seed));
            }
        }
    }
}

#[test]
fn error_rate_at_twelve_bits_a_key_is_below_0_6_percent_and_as_predicted() {
    let size = 16_384;
    let keys = (size * 512 / 12) as u64;
    let (memory, bits_set) = (blocks(size), AtomicU64::new(0));
    let filter = Filter::new(&memory, &bits_set);
    let scope = Scope::new(5, 1);
    let mut oracle = Bloom::<[u8; 32]>::new(size * 64, keys as usize).unwrap();
    for seed in 0..keys {
        filter.insert(scope.key(&digest(seed)));
        oracle.set(&digest(seed));
    }
    let asked = 2_000_000;
    let absent = || (1u64 << 40..).take(asked).map(digest);
    let ours = absent().filter(|d| filter.contains(scope.key(d))).count() as f64 / asked as f64;
    let theirs = absent().filter(|d| oracle.check(d)).count() as f64 / asked as f64;
    let stats = filter.stats();
    assert!(ours <= 0.006, "{ours}");
    assert!(ours < theirs * 2.0, "{ours} against {theirs}");
    assert!((ours / stats.predicted_fpr - 1.0).abs() < 0.15, "{ours} against {}", stats.predicted_fpr);
    assert!((stats.estimated_keys / keys as f64 - 1.0).abs() < 0.01, "{} of {keys}", stats.estimated_keys);
    println!("measured {ours}, predicted {}, not blocked {theirs}", stats.predicted_fpr);
}

#[test]
fn another_scope_is_as_good_as_empty() {
    let (memory, bits_set) = (blocks(4096), AtomicU64::new(0));
    let filter = Filter::new(&memory, &bits_set);
    let keys = 4096 * 512 / 24;
    (0..keys).for_each(|seed| {
        filter.insert(Scope::new(5, 1).key(&digest(seed)));
    });
    for other in [Scope::new(5, 2), Scope::new(6, 1), Scope::new(1, 5)] {
        let hits = (0..keys).filter(|seed| filter.contains(other.key(&digest(*seed)))).count();
        assert!((hits as f64) < keys as f64 * 0.006, "{hits}");
    }
}
