//! What there is to see of a run: the live page and the report are made of the same parts.
//!
//! ```text
//!   dedup.overview ─▶ Overview ─┬─▶ observe::metrics
//!   dedup.report   ─▶ Report ───┤
//!                               └─▶ parts, plots ─▶ page (live), report::html (kept)
//! ```

pub mod overview;
pub mod page;
pub mod parts;
pub mod plots;

/// One stylesheet for all pages; nothing is loaded from elsewhere.
pub const STYLE: &str = include_str!("style.css");
