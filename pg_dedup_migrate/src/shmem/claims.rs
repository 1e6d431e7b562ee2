//! Claims of this backend, and of others: content hashes of transactions still in flight.
//!
//! Why claims make every record be written once, and why sweeps don't deadlock, is argued in
//! `pg_dedup_shared` and its module `claims`. What the server adds:
//!
//! - **The owner is known by transaction id**: that of the subtransaction that claims. It is assigned
//!   (`GetCurrentTransactionId`) before any lock is taken; with it goes the lock on the id that others wait for.
//! - **Ours** is a claim whose owner satisfies `TransactionIdIsCurrentTransactionId`. A subtransaction that
//!   commits becomes a child of its parent, so its id goes on to satisfy that until the parent aborts or ends.
//!   One that aborts has dropped its claims before its parent goes on.
//! - **Waiting** is `XactLockTableWait`: an ordinary wait in the lock manager, cancellable, and part of
//!   deadlock detection. If the owner is a subtransaction that has committed meanwhile, its id is still in
//!   progress; the server then looks its parent up in `pg_subtrans` and waits for that. So a slot
//!   keeps the id it was made with, whoever the claim is handed to.
//! - **Errors**: everything that can fail (memory, ids, order) comes before the first lock. The book is private
//!   memory that names every claim from the moment it is made, so an abort releases what was claimed.
use std::cell::{Cell, RefCell};

use pg_dedup_shared::Key;
use pg_dedup_shared::book::Book;
pub use pg_dedup_shared::claims::Claim;
use pg_dedup_shared::claims::{self, PARTITIONS, Refused, Run};
use pg_dedup_shared::partition::{Slot, capacity};
use pgrx::PgSqlErrorCode;
use pgrx::pg_sys;

use super::prefetch::Cpu;
use super::{Scope, attached, attached_if_preloaded};
use crate::error::{Error, Result};

thread_local! {
    /// The claims of the current transaction. No borrow outlives a call into this module, none is held
    /// while the server could call back.
    static BOOK: RefCell<Book> = const { RefCell::new(Book::new()) };
}

/// Size and load of the claims table.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ClaimsStats {
    /// Bytes of memory.
    pub bytes: u64,
    /// Slots of 16 bytes.
    pub slots: u64,
    /// Slots in use.
    pub used: u64,
    /// Partitions, each with a lock.
    pub partitions: u64,
    /// Load of the fullest partition, 0 to 1; at 7/8 it is full.
    pub max_partition_load: f64,
}

/// Claims content hashes in one sweep over the whole table, and says of each in `out` (cleared before) what came of it.
///
/// The digests come in ascending order. [`Claim::Held`] names a transaction that was in flight when we looked:
/// the hash is pending. [`Claim::AlreadyOurs`] is counted, and wants a release of its own. Neither it nor `Held`
/// says for certain that the very same hash is meant: look it up.
///
/// Errors: 53400 if the table or a partition of it is full; then nothing of this sweep stays claimed.
pub fn sweep<'d>(
    scope: Scope,
    digests: impl ExactSizeIterator<Item = &'d [u8; 32]>,
    out: &mut Vec<Claim>,
) -> Result<()> {
    let shared = attached()?;
    let keys = sorted_keys(scope, digests)?;
    out.clear();
    out.try_reserve(keys.len()).map_err(|_| out_of_memory())?;
    out.resize(keys.len(), Claim::default());
    // SAFETY: we are in a transaction; raises an error where none may be written in (recovery, parallel mode).
    let (xid, level) = unsafe { (pg_sys::GetCurrentTransactionId(), pg_sys::GetCurrentSubTransactionId()) };
    let own = OwnTransactions::new(xid.into_inner());
    BOOK.with_borrow_mut(|book| {
        book.reserve().map_err(|_| out_of_memory())?;
        let run = Run::new(keys).ok_or_else(unsorted)?;
        book.sweep(shared, &Cpu, level, run, xid.into_inner(), |other| own.contains(other), out)
            .map_err(|reason| refused(reason, shared.slots_a_partition() * PARTITIONS))
    })
}

/// Releases one count of each content hash, ascending. An internal error, and nothing released, if one
/// is not claimed. Not undone by a rollback to a savepoint: release only what the same step claimed.
pub fn release<'d>(scope: Scope, digests: impl ExactSizeIterator<Item = &'d [u8; 32]>) -> Result<()> {
    let shared = attached()?;
    let keys = sorted_keys(scope, digests)?;
    BOOK.with_borrow_mut(|book| book.release(shared, &Cpu, &keys)).map_err(|_| {
        Error::new(PgSqlErrorCode::ERRCODE_INTERNAL_ERROR, "content hash to be released is not claimed")
    })
}

/// Checks that this transaction has claimed every one of these content hashes, ascending; 55000 if not.
pub fn verify_ours<'d>(scope: Scope, digests: impl ExactSizeIterator<Item = &'d [u8; 32]>) -> Result<()> {
    let shared = attached()?;
    let keys = sorted_keys(scope, digests)?;
    // SAFETY: asks only.
    let xid = unsafe { pg_sys::GetCurrentTransactionIdIfAny() };
    let own = OwnTransactions::new(xid.into_inner());
    let mut missing = 0usize;
    claims::owners(shared, &keys, |_, owner| {
        missing += usize::from(!owner.is_some_and(|xid| own.contains(xid)))
    });
    if missing > 0 {
        return Err(Error::state("content hashes are not claimed by this transaction")
            .detail(format!("{missing} of {} content hashes are affected.", keys.len()))
            .hint("Claim content hashes in the transaction that writes them, before the rows are written."));
    }
    Ok(())
}

