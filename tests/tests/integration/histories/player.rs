//! Plays a history: a step at a time, and looks what has become of the target.

use integration::cluster::{Cluster, PRELOAD};
use integration::db::{Db, describe, literal, sqlstate};

use super::memory::Memory;
use super::oracle;
use super::state::State;
use super::step::{Force, Run, Source, Step};

/// The database that every history's is a copy of.
const TEMPLATE: &str = "blank";
/// The database of the history that is played.
const DATABASE: &str = "history";
/// All sources that a history may have.
pub const SOURCES: &[Source] = &['a', 'b', 'c'];
/// SQLSTATE of a refusal because of other runs.
const IN_USE: &str = "55006";
/// SQLSTATE of a refusal because of what is there.
const NOT_IN_STATE: &str = "55000";

/// A server on which one history after the other is played.
pub struct Stage {
    cluster: Cluster,
    admin: Db,
}

impl Stage {
    /// Starts it.
    pub async fn start() -> Self {
        let cluster = Cluster::start(&[PRELOAD]);
        let admin = Db::connect(&cluster, "postgres").await;
        admin.exec(&format!("CREATE DATABASE {TEMPLATE}")).await;
        let blank = Db::connect(&cluster, TEMPLATE).await;
        blank
            .exec("CREATE EXTENSION pg_dedup_migrate; CREATE TABLE public.it (id int PRIMARY KEY, v text)")
            .await;
        for source in SOURCES {
            blank.exec(&format!("CREATE TABLE public.{source} (LIKE public.it INCLUDING ALL)")).await;
        }
        blank
            .exec("CREATE TABLE public.alphabet AS SELECT chr(n) AS v, dedup.content_hash(chr(n)) AS hash FROM generate_series(97, 122) AS n")
            .await;
        Stage { cluster, admin }
    }

    /// Plays a history in a database of its own; `Err`: in which step it went wrong, and how.
    pub async fn play(&self, steps: &[Step]) -> Result<(), Wrong> {
        self.admin.exec(&format!("DROP DATABASE IF EXISTS {DATABASE} WITH (FORCE)")).await;
        self.admin.exec(&format!("CREATE DATABASE {DATABASE} TEMPLATE {TEMPLATE}")).await;
        let db = Db::connect(&self.cluster, DATABASE).await;
        let mut player = Player { state: State::of(&db).await, db, memory: Memory::default() };
        for (at, step) in steps.iter().enumerate() {
            player.play(step).await.map_err(|complaints| Wrong { at, complaints })?;
        }
        Ok(())
    }
}

/// What went wrong.
#[derive(Clone, Debug)]
pub struct Wrong {
    /// Position of the step.
    pub at: usize,
    /// What does not hold after it.
    pub complaints: Vec<String>,
}

impl Wrong {
    /// The name of the first thing that does not hold.
    pub fn kind(&self) -> &str {
        self.complaints.first().and_then(|text| text.split_once(':')).map_or("", |(kind, _)| kind)
    }
}

/// What the target answered.
#[derive(Debug)]
pub enum Answer {
    /// It was done.
    Done,
    /// There was nothing to do: no such run, or not in a state for it.
    Skipped,
    /// It was refused, as it may be.
    Refused,
    /// It failed, which it should not.
    Failed(String),
}

struct Player {
    db: Db,
    state: State,
    memory: Memory,
}

impl Player {
    async fn play(&mut self, step: &Step) -> Result<(), Vec<String>> {
        self.memory.begin(step, &self.state);
        let answer = self.act(step).await;
        let after = match (step, &answer) {
            (Step::Source(..), _) | (_, Answer::Skipped) => self.state.clone(),
            _ => State::of(&self.db).await,
        };
        self.memory.reread(&self.state, &after);
        if std::env::var_os("HISTORIES_VERBOSE").is_some() {
            eprintln!("{step}: {answer:?}\n    {after}");
        }
        let complaints = oracle::judge(&mut self.memory, step, &answer, &self.state, &after);
        self.state = after;
        if complaints.is_empty() { Ok(()) } else { Err(complaints) }
    }

    fn status(&self, run: Run) -> Option<&str> {
        self.state.runs.get(&run).map(String::as_str)
    }

