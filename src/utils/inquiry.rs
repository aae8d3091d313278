//! A question to something outside that may not answer: asked beside whoever wants to know, who waits a while at most.
//!
//! Used for what the node's status needs (the OCI runtime, the network's plugins). However many want to know, it is asked
//! once at a time, and an answer that comes late is there for the next one. The question has a deadline of its own.
//! Nothing of it is on disk.

use std::future::Future;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::watch;

use super::tasks::TaskSet;

/// One kind of question.
#[derive(Debug)]
pub struct Inquiry<T> {
    name: &'static str,
    tasks: TaskSet,
    running: Mutex<Option<watch::Receiver<Option<T>>>>,
}

impl<T: Clone + Send + Sync + 'static> Inquiry<T> {
    /// Nothing is asked yet; `tasks` owns what asks.
    pub fn new(name: &'static str, tasks: TaskSet) -> Self {
        Self { name, tasks, running: Mutex::default() }
    }

    /// The answer, if it comes within `patience`. `question` is asked only if it is not being asked already.
    pub async fn ask<F>(&self, patience: Duration, question: impl FnOnce() -> F) -> Option<T>
    where
        F: Future<Output = T> + Send + 'static,
    {
        let mut answer = {
            let mut running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
            // One that has ended, by an answer or by a panic, is not waited for: what it said may be old.
            match running.take().filter(|r| r.borrow().is_none() && r.has_changed().is_ok()) {
                Some(receiver) => running.insert(receiver).clone(),
                None => {
                    let (tell, receiver) = watch::channel(None);
                    let question = question();
                    self.tasks.spawn_cancellable(self.name, async move {
                        tell.send_replace(Some(question.await));
                    });
                    running.insert(receiver).clone()
                }
            }
        };
        let told = tokio::time::timeout(patience, answer.wait_for(Option::is_some)).await;
        told.ok()?.ok()?.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[tokio::test(start_paused = true)]
    async fn who_asks_waits_no_longer_than_he_wants_and_asks_once() {
        let tasks = TaskSet::new("test");
        let inquiry = Inquiry::new("a question", tasks.clone());
        let asked = Arc::new(AtomicUsize::new(0));
        let question = || {
            let asked = asked.clone();
            async move {
                let n = asked.fetch_add(1, Ordering::Relaxed);
                tokio::time::sleep(Duration::from_secs(5)).await;
                n
            }
        };
        let begun = tokio::time::Instant::now();
        let (a, b) =
            tokio::join!(inquiry.ask(Duration::from_secs(2), question), inquiry.ask(Duration::from_secs(2), question));
        assert_eq!((a, b, begun.elapsed()), (None, None, Duration::from_secs(2)));
        // The same question, still under way; then a new one.
        assert_eq!(inquiry.ask(Duration::from_secs(60), question).await, Some(0));
        assert_eq!(begun.elapsed(), Duration::from_secs(5));
        assert_eq!(inquiry.ask(Duration::from_secs(60), question).await, Some(1));
        // It ends with the tasks, and a panic in it is no answer.
        assert_eq!(inquiry.ask(Duration::from_secs(1), question).await, None);
        tasks.shutdown().await;
        assert_eq!(inquiry.ask(Duration::from_secs(60), || std::future::ready(7)).await, None);
    }
}
