//! CheckpointPod: the processes and files of a pod's containers at one moment, as a folder of files.
//!
//! ```text
//! pod.json        which containers, of which image, in which folder: written last, without it there is no checkpoint
//! c0/checkpoint/  the images of criu        c0/rootfs.tar   what the container has changed, as an image layer
//! c0/spec.dump    the OCI spec              c0/criu.conf    names of its streams in the images
//! ```
//! All containers are frozen, dumped, and thawed when the last of them is. Their files are of the same moment: by one snapshot where
//! the driver has them, which is read when the containers run again, else read while they are frozen. The pod goes on, also
//! after a failure. A container that ends meanwhile fails it. A caller that goes away ends it at the next step.
//! The memory of the processes is in it, with every secret that they hold: all of it is root's alone. What was begun is removed
//! on failure; a crash leaves a folder without `pod.json`, which the next start empties.

use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::sync::Arc;

use camino::{Utf8Path, Utf8PathBuf};
use serde::{Deserialize, Serialize};

use super::checkpoint::{Busy, LAST, make_folder};
use super::{Engine, Scope};
use crate::core::backend::CheckpointContext;
use crate::core::blocking::blocking;
use crate::core::error::{Error, Kind, Result};
use crate::core::ids::{ContainerId, Digest};
use crate::core::ports::{PackedLayer, RootfsOptions};
use crate::core::records::{ContainerRecord, PodRecord};
use crate::core::state::{ContainerPhase, PodPhase};
use crate::utils::atomic::{self, Durability};
use crate::utils::beneath;

/// File that makes a folder a checkpoint.
pub(super) const MANIFEST: &str = "pod.json";
/// In a container's folder: what it has changed of its image.
pub(super) const FILES: &str = "rootfs.tar";
/// Of the manifest.
pub(super) const VERSION: u32 = 1;
/// In the folder of a checkpoint under way: the folder that it goes to.
pub(super) const UNFINISHED_POD: &str = "unfinished-pod";

/// What a checkpoint is of.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Manifest {
    pub(super) version: u32,
    pub(super) handler: String,
    /// Unix time in nanoseconds.
    pub(super) made_at: i64,
    pub(super) containers: Vec<Entry>,
}

/// One of its containers.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Entry {
    pub(super) name: String,
    pub(super) folder: String,
    pub(super) image_id: Digest,
}

/// Whether a container's folder in a checkpoint can be called so.
pub(super) fn is_folder_name(name: &str) -> bool {
    name.strip_prefix('c').is_some_and(|n| !n.is_empty() && n.len() < 6 && n.bytes().all(|b| b.is_ascii_digit()))
}

/// The files of the moment.
enum Cut {
    /// To be read from snapshots.
    Point(String),
    /// Read.
    Packed(Vec<PackedLayer>),
}

impl Engine {
    /// Writes a checkpoint of a pod's running containers (`ids`, or all) into the folder `output`, absolute, which has to be empty
    /// or is made. FailedPrecondition when one does not run or the node lacks something, Unimplemented for what could not be
    /// restored: terminals, user namespaces.
    pub async fn checkpoint_pod(&self, scope: Scope, pod: &str, output: &str, ids: &[String]) -> Result<()> {
        let record = self.pod(scope, pod)?;
        let told = format!("checkpoint of pod {}", record.id.short());
        let named = |e: Error| e.context(format!("checkpoint of pod {}", record.id.short()));
        if record.phase != PodPhase::Ready {
            return Err(named(Error::precondition(format!("the sandbox is {}", record.phase.word()))));
        }
        let containers = self.dumped(scope, &record, ids).map_err(named)?;
        let path = output.to_owned();
        let output = blocking(move || check_output(&path)).await?;
        let busy = containers.iter().map(|c| Busy::take(&self.shared, &c.id)).collect::<Result<Vec<_>>>()?;
        let (answer, answered) = tokio::sync::oneshot::channel();
        let (engine, pod) = (self.clone(), record.clone());
        self.shared.tasks.spawn(told.clone(), async move {
            let _busy = busy;
            let folder = engine.shared.records.checkpoints().join(uuid::Uuid::new_v4().simple().to_string());
            let wanted = || !answer.is_closed();
            let work =
                Work { engine: &engine, scope, pod: &pod, containers: &containers, folder: &folder, output: &output };
            let result = tokio::select! {
                result = work.perform(&wanted) => result,
                // A backend ends its dump by itself before that, and in order.
                () = engine.shared.tasks.overdue(LAST) => Err(Error::new(Kind::Aborted, "the daemon ends")),
            };
            let removed = blocking(move || {
                // The note goes last: without it nobody would remove what is left elsewhere.
                discard_unfinished(&folder)?;
                beneath::remove_tree(folder.as_std_path()).map_err(|e| Error::io(format!("remove {folder}"), e))
            });
            if let Err(e) = removed.await {
                tracing::warn!(error = e.chain(), "what a pod's checkpoint needed stays until the next start");
            }
            if let Err(Err(e)) = answer.send(result.map_err(|e| e.context(told))) {
                tracing::warn!(error = e.chain(), "a checkpoint nobody waits for failed");
            }
        });
        answered.await.unwrap_or_else(|_| Err(Error::internal("its task ended without an answer")))
    }

