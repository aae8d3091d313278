//! CheckpointContainer, CheckpointPod and RestorePod: checks what is asked for; the work is the engine's.

use std::collections::BTreeMap;
use std::time::Duration;

use tonic::Status;

use crate::api::v1;
use crate::core::error::{Error, Result};
use crate::cri::{Front, convert};

/// There is none that we know: a caller that relies on one has to hear of it.
fn no_options(options: &BTreeMap<String, String>) -> Result<()> {
    match options.keys().next() {
        None => Ok(()),
        Some(name) => Err(Error::invalid(format!("options: {name:?} is not known"))),
    }
}

impl Front {
    pub(super) async fn checkpoint_of_pod(&self, request: v1::CheckpointPodRequest) -> Result<(), Status> {
        let v1::CheckpointPodRequest { pod_sandbox_id, output_path, container_ids, options } = request;
        no_options(&options)?;
        Ok(self.engine.checkpoint_pod(self.scope, &pod_sandbox_id, &output_path, &container_ids).await?)
    }

    pub(super) async fn restore_of_pod(
        &self,
        request: v1::RestorePodRequest,
    ) -> Result<v1::RestorePodResponse, Status> {
        let v1::RestorePodRequest { checkpoint_path, config, runtime_handler, options, container_configs } = request;
        no_options(&options)?;
        let config = convert::sandbox(config)?;
        let mut containers = Vec::new();
        for container in container_configs {
            let own_namespaces = convert::has_namespace_options(Some(&container));
            let mut container = convert::container(Some(container))?;
            if !own_namespaces {
                container.security.namespaces = config.security.namespaces.clone();
            }
            containers.push(container);
        }
        let done = self.engine.restore_pod(self.owner, &checkpoint_path, config, &runtime_handler, containers).await?;
        let restored = |(name, id)| v1::RestoredContainer { name, container_id: String::from(id) };
        Ok(v1::RestorePodResponse {
            pod_sandbox_id: done.pod.to_string(),
            restored_containers: done.containers.into_iter().map(restored).collect(),
        })
    }

    pub(super) async fn checkpoint(&self, request: v1::CheckpointContainerRequest) -> Result<(), Status> {
        let v1::CheckpointContainerRequest { container_id, location, timeout } = request;
        // 0 is ours to choose.
        let timeout = match u64::try_from(timeout) {
            Ok(0) => None,
            Ok(seconds) => Some(Duration::from_secs(seconds)),
            Err(_) => return Err(Error::invalid(format!("timeout: {timeout} is negative")).into()),
        };
        Ok(self.engine.checkpoint(self.scope, &container_id, &location, timeout).await?)
    }
}
