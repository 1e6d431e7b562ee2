//! The rule: additive increase, multiplicative decrease, with a pause between decreases and a longer one before the first increase.
//!
//! ```text
//!   free ──bad──▶ slowed ──good for COOL_DOWN──▶ recovering ──rate far above what is used──▶ free
//!                  ▲  └─ bad: halved, at most once a SETTLE        │
//!                  └────────────────────bad────────────────────────┘
//! ```
//!
//! Pure: one decision from what is known, once a second.

use serde::{Deserialize, Serialize};

/// Decisions between two decreases: what the first one does has to be seen before the next.
const SETTLE: u32 = 2;
/// Good decisions in a row before the rate rises: else it would swing.
const COOL_DOWN: u32 = 5;
/// Good decisions in a row before one more chunk may be worked on.
const ANOTHER_CHUNK: u32 = 2;
/// Part of the highest rate seen that the rate rises by.
const RISE: f64 = 0.05;
/// So many times the least rate is what a run begins with beside others.
const GENTLE: f64 = 4.0;
/// Seconds that it does so at least.
const GENTLE_SECONDS: u32 = 10;
/// The rate is lifted when it is so many times what is read.
const FAR_ABOVE: f64 = 2.0;

/// Between what the rate stays.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Bounds {
    /// Bytes a second that it is never below.
    pub least: f64,
    /// Bytes a second that it is never above; none: no limit.
    pub most: Option<f64>,
}

/// Where the limits stand.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum State {
    /// No limit by signals.
    #[default]
    Free,
    /// A signal was bad.
    Slowed,
    /// Signals are good, the rate rises.
    Recovering,
}

impl State {
    /// As the target's table has it.
    pub fn name(self) -> &'static str {
        match self {
            State::Free => "free",
            State::Slowed => "slowed",
            State::Recovering => "recovering",
        }
    }
}

/// What a decision goes on from, kept in the target: the next one may be another process's.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Memory {
    /// Good decisions in a row.
    good: u32,
    /// Decisions since the last decrease.
    since_decrease: u32,
    /// Highest rate that was read at while there was no limit, in bytes a second.
    before: f64,
}

/// The limits that all workers of a run go by.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Limits {
    /// Bytes a second; none: as many as there are.
    pub rate: Option<f64>,
    /// Chunks at a time; none: as many as there are workers.
    pub active: Option<u32>,
}

/// The next limits.
pub fn decide(
    limits: Limits,
    memory: Memory,
    bounds: Bounds,
    bad: bool,
    throughput: f64,
    lanes: u32,
) -> (Limits, Memory, State) {
    let memory = match limits.rate {
        None => Memory { before: memory.before.max(throughput), ..memory },
        Some(_) => memory,
    };
    if bad {
        return decrease(limits, memory, bounds, throughput, lanes);
    }
    let good = memory.good.saturating_add(1);
    let memory = Memory { good, since_decrease: memory.since_decrease.saturating_add(1), ..memory };
    let Some(rate) = limits.rate else { return (Limits::default(), memory, State::Free) };
    if good <= COOL_DOWN {
        return (limits, memory, State::Slowed);
    }
    // Of a run that was slowed before it had read anything nobody knows what it could reach: it doubles until a signal is bad or it is held up
    // by something else.
    let rise = if memory.before > 0.0 { memory.before * RISE } else { rate };
    let raised = rate + rise.max(bounds.least);
    let active = match limits.active {
        Some(active) if good.is_multiple_of(ANOTHER_CHUNK) => Some(active + 1),
        other => other,
    }
    .filter(|active| *active < lanes);
    let topped = bounds.most.is_some_and(|most| raised >= most);
    // While it begins gently one second says little: there may be nothing to read in it.
    let sure = memory.before > 0.0 || good >= COOL_DOWN + GENTLE_SECONDS;
    if active.is_none() && (topped || sure && raised > memory.before && raised > throughput * FAR_ABOVE) {
        return (Limits::default(), Memory { good, before: memory.before, ..Memory::default() }, State::Free);
    }
    (Limits { rate: Some(raised.min(bounds.most.unwrap_or(f64::MAX))), active }, memory, State::Recovering)
}

/// Where somebody is at work: from little, doubling until a signal is bad or nothing is held up any more.
pub fn begin_gently(bounds: Bounds) -> (Limits, Memory, State) {
    let rate = (bounds.least * GENTLE).min(bounds.most.unwrap_or(f64::MAX));
    let memory = Memory { good: COOL_DOWN, ..Memory::default() };
    (Limits { rate: Some(rate), active: Some(1) }, memory, State::Recovering)
}

