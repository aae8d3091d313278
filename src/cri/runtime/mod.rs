//! The CRI RuntimeService: one short method an RPC; what takes more than a few lines is in the modules below.

mod checkpoint;
mod events;
mod lists;
mod metrics;
mod node;
mod stats;
mod streams;

use std::time::Duration;

use tonic::{Request, Response, Status};

use super::image::{CHUNK, stream_of};
use super::{Front, convert, to_wire};
use crate::api::v1;
use crate::core::error::Error;

type Answer<T> = std::result::Result<Response<T>, Status>;
type ListStream<T> = tokio_stream::Iter<std::vec::IntoIter<std::result::Result<T, Status>>>;

#[tonic::async_trait]
impl v1::runtime_service_server::RuntimeService for Front {
    async fn version(&self, _: Request<v1::VersionRequest>) -> Answer<v1::VersionResponse> {
        Ok(Response::new(node::version()))
    }

    async fn status(&self, request: Request<v1::StatusRequest>) -> Answer<v1::StatusResponse> {
        Ok(Response::new(self.node_status(request.into_inner().verbose).await))
    }

    async fn runtime_config(&self, _: Request<v1::RuntimeConfigRequest>) -> Answer<v1::RuntimeConfigResponse> {
        Ok(Response::new(self.node_runtime_config()))
    }

    // ------------------------------------------------------------------------------------------ sandboxes

    async fn run_pod_sandbox(&self, request: Request<v1::RunPodSandboxRequest>) -> Answer<v1::RunPodSandboxResponse> {
        let request = request.into_inner();
        let config = convert::sandbox(request.config)?;
        let id = self.engine.run_sandbox(self.owner, config, &request.runtime_handler).await?;
        Ok(Response::new(v1::RunPodSandboxResponse { pod_sandbox_id: id.to_string() }))
    }

    async fn stop_pod_sandbox(
        &self,
        request: Request<v1::StopPodSandboxRequest>,
    ) -> Answer<v1::StopPodSandboxResponse> {
        self.engine.stop_sandbox(self.scope, &request.into_inner().pod_sandbox_id).await?;
        Ok(Response::new(v1::StopPodSandboxResponse {}))
    }

    async fn remove_pod_sandbox(
        &self,
        request: Request<v1::RemovePodSandboxRequest>,
    ) -> Answer<v1::RemovePodSandboxResponse> {
        self.engine.remove_sandbox(self.scope, &request.into_inner().pod_sandbox_id).await?;
        Ok(Response::new(v1::RemovePodSandboxResponse {}))
    }

    async fn pod_sandbox_status(
        &self,
        request: Request<v1::PodSandboxStatusRequest>,
    ) -> Answer<v1::PodSandboxStatusResponse> {
        let request = request.into_inner();
        Ok(Response::new(self.pod_status(&request.pod_sandbox_id, request.verbose)?))
    }

    async fn list_pod_sandbox(
        &self,
        request: Request<v1::ListPodSandboxRequest>,
    ) -> Answer<v1::ListPodSandboxResponse> {
        Ok(Response::new(v1::ListPodSandboxResponse { items: self.list_pods(request.into_inner().filter) }))
    }

    type StreamPodSandboxesStream = ListStream<v1::StreamPodSandboxesResponse>;

    async fn stream_pod_sandboxes(
        &self,
        request: Request<v1::StreamPodSandboxesRequest>,
    ) -> Answer<Self::StreamPodSandboxesStream> {
        let pods = self.list_pods(request.into_inner().filter);
        let message = |c: &[v1::PodSandbox]| v1::StreamPodSandboxesResponse { pod_sandboxes: c.to_vec() };
        Ok(stream_of(pods.chunks(CHUNK).map(message).collect()))
    }

    // ------------------------------------------------------------------------------------------ containers

    async fn create_container(
        &self,
        request: Request<v1::CreateContainerRequest>,
    ) -> Answer<v1::CreateContainerResponse> {
        let request = request.into_inner();
        let own_namespaces = convert::has_namespace_options(request.config.as_ref());
        let mut config = convert::container(request.config)?;
        if !own_namespaces {
            // A container that says nothing of namespaces gets those that its pod was made with.
            config.security.namespaces =
                self.engine.pod(self.scope, &request.pod_sandbox_id)?.config.security.namespaces.clone();
        }
        let id = self.engine.create_container(self.scope, &request.pod_sandbox_id, config).await?;
        Ok(Response::new(v1::CreateContainerResponse { container_id: id.to_string() }))
    }

    async fn start_container(&self, request: Request<v1::StartContainerRequest>) -> Answer<v1::StartContainerResponse> {
        self.engine.start_container(self.scope, &request.into_inner().container_id).await?;
        Ok(Response::new(v1::StartContainerResponse {}))
    }

