//! One at a time for each of many things: locks that are there as long as somebody has or wants them.
//!
//! Used by whoever works on named things at the same time. Nothing fails; a dropped turn is the next one's.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::OwnedMutexGuard;

/// The locks.
#[derive(Debug)]
pub struct Turns<K>(Mutex<HashMap<K, Arc<tokio::sync::Mutex<()>>>>);

impl<K> Default for Turns<K> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<K: Eq + Hash + Clone> Turns<K> {
    /// Waits until nobody else is at it.
    pub async fn take(&self, key: &K) -> OwnedMutexGuard<()> {
        let turn = {
            let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            all.retain(|_, turn| Arc::strong_count(turn) > 1);
            all.entry(key.clone()).or_default().clone()
        };
        turn.lock_owned().await
    }

    /// Whether somebody is at it.
    pub fn taken(&self, key: &K) -> bool {
        let all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.get(key).is_some_and(|turn| turn.try_lock().is_err())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn one_at_a_time_of_each() {
        let turns = Turns::default();
        let first = turns.take(&1).await;
        assert!(turns.taken(&1) && !turns.taken(&2));
        drop(turns.take(&2).await);
        assert!(futures::future::poll_immediate(Box::pin(turns.take(&1))).await.is_none());
        drop(first);
        drop(turns.take(&1).await);
        assert!(!turns.taken(&1));
    }
}
