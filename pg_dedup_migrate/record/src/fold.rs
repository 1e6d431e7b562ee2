//! What becomes of each record of a chunk: a pure state machine between the batch and the target.
//!
//! ```text
//!  null key ─▶ quarantined          match_keys ─▶ unchanged · written before · duplicate · quarantined (key collision)
//!                                                  │ absent, changed
//!                                                  ▼
//!                        a group of equal content: claim ─▶ duplicate: every member is one
//!                                                  │ new
//!                                                  ▼
//!                    one member is written (changed rows first); refused ─▶ the next member is tried
//!                                                  │ written
//!                                                  ▼
//!                    the others are duplicates; those that stand in the target with other content are deleted
//! ```

mod lists;

use std::collections::{HashMap, HashSet};
use std::sync::OnceLock;

use crate::key_list::KeyList;
pub use crate::refusal::Refusal;
use crate::wire::{self, WireError, encode_key};
use crate::{Batch, BatchError, Checksum, Groups};

pub use lists::{Lists, Parts};

/// Why the records of a chunk can't be settled.
#[derive(Debug, thiserror::Error)]
pub enum FoldError {
    /// The source's stream or a key in it is malformed.
    #[error("the stream of the chunk: {0}")]
    Stream(#[from] BatchError),
    /// A key is too long to be packed.
    #[error("a key can't be packed: {0}")]
    Key(#[from] WireError),
    /// The other side of the protocol answered something else than was asked.
    #[error("{call} answered {answers} verdicts to {questions} questions, or one it does not know")]
    Verdicts {
        /// The protocol's call.
        call: &'static str,
        /// Verdicts received.
        answers: usize,
        /// Questions asked.
        questions: usize,
    },
    /// A step of the protocol was left out.
    #[error("a record of the chunk was left undecided")]
    Undecided,
}

type Result<T> = std::result::Result<T, FoldError>;

/// What became of a record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Outcome {
    /// Not decided.
    Open,
    /// Refused for a foreign key that may be satisfied yet.
    Parked,
    Inserted,
    Updated,
    /// Inserted by an earlier finish of this very chunk: in the books, not in the manifest.
    InsertedBefore,
    /// Updated by an earlier finish of this very chunk.
    UpdatedBefore,
    Unchanged,
    Duplicate,
    Quarantined,
}

/// Where a group of equal content stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum GroupState {
    /// Not asked yet.
    Undecided,
    /// Asked; the answer is with the transaction that holds the claim.
    Pending,
    /// Ours to write.
    Writing,
    /// In the target.
    Standing,
    /// Nobody could write it.
    Refused,
}

/// What the target has under a record's key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Key {
    /// Nothing.
    Absent,
    /// A row with other values, locked by us.
    Changed,
    /// An earlier record of this chunk has the same key and the same content: never written for itself.
    Repeated,
}

/// A refused record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refused {
    /// Its number in the batch.
    pub row: u32,
    /// Why.
    pub refusal: Refusal,
}

/// How a record is to be written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// As a new row.
    Insert,
    /// Over the row with its key.
    Upsert,
}

/// The packed values that `match_keys` takes, and which records they are of.
#[derive(Debug)]
pub struct KeysToMatch {
    rows: Vec<u32>,
    /// Packed keys.
    pub keys: Vec<u8>,
    /// Row digests in the same order.
    pub row_digests: Vec<u8>,
}

/// The books of a chunk, as `finish_chunk` takes them.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Books {
    /// source, inserted, updated, unchanged, duplicate, quarantined.
    pub counts: [u64; 6],
    /// The same six sums of row digests.
    pub checksums: Vec<u8>,
}

