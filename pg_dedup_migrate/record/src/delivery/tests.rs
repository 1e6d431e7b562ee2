//! [`deliver`](super::deliver) against a table in memory that refuses what tables refuse.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::pin::pin;
use std::task::{Context, Poll, Waker};

use proptest::collection::{btree_map, btree_set, vec};
use proptest::prelude::*;

use super::*;
use crate::fold::tests::batch;
use crate::wire;

type Key = String;
type Content = String;

/// A table with a primary key, a CHECK and a foreign key to itself.
#[derive(Debug, Clone, Default)]
struct Table {
    rows: BTreeMap<Key, Content>,
    /// Contents that a CHECK refuses.
    poison: BTreeSet<Content>,
    /// Contents whose rows point at the row with this key.
    points_at: BTreeMap<Content, Key>,
    /// Contents that another table of the same index has.
    elsewhere: BTreeSet<Content>,
    /// Contents that another transaction has claimed, and whether it commits.
    claimed: BTreeMap<Content, bool>,
    /// Whether COPY names the line of a refused row.
    names_lines: bool,
}

/// One chunk's view of it.
struct Chunk<'a> {
    table: &'a mut Table,
    records: &'a [(Key, Content)],
    /// Keys whose rows are to be replaced.
    leaving: BTreeSet<Key>,
}

#[derive(Debug)]
#[expect(dead_code, reason = "a failed test prints it")]
enum Ended {
    Fold(FoldError),
    OverBudget,
    /// A row that was written in vain has to go, and another points at it.
    PointedAt,
}

impl From<FoldError> for Ended {
    fn from(error: FoldError) -> Ended {
        Ended::Fold(error)
    }
}

fn content_digest(content: &str) -> [u8; 32] {
    batch(&[(Some(""), content)], false).digests(0).content.0
}

fn row_digest(key: &str, content: &str) -> [u8; 32] {
    batch(&[(Some(key), content)], false).digests(0).row.0
}

fn keys_of(packed: &[u8]) -> Vec<Key> {
    wire::keys(packed).map(|key| String::from_utf8(key.unwrap().to_vec()).unwrap()).collect()
}

fn refused(sqlstate: &str, line: Option<usize>) -> Option<RefusedAttempt> {
    let refusal = Refusal { sqlstate: sqlstate.into(), reason: String::new(), message: String::new() };
    Some(RefusedAttempt { refusal, constraint: None, line })
}

impl Table {
    /// Whether some row points at nothing.
    fn dangles(&self) -> bool {
        self.rows.values().any(|c| self.points_at.get(c).is_some_and(|key| !self.rows.contains_key(key)))
    }

    fn holds(&self, content: &str, but: &BTreeSet<Key>) -> bool {
        self.elsewhere.contains(content) || self.rows.iter().any(|(k, c)| c == content && !but.contains(k))
    }
}

impl Chunk<'_> {
    fn contents(&self, digests: &[u8]) -> Vec<Content> {
        let known: HashMap<[u8; 32], &Content> =
            self.records.iter().map(|(_, content)| (content_digest(content), content)).collect();
        digests.as_chunks::<32>().0.iter().map(|digest| known[digest].clone()).collect()
    }
}

