//! Settings.
/// Defines every GUC; called once by `_PG_init`.
pub fn define() {}
