use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::Index;

use super::*;

/// An entry that owns its key.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Owned {
    digest: Digest,
    stamp: Stamp,
    row_digest: [u8; 8],
    key: Vec<u8>,
}

impl Owned {
    fn entry(&self) -> Entry<'_> {
        Entry { digest: self.digest, stamp: self.stamp, row_digest: self.row_digest, key: &self.key }
    }
}

impl From<Entry<'_>> for Owned {
    fn from(entry: Entry<'_>) -> Owned {
        let Entry { digest, stamp, row_digest, key } = entry;
        Owned { digest, stamp, row_digest, key: key.to_vec() }
    }
}

/// Uniform digests, and ones that share prefixes or are equal.
fn digest() -> impl Strategy<Value = Digest> {
    let tied = (0u8..3, 0u8..3).prop_map(|(first, last)| {
        let mut bytes = [0x55; 32];
        (bytes[0], bytes[31]) = (first, last);
        bytes
    });
    prop_oneof![4 => any::<[u8; 32]>(), 1 => tied].prop_map(Digest)
}

/// Entries in order, with keys of one length or of many, and ordinals close together or far apart.
fn entries() -> impl Strategy<Value = Vec<Owned>> {
    let keys = prop_oneof![Just(0..1usize), Just(8..9), Just(0..40), Just(0..MAX_KEY_BYTES + 1)];
    let ordinals = prop_oneof![Just(0u64), Just(0x7f), Just(0x7fff), Just(0x7fff_ffff), Just((1 << 63) - 1)];
    let base = prop_oneof![Just(0u64), Just(1 << 40)];
    (keys, ordinals, base).prop_flat_map(|(keys, span, base)| {
        let ordinal = (0..=span).prop_map(move |delta| base.saturating_add(delta).min((1 << 63) - 1));
        let stamp = (ordinal, any::<bool>()).prop_map(|(ordinal, tombstone)| Stamp { ordinal, tombstone });
        let key = (keys, any::<u8>()).prop_map(|(length, byte)| vec![byte; length]);
        let entry = (digest(), stamp, any::<[u8; 8]>(), key)
            .prop_map(|(digest, stamp, row_digest, key)| Owned { digest, stamp, row_digest, key });
        vec(entry, 0..400).prop_map(|mut entries| {
            entries.sort_by_key(|entry| (entry.digest, entry.stamp.ordinal));
            entries
        })
    })
}

fn pack(entries: &[Owned]) -> Vec<Vec<u8>> {
    let mut builder = BlockBuilder::new();
    let mut blocks = Vec::new();
    for entry in entries {
        if !builder.try_push(&entry.entry()).unwrap() {
            assert!(!builder.is_empty());
            blocks.push(builder.finish());
            assert!(builder.try_push(&entry.entry()).unwrap());
        }
    }
    if !builder.is_empty() {
        blocks.push(builder.finish());
    }
    blocks
}

/// `count` entries with bigint keys and one ordinal.
fn plain(count: usize) -> Vec<Owned> {
    let entry = |i: usize| {
        let mut digest = Digest([0x11; 32]);
        digest.0[..8].copy_from_slice(&((i as u64) << 50).to_be_bytes());
        let stamp = Stamp { ordinal: 1 << 50, tombstone: false };
        Owned { digest, stamp, row_digest: [i as u8; 8], key: (i as u64).to_be_bytes().to_vec() }
    };
    (0..count).map(entry).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]

    #[test]
    fn blocks_and_back(entries in entries()) {
        let blocks = pack(&entries);
        let mut read = Vec::new();
        for block in &blocks {
            prop_assert!(block.len() <= MAX_BLOCK_BYTES);
            let view = BlockView::parse(block).unwrap();
            for i in 0..view.len() {
                prop_assert_eq!(view.entry(i).digest, view.digest(i));
                prop_assert!(view.has_digest(i, &view.digest(i)));
                prop_assert_eq!(view.entry(i).stamp, view.stamp(i));
                read.push(Owned::from(view.entry(i)));
            }
        }
        prop_assert_eq!(read, entries);
    }

    #[test]
    fn search_finds_what_a_scan_finds(entries in entries(), others in vec(digest(), 20), from: Index) {
        for block in pack(&entries) {
            let view = BlockView::parse(&block).unwrap();
            let from = from.index(view.len() + 1);
            for digest in view.digests().chain(others.iter().copied()) {
                let bound =
                    (from..view.len()).find(|i| view.digest(*i) >= digest).unwrap_or(view.len());
                prop_assert_eq!(view.lower_bound(&digest, from), bound);
                let found = view.find(&digest);
                let scan = (0..view.len()).filter(|i| view.digest(*i) == digest);
                prop_assert_eq!(found.collect::<Vec<_>>(), scan.collect::<Vec<_>>());
            }
            prop_assert_eq!(view.lower_bound(&others[0], view.len() + 1), view.len());
        }
    }

    #[test]
    fn any_damage_is_found(at: Index, bit in 0..8u8) {
        let mut block = pack(&plain(100)).remove(0);
        let at = at.index(block.len());
        block[at] ^= 1 << bit;
        prop_assert!(BlockView::parse(&block).is_err());
    }

    #[test]
    fn garbage_never_panics(block in vec(any::<u8>(), 0..200)) {
        prop_assert!(BlockView::parse(&block).is_err());
    }

    /// A right checksum over wrong contents must not lead out of bounds either.
    #[test]
    fn forged_blocks_never_panic(
        head in (0..12u16, prop_oneof![Just(VARIABLE_KEYS), 0..10u16], 0..9u8, any::<u64>()),
        body in vec(prop_oneof![Just(0u8), any::<u8>()], 0..700),
        seek in digest(),
    ) {
        let (entries, key_width, stamp_width, base) = head;
        let mut block = vec![MAGIC, VERSION];
        block.extend(entries.to_be_bytes());
        block.extend(key_width.to_be_bytes());
        block.extend([stamp_width, 0]);
        block.extend(base.to_be_bytes());
        block.extend([0; 4]);
        block.extend(body);
        let crc = view::crc(&block);
        block[CRC_AT..HEADER_LEN].copy_from_slice(&crc.to_be_bytes());
        if let Ok(view) = BlockView::parse(&block) {
            for i in 0..view.len() {
                view.entry(i);
                view.find(&view.entry(i).digest);
            }
            prop_assert!(view.lower_bound(&seek, 0) <= view.len());
        }
    }
}

