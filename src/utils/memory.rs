//! The daemon's heap: few arenas, and memory given back to the kernel once a burst of work is over.
//!
//! glibc gives each thread an arena of its own and keeps what was freed; a daemon whose blocking threads come and go
//! would hold many times what it uses. Called by `main` and `daemon`; can't fail.
// Two calls of the C library's allocator.
#![allow(unsafe_code)]

/// Sets the allocator up. To be called before any thread is started.
pub fn tune() {
    #[cfg(target_env = "gnu")]
    // SAFETY: mallopt(3) changes a number inside the allocator; no thread runs yet.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 2);
    }
}

/// Gives free memory back. Takes a few milliseconds on a large heap.
pub fn trim() {
    #[cfg(target_env = "gnu")]
    // SAFETY: malloc_trim(3) locks the allocator's arenas itself.
    unsafe {
        libc::malloc_trim(0);
    }
}
