//! One step of a history, and how it is written: a line of text that can be read and pasted back.

use std::fmt;
use std::str::FromStr;

/// Key of a row or record.
pub type Key = i32;
/// A content: one letter.
pub type Content = char;
/// A source table: one letter.
pub type Source = char;
/// A run: its number.
pub type Run = u32;

/// What a rollback does where other runs depend on what leaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Force {
    /// It is refused, and nothing happens.
    Never,
    /// It is refused, and then forced.
    IfRefused,
    /// It is forced at once.
    Always,
}

/// One step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// A record of a source becomes this, or goes.
    Source(Source, Key, Option<Content>),
    /// A row of the target becomes this, or goes, by plain SQL.
    ByHand(Key, Option<Content>),
    /// A new run of a source, in chunks of about so many bytes.
    Run(Run, Source, u32),
    /// A run is gone on with.
    Resume(Run),
    /// An open run is given up.
    Cancel(Run),
    /// A run is reconciled.
    Reconcile(Run),
    /// A halted run is repaired, with or without the deletion of extra rows.
    Repair(Run, bool),
    /// A run is taken back, in one transaction or in steps.
    RollBack { run: Run, force: Force, in_steps: bool },
}

/// A history as text, a step a line.
pub fn parse(text: &str) -> Vec<Step> {
    let is_step = |line: &&str| !line.is_empty() && !line.starts_with('#');
    text.lines()
        .map(without_number)
        .filter(is_step)
        .map(|line| line.parse().unwrap_or_else(|complaint: String| panic!("{complaint}")))
        .collect()
}

/// A line as it is printed begins with its number.
fn without_number(line: &str) -> &str {
    let line = line.trim();
    match line.split_once(". ") {
        Some((number, step)) if number.parse::<u32>().is_ok() => step.trim(),
        _ => line,
    }
}

/// A history as numbered lines.
pub fn numbered(steps: &[Step]) -> String {
    steps.iter().enumerate().map(|(n, step)| format!("  {:>2}. {step}\n", n + 1)).collect()
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Step::Source(source, key, Some(content)) => write!(f, "{source} {key}={content}"),
            Step::Source(source, key, None) => write!(f, "{source} {key} goes"),
            Step::ByHand(key, Some(content)) => write!(f, "by hand {key}={content}"),
            Step::ByHand(key, None) => write!(f, "by hand {key} goes"),
            Step::Run(run, source, bytes) => write!(f, "run r{run} of {source} by {bytes}"),
            Step::Resume(run) => write!(f, "resume r{run}"),
            Step::Cancel(run) => write!(f, "cancel r{run}"),
            Step::Reconcile(run) => write!(f, "reconcile r{run}"),
            Step::Repair(run, false) => write!(f, "repair r{run}"),
            Step::Repair(run, true) => write!(f, "repair r{run} and delete extra"),
            Step::RollBack { run, force, in_steps } => {
                let force = match force {
                    Force::Never => "",
                    Force::IfRefused => " forced if refused",
                    Force::Always => " forced",
                };
                write!(f, "roll back r{run}{force}{}", if *in_steps { " in steps" } else { "" })
            }
        }
    }
}

impl FromStr for Step {
    type Err = String;

    fn from_str(line: &str) -> Result<Self, String> {
        let words: Vec<&str> = line.split_whitespace().collect();
        let step = match words.as_slice() {
            ["by", "hand", row @ ..] => row_of(row).map(|(key, content)| Step::ByHand(key, content)),
            ["run", run, "of", source, "by", bytes] => {
                (|| Some(Step::Run(number_of(run)?, source.parse().ok()?, bytes.parse().ok()?)))()
            }
            ["resume", run] => number_of(run).map(Step::Resume),
            ["cancel", run] => number_of(run).map(Step::Cancel),
            ["reconcile", run] => number_of(run).map(Step::Reconcile),
            ["repair", run] => number_of(run).map(|run| Step::Repair(run, false)),
            ["repair", run, "and", "delete", "extra"] => number_of(run).map(|run| Step::Repair(run, true)),
            ["roll", "back", run, how @ ..] => rollback_of(run, how),
            [source, row @ ..] => (|| {
                let (key, content) = row_of(row)?;
                Some(Step::Source(source.parse().ok()?, key, content))
            })(),
            [] => None,
        };
        step.ok_or_else(|| format!("no step of a history: {line:?}"))
    }
}

fn number_of(run: &str) -> Option<Run> {
    run.strip_prefix('r')?.parse().ok()
}

fn row_of(words: &[&str]) -> Option<(Key, Option<Content>)> {
    match words {
        [key, "goes"] => Some((key.parse().ok()?, None)),
        [row] => {
            let (key, content) = row.split_once('=')?;
            Some((key.parse().ok()?, Some(content.parse().ok()?)))
        }
        _ => None,
    }
}

fn rollback_of(run: &str, how: &[&str]) -> Option<Step> {
    let (how, in_steps) = match how {
        [how @ .., "in", "steps"] => (how, true),
        how => (how, false),
    };
    let force = match how {
        [] => Force::Never,
        ["forced"] => Force::Always,
        ["forced", "if", "refused"] => Force::IfRefused,
        _ => return None,
    };
    Some(Step::RollBack { run: number_of(run)?, force, in_steps })
}
