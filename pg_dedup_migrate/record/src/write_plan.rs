//! What to try next when a target refuses rows.
//!
//! A target takes or refuses an attempt (neighbouring rows under one savepoint) as a whole. An attempt that is
//! accepted costs nothing extra however short it is, one that is refused is written in vain; so what counts is
//! the length of refused attempts.
//!
//! ```text
//! all rows ──accepted──▶ done
//!    │ refused
//!    ├─ with a line ──▶ rows before it · that row alone · the rows behind it, in growing attempts
//!    └─ without ──────▶ attempts of at most 32·log2(n) rows; the one that is refused is halved down to
//!                       a single row, which is refused for good
//! ```
//!
//! How long the first attempt behind a refused row is follows the distance of the last refused ones, so a
//! stretch of bad rows is not written over and over. Row writes, counting a refused attempt up to the row that
//! the target named or else whole, for `n` rows of which `b` are bad:
//!
//! - without lines at most 2n + 66·b·log2(n): n in the first attempt, n accepted, and for each bad row an
//!   attempt of at most 32·log2(n) and its halves;
//! - with exact lines at most 2n + 2b + 1: each accepted row twice, each bad one in its attempt and alone.
//!
//! Behind a line a client may have sent on before it heard of it: all attempts in full come to about 6n then.
//!
//! A line is a hypothesis. It never condemns a row by itself, and wrong ones stop being followed.
use std::ops::Range;

/// Wrong lines after which lines are no longer followed; each can cost one more refused attempt.
const MAX_WRONG_LINES: u32 = 3;

/// Attempts without lines are at most this times log2(n) rows long: about what a savepoint and a round trip
/// cost in rows, times the number of halvings.
const ATTEMPT_ROWS_PER_LOG: usize = 32;

/// Decides which of `n` positions to write next until each has been accepted or refused by itself.
#[derive(Debug, Clone)]
pub struct WritePlan {
    n: usize,
    /// Positions before it are settled.
    at: usize,
    /// Rows from `at` up to here were refused as a whole: one of them is bad.
    refused_to: Option<usize>,
    /// The row that a line points at; the rows before it are tried first, then it alone.
    suspect: Option<usize>,
    /// How many rows to try next where nothing is known about them.
    step: usize,
    /// Lines have been right lately, so a long attempt wastes little.
    lines_hold: bool,
    wrong_lines: u32,
    /// Accepted since the last row that was refused for good.
    gap: usize,
    /// Typical distance between refused rows; recent ones weigh more.
    typical_gap: Option<usize>,
}

impl WritePlan {
    /// A plan for `n` rows. The first attempt is all of them.
    pub fn new(n: usize) -> WritePlan {
        WritePlan {
            n,
            at: 0,
            refused_to: None,
            suspect: None,
            step: n,
            lines_hold: false,
            wrong_lines: 0,
            gap: 0,
            typical_gap: None,
        }
    }

    /// The positions to write under one savepoint; `None` when every row is settled.
    pub fn next(&self) -> Option<Range<usize>> {
        let left = self.n - self.at;
        let rows = match (self.suspect, self.refused_to) {
            _ if left == 0 => return None,
            (Some(suspect), _) => (suspect - self.at).max(1),
            // Half of it: the other half cannot be the longer one to be refused next.
            (None, Some(end)) => ((end - self.at) / 2).clamp(1, self.step),
            (None, None) => self.step.min(left),
        };
        Some(self.at..self.at + rows)
    }

    /// The attempt was accepted.
    pub fn accepted(&mut self) {
        let Some(attempt) = self.next() else { return };
        if self.suspect == Some(attempt.start) {
            // The row that was pointed at, alone.
            self.line_was_wrong();
        } else if self.suspect.is_none() && attempt.len() == self.step {
            self.step = self.step.saturating_mul(2).min(self.longest());
        }
        self.at = attempt.end;
        self.gap += attempt.len();
        self.refused_to = self.refused_to.filter(|end| *end > self.at);
    }

