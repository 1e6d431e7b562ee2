//! The signals, and which of them are bad.
//!
//! Latencies are those of probes: a trivial query on the source and a synchronous commit on the target, several times a second. They count where
//! there is somebody to be spared: other sessions at work on that server. A signal that can't be read is bad.

use std::collections::VecDeque;

use serde_json::Value;

/// Probes that a latency is made of: two seconds of them.
const PROBES: usize = 20;
/// So many times what is usual is too much.
const LATENCY_FACTOR: f64 = 1.5;
/// Milliseconds above the usual that are put up with all the same.
const LATENCY_SLACK: f64 = 0.5;
/// Part of the way that the usual moves toward what is measured: one low measurement among many is not usual.
const DRIFT: f64 = 0.1;

/// Latencies of a server, and what is usual for it.
#[derive(Debug, Default)]
pub struct Latency {
    probes: VecDeque<f64>,
    usual: Option<f64>,
}

impl Latency {
    /// A probe took so many milliseconds.
    pub fn add(&mut self, milliseconds: f64) {
        if self.probes.len() == PROBES {
            self.probes.pop_front();
        }
        self.probes.push_back(milliseconds);
    }

    /// Nine probes of ten took at most this.
    pub fn high(&self) -> Option<f64> {
        if self.probes.len() < PROBES / 2 {
            return None;
        }
        let mut sorted: Vec<f64> = self.probes.iter().copied().collect();
        sorted.sort_by(f64::total_cmp);
        sorted.get(sorted.len() * 9 / 10).copied()
    }

    /// What is usual, where somebody has told.
    pub fn go_by(&mut self, usual: Option<f64>) {
        self.usual = usual.or(self.usual);
    }

    /// What is usual, if it is known.
    pub fn usual(&self) -> Option<f64> {
        self.usual
    }

    /// Keeps what is usual: what is measured when it is low. While the run hardly moves what is measured is not its doing, and becomes usual, too.
    pub fn learn(&mut self, hardly_moving: bool) {
        let Some(high) = self.high() else { return };
        let usual = self.usual.get_or_insert(high);
        if high < *usual || hardly_moving {
            *usual += (high - *usual) * DRIFT;
        }
    }

    fn limit(&self) -> Option<f64> {
        self.usual.map(|usual| (usual * LATENCY_FACTOR).max(usual + LATENCY_SLACK))
    }

    /// Why it is bad, if it is.
    fn verdict(&self, name: &str) -> Option<String> {
        let (high, limit) = (self.high()?, self.limit()?);
        (high > limit)
            .then(|| format!("{name} {high:.1} ms, usually {:.1} ms", self.usual.unwrap_or_default()))
    }
}

/// What is too much.
#[derive(Debug, Clone, PartialEq)]
pub struct Thresholds {
    /// Seconds that a standby may be behind.
    pub replication_lag: f64,
    /// Part of the server's connections that may be taken.
    pub connections: f64,
    /// Seconds in which WAL may fill `max_wal_size`, at least.
    pub wal_seconds: f64,
    /// Part of its disk's room that WAL may take which slots or the archiver keep.
    pub wal_kept: f64,
    /// Seconds that the source's oldest snapshot may be old.
    pub snapshot_age: f64,
    /// Age of the source's oldest xmin, as a part of `autovacuum_freeze_max_age`.
    pub xmin_age: f64,
}

impl Default for Thresholds {
    fn default() -> Thresholds {
        Thresholds {
            replication_lag: 10.0,
            connections: 0.9,
            wal_seconds: 5.0,
            wal_kept: 0.5,
            snapshot_age: 3600.0,
            xmin_age: 0.5,
        }
    }
}

/// Why the run is to be slowed; empty: it is not.
pub fn verdicts(
    signals: &Value,
    read: &Latency,
    commit: &Latency,
    wal_per_second: Option<f64>,
    thresholds: &Thresholds,
) -> Vec<String> {
    let mut bad = Vec::new();
    for (side, latency, name) in
        [("source", read, "source read latency"), ("target", commit, "target commit latency")]
    {
        match reading(signals, &format!("{side}_sessions")) {
            Reading::Value(0.0) | Reading::Absent => {}
            // Of whom nothing may be seen may be there.
            Reading::Value(_) | Reading::Unknown(_) | Reading::Bad(_) => bad.extend(latency.verdict(name)),
        }
    }
    let mut above = |name: &str, limit: f64, say: &dyn Fn(f64) -> String| match reading(signals, name) {
        Reading::Value(value) if value > limit => bad.push(say(value)),
        Reading::Value(_) | Reading::Absent => {}
        Reading::Unknown(why) => bad.push(format!("{} can't be read: {why}", name.replace('_', " "))),
        Reading::Bad(why) => bad.push(why),
    };
    above("replication_lag", thresholds.replication_lag, &|lag| format!("a standby is {lag:.1} s behind"));
    for side in ["source", "target"] {
        above(&format!("{side}_connections"), thresholds.connections, &|part| {
            format!("{:.0} % of the {side}'s connections are taken", part * 100.0)
        });
    }
    for side in ["source", "target"] {
        // There only if it failed.
        above(&format!("{side}_probe"), f64::INFINITY, &|_| String::new());
    }
    above("wal_kept", thresholds.wal_kept, &|part| {
        format!("WAL that slots or the archiver keep takes {:.0} % of its disk's room", part * 100.0)
    });
    above("snapshot_age", thresholds.snapshot_age, &|age| {
        format!("the source's oldest snapshot is {:.0} min old", age / 60.0)
    });
    above("xmin_age", thresholds.xmin_age, &|part| {
        format!("the source's oldest xmin is {:.0} % of autovacuum_freeze_max_age old", part * 100.0)
    });
    for name in ["wal_position", "wal_room"] {
        above(name, f64::INFINITY, &|_| String::new());
    }
    above("query", 0.0, &|value| format!("the throttle query says {value}"));
    if let (Reading::Value(room), Some(rate)) = (reading(signals, "wal_room"), wal_per_second)
        && rate * thresholds.wal_seconds > room
    {
        bad.push(format!("WAL fills max_wal_size in {:.1} s", room / rate));
    }
    bad
}

