//! What must hold after every step, whatever the history.
//!
//! | | |
//! |---|---|
//! | `twice` | no content stands twice in rows that runs wrote; a rollback may bring a row back whose content was written anew meanwhile (docs/rollback.md) |
//! | `lost` | each content that a live run read stands, unless a later live run of its key read another one (docs/upsert.md), or a person took it away; of records that were dropped as duplicates a later run of their own key is no reason |
//! | `stale` | every entry of the index has its row, but for rows that people took away |
//! | `unindexed` | every row has its entry, but for rows that people made |
//! | `refused` | what is refused has changed nothing |
//! | `failed` | nothing else fails |
//! | `unclean` | a run of which nothing changed since, on neither side, is reconciled; a repaired one is, too |
//! | `left over` | when all runs are taken back, the target is what it was |

use super::memory::{Excuse, Memory, Read};
use super::player::Answer;
use super::state::State;
use super::step::{Content, Key, Run, Step};

/// What does not hold after a step.
pub fn judge(
    memory: &mut Memory,
    step: &Step,
    answer: &Answer,
    before: &State,
    after: &State,
) -> Vec<String> {
    let change = Change { step, answer, before, after };
    let mut complaints = change.failures();
    complaints.extend(change.lost(memory));
    complaints.extend(change.twice(memory));
    complaints.extend(change.index(memory));
    complaints.extend(change.verdicts(memory));
    complaints.extend(left_over(memory, after));
    complaints
}

struct Change<'a> {
    step: &'a Step,
    answer: &'a Answer,
    before: &'a State,
    after: &'a State,
}

