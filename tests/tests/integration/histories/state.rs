//! What the target says: its rows, and what schema `dedup` has of them.

use std::collections::{BTreeMap, BTreeSet};

use integration::db::Db;

use super::step::{Content, Key, Run};

/// A chunk of a run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chunk {
    /// `verified`, or what else.
    pub status: String,
    /// Of its last finish.
    pub ordinal: Option<i64>,
    /// Keys from here on; `None`: all.
    pub lower: Option<Key>,
    /// Keys below this.
    pub upper: Option<Key>,
    /// Why it failed.
    pub error: String,
}

impl Chunk {
    /// Is this key in its range?
    pub fn has(&self, key: Key) -> bool {
        self.lower.is_none_or(|lower| lower <= key) && self.upper.is_none_or(|upper| key < upper)
    }
}

/// All that can be seen between two steps.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct State {
    /// The target's rows.
    pub rows: BTreeMap<Key, Content>,
    /// Entries of the hash index that count, and whose they are.
    pub entries: BTreeMap<(Key, Content), Option<Run>>,
    /// Dropped duplicates.
    pub ledger: BTreeSet<(Run, Key, Content)>,
    /// Records in quarantine.
    pub aside: BTreeSet<(Run, Key)>,
    /// Runs with their status.
    pub runs: BTreeMap<Run, String>,
    /// Chunks by run and name.
    pub chunks: BTreeMap<(Run, String), Chunk>,
    /// Keys of before images, with the run whose they are.
    pub images: BTreeSet<(Run, Key)>,
    /// Finishes whose list of unchanged rows is kept.
    pub unchanged: i64,
    /// Kinds of mismatches that the last pass over a run found.
    pub mismatches: BTreeSet<(Run, String)>,
}

/// Contents are told by their hashes; keys stand in URIs and in the ledger as `id=5`.
const ENTRIES: &str = "SELECT substring(h.target_location_uri, 'id=(-?\\d+)'), a.v, substr(r.name, 2) \
     FROM dedup.targets AS t CROSS JOIN LATERAL dedup.hash_index(t.target) AS h \
     LEFT JOIN public.alphabet AS a ON a.hash = h.content_hash LEFT JOIN dedup.runs AS r USING (run_id)";
const LEDGER: &str = "SELECT substr(r.name, 2), substr(d.source_key, 4), a.v FROM dedup.duplicates AS d JOIN dedup.runs AS r USING (run_id) \
     LEFT JOIN public.alphabet AS a ON a.hash = d.content_hash";
const CHUNKS: &str = "SELECT substr(r.name, 2), c.chunk_id, c.status, c.ordinal, c.range_lower[1], c.range_upper[1], \
     concat_ws(' ', c.error_sqlstate, c.error_message) FROM dedup.checkpoints AS c JOIN dedup.runs AS r USING (run_id)";
const MISMATCHES: &str = "SELECT substr(r.name, 2), d.kind FROM dedup.divergences AS d JOIN dedup.runs AS r USING (run_id) WHERE d.state = 'open'";
const IMAGES: &str = "SELECT substr(r.name, 2), substr(dedup.key_text(b.target_id, b.key), 4) \
     FROM dedup.before_images AS b JOIN dedup.runs AS r USING (run_id)";

impl State {
    /// Reads it.
    pub async fn of(db: &Db) -> Self {
        let mut state = State { rows: rows(db).await, ..State::default() };
        for row in db.texts(ENTRIES).await {
            state.entries.insert((cell(&row, 0), cell(&row, 1)), optional(&row, 2));
        }
        for row in db.texts(LEDGER).await {
            state.ledger.insert((cell(&row, 0), cell(&row, 1), cell(&row, 2)));
        }
        for row in db
            .texts("SELECT substr(r.name, 2), substr(q.source_key, 4) FROM dedup.quarantine AS q JOIN dedup.runs AS r USING (run_id)")
            .await
        {
            state.aside.insert((cell(&row, 0), cell(&row, 1)));
        }
        for row in db.texts("SELECT substr(name, 2), status FROM dedup.runs").await {
            state.runs.insert(cell(&row, 0), cell(&row, 1));
        }
        for row in db.texts(CHUNKS).await {
            let chunk = Chunk {
                status: cell(&row, 2),
                ordinal: optional(&row, 3),
                lower: optional(&row, 4),
                upper: optional(&row, 5),
                error: cell(&row, 6),
            };
            state.chunks.insert((cell(&row, 0), cell(&row, 1)), chunk);
        }
        for row in db.texts(IMAGES).await {
            state.images.insert((cell(&row, 0), cell(&row, 1)));
        }
        for row in db.texts(MISMATCHES).await {
            state.mismatches.insert((cell(&row, 0), cell(&row, 1)));
        }
        state.unchanged = db.one("SELECT count(*) FROM dedup.unchanged_rows").await;
        state
    }

    /// Does a content stand in some row?
    pub fn stands(&self, content: Content) -> bool {
        self.rows.values().any(|standing| *standing == content)
    }

    /// Was the run not taken back?
    pub fn is_live(&self, run: Run) -> bool {
        self.runs.get(&run).is_some_and(|status| status != "rolled_back")
    }

    /// The chunk of a run that a key belongs to.
    pub fn chunk_of(&self, run: Run, key: Key) -> Option<&Chunk> {
        self.chunks.iter().find(|((of, _), chunk)| *of == run && chunk.has(key)).map(|(_, chunk)| chunk)
    }

    /// Entries whose row is gone, or holds something else.
    pub fn stale(&self) -> BTreeSet<(Key, Content)> {
        let is_stale = |(key, content): &&(Key, Content)| self.rows.get(key) != Some(content);
        self.entries.keys().filter(is_stale).copied().collect()
    }

    /// Rows that the index does not know.
    pub fn unindexed(&self) -> BTreeSet<(Key, Content)> {
        let rows = self.rows.iter().map(|(key, content)| (*key, *content));
        rows.filter(|row| !self.entries.contains_key(row)).collect()
    }
}

/// The target's rows.
pub async fn rows(db: &Db) -> BTreeMap<Key, Content> {
    let rows = db.texts("SELECT id, v FROM public.it").await;
    rows.iter().map(|row| (cell(row, 0), cell(row, 1))).collect()
}

fn optional<T: std::str::FromStr>(row: &[Option<String>], at: usize) -> Option<T> {
    let text = row.get(at)?.as_ref()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{text:?} in column {at}")))
}

fn cell<T: std::str::FromStr>(row: &[Option<String>], at: usize) -> T {
    optional(row, at).unwrap_or_else(|| panic!("nothing in column {at} of {row:?}"))
}

impl std::fmt::Display for State {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let rows: Vec<String> = self.rows.iter().map(|(key, content)| format!("{key}={content}")).collect();
        let owned = |((key, content), owner): (&(Key, Content), &Option<Run>)| match owner {
            Some(run) => format!("{key}={content} of r{run}"),
            None => format!("{key}={content} of nobody"),
        };
        let entries: Vec<String> = self.entries.iter().map(owned).collect();
        let ledger: Vec<String> =
            self.ledger.iter().map(|(run, key, content)| format!("r{run} {key}={content}")).collect();
        let runs: Vec<String> = self.runs.iter().map(|(run, status)| format!("r{run} {status}")).collect();
        let images: Vec<String> = self.images.iter().map(|(run, key)| format!("r{run} {key}")).collect();
        write!(
            f,
            "rows [{}] entries [{}] dropped [{}] images [{}] {}",
            rows.join(", "),
            entries.join(", "),
            ledger.join(", "),
            images.join(", "),
            runs.join(", ")
        )
    }
}
