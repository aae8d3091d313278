//! SIGHUP: the configuration is read again. The level of the log is what it says, whatever a command has made of it meanwhile; what
//! else is different is named and counts from the next restart.
//!
//! One task of `serve`. What does not fit changes nothing and is said in the log, each problem by itself.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::signal::unix::{Signal, SignalKind, signal};
use tracing_subscriber::{EnvFilter, Registry, reload};

use crate::core::config::{Config, Sources, differences};
use crate::core::error::{Error, Kind, Result};
use crate::core::ports::LogLevel;

/// The log's level.
pub(super) struct Level {
    handle: reload::Handle<EnvFilter, Registry>,
    now: Mutex<String>,
}

impl Level {
    /// Beginning with `levels`; the layer is the log's.
    pub fn new(levels: &str) -> Result<(reload::Layer<EnvFilter, Registry>, Self)> {
        let (layer, handle) = reload::Layer::new(filter(levels)?);
        Ok((layer, Self { handle, now: Mutex::new(levels.to_owned()) }))
    }

    fn now(&self) -> MutexGuard<'_, String> {
        self.now.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl LogLevel for Level {
    fn get(&self) -> String {
        self.now().clone()
    }

    fn set(&self, levels: &str) -> Result<()> {
        let mut now = self.now();
        let failed = |e| Error::because(Kind::Internal, "change the log's level", e);
        self.handle.reload(filter(levels)?).map_err(failed)?;
        *now = levels.to_owned();
        Ok(())
    }
}

fn filter(levels: &str) -> Result<EnvFilter> {
    EnvFilter::try_new(levels).map_err(|e| Error::invalid(format!("log.level {levels:?} is not a filter: {e}")))
}

/// Keys that take effect without a restart.
const AT_ONCE: [&str; 1] = ["log.level"];

/// From here on SIGHUP does not end us; [`on_hangups`] answers it.
pub(super) fn listen() -> Result<Signal> {
    signal(SignalKind::hangup()).map_err(|e| Error::io("listen for SIGHUP", e))
}

/// Reads `sources` at every SIGHUP. `running` is what counts since the start.
pub(super) async fn on_hangups(mut hangups: Signal, sources: Sources, mut running: Config, level: Arc<Level>) {
    while hangups.recv().await.is_some() {
        super::command::notify_reloading();
        again(&sources, &mut running, &level);
        super::command::notify_ready();
    }
}

fn again(sources: &Sources, running: &mut Config, level: &Level) {
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
    if loaded.config.log.level != level.get() {
        match level.set(&loaded.config.log.level) {
            Ok(()) => running.log.level = loaded.config.log.level,
            Err(error) => tracing::error!(error = error.chain(), "the level of the log stays as it was"),
        }
    }
    tracing::info!(level = level.get(), "the configuration was read again");
}
