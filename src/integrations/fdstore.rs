//! The service manager's store for descriptors (systemd.service(5), FileDescriptorStoreMax=): what is parked there outlives this
//! daemon, and comes back to the next one.
//!
//! Wired by `daemon`, used by the engine. Without systemd, or with a unit that has no store, nothing is parked and nothing fails:
//! then what a container hangs on ends with its last holder. A crash leaves what is parked; the next start takes it or drops it.
#![allow(unsafe_code)] // descriptors that came with the process

use std::collections::BTreeMap;
use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd};
use std::sync::{Mutex, PoisonError};

use sd_notify::NotifyState;

use crate::core::ports::FdStore;

/// Names of our descriptors begin with this; others are not touched.
const PREFIX: &str = "lxcri.";

/// systemd's store.
#[derive(Debug, Default)]
pub struct SystemdFdStore {
    there: bool,
    found: Mutex<BTreeMap<String, OwnedFd>>,
}

impl SystemdFdStore {
    /// Takes what an earlier daemon has parked. To be called once in a process.
    pub fn open() -> Self {
        let there = std::env::var_os("NOTIFY_SOCKET").is_some();
        let mut found = BTreeMap::new();
        match sd_notify::listen_fds_with_names() {
            Ok(fds) => {
                for (number, name) in fds.filter(|(_, name)| name.starts_with(PREFIX)) {
                    // SAFETY: the service manager has passed it to this process under that number, and nobody else takes it.
                    found.insert(name, unsafe { OwnedFd::from_raw_fd(number) });
                }
            }
            Err(e) => tracing::warn!(error = %e, "what an earlier daemon has parked can't be taken"),
        }
        if !found.is_empty() {
            tracing::info!(descriptors = found.len(), "found what an earlier daemon has parked");
        }
        Self { there, found: Mutex::new(found) }
    }

    fn tell(&self, states: &[NotifyState<'_>], fds: &[BorrowedFd<'_>]) {
        if self.there
            && let Err(e) = sd_notify::notify_with_fds(states, fds)
        {
            tracing::warn!(error = %e, "the service manager can't be told of descriptors");
        }
    }
}

impl FdStore for SystemdFdStore {
    fn park(&self, name: &str, fd: BorrowedFd<'_>) {
        let name = format!("{PREFIX}{name}");
        self.found.lock().unwrap_or_else(PoisonError::into_inner).remove(&name);
        // Under one name there is one: it replaces what an earlier daemon had of it.
        self.tell(&[NotifyState::FdStoreRemove, NotifyState::FdName(&name)], &[]);
        self.tell(&[NotifyState::FdStore, NotifyState::FdName(&name)], &[fd]);
    }

    fn forget(&self, name: &str) {
        let name = format!("{PREFIX}{name}");
        self.found.lock().unwrap_or_else(PoisonError::into_inner).remove(&name);
        self.tell(&[NotifyState::FdStoreRemove, NotifyState::FdName(&name)], &[]);
    }

    fn take(&self, name: &str) -> Option<OwnedFd> {
        self.found.lock().unwrap_or_else(PoisonError::into_inner).remove(&format!("{PREFIX}{name}"))
    }

    fn sweep(&self) {
        let left = std::mem::take(&mut *self.found.lock().unwrap_or_else(PoisonError::into_inner));
        for name in left.keys() {
            self.tell(&[NotifyState::FdStoreRemove, NotifyState::FdName(name)], &[]);
        }
    }
}
