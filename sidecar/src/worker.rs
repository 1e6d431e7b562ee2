//! The loop of a worker: lease a chunk, read it, write it, decide about errors, until nothing is left.

use std::collections::{BTreeSet, HashMap};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use backon::{BackoffBuilder, ExponentialBuilder};
use pg_dedup_record::Batch;
use tokio::sync::{Notify, Semaphore, SemaphorePermit};
use uuid::Uuid;

use crate::chunk::{self, ChunkContext};
use crate::conn::{Endpoint, Role, Session};
use crate::error::{Error, Kind, Policy, Result, Side};
use crate::failpoint::{self, Failpoint};
use crate::finish;
use crate::heartbeat::{Heartbeat, Identities, RunStatus};
use crate::names::TableName;
use crate::progress::Counters;
use crate::protocol::{self, Lease, Whose};
use crate::read;
use crate::run::LEFT_TO_THE_DATABASE;
use crate::stop::Stop;
use crate::tables::TableWork;
use crate::throttle::Flow;

/// What the workers of a process share.
pub struct Crew {
    /// The source.
    pub source: Arc<Endpoint>,
    /// The target.
    pub target: Arc<Endpoint>,
    /// The run.
    pub run: Uuid,
    /// Its tables by number.
    pub tables: HashMap<i32, TableWork>,
    /// Records that may be refused in a chunk.
    pub error_budget: u64,
    /// Leases a chunk may have before it is given up.
    pub max_attempts: i32,
    /// Counters.
    pub counters: Arc<Counters>,
    /// Whether to stop.
    pub stop: Stop,
    /// Chunks given back for a foreign key: how many chunks were verified then.
    pub deferred: Mutex<HashMap<String, i64>>,
    /// A chunk ended: whoever is idle looks again whether there is something to take.
    pub news: Notify,
    /// Somebody made a beginning of the VACUUM at the end.
    pub vacuumed: AtomicBool,
    /// Whether a repair met a full disk: no further chunk is begun.
    pub no_room: AtomicBool,
    /// When it was last said that chunks wait for the leases of silent workers.
    pub told_waiting: Mutex<Option<Instant>>,
    /// The run is halted, and its chunks are repaired.
    pub repairs: bool,
}

impl Crew {
    /// The tables that are written to.
    fn targets(&self) -> BTreeSet<TableName> {
        self.tables.values().map(|table| table.target.clone()).collect()
    }

    /// Says what everybody is waiting for, twice a minute at most.
    async fn tell_waiting(&self, target: &Session) {
        {
            let mut told = lock(&self.told_waiting);
            if told.is_some_and(|at| at.elapsed() < TELL_WAITING_EVERY) {
                return;
            }
            *told = Some(Instant::now());
        }
        if let Ok(Some(other)) = protocol::rollback_in_the_way(target, self.run).await {
            tracing::info!(
                "waiting for the rollback of run {other}: pg-dedup-migrate rollback {other} goes on with it if it was cut off"
            );
            return;
        }
        match protocol::silent_leases(target, self.run).await {
            Ok(Some(silent)) => tracing::info!(
                "waiting for {} chunk{} of a worker that gave no heartbeat for {:.0} s: the lease runs out in {:.0} s",
                silent.chunks,
                if silent.chunks == 1 { "" } else { "s" },
                silent.silent,
                silent.left.ceil()
            ),
            Ok(None) if matches!(protocol::is_open(target, self.run, Whose::Database).await, Ok(true)) => {
                tracing::info!(
                    "{LEFT_TO_THE_DATABASE}, and tables here may have to wait for them: CALL dedup.migrate_run('{}')",
                    self.run
                )
            }
            // Nothing to tell yet: soon there may be.
            Ok(None) => *lock(&self.told_waiting) = None,
            Err(error) => tracing::debug!("{error}"),
        }
    }
}

const TELL_WAITING_EVERY: Duration = Duration::from_secs(30);

/// Lanes of so many workers: while some write their chunks, others read the next ones. Half as many again keep the writers busy; each holds a
/// chunk in memory.
pub fn lanes(workers: u16) -> u16 {
    workers.saturating_add(workers.div_ceil(2))
}

