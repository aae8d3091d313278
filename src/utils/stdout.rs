//! Whether standard output was open when the program began.
//!
//! Rust puts /dev/null in the place of standard streams that are closed, where what is written is lost without a word. This
//! looks before that. Asked by the command line.
#![allow(unsafe_code)] // a function of the program's own that runs before `main`

use std::sync::atomic::{AtomicBool, Ordering};

static CLOSED: AtomicBool = AtomicBool::new(false);

extern "C" fn look() {
    // SAFETY: fcntl(2) takes any number for a descriptor, and this one is not closed by it.
    let closed = unsafe { libc::fcntl(libc::STDOUT_FILENO, libc::F_GETFD) } == -1;
    CLOSED.store(closed, Ordering::Relaxed);
}

// SAFETY: the loader calls what is listed here once, on the only thread; `look` needs nothing of Rust's runtime.
#[used]
#[unsafe(link_section = ".init_array")]
static AT_START: extern "C" fn() = look;

/// Standard output was closed when the program began.
pub fn was_closed() -> bool {
    CLOSED.load(Ordering::Relaxed)
}