    async fn act(&self, step: &Step) -> Answer {
        match step {
            Step::Source(source, key, content) => self.put(&format!("public.{source}"), *key, *content).await,
            Step::ByHand(key, content) => self.put("public.it", *key, *content).await,
            Step::Run(run, source, bytes) => self.run(*run, *source, *bytes).await,
            Step::Resume(run) => self.resume(*run).await,
            Step::Cancel(run) => match self.status(*run) {
                Some("running" | "failed" | "paused") => {
                    self.call(&format!("SELECT dedup.cancel_run({})", id(*run)), "").await
                }
                _ => Answer::Skipped,
            },
            Step::Reconcile(run) => match self.status(*run) {
                Some("done" | "reconciled" | "halted") => {
                    self.call(&format!("SELECT FROM dedup.reconcile({})", id(*run)), "").await
                }
                _ => Answer::Skipped,
            },
            Step::Repair(run, extra) => self.repair(*run, *extra).await,
            Step::RollBack { run, force, in_steps } => match self.status(*run) {
                None | Some("rolled_back") => Answer::Skipped,
                Some(_) => self.roll_back(*run, *force, *in_steps).await,
            },
        }
    }

    async fn put(&self, table: &str, key: i32, content: Option<char>) -> Answer {
        let sql = match content {
            Some(content) => format!(
                "INSERT INTO {table} VALUES ({key}, '{content}') ON CONFLICT (id) DO UPDATE SET v = excluded.v"
            ),
            None => format!("DELETE FROM {table} WHERE id = {key}"),
        };
        self.call(&sql, "").await
    }

    async fn run(&self, run: Run, source: Source, bytes: u32) -> Answer {
        if self.status(run).is_some() {
            return Answer::Skipped;
        }
        let planned = format!(
            "SELECT dedup.create_run('r{run}'); \
             SELECT dedup.add_table({id}, 'public.{source}', 'public.it', content_columns => '{{v}}'); SELECT dedup.plan_chunks({id}, {bytes})",
            id = id(run)
        );
        // While a run is open, or halted, no other begins.
        match self.call(&planned, IN_USE).await {
            Answer::Done => self.migrate(run).await,
            answer => answer,
        }
    }

    async fn migrate(&self, run: Run) -> Answer {
        self.call(&format!("CALL dedup.migrate_run({})", self.literal_id(run).await), "").await
    }

    async fn resume(&self, run: Run) -> Answer {
        match self.status(run) {
            Some("running" | "failed" | "paused") => self.migrate(run).await,
            _ => Answer::Skipped,
        }
    }

    async fn repair(&self, run: Run, extra: bool) -> Answer {
        match self.status(run) {
            Some("halted") => {
                self.call(&format!("SELECT dedup.repair({}, {extra})", id(run)), NOT_IN_STATE).await
            }
            _ => Answer::Skipped,
        }
    }

    async fn roll_back(&self, run: Run, force: Force, in_steps: bool) -> Answer {
        let run = self.literal_id(run).await;
        let sql = |force: bool| match in_steps {
            true => format!("CALL dedup.rollback_run_in_chunks({run}, {force})"),
            false => format!("SELECT dedup.rollback_run({run}, {force})"),
        };
        if force == Force::Always {
            return self.call(&sql(true), "").await;
        }
        match self.call(&sql(false), IN_USE).await {
            Answer::Refused if force == Force::IfRefused => self.call(&sql(true), "").await,
            answer => answer,
        }
    }

    /// The id itself: what a procedure commits must not hang on a query.
    async fn literal_id(&self, run: Run) -> String {
        literal(&self.db.one::<String>(&format!("SELECT {}::text", id(run))).await)
    }

    async fn call(&self, sql: &str, refusal: &str) -> Answer {
        match self.db.try_exec(sql).await {
            Ok(()) => Answer::Done,
            Err(error) if sqlstate(&error) == refusal => Answer::Refused,
            Err(error) => Answer::Failed(describe(&error)),
        }
    }
}

/// The id of a run, in SQL.
fn id(run: Run) -> String {
    format!("(SELECT run_id FROM dedup.runs WHERE name = 'r{run}')")
}