/// Works until no chunk is left, the run is stopped, or somebody interrupts. At most `workers` chunks are read at a time, and as many
/// written.
pub async fn work(crew: Arc<Crew>, workers: u16) -> Result<()> {
    let identities = Identities::default();
    let ids: Vec<Uuid> = (0..lanes(workers)).map(|_| identities.take()).collect();
    let turns =
        Arc::new(Turns { reading: Semaphore::new(workers.into()), writing: Semaphore::new(workers.into()) });
    let (_heartbeat, told) = Heartbeat::start(crew.target.clone(), crew.run, identities.clone()).await?;
    let status = told.subscribe();
    let _throttling = Flow {
        source: Some(crew.source.clone()),
        target: crew.target.clone(),
        run: crew.run,
        lanes: lanes(workers),
        counters: crew.counters.clone(),
        status: Some(told),
    }
    .start()
    .await;
    let mut tasks = tokio::task::JoinSet::new();
    for id in ids {
        let worker = Worker {
            id,
            crew: crew.clone(),
            turns: turns.clone(),
            identities: identities.clone(),
            status: status.clone(),
            source: None,
            target: None,
            asked_for_warmth: false,
            spent: None,
        };
        tasks.spawn_blocking(move || on_own_thread(worker.run()));
    }
    join(tasks).await
}

/// Waits for all lanes; answers the first error, further ones are logged.
pub async fn join(mut lanes: tokio::task::JoinSet<Result<()>>) -> Result<()> {
    let mut first_error = None;
    while let Some(ended) = lanes.join_next().await {
        let result =
            ended.unwrap_or_else(|e| Err(Error::here(Kind::Protocol, format!("a worker ended badly: {e}"))));
        if let Err(error) = result {
            if first_error.is_some() {
                tracing::error!("{error}");
            }
            first_error.get_or_insert(error);
        }
    }
    first_error.map_or(Ok(()), Err)
}

/// Runs a lane on a thread of its own, its connections with it: handing a message from one task to another is then a matter of one thread,
/// not a system call and a reschedule.
pub fn on_own_thread(lane: impl Future<Output = Result<()>>) -> Result<()> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|e| Error::here(Kind::Refused, format!("can't start a worker's thread: {e}")))?
        .block_on(lane)
}

/// What keeps sources and targets from seeing more sessions at work than there are workers.
struct Turns {
    reading: Semaphore,
    writing: Semaphore,
}

/// One lane: an identity, a source session and a target session.
struct Worker {
    id: Uuid,
    crew: Arc<Crew>,
    turns: Arc<Turns>,
    identities: Identities,
    status: RunStatus,
    source: Option<Session>,
    target: Option<Session>,
    /// Whether the target session has seen to the filter.
    asked_for_warmth: bool,
    /// The last chunk's records, for their memory.
    spent: Option<Batch>,
}

/// What a turn of the loop led to.
enum Turn {
    Worked,
    /// Nothing to take now.
    Idle,
    Finished,
}

impl Worker {
    async fn run(mut self) -> Result<()> {
        let result = self.work().await;
        self.identities.leave(self.id);
        let close = async |session: Option<Session>| {
            if let Some(session) = session {
                session.close().await;
            }
        };
        tokio::join!(close(self.source.take()), close(self.target.take()));
        result
    }

