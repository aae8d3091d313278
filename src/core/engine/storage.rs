//! What the engine does with root file systems beside running containers on them: checks and consistent cuts.
//!
//! Called by `cri` for our own command line. Drivers that can't do it say so by name. A cut freezes the pod's containers
//! for as long as the driver takes; they are thawed whatever comes of it, also when the caller goes away. A crash in between
//! leaves them frozen until the next start.

use std::sync::Arc;

use tokio::sync::{mpsc, oneshot};

use super::{Engine, Scope};
use crate::core::error::{Error, Kind, Result};
use crate::core::ids::{ContainerId, Digest, PodId};
use crate::core::ports::{FileChange, Image, ImageEdit, SendImage, StorageReport};
use crate::core::records::ContainerRecord;
use crate::core::state::ContainerPhase;

/// Pieces of an image that wait for the one who takes them.
const SEND_QUEUE: usize = 8;

impl Engine {
    /// Compares what is stored with what is known. `repair`: before, what no image and no container needs goes; else nothing
    /// changes.
    pub async fn check_storage(&self, repair: bool) -> Result<StorageReport> {
        if repair {
            self.shared.ports.images.collect_layers().await?;
        }
        let mut report = self.shared.ports.layers.check(&|| self.shared.index().claims()).await?;
        let images = self.shared.ports.images.check(true).await?;
        report.problems.extend(images.problems);
        report.notes.extend(images.notes);
        Ok(report)
    }

    /// An image as an OCI layout in a tar; an error is the last piece.
    pub fn export_image(&self, image: Digest, name: Option<String>) -> mpsc::Receiver<Result<bytes::Bytes>> {
        let (sender, receiver) = mpsc::channel(SEND_QUEUE);
        let images = self.shared.ports.images.clone();
        self.shared.tasks.spawn(format!("export {image}"), async move {
            if let Err(e) = images.export(&image, name.as_deref(), sender.clone()).await {
                // Who is gone needs no error.
                let _ = sender.send(Err(e.context(format!("export {image}")))).await;
            }
        });
        receiver
    }

    /// The pod's containers that have a root file system, oldest first.
    pub(super) fn cut_of(&self, scope: Scope, pod: &str) -> Result<Vec<Arc<ContainerRecord>>> {
        let record = self.pod(scope, pod)?;
        self.on_node(&record.id)?;
        let mut all = self.shared.index().containers_of(&record.id);
        all.retain(|c| !matches!(c.phase, ContainerPhase::Creating | ContainerPhase::Removing));
        all.sort_by_key(|c| c.created_at);
        match all.is_empty() {
            true => Err(Error::precondition(format!("pod {}: it has no container", record.id))),
            false => Ok(all),
        }
    }

    /// Refuses a pod whose containers' files the node has not.
    fn on_node(&self, pod: &PodId) -> Result<()> {
        let Some(record) = self.shared.index().pod(pod) else { return Ok(()) };
        if self.shared.backend(&record.handler)?.on_node() {
            return Ok(());
        }
        let what = format!("pod {pod}: its containers' files are not on the node (handler {})", record.handler);
        Err(Error::new(Kind::Unimplemented, what))
    }

