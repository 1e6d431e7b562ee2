//! The claim step of the worker protocol as SQL functions; packed arguments are described in docs/protocol.md.
use pg_dedup_record::wire;
use pgrx::pg_sys::panic::ErrorReport;
use pgrx::prelude::*;
use pgrx::{JsonB, Uuid};

use crate::chunk;
use crate::claim::{self, Verdict};
use crate::error::{Error, Result};
use crate::pace;

/// `dedup.version`: version of the extension's library.
#[pg_extern(immutable, parallel_safe)]
fn version() -> &'static str {
    env!("CARGO_PKG_VERSION")
}

/// `dedup.claim`: one verdict a digest: 0 new, 1 duplicate, 2 pending. Called once a chunk.
///
/// # Errors
/// 22023 for unsorted or truncated digests, 55000 without an open chunk, 53400 when the claims table is full.
#[pg_extern(volatile, parallel_unsafe)]
fn claim(run: Uuid, chunk_id: &str, digests: &[u8]) -> Result<Vec<u8>, ErrorReport> {
    let _pace = pace::of_run(run)?;
    let verdicts = chunk::with_open(run, chunk_id, |chunk| {
        if chunk.claimed {
            return Err(Error::state("the digests of this chunk are claimed already")
                .hint("pending digests go to dedup.resolve"));
        }
        let verdicts = claim::claim(chunk, claim::digests_of(digests)?)?;
        chunk.claimed = true;
        Ok(verdicts)
    })?;
    Ok(packed(&verdicts))
}

/// `dedup.resolve`: waits for the owners of pending digests and decides them: 0 new (now ours), 1 duplicate.
///
/// # Errors
/// As [`claim`]; 40P01 where the wait closes a cycle.
#[pg_extern(volatile, parallel_unsafe)]
fn resolve(run: Uuid, chunk_id: &str, digests: &[u8]) -> Result<Vec<u8>, ErrorReport> {
    let verdicts = chunk::with_open(run, chunk_id, |chunk| -> Result<_> {
        if !chunk.claimed {
            return Err(Error::state("resolve comes after claim"));
        }
        claim::resolve(chunk, claim::digests_of(digests)?)
    })?;
    Ok(packed(&verdicts))
}

/// `dedup.keep_rows`: rows that `match_keys` called changed and whose replacement was refused stay as they are; answers their content digests,
/// sorted, one a key. Records with these contents are duplicates of them.
///
/// # Errors
/// 22023 for keys that `match_keys` did not call changed, 55000 without an open chunk.
#[pg_extern(volatile, parallel_unsafe)]
fn keep_rows(run: Uuid, chunk_id: &str, keys: &[u8]) -> Result<Vec<u8>, ErrorReport> {
    Ok(chunk::with_open(run, chunk_id, |chunk| {
        let keys = wire::keys(keys).collect::<std::result::Result<Vec<_>, _>>();
        let keys = keys.map_err(|e| Error::invalid(format!("malformed keys: {e}")))?;
        Ok(chunk.keep_rows(&keys)?.as_flattened().to_vec())
    })?)
}

/// `dedup.target_layout`: columns in COPY order with their canonical form, and which are content, key and rest.
///
/// # Errors
/// 42703 for an unknown column, 0A000 for a type that cannot be hashed.
#[pg_extern(stable, parallel_safe, strict)]
fn target_layout(
    target: pgrx::PgRelation,
    columns: Vec<String>,
    key_columns: Vec<String>,
    content_columns: Vec<String>,
) -> Result<JsonB, ErrorReport> {
    let layout = crate::hash::layout::target_layout(target.oid(), &columns, &key_columns, &content_columns)?;
    let json =
        serde_json::to_value(layout).map_err(|e| Error::corrupted(format!("unprintable layout: {e}")))?;
    Ok(JsonB(json))
}

fn packed(verdicts: &[Verdict]) -> Vec<u8> {
    verdicts.iter().map(|&v| v as u8).collect()
}
