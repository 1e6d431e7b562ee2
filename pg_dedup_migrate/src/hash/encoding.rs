//! Text as UTF-8, whatever the encodings of database and client.
//!
//! Send functions convert text to the *client's* encoding. What is hashed must not depend on who asks, so they are
//! called with `client_encoding` switched to UTF-8 for just that long: nothing reaches a client meanwhile, and
//! an ERROR on the way switches it back too.

use crate::error::{Error, Result};
use pgrx::{PgTryBuilder, pg_sys};
use std::panic::AssertUnwindSafe;

const UTF8: i32 = pg_sys::pg_enc::PG_UTF8 as i32;

/// Is the database's own encoding UTF-8?
pub fn database_is_utf8() -> bool {
    // SAFETY: reads a global of the backend.
    unsafe { pg_sys::GetDatabaseEncoding() == UTF8 }
}

/// Runs `work` while send functions produce UTF-8.
///
/// # Errors
/// Those of `work`, and 0A000 if there is no conversion from the database's encoding to UTF-8.
pub fn with_utf8_client<R>(work: impl FnOnce() -> Result<R>) -> Result<R> {
    // SAFETY: reads a global of the backend.
    let before = unsafe { pg_sys::pg_get_client_encoding() };
    if before == UTF8 {
        return work();
    }
    switch_to_utf8()?;
    PgTryBuilder::new(AssertUnwindSafe(work))
        .finally(|| {
            // SAFETY: raises no ERROR and reads no catalog: the conversion of an encoding that has been in
            // effect stays in the backend's list. Safe in a failed transaction for the same reason.
            unsafe { pg_sys::SetClientEncoding(before) };
        })
        .execute()
}

fn switch_to_utf8() -> Result<()> {
    // SAFETY: changes a global of the backend, or answers -1 if the conversion was never looked up.
    if unsafe { pg_sys::SetClientEncoding(UTF8) } == 0 {
        return Ok(());
    }
    // SAFETY: looks the conversion up in the catalog, which a transaction in progress allows.
    if unsafe { pg_sys::PrepareClientEncoding(UTF8) } == 0
        // SAFETY: as above.
        && unsafe { pg_sys::SetClientEncoding(UTF8) } == 0
    {
        return Ok(());
    }
    Err(Error::unsupported("cannot convert this database's text to UTF-8")
        .hint("Use a target database with encoding UTF8."))
}