impl Target for Chunk<'_> {
    type Error = Ended;

    async fn match_keys(&mut self, ask: &KeysToMatch) -> Result<Vec<u8>, Ended> {
        let digests = ask.row_digests.as_chunks::<32>().0;
        let verdict = |(key, digest): (Key, &[u8; 32])| match self.table.rows.get(&key) {
            None => 0,
            Some(content) if row_digest(&key, content) == *digest => 1,
            Some(_) => {
                self.leaving.insert(key);
                2
            }
        };
        Ok(keys_of(&ask.keys).into_iter().zip(digests).map(verdict).collect())
    }

    async fn claim(&mut self, digests: &[u8]) -> Result<Vec<u8>, Ended> {
        let verdict = |content: Content| {
            if self.table.holds(&content, &self.leaving) {
                1
            } else if self.table.claimed.contains_key(&content) {
                2
            } else {
                0
            }
        };
        Ok(self.contents(digests).into_iter().map(verdict).collect())
    }

    async fn resolve(&mut self, digests: &[u8]) -> Result<Vec<u8>, Ended> {
        let contents = self.contents(digests);
        let commits = |content: Content| {
            let commits = self.table.claimed[&content];
            if commits {
                self.table.elsewhere.insert(content);
            }
            u8::from(commits)
        };
        Ok(contents.into_iter().map(commits).collect())
    }

    async fn write(&mut self, rows: &[u32], way: Way) -> Result<Option<RefusedAttempt>, Ended> {
        let mut after = self.table.clone();
        for (line, row) in rows.iter().enumerate() {
            let line = self.table.names_lines.then_some(line);
            let (key, content) = &self.records[*row as usize];
            if after.poison.contains(content) {
                return Ok(refused("23514", line));
            }
            let before = after.rows.insert(key.clone(), content.clone());
            match (way, before) {
                (Way::Insert, Some(_)) => return Ok(refused("23505", line)),
                (Way::Upsert, None) => panic!("there is no row {key} to replace"),
                _ => {}
            }
        }
        if after.dangles() {
            return Ok(refused("23503", None));
        }
        *self.table = after;
        Ok(None)
    }

    async fn remove(&mut self, keys: &[u8]) -> Result<Option<RefusedAttempt>, Ended> {
        let mut after = self.table.clone();
        for key in keys_of(keys) {
            assert!(after.rows.remove(&key).is_some(), "there is no row {key} to remove");
        }
        if after.dangles() {
            return Ok(refused("23503", None));
        }
        *self.table = after;
        Ok(None)
    }

    async fn keep(&mut self, keys: &[u8]) -> Result<Vec<u8>, Ended> {
        let contents = keys_of(keys).into_iter().map(|key| {
            assert!(self.leaving.remove(&key));
            content_digest(&self.table.rows[&key])
        });
        Ok(contents.collect::<Vec<_>>().concat())
    }

    async fn take_back(&mut self, keys: &[u8]) -> Result<(), Ended> {
        match self.remove(keys).await? {
            None => Ok(()),
            Some(_) => Err(Ended::PointedAt),
        }
    }

    async fn unique_violated(&mut self, _: &RefusedAttempt) -> Result<(), Ended> {
        Ok(())
    }

    fn over_budget(&self) -> Ended {
        Ended::OverBudget
    }
}

/// Delivers to the table; nothing in it waits.
fn deliver_to(
    table: &mut Table,
    records: &[(Key, Content)],
    fold: &mut Fold<'_>,
    budget: u64,
) -> Result<(), Ended> {
    let occupied = records.iter().any(|(key, _)| table.rows.contains_key(key));
    let mut chunk = Chunk { table, records, leaving: BTreeSet::new() };
    let delivery = pin!(deliver(fold, &mut chunk, occupied, budget));
    match delivery.poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(result) => result,
        Poll::Pending => panic!("nothing waits here"),
    }
}

fn letter(of: &'static str) -> impl Strategy<Value = String> {
    (0..of.len()).prop_map(move |at| of[at..=at].to_owned())
}

const KEYS: &str = "12345678";
const CONTENTS: &str = "abcdefgh";

fn tables() -> impl Strategy<Value = Table> {
    (
        // Contents stand once.
        btree_map(letter(CONTENTS), letter(KEYS), 0..6),
        btree_set(letter(CONTENTS), 0..3),
        btree_map(letter(CONTENTS), letter(KEYS), 0..3),
        btree_set(letter(CONTENTS), 0..2),
        btree_map(letter(CONTENTS), any::<bool>(), 0..2),
        any::<bool>(),
    )
        .prop_map(|(keys, poison, points_at, elsewhere, claimed, names_lines)| {
            let rows: BTreeMap<Key, Content> =
                keys.into_iter().map(|(content, key)| (key, content)).collect();
            let stands = |content: &Content| rows.values().any(|c| c == content);
            Table {
                poison: poison.into_iter().filter(|c| !stands(c)).collect(),
                points_at: points_at
                    .into_iter()
                    .filter(|(c, key)| !stands(c) || rows.contains_key(key))
                    .collect(),
                elsewhere: elsewhere.into_iter().filter(|c| !stands(c)).collect(),
                claimed: claimed.into_iter().filter(|(c, _)| !stands(c)).collect(),
                names_lines,
                rows,
            }
        })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    /// Whatever a table has and refuses: the books balance, each content stands once or each of its records is refused, nobody is refused
    /// without a reason, and rows that the chunk does not know are as they were.
    #[test]
    fn everything_arrives_or_is_refused(
        mut table in tables(),
        records in vec((letter(KEYS), letter(CONTENTS)), 0..12),
    ) {
        let before = table.clone();
        let rows: Vec<(Option<&str>, &str)> =
            records.iter().map(|(key, content)| (Some(key.as_str()), content.as_str())).collect();
        let batch = batch(&rows, false);
        let mut fold = Fold::new(&batch, false).unwrap();
        match deliver_to(&mut table, &records, &mut fold, u64::MAX) {
            Ok(()) => {}
            // The chunk fails as a whole.
            Err(Ended::PointedAt) => return Ok(()),
            Err(error) => panic!("{error:?}"),
        }

        let books = fold.books().unwrap();
        prop_assert_eq!(books.counts[1..].iter().sum::<u64>(), books.counts[0]);
        let refused: BTreeSet<u32> = fold.refused().iter().map(|refused| refused.row).collect();
        prop_assert_eq!(refused.len() as u64, books.counts[5]);
        let nobody = BTreeSet::new();
        for (row, (key, content)) in (0..).zip(&records) {
            prop_assert!(table.holds(content, &nobody) || refused.contains(&row), "{key}={content} is lost");
        }
        let mut times: HashMap<&Content, usize> = HashMap::new();
        for content in table.rows.values().chain(&table.elsewhere) {
            *times.entry(content).or_default() += 1;
        }
        prop_assert!(times.values().all(|times| *times == 1), "twice: {:?}", times);
        for refused in fold.refused() {
            let (key, content) = &records[refused.row as usize];
            let others = records.iter().filter(|(k, c)| k == key && c != content).count();
            let reason = match refused.refusal.sqlstate.as_str() {
                "23514" => table.poison.contains(content),
                "23505" => others > 0,
                // Its own, or that of a row which points at the one it was to replace or remove.
                "23503" => table.points_at.contains_key(content) || table.points_at.values().any(|k| k == key),
                _ => false,
            };
            prop_assert!(reason, "{key}={content} is refused with {:?}", refused.refusal);
        }
        let known: BTreeSet<&Key> = records.iter().map(|(key, _)| key).collect();
        let others = |table: &Table| -> BTreeMap<Key, Content> {
            table.rows.clone().into_iter().filter(|(key, _)| !known.contains(key)).collect()
        };
        prop_assert_eq!(others(&before), others(&table));
    }
}

