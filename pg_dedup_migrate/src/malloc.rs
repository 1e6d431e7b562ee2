//! How the C library keeps a worker's heap.

use std::sync::Once;

/// Memory that a backend keeps instead of giving it back to the system, in bytes.
const KEPT_BYTES: i32 = 16 << 20;

/// Has this backend keep freed memory for its next chunk. By default glibc returns the end of the heap beyond 128 KB, so that COPY of rows of some
/// 10 KB faults every one of them in anew.
pub fn keep_freed_memory() {
    #[cfg(target_env = "gnu")]
    {
        static ONCE: Once = Once::new();
        // SAFETY: sets numbers of this process; out of memory it changes nothing. Both, because setting one ends their adapting to use.
        ONCE.call_once(|| unsafe {
            libc::mallopt(libc::M_MMAP_THRESHOLD, KEPT_BYTES);
            libc::mallopt(libc::M_TRIM_THRESHOLD, 2 * KEPT_BYTES);
        });
    }
}
