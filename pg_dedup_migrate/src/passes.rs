//! Looking at a large set of digests a part at a time, in bounded memory.
use pgrx::pg_sys;

/// How many parts the digests are cut into: ranges of their leading bits.
#[derive(Clone, Copy)]
pub struct Passes(u64);

/// One of the parts.
#[derive(Clone, Copy)]
pub struct Pass {
    number: u64,
    of: u64,
}

impl Passes {
    /// So many that what is kept of the entries of each, `bytes` an entry, fits `maintenance_work_mem`.
    pub fn of(entries: usize, bytes: usize) -> Self {
        // SAFETY: a setting of this backend, in kB.
        let memory = unsafe { pg_sys::maintenance_work_mem } as usize * 1024;
        Self((entries * bytes).div_ceil(memory.max(1)).clamp(1, 1 << 16) as u64)
    }

    /// The parts, one by one.
    pub fn each(self) -> impl Iterator<Item = Pass> {
        (0..self.0).map(move |number| Pass { number, of: self.0 })
    }
}

impl Pass {
    /// Whether a digest belongs to it.
    pub fn has(self, digest: &[u8; 32]) -> bool {
        self.has_prefix(digest)
    }

    /// Whether a digest that begins like this belongs to it.
    pub fn has_prefix(self, digest: &[u8]) -> bool {
        let leading = digest.first_chunk::<4>().map_or(0, |first| u64::from(u32::from_be_bytes(*first)));
        (leading * self.of) >> 32 == self.number
    }
}