    /// The containers that are asked for; all of them have to run.
    fn dumped(&self, scope: Scope, pod: &PodRecord, ids: &[String]) -> Result<Vec<Arc<ContainerRecord>>> {
        let mut chosen: Vec<Arc<ContainerRecord>> = Vec::new();
        if ids.is_empty() {
            chosen = self.shared.index().containers_of(&pod.id);
            chosen.retain(|c| c.phase == ContainerPhase::Running);
            chosen.sort_by_key(|c| c.created_at);
        }
        for id in ids {
            let container = self.container(scope, id)?;
            if container.pod != pod.id {
                return Err(Error::invalid(format!("container {id} is of pod {}", container.pod)));
            }
            if chosen.iter().any(|c| c.id == container.id) {
                return Err(Error::invalid(format!("container {id} is named twice")));
            }
            chosen.push(container);
        }
        let backend = self.shared.backend(&pod.handler)?;
        for c in &chosen {
            if c.phase != ContainerPhase::Running {
                return Err(Error::precondition(format!("container {}: {}", c.id, c.phase.word())));
            }
            backend.can_restore(&pod.config, &c.config).map_err(|e| e.context(format!("container {}", c.id)))?;
        }
        match chosen.is_empty() {
            true => Err(Error::precondition("none of its containers runs")),
            false => Ok(chosen),
        }
    }

    /// Reads what containers had changed at a moment, which is given back whatever comes of it.
    async fn pack_point(&self, ids: &[ContainerId], point: &str) -> Result<Vec<PackedLayer>> {
        let (layers, images) = (&self.shared.ports.layers, &self.shared.ports.images);
        let mut copies: Vec<ContainerId> = Vec::new();
        let read = async {
            for id in ids {
                // Nobody's: a daemon that dies here leaves what the next one's start removes.
                let copy = ContainerId::new();
                copies.push(copy.clone());
                self.shared.index_mut().begin_copy(&copy);
                layers.fork_rootfs(id, point, &copy, &RootfsOptions::default()).await?;
            }
            let mut packed = Vec::new();
            for copy in &copies {
                packed.push(images.pack(layers.rootfs_changes(copy).await?).await?);
            }
            Ok(packed)
        };
        let read = read.await;
        for copy in &copies {
            if let Err(e) = layers.remove_rootfs(copy).await {
                tracing::warn!(error = e.chain(), "a copy for a checkpoint stays until the next start");
            }
            self.shared.index_mut().end_copy(copy);
        }
        if let Err(e) = layers.drop_fork_point(ids, point).await {
            tracing::warn!(error = e.chain(), "a checkpoint's snapshots stay until the next start");
        }
        read
    }
}

/// One checkpoint under way.
struct Work<'a> {
    engine: &'a Engine,
    scope: Scope,
    pod: &'a Arc<PodRecord>,
    containers: &'a [Arc<ContainerRecord>],
    /// For what is needed on the way.
    folder: &'a Utf8Path,
    output: &'a Utf8Path,
}

