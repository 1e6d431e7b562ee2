//! Settings that hold for a while: for queries that address a target by its key, and for values that are written as text.
use std::ffi::CStr;

use pgrx::pg_sys;

/// Settings of this session, changed until the value is dropped. What an ERROR leaves behind, the end of the (sub)transaction takes back.
struct Settings {
    level: i32,
}

impl Settings {
    fn new(changes: &[(&CStr, &CStr)]) -> Self {
        // SAFETY: opens a nesting level of settings that AtEOXact_GUC closes.
        let level = unsafe { pg_sys::NewGUCNestLevel() };
        for (name, value) in changes {
            // SAFETY: the setting exists, is the user's to change, and takes the value.
            unsafe {
                pg_sys::set_config_option(
                    name.as_ptr(),
                    value.as_ptr(),
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

impl Drop for Settings {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            // SAFETY: closes the level opened by `new`.
            unsafe { pg_sys::AtEOXact_GUC(true, self.level) };
        }
    }
}

/// While it lives, queries go by an index where there is one, without JIT compilation.
///
/// A target that is being filled has no statistics yet: the planner takes it for small and scans it whole, for every chunk again. Queries that
/// address a target by its key always have a unique index to go by.
pub struct ByIndex {
    /// Held for its end.
    _settings: Settings,
}

impl ByIndex {
    /// Changes the settings until the value is dropped.
    pub fn new() -> Self {
        Self { _settings: Settings::new(&[(c"enable_seqscan", c"off"), (c"jit", c"off")]) }
    }
}

/// While it lives, values are written as texts that mean the same in every session, and lose nothing.
pub struct ExactTexts {
    /// Held for its end.
    _settings: Settings,
}

impl ExactTexts {
    /// Changes the settings until the value is dropped.
    pub fn new() -> Self {
        let _settings = Settings::new(&[
            (c"DateStyle", c"ISO, YMD"),
            (c"IntervalStyle", c"postgres"),
            (c"TimeZone", c"UTC"),
            (c"extra_float_digits", c"3"),
            (c"bytea_output", c"hex"),
        ]);
        Self { _settings }
    }
}