    /// The attempt was refused, because of the row at `line` (from 0, within the attempt) if the target said
    /// so. Returns the position of a row that is refused for good, which is only ever one that was tried
    /// alone.
    pub fn refused(&mut self, line: Option<usize>) -> Option<usize> {
        let attempt = self.next()?;
        let right = self.suspect == Some(attempt.start);
        if self.suspect.is_some() && !right {
            // The rows before the one pointed at were to be accepted.
            self.line_was_wrong();
        }
        self.suspect = None;

        if attempt.len() == 1 {
            if right {
                self.lines_hold = true;
                self.wrong_lines = self.wrong_lines.saturating_sub(1);
            }
            self.at = attempt.end;
            self.refused_to = None;
            self.typical_gap = Some(self.typical_gap.map_or(self.gap, |typical| typical.midpoint(self.gap)));
            self.gap = 0;
            self.step = self.first_step();
            return Some(attempt.start);
        }

        self.refused_to = Some(attempt.end);
        self.suspect = line
            .filter(|line| *line < attempt.len() && self.wrong_lines < MAX_WRONG_LINES)
            .map(|line| attempt.start + line);
        if self.suspect.is_none() {
            self.lines_hold = false;
        }
        self.step = self.step.min(self.longest());
        None
    }

    fn line_was_wrong(&mut self) {
        self.suspect = None;
        self.wrong_lines += 1;
        self.lines_hold = false;
        self.step = self.step.min(self.longest());
    }

    /// How many rows to try behind a refused one.
    fn first_step(&self) -> usize {
        let typical = self.typical_gap.unwrap_or(self.n);
        let typical = if self.lines_hold { typical.saturating_mul(4) } else { typical };
        typical.clamp(1, self.longest())
    }

