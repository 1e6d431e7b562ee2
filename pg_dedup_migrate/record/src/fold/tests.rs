//! Tests of [`super::Fold`] on small batches of (key, content).

use crate::{BatchBuilder, Canonical, Column, ENCODING_VERSION, Layout, pgcopy, wire};

use super::*;

fn layout() -> Layout {
    let column =
        |name: &str| Column { name: name.into(), type_name: "text".into(), canonical: Canonical::Verbatim };
    Layout {
        encoding_version: ENCODING_VERSION,
        columns: vec![column("k"), column("c")],
        content: vec![1],
        key: vec![0],
        rest: vec![],
    }
}

/// A batch of (key, content).
pub(crate) fn batch(rows: &[(Option<&str>, &str)], keyless: bool) -> Batch {
    let mut builder = BatchBuilder::new(&layout(), keyless);
    let mut data = pgcopy::header().to_vec();
    for (key, content) in rows {
        pgcopy::write_tuple(&[key.map(str::as_bytes), Some(content.as_bytes())], &mut data).unwrap();
    }
    data.extend_from_slice(pgcopy::trailer());
    builder.push(&data).unwrap();
    builder.finish().unwrap()
}

/// Claims everything with one verdict for all.
fn claim_all(fold: &mut Fold<'_>, verdict: u8) {
    let asked = fold.digests_to_claim().len() / 32;
    fold.claimed(&vec![verdict; asked]).unwrap();
}

fn refusal() -> Refusal {
    Refusal { sqlstate: "23514".into(), reason: "check_violation".into(), message: "no".into() }
}

#[test]
fn duplicates_inside_a_chunk_are_written_once() {
    let batch = batch(&[(Some("1"), "x"), (Some("2"), "y"), (Some("3"), "x")], false);
    let mut fold = Fold::new(&batch, false).unwrap();
    claim_all(&mut fold, 0);
    assert_eq!(fold.next_to_write(Way::Insert), [0, 1]);
    assert!(fold.next_to_write(Way::Upsert).is_empty());
    fold.written(0, Way::Insert);
    fold.written(1, Way::Insert);
    assert!(fold.next_to_write(Way::Insert).is_empty());
    assert!(fold.superseded().is_empty());
    fold.settle().unwrap();
    let books = fold.books().unwrap();
    assert_eq!(books.counts, [3, 2, 0, 0, 1, 0]);
    let lists = fold.lists(usize::MAX).next().unwrap().unwrap();
    let manifest: Vec<_> = wire::manifest(&lists.manifest).collect::<std::result::Result<_, _>>().unwrap();
    assert_eq!(manifest.len(), 2);
    let ledger: Vec<_> = wire::ledger(&lists.ledger).collect::<std::result::Result<_, _>>().unwrap();
    assert_eq!(ledger[0].key, b"3");
}

#[test]
fn the_books_balance_as_checksums_too() {
    let batch = batch(&[(Some("1"), "x"), (None, "n"), (Some("2"), "x"), (Some("4"), "z")], false);
    let mut fold = Fold::new(&batch, false).unwrap();
    claim_all(&mut fold, 0);
    for row in fold.next_to_write(Way::Insert) {
        fold.written(row, Way::Insert);
    }
    fold.settle().unwrap();
    let books = fold.books().unwrap();
    assert_eq!(books.counts, [4, 2, 0, 0, 1, 1]);
    let sums: Vec<Checksum> =
        books.checksums.chunks(32).map(|c| Checksum::from_bytes(c.try_into().unwrap())).collect();
    let mut parts = Checksum::default();
    sums[1..].iter().for_each(|sum| parts.merge(sum));
    assert_eq!(parts.to_bytes(), sums[0].to_bytes());
}

#[test]
fn a_refused_record_hands_over_to_its_duplicate() {
    let batch = batch(&[(Some("1"), "x"), (Some("2"), "x"), (Some("3"), "x")], false);
    let mut fold = Fold::new(&batch, false).unwrap();
    claim_all(&mut fold, 0);
    assert_eq!(fold.next_to_write(Way::Insert), [0]);
    fold.refuse(0, refusal());
    assert_eq!(fold.next_to_write(Way::Insert), [1]);
    fold.written(1, Way::Insert);
    fold.settle().unwrap();
    assert_eq!(fold.books().unwrap().counts, [3, 1, 0, 0, 1, 1]);
}

