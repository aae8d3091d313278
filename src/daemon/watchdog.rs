//! systemd's watchdog (`WatchdogSec`): told three times within its time that the daemon would answer. A daemon that hangs tells
//! nothing, and systemd starts another one, which no pod notices.
//!
//! One task of `serve`. What it looks at is what every request needs: the runtime's threads and the engine's index.

use std::time::Duration;

use crate::core::engine::{Engine, Scope};

/// Tells it every third of `limit`.
pub(super) async fn feed(engine: Engine, limit: Duration) {
    loop {
        let pods = engine.pods(Scope::Local).len();
        tracing::trace!(pods, "the watchdog is told");
        super::command::notify(&[sd_notify::NotifyState::Watchdog]);
        tokio::time::sleep(limit / 3).await;
    }
}