    async fn work(&mut self) -> Result<()> {
        let crew = self.crew.clone();
        // Both at once. Whoever needs a session that could not be opened now tries again, patiently.
        let (source, target) =
            tokio::join!(crew.source.connect(Role::Reader), crew.target.connect(Role::Writer));
        (self.source, self.target) = (source.ok(), target.ok());
        let mut idle = pauses();
        let mut paused_told = false;
        while !self.crew.stop.finishing() && !self.crew.no_room.load(Ordering::Relaxed) {
            let status = self.status.borrow().clone();
            match status.as_str() {
                "created" | "running" => paused_told = false,
                "halted" if crew.repairs => {}
                "paused" => {
                    if !std::mem::replace(&mut paused_told, true) {
                        tracing::warn!(
                            "the run is paused; SELECT dedup.resume_run('{}') goes on",
                            self.crew.run
                        );
                    }
                    self.rest(Duration::from_secs(1)).await;
                    continue;
                }
                other => {
                    tracing::info!("the run is {other}: nothing more to do here");
                    break;
                }
            }
            // Listened for from before the look at what there is to take, so that nothing is missed in between.
            let mut news = std::pin::pin!(crew.news.notified());
            news.as_mut().enable();
            match self.turn().await? {
                Turn::Worked => {
                    idle = pauses();
                    crew.news.notify_waiters();
                }
                Turn::Idle => {
                    self.vacuum_early().await;
                    let pause = idle.next().unwrap_or(LONGEST_PAUSE);
                    tokio::select! {
                        () = self.rest(pause) => {}
                        () = news => {}
                    }
                }
                Turn::Finished => break,
            }
        }
        Ok(())
    }

    /// A lane that has nothing to do while others write the last chunks makes a beginning of the VACUUM that comes next: pages that are all
    /// visible by then are not looked at again.
    async fn vacuum_early(&self) {
        let crew = &self.crew;
        let Some(target) = &self.target else { return };
        let all_taken = async { matches!(protocol::pending(target, crew.run).await, Ok(0)) };
        if crew.vacuumed.load(Ordering::Relaxed)
            || !all_taken.await
            || crew.vacuumed.swap(true, Ordering::Relaxed)
        {
            return;
        }
        for table in crew.targets() {
            tokio::select! {
                () = finish::vacuum_early(target, &table) => {}
                () = crew.stop.asked() => {
                    target.cancel().await;
                    return;
                }
            }
        }
    }

