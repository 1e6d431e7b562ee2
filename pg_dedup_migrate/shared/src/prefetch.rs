//! Asking the processor for memory before it is needed.
//!
//! The instruction needs `unsafe`, so the extension brings it along; this crate only says where.

/// Starts loading what will soon be read or written. A hint: doing nothing is right, only slower.
pub trait Prefetch {
    /// Asks for the cache line that `item` begins in.
    fn fetch<T>(&self, item: &T);
}

/// Asks for nothing.
#[derive(Clone, Copy, Debug)]
pub struct NoPrefetch;

impl Prefetch for NoPrefetch {
    #[inline(always)]
    fn fetch<T>(&self, _item: &T) {}
}
