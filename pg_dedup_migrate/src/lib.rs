//! `pg_dedup_migrate`: content-deduplicating, verified, resumable migration into PostgreSQL.
use pgrx::prelude::*;

mod error;
mod guc;
mod hash;
mod shmem;

::pgrx::pg_module_magic!(name, version);

#[cfg(not(panic = "unwind"))]
compile_error!("build with panic = \"unwind\": pgrx turns panics into ERRORs by unwinding");

#[pg_guard]
pub extern "C-unwind" fn _PG_init() {
    guc::define();
    shmem::init();
}
