//! Settings: `pg_dedup_migrate.*`.
use pgrx::{GucContext, GucFlags, GucRegistry, GucSetting, pg_sys};

/// Bytes in the unit of the size settings.
const MEGABYTE: usize = 1 << 20;
/// The largest filter: 1 TB, far above what any number of records wants.
const MAX_FILTER_SIZE: i32 = 1 << 20;
/// The largest claims table: 64 GB. More would be slots beyond what 32 bits count.
const MAX_CLAIMS_SIZE: i32 = 1 << 16;

static FILTER_SIZE: GucSetting<i32> = GucSetting::<i32>::new(64);
/// Read by pg_dump's conditions alone, as SQL.
static DUMP_INDEX: GucSetting<bool> = GucSetting::<bool>::new(true);
static CLAIMS_SIZE: GucSetting<i32> = GucSetting::<i32>::new(64);

/// Defines every setting; called once by `_PG_init`.
pub fn define() {
    // SAFETY: a plain flag of this process.
    if !unsafe { pg_sys::process_shared_preload_libraries_in_progress } {
        // The server ends a session that defines a setting of this kind later, and sizes of memory
        // that does not exist say nothing.
        return;
    }
    GucRegistry::define_int_guc(
        c"pg_dedup_migrate.filter_size",
        c"Sets the size of the shared filter of content hashes.",
        c"12 bits a record keep false positives below 0.6 %: 64 MB serve 44 million records, 1.5 GB a billion.",
        &FILTER_SIZE,
        1,
        MAX_FILTER_SIZE,
        GucContext::Postmaster,
        GucFlags::UNIT_MB,
    );
    GucRegistry::define_int_guc(
        c"pg_dedup_migrate.claims_size",
        c"Sets the size of the shared table of content hashes that transactions in flight have claimed.",
        c"16 bytes a record, seven eighths usable: 64 MB serve 3.6 million records in flight.",
        &CLAIMS_SIZE,
        1,
        MAX_CLAIMS_SIZE,
        GucContext::Postmaster,
        GucFlags::UNIT_MB,
    );
    GucRegistry::define_bool_guc(
        c"pg_dedup_migrate.dump_index",
        c"Includes the hash index in what pg_dump writes.",
        c"Left out, it is made anew after a restore by dedup.index_existing, which a run calls itself.",
        &DUMP_INDEX,
        GucContext::Userset,
        GucFlags::default(),
    );
    // SAFETY: a constant string; the server is loading preloaded libraries.
    unsafe { pg_sys::MarkGUCPrefixReserved(c"pg_dedup_migrate".as_ptr()) };
}

/// Size of the filter in bytes.
pub fn filter_bytes() -> usize {
    megabytes(&FILTER_SIZE)
}

/// Size of the claims table in bytes.
pub fn claims_bytes() -> usize {
    megabytes(&CLAIMS_SIZE)
}

fn megabytes(setting: &GucSetting<i32>) -> usize {
    usize::try_from(setting.get()).unwrap_or(1).saturating_mul(MEGABYTE)
}
