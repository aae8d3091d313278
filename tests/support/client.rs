//! A CRI client with the types of the independent `k8s-cri` crate, for what crictl can't send and for many calls.

use std::path::{Path, PathBuf};

use hyper_util::rt::TokioIo;
use k8s_cri::v1::image_service_client::ImageServiceClient;
use k8s_cri::v1::runtime_service_client::RuntimeServiceClient;
use k8s_cri::v1::{
    ContainerConfig, ContainerMetadata, CreateContainerRequest, ImageSpec, LinuxContainerConfig,
    LinuxContainerSecurityContext, LinuxPodSandboxConfig, LinuxSandboxSecurityContext, NamespaceMode, NamespaceOption,
    PodSandboxConfig, PodSandboxMetadata, PullImageRequest,
};
use proxmox_lxcri::api::v1;
use tonic::transport::{Channel, Endpoint, Uri};

/// Both services over one connection.
#[derive(Clone)]
pub struct Client {
    /// Pods and containers.
    pub runtime: RuntimeServiceClient<Channel>,
    /// Images.
    pub images: ImageServiceClient<Channel>,
}

impl Client {
    /// Connects to a daemon's socket.
    pub async fn connect(socket: &Path) -> Self {
        let channel = channel(socket).await;
        Self { runtime: RuntimeServiceClient::new(channel.clone()), images: ImageServiceClient::new(channel) }
    }

    /// Pulls an image that must be there; gives its id.
    pub async fn pull(&mut self, image: &str) -> String {
        self.images.pull_image(pull_request(image)).await.expect("PullImage").into_inner().image_ref
    }
}

/// A connection to a daemon's socket.
async fn channel(socket: &Path) -> Channel {
    let socket: PathBuf = socket.to_owned();
    let connect = tower::service_fn(move |_: Uri| {
        let socket = socket.clone();
        async move { tokio::net::UnixStream::connect(socket).await.map(TokioIo::new) }
    });
    let endpoint = Endpoint::from_static("http://localhost");
    endpoint.connect_with_connector(connect).await.expect("a connection to the daemon")
}

/// Our own wire types: calls that are newer than `k8s-cri`'s.
pub async fn newer(socket: &Path) -> v1::runtime_service_client::RuntimeServiceClient<Channel> {
    v1::runtime_service_client::RuntimeServiceClient::new(channel(socket).await)
}

/// A request to pull without credentials.
pub fn pull_request(image: &str) -> PullImageRequest {
    PullImageRequest { image: Some(image_spec(image)), ..Default::default() }
}

/// An image by name.
pub fn image_spec(image: &str) -> ImageSpec {
    ImageSpec { image: image.to_owned(), ..Default::default() }
}

/// A pod with a name of its own.
pub fn pod(name: &str, logs: &Path) -> PodSandboxConfig {
    PodSandboxConfig {
        metadata: Some(PodSandboxMetadata {
            name: name.to_owned(),
            uid: format!("uid-{name}"),
            namespace: "tests".into(),
            attempt: 0,
        }),
        hostname: name.to_owned(),
        log_directory: logs.join(name).display().to_string(),
        linux: Some(LinuxPodSandboxConfig {
            cgroup_parent: "/tests".into(),
            security_context: Some(LinuxSandboxSecurityContext {
                namespace_options: Some(own_pid_namespace()),
                ..Default::default()
            }),
            ..Default::default()
        }),
        ..Default::default()
    }
}

/// A container that runs a shell script.
pub fn container(name: &str, image: &str, script: &str) -> ContainerConfig {
    ContainerConfig {
        metadata: Some(ContainerMetadata { name: name.to_owned(), attempt: 0 }),
        image: Some(image_spec(image)),
        command: ["/bin/sh", "-c", script].map(String::from).to_vec(),
        log_path: format!("{name}.log"),
        linux: Some(LinuxContainerConfig {
            security_context: Some(LinuxContainerSecurityContext {
                namespace_options: Some(own_pid_namespace()),
                ..Default::default()
            }),
            ..Default::default()
        }),
        ..Default::default()
    }
}

/// What the kubelet asks for: network and IPC are the pod's, PIDs the container's.
fn own_pid_namespace() -> NamespaceOption {
    NamespaceOption { pid: NamespaceMode::Container.into(), ..Default::default() }
}

/// The request to create a container in a pod.
pub fn create_request(pod_id: &str, config: ContainerConfig, pod: &PodSandboxConfig) -> CreateContainerRequest {
    CreateContainerRequest {
        pod_sandbox_id: pod_id.to_owned(),
        config: Some(config),
        sandbox_config: Some(pod.clone()),
    }
}

/// Runs a test's calls.
pub fn block_on<T>(work: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .expect("a tokio runtime")
        .block_on(work)
}
