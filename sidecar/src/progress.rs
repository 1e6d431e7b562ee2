//! How far it is: a bar on a terminal, log lines elsewhere.

use std::collections::VecDeque;
use std::io::{self, IsTerminal, Write};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use indicatif::{HumanBytes, HumanCount, ProgressBar, ProgressDrawTarget, ProgressStyle};
use uuid::Uuid;

use crate::conn::Session;
use crate::error::{At, Result};
use crate::throttle::Throttle;
use pg_dedup_record::fold::Books;

/// What this process has done, for all its workers.
#[derive(Debug, Default)]
pub struct Counters {
    /// Bytes of chunks that are being read or written.
    pub reading: AtomicU64,
    /// Those chunks.
    pub busy: AtomicU32,
    /// Bytes of committed chunks.
    pub bytes: AtomicU64,
    /// Records of committed chunks.
    pub records: AtomicU64,
    /// Duplicates among them.
    pub duplicates: AtomicU64,
    /// Quarantined records among them.
    pub quarantined: AtomicU64,
    /// Where chunks are compared: what was found wrong.
    pub mismatches: AtomicU64,
    /// Where a run is taken back: rows that somebody changed since.
    pub left_alone: AtomicU64,
    /// Committed chunks.
    pub chunks: AtomicU64,
    /// How fast it may read.
    pub throttle: Throttle,
}

impl Counters {
    /// A chunk was committed; its bytes leave `reading` next.
    pub fn committed(&self, bytes: u64, books: &Books) {
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
        self.records.fetch_add(books.counts[0], Ordering::Relaxed);
        self.duplicates.fetch_add(books.counts[4], Ordering::Relaxed);
        self.quarantined.fetch_add(books.counts[5], Ordering::Relaxed);
        self.chunks.fetch_add(1, Ordering::Relaxed);
    }

    /// A step of a rollback was done. Rows take the place of bytes.
    pub fn taken_back(&self, rows: u64, left_alone: u64) {
        self.bytes.fetch_add(rows, Ordering::Relaxed);
        self.records.fetch_add(rows, Ordering::Relaxed);
        self.left_alone.fetch_add(left_alone, Ordering::Relaxed);
        self.chunks.fetch_add(1, Ordering::Relaxed);
    }

    /// A chunk was compared; its bytes leave `reading` next.
    pub fn compared(&self, bytes: u64, records: u64, mismatches: u64) {
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
        self.records.fetch_add(records, Ordering::Relaxed);
        self.mismatches.fetch_add(mismatches, Ordering::Relaxed);
        self.chunks.fetch_add(1, Ordering::Relaxed);
    }

    fn load(&self) -> Sample {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Sample {
            at: Instant::now(),
            seen: get(&self.bytes) + get(&self.reading),
            records: get(&self.records),
            duplicates: get(&self.duplicates),
            quarantined: get(&self.quarantined),
            mismatches: get(&self.mismatches),
            left_alone: get(&self.left_alone),
            chunks: get(&self.chunks),
        }
    }
}

/// What the run had before this process came, and what it has in all, by the plan.
#[derive(Debug, Clone, Copy, Default)]
pub struct Plan {
    /// Bytes planned; rows, where a run is taken back.
    pub total_bytes: u64,
    /// Of those, bytes of chunks that were written before.
    pub done_bytes: u64,
    /// Chunks planned.
    pub total_chunks: u64,
    /// Of those, written before.
    pub done_chunks: u64,
    /// What is done with the chunks.
    pub work: Work,
}

/// What progress is about.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Work {
    /// Chunks are written.
    #[default]
    Migrate,
    /// Chunks are compared.
    Compare,
    /// What was written is taken back, step by step.
    TakeBack,
}

impl Plan {
    /// The run's plan and where it stands.
    pub async fn load(session: &Session, run: Uuid) -> Result<Plan> {
        let doing = "reading the checkpoints";
        let row = session
            .client
            .query_one(
                "SELECT coalesce(sum(coalesce(estimated_bytes, 0)), 0)::int8, \
                     coalesce(sum(coalesce(estimated_bytes, 0)) FILTER (WHERE written_at IS NOT NULL), 0)::int8, \
                     count(*), count(*) FILTER (WHERE written_at IS NOT NULL) \
                 FROM dedup.checkpoints WHERE run_id = $1",
                &[&run],
            )
            .await
            .at(session.side, doing)?;
        let get = |index: usize| -> Result<u64> {
            Ok(row.try_get::<_, i64>(index).at(session.side, doing)?.unsigned_abs())
        };
        Ok(Plan {
            total_bytes: get(0)?,
            done_bytes: get(1)?,
            total_chunks: get(2)?,
            done_chunks: get(3)?,
            work: Work::Migrate,
        })
    }
}

#[derive(Debug, Clone, Copy)]
struct Sample {
    at: Instant,
    /// Bytes read.
    seen: u64,
    records: u64,
    duplicates: u64,
    quarantined: u64,
    mismatches: u64,
    left_alone: u64,
    chunks: u64,
}

/// How far back speeds look.
const WINDOW: Duration = Duration::from_secs(30);
/// How often a bar is redrawn.
const REDRAW: Duration = Duration::from_millis(250);
/// How often a line is logged where there is no terminal.
const LOG: Duration = Duration::from_secs(10);

/// Shows progress until dropped.
pub struct Progress {
    task: tokio::task::JoinHandle<()>,
    bar: Option<ProgressBar>,
}

