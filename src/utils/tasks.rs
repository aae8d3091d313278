//! Owned background work: every task belongs to a named set that can be cancelled and waited for.
//!
//! Used wherever something runs beside its caller. A task that panics is logged with its name; the others go on.

use std::collections::BTreeMap;
use std::future::Future;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// A named set of tasks with one cancellation.
#[derive(Clone, Debug)]
pub struct TaskSet {
    name: &'static str,
    tracker: TaskTracker,
    cancel: CancellationToken,
    running: Arc<Mutex<Running>>,
}

/// Tasks that have not ended, oldest first.
#[derive(Debug, Default)]
struct Running {
    last: u64,
    tasks: BTreeMap<u64, (String, Instant)>,
}

fn locked(running: &Mutex<Running>) -> MutexGuard<'_, Running> {
    running.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A task's place among those that run; given up when it is dropped.
struct Place {
    running: Arc<Mutex<Running>>,
    number: u64,
}

impl Place {
    fn take(running: &Arc<Mutex<Running>>, what: String) -> Self {
        let mut all = locked(running);
        all.last += 1;
        let number = all.last;
        all.tasks.insert(number, (what, Instant::now()));
        Self { running: running.clone(), number }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        locked(&self.running).tasks.remove(&self.number);
    }
}

impl TaskSet {
    /// An empty set.
    pub fn new(name: &'static str) -> Self {
        Self { name, tracker: TaskTracker::new(), cancel: CancellationToken::new(), running: Arc::default() }
    }

    /// Tells every task of the set to end; tasks that want to end tidily watch this.
    pub fn token(&self) -> &CancellationToken {
        &self.cancel
    }

    /// Runs `work` until it ends. It must watch [`TaskSet::token`] itself if it is long.
    pub fn spawn(&self, what: impl Into<String>, work: impl Future<Output = ()> + Send + 'static) {
        let (set, what) = (self.name, what.into());
        let place = Place::take(&self.running, what.clone());
        #[allow(clippy::disallowed_methods)] // the one place where tasks are made
        let task = tokio::spawn(work);
        #[allow(clippy::disallowed_methods)]
        self.tracker.spawn(async move {
            let _place = place;
            if let Err(e) = task.await
                && e.is_panic()
            {
                tracing::error!(set, task = what, "task panicked");
            }
        });
    }

    /// Runs `work` until it ends or the set is cancelled, whichever is first.
    pub fn spawn_cancellable(&self, what: impl Into<String>, work: impl Future<Output = ()> + Send + 'static) {
        let token = self.cancel.clone();
        self.spawn(what, async move {
            token.run_until_cancelled_owned(work).await;
        });
    }

    /// Tasks that have not ended, oldest first: what each is, and how long it has run.
    pub fn running(&self) -> Vec<(String, Duration)> {
        locked(&self.running).tasks.values().map(|(what, since)| (what.clone(), since.elapsed())).collect()
    }

    /// Ends `grace` after the set was told to end: for work that is better finished than broken off.
    pub async fn overdue(&self, grace: Duration) {
        self.cancel.cancelled().await;
        tokio::time::sleep(grace).await;
    }

    /// Cancels and waits until every task has ended.
    pub async fn shutdown(&self) {
        self.cancel.cancel();
        self.tracker.close();
        self.tracker.wait().await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_runs_is_known() {
        let set = TaskSet::new("test");
        set.spawn_cancellable("waits", std::future::pending());
        set.clone().spawn("ends", async {});
        let (first, _) = set.running().into_iter().next().expect("the first");
        assert_eq!(first, "waits");
        set.spawn("panics", async { panic!("as it should") });
        let names = || set.running().into_iter().map(|(what, _)| what).collect::<Vec<_>>();
        while names().len() > 1 {
            tokio::task::yield_now().await;
        }
        assert_eq!(names(), ["waits"]);
        set.shutdown().await;
        assert!(set.running().is_empty());
    }
}