    /// Sleeps, unless somebody interrupts.
    async fn rest(&self, pause: Duration) {
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            () = self.crew.stop.asked() => {}
        }
    }

    /// One lease and what comes of it. An error here ends the worker.
    async fn turn(&mut self) -> Result<Turn> {
        let stop = self.crew.stop.clone();
        let lease = tokio::select! {
            lease = self.lease() => lease?,
            () = stop.aborted() => return Ok(Turn::Finished),
        };
        let Some(lease) = lease else {
            let Some(target) = &self.target else { return Ok(Turn::Idle) };
            return match protocol::is_open(target, self.crew.run, Whose::Workers).await {
                Ok(false) => Ok(Turn::Finished),
                Ok(true) => {
                    self.crew.tell_waiting(target).await;
                    Ok(Turn::Idle)
                }
                Err(error) if error.policy() == Policy::Retry => {
                    self.target = None;
                    Ok(Turn::Idle)
                }
                Err(error) => Err(error),
            };
        };
        self.identities.at(self.id, Some(&lease.chunk_id));
        failpoint::reach(Failpoint::Leased).await;
        let done = tokio::select! {
            done = self.chunk(&lease) => done,
            () = stop.aborted() => Err(Error::here(Kind::Interrupted, "interrupted")),
        };
        match done {
            Ok(()) => {}
            Err(error) => self.give_back(&lease, error).await?,
        }
        self.identities.at(self.id, None);
        Ok(Turn::Worked)
    }

    /// Leases on the connection that will write the chunk.
    async fn lease(&mut self) -> Result<Option<Lease>> {
        let mut pauses = pauses().take(LEASE_TRIES);
        loop {
            if self.target.as_ref().is_none_or(Session::is_closed) {
                let session = self.crew.target.connect_patiently(Role::Writer).await?;
                self.writes_by(session);
            }
            let Some(target) = &self.target else { continue };
            if !std::mem::replace(&mut self.asked_for_warmth, true) {
                warm(target).await;
            }
            match protocol::lease_chunk(target, self.crew.run, self.id).await {
                Err(error) if error.policy() == Policy::Retry => {
                    let Some(pause) = pauses.next() else { return Err(error) };
                    tracing::warn!("{error}; connecting anew");
                    // The lease may have been granted and its answer lost: it runs out, too, when the session is replaced.
                    self.target = None;
                    tokio::time::sleep(pause).await;
                }
                result => return result,
            }
        }
    }

    /// Reads and writes one chunk.
    async fn chunk(&mut self, lease: &Lease) -> Result<()> {
        let crew = self.crew.clone();
        let table = crew.tables.get(&lease.table_id).ok_or_else(|| {
            Error::new(
                Side::Target,
                Kind::Refused,
                format!("table {} of the run has no remote source", lease.table_id),
            )
            .hint("CALL dedup.migrate_run(run) does the tables that the target database sees itself")
        })?;
        if self.source.as_ref().is_none_or(Session::is_closed) {
            self.source = Some(crew.source.connect_patiently(Role::Reader).await?);
        }
        let (Some(source), Some(target)) = (&self.source, &self.target) else {
            return Err(Error::here(Kind::Connection, "a connection is gone"));
        };
        tracing::debug!("chunk {} of {}: attempt {}", lease.chunk_id, table.source, lease.attempt);
        let turn = take_turn(&self.turns.reading).await?;
        let read = read::read_chunk(
            source,
            table,
            &lease.range,
            lease.snapshot.as_deref().map_or(read::Extent::All, read::Extent::AllUnder),
            &crew.counters,
            self.spent.take(),
        )
        .await?;
        drop(turn);
        failpoint::reach(Failpoint::Read).await;
        let waiting = Instant::now();
        let turn = take_turn(&self.turns.writing).await?;
        let deferred_at = lock(&crew.deferred).get(&lease.chunk_id).copied();
        let context = ChunkContext {
            target,
            run: crew.run,
            table,
            lease,
            error_budget: crew.error_budget,
            deferred_at,
            waited: waiting.elapsed(),
            may_retry: lease.attempt < crew.max_attempts,
            throttle: &crew.counters.throttle,
        };
        let books = chunk::write_chunk(&context, &read).await;
        if let Ok(books) = &books {
            crew.counters.committed(read.bytes, books);
        }
        drop(turn);
        drop(read.in_flight);
        self.spent = Some(read.batch);
        let books = books?;
        tracing::debug!("chunk {}: {:?}", lease.chunk_id, books.counts);
        let quarantined = books.counts[5];
        if quarantined > 0 {
            tracing::warn!(
                "chunk {} of {}: {quarantined} records are in quarantine",
                lease.chunk_id,
                table.source
            );
        }
        // The chunk is verified whatever becomes of this; another worker will find the level still full.
        if let Err(error) = protocol::compact_step(target, crew.run, lease.table_id).await {
            tracing::warn!("compaction after chunk {}: {error}", lease.chunk_id);
        }
        Ok(())
    }

    /// Rolls back, and says what is to become of the chunk. An error ends the worker.
    async fn give_back(&mut self, lease: &Lease, error: Error) -> Result<()> {
        let policy = error.policy();
        let source_is_spent =
            error.kind == Kind::Interrupted || (error.side == Side::Source && policy == Policy::Retry);
        if source_is_spent && let Some(source) = self.source.take() {
            source.cancel().await;
        }
        if error.kind == Kind::Interrupted
            && let Some(target) = self.target.take()
        {
            target.cancel().await;
        }
        if !self.rolled_back().await {
            self.target = None;
        }
        if policy == Policy::RetryAfterOthers {
            self.remember_deferral(lease).await;
        }
        match self.report(lease, &error, policy).await {
            Ok(status) => tell(lease, &error, &status),
            Err(unreported) => {
                // Nobody else will take the chunk while this identity lives.
                tracing::warn!("chunk {}: {error}; could not be given back: {unreported}", lease.chunk_id);
                self.renew_identity();
                if self.crew.stop.finishing() {
                    return Ok(());
                }
            }
        }
        // A run that is repaired is halted, and can't be paused too.
        if policy == Policy::PauseRun && self.crew.repairs {
            self.crew.no_room.store(true, Ordering::Relaxed);
            self.crew.news.notify_waiters();
            return Err(error.hint("make room, then repair the run again"));
        }
        if policy == Policy::Retry && error.kind != Kind::Interrupted {
            let attempt = usize::try_from(lease.attempt.max(1) - 1).unwrap_or(0);
            let pause = pauses().nth(attempt).unwrap_or(LONGEST_PAUSE);
            self.rest(pause).await;
        }
        Ok(())
    }

    /// Goes on with another session. If the server crashed, it has forgotten chunks that it said were committed: their leases are this
    /// worker's again, who believes them done. They run out with the identity.
    fn writes_by(&mut self, session: Session) {
        self.target = Some(session);
        self.asked_for_warmth = false;
        self.renew_identity();
    }

    /// Lets leases that this worker knows nothing of run out with the identity they were granted to.
    fn renew_identity(&mut self) {
        self.identities.leave(self.id);
        self.id = self.identities.take();
    }

    async fn rolled_back(&self) -> bool {
        match &self.target {
            Some(target) => target.client.batch_execute("ROLLBACK").await.is_ok(),
            None => false,
        }
    }

    async fn remember_deferral(&self, lease: &Lease) {
        let Some(target) = &self.target else { return };
        if let Ok((verified, _)) = protocol::others(target, self.crew.run, &lease.chunk_id).await {
            lock(&self.crew.deferred).insert(lease.chunk_id.clone(), verified);
        }
    }

    async fn report(&mut self, lease: &Lease, error: &Error, policy: Policy) -> Result<String> {
        if self.target.is_none() {
            let connected = if self.crew.stop.finishing() {
                self.crew.target.connect(Role::Writer).await?
            } else {
                self.crew.target.connect_patiently(Role::Writer).await?
            };
            self.writes_by(connected);
        }
        let Some(target) = &self.target else {
            return Err(Error::here(Kind::Connection, "a connection is gone"));
        };
        // First why, then the pause: whoever is killed in between leaves a run that the next full disk pauses.
        let status = protocol::fail_chunk(target, self.crew.run, lease, error).await;
        if policy == Policy::PauseRun && !self.crew.repairs {
            // Somebody else may have paused it already, or ended it.
            match protocol::pause_run(target, self.crew.run).await {
                Ok(_) => tracing::error!("the run is paused: {error}"),
                Err(refused) => tracing::warn!("the run can't be paused: {refused}"),
            }
        }
        status
    }
}