fn decrease(
    limits: Limits,
    memory: Memory,
    bounds: Bounds,
    throughput: f64,
    lanes: u32,
) -> (Limits, Memory, State) {
    let first = limits.rate.is_none();
    let since_decrease = memory.since_decrease.saturating_add(1);
    if !first && since_decrease < SETTLE {
        return (limits, Memory { good: 0, since_decrease, ..memory }, State::Slowed);
    }
    // What is really read: a rate far above it would take long to come down to where it limits.
    // One second in which all lanes write says little: half of what was reached is taken for read, at first.
    let now = limits
        .rate
        .map_or(throughput.max(memory.before / 2.0), |rate| rate.min(throughput.max(bounds.least)));
    let rate = (now / 2.0).max(bounds.least);
    let active = (limits.active.unwrap_or(lanes) / 2).max(1);
    (
        Limits { rate: Some(rate), active: Some(active) },
        // Of a run that began gently that is what it could reach; the least rate says nothing about that.
        Memory {
            good: 0,
            since_decrease: 0,
            before: if memory.before > 0.0 || now <= bounds.least { memory.before } else { now },
        },
        State::Slowed,
    )
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const BOUNDS: Bounds = Bounds { least: 1e6, most: None };

    /// Decides so often; reads as fast as it may, at most `able`.
    fn run(mut at: (Limits, Memory, State), bad: &[bool], able: f64) -> Vec<(Limits, State)> {
        bad.iter()
            .map(|bad| {
                let throughput = at.0.rate.map_or(able, |rate| rate.min(able));
                at = decide(at.0, at.1, BOUNDS, *bad, throughput, 6);
                (at.0, at.2)
            })
            .collect()
    }

    #[test]
    fn halves_waits_and_rises() {
        let start = (Limits::default(), Memory::default(), State::Free);
        let mut signals = vec![false, true, true, true];
        signals.extend([false; 120]);
        let steps = run(start, &signals, 100e6);
        assert_eq!(steps[0], (Limits::default(), State::Free));
        assert_eq!(steps[1], (Limits { rate: Some(50e6), active: Some(3) }, State::Slowed));
        // The first decrease has to be seen before the next.
        assert_eq!(steps[2].0, steps[1].0);
        assert_eq!(steps[3].0, Limits { rate: Some(25e6), active: Some(1) });
        // No rise before the cool-down is over.
        assert!(steps[4..9].iter().all(|(limits, state)| *limits == steps[3].0 && *state == State::Slowed));
        assert_eq!(steps[9].0.rate, Some(30e6));
        assert!(
            steps[9..]
                .windows(2)
                .all(|pair| pair[0].0.rate.unwrap_or(f64::MAX) <= pair[1].0.rate.unwrap_or(f64::MAX))
        );
        assert_eq!(steps.last(), Some(&(Limits::default(), State::Free)), "{steps:?}");
    }

    #[test]
    fn beside_others_it_doubles_until_it_is_told() {
        let able = 200e6;
        let mut at = begin_gently(BOUNDS);
        let mut step = |bad: bool| {
            let throughput = at.0.rate.map_or(able, |rate| rate.min(able));
            at = decide(at.0, at.1, BOUNDS, bad, throughput, 6);
            at
        };
        let rates: Vec<Option<f64>> = (0..3).map(|_| step(false).0.rate).collect();
        assert_eq!(rates, [Some(8e6), Some(16e6), Some(32e6)]);
        assert_eq!(step(true).0, Limits { rate: Some(16e6), active: Some(1) });
        // Then by a part of what it had reached.
        for _ in 0..COOL_DOWN {
            assert_eq!(step(false).0.rate, Some(16e6));
        }
        assert_eq!(step(false).0.rate, Some(16e6 + 32e6 * RISE));
        // Where nothing is bad it is soon as fast as it goes.
        let mut at = begin_gently(BOUNDS);
        let seconds = (1..)
            .find(|_| {
                let throughput = at.0.rate.map_or(able, |rate| rate.min(able));
                at = decide(at.0, at.1, BOUNDS, false, throughput, 6);
                at.2 == State::Free
            })
            .unwrap();
        assert!((GENTLE_SECONDS..15).contains(&seconds), "{seconds} s");
    }

    #[test]
    fn a_run_that_began_slowed_is_not_let_go_at_once() {
        let mut at = (Limits::default(), Memory::default(), State::Free);
        for _ in 0..8 {
            at = decide(at.0, at.1, BOUNDS, true, 0.0, 6);
        }
        assert_eq!(at.0.rate, Some(BOUNDS.least));
        let seconds = (1..).find(|_| {
            // In every other second nothing is read.
            let throughput = if at.1.good % 2 == 0 { at.0.rate.unwrap_or(0.0) } else { 0.0 };
            at = decide(at.0, at.1, BOUNDS, false, throughput, 6);
            at.2 == State::Free
        });
        assert!(seconds >= Some(COOL_DOWN + GENTLE_SECONDS), "{seconds:?} s");
    }

    proptest! {
        #[test]
        fn stays_between_its_bounds(signals in prop::collection::vec(any::<bool>(), 1..200), able in 1e5f64..1e9) {
            let start = (Limits::default(), Memory::default(), State::Free);
            for (limits, state) in run(start, &signals, able) {
                prop_assert!(limits.rate.is_none_or(|rate| rate >= BOUNDS.least && rate.is_finite()));
                prop_assert!(limits.active.is_none_or(|active| (1..6).contains(&active)));
                prop_assert_eq!(limits == Limits::default(), state == State::Free);
            }
        }

        #[test]
        fn comes_down_to_the_least_and_recovers(able in 2e6f64..1e9) {
            let start = (Limits::default(), Memory::default(), State::Free);
            let mut signals = vec![true; 60];
            signals.extend([false; 400]);
            let steps = run(start, &signals, able);
            prop_assert_eq!(steps[59].0, Limits { rate: Some(BOUNDS.least), active: Some(1) });
            prop_assert_eq!(steps.last().unwrap().1, State::Free);
        }
    }
}
