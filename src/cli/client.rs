//! A connection to the daemon's local socket, and the few calls that several commands share.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use camino::Utf8Path;
use tonic::transport::{Channel, Endpoint};

use crate::api::local::local_service_client::LocalServiceClient;
use crate::api::v1;
use crate::api::v1::image_service_client::ImageServiceClient;
use crate::api::v1::runtime_service_client::RuntimeServiceClient;

/// Largest answer that is taken, in bytes.
const MAX_MESSAGE: usize = 80 << 20;

/// How long a daemon that is away is waited for, and how often it is asked.
const PATIENCE: Duration = Duration::from_secs(120);
pub(super) const PERIOD: Duration = Duration::from_millis(100);

/// Clients of the three services.
pub struct Client {
    /// CRI: pods and containers, a kubelet's and local ones.
    pub runtime: RuntimeServiceClient<Channel>,
    /// CRI: images.
    pub image: ImageServiceClient<Channel>,
    /// What is beside the CRI.
    pub local: LocalServiceClient<Channel>,
}

impl Client {
    /// Connects; says what to do when no daemon listens.
    pub async fn connect(socket: &Utf8Path) -> Result<Self> {
        let channel = Endpoint::from_shared(format!("unix:{socket}"))
            .with_context(|| format!("socket {socket}"))?
            .connect()
            .await
            // Its layers say the same again and again.
            .map_err(|e| anyhow!("{}", anyhow::Error::from(e).root_cause()))
            .with_context(|| format!("no daemon answers at {socket}: start one with `proxmox-lxcri serve`"))?;
        Ok(Self {
            runtime: RuntimeServiceClient::new(channel.clone()).max_decoding_message_size(MAX_MESSAGE),
            image: ImageServiceClient::new(channel.clone()).max_decoding_message_size(MAX_MESSAGE),
            local: LocalServiceClient::new(channel),
        })
    }

    /// The one container whose id begins with `id`, or whose pod's name or container's name is `id`.
    pub async fn container(&mut self, id: &str) -> Result<v1::Container> {
        let all = self.containers().await?;
        let named = |c: &&v1::Container| c.id.starts_with(id) || c.metadata.as_ref().is_some_and(|m| m.name == id);
        let mut hits = all.iter().filter(named);
        match (hits.next(), hits.next()) {
            (Some(c), None) => Ok(c.clone()),
            (None, _) => bail!("no container {id:?}"),
            (Some(_), Some(_)) => bail!("more than one container is {id:?}: give more of its id"),
        }
    }

    /// What containers may write, by id; 0: as much as there is.
    pub async fn quotas(&mut self) -> Result<std::collections::HashMap<String, u64>> {
        let request = crate::api::local::ListQuotasRequest {};
        let quotas = called(self.local.list_quotas(request).await)?.quotas;
        Ok(quotas.into_iter().map(|q| (q.container, q.bytes)).collect())
    }

    /// All containers.
    pub async fn containers(&mut self) -> Result<Vec<v1::Container>> {
        Ok(called(self.runtime.list_containers(v1::ListContainersRequest::default()).await)?.containers)
    }

    /// Status of a container; a daemon that is being restarted is waited for.
    pub async fn container_status(&mut self, id: &str) -> Result<v1::ContainerStatus> {
        let request = v1::ContainerStatusRequest { container_id: id.to_string(), verbose: false };
        let mut patience = Patience::new();
        loop {
            match self.runtime.container_status(request.clone()).await {
                Err(status) => patience.wait(status).await?,
                answer => break called(answer)?.status.ok_or_else(|| anyhow!("container {id} has no status")),
            }
        }
    }

    /// Stops a container; a daemon that is being restarted is waited for.
    pub async fn stop_container(&mut self, request: v1::StopContainerRequest) -> Result<()> {
        let mut patience = Patience::new();
        while let Err(status) = self.runtime.stop_container(request.clone()).await {
            patience.wait(status).await?;
        }
        Ok(())
    }

    /// Status of a pod.
    pub async fn pod_status(&mut self, id: &str) -> Result<v1::PodSandboxStatus> {
        let request = v1::PodSandboxStatusRequest { pod_sandbox_id: id.to_string(), verbose: false };
        called(self.runtime.pod_sandbox_status(request).await)?.status.ok_or_else(|| anyhow!("pod {id} has no status"))
    }

    /// Whether the pod was made through the local socket, by `run` or its like, and is no kubelet's.
    pub async fn is_local(&mut self, id: &str) -> Result<bool> {
        let request = v1::PodSandboxStatusRequest { pod_sandbox_id: id.to_string(), verbose: true };
        let info = called(self.runtime.pod_sandbox_status(request).await)?.info;
        let info: serde_json::Value =
            info.get("info").map(|text| serde_json::from_str(text)).transpose()?.unwrap_or_default();
        Ok(info["owner"] == "local")
    }

    /// Stops and removes a pod; a daemon that is being restarted is waited for.
    pub async fn remove_pod(&mut self, id: &str) -> Result<()> {
        let pod = v1::RemovePodSandboxRequest { pod_sandbox_id: id.to_string() };
        let mut patience = Patience::new();
        while let Err(status) = self.runtime.remove_pod_sandbox(pod.clone()).await {
            patience.wait(status).await?;
        }
        Ok(())
    }

