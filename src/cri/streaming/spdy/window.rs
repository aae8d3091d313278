//! How much may be sent: the peer's window of a stream or of the whole connection.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

/// Bytes that may be sent before the first WINDOW_UPDATE.
pub const INITIAL: i64 = 64 << 10;
/// A window can't be larger (draft 3.1, section 2.6.8).
const MAX: i64 = i32::MAX as i64;

/// A window.
#[derive(Debug)]
pub struct SendWindow {
    left: Mutex<i64>,
    changed: Notify,
}

impl SendWindow {
    /// Of so many bytes.
    pub fn new(bytes: i64) -> Self {
        Self { left: Mutex::new(bytes), changed: Notify::new() }
    }

    fn left(&self) -> MutexGuard<'_, i64> {
        self.left.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes it larger, or smaller.
    pub fn add(&self, bytes: i64) {
        let mut left = self.left();
        *left = (*left + bytes).clamp(-MAX, MAX);
        drop(left);
        self.changed.notify_waiters();
    }

    /// Takes at most `want` bytes, and at least one: waits for it while `binding` is set.
    pub async fn take(&self, want: usize, binding: &AtomicBool) -> usize {
        loop {
            let changed = self.changed.notified();
            {
                let mut left = self.left();
                let n = match binding.load(Ordering::Relaxed) {
                    true => want.min(usize::try_from(*left).unwrap_or(0)),
                    false => want,
                };
                if n > 0 {
                    *left = (*left - n as i64).max(-MAX);
                    return n;
                }
            }
            changed.await;
        }
    }
}
