//! One partition against a hash map that says what it should hold.
use std::collections::HashMap;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};

use pg_dedup_shared::Key;
use pg_dedup_shared::partition::{Claim, Partition, Refused, Slot, capacity, owner};
use proptest::prelude::*;

#[derive(Clone, Debug)]
enum Step {
    Claim(Key, u32),
    Release(Key),
}

/// Few fingerprints and few homes, so that keys meet, crowd and wrap around the end.
fn keys() -> impl Strategy<Value = Key> {
    (prop_oneof![0u64..8, 1015u64..1024, 0u64..1024], 0u64..40)
        .prop_map(|(home, fingerprint)| Key { lead: home << 47, fingerprint })
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let claim = (keys(), 1u32..4).prop_map(|(key, xid)| Step::Claim(key, xid));
    prop::collection::vec(prop_oneof![3 => claim, 2 => keys().prop_map(Step::Release)], 0..400)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    /// The partition says of every claim what the map says, at any size, full or not.
    #[test]
    fn behaves_like_a_map(length in prop_oneof![Just(8usize), 9usize..80, Just(1024)], steps in steps()) {
        let used = AtomicU32::new(0);
        let mut slots = vec![Slot::default(); length];
        // Keys that agree in fingerprint and home are one claim: that is what the map is keyed by.
        let home = |key: Key| ((u128::from(key.lead << 7) * length as u128) >> 64) as usize;
        let mut oracle: HashMap<(usize, u64), (u32, u32)> = HashMap::new();
        for step in steps {
            match step {
                Step::Claim(key, xid) => {
                    let full = oracle.len() >= capacity(length);
                    let expected = match oracle.get_mut(&(home(key), key.fingerprint)) {
                        Some((owner, count)) if *owner == xid => {
                            *count += 1;
                            Ok(Claim::AlreadyOurs)
                        }
                        Some((owner, _)) => Ok(Claim::Held(*owner)),
                        None if full => Err(Refused::Full),
                        None => {
                            oracle.insert((home(key), key.fingerprint), (xid, 1));
                            Ok(Claim::Ours)
                        }
                    };
                    let got = Partition::new(&mut slots, &used).claim(key, xid, |other| other == xid);
                    prop_assert_eq!(got, expected);
                }
                Step::Release(key) => {
                    let entry = oracle.get_mut(&(home(key), key.fingerprint));
                    let expected = entry.is_some();
                    if let Some((_, count)) = entry {
                        *count -= 1;
                        if *count == 0 {
                            oracle.remove(&(home(key), key.fingerprint));
                        }
                    }
                    prop_assert_eq!(Partition::new(&mut slots, &used).release(key), expected);
                }
            }
            prop_assert_eq!(used.load(Relaxed) as usize, oracle.len());
        }
        for home_slot in 0..1024u64 {
            for fingerprint in 0..40 {
                let key = Key { lead: home_slot << 47, fingerprint };
                let expected = oracle.get(&(home(key), fingerprint)).map(|(xid, _)| *xid);
                prop_assert_eq!(owner(&slots, key), expected);
            }
        }
        let in_use = slots.iter().filter(|slot| **slot != Slot::default()).count();
        prop_assert_eq!(in_use, oracle.len());
    }
}
