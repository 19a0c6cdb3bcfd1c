//! Counts the allocations of each thread, for tests.

use std::{
    alloc::{GlobalAlloc, Layout, System},
    cell::Cell,
};

thread_local! {
    static COUNT: Cell<u64> = const { Cell::new(0) };
    static HELD: Cell<i64> = const { Cell::new(0) };
}

/// Bytes that the calling thread allocated and did not free again.
pub(in super::super) fn held() -> i64 {
    HELD.get()
}

fn count(more: usize, less: usize) {
    if more > 0 {
        COUNT.set(COUNT.get() + 1);
    }
    HELD.set(HELD.get() + more as i64 - less as i64);
}

/// Allocations of the calling thread so far.
pub(in super::super) fn allocations() -> u64 {
    COUNT.get()
}

struct Counting;

// SAFETY: every call is passed on unchanged to the system's allocator; counting touches thread-local integers, which
// are constant-initialised, need no destructor and so never allocate.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size(), 0);
        // SAFETY: the caller's promise is the one that is asked for.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count(layout.size(), 0);
        // SAFETY: the caller's promise is the one that is asked for.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count(size, layout.size());
        // SAFETY: the caller's promise is the one that is asked for.
        unsafe { System.realloc(pointer, layout, size) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        count(0, layout.size());
        // SAFETY: the caller's promise is the one that is asked for.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;
