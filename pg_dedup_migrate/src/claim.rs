//! `claim` and `resolve`: the right to write a content digest.
//!
//! # Why no record is lost and none is written twice
//!
//! For every digest a chunk wants to write:
//!
//! 1. **Probe**, claiming nothing. Not in the filter: a candidate. Else looked up exactly: found means *duplicate*. A popular value
//!    already in the target is never claimed, so it holds nobody up.
//! 2. **Claim** the candidates in one sweep over the partitions, in order, hand over hand. Held by a live transaction: *pending*. Else ours.
//! 3. **Recheck** what is ours: set its filter bits; where all were set before, look it up again with a snapshot taken after step 2.
//!    Found means *duplicate* and the claim is given back, else *new*.
//!
//! Take any other transaction that wrote the same digest. If it has committed and dropped its claim before our step 2, then its filter bits
//! were set before (its own step 3 came before its commit), so step 3 sees them set, and our snapshot, taken later than its commit, sees its
//! segment. If it is still in flight, or committed but has not dropped its claim yet, step 2 meets the claim. If it aborted, it wrote nothing.
//! A claim is dropped only after its transaction has left the proc array: whoever no longer meets the claim has a snapshot that sees the rows.
//!
//! A filter that is cold (just started, or entries came in past us) answers nothing: every digest is then looked up exactly, in
//! both steps. A false positive costs a look-up, never a record.
//!
//! Two sweeps never overtake each other (hand over hand through all partitions, empty ones too), so of two transactions only the later one can
//! be pending on the earlier: no cycle. A second sweep in one transaction (`resolve` after an abort, retractions, several chunks in one
//! transaction) can break that order; those waits are ordinary lock manager waits, so a cycle is detected as 40P01 and the chunk retried.
use crate::chunk::{self, OpenChunk};
use crate::error::{Error, Result};
use crate::lookup::{self, Digests};
use crate::relation::Snapshot;
use crate::repair;
use crate::shmem::claims::{self, Claim};
use crate::shmem::{Scope, filter};

/// What a chunk may do with a digest. The numbers are what `dedup.claim` answers, one byte a digest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Verdict {
    /// Nobody has it: ours to write.
    New = 0,
    /// It stands in the target.
    Duplicate = 1,
    /// A live transaction may be writing it: ask `resolve`.
    Pending = 2,
}

/// `bytes` as sorted distinct digests.
///
/// # Errors
/// 22023 when the length is no multiple of 32 or the order is not strictly ascending.
pub fn digests_of(bytes: &[u8]) -> Result<Digests<'_>> {
    let (digests, rest) = bytes.as_chunks::<32>();
    if !rest.is_empty() {
        return Err(Error::invalid("digests must be 32 bytes each")
            .detail(format!("{} bytes are left over.", rest.len())));
    }
    if !digests.is_sorted_by(|a, b| a < b) {
        return Err(Error::invalid("digests must be sorted and distinct"));
    }
    Ok(digests)
}

/// Steps 1 to 3 for the digests of a chunk; also claims what the chunk's upserts are about to retract.
///
/// # Errors
/// 53400 when the claims table is full, 55000 when the library is not preloaded, 40P01 where a retraction's wait closes a cycle.
pub fn claim(chunk: &mut OpenChunk, digests: Digests<'_>) -> Result<Vec<Verdict>> {
    repair::unbelieve(chunk, digests)?;
    let chunk = &*chunk;
    let scope = chunk.scope();
    let mut verdicts = vec![Verdict::New; digests.len()];
    // 1. Probe.
    let suspects: Vec<u32> = if chunk::filter_is_warm()? {
        let mut perhaps = Vec::new();
        filter::probe_sorted(scope, digests.iter(), &mut perhaps)?;
        (0..digests.len() as u32).filter(|&i| perhaps[i as usize]).collect()
    } else {
        all(digests)
    };
    let found = lookup::present(chunk.target_id, digests, &suspects, chunk.leaving(), &Snapshot::latest())?;
    let candidates: Vec<u32> = (0..digests.len() as u32).filter(|&i| !found[i as usize]).collect();
    for (verdict, _) in verdicts.iter_mut().zip(&found).filter(|(_, found)| **found) {
        *verdict = Verdict::Duplicate;
    }

    // 2. Claim, retractions in the same sweep.
    let (sweep, origin) = with_retractions(digests, &candidates, &chunk.leaving);
    let mut outcome = Vec::new();
    claims::sweep(scope, sweep.iter(), &mut outcome)?;
    let mut ours = Vec::with_capacity(candidates.len());
    let mut blocked: Vec<([u8; 32], u32)> = Vec::new();
    for ((digest, origin), outcome) in sweep.iter().zip(&origin).zip(&outcome) {
        match (outcome, origin.candidate) {
            (Claim::Ours | Claim::AlreadyOurs, Some(i)) => ours.push(i),
            (Claim::Held(_), Some(i)) => verdicts[i as usize] = Verdict::Pending,
            _ => {}
        }
        if let (Claim::Held(owner), true) = (outcome, origin.retraction) {
            blocked.push((*digest, *owner));
        }
    }

    // 3. Recheck.
    for i in recheck(chunk, digests, &ours, Trust::Filter)? {
        verdicts[i as usize] = Verdict::Duplicate;
    }
    claim_blocked_retractions(scope, blocked)?;
    Ok(verdicts)
}

/// What may spare a digest the second look-up.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Trust {
    /// A warm filter's "absent".
    Filter,
    /// Nothing: every digest is looked up.
    Nothing,
}

