//! The steps in which a chunk's records reach the target, and what is tried after a refusal: one order for a worker at the other end of
//! a connection and for `migrate_chunk` inside the server. [`Fold`] decides, [`Target`] acts, this drives.
//!
//! ```text
//! match keys ─▶ claim ─▶ [ resolve ─▶ replace rows ─▶ remove superseded ones ]
//!      ─▶ insert ─▶ resolve ─▶ insert and replace what is left, as long as that helps ─▶ remove superseded rows
//! ```
//!
//! The part in brackets only where rows stand that are to be replaced: what becomes of them decides whether their old contents may be
//! written elsewhere. Otherwise new rows are written before anybody is waited for.
//!
//! A row that could not be replaced or removed keeps its content. Records with that content are duplicates of it, and one that was written
//! before the refusal was known is taken back: contents may move from key to key in a chunk, in circles too, and any of them may be refused.
use std::future::Future;

use crate::fold::{Fold, FoldError, KeysToMatch, Refused, Way};
use crate::refusal::{Refusal, RefusedAttempt};
use crate::write_plan::WritePlan;

/// SQLSTATE of a foreign key that is not satisfied.
const FOREIGN_KEY_VIOLATION: &str = "23503";
/// SQLSTATE of a value that stands already.
const UNIQUE_VIOLATION: &str = "23505";

/// What can be asked of the target of a chunk, inside its transaction. Arguments and answers are packed as the worker protocol has them.
///
/// An attempt stands under a savepoint of its own: refused, it leaves nothing behind.
pub trait Target {
    /// Why a chunk's attempt ends.
    type Error: From<FoldError>;

    /// What stands under each key.
    fn match_keys(&mut self, ask: &KeysToMatch) -> impl Future<Output = Result<Vec<u8>, Self::Error>>;

    /// Which digests are ours to write.
    fn claim(&mut self, digests: &[u8]) -> impl Future<Output = Result<Vec<u8>, Self::Error>>;

    /// Waits for the owners of pending digests, of which there may be none.
    fn resolve(&mut self, digests: &[u8]) -> impl Future<Output = Result<Vec<u8>, Self::Error>>;

    /// Attempts to write these records; `None`: they are written.
    fn write(
        &mut self,
        rows: &[u32],
        way: Way,
    ) -> impl Future<Output = Result<Option<RefusedAttempt>, Self::Error>>;

    /// Attempts to remove the rows with these keys, whose contents stand elsewhere.
    fn remove(&mut self, keys: &[u8]) -> impl Future<Output = Result<Option<RefusedAttempt>, Self::Error>>;

    /// The rows with these keys stay as they are; answers the digests of their contents.
    fn keep(&mut self, keys: &[u8]) -> impl Future<Output = Result<Vec<u8>, Self::Error>>;

    /// Removes rows with these keys that this chunk wrote itself.
    fn take_back(&mut self, keys: &[u8]) -> impl Future<Output = Result<(), Self::Error>>;

    /// A record alone has a unique value that stands already, and not by another record of the chunk with its key. An error ends the
    /// chunk's attempt, else the record is refused.
    fn unique_violated(&mut self, refused: &RefusedAttempt) -> impl Future<Output = Result<(), Self::Error>>;

    /// More records were refused than a chunk may have.
    fn over_budget(&self) -> Self::Error;
}

/// Delivers the records of a chunk: afterwards each is written, stands already, is a duplicate or refused.
///
/// `occupied`: rows with keys of the chunk may stand in the target. `error_budget`: records that may be refused.
///
/// # Errors
/// What the target ends the attempt with, and [`FoldError`] where it answers something else than was asked.
pub async fn deliver<T: Target>(
    fold: &mut Fold<'_>,
    target: &mut T,
    occupied: bool,
    error_budget: u64,
) -> Result<(), T::Error> {
    let mut delivery = Delivery { fold, target, error_budget, parked: Vec::new() };
    delivery.check_budget()?;
    if occupied {
        delivery.match_keys().await?;
    }
    delivery.claim().await?;
    if delivery.fold.replaces() {
        delivery.resolve().await?;
        delivery.write(Way::Upsert).await?;
        delivery.remove_superseded().await?;
    }
    delivery.write(Way::Insert).await?;
    delivery.resolve().await?;
    delivery.write_the_rest().await?;
    delivery.fold.settle()?;
    delivery.check_budget()
}

struct Delivery<'d, 'b, T> {
    fold: &'d mut Fold<'b>,
    target: &'d mut T,
    error_budget: u64,
    /// Refused for a foreign key; tried again when everything else of the chunk is written.
    parked: Vec<Refused>,
}