    async fn stop_container(&self, request: Request<v1::StopContainerRequest>) -> Answer<v1::StopContainerResponse> {
        let request = request.into_inner();
        let grace = Duration::from_secs(request.timeout.max(0) as u64);
        self.engine.stop_container(self.scope, &request.container_id, grace).await?;
        Ok(Response::new(v1::StopContainerResponse {}))
    }

    async fn remove_container(
        &self,
        request: Request<v1::RemoveContainerRequest>,
    ) -> Answer<v1::RemoveContainerResponse> {
        self.engine.remove_container(self.scope, &request.into_inner().container_id).await?;
        Ok(Response::new(v1::RemoveContainerResponse {}))
    }

    async fn list_containers(&self, request: Request<v1::ListContainersRequest>) -> Answer<v1::ListContainersResponse> {
        Ok(Response::new(v1::ListContainersResponse { containers: self.list_cris(request.into_inner().filter) }))
    }

    type StreamContainersStream = ListStream<v1::StreamContainersResponse>;

    async fn stream_containers(
        &self,
        request: Request<v1::StreamContainersRequest>,
    ) -> Answer<Self::StreamContainersStream> {
        let all = self.list_cris(request.into_inner().filter);
        let message = |c: &[v1::Container]| v1::StreamContainersResponse { containers: c.to_vec() };
        Ok(stream_of(all.chunks(CHUNK).map(message).collect()))
    }

    async fn container_status(
        &self,
        request: Request<v1::ContainerStatusRequest>,
    ) -> Answer<v1::ContainerStatusResponse> {
        let request = request.into_inner();
        let container = self.engine.container(self.scope, &request.container_id)?;
        let mut answer =
            v1::ContainerStatusResponse { status: Some(to_wire::container_status(&container)), ..Default::default() };
        if request.verbose {
            answer.info.insert("info".into(), self.container_info(&container));
        }
        Ok(Response::new(answer))
    }

    async fn reopen_container_log(
        &self,
        request: Request<v1::ReopenContainerLogRequest>,
    ) -> Answer<v1::ReopenContainerLogResponse> {
        self.engine.reopen_log(self.scope, &request.into_inner().container_id).await?;
        Ok(Response::new(v1::ReopenContainerLogResponse {}))
    }

    async fn exec_sync(&self, request: Request<v1::ExecSyncRequest>) -> Answer<v1::ExecSyncResponse> {
        let request = request.into_inner();
        let timeout = (request.timeout > 0).then(|| Duration::from_secs(request.timeout as u64));
        let done = self.engine.exec_sync(self.scope, &request.container_id, &request.cmd, timeout).await?;
        Ok(Response::new(v1::ExecSyncResponse { stdout: done.stdout, stderr: done.stderr, exit_code: done.exit_code }))
    }

    async fn exec(&self, request: Request<v1::ExecRequest>) -> Answer<v1::ExecResponse> {
        Ok(Response::new(v1::ExecResponse { url: self.exec_url(request.into_inner())? }))
    }

    async fn attach(&self, request: Request<v1::AttachRequest>) -> Answer<v1::AttachResponse> {
        Ok(Response::new(v1::AttachResponse { url: self.attach_url(request.into_inner())? }))
    }

    async fn port_forward(&self, request: Request<v1::PortForwardRequest>) -> Answer<v1::PortForwardResponse> {
        Ok(Response::new(v1::PortForwardResponse { url: self.port_forward_url(request.into_inner())? }))
    }

    // ------------------------------------------------------------------------------------------ limits, use, events

    async fn update_container_resources(
        &self,
        request: Request<v1::UpdateContainerResourcesRequest>,
    ) -> Answer<v1::UpdateContainerResourcesResponse> {
        let request = request.into_inner();
        if request.windows.is_some() {
            return Err(Error::invalid("windows limits on a Linux node").into());
        }
        let asked = convert::resources(request.linux.unwrap_or_default());
        self.engine.update_container(self.scope, &request.container_id, asked).await?;
        Ok(Response::new(v1::UpdateContainerResourcesResponse {}))
    }

    async fn container_stats(&self, request: Request<v1::ContainerStatsRequest>) -> Answer<v1::ContainerStatsResponse> {
        let stats = self.stats_of_container(&request.into_inner().container_id).await?;
        Ok(Response::new(v1::ContainerStatsResponse { stats: Some(stats) }))
    }

    async fn list_container_stats(
        &self,
        request: Request<v1::ListContainerStatsRequest>,
    ) -> Answer<v1::ListContainerStatsResponse> {
        let stats = self.list_stats(request.into_inner().filter).await?;
        Ok(Response::new(v1::ListContainerStatsResponse { stats }))
    }

    type StreamContainerStatsStream = ListStream<v1::StreamContainerStatsResponse>;

    async fn stream_container_stats(
        &self,
        request: Request<v1::StreamContainerStatsRequest>,
    ) -> Answer<Self::StreamContainerStatsStream> {
        let all = self.list_stats(request.into_inner().filter).await?;
        let message = |c: &[v1::ContainerStats]| v1::StreamContainerStatsResponse { container_stats: c.to_vec() };
        Ok(stream_of(all.chunks(CHUNK).map(message).collect()))
    }