/// The state of a chunk's records.
pub struct Fold<'a> {
    batch: &'a Batch,
    keyless: bool,
    groups: Groups,
    /// Group of each row.
    group_of: Vec<u32>,
    states: Vec<GroupState>,
    keys: Vec<Key>,
    /// Packed key of each row; empty for a null key and in a keyless table.
    key_bytes: KeyList,
    outcomes: Vec<Outcome>,
    /// Groups whose verdict was asked for last.
    asked: Vec<u32>,
    /// Groups that still look for a member that can be written.
    writing: Vec<u32>,
    refused: Vec<Refused>,
    /// How many of them `refused_replacements` has looked at.
    replacements_asked: usize,
    /// Rows that share their key with another; found when first asked for.
    repeated: OnceLock<HashSet<u32>>,
}

impl<'a> Fold<'a> {
    /// Groups the batch; records with a null key are refused at once.
    pub fn new(batch: &'a Batch, keyless: bool) -> Result<Fold<'a>> {
        let groups = batch.groups();
        let mut group_of = vec![0u32; batch.len()];
        for (number, g) in (0u32..).zip(0..groups.len()) {
            for &row in groups.members(g) {
                group_of[row as usize] = number;
            }
        }
        let mut fold = Fold {
            batch,
            keyless,
            group_of,
            states: vec![GroupState::Undecided; groups.len()],
            groups,
            keys: vec![Key::Absent; batch.len()],
            key_bytes: KeyList::default(),
            outcomes: vec![Outcome::Open; batch.len()],
            asked: Vec::new(),
            writing: Vec::new(),
            refused: Vec::new(),
            replacements_asked: 0,
            repeated: OnceLock::new(),
        };
        if !keyless {
            // One pass in source order; later the keys are asked for in order of digest.
            fold.key_bytes = KeyList::with_capacity(batch.len());
            for row in 0..batch.len() {
                match fold.key_bytes.push_with(|out| batch.key_into(row, out)) {
                    Ok(()) => {}
                    Err(BatchError::NullKey { .. }) => fold.refuse(row as u32, Refusal::null_key()),
                    Err(error) => return Err(error.into()),
                }
            }
        }
        Ok(fold)
    }

    /// What `match_keys` is asked when the range may be occupied.
    pub fn keys_to_match(&self) -> Result<KeysToMatch> {
        let mut ask = KeysToMatch { rows: Vec::new(), keys: Vec::new(), row_digests: Vec::new() };
        for row in 0..self.batch.len() {
            if self.outcomes[row] != Outcome::Open {
                continue;
            }
            encode_key(self.key(row as u32), &mut ask.keys)?;
            ask.row_digests.extend_from_slice(&self.batch.digests(row).row.0);
            ask.rows.push(row as u32);
        }
        Ok(ask)
    }

    /// Takes the verdicts of `match_keys`.
    pub fn matched(&mut self, asked: &KeysToMatch, verdicts: &[u8]) -> Result<()> {
        expect_verdicts("match_keys", verdicts, asked.rows.len(), 6)?;
        let mut first_of: HashMap<&[u8], u32> = HashMap::with_capacity(asked.rows.len());
        let keys = wire::keys(&asked.keys);
        for ((&row, &verdict), key) in asked.rows.iter().zip(verdicts).zip(keys) {
            let key = key?;
            let first = *first_of.entry(key).or_insert(row);
            if first != row {
                self.repeated(first, row);
                continue;
            }
            match verdict {
                0 => {}
                1 => self.stands(row, Outcome::Unchanged),
                2 => self.keys[row as usize] = Key::Changed,
                3 => self.refuse(row, Refusal::key_collision()),
                // Another chunk of this pass delivered the same record: its row stands, this one is one too many.
                4 => self.stands(row, Outcome::Duplicate),
                5 => self.stands(row, Outcome::InsertedBefore),
                _ => self.stands(row, Outcome::UpdatedBefore),
            }
        }
        Ok(())
    }

    /// A later record with the key of an earlier one. Within a pass the first wins.
    fn repeated(&mut self, first: u32, row: u32) {
        let content = |row: u32| self.batch.digests(row as usize).content;
        if content(first) == content(row) {
            self.keys[row as usize] = Key::Repeated;
        } else {
            self.refuse(row, Refusal::key_collision());
        }
    }

    fn stands(&mut self, row: u32, outcome: Outcome) {
        self.outcomes[row as usize] = outcome;
        self.states[self.group_of[row as usize] as usize] = GroupState::Standing;
    }

    /// The digests to claim: contents that something may have to be written for.
    pub fn digests_to_claim(&mut self) -> Vec<u8> {
        self.asked = (0u32..)
            .zip(&self.states)
            .filter(|(g, state)| **state == GroupState::Undecided && self.candidate(*g).is_some())
            .map(|(g, _)| g)
            .collect();
        self.digests_of_asked()
    }

    /// Takes the verdicts of `claim`.
    pub fn claimed(&mut self, verdicts: &[u8]) -> Result<()> {
        expect_verdicts("claim", verdicts, self.asked.len(), 2)?;
        self.take_verdicts(verdicts);
        Ok(())
    }

    /// The digests whose owners have to be waited for.
    pub fn digests_to_resolve(&mut self) -> Vec<u8> {
        self.asked =
            (0u32..).zip(&self.states).filter(|(_, s)| **s == GroupState::Pending).map(|(g, _)| g).collect();
        self.digests_of_asked()
    }

    /// Takes the verdicts of `resolve`.
    pub fn resolved(&mut self, verdicts: &[u8]) -> Result<()> {
        expect_verdicts("resolve", verdicts, self.asked.len(), 1)?;
        self.take_verdicts(verdicts);
        Ok(())
    }

    fn digests_of_asked(&self) -> Vec<u8> {
        let mut digests = Vec::with_capacity(self.asked.len() * 32);
        for &g in &self.asked {
            digests.extend_from_slice(&self.groups.digest(g as usize).0);
        }
        digests
    }

    fn take_verdicts(&mut self, verdicts: &[u8]) {
        for (&g, &verdict) in self.asked.iter().zip(verdicts) {
            self.states[g as usize] = match verdict {
                0 => {
                    self.writing.push(g);
                    GroupState::Writing
                }
                1 => GroupState::Standing,
                _ => GroupState::Pending,
            };
        }
    }

    /// The member of a group to be written next: rows that stand in the target first, since the others would leave one
    /// to be deleted.
    fn candidate(&self, g: u32) -> Option<u32> {
        let members = self.groups.members(g as usize);
        let open = |row: &&u32| self.outcomes[**row as usize] == Outcome::Open;
        let with =
            |key: Key| members.iter().filter(open).find(|row| self.keys[**row as usize] == key).copied();
        with(Key::Changed).or_else(|| with(Key::Absent))
    }

    /// The records to be written now in one way, in source order, which is kind to the target's indexes.
    pub fn next_to_write(&mut self, way: Way) -> Vec<u32> {
        let mut writing = std::mem::take(&mut self.writing);
        let mut rows = Vec::new();
        writing.retain(|&g| {
            if self.states[g as usize] != GroupState::Writing {
                return false;
            }
            let parked = |row: &u32| self.outcomes[*row as usize] == Outcome::Parked;
            if self.groups.members(g as usize).iter().any(parked) {
                return true;
            }
            let Some(row) = self.candidate(g) else {
                self.states[g as usize] = GroupState::Refused;
                return false;
            };
            if (self.keys[row as usize] == Key::Changed) == (way == Way::Upsert) {
                rows.push(row);
            }
            true
        });
        self.writing = writing;
        rows.sort_unstable();
        rows
    }

    /// A record was written.
    pub fn written(&mut self, row: u32, way: Way) {
        self.stands(row, if way == Way::Insert { Outcome::Inserted } else { Outcome::Updated });
    }

    /// A record waits for a row that a foreign key of it points at, and its group waits with it.
    pub fn park(&mut self, row: u32) {
        self.outcomes[row as usize] = Outcome::Parked;
    }

    /// A parked record may be tried again.
    pub fn unpark(&mut self, row: u32) {
        if self.outcomes[row as usize] == Outcome::Parked {
            self.outcomes[row as usize] = Outcome::Open;
        }
    }

    /// How a record would be written.
    pub fn way(&self, row: u32) -> Way {
        if self.keys[row as usize] == Key::Changed { Way::Upsert } else { Way::Insert }
    }

    /// A record was refused for good. In a keyless table its equals are the very same record and go with it.
    pub fn refuse(&mut self, row: u32, refusal: Refusal) {
        if self.keyless {
            let g = self.group_of[row as usize] as usize;
            let same = self.batch.digests(row as usize).row;
            for &other in self.groups.members(g) {
                let open = self.outcomes[other as usize] == Outcome::Open;
                if other != row && open && self.batch.digests(other as usize).row == same {
                    self.outcomes[other as usize] = Outcome::Quarantined;
                    self.refused.push(Refused { row: other, refusal: refusal.clone() });
                }
            }
        }
        self.outcomes[row as usize] = Outcome::Quarantined;
        self.refused.push(Refused { row, refusal });
    }

    /// Whether rows of the target are to be replaced. Their refusals have to be known before anything else is written.
    pub fn replaces(&self) -> bool {
        self.keys.contains(&Key::Changed)
    }

    /// Packed keys of the rows whose replacement was refused since this was last asked: they stay as they are.
    pub fn refused_replacements(&mut self) -> Result<Vec<u8>> {
        let mut keys = Vec::new();
        for refused in &self.refused[self.replacements_asked..] {
            if self.keys[refused.row as usize] == Key::Changed {
                encode_key(self.key(refused.row), &mut keys)?;
            }
        }
        self.replacements_asked = self.refused.len();
        Ok(keys)
    }

    /// Contents that stand in the target after all: their records are duplicates. Answers those that were written meanwhile: their rows
    /// are to be taken back.
    pub fn stay(&mut self, digests: &[u8]) -> Vec<u32> {
        let mut in_vain = Vec::new();
        for digest in digests.as_chunks::<32>().0 {
            let mut found = 0..self.groups.len();
            while !found.is_empty() {
                let middle = found.start + found.len() / 2;
                match self.groups.digest(middle).0.cmp(digest) {
                    std::cmp::Ordering::Less => found.start = middle + 1,
                    std::cmp::Ordering::Greater => found.end = middle,
                    std::cmp::Ordering::Equal => {
                        self.states[middle] = GroupState::Standing;
                        for &row in self.groups.members(middle) {
                            let outcome = &mut self.outcomes[row as usize];
                            if matches!(outcome, Outcome::Inserted | Outcome::Updated) {
                                *outcome = Outcome::Duplicate;
                                in_vain.push(row);
                            }
                        }
                        break;
                    }
                }
            }
        }
        in_vain
    }

    /// The records refused so far.
    pub fn refused(&self) -> &[Refused] {
        &self.refused
    }

    /// Whether another record of the batch has the same key.
    pub fn key_is_repeated(&self, row: u32) -> bool {
        !self.keyless && self.repeated.get_or_init(|| self.find_repeated()).contains(&row)
    }

    fn find_repeated(&self) -> HashSet<u32> {
        let mut first_of: HashMap<&[u8], u32> = HashMap::with_capacity(self.batch.len());
        let mut repeated = HashSet::new();
        for row in 0..self.batch.len() as u32 {
            let key = self.key(row);
            if key.is_empty() {
                continue;
            }
            if let Some(first) = first_of.get(key) {
                repeated.extend([*first, row]);
            } else {
                first_of.insert(key, row);
            }
        }
        repeated
    }

    /// Key bytes of a record; empty where there is none.
    pub fn key(&self, row: u32) -> &[u8] {
        if self.keyless { &[] } else { self.key_bytes.get(row as usize) }
    }

    /// Records whose rows stand in the target with content they no longer have in the source, and whose new content another row has by
    /// now: they are duplicates, and those rows are to go.
    pub fn superseded(&mut self) -> Vec<u32> {
        let mut superseded = Vec::new();
        for row in 0..self.batch.len() {
            let open = matches!(self.outcomes[row], Outcome::Open | Outcome::Parked);
            if open && self.keys[row] == Key::Changed && self.stands_elsewhere(row) {
                self.outcomes[row] = Outcome::Duplicate;
                superseded.push(row as u32);
            }
        }
        superseded
    }

    fn stands_elsewhere(&self, row: usize) -> bool {
        self.states[self.group_of[row] as usize] == GroupState::Standing
    }

    /// Decides what is left when everything has been written that can be, and nothing is superseded any more.
    pub fn settle(&mut self) -> Result<()> {
        for row in 0..self.batch.len() {
            if !matches!(self.outcomes[row], Outcome::Open | Outcome::Parked) {
                continue;
            }
            if self.stands_elsewhere(row) {
                self.outcomes[row] = Outcome::Duplicate;
            } else if self.keys[row] == Key::Repeated {
                let refusal = self.refusal_of_first(row as u32);
                self.refuse(row as u32, refusal);
            } else {
                return Err(FoldError::Undecided);
            }
        }
        Ok(())
    }

    /// Why the record was refused whose key and content this one repeats.
    fn refusal_of_first(&self, row: u32) -> Refusal {
        let first = self.refused.iter().find(|refused| {
            self.key(refused.row) == self.key(row)
                && self.group_of[refused.row as usize] == self.group_of[row as usize]
        });
        first.map_or_else(Refusal::key_collision, |first| first.refusal.clone())
    }

    /// The packed keys of some records.
    pub fn packed_keys(&self, rows: &[u32]) -> Result<Vec<u8>> {
        let mut keys = Vec::new();
        rows.iter().try_for_each(|&row| encode_key(self.key(row), &mut keys))?;
        Ok(keys)
    }

    /// The row of a superseded record could not be removed: it stays as it is, and the record is set aside.
    pub fn keep(&mut self, row: u32, refusal: Refusal) {
        self.outcomes[row as usize] = Outcome::Quarantined;
        self.refused.push(Refused { row, refusal });
    }

    /// The books, once everything is settled.
    pub fn books(&self) -> Result<Books> {
        let mut books = Books::default();
        let mut sums: [Checksum; 6] = std::array::from_fn(|_| Checksum::default());
        for (row, outcome) in self.outcomes.iter().enumerate() {
            let place = match outcome {
                Outcome::Inserted | Outcome::InsertedBefore => 1,
                Outcome::Updated | Outcome::UpdatedBefore => 2,
                Outcome::Unchanged => 3,
                Outcome::Duplicate => 4,
                Outcome::Quarantined => 5,
                Outcome::Open | Outcome::Parked => {
                    return Err(FoldError::Undecided);
                }
            };
            books.counts[place] += 1;
            sums[place].add(&self.batch.digests(row).row);
        }
        books.counts[0] = self.batch.len() as u64;
        sums[0] = self.batch.checksum();
        books.checksums = sums.iter().flat_map(Checksum::to_bytes).collect();
        Ok(books)
    }

    /// Manifest and ledger, once everything is settled, in parts of about so many bytes.
    pub fn lists(&self, part_bytes: usize) -> Parts<'_> {
        Parts::new(self, part_bytes)
    }
}

fn expect_verdicts(call: &'static str, verdicts: &[u8], wanted: usize, highest: u8) -> Result<()> {
    if verdicts.len() == wanted && verdicts.iter().all(|verdict| *verdict <= highest) {
        return Ok(());
    }
    Err(FoldError::Verdicts { call, answers: verdicts.len(), questions: wanted })
}

#[cfg(test)]
pub(crate) mod tests;