    /// The longest attempt to make now.
    fn longest(&self) -> usize {
        if self.lines_hold { self.n } else { ATTEMPT_ROWS_PER_LOG * (self.n.max(2).ilog2() as usize) }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::collection::{btree_set, vec};
    use proptest::prelude::*;

    use super::*;

    /// What a plan came to.
    #[derive(Debug, Default)]
    struct Outcome {
        refused: BTreeSet<usize>,
        attempts: usize,
        /// Rows written: of a refused attempt those up to the row that the target named, else all.
        writes: usize,
    }

    /// Runs a plan against a target that refuses `bad`; `line` makes up what it says about an attempt, given
    /// the first bad row in it.
    fn run(
        n: usize,
        bad: &BTreeSet<usize>,
        mut line: impl FnMut(&Range<usize>, usize) -> Option<usize>,
    ) -> Outcome {
        let mut plan = WritePlan::new(n);
        let mut outcome = Outcome::default();
        let mut accepted = 0;
        while let Some(attempt) = plan.next() {
            // In order, without gaps, and never endless.
            assert_eq!(attempt.start, accepted + outcome.refused.len());
            assert!(!attempt.is_empty() && attempt.end <= n);
            outcome.attempts += 1;
            assert!(outcome.attempts <= 100 + 40 * n, "endless");
            match bad.range(attempt.clone()).next() {
                None => {
                    outcome.writes += attempt.len();
                    accepted += attempt.len();
                    plan.accepted();
                }
                Some(first) => {
                    let line = line(&attempt, first - attempt.start);
                    outcome.writes +=
                        line.map_or(attempt.len(), |line| attempt.len().min(line.saturating_add(1)));
                    if let Some(position) = plan.refused(line) {
                        assert_eq!(attempt, position..position + 1);
                        outcome.refused.insert(position);
                    }
                }
            }
        }
        plan.accepted();
        assert_eq!(plan.refused(None), None);
        assert_eq!(accepted + outcome.refused.len(), n);
        outcome
    }

    fn log2(n: usize) -> f64 {
        (n.max(2) as f64).log2()
    }

    fn without_lines(n: usize, bad: &BTreeSet<usize>) -> Outcome {
        let outcome = run(n, bad, |_, _| None);
        assert_eq!(outcome.refused, *bad);
        let limit = 2.0 * n as f64 + 66.0 * bad.len() as f64 * log2(n);
        assert!(outcome.writes as f64 <= limit, "{} writes, {limit} allowed", outcome.writes);
        outcome
    }

    fn exact_lines(n: usize, bad: &BTreeSet<usize>) -> Outcome {
        let outcome = run(n, bad, |_, first| Some(first));
        assert_eq!(outcome.refused, *bad);
        assert!(outcome.writes <= 2 * n + 2 * bad.len() + 1, "{} writes", outcome.writes);
        outcome
    }

    /// Rows and the bad ones among them: few, many, all, neighbours.
    fn rows() -> impl Strategy<Value = (usize, BTreeSet<usize>)> {
        (1usize..3000).prop_flat_map(|n| {
            let scattered = |most: usize| btree_set(0..n, 0..=most.min(n));
            let stretch =
                (0..n, 0..=n).prop_map(move |(from, length)| (from..n.min(from + length)).collect());
            (Just(n), prop_oneof![scattered(3), scattered(40), scattered(n), stretch])
        })
    }

    proptest! {
        #[test]
        fn finds_the_bad_rows_without_lines((n, bad) in rows()) {
            without_lines(n, &bad);
        }

        #[test]
        fn finds_the_bad_rows_by_exact_lines((n, bad) in rows()) {
            exact_lines(n, &bad);
        }

        /// Lines that are right, wrong, out of range or missing, in any mixture.
        #[test]
        fn lies_condemn_nobody((n, bad) in rows(), lies in vec((0..4u8, any::<prop::sample::Index>()), 1..50)) {
            let mut lies = lies.iter().cycle();
            let outcome = run(n, &bad, |attempt, first| match lies.next() {
                Some((0, _)) => Some(first),
                Some((1, at)) => Some(at.index(attempt.len())),
                Some((2, _)) => Some(attempt.len() + first),
                _ => None,
            });
            prop_assert_eq!(&outcome.refused, &bad);
            let limit = 20.0 * n as f64 + 200.0 * (bad.len() + 1) as f64 * log2(n);
            prop_assert!(outcome.writes as f64 <= limit, "{} writes, {limit} allowed", outcome.writes);
        }

        /// The row before the bad one is blamed, or the last one of the attempt, always.
        #[test]
        fn a_steady_liar_is_not_believed_for_long((n, bad) in rows(), before: bool) {
            let outcome = run(n, &bad, |attempt, first| {
                Some(if before { first.saturating_sub(1) } else { attempt.len() - 1 })
            });
            prop_assert_eq!(&outcome.refused, &bad);
            let limit = 20.0 * n as f64 + 200.0 * (bad.len() + 1) as f64 * log2(n);
            prop_assert!(outcome.writes as f64 <= limit, "{} writes, {limit} allowed", outcome.writes);
        }
    }

    #[test]
    fn without_bad_rows_one_attempt_is_enough() {
        for n in [1, 2, 1_000_000] {
            assert_eq!(without_lines(n, &BTreeSet::new()).attempts, 1);
        }
        assert_eq!(WritePlan::new(0).next(), None);
    }

    #[test]
    fn many_rows() {
        let n = 333_333;
        let scattered: BTreeSet<usize> = (0..1000).map(|i| i * 7919 * 31 % n).collect();
        let stretch: BTreeSet<usize> = (200_000..201_000).collect();
        for bad in [&scattered, &stretch] {
            assert!(without_lines(n, bad).attempts < 40 * bad.len());
            assert!(exact_lines(n, bad).attempts < 12 * bad.len());
        }
        let all: BTreeSet<usize> = (0..20_000).collect();
        assert!(without_lines(20_000, &all).writes < 3 * 20_000);
        assert!(exact_lines(20_000, &all).writes < 3 * 20_000);
        let one = BTreeSet::from([n - 1]);
        assert!(without_lines(n, &one).attempts < 1000);
        assert_eq!(exact_lines(n, &one).attempts, 3);
    }

    /// A target may refuse rows together and then take each of them.
    #[test]
    fn a_target_that_changes_its_mind_loses_nothing() {
        let mut plan = WritePlan::new(100);
        assert_eq!(plan.refused(None), None);
        let mut accepted = 0;
        while let Some(attempt) = plan.next() {
            accepted += attempt.len();
            plan.accepted();
        }
        assert_eq!(accepted, 100);
    }
}
