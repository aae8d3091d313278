//! Owned background work: every task belongs to a named set that can be cancelled and waited for.
//!
//! Used wherever something runs beside its caller. A task that panics is logged with its name; the others go on.

use std::future::Future;
use std::time::Duration;

use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// A named set of tasks with one cancellation.
#[derive(Clone, Debug)]
pub struct TaskSet {
    name: &'static str,
    tracker: TaskTracker,
    cancel: CancellationToken,
}

impl TaskSet {
    /// An empty set.
    pub fn new(name: &'static str) -> Self {
        Self { name, tracker: TaskTracker::new(), cancel: CancellationToken::new() }
    }

    /// Tells every task of the set to end; tasks that want to end tidily watch this.
    pub fn token(&self) -> &CancellationToken {
        &self.cancel
    }

    /// Runs `work` until it ends. It must watch [`TaskSet::token`] itself if it is long.
    pub fn spawn(&self, what: impl Into<String>, work: impl Future<Output = ()> + Send + 'static) {
        let (set, what) = (self.name, what.into());
        #[allow(clippy::disallowed_methods)] // the one place where tasks are made
        let task = tokio::spawn(work);
        #[allow(clippy::disallowed_methods)]
        self.tracker.spawn(async move {
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
