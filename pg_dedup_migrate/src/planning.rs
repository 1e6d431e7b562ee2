//! Planner settings for queries that address a target by its key.
//!
//! A target that is being filled has no statistics yet: the planner takes it for small and scans it whole, for every chunk again. These
//! queries always have a unique index to go by.
use pgrx::pg_sys;

/// While it lives, queries go by an index where there is one, without JIT compilation. What an ERROR leaves behind, the end of the
/// (sub)transaction takes back.
pub struct ByIndex {
    level: i32,
}

impl ByIndex {
    /// Changes the settings until the value is dropped.
    pub fn new() -> Self {
        // SAFETY: opens a nesting level of settings that AtEOXact_GUC closes.
        let level = unsafe { pg_sys::NewGUCNestLevel() };
        for name in [c"enable_seqscan", c"jit"] {
            // SAFETY: both settings exist, are the user's to change, and take "off".
            unsafe {
                pg_sys::set_config_option(
                    name.as_ptr(),
                    c"off".as_ptr(),
                    pg_sys::GucContext::PGC_USERSET,
                    pg_sys::GucSource::PGC_S_SESSION,
                    pg_sys::GucAction::GUC_ACTION_SAVE,
                    true,
                    0,
                    false,
                );
            }
        }
        Self { level }
    }
}

impl Drop for ByIndex {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            // SAFETY: closes the level opened by `new`.
            unsafe { pg_sys::AtEOXact_GUC(true, self.level) };
        }
    }
}