    /// The image's id; fetched or read first when it is not here.
    pub async fn ensure_image(&mut self, image: &str, keys: Keys) -> Result<String> {
        if is_file_source(image) {
            return Ok(self.load(image, "", keys).await?.id);
        }
        ensure!(keys.is_empty(), "--keyfile and --password-file are for containers (bfc:FILE)");
        let spec = v1::ImageSpec { image: image.to_string(), ..Default::default() };
        let request = v1::ImageStatusRequest { image: Some(spec.clone()), verbose: false };
        if let Some(found) = called(self.image.image_status(request).await)?.image {
            return Ok(found.id);
        }
        let request = v1::PullImageRequest { image: Some(spec), ..Default::default() };
        Ok(called(self.image.pull_image(request).await)?.image_ref)
    }

    /// Takes an image from a file or folder.
    pub async fn load(&mut self, source: &str, name: &str, keys: Keys) -> Result<crate::api::local::LoadedImage> {
        let request = crate::api::local::LoadImageRequest {
            source: source.to_string(),
            name: name.to_string(),
            key_file: keys.key_file,
            password_file: keys.password_file,
            pin: false,
        };
        let images = self.load_all(request).await?;
        images.into_iter().next().ok_or_else(|| anyhow!("{source}: no image in it"))
    }

    /// Takes images from a file or folder, whose path may be relative; says what was lost on the way.
    pub async fn load_all(
        &mut self,
        mut request: crate::api::local::LoadImageRequest,
    ) -> Result<Vec<crate::api::local::LoadedImage>> {
        let (kind, path) = request.source.split_once(':').unwrap_or((&request.source, ""));
        request.source = format!("{kind}:{}", absolute(path)?);
        for path in [&mut request.key_file, &mut request.password_file] {
            if !path.is_empty() {
                // The daemon opens it: a descriptor or a pipe of this process is nothing, or something else, there.
                ensure!(
                    std::path::Path::new(path).is_file(),
                    "{path}: not a regular file, which the daemon could read"
                );
                *path = absolute(path)?;
            }
        }
        let images = called(self.local.load_image(request).await)?.images;
        for image in images.iter().filter(|i| !i.warning.is_empty()) {
            eprintln!("proxmox-lxcri: {}: {}", image.repo_tags.first().unwrap_or(&image.id), image.warning);
        }
        Ok(images)
    }
}

/// Files with the key or password of an encrypted container; "": none.
#[derive(Default)]
pub struct Keys {
    key_file: String,
    password_file: String,
}

impl Keys {
    /// The flags for them.
    pub fn arguments() -> [clap::Arg; 2] {
        [
            ("keyfile", "Key of an encrypted container (bfc:FILE), 32 bytes"),
            ("password-file", "Password of an encrypted container"),
        ]
        .map(|(name, help)| clap::Arg::new(name).long(name).value_name("FILE").help(help))
    }

    /// What the flags say.
    pub fn of(matches: &clap::ArgMatches) -> Self {
        let text = |name| matches.get_one::<String>(name).cloned().unwrap_or_default();
        Self { key_file: text("keyfile"), password_file: text("password-file") }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.key_file.is_empty() && self.password_file.is_empty()
    }
}

fn absolute(path: &str) -> Result<String> {
    let absolute = std::path::absolute(path).with_context(|| format!("path {path:?}"))?;
    absolute.into_os_string().into_string().map_err(|path| anyhow!("path {path:?} is not UTF-8"))
}

/// Whether an image is named by a file and not by a reference.
pub fn is_file_source(image: &str) -> bool {
    ["oci:", "oci-archive:", "docker-archive:", "bfc:"].iter().any(|p| image.starts_with(p))
}

/// For calls that may be made again: a daemon that is away, since it is being restarted, is waited for.
pub struct Patience {
    until: Instant,
    told: bool,
}

impl Patience {
    /// Two minutes from now on.
    #[allow(clippy::new_without_default)] // it begins now, which is no default
    pub fn new() -> Self {
        Self { until: Instant::now() + PATIENCE, told: false }
    }

    /// Returns when the call that failed so may be made again; fails with what will not get better.
    pub async fn wait(&mut self, status: tonic::Status) -> Result<()> {
        if !is_away(&status) || Instant::now() >= self.until {
            return called::<()>(Err(status));
        }
        if !std::mem::replace(&mut self.told, true) {
            eprintln!("proxmox-lxcri: the daemon is away, waiting for it");
        }
        tokio::time::sleep(PERIOD).await;
        Ok(())
    }
}

/// What no daemon has said has a cause; what one says, also that something else is away, has none.
fn is_away(status: &tonic::Status) -> bool {
    std::error::Error::source(status).is_some()
}

/// An answer's content; a failure as its message alone.
pub fn called<T>(answer: Result<tonic::Response<T>, tonic::Status>) -> Result<T> {
    answer.map(tonic::Response::into_inner).map_err(|s| anyhow!("{}", s.message()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_daemon_says_is_no_absence_of_it() {
        assert!(!is_away(&tonic::Status::unavailable("Proxmox does not answer")));
        let refused = std::io::Error::from(std::io::ErrorKind::ConnectionRefused);
        assert!(is_away(&tonic::Status::from_error(Box::new(refused))));
    }
}
