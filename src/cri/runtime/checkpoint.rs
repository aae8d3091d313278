//! CheckpointContainer: checks what is asked for; the work is the engine's.

use std::time::Duration;

use tonic::Status;

use crate::api::v1;
use crate::core::error::Error;
use crate::cri::Front;

impl Front {
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
