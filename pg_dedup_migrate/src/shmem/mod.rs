//! Shared memory.
/// Installs the hooks; called once by `_PG_init`.
pub fn init() {}
