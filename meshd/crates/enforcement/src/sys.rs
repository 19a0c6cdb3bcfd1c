//! Calls that the compiler cannot check.

/// Returns freed memory to the system, wherever in the heap it is. By itself, the allocator keeps memory between pieces
/// in use: after a start with many records, as much as those.
pub(super) fn give_back_memory() {
    #[cfg(target_env = "gnu")]
    // SAFETY: takes a number and touches only the allocator's memory, under its own locks.
    unsafe {
        libc::malloc_trim(0);
    }
}
