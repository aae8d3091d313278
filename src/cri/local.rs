//! LocalService: what our own command line needs beside the CRI. On the local socket only.
//!
//! Converts and asks the engine; `status` makes codes of its errors. No state.

use std::os::unix::ffi::OsStrExt;

use std::time::Duration;

use futures::StreamExt;
use futures::future::BoxFuture;
use tonic::{Request, Response, Status};

use super::Front;
use super::image::source;
use crate::api::local;
use crate::core::engine::Fork;
use crate::core::error::Error;
use crate::core::ids::ContainerId;
use crate::core::ports::{ChangeKind, Image, ImageEdit, KeyPath, LayerState, PLAIN_ROOTFS, SendImage};
use crate::core::progress::{LayerProgress, PullProgress, PullView};

/// How often one who waits for a pull is told how far it is.
const LOOK: Duration = Duration::from_millis(100);

/// A pull under way.
type Pull = BoxFuture<'static, crate::core::error::Result<std::sync::Arc<Image>>>;

fn fetched(view: &PullView) -> Vec<local::LayerFetch> {
    let layers = view.get().map_or(&[][..], PullProgress::layers);
    let fetch = |l: &LayerProgress| local::LayerFetch {
        digest: l.digest.to_string(),
        total: l.total,
        fetched: l.fetched(),
        done: l.done(),
    };
    layers.iter().map(fetch).collect()
}

type Answer<T> = std::result::Result<Response<T>, Status>;

fn containers(ids: Vec<ContainerId>) -> Response<local::SnapshotPodResponse> {
    Response::new(local::SnapshotPodResponse { containers: ids.into_iter().map(String::from).collect() })
}

fn told(image: &Image) -> local::LoadedImage {
    local::LoadedImage {
        id: image.id.to_string(),
        repo_tags: image.repo_tags.clone(),
        repo_digests: image.repo_digests.clone(),
        size: image.size,
        warning: match image.config.labels.get(PLAIN_ROOTFS) {
            Some(what) => format!("a plain root file system: {what}"),
            None => String::new(),
        },
    }
}

impl Front {
    fn image(&self, reference: &str) -> std::result::Result<std::sync::Arc<Image>, Error> {
        let none = || Error::not_found(format!("image {reference} is not here"));
        self.engine.images().resolve(reference).ok_or_else(none)
    }
}

#[tonic::async_trait]
impl local::local_service_server::LocalService for Front {
    async fn load_image(&self, request: Request<local::LoadImageRequest>) -> Answer<local::LoadImageResponse> {
        let request = request.into_inner();
        let name = (!request.name.is_empty()).then_some(request.name.as_str());
        let key = match (request.key_file.as_str(), request.password_file.as_str()) {
            ("", "") => None,
            (path, "") => Some(KeyPath::KeyFile(path.into())),
            ("", path) => Some(KeyPath::PasswordFile(path.into())),
            _ => return Err(Error::invalid("a key file and a password file: one of them").into()),
        };
        let mut images = self.engine.images().load(&source(&request.source, key)?, name).await?;
        if request.pin {
            for image in &mut images {
                *image = self.engine.images().set_pinned(&image.id, true).await?;
            }
        }
        let images = images.iter().map(|i| told(i)).collect();
        Ok(Response::new(local::LoadImageResponse { images }))
    }

    type PullImageStream = futures::stream::BoxStream<'static, std::result::Result<local::PullImageProgress, Status>>;

    async fn pull_image(&self, request: Request<local::PullImageRequest>) -> Answer<Self::PullImageStream> {
        let (images, image) = (self.engine.images().clone(), request.into_inner().image);
        let view = std::sync::Arc::<PullView>::default();
        let shown = view.clone();
        let pull: Pull = Box::pin(async move { images.pull_shown(&image, shown).await });
        // As long as it is under way, a message at each look.
        let next = |state: Option<(Pull, std::sync::Arc<PullView>)>| async move {
            let (mut pull, view) = state?;
            let done = tokio::time::timeout(LOOK, &mut pull).await;
            let layers = fetched(&view);
            let message = |image| local::PullImageProgress { layers, image };
            match done {
                Err(_) => Some((Ok(message(None)), Some((pull, view)))),
                Ok(Ok(image)) => Some((Ok(message(Some(told(&image)))), None)),
                Ok(Err(e)) => Some((Err(Status::from(e)), None)),
            }
        };
        Ok(Response::new(Box::pin(futures::stream::unfold(Some((pull, view)), next))))
    }

