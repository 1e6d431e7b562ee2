//! The chunk that this backend has open: what `begin_chunk` found, for the calls that follow in the same transaction.
//!
//! The state lives as long as the (sub)transaction that began the chunk; a callback drops it at the end. Whoever calls `claim` or
//! `finish_chunk` without a `begin_chunk` in the same transaction is refused: locks, claims and checks would be missing. A savepoint that is
//! taken back takes the state back with it to what it was when the savepoint was first worked under, errors included.
use std::cell::RefCell;
use std::collections::{HashMap, HashSet};
use std::rc::Rc;

use pg_dedup_record::fold::Lists;
use pg_dedup_record::layout::Layout;
use pgrx::pg_sys::panic::ErrorReport;
use pgrx::prelude::*;
use pgrx::{
    PgSubXactCallbackEvent, PgXactCallbackEvent, Uuid, pg_sys, register_subxact_callback,
    register_xact_callback,
};

use crate::error::{Error, Result};
use crate::hash::layout::stored_layout;
use crate::keyset::{self, KeyRange, KeyTypes};
use crate::lookup::{Leaving, Subject};
use crate::matching::Standing;
use crate::planning::ByIndex;
use crate::relation;
use crate::repair::{Repair, WithoutRow};
use crate::shmem::{self, Scope, warmth};
use crate::sql::required;

/// One chunk between `begin_chunk` and the end of its transaction.
#[derive(Clone)]
pub struct OpenChunk {
    /// The run.
    pub run: Uuid,
    /// The chunk.
    pub chunk_id: String,
    /// The pair of the run that it belongs to.
    pub table_id: i32,
    /// Number of the target.
    pub target_id: i32,
    /// The target table.
    pub target: pg_sys::Oid,
    /// Pass of the run.
    pub pass: i32,
    /// Columns in COPY order and their roles.
    pub layout: Layout,
    /// How key columns are received, compared and printed.
    pub key_types: KeyTypes,
    /// The key range as a condition on the target's columns; `None` where the order of keys may differ between the sides.
    pub range: Option<KeyRange>,
    /// The transaction's command when the chunk was opened: earlier ones wrote for other chunks.
    pub begun: pg_sys::CommandId,
    /// The ordinal, once drawn.
    pub ordinal: Option<i64>,
    /// (old digest, key) of rows that the chunk's records are about to replace, sorted.
    pub leaving: Rc<Vec<Subject>>,
    /// Keys as they were sent, of rows that store them in other bytes, to the stored ones: 1.0 and 1.00 are one key.
    pub respelled: Rc<HashMap<Vec<u8>, Vec<u8>>>,
    /// Is what it writes read back at the end of the run, not before it commits?
    pub verified_later: bool,
    /// Do other sources of the run go into this target, too?
    pub shares_target: bool,
    /// The rows found unchanged, as [`rested_on`](crate::matching::rested_on) has them, sorted.
    pub unchanged: Rc<Vec<[u8; 16]>>,
    /// Set when the chunk is repaired: the index and the rows of the target are not believed.
    pub repair: Option<Repair>,
    /// Entries that no row bears out, with their ordinals, sorted; they are among `leaving`.
    pub stale: Rc<Vec<(Subject, u64)>>,
    /// In a repair: keys of the rows that stand under keys of its records.
    pub own_rows: Rc<HashSet<Vec<u8>>>,
    /// In a repair: records that had no row when the chunk finished before.
    pub without_row: Rc<WithoutRow>,
    /// Keys of rows that are too many.
    pub extra: Rc<Vec<Vec<u8>>>,
    /// What an earlier finish of this chunk wrote and is still there.
    pub standing: Standing,
    /// Parts of manifest and ledger received so far.
    pub lists: Rc<Lists>,
    /// `claim` was called: it is called once a chunk.
    pub claimed: bool,
    /// `finish_chunk` closed its books: only then may the transaction commit.
    pub finished: bool,
    /// What a call in a subtransaction may have changed is undone with it: this is where the state was changed last.
    changed_in: pg_sys::SubTransactionId,
}

impl OpenChunk {
    /// Whose entries the chunk's digests are compared with.
    pub fn scope(&self) -> Scope {
        scope(self.target_id)
    }

    /// Has the target no key to address rows by?
    pub fn keyless(&self) -> bool {
        self.layout.key.is_empty()
    }

