//! Calls that the compiler cannot check.

/// Gives memory that was freed back to the system, wherever in the heap it lies. By itself, the allocator keeps
/// what lies between pieces in use: after a start with many records, as much as those.
pub(super) fn give_back_memory() {
    #[cfg(target_env = "gnu")]
    // SAFETY: takes a number and touches only what the allocator holds, under its own locks.
    unsafe {
        libc::malloc_trim(0);
    }
}