/// Whether sessions of others are at work on either server, or may be.
pub fn somebody_is_at_work(signals: &Value) -> bool {
    ["source_sessions", "target_sessions"].into_iter().any(|name| match reading(signals, name) {
        Reading::Value(count) => count > 0.0,
        Reading::Unknown(_) | Reading::Bad(_) => true,
        Reading::Absent => false,
    })
}

/// A signal as it was read.
enum Reading {
    Value(f64),
    /// There is no such thing here.
    Absent,
    Unknown(String),
    /// It says itself what is wrong.
    Bad(String),
}

fn reading(signals: &Value, name: &str) -> Reading {
    match &signals[name] {
        Value::Null => Reading::Absent,
        Value::Number(number) => Reading::Value(number.as_f64().unwrap_or(f64::INFINITY)),
        Value::Object(object) if object.contains_key("bad") => {
            Reading::Bad(object["bad"].as_str().unwrap_or(name).to_owned())
        }
        other => Reading::Unknown(other["unknown"].as_str().unwrap_or("not a number").to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn latency(usual: f64, now: f64) -> Latency {
        let mut latency = Latency::default();
        (0..PROBES).for_each(|_| latency.add(usual));
        latency.learn(false);
        (0..PROBES).for_each(|_| latency.add(now));
        latency
    }

    fn told(signals: &Value, read: &Latency) -> Vec<String> {
        verdicts(signals, read, &latency(1.0, 1.0), Some(1e6), &Thresholds::default())
    }

    #[test]
    fn latencies_count_where_somebody_is_to_be_spared() {
        let slow = latency(1.0, 9.0);
        assert_eq!(told(&json!({"source_sessions": 0}), &slow), [""; 0]);
        assert_eq!(
            told(&json!({"source_sessions": 3}), &slow),
            ["source read latency 9.0 ms, usually 1.0 ms"]
        );
        assert_eq!(told(&json!({"source_sessions": {"unknown": "denied"}}), &slow).len(), 1);
        assert_eq!(told(&json!({"source_sessions": 3}), &latency(2.0, 2.9)), [""; 0]);
        // A tenth of the probes may be slow.
        let mut once = latency(1.0, 1.0);
        once.add(500.0);
        assert_eq!(told(&json!({"source_sessions": 3}), &once), [""; 0]);
    }

    #[test]
    fn what_can_not_be_read_is_bad() {
        let quiet = latency(1.0, 1.0);
        assert_eq!(told(&json!({"replication_lag": null, "query": null}), &quiet), [""; 0]);
        let bad = told(
            &json!({"replication_lag": {"unknown": "denied"}, "query": 1, "wal_room": 2e6, "target_connections": 0.95, "target_probe": {"unknown": "read only"}, "wal_kept": 0.6, "xmin_age": 0.7}),
            &quiet,
        );
        assert_eq!(
            bad,
            [
                "replication lag can't be read: denied",
                "95 % of the target's connections are taken",
                "target probe can't be read: read only",
                "WAL that slots or the archiver keep takes 60 % of its disk's room",
                "the source's oldest xmin is 70 % of autovacuum_freeze_max_age old",
                "the throttle query says 1",
                "WAL fills max_wal_size in 2.0 s"
            ]
        );
    }

    #[test]
    fn what_is_usual_follows_what_is_low_and_the_rest_while_nothing_moves() {
        let mut latency = latency(2.0, 1.0);
        // One low measurement is not usual yet.
        latency.learn(false);
        assert_eq!(latency.usual, Some(1.9));
        (0..60).for_each(|_| latency.learn(false));
        assert!(latency.usual.is_some_and(|usual| usual < 1.01), "{latency:?}");
        (0..PROBES).for_each(|_| latency.add(3.0));
        (0..60).for_each(|_| latency.learn(false));
        assert!(latency.usual.is_some_and(|usual| usual < 1.01), "{latency:?}");
        (0..60).for_each(|_| latency.learn(true));
        assert!(latency.usual.is_some_and(|usual| usual > 2.9), "{latency:?}");
    }
}