impl Work<'_> {
    async fn perform(&self, wanted: &(dyn Fn() -> bool + Sync)) -> Result<()> {
        let still = || match wanted() {
            true => Ok(()),
            false => Err(Error::new(Kind::Aborted, "nobody waits for it any more")),
        };
        let Self { engine, pod, containers, folder, output, .. } = self;
        let shared = &engine.shared;
        make_folder(folder)?;
        self.begin().await?;
        let (layers, images, backend) = (&shared.ports.layers, &shared.ports.images, shared.backend(&pod.handler)?);
        let ids: Vec<ContainerId> = containers.iter().map(|c| c.id.clone()).collect();
        // Of no container: a driver tells whether it has moments that outlive the freeze.
        let snapshots = match layers.fork_point(&[], None).await {
            Ok(_) => true,
            Err(e) if e.kind() == Kind::Unimplemented => false,
            Err(e) => return Err(e),
        };
        let cut = async {
            for (n, container) in containers.iter().enumerate() {
                still()?;
                let (own, archive) = (folder.join(format!("c{n}")), output.join(format!("c{n}")));
                make_folder(&own)?;
                make_folder(&archive.join("checkpoint"))?;
                let run_dir = shared.run_dir(&pod.id, &container.id);
                let (run_dir, folder, archive) = (run_dir.as_path(), own.as_path(), archive.as_path());
                let context = CheckpointContext { pod, container, run_dir, folder, archive, groups: true };
                let dumped = backend.checkpoint(context).await;
                dumped.map_err(|e| e.context(format!("container {}", container.id)))?;
            }
            if !snapshots {
                let mut packed = Vec::new();
                for id in &ids {
                    packed.push(images.pack(layers.rootfs_changes(id).await?).await?);
                }
                return Ok(Cut::Packed(packed));
            }
            // What was written through mappings is not in the file system before that.
            let pids: Vec<i32> = containers.iter().map(|c| c.pid).collect();
            blocking(move || pids.into_iter().try_for_each(sync_root)).await?;
            layers.fork_point(&ids, None).await.map(Cut::Point)
        };
        let packed = match engine.frozen(self.scope, pod.id.as_str(), containers, cut).await? {
            Cut::Packed(packed) => packed,
            Cut::Point(point) => engine.pack_point(&ids, &point).await?,
        };
        for (n, layer) in packed.into_iter().enumerate() {
            still()?;
            let path = output.join(format!("c{n}")).join(FILES);
            blocking(move || copy_layer(layer, &path)).await?;
        }
        still()?;
        self.finish().await
    }

    /// Writes down what is about to be made, and takes the output folder.
    async fn begin(&self) -> Result<()> {
        let (note, output) = (self.folder.join(UNFINISHED_POD), self.output.to_owned());
        blocking(move || {
            let private = |path: &Utf8Path| std::fs::DirBuilder::new().mode(0o700).create(path);
            match private(&output) {
                Err(e) if e.kind() != std::io::ErrorKind::AlreadyExists => {
                    return Err(Error::io(format!("make {output}"), e));
                }
                _ => {}
            }
            // Who else writes there has it, and is not disturbed.
            let first = output.join("c0");
            private(&first).map_err(|e| Error::io(format!("make {first}"), e))?;
            atomic::write(note.as_std_path(), output.as_str().as_bytes(), 0o600, Durability::Process)
                .map_err(|e| Error::io(format!("write {note}"), e))
        })
        .await
    }

    async fn finish(&self) -> Result<()> {
        let entry = |(n, c): (usize, &Arc<ContainerRecord>)| Entry {
            name: c.config.name.clone(),
            folder: format!("c{n}"),
            image_id: c.image_id.clone(),
        };
        let manifest = Manifest {
            version: VERSION,
            handler: self.pod.handler.clone(),
            made_at: self.engine.shared.ports.clock.now_ns(),
            containers: self.containers.iter().enumerate().map(entry).collect(),
        };
        let text = serde_json::to_vec_pretty(&manifest)
            .map_err(|e| Error::because(Kind::Internal, "encode a checkpoint's manifest", e))?;
        let output = self.output.to_owned();
        blocking(move || {
            let failed = |e| Error::io(format!("write {output}"), e);
            let folder = std::fs::File::open(&output).map_err(failed)?;
            rustix::fs::syncfs(&folder).map_err(|e| failed(e.into()))?;
            let path = output.join(MANIFEST);
            atomic::write(path.as_std_path(), &text, 0o600, Durability::Machine)
                .map_err(|e| Error::io(format!("write {path}"), e))
        })
        .await
    }
}

