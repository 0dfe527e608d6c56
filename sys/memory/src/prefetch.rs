//! Lines of the cache that are fetched before they are needed, so that several are on their way
//! from another processor at once.
//!
//! These are hints. They change no memory and fault for no address (AMD64 Architecture Programmer's
//! Manual, volume 3, PREFETCH), so any address will do; a processor without them does nothing.

#![expect(unsafe_code)]
// UNSAFETY: the compiler has no name for a prefetch that is stable and safe.

/// Bytes that processors move between them at once; a guess that is right on most.
pub const LINE: usize = 64;

/// Has the processor fetch the line of a byte, to be read now.
#[inline(always)]
pub fn to_read<T>(at: *const T) {
    // SAFETY: a hint, for any address; see above.
    #[cfg(target_arch = "x86_64")]
    unsafe {
        std::arch::asm!("prefetcht0 [{}]", in(reg) at, options(nostack, preserves_flags));
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = at;
}

/// Has the processor fetch the line of a byte for itself alone, to be written soon.
#[inline(always)]
pub fn to_write<T>(at: *const T) {
    // SAFETY: as in `to_read`.
    #[cfg(target_arch = "x86_64")]
    unsafe {
        std::arch::asm!("prefetchw [{}]", in(reg) at, options(nostack, preserves_flags));
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = at;
}
