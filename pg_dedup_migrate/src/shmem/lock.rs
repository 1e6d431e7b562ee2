//! A lightweight lock of the server, held by a value.
use std::marker::PhantomData;

use pgrx::pg_sys;

/// A lightweight lock that this process holds. Interrupts are held off meanwhile.
#[derive(Debug)]
pub struct Held<'a> {
    lock: *mut pg_sys::LWLock,
    memory: PhantomData<&'a pg_sys::LWLock>,
}

impl Held<'_> {
    /// Waits for the lock and takes it for itself alone.
    ///
    /// # Safety
    /// `lock` is an initialised lock in shared memory that this process does not hold.
    pub unsafe fn exclusive(lock: *mut pg_sys::LWLock) -> Self {
        // SAFETY: as the caller promises.
        unsafe { Self::acquire(lock, pg_sys::LWLockMode::LW_EXCLUSIVE) }
    }

    /// Waits for the lock and takes it together with others who only read.
    ///
    /// # Safety
    /// `lock` is an initialised lock in shared memory that this process does not hold.
    pub unsafe fn shared(lock: *mut pg_sys::LWLock) -> Self {
        // SAFETY: as the caller promises.
        unsafe { Self::acquire(lock, pg_sys::LWLockMode::LW_SHARED) }
    }

    unsafe fn acquire(lock: *mut pg_sys::LWLock, mode: pg_sys::LWLockMode::Type) -> Self {
        // SAFETY: as the caller promises.
        unsafe { pg_sys::LWLockAcquire(lock, mode) };
        Self { lock, memory: PhantomData }
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        // While unwinding the server is not called: an ERROR follows, and aborting the transaction or
        // subtransaction begins with LWLockReleaseAll().
        if !std::thread::panicking() {
            // SAFETY: acquired by this value, released once.
            unsafe { pg_sys::LWLockRelease(self.lock) };
        }
    }
}