    /// Runs `work` to its end even when the caller goes away: nobody else would thaw what it has frozen.
    async fn to_its_end<T: Send + 'static>(
        &self,
        what: String,
        work: impl Future<Output = Result<T>> + Send + 'static,
    ) -> Result<T> {
        let (answer, answered) = oneshot::channel();
        self.shared.tasks.spawn(what, async move {
            let _ = answer.send(work.await);
        });
        answered.await.unwrap_or_else(|_| Err(Error::new(Kind::Aborted, "the daemon ends")))
    }

    /// Runs `work` while the pod's running containers are frozen. To be called in a task that outlives its caller.
    pub(super) async fn frozen<T>(
        &self,
        scope: Scope,
        pod: &str,
        containers: &[Arc<ContainerRecord>],
        work: impl Future<Output = Result<T>>,
    ) -> Result<T> {
        let record = self.pod(scope, pod)?;
        let backend = self.shared.backend(&record.handler)?;
        let _turn = self.shared.freezing.take(&record.id).await;
        let mut frozen = Vec::new();
        let mut failed = None;
        let now = |c: &Arc<ContainerRecord>| self.shared.index().container(&c.id);
        // Those that run by now: it may have been some time until it was this one's turn.
        for c in containers.iter().filter_map(now).filter(|c| c.phase == ContainerPhase::Running) {
            match backend.freeze(&record, &c.id, true).await {
                Ok(()) => frozen.push(c.id.clone()),
                Err(e) => {
                    failed = Some(e.context(format!("freeze container {}", c.id)));
                    break;
                }
            }
        }
        let done = match failed {
            Some(e) => Err(e),
            None => work.await,
        };
        for id in frozen {
            if let Err(e) = backend.freeze(&record, &id, false).await {
                // It ended meanwhile, most likely.
                tracing::warn!(container = id.as_str(), error = e.chain(), "not thawed");
            }
        }
        done
    }

    /// An image as a stream for another node; an error is the last that comes.
    pub fn send_image(&self, wanted: SendImage) -> mpsc::Receiver<Result<bytes::Bytes>> {
        let (pieces, receiver) = mpsc::channel(SEND_QUEUE);
        let images = self.shared.ports.images.clone();
        let what = format!("send image {}", wanted.image);
        self.shared.tasks.spawn_cancellable(what.clone(), async move {
            if let Err(e) = images.send(wanted, pieces.clone()).await {
                // Nobody there to tell: it went away, which is why it failed.
                let _ = pieces.send(Err(e.context(what))).await;
            }
        });
        receiver
    }

    /// Makes an image of what a container has changed of its own, called `reference` (with a tag). A running container is
    /// frozen while its files are read. FailedPrecondition when its image is gone.
    pub async fn commit_container(
        &self,
        scope: Scope,
        id: &str,
        reference: &str,
        edit: ImageEdit,
    ) -> Result<Arc<Image>> {
        let container = self.container(scope, id)?;
        if matches!(container.phase, ContainerPhase::Creating | ContainerPhase::Removing) {
            return Err(Error::precondition(format!("container {}: {}", container.id, container.phase.word())));
        }
        let (engine, reference) = (self.clone(), reference.to_owned());
        let what = format!("commit {}", container.id.short());
        self.to_its_end(what, async move { engine.commit(scope, &container, &reference, &edit).await }).await
    }

    async fn commit(
        &self,
        scope: Scope,
        container: &Arc<ContainerRecord>,
        reference: &str,
        edit: &ImageEdit,
    ) -> Result<Arc<Image>> {
        let named = |e: Error| e.context(format!("commit of container {}", container.id.short()));
        self.on_node(&container.pod).map_err(named)?;
        let (layers, images) = (self.shared.ports.layers.clone(), self.shared.ports.images.clone());
        if images.resolve(&container.image_id.to_string()).is_none() {
            let message = format!("its image {} is not here any more", container.image_id);
            return Err(named(Error::precondition(message)));
        }
        let read = async { images.pack(layers.rootfs_changes(&container.id).await?).await };
        let all = std::slice::from_ref(container);
        let layer = self.frozen(scope, container.pod.as_str(), all, read).await.map_err(named)?;
        images.commit(&container.image_id, layer, edit, reference).await.map_err(named)
    }

    /// One cut of all of the pod's root file systems, called `name`.
    pub async fn snapshot_pod(&self, scope: Scope, pod: &str, name: &str) -> Result<Vec<ContainerId>> {
        let (engine, pod, name) = (self.clone(), pod.to_owned(), name.to_owned());
        self.to_its_end(format!("snapshot of pod {pod}"), async move {
            let containers = engine.cut_of(scope, &pod)?;
            let ids: Vec<ContainerId> = containers.iter().map(|c| c.id.clone()).collect();
            let layers = engine.shared.ports.layers.clone();
            engine.frozen(scope, &pod, &containers, layers.snapshot_rootfs(&ids, &name)).await?;
            Ok(ids)
        })
        .await
    }

    /// Puts all of the pod's root file systems back to the cut `name`. Newer cuts go.
    pub async fn rollback_pod(&self, scope: Scope, pod: &str, name: &str) -> Result<Vec<ContainerId>> {
        let (engine, pod, name) = (self.clone(), pod.to_owned(), name.to_owned());
        self.to_its_end(format!("rollback of pod {pod}"), async move { engine.rollback(scope, &pod, &name).await })
            .await
    }

    async fn rollback(&self, scope: Scope, pod: &str, name: &str) -> Result<Vec<ContainerId>> {
        let containers = self.cut_of(scope, pod)?;
        let layers = self.shared.ports.layers.clone();
        // A container that is newer than the cut stays as it is.
        let mut ids = Vec::new();
        for c in &containers {
            if layers.rootfs_snapshots(&c.id).await?.iter().any(|n| n == name) {
                ids.push(c.id.clone());
            }
        }
        if ids.is_empty() {
            return Err(Error::not_found(format!("pod {pod}: it has no snapshot {name:?}")));
        }
        self.frozen(scope, pod, &containers, layers.rollback_rootfs(&ids, name)).await?;
        Ok(ids)
    }

    /// Names of the pod's cuts, oldest first.
    pub async fn pod_snapshots(&self, scope: Scope, pod: &str) -> Result<Vec<String>> {
        let mut names = Vec::new();
        for c in self.cut_of(scope, pod)? {
            for name in self.shared.ports.layers.rootfs_snapshots(&c.id).await? {
                if !names.contains(&name) {
                    names.push(name);
                }
            }
        }
        Ok(names)
    }

    /// What changed in the pod's root file systems since the cut `from`, or since they were made: by container.
    pub async fn diff_pod(
        &self,
        scope: Scope,
        pod: &str,
        from: Option<&str>,
    ) -> Result<Vec<(String, Vec<FileChange>)>> {
        let mut all = Vec::new();
        for c in self.cut_of(scope, pod)? {
            let changes = self.shared.ports.layers.diff_rootfs(&c.id, from).await;
            all.push((c.config.name.clone(), changes.map_err(|e| e.context(format!("container {}", c.id)))?));
        }
        Ok(all)
    }
}