    type ExportImageStream = futures::stream::BoxStream<'static, std::result::Result<local::ImagePiece, Status>>;

    async fn export_image(&self, request: Request<local::ExportImageRequest>) -> Answer<Self::ExportImageStream> {
        let request = request.into_inner();
        let id = self.image(&request.image)?.id.clone();
        // An id is no name.
        let name = Some(request.image).filter(|name| name.contains(['/', ':']) && !name.contains("sha256:"));
        let pieces = self.engine.export_image(id, name);
        let piece = |p: crate::core::error::Result<bytes::Bytes>| match p {
            Ok(data) => Ok(local::ImagePiece { data: data.into() }),
            Err(e) => Err(Status::from(e)),
        };
        Ok(Response::new(Box::pin(tokio_stream::wrappers::ReceiverStream::new(pieces).map(piece))))
    }

    async fn push_image(&self, request: Request<local::PushImageRequest>) -> Answer<local::PushImageResponse> {
        let request = request.into_inner();
        let pushed = self.engine.images().push(&request.source, &request.target).await?;
        Ok(Response::new(local::PushImageResponse {
            name: pushed.name,
            digest: pushed.digest.to_string(),
            from: pushed.from,
            sent: pushed.sent.0 as u64,
            bytes: pushed.sent.1,
            there: pushed.there as u64,
        }))
    }

    async fn tag_image(&self, request: Request<local::TagImageRequest>) -> Answer<local::TagImageResponse> {
        let request = request.into_inner();
        let image = self.image(&request.image)?;
        let image = self.engine.images().tag(&image.id, &request.name).await?;
        Ok(Response::new(local::TagImageResponse { image: Some(told(&image)) }))
    }

    async fn pin_image(&self, request: Request<local::PinImageRequest>) -> Answer<local::PinImageResponse> {
        let request = request.into_inner();
        let image = self.image(&request.image)?;
        let image = self.engine.images().set_pinned(&image.id, request.pinned).await?;
        Ok(Response::new(local::PinImageResponse { image: Some(told(&image)) }))
    }

    async fn storage_check(&self, request: Request<local::StorageCheckRequest>) -> Answer<local::StorageCheckResponse> {
        let report = self.engine.check_storage(request.into_inner().repair).await?;
        Ok(Response::new(local::StorageCheckResponse {
            driver: self.engine.layers().driver().into(),
            problems: report.problems,
            notes: report.notes,
        }))
    }