    /// Rows that were to be replaced and are not: they leave `leaving`. Returns the digests of their contents, sorted.
    ///
    /// # Errors
    /// 22023 for a key that is not among those to be replaced.
    pub fn keep_rows<'k>(&mut self, keys: &[&'k [u8]]) -> Result<Vec<[u8; 32]>> {
        let stored = |key: &&'k [u8]| self.respelled.get(*key).map_or(*key, Vec::as_slice);
        let kept: HashSet<&[u8]> = keys.iter().map(stored).collect();
        // What an entry says and no row bears out does not stand, whatever is refused.
        let (stay, leave): (Vec<_>, Vec<_>) = self.leaving.iter().cloned().partition(|place| {
            kept.contains(place.1.as_slice())
                && self.stale.binary_search_by(|(subject, _)| subject.cmp(place)).is_err()
        });
        if stay.len() != kept.len() {
            return Err(Error::invalid("a key to be kept is not among those to be replaced"));
        }
        self.leaving = Rc::new(leave);
        let mut digests: Vec<[u8; 32]> = stay.into_iter().map(|(digest, _)| digest).collect();
        digests.dedup();
        Ok(digests)
    }

    /// Places that don't count as holding their content.
    pub fn leaving(&self) -> Leaving<'_> {
        Leaving { places: &self.leaving, stale: &self.stale }
    }

    /// Takes a part of manifest and ledger.
    pub fn add_lists(&mut self, manifest: &[u8], ledger: &[u8]) {
        let lists = Rc::make_mut(&mut self.lists);
        lists.manifest.extend_from_slice(manifest);
        lists.ledger.extend_from_slice(ledger);
    }

    /// The target's name, quoted and qualified.
    pub fn target_name(&self) -> String {
        keyset::qualified_name(self.target)
    }
}

/// Scope of a target of this database.
pub fn scope(target_id: i32) -> Scope {
    shmem::scope(target_id.cast_unsigned())
}

/// What the warmth of this database's filter is kept under: the database and its `dedup.segment`.
///
/// # Errors
/// 42P01 when the extension is not there.
pub fn warmth_key() -> Result<(pg_sys::Oid, pg_sys::Oid)> {
    // SAFETY: a backend's constant.
    Ok((unsafe { pg_sys::MyDatabaseId }, relation::own_oid("segment")?))
}

/// May the filter's "absent" be believed?
///
/// # Errors
/// 42P01 when the extension is not there.
pub fn filter_is_warm() -> Result<bool> {
    let (database, segment) = warmth_key()?;
    Ok(warmth::is_warm(database, segment))
}

/// Lists larger than this are given back to the system when their chunk has ended.
const SPARE_BYTES: usize = 32 << 20;

thread_local! {
    // A backend has one thread.
    /// The last chunk's lists, for their memory: faulting megabytes in anew costs more than filling them.
    static SPARE: RefCell<Lists> = const { RefCell::new(Lists { manifest: Vec::new(), ledger: Vec::new() }) };
    static OPEN: RefCell<Option<OpenChunk>> = const { RefCell::new(None) };
    /// What `OPEN` was before each live subtransaction first touched it, outermost first.
    static BEFORE: RefCell<Vec<(pg_sys::SubTransactionId, Option<OpenChunk>)>> = const { RefCell::new(Vec::new()) };
}

/// Calls `work` with the open chunk, which must be this one.
///
/// # Errors
/// 55000 without a `begin_chunk` for it in this transaction, or after its `finish_chunk`; what `work` returns.
pub fn with_open<T>(run: Uuid, chunk_id: &str, work: impl FnOnce(&mut OpenChunk) -> Result<T>) -> Result<T> {
    // Taken out while `work` runs: an error leaves it half changed, and only what BEFORE remembers may come back.
    let mut chunk = OPEN
        .with_borrow_mut(|open| open.take_if(|c| c.run == run && c.chunk_id == chunk_id))
        .ok_or_else(|| {
            Error::state(format!("chunk {chunk_id} is not open in this transaction"))
                .hint("call dedup.begin_chunk first")
        })?;
    if chunk.finished {
        OPEN.set(Some(chunk));
        return Err(Error::state(format!("chunk {chunk_id} is finished")).hint("COMMIT, then lease another"));
    }
    let here = subtransaction();
    if here != chunk.changed_in {
        BEFORE.with_borrow_mut(|before| before.push((here, Some(chunk.clone()))));
        chunk.changed_in = here;
    }
    let result = work(&mut chunk);
    if result.is_ok() {
        OPEN.set(Some(chunk));
    }
    result
}

fn subtransaction() -> pg_sys::SubTransactionId {
    // SAFETY: in a transaction, as every SQL function is.
    unsafe { pg_sys::GetCurrentSubTransactionId() }
}

