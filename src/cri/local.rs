//! LocalService: what our own command line needs beside the CRI. On the local socket only.
//!
//! Converts and asks the engine; `status` makes codes of its errors. No state.

use std::os::unix::ffi::OsStrExt;

use tonic::{Request, Response, Status};

use super::Front;
use super::image::source;
use crate::api::local;
use crate::core::ids::ContainerId;
use crate::core::ports::ChangeKind;

type Answer<T> = std::result::Result<Response<T>, Status>;

fn containers(ids: Vec<ContainerId>) -> Response<local::SnapshotPodResponse> {
    Response::new(local::SnapshotPodResponse { containers: ids.into_iter().map(String::from).collect() })
}

#[tonic::async_trait]
impl local::local_service_server::LocalService for Front {
    async fn load_image(&self, request: Request<local::LoadImageRequest>) -> Answer<local::LoadImageResponse> {
        let request = request.into_inner();
        let name = (!request.name.is_empty()).then_some(request.name.as_str());
        let images = self.engine.images().load(&source(&request.source)?, name).await?;
        let images = images
            .iter()
            .map(|i| local::LoadedImage {
                id: i.id.to_string(),
                repo_tags: i.repo_tags.clone(),
                repo_digests: i.repo_digests.clone(),
                size: i.size,
            })
            .collect();
        Ok(Response::new(local::LoadImageResponse { images }))
    }

    async fn storage_check(&self, _: Request<local::StorageCheckRequest>) -> Answer<local::StorageCheckResponse> {
        let report = self.engine.check_storage().await?;
        Ok(Response::new(local::StorageCheckResponse {
            driver: self.engine.layers().driver().into(),
            problems: report.problems,
            notes: report.notes,
        }))
    }

    async fn snapshot_pod(&self, request: Request<local::SnapshotPodRequest>) -> Answer<local::SnapshotPodResponse> {
        let request = request.into_inner();
        Ok(containers(self.engine.snapshot_pod(self.scope, &request.pod, &request.name).await?))
    }

    async fn rollback_pod(&self, request: Request<local::SnapshotPodRequest>) -> Answer<local::SnapshotPodResponse> {
        let request = request.into_inner();
        Ok(containers(self.engine.rollback_pod(self.scope, &request.pod, &request.name).await?))
    }

    async fn pod_snapshots(&self, request: Request<local::PodSnapshotsRequest>) -> Answer<local::PodSnapshotsResponse> {
        let names = self.engine.pod_snapshots(self.scope, &request.into_inner().pod).await?;
        Ok(Response::new(local::PodSnapshotsResponse { names }))
    }

    type DiffPodStream = tokio_stream::Iter<std::vec::IntoIter<std::result::Result<local::PodChange, Status>>>;

    async fn diff_pod(&self, request: Request<local::DiffPodRequest>) -> Answer<Self::DiffPodStream> {
        let request = request.into_inner();
        let from = (!request.from.is_empty()).then_some(request.from.as_str());
        let mut changes = Vec::new();
        for (container, list) in self.engine.diff_pod(self.scope, &request.pod, from).await? {
            changes.extend(list.into_iter().map(|change| {
                let kind = match change.kind {
                    ChangeKind::Added => "A",
                    ChangeKind::Changed => "C",
                    ChangeKind::Deleted => "D",
                };
                let path = change.path.as_os_str().as_bytes().to_vec();
                Ok(local::PodChange { container: container.clone(), kind: kind.into(), path })
            }));
        }
        Ok(Response::new(tokio_stream::iter(changes)))
    }
}
