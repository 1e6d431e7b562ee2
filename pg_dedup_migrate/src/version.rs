//! What differs between the supported versions of PostgreSQL, and C macros that no binding carries.
use pgrx::pg_sys;

#[cfg(not(any(feature = "pg15", feature = "pg16", feature = "pg17", feature = "pg18")))]
compile_error!("select one of the features pg15, pg16, pg17, pg18");

/// Where `AddinShmemInitLock` stands in `MainLWLockArray`: a macro in `storage/lwlocknames.h`, generated
/// from `lwlocknames.txt` (15, 16) or `lwlocklist.h` (17, 18). The same in all of them: these numbers are kept
/// stable, new locks are added at the end. Look it up before another version is added.
#[cfg(any(feature = "pg15", feature = "pg16", feature = "pg17", feature = "pg18"))]
const ADDIN_SHMEM_INIT_LOCK: usize = 21;

/// The lock under which extensions set up their shared memory.
///
/// # Safety
/// The server's own shared memory must exist: not before `shmem_startup_hook`.
pub unsafe fn addin_shmem_init_lock() -> *mut pg_sys::LWLock {
    // SAFETY: the caller promises that the array exists; it begins with the individually named locks, of
    // which this is one.
    unsafe { &raw mut (*pg_sys::MainLWLockArray.add(ADDIN_SHMEM_INIT_LOCK)).lock }
}
