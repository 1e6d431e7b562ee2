//! Histories: runs of several sources into one table, catch-up, rollback, tampering and repair in whatever order, and what must hold after each step.
//!
//! ```text
//! step        a step, and how it is written
//! generator   seed → history                        HISTORIES_SEEDS=FROM..TO
//! player      plays a history on a server of its own
//!   state     what the target says between two steps
//!   memory    what was read, and what people did
//!   oracle    what must hold
//! shrink      makes a history that goes wrong shorter   HISTORIES_SHRINK=how many of them
//! found       what was found so
//! ```
//!
//! A history that goes wrong is printed with its seed, as lines that [`step::parse`] reads: `HISTORY=FILE` plays it, with
//! `HISTORIES_VERBOSE=1` what became of the target is told step by step.

mod found;
mod generator;
mod memory;
mod oracle;
mod player;
mod shrink;
mod state;
mod step;

use std::ops::Range;

use generator::Class;
use player::{Stage, Wrong};
use step::{Step, numbered, parse};

/// Seeds of an ordinary test: two of each class.
const SEEDS: Range<u64> = 2..10;

/// What `HISTORIES_SEEDS` asks for: `FROM..TO`, or how many from 0 on.
fn seeds() -> Range<u64> {
    let Ok(wanted) = std::env::var("HISTORIES_SEEDS") else { return SEEDS };
    let number = |text: &str| text.trim().parse().unwrap_or_else(|_| panic!("HISTORIES_SEEDS={wanted}"));
    match wanted.split_once("..") {
        Some((from, to)) => number(from)..number(to),
        None => 0..number(&wanted),
    }
}

fn told(steps: &[Step], wrong: &Wrong) -> String {
    format!("{}goes wrong in step {}:\n  {}\n", numbered(steps), wrong.at + 1, wrong.complaints.join("\n  "))
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_happens_nothing_is_lost() {
    /// Histories that are made shorter: it takes a while.
    const SHRUNK: usize = 3;
    let shrunk = std::env::var("HISTORIES_SHRINK").ok().and_then(|n| n.parse().ok()).unwrap_or(SHRUNK);
    let stage = Stage::start().await;
    let mut wrongs = Vec::new();
    for seed in seeds() {
        let steps = generator::history(seed);
        let Err(mut wrong) = stage.play(&steps).await else { continue };
        let mut steps = steps;
        if wrongs.len() < shrunk {
            (steps, wrong) = shrink::shrink(&stage, steps, wrong).await;
        }
        let text = format!("seed {seed} ({:?}):\n{}", Class::of(seed), told(&steps, &wrong));
        eprintln!("{text}");
        wrongs.push(text);
    }
    assert!(wrongs.is_empty(), "{} histories went wrong\n{}", wrongs.len(), wrongs.join("\n"));
}

/// A history that is written down: `HISTORY` names the file.
#[tokio::test(flavor = "multi_thread")]
async fn as_written() {
    let Ok(file) = std::env::var("HISTORY") else { return };
    let text = std::fs::read_to_string(&file).unwrap_or_else(|error| panic!("{file}: {error}"));
    plays(&text).await;
}

/// Plays a history in which nothing goes wrong.
async fn plays(history: &str) {
    let steps = parse(history);
    if let Err(wrong) = Stage::start().await.play(&steps).await {
        panic!("{}", told(&steps, &wrong));
    }
}

#[test]
fn a_history_is_read_as_it_is_printed() {
    for seed in 0..100 {
        let steps = generator::history(seed);
        assert_eq!(parse(&numbered(&steps)), steps, "seed {seed}");
    }
}