    async fn pod_sandbox_stats(
        &self,
        request: Request<v1::PodSandboxStatsRequest>,
    ) -> Answer<v1::PodSandboxStatsResponse> {
        let stats = self.stats_of_pod(&request.into_inner().pod_sandbox_id).await?;
        Ok(Response::new(v1::PodSandboxStatsResponse { stats: Some(stats) }))
    }

    async fn list_pod_sandbox_stats(
        &self,
        request: Request<v1::ListPodSandboxStatsRequest>,
    ) -> Answer<v1::ListPodSandboxStatsResponse> {
        let stats = self.list_pod_stats(request.into_inner().filter).await?;
        Ok(Response::new(v1::ListPodSandboxStatsResponse { stats }))
    }

    type StreamPodSandboxStatsStream = ListStream<v1::StreamPodSandboxStatsResponse>;

    async fn stream_pod_sandbox_stats(
        &self,
        request: Request<v1::StreamPodSandboxStatsRequest>,
    ) -> Answer<Self::StreamPodSandboxStatsStream> {
        let all = self.list_pod_stats(request.into_inner().filter).await?;
        let message = |p: &[v1::PodSandboxStats]| v1::StreamPodSandboxStatsResponse { pod_sandbox_stats: p.to_vec() };
        Ok(stream_of(all.chunks(CHUNK).map(message).collect()))
    }

    async fn update_runtime_config(
        &self,
        request: Request<v1::UpdateRuntimeConfigRequest>,
    ) -> Answer<v1::UpdateRuntimeConfigResponse> {
        let network = request.into_inner().runtime_config.and_then(|c| c.network_config).unwrap_or_default();
        let cidrs = convert::pod_cidrs(&network.pod_cidr)?;
        if !cidrs.is_empty() {
            self.engine.set_pod_cidrs(&cidrs).await?;
        }
        Ok(Response::new(v1::UpdateRuntimeConfigResponse {}))
    }

    async fn checkpoint_container(
        &self,
        request: Request<v1::CheckpointContainerRequest>,
    ) -> Answer<v1::CheckpointContainerResponse> {
        self.checkpoint(request.into_inner()).await?;
        Ok(Response::new(v1::CheckpointContainerResponse {}))
    }

    async fn checkpoint_pod(&self, request: Request<v1::CheckpointPodRequest>) -> Answer<v1::CheckpointPodResponse> {
        self.checkpoint_of_pod(request.into_inner()).await?;
        Ok(Response::new(v1::CheckpointPodResponse {}))
    }

    async fn restore_pod(&self, request: Request<v1::RestorePodRequest>) -> Answer<v1::RestorePodResponse> {
        Ok(Response::new(self.restore_of_pod(request.into_inner()).await?))
    }

    type GetContainerEventsStream = events::Events;

    async fn get_container_events(&self, _: Request<v1::GetEventsRequest>) -> Answer<Self::GetContainerEventsStream> {
        Ok(Response::new(self.event_stream()))
    }

    async fn list_metric_descriptors(
        &self,
        _: Request<v1::ListMetricDescriptorsRequest>,
    ) -> Answer<v1::ListMetricDescriptorsResponse> {
        Ok(Response::new(v1::ListMetricDescriptorsResponse { descriptors: metrics::descriptors() }))
    }

    async fn list_pod_sandbox_metrics(
        &self,
        _: Request<v1::ListPodSandboxMetricsRequest>,
    ) -> Answer<v1::ListPodSandboxMetricsResponse> {
        Ok(Response::new(v1::ListPodSandboxMetricsResponse { pod_metrics: self.list_metrics().await? }))
    }

    type StreamPodSandboxMetricsStream = ListStream<v1::StreamPodSandboxMetricsResponse>;

    async fn stream_pod_sandbox_metrics(
        &self,
        _: Request<v1::StreamPodSandboxMetricsRequest>,
    ) -> Answer<Self::StreamPodSandboxMetricsStream> {
        let all = self.list_metrics().await?;
        let message =
            |p: &[v1::PodSandboxMetrics]| v1::StreamPodSandboxMetricsResponse { pod_sandbox_metrics: p.to_vec() };
        // A pod has some hundred samples.
        Ok(stream_of(all.chunks(CHUNK / 10).map(message).collect()))
    }

    async fn update_pod_sandbox_resources(
        &self,
        request: Request<v1::UpdatePodSandboxResourcesRequest>,
    ) -> Answer<v1::UpdatePodSandboxResourcesResponse> {
        let request = request.into_inner();
        let resources = convert::resources(request.resources.unwrap_or_default());
        let overhead = convert::resources(request.overhead.unwrap_or_default());
        self.engine.update_sandbox(self.scope, &request.pod_sandbox_id, resources, overhead).await?;
        Ok(Response::new(v1::UpdatePodSandboxResourcesResponse {}))
    }
}
