//! `pg_dedup_migrate`: content-deduplicating, verified, resumable migration into PostgreSQL.
//!
//! ```text
//!   worker ──begin_chunk──▶ chunk ──match_keys──▶ matching ──▶ upsert
//!                             │
//!                           claim ──▶ shmem (filter, claims, warmth)
//!                             │  └──▶ lookup ──▶ segment ──▶ relation
//!          ──COPY──▶ target   │
//!          ──finish_chunk──▶ finish ──▶ segment, ledger; hash::rows reads back
//!   DBA    ──SELECT──▶ index, compaction, views; reconcile, repair, rollback
//! ```
use pgrx::prelude::*;

mod by_key;
mod by_place;
mod chunk;
mod claim;
mod compaction;
mod copy;
mod directory;
mod disk;
mod error;
mod finish;
mod guc;
mod hash;
mod index;
mod indexing;
mod keyset;
mod ledger;
mod local;
mod lookup;
mod malloc;
mod matching;
mod merge;
mod orphans;
mod owners;
mod pace;
mod passes;
#[cfg(test)]
pub mod pg_test;
mod planning;
mod protocol;
mod reconcile;
mod references;
mod rehearsal;
mod relation;
mod repair;
mod rollback;
mod segment;
mod shmem;
mod sql;
mod throttle;
mod upsert;
mod verification;
mod version;

::pgrx::pg_module_magic!(name, version);

#[cfg(not(panic = "unwind"))]
compile_error!("build with panic = \"unwind\": pgrx turns panics into ERRORs by unwinding");

extension_sql_file!("../../sql/10_tables.sql", name = "tables", requires = [hash::sql::checksum_add]);
extension_sql_file!(
    "../../sql/20_triggers.sql",
    name = "triggers",
    requires = ["tables", index::mark_filter_cold]
);
extension_sql_file!(
    "../../sql/30_runs.sql",
    name = "runs",
    requires = ["tables", protocol::target_layout, hash::sql::checksum_add]
);
extension_sql_file!(
    "../../sql/35_local.sql",
    name = "local",
    requires = ["complete", "lease", local::run_chunk]
);
extension_sql_file!("../../sql/40_lease.sql", name = "lease", requires = ["runs"]);
extension_sql_file!("../../sql/42_throttle.sql", name = "throttle", requires = ["lease", disk::disk_space]);
extension_sql_file!("../../sql/45_views.sql", name = "views", requires = ["throttle", index::ledger_entries]);
extension_sql_file!("../../sql/46_slis.sql", name = "slis", requires = ["views", "reconcile"]);
extension_sql_file!("../../sql/47_alerts.sql", name = "alerts", requires = ["slis", index::filter_stats]);
extension_sql_file!(
    "../../sql/50_complete.sql",
    name = "complete",
    requires = ["runs", index::key_text, orphans::orphans]
);
extension_sql_file!(
    "../../sql/55_reconcile.sql",
    name = "reconcile",
    requires = [
        "complete",
        reconcile::reconcile_chunk,
        reconcile::reconcile_local_chunks,
        reconcile::recheck_chunks,
        reconcile::settle_reconcile
    ]
);
extension_sql_file!(
    "../../sql/56_repair.sql",
    name = "repair",
    requires = ["reconcile", "local", verification::verify_written, repair::audit::retract_stale]
);
extension_sql_file!(
    "../../sql/57_rollback.sql",
    name = "rollback",
    requires = ["reconcile", "lease", rollback::prepare_rollback, rollback::undo_ordinal]
);
extension_sql_file!(
    "../../sql/60_maintenance.sql",
    name = "maintenance",
    requires = ["tables", compaction::compact_step]
);
extension_sql_file!("../../sql/62_report.sql", name = "report", requires = ["alerts"]);
extension_sql_file!("../../sql/65_retention.sql", name = "retention", requires = ["rollback"]);
extension_sql_file!("../../sql/90_finish.sql", name = "finish", finalize);

#[pg_guard]
pub extern "C-unwind" fn _PG_init() {
    guc::define();
    shmem::init();
}
