//! Work that blocks (files, mounts, namespaces) beside the async threads.

use super::error::{Error, Result};

/// Runs `work` on a thread for blocking work; a panic in it is an Internal error.
pub async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    // What it logs is of the pod that it works for.
    let span = tracing::Span::current();
    tokio::task::spawn_blocking(move || span.in_scope(work))
        .await
        .unwrap_or_else(|e| Err(Error::internal(format!("blocking work: {e}"))))
}
