//! Queues: how many changes are under way on a node and on a storage at a time.
//!
//! Proxmox's own locks wait ten seconds and then fail, so that many changes at once hinder each other. Whoever waits here
//! waits in order; too many waiting is an error. What is held is given back on drop, also of a caller that was cancelled.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::error::{ApiError, ErrorKind};

/// Most that wait at once.
const MAX_WAITING: usize = 1024;

/// A place in a lane.
#[derive(Debug)]
pub struct Permit {
    _place: OwnedSemaphorePermit,
    /// It is given back before the end of what takes too long.
    pub(super) lent: bool,
}

/// The queues of one client.
pub(super) struct Lanes {
    lanes: Mutex<HashMap<String, Arc<Semaphore>>>,
    waiting: AtomicUsize,
    patience: Duration,
}

impl Lanes {
    /// `patience`: longest wait.
    pub(super) fn new(patience: Duration) -> Self {
        Self { lanes: Mutex::default(), waiting: AtomicUsize::new(0), patience }
    }

    /// Waits for one of `limit` places in the lane `name`; `lent`: see [`Permit`].
    pub(super) async fn enter(&self, name: &str, limit: usize, lent: bool, call: &str) -> Result<Permit, ApiError> {
        let lane = {
            let mut lanes = self.lanes.lock().unwrap_or_else(|e| e.into_inner());
            lanes.entry(name.to_owned()).or_insert_with(|| Arc::new(Semaphore::new(limit))).clone()
        };
        if let Ok(_place) = lane.clone().try_acquire_owned() {
            return Ok(Permit { _place, lent });
        }
        let _waiting = Waiting::new(&self.waiting)
            .ok_or_else(|| ApiError::new(ErrorKind::Overloaded, call, format!("{MAX_WAITING} calls wait already")))?;
        let permit = tokio::time::timeout(self.patience, lane.acquire_owned()).await;
        let Ok(Ok(_place)) = permit else {
            let why = format!("{name} had no place for it in {} s", self.patience.as_secs());
            return Err(ApiError::new(ErrorKind::Overloaded, call, why));
        };
        Ok(Permit { _place, lent })
    }
}

/// Counts itself while it is there.
struct Waiting<'a>(&'a AtomicUsize);

impl<'a> Waiting<'a> {
    fn new(count: &'a AtomicUsize) -> Option<Self> {
        let counted = Self(count);
        (count.fetch_add(1, Ordering::Relaxed) < MAX_WAITING).then_some(counted)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn places_are_limited_and_given_back() {
        let lanes = Lanes::new(Duration::from_secs(5));
        let a = lanes.enter("node a", 2, true, "x").await.unwrap();
        let _b = lanes.enter("node a", 2, true, "x").await.unwrap();
        let _other = lanes.enter("node b", 1, true, "x").await.unwrap();
        let e = lanes.enter("node a", 2, true, "x").await.unwrap_err();
        assert_eq!(*e.kind(), ErrorKind::Overloaded);
        let third = lanes.enter("node a", 2, true, "x");
        let free = async {
            tokio::time::sleep(Duration::from_secs(1)).await;
            drop(a);
        };
        let (third, ()) = tokio::join!(third, free);
        third.unwrap();
        assert_eq!(lanes.waiting.load(Ordering::Relaxed), 0);
    }
}