impl Progress {
    /// Starts showing.
    pub fn show(counters: Arc<Counters>, plan: Plan) -> Progress {
        let bar = io::stderr().is_terminal().then(|| {
            let bar =
                ProgressBar::with_draw_target(Some(plan.total_bytes.max(1)), ProgressDrawTarget::stderr());
            let style = ProgressStyle::with_template("{percent:>3}% [{bar:32}] {msg}")
                .unwrap_or_else(|_| ProgressStyle::default_bar())
                .progress_chars("=> ");
            bar.set_style(style);
            bar.set_position(plan.done_bytes);
            BAR.get_or_init(|| bar.clone());
            bar
        });
        let shown = bar.clone();
        let task = tokio::spawn(async move {
            let mut window: VecDeque<Sample> = VecDeque::from([counters.load()]);
            let mut pause = tokio::time::interval(if shown.is_some() { REDRAW } else { LOG });
            pause.tick().await;
            loop {
                pause.tick().await;
                let now = counters.load();
                window.push_back(now);
                while window.len() > 2 && window[1].at.elapsed() > WINDOW {
                    window.pop_front();
                }
                let mut line = line(&window[0], &now, &plan);
                if let Some(note) = counters.throttle.note() {
                    line.push_str(&format!(", {note}"));
                }
                match &shown {
                    Some(bar) => {
                        bar.set_position((plan.done_bytes + now.seen).min(plan.total_bytes.max(1)));
                        bar.set_message(line);
                    }
                    None => tracing::info!("{:.0}% {line}", percent(&now, &plan)),
                }
            }
        });
        Progress { task, bar }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.task.abort();
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

fn percent(now: &Sample, plan: &Plan) -> f64 {
    if plan.total_bytes == 0 {
        return 100.0 * (plan.done_chunks + now.chunks) as f64 / plan.total_chunks.max(1) as f64;
    }
    // The plan is an estimate: it is not to claim more than there is.
    (100.0 * (plan.done_bytes + now.seen) as f64 / plan.total_bytes as f64).min(100.0)
}

fn line(then: &Sample, now: &Sample, plan: &Plan) -> String {
    let seconds = (now.at - then.at).as_secs_f64().max(0.001);
    let bytes_per_second = now.seen.saturating_sub(then.seen) as f64 / seconds;
    let records_per_second = now.records.saturating_sub(then.records) as f64 / seconds;
    let left = plan.total_bytes.saturating_sub(plan.done_bytes + now.seen);
    let eta = if bytes_per_second > 0.0 { duration(left as f64 / bytes_per_second) } else { "-".into() };
    let done = plan.done_chunks + now.chunks;
    if plan.work == Work::TakeBack {
        return format!(
            "{} rows, {} rows/s, {done}/{} steps, {} left alone, ETA {eta}",
            HumanCount(plan.done_bytes + now.seen),
            HumanCount(records_per_second as u64),
            plan.total_chunks,
            HumanCount(now.left_alone),
        );
    }
    let (told, what) = match plan.work {
        Work::Compare => (now.mismatches, "mismatches"),
        _ => (now.duplicates, "duplicates"),
    };
    let mut line = format!(
        "{} {:.1} MB/s {} records/s, {done}/{} chunks, {} {what}, ETA {eta}",
        HumanBytes(plan.done_bytes + now.seen),
        bytes_per_second / 1e6,
        HumanCount(records_per_second as u64),
        plan.total_chunks,
        HumanCount(told),
    );
    if now.quarantined > 0 {
        line.push_str(&format!(", {} quarantined", HumanCount(now.quarantined)));
    }
    line
}

/// A duration as a person reads it.
pub fn duration(seconds: f64) -> String {
    let seconds = seconds.max(0.0).round() as u64;
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3600 => format!("{}m{:02}s", seconds / 60, seconds % 60),
        _ => format!("{}h{:02}m", seconds / 3600, seconds % 3600 / 60),
    }
}

static BAR: OnceLock<ProgressBar> = OnceLock::new();

/// Standard error for log lines: a bar is taken away while one is written.
#[derive(Debug, Clone, Copy, Default)]
pub struct LogWriter;

impl Write for LogWriter {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let write = || io::stderr().write_all(line).map(|()| line.len());
        match BAR.get() {
            Some(bar) => bar.suspend(write),
            None => write(),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stderr().flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(at: Instant, seen: u64, records: u64) -> Sample {
        Sample { at, seen, records, duplicates: 7, quarantined: 0, mismatches: 3, left_alone: 2, chunks: 1 }
    }

    #[test]
    fn a_line_has_speed_duplicates_and_eta() {
        let then = Instant::now();
        let now = sample(then + Duration::from_secs(10), 50_000_000, 1000);
        let plan = Plan { total_bytes: 100_000_000, total_chunks: 4, done_chunks: 1, ..Plan::default() };
        let compares = line(&sample(then, 0, 0), &now, &Plan { work: Work::Compare, ..plan });
        assert!(compares.contains("2/4 chunks, 3 mismatches, ETA 10s"), "{compares}");
        let back = line(&sample(then, 0, 0), &now, &Plan { work: Work::TakeBack, ..plan });
        assert_eq!(back, "50,000,000 rows, 100 rows/s, 2/4 steps, 2 left alone, ETA 10s");
        let line = line(&sample(then, 0, 0), &now, &plan);
        assert!(line.contains("5.0 MB/s 100 records/s, 2/4 chunks, 7 duplicates, ETA 10s"), "{line}");
        assert_eq!(percent(&now, &plan), 50.0);
        assert_eq!(percent(&now, &Plan { total_chunks: 2, done_chunks: 0, ..Plan::default() }), 50.0);
    }

    #[test]
    fn durations_are_short() {
        assert_eq!(duration(59.4), "59s");
        assert_eq!(duration(61.0), "1m01s");
        assert_eq!(duration(7260.0), "2h01m");
    }
}
