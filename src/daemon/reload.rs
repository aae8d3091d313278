//! SIGHUP: the configuration is read again. The level of the log changes at once; what else is different is named and counts from
//! the next restart.
//!
//! One task of `serve`. What does not fit changes nothing and is said in the log, each problem by itself.

use tokio::signal::unix::{Signal, SignalKind, signal};
use tracing_subscriber::{EnvFilter, Registry, reload};

use crate::core::config::{Config, Sources, differences};
use crate::core::error::{Error, Result};

/// Changes the log's level.
pub(super) type LevelHandle = reload::Handle<EnvFilter, Registry>;

/// Keys that take effect without a restart.
const AT_ONCE: [&str; 1] = ["log.level"];

/// From here on SIGHUP does not end us; [`on_hangups`] answers it.
pub(super) fn listen() -> Result<Signal> {
    signal(SignalKind::hangup()).map_err(|e| Error::io("listen for SIGHUP", e))
}

/// Reads `sources` at every SIGHUP. `running` is what counts since the start.
pub(super) async fn on_hangups(mut hangups: Signal, sources: Sources, mut running: Config, level: LevelHandle) {
    while hangups.recv().await.is_some() {
        super::command::notify_reloading();
        again(&sources, &mut running, &level);
        super::command::notify_ready();
    }
}

fn again(sources: &Sources, running: &mut Config, level: &LevelHandle) {
    let loaded = match sources.load() {
        Ok(loaded) => loaded,
        Err(problems) => {
            for problem in &problems.0 {
                tracing::error!(%problem, "the configuration stays as it was: it does not fit");
            }
            return;
        }
    };
    for warning in &loaded.warnings {
        tracing::warn!(warning, "configuration");
    }
    let different = differences(running, &loaded.config);
    for key in different.iter().filter(|k| !AT_ONCE.contains(k)) {
        tracing::warn!(key, "this key counts from the next restart");
    }
    if different.contains(&AT_ONCE[0]) {
        let new = loaded.config.log.level;
        match EnvFilter::try_new(&new)
            .map_err(|e| e.to_string())
            .and_then(|f| level.reload(f).map_err(|e| e.to_string()))
        {
            Ok(()) => running.log.level = new,
            Err(error) => tracing::error!(error, "the level of the log stays as it was"),
        }
    }
    tracing::info!(level = running.log.level, "the configuration was read again");
}
