//! The processor's prefetch instruction.
use pg_dedup_shared::prefetch::Prefetch;

/// Prefetches where the processor is known, does nothing elsewhere.
#[derive(Clone, Copy, Debug)]
pub struct Cpu;

impl Prefetch for Cpu {
    #[inline(always)]
    fn fetch<T>(&self, item: &T) {
        let address = std::ptr::from_ref(item);
        #[cfg(target_arch = "x86_64")]
        // SAFETY: a hint; it faults on no address, and this one is a reference's.
        unsafe {
            use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
            _mm_prefetch::<_MM_HINT_T0>(address.cast());
        }
        #[cfg(target_arch = "aarch64")]
        // SAFETY: a hint; it faults on no address, touches no register or flag, and this one is a reference's.
        unsafe {
            std::arch::asm!("prfm pldl1keep, [{0}]", in(reg) address, options(nostack, readonly, preserves_flags));
        }
        #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
        let _ = address;
    }
}