/// Sees to a cold filter: after a restart of the server, the first session that comes reads the hash index into it. The others go on meanwhile
/// and look every content up, as this one does if it can't be helped.
async fn warm(target: &Session) {
    match protocol::warm_filter(target).await {
        Ok(0) => {}
        Ok(entries) => tracing::info!("the filter was cold: {entries} entries were read into it"),
        Err(error) => tracing::warn!("the filter stays cold, which is slower: {error}"),
    }
}

/// Waits until one more may read, or write.
pub async fn take_turn(turns: &Semaphore) -> Result<SemaphorePermit<'_>> {
    turns.acquire().await.map_err(|_| Error::here(Kind::Interrupted, "interrupted"))
}

/// One line about a chunk that did not end well, here where the error is handled.
fn tell(lease: &Lease, error: &Error, status: &str) {
    let chunk = &lease.chunk_id;
    match status {
        "failed" => tracing::error!("chunk {chunk} failed: {error} (SQLSTATE {})", error.state()),
        "fenced" => tracing::info!("chunk {chunk} is no longer ours: {error}"),
        _ if error.kind == Kind::ForeignKeyLater => tracing::info!("chunk {chunk}: {error}"),
        _ => tracing::warn!("chunk {chunk}, attempt {}: {error}; it will be tried again", lease.attempt),
    }
}

/// Leases asked for in vain, each on a new connection, before a worker gives up: half a minute or so.
const LEASE_TRIES: usize = 30;

const SHORTEST_PAUSE: Duration = Duration::from_millis(200);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// Pauses from 0.2 s to 1 s with jitter; the server has its own, longer ones for each chunk (`not_before`).
fn pauses() -> impl Iterator<Item = Duration> + Send {
    ExponentialBuilder::default()
        .with_min_delay(SHORTEST_PAUSE)
        .with_max_delay(LONGEST_PAUSE)
        .with_max_times(usize::MAX)
        .with_jitter()
        .build()
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}
