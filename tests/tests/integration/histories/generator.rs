//! Makes histories: of few keys and few contents, so that they collide often.

use integration::data::Numbers;

use super::player::SOURCES;
use super::step::{Content, Force, Key, Run, Source, Step};

/// What may happen in a history.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// Each source has keys of its own; nobody changes the target by hand.
    DisjointKeys,
    /// Sources have the same keys, and stay as they are; nobody changes the target by hand.
    SharedKeys,
    /// Each source has keys of its own; people change the target, runs are repaired.
    DisjointKeysTampered,
    /// Everything.
    SharedKeysTampered,
}

impl Class {
    /// The class of a seed: they take turns.
    pub fn of(seed: u64) -> Self {
        const ALL: [Class; 4] =
            [Class::DisjointKeys, Class::SharedKeys, Class::DisjointKeysTampered, Class::SharedKeysTampered];
        ALL[(seed % ALL.len() as u64) as usize]
    }

    fn shares_keys(self) -> bool {
        matches!(self, Class::SharedKeys | Class::SharedKeysTampered)
    }

    fn is_tampered(self) -> bool {
        matches!(self, Class::DisjointKeysTampered | Class::SharedKeysTampered)
    }

    fn has_static_sources(self) -> bool {
        self == Class::SharedKeys
    }
}

/// Keys of a source where each has its own, or of all together.
const KEYS: u64 = 4;
/// Keys where sources share them.
const SHARED_KEYS: u64 = 6;
/// Contents.
const CONTENTS: u64 = 6;

/// The history that belongs to a seed.
pub fn history(seed: u64) -> Vec<Step> {
    let class = Class::of(seed);
    let mut maker = Maker { class, numbers: Numbers::new(seed), steps: Vec::new(), sources: 0, runs: 0 };
    maker.begin();
    for _ in 0..6 + maker.numbers.below(9) {
        maker.go_on();
    }
    maker.end();
    maker.steps
}

struct Maker {
    class: Class,
    numbers: Numbers,
    steps: Vec<Step>,
    sources: u64,
    runs: u64,
}

impl Maker {
    /// Sources with some records, a target with some rows, a first run.
    fn begin(&mut self) {
        self.sources = 2 + self.numbers.below(2);
        for at in 0..self.sources {
            for _ in 0..1 + self.numbers.below(4) {
                let source = SOURCES[at as usize];
                let step = Step::Source(source, self.key_of(source), Some(self.content()));
                self.steps.push(step);
            }
        }
        for _ in 0..self.numbers.below(4) {
            let row = Step::ByHand(self.any_key(), Some(self.content()));
            self.steps.push(row);
        }
        self.run();
    }

    fn go_on(&mut self) {
        match self.numbers.below(100) {
            0..30 => self.run(),
            30..45 if !self.class.has_static_sources() => self.change_source(),
            30..50 => self.resume(),
            50..65 => self.roll_back(),
            65..72 if self.class.is_tampered() => self.reconcile(),
            72..84 if self.class.is_tampered() => self.tamper(),
            84..100 if self.class.is_tampered() => self.repair(),
            65..80 => self.reconcile(),
            _ => self.run(),
        }
    }

    /// Every run is taken back, in whatever order.
    fn end(&mut self) {
        let mut runs: Vec<Run> = (1..=self.runs as Run).collect();
        while !runs.is_empty() {
            let at = self.numbers.below(runs.len() as u64) as usize;
            let step = Step::RollBack { run: runs.swap_remove(at), force: Force::IfRefused, in_steps: false };
            self.steps.push(step);
        }
    }

    fn run(&mut self) {
        let source = self.source();
        let bytes = [1, 70, 100, 1_000_000][self.numbers.below(4) as usize];
        self.runs += 1;
        self.steps.push(Step::Run(self.runs as Run, source, bytes));
        if self.numbers.below(4) > 0 {
            self.settle();
        }
    }

    /// Runs that were reopened are gone on with, and then those that reopened them.
    fn settle(&mut self) {
        for run in (1..=self.runs as Run).chain(1..=self.runs as Run) {
            self.steps.push(Step::Resume(run));
        }
        // They may go on so for ever: no other run begins as long as one is open.
        for run in 1..=self.runs as Run {
            self.steps.push(Step::Cancel(run));
        }
    }

    fn change_source(&mut self) {
        for _ in 0..1 + self.numbers.below(2) {
            let source = self.source();
            let step = Step::Source(source, self.key_of(source), self.perhaps_content());
            self.steps.push(step);
        }
        if self.numbers.below(2) == 0 {
            self.run();
        }
    }

    fn tamper(&mut self) {
        for _ in 0..1 + self.numbers.below(2) {
            let step = Step::ByHand(self.any_key(), self.perhaps_content());
            self.steps.push(step);
        }
        if self.numbers.below(2) == 0 {
            self.repair();
        }
    }

    fn resume(&mut self) {
        let run = self.any_run();
        self.steps.push(Step::Resume(run));
    }

    fn reconcile(&mut self) {
        let run = self.any_run();
        self.steps.push(Step::Reconcile(run));
    }

    /// A repair needs a reconciliation before it, and is to hold in one after it.
    fn repair(&mut self) {
        let run = self.any_run();
        let extra = self.numbers.below(3) == 0;
        self.steps.extend([Step::Reconcile(run), Step::Repair(run, extra), Step::Reconcile(run)]);
        if self.numbers.below(2) == 0 {
            self.settle();
        }
    }

    fn roll_back(&mut self) {
        let force = [Force::Never, Force::IfRefused, Force::IfRefused, Force::Always];
        let step = Step::RollBack {
            run: self.any_run(),
            force: force[self.numbers.below(4) as usize],
            in_steps: self.numbers.below(3) == 0,
        };
        self.steps.push(step);
    }

    fn any_run(&mut self) -> Run {
        (1 + self.numbers.below(self.runs)) as Run
    }

    fn source(&mut self) -> Source {
        SOURCES[self.numbers.below(self.sources) as usize]
    }

    fn key_of(&mut self, source: Source) -> Key {
        if self.class.shares_keys() {
            return 1 + self.numbers.below(SHARED_KEYS) as Key;
        }
        let first = SOURCES.iter().position(|known| *known == source).unwrap_or_default() as Key * 10;
        first + 1 + self.numbers.below(KEYS) as Key
    }

    fn any_key(&mut self) -> Key {
        let source = self.source();
        self.key_of(source)
    }

    fn content(&mut self) -> Content {
        char::from(b'p' + self.numbers.below(CONTENTS) as u8)
    }

    /// Gone in one case of three.
    fn perhaps_content(&mut self) -> Option<Content> {
        (self.numbers.below(3) > 0).then(|| self.content())
    }
}