fn unfinished() -> Option<String> {
    OPEN.with_borrow(|open| open.as_ref().filter(|c| c.claimed && !c.finished).map(|c| c.chunk_id.clone()))
}

/// Rows that were claimed and written without a manifest would be nobody's: neither in the index nor in the books.
fn refuse_unfinished() {
    if let Some(chunk) = unfinished() {
        let report: ErrorReport = Error::state(format!("chunk {chunk} was claimed and not finished"))
            .hint("call dedup.finish_chunk before COMMIT, or ROLLBACK")
            .into();
        report.report(pgrx::PgLogLevel::ERROR);
    }
}

/// A prepared transaction would outlive the backend that knows its chunk.
fn refuse_prepare() {
    if OPEN.with_borrow(Option::is_some) {
        let report: ErrorReport =
            Error::unsupported("cannot PREPARE a transaction with an open chunk").into();
        report.report(pgrx::PgLogLevel::ERROR);
    }
}

/// The transaction has ended.
fn forget() {
    BEFORE.with_borrow_mut(Vec::clear);
    if let Some(mut lists) = OPEN.take().and_then(|chunk| Rc::try_unwrap(chunk.lists).ok())
        && lists.manifest.capacity() + lists.ledger.capacity() <= SPARE_BYTES
    {
        lists.manifest.clear();
        lists.ledger.clear();
        SPARE.set(lists);
    }
}

/// A subtransaction was taken back, and with it what was done to the state under it.
fn undo(level: pg_sys::SubTransactionId) {
    BEFORE.with_borrow_mut(|before| {
        while before.last().is_some_and(|(saved_for, _)| *saved_for == level) {
            OPEN.set(before.pop().and_then(|(_, chunk)| chunk));
        }
    });
}

/// A subtransaction became part of its parent: what was before it is kept for the parent, unless something older is.
fn hand_over(level: pg_sys::SubTransactionId, parent: pg_sys::SubTransactionId) {
    BEFORE.with_borrow_mut(|before| {
        if before.last().is_some_and(|(saved_for, _)| *saved_for == level) {
            let older = before.len() > 1 && before[before.len() - 2].0 == parent;
            if older {
                before.pop();
            } else if let Some(last) = before.last_mut() {
                last.0 = parent;
            }
        }
    });
    OPEN.with_borrow_mut(|open| {
        if let Some(chunk) = open.as_mut().filter(|chunk| chunk.changed_in == level) {
            chunk.changed_in = parent;
        }
    });
}

/// Makes `chunk` the open one until its (sub)transaction ends.
fn open(chunk: OpenChunk) {
    let here = chunk.changed_in;
    let first = BEFORE.with_borrow_mut(|before| {
        let first = before.is_empty();
        if before.last().is_none_or(|(level, _)| *level != here) {
            before.push((here, OPEN.take()));
        }
        first
    });
    OPEN.set(Some(chunk));
    if !first {
        return;
    }
    // pgrx drops these registrations itself at the end of the transaction.
    register_xact_callback(PgXactCallbackEvent::PreCommit, refuse_unfinished);
    register_xact_callback(PgXactCallbackEvent::PrePrepare, refuse_prepare);
    register_xact_callback(PgXactCallbackEvent::Commit, forget);
    register_xact_callback(PgXactCallbackEvent::Abort, forget);
    register_subxact_callback(PgSubXactCallbackEvent::AbortSub, |mine, _| undo(mine));
    register_subxact_callback(PgSubXactCallbackEvent::CommitSub, hand_over);
}

/// `dedup.begin_chunk`: locks the checkpoint and the hash index, and checks that the entries still describe the target.
/// Answers whether keys of the chunk may stand in the target already.
///
/// # Errors
/// 55000 for a lease that is not ours or a target that changed; 42704 for an unknown chunk.
#[pg_extern(volatile, parallel_unsafe)]
fn begin_chunk(run: Uuid, chunk_id: &str, lease: Uuid) -> Result<bool, ErrorReport> {
    Ok(begin(run, chunk_id, lease)?)
}