impl Change<'_> {
    fn failures(&self) -> Vec<String> {
        let mut complaints = Vec::new();
        match self.answer {
            Answer::Failed(error) => complaints.push(format!("failed: {error}")),
            Answer::Refused if !self.is_unchanged() => {
                complaints.push("refused: and yet something was changed".to_owned());
            }
            _ => {}
        }
        let failed = self.after.chunks.iter().filter(|(_, chunk)| chunk.status == "failed");
        let is_new =
            |name: &(Run, String)| self.before.chunks.get(name).is_none_or(|chunk| chunk.status != "failed");
        for ((run, name), chunk) in failed.filter(|(name, _)| is_new(name)) {
            complaints.push(format!("failed: chunk {name} of r{run}: {}", chunk.error));
        }
        complaints
    }

    fn is_unchanged(&self) -> bool {
        self.before == self.after
    }

    /// Records that live runs read and whose contents stand nowhere, without an excuse.
    fn lost(&self, memory: &mut Memory) -> Vec<String> {
        let mut complaints = Vec::new();
        let mut excused = std::mem::take(&mut memory.excused);
        let all: Vec<(Run, Key, Read)> = memory
            .begun
            .iter()
            .filter(|(run, _)| self.after.is_live(**run))
            .flat_map(|(run, begun)| begun.reads.iter().map(|(key, read)| (*run, *key, *read)))
            .collect();
        for (run, key, read) in all {
            let name = (run, key);
            if self.is_there(run, key, &read) {
                excused.remove(&name);
                continue;
            }
            let known = excused.get(&name).filter(|(of, _)| *of == read).map(|(_, excuse)| *excuse);
            if known.is_some_and(|excuse| self.still_counts(excuse)) {
                continue;
            }
            excused.remove(&name);
            match self.excuse(memory, run, key, &read) {
                Some(Some(excuse)) => drop(excused.insert(name, (read, excuse))),
                Some(None) => {}
                None => complaints.push(format!(
                    "lost: r{run} ({}) read {key}={}, which stands nowhere{}",
                    self.after.runs[&run],
                    read.content,
                    if self.is_dropped(run, key, &read) { "; it was dropped as a duplicate" } else { "" }
                )),
            }
        }
        memory.excused = excused;
        complaints
    }

    /// The content stands, or the record is set aside, or its chunk is to be done again.
    fn is_there(&self, run: Run, key: Key, read: &Read) -> bool {
        let open = self.after.chunk_of(run, key).is_none_or(|chunk| chunk.status != "verified");
        // A run that was given up has no claim on what it dropped.
        let given_up = self.after.runs.get(&run).is_some_and(|status| status == "cancelled");
        open || given_up && self.is_dropped(run, key, read)
            || self.after.stands(read.content)
            || self.after.aside.contains(&(run, key))
    }

    fn is_dropped(&self, run: Run, key: Key, read: &Read) -> bool {
        self.after.ledger.contains(&(run, key, read.content))
    }

    fn still_counts(&self, excuse: Excuse) -> bool {
        match excuse {
            Excuse::Extra(by) => self.after.is_live(by),
            Excuse::ByHand | Excuse::Halted => true,
        }
    }

    /// `None`: there is none; one that is to be remembered, or one that can be seen as long as it counts.
    fn excuse(&self, memory: &Memory, run: Run, key: Key, read: &Read) -> Option<Option<Excuse>> {
        let dropped = self.is_dropped(run, key, read);
        if !dropped && memory.is_read_later(self.after, run, key, read) {
            return Some(None);
        }
        if !dropped && self.is_kept(memory, run, key) {
            return Some(None);
        }
        let touched = memory.touched.get(&key).is_some_and(|step| *step >= read.step);
        let stale = self.after.stale().iter().any(|(_, content)| *content == read.content);
        let stood = self.before.stands(read.content);
        if !dropped && touched || stale || matches!(self.step, Step::ByHand(..)) {
            return Some(Some(Excuse::ByHand));
        }
        if !stood {
            return None;
        }
        match self.step {
            Step::Run(by, ..) | Step::Resume(by) | Step::Repair(by, _)
                if *by != run && self.before.runs.get(&run).is_some_and(|status| status == "halted") =>
            {
                Some(Some(Excuse::Halted))
            }
            Step::Repair(by, true) if self.is_of_same_source(memory, run, *by) => {
                let now = memory.source_of(run).and_then(|records| records.get(&key));
                (now != Some(&read.content)).then_some(Some(Excuse::Extra(*by)))
            }
            _ => None,
        }
    }

    /// Does the row stand for a run that never read its key? A forced rollback kept it, as it was, for records that were dropped in its favour, and what it
    /// had replaced stays that run's before image (docs/rollback.md).
    fn is_kept(&self, memory: &Memory, run: Run, key: Key) -> bool {
        let entry = self.after.rows.get(&key).and_then(|content| self.after.entries.get(&(key, *content)));
        let Some(Some(heir)) = entry else { return false };
        let never_read = memory.begun.get(heir).is_some_and(|begun| !begun.reads.contains_key(&key));
        *heir != run && never_read && self.after.images.contains(&(*heir, key))
    }

    fn is_of_same_source(&self, memory: &Memory, run: Run, other: Run) -> bool {
        let source = |run| memory.begun.get(&run).map(|begun| begun.source);
        source(run) == source(other)
    }

    /// Contents that stand in two rows and did not before.
    fn twice(&self, memory: &Memory) -> Vec<String> {
        if matches!(self.step, Step::ByHand(..)) {
            return Vec::new();
        }
        let contents: std::collections::BTreeSet<Content> = self.after.rows.values().copied().collect();
        contents
            .into_iter()
            .filter_map(|content| {
                let (old, new) =
                    (runs_rows(memory, self.before, content), runs_rows(memory, self.after, content));
                let came = new.iter().any(|key| !old.contains(key));
                let by_rollback = matches!(self.step, Step::RollBack { .. });
                (new.len() > 1 && came && !by_rollback)
                    .then(|| format!("twice: {content} stands in the rows {new:?}"))
            })
            .collect()
    }

    fn index(&self, memory: &Memory) -> Vec<String> {
        if matches!(self.step, Step::ByHand(..)) {
            return Vec::new();
        }
        let known = self.before.stale();
        let stale = self.after.stale();
        let stale = stale.iter().filter(|place| !known.contains(place));
        let mut complaints: Vec<String> =
            stale.map(|(key, content)| format!("stale: an entry {key}={content} has no row")).collect();
        let known = self.before.unindexed();
        let unindexed = self.after.unindexed();
        let unindexed = unindexed
            .iter()
            .filter(|row| memory.before.is_some() && !known.contains(row) && !memory.hand_made.contains(row));
        complaints
            .extend(unindexed.map(|(key, content)| format!("unindexed: a row {key}={content} has no entry")));
        complaints
    }

    /// What reconciliations and repairs have to find.
    fn verdicts(&self, memory: &mut Memory) -> Vec<String> {
        let clean = std::mem::take(&mut memory.clean);
        let (Step::Reconcile(run) | Step::Repair(run, _)) = self.step else { return Vec::new() };
        let status = self.after.runs.get(run).map_or("", String::as_str);
        if status == "reconciled" {
            memory.clean = Some(*run);
        }
        let expected = match self.step {
            Step::Reconcile(run) => clean == Some(*run) || is_as_read(memory, self.before, *run),
            Step::Repair(_, extra) => {
                matches!(self.answer, Answer::Done) && !self.has_only_extra(*run, *extra)
            }
            _ => false,
        };
        let found: Vec<&str> =
            self.after.mismatches.iter().filter(|(of, _)| of == run).map(|(_, kind)| kind.as_str()).collect();
        (expected && status == "halted")
            .then(|| format!("unclean: r{run} is halted, for {}", found.join(", ")))
            .into_iter()
            .collect()
    }

    /// Are rows that the source does not have all that is left, and were they to stay?
    fn has_only_extra(&self, run: Run, deleted: bool) -> bool {
        let left = self.after.mismatches.iter().filter(|(of, _)| *of == run);
        !deleted
            && left
                .map(|(_, kind)| kind.as_str())
                .all(|kind| matches!(kind, "extra" | "foreign" | "source_changed"))
    }
}

