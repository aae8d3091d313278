//! The service manager's store for descriptors (systemd.service(5), FileDescriptorStoreMax=): what is parked there outlives this
//! daemon, and comes back to the next one.
//!
//! Wired by `daemon`, used by the engine. Without systemd, or with a unit that has no store, nothing is parked and nothing fails:
//! then what a container hangs on ends with its last holder. A crash leaves what is parked; the next start takes it or drops it.
#![allow(unsafe_code)] // descriptors that came with the process

use std::collections::BTreeMap;
use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd};
use std::sync::{Mutex, MutexGuard, PoisonError};

use sd_notify::NotifyState;

use crate::core::ports::FdStore;

/// Names of our descriptors begin with this; others are not touched.
const PREFIX: &str = "lxcri.";

/// systemd's store.
#[derive(Debug, Default)]
pub struct SystemdFdStore {
    there: bool,
    /// What is in the store, by full name; with the descriptor: an earlier daemon's that nobody has taken or replaced yet.
    parked: Mutex<BTreeMap<String, Option<OwnedFd>>>,
}

impl SystemdFdStore {
    /// Takes what an earlier daemon has parked. To be called once in a process.
    pub fn open() -> Self {
        let there = std::env::var_os("NOTIFY_SOCKET").is_some();
        let mut parked = BTreeMap::new();
        match sd_notify::listen_fds_with_names() {
            Ok(fds) => {
                for (number, name) in fds.filter(|(_, name)| name.starts_with(PREFIX)) {
                    // SAFETY: the service manager has passed it to this process under that number, and nobody else takes it.
                    parked.insert(name, Some(unsafe { OwnedFd::from_raw_fd(number) }));
                }
            }
            Err(e) => tracing::warn!(error = %e, "what an earlier daemon has parked can't be taken"),
        }
        if !parked.is_empty() {
            tracing::info!(descriptors = parked.len(), "found what an earlier daemon has parked");
        }
        Self { there, parked: Mutex::new(parked) }
    }

    fn parked(&self) -> MutexGuard<'_, BTreeMap<String, Option<OwnedFd>>> {
        self.parked.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn tell(&self, states: &[NotifyState<'_>], fds: &[BorrowedFd<'_>]) {
        if self.there
            && let Err(e) = sd_notify::notify_with_fds(states, fds)
        {
            tracing::warn!(error = %e, "the service manager can't be told of descriptors");
        }
    }
}

// The manager is told under the lock: its store has what the map says.
impl FdStore for SystemdFdStore {
    fn park(&self, name: &str, fd: BorrowedFd<'_>) {
        let name = format!("{PREFIX}{name}");
        let mut parked = self.parked();
        // Under one name there is one: it replaces what an earlier daemon had of it.
        self.tell(&[NotifyState::FdStoreRemove, NotifyState::FdName(&name)], &[]);
        self.tell(&[NotifyState::FdStore, NotifyState::FdName(&name)], &[fd]);
        parked.insert(name, None);
    }

    fn forget(&self, name: &str) {
        let name = format!("{PREFIX}{name}");
        let mut parked = self.parked();
        if parked.remove(&name).is_some() {
            self.tell(&[NotifyState::FdStoreRemove, NotifyState::FdName(&name)], &[]);
        }
    }

    fn take(&self, name: &str) -> Option<OwnedFd> {
        self.parked().get_mut(&format!("{PREFIX}{name}"))?.take()
    }

    fn sweep(&self, wanted: &dyn Fn(&str) -> bool) {
        self.parked().retain(|name, fd| {
            let keep = fd.is_none() || name.strip_prefix(PREFIX).is_some_and(wanted);
            if !keep {
                self.tell(&[NotifyState::FdStoreRemove, NotifyState::FdName(name)], &[]);
            }
            keep
        });
    }
}