/// An empty folder, or a name for one in a folder that is there. Blocks.
fn check_output(output: &str) -> Result<Utf8PathBuf> {
    let bad = |why: &str| Err(Error::invalid(format!("checkpoint output_path {output:?}: {why}")));
    let path = Utf8PathBuf::from(output);
    let plain = path.components().all(|c| !matches!(c, camino::Utf8Component::ParentDir));
    if !path.is_absolute() || output.contains('\0') || !plain || path.file_name().is_none() {
        return bad("not the absolute path of a folder");
    }
    match std::fs::symlink_metadata(&path) {
        Ok(there) if !there.is_dir() => bad("something else than a folder is there"),
        Ok(_) => match path.read_dir_utf8().map(|mut entries| entries.next().is_none()) {
            Ok(true) => Ok(path),
            Ok(false) => bad("it is not empty"),
            Err(e) => Err(Error::io(format!("list {path}"), e)),
        },
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => match path.parent().is_some_and(|p| p.is_dir()) {
            true => Ok(path),
            false => bad("its parent is not there"),
        },
        Err(e) => Err(Error::because(Kind::InvalidArgument, format!("checkpoint output_path {output:?}"), e)),
    }
}

/// Has the kernel write down what a container's processes have written. Blocks.
fn sync_root(pid: i32) -> Result<()> {
    let path = format!("/proc/{pid}/root");
    let synced = std::fs::File::open(&path).and_then(|root| Ok(rustix::fs::syncfs(root)?));
    synced.map_err(|e| Error::io(format!("sync {path}"), e))
}

fn copy_layer(layer: PackedLayer, path: &Utf8Path) -> Result<()> {
    use std::io::Seek;
    let failed = |e| Error::io(format!("write {path}"), e);
    let mut from = layer.file;
    from.rewind().map_err(failed)?;
    let to = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path);
    std::io::copy(&mut from, &mut to.map_err(failed)?).map_err(failed)?;
    Ok(())
}

/// Removes what a checkpoint that did not become one has written. `folder`: its own. Blocks.
pub(super) fn discard_unfinished(folder: &Utf8Path) -> Result<()> {
    let Ok(output) = std::fs::read_to_string(folder.join(UNFINISHED_POD)) else { return Ok(()) };
    let output = Utf8PathBuf::from(output);
    if output.join(MANIFEST).try_exists().map_err(|e| Error::io(format!("look at {output}"), e))? {
        return Ok(());
    }
    for entry in output.read_dir_utf8().into_iter().flatten().flatten() {
        if is_folder_name(entry.file_name()) {
            let path = entry.path();
            beneath::remove_tree(path.as_std_path()).map_err(|e| Error::io(format!("remove {path}"), e))?;
        }
    }
    Ok(())
}

#[cfg(test)]
#[allow(clippy::disallowed_methods)] // tests write files as they like
mod tests {
    use super::*;

    #[test]
    fn outputs_are_empty_folders() {
        let temp = tempfile::tempdir().unwrap();
        let at = |name: &str| format!("{}/{name}", temp.path().display());
        std::fs::create_dir_all(at("empty")).unwrap();
        std::fs::create_dir_all(at("full/x")).unwrap();
        std::fs::write(at("file"), "").unwrap();
        std::os::unix::fs::symlink("empty", at("link")).unwrap();
        assert!(check_output(&at("empty")).is_ok() && check_output(&at("new")).is_ok());
        for bad in ["", "/", "x", "a/b", &at("full"), &at("file"), &at("link"), &at("none/new"), &at("empty/../new")] {
            assert_eq!(check_output(bad).map_err(|e| e.kind()), Err(Kind::InvalidArgument), "{bad}");
        }
    }

    #[test]
    fn what_was_not_finished_goes_and_what_was_stays() {
        let temp = tempfile::tempdir().unwrap();
        let own = Utf8PathBuf::try_from(temp.path().join("own")).unwrap();
        let output = temp.path().join("out");
        for folder in ["c0/checkpoint", "c12", "cx", "other"] {
            std::fs::create_dir_all(output.join(folder)).unwrap();
        }
        std::fs::create_dir(&own).unwrap();
        discard_unfinished(&own).unwrap();
        std::fs::write(own.join(UNFINISHED_POD), output.to_str().unwrap()).unwrap();
        std::fs::write(output.join(MANIFEST), "{}").unwrap();
        discard_unfinished(&own).unwrap();
        assert!(output.join("c0").is_dir());
        std::fs::remove_file(output.join(MANIFEST)).unwrap();
        discard_unfinished(&own).unwrap();
        let left = |name: &str| output.join(name).is_dir();
        assert_eq!([left("c0"), left("c12"), left("cx"), left("other")], [false, false, true, true]);
    }
}
