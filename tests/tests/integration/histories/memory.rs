//! What a history has been so far: what can't be read from the target, because it is about what was read, and what people did.

use std::collections::{BTreeMap, BTreeSet};

use super::state::State;
use super::step::{Content, Key, Run, Source, Step};

/// A record as a run read it last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Read {
    /// Its content.
    pub content: Content,
    /// The finish of its chunk.
    pub ordinal: i64,
    /// The step in which that was.
    pub step: usize,
}

/// A run, once it was begun.
#[derive(Clone, Debug)]
pub struct Begun {
    /// What it reads.
    pub source: Source,
    /// What it read, by key.
    pub reads: BTreeMap<Key, Read>,
}

/// Why a record that a run read need not be in the target until it is read again or its content is back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Excuse {
    /// A person took the row away, or the index names a row that a person took away.
    ByHand,
    /// Its run was halted when another run overwrote the survivor: its repair writes it.
    Halted,
    /// A repair of this run deleted it, which the source no longer had.
    Extra(Run),
}

/// What happened so far.
#[derive(Clone, Debug, Default)]
pub struct Memory {
    /// Number of the step.
    pub step: usize,
    /// Records of the sources.
    pub sources: BTreeMap<Source, BTreeMap<Key, Content>>,
    /// Runs.
    pub begun: BTreeMap<Run, Begun>,
    /// The rows that stood there when the first run began.
    pub before: Option<BTreeMap<Key, Content>>,
    /// Rows that people made since.
    pub hand_made: BTreeSet<(Key, Content)>,
    /// Keys that people changed since, and in which step last.
    pub touched: BTreeMap<Key, usize>,
    /// Records that are gone, and may be.
    pub excused: BTreeMap<(Run, Key), (Read, Excuse)>,
    /// The run that was found clean in the step before.
    pub clean: Option<Run>,
}

impl Memory {
    /// Takes note of a step before it is done.
    pub fn begin(&mut self, step: &Step, before: &State) {
        self.step += 1;
        match step {
            Step::Source(source, key, content) => {
                let records = self.sources.entry(*source).or_default();
                match content {
                    Some(content) => drop(records.insert(*key, *content)),
                    None => drop(records.remove(key)),
                }
            }
            Step::ByHand(key, content) if self.before.is_some() => {
                self.touched.insert(*key, self.step);
                self.hand_made.extend(content.map(|content| (*key, content)));
            }
            Step::Run(run, source, _) => {
                self.before.get_or_insert_with(|| before.rows.clone());
                self.begun.entry(*run).or_insert_with(|| Begun { source: *source, reads: BTreeMap::new() });
            }
            _ => {}
        }
    }

    /// Chunks that have finished since were read as their sources are now.
    pub fn reread(&mut self, before: &State, after: &State) {
        for ((run, name), chunk) in &after.chunks {
            let earlier = before.chunks.get(&(*run, name.clone())).and_then(|chunk| chunk.ordinal);
            let Some(begun) = self.begun.get_mut(run).filter(|_| earlier != chunk.ordinal) else { continue };
            begun.reads.retain(|key, _| !chunk.has(*key));
            let (Some(ordinal), Some(records)) = (chunk.ordinal, self.sources.get(&begun.source)) else {
                continue;
            };
            for (key, content) in records.iter().filter(|(key, _)| chunk.has(**key)) {
                begun.reads.insert(*key, Read { content: *content, ordinal, step: self.step });
            }
        }
    }

    /// What the source of a run has now.
    pub fn source_of(&self, run: Run) -> Option<&BTreeMap<Key, Content>> {
        self.sources.get(&self.begun.get(&run)?.source)
    }

    /// Did another live run read the key after this one, with another content?
    pub fn is_read_later(&self, state: &State, run: Run, key: Key, read: &Read) -> bool {
        let others = self.begun.iter().filter(|(other, _)| **other != run && state.is_live(**other));
        others
            .filter_map(|(_, begun)| begun.reads.get(&key))
            .any(|later| later.ordinal > read.ordinal && later.content != read.content)
    }

    /// Did a person make this row, or did it stand before the first run?
    pub fn is_nobodys(&self, key: Key, content: Content) -> bool {
        let stood = self.before.as_ref().and_then(|rows| rows.get(&key)) == Some(&content);
        stood || self.hand_made.contains(&(key, content))
    }
}