/// Sets the filter bits of what is ours and looks up what had them set; gives claims of present digests back and returns those digests.
fn recheck(chunk: &OpenChunk, digests: Digests<'_>, ours: &[u32], trust: Trust) -> Result<Vec<u32>> {
    let scope = chunk.scope();
    // Asked after the sweep: entries that came in past us since the probe have marked the filter cold.
    let believed = trust == Trust::Filter && chunk::filter_is_warm()?;
    let mut seen = Vec::new();
    filter::set_sorted(scope, ours.iter().map(|&i| &digests[i as usize]), &mut seen)?;
    let suspects: Vec<u32> =
        ours.iter().zip(seen).filter(|(_, seen)| *seen || !believed).map(|(&i, _)| i).collect();
    let found = lookup::present(chunk.target_id, digests, &suspects, chunk.leaving(), &Snapshot::latest())?;
    let present: Vec<u32> = suspects.into_iter().filter(|&i| found[i as usize]).collect();
    let given_back: Vec<[u8; 32]> = present
        .iter()
        .map(|&i| digests[i as usize])
        // A digest this chunk retracts stays claimed even where another row keeps it present.
        .filter(|digest| chunk.leaving.binary_search_by(|(d, _)| d.cmp(digest)).is_err())
        .collect();
    claims::release(scope, given_back.iter())?;
    Ok(present)
}

/// A retraction must hold its digest too, or somebody could be told *duplicate* in favour of a row that is about to go.
fn claim_blocked_retractions(scope: Scope, mut blocked: Vec<([u8; 32], u32)>) -> Result<()> {
    while let Some(&(_, owner)) = blocked.first() {
        claims::wait_for(owner);
        let digests: Vec<[u8; 32]> = blocked.iter().map(|(d, _)| *d).collect();
        let mut outcome = Vec::new();
        claims::sweep(scope, digests.iter(), &mut outcome)?;
        blocked = digests
            .into_iter()
            .zip(outcome)
            .filter_map(|(digest, outcome)| match outcome {
                Claim::Held(owner) => Some((digest, owner)),
                Claim::Ours | Claim::AlreadyOurs => None,
            })
            .collect();
    }
    Ok(())
}

/// Decides digests that `claim` called pending: waits for their owners, one after the other, and claims what an aborted owner left.
///
/// # Errors
/// As [`claim`]; 40P01 where the wait closes a cycle.
pub fn resolve(chunk: &OpenChunk, digests: Digests<'_>) -> Result<Vec<Verdict>> {
    let scope = chunk.scope();
    let mut verdicts = vec![Verdict::Pending; digests.len()];
    let mut open = all(digests);
    while !open.is_empty() {
        pgrx::check_for_interrupts!();
        let found = lookup::present(chunk.target_id, digests, &open, chunk.leaving(), &Snapshot::latest())?;
        open.retain(|&i| {
            let present = found[i as usize];
            if present {
                verdicts[i as usize] = Verdict::Duplicate;
            }
            !present
        });
        let left: Vec<[u8; 32]> = open.iter().map(|&i| digests[i as usize]).collect();
        let mut outcome = Vec::new();
        claims::sweep(scope, left.iter(), &mut outcome)?;
        let mut owner = None;
        let mut ours = Vec::new();
        open = open
            .into_iter()
            .zip(outcome)
            .filter_map(|(i, outcome)| match outcome {
                Claim::Ours | Claim::AlreadyOurs => {
                    ours.push(i);
                    None
                }
                Claim::Held(xid) => {
                    owner.get_or_insert(xid);
                    Some(i)
                }
            })
            .collect();
        for &i in &ours {
            verdicts[i as usize] = Verdict::New;
        }
        // Between the look-up and the sweep an owner may have committed: the snapshot after the sweep decides. Every digest is looked up,
        // whatever the filter says: pending ones are few.
        for i in recheck(chunk, digests, &ours, Trust::Nothing)? {
            verdicts[i as usize] = Verdict::Duplicate;
        }
        if let Some(owner) = owner {
            claims::wait_for(owner);
        }
    }
    Ok(verdicts)
}

fn all(digests: Digests<'_>) -> Vec<u32> {
    (0..digests.len() as u32).collect()
}

/// Why a digest is in the sweep: index of the candidate, and whether the chunk retracts it.
struct Origin {
    candidate: Option<u32>,
    retraction: bool,
}

/// The candidates and the digests to be retracted, merged in order without repetition.
fn with_retractions(
    digests: Digests<'_>,
    candidates: &[u32],
    leaving: &[([u8; 32], Vec<u8>)],
) -> (Vec<[u8; 32]>, Vec<Origin>) {
    let mut sweep = Vec::with_capacity(candidates.len() + leaving.len());
    let mut origin = Vec::with_capacity(sweep.capacity());
    let mut leaving = leaving.iter().map(|(digest, _)| digest).peekable();
    let mut push = |digest: &[u8; 32], candidate, retraction| {
        sweep.push(*digest);
        origin.push(Origin { candidate, retraction });
    };
    for &i in candidates {
        let digest = &digests[i as usize];
        while let Some(retracted) = leaving.next_if(|d| *d < digest) {
            while leaving.next_if_eq(&retracted).is_some() {}
            push(retracted, None, true);
        }
        let mut retraction = false;
        while leaving.next_if_eq(&digest).is_some() {
            retraction = true;
        }
        push(digest, Some(i), retraction);
    }
    while let Some(retracted) = leaving.next() {
        while leaving.next_if_eq(&retracted).is_some() {}
        push(retracted, None, true);
    }
    (sweep, origin)
}