fn records(list: &[(&str, &str)]) -> Vec<(Key, Content)> {
    list.iter().map(|(key, content)| ((*key).to_owned(), (*content).to_owned())).collect()
}

fn rows(list: &[(&str, &str)]) -> BTreeMap<Key, Content> {
    records(list).into_iter().collect()
}

/// Contents move on from key to key, and the last row can't become what it should: it keeps its content, and the record that took it over
/// meanwhile is a duplicate of it, without a row of its own.
#[test]
fn what_was_written_before_a_row_was_known_to_stay() {
    let mut table = Table {
        rows: rows(&[("1", "a"), ("2", "b"), ("3", "c")]),
        poison: ["p".to_owned()].into(),
        ..Table::default()
    };
    let list = [("1", "b"), ("2", "c"), ("3", "p")];
    let batch = batch(&list.map(|(key, content)| (Some(key), content)), false);
    let mut fold = Fold::new(&batch, false).unwrap();
    deliver_to(&mut table, &records(&list), &mut fold, 10).unwrap();
    assert_eq!(table.rows, rows(&[("1", "b"), ("3", "c")]));
    assert_eq!(fold.books().unwrap().counts, [3, 0, 1, 0, 1, 1]);
}

#[test]
fn the_budget_is_a_limit_not_a_target() {
    let poison = || Table { poison: ["p".to_owned(), "q".to_owned()].into(), ..Table::default() };
    let list = [("1", "p"), ("2", "q"), ("3", "x")];
    let batch = batch(&list.map(|(key, content)| (Some(key), content)), false);
    let mut fold = Fold::new(&batch, false).unwrap();
    let mut table = poison();
    deliver_to(&mut table, &records(&list), &mut fold, 2).unwrap();
    assert_eq!(table.rows, rows(&[("3", "x")]));
    let mut fold = Fold::new(&batch, false).unwrap();
    assert!(matches!(deliver_to(&mut poison(), &records(&list), &mut fold, 1), Err(Ended::OverBudget)));
}

/// Each points at the next: none can go in without the others, and all go in at once.
#[test]
fn rows_that_point_at_rows_of_their_chunk() {
    let points_at = [("a", "2"), ("b", "3"), ("c", "1")];
    let table = Table {
        points_at: points_at.map(|(content, key)| (content.to_owned(), key.to_owned())).into(),
        ..Table::default()
    };
    let list = [("1", "a"), ("2", "b"), ("3", "c")];
    let batch = batch(&list.map(|(key, content)| (Some(key), content)), false);
    let mut whole = table.clone();
    let mut fold = Fold::new(&batch, false).unwrap();
    deliver_to(&mut whole, &records(&list), &mut fold, 0).unwrap();
    assert_eq!(whole.rows, rows(&list));
}
