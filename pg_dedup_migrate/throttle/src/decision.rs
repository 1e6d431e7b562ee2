//! One decision: from a turn, as `dedup.throttle_report` gives it, and what both servers say, to what `dedup.throttle_decide` takes.

use std::time::Instant;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::LEAST_RATE;
use crate::controller::{self, Bounds, Limits, Memory, State};
use crate::signals::{self, Latency, Thresholds};

/// What whoever decides has seen of the servers so far.
#[derive(Debug, Default)]
pub struct Watch {
    /// Latencies of the source's probes; none are taken of a source that only the target sees.
    pub read: Latency,
    /// Latencies of the target's.
    pub commit: Latency,
    /// Where the target's WAL was at the last decision.
    wal: Option<(Instant, f64)>,
}

/// What a decision goes on from: the object that `dedup.throttle_report` answers as `turn`.
#[derive(Debug)]
pub struct Turn {
    limits: Limits,
    bounds: Bounds,
    memory: Memory,
    throughput: f64,
    lanes: u32,
    /// Nothing is being worked on: the run is paused, or between chunks.
    idle: bool,
    /// Nobody has decided about this run yet.
    begins: bool,
    /// What was usual for whoever decided before, in milliseconds: who joins beside a load would take that for usual.
    usual: Usual,
}

/// What is usual for both servers.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
#[serde(default)]
struct Usual {
    read: Option<f64>,
    commit: Option<f64>,
}

impl From<&Value> for Turn {
    fn from(turn: &Value) -> Turn {
        let count = |value: &Value| value.as_u64().and_then(|count| u32::try_from(count).ok());
        let options = &turn["options"];
        let most = options["max_rate"].as_f64();
        let least = options["min_rate"].as_f64().unwrap_or(LEAST_RATE);
        Turn {
            limits: Limits { rate: turn["byte_rate"].as_f64(), active: count(&turn["active_chunks"]) },
            bounds: Bounds { least: least.min(most.unwrap_or(f64::MAX)), most },
            memory: serde_json::from_value(turn["controller"].clone()).unwrap_or_default(),
            throughput: turn["throughput"].as_f64().unwrap_or(0.0),
            lanes: count(&turn["lanes"]).unwrap_or(1),
            idle: turn["busy"].as_u64() == Some(0),
            usual: serde_json::from_value(turn["controller"]["usual"].clone()).unwrap_or_default(),
            begins: turn["controller"].as_object().is_some_and(serde_json::Map::is_empty),
        }
    }
}

/// The next limits of a run.
#[derive(Debug)]
pub struct Decision {
    /// What they were.
    pub before: Limits,
    /// What they are.
    pub limits: Limits,
    /// Where the controller stands.
    pub state: State,
    /// What the next decision goes on from.
    pub memory: Value,
    /// Why the run is slowed now; none: nothing is bad.
    pub reason: Option<String>,
}

impl Watch {
    /// Decides. `signals`: what both servers say of themselves; latencies are entered into it.
    pub fn decide(&mut self, turn: &Turn, signals: &mut Value, now: Instant) -> Decision {
        let wal_now = signals["wal_position"].as_f64().map(|position| (now, position));
        let wal_per_second = match (self.wal, wal_now) {
            (Some((then, before)), Some((now, position))) if now > then => {
                Some((position - before) / (now - then).as_secs_f64())
            }
            _ => None,
        };
        self.wal = wal_now;
        let hardly_moving = turn.idle || turn.limits.rate.is_some_and(|rate| rate <= turn.bounds.least);
        for (name, latency, usual) in [
            ("source_read_ms", &mut self.read, turn.usual.read),
            ("target_commit_ms", &mut self.commit, turn.usual.commit),
        ] {
            latency.go_by(usual);
            latency.learn(hardly_moving);
            if let Some(high) = latency.high() {
                signals[name] = json!(high);
            }
        }
        let mut bad =
            signals::verdicts(signals, &self.read, &self.commit, wal_per_second, &Thresholds::default());
        let gently = turn.begins && bad.is_empty() && signals::somebody_is_at_work(signals);
        let (limits, memory, state) = if gently {
            bad.push("others are at work, so it begins gently".to_owned());
            controller::begin_gently(turn.bounds)
        } else {
            controller::decide(
                turn.limits,
                turn.memory,
                turn.bounds,
                !bad.is_empty(),
                turn.throughput,
                turn.lanes,
            )
        };
        let mut memory = json!(memory);
        memory["usual"] = json!(Usual { read: self.read.usual(), commit: self.commit.usual() });
        Decision {
            before: turn.limits,
            limits,
            state,
            memory,
            reason: (!bad.is_empty()).then(|| bad.join("; ")),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn turn(controller: Value) -> Turn {
        Turn::from(&json!({
            "byte_rate": null, "active_chunks": null, "controller": controller, "throughput": 40e6, "lanes": 4, "busy": 4,
            "options": {"min_rate": 2e6, "max_rate": 5e6},
        }))
    }

    #[test]
    fn from_a_turn_to_limits_between_its_bounds() {
        let mut watch = Watch::default();
        let mut signals = json!({"query": 1});
        let decision = watch.decide(&turn(json!({"good": 7})), &mut signals, Instant::now());
        assert_eq!(decision.reason.as_deref(), Some("the throttle query says 1"));
        assert_eq!(decision.state, State::Slowed);
        assert_eq!(decision.limits, Limits { rate: Some(20e6), active: Some(2) });
        assert_eq!(decision.memory["good"], 0);
        // Only latencies that there are.
        assert_eq!(signals, json!({"query": 1}));
    }

    #[test]
    fn beside_others_the_first_decision_is_gentle() {
        let mut watch = Watch::default();
        let mut signals = json!({"target_sessions": 1});
        let decision = watch.decide(&turn(json!({})), &mut signals, Instant::now());
        assert_eq!(decision.limits, Limits { rate: Some(5e6), active: Some(1) });
        let decision = watch.decide(&turn(json!({})), &mut json!({"target_sessions": 0}), Instant::now());
        assert_eq!((decision.limits, decision.reason), (Limits::default(), None));
    }

    #[test]
    fn whoever_joins_goes_by_what_was_usual_before() {
        let probed = |milliseconds: f64| {
            let mut watch = Watch::default();
            (0..20).for_each(|_| watch.commit.add(milliseconds));
            watch
        };
        let mut signals = json!({"target_sessions": 3});
        let quiet = probed(2.0).decide(&turn(json!({"good": 1})), &mut signals, Instant::now());
        assert_eq!(quiet.reason, None);
        let late = probed(40.0).decide(&turn(quiet.memory), &mut signals, Instant::now());
        assert_eq!(late.reason.as_deref(), Some("target commit latency 40.0 ms, usually 2.0 ms"));
    }

    #[test]
    fn the_rate_of_wal_is_that_between_two_decisions() {
        let mut watch = Watch::default();
        let began = Instant::now();
        let mut at = |seconds: u64, position: f64| {
            let mut signals = json!({"wal_position": position, "wal_room": 1e9});
            watch.decide(&turn(json!({"good": 1})), &mut signals, began + Duration::from_secs(seconds)).reason
        };
        assert_eq!(at(0, 5e9), None);
        assert_eq!(at(10, 6e9), None);
        assert_eq!(at(11, 7e9).as_deref(), Some("WAL fills max_wal_size in 1.0 s"));
    }
}