/// The work of [`begin_chunk`].
///
/// # Errors
/// As there.
pub fn begin(run: Uuid, chunk_id: &str, lease: Uuid) -> Result<bool> {
    crate::malloc::keep_freed_memory();
    shmem::attached()?;
    // SAFETY: a backend's own setting.
    if unsafe { pg_sys::XactIsoLevel } != pg_sys::XACT_READ_COMMITTED as i32 {
        return Err(Error::state("a chunk is done in a READ COMMITTED transaction")
            .detail("Under a stricter level rows that others committed meanwhile could be neither seen nor replaced.")
            .hint("SET TRANSACTION ISOLATION LEVEL READ COMMITTED"));
    }
    if let Some(open) = unfinished() {
        return Err(Error::state(format!("chunk {open} is still open")).hint("finish it first, or ROLLBACK"));
    }
    let mut chunk = Spi::connect_mut(|client| -> Result<OpenChunk> {
        let found = client
            .update(
                "SELECT c.status, c.repair, c.lease, c.backend_pid, c.range_kind, c.range_lower, c.range_upper, \
                        r.status AS run_status, r.pass, \
                        t.keyless OR coalesce(r.options OPERATOR(pg_catalog.->>) 'verify' OPERATOR(pg_catalog.=) 'end', false) AS verified_later, \
                        t.table_id, t.target_id, t.layout, t.range_comparable, g.target::pg_catalog.oid AS target, \
                        g.signature OPERATOR(pg_catalog.=) dedup.signature_of(t.layout) AS fits_index, \
                        EXISTS (SELECT FROM dedup.run_tables AS o WHERE o.run_id = t.run_id AND o.target_id = t.target_id \
                                AND o.table_id <> t.table_id) AS shares_target \
                 FROM dedup.checkpoints AS c JOIN dedup.runs AS r USING (run_id) \
                 JOIN dedup.run_tables AS t USING (run_id, table_id) JOIN dedup.targets AS g USING (target_id) \
                 WHERE c.run_id = $1 AND c.chunk_id = $2 FOR UPDATE OF c",
                Some(1),
                &[run.into(), chunk_id.into()],
            )?
            .next()
            .ok_or_else(|| Error::undefined(format!("run {run} has no chunk {chunk_id}")))?;
        let status: String = required(found["status"].value()?)?;
        let held: Option<Uuid> = found["lease"].value()?;
        if status != "syncing" || held != Some(lease) {
            return Err(Error::state(format!("the lease on chunk {chunk_id} is no longer ours"))
                .detail(format!("The chunk is {status}."))
                .hint("lease another chunk: this one was finished or taken over"));
        }
        let pid: Option<i32> = found["backend_pid"].value()?;
        // SAFETY: a backend's constant.
        if pid != Some(unsafe { pg_sys::MyProcPid }) {
            return Err(Error::state(format!("the lease on chunk {chunk_id} belongs to another connection"))
                .hint("call lease_chunk and begin_chunk on the connection that writes the chunk"));
        }
        let run_status: String = required(found["run_status"].value()?)?;
        let repair = Repair::named(found["repair"].value()?)?;
        refuse_unless_open(run, &run_status, repair)?;
        let target: pg_sys::Oid = required(found["target"].value()?)?;
        if !required::<bool>(found["fits_index"].value()?)? {
            return Err(Error::state(format!(
                "the hash index of {} was made for other columns than the run's",
                keyset::qualified_name(target)
            ))
            .hint("dedup.forget_target drops it; cancel the run otherwise"));
        }
        let layout = stored_layout(required(found["layout"].value()?)?)?;
        let layout_is_keyless = layout.key.is_empty();
        let comparable: bool = required(found["range_comparable"].value()?)?;
        let kind: String = required(found["range_kind"].value()?)?;
        let range = (comparable && kind == "key").then_some(KeyRange {
            lower: found["range_lower"].value()?,
            upper: found["range_upper"].value()?,
        });
        Ok(OpenChunk {
            run,
            chunk_id: chunk_id.to_owned(),
            table_id: required(found["table_id"].value()?)?,
            target_id: required(found["target_id"].value()?)?,
            target,
            pass: required(found["pass"].value()?)?,
            key_types: KeyTypes::of(target, &layout)?,
            layout,
            range,
            // SAFETY: a backend's own counter.
            begun: unsafe { pg_sys::GetCurrentCommandId(false) },
            ordinal: None,
            leaving: Rc::default(),
            respelled: Rc::default(),
            // What is repaired is read back at once, where there is a key to find it by.
            verified_later: required(found["verified_later"].value()?)?
                && (repair.is_none() || layout_is_keyless),
            shares_target: required(found["shares_target"].value()?)?,
            unchanged: Rc::default(),
            repair,
            stale: Rc::default(),
            own_rows: Rc::default(),
            without_row: Rc::default(),
            extra: Rc::default(),
            standing: Standing::default(),
            lists: Rc::new(SPARE.take()),
            claimed: false,
            finished: false,
            changed_in: subtransaction(),
        })
    })?;
    chunk.without_row = Rc::new(WithoutRow::of(&chunk)?);
    forget_earlier_finish(&chunk)?;
    lock_index(chunk.target_id, &chunk)?;
    // Whoever ends a run and then waits for the index sees everything that was written for it: nothing is begun after that.
    let (status, leaving) = Spi::get_two_with_args::<String, Uuid>(
        "SELECT r.status, dedup.run_rolling_back($2) FROM dedup.runs AS r WHERE r.run_id = $1",
        &[run.into(), chunk.target_id.into()],
    )?;
    refuse_unless_open(run, &required(status)?, chunk.repair)?;
    if let Some(leaving) = leaving {
        return Err(Error::new(
            PgSqlErrorCode::ERRCODE_LOCK_NOT_AVAILABLE,
            format!("run {leaving} is being rolled back from {}", chunk.target_name()),
        )
        .detail("Nothing is written to a table while rows are taken out of it.")
        .hint(format!(
            "CALL dedup.rollback_run_in_chunks('{leaving}') goes on with a rollback that was cut off"
        )));
    }
    let occupied = is_occupied(&chunk)?;
    open(chunk);
    Ok(occupied)
}