#[test]
fn duplicates_of_a_refused_record_are_refused_with_it() {
    let batch = batch(&[(Some("1"), "x"), (Some("2"), "x")], false);
    let mut fold = Fold::new(&batch, false).unwrap();
    claim_all(&mut fold, 0);
    fold.refuse(0, refusal());
    assert_eq!(fold.next_to_write(Way::Insert), [1]);
    fold.refuse(1, refusal());
    assert!(fold.next_to_write(Way::Insert).is_empty());
    fold.settle().unwrap();
    assert_eq!(fold.books().unwrap().counts, [2, 0, 0, 0, 0, 2]);
}

#[test]
fn the_very_same_keyless_records_are_refused_at_once() {
    let batch = batch(&[(None, "x"), (None, "x"), (None, "y")], true);
    let mut fold = Fold::new(&batch, true).unwrap();
    claim_all(&mut fold, 0);
    fold.refuse(0, refusal());
    assert_eq!(fold.refused().len(), 2);
    assert_eq!(fold.next_to_write(Way::Insert), [2]);
    fold.written(2, Way::Insert);
    fold.settle().unwrap();
    assert_eq!(fold.books().unwrap().counts, [3, 1, 0, 0, 0, 2]);
}

#[test]
fn an_occupied_range_updates_deletes_and_leaves_alone() {
    let rows =
        [(Some("1"), "same"), (Some("2"), "new"), (Some("3"), "old"), (Some("4"), "z"), (Some("5"), "same")];
    let batch = batch(&rows, false);
    let mut fold = Fold::new(&batch, false).unwrap();
    let ask = fold.keys_to_match().unwrap();
    assert_eq!(ask.row_digests.len(), 5 * 32);
    // 1 stands unchanged; 2 and 3 changed; 4 collides; 5 changed to what 1 has.
    fold.matched(&ask, &[1, 2, 2, 3, 2]).unwrap();
    let claimed = fold.digests_to_claim();
    assert_eq!(claimed.len(), 2 * 32);
    // "old" is a duplicate of something elsewhere, "new" is new.
    let old = batch.digests(2).content;
    let verdicts: Vec<u8> = claimed.chunks(32).map(|d| u8::from(d == old.as_bytes())).collect();
    fold.claimed(&verdicts).unwrap();
    assert!(fold.next_to_write(Way::Insert).is_empty());
    assert_eq!(fold.next_to_write(Way::Upsert), [1]);
    fold.written(1, Way::Upsert);
    let superseded = fold.superseded();
    let packed = fold.packed_keys(&superseded).unwrap();
    let keys: Vec<_> = wire::keys(&packed).collect::<std::result::Result<_, _>>().unwrap();
    assert_eq!(keys, [b"3", b"5"]);
    assert_eq!(fold.books().unwrap().counts, [5, 0, 1, 1, 2, 1]);
    // A foreign key keeps the second.
    fold.keep(superseded[1], Refusal::key_collision());
    assert_eq!(fold.books().unwrap().counts, [5, 0, 1, 1, 1, 2]);
}

#[test]
fn the_first_of_a_repeated_key_wins() {
    let batch = batch(&[(Some("1"), "a"), (Some("1"), "b"), (Some("1"), "a")], false);
    let mut fold = Fold::new(&batch, false).unwrap();
    let ask = fold.keys_to_match().unwrap();
    fold.matched(&ask, &[2, 2, 2]).unwrap();
    claim_all(&mut fold, 0);
    assert_eq!(fold.next_to_write(Way::Upsert), [0]);
    fold.written(0, Way::Upsert);
    // The row just written must not be taken for one that a duplicate left behind.
    assert!(fold.superseded().is_empty());
    fold.settle().unwrap();
    assert_eq!(fold.books().unwrap().counts, [3, 0, 1, 0, 1, 1]);
    assert_eq!(fold.refused()[0].refusal.reason, "key_collision");
    assert!(fold.key_is_repeated(0));
}