    async fn list_quotas(&self, _: Request<local::ListQuotasRequest>) -> Answer<local::ListQuotasResponse> {
        let containers = self.engine.containers(self.scope);
        let quota = |c: &std::sync::Arc<crate::core::records::ContainerRecord>| local::Quota {
            container: c.id.to_string(),
            bytes: c.quota,
        };
        Ok(Response::new(local::ListQuotasResponse { quotas: containers.iter().map(quota).collect() }))
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

    async fn fork_pod(&self, request: Request<local::ForkPodRequest>) -> Answer<local::ForkPodResponse> {
        let local::ForkPodRequest { pod, cut, name, log_directory } = request.into_inner();
        let given = |text: String| (!text.is_empty()).then_some(text);
        let log_directory = match given(log_directory).map(camino::Utf8PathBuf::from) {
            Some(path) if !path.is_absolute() || path.as_str().contains('\0') => {
                return Err(Error::invalid(format!("log_directory: {path:?} is not an absolute path")).into());
            }
            other => other,
        };
        let fork = Fork { cut: given(cut), name: given(name), log_directory };
        let forked = self.engine.fork_pod(self.scope, &pod, fork).await?;
        let containers = forked.containers.into_iter().map(String::from).collect();
        Ok(Response::new(local::ForkPodResponse { pod: forked.pod.to_string(), containers }))
    }

    async fn commit_container(
        &self,
        request: Request<local::CommitContainerRequest>,
    ) -> Answer<local::CommitContainerResponse> {
        let r = request.into_inner();
        let cmd = r.set_cmd.then_some(r.cmd);
        let edit = ImageEdit { author: r.author, message: r.message, cmd, env: r.env };
        let image = self.engine.commit_container(self.scope, &r.container, &r.reference, edit).await?;
        Ok(Response::new(local::CommitContainerResponse { image: Some(told(&image)) }))
    }

    type SendImageStream = futures::stream::BoxStream<'static, std::result::Result<local::ImagePiece, Status>>;

    async fn send_image(&self, request: Request<local::SendImageRequest>) -> Answer<Self::SendImageStream> {
        let local::SendImageRequest { image, since, have } = request.into_inner();
        let parse = |l: local::LayerState| {
            let chain = l.chain.parse().map_err(|_| Error::invalid(format!("have: {:?} is no layer", l.chain)))?;
            Ok(LayerState { chain, state: l.state, part: (!l.part.is_empty()).then_some(l.part) })
        };
        let have = have.into_iter().map(parse).collect::<std::result::Result<Vec<_>, Error>>()?;
        let wanted = SendImage { image, since: (!since.is_empty()).then_some(since), have };
        let mut pieces = self.engine.send_image(wanted);
        // The first piece comes with the answer: what can't be sent at all is an error and no stream.
        let first = pieces.recv().await.ok_or_else(|| Error::internal("an image without a beginning"))??;
        let rest = tokio_stream::wrappers::ReceiverStream::new(pieces);
        let all = tokio_stream::once(Ok(first)).chain(rest);
        let piece = |p: crate::core::error::Result<bytes::Bytes>| match p {
            Ok(data) => Ok(local::ImagePiece { data: data.into() }),
            Err(e) => Err(Status::from(e)),
        };
        Ok(Response::new(Box::pin(all.map(piece))))
    }

    async fn receive_image(
        &self,
        request: Request<tonic::Streaming<local::ImagePiece>>,
    ) -> Answer<local::ReceiveImageResponse> {
        let pieces = request.into_inner().map(|piece| {
            piece
                .map(|p| bytes::Bytes::from(p.data))
                .map_err(|status| std::io::Error::other(status.message().to_owned()))
        });
        let reader = tokio_util::io::StreamReader::new(pieces);
        let image = self.engine.images().receive(Box::new(reader)).await?;
        Ok(Response::new(local::ReceiveImageResponse { image: Some(told(&image)) }))
    }

    async fn list_layers(&self, _: Request<local::ListLayersRequest>) -> Answer<local::ListLayersResponse> {
        let wire = |l: LayerState| local::LayerState {
            chain: l.chain.to_string(),
            state: l.state,
            part: l.part.unwrap_or_default(),
        };
        let layers = self.engine.layers().layer_states()?.into_iter().map(wire).collect();
        Ok(Response::new(local::ListLayersResponse { layers }))
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

    async fn dump(&self, _: Request<local::DumpRequest>) -> Answer<local::DumpResponse> {
        let json = serde_json::json!({
            "version": env!("CARGO_PKG_VERSION"),
            "process": process(),
            "engine": self.engine.dump(),
        });
        Ok(Response::new(local::DumpResponse { json: json.to_string() }))
    }

    async fn set_log_level(&self, request: Request<local::SetLogLevelRequest>) -> Answer<local::SetLogLevelResponse> {
        let level = request.into_inner().level;
        if !level.is_empty() {
            let before = self.level.get();
            self.level.set(&level)?;
            tracing::warn!(level, before, "the level of the log was changed by a command");
        }
        Ok(Response::new(local::SetLogLevelResponse { level: self.level.get() }))
    }
}

/// What the kernel says of this process.
fn process() -> serde_json::Value {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let field = |name: &str| {
        let value = status.lines().find_map(|l| l.strip_prefix(name)?.strip_prefix(':'))?;
        value.split_whitespace().next()?.parse::<u64>().ok()
    };
    serde_json::json!({
        "pid": std::process::id(),
        "threads": field("Threads"),
        "residentKiB": field("VmRSS"),
        "openFiles": std::fs::read_dir("/proc/self/fd").ok().map(Iterator::count),
        "openFilesLimit": rustix::process::getrlimit(rustix::process::Resource::Nofile).current,
    })
}
