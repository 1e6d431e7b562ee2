//! Harness of the integration tests: everything that needs two backends, a crash or the sidecar.
//!
//! ```text
//! cluster   private PostgreSQL servers, run by an unprivileged user, gone when the tests are
//!    │
//! pair      a source and a target cluster with a database each
//!    │
//! db        SQL over one connection      sidecar   the worker's binary: run it, stop it, kill it
//!    │                                      │
//! data      deterministic source rows     check     what must hold of the target afterwards
//! ```
//!
//! The tests themselves are one binary, `tests/integration/main.rs`, a module for each subject. They need
//! the extension installed in the server that `PG_CONFIG` names, and the sidecar built; `make test` sees to
//! both. A failed expectation panics: that is what a test is for, so nothing here returns an error that a
//! test could forget to look at.

pub mod check;
pub mod cluster;
pub mod data;
pub mod db;
pub mod http;
pub mod pair;
pub mod pooler;
pub mod protocol;
pub mod sidecar;
