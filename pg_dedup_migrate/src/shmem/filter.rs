//! The shared filter: was this content hash perhaps written before?
//!
//! Whether its "absent" may be believed says [`super::warmth`]. Its bits are set by every claim (warm or cold)
//! and by every other writer of entries, before it commits; they are never cleared while the server runs.
pub use pg_dedup_shared::filter::FilterStats;

use super::prefetch::Cpu;
use super::{Scope, attached};
use crate::error::Result;

/// Whether this content hash was perhaps set; `false` is certain.
pub fn contains(scope: Scope, digest: &[u8; 32]) -> Result<bool> {
    Ok(attached()?.filter().contains(scope.key(digest)))
}

/// [`contains`] for many, answers appended to `perhaps`. Ascending digests walk memory forwards.
pub fn probe_sorted<'d>(
    scope: Scope,
    digests: impl Iterator<Item = &'d [u8; 32]>,
    perhaps: &mut Vec<bool>,
) -> Result<()> {
    attached()?.filter().probe(digests.map(|digest| scope.key(digest)), &Cpu, perhaps);
    Ok(())
}

/// Sets content hashes; `seen` gets, appended, whether all bits of each were set before. Ascending digests walk memory forwards.
pub fn set_sorted<'d>(
    scope: Scope,
    digests: impl Iterator<Item = &'d [u8; 32]>,
    seen: &mut Vec<bool>,
) -> Result<()> {
    attached()?.filter().insert_all(digests.map(|digest| scope.key(digest)), &Cpu, seen);
    Ok(())
}

/// Size and health.
pub fn stats() -> Result<FilterStats> {
    Ok(attached()?.filter().stats())
}