#[test]
fn an_entry_with_a_bigint_key_takes_48_bytes() {
    let entries = plain(1000);
    let blocks = pack(&entries);
    assert_eq!(blocks[0].len(), HEADER_LEN + 48 * ((MAX_BLOCK_BYTES - HEADER_LEN) / 48));
    let bytes: usize = blocks.iter().map(Vec::len).sum();
    assert_eq!(bytes, 1000 * 48 + blocks.len() * HEADER_LEN);
}

#[test]
fn keys_of_one_length_on_average_are_not_of_one_length() {
    let mut entries = plain(3);
    for (entry, length) in entries.iter_mut().zip([0, 2, 1]) {
        entry.key.truncate(length);
    }
    let block = pack(&entries).remove(0);
    let view = BlockView::parse(&block).unwrap();
    assert!((0..3).all(|i| view.entry(i) == entries[i].entry()));
}

#[test]
fn stamps_take_what_they_need() {
    let sizes = [(0, 0), (1, 1), (127, 1), (128, 2), (1 << 15, 4), (1 << 31, 8), (1 << 62, 8)];
    for (delta, width) in sizes {
        let mut entries = plain(2);
        entries[0].stamp.ordinal = 0;
        entries[1].stamp.ordinal = delta;
        assert_eq!(pack(&entries)[0].len(), HEADER_LEN + 2 * (48 + width), "delta {delta}");
    }
    let mut tombstone = plain(2);
    tombstone[1].stamp.tombstone = true;
    assert_eq!(pack(&tombstone)[0].len(), HEADER_LEN + 2 * 49);
}

#[test]
fn a_block_without_entries() {
    let mut builder = BlockBuilder::new();
    assert_eq!((builder.is_empty(), builder.len(), builder.first_digest()), (true, 0, None));
    let block = builder.finish();
    let view = BlockView::parse(&block).unwrap();
    assert!(view.is_empty());
    assert_eq!(view.find(&Digest([1; 32])), 0..0);
}

#[test]
fn what_no_block_can_hold_is_refused() {
    let mut builder = BlockBuilder::new();
    let entries = plain(2);
    assert_eq!(builder.try_push(&entries[1].entry()), Ok(true));
    assert_eq!(builder.first_digest(), Some(entries[1].digest));
    assert_eq!(builder.try_push(&entries[0].entry()), Err(BlockError::Unsorted));
    let mut older = entries[1].clone();
    older.stamp.ordinal -= 1;
    assert_eq!(builder.try_push(&older.entry()), Err(BlockError::Unsorted));
    let long = vec![0; MAX_KEY_BYTES + 1];
    let entry = Entry { key: &long, ..entries[1].entry() };
    assert_eq!(builder.try_push(&entry), Err(BlockError::KeyTooLong(MAX_KEY_BYTES + 1)));
    let late = Stamp { ordinal: 1 << 63, tombstone: false };
    let entry = Entry { stamp: late, ..entries[1].entry() };
    assert_eq!(builder.try_push(&entry), Err(BlockError::Ordinal(1 << 63)));
    assert_eq!(builder.len(), 1);
    builder.finish();
    assert_eq!(builder.try_push(&entries[0].entry()), Ok(true));
}

#[test]
fn versions_are_told_apart() {
    let mut block = pack(&plain(1)).remove(0);
    block[1] = VERSION + 1;
    assert_eq!(BlockView::parse(&block).unwrap_err(), BlockError::Version(VERSION + 1));
    block[0] = 0;
    assert_eq!(BlockView::parse(&block).unwrap_err(), BlockError::Magic);
    assert_eq!(BlockView::parse(&[]).unwrap_err(), BlockError::Magic);
}