/// Keys of the rows with a content that are some run's work; with those that stood before, unless these are all.
fn runs_rows(memory: &Memory, state: &State, content: Content) -> Vec<Key> {
    let standing = state.rows.iter().filter(|(_, standing)| **standing == content).map(|(key, _)| *key);
    let rows: Vec<Key> = standing.filter(|key| !memory.hand_made.contains(&(*key, content))).collect();
    let all_stood = rows.iter().all(|key| memory.is_nobodys(*key, content));
    if all_stood { Vec::new() } else { rows }
}

/// Is all as the run left it? Nobody changed a row, its source is what it read, no later run of its keys read anything else, no content stands twice, no
/// earlier run of its source read more, and no repair of another run folded a row that it had found unchanged.
fn is_as_read(memory: &Memory, state: &State, run: Run) -> bool {
    let (Some(begun), Some(records)) = (memory.begun.get(&run), memory.source_of(run)) else { return false };
    let reads: std::collections::BTreeMap<Key, Content> =
        begun.reads.iter().map(|(key, read)| (*key, read.content)).collect();
    let later = begun.reads.iter().any(|(key, read)| memory.is_read_later(state, run, *key, read));
    let has_row = |(key, content): (&Key, &Content)| {
        state.rows.get(key) == Some(content) || state.ledger.contains(&(run, *key, *content))
    };
    let mut siblings = memory
        .begun
        .iter()
        .filter(|(other, sibling)| sibling.source == begun.source && state.is_live(**other));
    let extra = siblings.any(|(_, sibling)| sibling.reads.keys().any(|key| !records.contains_key(key)));
    let mut contents: Vec<Content> = state.rows.values().copied().collect();
    contents.sort_unstable();
    let twice = contents.windows(2).any(|pair| pair[0] == pair[1]);
    memory.touched.is_empty() && reads == *records && reads.iter().all(has_row) && !later && !extra && !twice
}

/// What is there that should not be when every run is taken back.
fn left_over(memory: &Memory, state: &State) -> Vec<String> {
    let Some(before) = &memory.before else { return Vec::new() };
    if state.runs.keys().any(|run| state.is_live(*run)) {
        return Vec::new();
    }
    let mut complaints = Vec::new();
    let keys: std::collections::BTreeSet<Key> = before.keys().chain(state.rows.keys()).copied().collect();
    for key in keys {
        let (was, is) = (before.get(&key), state.rows.get(&key));
        let by_hand = memory.touched.contains_key(&key)
            && is.is_none_or(|content| memory.hand_made.contains(&(key, *content)));
        if was != is && !by_hand {
            complaints.push(format!("left over: row {key} was {was:?} before all runs, and is {is:?}"));
        }
    }
    for ((key, content), owner) in &state.entries {
        if let Some(run) = owner {
            complaints.push(format!("left over: entry {key}={content} is of r{run}"));
        }
    }
    for (run, key) in state.images.iter().filter(|(_, key)| !memory.touched.contains_key(key)) {
        complaints.push(format!("left over: a before image of row {key}, of r{run}"));
    }
    if !state.ledger.is_empty() || state.unchanged > 0 {
        complaints.push(format!(
            "left over: ledger {:?}, {} lists of unchanged rows",
            state.ledger, state.unchanged
        ));
    }
    complaints
}
