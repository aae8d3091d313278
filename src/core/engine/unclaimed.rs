//! Units outside of this node's own doing that belong to no pod any more: backends look for them again and again, with what is on
//! record at that moment.
//!
//! Begun by `recovery` when all pods are listed. While a record is in quarantine nobody can say what is unclaimed, and nothing is
//! looked for.

use std::sync::Arc;

use super::{Engine, Shared};
use crate::core::backend::Backend;
use crate::core::error::{Error, Result};
use crate::core::ids::PodId;

impl Engine {
    /// From now on backends look for units that belong to no pod, each as often as it says.
    pub(super) fn watch_for_orphans(&self) {
        for backend in &self.shared.ports.backends {
            let Some(every) = backend.orphans_after() else { continue };
            let (shared, backend) = (self.shared.clone(), backend.clone());
            self.shared.tasks.spawn_cancellable(format!("orphans of {}", backend.handler()), async move {
                loop {
                    if let Err(e) = look_for_orphans(&shared, &*backend).await {
                        tracing::warn!(
                            handler = backend.handler(),
                            why = e.chain(),
                            "units of no pod are not looked for"
                        );
                    }
                    tokio::time::sleep(every).await;
                }
            });
        }
    }
}

async fn look_for_orphans(shared: &Arc<Shared>, backend: &dyn Backend) -> Result<()> {
    let unreadable = || Error::precondition("unreadable records are in quarantine: what they own is not known");
    if shared.records.has_quarantined_pods() {
        return Err(unreadable());
    }
    let (pods, records) = (shared.index().all_pods(), shared.records.clone());
    let is_known = move |id: &PodId| match records.has_quarantined_pods() {
        true => Err(unreadable()),
        false => records.has_pod(id),
    };
    backend.look_for_orphans(&pods, &is_known).await
}