fn refuse_unless_open(run: Uuid, status: &str, repair: Option<Repair>) -> Result<()> {
    if matches!(status, "running" | "paused") || status == "halted" && repair.is_some() {
        return Ok(());
    }
    Err(Error::state(format!("run {run} is {status}")).hint("chunks are done while their run is open"))
}

/// A chunk that is done again lists its duplicates, its unchanged rows and its quarantine anew.
fn forget_earlier_finish(chunk: &OpenChunk) -> Result<()> {
    for statement in [
        "DELETE FROM dedup.ledger_block WHERE ordinal IN (SELECT ordinal FROM dedup.ordinals WHERE run_id = $1 AND chunk_id = $2)",
        "DELETE FROM dedup.unchanged_rows WHERE ordinal IN (SELECT ordinal FROM dedup.ordinals WHERE run_id = $1 AND chunk_id = $2)",
        "DELETE FROM dedup.quarantine WHERE run_id = $1 AND chunk_id = $2",
    ] {
        Spi::run_with_args(statement, &[chunk.run.into(), chunk.chunk_id.as_str().into()])?;
    }
    Ok(())
}

/// The share lock on the hash index, and the check that it still belongs to these rows and columns.
fn lock_index(target_id: i32, chunk: &OpenChunk) -> Result<()> {
    Spi::run_with_args(
        "SELECT pg_catalog.pg_advisory_xact_lock_shared(dedup.lock_class(), $1)",
        &[target_id.into()],
    )?;
    // ONLY: a partitioned table's leaves may be more than the lock table holds; COPY locks those it writes to.
    Spi::run(&format!("LOCK TABLE ONLY {} IN ROW EXCLUSIVE MODE", chunk.target_name()))?;
    Spi::run_with_args("SELECT dedup.check_filenodes($1)", &[target_id.into()])?;
    let names =
        |indexes: &[usize]| indexes.iter().map(|&i| chunk.layout.columns[i].name.clone()).collect::<Vec<_>>();
    let columns: Vec<String> = chunk.layout.columns.iter().map(|c| c.name.clone()).collect();
    let now = crate::hash::layout::target_layout(
        chunk.target,
        &columns,
        &names(&chunk.layout.key),
        &names(&chunk.layout.content),
    )?;
    if now != chunk.layout {
        return Err(Error::state(format!(
            "the columns of {} changed since the run was planned",
            chunk.target_name()
        ))
        .hint(
            "cancel the run, then create it anew; dedup.forget_target drops an index made for other columns",
        ));
    }
    Ok(())
}

/// May rows with keys of this chunk stand in the target?
fn is_occupied(chunk: &OpenChunk) -> Result<bool> {
    if chunk.keyless() {
        return Ok(false);
    }
    let (condition, arguments) = chunk.key_types.range_condition(&chunk.layout, chunk.range.as_ref());
    let _plan = ByIndex::new();
    let query = format!("SELECT EXISTS (SELECT FROM {} AS t WHERE {condition})", chunk.target_name());
    let arguments: Vec<_> = arguments.iter().map(|a| a.as_str().into()).collect();
    required(Spi::get_one_with_args::<bool>(&query, &arguments)?)
}