impl<T: Target> Delivery<'_, '_, T> {
    async fn match_keys(&mut self) -> Result<(), T::Error> {
        let ask = self.fold.keys_to_match()?;
        let verdicts = self.target.match_keys(&ask).await?;
        self.fold.matched(&ask, &verdicts)?;
        self.check_budget()
    }

    async fn claim(&mut self) -> Result<(), T::Error> {
        let digests = self.fold.digests_to_claim();
        let verdicts = self.target.claim(&digests).await?;
        Ok(self.fold.claimed(&verdicts)?)
    }

    /// Waits for those who may be writing contents of this chunk.
    async fn resolve(&mut self) -> Result<(), T::Error> {
        let pending = self.fold.digests_to_resolve();
        let verdicts = self.target.resolve(&pending).await?;
        Ok(self.fold.resolved(&verdicts)?)
    }

    /// Removes the rows of superseded records, and hears which rows stay as they are, until neither changes anything.
    async fn remove_superseded(&mut self) -> Result<(), T::Error> {
        loop {
            let superseded = self.fold.superseded();
            self.remove(&superseded).await?;
            let kept = self.fold.refused_replacements()?;
            if kept.is_empty() {
                return Ok(());
            }
            let contents = self.target.keep(&kept).await?;
            let in_vain = self.fold.stay(&contents);
            if !in_vain.is_empty() {
                let keys = self.fold.packed_keys(&in_vain)?;
                self.target.take_back(&keys).await?;
            }
        }
    }

    /// Writes in one way until every content has a row, or no record that can be written in this way. Answers how many were written.
    async fn write(&mut self, way: Way) -> Result<usize, T::Error> {
        let mut written = 0;
        loop {
            let rows = self.fold.next_to_write(way);
            if rows.is_empty() {
                return Ok(written);
            }
            written += self.attempt(&rows, way).await?;
        }
    }

    /// Writes in both ways until nobody is left who can be written. Rows that point at rows of their own chunk are tried again as long as
    /// others were written meanwhile; then their foreign keys are violated.
    async fn write_the_rest(&mut self) -> Result<(), T::Error> {
        loop {
            for parked in std::mem::take(&mut self.parked) {
                self.fold.unpark(parked.row);
            }
            let written = self.write(Way::Insert).await? + self.write(Way::Upsert).await?;
            let parked = !self.parked.is_empty();
            if written == 0 {
                for Refused { row, refusal } in std::mem::take(&mut self.parked) {
                    self.fold.refuse(row, refusal);
                }
            }
            self.remove_superseded().await?;
            if !parked {
                return Ok(());
            }
        }
    }

    /// One pass over rows; answers how many were written.
    async fn attempt(&mut self, rows: &[u32], way: Way) -> Result<usize, T::Error> {
        let mut plan = WritePlan::new(rows.len());
        let mut written = 0;
        while let Some(positions) = plan.next() {
            let some = &rows[positions];
            let Some(refused) = self.target.write(some, way).await? else {
                for &row in some {
                    self.fold.written(row, way);
                }
                written += some.len();
                plan.accepted();
                continue;
            };
            if let Some(position) = plan.refused(refused.line) {
                self.refused(rows[position], refused).await?;
            }
        }
        Ok(written)
    }

    /// A record was refused alone.
    async fn refused(&mut self, row: u32, refused: RefusedAttempt) -> Result<(), T::Error> {
        match refused.refusal.sqlstate.as_str() {
            FOREIGN_KEY_VIOLATION => {
                self.fold.park(row);
                self.parked.push(Refused { row, refusal: refused.refusal });
            }
            UNIQUE_VIOLATION if self.fold.key_is_repeated(row) => {
                self.fold.refuse(row, Refusal::key_collision());
            }
            state => {
                if state == UNIQUE_VIOLATION {
                    self.target.unique_violated(&refused).await?;
                }
                self.fold.refuse(row, refused.refusal);
            }
        }
        self.check_budget()
    }

    /// Removes the rows of superseded records. Where one cannot go (a foreign key points at it), the record is set aside.
    async fn remove(&mut self, superseded: &[u32]) -> Result<(), T::Error> {
        let mut plan = WritePlan::new(superseded.len());
        while let Some(positions) = plan.next() {
            let keys = self.fold.packed_keys(&superseded[positions])?;
            match self.target.remove(&keys).await? {
                None => plan.accepted(),
                Some(refused) => {
                    if let Some(position) = plan.refused(None) {
                        self.fold.keep(superseded[position], refused.refusal);
                    }
                }
            }
        }
        Ok(())
    }

    fn check_budget(&self) -> Result<(), T::Error> {
        let refused = self.fold.refused().len() + self.parked.len();
        if refused as u64 > self.error_budget { Err(self.target.over_budget()) } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests;
