//! What `cargo pgrx test` asks of a crate: the settings of the server that its tests run in.

/// Nothing to set up.
pub fn setup(_options: Vec<&str>) {}

/// Claims need shared memory, which exists only if the library is loaded at server start.
pub fn postgresql_conf_options() -> Vec<&'static str> {
    vec!["shared_preload_libraries = 'pg_dedup_migrate'"]
}