/// How many claims this transaction holds, counts included.
pub fn held() -> usize {
    BOOK.with_borrow(Book::held)
}

/// Waits until a transaction that held a claim has ended, and its claims are dropped. Returns at once if
/// it is one of ours: a transaction never waits for itself.
pub fn wait_for(xid: u32) {
    let xid = pg_sys::TransactionId::from(xid);
    // SAFETY: no lightweight lock is held; no relation or tuple is named, so nothing is dereferenced. May be
    // cancelled, or end as a deadlock, by an error.
    unsafe {
        if xid != pg_sys::InvalidTransactionId && !pg_sys::TransactionIdIsCurrentTransactionId(xid) {
            let (relation, tuple) = (std::ptr::null_mut(), std::ptr::null_mut());
            pg_sys::XactLockTableWait(xid, relation, tuple, pg_sys::XLTW_Oper::XLTW_None);
        }
    }
}

/// Size and load.
pub fn stats() -> Result<ClaimsStats> {
    let shared = attached()?;
    let slots_a_partition = shared.slots_a_partition();
    let slots = (slots_a_partition * PARTITIONS) as u64;
    let fullest = shared.slots_used().max().unwrap_or(0);
    Ok(ClaimsStats {
        bytes: slots * size_of::<Slot>() as u64,
        slots,
        used: shared.slots_used().map(u64::from).sum(),
        partitions: PARTITIONS as u64,
        max_partition_load: f64::from(fullest) / slots_a_partition as f64,
    })
}

/// The transaction has ended. Called where an error would be fatal: does nothing rather than fail.
pub(super) fn transaction_ended() {
    with_book(|book, shared| book.end(shared, &Cpu));
}

/// A subtransaction has committed. Never fails.
pub(super) fn subtransaction_committed(level: pg_sys::SubTransactionId, parent: pg_sys::SubTransactionId) {
    with_book(|book, _| book.hand_over(level, parent));
}

/// A subtransaction has aborted. Never fails.
pub(super) fn subtransaction_aborted(level: pg_sys::SubTransactionId) {
    with_book(|book, shared| book.abort(shared, &Cpu, level));
}

/// The book, for callbacks: without a panic where it is gone (the process exits) or there is no memory.
fn with_book(act: impl FnOnce(&mut Book, &super::Shared)) {
    let Some(shared) = attached_if_preloaded() else { return };
    // The result says whether there was a book to act on; if not, there was nothing in it either.
    let _ = BOOK.try_with(|book| {
        if let Ok(mut book) = book.try_borrow_mut() {
            act(&mut book, shared);
        }
    });
}

/// The keys of ascending digests; 22023 if they aren't.
fn sorted_keys<'d>(scope: Scope, digests: impl ExactSizeIterator<Item = &'d [u8; 32]>) -> Result<Vec<Key>> {
    let mut keys = Vec::new();
    keys.try_reserve_exact(digests.len()).map_err(|_| out_of_memory())?;
    keys.extend(digests.map(|digest| scope.key(digest)));
    if !keys.is_sorted_by_key(|key| key.lead) {
        return Err(unsorted());
    }
    Ok(keys)
}

fn unsorted() -> Error {
    Error::invalid("content hashes are not in ascending order")
}

fn out_of_memory() -> Error {
    Error::new(PgSqlErrorCode::ERRCODE_OUT_OF_MEMORY, "out of memory").hint("Run smaller chunks.")
}

fn refused(reason: Refused, slots: usize) -> Error {
    match reason {
        Refused::Full => Error::new(PgSqlErrorCode::ERRCODE_CONFIGURATION_LIMIT_EXCEEDED, "claims table is full")
            .detail(format!(
                "All transactions together can hold claims on at most {} content hashes.",
                capacity(slots)
            ))
            .hint("Raise pg_dedup_migrate.claims_size and restart the server, or run smaller chunks or fewer workers."),
        Refused::TooOften => Error::new(
            PgSqlErrorCode::ERRCODE_PROGRAM_LIMIT_EXCEEDED,
            "content hash is claimed too often in one transaction",
        )
        .hint("Commit between chunks."),
    }
}

/// Which transaction ids are ours, remembering the last answer: foreign owners come in runs.
struct OwnTransactions {
    current: u32,
    last: Cell<(u32, bool)>,
}

impl OwnTransactions {
    fn new(current: u32) -> Self {
        Self { current, last: Cell::new((0, false)) }
    }

    fn contains(&self, xid: u32) -> bool {
        if xid == self.current {
            return true;
        }
        let (last, answer) = self.last.get();
        if xid == last {
            return answer;
        }
        // SAFETY: looks at this process's own memory and raises no error, so it may be asked under a lock.
        let answer = unsafe { pg_sys::TransactionIdIsCurrentTransactionId(xid.into()) };
        self.last.set((xid, answer));
        answer
    }
}
