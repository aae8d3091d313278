//! Whether lxcfs is there, asked so that one that hangs holds nothing up but the containers that would have its files.
//!
//! Its files are a FUSE mount: whoever looks at one waits for its process. That is one thread at a time, and nobody waits long for
//! that; an error by name is for the caller. Used by `launch`; nothing is left by a crash.

use std::future::Future;
use std::pin::Pin;
use std::time::Duration;

use tokio::sync::Mutex;
use tokio::time::timeout;

use crate::core::blocking::blocking;
use crate::core::error::{Error, Kind, Result};

/// As long as it may take to answer.
const ANSWERS: Duration = Duration::from_secs(2);

type Asking = Pin<Box<dyn Future<Output = Result<bool>> + Send>>;

/// What was asked of it.
#[derive(Default)]
pub struct Lxcfs(Mutex<Option<Asking>>);

impl Lxcfs {
    /// What `look` finds, which blocks: its own answer, or that of somebody's who has been asking since before.
    pub async fn ask(&self, look: impl FnOnce() -> bool + Send + 'static) -> Result<bool> {
        self.ask_within(ANSWERS, look).await
    }

    async fn ask_within(&self, time: Duration, look: impl FnOnce() -> bool + Send + 'static) -> Result<bool> {
        let answer = async {
            let mut asking = self.0.lock().await;
            let answer = asking.get_or_insert_with(|| Box::pin(blocking(|| Ok(look())))).await;
            *asking = None;
            answer
        };
        timeout(time, answer).await.unwrap_or_else(|_| {
            let what = format!("lxcfs, mounted at {}, does not answer: start it anew, or unmount it", super::LXCFS);
            Err(Error::new(Kind::Unavailable, what))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn one_that_hangs_is_asked_once_and_told_by_name() {
        let lxcfs = Lxcfs::default();
        assert!(!lxcfs.ask(|| false).await.expect("an answer"));
        let (go, wait) = std::sync::mpsc::channel::<()>();
        let short = Duration::from_millis(50);
        let e = lxcfs.ask_within(short, move || wait.recv().is_ok()).await.expect_err("it hangs");
        assert!(e.kind() == Kind::Unavailable && e.chain().contains("lxcfs"), "{e:?}");
        lxcfs.ask_within(short, || panic!("asked again")).await.expect_err("it hangs still");
        go.send(()).expect("it waits");
        assert!(lxcfs.ask(|| panic!("asked again")).await.expect("the first one's answer"));
        assert!(!lxcfs.ask(|| false).await.expect("an answer"));
    }
}