#[test]
fn pending_digests_wait_for_resolve() {
    let batch = batch(&[(Some("1"), "a"), (Some("2"), "b")], false);
    let mut fold = Fold::new(&batch, false).unwrap();
    claim_all(&mut fold, 2);
    assert!(fold.next_to_write(Way::Insert).is_empty());
    assert_eq!(fold.digests_to_resolve().len(), 64);
    fold.resolved(&[0, 1]).unwrap();
    let rows = fold.next_to_write(Way::Insert);
    assert_eq!(rows.len(), 1);
    fold.written(rows[0], Way::Insert);
    fold.settle().unwrap();
    assert_eq!(fold.books().unwrap().counts, [2, 1, 0, 0, 1, 0]);
}

#[test]
fn parked_records_come_back() {
    let batch = batch(&[(Some("1"), "a"), (Some("2"), "b")], false);
    let mut fold = Fold::new(&batch, false).unwrap();
    claim_all(&mut fold, 0);
    assert_eq!(fold.next_to_write(Way::Insert), [0, 1]);
    fold.park(0);
    fold.written(1, Way::Insert);
    assert!(fold.next_to_write(Way::Insert).is_empty());
    fold.unpark(0);
    assert_eq!(fold.next_to_write(Way::Insert), [0]);
    fold.written(0, Way::Insert);
    fold.settle().unwrap();
    assert_eq!(fold.books().unwrap().counts, [2, 2, 0, 0, 0, 0]);
}

#[test]
fn wrong_answers_are_errors() {
    let batch = batch(&[(Some("1"), "a")], false);
    let mut fold = Fold::new(&batch, false).unwrap();
    fold.digests_to_claim();
    assert!(fold.claimed(&[]).is_err());
    assert!(fold.claimed(&[3]).is_err());
    assert!(fold.books().is_err());
}

#[test]
fn what_an_earlier_finish_wrote_counts_and_is_not_written_again() {
    let batch = batch(&[(Some("1"), "a"), (Some("2"), "b"), (Some("3"), "c"), (Some("4"), "a")], false);
    let mut fold = Fold::new(&batch, false).unwrap();
    let ask = fold.keys_to_match().unwrap();
    fold.matched(&ask, &[5, 6, 4, 0]).unwrap();
    assert!(fold.digests_to_claim().is_empty());
    fold.claimed(&[]).unwrap();
    assert!(fold.superseded().is_empty());
    fold.settle().unwrap();
    let books = fold.books().unwrap();
    assert_eq!(books.counts, [4, 1, 1, 0, 2, 0]);
    assert!(fold.lists(usize::MAX).all(|part| part.unwrap().manifest.is_empty()));
}

#[test]
fn parts_of_the_lists_add_up() {
    let keys: Vec<String> = (0..100).map(|n| format!("{n:03}")).collect();
    let contents: Vec<String> = (0..100).map(|n| format!("{}", n % 40)).collect();
    let rows: Vec<_> =
        keys.iter().zip(&contents).map(|(key, content)| (Some(key.as_str()), content.as_str())).collect();
    let batch = batch(&rows, false);
    let mut fold = Fold::new(&batch, false).unwrap();
    claim_all(&mut fold, 0);
    for row in fold.next_to_write(Way::Insert) {
        fold.written(row, Way::Insert);
    }
    fold.settle().unwrap();
    let whole: Vec<Lists> = fold.lists(usize::MAX).map(|part| part.unwrap()).collect();
    assert_eq!(whole.len(), 1);
    assert_eq!(wire::manifest(&whole[0].manifest).filter(std::result::Result::is_ok).count(), 40);
    assert_eq!(wire::ledger(&whole[0].ledger).filter(std::result::Result::is_ok).count(), 60);
    for part_bytes in [1, 100, 1000] {
        let mut sum = Lists::default();
        let mut parts = 0;
        for part in fold.lists(part_bytes) {
            let part = part.unwrap();
            // Over by less than one content and its duplicates.
            assert!(part.manifest.len() + part.ledger.len() < part_bytes + 200);
            sum.manifest.extend(part.manifest);
            sum.ledger.extend(part.ledger);
            parts += 1;
        }
        assert!(parts > 1);
        assert_eq!(sum, whole[0]);
    }
}
